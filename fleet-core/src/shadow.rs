//! Shadows: what a device is to be, what it says it is, and the difference.
//!
//! People set `desired` and the device `reported`, by [`change`]; [`Shadow::delta`] is what the device has yet to do. [`find`]
//! shows a shadow, [`at`] as it was, [`tell`] what its device is to hear. Holds: a change is a merge patch (RFC 7396): what is
//! left out stays, null deletes, arrays are replaced whole; each change makes the next version, one that expects another version is
//! refused, one that changes nothing makes none; documents are bounded in bytes and depth, versions kept in number (ADR 16).
//! Ignorant of: MQTT, HTTP, what the members mean.

pub mod message;
#[cfg(test)]
mod tests;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::PgConnection;

use crate::config;
use crate::error::{Error, Result, check_version};
use crate::id::{DeviceId, DeviceKey, TenantId};

/// Members of a JSON object.
pub type Document = Map<String, Value>;

/// A device's shadow; before the first change both sides are empty and the version is 0.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Shadow {
    /// What it is to be.
    pub desired: Document,
    /// What it says it is.
    pub reported: Document,
    /// Rises with every change.
    pub version: i64,
    /// When it was changed.
    pub updated_at: Option<DateTime<Utc>>,
}

impl Shadow {
    /// What is desired and not reported.
    pub fn delta(&self) -> Document {
        difference(&self.desired, &self.reported)
    }
}

/// Merges a patch into a document (RFC 7396): null deletes, objects are merged, all else is replaced.
pub fn merge(document: &mut Document, patch: &Document) {
    for (name, value) in patch {
        match value {
            Value::Null => {
                document.remove(name);
            }
            Value::Object(patch) => {
                let member = document.entry(name).or_insert(Value::Null);
                if !member.is_object() {
                    *member = Value::Object(Document::new());
                }
                if let Value::Object(member) = member {
                    merge(member, patch);
                }
            }
            other => {
                document.insert(name.clone(), other.clone());
            }
        }
    }
}

/// The members of `desired` that `reported` has not, or has with another value; of objects within objects just those that differ.
pub fn difference(desired: &Document, reported: &Document) -> Document {
    let mut delta = Document::new();
    for (name, wanted) in desired {
        match (wanted, reported.get(name)) {
            (Value::Object(wanted), Some(Value::Object(have))) => {
                let inner = difference(wanted, have);
                if !inner.is_empty() {
                    delta.insert(name.clone(), Value::Object(inner));
                }
            }
            (wanted, Some(have)) if is_same(wanted, have) => {}
            (wanted, _) => {
                delta.insert(name.clone(), wanted.clone());
            }
        }
    }
    delta
}

/// Whether two values are the same; 1 and 1.0 are.
fn is_same(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            one == other || one.as_f64() == other.as_f64() && !are_whole(one, other)
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| is_same(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            one.len() == other.len()
                && one.iter().all(|(name, one)| other.get(name).is_some_and(|other| is_same(one, other)))
        }
        _ => one == other,
    }
}

/// Whether both are integers, which a float of 53 bits may not tell apart.
fn are_whole(one: &serde_json::Number, other: &serde_json::Number) -> bool {
    !one.is_f64() && !other.is_f64()
}

/// A null for whatever `told` has and `desired` has not: it is wished no more.
fn withdrawn(told: &Document, desired: &Document) -> Document {
    let mut gone = Document::new();
    for (name, was) in told {
        match (was, desired.get(name)) {
            (_, None) => {
                gone.insert(name.clone(), Value::Null);
            }
            (Value::Object(was), Some(Value::Object(is))) => {
                let inner = withdrawn(was, is);
                if !inner.is_empty() {
                    gone.insert(name.clone(), Value::Object(inner));
                }
            }
            _ => {}
        }
    }
    gone
}

/// Puts one document over another, with no meaning given to null.
fn overlay(under: &mut Document, over: Document) {
    for (name, value) in over {
        match (under.get_mut(&name), value) {
            (Some(Value::Object(under)), Value::Object(over)) => overlay(under, over),
            (_, value) => {
                under.insert(name, value);
            }
        }
    }
}

/// The side of a shadow that is changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// By people and programs.
    Desired,
    /// By the device.
    Reported,
}

impl Side {
    /// Its name in documents.
    pub fn name(self) -> &'static str {
        match self {
            Self::Desired => "desired",
            Self::Reported => "reported",
        }
    }
}

