//! A client's stream, cut anywhere: the decoder neither panics nor asks for more than its limits, makes the same of the
//! stream wherever it is cut, and what it has read the encoder writes so that it reads the same again.
//!
//! Input: how the connection begins, where the stream is cut, the stream.

#![no_main]

use broker::wire::{Decoder, Encoder, MAX_HEADER_BYTES, Outgoing, Packet, Publish, Version, Violation};
use bytes::BytesMut;
use libfuzzer_sys::fuzz_target;

/// Small, so that the fuzzer meets them. In bytes.
const MAX_PACKET: u32 = 512;
const MAX_CONNECT: u32 = 256;

const CONNECT_311: &[u8] = b"\x10\x0d\x00\x04MQTT\x04\x02\x00\x3c\x00\x01c";
const CONNECT_5: &[u8] = b"\x10\x0e\x00\x04MQTT\x05\x02\x00\x3c\x00\x00\x01c";

fuzz_target!(|input: &[u8]| {
    let [start, cut, stream @ ..] = input else { return };
    let start: &[u8] = match start % 3 {
        0 => &[],
        1 => CONNECT_311,
        _ => CONNECT_5,
    };
    let stream = [start, stream].concat();
    let whole = read(&stream, stream.len());
    assert_eq!(whole, read(&stream, usize::from(*cut)), "cutting the stream changed what was read");
    for packet in &whole.0 {
        write_and_read(packet, &whole.0[0]);
    }
});

/// What a new decoder makes of `stream` when it comes in pieces of `piece` bytes.
fn read(stream: &[u8], piece: usize) -> (Vec<Packet>, Option<Violation>) {
    let mut decoder = Decoder::new(MAX_PACKET, MAX_CONNECT);
    let mut buffer = BytesMut::new();
    let mut packets = Vec::new();
    for bytes in stream.chunks(piece.max(1)) {
        buffer.extend_from_slice(bytes);
        loop {
            let (missing, capacity) = (decoder.missing_bytes(&buffer), buffer.capacity());
            match decoder.decode(&mut buffer) {
                Ok(Some(packet)) => {
                    assert_eq!(missing, Some(0));
                    packets.push(packet);
                }
                Ok(None) => {
                    assert_ne!(missing, Some(0));
                    assert_eq!(buffer.capacity(), capacity);
                    assert!(buffer.len() + missing.unwrap_or(0) <= MAX_PACKET as usize + MAX_HEADER_BYTES);
                    break;
                }
                Err(violation) => return (packets, Some(violation)),
            }
        }
    }
    (packets, None)
}

/// Writes what both sides may send and reads it again.
fn write_and_read(packet: &Packet, first: &Packet) {
    let Packet::Connect(connect) = first else { panic!("the first packet is CONNECT") };
    let packet_out = match packet {
        Packet::Publish(publish) => Outgoing::Publish(publish),
        Packet::PubAck(ack) => Outgoing::PubAck(ack),
        Packet::PubRec(ack) => Outgoing::PubRec(ack),
        Packet::PubRel(ack) => Outgoing::PubRel(ack),
        Packet::PubComp(ack) => Outgoing::PubComp(ack),
        Packet::Auth(auth) => Outgoing::Auth(auth),
        _ => return,
    };
    let mut written = BytesMut::new();
    // The client's own limits: whatever they are, nothing is written beyond them.
    if Encoder::for_client(connect).encode(packet_out, &mut written).is_ok() {
        let limit = connect.maximum_packet_size.map_or(usize::MAX, |bytes| bytes.get() as usize);
        assert!(written.len() <= limit);
    } else {
        assert!(written.is_empty());
    }
    written.clear();
    Encoder::new(connect.version).encode(packet_out, &mut written).expect("there is no limit");
    // The shortest form may be longer than what was read, never by much.
    let mut decoder = Decoder::new(2 * MAX_PACKET, MAX_CONNECT);
    let hello = if connect.version == Version::V5 { CONNECT_5 } else { CONNECT_311 };
    decoder.decode(&mut BytesMut::from(hello)).expect("a plain CONNECT").expect("as a whole");
    let again = decoder.decode(&mut written).expect("what was read can be read").expect("as a whole");
    assert_eq!(&again, packet);
    if let Packet::Publish(publish) = packet {
        assert_eq!(publish.detached(), Publish::clone(publish));
    }
}
