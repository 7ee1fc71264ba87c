//! Messages on their way: QoS 1 and 2, windows, sizes, aliases, expiry, properties.

use super::{Settings, Target, V5, V311, conforms, heard, muster_conforms, passes, publish_all, texts, words};
use crate::harness::client::Client;
use crate::harness::packet::Property::{
    ContentType, CorrelationData, MaximumPacketSize, MessageExpiry, PayloadFormat, ReceiveMaximum, ResponseTopic,
    SubscriptionId, TopicAlias, TopicAliasMaximum,
};
use crate::harness::packet::kind::{PUBACK, PUBCOMP, PUBREC, PUBREL};
use crate::harness::packet::{Ack, Packet, Publish, Varint, property, user, users};
use crate::harness::raw::Version;

/// A subscriber at QoS 2 to `t`.
async fn subscriber(at: &Target, version: Version) -> Client {
    let mut client = at.connect(version, "subscriber").await;
    assert_eq!(client.subscribe("t", 2).await, 2);
    client
}

#[tokio::test]
async fn a_qos_2_message_sent_twice_is_delivered_once() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let mut subscriber = subscriber(at, version).await;
            let mut publisher = at.connect(version, "publisher").await;
            let message = Publish::new("t", "once").qos(2).id(5);
            publisher.send_publish(&message).await;
            assert!(publisher.ack(PUBREC, 5).await.reason < 0x80);
            // mosquitto 2.0 ends the connection at the second.
            let duplicates = if at.is_muster() { 3 } else { 1 };
            for _ in 0..duplicates {
                publisher.send_publish(&message.clone().dup()).await;
                assert!(publisher.ack(PUBREC, 5).await.reason < 0x80, "§4.3.3-10 acknowledged again");
            }
            assert_eq!(publisher.release(5).await, 0);
            // Released, the id means another message.
            publisher.send_publish(&Publish::new("t", "another").qos(2).id(5)).await;
            publisher.ack(PUBREC, 5).await;
            assert_eq!(publisher.release(5).await, 0);
            assert_eq!(words(&heard(&mut subscriber).await), ["once", "another"], "§4.3.3-12 {version:?}");
            subscriber.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_qos_2_message_sent_again_after_a_resume_is_delivered_once() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let mut subscriber = subscriber(at, version).await;
            let hello = at.hello(version, "publisher").kept();
            let (mut publisher, _) = at.join(hello.clone()).await;
            let message = Publish::new("t", "once").qos(2).id(5);
            publisher.send_publish(&message).await;
            publisher.ack(PUBREC, 5).await;
            publisher.vanish();
            let (mut publisher, connack) = at.join(hello).await;
            assert!(connack.present);
            publisher.send_publish(&message.dup()).await;
            assert!(publisher.ack(PUBREC, 5).await.reason < 0x80);
            assert_eq!(publisher.release(5).await, 0, "§4.3.3-11");
            assert_eq!(words(&heard(&mut subscriber).await), ["once"], "§4.3.3-10 {version:?}");
            subscriber.disconnect().await;
            publisher.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn acknowledgements_of_what_was_never_sent_are_answered_not_believed() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let unknown = if version == V5 { 0x92 } else { 0 };
            let mut client = at.connect(version, "a").await;
            client.send_ack(PUBREL, 77).await;
            let answer = client.ack(PUBCOMP, 77).await;
            if at.is_muster() {
                assert_eq!(answer.reason, unknown, "§3.7.2.1 packet identifier not found");
            }
            client.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_pubrec_of_what_was_never_sent_is_answered_0x92() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        client.send_ack(PUBREC, 77).await;
        assert_eq!(client.ack(PUBREL, 77).await.reason, 0x92, "§3.6.2.1 packet identifier not found");
        client.send_ack(PUBACK, 78).await;
        client.send_ack(PUBCOMP, 79).await;
        client.is_quiet("PUBACK and PUBCOMP have no answer").await;
        client.disconnect().await;
    };
    muster_conforms("2.0 says nothing to it", Settings::default(), scenario).await;
}

