//! Requests that were refused although it is known whose they were: counted in memory, and written down now and then.
//!
//! Holds: refusals of one caller for one reason are one entry of the audit in each `audit.denials_every_s`, however many they
//! were; how many callers and reasons are remembered between is bounded.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use chrono::{DateTime, Utc};
use fleet_core::audit::{self, Author, Entry};
use parking_lot::Mutex;
use serde_json::json;

use crate::state::App;
use crate::time::rfc3339;

/// Whose request it is, once that is known: put into its extensions at the door, filled in where the caller is found out.
#[derive(Debug, Clone, Default)]
pub(crate) struct Visitor(Arc<OnceLock<Author>>);

impl Visitor {
    /// It is theirs.
    pub(crate) fn is(&self, author: Author) {
        // The first to find out is right: nobody else looks at the same token.
        let _known = self.0.set(author);
    }

    pub(crate) fn author(&self) -> Option<&Author> {
        self.0.get()
    }
}

/// What was refused, so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Denials(Arc<Mutex<HashMap<Key, Tally>>>);

type Key = (fleet_core::id::TenantKey, audit::Actor, &'static str);

/// Refusals of one caller for one reason.
#[derive(Debug)]
struct Tally {
    /// From where the last one came.
    last: Author,
    /// What it asked for.
    asked: String,
    count: u64,
    since: DateTime<Utc>,
    until: DateTime<Utc>,
}

impl Denials {
    /// Counts one, if there is room; `what` is the permission that was missing, or another reason.
    fn add(&self, by: &Author, what: &'static str, asked: String, room: usize, now: DateTime<Utc>) -> bool {
        let mut tallies = self.0.lock();
        let key = (by.tenant, by.actor.clone(), what);
        if tallies.len() >= room && !tallies.contains_key(&key) {
            return false;
        }
        let tally = tallies.entry(key).or_insert_with(|| Tally {
            last: by.clone(),
            asked: String::new(),
            count: 0,
            since: now,
            until: now,
        });
        (tally.last, tally.asked, tally.until) = (by.clone(), asked, now);
        tally.count += 1;
        true
    }

    fn take(&self) -> Vec<(Key, Tally)> {
        self.0.lock().drain().collect()
    }
}

impl App {
    /// Counts a request of a known caller that was refused.
    pub(crate) fn denied(&self, by: &Author, what: &'static str, asked: String) {
        self.metrics.denials.with_label_values(&[what]).inc();
        let room = if self.audit.denials_every_s == 0 { 0 } else { self.audit.max_denials };
        if !self.denials.add(by, what, asked, room, self.clock.now()) && room > 0 {
            self.metrics.denials_forgotten.inc();
        }
    }

    /// Writes down what was refused since it was last called; to be called every `audit.denials_every_s`, and at the end.
    pub async fn write_denials(&self) {
        for ((_, _, what), tally) in self.denials.take() {
            if let Err(error) = self.write_denial(what, &tally).await {
                tracing::warn!(%error, what, count = tally.count, "refused requests could not be written down");
            }
        }
    }

    async fn write_denial(&self, what: &'static str, tally: &Tally) -> fleet_core::Result<()> {
        let (since, until) = (rfc3339(tally.since), rfc3339(tally.until));
        let after = json!({ "count": tally.count, "first_at": since, "last_at": until, "last": tally.asked });
        let mut tx = self.begin().await?;
        audit::record(&mut tx, &tally.last, &Entry::of("access.denied", what).after(&after), self.clock.now()).await?;
        tx.commit().await?;
        Ok(())
    }
}
