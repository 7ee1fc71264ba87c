//! Audit: who changed what, from where, and what it was before.
//!
//! An [`Entry`] says what was done, an [`Author`] by whom; [`record`] seals both into the chain of the tenant, in the
//! transaction of the change. [`page`] and [`find`] show it, [`rows`] gives it away whole, [`verify`] proves that nobody has
//! touched it, [`expire`] deletes what is too old. Holds: a row is there exactly when its change is; rows of a tenant are
//! numbered without gaps; each contains the hash of the one before, so a row that was changed, deleted or moved is found
//! (ADR 13); no secret is in it, since bodies are those that the API answers. Ignorant of: HTTP.

mod chain;
mod list;
#[cfg(test)]
mod tests;

use std::fmt::Display;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

pub use chain::{Chain, EXPIRE_ROWS, Fault, Head, Report, Row, Trailer, expire, rows, verify};
pub use list::{Filter, MAX_PAGE, find, page};

use crate::Result;
use crate::id::{ApiKeyId, ClaimId, DeviceId, TenantId, TenantKey, UserId};

/// Longest `before` and `after`, in bytes of JSON; of a longer one its hash and length are kept.
pub const MAX_BODY_BYTES: usize = 65_536;
/// Longest text of any other kind, in characters; a longer one is cut.
pub const MAX_TEXT_CHARS: usize = 512;

/// Who does something.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Actor {
    /// A person who logged in, or tries to.
    User(UserId),
    /// A program with an API key.
    ApiKey(ApiKeyId),
    /// A device, by its own credential.
    Device(DeviceId),
    /// Somebody who shows the secret of a claim.
    Claim(ClaimId),
    /// The server by itself: which part of it.
    System(&'static str),
    /// Somebody unknown: what was given for a name.
    Unknown(String),
}

impl Actor {
    fn kind(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::ApiKey(_) => "api-key",
            Self::Device(_) => "device",
            Self::Claim(_) => "claim",
            Self::System(_) => "system",
            Self::Unknown(_) => "unknown",
        }
    }

    fn id(&self) -> Option<String> {
        match self {
            Self::User(id) => Some(id.to_string()),
            Self::ApiKey(id) => Some(id.to_string()),
            Self::Device(id) => Some(id.to_string()),
            Self::Claim(id) => Some(id.to_string()),
            Self::System(_) | Self::Unknown(_) => None,
        }
    }

    /// The name that is known without asking the database.
    fn name(&self) -> Option<String> {
        match self {
            Self::User(_) | Self::ApiKey(_) | Self::Claim(_) => None,
            Self::Device(id) => Some(id.to_string()),
            Self::System(part) => Some((*part).to_owned()),
            Self::Unknown(given) => Some(given.clone()),
        }
    }
}

/// Where a request came from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Source {
    /// The address of the other end.
    pub address: Option<String>,
    /// `x-request-id`.
    pub request_id: Option<String>,
    /// What the client calls itself.
    pub user_agent: Option<String>,
}

/// Who does something, in which tenant and from where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Author {
    /// In whose chain it is written.
    pub tenant: TenantKey,
    /// Who.
    pub actor: Actor,
    /// From where.
    pub source: Source,
}

impl Author {
    /// A part of the server that acts by itself.
    pub fn system(tenant: TenantKey, part: &'static str) -> Self {
        Self { tenant, actor: Actor::System(part), source: Source::default() }
    }

    /// A device that acts by itself.
    pub fn device(tenant: TenantKey, id: DeviceId, address: Option<String>) -> Self {
        let source = Source { address, ..Source::default() };
        Self { tenant, actor: Actor::Device(id), source }
    }
}

/// What was done to what.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    action: &'static str,
    id: String,
    device: Option<DeviceId>,
    before: Option<Value>,
    after: Option<Value>,
}

impl Entry {
    /// An action, `noun.verb` such as `device.update`, on the resource of that id; the noun says what kind of resource it is.
    pub fn of(action: &'static str, id: impl Display) -> Self {
        Self { action, id: id.to_string(), device: None, before: None, after: None }
    }

    /// The device it is about, when the resource is a device or belongs to one.
    #[must_use]
    pub fn on(self, device: &DeviceId) -> Self {
        Self { device: Some(device.clone()), ..self }
    }

    /// What the resource was, as the API answers it: without secrets.
    #[must_use]
    pub fn before(self, body: &impl Serialize) -> Self {
        Self { before: Some(plain(body)), ..self }
    }

    /// What the resource has become, as the API answers it: without secrets.
    #[must_use]
    pub fn after(self, body: &impl Serialize) -> Self {
        Self { after: Some(plain(body)), ..self }
    }

    /// What was done.
    pub fn action(&self) -> &'static str {
        self.action
    }

    /// To which resource.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether the resource is what it was.
    pub fn changes_nothing(&self) -> bool {
        self.before.is_some() && self.before == self.after
    }

    fn kind(&self) -> &'static str {
        self.action.split('.').next().unwrap_or_default()
    }
}

