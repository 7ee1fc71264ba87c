//! The state of a device: online, sleeping, offline or lost, since when and why.
//!
//! What a device says of itself ([`Change::decode`]) and what the broker saw ([`Change::connected`] …) enter by
//! [`record`], in the order they happened; [`get`] and [`of`] tell what is known.
//! Holds: a device that said it would sleep or go offline is not called lost when its connection ends. A new `boot_id`
//! restarts the sequence numbers in the same statement that keeps it.
//! Ignorant of: MQTT, HTTP, users.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use sqlx::types::Json;

use crate::clock::from_ms;
use crate::firmware;
use crate::id::DeviceKey;
use crate::telemetry::MAX_TS_MS;
use crate::{Error, Result};

/// Longest `boot_id` and `firmware`, in bytes.
pub const MAX_TEXT_BYTES: usize = 128;

/// Longest reason, in bytes; a longer one is cut.
pub const MAX_REASON_BYTES: usize = 256;

/// What a device is thought to be doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "lowercase")]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum State {
    /// Connected, or heard through its gateway.
    Online,
    /// Away by its own word, perhaps until a time it gave.
    Sleeping,
    /// Gone by its own word, or disconnected in good order.
    Offline,
    /// Gone without a word.
    Lost,
}

impl State {
    /// The word used in payloads, rows and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Sleeping => "sleeping",
            Self::Offline => "offline",
            Self::Lost => "lost",
        }
    }
}

/// Why a state may have changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The device's own status message; without a state it is only a sign of life.
    Reported {
        /// What it says it is.
        state: Option<State>,
        /// Names the run since the last start; a new one restarts the sequence numbers.
        boot_id: Option<String>,
        /// What it runs.
        firmware: Option<String>,
        /// When it means to be back, in ms since the epoch; only with [`State::Sleeping`].
        until_ms: Option<i64>,
        /// In its own words.
        reason: Option<String>,
    },
    /// The broker accepted its connection.
    Connected,
    /// It disconnected in good order.
    Disconnected,
    /// Its connection ended otherwise; how.
    ConnectionLost(String),
}

/// One sign from or about a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Whose.
    pub device: DeviceKey,
    /// When the server learned of it, in ms since the epoch.
    pub at_ms: i64,
    /// What happened.
    pub cause: Cause,
}

/// The payload of `status`, loosely: what else stands in it is for others.
#[derive(Deserialize)]
struct Payload<'a> {
    state: State,
    #[serde(default, borrow)]
    boot_id: Option<BootId<'a>>,
    #[serde(default)]
    firmware: Option<String>,
    #[serde(default)]
    until: Option<i64>,
    #[serde(default)]
    reason: Option<String>,
}

/// Some devices count their starts, others roll dice.
#[derive(Deserialize)]
#[serde(untagged)]
enum BootId<'a> {
    Count(u64),
    Text(#[serde(borrow)] std::borrow::Cow<'a, str>),
}

impl Change {
    /// Reads a status message. An empty payload, which clears the retained status, is a sign of life and no more.
    ///
    /// # Errors
    /// The reason, for the dead letter.
    pub fn decode(device: DeviceKey, payload: &[u8], received_ms: i64) -> Result<Self, String> {
        let cause = if payload.is_empty() {
            Cause::Reported { state: None, boot_id: None, firmware: None, until_ms: None, reason: None }
        } else {
            let payload: Payload<'_> =
                serde_json::from_slice(payload).map_err(|e| format!("not readable as a status: {e}"))?;
            payload.checked()?
        };
        Ok(Self { device, at_ms: received_ms, cause })
    }

    /// The broker accepted a connection of the device.
    pub fn connected(device: DeviceKey, at_ms: i64) -> Self {
        Self { device, at_ms, cause: Cause::Connected }
    }

    /// The device disconnected in good order.
    pub fn disconnected(device: DeviceKey, at_ms: i64) -> Self {
        Self { device, at_ms, cause: Cause::Disconnected }
    }

