//! Both directions against somebody else's idea of the standard: what clients write is written here by hand, and what
//! the server writes is read by the codec's client side.

use std::num::NonZeroU32;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use proptest::sample::select;
use rmqtt_codec::{types, v3, v5};
use tokio_util::codec::Decoder as _;

use super::super::{
    Ack, Auth, ByteString, ConnAck, Connect, Decoder, Disconnect, Encoder, Outgoing, Packet, PacketId, Publish,
    PublishProperties, QoS, Reason, RetainHandling, Subscribe, SubscriptionFilter, Unsubscribe, UserProperties,
    Version, Will,
};
use super::{MAX_CONNECT, MAX_PACKET, connected, decode_with, written};

// ---- packets ----

pub(super) fn version() -> impl Strategy<Value = Version> {
    select(vec![Version::V311, Version::V5])
}

fn text() -> impl Strategy<Value = ByteString> {
    "\\PC{0,12}".prop_map(ByteString::from)
}

fn topic() -> impl Strategy<Value = ByteString> {
    "[a-z0-9$ äß€日/]{1,16}".prop_map(ByteString::from)
}

fn filter() -> impl Strategy<Value = ByteString> {
    let levels = vec("[a-z€]{0,4}|\\+", 1..5).prop_map(|levels| levels.join("/"));
    (select(vec!["", "$share/g/"]), levels, select(vec!["", "/#"]))
        .prop_filter("shared filters are not empty", |(_, levels, _)| !levels.is_empty())
        .prop_map(|(share, levels, end)| format!("{share}{levels}{end}").into())
}

fn payload() -> impl Strategy<Value = Bytes> {
    vec(any::<u8>(), 0..200).prop_map(Bytes::from)
}

fn users() -> impl Strategy<Value = UserProperties> {
    vec((text(), text()), 0..3)
}

fn qos() -> impl Strategy<Value = QoS> {
    select(vec![QoS::AtMostOnce, QoS::AtLeastOnce, QoS::ExactlyOnce])
}

fn packet_id() -> impl Strategy<Value = PacketId> {
    (1..=u16::MAX).prop_map(|id| PacketId::new(id).unwrap())
}

fn properties(version: Version) -> BoxedStrategy<Option<Arc<PublishProperties>>> {
    if version == Version::V311 {
        return Just(None).boxed();
    }
    (of(any::<bool>()), of(any::<u32>()), of(text()), of(topic()), of(payload()), users())
        .prop_map(|(payload_is_utf8, message_expiry_s, content_type, response_topic, correlation_data, users)| {
            let properties = PublishProperties {
                payload_is_utf8,
                message_expiry_s,
                content_type,
                response_topic,
                correlation_data,
                user_properties: users,
            };
            (properties != PublishProperties::default()).then(|| Arc::new(properties))
        })
        .boxed()
}

fn publish(version: Version) -> impl Strategy<Value = Publish> {
    let how = (qos(), packet_id(), any::<bool>(), any::<bool>());
    let alias = if version == Version::V5 { of(packet_id()).boxed() } else { Just(None).boxed() };
    (topic(), any::<bool>(), payload(), how, properties(version), alias).prop_map(
        |(topic, named, payload, (qos, id, dup, retain), properties, topic_alias)| Publish {
            topic: if named || topic_alias.is_none() { topic } else { ByteString::new() },
            payload,
            qos,
            packet_id: (qos != QoS::AtMostOnce).then_some(id),
            dup: dup && qos != QoS::AtMostOnce,
            retain,
            properties,
            topic_alias,
            subscription_ids: Vec::new(),
        },
    )
}

fn will(version: Version) -> impl Strategy<Value = Will> {
    let delay = if version == Version::V5 { any::<u32>().boxed() } else { Just(0).boxed() };
    (topic(), payload(), qos(), any::<bool>(), delay, properties(version)).prop_map(
        |(topic, payload, qos, retain, delay_s, properties)| Will { topic, payload, qos, retain, delay_s, properties },
    )
}

