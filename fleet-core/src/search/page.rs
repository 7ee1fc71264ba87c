//! Pages: lines in the order of time, the newest or the oldest first.
//!
//! Holds: the order is total ([`Address`]), so a cursor never skips a line and never shows one twice. Why zones: the newest twenty lines
//! with a common word are found in the few documents at the end, not among all that have it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use tantivy::DocSet as _;
use tantivy::index::SegmentReader;
use tantivy::query::Weight;

use super::compile::Boxed;
use super::pass::{Clock, Window, numbers, refused, times, weight};
use super::zone::{DOCUMENTS, ZoneCache, Zones};
use crate::error::{Error, Result};
use crate::id::DeviceKey;
use crate::index::Day;
use crate::log::Address;

/// Zones that are looked through at first, and how many times more each time after that.
const FIRST_ZONES: usize = 4;
const GROWTH: usize = 4;

/// Which lines come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// The newest.
    #[default]
    Newest,
    /// The oldest.
    Oldest,
}

/// A line that was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Hit {
    /// Where it is.
    pub address: Address,
    /// Whose.
    pub device: DeviceKey,
}

/// Where a page ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cursor(pub Address);

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Address { ts_ms, writer, place } = self.0;
        write!(f, "{ts_ms}.{writer}.{place}")
    }
}

impl FromStr for Cursor {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let read = || {
            let (ts_ms, rest) = text.split_once('.')?;
            let (writer, place) = rest.split_once('.')?;
            Some(Address { ts_ms: ts_ms.parse().ok()?, writer: writer.parse().ok()?, place: place.parse().ok()? })
        };
        let address = read().ok_or_else(|| Error::Invalid("cursor: expected one that came with a page".to_owned()))?;
        Ok(Self(address))
    }
}

/// Lines in their order.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Page {
    /// The lines.
    pub hits: Vec<Hit>,
    /// Where to go on, unless this was all.
    pub next: Option<Cursor>,
}

/// A place in the order of a page: what comes first is greatest.
type Rank = (i64, i16, i64);

impl Order {
    fn rank(self, Address { ts_ms, writer, place }: Address) -> Rank {
        match self {
            Self::Newest => (ts_ms, writer, place),
            Self::Oldest => (!ts_ms, !writer, !place),
        }
    }

    fn address(self, (ts_ms, writer, place): Rank) -> Address {
        match self {
            Self::Newest => Address { ts_ms, writer, place },
            Self::Oldest => Address { ts_ms: !ts_ms, writer: !writer, place: !place },
        }
    }

    /// Of some times, the one that comes first.
    fn first(self, (min_ms, max_ms): (i64, i64)) -> i64 {
        match self {
            Self::Newest => max_ms,
            Self::Oldest => !min_ms,
        }
    }

    fn time(self, ms: i64) -> i64 {
        match self {
            Self::Newest => ms,
            Self::Oldest => !ms,
        }
    }
}

/// What is looked for, and the first of it so far.
pub(super) struct Search<'a> {
    pub(super) query: &'a Boxed,
    pub(super) window: Window,
    pub(super) order: Order,
    pub(super) after: Option<Cursor>,
    pub(super) limit: usize,
    pub(super) clock: Clock,
    pub(super) zones: &'a ZoneCache,
}

