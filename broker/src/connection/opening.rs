//! From a known client to its session (MQTT 5 §3.1.2.4, §3.1.2.11.2): the one it finds again, or a new one.

use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::oneshot;

use crate::Shared;
use crate::access::Refusal;
use crate::handshake::Admitted;
use crate::mailbox::Mailbox;
use crate::metrics::Limit;
use crate::session::Durable;
use crate::store::{self, Op};
use crate::wire::{PacketId, Reason, Will};

/// Names the property of CONNACK that tells a client how many messages its queue had no room for.
const DROPPED: &str = "dropped-messages";

/// The session of a connection.
pub(super) struct Opened {
    /// `None`: it ends with the connection.
    pub(super) durable: Option<Arc<Durable>>,
    /// How long it outlives the connection, in seconds.
    pub(super) expiry_s: u32,
    /// QoS 2 messages that were received and not yet released.
    pub(super) received: Vec<PacketId>,
}

/// Finds or makes the session, and completes the answer to the CONNECT. What is new is committed first.
pub(super) async fn open<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    admitted: &mut Admitted<S>,
    mailbox: &Arc<Mailbox>,
) -> Result<Opened, Refusal> {
    let connect = &admitted.connect;
    let expiry_s = connect.session_expiry_s.min(shared.session_limits.max_expiry_s);
    if expiry_s != connect.session_expiry_s {
        admitted.answer.session_expiry_s = Some(expiry_s);
    }
    let mut found = shared.sessions.find(&admitted.session);
    if let Some(old) = found.take_if(|_| connect.clean_start) {
        end_session(shared, &old).await;
    }
    if let Some(session) = found.filter(|session| shared.sessions.arrive(session, mailbox, expiry_s)) {
        let store::Opened { received, dropped } = resume(shared, &session, admitted.connect.will.clone()).await?;
        admitted.answer.session_present = true;
        if dropped > 0 {
            admitted.answer.user_properties.push((DROPPED.into(), dropped.to_string().into()));
        }
        return Ok(Opened { durable: Some(session), expiry_s, received });
    }
    if expiry_s == 0 {
        return Ok(Opened { durable: None, expiry_s, received: Vec::new() });
    }
    let session = create(shared, admitted, mailbox, expiry_s)?;
    begin(shared, &session, admitted.connect.will.clone()).await?;
    Ok(Opened { durable: Some(session), expiry_s, received: Vec::new() })
}

async fn resume(shared: &Shared, session: &Arc<Durable>, will: Option<Will>) -> Result<store::Opened, Refusal> {
    let (opened, told) = oneshot::channel();
    shared.store.wait(Op::Resume { session: session.clone(), will, opened }).await;
    told.await.map_err(|_| (Reason::ServerUnavailable, "the session could not be read").into())
}

fn create<S>(
    shared: &Shared,
    admitted: &Admitted<S>,
    mailbox: &Arc<Mailbox>,
    expiry_s: u32,
) -> Result<Arc<Durable>, Refusal> {
    if shared.sessions.durable_count() >= shared.session_limits.max {
        shared.metrics.hit(Limit::Sessions);
        return Err((Reason::QuotaExceeded, "the broker keeps as many sessions as it may").into());
    }
    let session =
        shared.sessions.create(admitted.session.clone(), admitted.principal.clone(), admitted.client_id.clone());
    shared.metrics.sessions.set(i64::try_from(shared.sessions.durable_count()).unwrap_or(i64::MAX));
    shared.sessions.arrive(&session, mailbox, expiry_s);
    Ok(session)
}

/// Has a new session stored.
async fn begin(shared: &Shared, session: &Arc<Durable>, will: Option<Will>) -> Result<(), Refusal> {
    let (opened, told) = oneshot::channel();
    shared.store.wait(Op::Begin { session: session.clone(), will, opened }).await;
    if told.await.is_err() {
        shared.sessions.forget(session);
        return Err((Reason::ServerUnavailable, "the session could not be stored").into());
    }
    Ok(())
}

/// Ends a durable session: its subscriptions, what waits for it, and its delayed will, which is sent now (§3.1.3.2.2).
pub(crate) async fn end_session(shared: &Shared, session: &Arc<Durable>) {
    for (filter, _) in session.subscriptions() {
        shared.router.unsubscribe(&filter, session.number);
    }
    let will = shared.sessions.forget(session);
    shared.metrics.sessions.set(i64::try_from(shared.sessions.durable_count()).unwrap_or(i64::MAX));
    if let Some(will) = will {
        will.send(shared).await;
    }
    shared.store.wait(Op::End { session: session.clone() }).await;
}