pub(super) fn connect(version: Version) -> BoxedStrategy<Connect> {
    let who = ("[a-z0-9]{1,12}", of(text()), of(payload()));
    let what = (any::<bool>(), any::<u16>(), of(will(version)));
    let limits = (any::<u32>(), packet_id(), of(1..=u32::MAX), any::<u16>());
    let asks = (any::<bool>(), any::<bool>(), of((text(), of(payload()))), users());
    (who, what, limits, asks)
        .prop_map(move |((id, username, password), (clean_start, keep_alive_s, will), limits, asks)| {
            let v5 = version == Version::V5;
            let (method, data) = asks.2.map_or((None, None), |(method, data)| (Some(method), data));
            Connect {
                version,
                client_id: id.into(),
                clean_start,
                keep_alive_s,
                password: password.filter(|_| v5 || username.is_some()),
                username,
                will,
                session_expiry_s: match (v5, clean_start) {
                    (true, _) => limits.0,
                    (false, true) => 0,
                    (false, false) => u32::MAX,
                },
                receive_maximum: if v5 { limits.1 } else { PacketId::MAX },
                maximum_packet_size: limits.2.filter(|_| v5).and_then(NonZeroU32::new),
                topic_alias_maximum: if v5 { limits.3 } else { 0 },
                request_response_information: v5 && asks.0,
                request_problem_information: !v5 || asks.1,
                authentication_method: method.filter(|_| v5),
                authentication_data: data.filter(|_| v5),
                user_properties: if v5 { asks.3 } else { Vec::new() },
            }
        })
        .boxed()
}

fn ack(version: Version, reasons: &[Reason]) -> BoxedStrategy<Ack> {
    if version == Version::V311 {
        return packet_id().prop_map(|id| Ack::new(id, Reason::Success)).boxed();
    }
    (packet_id(), select(reasons.to_vec()), of(text()))
        .prop_map(|(packet_id, reason, reason_string)| Ack { packet_id, reason, reason_string })
        .boxed()
}

const ACK_REASONS: &[Reason] = &[
    Reason::Success,
    Reason::NoMatchingSubscribers,
    Reason::UnspecifiedError,
    Reason::ImplementationSpecificError,
    Reason::NotAuthorized,
    Reason::TopicNameInvalid,
    Reason::PacketIdentifierInUse,
    Reason::QuotaExceeded,
    Reason::PayloadFormatInvalid,
];
const RELEASE_REASONS: &[Reason] = &[Reason::Success, Reason::PacketIdentifierNotFound];
const AUTH_REASONS: &[Reason] = &[Reason::Success, Reason::ContinueAuthentication, Reason::ReAuthenticate];

fn line(version: Version) -> impl Strategy<Value = SubscriptionFilter> {
    let handling = select(vec![RetainHandling::AtSubscribe, RetainHandling::AtNewSubscribe, RetainHandling::Never]);
    (filter(), qos(), any::<bool>(), any::<bool>(), handling).prop_map(
        move |(filter, qos, no_local, retain_as_published, retain_handling)| {
            let v5 = version == Version::V5;
            SubscriptionFilter {
                no_local: v5 && no_local && !filter.starts_with("$share/"),
                filter,
                valid: true,
                qos,
                retain_as_published: v5 && retain_as_published,
                retain_handling: if v5 { retain_handling } else { RetainHandling::AtSubscribe },
            }
        },
    )
}

fn auth() -> impl Strategy<Value = Auth> {
    (select(AUTH_REASONS), text(), of(payload()), of(text()), users()).prop_map(
        |(reason, method, data, reason_string, user_properties)| Auth {
            reason,
            method: Some(method),
            data,
            reason_string,
            user_properties,
        },
    )
}

fn disconnect(version: Version) -> BoxedStrategy<Disconnect> {
    if version == Version::V311 {
        return Just(Disconnect { reason: Reason::Success, session_expiry_s: None, reason_string: None }).boxed();
    }
    (select(vec![Reason::Success, Reason::DisconnectWithWill, Reason::ProtocolError]), of(any::<u32>()), of(text()))
        .prop_map(|(reason, session_expiry_s, reason_string)| Disconnect { reason, session_expiry_s, reason_string })
        .boxed()
}

