//! Admission: how many may come in and how fast, and when those who may not should come again.
//!
//! An arrival asks for a place ([`Admission::place`]) before its first byte is read, and is looked at once more when it
//! has proven who it is ([`Admission::meet`]).
//! Holds: beyond a budget an arrival is refused at the cost of reading its CONNECT, and without a word when even that is
//! under way too often, so that those already in are served through any storm; those who are refused are told to come
//! again one after another, at the pace at which they can be let in.
//! Ignorant of: credentials, and what a client does once it is in.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use fleet_core::config;
use parking_lot::Mutex;
use prometheus::IntGauge;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::access::Refusal;
use crate::flapping::{Clients, Verdict};
use crate::guessing::Guessers;
use crate::metrics::{Limit, Metrics};
use crate::rate::Bucket;
use crate::wire::Reason;

/// Refused clients that come again in a second where `admission.connects_per_s` does not say.
const RETURNS_PER_S: u32 = 1_000;
/// How often what is over is forgotten.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

/// The budgets of the door.
pub(crate) struct Admission {
    metrics: Metrics,
    /// `mqtt.max_connections`
    room: Arc<Semaphore>,
    handshakes: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    claimants: Arc<Semaphore>,
    /// `None`: connects are not limited in their rate.
    rate: Option<Mutex<Bucket>>,
    returns: Mutex<Returns>,
    guessers: Mutex<Guessers>,
    clients: Mutex<Clients>,
}

/// A place inside, or one where to be told that there is none.
pub(crate) enum Place {
    /// It may begin its handshake.
    Inside(OwnedSemaphorePermit, Handshake),
    /// It is told why not.
    Refusal(OwnedSemaphorePermit, Refusal),
}

/// A handshake that is under way while this lives.
#[derive(Debug)]
pub(crate) struct Handshake {
    _permit: OwnedSemaphorePermit,
    gauge: IntGauge,
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// Why there is no place.
enum NoPlace {
    /// Too many wrong credentials came from its address.
    Guessing { until: Instant },
    /// A budget is used up.
    Spent(Limit),
}

impl Admission {
    pub(crate) fn new(mqtt: &config::Mqtt, settings: &config::Admission, metrics: Metrics) -> Self {
        let now = Instant::now();
        let rate = (settings.connects_per_s > 0)
            .then(|| Bucket::new(settings.connects_per_s.into(), settings.connects_burst.into(), now));
        Self {
            metrics,
            room: Arc::new(Semaphore::new(mqtt.max_connections)),
            handshakes: Arc::new(Semaphore::new(settings.max_handshakes)),
            refusals: Arc::new(Semaphore::new(settings.max_refusals)),
            claimants: Arc::new(Semaphore::new(settings.max_claimants)),
            rate: rate.map(Mutex::new),
            returns: Mutex::new(Returns::new(settings, now)),
            guessers: Mutex::new(Guessers::new(settings)),
            clients: Mutex::new(Clients::new(settings)),
        }
    }

    /// A place for whoever comes from `peer`, if that is known already; `None` when not even a refusal has room.
    pub(crate) fn place(&self, peer: impl Into<Option<IpAddr>>) -> Option<Place> {
        let now = Instant::now();
        let why = match self.inside(peer.into(), now) {
            Ok(place) => return Some(place),
            Err(why) => why,
        };
        let Ok(permit) = self.refusals.clone().try_acquire_owned() else {
            self.metrics.hit(Limit::Refusals);
            return None;
        };
        Some(Place::Refusal(permit, self.refusal(&why, now)))
    }

    /// The budget that fills with time comes last: whoever is refused for another reason takes nothing from it.
    fn inside(&self, peer: Option<IpAddr>, now: Instant) -> Result<Place, NoPlace> {
        if let Some(peer) = peer {
            self.guessing(peer, now)?;
        }
        let room = self.one_of(&self.room, Limit::Connections)?;
        let handshake = self.one_of(&self.handshakes, Limit::Handshakes)?;
        if self.rate.as_ref().is_some_and(|rate| !rate.lock().take(now)) {
            return Err(self.spent(Limit::ConnectRate));
        }
        let gauge = self.metrics.handshakes.clone();
        gauge.inc();
        Ok(Place::Inside(room, Handshake { _permit: handshake, gauge }))
    }

