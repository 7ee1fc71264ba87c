//! The wire: bytes to packets and packets to bytes, MQTT 3.1.1 and 5.
//!
//! [`Decoder`] reads what a client sends, [`Encoder`] writes what the server sends; [`Packet`] and [`Outgoing`] are
//! those two sets. One set of types serves both versions: what 3.1.1 lacks is simply never there.
//! Holds: a packet that leaves here is legal by itself: strings are UTF-8 without U+0000, topic names and aliases fit,
//! ids are not 0, nothing trails, no property comes twice. What needs memory of earlier packets (windows, aliases,
//! who may do what) is for [`crate`]'s sessions. No input panics, and nothing is allocated for a packet before its
//! size has passed the limit.
//! Ignorant of: sockets, sessions, devices.
//! Why a module of its own: the codec behind it (`rmqtt-codec`) is an implementation detail (ADR 1), and it leaves
//! rules unchecked that strangers will break.

mod decode;
mod encode;
mod properties;
mod reason;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::fmt;
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use bytes::Bytes;
pub use bytestring::ByteString;

pub use decode::Decoder;
pub use encode::{Encoder, TooLarge};
pub use reason::Reason;

/// The longest fixed header: type and four bytes of length (MQTT 5 §2.1.1).
pub const MAX_HEADER_BYTES: usize = 5;

/// Most user properties in one packet. Each costs far more memory than its few bytes on the wire, so a packet with
/// more is refused with 0x97.
pub const MAX_USER_PROPERTIES: usize = 128;

/// Most filters in one SUBSCRIBE or UNSUBSCRIBE, for the same reason; more are refused with 0x97.
pub const MAX_FILTERS: usize = 4_096;

/// Which standard a client speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Version {
    /// MQTT 3.1.1, protocol level 4.
    V311,
    /// MQTT 5.0, protocol level 5.
    V5,
}

/// How hard delivery is tried (MQTT 5 §4.3).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum QoS {
    /// QoS 0: sent once, never acknowledged.
    AtMostOnce = 0,
    /// QoS 1: sent until acknowledged.
    AtLeastOnce = 1,
    /// QoS 2: acknowledged in two steps.
    ExactlyOnce = 2,
}

/// Names an unfinished exchange of one direction of one session (MQTT 5 §2.2.1).
pub type PacketId = NonZeroU16;

/// Names and values without a meaning to the server, in their order (MQTT 5 §3.3.2.3.7).
pub type UserProperties = Vec<(ByteString, ByteString)>;

/// What a client may send.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Packet {
    /// CONNECT, the first packet and only the first.
    Connect(Box<Connect>),
    /// PUBLISH.
    Publish(Publish),
    /// PUBACK, the answer to a QoS 1 message.
    PubAck(Ack),
    /// PUBREC, the first answer to a QoS 2 message.
    PubRec(Ack),
    /// PUBREL, the release of a QoS 2 message the client has sent.
    PubRel(Ack),
    /// PUBCOMP, the end of a QoS 2 message.
    PubComp(Ack),
    /// SUBSCRIBE.
    Subscribe(Subscribe),
    /// UNSUBSCRIBE.
    Unsubscribe(Unsubscribe),
    /// PINGREQ.
    PingReq,
    /// DISCONNECT.
    Disconnect(Disconnect),
    /// AUTH, MQTT 5 only.
    Auth(Auth),
}

/// CONNECT (MQTT 5 §3.1). Its memory is its own: keeping it does not keep the read buffer.
#[derive(Clone, PartialEq, Eq)]
pub struct Connect {
    /// Which standard the client speaks from now on.
    pub version: Version,
    /// The client's name for its session; empty when the server is to choose. No rule but UTF-8 without U+0000 is
    /// checked here.
    pub client_id: ByteString,
    /// Whether an earlier session is to be forgotten.
    pub clean_start: bool,
    /// Longest silence of the client, in seconds; 0: no limit.
    pub keep_alive_s: u16,
    /// User name.
    pub username: Option<ByteString>,
    /// Password: any bytes. With MQTT 5 it may come without a user name.
    pub password: Option<Bytes>,
    /// What to publish when the connection is lost.
    pub will: Option<Will>,
    /// How long the session outlives the connection, in seconds; `u32::MAX`: for ever. With 3.1.1 it is 0 for a clean
    /// session and `u32::MAX` for one that is not (MQTT 5 §3.1.2.11.2).
    pub session_expiry_s: u32,
    /// QoS 1 and 2 messages the client takes at once.
    pub receive_maximum: NonZeroU16,
    /// Largest packet the client takes, in bytes.
    pub maximum_packet_size: Option<NonZeroU32>,
    /// Highest topic alias the client takes; 0: none.
    pub topic_alias_maximum: u16,
    /// Whether the client asks for response information.
    pub request_response_information: bool,
    /// Whether reason strings and user properties may be sent on other packets than PUBLISH, CONNACK and DISCONNECT.
    pub request_problem_information: bool,
    /// Name of an extended authentication.
    pub authentication_method: Option<ByteString>,
    /// First message of the extended authentication; only with a method.
    pub authentication_data: Option<Bytes>,
    /// User properties.
    pub user_properties: UserProperties,
}

