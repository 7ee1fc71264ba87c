//! Each rule of the standards that a packet can break by itself, by its section.

use bytes::BytesMut;

use super::super::{
    Ack, ConnAck, Connect, Decoder, Encoder, MAX_FILTERS, MAX_USER_PROPERTIES, Outgoing, Packet, PacketId, Publish,
    QoS, Reason, TooLarge, Version,
};
use super::{MAX_CONNECT, MAX_PACKET, Raw, connected, decode_one, decode_with, plain_connect, raw};
use Version::{V5, V311};

/// A PUBLISH of MQTT 5 on `topic` with these properties.
fn publish5(first: u8, topic: &[u8], properties: &Raw) -> Vec<u8> {
    let body = raw().sized(topic);
    let body = if first & 0b0110 == 0 { body } else { body.u16(7) };
    body.block(properties).bytes(b"payload").frame(first)
}

fn publish311(first: u8, topic: &[u8]) -> Vec<u8> {
    let body = raw().sized(topic);
    if first & 0b0110 == 0 { body } else { body.u16(7) }.bytes(b"payload").frame(first)
}

fn subscribe5(properties: &Raw, filter: &str, options: u8) -> Vec<u8> {
    raw().u16(1).block(properties).text(filter).u8(options).frame(0x82)
}

#[track_caller]
fn refused(version: Version, bytes: &[u8], reason: Reason, rule: &str) {
    let violation = decode_one(version, bytes).expect_err(rule);
    assert_eq!(violation.reason, reason, "{rule}: {violation}");
    assert_eq!(violation.answer_as, (version == V5).then_some(V5), "{rule}: 3.1.1 is just closed (§4.8)");
}

#[track_caller]
fn refused_by_both(bytes: &[u8], reason: Reason, rule: &str) {
    refused(V311, bytes, reason, rule);
    refused(V5, bytes, reason, rule);
}

#[test]
fn kinds_and_flags_a_client_may_not_send() {
    refused_by_both(&[0x00, 0], Reason::MalformedPacket, "§2.1.2 type 0 is reserved");
    refused_by_both(&plain_connect(V5), Reason::ProtocolError, "§3.1.0-2 a second CONNECT");
    for server_only in [0x20, 0x90, 0xB0, 0xD0] {
        refused_by_both(&[server_only, 3, 0, 1, 0], Reason::ProtocolError, "§2.1.2 from server to client");
    }
    for flags in [0x11, 0x41, 0x5F, 0x60, 0x66, 0x70 | 2, 0x80, 0x83, 0xA0, 0xC1, 0xE8] {
        let violation = decode_one(V5, &[flags, 2, 0, 1]).expect_err("§2.1.3 reserved flags");
        assert_eq!(violation.reason, Reason::MalformedPacket, "{flags:#x}");
    }
    refused(V311, &[0xF0, 0], Reason::MalformedPacket, "3.1.1 §2.2.1 type 15 is reserved");
    refused(V5, &[0xF1, 0], Reason::MalformedPacket, "§3.15.1 flags of AUTH");
    refused_by_both(&publish311(0x36, b"a"), Reason::MalformedPacket, "§3.3.1-4 QoS 3");
    refused_by_both(&publish311(0x38, b"a"), Reason::MalformedPacket, "§3.3.1-2 DUP with QoS 0");
    refused_by_both(&[0xC0, 1, 0], Reason::MalformedPacket, "§3.12 PINGREQ has no body");
    refused(V311, &[0xE0, 1, 0], Reason::MalformedPacket, "3.1.1 §3.14 DISCONNECT has no body");
}

#[test]
fn the_remaining_length_keeps_to_its_form() {
    refused_by_both(&[0x30, 0x80, 0x80, 0x80, 0x80], Reason::MalformedPacket, "§2.1.4 more than four bytes");
    refused(V5, &[0xC0, 0x80, 0x00], Reason::MalformedPacket, "§1.5.5-1 not the shortest form");
    assert_eq!(decode_one(V311, &[0xC0, 0x80, 0x00]), Ok(Packet::PingReq));
}

