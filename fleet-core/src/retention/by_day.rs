//! What is kept by day: readings and log lines, each day in a partition of its own.

use std::collections::{BTreeMap, BTreeSet};

use chrono::{DateTime, Days, NaiveDate, Utc};
use serde::Serialize;
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::{DAYS_AHEAD, DELETE_ROWS, LOCK_TIMEOUT_MS, Swept, days, delete, midnight};
use crate::config::Retention;
use crate::{Result, tenancy};

/// Attempts at a partition when others are in the way.
const ATTEMPTS: usize = 5;

/// What is kept by day.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Readings.
    Telemetry,
    /// Log lines.
    Log,
}

/// How much of it is kept.
struct Keep {
    days: u32,
    /// 0: whatever it is.
    bytes: u64,
}

impl Kind {
    /// All there are.
    pub const ALL: [Self; 2] = [Self::Telemetry, Self::Log];

    /// The table.
    pub fn table(self) -> &'static str {
        match self {
            Self::Telemetry => "telemetry",
            Self::Log => "log",
        }
    }

    fn columns(self) -> &'static str {
        match self {
            Self::Telemetry => "device_key, ts, seq, shape_id, nums, rest, sent_at",
            Self::Log => "device_key, ts, seq, writer, place, level, target, message, trace_id, fields, cut, sent_at",
        }
    }

    fn keep(self, retention: &Retention) -> Keep {
        match self {
            Self::Telemetry => Keep { days: retention.telemetry_days, bytes: retention.telemetry_max_bytes },
            Self::Log => Keep { days: retention.log_days, bytes: retention.log_max_bytes },
        }
    }

    pub(super) fn table_of(self, day: NaiveDate) -> String {
        format!("{}_{}", self.table(), day.format("%Y%m%d"))
    }

    pub(super) fn day_of(self, table: &str) -> Option<NaiveDate> {
        let day = table.strip_prefix(self.table())?.strip_prefix('_')?;
        let day = NaiveDate::parse_from_str(day, "%Y%m%d").ok()?;
        (self.table_of(day) == table).then_some(day)
    }

    /// What a table's name begins with between being no partition any more and being dropped.
    fn dropped(self) -> String {
        format!("dropped_{}_", self.table())
    }
}

/// Why a day is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Why {
    /// `retention.telemetry_days`, `retention.log_days`.
    Age,
    /// `retention.telemetry_max_bytes`, `retention.log_max_bytes`.
    Size,
}

/// A day of readings or log lines that goes, or went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DayDrop {
    /// Of what.
    pub kind: Kind,
    /// Which, in UTC.
    pub day: NaiveDate,
    /// What it takes, index included.
    pub bytes: u64,
    /// Why.
    pub why: Why,
    /// From when on a sweep drops it.
    pub at: DateTime<Utc>,
}

/// The partitions of a table by day, and the size of everything that is stored in it.
pub(super) struct Partitions {
    kind: Kind,
    pub(super) days: BTreeMap<NaiveDate, u64>,
    pub(super) total_bytes: u64,
}

impl Partitions {
    pub(super) async fn read(db: &mut PgConnection, kind: Kind) -> Result<Self> {
        let tables = sqlx::query!(
            r#"
            select c.relname::text as "name!", coalesce(pg_total_relation_size(c.oid), 0) as "bytes!"
              from pg_inherits i join pg_class c on c.oid = i.inhrelid
             where i.inhparent = $1::text::regclass
            "#,
            kind.table()
        )
        .fetch_all(db)
        .await?;
        let sizes = tables.into_iter().map(|table| (table.name, u64::try_from(table.bytes).unwrap_or_default()));
        let (mut days, mut total_bytes) = (BTreeMap::new(), 0);
        for (name, bytes) in sizes {
            total_bytes += bytes;
            if let Some(day) = kind.day_of(&name) {
                days.insert(day, bytes);
            }
        }
        Ok(Self { kind, days, total_bytes })
    }

    /// What the settings drop next; today's day and later ones are never dropped for their size.
    fn next(&self, retention: &Retention, now: DateTime<Utc>) -> Option<DayDrop> {
        let (day, bytes) = self.days.first_key_value().map(|(day, bytes)| (*day, *bytes))?;
        let (kind, Keep { days: age, bytes: most }) = (self.kind, self.kind.keep(retention));
        let ages_at = midnight(day + Days::new(1) + days(age));
        let too_much = most > 0 && self.total_bytes > most;
        if ages_at > now && too_much && day < now.date_naive() {
            return Some(DayDrop { kind, day, bytes, why: Why::Size, at: now });
        }
        Some(DayDrop { kind, day, bytes, why: Why::Age, at: ages_at })
    }
}

/// Runs a statement about a table whose name this module made.
pub(super) async fn ddl(db: &mut PgConnection, sql: String) -> Result<(), sqlx::Error> {
    db.execute(AssertSqlSafe(sql)).await.map(drop)
}

/// Makes the partitions of yesterday, today and the coming week that are not there yet. Rows of such a day that wait in the default partition move into it. Call it outside a transaction, at the start and every few hours.
///
/// # Errors
/// When the database fails, or somebody holds the default partition locked.
pub async fn ensure_partitions(db: &mut PgConnection, now: DateTime<Utc>) -> Result<()> {
    let first = now.date_naive() - Days::new(1);
    for kind in Kind::ALL {
        let known = Partitions::read(db, kind).await?.days;
        for day in first.iter_days().take(usize::try_from(DAYS_AHEAD).expect("a week") + 2) {
            if !known.contains_key(&day) {
                ensure_day(db, kind, day).await?;
            }
        }
    }
    Ok(())
}

