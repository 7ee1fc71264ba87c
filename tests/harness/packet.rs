//! MQTT packets as the standards write them, 3.1.1 and 5, for the client's side.
//!
//! Shares no code with the server, so that the two cannot be wrong together. Says whatever a test wants said, also what is
//! wrong. Believes nothing: a packet of the server that breaks its grammar, carries a property that does not belong there
//! or carries one twice fails the test that reads it.

use super::raw::Version::{self, V5, V311};

/// The first byte of a packet, without flags.
pub(crate) mod kind {
    pub(crate) const CONNECT: u8 = 0x10;
    pub(crate) const CONNACK: u8 = 0x20;
    pub(crate) const PUBLISH: u8 = 0x30;
    pub(crate) const PUBACK: u8 = 0x40;
    pub(crate) const PUBREC: u8 = 0x50;
    pub(crate) const PUBREL: u8 = 0x60;
    pub(crate) const PUBCOMP: u8 = 0x70;
    pub(crate) const SUBSCRIBE: u8 = 0x80;
    pub(crate) const SUBACK: u8 = 0x90;
    pub(crate) const UNSUBSCRIBE: u8 = 0xA0;
    pub(crate) const UNSUBACK: u8 = 0xB0;
    pub(crate) const PINGREQ: u8 = 0xC0;
    pub(crate) const PINGRESP: u8 = 0xD0;
    pub(crate) const DISCONNECT: u8 = 0xE0;
    pub(crate) const AUTH: u8 = 0xF0;
}
use kind::{
    AUTH, CONNACK, CONNECT, DISCONNECT, PINGRESP, PUBACK, PUBCOMP, PUBLISH, PUBREC, PUBREL, SUBACK, SUBSCRIBE,
    UNSUBACK, UNSUBSCRIBE,
};

/// What a property or a packet is made of.
trait Field: Sized {
    fn write(&self, out: &mut Vec<u8>);
    fn read(input: &mut Input<'_>) -> Self;
}

/// The bytes of a packet that are still to be read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> &'a [u8] {
        assert!(length <= self.0.len(), "the server's packet ends in the middle of a field");
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    fn get<T: Field>(&mut self) -> T {
        T::read(self)
    }

    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn rest(&mut self) -> Vec<u8> {
        self.take(self.0.len()).to_vec()
    }

    /// A block of properties of the packet `kind`; none in 3.1.1.
    fn properties(&mut self, version: Version, kind: u8) -> Vec<Property> {
        if version == V311 {
            return Vec::new();
        }
        let Varint(length) = self.get();
        let mut block = Input(self.take(length as usize));
        let mut properties: Vec<Property> = Vec::new();
        while !block.is_empty() {
            let property: Property = block.get();
            assert!(property.belongs_in(kind), "{property:?} in a packet {kind:#x} of the server");
            let repeats = matches!(property, Property::User(_))
                || (kind == PUBLISH && matches!(property, Property::SubscriptionId(_)));
            let twice = properties.iter().any(|other| other.id() == property.id());
            assert!(repeats || !twice, "{property:?} twice");
            properties.push(property);
        }
        properties
    }
}

impl Field for u8 {
    fn write(&self, out: &mut Vec<u8>) {
        out.push(*self);
    }
    fn read(input: &mut Input<'_>) -> Self {
        input.take(1)[0]
    }
}

impl Field for u16 {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.to_be_bytes());
    }
    fn read(input: &mut Input<'_>) -> Self {
        Self::from_be_bytes(input.take(2).try_into().expect("two bytes"))
    }
}

impl Field for u32 {
    fn write(&self, out: &mut Vec<u8>) {
        out.extend(self.to_be_bytes());
    }
    fn read(input: &mut Input<'_>) -> Self {
        Self::from_be_bytes(input.take(4).try_into().expect("four bytes"))
    }
}

/// A variable byte integer (§1.5.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Varint(pub(crate) u32);