#[test]
fn a_size_is_refused_before_the_body_is_there() {
    for (length, fits) in [(MAX_PACKET as usize - 4, true), (MAX_PACKET as usize - 3, false)] {
        let start = raw().u8(0x30).variable(length).0;
        assert_eq!(start.len(), 4, "three bytes of length");
        let decoded = connected(V5).decode(&mut BytesMut::from(&start[..]));
        assert_eq!(decoded.map_err(|v| v.reason), if fits { Ok(None) } else { Err(Reason::PacketTooLarge) });
    }
    let start = raw().u8(0x10).variable(MAX_CONNECT as usize).0;
    let violation = Decoder::new(MAX_PACKET, MAX_CONNECT).decode(&mut BytesMut::from(&start[..])).unwrap_err();
    assert_eq!((violation.reason, violation.answer_as), (Reason::PacketTooLarge, None));
}

#[test]
fn the_first_packet_is_connect() {
    for first in [0x00, 0x11, 0x20, 0x30, 0xC0, 0xF0, b'G'] {
        let violation = Decoder::new(MAX_PACKET, MAX_CONNECT).decode(&mut BytesMut::from(&[first][..])).unwrap_err();
        assert_eq!((violation.reason, violation.answer_as), (Reason::ProtocolError, None), "§3.1.0-1 {first:#x}");
    }
}

// ---- CONNECT ----

/// A CONNECT with these flags; `rest` is what follows the keep alive.
fn connect(level: u8, flags: u8, rest: &Raw) -> Vec<u8> {
    raw().text("MQTT").u8(level).u8(flags).u16(10).bytes(&rest.0).frame(0x10)
}

fn first(bytes: &[u8]) -> Result<Packet, (Reason, Option<Version>)> {
    decode_with(Decoder::new(MAX_PACKET, MAX_CONNECT), bytes).map_err(|v| (v.reason, v.answer_as))
}

#[test]
fn protocol_name_and_level() {
    let levels = |name: &str, level: u8| first(&raw().text(name).u8(level).u8(2).u16(0).text("c").frame(0x10));
    let unsupported = Reason::UnsupportedProtocolVersion;
    assert_eq!(levels("MQIsdp", 3), Err((unsupported, Some(V311))), "MQTT 3.1");
    assert_eq!(levels("MQTT", 3), Err((unsupported, Some(V311))), "3.1.1 §3.1.2-2");
    assert_eq!(levels("MQTT", 0), Err((unsupported, Some(V311))));
    assert_eq!(levels("MQTT", 6), Err((unsupported, Some(V5))), "§3.1.2-2");
    assert_eq!(levels("MQTT", 0x84), Err((unsupported, Some(V5))), "bridges of other brokers");
    for name in ["", "mqtt", "MQTTX", "HTTP"] {
        assert_eq!(levels(name, 4), Err((Reason::ProtocolError, None)), "§3.1.2-1 {name:?}");
    }
}

#[test]
fn flags_of_connect_311() {
    let closed = |reason| Err((reason, None));
    let malformed = || closed(Reason::MalformedPacket);
    assert_eq!(first(&connect(4, 0x03, &raw().text("c"))), malformed(), "§3.1.2-3 reserved flag");
    assert_eq!(first(&connect(4, 0x0A, &raw().text("c"))), malformed(), "§3.1.2-13 will QoS without will");
    assert_eq!(first(&connect(4, 0x22, &raw().text("c"))), malformed(), "§3.1.2-15 will retain without will");
    let will_qos_3 = connect(4, 0x1E, &raw().text("c").text("t").text("m"));
    assert_eq!(first(&will_qos_3), malformed(), "§3.1.2-14 will QoS 3");
    assert_eq!(first(&connect(4, 0x42, &raw().text("c").text("p"))), malformed(), "§3.1.2-22 password without user");
    let trailing = connect(4, 0x02, &raw().text("c").u8(0));
    assert_eq!(first(&trailing), malformed(), "§3.1.3 bytes behind the payload");
    assert_eq!(first(&connect(4, 0x82, &raw().text("c"))), malformed(), "§3.1.2-19 user name is missing");
    assert_eq!(first(&connect(4, 0x02, &raw().sized(b"\xFF"))), malformed(), "§1.5.3-1 UTF-8");
    assert_eq!(first(&connect(4, 0x02, &raw().sized(b"\xED\xA0\x80"))), malformed(), "§1.5.3-1 surrogates");
    assert_eq!(first(&connect(4, 0x02, &raw().text("a\0"))), malformed(), "§1.5.3-2 U+0000");
    let rejected = Err((Reason::ClientIdentifierNotValid, Some(V311)));
    assert_eq!(first(&connect(4, 0x00, &raw().text(""))), rejected, "§3.1.3-8 no id and no clean session");
    for topic in ["", "a/#", "+", "a\0"] {
        let bytes = connect(4, 0x06, &raw().text("c").text(topic).text("m"));
        let reason = if topic.contains('\0') { Reason::MalformedPacket } else { Reason::TopicNameInvalid };
        assert_eq!(first(&bytes), closed(reason), "§4.7 will topic {topic:?}");
    }
}

