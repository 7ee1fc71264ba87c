//! From a device's signing request to its certificate: [`issue`] for operators, [`renew`] for the device itself.
//!
//! Holds: a device may renew from two thirds of its certificate's life on, or when an operator [allows](allow) it; the old
//! certificate stays valid for an overlap, and never more than [`credential::MAX_VALID`] are. Whoever asks again with the same
//! key gets the same certificate again, so an answer that was lost costs nothing. Once a newer certificate was used, an
//! older one renews nothing any more: whoever stole it cannot make it last. How many certificates one may bring is bounded.
//! Ignorant of: MQTT, HTTP.

use chrono::{DateTime, TimeDelta, Utc};
use serde::Deserialize;
use sqlx::PgConnection;

use crate::authority::{self, Pki, Signed};
use crate::certificate::{Certificate, Digest32, to_pem};
use crate::config;
use crate::control;
use crate::credential::{self, Credential, Kind, Locked, MAX_VALID, Registered};
use crate::csr::Csr;
use crate::error::{Error, Result};
use crate::id::{AuthorityId, CredentialId, DeviceId, DeviceKey, TenantKey};
use crate::policy::Proof;
use crate::revocation::{self, Reason};

/// A certificate that was signed for a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Issued {
    /// Its row.
    pub credential: Credential,
    /// What that says of it.
    pub registered: Registered,
    /// Itself, in PEM.
    pub pem: String,
    /// The certificates of its authority and of those above that, in PEM.
    pub chain: String,
}

/// Signs a certificate for a device, by that authority or by the newest built-in one that is enabled. To be called in a
/// transaction. Refused with [`Error::TooManyCredentials`] while [`credential::MAX_VALID`] certificates of the device are valid.
pub async fn issue(
    db: &mut PgConnection,
    pki: &Pki,
    tenant: TenantKey,
    id: &DeviceId,
    authority: Option<AuthorityId>,
    (request, lifetime_s): (&Csr, Option<u64>),
    now: DateTime<Utc>,
) -> Result<Issued> {
    let device = credential::lock_active(db, tenant, id).await?;
    if credential::valid(db, device.key, Kind::Certificate, now).await?.len() >= MAX_VALID {
        return Err(Error::TooManyCredentials(id.clone()));
    }
    let holder = (&device.tenant, id);
    let signed = authority::sign(db, pki, tenant, authority, holder, (request, lifetime_s), now).await?;
    keep(db, &device, &signed, now).await
}

async fn keep(db: &mut PgConnection, device: &Locked, signed: &Signed, now: DateTime<Utc>) -> Result<Issued> {
    let certificate = Certificate::from_der(&signed.der)?;
    let by = Some((signed.authority, Some(&signed.der[..])));
    let credential = credential::insert_certificate(db, device, &certificate, by, now).await?;
    issued(credential, &signed.der, &signed.chain)
}

fn issued(credential: Credential, der: &[u8], chain: &[Vec<u8>]) -> Result<Issued> {
    let registered = credential.certificate.clone();
    let registered = registered.ok_or_else(|| Error::Internal("a certificate that is none".into()))?;
    let (pem, chain) = (to_pem("CERTIFICATE", der), chain.iter().map(|der| to_pem("CERTIFICATE", der)).collect());
    Ok(Issued { credential, registered, pem, chain })
}

/// Lets a device renew this certificate at once, and as often as any.
pub async fn allow(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: &DeviceId,
    credential: CredentialId,
    now: DateTime<Utc>,
) -> Result<()> {
    let device = credential::lock(db, tenant, id).await?;
    let allowed = sqlx::query!(
        "
        update credential
           set renew_after = least(renew_after, $3), renewals = 0
         where id = $1 and device_key = $2 and fingerprint is not null
        ",
        credential.uuid(),
        device.key.0,
        now
    );
    let allowed = allowed.execute(db).await?;
    if allowed.rows_affected() == 0 { Err(Error::NoSuchCredential(credential)) } else { Ok(()) }
}

// Renewal

/// What a device sends to have its certificate renewed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request(Csr);

#[derive(Deserialize)]
struct Payload {
    csr: String,
}

impl Request {
    /// Reads `{"csr": "-----BEGIN CERTIFICATE REQUEST-----…"}`; what else is in it is read past.
    ///
    /// # Errors
    /// What the device is told.
    pub fn decode(payload: &[u8], max_csr_bytes: usize) -> Result<Self, Rejection> {
        let bad = |message: String| Rejection::new(Code::BadRequest, message);
        let payload: Payload =
            serde_json::from_slice(payload).map_err(|e| bad(format!("expected {{\"csr\": \"…\"}}: {e}")))?;
        Csr::from_pem(&payload.csr, max_csr_bytes).map(Self).map_err(|e| bad(format!("csr: {e}")))
    }
}