impl Field for Varint {
    fn write(&self, out: &mut Vec<u8>) {
        let mut rest = self.0;
        while rest > 127 {
            out.push(rest.to_le_bytes()[0] | 0x80);
            rest >>= 7;
        }
        out.push(rest.to_le_bytes()[0]);
    }
    fn read(input: &mut Input<'_>) -> Self {
        let mut value = 0;
        for shift in [0, 7, 14, 21] {
            let byte: u8 = input.get();
            value |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return Self(value);
            }
        }
        panic!("a variable byte integer of five bytes");
    }
}

impl Field for Vec<u8> {
    fn write(&self, out: &mut Vec<u8>) {
        u16::try_from(self.len()).expect("shorter than 64 KiB").write(out);
        out.extend(self);
    }
    fn read(input: &mut Input<'_>) -> Self {
        let length: u16 = input.get();
        input.take(usize::from(length)).to_vec()
    }
}

impl Field for String {
    fn write(&self, out: &mut Vec<u8>) {
        self.as_bytes().to_vec().write(out);
    }
    fn read(input: &mut Input<'_>) -> Self {
        let text = Self::from_utf8(input.get()).expect("text is UTF-8");
        assert!(!text.contains('\0'), "text without U+0000 (§1.5.4)");
        text
    }
}

impl Field for (String, String) {
    fn write(&self, out: &mut Vec<u8>) {
        self.0.write(out);
        self.1.write(out);
    }
    fn read(input: &mut Input<'_>) -> Self {
        (input.get(), input.get())
    }
}

/// Where a property may be in what a server sends (§2.2.2.2); a test may send any anywhere.
macro_rules! properties {
    ($($id:literal $name:ident($type:ty) [$($kind:ident)*];)*) => {
        /// A property of MQTT 5, by the name the standard gives it.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub(crate) enum Property { $($name($type),)* }

        impl Property {
            fn id(&self) -> u8 {
                match self { $(Self::$name(_) => $id,)* }
            }

            fn belongs_in(&self, kind: u8) -> bool {
                match self { $(Self::$name(_) => <[u8]>::contains(&[$($kind),*], &kind),)* }
            }
        }

        impl Field for Property {
            fn write(&self, out: &mut Vec<u8>) {
                out.push(self.id());
                match self { $(Self::$name(value) => value.write(out),)* }
            }
            fn read(input: &mut Input<'_>) -> Self {
                match input.get::<u8>() {
                    $($id => Self::$name(input.get()),)*
                    other => panic!("there is no property {other:#x}"),
                }
            }
        }
    };
}

properties! {
    0x01 PayloadFormat(u8) [PUBLISH];
    0x02 MessageExpiry(u32) [PUBLISH];
    0x03 ContentType(String) [PUBLISH];
    0x08 ResponseTopic(String) [PUBLISH];
    0x09 CorrelationData(Vec<u8>) [PUBLISH];
    0x0B SubscriptionId(Varint) [PUBLISH];
    0x11 SessionExpiry(u32) [CONNACK];
    0x12 AssignedClientId(String) [CONNACK];
    0x13 ServerKeepAlive(u16) [CONNACK];
    0x15 AuthenticationMethod(String) [CONNACK AUTH];
    0x16 AuthenticationData(Vec<u8>) [CONNACK AUTH];
    0x17 RequestProblemInformation(u8) [];
    0x18 WillDelay(u32) [];
    0x19 RequestResponseInformation(u8) [];
    0x1A ResponseInformation(String) [CONNACK];
    0x1C ServerReference(String) [CONNACK DISCONNECT];
    0x1F ReasonString(String) [CONNACK PUBACK PUBREC PUBREL PUBCOMP SUBACK UNSUBACK DISCONNECT AUTH];
    0x21 ReceiveMaximum(u16) [CONNACK];
    0x22 TopicAliasMaximum(u16) [CONNACK];
    0x23 TopicAlias(u16) [PUBLISH];
    0x24 MaximumQos(u8) [CONNACK];
    0x25 RetainAvailable(u8) [CONNACK];
    0x26 User((String, String)) [CONNACK PUBLISH PUBACK PUBREC PUBREL PUBCOMP SUBACK UNSUBACK DISCONNECT AUTH];
    0x27 MaximumPacketSize(u32) [CONNACK];
    0x28 WildcardSubscriptionAvailable(u8) [CONNACK];
    0x29 SubscriptionIdAvailable(u8) [CONNACK];
    0x2A SharedSubscriptionAvailable(u8) [CONNACK];
}

