//! Live counters of a running fleet.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::latency::Latency;

/// What a fleet counts while it runs; shared by all its devices.
#[derive(Debug, Default)]
pub struct Counters {
    /// Devices whose connection is up.
    pub online: AtomicU64,
    /// Distinct readings handed to the network.
    pub sent: AtomicU64,
    /// Readings and lines handed to the network again, because a connection ended before their acknowledgement or
    /// because somebody had asked for them.
    pub resent: AtomicU64,
    /// Readings sent again after their acknowledgement, on purpose.
    pub duplicates: AtomicU64,
    /// Distinct readings acknowledged.
    pub acknowledged: AtomicU64,
    /// Distinct log lines handed to the network.
    pub lines_sent: AtomicU64,
    /// Distinct log lines acknowledged.
    pub lines_acknowledged: AtomicU64,
    /// Log lines acknowledged that were sent because somebody had asked for them.
    pub lines_uploaded: AtomicU64,
    /// Requests that were answered: commands, and what is desired of a shadow.
    pub answers: AtomicU64,
    /// Readings and lines a device did not take because its memory was full.
    pub skipped: AtomicU64,
    /// Connections cut on purpose.
    pub reconnects: AtomicU64,
    /// Connections that ended otherwise, or could not be made.
    pub failures: AtomicU64,
    /// Publishes the server answered with a refusal (MQTT 5 reason code 0x80 or above).
    pub refused: AtomicU64,
    /// From the first sending of a reading to its acknowledgement.
    pub latency: Latency,
    last_failure: Mutex<Option<String>>,
}

impl Counters {
    /// Why the last connection ended or could not be made.
    pub fn last_failure(&self) -> Option<String> {
        self.last_failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn failed(&self, reason: &str) {
        add(&self.failures);
        *self.last_failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
    }
}

/// Counts one more.
pub(crate) fn add(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// The value now.
pub(crate) fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// Counts a device as online for as long as it lives.
pub(crate) struct Online(Arc<Counters>);

impl Online {
    pub(crate) fn new(counters: &Arc<Counters>) -> Self {
        add(&counters.online);
        Self(counters.clone())
    }
}

impl Drop for Online {
    fn drop(&mut self) {
        self.0.online.fetch_sub(1, Ordering::Relaxed);
    }
}
