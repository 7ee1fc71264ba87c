//! One client: packets in, packets out, and its limits.
//!
//! `handshake.rs` has let the client in and `opening.rs` has found its session; it lives in [`Connection::run`] and
//! ends in [`Connection::finish`], which sends the will where the standard wants it. What the client sends is in
//! `inbound.rs`, what it is sent in `outbound.rs`, its subscriptions in `subscribing.rs`; what it is told from outside,
//! and what it tells of itself, in `obeying.rs`.
//! Holds: PUBACKs and PUBRECs leave in the order of what they answer (MQTT 5 §4.6), so one that waits for a COMMIT holds
//! the later ones back; while a queue is full, or too much is unacknowledged or unsent, a client is not read; nothing a
//! client sends reaches another connection's task.
//! Ignorant of: what a reading means, and how it is stored.

mod inbound;
mod obeying;
mod opening;
mod outbound;
mod subscribing;

use std::collections::{HashMap, HashSet, VecDeque};
use std::num::NonZeroU16;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytestring::ByteString;
use fleet_core::status::Change;
use futures::FutureExt;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep_until, timeout};

use crate::Shared;
use crate::access::Rights;
use crate::dispatch::News;
use crate::handshake::{self, Admitted, count_violation, say_goodbye};
use crate::inflight::Inflight;
use crate::ingest::{Item, What};
use crate::listener::Arrival;
use crate::mailbox::{Close, Delivery, Mailbox, Settled};
use crate::metrics::Limit;
use crate::presence::{Leave, Presence};
use crate::session::{Durable, SessionName, SubscriberId};
use crate::store::Op;
use crate::stream::{Io, Socket, Stream};
use crate::throttle::Throttle;
use crate::trace::Trace;
use crate::will::Will;
use crate::wire::{self, Ack, Decoder, Encoder, Outgoing, PacketId, Reason, Version, Violation};
use opening::Opened;
pub(crate) use opening::end_session;
use subscribing::Feed;
pub(crate) use subscribing::restrict;

/// While that many bytes wait for the socket, nothing is added and nothing is read.
const MAX_OUTBOUND_BYTES: usize = 64 * 1024;
/// How long a client waits for the earlier connection of its session to end.
const ENTER_WITHIN: Duration = Duration::from_secs(10);
/// How long a client that was told why it must go may take to hear it.
const LINGER: Duration = Duration::from_secs(2);
/// How long a stopping broker lets a connection wait for its acknowledgements.
const DRAIN_WITHIN: Duration = Duration::from_secs(5);
/// The timer of a connection that has no deadline.
const NEVER: Duration = Duration::from_hours(24);

/// A client that is in.
pub(crate) struct Client(Box<Connection<Socket>>);

/// From a client's first byte to its session; `None`: it was sent away. The client keeps its place.
pub(crate) async fn admit(
    shared: Arc<Shared>,
    socket: Socket,
    mut arrival: Arrival,
    place: OwnedSemaphorePermit,
) -> Option<Client> {
    let mut admitted = handshake::greet(&shared, socket, &mut arrival).await?;
    let Arrival { number, peer, .. } = arrival;
    let mailbox = Mailbox::new(shared.settings.outbox_messages, shared.settings.outbox_bytes, shared.metrics.clone());
    match timeout(ENTER_WITHIN, shared.sessions.enter(&admitted.session, number, peer.ip(), &mailbox)).await {
        Ok(true) => {}
        // The client has come again meanwhile: there is nobody left behind this socket.
        Ok(false) => return None,
        Err(_) => {
            let busy = (Reason::ServerBusy, "the earlier connection of this client has not ended yet");
            handshake::turn_away(&shared, &mut admitted.stream, &admitted.encoder, busy).await;
            return None;
        }
    }
    let opened = match opening::open(&shared, &mut admitted, &mailbox).await {
        Ok(opened) => opened,
        Err(refusal) => {
            shared.sessions.leave(&admitted.session, number);
            handshake::turn_away(&shared, &mut admitted.stream, &admitted.encoder, refusal).await;
            return None;
        }
    };
    // Another handshake may begin.
    drop(arrival.handshake.take());
    Some(Client(Box::new(Connection::new(shared, admitted, opened, mailbox, &arrival, place))))
}

