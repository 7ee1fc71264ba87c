//! Work on the index that takes a while: verifying days, and making them anew. One at a time, asked for and watched by others.

use chrono::{DateTime, Utc};
use sqlx::PgPool;

use super::{Index, Name, Verified};
use crate::clock::Clock;
use crate::error::{Error, Result};

/// What is done with days.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Task {
    /// They are compared with their rows.
    Verify,
    /// They are made anew, and compared.
    Rebuild,
}

/// What came of a day.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Looked {
    /// Which.
    pub name: Name,
    /// What was found in the end, or what failed.
    pub found: Result<Verified, String>,
}

/// Work that is done, or goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// What is done.
    pub task: Task,
    /// Since when.
    pub started_at: DateTime<Utc>,
    /// When it ended.
    pub finished_at: Option<DateTime<Utc>>,
    /// The days it is about, the newest first.
    pub days: Vec<Name>,
    /// Those that are done.
    pub looked: Vec<Looked>,
}

impl Index {
    /// The last work that was asked for.
    pub fn job(&self) -> Option<Job> {
        self.inner.job.lock().clone()
    }

    /// Begins work on one day, or on all. It goes on by itself; [`Index::job`] shows how far it is.
    ///
    /// # Errors
    /// [`Error::Busy`] while other work goes on.
    pub async fn begin(&self, db: &PgPool, clock: &Clock, task: Task, day: Option<Name>) -> Result<()> {
        let days = match day {
            Some(name) => vec![name],
            None => self.all_days(db).await?,
        };
        {
            let mut job = self.inner.job.lock();
            if job.as_ref().is_some_and(|job| job.finished_at.is_none()) {
                return Err(Error::Busy("jobs of the index"));
            }
            let started_at = clock.now();
            *job = Some(Job { task, started_at, finished_at: None, days: days.clone(), looked: Vec::new() });
        }
        let (index, db, clock) = (self.clone(), db.clone(), clock.clone());
        tokio::spawn(async move { index.work(&db, &clock, task, days).await });
        Ok(())
    }

    async fn work(&self, db: &PgPool, clock: &Clock, task: Task, days: Vec<Name>) {
        for name in days {
            let found = self.work_on(db, task, name).await.map_err(|error| error.to_string());
            match &found {
                Ok(found) if found.is_equal => tracing::info!(day = %name, ?task, "a day of the index is right"),
                found => tracing::warn!(day = %name, ?task, ?found, "a day of the index is not right"),
            }
            self.inner.job.lock().iter_mut().for_each(|job| job.looked.push(Looked { name, found: found.clone() }));
        }
        self.inner.job.lock().iter_mut().for_each(|job| job.finished_at = Some(clock.now()));
    }

    async fn work_on(&self, db: &PgPool, task: Task, name: Name) -> Result<Verified> {
        if task == Task::Rebuild {
            self.rebuild(db, name).await?;
        }
        self.verify(db, name).await
    }
}
