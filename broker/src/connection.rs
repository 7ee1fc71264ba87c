//! One client: packets in, packets out, and its limits.
//!
//! `handshake.rs` has let the client in; it lives in [`Connection::run`] and ends in [`Connection::finish`], which
//! sends the will where the standard wants it.
//! Holds: PUBACKs leave in the order of what they answer (MQTT 5 §4.6), so one that waits for a COMMIT holds the later
//! ones back; while its writer's queue is full, or too much is unacknowledged or unsent, a client is not read;
//! nothing a client sends reaches another connection's task.
//! Ignorant of: what a reading means, and how it is stored.

use std::collections::{HashSet, VecDeque};
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytestring::ByteString;
use fleet_core::status::Change;
use futures::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, sleep_until, timeout};

use crate::Shared;
use crate::access::{Rights, Route};
use crate::handshake::{self, Admitted, count_violation, say_goodbye};
use crate::ingest::{Item, Message, Receipt, Sender, What};
use crate::listener::Arrival;
use crate::metrics::Limit;
use crate::router::{Routed, Subscriber};
use crate::session::{Close, Delivery, Inflight, Mailbox, SessionKey};
use crate::stream::{Io, Stream};
use crate::wire::{
    Ack, Decoder, Encoder, Outgoing, Packet, PacketId, Publish, QoS, Reason, RetainHandling, Subscribe,
    SubscriptionFilter, TooLarge, Unsubscribe, Version, Violation, Will,
};

/// While that many bytes wait for the socket, nothing is added and nothing is read.
const MAX_OUTBOUND_BYTES: usize = 64 * 1024;
/// How long a client waits for the earlier connection of its session to end.
const ENTER_WITHIN: Duration = Duration::from_secs(10);
/// How long a stopping broker lets a connection wait for its acknowledgements.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);
/// The timer of a connection that has no deadline.
const NEVER: Duration = Duration::from_hours(24);

/// Serves a socket from its first byte to its last.
pub(crate) async fn serve<S: AsyncRead + AsyncWrite + Unpin>(shared: Arc<Shared>, socket: S, mut arrival: Arrival) {
    // What a handshake needs is given back when it is over: an idle connection must stay small.
    let Some(mut admitted) = Box::pin(handshake::greet(&shared, socket, &mut arrival)).await else { return };
    let Arrival { number, peer, transport, .. } = arrival;
    let mailbox = Mailbox::new(shared.settings.outbox_messages, shared.settings.outbox_bytes, shared.metrics.clone());
    match timeout(ENTER_WITHIN, shared.sessions.enter(&admitted.session, number, &mailbox)).await {
        Ok(true) => {}
        // The client has come again meanwhile: there is nobody left behind this socket.
        Ok(false) => return,
        Err(_) => {
            let busy = (Reason::ServerBusy, "the earlier connection of this client has not ended yet");
            return Box::pin(handshake::turn_away(&shared, &mut admitted.stream, &admitted.encoder, busy)).await;
        }
    }
    let mut connection = Box::new(Connection::new(shared, admitted, mailbox, number));
    // A panic must not take the will and the session with it.
    let end = AssertUnwindSafe(connection.run()).catch_unwind().await.unwrap_or(End::Panicked);
    tracing::debug!(%peer, transport = transport.as_str(), session = &*connection.session, end = end.label(), "a connection ended");
    Box::pin(connection.finish(end)).await;
}

/// Tells a client that there is no room, and closes.
pub(crate) async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(shared: Arc<Shared>, socket: S, arrival: Arrival) {
    handshake::refuse(&shared, socket, &arrival).await;
}

/// How a connection ended.
#[derive(Debug)]
enum End {
    /// The client said good-bye.
    Disconnected,
    /// The client said good-bye and wants its will sent (MQTT 5 §3.14.2.1).
    DisconnectedWithWill,
    /// The socket closed or broke without a DISCONNECT.
    SocketClosed,
    /// Nothing came for one and a half times the keep alive (MQTT 5 §3.1.2.10).
    KeepAlive,
    /// A packet did not end in time, or the client does not read.
    TooSlow,
    /// The client broke the protocol.
    Violation(Violation),
    /// A 3.1.1 client published where it may not: there is no other way to say so.
    Denied,
    /// Asked from outside.
    Close(Close),
    /// A defect of ours.
    Panicked,
}

