//! What one connection may send: who sends more is not read for a while, or has to go, and nobody else feels it.

use std::time::{Duration, Instant};

use crate::harness::raw::Answer::{self, Ack, Closed, ConnAck, Disconnect};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::raw::{Hello, Raw, bytes};
use crate::harness::{Device, Fleet};

/// A QoS 1 reading `{"t": id}`.
fn reading(device: &Device, id: u16, version: Version, padding: usize) -> Vec<u8> {
    let body = bytes().text(device.topic("telemetry")).u16(id);
    let body = if version == V5 { body.u8(0) } else { body };
    let payload =
        format!(r#"{{"ts":{},"seq":{id},"values":{{"t":{id}}}{}}}"#, 1_763_692_212_000_i64, " ".repeat(padding));
    body.put(payload.as_bytes()).packet(0x32)
}

async fn hits(fleet: &Fleet, limit: &str) -> f64 {
    fleet.metric("muster_mqtt_limit_hits_total", &format!("\"{limit}\"")).await
}

#[tokio::test]
async fn who_sends_too_many_messages_is_not_read_for_a_while_and_loses_nothing() {
    // A burst of 5, and 20 a second.
    let limits = [("MUSTER__MQTT__MAX_MESSAGES_PER_S", "20"), ("MUSTER__MQTT__RATE_BURST_MS", "250")];
    let fleet = Fleet::start_with(&limits).await;
    let (eager, calm) = (fleet.enrol("eager").await, fleet.enrol("calm").await);
    for (version, first) in [(V5, 1), (V311, 101)] {
        let mut raw = Raw::connected(&fleet, &eager, version).await;
        let since = Instant::now();
        raw.send(&(first..first + 25).flat_map(|id| reading(&eager, id, version, 0)).collect::<Vec<_>>()).await;
        // Others have rates of their own.
        let mut other = Raw::connected(&fleet, &calm, version).await;
        other.send(&reading(&calm, first, version, 0)).await;
        assert_eq!(other.answer().await, Ack(0x40, first, 0));
        for id in first..first + 25 {
            assert_eq!(raw.answer().await, Ack(0x40, id, 0), "everything is taken, in order");
        }
        // The sixth is let through on credit; each of the next 19 waits until that is paid.
        assert!(since.elapsed() >= Duration::from_millis(19 * 50), "{:?}", since.elapsed());
    }
    assert_eq!(fleet.series(&eager, "t").await.len(), 50);
    assert!(hits(&fleet, "message_rate").await > 1.5);
    let (_, detail) = fleet.event("rate-limited").await;
    assert_eq!(detail["limit"], "message_rate");
}

#[tokio::test]
async fn who_sends_too_many_bytes_pays_for_them_afterwards() {
    let limits = [("MUSTER__MQTT__MAX_BYTES_PER_S", "10000"), ("MUSTER__MQTT__RATE_BURST_MS", "100")];
    let fleet = Fleet::start_with(&limits).await;
    let device = fleet.enrol("wordy").await;
    let mut raw = Raw::connected(&fleet, &device, V5).await;
    let since = Instant::now();
    raw.send(&[reading(&device, 1, V5, 6000), reading(&device, 2, V5, 0)].concat()).await;
    assert_eq!([raw.answer().await, raw.answer().await], [Ack(0x40, 1, 0), Ack(0x40, 2, 0)]);
    assert!(since.elapsed() >= Duration::from_millis(500), "{:?}", since.elapsed());
    assert_eq!(fleet.series(&device, "t").await.len(), 2);
    assert!(hits(&fleet, "byte_rate").await > 0.5);
    assert_eq!(fleet.event("rate-limited").await.1["limit"], "byte_rate");
}

#[tokio::test]
async fn who_is_not_read_is_not_silent() {
    let limits = [
        ("MUSTER__MQTT__MAX_MESSAGES_PER_S", "1"),
        ("MUSTER__MQTT__RATE_BURST_MS", "0"),
        ("MUSTER__MQTT__PACKET_TIMEOUT_MS", "1500"),
    ];
    let fleet = Fleet::start_with(&limits).await;
    let device = fleet.enrol("eager").await;
    let hello = Hello { keep_alive_s: 1, ..Hello::new(V5, "eager") };
    let mut raw = Raw::hello(&fleet, &device, hello).await;
    assert_eq!(raw.answer().await, ConnAck(0));
    let since = Instant::now();
    // The last one comes in two parts: the wait between them is the server's, not the client's.
    let last = reading(&device, 4, V5, 0);
    let first: Vec<_> = (1..=3).flat_map(|id| reading(&device, id, V5, 0)).chain(last[..9].to_vec()).collect();
    raw.send(&first).await;
    raw.send(&last[9..]).await;
    for id in 1..=4 {
        assert_eq!(raw.answer().await, Ack(0x40, id, 0), "longer than its keep alive and the time for a packet");
    }
    assert!(since.elapsed() >= Duration::from_secs(2), "{:?}", since.elapsed());
}

#[tokio::test]
async fn where_the_settings_say_so_who_sends_too_much_has_to_go() {
    let limits = [
        ("MUSTER__MQTT__MAX_MESSAGES_PER_S", "1"),
        ("MUSTER__MQTT__RATE_BURST_MS", "3000"),
        ("MUSTER__MQTT__RATE_EXCESS", "disconnect"),
    ];
    let fleet = Fleet::start_with(&limits).await;
    let device = fleet.enrol("eager").await;
    for (version, first) in [(V5, 1), (V311, 101)] {
        let mut raw = Raw::connected(&fleet, &device, version).await;
        raw.send(&(first..first + 50).flat_map(|id| reading(&device, id, version, 0)).collect::<Vec<_>>()).await;
        let mut acknowledged = 0;
        let last = loop {
            match raw.answer().await {
                Ack(..) => acknowledged += 1,
                last => break last,
            }
        };
        let end: Answer = if version == V5 { Disconnect(0x96) } else { Closed };
        assert_eq!(last, end, "message rate too high");
        assert!(acknowledged < 50, "not all of them");
    }
    assert!((hits(&fleet, "message_rate").await - 2.0).abs() < 0.1);
    // What was within the rate, three of each, is on its way to the database.
    fleet.eventually(|| fleet.series(&device, "t"), |stored| (6..50).contains(&stored.len())).await;
    // It may come again.
    Raw::connected(&fleet, &device, V5).await.pings("a new connection").await;
}