    /// The device's connection ended without a word from it.
    pub fn lost(device: DeviceKey, at_ms: i64, reason: impl Into<String>) -> Self {
        Self { device, at_ms, cause: Cause::ConnectionLost(cut(reason.into())) }
    }

    /// The boot id that came with it.
    pub(crate) fn boot_id(&self) -> Option<&str> {
        match &self.cause {
            Cause::Reported { boot_id, .. } => boot_id.as_deref(),
            _ => None,
        }
    }
}

impl Payload<'_> {
    fn checked(self) -> Result<Cause, String> {
        let boot_id = self.boot_id.map(|id| match id {
            BootId::Count(count) => count.to_string(),
            BootId::Text(text) => text.into_owned(),
        });
        for (name, text) in [("boot_id", &boot_id), ("firmware", &self.firmware)] {
            if text.as_ref().is_some_and(|text| text.is_empty() || text.len() > MAX_TEXT_BYTES || text.contains('\0')) {
                return Err(format!("`{name}`: expected 1 to {MAX_TEXT_BYTES} bytes of text without U+0000"));
            }
        }
        if self.until.is_some_and(|until| !(0..=MAX_TS_MS).contains(&until)) {
            return Err(format!("`until`: expected milliseconds since the epoch, 0 to {MAX_TS_MS}"));
        }
        let until_ms = self.until.filter(|_| self.state == State::Sleeping);
        let reason = self.reason.map(cut);
        Ok(Cause::Reported { state: Some(self.state), boot_id, firmware: self.firmware, until_ms, reason })
    }
}

/// A reason as it may be stored.
fn cut(mut reason: String) -> String {
    reason.retain(|c| c != '\0');
    reason.truncate(reason.floor_char_boundary(MAX_REASON_BYTES));
    reason
}

/// What several changes of one device come to.
#[derive(Debug, Default, PartialEq)]
struct Folded<'a> {
    seen_ms: i64,
    boot_id: Option<&'a str>,
    firmware: Option<&'a str>,
    set: Option<Set<'a>>,
}

/// A state to be set.
#[derive(Debug, PartialEq)]
struct Set<'a> {
    state: State,
    since_ms: i64,
    until_ms: Option<i64>,
    reason: Option<&'a str>,
    /// Whether a device that is away by its own word stays so.
    unless_away: bool,
    /// Whether there was another state in between, so that an equal one that is stored is an older one.
    anew: bool,
}

impl<'a> Folded<'a> {
    fn take(&mut self, change: &'a Change) {
        self.seen_ms = self.seen_ms.max(change.at_ms);
        match &change.cause {
            Cause::Reported { state, boot_id, firmware, until_ms, reason } => {
                self.boot_id = boot_id.as_deref().or(self.boot_id);
                self.firmware = firmware.as_deref().or(self.firmware);
                if let Some(state) = state {
                    self.set(*state, change.at_ms, *until_ms, reason.as_deref(), false);
                }
            }
            Cause::Connected => self.set(State::Online, change.at_ms, None, None, false),
            Cause::Disconnected => self.set(State::Offline, change.at_ms, None, Some("disconnected"), true),
            Cause::ConnectionLost(reason) => self.set(State::Lost, change.at_ms, None, Some(reason), true),
        }
    }

    fn set(&mut self, state: State, at_ms: i64, until_ms: Option<i64>, reason: Option<&'a str>, ended: bool) {
        let before = self.set.as_ref();
        if ended && before.is_some_and(|before| matches!(before.state, State::Sleeping | State::Offline)) {
            return;
        }
        let same = before.filter(|before| before.state == state);
        self.set = Some(Set {
            state,
            since_ms: same.map_or(at_ms, |before| before.since_ms),
            until_ms,
            reason,
            unless_away: ended && before.is_none_or(|before| before.unless_away),
            anew: before.is_some_and(|before| before.anew || before.state != state),
        });
    }
}

