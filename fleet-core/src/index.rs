//! The index of log lines: by what they say, and by day.
//!
//! [`Index::open`] takes a directory; [`Index::days`] is what can be searched in it. Holds: rows are the truth, and the index holds
//! nothing that cannot be made anew from them; a line is in one day, once. Ignorant of: queries, MQTT, HTTP.
//! Why a directory a day: dropping one gives its space back at once, and the newest lines are looked for in few documents (ADR 15).

mod day;
pub mod schema;

use std::collections::BTreeMap;
use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use chrono::NaiveDate;
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use tantivy::TantivyError;

pub use self::day::{Day, Name};
use crate::Result;
use crate::config::Search;

/// How far each writer's lines are followed: its places by its number.
pub type Places = BTreeMap<i16, i64>;

const LOCK: &str = "lock";
const FOLLOWED: &str = "followed.json";

/// An open index; cheap to clone.
#[derive(Debug, Clone)]
pub struct Index {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    #[expect(dead_code, reason = "for what follows the rows")]
    dir: PathBuf,
    #[expect(dead_code, reason = "for what follows the rows")]
    settings: Search,
    /// Held as long as the index is open.
    _lock: File,
    shown: RwLock<Arc<Shown>>,
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

impl Index {
    /// Opens the index in a directory, which is made if it is not there. One of another format is emptied: it will be made anew.
    ///
    /// # Errors
    /// When the directory cannot be written, or another process has it open.
    pub fn open(dir: &Path, settings: &Search) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(TantivyError::from)?;
        let lock = lock(dir)?;
        let followed = read(dir);
        let mut days = BTreeMap::new();
        if let Some(followed) = &followed {
            for name in day::names(dir)? {
                days.insert(name, day::open(dir, name)?.shown(name, followed.first));
            }
        }
        let places = followed.map(|followed| followed.places).unwrap_or_default();
        let shown = RwLock::new(Arc::new(Shown { days, places }));
        Ok(Self { inner: Arc::new(Inner { dir: dir.to_owned(), settings: settings.clone(), _lock: lock, shown }) })
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
