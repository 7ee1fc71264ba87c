//! What a device is to do: ordered over REST, sent over MQTT, acknowledged, answered; through kills, deadlines, scopes and tenants.

use std::process::Stdio;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use rumqttc::v5::mqttbytes::v5::PubAckReason;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::process::Command;

use crate::foreign_clients::{python, said};
use crate::harness::client::Client;
use crate::harness::packet::kind::PUBACK;
use crate::harness::packet::{Connect, Property, Publish};
use crate::harness::raw::Version::V5;
use crate::harness::{Device, Fleet, Mqtt};

async fn order(fleet: &Fleet, device: &Device, body: Value) -> String {
    let made = fleet.make(&format!("/api/v1/devices/{}/commands", device.id), body).await;
    assert_eq!(made["state"], "queued", "{made}");
    made["id"].as_str().expect("an id").to_owned()
}

async fn read(fleet: &Fleet, id: &str) -> Value {
    fleet.get(&format!("/api/v1/commands/{id}")).await
}

async fn until(fleet: &Fleet, id: &str, state: &str) -> Value {
    fleet.eventually(|| read(fleet, id), |command| command["state"] == state).await
}

async fn connect(fleet: &Fleet, device: &Device) -> Client {
    let login = Some((device.username.clone(), device.password.clone()));
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    let (client, connack) = Client::hello(Box::new(socket), &Connect::new(V5, &device.id, login)).await;
    assert_eq!(connack.code, 0);
    client
}

async fn answer(client: &mut Client, device: &Device, id: &str, response: Value) {
    let topic = device.topic(&format!("commands/{id}/response"));
    assert_eq!(client.publish(Publish::new(topic, response.to_string()).qos(1)).await & 0x80, 0);
}

fn states(command: &Value) -> Vec<&str> {
    command["steps"].as_array().expect("steps").iter().filter_map(|step| step["state"].as_str()).collect()
}

