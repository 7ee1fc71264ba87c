//! The index of log lines: by what they say, and by day.
//!
//! [`Index::open`] takes a directory; [`Index::days`] is what can be searched in it. Holds: rows are the truth, and the index holds
//! nothing that cannot be made anew from them; a line is in one day, once. Ignorant of: queries, MQTT, HTTP.
//! Why a directory a day: dropping one gives its space back at once, and the newest lines are looked for in few documents (ADR 15).

mod day;
mod digest;
mod follow;
mod job;
mod metrics;
mod rebuild;
pub mod schema;
mod tidy;
mod verify;
mod writers;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::NaiveDate;
use parking_lot::{Mutex, RwLock};
use prometheus::Registry;
use serde::{Deserialize, Serialize};
use tantivy::TantivyError;

pub use self::day::{Day, Name};
pub use self::job::{Job, Looked, Task};
use self::metrics::Metrics;
pub use self::verify::Verified;
use self::writers::Writers;
use crate::config::Search;
use crate::error::{Error, Result};

/// How far each writer's lines are followed: its places by its number.
pub type Places = BTreeMap<i16, i64>;

const LOCK: &str = "lock";
const FOLLOWED: &str = "followed.json";

/// An open index; cheap to clone.
#[derive(Debug, Clone)]
pub struct Index {
    inner: Arc<Inner>,
}

struct Inner {
    dir: PathBuf,
    settings: Search,
    metrics: Metrics,
    shown: RwLock<Arc<Shown>>,
    state: Mutex<State>,
    /// Days that could not be read, and are not there until they have been made anew.
    broken: Mutex<BTreeSet<Name>>,
    /// Days that are being made anew.
    rebuilding: Mutex<BTreeSet<Name>>,
    /// Whoever makes a day anew is alone with it.
    rebuild: tokio::sync::Mutex<()>,
    /// The purges that had ended when it was last looked for devices that are gone.
    purged: Mutex<Option<i64>>,
    job: Mutex<Option<Job>>,
    writers: Arc<tokio::sync::Mutex<Writers>>,
    /// Held as long as the index is open.
    _lock: File,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("dir", &self.dir).field("shown", &*self.shown.read()).finish_non_exhaustive()
    }
}

/// What can be searched, as of one moment.
#[derive(Debug, Clone, Default)]
struct Shown {
    days: BTreeMap<Name, Day>,
    /// Everything up to these places is in the days.
    places: Places,
}

/// What is known of the index besides its days. Replaced as a whole, after the days were committed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Followed {
    format: u32,
    /// Lines of earlier days are in [`Name::Other`].
    first: NaiveDate,
    places: Places,
}

/// Whether all that was stored can be found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// Yes, within `search.commit_ms` or so.
    Ok,
    /// Not yet: it reads what was stored while it was not there.
    CatchingUp,
    /// A day could not be read, and is made anew.
    Rebuilding,
    /// There is no room on the disk, or less than `search.min_free_bytes`. It goes on by itself when there is more.
    DiskFull,
    /// It cannot go on, and tries again and again.
    Failing(String),
}

impl State {
    /// The names of all states.
    pub const NAMES: [&'static str; 5] = ["ok", "catching_up", "rebuilding", "disk_full", "failing"];

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::CatchingUp => "catching_up",
            Self::Rebuilding => "rebuilding",
            Self::DiskFull => "disk_full",
            Self::Failing(_) => "failing",
        }
    }

    /// Why it cannot go on.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::DiskFull => Some("there is no room on the disk, or less than search.min_free_bytes"),
            Self::Failing(reason) => Some(reason),
            _ => None,
        }
    }

    /// Whether an answer from the index is all there is.
    pub fn is_complete(&self) -> bool {
        *self == Self::Ok
    }
}

/// A day, for whoever runs the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DayStatus {
    /// Which.
    pub name: Name,
    /// Its lines.
    pub lines: u64,
    /// The segments they are in.
    pub segments: usize,
    /// What its files take.
    pub bytes: u64,
    /// Whether it is being made anew.
    pub is_rebuilding: bool,
}

impl Index {
    /// Opens the index in a directory, which is made if it is not there. One of another format is emptied: it will be made anew.
    ///
    /// # Errors
    /// When the directory cannot be written, or another process has it open.
    pub fn open(dir: &Path, settings: &Search) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(TantivyError::from)?;
        let lock = lock(dir)?;
        let (writers, broken) = Writers::open(dir.to_owned(), settings.clone(), read(dir))?;
        let metrics = Metrics::new().map_err(|error| Error::Internal(error.to_string()))?;
        let inner = Inner {
            dir: dir.to_owned(),
            settings: settings.clone(),
            metrics,
            shown: RwLock::new(Arc::new(writers.shown())),
            state: Mutex::new(State::CatchingUp),
            broken: Mutex::new(broken),
            rebuilding: Mutex::default(),
            rebuild: tokio::sync::Mutex::default(),
            purged: Mutex::default(),
            job: Mutex::default(),
            writers: Arc::new(tokio::sync::Mutex::new(writers)),
            _lock: lock,
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Shows its metrics there.
    ///
    /// # Errors
    /// When there are metrics of these names already.
    pub fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        self.inner.metrics.register(registry)
    }

    /// The days with times from `from_ms` to `to_ms`, both included, the newest first; [`Name::Other`] is the last.
    pub fn days(&self, from_ms: i64, to_ms: i64) -> Vec<Day> {
        let shown = self.inner.shown.read().clone();
        let days = shown.days.values().rev();
        days.filter(|day| day.min_ms <= to_ms && from_ms <= day.max_ms).cloned().collect()
    }

    /// Up to where everything that was stored can be found.
    pub fn caught_up_to(&self) -> Places {
        self.inner.shown.read().places.clone()
    }

    /// Whether all that was stored can be found.
    pub fn state(&self) -> State {
        let state = self.inner.state.lock().clone();
        if state.is_complete() && !self.inner.broken.lock().is_empty() { State::Rebuilding } else { state }
    }

    /// Lines that were stored and cannot be found yet.
    pub fn behind(&self) -> u64 {
        u64::try_from(self.inner.metrics.behind.get()).unwrap_or_default()
    }

    /// Each day, the newest first.
    pub fn status(&self) -> Vec<DayStatus> {
        let shown = self.inner.shown.read().clone();
        let rebuilding = self.inner.rebuilding.lock().clone();
        let status = |day: &Day| DayStatus {
            name: day.name,
            lines: day.searcher.num_docs(),
            segments: day.searcher.segment_readers().len(),
            bytes: day::bytes(&self.inner.dir, day.name),
            is_rebuilding: rebuilding.contains(&day.name),
        };
        shown.days.values().rev().map(status).collect()
    }

    fn set_state(&self, state: State) {
        *self.inner.state.lock() = state;
        self.inner.metrics.show(&self.state());
    }
}

fn lock(dir: &Path) -> Result<File> {
    let file = File::create(dir.join(LOCK)).map_err(TantivyError::from)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => {
            let told = format!("another process has {} open", dir.display());
            Err(TantivyError::SystemError(told).into())
        }
        Err(TryLockError::Error(error)) => Err(TantivyError::from(error).into()),
    }
}

/// None when there is nothing to go on from.
fn read(dir: &Path) -> Option<Followed> {
    let text = std::fs::read(dir.join(FOLLOWED)).ok()?;
    serde_json::from_slice::<Followed>(&text).ok().filter(|followed| followed.format == schema::FORMAT)
}

#[cfg(test)]
mod tests;
