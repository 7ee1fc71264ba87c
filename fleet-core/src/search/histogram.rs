//! Histograms: how many lines of each level there are in each stretch of time.

use std::collections::BTreeMap;

use super::compile::Boxed;
use super::pass::{Clock, Matched, Window, numbers, weight};
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

type Counts = BTreeMap<i64, [u64; LEVELS]>;

/// Counts by time and level. Stretches without a line are left out.
pub(super) fn histogram(
    query: &Boxed,
    days: &[Day],
    window: Window,
    interval_ms: i64,
    clock: Clock,
) -> Result<Vec<Bucket>> {
    if interval_ms < 1 {
        return Err(Error::Invalid("interval: expected at least 1 ms".to_owned()));
    }
    let mut counts = Counts::new();
    for day in days {
        let weight = weight(query, day)?;
        for reader in day.searcher.segment_readers() {
            let levels = numbers(reader, "level")?;
            let mut matched = Matched::new(reader, &*weight, window, clock)?;
            let mut of_block = [0; super::pass::BLOCK];
            let mut current = Current { bucket: 0, by_level: [0; LEVELS] };
            while let Some((docs, times)) = matched.next()? {
                let of_block = &mut of_block[..docs.len()];
                levels.get_vals(docs, of_block);
                for (level, ms) in of_block.iter().zip(times) {
                    let bucket = ms.div_euclid(interval_ms);
                    if bucket != current.bucket {
                        current.end(&mut counts)?;
                        current.bucket = bucket;
                    }
                    let level = usize::try_from(*level).unwrap_or(LEVELS).clamp(1, LEVELS) - 1;
                    current.by_level[level] += 1;
                }
            }
            current.end(&mut counts)?;
        }
    }
    let bucket = |(bucket, by_level): (i64, [u64; LEVELS])| Bucket {
        start_ms: bucket.saturating_mul(interval_ms),
        total: by_level.iter().sum(),
        by_level,
    };
    Ok(counts.into_iter().map(bucket).collect())
}

/// The stretch that lines are counted in: one is mostly followed by another of its own.
struct Current {
    bucket: i64,
    by_level: [u64; LEVELS],
}

impl Current {
    fn end(&mut self, counts: &mut Counts) -> Result<()> {
        let by_level = std::mem::take(&mut self.by_level);
        if by_level == [0; LEVELS] {
            return Ok(());
        }
        let total = counts.entry(self.bucket).or_default();
        total.iter_mut().zip(by_level).for_each(|(total, more)| *total += more);
        if counts.len() > MAX_BUCKETS {
            let told =
                format!("interval: expected a longer one, or less time: there are more than {MAX_BUCKETS} stretches");
            return Err(Error::Invalid(told));
        }
        Ok(())
    }
}
