//! A flow of Node-RED: as a device over TLS with a certificate, and as an application over WebSocket with an API key.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::json;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::harness::client::Client;
use crate::harness::raw::Version::V5;
use crate::harness::{Fleet, PATIENCE};
use crate::transports::{Secure, with_password};

/// What an application needs that cools what is hot, and nothing more.
async fn application_key(fleet: &Fleet) -> String {
    let rules = json!([
        { "effect": "allow", "action": "subscribe", "filter": "fleet/v1/main/+/telemetry" },
        { "effect": "allow", "action": "publish", "filter": "fleet/v1/main/+/fan" },
    ]);
    fleet.make("/api/v1/roles", json!({ "id": "cooling", "topic_rules": rules })).await;
    let key = fleet.make("/api/v1/api-keys", json!({ "name": "node-red", "role": "cooling" })).await;
    key["secret"].as_str().expect("a secret").to_owned()
}

/// Starts the flows of `tests/clients/node-red`; ends with the test.
fn start(secure: &Secure, key: &str) -> Child {
    let node_red = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/node-red");
    let user_dir = secure.path().join("node-red");
    std::fs::create_dir(&user_dir).expect("the directory can be written");
    for file in ["flows.json", "flows_cred.json"] {
        std::fs::copy(node_red.join(file), user_dir.join(file)).expect("the directory can be written");
    }
    let (certificate, private_key): (PathBuf, PathBuf) =
        secure.devices.client("main/boiler-1").write(secure.path(), "boiler-1");
    Command::new("node")
        .arg(node_red.join("node_modules/node-red/red.js"))
        .arg("--settings")
        .arg(node_red.join("settings.js"))
        .arg("--userDir")
        .arg(&user_dir)
        .env("MQTTS_PORT", secure.fleet.mqtts_addr().port().to_string())
        .env("CA_FILE", secure.ca_file())
        .env("CERTIFICATE_FILE", certificate)
        .env("KEY_FILE", private_key)
        .env("WEBSOCKET_URL", format!("ws://{}/mqtt", secure.fleet.http_addr()))
        .env("APPLICATION_USER", "node-red")
        .env("APPLICATION_PASSWORD", key)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("`make setup` installs node")
}

#[tokio::test]
async fn a_flow_of_node_red_is_a_device_and_an_application() {
    // Node-RED is slow to start and to speak where it shares its processor.
    let secure = Secure::start_with(&[("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "60000")]).await;
    let (boiler, pump) = (secure.fleet.enrol("boiler-1").await, secure.fleet.enrol("pump-1").await);
    let key = application_key(&secure.fleet).await;
    let (mut client, answer) = Client::hello(Box::new(secure.tls(None).await), &with_password(V5, &pump)).await;
    assert_eq!(answer.code, 0);
    client.subscribe(&pump.topic("fan"), 1).await;

    let mut node_red = start(&secure, &key);
    let mut lines = BufReader::new(node_red.stdout.take().expect("piped")).lines();
    let mut said = Vec::new();
    let connected = async {
        while said.iter().filter(|line: &&String| line.contains("Connected to broker")).count() < 2 {
            let Some(line) = lines.next_line().await.expect("text") else { break };
            said.push(line);
        }
    };
    let in_time = timeout(4 * PATIENCE, connected).await;
    assert!(in_time.is_ok() && node_red.id().is_some(), "both flows connect: {said:#?}");
    // What it says from now on is not read; a full pipe would stop it.
    drop(tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} }));

    secure.fleet.eventually(|| secure.fleet.series(&boiler, "t"), |rows| rows.len() == 10).await;
    let state = || secure.fleet.get("/api/v1/devices/boiler-1");
    secure.fleet.eventually(state, |device| device["status"]["state"] == "online").await;

    // The application subscribes after it has connected.
    let subscriptions = || secure.fleet.metric("muster_mqtt_subscriptions", "");
    secure.fleet.eventually(subscriptions, |held| *held > 1.5).await;
    for (seq, t) in [(1, 20), (2, 95)] {
        let payload = format!(r#"{{"ts":1763692212000,"seq":{seq},"values":{{"t":{t}}}}}"#);
        let reading = crate::harness::packet::Publish::new(pump.topic("telemetry"), payload).qos(1);
        assert_eq!(client.publish(reading).await, 0);
    }
    let command = client.message().await;
    assert_eq!(command.topic, pump.topic("fan"));
    let payload: serde_json::Value = serde_json::from_slice(&command.payload).expect("JSON");
    assert_eq!(payload, json!({ "on": true, "because": 95 }), "what is cool is left alone");

    node_red.kill().await.expect("it runs");
    secure.fleet.eventually(state, |device| device["status"]["state"] == "lost").await;
}