impl Search<'_> {
    /// Looks through `days`.
    pub(super) fn run(&self, mut days: Vec<Day>) -> Result<Page> {
        let order = self.order;
        days.sort_by_key(|day| Reverse(order.first((day.min_ms, day.max_ms))));
        let mut best = Best { order, heap: BinaryHeap::new(), most: self.limit + 1 };
        for day in days {
            if best.is_beyond(order.first((day.min_ms, day.max_ms))) {
                continue;
            }
            let weight = weight(self.query, &day)?;
            // What comes first fills the page, so that most segments need not be looked through.
            let mut segments = Vec::new();
            for reader in day.searcher.segment_readers() {
                let zones = self.zones.of(reader)?;
                segments.push((zones.iter().map(|zone| order.first(*zone)).max(), reader, zones));
            }
            segments.sort_by_key(|(first, ..)| Reverse(*first));
            for (_, reader, zones) in segments {
                self.segment(reader, &zones, &*weight, &mut best)?;
            }
        }
        Ok(best.page(self.limit))
    }

    fn segment(&self, reader: &SegmentReader, zones: &Zones, weight: &dyn Weight, best: &mut Best) -> Result<()> {
        for range in self.ranges(zones) {
            let rest = &zones[range.rest];
            let first = rest.iter().map(|zone| self.order.first(*zone)).max();
            if first.is_none_or(|first| best.is_beyond(first)) {
                break;
            }
            self.range(reader, weight, range.zones, best)?;
        }
        Ok(())
    }

    /// The zones in the order they are looked through. Lines come about in the order of time, so the newest are at the end.
    fn ranges(&self, zones: &Zones) -> Vec<Step> {
        let can_have = |zone: &&(i64, i64)| self.window.meets(zone.0, zone.1) && !self.is_passed(**zone);
        let Some(start) = zones.iter().position(|zone| can_have(&zone)) else { return Vec::new() };
        let end = zones.iter().rposition(|zone| can_have(&zone)).map_or(start, |last| last + 1);
        let (mut start, mut end) = (start, end);
        let (mut steps, mut size) = (Vec::new(), FIRST_ZONES);
        while start < end {
            let step = size.min(end - start);
            let zones = match self.order {
                Order::Newest => end - step..end,
                Order::Oldest => start..start + step,
            };
            steps.push(Step { zones: zones.clone(), rest: start..end });
            match self.order {
                Order::Newest => end = zones.start,
                Order::Oldest => start = zones.end,
            }
            size *= GROWTH;
        }
        steps
    }

    /// Whether all of a zone comes before the page.
    fn is_passed(&self, (min_ms, max_ms): (i64, i64)) -> bool {
        self.after.is_some_and(|Cursor(after)| match self.order {
            Order::Newest => min_ms > after.ts_ms,
            Order::Oldest => max_ms < after.ts_ms,
        })
    }

    fn range(&self, reader: &SegmentReader, weight: &dyn Weight, zones: Range<usize>, best: &mut Best) -> Result<()> {
        self.clock.check()?;
        let times = times(reader)?;
        let columns = [numbers(reader, "writer")?, numbers(reader, "place")?, numbers(reader, "device")?];
        let document = |zone: usize| u32::try_from(zone).unwrap_or(u32::MAX).saturating_mul(DOCUMENTS);
        let (start, end) = (document(zones.start), document(zones.end));
        let after = self.after.map(|Cursor(after)| self.order.rank(after));
        let mut scorer = weight.scorer(reader, 1.0).map_err(refused)?;
        let mut doc = if scorer.doc() < start { scorer.seek(start) } else { scorer.doc() };
        let mut seen = 0_u32;
        while doc < end && doc < reader.max_doc() {
            seen = seen.wrapping_add(1);
            if seen.is_multiple_of(DOCUMENTS) {
                self.clock.check()?;
            }
            let ms = times.get_val(doc);
            let is_alive = || reader.alive_bitset().is_none_or(|alive| alive.is_alive(doc));
            if self.window.contains(ms) && !best.is_beyond(self.order.time(ms)) && is_alive() {
                let [writer, place, device] = columns.each_ref().map(|column| column.get_val(doc));
                let writer = i16::from_ne_bytes(u16::try_from(writer).unwrap_or_default().to_ne_bytes());
                let address = Address { ts_ms: ms, writer, place: place.cast_signed() };
                let rank = self.order.rank(address);
                if after.is_none_or(|after| rank < after) {
                    best.push(rank, DeviceKey(device.cast_signed()));
                }
            }
            doc = scorer.advance();
        }
        Ok(())
    }
}

/// Zones to be looked through, and all that are left with them.
struct Step {
    zones: Range<usize>,
    rest: Range<usize>,
}

/// The first lines so far.
struct Best {
    order: Order,
    /// What comes last is on top.
    heap: BinaryHeap<Reverse<(Rank, i64)>>,
    most: usize,
}

impl Best {
    /// Whether nothing of that time can come in any more.
    fn is_beyond(&self, time: i64) -> bool {
        let is_full = self.heap.len() >= self.most;
        is_full && self.heap.peek().is_some_and(|Reverse((last, _))| time < last.0)
    }

    fn push(&mut self, rank: Rank, device: DeviceKey) {
        self.heap.push(Reverse((rank, device.0)));
        if self.heap.len() > self.most {
            self.heap.pop();
        }
    }

    fn page(self, limit: usize) -> Page {
        let order = self.order;
        let found = self.heap.into_sorted_vec();
        let is_more = found.len() > limit;
        let hit = |Reverse((rank, device))| Hit { address: order.address(rank), device: DeviceKey(device) };
        let hits = found.into_iter().take(limit).map(hit).collect::<Vec<_>>();
        let next = hits.last().filter(|_| is_more).map(|hit| Cursor(hit.address));
        Page { hits, next }
    }
}
