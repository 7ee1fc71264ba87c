//! MQTT 5: the 27 tests of the suite.

use tokio::time::Instant;

use super::{Settings, Target, conforms, conforms_with, heard, muster_conforms, passes, shared, texts};
use crate::harness::client::Client;
use crate::harness::packet::Property::{
    ContentType, CorrelationData, MaximumPacketSize, MessageExpiry, PayloadFormat, ReceiveMaximum, ResponseTopic,
    SessionExpiry, SubscriptionId, TopicAlias, TopicAliasMaximum, WillDelay,
};
use crate::harness::packet::kind::{PUBREC, PUBREL};
use crate::harness::packet::{Property, Publish, Varint, Will, property, user, users};
use crate::harness::raw::Version::V5;

/// Options of a subscription beside its QoS (§3.8.3.1).
const NO_LOCAL: u8 = 0x04;
const AS_PUBLISHED: u8 = 0x08;
const RETAIN_IF_NEW: u8 = 0x10;
const RETAIN_NEVER: u8 = 0x20;

/// The topics the suite publishes to at QoS 0, 1 and 2.
const BY_QOS: [&str; 3] = ["TopicA/B", "Topic/C", "TopicA/C"];

#[tokio::test]
async fn test_basic() {
    conforms(async |at| shared::basic(at, V5).await).await;
}

/// Retains a message of each QoS.
async fn retain(client: &mut Client, properties: &[Property]) {
    for (qos, topic) in (0..).zip(BY_QOS) {
        let message = Publish { properties: properties.to_vec(), ..Publish::new(topic, "kept").qos(qos).retained() };
        assert!(client.publish(message).await < 0x80);
    }
}

/// The QoS of messages, sorted.
fn by_qos(messages: &[Publish]) -> Vec<u8> {
    let mut qos: Vec<_> = messages.iter().map(|message| message.qos).collect();
    qos.sort_unstable();
    qos
}

#[tokio::test]
async fn test_retained_message() {
    conforms(retained_message).await;
}

/// Retained messages keep their user properties.
async fn retained_message(at: &Target) {
    let mut a = at.connect(V5, "a").await;
    retain(&mut a, &[user("a", "2"), user("c", "3")]).await;
    a.subscribe("+/+", 2).await;
    let received = heard(&mut a).await;
    assert_eq!(by_qos(&received), [0, 1, 2]);
    for message in received {
        assert!(message.retain, "§3.3.1-8");
        assert_eq!(users(&message.properties), [("a", "2"), ("c", "3")], "§3.3.2-18 in their order");
    }
    a.disconnect().await;
}

#[tokio::test]
async fn test_will_message() {
    conforms(will_message).await;
}

/// A will keeps its user properties.
async fn will_message(at: &Target) {
    let mut b = at.connect(V5, "b").await;
    b.subscribe("Topic/C", 2).await;
    let mut will = Will::new("Topic/C", "will message");
    will.qos = 2;
    will.properties = vec![WillDelay(0), user("a", "2"), user("c", "3")];
    let (a, _) = at.join(at.hello(V5, "a").keep_alive(1).will(will)).await;
    let message = b.message().await;
    assert_eq!((message.text().as_str(), message.qos), ("will message", 2));
    assert_eq!(users(&message.properties), [("a", "2"), ("c", "3")]);
    a.closes("§3.1.2-22").await;
    b.disconnect().await;
}

#[tokio::test]
async fn test_zero_length_clientid() {
    conforms(zero_length_clientid).await;
}

/// Who has no name gets one, clean or not.
async fn zero_length_clientid(at: &Target) {
    for clean in [false, true] {
        let mut hello = at.hello(V5, "");
        hello.clean = clean;
        let (client, connack) = at.join(hello).await;
        assert!(!connack.present);
        client.disconnect().await;
    }
}

#[tokio::test]
async fn test_offline_message_queueing() {
    conforms(async |at| shared::offline_message_queueing(at, V5).await).await;
}

