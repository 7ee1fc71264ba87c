//! What the wire promises: each rule by its section ([`rules`]), that both directions agree with an independent
//! reader or writer ([`round_trip`]), and that no stream of bytes does harm ([`stream`]).

mod round_trip;
mod rules;
mod stream;

use bytes::{BufMut, BytesMut};

use super::{Ack, Auth, Connect, Decoder, Disconnect, Packet, Publish, PublishProperties, Reason, Version, Violation};

/// The limits of the tests, in bytes.
const MAX_PACKET: u32 = 64 * 1024;
const MAX_CONNECT: u32 = 8 * 1024;

/// A client's packet being written, byte by byte.
#[derive(Clone, Default)]
struct Raw(Vec<u8>);

impl Raw {
    fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    fn u16(mut self, value: u16) -> Self {
        self.0.put_u16(value);
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.0.put_u32(value);
        self
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn variable(mut self, mut value: usize) -> Self {
        while value > 127 {
            self.0.push(u8::try_from(value % 128).unwrap() | 0x80);
            value /= 128;
        }
        self.u8(u8::try_from(value).unwrap())
    }

    fn sized(self, bytes: &[u8]) -> Self {
        self.u16(u16::try_from(bytes.len()).unwrap()).bytes(bytes)
    }

    fn text(self, text: &str) -> Self {
        self.sized(text.as_bytes())
    }

    /// `Some(value)` written as a property.
    fn property<T>(self, id: u8, value: Option<T>, write: impl FnOnce(Self, T) -> Self) -> Self {
        match value {
            Some(value) => write(self.u8(id), value),
            None => self,
        }
    }

    fn users(self, properties: &[(super::ByteString, super::ByteString)]) -> Self {
        properties.iter().fold(self, |raw, (name, value)| raw.u8(0x26).text(name).text(value))
    }

    /// A block of properties.
    fn block(self, properties: &Self) -> Self {
        self.variable(properties.0.len()).bytes(&properties.0)
    }

    /// The packet of kind and flags `first` with this body.
    fn frame(self, first: u8) -> Vec<u8> {
        Self::default().u8(first).variable(self.0.len()).bytes(&self.0).0
    }
}

fn raw() -> Raw {
    Raw::default()
}

/// A plain CONNECT with a clean session.
fn plain_connect(version: Version) -> Vec<u8> {
    let head = raw().text("MQTT").u8(level(version)).u8(0x02).u16(60);
    match version {
        Version::V311 => head,
        Version::V5 => head.variable(0),
    }
    .text("c")
    .frame(0x10)
}

fn level(version: Version) -> u8 {
    match version {
        Version::V311 => 4,
        Version::V5 => 5,
    }
}

/// A decoder that has read its CONNECT.
fn connected(version: Version) -> Decoder {
    let mut decoder = Decoder::new(MAX_PACKET, MAX_CONNECT);
    let mut buffer = BytesMut::from(&plain_connect(version)[..]);
    assert!(matches!(decoder.decode(&mut buffer), Ok(Some(Packet::Connect(_)))));
    assert!(buffer.is_empty());
    decoder
}

/// The one packet in `bytes`, for a client whose CONNECT was read.
fn decode_one(version: Version, bytes: &[u8]) -> Result<Packet, Violation> {
    decode_with(connected(version), bytes)
}

fn decode_with(mut decoder: Decoder, bytes: &[u8]) -> Result<Packet, Violation> {
    let mut buffer = BytesMut::from(bytes);
    let packet = decoder.decode(&mut buffer)?.expect("the packet is whole");
    assert!(buffer.is_empty(), "{} bytes are left", buffer.len());
    Ok(packet)
}

/// The bytes of a client's packet, written from the standard and not by the code under test.
fn written(version: Version, packet: &Packet) -> Vec<u8> {
    match packet {
        Packet::Connect(connect) => written_connect(connect),
        Packet::Publish(publish) => written_publish(version, publish),
        Packet::PubAck(ack) => written_ack(version, 0x40, ack),
        Packet::PubRec(ack) => written_ack(version, 0x50, ack),
        Packet::PubRel(ack) => written_ack(version, 0x62, ack),
        Packet::PubComp(ack) => written_ack(version, 0x70, ack),
        Packet::Subscribe(subscribe) => {
            let mut body = raw().u16(subscribe.packet_id.get());
            if version == Version::V5 {
                let id = subscribe.subscription_id;
                let block = raw().property(0x0B, id, |raw, id| raw.variable(id as usize));
                body = body.block(&block.users(&subscribe.user_properties));
            }
            subscribe
                .filters
                .iter()
                .fold(body, |raw, line| {
                    let flags = u8::from(line.no_local) << 2 | u8::from(line.retain_as_published) << 3;
                    raw.text(&line.filter).u8(line.qos as u8 | flags | (line.retain_handling as u8) << 4)
                })
                .frame(0x82)
        }
        Packet::Unsubscribe(unsubscribe) => {
            let body = raw().u16(unsubscribe.packet_id.get());
            let body = if version == Version::V5 { body.variable(0) } else { body };
            unsubscribe.filters.iter().fold(body, |raw, filter| raw.text(filter)).frame(0xA2)
        }
        Packet::PingReq => raw().frame(0xC0),
        Packet::Disconnect(disconnect) => written_disconnect(version, disconnect),
        Packet::Auth(auth) => written_auth(auth),
    }
}

fn written_connect(connect: &Connect) -> Vec<u8> {
    let v5 = connect.version == Version::V5;
    let mut flags = u8::from(connect.clean_start) << 1;
    if let Some(will) = &connect.will {
        flags |= 0x04 | (will.qos as u8) << 3 | u8::from(will.retain) << 5;
    }
    flags |= u8::from(connect.password.is_some()) << 6 | u8::from(connect.username.is_some()) << 7;
    let mut body = raw().text("MQTT").u8(level(connect.version)).u8(flags).u16(connect.keep_alive_s);
    if v5 {
        body = body.block(
            &raw()
                .property(0x11, Some(connect.session_expiry_s), Raw::u32)
                .property(0x21, Some(connect.receive_maximum.get()), Raw::u16)
                .property(0x27, connect.maximum_packet_size, |raw, size| raw.u32(size.get()))
                .property(0x22, Some(connect.topic_alias_maximum), Raw::u16)
                .property(0x19, Some(connect.request_response_information), |raw, flag| raw.u8(flag.into()))
                .property(0x17, Some(connect.request_problem_information), |raw, flag| raw.u8(flag.into()))
                .property(0x15, connect.authentication_method.as_deref(), Raw::text)
                .property(0x16, connect.authentication_data.as_deref(), Raw::sized)
                .users(&connect.user_properties),
        );
    }
    body = body.text(&connect.client_id);
    if let Some(will) = &connect.will {
        if v5 {
            let block = raw().property(0x18, Some(will.delay_s), Raw::u32);
            body = body.block(&written_properties(block, will.properties.as_deref()));
        }
        body = body.text(&will.topic).sized(&will.payload);
    }
    if let Some(username) = &connect.username {
        body = body.text(username);
    }
    if let Some(password) = &connect.password {
        body = body.sized(password);
    }
    body.frame(0x10)
}

fn written_properties(block: Raw, properties: Option<&PublishProperties>) -> Raw {
    let Some(properties) = properties else { return block };
    block
        .property(0x01, properties.payload_is_utf8, |raw, flag| raw.u8(flag.into()))
        .property(0x02, properties.message_expiry_s, Raw::u32)
        .property(0x03, properties.content_type.as_deref(), Raw::text)
        .property(0x08, properties.response_topic.as_deref(), Raw::text)
        .property(0x09, properties.correlation_data.as_deref(), Raw::sized)
        .users(&properties.user_properties)
}

fn written_publish(version: Version, publish: &Publish) -> Vec<u8> {
    let first = 0x30 | u8::from(publish.dup) << 3 | (publish.qos as u8) << 1 | u8::from(publish.retain);
    let mut body = raw().text(&publish.topic);
    if let Some(id) = publish.packet_id {
        body = body.u16(id.get());
    }
    if version == Version::V5 {
        let block = raw().property(0x23, publish.topic_alias, |raw, alias| raw.u16(alias.get()));
        body = body.block(&written_properties(block, publish.properties.as_deref()));
    }
    body.bytes(&publish.payload).frame(first)
}

fn written_ack(version: Version, first: u8, ack: &Ack) -> Vec<u8> {
    let body = raw().u16(ack.packet_id.get());
    if version == Version::V311 || (ack.reason == Reason::Success && ack.reason_string.is_none()) {
        return body.frame(first);
    }
    let body = body.u8(ack.reason.code());
    match &ack.reason_string {
        Some(words) => body.block(&raw().u8(0x1F).text(words)).frame(first),
        None => body.frame(first),
    }
}

fn written_disconnect(version: Version, disconnect: &Disconnect) -> Vec<u8> {
    if version == Version::V311 {
        return raw().frame(0xE0);
    }
    let block = raw().property(0x11, disconnect.session_expiry_s, Raw::u32).property(
        0x1F,
        disconnect.reason_string.as_deref(),
        Raw::text,
    );
    raw().u8(disconnect.reason.code()).block(&block).frame(0xE0)
}

fn written_auth(auth: &Auth) -> Vec<u8> {
    let block = raw()
        .property(0x15, auth.method.as_deref(), Raw::text)
        .property(0x16, auth.data.as_deref(), Raw::sized)
        .property(0x1F, auth.reason_string.as_deref(), Raw::text)
        .users(&auth.user_properties);
    raw().u8(auth.reason.code()).block(&block).frame(0xF0)
}
