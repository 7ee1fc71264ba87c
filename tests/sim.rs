//! The simulator's ledger proves that nothing was lost, and says so by its exit code when something was.

use std::process::{Output, Stdio};
use std::time::Duration;

use device_sim::{Access, Faults, Scenario, Simulation};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::harness::{ADMIN, Fleet, PATIENCE, muster};

async fn sim(fleet: &Fleet, args: &[&str]) -> Output {
    let run = muster()
        .arg("sim")
        .args(args)
        .args(["--url", fleet.url(), "--email", ADMIN.0, "--password", ADMIN.1])
        .stdin(Stdio::null())
        .output();
    timeout(3 * PATIENCE, run).await.expect("it ends in time").expect("the binary is built")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {output:?}"))
}

#[tokio::test]
async fn the_ledger_finds_everything_and_notices_what_is_taken_away() {
    let fleet = Fleet::start().await;
    let dir = tempfile::tempdir().expect("a temporary directory");
    let ledger = dir.path().join("ledger");
    let ledger = ledger.to_str().expect("text");
    let mqtt = fleet.mqtt_addr().to_string();
    let load = ["--devices", "5", "--rate", "100", "--duration", "2s", "--reconnects-per-minute", "60", "--seed", "3"];
    let run = sim(&fleet, &[&load[..], &["--mqtt", &mqtt, "--json", "--ledger", ledger]].concat()).await;
    assert_eq!(run.status.code(), Some(0), "{run:?}");
    let report = json(&run);
    assert!(report["acknowledged"].as_u64() > Some(50), "{report}");
    assert_eq!((&report["missing"], &report["duplicated"]), (&0.into(), &0.into()), "{report}");

    assert_eq!(sim(&fleet, &["verify", ledger]).await.status.code(), Some(0));
    let gone = sqlx::query(
        "delete from telemetry where (device_key, ts, seq) = (select device_key, ts, seq from telemetry limit 1)",
    );
    assert_eq!(gone.execute(fleet.db()).await.expect("the database answers").rows_affected(), 1);
    let verdict = sim(&fleet, &["verify", ledger]).await;
    assert_eq!(verdict.status.code(), Some(1), "a missing reading is a broken promise: {verdict:?}");
}

#[tokio::test]
async fn every_log_line_that_was_acknowledged_is_stored_once() {
    let fleet = Fleet::start().await;
    let mqtt = fleet.mqtt_addr().to_string();
    let load =
        ["--devices", "5", "--rate", "20", "--log-rate", "200", "--duration", "2s", "--reconnects-per-minute", "120"];
    let run = sim(&fleet, &[&load[..], &["--mqtt", &mqtt, "--json", "--seed", "5"]].concat()).await;
    assert_eq!(run.status.code(), Some(0), "{run:?}");
    let report = json(&run);
    let (sent, acknowledged) = (report["lines_sent"].as_i64(), report["lines_acknowledged"].as_i64());
    assert!(acknowledged > Some(200) && acknowledged == sent, "{report}");
    let count = "select count(*), count(distinct level), count(distinct (device_key, seq)) from log where seq > 0";
    let stored: (i64, i64, i64) = sqlx::query_as(count).fetch_one(fleet.db()).await.expect("the database answers");
    assert_eq!((Some(stored.0), stored.0), (sent, stored.2), "{report}");
    assert!(stored.1 >= 3, "levels: {}", stored.1);
    let below = sqlx::query_scalar::<_, i64>("select count(*) from log where level < 3").fetch_one(fleet.db()).await;
    assert_eq!(below.expect("the database answers"), 0_i64, "what is below info stays on the device");
}

#[tokio::test]
async fn simulated_devices_do_what_they_are_asked_to() {
    let fleet = Fleet::start().await;
    let scenario = Scenario {
        url: fleet.url().to_owned(),
        mqtt: fleet.mqtt_addr().to_string(),
        access: Access::Password { email: ADMIN.0.into(), password: ADMIN.1.into() },
        devices: 2,
        rate: 2.0,
        log_rate: 40.0,
        duration: Duration::from_hours(1),
        payload_bytes: 200,
        seed: 11,
        faults: Faults { reconnects_per_minute: 30.0, ..Faults::default() },
        ledger: None,
        cleanup: false,
    };
    let simulation = Simulation::start(&scenario, &CancellationToken::new(), |_| {}).await.expect("it starts");
    // One speaks MQTT 5, the other 3.1.1.
    for device in ["sim-11-0", "sim-11-1"] {
        let stored = async |below: &str| {
            let sql = format!(
                "select count(*) from log l join device d on d.key = l.device_key where d.id = $1 and level {below}"
            );
            let count = sqlx::query_scalar::<_, i64>(AssertSqlSafe(sql)).bind(device);
            count.fetch_one(fleet.db()).await.expect("the database answers")
        };
        let command = async |path: &str, body: Value| {
            let made = fleet.make(&format!("/api/v1/devices/{device}/{path}"), body).await;
            let at = format!("/api/v1/commands/{}", made["id"].as_str().expect("an id"));
            fleet
                .eventually(|| fleet.get(&at), |command| command["state"] != "queued" && command["waits_for"].is_null())
                .await
        };
        let pong = command("commands", json!({ "name": "ping" })).await;
        assert_eq!((&pong["state"], &pong["result"]["pong"]), (&json!("succeeded"), &json!(true)), "{pong}");
        assert_eq!(command("commands", json!({ "name": "reboot" })).await["state"], "rejected");
        fleet.eventually(|| stored(">= 3"), |lines| *lines > 20).await;
        assert_eq!(stored("< 3").await, 0, "what is below info stays with the device");
        // It has written lines below that, and sends them when it is asked to.
        let uploaded = command("logs/upload", json!({ "level": "debug", "contains": "read ", "max_lines": 5 })).await;
        assert_eq!((&uploaded["state"], &uploaded["result"]["lines"]), (&json!("succeeded"), &json!(5)), "{uploaded}");
        assert_eq!(stored("< 3").await, 5, "stored before it was answered");
        // Or sends them as they are written, for a while.
        let path = format!("/api/v1/devices/{device}/log-level");
        let (status, _) = fleet.call(Method::PUT, &path, Some(json!({ "level": "debug", "for": "1h" }))).await;
        assert_eq!(status, StatusCode::OK);
        fleet.eventually(|| fleet.get(&path), |level| level["reported"] == "debug").await;
        fleet.eventually(|| stored("< 3"), |lines| *lines > 10).await;
        assert_eq!(fleet.call(Method::DELETE, &path, None).await.0, StatusCode::OK);
        fleet.eventually(|| fleet.get(&path), |level| level["reported"] == "info").await;
    }
    simulation.stop(PATIENCE).await;
}

#[tokio::test]
async fn a_wrong_login_and_a_server_that_is_away_are_told_in_a_line() {
    let away = muster()
        .args(["sim", "--devices", "1", "--duration", "1s", "--password", "x"])
        .args(["--url", "http://127.0.0.1:1", "--mqtt", "127.0.0.1:1"])
        .stdin(Stdio::null())
        .output();
    let away = timeout(3 * PATIENCE, away).await.expect("it gives up in time").expect("the binary is built");
    assert_eq!(away.status.code(), Some(6), "{away:?}");
    assert_eq!(String::from_utf8_lossy(&away.stderr).trim().lines().count(), 1, "{away:?}");
}
