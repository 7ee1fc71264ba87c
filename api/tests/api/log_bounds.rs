//! The bounds of what can be asked of log lines: at each it works, beyond it is told what was expected, and counted.

use futures::StreamExt as _;
use serde_json::{Value, json};

use crate::harness::{Api, NOON_MS, Setup, escaped};
use crate::logs::{line, write};

const SEARCH: &str = "/api/v1/logs/search";
const HISTOGRAM: &str = "/api/v1/logs/histogram";
const EXPORT: &str = "/api/v1/logs/export";

/// An API whose index knows these lines of `pump-7`.
async fn with(setup: Setup, lines: impl Iterator<Item = Value>) -> Api {
    let api = Api::with(setup).await;
    api.enrol("pump-7").await;
    write(&api, "pump-7", &lines.collect::<Vec<_>>()).await;
    api.index().await;
    api
}

fn count(value: &Value) -> usize {
    value.as_array().unwrap().len()
}

/// A number as a word of its own, which no pattern takes for a number.
fn word(n: i64) -> String {
    n.to_string().bytes().map(|digit| char::from(digit - b'0' + b'k')).collect()
}

#[tokio::test]
async fn pages_values_patterns_and_neighbours_have_a_most() {
    let lines = (0..1_001).map(|n| {
        let mut line = line(n);
        line["message"] = json!(word(n));
        line
    });
    let api = with(Setup::default(), lines).await;
    for limit in [1_000, 1_001, 1_000_000] {
        let page = api.get(&format!("{SEARCH}?limit={limit}")).await.expect(200).body;
        assert_eq!((count(&page["items"]), page["next_cursor"].is_string()), (1_000, true), "{limit}");
    }
    assert!((api.metric("muster_http_page_limit_clamped_total").await - 2.0).abs() < 0.1);
    for (path, rest) in [("/api/v1/logs/top?field=fields.n", "others"), ("/api/v1/logs/patterns?", "total")] {
        let all = api.get(&format!("{path}&size=1000")).await.expect(200).body;
        let expected = if rest == "others" { 1 } else { 1_001 };
        assert_eq!((count(&all["items"]), &all[rest]), (1_000, &json!(expected)), "{path}");
        let refused = api.get(&format!("{path}&size=1001")).await.problem(400, "invalid");
        let error = &refused.body["errors"][0];
        assert_eq!((&error["field"], &error["detail"]), (&json!("size"), &json!("expected a number from 1 to 1000")));
    }
    let middle = api.get(&format!("{SEARCH}?q={}", escaped("fields.n:500"))).await.expect(200).body;
    let context = format!("/api/v1/logs/context?id={}", middle["items"][0]["id"].as_str().unwrap());
    let around = api.get(&format!("{context}&before=500&after=500")).await.expect(200).body;
    assert_eq!((count(&around["before"]), count(&around["after"])), (500, 500));
    for side in ["before", "after"] {
        let refused = api.get(&format!("{context}&{side}=501")).await.problem(400, "invalid");
        let error = &refused.body["errors"][0];
        assert_eq!((&error["field"], &error["detail"]), (&json!(side), &json!("expected a number from 0 to 500")));
    }
}

