//! Search: lines found by what they say, counted over time, by value and by pattern.
//!
//! A [`Search`] asks the index what an [`Ask`] says, and answers with addresses and counts; [`fetch`] reads the lines themselves, and
//! [`crate::log::context`] those around one. Holds: the caller's [`Reach`] is part of every question, never a filter on its answer; an
//! answer comes within `search.timeout_ms` or not at all, and no more than `search.concurrent` are worked on at once. Ignorant of: HTTP,
//! who calls.

mod compile;
mod complement;
mod ending;
mod highlight;
mod histogram;
mod page;
mod pass;
mod patterns;
#[cfg(test)]
mod tests;
mod top;
mod zone;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prometheus::{IntCounter, Registry};
use sqlx::PgConnection;
use tantivy::Executor;
use tokio::sync::Semaphore;

pub use self::highlight::{MAX_HIGHLIGHTS, highlights};
pub use self::histogram::{Bucket, MAX_BUCKETS};
pub use self::page::{Cursor, Hit, Order, Page};
use self::pass::{Clock, Window};
pub use self::patterns::MAX_PATTERNS;
use self::top::By;
pub use self::top::{MAX_VALUES, Top};
use self::zone::ZoneCache;
use crate::config;
use crate::device;
use crate::error::{Error, Result};
use crate::id::{DeviceKey, TenantKey};
use crate::index::{Day, Index};
use crate::log::query::{KeySet, Query};
use crate::log::{Address, Line, pattern};

/// Most lines of a page.
pub const MAX_PAGE: usize = 1000;

/// The lines that a caller may see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reach {
    /// Those of this tenant,
    pub tenant: TenantKey,
    /// and of these devices, unless it is all of them.
    pub devices: Option<Arc<KeySet>>,
}

impl Reach {
    /// As far as the transaction of [`crate::tenancy`] sees.
    pub async fn of(db: &mut PgConnection, tenant: TenantKey) -> Result<Self> {
        let scope = sqlx::query_scalar!("select nullif(current_setting('muster.scope', true), '')");
        if scope.fetch_one(&mut *db).await?.is_none() {
            return Ok(Self { tenant, devices: None });
        }
        let keys = sqlx::query_scalar!(r#"select key as "key: DeviceKey" from device where tenant_key = $1"#, tenant.0);
        let devices = keys.fetch_all(db).await?.into_iter().collect::<KeySet>();
        Ok(Self { tenant, devices: Some(Arc::new(devices)) })
    }

    /// Whether a line is within it.
    pub fn contains(&self, line: &Line) -> bool {
        line.tenant == self.tenant && self.devices.as_ref().is_none_or(|devices| devices.contains(line.device))
    }
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Ask {
    /// By what it says.
    pub query: Query,
    /// From this time on, in ms since the epoch.
    pub from_ms: Option<i64>,
    /// Up to and without this time.
    pub to_ms: Option<i64>,
    /// Among these lines.
    pub reach: Reach,
}

impl Ask {
    /// Whether it asks for that line.
    pub fn matches(&self, line: &Line) -> bool {
        self.window().contains(line.address.ts_ms) && self.reach.contains(line) && self.query.matches(line)
    }

    fn window(&self) -> Window {
        let to_ms = self.to_ms.map_or(i64::MAX, |to| to.saturating_sub(1));
        Window { from_ms: self.from_ms.unwrap_or(i64::MIN), to_ms }
    }

    /// With what the query itself says of the time.
    fn narrow_window(&self) -> Window {
        self.window().narrowed(self.query.asked())
    }

    fn compiled(&self) -> compile::Boxed {
        compile::compile(&self.query, &self.reach)
    }
}

/// Similar lines.
#[derive(Debug, Clone, PartialEq)]
pub struct Pattern {
    /// As `pattern:` names it.
    pub id: String,
    /// What they have in common, `*` for what varies.
    pub text: String,
    /// How many there are.
    pub count: u64,
    /// The oldest of them, in ms since the epoch.
    pub first_ms: i64,
    /// The newest of them.
    pub last_ms: i64,
    /// The newest of them.
    pub example: Line,
}

/// Patterns before their texts are read: see [`Patterns::read`].
#[derive(Debug)]
pub struct Patterns(patterns::Patterns);

/// How often a search was refused.
#[derive(Debug, Clone)]
pub struct Metrics {
    busy: IntCounter,
    timeout: IntCounter,
}

impl Metrics {
    /// Counters in `registry`.
    ///
    /// # Errors
    /// They are registered already.
    pub fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let busy = IntCounter::new("muster_search_busy_total", "Searches refused because too many were under way")?;
        let timeout = IntCounter::new("muster_search_timeout_total", "Searches that took too long and were given up")?;
        registry.register(Box::new(busy.clone()))?;
        registry.register(Box::new(timeout.clone()))?;
        Ok(Self { busy, timeout })
    }
}

/// Searches an index; cheap to clone.
#[derive(Debug, Clone)]
pub struct Search {
    inner: Arc<Inner>,
    places: Arc<Semaphore>,
    timeout: Duration,
    metrics: Metrics,
}

struct Inner {
    index: Index,
    zones: ZoneCache,
    threads: Executor,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("index", &self.index).finish_non_exhaustive()
    }
}