/// Keeps changes, which are in the order they happened, in one statement. Devices that were deleted meanwhile are
/// skipped. Returns for how many versions of firmware there was no room among those of [`crate::firmware`].
pub async fn record(db: &mut PgConnection, changes: &[Change]) -> Result<u64> {
    if changes.is_empty() {
        return Ok(0);
    }
    let mut devices: BTreeMap<DeviceKey, Folded<'_>> = BTreeMap::new();
    for change in changes {
        devices.entry(change.device).or_default().take(change);
    }
    let mut columns = Columns::default();
    for (device, folded) in &devices {
        columns.push(*device, folded);
    }
    columns.upsert(db).await?;
    note_firmware(db, changes).await
}

async fn note_firmware(db: &mut PgConnection, changes: &[Change]) -> Result<u64> {
    let (mut devices, mut versions, mut at) = (Vec::new(), Vec::new(), Vec::new());
    for change in changes {
        if let Cause::Reported { firmware: Some(firmware), .. } = &change.cause {
            devices.push(change.device);
            versions.push(firmware.as_str());
            at.push(from_ms(change.at_ms));
        }
    }
    firmware::note(db, &devices, &versions, &at, firmware::MAX_VERSIONS).await
}

/// The folded changes as the statement wants them.
#[derive(Debug, Default)]
struct Columns<'a> {
    device: Vec<i64>,
    seen: Vec<DateTime<Utc>>,
    boot_id: Vec<Option<&'a str>>,
    firmware: Vec<Option<&'a str>>,
    state: Vec<Option<&'a str>>,
    since: Vec<Option<DateTime<Utc>>>,
    until: Vec<Option<DateTime<Utc>>>,
    reason: Vec<Option<&'a str>>,
    unless_away: Vec<bool>,
    anew: Vec<bool>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, device: DeviceKey, folded: &Folded<'a>) {
        let set = folded.set.as_ref();
        self.device.push(device.0);
        self.seen.push(from_ms(folded.seen_ms));
        self.boot_id.push(folded.boot_id);
        self.firmware.push(folded.firmware);
        self.state.push(set.map(|set| set.state.as_str()));
        self.since.push(set.map(|set| from_ms(set.since_ms)));
        self.until.push(set.and_then(|set| set.until_ms).map(from_ms));
        self.reason.push(set.and_then(|set| set.reason));
        self.unless_away.push(set.is_some_and(|set| set.unless_away));
        self.anew.push(set.is_some_and(|set| set.anew));
    }

    async fn upsert(self, db: &mut PgConnection) -> Result<()> {
        sqlx::query!(
            "
            insert into device_status as old
                   (device_key, state, state_since, sleeping_until, reason, last_seen_at, boot_id, firmware)
            select u.device, case when u.takes then u.state else coalesce(u.was, 'online') end,
                   case when not u.takes or (u.state = u.was and not u.anew) then coalesce(u.was_since, u.seen) else u.since end,
                   case when u.takes then u.until else u.was_until end,
                   case when u.takes then u.reason else u.was_reason end,
                   u.seen, u.boot_id, u.firmware
              from (select n.*, s.state as was, s.state_since as was_since, s.sleeping_until as was_until,
                           s.reason as was_reason,
                           n.state is not null
                           and not (n.unless_away and coalesce(s.state in ('sleeping', 'offline'), false)) as takes
                      from unnest($1::bigint[], $2::timestamptz[], $3::text[], $4::text[], $5::text[], $6::timestamptz[],
                                  $7::timestamptz[], $8::text[], $9::boolean[], $10::boolean[])
                        as n (device, seen, boot_id, firmware, state, since, until, reason, unless_away, anew)
                      join (select key from device where key = any($1) for key share) d on d.key = n.device
                 left join device_status s on s.device_key = n.device) u
       on conflict (device_key) do update set
                   state = excluded.state,
                   state_since = excluded.state_since,
                   sleeping_until = excluded.sleeping_until,
                   reason = excluded.reason,
                   last_seen_at = greatest(old.last_seen_at, excluded.last_seen_at),
                   firmware = coalesce(excluded.firmware, old.firmware),
                   boot_id = coalesce(excluded.boot_id, old.boot_id),
                   last_seq = case when excluded.boot_id <> coalesce(old.boot_id, '') then null else old.last_seq end,
                   last_seq_ts = case when excluded.boot_id <> coalesce(old.boot_id, '') then null else old.last_seq_ts end,
                   missing = case when excluded.boot_id <> coalesce(old.boot_id, '') then 0 else old.missing end,
                   missing_ranges = case when excluded.boot_id <> coalesce(old.boot_id, '') then '[]' else old.missing_ranges end
            ",
            &self.device,
            &self.seen,
            &self.boot_id as &[Option<&str>],
            &self.firmware as &[Option<&str>],
            &self.state as &[Option<&str>],
            &self.since as &[Option<DateTime<Utc>>],
            &self.until as &[Option<DateTime<Utc>>],
            &self.reason as &[Option<&str>],
            &self.unless_away,
            &self.anew,
        )
        .execute(db)
        .await?;
        Ok(())
    }
}

