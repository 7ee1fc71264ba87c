//! A client that attacks by a seed: packets that are right, nearly right and wrong, in any order and at any pace.
//!
//! Believes nothing: what the server sends must follow the grammar, and keep within what this client asked for in its
//! CONNECT. One seed gives one script; what the server makes of several attackers at once is its own choice.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep, timeout};

use super::packet::kind::{
    AUTH, DISCONNECT, PINGREQ, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBSCRIBE, UNSUBSCRIBE,
};
use super::packet::{self, Ack, Connect, Packet, Property, Publish, Varint, Will, property, user};
use super::raw::Version::{self, V5, V311};

/// Few, so that attackers take each other's sessions over.
const CLIENT_IDS: [&str; 8] = ["c0", "c1", "c2", "c3", "c4", "c5", "c6", "c7"];
/// A server that reads nothing for so long is left.
const WRITE_WITHIN: Duration = Duration::from_millis(500);
/// Packets an attacker is told of when the server was wrong.
const LOGGED: usize = 30;

/// Who may be attacked from.
pub(crate) struct Target {
    pub(crate) address: SocketAddr,
    pub(crate) accounts: Vec<Account>,
}

/// Whose rights an attacker abuses.
pub(crate) struct Account {
    pub(crate) username: String,
    pub(crate) password: String,
    /// Topics below it are allowed.
    pub(crate) base: String,
}

/// What all attackers did.
#[derive(Default, Debug)]
pub(crate) struct Tally {
    pub(crate) connections: AtomicU64,
    pub(crate) welcomed: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) mangled: AtomicU64,
    pub(crate) received: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// One attacker: one connection after another.
pub(crate) struct Attacker {
    rng: ChaCha8Rng,
    target: Arc<Target>,
    tally: Arc<Tally>,
}

