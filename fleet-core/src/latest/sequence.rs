//! Which sequence numbers of a run came, and which did not.

/// Holes that are remembered one by one for a device; of more, the newest.
pub const MAX_RANGES: usize = 32;

/// The sequence numbers of a device since its boot. The first one seen is where counting begins.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sequence {
    /// The highest.
    pub(super) last: Option<i64>,
    /// The time of its reading.
    pub(super) last_ts_ms: i64,
    /// How many below it never came.
    pub(super) missing: i64,
    /// The newest of the holes, in order: first and last number.
    pub(super) ranges: Vec<(i64, i64)>,
}

impl Sequence {
    /// A number came. Says whether anything changed: one that came before changes nothing.
    pub(super) fn note(&mut self, seq: i64, ts_ms: i64) -> bool {
        self.note_run(seq, seq, ts_ms)
    }

    /// All numbers from `first` to `last` came.
    pub(super) fn note_run(&mut self, first: i64, last: i64, ts_ms: i64) -> bool {
        let Some(highest) = self.last else {
            (self.last, self.last_ts_ms) = (Some(last), ts_ms);
            return true;
        };
        let mut changed = first <= highest && self.fill(first, last);
        if last > highest {
            if first > highest.saturating_add(1) {
                self.missing = self.missing.saturating_add(first - highest - 1);
                self.ranges.push((highest + 1, first - 1));
                self.bound();
            }
            (self.last, self.last_ts_ms) = (Some(last), ts_ms);
            changed = true;
        }
        changed
    }

    /// Takes the numbers out of the holes they lie in.
    fn fill(&mut self, first: i64, last: i64) -> bool {
        // Most numbers that come twice lie behind every hole.
        if self.ranges.last().is_none_or(|hole| hole.1 < first) {
            return false;
        }
        let mut filled = 0;
        let mut left = Vec::with_capacity(self.ranges.len() + 1);
        for &(from, to) in &self.ranges {
            let (a, b) = (from.max(first), to.min(last));
            if a > b {
                left.push((from, to));
                continue;
            }
            filled += b - a + 1;
            if from < a {
                left.push((from, a - 1));
            }
            if b < to {
                left.push((b + 1, to));
            }
        }
        self.ranges = left;
        self.missing = (self.missing - filled).max(0);
        self.bound();
        filled > 0
    }

    fn bound(&mut self) {
        if self.ranges.len() > MAX_RANGES {
            self.ranges.drain(..self.ranges.len() - MAX_RANGES);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn after(numbers: &[i64]) -> Sequence {
        let mut sequence = Sequence::default();
        for number in numbers {
            sequence.note(*number, *number);
        }
        sequence
    }

    #[test]
    fn a_hole_is_counted_and_a_late_arrival_fills_it() {
        let mut sequence = after(&[7, 8, 12, 13]);
        assert_eq!((sequence.last, sequence.missing, sequence.ranges.clone()), (Some(13), 3, vec![(9, 11)]));
        assert!(sequence.note(10, 10));
        assert_eq!((sequence.missing, sequence.ranges.clone()), (2, vec![(9, 9), (11, 11)]));
        assert!(!sequence.note(10, 10), "what came twice fills nothing");
        sequence.note(9, 9);
        sequence.note(11, 11);
        assert_eq!((sequence.last, sequence.missing, sequence.ranges.len()), (Some(13), 0, 0));
    }

    #[test]
    fn what_came_before_the_first_is_not_missed() {
        let mut sequence = after(&[100]);
        assert!(!sequence.note(3, 3));
        assert_eq!((sequence.last, sequence.missing), (Some(100), 0));
    }

    #[test]
    fn holes_are_bounded_and_still_counted() {
        let mut sequence = after(&(0..200).step_by(2).collect::<Vec<_>>());
        assert_eq!((sequence.missing, sequence.ranges.len()), (99, MAX_RANGES));
        assert_eq!(sequence.ranges.last(), Some(&(197, 197)), "the newest are kept");
        sequence.note(1, 1);
        assert_eq!(sequence.missing, 99, "a hole that was forgotten cannot be filled");
    }

    #[test]
    fn the_ends_of_the_numbers_are_safe() {
        let mut sequence = after(&[0, i64::MAX, 5]);
        assert_eq!(sequence.missing, i64::MAX - 2);
        assert!(!sequence.note(i64::MAX, 0));
        assert!(sequence.note_run(0, i64::MAX, 0));
        assert_eq!(sequence.missing, 0);
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_set(first in 0_i64..50, numbers in prop::collection::vec((0_i64..60, 1_i64..4), 0..60)) {
            let mut sequence = after(&[first]);
            let mut came = BTreeSet::from([first]);
            for (from, count) in numbers {
                sequence.note_run(from, from + count - 1, 0);
                came.extend(from..from + count);
            }
            let last = *came.last().expect("at least the first");
            let missing: Vec<i64> = (first..last).filter(|number| !came.contains(number)).collect();
            prop_assert_eq!(sequence.last, Some(last));
            prop_assert_eq!(usize::try_from(sequence.missing), Ok(missing.len()));
            let listed: Vec<i64> = sequence.ranges.iter().flat_map(|(from, to)| *from..=*to).collect();
            prop_assert_eq!(listed, missing);
        }
    }
}
