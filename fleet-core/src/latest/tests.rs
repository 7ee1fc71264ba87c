use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::*;
use crate::id::TenantKey;
use crate::status::{self, Change, Gaps, State};
use crate::telemetry::Batch;
use crate::telemetry::fixture::{LIMITS, NOW, Writer, enrol};
use crate::testing::TestDb;

/// A reading of one or more metrics.
fn reading(ts: i64, seq: i64, values: &Value) -> String {
    json!({"ts": ts, "seq": seq, "values": values}).to_string()
}

/// The newest values: metric → time, value.
async fn newest(db: &mut PgConnection, device: DeviceKey) -> BTreeMap<String, (i64, Value)> {
    let all = latest(db, device).await.unwrap();
    assert!(all.is_sorted_by_key(|value| value.metric.clone()));
    all.into_iter().map(|value| (value.metric, (value.ts.timestamp_millis(), value.value))).collect()
}

fn expected<const N: usize>(values: [(&str, i64, Value); N]) -> BTreeMap<String, (i64, Value)> {
    values.into_iter().map(|(metric, ts, value)| (metric.to_owned(), (ts, value))).collect()
}

async fn gaps(db: &mut PgConnection, device: DeviceKey) -> Gaps {
    status::get(db, device).await.unwrap().expect("it was heard of").sequence
}

#[tokio::test]
async fn the_newest_value_is_seen_at_once_and_after_a_flush() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    assert_eq!(newest(&mut conn, device).await, expected([]));
    let first = json!({"temp": 20, "door": true, "mode": "eco"});
    writer.store(&mut conn, device, &[&reading(NOW, 1, &first)], NOW).await;
    let after_first = expected([("door", NOW, json!(true)), ("mode", NOW, json!("eco")), ("temp", NOW, json!(20))]);
    assert_eq!(newest(&mut conn, device).await, after_first, "before any flush");
    writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(newest(&mut conn, device).await, after_first, "after it");
    writer.store(&mut conn, device, &[&reading(NOW + 5, 2, &json!({"temp": 21.5, "door": false}))], NOW + 5).await;
    let after_second =
        expected([("door", NOW + 5, json!(false)), ("mode", NOW, json!("eco")), ("temp", NOW + 5, json!(21.5))]);
    assert_eq!(newest(&mut conn, device).await, after_second, "laid over what was flushed");
    let flushed = writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!((flushed.devices, flushed.loaded), (1, 0));
    assert_eq!(newest(&mut conn, device).await, after_second);
    assert_eq!(writer.tracker.flush(&mut conn).await.unwrap(), Flushed::default(), "nothing is written twice");
}

#[tokio::test]
async fn a_late_value_never_replaces_a_newer_one() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    writer.store(&mut conn, device, &[&reading(NOW, 5, &json!({"temp": 20}))], NOW).await;
    writer.tracker.flush(&mut conn).await.unwrap();
    let late = reading(NOW - 60_000, 4, &json!({"temp": 1, "rare": 7}));
    writer.store(&mut conn, device, &[&late], NOW + 1).await;
    assert_eq!(newest(&mut conn, device).await["temp"], (NOW, json!(20)));
    writer.tracker.flush(&mut conn).await.unwrap();
    let both = expected([("rare", NOW - 60_000, json!(7)), ("temp", NOW, json!(20))]);
    assert_eq!(newest(&mut conn, device).await, both, "but it may be the newest of a rarer metric");
    // The same from another writer, which knows nothing.
    let mut other = Writer::new(db.tenant());
    other.store(&mut conn, device, &[&reading(NOW - 70_000, 3, &json!({"temp": 2, "rare": 2}))], NOW + 2).await;
    other.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(newest(&mut conn, device).await, both);
}

#[tokio::test]
async fn of_two_readings_at_one_time_the_higher_number_is_newer() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    for (seq, value) in [(8, "eight"), (7, "seven")] {
        writer.store(&mut conn, device, &[&reading(NOW, seq, &json!({"a": value}))], NOW).await;
        assert_eq!(newest(&mut conn, device).await["a"].1, json!("eight"));
    }
    writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(newest(&mut conn, device).await["a"].1, json!("eight"));
}