impl Client {
    /// Serves the client to its end.
    pub(crate) async fn live(self) {
        let Self(mut connection) = self;
        // A panic must not take the will and the session with it.
        let end = AssertUnwindSafe(connection.run()).catch_unwind().await.unwrap_or(End::Panicked);
        tracing::debug!(connection = %connection.presence.id, session = &*connection.name, end = end.label(), "a connection ended");
        Box::pin(connection.finish(end)).await;
    }
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
    /// An answer is larger than the client takes (MQTT 5 §3.1.2.11.4): it would wait for it for ever.
    Unanswerable,
    /// Asked from outside.
    Close(Close),
    /// Told to go.
    Sent(Leave),
    /// What it came by is worth nothing any more.
    Expired,
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
            Self::Unanswerable => Reason::PacketTooLarge.text(),
            Self::Close(close) => close.reason().0.text(),
            Self::Sent(leave) => leave.reason.text(),
            Self::Expired => "credential expired",
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
            Self::Unanswerable => known((Reason::PacketTooLarge, "an answer is larger than Maximum Packet Size")),
            Self::Close(close) => known(close.reason()),
            Self::Sent(leave) => Some((leave.reason, leave.text.to_string())),
            Self::Expired => known((Reason::NotAuthorized, "the credential has expired: connect with a valid one")),
            Self::Panicked => known((Reason::UnspecifiedError, "internal error")),
        }
    }

    /// A will is for a client that went without a word; a broker that stops does not declare its devices dead.
    fn wants_will(&self) -> bool {
        !matches!(self, Self::Disconnected | Self::Close(Close::ShuttingDown))
    }
}

/// A QoS 1 or 2 PUBLISH that has not been answered.
struct Pending {
    packet_id: PacketId,
    /// To be answered with PUBREC.
    is_qos2: bool,
    /// Whether all that had to be kept is kept.
    is_ready: bool,
    reason: Reason,
    text: &'static str,
}

/// What is sent once a change of the session is kept.
enum Later {
    SubAck { packet_id: PacketId, reasons: Vec<Reason>, text: Option<&'static str> },
    UnsubAck { packet_id: PacketId, reasons: Vec<Reason> },
    PubRel(PacketId),
    PubComp(PacketId),
}

type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

struct Connection<S> {
    shared: Arc<Shared>,
    stream: Stream<S>,
    decoder: Decoder,
    encoder: Encoder,
    rights: Rights,
    /// Whether these are other rights than it began with.
    is_changed: bool,
    name: SessionName,
    number: u64,
    /// Its place among the connections, for others once it is gone.
    _place: OwnedSemaphorePermit,
    _claimant: Option<OwnedSemaphorePermit>,
    presence: Arc<Presence>,
    trace: Option<Arc<Trace>>,
    mailbox: Arc<Mailbox>,
    will: Option<Box<wire::Will>>,
    /// The session, when it outlives this connection.
    durable: Option<Arc<Durable>>,
    /// Subscriptions of a session that does not.
    filters: HashSet<ByteString>,
    /// How long the session outlives this connection, in seconds.
    expiry_s: u32,

    /// Received from the client, not yet answered; the first has ticket `first_ticket`.
    pending: VecDeque<Pending>,
    first_ticket: u64,
    /// QoS 2 messages that were received and not yet released.
    received: HashSet<PacketId>,
    /// Topics the client has named by a number (MQTT 5 §3.3.2.3.4).
    aliases_in: HashMap<NonZeroU16, ByteString>,
    /// What waits for the store, in the order in which it was asked.
    later: VecDeque<Later>,
    /// Something for which a queue has no room; nothing is read meanwhile.
    stalled: Option<Waiting>,
    /// What the client may send, when that is limited; nothing is read while it owes.
    throttle: Option<Box<Throttle>>,

    /// Sent to the client, not yet acknowledged by it.
    inflight: Inflight,
    /// Topics the client knows by a number.
    aliases_out: HashMap<ByteString, NonZeroU16>,
    max_aliases_out: u16,
    /// The next message, for which the client's window has no room.
    held: Option<Box<Delivery>>,
    /// Retained messages that new subscriptions are due.
    feeds: VecDeque<Feed>,
    /// The highest place in the session's queue that was sent.
    sent_to: i64,

