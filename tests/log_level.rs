//! A device's log level, set for a while: it is obeyed, ends by itself, through kills, and can be ended at once.

use reqwest::{Method, StatusCode};
use rumqttc::v5::mqttbytes::v5::SubscribeReasonCode;
use serde_json::{Value, json};

use crate::harness::{Device, Fleet, Mqtt};

fn path(device: &Device) -> String {
    format!("/api/v1/devices/{}/log-level", device.id)
}

async fn set(fleet: &Fleet, device: &Device, level: &str, span: &str) -> (StatusCode, Value) {
    fleet.call(Method::PUT, &path(device), Some(json!({ "level": level, "for": span }))).await
}

/// What the device is told next, which it does and reports.
async fn obeys(client: &mut Mqtt, device: &Device) -> Value {
    let (topic, payload) = client.message().await;
    assert_eq!(topic, device.topic("shadow/update/delta"));
    let told = serde_json::from_str::<Value>(&payload).expect("JSON")["state"]["log"]["level"].clone();
    let is = if told.is_null() { json!("info") } else { told.clone() };
    let report = json!({ "state": { "reported": { "log": { "level": is } } } });
    client.publish(&device.topic("shadow/update"), report.to_string()).await;
    told
}

#[tokio::test]
async fn a_level_is_obeyed_and_ends_by_itself() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let mut client = fleet.connect(&device).await;
    assert!(matches!(client.subscribe(&device.topic("shadow/update/delta")).await, SubscribeReasonCode::Success(_)));
    let (status, level) = set(&fleet, &device, "debug", "2s").await;
    assert_eq!((status, &level["desired"]), (StatusCode::OK, &json!("debug")), "{level}");
    assert_eq!((&level["limited"]["level"], &level["limited"]["former"]), (&json!("debug"), &Value::Null));
    assert_eq!(obeys(&mut client, &device).await, "debug");
    let reads = || async { fleet.get(&path(&device)).await };
    fleet.eventually(reads, |level| level["reported"] == "debug").await;
    // Its time is up: the device may do as it likes, and is told so.
    let over = fleet.eventually(reads, |level| level["limited"].is_null()).await;
    assert_eq!(over["desired"], Value::Null);
    assert_eq!(obeys(&mut client, &device).await, Value::Null);
    fleet.eventually(reads, |level| level["reported"] == "info").await;
    let audit = fleet.get("/api/v1/audit?device=boiler-1&limit=10").await;
    let actions: Vec<_> =
        audit["items"].as_array().expect("a page").iter().map(|entry| entry["action"].clone()).collect();
    assert!(actions.contains(&json!("log-level.set")) && actions.contains(&json!("log-level.end")), "{audit}");
}

#[tokio::test]
async fn a_level_ends_although_the_server_was_killed_meanwhile() {
    let mut fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let desired = json!({ "desired": { "log": { "level": "warn", "to": "file" } } });
    fleet.call(Method::PATCH, "/api/v1/devices/boiler-1/shadow", Some(desired.clone())).await;
    assert_eq!(set(&fleet, &device, "trace", "1s").await.0, StatusCode::OK);
    fleet.kill().await;
    fleet.start_again().await;
    let reads = || async { fleet.get("/api/v1/devices/boiler-1/shadow").await["desired"].clone() };
    fleet.eventually(reads, |now| *now == desired["desired"]).await;
}

#[tokio::test]
async fn a_level_can_be_ended_at_once_and_is_refused_where_it_should_be() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    assert_eq!(set(&fleet, &device, "debug", "30m").await.0, StatusCode::OK);
    let (status, ended) = fleet.call(Method::DELETE, &path(&device), None).await;
    assert_eq!((status, &ended["desired"], &ended["limited"]), (StatusCode::OK, &Value::Null, &Value::Null));
    let (status, again) = fleet.call(Method::DELETE, &path(&device), None).await;
    assert_eq!((status, again), (StatusCode::OK, ended), "nothing is left to be ended");
    for (level, span) in [("loud", "30m"), ("debug", "30 minutes"), ("debug", "0s"), ("debug", "8d"), ("debug", "")] {
        assert_eq!(set(&fleet, &device, level, span).await.0, StatusCode::BAD_REQUEST, "{level} {span}");
    }
    let viewer = fleet.make("/api/v1/api-keys", json!({ "name": "v", "role": "viewer" })).await;
    let viewer = viewer["secret"].as_str().expect("a secret");
    assert_eq!(fleet.call_as(viewer, Method::GET, &path(&device), None).await.0, StatusCode::OK);
    for (method, body) in [(Method::PUT, Some(json!({ "level": "debug", "for": "1m" }))), (Method::DELETE, None)] {
        assert_eq!(fleet.call_as(viewer, method, &path(&device), body).await.0, StatusCode::FORBIDDEN);
    }
    let nobody = Device { id: "nobody".into(), ..device };
    assert_eq!(set(&fleet, &nobody, "debug", "1m").await.0, StatusCode::NOT_FOUND);
}
