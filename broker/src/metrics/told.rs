//! What is counted of what devices are told and say for themselves.

use prometheus::{IntCounter, IntCounterVec, Opts, Registry};

/// Counters of shadows and commands.
#[derive(Debug)]
pub(crate) struct Told {
    /// What devices asked or said about their shadows, by what became of that.
    pub(crate) shadows: IntCounterVec,
    /// Times a device was told what it is to be.
    pub(crate) deltas: IntCounter,
    /// Commands sent to devices; one sent again counts again.
    pub(crate) commands: IntCounter,
    /// Commands whose message a device has acknowledged.
    pub(crate) delivered: IntCounter,
    /// What devices said of commands, by what became of that.
    pub(crate) responses: IntCounterVec,
}

impl Told {
    pub(super) fn new() -> prometheus::Result<Self> {
        let shadows = Opts::new("muster_shadow_requests_total", "Shadow requests of devices, by outcome");
        let shadows = IntCounterVec::new(shadows, &["outcome"])?;
        for outcome in ["got", "updated", "rejected"] {
            shadows.with_label_values(&[outcome]);
        }
        let deltas = IntCounter::new("muster_shadow_deltas_total", "Times a device was told what it is to be")?;
        let commands =
            IntCounter::new("muster_commands_sent_total", "Commands sent to devices; one sent again counts again")?;
        let delivered = IntCounter::new("muster_commands_delivered_total", "Commands acknowledged by devices")?;
        let responses = Opts::new("muster_command_responses_total", "Responses of devices to commands, by outcome");
        let responses = IntCounterVec::new(responses, &["outcome"])?;
        for outcome in ["taken", "late", "repeated", "unknown", "malformed", "failed"] {
            responses.with_label_values(&[outcome]);
        }
        Ok(Self { shadows, deltas, commands, delivered, responses })
    }

    pub(super) fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.register(Box::new(self.shadows.clone()))?;
        registry.register(Box::new(self.deltas.clone()))?;
        registry.register(Box::new(self.commands.clone()))?;
        registry.register(Box::new(self.delivered.clone()))?;
        registry.register(Box::new(self.responses.clone()))
    }
}