fn plain(body: &impl Serialize) -> Value {
    serde_json::to_value(body).expect("the bodies of the API are plain data")
}

/// What became of entries.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Recorded {
    /// Bodies that were too long, of which hash and length are kept.
    pub cut: u64,
}

/// Writes down what is done in this transaction. To be called last in it: until it ends, whoever changes something in the
/// same tenant waits.
pub async fn record(db: &mut PgConnection, by: &Author, entry: &Entry, now: DateTime<Utc>) -> Result<Recorded> {
    record_all(db, by, std::slice::from_ref(entry), now).await
}

/// As [`record`], for much at once. What changes nothing is left out.
pub async fn record_all(db: &mut PgConnection, by: &Author, entries: &[Entry], now: DateTime<Utc>) -> Result<Recorded> {
    let mut recorded = Recorded::default();
    let entries = entries.iter().filter(|entry| !entry.changes_nothing()).collect::<Vec<_>>();
    if entries.is_empty() {
        return Ok(recorded);
    }
    let end = end_of_chain(db, by).await?;
    let (mut prev, mut rows) = (end.hash, Vec::with_capacity(entries.len()));
    for (seq, entry) in (end.seq + 1..).zip(entries) {
        let before = entry.before.as_ref().map(|body| bounded(body, &mut recorded));
        let after = entry.after.as_ref().map(|body| bounded(body, &mut recorded));
        let mut row = Row {
            tenant: end.tenant.to_string(),
            seq,
            at: now,
            actor_kind: by.actor.kind().to_owned(),
            actor_id: by.actor.id(),
            actor_name: by.actor.name().or_else(|| end.name.clone()).map(short),
            action: entry.action.to_owned(),
            resource_kind: entry.kind().to_owned(),
            resource_id: short(entry.id.clone()),
            device: entry.device.as_ref().map(ToString::to_string),
            before,
            after,
            address: by.source.address.clone().map(short),
            request_id: by.source.request_id.clone().map(short),
            user_agent: by.source.user_agent.clone().map(short),
            prev_hash: prev,
            hash: [0; 32],
        };
        row.hash = row.seal();
        prev = row.hash;
        rows.push(row);
    }
    chain::append(db, by.tenant, &rows).await?;
    Ok(recorded)
}

/// The JSON, or what is left of it when there is too much.
fn bounded(body: &Value, recorded: &mut Recorded) -> String {
    let text = body.to_string();
    if text.len() <= MAX_BODY_BYTES {
        return text;
    }
    recorded.cut += 1;
    json!({ "cut": true, "bytes": text.len(), "sha256": hex::encode(Sha256::digest(&text)) }).to_string()
}

fn short(text: String) -> String {
    // PostgreSQL's texts cannot hold it.
    let text = if text.contains('\0') { text.replace('\0', "\u{fffd}") } else { text };
    if text.chars().count() <= MAX_TEXT_CHARS { text } else { text.chars().take(MAX_TEXT_CHARS).collect() }
}

/// Where the chain of a tenant ends, and what the author is called.
struct End {
    seq: i64,
    hash: [u8; 32],
    tenant: TenantId,
    name: Option<String>,
}

/// The end of the chain stands still until the transaction ends.
async fn end_of_chain(db: &mut PgConnection, by: &Author) -> Result<End> {
    if let Some(end) = locked_end(db, by).await? {
        return Ok(end);
    }
    sqlx::query!(
        "insert into audit_head (tenant_key, seq, hash) values ($1, 0, $2) on conflict (tenant_key) do nothing",
        by.tenant.0,
        &[0; 32]
    )
    .execute(&mut *db)
    .await?;
    let end = locked_end(db, by).await?;
    end.ok_or_else(|| crate::Error::Internal("the end of an audit chain cannot be seen".into()))
}

async fn locked_end(db: &mut PgConnection, by: &Author) -> Result<Option<End>> {
    let (user, key) = match &by.actor {
        Actor::User(id) => (Some(id.uuid()), None),
        Actor::ApiKey(id) => (None, Some(id.uuid())),
        _ => (None, None),
    };
    let row = sqlx::query!(
        r#"
        select h.seq, h.hash as "hash: [u8; 32]", t.id as "tenant: TenantId",
               coalesce((select email from app_user where id = $2),
                        (select k.name || ' of ' || u.email from api_key k join app_user u on u.id = k.user_id
                          where k.id = $3)) as name
          from audit_head h
          join tenant t on t.key = h.tenant_key
         where h.tenant_key = $1
           for no key update of h
        "#,
        by.tenant.0,
        user,
        key
    )
    .fetch_optional(db)
    .await?;
    Ok(row.map(|row| End { seq: row.seq, hash: row.hash, tenant: row.tenant, name: row.name }))
}
