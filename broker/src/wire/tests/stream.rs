//! Streams as they come: in pieces, damaged, or of no meaning at all.

use bytes::BytesMut;
use proptest::collection::vec;
use proptest::prelude::*;

use super::super::{Decoder, MAX_HEADER_BYTES, Packet, Version, Violation};
use super::round_trip::{client_packet, connect, version};
use super::{MAX_CONNECT, MAX_PACKET, written};

/// A client's whole conversation.
fn conversation() -> impl Strategy<Value = (Version, Vec<u8>)> {
    version().prop_flat_map(|version| {
        (connect(version), vec(client_packet(version), 0..6)).prop_map(move |(connect, packets)| {
            let mut bytes = written(version, &Packet::Connect(Box::new(connect)));
            for packet in &packets {
                bytes.extend(written(version, packet));
            }
            (version, bytes)
        })
    })
}

/// What a decoder makes of `bytes` when they arrive in pieces that end at `cuts`.
fn read(bytes: &[u8], cuts: &[usize]) -> (Vec<Packet>, Option<Violation>) {
    let mut decoder = Decoder::new(MAX_PACKET, MAX_CONNECT);
    let mut buffer = BytesMut::new();
    let mut packets = Vec::new();
    let mut from = 0;
    for to in cuts.iter().copied().chain([bytes.len()]) {
        buffer.extend_from_slice(&bytes[from..to]);
        from = to;
        loop {
            let missing = decoder.missing_bytes(&buffer);
            let capacity = buffer.capacity();
            match decoder.decode(&mut buffer) {
                Ok(Some(packet)) => {
                    assert_eq!(missing, Some(0));
                    packets.push(packet);
                }
                Ok(None) => {
                    assert_eq!(missing.is_none(), buffer.is_empty());
                    assert!(missing != Some(0), "nothing is missing, and nothing was read");
                    assert_eq!(buffer.capacity(), capacity, "room is the caller's to make");
                    break;
                }
                Err(violation) => return (packets, Some(violation)),
            }
        }
        assert!(buffer.len() <= MAX_PACKET as usize + MAX_HEADER_BYTES, "no more is asked for than a packet");
    }
    (packets, None)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn where_a_stream_is_cut_makes_no_difference((_, bytes) in conversation()) {
        let whole = read(&bytes, &[]);
        prop_assert!(whole.1.is_none(), "{whole:?}");
        for cut in 0..bytes.len().min(400) {
            prop_assert_eq!(&read(&bytes, &[cut]), &whole);
        }
        let each: Vec<usize> = (1..bytes.len()).collect();
        prop_assert_eq!(&read(&bytes, &each), &whole);
    }

    #[test]
    fn a_damaged_stream_is_read_or_refused(
        (_, mut bytes) in conversation(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let each: Vec<usize> = (1..bytes.len()).collect();
        prop_assert_eq!(read(&bytes, &[]), read(&bytes, &each));
    }

    #[test]
    fn any_bytes_behind_a_connect_are_read_or_refused(version in version(), bytes in vec(any::<u8>(), 0..300)) {
        let mut stream = super::plain_connect(version);
        stream.extend(bytes);
        let (packets, _) = read(&stream, &[]);
        prop_assert!(!packets.is_empty());
    }

    #[test]
    fn any_bytes_at_all_are_refused_or_wait(bytes in vec(any::<u8>(), 0..300)) {
        let (packets, violation) = read(&bytes, &[]);
        prop_assert!(violation.is_some() || packets.is_empty() || bytes[0] == 0x10);
    }

    /// Bodies of every kind, with the header in order so that they are looked at.
    #[test]
    fn any_body_is_read_or_refused(version in version(), first in any::<u8>(), body in vec(any::<u8>(), 0..80)) {
        let mut stream = super::plain_connect(version);
        stream.push(first);
        stream.push(u8::try_from(body.len()).unwrap());
        stream.extend(body);
        read(&stream, &[]);
    }
}
