//! What devices log, read by people: in the terminal as it is written, and found again.

use std::process::Stdio;

use fleet_core::clock::Clock;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStderr, ChildStdout};
use tokio::time::timeout;

use crate::harness::{Answer, Device, Fleet, Mqtt, PATIENCE, muster};

/// `muster logs -f`, running.
struct Follow {
    child: Child,
    out: Lines<BufReader<ChildStdout>>,
    err: Lines<BufReader<ChildStderr>>,
}

impl Follow {
    /// Begins to follow; returns when the server has begun to serve it.
    async fn start(fleet: &Fleet, token: &str, arguments: &[&str]) -> Self {
        let mut command = muster();
        command.args(["logs", "-f", "--url", fleet.url(), "--token", token]).args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let mut child = command.spawn().expect("muster starts");
        let out = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let err = BufReader::new(child.stderr.take().expect("a pipe")).lines();
        fleet.eventually(|| fleet.metric("muster_log_tails", ""), |tails| *tails > 0.5).await;
        Self { child, out, err }
    }

    async fn line(&mut self) -> String {
        let line = timeout(PATIENCE, self.out.next_line()).await.expect("a line in time");
        line.expect("text").expect("it goes on")
    }

    async fn said(&mut self) -> String {
        let line = timeout(PATIENCE, self.err.next_line()).await.expect("a word in time");
        line.expect("text").expect("it goes on")
    }
}

fn line(n: usize, ts_ms: i64) -> Value {
    let level = if n.is_multiple_of(2) { "warn" } else { "info" };
    json!({ "ts": ts_ms, "seq": n, "level": level, "target": "net.wifi", "message": format!("line {n}"), "fields": { "n": n } })
}

async fn publish(mqtt: &mut Mqtt, device: &Device, n: usize) {
    publish_at(mqtt, device, n, 1_763_692_212_345).await;
}

async fn publish_at(mqtt: &mut Mqtt, device: &Device, n: usize, ts_ms: i64) {
    assert_eq!(mqtt.publish(&device.topic("logs"), line(n, ts_ms).to_string()).await, Answer::Success);
}

#[tokio::test]
async fn an_acknowledged_line_is_in_the_tail_at_once() {
    let fleet = Fleet::start().await;
    let pump = fleet.enrol("pump-7").await;
    let mut follow = Follow::start(&fleet, fleet.token(), &["level:>=warn", "device:pump-*"]).await;
    let mut mqtt = fleet.connect(&pump).await;
    for n in 0..20 {
        publish(&mut mqtt, &pump, n).await;
        if n.is_multiple_of(2) {
            assert_eq!(follow.line().await, format!("2025-11-21T02:30:12.345Z WARN pump-7 net.wifi: line {n} n={n}"));
        }
    }
}

#[tokio::test]
async fn an_acknowledged_line_is_found_counted_and_printed() {
    let fleet = Fleet::start().await;
    let pump = fleet.enrol("pump-7").await;
    let mut mqtt = fleet.connect(&pump).await;
    for n in 0..10 {
        publish(&mut mqtt, &pump, n).await;
    }
    let found = async || fleet.get("/api/v1/logs/search?q=level:warn").await["items"].as_array().map_or(0, Vec::len);
    fleet.eventually(found, |lines| *lines == 5).await;
    let page = fleet.get("/api/v1/logs/search?q=line&limit=3&order=oldest").await;
    let seqs = page["items"].as_array().expect("items").iter().map(|line| line["seq"].as_u64()).collect::<Vec<_>>();
    assert_eq!(seqs, [Some(0), Some(1), Some(2)]);
    let histogram = fleet.get("/api/v1/logs/histogram?interval=1h").await;
    assert_eq!(histogram["items"][0]["levels"], json!({ "info": 5, "warn": 5 }));
    let top = fleet.get("/api/v1/logs/top?field=device").await;
    assert_eq!(top["items"], json!([{ "value": "pump-7", "count": 10 }]));
    let patterns = fleet.get("/api/v1/logs/patterns").await;
    assert_eq!((&patterns["items"][0]["text"], &patterns["items"][0]["count"]), (&json!("line *"), &json!(10)));
    let mut command = muster();
    command.args(["logs", "--url", fleet.url(), "--token", fleet.token(), "--limit", "2", "fields.n:>=8"]);
    let printed = command.output().await.expect("muster runs");
    let printed = String::from_utf8_lossy(&printed.stdout).into_owned();
    assert_eq!(printed.lines().count(), 2, "{printed}");
    assert!(printed.contains("INFO pump-7 net.wifi: line 9 n=9"), "{printed}");
}

#[tokio::test]
async fn a_tail_outlives_the_server_and_loses_and_repeats_nothing() {
    let mut fleet = Fleet::start().await;
    let pump = fleet.enrol("pump-7").await;
    let mut follow = Follow::start(&fleet, fleet.token(), &["--json"]).await;
    let mut mqtt = fleet.connect(&pump).await;
    // What is long past is kept no longer once the server starts anew.
    let now_ms = Clock::system().now_ms();
    let mut seen = Vec::new();
    for round in 0..3 {
        for n in round * 100..(round + 1) * 100 {
            publish_at(&mut mqtt, &pump, n, now_ms).await;
        }
        // Killed while lines are on their way to the terminal.
        for _ in 0..50 {
            seen.push(follow.line().await);
        }
        fleet.kill().await;
        drop(mqtt);
        fleet.start_again().await;
        mqtt = fleet.connect(&pump).await;
        publish_at(&mut mqtt, &pump, 1000 + round, now_ms).await;
        while seen.len() < (round + 1) * 101 {
            seen.push(follow.line().await);
        }
        assert!(follow.said().await.contains("trying again"));
    }
    let seen = seen.iter().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let seen = seen.map(|line| line["seq"].as_u64().expect("a number")).collect::<Vec<_>>();
    let round = |round: u64| (round * 100..(round + 1) * 100).chain([1000 + round]);
    assert_eq!(seen, (0..3).flat_map(round).collect::<Vec<_>>());
}

#[tokio::test]
async fn who_may_not_see_lines_is_told_so_and_a_revoked_key_ends_the_tail() {
    let fleet = Fleet::start().await;
    fleet.make("/api/v1/roles", json!({ "id": "blind", "permissions": ["devices:read"] })).await;
    let secret = async |role: &str| {
        let key = fleet.make("/api/v1/api-keys", json!({ "name": role, "role": role })).await;
        (key["id"].as_str().expect("an id").to_owned(), key["secret"].as_str().expect("a secret").to_owned())
    };
    let (_, blind) = secret("blind").await;
    let asked =
        muster().args(["logs", "-f", "--url", fleet.url(), "--token", &blind]).output().await.expect("muster runs");
    let said = String::from_utf8_lossy(&asked.stderr).into_owned();
    assert_eq!((asked.status.code(), said.contains("logs:read")), (Some(1), true), "{said}");

    let (id, key) = secret("viewer").await;
    let mut follow = Follow::start(&fleet, &key, &[]).await;
    let (status, _) = fleet.call(reqwest::Method::DELETE, &format!("/api/v1/api-keys/{id}"), None).await;
    assert_eq!(status.as_u16(), 204);
    assert!(follow.said().await.contains("the tail has ended"));
    let ended = timeout(PATIENCE, follow.child.wait()).await.expect("in time").expect("its status");
    assert_eq!(ended.code(), Some(1));
}
