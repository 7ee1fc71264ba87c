//! The server's own log as lines of a device: tracing → bounded queue → [`Intake`] → COMMIT (ADR 17).
//!
//! Holds: whoever logs never waits; what finds no room is counted and not kept. What the keeping itself logs is not kept, so that
//! there is no loop. Lines are those of the device that `server_log.device` names, and are read by whoever may read its lines.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fleet_core::clock::Clock;
use fleet_core::config::{self, Config};
use fleet_core::device;
use fleet_core::id::{DeviceId, DeviceKey, TenantId};
use fleet_core::level::Level;
use fleet_core::log::intake::{Bounds, Intake, Metrics, NotStored};
use fleet_core::log::{Rate, Record, SERVER_WRITER};
use fleet_core::tenancy;
use prometheus::{IntCounter, Registry};
use serde_json::{Map, Value};
use sqlx::PgPool;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::Context;

/// Lines that wait to be kept; beyond it they are dropped.
const MAX_WAITING: usize = 2000;
/// Lines kept at once.
const MAX_BATCH: usize = 500;
/// Before what could not be kept is tried again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// How long what waits may take to be kept when the server stops.
const STOP_WITHIN: Duration = Duration::from_secs(2);
/// What the keeping itself may log.
const NOT_KEPT: [&str; 3] = ["fleet_core::log", "sqlx", "muster::server_log"];

/// Takes what is logged.
pub(crate) struct Tap {
    lines: mpsc::Sender<Record>,
    dropped: Arc<AtomicU64>,
    least: Level,
    clock: Clock,
}

/// What was taken and is to be kept.
pub(crate) struct Taken {
    lines: mpsc::Receiver<Record>,
    dropped: Arc<AtomicU64>,
    tenant: TenantId,
    device: DeviceId,
}

/// Both ends, where the settings name a device.
pub(crate) fn tap(settings: &config::ServerLog) -> fleet_core::Result<Option<(Tap, Taken)>> {
    let Some((tenant, device)) = settings.device()? else { return Ok(None) };
    let (lines, taken) = mpsc::channel(MAX_WAITING);
    let dropped = Arc::<AtomicU64>::default();
    let tap = Tap { lines, dropped: dropped.clone(), least: settings.level, clock: Clock::system() };
    Ok(Some((tap, Taken { lines: taken, dropped, tenant, device })))
}

/// What is asked of those who log, so that what is not kept costs nothing.
pub(crate) fn filter(settings: &config::ServerLog) -> LevelFilter {
    match settings.level {
        Level::Trace => LevelFilter::TRACE,
        Level::Debug => LevelFilter::DEBUG,
        Level::Info => LevelFilter::INFO,
        Level::Warn => LevelFilter::WARN,
        Level::Error | Level::Fatal => LevelFilter::ERROR,
    }
}

