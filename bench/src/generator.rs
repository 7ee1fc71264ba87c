//! The load: the same for every server, one task a connection, raw sockets.
//!
//! *Closed*: every client keeps [`WINDOW`] publishes unacknowledged, so the server's pace is found. *Open*: publishes
//! leave on a schedule whatever the server does, and an acknowledgement is timed from the scheduled moment, so a stall
//! is not hidden by the generator waiting for it.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use device_sim::latency::Latency;
use futures::{StreamExt as _, stream};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{sleep_until, timeout};

use crate::frame::{self, Incoming, Publish, Session};

/// Unacknowledged publishes of a client in the closed loop.
pub(crate) const WINDOW: usize = 5;
/// Unacknowledged publishes of a client in the open loop; what is due beyond it is counted, not sent.
const OPEN_WINDOW: usize = 90;
/// Clients that connect at once: the backlog of a listener is 100 in mosquitto.
const CONNECTING: usize = 64;
const ATTEMPTS: usize = 3;
/// TCP, CONNACK and SUBACK of one client.
const CONNECT_WITHIN: Duration = Duration::from_secs(20);
/// After the end of a load its acknowledgements may take so long.
const DRAIN: Duration = Duration::from_secs(3);

/// Who connects.
#[derive(Clone)]
pub(crate) struct Identity {
    pub(crate) id: String,
    pub(crate) username: String,
    pub(crate) password: String,
}

/// A connected and subscribed client.
pub(crate) struct Client {
    socket: TcpStream,
    publish: Publish,
    incoming: Incoming,
    out: Vec<u8>,
}

/// How connecting went.
pub(crate) struct Ramp {
    pub(crate) clients: Vec<Client>,
    pub(crate) failed: usize,
    pub(crate) took: Duration,
}

/// Connects every identity and subscribes it to its own commands.
pub(crate) async fn connect(server: SocketAddr, identities: &[Identity]) -> Ramp {
    let started = Instant::now();
    let all = identities.iter().enumerate();
    let clients = at_once(all, |(index, identity)| Client::connect(server, index, identity)).await;
    Ramp { failed: identities.len() - clients.len(), clients, took: started.elapsed() }
}

/// Does something for each of many, some at once; what fails is tried again, and left out in the end.
pub(crate) async fn at_once<I: Clone, T, F>(all: impl Iterator<Item = I>, each: impl Fn(I) -> F) -> Vec<T>
where
    F: Future<Output = io::Result<T>>,
{
    let each = &each;
    let attempts = stream::iter(all).map(|one| async move {
        for _ in 0..ATTEMPTS {
            if let Ok(Ok(done)) = timeout(CONNECT_WITHIN, each(one.clone())).await {
                return Some(done);
            }
        }
        None
    });
    attempts.buffer_unordered(CONNECTING).filter_map(async |done| done).collect().await
}

/// Connects, and is answered that all is well.
pub(crate) async fn enter(server: SocketAddr, identity: &Identity, session: Session) -> io::Result<TcpStream> {
    let mut socket = TcpStream::connect(server).await?;
    socket.set_nodelay(true)?;
    welcome(&mut socket, identity, session).await?;
    Ok(socket)
}

/// The same on a connection that is there, of any kind.
pub(crate) async fn welcome<S>(socket: &mut S, identity: &Identity, session: Session) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    socket.write_all(&frame::connect(session, &identity.id, &identity.username, &identity.password)).await?;
    socket.flush().await?;
    expect(socket, &[0x20, 2, 0, 0]).await
}

/// Subscribes to one filter at quality of service 1.
pub(crate) async fn subscribe(socket: &mut TcpStream, filter: &str) -> io::Result<()> {
    socket.write_all(&frame::subscribe(filter)).await?;
    expect(socket, &[0x90, 3, 0, 1, 1]).await
}

impl Identity {
    /// What a device is sent.
    pub(crate) fn commands(&self) -> String {
        format!("fleet/v1/main/{}/commands/+/request", self.id)
    }
}

impl Client {
    async fn connect(server: SocketAddr, index: usize, identity: &Identity) -> io::Result<Self> {
        let mut socket = enter(server, identity, Session::Clean).await?;
        subscribe(&mut socket, &identity.commands()).await?;
        let publish = Publish::new(&format!("fleet/v1/main/{}/telemetry", identity.id), index);
        Ok(Self { socket, publish, incoming: Incoming::default(), out: Vec::new() })
    }