impl Inner {
    fn days(&self, window: Window) -> Vec<Day> {
        self.index.days(window.from_ms, window.to_ms)
    }
}

impl Search {
    /// Of this index.
    ///
    /// # Errors
    /// The threads cannot be started.
    pub fn new(index: Index, settings: &config::Search, metrics: Metrics) -> Result<Self> {
        let threads = Executor::multi_thread(settings.threads, "search-")?;
        Ok(Self {
            inner: Arc::new(Inner { index, zones: ZoneCache::default(), threads }),
            places: Arc::new(Semaphore::new(settings.concurrent)),
            timeout: Duration::from_millis(settings.timeout_ms),
            metrics,
        })
    }

    /// What is searched.
    pub fn index(&self) -> &Index {
        &self.inner.index
    }

    /// At most `limit` (itself at most [`MAX_PAGE`]) lines in the order of time, behind `after`.
    pub async fn page(&self, ask: &Ask, order: Order, after: Option<Cursor>, limit: usize) -> Result<Page> {
        let ask = ask.clone();
        self.run(move |inner, clock| {
            let window = ask.narrow_window();
            let search = page::Search {
                query: &ask.compiled(),
                window,
                order,
                after,
                limit: limit.clamp(1, MAX_PAGE),
                clock,
                zones: &inner.zones,
            };
            search.run(inner.days(window))
        })
        .await
    }

    /// How many lines there are.
    pub async fn count(&self, ask: &Ask) -> Result<u64> {
        let ask = ask.clone();
        self.run(move |inner, clock| {
            let (query, window) = (ask.compiled(), ask.narrow_window());
            let count = |reader: &_, weight: &_| top::count(reader, weight, window, clock);
            let of_segments = pass::each_segment(&inner.threads, &query, &inner.days(window), count)?;
            Ok(of_segments.into_iter().sum())
        })
        .await
    }

    /// How many lines of each level there are in each stretch of `interval_ms`; those without a line are left out.
    ///
    /// # Errors
    /// More than [`MAX_BUCKETS`] of them have lines.
    pub async fn histogram(&self, ask: &Ask, interval_ms: i64) -> Result<Vec<Bucket>> {
        let ask = ask.clone();
        self.run(move |inner, clock| {
            let window = ask.narrow_window();
            histogram::histogram(&inner.threads, &ask.compiled(), &inner.days(window), window, interval_ms, clock)
        })
        .await
    }

