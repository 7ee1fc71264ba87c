//! Follows what one writer commits, in memory, and writes it down bit by bit.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use chrono::{DateTime, Utc};
use futures::TryStreamExt as _;
use sqlx::PgConnection;
use sqlx::types::Json;

use super::sequence::Sequence;
use super::values::Values;
use crate::Result;
use crate::clock::from_ms;
use crate::id::DeviceKey;
use crate::status::{Cause, Change};
use crate::telemetry::{Batch, Kind, Row};

/// Devices one [`Tracker::flush_some`] writes: about ten milliseconds in which the writer does nothing else.
pub const FLUSH_DEVICES: usize = 1_000;

/// Readings of one device from which its state catches up; the newest ones.
const MAX_CATCH_UP: i64 = 10_000;

/// Runs of sequence numbers that are held for a device whose state was not read yet. Numbers beyond are found again
/// when the state catches up.
const MAX_PENDING_RUNS: usize = 256;

/// Attempts at a statement that a device's deletion crossed.
const ATTEMPTS: usize = 3;

/// The newest values and the sequence numbers of the devices of one writer.
#[derive(Debug)]
pub struct Tracker {
    max_devices: usize,
    devices: HashMap<DeviceKey, Device>,
    /// Devices with something to write, those that wait longest first.
    dirty: VecDeque<DeviceKey>,
    /// Flushes so far: tells devices that are busy from those that are not.
    round: u64,
    /// Whether there is no device left that could be forgotten, until the next flush.
    crammed: bool,
    skipped: u64,
    evicted: u64,
}

/// What a flush did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Flushed {
    /// Devices whose state was written.
    pub devices: u64,
    /// Devices whose state was read first.
    pub loaded: u64,
    /// Devices forgotten since the last flush to make room; they are read again when they are heard of.
    pub evicted: u64,
    /// Signs of life since the last flush that found no room. Values and gaps catch up when the device is next heard
    /// of; the count of its readings does not.
    pub skipped: u64,
    /// Newest values forgotten because a device has more than [`super::MAX_METRICS`] metrics.
    pub metrics_dropped: u64,
}

/// How much of what the database knows of a device is held.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Known {
    /// Only what came since; the state must be read before it is written.
    #[default]
    Nothing,
    /// All but the sequence numbers committed after their state was written, which wait for one to tell them by.
    State,
    /// All.
    All,
}

impl std::ops::AddAssign for Flushed {
    fn add_assign(&mut self, other: Self) {
        self.devices += other.devices;
        self.loaded += other.loaded;
        self.evicted += other.evicted;
        self.skipped += other.skipped;
        self.metrics_dropped += other.metrics_dropped;
    }
}

#[derive(Debug, Default)]
struct Device {
    known: Known,
    /// Whether its rows exist, so that an update, half the work of an upsert, will do.
    stored: bool,
    dirty: bool,
    values_changed: bool,
    round: u64,
    boot_id: Option<Box<str>>,
    sequence: Sequence,
    /// Sequence numbers that came before the state was read: first, last, time.
    pending: Vec<(i64, i64, i64)>,
    values: Values,
    seen_ms: i64,
    received: i64,
    clamped: i64,
}

impl Device {
    fn take(&mut self, row: &Row<'_>) {
        self.seen_ms = self.seen_ms.max(row.received_ms);
        self.received += 1;
        self.clamped += i64::from(row.clamped);
        let metrics = row.shape.map(|shape| shape.metrics.as_slice()).unwrap_or_default();
        self.values_changed |= self.values.take(row.ts_ms, row.seq, metrics, row.nums, row.rest);
        // A negative number stands in for one that was not sent.
        if row.seq < 0 {
            return;
        }
        if self.known == Known::All {
            self.sequence.note(row.seq, row.ts_ms);
            return;
        }
        self.known = Known::Nothing;
        let runs = self.pending.len();
        match self.pending.last_mut() {
            Some((_, last, ts_ms)) if *last == row.seq - 1 => (*last, *ts_ms) = (row.seq, row.ts_ms),
            _ if runs < MAX_PENDING_RUNS => self.pending.push((row.seq, row.seq, row.ts_ms)),
            _ => {}
        }
    }

    /// A birth: numbering begins anew if it is another run.
    fn boot(&mut self, boot_id: &str) {
        if self.known == Known::Nothing {
            self.pending.clear();
        } else if self.boot_id.as_deref() != Some(boot_id) {
            self.boot_id = Some(boot_id.into());
            self.sequence = Sequence::default();
            self.known = Known::All;
        }
    }
}

