//! Scenarios of the suite that are the same in both versions.

use tokio::time::Instant;

use super::{Target, heard, texts};
use crate::harness::packet::{Packet, Publish, Will};
use crate::harness::raw::Version::{self, V5, V311};

/// Messages of every QoS come back; a second CONNECT and a wrong protocol name end the connection.
pub(super) async fn basic(at: &Target, version: Version) {
    at.connect(version, "a").await.disconnect().await;
    let (mut a, connack) = at.join(at.hello(version, "a")).await;
    assert!(!connack.present, "a clean session is a new one");
    assert_eq!(a.subscribe("TopicA", 2).await, 2);
    for qos in 0..=2 {
        assert_eq!(a.publish(Publish::new("TopicA", format!("qos {qos}")).qos(qos)).await, 0);
    }
    let expected: Vec<_> = (0..=2).map(|qos| (format!("qos {qos}"), qos)).collect();
    assert_eq!(texts(&a.messages(3).await), expected);
    a.disconnect().await;

    let mut a = at.connect(version, "a").await;
    a.send(&at.hello(version, "a").bytes()).await;
    a.closes("§3.1.0-2 a second CONNECT").await;

    let mut hello = at.hello(version, "a");
    hello.protocol = "hj";
    let mut stranger = crate::harness::client::Client::on(at.open().await, version);
    stranger.send(&hello.bytes()).await;
    match stranger.next().await {
        Packet::Closed => {}
        Packet::ConnAck(connack) => {
            assert_eq!((version, connack.code), (V5, 0x84), "§3.1.2-1 unsupported protocol version");
            stranger.closes("§3.1.4 after a refusal").await;
        }
        other => panic!("to a protocol named hj: {other:?}"),
    }
}

/// Messages at QoS 1 and 2 wait for a client that is away.
pub(super) async fn offline_message_queueing(at: &Target, version: Version) {
    let (mut a, _) = at.join(at.hello(version, "a").kept()).await;
    assert_eq!(a.subscribe("+/+", 2).await, 2);
    a.disconnect().await;
    let (mut b, connack) = at.join(at.hello(version, "b")).await;
    assert!(!connack.present);
    for (qos, topic) in (0..).zip(["TopicA/B", "Topic/C", "TopicA/C"]) {
        assert_eq!(b.publish(Publish::new(topic, format!("qos {qos}")).qos(qos)).await, 0);
    }
    b.disconnect().await;
    let (mut a, connack) = at.join(at.hello(version, "a").kept()).await;
    assert!(connack.present, "its session was kept");
    let queued = texts(&heard(&mut a).await);
    let promised = [("qos 1".to_owned(), 1), ("qos 2".to_owned(), 2)];
    // Whether messages at QoS 0 wait too is the server's choice.
    assert!(queued.ends_with(&promised) && queued.len() <= 3, "{queued:?}");
    a.disconnect().await;
}

/// Of overlapping subscriptions the message comes at the highest QoS; the suite also allows one for each.
pub(super) async fn overlapping_subscriptions(at: &Target, version: Version) {
    let mut a = at.connect(version, "a").await;
    let filters = ["TopicA/#", "TopicA/+"];
    assert_eq!(a.subscribe_all(&[(filters[0], 2), (filters[1], 1)], &[]).await.codes, [2, 1]);
    a.publish(Publish::new("TopicA/C", "overlapping topic filters").qos(2)).await;
    let mut received: Vec<_> = heard(&mut a).await.iter().map(|message| message.qos).collect();
    received.sort_unstable();
    assert_eq!(received, [2], "§3.3.4-2 Muster sends one, at the highest QoS");
    a.disconnect().await;
}

