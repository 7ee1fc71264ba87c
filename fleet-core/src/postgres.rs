//! The embedded PostgreSQL: a private cluster in the data directory, started, healed and stopped without hands.
//!
//! Holds: one server a data directory; no TCP; the postmaster never outlives the server by more than its shutdown, and
//! while the server lives, a postmaster that dies is started again. Whatever was killed, the next start heals within
//! ten seconds and keeps every committed row.
//! Ignorant of: what is stored.
//! Why a thread of its own: the kernel's parent-death signal follows the thread that started a process (ADR 2).

mod account;
mod home;
mod leftovers;
mod log;
mod programs;

use std::fs;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use prometheus::IntCounter;
use rustix::process::{Pid, Signal};
use sqlx::postgres::{PgConnectOptions, PgSslMode};
use tokio::sync::oneshot;
use tracing::{error, info, warn};

use self::home::{Home, ROLE};
use self::log::Log;
pub(crate) use self::programs::OLDEST as OLDEST_VERSION;
use self::programs::Programs;
use crate::error::{Error, Result};

/// How long starts that fail are repeated before the failure is final: leftovers may need a moment to let go.
const RETRY_START: Duration = Duration::from_secs(8);

/// How long a postmaster that lives may take to accept connections. After a crash it replays what was written since the
/// last checkpoint, seconds with the `max_wal_size` below; a cluster with other settings is not killed for being slow.
const READY_WITHIN: Duration = Duration::from_mins(10);

/// How often a running postmaster is looked after.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often a starting or stopping one is.
const LOOK_CLOSELY: Duration = Duration::from_millis(10);

/// First and longest pause before a postmaster that died is started again.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(5));

/// A postmaster that has run so long is healthy: the next pause is the first one again.
const HEALTHY_AFTER: Duration = Duration::from_mins(1);

/// What a postmaster is sent to stop, and how long it is waited for then: fast, immediate, at once.
const STOP: [(Signal, Duration); 3] = [
    (Signal::INT, Duration::from_secs(20)),
    (Signal::QUIT, Duration::from_secs(5)),
    (Signal::KILL, Duration::from_secs(5)),
];

/// What differs between one cluster and another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Connections the server accepts.
    pub max_connections: u32,
    /// Whether a commit is on the disk before it is answered. Only for tests is this ever `false`.
    pub durable: bool,
}

impl Tuning {
    /// The whole of `postgresql.conf`, for a machine that runs other things too. `alter system` wins over it.
    /// `max_wal_size` and `recovery_init_sync_method` decide what a crash costs (ADR 2).
    fn settings(self, hba: &Path, ident: &Path, socket_dir: &Path) -> String {
        let quoted = |path: &Path| path.display().to_string().replace('\'', "''");
        let durable = if self.durable { "on" } else { "off" };
        let shared_buffers = if self.durable { "256MB" } else { "64MB" };
        format!(
            "# Written at every start of muster; `alter system` wins over it.
listen_addresses = ''
port = 5432
unix_socket_directories = '\"{sockets}\"'
hba_file = '{hba}'
ident_file = '{ident}'
max_connections = {max_connections}
fsync = {durable}
synchronous_commit = {durable}
full_page_writes = {durable}
wal_level = minimal
max_wal_senders = 0
wal_compression = on
max_wal_size = 512MB
min_wal_size = 512MB
checkpoint_timeout = 15min
checkpoint_completion_target = 0.9
shared_buffers = {shared_buffers}
huge_pages = off
recovery_init_sync_method = syncfs
jit = off
timezone = 'UTC'
log_timezone = 'UTC'
log_destination = 'stderr'
log_line_prefix = '%m [%p] '
logging_collector = off
",
            sockets = quoted(socket_dir).replace('"', "\"\""),
            hba = quoted(hba),
            ident = quoted(ident),
            max_connections = self.max_connections,
        )
    }
}

/// A running cluster and the thread that looks after it. Stopped by [`Cluster::stop`], or else when dropped.
#[derive(Debug)]
pub struct Cluster {
    /// Dropped to ask the supervisor to stop.
    stop: Option<SyncSender<()>>,
    supervisor: Option<JoinHandle<()>>,
    options: PgConnectOptions,
    seen: Arc<Seen>,
}

/// What the supervisor lets others see.
#[derive(Debug)]
struct Seen {
    /// Process id of the postmaster; 0 while there is none.
    pid: AtomicU32,
    restarts: IntCounter,
}