impl Attacker {
    pub(crate) fn new(seed: u64, number: u64, target: Arc<Target>, tally: Arc<Tally>) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        rng.set_stream(number);
        Self { rng, target, tally }
    }

    pub(crate) async fn attack(mut self, until: Instant) {
        while Instant::now() < until {
            let Ok(socket) = TcpStream::connect(self.target.address).await else {
                sleep(Duration::from_millis(50)).await;
                continue;
            };
            count(&self.tally.connections);
            self.live(socket).await;
        }
    }

    /// Connects, does what comes to its mind, goes as it likes.
    async fn live(&mut self, socket: TcpStream) {
        let target = self.target.clone();
        let account = target.accounts.choose(&mut self.rng).expect("there are accounts");
        let mut link = Link::new(socket, account.base.clone(), self.tally.clone());
        if !self.enter(&mut link, account).await {
            return;
        }
        for _ in 0..self.rng.random_range(1..200) {
            if !self.step(&mut link).await {
                return;
            }
        }
        self.leave(link).await;
    }

    fn one_in(&mut self, times: u32) -> bool {
        self.rng.random_ratio(1, times)
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        *of.choose(&mut self.rng).expect("there is a choice")
    }

    // Entering

    /// `false`: the server has closed.
    async fn enter(&mut self, link: &mut Link, account: &Account) -> bool {
        if self.one_in(40) {
            // It knocks and says nothing, or something else.
            let noise: Vec<u8> = (0..self.rng.random_range(0..60)).map(|_| self.rng.random()).collect();
            return link.write(&noise).await && link.listen(Duration::from_millis(20)).await && self.one_in(2);
        }
        let (connect, terms) = self.connect(account);
        link.note(|| format!("-> {connect:?}"));
        let mut bytes = connect.bytes();
        match self.rng.random_range(0..30) {
            0 => bytes = self.mangle(bytes),
            1 => bytes.truncate(self.rng.random_range(1..bytes.len())),
            _ => link.terms = Some(terms),
        }
        link.write(&bytes).await && link.listen(Duration::from_millis(30)).await
    }

    fn connect(&mut self, account: &Account) -> (Connect, Terms) {
        let version = self.pick(&[V311, V5]);
        let password = if self.one_in(30) { "wrong".to_owned() } else { account.password.clone() };
        let client_id = if self.one_in(20) { "" } else { self.pick(&CLIENT_IDS) };
        let mut connect = Connect::new(version, client_id, Some((account.username.clone(), password)));
        connect.keep_alive_s = self.pick(&[0, 0, 1, 60]);
        if self.one_in(3) {
            connect = connect.will(self.will(version, &account.base));
        }
        let mut terms = Terms { version, receive_maximum: u16::MAX, largest: usize::MAX, aliases: 0, chatty: true };
        if version == V311 {
            connect.clean = self.one_in(2);
            return (connect, terms);
        }
        connect.clean = self.one_in(3);
        if !self.one_in(4) {
            connect.properties.push(Property::SessionExpiry(self.pick(&[0, 1, 5, 60, u32::MAX])));
        }
        if self.one_in(2) {
            terms.receive_maximum = self.rng.random_range(1..20);
            connect.properties.push(Property::ReceiveMaximum(terms.receive_maximum));
        }
        if self.one_in(4) {
            let largest = self.pick(&[20_u32, 64, 300, 5_000]);
            terms.largest = largest as usize;
            connect.properties.push(Property::MaximumPacketSize(largest));
        }
        if self.one_in(2) {
            terms.aliases = self.rng.random_range(0..6);
            connect.properties.push(Property::TopicAliasMaximum(terms.aliases));
        }
        if self.one_in(4) {
            terms.chatty = false;
            connect.properties.push(Property::RequestProblemInformation(0));
        }
        (connect, terms)
    }

    fn will(&mut self, version: Version, base: &str) -> Will {
        let topic = self.topic(base);
        let qos = self.rng.random_range(0..3);
        let properties = if version == V5 && self.one_in(2) {
            vec![Property::WillDelay(self.pick(&[0, 1, 3])), Property::MessageExpiry(self.pick(&[1, 60]))]
        } else {
            Vec::new()
        };
        Will { topic, payload: b"gone".to_vec(), qos, retain: self.one_in(3), properties }
    }

    // In the midst

    /// Says something and listens a while; `false`: the server has closed.
    async fn step(&mut self, link: &mut Link) -> bool {
        let mut bytes = self.say(link);
        if self.one_in(8) {
            // Many in one piece.
            for _ in 0..self.rng.random_range(1..30) {
                bytes.extend(self.say(link));
            }
        }
        let written = match self.rng.random_range(0..40) {
            0 => {
                count(&self.tally.mangled);
                link.honest = false;
                let broken = self.mangle(bytes);
                link.write(&broken).await
            }
            1 => {
                // In two pieces.
                let (first, second) = bytes.split_at(self.rng.random_range(0..=bytes.len()));
                let pause = Duration::from_millis(self.rng.random_range(0..20));
                link.write(first).await && link.listen(pause).await && link.write(second).await
            }
            2 => {
                // Deaf for a while.
                sleep(Duration::from_millis(self.rng.random_range(20..300))).await;
                link.write(&bytes).await
            }
            _ => link.write(&bytes).await,
        };
        let pause = Duration::from_millis(self.pick(&[0, 1, 1, 2, 5, 15]));
        written && link.listen(pause).await
    }

    /// The bytes of a packet.
    fn say(&mut self, link: &mut Link) -> Vec<u8> {
        count(&self.tally.sent);
        match self.rng.random_range(0..100) {
            0..36 => self.publish(link),
            36..46 => self.subscribe(link),
            46..49 => self.unsubscribe(link),
            49..79 => self.answer(link),
            79..95 => self.release(link),
            95..99 => vec![PINGREQ, 0],
            _ => self.nonsense(link),
        }
    }

    fn topic(&mut self, base: &str) -> String {
        match self.rng.random_range(0..120) {
            0 => {
                self.pick(&["", "/", "日本", "$SYS/broker", "a/#", "+", "a\0b", "fleet/v1/main/other/telemetry"]).into()
            }
            1 => "x/".repeat(self.rng.random_range(1..400)),
            _ => format!("{base}/{}", self.pick(&["a", "b", "a/b", "日本", "telemetry", "status", "events", "a//"])),
        }
    }

    fn filter(&mut self, base: &str) -> String {
        match self.rng.random_range(0..40) {
            0 => self.pick(&["#", "+/+", "$share/g/#", "$share/g", "$share//x", "", "a/#/b", "a+", "$SYS/#"]).into(),
            1..12 => format!("$share/{}/{base}/{}", self.pick(&["g", "h"]), self.pick(&["#", "a", "+"])),
            _ => format!("{base}/{}", self.pick(&["#", "+", "a", "+/b", "日本", "telemetry"])),
        }
    }

    fn publish(&mut self, link: &Link) -> Vec<u8> {
        let qos = self.pick(&[0, 1, 1, 2, 2]);
        let mut publish = Publish::new(self.topic(&link.base), self.payload()).qos(qos).id(self.id());
        publish.retain = self.one_in(6);
        publish.dup = qos > 0 && self.one_in(8);
        if link.version() == V5 {
            publish.properties = self.publish_properties();
            let aliased = publish.properties.iter().any(|property| matches!(property, Property::TopicAlias(_)));
            if aliased && self.one_in(4) {
                publish.topic.clear();
            }
        }
        publish.bytes(link.version())
    }

    fn payload(&mut self) -> Vec<u8> {
        match self.rng.random_range(0..12) {
            0 => Vec::new(),
            1 => vec![b'x'; 5_000],
            2 if self.one_in(10) => vec![b'x'; 100_000],
            3..6 => br#"{"temp":21.5,"door":true}"#.to_vec(),
            _ => (0..self.rng.random_range(1..40)).map(|_| self.rng.random()).collect(),
        }
    }

    fn publish_properties(&mut self) -> Vec<Property> {
        let mut properties = Vec::new();
        if self.one_in(5) {
            properties.push(Property::TopicAlias(if self.one_in(40) {
                self.pick(&[0, 17])
            } else {
                self.pick(&[1, 2, 16])
            }));
        }
        if self.one_in(5) {
            properties.push(Property::MessageExpiry(self.pick(&[0, 1, 60])));
        }
        if self.one_in(10) {
            properties.push(user("k", "v"));
            properties.push(Property::CorrelationData(vec![0, 1, 2]));
            properties.push(Property::ContentType("text".to_owned()));
        }
        if self.one_in(100) {
            properties.push(match self.rng.random_range(0..4) {
                0 => Property::ResponseTopic("a/#".to_owned()),
                1 => Property::SubscriptionId(Varint(1)),
                2 => Property::PayloadFormat(1),
                _ => Property::ReceiveMaximum(1),
            });
        }
        properties
    }

    /// Few, so that they meet.
    fn id(&mut self) -> u16 {
        if self.one_in(200) { self.pick(&[0, u16::MAX]) } else { self.rng.random_range(1..20) }
    }

    fn subscribe(&mut self, link: &Link) -> Vec<u8> {
        let v5 = link.version() == V5;
        let filters: Vec<_> = (0..self.rng.random_range(1..4))
            .map(|_| {
                let qos = self.pick(&[0, 1, 2]);
                let flags = if v5 { self.pick(&[0, 0, 4, 8, 0x10, 0x20]) } else { 0 };
                let broken = if self.one_in(200) { 0xC3 } else { 0 };
                (self.filter(&link.base), qos | flags | broken)
            })
            .collect();
        let named = v5 && self.one_in(3);
        let properties = named.then(|| Property::SubscriptionId(Varint(self.pick(&[1, 2, 268_435_455, 0]))));
        packet::subscribe(link.version(), self.id(), &filters, properties.as_slice())
    }

    fn unsubscribe(&mut self, link: &Link) -> Vec<u8> {
        let filters = [self.filter(&link.base), self.filter(&link.base)];
        packet::unsubscribe(link.version(), self.id(), &filters)
    }

    /// Acknowledges what came: mostly as it should, in no order, now and then wrongly or what never came.
    fn answer(&mut self, link: &mut Link) -> Vec<u8> {
        if link.open.is_empty() || self.one_in(25) {
            link.honest = false;
            let kind = self.pick(&[PUBACK, PUBREC, PUBCOMP]);
            return Ack::bytes(kind, self.id(), 0);
        }
        let place = if self.one_in(3) { self.rng.random_range(0..link.open.len()) } else { 0 };
        let Open { id, due, .. } = link.open[place];
        let refused = link.version() == V5 && self.one_in(20);
        match due {
            PUBREC if !refused => link.open[place].due = PUBREL,
            // The server's turn: an early answer is a wrong one.
            PUBREL => {
                link.honest = false;
                return Ack::bytes(PUBCOMP, id, 0);
            }
            _ => drop(link.open.remove(place)),
        }
        let reason = if refused && due != PUBCOMP { 0x80 } else { 0 };
        Ack::bytes(due, id, reason)
    }

    /// Releases a message the server has, or one it has not.
    fn release(&mut self, link: &mut Link) -> Vec<u8> {
        if link.received.is_empty() || self.one_in(15) {
            return Ack::bytes(PUBREL, self.id(), 0);
        }
        let place = self.rng.random_range(0..link.received.len());
        let id = if self.one_in(10) { link.received[place] } else { link.received.swap_remove(place) };
        Ack::bytes(PUBREL, id, 0)
    }

    /// What no client may say here.
    fn nonsense(&mut self, link: &mut Link) -> Vec<u8> {
        link.honest = false;
        match self.rng.random_range(0..6) {
            0 => Connect::new(link.version(), "c0", None).bytes(),
            1 => packet::reasoned(AUTH, 0x18, &[]),
            2 => vec![self.pick(&[0x00, 0x20, 0x90, 0xB0, 0xD0, 0xF1]), 0],
            3 => vec![self.pick(&[PUBLISH, SUBSCRIBE, UNSUBSCRIBE]), 0],
            4 => vec![PUBLISH, 0xFF, 0xFF, 0xFF, self.pick(&[0x7F, 0xFF])],
            _ => (0..self.rng.random_range(1..40)).map(|_| self.rng.random()).collect(),
        }
    }

    /// Breaks bytes at a few places.
    fn mangle(&mut self, mut bytes: Vec<u8>) -> Vec<u8> {
        for _ in 0..self.rng.random_range(1..4) {
            if bytes.is_empty() {
                break;
            }
            let place = self.rng.random_range(0..bytes.len());
            match self.rng.random_range(0..6) {
                0 => bytes[place] ^= 1 << self.rng.random_range(0..8),
                1 => bytes[place] = self.pick(&[0, 1, 0x7F, 0x80, 0xFF]),
                2 => bytes.truncate(place),
                3 => bytes.insert(place, self.rng.random()),
                4 => drop(bytes.remove(place)),
                _ => bytes.extend_from_within(place..),
            }
        }
        bytes
    }

    // Leaving

    async fn leave(&mut self, mut link: Link) {
        match self.rng.random_range(0..6) {
            0 => {}
            1 => drop(link.socket.set_zero_linger()),
            2 => {
                // Half-closed: it hears what is still said.
                let _ = link.socket.shutdown().await;
                while link.listen(Duration::from_millis(100)).await && !self.one_in(5) {}
            }
            3 => {
                let bytes = self.publish(&link);
                let end = self.rng.random_range(0..bytes.len());
                link.write(&bytes[..end]).await;
            }
            _ => {
                let farewell = self.farewell(&link);
                link.write(&farewell).await;
                link.listen(Duration::from_millis(50)).await;
            }
        }
    }

    fn farewell(&mut self, link: &Link) -> Vec<u8> {
        if link.version() == V311 || self.one_in(2) {
            return packet::reasoned(DISCONNECT, 0, &[]);
        }
        let expiry = self.one_in(2).then(|| Property::SessionExpiry(self.pick(&[0, 1, 60])));
        packet::reasoned(DISCONNECT, self.pick(&[0, 0x04, 0x81]), expiry.as_slice())
    }
}

