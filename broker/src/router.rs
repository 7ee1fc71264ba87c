//! Who receives what: the subscription tree.
//!
//! Holds: the cost of a publish follows the levels of its topic and the subscribers that match, never the number of
//! filters or devices. A client with overlapping subscriptions receives a message once, at the highest QoS it asked
//! for and with every subscription id that matched (MQTT 5 §3.3.4); of a shared subscription one member receives it
//! (§4.8.2), a connected one before one that is away.
//! Clean sessions are served at once. What a durable session gets at QoS 1 or 2 comes back as [`Target`]s: it is for
//! `store.rs` to keep first.
//! Ignorant of: who may subscribe; `access.rs` has decided.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use fleet_core::policy::Guard;
use parking_lot::RwLock;

use crate::mailbox::{Delivery, Mailbox};
use crate::metrics::Metrics;
use crate::session::{Durable, SubscriberId, Subscription};
use crate::wire::{Publish, QoS};

/// Where a subscriber's messages go.
#[derive(Debug, Clone)]
pub(crate) enum Recipient {
    /// To a connection whose session ends with it.
    Connection(Arc<Mailbox>),
    /// To a session that its client finds again.
    Durable(Arc<Durable>),
}

/// One subscription of one session.
#[derive(Debug, Clone)]
pub(crate) struct Subscriber {
    /// The session; a client has one.
    pub(crate) id: SubscriberId,
    pub(crate) to: Recipient,
    pub(crate) options: Subscription,
    /// What of it must not be received after all; nearly always nothing.
    pub(crate) guard: Option<Guard>,
}

/// A copy of a message that a durable session is to get once it is stored.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) session: Arc<Durable>,
    /// At least 1.
    pub(crate) qos: QoS,
    pub(crate) retain: bool,
    pub(crate) subscription_ids: Vec<u32>,
}

/// What a publish came to.
#[derive(Debug)]
pub(crate) struct Routed {
    /// Whether anybody subscribes.
    pub(crate) matched: bool,
    /// Who gets it once it is stored.
    pub(crate) targets: Vec<Target>,
}

/// A shared subscription: `$share/{group}/{filter}`.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct GroupKey {
    pub(crate) group: Box<str>,
    pub(crate) filter: Box<str>,
}

impl GroupKey {
    /// The parts of a shared subscription; `None` when it is an ordinary one.
    pub(crate) fn parse(filter: &str) -> Option<Self> {
        let (group, filter) = filter.strip_prefix("$share/")?.split_once('/')?;
        Some(Self { group: group.into(), filter: filter.into() })
    }
}

/// The subscription tree; cloning shares it.
#[derive(Clone)]
pub(crate) struct Router {
    tree: Arc<RwLock<Node>>,
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
    /// Shared subscriptions of both kinds.
    groups: Option<Box<Groups>>,
}

#[derive(Debug, Default)]
struct Groups {
    here: Vec<Group>,
    below: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    key: Arc<GroupKey>,
    members: Vec<Subscriber>,
    turn: AtomicUsize,
}

impl Node {
    fn is_empty(&self) -> bool {
        self.children.is_empty()
            && self.any.is_none()
            && self.here.is_empty()
            && self.below.is_empty()
            && self.groups.is_none()
    }

    /// Goes to where a filter ends, making the way, and does something there. The flag: whether it ends with `#`.
    fn at<T>(&mut self, filter: &str, change: impl FnOnce(&mut Self, bool) -> T) -> T {
        let mut node = self;
        for level in filter.split('/') {
            match level {
                "#" => return change(node, true),
                "+" => node = node.any.get_or_insert_default(),
                name => node = node.children.entry(name.into()).or_default(),
            }
        }
        change(node, false)
    }

