//! Devices that nobody has enrolled come in by a claim: each hears its own answer, and none can be used by anybody else.

use std::path::Path;
use std::process::Stdio;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::foreign_clients::python;
use crate::harness::client::Client;
use crate::harness::packet::kind::PUBACK;
use crate::harness::packet::{ConnAck, Connect, Property, Publish, Will, property};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::{Device, Fleet, PATIENCE};

const REQUEST: &str = "fleet/v1/main/_provision/request";
const NOT_AUTHORIZED: u8 = 0x87;
/// Administrative action.
const SENT_AWAY: u8 = 0x98;

/// A claim and its secret.
struct Claim {
    id: String,
    username: String,
    secret: String,
}

impl Claim {
    async fn made(fleet: &Fleet, approval: &str) -> Self {
        Self::made_with(fleet, approval, json!({})).await
    }

    async fn made_with(fleet: &Fleet, approval: &str, fields: Value) -> Self {
        let mut new = json!({ "name": "freezers", "approval": approval, "max_devices": 10, "expires_in_s": 3600, "group": "oslo" });
        for (name, value) in fields.as_object().expect("fields") {
            new[name] = value.clone();
        }
        let made = fleet.make("/api/v1/claims", new).await;
        let text = |name: &str| made[name].as_str().expect(name).to_owned();
        Self { id: text("id"), username: text("username"), secret: text("secret") }
    }

    fn hello(&self, version: Version, client_id: &str) -> Connect {
        Connect::new(version, client_id, Some((self.username.clone(), self.secret.clone())))
    }
}

async fn hello(fleet: &Fleet, connect: &Connect) -> (Client, ConnAck) {
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    Client::hello(Box::new(socket), connect).await
}

async fn connect(fleet: &Fleet, connect: Connect) -> Client {
    let (client, connack) = hello(fleet, &connect).await;
    assert_eq!(connack.code, 0, "{connack:?}");
    client
}

fn response(client_id: &str) -> String {
    format!("fleet/v1/main/_provision/response/{client_id}")
}

/// The device's own token and what it asks with it.
fn request(id: &str) -> (Device, Value) {
    let password = format!("a token that {id} has made itself");
    let hash = format!("{:x}", bytes::Bytes::copy_from_slice(&Sha256::digest(&password)));
    let body = json!({ "id": id, "nonce": format!("nonce-of-{id:0>16}"), "token_sha256": hash, "serial": "SN-1" });
    (Device { id: id.to_owned(), username: format!("main/{id}"), password }, body)
}

fn publish(body: &Value) -> Publish {
    Publish::new(REQUEST, body.to_string()).qos(1)
}

fn body(message: &Publish) -> Value {
    serde_json::from_slice(&message.payload).expect("JSON")
}

/// Asks, and waits for acknowledgement and answer.
async fn ask(client: &mut Client, request: &Value) -> Value {
    assert_eq!(client.publish(publish(request)).await, 0);
    body(&client.message().await)
}