impl fmt::Debug for Connect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connect")
            .field("version", &self.version)
            .field("client_id", &self.client_id)
            .field("clean_start", &self.clean_start)
            .field("username", &self.username)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("will", &self.will)
            .finish_non_exhaustive()
    }
}

/// What the server publishes for a client that was lost (MQTT 5 §3.1.2.5).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Will {
    /// Where to; a valid topic name.
    pub topic: ByteString,
    /// What.
    pub payload: Bytes,
    /// How.
    pub qos: QoS,
    /// Whether it is kept for later subscribers.
    pub retain: bool,
    /// How long to wait, in seconds.
    pub delay_s: u32,
    /// Its properties; `None` when it has none.
    pub properties: Option<Arc<PublishProperties>>,
}

/// PUBLISH, in either direction (MQTT 5 §3.3). A clone copies counters, never bytes.
///
/// A received message shares the connection's read buffer. One that is kept (retained, queued for a client that is
/// away) goes through [`Publish::detached`] first, else a few bytes hold the whole buffer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Where to: a valid topic name, or empty when there is an alias.
    pub topic: ByteString,
    /// What: any bytes.
    pub payload: Bytes,
    /// How.
    pub qos: QoS,
    /// Present exactly when the QoS is not 0.
    pub packet_id: Option<PacketId>,
    /// Whether it may have been sent before; never with QoS 0.
    pub dup: bool,
    /// Whether it is (to be) kept for later subscribers.
    pub retain: bool,
    /// Its properties; `None` when it has none.
    pub properties: Option<Arc<PublishProperties>>,
    /// The number that stands for the topic on this connection.
    pub topic_alias: Option<NonZeroU16>,
    /// Subscriptions of the receiver that match; only ever from the server, 1 to 268,435,455.
    pub subscription_ids: Vec<u32>,
}

impl Publish {
    /// A message of the server's own: no packet id, not a duplicate, no properties.
    pub fn new(topic: ByteString, payload: Bytes, qos: QoS, retain: bool) -> Self {
        Self {
            topic,
            payload,
            qos,
            packet_id: None,
            dup: false,
            retain,
            properties: None,
            topic_alias: None,
            subscription_ids: Vec::new(),
        }
    }

    /// The same message in memory of its own.
    #[must_use]
    pub fn detached(&self) -> Self {
        Self {
            topic: own_text(&self.topic),
            payload: own_bytes(&self.payload),
            properties: self.properties.as_ref().map(|properties| Arc::new(properties.detached())),
            ..self.clone()
        }
    }

    /// Seconds until the message is worthless, as it was sent.
    pub fn message_expiry_s(&self) -> Option<u32> {
        self.properties.as_ref().and_then(|properties| properties.message_expiry_s)
    }
}

fn own_text(text: &ByteString) -> ByteString {
    ByteString::from(&**text)
}

fn own_bytes(bytes: &Bytes) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

/// Properties that travel with a message from its sender to its receivers (MQTT 5 §3.3.2.3).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PublishProperties {
    /// Payload Format Indicator: whether the payload is said to be UTF-8.
    pub payload_is_utf8: Option<bool>,
    /// Message Expiry Interval, in seconds; 0: worthless at once.
    pub message_expiry_s: Option<u32>,
    /// Content Type.
    pub content_type: Option<ByteString>,
    /// Response Topic; a valid topic name.
    pub response_topic: Option<ByteString>,
    /// Correlation Data.
    pub correlation_data: Option<Bytes>,
    /// User properties.
    pub user_properties: UserProperties,
}

