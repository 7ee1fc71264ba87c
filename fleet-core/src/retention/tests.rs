use std::sync::atomic::{AtomicBool, Ordering};

use chrono::TimeDelta;

use super::by_day::{Partitions, ddl, in_the_way};
use super::*;
use crate::clock::from_ms;
use crate::connection_event::{self, Event, Tallies};
use crate::dead_letter::{self, DeadLetter};
use crate::id::{DeadLetterId, DeviceKey, TenantKey};
use crate::telemetry::fixture::{NOW, Writer, enrol};
use crate::telemetry::{Order, Query, points};
use crate::testing::TestDb;

const DAY_MS: i64 = 24 * 3_600_000;

fn retention() -> Retention {
    Retention {
        telemetry_days: 3,
        telemetry_max_bytes: 0,
        log_days: u32::MAX,
        log_max_bytes: 0,
        dead_letter_days: 30,
        dead_letter_max_rows: 1_000,
        connection_event_days: 30,
        connection_event_max_rows: 1_000,
        command_days: 90,
        audit_days: 0,
        decommission_rows: 5_000,
    }
}

fn now() -> DateTime<Utc> {
    from_ms(NOW)
}

fn day(after_today: i64) -> NaiveDate {
    from_ms(NOW + after_today * DAY_MS).date_naive()
}

async fn days(db: &mut PgConnection) -> Vec<NaiveDate> {
    Partitions::read(db, Kind::Telemetry).await.unwrap().days.into_keys().collect()
}

/// Stores one reading on each of the days, counted from today.
async fn store(db: &mut PgConnection, writer: &mut Writer, device: DeviceKey, on: impl Iterator<Item = i64>) -> u64 {
    let messages: Vec<String> =
        on.map(|day| format!(r#"{{"ts":{},"seq":{},"values":{{"a":1}}}}"#, NOW + day * DAY_MS, day + 1_000)).collect();
    // Received in the future, so that no clock runs ahead.
    writer.store(db, device, &messages.iter().map(String::as_str).collect::<Vec<_>>(), NOW + 100 * DAY_MS).await
}

async fn stored(db: &mut PgConnection, device: DeviceKey) -> Vec<i64> {
    let query = Query {
        device,
        metric: None,
        from: from_ms(0),
        to: from_ms(NOW + 200 * DAY_MS),
        order: Order::Asc,
        limit: 10_000,
        after: None,
    };
    points(db, &query).await.unwrap().iter().map(|point| point.seq - 1_000).collect()
}

async fn in_default(db: &mut PgConnection) -> i64 {
    sqlx::query_scalar!("select count(*) from telemetry_default").fetch_one(db).await.unwrap().unwrap()
}

#[tokio::test]
async fn each_day_to_come_has_its_partition() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    for _ in 0..2 {
        ensure_partitions(&mut conn, now()).await.unwrap();
        assert_eq!(days(&mut conn).await, (-1..=7).map(day).collect::<Vec<_>>());
    }
    ensure_partitions(&mut conn, from_ms(NOW + 2 * DAY_MS)).await.unwrap();
    assert_eq!(days(&mut conn).await.last(), Some(&day(9)));
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    store(&mut conn, &mut writer, device, -2..=9).await;
    assert_eq!(in_default(&mut conn).await, 1, "only the day before yesterday's");
    assert_eq!(stored(&mut conn, device).await, (-2..=9).collect::<Vec<_>>());
}

#[tokio::test]
async fn readings_that_came_before_their_partition_move_into_it() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    assert_eq!(store(&mut conn, &mut writer, device, -5..=9).await, 15);
    assert_eq!(in_default(&mut conn).await, 15);
    ensure_partitions(&mut conn, now()).await.unwrap();
    assert_eq!(in_default(&mut conn).await, 6);
    assert_eq!(stored(&mut conn, device).await, (-5..=9).collect::<Vec<_>>());
    assert_eq!(store(&mut conn, &mut writer, device, -5..=9).await, 0, "what is sent again is still known");
}