    /// CONNACK was sent: before it, nothing else may be (MQTT 5 §3.14).
    is_greeted: bool,
    /// An answer did not fit what the client takes.
    is_unanswered: bool,
    keep_alive: Option<Duration>,
    last_packet: Instant,
    /// Since when a packet has begun and not ended.
    partial_since: Option<Instant>,
    /// Since when the socket takes nothing of what waits for it.
    blocked_since: Option<Instant>,
    /// Set when the broker stops: by then the connection ends, acknowledged or not.
    drain_until: Option<Instant>,
    /// What the client came by is worth nothing from then on.
    valid_until: Option<Instant>,
}

enum Event {
    Io(std::io::Result<Io>),
    Mail,
    Timer,
    RoomAgain,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Answers the CONNECT and notes that the device is here.
    fn new(
        shared: Arc<Shared>,
        admitted: Admitted<S>,
        opened: Opened,
        mailbox: Arc<Mailbox>,
        arrival: &Arrival,
        place: OwnedSemaphorePermit,
    ) -> Self {
        shared.metrics.connections.inc();
        shared.metrics.connects.with_label_values(&[Reason::Success.text()]).inc();
        let presence = obeying::enter(&shared, &admitted, &opened, &mailbox, arrival);
        let trace = shared.traces.of(presence.session());
        if let Some(trace) = &trace {
            obeying::trace_beginning(trace, &admitted, arrival);
        }
        let connect = admitted.connect;
        let mut connection = Self {
            stream: admitted.stream,
            decoder: admitted.decoder,
            encoder: admitted.encoder,
            rights: admitted.rights,
            is_changed: false,
            name: admitted.session,
            number: arrival.number,
            _place: place,
            _claimant: admitted.claimant,
            valid_until: obeying::instant(&shared, presence.principal().proof.valid_until),
            presence,
            trace,
            mailbox,
            will: connect.will.map(Box::new),
            durable: opened.durable,
            filters: HashSet::new(),
            expiry_s: opened.expiry_s,
            pending: VecDeque::new(),
            first_ticket: 0,
            received: opened.received.into_iter().collect(),
            aliases_in: HashMap::new(),
            later: VecDeque::new(),
            stalled: None,
            throttle: Throttle::new(&shared.settings, Instant::now()),
            inflight: Inflight::new(connect.receive_maximum.get()),
            aliases_out: HashMap::new(),
            max_aliases_out: connect.topic_alias_maximum.min(shared.settings.topic_alias_maximum),
            held: None,
            feeds: VecDeque::new(),
            sent_to: 0,
            is_greeted: false,
            is_unanswered: false,
            keep_alive: admitted.keep_alive_s.map(|seconds| Duration::from_secs(u64::from(seconds)).mul_f32(1.5)),
            last_packet: Instant::now(),
            partial_since: None,
            blocked_since: None,
            drain_until: None,
            shared,
        };
        connection.tell_subscriptions();
        connection.send(Outgoing::ConnAck(&admitted.answer));
        connection.is_greeted = !connection.is_unanswered;
        connection.see(Change::connected);
        let found = connection.durable.as_ref().map(|session| session.subscriptions()).unwrap_or_default();
        connection.look_for_news(found.into_iter().map(|(filter, _)| filter).collect());
        connection
    }

    /// Names it in the router.
    fn subscriber_id(&self) -> SubscriberId {
        self.durable.as_ref().map_or(self.number, |session| session.number)
    }

