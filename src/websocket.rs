//! MQTT over WebSocket (MQTT 5 §6), on the HTTP port at `/mqtt`.
//!
//! Holds: frames carry bytes and no meaning, so packets may be split over them or joined in one; a frame of text ends
//! the connection (1003), as the standard wants. Who comes in here passes the broker's door like everybody else.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::Router;
use axum::body::Bytes;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{ConnectInfo, State};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use broker::{Door, Transport};
use futures::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What a client must ask for (MQTT 5 §6.0).
const SUBPROTOCOL: &str = "mqtt";
/// Bytes read at once; the library's own buffer would cost each connection 128 KiB.
const READ_BYTES: usize = 4096;
/// A CONNECT may be larger than other packets.
const MIN_MESSAGE_BYTES: usize = 64 * 1024;

/// Where WebSockets lead.
#[derive(Clone)]
struct Mount {
    door: Door,
    max_message_bytes: usize,
}

/// `/mqtt`, to be mounted beside the API.
pub(crate) fn routes(door: Door, max_packet_bytes: u32) -> Router {
    let max_message_bytes = MIN_MESSAGE_BYTES.max(max_packet_bytes as usize);
    Router::new().route("/mqtt", get(upgrade)).with_state(Mount { door, max_message_bytes })
}

async fn upgrade(
    State(mount): State<Mount>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    asked: Result<WebSocketUpgrade, WebSocketUpgradeRejection>,
) -> Response {
    let asked = match asked {
        Ok(asked) => asked.protocols([SUBPROTOCOL]),
        Err(rejection) => return api::refusal(rejection.status().as_u16(), "not-a-websocket", rejection.body_text()),
    };
    if asked.selected_protocol().is_none() {
        let detail = "expected the subprotocol mqtt: Sec-WebSocket-Protocol: mqtt";
        return api::refusal(400, "no-mqtt-subprotocol", detail);
    }
    asked
        .read_buffer_size(READ_BYTES)
        .max_message_size(mount.max_message_bytes)
        .max_frame_size(mount.max_message_bytes)
        .on_failed_upgrade(move |error| tracing::debug!(%peer, %error, "no WebSocket"))
        .on_upgrade(async move |socket| mount.door.serve(Frames::new(socket), peer, Transport::WebSocket).await)
        .into_response()
}

/// The bytes in the frames of a WebSocket.
struct Frames {
    socket: WebSocket,
    /// Received and not yet read.
    unread: Bytes,
    reading: Reading,
}

/// What comes of the other side's next frame.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// Bytes.
    Open,
    /// It sent text, and is to be told that this is wrong …
    Refused,
    /// … and was told, as far as the socket took it.
    Told,
}

impl Frames {
    fn new(socket: WebSocket) -> Self {
        Self { socket, unread: Bytes::new(), reading: Reading::Open }
    }

    /// Closes with 1003 and ends the reading.
    fn poll_refuse(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.reading == Reading::Refused {
            ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(io::Error::other)?;
            let reason = Utf8Bytes::from_static("expected binary frames");
            let close = Message::Close(Some(CloseFrame { code: close_code::UNSUPPORTED, reason }));
            Pin::new(&mut self.socket).start_send(close).map_err(io::Error::other)?;
            self.reading = Reading::Told;
        }
        ready!(Pin::new(&mut self.socket).poll_flush(cx)).map_err(io::Error::other)?;
        Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, "a frame of text")))
    }
}

impl AsyncRead for Frames {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if !this.unread.is_empty() {
                let some = this.unread.len().min(into.remaining());
                into.put_slice(&this.unread.split_to(some));
                return Poll::Ready(Ok(()));
            }
            if this.reading != Reading::Open {
                return this.poll_refuse(cx);
            }
            match ready!(Pin::new(&mut this.socket).poll_next(cx)) {
                Some(Ok(Message::Binary(bytes))) => this.unread = bytes,
                // The library answers pings.
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Text(_))) => this.reading = Reading::Refused,
                Some(Ok(Message::Close(_))) | None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(io::Error::other(error))),
            }
        }
    }
}

impl AsyncWrite for Frames {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, from: &[u8]) -> Poll<io::Result<usize>> {
        let socket = &mut self.get_mut().socket;
        ready!(Pin::new(&mut *socket).poll_ready(cx)).map_err(io::Error::other)?;
        let frame = Message::Binary(Bytes::copy_from_slice(from));
        Pin::new(socket).start_send(frame).map_err(io::Error::other)?;
        Poll::Ready(Ok(from.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx).map_err(io::Error::other)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_close(cx).map_err(io::Error::other)
    }
}
