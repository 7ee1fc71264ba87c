//! Addresses from which too many wrong credentials came are not listened to for a while.
//!
//! Holds: whoever guesses uses up its own address's patience, not the time in which others are authenticated. The
//! networks of a few thousand addresses are remembered; beyond that the longest silent one is forgotten.

use std::net::{IpAddr, Ipv6Addr};
use std::time::Duration;

use fleet_core::config;
use tokio::time::Instant;

use crate::recent::Recent;

/// Wrong credentials by address.
#[derive(Debug)]
pub(crate) struct Guessers {
    failures: u32,
    window: Duration,
    block: Duration,
    recent: Recent<IpAddr, Guesser>,
}

#[derive(Debug, Default)]
struct Guesser {
    failures: u32,
    /// When the window of these failures ends.
    ends_at: Option<Instant>,
    blocked_until: Option<Instant>,
}

impl Guesser {
    fn blocked_until(&self, now: Instant) -> Option<Instant> {
        self.blocked_until.filter(|until| now < *until)
    }

    fn has_lapsed(&self, now: Instant) -> bool {
        self.blocked_until(now).is_none() && self.ends_at.is_none_or(|ends_at| ends_at <= now)
    }
}

/// What a wrong credential led to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Noted {
    /// The address is not listened to from now on.
    pub(crate) blocked: bool,
    /// Another address had to be forgotten.
    pub(crate) forgot: bool,
}

impl Guessers {
    pub(crate) fn new(settings: &config::Admission) -> Self {
        Self {
            failures: settings.auth_failures,
            window: Duration::from_secs(settings.auth_failures_window_s),
            block: Duration::from_secs(settings.auth_block_s),
            recent: Recent::new(settings.tracked_addresses),
        }
    }

    /// Until when this address is not listened to, if it is not.
    pub(crate) fn blocked_until(&self, peer: IpAddr, now: Instant) -> Option<Instant> {
        self.recent.peek(&network(peer))?.blocked_until(now)
    }

    /// A wrong credential came from there. What was under way when the address was blocked prolongs nothing.
    pub(crate) fn failed(&mut self, peer: IpAddr, now: Instant) -> Noted {
        if self.failures == 0 {
            return Noted::default();
        }
        let (guesser, forgot) = self.recent.of(network(peer), |guesser| guesser.has_lapsed(now));
        if guesser.blocked_until(now).is_some() {
            return Noted { blocked: false, forgot };
        }
        if guesser.ends_at.is_none_or(|ends_at| ends_at <= now) {
            *guesser = Guesser { ends_at: Some(now + self.window), ..Guesser::default() };
        }
        guesser.failures += 1;
        let blocked = guesser.failures > self.failures;
        if blocked {
            *guesser = Guesser { blocked_until: Some(now + self.block), ..Guesser::default() };
        }
        Noted { blocked, forgot }
    }
}

/// Whoever has one address of IPv6 has a network of them.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        v4 @ IpAddr::V4(_) => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn guessers(failures: u32, addresses: usize) -> Guessers {
        Guessers { failures, window: 10 * SECOND, block: 30 * SECOND, recent: Recent::new(addresses) }
    }

    fn address(last: u8) -> IpAddr {
        [127, 0, 0, last].into()
    }

    #[test]
    fn too_many_failures_block_their_address_and_no_other_for_a_while() {
        let start = Instant::now();
        let mut guessers = guessers(3, 10);
        for _ in 0..3 {
            assert!(!guessers.failed(address(2), start).blocked);
            assert_eq!(guessers.blocked_until(address(2), start), None);
        }
        assert!(guessers.failed(address(2), start + SECOND).blocked);
        assert!(!guessers.failed(address(2), start + 2 * SECOND).blocked, "it is already");
        let until = start + 31 * SECOND;
        assert_eq!(guessers.blocked_until(address(2), until.checked_sub(SECOND).unwrap()), Some(until));
        assert_eq!(guessers.blocked_until(address(3), start + SECOND), None);
        assert_eq!(guessers.blocked_until(address(2), until), None);
        assert!(!guessers.failed(address(2), until).blocked, "it starts anew");
    }

    #[test]
    fn a_device_that_errs_now_and_then_is_never_blocked() {
        let start = Instant::now();
        let mut guessers = guessers(3, 10);
        assert!((0..100).all(|n| !guessers.failed(address(2), start + n * 4 * SECOND).blocked));
        guessers.failures = 0;
        assert!((0..100).all(|_| !guessers.failed(address(2), start).blocked), "0: off");
    }

    #[test]
    fn a_network_of_ipv6_is_one_and_memory_is_bounded() {
        let start = Instant::now();
        let mut guessers = guessers(1, 2);
        guessers.failed("2001:db8::1".parse().unwrap(), start);
        assert!(guessers.failed("2001:db8::2".parse().unwrap(), start).blocked);
        assert!(guessers.blocked_until("2001:db8::3".parse().unwrap(), start).is_some());
        assert!(guessers.blocked_until("2001:db8:0:1::1".parse().unwrap(), start).is_none());
        assert_eq!(network("::ffff:127.0.0.9".parse().unwrap()), address(9));
        assert!(!guessers.failed(address(1), start).forgot);
        assert!(guessers.failed(address(2), start).forgot, "there is room for two");
        assert!(!guessers.failed(address(3), start + 60 * SECOND).forgot, "these have lapsed");
    }
}
