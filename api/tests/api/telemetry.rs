//! Readings over REST.

use fleet_core::device;
use fleet_core::telemetry::{Batch, Limits, Shapes, insert_batch, prepare};
use serde_json::{Value, json};

use crate::harness::{Api, NOON_MS, escaped};

const SERIES: &str = "/api/v1/devices/boiler-1/telemetry";

/// An API with one device that has sent these messages.
async fn with(messages: &[Value]) -> Api {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let mut db = api.db.pool().acquire().await.unwrap();
    let key = device::key(&mut db, api.db.tenant(), &"boiler-1".parse().unwrap()).await.unwrap();
    let limits = Limits { max_readings: 5000, max_metrics: 256, max_ahead_ms: 300_000 };
    let (mut batch, mut shapes) = (Batch::new(), Shapes::new(100));
    for message in messages {
        let rejected = batch.push(api.db.tenant(), key, message.to_string().as_bytes(), NOON_MS, &limits);
        assert!(rejected.is_empty(), "{rejected:?}");
    }
    prepare(&mut db, &mut shapes, &mut batch).await.unwrap();
    insert_batch(&mut db, &batch).await.unwrap();
    drop(db);
    api
}

/// A reading `n` seconds before noon.
fn reading(n: i64, temp: f64) -> Value {
    json!({"ts": NOON_MS - n * 1000, "seq": 1000 - n, "values": {"temp": temp, "door": n % 2 == 0, "note": "a,\"b\""}})
}

#[tokio::test]
async fn a_series_is_told_whole_or_one_metric_at_a_time() {
    let api = with(&[reading(2, 21.5), reading(1, 22.0), json!({"ts": NOON_MS, "values": {"other": [1, null]}})]).await;
    let whole = api.get(SERIES).await.expect(200).body;
    assert_eq!(
        whole,
        json!({"items": [
            {"ts": "2025-11-21T11:59:58.000Z", "seq": 998, "values": {"temp": 21.5, "door": true, "note": "a,\"b\""}},
            {"ts": "2025-11-21T11:59:59.000Z", "seq": 999, "values": {"temp": 22, "door": false, "note": "a,\"b\""}},
            {"ts": "2025-11-21T12:00:00.000Z", "seq": null, "values": {"other": [1, null]}},
        ], "next_cursor": null})
    );
    let one = api.get(&format!("{SERIES}?metric=door&order=desc")).await.expect(200).body;
    assert_eq!(
        one["items"],
        json!([
            {"ts": "2025-11-21T11:59:59.000Z", "seq": 999, "value": false},
            {"ts": "2025-11-21T11:59:58.000Z", "seq": 998, "value": true},
        ])
    );
    let from = escaped("2025-11-21T12:59:59+01:00");
    let part = api.get(&format!("{SERIES}?metric=temp&from={from}&to={NOON_MS}")).await.expect(200).body;
    assert_eq!(part["items"].as_array().unwrap().len(), 1);
    assert_eq!(api.get(&format!("{SERIES}?metric=none")).await.expect(200).body["items"], json!([]));
    let latest = api.get(&format!("{SERIES}/latest")).await.expect(200).body;
    let temp = latest["items"].as_array().unwrap().iter().find(|item| item["metric"] == "temp").unwrap();
    assert_eq!(temp, &json!({"metric": "temp", "ts": "2025-11-21T11:59:59.000Z", "value": 22}));
}

#[tokio::test]
async fn pages_hold_every_reading_once_in_both_orders() {
    // Several at one time, with and without a sequence number.
    let messages = (0..20)
        .map(|n| match n % 3 {
            0 => json!({"ts": NOON_MS - n / 4, "values": {"n": n}}),
            _ => json!({"ts": NOON_MS - n / 4, "seq": n, "values": {"n": n}}),
        })
        .collect::<Vec<_>>();
    let api = with(&messages).await;
    for (query, metric) in [("order=asc", false), ("order=desc", false), ("order=desc&metric=n", true)] {
        let mut seen = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = api.get(&format!("{SERIES}?{query}&limit=3{cursor}")).await.expect(200).body;
            let items = page["items"].as_array().unwrap();
            assert!(items.len() <= 3);
            let value = |item: &Value| if metric { item["value"].clone() } else { item["values"]["n"].clone() };
            seen.extend(items.iter().map(|item| value(item).as_i64().unwrap()));
            let Some(next) = page["next_cursor"].as_str() else { break };
            cursor = format!("&cursor={next}");
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..20).collect::<Vec<_>>(), "{query}");
    }
}

#[tokio::test]
async fn buckets_begin_with_the_first_reading_and_are_bounded() {
    let api = with(&[reading(90, 1.0), reading(61, 3.0), reading(10, 5.0)]).await;
    let buckets = api.get(&format!("{SERIES}?metric=temp&bucket=1m")).await.expect(200).body;
    assert_eq!(
        buckets,
        json!({"items": [
            {"ts": "2025-11-21T11:58:00.000Z", "count": 2, "min": 1.0, "max": 3.0, "avg": 2.0, "last": 3.0},
            {"ts": "2025-11-21T11:59:00.000Z", "count": 1, "min": 5.0, "max": 5.0, "avg": 5.0, "last": 5.0},
        ], "next_cursor": null})
    );
    let backwards = api.get(&format!("{SERIES}?metric=temp&bucket=60&order=desc")).await.expect(200).body;
    assert_eq!(backwards["items"][0], buckets["items"][1]);
    let fine = |bucket: &str| format!("{SERIES}?metric=temp&bucket={bucket}&from=0&to=10000000");
    api.get(&fine("2")).await.expect(200);
    let many = api.get(&fine("1")).await.problem(400, "too-many-buckets");
    assert!(many.body["detail"].as_str().unwrap().contains("at least 2s"), "{}", many.text);
    assert!(api.metric("muster_http_problems_total{type=\"too-many-buckets\"}").await > 0.5);
    let none = api.get(&format!("{SERIES}?metric=none&bucket=1m")).await.expect(200).body;
    assert_eq!(none["items"], json!([]));
}

