//! Requests that were refused although it is known whose they were, and logins that failed although it is known to whose
//! account: counted in memory, and written down now and then.
//!
//! Holds: refusals of one caller for one reason, and failed logins to one account, are one entry of the audit in each
//! `audit.denials_every_s`, however many they were; how many callers, reasons and accounts are remembered between is bounded.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};

use chrono::{DateTime, Utc};
use fleet_core::audit::{self, Author, Entry};
use fleet_core::id::UserId;
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

type Key = (fleet_core::id::TenantKey, audit::Actor, What);

/// What was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum What {
    /// A request, for lack of a permission, or for another reason.
    Request(&'static str),
    /// A login to an account.
    Login(UserId),
}

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
    /// Until when the account has to wait.
    locked_until: Option<DateTime<Utc>>,
}

impl Tally {
    /// What is written down of it.
    fn entries(&self, what: What) -> Vec<Entry> {
        let body = |last: &str| {
            let (since, until) = (rfc3339(self.since), rfc3339(self.until));
            json!({ "count": self.count, "first_at": since, "last_at": until, last: self.asked })
        };
        match what {
            What::Request(what) => vec![Entry::of("access.denied", what).after(&body("last"))],
            What::Login(user) => {
                let locked = self.locked_until.map(|until| json!({ "blocked_until": rfc3339(until) }));
                let failed = Entry::of("user.fail-log-in", user).after(&body("wrong"));
                std::iter::once(failed).chain(locked.map(|body| Entry::of("user.lock", user).after(&body))).collect()
            }
        }
    }
}

impl Denials {
    /// Counts one, if there is room.
    fn add(&self, by: &Author, refused: Refused, room: usize, now: DateTime<Utc>) -> bool {
        let mut tallies = self.0.lock();
        let key = (by.tenant, by.actor.clone(), refused.what);
        if tallies.len() >= room && !tallies.contains_key(&key) {
            return false;
        }
        let tally = tallies.entry(key).or_insert_with(|| Tally {
            last: by.clone(),
            asked: String::new(),
            count: 0,
            since: now,
            until: now,
            locked_until: None,
        });
        (tally.last, tally.asked, tally.until) = (by.clone(), refused.asked, now);
        tally.locked_until = refused.locked_until.or(tally.locked_until);
        tally.count += 1;
        true
    }

    fn take(&self) -> Vec<(Key, Tally)> {
        self.0.lock().drain().collect()
    }
}

/// One of them.
struct Refused {
    what: What,
    asked: String,
    locked_until: Option<DateTime<Utc>>,
}

impl App {
    /// Counts a request of a known caller that was refused; `what` is the permission that was missing, or another reason.
    pub(crate) fn denied(&self, by: &Author, what: &'static str, asked: String) {
        self.metrics.denials.with_label_values(&[what]).inc();
        self.tally(by, Refused { what: What::Request(what), asked, locked_until: None });
    }

    /// Counts a failed login to a known account; `wrong` says what was wrong.
    pub(crate) fn failed_login(
        &self,
        by: &Author,
        to: UserId,
        wrong: &'static str,
        locked_until: Option<DateTime<Utc>>,
    ) {
        self.tally(by, Refused { what: What::Login(to), asked: wrong.to_owned(), locked_until });
    }

    fn tally(&self, by: &Author, refused: Refused) {
        let room = if self.audit.denials_every_s == 0 { 0 } else { self.audit.max_denials };
        if !self.denials.add(by, refused, room, self.clock.now()) && room > 0 {
            self.metrics.denials_forgotten.inc();
        }
    }

    /// Writes down what was refused since it was last called; to be called every `audit.denials_every_s`, and at the end.
    pub async fn write_denials(&self) {
        for ((_, _, what), tally) in self.denials.take() {
            if let Err(error) = self.write_denial(what, &tally).await {
                tracing::warn!(%error, ?what, count = tally.count, "refused requests could not be written down");
            }
        }
    }

    async fn write_denial(&self, what: What, tally: &Tally) -> fleet_core::Result<()> {
        let mut tx = self.begin().await?;
        audit::record_all(&mut tx, &tally.last, &tally.entries(what), self.clock.now()).await?;
        tx.commit().await?;
        Ok(())
    }
}
