//! Packets to bytes.
//!
//! PUBLISH and bare acknowledgements, nearly all of the traffic, are written here from what the caller has; the codec
//! writes the rest.

use std::num::NonZeroU32;

use bytes::{BufMut, BytesMut};
use rmqtt_codec::{types, v5};
use tokio_util::codec::Encoder as _;

use super::{
    Ack, Auth, ByteString, ConnAck, Connect, Outgoing, PacketId, Publish, PublishProperties, QoS, Reason, Version,
};

/// Largest packet there can be, in bytes: type, four bytes of length and what they can say (MQTT 5 §1.5.5).
const MAX_PACKET_BYTES: usize = 5 + MAX_REMAINING;
const MAX_REMAINING: usize = 268_435_455;

/// The packet is larger than the client takes, or than can be written at all; nothing was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("packet is larger than the client takes")]
pub struct TooLarge;

/// Writes for one client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Encoder {
    version: Version,
    max_packet_bytes: usize,
    problem_information: bool,
}

impl Encoder {
    /// For a client as its CONNECT describes it.
    pub fn for_client(connect: &Connect) -> Self {
        Self {
            version: connect.version,
            max_packet_bytes: max_packet_bytes(connect.maximum_packet_size),
            problem_information: connect.request_problem_information,
        }
    }

    /// For a client of which no more is known than its version: its CONNECT is refused unread.
    pub const fn new(version: Version) -> Self {
        Self { version, max_packet_bytes: MAX_PACKET_BYTES, problem_information: true }
    }

    /// The version written.
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Appends `packet` to `into`. Reason string and user properties are left out when the client has not asked for
    /// them (MQTT 5 §3.1.2.11.7) or would not take the packet with them (§3.1.2.11.4). A reason the standard has not
    /// defined for this kind of packet is written as the general error.
    ///
    /// # Errors
    /// [`TooLarge`] when the packet without them still exceeds the client's Maximum Packet Size, or a string in it
    /// 65,535 bytes; `into` is then as it was.
    pub fn encode(&self, packet: Outgoing<'_>, into: &mut BytesMut) -> Result<(), TooLarge> {
        match packet {
            Outgoing::Publish(publish) => self.publish(publish, into),
            Outgoing::PubAck(ack) => self.ack(0x40, ack, into),
            Outgoing::PubRec(ack) => self.ack(0x50, ack, into),
            Outgoing::PubRel(ack) => self.ack(0x62, ack, into),
            Outgoing::PubComp(ack) => self.ack(0x70, ack, into),
            Outgoing::PingResp => self.small(&[0xD0, 0], into),
            Outgoing::ConnAck(ack) => self.conn_ack(ack, into),
            Outgoing::SubAck { packet_id, reasons, reason_string } => {
                self.sub_ack(packet_id, reasons, reason_string, into)
            }
            Outgoing::UnsubAck { packet_id, reasons, reason_string } => {
                self.unsub_ack(packet_id, reasons, reason_string, into)
            }
            Outgoing::Disconnect { reason, reason_string, user_properties } => {
                self.disconnect(reason, reason_string, user_properties, into)
            }
            Outgoing::Auth(auth) => self.auth(auth, into),
        }
    }

    /// Writes a packet without anything that could be left out.
    fn small(&self, bytes: &[u8], into: &mut BytesMut) -> Result<(), TooLarge> {
        if bytes.len() > self.max_packet_bytes {
            return Err(TooLarge);
        }
        into.put_slice(bytes);
        Ok(())
    }

    /// Has the codec write what `packet` makes, first with reason string and user properties (when `wanted`), then
    /// without. The codec gets no limit: it miscounts with small ones.
    fn by_codec(&self, wanted: bool, packet: impl Fn(bool) -> v5::Packet, into: &mut BytesMut) -> Result<(), TooLarge> {
        let start = into.len();
        for diagnostics in [true, false] {
            if diagnostics && !wanted {
                continue;
            }
            let written = v5::Codec::new(0, 0).encode(packet(diagnostics), into);
            if written.is_ok() && into.len() - start <= self.max_packet_bytes {
                return Ok(());
            }
            into.truncate(start);
        }
        Err(TooLarge)
    }