#[tokio::test]
async fn a_large_value_is_read_from_its_reading() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let picture = "x".repeat(MAX_VALUE_BYTES);
    let sent = json!({"picture": picture, "temp": 1});
    writer.store(&mut conn, device, &[&reading(NOW, 1, &sent)], NOW).await;
    writer.store(&mut conn, device, &[&reading(NOW + 1, 2, &json!({"temp": 2}))], NOW).await;
    let both = expected([("picture", NOW, json!(picture)), ("temp", NOW + 1, json!(2))]);
    assert_eq!(newest(&mut conn, device).await, both);
    writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(newest(&mut conn, device).await, both);
    let kept = sqlx::query_scalar!("select length(doc::text) from device_latest").fetch_one(&mut *conn).await.unwrap();
    assert!(kept.unwrap() < 200, "the row of the newest values stays small");
    // It survives being read back, and goes with its reading.
    let mut other = Writer::new(db.tenant());
    other.store(&mut conn, device, &[&reading(NOW + 2, 3, &json!({"temp": 3}))], NOW).await;
    other.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(newest(&mut conn, device).await["picture"], (NOW, json!(picture)));
    sqlx::query!("delete from telemetry where seq = 1").execute(&mut *conn).await.unwrap();
    assert_eq!(newest(&mut conn, device).await, expected([("temp", NOW + 2, json!(3))]));
}

#[tokio::test]
async fn the_metrics_of_a_device_are_bounded() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let sent: Vec<String> = (0..1_100_i64).map(|n| reading(NOW + n, n, &json!({ format!("metric-{n}"): n }))).collect();
    writer.store(&mut conn, device, &sent.iter().map(String::as_str).collect::<Vec<_>>(), NOW).await;
    let flushed = writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(flushed.metrics_dropped, 1_100 - MAX_METRICS as u64);
    let kept = newest(&mut conn, device).await;
    assert_eq!(kept.len(), MAX_METRICS);
    assert!(kept.contains_key("metric-1099") && !kept.contains_key("metric-0"), "the oldest go");
}

#[tokio::test]
async fn gaps_are_counted_and_late_arrivals_fill_them() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    for (seqs, last_seq, missing, ranges) in [
        (vec![10, 11, 15], 15, 3, vec![(12, 14)]),
        (vec![20], 20, 7, vec![(12, 14), (16, 19)]),
        (vec![13, 18, 18], 20, 5, vec![(12, 12), (14, 14), (16, 17), (19, 19)]),
    ] {
        for seq in seqs {
            writer.store(&mut conn, device, &[&reading(NOW + seq, seq, &json!({}))], NOW).await;
        }
        writer.tracker.flush(&mut conn).await.unwrap();
        let known = gaps(&mut conn, device).await;
        assert_eq!(known, Gaps { last_seq: Some(last_seq), missing, missing_ranges: ranges });
    }
    // Readings without a number of their own have no part in it.
    writer.store(&mut conn, device, &[r#"{"a":1}"#], NOW).await;
    writer.tracker.flush(&mut conn).await.unwrap();
    let known = status::get(&mut conn, device).await.unwrap().unwrap();
    assert_eq!((known.sequence.last_seq, known.received), (Some(20), 8));
}

#[tokio::test]
async fn another_boot_restarts_the_numbers_and_the_same_one_does_not() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let birth = |boot: &str| {
        [Change::decode(device, json!({"state": "online", "boot_id": boot}).to_string().as_bytes(), NOW).unwrap()]
    };
    let rounds = [
        ("a", [100, 103], 103, 2),
        ("a", [104, 106], 106, 3),
        ("b", [0, 1], 1, 0),
        ("b", [1, 3], 3, 1),
        ("a", [7, 8], 8, 0),
    ];
    // Once with a state that is held, once with one that must be read.
    for forget in [false, true] {
        for (boot, seqs, last_seq, missing) in rounds {
            status::record(&mut conn, &birth(boot)).await.unwrap();
            writer.tracker.note_changes(&birth(boot));
            for seq in seqs {
                writer.store(&mut conn, device, &[&reading(NOW + seq, seq, &json!({}))], NOW).await;
            }
            writer.tracker.flush(&mut conn).await.unwrap();
            let known = gaps(&mut conn, device).await;
            assert_eq!((known.last_seq, known.missing), (Some(last_seq), missing), "{boot} {forget}");
            if forget {
                writer.tracker = Tracker::new(10);
            }
        }
        status::record(&mut conn, &birth("c")).await.unwrap();
        writer.tracker.note_changes(&birth("c"));
    }
}

