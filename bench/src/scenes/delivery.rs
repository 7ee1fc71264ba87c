//! Messages to many subscribers, and to one of many. QoS 1 on both ways, and never more on their way than no server drops:
//! the next is published when enough have arrived.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::{Figures, Stage, What, cpu};
use crate::frame::{self, Inbox, PAYLOAD_BYTES, Session};
use crate::generator::{Identity, at_once, enter, subscribe};
use crate::server::{EMAIL, Kind, Server};

const TOPIC: &str = "app/main/bench/news";
const GROUP: &str = "$share/bench/app/main/bench/news";
/// Messages to all subscribers that may be on their way.
const FAN_OUT_WINDOW: u64 = 20;
/// Messages to a group that may be on their way.
const SHARED_WINDOW: u64 = 400;
const WARM_UP: Duration = Duration::from_secs(1);
/// A window that does not move for so long has lost a message.
const STALL: Duration = Duration::from_secs(10);

/// One publisher, many subscribers.
pub(super) async fn fan_out(stage: &Stage<'_>, kind: Kind) -> anyhow::Result<Figures> {
    let subscribers = stage.plan.subscribers;
    let scene = Delivery { filter: TOPIC, subscribers, copies: subscribers as u64, window: FAN_OUT_WINDOW };
    let (per_s, us) = scene.play(stage, kind).await?;
    Ok(vec![(What::FanOut, per_s), (What::FanOutCpu, us)])
}

/// One publisher, one group.
pub(super) async fn shared(stage: &Stage<'_>, kind: Kind) -> anyhow::Result<Figures> {
    let scene = Delivery { filter: GROUP, subscribers: stage.plan.consumers, copies: 1, window: SHARED_WINDOW };
    let (per_s, us) = scene.play(stage, kind).await?;
    Ok(vec![(What::Shared, per_s), (What::SharedCpu, us)])
}

struct Delivery {
    filter: &'static str,
    subscribers: usize,
    /// Deliveries of one message.
    copies: u64,
    window: u64,
}

/// Messages that have arrived.
#[derive(Default)]
struct Arrived {
    count: AtomicU64,
    more: Notify,
}

impl Delivery {
    /// Deliveries a second, and processor time of one in µs.
    async fn play(&self, stage: &Stage<'_>, kind: Kind) -> anyhow::Result<(f64, f64)> {
        let server = stage.start(kind).await?;
        let who = application(&server).await?;
        let arrived = Arc::new(Arrived::default());
        let mut tasks = JoinSet::new();
        let members = (0..self.subscribers).map(|index| who(&format!("subscriber-{index}"))).collect::<Vec<_>>();
        let sockets = at_once(members.iter(), |member| self.join(server.mqtt, member)).await;
        ensure!(sockets.len() == self.subscribers, "{} of {} subscribers came in", sockets.len(), self.subscribers);
        for socket in sockets {
            tasks.spawn(read(socket, arrived.clone()));
        }
        let publisher = enter(server.mqtt, &who("publisher"), Session::Clean).await?;
        tasks.spawn(publish(publisher, arrived.clone(), self.copies, self.window));
        let measured = self.measure(stage, &server, &arrived);
        let figures = tokio::select! {
            figures = measured => figures,
            Some(ended) = tasks.join_next() => {
                ended??;
                anyhow::bail!("a client ended")
            }
        };
        tasks.abort_all();
        server.stop().await?;
        Ok(figures)
    }

    async fn join(&self, server: SocketAddr, member: &Identity) -> io::Result<TcpStream> {
        let mut socket = enter(server, member, Session::Clean).await?;
        subscribe(&mut socket, self.filter).await?;
        Ok(socket)
    }

    async fn measure(&self, stage: &Stage<'_>, server: &Server, arrived: &Arrived) -> (f64, f64) {
        sleep(WARM_UP).await;
        let (at, spent, count) = (Instant::now(), cpu(server), arrived.count.load(Ordering::Relaxed));
        sleep(stage.plan.lasts).await;
        let took = at.elapsed();
        let (spent, count) = (cpu(server).saturating_sub(spent), arrived.count.load(Ordering::Relaxed) - count);
        (count as f64 / took.as_secs_f64(), spent.as_secs_f64() * 1e6 / (count as f64).max(1.0))
    }
}

/// Takes and acknowledges until it is aborted.
async fn read(mut socket: TcpStream, arrived: Arc<Arrived>) -> io::Result<()> {
    let (mut inbox, mut acks, mut buffer) = (Inbox::default(), Vec::new(), vec![0; 16 * 1024]);
    loop {
        let length = socket.read(&mut buffer).await?;
        if length == 0 {
            return Err(io::Error::other("a subscriber was disconnected"));
        }
        acks.clear();
        let messages = inbox.take(&buffer[..length], &mut acks);
        socket.write_all(&acks).await?;
        arrived.count.fetch_add(messages as u64, Ordering::Relaxed);
        arrived.more.notify_one();
    }
}

/// Publishes whenever few enough are on their way; what it is answered is read and forgotten.
async fn publish(socket: TcpStream, arrived: Arc<Arrived>, copies: u64, window: u64) -> io::Result<()> {
    let (mut answers, mut out) = socket.into_split();
    let forget = async {
        let mut buffer = [0; 4096];
        while answers.read(&mut buffer).await? > 0 {}
        Err(io::Error::other("the publisher was disconnected"))
    };
    let send = async {
        let payload = [b'x'; PAYLOAD_BYTES];
        let (mut sent, mut frames) = (0_u64, Vec::new());
        loop {
            frames.clear();
            while sent < arrived.count.load(Ordering::Relaxed) / copies + window {
                let id = u16::try_from(sent % 60_000 + 1).expect("at most 60,000");
                frames.extend(frame::publish(TOPIC, id, &payload));
                sent += 1;
            }
            if frames.is_empty() {
                let moved = timeout(STALL, arrived.more.notified()).await;
                moved.map_err(|_| io::Error::other("messages were lost: the window does not move"))?;
            } else {
                out.write_all(&frames).await?;
            }
        }
    };
    tokio::select! { ended = forget => ended, ended = send => ended }
}

/// Makes identities that may use the topics of applications.
async fn application(server: &Server) -> anyhow::Result<impl Fn(&str) -> Identity + use<>> {
    let (username, password) = match &server.url {
        Some(url) => (EMAIL.to_owned(), log_in(url).await?),
        None => ("anybody".to_owned(), "x".to_owned()),
    };
    Ok(move |id: &str| Identity { id: id.to_owned(), username: username.clone(), password: password.clone() })
}

/// An access token, which stands for the password in MQTT.
async fn log_in(url: &str) -> anyhow::Result<String> {
    let body = serde_json::json!({ "email": EMAIL, "password": crate::server::PASSWORD }).to_string();
    let request = reqwest::Client::new().post(format!("{url}/api/v1/auth/login"));
    let answer = request.header("content-type", "application/json").body(body).send().await?.text().await?;
    let answer: serde_json::Value = serde_json::from_str(&answer)?;
    answer["access_token"].as_str().map(str::to_owned).context("no access token")
}
