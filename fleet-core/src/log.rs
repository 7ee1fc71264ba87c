//! Logs: the lines that devices write.
//!
//! Lines enter by [`Batch::push`] and are kept by [`prepare`] and [`insert_batch`]. Holds: a line sent twice is stored once (key:
//! device, ts, seq); lines are never edited; no payload, however strange, makes a batch fail. The places of one writer follow the order of
//! its commits, so whoever has read up to a place has missed nothing before it. What a device logs beyond its [`Rate`] is not stored but
//! counted and told ([`suppressed`]). Lines that do not come over MQTT enter as [`Record`]s by an [`intake`].
//! Ignorant of: MQTT, HTTP, users.

mod context;
mod decode;
pub mod feed;
pub mod intake;
mod line;
pub mod pattern;
pub mod query;
mod rate;
pub mod suppressed;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

pub use self::context::{Context, MAX_AROUND, context};
pub use self::line::{Address, Line, Stretch};
pub use self::rate::Rate;
use crate::Result;
use crate::clock::from_ms;
use crate::id::DeviceKey;
use crate::level::Level;
use crate::telemetry::Rejected;

/// The writer of lines that come over HTTP, among [`insert_batch`]'s writers. The broker's are numbered from 0 to 63.
pub const OTLP_WRITER: i16 = 1000;
/// The writer of the server's own log.
pub const SERVER_WRITER: i16 = 1001;

/// Longest message, in bytes; a longer one is cut.
pub const MAX_MESSAGE_BYTES: usize = 32 * 1024;
/// Most fields of a line; more are left out.
pub const MAX_FIELDS: usize = 64;
/// Longest name of a field, in bytes; a field with a longer one is left out.
pub const MAX_FIELD_NAME_BYTES: usize = 128;
/// Most bytes that the fields of a line take as JSON; fields beyond are left out.
pub const MAX_FIELDS_BYTES: usize = 32 * 1024;
/// Longest target and trace id, in bytes; a longer one is cut.
pub const MAX_NAME_BYTES: usize = 256;

/// What a line costs in memory beside its texts.
const LINE_BYTES: usize = 256;
/// How far back a clamped line that comes again is recognised.
const CLAMP_MEMORY_MS: i64 = 7 * 24 * 3_600_000;

/// What of a line was too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cut(i16);

impl Cut {
    const MESSAGE: i16 = 1;
    const FIELDS: i16 = 2;

    fn add(&mut self, what: i16) {
        self.0 |= what;
    }

    /// Text as PostgreSQL takes it, at most `most` bytes; notes `what` when it was longer.
    fn text(&mut self, text: &str, most: usize, what: i16) -> String {
        let room = text.floor_char_boundary(most);
        let mut kept = text[..room].replace('\0', "\u{fffd}");
        let whole = kept.len();
        // What stands for U+0000 is longer.
        kept.truncate(kept.floor_char_boundary(most));
        if room < text.len() || kept.len() < whole {
            self.add(what);
        }
        kept
    }

    /// Whether anything was.
    pub fn is_any(self) -> bool {
        self.0 != 0
    }

    /// What it was: `message` (or a name in it), `fields`.
    pub fn names(self) -> Vec<&'static str> {
        let all = [(Self::MESSAGE, "message"), (Self::FIELDS, "fields")];
        all.into_iter().filter(|(bit, _)| self.0 & bit != 0).map(|(_, name)| name).collect()
    }
}

/// What one message may hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Lines in a message.
    pub max_lines: usize,
    /// How far a device's clock may run ahead, in milliseconds, before its line gets the time of receipt.
    pub max_ahead_ms: i64,
}