#[test]
fn a_connect_that_is_legal_in_5_only() {
    let password_alone = connect(5, 0x42, &raw().variable(0).text("c").sized(b"\x00\xFF"));
    let Ok(Packet::Connect(accepted)) = first(&password_alone) else { panic!("§3.1.2.9") };
    assert_eq!(accepted.password.as_deref(), Some(&b"\x00\xFF"[..]));
    let Ok(Packet::Connect(accepted)) = first(&connect(5, 0x00, &raw().variable(0).text(""))) else {
        panic!("§3.1.3.1 the server may choose the id of a kept session")
    };
    assert!(!accepted.clean_start && accepted.client_id.is_empty());
}

#[test]
fn properties_of_connect() {
    let with = |block: &Raw| first(&connect(5, 0x02, &raw().block(block).text("c")));
    let answered = |reason| Err((reason, Some(V5)));
    let (malformed, protocol) = (answered(Reason::MalformedPacket), answered(Reason::ProtocolError));
    assert_eq!(with(&raw().u8(0x21).u16(0)), protocol, "§3.1.2.11.3 receive maximum 0");
    assert_eq!(with(&raw().u8(0x27).u32(0)), protocol, "§3.1.2.11.4 maximum packet size 0");
    assert_eq!(with(&raw().u8(0x17).u8(2)), protocol, "§3.1.2.11.7 request problem information 2");
    assert_eq!(with(&raw().u8(0x19).u8(2)), protocol, "§3.1.2.11.6 request response information 2");
    assert_eq!(with(&raw().u8(0x16).sized(b"x")), protocol, "§3.1.2.11.10 data without a method");
    assert_eq!(with(&raw().u8(0x11).u32(1).u8(0x11).u32(1)), protocol, "§3.1.2.11.2 twice");
    assert_eq!(with(&raw().u8(0x23).u16(1)), malformed, "§2.2.2.2 not of this packet");
    assert_eq!(with(&raw().u8(0x7E).u16(1)), malformed, "§2.2.2.2 unknown");
    assert_eq!(with(&raw().u8(0x11).u16(1)), malformed, "a value that is cut off");
    assert_eq!(with(&raw().u8(0x15).sized(b"\xC0")), malformed, "§1.5.4-1 UTF-8");
    assert_eq!(with(&raw().u8(0x26).text("a\0").text("b")), malformed, "§1.5.4-2 U+0000");
    let users = |count| (0..count).fold(raw(), |block, _| block.u8(0x26).text("").text(""));
    assert!(with(&users(MAX_USER_PROPERTIES)).is_ok());
    assert_eq!(with(&users(MAX_USER_PROPERTIES + 1)), answered(Reason::QuotaExceeded));
}

#[test]
fn properties_of_a_will() {
    let with = |block: &Raw, topic: &str| {
        first(&connect(5, 0x06, &raw().variable(0).text("c").block(block).text(topic).text("m")))
    };
    let Ok(Packet::Connect(accepted)) = with(&raw().u8(0x02).u32(0).u8(0x18).u32(9).u8(0x01).u8(0), "t") else {
        panic!("§3.1.3.2.4 an expiry of 0 is legal")
    };
    let will = accepted.will.unwrap();
    let properties = will.properties.unwrap();
    assert_eq!((will.delay_s, properties.message_expiry_s, properties.payload_is_utf8), (9, Some(0), Some(false)));
    let answered = |reason| Err((reason, Some(V5)));
    assert_eq!(with(&raw().u8(0x01).u8(2), "t"), answered(Reason::ProtocolError), "§3.1.3.2.3");
    assert_eq!(with(&raw().u8(0x08).text("a/+"), "t"), answered(Reason::ProtocolError), "§3.1.3.2.6");
    assert_eq!(with(&raw().u8(0x23).u16(1), "t"), answered(Reason::MalformedPacket), "a will has no alias");
    assert_eq!(with(&raw(), "#"), answered(Reason::TopicNameInvalid), "§4.7.1");
    assert_eq!(with(&raw(), ""), answered(Reason::TopicNameInvalid), "§4.7.3-1");
}