/// Why a device gets no certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// For the device.
    pub code: Code,
    /// For people.
    pub message: String,
    /// From then on the same request would be accepted.
    pub renew_after: Option<DateTime<Utc>>,
}

/// The kinds of rejections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// The request cannot be read, or its key is not taken.
    BadRequest,
    /// The certificate has not reached two thirds of its life.
    TooEarly,
    /// A newer certificate is in use.
    Superseded,
    /// One certificate has brought as many as it may.
    TooMany,
    /// The device has no certificate, and may not get its first one this way; or no longer may renew it.
    NotAllowed,
    /// There is no authority to sign it.
    NoAuthority,
    /// The server failed; its log says why.
    Internal,
}

impl Code {
    /// Every code there is.
    pub const ALL: [Self; 7] = [
        Self::BadRequest,
        Self::TooEarly,
        Self::Superseded,
        Self::TooMany,
        Self::NotAllowed,
        Self::NoAuthority,
        Self::Internal,
    ];

    /// As devices are told.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad-request",
            Self::TooEarly => "too-early",
            Self::Superseded => "superseded",
            Self::TooMany => "too-many",
            Self::NotAllowed => "not-allowed",
            Self::NoAuthority => "no-authority",
            Self::Internal => "internal",
        }
    }
}

impl Rejection {
    /// With a code, and a sentence.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into(), renew_after: None }
    }
}

/// What becomes of a device's request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Renewal {
    /// A new certificate.
    Issued(Box<Issued>),
    /// The one that was signed for the same key before.
    Repeated(Box<Issued>),
    /// None.
    Rejected(Rejection),
}

/// A certificate of the device, as far as it matters here.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    id: CredentialId,
    is_certificate: bool,
    is_valid: bool,
    is_revoked: bool,
    /// The digest of its key, when it was signed here.
    our_key: Option<Vec<u8>>,
    renew_after: Option<DateTime<Utc>>,
    renewals: i16,
    first_used_at: Option<DateTime<Utc>>,
    authority: Option<AuthorityId>,
}

/// What is to be done about a request.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Decision {
    /// To give this one out again.
    Repeat(CredentialId),
    /// To sign a new one: the first of these is then valid for an overlap, and the others end.
    Sign {
        current: Option<CredentialId>,
        ended: Vec<CredentialId>,
    },
    Reject(Rejection),
}

/// Renews the certificate by which a device came in. To be called in a transaction; what is to be committed is then in it,
/// whatever becomes of the request.
pub async fn renew(
    db: &mut PgConnection,
    pki: &Pki,
    (tenant, id): (TenantKey, &DeviceId),
    proof: &Proof,
    Request(csr): &Request,
    now: DateTime<Utc>,
) -> Result<Renewal> {
    let device = match credential::lock(db, tenant, id).await {
        Err(Error::NoSuchDevice(_)) => {
            return Ok(Renewal::Rejected(Rejection::new(Code::NotAllowed, "the device does not exist any more")));
        }
        locked => locked?,
    };
    let held = held(db, device.key, proof, now).await?;
    match decide(&held, proof, &csr.key_digest(), &pki.settings, now) {
        Decision::Reject(rejection) => Ok(Renewal::Rejected(rejection)),
        Decision::Repeat(credential) => Ok(Renewal::Repeated(Box::new(again(db, tenant, id, credential).await?))),
        Decision::Sign { current, ended } => {
            let holder = (&device.tenant, id);
            let signed = match authority::sign(db, pki, tenant, None, holder, (csr, None), now).await {
                Err(Error::CannotSign(why)) => return Ok(Renewal::Rejected(Rejection::new(Code::NoAuthority, why))),
                Err(Error::Invalid(why)) => return Ok(Renewal::Rejected(Rejection::new(Code::BadRequest, why))),
                signed => signed?,
            };
            let old = held.iter().filter(|one| Some(one.id) == current || ended.contains(&one.id));
            let authorities = old.filter_map(|one| one.authority).collect::<Vec<_>>();
            make_way(db, &pki.settings, current, &ended, now).await?;
            revocation::renew_by(db, &authorities, now).await?;
            let issued = keep(db, &device, &signed, now).await?;
            control::bump(db).await?;
            Ok(Renewal::Issued(Box::new(issued)))
        }
    }
}

