//! Connection events: what happened to a client's connection that an operator should see.
//!
//! They enter by [`record`], in batches, and leave by [`page`].
//! Holds: one row a minute for each client and kind, however often it happened; `count` says how often. An event of a
//! tenant that was deleted meanwhile is no error.
//! Ignorant of: MQTT, HTTP.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, DurationRound, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::Result;
use crate::clock::from_ms;
use crate::id::{ConnectionEventId, DeviceKey, TenantKey};
use crate::policy::{Principal, Who};

/// Most events of one page.
pub const MAX_PAGE: i64 = 1_000;
/// Longest client id that is kept, in bytes; a longer one is cut.
pub const MAX_CLIENT_ID_BYTES: usize = 256;
/// Longest detail, in bytes of JSON; a longer one is left out, and says so.
pub const MAX_DETAIL_BYTES: usize = 4_096;

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type)]
#[serde(rename_all = "kebab-case")]
#[sqlx(type_name = "text", rename_all = "kebab-case")]
pub enum Kind {
    /// The client connects too often.
    Flapping,
    /// Two clients take one session from each other.
    IdentityConflict,
    /// Messages for the client were given up, as too many were waiting.
    QueueOverflow,
    /// The client sends more than it may.
    RateLimited,
    /// Somebody disconnected it.
    DisconnectedByOperator,
    /// Somebody began to trace it.
    TraceStarted,
}

impl Kind {
    /// Every kind there is.
    pub const ALL: [Self; 6] = [
        Self::Flapping,
        Self::IdentityConflict,
        Self::QueueOverflow,
        Self::RateLimited,
        Self::DisconnectedByOperator,
        Self::TraceStarted,
    ];

    /// The word used in rows, queries and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Flapping => "flapping",
            Self::IdentityConflict => "identity-conflict",
            Self::QueueOverflow => "queue-overflow",
            Self::RateLimited => "rate-limited",
            Self::DisconnectedByOperator => "disconnected-by-operator",
            Self::TraceStarted => "trace-started",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = String;
    fn from_str(given: &str) -> Result<Self, String> {
        let words = || Self::ALL.map(Self::as_str).join(", ");
        Self::ALL.into_iter().find(|kind| kind.as_str() == given).ok_or_else(|| format!("expected one of {}", words()))
    }
}

/// Something that happened to a client.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Whose client.
    pub tenant: TenantKey,
    /// The device, when the client is one.
    pub device: Option<DeviceKey>,
    /// The client's id.
    pub client_id: String,
    /// What happened.
    pub kind: Kind,
    /// More about it, as a JSON object; no secrets.
    pub detail: Value,
    /// When, in ms since the epoch.
    pub at_ms: i64,
}

impl Event {
    /// Something that happens to a client of `principal`.
    pub fn new(principal: &Principal, client_id: &str, kind: Kind, detail: Value, at_ms: i64) -> Self {
        let device = match &principal.who {
            Who::Device { key, .. } => Some(*key),
            Who::User { .. } | Who::Claim { .. } => None,
        };
        Self { tenant: principal.tenant, device, client_id: client_id.to_owned(), kind, detail, at_ms }
    }
}

/// What makes two events one row.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    tenant: TenantKey,
    device: Option<DeviceKey>,
    client_id: String,
    kind: Kind,
    minute: DateTime<Utc>,
}

/// Events that share a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Tally {
    count: i64,
    newest_ms: i64,
    detail: Value,
}

/// Events added up, so that a storm of one kind costs one row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Tallies(BTreeMap<Key, Tally>);

impl Tallies {
    /// Adds an event; `false` when it would make more than `most` rows, and was left out.
    pub fn add(&mut self, event: Event, most: usize) -> bool {
        let at = from_ms(event.at_ms);
        let minute = at.duration_trunc(TimeDelta::minutes(1)).unwrap_or(at);
        let client_id = storable(&event.client_id);
        let key = Key { tenant: event.tenant, device: event.device, client_id, kind: event.kind, minute };
        if self.0.len() >= most && !self.0.contains_key(&key) {
            return false;
        }
        let tally = self.0.entry(key).or_insert(Tally { count: 0, newest_ms: i64::MIN, detail: Value::Null });
        tally.count += 1;
        if event.at_ms >= tally.newest_ms {
            tally.newest_ms = event.at_ms;
            tally.detail = bounded(event.detail);
        }
        true
    }

