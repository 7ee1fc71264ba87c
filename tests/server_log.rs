//! The server's own log is kept as lines of a device, for those who may read its lines.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::harness::Fleet;
use crate::log_ingest::lines;

const OWN: [(&str, &str); 2] = [("MUSTER__SERVER_LOG__DEVICE", "main/muster-1"), ("MUSTER__SERVER_LOG__LEVEL", "info")];

/// Has the server say something at the level `info`.
async fn rotate(fleet: &Fleet) {
    let (status, answer) = fleet.call(Method::POST, "/api/v1/auth/keys/rotate", Some(json!({}))).await;
    assert!(status.is_success(), "{answer}");
}

/// What it said of that: its key, where there is one.
async fn told(fleet: &Fleet) -> Vec<Value> {
    let of_rotation = |message: &str| message == "access tokens are signed with a new key";
    let lines = lines(fleet, "muster-1").await.into_iter().filter(|line| of_rotation(&line.message));
    lines
        .map(|line| {
            assert_eq!((line.level, line.target.as_deref()), (3, Some("api::routes::signing_keys")), "{line:?}");
            line.fields["kid"].clone()
        })
        .collect()
}

#[tokio::test]
async fn what_the_server_says_is_kept_once_its_device_is_there_and_also_when_it_stops() {
    let mut fleet = Fleet::start_with(&OWN).await;
    rotate(&fleet).await;
    assert!(told(&fleet).await.is_empty(), "nobody enrolled the device yet");
    fleet.enrol("muster-1").await;
    let kept = fleet.eventually(|| told(&fleet), |told| told.len() == 1).await;
    assert!(kept[0].is_string(), "{kept:?}");
    assert!(fleet.stop().await.success());
    let last = lines(&fleet, "muster-1").await.last().map(|line| line.message.clone());
    assert_eq!(last.as_deref(), Some("stopping"));
}

#[tokio::test]
async fn a_table_that_is_away_makes_no_loop() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let log = dir.path().join("log");
    let fleet = Fleet::start_logged(&OWN, &log).await;
    fleet.enrol("muster-1").await;
    sqlx::query("alter table log rename to log_away").execute(fleet.db()).await.expect("the database answers");
    rotate(&fleet).await;
    // The line is tried again and again, and what is said of that is not among the lines.
    let tried = || std::future::ready(std::fs::read_to_string(&log).unwrap_or_default());
    fleet.eventually(tried, |log| log.matches("log lines could not be stored").count() > 1).await;
    sqlx::query("alter table log_away rename to log").execute(fleet.db()).await.expect("the database answers");
    fleet.eventually(|| told(&fleet), |told| told.len() == 1).await;
    let own = lines(&fleet, "muster-1").await.into_iter().filter(|line| {
        line.target.as_deref().is_some_and(|target| target.starts_with("fleet_core::log") || target.starts_with("sqlx"))
    });
    assert_eq!(own.count(), 0);
    assert!(fleet.metric("muster_server_log_dropped_total", "").await < 0.5);
}

#[tokio::test]
async fn without_the_setting_nothing_is_kept() {
    let fleet = Fleet::start().await;
    fleet.enrol("muster-1").await;
    rotate(&fleet).await;
    let (status, _) = fleet.call(Method::GET, "/api/v1/devices/muster-1", None).await;
    assert_eq!((status, lines(&fleet, "muster-1").await.len()), (StatusCode::OK, 0));
}
