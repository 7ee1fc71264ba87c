//! How commands go on: sent, delivered, overtaken by their deadlines.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};

use super::{MAX_STEPS, State, step};
use crate::error::Result;
use crate::id::{CommandId, ConnectionId, DeviceId, DeviceKey, TenantId};

/// Commands that one call of [`work`] ends.
pub const MAX_WORK: i64 = 1_000;

/// A command on its way to its device.
#[derive(Debug, Clone, PartialEq)]
pub struct Sent {
    /// Its id.
    pub id: CommandId,
    /// Its device's tenant, as topics name it.
    pub tenant_id: TenantId,
    /// Its device.
    pub device: DeviceId,
    /// What is to be done.
    pub name: String,
    /// With what.
    pub params: Value,
    /// Until when.
    pub deadline: DateTime<Utc>,
}

impl Sent {
    /// It as a message: `{"name", "params", "deadline"}`.
    pub fn message(&self) -> Value {
        json!({ "name": self.name, "params": self.params, "deadline": self.deadline.timestamp_millis() })
    }
}

/// What these devices are to be sent, each on its connection: whatever waits, and whatever was sent on an earlier connection and not acknowledged.
/// They are `sent` when the transaction is committed.
pub async fn to_send(
    db: &mut PgConnection,
    devices: &[(DeviceKey, ConnectionId)],
    now: DateTime<Utc>,
) -> Result<Vec<Sent>> {
    let (keys, connections): (Vec<_>, Vec<_>) = devices.iter().map(|(key, id)| (key.0, id.uuid())).unzip();
    let mut rows = sqlx::query!(
        r#"
        with due as (
            select c.id, w.connection
              from unnest($1::bigint[], $2::uuid[]) as w (device_key, connection)
              join command c on c.device_key = w.device_key
             where c.state in ('queued', 'sent') and c.deadline > $3
               and (c.state = 'queued' or c.sent_to is distinct from w.connection)
             order by c.id
               for update of c)
        update command c
           set state = 'sent', sent_to = due.connection, updated_at = $3,
               steps = case when jsonb_array_length(steps) < $4
                            then steps || jsonb_build_array($5::jsonb || jsonb_build_object(
                                     'evidence', jsonb_build_object('connection', 'con_' || replace(due.connection::text, '-', ''))))
                            else steps end
          from due, device d, tenant t
         where c.id = due.id and d.key = c.device_key and t.key = d.tenant_key
        returning c.id as "id: CommandId", t.id as "tenant_id: TenantId", d.id as "device: DeviceId", c.name, c.params, c.deadline
        "#,
        &keys,
        &connections,
        now,
        MAX_STEPS,
        step(Some(State::Sent), now, &Value::Null)
    )
    .fetch_all(db)
    .await?;
    rows.sort_by_key(|row| row.id.uuid());
    let sent = rows.into_iter().map(|row| Sent {
        id: row.id,
        tenant_id: row.tenant_id,
        device: row.device,
        name: row.name,
        params: row.params,
        deadline: row.deadline,
    });
    Ok(sent.collect())
}

/// Notes that devices have acknowledged the messages of these commands. One whose device was faster to answer keeps its state,
/// with this as evidence.
pub async fn deliver(db: &mut PgConnection, delivered: &[(DeviceKey, CommandId)], now: DateTime<Utc>) -> Result<u64> {
    let (keys, ids): (Vec<_>, Vec<_>) = delivered.iter().map(|(key, id)| (key.0, id.uuid())).unzip();
    let acknowledged = json!({ "acknowledged": true });
    let noted = sqlx::query!(
        "
        update command c
           set delivered_at = $3, updated_at = greatest(updated_at, $3), state = case when c.state = 'sent' then 'delivered' else c.state end,
               steps = steps || case when c.state = 'sent' then $4::jsonb else $5::jsonb end
          from unnest($1::bigint[], $2::uuid[]) as w (device_key, id)
         where c.id = w.id and c.device_key = w.device_key and c.delivered_at is null and c.sent_to is not null
        ",
        &keys,
        &ids,
        now,
        json!([step(Some(State::Delivered), now, &acknowledged)]),
        json!([step(None, now, &acknowledged)])
    );
    Ok(noted.execute(db).await?.rows_affected())
}

/// Ends commands whose deadline has passed, a bounded number; how many. Several processes may do this at once.
pub async fn work(db: &PgPool, now: DateTime<Utc>) -> Result<u64> {
    let ended = sqlx::query!(
        "
        with due as (
            select id from command
             where deadline <= $1 and state in ('queued', 'sent', 'delivered', 'in_progress')
             order by deadline
             limit $2
               for update skip locked)
        update command c
           set state = case when c.state in ('queued', 'sent') then 'expired' else 'timed_out' end, updated_at = $1,
               steps = steps || case when c.state in ('queued', 'sent') then $3::jsonb else $4::jsonb end
          from due
         where c.id = due.id
        ",
        now,
        MAX_WORK,
        overtaken(State::Expired, now),
        overtaken(State::TimedOut, now)
    );
    Ok(ended.execute(db).await?.rows_affected())
}

/// The last step of a command whose deadline has passed.
pub(super) fn overtaken(state: State, now: DateTime<Utc>) -> Value {
    json!([step(Some(state), now, &json!({ "deadline": true }))])
}

/// Deletes at most `limit` commands that ended before then; how many.
pub async fn forget(db: &mut PgConnection, before: DateTime<Utc>, limit: i64) -> Result<u64> {
    let gone = sqlx::query!(
        "
        delete from command
         where id = any(array(select id from command
                               where updated_at < $1 and state not in ('queued', 'sent', 'delivered', 'in_progress')
                               limit $2))
        ",
        before,
        limit
    );
    Ok(gone.execute(db).await?.rows_affected())
}
