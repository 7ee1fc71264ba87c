//! What outlives a connection: who holds a client id, and the sessions that clients find again.
//!
//! Holds: one live connection for a client id of a principal (MQTT 5 §3.1.4-3). A [`Durable`] session is in the
//! database before its client is told that it exists, and what waits in it is changed by `store.rs` alone, in order.
//! A clean session is a connection and nothing more: it costs nothing here but its place among the live ones.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytestring::ByteString;
use fleet_core::config;
use fleet_core::id::SessionId;
use fleet_core::policy::Principal;
use fleet_core::session::{Expired, NEVER, Stored};
use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::time::{Duration, Instant};

use crate::mailbox::{Close, Mailbox};
use crate::will::Will;

/// Names a session: the principal and its client id. Two principals may use the same client id.
pub(crate) type SessionName = Arc<str>;

/// Names a subscriber in the router: a connection's number, or a durable session's, which lies above all those.
pub(crate) type SubscriberId = u64;

/// Durable sessions are numbered from here.
const FIRST_DURABLE: SubscriberId = 1 << 63;

/// One subscription of a session, as it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subscription {
    pub(crate) qos: crate::wire::QoS,
    pub(crate) no_local: bool,
    pub(crate) retain_as_published: bool,
    /// Subscription Identifier (MQTT 5 §3.8.2.1.2).
    pub(crate) id: Option<u32>,
}

/// A session that outlives its connections.
#[derive(Debug)]
pub(crate) struct Durable {
    pub(crate) id: SessionId,
    pub(crate) number: SubscriberId,
    pub(crate) name: SessionName,
    owner: Mutex<Principal>,
    pub(crate) client_id: ByteString,
    state: Mutex<State>,
    /// What waits for it; only `store.rs` changes this.
    pub(crate) queue: Mutex<QueueState>,
}

#[derive(Debug, Default)]
struct State {
    /// While a client is connected.
    mailbox: Option<Arc<Mailbox>>,
    subscriptions: HashMap<ByteString, Subscription>,
    /// Seconds it outlives its connection; [`NEVER`]: for ever.
    expiry_s: u32,
    /// A will that waits for its delay to pass.
    will: Option<Will>,
    /// What runs while the client is away.
    timers: Vec<TimerKey>,
    /// It is no more: nobody may come back to it.
    ended: bool,
}

/// The numbers of a session's queue.
#[derive(Debug)]
pub(crate) struct QueueState {
    /// The highest place ever given.
    pub(crate) last_offset: i64,
    pub(crate) messages: i64,
    pub(crate) bytes: i64,
    /// Everything up to here was left in the mailbox of the present connection.
    pub(crate) loaded: i64,
    /// Whether the database has more than the mailbox was given.
    pub(crate) behind: bool,
    /// Everything up to here may have been sent before the present connection.
    pub(crate) sent_to: i64,
    /// Messages that found no room.
    pub(crate) dropped: i64,
}

impl QueueState {
    /// Nothing is handed to a client before what was there earlier has been looked for.
    fn new() -> Self {
        Self { last_offset: 0, messages: 0, bytes: 0, loaded: 0, behind: true, sent_to: 0, dropped: 0 }
    }

    /// Gives the next message a place; `false`, and counted, when there is no room for it.
    pub(crate) fn add(&mut self, bytes: i64, settings: &config::Sessions) -> bool {
        if self.messages >= settings.queue_messages || self.bytes + bytes > settings.queue_bytes {
            self.dropped += 1;
            return false;
        }
        self.last_offset += 1;
        self.messages += 1;
        self.bytes += bytes;
        true
    }

    /// Messages have left the queue.
    pub(crate) fn remove(&mut self, messages: i64, bytes: i64) {
        self.messages = (self.messages - messages).max(0);
        self.bytes = (self.bytes - bytes).max(0);
    }
}

impl Durable {
    /// Whose it is, and what that one may do.
    pub(crate) fn owner(&self) -> Principal {
        self.owner.lock().clone()
    }

    /// Its owner may do something else from now on; so may a will that waits.
    pub(crate) fn set_owner(&self, owner: Principal) {
        if let Some(will) = &mut self.state.lock().will {
            will.owner = owner.clone();
        }
        *self.owner.lock() = owner;
    }

    /// Messages that wait for it, and their bytes.
    pub(crate) fn waiting(&self) -> (u64, u64) {
        let queue = self.queue.lock();
        (queue.messages.unsigned_abs(), queue.bytes.unsigned_abs())
    }

