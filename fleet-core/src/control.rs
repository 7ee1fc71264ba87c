//! Live control: what the doors tell each other about open connections.
//!
//! [`bump`] is called by whatever changes rights, in its own transaction; every broker sees the new epoch with [`look`]
//! and checks its open connections with [`recheck`]. The REST door [`ask`]s all live brokers something, a row, and each
//! of them [`answer`]s, a row too. A broker lives while it [`renew`]s its lease.
//! Holds: an epoch follows commit order, so a broker that has seen one sees every change up to it. The NOTIFY on
//! [`CHANNEL`] only wakes earlier than the next poll would; nothing is lost with it. Leases go by the database's clock,
//! since those of the machines may differ. Questions, answers and their number are bounded.
//! Ignorant of: MQTT, HTTP.

mod question;
mod rights;
#[cfg(test)]
mod tests;

use std::time::Duration;

use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

pub use question::{
    Answer, Answers, Connection, Direction, Filter, MAX_ANSWER_BYTES, MAX_PAGE, MAX_PENDING, MAX_REQUEST_BYTES, Owner,
    Question, Request, TraceLine, TraceLines, Transport, answer, ask,
};
pub use rights::{Ended, Verdict, recheck};

use crate::Result;

/// Where PostgreSQL wakes those who wait for rows.
pub const CHANNEL: &str = "muster";

/// How often a broker renews its lease.
pub const RENEW_EVERY: Duration = Duration::from_secs(2);

/// A broker that has not renewed its lease for so long is dead.
pub const LEASE_S: f64 = 10.0;

/// Leases that ended so long ago are forgotten.
const FORGET_LEASE_S: f64 = 3_600.0;

/// Says that rights have changed: a device disabled or gone, a credential ended, a user or a role changed. To be called
/// in the transaction that changes them, and last: until it ends, others who change rights wait.
pub async fn bump(db: &mut PgConnection) -> Result<()> {
    sqlx::query!(
        "with raised as (update policy_epoch set epoch = epoch + 1 returning epoch)
         select pg_notify($1, '') from raised",
        CHANNEL
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Renews the lease of a broker, or begins it, and sweeps what has expired.
pub async fn renew(db: &mut PgConnection, broker: Uuid) -> Result<()> {
    sqlx::query!(
        "insert into broker_node (id, started_at, heartbeat_at) values ($1, now(), now())
             on conflict (id) do update set heartbeat_at = now()",
        broker
    )
    .execute(&mut *db)
    .await?;
    sqlx::query!("delete from broker_node where heartbeat_at < now() - make_interval(secs => $1)", FORGET_LEASE_S)
        .execute(&mut *db)
        .await?;
    sqlx::query!("delete from control_request where expires_at < now()").execute(db).await?;
    Ok(())
}

/// Ends the lease of a broker that stops, so that nobody waits for its answers.
pub async fn retire(db: &mut PgConnection, broker: Uuid) -> Result<()> {
    sqlx::query!("delete from broker_node where id = $1", broker).execute(db).await?;
    Ok(())
}

/// What a broker has to see to.
#[derive(Debug, Clone, PartialEq)]
pub struct Look {
    /// How often rights have changed.
    pub epoch: i64,
    /// What it is asked and has not answered, oldest first.
    pub questions: Vec<Question>,
}

/// Looks for changed rights and for questions to `broker`, in one statement.
pub async fn look(db: &mut PgConnection, broker: Uuid) -> Result<Look> {
    let rows = sqlx::query!(
        r#"
        select e.epoch, r.id as "id?", r.request as "request?: Value"
          from policy_epoch e
          left join lateral (
               select id, request, asked_at
                 from control_request r
                where expires_at > now()
                  and not exists (select from control_answer a where a.request_id = r.id and a.broker_id = $1)
                order by asked_at, id
                limit $2) r on true
         order by r.asked_at, r.id
        "#,
        broker,
        MAX_PENDING
    )
    .fetch_all(db)
    .await?;
    let epoch = rows.first().map_or(0, |row| row.epoch);
    let question = |id, request| Question { id, request: serde_json::from_value(request).ok() };
    let questions = rows.into_iter().filter_map(|row| Some(question(row.id?, row.request?))).collect();
    Ok(Look { epoch, questions })
}