#[tokio::test]
async fn test_overlapping_subscriptions() {
    let deviation = "2.0 sends it at the QoS of any of them";
    let scenario = async |at: &Target| shared::overlapping_subscriptions(at, V5).await;
    muster_conforms(deviation, Settings::default(), scenario).await;
}

#[tokio::test]
async fn test_keepalive() {
    conforms(async |at| shared::keepalive(at, V5).await).await;
}

#[tokio::test]
async fn test_redelivery_on_reconnect() {
    conforms(async |at| shared::redelivery_on_reconnect(at, V5).await).await;
}

#[tokio::test]
async fn test_subscribe_failure() {
    conforms(async |at| shared::subscribe_failure(at, V5).await).await;
}

#[tokio::test]
async fn test_dollar_topics() {
    conforms(async |at| shared::dollar_topics(at, V5).await).await;
}

#[tokio::test]
async fn test_unsubscribe() {
    conforms(async |at| shared::unsubscribe(at, V5).await).await;
}

#[tokio::test]
async fn test_session_expiry() {
    conforms(session_expiry).await;
}

/// A session lives as long after its connection as CONNECT, or at last DISCONNECT, asked for.
async fn session_expiry(at: &Target) {
    // CONNECT with an expiry, DISCONNECT with another or none, and the session's fate some seconds later.
    let fate = async |client: &str, connect: u32, disconnect: Option<u32>, seconds: f64| {
        let (mut a, connack) = at.join(at.hello(V5, client).with(SessionExpiry(connect))).await;
        assert!(!connack.present);
        a.subscribe("TopicA", 2).await;
        let properties: Vec<_> = disconnect.into_iter().map(SessionExpiry).collect();
        a.disconnect_with(0, &properties).await;
        passes(seconds).await;
        let (a, connack) = at.join(at.hello(V5, client).kept_for(0)).await;
        a.disconnect().await;
        connack.present
    };
    let (ends_at_once, ended, raised, kept, lowered) = tokio::join!(
        fate("a", 0, None, 0.0),
        fate("b", 1, None, 3.5),
        fate("c", 1, Some(60), 3.5),
        fate("d", 60, None, 1.0),
        fate("e", 60, Some(0), 0.0),
    );
    assert_eq!(
        [ends_at_once, ended, raised, kept, lowered],
        [false, false, true, true, false],
        "§3.1.2-23, §3.14.2.2.2"
    );
}

#[tokio::test]
async fn test_user_properties() {
    conforms(user_properties).await;
}

async fn user_properties(at: &Target) {
    let mut a = at.connect(V5, "a").await;
    a.subscribe("TopicA", 2).await;
    for qos in 0..=2 {
        a.publish(Publish::new("TopicA", "").qos(qos).with(user("a", "2")).with(user("c", "3"))).await;
    }
    let received = a.messages(3).await;
    assert_eq!(by_qos(&received), [0, 1, 2]);
    for message in received {
        assert_eq!(users(&message.properties), [("a", "2"), ("c", "3")]);
    }
    a.disconnect().await;
}

#[tokio::test]
async fn test_payload_format() {
    conforms(payload_format).await;
}

async fn payload_format(at: &Target) {
    let mut a = at.connect(V5, "a").await;
    a.subscribe("TopicA", 2).await;
    for qos in 0..=2 {
        let message = Publish::new("TopicA", "").qos(qos);
        a.publish(message.with(PayloadFormat(1)).with(ContentType("My name".into()))).await;
    }
    let received = a.messages(3).await;
    assert_eq!(by_qos(&received), [0, 1, 2]);
    for message in received {
        assert_eq!(property!(message.properties, PayloadFormat), Some(1), "§3.3.2-4");
        assert_eq!(property!(message.properties, ContentType).as_deref(), Some("My name"), "§3.3.2-20");
    }
    a.disconnect().await;
}

#[tokio::test]
async fn test_publication_expiry() {
    conforms(publication_expiry).await;
}

