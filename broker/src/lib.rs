//! The MQTT door: devices and applications come in here, and what they are told "yes" to is kept.
//!
//! | part | where |
//! |---|---|
//! | accepting connections | [`listener`](self) (`listener.rs`) |
//! | TLS and its files, the PROXY protocol | `tls.rs`, `proxy.rs` |
//! | how many may come in and how fast; who comes too often | `admission.rs`, `guessing.rs`, `flapping.rs` |
//! | from a socket to a known client | `handshake.rs` |
//! | one client: packets in, packets out, its limits | `connection.rs`, over the bytes of `stream.rs` |
//! | what others leave for it, and what it has not acknowledged | `mailbox.rs`, `inflight.rs` |
//! | what outlives a connection | `session.rs`, `will.rs`; kept by `store.rs`, found again by `restore.rs` |
//! | the subscription tree, and retained messages | `router.rs`, `retained.rs` |
//! | who may connect, and on which topics | `access.rs`, many at once by `batch.rs` |
//! | queue → writer → database → acknowledgement | `ingest.rs` |
//! | requests that are answered on a topic | `desk.rs`: `renewal.rs` (certificates), `provisioning.rs` (to come in), `shadows.rs` (what devices are), `responses.rs` (what they did) |
//! | rows that wait for devices, as messages | `dispatch.rs` |
//! | who is connected, and what they are told from outside | `presence.rs` |
//! | changed rights, questions of operators | `control.rs` |
//! | what one client sends and is sent, as text | `trace.rs` |
//! | `$SYS` | `sys.rs` |
//! | connection events on their way to the database | `events.rs` |
//! | the protocol's bytes | [`wire`] |
//!
//! Holds: a PUBACK for `telemetry` or `status` is sent only after COMMIT, in order (ADR 4). No input panics the
//! process, and a slow or hostile client hurts only itself.
//! Ignorant of: HTTP, and of what readings mean.

mod access;
mod admission;
mod batch;
mod connection;
mod control;
mod desk;
mod dispatch;
mod events;
mod flapping;
mod guessing;
mod handshake;
mod identity;
mod inflight;
mod ingest;
mod listener;
mod mailbox;
mod metrics;
mod presence;
mod provisioning;
mod proxy;
mod queue;
mod rate;
mod recent;
mod renewal;
mod responses;
mod restore;
mod retained;
mod router;
mod rows;
mod session;
mod shadows;
mod store;
mod stream;
mod sys;
mod throttle;
mod tls;
mod trace;
mod will;
pub mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use fleet_core::authority::Pki;
use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::directory::Directory;
use fleet_core::token::Keys;
use prometheus::Registry;
use sqlx::PgPool;
use sqlx::postgres::PgConnectOptions;
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::task::AbortOnDropHandle;

pub use ingest::Health;
pub use listener::{Door, Transport, notice_the_dead};
pub use metrics::Metrics;
pub use tls::{BadTls, TlsFiles};

use access::Access;
use admission::Admission;
use control::{Control, Controlling};
use desk::{Desk, Serving};
use dispatch::Dispatch;
use events::Events;
use identity::Certificates;
use ingest::Ingest;
use listener::Entrance;
use presence::Presences;
use provisioning::Provisioning;
use renewal::Renewals;
use responses::Responses;
use retained::Retained;
use router::Router;
use rows::Now;
use session::Sessions;
use shadows::{Keeper, Shadows};
use store::Store;
use tls::Tls;
use trace::Traces;

/// How long a stop waits for clients to be told and for batches to commit.
const STOP_WITHIN: Duration = Duration::from_secs(8);

/// What the broker is made of; everything is handed in, nothing is global.
pub struct Parts {
    /// Settings of the door.
    pub mqtt: config::Mqtt,
    /// Its certificates.
    pub tls: config::Tls,
    /// Where `muster tls init` puts them.
    pub data_dir: PathBuf,
    /// Who is let in, and how fast.
    pub admission: config::Admission,
    /// Settings of the sessions that clients find again.
    pub sessions: config::Sessions,
    /// Settings of the writers.
    pub ingest: config::Ingest,
    /// For credentials; the writers have connections of their own.
    pub db: PgPool,
    /// How the writers connect.
    pub writer_options: PgConnectOptions,
    /// Verifies access tokens.
    pub keys: Arc<Keys>,
    /// Signs certificates that devices ask for.
    pub pki: Pki,
    /// How devices come in.
    pub provisioning: config::Provisioning,
    /// Bounds of what devices are to be, and say they are.
    pub shadow: config::Shadow,
    /// Bounds of what they are to do.
    pub commands: config::Commands,
    /// The time.
    pub clock: Clock,
    /// Where the metrics are registered.
    pub registry: Registry,
}

