//! What is counted of what devices are told and say for themselves.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

/// Counters of shadows.
#[derive(Debug)]
pub(crate) struct Told {
    /// What devices asked or said about their shadows, by what became of that.
    pub(crate) shadows: IntCounterVec,
    /// Times a device was told what it is to be.
    pub(crate) deltas: IntCounter,
}

impl Told {
    pub(super) fn new() -> prometheus::Result<Self> {
        let shadows = Opts::new("muster_shadow_requests_total", "Shadow requests of devices, by outcome");
        let shadows = IntCounterVec::new(shadows, &["outcome"])?;
        for outcome in ["got", "updated", "rejected"] {
            shadows.with_label_values(&[outcome]);
        }
        let deltas = IntCounter::new("muster_shadow_deltas_total", "Times a device was told what it is to be")?;
        Ok(Self { shadows, deltas })
    }

    pub(super) fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.register(Box::new(self.shadows.clone()))?;
        registry.register(Box::new(self.deltas.clone()))
    }
}
