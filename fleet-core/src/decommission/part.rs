//! What there is of a device, table by table: deleted in bounded portions, and counted.
//!
//! A table that is added to the schema and refers to devices is added here; a test that asks the database's catalogue finds it
//! otherwise.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::postgres::PgQueryResult;

use super::Counts;
use crate::error::Result;
use crate::id::{DeviceId, DeviceKey, TenantKey};
use crate::revocation;

/// The device whose traces go.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) tenant: TenantKey,
    pub(super) key: DeviceKey,
    pub(super) id: DeviceId,
    /// Its topics begin with that.
    pub(super) topics: String,
}

/// A table that has something of devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Telemetry,
    Log,
    LogSuppressed,
    DeviceLatest,
    DeviceStatus,
    Shadow,
    ShadowHistory,
    LogLevel,
    Dispatch,
    Command,
    SessionMessage,
    SessionReceived,
    SessionSubscription,
    Session,
    RetainedMessage,
    DeadLetter,
    ConnectionEvent,
    ClaimRequest,
    Credential,
    /// In the last transaction: it holds the name until nothing else is left.
    Device,
}

/// Of any device that has left.
const ALWAYS: &[Part] = &[
    Part::SessionMessage,
    Part::SessionReceived,
    Part::SessionSubscription,
    Part::Session,
    Part::RetainedMessage,
    Part::LogLevel,
    Part::Dispatch,
];
/// Of one that is purged, what there is most of first.
const PURGE: &[Part] = &[
    Part::Telemetry,
    Part::Log,
    Part::LogSuppressed,
    Part::SessionMessage,
    Part::SessionReceived,
    Part::SessionSubscription,
    Part::Session,
    Part::RetainedMessage,
    Part::DeadLetter,
    Part::ConnectionEvent,
    Part::ClaimRequest,
    Part::ShadowHistory,
    Part::Shadow,
    Part::LogLevel,
    Part::Dispatch,
    Part::Command,
    Part::DeviceLatest,
    Part::DeviceStatus,
    Part::Credential,
];