#[tokio::test]
async fn after_a_crash_before_the_flush_nothing_is_missed() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    for seq in 1..=4 {
        writer.store(&mut conn, device, &[&reading(NOW + seq, seq, &json!({"a": seq}))], NOW).await;
        if seq == 2 {
            writer.tracker.flush(&mut conn).await.unwrap();
        }
    }
    // 3 and 4 were committed and acknowledged, and never flushed. A sign of life alone tells nothing of them.
    let mut writer = Writer::new(db.tenant());
    writer.tracker.note_seen(device, NOW + 5);
    writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(gaps(&mut conn, device).await.last_seq, Some(2));
    writer.store(&mut conn, device, &[&reading(NOW + 6, 6, &json!({"b": 6}))], NOW).await;
    writer.tracker.flush(&mut conn).await.unwrap();
    let known = gaps(&mut conn, device).await;
    assert_eq!((known.last_seq, known.missing, known.missing_ranges), (Some(6), 1, vec![(5, 5)]));
    let values = expected([("a", NOW + 4, json!(4)), ("b", NOW + 6, json!(6))]);
    assert_eq!(newest(&mut conn, device).await, values);
    // The same before the first flush ever.
    let fresh = enrol(&mut conn, db.tenant(), "boiler-2").await;
    writer.store(&mut conn, fresh, &[&reading(NOW, 1, &json!({"a": 1}))], NOW).await;
    let mut writer = Writer::new(db.tenant());
    writer.store(&mut conn, fresh, &[&reading(NOW + 1, 2, &json!({"b": 2}))], NOW).await;
    writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!(newest(&mut conn, fresh).await.len(), 2);
}

#[tokio::test]
async fn what_is_held_is_bounded() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let mut devices = Vec::new();
    for n in 0..6 {
        devices.push(enrol(&mut conn, db.tenant(), &format!("d{n}")).await);
    }
    let mut writer = Writer { tracker: Tracker::new(4), ..Writer::new(db.tenant()) };
    for (n, device) in devices.iter().enumerate() {
        assert_eq!(writer.tracker.wants_flush(), n >= 4);
        writer.store(&mut conn, *device, &[&reading(NOW, 1, &json!({"a": n}))], NOW).await;
    }
    let flushed = writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!((flushed.devices, flushed.skipped, writer.tracker.len()), (4, 2, 4));
    // The two that found no room were committed all the same, and catch up.
    for device in &devices[4..] {
        writer.store(&mut conn, *device, &[&reading(NOW + 2, 3, &json!({"b": 1}))], NOW).await;
    }
    let flushed = writer.tracker.flush(&mut conn).await.unwrap();
    assert_eq!((flushed.devices, flushed.loaded, flushed.skipped), (2, 2, 0));
    assert!(flushed.evicted >= 2 && writer.tracker.len() <= 4, "{flushed:?}");
    for device in devices {
        assert!(newest(&mut conn, device).await.contains_key("a"));
    }
}

#[tokio::test]
async fn one_flush_is_bounded_and_nobody_waits_for_ever() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let keys = sqlx::query_scalar!(
        "insert into device (tenant_key, id, created_at, updated_at)
         select $1, 'd' || n, 'epoch', 'epoch' from generate_series(1, 1500) n returning key",
        db.tenant().0,
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap();
    let mut tracker = Tracker::new(10_000);
    let mut written = Vec::new();
    // The first thousand are heard of again before each flush.
    for round in 0..3 {
        for key in keys.iter().take(if round == 0 { 1_500 } else { 1_000 }) {
            tracker.note_seen(DeviceKey(*key), NOW + round);
        }
        written.push(tracker.flush_some(&mut conn).await.unwrap().devices);
    }
    assert_eq!(written, [1_000; 3]);
    let seen = sqlx::query_scalar!("select count(*) from device_status").fetch_one(&mut *conn).await.unwrap();
    assert_eq!(seen, Some(1_500));
}

#[tokio::test]
async fn a_device_that_was_deleted_meanwhile_is_skipped() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let gone = enrol(&mut conn, db.tenant(), "gone").await;
    let stays = enrol(&mut conn, db.tenant(), "stays").await;
    let mut writer = Writer::new(db.tenant());
    for device in [gone, stays] {
        writer.store(&mut conn, device, &[&reading(NOW, 1, &json!({"a": 1}))], NOW).await;
    }
    sqlx::query!("delete from device where key = $1", gone.0).execute(&mut *conn).await.unwrap();
    writer.tracker.flush(&mut conn).await.unwrap();
    // And once its rows were there.
    let later = enrol(&mut conn, db.tenant(), "later").await;
    for round in 0..2 {
        for device in [later, stays] {
            writer.store(&mut conn, device, &[&reading(NOW + round, 2 + round, &json!({"a": 1}))], NOW).await;
        }
        writer.tracker.flush(&mut conn).await.unwrap();
        sqlx::query!("delete from device where key = $1", later.0).execute(&mut *conn).await.unwrap();
    }
    assert!(status::get(&mut conn, later).await.unwrap().is_none());
    assert!(status::get(&mut conn, stays).await.unwrap().is_some());
    assert!(status::get(&mut conn, gone).await.unwrap().is_none());
}