// ---- PUBLISH ----

#[test]
fn topics_of_publish() {
    for topic in [&b"a/#"[..], b"+", b"a/b+", b"#"] {
        refused(V311, &publish311(0x32, topic), Reason::TopicNameInvalid, "§3.3.2-2 wildcards");
        refused(V5, &publish5(0x32, topic, &raw()), Reason::TopicNameInvalid, "§3.3.2-2 wildcards");
    }
    refused(V311, &publish311(0x30, b"a\0b"), Reason::MalformedPacket, "§1.5.3-2 U+0000");
    refused(V5, &publish5(0x30, b"a\0b", &raw()), Reason::MalformedPacket, "§1.5.4-2 U+0000");
    refused(V311, &publish311(0x30, b"a\xFF"), Reason::MalformedPacket, "§1.5.3-1 UTF-8");
    refused(V5, &publish5(0x30, b"a\xFF", &raw()), Reason::MalformedPacket, "§1.5.4-1 UTF-8");
    refused(V311, &publish311(0x30, b""), Reason::TopicNameInvalid, "§4.7.3-1 empty");
    refused(V5, &publish5(0x30, b"", &raw()), Reason::ProtocolError, "§3.3.2.1 empty without an alias");
    refused(V5, &publish5(0x30, &[b'/'; 64], &raw()), Reason::TopicNameInvalid, "our bound on levels");
    for topic in ["/", "äöü/€", "$odd", "日本"] {
        assert!(decode_one(V311, &publish311(0x32, topic.as_bytes())).is_ok(), "{topic}");
    }
}

#[test]
fn packet_ids_are_not_zero() {
    let zero311 = raw().text("a").u16(0).frame(0x32);
    let zero5 = raw().text("a").u16(0).variable(0).frame(0x32);
    refused(V311, &zero311, Reason::MalformedPacket, "3.1.1 §2.3.1-1");
    refused(V5, &zero5, Reason::MalformedPacket, "§2.2.1-3");
    for first in [0x40, 0x50, 0x62, 0x70] {
        refused_by_both(&[first, 2, 0, 0], Reason::MalformedPacket, "§2.2.1");
    }
    refused(V311, &raw().u16(0).text("a").u8(0).frame(0x82), Reason::MalformedPacket, "3.1.1 §2.3.1-1");
    refused(V5, &raw().u16(0).variable(0).text("a").frame(0xA2), Reason::MalformedPacket, "§2.2.1-3");
}

#[test]
fn properties_of_publish() {
    let with = |block: &Raw| publish5(0x32, b"t", block);
    let alias = |alias| raw().u8(0x23).u16(alias);
    refused(V5, &with(&alias(0)), Reason::TopicAliasInvalid, "§3.3.2-8 alias 0");
    refused(V5, &with(&raw().u8(0x0B).variable(5)), Reason::ProtocolError, "§3.3.4-6 subscription id from a client");
    refused(V5, &with(&raw().u8(0x0B).variable(0)), Reason::ProtocolError, "§3.3.2.3.8 subscription id 0");
    refused(V5, &with(&raw().u8(0x01).u8(2)), Reason::ProtocolError, "§3.3.2.3.2 payload format 2");
    refused(V5, &with(&raw().u8(0x08).text("a/#")), Reason::ProtocolError, "§3.3.2-14 response topic");
    refused(V5, &with(&raw().u8(0x08).text("")), Reason::ProtocolError, "§4.7.3-1 response topic");
    refused(V5, &with(&alias(1).u8(0x23).u16(2)), Reason::ProtocolError, "§3.3.2.3.4 twice");
    refused(V5, &with(&raw().u8(0x03).sized(b"\xFF")), Reason::MalformedPacket, "§1.5.4-1 content type");
    refused(V5, &with(&raw().u8(0x11).u32(1)), Reason::MalformedPacket, "§2.2.2.2 not of this packet");
    refused(V5, &raw().text("t").u16(1).variable(9).frame(0x32), Reason::MalformedPacket, "§2.2.2.1 length");
    let Ok(Packet::Publish(aliased)) = decode_one(V5, &publish5(0x30, b"", &alias(3))) else { panic!("§3.3.2.1") };
    assert_eq!(aliased.topic_alias.unwrap().get(), 3);
    let Ok(Packet::Publish(expired)) = decode_one(V5, &with(&raw().u8(0x02).u32(0))) else { panic!("§3.3.2.3.3") };
    assert_eq!(expired.message_expiry_s(), Some(0));
    assert_eq!(&expired.payload[..], b"payload");
}