/// The value of the property of this name, where it is there.
macro_rules! property {
    ($properties:expr, $name:ident) => {
        $properties.iter().find_map(|property| match property {
            $crate::harness::packet::Property::$name(value) => Some(value.clone()),
            _ => None,
        })
    };
}
pub(crate) use property;

/// A user property.
pub(crate) fn user(name: &str, value: &str) -> Property {
    Property::User((name.to_owned(), value.to_owned()))
}

/// The user properties, in their order.
pub(crate) fn users(properties: &[Property]) -> Vec<(&str, &str)> {
    let pair = |property| match property {
        &Property::User((ref name, ref value)) => Some((name.as_str(), value.as_str())),
        _ => None,
    };
    properties.iter().filter_map(pair).collect()
}

fn frame(first: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![first];
    Varint(u32::try_from(body.len()).expect("a short packet")).write(&mut out);
    out.extend(body);
    out
}

fn write_properties(out: &mut Vec<u8>, version: Version, properties: &[Property]) {
    if version == V311 {
        assert!(properties.is_empty(), "3.1.1 has no properties");
        return;
    }
    let mut block = Vec::new();
    for property in properties {
        property.write(&mut block);
    }
    Varint(u32::try_from(block.len()).expect("a short block")).write(out);
    out.extend(block);
}

/// A will.
#[derive(Clone, Debug, Default)]
pub(crate) struct Will {
    pub(crate) topic: String,
    pub(crate) payload: Vec<u8>,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) properties: Vec<Property>,
}

impl Will {
    /// QoS 0, not retained.
    pub(crate) fn new(topic: impl Into<String>, payload: impl Into<Vec<u8>>) -> Self {
        Self { topic: topic.into(), payload: payload.into(), ..Self::default() }
    }
}

/// A CONNECT.
#[derive(Clone, Debug)]
pub(crate) struct Connect {
    pub(crate) version: Version,
    pub(crate) protocol: &'static str,
    pub(crate) client_id: String,
    pub(crate) clean: bool,
    pub(crate) keep_alive_s: u16,
    pub(crate) properties: Vec<Property>,
    pub(crate) will: Option<Will>,
    pub(crate) login: Option<(String, String)>,
}

impl Connect {
    /// A clean one without keep alive.
    pub(crate) fn new(version: Version, client_id: &str, login: Option<(String, String)>) -> Self {
        Self {
            version,
            protocol: "MQTT",
            client_id: client_id.to_owned(),
            clean: true,
            keep_alive_s: 0,
            properties: Vec::new(),
            will: None,
            login,
        }
    }

    /// Takes up the session of before, and wants it kept.
    pub(crate) fn kept(self) -> Self {
        self.kept_for(3600)
    }

    /// Takes up the session of before, and wants it kept for so long (3.1.1: for good).
    pub(crate) fn kept_for(mut self, seconds: u32) -> Self {
        self.clean = false;
        if self.version == V5 {
            self.properties.push(Property::SessionExpiry(seconds));
        }
        self
    }

    pub(crate) fn with(mut self, property: Property) -> Self {
        self.properties.push(property);
        self
    }

    pub(crate) fn keep_alive(self, keep_alive_s: u16) -> Self {
        Self { keep_alive_s, ..self }
    }

