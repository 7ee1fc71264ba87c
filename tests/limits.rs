//! Every bound of the MQTT door is hit: the client is told, the metric counts, and nothing that was accepted is lost.

use std::net::SocketAddr;

use serde_json::json;
use tokio::net::TcpStream;

use crate::harness::raw::Answer::{Ack, Closed, ConnAck, Disconnect, Pong, Publish, SubAck};
use crate::harness::raw::Version::{V5, V311};
use crate::harness::raw::{Hello, Raw, bytes};
use crate::harness::{Answer, Device, Fleet};

/// A QoS 1 PUBLISH of a reading, MQTT 3.1.1 or with an empty block of properties.
fn reading(device: &Device, packet_id: u16, v5: bool) -> Vec<u8> {
    let seq = i64::from(packet_id);
    let payload = json!({"ts": 1_763_692_212_000_i64 + seq, "seq": seq, "values": {"t": seq}}).to_string();
    let body = bytes().text(device.topic("telemetry")).u16(packet_id);
    let body = if v5 { body.u8(0) } else { body };
    body.put(payload.as_bytes()).packet(0x32)
}

async fn hits(fleet: &Fleet, limit: &str) -> f64 {
    fleet.metric("muster_mqtt_limit_hits_total", &format!("\"{limit}\"")).await
}

#[tokio::test]
async fn a_connection_too_many_is_told_so() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__MAX_CONNECTIONS", "1")]).await;
    let (first, second) = (fleet.enrol("first").await, fleet.enrol("second").await);
    let mut held = Raw::connected(&fleet, &first, V5).await;
    for (version, refusal) in [(V5, 0x97), (V311, 3)] {
        let mut refused = Raw::hello(&fleet, &second, Hello::new(version, "second")).await;
        assert_eq!(refused.answer().await, ConnAck(refusal));
        assert_eq!(refused.answer().await, Closed);
    }
    assert!(hits(&fleet, "connections").await > 1.5);
    held.pings("those already in are not touched").await;
}

#[tokio::test]
async fn more_unacknowledged_than_receive_maximum_ends_an_mqtt_5_connection() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__RECEIVE_MAXIMUM", "2")]).await;
    let device = fleet.enrol("eager").await;
    let mut raw = Raw::connected(&fleet, &device, V5).await;
    let three = [reading(&device, 1, true), reading(&device, 2, true), reading(&device, 3, true)].concat();
    raw.send(&three).await;
    raw.ends_with(0x93, "§3.3.4 more than Receive Maximum").await;
    assert!(hits(&fleet, "receive_maximum").await > 0.5);
}

#[tokio::test]
async fn an_mqtt_311_client_that_is_ahead_is_not_read_and_loses_nothing() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__RECEIVE_MAXIMUM", "2")]).await;
    let device = fleet.enrol("eager").await;
    let mut raw = Raw::connected(&fleet, &device, V311).await;
    let all: Vec<u8> = (1..=50).flat_map(|id| reading(&device, id, false)).collect();
    raw.send(&all).await;
    for id in 1..=50 {
        assert_eq!(raw.answer().await, Ack(0x40, id, 0), "acknowledged in order (§4.6)");
    }
    assert_eq!(fleet.series(&device, "t").await.len(), 50);
}

#[tokio::test]
async fn a_full_queue_makes_its_senders_wait_and_loses_nothing() {
    let tight = [
        ("MUSTER__INGEST__WRITERS", "1"),
        ("MUSTER__INGEST__QUEUE_MESSAGES", "1"),
        ("MUSTER__INGEST__BATCH_MESSAGES", "1"),
    ];
    let fleet = Fleet::start_with(&tight).await;
    let device = fleet.enrol("eager").await;
    let mut raw = Raw::connected(&fleet, &device, V5).await;
    let all: Vec<u8> = (1..=100).flat_map(|id| reading(&device, id, true)).collect();
    raw.send(&all).await;
    for id in 1..=100 {
        assert_eq!(raw.answer().await, Ack(0x40, id, 0));
    }
    assert!(hits(&fleet, "ingest_queue").await > 0.5);
    assert_eq!(fleet.series(&device, "t").await.len(), 100);
}

#[tokio::test]
async fn a_subscription_too_many_is_told_so_and_the_same_one_again_is_not() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__MAX_SUBSCRIPTIONS", "1")]).await;
    let device = fleet.enrol("curious").await;
    for (version, refusal) in [(V5, 0x97), (V311, 0x80)] {
        let mut raw = Raw::connected(&fleet, &device, version).await;
        for (filter, granted) in [("a", 1), ("a", 1), ("b", refusal)] {
            raw.subscribe(&device.topic(filter), 1).await;
            assert_eq!(raw.answer().await, SubAck(vec![granted]), "{filter}");
        }
    }
    assert!(hits(&fleet, "subscriptions").await > 1.5);
}