    fn publish(&self, publish: &Publish, into: &mut BytesMut) -> Result<(), TooLarge> {
        let v5 = self.version == Version::V5;
        let properties_bytes = if v5 { publish_properties_bytes(publish)? } else { 0 };
        let fits_text = u16::try_from(publish.topic.len()).is_ok();
        let id_bytes = if publish.qos == QoS::AtMostOnce { 0 } else { 2 };
        let block_bytes = if v5 { variable_bytes(properties_bytes) + properties_bytes } else { 0 };
        let remaining = 2 + publish.topic.len() + id_bytes + block_bytes + publish.payload.len();
        if !fits_text || remaining > MAX_REMAINING || 1 + variable_bytes(remaining) + remaining > self.max_packet_bytes
        {
            return Err(TooLarge);
        }
        into.reserve(MAX_PACKET_BYTES.min(5 + remaining));
        let dup = publish.dup && publish.qos != QoS::AtMostOnce;
        into.put_u8(0x30 | u8::from(dup) << 3 | (publish.qos as u8) << 1 | u8::from(publish.retain));
        put_variable(remaining, into);
        put_text(&publish.topic, into);
        if publish.qos != QoS::AtMostOnce {
            let id = publish.packet_id.expect("a message of QoS 1 or 2 is given its packet id before it is written");
            into.put_u16(id.get());
        }
        if v5 {
            put_variable(properties_bytes, into);
            put_publish_properties(publish, into);
        }
        into.put_slice(&publish.payload);
        Ok(())
    }

    fn ack(&self, first: u8, ack: &Ack, into: &mut BytesMut) -> Result<(), TooLarge> {
        let [high, low] = ack.packet_id.get().to_be_bytes();
        if self.version == Version::V311 {
            return self.small(&[first, 2, high, low], into);
        }
        if ack.reason_string.is_some() && self.problem_information && self.ack_with_words(first, ack, into).is_ok() {
            return Ok(());
        }
        if ack.reason == Reason::Success {
            return self.small(&[first, 2, high, low], into);
        }
        let code = if first < 0x60 { u8::from(ack_code(ack.reason)) } else { u8::from(release_code(ack.reason)) };
        self.small(&[first, 3, high, low, code], into)
    }

    fn ack_with_words(&self, first: u8, ack: &Ack, into: &mut BytesMut) -> Result<(), TooLarge> {
        let one = || v5::PublishAck {
            packet_id: ack.packet_id,
            reason_code: ack_code(ack.reason),
            properties: Vec::new(),
            reason_string: ack.reason_string.clone(),
        };
        let two = || v5::PublishAck2 {
            packet_id: ack.packet_id,
            reason_code: release_code(ack.reason),
            properties: Vec::new(),
            reason_string: ack.reason_string.clone(),
        };
        let packet = |_: bool| match first {
            0x40 => v5::Packet::PublishAck(one()),
            0x50 => v5::Packet::PublishReceived(one()),
            0x62 => v5::Packet::PublishRelease(two()),
            _ => v5::Packet::PublishComplete(two()),
        };
        self.by_codec(true, packet, into)
    }

    fn conn_ack(&self, ack: &ConnAck, into: &mut BytesMut) -> Result<(), TooLarge> {
        let session_present = ack.session_present && !ack.reason.is_failure();
        if self.version == Version::V311 {
            return match return_code(ack.reason) {
                Some(code) => self.small(&[0x20, 2, u8::from(session_present), code], into),
                None => Ok(()),
            };
        }
        let packet = |diagnostics| {
            v5::Packet::from(v5::ConnectAck {
                session_present,
                reason_code: legal(ack.reason, v5::ConnectAckReason::UnspecifiedError),
                session_expiry_interval_secs: ack.session_expiry_s,
                receive_max: ack.receive_maximum,
                max_qos: codec_qos(ack.maximum_qos),
                max_packet_size: ack.maximum_packet_size.map(NonZeroU32::get),
                assigned_client_id: ack.assigned_client_id.clone(),
                topic_alias_max: ack.topic_alias_maximum,
                retain_available: ack.retain_available,
                wildcard_subscription_available: ack.wildcard_subscriptions_available,
                subscription_identifiers_available: ack.subscription_ids_available,
                shared_subscription_available: ack.shared_subscriptions_available,
                server_keepalive_sec: ack.server_keep_alive_s,
                response_info: ack.response_information.clone(),
                server_reference: None,
                auth_method: ack.authentication_method.clone(),
                auth_data: ack.authentication_data.clone(),
                reason_string: ack.reason_string.clone().filter(|_| diagnostics),
                user_properties: if diagnostics { ack.user_properties.clone() } else { Vec::new() },
            })
        };
        self.by_codec(true, packet, into)
    }

