//! What one connection may send: so many messages and so many bytes a second.
//!
//! Holds: a client that sends more is not read until it has paid for it, or is disconnected, as `mqtt.rate_excess` says;
//! nothing it has sent is lost for that. Where nothing is limited it costs one branch and one pointer.
//! Ignorant of: who sends, and what.

use std::time::Duration;

use fleet_core::config;
use tokio::time::Instant;

use crate::metrics::Limit;
use crate::rate::Bucket;

/// What one connection may send: messages and bytes.
#[derive(Debug)]
pub(crate) struct Throttle {
    messages: Option<Bucket>,
    bytes: Option<Bucket>,
    /// By then it has paid for what it sent too much.
    owes_until: Option<Instant>,
    noted_at: Option<Instant>,
}

/// A client has sent more than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooFast {
    /// Which bound.
    pub(crate) limit: Limit,
    /// By then it has paid.
    pub(crate) until: Instant,
}

/// How often one client's overdraft is worth an event.
const NOTE_EVERY: Duration = Duration::from_secs(10);

impl Throttle {
    /// `None` when nothing is limited, so that it costs nothing.
    pub(crate) fn new(settings: &config::Mqtt, now: Instant) -> Option<Box<Self>> {
        let throttle = Self::of(settings.max_messages_per_s, settings.max_bytes_per_s, settings.rate_burst_ms, now);
        (throttle.messages.is_some() || throttle.bytes.is_some()).then(|| Box::new(throttle))
    }

    fn of(messages_per_s: u64, bytes_per_s: u64, burst_ms: u64, now: Instant) -> Self {
        let bucket = |per_s: u64| (per_s > 0).then(|| Bucket::new(per_s, burst(per_s, burst_ms), now));
        let (messages, bytes) = (bucket(messages_per_s), bucket(bytes_per_s));
        Self { messages, bytes, owes_until: None, noted_at: None }
    }

    /// Adds what the time has brought; to be called when something was read or a debt is paid.
    pub(crate) fn fill(&mut self, now: Instant) {
        for bucket in [&mut self.messages, &mut self.bytes].into_iter().flatten() {
            bucket.fill(now);
        }
        self.owes_until = self.owes_until.filter(|until| *until > now);
    }

    /// Counts a message of so many bytes; `Err` when that was more than there was.
    pub(crate) fn pass(&mut self, bytes: usize) -> Result<(), TooFast> {
        let messages = draw(&mut self.messages, 1, Limit::MessageRate);
        let bytes = draw(&mut self.bytes, bytes, Limit::ByteRate);
        let passed = match (messages, bytes) {
            (Err(messages), Err(bytes)) => Err(if messages.until > bytes.until { messages } else { bytes }),
            (messages, bytes) => messages.and(bytes),
        };
        self.owes_until = passed.err().map(|excess| excess.until);
        passed
    }

    /// By when it has paid, while it owes.
    pub(crate) fn owes_until(&self) -> Option<Instant> {
        self.owes_until
    }

    /// Whether an overdraft now should be noted: not each of a client that always sends too much.
    pub(crate) fn is_worth_noting(&mut self, now: Instant) -> bool {
        let is_due = self.noted_at.is_none_or(|noted| now.saturating_duration_since(noted) >= NOTE_EVERY);
        if is_due {
            self.noted_at = Some(now);
        }
        is_due
    }
}

fn draw(bucket: &mut Option<Bucket>, amount: usize, limit: Limit) -> Result<(), TooFast> {
    let Some(bucket) = bucket else { return Ok(()) };
    if bucket.draw(amount) {
        return Ok(());
    }
    Err(TooFast { limit, until: bucket.paid_at() })
}

/// At least one thing must be able to pass.
fn burst(per_s: u64, burst_ms: u64) -> u64 {
    (per_s.saturating_mul(burst_ms) / 1000).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn throttle(messages: u64, bytes: u64, burst_ms: u64, now: Instant) -> Throttle {
        Throttle::of(messages, bytes, burst_ms, now)
    }

    #[test]
    fn whoever_sends_too_much_owes_time() {
        let start = Instant::now();
        let mut client = throttle(10, 0, 500, start);
        assert_eq!([(); 5].map(|()| client.pass(9999)), [Ok(()); 5], "the burst");
        let owed = |ms: u32| Err(TooFast { limit: Limit::MessageRate, until: start + ms * MS });
        assert_eq!((client.owes_until(), client.pass(1)), (None, owed(100)));
        client.fill(start + 99 * MS);
        assert_eq!(client.owes_until(), Some(start + 100 * MS));
        client.fill(start + 100 * MS);
        assert_eq!(client.owes_until(), None);
        assert_eq!(client.pass(1), owed(200));
        client.fill(start + 10_000 * MS);
        assert_eq!(client.pass(1), Ok(()));
    }

    #[test]
    fn a_large_message_passes_once_and_is_paid_for_afterwards() {
        let start = Instant::now();
        let mut client = throttle(1000, 1000, 1000, start);
        assert_eq!(client.pass(3000), Err(TooFast { limit: Limit::ByteRate, until: start + 2000 * MS }));
        client.fill(start + 2000 * MS);
        assert_eq!(client.pass(0), Ok(()));
        assert!(client.is_worth_noting(start));
        assert!(!client.is_worth_noting(start + 9999 * MS), "one event for many");
        assert!(client.is_worth_noting(start + 10_000 * MS));
    }
}
