//! What is counted of the index.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, IntGaugeVec, Opts, Registry};

use super::State;

/// The metrics of one index.
#[derive(Debug, Clone)]
pub(super) struct Metrics {
    pub(super) lines: IntCounter,
    pub(super) orphans: IntCounter,
    pub(super) without_column: IntCounter,
    pub(super) closed: IntCounter,
    pub(super) failures: IntCounter,
    pub(super) commits: Histogram,
    pub(super) behind: IntGauge,
    pub(super) documents: IntGauge,
    pub(super) bytes: IntGauge,
    state: IntGaugeVec,
}

impl Metrics {
    pub(super) fn new() -> prometheus::Result<Self> {
        let commits = HistogramOpts::new("muster_index_commit_seconds", "Time that a commit of the index took")
            .buckets(prometheus::exponential_buckets(0.005, 2.0, 12)?);
        let state = Opts::new("muster_index_state", "1 at the state that the index of log lines is in");
        Ok(Self {
            lines: IntCounter::new("muster_index_lines_total", "Log lines added to the index")?,
            orphans: IntCounter::new("muster_index_orphans_total", "Log lines left out, since their device is gone")?,
            without_column: IntCounter::new(
                "muster_index_without_column_total",
                "Fields whose top values cannot be asked for: their day had search.max_columns names before",
            )?,
            closed: IntCounter::new(
                "muster_index_closed_days_total",
                "Days that were closed to open others, of which there may be search.open_days",
            )?,
            failures: IntCounter::new("muster_index_failures_total", "Failed attempts to follow the log lines")?,
            commits: Histogram::with_opts(commits)?,
            behind: IntGauge::new(
                "muster_index_behind_lines",
                "Log lines that were stored and are not in the index yet",
            )?,
            documents: IntGauge::new("muster_index_documents", "Log lines in the index")?,
            bytes: IntGauge::new("muster_index_bytes", "Bytes that the index takes")?,
            state: IntGaugeVec::new(state, &["state"])?,
        })
    }

    pub(super) fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        for counter in [&self.lines, &self.orphans, &self.without_column, &self.closed, &self.failures] {
            registry.register(Box::new(counter.clone()))?;
        }
        for gauge in [&self.behind, &self.documents, &self.bytes] {
            registry.register(Box::new(gauge.clone()))?;
        }
        registry.register(Box::new(self.commits.clone()))?;
        registry.register(Box::new(self.state.clone()))
    }

    pub(super) fn show(&self, now: &State) {
        for name in State::NAMES {
            self.state.with_label_values(&[name]).set(i64::from(name == now.name()));
        }
    }
}
