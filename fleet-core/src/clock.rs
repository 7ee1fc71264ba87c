//! Time as a value: whoever needs the time is handed a [`Clock`], so a test can set it.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chrono::{DateTime, TimeZone, Utc};

/// Where the time comes from: the system, or a test's own hand.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    /// Milliseconds since the epoch; `None` follows the system.
    fixed: Option<Arc<AtomicI64>>,
}

impl Clock {
    /// The time of the machine.
    pub fn system() -> Self {
        Self::default()
    }

    /// A clock that stands still until [`Clock::set`].
    pub fn fixed(at: DateTime<Utc>) -> Self {
        Self { fixed: Some(Arc::new(AtomicI64::new(at.timestamp_millis()))) }
    }

    /// Moves a fixed clock; a system clock stays as it is.
    pub fn set(&self, at: DateTime<Utc>) {
        if let Some(fixed) = &self.fixed {
            fixed.store(at.timestamp_millis(), Ordering::Relaxed);
        }
    }

    /// The time now, to the millisecond.
    pub fn now(&self) -> DateTime<Utc> {
        from_ms(self.now_ms())
    }

    /// The time now in milliseconds since the epoch.
    pub fn now_ms(&self) -> i64 {
        match &self.fixed {
            Some(fixed) => fixed.load(Ordering::Relaxed),
            #[expect(clippy::disallowed_methods, reason = "the one place that asks the system")]
            None => Utc::now().timestamp_millis(),
        }
    }
}

/// A moment from milliseconds since the epoch; out of range becomes the nearest moment that exists.
pub fn from_ms(ms: i64) -> DateTime<Utc> {
    let nearest = if ms < 0 { DateTime::<Utc>::MIN_UTC } else { DateTime::<Utc>::MAX_UTC };
    Utc.timestamp_millis_opt(ms).single().unwrap_or(nearest)
}
