//! Devices of every make work unchanged: Eclipse Paho (Python), MQTT.js and mosquitto, in both versions of the protocol, over
//! TCP, TLS and WebSocket.

use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::harness::{ADMIN, Device, Fleet, PATIENCE};
use crate::transports::Secure;

/// Readings each client sends.
const READINGS: usize = 20;

/// A client program of another project.
#[derive(Clone, Copy, Debug)]
enum Client {
    Paho,
    MqttJs,
}

/// What carries its bytes.
#[derive(Clone, Copy, Debug)]
enum Carrier<'a> {
    Tcp,
    /// With this authority to be trusted.
    Tls(&'a Path),
    WebSocket,
}

impl Client {
    fn command(self) -> Command {
        let clients = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients");
        let (program, script) = match self {
            Self::Paho => (python(), clients.join("paho_client.py")),
            Self::MqttJs => (PathBuf::from("node"), clients.join("mqttjs_client.mjs")),
        };
        let mut command = Command::new(program);
        command.arg(script).kill_on_drop(true).stdin(Stdio::null()).stdout(Stdio::piped());
        command
    }

    /// Starts it as this device or user.
    fn start(self, fleet: &Fleet, who: (&str, &str, &str), version: &str, what: (&str, &str, usize)) -> Child {
        self.start_over(Carrier::Tcp, fleet, who, version, what)
    }

    /// As [`Client::start`], over any carrier.
    fn start_over(
        self,
        carrier: Carrier<'_>,
        fleet: &Fleet,
        who: (&str, &str, &str),
        version: &str,
        what: (&str, &str, usize),
    ) -> Child {
        let (address, transport, ca) = match carrier {
            Carrier::Tcp => (fleet.mqtt_addr(), "tcp", None),
            Carrier::Tls(ca) => (fleet.mqtts_addr(), "tls", Some(ca)),
            Carrier::WebSocket => (fleet.http_addr(), "websockets", None),
        };
        let (id, username, password) = who;
        let (action, topic, count) = what;
        self.command()
            .env("TRANSPORT", transport)
            .envs(ca.map(|ca| ("CA_FILE", ca)))
            .args([&address.ip().to_string(), &address.port().to_string(), username, password, id, version])
            .args([action, topic, &count.to_string()])
            .spawn()
            .expect("`make setup` installs the test clients")
    }
}

/// The Python with Paho that `make setup` installs.
pub(crate) fn python() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/python")
}

fn as_device(device: &Device) -> (&str, &str, &str) {
    (&device.id, &device.username, &device.password)
}

/// What a program says, a JSON object a line, until it ends well.
pub(crate) async fn said(mut child: Child) -> Vec<Value> {
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let all = async {
        let mut all = Vec::new();
        while let Some(line) = lines.next_line().await.expect("text") {
            all.push(serde_json::from_str(&line).expect("JSON"));
        }
        all
    };
    let all = timeout(2 * PATIENCE, all).await.expect("the client ends in time");
    let status = child.wait().await.expect("its status");
    assert!(status.success(), "{status}: {all:?}");
    all
}

async fn publishes_and_subscribes(client: Client, version: &str) {
    publishes_and_subscribes_over(Carrier::Tcp, &Fleet::start().await, client, version).await;
}

async fn publishes_and_subscribes_over(carrier: Carrier<'_>, fleet: &Fleet, client: Client, version: &str) {
    let device = fleet.enrol("foreign-1").await;
    let mut watcher = fleet.connect_admin("watcher").await;
    watcher.subscribe("fleet/v1/main/+/telemetry").await;
    let topic = device.topic("telemetry");
    let reader = ("reader", ADMIN.0, fleet.token());
    let subscriber = client.start_over(carrier, fleet, reader, version, ("subscribe", &topic, READINGS));
    // The subscriber is heard of once it holds its subscription.
    let subscriptions = || fleet.metric("muster_mqtt_subscriptions", "");
    fleet.eventually(subscriptions, |held| *held > 1.5).await;

    let publisher = client.start_over(carrier, fleet, as_device(&device), version, ("publish", &topic, READINGS));
    let acknowledged = said(publisher).await;
    assert_eq!(acknowledged.len(), READINGS, "{acknowledged:?}");
    assert_eq!(fleet.series(&device, "t").await.len(), READINGS, "acknowledged means stored");

    let received = said(subscriber).await;
    assert_eq!(received[0]["granted"], serde_json::json!([1]));
    let sequence: Vec<_> = received[1..].iter().map(|message| seq_of(&message["payload"])).collect();
    assert_eq!(sequence, (0..READINGS).collect::<Vec<_>>(), "all of them, in order");
}

