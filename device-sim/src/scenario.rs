//! Many devices: enrolment, load, end, verdict.
//!
//! [`Scenario::run`] is a whole test with the ledger at its end; [`Simulation`] is a fleet that goes on until it is
//! stopped. Both are reproducible from a seed but for the clock.
//! Bounds: [`MAX_DEVICES`], [`MAX_RATE`], [`MAX_PAYLOAD_BYTES`], [`ledger::MAX_ENTRIES`] readings in a run,
//! [`BACKLOG_BYTES`] of unacknowledged readings, and [`KEPT_LINES_BYTES`] of log lines.

use std::fmt;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::Serialize;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::counters::{Counters, get};
use crate::device::{Device, Setup};
use crate::error::{Error, Result};
use crate::ledger::{self, Acknowledged, Ledger, Recorder, Verdict};
use crate::line::Level;
use crate::rest::{Access, Client, Credential};

/// Most devices in one process; each needs a file descriptor.
pub const MAX_DEVICES: u32 = 15_000;
/// Most readings a second, of all devices together.
pub const MAX_RATE: f64 = 200_000.0;
/// Largest payload; the server's default limit for a packet is 256 KiB.
pub const MAX_PAYLOAD_BYTES: usize = 200_000;
/// Longest run with a ledger.
pub const MAX_DURATION: Duration = Duration::from_hours(7 * 24);
/// Unacknowledged readings kept by all devices together, in bytes of payload.
pub const BACKLOG_BYTES: usize = 64 << 20;
/// After its end a run waits so long for acknowledgements.
pub const DRAIN: Duration = Duration::from_secs(30);
/// Log lines kept by all devices together, sent or not, in bytes of payload.
pub const KEPT_LINES_BYTES: usize = 128 << 20;
/// Fewest and most log lines a device keeps.
const KEPT_LINES: (usize, usize) = (16, 2000);
/// About what a line takes.
const LINE_BYTES: usize = 256;
/// Fewest and most unacknowledged readings a device keeps.
const BACKLOG: (usize, usize) = (32, 4096);
/// From one log line of a device to the next, at the most: later is never.
const LONGEST_INTERVAL: Duration = Duration::from_hours(365 * 24);
const ENROLLING: usize = 8;
const CONNECTING: usize = 64;
/// Acknowledgements on their way to the ledger.
const RECORDER_QUEUE: usize = 10_000;
const TICK: Duration = Duration::from_millis(200);
const PROBE: Duration = Duration::from_secs(5);

/// A fleet and what it does.
#[derive(Debug, Clone)]
pub struct Scenario {
    /// Where REST is: `http://127.0.0.1:8080`.
    pub url: String,
    /// Where MQTT is: `127.0.0.1:1883`.
    pub mqtt: String,
    /// Who enrols the devices and reads back what they sent.
    pub access: Access,
    /// How many devices, 1 to [`MAX_DEVICES`]; they are named `sim-{seed}-{index}`.
    pub devices: u32,
    /// Readings a second of all devices together, above 0 and up to [`MAX_RATE`].
    pub rate: f64,
    /// Log lines a second of all devices together, 0 to [`MAX_RATE`], while they log at level `info` and above, as they do unless told
    /// otherwise; what they write below that stays with them.
    pub log_rate: f64,
    /// For how long readings are taken, up to [`MAX_DURATION`]; a [`Simulation`] ignores it.
    pub duration: Duration,
    /// Length of a reading's payload, up to [`MAX_PAYLOAD_BYTES`]; a reading is never shorter than its values.
    pub payload_bytes: usize,
    /// The same seed gives the same devices with the same values and the same faults.
    pub seed: u64,
    /// What goes wrong on purpose.
    pub faults: Faults,
    /// A file to write every acknowledged reading to as it arrives.
    pub ledger: Option<PathBuf>,
    /// Whether the devices are deleted at the end, after the ledger is checked.
    pub cleanup: bool,
}

/// What goes wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Faults {
    /// Connections cut without a DISCONNECT, a minute, of all devices together.
    pub reconnects_per_minute: f64,
    /// Share of acknowledged readings that are sent once more, 0 to 1.
    pub duplicates: f64,
    /// Share of readings held back until later ones have overtaken them, 0 to 1.
    pub late: f64,
}

impl Default for Faults {
    /// One in a hundred readings twice, one in a hundred late, no connection cut.
    fn default() -> Self {
        Self { reconnects_per_minute: 0.0, duplicates: 0.01, late: 0.01 }
    }
}