    fn one_of(&self, budget: &Arc<Semaphore>, limit: Limit) -> Result<OwnedSemaphorePermit, NoPlace> {
        budget.clone().try_acquire_owned().map_err(|_| self.spent(limit))
    }

    fn spent(&self, limit: Limit) -> NoPlace {
        self.metrics.hit(limit);
        NoPlace::Spent(limit)
    }

    fn refusal(&self, why: &NoPlace, now: Instant) -> Refusal {
        let (reason, text) = match why {
            NoPlace::Guessing { until } => {
                let text = "too many wrong credentials came from this address";
                return self.not_before(*until, now, Reason::ConnectionRateExceeded, text);
            }
            NoPlace::Spent(Limit::ConnectRate) => {
                (Reason::ConnectionRateExceeded, "more connections a second than the broker takes")
            }
            NoPlace::Spent(Limit::Connections) => {
                (Reason::QuotaExceeded, "the broker holds as many connections as it may")
            }
            NoPlace::Spent(Limit::Claimants) => {
                (Reason::QuotaExceeded, "as many clients as may ask by claims are connected")
            }
            NoPlace::Spent(_) => (Reason::ServerBusy, "too many handshakes are under way"),
        };
        Refusal { reason, text, retry_after: Some(self.returns.lock().after(now)) }
    }

    fn not_before(&self, until: Instant, now: Instant, reason: Reason, text: &'static str) -> Refusal {
        let wait = until.saturating_duration_since(now);
        Refusal { reason, text, retry_after: Some(self.returns.lock().no_sooner_than(wait)) }
    }

    /// When somebody should come again who was refused for what passes by itself.
    pub(crate) fn retry_after(&self) -> Duration {
        self.returns.lock().after(Instant::now())
    }

    // Wrong credentials

    fn guessing(&self, peer: IpAddr, now: Instant) -> Result<(), NoPlace> {
        match self.guessers.lock().blocked_until(peer, now) {
            Some(until) => {
                self.metrics.hit(Limit::AuthenticationFailures);
                Err(NoPlace::Guessing { until })
            }
            None => Ok(()),
        }
    }

    /// As [`Admission::place`] does, for an address that is known only now or was blocked meanwhile.
    pub(crate) fn is_heard(&self, peer: IpAddr) -> Result<(), Refusal> {
        let now = Instant::now();
        self.guessing(peer, now).map_err(|why| self.refusal(&why, now))
    }

    /// A wrong credential came from this address.
    pub(crate) fn failed(&self, peer: IpAddr) {
        let noted = self.guessers.lock().failed(peer, Instant::now());
        if noted.blocked {
            tracing::warn!(%peer, "too many wrong credentials: this address is not listened to for a while");
        }
        if noted.forgot {
            self.metrics.hit(Limit::TrackedAddresses);
        }
    }

    // Clients that are known

    /// Whether a client that has proven who it is may come in now; `holder` is the address of the connection that holds
    /// its session. `Err` has the refusal and whether that is news.
    pub(crate) fn meet(
        &self,
        session: &Arc<str>,
        peer: IpAddr,
        holder: Option<IpAddr>,
    ) -> Result<(), (Refusal, Verdict)> {
        let now = Instant::now();
        let (verdict, forgot) = self.clients.lock().connects(session, peer, holder, now);
        if forgot {
            self.metrics.hit(Limit::TrackedClients);
        }
        let (limit, until, text) = match verdict {
            Verdict::Welcome => return Ok(()),
            Verdict::Flapping { until, .. } => (Limit::Flapping, until, "this client connects too often"),
            Verdict::Conflict { until, .. } => {
                (Limit::IdentityConflict, until, "another address uses this identity and keeps the session for now")
            }
        };
        self.metrics.hit(limit);
        Err((self.not_before(until, now, Reason::ServerBusy, text), verdict))
    }

    /// A place for a client that came by a claim, beside the one that every client has: many strangers may hold one claim, and
    /// are to leave room for devices.
    pub(crate) fn claimant(&self) -> Result<OwnedSemaphorePermit, Refusal> {
        self.one_of(&self.claimants, Limit::Claimants).map_err(|why| self.refusal(&why, Instant::now()))
    }