fn seq_of(payload: &Value) -> usize {
    let reading: Value = serde_json::from_str(payload.as_str().expect("text")).expect("a reading");
    reading["seq"].as_u64().and_then(|seq| usize::try_from(seq).ok()).expect("a sequence number")
}

#[tokio::test]
async fn paho_publishes_and_subscribes_with_mqtt_311() {
    publishes_and_subscribes(Client::Paho, "311").await;
}

#[tokio::test]
async fn paho_publishes_and_subscribes_with_mqtt_5() {
    publishes_and_subscribes(Client::Paho, "5").await;
}

#[tokio::test]
async fn mqttjs_publishes_and_subscribes_with_mqtt_311() {
    publishes_and_subscribes(Client::MqttJs, "311").await;
}

#[tokio::test]
async fn mqttjs_publishes_and_subscribes_with_mqtt_5() {
    publishes_and_subscribes(Client::MqttJs, "5").await;
}

#[tokio::test]
async fn paho_publishes_and_subscribes_over_tls() {
    let secure = Secure::start().await;
    publishes_and_subscribes_over(Carrier::Tls(&secure.ca_file()), &secure.fleet, Client::Paho, "311").await;
}

#[tokio::test]
async fn mqttjs_publishes_and_subscribes_over_tls() {
    let secure = Secure::start().await;
    publishes_and_subscribes_over(Carrier::Tls(&secure.ca_file()), &secure.fleet, Client::MqttJs, "5").await;
}

#[tokio::test]
async fn paho_publishes_and_subscribes_over_websocket() {
    publishes_and_subscribes_over(Carrier::WebSocket, &Fleet::start().await, Client::Paho, "5").await;
}

#[tokio::test]
async fn mqttjs_publishes_and_subscribes_over_websocket() {
    publishes_and_subscribes_over(Carrier::WebSocket, &Fleet::start().await, Client::MqttJs, "311").await;
}

#[tokio::test]
async fn pahos_will_is_sent_when_it_vanishes() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("foreign-1").await;
    let mut watcher = fleet.connect_admin("watcher").await;
    watcher.subscribe("fleet/v1/main/+/status").await;
    let topic = device.topic("status");
    said(Client::Paho.start(&fleet, as_device(&device), "5", ("will", &topic, 0))).await;
    assert_eq!(watcher.message().await, (topic, r#"{"state": "lost"}"#.to_owned()));
}

#[tokio::test]
async fn mosquitto_pub_is_acknowledged_or_refused() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("foreign-1").await;
    let publish = async |version: &str, password: &str, topic: String| {
        let address = fleet.mqtt_addr();
        let status = Command::new("mosquitto_pub")
            .args(["-V", version, "-h", &address.ip().to_string(), "-p", &address.port().to_string(), "-q", "1"])
            .args(["-i", &device.id, "-u", &device.username, "-P", password, "-t", &topic])
            .args(["-m", &format!(r#"{{"{}":1}}"#, version.replace('.', "_"))])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        timeout(PATIENCE, status).await.expect("it ends in time").expect("`make setup` installs mosquitto-clients")
    };
    for version in ["311", "5"] {
        assert!(publish(version, &device.password, device.topic("telemetry")).await.success());
        assert!(!publish(version, "wrong", device.topic("telemetry")).await.success());
    }
    let latest = fleet.get("/api/v1/devices/foreign-1/telemetry/latest").await;
    assert_eq!(latest["items"].as_array().map(Vec::len), Some(2), "{latest}");
}