    /// The mailbox of the client, when it is connected.
    pub(crate) fn mailbox(&self) -> Option<Arc<Mailbox>> {
        self.state.lock().mailbox.clone()
    }

    /// Whether a client is connected that keeps up.
    pub(crate) fn is_relaxed(&self) -> bool {
        self.state.lock().mailbox.as_ref().is_some_and(|mailbox| mailbox.is_relaxed())
    }

    /// Notes a subscription; the one it replaces.
    pub(crate) fn subscribe(&self, filter: &ByteString, subscription: Subscription) -> Option<Subscription> {
        // A copy: the filter itself may be a slice of everything that was read with it.
        self.state.lock().subscriptions.insert(ByteString::from(&**filter), subscription)
    }

    /// Forgets a subscription; `false` when there was none.
    pub(crate) fn unsubscribe(&self, filter: &str) -> bool {
        self.state.lock().subscriptions.remove(filter).is_some()
    }

    /// Whether this filter is subscribed to.
    pub(crate) fn has_subscription(&self, filter: &str) -> bool {
        self.state.lock().subscriptions.contains_key(filter)
    }

    /// How many filters are subscribed to.
    pub(crate) fn subscription_count(&self) -> usize {
        self.state.lock().subscriptions.len()
    }

    /// All subscriptions.
    pub(crate) fn subscriptions(&self) -> Vec<(ByteString, Subscription)> {
        let state = self.state.lock();
        state.subscriptions.iter().map(|(filter, subscription)| (filter.clone(), *subscription)).collect()
    }

    /// Its connection has ended, and had sent everything up to this place: the next one begins with what is left.
    pub(crate) fn leave_queue(&self, sent_to: i64) {
        let mut queue = self.queue.lock();
        queue.behind = true;
        queue.sent_to = queue.sent_to.max(sent_to);
    }

    /// Seconds it outlives its connection; [`NEVER`]: for ever.
    pub(crate) fn expiry_s(&self) -> u32 {
        self.state.lock().expiry_s
    }
}

/// Something that happens to a session whose client stays away.
#[derive(Debug)]
pub(crate) enum Due {
    /// The delay of its will has passed.
    Will(Arc<Durable>, Will),
    /// It has outlived its connection as long as it may; with the will that was still waiting.
    End(Arc<Durable>, Option<Will>),
}

/// When, and a number that makes it unique.
type TimerKey = (Instant, u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Timer {
    Will,
    End,
}

/// The sessions of the broker.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    live: Mutex<HashMap<SessionName, Live>>,
    ended: Notify,
    durable: Mutex<HashMap<SessionName, Arc<Durable>>>,
    numbered: AtomicU64,
    timers: Mutex<BTreeMap<TimerKey, (Arc<Durable>, Timer)>>,
}

#[derive(Debug)]
struct Live {
    mailbox: Arc<Mailbox>,
    /// Which connection holds the session; a later one takes it over.
    connection: u64,
    /// Where that comes from.
    peer: IpAddr,
}

