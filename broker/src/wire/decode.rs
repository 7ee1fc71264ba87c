//! Bytes to packets.
//!
//! A frame is looked at in three steps: the fixed header as soon as it is there (kind, size), the rules the codec
//! leaves to us once the frame is whole, then the codec. So the codec only ever sees whole frames of a legal kind.

use std::borrow::Cow;
use std::num::{NonZeroU16, NonZeroU32};
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use fleet_core::topic;
use rmqtt_codec::error::DecodeError;
use rmqtt_codec::{types, v3, v5};
use tokio_util::codec::Decoder as _;

use super::properties::{self, Found, Reader};
use super::{
    Ack, Auth, ByteString, Connect, Disconnect, MAX_FILTERS, MAX_HEADER_BYTES, Packet, Publish, PublishProperties, QoS,
    Reason, RetainHandling, Subscribe, SubscriptionFilter, Unsubscribe, Version, Violation, Will,
};

/// First byte of a CONNECT: kind 1, no flags.
const CONNECT: u8 = 0x10;

/// Where a CONNECT's flags are, and one of them: behind the protocol name and level.
const CONNECT_FLAGS_AT: usize = 7;
const CLEAN_START: u8 = 0b0000_0010;

/// What is wrong with a packet, before it is known how to say so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Fault {
    reason: Reason,
    text: &'static str,
}

impl Fault {
    pub(super) const fn new(reason: Reason, text: &'static str) -> Self {
        Self { reason, text }
    }

    /// Malformed Packet: it cannot be read as the standard says (MQTT 5 §1.2).
    pub(super) const fn malformed(text: &'static str) -> Self {
        Self::new(Reason::MalformedPacket, text)
    }

    /// Protocol Error: it can be read, and must not have been sent (MQTT 5 §1.2).
    pub(super) const fn protocol(text: &'static str) -> Self {
        Self::new(Reason::ProtocolError, text)
    }
}

/// Where the first packet in a buffer begins and ends.
#[derive(Clone, Copy)]
struct Header {
    first: u8,
    before_body: usize,
    body: usize,
}

impl Header {
    const fn packet_bytes(self) -> usize {
        self.before_body + self.body
    }
}

/// Reads one client's packets. Holds limits and the version, no bytes: the buffer is the caller's.
#[derive(Debug, Clone, Copy)]
pub struct Decoder {
    max_packet_bytes: u32,
    max_connect_bytes: u32,
    version: Option<Version>,
}

impl Decoder {
    /// A decoder for a new connection. Both limits are for whole packets, fixed header included, in bytes; the
    /// CONNECT has its own because it comes from somebody who is not known yet.
    pub const fn new(max_packet_bytes: u32, max_connect_bytes: u32) -> Self {
        Self { max_packet_bytes, max_connect_bytes, version: None }
    }

    /// The version the client speaks; `None` until its CONNECT was read.
    pub const fn version(&self) -> Option<Version> {
        self.version
    }

