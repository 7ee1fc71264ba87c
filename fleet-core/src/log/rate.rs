//! How many lines a device may log: a bucket for each, which fills steadily.
//!
//! Holds: over any time no more lines of a device pass than its burst and what the rate makes of that time; the memory is bounded:
//! a device that finds no room is let through and counted. A bucket that is full again is forgotten.

use std::collections::HashMap;

use crate::config;

/// How often it is looked for room, at the most.
const SWEEP_EVERY_MS: i64 = 1000;

/// The buckets of those who log.
#[derive(Debug)]
pub struct Rate {
    per_ms: f64,
    burst: f64,
    most: usize,
    buckets: HashMap<i64, Bucket>,
    swept_ms: i64,
    unlimited: u64,
}

#[derive(Debug)]
struct Bucket {
    level: f64,
    at_ms: i64,
}

impl Bucket {
    fn fill(&mut self, per_ms: f64, burst: f64, now_ms: i64) {
        #[expect(clippy::cast_precision_loss, reason = "a bucket is full long before 2^52 ms")]
        let passed = now_ms.saturating_sub(self.at_ms).max(0) as f64;
        self.level = (self.level + passed * per_ms).min(burst);
        self.at_ms = self.at_ms.max(now_ms);
    }
}

impl Rate {
    /// So many lines a second, and so many at once, of each of at most `most` devices. 0 a second: no limit.
    pub fn new(per_s: u32, burst: u32, most: usize) -> Self {
        let (lines_per_ms, burst) = (f64::from(per_s) / 1000.0, f64::from(burst.max(1)));
        Self { per_ms: lines_per_ms, burst, most, buckets: HashMap::new(), swept_ms: i64::MIN, unlimited: 0 }
    }

    /// What the settings allow.
    pub fn of(settings: &config::Ingest) -> Self {
        Self::new(settings.log_lines_per_s, settings.log_lines_burst, settings.max_tracked_devices)
    }

    /// No limit.
    pub fn off() -> Self {
        Self::new(0, 1, 0)
    }

    /// Takes one line of a device; `false` when it may not log another one yet.
    pub(super) fn take(&mut self, device: i64, now_ms: i64) -> bool {
        if self.per_ms <= 0.0 {
            return true;
        }
        if !self.buckets.contains_key(&device) && !self.has_room(now_ms) {
            self.unlimited += 1;
            return true;
        }
        let bucket = self.buckets.entry(device).or_insert(Bucket { level: self.burst, at_ms: now_ms });
        bucket.fill(self.per_ms, self.burst, now_ms);
        let may = bucket.level >= 1.0;
        if may {
            bucket.level -= 1.0;
        }
        may
    }

    fn has_room(&mut self, now_ms: i64) -> bool {
        if self.buckets.len() >= self.most && now_ms.saturating_sub(self.swept_ms) >= SWEEP_EVERY_MS {
            self.swept_ms = now_ms;
            let (per_ms, burst) = (self.per_ms, self.burst);
            self.buckets.retain(|_, bucket| {
                bucket.fill(per_ms, burst, now_ms);
                bucket.level < burst
            });
        }
        self.buckets.len() < self.most
    }

    /// Lines that passed since the last call because their device found no room.
    pub fn take_unlimited(&mut self) -> u64 {
        std::mem::take(&mut self.unlimited)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: i64 = 1_763_692_212_345;

    fn passed(rate: &mut Rate, device: i64, now_ms: i64, lines: usize) -> usize {
        (0..lines).filter(|_| rate.take(device, now_ms)).count()
    }

    #[test]
    fn a_device_has_its_burst_and_then_its_rate() {
        let mut rate = Rate::new(10, 5, 100);
        assert_eq!(passed(&mut rate, 1, NOW, 9), 5);
        assert_eq!(passed(&mut rate, 2, NOW, 9), 5, "another one has its own");
        assert_eq!(passed(&mut rate, 1, NOW + 300, 9), 3);
        assert_eq!(passed(&mut rate, 1, NOW, 9), 0, "time that runs backwards brings nothing");
        assert_eq!(passed(&mut rate, 1, NOW + 3_600_000, 9), 5, "no more than the burst is saved");
        assert_eq!(passed(&mut Rate::off(), 1, NOW, 9), 9);
    }

    #[test]
    fn who_finds_no_room_is_let_through_and_counted() {
        let mut rate = Rate::new(10, 5, 2);
        assert_eq!([1, 2, 3].map(|device| passed(&mut rate, device, NOW, 9)), [5, 5, 9]);
        assert_eq!((rate.take_unlimited(), rate.take_unlimited()), (9, 0));
        assert_eq!(passed(&mut rate, 3, NOW + 2000, 9), 5, "the others are full again and forgotten");
        assert_eq!(rate.buckets.len(), 1);
    }

    proptest! {
        #[test]
        fn never_more_than_burst_and_rate(
            steps in prop::collection::vec((0_i64..500, 0_usize..30), 1..50), per_s in 1_u32..100, burst in 1_u32..50,
        ) {
            let mut rate = Rate::new(per_s, burst, 1);
            let (mut now, mut all) = (NOW, 0);
            for (wait, lines) in steps {
                now += wait;
                all += passed(&mut rate, 1, now, lines);
                let most = f64::from(burst) + f64::from(per_s) * f64::from(u32::try_from(now - NOW).unwrap()) / 1000.0;
                prop_assert!(f64::from(u32::try_from(all).unwrap()) <= most + 0.001);
            }
        }
    }
}
