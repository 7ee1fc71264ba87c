//! Top values: which values of a field there are most lines with.

use std::collections::HashMap;
use std::hash::Hash;

use tantivy::Executor;
use tantivy::columnar::{Column, DynamicColumn, StrColumn};
use tantivy::index::SegmentReader;
use tantivy::query::Weight;

use super::compile::{Boxed, and, has};
use super::pass::{Clock, Matched, Window, each_segment, refused};
use crate::error::{Error, Result};
use crate::index::Day;
use crate::level::Level;

/// Most values of an answer.
pub const MAX_VALUES: usize = 1000;
/// Values of one segment that are carried on to the answer, those with most lines; where a segment has no more, counts are exact.
pub(super) const MAX_CARRIED: usize = 10_000;

/// The values of a field with most lines.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Top {
    /// Each with its lines, the most first.
    pub values: Vec<(String, u64)>,
    /// Lines with other values of the field.
    pub others: u64,
    /// Lines that have the field but whose values are not kept for counting: the day has too many names of fields.
    pub uncounted: u64,
}

/// What lines are counted by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum By {
    Level,
    Device,
    Target,
    Pattern,
    Field(String),
}

impl By {
    pub(super) fn read(field: &str) -> Result<Self> {
        match field {
            "level" => Ok(Self::Level),
            "device" => Ok(Self::Device),
            "target" => Ok(Self::Target),
            "pattern" => Ok(Self::Pattern),
            _ => match field.strip_prefix("fields.") {
                Some(name) if !name.is_empty() => Ok(Self::Field(name.to_owned())),
                _ => Err(Error::Invalid(format!(
                    "field: expected one of level, device, target, pattern or fields.NAME, not {field:?}"
                ))),
            },
        }
    }

    fn column(&self) -> String {
        match self {
            Self::Level => "level".to_owned(),
            Self::Device => "device".to_owned(),
            Self::Target => "target".to_owned(),
            Self::Pattern => "pattern".to_owned(),
            Self::Field(name) => format!("columns.{}", name.replace('\\', "\\\\").replace('.', "\\.")),
        }
    }

    fn text(&self, number: u64) -> String {
        match self {
            Self::Level => i16::try_from(number)
                .ok()
                .and_then(Level::from_number)
                .map_or_else(|| number.to_string(), |level| level.name().to_owned()),
            Self::Pattern => format!("{number:016x}"),
            _ => number.to_string(),
        }
    }
}

/// Counts by value.
pub(super) fn top(
    threads: &Executor,
    query: &Boxed,
    days: &[Day],
    window: Window,
    by: &By,
    size: usize,
    clock: Clock,
) -> Result<Top> {
    let of_segments = each_segment(threads, query, days, |reader, weight| {
        let mut found = Vec::new();
        for handle in reader.fast_fields().dynamic_column_handles(&by.column())? {
            let column = handle.open().map_err(tantivy::TantivyError::from)?;
            found.extend(by.segment(Matched::new(reader, weight, window, clock)?, column)?);
        }
        Ok(found)
    })?;
    let mut all = HashMap::new();
    for (value, count) in of_segments.into_iter().flatten() {
        *all.entry(value).or_insert(0) += count;
    }
    let uncounted = match by {
        By::Field(name) => uncounted(threads, query, days, window, (name, &by.column()), clock)?,
        _ => 0,
    };
    let total = all.values().sum::<u64>();
    let values = most(all, size);
    let others = total - values.iter().map(|(_, count)| count).sum::<u64>();
    Ok(Top { values, others, uncounted })
}

/// How many lines have the field, where it has no column.
fn uncounted(
    threads: &Executor,
    query: &Boxed,
    days: &[Day],
    window: Window,
    (name, column): (&str, &str),
    clock: Clock,
) -> Result<u64> {
    let with = and(vec![query.box_clone(), has(&format!("fields.{name}"))]);
    let of_segments = each_segment(threads, &with, days, |reader, weight| {
        let is_counted = !reader.fast_fields().dynamic_column_handles(column)?.is_empty();
        if is_counted { Ok(0) } else { count(reader, weight, window, clock) }
    })?;
    Ok(of_segments.into_iter().sum())
}