impl Part {
    /// What goes before the device itself.
    pub(super) fn of(purge: bool) -> &'static [Self] {
        if purge { PURGE } else { ALWAYS }
    }

    /// The table.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Telemetry => "telemetry",
            Self::Log => "log",
            Self::LogSuppressed => "log_suppressed",
            Self::DeviceLatest => "device_latest",
            Self::DeviceStatus => "device_status",
            Self::Shadow => "shadow",
            Self::ShadowHistory => "shadow_history",
            Self::LogLevel => "log_level",
            Self::Dispatch => "dispatch",
            Self::Command => "command",
            Self::SessionMessage => "session_message",
            Self::SessionReceived => "session_received",
            Self::SessionSubscription => "session_subscription",
            Self::Session => "session",
            Self::RetainedMessage => "retained_message",
            Self::DeadLetter => "dead_letter",
            Self::ConnectionEvent => "connection_event",
            Self::ClaimRequest => "claim_request",
            Self::Credential => "credential",
            Self::Device => "device",
        }
    }

    /// Deletes about `rows` rows at the most: how many it were.
    pub(super) async fn delete(
        self,
        db: &mut PgConnection,
        target: &Target,
        rows: u32,
        now: DateTime<Utc>,
    ) -> Result<u64> {
        let rows = i64::from(rows.max(1));
        let gone = match self {
            Self::Telemetry => telemetry(db, target, rows).await?,
            Self::Log => log(db, target, rows).await?,
            Self::SessionMessage | Self::SessionReceived | Self::SessionSubscription | Self::Session => {
                self.of_sessions(db, target, rows).await?
            }
            Self::RetainedMessage | Self::DeadLetter | Self::ConnectionEvent | Self::ClaimRequest => {
                self.of_name(db, target, rows).await?
            }
            Self::LogSuppressed => {
                sqlx::query!("delete from log_suppressed where device_key = $1", target.key.0).execute(db).await?
            }
            Self::DeviceLatest => {
                sqlx::query!("delete from device_latest where device_key = $1", target.key.0).execute(db).await?
            }
            Self::DeviceStatus => {
                sqlx::query!("delete from device_status where device_key = $1", target.key.0).execute(db).await?
            }
            Self::Shadow => sqlx::query!("delete from shadow where device_key = $1", target.key.0).execute(db).await?,
            Self::ShadowHistory => {
                sqlx::query!(
                    "
                    delete from shadow_history
                     where ctid = any(array(select ctid from shadow_history where device_key = $1 limit $2))
                    ",
                    target.key.0,
                    rows
                )
                .execute(db)
                .await?
            }
            Self::Command => {
                sqlx::query!(
                    "
                    delete from command
                     where id = any(array(select id from command where device_key = $1 limit $2))
                    ",
                    target.key.0,
                    rows
                )
                .execute(db)
                .await?
            }
            Self::LogLevel => {
                sqlx::query!("delete from log_level where device_key = $1", target.key.0).execute(db).await?
            }
            Self::Dispatch => {
                sqlx::query!("delete from dispatch where device_key = $1", target.key.0).execute(db).await?
            }
            Self::Credential => {
                // What was revoked stays on the lists of those who check them elsewhere.
                revocation::outlive(db, target.key, now).await?;
                sqlx::query!("delete from credential where device_key = $1", target.key.0).execute(db).await?
            }
            Self::Device => return delete_device(db, target, now).await,
        };
        Ok(gone.rows_affected())
    }

    async fn of_sessions(self, db: &mut PgConnection, target: &Target, rows: i64) -> sqlx::Result<PgQueryResult> {
        let key = target.key.0;
        match self {
            Self::SessionMessage => {
                sqlx::query!(
                    "
                    delete from session_message
                     where ctid = any(array(select m.ctid from session_message m join session s on s.id = m.session_id
                                             where s.device_key = $1 limit $2))
                    ",
                    key,
                    rows
                )
                .execute(db)
                .await
            }
            Self::SessionReceived => {
                sqlx::query!(
                    "
                    delete from session_received
                     where ctid = any(array(select r.ctid from session_received r join session s on s.id = r.session_id
                                             where s.device_key = $1 limit $2))
                    ",
                    key,
                    rows
                )
                .execute(db)
                .await
            }
            Self::SessionSubscription => {
                sqlx::query!(
                    "
                    delete from session_subscription
                     where ctid = any(array(select u.ctid from session_subscription u join session s on s.id = u.session_id
                                             where s.device_key = $1 limit $2))
                    ",
                    key,
                    rows
                )
                .execute(db)
                .await
            }
            _ => {
                sqlx::query!(
                    "delete from session where id = any(array(select id from session where device_key = $1 limit $2))",
                    key,
                    rows
                )
                .execute(db)
                .await
            }
        }
    }

    async fn of_name(self, db: &mut PgConnection, target: &Target, rows: i64) -> sqlx::Result<PgQueryResult> {
        let (tenant, id) = (target.tenant.0, target.id.as_str());
        match self {
            Self::RetainedMessage => {
                sqlx::query!(
                    "
                    delete from retained_message
                     where digest = any(array(select digest from retained_message where starts_with(topic, $1) limit $2))
                    ",
                    target.topics,
                    rows
                )
                .execute(db)
                .await
            }
            Self::DeadLetter => {
                sqlx::query!(
                    "
                    delete from dead_letter
                     where id = any(array(select id from dead_letter where tenant_key = $1 and device_id = $2 limit $3))
                    ",
                    tenant,
                    id,
                    rows
                )
                .execute(db)
                .await
            }
            Self::ConnectionEvent => {
                sqlx::query!(
                    "
                    delete from connection_event
                     where id = any(array(select id from connection_event where device_key = $1 limit $2))
                    ",
                    target.key.0,
                    rows
                )
                .execute(db)
                .await
            }
            _ => {
                sqlx::query!(
                    "
                    delete from claim_request
                     where id = any(array(select id from claim_request
                                           where tenant_key = $1 and (device_id = $2 or device_key = $3) limit $4))
                    ",
                    tenant,
                    id,
                    target.key.0,
                    rows
                )
                .execute(db)
                .await
            }
        }
    }
}

