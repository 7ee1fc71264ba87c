//! MQTT 3.1.1: the ten tests of the suite, and the one on wills that it holds but does not run.

use super::{Settings, Target, conforms, heard, muster_conforms, shared, texts};
use crate::harness::packet::{Publish, Will};
use crate::harness::raw::Version::V311;

#[tokio::test]
async fn test_basic() {
    conforms(async |at| shared::basic(at, V311).await).await;
}

#[tokio::test]
async fn test_retained_messages() {
    conforms(retained_messages).await;
}

/// The last retained message of each topic comes with a new subscription; an empty one clears it.
async fn retained_messages(at: &Target) {
    let topics = ["TopicA/B", "Topic/C", "TopicA/C"];
    for payload in ["qos", ""] {
        let mut a = at.connect(V311, "a").await;
        for (qos, topic) in (0..).zip(topics) {
            a.publish(Publish::new(topic, payload).qos(qos).retained()).await;
        }
        a.subscribe("+/+", 2).await;
        let mut received = heard(&mut a).await;
        received.sort_by_key(|message| message.qos);
        let expected = if payload.is_empty() { vec![] } else { (0..=2).map(|qos| ("qos".to_owned(), qos)).collect() };
        assert_eq!(texts(&received), expected);
        assert!(received.iter().all(|message| message.retain), "§3.3.1-8 {received:?}");
        a.disconnect().await;
    }
}

#[tokio::test]
async fn test_will_message() {
    conforms(will_message).await;
}

/// The will of a client that vanishes is sent.
async fn will_message(at: &Target) {
    let mut b = at.connect(V311, "b").await;
    b.subscribe("Topic/C", 2).await;
    let (a, _) = at.join(at.hello(V311, "a").will(Will::new("Topic/C", "client not disconnected"))).await;
    a.vanish();
    assert_eq!(b.message().await.text(), "client not disconnected");
    let (a, _) = at.join(at.hello(V311, "a").will(Will::new("Topic/C", "a good-bye was said"))).await;
    a.disconnect().await;
    assert_eq!(heard(&mut b).await, [], "§3.14.4-3");
}

#[tokio::test]
async fn test_zero_length_clientid() {
    conforms(zero_length_clientid).await;
}

/// Who has no name can have no session that is kept.
async fn zero_length_clientid(at: &Target) {
    let (client, connack) = at.ask(at.hello(V311, "").kept()).await;
    assert_eq!(connack.code, 2, "§3.1.3-8 identifier rejected");
    client.closes("§3.1.3-8").await;
    at.connect(V311, "").await.disconnect().await;
}

#[tokio::test]
async fn test_offline_message_queueing() {
    conforms(async |at| shared::offline_message_queueing(at, V311).await).await;
}

#[tokio::test]
async fn test_overlapping_subscriptions() {
    let deviation = "2.0 sends it at the QoS of any of them";
    let scenario = async |at: &Target| shared::overlapping_subscriptions(at, V311).await;
    muster_conforms(deviation, Settings::default(), scenario).await;
}

#[tokio::test]
async fn test_keepalive() {
    conforms(async |at| shared::keepalive(at, V311).await).await;
}

#[tokio::test]
async fn test_redelivery_on_reconnect() {
    conforms(async |at| shared::redelivery_on_reconnect(at, V311).await).await;
}

#[tokio::test]
async fn test_subscribe_failure() {
    conforms(async |at| shared::subscribe_failure(at, V311).await).await;
}

#[tokio::test]
async fn test_dollar_topics() {
    conforms(async |at| shared::dollar_topics(at, V311).await).await;
}

#[tokio::test]
async fn test_unsubscribe() {
    conforms(async |at| shared::unsubscribe(at, V311).await).await;
}