    /// Works until the connection ends.
    async fn run(&mut self) -> End {
        if !self.is_greeted {
            return End::Unanswerable;
        }
        let timer = sleep_until(self.deadline());
        tokio::pin!(timer);
        loop {
            if let Err(end) = self.work().await {
                return end;
            }
            let due = self.deadline();
            if due < timer.deadline() {
                timer.as_mut().reset(due);
            }
            let reading = self.may_read();
            let event = tokio::select! {
                io = self.stream.ready(reading) => Event::Io(io),
                () = self.mailbox.left() => Event::Mail,
                () = wait_for(&mut self.stalled) => Event::RoomAgain,
                () = &mut timer => Event::Timer,
            };
            match event {
                Event::Io(Ok(Io::Read)) => self.have_read(),
                Event::Io(Ok(Io::Wrote)) => self.blocked_since = None,
                Event::Io(Ok(Io::Closed) | Err(_)) => return End::SocketClosed,
                Event::RoomAgain => {
                    self.stalled = None;
                    self.listen_again(Instant::now());
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
        self.obey()?;
        self.read_packets()?;
        self.send_deliveries();
        if self.is_unanswered {
            return Err(End::Unanswerable);
        }
        self.stream.release_inbound();
        self.stream.write_some().await.map_err(|_| End::SocketClosed)?;
        if self.stream.outbound.is_empty() {
            self.blocked_since = None;
        } else {
            self.blocked_since.get_or_insert_with(Instant::now);
        }
        self.tell_counts();
        Ok(())
    }

    fn have_read(&mut self) {
        self.last_packet = Instant::now();
        if let Some(throttle) = &mut self.throttle {
            throttle.fill(self.last_packet);
        }
    }

    /// The client was not read for a while; what it could not say meanwhile is not its silence.
    fn listen_again(&mut self, now: Instant) {
        self.last_packet = now;
        self.partial_since = None;
    }

    fn owes_until(&self) -> Option<Instant> {
        self.throttle.as_ref().and_then(|throttle| throttle.owes_until())
    }

    fn may_read(&self) -> bool {
        self.may_process() && self.drain_until.is_none()
    }

    /// A client that has too much unacknowledged or unread is not listened to (MQTT 5 §4.9 for those that cannot be
    /// told a Receive Maximum).
    fn may_process(&self) -> bool {
        self.stalled.is_none()
            && self.owes_until().is_none()
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
        [silent, partial, blocked, self.drain_until, self.valid_until, self.owes_until()]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or_else(|| Instant::now() + NEVER)
    }

    fn overdue(&mut self) -> Option<End> {
        let now = Instant::now();
        if now < self.deadline() {
            return None;
        }
        if self.drain_until.is_some_and(|until| until <= now) {
            return Some(End::Close(Close::ShuttingDown));
        }
        if self.valid_until.is_some_and(|until| until <= now) {
            return Some(End::Expired);
        }
        if self.keep_alive.is_some_and(|keep_alive| self.may_read() && self.last_packet + keep_alive <= now) {
            return Some(End::KeepAlive);
        }
        if let Some(throttle) =
            self.throttle.as_mut().filter(|throttle| throttle.owes_until().is_some_and(|until| until <= now))
        {
            throttle.fill(now);
            self.listen_again(now);
            return None;
        }
        self.shared.metrics.hit(Limit::PacketTimeout);
        Some(End::TooSlow)
    }

    // What others left

    /// Sends what has waited for a COMMIT, and ends when that was asked for.
    fn settle(&mut self) -> Result<(), End> {
        let mut settled = Vec::new();
        let close = self.mailbox.take_settled(&mut settled);
        for settled in settled {
            match settled {
                Settled::Ticket(ticket) => self.answer(ticket),
                Settled::Change => self.send_later(),
            }
        }
        self.acknowledge();
        match close {
            Some(Close::ShuttingDown) if !(self.pending.is_empty() && self.later.is_empty()) => {
                self.drain_until.get_or_insert_with(|| Instant::now() + DRAIN_WITHIN);
                Ok(())
            }
            Some(close) => Err(End::Close(close)),
            None => Ok(()),
        }
    }

    fn send_later(&mut self) {
        match self.later.pop_front() {
            Some(Later::SubAck { packet_id, reasons, text }) => {
                self.send(Outgoing::SubAck { packet_id, reasons: &reasons, reason_string: text });
            }
            Some(Later::UnsubAck { packet_id, reasons }) => {
                self.send(Outgoing::UnsubAck { packet_id, reasons: &reasons, reason_string: None });
            }
            Some(Later::PubRel(packet_id)) => self.send(Outgoing::PubRel(&Ack::new(packet_id, Reason::Success))),
            Some(Later::PubComp(packet_id)) => {
                self.received.remove(&packet_id);
                self.send(Outgoing::PubComp(&Ack::new(packet_id, Reason::Success)));
            }
            None => {}
        }
    }

    /// Hands a change of the session to the store; when that has no room, nothing is read until it has.
    fn keep(&mut self, op: Op) {
        let shared = self.shared.clone();
        if self.stalled.is_some() {
            self.stall(async move { shared.store.wait(op).await });
        } else if let Err(op) = self.shared.store.offer(op) {
            self.stall(async move { shared.store.wait(op).await });
        }
    }

    /// Tells whoever sends news to devices; when too much is told at once, nothing is read until there is room.
    fn announce(&mut self, news: News) {
        if let Err(news) = self.shared.dispatch.offer(news) {
            let shared = self.shared.clone();
            self.stall(async move { shared.dispatch.wait(news).await });
        }
    }

    /// Nothing is read until this is done, after all that is waited for already.
    fn stall(&mut self, waiting: impl Future<Output = ()> + Send + 'static) {
        self.stalled = Some(match self.stalled.take() {
            Some(stalled) => Box::pin(async move {
                stalled.await;
                waiting.await;
            }),
            None => Box::pin(waiting),
        });
    }

    fn send(&mut self, packet: Outgoing<'_>) {
        if let Some(trace) = &self.trace {
            trace.sent(&packet);
        }
        if self.encoder.encode(packet, &mut self.stream.outbound).is_err() {
            self.shared.metrics.hit(Limit::ClientPacketBytes);
            self.is_unanswered = true;
        }
    }

    // The end

    /// Says good-bye where there is somebody to hear it, gives everything up, sends the will, lets the next one in.
    async fn finish(&mut self, end: End) {
        let shared = self.shared.clone();
        shared.presences.leave(self.presence.id);
        shared.metrics.connections.dec();
        shared.metrics.disconnects.with_label_values(&[end.label()]).inc();
        // What a queue had no room for was not acknowledged; still, nothing is dropped while it can be kept.
        if let Some(stalled) = self.stalled.take() {
            stalled.await;
        }
        if matches!(end, End::Close(Close::QuotaExceeded)) {
            self.note_overflow();
        }
        self.note_end(&end).await;
        let will = self.will.take().filter(|_| end.wants_will());
        let will = will.map(|message| Will { owner: self.presence.principal().as_ref().clone(), message: *message });
        match self.durable.take() {
            Some(session) => self.leave_durable(&session, will).await,
            None => self.leave_clean(will).await,
        }
        shared.sessions.leave(&self.name, self.number);
        if let End::Violation(violation) = &end {
            count_violation(&shared, violation);
        }
        self.trace_end(&end);
        if let Some((reason, text)) = end.farewell().filter(|_| self.is_greeted) {
            let goodbye = Outgoing::Disconnect { reason, reason_string: Some(&text), user_properties: &[] };
            if let Some(trace) = &self.trace {
                trace.sent(&goodbye);
            }
            say_goodbye(&mut self.stream, &self.encoder, goodbye).await;
            // What the client was sending meanwhile must not cost it the reason.
            let _ = timeout(LINGER, self.stream.drain()).await;
        }
    }

    /// The session ends with the connection (MQTT 5 §3.1.2.11.2), and a will does not wait longer than that.
    async fn leave_clean(&mut self, will: Option<Will>) {
        for filter in self.filters.drain() {
            self.shared.router.unsubscribe(&filter, self.number);
        }
        self.hand_on().await;
        if let Some(will) = will {
            will.send(&self.shared).await;
        }
    }

    /// The session goes on without a connection, or ends if the client wants no more of it.
    async fn leave_durable(&mut self, session: &Arc<Durable>, will: Option<Will>) {
        session.leave_queue(self.sent_to);
        if self.expiry_s == 0 {
            opening::end_session(&self.shared, session).await;
        }
        let waits = self.expiry_s > 0 && will.as_ref().is_some_and(|will| !will.delay().is_zero());
        let (later, now) = if waits { (will, None) } else { (None, will) };
        if let Some(will) = now {
            will.send(&self.shared).await;
        }
        if self.expiry_s > 0 {
            let keep_will = later.is_some();
            self.shared.sessions.away(session, self.expiry_s, later);
            self.shared.store.wait(Op::Leave { session: session.clone(), keep_will }).await;
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
