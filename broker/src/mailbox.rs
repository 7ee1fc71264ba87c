//! Where the rest of the broker leaves things for one connection. Bounded; never blocks the one who leaves something.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::metrics::{Limit, Metrics};
use crate::router::GroupKey;
use crate::rows;
use crate::wire::{Publish, QoS, Reason};

/// Why the broker closes a connection from outside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Close {
    /// Another connection took the session over.
    TakenOver,
    /// The mailbox is full at QoS 1 or 2.
    QuotaExceeded,
    /// The database would not keep a message, so it cannot be acknowledged.
    NotStored,
    /// The broker stops: what is pending is acknowledged first.
    ShuttingDown,
}

impl Close {
    /// What an MQTT 5 client is told.
    pub(crate) fn reason(self) -> (Reason, &'static str) {
        match self {
            Self::TakenOver => (Reason::SessionTakenOver, "another connection uses this client id"),
            Self::QuotaExceeded => (Reason::QuotaExceeded, "too many messages are waiting for this client"),
            Self::NotStored => (Reason::UnspecifiedError, "a message could not be stored"),
            Self::ShuttingDown => (Reason::ServerShuttingDown, "the server is shutting down"),
        }
    }
}

/// How far a message got with its receiver before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// Not sent yet.
    Fresh,
    /// Perhaps sent on an earlier connection: sent again with DUP (MQTT 5 §4.4).
    Again,
    /// QoS 2, and its PUBREC has come: only PUBREL is due.
    Released,
}

/// A message on its way to one client.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    /// What to send; QoS, retain and subscription ids are those of this delivery.
    pub(crate) publish: Publish,
    /// When it was accepted, for Message Expiry (MQTT 5 §3.3.2.3.3).
    pub(crate) accepted: Instant,
    /// Its place in the queue of a durable session; `None`: it is nowhere but here.
    pub(crate) offset: Option<i64>,
    pub(crate) stage: Stage,
    /// The shared subscription that chose this client.
    pub(crate) group: Option<Arc<GroupKey>>,
}

impl Delivery {
    /// A message that is nowhere but here.
    pub(crate) fn new(publish: Publish, accepted: Instant) -> Self {
        Self { publish, accepted, offset: None, stage: Stage::Fresh, group: None }
    }

    /// What it counts against a bound.
    fn bytes(&self) -> usize {
        rows::cost(&self.publish)
    }

    /// Takes the time it waited off its expiry; `false` when it has expired. One whose delivery has begun does not
    /// expire any more (MQTT 5 §3.3.2.3.3).
    pub(crate) fn age(&mut self) -> bool {
        let Some(properties) = &self.publish.properties else { return true };
        let Some(expiry_s) = properties.message_expiry_s else { return true };
        let waited_s = u32::try_from(self.accepted.elapsed().as_secs()).unwrap_or(u32::MAX);
        // What expires at once may still be sent at once.
        let left_s = expiry_s.checked_sub(waited_s).filter(|left_s| *left_s > 0 || waited_s == 0);
        let left_s = match left_s {
            Some(left_s) => left_s,
            None if self.stage == Stage::Fresh => return false,
            None => 0,
        };
        if left_s != expiry_s {
            let mut properties = (**properties).clone();
            properties.message_expiry_s = Some(left_s);
            self.publish.properties = Some(Arc::new(properties));
        }
        true
    }
}

/// What was waited for, and is committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Settled {
    /// The message received under this ticket.
    Ticket(u64),
    /// The oldest of the session's own changes (subscriptions, steps of QoS 2) that wait.
    Change,
}

/// What to tell whom once something is committed.
#[derive(Debug)]
pub(crate) struct Receipt {
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) what: Settled,
}

impl Receipt {
    /// It is committed.
    pub(crate) fn settle(&self) {
        self.mailbox.settle(self.what);
    }

    /// The database would not keep it: it is not acknowledged, and the connection ends.
    pub(crate) fn fail(&self) {
        self.mailbox.close(Close::NotStored);
    }
}