/// A change of one side.
#[derive(Debug, Clone)]
pub struct Change {
    /// Which.
    pub side: Side,
    /// What to merge; `None`: all of it goes.
    pub patch: Option<Document>,
    /// The version it must have, if that was said.
    pub version: Option<i64>,
    /// One of which it must have, by `If-Match`; empty: any.
    pub if_match: Vec<i64>,
}

impl Change {
    /// A patch of what is desired, whatever the version.
    pub fn desired(patch: Document) -> Self {
        Self { side: Side::Desired, patch: Some(patch), version: None, if_match: Vec::new() }
    }
}

/// What was changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Changed {
    /// As it was.
    pub before: Shadow,
    /// As it is.
    pub after: Shadow,
}

/// The shadow of a device.
pub async fn find(db: &mut PgConnection, device: DeviceKey) -> Result<Shadow> {
    let row = sqlx::query!("select version, desired, reported, updated_at from shadow where device_key = $1", device.0);
    let row = row.fetch_optional(db).await?;
    Ok(row.map_or_else(Shadow::default, |row| Shadow {
        desired: document(row.desired),
        reported: document(row.reported),
        version: row.version,
        updated_at: Some(row.updated_at).filter(|_| row.version > 0),
    }))
}

/// The shadow as it was at a moment, as far back as it is kept.
pub async fn at(db: &mut PgConnection, device: DeviceKey, moment: DateTime<Utc>) -> Result<Shadow> {
    let row = sqlx::query!(
        r#"
        select h.version as "version?", h.desired as "desired?", h.reported as "reported?", h.at as "at?",
               (select min(version) from shadow_history where device_key = $1) as oldest
          from (select) one
          left join lateral (select * from shadow_history where device_key = $1 and at <= $2 order by version desc limit 1) h
            on true
        "#,
        device.0,
        moment
    )
    .fetch_one(db)
    .await?;
    match (row.version, row.desired, row.reported) {
        (Some(version), Some(desired), Some(reported)) => {
            Ok(Shadow { desired: document(desired), reported: document(reported), version, updated_at: row.at })
        }
        // Before its first version it was empty.
        _ if row.oldest.is_none_or(|oldest| oldest == 1) => Ok(Shadow::default()),
        _ => Err(Error::ShadowForgotten),
    }
}

/// Changes one side. To be called in a transaction, in the name of `by`.
pub async fn change(
    db: &mut PgConnection,
    device: DeviceKey,
    change: &Change,
    by: &str,
    settings: &config::Shadow,
    now: DateTime<Utc>,
) -> Result<Changed> {
    let before = lock(db, device, now).await?;
    if let Some(expected) = change.version.filter(|expected| *expected != before.version) {
        return Err(Error::ShadowConflict { expected, found: before.version });
    }
    check_version(before.version, &change.if_match)?;
    let mut after = before.clone();
    let side = match change.side {
        Side::Desired => &mut after.desired,
        Side::Reported => &mut after.reported,
    };
    match &change.patch {
        Some(patch) => {
            check_depth(patch, change.side, settings.max_depth)?;
            merge(side, patch);
        }
        None => side.clear(),
    }
    let bytes = serde_json::to_vec(side).map_or(usize::MAX, |json| json.len());
    if after == before {
        return Ok(Changed { before, after });
    }
    if bytes > settings.max_bytes {
        return Err(Error::ShadowTooLarge { side: change.side.name(), bytes, most: settings.max_bytes });
    }
    after.version += 1;
    after.updated_at = Some(now);
    keep(db, device, &after, by, settings).await?;
    Ok(Changed { before, after })
}

/// The shadow, which stays what it is until the transaction ends.
pub(crate) async fn lock(db: &mut PgConnection, device: DeviceKey, now: DateTime<Utc>) -> Result<Shadow> {
    sqlx::query!(
        "insert into shadow (device_key, version, desired, reported, updated_at) values ($1, 0, '{}', '{}', $2)
             on conflict (device_key) do nothing",
        device.0,
        now
    )
    .execute(&mut *db)
    .await?;
    let row = sqlx::query!(
        "select version, desired, reported, updated_at from shadow where device_key = $1 for update",
        device.0
    );
    let row = row.fetch_one(db).await?;
    Ok(Shadow {
        desired: document(row.desired),
        reported: document(row.reported),
        version: row.version,
        updated_at: Some(row.updated_at).filter(|_| row.version > 0),
    })
}

