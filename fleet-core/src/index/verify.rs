//! Whether a day of the index is what its rows make of it.
//!
//! The rows are indexed once more, in memory and a portion at a time, and the sums compared. It works while lines come and go: what is compared is one
//! moment of the index with the rows up to the places it has, and a day that differs is looked at again.

use std::collections::BTreeSet;

use chrono::{DateTime, Days, NaiveDate, Utc};
use sqlx::{PgConnection, PgPool};
use tantivy::directory::RamDirectory;
use tantivy::{IndexReader, ReloadPolicy};

use super::digest::{Sum, sum};
use super::schema::{Columns, FIELDS, document, tokenizers};
use super::tidy::midnight;
use super::{Index, Name, Places};
use crate::error::{Error, Result};
use crate::id::DeviceKey;
use crate::log::Line;
use crate::retention::{self, Kind};

/// Times that a day is looked at before it is said to differ. What is dropped meanwhile is in one and not in the other.
const ATTEMPTS: usize = 3;
/// Memory for indexing a portion of the rows.
const WRITER_BYTES: usize = 64 * 1024 * 1024;

/// What was found of a day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Which.
    pub name: Name,
    /// Lines in the index,
    pub index_lines: u64,
    /// and in the database.
    pub table_lines: u64,
    /// Whether the index leads to the same lines by the same words.
    pub is_equal: bool,
}

impl Index {
    /// Compares a day with its rows.
    ///
    /// # Errors
    /// When the database or the disk fails.
    pub async fn verify(&self, db: &PgPool, name: Name) -> Result<Verified> {
        let mut attempt = 1;
        loop {
            self.tidy(db).await?;
            let verified = self.compare(db, name).await?;
            if verified.is_equal || attempt == ATTEMPTS {
                return Ok(verified);
            }
            attempt += 1;
        }
    }

    async fn compare(&self, db: &PgPool, name: Name) -> Result<Verified> {
        let mut db = db.acquire().await?;
        let leaving = leaving(&mut db).await?;
        let shown = self.inner.shown.read().clone();
        let first = self.held().await.first();
        let (day, without) = (shown.days.get(&name).cloned(), leaving.clone());
        let index = in_background(move || day.map_or(Ok(Sum::default()), |day| sum(&day.searcher, &without))).await?;
        let limit = self.inner.settings.batch_lines;
        let table = of_rows(&mut db, &shown.places, within(name, first), &leaving, limit).await?;
        Ok(Verified { name, index_lines: index.lines, table_lines: table.lines, is_equal: index == table })
    }

    /// The days there are, in the index or the database, the newest first.
    ///
    /// # Errors
    /// When the database fails.
    pub async fn all_days(&self, db: &PgPool) -> Result<Vec<Name>> {
        let mut db = db.acquire().await?;
        let first = self.held().await.first();
        let mut names = self.inner.shown.read().days.keys().copied().collect::<BTreeSet<_>>();
        names.extend(retention::days_of(&mut db, Kind::Log).await?.into_iter().map(Name::Of));
        let apart = sqlx::query_scalar!(r#"select distinct (ts at time zone 'UTC')::date as "day!" from log_default"#);
        names.extend(apart.fetch_all(&mut *db).await?.into_iter().map(Name::Of));
        let names = names.into_iter().map(|name| if is_before(name, first) { Name::Other } else { name });
        Ok(names.collect::<BTreeSet<_>>().into_iter().rev().collect())
    }
}

/// Whether that day has no directory of its own.
fn is_before(name: Name, first: NaiveDate) -> bool {
    matches!(name, Name::Of(day) if day < first)
}

/// From when to before when.
pub(super) type Within = (Option<DateTime<Utc>>, Option<DateTime<Utc>>);

/// From when to before when the lines of a day are.
pub(super) fn within(name: Name, first: NaiveDate) -> Within {
    match name {
        Name::Other => (None, Some(midnight(first))),
        Name::Of(day) => (Some(midnight(day)), Some(midnight(day + Days::new(1)))),
    }
}

/// Runs what keeps a processor or a disk busy where it holds up nobody.
pub(super) async fn in_background<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|panicked| Error::Internal(format!("the index: {panicked}")))?
}

/// Devices whose lines are being deleted.
async fn leaving(db: &mut PgConnection) -> Result<BTreeSet<u64>> {
    let leaving = sqlx::query_scalar!(
        r#"select device_key as "key!: DeviceKey" from decommission
            where purge and finished_at is null and device_key is not null"#
    );
    Ok(leaving.fetch_all(db).await?.into_iter().map(|key| key.0.cast_unsigned()).collect())
}

async fn of_rows(
    db: &mut PgConnection,
    places: &Places,
    within: Within,
    leaving: &BTreeSet<u64>,
    limit: usize,
) -> Result<Sum> {
    let mut total = Sum::default();
    for (writer, last) in places {
        let mut place = 0;
        while place < *last {
            let stretch = Line::read_within(db, *writer, place, *last, within, limit).await?;
            place = stretch.reached;
            let leaving = leaving.clone();
            total.add(in_background(move || of_lines(&stretch.lines, &leaving)).await?);
        }
    }
    Ok(total)
}

fn of_lines(lines: &[Line], leaving: &BTreeSet<u64>) -> Result<Sum> {
    if lines.is_empty() {
        return Ok(Sum::default());
    }
    let builder = tantivy::Index::builder().schema(FIELDS.schema.clone()).tokenizers(tokenizers());
    let mut writer = builder.single_segment_index_writer(RamDirectory::create(), WRITER_BYTES)?;
    let mut columns = Columns::default();
    for line in lines {
        writer.add_document(document(line, &mut columns))?;
    }
    let index = writer.finalize()?;
    let reader: IndexReader = index.reader_builder().reload_policy(ReloadPolicy::Manual).try_into()?;
    sum(&reader.searcher(), leaving)
}