#[tokio::test]
async fn a_command_reaches_its_device_and_what_becomes_of_it_is_known() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let mut client = connect(&fleet, &device).await;
    assert_eq!(client.subscribe(&device.topic("commands/+/request"), 1).await, 1);
    let id = order(&fleet, &device, json!({ "name": "reboot", "params": { "delay_s": 5 }, "timeout": "1m" })).await;
    let request = client.arrival().await;
    assert_eq!(request.topic, device.topic(&format!("commands/{id}/request")));
    let body: Value = serde_json::from_slice(&request.payload).expect("JSON");
    assert_eq!((&body["name"], &body["params"]["delay_s"]), (&json!("reboot"), &json!(5)));
    let expiry = request.properties.iter().find_map(|property| match property {
        Property::MessageExpiry(seconds) => Some(*seconds),
        _ => None,
    });
    assert!(expiry.is_some_and(|seconds| (1..=60).contains(&seconds)), "{expiry:?}");
    // It was sent, and is delivered once the device has acknowledged it.
    let sent = until(&fleet, &id, "sent").await;
    assert!(sent["waits_for"].as_str().expect("why").contains("not acknowledged"), "{sent}");
    client.acknowledge(&request).await;
    until(&fleet, &id, "delivered").await;
    answer(&mut client, &device, &id, json!({ "status": "in_progress", "progress": 40 })).await;
    let working = read(&fleet, &id).await;
    assert_eq!(
        (&working["state"], &working["progress"]),
        (&json!("in_progress"), &json!(40.0)),
        "the PUBACK comes after the COMMIT"
    );
    answer(&mut client, &device, &id, json!({ "status": "succeeded", "result": { "uptime": 1 } })).await;
    let done = read(&fleet, &id).await;
    assert_eq!(states(&done), ["queued", "sent", "delivered", "in_progress", "succeeded"]);
    assert_eq!((&done["result"], &done["waits_for"]), (&json!({ "uptime": 1 }), &Value::Null));
    // Late: evidence.
    answer(&mut client, &device, &id, json!({ "status": "failed" })).await;
    let late = read(&fleet, &id).await;
    assert_eq!((&late["state"], &late["steps"][5]["evidence"]["status"]), (&json!("succeeded"), &json!("failed")));
    // What cannot be read, and what is about no command, are dead letters.
    for (topic, payload) in [
        (format!("commands/{id}/response"), "{}"),
        ("commands/7/response".to_owned(), r#"{"status":"failed"}"#),
        ("commands/cmd_019360f0c7f97d2a8b3c5d6e7f809a1b/response".to_owned(), r#"{"status":"failed"}"#),
    ] {
        client.publish(Publish::new(device.topic(&topic), payload).qos(1)).await;
    }
    let letters = fleet.get("/api/v1/dead-letters?device=boiler-1").await;
    assert_eq!(letters["items"].as_array().expect("a page").len(), 3, "{letters}");
    let list = fleet.get("/api/v1/devices/boiler-1/commands?state=succeeded").await;
    assert_eq!(list["items"][0]["id"], id.as_str());
    let audit = fleet.get("/api/v1/audit?action=command.send").await;
    assert_eq!(audit["items"][0]["after"]["name"], "reboot");
}

#[tokio::test]
async fn a_command_waits_for_a_device_that_is_away_through_kills() {
    let mut fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let id = order(&fleet, &device, json!({ "name": "ping" })).await;
    assert!(read(&fleet, &id).await["waits_for"].as_str().expect("why").contains("never seen"));
    fleet.kill().await;
    fleet.start_again().await;
    let mut client = connect(&fleet, &device).await;
    client.subscribe(&device.topic("commands/+/request"), 1).await;
    let request = client.arrival().await;
    // Sent, not acknowledged, and the server dies.
    fleet.kill().await;
    client.vanish();
    fleet.start_again().await;
    let mut client = connect(&fleet, &device).await;
    client.subscribe(&device.topic("commands/+/request"), 1).await;
    let again = client.message().await;
    assert_eq!((again.topic, again.payload), (request.topic, request.payload));
    until(&fleet, &id, "delivered").await;
    // What the device has acknowledged is not sent again.
    client.disconnect().await;
    let mut client = connect(&fleet, &device).await;
    client.subscribe(&device.topic("commands/+/request"), 1).await;
    let second = order(&fleet, &device, json!({ "name": "ping" })).await;
    assert_eq!(client.message().await.topic, device.topic(&format!("commands/{second}/request")));
    answer(&mut client, &device, &id, json!({ "status": "rejected", "error": "not now" })).await;
    fleet.kill().await;
    fleet.start_again().await;
    let done = read(&fleet, &id).await;
    assert_eq!(
        (&done["state"], &done["error"]),
        (&json!("rejected"), &json!("not now")),
        "what was acknowledged is kept"
    );
}

#[tokio::test]
async fn a_command_ends_by_its_deadline_or_when_it_is_taken_back() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let expired = order(&fleet, &device, json!({ "name": "ping", "timeout": "1s" })).await;
    until(&fleet, &expired, "expired").await;
    let cancelled = order(&fleet, &device, json!({ "name": "ping" })).await;
    let cancel = format!("/api/v1/commands/{cancelled}/cancel");
    let (status, command) = fleet.call(Method::POST, &cancel, None).await;
    assert_eq!((status, &command["state"]), (StatusCode::OK, &json!("cancelled")));
    assert_eq!(fleet.call(Method::POST, &cancel, None).await.0, StatusCode::CONFLICT);
    let mut client = connect(&fleet, &device).await;
    client.subscribe(&device.topic("commands/+/request"), 1).await;
    let timed_out = order(&fleet, &device, json!({ "name": "ping", "timeout": "2s" })).await;
    assert_eq!(
        client.message().await.topic,
        device.topic(&format!("commands/{timed_out}/request")),
        "and neither of the others"
    );
    let command = until(&fleet, &timed_out, "timed_out").await;
    assert_eq!(states(&command), ["queued", "sent", "delivered", "timed_out"]);
}