    /// Takes the next packet from the front of `buffer`; `Ok(None)` when it is not there yet as a whole.
    ///
    /// The kind of the packet and its size are checked as soon as the fixed header is there, so a caller that reads
    /// only while this asks for more never buffers more than a limit and one read. Room for the rest of a packet is
    /// for the caller to make (see [`Decoder::missing_bytes`]).
    ///
    /// # Errors
    /// The first [`Violation`] found. The stream cannot be read any further, and `buffer` is left in any state.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Packet>, Violation> {
        self.next(buffer).map_err(|(fault, answer_as)| Violation {
            reason: fault.reason,
            text: Cow::Borrowed(fault.text),
            answer_as,
        })
    }

    /// How many bytes must at least be added to `buffer` before [`Decoder::decode`] gets any further: `None` when no
    /// packet has begun, `Some(0)` when a whole packet (or a violation) is there.
    pub fn missing_bytes(&self, buffer: &[u8]) -> Option<usize> {
        if buffer.is_empty() {
            return None;
        }
        match self.header(buffer) {
            Ok(Some(header)) => Some(header.packet_bytes().saturating_sub(buffer.len())),
            Ok(None) => Some(1),
            Err(_) => Some(0),
        }
    }

    fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Packet>, (Fault, Option<Version>)> {
        // 3.1.1 has no way to say why (§4.8): its connections are just closed.
        let answer_as = self.version.filter(|version| *version == Version::V5);
        let Some(header) = self.header(buffer).map_err(|fault| (fault, answer_as))? else { return Ok(None) };
        if buffer.len() < header.packet_bytes() {
            return Ok(None);
        }
        match self.version {
            None => self.first_packet(header, buffer),
            Some(Version::V311) => v311_packet(header, buffer).map_err(|fault| (fault, answer_as)),
            Some(Version::V5) => v5_packet(header, buffer).map_err(|fault| (fault, answer_as)),
        }
        .map(Some)
    }

    /// The fixed header (MQTT 5 §2.1), checked; `None` when it is not there yet.
    fn header(&self, buffer: &[u8]) -> Result<Option<Header>, Fault> {
        let Some((&first, rest)) = buffer.split_first() else { return Ok(None) };
        let max_bytes = match self.version {
            None if first != CONNECT => return Err(Fault::protocol("first packet is not CONNECT")),
            None => self.max_connect_bytes,
            Some(version) => {
                check_kind(version, first)?;
                self.max_packet_bytes
            }
        };
        let Some((body, length_bytes)) = remaining_length(rest, self.version)? else { return Ok(None) };
        let header = Header { first, before_body: 1 + length_bytes, body };
        if header.packet_bytes() > max_bytes as usize {
            return Err(Fault::new(Reason::PacketTooLarge, "packet is larger than the server takes"));
        }
        Ok(Some(header))
    }

    /// The CONNECT, in whatever version.
    fn first_packet(&mut self, header: Header, buffer: &mut BytesMut) -> Result<Packet, (Fault, Option<Version>)> {
        // In memory of its own: what a CONNECT says is kept as long as the connection.
        let mut frame = taken(header, buffer);
        let version = offered_version(&frame[header.before_body..])?;
        let connect = match version {
            Version::V311 => v311_connect(header, &mut frame),
            Version::V5 => v5_connect(header, &mut frame),
        }
        .map_err(|fault| (fault, refusal_version(version, fault)))?;
        self.version = Some(version);
        Ok(Packet::Connect(Box::new(connect)))
    }
}

/// The length that follows the first byte, and how many bytes it takes itself; `None` when it is not all there.
/// Only MQTT 5 asks for the shortest form (§1.5.5).
fn remaining_length(bytes: &[u8], version: Option<Version>) -> Result<Option<(usize, usize)>, Fault> {
    let mut length = 0;
    for (at, byte) in bytes.iter().take(MAX_HEADER_BYTES - 1).enumerate() {
        length |= usize::from(byte & 0x7F) << (7 * at);
        if byte & 0x80 == 0 {
            return if *byte == 0 && at > 0 && version == Some(Version::V5) {
                Err(Fault::malformed("remaining length is longer than it must be"))
            } else {
                Ok(Some((length, 1 + at)))
            };
        }
    }
    if bytes.len() < MAX_HEADER_BYTES - 1 {
        return Ok(None);
    }
    Err(Fault::malformed("remaining length is longer than four bytes"))
}

/// Which CONNECT this is (MQTT 5 §3.1.2.1 and §3.1.2.2).
fn offered_version(body: &[u8]) -> Result<Version, (Fault, Option<Version>)> {
    let mut reader = Reader::new(body);
    let name = reader.binary().map_err(|fault| (fault, None))?;
    let level = reader.u8().map_err(|fault| (fault, None))?;
    let unsupported = Fault::new(Reason::UnsupportedProtocolVersion, "protocol level is neither 4 nor 5");
    match (name, level) {
        (b"MQTT", 4) => Ok(Version::V311),
        (b"MQTT", 5) => Ok(Version::V5),
        // What was before 5 is told as 3.1.1 tells it; what comes after it may be able to read 5.
        (b"MQTT", level) => Err((unsupported, Some(if level < 5 { Version::V311 } else { Version::V5 }))),
        (b"MQIsdp", _) => Err((unsupported, Some(Version::V311))),
        _ => Err((Fault::protocol("protocol name is not MQTT"), None)),
    }
}

