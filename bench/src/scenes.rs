//! What a broker costs besides readings: connections, sessions that wait, deliveries to many, handshakes; Muster beside
//! mosquitto, in alternating rounds.
//!
//! Both as shipped. Muster authenticates every CONNECT against its database; mosquitto lets anybody in.

mod delivery;
mod handshakes;
mod waiting;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use tokio::time::sleep;

use crate::broker::identities;
use crate::generator::Identity;
use crate::process;
use crate::server::{Certificate, Extra, Kind, Server};

/// The servers that are compared.
pub(crate) const KINDS: [Kind; 2] = [Kind::Muster, Kind::Mosquitto];
/// What is idle settles before memory is read.
const SETTLE: Duration = Duration::from_secs(2);
/// Muster takes so many as it is shipped.
const SHIPPED_CONNECTIONS: usize = 14_000;

/// What to measure.
pub(crate) struct Plan {
    pub(crate) muster: PathBuf,
    pub(crate) scenes: Vec<Scene>,
    /// Of a ramp, and idle.
    pub(crate) connections: usize,
    /// Of one topic.
    pub(crate) subscribers: usize,
    /// Of one shared subscription.
    pub(crate) consumers: usize,
    pub(crate) rounds: usize,
    /// Of what is counted by the second.
    pub(crate) lasts: Duration,
}

/// What is played with a server of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scene {
    /// Many connect and are idle.
    Idle,
    /// Sessions that are kept wait, with their clients and without.
    Kept,
    /// One message for many.
    FanOut,
    /// Messages for one of many.
    Shared,
    /// Connections with TLS.
    Handshakes,
}

/// All of them, by their names on the command line.
pub(crate) const SCENES: [(&str, Scene); 5] = [
    ("idle", Scene::Idle),
    ("kept", Scene::Kept),
    ("fan-out", Scene::FanOut),
    ("shared", Scene::Shared),
    ("handshakes", Scene::Handshakes),
];

/// One figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum What {
    Ramp,
    RampCpu,
    RampPostgres,
    Connection,
    Subscribed,
    Failed,
    Kept,
    Away,
    Restored,
    FanOut,
    FanOutCpu,
    Shared,
    SharedCpu,
    Handshakes,
    HandshakeCpu,
}

impl What {
    /// In the order of the table.
    pub(crate) const ALL: [Self; 15] = [
        Self::Ramp,
        Self::RampCpu,
        Self::RampPostgres,
        Self::Failed,
        Self::Connection,
        Self::Subscribed,
        Self::Kept,
        Self::Away,
        Self::Restored,
        Self::FanOut,
        Self::FanOutCpu,
        Self::Shared,
        Self::SharedCpu,
        Self::Handshakes,
        Self::HandshakeCpu,
    ];

    /// As it stands in the table.
    pub(crate) fn text(self, plan: &Shape) -> String {
        let Shape { connections, subscribers, consumers } = plan;
        match self {
            Self::Ramp => format!("ramp of {connections} connections, s"),
            Self::RampCpu => "its processor time, µs a connection".into(),
            Self::RampPostgres => "of this in PostgreSQL".into(),
            Self::Failed => format!("of these not let in, of {connections}"),
            Self::Connection => "memory of an idle clean connection, KiB".into(),
            Self::Subscribed => "the same with one subscription, KiB".into(),
            Self::Kept => "memory of a kept session with one subscription, connected, KiB".into(),
            Self::Away => "the same, its client gone, KiB".into(),
            Self::Restored => "the same after a restart of the server, KiB".into(),
            Self::FanOut => format!("fan-out 1 → {subscribers}, QoS 1, deliveries/s"),
            Self::FanOutCpu => "its processor time, µs a delivery".into(),
            Self::Shared => format!("shared subscription, 1 group of {consumers}, QoS 1, messages/s"),
            Self::SharedCpu => "its processor time, µs a message".into(),
            Self::Handshakes => "TLS 1.3 handshakes with CONNECT, full, a second".into(),
            Self::HandshakeCpu => "its processor time, µs a handshake".into(),
        }
    }
}

/// The numbers in the names of figures.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Shape {
    pub(crate) connections: usize,
    pub(crate) subscribers: usize,
    pub(crate) consumers: usize,
}

/// One figure of one server in one round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sample {
    pub(crate) kind: Kind,
    pub(crate) what: What,
    pub(crate) value: f64,
}

/// All samples, in the order they were taken, and the numbers behind them.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) shape: Shape,
    pub(crate) samples: Vec<Sample>,
}

/// Plays all scenes with all servers.
pub(crate) async fn run(plan: &Plan, dir: &Path) -> anyhow::Result<Found> {
    let stage = Stage {
        plan,
        dir,
        identities: identities(&plan.muster, &KINDS, dir, plan.connections).await?,
        certificate: Certificate::make(&plan.muster, dir).await?,
    };
    let mut samples = Vec::new();
    for round in 1..=plan.rounds {
        for &scene in &plan.scenes {
            for kind in KINDS {
                let figures = stage.play(scene, kind).await;
                let figures = figures.with_context(|| format!("{scene:?} with {kind:?}, round {round}"))?;
                let said: Vec<_> = figures.iter().map(|(what, value)| format!("{what:?} {value:.2}")).collect();
                eprintln!("{:<20} round {round}: {}", kind.name(), said.join(", "));
                samples.extend(figures.into_iter().map(|(what, value)| Sample { kind, what, value }));
            }
        }
    }
    let Plan { connections, subscribers, consumers, .. } = *plan;
    Ok(Found { shape: Shape { connections, subscribers, consumers }, samples })
}

/// Figures of one scene.
type Figures = Vec<(What, f64)>;

/// What the scenes share.
struct Stage<'a> {
    plan: &'a Plan,
    dir: &'a Path,
    identities: Vec<Identity>,
    certificate: Certificate,
}

impl Stage<'_> {
    async fn play(&self, scene: Scene, kind: Kind) -> anyhow::Result<Figures> {
        match scene {
            Scene::Idle => waiting::idle(self, kind).await,
            Scene::Kept => waiting::kept(self, kind).await,
            Scene::FanOut => delivery::fan_out(self, kind).await,
            Scene::Shared => delivery::shared(self, kind).await,
            Scene::Handshakes => handshakes::handshakes(self, kind).await,
        }
    }

    async fn start(&self, kind: Kind) -> anyhow::Result<Server> {
        let connections = Some(self.plan.connections + 1_000).filter(|_| self.plan.connections > SHIPPED_CONNECTIONS);
        Server::start_with(kind, self.dir, &self.plan.muster, &Extra { tls: None, connections }).await
    }

    async fn start_with_tls(&self, kind: Kind) -> anyhow::Result<Server> {
        let extra = Extra { tls: Some(self.certificate.clone()), connections: None };
        Server::start_with(kind, self.dir, &self.plan.muster, &extra).await
    }
}

/// Grown memory of a server in KiB for each of so many, once it has settled.
async fn grown_kib(server: &Server, before: u64, of: usize) -> f64 {
    sleep(SETTLE).await;
    process::rss(server.pid).saturating_sub(before) as f64 / 1024.0 / of.max(1) as f64
}

/// Processor time of a server with its PostgreSQL.
fn cpu(server: &Server) -> Duration {
    let (broker, postgres) = server.cpu();
    broker + postgres
}
