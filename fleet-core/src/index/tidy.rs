//! Drops from the index what was dropped from the database: days, lines that came too late, devices that are gone.

use std::collections::BTreeSet;
use std::ops::Bound;

use chrono::{DateTime, NaiveDate, NaiveTime, Utc};
use sqlx::{PgConnection, PgPool};
use tantivy::Searcher;

use super::Index;
use super::day::{self, Name};
use super::follow::blocking;
use super::schema::FIELDS;
use super::writers::Writers;
use crate::Result;
use crate::log::Line;
use crate::retention::{self, Kind};

pub(super) fn midnight(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(NaiveTime::MIN).and_utc()
}

/// The oldest day whose lines are kept apart.
pub(super) async fn oldest_day(db: &mut PgConnection) -> Result<Option<NaiveDate>> {
    Ok(retention::days_of(db, Kind::Log).await?.first().copied())
}

impl Index {
    /// Drops what the database has dropped.
    pub(super) async fn tidy(&self, db: &PgPool) -> Result<()> {
        self.drop_days(db).await?;
        self.trim_other(db).await?;
        self.purge(db).await?;
        self.measure();
        Ok(())
    }

    pub(super) async fn drop_days(&self, db: &PgPool) -> Result<()> {
        let mut db = db.acquire().await?;
        match oldest_day(&mut db).await? {
            Some(oldest) => self.move_first(&mut db, oldest).await,
            None => Ok(()),
        }
    }

    /// Drops the days before `oldest`, as the database has. Lines of them that came later are kept by both.
    async fn move_first(&self, db: &mut PgConnection, oldest: NaiveDate) -> Result<()> {
        let writers = self.held().await;
        if writers.followed.is_none() || oldest <= writers.first() {
            return Ok(());
        }
        let within = (Some(midnight(writers.first())), Some(midnight(oldest)));
        let (mut writers, ()) = blocking(writers, move |writers| writers.begin_move(oldest)).await?;
        for (writer, last) in writers.reached.clone() {
            let mut place = 0;
            while place < last {
                let limit = self.inner.settings.batch_lines;
                let late = Line::read_within(db, writer, place, last, within, limit).await?;
                place = late.reached;
                writers = blocking(writers, move |writers| writers.add_late(&late.lines)).await?.0;
            }
        }
        let (writers, ()) = blocking(writers, move |writers| writers.end_move(oldest)).await?;
        self.show(&writers);
        tracing::info!(%oldest, "days of the index dropped");
        Ok(())
    }

    /// Deletes from [`Name::Other`] what is older than the oldest line of it that there still is.
    async fn trim_other(&self, db: &PgPool) -> Result<()> {
        let writers = self.held().await;
        let Some(searcher) = writers.opened.get(&Name::Other).map(|other| other.reader.searcher()) else {
            return Ok(());
        };
        let oldest = sqlx::query_scalar!("select min(ts) from log where ts < $1", midnight(writers.first()));
        let oldest = oldest.fetch_one(db).await?;
        let keep_from = oldest.unwrap_or_else(|| midnight(writers.first())).timestamp_millis();
        if earliest(&searcher)?.is_none_or(|earliest| earliest >= keep_from) {
            return Ok(());
        }
        let trim = move |writers: &mut Writers| {
            writers.delete_other(Bound::Unbounded, keep_from)?;
            writers.commit()
        };
        let (writers, ()) = blocking(writers, trim).await?;
        self.show(&writers);
        Ok(())
    }

    /// Deletes the lines of devices that are gone, whenever a purge has ended since it was last looked.
    async fn purge(&self, db: &PgPool) -> Result<()> {
        let ended = sqlx::query_scalar!(
            r#"select count(*) as "count!" from decommission where purge and finished_at is not null"#
        );
        let ended = ended.fetch_one(db).await?;
        if *self.inner.purged.lock() == Some(ended) {
            return Ok(());
        }
        self.commit().await?;
        let writers = self.held().await;
        let (writers, known) = blocking(writers, |writers| devices_of(writers)).await?;
        let keys = known.iter().map(|key| key.cast_signed()).collect::<Vec<_>>();
        let gone = sqlx::query_scalar!(
            r#"select known.key as "key!" from unnest($1::bigint[]) as known (key)
                where not exists (select from device where device.key = known.key)"#,
            &keys
        );
        let gone = gone.fetch_all(db).await?.into_iter().map(i64::cast_unsigned).collect::<Vec<_>>();
        if !gone.is_empty() {
            let devices = gone.len();
            let (writers, ()) = blocking(writers, move |writers| purge_from(writers, &gone)).await?;
            self.show(&writers);
            tracing::info!(devices, "lines of devices that are gone deleted from the index");
        }
        *self.inner.purged.lock() = Some(ended);
        Ok(())
    }

    /// What the index takes.
    fn measure(&self) {
        let days = self.inner.shown.read().clone();
        let bytes = days.days.keys().map(|name| day::bytes(&self.inner.dir, *name)).sum::<u64>();
        self.inner.metrics.bytes.set(i64::try_from(bytes).unwrap_or(i64::MAX));
    }
}

/// No document is earlier; there may be none as early any more.
fn earliest(searcher: &Searcher) -> Result<Option<i64>> {
    let mut earliest = None::<i64>;
    for segment in searcher.segment_readers() {
        let ts = segment.fast_fields().i64("ts")?;
        for document in segment.doc_ids_alive() {
            let at = ts.first(document);
            earliest = earliest.into_iter().chain(at).min();
        }
    }
    Ok(earliest)
}

/// All devices that have lines, or had some.
fn devices_of(writers: &Writers) -> Result<BTreeSet<u64>> {
    let mut devices = BTreeSet::new();
    for opened in writers.opened.values() {
        devices.extend(devices_in(&opened.reader.searcher())?);
    }
    Ok(devices)
}

fn devices_in(searcher: &Searcher) -> Result<BTreeSet<u64>> {
    let mut devices = BTreeSet::new();
    for segment in searcher.segment_readers() {
        let index = segment.inverted_index(FIELDS.device)?;
        let mut terms = index.terms().stream().map_err(tantivy::TantivyError::from)?;
        while let Some((key, _)) = terms.next() {
            devices.extend(<[u8; 8]>::try_from(key).map(u64::from_be_bytes));
        }
    }
    Ok(devices)
}

fn purge_from(writers: &mut Writers, gone: &[u64]) -> Result<()> {
    for name in writers.opened.keys().copied().collect::<Vec<_>>() {
        let has = devices_in(&writers.opened[&name].reader.searcher())?;
        let gone = gone.iter().copied().filter(|device| has.contains(device)).collect::<Vec<_>>();
        if !gone.is_empty() {
            writers.delete_devices(name, &gone)?;
        }
    }
    writers.commit()
}
