//! Partitions made ahead of time, old days dropped.
//!
//! [`ensure_partitions`] keeps a partition of `telemetry` ready for each day from yesterday to a week ahead; [`sweep`]
//! removes what is older, or more, than the settings allow; [`next_drop`] tells what goes next.
//! Holds: ingest is never held up longer than [`LOCK_TIMEOUT_MS`]; every statement is bounded; several processes may do
//! this at once.
//! Why whole days: dropping one takes milliseconds and gives its space back, deleting its rows does neither.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use chrono::{DateTime, Days, NaiveDate, NaiveTime, Utc};
use serde::Serialize;
use sqlx::postgres::PgArguments;
use sqlx::query::Query;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Postgres};

use crate::config::Retention;
use crate::id::TenantKey;
use crate::{Result, audit, idempotency, tenancy};

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

/// Attempts at a partition when others are in the way.
const ATTEMPTS: usize = 5;

/// Why a day is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// `retention.telemetry_days`.
    Age,
    /// `retention.telemetry_max_bytes`.
    Size,
}

/// A day of readings that goes, or went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DayDrop {
    /// Which, in UTC.
    pub day: NaiveDate,
    /// What it takes, index included.
    pub bytes: u64,
    /// Why.
    pub why: Why,
    /// From when on a sweep drops it.
    pub at: DateTime<Utc>,
}

/// What a sweep removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Swept {
    /// Days of readings.
    pub days: Vec<DayDrop>,
    /// Readings so late that their day was gone before they came.
    pub late_readings: u64,
    /// Dead letters, by age or by number.
    pub dead_letters: u64,
    /// Answers kept for an `Idempotency-Key`.
    pub idempotency: u64,
    /// Connection events, by age or by number.
    pub connection_events: u64,
    /// Rows of the audit.
    pub audit: u64,
    /// Whether there is more to remove: a statement's bound was reached, or a lock was not to be had.
    pub unfinished: bool,
}

/// The partitions of `telemetry` by day, and the size of everything that is stored.
struct Partitions {
    days: BTreeMap<NaiveDate, u64>,
    total_bytes: u64,
}

impl Partitions {
    async fn read(db: &mut PgConnection) -> Result<Self> {
        let tables = sqlx::query!(
            r#"
            select c.relname::text as "name!", coalesce(pg_total_relation_size(c.oid), 0) as "bytes!"
              from pg_inherits i join pg_class c on c.oid = i.inhrelid
             where i.inhparent = 'telemetry'::regclass
            "#
        )
        .fetch_all(db)
        .await?;
        let sizes = tables.into_iter().map(|table| (table.name, u64::try_from(table.bytes).unwrap_or_default()));
        let (mut days, mut total_bytes) = (BTreeMap::new(), 0);
        for (name, bytes) in sizes {
            total_bytes += bytes;
            if let Some(day) = day_of(&name) {
                days.insert(day, bytes);
            }
        }
        Ok(Self { days, total_bytes })
    }

    /// What the settings drop next; today's day and later ones are never dropped for their size.
    fn next(&self, retention: &Retention, now: DateTime<Utc>) -> Option<DayDrop> {
        let (day, bytes) = self.days.first_key_value().map(|(day, bytes)| (*day, *bytes))?;
        let ages_at = midnight(day + Days::new(1) + days(retention.telemetry_days));
        let too_much = retention.telemetry_max_bytes > 0 && self.total_bytes > retention.telemetry_max_bytes;
        if ages_at > now && too_much && day < now.date_naive() {
            return Some(DayDrop { day, bytes, why: Why::Size, at: now });
        }
        Some(DayDrop { day, bytes, why: Why::Age, at: ages_at })
    }
}

fn table_of(day: NaiveDate) -> String {
    format!("telemetry_{}", day.format("%Y%m%d"))
}

fn day_of(table: &str) -> Option<NaiveDate> {
    let day = NaiveDate::parse_from_str(table.strip_prefix("telemetry_")?, "%Y%m%d").ok()?;
    (table_of(day) == table).then_some(day)
}

fn days(setting: u32) -> Days {
    Days::new(u64::from(setting.min(MAX_DAYS)))
}

fn midnight(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(NaiveTime::MIN).and_utc()
}

/// Runs a statement about a table whose name this module made.
async fn ddl(db: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
    db.execute(AssertSqlSafe(sql)).await.map(drop)
}

/// Makes the partitions of yesterday, today and the coming week that are not there yet. Readings of such a day that
/// wait in the default partition move into it. Call it outside a transaction, at the start and every few hours.
///
/// # Errors
/// When the database fails, or somebody holds the default partition locked.
pub async fn ensure_partitions(db: &mut PgConnection, now: DateTime<Utc>) -> Result<()> {
    let known = Partitions::read(db).await?.days;
    let first = now.date_naive() - Days::new(1);
    for day in first.iter_days().take(usize::try_from(DAYS_AHEAD).expect("a week") + 2) {
        if !known.contains_key(&day) {
            ensure_day(db, day).await?;
        }
    }
    Ok(())
}

async fn ensure_day(db: &mut PgConnection, day: NaiveDate) -> Result<()> {
    for attempt in 1.. {
        let Err(error) = make_day(db, day).await else { break };
        if Partitions::read(db).await?.days.contains_key(&day) {
            // Another process was faster.
            break;
        }
        if !in_the_way(&error) || attempt == ATTEMPTS {
            return Err(error.into());
        }
    }
    Ok(())
}

