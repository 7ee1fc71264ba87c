//! A device gets its certificate from here, renews it over MQTT, is late, and is sent away.

use std::process::Stdio;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::Connection;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

use super::{Secure, reading};
use crate::harness::client::Client;
use crate::harness::packet::{Connect, Property, Publish, Will, users};
use crate::harness::pki::{Identity, Key};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::{Device, Fleet, PATIENCE};

const BOTH: [Version; 2] = [V5, V311];

/// Makes a built-in authority.
pub(super) async fn authority(fleet: &Fleet) -> Value {
    fleet.make("/api/v1/authorities", json!({ "name": "Oslo", "kind": "built-in" })).await
}

/// Has a certificate signed over REST; it, and what is said of it.
pub(super) async fn sign(fleet: &Fleet, device: &Device, lifetime_s: Option<u64>) -> (Identity, Value) {
    let (key, path) = (Key::new(), format!("/api/v1/devices/{}/certificates", device.id));
    let signed = fleet.make(&path, json!({ "csr_pem": key.csr(), "lifetime_s": lifetime_s })).await;
    (key.with(signed["certificate_pem"].as_str().expect("PEM")), signed)
}

async fn allow(fleet: &Fleet, device: &Device, signed: &Value) {
    let id = signed["id"].as_str().expect("an id");
    let path = format!("/api/v1/devices/{}/certificates/{id}/allow-renewal", device.id);
    assert_eq!(fleet.call(Method::POST, &path, None).await.0, StatusCode::NO_CONTENT);
}

pub(super) async fn revoke(fleet: &Fleet, device: &Device, signed: &Value) {
    let id = signed["id"].as_str().expect("an id");
    let path = format!("/api/v1/devices/{}/credentials/{id}?reason=key-compromise", device.id);
    assert_eq!(fleet.call(Method::DELETE, &path, None).await.0, StatusCode::NO_CONTENT);
}

fn request(device: &Device, key: &Key) -> Publish {
    Publish::new(device.topic("certificates/renew"), json!({ "csr": key.csr() }).to_string()).qos(1)
}

/// Asks for a certificate: what is answered, and whether it is one. The acknowledgement comes when the answer is on its way.
async fn ask(client: &mut Client, device: &Device, request: Publish) -> (bool, Value) {
    assert_eq!(client.subscribe(&device.topic("certificates/renew/+"), 1).await, 1);
    assert_eq!(client.publish(request).await, 0);
    let answer = client.message().await;
    assert!(!answer.retain);
    let body = serde_json::from_slice(&answer.payload).expect("JSON");
    match answer.topic.strip_prefix(&device.topic("certificates/renew/")) {
        Some("accepted") => (true, body),
        Some("rejected") => (false, body),
        other => panic!("{other:?}"),
    }
}

/// Asks for a certificate and gets it.
async fn renewed(client: &mut Client, device: &Device) -> (Identity, Value) {
    let key = Key::new();
    let (is_accepted, answer) = ask(client, device, request(device, &key)).await;
    assert!(is_accepted, "{answer}");
    (key.with(answer["certificate"].as_str().expect("PEM")), answer)
}

async fn rejected(client: &mut Client, device: &Device, request: Publish) -> Value {
    let (is_accepted, answer) = ask(client, device, request).await;
    assert!(!is_accepted, "{answer}");
    answer
}

async fn metric(fleet: &Fleet, outcome: &str) -> f64 {
    fleet.metric("muster_certificate_renewals_total", &format!("\"{outcome}\"")).await
}