#[tokio::test]
async fn commands_are_bounded_and_for_those_who_may() {
    let fleet = Fleet::start_with(&[("MUSTER__COMMANDS__MAX_OPEN", "2")]).await;
    let device = fleet.enrol("boiler-1").await;
    let path = "/api/v1/devices/boiler-1/commands";
    for wrong in [
        json!({}),
        json!({ "name": "Re boot" }),
        json!({ "name": "x", "timeout": "1m", "deadline": "2030-01-01T00:00:00Z" }),
        json!({ "name": "x", "deadline": "2020-01-01T00:00:00Z" }),
        json!({ "name": "x", "timeout": "31d" }),
        json!({ "name": "x", "params": [] }),
        json!({ "name": "x", "params": { "x": "x".repeat(70_000) } }),
    ] {
        assert_eq!(fleet.call(Method::POST, path, Some(wrong.clone())).await.0, StatusCode::BAD_REQUEST, "{wrong}");
    }
    let id = order(&fleet, &device, json!({ "name": "x" })).await;
    order(&fleet, &device, json!({ "name": "x" })).await;
    let (status, refused) = fleet.call(Method::POST, path, Some(json!({ "name": "x" }))).await;
    assert_eq!((status, &refused["type"]), (StatusCode::CONFLICT, &json!("urn:muster:problem:too-many")));

    let freezer = fleet.make("/api/v1/devices", json!({ "id": "freezer-1", "type": "freezer" })).await;
    assert_eq!(freezer["device"]["id"], "freezer-1");
    let viewer = fleet.make("/api/v1/api-keys", json!({ "name": "v", "role": "viewer" })).await;
    let scope = json!({ "kind": "selector", "selector": "type:freezer" });
    let scoped = fleet.make("/api/v1/api-keys", json!({ "name": "s", "role": "operator", "scope": scope })).await;
    let (viewer, scoped) = (viewer["secret"].as_str().expect("a secret"), scoped["secret"].as_str().expect("a secret"));
    let status = async |key: &str, method: Method, path: &str, body: Option<Value>| {
        fleet.call_as(key, method, path, body).await.0
    };
    let one = format!("/api/v1/commands/{id}");
    let cancel = format!("{one}/cancel");
    let body = || Some(json!({ "name": "x" }));
    for (method, path, body) in [
        (Method::POST, path, body()),
        (Method::GET, path, None),
        (Method::GET, &*one, None),
        (Method::POST, &*cancel, None),
    ] {
        assert_eq!(status(viewer, method.clone(), path, body.clone()).await, StatusCode::FORBIDDEN, "{path}");
        assert_eq!(status(scoped, method, path, body).await, StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(status(scoped, Method::POST, "/api/v1/devices/freezer-1/commands", body()).await, StatusCode::CREATED);
    // Only the device itself answers.
    let mut admin = fleet.connect_admin("console").await;
    let topic = device.topic(&format!("commands/{id}/response"));
    assert_eq!(admin.publish(&topic, r#"{"status":"succeeded"}"#).await, PubAckReason::NotAuthorized);
    let mut other = fleet.connect(&fleet.enrol("boiler-2").await).await;
    assert_eq!(other.publish(&topic, r#"{"status":"succeeded"}"#).await, PubAckReason::NotAuthorized);
    other.publish(&format!("fleet/v1/main/boiler-2/commands/{id}/response"), r#"{"status":"succeeded"}"#).await;
    assert_eq!(read(&fleet, &id).await["state"], "queued", "another device's id changes nothing");
}

#[tokio::test]
async fn a_full_queue_of_responses_makes_devices_wait_and_each_is_taken_once() {
    let fleet = Fleet::start_with(&[("MUSTER__COMMANDS__RESPONSE_QUEUE", "1")]).await;
    let mut devices = Vec::new();
    for n in 0..4 {
        let device = fleet.enrol(&format!("boiler-{n}")).await;
        let mut client = connect(&fleet, &device).await;
        client.subscribe(&device.topic("commands/+/request"), 1).await;
        let id = order(&fleet, &device, json!({ "name": "ping" })).await;
        client.message().await;
        until(&fleet, &id, "delivered").await;
        devices.push((device, client, id));
    }
    // Commands can be read, and none can be changed.
    let mut held = fleet.db().begin().await.expect("a transaction");
    sqlx::query("select 1 from command for update").execute(&mut *held).await.expect("the table is there");
    for (n, (device, client, id)) in devices.iter_mut().enumerate() {
        let topic = device.topic(&format!("commands/{id}/response"));
        let response = json!({ "status": "succeeded", "result": { "n": n } }).to_string();
        client.send_publish(&Publish::new(topic, response).qos(1).id(7)).await;
    }
    // One is in hand and one in the queue.
    let full = || fleet.metric("muster_mqtt_limit_hits_total", "\"response_queue\"");
    fleet.eventually(full, |hits| *hits > 1.5).await;
    assert!(fleet.metric("muster_mqtt_acknowledged_total", "").await < 0.5, "nobody was told anything");
    for (_, _, id) in &devices {
        assert_eq!(read(&fleet, id).await["state"], "delivered");
    }
    held.commit().await.expect("nothing was changed");
    for (n, (_, mut client, id)) in devices.into_iter().enumerate() {
        assert_eq!(client.ack(PUBACK, 7).await.reason & 0x80, 0);
        client.is_quiet("it is acknowledged once").await;
        let done = read(&fleet, &id).await;
        assert_eq!(states(&done), ["queued", "sent", "delivered", "succeeded"]);
        assert_eq!(done["result"], json!({ "n": n }));
    }
    assert!((fleet.metric("muster_command_responses_total", "\"taken\"").await - 4.0).abs() < 0.1);
}

#[tokio::test]
async fn a_device_uploads_older_lines_when_it_is_asked_to() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let mut client: Mqtt = fleet.connect(&device).await;
    client.subscribe(&device.topic("commands/+/request")).await;
    let path = "/api/v1/devices/boiler-1/logs/upload";
    for wrong in [
        json!({ "from": 2, "to": 1 }),
        json!({ "level": "loud" }),
        json!({ "from": "2", "to": "1" }),
        json!({ "from": "yesterday" }),
        json!({ "max_lines": 0 }),
    ] {
        assert_eq!(fleet.call(Method::POST, path, Some(wrong.clone())).await.0, StatusCode::BAD_REQUEST, "{wrong}");
    }
    let recent = fleet.make(path, json!({ "from": "now-1h", "to": "now" })).await;
    let (_, payload) = client.message().await;
    let params = serde_json::from_str::<Value>(&payload).expect("JSON")["params"].clone();
    let span = params["to"].as_i64().expect("a time") - params["from"].as_i64().expect("a time");
    assert!((3_600_000..3_601_000).contains(&span), "{params}");
    let cancel = format!("/api/v1/commands/{}/cancel", recent["id"].as_str().expect("an id"));
    assert_eq!(fleet.call(Method::POST, &cancel, None).await.0, StatusCode::OK);
    let filter = json!({ "from": "2025-11-21T12:00:00Z", "level": "debug", "contains": "wifi", "max_lines": 10, "timeout": "1m" });
    let made = fleet.make(path, filter).await;
    let id = made["id"].as_str().expect("an id");
    let (topic, payload) = client.message().await;
    assert_eq!(topic, device.topic(&format!("commands/{id}/request")));
    let request: Value = serde_json::from_str(&payload).expect("JSON");
    assert_eq!(request["name"], "log.upload");
    assert_eq!(
        request["params"],
        json!({ "from": 1_763_726_400_000_i64, "level": "debug", "contains": "wifi", "max_lines": 10 })
    );
    let lines = json!([
        { "ts": 1_763_726_400_001_i64, "seq": 1, "level": "debug", "message": "wifi up" },
        { "ts": 1_763_726_400_002_i64, "seq": 2, "level": "warn", "message": "wifi lost" },
    ]);
    // Twice: a line is stored once.
    for _ in 0..2 {
        assert_eq!(client.publish(&device.topic("logs"), lines.to_string()).await, PubAckReason::Success);
    }
    let done = json!({ "status": "succeeded", "result": { "lines": 2 } }).to_string();
    client.publish(&device.topic(&format!("commands/{id}/response")), done).await;
    let command = read(&fleet, id).await;
    assert_eq!((&command["state"], &command["result"]["lines"]), (&json!("succeeded"), &json!(2)));
    let stored: i64 = sqlx::query_scalar("select count(*) from log").fetch_one(fleet.db()).await.expect("rows");
    assert_eq!(stored, 2);
    assert!(client.message_within(Duration::from_millis(200)).await.is_none(), "it is not sent again");
}

#[tokio::test]
async fn paho_obeys_in_both_versions() {
    let fleet = Fleet::start().await;
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/paho_commands.py");
    for (id, version) in [("boiler-1", "311"), ("boiler-2", "5")] {
        let device = fleet.enrol(id).await;
        let mut ids = Vec::new();
        // One waits for the device, the others are ordered while it obeys.
        ids.push(order(&fleet, &device, json!({ "name": "ping" })).await);
        let address = fleet.mqtt_addr();
        let child = Command::new(python())
            .arg(&script)
            .args([&address.ip().to_string(), &address.port().to_string()])
            .args([&device.username, &device.password, &device.id, version, "3"])
            .kill_on_drop(true)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("`make setup` installs the test clients");
        until(&fleet, &ids[0], "succeeded").await;
        ids.push(order(&fleet, &device, json!({ "name": "blink", "params": { "times": 4 } })).await);
        ids.push(order(&fleet, &device, json!({ "name": "explode" })).await);
        let done = said(child).await;
        assert_eq!(done.iter().map(|fact| &fact["does"]).collect::<Vec<_>>(), ["ping", "blink", "explode"]);
        // It ended once its answers were acknowledged: they are known.
        let blinked = read(&fleet, &ids[1]).await;
        assert_eq!((&blinked["state"], &blinked["result"]["blinked"]), (&json!("succeeded"), &json!(4)), "{blinked}");
        assert!(states(&blinked).contains(&"in_progress") && blinked["progress"] == 100.0, "{blinked}");
        let refused = read(&fleet, &ids[2]).await;
        assert_eq!((&refused["state"], &refused["error"]), (&json!("rejected"), &json!("expected ping or blink")));
    }
}