/// Whether a refused CONNECT can be answered: with 3.1.1 only where there is a return code (3.1.1 §3.2.2.3).
fn refusal_version(version: Version, fault: Fault) -> Option<Version> {
    match version {
        Version::V5 => Some(Version::V5),
        Version::V311 => (fault.reason == Reason::ClientIdentifierNotValid).then_some(Version::V311),
    }
}

/// Kinds a client may send after its CONNECT, each with its flags (MQTT 5 §2.1.2, §2.1.3).
fn check_kind(version: Version, first: u8) -> Result<(), Fault> {
    match (first >> 4, first & 0x0F) {
        (1, 0) => Err(Fault::protocol("second CONNECT")),
        (3, flags) if flags & 0b0110 == 0b0110 => Err(Fault::malformed("PUBLISH has QoS 3")),
        (3, flags) if flags & 0b1110 == 0b1000 => Err(Fault::malformed("PUBLISH has DUP with QoS 0")),
        (3, _) | (4 | 5 | 7 | 12 | 14, 0) | (6 | 8 | 10, 2) => Ok(()),
        (15, 0) if version == Version::V5 => Ok(()),
        (2 | 9 | 11 | 13, _) => Err(Fault::protocol("packet is for servers to send")),
        (0, _) => Err(Fault::malformed("packet type is reserved")),
        (15, _) if version == Version::V311 => Err(Fault::malformed("packet type is reserved")),
        _ => Err(Fault::malformed("reserved flags are set")),
    }
}

/// Why the codec refuses what our own rules let pass. They are the stricter, so this is rare.
fn codec_fault(error: &DecodeError) -> Fault {
    match error {
        DecodeError::Utf8Error => Fault::malformed("string is not UTF-8"),
        DecodeError::InvalidLength => Fault::malformed("a field is longer than its packet"),
        DecodeError::InvalidTopicName => Fault::new(Reason::TopicNameInvalid, "topic name is empty"),
        DecodeError::InvalidTopicFilter => Fault::protocol("no filter, or an empty one"),
        DecodeError::InvalidClientId => Fault::new(Reason::ClientIdentifierNotValid, "client id is empty"),
        _ => Fault::malformed("packet cannot be read"),
    }
}

/// The codec's packet at the front of `buffer`, which holds all of it.
fn codec_v3(buffer: &mut BytesMut) -> Result<v3::Packet, Fault> {
    match v3::Codec::new(0).decode(buffer) {
        Ok(Some((packet, _))) => Ok(packet),
        Ok(None) => Err(Fault::malformed("packet is not whole")),
        Err(error) => Err(codec_fault(&error)),
    }
}

/// The codec's packet at the front of `buffer`, which holds all of it.
fn codec_v5(buffer: &mut BytesMut) -> Result<v5::Packet, Fault> {
    match v5::Codec::new(0, 0).decode(buffer) {
        Ok(Some((packet, _))) => Ok(packet),
        Ok(None) => Err(Fault::malformed("packet is not whole")),
        Err(error) => Err(codec_fault(&error)),
    }
}

/// A packet whose strings are kept, in memory of its own.
fn taken(header: Header, buffer: &mut BytesMut) -> BytesMut {
    let frame = BytesMut::from(&buffer[..header.packet_bytes()]);
    buffer.advance(header.packet_bytes());
    frame
}

const UNEXPECTED: Fault = Fault::malformed("packet is not of the kind it says");

// ---- CONNECT ----

/// Reads over a CONNECT behind its protocol level; nothing may be missing, trail or contradict its flags.
/// Gives what there is to know of the will's properties.
fn check_connect(body: &[u8], version: Version) -> Result<Found, Fault> {
    let mut reader = Reader::new(body);
    reader.take(CONNECT_FLAGS_AT)?;
    let flags = reader.u8()?;
    let has = |flag: u8| flags & flag != 0;
    let (will, will_qos, will_retain) = (has(0x04), (flags >> 3) & 0b11, has(0x20));
    let (password, username) = (has(0x40), has(0x80));
    if has(0x01) {
        return Err(Fault::malformed("reserved flag of CONNECT is set"));
    }
    if will_qos == 3 || (!will && (will_qos != 0 || will_retain)) {
        return Err(Fault::malformed("flags of the will contradict each other"));
    }
    if version == Version::V311 && password && !username {
        return Err(Fault::malformed("password without user name"));
    }
    reader.u16()?; // keep alive
    if version == Version::V5 {
        reader.properties(properties::CONNECT)?;
    }
    let client_id = reader.text()?;
    if version == Version::V311 && client_id.is_empty() && !has(CLEAN_START) {
        return Err(Fault::new(Reason::ClientIdentifierNotValid, "empty client id without a clean session"));
    }
    let mut found = Found::default();
    if will {
        if version == Version::V5 {
            found = reader.properties(properties::WILL)?;
        }
        if !topic::is_valid_name(reader.text()?) {
            return Err(Fault::new(Reason::TopicNameInvalid, "topic of the will is not a topic name"));
        }
        reader.binary()?;
    }
    if username {
        reader.text()?;
    }
    if password {
        reader.binary()?;
    }
    if reader.is_at_end() { Ok(found) } else { Err(Fault::malformed("bytes behind the end of CONNECT")) }
}