#[tokio::test]
async fn a_histogram_has_so_many_stretches_and_tells_which_interval_would_do() {
    let spread = (0..2_001).map(|n| {
        let mut line = line(n);
        line["ts"] = json!(NOON_MS - n * 1_000);
        line
    });
    let api = with(Setup::default(), spread).await;
    let ask = |query: &str| format!("{HISTOGRAM}?{query}");
    // By the time that is asked for.
    let within = |to: &str, interval: &str| {
        ask(&format!("from=2025-11-21T11:00:00Z&to=2025-11-21T11:33:{to}Z&interval={interval}"))
    };
    api.get(&within("20", "1s")).await.expect(200);
    let refused = api.get(&within("20.001", "1s")).await.problem(400, "too-many-buckets");
    let detail = refused.body["detail"].as_str().unwrap();
    assert!(detail.contains("more than 2000") && detail.contains("at least 2s"), "{detail}");
    api.get(&within("20.001", "2s")).await.expect(200);
    let parts = "from=2025-11-21T11:00:00.500Z&to=2025-11-21T11:33:20.500Z&interval=1s";
    api.get(&ask(parts)).await.problem(400, "too-many-buckets");
    // By the lines there are.
    let refused = api.get(&ask("interval=1s")).await.problem(400, "too-many-buckets");
    assert!(refused.body["detail"].as_str().unwrap().contains("more than 2000"), "{}", refused.text);
    let most = api.get(&ask(&format!("interval=1s&q={}", escaped("fields.n:<2000")))).await.expect(200).body;
    assert_eq!(count(&most["items"]), 2_000);
    let wider = api.get(&ask("interval=2s")).await.expect(200).body;
    assert_eq!(
        wider["items"].as_array().unwrap().iter().map(|item| item["count"].as_i64().unwrap()).sum::<i64>(),
        2_001
    );
    assert!((api.metric("muster_http_problems_total{type=\"too-many-buckets\"}").await - 3.0).abs() < 0.1);
}

#[tokio::test]
async fn a_query_is_so_long_and_no_longer() {
    let api = with(Setup::default(), std::iter::once(line(1))).await;
    let tail = "/api/v1/logs/tail";
    for path in [SEARCH, HISTOGRAM, "/api/v1/logs/top?field=level", "/api/v1/logs/patterns", EXPORT, tail] {
        let ask = |q: String| format!("{path}{}q={q}", if path.contains('?') { '&' } else { '?' });
        let terms = |count: usize| vec!["x"; count].join("+");
        for most in ["x".repeat(4_096), terms(64)] {
            api.get(&ask(most)).await.expect(200);
        }
        for (beyond, told) in [("x".repeat(4_097), "at most 4096 bytes"), (terms(65), "at most 64 terms")] {
            let refused = api.get(&ask(beyond)).await.problem(400, "invalid");
            let error = &refused.body["errors"][0];
            assert_eq!(error["field"], "q");
            assert!(error["detail"].as_str().unwrap().contains(told), "{path}: {}", refused.text);
        }
    }
}

#[tokio::test]
async fn there_are_only_so_many_exports_and_a_reader_who_goes_leaves_its_place() {
    let mut setup = Setup::default();
    (setup.config.logs.max_exports, setup.config.logs.max_exports_per_user) = (2, 1);
    let api = with(setup, (0..2_500).map(line)).await;
    let (_, ada) = api.user("ada@example.com", "viewer").await;
    let (_, bob) = api.user("bob@example.com", "viewer").await;
    let export = async |token: &str| {
        let response = api.as_who(token, "GET", EXPORT).open().await;
        assert_eq!(response.status().as_u16(), 200);
        response.into_body().into_data_stream()
    };
    let serves = async || api.metric("muster_log_exports").await.round();
    let held = export(api.token()).await;
    let refused = api.get(EXPORT).await.problem(429, "too-many-exports");
    assert_eq!(refused.header("retry-after"), "1");
    let mut other = export(&ada).await;
    assert!(other.next().await.unwrap().is_ok(), "it has begun");
    let refused = api.as_who(&bob, "GET", EXPORT).send().await.problem(503, "too-many-exports");
    assert_eq!(refused.header("retry-after"), "1");
    assert!((serves().await - 2.0).abs() < 0.1);
    assert!((api.metric("muster_http_problems_total{type=\"too-many-exports\"}").await - 2.0).abs() < 0.1);
    // A reader goes, before anything and in the middle.
    drop(other);
    let other = export(&bob).await;
    drop((held, other));
    assert!(serves().await < 0.1);
    // What is read to its end, and what is refused, leaves its place too.
    for _ in 0..2 {
        let lines = api.get(EXPORT).await.expect(200).text.lines().count();
        assert_eq!(lines, 2_501);
    }
    api.get(&format!("{EXPORT}?q={}", escaped("level:>=loud"))).await.problem(400, "invalid");
    assert!(serves().await < 0.1);
}