async fn keep(
    db: &mut PgConnection,
    device: DeviceKey,
    shadow: &Shadow,
    by: &str,
    settings: &config::Shadow,
) -> Result<()> {
    let (desired, reported) = (Value::Object(shadow.desired.clone()), Value::Object(shadow.reported.clone()));
    sqlx::query!(
        "
        with changed as (
            update shadow set version = $2, desired = $3, reported = $4, updated_at = $5 where device_key = $1),
        forgotten as (
            delete from shadow_history where device_key = $1 and version <= $2 - $7::bigint)
        insert into shadow_history (device_key, version, desired, reported, at, by) values ($1, $2, $3, $4, $5, $6)
        ",
        device.0,
        shadow.version,
        desired,
        reported,
        shadow.updated_at,
        by,
        i64::from(settings.history_versions)
    )
    .execute(db)
    .await?;
    Ok(())
}

/// What a device is to hear, and under which topics.
#[derive(Debug, Clone, PartialEq)]
pub struct News {
    /// The device.
    pub device: DeviceKey,
    /// Its tenant, as topics name it.
    pub tenant_id: TenantId,
    /// Its name.
    pub id: DeviceId,
    /// The version it is about.
    pub version: i64,
    /// What is desired and not reported, and null for what is wished no more.
    pub delta: Document,
    /// When it was changed.
    pub updated_at: DateTime<Utc>,
}

/// What these devices are to hear; those for whom there is nothing are left out. To be called in a transaction: when it is
/// committed they have heard it.
pub async fn tell(db: &mut PgConnection, devices: &[DeviceKey]) -> Result<Vec<News>> {
    let keys = devices.iter().map(|key| key.0).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        select s.device_key as "device: DeviceKey", s.version, s.desired, s.reported, s.told, s.updated_at,
               d.id as "id: DeviceId", t.id as "tenant_id: TenantId"
          from shadow s
          join device d on d.key = s.device_key
          join tenant t on t.key = d.tenant_key
         where s.device_key = any($1)
         order by s.device_key
           for update of s
        "#,
        &keys
    )
    .fetch_all(&mut *db)
    .await?;
    sqlx::query!(
        "update shadow set told = desired where device_key = any($1) and told is distinct from desired",
        &keys
    )
    .execute(db)
    .await?;
    let news = rows.into_iter().map(|row| {
        let (desired, told) = (document(row.desired), document(row.told));
        let mut delta = difference(&desired, &document(row.reported));
        overlay(&mut delta, withdrawn(&told, &desired));
        News {
            device: row.device,
            tenant_id: row.tenant_id,
            id: row.id,
            version: row.version,
            delta,
            updated_at: row.updated_at,
        }
    });
    Ok(news.filter(|news| !news.delta.is_empty()).collect())
}

/// Notes that a device has seen all that is desired in `shadow`.
pub async fn seen(db: &mut PgConnection, device: DeviceKey, shadow: &Shadow) -> Result<()> {
    sqlx::query!(
        "update shadow set told = desired where device_key = $1 and version = $2 and told is distinct from desired",
        device.0,
        shadow.version
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The members of an object; the columns hold nothing else.
pub(crate) fn document(value: Value) -> Document {
    if let Value::Object(document) = value { document } else { Document::new() }
}

/// Refuses what is deeper than `most`, and text that the database cannot hold.
fn check_depth(document: &Document, side: Side, most: usize) -> Result<()> {
    if document.keys().any(|name| name.contains('\0')) || document.values().any(has_nul) {
        return Err(Error::Invalid(format!("{}: expected text without U+0000", side.name())));
    }
    let depth = 1 + document.values().map(depth).max().unwrap_or(0);
    if depth > most {
        return Err(Error::Invalid(format!("{} is {depth} levels deep: expected at most {most}", side.name())));
    }
    Ok(())
}

fn depth(value: &Value) -> usize {
    match value {
        Value::Object(members) => 1 + members.values().map(depth).max().unwrap_or(0),
        Value::Array(items) => 1 + items.iter().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

pub(crate) fn has_nul(value: &Value) -> bool {
    match value {
        Value::String(text) => text.contains('\0'),
        Value::Array(items) => items.iter().any(has_nul),
        Value::Object(members) => members.iter().any(|(name, value)| name.contains('\0') || has_nul(value)),
        _ => false,
    }
}