/// What a run is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Devices are being enrolled.
    Enrolling,
    /// Readings are taken and sent.
    Running,
    /// Waiting for the last acknowledgements.
    Draining,
    /// Reading back what was acknowledged.
    Verifying,
    /// Devices are being deleted.
    Cleaning,
}

/// How far a run is.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Progress {
    /// What it is doing.
    pub phase: Phase,
    /// How much of the phase is done: devices, or milliseconds while running and draining.
    pub done: u64,
    /// Of how much.
    pub total: u64,
    /// Devices connected.
    pub online: u64,
    /// Readings sent so far.
    pub sent: u64,
    /// Readings acknowledged so far.
    pub acknowledged: u64,
}

/// What a run found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// The run's seed.
    pub seed: u64,
    /// Devices that took part.
    pub devices: u32,
    /// From the first reading to the last acknowledgement, in seconds.
    pub elapsed_s: f64,
    /// Distinct readings sent.
    pub sent: u64,
    /// Distinct readings acknowledged.
    pub acknowledged: u64,
    /// Acknowledged readings a second.
    pub acknowledged_per_s: f64,
    /// Distinct log lines sent.
    pub lines_sent: u64,
    /// Distinct log lines acknowledged.
    pub lines_acknowledged: u64,
    /// Acknowledged readings found by REST.
    pub found: u64,
    /// Acknowledged readings not found.
    pub missing: u64,
    /// Acknowledged readings found more than once.
    pub duplicated: u64,
    /// Readings found though never acknowledged.
    pub found_unacknowledged: u64,
    /// Readings sent again after a connection ended.
    pub resent: u64,
    /// Readings sent twice on purpose.
    pub sent_twice: u64,
    /// Readings not taken because a device's memory was full.
    pub skipped: u64,
    /// Connections cut on purpose.
    pub reconnects: u64,
    /// Connections that ended otherwise or could not be made.
    pub failures: u64,
    /// Publishes refused with a reason code.
    pub refused: u64,
    /// Half of the acknowledgements came within this, in ms.
    pub ack_p50_ms: f64,
    /// 99 % of the acknowledgements came within this, in ms.
    pub ack_p99_ms: f64,
    /// The slowest acknowledgement, in ms.
    pub ack_max_ms: f64,
    /// Why the last connection failed.
    pub last_failure: Option<String>,
    /// The first few readings that are missing or duplicated.
    pub examples: Vec<String>,
}

impl Report {
    /// Whether the server kept its promise: nothing acknowledged is missing or doubled.
    pub fn holds(&self) -> bool {
        self.missing == 0 && self.duplicated == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: &dyn fmt::Display| writeln!(f, "{name:<22}{value:>12}");
        row("devices", &self.devices)?;
        row("seconds", &format_args!("{:.1}", self.elapsed_s))?;
        row("sent", &self.sent)?;
        row("acknowledged", &self.acknowledged)?;
        row("  a second", &format_args!("{:.0}", self.acknowledged_per_s))?;
        if self.lines_sent > 0 {
            row("log lines sent", &self.lines_sent)?;
            row("  acknowledged", &self.lines_acknowledged)?;
        }
        row("found", &self.found)?;
        row("missing", &self.missing)?;
        row("duplicated", &self.duplicated)?;
        row("found, never acked", &self.found_unacknowledged)?;
        row("resent", &self.resent)?;
        row("sent twice on purpose", &self.sent_twice)?;
        row("skipped, memory full", &self.skipped)?;
        row("connections cut", &self.reconnects)?;
        row("connections failed", &self.failures)?;
        row("publishes refused", &self.refused)?;
        row("ack p50 ms", &format_args!("{:.1}", self.ack_p50_ms))?;
        row("ack p99 ms", &format_args!("{:.1}", self.ack_p99_ms))?;
        row("ack max ms", &format_args!("{:.1}", self.ack_max_ms))?;
        if let Some(reason) = &self.last_failure {
            writeln!(f, "last failure: {reason}")?;
        }
        for example in &self.examples {
            writeln!(f, "{example}")?;
        }
        let verdict = if self.holds() { "every acknowledged reading is there once" } else { "THE PROMISE IS BROKEN" };
        write!(f, "ledger: {verdict}")
    }
}

