//! Sessions outlive their connections and the server: what was acknowledged to a publisher is with its subscriber in
//! the end, once at QoS 2, in order; and every bound of that holds.

use tokio::net::TcpStream;

use crate::harness::client::Client;
use crate::harness::packet::kind::{PUBACK, PUBREC, PUBREL};
use crate::harness::packet::{ConnAck, Connect, Publish, users};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::{ADMIN, Fleet};

const BOTH: [Version; 2] = [V311, V5];

/// A client of the admin.
async fn connect(fleet: &Fleet, connect: Connect) -> (Client, ConnAck) {
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    Client::hello(Box::new(socket), &connect).await
}

fn hello(fleet: &Fleet, version: Version, client_id: &str) -> Connect {
    Connect::new(version, client_id, Some((ADMIN.0.to_owned(), fleet.token().to_owned())))
}

async fn publisher(fleet: &Fleet) -> Client {
    connect(fleet, hello(fleet, V5, "publisher")).await.0
}

fn message(qos: u8, text: &str) -> Publish {
    Publish::new("app/main/news", text).qos(qos)
}

fn texts(messages: &[Publish]) -> Vec<String> {
    messages.iter().map(Publish::text).collect()
}

#[tokio::test]
async fn what_was_queued_survives_kill_9_in_order() {
    let mut fleet = Fleet::start().await;
    for version in BOTH {
        let kept = hello(&fleet, version, "reader").kept();
        let (mut reader, first) = connect(&fleet, kept.clone()).await;
        assert!(!first.present);
        assert_eq!(reader.subscribe("app/main/#", 2).await, 2);
        reader.disconnect().await;
        let mut publisher = publisher(&fleet).await;
        let sent: Vec<_> = (0..50).map(|n| n.to_string()).collect();
        for (n, text) in sent.iter().enumerate() {
            let qos = if n % 2 == 0 { 1 } else { 2 };
            assert_eq!(publisher.publish(message(qos, text)).await, 0, "{text}");
        }
        fleet.kill().await;
        fleet.start_again().await;
        let (mut reader, again) = connect(&fleet, kept).await;
        assert!(again.present, "{version:?}");
        let got = reader.messages(sent.len()).await;
        assert_eq!(texts(&got), sent);
        assert!(got.iter().all(|publish| !publish.dup), "nothing of it was sent before");
        reader.is_quiet("each came once").await;
        reader.disconnect().await;
        // Its end, for the next version.
        let (reader, _) = connect(&fleet, hello(&fleet, version, "reader")).await;
        reader.disconnect().await;
    }
}

#[tokio::test]
async fn what_was_in_flight_is_sent_again_under_the_same_ids_after_kill_9() {
    let mut fleet = Fleet::start().await;
    let kept = hello(&fleet, V5, "reader").kept();
    let (mut reader, _) = connect(&fleet, kept.clone()).await;
    reader.subscribe("app/main/#", 2).await;
    let mut publisher = publisher(&fleet).await;
    for (qos, text) in [(1, "a"), (2, "b"), (2, "c"), (1, "d")] {
        publisher.publish(message(qos, text)).await;
    }
    let first = [reader.arrival().await, reader.arrival().await, reader.arrival().await, reader.arrival().await];
    // `c` gets as far as PUBREL, which says that the server knows it arrived.
    reader.send_ack(PUBREC, first[2].id).await;
    assert_eq!(reader.ack(PUBREL, first[2].id).await.reason, 0);
    fleet.kill().await;
    fleet.start_again().await;
    let (mut reader, again) = connect(&fleet, kept).await;
    assert!(again.present);
    for expected in [&first[0], &first[1]] {
        let got = reader.arrival().await;
        assert_eq!((got.id, got.dup, got.text()), (expected.id, true, expected.text()));
    }
    assert_eq!(reader.ack(PUBREL, first[2].id).await.reason, 0, "not the message again: the client has it");
    let got = reader.arrival().await;
    assert_eq!((got.id, got.dup, got.text()), (first[3].id, true, first[3].text()));
}

#[tokio::test]
async fn a_qos_2_message_is_taken_once_across_kill_9() {
    let mut fleet = Fleet::start().await;
    let (mut reader, _) = connect(&fleet, hello(&fleet, V5, "reader").kept()).await;
    reader.subscribe("app/main/#", 2).await;
    reader.disconnect().await;
    let kept = hello(&fleet, V5, "writer").kept();
    let (mut writer, _) = connect(&fleet, kept.clone()).await;
    let once = message(2, "once").id(9);
    writer.send_publish(&once).await;
    assert_eq!(writer.ack(PUBREC, 9).await.reason, 0);
    fleet.kill().await;
    fleet.start_again().await;
    let (mut writer, again) = connect(&fleet, kept).await;
    assert!(again.present);
    writer.send_publish(&once.dup()).await;
    assert_eq!(writer.ack(PUBREC, 9).await.reason, 0, "answered like the first");
    assert_eq!(writer.release(9).await, 0);
    let (mut reader, _) = connect(&fleet, hello(&fleet, V5, "reader").kept()).await;
    assert_eq!(reader.message().await.text(), "once");
    reader.is_quiet("it was taken once").await;
}