    async fn send(&mut self, count: usize) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_ms = u64::try_from(now.as_millis()).unwrap_or_default();
        self.out.clear();
        for _ in 0..count {
            self.publish.append(&mut self.out, now_ms);
        }
        self.socket.write_all(&self.out).await
    }

    /// Waits for bytes; how many acknowledgements they end.
    async fn acknowledgements(&mut self) -> io::Result<usize> {
        let mut buffer = [0; 512];
        loop {
            self.socket.readable().await?;
            match self.socket.try_read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => return Ok(self.incoming.pubacks(&buffer[..length])),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
    }
}

async fn expect(socket: &mut (impl AsyncRead + Unpin), answer: &[u8]) -> io::Result<()> {
    use tokio::io::AsyncReadExt as _;
    let mut found = vec![0; answer.len()];
    socket.read_exact(&mut found).await?;
    if found == answer { Ok(()) } else { Err(io::Error::other(format!("expected {answer:?}, found {found:?}"))) }
}

/// A load that goes on until it is stopped.
pub(crate) struct Load {
    tasks: JoinSet<io::Result<Client>>,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    latency: Arc<Latency>,
    overrun: Arc<AtomicU64>,
}

impl Load {
    /// Every client sends as fast as acknowledgements allow.
    pub(crate) fn closed(clients: Vec<Client>) -> Self {
        let mut load = Self::new();
        for client in clients {
            load.tasks.spawn(press(client, load.stop.clone(), load.acknowledged.clone()));
        }
        load
    }

    /// All clients together send `rate` publishes a second, evenly spread.
    pub(crate) fn open(clients: Vec<Client>, rate: f64) -> Self {
        let mut load = Self::new();
        let start = tokio::time::Instant::now() + Duration::from_millis(100);
        let interval = Duration::from_secs_f64(clients.len() as f64 / rate);
        for (index, client) in clients.into_iter().enumerate() {
            let first = start + Duration::from_secs_f64(index as f64 / rate);
            let pace = Pace { next: first, interval, latency: load.latency.clone(), overrun: load.overrun.clone() };
            load.tasks.spawn(drip(client, pace, load.stop.clone(), load.acknowledged.clone()));
        }
        load
    }

    fn new() -> Self {
        Self {
            tasks: JoinSet::new(),
            stop: Arc::default(),
            acknowledged: Arc::default(),
            latency: Arc::default(),
            overrun: Arc::default(),
        }
    }

    /// Publishes acknowledged so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// From the scheduled sending to the acknowledgement; only the open loop fills it.
    pub(crate) fn latency(&self) -> &Arc<Latency> {
        &self.latency
    }

    /// Publishes that were due while a client had too many on their way.
    pub(crate) fn overrun(&self) -> u64 {
        self.overrun.load(Ordering::Relaxed)
    }

    /// Ends the load; clients whose acknowledgements do not come, or whose connection broke, are lost.
    pub(crate) async fn stop(mut self) -> Vec<Client> {
        self.stop.store(true, Ordering::Relaxed);
        let mut clients = Vec::new();
        let all = async {
            while let Some(ended) = self.tasks.join_next().await {
                clients.extend(ended.ok().and_then(Result::ok));
            }
        };
        let _lost = timeout(DRAIN, all).await;
        clients
    }
}

async fn press(mut client: Client, stop: Arc<AtomicBool>, acknowledged: Arc<AtomicU64>) -> io::Result<Client> {
    let mut flying = 0;
    loop {
        if !stop.load(Ordering::Relaxed) && flying < WINDOW {
            client.send(WINDOW - flying).await?;
            flying = WINDOW;
        }
        if flying == 0 {
            return Ok(client);
        }
        let acks = client.acknowledgements().await?;
        flying = flying.saturating_sub(acks);
        acknowledged.fetch_add(acks as u64, Ordering::Relaxed);
    }
}

struct Pace {
    next: tokio::time::Instant,
    interval: Duration,
    latency: Arc<Latency>,
    overrun: Arc<AtomicU64>,
}

async fn drip(
    mut client: Client,
    mut pace: Pace,
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
) -> io::Result<Client> {
    let mut flying = VecDeque::new();
    loop {
        let stopped = stop.load(Ordering::Relaxed);
        if stopped && flying.is_empty() {
            return Ok(client);
        }
        tokio::select! {
            acks = client.acknowledgements(), if !flying.is_empty() => {
                let acks = acks?;
                for sent in flying.drain(..acks.min(flying.len())) {
                    pace.latency.record(tokio::time::Instant::now().duration_since(sent));
                }
                acknowledged.fetch_add(acks as u64, Ordering::Relaxed);
            }
            () = sleep_until(pace.next), if !stopped => {
                let due = pace.next;
                pace.next += pace.interval;
                if flying.len() >= OPEN_WINDOW {
                    pace.overrun.fetch_add(1, Ordering::Relaxed);
                } else {
                    client.send(1).await?;
                    flying.push_back(due);
                }
            }
        }
    }
}