impl Scenario {
    /// Enrols, runs, waits for the last acknowledgements, reads everything back and compares. `cancel` ends the run
    /// early; what was acknowledged until then is still checked.
    ///
    /// # Errors
    /// When a setting is out of bounds, the server is not there, refuses, or stays away at the end.
    pub async fn run(&self, cancel: CancellationToken, mut progress: impl FnMut(Progress)) -> Result<Report> {
        self.check()?;
        let client = Client::connect(&self.url, self.access.clone()).await?;
        let credentials = self.enrol(&client, &cancel, &mut progress).await?;
        let names = (0..self.devices).map(|index| self.device_id(index)).collect();
        let recorder = Recorder::new(names, self.ledger.as_deref())?;
        let (acknowledged, from) = mpsc::channel(RECORDER_QUEUE);
        let recording = tokio::task::spawn_blocking(move || recorder.run(from));
        let fleet = Fleet::start(self, credentials, Some(acknowledged))?;
        let counters = fleet.counters.clone();
        let started = Instant::now();
        fleet.last(self.duration, &cancel, &mut progress).await;
        let elapsed = started.elapsed();
        let ledger = joined(recording).await??;
        let verdict = self.verify(&client, &ledger, &counters, &mut progress).await?;
        if self.cleanup {
            self.clean(&client, &counters, &mut progress).await?;
        }
        Ok(self.report(&counters, elapsed, verdict))
    }

    /// The name of a device, by its index.
    pub fn device_id(&self, index: u32) -> String {
        format!("sim-{}-{index}", self.seed)
    }

    fn check(&self) -> Result<()> {
        let share = |value: f64| (0.0..=1.0).contains(&value);
        #[expect(clippy::cast_precision_loss, reason = "a bound")]
        let readings = self.rate * self.duration.as_secs_f64() / ledger::MAX_ENTRIES as f64;
        let rules = [
            ((1..=MAX_DEVICES).contains(&self.devices), format!("devices: expected 1 to {MAX_DEVICES}")),
            (self.rate > 0.0 && self.rate <= MAX_RATE, format!("rate: expected above 0 and up to {MAX_RATE} a second")),
            (self.log_rate >= 0.0 && self.log_rate <= MAX_RATE, format!("log-rate: expected 0 to {MAX_RATE} a second")),
            (self.payload_bytes <= MAX_PAYLOAD_BYTES, format!("payload-bytes: expected up to {MAX_PAYLOAD_BYTES}")),
            (
                !self.duration.is_zero() && self.duration <= MAX_DURATION,
                format!("duration: expected above 0 and up to {}d", MAX_DURATION.as_secs() / 86_400),
            ),
            (readings <= 1.0, format!("rate times duration: expected up to {} readings in a run", ledger::MAX_ENTRIES)),
            (
                self.faults.reconnects_per_minute >= 0.0 && self.faults.reconnects_per_minute <= 1e6,
                "reconnects-per-minute: expected 0 to 1000000".to_owned(),
            ),
            (share(self.faults.duplicates), "duplicates: expected a share from 0 to 1".to_owned()),
            (share(self.faults.late), "late: expected a share from 0 to 1".to_owned()),
            (split(&self.mqtt).is_some(), format!("mqtt {:?}: expected host:port", self.mqtt)),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, rule)) => Err(Error::Invalid(rule)),
            None => Ok(()),
        }
    }

    /// Credentials in the order of the devices. A cancelled enrolment enrols nothing more and fails.
    async fn enrol(
        &self,
        client: &Client,
        cancel: &CancellationToken,
        progress: &mut impl FnMut(Progress),
    ) -> Result<Vec<Credential>> {
        self.probe().await?;
        let names = stream::iter((0..self.devices).map(|index| self.device_id(index)));
        let enrolled = names.map(|name| async move { client.enrol(&name).await }).buffered(ENROLLING);
        let mut enrolled = std::pin::pin!(enrolled.take_until(cancel.cancelled()));
        let mut credentials = Vec::with_capacity(self.devices as usize);
        let total = u64::from(self.devices);
        while let Some(credential) = enrolled.try_next().await? {
            credentials.push(credential);
            progress(Progress::of(Phase::Enrolling, credentials.len() as u64, total, &Counters::default()));
        }
        if credentials.len() < self.devices as usize {
            return Err(Error::Invalid("cancelled while devices were being enrolled".into()));
        }
        Ok(credentials)
    }

    /// Says at once that nobody listens, rather than after a run of failed connections.
    async fn probe(&self) -> Result<()> {
        let failed = |reason: String| Error::Unreachable { address: format!("MQTT at {}", self.mqtt), reason };
        match timeout(PROBE, TcpStream::connect(&self.mqtt)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => Err(failed(format!("no answer within {} s", PROBE.as_secs()))),
        }
    }

    async fn verify(
        &self,
        client: &Client,
        ledger: &Ledger,
        counters: &Counters,
        progress: &mut impl FnMut(Progress),
    ) -> Result<Verdict> {
        let total = ledger.devices().count() as u64;
        ledger.verify(client, |done| progress(Progress::of(Phase::Verifying, done as u64, total, counters))).await
    }

    async fn clean(&self, client: &Client, counters: &Counters, progress: &mut impl FnMut(Progress)) -> Result<()> {
        let names = stream::iter((0..self.devices).map(|index| self.device_id(index)));
        let mut deleted = names.map(|name| async move { client.delete(&name).await }).buffer_unordered(ENROLLING);
        let mut done = 0;
        while deleted.try_next().await?.is_some() {
            done += 1;
            progress(Progress::of(Phase::Cleaning, done, u64::from(self.devices), counters));
        }
        Ok(())
    }

    fn report(&self, counters: &Counters, elapsed: Duration, verdict: Verdict) -> Report {
        let elapsed_s = elapsed.as_secs_f64();
        let acknowledged = get(&counters.acknowledged);
        let ms = |taken: Duration| taken.as_secs_f64() * 1000.0;
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let acknowledged_per_s = acknowledged as f64 / elapsed_s.max(0.001);
        Report {
            seed: self.seed,
            devices: self.devices,
            elapsed_s,
            sent: get(&counters.sent),
            acknowledged,
            acknowledged_per_s,
            lines_sent: get(&counters.lines_sent),
            lines_acknowledged: get(&counters.lines_acknowledged),
            found: verdict.found,
            missing: verdict.missing,
            duplicated: verdict.duplicated,
            found_unacknowledged: verdict.unacknowledged,
            resent: get(&counters.resent),
            sent_twice: get(&counters.duplicates),
            skipped: get(&counters.skipped),
            reconnects: get(&counters.reconnects),
            failures: get(&counters.failures),
            refused: get(&counters.refused),
            ack_p50_ms: ms(counters.latency.percentile(0.5)),
            ack_p99_ms: ms(counters.latency.percentile(0.99)),
            ack_max_ms: ms(counters.latency.max()),
            last_failure: counters.last_failure(),
            examples: verdict.examples,
        }
    }
}