impl End {
    fn label(&self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::DisconnectedWithWill => "disconnected with will",
            Self::SocketClosed => "socket closed",
            Self::KeepAlive => "keep alive timeout",
            Self::TooSlow => "too slow",
            Self::Violation(violation) => violation.reason.text(),
            Self::Denied => "not authorized",
            Self::Close(close) => close.reason().0.text(),
            Self::Panicked => "internal error",
        }
    }

    /// What an MQTT 5 client is told, when it is still there to hear it.
    fn farewell(&self) -> Option<(Reason, String)> {
        let known = |(reason, text): (Reason, &str)| Some((reason, text.to_owned()));
        match self {
            Self::Disconnected | Self::DisconnectedWithWill | Self::SocketClosed | Self::Denied => None,
            Self::KeepAlive => known((Reason::KeepAliveTimeout, "nothing came within 1.5 times the keep alive")),
            Self::TooSlow => known((Reason::UnspecifiedError, "a packet was not sent or not read in time")),
            Self::Violation(violation) => Some((violation.reason, violation.text.to_string())),
            Self::Close(close) => known(close.reason()),
            Self::Panicked => known((Reason::UnspecifiedError, "internal error")),
        }
    }

    /// A will is for a client that went without a word; a broker that stops does not declare its devices dead.
    fn wants_will(&self) -> bool {
        !matches!(self, Self::Disconnected | Self::Close(Close::ShuttingDown))
    }
}

/// A QoS 1 PUBLISH that has not been acknowledged.
struct Pending {
    packet_id: PacketId,
    /// `None` until it is committed.
    answer: Option<(Reason, &'static str)>,
}

type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Connection<S> {
    shared: Arc<Shared>,
    stream: Stream<S>,
    decoder: Decoder,
    encoder: Encoder,
    rights: Rights,
    session: SessionKey,
    number: u64,
    mailbox: Arc<Mailbox>,
    will: Option<Will>,
    filters: HashSet<ByteString>,
    /// Sent to the client, not yet acknowledged by it.
    inflight: Inflight,
    /// Received from the client, not yet acknowledged to it; the first has ticket `first_ticket`.
    pending: VecDeque<Pending>,
    first_ticket: u64,
    /// A message its writer's queue has no room for; nothing is read meanwhile.
    stalled: Option<Waiting>,
    keep_alive: Option<Duration>,
    last_packet: Instant,
    /// Since when a packet has begun and not ended.
    partial_since: Option<Instant>,
    /// Since when the socket takes nothing of what waits for it.
    blocked_since: Option<Instant>,
    /// Set when the broker stops: by then the connection ends, acknowledged or not.
    drain_until: Option<Instant>,
}

enum Event {
    Io(std::io::Result<Io>),
    Mail,
    Timer,
    RoomAgain,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Answers the CONNECT and notes that the device is here.
    fn new(shared: Arc<Shared>, admitted: Admitted<S>, mailbox: Arc<Mailbox>, number: u64) -> Self {
        shared.metrics.connections.inc();
        shared.metrics.connects.with_label_values(&[Reason::Success.text()]).inc();
        let mut connection = Self {
            stream: admitted.stream,
            decoder: admitted.decoder,
            encoder: admitted.encoder,
            rights: admitted.rights,
            session: admitted.session,
            number,
            mailbox,
            will: admitted.connect.will,
            filters: HashSet::new(),
            inflight: Inflight::new(admitted.connect.receive_maximum.get()),
            pending: VecDeque::new(),
            first_ticket: 0,
            stalled: None,
            keep_alive: admitted.keep_alive.map(|keep_alive| keep_alive.mul_f32(1.5)),
            last_packet: Instant::now(),
            partial_since: None,
            blocked_since: None,
            drain_until: None,
            shared,
        };
        connection.send(Outgoing::ConnAck(&admitted.answer));
        connection.see(Change::connected);
        connection
    }