impl Tracker {
    /// Follows at most `max_devices` at once.
    pub fn new(max_devices: usize) -> Self {
        Self {
            max_devices: max_devices.max(1),
            devices: HashMap::new(),
            dirty: VecDeque::new(),
            round: 1,
            crammed: false,
            skipped: 0,
            evicted: 0,
        }
    }

    /// Devices held.
    pub fn len(&self) -> usize {
        self.devices.len()
    }

    /// Whether no device is held.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Whether there is no room left and a flush would make some.
    pub fn wants_flush(&self) -> bool {
        self.dirty.len() >= self.max_devices
    }

    /// Takes in a batch that was committed. No I/O.
    pub fn note(&mut self, batch: &Batch) {
        for row in batch.rows() {
            if let Some(device) = self.device(row.device) {
                device.take(&row);
            }
        }
    }

    /// Takes in changes that were recorded: a new `boot_id` restarts the sequence. Call it after [`Tracker::note`] when
    /// both were committed together. No I/O.
    pub fn note_changes(&mut self, changes: &[Change]) {
        for change in changes {
            // Another server may have had the device since: what is not waiting to be written is read again.
            if change.cause == Cause::Connected && self.devices.get(&change.device).is_some_and(|held| !held.dirty) {
                self.devices.remove(&change.device);
            }
            if let (Some(boot_id), Some(device)) = (change.boot_id(), self.devices.get_mut(&change.device)) {
                device.boot(boot_id);
            }
        }
    }

    /// A sign of life without a reading. No I/O.
    pub fn note_seen(&mut self, device: DeviceKey, at_ms: i64) {
        if let Some(device) = self.device(device) {
            device.seen_ms = device.seen_ms.max(at_ms);
        }
    }

    /// The device, about to change; `None` when there is no room for it.
    fn device(&mut self, key: DeviceKey) -> Option<&mut Device> {
        if !self.devices.contains_key(&key) && self.devices.len() >= self.max_devices && !self.make_room() {
            self.skipped += 1;
            return None;
        }
        let device = self.devices.entry(key).or_default();
        device.round = self.round;
        if !device.dirty {
            device.dirty = true;
            self.dirty.push_back(key);
        }
        Some(device)
    }

    /// Forgets devices with nothing to write: those that were quiet since the last flush, or else all.
    fn make_room(&mut self) -> bool {
        if self.crammed {
            return false;
        }
        let before = self.devices.len();
        let round = self.round;
        self.devices.retain(|_, device| device.dirty || device.round + 1 >= round);
        if self.devices.len() * 8 > self.max_devices * 7 {
            self.devices.retain(|_, device| device.dirty);
        }
        self.evicted += (before - self.devices.len()) as u64;
        self.crammed = self.devices.len() >= self.max_devices;
        !self.crammed
    }

    /// Writes what changed; for shutdown. Call it outside a transaction. On an error what was not written yet is kept for
    /// the next call.
    pub async fn flush(&mut self, db: &mut PgConnection) -> Result<Flushed> {
        let mut flushed = Flushed::default();
        while !self.dirty.is_empty() {
            flushed += self.flush_some(db).await?;
        }
        flushed += self.counted();
        Ok(flushed)
    }

    /// Writes what changed of the [`FLUSH_DEVICES`] devices that wait longest. Call it about once a second, outside a
    /// transaction: [`super::latest`] sees what still waits, so a large fleet may wait longer. On an error what was not
    /// written yet is kept for the next call.
    pub async fn flush_some(&mut self, db: &mut PgConnection) -> Result<Flushed> {
        let taken = self.dirty.len().min(FLUSH_DEVICES);
        let waits = |key: &&DeviceKey| self.devices.get(key).is_some_and(|device| device.dirty);
        let keys: Vec<DeviceKey> = self.dirty.iter().take(taken).filter(waits).copied().collect();
        let mut flushed =
            Flushed { devices: keys.len() as u64, loaded: self.load(db, &keys).await?, ..Flushed::default() };
        let (stored, fresh): (Vec<_>, Vec<_>) =
            keys.into_iter().partition(|key| self.devices.get(key).is_some_and(|device| device.stored));
        flushed.metrics_dropped += self.write(db, &fresh, false).await?;
        flushed.metrics_dropped += self.write(db, &stored, true).await?;
        self.dirty.drain(..taken);
        flushed += self.counted();
        Ok(flushed)
    }

