//! Who comes in by a certificate, who does not, and what each is told.

use std::path::Path;
use std::process::{Output, Stdio};

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::time::timeout;

use super::{Secure, reading, with_password};
use crate::harness::client::Client;
use crate::harness::packet::{Connect, Packet};
use crate::harness::pki::{self, Authority, Identity, VERSIONS};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::{Device, Fleet, PATIENCE, muster};

const BOTH: [Version; 2] = [V5, V311];

/// A certificate that is not accepted: not authorized.
fn unauthorized(version: Version) -> u8 {
    if version == V5 { 0x87 } else { 5 }
}

/// Who somebody is does not add up: bad user name or password.
fn contradicted(version: Version) -> u8 {
    if version == V5 { 0x86 } else { 4 }
}

async fn register(fleet: &Fleet, device: &Device, identity: &Identity) -> Value {
    let path = format!("/api/v1/devices/{}/credentials", device.id);
    let (status, answer) = fleet.call(Method::POST, &path, Some(json!({ "certificate": identity.certificate }))).await;
    assert_eq!(status, StatusCode::CREATED, "{answer}");
    answer
}

async fn disable(fleet: &Fleet, device: &Device) {
    let path = format!("/api/v1/devices/{}", device.id);
    let (status, answer) = fleet.call(Method::PATCH, &path, Some(json!({ "disabled": true }))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

#[tokio::test]
async fn a_device_comes_in_by_its_registered_certificate_until_that_is_revoked() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    let mine = Identity::self_signed("anything at all");
    for version in BOTH {
        assert_eq!(secure.shows(&mine, version).await, unauthorized(version), "nobody knows it yet");
    }
    let registered = register(&secure.fleet, &device, &mine).await;
    for (value, tls) in (1..).zip(VERSIONS) {
        let address = secure.fleet.mqtts_addr();
        let socket = pki::connect(address, &secure.servers.certificate, Some(&mine), &[tls]).await.expect("TLS");
        let (mut client, answer) = Client::hello(Box::new(socket), &Connect::new(V5, "", None)).await;
        assert_eq!(answer.code, 0, "{tls:?}");
        assert_eq!(client.publish(reading(&device, value)).await, 0, "it is that device");
    }
    assert_eq!(secure.fleet.series(&device, "t").await.len(), 2);
    let path = format!("/api/v1/devices/{}/credentials/{}", device.id, registered["id"].as_str().expect("an id"));
    assert_eq!(secure.fleet.call(Method::DELETE, &path, None).await.0, StatusCode::NO_CONTENT);
    for version in BOTH {
        assert_eq!(secure.shows(&mine, version).await, unauthorized(version), "revoked");
    }
}

#[tokio::test]
async fn a_device_comes_in_by_the_name_that_its_authority_signed() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    for (value, name) in [(1, "main/boiler-1"), (2, "boiler-1")] {
        let mine = secure.devices.client(name);
        let (mut client, code) = secure.hello(Some(&mine), &Connect::new(V311, "any", None)).await;
        assert_eq!(code, 0, "{name}");
        assert_eq!(client.publish(reading(&device, value)).await, 0);
    }
    assert_eq!(secure.fleet.series(&device, "t").await.len(), 2);
    let stranger = Authority::new("devices").client("main/boiler-1");
    let servers = secure.servers.client("main/boiler-1");
    let alone = Identity::self_signed("main/boiler-1");
    let no_client = secure.devices.server();
    let nobody = ["main/boiler-2", "other/boiler-1", "main/boiler-1/x", "", "main/", "_x"];
    let nobody = nobody.map(|name| secure.devices.client(name));
    for refused in [&[stranger, servers, alone, no_client][..], &nobody].concat() {
        for version in BOTH {
            assert_eq!(secure.shows(&refused, version).await, unauthorized(version), "{refused:?}");
        }
    }
}

#[tokio::test]
async fn a_certificate_outside_its_time_is_refused_whatever_else_is_right() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    let expired = secure.devices.client_between("main/boiler-1", -10, -1);
    let early = secure.devices.client_between("main/boiler-1", 1, 10);
    register(&secure.fleet, &device, &early).await;
    for (identity, why) in [(&expired, "the certificate has expired"), (&early, "the certificate is not valid yet")] {
        for version in BOTH {
            assert_eq!(secure.shows(identity, version).await, unauthorized(version), "{why}");
            let code = secure.hello(Some(identity), &with_password(version, &device)).await.1;
            assert_eq!(code, unauthorized(version), "{why}, even beside the right password");
        }
        let socket = Box::new(secure.tls(Some(identity)).await);
        let (_, answer) = Client::hello(socket, &Connect::new(V5, "", None)).await;
        assert!(format!("{:?}", answer.properties).contains(why), "{answer:?}");
    }
    let path = format!("/api/v1/devices/{}/credentials", device.id);
    let (status, _) = secure.fleet.call(Method::POST, &path, Some(json!({ "certificate": expired.certificate }))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_disabled_device_stays_outside_with_any_certificate() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    let (own, signed) = (Identity::self_signed("x"), secure.devices.client("main/boiler-1"));
    register(&secure.fleet, &device, &own).await;
    for identity in [&own, &signed] {
        assert_eq!(secure.shows(identity, V5).await, 0);
    }
    disable(&secure.fleet, &device).await;
    for (identity, version) in [(&own, V5), (&own, V311), (&signed, V5), (&signed, V311)] {
        assert_eq!(secure.shows(identity, version).await, unauthorized(version));
    }
}

