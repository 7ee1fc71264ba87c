//! MQTT over WebSocket on the HTTP port.

use std::process::Stdio;

use futures::{SinkExt, StreamExt};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::{Bytes, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

use super::{reading, with_password};
use crate::harness::packet::{self, Publish};
use crate::harness::raw::Version::{V5, V311};
use crate::harness::{Fleet, PATIENCE};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

async fn open(fleet: &Fleet) -> Socket {
    let mut request = fleet.url().replace("http://", "ws://");
    request.push_str("/mqtt");
    let mut request = request.into_client_request().expect("a URL");
    request.headers_mut().insert("Sec-WebSocket-Protocol", HeaderValue::from_static("mqttv3.1, mqtt"));
    let (socket, response) = tokio_tungstenite::connect_async(request).await.expect("a WebSocket");
    assert_eq!(response.headers()["Sec-WebSocket-Protocol"], "mqtt");
    socket
}

async fn next(socket: &mut Socket) -> Option<Message> {
    let next = timeout(PATIENCE, socket.next()).await.expect("the server answers in time");
    next.and_then(Result::ok)
}

/// Reads until so many bytes are there, however they are framed.
async fn bytes(socket: &mut Socket, count: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < count {
        match next(socket).await {
            Some(Message::Binary(bytes)) => all.extend_from_slice(&bytes),
            Some(Message::Ping(_) | Message::Pong(_)) => {}
            other => panic!("instead of bytes: {other:?}"),
        }
    }
    all
}

async fn send(socket: &mut Socket, bytes: impl Into<Bytes>) {
    socket.send(Message::Binary(bytes.into())).await.expect("the server reads");
}

#[tokio::test]
async fn packets_may_be_split_over_frames_or_joined_in_one() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let (connect, ping) = (with_password(V311, &device).bytes(), [0xC0, 0]);
    let one = reading(&device, 1).id(7).bytes(V311);
    let two = reading(&device, 2).id(8).bytes(V311);

    let mut joined = open(&fleet).await;
    send(&mut joined, [&connect[..], &one, &two, &ping].concat()).await;
    let answer = [0x20, 2, 0, 0, 0x40, 2, 0, 7, 0x40, 2, 0, 8];
    let mut answered = bytes(&mut joined, answer.len() + 2).await;
    // The ping is answered at once, the readings after their COMMIT.
    let place = answered.windows(2).position(|two| two == [0xD0, 0]).expect("a PINGRESP");
    answered.drain(place..place + 2);
    assert_eq!(answered, answer);
    drop(joined);

    let mut split = open(&fleet).await;
    for byte in [&connect[..], &two, &ping].concat() {
        send(&mut split, vec![byte]).await;
        send(&mut split, Vec::new()).await;
    }
    assert_eq!(bytes(&mut split, 10).await.len(), 10, "CONNACK, PUBACK and PINGRESP");
    assert_eq!(fleet.series(&device, "t").await.len(), 2);
}

#[tokio::test]
async fn large_messages_come_back_whole() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let mut socket = open(&fleet).await;
    send(&mut socket, with_password(V311, &device).bytes()).await;
    assert_eq!(bytes(&mut socket, 4).await, [0x20, 2, 0, 0]);
    send(&mut socket, packet::subscribe(V311, 1, &[(device.topic("echo"), 0)], &[])).await;
    assert_eq!(bytes(&mut socket, 5).await, [0x90, 3, 0, 1, 0]);
    let publish = Publish::new(device.topic("echo"), "x".repeat(200_000)).bytes(V311);
    for _ in 0..3 {
        for part in publish.chunks(1000) {
            send(&mut socket, part.to_vec()).await;
        }
        assert!(bytes(&mut socket, publish.len()).await == publish);
    }
}

#[tokio::test]
async fn a_ping_of_the_websocket_is_answered() {
    let fleet = Fleet::start().await;
    let mut socket = open(&fleet).await;
    socket.send(Message::Ping(Bytes::from_static(b"here?"))).await.expect("the server reads");
    assert_eq!(next(&mut socket).await, Some(Message::Pong(Bytes::from_static(b"here?"))));
}

#[tokio::test]
async fn a_frame_of_text_ends_the_connection_with_1003() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    for connected in [false, true] {
        let mut socket = open(&fleet).await;
        if connected {
            send(&mut socket, with_password(V311, &device).bytes()).await;
            bytes(&mut socket, 4).await;
        }
        socket.send(Message::text("CONNECT")).await.expect("the server reads");
        match next(&mut socket).await {
            Some(Message::Close(Some(close))) => assert_eq!(close.code, CloseCode::Unsupported),
            other => panic!("instead of a Close: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_frame_too_large_ends_the_connection_unread() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__MAX_PACKET_BYTES", "1024")]).await;
    let device = fleet.enrol("boiler-1").await;
    let mut socket = open(&fleet).await;
    send(&mut socket, with_password(V311, &device).bytes()).await;
    bytes(&mut socket, 4).await;
    let _ = socket.send(Message::Binary(vec![0; 70_000].into())).await;
    let last = next(&mut socket).await;
    assert!(!matches!(last, Some(Message::Binary(_))), "{last:?}");
}