fn v311_connect(header: Header, frame: &mut BytesMut) -> Result<Connect, Fault> {
    check_connect(&frame[header.before_body..], Version::V311)?;
    let v3::Packet::Connect(connect) = codec_v3(frame)? else { return Err(UNEXPECTED) };
    Ok(Connect {
        version: Version::V311,
        client_id: connect.client_id,
        clean_start: connect.clean_session,
        keep_alive_s: connect.keep_alive,
        username: connect.username,
        password: connect.password,
        will: connect.last_will.map(|will| Will {
            topic: will.topic,
            payload: will.message,
            qos: will.qos.into(),
            retain: will.retain,
            delay_s: 0,
            properties: None,
        }),
        session_expiry_s: if connect.clean_session { 0 } else { u32::MAX },
        receive_maximum: NonZeroU16::MAX,
        maximum_packet_size: None,
        topic_alias_maximum: 0,
        request_response_information: false,
        request_problem_information: true,
        authentication_method: None,
        authentication_data: None,
        user_properties: Vec::new(),
    })
}

fn v5_connect(header: Header, frame: &mut BytesMut) -> Result<Connect, Fault> {
    let body = &mut frame[header.before_body..];
    let found = check_connect(body, Version::V5)?;
    // MQTT 5 lets a client without an id keep its session (§3.1.3.1) and a message expire at once; the codec does not.
    let clean_start = body[CONNECT_FLAGS_AT] & CLEAN_START != 0;
    body[CONNECT_FLAGS_AT] |= CLEAN_START;
    hide_zero_expiry(body, &found);
    let v5::Packet::Connect(connect) = codec_v5(frame)? else { return Err(UNEXPECTED) };
    Ok(Connect {
        version: Version::V5,
        client_id: connect.client_id,
        clean_start,
        keep_alive_s: connect.keep_alive,
        username: connect.username,
        password: connect.password,
        will: connect.last_will.map(|will| v5_will(will, &found)),
        session_expiry_s: connect.session_expiry_interval_secs,
        receive_maximum: connect.receive_max.unwrap_or(NonZeroU16::MAX),
        maximum_packet_size: connect.max_packet_size,
        topic_alias_maximum: connect.topic_alias_max,
        request_response_information: connect.request_response_info,
        request_problem_information: connect.request_problem_info,
        authentication_method: connect.auth_method,
        authentication_data: connect.auth_data,
        user_properties: connect.user_properties,
    })
}

fn v5_will(will: v5::LastWill, found: &Found) -> Will {
    let properties = PublishProperties {
        payload_is_utf8: found.payload_is_utf8,
        message_expiry_s: message_expiry_s(will.message_expiry_interval, found),
        content_type: will.content_type,
        response_topic: will.response_topic,
        correlation_data: will.correlation_data,
        user_properties: will.user_properties,
    };
    Will {
        topic: will.topic,
        payload: will.message,
        qos: will.qos.into(),
        retain: will.retain,
        delay_s: will.will_delay_interval_sec.unwrap_or(0),
        properties: shared(properties),
    }
}

/// Makes a Message Expiry Interval of 0 readable for the codec; [`message_expiry_s`] undoes it.
fn hide_zero_expiry(body: &mut [u8], found: &Found) {
    if let Some(at) = found.zero_expiry_at {
        body[at] = 1;
    }
}

