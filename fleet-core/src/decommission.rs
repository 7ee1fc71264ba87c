//! Decommissioning: a device leaves for good, and what is known of it may go with it.
//!
//! [`begin`] shuts the device out in the caller's transaction. What is left to do is done by [`work`], whoever calls it and
//! however often it is interrupted: sessions and retained messages go, with a purge everything else. [`find`] and [`page`] show the report.
//! Holds: each step is one short transaction that deletes a bounded number of rows and counts them, so the report says what was
//! deleted and nothing else; the last one counts what is left of the device and finds nothing. Nothing is deleted while a broker has
//! a connection of the device. Ignorant of: MQTT, HTTP.

mod part;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::json;
use sqlx::types::Json;
use sqlx::{Connection as _, PgConnection, PgPool};
use uuid::Uuid;

use self::part::{Part, Target};
use crate::audit::{self, Author, Entry};
use crate::control::{self, Answer, Filter, Request};
use crate::device::{self, Device, DeviceType, GroupPath};
use crate::error::{Error, Result};
use crate::id::{AuthorityId, DecommissionId, DeviceId, DeviceKey, TenantId, TenantKey, UserId};
use crate::topic::ROOT;
use crate::{credential, revocation};

/// Most reports on a page.
pub const MAX_PAGE: usize = 1000;
/// What a broker had received before it heard that the device is gone is stored by then.
const SETTLE: TimeDelta = TimeDelta::seconds(2);
/// How long brokers may take to say that the device is gone.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// Devices looked at in one go.
const AT_ONCE: i64 = 100;
/// Steps for one device before others have their turn.
const STEPS: usize = 100;

/// Rows by table.
pub type Counts = BTreeMap<String, i64>;

/// That a device leaves, or has left, and what was deleted of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decommission {
    /// Names it.
    pub id: DecommissionId,
    /// Which device; after a purge another one may have its name.
    pub device: DeviceId,
    /// Whether everything goes that is known of it.
    pub purge: bool,
    /// Who wanted it.
    pub asked_by: UserId,
    /// When.
    pub asked_at: DateTime<Utc>,
    /// What was deleted so far.
    pub deleted: Counts,
    /// What was left in the end: zeros.
    pub left: Option<Counts>,
    /// When nothing was left.
    pub finished_at: Option<DateTime<Utc>>,
}

/// Shuts a device out for good: its credentials are revoked, its connections end within a second, and it cannot be enabled again. With
/// `purge` everything that is known of it is to be deleted, itself included. Asked again while that goes on it is the same, and may become a purge.
/// Answers what the device was, and what goes on. To be called in a transaction.
pub async fn begin(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: &DeviceId,
    purge: bool,
    by: UserId,
    now: DateTime<Utc>,
) -> Result<(Device, Decommission)> {
    let key = credential::lock(db, tenant, id).await?.key;
    let device = device::find(db, tenant, id).await?;
    if device.decommissioned_at.is_none() {
        shut_out(db, key, now).await?;
    }
    let decommission = put(db, tenant, &device, purge, by, now).await?;
    control::bump(db).await?;
    Ok((device, decommission))
}

async fn shut_out(db: &mut PgConnection, device: DeviceKey, now: DateTime<Utc>) -> Result<()> {
    sqlx::query!(
        "
        update device
           set gateway_key = null, version = version + 1, updated_at = $2,
               disabled = disabled or key = $1,
               decommissioned_at = case when key = $1 then $2 else decommissioned_at end
         where key = $1 or gateway_key = $1
        ",
        device.0,
        now
    )
    .execute(&mut *db)
    .await?;
    let revoked = sqlx::query_scalar!(
        r#"
        update credential
           set revoked_at = $2, revocation_reason = 'cessation-of-operation'
         where device_key = $1 and revoked_at is null and (expires_at is null or expires_at > $2)
     returning authority_id as "authority: AuthorityId"
        "#,
        device.0,
        now
    );
    let authorities = revoked.fetch_all(&mut *db).await?.into_iter().flatten().collect::<Vec<_>>();
    revocation::renew_by(db, &authorities, now).await
}

async fn put(
    db: &mut PgConnection,
    tenant: TenantKey,
    device: &Device,
    purge: bool,
    by: UserId,
    now: DateTime<Utc>,
) -> Result<Decommission> {
    let id = sqlx::query_scalar!(
        r#"
        insert into decommission (id, tenant_key, device_key, device_id, type, group_path, labels, purge, asked_by, asked_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
            on conflict (device_key) where finished_at is null do update
           set purge = decommission.purge or excluded.purge
     returning id as "id: DecommissionId"
        "#,
        DecommissionId::new().uuid(),
        tenant.0,
        device.key.0,
        device.id.as_str(),
        device.kind.as_ref().map(DeviceType::as_str),
        device.group.as_ref().map(GroupPath::as_str),
        Json(&device.labels) as _,
        purge,
        by.uuid(),
        now
    )
    .fetch_one(&mut *db)
    .await?;
    find(db, tenant, id).await
}

/// The report of that id.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: DecommissionId) -> Result<Decommission> {
    read(db, tenant, &[id.uuid()]).await?.pop().ok_or(Error::NoSuchDecommission(id))
}