#[tokio::test]
async fn an_open_connection_ends_with_the_certificate_it_came_by() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    let (own, signed) = (Identity::self_signed("x"), secure.devices.client("main/boiler-1"));
    let registered = register(&secure.fleet, &device, &own).await;
    let by_own = secure.hello(Some(&own), &Connect::new(V5, "own", None)).await.0;
    let mut by_signed = secure.hello(Some(&signed), &Connect::new(V5, "signed", None)).await.0;
    let path = format!("/api/v1/devices/{}/credentials/{}", device.id, registered["id"].as_str().expect("an id"));
    assert_eq!(secure.fleet.call(Method::DELETE, &path, None).await.0, StatusCode::NO_CONTENT);
    by_own.ends_with(0x98, "the credential was revoked").await;
    by_signed.is_quiet("it came by another").await;
    disable(&secure.fleet, &device).await;
    by_signed.ends_with(0x98, "the device was disabled").await;
}

#[tokio::test]
async fn what_the_authority_took_back_is_refused_and_a_new_list_is_taken_up() {
    let lists = tempfile::tempdir().expect("a directory");
    let file = lists.path().join("crl.pem");
    std::fs::write(&file, "").expect("a file");
    let secure = Secure::start_with(&[("MUSTER__TLS__CLIENT_CRL", file.to_str().expect("text"))]).await;
    secure.fleet.enrol("boiler-1").await;
    secure.fleet.enrol("boiler-2").await;
    let (taken_back, good) = (secure.devices.client("main/boiler-1"), secure.devices.client("main/boiler-2"));
    assert_eq!(secure.shows(&taken_back, V5).await, 0);
    std::fs::write(&file, secure.devices.takes_back(&taken_back)).expect("a file");
    secure.fleet.eventually(|| secure.shows(&taken_back, V5), |code| *code == 0x87).await;
    assert_eq!(secure.shows(&taken_back, V311).await, 5);
    assert_eq!(secure.shows(&good, V5).await, 0);
}

#[tokio::test]
async fn beside_a_certificate_the_password_decides_unless_they_contradict() {
    let secure = Secure::start().await;
    let (boiler, pump) = (secure.fleet.enrol("boiler-1").await, secure.fleet.enrol("pump-1").await);
    let (of_boiler, unknown) = (secure.devices.client("main/boiler-1"), Identity::self_signed("main/boiler-1"));
    let wrong = Device { password: "wrong".to_owned(), ..boiler.clone() };
    for version in BOTH {
        for (identity, device, expected) in [
            (&of_boiler, &boiler, 0),
            (&unknown, &boiler, 0),
            (&of_boiler, &pump, contradicted(version)),
            (&of_boiler, &wrong, contradicted(version)),
            (&unknown, &wrong, contradicted(version)),
        ] {
            let code = secure.hello(Some(identity), &with_password(version, device)).await.1;
            assert_eq!(code, expected, "{version:?} {}", device.username);
        }
        // Many devices have a certificate in their TLS and a user before it.
        let admin = Connect::new(version, "app", Some(("admin@example.com".into(), secure.fleet.token().into())));
        assert_eq!(secure.hello(Some(&of_boiler), &admin).await.1, 0, "a user");
    }
}

/// A CONNECT with a user name and no password; 3.1.1 allows it as well.
fn name_only(username: &str) -> Vec<u8> {
    use crate::harness::raw::bytes;
    bytes().text("MQTT").u8(4).u8(0x82).u16(0).text("any").text(username).packet(0x10)
}

#[tokio::test]
async fn a_user_name_without_a_password_must_be_that_of_the_certificate() {
    let secure = Secure::start().await;
    secure.fleet.enrol("boiler-1").await;
    let mine = secure.devices.client("main/boiler-1");
    for (username, expected) in [("main/boiler-1", 0), ("main/pump-1", 4), ("admin@example.com", 4)] {
        let mut client = Client::on(Box::new(secure.tls(Some(&mine)).await), V311);
        client.send(&name_only(username)).await;
        match client.next().await {
            Packet::ConnAck(answer) => assert_eq!(answer.code, expected, "{username}"),
            other => panic!("{other:?}"),
        }
    }
    let mut client = Client::on(Box::new(secure.tls(None).await), V311);
    client.send(&name_only("main/boiler-1")).await;
    assert!(matches!(client.next().await, Packet::ConnAck(answer) if answer.code == 5), "no certificate at all");
}