#[tokio::test]
async fn retained_messages_and_subscriptions_survive_kill_9() {
    let mut fleet = Fleet::start().await;
    let mut publisher = publisher(&fleet).await;
    for qos in [1, 2] {
        publisher.publish(Publish::new(format!("app/main/kept/{qos}"), "kept").qos(qos).retained()).await;
    }
    publisher.publish(Publish::new("app/main/kept/gone", "x").qos(1).retained()).await;
    publisher.publish(Publish::new("app/main/kept/gone", "").qos(1).retained()).await;
    fleet.kill().await;
    fleet.start_again().await;
    let (mut reader, _) = connect(&fleet, hello(&fleet, V5, "reader")).await;
    reader.subscribe("app/main/kept/#", 2).await;
    let mut got: Vec<_> = reader.messages(2).await.into_iter().map(|publish| (publish.topic, publish.retain)).collect();
    got.sort();
    assert_eq!(got, [("app/main/kept/1".to_owned(), true), ("app/main/kept/2".to_owned(), true)]);
    reader.is_quiet("what was forgotten stays forgotten").await;
}

#[tokio::test]
async fn a_device_that_was_deleted_leaves_no_session() {
    let mut fleet = Fleet::start().await;
    let device = fleet.enrol("boiler").await;
    let login = Some((device.username.clone(), device.password.clone()));
    let (client, _) = connect(&fleet, Connect::new(V5, "boiler", login).kept()).await;
    client.disconnect().await;
    fleet.call(reqwest::Method::DELETE, "/api/v1/devices/boiler", None).await;
    fleet.kill().await;
    fleet.start_again().await;
    assert!(fleet.metric("muster_mqtt_sessions", "").await < 0.5);
}

#[tokio::test]
async fn a_full_queue_is_told_to_its_client_and_no_publisher_suffers() {
    let fleet = Fleet::start_with(&[("MUSTER__SESSIONS__QUEUE_MESSAGES", "3")]).await;
    let kept = hello(&fleet, V5, "reader").kept();
    let (mut reader, _) = connect(&fleet, kept.clone()).await;
    reader.subscribe("app/main/#", 1).await;
    reader.disconnect().await;
    let mut publisher = publisher(&fleet).await;
    for n in 0..5 {
        assert_eq!(publisher.publish(message(1, &n.to_string())).await, 0);
    }
    let hits = fleet.metric("muster_mqtt_limit_hits_total", "session_queue").await;
    assert!((hits - 2.0).abs() < 0.5, "{hits}");
    let (mut reader, again) = connect(&fleet, kept).await;
    assert_eq!(users(&again.properties), [("dropped-messages", "2")]);
    assert_eq!(texts(&reader.messages(3).await), ["0", "1", "2"]);
    let waiting = async || fleet.get("/api/v1/sessions").await["items"][0]["queued_messages"].clone();
    fleet.eventually(waiting, |messages| *messages == 0).await;
    publisher.publish(message(1, "room again")).await;
    assert_eq!(reader.message().await.text(), "room again");
}

#[tokio::test]
async fn what_has_waited_too_long_is_deleted_and_told() {
    let fleet = Fleet::start_with(&[("MUSTER__SESSIONS__QUEUE_AGE_S", "1")]).await;
    let kept = hello(&fleet, V5, "reader").kept();
    let (mut reader, _) = connect(&fleet, kept.clone()).await;
    reader.subscribe("app/main/#", 1).await;
    reader.disconnect().await;
    publisher(&fleet).await.publish(message(1, "old")).await;
    let hits = || fleet.metric("muster_mqtt_limit_hits_total", "session_age");
    fleet.eventually(hits, |hits| (hits - 1.0).abs() < 0.5).await;
    let (mut reader, again) = connect(&fleet, kept).await;
    assert!(again.present, "the session itself stays");
    reader.is_quiet("its only message was too old").await;
}

