//! The newest values of one device, as held in memory and as kept in `device_latest.doc`.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;

use serde_json::value::RawValue;

use crate::telemetry::{Kind, number};
use crate::{Error, Result};

/// Metrics whose newest value is kept for one device; of more, those that were heard of last.
pub const MAX_METRICS: usize = 1_024;

/// Largest value kept with the newest values, in bytes of JSON. A larger one is read from its reading.
pub const MAX_VALUE_BYTES: usize = 4_096;

/// The newest value of each metric, in order of name.
#[derive(Debug, Default)]
pub(super) struct Values {
    cells: Vec<Cell>,
    newest_ms: Option<i64>,
    /// Whether large values are kept too.
    whole: bool,
}

#[derive(Debug)]
struct Cell {
    metric: Arc<str>,
    ts_ms: i64,
    seq: i64,
    value: Held,
}

#[derive(Debug, PartialEq)]
enum Held {
    Number(f64),
    Boolean(bool),
    Json(Box<str>),
    /// In the reading of that time and number.
    Large,
}

impl Held {
    fn of_json(text: &str) -> Self {
        match text {
            "true" => Self::Boolean(true),
            "false" => Self::Boolean(false),
            // Only what a double holds exactly may go through one.
            _ => match text.parse() {
                Ok(value) if printed(value) == text => Self::Number(value),
                _ => Self::Json(text.into()),
            },
        }
    }
}

fn printed(value: f64) -> String {
    number(Kind::Number, value).to_string()
}

impl Values {
    /// Values of any size; for an answer, not for keeping.
    pub(super) fn whole() -> Self {
        Self { whole: true, ..Self::default() }
    }

    /// From `device_latest.doc`.
    pub(super) fn parse(doc: &str) -> Result<Self> {
        let broken = || Error::Internal("device_latest.doc is not {metric: [ms, seq, value]}".to_owned());
        let members: BTreeMap<String, Vec<&RawValue>> = serde_json::from_str(doc).map_err(|_| broken())?;
        let mut values = Self::default();
        for (metric, parts) in members {
            let integer = |nth: usize| parts.get(nth).and_then(|part| part.get().parse().ok()).ok_or_else(broken);
            let value = parts.get(2).map_or(Held::Large, |part| Held::of_json(part.get()));
            values.cells.push(Cell { metric: metric.into(), ts_ms: integer(0)?, seq: integer(1)?, value });
        }
        values.newest_ms = values.cells.iter().map(|cell| cell.ts_ms).max();
        Ok(values)
    }

    /// The time of the newest reading that was taken.
    pub(super) fn newest_ms(&self) -> Option<i64> {
        self.newest_ms
    }

    /// Takes a reading in; says whether anything changed.
    pub(super) fn take(
        &mut self,
        ts_ms: i64,
        seq: i64,
        metrics: &[(Arc<str>, Kind)],
        nums: &[f64],
        rest: Option<&str>,
    ) -> bool {
        let mut changed = self.newest_ms.is_none_or(|newest| newest < ts_ms);
        self.newest_ms = self.newest_ms.max(Some(ts_ms));
        let mut at = 0;
        for ((metric, kind), value) in metrics.iter().zip(nums) {
            let value = || match kind {
                Kind::Number => Held::Number(*value),
                Kind::Boolean => Held::Boolean(*value != 0.0),
            };
            changed |= self.put(&mut at, metric, ts_ms, seq, value);
        }
        if let Some(rest) = rest {
            changed |= self.take_rest(ts_ms, seq, rest);
        }
        changed
    }

    fn take_rest(&mut self, ts_ms: i64, seq: i64, rest: &str) -> bool {
        // What is stored is an object; anything else would have no metrics to take.
        let members: BTreeMap<String, &RawValue> = serde_json::from_str(rest).unwrap_or_default();
        let (mut at, mut changed) = (0, false);
        let whole = self.whole;
        for (metric, value) in members {
            let value = || match value.get() {
                large if large.len() > MAX_VALUE_BYTES && !whole => Held::Large,
                text => Held::of_json(text),
            };
            changed |= self.put(&mut at, &metric.into(), ts_ms, seq, value);
        }
        changed
    }

    /// Takes other values in.
    pub(super) fn merge(&mut self, other: Self) {
        self.newest_ms = self.newest_ms.max(other.newest_ms);
        let mut at = 0;
        for cell in other.cells {
            self.put(&mut at, &cell.metric, cell.ts_ms, cell.seq, || cell.value);
        }
    }

    /// Keeps the value if it is newer than what is known. `at` is where the search begins: names come in order.
    fn put(&mut self, at: &mut usize, metric: &Arc<str>, ts_ms: i64, seq: i64, value: impl FnOnce() -> Held) -> bool {
        while self.cells.get(*at).is_some_and(|cell| !Arc::ptr_eq(&cell.metric, metric) && *cell.metric < **metric) {
            *at += 1;
        }
        match self.cells.get_mut(*at) {
            Some(cell) if cell.metric == *metric => {
                let known = (cell.ts_ms, cell.seq);
                let newer = (ts_ms, seq) > known || (ts_ms, seq) == known && cell.value == Held::Large && self.whole;
                if newer {
                    (cell.ts_ms, cell.seq, cell.value) = (ts_ms, seq, value());
                }
                newer
            }
            _ => {
                self.cells.insert(*at, Cell { metric: Arc::clone(metric), ts_ms, seq, value: value() });
                true
            }
        }
    }

    /// Forgets the values that were heard of longest ago, down to the bound; says how many.
    pub(super) fn trim(&mut self) -> usize {
        let excess = self.cells.len().saturating_sub(MAX_METRICS);
        if excess > 0 {
            let mut ages: Vec<_> = self.cells.iter().map(|cell| Reverse((cell.ts_ms, cell.seq))).collect();
            let (_, Reverse(oldest_kept), _) = ages.select_nth_unstable(MAX_METRICS - 1);
            let oldest_kept = *oldest_kept;
            self.cells.retain(|cell| (cell.ts_ms, cell.seq) >= oldest_kept);
            // Those of one reading are equally old.
            self.cells.truncate(MAX_METRICS);
        }
        excess
    }

    /// As `device_latest.doc`.
    pub(super) fn to_doc(&self) -> String {
        let mut doc = String::with_capacity(2 + self.cells.len() * 48);
        for cell in &self.cells {
            doc.push(if doc.is_empty() { '{' } else { ',' });
            let name = serde_json::to_string(&*cell.metric).expect("text is always JSON");
            write!(doc, "{name}:[{},{}", cell.ts_ms, cell.seq).expect("a string takes all");
            match &cell.value {
                Held::Number(value) => write!(doc, ",{}]", number(Kind::Number, *value)).expect("a string takes all"),
                Held::Boolean(on) => write!(doc, ",{on}]").expect("a string takes all"),
                Held::Json(text) => write!(doc, ",{text}]").expect("a string takes all"),
                Held::Large => doc.push(']'),
            }
        }
        doc.push_str(if doc.is_empty() { "{}" } else { "}" });
        doc
    }

    /// Name, time in ms and value, in order of name. Large values whose readings are gone are left out.
    pub(super) fn into_json(self) -> impl Iterator<Item = (String, i64, serde_json::Value)> {
        self.cells.into_iter().filter_map(|cell| {
            let value = match cell.value {
                Held::Number(value) => number(Kind::Number, value),
                Held::Boolean(on) => on.into(),
                Held::Json(text) => serde_json::from_str(&text).ok()?,
                Held::Large => return None,
            };
            Some((cell.metric.to_string(), cell.ts_ms, value))
        })
    }
}
