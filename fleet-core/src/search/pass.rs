//! A pass over what of the index is asked for: day by day, segment by segment, some documents at a time.
//!
//! Holds: it ends in time ([`Clock`]); it sees no document that is deleted, or outside the window of time.

use std::sync::Arc;
use std::time::Instant;

use tantivy::columnar::ColumnValues;
use tantivy::index::SegmentReader;
use tantivy::query::{EnableScoring, Scorer, Weight};
use tantivy::{COLLECT_BLOCK_BUFFER_LEN, DocId, Executor, TantivyError};

use super::compile::Boxed;
use crate::error::{Error, Result};
use crate::index::Day;
use crate::log::query::Asked;
use crate::query::Test;

/// Documents at a time.
pub(super) const BLOCK: usize = COLLECT_BLOCK_BUFFER_LEN;

/// When a search has to be over.
#[derive(Debug, Clone, Copy)]
pub(super) struct Clock(pub(super) Instant);

impl Clock {
    pub(super) fn check(self) -> Result<()> {
        if Instant::now() < self.0 { Ok(()) } else { Err(Error::SearchTimeout) }
    }
}

/// Times, both ends in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    pub(super) from_ms: i64,
    pub(super) to_ms: i64,
}

impl Window {
    pub(super) const ALL: Self = Self { from_ms: i64::MIN, to_ms: i64::MAX };

    pub(super) fn contains(self, ms: i64) -> bool {
        self.from_ms <= ms && ms <= self.to_ms
    }

    /// Whether it has all times from `min_ms` to `max_ms`.
    pub(super) fn covers(self, min_ms: i64, max_ms: i64) -> bool {
        self.from_ms <= min_ms && max_ms <= self.to_ms
    }

    pub(super) fn meets(self, min_ms: i64, max_ms: i64) -> bool {
        self.from_ms <= max_ms && min_ms <= self.to_ms
    }

    fn and(self, other: Self) -> Self {
        Self { from_ms: self.from_ms.max(other.from_ms), to_ms: self.to_ms.min(other.to_ms) }
    }

    /// As much as a query itself says of the time.
    pub(super) fn narrowed(self, asked: &Asked) -> Self {
        match asked {
            Asked::And(all) => all.iter().fold(self, Self::narrowed),
            Asked::Line(term) if term.field == "ts" => match &term.test {
                Test::Time(bounds) => self.and(Self {
                    from_ms: bounds.low.map_or(i64::MIN, |(low, _)| low),
                    to_ms: bounds.high.map_or(i64::MAX, |(high, _)| high),
                }),
                _ => self,
            },
            _ => self,
        }
    }
}

/// What went wrong in a search.
pub(super) fn refused(error: TantivyError) -> Error {
    match error {
        TantivyError::InvalidArgument(told) => Error::Invalid(told),
        other => other.into(),
    }
}

/// A query made ready for a day.
pub(super) fn weight(query: &Boxed, day: &Day) -> Result<Box<dyn Weight>> {
    query.weight(EnableScoring::disabled_from_searcher(&day.searcher)).map_err(refused)
}

/// What `work` finds in each segment of these days, some segments of a day at a time.
pub(super) fn each_segment<T: Send>(
    threads: &Executor,
    query: &Boxed,
    days: &[Day],
    work: impl Fn(&SegmentReader, &dyn Weight) -> Result<T> + Sync,
) -> Result<Vec<T>> {
    let mut found = Vec::new();
    for day in days {
        let weight = weight(query, day)?;
        let of_day = threads.map(|reader| Ok(work(reader, &*weight)), day.searcher.segment_readers().iter());
        for of_segment in of_day? {
            found.push(of_segment?);
        }
    }
    Ok(found)
}

/// The times of a segment's documents.
pub(super) type Times = Arc<dyn ColumnValues<i64>>;

/// See [`Times`].
pub(super) fn times(reader: &SegmentReader) -> Result<Times> {
    Ok(reader.fast_fields().column_first_or_default("ts")?)
}

/// A column of numbers that every document has.
pub(super) fn numbers(reader: &SegmentReader, name: &str) -> Result<Arc<dyn ColumnValues<u64>>> {
    Ok(reader.fast_fields().column_first_or_default(name)?)
}

/// The documents of a segment that are asked for.
pub(super) struct Matched<'a> {
    scorer: Box<dyn Scorer>,
    reader: &'a SegmentReader,
    times: Times,
    /// Unless all of the segment is in it.
    window: Option<Window>,
    clock: Clock,
    read: [DocId; BLOCK],
    kept: [DocId; BLOCK],
    ms: [i64; BLOCK],
}

impl<'a> Matched<'a> {
    pub(super) fn new(reader: &'a SegmentReader, weight: &dyn Weight, window: Window, clock: Clock) -> Result<Self> {
        clock.check()?;
        let times = times(reader)?;
        let is_whole = window.covers(times.min_value(), times.max_value());
        Ok(Self {
            scorer: weight.scorer(reader, 1.0).map_err(refused)?,
            reader,
            times,
            window: (!is_whole).then_some(window),
            clock,
            read: [0; BLOCK],
            kept: [0; BLOCK],
            ms: [0; BLOCK],
        })
    }

    /// Some more of them, with their times; none at the end.
    pub(super) fn next(&mut self) -> Result<Option<(&[DocId], &[i64])>> {
        loop {
            self.clock.check()?;
            let count = self.scorer.fill_buffer(&mut self.read);
            if count == 0 {
                return Ok(None);
            }
            self.times.get_vals(&self.read[..count], &mut self.ms[..count]);
            let mut kept = 0;
            for place in 0..count {
                let (doc, ms) = (self.read[place], self.ms[place]);
                let is_alive = self.reader.alive_bitset().is_none_or(|alive| alive.is_alive(doc));
                if is_alive && self.window.is_none_or(|window| window.contains(ms)) {
                    self.kept[kept] = doc;
                    self.ms[kept] = ms;
                    kept += 1;
                }
            }
            if kept > 0 {
                return Ok(Some((&self.kept[..kept], &self.ms[..kept])));
            }
        }
    }
}