#[tokio::test]
async fn a_message_refused_by_its_receiver_is_over() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        client.subscribe("t", 2).await;
        let mut publisher = at.connect(V5, "publisher").await;
        for qos in [1, 2] {
            publisher.publish(Publish::new("t", "refused").qos(qos)).await;
            let message = client.arrival().await;
            let kind = if qos == 1 { PUBACK } else { PUBREC };
            client.send(&Ack::bytes(kind, message.id, 0x83)).await;
        }
        assert_eq!(heard(&mut client).await, [], "§4.3.3-4 neither PUBREL nor PUBLISH again");
        client.is_quiet("not even a PUBREL").await;
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn what_was_in_flight_comes_again_in_order_before_what_waited() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let hello = at.hello(version, "subscriber").kept();
            let (mut subscriber, _) = at.join(hello.clone()).await;
            subscriber.subscribe("t", 2).await;
            let mut publisher = at.connect(version, "publisher").await;
            for (payload, qos) in [("a", 1), ("b", 2), ("c", 1), ("d", 2), ("e", 1)] {
                publisher.publish(Publish::new("t", payload).qos(qos)).await;
            }
            let mut flying = Vec::new();
            for _ in 0..5 {
                flying.push(subscriber.arrival().await);
            }
            // b is received, c is done; then the connection breaks.
            subscriber.send_ack(PUBREC, flying[1].id).await;
            assert_eq!(subscriber.ack(PUBREL, flying[1].id).await.reason, 0);
            subscriber.send_ack(PUBACK, flying[2].id).await;
            subscriber.is_quiet("c needs no answer").await;
            subscriber.vanish();
            publish_all(&mut publisher, "t", 1, &["waited"]).await;

            let (mut subscriber, connack) = at.join(hello).await;
            assert!(connack.present);
            let mut again = Vec::new();
            let mut released = false;
            while again.len() < 3 || !released {
                match subscriber.next().await {
                    Packet::Publish(message) => again.push(message),
                    Packet::Ack(Ack { kind: PUBREL, id, .. }) if id == flying[1].id => released = true,
                    other => panic!("{other:?}"),
                }
            }
            let expected = [0, 3, 4].map(|place| flying[place].clone().dup());
            assert_eq!(again, expected, "§4.4-1, §4.6-1 {version:?}: marked, same ids, same order");
            subscriber.send_ack(PUBCOMP, flying[1].id).await;
            for message in &again {
                subscriber.acknowledge(message).await;
            }
            let last = subscriber.message().await;
            assert_eq!((last.text().as_str(), last.dup), ("waited", false));
            assert_eq!(heard(&mut subscriber).await, []);
            subscriber.disconnect().await;
            publisher.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn messages_of_a_topic_keep_their_order() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            for qos in 0..=2 {
                let mut subscriber = subscriber(at, version).await;
                let mut publisher = at.connect(version, "publisher").await;
                let sent: Vec<_> = (0..50).map(|count| count.to_string()).collect();
                for payload in &sent {
                    publisher.publish(Publish::new("t", payload.as_str()).qos(qos)).await;
                }
                assert_eq!(words(&subscriber.messages(50).await), sent, "§4.6-5 QoS {qos}");
                subscriber.disconnect().await;
            }
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn the_lower_of_two_qos_is_delivered() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let mut client = at.connect(version, "a").await;
            for granted in 0..=2 {
                assert_eq!(client.subscribe("t", granted).await, granted);
                for published in 0..=2 {
                    client.publish(Publish::new("t", "x").qos(published)).await;
                    let delivered = client.message().await.qos;
                    assert_eq!(delivered, granted.min(published), "§3.8.4-8 {published} to {granted}");
                }
            }
            client.disconnect().await;
        }
    };
    conforms(scenario).await;
}

// ---- windows and sizes ----

