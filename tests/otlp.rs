//! Programs that speak OpenTelemetry send log lines over HTTP: answered means committed.

use std::process::Stdio;

use reqwest::StatusCode;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

use crate::foreign_clients::python;
use crate::harness::{Fleet, PATIENCE};
use crate::log_ingest::{TS, lines, messages};

/// A minute ago, in nanoseconds.
fn ts_ns() -> i64 {
    *TS * 1_000_000
}

/// An API key that may write log lines, for some devices or all.
async fn key(fleet: &Fleet, scope: Option<&str>) -> String {
    if scope.is_none() {
        fleet.make("/api/v1/roles", json!({ "id": "log-writer", "permissions": ["logs:write"] })).await;
    }
    let mut key = json!({ "name": "collector", "role": "log-writer" });
    if let Some(selector) = scope {
        key["scope"] = json!({ "kind": "selector", "selector": selector });
    }
    fleet.make("/api/v1/api-keys", key).await["secret"].as_str().expect("a secret").to_owned()
}

/// Sends so many records with OpenTelemetry's exporter: what became of its requests.
async fn exporter(fleet: &Fleet, key: &str, device: &str, compression: &str, count: usize) -> Value {
    let run = Command::new(python())
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/otlp_client.py"))
        .args([&format!("{}/v1/logs", fleet.url()), key, device, compression, &count.to_string(), &TS.to_string()])
        .kill_on_drop(true)
        .stdin(Stdio::null())
        .output();
    let output = timeout(3 * PATIENCE, run).await.expect("it ends in time").expect("`make setup` installs it");
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice::<Value>(&output.stdout).expect("JSON")["results"].clone()
}

/// A request in the protocol's JSON with a record for each of these devices.
fn request(devices: &[&str]) -> Value {
    let text = |name: &str, value: &str| json!({ "key": name, "value": { "stringValue": value } });
    let resource = |device: &&str| {
        json!({
            "resource": { "attributes": [text("device.id", device)] },
            "scopeLogs": [{ "scope": { "name": "net" }, "logRecords": [{
                "timeUnixNano": ts_ns().to_string(), "severityNumber": 17, "body": { "stringValue": "no carrier" },
                "traceId": "5b8efff798038103d269b633813fc60c", "attributes": [{ "key": "n", "value": { "intValue": "7" } }],
            }] }],
        })
    };
    json!({ "resourceLogs": devices.iter().map(resource).collect::<Vec<_>>() })
}

struct Reply {
    status: StatusCode,
    kind: String,
    retry_after: Option<String>,
    body: Vec<u8>,
}

impl Reply {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body.escape_ascii().to_string()))
    }
}

async fn post(fleet: &Fleet, key: &str, kind: &str, body: impl Into<reqwest::Body>) -> Reply {
    let client = reqwest::Client::builder().timeout(PATIENCE).build().expect("a client without settings");
    let request =
        client.post(format!("{}/v1/logs", fleet.url())).bearer_auth(key).header("content-type", kind).body(body);
    let response = request.send().await.expect("the server answers");
    let header = |name| response.headers().get(name).map(|value| value.to_str().expect("text").to_owned());
    let (kind, retry_after) = (header("content-type").unwrap_or_default(), header("retry-after"));
    let status = response.status();
    Reply { status, kind, retry_after, body: response.bytes().await.expect("the answer is whole").to_vec() }
}

async fn send(fleet: &Fleet, key: &str, request: &Value) -> Reply {
    post(fleet, key, "application/json", request.to_string()).await
}

#[tokio::test]
async fn the_exporter_of_opentelemetry_is_understood() {
    let fleet = Fleet::start().await;
    fleet.enrol("boiler-1").await;
    let key = key(&fleet, None).await;
    for compression in ["none", "gzip"] {
        assert_eq!(exporter(&fleet, &key, "boiler-1", compression, 20).await, json!(["SUCCESS"]));
        let stored = lines(&fleet, "boiler-1").await;
        assert_eq!(stored.len(), 20, "the same records are stored once");
        let line = &stored[0];
        assert_eq!((line.ts_ms, line.level, line.target.as_deref()), (*TS, 4, Some("net.wifi")));
        assert!(line.message.starts_with("reconnect "), "{line:?}");
        assert_eq!((&line.fields["rssi"], &line.fields["ok"]), (&json!(-81), &json!(false)));
        assert_eq!(
            (&line.fields["tried"], &line.fields["resource.service.name"]),
            (&json!(["a", "b"]), &json!("boiler"))
        );
    }
}

#[tokio::test]
async fn what_is_answered_is_a_row_when_the_server_is_killed_at_once() {
    let mut fleet = Fleet::start().await;
    fleet.enrol("boiler-1").await;
    let key = key(&fleet, None).await;
    let reply = send(&fleet, &key, &request(&["boiler-1"])).await;
    assert_eq!((reply.status, reply.json()), (StatusCode::OK, json!({})));
    fleet.kill().await;
    let stored = lines(&fleet, "boiler-1").await;
    assert_eq!((stored.len(), stored[0].level, stored[0].message.as_str()), (1, 5, "no carrier"));
    assert_eq!(
        (stored[0].trace.as_deref(), &stored[0].fields),
        (Some("5b8efff798038103d269b633813fc60c"), &json!({ "n": 7 }))
    );
    fleet.start_again().await;
    let reply = send(&fleet, &key, &request(&["boiler-1"])).await;
    assert_eq!((reply.status, lines(&fleet, "boiler-1").await.len()), (StatusCode::OK, 1), "sent twice, stored once");
}

