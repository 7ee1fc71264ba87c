//! The TLS listener: both versions, slow and hostile handshakes, files that change.

use std::process::Stdio;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Secure, reading, with_password};
use crate::harness::client::Client;
use crate::harness::packet::{Packet, Publish};
use crate::harness::pki::{self, Authority, Identity, VERSIONS};
use crate::harness::raw::Version::{V5, V311};
use crate::harness::{Fleet, PATIENCE, muster};

async fn hits(fleet: &Fleet, limit: &str) -> f64 {
    fleet.metric("muster_mqtt_limit_hits_total", &format!("\"{limit}\"")).await
}

/// Whether the server closes a socket on which nothing more is said.
async fn is_closed(socket: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    timeout(PATIENCE, socket.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test]
async fn a_device_is_acknowledged_over_either_version_of_tls() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    for (value, (tls, version)) in (0..).zip(VERSIONS.into_iter().flat_map(|tls| [(tls, V5), (tls, V311)])) {
        let address = secure.fleet.mqtts_addr();
        let socket = pki::connect(address, &secure.servers.certificate, None, &[tls]).await.expect("a handshake");
        assert_eq!(socket.get_ref().1.protocol_version(), Some(tls.version));
        let (mut client, answer) = Client::hello(Box::new(socket), &with_password(version, &device)).await;
        assert_eq!(answer.code, 0, "{tls:?} {version:?}");
        assert_eq!(client.publish(reading(&device, value)).await, 0);
        assert_eq!(secure.fleet.series(&device, "t").await.len(), usize::try_from(value).unwrap() + 1);
    }
}

#[tokio::test]
async fn large_messages_go_through_whole_in_both_directions() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    for tls in VERSIONS {
        let address = secure.fleet.mqtts_addr();
        let socket = pki::connect(address, &secure.servers.certificate, None, &[tls]).await.expect("a handshake");
        let (mut client, _) = Client::hello(Box::new(socket), &with_password(V5, &device)).await;
        client.subscribe(&device.topic("echo"), 1).await;
        for letter in ["a", "b", "c"] {
            let text = letter.repeat(200_000);
            client.publish(Publish::new(device.topic("echo"), text.clone()).qos(1)).await;
            assert!(client.message().await.payload == text.as_bytes(), "{letter}");
        }
    }
}

#[tokio::test]
async fn a_certificate_that_is_not_the_servers_is_noticed() {
    let secure = Secure::start().await;
    let stranger = Authority::new("a stranger");
    let refused = pki::connect(secure.fleet.mqtts_addr(), &stranger.certificate, None, &VERSIONS).await;
    assert!(refused.is_err());
    let ended = || secure.fleet.metric("muster_mqtt_early_ends_total", "tls handshake");
    secure.fleet.eventually(ended, |ended| *ended > 0.5).await;
}

/// Sockets on which a handshake has begun, or something else, and does not go on.
async fn stalled(fleet: &Fleet, begun: &[&[u8]]) -> Vec<TcpStream> {
    let mut stalled = Vec::new();
    for begun in begun {
        let mut socket = TcpStream::connect(fleet.mqtts_addr()).await.expect("the server listens");
        socket.write_all(begun).await.expect("the server reads");
        stalled.push(socket);
    }
    stalled
}

/// The beginning of a `ClientHello`.
const HALF_A_HELLO: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1];