/// What a CONNECT asked of the server.
struct Terms {
    version: Version,
    receive_maximum: u16,
    largest: usize,
    aliases: u16,
    /// Request Problem Information: reasons may be given.
    chatty: bool,
}

/// A message under way to us.
struct Open {
    id: u16,
    /// The packet that is to come next.
    due: u8,
    /// Whether the PUBLISH came on this connection.
    published: bool,
}

/// A connection, and what the server may say on it.
struct Link {
    socket: TcpStream,
    base: String,
    /// None: the CONNECT was broken, and the answers may be anything.
    terms: Option<Terms>,
    /// Read, and not a whole packet yet.
    inbound: Vec<u8>,
    greeted: bool,
    /// Messages under way to us.
    open: Vec<Open>,
    /// Whether all acknowledgements were right, so that the server's packet ids can be judged.
    honest: bool,
    /// Our QoS 2 messages that the server has.
    received: Vec<u16>,
    aliases: HashMap<u16, String>,
    tally: Arc<Tally>,
    log: VecDeque<String>,
}

impl Link {
    fn new(socket: TcpStream, base: String, tally: Arc<Tally>) -> Self {
        Self {
            socket,
            base,
            terms: None,
            inbound: Vec::new(),
            greeted: false,
            open: Vec::new(),
            honest: true,
            received: Vec::new(),
            aliases: HashMap::new(),
            tally,
            log: VecDeque::new(),
        }
    }