impl Cluster {
    /// Starts the cluster below `data_dir`, made when it is missing, with the programs in `binaries` ("auto": those of
    /// this machine), and answers when it accepts connections.
    ///
    /// # Errors
    /// [`Error::Postgres`] says in one sentence what is missing or in the way.
    pub async fn start(data_dir: &Path, binaries: &str, tuning: Tuning) -> Result<Self> {
        let restarts = IntCounter::new(
            "muster_postgres_restarts_total",
            "Times the embedded PostgreSQL died and was started again while the server ran",
        )
        .map_err(|e| Error::Internal(e.to_string()))?;
        let seen = Arc::new(Seen { pid: AtomicU32::new(0), restarts });
        let (stop, stopped) = sync_channel(1);
        let (ready, started) = oneshot::channel();
        let (data_dir, binaries, shown) = (data_dir.to_owned(), binaries.to_owned(), Arc::clone(&seen));
        let supervisor = thread::Builder::new()
            .name("postgres".to_owned())
            .spawn(move || {
                let opened = Supervisor::open(&data_dir, &binaries, tuning, stopped, shown);
                supervise(opened, ready);
            })
            .map_err(|e| Error::Internal(format!("no thread for PostgreSQL: {e}")))?;
        let options = started.await.map_err(|_| Error::Internal("the supervisor of PostgreSQL ended".to_owned()))??;
        Ok(Self { stop: Some(stop), supervisor: Some(supervisor), options, seen })
    }

    /// How to connect, as the administrator, to the database `postgres`.
    pub fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// The same as a URL, for `database`.
    pub fn url(&self, database: &str) -> String {
        let socket = self.options.get_socket().map(|path| path.as_os_str().as_encoded_bytes()).unwrap_or_default();
        let encode = |byte: &u8| match byte {
            b'-' | b'_' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(*byte).to_string(),
            other => format!("%{other:02X}"),
        };
        let host = socket.iter().map(encode).collect::<Vec<_>>().concat();
        format!("postgres://{ROLE}@{host}/{database}")
    }

    /// Process id of the postmaster; `None` while there is none.
    pub fn pid(&self) -> Option<u32> {
        Some(self.seen.pid.load(Ordering::Relaxed)).filter(|pid| *pid != 0)
    }

    /// How often the postmaster died and was started again.
    pub fn restarts(&self) -> &IntCounter {
        &self.seen.restarts
    }

    /// Stops the cluster and waits until it has.
    pub async fn stop(self) {
        let stopped = tokio::task::spawn_blocking(move || drop(self)).await;
        if let Err(e) = stopped {
            error!(error = %e, "stopping PostgreSQL failed");
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.stop = None;
        let ended = self.supervisor.take().map(JoinHandle::join);
        if ended.is_some_and(|ended| ended.is_err()) {
            error!("the supervisor of PostgreSQL panicked");
        }
    }
}

fn options(socket_dir: &Path) -> PgConnectOptions {
    PgConnectOptions::new_without_pgpass()
        .socket(socket_dir)
        .port(5432)
        .username(ROLE)
        .database("postgres")
        .ssl_mode(PgSslMode::Disable)
}

/// How to connect to a cluster below `data_dir` that another process runs, if there seems to be one.
pub(crate) fn running(data_dir: &Path) -> Option<PgConnectOptions> {
    home::socket_dir_in_use(&data_dir.join("postgres")).map(|socket_dir| options(&socket_dir))
}

/// The life of the thread: start, tell, look after, stop.
fn supervise(opened: Result<Supervisor>, ready: oneshot::Sender<Result<PgConnectOptions>>) {
    let started = opened.and_then(|mut supervisor| Ok((supervisor.first_start()?, supervisor)));
    let (running, mut supervisor) = match started {
        Ok(started) => started,
        Err(e) => {
            let _nobody_waits = ready.send(Err(e));
            return;
        }
    };
    let _nobody_waits = ready.send(Ok(supervisor.options()));
    supervisor.look_after(running);
}

/// A postmaster that was started.
struct Running {
    process: Child,
    log: Log,
    since: Instant,
}

/// Why there is no postmaster.
enum NoStart {
    /// The server is stopping.
    Stopped,
    /// It ended before it was ready; the text says why. Another try may help.
    Ended(String),
    /// No try will help.
    Refused(Error),
}

impl From<Error> for NoStart {
    fn from(e: Error) -> Self {
        Self::Refused(e)
    }
}

impl From<NoStart> for Error {
    fn from(why: NoStart) -> Self {
        match why {
            NoStart::Stopped => refuse("PostgreSQL was stopped while it started".to_owned()),
            NoStart::Ended(said) => refuse(format!("PostgreSQL did not start: {said}")),
            NoStart::Refused(e) => e,
        }
    }
}

struct Supervisor {
    home: Home,
    programs: Programs,
    tuning: Tuning,
    stop: Receiver<()>,
    seen: Arc<Seen>,
}

impl Supervisor {
    fn open(data_dir: &Path, binaries: &str, tuning: Tuning, stop: Receiver<()>, seen: Arc<Seen>) -> Result<Self> {
        let home = Home::open(data_dir)?;
        let programs = Programs::find(binaries, home.data_major()?)?;
        Ok(Self { home, programs, tuning, stop, seen })
    }

    fn options(&self) -> PgConnectOptions {
        options(&self.home.socket_dir)
    }

