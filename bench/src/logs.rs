//! Log lines kept, indexed and searched, beside PostgreSQL's full text search with a GIN index on the same rows, in the same run
//! on one private cluster.
//!
//! PostgreSQL has what its manual advises: a stored `tsvector` under a GIN index, and B-trees for time and level. Every question is
//! asked of both in turn, warm, and in this process; what both find is compared before how long it took.

mod ask;
mod latency;
mod lines;
mod postgres;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use chrono::{DateTime, NaiveTime, TimeDelta, Utc};
use fleet_core::clock::Clock;
use fleet_core::config::{Config, Environment};
use fleet_core::id::{DeviceKey, TenantKey};
use fleet_core::index::Index;
use fleet_core::log::{self, Batch, Limits};
use fleet_core::postgres::{Cluster, Tuning};
use fleet_core::search::{Metrics, Search};
use fleet_core::{database, retention};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _, Executor as _, PgConnection, PgPool};
use tokio::task::JoinSet;

use crate::writers::{self, BATCH, WRITERS};

/// One figure, of Muster and, where it has one, of PostgreSQL.
#[derive(Debug, Clone)]
pub(crate) struct Figure {
    pub(crate) what: String,
    pub(crate) ours: f64,
    pub(crate) theirs: Option<f64>,
    pub(crate) wanted: Option<Wanted>,
}

/// A promise of a figure.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Wanted {
    /// At least so many times that of PostgreSQL.
    TimesTheirs(f64),
    /// At most that share of PostgreSQL's time.
    ShareOfTheirs(f64),
    /// At most that.
    AtMost(f64),
}

impl Wanted {
    /// Whether it holds.
    pub(crate) fn holds(self, ours: f64, theirs: Option<f64>) -> bool {
        match self {
            Self::TimesTheirs(times) => theirs.is_some_and(|theirs| ours >= times * theirs),
            Self::ShareOfTheirs(share) => theirs.is_some_and(|theirs| ours <= share * theirs),
            Self::AtMost(most) => ours <= most,
        }
    }
}

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plan {
    /// Lines that are searched beside PostgreSQL: of one day.
    pub(crate) lines: usize,
    /// Lines that are searched for the percentile: of five days.
    pub(crate) many: usize,
    /// How often each question is asked.
    pub(crate) times: usize,
}

/// Runs it on a cluster of its own.
pub(crate) async fn run(muster: &Path, dir: &Path, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let cluster = Cluster::start(&dir.join("logs"), "auto", Tuning { max_connections: 20, durable: true }).await?;
    let found = measure(&cluster.options(), &dir.join("index"), plan).await;
    cluster.stop().await;
    let mut found = found?;
    found.extend(latency::run(muster, dir).await?);
    Ok(found)
}

/// What the parts share.
struct Stage {
    options: PgConnectOptions,
    pool: PgPool,
    clock: Clock,
    tenant: TenantKey,
    devices: Arc<[DeviceKey]>,
    figures: Vec<Figure>,
}

async fn measure(options: &PgConnectOptions, dir: &Path, plan: Plan) -> anyhow::Result<Vec<Figure>> {
    let pool = PgPoolOptions::new().max_connections(4).connect_with(options.clone()).await?;
    database::migrate(&pool).await?;
    let clock = Clock::system();
    let tenant = database::first_tenant(&mut *pool.acquire().await?, &clock).await?;
    for day in 0..7 {
        retention::ensure_partitions(&mut *pool.acquire().await?, clock.now() - TimeDelta::days(day)).await?;
    }
    let devices = devices(&pool, tenant).await?;
    let mut stage = Stage { options: options.clone(), pool, clock, tenant, devices, figures: Vec::new() };
    stage.keep(plan).await?;
    let search = stage.index(dir, plan).await?;
    stage.ask_both(&search, plan).await?;
    stage.ask_many(&search, plan).await?;
    stage.pool.close().await;
    Ok(stage.figures)
}

async fn devices(pool: &PgPool, tenant: TenantKey) -> anyhow::Result<Arc<[DeviceKey]>> {
    let keys = sqlx::query_scalar::<_, i64>(
        "insert into device (tenant_key, id, created_at, updated_at)
         select $1, 'device-' || n, now(), now() from generate_series(1, $2) n returning key",
    );
    let keys = keys.bind(tenant.0).bind(i32::try_from(lines::DEVICES)?).fetch_all(pool).await?;
    Ok(keys.into_iter().map(DeviceKey).collect())
}

impl Stage {
    fn figure(&mut self, what: impl Into<String>, ours: f64, theirs: Option<f64>, wanted: Option<Wanted>) {
        let figure = Figure { what: what.into(), ours, theirs, wanted };
        eprintln!("{figure:?}");
        self.figures.push(figure);
    }

    /// Lines into rows, beside readings by the same path.
    async fn keep(&mut self, plan: Plan) -> anyhow::Result<()> {
        let readings = writers::write(&self.options, self.tenant, &self.clock, plan.lines).await?;
        self.pool.execute("truncate telemetry").await?;
        self.pool.execute("checkpoint").await?;
        // Of yesterday: a day that is over.
        let took = self.write(0..plan.lines, self.midnight(1), TimeDelta::days(1)).await?;
        let lines = plan.lines as f64 / took.as_secs_f64();
        let wanted = Some(Wanted::TimesTheirs(0.7));
        self.figure("rows a second by the write path: log lines, and readings", lines, Some(readings), wanted);
        Ok(())
    }

    fn midnight(&self, days_ago: i64) -> DateTime<Utc> {
        (self.clock.now() - TimeDelta::days(days_ago)).date_naive().and_time(NaiveTime::MIN).and_utc()
    }

