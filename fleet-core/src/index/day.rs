//! A day of the index: a directory of tantivy.

use std::fmt;
use std::path::Path;
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
    #[expect(dead_code, reason = "for what follows the rows")]
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
    let mut names = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(TantivyError::from)? {
        let entry = entry.map_err(TantivyError::from)?;
        names.extend(entry.file_name().to_str().and_then(|name| name.parse::<Name>().ok()));
    }
    Ok(names)
}

/// A day's directory, open for reading.
#[derive(Clone)]
pub(super) struct Opened {
    #[expect(dead_code, reason = "for what follows the rows")]
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