/// Lines on their way into the database, as columns.
#[derive(Debug, Default)]
pub struct Batch {
    device: Vec<i64>,
    ts_ms: Vec<i64>,
    seq: Vec<i64>,
    received_ms: Vec<i64>,
    level: Vec<i16>,
    target: Vec<Option<String>>,
    message: Vec<String>,
    trace: Vec<Option<String>>,
    fields: Vec<Option<String>>,
    cut: Vec<i16>,
    /// The device's own time where it ran ahead.
    sent_at_ms: Vec<Option<i64>>,
    /// Lines left out by device, because it logs more than it may.
    suppressed: BTreeMap<i64, i64>,
}

/// A line of a [`Batch`], as it will be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Row<'a> {
    /// When it was written, in milliseconds since the epoch; that of receipt where its clock ran ahead.
    pub ts_ms: i64,
    /// Its number, or a negative one that stands in for it.
    pub seq: i64,
    /// How much it matters, as a number.
    pub level: i16,
    /// The part of the program that wrote it.
    pub target: Option<&'a str>,
    /// What it says.
    pub message: &'a str,
    /// What it belongs to.
    pub trace: Option<&'a str>,
    /// What else it says, as a JSON object.
    pub fields: Option<&'a str>,
    /// What of it was too much.
    pub cut: Cut,
    /// The device's own time where it ran ahead.
    pub sent_at_ms: Option<i64>,
}

/// A line whose parts are known one by one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// When it was written, in milliseconds since the epoch.
    pub ts_ms: Option<i64>,
    /// How much it matters.
    pub level: Level,
    /// The part of the program that wrote it.
    pub target: Option<String>,
    /// What it says.
    pub message: String,
    /// What it belongs to.
    pub trace: Option<String>,
    /// What else is known; of too many, the first are kept.
    pub fields: Vec<(String, Value)>,
    /// Tells it from one that is equal in all else.
    pub told_apart_by: i64,
}

impl Record {
    /// About what it takes in memory.
    pub fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let fields = self.fields.iter().map(|(name, value)| 64 + name.len() + weight(value)).sum::<usize>();
        LINE_BYTES + self.message.len() + text(&self.target) + text(&self.trace) + fields
    }
}

fn weight(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len(),
        Value::Array(values) => values.iter().map(|value| 32 + weight(value)).sum(),
        Value::Object(members) => members.iter().map(|(name, value)| 64 + name.len() + weight(value)).sum(),
        Value::Null | Value::Bool(_) | Value::Number(_) => 0,
    }
}

impl Batch {
    /// Lines held.
    pub fn len(&self) -> usize {
        self.device.len()
    }

    /// Whether there is nothing to store.
    pub fn is_empty(&self) -> bool {
        self.device.is_empty()
    }

