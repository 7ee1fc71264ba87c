//! The feed: lines that were committed, handed to those who tail.
//!
//! [`Feed::tail`] begins a tail, now or where an earlier one ended ([`Positions`]); its [`Reader`] gives [`Entry`] after entry.
//! While there is a tail, one task asks every [`POLL_EVERY`] how far the writers have come, reads the new rows once, and hands
//! them to all tails. Holds: a tail sees each line that it asks for once, or is told of the gap, however slow its reader is and
//! whatever is started anew; no line that was committed after a change of rights is seen under the rights before; what waits for a
//! slow reader is bounded. Ignorant of: HTTP.

mod outbox;
mod positions;
mod tail;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use prometheus::{IntCounter, IntCounterVec, IntGauge, Opts, Registry};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

pub use outbox::{Entry, Gap, Reader};
pub use positions::Positions;
pub use tail::Request;

use super::{Line, Stretch};
use crate::clock::Clock;
use crate::config::Logs;
use crate::error::Result;
use crate::id::UserId;
use crate::places::{Full, Place, Places};
use crate::token::Keys;

/// How often the writers' positions are asked for.
pub const POLL_EVERY: Duration = Duration::from_millis(50);
/// Pause after the database did not answer.
const AGAIN: Duration = Duration::from_secs(1);
/// Rows that are read at once.
const CHUNK_LINES: usize = 500;
/// Chunks that wait for a tail; one that is further behind reads the rows itself.
const CHUNKS: usize = 8;

/// Hands committed lines to tails; cheap to clone.
#[derive(Clone)]
pub struct Feed(Arc<Shared>);

struct Shared {
    db: PgPool,
    keys: Arc<Keys>,
    clock: Clock,
    settings: Logs,
    metrics: Metrics,
    chunks: broadcast::Sender<Arc<Chunk>>,
    /// How often rights have changed.
    epoch: watch::Sender<i64>,
    /// Whether the task runs.
    is_running: Mutex<bool>,
    places: Places,
    stop: CancellationToken,
}

/// Lines that were read at once, between two positions.
#[derive(Debug)]
struct Chunk {
    from: Positions,
    upto: Positions,
    lines: Vec<Arc<Line>>,
}

/// Why there is no tail.
#[derive(Debug)]
pub enum Refused {
    /// The process has as many as it may.
    Full,
    /// The user has.
    FullOfUser,
    /// The database failed.
    Failed(crate::Error),
}

impl From<Full> for Refused {
    fn from(full: Full) -> Self {
        match full {
            Full::All => Self::Full,
            Full::OfUser => Self::FullOfUser,
        }
    }
}

impl From<crate::Error> for Refused {
    fn from(error: crate::Error) -> Self {
        Self::Failed(error)
    }
}

impl std::fmt::Debug for Feed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Feed").field("tails", &self.0.chunks.receiver_count()).finish_non_exhaustive()
    }
}

impl Feed {
    /// Over the rows of `db`; what it counts is registered in `registry`.
    ///
    /// # Errors
    /// When a metric of the same name is registered already.
    pub fn new(
        db: PgPool,
        keys: Arc<Keys>,
        clock: Clock,
        settings: Logs,
        registry: &Registry,
    ) -> Result<Self, prometheus::Error> {
        let (metrics, chunks) = (Metrics::register(registry)?, broadcast::Sender::new(CHUNKS));
        let (epoch, is_running) = (watch::Sender::new(0), Mutex::new(false));
        let places = Places::new(settings.max_tails, settings.max_tails_per_user);
        let stop = CancellationToken::new();
        Ok(Self(Arc::new(Shared { db, keys, clock, settings, metrics, chunks, epoch, is_running, places, stop })))
    }

    /// Ends all tails, and begins none any more.
    pub fn stop(&self) {
        self.0.stop.cancel();
    }

    /// Begins a tail.
    ///
    /// # Errors
    /// When there are too many, or the database fails.
    pub async fn tail(&self, request: Request) -> Result<Reader, Refused> {
        let permit = Permit::take(&self.0, request.user())?;
        // From here on nothing that is read is missed: what is not among the chunks any more is read from the rows.
        let chunks = self.0.chunks.subscribe();
        self.run();
        Ok(tail::begin(self.0.clone(), chunks, request, permit).await?)
    }

    /// Starts the task unless it runs.
    fn run(&self) {
        let mut is_running = self.0.is_running.lock();
        if !*is_running {
            *is_running = true;
            tokio::spawn(feed(self.0.clone()));
        }
    }
}

