//! What waits for the reader of a tail: a bounded queue in which a gap stands where lines were left out.

use std::collections::VecDeque;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::positions::Positions;
use super::{Line, Permit};
use crate::clock::from_ms;

/// What a tail gives.
#[derive(Debug, Clone)]
pub enum Entry {
    /// A line that was asked for.
    Line {
        /// It.
        line: Arc<Line>,
        /// Where to go on after it.
        at: Positions,
    },
    /// Lines that were asked for and are not given.
    Gap(Gap),
    /// There was nothing for a while, but so far everything was looked at.
    Idle(Positions),
    /// The tail has ended, and why.
    End(String),
}

/// Lines that are not given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gap {
    /// How many, when that is known.
    pub missed: Option<u64>,
    /// The times of the first and the last, in the order in which they came, when they are known.
    pub between: Option<(DateTime<Utc>, DateTime<Utc>)>,
    /// Where to go on after them.
    pub at: Positions,
}

/// What may wait.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    pub(super) lines: usize,
    pub(super) bytes: usize,
}

/// The queue between what a tail finds and who reads it.
pub(super) struct Outbox {
    bounds: Bounds,
    queue: Mutex<Queue>,
    filled: Notify,
    taken: Notify,
    left: Notify,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Up to where everything was looked at.
    at: Positions,
    /// Whether nothing comes any more.
    is_ended: bool,
    /// Whether nobody reads any more.
    is_left: bool,
}

/// What has become of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Given {
    /// It waits.
    Line,
    /// It is among those that are missed.
    Missed,
    /// It is the first of a gap.
    FirstMissed,
}

impl Queue {
    /// One line is taken however long it is.
    fn has_room(&self, bounds: Bounds, bytes: usize) -> bool {
        self.entries.is_empty() || self.entries.len() < bounds.lines && self.bytes + bytes <= bounds.bytes
    }

    fn line(&mut self, bounds: Bounds, line: &Arc<Line>, at: &Positions) -> Given {
        let (bytes, now) = (size(line), from_ms(line.address.ts_ms));
        if self.has_room(bounds, bytes) {
            self.bytes += bytes;
            self.entries.push_back(Entry::Line { line: line.clone(), at: at.clone() });
            return Given::Line;
        }
        if let Some(Entry::Gap(gap)) = self.entries.back_mut() {
            gap.missed = gap.missed.map(|missed| missed + 1);
            gap.between = gap.between.map(|(first, _)| (first, now));
            gap.at = at.clone();
            return Given::Missed;
        }
        self.entries.push_back(Entry::Gap(Gap { missed: Some(1), between: Some((now, now)), at: at.clone() }));
        Given::FirstMissed
    }
}

/// Reads a tail; the tail ends with it.
pub struct Reader {
    outbox: Arc<Outbox>,
    _permit: Permit,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").finish_non_exhaustive()
    }
}

impl Outbox {
    pub(super) fn new(bounds: Bounds, permit: Permit) -> (Arc<Self>, Reader) {
        let (filled, taken, left) = (Notify::new(), Notify::new(), Notify::new());
        let outbox = Arc::new(Self { bounds, queue: Mutex::default(), filled, taken, left });
        (outbox.clone(), Reader { outbox, _permit: permit })
    }

    /// Adds a line, or to the gap when there is no room.
    pub(super) fn line(&self, line: &Arc<Line>, at: &Positions) -> Given {
        let given = self.queue.lock().line(self.bounds, line, at);
        self.filled.notify_one();
        given
    }

    /// Adds a gap of lines that were not looked at.
    pub(super) fn gap(&self, at: &Positions) {
        let gap = Gap { missed: None, between: None, at: at.clone() };
        self.queue.lock().entries.push_back(Entry::Gap(gap));
        self.filled.notify_one();
    }

    /// Notes up to where everything was looked at.
    pub(super) fn seen(&self, at: &Positions) {
        let mut queue = self.queue.lock();
        // What was left out last was not wanted up to here, either.
        if let Some(Entry::Gap(gap)) = queue.entries.back_mut() {
            gap.at = at.clone();
        }
        queue.at = at.clone();
    }

    /// Says that nothing comes any more, and why.
    pub(super) fn end(&self, why: String) {
        let mut queue = self.queue.lock();
        if !queue.is_ended {
            queue.is_ended = true;
            queue.entries.push_back(Entry::End(why));
        }
        drop(queue);
        self.filled.notify_one();
    }

    /// Whether a line would wait.
    pub(super) fn has_room(&self, line: &Line) -> bool {
        self.queue.lock().has_room(self.bounds, size(line))
    }

    /// Until something was taken.
    pub(super) async fn taken(&self) {
        self.taken.notified().await;
    }

    /// Until nobody reads any more.
    pub(super) async fn left(&self) {
        while !self.queue.lock().is_left {
            self.left.notified().await;
        }
    }
}

impl Reader {
    /// What comes next, in the end nothing. When it is dropped before it has answered, nothing is lost.
    pub async fn next(&mut self) -> Option<Entry> {
        loop {
            {
                let mut queue = self.outbox.queue.lock();
                if let Some(entry) = queue.entries.pop_front() {
                    if let Entry::Line { line, .. } = &entry {
                        queue.bytes -= size(line);
                    }
                    self.outbox.taken.notify_one();
                    return Some(entry);
                }
                if queue.is_ended {
                    return None;
                }
            }
            self.outbox.filled.notified().await;
        }
    }

    /// Up to where everything was looked at that does not wait here.
    pub fn idle(&self) -> Option<Entry> {
        let queue = self.outbox.queue.lock();
        queue.entries.is_empty().then(|| Entry::Idle(queue.at.clone()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.outbox.queue.lock().is_left = true;
        self.outbox.left.notify_one();
    }
}

/// About what a line takes.
fn size(line: &Line) -> usize {
    let fields =
        line.fields.iter().map(|(name, value)| name.len() + value.as_str().map_or(16, str::len)).sum::<usize>();
    128 + line.message.len() + fields
}