    /// Whether the client of this session connects too often.
    pub(crate) fn is_flapping(&self, session: &str) -> bool {
        self.clients.lock().is_flapping(session)
    }

    /// Forgets what is over and shows what is left, for as long as it is run.
    pub(crate) async fn sweep(&self) {
        loop {
            let (flapping, fighting) = self.clients.lock().sweep(Instant::now());
            self.metrics.flapping.set(i64::try_from(flapping).unwrap_or(i64::MAX));
            self.metrics.conflicts.set(i64::try_from(fighting).unwrap_or(i64::MAX));
            tokio::time::sleep(SWEEP_EVERY).await;
        }
    }
}

/// When those who were refused come again: each has a moment of its own, one after another.
///
/// The more there are, the later the last of them; beyond the longest wait they share the later half of it.
#[derive(Debug)]
struct Returns {
    step: Duration,
    shortest: Duration,
    longest: Duration,
    /// The moment that was given last.
    last: Instant,
    /// How many were given, for a spread that looks like chance and is not.
    given: u32,
}

impl Returns {
    fn new(settings: &config::Admission, now: Instant) -> Self {
        let per_s = if settings.connects_per_s > 0 { settings.connects_per_s } else { RETURNS_PER_S };
        Self {
            step: Duration::from_secs(1) / per_s,
            shortest: Duration::from_millis(settings.retry_after_min_ms),
            longest: Duration::from_millis(settings.retry_after_max_ms),
            last: now,
            given: 0,
        }
    }

    fn after(&mut self, now: Instant) -> Duration {
        self.last = (self.last + self.step).max(now + self.shortest).min(now + self.longest);
        let wait = self.last.saturating_duration_since(now);
        if wait < self.longest { wait } else { wait.mul_f64(1.0 - self.chance() / 2.0) }
    }

    /// At least so long, and up to an eighth or the shortest wait more, so that they do not come back together.
    fn no_sooner_than(&mut self, wait: Duration) -> Duration {
        wait + (wait / 8).max(self.shortest).mul_f64(self.chance())
    }