/// The task: reads while somebody tails.
async fn feed(shared: Arc<Shared>) {
    let (mut at, mut is_away) = (None, false);
    while shared.is_wanted() {
        let pause = match shared.step(&mut at).await {
            Ok(()) => POLL_EVERY,
            Err(error) => {
                if !is_away {
                    tracing::warn!(%error, "committed lines cannot be read: tails wait");
                }
                AGAIN
            }
        };
        is_away = pause == AGAIN;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = shared.stop.cancelled() => {}
        }
    }
}

impl Shared {
    /// Whether somebody tails; once nobody does, the next tail starts the task again.
    fn is_wanted(&self) -> bool {
        let mut is_running = self.is_running.lock();
        *is_running = self.chunks.receiver_count() > 0 && !self.stop.is_cancelled();
        *is_running
    }

    /// Hands on what was committed since.
    async fn step(&self, at: &mut Option<Positions>) -> Result<()> {
        let mut db = self.db.acquire().await?;
        let (epoch, last) = look(&mut db).await?;
        self.epoch.send_if_modified(|known| std::mem::replace(known, epoch) != epoch);
        // A tail may have begun further back than this task does: it has to know.
        let at = at.get_or_insert_with(|| {
            let _tails =
                self.chunks.send(Arc::new(Chunk { from: last.clone(), upto: last.clone(), lines: Vec::new() }));
            last.clone()
        });
        while let Some(Read { writer, reached, lines }) = next_lines(&mut db, at, &last).await? {
            let from = at.clone();
            at.advance(writer, reached);
            // That nobody is there any more is seen by the loop around.
            let _tails = self.chunks.send(Arc::new(Chunk { from, upto: at.clone(), lines }));
        }
        Ok(())
    }
}

/// How often rights have changed, and how far each writer has come, as of one moment.
async fn look(db: &mut PgConnection) -> Result<(i64, Positions)> {
    let rows = sqlx::query!(
        r#"select e.epoch, w.writer as "writer?", w.last as "last?" from policy_epoch e left join log_writer w on true"#
    );
    let rows = rows.fetch_all(db).await?;
    let epoch = rows.first().map_or(0, |row| row.epoch);
    Ok((epoch, rows.into_iter().filter_map(|row| row.writer.zip(row.last)).collect()))
}

/// Some lines of one writer, and how far that goes.
struct Read {
    writer: i16,
    reached: i64,
    lines: Vec<Arc<Line>>,
}

/// The next lines behind `at` of a writer that has come further by `last`; `None` when none has.
async fn next_lines(db: &mut PgConnection, at: &Positions, last: &Positions) -> Result<Option<Read>> {
    let Some((writer, last)) = last.iter().find(|(writer, last)| *last > at.of(*writer)) else { return Ok(None) };
    let Stretch { lines, reached, .. } = Line::read_after(db, writer, at.of(writer), last, CHUNK_LINES).await?;
    Ok(Some(Read { writer, reached, lines: lines.into_iter().map(Arc::new).collect() }))
}

/// One of the tails that may be at once.
struct Permit {
    shared: Arc<Shared>,
    _place: Place,
    is_served: bool,
}

impl Permit {
    fn take(shared: &Arc<Shared>, user: UserId) -> Result<Self, Refused> {
        if shared.stop.is_cancelled() {
            return Err(Refused::Full);
        }
        let place = shared.places.take(user)?;
        Ok(Self { shared: shared.clone(), _place: place, is_served: false })
    }

    /// From here on what is committed is given.
    fn serve(&mut self) {
        self.is_served = true;
        self.shared.metrics.tails.inc();
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.is_served {
            self.shared.metrics.tails.dec();
        }
    }
}

struct Metrics {
    tails: IntGauge,
    lines: IntCounter,
    missed: IntCounter,
    gaps: IntCounterVec,
}

impl Metrics {
    fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let gaps = Opts::new(
            "muster_log_tail_gaps_total",
            "Gaps that tails were told of, by why: a slow reader, a resumption too late.",
        );
        let metrics = Self {
            tails: IntGauge::new("muster_log_tails", "Tails that are served.")?,
            lines: IntCounter::new("muster_log_tail_lines_total", "Lines given to tails.")?,
            missed: IntCounter::new(
                "muster_log_tail_missed_total",
                "Lines that slow readers of tails missed, as they were told.",
            )?,
            gaps: IntCounterVec::new(gaps, &["why"])?,
        };
        for why in ["slow", "late"] {
            metrics.gaps.with_label_values(&[why]);
        }
        registry.register(Box::new(metrics.tails.clone()))?;
        registry.register(Box::new(metrics.lines.clone()))?;
        registry.register(Box::new(metrics.missed.clone()))?;
        registry.register(Box::new(metrics.gaps.clone()))?;
        Ok(metrics)
    }
}
