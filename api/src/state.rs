//! What every handler is given: [`App`], made once in `main`. No globals, so ten fleets can run in one test process.

use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::http::HeaderValue;
use fleet_core::authority::Pki;
use fleet_core::clock::Clock;
use fleet_core::config::{self, Audit, Auth, Commands, Config, Http, Logs, Provisioning, Shadow};
use fleet_core::control::{self, Answers, Request};
use fleet_core::index::Index;
use fleet_core::log::feed::Feed;
use fleet_core::places::Places;
use fleet_core::search::{self, Search};
use fleet_core::token::Keys;
use fleet_core::user::Logins;
use prometheus::Registry;
use sqlx::{AssertSqlSafe, PgPool, Postgres, Transaction};

use crate::denials::Denials;
use crate::metrics::Metrics;
use crate::oidc::Provider;
use crate::otlp::Receiver;
use crate::problem::Problem;

/// A check that has not answered by then counts as failed.
const CHECK_TIMEOUT: Duration = Duration::from_secs(2);
/// PostgreSQL keeps the time in 31 bits.
const MAX_STATEMENT_TIMEOUT_MS: u64 = i32::MAX as u64;

/// What it takes to search an index.
type Searching = Arc<(config::Search, search::Metrics)>;

/// The HTTP door's share of the program; cheap to clone.
#[derive(Clone)]
pub struct App {
    pub(crate) db: PgPool,
    pub(crate) clock: Clock,
    pub(crate) keys: Arc<Keys>,
    pub(crate) pki: Pki,
    pub(crate) logins: Logins,
    pub(crate) registry: Registry,
    pub(crate) metrics: Metrics,
    pub(crate) health: Health,
    pub(crate) http: Arc<Http>,
    pub(crate) auth: Arc<Auth>,
    pub(crate) provisioning: Arc<Provisioning>,
    pub(crate) shadow: Arc<Shadow>,
    pub(crate) commands: Arc<Commands>,
    pub(crate) audit: Arc<Audit>,
    pub(crate) logs: Arc<Logs>,
    pub(crate) feed: Feed,
    /// For those who export log lines.
    pub(crate) exports: Places,
    pub(crate) denials: Denials,
    pub(crate) oidc: Option<Arc<Provider>>,
    /// Log lines by what they say.
    pub(crate) index: Option<Index>,
    pub(crate) otlp: Arc<Receiver>,
    searching: Searching,
    search: Option<Search>,
    /// `Strict-Transport-Security`, unless that is switched off.
    pub(crate) hsts: Option<HeaderValue>,
}

impl App {
    /// Registers its metrics in `registry`, which `/metrics` prints as a whole. To be called within a runtime.
    ///
    /// # Errors
    /// When a metric of the same name is registered already.
    pub fn new(
        db: PgPool,
        clock: Clock,
        keys: Arc<Keys>,
        pki: Pki,
        registry: Registry,
        config: &Config,
        health: Health,
    ) -> Result<Self, prometheus::Error> {
        let metrics = Metrics::register(&registry)?;
        let logins = Logins::new(config.auth.login_concurrency);
        let (http, auth) = (Arc::new(config.http.clone()), Arc::new(config.auth.clone()));
        let provisioning = Arc::new(config.provisioning.clone());
        let shadow = Arc::new(config.shadow.clone());
        let searching = Arc::new((config.search.clone(), search::Metrics::register(&registry)?));
        let logs = Arc::new(config.logs.clone());
        let feed = Feed::new(db.clone(), keys.clone(), clock.clone(), config.logs.clone(), &registry)?;
        let exports = Places::new(logs.max_exports, logs.max_exports_per_user);
        let commands = Arc::new(config.commands.clone());
        let (audit, denials) = (Arc::new(config.audit.clone()), Denials::default());
        let hsts = HeaderValue::from_str(&format!("max-age={}; includeSubDomains", http.hsts_s)).ok();
        let hsts = hsts.filter(|_| http.hsts_s > 0);
        let oidc = Provider::of(&config.oidc, &clock);
        let otlp = Arc::new(Receiver::start(&db, &clock, config, &registry)?);
        Ok(Self {
            db,
            clock,
            keys,
            pki,
            logins,
            registry,
            metrics,
            health,
            http,
            auth,
            provisioning,
            shadow,
            commands,
            audit,
            logs,
            feed,
            exports,
            denials,
            oidc,
            index: None,
            otlp,
            searching,
            search: None,
            hsts,
        })
    }

    /// Lets log lines be searched.
    ///
    /// # Errors
    /// The threads that search cannot be started.
    pub fn with_index(self, index: Index) -> fleet_core::Result<Self> {
        let (settings, metrics) = &*self.searching;
        let search = Search::new(index.clone(), settings, metrics.clone())?;
        Ok(Self { index: Some(index), search: Some(search), ..self })
    }

    /// The index, where this process keeps one.
    pub(crate) fn index(&self) -> Result<&Index, Problem> {
        self.index.as_ref().ok_or_else(Problem::no_index)
    }

    /// A transaction bound to nobody, for what is done before anybody has logged in; all else has `tx.rs`. Its statements
    /// end when the request does: else each search that was given up would keep a connection busy.
    pub(crate) async fn begin(&self) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
        // Both at once: a setting of its own would cost each request another round trip.
        let limit_ms = self.http.request_timeout_ms.min(MAX_STATEMENT_TIMEOUT_MS);
        self.db.begin_with(AssertSqlSafe(format!("begin; set local statement_timeout = {limit_ms}"))).await
    }
}

impl App {
    /// What searches log lines.
    pub(crate) fn search(&self) -> Result<&Search, Problem> {
        let away = || Problem::new(503, "no-index", "this server keeps no index of log lines");
        self.search.as_ref().ok_or_else(away)
    }

    /// Ends what would go on for ever by itself, so that the server can stop.
    pub fn end_streams(&self) {
        self.feed.stop();
    }

    /// Asks all brokers that are alive.
    pub(crate) async fn ask_brokers(&self, request: &Request) -> fleet_core::Result<Answers> {
        control::ask(&self.db, request, Duration::from_millis(self.http.broker_answer_ms)).await
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<(), String>> + Send>>;
type Check = Arc<dyn Fn() -> Answer + Send + Sync>;

/// What must hold for the server to be of use, each under its name. The database is always among it.
#[derive(Clone, Default)]
pub struct Health {
    checks: Vec<(&'static str, Check)>,
}

impl fmt::Debug for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.checks.iter().map(|(name, _)| name)).finish()
    }
}

impl Health {
    /// Nothing but the database.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a check: `Err` says in a few words, without secrets, why it does not hold. It has two seconds to answer.
    #[must_use]
    pub fn with<F, A>(mut self, name: &'static str, check: F) -> Self
    where
        F: Fn() -> A + Send + Sync + 'static,
        A: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.checks.push((name, Arc::new(move || Box::pin(check()))));
        self
    }

    /// Each check by name with its answer.
    pub(crate) async fn ask(&self) -> Vec<(&'static str, Result<(), String>)> {
        let mut answers = Vec::new();
        for (name, check) in &self.checks {
            answers.push((*name, in_time(check()).await));
        }
        answers
    }
}

/// The answer of a check, or that there was none in time.
pub(crate) async fn in_time(check: impl Future<Output = Result<(), String>>) -> Result<(), String> {
    let late = || Err(format!("no answer within {} s", CHECK_TIMEOUT.as_secs()));
    tokio::time::timeout(CHECK_TIMEOUT, check).await.unwrap_or_else(|_| late())
}