#[tokio::test]
async fn a_publisher_waits_while_the_store_has_no_room_and_nothing_is_lost() {
    let fleet = Fleet::start_with(&[("MUSTER__SESSIONS__STORE_QUEUE_OPS", "1")]).await;
    let (mut reader, _) = connect(&fleet, hello(&fleet, V5, "reader").kept()).await;
    reader.subscribe("app/main/#", 1).await;
    let mut publisher = publisher(&fleet).await;
    let sent: Vec<_> = (0..100).map(|n| n.to_string()).collect();
    for text in &sent {
        let id = publisher.new_id();
        publisher.send_publish(&message(1, text).id(id)).await;
    }
    for id in 1..=100 {
        assert_eq!(publisher.ack(PUBACK, id).await.reason, 0);
    }
    assert!(fleet.metric("muster_mqtt_limit_hits_total", "store_queue").await > 0.5);
    assert_eq!(texts(&reader.messages(sent.len()).await), sent);
}

#[tokio::test]
async fn no_more_sessions_than_are_allowed_are_kept() {
    let fleet = Fleet::start_with(&[("MUSTER__SESSIONS__MAX", "1")]).await;
    let (first, _) = connect(&fleet, hello(&fleet, V5, "first").kept()).await;
    let (_, refused) = connect(&fleet, hello(&fleet, V5, "second").kept()).await;
    assert_eq!(refused.code, 0x97);
    let (_, clean) = connect(&fleet, hello(&fleet, V5, "second")).await;
    assert_eq!(clean.code, 0, "a clean session costs nothing");
    first.disconnect().await;
    let (_, again) = connect(&fleet, hello(&fleet, V5, "first").kept()).await;
    assert!(again.present);
    assert!(fleet.metric("muster_mqtt_limit_hits_total", "\"sessions\"").await > 0.5);
}

#[tokio::test]
async fn a_slow_reader_of_a_kept_session_gets_everything_in_order() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__OUTBOX_MESSAGES", "10")]).await;
    let (mut reader, _) = connect(&fleet, hello(&fleet, V5, "reader").kept()).await;
    reader.subscribe("app/main/#", 1).await;
    let mut publisher = publisher(&fleet).await;
    let sent: Vec<_> = (0..200).map(|n| n.to_string()).collect();
    for text in &sent {
        let id = publisher.new_id();
        publisher.send_publish(&message(1, text).id(id)).await;
    }
    for id in 1..=200 {
        assert_eq!(publisher.ack(PUBACK, id).await.reason, 0);
    }
    assert_eq!(texts(&reader.messages(sent.len()).await), sent, "the mailbox holds ten of them");
    reader.is_quiet("each came once").await;
}

#[tokio::test]
async fn a_member_that_goes_leaves_its_share_to_the_others() {
    let fleet = Fleet::start().await;
    let shared = "$share/workers/app/main/jobs";
    let (mut first, _) = connect(&fleet, hello(&fleet, V5, "first")).await;
    first.subscribe(shared, 1).await;
    let mut publisher = publisher(&fleet).await;
    for n in 0..5 {
        publisher.publish(Publish::new("app/main/jobs", n.to_string()).qos(1)).await;
    }
    assert_eq!(first.arrival().await.text(), "0");
    let (mut second, _) = connect(&fleet, hello(&fleet, V5, "second")).await;
    second.subscribe(shared, 1).await;
    first.vanish();
    assert_eq!(texts(&second.messages(5).await), ["0", "1", "2", "3", "4"], "none was acknowledged");
}

#[tokio::test]
async fn many_retained_messages_reach_a_client_with_a_small_mailbox() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__OUTBOX_MESSAGES", "10")]).await;
    let mut publisher = publisher(&fleet).await;
    for n in 0..100 {
        publisher.publish(Publish::new(format!("app/main/many/{n:03}"), "x").qos(1).retained()).await;
    }
    for connect_as in [hello(&fleet, V5, "clean"), hello(&fleet, V5, "kept").kept()] {
        let (mut reader, _) = connect(&fleet, connect_as).await;
        reader.subscribe("app/main/many/+", 1).await;
        assert_eq!(reader.messages(100).await.len(), 100);
        reader.is_quiet("each came once").await;
    }
}

#[tokio::test]
async fn after_the_end_of_a_session_nothing_is_left_in_the_database() {
    let fleet = Fleet::start().await;
    let (mut reader, _) = connect(&fleet, hello(&fleet, V5, "reader").kept_for(1)).await;
    reader.subscribe("app/main/#", 1).await;
    reader.disconnect().await;
    publisher(&fleet).await.publish(message(1, "waits")).await;
    let rows = || async {
        let counts = "select (select count(*) from session) + (select count(*) from session_subscription)
                             + (select count(*) from session_message)";
        sqlx::query_scalar::<_, i64>(counts).fetch_one(fleet.db()).await.expect("the tables are there")
    };
    fleet.eventually(rows, |left| *left == 0).await;
    let (mut reader, again) = connect(&fleet, hello(&fleet, V5, "reader").kept()).await;
    assert!(!again.present);
    reader.is_quiet("its messages went with it").await;
}