    /// The lines, in the order in which they came.
    pub fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        (0..self.len()).map(|nth| Row {
            ts_ms: self.ts_ms[nth],
            seq: self.seq[nth],
            level: self.level[nth],
            target: self.target[nth].as_deref(),
            message: &self.message[nth],
            trace: self.trace[nth].as_deref(),
            fields: self.fields[nth].as_deref(),
            cut: Cut(self.cut[nth]),
            sent_at_ms: self.sent_at_ms[nth],
        })
    }

    /// Lines whose clock ran ahead and that got the time of receipt instead.
    pub fn clamped(&self) -> usize {
        self.sent_at_ms.iter().flatten().count()
    }

    /// Lines of which something was cut.
    pub fn cut(&self) -> usize {
        self.cut.iter().filter(|cut| **cut != 0).count()
    }

    /// Lines left out because their devices log more than they may.
    pub fn suppressed(&self) -> u64 {
        self.suppressed.values().map(|lines| lines.unsigned_abs()).sum()
    }

    /// Decodes one message, received at `received_ms`. The good lines are appended; what could not be read comes back, each with its
    /// reason.
    pub fn push(&mut self, device: DeviceKey, payload: &[u8], received_ms: i64, limits: &Limits) -> Vec<Rejected> {
        self.push_within(device, payload, received_ms, limits, &mut Rate::off())
    }

    /// As [`Batch::push`]; lines beyond the rate are left out and counted.
    pub fn push_within(
        &mut self,
        device: DeviceKey,
        payload: &[u8],
        received_ms: i64,
        limits: &Limits,
        rate: &mut Rate,
    ) -> Vec<Rejected> {
        let mut rejected = Vec::new();
        for (nth, line) in decode::lines(payload, limits.max_lines).into_iter().enumerate() {
            match line {
                Ok(line) if rate.take(device.0, received_ms) => {
                    self.push_one(device, line, nth, received_ms, limits.max_ahead_ms);
                }
                Ok(_) => *self.suppressed.entry(device.0).or_default() += 1,
                Err(bad) => rejected.push(bad),
            }
        }
        rejected
    }

    /// Appends a line that is known part by part; what is too much of it is cut.
    pub fn push_record(&mut self, device: DeviceKey, record: Record, received_ms: i64, max_ahead_ms: i64) {
        self.push_record_within(device, record, received_ms, max_ahead_ms, &mut Rate::off());
    }

    /// As [`Batch::push_record`]; a line beyond the rate is left out and counted.
    pub fn push_record_within(
        &mut self,
        device: DeviceKey,
        record: Record,
        received_ms: i64,
        max_ahead_ms: i64,
        rate: &mut Rate,
    ) {
        if rate.take(device.0, received_ms) {
            self.push_one(device, decode::Line::from(record), 0, received_ms, max_ahead_ms);
        } else {
            *self.suppressed.entry(device.0).or_default() += 1;
        }
    }

    fn push_one(&mut self, device: DeviceKey, line: decode::Line, nth: usize, received_ms: i64, max_ahead_ms: i64) {
        let ahead = line.ts.filter(|ts| *ts > received_ms.saturating_add(max_ahead_ms));
        let fields = (!line.fields.is_empty()).then(|| serde_json::Value::Object(line.fields.clone()).to_string());
        self.seq.push(line.seq.unwrap_or_else(|| stand_in(&line, fields.as_deref(), ahead, nth)));
        self.device.push(device.0);
        self.ts_ms.push(if ahead.is_some() { received_ms } else { line.ts.unwrap_or(received_ms) });
        self.received_ms.push(received_ms);
        self.level.push(line.level.number());
        self.target.push(line.target);
        self.message.push(line.message);
        self.trace.push(line.trace);
        self.fields.push(fields);
        self.cut.push(line.cut.0);
        self.sent_at_ms.push(ahead);
    }
}

/// A negative number that stands in for a sequence number that was not sent: a hash of all that tells a line from another one of the
/// same device and time. Stable across versions: redelivery may follow an update of the server.
fn stand_in(line: &decode::Line, fields: Option<&str>, ahead: Option<i64>, nth: usize) -> i64 {
    let told_apart_by = match (ahead, line.ts) {
        (Some(sent_at), _) => sent_at,
        (None, Some(_)) => 0,
        // Without a time of their own, equal lines of a message would fall into one.
        (None, None) => i64::try_from(nth).unwrap_or(i64::MAX),
    };
    let mut hash = Sha256::new();
    let texts = [line.target.as_deref(), Some(&*line.message), line.trace.as_deref(), fields];
    for text in texts {
        let text = text.unwrap_or_default();
        hash.update((text.len() as u64).to_le_bytes());
        hash.update(text);
    }
    hash.update(line.level.number().to_le_bytes());
    hash.update(told_apart_by.to_le_bytes());
    if line.told_apart_by != 0 {
        hash.update(line.told_apart_by.to_le_bytes());
    }
    let digest = hash.finalize();
    let bits: [u8; 8] = digest[..8].try_into().expect("32 bytes hold 8");
    i64::from_le_bytes(bits) | i64::MIN
}

