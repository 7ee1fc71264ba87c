//! What the wire costs: nanoseconds to read a QoS 1 message of 200 bytes and write its PUBACK.
//! `cargo bench -p broker --bench wire`
//! CPU time of this thread, so that a busy machine does not blur it (Linux).

use std::hint::black_box;

use broker::wire::{Ack, Decoder, Encoder, Outgoing, Packet, Reason, Version};
use bytes::{BufMut, BytesMut};

/// Messages that arrive with one read of the socket.
const BURST: usize = 64;
const ROUNDS: usize = 50_000;

fn main() {
    for version in [Version::V311, Version::V5] {
        let best = (0..5).map(|_| nanoseconds_per_message(version)).fold(f64::INFINITY, f64::min);
        println!("{version:?}: {best:.0} ns of CPU per message (decode + PUBACK, best of 5)");
    }
}

fn nanoseconds_per_message(version: Version) -> f64 {
    let burst = message(version).repeat(BURST);
    let mut decoder = connected(version);
    let encoder = Encoder::new(version);
    let (mut buffer, mut answers) = (BytesMut::with_capacity(16 * 1024), BytesMut::with_capacity(4 * BURST));
    let start = cpu_ns();
    for _ in 0..ROUNDS {
        buffer.extend_from_slice(&burst);
        while let Some(Packet::Publish(publish)) = decoder.decode(&mut buffer).expect("legal messages") {
            let ack = Ack::new(publish.packet_id.expect("QoS 1"), Reason::Success);
            encoder.encode(Outgoing::PubAck(&ack), &mut answers).expect("no limit");
            black_box(&publish);
        }
        assert_eq!(answers.len(), 4 * BURST);
        answers.clear();
    }
    #[expect(clippy::cast_precision_loss, reason = "seconds in nanoseconds, and some millions of messages")]
    let per_message = (cpu_ns() - start) as f64 / (ROUNDS * BURST) as f64;
    per_message
}

/// What this thread has had of the CPU, in nanoseconds.
fn cpu_ns() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux keeps it");
    stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("its first number")
}

fn message(version: Version) -> Vec<u8> {
    let topic = b"fleet/v1/main/boiler-0001/telemetry";
    let properties: &[u8] = if version == Version::V5 { &[0] } else { &[] };
    let length = 2 + topic.len() + 2 + properties.len() + 200;
    let mut bytes =
        vec![0x32, u8::try_from(length % 128).expect("seven bits") | 0x80, u8::try_from(length / 128).expect("small")];
    bytes.put_u16(u16::try_from(topic.len()).expect("short"));
    bytes.extend_from_slice(topic);
    bytes.put_u16(7);
    bytes.extend_from_slice(properties);
    bytes.resize(bytes.len() + 200, b'x');
    bytes
}

fn connected(version: Version) -> Decoder {
    let connect: &[u8] = match version {
        Version::V311 => b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c",
        Version::V5 => b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01c",
    };
    let mut decoder = Decoder::new(262_144, 8_192);
    decoder.decode(&mut BytesMut::from(connect)).expect("legal").expect("whole");
    decoder
}
