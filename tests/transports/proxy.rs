//! Behind a proxy that speaks the PROXY protocol: whoever it speaks for is believed, and nobody else.

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::{Secure, reading, with_password};
use crate::harness::client::Client;
use crate::harness::packet::Packet;
use crate::harness::pki::{self, VERSIONS};
use crate::harness::raw::Version::V5;
use crate::harness::{Device, Fleet};

/// A header of version 2 for 203.0.113.7:4711.
const HEADER: [u8; 28] = [
    13, 10, 13, 10, 0, 13, 10, 0x51, 0x55, 0x49, 0x54, 10, 0x21, 0x11, 0, 12, 203, 0, 113, 7, 10, 0, 0, 1, 0x12, 0x67,
    0x07, 0x5B,
];
/// A health check: the proxy itself.
const LOCAL: [u8; 16] = [13, 10, 13, 10, 0, 13, 10, 0x51, 0x55, 0x49, 0x54, 10, 0x20, 0, 0, 0];

const TRUSTED: [(&str, &str); 2] =
    [("MUSTER__MQTT__PROXY_PROTOCOL", "true"), ("MUSTER__MQTT__PROXY_TRUSTED", "127.0.0.0/8,::1/128")];

async fn announced(address: std::net::SocketAddr, header: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.expect("the server listens");
    socket.write_all(header).await.expect("the server reads");
    socket
}

async fn early_ends(fleet: &Fleet, reason: &str) -> f64 {
    fleet.metric("muster_mqtt_early_ends_total", reason).await
}

#[tokio::test]
async fn an_announced_device_is_served_over_tcp_and_tls() {
    let secure = Secure::start_with(&TRUSTED).await;
    let device = secure.fleet.enrol("boiler-1").await;
    for (value, header) in [(1, &HEADER[..]), (2, &LOCAL)] {
        let socket = announced(secure.fleet.mqtt_addr(), header).await;
        let (mut client, answer) = Client::hello(Box::new(socket), &with_password(V5, &device)).await;
        assert_eq!(answer.code, 0);
        assert_eq!(client.publish(reading(&device, value)).await, 0);
        let socket = announced(secure.fleet.mqtts_addr(), header).await;
        let socket = pki::over(socket, &secure.servers.certificate, None, &VERSIONS).await.expect("a handshake");
        let (mut client, answer) = Client::hello(Box::new(socket), &with_password(V5, &device)).await;
        assert_eq!(answer.code, 0);
        assert_eq!(client.publish(reading(&device, value + 10)).await, 0);
    }
    assert_eq!(secure.fleet.series(&device, "t").await.len(), 4);
}

#[tokio::test]
async fn the_address_that_is_told_is_the_one_that_is_shown() {
    let secure = Secure::start_with(&[&TRUSTED[..], &[("MUSTER__HTTP__BROKER_ANSWER_MS", "15000")]].concat()).await;
    let device = secure.fleet.enrol("boiler-1").await;
    let socket = announced(secure.fleet.mqtts_addr(), &HEADER).await;
    let socket = pki::over(socket, &secure.servers.certificate, None, &VERSIONS).await.expect("a handshake");
    let (_client, answer) = Client::hello(Box::new(socket), &with_password(V5, &device)).await;
    assert_eq!(answer.code, 0);
    let shown = secure.fleet.get("/api/v1/connections?transport=tls").await;
    assert_eq!(shown["items"][0]["address"], "203.0.113.7:4711", "{shown}");
}

#[tokio::test]
async fn who_guesses_is_known_by_the_address_that_the_proxy_tells() {
    let fleet = Fleet::start_with(&[&TRUSTED[..], &[("MUSTER__ADMISSION__AUTH_FAILURES", "2")]].concat()).await;
    let device = fleet.enrol("boiler-1").await;
    let wrong = Device { password: "wrong".to_owned(), ..device.clone() };
    let says = async |header: &[u8], device: &Device| {
        let socket = announced(fleet.mqtt_addr(), header).await;
        Client::hello(Box::new(socket), &with_password(V5, device)).await.1.code
    };
    let another = [&HEADER[..19], &[8], &HEADER[20..]].concat();
    for (guesser, innocent) in [(&HEADER[..], &LOCAL[..]), (&LOCAL, &another)] {
        for _ in 0..3 {
            assert_eq!(says(guesser, &wrong).await, 0x86);
        }
        assert_eq!(says(guesser, &device).await, 0x9F, "it has guessed");
        assert_eq!(says(innocent, &device).await, 0, "it has not, even behind a proxy that has");
    }
}

#[tokio::test]
async fn a_header_in_small_pieces_is_a_header() {
    let fleet = Fleet::start_with(&TRUSTED).await;
    let device = fleet.enrol("boiler-1").await;
    let mut socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    socket.set_nodelay(true).expect("a socket");
    let all = [&HEADER[..], &with_password(V5, &device).bytes()].concat();
    for byte in all {
        socket.write_all(&[byte]).await.expect("the server reads");
        tokio::task::yield_now().await;
    }
    let mut client = Client::on(Box::new(socket), V5);
    assert!(matches!(client.next().await, Packet::ConnAck(answer) if answer.code == 0));
}

#[tokio::test]
async fn without_a_whole_header_nobody_is_served() {
    let fleet = Fleet::start_with(&[&TRUSTED[..], &[("MUSTER__MQTT__CONNECT_TIMEOUT_MS", "1000")]].concat()).await;
    let device = fleet.enrol("boiler-1").await;
    let connect = with_password(V5, &device).bytes();
    let garbage = [&HEADER[..13], &[0xFF; 40]].concat();
    let version_1 = b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 1883\r\n";
    for begun in [&connect[..], &garbage, version_1] {
        let socket = announced(fleet.mqtt_addr(), &[begun, &connect].concat()).await;
        assert!(matches!(Client::on(Box::new(socket), V5).next().await, Packet::Closed));
    }
    assert!((early_ends(&fleet, "proxy header").await - 3.0).abs() < 0.1);
    // Half a header is not waited for longer than a CONNECT is.
    let half = announced(fleet.mqtt_addr(), &HEADER[..20]).await;
    assert!(matches!(Client::on(Box::new(half), V5).next().await, Packet::Closed));
    assert!(fleet.metric("muster_mqtt_limit_hits_total", "\"connect_timeout\"").await > 0.5);
}

#[tokio::test]
async fn a_proxy_that_is_not_trusted_is_closed_unread() {
    let settings = [("MUSTER__MQTT__PROXY_PROTOCOL", "true"), ("MUSTER__MQTT__PROXY_TRUSTED", "10.0.0.0/8")];
    let fleet = Fleet::start_with(&settings).await;
    let device = fleet.enrol("boiler-1").await;
    let socket = announced(fleet.mqtt_addr(), &[&HEADER[..], &with_password(V5, &device).bytes()].concat()).await;
    assert!(matches!(Client::on(Box::new(socket), V5).next().await, Packet::Closed));
    assert!(early_ends(&fleet, "proxy untrusted").await > 0.5);
}

#[tokio::test]
async fn where_none_is_expected_a_header_is_no_connect() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let socket = announced(fleet.mqtt_addr(), &[&HEADER[..], &with_password(V5, &device).bytes()].concat()).await;
    assert!(matches!(Client::on(Box::new(socket), V5).next().await, Packet::Closed));
}
