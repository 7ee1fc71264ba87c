//! Clients that come again and again: one that flaps, and two that fight over one identity.
//!
//! A client *flaps* when it connects more than `flapping_connects` times within `flapping_window_s`. From then on it may
//! connect once per back-off, which doubles with every further connect up to a bound and is forgotten after a window of
//! quiet. Two devices *fight* when one session is taken over from another address more than `conflict_takeovers` times
//! within `conflict_window_s`: whoever holds it then keeps it for `conflict_hold_s`, and others are refused.
//! Holds: only who has proven its identity is counted, so that nobody can have another one refused, and a refusal tells
//! a stranger nothing. A device that comes back from its own address is never taken for another one.
//! A bounded number of clients is remembered; beyond it the longest silent one is forgotten.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fleet_core::config;
use tokio::time::Instant;

use crate::recent::Recent;

/// Names a session, as in `session.rs`.
type SessionName = Arc<str>;

/// What is remembered of clients that connect.
#[derive(Debug)]
pub(crate) struct Clients {
    settings: Settings,
    recent: Recent<SessionName, Recently>,
    flapping: HashMap<SessionName, Flapping>,
    fights: HashMap<SessionName, Instant>,
}

#[derive(Debug, Clone)]
struct Settings {
    /// 0: off, as with the takeovers.
    connects: usize,
    window: Duration,
    backoff: Duration,
    max_backoff: Duration,
    takeovers: usize,
    takeover_window: Duration,
    hold: Duration,
    /// Clients that are remembered, and as many in each of the other two maps.
    most: usize,
}

/// When a client came, and when it took its session from another address; oldest first.
#[derive(Debug, Default)]
struct Recently {
    connects: VecDeque<Instant>,
    takeovers: VecDeque<Instant>,
}

#[derive(Debug)]
struct Flapping {
    backoff: Duration,
    /// The next connect is due.
    until: Instant,
}

/// What becomes of a client that has proven who it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// It may come in.
    Welcome,
    /// It flaps and is refused until then; `news`: from now on, or for longer.
    Flapping { until: Instant, news: bool },
    /// Another address holds the session and keeps it until then; `news`: from now on.
    Conflict { until: Instant, holder: IpAddr, news: bool },
}

impl Clients {
    pub(crate) fn new(settings: &config::Admission) -> Self {
        let seconds = Duration::from_secs;
        let most = settings.tracked_clients;
        let settings = Settings {
            connects: settings.flapping_connects,
            window: seconds(settings.flapping_window_s),
            backoff: seconds(settings.flapping_backoff_s),
            max_backoff: seconds(settings.flapping_max_backoff_s),
            takeovers: settings.conflict_takeovers,
            takeover_window: seconds(settings.conflict_window_s),
            hold: seconds(settings.conflict_hold_s),
            most,
        };
        Self { settings, recent: Recent::new(most), flapping: HashMap::new(), fights: HashMap::new() }
    }

    /// A client of this session comes from `peer`; `holder` is the address of a connection that lives. The flag says that
    /// a client which still mattered was forgotten, or this one found no room to be remembered as one that is refused.
    pub(crate) fn connects(
        &mut self,
        session: &SessionName,
        peer: IpAddr,
        holder: Option<IpAddr>,
        now: Instant,
    ) -> (Verdict, bool) {
        let holder = holder.filter(|holder| holder.to_canonical() != peer.to_canonical());
        let hold = self.fights.get(session).filter(|until| now < **until);
        if let (Some(holder), Some(&until)) = (holder, hold) {
            return (Verdict::Conflict { until, holder, news: false }, false);
        }
        if let Some(verdict) = self.damped(session, now) {
            return (verdict, false);
        }
        let settings = &self.settings;
        let (recently, forgot) = self.recent.of(session.clone(), |recently| recently.has_lapsed(settings, now));
        let flaps =
            settings.connects > 0 && is_one_too_many(&mut recently.connects, settings.connects, settings.window, now);
        let fights = holder.filter(|_| {
            settings.takeovers > 0
                && is_one_too_many(&mut recently.takeovers, settings.takeovers, settings.takeover_window, now)
        });
        let verdict = match (fights, flaps) {
            (Some(holder), _) => self.hold(session, holder, now),
            (None, true) => self.damp(session, now),
            (None, false) => Verdict::Welcome,
        };
        let is_noted = match verdict {
            Verdict::Welcome => true,
            Verdict::Flapping { .. } => self.flapping.contains_key(session),
            Verdict::Conflict { .. } => self.fights.contains_key(session),
        };
        (verdict, forgot || !is_noted)
    }

