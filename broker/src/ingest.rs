//! From a topic to a row: bounded queue → writer → one transaction → COMMIT → the acknowledgement is released.
//!
//! Holds: nothing is acknowledged before its COMMIT; what one device sends is committed in order; a full queue makes
//! its senders wait and loses nothing; while the database is away a writer keeps its batch and tries again; one
//! message the database refuses goes to the dead letters and takes nothing else with it (ADR 4).
//! Subscribers, latest values and counters are fed from the committed batch, never before. What a device logs beyond its rate is counted in
//! the transaction that takes the rest of its batch, and told in a line of its own.
//! Ignorant of: sockets and sessions, but for the mailbox an acknowledgement goes to.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::dead_letter::{self, DeadLetter};
use fleet_core::error::is_refused;
use fleet_core::id::{DeadLetterId, DeviceId, DeviceKey, TenantKey};
use fleet_core::latest::Tracker;
use fleet_core::log;
use fleet_core::status::{self, Change};
use fleet_core::telemetry::{self, Batch, Limits, Rejected, Shapes};
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::metrics::{Limit, Metrics};
use crate::queue::{self, Held, Queue};
use crate::store::{self as sessions, Incoming};

/// First wait before a failed commit is tried again; doubled up to [`RETRY_AT_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait between two tries.
const RETRY_AT_MOST: Duration = Duration::from_secs(1);
/// A database that has not answered by then is away: the same rows are sent again over a new connection.
const COMMIT_WITHIN: Duration = Duration::from_secs(30);
/// Latest values and states are written that often.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// Why a message of a gateway is put aside.
const NOT_A_CHILD: &str = "the gateway may not speak for this device: it is disabled, or not behind this gateway";

/// The device whose message it is.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sender {
    pub(crate) tenant: TenantKey,
    pub(crate) device: DeviceKey,
    pub(crate) id: DeviceId,
}

/// Something to be committed.
pub(crate) struct Item {
    sender: Arc<Sender>,
    received_ms: i64,
    what: What,
}

/// What an item is.
pub(crate) enum What {
    /// Readings, as a device sent them.
    Telemetry(Incoming),
    /// Log lines, as a device sent them.
    Logs(Incoming),
    /// A state, as a device sent it.
    Status(Incoming),
    /// What a gateway sent for a device that it may not speak for.
    Refused(Incoming),
    /// A state, as the broker saw it.
    Seen(Change),
}

impl Item {
    pub(crate) fn new(sender: Arc<Sender>, received_ms: i64, what: What) -> Self {
        Self { sender, received_ms, what }
    }

    fn message(&self) -> Option<&Incoming> {
        match &self.what {
            What::Telemetry(message) | What::Logs(message) | What::Status(message) | What::Refused(message) => {
                Some(message)
            }
            What::Seen(_) => None,
        }
    }

    fn bytes(&self) -> usize {
        self.message().map_or(0, |message| message.publish.payload.len())
    }
}

/// The way in: one bounded queue for each writer.
pub(crate) struct Ingest {
    queues: Vec<Queue<Item>>,
    metrics: Metrics,
}

impl Ingest {
    fn queue(&self, device: DeviceKey) -> &Queue<Item> {
        let index = usize::try_from(device.0.unsigned_abs()).unwrap_or_default() % self.queues.len();
        &self.queues[index]
    }

    /// Hands an item to its device's writer without waiting.
    ///
    /// # Errors
    /// The item comes back when the queue is full: [`Ingest::wait`] for room, and read nothing meanwhile.
    #[expect(clippy::result_large_err, reason = "the item itself comes back; a box would cost every message one")]
    pub(crate) fn offer(&self, item: Item) -> Result<(), Item> {
        let bytes = item.bytes();
        self.queue(item.sender.device).offer(item, bytes)?;
        self.metrics.queued.inc();
        Ok(())
    }

    /// Hands an item to its device's writer, waiting for room as long as it takes.
    pub(crate) async fn wait(&self, item: Item) {
        let Err(item) = self.offer(item) else { return };
        self.metrics.hit(Limit::IngestQueue);
        let bytes = item.bytes();
        // The writer is gone only when the broker stops; what it has not taken was not acknowledged.
        if self.queue(item.sender.device).wait(item, bytes).await {
            self.metrics.queued.inc();
        }
    }
}

/// Whether the writers can commit.
#[derive(Clone, Debug)]
pub struct Health {
    away: Vec<Arc<AtomicBool>>,
}

