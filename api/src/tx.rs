//! Transactions of callers: bound to the caller's tenant and scope, and a change only together with its audit entry.
//!
//! `caller.read(&app)` is for looking, `caller.change(&app)` for changing; both take one round trip to begin. Holds: a
//! [`Change`] is committed with an [`Entry`] or not at all. Routes that are called before anybody has logged in have
//! `app.begin()`, and `app.record()` once it is known who that is.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use fleet_core::Error;
use fleet_core::audit::{self, Author, Entry};
use fleet_core::id::TenantKey;
use fleet_core::tenancy::{self, Bounds};
use sqlx::{PgConnection, Postgres, Transaction};

use crate::extract::{Caller, Can, Right};
use crate::problem::Problem;
use crate::state::App;

/// A transaction that is never committed.
pub(crate) struct Reading(Transaction<'static, Postgres>);

impl Deref for Reading {
    type Target = PgConnection;
    fn deref(&self) -> &PgConnection {
        &self.0
    }
}

impl DerefMut for Reading {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.0
    }
}

/// A transaction that changes something.
pub(crate) struct Change {
    tx: Transaction<'static, Postgres>,
    by: Author,
    app: App,
}

impl Deref for Change {
    type Target = PgConnection;
    fn deref(&self) -> &PgConnection {
        &self.tx
    }
}

impl DerefMut for Change {
    fn deref_mut(&mut self) -> &mut PgConnection {
        &mut self.tx
    }
}

impl Change {
    /// Commits the change together with what is to be known of it.
    pub(crate) async fn commit(self, entry: Entry) -> Result<(), Problem> {
        self.commit_each(vec![entry]).await
    }

    /// Writes down what is done in another tenant, which this transaction has entered, by somebody who stands above tenants.
    pub(crate) async fn record_in(&mut self, tenant: TenantKey, entry: &Entry) -> Result<(), Problem> {
        let by = Author { tenant, ..self.by.clone() };
        audit::record(&mut self.tx, &by, entry, self.app.clock.now()).await?;
        Ok(())
    }

    /// As [`Change::commit`], for a change of many resources.
    pub(crate) async fn commit_each(mut self, entries: Vec<Entry>) -> Result<(), Problem> {
        self.app.record(&mut self.tx, &self.by, &entries).await?;
        Ok(self.tx.commit().await?)
    }
}

impl<R: Right> Can<R> {
    /// A transaction that sees what the caller may see with the permission `R`.
    pub(crate) async fn read(&self, app: &App) -> Result<Reading, Problem> {
        begin(app, &self.bounds()).await.map(Reading)
    }

    /// A transaction that may change what the caller may change with the permission `R`.
    pub(crate) async fn change(&self, app: &App) -> Result<Change, Problem> {
        change(app, &self.bounds(), self.author()).await
    }

    fn bounds(&self) -> Bounds {
        self.caller.bounds().within(self.scope())
    }

    /// Whether the caller has `R` for the whole tenant.
    pub(crate) fn is_unscoped(&self) -> bool {
        self.caller.extent(R::PERMISSION).is_everything()
    }

    /// The scope that the caller has for `R`.
    fn scope(&self) -> String {
        self.caller.extent(R::PERMISSION).setting()
    }
}

impl Caller {
    /// A transaction for what every caller may see: itself.
    pub(crate) async fn read_self(&self, app: &App) -> Result<Reading, Problem> {
        begin(app, &self.bounds()).await.map(Reading)
    }

    /// A transaction for what every caller may change: what is its own.
    pub(crate) async fn change_self(&self, app: &App) -> Result<Change, Problem> {
        change(app, &self.bounds(), self.author()).await
    }

    /// Refuses a caller who does not stand above tenants: `what` is for those who do.
    pub(crate) fn needs_platform(&self, what: &'static str) -> Result<(), Problem> {
        if self.manager().platform { Ok(()) } else { Err(Error::NotPlatform(what).into()) }
    }

    /// A transaction that nothing binds, for what belongs to no tenant: `what`, which only who has platform standing may do.
    pub(crate) async fn change_platform(&self, app: &App, what: &'static str) -> Result<Change, Problem> {
        self.needs_platform(what)?;
        Ok(Change { tx: app.begin().await?, by: self.author(), app: app.clone() })
    }

    fn bounds(&self) -> Bounds {
        Bounds::of(self.tenant).above_tenants(self.manager().platform)
    }
}

impl App {
    /// Writes down what is done in a transaction, last in it.
    pub(crate) async fn record(&self, db: &mut PgConnection, by: &Author, entries: &[Entry]) -> Result<(), Problem> {
        let recorded = audit::record_all(db, by, entries, self.clock.now()).await?;
        self.metrics.audit_cut.inc_by(recorded.cut);
        Ok(())
    }
}

async fn change(app: &App, bounds: &Bounds, by: Author) -> Result<Change, Problem> {
    Ok(Change { tx: begin(app, bounds).await?, by, app: app.clone() })
}

async fn begin(app: &App, bounds: &Bounds) -> Result<Transaction<'static, Postgres>, Problem> {
    Ok(tenancy::begin(&app.db, bounds, Duration::from_millis(app.http.request_timeout_ms)).await?)
}