#[tokio::test]
async fn the_least_bucket_that_is_advised_is_accepted() {
    let api = with(&[]).await;
    for span_s in [10_000_i64, 10_001, 86_400, 1_000_000, 123_456_789] {
        let path = |bucket: &str| format!("{SERIES}?metric=m&from=0&to={}&bucket={bucket}", span_s * 1000);
        let refused = api.get(&path("1s")).await.problem(400, "too-many-buckets");
        let detail = refused.body["detail"].as_str().unwrap().to_owned();
        let advised = detail.split("at least ").nth(1).unwrap().split(',').next().unwrap();
        api.get(&path(advised)).await.expect(200);
    }
}

#[tokio::test]
async fn a_query_that_cannot_be_meant_is_refused() {
    let api = with(&[reading(1, 1.0)]).await;
    for (query, field) in [
        ("metric=", "metric"),
        ("metric=%00", "metric"),
        ("from=yesterday", "from"),
        ("from=9223372036854775807", "from"),
        ("from=-9223372036854775808", "from"),
        ("to=300000-01-01T00:00:00Z", "to"),
        ("from=2000&to=1000", "to"),
        ("bucket=1m", "bucket"),
        ("metric=a&bucket=0", "bucket"),
        ("metric=a&bucket=1y", "bucket"),
        ("metric=a&bucket=99999999999d", "bucket"),
        ("metric=a&bucket=1m&cursor=cjEsMg", "cursor"),
        ("order=up", "order"),
        ("limit=-1", "limit"),
        ("cursor=cjk5OTk5OTk5OTk5OTk5OTk5LDE", "cursor"),
        ("cursor=ZGE", "cursor"),
        ("window=1", "window"),
    ] {
        let refused = api.get(&format!("{SERIES}?{query}")).await.problem(400, "invalid");
        assert_eq!(refused.body["errors"][0]["field"], field, "{query}: {}", refused.text);
    }
    let edges = format!("{SERIES}?from=-62135596800000&to=253402300799999");
    assert_eq!(api.get(&edges).await.expect(200).body["items"].as_array().unwrap().len(), 1);
    api.get("/api/v1/devices/none/telemetry").await.problem(404, "no-such-device");
    api.get("/api/v1/devices/none/telemetry/latest").await.problem(404, "no-such-device");
    let latest = api.enrol("silent").await;
    assert_eq!(latest["device"]["status"]["state"], "never_seen");
    assert_eq!(api.get("/api/v1/devices/silent/telemetry/latest").await.expect(200).body["items"], json!([]));
}

#[tokio::test]
async fn csv_is_for_spreadsheets() {
    let api =
        with(&[reading(1, 21.5), json!({"ts": NOON_MS, "values": {"=cmd": "=1+1", "temp": -3, "text": "two\nlines"}})])
            .await;
    let csv = async |query: &str| {
        api.ask("GET", &format!("{SERIES}?{query}")).header("accept", "text/csv").send().await.expect(200)
    };
    let whole = csv("limit=1").await;
    assert_eq!(whole.header("content-type"), "text/csv; charset=utf-8");
    assert_eq!(
        whole.text,
        "ts,seq,metric,value\r\n\
         2025-11-21T11:59:59.000Z,999,door,false\r\n\
         2025-11-21T11:59:59.000Z,999,note,\"a,\"\"b\"\"\"\r\n\
         2025-11-21T11:59:59.000Z,999,temp,21.5\r\n"
    );
    let rest = csv(&format!("cursor={}", whole.header("next-cursor"))).await;
    assert_eq!(
        rest.text,
        "ts,seq,metric,value\r\n\
         2025-11-21T12:00:00.000Z,,'=cmd,'=1+1\r\n\
         2025-11-21T12:00:00.000Z,,temp,-3\r\n\
         2025-11-21T12:00:00.000Z,,text,\"two\nlines\"\r\n"
    );
    assert_eq!(rest.header("next-cursor"), "");
    let one = csv("metric=temp").await;
    assert_eq!(one.text, "ts,seq,value\r\n2025-11-21T11:59:59.000Z,999,21.5\r\n2025-11-21T12:00:00.000Z,,-3\r\n");
    let buckets = csv("metric=temp&bucket=1h").await;
    assert_eq!(
        buckets.text,
        "ts,count,min,max,avg,last\r\n2025-11-21T11:00:00.000Z,1,21.5,21.5,21.5,21.5\r\n2025-11-21T12:00:00.000Z,1,-3,-3,-3,-3\r\n"
    );
    let both = api.ask("GET", SERIES).header("accept", "text/csv;q=0.5, application/json").send().await.expect(200);
    assert!(both.body["items"].is_array());
}
