//! From an accepted socket to a known client: CONNECT, credential, CONNACK (MQTT 5 §3.1, §3.2).
//!
//! Holds: before a client is known, little is buffered for it and little time is given to it; whoever is refused is
//! told why where the standard has a word for it.

use std::num::{NonZeroU16, NonZeroU32};
use std::time::Duration;

use bytestring::ByteString;
use chrono::{DateTime, Utc};
use fleet_core::connection_event::{Event as ConnectionEvent, Kind};
use fleet_core::id::TenantId;
use fleet_core::policy::{Principal, Who};
use serde_json::json;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{timeout, timeout_at};
use uuid::Uuid;

use crate::Shared;
use crate::access::{Refusal, Rights, Route};
use crate::flapping::Verdict;
use crate::listener::Arrival;
use crate::metrics::Limit;
use crate::provisioning::response_topic;
use crate::session::SessionName;
use crate::stream::{Io, Stream};
use crate::wire::{ConnAck, Connect, Decoder, Encoder, Outgoing, Packet, Reason, Version, Violation};

/// Largest CONNECT, in bytes.
const MAX_CONNECT_BYTES: u32 = 64 * 1024;
/// Longest client id, in bytes; the standard asks for at least 23 (MQTT 5 §3.1.3.1).
const MAX_CLIENT_ID_BYTES: usize = 256;
/// How long somebody who is refused may take to say who it is.
pub(crate) const REFUSE_WITHIN: Duration = Duration::from_secs(1);
/// User property of a refusal: when to come again, in milliseconds.
const RETRY_AFTER: &str = "retry-after-ms";
/// User property of CONNACK: the client's certificate has expired, see [`renew_only`].
const RENEW_ONLY: &str = "renew-only-until-ms";
/// How long telling somebody to go may take.
pub(crate) const FAREWELL_WITHIN: Duration = Duration::from_secs(1);

/// A client that was let in.
pub(crate) struct Admitted<S> {
    pub(crate) stream: Stream<S>,
    pub(crate) decoder: Decoder,
    pub(crate) encoder: Encoder,
    pub(crate) connect: Connect,
    pub(crate) principal: Principal,
    pub(crate) rights: Rights,
    /// The client's own id, or the one it was given.
    pub(crate) client_id: ByteString,
    pub(crate) session: SessionName,
    /// Its place among those who came by a claim, if it did.
    pub(crate) claimant: Option<OwnedSemaphorePermit>,
    /// What it is answered, once the session is its own.
    pub(crate) answer: ConnAck,
    /// In seconds; `None`: it may be silent for ever (3.1.1 only).
    pub(crate) keep_alive_s: Option<u16>,
    /// Of rights, before it was authenticated.
    pub(crate) epoch: i64,
}

/// Reads the CONNECT and checks it; `None` when the client was turned away.
pub(crate) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    socket: S,
    arrival: &mut Arrival,
) -> Option<Admitted<S>> {
    let (mut stream, decoder, mut connect) = read_connect(shared, socket, arrival).await?;
    let encoder = Encoder::for_client(&connect);
    let epoch = shared.control.epoch();
    let admitted = admit(shared, &connect, arrival).await.and_then(|(principal, rights)| {
        let client_id = client_id(&connect, &principal);
        let session = session_key(&principal, &client_id);
        meet(shared, &principal, &client_id, &session, arrival)?;
        let claimant = matches!(principal.who, Who::Claim { .. }).then(|| shared.admission.claimant()).transpose()?;
        Ok((principal, rights, client_id, session, claimant))
    });
    match admitted {
        Ok((principal, rights, client_id, session, claimant)) => {
            let keep_alive_s = keep_alive_s(&connect, shared.settings.max_keep_alive_s);
            let answer = welcome(shared, &connect, &principal, &client_id, keep_alive_s);
            if is_confined(&principal) {
                confine(&mut connect);
            }
            Some(Admitted {
                stream,
                decoder,
                encoder,
                connect,
                principal,
                rights,
                client_id,
                session,
                claimant,
                answer,
                keep_alive_s,
                epoch,
            })
        }
        Err(refusal) => {
            tracing::debug!(peer = %arrival.peer, reason = %refusal.reason, text = refusal.text, "a client was turned away");
            turn_away(shared, &mut stream, &encoder, refusal).await;
            None
        }
    }
}

/// Tells a client that there is no place for it, and closes.
pub(crate) async fn refuse<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    socket: S,
    arrival: &Arrival,
    refusal: Refusal,
) {
    if let Some((mut stream, _, connect)) = read_connect(shared, socket, arrival).await {
        turn_away(shared, &mut stream, &Encoder::for_client(&connect), refusal).await;
    }
}