impl Sessions {
    /// Makes this connection the one that holds the session. An earlier one is closed and waited for, so that its
    /// will is sent before anything the new one says. `false` when a later one holds it: the handshake took so long
    /// that the client has come again.
    pub(crate) async fn enter(
        &self,
        name: &SessionName,
        connection: u64,
        peer: IpAddr,
        mailbox: &Arc<Mailbox>,
    ) -> bool {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            {
                let mut live = self.live.lock();
                match live.get(name) {
                    None => {
                        live.insert(name.clone(), Live { mailbox: mailbox.clone(), connection, peer });
                        return true;
                    }
                    Some(later) if later.connection > connection => return false,
                    Some(earlier) => earlier.mailbox.close(Close::TakenOver),
                }
            }
            ended.await;
        }
    }

    /// Where the connection comes from that holds the session.
    pub(crate) fn holder(&self, name: &str) -> Option<IpAddr> {
        Some(self.live.lock().get(name)?.peer)
    }

    /// Gives the session up, after the will was sent.
    pub(crate) fn leave(&self, name: &SessionName, connection: u64) {
        let mut live = self.live.lock();
        if live.get(name).is_some_and(|held| held.connection == connection) {
            live.remove(name);
        }
        drop(live);
        self.ended.notify_waiters();
    }

    /// Asks every connection to end.
    pub(crate) fn close_all(&self) {
        for live in self.live.lock().values() {
            live.mailbox.close(Close::ShuttingDown);
        }
    }

    /// Waits until no session is left.
    pub(crate) async fn all_ended(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.live.lock().is_empty() {
                return;
            }
            ended.await;
        }
    }

    // Sessions that outlive their connections

    /// The durable session of that name.
    pub(crate) fn find(&self, name: &str) -> Option<Arc<Durable>> {
        self.durable.lock().get(name).cloned()
    }

    /// The durable session of that id.
    pub(crate) fn by_id(&self, id: SessionId) -> Option<Arc<Durable>> {
        self.durable.lock().values().find(|session| session.id == id).cloned()
    }

    /// How many durable sessions there are.
    pub(crate) fn durable_count(&self) -> usize {
        self.durable.lock().len()
    }

    /// All durable sessions.
    pub(crate) fn all_durable(&self) -> Vec<Arc<Durable>> {
        self.durable.lock().values().cloned().collect()
    }

    /// Messages that wait for durable sessions, and their bytes.
    pub(crate) fn waiting(&self) -> (u64, u64) {
        let waiting = self.durable.lock().values().map(|session| session.waiting()).collect::<Vec<_>>();
        waiting.into_iter().fold((0, 0), |(messages, bytes), (more, size)| (messages + more, bytes + size))
    }

    /// How many clients are connected or have a session that waits for them.
    pub(crate) fn client_count(&self) -> usize {
        let live = self.live.lock();
        let durable = self.durable.lock();
        live.len() + durable.keys().filter(|name| !live.contains_key(*name)).count()
    }

    /// Makes a durable session, not yet known to the database.
    pub(crate) fn create(&self, name: SessionName, owner: Principal, client_id: ByteString) -> Arc<Durable> {
        let session = Arc::new(Durable {
            id: SessionId::new(),
            number: self.next_number(),
            name: name.clone(),
            owner: Mutex::new(owner),
            client_id,
            state: Mutex::default(),
            queue: Mutex::new(QueueState::new()),
        });
        self.durable.lock().insert(name, session.clone());
        session
    }

    /// Takes in a session that the database has kept.
    pub(crate) fn restore(&self, stored: &Stored) -> Arc<Durable> {
        let queue = QueueState {
            last_offset: stored.last_offset,
            messages: stored.queued,
            bytes: stored.queued_bytes,
            // What was connected when the broker died may have been sent anything that waited.
            sent_to: if stored.connected { stored.last_offset } else { stored.sent_to },
            dropped: stored.dropped,
            ..QueueState::new()
        };
        let session = Arc::new(Durable {
            id: stored.id,
            number: self.next_number(),
            name: stored.name.as_str().into(),
            owner: Mutex::new(stored.owner.clone()),
            client_id: stored.client_id.as_str().into(),
            state: Mutex::new(State { expiry_s: stored.expiry_s, ..State::default() }),
            queue: Mutex::new(queue),
        });
        self.durable.lock().insert(session.name.clone(), session.clone());
        session
    }

    fn next_number(&self) -> SubscriberId {
        FIRST_DURABLE + self.numbered.fetch_add(1, Ordering::Relaxed)
    }

    /// A client has come to a session: the will of last time will not be sent. `false` when the session has just ended.
    pub(crate) fn arrive(&self, session: &Durable, mailbox: &Arc<Mailbox>, expiry_s: u32) -> bool {
        let mut state = session.state.lock();
        if state.ended {
            return false;
        }
        state.mailbox = Some(mailbox.clone());
        state.expiry_s = expiry_s;
        state.will = None;
        let timers = std::mem::take(&mut state.timers);
        drop(state);
        self.stop_timers(&timers);
        true
    }

    /// The client is away: sets the timers of its will and of the session's end.
    pub(crate) fn away(&self, session: &Arc<Durable>, expiry_s: u32, will: Option<Will>) {
        let left = (expiry_s != NEVER).then(|| Duration::from_secs(u64::from(expiry_s)));
        self.set_away(session, expiry_s, left, will);
    }

    /// The client has been away since before the broker started.
    pub(crate) fn stay_away(&self, session: &Arc<Durable>, stored: &Stored, will: Option<Will>, now_ms: i64) {
        let left =
            stored.expires_ms.map(|at_ms| Duration::from_millis(u64::try_from(at_ms - now_ms).unwrap_or_default()));
        self.set_away(session, stored.expiry_s, left, will);
    }

    fn set_away(&self, session: &Arc<Durable>, expiry_s: u32, left: Option<Duration>, will: Option<Will>) {
        let now = Instant::now();
        let will_at = will.as_ref().map(|will| now + will.delay());
        let ends_at = left.map(|left| now + left);
        let timers = [will_at.map(|at| (at, Timer::Will)), ends_at.map(|at| (at, Timer::End))];
        let keys: Vec<_> = timers.into_iter().flatten().map(|(at, timer)| self.set_timer(at, session, timer)).collect();
        let mut state = session.state.lock();
        state.mailbox = None;
        state.expiry_s = expiry_s;
        state.will = will;
        state.timers = keys;
    }

    /// Counts messages that were deleted for their age.
    pub(crate) fn forget_messages(&self, expired: &[Expired]) {
        if expired.is_empty() {
            return;
        }
        let gone: HashMap<_, _> = expired.iter().map(|expired| (expired.session, expired)).collect();
        for session in self.durable.lock().values() {
            if let Some(expired) = gone.get(&session.id) {
                session.queue.lock().remove(expired.messages, expired.bytes);
            }
        }
    }

    /// Forgets a session that has ended; gives the will that was still waiting.
    pub(crate) fn forget(&self, session: &Durable) -> Option<Will> {
        let mut durable = self.durable.lock();
        if durable.get(&session.name).is_some_and(|held| held.id == session.id) {
            durable.remove(&session.name);
        }
        drop(durable);
        let mut state = session.state.lock();
        state.ended = true;
        state.mailbox = None;
        let (will, timers) = (state.will.take(), std::mem::take(&mut state.timers));
        drop(state);
        self.stop_timers(&timers);
        will
    }

    fn set_timer(&self, at: Instant, session: &Arc<Durable>, timer: Timer) -> TimerKey {
        let key = (at, self.numbered.fetch_add(1, Ordering::Relaxed));
        self.timers.lock().insert(key, (session.clone(), timer));
        key
    }

    fn stop_timers(&self, keys: &[TimerKey]) {
        let mut timers = self.timers.lock();
        for key in keys {
            timers.remove(key);
        }
    }

    /// What is due by now. A session whose end is due cannot be come back to any more.
    pub(crate) fn due(&self) -> Vec<Due> {
        let mut due = Vec::new();
        while let Some((key, (session, timer))) = self.next_due() {
            let mut state = session.state.lock();
            // Its client may have come and gone again meanwhile.
            if !state.timers.contains(&key) {
                continue;
            }
            let will = state.will.take();
            let ends = timer == Timer::End && state.mailbox.is_none();
            state.ended |= ends;
            drop(state);
            match will {
                _ if ends => due.push(Due::End(session, will)),
                Some(will) => due.push(Due::Will(session, will)),
                None => {}
            }
        }
        due
    }

    fn next_due(&self) -> Option<(TimerKey, (Arc<Durable>, Timer))> {
        let mut timers = self.timers.lock();
        if timers.first_key_value()?.0.0 > Instant::now() {
            return None;
        }
        timers.pop_first()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::Metrics;

    const HOME: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn mailbox() -> Arc<Mailbox> {
        Mailbox::new(1, 100, Metrics::new(&prometheus::Registry::new()).unwrap())
    }

    #[tokio::test]
    async fn a_second_connection_waits_for_the_first_to_end() {
        let sessions = Arc::new(Sessions::default());
        let name: SessionName = "main/d/d".into();
        let (first, second) = (mailbox(), mailbox());
        assert_eq!(sessions.holder(&name), None);
        assert!(sessions.enter(&name, 1, HOME, &first).await);
        assert_eq!(sessions.holder(&name), Some(HOME));
        let entering = tokio::spawn({
            let (sessions, name, second) = (sessions.clone(), name.clone(), second.clone());
            async move { sessions.enter(&name, 2, HOME, &second).await }
        });
        first.left().await;
        assert_eq!(first.take_settled(&mut Vec::new()), Some(Close::TakenOver));
        assert!(!entering.is_finished());
        sessions.leave(&name, 1);
        assert!(entering.await.unwrap());
        assert!(!sessions.enter(&name, 1, HOME, &first).await, "a handshake that was overtaken does not take over");
        sessions.leave(&name, 1);
        assert_eq!(
            sessions.live.lock().len(),
            1,
            "a connection that was taken over cannot end the session of its successor"
        );
    }
}
