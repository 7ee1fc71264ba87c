//! Traces: what one client sends and is sent, as lines of text, for some minutes.
//!
//! A [`Trace`] belongs to a session, so it goes on when the client comes again; it ends by itself, and its lines stay a
//! little longer to be read. `text.rs` writes the packets.
//! Holds: a client that is not traced pays one branch; a trace is bounded in lines and bytes, the oldest lines go first;
//! no password, and no value that looks like a secret, gets into a line.

mod text;

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use fleet_core::clock::Clock;
use fleet_core::control::{Direction, TraceLine, TraceLines};
use fleet_core::id::{ConnectionId, TenantKey};
use parking_lot::Mutex;

use crate::metrics::{Limit, Metrics};
use crate::session::SessionName;
use crate::wire::{Connect, Outgoing, Packet};

/// Lines of one trace.
pub(crate) const MAX_LINES: usize = 1_000;
/// The same in bytes.
pub(crate) const MAX_BYTES: usize = 256 * 1024;
/// Connections under which one trace can be asked for: the last ones.
const MAX_NAMES: usize = 16;
/// What a line costs beside its text.
const LINE_BYTES: usize = 64;
/// How long the lines of a trace that has ended may be read, in milliseconds.
const READABLE_MS: i64 = 10 * 60_000;
/// Milliseconds of a minute.
const MINUTE_MS: i64 = 60_000;

/// As many traces run as may.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TooMany;

/// The traces of a broker.
pub(crate) struct Traces {
    by_session: Mutex<HashMap<SessionName, Arc<Trace>>>,
    /// Whether there is any: who connects while there is none need not look.
    any: AtomicBool,
    most: usize,
    clock: Clock,
    metrics: Metrics,
}

impl Traces {
    /// At most `most` at once.
    pub(crate) fn new(most: usize, clock: Clock, metrics: Metrics) -> Self {
        Self { by_session: Mutex::default(), any: AtomicBool::new(false), most, clock, metrics }
    }

    /// Traces a session from now on; one that is traced already keeps its lines and runs longer. The lines of a trace
    /// that has ended make room for a new one.
    pub(crate) fn start(
        &self,
        session: &SessionName,
        tenant: TenantKey,
        asked_for: ConnectionId,
        minutes: u16,
    ) -> Result<Arc<Trace>, TooMany> {
        let ends_ms = self.clock.now_ms() + i64::from(minutes) * MINUTE_MS;
        let mut traces = self.by_session.lock();
        if let Some(trace) = traces.get(session) {
            trace.ends_ms.store(ends_ms, Ordering::Relaxed);
            trace.inside.lock().ask_for(asked_for);
            return Ok(trace.clone());
        }
        if traces.len() >= self.most && !make_room(&mut traces, self.clock.now_ms()) {
            self.metrics.hit(Limit::Traces);
            return Err(TooMany);
        }
        let trace = Arc::new(Trace::new(tenant, asked_for, ends_ms, self.clock.clone()));
        traces.insert(session.clone(), trace.clone());
        self.note_number(traces.len());
        Ok(trace)
    }

    fn note_number(&self, traces: usize) {
        self.any.store(traces > 0, Ordering::Release);
        self.metrics.traces.set(i64::try_from(traces).unwrap_or(i64::MAX));
    }

    /// The trace of a session, while it runs.
    pub(crate) fn of(&self, session: &str) -> Option<Arc<Trace>> {
        if !self.any.load(Ordering::Acquire) {
            return None;
        }
        self.by_session.lock().get(session).filter(|trace| !trace.is_over()).cloned()
    }

    /// The trace that was asked for under this connection, or that of the session it holds; running or not.
    pub(crate) fn find(&self, tenant: TenantKey, id: ConnectionId, holds: Option<&str>) -> Option<Arc<Trace>> {
        let traces = self.by_session.lock();
        let asked_for = || traces.values().find(|trace| trace.inside.lock().asked_for.contains(&id));
        holds.and_then(|session| traces.get(session)).or_else(asked_for).filter(|trace| trace.tenant == tenant).cloned()
    }

    /// Ends a trace and forgets its lines; its session.
    pub(crate) fn stop(&self, trace: &Arc<Trace>) -> Option<SessionName> {
        let mut traces = self.by_session.lock();
        let session = traces.iter().find(|(_, held)| Arc::ptr_eq(held, trace)).map(|(session, _)| session.clone())?;
        traces.remove(&session);
        self.note_number(traces.len());
        trace.ends_ms.store(i64::MIN, Ordering::Relaxed);
        Some(session)
    }

