//! Telemetry: what devices say about themselves.
//!
//! Readings enter by [`Batch::push`], are kept by [`prepare`] and [`insert_batch`], leave by [`points`] and
//! [`buckets`].
//! Holds: a reading sent twice is stored once (key: device, ts, seq); readings are never edited; no payload, however
//! strange, makes a batch fail.
//! Ignorant of: MQTT, HTTP, users.
//! Why batches: one statement a flush keeps the broker ahead of PostgreSQL. Why shapes: ADR 3.

mod decode;
#[cfg(test)]
pub(crate) mod fixture;
mod series;
mod shape;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::Result;
use crate::clock::from_ms;
use crate::id::{DeviceKey, TenantKey};

pub use self::decode::{MAX_METRIC_NAME_BYTES, MAX_VALUE_DEPTH};
pub use self::series::{Bucket, MAX_BUCKETED, MAX_BUCKETS, MAX_POINTS, Order, Point, Query, buckets, points};
pub(crate) use self::series::{metrics_of, number};
use self::shape::Interner;
pub use self::shape::Shapes;
pub(crate) use self::shape::{Kind, NO_SHAPE, Shape};

/// Latest `ts` that is read, 9999-12-31: what lies beyond is seconds' or microseconds' mistake, not a time.
pub const MAX_TS_MS: i64 = 253_402_300_799_999;

/// Most that the values of one reading which are neither numbers nor booleans may take, in bytes of JSON.
pub const MAX_REST_BYTES: usize = 1024 * 1024;

/// How far back a clamped reading that comes again is recognised.
const CLAMP_MEMORY_MS: i64 = 7 * 24 * 3_600_000;

/// Numbers whose space a batch keeps when it is cleared.
const KEPT_CAPACITY: usize = 64 * 1024;

/// What one message may hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Readings in a message.
    pub max_readings: usize,
    /// Metrics in a reading.
    pub max_metrics: usize,
    /// How far a device's clock may run ahead, in milliseconds, before its reading gets the time of receipt.
    pub max_ahead_ms: i64,
}

/// What could not be read: a message, or one element of an array.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// What was expected, for whoever wrote the device's software.
    pub reason: String,
    /// The message or the element, as it came.
    pub payload: Vec<u8>,
}

/// Readings on their way into the database, as columns. Use it again after [`Batch::clear`]: it keeps its space.
#[derive(Debug, Default)]
pub struct Batch {
    device: Vec<i64>,
    ts_ms: Vec<i64>,
    seq: Vec<i64>,
    received_ms: Vec<i64>,
    /// Which of the interned shapes, or [`NO_SHAPE`].
    shape: Vec<u32>,
    /// The shape's row; filled by [`prepare`].
    shape_id: Vec<i32>,
    /// Where a reading's numbers lie in `nums`.
    start: Vec<i32>,
    count: Vec<i32>,
    nums: Vec<f64>,
    /// Readings with values that are not numbers or booleans, in order: row, canonical JSON.
    rest: Vec<(usize, String)>,
    /// Readings whose clock ran ahead, in order: row, the device's own time in ms.
    sent_at: Vec<(usize, i64)>,
    interner: Interner,
    reading: decode::Reading,
    scratch: Vec<f64>,
}

