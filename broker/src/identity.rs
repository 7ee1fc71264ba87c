//! Whom a client's certificate stands for. That the client holds its key was shown in the TLS handshake.
//!
//! Holds: a certificate outside its time is refused, whatever else is right. Else it is worth something in two cases: it was
//! registered for a device, or a registered authority signed it and its common name names one.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use fleet_core::certificate::Certificate;
use fleet_core::clock::Clock;
use fleet_core::credential;
use fleet_core::policy::{Principal, Who};
use sqlx::PgPool;
use tokio::sync::Semaphore;

use crate::access::Refusal;
use crate::tls::{Chain, Tls};
use crate::wire::{Connect, Reason};

/// Certificates asked about at once; a storm of connects queues here, not in front of the REST API's connections.
const ASK_AT_ONCE: usize = 8;

/// Tells whom a certificate stands for.
pub(crate) struct Certificates {
    db: PgPool,
    clock: Clock,
    tls: Option<Arc<Tls>>,
    asking: Semaphore,
}

impl Certificates {
    pub(crate) fn new(db: PgPool, clock: Clock, tls: Option<Arc<Tls>>) -> Self {
        Self { db, clock, tls, asking: Semaphore::new(ASK_AT_ONCE) }
    }

    /// The device behind a certificate; `None` when it is not known.
    pub(crate) async fn holder(&self, chain: &Chain) -> Result<Option<Principal>, Refusal> {
        let now = self.clock.now();
        let shown = chain.first().and_then(|der| Certificate::from_der(der).ok());
        let shown = shown.ok_or((Reason::NotAuthorized, "the certificate cannot be read"))?;
        in_time(&shown, now)?;
        let is_vouched_for = self.tls.as_ref().is_some_and(|tls| tls.vouches_for(chain, now));
        let _turn = self.asking.acquire().await.expect("the semaphore is never closed");
        let found = async {
            let mut db = self.db.acquire().await?;
            credential::of_certificate(&mut db, &shown, is_vouched_for, now).await
        };
        found.await.map_err(|error| {
            tracing::warn!(%error, "a certificate could not be looked up");
            (Reason::ServerUnavailable, "the database is away: try again shortly").into()
        })
    }
}

fn in_time(shown: &Certificate, now: DateTime<Utc>) -> Result<(), Refusal> {
    if now > shown.not_after {
        return Err((Reason::NotAuthorized, "the certificate has expired").into());
    }
    if now < shown.not_before {
        return Err((Reason::NotAuthorized, "the certificate is not valid yet").into());
    }
    Ok(())
}

/// Who comes in by a certificate alone: its holder, unless the user name says somebody else.
pub(crate) fn alone(connect: &Connect, holder: Option<Principal>) -> Result<Principal, Refusal> {
    let holder = holder.ok_or((Reason::NotAuthorized, "the certificate is not known here"))?;
    match &connect.username {
        Some(username) if **username != name(&holder) => Err(CONTRADICTION.into()),
        _ => Ok(holder),
    }
}

/// Who comes in by a password beside a certificate: whom the password stands for, unless they are two devices.
pub(crate) fn beside(holder: Option<&Principal>, by_password: Principal) -> Result<Principal, Refusal> {
    match (holder.map(|holder| &holder.who), &by_password.who) {
        (Some(Who::Device { key: one, .. }), Who::Device { key: other, .. }) if one != other => {
            Err(CONTRADICTION.into())
        }
        _ => Ok(by_password),
    }
}

const CONTRADICTION: (Reason, &str) =
    (Reason::BadUserNameOrPassword, "the certificate and the user name stand for two devices");

/// `{tenant}/{device}`
fn name(holder: &Principal) -> String {
    match &holder.who {
        Who::Device { id, .. } => format!("{}/{id}", holder.tenant_id),
        Who::User { id, .. } => id.to_string(),
    }
}