impl Health {
    /// The same, and one more that must not be away.
    #[must_use]
    pub(crate) fn with(mut self, is_away: Arc<AtomicBool>) -> Self {
        self.away.push(is_away);
        self
    }

    /// `true` while every writer's last try succeeded.
    pub fn is_ready(&self) -> bool {
        self.away.iter().all(|away| !away.load(Ordering::Relaxed))
    }
}

/// The running writers.
pub(crate) struct Writers {
    tasks: Vec<JoinHandle<()>>,
    health: Health,
}

impl Writers {
    pub(crate) fn health(&self) -> Health {
        self.health.clone()
    }

    /// Waits for the writers to commit what they hold; they end when every [`Ingest`] is gone.
    pub(crate) async fn stop(self, within: Duration) {
        let deadline = Instant::now() + within;
        for mut task in self.tasks {
            if timeout_at(deadline, &mut task).await.is_err() {
                tracing::warn!("a writer could not commit its last batch in time; none of it was acknowledged");
                task.abort();
            }
        }
    }
}

/// Starts the writers. A device always belongs to the same one, so its messages are committed in order.
pub(crate) fn start(
    settings: &config::Ingest,
    options: &PgConnectOptions,
    session_store: &sessions::Store,
    clock: &Clock,
    metrics: &Metrics,
) -> (Ingest, Writers) {
    let mut queues = Vec::new();
    let mut tasks = Vec::new();
    let mut away = Vec::new();
    for index in 0..settings.writers {
        let (items, taken) = queue::bounded(settings.queue_messages, settings.queue_bytes);
        let is_away = Arc::new(AtomicBool::new(false));
        let writer = Writer {
            index,
            items: taken,
            store: Store::new(index, settings, options.clone(), clock.clone()),
            sessions: session_store.clone(),
            metrics: metrics.clone(),
            is_away: is_away.clone(),
            settings: settings.clone(),
        };
        tasks.push(tokio::spawn(writer.run()));
        queues.push(items);
        away.push(is_away);
    }
    (Ingest { queues, metrics: metrics.clone() }, Writers { tasks, health: Health { away } })
}

/// Takes from one queue, commits, releases the acknowledgements.
struct Writer {
    index: usize,
    items: mpsc::Receiver<Held<Item>>,
    store: Store,
    sessions: sessions::Store,
    metrics: Metrics,
    is_away: Arc<AtomicBool>,
    settings: config::Ingest,
}

impl Writer {
    async fn run(mut self) {
        let mut flush = tokio::time::interval(FLUSH_EVERY);
        flush.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut items: Vec<Held<Item>> = Vec::with_capacity(self.settings.batch_messages);
        loop {
            tokio::select! {
                biased;
                _ = flush.tick() => self.flush(false).await,
                taken = self.items.recv() => match taken {
                    Some(first) => {
                        let began = Instant::now();
                        self.fill(first, &mut items).await;
                        let lost = self.commit(&items).await;
                        self.metrics.commit_seconds.observe(began.elapsed().as_secs_f64());
                        self.release(&mut items, &lost).await;
                        if self.store.tracker.wants_flush() {
                            self.flush(false).await;
                        }
                    }
                    None => break,
                },
            }
        }
        self.flush(true).await;
    }

    /// Gathers a batch: until it is full, or its first message has waited long enough.
    async fn fill(&mut self, first: Held<Item>, items: &mut Vec<Held<Item>>) {
        let deadline = Instant::now() + Duration::from_millis(self.settings.batch_wait_ms);
        let mut bytes = first.item.bytes();
        items.push(first);
        while items.len() < self.settings.batch_messages && bytes < self.settings.batch_bytes {
            let held = match self.items.try_recv() {
                Ok(held) => held,
                Err(_) => match timeout_at(deadline, self.items.recv()).await {
                    Ok(Some(held)) => held,
                    Ok(None) | Err(_) => return,
                },
            };
            bytes += held.item.bytes();
            items.push(held);
        }
    }

    /// Commits the batch, however long the database is away. What it refuses for good is narrowed down by halves
    /// until the one message at fault stands alone and goes to the dead letters. Returns the places of those that the
    /// database would not even keep there: they must not be acknowledged.
    async fn commit(&mut self, items: &[Held<Item>]) -> Vec<usize> {
        self.metrics.batch_size.observe(count(items.len()));
        let mut lost = Vec::new();
        let whole = 0..items.len();
        let mut parts = vec![whole];
        while let Some(part) = parts.pop() {
            if self.try_part(&items[part.clone()]).await.is_ok() {
                continue;
            }
            let middle = part.start + part.len() / 2;
            if middle > part.start {
                parts.extend([middle..part.end, part.start..middle]);
            // Once more: a row can be refused only because the partition of its day was just being made.
            } else if let Err(refusal) = self.try_part(&items[part.clone()]).await
                && !self.put_aside(&items[part.start].item, &refusal).await
            {
                lost.push(part.start);
            }
        }
        lost
    }

