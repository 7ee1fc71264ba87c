//! `muster serve`: composes the doors over one database, and stops them in order.

use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use api::{App, Health};
use axum::serve::ListenerExt;
use broker::{Broker, Parts};
use clap::ValueEnum;
use fleet_core::authority::Pki;
use fleet_core::clock::Clock;
use fleet_core::config::Config;
use fleet_core::credential::{self, Expiring};
use fleet_core::database::Database;
use fleet_core::decommission;
use fleet_core::index::Index;
use fleet_core::retention;
use fleet_core::token::Keys;
use fleet_core::user::{self, FirstAdmin};
use fleet_core::{login_failure, login_session, oidc, password_reset};
use prometheus::{IntCounter, IntGauge, IntGaugeVec, Opts, Registry};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::deadlines::Deadlines;
use crate::exit::CannotListen;
use crate::server_log::{Keeper, Taken};
use crate::settings::{self, Loaded};
use crate::websocket;

/// How often partitions are made ahead and old days dropped.
const SWEEP_EVERY: Duration = Duration::from_mins(10);
/// How often it is looked for devices that have left for good.
const CLEAR_EVERY: Duration = Duration::from_secs(1);
/// How long a sweep under way may take to end when the server stops.
const SWEEP_STOP_WITHIN: Duration = Duration::from_secs(5);
/// How long requests under way may take to end when the server stops.
const HTTP_STOP_WITHIN: Duration = Duration::from_secs(5);

/// What `muster serve` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// What this process does; several processes may share one database.
    #[arg(long, value_enum, value_delimiter = ',', default_values_t = Role::ALL)]
    roles: Vec<Role>,
}

/// A part of the server.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Role {
    /// The MQTT door and its writers.
    Broker,
    /// The HTTP door.
    Api,
    /// Housekeeping: partitions, retention, devices that have left.
    Worker,
}

impl Role {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Broker, Self::Api, Self::Worker];
}

/// Runs the server until it is told to stop.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let loaded = settings::load()?;
    let taken = settings::start_logging(&loaded.config)?;
    let stop = stop_signal()?;
    let server = Server::start(loaded, &args.roles, taken).await?;
    // A password that was chosen by others is not repeated.
    if let Some(admin) = server.first_admin.as_ref().filter(|admin| admin.generated) {
        println!("first admin: {} password: {}", admin.email, admin.password.expose());
    }
    println!("ready: {server}");
    stop.cancelled().await;
    server.stop().await;
    Ok(ExitCode::SUCCESS)
}

/// Cancelled by SIGINT or SIGTERM.
pub(crate) fn stop_signal() -> anyhow::Result<CancellationToken> {
    let mut interrupt = signal(SignalKind::interrupt()).context("SIGINT")?;
    let mut terminate = signal(SignalKind::terminate()).context("SIGTERM")?;
    let stop = CancellationToken::new();
    let stopping = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stopping.cancel();
    });
    Ok(stop)
}

/// A running server.
pub(crate) struct Server {
    /// Made at the first start; its password is known only now.
    pub(crate) first_admin: Option<FirstAdmin>,
    broker: Option<Broker>,
    http: Option<Http>,
    worker: Option<Worker>,
    keeper: Option<Keeper>,
    database: Database,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let http = self.http_address().map(|address| format!("http://{address}"));
        let mqtt = self.mqtt_address().map(|address| format!("mqtt://{address}"));
        let mqtts = self.broker.as_ref().and_then(Broker::tls_address).map(|address| format!("mqtts://{address}"));
        f.write_str(&[http, mqtt, mqtts].into_iter().flatten().collect::<Vec<_>>().join(" "))
    }
}

