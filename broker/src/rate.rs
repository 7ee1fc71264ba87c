//! A rate: a bucket that fills steadily.
//!
//! Holds: over any time no more passes than the burst and what the rate makes of that time, but for the one thing that
//! overdraws the bucket. The clock is the caller's, and is read once for many things that pass.

use std::time::Duration;

use tokio::time::Instant;

/// Longest wait, however slow the rate.
const LONGEST: Duration = Duration::from_hours(24);

/// One of what a bucket holds, in billionths of it: what a rate of one a second brings in a nanosecond is one of these.
const ONE: i128 = 1_000_000_000;

/// Fills at a rate, up to a burst.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    per_s: u64,
    burst: i128,
    level: i128,
    filled_at: Instant,
}

impl Bucket {
    /// A full one; neither the rate nor the burst may be 0.
    pub(crate) fn new(per_s: u64, burst: u64, now: Instant) -> Self {
        let burst = i128::from(burst) * ONE;
        Self { per_s, burst, level: burst, filled_at: now }
    }

    /// Adds what the time has brought.
    pub(crate) fn fill(&mut self, now: Instant) {
        let passed_ns = u64::try_from(now.saturating_duration_since(self.filled_at).as_nanos()).unwrap_or(u64::MAX);
        self.level = (self.level + i128::from(passed_ns) * i128::from(self.per_s)).min(self.burst);
        self.filled_at = self.filled_at.max(now);
    }

    /// Takes one when there is one.
    pub(crate) fn take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let has = self.level >= ONE;
        if has {
            self.level -= ONE;
        }
        has
    }

    /// Takes it, there or not; `false` when the bucket is overdrawn.
    pub(crate) fn draw(&mut self, amount: usize) -> bool {
        self.level -= i128::try_from(amount).unwrap_or(i128::MAX / ONE) * ONE;
        self.level >= 0
    }

    /// When nothing is owed any more, if nothing else is drawn.
    pub(crate) fn paid_at(&self) -> Instant {
        let owed_ns = (-self.level).max(0).unsigned_abs().div_ceil(self.per_s.into());
        let owed = u64::try_from(owed_ns).map_or(LONGEST, Duration::from_nanos);
        self.filled_at + owed.min(LONGEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_bucket_gives_its_burst_and_then_its_rate() {
        let start = Instant::now();
        let mut bucket = Bucket::new(100, 5, start);
        let given = |bucket: &mut Bucket, now| std::iter::repeat_with(|| bucket.take(now)).take_while(|is| *is).count();
        assert_eq!(given(&mut bucket, start), 5);
        assert_eq!(given(&mut bucket, start + 9 * MS), 0);
        assert_eq!(given(&mut bucket, start + 20 * MS), 2);
        assert_eq!(given(&mut bucket, start), 0, "time that runs backwards brings nothing");
        assert_eq!(given(&mut bucket, start + 20_000 * MS), 5, "no more than the burst is saved");
        let over_a_second: usize = (20_000..21_000).map(|ms| given(&mut bucket, start + ms * MS)).sum();
        assert!((99..=100).contains(&over_a_second), "{over_a_second}");
    }
}