    fn sub_ack(
        &self,
        packet_id: PacketId,
        reasons: &[Reason],
        words: Option<&str>,
        into: &mut BytesMut,
    ) -> Result<(), TooLarge> {
        if self.version == Version::V311 {
            let codes = reasons.iter().map(|reason| if reason.is_failure() { 0x80 } else { reason.code() });
            return self.v311_sub_ack(packet_id, codes, into);
        }
        let packet = |diagnostics| {
            v5::Packet::from(v5::SubscribeAck {
                packet_id,
                properties: Vec::new(),
                reason_string: words.filter(|_| diagnostics).map(ByteString::from),
                status: reasons.iter().map(|r| legal(*r, v5::SubscribeAckReason::UnspecifiedError)).collect(),
            })
        };
        self.by_codec(self.problem_information, packet, into)
    }

    fn v311_sub_ack(
        &self,
        packet_id: PacketId,
        codes: impl ExactSizeIterator<Item = u8>,
        into: &mut BytesMut,
    ) -> Result<(), TooLarge> {
        let remaining = 2 + codes.len();
        if remaining > MAX_REMAINING || 1 + variable_bytes(remaining) + remaining > self.max_packet_bytes {
            return Err(TooLarge);
        }
        into.put_u8(0x90);
        put_variable(remaining, into);
        into.put_u16(packet_id.get());
        into.extend(codes);
        Ok(())
    }

    fn unsub_ack(
        &self,
        packet_id: PacketId,
        reasons: &[Reason],
        words: Option<&str>,
        into: &mut BytesMut,
    ) -> Result<(), TooLarge> {
        if self.version == Version::V311 {
            let [high, low] = packet_id.get().to_be_bytes();
            return self.small(&[0xB0, 2, high, low], into);
        }
        let packet = |diagnostics| {
            v5::Packet::from(v5::UnsubscribeAck {
                packet_id,
                properties: Vec::new(),
                reason_string: words.filter(|_| diagnostics).map(ByteString::from),
                status: reasons.iter().map(|r| legal(*r, v5::UnsubscribeAckReason::UnspecifiedError)).collect(),
            })
        };
        self.by_codec(self.problem_information, packet, into)
    }

    fn disconnect(
        &self,
        reason: Reason,
        words: Option<&str>,
        user_properties: &[(ByteString, ByteString)],
        into: &mut BytesMut,
    ) -> Result<(), TooLarge> {
        if self.version == Version::V311 {
            return Ok(());
        }
        let reason_code = legal(reason, v5::DisconnectReasonCode::UnspecifiedError);
        if words.is_none() && user_properties.is_empty() {
            return self.small(&[0xE0, 1, reason_code.into()], into);
        }
        let packet = |diagnostics| {
            v5::Packet::from(v5::Disconnect {
                reason_code,
                session_expiry_interval_secs: None,
                server_reference: None,
                reason_string: words.filter(|_| diagnostics).map(ByteString::from),
                user_properties: if diagnostics { user_properties.to_vec() } else { Vec::new() },
            })
        };
        self.by_codec(true, packet, into).or_else(|_| self.small(&[0xE0, 1, reason_code.into()], into))
    }

    fn auth(&self, auth: &Auth, into: &mut BytesMut) -> Result<(), TooLarge> {
        if self.version == Version::V311 {
            return Ok(());
        }
        let packet = |diagnostics| {
            v5::Packet::from(v5::Auth {
                reason_code: legal(auth.reason, v5::AuthReasonCode::ContinueAuth),
                auth_method: auth.method.clone(),
                auth_data: auth.data.clone(),
                reason_string: auth.reason_string.clone().filter(|_| diagnostics),
                user_properties: if diagnostics { auth.user_properties.clone() } else { Vec::new() },
            })
        };
        self.by_codec(self.problem_information, packet, into)
    }
}

fn max_packet_bytes(maximum: Option<NonZeroU32>) -> usize {
    maximum.map_or(MAX_PACKET_BYTES, |bytes| bytes.get() as usize)
}

/// The codec's code for `reason`, or `otherwise` when it is not one of this packet's (MQTT 5 §2.4, table 2-6).
fn legal<T: TryFrom<u8>>(reason: Reason, otherwise: T) -> T {
    T::try_from(reason.code()).unwrap_or(otherwise)
}

fn ack_code(reason: Reason) -> v5::PublishAckReason {
    legal(reason, v5::PublishAckReason::UnspecifiedError)
}

/// PUBREL and PUBCOMP know one error only.
fn release_code(reason: Reason) -> v5::PublishAck2Reason {
    legal(reason, v5::PublishAck2Reason::PacketIdNotFound)
}