/// Why the broker could not start, in one line that says what was expected.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The address cannot be listened on.
    #[error("{setting} {address} cannot be used: {error}; expected a free address of this machine")]
    Listen {
        /// The setting that asks for it.
        setting: &'static str,
        /// The address asked for.
        address: SocketAddr,
        /// What the system said.
        error: std::io::Error,
    },
    /// TLS is asked for and its files cannot be used.
    #[error(transparent)]
    Tls(#[from] BadTls),
    /// A metric could not be registered.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// The database refused.
    #[error(transparent)]
    Database(#[from] fleet_core::Error),
}

/// Everything the parts of a running broker share.
struct Shared {
    settings: config::Mqtt,
    session_limits: config::Sessions,
    access: Access,
    directory: Arc<Directory>,
    admission: Arc<Admission>,
    router: Router,
    sessions: Arc<Sessions>,
    store: Store,
    ingest: Ingest,
    renewals: Desk<renewal::By>,
    provisioning: Desk<provisioning::By>,
    shadows: Shadows,
    responses: Desk<Arc<ingest::Sender>>,
    dispatch: Dispatch,
    metrics: Metrics,
    events: Events,
    presences: Presences,
    traces: Traces,
    control: Control,
    clock: Clock,
}

/// The ways in to whoever answers requests on a topic.
struct Desks {
    renewals: Desk<renewal::By>,
    provisioning: Desk<provisioning::By>,
    shadows: Shadows,
    responses: Desk<Arc<ingest::Sender>>,
}

fn open_desks(parts: &Parts, store: &Store, metrics: &Metrics) -> (Desks, Vec<Serving>) {
    let given = || (parts.db.clone(), parts.clock.clone(), metrics.clone());
    let (db, clock, m) = given();
    let (shadows, mut serving) = Keeper { settings: parts.shadow.clone(), db, clock, metrics: m }.open(store);
    let (db, clock, m) = given();
    let renewals = Renewals { pki: parts.pki.clone(), db, clock, metrics: m };
    let room = renewals.room();
    let (renewals, renewing) = desk::open(renewals, &room, store.clone(), metrics.clone());
    let (db, clock, m) = given();
    let provisioning = Provisioning { settings: parts.provisioning.clone(), db, clock, metrics: m };
    let room = provisioning.room();
    let (provisioning, letting_in) = desk::open(provisioning, &room, store.clone(), metrics.clone());
    let (db, clock, m) = given();
    let (responses, taking) = Responses { settings: parts.commands.clone(), db, clock, metrics: m }.open(store);
    serving.extend([renewing, letting_in, taking]);
    (Desks { renewals, provisioning, shadows, responses }, serving)
}

/// A running broker.
pub struct Broker {
    shared: Arc<Shared>,
    entrance: Arc<Entrance>,
    address: SocketAddr,
    tls_address: Option<SocketAddr>,
    accepting: JoinSet<()>,
    keeping_time: JoinHandle<()>,
    _sweeping: AbortOnDropHandle<()>,
    controlling: Controlling,
    /// What the broker tells of itself, unless that is off.
    telling: Option<JoinHandle<()>>,
    writers: ingest::Writers,
    /// What sends news to devices.
    dispatching: JoinHandle<()>,
    desks: Vec<Serving>,
    storing: store::Storing,
    events: events::Writing,
}

impl Broker {
    /// Takes up what an earlier broker has left, starts the writers and listens.
    ///
    /// # Errors
    /// [`StartError`] when the address is taken or the database refuses.
    pub async fn start(parts: Parts) -> Result<Self, StartError> {
        let metrics = Metrics::new(&parts.registry)?;
        let tls = match parts.mqtt.tls_listen {
            Some(_) => Some(Tls::start(&parts.tls, &parts.data_dir, &metrics).await?),
            None => None,
        };
        let silent_s = parts.mqtt.tcp_keepalive_s;
        let (listener, address) = listener::bind("mqtt.listen", parts.mqtt.listen, silent_s)?;
        let tls_listener = parts.mqtt.tls_listen.map(|asked| listener::bind("mqtt.tls_listen", asked, silent_s));
        let tls_listener = tls_listener.transpose()?;
        let now = Now::of(&parts.clock);
        let router = Router::new(metrics.clone());
        let sessions = Arc::new(Sessions::default());
        let retained = Arc::new(Retained::new(parts.mqtt.max_retained, parts.mqtt.max_retained_bytes, metrics.clone()));
        let mut db = parts.db.acquire().await.map_err(fleet_core::Error::from)?;
        restore::retained_messages(&mut db, &retained, now).await?;
        let directory = Arc::new(Directory::default());
        let restored = restore::sessions(&mut db, &sessions, &router, &directory, now).await?;
        drop(db);
        metrics.sessions.set(i64::try_from(restored.len()).unwrap_or(i64::MAX));
        let (events, writing) = Events::start(parts.db.clone(), metrics.clone());
        let (store, storing) = store::start(store::Parts {
            settings: parts.sessions.clone(),
            page: store::Page::of(&parts.mqtt),
            options: parts.writer_options.clone(),
            router: router.clone(),
            sessions: sessions.clone(),
            retained,
            clock: parts.clock.clone(),
            metrics: metrics.clone(),
            events: events.clone(),
        });
        let (ingest, writers) = ingest::start(&parts.ingest, &parts.writer_options, &store, &parts.clock, &metrics);
        let (Desks { renewals, provisioning, shadows, responses }, desks) = open_desks(&parts, &store, &metrics);
        let (dispatch, arrived) = Dispatch::new(metrics.clone());
        let news = parts.db.clone();
        let certificates = Certificates::new(parts.db.clone(), parts.clock.clone(), tls.clone(), parts.pki.settings());
        let shared = Arc::new(Shared {
            access: Access::new(
                parts.db,
                parts.keys,
                parts.clock.clone(),
                &parts.admission,
                &metrics,
                certificates,
                directory.clone(),
            ),
            directory,
            admission: Arc::new(Admission::new(&parts.mqtt, &parts.admission, metrics.clone())),
            sessions,
            store,
            session_limits: parts.sessions,
            router,
            ingest,
            renewals,
            provisioning,
            shadows,
            responses,
            dispatch,
            traces: Traces::new(parts.mqtt.max_traces, parts.clock.clone(), metrics.clone()),
            settings: parts.mqtt,
            clock: parts.clock,
            metrics,
            events,
            presences: Presences::default(),
            control: Control::default(),
        });
        restore::go_on(&shared, restored, now).await;
        let dispatching = tokio::spawn(dispatch::run(shared.clone(), news, arrived));
        let keeping_time = tokio::spawn(restore::keep_time(shared.clone()));
        let controlling = control::start(&shared, &parts.writer_options).await?;
        let telling = Duration::from_secs(shared.settings.sys_interval_s);
        let telling = (!telling.is_zero()).then(|| tokio::spawn(sys::publish(shared.clone(), telling)));
        let entrance = Arc::new(Entrance::new(shared.clone()));
        let mut accepting = JoinSet::new();
        accepting.spawn(listener::accept(listener, entrance.clone(), None));
        let tls_address = tls_listener.as_ref().map(|(_, address)| *address);
        if let Some((listener, _)) = tls_listener {
            accepting.spawn(listener::accept(listener, entrance.clone(), tls));
        }
        let admission = shared.admission.clone();
        let sweeping = AbortOnDropHandle::new(tokio::spawn(async move { admission.sweep().await }));
        Ok(Self {
            shared,
            entrance,
            address,
            tls_address,
            accepting,
            keeping_time,
            _sweeping: sweeping,
            controlling,
            telling,
            writers,
            dispatching,
            desks,
            storing,
            events: writing,
        })
    }

    /// The address that is listened on; the port is real even when 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The address that is listened on with TLS, if there is one.
    pub fn tls_address(&self) -> Option<SocketAddr> {
        self.tls_address
    }

    /// The way in for clients that another part of the process accepts, such as WebSockets of the HTTP port.
    pub fn door(&self) -> Door {
        Door::of(&self.entrance)
    }

    /// Tells whether the writers can commit; for readiness.
    pub fn health(&self) -> Health {
        self.writers.health().with(self.storing.is_away())
    }

    /// The broker's metrics, for a live view in the same process.
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// Stops accepting, lets what was received be committed and acknowledged, says good-bye (MQTT 5: DISCONNECT 0x8B)
    /// and ends the writers. Takes at most a few seconds, even when the database is away.
    pub async fn stop(mut self) {
        self.accepting.abort_all();
        drop(self.entrance);
        self.controlling.stop().await;
        self.shared.sessions.close_all();
        let ended = tokio::time::timeout(STOP_WITHIN, self.shared.sessions.all_ended()).await;
        if ended.is_err() {
            tracing::warn!("some connections did not end in time");
        }
        // What holds the way to the writers and the store must be gone, for them to end.
        for task in self.telling.into_iter().chain([self.keeping_time, self.dispatching]) {
            task.abort();
            let _ = task.await;
        }
        drop(self.shared);
        self.writers.stop(STOP_WITHIN).await;
        for desk in self.desks {
            desk.stop(STOP_WITHIN).await;
        }
        self.storing.stop(STOP_WITHIN).await;
        self.events.stop().await;
    }
}
