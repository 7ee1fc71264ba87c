//! What a device is to be and what it says it is: over REST and MQTT, through kills, within scope and tenant.

use std::process::Stdio;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use rumqttc::v5::mqttbytes::v5::{PubAckReason, SubscribeReasonCode};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Command;
use tokio::time::timeout;

use crate::foreign_clients::python;
use crate::harness::client::Client;
use crate::harness::packet::kind::PUBACK;
use crate::harness::packet::{Connect, Publish};
use crate::harness::raw::Version::V5;
use crate::harness::{Device, Fleet, Mqtt, PATIENCE};

fn path(device: &Device) -> String {
    format!("/api/v1/devices/{}/shadow", device.id)
}

async fn desire(fleet: &Fleet, device: &Device, desired: Value) -> Value {
    let (status, shadow) = fleet.call(Method::PATCH, &path(device), Some(json!({ "desired": desired }))).await;
    assert_eq!(status, StatusCode::OK, "{shadow}");
    shadow
}

/// The next message on this topic of the device.
async fn on(client: &mut Mqtt, device: &Device, channel: &str) -> Value {
    let (topic, payload) = client.message().await;
    assert_eq!(topic, device.topic(channel), "{payload}");
    serde_json::from_str(&payload).expect("JSON")
}

/// Connects a device and has it listen for all that is said of its shadow.
async fn listening(fleet: &Fleet, device: &Device) -> Mqtt {
    let mut client = fleet.connect(device).await;
    assert!(matches!(client.subscribe(&device.topic("shadow/#")).await, SubscribeReasonCode::Success(_)));
    client
}