#[tokio::test]
async fn a_certificate_from_its_signing_to_its_revocation() {
    for version in BOTH {
        let secure = Secure::start().await;
        let fleet = &secure.fleet;
        let device = fleet.enrol("boiler-1").await;
        authority(fleet).await;
        let (first, signed) = sign(fleet, &device, None).await;
        let (mut client, code) = secure.hello(Some(&first), &Connect::new(version, "a", None)).await;
        assert_eq!(code, 0, "it opens the door as it is");
        assert_eq!(client.publish(reading(&device, 1)).await, 0);
        let early = rejected(&mut client, &device, request(&device, &Key::new())).await;
        assert_eq!(early["code"], "too-early");
        let listed = fleet.get("/api/v1/devices/boiler-1/certificates").await;
        let renew_after = listed["items"][0]["renew_after"].as_str().expect("a time");
        let renew_after = chrono::DateTime::parse_from_rfc3339(renew_after).expect("a time").timestamp_millis();
        assert_eq!(early["renew_after"], renew_after);
        allow(fleet, &device, &signed).await;
        let (second, answer) = renewed(&mut client, &device).await;
        assert!(answer["not_after"].as_i64() > answer["renew_after"].as_i64());
        assert_eq!(answer["chain"], signed["chain_pem"]);
        let written = fleet.get("/api/v1/audit?action=certificate.renew").await;
        let entry = &written["items"][0];
        assert_eq!(
            (&entry["actor"]["kind"], &entry["actor"]["name"]),
            (&json!("device"), &json!("boiler-1")),
            "{written}"
        );
        assert_eq!(entry["after"]["by"], signed["id"], "{written}");
        let (mut next, code) = secure.hello(Some(&second), &Connect::new(version, "b", None)).await;
        assert_eq!(code, 0);
        assert_eq!(next.publish(reading(&device, 2)).await, 0);
        client.is_quiet("the old one is good for a day").await;
        // Once the new one is in use the old one renews nothing.
        assert_eq!(rejected(&mut client, &device, request(&device, &Key::new())).await["code"], "superseded");
        let listed = fleet.get("/api/v1/devices/boiler-1/certificates").await;
        assert_eq!(listed["items"].as_array().map(Vec::len), Some(2), "{listed}");
        assert_ne!(listed["items"][1]["expires_at"], listed["items"][1]["not_after"], "the old one ends early");
        revoke(fleet, &device, &listed["items"][0]).await;
        next.ends_with(0x98, "the certificate was revoked").await;
        assert_eq!(secure.shows(&second, version).await, if version == V5 { 0x87 } else { 5 });
        assert!((metric(fleet, "issued").await - 1.0).abs() < 0.1);
        assert_eq!(fleet.series(&device, "t").await.len(), 2);
    }
}

#[tokio::test]
async fn an_answer_that_was_lost_is_had_again_with_the_same_key() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    authority(&secure.fleet).await;
    let (first, signed) = sign(&secure.fleet, &device, None).await;
    allow(&secure.fleet, &device, &signed).await;
    let (mut client, _) = secure.hello(Some(&first), &Connect::new(V5, "", None)).await;
    let key = Key::new();
    assert_eq!(client.publish(request(&device, &key)).await, 0x00, "nobody subscribes to the answer");
    let (_, once) = ask(&mut client, &device, request(&device, &key)).await;
    let (_, twice) = ask(&mut client, &device, request(&device, &key)).await;
    assert_eq!(once, twice);
    assert!((metric(&secure.fleet, "issued").await - 1.0).abs() < 0.1);
    assert!((metric(&secure.fleet, "repeated").await - 2.0).abs() < 0.1);
    assert_eq!(secure.shows(&key.with(once["certificate"].as_str().expect("PEM")), V5).await, 0);
}

#[tokio::test]
async fn an_answer_carries_the_correlation_data_and_waits_for_a_session() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    authority(&secure.fleet).await;
    let (first, _) = sign(&secure.fleet, &device, None).await;
    let mut client = secure.hello(Some(&first), &Connect::new(V5, "kept", None).kept()).await.0;
    client.subscribe(&device.topic("certificates/renew/+"), 1).await;
    client.disconnect().await;
    let mut other = secure.hello(Some(&first), &Connect::new(V5, "other", None)).await.0;
    let asked = request(&device, &Key::new()).retained().with(Property::CorrelationData(b"7".to_vec()));
    assert_eq!(other.publish(asked).await, 0);
    let mut client = secure.hello(Some(&first), &Connect::new(V5, "kept", None).kept()).await.0;
    let answer = client.message().await;
    assert_eq!(answer.topic, device.topic("certificates/renew/rejected"));
    assert!(answer.properties.contains(&Property::CorrelationData(b"7".to_vec())), "{answer:?}");
    other.subscribe(&device.topic("certificates/#"), 0).await;
    other.is_quiet("a request is not retained, whatever it says").await;
}