/// The mailbox of one connection.
#[derive(Debug)]
pub(crate) struct Mailbox {
    inside: Mutex<Inside>,
    wake: Notify,
    max_messages: usize,
    max_bytes: usize,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct Inside {
    deliveries: VecDeque<Delivery>,
    bytes: usize,
    settled: Vec<Settled>,
    /// The store has more for this durable session than is here.
    more: bool,
    close: Option<Close>,
}

impl Mailbox {
    pub(crate) fn new(max_messages: usize, max_bytes: usize, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { inside: Mutex::default(), wake: Notify::new(), max_messages, max_bytes, metrics })
    }

    /// Leaves a message that is nowhere but here. When the mailbox is full, QoS 0 is dropped and counted; QoS 1 and 2
    /// end the session.
    pub(crate) fn deliver(&self, delivery: Delivery) {
        let mut inside = self.inside.lock();
        if inside.close.is_some() {
            return;
        }
        if self.has_room(&inside, &delivery) {
            inside.push(delivery);
        } else if delivery.publish.qos == QoS::AtMostOnce {
            self.metrics.hit(Limit::OutboxDropped);
            return;
        } else {
            self.metrics.hit(Limit::OutboxFull);
            inside.close = Some(Close::QuotaExceeded);
        }
        drop(inside);
        self.wake.notify_one();
    }

    /// Leaves a message that the store keeps too; `false` when it must be [loaded](Self::take_more) later.
    pub(crate) fn deliver_stored(&self, delivery: Delivery) -> bool {
        let mut inside = self.inside.lock();
        let fits = self.has_room(&inside, &delivery);
        if fits {
            inside.push(delivery);
        } else {
            inside.more = true;
        }
        drop(inside);
        self.wake.notify_one();
        fits
    }

    /// Says that the store has more for this session.
    pub(crate) fn note_more(&self) {
        self.inside.lock().more = true;
        self.wake.notify_one();
    }

    /// Whether one more may be left without harm, for choosing among several receivers.
    pub(crate) fn is_relaxed(&self) -> bool {
        let inside = self.inside.lock();
        inside.close.is_none() && inside.deliveries.len() < self.max_messages / 2
    }

    fn has_room(&self, inside: &Inside, delivery: &Delivery) -> bool {
        // The first always fits: else one large message could never be sent.
        inside.deliveries.is_empty()
            || (inside.deliveries.len() < self.max_messages && inside.bytes + delivery.bytes() <= self.max_bytes)
    }

    /// Says that something is committed.
    pub(crate) fn settle(&self, what: Settled) {
        self.inside.lock().settled.push(what);
        self.wake.notify_one();
    }

    /// Asks the connection to end; the first reason counts.
    pub(crate) fn close(&self, close: Close) {
        self.inside.lock().close.get_or_insert(close);
        self.wake.notify_one();
    }

    /// Wakes the connection: there is something for it elsewhere.
    pub(crate) fn nudge(&self) {
        self.wake.notify_one();
    }

    /// Messages that wait here, and their bytes.
    pub(crate) fn waiting(&self) -> (u64, u64) {
        let inside = self.inside.lock();
        (inside.deliveries.len() as u64, inside.bytes as u64)
    }

    /// Waits until something was left since the last time.
    pub(crate) async fn left(&self) {
        self.wake.notified().await;
    }

    /// Takes what was settled, and whether to close.
    pub(crate) fn take_settled(&self, into: &mut Vec<Settled>) -> Option<Close> {
        let mut inside = self.inside.lock();
        into.append(&mut inside.settled);
        inside.close
    }

    /// Takes the next message, if there is one.
    pub(crate) fn take_delivery(&self) -> Option<Delivery> {
        let mut inside = self.inside.lock();
        let delivery = inside.deliveries.pop_front()?;
        inside.bytes -= delivery.bytes();
        if inside.deliveries.is_empty() {
            // An idle client should cost nothing.
            inside.deliveries = VecDeque::new();
        }
        Some(delivery)
    }

