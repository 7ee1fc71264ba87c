//! What strangers and broken devices send, as raw bytes: each input that is known to have stopped or confused a broker
//! has its exact answer, and afterwards others are served as before.

use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpSocket;
use tokio::time::{Instant, timeout};

use crate::harness::raw::Answer::{self, Ack, Closed, ConnAck, Disconnect, SubAck, UnsubAck};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::raw::{Hello, Raw, bytes};
use crate::harness::{self, Device, Fleet, PATIENCE};

/// A server with a device that misbehaves and one that does not.
struct Stage {
    fleet: Fleet,
    hostile: Device,
    honest: Device,
}

impl Stage {
    async fn set(settings: &[(&str, &str)]) -> Self {
        // Hostile clients come over and over, and would be damped for it: `admission.rs` has that.
        let undamped = ("MUSTER__ADMISSION__FLAPPING_CONNECTS", "0");
        let fleet = Fleet::start_with(&[&[undamped], settings].concat()).await;
        let (hostile, honest) = (fleet.enrol("hostile").await, fleet.enrol("honest").await);
        Self { fleet, hostile, honest }
    }

    async fn connected(&self, version: Version) -> Raw {
        Raw::connected(&self.fleet, &self.hostile, version).await
    }

    /// Both versions send `bytes` once they are connected; the connection ends with `reason`.
    async fn refuses(&self, bytes: &[u8], reason: u8, rule: &str) {
        for version in [V311, V5] {
            self.refuses_from(version, bytes, reason, rule).await;
        }
    }

    async fn refuses_from(&self, version: Version, bytes: &[u8], reason: u8, rule: &str) {
        let mut raw = self.connected(version).await;
        raw.send(bytes).await;
        raw.ends_with(reason, rule).await;
    }