    /// 0 to 1, evenly spread however few or many are asked for: multiples of the golden ratio, as Weyl has shown.
    fn chance(&mut self) -> f64 {
        const GOLDEN: u32 = 0x9E37_79B9;
        self.given = self.given.wrapping_add(1);
        f64::from(self.given.wrapping_mul(GOLDEN)) / f64::from(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use fleet_core::config::{Config, Environment};
    use prometheus::Registry;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn config() -> Config {
        Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap()
    }

    fn admission(change: impl FnOnce(&mut Config)) -> Admission {
        let mut config = config();
        change(&mut config);
        Admission::new(&config.mqtt, &config.admission, Metrics::new(&Registry::new()).unwrap())
    }

    fn inside(place: Option<Place>) -> (OwnedSemaphorePermit, Handshake) {
        let Some(Place::Inside(room, handshake)) = place else { panic!("no place") };
        (room, handshake)
    }

    fn refused(place: Option<Place>) -> (OwnedSemaphorePermit, Reason, Duration) {
        let Some(Place::Refusal(permit, refusal)) = place else { panic!("not refused") };
        (permit, refusal.reason, refusal.retry_after.unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn connects_beyond_the_rate_are_told_when_to_come_again() {
        let admission = admission(|config| {
            (config.admission.connects_per_s, config.admission.connects_burst) = (100, 2);
        });
        let mut held: Vec<_> = (0..2).map(|_| inside(admission.place(PEER))).collect();
        for n in 0..3 {
            let (_, reason, wait) = refused(admission.place(PEER));
            assert_eq!((reason, wait), (Reason::ConnectionRateExceeded, (1000 + n * 10) * MS));
        }
        tokio::time::advance(10 * MS).await;
        held.push(inside(admission.place(PEER)));
        assert_eq!(refused(admission.place(PEER)).1, Reason::ConnectionRateExceeded);
    }

    #[tokio::test(start_paused = true)]
    async fn a_handshake_that_is_over_makes_room_and_a_connection_that_lives_does_not() {
        let admission = admission(|config| {
            config.mqtt.max_connections = 2;
            config.admission.max_handshakes = 1;
        });
        let (first, handshake) = inside(admission.place(PEER));
        assert_eq!(admission.metrics.handshakes.get(), 1);
        assert_eq!(refused(admission.place(PEER)).1, Reason::ServerBusy);
        drop(handshake);
        assert_eq!(admission.metrics.handshakes.get(), 0);
        let (_second, _) = inside(admission.place(PEER));
        assert_eq!(refused(admission.place(PEER)).1, Reason::QuotaExceeded);
        drop(first);
        drop(inside(admission.place(PEER)));
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_refusals_are_told_at_once_than_may() {
        let admission = admission(|config| {
            config.mqtt.max_connections = 0;
            config.admission.max_refusals = 2;
        });
        let told: Vec<_> = (0..2).map(|_| refused(admission.place(PEER))).collect();
        assert!(admission.place(PEER).is_none());
        let last = told.last().unwrap().2;
        drop(told);
        assert!(refused(admission.place(PEER)).2 <= last + MS, "a silent refusal takes no moment from others");
    }

    #[tokio::test(start_paused = true)]
    async fn a_guesser_takes_nothing_from_the_rate() {
        let admission = admission(|config| {
            (config.admission.connects_per_s, config.admission.connects_burst) = (1, 1);
            (config.admission.auth_failures, config.admission.auth_block_s) = (1, 8);
        });
        admission.failed(PEER);
        assert!(admission.is_heard(PEER).is_ok());
        admission.failed(PEER);
        assert_eq!(admission.is_heard(PEER).unwrap_err().reason, Reason::ConnectionRateExceeded);
        for _ in 0..9 {
            let (_, reason, wait) = refused(admission.place(PEER));
            assert_eq!(reason, Reason::ConnectionRateExceeded);
            assert!((8000 * MS..=9000 * MS).contains(&wait), "{wait:?}");
        }
        drop(inside(admission.place(IpAddr::from([127, 0, 0, 2]))));
    }

    #[test]
    fn those_who_return_come_one_after_another_and_the_window_grows_with_them() {
        let now = Instant::now();
        let settings = config::Admission { connects_per_s: 1000, ..config().admission };
        let mut returns = Returns::new(&settings, now);
        let waits: Vec<_> = (0..15_000).map(|_| returns.after(now)).collect();
        assert!(waits.is_sorted());
        assert_eq!((waits[0], waits[14_999]), (1000 * MS, 15_999 * MS));
        let busiest = (0..15).map(|s| waits.iter().filter(|wait| wait.as_secs() == s + 1).count()).max().unwrap();
        assert_eq!(busiest, 1000, "no second has more than can be let in");
        assert_eq!(returns.after(now + 60_000 * MS), 1000 * MS, "what has passed is forgotten");
    }

    #[test]
    fn more_than_fit_the_longest_wait_share_its_later_half() {
        let now = Instant::now();
        let settings = config::Admission { connects_per_s: 100, ..config().admission };
        let mut returns = Returns::new(&settings, now);
        let longest = Duration::from_millis(settings.retry_after_max_ms);
        let waits: Vec<_> = (0..20_000).map(|_| returns.after(now)).collect();
        let late = &waits[10_000..];
        assert!(late.iter().all(|wait| (longest / 2..=longest).contains(wait)));
        let early = late.iter().filter(|wait| **wait < longest * 3 / 4).count();
        assert!((4_900..=5_100).contains(&early), "evenly: {early} of 10,000 in the earlier half");
    }

    #[test]
    fn those_who_wait_for_one_moment_do_not_come_back_together() {
        let mut returns = Returns::new(&config().admission, Instant::now());
        let mut waits: Vec<_> = (0..100).map(|_| returns.no_sooner_than(80_000 * MS)).collect();
        waits.sort();
        assert!(waits[0] >= 80_000 * MS && waits[99] <= 90_000 * MS);
        assert!(waits.windows(2).all(|two| two[1] > two[0]));
        assert!((0..100).all(|_| returns.no_sooner_than(Duration::ZERO) <= 1000 * MS));
    }
}