async fn read_connect<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    socket: S,
    arrival: &Arrival,
) -> Option<(Stream<S>, Decoder, Connect)> {
    let mut stream = Stream::new(socket);
    let mut decoder = Decoder::new(shared.settings.max_packet_bytes, MAX_CONNECT_BYTES);
    loop {
        match decoder.decode(&mut stream.inbound) {
            Ok(Some(Packet::Connect(connect))) => return Some((stream, decoder, *connect)),
            Ok(Some(_)) => return None,
            Ok(None) => {}
            Err(violation) => {
                tracing::debug!(peer = %arrival.peer, %violation, "no CONNECT");
                reject(shared, &mut stream, &violation).await;
                return None;
            }
        }
        match timeout_at(arrival.due, stream.ready(true)).await {
            Ok(Ok(Io::Read)) => {}
            Ok(_) => return None,
            Err(_) => {
                shared.metrics.hit(Limit::ConnectTimeout);
                return None;
            }
        }
    }
}

/// Answers a first packet that is no CONNECT, where there is an answer.
async fn reject<S: AsyncRead + AsyncWrite + Unpin>(shared: &Shared, stream: &mut Stream<S>, violation: &Violation) {
    count_violation(shared, violation);
    shared.metrics.connects.with_label_values(&[violation.reason.text()]).inc();
    let Some(version) = violation.answer_as else { return };
    let text = ByteString::from(violation.text.as_ref());
    say_goodbye(stream, &Encoder::new(version), Outgoing::ConnAck(&ConnAck::refusal(violation.reason, Some(text))))
        .await;
}

/// Counts a broken rule; a packet that was too large is a bound that was hit.
pub(crate) fn count_violation(shared: &Shared, violation: &Violation) {
    if violation.reason == Reason::PacketTooLarge {
        shared.metrics.hit(Limit::PacketBytes);
    }
}

/// Refuses a CONNECT and closes.
pub(crate) async fn turn_away<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Shared,
    stream: &mut Stream<S>,
    encoder: &Encoder,
    refusal: impl Into<Refusal>,
) {
    let Refusal { reason, text, retry_after } = refusal.into();
    let passing = matches!(reason, Reason::ServerBusy | Reason::ServerUnavailable);
    let retry_after = retry_after.or_else(|| passing.then(|| shared.admission.retry_after()));
    shared.metrics.connects.with_label_values(&[reason.text()]).inc();
    let text = (!text.is_empty()).then(|| ByteString::from_static(text));
    let mut answer = ConnAck::refusal(reason, text);
    if let Some(wait) = retry_after {
        let value = ByteString::from(wait.as_millis().to_string());
        answer.user_properties.push((ByteString::from_static(RETRY_AFTER), value));
    }
    say_goodbye(stream, encoder, Outgoing::ConnAck(&answer)).await;
}

/// Sends a last packet and closes; a client that does not read is not waited for.
pub(crate) async fn say_goodbye<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut Stream<S>,
    encoder: &Encoder,
    packet: Outgoing<'_>,
) {
    // What does not fit the client's Maximum Packet Size is left unsaid (MQTT 5 §3.1.2.11.4).
    let _ = encoder.encode(packet, &mut stream.outbound);
    // The client may have gone: there is nobody left to tell.
    let _ = timeout(FAREWELL_WITHIN, stream.finish()).await;
}

/// Whether the client may come in, and with which rights.
async fn admit(shared: &Shared, connect: &Connect, arrival: &mut Arrival) -> Result<(Principal, Rights), Refusal> {
    if connect.authentication_method.is_some() {
        return Err((Reason::BadAuthenticationMethod, "extended authentication is not offered").into());
    }
    if connect.client_id.len() > MAX_CLIENT_ID_BYTES {
        return Err((Reason::ClientIdentifierNotValid, "expected a client id of at most 256 bytes").into());
    }
    if connect.client_id.is_empty() && connect.version == Version::V311 && !connect.clean_start {
        return Err((Reason::ClientIdentifierNotValid, "an empty client id needs a clean session").into());
    }
    shared.admission.is_heard(arrival.peer.ip())?;
    let authenticated = shared.access.authenticate(connect, arrival).await;
    if authenticated.as_ref().is_err_and(|refusal| refusal.reason == Reason::BadUserNameOrPassword) {
        shared.admission.failed(arrival.peer.ip());
    }
    let principal = authenticated?;
    shared.access.acquaint(&principal).await?;
    let mut rights = Rights::new(&principal, &shared.directory);
    let will = connect.will.as_ref().filter(|_| !is_confined(&principal));
    let refused = match will.map(|will| rights.publish(&will.topic)) {
        Some(Ok(Route::Renewal(_) | Route::Provision)) => Some("a will cannot ask for anything"),
        Some(Err(text)) => Some(text),
        Some(Ok(_)) | None => None,
    };
    if let Some(text) = refused {
        shared.metrics.denied.with_label_values(&["connect"]).inc();
        return Err((Reason::NotAuthorized, text).into());
    }
    Ok((principal, rights))
}

/// Whether a client came for one thing only: a device whose certificate has expired, to renew it, or one that asks to come in.
fn is_confined(principal: &Principal) -> bool {
    principal.proof.renew_only || matches!(principal.who, Who::Claim { .. })
}

