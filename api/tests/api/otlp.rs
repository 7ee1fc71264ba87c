//! What OpenTelemetry sends and is more than it seems: refused before it is held.

use std::io::Write as _;

use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::{Value, json};

use crate::harness::{Api, Reply, Setup};

const PATH: &str = "/v1/logs";
const JSON: &str = "application/json";
const PROTOBUF: &str = "application/x-protobuf";

fn gzip(body: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(body).unwrap();
    encoder.finish().unwrap()
}

async fn send(api: &Api, kind: &str, body: Vec<u8>) -> Reply {
    api.ask("POST", PATH).raw(kind, body).send().await
}

async fn send_gzip(api: &Api, kind: &str, body: &[u8]) -> Reply {
    let body = gzip(body);
    assert!(body.len() < 100_000, "it seems harmless: {} bytes", body.len());
    api.ask("POST", PATH).header("content-encoding", "gzip").raw(kind, body).send().await
}

/// A message as a member of another one, in Protobuf.
fn member(tag: u8, inner: &[u8]) -> Vec<u8> {
    let (mut head, mut length) = (vec![(tag << 3) | 2], inner.len());
    while length > 0x7f {
        head.push(u8::try_from(length & 0x7f).unwrap() | 0x80);
        length >>= 7;
    }
    head.push(u8::try_from(length).unwrap());
    [&head, inner].concat()
}

fn text(name: &str, value: &str) -> Value {
    json!({ "key": name, "value": { "stringValue": value } })
}

/// Records of `boiler-1`, whose resource says something beside.
fn records(count: usize, beside: &Value) -> Vec<u8> {
    let records = (0..count).map(|nth| json!({ "timeUnixNano": (1_763_726_400_000_000_000 + nth).to_string() }));
    let logs = json!([{
        "resource": { "attributes": [text("device.id", "boiler-1"), beside] },
        "scopeLogs": [{ "logRecords": records.collect::<Vec<_>>() }],
    }]);
    json!({ "resourceLogs": logs }).to_string().into_bytes()
}

async fn stored(api: &Api) -> i64 {
    sqlx::query_scalar("select count(*) from log").fetch_one(api.db.pool()).await.unwrap()
}

#[tokio::test]
async fn what_is_far_larger_than_it_seems_is_refused_and_harms_nobody() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    // Compressed: 64 MiB of nothing.
    let reply = send_gzip(&api, JSON, &vec![b' '; 64 << 20]).await.expect(413);
    assert!(reply.body["message"].as_str().unwrap().contains("when it is not compressed"), "{}", reply.text);
    assert_eq!(send_gzip(&api, PROTOBUF, &vec![0; 64 << 20]).await.status.as_u16(), 413);
    // Small parts: two bytes of Protobuf are a record, and three of JSON.
    let empty = [0x12, 0].repeat(2_000_000);
    let reply = send_gzip(&api, PROTOBUF, &member(1, &member(2, &empty))).await;
    assert_eq!((reply.status.as_u16(), reply.text.contains("too many parts")), (413, true), "{}", reply.text);
    let empty =
        [b"{\"resourceLogs\":[{\"scopeLogs\":[{\"logRecords\":[{}", &*b",{}".repeat(1_300_000), b"]}]}]}"].concat();
    let reply = send_gzip(&api, JSON, &empty).await.expect(413);
    assert!(reply.body["message"].as_str().unwrap().contains("too many parts"), "{}", reply.text);
    // A resource of which each record has a copy.
    let reply = send(&api, JSON, records(5_000, &text("x", &"x".repeat(3 << 20)))).await.expect(413);
    assert!(reply.body["message"].as_str().unwrap().contains("fewer records"), "{}", reply.text);
    assert!((api.metric("muster_http_problems_total{type=\"body-too-large\"}").await - 5.0).abs() < 0.1);
    // Deep ones.
    let (open, close) = ("{\"arrayValue\":{\"values\":[".repeat(1_000), "]}}".repeat(1_000));
    let deep = format!(
        "{{\"resourceLogs\":[{{\"resource\":{{\"attributes\":[{{\"key\":\"x\",\"value\":{open}{close}}}]}}}}]}}"
    );
    send(&api, JSON, deep.into_bytes()).await.expect(400);
    let deep = (0..1_000).fold(Vec::new(), |inner, _| member(5, &member(1, &inner)));
    let deep = member(1, &member(1, &member(1, &member(2, &deep))));
    assert_eq!(send(&api, PROTOBUF, deep).await.status.as_u16(), 400);
    // Nothing of it was stored, and what is sensible is.
    assert_eq!(stored(&api).await, 0);
    let reply = send(&api, JSON, records(100, &text("x", "y"))).await.expect(200);
    assert_eq!((reply.body, stored(&api).await), (json!({}), 100));
}

#[tokio::test]
async fn a_request_is_taken_up_to_each_bound() {
    let mut setup = Setup::default();
    setup.config.otlp.max_records = 20;
    setup.config.otlp.queue_bytes = 20 * 1_500;
    let api = Api::with(setup).await;
    api.enrol("boiler-1").await;
    for (count, beside, status) in [(20, 1_000, 200), (21, 1_000, 413), (20, 2_000, 413), (10, 2_000, 200)] {
        let reply = send(&api, JSON, records(count, &text("x", &"x".repeat(beside)))).await;
        assert_eq!(reply.status.as_u16(), status, "{count} {beside}: {}", reply.text);
    }
}
