//! What a device measures: believable values, reproducible from a seed.
//!
//! Holds: the same seed, device and sequence number give the same values on every machine and in every run, whatever
//! happens to the connections meanwhile. Only the time stamps differ.

use std::fmt::Write as _;
use std::time::Instant;

use bytes::Bytes;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

/// Most extra channels in a reading; the server's default limit is 256 values.
const MAX_CHANNELS: usize = 200;
/// About what a reading takes before any extra channel, in bytes.
const BASE_BYTES: usize = 105;
/// About what an extra channel takes, in bytes.
const CHANNEL_BYTES: usize = 14;

/// The random numbers of one device for one purpose: independent of all others of the same run.
pub(crate) fn randomness(seed: u64, device: u32, purpose: Purpose) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8] = purpose as u8;
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(u64::from(device));
    rng
}

/// What random numbers are for. Values must not depend on how often a connection broke.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Purpose {
    Values = 0,
    Faults = 1,
    Lines = 2,
}

/// What a device sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A reading.
    Reading,
    /// A log line.
    Line,
    /// A log line once more, for the upload of that number.
    Uploaded(u64),
}

/// One reading or log line, kept as it goes over the wire so that sending it again sends the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reading {
    pub(crate) kind: Kind,
    /// Device time, in ms since the epoch.
    pub(crate) ts_ms: i64,
    /// Number since boot, from 1; each kind counts by itself.
    pub(crate) seq: u64,
    pub(crate) payload: Bytes,
    /// When it was first handed to the network.
    pub(crate) first_sent: Option<Instant>,
}

/// A freezer somewhere: its temperature drifts, its battery drains, its door is opened now and then.
pub(crate) struct Sampler {
    rng: ChaCha8Rng,
    payload_bytes: usize,
    seq: u64,
    base: f64,
    temp: f64,
    battery: f64,
    door: bool,
    rssi: f64,
    channels: Vec<f64>,
}

impl Sampler {
    pub(crate) fn new(seed: u64, device: u32, payload_bytes: usize) -> Self {
        let mut rng = randomness(seed, device, Purpose::Values);
        let base = rng.random_range(-22.0..8.0);
        let battery = rng.random_range(60.0..100.0);
        let rssi = rng.random_range(-85.0..-50.0);
        let channels = (payload_bytes.saturating_sub(BASE_BYTES) / CHANNEL_BYTES).min(MAX_CHANNELS);
        let channels = (0..channels).map(|_| rng.random_range(0.0..100.0)).collect();
        Self { rng, payload_bytes, seq: 0, base, temp: base, battery, door: false, rssi, channels }
    }

    /// The next reading, taken at `ts_ms`.
    pub(crate) fn take(&mut self, ts_ms: i64) -> Reading {
        self.seq += 1;
        self.drift();
        Reading { kind: Kind::Reading, ts_ms, seq: self.seq, payload: self.print(ts_ms), first_sent: None }
    }

    fn drift(&mut self) {
        let rng = &mut self.rng;
        self.door = if self.door { rng.random_bool(0.7) } else { rng.random_bool(0.01) };
        let target = if self.door { self.base + 15.0 } else { self.base };
        self.temp += (target - self.temp) * 0.05 + rng.random_range(-0.2..0.2);
        self.battery = (self.battery - rng.random_range(0.0..0.002)).max(0.0);
        self.rssi = (self.rssi + rng.random_range(-1.5..1.5)).clamp(-100.0, -40.0);
        for channel in &mut self.channels {
            *channel = (*channel + rng.random_range(-1.0..1.0)).clamp(0.0, 99.99);
        }
    }

    /// JSON of the wanted length: extra channels take most of it, white space the rest. Every reading of a run has
    /// the same names, as those of a real fleet have.
    fn print(&self, ts_ms: i64) -> Bytes {
        let mut json = String::with_capacity(self.payload_bytes.max(BASE_BYTES + 16));
        let (seq, temp, battery, door, rssi) = (self.seq, self.temp, self.battery, self.door, self.rssi);
        let mut write = |text: std::fmt::Arguments<'_>| json.write_fmt(text).expect("a String takes any text");
        write(format_args!(
            r#"{{"ts":{ts_ms},"seq":{seq},"values":{{"temp":{temp:.2},"battery":{battery:.1},"door":{door},"rssi":{rssi:.0}"#
        ));
        for (index, value) in self.channels.iter().enumerate() {
            write(format_args!(r#","ch{index:03}":{value:.2}"#));
        }
        write(format_args!("}}}}"));
        while json.len() < self.payload_bytes {
            json.push(' ');
        }
        Bytes::from(json)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_values_and_another_gives_others() {
        let run = |seed, device| {
            let mut sampler = Sampler::new(seed, device, 200);
            (0..50).map(|i| sampler.take(i).payload).collect::<Vec<_>>()
        };
        assert_eq!(run(7, 3), run(7, 3));
        assert_ne!(run(7, 3), run(7, 4));
        assert_ne!(run(7, 3), run(8, 3));
    }

    #[test]
    fn values_are_the_same_on_every_machine() {
        let payload = Sampler::new(42, 0, 0).take(1_763_692_212_345).payload;
        assert_eq!(
            std::str::from_utf8(&payload).unwrap(),
            r#"{"ts":1763692212345,"seq":1,"values":{"temp":-11.42,"battery":71.4,"door":false,"rssi":-68}}"#
        );
    }

    proptest! {
        #[test]
        fn every_reading_is_json_of_the_wanted_length(seed: u64, device: u32, bytes in 0_usize..4000) {
            let mut sampler = Sampler::new(seed, device, bytes);
            for ts in 1_763_692_212_345..1_763_692_212_350 {
                let reading = sampler.take(ts);
                let json: serde_json::Value = serde_json::from_slice(&reading.payload).unwrap();
                prop_assert_eq!(&json["ts"], &serde_json::json!(ts));
                prop_assert_eq!(&json["seq"], &serde_json::json!(reading.seq));
                prop_assert!(json["values"]["temp"].is_number());
                prop_assert!(json["values"].as_object().unwrap().len() <= 256);
                prop_assert!(reading.payload.len() == bytes.max(reading.payload.len()));
                prop_assert!(reading.payload.len() <= bytes.max(BASE_BYTES));
            }
        }
    }
}