    /// Goes to where a filter ends, if there is such a place, does something there, and removes the nodes that this
    /// leaves empty.
    fn leave(&mut self, filter: &str, change: impl FnOnce(&mut Self, bool) -> bool) -> bool {
        let (level, rest) = filter.split_once('/').map_or((filter, None), |(level, rest)| (level, Some(rest)));
        if level == "#" {
            return change(self, true);
        }
        let child =
            if level == "+" { self.any.as_deref_mut() } else { self.children.get_mut(level).map(|child| &mut **child) };
        let Some(child) = child else { return false };
        let changed = match rest {
            Some(rest) => child.leave(rest, change),
            None => change(child, false),
        };
        if child.is_empty() {
            if level == "+" {
                self.any = None;
            } else {
                self.children.remove(level);
            }
        }
        changed
    }

    fn list(&mut self, below: bool) -> &mut Vec<Subscriber> {
        if below { &mut self.below } else { &mut self.here }
    }

    /// The members of a group that ends here, made if there is none.
    fn members(&mut self, below: bool, key: GroupKey) -> &mut Vec<Subscriber> {
        let groups = self.groups.get_or_insert_default();
        let groups = if below { &mut groups.below } else { &mut groups.here };
        let place = groups.iter().position(|group| *group.key == key).unwrap_or_else(|| {
            groups.push(Group { key: Arc::new(key), members: Vec::new(), turn: AtomicUsize::new(0) });
            groups.len() - 1
        });
        &mut groups[place].members
    }

    /// The members of a group that ends here, if there is one.
    fn group(&mut self, below: bool, key: &GroupKey) -> Option<&mut Vec<Subscriber>> {
        let groups = self.groups.as_deref_mut()?;
        let groups = if below { &mut groups.below } else { &mut groups.here };
        groups.iter_mut().find(|group| *group.key == *key).map(|group| &mut group.members)
    }

    fn leave_group(&mut self, below: bool, key: &GroupKey, id: SubscriberId) -> bool {
        let Some(groups) = &mut self.groups else { return false };
        let list = if below { &mut groups.below } else { &mut groups.here };
        let mut removed = false;
        list.retain_mut(|group| {
            if *group.key == *key {
                removed |= remove_from(&mut group.members, id);
            }
            !group.members.is_empty()
        });
        if groups.here.is_empty() && groups.below.is_empty() {
            self.groups = None;
        }
        removed
    }

    /// Visits everything whose filter matches the levels. `first`: wildcards do not match a first level that begins
    /// with `$` (MQTT 5 §4.7.2).
    fn visit<'a>(&'a self, topic: Option<&str>, first: bool, found: &mut Found<'a>) {
        let wildcards = !(first && topic.is_some_and(|topic| topic.starts_with('$')));
        if wildcards {
            found.each.extend(&self.below);
            found.groups.extend(self.groups.iter().flat_map(|groups| &groups.below));
        }
        let Some(topic) = topic else {
            found.each.extend(&self.here);
            found.groups.extend(self.groups.iter().flat_map(|groups| &groups.here));
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

/// What matches a topic.
#[derive(Default)]
struct Found<'a> {
    each: Vec<&'a Subscriber>,
    groups: Vec<&'a Group>,
}

impl Group {
    /// Whose turn it is: a connected member that keeps up, else one that is connected, else one that will come back.
    fn choose(&self, topic: &str, except: Option<SubscriberId>) -> Option<&Subscriber> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let in_turn = || {
            let (before, after) = self.members.split_at(turn % self.members.len().max(1));
            let may = |member: &&Subscriber| Some(member.id) != except && member.may_have(topic);
            after.iter().chain(before).filter(may)
        };
        in_turn()
            .find(|member| member.is_relaxed())
            .or_else(|| in_turn().find(|member| member.is_connected()))
            .or_else(|| in_turn().next())
    }
}

impl Subscriber {
    fn is_relaxed(&self) -> bool {
        match &self.to {
            Recipient::Connection(mailbox) => mailbox.is_relaxed(),
            Recipient::Durable(session) => session.is_relaxed(),
        }
    }

    fn may_have(&self, topic: &str) -> bool {
        self.guard.as_ref().is_none_or(|guard| guard.allows(topic))
    }

    fn is_connected(&self) -> bool {
        match &self.to {
            Recipient::Connection(_) => true,
            Recipient::Durable(session) => session.mailbox().is_some(),
        }
    }
}