impl PublishProperties {
    /// How many bytes their texts and data take.
    pub fn bytes(&self) -> usize {
        let text = |text: &Option<ByteString>| text.as_ref().map_or(0, |text| text.len());
        let pairs = self.user_properties.iter().map(|(name, value)| name.len() + value.len());
        let data = self.correlation_data.as_ref().map_or(0, Bytes::len);
        text(&self.content_type) + text(&self.response_topic) + data + pairs.sum::<usize>()
    }

    fn detached(&self) -> Self {
        Self {
            payload_is_utf8: self.payload_is_utf8,
            message_expiry_s: self.message_expiry_s,
            content_type: self.content_type.as_ref().map(own_text),
            response_topic: self.response_topic.as_ref().map(own_text),
            correlation_data: self.correlation_data.as_ref().map(own_bytes),
            user_properties: self
                .user_properties
                .iter()
                .map(|(name, value)| (own_text(name), own_text(value)))
                .collect(),
        }
    }
}

/// PUBACK, PUBREC, PUBREL or PUBCOMP (MQTT 5 §3.4 to §3.7). The user properties of an acknowledgement are not kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ack {
    /// Which exchange.
    pub packet_id: PacketId,
    /// How it went; always a success with 3.1.1.
    pub reason: Reason,
    /// The same in words.
    pub reason_string: Option<ByteString>,
}

impl Ack {
    /// An acknowledgement without words.
    pub const fn new(packet_id: PacketId, reason: Reason) -> Self {
        Self { packet_id, reason, reason_string: None }
    }
}

/// SUBSCRIBE (MQTT 5 §3.8); at least one filter. Its memory is its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscribe {
    /// To be answered with SUBACK.
    pub packet_id: PacketId,
    /// Subscription Identifier, 1 to 268,435,455.
    pub subscription_id: Option<u32>,
    /// What is asked for, in the order of the answers.
    pub filters: Vec<SubscriptionFilter>,
    /// User properties.
    pub user_properties: UserProperties,
}

/// One line of a SUBSCRIBE (MQTT 5 §3.8.3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubscriptionFilter {
    /// Which topics.
    pub filter: ByteString,
    /// Whether the filter keeps to [`fleet_core::topic::is_valid_filter`]. One that does not is answered 0x8F; with
    /// 3.1.1, which has no such answer, the decoder refuses the packet instead.
    pub valid: bool,
    /// Highest QoS to send.
    pub qos: QoS,
    /// Whether the client's own messages are left out; never with a shared subscription.
    pub no_local: bool,
    /// Whether messages keep their retain flag.
    pub retain_as_published: bool,
    /// What to do about retained messages now.
    pub retain_handling: RetainHandling,
}

/// When retained messages are sent to a new subscription (MQTT 5 §3.8.3.1).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum RetainHandling {
    /// Each time it is made.
    AtSubscribe = 0,
    /// Only when there was none like it.
    AtNewSubscribe = 1,
    /// Never.
    Never = 2,
}

/// UNSUBSCRIBE (MQTT 5 §3.10); at least one filter, of any form: one that is not valid was never subscribed to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsubscribe {
    /// To be answered with UNSUBACK.
    pub packet_id: PacketId,
    /// What is no longer wanted, in the order of the answers.
    pub filters: Vec<ByteString>,
}

/// DISCONNECT from a client (MQTT 5 §3.14). [`Reason::Success`] with 3.1.1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disconnect {
    /// Why; anything but [`Reason::Success`] leaves the will standing.
    pub reason: Reason,
    /// A new session expiry, in seconds.
    pub session_expiry_s: Option<u32>,
    /// The reason in words.
    pub reason_string: Option<ByteString>,
}

/// AUTH, in either direction (MQTT 5 §3.15).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Auth {
    /// Success, continue or re-authenticate.
    pub reason: Reason,
    /// Authentication Method.
    pub method: Option<ByteString>,
    /// Authentication Data.
    pub data: Option<Bytes>,
    /// The reason in words.
    pub reason_string: Option<ByteString>,
    /// User properties.
    pub user_properties: UserProperties,
}

/// Why the stream is broken; nothing more can be read from it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// For a DISCONNECT or CONNACK.
    pub reason: Reason,
    /// For the log, and for the reason string.
    pub text: Cow<'static, str>,
    /// The version in which the client may be told: with CONNACK when its CONNECT was never accepted, else with
    /// DISCONNECT. `None`: the standard has no answer, the connection is just closed (MQTT 3.1.1 §4.8).
    pub answer_as: Option<Version>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason, self.text)
    }
}