/// Messages that waited too long are not sent; others say how long they have left.
async fn publication_expiry(at: &Target) {
    let (mut b, _) = at.join(at.hello(V5, "b").kept()).await;
    b.subscribe("TopicA", 2).await;
    b.disconnect().await;
    let mut a = at.connect(V5, "a").await;
    let since = Instant::now();
    for (expiry, fate) in [(1, "expire"), (60, "don't expire")] {
        for qos in [1, 2] {
            let message = Publish::new("TopicA", format!("qos {qos} - {fate}")).qos(qos);
            a.publish(message.with(MessageExpiry(expiry))).await;
        }
    }
    let published = Instant::now();
    passes(2.5).await;
    let waited_at_least = published.elapsed().as_secs();
    let (mut b, _) = at.join(at.hello(V5, "b").kept()).await;
    let received = heard(&mut b).await;
    let waited_at_most = since.elapsed().as_secs() + 1;
    let expected = [1, 2].map(|qos| (format!("qos {qos} - don't expire"), qos));
    assert_eq!(texts(&received), expected, "§3.3.2-5");
    for message in received {
        let left = property!(message.properties, MessageExpiry).expect("§3.3.2-6 what is left");
        let waited = 60 - u64::from(left);
        assert!((waited_at_least..=waited_at_most).contains(&waited), "§3.3.2-6 {left} s of 60 s left");
    }
    b.disconnect().await;
}

#[tokio::test]
async fn test_subscribe_options() {
    conforms(subscribe_options).await;
}

/// No local, retain as published, retain handling.
async fn subscribe_options(at: &Target) {
    let (mut a, mut b) = (at.connect(V5, "a").await, at.connect(V5, "b").await);
    for client in [&mut a, &mut b] {
        client.subscribe("TopicA", 2 | NO_LOCAL).await;
    }
    a.publish(Publish::new("TopicA", "noLocal test").qos(1)).await;
    assert_eq!(texts(&heard(&mut b).await), [("noLocal test".to_owned(), 1)]);
    assert_eq!(heard(&mut a).await, [], "§3.8.3-3");
    a.disconnect().await;
    b.disconnect().await;

    let mut a = at.connect(V5, "a").await;
    a.subscribe("TopicA", 2 | AS_PUBLISHED).await;
    a.publish(Publish::new("TopicA", "false").qos(1)).await;
    a.publish(Publish::new("TopicA", "true").qos(1).retained()).await;
    let flags: Vec<_> = a.messages(2).await.iter().map(|message| message.retain).collect();
    assert_eq!(flags, [false, true], "§3.3.1-13");
    a.disconnect().await;

    let expected = [(RETAIN_IF_NEW, 3, 0), (RETAIN_NEVER, 0, 0), (0, 3, 3)];
    for (handling, first, second) in expected {
        let mut a = at.connect(V5, "a").await;
        retain(&mut a, &[]).await;
        for count in [first, second] {
            a.subscribe("+/+", 2 | handling).await;
            let received = heard(&mut a).await;
            assert_eq!(by_qos(&received), [0, 1, 2][..count], "§3.3.1-9 to -11, retain handling {handling:#x}");
        }
        a.disconnect().await;
    }
}

#[tokio::test]
async fn test_assigned_clientid() {
    conforms(assigned_clientid).await;
}

async fn assigned_clientid(at: &Target) {
    let (client, connack) = at.join(at.hello(V5, "")).await;
    let assigned = property!(connack.properties, AssignedClientId).expect("§3.2.2-16 a name");
    assert!(!assigned.is_empty());
    client.disconnect().await;
}

#[tokio::test]
async fn test_subscribe_identifiers() {
    conforms(subscribe_identifiers).await;
}

