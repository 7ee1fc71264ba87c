//! The other side: the same lines in a table with PostgreSQL's full text search.

use std::time::{Duration, Instant};

use sqlx::{Executor as _, PgPool, Row as _};

/// Lines in a table of their own, and what full text search needs beside them.
const TABLE: &str = "create table fts (device_key bigint, ts timestamptz, seq bigint, level smallint, target text, message text,
                                       fields jsonb, words tsvector generated always as (to_tsvector('simple', message)) stored)";
const INDEXES: [&str; 3] = [
    "create index fts_words on fts using gin (words)",
    "create index fts_ts on fts (ts)",
    "create index fts_level_ts on fts (level, ts)",
];
const ROWS: &str = "insert into fts (device_key, ts, seq, level, target, message, fields)
                    select device_key, ts, seq, level, target, message, fields from log order by ts";

/// What it took to make the lines searchable.
pub(super) struct Built {
    /// Rows into a table that has its indexes, as they come.
    pub(super) live: Duration,
    /// The GIN index alone, over rows that are there.
    pub(super) gin: Duration,
    /// Bytes of the GIN index, as it was filled live.
    pub(super) gin_bytes: i64,
}

/// Fills the table twice: with its indexes in place, and before them. What is left is the latter, the denser.
pub(super) async fn build(pool: &PgPool) -> anyhow::Result<Built> {
    pool.execute("drop table if exists fts").await?;
    pool.execute(TABLE).await?;
    for index in INDEXES {
        pool.execute(index).await?;
    }
    let live = timed(pool, ROWS).await?;
    let gin_bytes = sqlx::query("select pg_relation_size('fts_words')").fetch_one(pool).await?.get(0);
    pool.execute("truncate fts").await?;
    pool.execute("drop index fts_words").await?;
    pool.execute(ROWS).await?;
    let gin = timed(pool, INDEXES[0]).await?;
    pool.execute("vacuum analyze fts").await?;
    Ok(Built { live, gin, gin_bytes })
}

async fn timed(pool: &PgPool, sql: &'static str) -> sqlx::Result<Duration> {
    let started = Instant::now();
    pool.execute(sql).await?;
    Ok(started.elapsed())
}

/// Asks something: the number it tells, when it is asked for one, else how many rows came; and how long it took.
pub(super) async fn ask(pool: &PgPool, sql: &'static str) -> sqlx::Result<(u64, Duration)> {
    let started = Instant::now();
    let rows = sqlx::query(sql).fetch_all(pool).await?;
    let took = started.elapsed();
    let counted = sql.starts_with("select count").then(|| rows.first().map(|row| row.get::<i64, _>(0)));
    Ok((counted.flatten().map_or(rows.len() as u64, i64::cast_unsigned), took))
}