fn remove_from(subscribers: &mut Vec<Subscriber>, id: SubscriberId) -> bool {
    let before = subscribers.len();
    subscribers.retain(|subscriber| subscriber.id != id);
    subscribers.len() < before
}

impl Router {
    pub(crate) fn new(metrics: Metrics) -> Self {
        Self { tree: Arc::default(), metrics }
    }

    /// Adds a subscription or replaces the one with the same filter; `true` when it is new.
    pub(crate) fn subscribe(&self, filter: &str, subscriber: Subscriber) -> bool {
        let mut tree = self.tree.write();
        let enter = |members: &mut Vec<Subscriber>| {
            let is_new = !remove_from(members, subscriber.id);
            members.push(subscriber);
            is_new
        };
        let is_new = match GroupKey::parse(filter) {
            None => tree.at(filter, |node, below| enter(node.list(below))),
            Some(key) => {
                let filter = key.filter.clone();
                tree.at(&filter, |node, below| enter(node.members(below, key)))
            }
        };
        drop(tree);
        if is_new {
            self.metrics.subscriptions.inc();
        }
        is_new
    }

    /// Ends a subscription; `true` when there was one.
    pub(crate) fn unsubscribe(&self, filter: &str, id: SubscriberId) -> bool {
        let mut tree = self.tree.write();
        let removed = match GroupKey::parse(filter) {
            None => tree.leave(filter, |node, below| remove_from(node.list(below), id)),
            Some(key) => tree.leave(&key.filter, |node, below| node.leave_group(below, &key, id)),
        };
        drop(tree);
        if removed {
            self.metrics.subscriptions.dec();
        }
        removed
    }

    /// Whether this session has a subscription that matches the topic, alone or in a group.
    pub(crate) fn hears(&self, topic: &str, id: SubscriberId) -> bool {
        let tree = self.tree.read();
        let mut found = Found::default();
        tree.visit(Some(topic), true, &mut found);
        let in_groups = found.groups.iter().flat_map(|group| &group.members);
        found.each.iter().copied().chain(in_groups).any(|subscriber| subscriber.id == id)
    }

    /// What a subscription must not receive after all has changed.
    pub(crate) fn set_guard(&self, filter: &str, id: SubscriberId, guard: Option<Guard>) {
        let set = |members: &mut Vec<Subscriber>| {
            let found = members.iter_mut().find(|member| member.id == id);
            found.map(|member| member.guard = guard).is_some()
        };
        let mut tree = self.tree.write();
        match GroupKey::parse(filter) {
            None => tree.leave(filter, |node, below| set(node.list(below))),
            Some(key) => tree.leave(&key.filter, |node, below| node.group(below, &key).is_some_and(set)),
        };
    }

    /// Leaves a message with every clean session whose subscription matches, and tells which durable ones are to get
    /// it; `from` is the session it came from.
    pub(crate) fn publish(&self, publish: &Publish, from: Option<SubscriberId>) -> Routed {
        let tree = self.tree.read();
        let mut found = Found::default();
        tree.visit(Some(&publish.topic), true, &mut found);
        let Found { mut each, groups } = found;
        each.retain(|subscriber| {
            !(subscriber.options.no_local && Some(subscriber.id) == from) && subscriber.may_have(&publish.topic)
        });
        let mut routed = Routed { matched: !each.is_empty() || !groups.is_empty(), targets: Vec::new() };
        if !routed.matched {
            return routed;
        }
        let accepted = Instant::now();
        each.sort_by_key(|subscriber| subscriber.id);
        for same in each.chunk_by(|a, b| a.id == b.id) {
            let delivery = Delivery::new(for_subscriber(publish, same), accepted);
            routed.targets.extend(leave_with(same[0], delivery));
        }
        for group in groups {
            routed.targets.extend(share(group, publish, accepted, None));
        }
        routed
    }

    /// Hands a message of a shared subscription to another member, since `from` can take it no more; `None` when there
    /// is nobody, or it has been left with a clean session.
    pub(crate) fn hand_on(&self, key: &GroupKey, delivery: &Delivery, from: SubscriberId) -> Option<Target> {
        let mut tree = self.tree.write();
        let mut target = None;
        tree.leave(&key.filter, |node, below| {
            let groups = node.groups.iter().flat_map(|groups| if below { &groups.below } else { &groups.here });
            for group in groups.filter(|group| *group.key == *key) {
                target = share(group, &delivery.publish, delivery.accepted, Some(from));
            }
            false
        });
        target
    }
}