/// What is known of a device's life. Readings count within a second of their commit.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct DeviceStatus {
    /// What it is thought to be doing.
    pub state: State,
    /// Since when.
    pub state_since: DateTime<Utc>,
    /// When it means to be back.
    pub sleeping_until: Option<DateTime<Utc>>,
    /// Why the state is what it is, for a human.
    pub reason: Option<String>,
    /// The last sign of life.
    pub last_seen_at: DateTime<Utc>,
    /// The run since its last start.
    pub boot_id: Option<String>,
    /// What it runs.
    pub firmware: Option<String>,
    /// Sequence numbers of this run.
    pub sequence: Gaps,
    /// Readings since it was enrolled, those sent twice counted twice.
    pub received: i64,
    /// Readings whose clock ran ahead.
    pub clamped: i64,
}

/// Which sequence numbers came since boot, and which did not.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Gaps {
    /// The highest.
    pub last_seq: Option<i64>,
    /// How many below it never came.
    pub missing: i64,
    /// The newest of the holes, first and last number of each; bounded, so they may hold fewer than `missing`.
    pub missing_ranges: Vec<(i64, i64)>,
}

/// What is known of the device; `None` before its first sign of life.
pub async fn get(db: &mut PgConnection, device: DeviceKey) -> Result<Option<DeviceStatus>> {
    Ok(of(db, &[device]).await?.remove(&device))
}

/// What is known of each of some devices; those that gave no sign of life yet are left out.
pub async fn of(db: &mut PgConnection, devices: &[DeviceKey]) -> Result<HashMap<DeviceKey, DeviceStatus>> {
    let keys: Vec<i64> = devices.iter().map(|device| device.0).collect();
    let rows = sqlx::query!(
        r#"
        select device_key as "device_key: DeviceKey", state as "state: State", state_since, sleeping_until, reason,
               last_seen_at, boot_id, firmware, last_seq, missing,
               missing_ranges as "missing_ranges: Json<Vec<(i64, i64)>>", received, clamped
          from device_status where device_key = any($1)
        "#,
        &keys,
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let sequence = Gaps { last_seq: row.last_seq, missing: row.missing, missing_ranges: row.missing_ranges.0 };
            let status = DeviceStatus {
                state: row.state,
                state_since: row.state_since,
                sleeping_until: row.sleeping_until,
                reason: row.reason,
                last_seen_at: row.last_seen_at,
                boot_id: row.boot_id,
                firmware: row.firmware,
                sequence,
                received: row.received,
                clamped: row.clamped,
            };
            (row.device_key, status)
        })
        .collect())
}

/// Calls lost whoever was online; for the start of the server, when it knows that nobody is connected.
pub async fn mark_all_lost(db: &mut PgConnection, now_ms: i64, reason: &str) -> Result<u64> {
    let marked = sqlx::query!(
        "update device_status set state = 'lost', state_since = $1, reason = $2 where state = 'online'",
        from_ms(now_ms),
        cut(reason.to_owned()),
    )
    .execute(db)
    .await
    .map_err(Error::from)?;
    Ok(marked.rows_affected())
}
