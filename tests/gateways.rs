//! A gateway acts for its children, and for nobody else: what changes about them reaches its open connection.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::{Instant, sleep};

use crate::harness::client::Client;
use crate::harness::packet::kind::PUBACK;
use crate::harness::packet::{Connect, Publish, Will};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::{Device, Fleet, PATIENCE};

const NOT_AUTHORIZED: u8 = 0x87;

/// A fleet with a gateway, two children and a stranger.
struct Site {
    fleet: Fleet,
    gateway: Device,
    children: [Device; 2],
    stranger: Device,
}

impl Site {
    async fn start() -> Self {
        let fleet = Fleet::start().await;
        let gateway = fleet.enrol("gw").await;
        let children = [child(&fleet, "freezer-1").await, child(&fleet, "freezer-2").await];
        let stranger = fleet.enrol("freezer-3").await;
        Self { fleet, gateway, children, stranger }
    }

    async fn connect(&self, hello: Connect) -> Client {
        let socket = TcpStream::connect(self.fleet.mqtt_addr()).await.expect("the server listens");
        let (client, connack) = Client::hello(Box::new(socket), &hello).await;
        assert_eq!(connack.code, 0, "{connack:?}");
        client
    }

    fn hello(&self, version: Version) -> Connect {
        let Device { id, username, password } = &self.gateway;
        Connect::new(version, id, Some((username.clone(), password.clone())))
    }