    pub(crate) fn will(self, will: Will) -> Self {
        Self { will: Some(will), ..self }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut flags = u8::from(self.clean) << 1;
        if let Some(will) = &self.will {
            flags |= 0x04 | will.qos << 3 | u8::from(will.retain) << 5;
        }
        if self.login.is_some() {
            flags |= 0xC0;
        }
        let mut body = Vec::new();
        self.protocol.to_owned().write(&mut body);
        body.extend([if self.version == V5 { 5 } else { 4 }, flags]);
        self.keep_alive_s.write(&mut body);
        write_properties(&mut body, self.version, &self.properties);
        self.client_id.write(&mut body);
        if let Some(will) = &self.will {
            write_properties(&mut body, self.version, &will.properties);
            will.topic.write(&mut body);
            will.payload.write(&mut body);
        }
        if let Some(login) = &self.login {
            login.write(&mut body);
        }
        frame(CONNECT, &body)
    }
}

/// A PUBLISH, either way.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Publish {
    pub(crate) dup: bool,
    pub(crate) qos: u8,
    pub(crate) retain: bool,
    pub(crate) topic: String,
    /// 0 without one.
    pub(crate) id: u16,
    pub(crate) properties: Vec<Property>,
    pub(crate) payload: Vec<u8>,
}

impl Publish {
    /// QoS 0, not retained.
    pub(crate) fn new(topic: impl Into<String>, payload: impl Into<Vec<u8>>) -> Self {
        Self { topic: topic.into(), payload: payload.into(), ..Self::default() }
    }

    pub(crate) fn qos(self, qos: u8) -> Self {
        Self { qos, ..self }
    }

    pub(crate) fn retained(self) -> Self {
        Self { retain: true, ..self }
    }

    pub(crate) fn id(self, id: u16) -> Self {
        Self { id, ..self }
    }

    pub(crate) fn dup(self) -> Self {
        Self { dup: true, ..self }
    }

    pub(crate) fn with(mut self, property: Property) -> Self {
        self.properties.push(property);
        self
    }

    /// The payload, as far as it is text.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }

    pub(crate) fn bytes(&self, version: Version) -> Vec<u8> {
        let mut body = Vec::new();
        self.topic.write(&mut body);
        if self.qos > 0 {
            self.id.write(&mut body);
        }
        write_properties(&mut body, version, &self.properties);
        body.extend(&self.payload);
        frame(PUBLISH | u8::from(self.dup) << 3 | self.qos << 1 | u8::from(self.retain), &body)
    }

    fn read(version: Version, flags: u8, input: &mut Input<'_>) -> Self {
        let (dup, qos, retain) = (flags & 8 != 0, flags >> 1 & 3, flags & 1 != 0);
        assert!(qos < 3 && !(dup && qos == 0), "flags {flags:#x} (§3.3.1)");
        let topic: String = input.get();
        assert!(!topic.contains(['+', '#']), "a topic without wildcards: {topic} (§3.3.2-2)");
        let id = if qos > 0 { input.get() } else { 0 };
        assert!(qos == 0 || id > 0, "a packet id is not 0 (§2.2.1-3)");
        let properties = input.properties(version, PUBLISH);
        Self { dup, qos, retain, topic, id, properties, payload: input.rest() }
    }
}

/// A CONNACK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ConnAck {
    pub(crate) present: bool,
    pub(crate) code: u8,
    pub(crate) properties: Vec<Property>,
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ack {
    pub(crate) kind: u8,
    pub(crate) id: u16,
    pub(crate) reason: u8,
    pub(crate) properties: Vec<Property>,
}

impl Ack {
    /// The shortest form; with a reason (MQTT 5) where it is not success.
    pub(crate) fn bytes(kind: u8, id: u16, reason: u8) -> Vec<u8> {
        let mut body = Vec::new();
        id.write(&mut body);
        if reason > 0 {
            body.push(reason);
        }
        frame(kind | if kind == PUBREL { 2 } else { 0 }, &body)
    }

    fn read(version: Version, kind: u8, input: &mut Input<'_>) -> Self {
        let id = input.get();
        let (reason, properties) = read_reason(version, kind, input);
        Self { kind, id, reason, properties }
    }
}