    /// Ends a round: what was counted since the last one.
    fn counted(&mut self) -> Flushed {
        self.round += 1;
        self.crammed = false;
        let (skipped, evicted) = (std::mem::take(&mut self.skipped), std::mem::take(&mut self.evicted));
        Flushed { evicted, skipped, ..Flushed::default() }
    }

    /// Reads what the database knows of the devices that were not read yet, and what was committed since that was
    /// written.
    async fn load(&mut self, db: &mut PgConnection, keys: &[DeviceKey]) -> Result<u64> {
        let wanted: Vec<i64> = keys
            .iter()
            .filter(|key| self.devices.get(key).is_some_and(|held| held.known == Known::Nothing))
            .map(|key| key.0)
            .collect();
        if wanted.is_empty() {
            return Ok(0);
        }
        let mut states = read_states(db, &wanted).await?;
        catch_up(db, &mut states).await?;
        for key in wanted.iter().map(|key| DeviceKey(*key)) {
            let state = states.remove(&key).unwrap_or_default();
            if let Some(device) = self.devices.get_mut(&key) {
                state.give_to(device);
            }
        }
        Ok(wanted.len() as u64)
    }

    /// One statement for values, sequences and last signs of life; devices that were deleted meanwhile are skipped.
    async fn write(&mut self, db: &mut PgConnection, keys: &[DeviceKey], stored: bool) -> Result<u64> {
        if keys.is_empty() {
            return Ok(0);
        }
        let mut columns = Columns::default();
        let mut dropped = 0;
        for key in keys {
            if let Some(device) = self.devices.get_mut(key) {
                dropped += device.values.trim() as u64;
                columns.push(*key, device);
            }
        }
        if stored {
            columns.update(db).await?;
        } else {
            columns.insert(db).await?;
        }
        for key in keys {
            if let Some(device) = self.devices.get_mut(key) {
                device.stored |= device.values.newest_ms().is_some();
                (device.dirty, device.values_changed) = (false, false);
                (device.received, device.clamped) = (0, 0);
            }
        }
        Ok(dropped)
    }
}

/// What the database knows of a device.
#[derive(Debug, Default)]
struct Stored {
    /// Whether it knows anything: a row in both tables.
    complete: bool,
    boot_id: Option<Box<str>>,
    sequence: Sequence,
    values: Values,
    /// Numbers that came after the sequence was written.
    since: Vec<(i64, i64)>,
}

impl Stored {
    /// Readings older than this are in here; `None` when nothing was ever written.
    fn complete_to_ms(&self) -> Option<i64> {
        let sequence = self.sequence.last.map(|_| self.sequence.last_ts_ms);
        match (self.values.newest_ms(), sequence) {
            (Some(values), Some(sequence)) => Some(values.min(sequence)),
            (values, _) => values,
        }
    }

    fn give_to(mut self, device: &mut Device) {
        // The numbers that came now tell where this run is; higher ones that lie about are of another run, with a
        // clock that was set back since. Without one there is nothing to tell by, and catching up waits for it.
        let highest = device.pending.iter().map(|(_, last, _)| *last).max();
        let told = highest.is_some() || self.sequence.last.is_none();
        device.known = if told { Known::All } else { Known::State };
        self.since.retain(|(seq, _)| Some(*seq) <= highest);
        self.since.sort_unstable();
        for (seq, ts_ms) in self.since {
            self.sequence.note(seq, ts_ms);
        }
        for (first, last, ts_ms) in std::mem::take(&mut device.pending) {
            self.sequence.note_run(first, last, ts_ms);
        }
        self.values.merge(std::mem::take(&mut device.values));
        device.stored = self.complete;
        device.values = self.values;
        device.values_changed = true;
        device.sequence = self.sequence;
        device.boot_id = self.boot_id;
    }
}

