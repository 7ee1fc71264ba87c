//! A day of the index: a directory of tantivy.

use std::fmt;
use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use chrono::{DateTime, Days, NaiveDate, NaiveTime};
use tantivy::directory::MmapDirectory;
use tantivy::store::Compressor;
use tantivy::{IndexReader, IndexSettings, ReloadPolicy, Searcher, TantivyError};

use super::schema::{FIELDS, tokenizers};
use crate::Result;

/// What a day is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Name {
    /// All that is older than the oldest day.
    Other,
    /// A day in UTC.
    Of(NaiveDate),
}

impl Name {
    /// That of a time, where days from `first` on have a directory each.
    pub(super) fn at(ts_ms: i64, first: NaiveDate) -> Self {
        let day = DateTime::from_timestamp_millis(ts_ms).map(|time| time.date_naive());
        day.filter(|day| *day >= first).map_or(Self::Other, Self::Of)
    }

    /// The first and the last of its milliseconds.
    pub(super) fn span(self, first: NaiveDate) -> (i64, i64) {
        match self {
            Self::Other => (i64::MIN, begin_ms(first) - 1),
            Self::Of(day) => {
                (begin_ms(day), (day + Days::new(1)).and_time(NaiveTime::MIN).and_utc().timestamp_millis() - 1)
            }
        }
    }
}

fn begin_ms(day: NaiveDate) -> i64 {
    day.and_time(NaiveTime::MIN).and_utc().timestamp_millis()
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Other => f.write_str("other"),
            Self::Of(day) => write!(f, "{day}"),
        }
    }
}

impl FromStr for Name {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let name = if text == "other" { Self::Other } else { Self::Of(text.parse().map_err(drop)?) };
        if name.to_string() == text { Ok(name) } else { Err(()) }
    }
}

/// A day as it can be searched; it does not change.
#[derive(Clone)]
pub struct Day {
    /// Which.
    pub name: Name,
    /// No line of it is earlier,
    pub min_ms: i64,
    /// and none is later.
    pub max_ms: i64,
    /// Its documents.
    pub searcher: Searcher,
}

impl fmt::Debug for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Day")
            .field("name", &self.name)
            .field("documents", &self.searcher.num_docs())
            .finish_non_exhaustive()
    }
}

/// The directories of days that there are.
pub(super) fn names(dir: &Path) -> Result<Vec<Name>> {
    Ok(entries(dir)?.iter().filter_map(|name| name.parse().ok()).collect())
}

fn entries(dir: &Path) -> Result<Vec<String>> {
    let entries =
        std::fs::read_dir(dir).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).map_err(TantivyError::from)?;
    Ok(entries.into_iter().filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

/// Where a day is made anew beside the one that is searched,
pub(super) fn beside(dir: &Path, name: Name) -> PathBuf {
    dir.join(format!("{name}.new"))
}

/// and where the old one goes, while the new one takes its place.
fn behind(dir: &Path, name: Name) -> PathBuf {
    dir.join(format!("{name}.old"))
}

/// Puts the day that was made anew in the place of the old one.
pub(super) fn swap(dir: &Path, name: Name) -> Result<()> {
    let (day, new, old) = (dir.join(name.to_string()), beside(dir, name), behind(dir, name));
    let swapped = || {
        std::fs::create_dir_all(&day)?;
        std::fs::rename(&day, &old)?;
        std::fs::rename(&new, &day)?;
        File::open(dir)?.sync_all()?;
        std::fs::remove_dir_all(&old)
    };
    Ok(swapped().map_err(TantivyError::from)?)
}

/// Ends what [`swap`] had begun, and clears away what was not finished before it.
pub(super) fn heal(dir: &Path) -> Result<()> {
    let names = entries(dir)?;
    for old in names.iter().filter_map(|name| name.strip_suffix(".old")).filter_map(|name| name.parse::<Name>().ok()) {
        if !dir.join(old.to_string()).exists() {
            std::fs::rename(beside(dir, old), dir.join(old.to_string())).map_err(TantivyError::from)?;
        }
        remove(dir, &format!("{old}.old"))?;
    }
    for new in names.iter().filter_map(|name| name.strip_suffix(".new")).filter_map(|name| name.parse::<Name>().ok()) {
        remove(dir, &format!("{new}.new"))?;
    }
    Ok(())
}

/// Removes a directory that may be there.
pub(super) fn remove(dir: &Path, name: &str) -> Result<()> {
    match std::fs::remove_dir_all(dir.join(name)) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(TantivyError::from(error).into()),
        _ => Ok(()),
    }
}

/// Bytes that a day's files take.
pub(super) fn bytes(dir: &Path, name: Name) -> u64 {
    let files = std::fs::read_dir(dir.join(name.to_string())).into_iter().flatten().flatten();
    files.filter_map(|file| file.metadata().ok()).map(|file| file.len()).sum()
}

/// A day's directory, open for reading.
#[derive(Clone)]
pub(super) struct Opened {
    pub(super) index: tantivy::Index,
    pub(super) reader: IndexReader,
}

/// Opens a day's directory, or makes it.
pub(super) fn open(dir: &Path, name: Name) -> Result<Opened> {
    open_at(&dir.join(name.to_string()))
}

pub(super) fn open_at(path: &Path) -> Result<Opened> {
    std::fs::create_dir_all(path).map_err(TantivyError::from)?;
    let directory = MmapDirectory::open(path).map_err(TantivyError::from)?;
    // Nothing is stored that could be compressed.
    let settings = IndexSettings {
        docstore_compression: Compressor::None,
        docstore_compress_dedicated_thread: false,
        ..IndexSettings::default()
    };
    let builder = tantivy::Index::builder().schema(FIELDS.schema.clone()).settings(settings).tokenizers(tokenizers());
    let index = builder.open_or_create(directory)?;
    let reader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
    Ok(Opened { index, reader })
}

impl Opened {
    /// What of it was committed and loaded.
    pub(super) fn shown(&self, name: Name, first: NaiveDate) -> Day {
        let (min_ms, max_ms) = name.span(first);
        Day { name, min_ms, max_ms, searcher: self.reader.searcher() }
    }
}
