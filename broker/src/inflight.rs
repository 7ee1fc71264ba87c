//! Messages sent to a client and not yet finished, bounded by its Receive Maximum (MQTT 5 §4.9).
//!
//! Holds: packet ids in flight are distinct. In a durable session the id follows from the message's place in the
//! queue, so that after a restart a message is sent again under the same id (MQTT 5 §4.4) without its ever having
//! been written down.

use std::collections::VecDeque;

use fleet_core::id::{CommandId, DeviceKey};

use crate::mailbox::Delivery;
use crate::wire::PacketId;

/// What the client has to send next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Awaits {
    /// PUBACK: QoS 1.
    Ack,
    /// PUBREC: QoS 2, first half.
    Rec,
    /// PUBCOMP: QoS 2, second half.
    Comp,
}

/// A message in flight.
#[derive(Debug)]
pub(crate) struct Sent {
    pub(crate) packet_id: PacketId,
    pub(crate) awaits: Awaits,
    /// Its place in the queue of a durable session.
    pub(crate) offset: Option<i64>,
    /// What it counts for there.
    pub(crate) bytes: i64,
    /// Kept when another member of a shared subscription may have to take over.
    pub(crate) shared: Option<Box<Delivery>>,
    /// The command that it asks its device to do.
    pub(crate) command: Option<(DeviceKey, CommandId)>,
}

/// The window of one connection.
#[derive(Debug)]
pub(crate) struct Inflight {
    window: u16,
    sent: VecDeque<Sent>,
    last: u16,
}

impl Inflight {
    pub(crate) fn new(window: u16) -> Self {
        Self { window, sent: VecDeque::new(), last: 0 }
    }

    /// The packet id for the next message, where one may be sent now: the window has room, and the id of the message
    /// at this place in the queue is free.
    pub(crate) fn next_id(&mut self, offset: Option<i64>) -> Option<PacketId> {
        if self.sent.len() >= usize::from(self.window) {
            return None;
        }
        match offset {
            Some(offset) => Some(id_of(offset)).filter(|id| self.find(*id).is_none()),
            None => Some(self.unused()),
        }
    }

    /// Fewer than 65,535 are in flight, so there is one (MQTT 5 §2.2.1).
    fn unused(&mut self) -> PacketId {
        loop {
            self.last = self.last.wrapping_add(1);
            if let Some(id) = PacketId::new(self.last)
                && self.find(id).is_none()
            {
                return id;
            }
        }
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.sent.len()
    }

    /// Notes a message that was sent.
    pub(crate) fn begin(&mut self, sent: Sent) {
        self.sent.push_back(sent);
    }

    /// A message in flight.
    pub(crate) fn get(&mut self, id: PacketId) -> Option<&mut Sent> {
        let place = self.find(id)?;
        self.sent.get_mut(place)
    }

    /// Ends one that awaits just this; `None` when there is no such message.
    pub(crate) fn end(&mut self, id: PacketId, awaits: Awaits) -> Option<Sent> {
        let place = self.find(id).filter(|place| self.sent[*place].awaits == awaits)?;
        let sent = self.sent.remove(place);
        if self.sent.is_empty() {
            self.sent = VecDeque::new();
        }
        sent
    }

    /// Gives up all that is in flight.
    pub(crate) fn take(&mut self) -> VecDeque<Sent> {
        std::mem::take(&mut self.sent)
    }

    fn find(&self, id: PacketId) -> Option<usize> {
        self.sent.iter().position(|sent| sent.packet_id == id)
    }
}

/// Places in a queue count from 1; so do packet ids, which begin again after 65,535.
fn id_of(offset: i64) -> PacketId {
    let id = 1 + (offset - 1).rem_euclid(i64::from(u16::MAX));
    u16::try_from(id).ok().and_then(PacketId::new).expect("1 to 65,535")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(inflight: &mut Inflight, offset: Option<i64>) -> Option<PacketId> {
        let packet_id = inflight.next_id(offset)?;
        inflight.begin(Sent { packet_id, awaits: Awaits::Ack, offset, bytes: 0, shared: None, command: None });
        Some(packet_id)
    }

    #[test]
    fn packet_ids_in_flight_are_distinct_and_bounded_by_the_window() {
        let mut inflight = Inflight::new(3);
        let ids: Vec<_> = std::iter::from_fn(|| send(&mut inflight, None)).collect();
        assert_eq!(ids.len(), 3);
        assert!(inflight.end(ids[1], Awaits::Rec).is_none(), "it awaits something else");
        assert!(inflight.end(ids[1], Awaits::Ack).is_some());
        assert!(inflight.end(ids[1], Awaits::Ack).is_none(), "it has ended already");
        inflight.last = ids[0].get() - 1;
        assert_eq!(send(&mut inflight, None), Some(ids[1]), "an id in use is not given twice");
    }

    #[test]
    fn in_a_durable_session_the_id_follows_from_the_place() {
        let mut inflight = Inflight::new(u16::MAX);
        assert_eq!(send(&mut inflight, Some(1)).map(PacketId::get), Some(1));
        assert_eq!(send(&mut inflight, Some(65_535)).map(PacketId::get), Some(65_535));
        assert_eq!(send(&mut inflight, Some(65_536)), None, "its id is still in flight");
        inflight.end(PacketId::MIN, Awaits::Ack).unwrap();
        assert_eq!(send(&mut inflight, Some(65_536)).map(PacketId::get), Some(1));
    }
}