/// Anything a client may send after its CONNECT.
pub(super) fn client_packet(version: Version) -> BoxedStrategy<Packet> {
    let v5 = version == Version::V5;
    let subscription_id = if v5 { of(1..=268_435_455_u32).boxed() } else { Just(None).boxed() };
    let subscribe = (packet_id(), subscription_id, vec(line(version), 1..5), users()).prop_map(
        move |(packet_id, subscription_id, filters, users)| {
            let user_properties = if v5 { users } else { Vec::new() };
            Packet::Subscribe(Subscribe { packet_id, subscription_id, filters, user_properties })
        },
    );
    let unsubscribe = (packet_id(), vec(filter(), 1..5))
        .prop_map(|(packet_id, filters)| Packet::Unsubscribe(Unsubscribe { packet_id, filters }));
    prop_oneof![
        4 => publish(version).prop_map(Packet::Publish),
        1 => ack(version, ACK_REASONS).prop_map(Packet::PubAck),
        1 => ack(version, ACK_REASONS).prop_map(Packet::PubRec),
        1 => ack(version, RELEASE_REASONS).prop_map(Packet::PubRel),
        1 => ack(version, RELEASE_REASONS).prop_map(Packet::PubComp),
        1 => subscribe,
        1 => unsubscribe,
        1 => Just(Packet::PingReq),
        1 => disconnect(version).prop_map(Packet::Disconnect),
        u32::from(v5) => auth().prop_map(Packet::Auth),
    ]
    .boxed()
}

// ---- client to server ----

proptest! {
    #[test]
    fn a_connect_is_read_as_it_was_written(connect in version().prop_flat_map(connect)) {
        let bytes = written(connect.version, &Packet::Connect(Box::new(connect.clone())));
        let read = decode_with(Decoder::new(MAX_PACKET, MAX_CONNECT), &bytes);
        prop_assert_eq!(read, Ok(Packet::Connect(Box::new(connect))));
    }

    #[test]
    fn a_packet_is_read_as_it_was_written(
        (version, packet) in version().prop_flat_map(|version| (Just(version), client_packet(version)))
    ) {
        prop_assert_eq!(decode_with(connected(version), &written(version, &packet)), Ok(packet));
    }
}

// ---- server to client ----

fn encode(version: Version, packet: Outgoing<'_>) -> BytesMut {
    let mut into = BytesMut::new();
    Encoder::new(version).encode(packet, &mut into).expect("there is no limit");
    into
}

/// The codec's reading of one packet of MQTT 5.
fn read5(mut bytes: BytesMut) -> v5::Packet {
    let (packet, _) = v5::Codec::new(0, 0).decode(&mut bytes).unwrap().unwrap();
    assert!(bytes.is_empty());
    packet
}

fn read311(mut bytes: BytesMut) -> v3::Packet {
    let (packet, _) = v3::Codec::new(0).decode(&mut bytes).unwrap().unwrap();
    assert!(bytes.is_empty());
    packet
}

fn assert_same(read: &types::Publish, sent: &Publish) {
    let head = (&read.topic, &read.payload, QoS::from(read.qos), read.packet_id, read.dup, read.retain);
    assert_eq!(head, (&sent.topic, &sent.payload, sent.qos, sent.packet_id, sent.dup, sent.retain));
    let Some(read) = &read.properties else { return };
    let sent_properties = sent.properties.as_deref().cloned().unwrap_or_default();
    let ids: Vec<u32> = read.subscription_ids.iter().map(|id| id.get()).collect();
    assert_eq!((read.topic_alias, ids), (sent.topic_alias, sent.subscription_ids.clone()));
    assert_eq!(read.message_expiry_interval.map(NonZeroU32::get), sent_properties.message_expiry_s);
    assert_eq!(read.content_type, sent_properties.content_type);
    assert_eq!(read.response_topic, sent_properties.response_topic);
    assert_eq!(read.correlation_data, sent_properties.correlation_data);
    assert_eq!(read.is_utf8_payload, sent_properties.payload_is_utf8.unwrap_or(false));
    assert_eq!(read.user_properties, sent_properties.user_properties);
}