impl Server {
    /// Starts the parts that `roles` name, on the database the settings name, and keeps what is `taken` of its log.
    pub(crate) async fn start(loaded: Loaded, roles: &[Role], taken: Option<Taken>) -> anyhow::Result<Self> {
        let Loaded { config, environment, data_dir } = loaded;
        let plays = |role| roles.contains(&role);
        let clock = Clock::system();
        // Taken first: a port that is in use is said at once, not after the database has started.
        let listener = if plays(Role::Api) { Some(listen(&config).await?) } else { None };
        let database = Database::open(&config, &data_dir, &clock).await?;
        let mut db = database.pool().acquire().await.map_err(fleet_core::Error::from)?;
        let first_admin = user::ensure_admin(
            &mut db,
            environment.admin_email.as_deref(),
            environment.admin_password.as_ref(),
            &clock,
        )
        .await?;
        let keys = Arc::new(Keys::load(&mut db, clock.clone(), config.auth.access_token_s).await?);
        retention::ensure_partitions(&mut db, clock.now()).await?;
        drop(db);

        let registry = Registry::new();
        if let Some(cluster) = database.cluster() {
            registry.register(Box::new(cluster.restarts().clone()))?;
        }
        let keeper =
            taken.map(|taken| Keeper::start(taken, database.pool(), &config, &clock, &registry)).transpose()?;
        let pki = Pki::new(config.certificates.clone(), &data_dir);
        let broker = if plays(Role::Broker) {
            Some(start_broker(&config, &data_dir, &database, (&keys, &pki), &clock, &registry).await?)
        } else {
            None
        };
        let http = match listener {
            Some(listener) => {
                let index = Index::open(&config.search.dir(&data_dir), &config.search)?;
                index.register(&registry)?;
                let beside = (broker.as_ref(), index);
                Some(start_http(listener, &config, &database, (keys.clone(), pki), &clock, &registry, beside)?)
            }
            None => None,
        };
        let worker = if plays(Role::Worker) {
            Some(Worker::start(database.pool().clone(), config, keys, clock, &registry)?)
        } else {
            None
        };
        Ok(Self { first_admin, broker, http, worker, keeper, database })
    }

    /// Where REST answers, when this process has the role.
    pub(crate) fn http_address(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(|http| http.address)
    }

    /// Where MQTT is spoken, when this process has the role.
    pub(crate) fn mqtt_address(&self) -> Option<SocketAddr> {
        self.broker.as_ref().map(Broker::address)
    }

    /// The broker's metrics, when this process has the role.
    pub(crate) fn broker_metrics(&self) -> Option<&broker::Metrics> {
        self.broker.as_ref().map(Broker::metrics)
    }

    /// Stops in order: nobody new, batches committed and acknowledged, the database last.
    pub(crate) async fn stop(self) {
        tracing::info!("stopping");
        if let Some(broker) = self.broker {
            broker.stop().await;
        }
        if let Some(http) = self.http {
            http.stop().await;
        }
        if let Some(worker) = self.worker {
            worker.stop().await;
        }
        if let Some(keeper) = self.keeper {
            keeper.stop().await;
        }
        self.database.close().await;
        tracing::info!("stopped");
    }
}

async fn listen(config: &Config) -> Result<TcpListener, CannotListen> {
    let address = config.http.listen;
    let bound = TcpListener::bind(address).await.and_then(|listener| {
        // MQTT comes here too, over WebSocket.
        broker::notice_the_dead(&listener, config.mqtt.tcp_keepalive_s)?;
        Ok(listener)
    });
    bound.map_err(|error| CannotListen { address, error })
}

async fn start_broker(
    config: &Config,
    data_dir: &Path,
    database: &Database,
    (keys, pki): (&Arc<Keys>, &Pki),
    clock: &Clock,
    registry: &Registry,
) -> Result<Broker, broker::StartError> {
    Broker::start(Parts {
        mqtt: config.mqtt.clone(),
        tls: config.tls.clone(),
        data_dir: data_dir.to_owned(),
        admission: config.admission.clone(),
        sessions: config.sessions.clone(),
        ingest: config.ingest.clone(),
        db: database.pool().clone(),
        writer_options: database.options(),
        keys: keys.clone(),
        pki: pki.clone(),
        provisioning: config.provisioning.clone(),
        shadow: config.shadow.clone(),
        commands: config.commands.clone(),
        clock: clock.clone(),
        registry: registry.clone(),
    })
    .await
}