    async fn try_part(&mut self, part: &[Held<Item>]) -> Result<(), String> {
        let mut sorted = self.store.sort(part);
        let committed = self.until_committed(&mut sorted).await;
        self.store.reuse(sorted);
        committed
    }

    /// Keeps a message the database refuses as a dead letter; `false` when it refuses that too.
    async fn put_aside(&mut self, item: &Item, refusal: &str) -> bool {
        let mut sorted = Sorted::refused(item, refusal);
        let kept = self.until_committed(&mut sorted).await;
        if let Err(refusal) = &kept {
            tracing::error!(refusal, device.id = %item.sender.id, "the database refused even the dead letter");
        }
        kept.is_ok()
    }

    /// Tries until the database has committed, or refused for good: then the error says why.
    async fn until_committed(&mut self, sorted: &mut Sorted) -> Result<(), String> {
        let mut wait = RETRY_FIRST;
        loop {
            let committed = timeout(COMMIT_WITHIN, self.store.commit(sorted)).await;
            match committed.unwrap_or_else(|_| Err(fleet_core::Error::Database(sqlx::Error::PoolTimedOut))) {
                Ok(stored) => {
                    sorted.count(&stored, &self.metrics);
                    self.found_back();
                    return Ok(());
                }
                Err(fleet_core::Error::Database(error)) if is_refused(&error) => {
                    tracing::warn!(error = %Chain(&error), "the database refused a batch");
                    return Err(Chain(&error).to_string());
                }
                Err(error) => {
                    self.found_away(&error);
                    sleep(wait).await;
                    wait = (wait * 2).min(RETRY_AT_MOST);
                }
            }
        }
    }

    fn found_back(&self) {
        if self.is_away.swap(false, Ordering::Relaxed) {
            tracing::info!(writer = self.index, "the database is back");
        }
    }

    fn found_away(&mut self, error: &fleet_core::Error) {
        self.metrics.retries.inc();
        self.store.disconnect();
        if !self.is_away.swap(true, Ordering::Relaxed) {
            let error = Chain(error);
            tracing::error!(writer = self.index, %error, "cannot commit: trying until the database is back");
        }
    }

    /// After the COMMIT: subscribers and acknowledgements; what durable sessions are to get is kept before the latter.
    /// Whose message was not kept is disconnected instead.
    async fn release(&mut self, items: &mut Vec<Held<Item>>, lost: &[usize]) {
        self.metrics.queued.sub(i64::try_from(items.len()).unwrap_or_default());
        for (place, held) in items.drain(..).enumerate() {
            let is_kept = !lost.contains(&place);
            let (incoming, is_routed) = match held.item.what {
                What::Telemetry(incoming) | What::Logs(incoming) | What::Status(incoming) => (incoming, is_kept),
                What::Refused(incoming) => (incoming, false),
                What::Seen(_) => continue,
            };
            match &incoming.receipt {
                Some(receipt) if !is_kept => receipt.fail(),
                Some(_) => self.metrics.acknowledged.inc(),
                None => {}
            }
            if is_routed {
                self.sessions.publish(incoming).await;
            } else if let Some(receipt) = incoming.receipt.filter(|_| is_kept) {
                receipt.settle();
            }
        }
    }

    /// Writes newest values: of the devices that wait longest, or at the end of all. One writer tells of suppressed lines as well, also
    /// of those that another process counted before it was killed.
    async fn flush(&mut self, all: bool) {
        let mut flushed = self.store.flush(all, &self.metrics).await;
        if self.index == 0 && flushed.is_ok() {
            flushed = self.store.tell_suppressed().await;
        }
        if let Err(error) = flushed {
            tracing::debug!(writer = self.index, %error, "latest values could not be written yet");
            self.store.disconnect();
        }
    }
}

/// An error with its causes, in one line.
struct Chain<'a>(&'a dyn std::error::Error);

impl std::fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

#[expect(clippy::cast_precision_loss, reason = "a batch is far smaller than 2^52")]
fn count(n: usize) -> f64 {
    n as f64
}