#[tokio::test]
async fn what_is_too_large_for_a_client_is_not_sent_to_it() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("small").await;
    let hello = Hello { max_packet: Some(64), ..Hello::new(V5, "small") };
    let mut raw = Raw::hello(&fleet, &device, hello).await;
    assert_eq!(raw.answer().await, ConnAck(0));
    raw.subscribe(&device.topic("x"), 0).await;
    assert_eq!(raw.answer().await, SubAck(vec![0]));
    let mut admin = fleet.connect_admin("sender").await;
    admin.publish(&device.topic("x"), "x".repeat(100)).await;
    admin.publish(&device.topic("x"), "fits").await;
    assert_eq!(raw.answer().await, Publish(device.topic("x")), "only the one that fits");
    assert!((hits(&fleet, "client_packet_bytes").await - 1.0).abs() < 0.1);
    raw.pings("and nothing else").await;
}

#[tokio::test]
async fn a_client_that_takes_no_answer_of_this_size_is_let_go() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("tiny").await;
    let hello = |bytes| Hello { max_packet: Some(bytes), ..Hello::new(V5, "tiny") };
    let mut raw = Raw::hello(&fleet, &device, hello(10)).await;
    assert_eq!(raw.answer().await, Closed, "no room for the CONNACK, and before it nothing may be said (§3.14)");
    let mut raw = Raw::hello(&fleet, &device, hello(24)).await;
    assert_eq!(raw.answer().await, ConnAck(0));
    let many = (0..30).fold(bytes().u16(1).u8(0), |body, n| body.text(device.topic(&n.to_string())).u8(0));
    raw.send(&many.packet(0x82)).await;
    raw.ends_with(0x95, "no room for the SUBACK (§3.1.2.11.4)").await;
    assert!((hits(&fleet, "client_packet_bytes").await - 2.0).abs() < 0.1);
}

#[tokio::test]
async fn a_client_that_falls_silent_is_let_go_after_one_and_a_half_keep_alives() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("silent").await;
    for version in [V5, V311] {
        let began = std::time::Instant::now();
        let hello = Hello { keep_alive_s: 1, ..Hello::new(version, "silent") };
        let mut raw = Raw::hello(&fleet, &device, hello).await;
        assert_eq!(raw.answer().await, ConnAck(0));
        raw.send(&[0xC0, 0]).await;
        assert_eq!(raw.answer().await, Pong);
        let last = if version == V5 { Disconnect(0x8D) } else { Closed };
        assert_eq!(raw.answer().await, last);
        assert!(began.elapsed().as_secs_f32() >= 1.4, "not before (§3.1.2.10)");
    }
}

/// Which timer of the kernel runs for the server's end of a connection; `2`: it will ask whether the peer is there.
fn timer(socket: &TcpStream) -> Option<String> {
    let hex = |address: SocketAddr| format!("0100007F:{:04X}", address.port());
    let (server, client) = (hex(socket.peer_addr().ok()?), hex(socket.local_addr().ok()?));
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let row = table
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|row| row[1..3] == [&*server, &*client])?;
    Some(row[5].split(':').next()?.to_owned())
}

#[tokio::test]
async fn a_client_without_keep_alive_whose_machine_is_gone_is_noticed_by_tcp() {
    for (seconds, running) in [("120", "02"), ("0", "00")] {
        let fleet = Fleet::start_with(&[("MUSTER__MQTT__TCP_KEEPALIVE_S", seconds)]).await;
        let device = fleet.enrol("gone").await;
        let hello = Hello { keep_alive_s: 0, ..Hello::new(V311, "gone") };
        let mut raw = Raw::hello(&fleet, &device, hello).await;
        assert_eq!(raw.answer().await, ConnAck(0));
        let http = TcpStream::connect(fleet.url().trim_start_matches("http://")).await.expect("the server listens");
        for socket in [&raw.socket, &http] {
            let shown = || async { timer(socket) };
            fleet.eventually(shown, |timer| timer.as_deref() == Some(running)).await;
        }
    }
}

#[tokio::test]
async fn retained_messages_too_many_are_told_so() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__MAX_RETAINED", "1")]).await;
    let device = fleet.enrol("keeper").await;
    let mut mqtt = fleet.connect(&device).await;
    assert_ne!(mqtt.publish_retained(&device.topic("a"), "1").await, Answer::QuotaExceeded);
    assert_ne!(mqtt.publish_retained(&device.topic("a"), "2").await, Answer::QuotaExceeded);
    assert_eq!(mqtt.publish_retained(&device.topic("b"), "1").await, Answer::QuotaExceeded);
    assert!(hits(&fleet, "retained").await > 0.5);
}

#[tokio::test]
async fn what_cannot_even_be_put_aside_is_not_acknowledged() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("orphan").await;
    let mut raw = Raw::connected(&fleet, &device, V5).await;
    let refuse = sqlx::query("alter table dead_letter add constraint refuses_all check (false) not valid");
    refuse.execute(fleet.db()).await.expect("the database answers");
    raw.publish(0x32, device.topic("telemetry")).await;
    raw.ends_with(0x80, "never acknowledge and drop").await;
}