    /// Another client connects, has a reading acknowledged, and no task has panicked.
    async fn still_serves(&self) {
        let mut mqtt = self.fleet.connect(&self.honest).await;
        let answer = mqtt.publish(&self.honest.topic("telemetry"), r#"{"temp":1}"#).await;
        assert_eq!(answer, harness::Answer::Success);
        mqtt.disconnect().await;
        let panics = self.fleet.metric("muster_mqtt_disconnects_total", "internal error").await;
        assert!(panics < 0.5, "{panics} connections ended by a panic");
    }

    async fn limit_hits(&self, limit: &str) -> f64 {
        self.fleet.metric("muster_mqtt_limit_hits_total", &format!("\"{limit}\"")).await
    }
}

// ---- what has stopped a broker ----

#[tokio::test]
async fn topics_that_begin_with_a_character_of_many_bytes() {
    let stage = Stage::set(&[]).await;
    let mut watcher = stage.fleet.connect_admin("watcher").await;
    watcher.subscribe(&stage.hostile.topic("#")).await;
    for first in [0x32, 0x33] {
        let mut raw = stage.connected(V5).await;
        raw.publish(first, "日本/x").await;
        assert_eq!(raw.answer().await, Ack(0x40, 7, 0x87), "{first:#x}");
        raw.pings("a denied PUBLISH").await;
        let mut raw = stage.connected(V311).await;
        raw.publish(first, "日本/x").await;
        raw.ends_with(0, "3.1.1 §3.3.5: closed").await;
    }
    for (version, refusal) in [(V311, 5), (V5, 0x87)] {
        let hello = Hello { will: Some(("日", "gone")), ..Hello::new(version, "hostile") };
        let mut raw = Raw::hello(&stage.fleet, &stage.hostile, hello).await;
        assert_eq!(raw.answer().await, ConnAck(refusal), "a will beyond its rights");
        assert_eq!(raw.answer().await, Closed);
    }
    let mut raw = stage.connected(V5).await;
    raw.publish(0x32, stage.hostile.topic("日本")).await;
    assert_eq!(raw.answer().await, Ack(0x40, 7, 0));
    assert_eq!(watcher.message().await.0, stage.hostile.topic("日本"));
    stage.still_serves().await;
}

#[tokio::test]
async fn a_session_that_leaves_shared_and_unacknowledged_messages_behind() {
    let stage = Stage::set(&[]).await;
    let live = stage.hostile.topic("live");
    for (version, clean) in [(V5, false), (V5, true), (V311, false), (V311, true)] {
        let hello = Hello { clean, ..Hello::new(version, "hostile") };
        let mut raw = Raw::hello(&stage.fleet, &stage.hostile, hello).await;
        assert_eq!(raw.answer().await, ConnAck(0));
        for filter in [format!("$share/g/{}", stage.hostile.topic("#")), live.clone()] {
            raw.subscribe(&filter, 1).await;
            assert_eq!(raw.answer().await, SubAck(vec![1]), "{filter}");
        }
        raw.publish(0x32, &live).await;
        let mut answers = [raw.answer().await, raw.answer().await, raw.answer().await];
        answers.sort_by_key(|answer| *answer != Ack(0x40, 7, 0));
        assert_eq!(answers, [Ack(0x40, 7, 0), Answer::Publish(live.clone()), Answer::Publish(live.clone())]);
        raw.reset();
        stage.still_serves().await;
    }
}

#[tokio::test]
async fn client_ids_with_the_characters_of_topics_connect_twice() {
    let stage = Stage::set(&[]).await;
    for client_id in ["a/b", "+", "#", "$SYS", "a/+/#$"] {
        for version in [V311, V5] {
            let mut first = Raw::hello(&stage.fleet, &stage.hostile, Hello::new(version, client_id)).await;
            assert_eq!(first.answer().await, ConnAck(0), "{client_id}");
            let mut second = Raw::hello(&stage.fleet, &stage.hostile, Hello::new(version, client_id)).await;
            first.ends_with(0x8E, "§3.1.4-3 taken over").await;
            assert_eq!(second.answer().await, ConnAck(0), "{client_id}");
            second.pings("taking over").await;
        }
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn three_hundred_connects_with_one_id_and_resets() {
    let stage = Stage::set(&[]).await;
    for count in 0..300 {
        let mut raw = Raw::hello(&stage.fleet, &stage.hostile, Hello::new(V5, "hostile")).await;
        // Every third is let in before it is gone.
        if count % 3 == 0 {
            assert_eq!(raw.answer().await, ConnAck(0), "connect {count}");
        }
        raw.reset();
    }
    stage.connected(V5).await.pings("the storm").await;
    stage.still_serves().await;
}

#[tokio::test]
async fn packets_for_servers_to_send_end_the_connection_and_leave_the_will_standing() {
    let stage = Stage::set(&[]).await;
    let mut watcher = stage.fleet.connect_admin("watcher").await;
    let topic = stage.hostile.topic("events");
    watcher.subscribe(&topic).await;
    for (kind, packet) in
        [("UNSUBACK", &[0xB0, 4, 0, 1, 0, 0][..]), ("CONNACK", &[0x20, 3, 0, 0, 0]), ("PINGRESP", &[0xD0, 0])]
    {
        for version in [V311, V5] {
            let hello = Hello { will: Some((&topic, kind)), ..Hello::new(version, "hostile") };
            let mut raw = Raw::hello(&stage.fleet, &stage.hostile, hello).await;
            assert_eq!(raw.answer().await, ConnAck(0));
            raw.send(packet).await;
            raw.ends_with(0x82, kind).await;
            assert_eq!(watcher.message().await, (topic.clone(), kind.to_owned()), "the will is sent");
        }
    }
    stage.still_serves().await;
}

// ---- what brokers accept and should not ----

#[tokio::test]
async fn topics_that_are_no_topic_names() {
    let stage = Stage::set(&[]).await;
    let wild = stage.hostile.topic("#");
    let cases: [(&[u8], u8, &str); 5] = [
        (b"a/#", 0x90, "§3.3.2-2 a wildcard"),
        (wild.as_bytes(), 0x90, "§3.3.2-2 a wildcard below the device's own topics"),
        (b"", 0x82, "§3.3.2.1 an empty topic without an alias"),
        (b"a\0b", 0x81, "§1.5.4-2 U+0000"),
        (b"a\xFF", 0x81, "§1.5.4-1 not UTF-8"),
    ];
    for (topic, reason, rule) in cases {
        for version in [V311, V5] {
            let mut raw = stage.connected(version).await;
            raw.publish(0x32, topic).await;
            raw.ends_with(reason, rule).await;
        }
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn filters_that_are_no_topic_filters() {
    let stage = Stage::set(&[]).await;
    for filter in ["a/#/b", "a#", "$share/g", "$share//a", ""] {
        let mut raw = stage.connected(V5).await;
        raw.subscribe(filter, 1).await;
        assert_eq!(raw.answer().await, SubAck(vec![0x8F]), "{filter:?}");
        raw.pings("a filter that is none").await;
        let mut raw = stage.connected(V311).await;
        raw.subscribe(filter, 1).await;
        raw.ends_with(0, filter).await;
    }
    for (version, refusal) in [(V311, 0x80), (V5, 0x87)] {
        let mut raw = stage.connected(version).await;
        raw.subscribe("$SYS/#", 1).await;
        assert_eq!(raw.answer().await, SubAck(vec![refusal]), "refused, and the link stays");
        raw.pings("$SYS/#").await;
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn a_second_connect() {
    let stage = Stage::set(&[]).await;
    for version in [V311, V5] {
        let hello = Hello::new(version, "hostile").bytes(&stage.hostile);
        stage.refuses_from(version, &hello, 0x82, "§3.1.0-2").await;
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn client_ids_that_are_too_long_or_no_text() {
    let stage = Stage::set(&[]).await;
    let long = "x".repeat(1_000);
    for (version, refusal) in [(V311, 2), (V5, 0x85)] {
        let mut raw = Raw::hello(&stage.fleet, &stage.hostile, Hello::new(version, &long)).await;
        assert_eq!(raw.answer().await, ConnAck(refusal));
        assert_eq!(raw.answer().await, Closed);
    }
    let longest = "x".repeat(65_535);
    for version in [V311, V5] {
        let mut raw = Raw::hello(&stage.fleet, &stage.hostile, Hello::new(version, &longest)).await;
        assert_eq!(raw.answer().await, Closed, "more than a CONNECT may have, and nothing was read of it");
    }
    let hello = |version, client_id| Hello { client_id, ..Hello::new(version, "") };
    let mut raw = Raw::hello(&stage.fleet, &stage.hostile, hello(V5, b"a\0")).await;
    assert_eq!(raw.answer().await, ConnAck(0x81), "§1.5.4-2 U+0000");
    let mut raw = Raw::hello(&stage.fleet, &stage.hostile, hello(V311, b"\xC3")).await;
    assert_eq!(raw.answer().await, Closed, "3.1.1 has no return code for it");
    let empty = Hello { clean: false, ..Hello::new(V311, "") };
    let mut raw = Raw::hello(&stage.fleet, &stage.hostile, empty).await;
    assert_eq!(raw.answer().await, ConnAck(2), "3.1.1 §3.1.3-8");
    stage.still_serves().await;
}

#[tokio::test]
async fn versions_that_are_not_spoken() {
    let stage = Stage::set(&[]).await;
    let hello = |name: &str, level: u8| bytes().text(name).u8(level).u8(2).u16(0).text("c").packet(0x10);
    for (name, level, refusal) in [("MQIsdp", 3, 1), ("MQTT", 3, 1), ("MQTT", 6, 0x84)] {
        let mut raw = Raw::open(&stage.fleet).await;
        raw.send(&hello(name, level)).await;
        assert_eq!(raw.answer().await, ConnAck(refusal), "{name} {level}");
        assert_eq!(raw.answer().await, Closed);
    }
    let mut raw = Raw::open(&stage.fleet).await;
    raw.send(&hello("HTTP", 4)).await;
    assert_eq!(raw.answer().await, Closed, "§3.1.2-1");
    stage.still_serves().await;
}

#[tokio::test]
async fn a_qos_2_message_sent_twice_is_taken_once_and_released_by_its_own_id() {
    let stage = Stage::set(&[]).await;
    for version in [V311, V5] {
        let mut watcher = stage.fleet.connect_admin("watcher").await;
        watcher.subscribe(&stage.hostile.topic("#")).await;
        let mut raw = stage.connected(version).await;
        for first in [0x34, 0x3C, 0x34] {
            raw.publish(first, stage.hostile.topic("live")).await;
            assert_eq!(raw.answer().await, Ack(0x50, 7, 0), "§4.3.3 {first:#x}");
        }
        raw.send(&[0x62, 2, 0, 6]).await;
        let not_found = if version == V5 { 0x92 } else { 0 };
        assert_eq!(raw.answer().await, Ack(0x70, 6, not_found), "another id releases nothing");
        raw.send(&[0x62, 2, 0, 7]).await;
        assert_eq!(raw.answer().await, Ack(0x70, 7, 0));
        raw.publish(0x34, stage.hostile.topic("next")).await;
        assert_eq!(raw.answer().await, Ack(0x50, 7, 0), "the id is free again");
        assert_eq!(watcher.message().await.0, stage.hostile.topic("live"));
        assert_eq!(watcher.message().await.0, stage.hostile.topic("next"), "the first came once");
        watcher.disconnect().await;
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn unsubscribe_is_answered_once_with_a_reason_for_each_filter() {
    let stage = Stage::set(&[]).await;
    let (held, never) = (stage.hostile.topic("held"), stage.hostile.topic("never"));
    for (version, answer) in [(V311, vec![]), (V5, vec![0, 0x11])] {
        let mut raw = stage.connected(version).await;
        raw.subscribe(&held, 1).await;
        assert_eq!(raw.answer().await, SubAck(vec![1]));
        let body = if version == V5 { bytes().u16(2).u8(0) } else { bytes().u16(2) };
        raw.send(&body.text(&held).text(&never).packet(0xA2)).await;
        assert_eq!(raw.answer().await, UnsubAck(answer));
        raw.pings("one UNSUBACK and no other").await;
        raw.publish(0x32, &held).await;
        assert_eq!(raw.answer().await, Ack(0x40, 7, if version == V5 { 0x10 } else { 0 }));
        raw.pings("nothing is delivered").await;
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn topic_aliases_beyond_what_is_offered() {
    let stage = Stage::set(&[]).await;
    for alias in [0, 17, u16::MAX] {
        let body = bytes().text(stage.hostile.topic("telemetry")).u16(7).u8(3).u8(0x23).u16(alias);
        stage.refuses_from(V5, &body.put(b"{}").packet(0x32), 0x94, "§3.3.2.3.4").await;
    }
    stage.still_serves().await;
}

// ---- what is only noise ----

/// Bytes that mean nothing, the same in each run.
fn noise(seed: u64, count: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()[3]
    };
    (0..count).map(|_| next()).collect()
}

#[tokio::test]
async fn random_bytes() {
    let stage = Stage::set(&[]).await;
    for seed in 1..=50 {
        let mut raw = Raw::open(&stage.fleet).await;
        raw.send(&noise(seed, 300)).await;
        let _ = raw.socket.shutdown().await;
        assert_eq!(raw.answer().await, Closed, "seed {seed}");
        for version in [V311, V5] {
            let mut raw = stage.connected(version).await;
            raw.send(&noise(seed, 300)).await;
            let _ = raw.socket.shutdown().await;
            loop {
                match raw.answer().await {
                    Closed => break,
                    Disconnect(reason) => assert!(reason >= 0x80 && version == V5, "seed {seed}"),
                    _ => {}
                }
            }
        }
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn no_connect_at_all() {
    let stage = Stage::set(&[("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "1000")]).await;
    let mut silent = Raw::open(&stage.fleet).await;
    for first in [&[0xC0, 0][..], &[0x30, 2, 0, 0], &[0xE0, 0], b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01"] {
        let mut raw = Raw::open(&stage.fleet).await;
        raw.send(first).await;
        assert_eq!(raw.answer().await, Closed, "§3.1.0-1 {first:?}");
    }
    assert_eq!(silent.answer().await, Closed);
    assert!(stage.limit_hits("connect_timeout").await > 0.5);
    stage.still_serves().await;
}

#[tokio::test]
async fn a_packet_that_is_too_large_is_refused_by_its_header() {
    let stage = Stage::set(&[]).await;
    let before = stage.limit_hits("packet_bytes").await;
    let whole = bytes().text(stage.hostile.topic("telemetry")).u16(7).u8(0).put(&vec![b'x'; 300_000]).packet(0x32);
    stage.refuses(&whole[..5], 0x95, "§3.2.2.3.6 300 kB, of which the header came").await;
    stage.refuses(&[0x30, 0xFF, 0xFF, 0xFF, 0x7F], 0x95, "256 MiB").await;
    stage.refuses(&[0x30, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F], 0x81, "§2.1.4 five bytes of length").await;
    assert!((stage.limit_hits("packet_bytes").await - before - 4.0).abs() < 0.1);
    stage.still_serves().await;
}

#[tokio::test]
async fn a_packet_that_never_ends_is_not_taken() {
    let stage = Stage::set(&[]).await;
    let whole = bytes().text(stage.hostile.topic("telemetry")).u16(7).u8(0).put(br#"{"temp":1}"#).packet(0x32);
    for end in [1, 2, 10, whole.len() - 1] {
        let mut raw = stage.connected(V5).await;
        raw.send(&whole[..end]).await;
        raw.socket.shutdown().await.expect("it is open");
        assert_eq!(raw.answer().await, Closed, "cut after {end} bytes");
    }
    assert!(stage.fleet.series(&stage.hostile, "temp").await.is_empty());
    stage.still_serves().await;
}

#[tokio::test]
async fn packets_that_are_malformed() {
    let stage = Stage::set(&[]).await;
    let topic = stage.hostile.topic("telemetry");
    let zero = |version| if version == V5 { bytes().text(&topic).u16(0).u8(0) } else { bytes().text(&topic).u16(0) };
    for version in [V311, V5] {
        stage.refuses_from(version, &zero(version).packet(0x32), 0x81, "§2.2.1-3 packet id 0").await;
        let qos_3 = bytes().text(&topic).u16(7).u8(0).packet(0x36);
        stage.refuses_from(version, &qos_3, 0x81, "§3.3.1-4 QoS 3").await;
    }
    stage.refuses(&bytes().text(&topic).u8(0).packet(0x38), 0x81, "§3.3.1-2 DUP with QoS 0").await;
    stage.refuses(&[0x00, 0], 0x81, "§2.1.2 type 0").await;
    stage.refuses(&[0x80, 2, 0, 1], 0x81, "§3.8.1-1 flags of SUBSCRIBE").await;
    stage.refuses(&[0xC0, 1, 0], 0x81, "PINGREQ with a body").await;
    stage.refuses_from(V5, &bytes().u16(1).u8(0).packet(0x82), 0x82, "§3.8.3-2 no filter").await;
    stage.refuses_from(V5, &bytes().u8(0x18).packet(0xF0), 0x82, "AUTH that nobody asked for").await;
    stage.still_serves().await;
}

#[tokio::test]
async fn acknowledgements_of_nothing() {
    let stage = Stage::set(&[]).await;
    for version in [V311, V5] {
        let mut raw = stage.connected(version).await;
        raw.send(&[0x40, 2, 0, 9, 0x40, 2, 0xFF, 0xFF]).await;
        raw.pings("a PUBACK of nothing is ignored").await;
    }
    for (version, not_found) in [(V311, 0), (V5, 0x92)] {
        let mut raw = stage.connected(version).await;
        raw.send(&[0x50, 2, 0, 9]).await;
        assert_eq!(raw.answer().await, Ack(0x62, 9, not_found), "PUBREC of nothing");
        raw.send(&[0x62, 2, 0, 9]).await;
        assert_eq!(raw.answer().await, Ack(0x70, 9, not_found), "PUBREL of nothing");
        raw.send(&[0x70, 2, 0, 9]).await;
        raw.pings("a PUBCOMP of nothing is ignored").await;
    }
    stage.still_serves().await;
}

#[tokio::test]
async fn twenty_thousand_topics_that_nobody_listens_to() {
    let stage = Stage::set(&[]).await;
    let mut raw = stage.connected(V5).await;
    for hundred in 0..200 {
        let message = |count: u16| {
            let topic = stage.hostile.topic(&format!("live/{hundred}/{count}"));
            bytes().text(topic).u16(count + 1).u8(0).packet(0x32)
        };
        raw.send(&(0..100).flat_map(message).collect::<Vec<_>>()).await;
        for count in 0..100 {
            assert_eq!(raw.answer().await, Ack(0x40, count + 1, 0x10), "message {count} of hundred {hundred}");
        }
    }
    stage.still_serves().await;
}

// ---- what is only slow ----

#[tokio::test]
async fn two_hundred_slow_connects() {
    let stage = Stage::set(&[("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "3000")]).await;
    let hello = Hello::new(V5, "hostile").bytes(&stage.hostile);
    let mut slow = Vec::new();
    for count in 0..200 {
        let mut raw = Raw::open(&stage.fleet).await;
        raw.send(&hello[..count % hello.len()]).await;
        slow.push(raw);
    }
    stage.still_serves().await;
    for raw in &mut slow {
        assert_eq!(raw.answer().await, Closed);
    }
    assert!((stage.limit_hits("connect_timeout").await - 200.0).abs() < 0.1);
    stage.still_serves().await;
}

#[tokio::test]
async fn a_body_that_comes_byte_by_byte() {
    let stage = Stage::set(&[("MUSTER__MQTT__PACKET_TIMEOUT_MS", "1000")]).await;
    let mut raw = stage.connected(V5).await;
    let start = Instant::now();
    raw.send(&[0x32, 0xFF, 0x01]).await;
    let answer = loop {
        raw.send(b"\0").await;
        if let Ok(answer) = timeout(Duration::from_millis(50), raw.packet()).await {
            break answer;
        }
        assert!(start.elapsed() < PATIENCE, "a packet that has begun must end");
    };
    let (first, body) = answer.expect("a word before the end");
    assert_eq!(raw.understand(first, &body), Disconnect(0x80));
    assert!(start.elapsed() >= Duration::from_secs(1), "a slow packet has its time");
    assert!(stage.limit_hits("packet_timeout").await > 0.5);
    stage.still_serves().await;
}

#[tokio::test]
async fn a_subscriber_that_never_reads() {
    let stage = Stage::set(&[("MUSTER__MQTT__OUTBOX_MESSAGES", "50")]).await;
    let topic = stage.hostile.topic("live");
    let mut watcher = stage.fleet.connect_admin("watcher").await;
    watcher.subscribe(&topic).await;
    for (options, limit) in [(0, "outbox_dropped"), (1, "outbox_full")] {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.set_recv_buffer_size(4_096).expect("before it connects");
        let socket = socket.connect(stage.fleet.mqtt_addr()).await.expect("the server listens");
        let mut deaf = Raw { socket, version: V5 };
        deaf.send(&Hello::new(V5, "deaf").bytes(&stage.hostile)).await;
        assert_eq!(deaf.answer().await, ConnAck(0));
        deaf.subscribe(&topic, options).await;
        assert_eq!(deaf.answer().await, SubAck(vec![options]));
        let mut publisher = stage.fleet.connect(&stage.hostile).await;
        let payload = "x".repeat(8 * 1024);
        let mut sent = 0;
        while stage.limit_hits(limit).await < 0.5 {
            for _ in 0..50 {
                assert_eq!(publisher.publish(&topic, payload.clone()).await, harness::Answer::Success);
                assert_eq!(watcher.message().await.0, topic, "others get what the deaf one does not");
            }
            sent += 50;
            assert!(sent < 5_000, "40 MB wait for one client");
        }
        publisher.disconnect().await;
        deaf.reset();
        stage.still_serves().await;
    }
}
