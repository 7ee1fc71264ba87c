//! An exact MQTT client for tests: does one thing at a time, and nothing by itself.
//!
//! What comes while something else is awaited is kept in its order. A PUBLISH is acknowledged when a test takes it by
//! [`Client::message`]; one that takes it by [`Client::arrival`] acknowledges it as it likes, or never.

use std::collections::VecDeque;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

use super::PATIENCE;
use super::packet::kind::{DISCONNECT, PINGREQ, PUBACK, PUBCOMP, PUBREC, PUBREL};
use super::packet::{self, Ack, Answers, ConnAck, Connect, Packet, Property, Publish};
use super::raw::Version::{self, V5};

/// A connection of any kind.
pub(crate) trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Socket for S {}

/// One connection.
pub(crate) struct Client {
    socket: Box<dyn Socket>,
    version: Version,
    last_id: u16,
    /// Read, and not yet asked for.
    waiting: VecDeque<Packet>,
    /// The latest packets both ways, for a test that fails.
    log: VecDeque<String>,
}

/// Packets a failing test is shown.
const LOGGED: usize = 12;

impl Client {
    /// A connection on which nothing has been said.
    pub(crate) fn on(socket: Box<dyn Socket>, version: Version) -> Self {
        Self { socket, version, last_id: 0, waiting: VecDeque::new(), log: VecDeque::new() }
    }

    /// Sends the CONNECT and waits for its answer, whatever it is.
    pub(crate) async fn hello(socket: Box<dyn Socket>, connect: &Connect) -> (Self, ConnAck) {
        let mut client = Self::on(socket, connect.version);
        client.send(&connect.bytes()).await;
        match client.next().await {
            Packet::ConnAck(connack) => (client, connack),
            other => panic!("instead of a CONNACK: {other:?}"),
        }
    }