#[tokio::test]
async fn several_processes_may_make_partitions_at_once() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    store(&mut conn, &mut Writer::new(db.tenant()), device, -1..=7).await;
    let mut callers = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let pool = db.pool().clone();
        callers.spawn(async move { ensure_partitions(&mut pool.acquire().await.unwrap(), now()).await });
    }
    for done in callers.join_all().await {
        done.unwrap();
    }
    assert_eq!(days(&mut conn).await.len(), 9);
    assert_eq!(stored(&mut conn, device).await, (-1..=7).collect::<Vec<_>>());
}

/// A writer that goes on while its partitions are made and dropped: what it committed is there, once.
#[tokio::test]
async fn ingest_goes_on_meanwhile() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let stop = std::sync::Arc::new(AtomicBool::new(false));
    let writing = tokio::spawn({
        let (pool, stop, tenant) = (db.pool().clone(), std::sync::Arc::clone(&stop), db.tenant());
        async move {
            let mut conn = pool.acquire().await.unwrap();
            let mut writer = Writer::new(tenant);
            let mut count = 0;
            while !stop.load(Ordering::Relaxed) {
                let message = format!(r#"{{"ts":{},"seq":{count},"values":{{"a":1}}}}"#, NOW + count);
                writer.batch.clear();
                writer.batch.push(tenant, device, message.as_bytes(), NOW, &crate::telemetry::fixture::LIMITS);
                crate::telemetry::prepare(&mut conn, &mut writer.shapes, &mut writer.batch).await.unwrap();
                // As the broker does: what was in the way of a batch may be gone by the next attempt.
                while let Err(error) = crate::telemetry::insert_batch(&mut conn, &writer.batch).await {
                    let crate::Error::Database(error) = error else { panic!("{error}") };
                    assert!(in_the_way(&error), "{error}");
                }
                count += 1;
            }
            count
        }
    });
    ensure_partitions(&mut conn, now()).await.unwrap();
    sweep(&mut conn, &retention(), from_ms(NOW + 3 * DAY_MS)).await.unwrap();
    ensure_partitions(&mut conn, now()).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    let count = writing.await.unwrap();
    assert_eq!(i64::try_from(stored(&mut conn, device).await.len()), Ok(count.min(10_000)));
    assert!(count > 0);
}

#[tokio::test]
async fn whole_days_are_dropped_when_they_are_old() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    ensure_partitions(&mut conn, now()).await.unwrap();
    store(&mut conn, &mut writer, device, -1..=7).await;
    let next = next_drop(&mut conn, &retention(), now()).await.unwrap().unwrap();
    assert_eq!((next.day, next.why, next.at), (day(-1), Why::Age, midnight(day(3))));
    assert_eq!(sweep(&mut conn, &retention(), next.at - TimeDelta::milliseconds(1)).await.unwrap(), Swept::default());
    let swept = sweep(&mut conn, &retention(), next.at + TimeDelta::days(1)).await.unwrap();
    let dropped: Vec<_> = swept.days.iter().map(|gone| (gone.day, gone.why)).collect();
    assert_eq!(dropped, [(day(-1), Why::Age), (day(0), Why::Age)]);
    assert!(swept.days[0].bytes > 0 && !swept.unfinished);
    assert_eq!(stored(&mut conn, device).await, (1..=7).collect::<Vec<_>>());
    assert_eq!(next_drop(&mut conn, &retention(), now()).await.unwrap().unwrap().day, day(1));
}

#[tokio::test]
async fn readings_later_than_their_day_are_swept_too() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    store(&mut conn, &mut Writer::new(db.tenant()), device, -6..=0).await;
    let swept = sweep(&mut conn, &retention(), now()).await.unwrap();
    assert_eq!((swept.late, swept.unfinished), (3, false));
    assert_eq!(stored(&mut conn, device).await, (-3..=0).collect::<Vec<_>>());
}