    async fn change(&self, device: &Device, change: Value) {
        let path = format!("/api/v1/devices/{}", device.id);
        let (status, answer) = self.fleet.call(Method::PATCH, &path, Some(change)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }

    /// What the gateway is answered when it publishes for a device, once that is as expected.
    async fn eventually_answers(&self, client: &mut Client, device: &Device, expected: u8) {
        let since = Instant::now();
        loop {
            let answer = client.publish(note(device)).await;
            if answer == expected {
                return eprintln!("{}: felt after {} ms", device.id, since.elapsed().as_millis());
            }
            assert!(since.elapsed() < PATIENCE, "{} is answered {answer:#x}", device.id);
            sleep(Duration::from_millis(10)).await;
        }
    }
}

async fn child(fleet: &Fleet, id: &str) -> Device {
    let made = fleet.make("/api/v1/devices", json!({ "id": id, "gateway": "gw" })).await;
    let text = |name: &str| made["credential"][name].as_str().expect(name).to_owned();
    Device { id: id.to_owned(), username: text("username"), password: text("password") }
}

fn reading(device: &Device, seq: u32, temp: i32) -> Publish {
    let reading = json!({ "ts": 1_763_726_400_000_i64 + i64::from(seq), "seq": seq, "values": { "temp": temp } });
    Publish::new(device.topic("telemetry"), reading.to_string()).qos(1)
}

/// Something that is not stored, and reaches nobody: 0x10.
fn note(device: &Device) -> Publish {
    Publish::new(device.topic("note"), "x").qos(1)
}

const NOBODY: u8 = 0x10;

#[tokio::test]
async fn what_a_gateway_says_for_a_child_is_the_childs() {
    let site = Site::start().await;
    let [first, second] = &site.children;
    let will = Will { qos: 1, retain: true, ..Will::new(first.topic("status"), r#"{"state":"lost"}"#) };
    let mut gateway = site.connect(site.hello(V5).will(will)).await;
    let online = Publish::new(first.topic("status"), r#"{"state":"online","boot_id":"b","firmware":"1.2"}"#);
    assert_eq!(gateway.publish(online.qos(1).retained()).await, 0);
    for (device, temp) in [(first, -18), (second, -20), (&site.gateway, 21)] {
        for seq in [1, 2, 4] {
            assert_eq!(gateway.publish(reading(device, seq, temp)).await, 0);
        }
        assert_eq!(
            site.fleet.series(device, "temp").await.iter().map(|(_, value)| value).collect::<Vec<_>>(),
            [&json!(temp); 3]
        );
    }
    let status = async |id: &str| site.fleet.get(&format!("/api/v1/devices/{id}")).await["status"].clone();
    // Sequence numbers are each device's own.
    for id in ["freezer-1", "freezer-2"] {
        let counted = site.fleet.eventually(|| status(id), |status| status["received"] == 3).await;
        assert_eq!(counted["sequence"]["missing_ranges"], json!([[3, 3]]), "{id}");
    }
    assert_eq!(status("freezer-1").await["firmware"], "1.2");
    assert_eq!(status("freezer-2").await["firmware"], Value::Null);

    // What is sent to a child reaches its gateway.
    for filter in [first.topic("#"), second.topic("commands/+/request"), format!("$share/g/{}", second.topic("#"))] {
        assert_eq!(gateway.subscribe(&filter, 1).await, 1, "{filter}");
    }
    assert_eq!(gateway.message().await.topic, first.topic("status"), "retained");
    let mut admin = site.fleet.connect_admin("console").await;
    admin.publish(&first.topic("commands/7/request"), "open").await;
    assert_eq!(gateway.message().await.topic, first.topic("commands/7/request"));

    gateway.vanish();
    site.fleet.eventually(|| status("freezer-1"), |status| status["state"] == "lost").await;
}

#[tokio::test]
async fn a_gateway_acts_for_nobody_else() {
    let site = Site::start().await;
    let mut gateway = site.connect(site.hello(V5)).await;
    assert_eq!(gateway.publish(reading(&site.stranger, 1, 1)).await, NOT_AUTHORIZED);
    let [first, _] = &site.children;
    let foreign = [
        site.stranger.topic("#"),
        "fleet/v1/main/+/telemetry".to_owned(),
        "fleet/v1/main/#".to_owned(),
        "fleet/v1/+/freezer-1/telemetry".to_owned(),
        "fleet/v1/other/freezer-1/telemetry".to_owned(),
        "fleet/v1/main/freezer-1".to_owned(),
        "fleet/v1/main/freezer-10/telemetry".to_owned(),
        "$share/g/fleet/v1/main/+/telemetry".to_owned(),
    ];
    for filter in &foreign {
        assert_eq!(gateway.subscribe(filter, 1).await, NOT_AUTHORIZED, "{filter}");
    }
    for topic in ["fleet/v1/other/freezer-1/telemetry", "fleet/v1/main/freezer-1", "fleet/v1/main/freezer-10/note"] {
        assert_eq!(gateway.publish(Publish::new(topic, "{}").qos(1)).await, NOT_AUTHORIZED, "{topic}");
    }
    assert_eq!(site.fleet.series(&site.stranger, "temp").await, []);

    // A child speaks for itself as before, and for nobody.
    let hello = Connect::new(V5, &first.id, Some((first.username.clone(), first.password.clone())));
    let mut child = site.connect(hello).await;
    assert_eq!(child.publish(reading(first, 1, 1)).await, 0);
    for other in [&site.gateway, &site.children[1]] {
        assert_eq!(child.publish(reading(other, 1, 1)).await, NOT_AUTHORIZED);
    }
    let will = Will::new(site.stranger.topic("status"), "{}");
    let socket = TcpStream::connect(site.fleet.mqtt_addr()).await.expect("the server listens");
    assert_eq!(Client::hello(Box::new(socket), &site.hello(V5).will(will)).await.1.code, NOT_AUTHORIZED);
}

#[tokio::test]
async fn what_changes_about_children_reaches_an_open_connection() {
    let site = Site::start().await;
    let [first, second] = &site.children;
    let mut gateway = site.connect(site.hello(V5)).await;
    for child in &site.children {
        assert_eq!(gateway.subscribe(&child.topic("#"), 1).await, 1);
    }
    assert_eq!(gateway.publish(note(first)).await, 0);
    assert_eq!(gateway.message().await.topic, first.topic("note"));

    // Disabled: refused alone, and no longer heard.
    site.change(first, json!({ "disabled": true })).await;
    site.eventually_answers(&mut gateway, first, NOT_AUTHORIZED).await;
    assert_eq!(gateway.subscribe(&first.topic("#"), 1).await, NOT_AUTHORIZED);
    let mut admin = site.fleet.connect_admin("console").await;
    admin.publish(&first.topic("commands/7/request"), "open").await;
    admin.publish(&second.topic("commands/8/request"), "open").await;
    let mut topics = Vec::new();
    while !topics.last().is_some_and(|topic: &String| topic.contains("commands/8")) {
        topics.push(gateway.message().await.topic);
    }
    assert!(!topics.iter().any(|topic| topic.contains("commands/7")), "{topics:?}");
    site.change(first, json!({ "disabled": false })).await;
    // The subscription is gone: nobody hears it.
    site.eventually_answers(&mut gateway, first, NOBODY).await;

    // Moved away, and a new one.
    let other = site.fleet.enrol("gw-2").await;
    site.change(second, json!({ "gateway": "gw-2" })).await;
    site.eventually_answers(&mut gateway, second, NOT_AUTHORIZED).await;
    let hello = Connect::new(V5, &other.id, Some((other.username.clone(), other.password.clone())));
    let mut other_gateway = site.connect(hello).await;
    assert_eq!(other_gateway.publish(note(second)).await, NOBODY);
    assert_eq!(gateway.publish(note(&site.stranger)).await, NOT_AUTHORIZED);
    site.change(&site.stranger, json!({ "gateway": "gw" })).await;
    site.eventually_answers(&mut gateway, &site.stranger, NOBODY).await;

    // Deleted.
    let (status, _) = site.fleet.call(Method::DELETE, "/api/v1/devices/freezer-1", None).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    site.eventually_answers(&mut gateway, first, NOT_AUTHORIZED).await;
}

#[tokio::test]
async fn a_session_that_is_away_loses_a_child_too() {
    let mut site = Site::start().await;
    let [first, second] = site.children.clone();
    let mut gateway = site.connect(site.hello(V5).kept()).await;
    for child in [&first, &second] {
        assert_eq!(gateway.subscribe(&child.topic("#"), 1).await, 1);
    }
    gateway.disconnect().await;
    site.change(&first, json!({ "gateway": null })).await;
    let subscriptions = || async { site.fleet.get("/api/v1/sessions").await["items"][0]["subscriptions"].clone() };
    let one_left = |subscriptions: &Value| subscriptions.as_array().is_some_and(|all| all.len() == 1);
    site.fleet.eventually(subscriptions, one_left).await;
    // What the children are is found again after a restart.
    site.fleet.kill().await;
    site.fleet.start_again().await;
    let mut admin = site.fleet.connect_admin("console").await;
    for (child, command) in [(&first, "7"), (&second, "8")] {
        admin.publish(&child.topic(&format!("commands/{command}/request")), "open").await;
    }
    let mut gateway = site.connect(site.hello(V5).kept()).await;
    assert_eq!(gateway.message().await.topic, second.topic("commands/8/request"));
    gateway.is_quiet("the other child is not its own").await;
}

#[tokio::test]
async fn an_old_gateway_is_not_closed_for_one_child() {
    let site = Site::start().await;
    let [first, second] = &site.children;
    let mut gateway = site.connect(site.hello(V311)).await;
    site.change(first, json!({ "disabled": true })).await;
    let letters = || async { site.fleet.get("/api/v1/dead-letters").await["items"].clone() };
    // 3.1.1 has no word for a refusal: what is not the child's any more is put aside under the gateway's name.
    let mut seq = 0;
    let letter = loop {
        seq += 1;
        gateway.send_publish(&Publish { id: seq, ..reading(first, seq.into(), 1) }).await;
        gateway.ack(PUBACK, seq).await;
        let letters = letters().await;
        if let Some(letter) = letters.as_array().and_then(|all| all.first()) {
            break letter.clone();
        }
    };
    assert_eq!((&letter["device"], &letter["topic"]), (&json!("gw"), &json!(first.topic("telemetry"))));
    assert!(letter["reason"].as_str().unwrap().contains("may not speak for this device"), "{letter}");
    let stored = site.fleet.series(first, "temp").await.len();
    assert_eq!(stored, usize::from(seq) - 1, "what was refused is no reading");
    assert_eq!(gateway.publish(reading(second, 1, 2)).await, 0, "the others go on");
    assert_eq!(site.fleet.series(second, "temp").await.len(), 1);
    // What is no device of the tenant is refused as from any other.
    gateway.send_publish(&Publish { id: 999, ..Publish::new("app/main/x", "x").qos(1) }).await;
    gateway.closes("a topic that is nobody's").await;
}