/// The valid certificates of a device, and what it came in by, oldest first.
async fn held(db: &mut PgConnection, device: DeviceKey, proof: &Proof, now: DateTime<Utc>) -> Result<Vec<Held>> {
    let held = sqlx::query_as!(
        Held,
        r#"
        select id as "id: CredentialId", fingerprint is not null as "is_certificate!", revoked_at is not null as "is_revoked!",
               revoked_at is null and (expires_at is null or expires_at > $3) as "is_valid!",
               case when der is not null then public_key_digest end as our_key, renew_after, renewals, first_used_at,
               authority_id as "authority: AuthorityId"
          from credential
         where device_key = $1
           and (id = $2 or fingerprint is not null and revoked_at is null and expires_at > $3)
         order by created_at, id
        "#,
        device.0,
        proof.credential.map(CredentialId::uuid),
        now
    );
    Ok(held.fetch_all(db).await?)
}

fn decide(
    held: &[Held],
    proof: &Proof,
    key: &Digest32,
    settings: &config::Certificates,
    now: DateTime<Utc>,
) -> Decision {
    let reject = |code, message: &str| Decision::Reject(Rejection::new(code, message));
    let shown = proof.credential.map(|id| held.iter().position(|one| one.id == id));
    let shown = match shown {
        Some(None) => return reject(Code::NotAllowed, "the credential was revoked"),
        Some(Some(place)) if held[place].is_revoked => return reject(Code::NotAllowed, "the credential was revoked"),
        Some(place) => place.filter(|place| held[*place].is_certificate),
        None => None,
    };
    let valid = || held.iter().filter(|one| one.is_certificate && one.is_valid);
    let is_due = |one: &Held| one.renew_after.is_none_or(|at| at <= now);
    let is_same = |one: &&Held| !is_due(one) && one.our_key.as_deref() == Some(&key[..]);
    if let Some(same) = valid().rfind(is_same) {
        return Decision::Repeat(same.id);
    }
    let current = match shown {
        Some(place) if held[place + 1..].iter().any(|newer| newer.is_valid && newer.first_used_at.is_some()) => {
            return reject(Code::Superseded, "a newer certificate is in use: ask with that one");
        }
        Some(place) => Some(&held[place]),
        None if !settings.first_by_token => {
            return reject(Code::NotAllowed, "a first certificate is given by operators only");
        }
        None => valid().next_back(),
    };
    if let Some(current) = current.filter(|current| !is_due(current)) {
        let message = "two thirds of the certificate's life have not passed";
        let rejection = Rejection { renew_after: current.renew_after, ..Rejection::new(Code::TooEarly, message) };
        return Decision::Reject(rejection);
    }
    if current.is_some_and(|current| current.renewals.unsigned_abs() >= settings.max_renewals) {
        return reject(Code::TooMany, "this certificate was renewed as often as it may: an operator can allow more");
    }
    let current = current.map(|current| current.id);
    let ended = valid().map(|one| one.id).filter(|id| Some(*id) != current).collect();
    Decision::Sign { current, ended }
}

/// Ends what the new certificate replaces.
async fn make_way(
    db: &mut PgConnection,
    settings: &config::Certificates,
    current: Option<CredentialId>,
    ended: &[CredentialId],
    now: DateTime<Utc>,
) -> Result<()> {
    let overlap = TimeDelta::seconds(i64::try_from(settings.renewal_overlap_s).unwrap_or(i64::MAX / 1000));
    sqlx::query!(
        "update credential set renewals = renewals + 1, expires_at = least(expires_at, $2) where id = $1",
        current.map(CredentialId::uuid),
        now + overlap
    )
    .execute(&mut *db)
    .await?;
    let ended = ended.iter().map(|id| id.uuid()).collect::<Vec<_>>();
    sqlx::query!(
        "update credential set revoked_at = $2, revocation_reason = $3 where id = any($1)",
        &ended,
        now,
        Reason::Superseded.name()
    )
    .execute(db)
    .await?;
    Ok(())
}

/// A certificate that was signed here, once more.
async fn again(db: &mut PgConnection, tenant: TenantKey, id: &DeviceId, credential: CredentialId) -> Result<Issued> {
    let row = sqlx::query!(
        r#"
        select c.der as "der!", array_prepend(a.certificate, a.chain) as "chain!"
          from credential c
          join authority a on a.id = c.authority_id
         where c.id = $1 and c.der is not null
        "#,
        credential.uuid()
    );
    let row = row.fetch_optional(&mut *db).await?.ok_or(Error::NoSuchCredential(credential))?;
    let listed = credential::list(db, tenant, id).await?;
    let found = listed.into_iter().find(|one| one.id == credential).ok_or(Error::NoSuchCredential(credential))?;
    issued(found, &row.der, &row.chain)
}

#[cfg(test)]
mod tests;
