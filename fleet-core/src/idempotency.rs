//! Answers kept for `Idempotency-Key` (draft-ietf-httpapi-idempotency-key-header): a creating request that is sent twice
//! creates once, and is answered twice the same.
//!
//! The caller's transaction [`begin`]s with the key, does its work, and [`finish`]es with the answer; so the key exists
//! exactly when the work does. A second request with the key waits for the first, then [`begin`] hands it the answer.
//! Ignorant of: HTTP, what is created. Secrets do not belong in an answer.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;
use sqlx::PgConnection;

use crate::error::{Error, Result};
use crate::id::{TenantKey, UserId};

/// Longest key, in characters.
pub const MAX_KEY_CHARS: usize = 255;
/// How long an answer is kept; [`crate::retention`] sweeps what is older.
pub const KEPT: TimeDelta = TimeDelta::days(1);

/// Whose key it is: two users may use the same one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Key {
    tenant: TenantKey,
    user: UserId,
    name: String,
}

impl Key {
    /// A user's key, printable ASCII and not empty.
    pub fn new(tenant: TenantKey, user: UserId, key: &str) -> Result<Self> {
        if (1..=MAX_KEY_CHARS).contains(&key.len()) && key.bytes().all(|b| (b' '..=b'~').contains(&b)) {
            return Ok(Self { tenant, user, name: key.to_owned() });
        }
        Err(Error::Invalid(format!("Idempotency-Key: expected 1 to {MAX_KEY_CHARS} printable ASCII characters")))
    }
}

/// What was answered.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body, without secrets.
    pub body: Value,
}

/// Takes the key for this request: `None` for the first one, which must [`finish`] in the same transaction; the kept
/// answer for a repetition; [`Error::IdempotencyConflict`] when the key came with another request, told by `request_hash`.
pub async fn begin(
    db: &mut PgConnection,
    key: &Key,
    request_hash: &[u8],
    now: DateTime<Utc>,
) -> Result<Option<Answer>> {
    // An answer past its time makes room; a living one stays, and the insert waits for a transaction that holds it.
    sqlx::query!(
        "delete from idempotency where tenant_key = $1 and user_id = $2 and key = $3 and created_at <= $4",
        key.tenant.0,
        key.user.uuid(),
        key.name,
        now - KEPT
    )
    .execute(&mut *db)
    .await?;
    let taken = sqlx::query!(
        "
        insert into idempotency (tenant_key, user_id, key, request_hash, status, answer, created_at)
        values ($1, $2, $3, $4, 0, 'null', $5)
            on conflict do nothing
        ",
        key.tenant.0,
        key.user.uuid(),
        key.name,
        request_hash,
        now
    )
    .execute(&mut *db)
    .await?;
    if taken.rows_affected() == 1 {
        return Ok(None);
    }
    let kept = sqlx::query!(
        "select request_hash, status, answer from idempotency where tenant_key = $1 and user_id = $2 and key = $3",
        key.tenant.0,
        key.user.uuid(),
        key.name
    )
    .fetch_optional(db)
    .await?
    .ok_or(Error::Busy("requests with this Idempotency-Key"))?;
    if kept.request_hash != request_hash {
        return Err(Error::IdempotencyConflict);
    }
    let status = u16::try_from(kept.status).map_err(|_| Error::Internal("a kept status".into()))?;
    Ok(Some(Answer { status, body: kept.answer }))
}

/// Keeps the answer of the request that took the key, in the transaction that [`begin`] ran in.
pub async fn finish(db: &mut PgConnection, key: &Key, answer: &Answer) -> Result<()> {
    let status = i16::try_from(answer.status).map_err(|_| Error::Internal("a status beyond 32767".into()))?;
    sqlx::query!(
        "update idempotency set status = $4, answer = $5 where tenant_key = $1 and user_id = $2 and key = $3",
        key.tenant.0,
        key.user.uuid(),
        key.name,
        status,
        answer.body
    )
    .execute(db)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::clock::from_ms;
    use crate::testing::TestDb;

    const NOON: i64 = 1_763_722_800_000;

    #[tokio::test]
    async fn a_repetition_gets_the_answer_and_another_request_is_refused() {
        let db = TestDb::new().await;
        let key = Key::new(db.tenant(), UserId::new(), "k").unwrap();
        let answer = Answer { status: 201, body: json!({"id": "a"}) };
        let mut tx = db.pool().begin().await.unwrap();
        assert_eq!(begin(&mut tx, &key, b"one", from_ms(NOON)).await.unwrap(), None);
        finish(&mut tx, &key, &answer).await.unwrap();
        tx.commit().await.unwrap();

        let mut db_conn = db.pool().acquire().await.unwrap();
        assert_eq!(begin(&mut db_conn, &key, b"one", from_ms(NOON)).await.unwrap(), Some(answer));
        let other = begin(&mut db_conn, &key, b"two", from_ms(NOON)).await;
        assert!(matches!(other, Err(Error::IdempotencyConflict)), "{other:?}");
        let neighbour = Key::new(db.tenant(), UserId::new(), "k").unwrap();
        assert_eq!(begin(&mut db_conn, &neighbour, b"two", from_ms(NOON)).await.unwrap(), None);
        let tomorrow = from_ms(NOON) + KEPT;
        assert_eq!(begin(&mut db_conn, &key, b"two", tomorrow).await.unwrap(), None, "kept for a day");
    }

    #[tokio::test]
    async fn work_that_failed_leaves_the_key_free() {
        let db = TestDb::new().await;
        let key = Key::new(db.tenant(), UserId::new(), "k").unwrap();
        let mut tx = db.pool().begin().await.unwrap();
        begin(&mut tx, &key, b"one", from_ms(NOON)).await.unwrap();
        tx.rollback().await.unwrap();
        let mut db = db.pool().acquire().await.unwrap();
        assert_eq!(begin(&mut db, &key, b"two", from_ms(NOON)).await.unwrap(), None);
    }

    #[test]
    fn a_key_is_bounded() {
        let key = |text: &str| Key::new(TenantKey(1), UserId::new(), text);
        assert!(key(&"x".repeat(MAX_KEY_CHARS)).is_ok());
        for bad in ["", "a\0", "ä", "a\n", &"x".repeat(MAX_KEY_CHARS + 1)] {
            assert!(matches!(key(bad), Err(Error::Invalid(_))), "{bad:?}");
        }
    }
}