    /// Works until the connection ends.
    async fn run(&mut self) -> End {
        let timer = sleep_until(self.deadline());
        tokio::pin!(timer);
        loop {
            if let Err(end) = self.work().await {
                return end;
            }
            if self.deadline() < timer.deadline() {
                timer.as_mut().reset(self.deadline());
            }
            let reading = self.may_read();
            let event = tokio::select! {
                io = self.stream.ready(reading) => Event::Io(io),
                () = self.mailbox.left() => Event::Mail,
                () = wait_for(&mut self.stalled) => Event::RoomAgain,
                () = &mut timer => Event::Timer,
            };
            match event {
                Event::Io(Ok(Io::Read)) => self.last_packet = Instant::now(),
                Event::Io(Ok(Io::Wrote)) => self.blocked_since = None,
                Event::Io(Ok(Io::Closed) | Err(_)) => return End::SocketClosed,
                Event::RoomAgain => {
                    self.stalled = None;
                    self.last_packet = Instant::now();
                }
                Event::Mail => {}
                Event::Timer => {
                    if let Some(end) = self.overdue() {
                        return end;
                    }
                    timer.as_mut().reset(self.deadline());
                }
            }
        }
    }

    /// Does all that can be done now: answers, deliveries, packets that were read; then writes.
    async fn work(&mut self) -> Result<(), End> {
        self.settle()?;
        self.read_packets()?;
        self.send_deliveries();
        self.stream.release_inbound();
        self.stream.write_some().await.map_err(|_| End::SocketClosed)?;
        if self.stream.outbound.is_empty() {
            self.blocked_since = None;
        } else {
            self.blocked_since.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    fn may_read(&self) -> bool {
        self.may_process() && self.drain_until.is_none()
    }

    /// A client that has too much unacknowledged or unread is not listened to (MQTT 5 §4.9 for those that cannot be
    /// told a Receive Maximum).
    fn may_process(&self) -> bool {
        self.stalled.is_none()
            && self.stream.outbound.len() < MAX_OUTBOUND_BYTES
            && (self.encoder.version() == Version::V5
                || self.pending.len() < usize::from(self.shared.settings.receive_maximum))
    }

    // Deadlines

    fn deadline(&self) -> Instant {
        let packet_timeout = Duration::from_millis(self.shared.settings.packet_timeout_ms);
        let silent = self.keep_alive.filter(|_| self.may_read()).map(|keep_alive| self.last_packet + keep_alive);
        let partial = self.partial_since.filter(|_| self.may_read()).map(|since| since + packet_timeout);
        let blocked = self.blocked_since.map(|since| since + packet_timeout);
        [silent, partial, blocked, self.drain_until]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(|| Instant::now() + NEVER)
    }

    fn overdue(&self) -> Option<End> {
        let now = Instant::now();
        if now < self.deadline() {
            return None;
        }
        if self.drain_until.is_some_and(|until| until <= now) {
            return Some(End::Close(Close::ShuttingDown));
        }
        if self.keep_alive.is_some_and(|keep_alive| self.may_read() && self.last_packet + keep_alive <= now) {
            return Some(End::KeepAlive);
        }
        self.shared.metrics.hit(Limit::PacketTimeout);
        Some(End::TooSlow)
    }

    // What others left

    /// Sends the acknowledgements whose turn has come, and ends when that was asked for.
    fn settle(&mut self) -> Result<(), End> {
        let mut settled = Vec::new();
        let close = self.mailbox.take_settled(&mut settled);
        for ticket in settled {
            self.answer(ticket, (Reason::Success, ""));
        }
        self.acknowledge();
        match close {
            Some(Close::ShuttingDown) if !self.pending.is_empty() => {
                self.drain_until.get_or_insert_with(|| Instant::now() + DRAIN_WITHIN);
                Ok(())
            }
            Some(close) => Err(End::Close(close)),
            None => Ok(()),
        }
    }

    fn answer(&mut self, ticket: u64, answer: (Reason, &'static str)) {
        let place = ticket.checked_sub(self.first_ticket).and_then(|place| usize::try_from(place).ok());
        if let Some(pending) = place.and_then(|place| self.pending.get_mut(place)) {
            pending.answer = Some(answer);
        }
    }

    fn acknowledge(&mut self) {
        while let Some(Pending { packet_id, answer: Some((reason, text)) }) = self.pending.front() {
            let reason_string = (!text.is_empty()).then(|| ByteString::from_static(text));
            let ack = Ack { packet_id: *packet_id, reason: *reason, reason_string };
            self.pending.pop_front();
            self.first_ticket += 1;
            self.send(Outgoing::PubAck(&ack));
        }
        if self.pending.is_empty() {
            self.pending = VecDeque::new();
        }
    }

    /// Sends what waits in the mailbox, as far as the client's window and the socket allow.
    fn send_deliveries(&mut self) {
        while self.inflight.has_room() && self.stream.outbound.len() < MAX_OUTBOUND_BYTES {
            let Some(delivery) = self.mailbox.take_delivery() else { return };
            self.send_delivery(delivery);
        }
    }

    fn send_delivery(&mut self, delivery: Delivery) {
        let Some(mut publish) = delivery.aged() else { return };
        if publish.qos > QoS::AtMostOnce {
            publish.packet_id = Some(self.inflight.begin());
        }
        if let Err(TooLarge) = self.encoder.encode(Outgoing::Publish(&publish), &mut self.stream.outbound) {
            // Not sent, and treated as if it had been (MQTT 5 §3.1.2.11.4).
            self.shared.metrics.hit(Limit::ClientPacketBytes);
            publish.packet_id.map(|id| self.inflight.end(id));
        } else {
            self.shared.metrics.deliveries.inc();
        }
    }

    fn send(&mut self, packet: Outgoing<'_>) {
        if self.encoder.encode(packet, &mut self.stream.outbound).is_err() {
            self.shared.metrics.hit(Limit::ClientPacketBytes);
        }
    }

    // What the client sends

    fn read_packets(&mut self) -> Result<(), End> {
        while self.may_read() {
            let packet = match self.decoder.decode(&mut self.stream.inbound) {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(violation) => return Err(End::Violation(violation)),
            };
            self.partial_since = None;
            self.handle(packet)?;
        }
        if self.stream.inbound.is_empty() {
            self.partial_since = None;
        } else {
            self.partial_since.get_or_insert_with(Instant::now);
        }
        Ok(())
    }

    fn handle(&mut self, packet: Packet) -> Result<(), End> {
        match packet {
            Packet::Publish(publish) => self.receive(publish),
            Packet::PubAck(ack) => {
                // An acknowledgement of nothing is ignored: it may have crossed an expiry (MQTT 5 §4.4).
                self.inflight.end(ack.packet_id);
                Ok(())
            }
            Packet::Subscribe(subscribe) => {
                self.subscribe(&subscribe);
                Ok(())
            }
            Packet::Unsubscribe(unsubscribe) => {
                self.unsubscribe(&unsubscribe);
                Ok(())
            }
            Packet::PingReq => {
                self.send(Outgoing::PingResp);
                Ok(())
            }
            Packet::Disconnect(disconnect) if disconnect.reason == Reason::Success => Err(End::Disconnected),
            Packet::Disconnect(_) => Err(End::DisconnectedWithWill),
            // QoS 2 is not offered, so none of it can be under way.
            Packet::PubRec(ack) | Packet::PubRel(ack) | Packet::PubComp(ack) => {
                tracing::debug!(packet_id = ack.packet_id, "an acknowledgement of QoS 2, which is not offered");
                Err(violation(Reason::ProtocolError, "no QoS 2 message is under way"))
            }
            Packet::Auth(_) => Err(violation(Reason::ProtocolError, "extended authentication is not offered")),
            Packet::Connect(_) => Err(violation(Reason::ProtocolError, "a second CONNECT")),
        }
    }

    fn receive(&mut self, publish: Publish) -> Result<(), End> {
        self.shared.metrics.publishes.inc();
        if publish.qos == QoS::ExactlyOnce {
            return Err(violation(Reason::QosNotSupported, "expected QoS 0 or 1"));
        }
        if publish.topic_alias.is_some() {
            return Err(violation(Reason::TopicAliasInvalid, "no topic alias is accepted"));
        }
        if publish.packet_id.is_some() && self.pending.len() >= usize::from(self.shared.settings.receive_maximum) {
            self.shared.metrics.hit(Limit::ReceiveMaximum);
            return Err(violation(Reason::ReceiveMaximumExceeded, "more unacknowledged messages than Receive Maximum"));
        }
        match self.rights.publish(&publish.topic) {
            Ok(Route::Telemetry(sender)) => self.store(sender, publish, What::Telemetry),
            Ok(Route::Status(sender)) => self.store(sender, publish, What::Status),
            Ok(Route::Live) => self.pass_on(&publish),
            Err(text) => return self.deny(&publish, text),
        }
        Ok(())
    }

    /// Says no: with a reason at QoS 1 of MQTT 5; 3.1.1 can only be closed (3.1.1 §3.3.5).
    fn deny(&mut self, publish: &Publish, text: &'static str) -> Result<(), End> {
        self.shared.metrics.denied.with_label_values(&["publish"]).inc();
        if self.encoder.version() == Version::V311 {
            return Err(End::Denied);
        }
        self.acknowledge_now(publish, Reason::NotAuthorized, text);
        Ok(())
    }

    /// Hands a message to its writer; it is acknowledged when that has committed it.
    fn store(&mut self, sender: Arc<Sender>, publish: Publish, what: fn(Message) -> What) {
        let receipt = publish.packet_id.map(|packet_id| self.expect_answer(packet_id));
        let item = Item::new(sender, self.shared.clock.now_ms(), what(Message { publish, receipt }));
        self.offer(item);
    }

    fn expect_answer(&mut self, packet_id: PacketId) -> Receipt {
        let ticket = self.first_ticket + self.pending.len() as u64;
        self.pending.push_back(Pending { packet_id, answer: None });
        Receipt { mailbox: self.mailbox.clone(), ticket }
    }

    fn offer(&mut self, item: Item) {
        if let Err(item) = self.shared.ingest.offer(item) {
            let shared = self.shared.clone();
            self.stalled = Some(Box::pin(async move { shared.ingest.wait(item).await }));
        }
    }

    /// Notes what the broker sees of a device.
    fn see(&mut self, change: fn(fleet_core::id::DeviceKey, i64) -> Change) {
        let Some(sender) = self.rights.sender().cloned() else { return };
        let now_ms = self.shared.clock.now_ms();
        let change = change(sender.device, now_ms);
        self.offer(Item::new(sender, now_ms, What::Seen(change)));
    }

    /// Routes a message that is not stored.
    fn pass_on(&mut self, publish: &Publish) {
        if publish.retain && self.shared.router.retain(publish).is_err() {
            return self.acknowledge_now(publish, Reason::QuotaExceeded, "no room for another retained message");
        }
        let reason = match self.shared.router.publish(publish, Some(self.number)) {
            Routed::Delivered => Reason::Success,
            Routed::NoSubscriber => Reason::NoMatchingSubscribers,
        };
        self.acknowledge_now(publish, reason, "");
    }

    fn acknowledge_now(&mut self, publish: &Publish, reason: Reason, text: &'static str) {
        let Some(packet_id) = publish.packet_id else { return };
        self.pending.push_back(Pending { packet_id, answer: Some((reason, text)) });
        self.acknowledge();
    }

    fn subscribe(&mut self, subscribe: &Subscribe) {
        let granted: Vec<_> =
            subscribe.filters.iter().map(|asked| self.subscribe_one(asked, subscribe.subscription_id)).collect();
        let reasons: Vec<_> = granted.iter().map(|granted| granted.as_ref().map_or_else(|r| *r, |(r, _)| *r)).collect();
        let denied = reasons.contains(&Reason::NotAuthorized).then_some("subscribing to this filter is not allowed");
        self.send(Outgoing::SubAck { packet_id: subscribe.packet_id, reasons: &reasons, reason_string: denied });
        for (asked, granted) in subscribe.filters.iter().zip(granted) {
            if let Ok((_, Some(subscriber))) = granted {
                self.shared.router.deliver_retained(&asked.filter, &subscriber);
            }
        }
    }

    /// Grants one filter (with the subscriber when retained messages are due), or says why not.
    fn subscribe_one(
        &mut self,
        asked: &SubscriptionFilter,
        subscription_id: Option<u32>,
    ) -> Result<(Reason, Option<Subscriber>), Reason> {
        if !asked.valid {
            return Err(Reason::TopicFilterInvalid);
        }
        if asked.filter.starts_with("$share/") {
            return Err(Reason::SharedSubscriptionsNotSupported);
        }
        if !self.rights.may_subscribe(&asked.filter) {
            self.shared.metrics.denied.with_label_values(&["subscribe"]).inc();
            return Err(Reason::NotAuthorized);
        }
        let held = self.filters.contains(&asked.filter);
        if !held && self.filters.len() >= self.shared.settings.max_subscriptions {
            self.shared.metrics.hit(Limit::Subscriptions);
            return Err(Reason::QuotaExceeded);
        }
        let qos = asked.qos.min(QoS::AtLeastOnce);
        let subscriber = Subscriber {
            connection: self.number,
            mailbox: self.mailbox.clone(),
            qos,
            no_local: asked.no_local,
            retain_as_published: asked.retain_as_published,
            subscription_id,
        };
        // A copy: the filter itself is a slice of everything that was read with it.
        self.filters.insert(ByteString::from(&*asked.filter));
        self.shared.router.subscribe(&asked.filter, subscriber.clone());
        let due = match asked.retain_handling {
            RetainHandling::AtSubscribe => true,
            RetainHandling::AtNewSubscribe => !held,
            RetainHandling::Never => false,
        };
        let reason = if qos == QoS::AtLeastOnce { Reason::GrantedQos1 } else { Reason::Success };
        Ok((reason, due.then_some(subscriber)))
    }

    fn unsubscribe(&mut self, unsubscribe: &Unsubscribe) {
        let reasons: Vec<_> = unsubscribe
            .filters
            .iter()
            .map(|filter| {
                if self.filters.remove(filter) {
                    self.shared.router.unsubscribe(filter, self.number);
                    Reason::Success
                } else {
                    Reason::NoSubscriptionExisted
                }
            })
            .collect();
        self.send(Outgoing::UnsubAck { packet_id: unsubscribe.packet_id, reasons: &reasons, reason_string: None });
    }

    // The end

    /// Says good-bye where there is somebody to hear it, gives everything up, sends the will, lets the next one in.
    async fn finish(&mut self, end: End) {
        let shared = self.shared.clone();
        shared.metrics.connections.dec();
        shared.metrics.disconnects.with_label_values(&[end.label()]).inc();
        for filter in self.filters.drain() {
            shared.router.unsubscribe(&filter, self.number);
        }
        // What its writer had no room for was not acknowledged; still, nothing is dropped while it can be kept.
        if let Some(stalled) = self.stalled.take() {
            stalled.await;
        }
        self.note_end(&end).await;
        if let Some(will) = self.will.take().filter(|_| end.wants_will()) {
            self.send_will(will).await;
        }
        shared.sessions.leave(&self.session, self.number);
        if let End::Violation(violation) = &end {
            count_violation(&shared, violation);
        }
        if let Some((reason, text)) = end.farewell() {
            let goodbye = Outgoing::Disconnect { reason, reason_string: Some(&text), user_properties: &[] };
            say_goodbye(&mut self.stream, &self.encoder, goodbye).await;
        }
    }

    async fn note_end(&mut self, end: &End) {
        let Some(sender) = self.rights.sender().cloned() else { return };
        let now_ms = self.shared.clock.now_ms();
        let change = match end {
            End::Disconnected => Change::disconnected(sender.device, now_ms),
            _ => Change::lost(sender.device, now_ms, end.label()),
        };
        self.shared.ingest.wait(Item::new(sender, now_ms, What::Seen(change))).await;
    }

    async fn send_will(&mut self, will: Will) {
        let publish =
            Publish { properties: will.properties, ..Publish::new(will.topic, will.payload, will.qos, will.retain) };
        // The rights may have changed since the CONNECT.
        let (sender, what): (_, fn(Message) -> What) = match self.rights.publish(&publish.topic) {
            Ok(Route::Telemetry(sender)) => (sender, What::Telemetry),
            Ok(Route::Status(sender)) => (sender, What::Status),
            Ok(Route::Live) => return self.pass_on(&publish),
            Err(_) => return,
        };
        let item = Item::new(sender, self.shared.clock.now_ms(), what(Message { publish, receipt: None }));
        self.shared.ingest.wait(item).await;
    }
}

/// Waits for room when there is something to wait for, else for ever.
async fn wait_for(stalled: &mut Option<Waiting>) {
    match stalled {
        Some(waiting) => waiting.await,
        None => std::future::pending().await,
    }
}

fn violation(reason: Reason, text: &'static str) -> End {
    End::Violation(Violation { reason, text: text.into(), answer_as: Some(Version::V5) })
}
