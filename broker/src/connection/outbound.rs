//! What the client is sent.

use std::num::NonZeroU16;

use bytestring::ByteString;
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Connection, MAX_OUTBOUND_BYTES};
use crate::inflight::{Awaits, Sent};
use crate::mailbox::{Delivery, Stage};
use crate::metrics::Limit;
use crate::rows;
use crate::store::Op;
use crate::wire::{Ack, Outgoing, PacketId, Publish, QoS, Reason, TooLarge};

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Sends what waits, as far as the client's window and the socket allow.
    pub(super) fn send_deliveries(&mut self) {
        while self.stream.outbound.len() < MAX_OUTBOUND_BYTES && self.stalled.is_none() {
            let Some(delivery) = self.next_delivery() else { break };
            if let Some(delivery) = self.deliver(delivery) {
                self.held = Some(Box::new(delivery));
                return;
            }
        }
        if let Some(session) = self.durable.as_ref().filter(|_| self.held.is_none() && self.mailbox.take_more()) {
            self.keep(Op::Load { session: session.clone() });
        }
    }

    fn next_delivery(&mut self) -> Option<Delivery> {
        let held = self.held.take().map(|held| *held);
        held.or_else(|| self.mailbox.take_delivery()).or_else(|| self.feed())
    }

    /// Sends one message; it comes back when the client's window has no room for it.
    fn deliver(&mut self, mut delivery: Delivery) -> Option<Delivery> {
        let bytes = rows::queue_bytes(&delivery.publish);
        let offset = delivery.offset;
        let command = self.rights.command_in(&delivery.publish.topic);
        let sent = |packet_id, awaits| Sent { packet_id, awaits, offset, bytes, shared: None, command };
        if !(delivery.age() && self.may_have(&delivery)) {
            self.forget(&sent(PacketId::MIN, Awaits::Ack));
            return None;
        }
        if delivery.publish.qos == QoS::AtMostOnce {
            self.write(&delivery.publish).ok();
            return None;
        }
        let Some(packet_id) = self.inflight.next_id(offset) else { return Some(delivery) };
        if delivery.stage == Stage::Released {
            self.send(Outgoing::PubRel(&Ack::new(packet_id, Reason::Success)));
            self.inflight.begin(sent(packet_id, Awaits::Comp));
            return None;
        }
        let awaits = if delivery.publish.qos == QoS::ExactlyOnce { Awaits::Rec } else { Awaits::Ack };
        let mut sent = sent(packet_id, awaits);
        delivery.publish.packet_id = Some(packet_id);
        if self.write(&delivery.publish).is_err() {
            self.forget(&sent);
            return None;
        }
        self.sent_to = self.sent_to.max(offset.unwrap_or_default());
        if delivery.group.is_some() && offset.is_none() {
            sent.shared = Some(Box::new(delivery));
        }
        self.inflight.begin(sent);
        None
    }

    /// Whether the client may receive this now. A clean session whose rights are those it began with was asked when it
    /// subscribed; others may have lost the right to what has waited for them.
    fn may_have(&self, delivery: &Delivery) -> bool {
        let is_judged = self.durable.is_some() || self.is_changed;
        if !is_judged || delivery.stage == Stage::Released || self.rights.may_receive(&delivery.publish.topic) {
            return true;
        }
        self.shared.metrics.denied.with_label_values(&["receive"]).inc();
        false
    }

    /// Writes a PUBLISH. One that is too large for the client is not sent, and treated as if it had been (MQTT 5
    /// §3.1.2.11.4).
    fn write(&mut self, publish: &Publish) -> Result<(), TooLarge> {
        let written = match self.alias_for(&publish.topic) {
            Alias::None => self.encoder.encode(Outgoing::Publish(publish), &mut self.stream.outbound),
            Alias::Known(alias) => {
                let short = Publish { topic: ByteString::new(), topic_alias: Some(alias), ..publish.clone() };
                self.encoder.encode(Outgoing::Publish(&short), &mut self.stream.outbound)
            }
            Alias::New(alias) => {
                let named = Publish { topic_alias: Some(alias), ..publish.clone() };
                let written = self.encoder.encode(Outgoing::Publish(&named), &mut self.stream.outbound);
                if written.is_ok() {
                    // A copy: the topic itself is a slice of everything that was read with it.
                    self.aliases_out.insert(ByteString::from(&*publish.topic), alias);
                }
                written
            }
        };
        // A number makes a packet of a short topic larger.
        let written = written.or_else(|_| self.encoder.encode(Outgoing::Publish(publish), &mut self.stream.outbound));
        match written {
            Ok(()) => {
                self.shared.metrics.deliveries.inc();
                self.presence.counts.messages_out.add(1);
                if let Some(trace) = &self.trace {
                    trace.sent(&Outgoing::Publish(publish));
                }
            }
            Err(TooLarge) => self.shared.metrics.hit(Limit::ClientPacketBytes),
        }
        written
    }

    /// The number of a topic (MQTT 5 §3.3.2.3.4): the first topics get one, as many as the client takes.
    fn alias_for(&self, topic: &str) -> Alias {
        if self.max_aliases_out == 0 {
            return Alias::None;
        }
        if let Some(known) = self.aliases_out.get(topic) {
            return Alias::Known(*known);
        }
        let next = u16::try_from(self.aliases_out.len() + 1).ok().filter(|next| *next <= self.max_aliases_out);
        next.and_then(NonZeroU16::new).map_or(Alias::None, Alias::New)
    }

    /// Gives what a clean session leaves of shared subscriptions to their other members: what the client has not
    /// acknowledged at QoS 1, and what it was not sent. A QoS 2 message that was sent goes to nobody else (§4.8.2).
    pub(super) async fn hand_on(&mut self) {
        let sent = self.inflight.take().into_iter().filter(|sent| sent.awaits == Awaits::Ack);
        let unacknowledged: Vec<_> = sent.filter_map(|sent| sent.shared).map(|delivery| *delivery).collect();
        let held = self.held.take().map(|held| *held);
        let waiting: Vec<_> = held.into_iter().chain(std::iter::from_fn(|| self.mailbox.take_delivery())).collect();
        for delivery in unacknowledged.into_iter().chain(waiting) {
            let Some(key) = delivery.group.clone() else { continue };
            let delivery = Delivery { publish: Publish { packet_id: None, ..delivery.publish }, ..delivery };
            if let Some(target) = self.shared.router.hand_on(&key, &delivery, self.number) {
                self.shared.store.hand_on(delivery, target).await;
            }
        }
    }
}

enum Alias {
    None,
    Known(NonZeroU16),
    New(NonZeroU16),
}
