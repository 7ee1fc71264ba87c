//! The way in: accepts, admits, and hands each client to a task of its own.
//!
//! Every client comes in through one [`Door`], whatever carried it: sockets by [`accept`], WebSockets by
//! [`Door::serve`].
//! Holds: a handshake never delays the next accept; nobody comes in past `admission.rs`.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket};

use crate::admission::{Handshake, Place};
use crate::{Shared, StartError};
use crate::{connection, handshake};

/// What carries a client's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A plain socket.
    Tcp,
    /// TLS over a socket.
    Tls,
    /// WebSocket, on the HTTP port.
    WebSocket,
}

impl Transport {
    /// The word used in logs and answers.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::WebSocket => "websocket",
        }
    }
}

/// What is known of a client before its first byte.
#[derive(Debug)]
pub(crate) struct Arrival {
    /// Counts the connections of this broker; no two have the same.
    pub(crate) number: u64,
    /// Where it comes from.
    pub(crate) peer: SocketAddr,
    /// What carries it.
    pub(crate) transport: Transport,
    /// The certificate it proved to hold the key of, in DER, with the chain it sent; gone once it was looked at.
    pub(crate) certificate: Option<Box<[Vec<u8>]>>,
    /// Its place among the handshakes under way, until it is over.
    pub(crate) handshake: Option<Handshake>,
}

/// Sockets the kernel holds for us in a storm.
const BACKLOG: u32 = 4096;
/// Pause after the system ran out of something, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(crate) fn bind(address: SocketAddr) -> Result<TcpListener, StartError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        socket.listen(BACKLOG)
    };
    listen().map_err(|error| StartError::Listen { address, error })
}

/// The one way in: who comes here is counted, and served or refused.
pub(crate) struct Entrance {
    shared: Arc<Shared>,
    arrivals: AtomicU64,
}

impl Entrance {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, arrivals: AtomicU64::new(0) }
    }

    fn arrival(&self, peer: SocketAddr, transport: Transport) -> Arrival {
        let number = self.arrivals.fetch_add(1, Ordering::Relaxed) + 1;
        Arrival { number, peer, transport, certificate: None, handshake: None }
    }
}

/// Lets clients in that another part of the process has accepted.
#[derive(Clone)]
pub struct Door(Weak<Entrance>);

impl Door {
    pub(crate) fn of(entrance: &Arc<Entrance>) -> Self {
        Self(Arc::downgrade(entrance))
    }

    /// Serves one client to its end, by the same rules as one from the broker's own listeners; a broker that has stopped
    /// closes at once.
    pub async fn serve<S>(&self, socket: S, peer: SocketAddr, transport: Transport)
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Some(entrance) = self.0.upgrade() else { return };
        let Some(place) = entrance.shared.admission.place(peer.ip()) else { return };
        let (arrival, shared) = (entrance.arrival(peer, transport), entrance.shared.clone());
        // A stop must not wait for whoever is inside.
        drop(entrance);
        serve(shared, place, socket, arrival).await;
    }
}

/// Accepts until it is dropped.
pub(crate) async fn accept(listener: TcpListener, entrance: Arc<Entrance>) {
    loop {
        let (socket, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                pause_after(&error).await;
                continue;
            }
        };
        // Acknowledgements are small and must not wait for more to send.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%peer, %error, "the connection ended before it began");
            continue;
        }
        let arrival = entrance.arrival(peer, Transport::Tcp);
        if let Some(place) = entrance.shared.admission.place(peer.ip()) {
            tokio::spawn(serve(entrance.shared.clone(), place, socket, arrival));
        }
    }
}

async fn serve<S: AsyncRead + AsyncWrite + Unpin>(shared: Arc<Shared>, place: Place, socket: S, mut arrival: Arrival) {
    match place {
        Place::Inside(_place, handshake) => {
            arrival.handshake = Some(handshake);
            connection::serve(shared, socket, arrival).await;
        }
        Place::Refusal(_place, refusal) => Box::pin(handshake::refuse(&shared, socket, &arrival, refusal)).await,
    }
}

async fn pause_after(error: &io::Error) {
    let passing = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset, io::ErrorKind::Interrupted];
    if !passing.contains(&error.kind()) {
        tracing::error!(%error, "cannot accept connections");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}
