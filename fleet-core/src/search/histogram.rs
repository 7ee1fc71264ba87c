//! Histograms: how many lines of each level there are in each stretch of time.

use std::collections::BTreeMap;

use tantivy::Executor;

use super::compile::Boxed;
use super::pass::{Clock, Matched, Window, each_segment, numbers};
use crate::error::{Error, Result};
use crate::index::Day;

/// Most stretches of a histogram.
pub const MAX_BUCKETS: usize = 2000;

const LEVELS: usize = 6;

/// A stretch of time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// When it begins, in ms since the epoch; a multiple of the interval.
    pub start_ms: i64,
    /// Lines in it.
    pub total: u64,
    /// By their level, from `trace` to `fatal`.
    pub by_level: [u64; LEVELS],
}

/// Counts by time and level. Stretches without a line are left out.
pub(super) fn histogram(
    threads: &Executor,
    query: &Boxed,
    days: &[Day],
    window: Window,
    interval_ms: i64,
    clock: Clock,
) -> Result<Vec<Bucket>> {
    if interval_ms < 1 {
        return Err(Error::Invalid("interval: expected at least 1 ms".to_owned()));
    }
    let of_segments = each_segment(threads, query, days, |reader, weight| {
        let mut counts = Counts::default();
        let levels = numbers(reader, "level")?;
        let mut matched = Matched::new(reader, weight, window, clock)?;
        let mut of_block = [0; super::pass::BLOCK];
        let mut current = Current::at(0, interval_ms);
        while let Some((docs, times)) = matched.next()? {
            let of_block = &mut of_block[..docs.len()];
            levels.get_vals(docs, of_block);
            for (level, ms) in of_block.iter().zip(times) {
                if !current.has(*ms) {
                    counts.add(current.bucket, current.by_level)?;
                    current = Current::at(*ms, interval_ms);
                }
                let level = usize::try_from(*level).unwrap_or(LEVELS).clamp(1, LEVELS) - 1;
                current.by_level[level] += 1;
            }
        }
        counts.add(current.bucket, current.by_level)?;
        Ok(counts)
    })?;
    let mut counts = Counts::default();
    for (bucket, by_level) in of_segments.into_iter().flat_map(|of_segment| of_segment.0) {
        counts.add(bucket, by_level)?;
    }
    let bucket = |(bucket, by_level): (i64, [u64; LEVELS])| Bucket {
        start_ms: bucket.saturating_mul(interval_ms),
        total: by_level.iter().sum(),
        by_level,
    };
    Ok(counts.0.into_iter().map(bucket).collect())
}

/// The stretch that lines are counted in: one is mostly followed by another of its own.
struct Current {
    bucket: i64,
    /// Its first and its last ms.
    span: (i64, i64),
    by_level: [u64; LEVELS],
}

impl Current {
    fn at(ms: i64, interval_ms: i64) -> Self {
        let bucket = ms.div_euclid(interval_ms);
        let first = bucket.saturating_mul(interval_ms);
        Self { bucket, span: (first, first.saturating_add(interval_ms - 1)), by_level: [0; LEVELS] }
    }

    /// Whether a time is in it; asked of every line, so without a division.
    fn has(&self, ms: i64) -> bool {
        self.span.0 <= ms && ms <= self.span.1
    }
}

#[derive(Default)]
struct Counts(BTreeMap<i64, [u64; LEVELS]>);

impl Counts {
    fn add(&mut self, bucket: i64, by_level: [u64; LEVELS]) -> Result<()> {
        if by_level == [0; LEVELS] {
            return Ok(());
        }
        let total = self.0.entry(bucket).or_default();
        total.iter_mut().zip(by_level).for_each(|(total, more)| *total += more);
        if self.0.len() > MAX_BUCKETS {
            return Err(Error::TooManyBuckets(MAX_BUCKETS));
        }
        Ok(())
    }
}