/// A device that has come in sends a reading.
async fn is_in(fleet: &Fleet, device: &Device) {
    let login = (device.username.clone(), device.password.clone());
    let mut client = connect(fleet, Connect::new(V5, &device.id, Some(login))).await;
    let reading = Publish::new(device.topic("telemetry"), r#"{"temp":-18}"#).qos(1);
    assert_eq!(client.publish(reading).await, 0);
    assert_eq!(fleet.series(device, "temp").await.len(), 1);
    client.disconnect().await;
}

#[tokio::test]
async fn a_device_asks_hears_and_comes_in() {
    let fleet = Fleet::start().await;
    let claim = Claim::made(&fleet, "auto").await;
    for (version, id) in [(V5, "freezer-1"), (V311, "freezer-2")] {
        let (device, asked) = request(id);
        let mut client = connect(&fleet, claim.hello(version, "plate-7")).await;
        assert_eq!(client.subscribe(&response("plate-7"), 1).await, 1);
        let answer = ask(&mut client, &asked).await;
        let expected = json!({
            "id": id, "nonce": asked["nonce"], "status": "accepted", "username": format!("main/{id}"), "sealed": null,
        });
        assert_eq!(answer, expected);
        assert_eq!(ask(&mut client, &asked).await, expected, "asked twice");
        client.disconnect().await;
        is_in(&fleet, &device).await;
    }
    let devices = fleet.get("/api/v1/devices?group=oslo").await;
    assert_eq!(devices["items"].as_array().map(Vec::len), Some(2));
    assert_eq!(devices["items"][0]["labels"]["serial"], "SN-1");
    assert!(fleet.metric("muster_mqtt_provision_total", "accepted").await >= 2.0);
    let audit = fleet.get("/api/v1/audit?action=device.provision").await;
    assert_eq!(audit["items"][0]["actor"]["kind"], "claim", "{audit}");
}

#[tokio::test]
async fn an_answer_is_known_by_what_the_asker_gave() {
    let fleet = Fleet::start().await;
    let claim = Claim::made(&fleet, "auto").await;
    let (_, asked) = request("freezer-1");
    let mut client = connect(&fleet, claim.hello(V5, "plate-7")).await;
    client.subscribe(&response("plate-7"), 1).await;
    let with = |topic: &str| {
        publish(&asked)
            .with(Property::ResponseTopic(topic.to_owned()))
            .with(Property::CorrelationData(b"question 1".to_vec()))
    };
    assert_eq!(client.publish(with(&response("plate-8"))).await, 0);
    let refused = client.message().await;
    assert_eq!((&body(&refused)["status"], &body(&refused)["code"]), (&json!("rejected"), &json!("malformed")));
    assert_eq!(client.publish(with(&response("plate-7"))).await, 0);
    let answer = client.message().await;
    assert_eq!(property!(answer.properties, CorrelationData), Some(b"question 1".to_vec()));
    assert_eq!(body(&answer)["status"], "accepted");
    let said = [("{", "malformed"), (r#"{"id":"a","nonce":"0123456789abcdef"}"#, "malformed")];
    for (payload, code) in said {
        client.publish(Publish::new(REQUEST, payload).qos(1)).await;
        assert_eq!(body(&client.message().await)["code"], code, "{payload}");
    }
    let (_, mut other) = request("freezer-1");
    other["nonce"] = json!("another-nonce-00");
    assert_eq!(ask(&mut client, &other).await["code"], "exists");
}

#[tokio::test]
async fn whoever_waits_for_approval_is_told() {
    let fleet = Fleet::start().await;
    let claim = Claim::made(&fleet, "manual").await;
    let mut here = connect(&fleet, claim.hello(V5, "here")).await;
    let mut away = connect(&fleet, claim.hello(V311, "away")).await;
    let [(first, one), (second, two)] = ["freezer-1", "freezer-2"].map(request);
    for (client, name, asked) in [(&mut here, "here", &one), (&mut away, "away", &two)] {
        client.subscribe(&response(name), 1).await;
        assert_eq!(ask(client, asked).await["status"], "pending");
    }
    away.disconnect().await;
    let inbox = fleet.get("/api/v1/claims/requests?state=pending").await;
    let shown = |place: usize, field: &str| inbox["items"][place][field].clone();
    assert_eq!(
        (shown(0, "asker"), shown(0, "serial"), shown(1, "asker")),
        (json!("here"), json!("SN-1"), json!("away"))
    );
    assert_eq!(shown(0, "address"), "127.0.0.1");
    for request in inbox["items"].as_array().expect("items") {
        let path = format!("/api/v1/claims/requests/{}/approve", request["id"].as_str().expect("an id"));
        let (status, answer) = fleet.call(Method::POST, &path, Some(json!({ "group": "bergen" }))).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
    }
    let told = body(&here.message().await);
    assert_eq!((&told["status"], &told["nonce"]), (&json!("accepted"), &one["nonce"]), "it need not ask again");
    is_in(&fleet, &first).await;
    let mut away = connect(&fleet, claim.hello(V311, "away")).await;
    away.subscribe(&response("away"), 1).await;
    assert_eq!(ask(&mut away, &two).await["status"], "accepted");
    is_in(&fleet, &second).await;

    let (_, third) = request("freezer-3");
    assert_eq!(ask(&mut here, &third).await["status"], "pending");
    let waiting = fleet.get("/api/v1/claims/requests?state=pending").await;
    let path = format!("/api/v1/claims/requests/{}/reject", waiting["items"][0]["id"].as_str().expect("an id"));
    fleet.call(Method::POST, &path, Some(json!({ "reason": "not ours" }))).await;
    let told = body(&here.message().await);
    assert_eq!((&told["code"], &told["message"]), (&json!("rejected"), &json!("not ours")));
}

#[tokio::test]
async fn nobody_else_hears_an_answer_and_whoever_does_learns_no_secret() {
    let fleet = Fleet::start().await;
    let claim = Claim::made(&fleet, "manual").await;
    let mut device = connect(&fleet, claim.hello(V5, "plate-7")).await;
    let mut thief = connect(&fleet, claim.hello(V5, "thief")).await;
    let foreign = [
        response("plate-7"),
        response("+"),
        response("#"),
        "fleet/v1/main/_provision/#".to_owned(),
        format!("$share/g/{}", response("plate-7")),
        REQUEST.to_owned(),
        "#".to_owned(),
        "fleet/v1/main/+/status".to_owned(),
    ];
    for filter in &foreign {
        assert_eq!(thief.subscribe(filter, 1).await, NOT_AUTHORIZED, "{filter}");
    }
    for topic in [response("plate-7").as_str(), "fleet/v1/main/freezer-1/telemetry", "app/main/x", "$SYS/x"] {
        assert_eq!(thief.publish(Publish::new(topic, "{}").qos(1)).await, NOT_AUTHORIZED, "{topic}");
    }
    device.subscribe(&response("plate-7"), 1).await;
    let (owner, asked) = request("freezer-1");
    assert_eq!(ask(&mut device, &asked).await["status"], "pending");

    // A thief that takes the name takes the session too: the device is told, and the answer is worth nothing.
    let mut taker = connect(&fleet, claim.hello(V5, "plate-7")).await;
    device.ends_with(0x8E, "taken over").await;
    taker.subscribe(&response("plate-7"), 1).await;
    let inbox = fleet.get("/api/v1/claims/requests?state=pending").await;
    let path = format!("/api/v1/claims/requests/{}/approve", inbox["items"][0]["id"].as_str().expect("an id"));
    fleet.call(Method::POST, &path, None).await;
    let heard = taker.message().await;
    assert!(!heard.text().contains(&owner.password), "{}", heard.text());
    let (_, mut stolen) = request("freezer-1");
    stolen["token_sha256"] = json!("0".repeat(64));
    assert_eq!(ask(&mut taker, &stolen).await["code"], "nonce-taken");
    is_in(&fleet, &owner).await;
}

#[tokio::test]
async fn what_devices_ask_is_nobody_elses() {
    let fleet = Fleet::start().await;
    let claim = Claim::made(&fleet, "auto").await;
    let mut admin = fleet.connect_admin("console").await;
    admin.subscribe("fleet/v1/main/#").await;
    let mut client = connect(&fleet, claim.hello(V5, "plate-7")).await;
    let (_, asked) = request("freezer-1");
    assert_eq!(client.publish(publish(&asked).retained()).await, 0);
    let (topic, answer) = admin.message().await;
    assert_eq!(topic, response("plate-7"), "who may see the tenant's topics sees what was answered");
    assert!(!answer.contains("token"), "{answer}");
    assert_ne!(admin.publish(REQUEST, asked.to_string()).await, crate::harness::Answer::Success);
    assert_ne!(admin.publish(&response("plate-7"), "{}").await, crate::harness::Answer::Success);
    let mut late = fleet.connect_admin("late").await;
    late.subscribe("fleet/v1/main/_provision/#").await;
    late.subscribe("app/main/x").await;
    late.publish("app/main/x", "nothing was retained").await;
    assert_eq!(late.message().await.0, "app/main/x");
}

#[tokio::test]
async fn a_claim_is_for_asking_only_and_ends_at_once() {
    let fleet = Fleet::start().await;
    let claim = Claim::made(&fleet, "manual").await;
    let wrong = Connect::new(V5, "x", Some((claim.username.clone(), "mc_wrong".to_owned())));
    assert_eq!(hello(&fleet, &wrong).await.1.code, 0x86);
    let other = Connect::new(V5, "x", Some(("main/_claim/clm_x".to_owned(), claim.secret.clone())));
    assert_eq!(hello(&fleet, &other).await.1.code, 0x86);
    let as_user = Connect::new(V5, "x", Some(("anybody".to_owned(), claim.secret.clone())));
    assert_eq!(hello(&fleet, &as_user).await.1.code, 0x86);
    for name in ["a/b", "+", "_x", "ä", &"x".repeat(65)] {
        assert_eq!(hello(&fleet, &claim.hello(V5, name)).await.1.code, 0x85, "{name}");
    }
    // It comes as a device does every day: its will is left out, and its session is not kept.
    let will = Will { retain: true, ..Will::new("fleet/v1/main/freezer-1/status", "{}") };
    let (client, connack) = hello(&fleet, &claim.hello(V5, "plate-7").kept().will(will)).await;
    assert_eq!((connack.code, property!(connack.properties, SessionExpiry)), (0, Some(0)));
    client.vanish();
    let (mut client, connack) = hello(&fleet, &claim.hello(V5, "")).await;
    let name = property!(connack.properties, AssignedClientId).expect("it is given a name");
    assert_eq!(client.subscribe(&response(&name), 1).await, 1);
    let shown = fleet.get("/api/v1/connections").await;
    assert_eq!(
        shown["items"].as_array().expect("items").last().expect("it is connected")["principal"],
        "claim",
        "{shown}"
    );
    assert_eq!(fleet.get("/api/v1/sessions").await["items"], json!([]));

    let (status, _) = fleet.call(Method::DELETE, &format!("/api/v1/claims/{}", claim.id), None).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    client.ends_with(SENT_AWAY, "the claim was revoked").await;
    assert_eq!(hello(&fleet, &claim.hello(V5, "plate-7")).await.1.code, 0x86);
}

#[tokio::test]
async fn a_request_is_acknowledged_when_it_is_kept_and_waits_are_bounded() {
    let fleet = Fleet::start_with(&[("MUSTER__PROVISIONING__REQUEST_QUEUE", "1")]).await;
    let claim = Claim::made(&fleet, "auto").await;
    // Nothing can be kept while somebody holds the claim.
    let mut held = fleet.db().begin().await.expect("a transaction");
    sqlx::query("select 1 from claim for update").execute(&mut *held).await.expect("the table is there");
    let mut clients = Vec::new();
    for n in 0..3 {
        let name = format!("plate-{n}");
        let mut client = connect(&fleet, claim.hello(V311, &name)).await;
        client.subscribe(&response(&name), 0).await;
        client.send_publish(&publish(&request(&format!("freezer-{n}")).1).id(7)).await;
        clients.push(client);
    }
    let full = || fleet.metric("muster_mqtt_limit_hits_total", "provisioning_queue");
    fleet.eventually(full, |hits| *hits >= 1.0).await;
    assert_eq!(fleet.get("/api/v1/devices").await["items"], json!([]));
    held.commit().await.expect("nothing was changed");
    for mut client in clients {
        client.ack(PUBACK, 7).await;
        assert_eq!(body(&client.message().await)["status"], "accepted");
    }
    assert_eq!(fleet.get("/api/v1/devices").await["items"].as_array().map(Vec::len), Some(3));
}

#[tokio::test]
async fn no_claim_is_asked_too_often_or_for_too_much() {
    let fleet = Fleet::start_with(&[("MUSTER__PROVISIONING__CLAIM_REQUESTS_PER_MINUTE", "2")]).await;
    let claim = Claim::made(&fleet, "auto").await;
    let mut client = connect(&fleet, claim.hello(V5, "plate-7")).await;
    client.subscribe(&response("plate-7"), 1).await;
    let (_, mut large) = request("freezer-0");
    large["labels"] = json!({ "colour": "x".repeat(17_000) });
    let answer = ask(&mut client, &large).await;
    assert_eq!(answer["code"], "malformed");
    assert!(answer["message"].as_str().is_some_and(|said| said.contains("at most 16384")), "{answer}");
    for (id, outcome) in [("freezer-1", "accepted"), ("freezer-2", "accepted"), ("freezer-3", "rate-limited")] {
        let answer = ask(&mut client, &request(id).1).await;
        assert_eq!(*answer.get("code").unwrap_or(&answer["status"]), outcome, "{answer}");
    }
    for (outcome, times) in [("malformed", 1.0), ("rate-limited", 1.0), ("accepted", 2.0)] {
        let counted = fleet.metric("muster_mqtt_provision_total", &format!("\"{outcome}\"")).await;
        assert!((counted - times).abs() < 0.5, "{counted} {outcome}");
    }
}

#[tokio::test]
async fn whoever_asks_leaves_room_for_devices() {
    let fleet = Fleet::start_with(&[("MUSTER__ADMISSION__MAX_CLAIMANTS", "1")]).await;
    let claim = Claim::made(&fleet, "auto").await;
    let first = connect(&fleet, claim.hello(V5, "plate-1")).await;
    let (_, connack) = hello(&fleet, &claim.hello(V5, "plate-2")).await;
    assert_eq!(connack.code, 0x97, "{connack:?}");
    assert!(fleet.metric("muster_mqtt_limit_hits_total", "claimants").await >= 1.0);
    let device = fleet.enrol("boiler-1").await;
    is_in(&fleet, &device).await;
    first.disconnect().await;
    let come = || async { hello(&fleet, &claim.hello(V5, "plate-2")).await.1.code };
    fleet.eventually(come, |code| *code == 0).await;
}

/// A device on Paho that asks by this claim for this id, and keeps in `dir` what it must not lose.
fn paho(fleet: &Fleet, claim: &Claim, id: &str, version: &str, dir: &Path) -> Child {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/paho_provision.py");
    let address = fleet.mqtt_addr();
    let mut device = Command::new(python());
    device.arg(script).args([&address.ip().to_string(), &address.port().to_string()]);
    device.args([&claim.username, &claim.secret, id]).arg(dir.join(format!("{id}-{version}"))).arg(version);
    device.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
    device.spawn().expect("`make setup` installs the test clients")
}

async fn said(device: Child) -> String {
    let output = timeout(PATIENCE, device.wait_with_output()).await.expect("it ends").expect("its output");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The requests that wait, once there are some.
async fn inbox(fleet: &Fleet) -> Value {
    let waiting = || async { fleet.get("/api/v1/claims/requests?state=pending").await["items"].clone() };
    fleet.eventually(waiting, |items| items.as_array().is_some_and(|items| !items.is_empty())).await
}

#[tokio::test]
async fn a_device_on_paho_comes_in_and_goes_on_where_it_was() {
    let fleet = Fleet::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    for (approval, version, id) in [
        ("auto", "311", "freezer-1"),
        ("auto", "5", "freezer-2"),
        ("manual", "311", "freezer-3"),
        ("manual", "5", "freezer-4"),
    ] {
        let claim = Claim::made(&fleet, approval).await;
        let start = || paho(&fleet, &claim, id, version, dir.path());
        let mut device = start();
        if approval == "manual" {
            let waiting = inbox(&fleet).await;
            // It loses its power while somebody thinks about it.
            device.kill().await.expect("it runs");
            let path = format!("/api/v1/claims/requests/{}/approve", waiting[0]["id"].as_str().expect("an id"));
            let (status, _) = fleet.call(Method::POST, &path, None).await;
            assert_eq!(status, StatusCode::OK);
            device = start();
        }
        let said = said(device).await;
        assert!(said.contains("\"accepted\"") && said.contains("\"acknowledged\": true"), "{said}");
        let readings = fleet.get(&format!("/api/v1/devices/{id}/telemetry?metric=temp")).await;
        assert_eq!(readings["items"].as_array().map(Vec::len), Some(1), "{readings}");
    }
}

#[tokio::test]
async fn a_device_on_paho_hears_why_it_stays_outside() {
    let fleet = Fleet::start().await;
    let dir = tempfile::tempdir().expect("a directory");
    for (version, no_login, sent_away) in [
        ("311", "Bad user name or password", "Unspecified error"),
        ("5", "Bad user name or password", "Administrative action"),
    ] {
        let hears = async |claim: &Claim, id: &str| said(paho(&fleet, claim, id, version, dir.path())).await;
        let claim = Claim::made_with(&fleet, "auto", json!({ "max_devices": 1, "id_pattern": "freezer-*" })).await;
        let said_of_pump = hears(&claim, "pump-1").await;
        assert!(said_of_pump.contains("\"wrong-id\""), "{said_of_pump}");
        let accepted = hears(&claim, &format!("freezer-of-{version}")).await;
        assert!(accepted.contains("\"accepted\""), "{accepted}");
        let used_up = hears(&claim, "freezer-2").await;
        assert!(used_up.contains("\"used-up\""), "{used_up}");

        let claim = Claim::made_with(&fleet, "auto", json!({ "expires_in_s": 1 })).await;
        let path = format!("/api/v1/claims/{}", claim.id);
        fleet.eventually(|| fleet.get(&path), |claim| claim["state"] == "expired").await;
        let expired = hears(&claim, "freezer-3").await;
        assert!(expired.contains(no_login), "{expired}");

        let claim = Claim::made(&fleet, "manual").await;
        let waits = paho(&fleet, &claim, "freezer-4", version, dir.path());
        inbox(&fleet).await;
        let (status, _) = fleet.call(Method::DELETE, &format!("/api/v1/claims/{}", claim.id), None).await;
        assert_eq!(status, StatusCode::NO_CONTENT);
        let ended = said(waits).await;
        assert!(ended.contains("\"pending\"") && ended.contains(sent_away), "{ended}");
        let revoked = hears(&claim, "freezer-4").await;
        assert!(revoked.contains(no_login), "{revoked}");
    }
    assert_eq!(fleet.get("/api/v1/devices").await["items"].as_array().map(Vec::len), Some(2));
}