impl std::error::Error for Violation {}

/// What the server sends.
#[derive(Debug, Clone, Copy)]
pub enum Outgoing<'a> {
    /// CONNACK. A refusal that 3.1.1 has no return code for encodes to nothing: just close (3.1.1 §3.2.2.3).
    ConnAck(&'a ConnAck),
    /// PUBLISH.
    Publish(&'a Publish),
    /// PUBACK.
    PubAck(&'a Ack),
    /// PUBREC.
    PubRec(&'a Ack),
    /// PUBREL.
    PubRel(&'a Ack),
    /// PUBCOMP.
    PubComp(&'a Ack),
    /// SUBACK.
    SubAck {
        /// Of the SUBSCRIBE.
        packet_id: PacketId,
        /// One for each filter, in their order.
        reasons: &'a [Reason],
        /// In words.
        reason_string: Option<&'a str>,
    },
    /// UNSUBACK.
    UnsubAck {
        /// Of the UNSUBSCRIBE.
        packet_id: PacketId,
        /// One for each filter, in their order; 3.1.1 does not carry them.
        reasons: &'a [Reason],
        /// In words.
        reason_string: Option<&'a str>,
    },
    /// PINGRESP.
    PingResp,
    /// DISCONNECT; to 3.1.1 it encodes to nothing, for there a server only closes.
    Disconnect {
        /// Why.
        reason: Reason,
        /// In words.
        reason_string: Option<&'a str>,
        /// User properties.
        user_properties: &'a [(ByteString, ByteString)],
    },
    /// AUTH; to 3.1.1 it encodes to nothing.
    Auth(&'a Auth),
}

/// CONNACK (MQTT 5 §3.2). The default accepts, and grants all that the standard has.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "they are the standard's properties")]
pub struct ConnAck {
    /// Whether the server has kept a session; left out of a refusal (MQTT 5 §3.2.2.1.1).
    pub session_present: bool,
    /// Accepted, or why not.
    pub reason: Reason,
    /// The reason in words.
    pub reason_string: Option<ByteString>,
    /// The client id the server has chosen.
    pub assigned_client_id: Option<ByteString>,
    /// Keep alive the client must use instead of its own, in seconds.
    pub server_keep_alive_s: Option<u16>,
    /// Session expiry when it is not what the client asked for, in seconds.
    pub session_expiry_s: Option<u32>,
    /// QoS 1 and 2 messages the server takes at once.
    pub receive_maximum: NonZeroU16,
    /// Highest QoS the server takes.
    pub maximum_qos: QoS,
    /// Whether messages can be retained.
    pub retain_available: bool,
    /// Largest packet the server takes, in bytes.
    pub maximum_packet_size: Option<NonZeroU32>,
    /// Highest topic alias the server takes; 0: none.
    pub topic_alias_maximum: u16,
    /// Whether filters may have wildcards.
    pub wildcard_subscriptions_available: bool,
    /// Whether subscriptions may have ids.
    pub subscription_ids_available: bool,
    /// Whether subscriptions may be shared.
    pub shared_subscriptions_available: bool,
    /// Where response topics may be made.
    pub response_information: Option<ByteString>,
    /// Name of the extended authentication.
    pub authentication_method: Option<ByteString>,
    /// Last message of the extended authentication.
    pub authentication_data: Option<Bytes>,
    /// User properties.
    pub user_properties: UserProperties,
}

impl Default for ConnAck {
    fn default() -> Self {
        Self {
            session_present: false,
            reason: Reason::Success,
            reason_string: None,
            assigned_client_id: None,
            server_keep_alive_s: None,
            session_expiry_s: None,
            receive_maximum: NonZeroU16::MAX,
            maximum_qos: QoS::ExactlyOnce,
            retain_available: true,
            maximum_packet_size: None,
            topic_alias_maximum: 0,
            wildcard_subscriptions_available: true,
            subscription_ids_available: true,
            shared_subscriptions_available: true,
            response_information: None,
            authentication_method: None,
            authentication_data: None,
            user_properties: Vec::new(),
        }
    }
}

impl ConnAck {
    /// A refusal.
    pub fn refusal(reason: Reason, reason_string: Option<ByteString>) -> Self {
        Self { reason, reason_string, ..Self::default() }
    }
}
