//! What a device logs: believable lines, reproducible from a seed.
//!
//! Holds: as with readings, the same seed, device and number give the same line, whatever happens to the connections meanwhile; only
//! the times differ. Messages of one kind differ in their varying parts alone, as those of a real program do.

use bytes::Bytes;
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::reading::{Kind, Purpose, Reading, randomness};

/// One line in so many belongs to a request that has a trace id.
const TRACED: f64 = 0.2;

/// Writes the lines of one device.
pub(crate) struct Author {
    rng: ChaCha8Rng,
    seq: u64,
}

/// How much a line matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    Trace,
    Debug,
    /// What devices send unless they are told otherwise.
    #[default]
    Info,
    Warn,
    Error,
    Fatal,
}

impl Level {
    /// Which share of the lines that a device writes is of this level or above.
    pub(crate) fn share(self) -> f64 {
        let of = |least: Self| TEMPLATES.iter().filter(|template| template.1 >= least).map(|template| template.0).sum();
        let (these, all): (u32, u32) = (of(self), of(Self::Trace));
        f64::from(these) / f64::from(all)
    }
}

/// A kind of line: how often of a thousand, its level and target.
struct Template(u32, Level, &'static str, fn(&mut ChaCha8Rng) -> (String, Value));

const TEMPLATES: [Template; 10] = [
    Template(300, Level::Debug, "sensor.temp", |rng| {
        let (celsius, us) = (tenths(rng, -220, 80), rng.random_range(180..2500));
        (format!("read {celsius} °C in {us} us"), json!({ "celsius": celsius, "us": us }))
    }),
    Template(220, Level::Info, "net.mqtt", |rng| {
        let (bytes, ms) = (rng.random_range(90..400), rng.random_range(1..80));
        (format!("published {bytes} bytes, acknowledged after {ms} ms"), json!({ "bytes": bytes, "ms": ms }))
    }),
    Template(150, Level::Info, "power", |rng| {
        let (percent, volts) = (rng.random_range(12..100), tenths(rng, 33, 42));
        (format!("battery at {percent} %"), json!({ "percent": percent, "volts": volts }))
    }),
    Template(110, Level::Info, "door", |rng| {
        let s = rng.random_range(2..240);
        (format!("door was open for {s} s"), json!({ "open_s": s, "alarmed": s > 180 }))
    }),
    Template(90, Level::Warn, "net.wifi", |rng| {
        let (attempt, rssi) = (rng.random_range(1..9), rng.random_range(-92..-70));
        (format!("reconnect {attempt} after beacon loss"), json!({ "attempt": attempt, "rssi": rssi }))
    }),
    Template(60, Level::Warn, "clock", |rng| {
        let ms = rng.random_range(-900..900);
        (format!("drift of {ms} ms corrected"), json!({ "drift_ms": ms }))
    }),
    Template(30, Level::Error, "storage", |rng| {
        let block = rng.random_range(0..65_536);
        (
            format!("write failed at block 0x{block:04x}: no space left on device"),
            json!({ "block": block, "errno": 28 }),
        )
    }),
    Template(25, Level::Error, "net.http", |rng| {
        let (code, ms) = ([500, 502, 503, 504][rng.random_range(0..4_usize)], rng.random_range(40..9000));
        (format!("GET /firmware/manifest answered {code} after {ms} ms"), json!({ "code": code, "ms": ms }))
    }),
    Template(10, Level::Trace, "sensor.bus", |rng| {
        let address = rng.random_range(8..120);
        (format!("i2c: polled 0x{address:02x}"), json!({ "address": address }))
    }),
    Template(5, Level::Fatal, "watchdog", |rng| {
        let ms = rng.random_range(4000..16_000);
        (format!("main loop hung for {ms} ms, restarting"), json!({ "ms": ms, "reset": true }))
    }),
];

fn tenths(rng: &mut ChaCha8Rng, from: i32, to: i32) -> f64 {
    f64::from(rng.random_range(from..to)) / 10.0
}

impl Author {
    pub(crate) fn new(seed: u64, device: u32) -> Self {
        Self { rng: randomness(seed, device, Purpose::Lines), seq: 0 }
    }

    /// The next line, written at `ts_ms`, with its level.
    pub(crate) fn write(&mut self, ts_ms: i64) -> (Level, Reading) {
        self.seq += 1;
        let mut at = self.rng.random_range(0..TEMPLATES.iter().map(|template| template.0).sum::<u32>());
        let template = TEMPLATES.iter().find(|template| {
            let is_it = at < template.0;
            at = at.saturating_sub(template.0);
            is_it
        });
        let Template(_, level, target, text) = template.expect("the number is below their sum");
        let (message, fields) = text(&mut self.rng);
        let mut line = json!({
            "ts": ts_ms, "seq": self.seq, "level": level, "target": target, "message": message, "fields": fields,
        });
        if self.rng.random_bool(TRACED) {
            line["trace_id"] = Value::String(format!("{:032x}", self.rng.random::<u128>()));
        }
        let payload = Bytes::from(line.to_string());
        (*level, Reading { kind: Kind::Line, ts_ms, seq: self.seq, payload, first_sent: None })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn lines(seed: u64, device: u32, count: usize) -> Vec<Value> {
        let mut author = Author::new(seed, device);
        (0..count).map(|_| serde_json::from_slice(&author.write(1_763_692_212_345).1.payload).unwrap()).collect()
    }

    #[test]
    fn the_same_seed_gives_the_same_lines_and_another_gives_others() {
        assert_eq!(lines(7, 3, 50), lines(7, 3, 50));
        assert_ne!(lines(7, 3, 50), lines(7, 4, 50));
        assert_ne!(lines(7, 3, 50), lines(8, 3, 50));
    }

    #[test]
    fn a_device_has_something_to_say_at_every_level() {
        let lines = lines(1, 0, 5000);
        let of = |name: &str| lines.iter().map(|line| line[name].as_str().unwrap()).collect::<BTreeSet<_>>();
        assert_eq!(of("level").len(), 6, "{:?}", of("level"));
        let is_sent = |line: &&Value| !["trace", "debug"].contains(&line["level"].as_str().unwrap());
        let sent = u32::try_from(lines.iter().filter(is_sent).count()).unwrap();
        assert!((f64::from(sent) / 5000.0 - Level::Info.share()).abs() < 0.05, "{sent} of 5000");
        assert_eq!(of("target").len(), TEMPLATES.len());
        assert!(of("message").len() > 1000);
        assert!(lines.iter().enumerate().all(|(nth, line)| line["seq"] == nth + 1));
        assert!(
            lines.iter().any(|line| line["trace_id"].is_string())
                && lines.iter().any(|line| line["trace_id"].is_null())
        );
    }
}