/// At most `limit` (itself at most [`MAX_PAGE`]) of the reports in the order in which they were asked for, of one device or of all;
/// and where to go on.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    device: Option<&DeviceId>,
    after: Option<DecommissionId>,
    limit: usize,
) -> Result<(Vec<Decommission>, Option<DecommissionId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut ids = sqlx::query_scalar!(
        "
        select id from decommission
         where tenant_key = $1 and ($2::uuid is null or id > $2) and ($3::text is null or device_id = $3)
         order by id
         limit $4
        ",
        tenant.0,
        after.map(DecommissionId::uuid),
        device.map(DeviceId::as_str),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = ids.len() > limit;
    ids.truncate(limit);
    let reports = read(db, tenant, &ids).await?;
    let next = reports.last().filter(|_| more).map(|report| report.id);
    Ok((reports, next))
}

async fn read(db: &mut PgConnection, tenant: TenantKey, ids: &[Uuid]) -> Result<Vec<Decommission>> {
    let rows = sqlx::query!(
        r#"
        select id as "id: DecommissionId", device_id as "device: DeviceId", purge, asked_by as "asked_by: UserId", asked_at,
               deleted as "deleted: Json<Counts>", left_over as "left_over: Json<Counts>", finished_at
          from decommission
         where tenant_key = $1 and id = any($2)
         order by id
        "#,
        tenant.0,
        ids
    )
    .fetch_all(db)
    .await?;
    let report = rows.into_iter().map(|row| Decommission {
        id: row.id,
        device: row.device,
        purge: row.purge,
        asked_by: row.asked_by,
        asked_at: row.asked_at,
        deleted: row.deleted.0,
        left: row.left_over.map(|left| left.0),
        finished_at: row.finished_at,
    });
    Ok(report.collect())
}

/// What was done in one go.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Worked {
    /// Rows that were deleted.
    pub rows: u64,
    /// Decommissions that were finished.
    pub finished: u64,
    /// Those that go on: brokers still have connections, or there is more than is deleted in one go.
    pub unfinished: u64,
}

/// Does what is left to do, at most `rows` rows a transaction. To be called every second or so; several processes may do this at
/// once, and it may be cancelled at any point.
pub async fn work(pool: &PgPool, rows: u32, now: DateTime<Utc>) -> Result<Worked> {
    let mut worked = Worked::default();
    let due = due(&mut *pool.acquire().await?, now).await?;
    for due in due {
        let is_finished = is_gone(pool, &due).await? && go_on(pool, due.id, rows, now, &mut worked).await?;
        *(if is_finished { &mut worked.finished } else { &mut worked.unfinished }) += 1;
    }
    Ok(worked)
}

async fn go_on(pool: &PgPool, id: DecommissionId, rows: u32, now: DateTime<Utc>, worked: &mut Worked) -> Result<bool> {
    let mut db = pool.acquire().await?;
    for _ in 0..STEPS {
        match step(&mut db, id, rows, now).await? {
            Step::Deleted(gone) => worked.rows += gone,
            Step::Waits => return Ok(false),
            Step::Finished => return Ok(true),
        }
    }
    Ok(false)
}

/// A device that has been shut out for a while.
#[derive(Debug)]
struct Due {
    id: DecommissionId,
    tenant: TenantKey,
    tenant_id: TenantId,
    device: DeviceId,
}

async fn due(db: &mut PgConnection, now: DateTime<Utc>) -> Result<Vec<Due>> {
    let due = sqlx::query_as!(
        Due,
        r#"
        select c.id as "id: DecommissionId", c.tenant_key as "tenant: TenantKey", t.id as "tenant_id: TenantId",
               c.device_id as "device: DeviceId"
          from decommission c
          join tenant t on t.key = c.tenant_key
         where c.finished_at is null and c.asked_at <= $1
         order by c.asked_at
         limit $2
        "#,
        now - SETTLE,
        AT_ONCE
    );
    Ok(due.fetch_all(db).await?)
}

/// Whether no broker has a connection of the device any more; then they forget its retained messages.
async fn is_gone(pool: &PgPool, due: &Due) -> Result<bool> {
    let filter = Filter { device: Some(due.device.clone()), ..Filter::default() };
    let connections = Request::Connections { tenant: due.tenant, filter, after: None, limit: 1 };
    let forget = Request::ForgetRetained { below: below(&due.tenant_id, &due.device) };
    Ok(all_agree(pool, &connections).await? && all_agree(pool, &forget).await?)
}