// ---- SUBSCRIBE, UNSUBSCRIBE, the rest ----

#[test]
fn subscribe_311() {
    let with = |filter: &str, options: u8| raw().u16(1).text(filter).u8(options).frame(0x82);
    refused(V311, &raw().u16(1).frame(0x82), Reason::ProtocolError, "§3.8.3-3 no filter");
    refused(V311, &with("a", 3), Reason::MalformedPacket, "§3.8.3-4 QoS 3");
    for reserved in [0x04, 0x10, 0x80] {
        refused(V311, &with("a", reserved), Reason::MalformedPacket, "§3.8.3-4 reserved bits");
    }
    for filter in ["", "a/#/b", "a#", "+a", "$share/g", "$share//a", "$share/g+/a"] {
        refused(V311, &with(filter, 0), Reason::TopicFilterInvalid, "§4.7.1");
    }
    refused(V311, &with("a\0", 0), Reason::MalformedPacket, "§1.5.3-2");
    refused(V311, &raw().u16(1).text("a").frame(0x82), Reason::MalformedPacket, "a filter without its QoS");
}

#[test]
fn subscribe_5() {
    let none = raw();
    refused(V5, &raw().u16(1).variable(0).frame(0x82), Reason::ProtocolError, "§3.8.3-2 no filter");
    refused(V5, &subscribe5(&none, "a", 0x03), Reason::ProtocolError, "§3.8.3.1 QoS 3");
    refused(V5, &subscribe5(&none, "a", 0x30), Reason::ProtocolError, "§3.8.3.1 retain handling 3");
    refused(V5, &subscribe5(&none, "a", 0x40), Reason::MalformedPacket, "§3.8.3-5 reserved bits");
    refused(V5, &subscribe5(&none, "$share/g/a", 0x04), Reason::ProtocolError, "§3.8.3-4 shared and no local");
    refused(V5, &subscribe5(&raw().u8(0x0B).variable(0), "a", 0), Reason::ProtocolError, "§3.8.2.1.2 id 0");
    let twice = raw().u8(0x0B).variable(1).u8(0x0B).variable(2);
    refused(V5, &subscribe5(&twice, "a", 0), Reason::ProtocolError, "§3.8.2.1.2 id twice");
    refused(V5, &subscribe5(&none, "a\0", 0), Reason::MalformedPacket, "§1.5.4-2");
    for (filter, valid) in [("a/+/#", true), ("$share/g/a", true), ("", false), ("a/#/b", false), ("$share/g", false)] {
        let Ok(Packet::Subscribe(subscribe)) = decode_one(V5, &subscribe5(&none, filter, 0)) else {
            panic!("{filter}")
        };
        assert_eq!(subscribe.filters[0].valid, valid, "§3.9.3 answers 0x8F for {filter:?} alone");
    }
}

#[test]
fn unsubscribe() {
    refused(V311, &raw().u16(1).frame(0xA2), Reason::ProtocolError, "§3.10.3-2 no filter");
    refused(V5, &raw().u16(1).variable(0).frame(0xA2), Reason::ProtocolError, "§3.10.3-2 no filter");
    refused(V311, &raw().u16(1).sized(b"\xFF").frame(0xA2), Reason::MalformedPacket, "§3.10.3-1");
    refused(V5, &raw().u16(1).variable(0).text("\0").frame(0xA2), Reason::MalformedPacket, "§3.10.3-1");
}

#[test]
fn filters_of_one_packet_are_bounded() {
    let lines = |count, extra: &[u8]| (0..count).fold(raw().u16(1), |body, _| body.text("a").bytes(extra));
    assert!(decode_one(V311, &lines(MAX_FILTERS, &[0]).frame(0x82)).is_ok());
    refused(V311, &lines(MAX_FILTERS + 1, &[0]).frame(0x82), Reason::QuotaExceeded, "our bound");
    refused(V311, &lines(MAX_FILTERS + 1, &[]).frame(0xA2), Reason::QuotaExceeded, "our bound");
}

