//! What the table promises of lines.

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::*;
use crate::level::Level;
use crate::telemetry::fixture::{NOW, enrol};
use crate::testing::TestDb;

const LIMITS: Limits = Limits { max_lines: 100, max_ahead_ms: 300_000 };

/// A batch of one device's messages, received at once.
fn batch(device: DeviceKey, messages: &[&str], received_ms: i64) -> Batch {
    let mut batch = Batch::default();
    for message in messages {
        assert_eq!(batch.push(device, message.as_bytes(), received_ms, &LIMITS), []);
    }
    batch
}

async fn store(db: &mut PgConnection, writer: i16, mut batch: Batch) -> u64 {
    prepare(db, &mut batch).await.unwrap();
    insert_batch(db, writer, &batch).await.unwrap()
}

#[tokio::test]
async fn a_line_is_stored_as_it_was_sent_and_once() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let full = format!(
        r#"{{"ts":{NOW},"seq":7,"level":"warn","target":"net","message":"no carrier","fields":{{"rssi":-81}},"trace_id":"ab"}}"#
    );
    let bare = format!(r#"{{"ts":{NOW},"message":"again"}}"#);
    for new in [2, 0] {
        assert_eq!(store(&mut conn, 0, batch(device, &[&full, &bare, &bare], NOW + 5)).await, new);
    }
    let rows =
        sqlx::query!("select seq, level, target, message, trace_id, fields::text, ts from log order by seq desc");
    let rows = rows.fetch_all(&mut *conn).await.unwrap();
    let row = &rows[0];
    assert_eq!((row.seq, row.level, row.target.as_deref(), row.message.as_str()), (7, 4, Some("net"), "no carrier"));
    assert_eq!((row.trace_id.as_deref(), row.fields.as_deref()), (Some("ab"), Some(r#"{"rssi": -81}"#)));
    assert_eq!((row.ts, rows[1].seq < 0, rows.len()), (from_ms(NOW), true, 2));
}

#[tokio::test]
async fn a_clamped_line_that_comes_again_is_known() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let ahead = format!(r#"{{"ts":{},"message":"from the future"}}"#, NOW + 3_600_000);
    for (later, new) in [(0, 1), (60_000, 0)] {
        let batch = batch(device, &[&ahead], NOW + later);
        assert_eq!((batch.clamped(), store(&mut conn, 0, batch).await), (1, new));
    }
    let at = sqlx::query_scalar!("select ts from log").fetch_one(&mut *conn).await.unwrap();
    assert_eq!(at, from_ms(NOW));
}

#[tokio::test]
async fn places_follow_the_order_of_commits() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let line = |nth: usize| format!(r#"{{"ts":{NOW},"seq":{nth},"message":"x"}}"#);
    // One is uncommitted while another one of the same writer wants to go on: it has to wait.
    let mut first = db.pool().begin().await.unwrap();
    store(&mut first, 3, batch(device, &[&line(1), &line(2)], NOW)).await;
    let pool = db.pool().clone();
    let second = tokio::spawn(async move {
        let mut conn = pool.acquire().await.unwrap();
        let lines = [3, 4].map(|nth| format!(r#"{{"ts":{NOW},"seq":{nth},"message":"x"}}"#));
        store(&mut conn, 3, batch(device, &[&lines[0], &lines[1]], NOW)).await
    });
    let waits =
        "select exists (select from pg_stat_activity where wait_event_type = 'Lock' and query like '%log_writer%')";
    while !sqlx::query_scalar::<_, bool>(waits).fetch_one(&mut *conn).await.unwrap() {
        tokio::task::yield_now().await;
    }
    // Another writer need not.
    store(&mut conn, 4, batch(device, &[&line(9)], NOW)).await;
    first.commit().await.unwrap();
    assert_eq!(second.await.unwrap(), 2);
    let places = sqlx::query_scalar!("select place from log where writer = 3 order by seq");
    assert_eq!(places.fetch_all(&mut *conn).await.unwrap(), [1, 2, 3, 4]);
    assert_eq!(sqlx::query_scalar!("select place from log where writer = 4").fetch_one(&mut *conn).await.unwrap(), 1);
}

#[tokio::test]
async fn nothing_a_device_sends_makes_a_batch_fail() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let messages = [
        r#"{"message":"a\u0000b","fields":{"x\u0000":"\u0000","y":[null,1e308,18446744073709551615]}}"#,
        r#"{"message":"far","ts":0}"#,
        r#"{"message":"far","ts":253402300799999}"#,
        r#"{"message":"\ud83d\ude00 שלום e\u0301"}"#,
        "plain \u{0} text",
    ];
    assert_eq!(store(&mut conn, 0, batch(device, &messages, NOW)).await, 5);
}

#[tokio::test]
async fn lines_are_read_back_by_place_and_by_address() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let full = format!(
        r#"{{"ts":{NOW},"seq":7,"level":"warn","target":"net","message":"no carrier","fields":{{"rssi":-81}},"trace_id":"ab"}}"#
    );
    let later = format!(r#"{{"ts":{},"message":"again"}}"#, NOW + 86_400_000 * 3);
    let stored = batch(device, &[&full, &later], NOW + 86_400_000 * 3);
    // What is there already leaves its place empty.
    assert_eq!(store(&mut conn, 3, stored).await, 2);
    assert_eq!(store(&mut conn, 3, batch(device, &[&full], NOW)).await, 0);
    assert_eq!(store(&mut conn, 3, batch(DeviceKey(device.0 + 1), &["of a device that is gone"], NOW)).await, 1);

    let all = Line::read_after(&mut conn, 3, 0, 4, 10).await.unwrap();
    assert_eq!((all.lines.len(), all.reached, all.orphans), (2, 4, 1));
    let line = &all.lines[0];
    assert_eq!(line.address, Address { ts_ms: NOW, writer: 3, place: 1 });
    assert_eq!((line.device_id.as_str(), line.tenant, line.level), ("boiler-1", db.tenant(), Level::Warn));
    assert_eq!(
        (line.message.as_str(), line.trace.as_deref(), &line.fields["rssi"]),
        ("no carrier", Some("ab"), &(-81).into())
    );
    let one = Line::read_after(&mut conn, 3, 0, 4, 1).await.unwrap();
    assert_eq!((one.lines.len(), one.reached), (1, 1));
    assert_eq!(Line::read_after(&mut conn, 3, 4, 4, 10).await.unwrap(), Stretch { reached: 4, ..Stretch::default() });

    let newest_first = [all.lines[1].address, Address { place: 99, ..line.address }, line.address];
    let fetched = Line::fetch(&mut conn, &newest_first).await.unwrap();
    assert_eq!(fetched, [all.lines[1].clone(), line.clone()]);
}

/// What a device might send: JSON near the contract, text, bytes.
fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(serde_json::Value::from),
        any::<i64>().prop_map(serde_json::Value::from),
        any::<f64>().prop_map(serde_json::Value::from),
        "\\PC{0,6}|\u{0}|\u{301}|\u{202e}[a-z]".prop_map(serde_json::Value::from),
    ];
    let name = prop_oneof!["message", "msg", "level", "ts", "seq", "target", "trace_id", "fields", ".{0,4}"];
    let object = move |value: BoxedStrategy<serde_json::Value>| {
        prop::collection::vec((name.clone(), value), 0..6)
            .prop_map(|members| serde_json::Value::Object(members.into_iter().collect()))
    };
    let value = leaf.prop_recursive(4, 24, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            object.clone()(inner.boxed()),
        ]
    });
    prop_oneof![
        6 => value.prop_map(|value| value.to_string().into_bytes()),
        1 => ".{0,40}".prop_map(String::into_bytes),
        1 => prop::collection::vec(any::<u8>(), 0..40),
    ]
}

