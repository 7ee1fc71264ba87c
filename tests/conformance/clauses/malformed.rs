//! Packets that are no packets: reserved flags and options, fields that contradict each other.

use super::{Target, V5, V311, conforms, heard};
use crate::harness::client::Client;
use crate::harness::packet::Property::{SessionExpiry, WillDelay};
use crate::harness::packet::kind::DISCONNECT;
use crate::harness::packet::{Connect, Packet, Publish, Will, reasoned};
use crate::harness::raw::Version;

/// A CONNECT with further connect flags (§3.1.2.3).
fn with_flags(connect: &Connect, flags: u8) -> Vec<u8> {
    let mut bytes = connect.bytes();
    let place = bytes.windows(4).position(|name| name == b"MQTT").expect("the protocol's name") + 5;
    bytes[place] |= flags;
    bytes
}

/// The server refuses these bytes, in MQTT 5 by one of two codes, or closes at once.
async fn refuses(at: &Target, version: Version, connect: &[u8], rule: &str) {
    let mut client = Client::on(at.open().await, version);
    client.send(connect).await;
    match client.next().await {
        Packet::Closed => return,
        Packet::ConnAck(connack) if version == V5 => {
            assert!([0x81, 0x82].contains(&connack.code), "{rule}: {connack:?}");
        }
        other => panic!("{rule}: {other:?}"),
    }
    client.closes(rule).await;
}

#[tokio::test]
async fn a_connect_that_contradicts_itself_is_refused() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let plain = at.hello(version, "a");
            let with_will = plain.clone().will(Will::new("t", "x"));
            for (connect, flags, rule) in [
                (&plain, 0x01, "§3.1.2-3 the reserved flag"),
                (&plain, 0x08, "§3.1.2-11 a will's QoS without a will"),
                (&plain, 0x20, "§3.1.2-13 a will's retain without a will"),
                (&with_will, 0x18, "§3.1.2-12 a will of QoS 3"),
            ] {
                refuses(at, version, &with_flags(connect, flags), rule).await;
            }
            let (level, properties) = if version == V5 { (5, &[0][..]) } else { (4, &[][..]) };
            let short = [b"\0\x04MQTT", &[level, 0x02, 0, 0][..], properties, b"\0\x09a"].concat();
            let short = [&[0x10, u8::try_from(short.len()).expect("short")], &*short].concat();
            refuses(at, version, &short, "§1.5.4 a client id that ends after the packet").await;
        }
        let twice = at.hello(V5, "a").with(SessionExpiry(1)).with(SessionExpiry(1));
        refuses(at, V5, &twice.bytes(), "§3.1.2.11.2 a property twice").await;
        let elsewhere = at.hello(V5, "a").with(WillDelay(1));
        refuses(at, V5, &elsewhere.bytes(), "§2.2.2.2 a property of another packet").await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn reserved_flags_and_options_end_the_connection() {
    let scenario = async |at: &Target| {
        for (version, properties) in [(V311, &[][..]), (V5, &[0][..])] {
            // Packet id, properties in MQTT 5, the filter `t`, options.
            let subscribe = |options: u8| [&[0, 1], properties, &[0, 1, b't', options]].concat();
            let unsubscribe = [&[0, 1], properties, &[0, 1, b't']].concat();
            let no_id = [&[0, 0], properties, &[0, 1, b't', 0]].concat();
            let cases: [(u8, &[u8], &str); 6] = [
                (0x80, &subscribe(0), "§3.8.1-1 flags of SUBSCRIBE"),
                (0x82, &subscribe(3), "§3.8.3.1 QoS 3"),
                (0x82, &subscribe(0xC0), "§3.8.3-5 reserved options"),
                (0x82, &no_id, "§2.2.1-3 packet id 0"),
                (0xA0, &unsubscribe, "§3.10.1-1 flags of UNSUBSCRIBE"),
                (0x60, &[0, 1], "§3.6.1-1 flags of PUBREL"),
            ];
            // mosquitto 2.0 does not look at these.
            let more: [(u8, &[u8], &str); 2] =
                [(0xC1, &[], "§2.1.3-1 flags of PINGREQ"), (0xE1, &[], "§3.14.1-1 flags of DISCONNECT")];
            for (first, body, rule) in cases.into_iter().chain(more.into_iter().filter(|_| at.is_muster())) {
                let mut client = at.connect(version, "a").await;
                let length = u8::try_from(body.len()).expect("short");
                client.send(&[&[first, length], body].concat()).await;
                client.closes(rule).await;
            }
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_packet_after_the_good_bye_is_not_heard() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let mut watcher = at.connect(version, "watcher").await;
            watcher.subscribe("t", 1).await;
            let mut client = at.connect(version, "a").await;
            let publish = Publish::new("t", "too late").bytes(version);
            client.send(&[reasoned(DISCONNECT, 0, &[]), publish].concat()).await;
            client.closes("§3.14.4-1, §3.14.4-2").await;
            assert_eq!(heard(&mut watcher).await, [], "{version:?}");
            watcher.disconnect().await;
        }
    };
    conforms(scenario).await;
}
