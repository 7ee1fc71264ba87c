//! What a connection is told from outside, and what it tells of itself.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use fleet_core::connection_event::Kind;
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::Instant;

use super::{Connection, End, NEVER, Opened};
use crate::Shared;
use crate::access::Rights;
use crate::handshake::Admitted;
use crate::listener::Arrival;
use crate::mailbox::Mailbox;
use crate::presence::{Order, Particulars, Presence};
use crate::trace::Trace;

/// Takes a client in among those who are connected. What changed since it was authenticated is looked at again.
pub(super) fn enter<S>(
    shared: &Shared,
    admitted: &Admitted<S>,
    opened: &Opened,
    mailbox: &Arc<Mailbox>,
    arrival: &Arrival,
) -> Arc<Presence> {
    let presence = shared.presences.enter(Presence::new(Particulars {
        session: admitted.session.clone(),
        principal: Arc::new(admitted.principal.clone()),
        // A copy: it may be a slice of everything that was read with it.
        client_id: (&*admitted.client_id).into(),
        address: arrival.peer,
        transport: arrival.transport,
        version: admitted.connect.version,
        since_ms: shared.clock.now_ms(),
        keep_alive_s: admitted.keep_alive_s,
        session_expiry_s: opened.expiry_s,
        mailbox: mailbox.clone(),
        subscriber: opened.durable.as_ref().map_or(arrival.number, |session| session.number),
    }));
    shared.control.entered(admitted.epoch);
    presence
}

/// How a connection began, for its trace.
pub(super) fn trace_beginning<S>(trace: &Trace, admitted: &Admitted<S>, arrival: &Arrival) {
    trace.note(&format!("connection from {} by {}", arrival.peer, arrival.transport.as_str()));
    trace.connected(&admitted.connect);
}

/// The moment by the clock of timers; `None`: never.
pub(super) fn instant(shared: &Shared, at: Option<DateTime<Utc>>) -> Option<Instant> {
    let left = (at? - shared.clock.now()).to_std().unwrap_or_default();
    // Further away it is looked at once a day.
    Some(Instant::now() + left.min(10_000 * NEVER))
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    /// Does what it was told.
    pub(super) fn obey(&mut self) -> Result<(), End> {
        for order in self.presence.take_orders() {
            match order {
                Order::Leave(leave) => {
                    if leave.end_session {
                        self.expiry_s = 0;
                    }
                    return Err(End::Sent(leave));
                }
                Order::Until(at) => self.valid_until = instant(&self.shared, Some(at)),
                Order::Rights(principal) => {
                    self.rights = Rights::new(&principal, &self.shared.directory);
                    self.is_changed = true;
                    self.apply_rights();
                }
                Order::Trace(trace) => self.trace = trace,
            }
        }
        Ok(())
    }

    /// Tells what it has counted.
    pub(super) fn tell_counts(&mut self) {
        let counts = &self.presence.counts;
        let (bytes_in, bytes_out) = self.stream.take_counted();
        if bytes_in > 0 {
            counts.bytes_in.add(bytes_in);
            self.shared.metrics.bytes_received.inc_by(bytes_in);
        }
        if bytes_out > 0 {
            counts.bytes_out.add(bytes_out);
            self.shared.metrics.bytes_sent.inc_by(bytes_out);
        }
        counts.in_flight.set(self.inflight.len() as u64);
    }

    pub(super) fn tell_subscriptions(&self) {
        self.presence.counts.subscriptions.set(self.subscription_count() as u64);
    }

    /// The client does not take its messages, and goes for that.
    pub(super) fn note_overflow(&self) {
        let (messages, bytes) = self.mailbox.waiting();
        let detail = json!({ "disconnected": true, "queued_messages": messages, "queued_bytes": bytes });
        let now_ms = self.shared.clock.now_ms();
        self.shared.events.note(self.presence.event(Kind::QueueOverflow, detail, now_ms));
    }

    pub(super) fn trace_end(&self, end: &End) {
        if let Some(trace) = &self.trace {
            trace.note(&format!("connection ended: {}", end.label()));
        }
    }
}