async fn ensure_day(db: &mut PgConnection, kind: Kind, day: NaiveDate) -> Result<()> {
    for attempt in 1.. {
        let Err(error) = make_day(db, kind, day).await else { break };
        if Partitions::read(db, kind).await?.days.contains_key(&day) {
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
pub(super) fn in_the_way(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    matches!(error.code().as_deref(), Some("55P03" | "40P01" | "42P07" | "42P01" | "23505" | "23514"))
}

async fn make_day(db: &mut PgConnection, kind: Kind, day: NaiveDate) -> Result<(), sqlx::Error> {
    let (all, table, columns) = (kind.table(), kind.table_of(day), kind.columns());
    let (from, to) = (midnight(day).to_rfc3339(), midnight(day + Days::new(1)).to_rfc3339());
    let take = format!(
        "with taken as (delete from {all}_default where ts >= '{from}' and ts < '{to}' returning {columns})
         insert into {table} ({columns}) select {columns} from taken"
    );
    let mut tx = db.begin().await?;
    ddl(&mut tx, format!("set local lock_timeout = {LOCK_TIMEOUT_MS}")).await?;
    ddl(&mut tx, format!("create table {table} (like {all} including all)")).await?;
    // Requests reach it through its table only, whose policy holds there.
    ddl(&mut tx, format!("revoke all on {table} from {}", tenancy::ROLE)).await?;
    // The bulk moves while writers go on; only what came meanwhile moves under the lock that attaching needs anyway.
    ddl(&mut tx, take.clone()).await?;
    ddl(&mut tx, format!("lock table {all}_default in access exclusive mode")).await?;
    ddl(&mut tx, take).await?;
    ddl(&mut tx, format!("alter table {all} attach partition {table} for values from ('{from}') to ('{to}')")).await?;
    tx.commit().await
}

/// The days of a kind that have a partition.
pub async fn days_of(db: &mut PgConnection, kind: Kind) -> Result<BTreeSet<NaiveDate>> {
    Ok(Partitions::read(db, kind).await?.days.into_keys().collect())
}

/// What goes next and when; `None` when there is no day to drop.
pub async fn next_drop(db: &mut PgConnection, retention: &Retention, now: DateTime<Utc>) -> Result<Option<DayDrop>> {
    let mut next: Option<DayDrop> = None;
    for kind in Kind::ALL {
        let other = Partitions::read(db, kind).await?.next(retention, now);
        next = next.into_iter().chain(other).min_by_key(|drop| drop.at);
    }
    Ok(next)
}

/// Drops the days of a kind that are too old or too many, and what came too late for a day that is gone.
pub(super) async fn sweep(
    db: &mut PgConnection,
    kind: Kind,
    retention: &Retention,
    now: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    drop_leftovers(db, kind).await?;
    sweep_days(db, kind, retention, now, swept).await?;
    sweep_late(db, kind, retention, now, swept).await
}

async fn sweep_days(
    db: &mut PgConnection,
    kind: Kind,
    retention: &Retention,
    now: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    let mut partitions = Partitions::read(db, kind).await?;
    while let Some(next) = partitions.next(retention, now).filter(|next| next.at <= now) {
        match drop_day(db, kind, next.day).await {
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

/// Two steps, because only the first holds up ingest, and it is short.
async fn drop_day(db: &mut PgConnection, kind: Kind, day: NaiveDate) -> Result<(), sqlx::Error> {
    let (all, table) = (kind.table(), kind.table_of(day));
    let dropped = format!("{}{}", kind.dropped(), day.format("%Y%m%d"));
    let mut tx = db.begin().await?;
    ddl(&mut tx, format!("set local lock_timeout = {LOCK_TIMEOUT_MS}")).await?;
    ddl(&mut tx, format!("alter table {all} detach partition {table}")).await?;
    ddl(&mut tx, format!("drop table if exists {dropped}")).await?;
    ddl(&mut tx, format!("alter table {table} rename to {dropped}")).await?;
    tx.commit().await?;
    ddl(db, format!("drop table if exists {dropped}")).await
}

/// Finishes what a process that ended between the two steps has begun.
async fn drop_leftovers(db: &mut PgConnection, kind: Kind) -> Result<()> {
    let dropped = kind.dropped();
    let left = sqlx::query_scalar!(
        r#"select relname::text as "name!" from pg_class where relkind = 'r' and starts_with(relname, $1) order by 1"#,
        &dropped,
    )
    .fetch_all(&mut *db)
    .await?;
    for table in left.iter().filter(|table| table[dropped.len()..].bytes().all(|b| b.is_ascii_digit())) {
        ddl(db, format!("drop table if exists {table}")).await?;
    }
    Ok(())
}

/// Rows of the default partition whose day would have been dropped.
async fn sweep_late(
    db: &mut PgConnection,
    kind: Kind,
    retention: &Retention,
    now: DateTime<Utc>,
    swept: &mut Swept,
) -> Result<()> {
    let keep_from = midnight(now.date_naive() - days(kind.keep(retention).days));
    let table = format!("{}_default", kind.table());
    let statement =
        format!("delete from {table} where ctid = any(array(select ctid from {table} where ts < $1 limit $2))");
    let rounds = delete(db, || sqlx::query(AssertSqlSafe(statement.clone())).bind(keep_from).bind(DELETE_ROWS)).await?;
    swept.late += rounds.gone;
    swept.unfinished |= rounds.unfinished;
    Ok(())
}