#[tokio::test]
async fn the_oldest_days_go_while_there_is_too_much_but_never_today() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    ensure_partitions(&mut conn, now()).await.unwrap();
    store(&mut conn, &mut Writer::new(db.tenant()), device, -1..=7).await;
    let later = from_ms(NOW + 2 * DAY_MS);
    let total = Partitions::read(&mut conn, Kind::Telemetry).await.unwrap().total_bytes;
    let enough = Retention { telemetry_max_bytes: total, ..retention() };
    assert_eq!(sweep(&mut conn, &enough, later).await.unwrap().days, []);
    let less = Retention { telemetry_max_bytes: total - 1, ..retention() };
    assert_eq!(
        next_drop(&mut conn, &less, later).await.unwrap().map(|next| (next.day, next.why)),
        Some((day(-1), Why::Size))
    );
    let swept = sweep(&mut conn, &less, later).await.unwrap();
    assert_eq!(swept.days.iter().map(|gone| (gone.day, gone.why)).collect::<Vec<_>>(), [(day(-1), Why::Size)]);
    let nothing = Retention { telemetry_max_bytes: 1, ..retention() };
    let swept = sweep(&mut conn, &nothing, later).await.unwrap();
    assert_eq!(swept.days.iter().map(|gone| gone.day).collect::<Vec<_>>(), [day(0), day(1)]);
    assert_eq!(stored(&mut conn, device).await, (2..=7).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_drop_that_was_interrupted_is_finished() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    ensure_partitions(&mut conn, now()).await.unwrap();
    let table = Kind::Telemetry.table_of(day(-1));
    for sql in [
        format!("alter table telemetry detach partition {table}"),
        format!("alter table {table} rename to dropped_telemetry_{}", day(-1).format("%Y%m%d")),
    ] {
        ddl(&mut conn, sql).await.unwrap();
    }
    // The day may come back before that.
    ensure_partitions(&mut conn, now()).await.unwrap();
    sweep(&mut conn, &retention(), now()).await.unwrap();
    let left = sqlx::query_scalar!("select count(*) from pg_class where relname like 'dropped%'");
    assert_eq!(left.fetch_one(&mut *conn).await.unwrap(), Some(0));
    assert_eq!(days(&mut conn).await.len(), 9);
}

#[tokio::test]
async fn a_lock_held_by_others_delays_a_sweep_and_nothing_else() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    ensure_partitions(&mut conn, now()).await.unwrap();
    store(&mut conn, &mut Writer::new(db.tenant()), device, 0..=0).await;
    let mut reader = db.pool().begin().await.unwrap();
    assert_eq!(stored(&mut reader, device).await, [0]);
    let later = from_ms(NOW + 5 * DAY_MS);
    let swept = sweep(&mut conn, &retention(), later).await.unwrap();
    assert!(swept.unfinished && swept.days.is_empty());
    reader.rollback().await.unwrap();
    assert_eq!(sweep(&mut conn, &retention(), later).await.unwrap().days.len(), 3);
}

fn letter(tenant: TenantKey, at: i64) -> DeadLetter {
    DeadLetter {
        id: DeadLetterId::new(),
        tenant,
        device: "boiler-1".parse().unwrap(),
        topic: String::new(),
        reason: String::new(),
        payload: bytes::Bytes::new(),
        received_ms: at,
    }
}

#[tokio::test]
async fn dead_letters_go_by_age_and_by_number() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let letters: Vec<_> = (0..20).map(|n| letter(db.tenant(), NOW - (30 - n) * DAY_MS - 1)).collect();
    dead_letter::insert(&mut conn, &letters).await.unwrap();
    let swept = sweep(&mut conn, &retention(), now()).await.unwrap();
    assert_eq!((swept.dead_letters, swept.unfinished), (1, false), "by age");
    let few = Retention { dead_letter_max_rows: 5, ..retention() };
    assert_eq!(sweep(&mut conn, &few, now()).await.unwrap().dead_letters, 14, "by number");
    let left = dead_letter::page(&mut conn, db.tenant(), None, None, 100).await.unwrap();
    let ids: Vec<_> = letters.iter().rev().take(5).map(|letter| letter.id).collect();
    assert_eq!(left.iter().map(|row| row.id).collect::<Vec<_>>(), ids, "the newest stay");
}