#[test]
fn acknowledgements_disconnect_and_auth() {
    for first in [0x40, 0x50, 0x62, 0x70] {
        refused(V311, &[first, 3, 0, 1, 0], Reason::MalformedPacket, "3.1.1 §3.4 nothing behind the id");
        refused(V5, &[first, 3, 0, 1, 0x03], Reason::MalformedPacket, "§2.4 a reason that is not defined");
        refused(V5, &[first, 5, 0, 1, 0, 0, 0], Reason::MalformedPacket, "bytes behind the properties");
        refused(V5, &[first, 6, 0, 1, 0, 2, 0x23, 0], Reason::MalformedPacket, "§2.2.2.2 not of this packet");
        assert!(decode_one(V5, &[first, 4, 0, 1, 0, 0]).is_ok(), "§3.4.2.1 no properties");
    }
    refused(
        V5,
        &raw().u8(0).block(&raw().u8(0x1C).text("host")).frame(0xE0),
        Reason::MalformedPacket,
        "§3.14.2.2.5 server reference is for servers",
    );
    refused(V5, &raw().u8(0x9C + 8).frame(0xE0), Reason::MalformedPacket, "§3.14.2.1 reason");
    refused(V5, &raw().u8(0x18).frame(0xF0), Reason::ProtocolError, "§3.15.2.2.2 AUTH without a method");
    refused(V5, &raw().frame(0xF0), Reason::ProtocolError, "§3.15.2.2.2 AUTH without a method");
}

// ---- what the server sends ----

fn encoded(encoder: Encoder, packet: Outgoing<'_>) -> Result<Vec<u8>, TooLarge> {
    let mut into = BytesMut::from(&b"before"[..]);
    let result = encoder.encode(packet, &mut into);
    assert!(into.starts_with(b"before"));
    assert!(result.is_ok() || into.len() == 6, "nothing was written");
    result.map(|()| into[6..].to_vec())
}

fn client(version: Version, change: impl FnOnce(&mut Connect)) -> Encoder {
    let Ok(Packet::Connect(mut connect)) = first(&plain_connect(version)) else { panic!("plain") };
    change(&mut connect);
    Encoder::for_client(&connect)
}

#[test]
fn return_codes_of_311() {
    let cases = [
        (Reason::Success, &[0x20, 2, 1, 0][..]),
        (Reason::UnsupportedProtocolVersion, &[0x20, 2, 0, 1]),
        (Reason::ClientIdentifierNotValid, &[0x20, 2, 0, 2]),
        (Reason::ServerBusy, &[0x20, 2, 0, 3]),
        (Reason::QuotaExceeded, &[0x20, 2, 0, 3]),
        (Reason::BadUserNameOrPassword, &[0x20, 2, 0, 4]),
        (Reason::NotAuthorized, &[0x20, 2, 0, 5]),
        (Reason::MalformedPacket, &[]),
    ];
    for (reason, bytes) in cases {
        let ack = ConnAck { session_present: true, ..ConnAck::refusal(reason, None) };
        assert_eq!(encoded(Encoder::new(V311), Outgoing::ConnAck(&ack)).as_deref(), Ok(bytes), "{reason}");
    }
}

#[test]
fn answers_to_311_carry_no_reasons() {
    let (encoder, packet_id) = (Encoder::new(V311), PacketId::MIN);
    let reasons = &[Reason::GrantedQos1, Reason::NotAuthorized];
    let sub_ack = Outgoing::SubAck { packet_id, reasons, reason_string: Some("no") };
    assert_eq!(encoded(encoder, sub_ack).unwrap(), [0x90, 4, 0, 1, 1, 0x80]);
    let unsub_ack = Outgoing::UnsubAck { packet_id, reasons, reason_string: Some("no") };
    assert_eq!(encoded(encoder, unsub_ack).unwrap(), [0xB0, 2, 0, 1]);
    let ack = Ack { packet_id, reason: Reason::NotAuthorized, reason_string: Some("no".into()) };
    assert_eq!(encoded(encoder, Outgoing::PubAck(&ack)).unwrap(), [0x40, 2, 0, 1]);
    let bye = Outgoing::Disconnect { reason: Reason::ServerShuttingDown, reason_string: None, user_properties: &[] };
    assert!(encoded(encoder, bye).unwrap().is_empty());
}