    fn version(&self) -> Version {
        self.terms.as_ref().map_or(V5, |terms| terms.version)
    }

    fn note(&mut self, line: impl FnOnce() -> String) {
        if self.log.len() == LOGGED {
            self.log.pop_front();
        }
        self.log.push_back(line());
    }

    /// `false`: it is closed, or not read from.
    async fn write(&mut self, bytes: &[u8]) -> bool {
        self.note(|| format!("-> {}", bytes[..bytes.len().min(200)].escape_ascii()));
        matches!(timeout(WRITE_WITHIN, self.socket.write_all(bytes)).await, Ok(Ok(())))
    }

    /// Takes what comes within a time; `false`: it is closed.
    async fn listen(&mut self, within: Duration) -> bool {
        let until = Instant::now() + within;
        loop {
            match tokio::time::timeout_at(until, self.socket.read_buf(&mut self.inbound)).await {
                Err(_) => return true,
                Ok(Ok(0) | Err(_)) => return false,
                Ok(Ok(_)) => self.understand(),
            }
            if Instant::now() >= until {
                return true;
            }
        }
    }

    fn understand(&mut self) {
        while let Some((header, whole)) = extent(&self.inbound) {
            let frame: Vec<u8> = self.inbound.drain(..whole).collect();
            count(&self.tally.received);
            let Some(terms) = &self.terms else { continue };
            let packet = Packet::read(terms.version, frame[0], &frame[header..]);
            self.note(|| format!("<- {packet:.200?}"));
            self.judge(packet, frame.len());
        }
    }

