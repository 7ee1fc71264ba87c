//! The way in: accepts, admits, and hands each client to a task of its own.
//!
//! Every client comes in through one [`Door`], whatever carried it: sockets by [`accept`], WebSockets by
//! [`Door::serve`].
//! Holds: a handshake, of TLS too, never delays the next accept; nobody comes in past `admission.rs`.

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::Instant;

use crate::admission::{Handshake, Place};
use crate::connection::Client;
use crate::metrics::Limit;
use crate::proxy;
use crate::stream::Socket;
use crate::tls::{Chain, Tls};
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

impl From<Transport> for fleet_core::control::Transport {
    fn from(transport: Transport) -> Self {
        match transport {
            Transport::Tcp => Self::Tcp,
            Transport::Tls => Self::Tls,
            Transport::WebSocket => Self::WebSocket,
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
    /// Its CONNECT must be here by then.
    pub(crate) due: Instant,
    /// The certificate it proved to hold the key of, with the chain it sent; gone once it was looked at.
    pub(crate) certificate: Option<Chain>,
    /// Its place among the handshakes under way, until it is over.
    pub(crate) handshake: Option<Handshake>,
}

/// Sockets the kernel holds for us in a storm.
const BACKLOG: u32 = 4096;
/// Questions without an answer, after which the other end is gone.
const PROBES: u32 = 3;
/// Pause after the system ran out of something, so that the loop does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub(crate) fn bind(
    setting: &'static str,
    address: SocketAddr,
    tcp_keepalive_s: u32,
) -> Result<(TcpListener, SocketAddr), StartError> {
    let listen = || {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_reuseaddr(true)?;
        socket.bind(address)?;
        let listener = socket.listen(BACKLOG)?;
        notice_the_dead(&listener, tcp_keepalive_s)?;
        let address = listener.local_addr()?;
        io::Result::Ok((listener, address))
    };
    listen().map_err(|error| StartError::Listen { setting, address, error })
}

/// Has the kernel ask who has been silent for so long whether it is still there, and break the connection when nothing
/// comes back in as long again; 0: never. Else a client whose machine lost its power would stay for ever, when it has no
/// keep alive of its own. The sockets that a listener accepts inherit it.
///
/// # Errors
/// When the system refuses.
pub fn notice_the_dead(listener: &TcpListener, silent_s: u32) -> io::Result<()> {
    if silent_s == 0 {
        return Ok(());
    }
    let silent = Duration::from_secs(u64::from(silent_s));
    let pause = (silent / PROBES).max(Duration::from_secs(1));
    let asking = TcpKeepalive::new().with_time(silent).with_interval(pause).with_retries(PROBES);
    let socket = SockRef::from(listener);
    socket.set_tcp_keepalive(&asking)?;
    // While something is unacknowledged, the kernel does not ask but sends that again.
    socket.set_tcp_user_timeout(Some(silent * 2))
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

    /// A place for whoever comes, inside or to be refused; `None` when it is not even told.
    fn meet(&self, peer: SocketAddr, transport: Transport) -> Option<(Place, Arrival)> {
        // A proxy has yet to say whose connection this is; it does not answer for those who guess behind it.
        let is_announced = self.shared.settings.proxy_protocol && transport != Transport::WebSocket;
        let place = self.shared.admission.place((!is_announced).then_some(peer.ip()))?;
        let number = self.arrivals.fetch_add(1, Ordering::Relaxed) + 1;
        let within = match place {
            Place::Inside(..) => Duration::from_millis(self.shared.settings.connect_timeout_ms),
            Place::Refusal(..) => handshake::REFUSE_WITHIN,
        };
        let due = Instant::now() + within;
        Some((place, Arrival { number, peer, transport, due, certificate: None, handshake: None }))
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
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let Some(entrance) = self.0.upgrade() else { return };
        let Some((place, arrival)) = entrance.meet(peer, transport) else { return };
        let shared = entrance.shared.clone();
        // A stop must not wait for whoever is inside.
        drop(entrance);
        live(admit(shared, place, Socket::boxed(socket), arrival)).await;
    }
}

/// Accepts until it is dropped; with `tls`, whoever comes must speak it.
pub(crate) async fn accept(listener: TcpListener, entrance: Arc<Entrance>, tls: Option<Arc<Tls>>) {
    let transport = if tls.is_some() { Transport::Tls } else { Transport::Tcp };
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
        if let Some((place, arrival)) = entrance.meet(peer, transport) {
            tokio::spawn(live(receive(entrance.shared.clone(), place, socket, arrival, tls.clone())));
        }
    }
}

/// Lets a client live once it is in. What it needs until then is given back: an idle connection must stay small.
fn live(coming: impl Future<Output = Option<Client>>) -> impl Future<Output = ()> {
    let coming = Box::pin(coming);
    async {
        if let Some(client) = coming.await {
            client.live().await;
        }
    }
}

/// Goes through what comes before the first packet, in the connection's own task.
async fn receive(
    shared: Arc<Shared>,
    place: Place,
    mut socket: TcpStream,
    mut arrival: Arrival,
    tls: Option<Arc<Tls>>,
) -> Option<Client> {
    if shared.settings.proxy_protocol && !is_announced(&shared, &mut socket, &mut arrival).await {
        return None;
    }
    let socket = match tls {
        None => Socket::Tcp(socket),
        Some(tls) => {
            let (socket, chain) = tls.handshake(socket, arrival.due).await?;
            arrival.certificate = chain;
            socket
        }
    };
    admit(shared, place, socket, arrival).await
}

/// Lets a proxy say whose connection this is; `false` when it ends here.
async fn is_announced(shared: &Shared, socket: &mut TcpStream, arrival: &mut Arrival) -> bool {
    let told = if proxy::is_trusted(&shared.settings.proxy_trusted, arrival.peer) {
        proxy::read(socket, arrival.due).await
    } else {
        Err(proxy::Bad::Untrusted)
    };
    match told {
        Ok(peer) => arrival.peer = peer.unwrap_or(arrival.peer),
        Err(proxy::Bad::Untrusted) => shared.metrics.early_ends.with_label_values(&["proxy untrusted"]).inc(),
        Err(proxy::Bad::Header) => shared.metrics.early_ends.with_label_values(&["proxy header"]).inc(),
        Err(proxy::Bad::Late) => shared.metrics.hit(Limit::ConnectTimeout),
    }
    if let Err(bad) = told {
        tracing::debug!(peer = %arrival.peer, ?bad, "a connection was not announced as it must be");
    }
    told.is_ok()
}

async fn admit(shared: Arc<Shared>, place: Place, socket: Socket, mut arrival: Arrival) -> Option<Client> {
    match place {
        Place::Inside(place, handshake) => {
            arrival.handshake = Some(handshake);
            connection::admit(shared, socket, arrival, place).await
        }
        Place::Refusal(_place, refusal) => {
            handshake::refuse(&shared, socket, &arrival, refusal).await;
            None
        }
    }
}

async fn pause_after(error: &io::Error) {
    let passing = [io::ErrorKind::ConnectionAborted, io::ErrorKind::ConnectionReset, io::ErrorKind::Interrupted];
    if !passing.contains(&error.kind()) {
        tracing::error!(%error, "cannot accept connections");
        tokio::time::sleep(ACCEPT_PAUSE).await;
    }
}
