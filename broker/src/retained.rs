//! Retained messages (MQTT 5 §3.3.1.3): the last of each topic, for whoever subscribes later.
//!
//! All of them are in memory, in the order of their topics; those of clients are in the database too, written by
//! `store.rs` before they are acknowledged. Bounded in count and bytes.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::time::Instant;

use bytestring::ByteString;
use fleet_core::topic;
use parking_lot::RwLock;

use crate::mailbox::Delivery;
use crate::metrics::{Limit, Metrics};
use crate::rows::cost;
use crate::wire::Publish;

/// Topics looked at while the map is locked.
const LOOK_AT_ONCE: usize = 4096;

/// A bound of retained messages is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooManyRetained;

/// The retained messages.
#[derive(Debug)]
pub(crate) struct Retained {
    kept: RwLock<Kept>,
    max_messages: usize,
    max_bytes: usize,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Kept {
    messages: BTreeMap<ByteString, (Publish, Instant)>,
    /// Of clients' messages.
    bytes: usize,
    /// How many are the broker's own.
    own: usize,
}

impl Kept {
    fn of_clients(&self) -> usize {
        self.messages.len() - self.own
    }

    fn put(&mut self, publish: &Publish, accepted: Instant) {
        if let Some((old, _)) = self.messages.remove(&publish.topic) {
            self.bytes -= cost(&old);
        }
        if !publish.payload.is_empty() {
            self.bytes += cost(publish);
            let own = Publish { packet_id: None, dup: false, topic_alias: None, ..publish.detached() };
            self.messages.insert(own.topic.clone(), (own, accepted));
        }
    }
}

/// Where a walk through the messages of one filter stands.
#[derive(Debug)]
pub(crate) struct Walk {
    filter: ByteString,
    /// The last topic looked at.
    after: Option<ByteString>,
}

impl Walk {
    /// Begins a walk.
    pub(crate) fn new(filter: &str) -> Self {
        Self { filter: filter.into(), after: None }
    }
}

impl Retained {
    pub(crate) fn new(max_messages: usize, max_bytes: usize, metrics: Metrics) -> Self {
        Self { kept: RwLock::default(), max_messages, max_bytes, metrics }
    }

    /// Keeps or, with an empty payload, forgets the retained message of a topic.
    ///
    /// # Errors
    /// [`TooManyRetained`] when it would pass `mqtt.max_retained` or `mqtt.max_retained_bytes`.
    pub(crate) fn put(&self, publish: &Publish, accepted: Instant) -> Result<(), TooManyRetained> {
        let mut kept = self.kept.write();
        let old = kept.messages.get(&publish.topic).map(|(old, _)| cost(old));
        if !publish.payload.is_empty() {
            let bytes = kept.bytes - old.unwrap_or_default() + cost(publish);
            if bytes > self.max_bytes || (old.is_none() && kept.of_clients() >= self.max_messages) {
                self.metrics.hit(Limit::Retained);
                return Err(TooManyRetained);
            }
        }
        kept.put(publish, accepted);
        self.note_number(&kept);
        Ok(())
    }

    /// Keeps one of the few messages of the broker's own, which take no room from those of clients.
    pub(crate) fn put_own(&self, publish: &Publish, accepted: Instant) {
        let mut kept = self.kept.write();
        let old = kept.messages.insert(publish.topic.clone(), (publish.clone(), accepted));
        kept.own += usize::from(old.is_none());
    }

    fn note_number(&self, kept: &Kept) {
        self.metrics.retained.set(i64::try_from(kept.of_clients()).unwrap_or(i64::MAX));
    }

    /// The next messages that match, as they were accepted; `None` when the walk has ended. An empty answer is not
    /// its end: only so many topics are looked at in one step.
    pub(crate) fn step(&self, walk: &mut Walk, most: usize) -> Option<Vec<Delivery>> {
        let filter = &*walk.filter;
        let literal = filter.find(['+', '#']).map_or(filter, |wildcard| &filter[..wildcard]);
        // `a/#` also matches `a`, which sorts before the literal prefix `a/`.
        let literal = literal.strip_suffix('/').unwrap_or(literal);
        let from = walk.after.as_deref().map_or(Bound::Included(literal), Bound::Excluded);
        let mut found = Vec::new();
        let mut last = None;
        let kept = self.kept.read();
        let candidates = kept.messages.range::<str, _>((from, Bound::Unbounded));
        for (topic, (publish, accepted)) in
            candidates.take_while(|(topic, _)| topic.starts_with(literal)).take(LOOK_AT_ONCE)
        {
            last = Some(topic.clone());
            if topic::matches(filter, topic) && !has_expired(publish, *accepted) {
                found.push(Delivery::new(publish.clone(), *accepted));
            }
            if found.len() >= most {
                break;
            }
        }
        walk.after = Some(last?);
        Some(found)
    }

    /// Forgets the messages of all topics that begin so.
    pub(crate) fn forget_below(&self, beginning: &str) {
        let mut kept = self.kept.write();
        let from = kept.messages.range::<str, _>((Bound::Included(beginning), Bound::Unbounded));
        let topics: Vec<_> =
            from.map(|(topic, _)| topic.clone()).take_while(|topic| topic.starts_with(beginning)).collect();
        for topic in &topics {
            let bytes = kept.messages.remove(topic).map_or(0, |(publish, _)| cost(&publish));
            kept.bytes -= bytes;
        }
        self.note_number(&kept);
    }

