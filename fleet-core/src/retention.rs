//! Partitions made ahead of time, old days dropped.
//!
//! [`ensure_partitions`] keeps a partition of readings and of log lines ready for each day from yesterday to a week ahead; [`sweep`]
//! removes what is older, or more, than the settings allow; [`next_drop`] tells what goes next.
//! Holds: ingest is never held up longer than [`LOCK_TIMEOUT_MS`]; every statement is bounded; several processes may do
//! this at once.
//! Why whole days: dropping one takes milliseconds and gives its space back, deleting its rows does neither.

mod by_day;
#[cfg(test)]
mod tests;

use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{Connection, PgConnection, Postgres};

pub use self::by_day::{DayDrop, Kind, Why, days_of, ensure_partitions, next_drop};
use crate::config::Retention;
use crate::id::TenantKey;
use crate::{Result, audit, command, idempotency};

/// Days that have their partition before they begin.
pub const DAYS_AHEAD: u64 = 7;

/// Longest wait for a lock that ingest needs too, in milliseconds; who waits for a lock holds up those behind.
pub const LOCK_TIMEOUT_MS: u64 = 1_000;

/// Rows one statement of a sweep deletes.
pub const DELETE_ROWS: i64 = 10_000;

/// Statements a sweep spends on each kind of row; what is left waits for the next sweep.
pub const DELETE_ROUNDS: u32 = 100;

/// Longest time anything is kept, in days: a thousand years. More in the settings means the same.
const MAX_DAYS: u32 = 365_000;

/// What a sweep removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Swept {
    /// Days of readings and of log lines.
    pub days: Vec<DayDrop>,
    /// Readings and log lines so late that their day was gone before they came.
    pub late: u64,
    /// Dead letters, by age or by number.
    pub dead_letters: u64,
    /// Answers kept for an `Idempotency-Key`.
    pub idempotency: u64,
    /// Connection events, by age or by number.
    pub connection_events: u64,
    /// Finished commands.
    pub commands: u64,
    /// Rows of the audit.
    pub audit: u64,
    /// Whether there is more to remove: a statement's bound was reached, or a lock was not to be had.
    pub unfinished: bool,
}

fn days(setting: u32) -> Days {
    Days::new(u64::from(setting.min(MAX_DAYS)))
}

fn midnight(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(NaiveTime::MIN).and_utc()
}

/// Removes what is older, or more, than the settings allow. Call it outside a transaction, every hour or so; it is
/// bounded, and says when there is more.
pub async fn sweep(db: &mut PgConnection, retention: &Retention, now: DateTime<Utc>) -> Result<Swept> {
    let mut swept = Swept::default();
    for kind in Kind::ALL {
        by_day::sweep(db, kind, retention, now, &mut swept).await?;
    }
    sweep_dead_letters(db, retention, now, &mut swept).await?;
    sweep_idempotency(db, now, &mut swept).await?;
    sweep_connection_events(db, retention, now, &mut swept).await?;
    sweep_commands(db, retention, now, &mut swept).await?;
    sweep_audit(db, retention, now, &mut swept).await?;
    Ok(swept)
}

/// A delete of a bounded number of rows at a time, and a bounded number of times.
#[derive(Default)]
struct Rounds {
    done: u32,
    gone: u64,
    unfinished: bool,
}

impl Rounds {
    /// Whether another round is due after one that removed so many rows.
    fn again(&mut self, gone: u64) -> bool {
        self.done += 1;
        self.gone += gone;
        let more = gone >= DELETE_ROWS.unsigned_abs();
        self.unfinished = more && self.done >= DELETE_ROUNDS;
        more && !self.unfinished
    }
}

/// Deletes in rounds; `statement` removes [`DELETE_ROWS`] at the most.
async fn delete<'q>(
    db: &mut PgConnection,
    statement: impl Fn() -> Query<'q, Postgres, PgArguments> + Send,
) -> Result<Rounds> {
    let mut rounds = Rounds::default();
    while rounds.again(statement().execute(&mut *db).await?.rows_affected()) {}
    Ok(rounds)
}