    /// What a client is told that flaps already. One whose back-off is over comes in, but its next one is longer.
    fn damped(&mut self, session: &SessionName, now: Instant) -> Option<Verdict> {
        let flapping = self.flapping.get_mut(session)?;
        if now < flapping.until {
            return Some(Verdict::Flapping { until: flapping.until, news: false });
        }
        if now >= flapping.until + self.settings.window {
            self.flapping.remove(session);
            return None;
        }
        flapping.backoff = (flapping.backoff * 2).min(self.settings.max_backoff);
        flapping.until = now + flapping.backoff;
        Some(Verdict::Welcome)
    }

    fn damp(&mut self, session: &SessionName, now: Instant) -> Verdict {
        let until = now + self.settings.backoff;
        // Where there is no room it is refused all the same, and may come again at once.
        if self.flapping.len() < self.settings.most {
            self.flapping.insert(session.clone(), Flapping { backoff: self.settings.backoff, until });
        }
        Verdict::Flapping { until, news: true }
    }

    fn hold(&mut self, session: &SessionName, holder: IpAddr, now: Instant) -> Verdict {
        let until = now + self.settings.hold;
        if self.fights.len() < self.settings.most {
            self.fights.insert(session.clone(), until);
        }
        Verdict::Conflict { until, holder, news: true }
    }

    /// Whether a client flaps.
    pub(crate) fn is_flapping(&self, session: &str) -> bool {
        self.flapping.contains_key(session)
    }

    /// Forgets what is over; how many flap and how many fight.
    pub(crate) fn sweep(&mut self, now: Instant) -> (usize, usize) {
        let quiet = self.settings.window;
        self.flapping.retain(|_, flapping| now < flapping.until + quiet);
        self.fights.retain(|_, until| now < *until);
        (self.flapping.len(), self.fights.len())
    }
}

impl Recently {
    fn has_lapsed(&self, settings: &Settings, now: Instant) -> bool {
        let lapsed = |times: &VecDeque<Instant>, window| times.back().is_none_or(|last| now >= *last + window);
        lapsed(&self.connects, settings.window) && lapsed(&self.takeovers, settings.takeover_window)
    }
}