async fn read_states(db: &mut PgConnection, keys: &[i64]) -> Result<HashMap<DeviceKey, Stored>> {
    let rows = sqlx::query!(
        r#"
        select d.key as "key!", s.boot_id as "boot_id?", s.last_seq, s.last_seq_ts, s.missing as "missing?",
               s.missing_ranges as "missing_ranges?: Json<Vec<(i64, i64)>>", l.newest as "newest?", l.doc::text as "doc?"
          from device d
     left join device_status s on s.device_key = d.key
     left join device_latest l on l.device_key = d.key
         where d.key = any($1)
        "#,
        keys,
    )
    .fetch_all(db)
    .await?;
    let mut states = HashMap::with_capacity(rows.len());
    for row in rows {
        let mut values = match &row.doc {
            Some(doc) => Values::parse(doc)?,
            None => Values::default(),
        };
        if let Some(newest) = row.newest {
            // Forgotten metrics and readings without any count too.
            values.take(newest.timestamp_millis(), 0, &[], &[], None);
        }
        let sequence = Sequence {
            last: row.last_seq,
            last_ts_ms: row.last_seq_ts.map_or(0, |ts| ts.timestamp_millis()),
            missing: row.missing.unwrap_or_default(),
            ranges: row.missing_ranges.map(|ranges| ranges.0).unwrap_or_default(),
        };
        let boot_id = row.boot_id.map(Into::into);
        let complete = row.missing.is_some() && row.doc.is_some();
        states.insert(DeviceKey(row.key), Stored { complete, boot_id, sequence, values, since: Vec::new() });
    }
    Ok(states)
}

/// Takes in the readings that were committed after the states were written: those of the last second before a crash,
/// and those that wait to be written now.
async fn catch_up(db: &mut PgConnection, states: &mut HashMap<DeviceKey, Stored>) -> Result<()> {
    let (keys, from): (Vec<i64>, Vec<DateTime<Utc>>) =
        states.iter().map(|(key, state)| (key.0, from_ms(state.complete_to_ms().unwrap_or_default()))).unzip();
    let mut shapes: HashMap<i32, Vec<(Arc<str>, Kind)>> = HashMap::new();
    let mut rows = sqlx::query!(
        r#"
        select u.key as "key!", t.ts as "ts!", t.seq as "seq!", t.shape_id as "shape_id!", t.nums as "nums!",
               t.rest::text as rest, s.metrics as "metrics?", s.kinds as "kinds?"
          from unnest($1::bigint[], $2::timestamptz[]) as u (key, since)
    cross join lateral (
               select * from telemetry r where r.device_key = u.key and r.ts >= u.since
             order by r.ts desc, r.seq desc limit $3) t
     left join shape s on s.id = t.shape_id
        "#,
        &keys,
        &from,
        MAX_CATCH_UP,
    )
    .fetch(db);
    while let Some(row) = rows.try_next().await? {
        let Some(state) = states.get_mut(&DeviceKey(row.key)) else { continue };
        let ts_ms = row.ts.timestamp_millis();
        if state.sequence.last.is_some_and(|last| row.seq > last && ts_ms >= state.sequence.last_ts_ms) {
            state.since.push((row.seq, ts_ms));
        }
        let metrics = shapes
            .entry(row.shape_id)
            .or_insert_with(|| Kind::named(row.metrics.unwrap_or_default(), &row.kinds.unwrap_or_default()));
        state.values.take(ts_ms, row.seq, metrics, &row.nums, row.rest.as_deref());
    }
    Ok(())
}

/// The states as the statement wants them.
#[derive(Debug, Default)]
struct Columns {
    device: Vec<i64>,
    newest: Vec<DateTime<Utc>>,
    doc: Vec<Option<String>>,
    seen: Vec<DateTime<Utc>>,
    last_seq: Vec<Option<i64>>,
    last_seq_ts: Vec<Option<DateTime<Utc>>>,
    missing: Vec<i64>,
    ranges: Vec<String>,
    received: Vec<i64>,
    clamped: Vec<i64>,
}

impl Columns {
    fn push(&mut self, key: DeviceKey, device: &Device) {
        let newest_ms = device.values.newest_ms();
        let sequence = &device.sequence;
        self.device.push(key.0);
        self.newest.push(from_ms(newest_ms.unwrap_or_default()));
        self.doc.push((device.values_changed && newest_ms.is_some()).then(|| device.values.to_doc()));
        self.seen.push(from_ms(device.seen_ms));
        self.last_seq.push(sequence.last);
        self.last_seq_ts.push(sequence.last.map(|_| from_ms(sequence.last_ts_ms)));
        self.missing.push(sequence.missing);
        self.ranges.push(serde_json::to_string(&sequence.ranges).expect("pairs of numbers are JSON"));
        self.received.push(device.received);
        self.clamped.push(device.clamped);
    }