/// One reading of a batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Row<'a> {
    pub(crate) device: DeviceKey,
    pub(crate) ts_ms: i64,
    pub(crate) seq: i64,
    pub(crate) received_ms: i64,
    pub(crate) clamped: bool,
    pub(crate) shape: Option<&'a Arc<Shape>>,
    pub(crate) nums: &'a [f64],
    /// An object, canonical JSON.
    pub(crate) rest: Option<&'a str>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Forgets the readings, keeps the space (as long as it is not excessive).
    pub fn clear(&mut self) {
        for column in [&mut self.device, &mut self.ts_ms, &mut self.seq, &mut self.received_ms] {
            column.clear();
            column.shrink_to(KEPT_CAPACITY);
        }
        for column in [&mut self.start, &mut self.count, &mut self.shape_id] {
            column.clear();
            column.shrink_to(KEPT_CAPACITY);
        }
        self.shape.clear();
        self.nums.clear();
        self.nums.shrink_to(KEPT_CAPACITY);
        self.rest = Vec::new();
        self.sent_at.clear();
        self.interner.trim();
    }

    /// Readings held.
    pub fn len(&self) -> usize {
        self.device.len()
    }

    /// Whether there is nothing to store.
    pub fn is_empty(&self) -> bool {
        self.device.is_empty()
    }

    /// Readings whose clock ran ahead and that got the time of receipt instead.
    pub fn clamped(&self) -> usize {
        self.sent_at.len()
    }

    /// Decodes one message, an object or an array of objects, received at `received_ms`. The good readings are
    /// appended; what could not be read comes back, each with its reason.
    pub fn push(
        &mut self,
        tenant: TenantKey,
        device: DeviceKey,
        payload: &[u8],
        received_ms: i64,
        limits: &Limits,
    ) -> Vec<Rejected> {
        let rejected = |reason, payload: &[u8]| Rejected { reason, payload: payload.to_vec() };
        if payload.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'[') {
            return match self.push_one(tenant, device, payload, received_ms, limits, 0) {
                Ok(()) => Vec::new(),
                Err(reason) => vec![rejected(reason, payload)],
            };
        }
        match decode::elements(payload, limits.max_readings) {
            Ok(elements) => elements
                .into_iter()
                .enumerate()
                .filter_map(|(nth, element)| {
                    let reason = self.push_one(tenant, device, element, received_ms, limits, nth).err()?;
                    Some(rejected(reason, element))
                })
                .collect(),
            Err(reason) => vec![rejected(reason, payload)],
        }
    }

    fn push_one(
        &mut self,
        tenant: TenantKey,
        device: DeviceKey,
        payload: &[u8],
        received_ms: i64,
        limits: &Limits,
        nth: usize,
    ) -> Result<(), String> {
        self.reading.decode(payload, limits)?;
        let rest = rest_of(&mut self.reading)?;
        let row = self.device.len();
        let start = self.nums.len();
        self.scratch.clear();
        let shape = self.interner.shape_of(tenant, &self.reading, &mut self.scratch);
        match shape {
            Some(shape) => self.nums.extend(self.interner.order(shape).iter().map(|&from| self.scratch[from as usize])),
            None => debug_assert!(self.scratch.is_empty(), "numbers have a shape"),
        }
        let ahead = self.reading.ts.filter(|ts| *ts > received_ms.saturating_add(limits.max_ahead_ms));
        let seq = self.reading.seq.unwrap_or_else(|| {
            let told_apart_by = match (ahead, self.reading.ts) {
                (Some(sent_at), _) => sent_at,
                (None, Some(_)) => 0,
                // Without a time of their own, equal elements of an array would fall into one.
                (None, None) => i64::try_from(nth).unwrap_or(i64::MAX),
            };
            let digest = shape.map_or([0; 32], |shape| self.interner.get(shape).digest);
            stand_in(&digest, &self.nums[start..], rest.as_deref(), told_apart_by)
        });
        self.device.push(device.0);
        self.ts_ms.push(if ahead.is_some() { received_ms } else { self.reading.ts.unwrap_or(received_ms) });
        self.seq.push(seq);
        self.received_ms.push(received_ms);
        self.shape.push(shape.unwrap_or(NO_SHAPE));
        self.start.push(narrow(start));
        self.count.push(narrow(self.nums.len() - start));
        self.rest.extend(rest.map(|rest| (row, rest)));
        self.sent_at.extend(ahead.map(|sent_at| (row, sent_at)));
        Ok(())
    }

    /// The readings, for those who follow what was committed.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let (mut rest, mut sent_at) = (self.rest.iter().peekable(), self.sent_at.iter().peekable());
        (0..self.len()).map(move |row| Row {
            device: DeviceKey(self.device[row]),
            ts_ms: self.ts_ms[row],
            seq: self.seq[row],
            received_ms: self.received_ms[row],
            clamped: sent_at.next_if(|(at, _)| *at == row).is_some(),
            shape: (self.shape[row] != NO_SHAPE).then(|| self.interner.get(self.shape[row])),
            nums: self.nums_of(row),
            rest: rest.next_if(|(at, _)| *at == row).map(|(_, text)| text.as_str()),
        })
    }

    fn nums_of(&self, row: usize) -> &[f64] {
        let (start, count) = (self.start[row], self.count[row]);
        &self.nums[wide(start)..wide(start) + wide(count)]
    }
}

fn narrow(index: usize) -> i32 {
    i32::try_from(index).expect("batches are bounded in bytes, far below 2^31 numbers")
}

fn wide(index: i32) -> usize {
    usize::try_from(index).expect("made from a usize")
}

/// The values that are neither numbers nor booleans, as a canonical JSON object; `None` when there are none.
/// Also drops what a later member of the same name replaced, across the two kinds.
fn rest_of(reading: &mut decode::Reading) -> Result<Option<String>, String> {
    let Some(rest) = reading.take_rest() else { return Ok(None) };
    let mut text = String::new();
    decode::write_object(&mut text, rest.iter(), decode::write_canonical);
    if text.len() > MAX_REST_BYTES {
        return Err(format!("texts, arrays and objects of one reading take more than {MAX_REST_BYTES} bytes"));
    }
    Ok((!rest.is_empty()).then_some(text))
}