/// Notes that something happened; whether it has now happened more than `most` times within the window. Then it is
/// counted anew.
fn is_one_too_many(times: &mut VecDeque<Instant>, most: usize, window: Duration, now: Instant) -> bool {
    while times.front().is_some_and(|first| now >= *first + window) {
        times.pop_front();
    }
    let is = times.len() >= most;
    if is {
        *times = VecDeque::new();
    } else {
        times.push_back(now);
    }
    is
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const HOME: [u8; 4] = [10, 0, 0, 1];
    const AWAY: [u8; 4] = [10, 0, 0, 2];

    fn clients(most: usize) -> Clients {
        let settings = Settings {
            connects: 3,
            window: 10 * SECOND,
            backoff: 5 * SECOND,
            max_backoff: 15 * SECOND,
            takeovers: 2,
            takeover_window: 10 * SECOND,
            hold: 20 * SECOND,
            most,
        };
        Clients { settings, recent: Recent::new(most), flapping: HashMap::new(), fights: HashMap::new() }
    }

    /// A client and a clock in seconds.
    struct Story {
        clients: Clients,
        start: Instant,
        session: SessionName,
    }

    impl Story {
        fn new() -> Self {
            Self { clients: clients(10), start: Instant::now(), session: "main/boiler/boiler".into() }
        }

        fn at(&self, seconds: u32) -> Instant {
            self.start + seconds * SECOND
        }

        fn comes(&mut self, seconds: u32, peer: [u8; 4], holder: Option<[u8; 4]>) -> Verdict {
            let now = self.at(seconds);
            self.clients.connects(&self.session, peer.into(), holder.map(IpAddr::from), now).0
        }

        fn flapping(&self, until: u32, news: bool) -> Verdict {
            Verdict::Flapping { until: self.at(until), news }
        }

        fn conflict(&self, until: u32, holder: [u8; 4], news: bool) -> Verdict {
            Verdict::Conflict { until: self.at(until), holder: holder.into(), news }
        }
    }

    #[test]
    fn a_client_that_comes_too_often_is_damped_for_longer_and_longer_and_forgiven_after_quiet() {
        let mut story = Story::new();
        for second in 0..3 {
            assert_eq!(story.comes(second, HOME, None), Verdict::Welcome);
        }
        assert!(!story.clients.is_flapping(&story.session));
        assert_eq!(story.comes(3, HOME, None), story.flapping(8, true));
        assert!(story.clients.is_flapping(&story.session));
        assert_eq!(story.comes(7, HOME, None), story.flapping(8, false), "asking does not prolong it");
        assert_eq!(story.comes(8, HOME, None), Verdict::Welcome, "once");
        assert_eq!(story.comes(9, HOME, None), story.flapping(18, false), "10 s now");
        assert_eq!(story.comes(18, HOME, None), Verdict::Welcome);
        assert_eq!(story.comes(19, HOME, None), story.flapping(33, false), "15 s, the most");
        assert_eq!(story.comes(33, HOME, None), Verdict::Welcome);
        assert_eq!(story.comes(34, HOME, None), story.flapping(48, false));
        assert_eq!(story.clients.sweep(story.at(57)), (1, 0));
        assert_eq!(story.clients.sweep(story.at(58)), (0, 0), "a window of quiet later");
        for second in 60..63 {
            assert_eq!(story.comes(second, HOME, None), Verdict::Welcome);
        }
    }

    #[test]
    fn quiet_is_seen_by_the_client_itself_too() {
        let mut story = Story::new();
        for second in [0, 0, 0, 0] {
            story.comes(second, HOME, None);
        }
        assert_eq!(story.comes(15, HOME, None), Verdict::Welcome);
        assert!(!story.clients.is_flapping(&story.session));
    }

    #[test]
    fn a_client_that_comes_back_now_and_then_does_not_flap() {
        let mut story = Story::new();
        for n in 0..100 {
            assert_eq!(story.comes(n * 4, HOME, Some(HOME)), Verdict::Welcome);
        }
    }

    #[test]
    fn of_two_that_fight_the_holder_keeps_the_session_for_a_while() {
        let mut story = Story::new();
        assert_eq!(story.comes(0, HOME, None), Verdict::Welcome);
        assert_eq!(story.comes(0, AWAY, Some(HOME)), Verdict::Welcome);
        assert_eq!(story.comes(1, HOME, Some(AWAY)), Verdict::Welcome);
        assert_eq!(story.comes(2, AWAY, Some(HOME)), story.conflict(22, HOME, true));
        assert_eq!(story.comes(3, AWAY, Some(HOME)), story.conflict(22, HOME, false));
        assert_eq!(story.clients.sweep(story.at(3)).1, 1);
        assert_eq!(story.comes(12, HOME, Some(HOME)), Verdict::Welcome, "the holder's own reconnect");
        assert_eq!(story.comes(13, AWAY, None), Verdict::Welcome, "nobody holds it");
        assert_eq!(story.comes(14, HOME, Some(AWAY)), story.conflict(22, AWAY, false), "whoever holds it");
        assert_eq!(story.clients.sweep(story.at(22)), (0, 0));
        assert_eq!(story.comes(23, HOME, Some(AWAY)), Verdict::Welcome);
    }

    #[test]
    fn a_device_that_moves_is_no_fight() {
        let mut story = Story::new();
        let mut holder = HOME;
        for n in 0..20_u8 {
            let next = [10, 0, 1, n];
            assert_eq!(story.comes(u32::from(n) * 6, next, Some(holder)), Verdict::Welcome);
            holder = next;
        }
        let canonical = "::ffff:10.0.0.1".parse().unwrap();
        let now = story.at(1000);
        for _ in 0..3 {
            let (verdict, _) = story.clients.connects(&story.session, canonical, Some(HOME.into()), now);
            assert_eq!(verdict, Verdict::Welcome, "one address in two spellings");
        }
    }

    #[test]
    fn zero_switches_it_off() {
        let mut story = Story::new();
        (story.clients.settings.connects, story.clients.settings.takeovers) = (0, 0);
        for _ in 0..100 {
            assert_eq!(story.comes(0, AWAY, Some(HOME)), Verdict::Welcome);
        }
        assert!(story.clients.recent.peek(&story.session).unwrap().connects.is_empty(), "nothing is kept");
    }

    #[test]
    fn memory_is_bounded() {
        let mut clients = clients(2);
        let now = Instant::now();
        let comes = |clients: &mut Clients, name: &str, at| clients.connects(&name.into(), HOME.into(), None, at);
        assert!(!comes(&mut clients, "a", now).1);
        assert!(!comes(&mut clients, "b", now).1);
        assert!(comes(&mut clients, "c", now).1, "one that mattered was forgotten");
        assert!(!comes(&mut clients, "d", now + 10 * SECOND).1, "these do not matter any more");
        let mut flaps = |name| (0..4).map(|_| comes(&mut clients, name, now + 20 * SECOND)).last().unwrap();
        assert!(!flaps("a").1 && !flaps("b").1);
        let (verdict, is_told) = flaps("c");
        assert!(matches!(verdict, Verdict::Flapping { .. }) && is_told, "refused, with no room to remember that");
        assert_eq!(clients.sweep(now + 20 * SECOND), (2, 0));
    }
}