/// A writer's connection and what it remembers between batches.
struct Store {
    /// Which writer's, in the rows of log lines.
    writer: i16,
    options: PgConnectOptions,
    connection: Option<PgConnection>,
    clock: Clock,
    limits: Limits,
    line_limits: log::Limits,
    line_rate: log::Rate,
    suppressed_every: Duration,
    batch: Batch,
    shapes: Shapes,
    tracker: Tracker,
}

impl Store {
    fn new(writer: usize, settings: &config::Ingest, options: PgConnectOptions, clock: Clock) -> Self {
        let limits = Limits {
            max_readings: settings.max_readings,
            max_metrics: settings.max_metrics,
            max_ahead_ms: settings.max_ahead_ms,
        };
        Self {
            writer: i16::try_from(writer).expect("ingest.writers is at most 64"),
            options,
            connection: None,
            clock,
            limits,
            line_limits: log::Limits { max_lines: settings.max_lines, max_ahead_ms: settings.max_ahead_ms },
            line_rate: log::Rate::of(settings),
            suppressed_every: Duration::from_secs(settings.log_suppressed_s),
            batch: Batch::new(),
            shapes: Shapes::new(settings.max_shapes),
            tracker: Tracker::new(settings.max_tracked_devices),
        }
    }

    fn disconnect(&mut self) {
        self.connection = None;
        self.shapes.forget();
    }

    /// Decodes each message once; a retry commits the same rows under the same ids. Part of a batch that was refused draws on the
    /// rates of its devices once more.
    fn sort(&mut self, items: &[Held<Item>]) -> Sorted {
        let mut sorted = Sorted::new(std::mem::take(&mut self.batch));
        for held in items {
            sorted.add(&held.item, &self.limits, (&self.line_limits, &mut self.line_rate));
        }
        sorted.unlimited = self.line_rate.take_unlimited();
        sorted
    }

    async fn connection(&mut self) -> fleet_core::Result<&mut PgConnection> {
        if self.connection.is_none() {
            self.connection = Some(PgConnection::connect_with(&self.options).await?);
        }
        Ok(self.connection.as_mut().expect("made just now"))
    }

    /// Writes the lines that tell of suppressed ones, where it is time.
    async fn tell_suppressed(&mut self) -> fleet_core::Result<()> {
        let (writer, now_ms, every) = (self.writer, self.clock.now_ms(), self.suppressed_every);
        let mut tx = self.connection().await?.begin().await?;
        log::suppressed::tell(&mut tx, writer, now_ms, every).await?;
        Ok(tx.commit().await?)
    }

    /// One transaction for all of it; readings alone are one statement, which is its own transaction, and so are log lines alone.
    async fn commit(&mut self, sorted: &mut Sorted) -> fleet_core::Result<Stored> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => self.connection.insert(PgConnection::connect_with(&self.options).await?),
        };
        telemetry::prepare(connection, &mut self.shapes, &mut sorted.batch).await?;
        log::prepare(connection, &mut sorted.lines).await?;
        let now_ms = self.clock.now_ms();
        let is_bare = sorted.changes.is_empty() && sorted.letters.is_empty() && sorted.lines.suppressed() == 0;
        let stored = if is_bare && sorted.lines.is_empty() {
            let readings = telemetry::insert_batch(connection, &sorted.batch).await?;
            Stored { readings, ..Stored::default() }
        } else if is_bare && sorted.batch.is_empty() {
            let lines = log::insert_batch(connection, self.writer, &sorted.lines).await?;
            Stored { lines, ..Stored::default() }
        } else {
            let mut tx = connection.begin().await?;
            let readings = telemetry::insert_batch(&mut tx, &sorted.batch).await?;
            log::suppressed::note(&mut tx, &sorted.lines, now_ms).await?;
            let lines = log::insert_batch(&mut tx, self.writer, &sorted.lines).await?;
            let versions_left_out = status::record(&mut tx, &sorted.changes).await?;
            dead_letter::insert(&mut tx, &sorted.letters).await?;
            tx.commit().await?;
            Stored { readings, lines, versions_left_out }
        };
        self.tracker.note(&sorted.batch);
        self.tracker.note_changes(&sorted.changes);
        Ok(stored)
    }

    /// Takes the columns back, so that the next batch need not allocate them.
    fn reuse(&mut self, sorted: Sorted) {
        self.batch = sorted.batch;
    }

    async fn flush(&mut self, all: bool, metrics: &Metrics) -> fleet_core::Result<()> {
        let Some(connection) = &mut self.connection else { return Ok(()) };
        let flushed =
            if all { self.tracker.flush(connection).await? } else { self.tracker.flush_some(connection).await? };
        metrics.untracked.inc_by(flushed.skipped);
        metrics.metrics_dropped.inc_by(flushed.metrics_dropped);
        metrics.evicted.inc_by(flushed.evicted);
        metrics.full_shapes.set(i64::try_from(self.shapes.full_tenants()).unwrap_or(i64::MAX));
        Ok(())
    }
}