/// Readies a batch for [`insert_batch`]: gives clamped lines that were received before the time of their first receipt.
pub async fn prepare(db: &mut PgConnection, batch: &mut Batch) -> Result<()> {
    let clamped =
        (0..batch.len()).filter_map(|row| batch.sent_at_ms[row].map(|sent_at| (row, sent_at))).collect::<Vec<_>>();
    if clamped.is_empty() {
        return Ok(());
    }
    let device = clamped.iter().map(|(row, _)| batch.device[*row]).collect::<Vec<_>>();
    let seq = clamped.iter().map(|(row, _)| batch.seq[*row]).collect::<Vec<_>>();
    let sent_at = clamped.iter().map(|(_, sent_at)| from_ms(*sent_at)).collect::<Vec<_>>();
    let newest = clamped.iter().map(|(row, _)| batch.received_ms[*row]).max().unwrap_or_default();
    // `offset 0` keeps the order from being asked of the key: along it, a device's whole week would be searched.
    let known = sqlx::query!(
        r#"
        select u.nth as "nth!", first.ts as "ts!"
          from unnest($1::bigint[], $2::bigint[], $3::timestamptz[]) with ordinality as u (device, seq, sent_at, nth)
    cross join lateral (
               select min(known.ts) as ts from (
               select l.ts from log l
                where l.device_key = u.device and l.sent_at = u.sent_at and l.seq = u.seq and l.ts >= $4
                  and l.sent_at is not null
               offset 0) known) first
         where first.ts is not null
        "#,
        &device,
        &seq,
        &sent_at as &[DateTime<Utc>],
        from_ms(newest - CLAMP_MEMORY_MS),
    )
    .fetch_all(db)
    .await?;
    let mut first = HashMap::new();
    for found in known {
        let nth = usize::try_from(found.nth - 1).expect("ordinality counts from 1");
        first.insert((device[nth], seq[nth], clamped[nth].1), found.ts.timestamp_millis());
    }
    for (row, sent_at) in clamped {
        let key = (batch.device[row], batch.seq[row], sent_at);
        batch.ts_ms[row] = *first.entry(key).or_insert(batch.ts_ms[row]);
    }
    Ok(())
}

/// Stores a prepared batch in one statement; returns how many lines were new. The rest were there already.
///
/// The lock on the writer's row is held until the commit, so places become visible in their order.
pub async fn insert_batch(db: &mut PgConnection, writer: i16, batch: &Batch) -> Result<u64> {
    if batch.is_empty() {
        return Ok(0);
    }
    let ts = batch.ts_ms.iter().map(|ms| from_ms(*ms)).collect::<Vec<_>>();
    let sent_at = batch.sent_at_ms.iter().map(|ms| ms.map(from_ms)).collect::<Vec<_>>();
    let count = i64::try_from(batch.len()).expect("batches are bounded");
    let stored = sqlx::query!(
        "
          with moved as (
        insert into log_writer as w (writer, last) values ($1, $2)
            on conflict (writer) do update set last = w.last + $2
     returning last - $2 as before)
        insert into log (device_key, ts, seq, writer, place, level, target, message, trace_id, fields, cut, sent_at)
        select u.device, u.ts, u.seq, $1, moved.before + u.nth, u.level, u.target, u.message, u.trace, u.fields::jsonb, u.cut,
               u.sent_at
          from moved,
               unnest($3::bigint[], $4::timestamptz[], $5::bigint[], $6::smallint[], $7::text[], $8::text[], $9::text[],
                      $10::text[], $11::smallint[], $12::timestamptz[]) with ordinality
            as u (device, ts, seq, level, target, message, trace, fields, cut, sent_at, nth)
   on conflict do nothing
        ",
        writer,
        count,
        &batch.device,
        &ts,
        &batch.seq,
        &batch.level,
        &batch.target as &[Option<String>],
        &batch.message,
        &batch.trace as &[Option<String>],
        &batch.fields as &[Option<String>],
        &batch.cut,
        &sent_at as &[Option<DateTime<Utc>>],
    )
    .execute(db)
    .await?;
    Ok(stored.rows_affected())
}
