//! What belongs to a client rather than to its socket: its mailbox, its messages in flight, its place among
//! the sessions.
//!
//! Holds: one live connection for a client id of a principal (MQTT 5 §3.1.4-3); a mailbox is bounded in count and
//! bytes, and what does not fit is never silently lost at QoS 1: the session ends and the client is told.
//! Every session ends with its connection for now; what must outlive one hangs on [`Mailbox`] and [`Inflight`].

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::metrics::{Limit, Metrics};
use crate::wire::{PacketId, Publish, QoS, Reason};

/// Names a session: the principal and its client id. Two principals may use the same client id.
pub(crate) type SessionKey = Arc<str>;

/// Why the broker closes a connection from outside of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Close {
    /// Another connection took the session over.
    TakenOver,
    /// The mailbox is full at QoS 1.
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

/// A message on its way to one client.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    /// What to send; QoS, retain and subscription ids are those of this delivery.
    pub(crate) publish: Publish,
    /// When it was accepted, for Message Expiry (MQTT 5 §3.3.2.3.3).
    pub(crate) accepted: Instant,
}

impl Delivery {
    /// A bound must hold for what a message costs, not only for its payload.
    fn bytes(&self) -> usize {
        self.publish.payload.len() + self.publish.topic.len() + 64
    }

    /// Takes the time it waited off its expiry; `None` when it has expired.
    pub(crate) fn aged(mut self) -> Option<Publish> {
        let Some(properties) = &self.publish.properties else { return Some(self.publish) };
        let Some(expiry_s) = properties.message_expiry_s else { return Some(self.publish) };
        let waited_s = u32::try_from(self.accepted.elapsed().as_secs()).unwrap_or(u32::MAX);
        // What expires at once may still be sent at once.
        let left_s = expiry_s.checked_sub(waited_s).filter(|left_s| *left_s > 0 || waited_s == 0)?;
        if left_s != expiry_s {
            let mut properties = (**properties).clone();
            properties.message_expiry_s = Some(left_s);
            self.publish.properties = Some(Arc::new(properties));
        }
        Some(self.publish)
    }
}

/// Where the rest of the broker leaves things for one connection. Bounded; never blocks the one who leaves something.
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
    settled: Vec<u64>,
    close: Option<Close>,
}

impl Mailbox {
    pub(crate) fn new(max_messages: usize, max_bytes: usize, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { inside: Mutex::default(), wake: Notify::new(), max_messages, max_bytes, metrics })
    }

    /// Leaves a message. When the mailbox is full, QoS 0 is dropped and counted; QoS 1 ends the session.
    pub(crate) fn deliver(&self, delivery: Delivery) {
        let mut inside = self.inside.lock();
        if inside.close.is_some() {
            return;
        }
        let bytes = delivery.bytes();
        let full = inside.deliveries.len() >= self.max_messages || inside.bytes + bytes > self.max_bytes;
        if full && delivery.publish.qos == QoS::AtMostOnce {
            self.metrics.hit(Limit::OutboxDropped);
            return;
        }
        if full {
            self.metrics.hit(Limit::OutboxFull);
            inside.close = Some(Close::QuotaExceeded);
        } else {
            inside.bytes += bytes;
            inside.deliveries.push_back(delivery);
        }
        drop(inside);
        self.wake.notify_one();
    }

    /// Says that what was received under this ticket is committed.
    pub(crate) fn settle(&self, ticket: u64) {
        self.inside.lock().settled.push(ticket);
        self.wake.notify_one();
    }

    /// Asks the connection to end; the first reason counts.
    pub(crate) fn close(&self, close: Close) {
        self.inside.lock().close.get_or_insert(close);
        self.wake.notify_one();
    }

    /// Waits until something was left since the last time.
    pub(crate) async fn left(&self) {
        self.wake.notified().await;
    }

    /// Takes the tickets that were settled, and whether to close.
    pub(crate) fn take_settled(&self, into: &mut Vec<u64>) -> Option<Close> {
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
}

/// QoS 1 messages sent and not yet acknowledged, bounded by the client's Receive Maximum (MQTT 5 §4.9).
#[derive(Debug)]
pub(crate) struct Inflight {
    window: u16,
    ids: VecDeque<PacketId>,
    last: u16,
}

impl Inflight {
    pub(crate) fn new(window: u16) -> Self {
        Self { window, ids: VecDeque::new(), last: 0 }
    }

    /// Whether one more may be sent.
    pub(crate) fn has_room(&self) -> bool {
        self.ids.len() < usize::from(self.window)
    }

    /// A packet id that is not in use (MQTT 5 §2.2.1). Call only when there [is room](Self::has_room).
    pub(crate) fn begin(&mut self) -> PacketId {
        loop {
            self.last = self.last.wrapping_add(1);
            if let Some(id) = PacketId::new(self.last)
                && !self.ids.contains(&id)
            {
                self.ids.push_back(id);
                return id;
            }
        }
    }