#[tokio::test]
async fn handshakes_that_stall_delay_nobody() {
    let secure = Secure::start_with(&[("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "600000")]).await;
    let device = secure.fleet.enrol("boiler-1").await;
    let _stalled = stalled(&secure.fleet, &[b"", HALF_A_HELLO].repeat(20)).await;
    // Waiting for those who stall would be longer than the test has patience.
    for _ in 0..5 {
        assert_eq!(secure.hello(None, &with_password(V5, &device)).await.1, 0);
    }
    let handshakes = || secure.fleet.metric("muster_mqtt_handshakes", "");
    secure.fleet.eventually(handshakes, |under_way| (*under_way - 40.0).abs() < 0.1).await;
}

#[tokio::test]
async fn what_does_not_become_a_handshake_is_closed() {
    let secure = Secure::start_with(&[("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "1000")]).await;
    let slow = stalled(&secure.fleet, &[b"", HALF_A_HELLO]).await;
    let other = stalled(&secure.fleet, &[b"GET / HTTP/1.1\r\n\r\n", &[0x10, 0x10, 0, 4]]).await;
    for mut socket in slow.into_iter().chain(other) {
        assert!(is_closed(&mut socket).await);
    }
    assert!(hits(&secure.fleet, "connect_timeout").await > 1.5);
    assert!(secure.fleet.metric("muster_mqtt_early_ends_total", "tls handshake").await > 0.5);
}

#[tokio::test]
async fn a_handshake_and_its_connect_have_one_deadline() {
    let secure = Secure::start_with(&[("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "5000")]).await;
    let mut silent = secure.tls(None).await;
    let ended = timeout(PATIENCE, silent.read_u8()).await.expect("the server ends it");
    assert!(ended.is_err());
    assert!(hits(&secure.fleet, "connect_timeout").await > 0.5);
}

#[tokio::test]
async fn a_handshake_too_many_is_refused_and_counted() {
    let settings = [("MUSTER__ADMISSION__MAX_HANDSHAKES", "2"), ("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "600000")];
    let secure = Secure::start_with(&settings).await;
    let device = secure.fleet.enrol("boiler-1").await;
    let (mut inside, code) = secure.hello(None, &with_password(V5, &device)).await;
    assert_eq!(code, 0);
    let stalled = stalled(&secure.fleet, &[b"", HALF_A_HELLO]).await;
    for (version, refusal) in [(V5, 0x89), (V311, 3)] {
        assert_eq!(secure.hello(None, &with_password(version, &device)).await.1, refusal);
    }
    assert!(hits(&secure.fleet, "handshakes").await > 1.5);
    inside.is_quiet("those inside go on").await;
    drop(stalled);
    let again = || async { secure.hello(None, &with_password(V5, &device)).await.1 };
    secure.fleet.eventually(again, |code| *code == 0).await;
}

#[tokio::test]
async fn a_connection_too_many_is_told_so_over_tls() {
    let secure = Secure::start_with(&[("MUSTER__MQTT__MAX_CONNECTIONS", "1")]).await;
    let (first, second) = (secure.fleet.enrol("first").await, secure.fleet.enrol("second").await);
    let (mut held, _) = secure.hello(None, &with_password(V5, &first)).await;
    for (version, refusal) in [(V5, 0x97), (V311, 3)] {
        let (mut refused, code) = secure.hello(None, &with_password(version, &second)).await;
        assert_eq!(code, refusal);
        assert!(matches!(refused.next().await, Packet::Closed));
    }
    held.is_quiet("those inside go on").await;
}

/// The certificate that the server shows now.
async fn shown(secure: &Secure, authority: &str) -> Option<Vec<u8>> {
    let socket = pki::connect(secure.fleet.mqtts_addr(), authority, None, &VERSIONS).await.ok()?;
    Some(socket.get_ref().1.peer_certificates()?.first()?.to_vec())
}

fn der(identity: &Identity) -> Option<Vec<u8>> {
    CertificateDer::from_pem_slice(identity.certificate.as_bytes()).ok().map(|der| der.to_vec())
}

#[tokio::test]
async fn new_certificates_are_taken_up_and_open_connections_go_on() {
    let secure = Secure::start().await;
    let device = secure.fleet.enrol("boiler-1").await;
    let (mut open, _) = secure.hello(None, &with_password(V5, &device)).await;
    let (others, expires) = (Authority::new("other servers"), "muster_tls_certificate_expires_timestamp_seconds");
    assert!(secure.fleet.metric(expires, "").await > 1_000_000_000.0);

    let renewed = others.server();
    renewed.write(secure.path(), "server");
    let now = || shown(&secure, &others.certificate);
    secure.fleet.eventually(now, |shown| *shown == der(&renewed)).await;
    open.is_quiet("those inside go on").await;
    assert_eq!(open.publish(reading(&device, 1)).await, 0);

    // A key of another certificate: what is in force stays so, and the operator hears of it.
    std::fs::write(secure.path().join("server-key.pem"), others.server().key).expect("a file");
    let broken = || secure.fleet.metric("muster_tls_files_broken", "");
    secure.fleet.eventually(broken, |broken| *broken > 0.5).await;
    assert_eq!(shown(&secure, &others.certificate).await, der(&renewed));
    std::fs::remove_file(secure.path().join("server.pem")).expect("a file");
    let refused = || secure.fleet.metric("muster_tls_reloads_total", "refused");
    secure.fleet.eventually(refused, |refused| *refused > 1.5).await;
    assert_eq!(shown(&secure, &others.certificate).await, der(&renewed));

    let repaired = others.server();
    repaired.write(secure.path(), "server");
    secure.fleet.eventually(now, |shown| *shown == der(&repaired)).await;
    secure.fleet.eventually(broken, |broken| *broken < 0.5).await;
    open.is_quiet("those inside go on").await;
}

#[tokio::test]
async fn without_its_files_the_server_says_what_to_do() {
    let dir = tempfile::tempdir().expect("a directory");
    let db = fleet_core::testing::TestDb::new().await;
    let serve = muster()
        .arg("serve")
        .env("MUSTER__DATA_DIR", dir.path())
        .env("MUSTER__DATABASE__URL", sqlx::ConnectOptions::to_url_lossy(&db.options()).as_str())
        .env("MUSTER__HTTP__LISTEN", "127.0.0.1:0")
        .env("MUSTER__MQTT__LISTEN", "127.0.0.1:0")
        .env("MUSTER__MQTT__TLS_LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .output();
    let ended = timeout(PATIENCE, serve).await.expect("it ends at once").expect("the binary is built");
    assert_eq!(ended.status.code(), Some(2));
    let said = String::from_utf8_lossy(&ended.stderr);
    let last = said.lines().last().unwrap_or_default();
    assert!(last.contains("server.pem does not exist") && last.contains("muster tls init"), "{said}");
}
