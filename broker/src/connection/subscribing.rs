//! The client's subscriptions, and the retained messages that new ones are due (MQTT 5 §3.8).

use std::collections::VecDeque;

use bytestring::ByteString;
use fleet_core::dispatch::Kind;
use fleet_core::policy::Guard;
use fleet_core::topic::matches;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Connection, Later};
use crate::Shared;
use crate::access::Rights;
use crate::dispatch::{self, Arrived, News};
use crate::mailbox::{Delivery, Receipt, Settled};
use crate::metrics::Limit;
use crate::retained::Walk;
use crate::router::{GroupKey, Recipient, Subscriber, retained_for};
use crate::session::{Durable, SubscriberId, Subscription};
use crate::store::Op;
use crate::wire::{Outgoing, QoS, Reason, RetainHandling, Subscribe, SubscriptionFilter, Unsubscribe};

/// Retained messages taken at once.
const STEP: usize = 32;

/// Retained messages on their way to a new subscription: taken as the client takes them, never all at once.
pub(super) struct Feed {
    walk: Walk,
    options: Subscription,
    guard: Option<Guard>,
    /// The others were stored for the session when it subscribed.
    only_qos0: bool,
    taken: VecDeque<Delivery>,
}

/// A subscription that was granted.
struct Granted {
    filter: ByteString,
    options: Subscription,
    guard: Option<Guard>,
    /// Whether retained messages are due.
    is_due: bool,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn subscribe(&mut self, subscribe: Subscribe) {
        let Subscribe { packet_id, subscription_id, filters, .. } = subscribe;
        let answers: Vec<_> = filters.into_iter().map(|asked| self.grant(asked, subscription_id)).collect();
        let reasons: Vec<_> =
            answers.iter().map(|answer| answer.as_ref().map_or_else(|r| *r, Granted::reason)).collect();
        let text = reasons.contains(&Reason::NotAuthorized).then_some("subscribing to this filter is not allowed");
        let granted: Vec<_> = answers.into_iter().flatten().collect();
        self.tell_subscriptions();
        self.look_for_news(granted.iter().map(|granted| granted.filter.clone()).collect());
        let Some(session) = self.durable.clone().filter(|_| !granted.is_empty()) else {
            self.send(Outgoing::SubAck { packet_id, reasons: &reasons, reason_string: text });
            self.feeds.extend(granted.into_iter().filter(|granted| granted.is_due).map(|granted| granted.feed(false)));
            return;
        };
        let retained = granted.iter().filter(|granted| granted.is_due).flat_map(|g| self.stored_retained(g)).collect();
        let filters = granted.iter().map(|granted| (granted.filter.clone(), granted.options)).collect();
        let receipt = Receipt { mailbox: self.mailbox.clone(), what: Settled::Change };
        self.later.push_back(Later::SubAck { packet_id, reasons, text });
        self.keep(Op::Subscribe { session, filters, retained, receipt });
        self.feeds.extend(granted.into_iter().filter(|granted| granted.is_due).map(|granted| granted.feed(true)));
    }

    /// A device listens on these filters now: has it sent what waits for it, or for those it acts for.
    pub(super) fn look_for_news(&mut self, filters: Vec<ByteString>) {
        for filter in filters {
            let group = GroupKey::parse(&filter);
            let topics = group.as_ref().map_or(&*filter, |group| &group.filter);
            let Some((device, below)) = self.rights.about(topics) else { continue };
            for kind in [Kind::Shadow, Kind::Command] {
                if matches(below, dispatch::sample(kind)) {
                    let connection = self.presence.id;
                    self.announce(News::Arrived(Arrived { device, kind, connection }));
                }
            }
        }
    }

    /// Grants one filter, or says why not.
    fn grant(&mut self, asked: SubscriptionFilter, subscription_id: Option<u32>) -> Result<Granted, Reason> {
        if !asked.valid {
            return Err(Reason::TopicFilterInvalid);
        }
        let group = GroupKey::parse(&asked.filter);
        let topics = group.as_ref().map_or(&*asked.filter, |group| &group.filter);
        if !self.rights.may_subscribe(topics) {
            self.shared.metrics.denied.with_label_values(&["subscribe"]).inc();
            return Err(Reason::NotAuthorized);
        }
        let held = self.is_subscribed(&asked.filter);
        if !held && self.subscription_count() >= self.shared.settings.max_subscriptions {
            self.shared.metrics.hit(Limit::Subscriptions);
            return Err(Reason::QuotaExceeded);
        }
        let options = Subscription {
            qos: asked.qos,
            no_local: asked.no_local,
            retain_as_published: asked.retain_as_published,
            id: subscription_id,
        };
        let guard = self.rights.delivery_guard(topics);
        let is_due = group.is_none()
            && match asked.retain_handling {
                RetainHandling::AtSubscribe => true,
                RetainHandling::AtNewSubscribe => !held,
                RetainHandling::Never => false,
            };
        self.enter(&asked.filter, options, guard.clone());
        Ok(Granted { filter: asked.filter, options, guard, is_due })
    }

    fn enter(&mut self, filter: &ByteString, options: Subscription, guard: Option<Guard>) {
        let to = if let Some(session) = &self.durable {
            session.subscribe(filter, options);
            Recipient::Durable(session.clone())
        } else {
            self.filters.insert(filter.clone());
            Recipient::Connection(self.mailbox.clone())
        };
        self.shared.router.subscribe(filter, Subscriber { id: self.subscriber_id(), to, options, guard });
    }