    /// For devices whose rows may not exist yet.
    async fn insert(&self, db: &mut PgConnection) -> Result<(), sqlx::Error> {
        for attempt in 1.. {
            match self.try_insert(db).await {
                // Deleted between the statement's snapshot and its insert: the next snapshot knows.
                Err(sqlx::Error::Database(e)) if e.is_foreign_key_violation() && attempt < ATTEMPTS => {}
                other => return other,
            }
        }
        Ok(())
    }

    async fn try_insert(&self, db: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            "
              with known as (select key from device where key = any($1)),
                   newest as (
                   insert into device_latest as old (device_key, newest, doc)
                   select u.device, u.newest, u.doc::jsonb
                     from unnest($1::bigint[], $2::timestamptz[], $3::text[]) as u (device, newest, doc)
                     join known on known.key = u.device
                    where u.doc is not null
              on conflict (device_key) do update set newest = excluded.newest, doc = excluded.doc)
            insert into device_status as old
                   (device_key, state, state_since, last_seen_at, last_seq, last_seq_ts, missing, missing_ranges, received, clamped)
            select u.device, 'online', u.seen, u.seen, u.last_seq, u.last_seq_ts, u.missing, u.ranges::jsonb, u.received, u.clamped
              from unnest($1::bigint[], $4::timestamptz[], $5::bigint[], $6::timestamptz[], $7::bigint[], $8::text[],
                          $9::bigint[], $10::bigint[])
                as u (device, seen, last_seq, last_seq_ts, missing, ranges, received, clamped)
              join known on known.key = u.device
       on conflict (device_key) do update set
                   -- Who was thought lost and is heard of again is there, perhaps behind a gateway.
                   state = case when old.state = 'lost' and excluded.last_seen_at > old.state_since then 'online' else old.state end,
                   state_since = case when old.state = 'lost' and excluded.last_seen_at > old.state_since then excluded.last_seen_at else old.state_since end,
                   reason = case when old.state = 'lost' and excluded.last_seen_at > old.state_since then null else old.reason end,
                   last_seen_at = greatest(old.last_seen_at, excluded.last_seen_at),
                   last_seq = excluded.last_seq,
                   last_seq_ts = excluded.last_seq_ts,
                   missing = excluded.missing,
                   missing_ranges = excluded.missing_ranges,
                   received = old.received + excluded.received,
                   clamped = old.clamped + excluded.clamped
            ",
            &self.device,
            &self.newest,
            &self.doc as &[Option<String>],
            &self.seen,
            &self.last_seq as &[Option<i64>],
            &self.last_seq_ts as &[Option<DateTime<Utc>>],
            &self.missing,
            &self.ranges,
            &self.received,
            &self.clamped,
        )
        .execute(db)
        .await?;
        Ok(())
    }

    /// For devices whose rows exist, unless the device was deleted meanwhile.
    async fn update(&self, db: &mut PgConnection) -> Result<(), sqlx::Error> {
        sqlx::query!(
            "
              with newest as (
                   update device_latest l set newest = u.newest, doc = u.doc::jsonb
                     from unnest($1::bigint[], $2::timestamptz[], $3::text[]) as u (device, newest, doc)
                    where l.device_key = u.device and u.doc is not null)
            update device_status as old set
                   state = case when old.state = 'lost' and u.seen > old.state_since then 'online' else old.state end,
                   state_since = case when old.state = 'lost' and u.seen > old.state_since then u.seen else old.state_since end,
                   reason = case when old.state = 'lost' and u.seen > old.state_since then null else old.reason end,
                   last_seen_at = greatest(old.last_seen_at, u.seen),
                   last_seq = u.last_seq,
                   last_seq_ts = u.last_seq_ts,
                   missing = u.missing,
                   missing_ranges = u.ranges::jsonb,
                   received = old.received + u.received,
                   clamped = old.clamped + u.clamped
              from unnest($1::bigint[], $4::timestamptz[], $5::bigint[], $6::timestamptz[], $7::bigint[], $8::text[],
                          $9::bigint[], $10::bigint[])
                as u (device, seen, last_seq, last_seq_ts, missing, ranges, received, clamped)
             where old.device_key = u.device
            ",
            &self.device,
            &self.newest,
            &self.doc as &[Option<String>],
            &self.seen,
            &self.last_seq as &[Option<i64>],
            &self.last_seq_ts as &[Option<DateTime<Utc>>],
            &self.missing,
            &self.ranges,
            &self.received,
            &self.clamped,
        )
        .execute(db)
        .await?;
        Ok(())
    }
}
