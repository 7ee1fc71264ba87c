//! Lines and their days, without a database or files.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use tantivy::TantivyDocument;
use tantivy::indexer::NoMergePolicy;

use super::super::*;
use crate::clock::from_ms;
use crate::index::schema::{Columns, FIELDS, document, tokenizers};
use crate::index::{Day, Name};
use crate::level::Level;
use crate::log::Cut;
use crate::log::query::read;
use crate::query;
pub(super) use crate::telemetry::fixture::NOW;

pub(super) const DAY: i64 = 86_400_000;
/// The tenant of lines that say nothing else.
pub(super) const TENANT: TenantKey = TenantKey(1);

/// What of a line matters to a test.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    pub(super) ts_ms: i64,
    pub(super) message: String,
    pub(super) tenant: TenantKey,
    pub(super) device: DeviceKey,
    pub(super) level: i16,
    pub(super) target: Option<String>,
    pub(super) fields: Map<String, Value>,
}

impl Spec {
    pub(super) fn new(ts_ms: i64, message: &str) -> Self {
        Self {
            ts_ms,
            message: message.to_owned(),
            tenant: TENANT,
            device: DeviceKey(1),
            level: 3,
            target: None,
            fields: Map::new(),
        }
    }

    fn line(&self, nth: i64) -> Line {
        Line {
            address: Address { ts_ms: self.ts_ms, writer: i16::try_from(nth % 3).unwrap(), place: nth / 3 + 1 },
            tenant: self.tenant,
            device: self.device,
            device_id: "pump-1".parse().unwrap(),
            seq: nth,
            level: Level::from_number(self.level).unwrap(),
            target: self.target.clone(),
            message: self.message.clone(),
            trace: None,
            fields: self.fields.clone(),
            cut: Cut::default(),
            sent_at_ms: None,
        }
    }
}

pub(super) fn now() -> DateTime<Utc> {
    from_ms(NOW)
}

fn threads() -> Executor {
    Executor::multi_thread(2, "test-").unwrap()
}

pub(super) fn clock() -> Clock {
    Clock(Instant::now() + Duration::from_mins(1))
}

/// A query that asks nothing of devices.
pub(super) fn own(read: &query::Query) -> Query {
    Query::of_lines(read)
}

/// All lines of [`TENANT`] that a query asks for.
pub(super) fn ask(text: &str) -> Ask {
    let read = read(text, now()).unwrap_or_else(|error| panic!("{text}: {error}"));
    Ask { query: own(&read), from_ms: None, to_ms: None, reach: Reach { tenant: TENANT, devices: None } }
}

/// Lines, and the days that have them.
pub(super) struct Built {
    pub(super) lines: Vec<Line>,
    pub(super) days: Vec<Day>,
    zones: ZoneCache,
}

impl Built {
    /// Each day in as many segments.
    pub(super) fn new(specs: &[Spec], segments: usize) -> Self {
        let lines = specs.iter().zip(0..).map(|(spec, nth)| spec.line(nth)).collect();
        Self::of(lines, segments, 1000)
    }

    pub(super) fn of(lines: Vec<Line>, segments: usize, columns: usize) -> Self {
        let mut by_day = BTreeMap::<i64, Vec<&Line>>::new();
        for line in &lines {
            by_day.entry(line.address.ts_ms.div_euclid(DAY)).or_default().push(line);
        }
        let days = by_day.into_iter().rev().map(|(day, lines)| index(day, &lines, segments, columns)).collect();
        Self { lines, days, zones: ZoneCache::default() }
    }

    fn days(&self, window: Window) -> Vec<Day> {
        self.days.iter().filter(|day| window.meets(day.min_ms, day.max_ms)).cloned().collect()
    }

    pub(super) fn page(&self, ask: &Ask, order: Order, after: Option<Cursor>, limit: usize) -> Page {
        let (query, window) = (&ask.compiled(), ask.narrow_window());
        let search = page::Search { query, window, order, after, limit, clock: clock(), zones: &self.zones };
        search.run(self.days(window)).unwrap()
    }

    pub(super) fn count(&self, ask: &Ask) -> u64 {
        let (query, window) = (ask.compiled(), ask.narrow_window());
        let of_day = |day: Day| {
            let weight = pass::weight(&query, &day).unwrap();
            let readers = day.searcher.segment_readers().iter();
            readers.map(|reader| top::count(reader, &*weight, window, clock()).unwrap()).sum::<u64>()
        };
        self.days(window).into_iter().map(of_day).sum()
    }

    pub(super) fn histogram(&self, ask: &Ask, interval_ms: i64) -> Result<Vec<Bucket>> {
        let window = ask.narrow_window();
        histogram::histogram(&threads(), &ask.compiled(), &self.days(window), window, interval_ms, clock())
    }

    pub(super) fn top(&self, ask: &Ask, field: &str, size: usize) -> Result<Top> {
        let window = ask.narrow_window();
        top::top(&threads(), &ask.compiled(), &self.days(window), window, &By::read(field)?, size, clock())
    }

    pub(super) fn patterns(&self, ask: &Ask, since_ms: Option<i64>) -> patterns::Patterns {
        let days = |window| self.days(window);
        patterns::patterns(&ask.compiled(), days, ask.narrow_window(), since_ms, MAX_PATTERNS, clock()).unwrap()
    }
}

fn index(day: i64, lines: &[&Line], segments: usize, columns: usize) -> Day {
    let builder = tantivy::Index::builder().schema(FIELDS.schema.clone()).tokenizers(tokenizers());
    let index = builder.create_in_ram().unwrap();
    let mut writer = index.writer_with_num_threads::<TantivyDocument>(1, 20_000_000).unwrap();
    writer.set_merge_policy(Box::new(NoMergePolicy));
    let mut columns = Columns::new([], columns);
    for part in lines.chunks(lines.len().div_ceil(segments)) {
        for line in part {
            writer.add_document(document(line, &mut columns)).unwrap();
        }
        writer.commit().unwrap();
    }
    let searcher = index.reader().unwrap().searcher();
    Day { name: Name::Of(from_ms(day * DAY).date_naive()), min_ms: day * DAY, max_ms: day * DAY + DAY - 1, searcher }
}