fn message_expiry_s(read: Option<NonZeroU32>, found: &Found) -> Option<u32> {
    if found.zero_expiry_at.is_some() { Some(0) } else { read.map(NonZeroU32::get) }
}

fn shared(properties: PublishProperties) -> Option<Arc<PublishProperties>> {
    (properties != PublishProperties::default()).then(|| Arc::new(properties))
}

// ---- MQTT 3.1.1 ----

fn v311_packet(header: Header, buffer: &mut BytesMut) -> Result<Packet, Fault> {
    let body = &buffer[header.before_body..header.packet_bytes()];
    match header.first >> 4 {
        8 => {
            check_v311_subscribe(body)?;
            v311_from(codec_v3(&mut taken(header, buffer))?)
        }
        10 => {
            check_unsubscribe(body, Version::V311)?;
            v311_from(codec_v3(&mut taken(header, buffer))?)
        }
        12 | 14 if !body.is_empty() => Err(Fault::malformed("packet has a body and may have none")),
        _ => v311_from(codec_v3(buffer)?),
    }
}

fn v311_from(packet: v3::Packet) -> Result<Packet, Fault> {
    let success = |packet_id| Ack::new(packet_id, Reason::Success);
    Ok(match packet {
        v3::Packet::Publish(publish) => Packet::Publish(publish_from(*publish, &Found::default())?),
        v3::Packet::PublishAck { packet_id } => Packet::PubAck(success(packet_id)),
        v3::Packet::PublishReceived { packet_id } => Packet::PubRec(success(packet_id)),
        v3::Packet::PublishRelease { packet_id } => Packet::PubRel(success(packet_id)),
        v3::Packet::PublishComplete { packet_id } => Packet::PubComp(success(packet_id)),
        v3::Packet::Subscribe { packet_id, topic_filters } => Packet::Subscribe(Subscribe {
            packet_id,
            subscription_id: None,
            filters: topic_filters.into_iter().map(|(filter, qos)| v311_filter(filter, qos)).collect(),
            user_properties: Vec::new(),
        }),
        v3::Packet::Unsubscribe { packet_id, topic_filters } => {
            Packet::Unsubscribe(Unsubscribe { packet_id, filters: topic_filters })
        }
        v3::Packet::PingRequest => Packet::PingReq,
        v3::Packet::Disconnect => {
            Packet::Disconnect(Disconnect { reason: Reason::Success, session_expiry_s: None, reason_string: None })
        }
        _ => return Err(UNEXPECTED),
    })
}

/// The payload of a SUBSCRIBE of 3.1.1 (§3.8.3): filters of legal form, each with a QoS and no other bits.
fn check_v311_subscribe(body: &[u8]) -> Result<(), Fault> {
    let mut reader = Reader::new(body);
    reader.u16()?;
    let mut filters = 0;
    while !reader.is_at_end() {
        if !topic::is_valid_filter(reader.text()?) {
            return Err(Fault::new(Reason::TopicFilterInvalid, "filter is not a topic filter"));
        }
        if reader.u8()? > 2 {
            return Err(Fault::malformed("SUBSCRIBE has reserved bits or QoS 3"));
        }
        filters += 1;
    }
    check_filter_count(filters)
}

fn check_unsubscribe(body: &[u8], version: Version) -> Result<(), Fault> {
    let mut reader = Reader::new(body);
    reader.u16()?;
    if version == Version::V5 {
        reader.properties(properties::UNSUBSCRIBE)?;
    }
    let mut filters = 0;
    while !reader.is_at_end() {
        reader.text()?;
        filters += 1;
    }
    check_filter_count(filters)
}

fn check_filter_count(filters: usize) -> Result<(), Fault> {
    match filters {
        0 => Err(Fault::protocol("no filter")),
        1..=MAX_FILTERS => Ok(()),
        _ => Err(Fault::new(Reason::QuotaExceeded, "packet has too many filters")),
    }
}

fn v311_filter(filter: ByteString, qos: types::QoS) -> SubscriptionFilter {
    SubscriptionFilter {
        filter,
        valid: true,
        qos: qos.into(),
        no_local: false,
        retain_as_published: false,
        retain_handling: RetainHandling::AtSubscribe,
    }
}

// ---- MQTT 5 ----

