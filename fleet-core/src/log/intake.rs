//! A way in for lines that do not come over MQTT: bounded queue → one writer → COMMIT → the answer.
//!
//! Holds: [`Intake::store`] returns after the COMMIT of what it was given, or says why it is not stored; while one batch is
//! committed the next one gathers, so many small requests share a commit; what the database refuses takes nothing else with it.
//! Whoever was told that nothing is stored sends it again: the stand-in numbers of [`Batch`] make it one.
//! Ignorant of: who sends, and in which form.

use std::sync::Arc;
use std::time::Duration;

use prometheus::{IntCounter, IntGauge, Registry};
use sqlx::PgPool;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{Batch, Rate, Record, insert_batch, prepare, suppressed};
use crate::clock::Clock;
use crate::error::{Error, Result, is_refused};
use crate::id::DeviceKey;

/// Requests that wait for the writer.
const MAX_WAITING: usize = 1000;
/// A database that has not answered by then is away.
const COMMIT_WITHIN: Duration = Duration::from_secs(20);
/// How often it is looked for suppressed lines that nobody has told of.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Bounds of an [`Intake`].
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Bytes of lines that wait.
    pub queue_bytes: usize,
    /// Lines in a commit, but for one request that has more.
    pub batch_lines: usize,
    /// How far a clock may run ahead, in milliseconds.
    pub max_ahead_ms: i64,
    /// How long suppressed lines of a device are gathered into one that tells of them.
    pub suppressed_every: Duration,
}

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Outcome {
    /// Lines that are stored now, those that were there already included.
    pub stored: u64,
    /// Lines that the rate limit of their device kept out.
    pub suppressed: u64,
}

/// Why nothing of a request is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotStored {
    /// As much waits as may: come again.
    #[error("too many log lines wait to be stored")]
    Full,
    /// The database cannot be reached, or the server stops: come again.
    #[error("the database is away")]
    Away,
    /// The database refuses it, and would again.
    #[error("the database refused the log lines")]
    Refused,
}

/// The metrics of an [`Intake`].
#[derive(Debug, Clone)]
pub struct Metrics {
    stored: IntCounter,
    duplicates: IntCounter,
    cut: IntCounter,
    clamped: IntCounter,
    suppressed: IntCounter,
    unlimited: IntCounter,
    commits: IntCounter,
    full: IntCounter,
    waiting: IntGauge,
}

impl Metrics {
    /// Makes and registers them, with names that begin so: `muster_otlp`.
    pub fn register(prefix: &str, registry: &Registry) -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| {
            let counter = IntCounter::new(format!("{prefix}_{name}_total"), help)?;
            registry.register(Box::new(counter.clone()))?;
            Ok::<_, prometheus::Error>(counter)
        };
        let waiting = IntGauge::new(format!("{prefix}_requests_waiting"), "Requests that wait to be committed")?;
        registry.register(Box::new(waiting.clone()))?;
        Ok(Self {
            stored: counter("lines_stored", "Log lines stored")?,
            duplicates: counter("lines_duplicate", "Log lines that were there already")?,
            cut: counter("lines_cut", "Log lines of which something was too much")?,
            clamped: counter("lines_clamped", "Log lines whose clock ran ahead by more than ingest.max_ahead_ms")?,
            suppressed: counter("lines_suppressed", "Log lines not stored: ingest.log_lines_per_s was hit")?,
            unlimited: counter("lines_unlimited", "Log lines let through as ingest.max_tracked_devices was hit")?,
            commits: counter("commits", "Commits")?,
            full: counter("queue_full", "Requests refused because too much waited to be stored")?,
            waiting,
        })
    }

    fn count(&self, batch: &Batch, new: u64) {
        self.commits.inc();
        self.stored.inc_by(new);
        self.duplicates.inc_by((batch.len() as u64).saturating_sub(new));
        self.cut.inc_by(batch.cut() as u64);
        self.clamped.inc_by(batch.clamped() as u64);
        self.suppressed.inc_by(batch.suppressed());
    }
}