/// A negative number that stands in for a sequence number that was not sent: a hash of all that tells a reading from
/// another one of the same device and time. Stable across versions: redelivery may follow an update of the server.
fn stand_in(shape: &[u8; 32], nums: &[f64], rest: Option<&str>, told_apart_by: i64) -> i64 {
    let mut hash = Sha256::new();
    hash.update(shape);
    for number in nums {
        hash.update(number.to_le_bytes());
    }
    hash.update(rest.unwrap_or_default());
    hash.update(told_apart_by.to_le_bytes());
    let digest = hash.finalize();
    let bits: [u8; 8] = digest[..8].try_into().expect("32 bytes hold 8");
    i64::from_le_bytes(bits) | i64::MIN
}

/// Readies a batch for [`insert_batch`]: finds or makes the rows of its shapes, and gives clamped readings that were
/// received before the time of their first receipt. A second call does no harm.
///
/// Call it outside the batch's transaction: a shape must not vanish with a rollback while its id is remembered.
pub async fn prepare(db: &mut PgConnection, shapes: &mut Shapes, batch: &mut Batch) -> Result<()> {
    shapes.resolve(db, batch).await?;
    if !batch.sent_at.is_empty() {
        recall_clamped(db, batch).await?;
    }
    Ok(())
}

/// Gives each clamped reading the time of its first receipt, from the database or from earlier in the batch.
async fn recall_clamped(db: &mut PgConnection, batch: &mut Batch) -> Result<()> {
    let mut device = Vec::with_capacity(batch.sent_at.len());
    let mut seq = Vec::with_capacity(batch.sent_at.len());
    let mut sent_at = Vec::with_capacity(batch.sent_at.len());
    for (row, sent_at_ms) in &batch.sent_at {
        device.push(batch.device[*row]);
        seq.push(batch.seq[*row]);
        sent_at.push(from_ms(*sent_at_ms));
    }
    let newest = batch.sent_at.iter().map(|(row, _)| batch.received_ms[*row]).max().unwrap_or_default();
    // `offset 0` keeps the order from being asked of the key: along it, a device's whole week would be searched.
    let known = sqlx::query!(
        r#"
        select u.nth as "nth!", first.ts as "ts!"
          from unnest($1::bigint[], $2::bigint[], $3::timestamptz[]) with ordinality as u (device, seq, sent_at, nth)
    cross join lateral (
               select min(known.ts) as ts from (
               select t.ts from telemetry t
                where t.device_key = u.device and t.sent_at = u.sent_at and t.seq = u.seq and t.ts >= $4
                  and t.sent_at is not null
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
    let mut first = std::collections::HashMap::new();
    for found in known {
        let nth = usize::try_from(found.nth - 1).expect("ordinality counts from 1");
        first.insert((device[nth], seq[nth], batch.sent_at[nth].1), found.ts.timestamp_millis());
    }
    for (row, sent_at_ms) in &batch.sent_at {
        let key = (batch.device[*row], batch.seq[*row], *sent_at_ms);
        batch.ts_ms[*row] = *first.entry(key).or_insert(batch.ts_ms[*row]);
    }
    Ok(())
}

/// Stores a prepared batch in one statement; returns how many readings were new. The rest were there already.
pub async fn insert_batch(db: &mut PgConnection, batch: &Batch) -> Result<u64> {
    if batch.is_empty() {
        return Ok(0);
    }
    let ts: Vec<_> = batch.ts_ms.iter().map(|ms| from_ms(*ms)).collect();
    // UNNEST fills a shorter array up with nulls, so the rare columns end at their last value, or are empty.
    let mut rest = vec![None; batch.rest.last().map_or(0, |(row, _)| row + 1)];
    for (row, text) in &batch.rest {
        rest[*row] = Some(text.as_str());
    }
    let mut sent_at = vec![None; batch.sent_at.last().map_or(0, |(row, _)| row + 1)];
    for (row, ms) in &batch.sent_at {
        sent_at[*row] = Some(from_ms(*ms));
    }
    let stored = sqlx::query!(
        "
        insert into telemetry (device_key, ts, seq, shape_id, nums, rest, sent_at)
        select u.device, u.ts, u.seq, u.shape, ($5::float8[])[u.start + 1 : u.start + u.count], u.rest::jsonb, u.sent_at
          from unnest($1::bigint[], $2::timestamptz[], $3::bigint[], $4::integer[], $6::integer[], $7::integer[],
                      $8::text[], $9::timestamptz[])
            as u (device, ts, seq, shape, start, count, rest, sent_at)
   on conflict do nothing
        ",
        &batch.device,
        &ts,
        &batch.seq,
        &batch.shape_id,
        &batch.nums,
        &batch.start,
        &batch.count,
        &rest as &[Option<&str>],
        &sent_at as &[Option<DateTime<Utc>>],
    )
    .execute(db)
    .await?;
    Ok(stored.rows_affected())
}