/// A message names the subscriptions it comes for.
async fn subscribe_identifiers(at: &Target) {
    let (mut a, mut b) = (at.connect(V5, "a").await, at.connect(V5, "b").await);
    a.subscribe_as(456_789, "TopicA", 2).await;
    b.subscribe_as(2, "TopicA", 2).await;
    b.subscribe_as(3, "TopicA/#", 2).await;
    b.publish(Publish::new("TopicA", "sub identifier test").qos(1)).await;
    assert_eq!(identifiers(&a.message().await), [456_789], "§3.3.4-3");
    let received = heard(&mut b).await;
    let mut ids: Vec<_> = received.iter().flat_map(identifiers).collect();
    ids.sort_unstable();
    assert_eq!(ids, [2, 3], "§3.3.4-4, §3.3.4-5");
    if at.is_muster() {
        assert_eq!(received.len(), 1, "Muster sends one for all: §3.3.4-4");
    }
    a.disconnect().await;
    b.disconnect().await;
}

fn identifiers(message: &Publish) -> Vec<u32> {
    let identifier = |property: &Property| match property {
        SubscriptionId(Varint(identifier)) => Some(*identifier),
        _ => None,
    };
    message.properties.iter().filter_map(identifier).collect()
}

#[tokio::test]
async fn test_request_response() {
    conforms(request_response).await;
}

async fn request_response(at: &Target) {
    let (mut a, mut b) = (at.connect(V5, "a").await, at.connect(V5, "b").await);
    for client in [&mut a, &mut b] {
        client.subscribe("TopicA", 2 | NO_LOCAL).await;
    }
    let request = Publish::new("TopicA", "request").qos(1).with(ResponseTopic("TopicA".into()));
    a.publish(request.with(CorrelationData(b"334".to_vec()))).await;
    let request = b.message().await;
    let response_topic = property!(request.properties, ResponseTopic).expect("§3.3.2-15");
    assert_eq!(response_topic, "TopicA", "§3.3.2-15");
    assert_eq!(property!(request.properties, CorrelationData), Some(b"334".to_vec()), "§3.3.2-16");
    let response = Publish { properties: request.properties, ..Publish::new(response_topic, "response").qos(1) };
    b.publish(response).await;
    let response = a.message().await;
    assert_eq!(response.text(), "response");
    assert_eq!(property!(response.properties, CorrelationData), Some(b"334".to_vec()));
    a.disconnect().await;
    b.disconnect().await;
}

#[tokio::test]
async fn test_client_topic_alias() {
    conforms(client_topic_alias).await;
}

/// A client's aliases hold as long as its connection.
async fn client_topic_alias(at: &Target) {
    let mut a = at.connect(V5, "a").await;
    a.send_publish(&Publish::new("TopicA", "topic alias 0").qos(1).id(1).with(TopicAlias(0))).await;
    a.ends(at.is_muster(), 0x94, "§3.3.2-8 there is no alias 0").await;

    let (mut a, connack) = at.join(at.hello(V5, "a").with(SessionExpiry(99_999))).await;
    let most = property!(connack.properties, TopicAliasMaximum).unwrap_or(0);
    assert!(most > 0, "both servers take aliases");
    a.subscribe("TopicA", 2).await;
    a.publish(Publish::new("TopicA", "topic alias 1").qos(1).with(TopicAlias(1))).await;
    a.publish(Publish::new("", "topic alias 2").qos(1).with(TopicAlias(1))).await;
    let received = a.messages(2).await;
    let expected = ["topic alias 1", "topic alias 2"].map(|text| ("TopicA".to_owned(), text.to_owned()));
    assert_eq!(received.topics(), expected);
    a.disconnect().await;

    let (mut a, connack) = at.join(at.hello(V5, "a").kept()).await;
    assert!(connack.present);
    a.publish(Publish::new("TopicA", "topic alias 3").qos(1)).await;
    assert_eq!(a.message().await.text(), "topic alias 3", "subscriptions outlive a connection");
    a.send_publish(&Publish::new("", "topic alias 4").qos(1).id(9).with(TopicAlias(1))).await;
    a.ends_with(0x82, "§3.3.2-7 aliases do not").await;
}

/// What aliases are about.
trait Topics {
    fn topics(&self) -> Vec<(String, String)>;
}

impl Topics for Vec<Publish> {
    fn topics(&self) -> Vec<(String, String)> {
        self.iter().map(|message| (message.topic.clone(), message.text())).collect()
    }
}