    fn first_start(&mut self) -> Result<Running> {
        let begun = Instant::now();
        if self.home.data_major()?.is_none() {
            self.home.make_cluster(&self.programs, self.tuning)?;
            info!(version = self.programs.major, took_ms = ms(begun), "PostgreSQL cluster made");
        }
        self.home.write_settings(self.tuning)?;
        loop {
            match self.start() {
                Err(NoStart::Ended(said)) if begun.elapsed() < RETRY_START => {
                    warn!(said, "PostgreSQL did not start, trying again");
                    self.pause(LOOK_EVERY)?;
                }
                outcome => return Ok(outcome?),
            }
        }
    }

    /// Clears what is left of an earlier life, starts a postmaster and waits until it accepts connections.
    fn start(&mut self) -> Result<Running, NoStart> {
        let begun = Instant::now();
        leftovers::clear(&self.home)?;
        let mut postgres = self.home.account.command("INT", &self.programs.postgres());
        postgres.arg("-D").arg(self.home.data());
        postgres.arg("-c").arg(format!("config_file={}", self.home.settings().display()));
        postgres.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        // Ctrl-C in a terminal is for the server, which stops PostgreSQL last.
        std::os::unix::process::CommandExt::process_group(&mut postgres, 0);
        let mut process = postgres.spawn().map_err(|e| home::no_setpriv(&e))?;
        let said = process.stderr.take().ok_or_else(|| Error::Internal("the pipe was just asked for".to_owned()))?;
        let log = Log::copy(said, &self.home.log()).map_err(|e| Error::Internal(e.to_string()))?;
        let mut running = Running { process, log, since: begun };
        match self.wait_until_ready(&mut running) {
            Ok(()) => {
                self.seen.pid.store(running.process.id(), Ordering::Relaxed);
                info!(pid = running.process.id(), took_ms = ms(begun), "PostgreSQL accepts connections");
                Ok(running)
            }
            Err(why) => {
                stop_postmaster(&mut running);
                Err(why)
            }
        }
    }

    fn wait_until_ready(&self, running: &mut Running) -> Result<(), NoStart> {
        while running.since.elapsed() < READY_WITHIN {
            if has_ended(&mut running.process) {
                return Err(NoStart::Ended(running.log.last_words()));
            }
            if self.says_ready(running.process.id()) {
                return Ok(());
            }
            self.pause(LOOK_CLOSELY)?;
        }
        Err(refuse(format!("PostgreSQL was not ready within {READY_WITHIN:?}: see {}", self.home.log().display()))
            .into())
    }

    /// The postmaster writes its state into line 8 of its pid file, for this very purpose.
    fn says_ready(&self, pid: u32) -> bool {
        let text = fs::read_to_string(self.home.pid_file()).unwrap_or_default();
        let mut lines = text.lines().map(str::trim);
        lines.next() == Some(&pid.to_string()) && lines.nth(6) == Some("ready")
    }

    /// Starts the postmaster again whenever it ends, until the server stops.
    fn look_after(&mut self, mut running: Running) {
        let mut back_off = BACK_OFF.0;
        loop {
            if self.pause(LOOK_EVERY).is_err() {
                self.seen.pid.store(0, Ordering::Relaxed);
                return stop_postmaster(&mut running);
            }
            if !has_ended(&mut running.process) {
                continue;
            }
            self.seen.pid.store(0, Ordering::Relaxed);
            error!(said = running.log.last_words(), "PostgreSQL ended, starting it again");
            if running.since.elapsed() > HEALTHY_AFTER {
                back_off = BACK_OFF.0;
            }
            match self.start_again(&mut back_off) {
                Some(again) => running = again,
                None => return,
            }
        }
    }

    /// `None` when the server stops meanwhile.
    fn start_again(&mut self, back_off: &mut Duration) -> Option<Running> {
        loop {
            self.pause(*back_off).ok()?;
            *back_off = BACK_OFF.1.min(*back_off * 2);
            match self.start() {
                Ok(running) => {
                    self.seen.restarts.inc();
                    return Some(running);
                }
                Err(NoStart::Stopped) => return None,
                Err(why) => error!(error = %Error::from(why), "PostgreSQL could not be started again"),
            }
        }
    }

    /// Waits, unless the server stops.
    fn pause(&self, time: Duration) -> Result<(), NoStart> {
        match self.stop.recv_timeout(time) {
            Err(RecvTimeoutError::Timeout) => Ok(()),
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Err(NoStart::Stopped),
        }
    }
}

/// Asks nicely first.
fn stop_postmaster(running: &mut Running) {
    let begun = Instant::now();
    for (signal, patience) in STOP {
        if has_ended(&mut running.process) {
            break;
        }
        if let Ok(id) = i32::try_from(running.process.id())
            && let Some(pid) = Pid::from_raw(id)
        {
            leftovers::send(pid, signal);
        }
        let asked = Instant::now();
        while !has_ended(&mut running.process) && asked.elapsed() < patience {
            thread::sleep(LOOK_CLOSELY);
        }
    }
    info!(took_ms = ms(begun), "PostgreSQL stopped");
}

/// Reaps the process when it has ended.
fn has_ended(process: &mut Child) -> bool {
    !matches!(process.try_wait(), Ok(None))
}

fn refuse(text: String) -> Error {
    Error::Postgres(text)
}

fn ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