    /// Sends bytes; that the server has closed is seen when its answer is read.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        self.note(format!("-> {}", bytes[..bytes.len().min(80)].escape_ascii()));
        let _ = timeout(PATIENCE, self.socket.write_all(bytes)).await.expect("the server reads");
    }

    /// The next packet, or that the server has closed.
    pub(crate) async fn next(&mut self) -> Packet {
        match self.waiting.pop_front() {
            Some(packet) => packet,
            None => self.read().await,
        }
    }

    async fn read(&mut self) -> Packet {
        let frame = timeout(PATIENCE, self.frame()).await.expect("the server answers in time");
        let packet = frame.map_or(Packet::Closed, |(first, body)| Packet::read(self.version, first, &body));
        self.note(format!("<- {packet:.120?}"));
        packet
    }

    fn note(&mut self, line: String) {
        if self.log.len() == LOGGED {
            self.log.pop_front();
        }
        self.log.push_back(line);
    }

    /// Not to be dropped half read.
    async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let first = self.socket.read_u8().await.ok()?;
        let (mut length, mut shift) = (0, 0);
        loop {
            let byte = self.socket.read_u8().await.ok()?;
            length |= usize::from(byte & 0x7F) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut body = vec![0; length];
        self.socket.read_exact(&mut body).await.ok()?;
        Some((first, body))
    }

    /// The next packet that `wanted` takes; others keep their places.
    async fn find<T>(&mut self, what: &str, wanted: impl Fn(&Packet) -> Option<T>) -> T {
        if let Some((place, found)) =
            self.waiting.iter().enumerate().find_map(|(place, packet)| Some((place, wanted(packet)?)))
        {
            self.waiting.remove(place);
            return found;
        }
        loop {
            let packet = self.read().await;
            if let Some(found) = wanted(&packet) {
                return found;
            }
            let over = matches!(packet, Packet::Disconnect(..) | Packet::Closed);
            assert!(!over, "instead of {what}: {packet:?} after {:?}", self.waiting);
            self.waiting.push_back(packet);
        }
    }

    /// A packet id of the client's own.
    pub(crate) fn new_id(&mut self) -> u16 {
        self.last_id += 1;
        self.last_id
    }

    // Sending

    /// Publishes, under a new packet id, and sees it through; the reason of PUBACK, or of PUBREC or PUBCOMP.
    pub(crate) async fn publish(&mut self, mut publish: Publish) -> u8 {
        if publish.qos > 0 {
            publish.id = self.new_id();
        }
        self.send_publish(&publish).await;
        match publish.qos {
            0 => 0,
            1 => self.ack(PUBACK, publish.id).await.reason,
            _ => {
                let reason = self.ack(PUBREC, publish.id).await.reason;
                if reason < 0x80 { self.release(publish.id).await } else { reason }
            }
        }
    }

    /// Sends a PUBLISH as it is.
    pub(crate) async fn send_publish(&mut self, publish: &Publish) {
        let bytes = publish.bytes(self.version);
        self.send(&bytes).await;
    }

    /// Sends PUBREL and waits for PUBCOMP.
    pub(crate) async fn release(&mut self, id: u16) -> u8 {
        self.send_ack(PUBREL, id).await;
        self.ack(PUBCOMP, id).await.reason
    }

    /// Sends PUBACK, PUBREC, PUBREL or PUBCOMP.
    pub(crate) async fn send_ack(&mut self, kind: u8, id: u16) {
        self.send(&Ack::bytes(kind, id, 0)).await;
    }

    /// Waits for an acknowledgement of this kind and id.
    pub(crate) async fn ack(&mut self, kind: u8, id: u16) -> Ack {
        let wanted = |packet: &Packet| match packet {
            Packet::Ack(ack) if (ack.kind, ack.id) == (kind, id) => Some(ack.clone()),
            _ => None,
        };
        self.find(&format!("an acknowledgement {kind:#x} of {id}"), wanted).await
    }

    // Subscribing

    /// Subscribes to one filter; its code.
    pub(crate) async fn subscribe(&mut self, filter: &str, options: u8) -> u8 {
        self.subscribe_all(&[(filter, options)], &[]).await.codes[0]
    }

    /// Subscribes to one filter under an identifier; its code.
    pub(crate) async fn subscribe_as(&mut self, identifier: u32, filter: &str, options: u8) -> u8 {
        let identifier = Property::SubscriptionId(packet::Varint(identifier));
        self.subscribe_all(&[(filter, options)], &[identifier]).await.codes[0]
    }

    /// Subscribes, and checks that there is an answer for each filter.
    pub(crate) async fn subscribe_all(&mut self, filters: &[(&str, u8)], properties: &[Property]) -> Answers {
        let id = self.new_id();
        let filters: Vec<_> = filters.iter().map(|(filter, options)| ((*filter).to_owned(), *options)).collect();
        self.send(&packet::subscribe(self.version, id, &filters, properties)).await;
        let wanted = |packet: &Packet| match packet {
            Packet::SubAck(answers) if answers.id == id => Some(answers.clone()),
            _ => None,
        };
        let answers = self.find("a SUBACK", wanted).await;
        assert_eq!(answers.codes.len(), filters.len(), "§3.9.3 a code for each filter");
        answers
    }

    /// Unsubscribes; the codes (none in 3.1.1).
    pub(crate) async fn unsubscribe(&mut self, filters: &[&str]) -> Vec<u8> {
        let id = self.new_id();
        let filters: Vec<_> = filters.iter().map(|filter| (*filter).to_owned()).collect();
        self.send(&packet::unsubscribe(self.version, id, &filters)).await;
        let wanted = |packet: &Packet| match packet {
            Packet::UnsubAck(answers) if answers.id == id => Some(answers.codes.clone()),
            _ => None,
        };
        self.find("an UNSUBACK", wanted).await
    }

    // Receiving

    /// The next message, as it came; it stays unacknowledged.
    pub(crate) async fn arrival(&mut self) -> Publish {
        let wanted = |packet: &Packet| match packet {
            Packet::Publish(publish) => Some(publish.clone()),
            _ => None,
        };
        self.find("a message", wanted).await
    }

    /// The next message, acknowledged as its QoS asks.
    pub(crate) async fn message(&mut self) -> Publish {
        let publish = self.arrival().await;
        self.acknowledge(&publish).await;
        publish
    }

    /// The next messages, acknowledged.
    pub(crate) async fn messages(&mut self, count: usize) -> Vec<Publish> {
        let mut messages = Vec::new();
        while messages.len() < count {
            messages.push(self.message().await);
        }
        messages
    }

    /// Acknowledges to the end.
    pub(crate) async fn acknowledge(&mut self, publish: &Publish) {
        match publish.qos {
            0 => {}
            1 => self.send_ack(PUBACK, publish.id).await,
            _ => {
                self.send_ack(PUBREC, publish.id).await;
                self.ack(PUBREL, publish.id).await;
                self.send_ack(PUBCOMP, publish.id).await;
            }
        }
    }

    /// The server is there, and has said nothing that was not asked for.
    pub(crate) async fn is_quiet(&mut self, why: &str) {
        self.send(&[PINGREQ, 0]).await;
        assert_eq!(self.next().await, Packet::Pong, "{why}");
    }

    // Ending

    /// Says good-bye and waits until the server has closed.
    pub(crate) async fn disconnect(self) {
        self.disconnect_with(0, &[]).await;
    }

    /// Says good-bye with a reason and properties (MQTT 5) and waits until the server has closed.
    pub(crate) async fn disconnect_with(mut self, reason: u8, properties: &[Property]) {
        self.send(&packet::reasoned(DISCONNECT, reason, properties)).await;
        while self.next().await != Packet::Closed {}
    }

    /// The server ends the connection with this reason (MQTT 5) or by closing (3.1.1); other packets may come before.
    pub(crate) async fn ends_with(mut self, reason: u8, rule: &str) -> Vec<Property> {
        let mut properties = Vec::new();
        if self.version == V5 {
            let disconnect = |packet: &Packet| match packet {
                Packet::Disconnect(reason, properties) => Some((*reason, properties.clone())),
                _ => None,
            };
            let (seen, with) = self.find("a DISCONNECT", disconnect).await;
            assert_eq!(seen, reason, "{rule}: {with:?}");
            properties = with;
        }
        self.closes(rule).await;
        properties
    }

    /// As [`Client::ends_with`] where the server is `exact`; another may close without giving its reason.
    pub(crate) async fn ends(self, exact: bool, reason: u8, rule: &str) {
        if exact {
            self.ends_with(reason, rule).await;
        } else {
            self.closes(rule).await;
        }
    }

    /// The server closes the connection; whether it says why is its own affair.
    pub(crate) async fn closes(mut self, rule: &str) {
        while !matches!(timeout(PATIENCE, self.next()).await.expect(rule), Packet::Closed) {}
    }

    /// Closes the socket without a word.
    pub(crate) fn vanish(self) {
        drop(self);
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("a connection's last packets:");
            self.log.iter().for_each(|line| eprintln!("  {line}"));
        }
    }
}
