//! Dispatch: devices for which something new waits, so that the broker that holds the connection of one sends it.
//!
//! [`note`] is called in the transaction that makes the news; every broker sees them with [`due`], woken by a NOTIFY on
//! [`crate::control::CHANNEL`] or at its next poll, and drops with [`done`] what it has sent. Holds: a row that nobody's connection asks for is gone after
//! [`STALE_S`] seconds, so the table is as small as what happened in the last seconds; nothing is lost with it, since what waits is looked for whenever a
//! device connects. Ignorant of: MQTT, HTTP, what is sent.

use sqlx::PgConnection;

use crate::Result;
use crate::control::CHANNEL;
use crate::id::{DeviceId, DeviceKey, TenantId};

/// By then every broker that holds the device has looked.
pub const STALE_S: f64 = 10.0;

/// What waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// What a device is to be.
    Shadow,
    /// What it is to do.
    Command,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Shadow => "shadow",
            Self::Command => "command",
        }
    }
}

/// A device for which something waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Due {
    /// The device.
    pub device: DeviceKey,
    /// Its tenant, as topics name it.
    pub tenant_id: TenantId,
    /// Its name.
    pub id: DeviceId,
    /// The device that may speak for it.
    pub gateway: Option<DeviceKey>,
    /// What waits.
    pub kind: Kind,
    /// Whether everybody has had time to look.
    pub is_stale: bool,
    turn: i64,
}

/// Says that something waits for a device. To be called in the transaction that makes it.
pub async fn note(db: &mut PgConnection, device: DeviceKey, kind: Kind) -> Result<()> {
    sqlx::query!(
        "
        with noted as (
            insert into dispatch (device_key, kind, turn, at) values ($1, $2, 1, now())
                on conflict (device_key, kind) do update set turn = dispatch.turn + 1, at = excluded.at
            returning 1)
        select pg_notify($3, '') from noted
        ",
        device.0,
        kind.as_str(),
        CHANNEL
    )
    .execute(db)
    .await?;
    Ok(())
}

/// At most `limit` devices for which something waits, the longest first.
pub async fn due(db: &mut PgConnection, limit: i64) -> Result<Vec<Due>> {
    let rows = sqlx::query!(
        r#"
        select x.device_key as "device: DeviceKey", x.kind, x.turn, x.at < now() - make_interval(secs => $2) as "is_stale!",
               d.id as "id: DeviceId", d.gateway_key as "gateway: DeviceKey", t.id as "tenant_id: TenantId"
          from dispatch x
          join device d on d.key = x.device_key
          join tenant t on t.key = d.tenant_key
         order by x.at
         limit $1
        "#,
        limit,
        STALE_S
    )
    .fetch_all(db)
    .await?;
    let due = rows.into_iter().map(|row| Due {
        device: row.device,
        tenant_id: row.tenant_id,
        id: row.id,
        gateway: row.gateway,
        kind: if row.kind == Kind::Shadow.as_str() { Kind::Shadow } else { Kind::Command },
        is_stale: row.is_stale,
        turn: row.turn,
    });
    Ok(due.collect())
}

/// Drops rows, unless something more has come for them.
pub async fn done(db: &mut PgConnection, done: &[Due]) -> Result<()> {
    let keys = done.iter().map(|due| due.device.0).collect::<Vec<_>>();
    let kinds = done.iter().map(|due| due.kind.as_str().to_owned()).collect::<Vec<_>>();
    let turns = done.iter().map(|due| due.turn).collect::<Vec<_>>();
    sqlx::query!(
        "
        delete from dispatch x
         using unnest($1::bigint[], $2::text[], $3::bigint[]) as done (device_key, kind, turn)
         where x.device_key = done.device_key and x.kind = done.kind and x.turn = done.turn
        ",
        &keys,
        &kinds,
        &turns
    )
    .execute(db)
    .await?;
    Ok(())
}