/// SUBACK or UNSUBACK.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answers {
    pub(crate) id: u16,
    pub(crate) codes: Vec<u8>,
    pub(crate) properties: Vec<Property>,
}

/// SUBSCRIBE for filters with their options.
pub(crate) fn subscribe(version: Version, id: u16, filters: &[(String, u8)], properties: &[Property]) -> Vec<u8> {
    let mut body = Vec::new();
    id.write(&mut body);
    write_properties(&mut body, version, properties);
    for (filter, options) in filters {
        filter.write(&mut body);
        body.push(*options);
    }
    frame(SUBSCRIBE | 2, &body)
}

/// UNSUBSCRIBE.
pub(crate) fn unsubscribe(version: Version, id: u16, filters: &[String]) -> Vec<u8> {
    let mut body = Vec::new();
    id.write(&mut body);
    write_properties(&mut body, version, &[]);
    for filter in filters {
        filter.write(&mut body);
    }
    frame(UNSUBSCRIBE | 2, &body)
}

/// DISCONNECT or AUTH; the shortest form where there is nothing to say.
pub(crate) fn reasoned(kind: u8, reason: u8, properties: &[Property]) -> Vec<u8> {
    let mut body = Vec::new();
    if reason > 0 || !properties.is_empty() {
        body.push(reason);
        write_properties(&mut body, V5, properties);
    }
    frame(kind, &body)
}

/// What the server said, or that it closed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Packet {
    ConnAck(ConnAck),
    Publish(Publish),
    Ack(Ack),
    SubAck(Answers),
    UnsubAck(Answers),
    Pong,
    Disconnect(u8, Vec<Property>),
    Auth(u8, Vec<Property>),
    Closed,
}

impl Packet {
    /// Reads one packet of the server.
    pub(crate) fn read(version: Version, first: u8, body: &[u8]) -> Self {
        let (kind, flags) = (first & 0xF0, first & 0x0F);
        assert_eq!(flags, if kind == PUBREL { 2 } else { flags * u8::from(kind == PUBLISH) }, "flags of {first:#x}");
        let input = &mut Input(body);
        let packet = match kind {
            CONNACK => {
                let (flags, code): (u8, u8) = (input.get(), input.get());
                assert!(flags < 2, "reserved flags of a CONNACK");
                assert!(flags == 0 || code == 0, "a refusal has no session (§3.2.2-6)");
                let properties = input.properties(version, kind);
                Self::ConnAck(ConnAck { present: flags == 1, code, properties })
            }
            PUBLISH => Self::Publish(Publish::read(version, flags, input)),
            PUBACK | PUBREC | PUBREL | PUBCOMP => Self::Ack(Ack::read(version, kind, input)),
            SUBACK => Self::SubAck(Answers::read(version, kind, input, true)),
            UNSUBACK => Self::UnsubAck(Answers::read(version, kind, input, version == V5)),
            PINGRESP => Self::Pong,
            DISCONNECT | AUTH if version == V5 => {
                let (reason, properties) = read_reason(version, kind, input);
                if kind == AUTH { Self::Auth(reason, properties) } else { Self::Disconnect(reason, properties) }
            }
            other => panic!("a server does not send {other:#x}"),
        };
        assert!(input.is_empty(), "bytes after the end of {packet:?}");
        packet
    }
}

impl Answers {
    fn read(version: Version, kind: u8, input: &mut Input<'_>, codes: bool) -> Self {
        let id = input.get();
        let properties = input.properties(version, kind);
        Self { id, codes: if codes { input.rest() } else { Vec::new() }, properties }
    }
}

/// A reason code and properties that may both be left out.
fn read_reason(version: Version, kind: u8, input: &mut Input<'_>) -> (u8, Vec<Property>) {
    if version == V311 || input.is_empty() {
        return (0, Vec::new());
    }
    let reason = input.get();
    let properties = if input.is_empty() { Vec::new() } else { input.properties(version, kind) };
    (reason, properties)
}