/// The HTTP door, served by a task of its own.
struct Http {
    address: SocketAddr,
    app: App,
    stop: CancellationToken,
    serving: JoinHandle<std::io::Result<()>>,
    denials: JoinHandle<()>,
    indexing: JoinHandle<()>,
}

fn start_http(
    listener: TcpListener,
    config: &Config,
    database: &Database,
    (keys, pki): (Arc<Keys>, Pki),
    clock: &Clock,
    registry: &Registry,
    (broker, index): (Option<&Broker>, Index),
) -> anyhow::Result<Http> {
    let health = match broker.map(Broker::health) {
        Some(writers) => Health::new().with("writers", move || {
            let ready = if writers.is_ready() { Ok(()) } else { Err("cannot commit".to_owned()) };
            std::future::ready(ready)
        }),
        None => Health::new(),
    };
    let app = App::new(database.pool().clone(), clock.clone(), keys, pki, registry.clone(), config, health)?
        .with_index(index.clone())?;
    let address = listener.local_addr()?;
    let listener = listener.tap_io(|socket| {
        // What a client is told is small and must not wait for more.
        if let Err(error) = socket.set_nodelay(true) {
            tracing::debug!(%error, "the connection ended before it began");
        }
    });
    let stop = CancellationToken::new();
    let denials = tokio::spawn(write_denials(app.clone(), config.audit.denials_every_s, stop.clone()));
    let indexing = tokio::spawn(follow(index, database.pool().clone(), clock.clone(), stop.clone()));
    let beside = broker.map(|broker| websocket::routes(broker.door(), config.mqtt.max_packet_bytes));
    let router = api::router_beside(app.clone(), beside.unwrap_or_default());
    let serving = axum::serve(listener, router.into_make_service_with_connect_info::<SocketAddr>());
    let serving = serving.with_graceful_shutdown(stop.clone().cancelled_owned());
    Ok(Http { address, app, stop, serving: tokio::spawn(serving.into_future()), denials, indexing })
}

/// Keeps the index of log lines up with the rows.
async fn follow(index: Index, db: PgPool, clock: Clock, stop: CancellationToken) {
    index.follow(&db, &clock, &stop).await;
}

/// Writes down what was refused now and then, and once more in the end.
async fn write_denials(app: App, every_s: u64, stop: CancellationToken) {
    let every = Duration::from_secs(every_s.max(1));
    while !stop.is_cancelled() {
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(every) => {}
        }
        app.write_denials().await;
    }
}

impl Http {
    async fn stop(mut self) {
        self.stop.cancel();
        self.app.end_streams();
        if tokio::time::timeout(HTTP_STOP_WITHIN, &mut self.serving).await.is_err() {
            tracing::warn!("some requests did not end in time");
            self.serving.abort();
        }
        if tokio::time::timeout(HTTP_STOP_WITHIN, &mut self.denials).await.is_err() {
            tracing::warn!("refused requests could not be written down in time");
            self.denials.abort();
        }
        if tokio::time::timeout(HTTP_STOP_WITHIN, &mut self.indexing).await.is_err() {
            tracing::warn!("the index could not be committed in time; it catches up with the next start");
            self.indexing.abort();
        }
    }
}

/// Housekeeping.
struct Worker {
    stop: CancellationToken,
    tasks: [JoinHandle<()>; 3],
}