    /// Whether the store has more, told once; only when nothing is left here.
    pub(crate) fn take_more(&self) -> bool {
        let mut inside = self.inside.lock();
        inside.deliveries.is_empty() && std::mem::take(&mut inside.more)
    }
}

impl Inside {
    fn push(&mut self, delivery: Delivery) {
        self.bytes += delivery.bytes();
        self.deliveries.push_back(delivery);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::wire::PublishProperties;

    fn mailbox(messages: usize, bytes: usize) -> (Arc<Mailbox>, Metrics) {
        let metrics = Metrics::new(&prometheus::Registry::new()).unwrap();
        (Mailbox::new(messages, bytes, metrics.clone()), metrics)
    }

    fn delivery(qos: QoS) -> Delivery {
        let publish = Publish::new("a".into(), Bytes::from_static(b"0123456789"), qos, false);
        Delivery::new(publish, Instant::now())
    }

    #[test]
    fn a_full_mailbox_drops_qos_0_and_counts_it() {
        let (mailbox, metrics) = mailbox(2, 1 << 20);
        for _ in 0..3 {
            mailbox.deliver(delivery(QoS::AtMostOnce));
        }
        assert_eq!(metrics.limits.with_label_values(&["outbox_dropped"]).get(), 1);
        assert_eq!(mailbox.take_settled(&mut Vec::new()), None);
        assert_eq!(std::iter::from_fn(|| mailbox.take_delivery()).count(), 2);
    }

    #[test]
    fn a_full_mailbox_ends_the_session_rather_than_losing_qos_1() {
        let (mailbox, metrics) = mailbox(1000, 2 * delivery(QoS::AtLeastOnce).bytes());
        for _ in 0..3 {
            mailbox.deliver(delivery(QoS::AtLeastOnce));
        }
        assert_eq!(metrics.limits.with_label_values(&["outbox_full"]).get(), 1);
        assert_eq!(mailbox.take_settled(&mut Vec::new()), Some(Close::QuotaExceeded));
    }

    #[test]
    fn what_the_store_keeps_waits_there_when_the_mailbox_is_full() {
        let (mailbox, _) = mailbox(1, 1 << 20);
        assert!(mailbox.deliver_stored(delivery(QoS::AtLeastOnce)));
        assert!(!mailbox.deliver_stored(delivery(QoS::AtLeastOnce)));
        assert!(!mailbox.take_more(), "first what is here");
        assert!(mailbox.take_delivery().is_some());
        assert!(mailbox.take_more());
        assert!(!mailbox.take_more(), "told once");
        assert_eq!(mailbox.take_settled(&mut Vec::new()), None, "the connection goes on");
    }

    #[test]
    fn bytes_are_given_back_when_a_message_is_taken() {
        let (mailbox, _) = mailbox(1000, delivery(QoS::AtLeastOnce).bytes());
        for _ in 0..10 {
            mailbox.deliver(delivery(QoS::AtLeastOnce));
            assert!(mailbox.take_delivery().is_some());
        }
        assert_eq!(mailbox.take_settled(&mut Vec::new()), None);
    }

    #[test]
    fn a_message_that_waited_past_its_expiry_is_not_sent() {
        let properties = PublishProperties { message_expiry_s: Some(5), ..PublishProperties::default() };
        let waited = |seconds, stage| {
            let mut delivery = delivery(QoS::AtLeastOnce);
            delivery.stage = stage;
            delivery.publish.properties = Some(Arc::new(properties.clone()));
            delivery.accepted = Instant::now().checked_sub(std::time::Duration::from_secs(seconds)).unwrap();
            delivery.age().then(|| delivery.publish.message_expiry_s().unwrap())
        };
        assert_eq!(waited(2, Stage::Fresh), Some(3));
        assert_eq!(waited(5, Stage::Fresh), None);
        assert_eq!(waited(9, Stage::Again), Some(0), "its delivery has begun");
    }
}
