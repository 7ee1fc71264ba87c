//! Who receives what: the subscription tree, and the retained messages.
//!
//! Holds: the cost of a publish follows the levels of its topic and the subscribers that match, never the number of
//! filters or devices. A client with overlapping subscriptions receives a message once, at the highest QoS it asked
//! for and with every subscription id that matched (MQTT 5 §3.3.4).
//! Ignorant of: who may subscribe; `access.rs` has decided.
//! Retained messages live in memory: they do not outlive the process yet.

use std::collections::{BTreeMap, HashMap};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Instant;

use bytestring::ByteString;
use fleet_core::topic;
use parking_lot::RwLock;

use crate::metrics::{Limit, Metrics};
use crate::session::{Delivery, Mailbox};
use crate::wire::{Publish, QoS};

/// One subscription of one connection.
#[derive(Debug, Clone)]
pub(crate) struct Subscriber {
    /// The connection; a client has one.
    pub(crate) connection: u64,
    pub(crate) mailbox: Arc<Mailbox>,
    /// The most it asked for.
    pub(crate) qos: QoS,
    /// Not its own messages (MQTT 5 §3.8.3.1).
    pub(crate) no_local: bool,
    /// Keep the RETAIN flag of live messages (MQTT 5 §3.8.3.1).
    pub(crate) retain_as_published: bool,
    pub(crate) subscription_id: Option<u32>,
}

/// The subscription tree and the retained messages; cloning shares them.
#[derive(Clone)]
pub(crate) struct Router {
    shared: Arc<Shared>,
}

struct Shared {
    tree: RwLock<Node>,
    retained: RwLock<BTreeMap<ByteString, Delivery>>,
    max_retained: usize,
    metrics: Metrics,
}

/// One level of the tree. Most nodes have one child or none, so nothing is allocated before it is needed.
#[derive(Debug, Default)]
struct Node {
    children: HashMap<Box<str>, Box<Node>>,
    /// Below `+`.
    any: Option<Box<Node>>,
    /// Filters that end here.
    here: Vec<Subscriber>,
    /// Filters that end with `#` here.
    below: Vec<Subscriber>,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty() && self.any.is_none() && self.here.is_empty() && self.below.is_empty()
    }

    /// The subscribers of a filter, made if there are none.
    fn at(&mut self, filter: &str) -> &mut Vec<Subscriber> {
        let mut node = self;
        for level in filter.split('/') {
            match level {
                "#" => return &mut node.below,
                "+" => node = node.any.get_or_insert_default(),
                name => node = node.children.entry(name.into()).or_default(),
            }
        }
        &mut node.here
    }

    /// Removes a connection's subscription and the nodes it leaves empty; `true` when there was one.
    fn remove(&mut self, filter: &str, connection: u64) -> bool {
        let (level, rest) = filter.split_once('/').map_or((filter, None), |(level, rest)| (level, Some(rest)));
        if level == "#" {
            return remove_from(&mut self.below, connection);
        }
        let Some(child) = (if level == "+" {
            self.any.as_deref_mut()
        } else {
            self.children.get_mut(level).map(|child| &mut **child)
        }) else {
            return false;
        };
        let removed = match rest {
            Some(rest) => child.remove(rest, connection),
            None => remove_from(&mut child.here, connection),
        };
        if child.is_empty() {
            if level == "+" {
                self.any = None;
            } else {
                self.children.remove(level);
            }
        }
        removed
    }

    /// Visits every subscriber whose filter matches the levels. `first`: wildcards do not match a first level that
    /// begins with `$` (MQTT 5 §4.7.2).
    fn visit<'a>(&'a self, topic: Option<&str>, first: bool, found: &mut impl FnMut(&'a Subscriber)) {
        let wildcards = !(first && topic.is_some_and(|topic| topic.starts_with('$')));
        if wildcards {
            self.below.iter().for_each(&mut *found);
        }
        let Some(topic) = topic else {
            self.here.iter().for_each(found);
            return;
        };
        let (level, rest) = topic.split_once('/').map_or((topic, None), |(level, rest)| (level, Some(rest)));
        if let Some(child) = self.children.get(level) {
            child.visit(rest, false, found);
        }
        if let Some(child) = self.any.as_deref().filter(|_| wildcards) {
            child.visit(rest, false, found);
        }
    }
}

fn remove_from(subscribers: &mut Vec<Subscriber>, connection: u64) -> bool {
    let before = subscribers.len();
    subscribers.retain(|subscriber| subscriber.connection != connection);
    subscribers.len() < before
}

/// What a publish came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Routed {
    /// Left for at least one subscriber.
    Delivered,
    /// Nobody subscribes.
    NoSubscriber,
}

/// The bound of retained messages is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooManyRetained;