    /// What the client may do has changed: subscriptions it may no longer hold end, the others are filtered anew.
    pub(super) fn apply_rights(&mut self) {
        let Some(session) = self.durable.clone() else {
            let filters: Vec<_> = self.filters.iter().cloned().collect();
            let ended = reguard(&self.shared, self.number, filters, &self.rights);
            for filter in &ended {
                self.leave(filter);
            }
            self.tell_subscriptions();
            return;
        };
        let filters = restrict(&self.shared, &session, &self.rights);
        self.tell_subscriptions();
        session.set_owner(self.presence.principal().as_ref().clone());
        if !filters.is_empty() {
            self.keep(Op::Unsubscribe { session, filters, receipt: None });
        }
    }

    fn is_subscribed(&self, filter: &str) -> bool {
        match &self.durable {
            Some(session) => session.has_subscription(filter),
            None => self.filters.contains(filter),
        }
    }

    pub(super) fn subscription_count(&self) -> usize {
        match &self.durable {
            Some(session) => session.subscription_count(),
            None => self.filters.len(),
        }
    }

    /// The retained messages that a durable session gets at QoS 1 or 2, as many as its queue takes: they are stored
    /// with the subscription.
    fn stored_retained(&self, granted: &Granted) -> Vec<Delivery> {
        let most = usize::try_from(self.shared.session_limits.queue_messages).unwrap_or(usize::MAX);
        let mut walk = Walk::new(&granted.filter);
        let mut found = Vec::new();
        while let Some(step) = self.shared.store.retained().step(&mut walk, STEP)
            && found.len() < most
        {
            found.extend(step.into_iter().filter_map(|delivery| granted.due(delivery)).filter(is_stored));
        }
        found
    }

    pub(super) fn unsubscribe(&mut self, unsubscribe: Unsubscribe) {
        let Unsubscribe { packet_id, filters } = unsubscribe;
        let reasons: Vec<_> = filters.iter().map(|filter| self.leave(filter)).collect();
        self.tell_subscriptions();
        if let Some(session) = self.durable.clone() {
            let receipt = Receipt { mailbox: self.mailbox.clone(), what: Settled::Change };
            self.later.push_back(Later::UnsubAck { packet_id, reasons });
            self.keep(Op::Unsubscribe { session, filters, receipt: Some(receipt) });
        } else {
            self.send(Outgoing::UnsubAck { packet_id, reasons: &reasons, reason_string: None });
        }
    }

    fn leave(&mut self, filter: &str) -> Reason {
        let held = match &self.durable {
            Some(session) => session.unsubscribe(filter),
            None => self.filters.remove(filter),
        };
        if held {
            self.shared.router.unsubscribe(filter, self.subscriber_id());
            return Reason::Success;
        }
        Reason::NoSubscriptionExisted
    }

    /// The next retained message that is due.
    pub(super) fn feed(&mut self) -> Option<Delivery> {
        loop {
            let feed = self.feeds.front_mut()?;
            if let Some(delivery) = feed.taken.pop_front() {
                return Some(delivery);
            }
            if let Some(step) = self.shared.store.retained().step(&mut feed.walk, STEP) {
                feed.take(step);
                continue;
            }
            self.feeds.pop_front();
            if self.feeds.is_empty() {
                self.feeds = VecDeque::new();
            }
        }
    }
}

impl Granted {
    fn reason(&self) -> Reason {
        match self.options.qos {
            QoS::AtMostOnce => Reason::Success,
            QoS::AtLeastOnce => Reason::GrantedQos1,
            QoS::ExactlyOnce => Reason::GrantedQos2,
        }
    }

    fn feed(self, only_qos0: bool) -> Feed {
        let Self { filter, options, guard, .. } = self;
        Feed { walk: Walk::new(&filter), options, guard, only_qos0, taken: VecDeque::new() }
    }

    fn due(&self, delivery: Delivery) -> Option<Delivery> {
        due(delivery, self.options, self.guard.as_ref())
    }
}

impl Feed {
    fn take(&mut self, step: Vec<Delivery>) {
        let due = step.into_iter().filter_map(|delivery| due(delivery, self.options, self.guard.as_ref()));
        self.taken.extend(due.filter(|delivery| !(self.only_qos0 && is_stored(delivery))));
    }
}

/// Ends the subscriptions that a durable session may no longer hold, all but in the database; which they were.
pub(crate) fn restrict(shared: &Shared, session: &Durable, rights: &Rights) -> Vec<ByteString> {
    let filters = session.subscriptions().into_iter().map(|(filter, _)| filter).collect();
    let ended = reguard(shared, session.number, filters, rights);
    for filter in &ended {
        if session.unsubscribe(filter) {
            shared.router.unsubscribe(filter, session.number);
        }
    }
    ended
}

/// Sets what each subscription must not receive after all; those that may not be held at all are left, and returned.
fn reguard(shared: &Shared, id: SubscriberId, filters: Vec<ByteString>, rights: &Rights) -> Vec<ByteString> {
    let mut ended = Vec::new();
    for filter in filters {
        let group = GroupKey::parse(&filter);
        let topics = group.as_ref().map_or(&*filter, |group| &group.filter);
        if rights.may_subscribe(topics) {
            shared.router.set_guard(&filter, id, rights.delivery_guard(topics));
        } else {
            ended.push(filter);
        }
    }
    ended
}

/// A retained message as a new subscription gets it; `None` when it may not have it.
fn due(mut delivery: Delivery, options: Subscription, guard: Option<&Guard>) -> Option<Delivery> {
    if guard.is_some_and(|guard| !guard.allows(&delivery.publish.topic)) {
        return None;
    }
    delivery.publish = retained_for(&delivery.publish, options);
    Some(delivery)
}

fn is_stored(delivery: &Delivery) -> bool {
    delivery.publish.qos > QoS::AtMostOnce
}
