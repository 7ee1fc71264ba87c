//! A device leaves for good: it is sent away at once, and a purge leaves nothing of it but the report.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::harness::client::Client;
use crate::harness::packet::{Connect, Publish, Will};
use crate::harness::raw::Version::V5;
use crate::harness::{ADMIN, Device, Fleet};

async fn connect(fleet: &Fleet, hello: &Connect) -> (Client, u8) {
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    let (client, answer) = Client::hello(Box::new(socket), hello).await;
    (client, answer.code)
}

fn hello(device: &Device) -> Connect {
    let login = Some((device.username.clone(), device.password.clone()));
    let will = Will { retain: true, ..Will::new(device.topic("status"), r#"{"state":"lost"}"#) };
    Connect::new(V5, &device.id, login).kept().will(will)
}

async fn leave(fleet: &Fleet, device: &Device, purge: bool) -> String {
    let path = format!("/api/v1/devices/{}/decommission", device.id);
    let (status, report) = fleet.call(Method::POST, &path, Some(json!({ "purge": purge }))).await;
    assert_eq!(status, StatusCode::ACCEPTED, "{report}");
    format!("/api/v1/decommissions/{}", report["id"].as_str().expect("an id"))
}

async fn finished(fleet: &Fleet, report: &str) -> Value {
    fleet.eventually(|| fleet.get(report), |report| report["state"] == "finished").await
}

/// Whether somebody who comes later is told of the device's last words.
async fn is_remembered(fleet: &Fleet, device: &Device) -> bool {
    let login = (ADMIN.0.to_owned(), fleet.token().to_owned());
    let (mut watcher, code) = connect(fleet, &Connect::new(V5, "later", Some(login))).await;
    assert_eq!(code, 0);
    let marker = format!("app/main/{}", device.id);
    watcher.publish(Publish::new(marker.clone(), "x").qos(1).retained()).await;
    assert_eq!(watcher.subscribe(&device.topic("#"), 1).await, 1);
    assert_eq!(watcher.subscribe(&marker, 1).await, 1);
    watcher.message().await.topic != marker
}

#[tokio::test]
async fn a_purged_device_is_sent_away_and_leaves_nothing_but_the_report() {
    let mut fleet = Fleet::start_with(&[("MUSTER__RETENTION__DECOMMISSION_ROWS", "7")]).await;
    let device = fleet.enrol("boiler-1").await;
    let other = fleet.enrol("pump-1").await;
    let (mut client, code) = connect(&fleet, &hello(&device)).await;
    let (mut stays, _) = connect(&fleet, &hello(&other)).await;
    assert_eq!(code, 0);
    for seq in 0..20 {
        let reading = json!({ "ts": 1_763_692_212_000_i64 + seq, "seq": seq, "values": { "t": seq } });
        client.publish(Publish::new(device.topic("telemetry"), reading.to_string()).qos(1)).await;
    }
    client.publish(Publish::new(device.topic("telemetry"), "no reading").qos(1)).await;
    client.publish(Publish::new(device.topic("status"), r#"{"state":"online"}"#).qos(1).retained()).await;
    client.subscribe(&device.topic("commands/#"), 1).await;
    assert!(is_remembered(&fleet, &device).await);

    let since = Instant::now();
    let report = leave(&fleet, &device, true).await;
    client.ends_with(0x98, "the device was decommissioned").await;
    eprintln!("sent away after {} ms", since.elapsed().as_millis());
    assert_eq!(connect(&fleet, &hello(&device)).await.1, 0x86, "it cannot return");
    let report = finished(&fleet, &report).await;
    eprintln!("nothing was left after {} ms: {}", since.elapsed().as_millis(), report["deleted"]);
    for (table, rows) in [("telemetry", 20), ("dead_letter", 1), ("credential", 1), ("device", 1)] {
        assert_eq!(report["deleted"][table], rows, "{report}");
    }
    assert!(report["left"].as_object().expect("counts").values().all(|left| left == 0), "{report}");
    assert!(!is_remembered(&fleet, &device).await, "its last will included");
    assert_eq!(fleet.call(Method::GET, "/api/v1/devices/boiler-1", None).await.0, StatusCode::NOT_FOUND);
    let letters = fleet.get("/api/v1/dead-letters?device=boiler-1").await;
    assert_eq!(letters["items"], json!([]));
    assert!(fleet.metric("muster_decommission_rows_total", "").await > 20.0);
    stays.is_quiet("it is another device").await;

    // A restart brings nothing back, and the next device of that name begins with nothing.
    fleet.stop().await;
    fleet.start_again().await;
    assert!(!is_remembered(&fleet, &device).await);
    let next = fleet.enrol("boiler-1").await;
    assert_eq!(fleet.series(&next, "t").await, []);
    assert_eq!(connect(&fleet, &hello(&device)).await.1, 0x86, "with the old password");
    assert_eq!(connect(&fleet, &hello(&next)).await.1, 0);
}

#[tokio::test]
async fn a_decommissioned_device_keeps_its_readings_and_a_purge_survives_a_crash() {
    let mut fleet = Fleet::start_with(&[("MUSTER__RETENTION__DECOMMISSION_ROWS", "1")]).await;
    let device = fleet.enrol("boiler-1").await;
    let (mut client, _) = connect(&fleet, &hello(&device)).await;
    for seq in 0..120 {
        let reading = json!({ "ts": 1_763_692_212_000_i64 + seq, "seq": seq, "values": { "t": seq } });
        client.publish(Publish::new(device.topic("telemetry"), reading.to_string()).qos(1)).await;
    }
    let kept = leave(&fleet, &device, false).await;
    client.ends_with(0x98, "the device was decommissioned").await;
    finished(&fleet, &kept).await;
    assert_eq!(fleet.series(&device, "t").await.len(), 120);
    assert_eq!(fleet.get("/api/v1/sessions?device=boiler-1").await["items"], json!([]));

    let purge = leave(&fleet, &device, true).await;
    let begun = |report: &Value| report["deleted"]["telemetry"].as_i64().unwrap_or_default() > 0;
    fleet.eventually(|| fleet.get(&purge), begun).await;
    fleet.kill().await;
    fleet.start_again().await;
    let report = finished(&fleet, &purge).await;
    assert_eq!(report["deleted"]["telemetry"], 120, "each of them once: {report}");
}
