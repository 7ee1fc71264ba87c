//! Whom a client's certificate stands for. That the client holds its key was shown in the TLS handshake.
//!
//! Holds: a certificate outside its time is refused, whatever else is right, but for one that expired a short while ago and
//! comes to be renewed. Else it is worth something in three cases: it was registered for a device, or signed for it here; an authority
//! of a tenant signed it, and its common name names a device of that tenant; an authority of the settings did, and its
//! common name names a device of any. Time is checked here and not in the TLS handshake, so that those who are late can be told,
//! and helped (ADR 11).

use std::sync::Arc;

use chrono::{DateTime, TimeDelta, Utc};
use fleet_core::authority;
use fleet_core::certificate::Certificate;
use fleet_core::claim;
use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::credential;
use fleet_core::policy::{Principal, Who};
use sqlx::{PgConnection, PgPool};
use tokio::sync::Semaphore;

use crate::access::Refusal;
use crate::tls::{Chain, Tls};
use crate::wire::{Connect, Reason};

/// Certificates asked about at once; a storm of connects queues here, not in front of the REST API's connections.
const ASK_AT_ONCE: usize = 8;
/// Certificates of a chain whose issuers are looked up.
const MAX_CHAIN: usize = 5;

/// Tells whom a certificate stands for.
pub(crate) struct Certificates {
    db: PgPool,
    clock: Clock,
    tls: Option<Arc<Tls>>,
    /// How long after its end a certificate may be renewed.
    grace: TimeDelta,
    asking: Semaphore,
}

impl Certificates {
    pub(crate) fn new(db: PgPool, clock: Clock, tls: Option<Arc<Tls>>, settings: &config::Certificates) -> Self {
        let grace = TimeDelta::seconds(i64::try_from(settings.renewal_grace_s).unwrap_or(i64::MAX / 1000));
        Self { db, clock, tls, grace, asking: Semaphore::new(ASK_AT_ONCE) }
    }

    /// The device behind a certificate; `None` when it is not known.
    pub(crate) async fn holder(&self, chain: &Chain) -> Result<Option<Principal>, Refusal> {
        let now = self.clock.now();
        let shown = chain.first().and_then(|der| Certificate::from_der(der).ok());
        let shown = shown.ok_or((Reason::NotAuthorized, "the certificate cannot be read"))?;
        if now < shown.not_before {
            return Err((Reason::NotAuthorized, "the certificate is not valid yet").into());
        }
        if now > shown.not_after + self.grace {
            return Err(EXPIRED.into());
        }
        let _turn = self.asking.acquire().await.expect("the semaphore is never closed");
        let found = self.find(&shown, chain, now).await.map_err(|error| {
            tracing::warn!(%error, "a certificate could not be looked up");
            Refusal::from((Reason::ServerUnavailable, "the database is away: try again shortly"))
        })?;
        let is_late = now > shown.not_after;
        if is_late && !found.as_ref().is_some_and(|holder| holder.proof.renew_only) {
            return Err(EXPIRED.into());
        }
        Ok(found)
    }

    async fn find(
        &self,
        shown: &Certificate,
        chain: &Chain,
        now: DateTime<Utc>,
    ) -> fleet_core::Result<Option<Principal>> {
        let mut db = self.db.acquire().await?;
        let registered = credential::registration(&mut db, shown, self.grace, now).await?;
        if now > shown.not_after || registered.as_ref().is_some_and(|registered| registered.is_signed) {
            return Ok(registered.and_then(|registered| registered.holder));
        }
        let vouched = self.vouched(&mut db, shown, chain, now).await?;
        match (registered, vouched) {
            // Who signed it for a device of his own has the word over somebody elsewhere who registered it.
            (Some(registered), Vouched::For(holder)) if registered.tenant != holder.tenant => Ok(Some(holder)),
            (Some(registered), _) => Ok(registered.holder),
            (None, Vouched::For(holder)) => Ok(Some(holder)),
            (None, Vouched::ForSeveral) => Ok(None),
            (None, Vouched::ForNobody) => {
                let is_named = self.tls.as_ref().is_some_and(|tls| tls.vouches_for(chain, now));
                if is_named { credential::of_name(&mut db, shown).await } else { Ok(None) }
            }
        }
    }

    /// For whom authorities of tenants vouch.
    async fn vouched(
        &self,
        db: &mut PgConnection,
        shown: &Certificate,
        chain: &Chain,
        now: DateTime<Utc>,
    ) -> fleet_core::Result<Vouched> {
        let Some(tls) = &self.tls else { return Ok(Vouched::ForNobody) };
        let issuers = chain.iter().take(MAX_CHAIN).filter_map(|der| Certificate::from_der(der).ok());
        let issuers: Vec<_> = issuers.map(|certificate| certificate.issuer).collect();
        let candidates = authority::vouching(db, shown, &issuers, now).await?;
        let mut holders = candidates.into_iter().filter(|one| tls.is_signed_by(&one.authority, chain, now));
        Ok(match (holders.next(), holders.next()) {
            (None, _) => Vouched::ForNobody,
            (Some(holder), None) => Vouched::For(holder.principal),
            (Some(one), Some(other)) if one.principal.who == other.principal.who => Vouched::For(one.principal),
            _ => Vouched::ForSeveral,
        })
    }
}

/// For whom authorities vouch.
enum Vouched {
    ForNobody,
    For(Principal),
    /// It names no tenant, and has an authority in several.
    ForSeveral,
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
    if holder.is_some_and(|holder| holder.proof.renew_only) {
        return Err(EXPIRED.into());
    }
    match (holder.map(|holder| &holder.who), &by_password.who) {
        (Some(Who::Device { key: one, .. }), Who::Device { key: other, .. }) if one != other => {
            Err(CONTRADICTION.into())
        }
        _ => Ok(by_password),
    }
}

const EXPIRED: (Reason, &str) = (Reason::NotAuthorized, "the certificate has expired");
const CONTRADICTION: (Reason, &str) =
    (Reason::BadUserNameOrPassword, "the certificate and the user name stand for two devices");

/// `{tenant}/{device}`
fn name(holder: &Principal) -> String {
    match &holder.who {
        Who::Device { id, .. } => format!("{}/{id}", holder.tenant_id),
        Who::User { id, .. } => id.to_string(),
        Who::Claim { id, .. } => claim::username(&holder.tenant_id, *id),
    }
}
