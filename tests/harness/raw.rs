//! A client of bytes: says exactly what a test wants said, and tells exactly what the server answers.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::{Device, Fleet, PATIENCE};

use Answer::{Ack, Closed, ConnAck, Disconnect, Pong, SubAck, UnsubAck};
use Version::V5;

/// Bytes being written.
#[derive(Clone, Default)]
pub(crate) struct Bytes(Vec<u8>);

impl Bytes {
    pub(crate) fn u8(mut self, value: u8) -> Self {
        self.0.push(value);
        self
    }

    pub(crate) fn u16(mut self, value: u16) -> Self {
        self.0.extend(value.to_be_bytes());
        self
    }

    pub(crate) fn put(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub(crate) fn text(self, text: impl AsRef<[u8]>) -> Self {
        let text = text.as_ref();
        self.u16(u16::try_from(text.len()).expect("short")).put(text)
    }

    /// The packet of this kind and these flags with what was written as its body.
    pub(crate) fn packet(self, first: u8) -> Vec<u8> {
        let mut packet = vec![first];
        let mut length = self.0.len();
        while length > 127 {
            packet.push(u8::try_from(length % 128).expect("seven bits") | 0x80);
            length /= 128;
        }
        packet.push(u8::try_from(length).expect("seven bits"));
        packet.extend(self.0);
        packet
    }
}

pub(crate) fn bytes() -> Bytes {
    Bytes::default()
}

/// What the server did next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    ConnAck(u8),
    /// First byte, packet id, reason.
    Ack(u8, u16, u8),
    SubAck(Vec<u8>),
    UnsubAck(Vec<u8>),
    Publish(String),
    Pong,
    Disconnect(u8),
    Closed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Version {
    V311,
    V5,
}

/// Everything about a CONNECT that the tests vary.
pub(crate) struct Hello<'a> {
    pub(crate) version: Version,
    pub(crate) client_id: &'a [u8],
    pub(crate) clean: bool,
    pub(crate) keep_alive_s: u16,
    /// Maximum Packet Size (MQTT 5 §3.1.2.11.4).
    pub(crate) max_packet: Option<u32>,
    pub(crate) will: Option<(&'a str, &'a str)>,
}

impl<'a> Hello<'a> {
    pub(crate) fn new(version: Version, client_id: &'a str) -> Self {
        Self { version, client_id: client_id.as_bytes(), clean: true, keep_alive_s: 60, max_packet: None, will: None }
    }

    pub(crate) fn bytes(&self, device: &Device) -> Vec<u8> {
        let v5 = self.version == V5;
        let none = |body: Bytes| if v5 { body.u8(0) } else { body };
        let flags = 0xC0 | u8::from(self.clean) << 1 | if self.will.is_some() { 0x0C } else { 0 };
        let body = bytes().text("MQTT").u8(if v5 { 5 } else { 4 }).u8(flags).u16(self.keep_alive_s);
        let body = match (v5, self.max_packet) {
            (true, Some(bytes)) => body.u8(5).u8(0x27).put(&bytes.to_be_bytes()),
            (true, None) => body.u8(0),
            (false, _) => body,
        };
        let mut body = body.text(self.client_id);
        if let Some((topic, payload)) = self.will {
            body = none(body).text(topic).text(payload);
        }
        body.text(&device.username).text(&device.password).packet(0x10)
    }
}

/// One raw connection, whatever carries it.
pub(crate) struct Raw<S = TcpStream> {
    pub(crate) socket: S,
    pub(crate) version: Version,
}

impl Raw {
    pub(crate) async fn open(fleet: &Fleet) -> Self {
        let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
        Self { socket, version: V5 }
    }

    /// Connects as `device`; the answer is still to be read.
    pub(crate) async fn hello(fleet: &Fleet, device: &Device, hello: Hello<'_>) -> Self {
        let mut raw = Self { version: hello.version, ..Self::open(fleet).await };
        raw.send(&hello.bytes(device)).await;
        raw
    }

    /// Connects as `device` with its own name as client id.
    pub(crate) async fn connected(fleet: &Fleet, device: &Device, version: Version) -> Self {
        let mut raw = Self::hello(fleet, device, Hello::new(version, &device.id)).await;
        assert_eq!(raw.answer().await, ConnAck(0));
        raw
    }

    /// Breaks the connection so that the server sees a reset.
    pub(crate) fn reset(self) {
        self.socket.set_zero_linger().expect("a socket");
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Raw<S> {
    /// Sends; that the server has closed meanwhile is seen when its answer is read.
    pub(crate) async fn send(&mut self, bytes: &[u8]) {
        let _ = timeout(PATIENCE, self.socket.write_all(bytes)).await.expect("the server reads");
    }

    pub(crate) async fn publish(&mut self, first: u8, topic: impl AsRef<[u8]>) {
        let body = bytes().text(topic);
        let body = if first & 0b0110 == 0 { body } else { body.u16(7) };
        let body = if self.version == V5 { body.u8(0) } else { body };
        self.send(&body.put(b"payload").packet(first)).await;
    }

    pub(crate) async fn subscribe(&mut self, filter: &str, options: u8) {
        let body = bytes().u16(1);
        let body = if self.version == V5 { body.u8(0) } else { body };
        self.send(&body.text(filter).u8(options).packet(0x82)).await;
    }

    /// The next packet or the end.
    pub(crate) async fn answer(&mut self) -> Answer {
        match timeout(PATIENCE, self.packet()).await.expect("the server answers or closes") {
            Some((first, body)) => self.understand(first, &body),
            None => Closed,
        }
    }

    pub(crate) async fn packet(&mut self) -> Option<(u8, Vec<u8>)> {
        let first = self.socket.read_u8().await.ok()?;
        let (mut length, mut shift) = (0, 0);
        loop {
            let byte = self.socket.read_u8().await.ok()?;
            length |= usize::from(byte & 0x7F) << shift;
            shift += 7;
            if byte & 0x80 == 0 {
                break;
            }
        }
        let mut body = vec![0; length];
        self.socket.read_exact(&mut body).await.ok()?;
        Some((first, body))
    }

    pub(crate) fn understand(&self, first: u8, body: &[u8]) -> Answer {
        let id = || u16::from_be_bytes([body[0], body[1]]);
        // Blocks of properties in these answers are shorter than 128 bytes.
        let codes = || if self.version == V5 { body[3 + usize::from(body[2])..].to_vec() } else { body[2..].to_vec() };
        match first {
            0x20 => ConnAck(body[1]),
            0x40 | 0x50 | 0x62 | 0x70 => Ack(first, id(), body.get(2).copied().unwrap_or(0)),
            0x90 => SubAck(codes()),
            0xB0 => UnsubAck(codes()),
            0x30..=0x3F => {
                let end = 2 + usize::from(id());
                Answer::Publish(String::from_utf8(body[2..end].to_vec()).expect("a topic is text"))
            }
            0xD0 => Pong,
            0xE0 => Disconnect(body.first().copied().unwrap_or(0)),
            other => panic!("the server sent {other:#x}"),
        }
    }

    /// The connection ends: with a DISCONNECT for this reason where there is one (MQTT 5), without a word else.
    pub(crate) async fn ends_with(mut self, reason: u8, rule: &str) {
        if self.version == V5 {
            assert_eq!(self.answer().await, Disconnect(reason), "{rule}");
        }
        assert_eq!(self.answer().await, Closed, "{rule} ({:?})", self.version);
    }

    /// The connection is alive.
    pub(crate) async fn pings(&mut self, after: &str) {
        self.send(&[0xC0, 0]).await;
        assert_eq!(self.answer().await, Pong, "{after}");
    }
}