/// The return code of 3.1.1 (§3.2.2.3), if there is one that says it.
fn return_code(reason: Reason) -> Option<u8> {
    match reason {
        Reason::Success => Some(0),
        Reason::UnsupportedProtocolVersion => Some(1),
        Reason::ClientIdentifierNotValid => Some(2),
        Reason::ServerUnavailable
        | Reason::ServerBusy
        | Reason::ServerShuttingDown
        | Reason::QuotaExceeded
        | Reason::ConnectionRateExceeded
        | Reason::UseAnotherServer
        | Reason::ServerMoved => Some(3),
        Reason::BadUserNameOrPassword | Reason::BadAuthenticationMethod => Some(4),
        Reason::NotAuthorized | Reason::Banned => Some(5),
        _ => None,
    }
}

fn codec_qos(qos: QoS) -> types::QoS {
    match qos {
        QoS::AtMostOnce => types::QoS::AtMostOnce,
        QoS::AtLeastOnce => types::QoS::AtLeastOnce,
        QoS::ExactlyOnce => types::QoS::ExactlyOnce,
    }
}

/// How many bytes a variable byte integer takes (MQTT 5 §1.5.5).
const fn variable_bytes(value: usize) -> usize {
    match value {
        0..=127 => 1,
        128..=16_383 => 2,
        16_384..=2_097_151 => 3,
        _ => 4,
    }
}

#[expect(clippy::cast_possible_truncation, reason = "seven bits fit a byte")]
fn put_variable(mut value: usize, into: &mut BytesMut) {
    while value > 127 {
        into.put_u8((value & 0x7F) as u8 | 0x80);
        value >>= 7;
    }
    into.put_u8(value as u8);
}

/// Writes bytes with their length in front; they were measured by [`sized`] before.
fn put_sized(bytes: &[u8], into: &mut BytesMut) {
    into.put_u16(u16::try_from(bytes.len()).expect("measured before: more is TooLarge"));
    into.put_slice(bytes);
}

fn put_text(text: &str, into: &mut BytesMut) {
    put_sized(text.as_bytes(), into);
}

/// Bytes that `bytes` takes with its length in front.
fn sized(bytes: &[u8]) -> Result<usize, TooLarge> {
    if bytes.len() > usize::from(u16::MAX) { Err(TooLarge) } else { Ok(2 + bytes.len()) }
}

fn publish_properties_bytes(publish: &Publish) -> Result<usize, TooLarge> {
    let ids: usize = publish.subscription_ids.iter().map(|id| 1 + variable_bytes(*id as usize)).sum();
    let alias = if publish.topic_alias.is_some() { 3 } else { 0 };
    let carried = publish.properties.as_deref().map_or(Ok(0), carried_bytes)?;
    Ok(ids + alias + carried)
}

fn carried_bytes(properties: &PublishProperties) -> Result<usize, TooLarge> {
    let mut bytes = 0;
    bytes += properties.payload_is_utf8.map_or(0, |_| 2);
    bytes += properties.message_expiry_s.map_or(0, |_| 5);
    let texts = [properties.content_type.as_deref(), properties.response_topic.as_deref()];
    for text in texts.into_iter().flatten() {
        bytes += 1 + sized(text.as_bytes())?;
    }
    if let Some(data) = &properties.correlation_data {
        bytes += 1 + sized(data)?;
    }
    for (name, value) in &properties.user_properties {
        bytes += 1 + sized(name.as_bytes())? + sized(value.as_bytes())?;
    }
    Ok(bytes)
}

fn put_publish_properties(publish: &Publish, into: &mut BytesMut) {
    if let Some(properties) = publish.properties.as_deref() {
        put_carried(properties, into);
    }
    if let Some(alias) = publish.topic_alias {
        into.put_u8(0x23);
        into.put_u16(alias.get());
    }
    for id in &publish.subscription_ids {
        into.put_u8(0x0B);
        put_variable(*id as usize, into);
    }
}

fn put_carried(properties: &PublishProperties, into: &mut BytesMut) {
    if let Some(is_utf8) = properties.payload_is_utf8 {
        into.put_slice(&[0x01, u8::from(is_utf8)]);
    }
    if let Some(expiry_s) = properties.message_expiry_s {
        into.put_u8(0x02);
        into.put_u32(expiry_s);
    }
    if let Some(content_type) = &properties.content_type {
        into.put_u8(0x03);
        put_text(content_type, into);
    }
    if let Some(topic) = &properties.response_topic {
        into.put_u8(0x08);
        put_text(topic, into);
    }
    if let Some(data) = &properties.correlation_data {
        into.put_u8(0x09);
        put_sized(data, into);
    }
    for (name, value) in &properties.user_properties {
        into.put_u8(0x26);
        put_text(name, into);
        put_text(value, into);
    }
}