#[tokio::test]
async fn somebody_elses_certificate_is_of_no_use_without_its_key() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    let mine = secure.devices.client("main/boiler-1");
    register(&secure.fleet, &device, &mine).await;
    let thief = Identity { key: Identity::self_signed("x").key, ..mine };
    for tls in VERSIONS {
        let refused = pki::is_sent_away(secure.fleet.mqtts_addr(), &secure.servers.certificate, &thief, tls).await;
        assert!(refused, "{tls:?}");
    }
    let ended = || secure.fleet.metric("muster_mqtt_early_ends_total", "tls handshake");
    secure.fleet.eventually(ended, |ended| *ended > 1.5).await;
}

// What `muster tls` makes

async fn run(data_dir: &Path, args: &[&str]) -> Output {
    let output = muster().arg("tls").args(args).env("MUSTER__DATA_DIR", data_dir).stdin(Stdio::null()).output();
    timeout(PATIENCE, output).await.expect("it ends in time").expect("the binary is built")
}

fn mode(file: &Path) -> u32 {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(file).expect("it was made").permissions().mode() & 0o777
}

#[tokio::test]
async fn mosquitto_comes_in_with_what_muster_tls_makes() {
    let dir = tempfile::tempdir().expect("a directory");
    let data_dir = dir.path().join("data");
    assert!(run(&data_dir, &["init", "--host", "mqtt.example.com"]).await.status.success());
    assert!(run(&data_dir, &["device", "boiler-1"]).await.status.success());
    let tls = data_dir.join("tls");
    for key in ["ca-key.pem", "server-key.pem", "devices/main/boiler-1-key.pem"] {
        assert_eq!(mode(&tls.join(key)), 0o600, "{key}");
    }
    let data = data_dir.to_str().expect("text");
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__TLS_LISTEN", "127.0.0.1:0"), ("MUSTER__DATA_DIR", data)]).await;
    let device = fleet.enrol("boiler-1").await;
    let port = fleet.mqtts_addr().port().to_string();
    let mosquitto = |program: &str, version: &str, with_certificate: bool| {
        let mut command = Command::new(program);
        command.args(["-h", "localhost", "-p", &port, "-V", version, "-q", "1", "-i", "any"]);
        command.args(["-t", &device.topic("telemetry")]).arg("--cafile").arg(tls.join("ca.pem"));
        if with_certificate {
            command.arg("--cert").arg(tls.join("devices/main/boiler-1.pem"));
            command.arg("--key").arg(tls.join("devices/main/boiler-1-key.pem"));
        }
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    };
    for (version, metric) in [("311", "a"), ("5", "b")] {
        let publish = async |with_certificate: bool| {
            let mut command = mosquitto("mosquitto_pub", version, with_certificate);
            command.args(["-m", &format!(r#"{{"{metric}":1}}"#)]).stderr(Stdio::null());
            timeout(PATIENCE, command.status()).await.expect("it ends in time").expect("`make setup` installs it")
        };
        assert!(publish(true).await.success(), "{version}");
        assert!(!publish(false).await.success(), "without a certificate it is nobody");
    }
    let latest = fleet.get("/api/v1/devices/boiler-1/telemetry/latest").await;
    assert_eq!(latest["items"].as_array().map(Vec::len), Some(2), "{latest}");

    let mut subscriber = mosquitto("mosquitto_sub", "5", true);
    let subscriber = subscriber.args(["-C", "1"]).stdout(Stdio::piped()).spawn().expect("`make setup` installs it");
    let held = || fleet.metric("muster_mqtt_subscriptions", "");
    fleet.eventually(held, |held| *held > 0.5).await;
    let mut sender = fleet.connect(&device).await;
    sender.publish(&device.topic("telemetry"), r#"{"c":1}"#).await;
    let said = timeout(PATIENCE, subscriber.wait_with_output()).await.expect("it ends in time").expect("its output");
    assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), r#"{"c":1}"#);
}

#[tokio::test]
async fn muster_tls_overwrites_nothing_unasked() {
    let dir = tempfile::tempdir().expect("a directory");
    let before_init = run(dir.path(), &["device", "boiler-1"]).await;
    assert!(!before_init.status.success());
    assert!(String::from_utf8_lossy(&before_init.stderr).contains("muster tls init"));
    assert!(run(dir.path(), &["init"]).await.status.success());
    let authority = || std::fs::read(dir.path().join("tls/ca.pem")).expect("it was made");
    let first = authority();
    let again = run(dir.path(), &["init"]).await;
    assert_eq!((again.status.code(), authority() == first), (Some(1), true));
    assert!(String::from_utf8_lossy(&again.stderr).contains("--force"));
    assert!(run(dir.path(), &["init", "--force"]).await.status.success());
    assert_ne!(authority(), first);
    assert!(run(dir.path(), &["device", "boiler-1", "--tenant", "acme"]).await.status.success());
    assert_eq!(run(dir.path(), &["device", "boiler-1", "--tenant", "acme"]).await.status.code(), Some(1));
    for bad in [["device", "../x", "--tenant", "main"], ["device", "x", "--tenant", "../main"]] {
        assert_eq!(run(dir.path(), &bad).await.status.code(), Some(2), "{bad:?}");
    }
    assert_eq!(run(dir.path(), &["init", "--force", "--host", "two words"]).await.status.code(), Some(2));
}