impl Router {
    pub(crate) fn new(max_retained: usize, metrics: Metrics) -> Self {
        let shared = Shared { tree: RwLock::default(), retained: RwLock::default(), max_retained, metrics };
        Self { shared: Arc::new(shared) }
    }

    /// Adds a subscription or replaces the one with the same filter; `true` when it is new.
    pub(crate) fn subscribe(&self, filter: &str, subscriber: Subscriber) -> bool {
        let mut tree = self.shared.tree.write();
        let held = tree.at(filter);
        let is_new = !remove_from(held, subscriber.connection);
        held.push(subscriber);
        drop(tree);
        if is_new {
            self.shared.metrics.subscriptions.inc();
        }
        is_new
    }

    /// Ends a subscription; `true` when there was one.
    pub(crate) fn unsubscribe(&self, filter: &str, connection: u64) -> bool {
        let removed = self.shared.tree.write().remove(filter, connection);
        if removed {
            self.shared.metrics.subscriptions.dec();
        }
        removed
    }

    /// Leaves a message with everybody whose subscription matches; `from` is the connection it came by.
    pub(crate) fn publish(&self, publish: &Publish, from: Option<u64>) -> Routed {
        let tree = self.shared.tree.read();
        let mut matching: Vec<&Subscriber> = Vec::new();
        tree.visit(Some(&publish.topic), true, &mut |subscriber: &Subscriber| {
            if !(subscriber.no_local && Some(subscriber.connection) == from) {
                matching.push(subscriber);
            }
        });
        if matching.is_empty() {
            return Routed::NoSubscriber;
        }
        matching.sort_by_key(|subscriber| subscriber.connection);
        let accepted = Instant::now();
        for same in matching.chunk_by(|a, b| a.connection == b.connection) {
            same[0].mailbox.deliver(Delivery { publish: for_subscriber(publish, same), accepted });
        }
        Routed::Delivered
    }

    /// Keeps or, with an empty payload, forgets the retained message of a topic (MQTT 5 §3.3.1.3).
    ///
    /// # Errors
    /// [`TooManyRetained`] when a new topic would pass `mqtt.max_retained`.
    pub(crate) fn retain(&self, publish: &Publish) -> Result<(), TooManyRetained> {
        let mut retained = self.shared.retained.write();
        if publish.payload.is_empty() {
            retained.remove(&publish.topic);
        } else if retained.len() >= self.shared.max_retained && !retained.contains_key(&publish.topic) {
            self.shared.metrics.hit(Limit::Retained);
            return Err(TooManyRetained);
        } else {
            let publish = Publish { packet_id: None, dup: false, ..publish.clone() };
            retained.insert(publish.topic.clone(), Delivery { publish, accepted: Instant::now() });
        }
        self.shared.metrics.retained.set(i64::try_from(retained.len()).unwrap_or(i64::MAX));
        Ok(())
    }

    /// Leaves the retained messages that match a new subscription with its subscriber.
    pub(crate) fn deliver_retained(&self, filter: &str, subscriber: &Subscriber) {
        let retained = self.shared.retained.read();
        let literal = filter.find(['+', '#']).map_or(filter, |wildcard| &filter[..wildcard]);
        // `a/#` also matches `a`, which sorts before the literal prefix `a/`.
        let literal = literal.strip_suffix('/').unwrap_or(literal);
        let from = (Bound::Included(literal), Bound::Unbounded);
        let matching = retained
            .range::<str, _>(from)
            .take_while(|(topic, _)| topic.starts_with(literal))
            .filter(|(topic, _)| topic::matches(filter, topic));
        for (_, kept) in matching {
            let mut publish = for_subscriber(&kept.publish, &[subscriber]);
            publish.retain = true;
            subscriber.mailbox.deliver(Delivery { publish, accepted: kept.accepted });
        }
    }
}