impl<S: Subscriber> Layer<S> for Tap {
    fn on_event(&self, event: &Event<'_>, _: Context<'_, S>) {
        let (level, target) = (level_of(*event.metadata().level()), event.metadata().target());
        if level < self.least || NOT_KEPT.iter().any(|own| target.starts_with(own)) {
            return;
        }
        let mut said = Said::default();
        event.record(&mut said);
        let record = Record {
            ts_ms: Some(self.clock.now_ms()),
            level,
            target: Some(target.to_owned()),
            message: said.message,
            fields: said.fields.into_iter().collect(),
            ..Record::default()
        };
        if self.lines.try_send(record).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn level_of(level: tracing::Level) -> Level {
    match level {
        tracing::Level::TRACE => Level::Trace,
        tracing::Level::DEBUG => Level::Debug,
        tracing::Level::INFO => Level::Info,
        tracing::Level::WARN => Level::Warn,
        tracing::Level::ERROR => Level::Error,
    }
}

/// What an event says.
#[derive(Default)]
struct Said {
    message: String,
    fields: Map<String, Value>,
}

impl Said {
    fn note(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => drop(self.fields.insert(name.to_owned(), value)),
        }
    }
}

impl Visit for Said {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.note(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.note(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.note(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.note(field, value.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.note(field, value.into());
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.note(field, format!("{value:?}").into());
    }
}

/// The task that keeps what was taken.
pub(crate) struct Keeper {
    task: JoinHandle<()>,
    stop: tokio_util::sync::CancellationToken,
}

impl Keeper {
    pub(crate) fn start(
        taken: Taken,
        db: &PgPool,
        config: &Config,
        clock: &Clock,
        registry: &Registry,
    ) -> prometheus::Result<Self> {
        let metrics = Metrics::register("muster_server_log", registry)?;
        let dropped =
            IntCounter::new("muster_server_log_dropped_total", "Lines of the server's own log that found no room")?;
        registry.register(Box::new(dropped.clone()))?;
        let bounds = Bounds {
            queue_bytes: config.otlp.queue_bytes,
            batch_lines: MAX_BATCH,
            max_ahead_ms: config.ingest.max_ahead_ms,
            suppressed_every: Duration::from_secs(config.ingest.log_suppressed_s),
        };
        // What waits is bounded already.
        let (intake, _) = Intake::start(SERVER_WRITER, db.clone(), clock.clone(), bounds, Rate::off(), metrics);
        let stop = tokio_util::sync::CancellationToken::new();
        let task = tokio::spawn(keep(taken, db.clone(), intake, dropped, stop.clone()));
        Ok(Self { task, stop })
    }

    /// Keeps what waits, as far as there is time.
    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        if timeout(STOP_WITHIN, &mut self.task).await.is_err() {
            self.task.abort();
        }
    }
}

async fn keep(
    mut taken: Taken,
    db: PgPool,
    intake: Intake,
    dropped: IntCounter,
    stop: tokio_util::sync::CancellationToken,
) {
    let mut lines = Vec::new();
    loop {
        let stopping = tokio::select! {
            biased;
            some = taken.lines.recv_many(&mut lines, MAX_BATCH) => some == 0,
            () = stop.cancelled() => true,
        };
        if stopping {
            return;
        }
        while let Err(why) = store(&taken, &db, &intake, &lines).await {
            dropped.inc_by(taken.dropped.swap(0, Ordering::Relaxed));
            tracing::debug!(%why, "the server's own log is kept later");
            sleep(RETRY_AFTER).await;
        }
        lines.clear();
        dropped.inc_by(taken.dropped.swap(0, Ordering::Relaxed));
    }
}

/// Why lines are not kept yet.
#[derive(Debug, thiserror::Error)]
enum NotYet {
    #[error("no enabled device of that name")]
    NoDevice,
    #[error(transparent)]
    Database(#[from] fleet_core::Error),
    #[error(transparent)]
    NotStored(#[from] NotStored),
}

async fn store(taken: &Taken, db: &PgPool, intake: &Intake, lines: &[Record]) -> Result<(), NotYet> {
    let device = device_of(taken, db).await?;
    let lines = lines.iter().map(|line| (device, line.clone())).collect();
    match intake.store(lines).await {
        // It would be refused again.
        Ok(_) | Err(NotStored::Refused) => Ok(()),
        Err(why) => Err(why.into()),
    }
}

/// Looked up each time: it may be enrolled later, disabled, or deleted.
async fn device_of(taken: &Taken, db: &PgPool) -> Result<DeviceKey, NotYet> {
    let mut db = db.acquire().await.map_err(fleet_core::Error::from)?;
    let tenant = tenancy::find(&mut db, &taken.tenant).await?;
    let known = device::enabled_among(&mut db, tenant.key, std::slice::from_ref(&taken.device)).await?;
    known.first().map(|(_, key)| *key).ok_or(NotYet::NoDevice)
}

#[cfg(test)]
mod tests {
    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[test]
    fn what_is_logged_is_taken_with_its_fields_and_never_waited_for() {
        let settings = config::ServerLog { device: "main/muster-1".into(), level: Level::Info };
        let (tap, mut taken) = tap(&settings).unwrap().unwrap();
        tracing::subscriber::with_default(tracing_subscriber::registry().with(tap), || {
            tracing::warn!(target: "api", { device.id = "boiler-1", count = 3, ok = true }, "something {}", "happened");
            tracing::debug!(target: "api", "too little");
            tracing::error!(target: "fleet_core::log::intake", "what the keeping says");
            for _ in 0..MAX_WAITING {
                tracing::info!(target: "api", "many");
            }
        });
        let line = taken.lines.try_recv().unwrap();
        assert_eq!((line.level, line.message.as_str()), (Level::Warn, "something happened"));
        let fields = line.fields.into_iter().collect::<Map<_, _>>();
        assert_eq!(Value::Object(fields), serde_json::json!({ "device.id": "boiler-1", "count": 3, "ok": true }));
        assert_eq!(taken.lines.try_recv().unwrap().message, "many");
        assert_eq!(taken.dropped.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn no_device_no_tap_and_a_wrong_one_is_named() {
        let settings = |device: &str| config::ServerLog { device: device.into(), level: Level::Warn };
        assert!(tap(&settings("")).unwrap().is_none());
        for wrong in ["muster-1", "main/", "/x", "main/_x", "a/b/c"] {
            assert!(tap(&settings(wrong)).is_err(), "{wrong}");
        }
    }
}