fn conn_ack() -> impl Strategy<Value = ConnAck> {
    let reasons = vec![Reason::Success, Reason::NotAuthorized, Reason::ServerBusy, Reason::PacketTooLarge];
    let about = (any::<bool>(), select(reasons), of(text()), of(text()), users());
    let limits = (of(any::<u16>()), of(any::<u32>()), packet_id(), qos(), of(1..=u32::MAX), any::<u16>());
    let offers = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (about, limits, offers, of(text()), of((text(), of(payload())))).prop_map(
        |((session_present, reason, reason_string, assigned, users), limits, offers, response, auth)| {
            let (method, data) = auth.map_or((None, None), |(method, data)| (Some(method), data));
            ConnAck {
                session_present,
                reason,
                reason_string,
                assigned_client_id: assigned,
                server_keep_alive_s: limits.0,
                session_expiry_s: limits.1,
                receive_maximum: limits.2,
                maximum_qos: limits.3,
                retain_available: offers.0,
                maximum_packet_size: limits.4.and_then(NonZeroU32::new),
                topic_alias_maximum: limits.5,
                wildcard_subscriptions_available: offers.1,
                subscription_ids_available: offers.2,
                shared_subscriptions_available: offers.3,
                response_information: response,
                authentication_method: method,
                authentication_data: data,
                user_properties: users,
            }
        },
    )
}

