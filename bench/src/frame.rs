//! MQTT 3.1.1 frames, made by hand: the generator must cost less than what it measures.
//!
//! A PUBLISH of a reading is a template into which packet id, time and number are written, so that every message is a new reading
//! of the same length.

/// Length of the payload of every publish, in bytes.
pub(crate) const PAYLOAD_BYTES: usize = 200;
/// Numbers begin here, so that all have ten digits.
const FIRST_SEQ: u64 = 1_000_000_000;
/// 2001-09-09: times from here to 2286 have 13 digits.
const TS: &str = "1000000000000";

/// What becomes of a session when its connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Session {
    Clean,
    Kept,
}

/// CONNECT that needs no ping for ten minutes.
pub(crate) fn connect(session: Session, client_id: &str, username: &str, password: &str) -> Vec<u8> {
    let flags = if session == Session::Clean { 0b1100_0010 } else { 0b1100_0000 };
    let mut body = vec![0, 4, b'M', b'Q', b'T', b'T', 4, flags];
    body.extend(600_u16.to_be_bytes());
    for field in [client_id, username, password] {
        text(&mut body, field);
    }
    frame(0x10, &body)
}

/// SUBSCRIBE with packet id 1 and quality of service 1.
pub(crate) fn subscribe(filter: &str) -> Vec<u8> {
    let mut body = vec![0, 1];
    text(&mut body, filter);
    body.push(1);
    frame(0x82, &body)
}

/// DISCONNECT.
pub(crate) const GOODBYE: [u8; 2] = [0xE0, 0];

/// PUBLISH of quality of service 1.
pub(crate) fn publish(topic: &str, id: u16, payload: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    text(&mut body, topic);
    body.extend(id.to_be_bytes());
    body.extend(payload);
    frame(0x32, &body)
}

fn text(body: &mut Vec<u8>, text: &str) {
    let length = u16::try_from(text.len()).expect("names are short");
    body.extend(length.to_be_bytes());
    body.extend(text.as_bytes());
}

fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut frame = vec![kind];
    let mut length = body.len();
    loop {
        let low = u8::try_from(length & 0x7f).expect("seven bits");
        length >>= 7;
        frame.push(if length > 0 { low | 0x80 } else { low });
        if length == 0 {
            break;
        }
    }
    frame.extend(body);
    frame
}

/// Readings of one client, one frame after another.
#[derive(Clone)]
pub(crate) struct Publish {
    frame: Vec<u8>,
    id_at: usize,
    ts_at: usize,
    seq_at: usize,
    sent: u64,
}

impl Publish {
    /// Readings of client `index` on `topic`.
    pub(crate) fn new(topic: &str, index: usize) -> Self {
        let mut body = Vec::new();
        text(&mut body, topic);
        let id_in_body = body.len();
        body.extend([0, 0]);
        let payload_in_body = body.len();
        body.extend(payload(index));
        let frame = frame(0x32, &body);
        let shift = frame.len() - body.len();
        let ts_at = shift + payload_in_body + r#"{"ts":"#.len();
        let seq_at = ts_at + TS.len() + r#","seq":"#.len();
        Self { frame, id_at: shift + id_in_body, ts_at, seq_at, sent: 0 }
    }

    /// Appends the next reading, taken at `ts_ms` (13 digits), to `out`.
    pub(crate) fn append(&mut self, out: &mut Vec<u8>, ts_ms: u64) {
        // Packet ids go round from 1 to 60,000: far more than are ever on their way.
        let id = u16::try_from(self.sent % 60_000 + 1).expect("at most 60,000");
        self.frame[self.id_at..self.id_at + 2].copy_from_slice(&id.to_be_bytes());
        digits(&mut self.frame[self.ts_at..self.ts_at + TS.len()], ts_ms);
        digits(&mut self.frame[self.seq_at..self.seq_at + 10], FIRST_SEQ + self.sent);
        self.sent += 1;
        out.extend_from_slice(&self.frame);
    }
}

/// Writes `number` with leading zeros.
fn digits(into: &mut [u8], mut number: u64) {
    for place in into.iter_mut().rev() {
        *place = b'0' + u8::try_from(number % 10).expect("one digit");
        number /= 10;
    }
}

