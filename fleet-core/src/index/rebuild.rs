//! Makes a day anew from its rows, beside the one that is searched meanwhile, and puts it in its place.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use tantivy::TantivyError;

use super::day::{self, Name};
use super::follow::blocking;
use super::verify::{Within, in_background, within};
use super::writers::{Writers, Writing};
use super::{Index, Places};
use crate::error::{Error, Result};
use crate::log::Line;

/// How long it waits to try again to make a day anew that could not be read.
const MEND_AGAIN_AFTER: Duration = Duration::from_secs(5);

/// Takes a day off the list of those being made anew, however that ends.
struct Listed<'a>(&'a Index, Name);

impl<'a> Listed<'a> {
    fn new(index: &'a Index, name: Name) -> Self {
        index.inner.rebuilding.lock().insert(name);
        Self(index, name)
    }
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.0.inner.rebuilding.lock().remove(&self.1);
    }
}

impl Index {
    /// Makes a day anew.
    ///
    /// # Errors
    /// When the database or the disk fails; the day is as it was then.
    pub async fn rebuild(&self, db: &PgPool, name: Name) -> Result<()> {
        let _alone = self.inner.rebuild.lock().await;
        let _listed = Listed::new(self, name);
        let mut db = db.acquire().await?;
        let done = self.make_anew(&mut db, name).await;
        if done.is_err() {
            day::remove(&self.inner.dir, &format!("{name}.new"))?;
        }
        done
    }

    async fn make_anew(&self, db: &mut PgConnection, name: Name) -> Result<()> {
        let (first, places) = {
            let writers = self.held().await;
            (writers.first(), writers.followed.as_ref().map(|followed| followed.places.clone()).unwrap_or_default())
        };
        let (dir, settings) = (self.inner.dir.clone(), self.inner.settings.clone());
        let open = move || {
            day::remove(&dir, &format!("{name}.new"))?;
            Writing::open(name, &day::open_at(&day::beside(&dir, name))?, &settings)
        };
        let writing = in_background(open).await?;
        let mut writing = self.copy(db, writing, within(name, first), (&Places::new(), &places)).await?;
        let until = places.clone();
        in_background(move || {
            writing.commit(&until)?;
            writing.close()
        })
        .await?;
        let writers = self.held().await;
        let (writers, ()) = blocking(writers, Writers::commit).await?;
        if writers.first() != first {
            // The day was dropped meanwhile, or more belongs to it now.
            return Err(Error::Busy("changes to the days of the index"));
        }
        let reached = writers.reached.clone();
        let path = day::beside(&self.inner.dir, name);
        let settings = self.inner.settings.clone();
        let reopened = in_background(move || Writing::open(name, &day::open_at(&path)?, &settings)).await?;
        let mut tail = self.copy(db, reopened, within(name, first), (&places, &reached)).await?;
        let swap = move |writers: &mut Writers| {
            tail.commit(&reached)?;
            drop(tail);
            writers.swap(name)
        };
        let (writers, ()) = blocking(writers, swap).await?;
        self.show(&writers);
        self.inner.broken.lock().remove(&name);
        self.inner.metrics.show(&self.state());
        // Devices may have been purged while their lines were copied.
        *self.inner.purged.lock() = None;
        Ok(())
    }

    /// Copies what a day has between these places.
    async fn copy(
        &self,
        db: &mut PgConnection,
        mut writing: Writing,
        within: Within,
        (from, to): (&Places, &Places),
    ) -> Result<Writing> {
        for (writer, last) in to {
            let mut place = from.get(writer).copied().unwrap_or_default();
            while place < *last {
                if !self.has_room(0) {
                    return Err(TantivyError::SystemError("the disk is full".to_owned()).into());
                }
                let limit = self.inner.settings.batch_lines;
                let stretch = Line::read_within(db, *writer, place, *last, within, limit).await?;
                place = stretch.reached;
                writing = in_background(move || {
                    stretch.lines.iter().try_for_each(|line| writing.add(line).map(drop))?;
                    Ok(writing)
                })
                .await?;
            }
        }
        Ok(writing)
    }

    /// Makes the days anew that could not be read.
    pub(super) async fn mend(&self, db: &PgPool) {
        let broken = self.inner.broken.lock().clone();
        for name in broken {
            while let Err(error) = self.rebuild(db, name).await {
                tracing::warn!(day = %name, %error, "a day of the index could not be made anew; it is tried again");
                tokio::time::sleep(MEND_AGAIN_AFTER).await;
            }
        }
    }
}