/// A client that says nothing for one and a half keep alives is gone, and its will is sent.
pub(super) async fn keepalive(at: &Target, version: Version) {
    let mut b = at.connect(version, "b").await;
    assert_eq!(b.subscribe("/TopicA", 2).await, 2);
    let will = Will::new("/TopicA", "keepalive expiry");
    let silent_since = Instant::now();
    let (a, _) = at.join(at.hello(version, "a").keep_alive(1).will(will)).await;
    assert_eq!(b.message().await.text(), "keepalive expiry");
    let silent = silent_since.elapsed().as_secs_f64();
    // mosquitto counts in whole seconds of its clock.
    let least = if at.is_muster() { 1.5 } else { 0.5 };
    assert!(silent >= least, "§3.1.2-22 not before 1.5 s, but after {silent} s");
    if version == V5 && at.is_muster() {
        a.ends_with(0x8D, "§4.13 keep alive timeout").await;
    } else {
        a.closes("§3.1.2-22").await;
    }
    b.disconnect().await;
}

/// What was not acknowledged comes again: marked, under the same packet ids, in the same order.
pub(super) async fn redelivery_on_reconnect(at: &Target, version: Version) {
    let (mut b, _) = at.join(at.hello(version, "b").kept()).await;
    assert_eq!(b.subscribe("TopicA/#", 2).await, 2);
    b.publish(Publish::new("TopicA/B", "one").qos(1)).await;
    b.publish(Publish::new("TopicA/C", "two").qos(2)).await;
    let before = [b.arrival().await, b.arrival().await];
    assert!(before.iter().all(|message| !message.dup), "{before:?}");
    b.disconnect().await;
    let (mut b, connack) = at.join(at.hello(version, "b").kept()).await;
    assert!(connack.present);
    assert_eq!(b.messages(2).await, before.map(Publish::dup), "§4.4-1");
    assert_eq!(heard(&mut b).await, [], "each once");
    b.disconnect().await;
}

/// A subscription that is not allowed is refused by its code.
pub(super) async fn subscribe_failure(at: &Target, version: Version) {
    let mut a = at.connect(version, "a").await;
    let code = a.subscribe("test/nosubscribe", 2).await;
    let refusals: &[u8] = if version == V311 { &[0x80] } else { &[0x80, 0x87] };
    assert!(refusals.contains(&code), "{code:#x}");
    a.is_quiet("§3.8.4 the connection goes on").await;
    a.disconnect().await;
}

/// A filter that begins with a wildcard does not match a topic that begins with `$`.
pub(super) async fn dollar_topics(at: &Target, version: Version) {
    let mut b = at.connect(version, "b").await;
    for filter in ["+/+", "#"] {
        assert_eq!(b.subscribe(filter, 2).await, 2);
    }
    let mut a = at.connect(version, "a").await;
    let mut message = Publish::new("TopicA/B", "").qos(1).id(1);
    message.topic.insert(0, '$');
    a.send_publish(&message).await;
    // It may be refused: by its acknowledgement, or in 3.1.1 by closing.
    assert!(matches!(a.next().await, Packet::Ack(_) | Packet::Closed));
    assert_eq!(heard(&mut b).await, [], "§4.7.2-1");
    b.disconnect().await;
}

/// After UNSUBSCRIBE nothing comes on that filter, and all on the others.
pub(super) async fn unsubscribe(at: &Target, version: Version) {
    let mut b = at.connect(version, "b").await;
    let topics = ["TopicA", "TopicA/B", "Topic/C"];
    for topic in &topics {
        assert_eq!(b.subscribe(topic, 2).await, 2);
    }
    let codes = b.unsubscribe(&[topics[0]]).await;
    assert!(codes.iter().all(|code| *code == 0), "{codes:?}");
    let mut a = at.connect(version, "a").await;
    for topic in ["TopicA", "TopicA/B", "Topic/C"] {
        a.publish(Publish::new(topic, topic).qos(1)).await;
    }
    assert_eq!(texts(&heard(&mut b).await), [("TopicA/B".to_owned(), 1), ("Topic/C".to_owned(), 1)]);
    b.disconnect().await;
    a.disconnect().await;
}
