//! Follows the rows: what was stored is read in the order of commits, added to its day and committed there.
//!
//! Holds: after a crash or a failure at any point it goes on where everything is known to be in the index, and adds nothing twice.

use std::time::Duration;

use chrono::Days;
use sqlx::{PgConnection, PgPool};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::tidy::oldest_day;
use super::writers::Writers;
use super::{Index, Places, State};
use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::log::{Line, Stretch};

/// A commit is not put off beyond so many lines.
const COMMIT_LINES: u64 = 50_000;
/// Who is further behind than that is catching up.
const BEHIND_LINES: i64 = 50_000;
/// How often it is looked for days that were dropped and devices that are gone.
const TIDY_EVERY: Duration = Duration::from_secs(5);
/// How long it waits after a failure.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Room beyond `search.min_free_bytes` without which a failure means that the disk is full.
const SLACK_BYTES: u64 = 16 * 1024 * 1024;

pub(super) type Held = OwnedMutexGuard<Writers>;

/// Works with the writers where waiting for a disk holds up nobody. What fails is forgotten up to the last commit.
pub(super) async fn blocking<T: Send + 'static>(
    mut writers: Held,
    work: impl FnOnce(&mut Writers) -> Result<T> + Send + 'static,
) -> Result<(Held, T)> {
    let worked = tokio::task::spawn_blocking(move || {
        if writers.is_at_work {
            writers.abandon();
        }
        writers.is_at_work = true;
        let done = work(&mut writers);
        if done.is_err() {
            writers.abandon();
        }
        writers.is_at_work = false;
        done.map(|done| (writers, done))
    });
    worked.await.map_err(|panicked| Error::Internal(format!("the index: {panicked}")))?
}

/// What a round came to.
struct Round {
    /// Whether there is more to read at once.
    is_behind: bool,
}

struct Follower<'a> {
    index: &'a Index,
    db: &'a PgPool,
    clock: &'a Clock,
    /// Since when something waits to be committed.
    waits_since: Option<Instant>,
    tidied: Option<Instant>,
}

impl Index {
    /// Follows the rows until it is stopped. There is one who does.
    pub async fn follow(&self, db: &PgPool, clock: &Clock, stop: &CancellationToken) {
        let mut follower = Follower::new(self, db, clock);
        let rounds = async {
            while !stop.is_cancelled() {
                let pause = follower.go_on().await;
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = tokio::time::sleep(pause) => {}
                }
            }
        };
        tokio::select! {
            ((), ()) = async { tokio::join!(rounds, self.mend(db)) } => {}
            () = stop.cancelled() => {}
        }
        if let Err(error) = self.commit().await {
            tracing::warn!(%error, "the index could not be committed; it catches up with the next start");
        }
    }

    /// Follows the rows up to what is stored now, commits and tidies up.
    ///
    /// # Errors
    /// When the database or the disk fails.
    pub async fn catch_up(&self, db: &PgPool, clock: &Clock) -> Result<()> {
        let mut follower = Follower::new(self, db, clock);
        while follower.round().await?.is_behind {}
        self.commit().await?;
        self.tidy(db).await?;
        self.set_state(State::Ok);
        Ok(())
    }

    /// The writers, when nobody else has them.
    pub(super) async fn held(&self) -> Held {
        self.inner.writers.clone().lock_owned().await
    }

    pub(super) async fn commit(&self) -> Result<()> {
        let writers = self.held().await;
        let timer = self.inner.metrics.commits.start_timer();
        let (writers, ()) = blocking(writers, Writers::commit).await?;
        timer.observe_duration();
        self.show(&writers);
        Ok(())
    }

    /// Lets what was committed be searched.
    pub(super) fn show(&self, writers: &Writers) {
        let shown = writers.shown();
        let documents = shown.days.values().map(|day| day.searcher.num_docs()).sum::<u64>();
        self.inner.metrics.documents.set(i64::try_from(documents).unwrap_or(i64::MAX));
        *self.inner.shown.write() = std::sync::Arc::new(shown);
    }

    /// Whether there is room to write.
    pub(super) fn has_room(&self, beyond: u64) -> bool {
        let Ok(disk) = rustix::fs::statvfs(&self.inner.dir) else { return true };
        disk.f_bavail.saturating_mul(disk.f_frsize) >= self.inner.settings.min_free_bytes.saturating_add(beyond)
    }
}

impl<'a> Follower<'a> {
    fn new(index: &'a Index, db: &'a PgPool, clock: &'a Clock) -> Self {
        Self { index, db, clock, waits_since: None, tidied: None }
    }

    /// One round, and how long to wait for the next.
    async fn go_on(&mut self) -> Duration {
        if !self.index.has_room(0) {
            self.index.set_state(State::DiskFull);
            // Days that are dropped may be what makes room.
            self.report(self.index.drop_days(self.db).await);
            return RETRY_AFTER;
        }
        match self.work().await {
            Ok(Round { is_behind: true }) => Duration::ZERO,
            Ok(Round { is_behind: false }) => Duration::from_millis(self.index.inner.settings.poll_ms),
            Err(error) => {
                self.report(Err(error));
                RETRY_AFTER
            }
        }
    }

