//! The index of log lines through kills and a full disk: in the end it leads to every line that was acknowledged, once.

use chrono::{DateTime, Utc};
use fleet_core::clock::Clock;
use rand::RngExt as _;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::{ADMIN, Device, Fleet, muster};

/// Kills in CI; as many as it takes in `make soak`.
const KILLS: usize = 5;

#[expect(clippy::disallowed_methods, reason = "a knob of the test, not a setting of the product")]
fn kills() -> usize {
    std::env::var("MUSTER_SOAK_ROUNDS").ok().map_or(KILLS, |rounds| rounds.parse().expect("a number of rounds"))
}

/// Commits often, so that a kill falls on one.
pub(crate) const BUSY: [(&str, &str); 4] = [
    ("MUSTER__SEARCH__COMMIT_MS", "20"),
    ("MUSTER__SEARCH__POLL_MS", "5"),
    ("MUSTER__SEARCH__BATCH_LINES", "50"),
    ("MUSTER__SEARCH__MIN_FREE_BYTES", "0"),
];

pub(crate) async fn index(fleet: &Fleet) -> Value {
    fleet.get("/api/v1/index").await
}

/// The index when it has everything that was stored.
async fn caught_up(fleet: &Fleet) -> Value {
    fleet.eventually(|| index(fleet), |index| index["state"] == "ok" && index["behind"] == 0).await
}

pub(crate) fn lines(index: &Value) -> u64 {
    index["days"].as_array().into_iter().flatten().map(|day| day["lines"].as_u64().expect("a number")).sum()
}

/// What comes of such work on all days.
async fn work(fleet: &Fleet, task: &str) -> Vec<Value> {
    let (status, began) = fleet.call(Method::POST, &format!("/api/v1/index/{task}"), None).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{began}");
    let done = fleet.eventually(|| index(fleet), |index| !index["job"]["finished_at"].is_null()).await;
    done["job"]["done"].as_array().expect("days").clone()
}

pub(crate) async fn stored(fleet: &Fleet) -> u64 {
    let count = sqlx::query_scalar::<_, i64>("select count(*) from log").fetch_one(fleet.db()).await;
    count.expect("the table is there").unsigned_abs()
}

/// A message with lines of three days.
fn message(from: u64, count: u64) -> String {
    let now = Clock::system().now_ms();
    let line = |nth: u64| {
        let ts = now - i64::try_from(nth % 3).expect("small") * 86_400_000;
        json!({ "ts": ts, "seq": nth, "message": format!("line {nth} of many"), "fields": { "nth": nth } })
    };
    Value::Array((from..from + count).map(line).collect()).to_string()
}

/// Sends lines until the server is gone, or `most` messages were acknowledged; says how many lines were.
pub(crate) async fn send(fleet: &Fleet, device: &Device, from: u64, most: u64) -> u64 {
    let mut mqtt = fleet.connect(device).await;
    for nth in 0..most {
        mqtt.publish(&device.topic("logs"), message(from + nth * 10, 10)).await;
    }
    most * 10
}

#[tokio::test(flavor = "multi_thread")]
async fn whenever_it_is_killed_the_index_leads_to_what_was_stored_and_once() {
    let mut fleet = Fleet::start_with(&BUSY).await;
    let devices = [fleet.enrol("boiler-1").await, fleet.enrol("boiler-2").await, fleet.enrol("pump-1").await];
    let mut sent = 0;
    for round in 0..kills() {
        let most = rand::rng().random_range(1..20);
        for device in &devices {
            sent += send(&fleet, device, u64::try_from(round).expect("small") * 1_000, most).await;
        }
        // Between the commit of the rows, which was acknowledged, and wherever the index is.
        fleet.kill().await;
        fleet.start_again().await;
        let index = caught_up(&fleet).await;
        assert_eq!((lines(&index), stored(&fleet).await), (sent, sent), "round {round}: {index}");
    }
    for found in work(&fleet, "verify").await {
        assert!(found["equal"] == true, "{found}");
    }
    assert!(fleet.stop().await.success());
}

/// `muster index …` as the admin.
pub(crate) async fn command(fleet: &Fleet, words: &[&str]) -> (Option<i32>, String) {
    let output = muster()
        .arg("index")
        .args(words)
        .env("MUSTER_URL", fleet.url())
        .env("MUSTER_ADMIN_EMAIL", ADMIN.0)
        .env("MUSTER_ADMIN_PASSWORD", ADMIN.1)
        .output()
        .await
        .expect("the binary is built");
    (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
}

#[tokio::test]
async fn a_day_that_differs_is_found_and_made_anew_by_the_command() {
    let mut fleet = Fleet::start_with(&BUSY).await;
    let device = fleet.enrol("boiler-1").await;
    let sent = send(&fleet, &device, 0, 9).await;
    fleet.eventually(|| index(&fleet), |index| lines(index) == sent).await;
    let (code, said) = command(&fleet, &["verify"]).await;
    assert_eq!((code, said.contains("differs")), (Some(0), false), "{said}");
    let today = Clock::system().now().date_naive().to_string();
    sqlx::query("update log set message = 'another word' where ts >= $1::timestamptz and seq = 0")
        .bind(format!("{today}T00:00:00Z").parse::<DateTime<Utc>>().expect("a time"))
        .execute(fleet.db())
        .await
        .expect("a row");
    let (code, said) = command(&fleet, &["verify"]).await;
    let differing = said.lines().filter(|line| line.contains("differs")).collect::<Vec<_>>();
    assert_eq!((code, differing.len()), (Some(1), 1), "{said}");
    let day = differing[0].split(':').next().expect("a day");
    let (code, said) = command(&fleet, &["rebuild", day]).await;
    assert_eq!((code, said.lines().count()), (Some(0), 1), "{said}");
    assert_eq!(command(&fleet, &["verify"]).await.0, Some(0));
    assert_eq!(command(&fleet, &["verify", "yesterday"]).await.0, Some(1));
    assert!(fleet.stop().await.success());
}

#[tokio::test]
async fn without_room_for_the_index_lines_are_stored_and_found_later() {
    let mut settings = BUSY.to_vec();
    settings[3].1 = "9000000000000000000";
    let mut fleet = Fleet::start_with(&settings).await;
    let device = fleet.enrol("boiler-1").await;
    let sent = send(&fleet, &device, 0, 3).await;
    let full = fleet.eventually(|| index(&fleet), |index| index["state"] == "disk_full").await;
    assert!(full["reason"].as_str().expect("why").contains("search.min_free_bytes"), "{full}");
    assert_eq!((lines(&full), stored(&fleet).await), (0, sent));
    let ready = fleet.get("/readyz").await;
    assert_eq!((&ready["ready"], &ready["checks"]["index"]), (&json!(true), &json!("disk_full")), "{ready}");
    assert!((fleet.metric("muster_index_state", r#"{state="disk_full"}"#).await - 1.0).abs() < f64::EPSILON);
    assert!(fleet.stop().await.success());
    fleet.set("MUSTER__SEARCH__MIN_FREE_BYTES", "0");
    fleet.start_again().await;
    assert_eq!(lines(&caught_up(&fleet).await), sent);
    assert!(fleet.stop().await.success());
}