fn share(group: &Group, publish: &Publish, accepted: Instant, except: Option<SubscriberId>) -> Option<Target> {
    let member = group.choose(&publish.topic, except)?;
    let mut delivery = Delivery::new(for_subscriber(publish, &[member]), accepted);
    if delivery.publish.qos > QoS::AtMostOnce {
        delivery.group = Some(group.key.clone());
    }
    leave_with(member, delivery)
}

/// Leaves a message with a clean session, and at QoS 0 with a durable one; else it has to be stored first.
fn leave_with(subscriber: &Subscriber, delivery: Delivery) -> Option<Target> {
    match &subscriber.to {
        Recipient::Connection(mailbox) => mailbox.deliver(delivery),
        Recipient::Durable(session) if delivery.publish.qos == QoS::AtMostOnce => {
            if let Some(mailbox) = session.mailbox() {
                mailbox.deliver(delivery);
            }
        }
        Recipient::Durable(session) => {
            let Publish { qos, retain, subscription_ids, .. } = delivery.publish;
            return Some(Target { session: session.clone(), qos, retain, subscription_ids });
        }
    }
    None
}

/// The message as one client receives it: the QoS is the lower of what was sent and the highest it asked for.
fn for_subscriber(publish: &Publish, subscriptions: &[&Subscriber]) -> Publish {
    let asked = subscriptions.iter().map(|subscriber| subscriber.options.qos).max().unwrap_or(QoS::AtMostOnce);
    Publish {
        qos: publish.qos.min(asked),
        packet_id: None,
        dup: false,
        retain: publish.retain && subscriptions.iter().any(|subscriber| subscriber.options.retain_as_published),
        topic_alias: None,
        subscription_ids: subscriptions.iter().filter_map(|subscriber| subscriber.options.id).collect(),
        ..publish.clone()
    }
}

