//! How long acknowledgements take: a histogram of fixed size that many tasks fill at once.
//!
//! Buckets are logarithmic with 32 steps a doubling, so a percentile is at most 3.2 % too high.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const STEPS_BITS: u32 = 5;
const STEPS: u64 = 1 << STEPS_BITS;
/// 2^36 µs, about 19 hours: everything longer lands in the last bucket.
const DOUBLINGS: u64 = 36;
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const BUCKETS: usize = ((DOUBLINGS - STEPS_BITS as u64 + 1) * STEPS) as usize;

/// A histogram of durations, 8 KiB, exact in count and within 3.2 % in value.
#[derive(Debug)]
pub struct Latency {
    buckets: Vec<AtomicU64>,
    max_us: AtomicU64,
}

impl Default for Latency {
    fn default() -> Self {
        Self { buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(), max_us: AtomicU64::new(0) }
    }
}

/// Below [`STEPS`] a bucket a microsecond; above, the top bits of the number name the bucket.
fn bucket(us: u64) -> usize {
    let shift = (u64::BITS - us.leading_zeros()).saturating_sub(STEPS_BITS + 1);
    let index = u64::from(shift) * STEPS + (us >> shift);
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The largest number that [`bucket`] puts there.
fn upper_bound(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    let shift = (bucket / STEPS).saturating_sub(1);
    ((bucket - shift * STEPS + 1) << shift) - 1
}

impl Latency {
    /// Counts one duration.
    pub fn record(&self, taken: Duration) {
        let us = u64::try_from(taken.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(us)].fetch_add(1, Ordering::Relaxed);
        self.max_us.fetch_max(us, Ordering::Relaxed);
    }

    /// How many were counted.
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|b| b.load(Ordering::Relaxed)).sum()
    }

    /// The duration that `share` (0 to 1) of all stayed within; zero when nothing was counted.
    pub fn percentile(&self, share: f64) -> Duration {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "a rank need not be exact beyond 2^52"
        )]
        let rank = (self.count() as f64 * share.clamp(0.0, 1.0)).ceil() as u64;
        let mut seen = 0;
        for (index, count) in self.buckets.iter().enumerate() {
            seen += count.load(Ordering::Relaxed);
            if seen >= rank.max(1) {
                return Duration::from_micros(upper_bound(index)).min(self.max());
            }
        }
        Duration::ZERO
    }

    /// The longest.
    pub fn max(&self) -> Duration {
        Duration::from_micros(self.max_us.load(Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bucket_holds_its_number_within_its_width(us in 0_u64..1 << DOUBLINGS) {
            let index = bucket(us);
            prop_assert!(us <= upper_bound(index));
            prop_assert!(index == 0 || us > upper_bound(index - 1));
            prop_assert!(upper_bound(index) - us <= us / STEPS);
        }

        #[test]
        fn no_number_falls_outside(us in any::<u64>()) {
            prop_assert!(bucket(us) < BUCKETS);
        }
    }

    #[test]
    fn percentiles_are_those_of_the_numbers() {
        let latency = Latency::default();
        assert_eq!(latency.percentile(0.99), Duration::ZERO);
        for ms in 1..=1000 {
            latency.record(Duration::from_millis(ms));
        }
        assert_eq!(latency.count(), 1000);
        assert_eq!(latency.max(), Duration::from_secs(1));
        for (share, expected) in [(0.5, 500.0), (0.99, 990.0)] {
            let found = latency.percentile(share).as_secs_f64() * 1000.0;
            assert!((expected..expected * 1.032).contains(&found), "{share}: {found}");
        }
        assert_eq!(latency.percentile(1.0), Duration::from_secs(1));
    }
}