/// Whether no broker has anything to the contrary; one that is of another version says nothing.
async fn all_agree(pool: &PgPool, request: &Request) -> Result<bool> {
    match control::ask(pool, request, ANSWER_WITHIN).await {
        Ok(answers) => {
            let agrees = |answer: &Answer| match answer {
                Answer::Connections(open) => open.is_empty(),
                Answer::Done | Answer::Unknown => true,
                _ => false,
            };
            Ok(answers.missing.is_empty() && answers.given.iter().all(agrees))
        }
        // Without a live broker there are no connections. One that is alive but silent is another matter, and so is a crowd of questions.
        Err(Error::NoBroker(_)) => Ok(!is_any_alive(pool).await?),
        Err(Error::Busy(_)) => Ok(false),
        Err(error) => Err(error),
    }
}

async fn is_any_alive(pool: &PgPool) -> Result<bool> {
    let alive = sqlx::query_scalar!(
        r#"select exists (select from broker_node where heartbeat_at > now() - make_interval(secs => $1)) as "alive!""#,
        control::LEASE_S
    );
    Ok(alive.fetch_one(pool).await?)
}

/// The topics of a device begin with that.
fn below(tenant: &TenantId, device: &DeviceId) -> String {
    format!("{ROOT}{tenant}/{device}/")
}

/// What one transaction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// So many rows are gone.
    Deleted(u64),
    /// Somebody else is at it, or something came while it was counted.
    Waits,
    /// There is nothing left.
    Finished,
}

async fn step(db: &mut PgConnection, id: DecommissionId, rows: u32, now: DateTime<Utc>) -> Result<Step> {
    let mut tx = db.begin().await?;
    let Some((tenant, purge, target)) = locked(&mut tx, id).await? else { return Ok(Step::Waits) };
    for part in Part::of(purge) {
        let gone = part.delete(&mut tx, &target, rows, now).await?;
        if gone > 0 {
            note(&mut tx, id, *part, gone).await?;
            tx.commit().await?;
            return Ok(Step::Deleted(gone));
        }
    }
    if purge && Part::Device.delete(&mut tx, &target, rows, now).await? > 0 {
        note(&mut tx, id, Part::Device, 1).await?;
    }
    let left = part::count(&mut tx, &target).await?;
    let left = left.into_iter().filter(|(name, _)| purge || Part::of(false).iter().any(|part| part.name() == name));
    let left = left.collect::<Counts>();
    if left.values().any(|left| *left > 0) {
        return Ok(Step::Waits);
    }
    finish(&mut tx, tenant, id, &left, now).await?;
    tx.commit().await?;
    Ok(Step::Finished)
}

/// One that is not finished, held until the transaction ends; `None` when somebody else holds it.
async fn locked(db: &mut PgConnection, id: DecommissionId) -> Result<Option<(TenantKey, bool, Target)>> {
    let row = sqlx::query!(
        r#"
        select c.tenant_key as "tenant: TenantKey", t.id as "tenant_id: TenantId", c.purge,
               c.device_key as "device_key: DeviceKey", c.device_id as "device: DeviceId"
          from decommission c
          join tenant t on t.key = c.tenant_key
         where c.id = $1 and c.finished_at is null
           for update of c skip locked
        "#,
        id.uuid()
    )
    .fetch_optional(db)
    .await?;
    Ok(row.and_then(|row| {
        let topics = below(&row.tenant_id, &row.device);
        Some((row.tenant, row.purge, Target { tenant: row.tenant, key: row.device_key?, id: row.device, topics }))
    }))
}

async fn note(db: &mut PgConnection, id: DecommissionId, part: Part, gone: u64) -> Result<()> {
    sqlx::query!(
        "
        update decommission
           set deleted = deleted || jsonb_build_object($2::text, coalesce((deleted ->> $2)::bigint, 0) + $3)
         where id = $1
        ",
        id.uuid(),
        part.name(),
        i64::try_from(gone).unwrap_or(i64::MAX)
    )
    .execute(db)
    .await?;
    Ok(())
}

async fn finish(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: DecommissionId,
    left: &Counts,
    now: DateTime<Utc>,
) -> Result<()> {
    sqlx::query!(
        "
        update decommission
           set finished_at = $2, left_over = $3, device_key = case when not purge then device_key end
         where id = $1
        ",
        id.uuid(),
        now,
        Json(left) as _
    )
    .execute(&mut *db)
    .await?;
    let report = find(db, tenant, id).await?;
    if report.purge {
        control::bump(db).await?;
    }
    let told = json!({
        "device": report.device, "purge": report.purge, "asked_by": report.asked_by, "asked_at": report.asked_at,
        "deleted": report.deleted, "left": report.left, "finished_at": report.finished_at,
    });
    let entry = Entry::of("decommission.finish", id).on(&report.device).after(&told);
    audit::record(db, &Author::system(tenant, "decommission"), &entry, now).await?;
    Ok(())
}
