//! The metrics of the HTTP door. Labels are closed: a route is the pattern that matched, never the path that was asked.

use fleet_core::claim::request::{Answer, Code};
use prometheus::process_collector::ProcessCollector;
use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry};

use crate::problem::BOUNDS;

#[derive(Clone)]
pub(crate) struct Metrics {
    pub(crate) requests: IntCounterVec,
    pub(crate) seconds: HistogramVec,
    pub(crate) problems: IntCounterVec,
    pub(crate) pages_clamped: IntCounter,
    pub(crate) logins_busy: IntCounter,
    pub(crate) provision: IntCounterVec,
    pub(crate) logins_failed: IntCounterVec,
    pub(crate) logins_locked: IntCounterVec,
    pub(crate) oidc_forgotten: IntCounter,
    pub(crate) sessions_ended: IntCounterVec,
    pub(crate) denials: IntCounterVec,
    pub(crate) denials_forgotten: IntCounter,
    pub(crate) audit_cut: IntCounter,
    pub(crate) connections: IntGaugeVec,
    pub(crate) exports: IntGauge,
}

impl Metrics {
    pub(crate) fn register(registry: &Registry) -> Result<Self, prometheus::Error> {
        let counters = |name, help, labels: &[&str]| IntCounterVec::new(Opts::new(name, help), labels);
        let metrics = Self {
            requests: counters(
                "muster_http_requests_total",
                "Requests answered, by method, route and status.",
                &["method", "route", "status"],
            )?,
            seconds: HistogramVec::new(
                HistogramOpts::new("muster_http_request_seconds", "Time to answer a request, by route."),
                &["route"],
            )?,
            problems: counters(
                "muster_http_problems_total",
                "Requests answered with a problem, by its type; a bound that is hit has a type of its own.",
                &["type"],
            )?,
            pages_clamped: IntCounter::new(
                "muster_http_page_limit_clamped_total",
                "Lists asked for with a limit above the largest page.",
            )?,
            provision: counters(
                "muster_http_provision_total",
                "Requests of devices to come in by a claim, by outcome.",
                &["outcome"],
            )?,
            logins_busy: IntCounter::new(
                "muster_logins_busy_total",
                "Logins refused because too many passwords were being checked.",
            )?,
            logins_failed: counters("muster_logins_failed_total", "Logins refused, by what was wrong.", &["what"])?,
            logins_locked: counters(
                "muster_logins_locked_total",
                "Logins refused because of too many failures before, by what has to wait: the account or the address.",
                &["by"],
            )?,
            oidc_forgotten: IntCounter::new(
                "muster_oidc_logins_forgotten_total",
                "Logins by the OpenID provider that were forgotten because too many were under way.",
            )?,
            sessions_ended: counters(
                "muster_login_sessions_ended_total",
                "Logins ended before their time, by why: by a logout, an administrator, a new password, one login too many, a refresh token used twice.",
                &["why"],
            )?,
            denials: counters(
                "muster_http_denials_total",
                "Requests of known callers that were refused, by the permission that was missing or another reason.",
                &["what"],
            )?,
            denials_forgotten: IntCounter::new(
                "muster_http_denials_forgotten_total",
                "Refused requests that the audit does not have because audit.max_denials was reached.",
            )?,
            audit_cut: IntCounter::new(
                "muster_audit_cut_total",
                "Bodies too long for the audit, of which it has the hash and the length.",
            )?,
            connections: IntGaugeVec::new(
                Opts::new("muster_database_pool_connections", "Connections of the pool, by state."),
                &["state"],
            )?,
            exports: IntGauge::new("muster_log_exports", "Exports of log lines that are served.")?,
        };
        // Present from the start, so that an alert on a bound has something to compare with.
        for bound in BOUNDS {
            metrics.problems.with_label_values(&[bound]);
        }
        for what in ["password", "code", "oidc"] {
            metrics.logins_failed.with_label_values(&[what]);
        }
        for by in ["account", "address"] {
            metrics.logins_locked.with_label_values(&[by]);
        }
        for why in ["logout", "admin", "password", "limit", "reuse"] {
            metrics.sessions_ended.with_label_values(&[why]);
        }
        registry.register(Box::new(metrics.requests.clone()))?;
        registry.register(Box::new(metrics.seconds.clone()))?;
        registry.register(Box::new(metrics.problems.clone()))?;
        registry.register(Box::new(metrics.pages_clamped.clone()))?;
        for outcome in Answer::OUTCOMES.into_iter().chain(Code::ALL.map(Code::name)) {
            metrics.provision.with_label_values(&[outcome]);
        }
        registry.register(Box::new(metrics.provision.clone()))?;
        registry.register(Box::new(metrics.logins_busy.clone()))?;
        registry.register(Box::new(metrics.logins_failed.clone()))?;
        registry.register(Box::new(metrics.logins_locked.clone()))?;
        registry.register(Box::new(metrics.oidc_forgotten.clone()))?;
        registry.register(Box::new(metrics.sessions_ended.clone()))?;
        registry.register(Box::new(metrics.denials.clone()))?;
        registry.register(Box::new(metrics.denials_forgotten.clone()))?;
        registry.register(Box::new(metrics.audit_cut.clone()))?;
        registry.register(Box::new(metrics.connections.clone()))?;
        registry.register(Box::new(metrics.exports.clone()))?;
        registry.register(Box::new(ProcessCollector::for_self()))?;
        Ok(metrics)
    }
}
