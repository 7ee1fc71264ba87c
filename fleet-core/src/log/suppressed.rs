//! Lines that were not stored, because their device logs more than it may, and the line that says so.
//!
//! Holds: what is suppressed is counted in the transaction of the batch it came in, so whatever was acknowledged is either stored or
//! counted, also when the process is killed; a device gets one line for all that was suppressed within the interval, however many
//! processes count, and it is told also when its burst has ended.

use std::time::Duration;

use serde_json::Value;
use sqlx::PgConnection;

use super::{Batch, Record, insert_batch};
use crate::clock::from_ms;
use crate::error::Result;
use crate::id::DeviceKey;
use crate::level::Level;

/// The target of lines that Muster itself writes for a device.
pub const TARGET: &str = "muster";
/// Devices told of in one transaction.
const MAX_TOLD: i64 = 1000;

/// Counts what a batch suppressed. To be called before [`insert_batch`] in its transaction: all take these rows first.
pub async fn note(db: &mut PgConnection, batch: &Batch, now_ms: i64) -> Result<()> {
    if batch.suppressed.is_empty() {
        return Ok(());
    }
    // In the order of devices, so that two batches never wait for each other.
    let (devices, lines): (Vec<i64>, Vec<i64>) = batch.suppressed.iter().unzip();
    sqlx::query!(
        "
        insert into log_suppressed as s (device_key, since, lines)
        select u.device, $3, u.lines from unnest($1::bigint[], $2::bigint[]) as u (device, lines)
            on conflict (device_key) do update set lines = s.lines + excluded.lines
        ",
        &devices,
        &lines,
        from_ms(now_ms),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Writes the lines of those of whom something was suppressed for longer than `interval`: how many lines they speak of. To be
/// called in a transaction.
pub async fn tell(db: &mut PgConnection, writer: i16, now_ms: i64, interval: Duration) -> Result<u64> {
    let interval_ms = i64::try_from(interval.as_millis()).unwrap_or(i64::MAX);
    let due = sqlx::query!(
        "
        delete from log_suppressed
         where device_key = any(array(select device_key from log_suppressed where since <= $1
                                       order by device_key limit $2 for update skip locked))
        returning device_key, since, lines
        ",
        from_ms(now_ms.saturating_sub(interval_ms)),
        MAX_TOLD,
    );
    let due = due.fetch_all(&mut *db).await?;
    let mut batch = Batch::default();
    for row in &due {
        let since_ms = row.since.timestamp_millis();
        batch.push_record(DeviceKey(row.device_key), said(row.lines, since_ms, now_ms), now_ms, i64::MAX);
    }
    insert_batch(db, writer, &batch).await?;
    Ok(due.iter().map(|row| row.lines.unsigned_abs()).sum())
}

fn said(lines: i64, since_ms: i64, now_ms: i64) -> Record {
    let text = |name: &str, value: Value| (name.to_owned(), value);
    Record {
        ts_ms: Some(now_ms),
        level: Level::Warn,
        target: Some(TARGET.to_owned()),
        message: format!("{lines} lines suppressed by the rate limit"),
        fields: vec![
            text("suppressed", lines.into()),
            text("reason", "ingest.log_lines_per_s".into()),
            text("since", since_ms.into()),
        ],
        ..Record::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::{Limits, Rate};
    use crate::telemetry::fixture::{NOW, enrol};
    use crate::testing::TestDb;

    const EVERY: Duration = Duration::from_secs(10);

    /// A batch in which so many lines of a device are suppressed.
    fn batch(device: DeviceKey, suppressed: usize) -> Batch {
        let (mut batch, mut rate) = (Batch::default(), Rate::new(1, 1, 10));
        let limits = Limits { max_lines: 1000, max_ahead_ms: 300_000 };
        batch.push_within(device, "x\n".repeat(suppressed + 1).as_bytes(), NOW, &limits, &mut rate);
        assert_eq!((batch.len(), batch.suppressed()), (1, suppressed as u64));
        batch
    }

    #[tokio::test]
    async fn what_was_suppressed_is_told_in_one_line_when_its_time_has_come() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let (boiler, pump) =
            (enrol(&mut conn, db.tenant(), "boiler-1").await, enrol(&mut conn, db.tenant(), "pump-1").await);
        note(&mut conn, &batch(boiler, 7), NOW).await.unwrap();
        note(&mut conn, &batch(boiler, 5), NOW + 9_000).await.unwrap();
        note(&mut conn, &batch(pump, 1), NOW + 9_000).await.unwrap();
        assert_eq!(tell(&mut conn, 0, NOW + 9_999, EVERY).await.unwrap(), 0);
        assert_eq!(tell(&mut conn, 0, NOW + 10_000, EVERY).await.unwrap(), 12);
        assert_eq!(tell(&mut conn, 0, NOW + 10_001, EVERY).await.unwrap(), 0);
        let line = sqlx::query!(r#"select device_key, level, target, message, fields as "fields!" from log"#);
        let line = line.fetch_one(&mut *conn).await.unwrap();
        assert_eq!((line.device_key, line.level, line.target.as_deref()), (boiler.0, 4, Some(TARGET)));
        assert_eq!(line.message, "12 lines suppressed by the rate limit");
        let fields = serde_json::json!({ "suppressed": 12, "reason": "ingest.log_lines_per_s", "since": NOW });
        assert_eq!(line.fields, fields);
        assert_eq!(tell(&mut conn, 0, NOW + 19_000, EVERY).await.unwrap(), 1, "the other one");
    }

    #[tokio::test]
    async fn what_was_not_committed_was_not_counted_and_nobody_waits_for_another() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
        let mut tx = db.pool().begin().await.unwrap();
        note(&mut tx, &batch(device, 7), NOW).await.unwrap();
        tx.rollback().await.unwrap();
        note(&mut conn, &batch(device, 2), NOW).await.unwrap();
        let mut telling = db.pool().begin().await.unwrap();
        assert_eq!(tell(&mut telling, 0, NOW + 10_000, EVERY).await.unwrap(), 2);
        assert_eq!(tell(&mut conn, 1, NOW + 10_000, EVERY).await.unwrap(), 0, "another process skips it");
        telling.rollback().await.unwrap();
        assert_eq!(tell(&mut conn, 1, NOW + 10_000, EVERY).await.unwrap(), 2, "it was not told, so it is still there");
    }
}