/// Such a client comes as it comes every day: with the will and to the session it is used to. Neither is within its rights now. Its
/// will is left out, and its session stays as it is beside one that ends with the connection.
fn confine(connect: &mut Connect) {
    connect.will = None;
    connect.clean_start = true;
    connect.session_expiry_s = 0;
}

/// Whether a client that is known comes too often, or where another one is.
fn meet(
    shared: &Shared,
    principal: &Principal,
    client_id: &str,
    session: &SessionName,
    arrival: &Arrival,
) -> Result<(), Refusal> {
    let peer = arrival.peer.ip();
    let met = shared.admission.meet(session, peer, shared.sessions.holder(session));
    let Err((refusal, verdict)) = met else { return Ok(()) };
    let (kind, detail) = match verdict {
        Verdict::Flapping { news: true, .. } => (Kind::Flapping, json!({ "address": peer })),
        Verdict::Conflict { news: true, holder, .. } => {
            (Kind::IdentityConflict, json!({ "holder": holder, "refused": peer }))
        }
        _ => return Err(refusal),
    };
    let now_ms = shared.clock.now_ms();
    shared.events.note(ConnectionEvent::new(principal, client_id, kind, detail, now_ms));
    Err(refusal)
}

/// The client's own id, or the one it is given (MQTT 5 §3.1.3.1): a device its name, anybody else a new one.
fn client_id(connect: &Connect, principal: &Principal) -> ByteString {
    match &principal.who {
        Who::Claim { asker, .. } => ByteString::from(asker.as_str()),
        _ if !connect.client_id.is_empty() => connect.client_id.clone(),
        Who::Device { id, .. } => ByteString::from(id.as_str()),
        Who::User { .. } => ByteString::from(Uuid::new_v4().simple().to_string()),
    }
}

fn session_key(principal: &Principal, client_id: &str) -> SessionName {
    match &principal.who {
        // No name of a tenant has a colon.
        Who::Device { id, .. } if principal.proof.renew_only => {
            format!("renew:{}/{id}/{client_id}", principal.tenant_id)
        }
        // One for each name and tenant, whatever claim it comes by: it is the name that answers go to.
        Who::Claim { asker, .. } => return claim_session(&principal.tenant_id, asker.as_str()),
        Who::Device { id, .. } => format!("{}/{id}/{client_id}", principal.tenant_id),
        Who::User { key: Some(key), .. } => format!("{}//{key}/{client_id}", principal.tenant_id),
        Who::User { id, .. } => format!("{}//{id}/{client_id}", principal.tenant_id),
    }
    .into()
}

/// The session of whoever asks by a claim under this name.
pub(crate) fn claim_session(tenant: &TenantId, asker: &str) -> SessionName {
    // No name of a tenant has a colon.
    format!("claim:{tenant}/{asker}").into()
}

/// An MQTT 5 client can be told a shorter keep alive than it asked for; a 3.1.1 client keeps its own.
fn keep_alive_s(connect: &Connect, most: u16) -> Option<u16> {
    match (connect.version, connect.keep_alive_s) {
        (Version::V5, 0) => Some(most),
        (Version::V5, asked) => Some(asked.min(most)),
        (Version::V311, 0) => None,
        (Version::V311, asked) => Some(asked),
    }
}

fn welcome(
    shared: &Shared,
    connect: &Connect,
    principal: &Principal,
    client_id: &ByteString,
    keep_alive_s: Option<u16>,
) -> ConnAck {
    let late_until = principal.proof.valid_until.filter(|_| principal.proof.renew_only);
    ConnAck {
        session_expiry_s: is_confined(principal).then_some(0),
        user_properties: late_until.map(renew_only).into_iter().collect(),
        assigned_client_id: connect.client_id.is_empty().then(|| client_id.clone()),
        server_keep_alive_s: keep_alive_s.filter(|seconds| *seconds != connect.keep_alive_s),
        receive_maximum: NonZeroU16::new(shared.settings.receive_maximum).unwrap_or(NonZeroU16::MAX),
        maximum_packet_size: NonZeroU32::new(shared.settings.max_packet_bytes),
        topic_alias_maximum: shared.settings.topic_alias_maximum,
        response_information: connect.request_response_information.then(|| response_information(principal)),
        ..ConnAck::default()
    }
}

/// Tells a client that it may renew its certificate and do nothing else, and until when, in milliseconds since the epoch.
fn renew_only(until: DateTime<Utc>) -> (ByteString, ByteString) {
    (ByteString::from_static(RENEW_ONLY), until.timestamp_millis().to_string().into())
}

/// Where the client may have answers sent to (MQTT 5 §3.2.2.3.15): a prefix of topics that it may subscribe to.
fn response_information(principal: &Principal) -> ByteString {
    let tenant = &principal.tenant_id;
    match &principal.who {
        Who::Device { id, .. } => format!("fleet/v1/{tenant}/{id}/").into(),
        Who::User { .. } => format!("app/{tenant}/").into(),
        Who::Claim { asker, .. } => response_topic(tenant, asker.as_str()),
    }
}