/// The way in. Cloning shares it; its task ends when all of them are gone.
#[derive(Debug, Clone)]
pub struct Intake {
    jobs: mpsc::Sender<Job>,
    room: Arc<Semaphore>,
    max_bytes: u32,
    metrics: Metrics,
}

#[derive(Debug)]
struct Job {
    lines: Vec<(DeviceKey, Record)>,
    answer: oneshot::Sender<Result<Outcome, NotStored>>,
    _room: OwnedSemaphorePermit,
}

impl Intake {
    /// Starts the writer of that number; the task ends when the last clone of the way in is gone and all is committed.
    pub fn start(
        writer: i16,
        db: PgPool,
        clock: Clock,
        bounds: Bounds,
        rate: Rate,
        metrics: Metrics,
    ) -> (Self, JoinHandle<()>) {
        let (jobs, waiting) = mpsc::channel(MAX_WAITING);
        let max_bytes = u32::try_from(bounds.queue_bytes.clamp(1, Semaphore::MAX_PERMITS)).unwrap_or(u32::MAX);
        let room = Arc::new(Semaphore::new(usize::try_from(max_bytes).unwrap_or(Semaphore::MAX_PERMITS)));
        let task = Writer { number: writer, db, clock, bounds, rate, metrics: metrics.clone(), owed_ms: None };
        (Self { jobs, room, max_bytes, metrics }, tokio::spawn(task.run(waiting)))
    }

    /// Stores lines and waits for the COMMIT.
    pub async fn store(&self, lines: Vec<(DeviceKey, Record)>) -> Result<Outcome, NotStored> {
        if lines.is_empty() {
            return Ok(Outcome::default());
        }
        let answered = self.offer(lines).inspect_err(|_| self.metrics.full.inc())?;
        self.metrics.waiting.inc();
        let outcome = answered.await.unwrap_or(Err(NotStored::Away));
        self.metrics.waiting.dec();
        outcome
    }

    fn offer(
        &self,
        lines: Vec<(DeviceKey, Record)>,
    ) -> Result<oneshot::Receiver<Result<Outcome, NotStored>>, NotStored> {
        let bytes = lines.iter().map(|(_, record)| record.bytes()).sum::<usize>();
        // One larger than the whole queue takes all of it, alone.
        let bytes = u32::try_from(bytes).unwrap_or(u32::MAX).min(self.max_bytes);
        let room = self.room.clone().try_acquire_many_owned(bytes).map_err(|_| NotStored::Full)?;
        let (answer, answered) = oneshot::channel();
        self.jobs.try_send(Job { lines, answer, _room: room }).map_err(|_| NotStored::Full)?;
        Ok(answered)
    }
}

struct Writer {
    number: i16,
    db: PgPool,
    clock: Clock,
    bounds: Bounds,
    rate: Rate,
    metrics: Metrics,
    /// When suppressed lines are to be told of, if there are any.
    owed_ms: Option<i64>,
}

