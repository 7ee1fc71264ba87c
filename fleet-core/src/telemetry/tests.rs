use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use serde_json::{Value, json};

use super::fixture::{LIMITS, NOW, Writer, enrol};
use super::*;
use crate::testing::TestDb;

const TENANT: TenantKey = TenantKey(1);
const DEVICE: DeviceKey = DeviceKey(7);

/// What one message is refused for.
fn refused(payload: &str) -> String {
    let mut batch = Batch::new();
    let rejected = batch.push(TENANT, DEVICE, payload.as_bytes(), NOW, &LIMITS);
    assert_eq!((rejected.len(), batch.len()), (1, 0), "{payload}");
    assert_eq!(rejected[0].payload, payload.as_bytes());
    rejected[0].reason.clone()
}

/// The readings of messages that are all good, as metric → value, with ts and seq.
fn decoded(payload: &str) -> Vec<(i64, i64, Value)> {
    let mut batch = Batch::new();
    assert_eq!(batch.push(TENANT, DEVICE, payload.as_bytes(), NOW, &LIMITS), [], "{payload}");
    batch.rows().map(|row| (row.ts_ms, row.seq, values(&row))).collect()
}

fn values(row: &Row<'_>) -> Value {
    let mut all: serde_json::Map<String, Value> =
        row.rest.map_or_else(Default::default, |rest| serde_json::from_str(rest).expect("rest is an object"));
    let metrics = row.shape.map(|shape| shape.metrics.as_slice()).unwrap_or_default();
    assert_eq!(metrics.len(), row.nums.len());
    all.extend(metrics.iter().zip(row.nums).map(|((name, kind), value)| (name.to_string(), number(*kind, *value))));
    all.into()
}

fn query(device: DeviceKey, metric: Option<&str>) -> Query {
    Query {
        device,
        metric: metric.map(str::to_owned),
        from: from_ms(0),
        to: from_ms(NOW + 1_000_000),
        order: Order::Asc,
        limit: MAX_POINTS,
        after: None,
    }
}