    /// Rows these come to.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is nothing to record.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Text as PostgreSQL takes it, at most [`MAX_CLIENT_ID_BYTES`].
fn storable(client_id: &str) -> String {
    client_id[..client_id.floor_char_boundary(MAX_CLIENT_ID_BYTES)].replace('\0', "\u{fffd}")
}

fn bounded(detail: Value) -> Value {
    let text = detail.to_string();
    if text.len() > MAX_DETAIL_BYTES {
        return json!({ "left_out": format!("{} bytes: at most {MAX_DETAIL_BYTES} are kept", text.len()) });
    }
    // The one escape that jsonb refuses.
    if text.contains("\\u0000") { json!({ "left_out": "a null character" }) } else { detail }
}

/// Keeps events, in one statement; those of the same client, kind and minute as an earlier one are added to it.
pub async fn record(db: &mut PgConnection, events: &Tallies) -> Result<()> {
    if events.is_empty() {
        return Ok(());
    }
    let mut rows: Vec<(&Key, &Tally)> = events.0.iter().collect();
    // What happened later gets the later id.
    rows.sort_by_key(|(_, tally)| tally.newest_ms);
    let id: Vec<Uuid> = rows.iter().map(|_| Uuid::now_v7()).collect();
    let tenant: Vec<i64> = rows.iter().map(|(key, _)| key.tenant.0).collect();
    let device: Vec<Option<i64>> = rows.iter().map(|(key, _)| key.device.map(|device| device.0)).collect();
    let client_id: Vec<&str> = rows.iter().map(|(key, _)| key.client_id.as_str()).collect();
    let kind: Vec<&str> = rows.iter().map(|(key, _)| key.kind.as_str()).collect();
    let minute: Vec<DateTime<Utc>> = rows.iter().map(|(key, _)| key.minute).collect();
    let detail: Vec<Value> = rows.iter().map(|(_, tally)| tally.detail.clone()).collect();
    let count: Vec<i64> = rows.iter().map(|(_, tally)| tally.count).collect();
    let at: Vec<DateTime<Utc>> = rows.iter().map(|(_, tally)| from_ms(tally.newest_ms)).collect();
    sqlx::query!(
        "
        insert into connection_event as e (id, tenant_key, device_key, client_id, kind, detail, count, at, minute)
        select u.id, u.tenant, u.device, u.client_id, u.kind, u.detail, u.count, u.at, u.minute
          from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::text[], $5::text[], $6::jsonb[], $7::bigint[],
                      $8::timestamptz[], $9::timestamptz[])
            as u (id, tenant, device, client_id, kind, detail, count, at, minute)
          join (select key from tenant where key = any($2) for key share) t on t.key = u.tenant
   on conflict (tenant_key, coalesce(device_key, 0), client_id, kind, minute) do update
           set count = e.count + excluded.count,
               detail = case when excluded.at >= e.at then excluded.detail else e.detail end,
               at = greatest(e.at, excluded.at)
        ",
        &id,
        &tenant,
        &device as &[Option<i64>],
        &client_id as &[&str],
        &kind as &[&str],
        &detail,
        &count,
        &at,
        &minute,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// An event that was kept.
#[derive(Debug, Clone, PartialEq)]
pub struct EventRow {
    /// Names it.
    pub id: ConnectionEventId,
    /// The device, while it exists.
    pub device: Option<String>,
    /// The client's id.
    pub client_id: String,
    /// What happened.
    pub kind: Kind,
    /// More about the newest.
    pub detail: Value,
    /// How often within the minute.
    pub count: i64,
    /// When it happened last.
    pub at: DateTime<Utc>,
}

/// Events of a tenant, newest first; all that is given must hold; `before` goes on after the last event of a page. At
/// most [`MAX_PAGE`]. To be called in a transaction.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    device: Option<DeviceKey>,
    kind: Option<Kind>,
    before: Option<ConnectionEventId>,
    limit: i64,
) -> Result<Vec<EventRow>> {
    // One plan for all filters would read a tenant's whole history for the few events of a device.
    sqlx::query!("set local plan_cache_mode = force_custom_plan").execute(&mut *db).await?;
    let rows = sqlx::query_as!(
        EventRow,
        r#"
        select e.id as "id: ConnectionEventId", d.id as "device?", e.client_id, e.kind as "kind: Kind", e.detail, e.count,
               e.at
          from connection_event e
          left join device d on d.key = e.device_key
         where e.tenant_key = $1
           and ($2::bigint is null or e.device_key = $2)
           and ($3::text is null or e.kind = $3)
           and e.id < $4
         order by e.id desc
         limit $5
        "#,
        tenant.0,
        device.map(|device| device.0),
        kind.map(Kind::as_str),
        before.map_or(Uuid::max(), ConnectionEventId::uuid),
        limit.clamp(0, MAX_PAGE),
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDb;

    const NOON: i64 = 1_763_726_400_000;

    fn event(db: &TestDb, client_id: &str, kind: Kind, at_ms: i64) -> Event {
        Event {
            tenant: db.tenant(),
            device: None,
            client_id: client_id.into(),
            kind,
            detail: json!({ "at": at_ms }),
            at_ms,
        }
    }

    async fn recorded(db: &TestDb, events: Vec<Event>) {
        let mut tallies = Tallies::default();
        for event in events {
            assert!(tallies.add(event, 100));
        }
        record(&mut db.pool().acquire().await.unwrap(), &tallies).await.unwrap();
    }

    async fn all(db: &TestDb, kind: Option<Kind>) -> Vec<(String, Kind, i64, Value)> {
        let mut tx = db.pool().begin().await.unwrap();
        let rows = page(&mut tx, db.tenant(), None, kind, None, MAX_PAGE).await.unwrap();
        rows.into_iter().map(|row| (row.client_id, row.kind, row.count, row.detail)).collect()
    }

    #[tokio::test]
    async fn events_of_a_minute_share_a_row_however_they_come() {
        let db = TestDb::new().await;
        let flapping = |at_ms| event(&db, "c", Kind::Flapping, at_ms);
        recorded(&db, vec![flapping(NOON), flapping(NOON + 2), flapping(NOON + 1)]).await;
        recorded(&db, vec![flapping(NOON + 59_999)]).await;
        recorded(&db, vec![flapping(NOON + 5)]).await;
        recorded(&db, vec![flapping(NOON + 60_000), event(&db, "c", Kind::RateLimited, NOON)]).await;
        assert_eq!(
            all(&db, None).await,
            [
                ("c".to_owned(), Kind::Flapping, 1, json!({ "at": NOON + 60_000 })),
                ("c".to_owned(), Kind::RateLimited, 1, json!({ "at": NOON })),
                ("c".to_owned(), Kind::Flapping, 5, json!({ "at": NOON + 59_999 })),
            ]
        );
        assert_eq!(all(&db, Some(Kind::RateLimited)).await.len(), 1);
    }

    #[tokio::test]
    async fn every_kind_can_be_kept_and_read() {
        let db = TestDb::new().await;
        recorded(&db, Kind::ALL.map(|kind| event(&db, "c", kind, NOON)).to_vec()).await;
        assert_eq!(all(&db, None).await.len(), Kind::ALL.len());
        for kind in Kind::ALL {
            assert_eq!(kind.to_string().parse(), Ok(kind));
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
        assert!("sneezing".parse::<Kind>().unwrap_err().contains("flapping"));
    }

    #[tokio::test]
    async fn odd_texts_and_a_tenant_that_is_gone_harm_nothing() {
        let db = TestDb::new().await;
        let odd = Event {
            detail: json!({ "x": "\0" }),
            ..event(&db, &format!("a\0{}", "é".repeat(200)), Kind::Flapping, NOON)
        };
        let long =
            Event { detail: json!({ "x": "y".repeat(MAX_DETAIL_BYTES) }), ..event(&db, "long", Kind::Flapping, NOON) };
        let gone = Event { tenant: TenantKey(-1), ..event(&db, "gone", Kind::Flapping, NOON) };
        recorded(&db, vec![odd, long, gone]).await;
        let kept = all(&db, None).await;
        assert_eq!(kept.len(), 2);
        assert!(kept.iter().all(|(client_id, _, _, detail)| {
            client_id.len() <= MAX_CLIENT_ID_BYTES + 2 && detail["left_out"].is_string()
        }));
    }

    #[test]
    fn tallies_are_bounded() {
        let mut tallies = Tallies::default();
        let event = |client_id: &str| Event {
            tenant: TenantKey(1),
            device: None,
            client_id: client_id.into(),
            kind: Kind::Flapping,
            detail: Value::Null,
            at_ms: NOON,
        };
        assert!(tallies.add(event("a"), 1));
        assert!(tallies.add(event("a"), 1), "no further row");
        assert!(!tallies.add(event("b"), 1));
        assert_eq!(tallies.len(), 1);
    }
}