#[tokio::test]
async fn a_key_writes_for_the_devices_in_its_scope_only() {
    let fleet = Fleet::start().await;
    for (id, group) in [("in-1", "site/a"), ("out-1", "site/b"), ("off-1", "site/a")] {
        fleet.make("/api/v1/devices", json!({ "id": id, "group": group })).await;
    }
    let off = fleet.call(reqwest::Method::PATCH, "/api/v1/devices/off-1", Some(json!({ "disabled": true }))).await;
    assert_eq!(off.0, StatusCode::OK, "{off:?}");
    let everywhere = key(&fleet, None).await;
    let scoped = key(&fleet, Some("group:site/a")).await;
    let reply = send(&fleet, &scoped, &request(&["in-1", "out-1", "off-1", "nobody", "no device!"])).await;
    assert_eq!(reply.status, StatusCode::OK);
    let partial = &reply.json()["partialSuccess"];
    assert_eq!(partial["rejectedLogRecords"], "4", "{partial}");
    assert!(partial["errorMessage"].as_str().is_some_and(|why| why.contains("\"out-1\"") && why.contains("device.id")));
    assert_eq!((messages(&fleet, "in-1").await.len(), messages(&fleet, "out-1").await.len()), (1, 0));
    let reply = send(&fleet, &everywhere, &request(&["out-1"])).await;
    assert_eq!((reply.json(), messages(&fleet, "out-1").await.len()), (json!({}), 1));
    assert!((fleet.metric("muster_otlp_records_unknown_total", "").await - 4.0).abs() < 0.1);
}

#[tokio::test]
async fn a_refusal_is_a_status_in_the_encoding_of_its_request() {
    let fleet =
        Fleet::start_with(&[("MUSTER__OTLP__MAX_BODY_BYTES", "20000"), ("MUSTER__OTLP__MAX_RECORDS", "3")]).await;
    fleet.enrol("boiler-1").await;
    let good = key(&fleet, None).await;
    fleet.make("/api/v1/roles", json!({ "id": "reader", "permissions": ["logs:read"] })).await;
    let reader = fleet.make("/api/v1/api-keys", json!({ "name": "k", "role": "reader" })).await;
    let reader = reader["secret"].as_str().expect("a secret");
    let (json_type, protobuf) = ("application/json", "application/x-protobuf");
    let body = request(&["boiler-1"]).to_string();
    for (key, kind, body, status, code) in [
        ("nonsense", json_type, body.clone(), 401, 16),
        (reader, json_type, body.clone(), 403, 7),
        (&good, json_type, "{\"resourceLogs\":".to_owned(), 400, 3),
        (&good, "text/plain", body.clone(), 415, 3),
        (&good, json_type, " ".repeat(20_001), 413, 8),
        (&good, json_type, request(&["boiler-1"; 4]).to_string(), 413, 8),
    ] {
        let reply = post(&fleet, key, kind, body).await;
        let told = reply.json();
        assert_eq!(
            (reply.status.as_u16(), reply.kind.as_str(), &told["code"]),
            (status, json_type, &json!(code)),
            "{told}"
        );
        assert!(told["message"].as_str().is_some_and(|message| !message.is_empty()), "{told}");
    }
    let reply = post(&fleet, &good, protobuf, "\u{7f}").await;
    assert_eq!((reply.status.as_u16(), reply.kind.as_str()), (400, protobuf));
    assert_eq!(reply.body[..2], [8, 3], "field 1, INVALID_ARGUMENT");
    assert!(messages(&fleet, "boiler-1").await.is_empty());
}

#[tokio::test]
async fn what_cannot_be_stored_now_is_sent_again_by_the_exporter() {
    let fleet = Fleet::start().await;
    fleet.enrol("boiler-1").await;
    let key = key(&fleet, None).await;
    sqlx::query("alter table log rename to log_away").execute(fleet.db()).await.expect("the database answers");
    let reply = send(&fleet, &key, &request(&["boiler-1"])).await;
    assert_eq!(
        (reply.status.as_u16(), reply.json()["code"].clone(), reply.retry_after.as_deref()),
        (503, json!(14), Some("1"))
    );
    let asked = || fleet.metric("muster_http_requests_total", "route=\"/v1/logs\",status=\"503\"");
    let (results, ()) = tokio::join!(exporter(&fleet, &key, "boiler-1", "none", 5), async {
        fleet.eventually(asked, |asked| *asked > 1.5).await;
        sqlx::query("alter table log_away rename to log").execute(fleet.db()).await.expect("the database answers");
    });
    assert_eq!((results, lines(&fleet, "boiler-1").await.len()), (json!(["SUCCESS"]), 5));
}

#[tokio::test]
async fn the_rate_of_a_device_holds_here_too_and_is_told() {
    let limits = [
        ("MUSTER__INGEST__LOG_LINES_PER_S", "1"),
        ("MUSTER__INGEST__LOG_LINES_BURST", "5"),
        ("MUSTER__INGEST__LOG_SUPPRESSED_S", "1"),
    ];
    let fleet = Fleet::start_with(&limits).await;
    fleet.enrol("boiler-1").await;
    let key = key(&fleet, None).await;
    let mut many = request(&["boiler-1"; 12]);
    for nth in 0..12_i64 {
        let record =
            many.pointer_mut(&format!("/resourceLogs/{nth}/scopeLogs/0/logRecords/0/timeUnixNano")).expect("a record");
        *record = json!((ts_ns() + nth).to_string());
    }
    let partial = send(&fleet, &key, &many).await.json()["partialSuccess"].clone();
    assert_eq!(partial["rejectedLogRecords"], "7", "{partial}");
    assert!(partial["errorMessage"].as_str().is_some_and(|why| why.contains("rate limit")), "{partial}");
    let told = || async { messages(&fleet, "boiler-1").await };
    let told = fleet.eventually(told, |told| told.len() == 6).await;
    assert!(told.contains(&"7 lines suppressed by the rate limit".to_owned()), "{told:?}");
}