    /// Forgets the lines that were readable long enough; the sessions whose traces are over.
    pub(crate) fn sweep(&self) -> Vec<SessionName> {
        if !self.any.load(Ordering::Acquire) {
            return Vec::new();
        }
        let now_ms = self.clock.now_ms();
        let mut traces = self.by_session.lock();
        let over = traces.iter().filter(|(_, trace)| trace.is_over()).map(|(session, _)| session.clone()).collect();
        traces.retain(|_, trace| trace.ends_ms() + READABLE_MS > now_ms);
        self.note_number(traces.len());
        over
    }
}

/// Forgets the trace that ended first; `false` when all of them run.
fn make_room(traces: &mut HashMap<SessionName, Arc<Trace>>, now_ms: i64) -> bool {
    let over = traces.iter().filter(|(_, trace)| trace.ends_ms() <= now_ms);
    let Some((oldest, _)) = over.min_by_key(|(_, trace)| trace.ends_ms()) else { return false };
    let oldest = oldest.clone();
    traces.remove(&oldest).is_some()
}

/// The trace of one session.
#[derive(Debug)]
pub(crate) struct Trace {
    tenant: TenantKey,
    ends_ms: AtomicI64,
    clock: Clock,
    inside: Mutex<Inside>,
}

#[derive(Debug)]
struct Inside {
    /// The connections it was asked for, each a name for it.
    asked_for: VecDeque<ConnectionId>,
    lines: VecDeque<TraceLine>,
    bytes: usize,
    last_seq: i64,
    dropped: u64,
}

impl Inside {
    fn ask_for(&mut self, id: ConnectionId) {
        self.asked_for.retain(|known| *known != id);
        if self.asked_for.len() == MAX_NAMES {
            self.asked_for.pop_front();
        }
        self.asked_for.push_back(id);
    }
}

impl Trace {
    fn new(tenant: TenantKey, asked_for: ConnectionId, ends_ms: i64, clock: Clock) -> Self {
        let inside =
            Inside { asked_for: [asked_for].into(), lines: VecDeque::new(), bytes: 0, last_seq: 0, dropped: 0 };
        Self { tenant, ends_ms: AtomicI64::new(ends_ms), clock, inside: Mutex::new(inside) }
    }

    fn ends_ms(&self) -> i64 {
        self.ends_ms.load(Ordering::Relaxed)
    }

    /// Whether its time has passed.
    pub(crate) fn is_over(&self) -> bool {
        self.ends_ms() <= self.clock.now_ms()
    }

    /// Notes how a client came in.
    pub(crate) fn connected(&self, connect: &Connect) {
        self.write(Direction::In, text::connect(connect));
    }

    /// Notes what the client sent.
    pub(crate) fn received(&self, packet: &Packet) {
        self.write(Direction::In, text::received(packet));
    }

    /// Notes what the client is sent.
    pub(crate) fn sent(&self, packet: &Outgoing<'_>) {
        self.write(Direction::Out, text::sent(packet));
    }

    /// Notes what happened to the connection.
    pub(crate) fn note(&self, text: &str) {
        self.write(Direction::Note, text.to_owned());
    }

    fn write(&self, direction: Direction, text: String) {
        let at_ms = self.clock.now_ms();
        if at_ms >= self.ends_ms() {
            return;
        }
        let mut inside = self.inside.lock();
        // Microseconds, so that the lines of several brokers sort together.
        inside.last_seq = (inside.last_seq + 1).max(at_ms * 1_000);
        inside.bytes += text.len() + LINE_BYTES;
        let line = TraceLine { seq: inside.last_seq, at_ms, direction, text };
        inside.lines.push_back(line);
        while inside.lines.len() > MAX_LINES || inside.bytes > MAX_BYTES {
            let Some(oldest) = inside.lines.pop_front() else { break };
            inside.bytes -= oldest.text.len() + LINE_BYTES;
            inside.dropped += 1;
        }
    }

    /// At most `limit` lines behind the one at `after`.
    pub(crate) fn lines(&self, after: i64, limit: usize) -> TraceLines {
        let inside = self.inside.lock();
        let from = inside.lines.partition_point(|line| line.seq <= after);
        let lines = inside.lines.iter().skip(from).take(limit).cloned().collect();
        TraceLines { lines, dropped: inside.dropped, ends_ms: self.ends_ms() }
    }
}

#[cfg(test)]
mod tests {
    use fleet_core::clock::from_ms;
    use prometheus::Registry;

    use super::*;

    const NOON: i64 = 1_763_726_400_000;
    const TENANT: TenantKey = TenantKey(1);

    fn traces(most: usize) -> (Traces, Clock) {
        let clock = Clock::fixed(from_ms(NOON));
        (Traces::new(most, clock.clone(), Metrics::new(&Registry::new()).unwrap()), clock)
    }

    fn pass_minutes(clock: &Clock, minutes: i64) {
        clock.set(from_ms(clock.now_ms() + minutes * MINUTE_MS));
    }