#[tokio::test]
async fn whatever_is_wrong_with_a_request_is_answered() {
    let secure = Secure::start_with(&[("MUSTER__CERTIFICATES__MAX_CSR_BYTES", "2000")]).await;
    let device = secure.fleet.enrol("boiler-1").await;
    authority(&secure.fleet).await;
    let (first, signed) = sign(&secure.fleet, &device, None).await;
    allow(&secure.fleet, &device, &signed).await;
    for version in BOTH {
        let (mut client, _) = secure.hello(Some(&first), &Connect::new(version, "a", None)).await;
        let large = json!({ "csr": "A".repeat(100_000) }).to_string();
        let half = &Key::new().csr()[..200];
        for bad in
            ["", "hello", "{}", "[]", r#"{"csr":7}"#, r#"{"csr":"x"}"#, &json!({ "csr": half }).to_string(), &large]
        {
            let bad = Publish::new(device.topic("certificates/renew"), bad).qos(1);
            assert_eq!(rejected(&mut client, &device, bad).await["code"], "bad-request");
        }
        // At QoS 0 and 2 as well.
        for qos in [0, 2] {
            let bad = Publish::new(device.topic("certificates/renew"), "hello").qos(qos);
            assert_eq!(rejected(&mut client, &device, bad).await["code"], "bad-request");
        }
        client.is_quiet("it goes on").await;
    }
}

#[tokio::test]
async fn nobody_asks_or_answers_for_a_device() {
    let secure = Secure::start().await;
    let (boiler, pump) = (secure.fleet.enrol("boiler-1").await, secure.fleet.enrol("pump-1").await);
    authority(&secure.fleet).await;
    let (mine, _) = sign(&secure.fleet, &boiler, None).await;
    let (mut device, _) = secure.hello(Some(&mine), &Connect::new(V5, "", None)).await;
    let login = ("admin@example.com".to_owned(), secure.fleet.token().to_owned());
    let (mut admin, _) = secure.hello(None, &Connect::new(V5, "app", Some(login))).await;
    for (topic, why) in [
        (boiler.topic("certificates/renew/accepted"), "the server's own"),
        (boiler.topic("certificates/renew/rejected"), "the server's own"),
        (pump.topic("certificates/renew"), "another device"),
    ] {
        assert_eq!(device.publish(Publish::new(topic, "{}").qos(1)).await, 0x87, "{why}");
    }
    for (topic, why) in [
        (boiler.topic("certificates/renew/accepted"), "the server's own, for an admin too"),
        (boiler.topic("certificates/renew"), "an admin is no device"),
    ] {
        assert_eq!(admin.publish(Publish::new(topic, "{}").qos(1)).await, 0x87, "{why}");
    }
    let will = Connect::new(V5, "w", None).will(Will::new(boiler.topic("certificates/renew"), "{}"));
    assert_eq!(secure.hello(Some(&mine), &will).await.1, 0x87, "a will asks for nothing");
}

#[tokio::test]
async fn a_first_certificate_by_token_where_the_settings_allow_it() {
    for (allowed, version) in [("false", V5), ("true", V5), ("true", V311)] {
        let secure = Secure::start_with(&[("MUSTER__CERTIFICATES__FIRST_BY_TOKEN", allowed)]).await;
        let device = secure.fleet.enrol("boiler-1").await;
        authority(&secure.fleet).await;
        let (mut client, _) = secure.hello(None, &super::with_password(version, &device)).await;
        if allowed == "false" {
            assert_eq!(rejected(&mut client, &device, request(&device, &Key::new())).await["code"], "not-allowed");
            continue;
        }
        let (first, _) = renewed(&mut client, &device).await;
        assert_eq!(rejected(&mut client, &device, request(&device, &Key::new())).await["code"], "too-early");
        assert_eq!(secure.shows(&first, version).await, 0);
    }
}

/// Comes in by a certificate again and again until it has expired; the properties of the CONNACK that says so.
async fn until_late(secure: &Secure, identity: &Identity, connect: &Connect) -> (Client, Vec<Property>) {
    let late = async || {
        let socket = Box::new(secure.tls(Some(identity)).await);
        let (client, answer) = Client::hello(socket, connect).await;
        assert_eq!(answer.code, 0, "within its grace");
        let is_late = users(&answer.properties).iter().any(|(name, _)| *name == "renew-only-until-ms");
        is_late.then_some((client, answer.properties))
    };
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        if let Some(found) = late().await {
            return found;
        }
        assert!(tokio::time::Instant::now() < deadline, "it does not expire");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn a_certificate_that_has_just_expired_is_good_for_its_renewal_and_nothing_else() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    authority(&secure.fleet).await;
    let (first, _) = sign(&secure.fleet, &device, Some(2)).await;
    // The session it left behind: with a subscription, and a message that waits.
    let usual = Connect::new(V5, "boiler-1", None).kept();
    let usual = usual.will(Will::new(device.topic("status"), r#"{"state":"lost"}"#));
    let mut before = secure.hello(Some(&first), &usual).await.0;
    before.subscribe(&device.topic("commands/#"), 1).await;
    before.disconnect().await;
    let login = ("admin@example.com".to_owned(), secure.fleet.token().to_owned());
    let (mut admin, _) = secure.hello(None, &Connect::new(V5, "app", Some(login))).await;
    admin.publish(Publish::new(device.topic("commands/1/request"), "{}").qos(1)).await;

    let (mut late, properties) = until_late(&secure, &first, &usual).await;
    assert!(properties.contains(&Property::SessionExpiry(0)), "{properties:?}");
    for topic in ["telemetry", "status", "logs", "shadow/update", "commands/1/response"] {
        let refused = late.publish(Publish::new(device.topic(topic), "{}").qos(1)).await;
        assert_eq!(refused, 0x87, "{topic}");
    }
    for filter in ["#", "commands/#", "certificates/#", "updates/offer"] {
        assert_eq!(late.subscribe(&device.topic(filter), 1).await, 0x87, "{filter}");
    }
    assert_eq!(secure.hello(Some(&first), &super::with_password(V5, &device)).await.1, 0x87, "not beside a password");
    let (second, _) = renewed(&mut late, &device).await;
    late.is_quiet("no command came to it").await;
    let mut after = secure.hello(Some(&second), &usual).await;
    assert_eq!(after.1, 0);
    assert_eq!(after.0.message().await.topic, device.topic("commands/1/request"), "its session had waited");
    assert_eq!(secure.fleet.series(&device, "t").await.len(), 0);
    late.vanish();
    after.0.is_quiet("the will of one who is late is not sent").await;
}

#[tokio::test]
async fn an_expired_certificate_renews_over_3_1_1_too_and_anything_else_ends_the_connection() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    authority(&secure.fleet).await;
    let (first, _) = sign(&secure.fleet, &device, Some(2)).await;
    until_late(&secure, &first, &Connect::new(V5, "x", None)).await;
    let (mut late, code) = secure.hello(Some(&first), &Connect::new(V311, "boiler-1", None)).await;
    assert_eq!(code, 0);
    let (second, _) = renewed(&mut late, &device).await;
    assert_eq!(secure.shows(&second, V311).await, 0);
    let (mut late, _) = secure.hello(Some(&first), &Connect::new(V311, "boiler-1", None)).await;
    late.send_publish(&reading(&device, 1)).await;
    late.closes("3.1.1 has no other word for it").await;
}

#[tokio::test]
async fn beyond_its_grace_a_certificate_is_refused_and_its_connection_ends() {
    let secure = Secure::start_with(&[("MUSTER__CERTIFICATES__RENEWAL_GRACE_S", "4")]).await;
    let device = secure.fleet.enrol("boiler-1").await;
    authority(&secure.fleet).await;
    let (first, _) = sign(&secure.fleet, &device, Some(2)).await;
    let (late, _) = until_late(&secure, &first, &Connect::new(V5, "x", None)).await;
    late.ends_with(0x87, "its grace is over").await;
    for version in BOTH {
        assert_eq!(secure.shows(&first, version).await, if version == V5 { 0x87 } else { 5 });
    }
    let none = Secure::start_with(&[("MUSTER__CERTIFICATES__RENEWAL_GRACE_S", "0")]).await;
    let device = none.fleet.enrol("boiler-1").await;
    authority(&none.fleet).await;
    let (first, _) = sign(&none.fleet, &device, Some(1)).await;
    none.fleet.eventually(|| none.shows(&first, V5), |code| *code == 0x87).await;
}

#[tokio::test]
async fn the_old_certificate_ends_with_its_overlap() {
    let secure = Secure::start_with(&[("MUSTER__CERTIFICATES__RENEWAL_OVERLAP_S", "2")]).await;
    let device = secure.fleet.enrol("boiler-1").await;
    authority(&secure.fleet).await;
    let (first, signed) = sign(&secure.fleet, &device, None).await;
    allow(&secure.fleet, &device, &signed).await;
    let (mut client, _) = secure.hello(Some(&first), &Connect::new(V5, "", None)).await;
    let (second, _) = renewed(&mut client, &device).await;
    client.ends_with(0x87, "the credential has expired").await;
    assert_eq!(secure.shows(&first, V5).await, 0x87, "and has no grace");
    assert_eq!(secure.shows(&second, V5).await, 0);
}

/// Holds the row of a device, so that whatever is to be written about it waits.
async fn hold(fleet: &Fleet) -> sqlx::PgConnection {
    let mut held = sqlx::PgConnection::connect(&fleet.database_url()).await.expect("the database answers");
    sqlx::query("begin").execute(&mut held).await.expect("a transaction");
    sqlx::query("select key from device for update").execute(&mut held).await.expect("the rows");
    held
}

async fn waiting(fleet: &Fleet) -> i64 {
    let query = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
    sqlx::query_scalar(query).fetch_one(fleet.db()).await.expect("the database answers")
}

#[tokio::test]
async fn nothing_is_acknowledged_before_it_is_committed_and_a_full_queue_makes_wait() {
    let secure = Secure::start_with(&[("MUSTER__CERTIFICATES__RENEWAL_QUEUE", "1")]).await;
    let fleet = &secure.fleet;
    authority(fleet).await;
    let mut clients = Vec::new();
    for id in ["boiler-1", "boiler-2", "boiler-3"] {
        let device = fleet.enrol(id).await;
        let (first, signed) = sign(fleet, &device, None).await;
        allow(fleet, &device, &signed).await;
        clients.push((secure.hello(Some(&first), &Connect::new(V5, "", None)).await.0, device));
    }
    let held = hold(fleet).await;
    for (client, device) in &mut clients {
        let asked = request(device, &Key::new()).id(7);
        client.send_publish(&asked).await;
    }
    fleet.eventually(|| waiting(fleet), |waiting| *waiting > 0).await;
    let full = || fleet.metric("muster_mqtt_limit_hits_total", "\"renewal_queue\"");
    fleet.eventually(full, |full| *full > 0.5).await;
    assert!(metric(fleet, "issued").await < 0.5);
    let acknowledged = fleet.metric("muster_mqtt_acknowledged_total", "").await;
    assert!(acknowledged < 0.5, "nobody was told anything");
    drop(held);
    for (client, _) in &mut clients {
        assert_eq!(client.ack(0x40, 7).await.reason, 0);
    }
    assert!((metric(fleet, "issued").await - 3.0).abs() < 0.1);
}

// Clients of others

fn openssl(dir: &std::path::Path, args: &[&str]) -> Command {
    let mut command = Command::new("openssl");
    command.current_dir(dir).args(args).stdin(Stdio::null()).stderr(Stdio::null()).kill_on_drop(true);
    command
}

/// What Paho says of the renewal of the certificate in `cert.pem` and `key.pem`.
async fn paho_renews(secure: &Secure, device: &Device, version: &str, env: &[(&str, &str)]) -> Vec<Value> {
    let (root, dir) = (env!("CARGO_MANIFEST_DIR"), secure.path());
    let mut paho = Command::new(format!("{root}/target/venv/bin/python"));
    paho.arg(format!("{root}/tests/clients/paho_renew.py")).envs(env.iter().copied());
    paho.args(["localhost", &secure.fleet.mqtts_addr().port().to_string()]).arg(secure.ca_file());
    paho.args([dir.join("cert.pem"), dir.join("key.pem")]).args([&device.username, version]).stdin(Stdio::null());
    let said = timeout(2 * PATIENCE, paho.kill_on_drop(true).output()).await.expect("it ends in time");
    let said = said.expect("`make setup` installs the test clients");
    let (text, errors) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    assert!(said.status.success(), "{text} {errors}");
    text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// Writes a certificate to where clients of others look for it.
fn write(secure: &Secure, identity: &Identity) {
    std::fs::write(secure.path().join("cert.pem"), &identity.certificate).expect("a file");
    std::fs::write(secure.path().join("key.pem"), &identity.key).expect("a file");
}

#[tokio::test]
async fn paho_renews_and_its_old_certificate_is_good_until_the_overlap_ends() {
    for version in ["5", "311"] {
        // Long enough for a slow machine to come in by the old one again.
        let secure = Secure::start_with(&[("MUSTER__CERTIFICATES__RENEWAL_OVERLAP_S", "6")]).await;
        let fleet = &secure.fleet;
        let device = fleet.enrol("boiler-1").await;
        authority(fleet).await;
        let (first, signed) = sign(fleet, &device, None).await;
        write(&secure, &first);
        let early = paho_renews(&secure, &device, version, &[]).await;
        assert_eq!(early, [json!({ "rejected": "too-early" })]);
        allow(fleet, &device, &signed).await;
        let said = paho_renews(&secure, &device, version, &[("UNTIL_THE_OLD_ENDS", "1")]).await;
        let [renewed, old, after] = &said[..] else { panic!("{said:?}") };
        assert_eq!((&renewed["acknowledged"], &old["old_acknowledged"]), (&json!(true), &json!(true)));
        assert_eq!((&after["old_refused"], &after["new_acknowledged"]), (&json!("Not authorized"), &json!(true)));
        assert!(after["old_ended"].is_string(), "{said:?}");
        assert_eq!(fleet.series(&device, "t").await.len(), 3);
        let listed = fleet.get("/api/v1/devices/boiler-1/certificates").await;
        let valid = listed["items"].as_array().expect("a list").iter().filter(|one| one["valid"] == true);
        let valid = valid.map(|one| one["serial"].as_str().expect("a number")).collect::<Vec<_>>();
        let serial = renewed["serial"].as_str().expect("a number");
        assert_eq!(
            valid.iter().map(|one| one.trim_start_matches('0')).collect::<Vec<_>>(),
            [serial.trim_start_matches('0')]
        );
    }
}

/// The list of revoked certificates, as openssl reads what is given to everybody in DER.
async fn list_by_openssl(secure: &Secure, authority: &Value) -> String {
    let id = authority["id"].as_str().expect("an id");
    let answer = reqwest::get(format!("{}/api/v1/authorities/{id}/crl", secure.fleet.url())).await.expect("an answer");
    assert_eq!(answer.headers()["content-type"], "application/pkix-crl");
    let dir = secure.path();
    std::fs::write(dir.join("list.der"), answer.bytes().await.expect("a body")).expect("a file");
    let pem = authority["certificate_pem"].as_str().expect("PEM");
    std::fs::write(dir.join("authority.pem"), pem).expect("a file");
    let args = ["crl", "-inform", "DER", "-in", "list.der", "-text", "-CAfile", "authority.pem", "-verify"];
    let args = [&args[..], &["-out", "list.pem"]].concat();
    let shown = openssl(dir, &args).stderr(Stdio::piped()).output().await.expect("openssl");
    let said = String::from_utf8_lossy(&shown.stderr);
    assert!(shown.status.success() && said.contains("verify OK"), "{said}");
    std::fs::read_to_string(dir.join("list.pem")).expect("it was made")
}

#[tokio::test]
async fn paho_is_sent_away_with_its_certificate_and_cannot_return() {
    let secure = Secure::start().await;
    let (fleet, dir) = (&secure.fleet, secure.path());
    let (device, other) = (fleet.enrol("boiler-1").await, fleet.enrol("pump-1").await);
    let authority = authority(fleet).await;
    let (kept, kept_signed) = sign(fleet, &other, None).await;
    let mut stays = secure.hello(Some(&kept), &Connect::new(V5, "pump-1", None)).await.0;
    let mut fastest = PATIENCE;
    for version in ["311", "5"] {
        let (identity, signed) = sign(fleet, &device, None).await;
        write(&secure, &identity);
        let verify = ["verify", "-CAfile", "authority.pem", "-crl_check", "-CRLfile", "list.pem", "cert.pem"];
        list_by_openssl(&secure, &authority).await;
        assert!(openssl(dir, &verify).status().await.expect("openssl").success(), "it is not on the list");
        let mut paho = paho_stays(&secure, version);
        let mut lines = BufReader::new(paho.stdout.take().expect("piped")).lines();
        let mut next = async || -> Value {
            let line = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("text");
            serde_json::from_str(&line.expect("it says more")).expect("JSON")
        };
        assert_eq!(next().await, json!({ "connected": true }));
        let since = Instant::now();
        revoke(fleet, &device, &signed).await;
        assert!(next().await["ended"].is_string());
        eprintln!("MQTT {version}: off {} ms after the request", since.elapsed().as_millis());
        fastest = fastest.min(since.elapsed());
        assert_eq!(next().await, json!({ "refused": "Not authorized" }));
        assert!(timeout(PATIENCE, paho.wait()).await.expect("in time").expect("its status").success());

        let list = list_by_openssl(&secure, &authority).await.to_lowercase();
        let serial = |signed: &Value| signed["serial"].as_str().expect("a number").trim_start_matches("00").to_owned();
        assert!(list.contains(&serial(&signed)) && list.contains("key compromise"), "{list}");
        assert!(!list.contains(&serial(&kept_signed)), "{list}");
        assert!(!openssl(dir, &verify).status().await.expect("openssl").success(), "it is on the list");
    }
    // One of them may have been held up by a busy machine.
    assert!(fastest < Duration::from_secs(1), "{fastest:?}");
    stays.is_quiet("another certificate of the same authority").await;
}

/// A Paho client that shows the certificate in `cert.pem` and `key.pem` and stays until it is sent away.
fn paho_stays(secure: &Secure, version: &str) -> Child {
    let (root, dir) = (env!("CARGO_MANIFEST_DIR"), secure.path());
    let mut paho = Command::new(format!("{root}/target/venv/bin/python"));
    paho.arg(format!("{root}/tests/clients/paho_client.py"));
    paho.env("TRANSPORT", "tls").env("CA_FILE", secure.ca_file());
    paho.env("CERT_FILE", dir.join("cert.pem")).env("KEY_FILE", dir.join("key.pem"));
    paho.args([
        "localhost",
        &secure.fleet.mqtts_addr().port().to_string(),
        "",
        "",
        "boiler-1",
        version,
        "stay",
        "",
        "0",
    ]);
    let paho = paho.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true).spawn();
    paho.expect("`make setup` installs the test clients")
}

#[tokio::test]
async fn openssl_makes_the_request_paho_renews_it_and_mosquitto_uses_it() {
    let secure = Secure::start().await;
    let (fleet, dir) = (&secure.fleet, secure.path());
    let device = fleet.enrol("boiler-1").await;
    let authority = authority(fleet).await;
    let args =
        ["req", "-new", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem", "-subj", r"/O=Evil/CN=other\/pump-1"];
    let more = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "subjectAltName=DNS:evil.example.com"];
    let made = openssl(dir, &[&args[..], &more, &["-out", "csr.pem"]].concat()).status();
    assert!(timeout(PATIENCE, made).await.expect("it ends").expect("openssl is installed").success());
    let csr = std::fs::read_to_string(dir.join("csr.pem")).expect("a file");
    let signed = fleet.make("/api/v1/devices/boiler-1/certificates", json!({ "csr_pem": csr })).await;
    assert_eq!(signed["subject"], "CN=main/boiler-1");
    let pem = |value: &Value| value.as_str().expect("PEM").to_owned();
    std::fs::write(dir.join("cert.pem"), pem(&signed["certificate_pem"])).expect("a file");
    std::fs::write(dir.join("authority.pem"), pem(&authority["certificate_pem"])).expect("a file");
    let verify = ["verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", "authority.pem", "cert.pem"];
    assert!(openssl(dir, &verify).status().await.expect("openssl").success(), "as others see it");
    let ca = secure.ca_file();
    for version in ["5", "311"] {
        let listed = fleet.get("/api/v1/devices/boiler-1/certificates").await;
        allow(fleet, &device, &listed["items"][0]).await;
        let said = paho_renews(&secure, &device, version, &[]).await;
        assert_eq!((&said[0]["acknowledged"], &said[1]["old_acknowledged"]), (&json!(true), &json!(true)), "{said:?}");
    }
    let mut mosquitto = Command::new("mosquitto_rr");
    mosquitto.args(["-h", "localhost", "-p", &fleet.mqtts_addr().port().to_string(), "-V", "5", "-q", "1", "-i", "m"]);
    mosquitto.arg("--cafile").arg(&ca).arg("--cert").arg(dir.join("cert.pem")).arg("--key").arg(dir.join("key.pem"));
    mosquitto.args(["-t", &device.topic("certificates/renew"), "-e", &device.topic("certificates/renew/rejected")]);
    mosquitto.args(["-m", &json!({ "csr": csr }).to_string()]).stdin(Stdio::null()).kill_on_drop(true);
    let said = timeout(PATIENCE, mosquitto.output()).await.expect("it ends in time").expect("mosquitto_rr");
    let said: Value = serde_json::from_slice(&said.stdout).expect("JSON");
    assert_eq!(said["code"], "too-early");

    // Revoked: the list says so to others, too.
    let listed = fleet.get("/api/v1/devices/boiler-1/certificates").await;
    revoke(fleet, &device, &listed["items"][0]).await;
    let id = authority["id"].as_str().expect("an id");
    let list =
        reqwest::get(format!("{}/api/v1/authorities/{id}/crl?format=pem", fleet.url())).await.expect("an answer");
    std::fs::write(dir.join("crl.pem"), list.bytes().await.expect("a body")).expect("a file");
    let verify = ["verify", "-crl_check", "-CAfile", "authority.pem", "-CRLfile", "crl.pem", "cert.pem"];
    assert!(!openssl(dir, &verify).status().await.expect("openssl").success(), "revoked");
    let shown = openssl(dir, &["crl", "-in", "crl.pem", "-noout", "-text", "-CAfile", "authority.pem"]).output().await;
    let shown = String::from_utf8_lossy(&shown.expect("openssl").stdout).into_owned();
    assert!(shown.contains("Key Compromise") && shown.contains("CRL Number"), "{shown}");
}