/// A retained message as a new subscription gets it (MQTT 5 §3.3.1.3).
pub(crate) fn retained_for(publish: &Publish, options: Subscription) -> Publish {
    Publish {
        qos: publish.qos.min(options.qos),
        retain: true,
        subscription_ids: options.id.into_iter().collect(),
        ..publish.clone()
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use fleet_core::topic;
    use proptest::prelude::*;

    use super::*;

    const ASKED: Subscription =
        Subscription { qos: QoS::AtLeastOnce, no_local: false, retain_as_published: false, id: None };

    fn router() -> (Router, Metrics) {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        (Router::new(metrics.clone()), metrics)
    }

    fn subscriber(id: SubscriberId, metrics: &Metrics, options: Subscription) -> (Subscriber, Arc<Mailbox>) {
        let mailbox = Mailbox::new(1000, 1 << 20, metrics.clone());
        (Subscriber { id, to: Recipient::Connection(mailbox.clone()), options, guard: None }, mailbox)
    }

    fn message(topic: &str) -> Publish {
        Publish::new(topic.into(), Bytes::from_static(b"x"), QoS::AtLeastOnce, false)
    }

    fn received(mailbox: &Mailbox) -> Vec<Publish> {
        std::iter::from_fn(|| mailbox.take_delivery()).map(|delivery| delivery.publish).collect()
    }

    #[test]
    fn overlapping_subscriptions_receive_once_at_the_highest_qos_with_every_id() {
        let (router, metrics) = router();
        let (all, mailbox) = subscriber(1, &metrics, Subscription { qos: QoS::AtMostOnce, id: Some(1), ..ASKED });
        let one = Subscriber { options: Subscription { id: Some(2), ..ASKED }, ..all.clone() };
        router.subscribe("a/#", all);
        router.subscribe("a/+", one);
        assert!(router.publish(&message("a/b"), None).matched);
        let [publish] = &received(&mailbox)[..] else { panic!("expected one message") };
        assert_eq!(publish.qos, QoS::AtLeastOnce);
        let mut ids = publish.subscription_ids.clone();
        ids.sort_unstable();
        assert_eq!(ids, [1, 2]);
    }

    #[test]
    fn no_local_spares_the_sender_only() {
        let (router, metrics) = router();
        let (own, own_mailbox) = subscriber(1, &metrics, Subscription { no_local: true, ..ASKED });
        let (other, other_mailbox) = subscriber(2, &metrics, Subscription { no_local: true, ..ASKED });
        router.subscribe("a", own);
        router.subscribe("a", other);
        router.publish(&message("a"), Some(1));
        assert_eq!((received(&own_mailbox).len(), received(&other_mailbox).len()), (0, 1));
    }

    #[test]
    fn an_unsubscribed_filter_leaves_nothing_behind() {
        let (router, metrics) = router();
        for filter in ["a/b/c", "a/+/c", "a/#", "#", "$share/g/a/b", "$share/g/a/#", "$share/g/#"] {
            router.subscribe(filter, subscriber(1, &metrics, ASKED).0);
            assert!(!router.unsubscribe(filter, 2), "another client's subscription is not touched");
            assert!(router.unsubscribe(filter, 1));
            assert!(!router.unsubscribe(filter, 1));
        }
        assert!(router.tree.read().is_empty());
        assert_eq!(metrics.subscriptions.get(), 0);
    }

    #[test]
    fn a_group_takes_turns_and_each_group_gets_its_own() {
        let (router, metrics) = router();
        let (first, first_mailbox) = subscriber(1, &metrics, ASKED);
        let (second, second_mailbox) = subscriber(2, &metrics, ASKED);
        let (other, other_mailbox) = subscriber(3, &metrics, ASKED);
        router.subscribe("$share/g/a/+", first.clone());
        router.subscribe("$share/g/a/+", second);
        router.subscribe("$share/h/a/+", other);
        router.subscribe("a/b", first);
        for _ in 0..10 {
            assert!(router.publish(&message("a/b"), None).matched);
        }
        assert_eq!(received(&first_mailbox).len(), 10 + 5, "its own subscription, and its turns");
        assert_eq!(received(&second_mailbox).len(), 5);
        assert_eq!(received(&other_mailbox).len(), 10);
    }

    #[test]
    fn what_a_member_cannot_take_goes_to_another() {
        let (router, metrics) = router();
        let (first, first_mailbox) = subscriber(1, &metrics, ASKED);
        router.subscribe("$share/g/#", first);
        router.publish(&message("a"), None);
        let delivery = first_mailbox.take_delivery().unwrap();
        let key = delivery.group.clone().unwrap();
        assert!(router.hand_on(&key, &delivery, 1).is_none(), "there is nobody else");
        let (second, second_mailbox) = subscriber(2, &metrics, ASKED);
        router.subscribe("$share/g/#", second);
        assert!(router.hand_on(&key, &delivery, 1).is_none());
        assert_eq!(received(&second_mailbox).len(), 1);
        assert!(received(&first_mailbox).is_empty());
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
        fn the_tree_agrees_with_the_definition(
            filters in prop::collection::vec((filter(), any::<bool>()), 1..12),
            name in name(),
        ) {
            let (router, metrics) = router();
            let subscribers: Vec<_> = (0..).zip(&filters).map(|(n, (filter, shared))| {
                let (subscriber, mailbox) = subscriber(n, &metrics, ASKED);
                let shared = if *shared { format!("$share/g{n}/{filter}") } else { filter.clone() };
                router.subscribe(&shared, subscriber);
                (shared, mailbox)
            }).collect();
            router.publish(&message(&name), None);
            for ((filter, _), (asked, mailbox)) in filters.iter().zip(&subscribers) {
                prop_assert_eq!(received(mailbox).len(), usize::from(topic::matches(filter, &name)), "{} {}", asked, name);
            }
            for (n, (asked, _)) in (0..).zip(&subscribers) {
                prop_assert!(router.unsubscribe(asked, n));
            }
            prop_assert!(router.tree.read().is_empty());
        }
    }
}