#[tokio::test]
async fn a_refused_client_is_told_so_and_the_websocket_closed() {
    let fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let wrong = crate::harness::Device { password: "wrong".to_owned(), ..device };
    let mut socket = open(&fleet).await;
    send(&mut socket, with_password(V5, &wrong).bytes()).await;
    assert_eq!(bytes(&mut socket, 4).await[3], 0x86);
    let last = next(&mut socket).await;
    assert!(matches!(last, Some(Message::Close(_))), "{last:?}");
}

#[tokio::test]
async fn websockets_count_as_connections() {
    let settings = [("MUSTER__MQTT__MAX_CONNECTIONS", "1"), ("MUSTER__HTTP__BROKER_ANSWER_MS", "15000")];
    let fleet = Fleet::start_with(&settings).await;
    let device = fleet.enrol("boiler-1").await;
    let mut held = open(&fleet).await;
    send(&mut held, with_password(V311, &device).bytes()).await;
    bytes(&mut held, 4).await;
    let shown = fleet.get("/api/v1/connections?transport=websocket").await;
    assert_eq!(shown["items"][0]["client_id"], "boiler-1", "{shown}");
    let mut refused = open(&fleet).await;
    send(&mut refused, with_password(V311, &device).bytes()).await;
    assert_eq!(bytes(&mut refused, 4).await, [0x20, 2, 0, 3]);
    send(&mut held, vec![0xC0, 0]).await;
    assert_eq!(bytes(&mut held, 2).await, [0xD0, 0]);
}

#[tokio::test]
async fn a_server_that_stops_says_good_bye_to_websockets_too() {
    let mut fleet = Fleet::start().await;
    let device = fleet.enrol("boiler-1").await;
    let mut socket = open(&fleet).await;
    send(&mut socket, with_password(V5, &device).bytes()).await;
    let connack = next(&mut socket).await;
    assert!(matches!(connack, Some(Message::Binary(bytes)) if bytes[0] == 0x20));
    assert!(fleet.stop().await.success());
    match next(&mut socket).await {
        Some(Message::Binary(bytes)) => assert_eq!((bytes[0], bytes[2]), (0xE0, 0x8B)),
        other => panic!("instead of a DISCONNECT: {other:?}"),
    }
}

#[tokio::test]
async fn what_is_no_mqtt_over_websocket_is_a_problem() {
    let fleet = Fleet::start().await;
    let url = format!("{}/mqtt", fleet.url());
    let upgrade = [
        ("Connection", "upgrade"),
        ("Upgrade", "websocket"),
        ("Sec-WebSocket-Version", "13"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="),
    ];
    let http = reqwest::Client::new();
    let ask = async |headers: &[(&str, &str)]| {
        let request = headers.iter().fold(http.get(&url), |request, (name, value)| request.header(*name, *value));
        let answer = request.send().await.expect("an answer");
        let (status, text) = (answer.status().as_u16(), answer.text().await.expect("a body"));
        let problem: Value = serde_json::from_str(&text).expect("a problem");
        (status, problem["type"].as_str().expect("a type").to_owned())
    };
    let no_subprotocol = (400, "urn:muster:problem:no-mqtt-subprotocol".to_owned());
    assert_eq!(ask(&upgrade).await, no_subprotocol);
    assert_eq!(ask(&[&upgrade[..], &[("Sec-WebSocket-Protocol", "chat, mqttv3.1")]].concat()).await, no_subprotocol);
    let (status, kind) = ask(&[]).await;
    assert_eq!((status, kind.as_str()), (400, "urn:muster:problem:not-a-websocket"));
}

#[tokio::test]
async fn without_the_broker_there_is_no_websocket() {
    use tokio::io::{AsyncBufReadExt, BufReader};
    let db = fleet_core::testing::TestDb::new().await;
    let dir = tempfile::tempdir().expect("a directory");
    let mut child = crate::harness::muster()
        .args(["serve", "--roles", "api"])
        .env("MUSTER__DATA_DIR", dir.path())
        .env("MUSTER__DATABASE__URL", sqlx::ConnectOptions::to_url_lossy(&db.options()).as_str())
        .env("MUSTER__HTTP__LISTEN", "127.0.0.1:0")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary is built");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let ready = async {
        loop {
            let line = lines.next_line().await.expect("text").expect("the server is ready before it ends");
            if let Some(url) = line.strip_prefix("ready: ") {
                return url.to_owned();
            }
        }
    };
    let url = timeout(PATIENCE, ready).await.expect("the server is ready in time");
    crate::harness::install_crypto();
    let answer = reqwest::get(format!("{url}/mqtt")).await.expect("an answer");
    assert_eq!(answer.status().as_u16(), 404);
    assert_eq!(answer.headers()["content-type"], "application/problem+json");
    child.kill().await.expect("it runs");
}
