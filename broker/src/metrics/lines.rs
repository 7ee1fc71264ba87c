//! What is counted of log lines.

use prometheus::{IntCounter, Registry};

/// The metrics of log lines one by one.
#[derive(Debug)]
pub(crate) struct Lines {
    /// Stored for the first time.
    pub(crate) stored: IntCounter,
    /// Stored already.
    pub(crate) duplicate: IntCounter,
    /// Those whose clock ran ahead.
    pub(crate) clamped: IntCounter,
    /// Those of which something was too much.
    pub(crate) cut: IntCounter,
    /// Left out because their device logs more than it may.
    pub(crate) suppressed: IntCounter,
    /// Let through without a limit, as too many devices log.
    pub(crate) unlimited: IntCounter,
}

impl Lines {
    pub(super) fn new() -> prometheus::Result<Self> {
        let counter = |name: &str, help: &str| IntCounter::new(format!("muster_ingest_log_lines_{name}_total"), help);
        Ok(Self {
            stored: counter("stored", "Log lines stored for the first time")?,
            duplicate: counter("duplicate", "Log lines that were stored already")?,
            clamped: counter("clamped", "Log lines whose clock ran ahead by more than ingest.max_ahead_ms")?,
            cut: counter("cut", "Log lines whose message or fields were too long, or too many, and were cut")?,
            suppressed: counter("suppressed", "Log lines not stored but told of: ingest.log_lines_per_s was hit")?,
            unlimited: counter("unlimited", "Log lines let through: ingest.max_tracked_devices was hit")?,
        })
    }

    pub(super) fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        let all = [&self.stored, &self.duplicate, &self.clamped, &self.cut, &self.suppressed, &self.unlimited];
        all.into_iter().try_for_each(|counter| registry.register(Box::new(counter.clone())))
    }
}