#[tokio::test]
async fn connection_events_go_by_age_and_by_number() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    for n in 0..20 {
        let event = Event {
            tenant: db.tenant(),
            device: None,
            client_id: format!("client-{n}"),
            kind: connection_event::Kind::Flapping,
            detail: serde_json::json!({}),
            at_ms: NOW - (30 - n) * DAY_MS - 1,
        };
        let mut tallies = Tallies::default();
        assert!(tallies.add(event, 1));
        connection_event::record(&mut conn, &tallies).await.unwrap();
    }
    let swept = sweep(&mut conn, &retention(), now()).await.unwrap();
    assert_eq!((swept.connection_events, swept.unfinished), (1, false), "by age");
    let few = Retention { connection_event_max_rows: 5, ..retention() };
    assert_eq!(sweep(&mut conn, &few, now()).await.unwrap().connection_events, 14, "by number");
    let left = connection_event::page(&mut conn, db.tenant(), None, None, None, 100).await.unwrap();
    let clients: Vec<_> = left.iter().map(|row| row.client_id.as_str()).collect();
    assert_eq!(clients, ["client-19", "client-18", "client-17", "client-16", "client-15"], "the newest stay");
}

#[tokio::test]
async fn answers_for_repeated_requests_go_after_a_day() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    for (key, hours) in [("old", 25), ("new", 23)] {
        sqlx::query!(
            "insert into idempotency (tenant_key, user_id, key, request_hash, status, answer, created_at)
             values ($1, gen_random_uuid(), $2, '', 201, '{}', $3)",
            db.tenant().0,
            key,
            now() - TimeDelta::hours(hours),
        )
        .execute(&mut *conn)
        .await
        .unwrap();
    }
    assert_eq!(sweep(&mut conn, &retention(), now()).await.unwrap().idempotency, 1);
    let left = sqlx::query_scalar!("select key from idempotency").fetch_all(&mut *conn).await.unwrap();
    assert_eq!(left, ["new"]);
}

#[test]
fn a_sweep_is_bounded_and_says_when_there_is_more() {
    let full = DELETE_ROWS.unsigned_abs();
    let mut rounds = Rounds::default();
    while rounds.again(full) {}
    assert_eq!((rounds.gone, rounds.unfinished), (full * u64::from(DELETE_ROUNDS), true));
    let mut rounds = Rounds::default();
    assert!(rounds.again(full) && rounds.again(full) && !rounds.again(7));
    assert_eq!((rounds.gone, rounds.unfinished), (2 * full + 7, false));
}

#[tokio::test]
async fn what_is_kept_for_ever_is_never_dropped() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    ensure_partitions(&mut conn, now()).await.unwrap();
    let always = Retention {
        telemetry_days: u32::MAX,
        telemetry_max_bytes: u64::MAX,
        log_days: u32::MAX,
        log_max_bytes: u64::MAX,
        dead_letter_days: u32::MAX,
        dead_letter_max_rows: i64::MAX,
        connection_event_days: u32::MAX,
        connection_event_max_rows: i64::MAX,
        command_days: 90,
        audit_days: u32::MAX,
        decommission_rows: 5_000,
    };
    assert_eq!(sweep(&mut conn, &always, now()).await.unwrap(), Swept::default());
    assert_eq!(next_drop(&mut conn, &always, now()).await.unwrap().map(|next| next.day), Some(day(-1)));
}

#[test]
fn only_names_made_here_are_days() {
    assert_eq!(Kind::Telemetry.day_of("telemetry_20261121"), NaiveDate::from_ymd_opt(2026, 11, 21));
    for other in ["telemetry_default", "telemetry_2026112", "telemetry_20261332", "telemetry_+0261121", "log_20261121"]
    {
        assert_eq!(Kind::Telemetry.day_of(other), None, "{other}");
    }
}
