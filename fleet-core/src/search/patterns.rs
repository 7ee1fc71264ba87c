//! Patterns: similar lines counted together, and which of them are new.

use std::collections::HashMap;

use super::compile::Boxed;
use super::page::Hit;
use super::pass::{BLOCK, Clock, Matched, Window, numbers, weight};
use crate::error::Result;
use crate::id::DeviceKey;
use crate::index::Day;
use crate::log::Address;

/// Most patterns of an answer.
pub const MAX_PATTERNS: usize = 1000;
/// Patterns that are counted; of more, those that come first.
pub(super) const MAX_COUNTED: usize = 100_000;

/// Lines of one pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Found {
    /// [`crate::log::pattern::Pattern::hash`].
    pub(super) hash: u64,
    pub(super) count: u64,
    pub(super) first_ms: i64,
    pub(super) last_ms: i64,
    /// The newest of them.
    pub(super) newest: Hit,
}

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Patterns {
    /// Those with the most lines, the most first.
    pub(super) found: Vec<Found>,
    /// How many there are.
    pub(super) total: usize,
    /// Whether there were more than are counted.
    pub(super) is_bounded: bool,
}

/// Lines of one pattern in a segment.
#[derive(Clone, Copy)]
struct InSegment {
    count: u64,
    first_ms: i64,
    last_ms: i64,
    newest: u32,
}

/// Counts by pattern; with `since_ms` only those no line of which is older.
pub(super) fn patterns(
    query: &Boxed,
    days: impl Fn(Window) -> Vec<Day>,
    window: Window,
    since_ms: Option<i64>,
    size: usize,
    clock: Clock,
) -> Result<Patterns> {
    let mut all = HashMap::new();
    let mut is_bounded = false;
    for day in days(window) {
        let weight = weight(query, &day)?;
        for reader in day.searcher.segment_readers() {
            let hashes = numbers(reader, "pattern")?;
            let columns = [numbers(reader, "writer")?, numbers(reader, "place")?, numbers(reader, "device")?];
            let mut matched = Matched::new(reader, &*weight, window, clock)?;
            let mut of_segment = HashMap::new();
            let mut of_block = [0; BLOCK];
            while let Some((docs, times)) = matched.next()? {
                let of_block = &mut of_block[..docs.len()];
                hashes.get_vals(docs, of_block);
                for ((hash, ms), doc) in of_block.iter().zip(times).zip(docs) {
                    note(&mut of_segment, *hash, *ms, *doc);
                }
            }
            for (hash, part) in of_segment {
                let [writer, place, device] = columns.each_ref().map(|column| column.get_val(part.newest));
                let writer = i16::from_ne_bytes(u16::try_from(writer).unwrap_or_default().to_ne_bytes());
                let address = Address { ts_ms: part.last_ms, writer, place: place.cast_signed() };
                let newest = Hit { address, device: DeviceKey(device.cast_signed()) };
                is_bounded |= !add(&mut all, hash, part, newest);
            }
        }
    }
    if let Some(since_ms) = since_ms {
        forget_known(&mut all, query, days, since_ms, clock)?;
    }
    let mut found = all.into_values().collect::<Vec<_>>();
    let total = found.len();
    found.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| b.newest.address.cmp(&a.newest.address)));
    found.truncate(size);
    Ok(Patterns { found, total, is_bounded })
}

fn note(of_segment: &mut HashMap<u64, InSegment>, hash: u64, ms: i64, doc: u32) {
    let empty = InSegment { count: 0, first_ms: ms, last_ms: ms, newest: doc };
    let part = of_segment.entry(hash).or_insert(empty);
    part.count += 1;
    part.first_ms = part.first_ms.min(ms);
    if ms >= part.last_ms {
        (part.last_ms, part.newest) = (ms, doc);
    }
}

/// `false` when there is no room for one more.
fn add(all: &mut HashMap<u64, Found>, hash: u64, part: InSegment, newest: Hit) -> bool {
    if all.len() >= MAX_COUNTED && !all.contains_key(&hash) {
        return false;
    }
    let empty = Found { hash, count: 0, first_ms: part.first_ms, last_ms: part.last_ms, newest };
    let found = all.entry(hash).or_insert(empty);
    found.count += part.count;
    found.first_ms = found.first_ms.min(part.first_ms);
    found.last_ms = found.last_ms.max(part.last_ms);
    if newest.address > found.newest.address {
        found.newest = newest;
    }
    true
}

/// Leaves those of which no line within reach is older.
fn forget_known(
    all: &mut HashMap<u64, Found>,
    query: &Boxed,
    days: impl Fn(Window) -> Vec<Day>,
    since_ms: i64,
    clock: Clock,
) -> Result<()> {
    all.retain(|_, found| found.first_ms >= since_ms);
    let before = Window { to_ms: since_ms.saturating_sub(1), ..Window::ALL };
    for day in days(before) {
        let weight = weight(query, &day)?;
        for reader in day.searcher.segment_readers() {
            if all.is_empty() {
                return Ok(());
            }
            let hashes = numbers(reader, "pattern")?;
            let mut matched = Matched::new(reader, &*weight, before, clock)?;
            let mut of_block = [0; BLOCK];
            while let Some((docs, _)) = matched.next()? {
                let of_block = &mut of_block[..docs.len()];
                hashes.get_vals(docs, of_block);
                for hash in of_block {
                    all.remove(hash);
                }
            }
        }
    }
    Ok(())
}