#[tokio::test]
async fn any_payloads_make_a_batch_that_is_stored_and_accounted_for() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let (mut batch, mut runner) = (Batch::default(), TestRunner::default());
    for _ in 0..2000 {
        let payload = any_payload().new_tree(&mut runner).unwrap().current();
        let before = batch.len();
        let rejected = batch.push(device, &payload, NOW, &LIMITS);
        let is_blank_array = serde_json::from_slice::<Vec<serde_json::Value>>(&payload).is_ok_and(|all| all.is_empty());
        assert!(batch.len() > before || !rejected.is_empty() || is_blank_array, "{}", payload.escape_ascii());
        assert!(rejected.iter().all(|one| !one.reason.is_empty()), "{}", payload.escape_ascii());
    }
    assert!(batch.len() > 500, "{}", batch.len());
    let new = store(&mut conn, 0, batch).await;
    let kept = sqlx::query_scalar!(r#"select count(*) as "count!" from log"#).fetch_one(&mut *conn).await.unwrap();
    assert_eq!(u64::try_from(kept).unwrap(), new);
}

/// The examples between two strings, each up to the next `end`.
fn examples(text: &'static str, begin: &'static str, end: &'static str) -> impl Iterator<Item = &'static str> {
    text.split(begin).skip(1).filter_map(move |rest| rest.split(end).next())
}

#[test]
fn the_examples_for_device_authors_are_right() {
    let page = include_str!("../../../docs/reference/payloads.md");
    let accepted = examples(page, "```json logs\n", "```").chain(examples(page, "```text logs\n", "```"));
    let read = accepted.map(|payload| {
        let mut batch = Batch::default();
        assert_eq!(batch.push(DeviceKey(1), payload.as_bytes(), NOW, &LIMITS), [], "{payload}");
        batch.len()
    });
    assert_eq!(read.collect::<Vec<_>>(), [1, 2, 2], "lines of each example");
    let reasons = page.split("| reason of a line | for example |").nth(1).and_then(|rest| rest.split("\n\n").next());
    let refused = reasons.unwrap().lines().filter_map(|line| line.rsplit("| ").next()?.split('`').nth(1));
    let refused = refused.collect::<Vec<_>>();
    assert_eq!(refused.len(), 5, "{refused:?}");
    for payload in refused {
        let mut batch = Batch::default();
        assert_eq!(
            (batch.push(DeviceKey(1), payload.as_bytes(), NOW, &LIMITS).len(), batch.len()),
            (1, 0),
            "{payload}"
        );
    }
    for (bound, said) in [
        (MAX_MESSAGE_BYTES, "| message | 32 KiB;"),
        (MAX_NAME_BYTES, "256 bytes each"),
        (MAX_FIELDS, "| fields of a line | 64,"),
        (MAX_FIELD_NAME_BYTES, "names of 1 to 128 bytes"),
    ] {
        let number = if bound >= 1024 { bound / 1024 } else { bound };
        assert!(page.contains(said) && said.contains(&number.to_string()), "{said}");
    }
}