#[test]
fn a_message_is_an_object_or_an_array_of_objects() {
    let enveloped = r#"{"v":1,"values":{"temp":21.5,"door":true},"seq":9,"ts":1763692212345}"#;
    let expected = (1_763_692_212_345, 9, json!({"temp": 21.5, "door": true}));
    assert_eq!(decoded(enveloped), std::slice::from_ref(&expected));
    assert_eq!(decoded(&format!(" [{enveloped},{{\"temp\":1}}]"))[0], expected);
    let bare = decoded(r#"{"temp":-3,"mode":"eco","gps":[1.5,{"b":1,"a":null}]}"#);
    assert_eq!(bare[0].0, NOW, "no time of its own: that of receipt");
    assert!(bare[0].1 < 0, "a hash stands in");
    assert_eq!(bare[0].2, json!({"temp": -3, "mode": "eco", "gps": [1.5, {"a": null, "b": 1}]}));
    assert_eq!(decoded("[]"), []);
    assert_eq!(decoded("{}")[0].2, json!({}));
    assert_eq!(decoded(r#"{"ts":null,"seq":5.0,"values":{}}"#)[0], (NOW, 5, json!({})));
}

#[test]
fn the_last_of_two_members_of_one_name_counts() {
    for (payload, expected) in [
        (r#"{"a":1,"b":2,"a":3}"#, json!({"a": 3, "b": 2})),
        (r#"{"a":1,"a":true}"#, json!({"a": true})),
        (r#"{"a":1,"a":"x"}"#, json!({"a": "x"})),
        (r#"{"a":"x","b":"y","a":1}"#, json!({"a": 1, "b": "y"})),
        (r#"{"values":{"a":1},"values":{"b":1}}"#, json!({"b": 1})),
        (r#"{"a":"x","a":1}"#, json!({"a": 1})),
    ] {
        assert_eq!(decoded(payload)[0].2, expected, "{payload}");
    }
}

#[test]
fn what_stands_beside_values_is_not_looked_at() {
    let deep = format!("{}1{}", "[".repeat(100), "]".repeat(100));
    for beside in [r#""\u0000""#, "\"x\"", &deep, "null"] {
        for payload in [
            format!(r#"{{"meta":{beside},"seq":1,"values":{{"a":1}}}}"#),
            format!(r#"{{"values":{{"a":1}},"seq":1,"":{beside}}}"#),
        ] {
            assert_eq!(decoded(&payload)[0].2, json!({"a": 1}), "{payload}");
        }
    }
}

#[test]
fn a_payload_that_cannot_be_kept_says_why() {
    let long = "x".repeat(MAX_METRIC_NAME_BYTES + 1);
    let deep = |n: usize| format!("{{\"a\":{}{}}}", "[".repeat(n), "]".repeat(n));
    let many = (0..=LIMITS.max_metrics).map(|n| format!("\"m{n}\":{n}")).collect::<Vec<_>>().join(",");
    for (payload, reason) in [
        ("", "not readable as JSON"),
        ("hello", "not readable as JSON"),
        ("21.5", "expected an object of metrics"),
        ("{\"a\":1", "not readable as JSON"),
        ("{\"a\":1} x", "not readable as JSON"),
        ("[{\"a\":1}", "not readable as JSON"),
        ("{\"a\":NaN}", "not readable as JSON"),
        ("{\"a\":1e400}", "not readable as JSON"),
        (r#"{"a":"\ud800"}"#, "not readable as JSON"),
        (r#"{"ts":1,"temp":2}"#, "without `values`"),
        (r#"{"seq":1,"temp":2}"#, "without `values`"),
        (r#"{"values":5}"#, "`values` is not an object"),
        (r#"{"values":[{"a":1}]}"#, "`values` is not an object"),
        (r#"{"ts":-1,"values":{}}"#, "`ts` is not an integer from 0"),
        (r#"{"ts":1.5,"values":{}}"#, "`ts` is not an integer from 0"),
        (r#"{"ts":"2026-11-21","values":{}}"#, "`ts` is not an integer from 0"),
        (r#"{"ts":1763692212345678901,"values":{}}"#, "`ts` is not an integer from 0"),
        (r#"{"seq":-1,"values":{}}"#, "`seq` is not an integer from 0"),
        (r#"{"values":{},"seq":{}}"#, "`seq` is not an integer from 0"),
        (r#"{"":1}"#, "empty name"),
        (&format!("{{\"{long}\":1}}"), "longer than 128 bytes"),
        (r#"{"a\u0000":1}"#, "U+0000"),
        (r#"{"a":"b\u0000"}"#, "U+0000"),
        (r#"{"a":[{"b\u0000":1}]}"#, "U+0000"),
        (&deep(MAX_VALUE_DEPTH + 1), "nested more than 32 deep"),
        (&deep(5_000), "nested more than 32 deep"),
        (&format!("{{{many}}}"), "more than 20 metrics"),
        (&format!("{{\"values\":{{{many}}}}}"), "more than 20 metrics"),
        (&format!("[{}]", vec!["{}"; LIMITS.max_readings + 1].join(",")), "more than 50 readings"),
        (&format!("{{\"a\":\"{}\"}}", "x".repeat(MAX_REST_BYTES)), "take more than"),
    ] {
        let given = refused(payload);
        assert!(given.contains(reason), "{}: {given}", &payload[..payload.len().min(60)]);
    }
}

#[test]
fn the_good_elements_of_an_array_are_kept() {
    let mut batch = Batch::new();
    let rejected = batch.push(TENANT, DEVICE, br#"[{"a":1},{"ts":"x","values":{}},7,{"a":1}]"#, NOW, &LIMITS);
    let reported: Vec<&[u8]> = rejected.iter().map(|rejected| rejected.payload.as_slice()).collect();
    assert_eq!(reported, [br#"{"ts":"x","values":{}}"#.as_slice(), b"7"]);
    assert_eq!(batch.len(), 2);
    assert_ne!(batch.seq[0], batch.seq[1], "equal elements of one message are two readings");
}

#[test]
fn a_hash_depends_on_the_values_alone_and_never_changes() {
    let hash = |payload: &str| decoded(payload)[0].1;
    let first = hash(r#"{"ts":5,"values":{"a":1,"b":"x","c":{"p":1,"q":2}}}"#);
    assert_eq!(first, hash(r#"{"values":{"c":{"q":2,"p":1},"b":"x","a":1.0},"ts":5}"#));
    for other in [
        r#"{"ts":5,"values":{"a":2,"b":"x","c":{"p":1,"q":2}}}"#,
        r#"{"ts":5,"values":{"a":true,"b":"x","c":{"p":1,"q":2}}}"#,
        r#"{"ts":5,"values":{"a":1,"b":"y","c":{"p":1,"q":2}}}"#,
        r#"{"ts":5,"values":{"d":1,"b":"x","c":{"p":1,"q":2}}}"#,
    ] {
        assert_ne!(first, hash(other), "{other}");
    }
    assert_eq!(hash(r#"{"ts":5,"values":{"a":0.0}}"#), hash(r#"{"ts":5,"values":{"a":-0.0}}"#));
    // A redelivery may reach a newer server than the first delivery did.
    assert_eq!(hash(r#"{"ts":5,"values":{"temp":21.5,"door":true}}"#), PINNED_HASH);
}

const PINNED_HASH: i64 = -2_855_132_095_161_061_213;

#[test]
fn a_clock_that_runs_ahead_is_clamped_and_flagged() {
    let limit = NOW + LIMITS.max_ahead_ms;
    assert_eq!(decoded(&format!(r#"{{"ts":{limit},"values":{{}}}}"#))[0].0, limit);
    let mut batch = Batch::new();
    let ahead = format!(r#"[{{"ts":{},"values":{{"a":1}}}},{{"ts":{},"values":{{"a":1}}}}]"#, limit + 1, limit + 2);
    batch.push(TENANT, DEVICE, ahead.as_bytes(), NOW, &LIMITS);
    assert_eq!(
        (batch.ts_ms.as_slice(), batch.sent_at.as_slice()),
        ([NOW; 2].as_slice(), [(0, limit + 1), (1, limit + 2)].as_slice())
    );
    assert_ne!(batch.seq[0], batch.seq[1], "clamped to one time, still two readings");
    assert_eq!(batch.clamped(), 2);
}

#[test]
fn a_cleared_batch_forgets_readings_and_bounds_what_it_remembers() {
    let mut batch = Batch::new();
    for n in 0..5_000 {
        batch.push(TENANT, DEVICE, format!("{{\"m{n}\":1}}").as_bytes(), NOW, &LIMITS);
    }
    batch.clear();
    assert!(batch.is_empty() && batch.rows().next().is_none());
    batch.push(TENANT, DEVICE, b"{\"m1\":1}", NOW, &LIMITS);
    assert_eq!(batch.interner.shapes_known(), 1);
}

#[tokio::test]
async fn a_reading_sent_twice_is_stored_once() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let numbered = r#"{"ts":1795228800000,"seq":1,"values":{"temp":21.5}}"#;
    let hashed = r#"{"ts":1795228800000,"values":{"temp":21.5,"mode":"eco"}}"#;
    assert_eq!(writer.store(&mut conn, device, &[numbered, hashed, numbered], NOW).await, 2);
    assert_eq!(writer.store(&mut conn, device, &[hashed, numbered], NOW + 60_000).await, 0);
    let other = enrol(&mut conn, db.tenant(), "boiler-2").await;
    assert_eq!(writer.store(&mut conn, other, &[numbered], NOW).await, 1, "another device's is another reading");
}

#[tokio::test]
async fn a_clamped_reading_keeps_the_time_of_its_first_receipt() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let ahead = format!(r#"{{"ts":{},"seq":1,"values":{{"a":1}}}}"#, NOW + 86_400_000);
    assert_eq!(writer.store(&mut conn, device, &[&ahead], NOW).await, 1);
    assert_eq!(writer.store(&mut conn, device, &[&ahead], NOW + 5_000).await, 0);
    // Both in one batch, received at different times.
    let next = ahead.replace("\"seq\":1", "\"seq\":2");
    writer.batch.clear();
    for at in [NOW + 6_000, NOW + 7_000] {
        writer.batch.push(db.tenant(), device, next.as_bytes(), at, &LIMITS);
    }
    prepare(&mut conn, &mut writer.shapes, &mut writer.batch).await.unwrap();
    prepare(&mut conn, &mut writer.shapes, &mut writer.batch).await.unwrap();
    assert_eq!(insert_batch(&mut conn, &writer.batch).await.unwrap(), 1);
    let points = points(&mut conn, &query(device, None)).await.unwrap();
    let times: Vec<_> = points.iter().map(|point| (point.ts, point.sent_at)).collect();
    let sent_at = Some(from_ms(NOW + 86_400_000));
    assert_eq!(times, [(from_ms(NOW), sent_at), (from_ms(NOW + 6_000), sent_at)]);
}

#[tokio::test]
async fn late_readings_are_accepted_however_old() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let old = [r#"{"ts":0,"seq":1,"values":{"a":1}}"#, r#"{"ts":1000000000000,"seq":2,"values":{"a":2}}"#];
    assert_eq!(writer.store(&mut conn, device, &old, NOW).await, 2);
    assert_eq!(points(&mut conn, &query(device, Some("a"))).await.unwrap().len(), 2);
}

#[tokio::test]
async fn values_leave_as_they_came() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let sent = json!({
        "whole": 21, "real": 21.25, "big": 9_007_199_254_740_993_i64, "huge": 1e300, "tiny": 5e-324, "low": -1e-7,
        "on": true, "off": false, "text": "ä\"\\ \u{1f600}", "none": null, "list": [1, 2.5, "x"], "object": {"a": {"b": []}},
    });
    writer.store(&mut conn, device, &[&json!({"ts": NOW, "seq": 1, "values": sent}).to_string()], NOW).await;
    let stored = points(&mut conn, &query(device, None)).await.unwrap().remove(0);
    assert_eq!(Value::Object(stored.values), sent);
    for (metric, value) in sent.as_object().unwrap() {
        let one = points(&mut conn, &query(device, Some(metric))).await.unwrap().remove(0);
        assert_eq!(one.values.get(metric), Some(value), "{metric}");
        assert_eq!(one.values.len(), 1);
    }
    assert_eq!(points(&mut conn, &query(device, Some("absent"))).await.unwrap(), []);
}

#[tokio::test]
async fn beyond_the_shapes_of_a_tenant_readings_are_stored_whole() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer { shapes: Shapes::new(2), ..Writer::new(db.tenant()) };
    for (seq, values) in [
        (1, json!({"a": 1})),
        (2, json!({"a": 1, "b": true})),
        (3, json!({"a": 3.5, "b": false, "c": 1, "text": "x"})),
        (4, json!({"a": 4})),
        (5, json!({"d": 1})),
    ] {
        let message = json!({"ts": NOW + seq, "seq": seq, "values": values}).to_string();
        assert_eq!(writer.store(&mut conn, device, &[&message], NOW).await, 1);
    }
    assert_eq!(writer.shapes.full_tenants(), 1);
    let shapes = sqlx::query_scalar!("select count(*) from shape").fetch_one(&mut *conn).await.unwrap();
    assert_eq!(shapes, Some(2));
    let whole = points(&mut conn, &query(device, None)).await.unwrap();
    assert_eq!(Value::Object(whole[2].values.clone()), json!({"a": 3.5, "b": false, "c": 1, "text": "x"}));
    let one = points(&mut conn, &query(device, Some("a"))).await.unwrap();
    let series: Vec<_> = one.iter().map(|point| point.values["a"].clone()).collect();
    assert_eq!(series, [json!(1), json!(1), json!(3.5), json!(4)], "a series reads both forms");
    let all = buckets(&mut conn, device, "a", from_ms(NOW), from_ms(NOW + 100), Duration::from_mins(1)).await.unwrap();
    assert_eq!((all[0].count, all[0].max, all[0].last), (4, 4.0, 4.0));
    let booleans =
        buckets(&mut conn, device, "b", from_ms(NOW), from_ms(NOW + 100), Duration::from_mins(1)).await.unwrap();
    assert_eq!((booleans[0].count, booleans[0].avg), (2, 0.5));
}

#[tokio::test]
async fn a_rollback_leaves_no_shape_without_a_row() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    writer.batch.push(db.tenant(), device, br#"{"ts":1,"seq":1,"values":{"a":1}}"#, NOW, &LIMITS);
    prepare(&mut conn, &mut writer.shapes, &mut writer.batch).await.unwrap();
    let mut tx = sqlx::Connection::begin(&mut *conn).await.unwrap();
    insert_batch(&mut tx, &writer.batch).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(insert_batch(&mut conn, &writer.batch).await.unwrap(), 1);
    let stored = points(&mut conn, &query(device, None)).await.unwrap();
    assert_eq!(stored[0].values["a"], json!(1));
}

#[tokio::test]
async fn shapes_a_standby_never_had_are_made_again() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    writer.store(&mut conn, device, &[r#"{"ts":1,"seq":1,"values":{"a":1}}"#], NOW).await;
    sqlx::query!("delete from shape").execute(&mut *conn).await.unwrap();
    writer.shapes.forget();
    writer.store(&mut conn, device, &[r#"{"ts":2,"seq":2,"values":{"a":2}}"#], NOW).await;
    let newest = points(&mut conn, &Query { order: Order::Desc, ..query(device, None) }).await.unwrap();
    assert_eq!(newest[0].values["a"], json!(2));
}

#[tokio::test]
async fn readings_of_a_tenant_that_is_gone_do_no_harm() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let mut writer = Writer::new(TenantKey(999));
    assert_eq!(writer.store(&mut conn, DeviceKey(999), &[r#"{"a":1}"#], NOW).await, 1);
}

#[tokio::test]
async fn a_page_goes_on_where_the_last_one_ended() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    // Two of each time, over several days and the default partition.
    let mut sent = Vec::new();
    for n in 0..20_i64 {
        sent.push(json!({"ts": NOW - (n / 2) * 40_000_000, "seq": n, "values": {"a": n, "b": "x"}}).to_string());
    }
    writer.store(&mut conn, device, &sent.iter().map(String::as_str).collect::<Vec<_>>(), NOW).await;
    for metric in [None, Some("a"), Some("b")] {
        for order in [Order::Asc, Order::Desc] {
            let mut seen = Vec::new();
            let mut page = Query { order, limit: 3, ..query(device, metric) };
            loop {
                let points = points(&mut conn, &page).await.unwrap();
                let Some(last) = points.last() else { break };
                page.after = Some((last.ts, last.seq));
                seen.extend(points.iter().map(|point| (point.ts, point.seq)));
            }
            let mut expected: Vec<_> = (0..20).map(|n| (from_ms(NOW - (n / 2) * 40_000_000), n)).collect();
            expected.sort_unstable();
            if order == Order::Desc {
                expected.reverse();
            }
            assert_eq!(seen, expected, "{metric:?} {order:?}");
        }
    }
    let within = Query { from: from_ms(NOW - 40_000_000), to: from_ms(NOW), ..query(device, None) };
    let seqs: Vec<_> = points(&mut conn, &within).await.unwrap().iter().map(|point| point.seq).collect();
    assert_eq!(seqs, [2, 3], "from is included, to is not");
}

#[tokio::test]
async fn buckets_hold_what_fell_into_them() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let sent = [(0, json!(3)), (10, json!(1.5)), (59_999, json!(2)), (60_000, json!("text")), (120_000, json!(-7))];
    let sent: Vec<_> =
        sent.into_iter().map(|(at, v)| json!({"ts": NOW + at, "seq": at, "values": {"a": v}}).to_string()).collect();
    writer.store(&mut conn, device, &sent.iter().map(String::as_str).collect::<Vec<_>>(), NOW).await;
    let minute = Duration::from_mins(1);
    let found = buckets(&mut conn, device, "a", from_ms(NOW), from_ms(NOW + 600_000), minute).await.unwrap();
    let bucket = |at, count, min, max, avg, last| Bucket { start: from_ms(NOW + at), count, min, max, avg, last };
    assert_eq!(found, [bucket(0, 3, 1.5, 3.0, 6.5 / 3.0, 2.0), bucket(120_000, 1, -7.0, -7.0, -7.0, -7.0)]);
    for (to, bucket) in
        [(NOW + 60_000 * MAX_BUCKETS, minute), (NOW + 1, Duration::ZERO), (NOW + 1, Duration::from_micros(1_500))]
    {
        let refused = buckets(&mut conn, device, "a", from_ms(NOW), from_ms(to), bucket).await;
        assert!(matches!(refused, Err(crate::Error::Invalid(_))), "{bucket:?}");
    }
}

#[tokio::test]
async fn no_question_is_too_strange_to_answer() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let sent =
        [(1, "1.7e308"), (2, "1.7e308"), (3, "-1.7e308"), (4, "5e-324"), (5, "1e99"), (6, "18446744073709551615")];
    let sent = sent.map(|(seq, v)| format!(r#"{{"ts":{MAX_TS_MS},"seq":{seq},"values":{{"a":{v}}}}}"#));
    writer.batch.clear();
    for message in &sent {
        let limits = Limits { max_ahead_ms: MAX_TS_MS, ..LIMITS };
        assert_eq!(writer.batch.push(db.tenant(), device, message.as_bytes(), NOW, &limits), []);
    }
    prepare(&mut conn, &mut writer.shapes, &mut writer.batch).await.unwrap();
    assert_eq!(insert_batch(&mut conn, &writer.batch).await.unwrap(), 6);
    let (from, to) = (DateTime::<Utc>::MIN_UTC, DateTime::<Utc>::MAX_UTC);
    for order in [Order::Asc, Order::Desc] {
        for after in [None, Some((if order == Order::Asc { from } else { to }, 0))] {
            for metric in [None, Some("a".to_owned())] {
                let query = Query { device, metric, from, to, order, limit: i64::MAX, after };
                assert_eq!(points(&mut conn, &query).await.unwrap().len(), 6, "{query:?}");
                let query = Query { from: to, to: from, limit: -1, ..query };
                assert_eq!(points(&mut conn, &query).await.unwrap(), []);
            }
        }
    }
    let whole = Duration::from_millis(MAX_TS_MS.unsigned_abs());
    let all = buckets(&mut conn, device, "a", from, to, whole).await.unwrap();
    assert_eq!((all[0].count, all[0].max), (3, 1e99), "what has no mean is left out");
    assert!(buckets(&mut conn, device, "a", from, to, whole + Duration::from_millis(1)).await.is_err());
    assert_eq!(buckets(&mut conn, device, "\u{1f600}", to, from, whole).await.unwrap(), []);
}

/// The examples between two strings, each up to the next `end`.
fn examples(text: &'static str, begin: &'static str, end: &'static str) -> impl Iterator<Item = &'static str> {
    text.split(begin).skip(1).filter_map(move |rest| rest.split(end).next())
}

#[test]
fn the_examples_for_device_authors_are_right() {
    let page = include_str!("../../../docs/reference/payloads.md");
    let accepted: Vec<_> = examples(page, "```json telemetry\n", "```").collect();
    assert_eq!(accepted.len(), 3);
    for payload in accepted {
        assert!(!decoded(payload).is_empty());
    }
    let reported: Vec<_> = examples(page, "```json status\n", "```").collect();
    assert_eq!(reported.len(), 3);
    for payload in reported {
        crate::status::Change::decode(DEVICE, payload.as_bytes(), NOW).unwrap();
    }
    let reasons = page.split("| reason | for example |").nth(1).and_then(|rest| rest.split("\n\n").next()).unwrap();
    let examples: Vec<_> =
        reasons.lines().flat_map(|line| examples_in_code(line.rsplit("| ").next().unwrap())).collect();
    assert_eq!(examples.len(), 8, "{examples:?}");
    for payload in examples {
        refused(payload);
    }
}

/// What stands in `backticks`.
fn examples_in_code(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

/// Any JSON value, strange names and texts included.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,6}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((".{0,4}", inner), 0..4)
                .prop_map(|members| Value::Object(members.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn any_bytes_give_readings_or_reasons(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut batch = Batch::new();
        let rejected = batch.push(TENANT, DEVICE, &bytes, NOW, &LIMITS);
        prop_assert!(rejected.iter().all(|rejected| !rejected.reason.is_empty()));
    }

    #[test]
    fn any_json_gives_readings_or_reasons(value in any_json()) {
        let payload = value.to_string();
        let mut batch = Batch::new();
        let rejected = batch.push(TENANT, DEVICE, payload.as_bytes(), NOW, &LIMITS);
        let expected = value.as_array().map_or(1, Vec::len);
        prop_assert_eq!(batch.len() + rejected.len(), expected);
        prop_assert_eq!(batch.rows().count(), batch.len());
    }

    #[test]
    fn what_is_read_is_what_was_sent(
        metrics in prop::collection::btree_map("[a-zäß ]{1,8}", any_json(), 0..12),
        ts in 0..NOW,
        seq in 0..i64::MAX,
    ) {
        let metrics = Value::Object(metrics.into_iter().filter(|(name, _)| !["ts", "seq", "values"].contains(&name.as_str())).collect());
        prop_assume!(!metrics.to_string().contains("\\u0000"));
        let payload = json!({"ts": ts, "seq": seq, "values": metrics}).to_string();
        let read = decoded(&payload);
        prop_assert_eq!((read[0].0, read[0].1), (ts, seq));
        // Doubles are doubles: 3.0 and 3 are one number.
        let plain = |value: &Value| value.as_f64().filter(|_| value.is_f64()).map_or(value.clone(), |f| number(Kind::Number, f));
        let sent = metrics.as_object().map(|all| all.iter().map(|(k, v)| (k.clone(), plain(v))).collect::<serde_json::Map<_, _>>());
        prop_assert_eq!(read[0].2.as_object(), sent.as_ref());
    }
}

/// One PostgreSQL takes whatever the decoder lets through: the same strange messages, twice.
#[tokio::test]
async fn no_payload_makes_a_batch_fail() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut writer = Writer::new(db.tenant());
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    for _ in 0..300 {
        let value = any_json().new_tree(&mut runner).unwrap().current();
        writer.batch.push(
            db.tenant(),
            device,
            json!({"ts": 1, "values": {"x": value}}).to_string().as_bytes(),
            NOW,
            &LIMITS,
        );
        writer.batch.push(db.tenant(), device, value.to_string().as_bytes(), NOW, &LIMITS);
    }
    for extreme in
        ["1.7976931348623157e308", "-1.7976931348623157e308", "5e-324", "18446744073709551615", "-9223372036854775808"]
    {
        writer.batch.push(
            db.tenant(),
            device,
            format!("{{\"a\":{extreme},\"b\":[{extreme}]}}").as_bytes(),
            NOW,
            &LIMITS,
        );
    }
    prepare(&mut conn, &mut writer.shapes, &mut writer.batch).await.unwrap();
    let stored = insert_batch(&mut conn, &writer.batch).await.unwrap();
    assert!(stored > 100, "{stored}");
    assert_eq!(insert_batch(&mut conn, &writer.batch).await.unwrap(), 0, "a batch stored twice is stored once");
    let all = points(&mut conn, &query(device, None)).await.unwrap();
    assert_eq!(all.len() as u64, stored);
}