    /// The `size` (at most [`MAX_VALUES`]) values with the most lines of `level`, `device`, `target`, `pattern` or `fields.NAME`. Devices
    /// are numbers until [`Top::name_devices`].
    pub async fn top(&self, ask: &Ask, field: &str, size: usize) -> Result<Top> {
        let (ask, by) = (ask.clone(), By::read(field)?);
        self.run(move |inner, clock| {
            let window = ask.narrow_window();
            let size = size.clamp(1, MAX_VALUES);
            top::top(&inner.threads, &ask.compiled(), &inner.days(window), window, &by, size, clock)
        })
        .await
    }

    /// The `size` (at most [`MAX_PATTERNS`]) patterns with the most lines; with `new_since_ms` only those of which no line that the query asks
    /// for is older.
    pub async fn patterns(&self, ask: &Ask, new_since_ms: Option<i64>, size: usize) -> Result<Patterns> {
        let ask = ask.clone();
        self.run(move |inner, clock| {
            let days = |window| inner.days(window);
            let size = size.clamp(1, MAX_PATTERNS);
            patterns::patterns(&ask.compiled(), days, ask.narrow_window(), new_since_ms, size, clock).map(Patterns)
        })
        .await
    }

    /// Works on a question when its turn comes, away from what must not wait.
    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner, Clock) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let end = Instant::now() + self.timeout;
        let turn = tokio::time::timeout_at(end.into(), self.places.clone().acquire_owned()).await;
        let Ok(turn) = turn else {
            self.metrics.busy.inc();
            return Err(Error::SearchBusy);
        };
        let turn = turn.map_err(|_| Error::SearchBusy)?;
        let inner = self.inner.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&inner, Clock(end))
        });
        let answer = done.await.map_err(|error| Error::Internal(error.to_string()))?;
        if matches!(answer, Err(Error::SearchTimeout)) {
            self.metrics.timeout.inc();
        }
        answer
    }
}

/// The lines that were found, in their order; without those that are gone since, or that the transaction of [`crate::tenancy`] may not see.
pub async fn fetch(db: &mut PgConnection, tenant: TenantKey, hits: &[Hit]) -> Result<Vec<Line>> {
    let devices = hits.iter().map(|hit| hit.device).collect::<Vec<_>>();
    device::open_all(db, tenant, &devices).await?;
    let addresses = hits.iter().map(|hit| hit.address).collect::<Vec<Address>>();
    Line::fetch(db, &addresses).await
}

impl Patterns {
    /// How many there are in all, and whether that is all: only so many are counted.
    pub fn total(&self) -> (usize, bool) {
        (self.0.total, !self.0.is_bounded)
    }

    /// With their texts; without those whose lines are gone since, or that the transaction may not see.
    pub async fn read(&self, db: &mut PgConnection, tenant: TenantKey) -> Result<Vec<Pattern>> {
        let hits = self.0.found.iter().map(|found| found.newest).collect::<Vec<_>>();
        let lines = fetch(db, tenant, &hits).await?;
        let mut lines = lines.into_iter().peekable();
        let with_line = self.0.found.iter().filter_map(|found| {
            let example = lines.next_if(|line| line.address == found.newest.address)?;
            let pattern = pattern::of(&example.message);
            Some(Pattern {
                id: format!("{:016x}", found.hash),
                text: pattern.text().to_owned(),
                count: found.count,
                first_ms: found.first_ms,
                last_ms: found.last_ms,
                example,
            })
        });
        Ok(with_line.collect())
    }
}

impl Top {
    /// The values of `device` by their names; those that are gone since are left out.
    pub async fn name_devices(&mut self, db: &mut PgConnection, tenant: TenantKey) -> Result<()> {
        let keys = self.values.iter().filter_map(|(key, _)| key.parse::<i64>().ok()).collect::<Vec<_>>();
        let named = sqlx::query!("select key, id from device where tenant_key = $1 and key = any($2)", tenant.0, &keys);
        let named = named.fetch_all(db).await?;
        let known = named.into_iter().map(|row| (row.key.to_string(), row.id)).collect::<HashMap<_, _>>();
        self.values.retain_mut(|(value, _)| known.get(value).map(|name| value.clone_from(name)).is_some());
        Ok(())
    }
}
