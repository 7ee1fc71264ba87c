//! The lines of the benchmark: what a fleet of boilers, freezers and kiosks might write, the same in every run.

use std::fmt::Write as _;

/// Devices that write.
pub(crate) const DEVICES: usize = 10_000;

/// Messages, with how many lines of a thousand have them; `{}` is a number.
const MESSAGES: &[(usize, &str, &str, &str)] = &[
    (240, "debug", "net.wifi", "connection kept alive, signal {} dBm, round trip {} ms"),
    (190, "info", "mqtt.session", "connection to broker accepted after {} ms"),
    (180, "info", "sensor.loop", "cycle {} took {} us, next in {} ms"),
    (150, "debug", "storage", "wrote {} bytes to journal segment {}"),
    (100, "info", "control", "compressor set point moved to {} after {} s of defrost"),
    (70, "warn", "net.wifi", "reconnect {} because the access point went away"),
    (50, "warn", "sensor.door", "door open for {} s, temperature {} above limit"),
    (15, "error", "control", "valve {} does not answer, request timeout after {} ms"),
    (4, "error", "storage", "journal segment {} is damaged at offset {}"),
    (1, "fatal", "power", "brownout: voltage {} mV, shutting down"),
];

/// Numbers that look random and are the same in every run (SplitMix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, most: u64) -> u64 {
        self.next() % most
    }
}

/// The `nth` line, as a device sends it: which device, and the payload.
pub(crate) fn line(nth: usize, ts_ms: i64, payload: &mut String) -> usize {
    let mut numbers = Numbers(nth as u64);
    let mut place = usize::try_from(numbers.below(1000)).expect("below 1000");
    let (_, level, target, message) = MESSAGES
        .iter()
        .find(|(share, ..)| {
            let is_it = place < *share;
            place = place.saturating_sub(*share);
            is_it
        })
        .expect("the shares add up to 1000");
    payload.clear();
    let seq = nth + 1;
    write!(payload, r#"{{"ts":{ts_ms},"seq":{seq},"level":"{level}","target":"{target}","message":""#)
        .expect("a String");
    for (part, text) in message.split("{}").enumerate() {
        if part > 0 {
            write!(payload, "{}", numbers.below(5000)).expect("a String");
        }
        payload.push_str(text);
    }
    write!(payload, r#"","fields":{{"rssi":-{},"code":{}}}}}"#, 30 + numbers.below(60), numbers.below(40))
        .expect("a String");
    usize::try_from(numbers.below(DEVICES as u64)).expect("few devices")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A word of nearly half of all lines, and one of a line in a thousand.
    const WORDS: [&str; 2] = ["connection", "brownout"];

    #[test]
    fn lines_are_json_and_have_their_shares() {
        assert_eq!(MESSAGES.iter().map(|(share, ..)| share).sum::<usize>(), 1000);
        let mut payload = String::new();
        let mut has = [0; 2];
        for nth in 0..20_000 {
            assert!(line(nth, 1_700_000_000_000, &mut payload) < DEVICES);
            let read: serde_json::Value = serde_json::from_str(&payload).unwrap();
            for (word, has) in WORDS.iter().zip(&mut has) {
                *has += usize::from(read["message"].as_str().unwrap().contains(word));
            }
        }
        assert!((8_000..9_300).contains(&has[0]) && (5..50).contains(&has[1]), "{has:?}");
    }
}