#[test]
fn words_are_left_out_before_a_packet_is() {
    let ack = Ack { packet_id: PacketId::MIN, reason: Reason::NotAuthorized, reason_string: Some("because".into()) };
    let bare = [0x40, 3, 0, 1, 0x87];
    for limit in 1..32_u32 {
        let encoder = client(V5, |connect| connect.maximum_packet_size = limit.try_into().ok());
        let written = encoded(encoder, Outgoing::PubAck(&ack));
        match limit {
            1..=4 => assert_eq!(written, Err(TooLarge)),
            5..=15 => assert_eq!(written.as_deref(), Ok(&bare[..]), "§3.4.2.2.2 limit {limit}"),
            _ => assert_eq!(written.unwrap().len(), 16, "limit {limit}"),
        }
    }
    let unwanted = client(V5, |connect| connect.request_problem_information = false);
    assert_eq!(encoded(unwanted, Outgoing::PubAck(&ack)).as_deref(), Ok(&bare[..]), "§3.1.2-29");
    let bye = Outgoing::Disconnect { reason: Reason::NotAuthorized, reason_string: Some("x"), user_properties: &[] };
    assert_eq!(encoded(unwanted, bye).unwrap().len(), 8, "§3.1.2.11.7 DISCONNECT may say why");
}

#[test]
fn every_packet_survives_every_small_limit() {
    let words = "w".repeat(40);
    let user = [("name".into(), "value".into())];
    let conn_ack = ConnAck {
        assigned_client_id: Some("assigned".into()),
        user_properties: user.to_vec(),
        ..ConnAck::refusal(Reason::Success, Some(words.clone().into()))
    };
    let publish = Publish::new("a/b".into(), "payload".into(), QoS::AtMostOnce, false);
    let packet_id = PacketId::MIN;
    let reasons = &[Reason::Success, Reason::NotAuthorized];
    let reason_string = Some(&words[..]);
    let packets = [
        Outgoing::ConnAck(&conn_ack),
        Outgoing::Publish(&publish),
        Outgoing::SubAck { packet_id, reasons, reason_string },
        Outgoing::UnsubAck { packet_id, reasons, reason_string },
        Outgoing::PingResp,
        Outgoing::Disconnect { reason: Reason::ServerBusy, reason_string, user_properties: &user },
    ];
    for packet in packets {
        let mut fitted = false;
        for limit in 1..=200_u32 {
            let encoder = client(V5, |connect| connect.maximum_packet_size = limit.try_into().ok());
            let written = encoded(encoder, packet);
            assert!(written.as_ref().is_ok_and(|bytes| bytes.len() <= limit as usize) || (written.is_err() && !fitted));
            fitted |= written.is_ok();
        }
        assert!(fitted, "{packet:?}");
    }
}

#[test]
fn a_string_that_cannot_be_written_is_too_large() {
    let long = "x".repeat(65_536);
    let publish = Publish::new(long.clone().into(), "".into(), QoS::AtMostOnce, false);
    assert_eq!(encoded(Encoder::new(V311), Outgoing::Publish(&publish)), Err(TooLarge));
    assert_eq!(encoded(Encoder::new(V5), Outgoing::Publish(&publish)), Err(TooLarge));
    let bye = Outgoing::Disconnect { reason: Reason::ServerBusy, reason_string: Some(&long), user_properties: &[] };
    assert_eq!(encoded(Encoder::new(V5), bye).as_deref(), Ok(&[0xE0, 2, 0x89, 0][..]));
}

#[test]
fn a_reason_that_is_not_of_its_packet_becomes_the_general_error() {
    let written = |packet| encoded(Encoder::new(V5), packet).unwrap();
    let ack = Ack::new(PacketId::MIN, Reason::ServerBusy);
    assert_eq!(written(Outgoing::PubAck(&ack)), [0x40, 3, 0, 1, 0x80]);
    assert_eq!(written(Outgoing::PubComp(&ack)), [0x70, 3, 0, 1, 0x92]);
    let packet_id = PacketId::MIN;
    let sub_ack = Outgoing::SubAck { packet_id, reasons: &[Reason::ServerBusy], reason_string: None };
    assert_eq!(written(sub_ack), [0x90, 4, 0, 1, 0, 0x80]);
}