#[tokio::test]
async fn a_qos_2_message_holds_its_place_until_pubcomp() {
    let scenario = async |at: &Target| {
        let (mut client, _) = at.join(at.hello(V5, "subscriber").with(ReceiveMaximum(1))).await;
        client.subscribe("t", 2).await;
        let mut publisher = at.connect(V5, "publisher").await;
        publish_all(&mut publisher, "t", 2, &["one", "two"]).await;
        let one = client.arrival().await;
        client.send_ack(PUBREC, one.id).await;
        client.ack(PUBREL, one.id).await;
        client.is_quiet("§4.9-2 one is not complete").await;
        publish_all(&mut publisher, "t", 0, &["qos 0"]).await;
        client.send_ack(PUBCOMP, one.id).await;
        // QoS 0 may go on or wait for the window too.
        let mut rest = words(&client.messages(2).await);
        rest.sort_unstable();
        assert_eq!(rest, ["qos 0", "two"], "§4.9-3");
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_smaller_window_holds_for_what_is_sent_again() {
    let scenario = async |at: &Target| {
        let (mut client, _) = at.join(at.hello(V5, "subscriber").kept().with(ReceiveMaximum(10))).await;
        client.subscribe("t", 1).await;
        let mut publisher = at.connect(V5, "publisher").await;
        publish_all(&mut publisher, "t", 1, &["1", "2", "3", "4"]).await;
        for _ in 0..4 {
            client.arrival().await;
        }
        client.vanish();
        let (mut client, _) = at.join(at.hello(V5, "subscriber").kept().with(ReceiveMaximum(2))).await;
        let first = [client.arrival().await, client.arrival().await];
        client.is_quiet("§3.3.4-9 the window is two now").await;
        assert_eq!(words(&first), ["1", "2"]);
        for message in &first {
            client.acknowledge(message).await;
        }
        assert_eq!(words(&client.messages(2).await), ["3", "4"]);
        client.disconnect().await;
    };
    muster_conforms("2.0 sends all of them again at once", Settings::default(), scenario).await;
}

#[tokio::test]
async fn what_is_too_large_for_a_client_is_left_out_and_the_rest_comes() {
    let scenario = async |at: &Target| {
        let hello = at.hello(V5, "subscriber").kept().with(MaximumPacketSize(100));
        let (mut client, _) = at.join(hello.clone()).await;
        client.subscribe("t", 2).await;
        let mut publisher = at.connect(V5, "publisher").await;
        let large = "x".repeat(200);
        for qos in 0..=2 {
            publish_all(&mut publisher, "t", qos, &["before", &large, "after"]).await;
            assert_eq!(words(&heard(&mut client).await), ["before", "after"], "§3.1.2-24 QoS {qos}");
        }
        client.disconnect().await;
        publish_all(&mut publisher, "t", 1, &["before", &large, "after"]).await;
        let (mut client, _) = at.join(hello.clone()).await;
        assert_eq!(words(&heard(&mut client).await), ["before", "after"], "§3.1.2-25 what waited too");
        client.disconnect().await;
        // Properties count: a message that fits by its payload only does not fit.
        let mut heavy = Publish::new("t", "x").qos(1);
        heavy.properties = vec![user("name", &"v".repeat(100))];
        publisher.publish(heavy).await;
        let (mut client, _) = at.join(hello).await;
        assert_eq!(heard(&mut client).await, []);
        client.disconnect().await;
    };
    conforms(scenario).await;
}

// ---- aliases ----

#[tokio::test]
async fn a_client_may_give_an_alias_another_topic() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        client.subscribe("t/+", 1).await;
        let send = async |client: &mut Client, topic: &str, alias: u16| {
            let mut message = Publish::new(topic, "").qos(1);
            if topic.is_empty() {
                message.topic.clear();
            }
            client.publish(message.with(TopicAlias(alias))).await;
            client.message().await
        };
        let steps = [("t/1", 1, "t/1"), ("t/2", 2, "t/2"), ("", 1, "t/1"), ("t/3", 1, "t/3"), ("", 1, "t/3")];
        for (topic, alias, expected) in steps.into_iter().chain([("", 2, "t/2")]) {
            let message = send(&mut client, topic, alias).await;
            assert_eq!(message.topic, expected, "§3.3.2-12");
            assert_eq!(property!(message.properties, TopicAlias), None, "§3.3.2-7 an alias is of one connection");
        }
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn an_alias_that_cannot_be_ends_the_connection() {
    let scenario = async |at: &Target| {
        let (client, connack) = at.join(at.hello(V5, "a")).await;
        let most = property!(connack.properties, TopicAliasMaximum).unwrap_or(0);
        client.disconnect().await;
        let refused = async |publish: Publish, code: u8, rule: &str| {
            let mut client = at.connect(V5, "a").await;
            client.send_publish(&publish.qos(1).id(1)).await;
            client.ends(at.is_muster(), code, rule).await;
        };
        refused(Publish::new("t", "").with(TopicAlias(most + 1)), 0x94, "§3.3.2-9 beyond the maximum").await;
        refused(Publish::new("t", "").with(TopicAlias(0)), 0x94, "§3.3.2-8 there is no 0").await;
        refused(Publish::new("", "").with(TopicAlias(1)), 0x82, "§3.3.2.3.4 an alias without a topic").await;
        refused(Publish::new("", ""), 0x82, "§3.3.2.1 neither topic nor alias").await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn the_servers_aliases_always_mean_the_right_topic() {
    let scenario = async |at: &Target| {
        for most in [1, 2, 100] {
            let hello = at.hello(V5, "subscriber").kept().with(TopicAliasMaximum(most));
            let (mut client, _) = at.join(hello.clone()).await;
            client.subscribe("t/+", 1).await;
            let mut publisher = at.connect(V5, "publisher").await;
            let sent: Vec<_> = [1, 2, 1, 3, 2, 1, 1].iter().map(|number| format!("t/{number}")).collect();
            for topic in &sent {
                publisher.publish(Publish::new(topic, topic.as_str()).qos(1)).await;
            }
            let mut arrived = Vec::new();
            for _ in &sent {
                arrived.push(client.arrival().await);
            }
            assert_eq!(meant(&arrived, most), sent);
            client.vanish();
            // Sent again, on a connection that knows none of the aliases.
            let (mut client, _) = at.join(hello).await;
            let again = client.messages(sent.len()).await;
            assert_eq!(meant(&again, most), sent);
            client.disconnect_with(0, &[crate::harness::packet::Property::SessionExpiry(0)]).await;
        }
    };
    conforms(scenario).await;
}

/// The topics that messages of one connection mean, by their aliases.
fn meant(messages: &[Publish], most: u16) -> Vec<String> {
    let mut aliases = std::collections::HashMap::new();
    let topic = |message: &Publish| {
        let alias = property!(message.properties, TopicAlias);
        assert!(alias.is_none_or(|alias| (1..=most).contains(&alias)), "§3.1.2-26 {message:?}");
        if let Some(alias) = alias.filter(|_| !message.topic.is_empty()) {
            aliases.insert(alias, message.topic.clone());
        }
        if message.topic.is_empty() {
            aliases[&alias.expect("§3.3.2-8 topic or alias")].clone()
        } else {
            message.topic.clone()
        }
    };
    messages.iter().map(topic).collect()
}

// ---- expiry and properties ----

#[tokio::test]
async fn retained_messages_expire_and_tell_what_is_left() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        for (topic, expiry) in [("t/short", 1), ("t/long", 60)] {
            let message = Publish::new(topic, topic).qos(1).retained().with(MessageExpiry(expiry));
            assert!(client.publish(message).await < 0x80);
        }
        passes(2.5).await;
        client.subscribe("t/+", 1).await;
        let received = heard(&mut client).await;
        assert_eq!(words(&received), ["t/long"], "§3.3.2-5");
        let left = property!(received[0].properties, MessageExpiry).expect("what is left");
        assert!((1..=58).contains(&left), "§3.3.2-6 {left} s of 60 s left after 2.5 s");
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn what_waits_for_its_window_can_expire_too() {
    let scenario = async |at: &Target| {
        let (mut client, _) = at.join(at.hello(V5, "subscriber").with(ReceiveMaximum(1))).await;
        client.subscribe("t", 1).await;
        let mut publisher = at.connect(V5, "publisher").await;
        for (payload, expiry) in [("in flight", 60), ("expires", 1), ("stays", 60)] {
            publisher.publish(Publish::new("t", payload).qos(1).with(MessageExpiry(expiry))).await;
        }
        let first = client.arrival().await;
        passes(2.5).await;
        client.acknowledge(&first).await;
        let second = client.message().await;
        assert_eq!(second.text(), "stays", "§3.3.2-5");
        assert!(property!(second.properties, MessageExpiry).is_some_and(|left| left <= 58), "§3.3.2-6");
        client.disconnect().await;
    };
    let deviation = "2.0 sends nothing more once a message has expired in the queue of an open window";
    muster_conforms(deviation, Settings::default(), scenario).await;
}

#[tokio::test]
async fn a_message_keeps_what_its_sender_said_about_it() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        for qos in 0..=2 {
            client.subscribe("t", qos).await;
            let said = [
                PayloadFormat(1),
                ContentType("text/plain".into()),
                ResponseTopic("answers".into()),
                CorrelationData(vec![0, 255, 128]),
                user("b", "1"),
                user("a", "2"),
                user("b", "1"),
                user("", ""),
            ];
            client.publish(Publish { properties: said.to_vec(), ..Publish::new("t", "text").qos(qos) }).await;
            let message = client.message().await;
            assert_eq!(property!(message.properties, PayloadFormat), Some(1), "§3.3.2-4");
            assert_eq!(property!(message.properties, ContentType).as_deref(), Some("text/plain"), "§3.3.2-20");
            assert_eq!(property!(message.properties, ResponseTopic).as_deref(), Some("answers"), "§3.3.2-15");
            assert_eq!(property!(message.properties, CorrelationData), Some(vec![0, 255, 128]), "§3.3.2-16");
            let pairs = [("b", "1"), ("a", "2"), ("b", "1"), ("", "")];
            assert_eq!(users(&message.properties), pairs, "§3.3.2-17, §3.3.2-18");
        }
        client.publish(Publish::new("t", "bare")).await;
        assert_eq!(client.message().await.properties, [], "nothing is added");
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn what_a_client_may_not_say_about_a_message_ends_its_connection() {
    let scenario = async |at: &Target| {
        let refused = async |message: Publish, code: u8, rule: &str| {
            let mut client = at.connect(V5, "a").await;
            client.send_publish(&message.qos(1).id(1)).await;
            client.ends_with(code, rule).await;
        };
        refused(Publish::new("t", "").with(SubscriptionId(Varint(1))), 0x82, "§3.3.4-6").await;
        refused(Publish::new("t", "").with(ResponseTopic("a/+".into())), 0x82, "§3.3.2-14").await;
    };
    muster_conforms("2.0 lets them pass", Settings::default(), scenario).await;
}

#[tokio::test]
async fn a_clean_session_meets_nothing_of_the_one_before() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let (mut client, _) = at.join(at.hello(version, "a").kept()).await;
            client.subscribe("t", 2).await;
            let mut publisher = at.connect(version, "publisher").await;
            publish_all(&mut publisher, "t", 2, &["in flight"]).await;
            client.arrival().await;
            client.vanish();
            publish_all(&mut publisher, "t", 1, &["queued"]).await;
            let (mut client, connack) = at.join(at.hello(version, "a")).await;
            assert!(!connack.present, "§3.2.2-2");
            publish_all(&mut publisher, "t", 1, &["to nobody"]).await;
            assert_eq!(texts(&heard(&mut client).await), [], "§3.1.2-4");
            client.disconnect().await;
            let (mut client, connack) = at.join(at.hello(version, "a").kept_for(0)).await;
            assert!(!connack.present, "§3.1.2-23, 3.1.1 §3.1.2-6 it left nothing behind");
            assert_eq!(texts(&heard(&mut client).await), []);
            client.disconnect().await;
            at.connect(version, "a").await.disconnect().await;
        }
    };
    conforms(scenario).await;
}