impl Writer {
    async fn run(mut self, mut waiting: mpsc::Receiver<Job>) {
        let mut tell = interval(TELL_EVERY);
        tell.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                first = waiting.recv() => match first {
                    Some(first) => self.work(first, &mut waiting).await,
                    None => return,
                },
                _ = tell.tick() => self.tell().await,
            }
        }
    }

    /// Commits all that has gathered, and answers.
    async fn work(&mut self, first: Job, waiting: &mut mpsc::Receiver<Job>) {
        let mut lines = first.lines.len();
        let mut jobs = vec![first];
        while lines < self.bounds.batch_lines
            && let Ok(job) = waiting.try_recv()
        {
            lines += job.lines.len();
            jobs.push(job);
        }
        // Whoever has gone meanwhile was not told anything, and comes again.
        jobs.retain(|job| !job.answer.is_closed());
        let (mut batch, outcomes) = self.gather(&mut jobs);
        match self.commit(&mut batch).await {
            Ok(()) => {
                for (job, outcome) in jobs.into_iter().zip(outcomes) {
                    let _ = job.answer.send(Ok(outcome));
                }
            }
            Err(NotStored::Refused) if jobs.len() > 1 => self.one_by_one(jobs).await,
            Err(why) => {
                for job in jobs {
                    let _ = job.answer.send(Err(why));
                }
            }
        }
    }

    /// So that what the database refuses takes nothing else with it.
    async fn one_by_one(&mut self, jobs: Vec<Job>) {
        for job in jobs {
            let mut alone = [job];
            let (mut batch, outcomes) = self.gather(&mut alone);
            let committed = self.commit(&mut batch).await;
            let [job] = alone;
            let outcome = outcomes.first().copied().unwrap_or_default();
            let _ = job.answer.send(committed.map(|()| outcome));
        }
    }

    fn gather(&mut self, jobs: &mut [Job]) -> (Batch, Vec<Outcome>) {
        let (mut batch, now_ms) = (Batch::default(), self.clock.now_ms());
        let outcomes = jobs.iter().map(|job| {
            let before = (batch.len(), batch.suppressed());
            for (device, record) in &job.lines {
                batch.push_record_within(*device, record.clone(), now_ms, self.bounds.max_ahead_ms, &mut self.rate);
            }
            Outcome { stored: (batch.len() - before.0) as u64, suppressed: batch.suppressed() - before.1 }
        });
        let outcomes = outcomes.collect();
        self.metrics.unlimited.inc_by(self.rate.take_unlimited());
        (batch, outcomes)
    }

    async fn commit(&mut self, batch: &mut Batch) -> Result<(), NotStored> {
        let committed = timeout(COMMIT_WITHIN, self.try_commit(batch)).await;
        match committed.unwrap_or_else(|_| Err(Error::Database(sqlx::Error::PoolTimedOut))) {
            Ok(new) => {
                self.metrics.count(batch, new);
                if batch.suppressed() > 0 && self.owed_ms.is_none() {
                    let every_ms = i64::try_from(self.bounds.suppressed_every.as_millis()).unwrap_or(i64::MAX);
                    self.owed_ms = Some(self.clock.now_ms().saturating_add(every_ms));
                }
                Ok(())
            }
            Err(error) => {
                tracing::warn!(writer = self.number, %error, "log lines could not be stored");
                let is_refused = matches!(&error, Error::Database(error) if is_refused(error));
                Err(if is_refused { NotStored::Refused } else { NotStored::Away })
            }
        }
    }

    async fn try_commit(&self, batch: &mut Batch) -> Result<u64> {
        let mut tx = self.db.begin().await?;
        prepare(&mut tx, batch).await?;
        suppressed::note(&mut tx, batch, self.clock.now_ms()).await?;
        let new = insert_batch(&mut tx, self.number, batch).await?;
        tx.commit().await?;
        Ok(new)
    }

    /// Tells of suppressed lines, when there are any; those of a process that was killed are told of by a broker.
    async fn tell(&mut self) {
        let now_ms = self.clock.now_ms();
        if self.owed_ms.is_none_or(|owed_ms| owed_ms > now_ms) {
            return;
        }
        let told = async {
            let mut tx = self.db.begin().await?;
            suppressed::tell(&mut tx, self.number, now_ms, self.bounds.suppressed_every).await?;
            tx.commit().await?;
            Ok::<_, Error>(())
        };
        match told.await {
            Ok(()) => self.owed_ms = None,
            Err(error) => tracing::debug!(writer = self.number, %error, "suppressed lines are told of later"),
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::future::join_all;

    use super::*;
    use crate::telemetry::fixture::enrol;
    use crate::testing::TestDb;

    const BOUNDS: Bounds = Bounds {
        queue_bytes: 100_000,
        batch_lines: 1000,
        max_ahead_ms: 300_000,
        suppressed_every: Duration::from_secs(10),
    };

    fn record(message: &str) -> Record {
        Record { message: message.to_owned(), ts_ms: Some(1_763_692_212_345), ..Record::default() }
    }

    fn intake(db: &TestDb, bounds: Bounds, rate: Rate) -> (Intake, Metrics) {
        let metrics = Metrics::register("test", &Registry::new()).unwrap();
        let (intake, _) = Intake::start(1000, db.pool().clone(), Clock::system(), bounds, rate, metrics.clone());
        (intake, metrics)
    }

    async fn device(db: &TestDb) -> DeviceKey {
        enrol(&mut db.pool().acquire().await.unwrap(), db.tenant(), "boiler-1").await
    }

    async fn count(db: &TestDb) -> i64 {
        sqlx::query_scalar("select count(*) from log").fetch_one(db.pool()).await.unwrap()
    }

    #[tokio::test]
    async fn requests_share_commits_and_are_answered_after_them() {
        let db = TestDb::new().await;
        let device = device(&db).await;
        let (intake, metrics) = intake(&db, BOUNDS, Rate::off());
        let requests =
            (0..50).map(|nth| intake.store(vec![(device, record(&format!("line {nth}"))), (device, record("same"))]));
        let outcomes = join_all(requests).await;
        assert_eq!(outcomes, [Ok(Outcome { stored: 2, suppressed: 0 }); 50]);
        assert_eq!(count(&db).await, 51);
        assert!((1..=5).contains(&metrics.commits.get()), "{}", metrics.commits.get());
        assert_eq!((metrics.stored.get(), metrics.duplicates.get(), metrics.waiting.get()), (51, 49, 0));
    }

    #[tokio::test]
    async fn what_does_not_fit_is_refused_at_once_and_counted() {
        let db = TestDb::new().await;
        let device = device(&db).await;
        let (intake, metrics) = intake(&db, BOUNDS, Rate::off());
        // A lock that the writer has to wait for.
        let mut lock = db.pool().begin().await.unwrap();
        sqlx::query("lock table log_writer in exclusive mode").execute(&mut *lock).await.unwrap();
        let large = || vec![(device, record(&"x".repeat(30_000)))];
        let storing = join_all((0..5).map(|_| intake.store(large())));
        let (outcomes, ()) = tokio::join!(storing, async {
            while metrics.full.get() < 2 {
                tokio::task::yield_now().await;
            }
            lock.rollback().await.unwrap();
        });
        assert_eq!(outcomes.iter().filter(|outcome| **outcome == Err(NotStored::Full)).count(), 2, "{outcomes:?}");
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 3, "{outcomes:?}");
        assert!(
            intake.store(vec![(device, record(&"y".repeat(300_000)))]).await.is_ok(),
            "one larger than the queue passes"
        );
    }

    #[tokio::test]
    async fn a_device_that_logs_too_much_is_told_of() {
        let db = TestDb::new().await;
        let device = device(&db).await;
        let (intake, metrics) = intake(&db, BOUNDS, Rate::new(1, 3, 10));
        let lines = (0..8).map(|nth| (device, record(&format!("line {nth}")))).collect();
        assert_eq!(intake.store(lines).await, Ok(Outcome { stored: 3, suppressed: 5 }));
        assert_eq!((count(&db).await, metrics.suppressed.get()), (3, 5));
        let noted: i64 = sqlx::query_scalar("select lines from log_suppressed").fetch_one(db.pool()).await.unwrap();
        assert_eq!(noted, 5);
    }

    #[tokio::test]
    async fn while_the_database_is_away_it_is_said() {
        let db = TestDb::new().await;
        let device = device(&db).await;
        let (intake, _) = intake(&db, BOUNDS, Rate::off());
        sqlx::query("alter table log rename to log_gone").execute(db.pool()).await.unwrap();
        assert_eq!(intake.store(vec![(device, record("x"))]).await, Err(NotStored::Away));
    }
}