proptest! {
    #[test]
    fn a_message_is_written_as_clients_read_it(
        (version, mut publish) in version().prop_flat_map(|version| (Just(version), publish(version))),
        ids in vec(1..=268_435_455_u32, 0..3),
    ) {
        // What the server sends and a client may not: subscription ids. The codec cannot read an expiry of 0.
        publish.subscription_ids = if version == Version::V5 { ids } else { Vec::new() };
        prop_assume!(publish.message_expiry_s() != Some(0));
        let bytes = encode(version, Outgoing::Publish(&publish));
        match version {
            Version::V311 => match read311(bytes) {
                v3::Packet::Publish(read) => assert_same(&read, &publish),
                other => prop_assert!(false, "{other:?}"),
            },
            Version::V5 => match read5(bytes) {
                v5::Packet::Publish(read) => assert_same(&read, &publish),
                other => prop_assert!(false, "{other:?}"),
            },
        }
    }

    #[test]
    fn a_message_that_is_passed_on_is_the_same_message(
        (version, publish) in version().prop_flat_map(|version| (Just(version), publish(version)))
    ) {
        let bytes = encode(version, Outgoing::Publish(&publish));
        let detached = publish.detached();
        prop_assert_eq!(&bytes, &encode(version, Outgoing::Publish(&detached)));
        prop_assert_eq!(decode_with(connected(version), &bytes), Ok(Packet::Publish(publish)));
    }

    #[test]
    fn acknowledgements_are_written_as_clients_read_them(
        version in version(),
        ack in ack(Version::V5, ACK_REASONS),
        release in ack(Version::V5, RELEASE_REASONS),
        auth in auth(),
    ) {
        let read = |packet| decode_with(connected(version), &encode(version, packet));
        let seen = |ack: &Ack| match version {
            Version::V311 => Ack::new(ack.packet_id, Reason::Success),
            Version::V5 => ack.clone(),
        };
        prop_assert_eq!(read(Outgoing::PubAck(&ack)), Ok(Packet::PubAck(seen(&ack))));
        prop_assert_eq!(read(Outgoing::PubRec(&ack)), Ok(Packet::PubRec(seen(&ack))));
        prop_assert_eq!(read(Outgoing::PubRel(&release)), Ok(Packet::PubRel(seen(&release))));
        prop_assert_eq!(read(Outgoing::PubComp(&release)), Ok(Packet::PubComp(seen(&release))));
        if version == Version::V5 {
            prop_assert_eq!(read(Outgoing::Auth(&auth)), Ok(Packet::Auth(auth.clone())));
        }
    }

    #[test]
    fn a_conn_ack_is_written_as_clients_read_it(ack in conn_ack()) {
        let v5::Packet::ConnectAck(read) = read5(encode(Version::V5, Outgoing::ConnAck(&ack))) else {
            return Err(TestCaseError::fail("not a CONNACK"));
        };
        let sent = ConnAck { session_present: ack.session_present && !ack.reason.is_failure(), ..ack };
        let code: u8 = read.reason_code.into();
        prop_assert_eq!(sent, ConnAck {
            session_present: read.session_present,
            reason: Reason::from_code(code).unwrap(),
            reason_string: read.reason_string,
            assigned_client_id: read.assigned_client_id,
            server_keep_alive_s: read.server_keepalive_sec,
            session_expiry_s: read.session_expiry_interval_secs,
            receive_maximum: read.receive_max,
            maximum_qos: read.max_qos.into(),
            retain_available: read.retain_available,
            maximum_packet_size: read.max_packet_size.and_then(NonZeroU32::new),
            topic_alias_maximum: read.topic_alias_max,
            wildcard_subscriptions_available: read.wildcard_subscription_available,
            subscription_ids_available: read.subscription_identifiers_available,
            shared_subscriptions_available: read.shared_subscription_available,
            response_information: read.response_info,
            authentication_method: read.auth_method,
            authentication_data: read.auth_data,
            user_properties: read.user_properties,
        });
    }

    #[test]
    fn answers_to_filters_are_written_as_clients_read_them(
        packet_id in packet_id(),
        granted in vec(select(vec![
            Reason::Success, Reason::GrantedQos1, Reason::GrantedQos2, Reason::NotAuthorized,
            Reason::TopicFilterInvalid, Reason::QuotaExceeded,
        ]), 1..6),
        ended in vec(select(vec![Reason::Success, Reason::NoSubscriptionExisted, Reason::NotAuthorized]), 1..6),
        words in of(text()),
    ) {
        let reason_string = words.as_deref();
        let sub_ack = encode(Version::V5, Outgoing::SubAck { packet_id, reasons: &granted, reason_string });
        let v5::Packet::SubscribeAck(read) = read5(sub_ack) else { return Err(TestCaseError::fail("SUBACK")) };
        let codes: Vec<u8> = read.status.iter().map(|status| (*status).into()).collect();
        prop_assert_eq!(codes, granted.iter().map(|reason| reason.code()).collect::<Vec<_>>());
        prop_assert_eq!((read.packet_id, read.reason_string.as_deref()), (packet_id, reason_string));

        let unsub_ack = encode(Version::V5, Outgoing::UnsubAck { packet_id, reasons: &ended, reason_string });
        let v5::Packet::UnsubscribeAck(read) = read5(unsub_ack) else { return Err(TestCaseError::fail("UNSUBACK")) };
        let codes: Vec<u8> = read.status.iter().map(|status| (*status).into()).collect();
        prop_assert_eq!(codes, ended.iter().map(|reason| reason.code()).collect::<Vec<_>>());
        prop_assert_eq!((read.packet_id, read.reason_string.as_deref()), (packet_id, reason_string));

        let v3::Packet::SubscribeAck { packet_id: read_id, status } =
            read311(encode(Version::V311, Outgoing::SubAck { packet_id, reasons: &granted, reason_string }))
        else { return Err(TestCaseError::fail("SUBACK")) };
        prop_assert_eq!((read_id, status.len()), (packet_id, granted.len()));
        for (status, reason) in status.iter().zip(&granted) {
            prop_assert_eq!(matches!(status, v3::SubscribeReturnCode::Failure), reason.is_failure());
        }
    }

    #[test]
    fn a_goodbye_is_written_as_clients_read_it(words in of(text()), users in users()) {
        let reason = Reason::SessionTakenOver;
        let bye = Outgoing::Disconnect { reason, reason_string: words.as_deref(), user_properties: &users };
        let v5::Packet::Disconnect(read) = read5(encode(Version::V5, bye)) else {
            return Err(TestCaseError::fail("not a DISCONNECT"));
        };
        prop_assert_eq!(u8::from(read.reason_code), reason.code());
        prop_assert_eq!((read.reason_string, read.user_properties), (words, users));
    }
}

#[test]
fn a_ping_is_answered() {
    for version in [Version::V311, Version::V5] {
        assert_eq!(&encode(version, Outgoing::PingResp)[..], [0xD0, 0]);
    }
}

#[test]
fn a_payload_is_not_copied() {
    let publish = Publish::new("a".into(), vec![7; 4096].into(), QoS::AtMostOnce, false);
    let mut buffer = BytesMut::from(&written(Version::V311, &Packet::Publish(publish))[..]);
    let memory = buffer.as_ptr() as usize..buffer.as_ptr() as usize + buffer.len();
    let Ok(Some(Packet::Publish(read))) = connected(Version::V311).decode(&mut buffer) else { panic!("whole") };
    assert!(memory.contains(&(read.payload.as_ptr() as usize)));
    assert!(!memory.contains(&(read.detached().payload.as_ptr() as usize)));
}