    /// Topics whose message has expired, forgotten here; at most so many.
    pub(crate) fn expire(&self, most: usize) -> Vec<ByteString> {
        let mut kept = self.kept.write();
        let expired = kept.messages.iter().filter(|(_, (publish, accepted))| has_expired(publish, *accepted));
        let topics: Vec<_> = expired.map(|(topic, _)| topic.clone()).take(most).collect();
        for topic in &topics {
            let bytes = kept.messages.remove(topic).map_or(0, |(publish, _)| cost(&publish));
            kept.bytes -= bytes;
        }
        self.note_number(&kept);
        topics
    }
}

fn has_expired(publish: &Publish, accepted: Instant) -> bool {
    publish.message_expiry_s().is_some_and(|expiry_s| accepted.elapsed().as_secs() >= u64::from(expiry_s))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::wire::{PublishProperties, QoS};

    fn retained(max_messages: usize, max_bytes: usize) -> (Retained, Metrics) {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        (Retained::new(max_messages, max_bytes, metrics.clone()), metrics)
    }

    fn message(topic: &str, payload: &'static str) -> Publish {
        Publish::new(topic.into(), Bytes::from_static(payload.as_bytes()), QoS::AtLeastOnce, true)
    }

    fn walk(retained: &Retained, filter: &str, most: usize) -> Vec<String> {
        let mut walk = Walk::new(filter);
        let steps = std::iter::from_fn(|| retained.step(&mut walk, most));
        steps.flatten().map(|delivery| delivery.publish.topic.to_string()).collect()
    }

    #[test]
    fn a_message_is_found_by_every_filter_that_matches_until_it_is_forgotten() {
        let (retained, _) = retained(10, 1 << 20);
        retained.put(&message("a/b", "kept"), Instant::now()).unwrap();
        for (filter, expected) in [("a/b", 1), ("a/#", 1), ("a/b/#", 1), ("+/b", 1), ("#", 1), ("a", 0), ("a/+/c", 0)] {
            assert_eq!(walk(&retained, filter, 10).len(), expected, "{filter}");
        }
        retained.put(&message("a/b", ""), Instant::now()).unwrap();
        assert!(walk(&retained, "#", 10).is_empty());
    }

    #[test]
    fn a_walk_in_small_steps_finds_all_of_them_once() {
        let (retained, _) = retained(10_000, 1 << 30);
        for n in 0..6000 {
            retained.put(&message(&format!("x/{n}/{}", n % 3), "v"), Instant::now()).unwrap();
        }
        let found = walk(&retained, "x/+/1", 7);
        assert_eq!(found.len(), 2000);
        assert!(found.is_sorted());
    }

    #[test]
    fn both_bounds_hold_and_count() {
        let (retained, metrics) = retained(2, 2 * cost(&message("a", "xxxx")));
        retained.put(&message("a", "xxxx"), Instant::now()).unwrap();
        retained.put(&message("a", "yyyy"), Instant::now()).unwrap();
        assert_eq!(retained.put(&message("b", "xxxxx"), Instant::now()), Err(TooManyRetained));
        retained.put(&message("b", "xxxx"), Instant::now()).unwrap();
        assert_eq!(retained.put(&message("c", ""), Instant::now()), Ok(()), "forgetting what is not there");
        assert_eq!(retained.put(&message("c", "x"), Instant::now()), Err(TooManyRetained));
        assert_eq!(metrics.limits.with_label_values(&["retained"]).get(), 2);
    }

    #[test]
    fn what_the_broker_tells_of_itself_takes_no_room() {
        let (retained, metrics) = retained(1, cost(&message("a", "xxxx")));
        for _ in 0..2 {
            retained.put_own(&message("$SYS/x", "1"), Instant::now());
            retained.put_own(&message("$SYS/y", "1"), Instant::now());
        }
        retained.put(&message("a", "xxxx"), Instant::now()).unwrap();
        assert_eq!(retained.put(&message("b", "x"), Instant::now()), Err(TooManyRetained));
        assert_eq!(metrics.retained.get(), 1);
        assert_eq!((walk(&retained, "$SYS/#", 10).len(), walk(&retained, "#", 10)), (2, vec!["a".to_owned()]));
    }

    #[test]
    fn an_expired_message_is_neither_found_nor_kept() {
        let (retained, metrics) = retained(10, 1 << 20);
        let properties = PublishProperties { message_expiry_s: Some(5), ..PublishProperties::default() };
        let expiring = Publish { properties: Some(Arc::new(properties)), ..message("a", "x") };
        let past = Instant::now().checked_sub(Duration::from_secs(6)).unwrap();
        retained.put(&expiring, past).unwrap();
        retained.put(&Publish { topic: "b".into(), ..expiring.clone() }, Instant::now()).unwrap();
        assert_eq!(walk(&retained, "#", 10), ["b"]);
        assert_eq!(retained.expire(10), ["a"]);
        assert_eq!(metrics.retained.get(), 1);
    }

    #[test]
    fn a_device_that_has_left_is_forgotten_and_its_namesakes_are_not() {
        let (retained, metrics) = retained(10, 1 << 20);
        let stays =
            ["fleet/v1/main/a", "fleet/v1/main/a-1/status", "fleet/v1/main/aa/status", "fleet/v1/other/a/status"];
        let goes = ["fleet/v1/main/a/shadow/get", "fleet/v1/main/a/status"];
        for topic in stays.iter().chain(&goes) {
            retained.put(&message(topic, "x"), Instant::now()).unwrap();
        }
        retained.forget_below("fleet/v1/main/a/");
        assert_eq!(walk(&retained, "#", 10), stays);
        assert_eq!(metrics.retained.get(), 4);
        retained.forget_below("fleet/v1/main/a/");
        let bytes = stays.map(|topic| cost(&message(topic, "x"))).into_iter().sum::<usize>();
        assert_eq!(retained.kept.read().bytes, bytes);
    }
}
