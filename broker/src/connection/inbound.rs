//! What the client sends.

use std::sync::Arc;

use bytestring::ByteString;
use fleet_core::config::RateExcess;
use fleet_core::connection_event::Kind;
use fleet_core::status::Change;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::{Connection, End, Later, Pending, violation};
use crate::access::Route;
use crate::dispatch::News;
use crate::inflight::{Awaits, Sent};
use crate::ingest::{Item, Sender, What};
use crate::mailbox::{Receipt, Settled};
use crate::metrics::Limit;
use crate::store::{Incoming, Op, Taken};
use crate::wire::{Ack, Disconnect, Outgoing, Packet, PacketId, Publish, QoS, Reason, Version};
use crate::{provisioning, renewal};

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn read_packets(&mut self) -> Result<(), End> {
        while self.may_read() {
            let packet = match self.decoder.decode(&mut self.stream.inbound) {
                Ok(Some(packet)) => packet,
                Ok(None) => break,
                Err(violation) => return Err(End::Violation(violation)),
            };
            self.partial_since = None;
            if let Some(trace) = &self.trace {
                trace.received(&packet);
            }
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
            Packet::Publish(publish) => return self.receive(publish),
            Packet::PubAck(ack) => self.finish_exchange(&ack, Awaits::Ack),
            Packet::PubRec(ack) => self.pub_rec(&ack),
            Packet::PubRel(ack) => return self.pub_rel(&ack),
            Packet::PubComp(ack) => self.finish_exchange(&ack, Awaits::Comp),
            Packet::Subscribe(subscribe) => self.subscribe(subscribe),
            Packet::Unsubscribe(unsubscribe) => self.unsubscribe(unsubscribe),
            Packet::PingReq => self.send(Outgoing::PingResp),
            Packet::Disconnect(disconnect) => return Err(self.disconnect(&disconnect)),
            Packet::Auth(_) => return Err(violation(Reason::ProtocolError, "extended authentication is not offered")),
            Packet::Connect(_) => return Err(violation(Reason::ProtocolError, "a second CONNECT")),
        }
        Ok(())
    }

    /// The client goes, and may say how long its session is to outlive it (MQTT 5 §3.14.2.2.2).
    fn disconnect(&mut self, disconnect: &Disconnect) -> End {
        if let Some(expiry_s) = disconnect.session_expiry_s {
            if self.durable.is_none() && expiry_s > 0 {
                return violation(Reason::ProtocolError, "a session that ends with its connection cannot be kept");
            }
            self.expiry_s = expiry_s.min(self.shared.session_limits.max_expiry_s);
        }
        if disconnect.reason == Reason::Success { End::Disconnected } else { End::DisconnectedWithWill }
    }

    // PUBLISH

    fn receive(&mut self, mut publish: Publish) -> Result<(), End> {
        self.shared.metrics.publishes.inc();
        self.presence.counts.messages_in.add(1);
        self.resolve_alias(&mut publish)?;
        self.charge(&publish)?;
        if let Some(packet_id) = publish.packet_id {
            if publish.qos == QoS::ExactlyOnce && self.received.contains(&packet_id) {
                self.received_again(packet_id);
                return Ok(());
            }
            self.check_window(publish.qos)?;
        }
        match self.rights.publish(&publish.topic) {
            Ok(Route::Telemetry(sender)) => self.store(sender, publish, What::Telemetry),
            Ok(Route::Logs(sender)) => self.store(sender, publish, What::Logs),
            Ok(Route::Status(sender)) => self.store(sender, publish, What::Status),
            Ok(Route::Renewal(sender)) => self.renew(sender, &publish),
            Ok(Route::Shadow(sender)) => self.ask_shadow(sender, &publish),
            Ok(Route::Response(sender)) => self.respond(sender, &publish),
            Ok(Route::Provision) => self.provision(&publish),
            Ok(Route::Live) => self.pass_on(publish),
            Err(text) => return self.deny(publish, text),
        }
        Ok(())
    }

    /// Counts a message against what the client may send. One that sends more is not read for a while, or has to go.
    fn charge(&mut self, publish: &Publish) -> Result<(), End> {
        let Some(throttle) = &mut self.throttle else { return Ok(()) };
        let Err(excess) = throttle.pass(publish.topic.len() + publish.payload.len()) else { return Ok(()) };
        let shared = &self.shared;
        shared.metrics.hit(excess.limit);
        if throttle.is_worth_noting(Instant::now()) {
            let detail = json!({ "limit": excess.limit.label() });
            shared.events.note(self.presence.event(Kind::RateLimited, detail, shared.clock.now_ms()));
        }
        match shared.settings.rate_excess {
            RateExcess::Wait => Ok(()),
            RateExcess::Disconnect => Err(violation(Reason::MessageRateTooHigh, "more than this connection may send")),
        }
    }

    /// A number may stand for the topic (MQTT 5 §3.3.2.3.4).
    fn resolve_alias(&mut self, publish: &mut Publish) -> Result<(), End> {
        let Some(alias) = publish.topic_alias.take() else { return Ok(()) };
        if alias.get() > self.shared.settings.topic_alias_maximum {
            return Err(violation(Reason::TopicAliasInvalid, "the topic alias is above Topic Alias Maximum"));
        }
        if publish.topic.is_empty() {
            let Some(topic) = self.aliases_in.get(&alias) else {
                return Err(violation(Reason::ProtocolError, "a topic alias that stands for nothing yet"));
            };
            publish.topic = topic.clone();
        } else {
            // A copy: the topic itself is a slice of everything that was read with it.
            self.aliases_in.insert(alias, ByteString::from(&*publish.topic));
        }
        Ok(())
    }

    /// The same QoS 2 message again (MQTT 5 §4.3.3): answered like the first, and that is all.
    fn received_again(&mut self, packet_id: PacketId) {
        if !self.pending.iter().any(|pending| pending.packet_id == packet_id && pending.is_qos2) {
            self.send(Outgoing::PubRec(&Ack::new(packet_id, Reason::Success)));
        }
    }

    /// Receive Maximum (MQTT 5 §4.9): what is not yet finished counts. A 3.1.1 client cannot be told of it; it is not
    /// read while too much is unanswered, and one that never releases its QoS 2 messages is closed.
    fn check_window(&self, qos: QoS) -> Result<(), End> {
        let answered =
            if qos == QoS::ExactlyOnce || self.encoder.version() == Version::V5 { self.received.len() } else { 0 };
        let pending_qos1 = self.pending.iter().filter(|pending| !pending.is_qos2).count();
        if pending_qos1 + answered >= usize::from(self.shared.settings.receive_maximum) {
            self.shared.metrics.hit(Limit::ReceiveMaximum);
            return Err(violation(Reason::ReceiveMaximumExceeded, "more unfinished messages than Receive Maximum"));
        }
        Ok(())
    }

    /// Says no: with a reason at QoS 1 and 2 of MQTT 5; 3.1.1 can only be closed (3.1.1 §3.3.5), but for a gateway, whose
    /// message is put aside.
    fn deny(&mut self, publish: Publish, text: &'static str) -> Result<(), End> {
        self.shared.metrics.denied.with_label_values(&["publish"]).inc();
        if self.encoder.version() == Version::V5 {
            self.answer_now(&publish, Reason::NotAuthorized, text);
            return Ok(());
        }
        let gateway = self.rights.put_aside_for(&publish.topic).ok_or(End::Denied)?;
        self.store(gateway, publish, What::Refused);
        Ok(())
    }

    /// Hands a message to its writer; it is acknowledged when that has committed it, and the store all that follows.
    fn store(&mut self, sender: Arc<Sender>, publish: Publish, what: fn(Incoming) -> What) {
        let incoming = self.incoming(publish);
        let item = Item::new(sender, self.shared.clock.now_ms(), what(incoming));
        self.offer(item);
    }

    /// Hands a signing request to whoever answers it; nothing is read until it is answered.
    fn renew(&mut self, sender: Arc<Sender>, publish: &Publish) {
        let (proof, address) = (self.presence.principal().proof, self.presence.address());
        // It may wait for long: it must not hold everything that was read with it.
        let (by, incoming) = (renewal::By { sender, proof, address }, self.incoming(publish.detached()));
        let shared = self.shared.clone();
        self.stalled = Some(Box::pin(async move { shared.renewals.ask(by, incoming).await }));
    }

    /// Hands what a device says or asks about its shadow to whoever answers it; nothing is read until it is answered.
    fn ask_shadow(&mut self, sender: Arc<Sender>, publish: &Publish) {
        let incoming = self.incoming(publish.detached());
        let shared = self.shared.clone();
        self.stalled = Some(Box::pin(async move { shared.shadows.ask(sender, incoming).await }));
    }

    /// Hands over what a device says of a command; nothing is read until it is taken.
    fn respond(&mut self, sender: Arc<Sender>, publish: &Publish) {
        let incoming = self.incoming(publish.detached());
        let shared = self.shared.clone();
        self.stalled = Some(Box::pin(async move { shared.responses.ask(sender, incoming).await }));
    }

    /// Hands a request to come in to whoever answers it; nothing is read until it is answered.
    fn provision(&mut self, publish: &Publish) {
        let Some(by) = provisioning::By::of(&self.presence.principal(), self.presence.address()) else { return };
        let incoming = self.incoming(publish.detached());
        let shared = self.shared.clone();
        self.stalled = Some(Box::pin(async move { shared.provisioning.ask(by, incoming).await }));
    }

    fn incoming(&mut self, publish: Publish) -> Incoming {
        let receipt = publish.packet_id.map(|packet_id| self.expect_answer(packet_id, publish.qos));
        let received = match (&self.durable, publish.packet_id) {
            (Some(session), Some(packet_id)) if publish.qos == QoS::ExactlyOnce => Some((session.clone(), packet_id)),
            _ => None,
        };
        Incoming { publish, from: Some(self.subscriber_id()), receipt, received }
    }

    fn expect_answer(&mut self, packet_id: PacketId, qos: QoS) -> Receipt {
        let is_qos2 = qos == QoS::ExactlyOnce;
        if is_qos2 {
            self.received.insert(packet_id);
        }
        let ticket = self.first_ticket + self.pending.len() as u64;
        self.pending.push_back(Pending { packet_id, is_qos2, is_ready: false, reason: Reason::Success, text: "" });
        Receipt { mailbox: self.mailbox.clone(), what: Settled::Ticket(ticket) }
    }

    pub(super) fn offer(&mut self, item: Item) {
        if let Err(item) = self.shared.ingest.offer(item) {
            let shared = self.shared.clone();
            self.stalled = Some(Box::pin(async move { shared.ingest.wait(item).await }));
        }
    }

    /// Notes what the broker sees of a device.
    pub(super) fn see(&mut self, change: fn(fleet_core::id::DeviceKey, i64) -> Change) {
        let Some(sender) = self.rights.sender().cloned() else { return };
        let now_ms = self.shared.clock.now_ms();
        let change = change(sender.device, now_ms);
        self.offer(Item::new(sender, now_ms, What::Seen(change)));
    }

    /// Routes a message that is not stored as a row of its own.
    fn pass_on(&mut self, publish: Publish) {
        let retained = publish.retain;
        if retained && self.shared.store.retain(&publish).is_err() {
            return self.answer_now(&publish, Reason::QuotaExceeded, "no room for another retained message");
        }
        let incoming = self.incoming(publish);
        let receipt = incoming.receipt.as_ref().map(|receipt| receipt.what);
        match self.shared.store.route(incoming, retained) {
            Taken::Done(reason, _) => {
                self.set_answer(receipt, reason);
                if let Some(Settled::Ticket(ticket)) = receipt {
                    self.answer(ticket);
                }
                self.acknowledge();
            }
            Taken::Keep(reason, op) => {
                self.set_answer(receipt, reason);
                self.keep(op);
            }
        }
    }

    fn set_answer(&mut self, receipt: Option<Settled>, reason: Reason) {
        if receipt.is_some()
            && let Some(last) = self.pending.back_mut()
        {
            last.reason = reason;
        }
    }

    fn answer_now(&mut self, publish: &Publish, reason: Reason, text: &'static str) {
        let Some(packet_id) = publish.packet_id else { return };
        let is_qos2 = publish.qos == QoS::ExactlyOnce;
        self.pending.push_back(Pending { packet_id, is_qos2, is_ready: true, reason, text });
        self.acknowledge();
    }

    /// What was received under this ticket is kept.
    pub(super) fn answer(&mut self, ticket: u64) {
        let place = ticket.checked_sub(self.first_ticket).and_then(|place| usize::try_from(place).ok());
        if let Some(pending) = place.and_then(|place| self.pending.get_mut(place)) {
            pending.is_ready = true;
        }
    }

    /// Answers those whose turn has come.
    pub(super) fn acknowledge(&mut self) {
        while let Some(pending) = self.pending.pop_front_if(|pending| pending.is_ready) {
            self.first_ticket += 1;
            let reason_string = (!pending.text.is_empty()).then(|| ByteString::from_static(pending.text));
            let ack = Ack { packet_id: pending.packet_id, reason: pending.reason, reason_string };
            if pending.is_qos2 {
                self.send(Outgoing::PubRec(&ack));
            } else {
                self.send(Outgoing::PubAck(&ack));
            }
        }
        if self.pending.is_empty() {
            self.pending = std::collections::VecDeque::new();
        }
    }

    /// The client releases a QoS 2 message: its packet id is free when that is kept (MQTT 5 §4.3.3).
    fn pub_rel(&mut self, ack: &Ack) -> Result<(), End> {
        let packet_id = ack.packet_id;
        if self.pending.iter().any(|pending| pending.packet_id == packet_id && pending.is_qos2) {
            return Err(violation(Reason::ProtocolError, "PUBREL before its PUBREC"));
        }
        if !self.received.contains(&packet_id) {
            self.send(Outgoing::PubComp(&Ack::new(packet_id, Reason::PacketIdentifierNotFound)));
        } else if let Some(session) = &self.durable {
            let receipt = Receipt { mailbox: self.mailbox.clone(), what: Settled::Change };
            let op = Op::Complete { session: session.clone(), packet_id, receipt };
            self.later.push_back(Later::PubComp(packet_id));
            self.keep(op);
        } else {
            self.received.remove(&packet_id);
            self.send(Outgoing::PubComp(&Ack::new(packet_id, Reason::Success)));
        }
        Ok(())
    }

    // Answers to what the client was sent

    /// The last answer to a message. One of nothing is ignored: it may have crossed an expiry (MQTT 5 §4.4).
    fn finish_exchange(&mut self, ack: &Ack, awaited: Awaits) {
        if let Some(sent) = self.inflight.end(ack.packet_id, awaited) {
            self.forget(&sent);
            if let Some((device, command)) = sent.command.filter(|_| !ack.reason.is_failure()) {
                self.announce(News::Delivered(device, command));
            }
        }
    }

    /// A message has reached the client, or never will: it leaves the session's queue.
    pub(super) fn forget(&mut self, sent: &Sent) {
        if let (Some(offset), Some(session)) = (sent.offset, &self.durable) {
            self.keep(Op::Acknowledge { session: session.clone(), offset, bytes: sent.bytes });
        }
    }

    /// The client has a QoS 2 message. That must be kept before it is told so: else, after a crash, it would be sent the
    /// message again, and take it for a new one.
    fn pub_rec(&mut self, ack: &Ack) {
        let packet_id = ack.packet_id;
        let Some(sent) = self.inflight.get(packet_id) else {
            return self.send(Outgoing::PubRel(&Ack::new(packet_id, Reason::PacketIdentifierNotFound)));
        };
        match sent.awaits {
            Awaits::Ack => {}
            Awaits::Rec if ack.reason.is_failure() => self.finish_exchange(ack, Awaits::Rec),
            Awaits::Rec => {
                sent.awaits = Awaits::Comp;
                match (sent.offset, &self.durable) {
                    (Some(offset), Some(session)) => {
                        let receipt = Receipt { mailbox: self.mailbox.clone(), what: Settled::Change };
                        let op = Op::Release { session: session.clone(), offset, receipt };
                        self.later.push_back(Later::PubRel(packet_id));
                        self.keep(op);
                    }
                    _ => self.send(Outgoing::PubRel(&Ack::new(packet_id, Reason::Success))),
                }
            }
            Awaits::Comp => {
                let is_waiting = self.later.iter().any(|later| matches!(later, Later::PubRel(id) if *id == packet_id));
                if !is_waiting {
                    self.send(Outgoing::PubRel(&Ack::new(packet_id, Reason::Success)));
                }
            }
        }
    }
}