/// Readings, oldest first, up to the time of the one behind the portion: the key of each partition is walked from its beginning.
async fn telemetry(db: &mut PgConnection, target: &Target, rows: i64) -> sqlx::Result<PgQueryResult> {
    sqlx::query!(
        "
        delete from telemetry
         where device_key = $1
           and ts <= coalesce((select ts from telemetry where device_key = $1 order by ts limit 1 offset $2), 'infinity')
        ",
        target.key.0,
        rows - 1
    )
    .execute(db)
    .await
}

/// Lines, like readings.
async fn log(db: &mut PgConnection, target: &Target, rows: i64) -> sqlx::Result<PgQueryResult> {
    sqlx::query!(
        "
        delete from log
         where device_key = $1
           and ts <= coalesce((select ts from log where device_key = $1 order by ts limit 1 offset $2), 'infinity')
        ",
        target.key.0,
        rows - 1
    )
    .execute(db)
    .await
}

/// Deletes the device itself; its children stay, without a gateway.
async fn delete_device(db: &mut PgConnection, target: &Target, now: DateTime<Utc>) -> Result<u64> {
    sqlx::query!(
        "update device set gateway_key = null, version = version + 1, updated_at = $2 where gateway_key = $1",
        target.key.0,
        now
    )
    .execute(&mut *db)
    .await?;
    let gone = sqlx::query!("delete from device where key = $1", target.key.0).execute(db).await?;
    Ok(gone.rows_affected())
}

/// What there is of a device, in all of the tables.
pub(super) async fn count(db: &mut PgConnection, target: &Target) -> Result<Counts> {
    let counts = sqlx::query!(
        r#"
        select 'telemetry' as "part!", count(*) as "rows!" from telemetry where device_key = $1
     union all select 'log', count(*) from log where device_key = $1
     union all select 'log_suppressed', count(*) from log_suppressed where device_key = $1
     union all select 'device_latest', count(*) from device_latest where device_key = $1
     union all select 'device_status', count(*) from device_status where device_key = $1
     union all select 'shadow', count(*) from shadow where device_key = $1
     union all select 'shadow_history', count(*) from shadow_history where device_key = $1
     union all select 'log_level', count(*) from log_level where device_key = $1
     union all select 'command', count(*) from command where device_key = $1
     union all select 'dispatch', count(*) from dispatch where device_key = $1
     union all select 'session_message', count(*)
                 from session_message m join session s on s.id = m.session_id where s.device_key = $1
     union all select 'session_received', count(*)
                 from session_received r join session s on s.id = r.session_id where s.device_key = $1
     union all select 'session_subscription', count(*)
                 from session_subscription u join session s on s.id = u.session_id where s.device_key = $1
     union all select 'session', count(*) from session where device_key = $1
     union all select 'retained_message', count(*) from retained_message where starts_with(topic, $4)
     union all select 'dead_letter', count(*) from dead_letter where tenant_key = $2 and device_id = $3
     union all select 'connection_event', count(*) from connection_event where device_key = $1
     union all select 'claim_request', count(*)
                 from claim_request where tenant_key = $2 and (device_id = $3 or device_key = $1)
     union all select 'credential', count(*) from credential where device_key = $1
     union all select 'device', count(*) from device where key = $1
        "#,
        target.key.0,
        target.tenant.0,
        target.id.as_str(),
        target.topics
    );
    Ok(counts.fetch_all(db).await?.into_iter().map(|row| (row.part, row.rows)).collect())
}