    fn texts(trace: &Trace, after: i64) -> Vec<String> {
        trace.lines(after, 10).lines.into_iter().map(|line| line.text).collect()
    }

    #[test]
    fn a_trace_is_found_under_the_last_connections_it_was_asked_for() {
        let (traces, _) = traces(1);
        let session: SessionName = "main/d/c".into();
        let ids: Vec<_> = (0..=MAX_NAMES).map(|_| ConnectionId::new()).collect();
        for id in &ids {
            for _ in 0..3 {
                traces.start(&session, TENANT, *id, 1).unwrap();
            }
        }
        assert!(traces.find(TENANT, ids[0], None).is_none(), "the first made room");
        assert!(ids[1..].iter().all(|id| traces.find(TENANT, *id, None).is_some()));
    }

    #[test]
    fn a_trace_ends_by_itself_and_its_lines_stay_readable_for_a_while() {
        let (traces, clock) = traces(2);
        let (session, id): (SessionName, _) = ("main/d/c".into(), ConnectionId::new());
        assert!(traces.of(&session).is_none());
        let trace = traces.start(&session, TENANT, id, 5).unwrap();
        trace.note("one");
        pass_minutes(&clock, 4);
        assert!(Arc::ptr_eq(&traces.of(&session).unwrap(), &trace), "the client has come again");
        assert_eq!(traces.sweep(), [] as [SessionName; 0]);
        trace.note("two");
        pass_minutes(&clock, 1);
        assert!(traces.of(&session).is_none());
        trace.note("too late");
        assert_eq!(traces.sweep(), std::slice::from_ref(&session));
        assert_eq!(texts(&traces.find(TENANT, id, None).unwrap(), 0), ["one", "two"]);
        pass_minutes(&clock, READABLE_MS / MINUTE_MS);
        traces.sweep();
        assert!(traces.find(TENANT, id, Some(&session)).is_none());
    }

    #[test]
    fn a_trace_is_found_by_whoever_asked_for_it_or_holds_the_session_and_by_no_other_tenant() {
        let (traces, _) = traces(2);
        let (session, first, second): (SessionName, _, _) =
            ("main/d/c".into(), ConnectionId::new(), ConnectionId::new());
        let trace = traces.start(&session, TENANT, first, 5).unwrap();
        assert!(traces.find(TENANT, first, None).is_some());
        assert!(traces.find(TENANT, second, None).is_none());
        assert!(traces.find(TENANT, second, Some(&session)).is_some());
        assert!(traces.find(TenantKey(2), first, Some(&session)).is_none());
        trace.note("kept");
        let longer = traces.start(&session, TENANT, second, 60).unwrap();
        assert!(Arc::ptr_eq(&longer, &trace), "asked for again it goes on");
        assert_eq!(longer.lines(0, 10).ends_ms, NOON + 60 * MINUTE_MS);
        assert!(traces.find(TENANT, second, None).is_some());
        assert_eq!(traces.stop(&trace), Some(session.clone()));
        assert!(trace.is_over() && traces.of(&session).is_none() && traces.find(TENANT, first, None).is_none());
        assert_eq!(traces.stop(&trace), None);
    }

    #[test]
    fn traces_are_bounded_and_those_that_ended_make_room() {
        let (traces, clock) = traces(2);
        let start = |session: &str, minutes| traces.start(&session.into(), TENANT, ConnectionId::new(), minutes);
        start("a", 1).unwrap();
        start("b", 10).unwrap();
        assert_eq!(start("c", 1).unwrap_err(), TooMany);
        assert_eq!(traces.metrics.limits.with_label_values(&["traces"]).get(), 1);
        start("b", 10).expect("it is one of the two");
        pass_minutes(&clock, 1);
        start("c", 1).expect("the first is over");
        assert_eq!(traces.metrics.traces.get(), 2);
        assert!(traces.of("a").is_none() && traces.of("c").is_some());
    }

    #[test]
    fn the_oldest_lines_go_first() {
        let (traces, _) = traces(1);
        let trace = traces.start(&"s".into(), TENANT, ConnectionId::new(), 1).unwrap();
        for n in 0..MAX_LINES + 7 {
            trace.note(&n.to_string());
        }
        let all = trace.lines(0, usize::MAX);
        assert_eq!((all.lines.len(), all.dropped), (MAX_LINES, 7));
        assert_eq!(all.lines[0].text, "7");
        let behind = trace.lines(all.lines[0].seq, 2).lines;
        assert_eq!(behind.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), ["8", "9"]);
        let long = "x".repeat(MAX_BYTES / 4);
        for _ in 0..8 {
            trace.note(&long);
        }
        assert_eq!(trace.lines(0, usize::MAX).lines.len(), 3, "bytes are bounded too");
        assert!(trace.inside.lock().bytes <= MAX_BYTES);
    }
}