#[tokio::test]
async fn a_device_is_told_what_it_is_to_be_and_says_what_it_is() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let mut client = fleet.connect(&device).await;
    for topic in ["shadow/get/accepted", "shadow/update/+"] {
        client.subscribe(&device.topic(topic)).await;
    }
    // It asks, and there is nothing.
    assert_eq!(client.publish(&device.topic("shadow/get"), r#"{"client_token":"t1"}"#).await, PubAckReason::Success);
    let got = on(&mut client, &device, "shadow/get/accepted").await;
    assert_eq!(
        (&got["state"], &got["version"], &got["client_token"]),
        (&json!({ "desired": {}, "reported": {} }), &json!(0), &json!("t1"))
    );

    let shadow = desire(&fleet, &device, json!({ "fan": { "speed": 3, "mode": "auto" }, "list": [1, 2] })).await;
    assert_eq!((&shadow["version"], &shadow["delta"]["fan"]["speed"]), (&json!(1), &json!(3)));
    let delta = on(&mut client, &device, "shadow/update/delta").await;
    assert_eq!(delta["state"], json!({ "fan": { "speed": 3, "mode": "auto" }, "list": [1, 2] }));
    assert_eq!(delta["version"], 1);

    // It does some of it, and says so.
    let report = json!({ "state": { "reported": { "fan": { "speed": 3, "mode": "off" }, "list": [1], "up": true } }, "clientToken": "t2" });
    assert_eq!(client.publish(&device.topic("shadow/update"), report.to_string()).await, PubAckReason::Success);
    let accepted = on(&mut client, &device, "shadow/update/accepted").await;
    assert_eq!((&accepted["version"], &accepted["clientToken"]), (&json!(2), &json!("t2")));
    assert_eq!(accepted["state"]["reported"], report["state"]["reported"]);
    let shadow = fleet.get(&path(&device)).await;
    assert_eq!(shadow["delta"], json!({ "fan": { "mode": "auto" }, "list": [1, 2] }), "arrays are whole");
    assert_eq!(shadow["reported"]["up"], true);

    // An update of another version is refused, as is what is no update, and what people say.
    let stale = json!({ "state": { "reported": { "up": null } }, "version": 1, "client_token": "t3" });
    for (payload, code) in [
        (stale.to_string(), 409),
        ("{".to_owned(), 400),
        (json!({ "state": { "desired": {} } }).to_string(), 403),
        (json!({ "state": { "reported": { "x": "x".repeat(9_000) } } }).to_string(), 413),
    ] {
        assert_eq!(client.publish(&device.topic("shadow/update"), payload).await, PubAckReason::Success);
        let rejected = on(&mut client, &device, "shadow/update/rejected").await;
        assert_eq!(rejected["code"], code, "{rejected}");
    }
    let patch = json!({ "state": { "reported": { "up": null } }, "version": 2 });
    client.publish(&device.topic("shadow/update"), patch.to_string()).await;
    assert_eq!(on(&mut client, &device, "shadow/update/accepted").await["version"], 3);
    assert_eq!(fleet.get(&path(&device)).await["reported"].get("up"), None, "null deletes");

    // What is wished no more is told as null.
    desire(&fleet, &device, json!({ "list": null })).await;
    assert_eq!(
        on(&mut client, &device, "shadow/update/delta").await["state"],
        json!({ "fan": { "mode": "auto" }, "list": null })
    );
    assert!(fleet.metric("muster_shadow_deltas_total", "").await >= 2.0);
    assert!(fleet.metric("muster_shadow_requests_total", r#"outcome="rejected""#).await >= 4.0);
}

#[tokio::test]
async fn a_change_may_name_the_version_it_is_about() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    desire(&fleet, &device, json!({ "n": 1 })).await;
    let change = async |body: Value| fleet.call(Method::PATCH, &path(&device), Some(body)).await;
    let (status, refused) = change(json!({ "desired": { "n": 2 }, "version": 0 })).await;
    assert_eq!((status, &refused["type"]), (StatusCode::CONFLICT, &json!("urn:muster:problem:shadow-conflict")));
    let (status, shadow) = change(json!({ "desired": { "n": 2 }, "version": 1 })).await;
    assert_eq!((status, &shadow["version"]), (StatusCode::OK, &json!(2)));
    for wrong in [json!({}), json!({ "reported": { "n": 2 } }), json!({ "desired": [] }), json!({ "desired": 1 })] {
        assert_eq!(change(wrong.clone()).await.0, StatusCode::BAD_REQUEST, "{wrong}");
    }
    let (status, _) = change(json!({ "desired": { "x": "x".repeat(9_000) } })).await;
    assert_eq!(status, StatusCode::PAYLOAD_TOO_LARGE);
    // As it was between the two, and before the first.
    let second = shadow["updated_at"].as_str().expect("a time");
    let before = chrono::DateTime::parse_from_rfc3339(second).expect("a time") - chrono::TimeDelta::milliseconds(1);
    let then = fleet.get(&format!("{}?at={}", path(&device), before.timestamp_millis())).await;
    assert_eq!((&then["desired"], &then["version"]), (&json!({ "n": 1 }), &json!(1)));
    let then = fleet.get(&format!("{}?at=2020-01-01T00:00:00Z", path(&device))).await;
    assert_eq!((&then["desired"], &then["version"]), (&json!({}), &json!(0)));
    // Who changed it is in the audit.
    let audit = fleet.get("/api/v1/audit?action=shadow.update").await;
    assert_eq!(audit["items"].as_array().expect("a page").len(), 2, "{audit}");
    assert_eq!(audit["items"][0]["after"]["desired"], json!({ "n": 2 }));
}

#[tokio::test]
async fn what_is_desired_while_a_device_is_away_reaches_it_through_a_kill() {
    let mut fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    desire(&fleet, &device, json!({ "n": 1 })).await;
    fleet.kill().await;
    fleet.start_again().await;
    // A clean session hears of it when it subscribes …
    let mut client = listening(&fleet, &device).await;
    assert_eq!(on(&mut client, &device, "shadow/update/delta").await["state"], json!({ "n": 1 }));
    let report = json!({ "state": { "reported": { "n": 1 } } }).to_string();
    client.publish(&device.topic("shadow/update"), report).await;
    fleet.kill().await;
    drop(client);
    fleet.start_again().await;
    let shadow = fleet.get(&path(&device)).await;
    assert_eq!(
        (&shadow["reported"], &shadow["delta"]),
        (&json!({ "n": 1 }), &json!({})),
        "what was acknowledged is kept"
    );

    // … and one that outlives its connection when its device is back, without subscribing again.
    let hello = || {
        let login = Some((device.username.clone(), device.password.clone()));
        Connect::new(V5, &device.id, login).kept_for(3600)
    };
    let connect = async || {
        let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
        Client::hello(Box::new(socket), &hello()).await.0
    };
    let mut durable = connect().await;
    durable.subscribe(&device.topic("shadow/update/delta"), 1).await;
    durable.disconnect().await;
    desire(&fleet, &device, json!({ "n": 2 })).await;
    let mut durable = connect().await;
    let delta = durable.message().await;
    assert_eq!(delta.topic, device.topic("shadow/update/delta"));
    assert_eq!(serde_json::from_slice::<Value>(&delta.payload).expect("JSON")["state"], json!({ "n": 2 }));
}

#[tokio::test]
async fn a_gateway_answers_for_its_children() {
    let fleet = Fleet::start().await;
    let gateway = fleet.enrol("gw").await;
    let made = fleet.make("/api/v1/devices", json!({ "id": "freezer-1", "gateway": "gw" })).await;
    let child = Device {
        id: "freezer-1".into(),
        username: made["credential"]["username"].as_str().expect("a name").into(),
        password: String::new(),
    };
    let mut client = fleet.connect(&gateway).await;
    client.subscribe(&child.topic("shadow/#")).await;
    desire(&fleet, &child, json!({ "n": 1 })).await;
    assert_eq!(on(&mut client, &child, "shadow/update/delta").await["state"], json!({ "n": 1 }));
    let report = json!({ "state": { "reported": { "n": 1 } } }).to_string();
    assert_eq!(client.publish(&child.topic("shadow/update"), report).await, PubAckReason::Success);
    assert_eq!(fleet.get(&path(&child)).await["delta"], json!({}));
}

#[tokio::test]
async fn a_shadow_is_seen_and_changed_by_those_who_may() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let other = fleet.make("/api/v1/devices", json!({ "id": "freezer-1", "type": "freezer" })).await;
    assert_eq!(other["device"]["id"], "freezer-1");
    desire(&fleet, &device, json!({ "n": 1 })).await;
    let key = async |name: &str, role: &str, scope: Value| {
        let mut body = json!({ "name": name, "role": role });
        if !scope.is_null() {
            body["scope"] = scope;
        }
        fleet.make("/api/v1/api-keys", body).await["secret"].as_str().expect("a secret").to_owned()
    };
    let (viewer, auditor) = (key("v", "viewer", Value::Null).await, key("a", "auditor", Value::Null).await);
    let scoped = key("s", "operator", json!({ "kind": "selector", "selector": "type:freezer" })).await;
    let read = async |key: &str, id: &str| {
        fleet.call_as(key, Method::GET, &format!("/api/v1/devices/{id}/shadow"), None).await.0
    };
    let write = async |key: &str, id: &str| {
        let body = json!({ "desired": { "n": 2 } });
        fleet.call_as(key, Method::PATCH, &format!("/api/v1/devices/{id}/shadow"), Some(body)).await.0
    };
    assert_eq!(
        (read(&viewer, "boiler-1").await, write(&viewer, "boiler-1").await),
        (StatusCode::OK, StatusCode::FORBIDDEN)
    );
    assert_eq!(
        (read(&auditor, "boiler-1").await, write(&auditor, "boiler-1").await),
        (StatusCode::FORBIDDEN, StatusCode::FORBIDDEN)
    );
    assert_eq!((read(&scoped, "freezer-1").await, write(&scoped, "freezer-1").await), (StatusCode::OK, StatusCode::OK));
    assert_eq!(
        (read(&scoped, "boiler-1").await, write(&scoped, "boiler-1").await),
        (StatusCode::NOT_FOUND, StatusCode::NOT_FOUND)
    );
    assert_eq!(read(fleet.token(), "nobody").await, StatusCode::NOT_FOUND);

    // On topics too; and what the server says nobody else does.
    let mut viewing = Mqtt::connect(fleet.mqtt_addr(), "v", "v", &viewer).await.expect("a key opens the door");
    assert!(matches!(viewing.subscribe(&device.topic("shadow/update/delta")).await, SubscribeReasonCode::Success(_)));
    assert_eq!(viewing.subscribe(&device.topic("shadow/#")).await, SubscribeReasonCode::NotAuthorized);
    assert_eq!(viewing.publish(&device.topic("shadow/update"), "{}").await, PubAckReason::NotAuthorized);
    let mut admin = fleet.connect_admin("console").await;
    let mut own = fleet.connect(&device).await;
    for topic in ["shadow/update/delta", "shadow/get/accepted", "shadow/update/rejected"] {
        assert_eq!(admin.publish(&device.topic(topic), "{}").await, PubAckReason::NotAuthorized, "{topic}");
        assert_eq!(own.publish(&device.topic(topic), "{}").await, PubAckReason::NotAuthorized, "{topic}");
    }
    assert_eq!(admin.publish(&device.topic("shadow/update"), "{}").await, PubAckReason::NotAuthorized);
    assert_eq!(own.publish("fleet/v1/main/freezer-1/shadow/update", "{}").await, PubAckReason::NotAuthorized);
    viewing.subscribe(&device.topic("shadow/update/accepted")).await;
    own.publish(&device.topic("shadow/update"), r#"{"state":{"reported":{"n":1}}}"#).await;
    assert_eq!(on(&mut viewing, &device, "shadow/update/accepted").await["version"], 2);
    assert!(viewing.message_within(Duration::from_millis(200)).await.is_none(), "nobody desires anything else");
}

#[tokio::test]
async fn a_full_queue_of_requests_makes_devices_wait_and_each_is_answered_once() {
    let fleet = Fleet::start_with(&[("MUSTER__SHADOW__REQUEST_QUEUE", "1")]).await;
    let mut devices = Vec::new();
    // Each of four tasks has one request in hand and one in its queue: of nine, one waits outside at the least.
    for n in 0..9 {
        let device = fleet.enrol(&format!("boiler-{n}")).await;
        let login = Some((device.username.clone(), device.password.clone()));
        let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
        let (mut client, connack) = Client::hello(Box::new(socket), &Connect::new(V5, &device.id, login)).await;
        assert_eq!(connack.code, 0);
        client.subscribe(&device.topic("shadow/update/+"), 0).await;
        devices.push((device, client));
    }
    // Shadows can be read, and none can be changed.
    let mut held = fleet.db().begin().await.expect("a transaction");
    sqlx::query("lock table shadow in exclusive mode").execute(&mut *held).await.expect("the table is there");
    for (n, (device, client)) in devices.iter_mut().enumerate() {
        let report = json!({ "state": { "reported": { "n": n } } }).to_string();
        client.send_publish(&Publish::new(device.topic("shadow/update"), report).qos(1).id(7)).await;
    }
    let full = || fleet.metric("muster_mqtt_limit_hits_total", "\"shadow_queue\"");
    fleet.eventually(full, |hits| *hits > 0.5).await;
    assert!(fleet.metric("muster_mqtt_acknowledged_total", "").await < 0.5, "nobody was told anything");
    assert_eq!(fleet.get(&path(&devices[0].0)).await["version"], 0);
    held.commit().await.expect("nothing was changed");
    for (n, (device, mut client)) in devices.into_iter().enumerate() {
        let accepted = client.message().await;
        assert_eq!(accepted.topic, device.topic("shadow/update/accepted"), "{}", accepted.text());
        assert_eq!(client.ack(PUBACK, 7).await.reason, 0);
        client.is_quiet("it is answered once").await;
        let shadow = fleet.get(&path(&device)).await;
        assert_eq!((&shadow["version"], &shadow["reported"]), (&json!(1), &json!({ "n": n })));
    }
    assert!((fleet.metric("muster_shadow_requests_total", "\"updated\"").await - 9.0).abs() < 0.1);
}

/// Starts a device on Paho that follows its shadow until a member has a value; what it says.
pub(crate) async fn followed(
    fleet: &Fleet,
    device: &Device,
    version: &str,
    member: &str,
    value: &str,
    ready: impl AsyncFnOnce(),
) -> Vec<Value> {
    let address = fleet.mqtt_addr();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/paho_shadow.py");
    let mut child = Command::new(python())
        .arg(script)
        .args([&address.ip().to_string(), &address.port().to_string(), &device.username, &device.password, &device.id])
        .args([version, member, value])
        .kill_on_drop(true)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("`make setup` installs the test clients");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let first = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("text");
    assert!(first.is_some_and(|line| line.contains("connected")));
    ready().await;
    let mut said = Vec::new();
    while let Some(line) = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("text") {
        said.push(serde_json::from_str(&line).expect("JSON"));
    }
    let status = child.wait().await.expect("its status");
    assert!(status.success(), "{said:?}");
    said
}

#[tokio::test]
async fn paho_follows_its_shadow_in_both_versions() {
    let fleet = Fleet::start().await;
    for (id, version) in [("boiler-1", "311"), ("boiler-2", "5")] {
        let device = fleet.enrol(id).await;
        desire(&fleet, &device, json!({ "mode": "eco" })).await;
        let ready = async || {
            desire(&fleet, &device, json!({ "log": { "level": "debug" } })).await;
        };
        let said = followed(&fleet, &device, version, "log.level", "debug", ready).await;
        assert!(said.iter().any(|fact| fact["token"] == "follow"), "{said:?}");
        let shadow = fleet.get(&path(&device)).await;
        assert_eq!(shadow["delta"], json!({}), "{shadow}");
        assert_eq!(shadow["reported"], json!({ "mode": "eco", "log": { "level": "debug" } }));
    }
}