impl Progress {
    fn of(phase: Phase, done: u64, total: u64, counters: &Counters) -> Self {
        Self {
            phase,
            done,
            total,
            online: get(&counters.online),
            sent: get(&counters.sent),
            acknowledged: get(&counters.acknowledged),
        }
    }
}

/// A fleet that goes on until it is stopped, with counters to watch.
pub struct Simulation {
    fleet: Fleet,
}

impl Simulation {
    /// Enrols the devices and starts them. `cancel` ends the enrolment.
    ///
    /// # Errors
    /// When a setting is out of bounds, the server is not there, or refuses.
    pub async fn start(
        scenario: &Scenario,
        cancel: &CancellationToken,
        mut progress: impl FnMut(Progress),
    ) -> Result<Self> {
        scenario.check()?;
        let client = Client::connect(&scenario.url, scenario.access.clone()).await?;
        let credentials = scenario.enrol(&client, cancel, &mut progress).await?;
        let endless = Scenario { duration: Duration::MAX, ..scenario.clone() };
        Ok(Self { fleet: Fleet::start(&endless, credentials, None)? })
    }

    /// What the fleet counts while it runs.
    pub fn counters(&self) -> &Counters {
        &self.fleet.counters
    }

    /// Lets the devices deliver what they have and say good-bye, for `patience` at most.
    pub async fn stop(mut self, patience: Duration) {
        self.fleet.drain(patience).await;
    }
}

/// The tasks of a running fleet. Dropping it ends them.
struct Fleet {
    devices: JoinSet<()>,
    counters: Arc<Counters>,
    finished: Arc<OnceLock<Instant>>,
    finish: CancellationToken,
    abort: CancellationToken,
}

