//! Dead letters: payloads that could not be read. They were acknowledged, so they are kept, with the reason.
//!
//! Holds: a letter stored twice is there once; a letter of a tenant that was deleted meanwhile is no error.
//! Ignorant of: MQTT, HTTP, users.

use bytes::Bytes;
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::Result;
use crate::clock::from_ms;
use crate::id::{DeadLetterId, DeviceId, TenantKey};

/// Longest reason, in bytes; a longer one is cut.
pub const MAX_REASON_BYTES: usize = 512;

/// Most letters of one page.
pub const MAX_PAGE: i64 = 1_000;

/// A payload that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetter {
    /// Made on arrival, so that a letter that is stored twice is there once.
    pub id: DeadLetterId,
    /// Whose device.
    pub tenant: TenantKey,
    /// Which device; it may be deleted since.
    pub device: DeviceId,
    /// Where it was sent.
    pub topic: String,
    /// What was expected, for whoever wrote the device's software.
    pub reason: String,
    /// As it came.
    pub payload: Bytes,
    /// When it came, in ms since the epoch.
    pub received_ms: i64,
}

/// A letter that was kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeadLetterRow {
    /// Names it.
    pub id: DeadLetterId,
    /// Which device; it may be deleted since.
    pub device: String,
    /// Where it was sent.
    pub topic: String,
    /// What was expected.
    pub reason: String,
    /// As it came.
    pub payload: Vec<u8>,
    /// When it came.
    pub received_at: DateTime<Utc>,
}

/// Keeps letters, in one statement.
pub async fn insert(db: &mut PgConnection, letters: &[DeadLetter]) -> Result<()> {
    if letters.is_empty() {
        return Ok(());
    }
    let id: Vec<Uuid> = letters.iter().map(|letter| letter.id.uuid()).collect();
    let tenant: Vec<i64> = letters.iter().map(|letter| letter.tenant.0).collect();
    let device: Vec<&str> = letters.iter().map(|letter| letter.device.as_str()).collect();
    let topic: Vec<String> = letters.iter().map(|letter| storable(&letter.topic, usize::MAX)).collect();
    let reason: Vec<String> = letters.iter().map(|letter| storable(&letter.reason, MAX_REASON_BYTES)).collect();
    let payload: Vec<&[u8]> = letters.iter().map(|letter| letter.payload.as_ref()).collect();
    let received: Vec<DateTime<Utc>> = letters.iter().map(|letter| from_ms(letter.received_ms)).collect();
    sqlx::query!(
        "
        insert into dead_letter (id, tenant_key, device_id, topic, reason, payload, received_at)
        select u.id, u.tenant, u.device, u.topic, u.reason, u.payload, u.received
          from unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::bytea[], $7::timestamptz[])
            as u (id, tenant, device, topic, reason, payload, received)
          join (select key from tenant where key = any($2) for key share) t on t.key = u.tenant
   on conflict (id) do nothing
        ",
        &id,
        &tenant,
        &device as &[&str],
        &topic,
        &reason,
        &payload as &[&[u8]],
        &received,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Text as PostgreSQL takes it, at most `max` bytes.
fn storable(text: &str, max: usize) -> String {
    text[..text.floor_char_boundary(max)].replace('\0', "\u{fffd}")
}

/// Letters of a tenant, or of one device, newest first; `before` goes on after the last letter of a page. At most
/// [`MAX_PAGE`].
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    device: Option<&DeviceId>,
    before: Option<DeadLetterId>,
    limit: i64,
) -> Result<Vec<DeadLetterRow>> {
    let before = before.map_or(Uuid::max(), DeadLetterId::uuid);
    let limit = limit.clamp(0, MAX_PAGE);
    let rows = match device {
        Some(device) => {
            sqlx::query_as!(
                DeadLetterRow,
                "
                select id, device_id as device, topic, reason, payload, received_at from dead_letter
                 where tenant_key = $1 and device_id = $2 and id < $3 order by id desc limit $4
                ",
                tenant.0,
                device.as_str(),
                before,
                limit,
            )
            .fetch_all(db)
            .await?
        }
        None => {
            sqlx::query_as!(
                DeadLetterRow,
                "
                select id, device_id as device, topic, reason, payload, received_at from dead_letter
                 where tenant_key = $1 and id < $2 order by id desc limit $3
                ",
                tenant.0,
                before,
                limit,
            )
            .fetch_all(db)
            .await?
        }
    };
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::fixture::NOW;
    use crate::testing::TestDb;

    fn letter(tenant: TenantKey, device: &str, nth: i64) -> DeadLetter {
        DeadLetter {
            id: DeadLetterId::new(),
            tenant,
            device: device.parse().unwrap(),
            topic: format!("fleet/v1/main/{device}/telemetry"),
            reason: format!("reason {nth}"),
            payload: Bytes::from(vec![0, 255, b'x']),
            received_ms: NOW + nth,
        }
    }

    #[tokio::test]
    async fn a_letter_stored_twice_is_there_once_and_as_it_came() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let one = letter(db.tenant(), "boiler-1", 1);
        insert(&mut conn, &[one.clone(), one.clone()]).await.unwrap();
        insert(&mut conn, std::slice::from_ref(&one)).await.unwrap();
        insert(&mut conn, &[]).await.unwrap();
        let kept = page(&mut conn, db.tenant(), None, None, 10).await.unwrap();
        let expected = DeadLetterRow {
            id: one.id,
            device: "boiler-1".to_owned(),
            topic: one.topic,
            reason: one.reason,
            payload: one.payload.to_vec(),
            received_at: from_ms(NOW + 1),
        };
        assert_eq!(kept, [expected]);
    }

    #[tokio::test]
    async fn no_letter_is_too_strange_to_keep() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let mut strange = letter(db.tenant(), "boiler-1", 1);
        strange.topic = "a\0b".to_owned();
        strange.reason = format!("{}\0", "ä".repeat(MAX_REASON_BYTES));
        let orphan = letter(TenantKey(999), "boiler-1", 1);
        insert(&mut conn, &[strange, orphan]).await.unwrap();
        let kept = page(&mut conn, db.tenant(), None, None, 10).await.unwrap();
        assert_eq!((kept.len(), kept[0].topic.as_str(), kept[0].reason.len()), (1, "a\u{fffd}b", MAX_REASON_BYTES));
    }

    #[tokio::test]
    async fn pages_run_from_the_newest_to_the_oldest() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let letters: Vec<_> =
            (0..10).map(|nth| letter(db.tenant(), if nth % 2 == 0 { "even" } else { "odd" }, nth)).collect();
        insert(&mut conn, &letters).await.unwrap();
        let even = "even".parse().unwrap();
        for (device, expected) in [(None, (0..10).rev().collect::<Vec<_>>()), (Some(&even), vec![8, 6, 4, 2, 0])] {
            let (mut seen, mut before) = (Vec::new(), None);
            loop {
                let found = page(&mut conn, db.tenant(), device, before, 3).await.unwrap();
                assert!(found.len() <= 3);
                let Some(last) = found.last() else { break };
                before = Some(last.id);
                seen.extend(found.iter().map(|row| row.received_at.timestamp_millis() - NOW));
            }
            assert_eq!(seen, expected);
        }
    }
}