/// How many documents of a segment there are.
pub(super) fn count(reader: &SegmentReader, weight: &dyn Weight, window: Window, clock: Clock) -> Result<u64> {
    let times = super::pass::times(reader)?;
    if reader.max_doc() == 0 || !window.meets(times.min_value(), times.max_value()) {
        return Ok(0);
    }
    if window.covers(times.min_value(), times.max_value()) {
        clock.check()?;
        return Ok(u64::from(weight.count(reader).map_err(refused)?));
    }
    let (mut matched, mut count) = (Matched::new(reader, weight, window, clock)?, 0);
    while let Some((docs, _)) = matched.next()? {
        count += docs.len() as u64;
    }
    Ok(count)
}

/// Those with the most lines, the most first; of as many, by name.
fn most<K: Ord>(counts: HashMap<K, u64>, size: usize) -> Vec<(K, u64)> {
    let mut counts = counts.into_iter().collect::<Vec<_>>();
    let order = |a: &(K, u64), b: &(K, u64)| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0));
    if counts.len() > size && size > 0 {
        counts.select_nth_unstable_by(size - 1, order);
    }
    counts.truncate(size);
    counts.sort_by(order);
    counts
}

impl By {
    /// The values of a segment with their counts.
    fn segment(&self, matched: Matched<'_>, column: DynamicColumn) -> Result<Vec<(String, u64)>> {
        Ok(match column {
            DynamicColumn::Str(column) => texts(matched, &column)?,
            DynamicColumn::U64(column) => named(counted(matched, &column, |n| n)?, |n| self.text(*n)),
            DynamicColumn::I64(column) => named(counted(matched, &column, |n| n)?, ToString::to_string),
            DynamicColumn::F64(column) => {
                named(counted(matched, &column, f64::to_bits)?, |bits| f64::from_bits(*bits).to_string())
            }
            DynamicColumn::Bool(column) => named(counted(matched, &column, |flag| flag)?, ToString::to_string),
            DynamicColumn::Bytes(_) | DynamicColumn::IpAddr(_) | DynamicColumn::DateTime(_) => Vec::new(),
        })
    }
}

fn named<K: Ord>(counts: HashMap<K, u64>, name: impl Fn(&K) -> String) -> Vec<(String, u64)> {
    most(counts, MAX_CARRIED).into_iter().map(|(value, count)| (name(&value), count)).collect()
}

/// Lines by value; a line that has a value twice counts once.
fn counted<T, K>(mut matched: Matched<'_>, column: &Column<T>, key: impl Fn(T) -> K) -> Result<HashMap<K, u64>>
where
    T: PartialOrd + Copy + std::fmt::Debug + Send + Sync + 'static,
    K: Hash + Eq + Ord,
{
    let mut counts = HashMap::new();
    let mut of_line = Vec::new();
    while let Some((docs, _)) = matched.next()? {
        for doc in docs {
            of_line.extend(column.values_for_doc(*doc).map(&key));
            if of_line.len() > 1 {
                of_line.sort_unstable();
                of_line.dedup();
            }
            for value in of_line.drain(..) {
                *counts.entry(value).or_insert(0) += 1;
            }
        }
    }
    Ok(counts)
}

/// As [`counted`], by the place of each text in the dictionary.
fn texts(mut matched: Matched<'_>, column: &StrColumn) -> Result<Vec<(String, u64)>> {
    let mut counts = vec![0_u64; column.num_terms()];
    let mut of_line = Vec::new();
    while let Some((docs, _)) = matched.next()? {
        for doc in docs {
            of_line.extend(column.term_ords(*doc));
            if of_line.len() > 1 {
                of_line.sort_unstable();
                of_line.dedup();
            }
            for place in of_line.drain(..) {
                counts[usize::try_from(place).unwrap_or(usize::MAX)] += 1;
            }
        }
    }
    let some = counts.into_iter().enumerate().filter(|(_, count)| *count > 0).collect::<HashMap<_, _>>();
    let mut named = Vec::new();
    for (place, count) in most(some, MAX_CARRIED) {
        let mut text = String::new();
        if column.ord_to_str(place as u64, &mut text).map_err(tantivy::TantivyError::from)? {
            named.push((text, count));
        }
    }
    Ok(named)
}
