//! The questions: what each is in the query language, and what in SQL.

use std::time::{Duration, Instant};

use chrono::Utc;
use fleet_core::id::TenantKey;
use fleet_core::log::query::{self, Query};
use fleet_core::search::{Ask, Order, Reach, Search, fetch};
use sqlx::PgPool;

use super::Wanted;

/// What is wanted of the lines that are found.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    /// The newest twenty, with all they say.
    Newest,
    /// Their number.
    Count,
    /// Their number by hour and level.
    Histogram,
    /// The ten parts of the program with the most of them.
    Top,
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub(super) struct Question {
    pub(super) name: &'static str,
    query: &'static str,
    shape: Shape,
    /// The same of PostgreSQL; empty where it is not asked.
    pub(super) sql: &'static str,
    pub(super) wanted: Option<Wanted>,
}

const TEN_TIMES: Option<Wanted> = Some(Wanted::ShareOfTheirs(0.1));

/// Asked of both.
pub(super) const QUESTIONS: [Question; 9] = [
    Question {
        name: "count of a common word",
        query: "connection",
        shape: Shape::Count,
        sql: "select count(*) from fts where words @@ 'connection'",
        wanted: TEN_TIMES,
    },
    Question {
        name: "count of two words",
        query: "connection kept",
        shape: Shape::Count,
        sql: "select count(*) from fts where words @@ 'connection & kept'",
        wanted: TEN_TIMES,
    },
    Question {
        name: "count of a phrase",
        query: "\"connection to broker\"",
        shape: Shape::Count,
        sql: "select count(*) from fts where words @@ 'connection <-> to <-> broker'",
        wanted: TEN_TIMES,
    },
    Question {
        name: "histogram by hour and level, of a common word",
        query: "connection",
        shape: Shape::Histogram,
        sql: "select hour, count(*) from (select date_bin('1 hour', ts, 'epoch') as hour, level, count(*) from fts
                                           where words @@ 'connection' group by 1, 2) by_level group by hour",
        wanted: TEN_TIMES,
    },
    Question {
        name: "histogram by hour and level, of all",
        query: "*",
        shape: Shape::Histogram,
        sql: "select hour, count(*) from (select date_bin('1 hour', ts, 'epoch') as hour, level, count(*) from fts
                                           group by 1, 2) by_level group by hour",
        wanted: TEN_TIMES,
    },
    Question {
        name: "top targets of a common word",
        query: "connection",
        shape: Shape::Top,
        sql: "select target, count(*) from fts where words @@ 'connection' group by 1 order by 2 desc limit 10",
        wanted: TEN_TIMES,
    },
    Question {
        name: "newest 20 of a common word, whole lines",
        query: "connection",
        shape: Shape::Newest,
        sql: "select ts, device_key, seq, level, target, message, fields from fts where words @@ 'connection' order by ts desc limit 20",
        wanted: Some(Wanted::ShareOfTheirs(2.0)),
    },
    Question {
        name: "newest 20 of a rare word, whole lines",
        query: "brownout",
        shape: Shape::Newest,
        sql: "select ts, device_key, seq, level, target, message, fields from fts where words @@ 'brownout' order by ts desc limit 20",
        wanted: None,
    },
    Question {
        name: "newest 20 of errors with a word, whole lines",
        query: "level:>=error timeout",
        shape: Shape::Newest,
        sql: "select ts, device_key, seq, level, target, message, fields from fts
               where level >= 5 and words @@ 'timeout' order by ts desc limit 20",
        wanted: None,
    },
];

const fn alone(query: &'static str, shape: Shape) -> Question {
    Question { name: "", query, shape, sql: "", wanted: None }
}

/// Asked of many lines.
pub(super) const MANY: [Question; 10] = [
    alone("connection", Shape::Newest),
    alone("brownout", Shape::Newest),
    alone("level:>=error timeout", Shape::Newest),
    alone("\"access point went away\" OR damaged", Shape::Newest),
    alone("fields.code:7 compressor", Shape::Newest),
    alone("device:device-77 reconnect", Shape::Newest),
    alone("NOT connection level:warn", Shape::Newest),
    alone("conn*", Shape::Newest),
    alone("target:sensor* door", Shape::Count),
    alone("level:warn", Shape::Histogram),
];

impl Question {
    /// As it is asked of the index.
    pub(super) async fn ask(&self, pool: &PgPool, tenant: TenantKey) -> anyhow::Result<Ask> {
        let read = query::read(self.query, Utc::now())?;
        let query = Query::resolve(&read, &mut *pool.acquire().await?, tenant).await?;
        Ok(Ask { query, from_ms: None, to_ms: None, reach: Reach { tenant, devices: None } })
    }

    /// How many lines, buckets or values there are, or what the count is; and how long it took.
    pub(super) async fn of_index(&self, search: &Search, ask: &Ask, pool: &PgPool) -> anyhow::Result<(u64, Duration)> {
        let started = Instant::now();
        let found = match self.shape {
            Shape::Count => search.count(ask).await?,
            Shape::Histogram => search.histogram(ask, 3_600_000).await?.len() as u64,
            Shape::Top => search.top(ask, "target", 10).await?.values.len() as u64,
            Shape::Newest => {
                let page = search.page(ask, Order::Newest, None, 20).await?;
                fetch(&mut *pool.acquire().await?, ask.reach.tenant, &page.hits).await?.len() as u64
            }
        };
        Ok((found, started.elapsed()))
    }
}

/// A percentile, in milliseconds.
pub(super) fn ms(took: &mut [Duration], percent: usize) -> f64 {
    took.sort_unstable();
    let place = (took.len() * percent / 100).min(took.len().saturating_sub(1));
    took.get(place).map_or(0.0, |took| took.as_secs_f64() * 1000.0)
}