#[tokio::test]
async fn test_server_topic_alias() {
    let deviation = "2.0 sends no aliases, which is its right";
    muster_conforms(deviation, Settings::default(), server_topic_alias).await;
}

/// The server uses an alias from the first message on, where the client allows one.
async fn server_topic_alias(at: &Target) {
    let (mut a, _) = at.join(at.hello(V5, "a").with(TopicAliasMaximum(1))).await;
    a.subscribe("TopicA", 2).await;
    for qos in 0..=2 {
        a.publish(Publish::new("TopicA", "topic alias 1").qos(qos)).await;
    }
    let received = a.messages(3).await;
    let topics: Vec<_> = received.iter().map(|message| &*message.topic).collect();
    assert_eq!(topics, ["TopicA", "", ""]);
    assert!(received.iter().all(|message| property!(message.properties, TopicAlias) == Some(1)), "{received:?}");
    a.disconnect().await;

    for hello in [at.hello(V5, "a"), at.hello(V5, "a").with(TopicAliasMaximum(0))] {
        let (mut a, _) = at.join(hello).await;
        a.subscribe("TopicA", 2).await;
        for qos in 0..=2 {
            a.publish(Publish::new("TopicA", "topic alias 1").qos(qos)).await;
            let message = a.message().await;
            assert_eq!(property!(message.properties, TopicAlias), None, "§3.1.2-26");
            assert_eq!(message.topic, "TopicA");
        }
        a.disconnect().await;
    }
}

#[tokio::test]
async fn test_maximum_packet_size() {
    let settings =
        Settings { mosquitto: &["max_packet_size 2000"], muster: &[("MUSTER__MQTT__MAX_PACKET_BYTES", "2000")] };
    conforms_with(settings, maximum_packet_size).await;
}

/// Nobody is sent more than they take: not the server, not the client.
async fn maximum_packet_size(at: &Target) {
    let (mut a, connack) = at.join(at.hello(V5, "a")).await;
    assert_eq!(property!(connack.properties, MaximumPacketSize), Some(2000), "§3.2.2.3.6");
    a.send_publish(&Publish::new("TopicA", vec![b'.'; 2000])).await;
    a.ends_with(0x95, "§3.2.2-15 packet too large").await;

    let (mut a, _) = at.join(at.hello(V5, "a").with(MaximumPacketSize(64))).await;
    a.subscribe("TopicA", 2).await;
    a.publish(Publish::new("TopicA", vec![b'.'; 32])).await;
    assert_eq!(a.message().await.payload.len(), 32);
    a.publish(Publish::new("TopicA", vec![b'.'; 64]).qos(1)).await;
    a.publish(Publish::new("TopicA", "after it").qos(1)).await;
    assert_eq!(a.message().await.text(), "after it", "§3.1.2-24, §3.1.2-25");
    a.disconnect().await;
}

#[tokio::test]
async fn test_server_keep_alive() {
    let settings = Settings { mosquitto: &["max_keepalive 60"], muster: &[("MUSTER__MQTT__MAX_KEEP_ALIVE_S", "60")] };
    conforms_with(settings, server_keep_alive).await;
}

async fn server_keep_alive(at: &Target) {
    let (a, connack) = at.join(at.hello(V5, "a").keep_alive(120)).await;
    assert_eq!(property!(connack.properties, ServerKeepAlive), Some(60), "§3.1.2-21");
    a.disconnect().await;
}

#[tokio::test]
async fn test_flow_control1() {
    conforms(flow_control1).await;
}

/// A client has no more unacknowledged messages than its Receive Maximum.
async fn flow_control1(at: &Target) {
    let (mut a, _) = at.join(at.hello(V5, "a").with(ReceiveMaximum(2))).await;
    a.subscribe("TopicA", 2).await;
    for count in 1..=3 {
        a.publish(Publish::new("TopicA", format!("message {count}")).qos(1)).await;
    }
    let first = a.arrival().await;
    let second = a.arrival().await;
    a.is_quiet("§3.3.4-9 two are unacknowledged").await;
    a.acknowledge(&first).await;
    let third = a.arrival().await;
    assert_eq!(texts(&[first, second.clone(), third.clone()]), [1, 2, 3].map(|count| (format!("message {count}"), 1)));
    a.acknowledge(&second).await;
    a.acknowledge(&third).await;
    a.disconnect().await;
}