/// A reading with as many values as fit, padded with white space.
fn payload(index: usize) -> Vec<u8> {
    let mut json =
        format!(r#"{{"ts":{TS},"seq":{FIRST_SEQ},"values":{{"temp":{:.2},"door":false"#, (index % 400) as f64 / 10.0);
    let mut channel = 0;
    loop {
        let next = format!(r#","ch{channel:02}":{:.2}"#, 10.0 + (index * 7 + channel * 31) as f64 % 8999.0 / 100.0);
        if json.len() + next.len() + 2 > PAYLOAD_BYTES {
            break;
        }
        json += &next;
        channel += 1;
    }
    json += "}}";
    json += &" ".repeat(PAYLOAD_BYTES - json.len());
    json.into_bytes()
}

/// Packets coming back: only their kinds matter, since a server acknowledges in order.
#[derive(Default)]
pub(crate) struct Incoming {
    /// Bytes of a packet whose end has not come.
    rest: Vec<u8>,
}

impl Incoming {
    /// How many PUBACKs end in `bytes`. A refusal or a closing of the session does not come as a PUBACK in 3.1.1.
    pub(crate) fn pubacks(&mut self, bytes: &[u8]) -> usize {
        if self.rest.is_empty() && bytes.len().is_multiple_of(4) && bytes.chunks_exact(4).all(|p| p[..2] == [0x40, 2]) {
            return bytes.len() / 4;
        }
        self.rest.extend_from_slice(bytes);
        let mut acks = 0;
        let mut at = 0;
        while let Some((kind, length)) = packet(&self.rest[at..]) {
            acks += usize::from(kind == 0x40);
            at += length;
        }
        self.rest.drain(..at);
        acks
    }
}

/// Messages coming to a subscriber of quality of service 1.
#[derive(Default)]
pub(crate) struct Inbox {
    rest: Vec<u8>,
}

impl Inbox {
    /// How many messages end in `bytes`; what acknowledges them is appended to `acks`.
    pub(crate) fn take(&mut self, bytes: &[u8], acks: &mut Vec<u8>) -> usize {
        self.rest.extend_from_slice(bytes);
        let (mut messages, mut at) = (0, 0);
        while let Some((kind, length)) = packet(&self.rest[at..]) {
            let frame = &self.rest[at..at + length];
            at += length;
            if kind & 0xF6 != 0x32 {
                continue;
            }
            // Behind the header is the topic with its length, and behind that the packet id.
            let header = 1 + 1 + frame[1..].iter().take_while(|byte| **byte & 0x80 != 0).count();
            let id = header + 2 + usize::from(u16::from_be_bytes([frame[header], frame[header + 1]]));
            acks.extend([0x40, 2, frame[id], frame[id + 1]]);
            messages += 1;
        }
        self.rest.drain(..at);
        messages
    }
}

/// Kind and length of the first packet, if all of it is there.
fn packet(bytes: &[u8]) -> Option<(u8, usize)> {
    let (kind, rest) = bytes.split_first()?;
    let (mut length, mut shift, mut header) = (0, 0, 1);
    for byte in rest.iter().take(4) {
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        header += 1;
        if byte & 0x80 == 0 {
            return (bytes.len() >= header + length).then_some((*kind, header + length));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_publish_is_a_new_reading_of_the_same_length() {
        for index in [0, 9, 9_999] {
            let mut publish = Publish::new("fleet/v1/main/bench-1/telemetry", index);
            let (mut first, mut second) = (Vec::new(), Vec::new());
            publish.append(&mut first, 1_763_692_212_345);
            publish.append(&mut second, 1_763_692_212_346);
            assert_eq!(first.len(), second.len());
            assert_eq!(packet(&first), Some((0x32, first.len())));
            let payload = |frame: &[u8]| -> serde_json::Value {
                serde_json::from_slice(&frame[frame.len() - PAYLOAD_BYTES..]).unwrap()
            };
            assert_eq!(payload(&first)["ts"], 1_763_692_212_345_u64);
            assert_eq!(payload(&second)["seq"], FIRST_SEQ + 1);
            assert_eq!(payload(&first)["values"].as_object().unwrap().len(), 11);
        }
    }

    #[test]
    fn a_subscriber_acknowledges_each_message_by_its_id() {
        let payload = [b'x'; 300];
        let bytes = [publish("a/b", 258, &payload), vec![0xD0, 0], publish("c", 7, b"")].concat();
        let (mut inbox, mut acks) = (Inbox::default(), Vec::new());
        let (first, second) = bytes.split_at(150);
        assert_eq!((inbox.take(first, &mut acks), inbox.take(second, &mut acks)), (0, 2));
        assert_eq!(acks, [0x40, 2, 1, 2, 0x40, 2, 0, 7]);
    }

    proptest! {
        #[test]
        fn acknowledgements_are_counted_however_they_are_cut(count in 0_usize..40, cuts in prop::collection::vec(1_usize..9, 1..40)) {
            let mut bytes: Vec<u8> = vec![0x90, 3, 0, 1, 1];
            bytes.extend((0..count).flat_map(|_| [0x40, 2, 0, 7]));
            let mut incoming = Incoming::default();
            let (mut found, mut rest, mut cuts) = (0, bytes.as_slice(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (now, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                found += incoming.pubacks(now);
                rest = later;
            }
            prop_assert_eq!(found, count);
        }
    }
}