fn v5_packet(header: Header, buffer: &mut BytesMut) -> Result<Packet, Fault> {
    let body = &mut buffer[header.before_body..header.packet_bytes()];
    match header.first >> 4 {
        3 => {
            let found = check_v5_publish(body, header.first)?;
            hide_zero_expiry(body, &found);
            match codec_v5(buffer)? {
                v5::Packet::Publish(publish) => publish_from(*publish, &found).map(Packet::Publish),
                _ => Err(UNEXPECTED),
            }
        }
        4..=7 => {
            check_short(body, 3, properties::ACK)?;
            v5_ack(codec_v5(buffer)?)
        }
        8 => {
            check_v5_subscribe(body)?;
            v5_rest(codec_v5(&mut taken(header, buffer))?)
        }
        10 => {
            check_unsubscribe(body, Version::V5)?;
            v5_rest(codec_v5(&mut taken(header, buffer))?)
        }
        12 if !body.is_empty() => Err(Fault::malformed("packet has a body and may have none")),
        14 => {
            check_short(body, 1, properties::DISCONNECT)?;
            v5_rest(codec_v5(buffer)?)
        }
        15 => {
            check_short(body, 1, properties::AUTH)?;
            v5_rest(codec_v5(buffer)?)
        }
        _ => v5_rest(codec_v5(buffer)?),
    }
}

/// Reads over a PUBLISH up to its payload (MQTT 5 §3.3.2).
fn check_v5_publish(body: &[u8], first: u8) -> Result<Found, Fault> {
    let mut reader = Reader::new(body);
    reader.binary()?; // the topic is checked when it is text
    if first & 0b0110 != 0 {
        reader.u16()?;
    }
    reader.properties(properties::PUBLISH)
}

/// A packet of `fixed` bytes that may end before its reason and before its properties (MQTT 5 §3.4.2.1, §3.14.2.1).
fn check_short(body: &[u8], fixed: usize, allowed: properties::Set) -> Result<(), Fault> {
    if body.len() <= fixed {
        return Ok(());
    }
    let mut reader = Reader::new(body);
    reader.take(fixed)?;
    reader.properties(allowed)?;
    if reader.is_at_end() { Ok(()) } else { Err(Fault::malformed("bytes behind the end of the packet")) }
}

/// Reads over a SUBSCRIBE (MQTT 5 §3.8.2, §3.8.3).
fn check_v5_subscribe(body: &[u8]) -> Result<(), Fault> {
    let mut reader = Reader::new(body);
    reader.u16()?;
    reader.properties(properties::SUBSCRIBE)?;
    let mut filters = 0;
    while !reader.is_at_end() {
        let filter = reader.text()?;
        let options = reader.u8()?;
        check_v5_options(filter, options)?;
        filters += 1;
    }
    check_filter_count(filters)
}

fn check_v5_options(filter: &str, options: u8) -> Result<(), Fault> {
    if options & 0b1100_0000 != 0 {
        return Err(Fault::malformed("reserved bits of the subscription options are set"));
    }
    if options & 0b11 == 3 {
        return Err(Fault::protocol("SUBSCRIBE has QoS 3"));
    }
    if (options >> 4) & 0b11 == 3 {
        return Err(Fault::protocol("SUBSCRIBE has retain handling 3"));
    }
    if options & 0b100 != 0 && filter.starts_with("$share/") {
        return Err(Fault::protocol("shared subscription with no local"));
    }
    Ok(())
}

fn publish_from(publish: types::Publish, found: &Found) -> Result<Publish, Fault> {
    let mut carried = publish.properties.unwrap_or_default();
    if !carried.subscription_ids.is_empty() {
        return Err(Fault::protocol("PUBLISH from a client has a subscription identifier"));
    }
    let alias = carried.topic_alias.take();
    if !(topic::is_valid_name(&publish.topic) || publish.topic.is_empty() && alias.is_some()) {
        return Err(bad_topic(&publish.topic));
    }
    Ok(Publish {
        topic: publish.topic,
        payload: publish.payload,
        qos: publish.qos.into(),
        packet_id: publish.packet_id,
        dup: publish.dup,
        retain: publish.retain,
        topic_alias: alias,
        subscription_ids: Vec::new(),
        properties: shared(PublishProperties {
            payload_is_utf8: found.payload_is_utf8,
            message_expiry_s: message_expiry_s(carried.message_expiry_interval, found),
            content_type: carried.content_type,
            response_topic: carried.response_topic,
            correlation_data: carried.correlation_data,
            user_properties: carried.user_properties,
        }),
    })
}