    fn judge(&mut self, packet: Packet, length: usize) {
        let terms = self.terms.as_ref().expect("judged by its terms");
        // A CONNECT that breaks the rules asks for nothing.
        let broken = matches!(&packet, Packet::ConnAck(answer) if [0x81, 0x82, 0x90].contains(&answer.code));
        assert!(broken || length <= terms.largest, "{length} bytes where {} were asked for: {packet:?}", terms.largest);
        let is_first = !std::mem::replace(&mut self.greeted, true);
        assert_eq!(is_first, matches!(packet, Packet::ConnAck(_)), "CONNACK is the first packet, and no other");
        if let Packet::Ack(Ack { properties, .. }) | Packet::SubAck(packet::Answers { properties, .. }) = &packet {
            assert!(terms.chatty || properties.is_empty(), "{packet:?} with Request Problem Information 0");
        }
        match packet {
            Packet::ConnAck(answer) if answer.code == 0 => count(&self.tally.welcomed),
            Packet::Publish(publish) => self.judge_publish(&publish),
            Packet::Ack(ack) if ack.kind == PUBREC && ack.reason < 0x80 => self.received.push(ack.id),
            Packet::Ack(ack) if ack.kind == PUBREL => match self.open.iter_mut().find(|open| open.id == ack.id) {
                Some(open) => open.due = PUBCOMP,
                None => self.open.push(Open { id: ack.id, due: PUBCOMP, published: false }),
            },
            _ => {}
        }
    }

    fn judge_publish(&mut self, publish: &Publish) {
        let terms = self.terms.as_ref().expect("judged by its terms");
        if let Some(alias) = property!(publish.properties, TopicAlias) {
            assert!((1..=terms.aliases).contains(&alias), "alias {alias} where {} were offered", terms.aliases);
            if publish.topic.is_empty() {
                assert!(self.aliases.contains_key(&alias), "alias {alias} stands for nothing");
            } else {
                self.aliases.insert(alias, publish.topic.clone());
            }
        } else {
            assert!(!publish.topic.is_empty(), "a message without a topic");
        }
        if publish.qos == 0 {
            return;
        }
        let in_use = self.open.iter().any(|open| open.id == publish.id);
        self.open.push(Open { id: publish.id, due: if publish.qos == 1 { PUBACK } else { PUBREC }, published: true });
        let (under_way, most) = (self.open.iter().filter(|open| open.published).count(), terms.receive_maximum);
        assert!(!self.honest || !in_use, "packet id {} is in use", publish.id);
        assert!(!self.honest || under_way <= usize::from(most), "{under_way} messages where {most} were asked for");
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the attacker's last packets:");
            self.log.iter().for_each(|line| eprintln!("  {line}"));
        }
    }
}

/// Length of the header and of the whole first packet, when all of it is there.
fn extent(bytes: &[u8]) -> Option<(usize, usize)> {
    let (mut length, mut header) = (0, 1);
    for shift in [0, 7, 14, 21] {
        let byte = *bytes.get(header)?;
        length |= usize::from(byte & 0x7F) << shift;
        header += 1;
        if byte & 0x80 == 0 {
            break;
        }
    }
    (bytes.len() >= header + length).then_some((header, header + length))
}