#[tokio::test]
async fn whoever_is_heard_of_again_is_not_lost() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "behind-a-gateway").await;
    let mut writer = Writer::new(db.tenant());
    status::record(&mut conn, &[Change::connected(device, NOW), Change::lost(device, NOW + 10, "timeout")])
        .await
        .unwrap();
    for (at, state) in [(NOW + 5, State::Lost), (NOW + 20, State::Online)] {
        writer.tracker.note_seen(device, at);
        writer.tracker.flush(&mut conn).await.unwrap();
        let known = status::get(&mut conn, device).await.unwrap().unwrap();
        assert_eq!(known.state, state, "seen at {at}");
    }
    let known = status::get(&mut conn, device).await.unwrap().unwrap();
    assert_eq!((known.last_seen_at, known.state_since), (from_ms(NOW + 20), from_ms(NOW + 20)));
}

#[tokio::test]
async fn a_failed_flush_is_made_up_for() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    writer.store(&mut conn, device, &[&reading(NOW, 1, &json!({"a": 1}))], NOW).await;
    sqlx::query!("alter table device_status rename to elsewhere").execute(&mut *conn).await.unwrap();
    assert!(writer.tracker.flush(&mut conn).await.is_err());
    sqlx::query!("alter table elsewhere rename to device_status").execute(&mut *conn).await.unwrap();
    writer.tracker.flush(&mut conn).await.unwrap();
    let known = status::get(&mut conn, device).await.unwrap().unwrap();
    assert_eq!((known.received, known.sequence.last_seq), (1, Some(1)));
}

/// A model: random readings of a few devices in random order of time, a tracker too small for all of them, flushes now
/// and then. Afterwards the newest values, the counts and the gaps are those of a plain sum over all readings.
#[tokio::test]
async fn it_agrees_with_a_plain_sum_over_all_readings() {
    use rand::{RngExt as _, SeedableRng as _};
    let mut rng = rand::rngs::StdRng::seed_from_u64(11);
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let tenant: TenantKey = db.tenant();
    let mut devices = Vec::new();
    for n in 0..8 {
        devices.push(enrol(&mut conn, tenant, &format!("d{n}")).await);
    }
    let mut writer = Writer { tracker: Tracker::new(5), ..Writer::new(tenant) };
    let mut model: BTreeMap<DeviceKey, BTreeMap<String, (i64, i64, Value)>> = BTreeMap::new();
    let mut sent: BTreeMap<DeviceKey, Vec<i64>> = BTreeMap::new();
    for _ in 0..150 {
        let mut batch = Batch::new();
        // At most as many devices between two flushes as there is room for.
        for device in &devices[..] {
            if !rng.random_bool(0.5)
                || batch.rows().map(|row| row.device).collect::<std::collections::BTreeSet<_>>().len() >= 5
            {
                continue;
            }
            for _ in 0..rng.random_range(1..4) {
                let numbers = sent.entry(*device).or_default();
                let seq = if numbers.is_empty() { 50 } else { rng.random_range(50..200) };
                numbers.push(seq);
                // The time follows from the number, so that a number sent twice is one reading.
                let ts = NOW - 1_000_000 + (seq * 7_919) % 1_000;
                let metric = ["a", "b", "c"][usize::try_from(seq % 3).unwrap()];
                let value = if seq % 5 == 0 { json!(format!("text {seq}")) } else { json!(seq) };
                batch.push(tenant, *device, reading(ts, seq, &json!({metric: value})).as_bytes(), NOW, &LIMITS);
                let newest =
                    model.entry(*device).or_default().entry(metric.to_owned()).or_insert((ts, seq, value.clone()));
                if (ts, seq) > (newest.0, newest.1) {
                    *newest = (ts, seq, value);
                }
            }
        }
        crate::telemetry::prepare(&mut conn, &mut writer.shapes, &mut batch).await.unwrap();
        crate::telemetry::insert_batch(&mut conn, &batch).await.unwrap();
        writer.tracker.note(&batch);
        let flushed = writer.tracker.flush(&mut conn).await.unwrap();
        assert_eq!(flushed.skipped, 0);
    }
    for device in devices {
        let found = newest(&mut conn, device).await;
        let plain =
            model[&device].iter().map(|(metric, (ts, _, value))| (metric.clone(), (*ts, value.clone()))).collect();
        assert_eq!(found, plain);
        let known = status::get(&mut conn, device).await.unwrap().unwrap();
        assert_eq!(usize::try_from(known.received), Ok(sent[&device].len()));
        let highest = sent[&device].iter().max().copied();
        assert_eq!(known.sequence.last_seq, highest);
    }
}