fn bad_topic(topic: &str) -> Fault {
    if topic.contains('\0') {
        Fault::malformed("string contains U+0000")
    } else if topic.is_empty() {
        Fault::protocol("PUBLISH has neither topic nor alias")
    } else {
        Fault::new(Reason::TopicNameInvalid, "topic of PUBLISH has a wildcard or too many levels")
    }
}

fn reason(code: impl Into<u8>) -> Reason {
    Reason::from_code(code.into()).unwrap_or(Reason::UnspecifiedError)
}

fn v5_ack(packet: v5::Packet) -> Result<Packet, Fault> {
    let first = |ack: v5::PublishAck| Ack {
        packet_id: ack.packet_id,
        reason: reason(ack.reason_code),
        reason_string: ack.reason_string,
    };
    let second = |ack: v5::PublishAck2| Ack {
        packet_id: ack.packet_id,
        reason: reason(ack.reason_code),
        reason_string: ack.reason_string,
    };
    match packet {
        v5::Packet::PublishAck(ack) => Ok(Packet::PubAck(first(ack))),
        v5::Packet::PublishReceived(ack) => Ok(Packet::PubRec(first(ack))),
        v5::Packet::PublishRelease(ack) => Ok(Packet::PubRel(second(ack))),
        v5::Packet::PublishComplete(ack) => Ok(Packet::PubComp(second(ack))),
        _ => Err(UNEXPECTED),
    }
}

fn v5_rest(packet: v5::Packet) -> Result<Packet, Fault> {
    match packet {
        v5::Packet::Subscribe(subscribe) => Ok(Packet::Subscribe(Subscribe {
            packet_id: subscribe.packet_id,
            subscription_id: subscribe.id.map(NonZeroU32::get),
            filters: subscribe.topic_filters.into_iter().map(|(filter, options)| v5_filter(filter, options)).collect(),
            user_properties: subscribe.user_properties,
        })),
        v5::Packet::Unsubscribe(unsubscribe) => Ok(Packet::Unsubscribe(Unsubscribe {
            packet_id: unsubscribe.packet_id,
            filters: unsubscribe.topic_filters,
        })),
        v5::Packet::PingRequest => Ok(Packet::PingReq),
        v5::Packet::Disconnect(disconnect) => Ok(Packet::Disconnect(Disconnect {
            reason: reason(disconnect.reason_code),
            session_expiry_s: disconnect.session_expiry_interval_secs,
            reason_string: disconnect.reason_string,
        })),
        v5::Packet::Auth(auth) => v5_auth(auth).map(Packet::Auth),
        _ => Err(UNEXPECTED),
    }
}

fn v5_auth(auth: v5::Auth) -> Result<Auth, Fault> {
    if auth.auth_method.is_none() {
        return Err(Fault::protocol("AUTH without a method"));
    }
    Ok(Auth {
        reason: reason(auth.reason_code),
        method: auth.auth_method,
        data: auth.auth_data,
        reason_string: auth.reason_string,
        user_properties: auth.user_properties,
    })
}

fn v5_filter(filter: ByteString, options: v5::SubscriptionOptions) -> SubscriptionFilter {
    SubscriptionFilter {
        valid: topic::is_valid_filter(&filter),
        filter,
        qos: options.qos.into(),
        no_local: options.no_local,
        retain_as_published: options.retain_as_published,
        retain_handling: match options.retain_handling {
            v5::RetainHandling::AtSubscribe => RetainHandling::AtSubscribe,
            v5::RetainHandling::AtSubscribeNew => RetainHandling::AtNewSubscribe,
            v5::RetainHandling::NoAtSubscribe => RetainHandling::Never,
        },
    }
}

impl From<types::QoS> for QoS {
    fn from(qos: types::QoS) -> Self {
        match qos {
            types::QoS::AtMostOnce => Self::AtMostOnce,
            types::QoS::AtLeastOnce => Self::AtLeastOnce,
            types::QoS::ExactlyOnce => Self::ExactlyOnce,
        }
    }
}