    /// Writes these lines, spread over a time, and says how long it took.
    async fn write(
        &self,
        range: std::ops::Range<usize>,
        from: DateTime<Utc>,
        over: TimeDelta,
    ) -> anyhow::Result<Duration> {
        let mut connections = Vec::new();
        for _ in 0..WRITERS {
            connections.push(self.options.connect().await?);
        }
        let step_us = over.num_microseconds().unwrap_or_default() / i64::try_from(range.len().max(1))?;
        let started = Instant::now();
        let mut tasks = JoinSet::new();
        for (writer, db) in connections.into_iter().enumerate() {
            let of =
                Writer { number: writer, from, step_us, devices: self.devices.clone(), now_ms: self.clock.now_ms() };
            tasks.spawn(of.write(db, range.clone()));
        }
        while let Some(ended) = tasks.join_next().await {
            ended??;
        }
        Ok(started.elapsed())
    }

    /// Rows into both indexes.
    async fn index(&mut self, dir: &Path, plan: Plan) -> anyhow::Result<Search> {
        let settings = Config::from_sources(&Environment::default(), Some(std::collections::HashMap::new()))?.search;
        let index = Index::open(dir, &settings)?;
        // Whoever reads rows first pays for their hint bits, which are none of either side's.
        self.pool.execute("vacuum analyze log").await?;
        self.pool.execute("analyze device").await?;
        self.pool.execute("checkpoint").await?;
        let started = Instant::now();
        index.catch_up(&self.pool, &self.clock).await?;
        let took = started.elapsed();
        let built = postgres::build(&self.pool).await?;
        let rate = |took: Duration| plan.lines as f64 / took.as_secs_f64();
        let wanted = Some(Wanted::TimesTheirs(3.0));
        self.figure(
            "lines indexed a second, from rows; a table that has its GIN index",
            rate(took),
            Some(rate(built.live)),
            wanted,
        );
        self.figure("the same; `create index … using gin` over the rows", rate(took), Some(rate(built.gin)), None);
        let ours = size_of(dir)? as f64 / plan.lines as f64;
        let theirs = built.gin_bytes as f64 / plan.lines as f64;
        self.figure(
            "bytes of index a line; GIN alone, as it was filled",
            ours,
            Some(theirs),
            Some(Wanted::AtMost(100.0)),
        );
        Ok(Search::new(index, &settings, Metrics::register(&prometheus::Registry::new())?)?)
    }

    async fn ask_both(&mut self, search: &Search, plan: Plan) -> anyhow::Result<()> {
        for question in ask::QUESTIONS {
            let (mut ours, mut theirs) = (Vec::new(), Vec::new());
            let ask = question.ask(&self.pool, self.tenant).await?;
            for _ in 0..plan.times {
                let (found, took) = question.of_index(search, &ask, &self.pool).await?;
                ours.push(took);
                let (rows, took) = postgres::ask(&self.pool, question.sql).await?;
                theirs.push(took);
                ensure!(found == rows, "{}: the index finds {found}, PostgreSQL {rows}", question.name);
            }
            let what = format!("{}, ms", question.name);
            self.figure(what, ask::ms(&mut ours, 50), Some(ask::ms(&mut theirs, 50)), question.wanted);
        }
        Ok(())
    }

    /// Many lines, and questions of all kinds.
    async fn ask_many(&mut self, search: &Search, plan: Plan) -> anyhow::Result<()> {
        let each = plan.many / 5;
        for day in 0..5 {
            let first = plan.lines + usize::try_from(day)? * each;
            self.write(first..first + each, self.midnight(day + 2), TimeDelta::days(1)).await?;
        }
        search.index().catch_up(&self.pool, &self.clock).await?;
        let mut took = Vec::new();
        for _ in 0..plan.times {
            for question in ask::MANY {
                let ask = question.ask(&self.pool, self.tenant).await?;
                took.push(question.of_index(search, &ask, &self.pool).await?.1);
            }
        }
        let lines = (plan.lines + plan.many) / 1_000_000;
        let wanted = Some(Wanted::AtMost(100.0));
        self.figure(format!("p95 of searches over {lines} million lines, ms"), ask::ms(&mut took, 95), None, wanted);
        Ok(())
    }
}

struct Writer {
    number: usize,
    from: DateTime<Utc>,
    step_us: i64,
    devices: Arc<[DeviceKey]>,
    now_ms: i64,
}

impl Writer {
    /// Every fourth of the lines, as the server does it: decoded, and a batch a commit.
    async fn write(self, mut db: PgConnection, range: std::ops::Range<usize>) -> anyhow::Result<()> {
        let limits = Limits { max_lines: 5000, max_ahead_ms: 300_000 };
        let (mut batch, mut payload) = (Batch::default(), String::new());
        let first = range.start;
        for nth in range.clone().skip(self.number).step_by(WRITERS) {
            let at = self.from + TimeDelta::microseconds(self.step_us * i64::try_from(nth - first)?);
            let device = lines::line(nth, at.timestamp_millis(), &mut payload);
            if let Some(rejected) = batch.push(self.devices[device], payload.as_bytes(), self.now_ms, &limits).first() {
                bail!("a line was rejected: {}", rejected.reason);
            }
            if batch.len() == BATCH || nth + WRITERS >= range.end {
                log::prepare(&mut db, &mut batch).await?;
                log::insert_batch(&mut db, i16::try_from(self.number)?, &batch).await?;
                batch = Batch::default();
            }
        }
        db.close().await?;
        Ok(())
    }
}

fn size_of(dir: &Path) -> std::io::Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(dir)? {
        let (entry, about) = entry.and_then(|entry| entry.metadata().map(|about| (entry, about)))?;
        bytes += if about.is_dir() { size_of(&entry.path())? } else { about.len() };
    }
    Ok(bytes)
}