/// Whether an error means no more than that somebody else was at it: a lock, a deadlock, the same name or row.
fn in_the_way(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    matches!(error.code().as_deref(), Some("55P03" | "40P01" | "42P07" | "42P01" | "23505" | "23514"))
}

async fn make_day(db: &mut PgConnection, day: NaiveDate) -> Result<(), sqlx::Error> {
    let table = table_of(day);
    let (from, to) = (midnight(day).to_rfc3339(), midnight(day + Days::new(1)).to_rfc3339());
    let columns = "device_key, ts, seq, shape_id, nums, rest, sent_at";
    let take = format!(
        "with taken as (delete from telemetry_default where ts >= '{from}' and ts < '{to}' returning {columns})
         insert into {table} ({columns}) select {columns} from taken"
    );
    let mut tx = db.begin().await?;
    ddl(&mut tx, format!("set local lock_timeout = {LOCK_TIMEOUT_MS}")).await?;
    ddl(&mut tx, format!("create table {table} (like telemetry including all)")).await?;
    // Requests reach it through its table only, whose policy holds there.
    ddl(&mut tx, format!("revoke all on {table} from {}", tenancy::ROLE)).await?;
    // The bulk moves while writers go on; only what came meanwhile moves under the lock that attaching needs anyway.
    ddl(&mut tx, take.clone()).await?;
    ddl(&mut tx, "lock table telemetry_default in access exclusive mode".to_owned()).await?;
    ddl(&mut tx, take).await?;
    ddl(&mut tx, format!("alter table telemetry attach partition {table} for values from ('{from}') to ('{to}')"))
        .await?;
    tx.commit().await
}

/// Removes what is older, or more, than the settings allow. Call it outside a transaction, every hour or so; it is
/// bounded, and says when there is more.
pub async fn sweep(db: &mut PgConnection, retention: &Retention, now: DateTime<Utc>) -> Result<Swept> {
    let mut swept = Swept::default();
    drop_leftovers(db).await?;
    sweep_days(db, retention, now, &mut swept).await?;
    sweep_late(db, retention, now, &mut swept).await?;
    sweep_dead_letters(db, retention, now, &mut swept).await?;
    sweep_idempotency(db, now, &mut swept).await?;
    sweep_connection_events(db, retention, now, &mut swept).await?;
    sweep_audit(db, retention, now, &mut swept).await?;
    Ok(swept)
}

/// What goes next and when; `None` when there is no day to drop.
pub async fn next_drop(db: &mut PgConnection, retention: &Retention, now: DateTime<Utc>) -> Result<Option<DayDrop>> {
    Ok(Partitions::read(db).await?.next(retention, now))
}

async fn sweep_days(db: &mut PgConnection, retention: &Retention, now: DateTime<Utc>, swept: &mut Swept) -> Result<()> {
    let mut partitions = Partitions::read(db).await?;
    while let Some(next) = partitions.next(retention, now).filter(|next| next.at <= now) {
        match drop_day(db, next.day).await {
            Ok(()) => {}
            Err(error) if in_the_way(&error) => {
                swept.unfinished = true;
                break;
            }
            Err(error) => return Err(error.into()),
        }
        partitions.days.remove(&next.day);
        partitions.total_bytes -= next.bytes.min(partitions.total_bytes);
        swept.days.push(next);
    }
    Ok(())
}

/// What a table is called between being no partition any more and being dropped.
const DROPPED: &str = "dropped_telemetry_";

/// Two steps, because only the first holds up ingest, and it is short.
async fn drop_day(db: &mut PgConnection, day: NaiveDate) -> Result<(), sqlx::Error> {
    let (table, dropped) = (table_of(day), format!("{DROPPED}{}", day.format("%Y%m%d")));
    let mut tx = db.begin().await?;
    ddl(&mut tx, format!("set local lock_timeout = {LOCK_TIMEOUT_MS}")).await?;
    ddl(&mut tx, format!("alter table telemetry detach partition {table}")).await?;
    ddl(&mut tx, format!("drop table if exists {dropped}")).await?;
    ddl(&mut tx, format!("alter table {table} rename to {dropped}")).await?;
    tx.commit().await?;
    ddl(db, format!("drop table if exists {dropped}")).await
}

/// Finishes what a process that ended between the two steps has begun.
async fn drop_leftovers(db: &mut PgConnection) -> Result<()> {
    let left = sqlx::query_scalar!(
        r#"select relname::text as "name!" from pg_class where relkind = 'r' and starts_with(relname, $1) order by 1"#,
        DROPPED,
    )
    .fetch_all(&mut *db)
    .await?;
    for table in left.iter().filter(|table| table[DROPPED.len()..].bytes().all(|b| b.is_ascii_digit())) {
        ddl(db, format!("drop table if exists {table}")).await?;
    }
    Ok(())
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

/// Readings of the default partition whose day would have been dropped.
async fn sweep_late(db: &mut PgConnection, retention: &Retention, now: DateTime<Utc>, swept: &mut Swept) -> Result<()> {
    let keep_from = midnight(now.date_naive() - days(retention.telemetry_days));
    let rounds = delete(db, || {
        sqlx::query!(
            "delete from telemetry_default
              where ctid = any(array(select ctid from telemetry_default where ts < $1 limit $2))",
            keep_from,
            DELETE_ROWS,
        )
    })
    .await?;
    swept.late_readings += rounds.gone;
    swept.unfinished |= rounds.unfinished;
    Ok(())
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