impl Worker {
    fn start(
        db: PgPool,
        config: Config,
        keys: Arc<Keys>,
        clock: Clock,
        registry: &Registry,
    ) -> prometheus::Result<Self> {
        let expiring =
            Opts::new("muster_certificates_expiring", "Devices whose last valid certificate ends within that time");
        let expiring = IntGaugeVec::new(expiring, &["within"])?;
        registry.register(Box::new(expiring.clone()))?;
        let stop = CancellationToken::new();
        let clearing = Clearing::new(&config, registry)?;
        let clearing = tokio::spawn(clearing.run(db.clone(), clock.clone(), stop.clone()));
        let deadlines = Deadlines::new(config.shadow.clone(), registry)?;
        let ending = tokio::spawn(deadlines.run(db.clone(), clock.clone(), stop.clone()));
        let stopping = stop.clone();
        let sweeping = tokio::spawn(async move {
            let mut every = tokio::time::interval(SWEEP_EVERY);
            loop {
                tokio::select! {
                    () = stopping.cancelled() => return,
                    _ = every.tick() => {}
                }
                if let Err(error) = sweep(&db, &config, &keys, &clock, &expiring).await {
                    tracing::warn!(%error, "housekeeping failed; it is tried again in ten minutes");
                }
            }
        });
        Ok(Self { stop, tasks: [sweeping, clearing, ending] })
    }

    async fn stop(self) {
        self.stop.cancel();
        for mut task in self.tasks {
            if tokio::time::timeout(SWEEP_STOP_WITHIN, &mut task).await.is_err() {
                // Each of its statements is done or is not; the next start goes on where this one ended.
                task.abort();
            }
        }
    }
}

/// Clears away what is left of devices that were decommissioned.
struct Clearing {
    rows: u32,
    deleted: IntCounter,
    unfinished: IntGauge,
}

impl Clearing {
    fn new(config: &Config, registry: &Registry) -> prometheus::Result<Self> {
        let deleted = IntCounter::new("muster_decommission_rows_total", "Rows deleted of decommissioned devices")?;
        let unfinished =
            IntGauge::new("muster_decommissions_unfinished", "Decommissioned devices of which rows are left")?;
        registry.register(Box::new(deleted.clone()))?;
        registry.register(Box::new(unfinished.clone()))?;
        Ok(Self { rows: config.retention.decommission_rows, deleted, unfinished })
    }

    async fn run(self, db: PgPool, clock: Clock, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(CLEAR_EVERY) => {}
            }
            // Cancelled between two answers of the database: a step is done or is not.
            let worked = tokio::select! {
                () = stop.cancelled() => return,
                worked = decommission::work(&db, self.rows, clock.now()) => worked,
            };
            match worked {
                Ok(worked) => {
                    self.deleted.inc_by(worked.rows);
                    self.unfinished.set(i64::try_from(worked.unfinished).unwrap_or(i64::MAX));
                }
                Err(error) => tracing::warn!(%error, "decommissioned devices wait to be cleared away"),
            }
        }
    }
}

async fn sweep(
    db: &PgPool,
    config: &Config,
    keys: &Keys,
    clock: &Clock,
    expiring: &IntGaugeVec,
) -> fleet_core::Result<()> {
    let mut tx = db.begin().await?;
    if let Some(kid) = keys.tend(&mut tx, config.auth.signing_key_days).await? {
        tracing::info!(kid, "access tokens are signed with a new key");
    }
    tx.commit().await?;
    let mut db = db.acquire().await?;
    retention::ensure_partitions(&mut db, clock.now()).await?;
    let swept = retention::sweep(&mut db, &config.retention, clock.now()).await?;
    let logins = login_session::sweep(&mut db, clock.now()).await?;
    password_reset::sweep(&mut db, clock.now()).await?;
    oidc::sweep(&mut db, clock.now()).await?;
    let forgotten = login_failure::sweep(&mut db, &config.auth, clock.now()).await?;
    if forgotten > 0 {
        tracing::warn!(forgotten, "more failed logins than auth.max_login_failures were remembered");
    }
    let Expiring { day, week, month } = credential::expiring(&mut db, clock.now()).await?;
    for (within, devices) in [("1d", day), ("7d", week), ("30d", month)] {
        expiring.with_label_values(&[within]).set(devices);
    }
    tracing::debug!(?swept, logins, "housekeeping done");
    Ok(())
}