impl Fleet {
    fn start(
        scenario: &Scenario,
        credentials: Vec<Credential>,
        ledger: Option<mpsc::Sender<Acknowledged>>,
    ) -> Result<Self> {
        let (host, port) = split(&scenario.mqtt).ok_or_else(|| Error::Invalid("mqtt: expected host:port".into()))?;
        let counters = Arc::<Counters>::default();
        let (finish, abort) = (CancellationToken::new(), CancellationToken::new());
        let finished = Arc::<OnceLock<Instant>>::default();
        let start = Instant::now();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let setup = Arc::new(Setup {
            host: host.to_owned(),
            port,
            seed: scenario.seed,
            payload_bytes: scenario.payload_bytes,
            interval: Duration::from_secs_f64(f64::from(scenario.devices) / scenario.rate),
            line_interval: (scenario.log_rate > 0.0).then(|| {
                Duration::try_from_secs_f64(f64::from(scenario.devices) / scenario.log_rate * Level::Info.share())
                    .unwrap_or(LONGEST_INTERVAL)
                    .min(LONGEST_INTERVAL)
            }),
            start,
            start_ms: i64::try_from(now.as_millis()).unwrap_or_default(),
            end: start.checked_add(scenario.duration),
            finished: finished.clone(),
            backlog: (BACKLOG_BYTES / scenario.payload_bytes.max(128) / credentials.len().max(1))
                .clamp(BACKLOG.0, BACKLOG.1),
            kept_lines: (KEPT_LINES_BYTES / LINE_BYTES / credentials.len().max(1)).clamp(KEPT_LINES.0, KEPT_LINES.1),
            faults: scenario.faults,
            cut_every: cut_every(scenario),
            counters: counters.clone(),
            ledger,
            connecting: Semaphore::new(CONNECTING),
            finish: finish.clone(),
            abort: abort.clone(),
        });
        let mut devices = JoinSet::new();
        for (index, credential) in (0..).zip(credentials) {
            // Spread evenly over the interval: the whole fleet sends at a steady rate.
            let offset = Duration::from_secs_f64(f64::from(index) / scenario.rate);
            devices.spawn(Device::new(index, offset, &scenario.device_id(index), credential, setup.clone()).run());
        }
        Ok(Self { devices, counters, finished, finish, abort })
    }

    /// Runs for `duration` or until `cancel`, then drains.
    async fn last(mut self, duration: Duration, cancel: &CancellationToken, progress: &mut impl FnMut(Progress)) {
        let counters = self.counters.clone();
        let abort = self.abort.clone();
        watch(Phase::Running, duration, &counters, progress, async {
            tokio::select! {
                () = sleep(duration) => {}
                () = cancel.cancelled() => {}
                () = abort.cancelled() => {}
            }
        })
        .await;
        watch(Phase::Draining, DRAIN, &counters, progress, self.drain(DRAIN)).await;
    }

    /// Lets the devices deliver what they have; after `patience` they are cut off.
    async fn drain(&mut self, patience: Duration) {
        self.finished.get_or_init(Instant::now);
        self.finish.cancel();
        let gone = async { while self.devices.join_next().await.is_some() {} };
        if timeout(patience, gone).await.is_err() {
            self.abort.cancel();
            while self.devices.join_next().await.is_some() {}
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        self.abort.cancel();
    }
}

/// Tells `progress` now and then until `work` is done.
async fn watch(
    phase: Phase,
    total: Duration,
    counters: &Counters,
    progress: &mut impl FnMut(Progress),
    work: impl Future<Output = ()>,
) {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let started = Instant::now();
    let mut work = std::pin::pin!(work);
    let mut tick = interval(TICK);
    loop {
        tokio::select! {
            () = &mut work => return,
            _ = tick.tick() => {
                let done = started.elapsed().min(total);
                progress(Progress::of(phase, ms(done), ms(total), counters));
            }
        }
    }
}

fn cut_every(scenario: &Scenario) -> Option<Duration> {
    let per_device_and_second = scenario.faults.reconnects_per_minute / 60.0 / f64::from(scenario.devices);
    (per_device_and_second > 0.0)
        .then(|| Duration::try_from_secs_f64(1.0 / per_device_and_second).unwrap_or(Duration::MAX))
}

/// `host:port` or `[v6]:port`; the brackets go.
fn split(address: &str) -> Option<(&str, u16)> {
    let (host, port) = address.rsplit_once(':')?;
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = port.parse().ok().filter(|port| *port != 0)?;
    (!host.is_empty()).then_some((host, port))
}

/// A panic of the task is a panic here.
async fn joined<T>(task: JoinHandle<T>) -> Result<T> {
    match task.await {
        Ok(value) => Ok(value),
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