#[tokio::test]
async fn test_flow_control2() {
    let deviation = "2.0 takes a message beyond its Receive Maximum and says nothing";
    muster_conforms(deviation, Settings::default(), flow_control2).await;
}

/// Neither has the server: who sends more is disconnected, and hears why although it goes on sending.
async fn flow_control2(at: &Target) {
    let (mut a, connack) = at.join(at.hello(V5, "a")).await;
    let most = property!(connack.properties, ReceiveMaximum).unwrap_or(u16::MAX);
    for id in 1..=most + 1 {
        a.send_publish(&Publish::new("TopicA", format!("message {id}")).qos(2).id(id)).await;
    }
    for id in 1..=most {
        assert_eq!(a.ack(PUBREC, id).await.reason & 0x80, 0, "message {id} of {most}");
        a.send_ack(PUBREL, id).await;
    }
    a.ends_with(0x93, "§3.3.4-8 receive maximum exceeded").await;
}

#[tokio::test]
async fn test_will_delay() {
    conforms(will_delay).await;
}

/// A will waits for its delay or for the end of its session, whichever is first.
async fn will_delay(at: &Target) {
    // The seconds until the will comes.
    let waited = async |client: &str, delay: u32, expiry: u32| {
        let mut b = at.connect(V5, &format!("{client}-watcher")).await;
        b.subscribe(client, 2).await;
        let mut will = Will::new(client, "test_will_delay will message");
        will.properties = vec![WillDelay(delay)];
        let (a, connack) = at.join(at.hello(V5, client).with(SessionExpiry(expiry)).will(will)).await;
        assert!(!connack.present);
        let gone = Instant::now();
        a.vanish();
        assert_eq!(b.message().await.text(), "test_will_delay will message");
        b.disconnect().await;
        gone.elapsed().as_secs_f64()
    };
    let (by_delay, by_expiry) = tokio::join!(waited("a", 2, 60), waited("b", 60, 1));
    // mosquitto counts in whole seconds of its clock.
    let early = if at.is_muster() { 0.0 } else { 1.0 };
    assert!((2.0 - early..15.0).contains(&by_delay), "§3.1.3-9 {by_delay} s");
    assert!((1.0 - early..15.0).contains(&by_expiry), "§3.1.3.2.2 {by_expiry} s");
    // mosquitto 2.0 holds a will back although its session, of expiry 0, has ended.
    if at.is_muster() {
        let at_once = waited("c", 60, 0).await;
        assert!(at_once < 15.0, "§3.1.3.2.2 {at_once} s");
    }
}

#[tokio::test]
async fn test_shared_subscriptions() {
    conforms(shared_subscriptions).await;
}

/// Of a group one gets the message; beside it, everybody else gets theirs.
async fn shared_subscriptions(at: &Target) {
    let (mut a, mut b) = (at.connect(V5, "a").await, at.connect(V5, "b").await);
    let (group, own) = ("$share/sharename/x", "TopicA");
    for client in [&mut a, &mut b] {
        let answers = client.subscribe_all(&[(group, 2), (own, 2)], &[]).await;
        assert_eq!(answers.codes, [2, 2]);
    }
    b.publish(Publish::new("TopicA", "message")).await;
    b.publish(Publish::new("x", "shared").qos(1)).await;
    let (of_a, of_b) = (heard(&mut a).await, heard(&mut b).await);
    let all: Vec<_> = of_a.iter().chain(&of_b).map(Publish::text).collect();
    assert_eq!(all.iter().filter(|text| *text == "message").count(), 2, "{all:?}");
    assert_eq!(all.iter().filter(|text| *text == "shared").count(), 1, "§4.8.2 {all:?}");
    a.disconnect().await;
    b.disconnect().await;
}