async fn sweep_dead_letters(
    db: &mut PgConnection,
    retention: &Retention,
    now: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    let keep_from = now - days(retention.dead_letter_days);
    let rounds = delete(db, || {
        sqlx::query!(
            "delete from dead_letter where id = any(array(select id from dead_letter where received_at < $1 limit $2))",
            keep_from,
            DELETE_ROWS,
        )
    })
    .await?;
    swept.dead_letters += rounds.gone;
    swept.unfinished |= rounds.unfinished;
    let excess = sqlx::query!(
        r#"
        select t.key, last.id as "id!" from tenant t
    cross join lateral (
               select d.id from dead_letter d where d.tenant_key = t.key order by d.id desc offset $1 limit 1) last
        "#,
        retention.dead_letter_max_rows.max(0),
    )
    .fetch_all(&mut *db)
    .await?;
    for tenant in excess {
        let rounds = delete(db, || {
            sqlx::query!(
                "delete from dead_letter
                  where id = any(array(select id from dead_letter where tenant_key = $1 and id <= $2 limit $3))",
                tenant.key,
                tenant.id,
                DELETE_ROWS,
            )
        })
        .await?;
        swept.dead_letters += rounds.gone;
        swept.unfinished |= rounds.unfinished;
    }
    Ok(())
}

async fn sweep_idempotency(db: &mut PgConnection, now: DateTime<Utc>, swept: &mut Swept) -> Result<()> {
    let keep_from = now - idempotency::KEPT;
    let rounds = delete(db, || {
        sqlx::query!(
            "delete from idempotency
              where ctid = any(array(select ctid from idempotency where created_at < $1 limit $2))",
            keep_from,
            DELETE_ROWS,
        )
    })
    .await?;
    swept.idempotency += rounds.gone;
    swept.unfinished |= rounds.unfinished;
    Ok(())
}

async fn sweep_commands(
    db: &mut PgConnection,
    retention: &Retention,
    now: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    let keep_from = now - days(retention.command_days);
    let mut rounds = Rounds::default();
    while rounds.again(command::forget(db, keep_from, DELETE_ROWS).await?) {}
    swept.commands += rounds.gone;
    swept.unfinished |= rounds.unfinished;
    Ok(())
}

/// By whole days: each time is an entry of the audit too.
async fn sweep_audit(
    db: &mut PgConnection,
    retention: &Retention,
    now: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    if retention.audit_days == 0 {
        return Ok(());
    }
    let keep_from = midnight((now - days(retention.audit_days)).date_naive());
    let tenants =
        sqlx::query_scalar!(r#"select tenant_key as "key: TenantKey" from audit_head"#).fetch_all(&mut *db).await?;
    for tenant in tenants {
        let mut tx = db.begin().await?;
        let gone = audit::expire(&mut tx, tenant, keep_from, now).await?;
        tx.commit().await?;
        swept.audit += gone;
        swept.unfinished |= gone >= audit::EXPIRE_ROWS;
    }
    Ok(())
}

async fn sweep_connection_events(
    db: &mut PgConnection,
    retention: &Retention,
    now: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    let keep_from = now - days(retention.connection_event_days);
    let rounds = delete(db, || {
        sqlx::query!(
            "delete from connection_event
              where id = any(array(select id from connection_event where at < $1 limit $2))",
            keep_from,
            DELETE_ROWS,
        )
    })
    .await?;
    swept.connection_events += rounds.gone;
    swept.unfinished |= rounds.unfinished;
    let excess = sqlx::query!(
        r#"
        select t.key, last.id as "id!" from tenant t
    cross join lateral (
               select e.id from connection_event e where e.tenant_key = t.key order by e.id desc offset $1 limit 1) last
        "#,
        retention.connection_event_max_rows.max(0),
    )
    .fetch_all(&mut *db)
    .await?;
    for tenant in excess {
        let rounds = delete(db, || {
            sqlx::query!(
                "delete from connection_event
                  where id = any(array(select id from connection_event where tenant_key = $1 and id <= $2 limit $3))",
                tenant.key,
                tenant.id,
                DELETE_ROWS,
            )
        })
        .await?;
        swept.connection_events += rounds.gone;
        swept.unfinished |= rounds.unfinished;
    }
    Ok(())
}