    async fn work(&mut self) -> Result<Round> {
        let round = self.round().await?;
        let is_committed = self.is_commit_due().await;
        if is_committed {
            self.index.commit().await?;
            self.waits_since = None;
        }
        if self.tidied.is_none_or(|at| at.elapsed() >= TIDY_EVERY) {
            self.index.tidy(self.db).await?;
            self.tidied = Some(Instant::now());
        }
        let behind = self.index.inner.metrics.behind.get();
        match self.index.state() {
            State::Ok if behind <= BEHIND_LINES => {}
            // What failed is over when something was written.
            State::DiskFull | State::Failing(_) if round.is_behind && !is_committed => {}
            _ if round.is_behind => self.index.set_state(State::CatchingUp),
            _ => {
                self.index.commit().await?;
                self.index.set_state(State::Ok);
            }
        }
        Ok(round)
    }

    fn report(&self, done: Result<()>) {
        let Err(error) = done else { return };
        self.index.inner.metrics.failures.inc();
        let state = if self.index.has_room(SLACK_BYTES) { State::Failing(error.to_string()) } else { State::DiskFull };
        if self.index.state() != state {
            tracing::warn!(%error, "the index of log lines stands still; it goes on by itself");
        }
        self.index.set_state(state);
    }

    async fn is_commit_due(&mut self) -> bool {
        let writers = self.index.held().await;
        if writers.followed.as_ref().is_some_and(|followed| followed.places == writers.reached) {
            self.waits_since = None;
            return false;
        }
        let since = *self.waits_since.get_or_insert_with(Instant::now);
        writers.uncommitted >= COMMIT_LINES
            || since.elapsed() >= Duration::from_millis(self.index.inner.settings.commit_ms)
    }

    /// Reads and adds what is new, a portion of each writer's lines.
    async fn round(&mut self) -> Result<Round> {
        let (settings, metrics) = (&self.index.inner.settings, &self.index.inner.metrics);
        let mut db = self.db.acquire().await?;
        let lasts = lasts(&mut db).await?;
        let mut writers = self.begun(&mut db, &lasts).await?;
        let due = lasts
            .into_iter()
            .map(|(writer, last)| (writer, writers.reached.get(&writer).copied().unwrap_or_default(), last));
        let mut due = due.filter(|(_, place, last)| place < last).collect::<Vec<_>>().into_iter();
        let mut behind = 0;
        let mut read = read_next(&mut db, due.next(), settings.batch_lines).await?;
        while let Some((writer, last, stretch)) = read {
            behind += last - stretch.reached;
            metrics.orphans.inc_by(stretch.orphans);
            let add = move |writers: &mut Writers| writers.add(&stretch.lines, writer, stretch.reached);
            // What is next is read while this is added.
            let (added, following) =
                tokio::join!(blocking(writers, add), read_next(&mut db, due.next(), settings.batch_lines));
            let (held, added) = added?;
            (writers, read) = (held, following?);
            metrics.lines.inc_by(added.lines);
            metrics.without_column.inc_by(added.without_column);
            metrics.closed.inc_by(added.closed);
        }
        metrics.behind.set(behind);
        Ok(Round { is_behind: behind > 0 })
    }

    /// The writers, begun anew where there was nothing, or where it was about another database.
    async fn begun(&self, db: &mut PgConnection, lasts: &Places) -> Result<Held> {
        let writers = self.index.held().await;
        let is_ahead = writers.reached.iter().any(|(writer, place)| lasts.get(writer).is_none_or(|last| last < place));
        if writers.followed.is_some() && !is_ahead {
            return Ok(writers);
        }
        if is_ahead {
            tracing::warn!("the database knows less than the index, which is made anew");
        }
        let first = oldest_day(db).await?.unwrap_or_else(|| self.clock.now().date_naive() - Days::new(1));
        let (writers, ()) = blocking(writers, move |writers| writers.begin(first)).await?;
        self.index.show(&writers);
        Ok(writers)
    }
}

/// A portion of a writer's lines behind a place and up to another one; with the writer and the latter.
async fn read_next(
    db: &mut PgConnection,
    next: Option<(i16, i64, i64)>,
    limit: usize,
) -> Result<Option<(i16, i64, Stretch)>> {
    let Some((writer, place, last)) = next else { return Ok(None) };
    Ok(Some((writer, last, Line::read_after(db, writer, place, last, limit).await?)))
}

async fn lasts(db: &mut PgConnection) -> Result<Places> {
    let rows = sqlx::query!("select writer, last from log_writer").fetch_all(db).await?;
    Ok(rows.into_iter().map(|row| (row.writer, row.last)).collect())
}