    /// Ends one; `false` when no such message was in flight.
    pub(crate) fn end(&mut self, id: PacketId) -> bool {
        let Some(place) = self.ids.iter().position(|held| *held == id) else { return false };
        self.ids.remove(place);
        if self.ids.is_empty() {
            self.ids = VecDeque::new();
        }
        true
    }
}

/// The live sessions of the broker.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    live: Mutex<HashMap<SessionKey, Live>>,
    ended: Notify,
}

#[derive(Debug)]
struct Live {
    mailbox: Arc<Mailbox>,
    /// Which connection holds the session; a later one takes it over.
    connection: u64,
}

impl Sessions {
    /// Makes this connection the one that holds the session. An earlier one is closed and waited for, so that its
    /// will is sent before anything the new one says. `false` when a later one holds it: the handshake took so long
    /// that the client has come again.
    pub(crate) async fn enter(&self, key: &SessionKey, connection: u64, mailbox: &Arc<Mailbox>) -> bool {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            {
                let mut live = self.live.lock();
                match live.get(key) {
                    None => {
                        live.insert(key.clone(), Live { mailbox: mailbox.clone(), connection });
                        return true;
                    }
                    Some(later) if later.connection > connection => return false,
                    Some(earlier) => earlier.mailbox.close(Close::TakenOver),
                }
            }
            ended.await;
        }
    }

    /// Gives the session up, after the will was sent.
    pub(crate) fn leave(&self, key: &SessionKey, connection: u64) {
        let mut live = self.live.lock();
        if live.get(key).is_some_and(|held| held.connection == connection) {
            live.remove(key);
        }
        drop(live);
        self.ended.notify_waiters();
    }

    /// Asks every connection to end.
    pub(crate) fn close_all(&self) {
        for live in self.live.lock().values() {
            live.mailbox.close(Close::ShuttingDown);
        }
    }

    /// Waits until no session is left.
    pub(crate) async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.live.lock().is_empty() {
                return;
            }
            ended.await;
        }
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
        Delivery { publish, accepted: Instant::now() }
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
    fn bytes_are_given_back_when_a_message_is_taken() {
        let (mailbox, _) = mailbox(1000, delivery(QoS::AtLeastOnce).bytes());
        for _ in 0..10 {
            mailbox.deliver(delivery(QoS::AtLeastOnce));
            assert!(mailbox.take_delivery().is_some());
        }
        assert_eq!(mailbox.take_settled(&mut Vec::new()), None);
    }

    #[test]
    fn packet_ids_in_flight_are_distinct_and_bounded_by_the_window() {
        let mut inflight = Inflight::new(3);
        let ids = [inflight.begin(), inflight.begin(), inflight.begin()];
        assert!(!inflight.has_room());
        assert!(inflight.end(ids[1]));
        assert!(!inflight.end(ids[1]), "it has ended already");
        inflight.last = ids[0].get() - 1;
        let next = inflight.begin();
        assert!(!ids.contains(&next) || next == ids[1], "an id in use is not given twice");
    }

    #[test]
    fn a_message_that_waited_past_its_expiry_is_not_sent() {
        let properties = PublishProperties { message_expiry_s: Some(5), ..PublishProperties::default() };
        let waited = |seconds| {
            let mut delivery = delivery(QoS::AtLeastOnce);
            delivery.publish.properties = Some(Arc::new(properties.clone()));
            delivery.accepted = Instant::now().checked_sub(std::time::Duration::from_secs(seconds)).unwrap();
            delivery.aged().map(|publish| publish.properties.unwrap().message_expiry_s)
        };
        assert_eq!(waited(2), Some(Some(3)));
        assert_eq!(waited(5), None);
    }

    #[tokio::test]
    async fn a_second_connection_waits_for_the_first_to_end() {
        let sessions = Arc::new(Sessions::default());
        let key: SessionKey = "main/d/d".into();
        let (first, _) = mailbox(1, 100);
        let (second, _) = mailbox(1, 100);
        assert!(sessions.enter(&key, 1, &first).await);
        let entering = tokio::spawn({
            let (sessions, key, second) = (sessions.clone(), key.clone(), second.clone());
            async move { sessions.enter(&key, 2, &second).await }
        });
        first.left().await;
        assert_eq!(first.take_settled(&mut Vec::new()), Some(Close::TakenOver));
        assert!(!entering.is_finished());
        sessions.leave(&key, 1);
        assert!(entering.await.unwrap());
        assert!(!sessions.enter(&key, 1, &first).await, "a handshake that was overtaken does not take over");
        sessions.leave(&key, 1);
        assert_eq!(
            sessions.live.lock().len(),
            1,
            "a connection that was taken over cannot end the session of its successor"
        );
    }
}