/// What was new of a batch.
#[derive(Default)]
struct Stored {
    readings: u64,
    lines: u64,
    /// Versions of firmware that nobody is told the age of.
    versions_left_out: u64,
}

/// A batch, sorted by what becomes of it.
struct Sorted {
    batch: Batch,
    lines: log::Batch,
    changes: Vec<Change>,
    letters: Vec<DeadLetter>,
    telemetry: u64,
    logs: u64,
    status: u64,
    /// Lines let through as their devices found no room among those whose rate is known.
    unlimited: u64,
}

impl Sorted {
    fn new(mut batch: Batch) -> Self {
        batch.clear();
        let lines = log::Batch::default();
        let (changes, letters) = (Vec::new(), Vec::new());
        Self { batch, lines, changes, letters, telemetry: 0, logs: 0, status: 0, unlimited: 0 }
    }

    /// A message the database refuses, as the dead letter it becomes.
    fn refused(item: &Item, refusal: &str) -> Self {
        let mut sorted = Self::new(Batch::new());
        if let Some(message) = item.message() {
            let reason = format!("the database refused it: {refusal}");
            sorted.put_aside(item, message, Rejected { reason, payload: message.publish.payload.to_vec() });
        }
        sorted
    }

    fn add(&mut self, item: &Item, limits: &Limits, (line_limits, rate): (&log::Limits, &mut log::Rate)) {
        let Sender { tenant, device, .. } = *item.sender;
        match &item.what {
            What::Seen(change) => self.changes.push(change.clone()),
            What::Telemetry(message) => {
                self.telemetry += 1;
                let payload = &message.publish.payload;
                for rejected in self.batch.push(tenant, device, payload, item.received_ms, limits) {
                    self.put_aside(item, message, rejected);
                }
            }
            What::Logs(message) => {
                self.logs += 1;
                let payload = &message.publish.payload;
                for rejected in self.lines.push_within(device, payload, item.received_ms, line_limits, rate) {
                    self.put_aside(item, message, rejected);
                }
            }
            What::Refused(message) => {
                let payload = message.publish.payload.to_vec();
                self.put_aside(item, message, Rejected { reason: NOT_A_CHILD.to_owned(), payload });
            }
            What::Status(message) => {
                self.status += 1;
                let payload = &message.publish.payload;
                // An empty retained message forgets the retained one (MQTT 5 §3.3.1.3); it reports nothing.
                if payload.is_empty() {
                    return;
                }
                match Change::decode(device, payload, item.received_ms) {
                    Ok(change) => self.changes.push(change),
                    Err(reason) => self.put_aside(item, message, Rejected { reason, payload: payload.to_vec() }),
                }
            }
        }
    }

    fn put_aside(&mut self, item: &Item, message: &Incoming, rejected: Rejected) {
        self.letters.push(DeadLetter {
            id: DeadLetterId::new(),
            tenant: item.sender.tenant,
            device: item.sender.id.clone(),
            topic: message.publish.topic.to_string(),
            reason: rejected.reason,
            payload: rejected.payload.into(),
            received_ms: item.received_ms,
        });
    }

    fn count(&self, stored: &Stored, metrics: &Metrics) {
        metrics.committed.with_label_values(&["telemetry"]).inc_by(self.telemetry);
        metrics.committed.with_label_values(&["status"]).inc_by(self.status);
        metrics.dead_letters.inc_by(self.letters.len() as u64);
        metrics.committed.with_label_values(&["logs"]).inc_by(self.logs);
        metrics.stored.inc_by(stored.readings);
        metrics.hit_many(Limit::FirmwareVersions, stored.versions_left_out);
        metrics.clamped.inc_by(self.batch.clamped() as u64);
        metrics.duplicates.inc_by((self.batch.len() as u64).saturating_sub(stored.readings));
        metrics.lines.stored.inc_by(stored.lines);
        metrics.lines.clamped.inc_by(self.lines.clamped() as u64);
        metrics.lines.cut.inc_by(self.lines.cut() as u64);
        metrics.lines.suppressed.inc_by(self.lines.suppressed());
        metrics.lines.unlimited.inc_by(self.unlimited);
        metrics.lines.duplicate.inc_by((self.lines.len() as u64).saturating_sub(stored.lines));
    }
}