/// The message as one client receives it: the QoS is the lower of what was sent and the highest it asked for.
fn for_subscriber(publish: &Publish, subscriptions: &[&Subscriber]) -> Publish {
    let asked = subscriptions.iter().map(|subscriber| subscriber.qos).max().unwrap_or(QoS::AtMostOnce);
    Publish {
        qos: publish.qos.min(asked),
        packet_id: None,
        dup: false,
        retain: publish.retain && subscriptions.iter().any(|subscriber| subscriber.retain_as_published),
        topic_alias: None,
        subscription_ids: subscriptions.iter().filter_map(|subscriber| subscriber.subscription_id).collect(),
        ..publish.clone()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;

    fn router(max_retained: usize) -> (Router, Metrics) {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        (Router::new(max_retained, metrics.clone()), metrics)
    }

    fn subscriber(connection: u64, metrics: &Metrics) -> Subscriber {
        Subscriber {
            connection,
            mailbox: Mailbox::new(1000, 1 << 20, metrics.clone()),
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            subscription_id: None,
        }
    }

    fn message(topic: &str, payload: &'static str) -> Publish {
        Publish::new(topic.into(), Bytes::from_static(payload.as_bytes()), QoS::AtLeastOnce, false)
    }

    fn received(subscriber: &Subscriber) -> Vec<Publish> {
        std::iter::from_fn(|| subscriber.mailbox.take_delivery()).map(|delivery| delivery.publish).collect()
    }

    #[test]
    fn overlapping_subscriptions_receive_once_at_the_highest_qos_with_every_id() {
        let (router, metrics) = router(10);
        let all = Subscriber { qos: QoS::AtMostOnce, subscription_id: Some(1), ..subscriber(1, &metrics) };
        let one = Subscriber { subscription_id: Some(2), ..all.clone() };
        router.subscribe("a/#", all.clone());
        router.subscribe("a/+", Subscriber { qos: QoS::AtLeastOnce, ..one });
        assert_eq!(router.publish(&message("a/b", "x"), None), Routed::Delivered);
        let [publish] = &received(&all)[..] else { panic!("expected one message") };
        assert_eq!(publish.qos, QoS::AtLeastOnce);
        let mut ids = publish.subscription_ids.clone();
        ids.sort_unstable();
        assert_eq!(ids, [1, 2]);
    }

    #[test]
    fn no_local_spares_the_sender_only() {
        let (router, metrics) = router(10);
        let own = Subscriber { no_local: true, ..subscriber(1, &metrics) };
        let other = Subscriber { no_local: true, ..subscriber(2, &metrics) };
        router.subscribe("a", own.clone());
        router.subscribe("a", other.clone());
        router.publish(&message("a", "x"), Some(1));
        assert_eq!((received(&own).len(), received(&other).len()), (0, 1));
    }

    #[test]
    fn an_unsubscribed_filter_leaves_nothing_behind() {
        let (router, metrics) = router(10);
        for filter in ["a/b/c", "a/+/c", "a/#", "#"] {
            router.subscribe(filter, subscriber(1, &metrics));
            assert!(!router.unsubscribe(filter, 2), "another connection's subscription is not touched");
            assert!(router.unsubscribe(filter, 1));
            assert!(!router.unsubscribe(filter, 1));
        }
        assert!(router.shared.tree.read().is_empty());
        assert_eq!(metrics.subscriptions.get(), 0);
    }

    #[test]
    fn a_retained_message_waits_for_its_subscriber_until_it_is_forgotten() {
        let (router, metrics) = router(10);
        let retained = Publish { retain: true, ..message("a/b", "kept") };
        router.retain(&retained).unwrap();
        for (filter, expected) in [("a/b", 1), ("a/#", 1), ("a/b/#", 1), ("+/b", 1), ("#", 1), ("a", 0), ("a/+/c", 0)] {
            let late = subscriber(1, &metrics);
            router.deliver_retained(filter, &late);
            let got = received(&late);
            assert_eq!(got.len(), expected, "{filter}");
            assert!(got.iter().all(|publish| publish.retain));
        }
        router.retain(&Publish { retain: true, ..message("a/b", "") }).unwrap();
        let late = subscriber(1, &metrics);
        router.deliver_retained("#", &late);
        assert!(received(&late).is_empty());
    }

    #[test]
    fn retained_messages_are_bounded() {
        let (router, metrics) = router(1);
        router.retain(&message("a", "x")).unwrap();
        router.retain(&message("a", "y")).unwrap();
        assert_eq!(router.retain(&message("b", "x")), Err(TooManyRetained));
        assert_eq!(metrics.limits.with_label_values(&["retained"]).get(), 1);
    }

    fn filter() -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!["a", "b", "", "+", "$s"]), 1..5)
            .prop_flat_map(|levels| (Just(levels), any::<bool>()))
            .prop_map(|(levels, all)| levels.join("/") + if all { "/#" } else { "" })
            .prop_filter("a filter", |filter| topic::is_valid_filter(filter))
    }

    fn name() -> impl Strategy<Value = String> {
        prop::collection::vec(prop::sample::select(vec!["a", "b", "", "$s"]), 1..5)
            .prop_map(|levels| levels.join("/"))
            .prop_filter("a name", |name| topic::is_valid_name(name))
    }

    proptest! {
        #[test]
        fn the_tree_agrees_with_the_definition(filters in prop::collection::vec(filter(), 1..12), name in name()) {
            let (router, metrics) = router(10);
            let subscribers: Vec<_> = (0..).zip(&filters).map(|(n, filter)| {
                let subscriber = subscriber(n, &metrics);
                router.subscribe(filter, subscriber.clone());
                subscriber
            }).collect();
            router.publish(&message(&name, "x"), None);
            for (filter, subscriber) in filters.iter().zip(&subscribers) {
                prop_assert_eq!(received(subscriber).len(), usize::from(topic::matches(filter, &name)), "{} {}", filter, name);
            }
        }
    }
}
