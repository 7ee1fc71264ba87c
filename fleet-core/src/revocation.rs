//! Revocation: certificates that were taken back before their end, and the lists that say so (RFC 5280 §5).
//!
//! [`list`] gives the signed list of a built-in authority, [`upload`] takes one of a registered authority.
//! Holds: what counts for the doors is the rows, at once; lists are for others. A list of ours has everything that was taken back and
//! would still be valid. Ignorant of: MQTT, HTTP.

use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{ParsedExtension, X509Extension};
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::{CertificateRevocationList, RevokedCertificate};
use x509_parser::x509::ReasonCode;

use crate::authority::{self, Authority, Kind, Pki, Signer};
use crate::certificate::{Serial, instant, only_block};
use crate::control;
use crate::csr::check_hash;
use crate::error::{Error, Result};
use crate::id::{AuthorityId, DeviceKey, TenantKey};

/// How far a list may be ahead of our clock.
const EARLY: TimeDelta = TimeDelta::hours(1);

/// Why a certificate was taken back (RFC 5280 §5.3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reason {
    /// It was not said.
    #[default]
    Unspecified,
    /// Somebody else may have the key.
    KeyCompromise,
    /// The device is another one's now.
    AffiliationChanged,
    /// There is a newer one.
    Superseded,
    /// The device, or the authority, is gone.
    CessationOfOperation,
    /// The device may no longer do what the certificate was for.
    PrivilegeWithdrawn,
}

impl Reason {
    /// Every reason there is.
    pub const ALL: [Self; 6] = [
        Self::Unspecified,
        Self::KeyCompromise,
        Self::AffiliationChanged,
        Self::Superseded,
        Self::CessationOfOperation,
        Self::PrivilegeWithdrawn,
    ];

    /// As it is spelled.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unspecified => "unspecified",
            Self::KeyCompromise => "key-compromise",
            Self::AffiliationChanged => "affiliation-changed",
            Self::Superseded => "superseded",
            Self::CessationOfOperation => "cessation-of-operation",
            Self::PrivilegeWithdrawn => "privilege-withdrawn",
        }
    }

    /// The reason of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|reason| reason.name() == name)
    }
}

impl From<Reason> for rcgen::RevocationReason {
    fn from(reason: Reason) -> Self {
        match reason {
            Reason::Unspecified => Self::Unspecified,
            Reason::KeyCompromise => Self::KeyCompromise,
            Reason::AffiliationChanged => Self::AffiliationChanged,
            Reason::Superseded => Self::Superseded,
            Reason::CessationOfOperation => Self::CessationOfOperation,
            Reason::PrivilegeWithdrawn => Self::PrivilegeWithdrawn,
        }
    }
}

/// An entry of a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Revoked {
    pub(crate) serial: Serial,
    pub(crate) at: DateTime<Utc>,
    pub(crate) reason: Reason,
}

/// Has the revocation lists of these authorities made anew when they are asked for at `at` or later.
pub(crate) async fn renew_by(db: &mut PgConnection, authorities: &[AuthorityId], at: DateTime<Utc>) -> Result<()> {
    let ids = authorities.iter().map(|id| id.uuid()).collect::<Vec<_>>();
    if !ids.is_empty() {
        sqlx::query!(
            "update revocation_list set renew_at = $2 where authority_id = any($1) and renew_at > $2",
            &ids,
            at
        )
        .execute(db)
        .await?;
    }
    Ok(())
}

/// Keeps what lists must say of the certificates of a device that is about to be deleted.
pub(crate) async fn outlive(db: &mut PgConnection, device: DeviceKey, now: DateTime<Utc>) -> Result<()> {
    let gone = sqlx::query_scalar!(
        r#"
        with gone as (
            insert into revoked_certificate (authority_id, serial, revoked_at, reason, not_after)
            select a.id, c.serial, coalesce(c.revoked_at, least(c.expires_at, $2)),
                   coalesce(c.revocation_reason, 'cessation-of-operation'), c.not_after
              from credential c
              join authority a on a.id = c.authority_id and a.sealed_key is not null
             where c.device_key = $1 and c.serial is not null and c.not_after > $2
         on conflict do nothing
         returning authority_id)
        select distinct authority_id as "authority!: AuthorityId" from gone
        "#,
        device.0,
        now
    );
    let authorities: Vec<AuthorityId> = gone.fetch_all(&mut *db).await?;
    renew_by(db, &authorities, now).await
}

/// A revocation list as it is given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct List {
    /// Itself.
    pub der: Vec<u8>,
    /// Higher than those of all earlier ones.
    pub number: Serial,
    /// When there will be another one at the latest.
    pub next_update: DateTime<Utc>,
}

struct ListRow {
    certificate: Vec<u8>,
    sealed_key: Option<Vec<u8>>,
    der: Option<Vec<u8>>,
    number: Option<Vec<u8>>,
    next_update: Option<DateTime<Utc>>,
    renew_at: Option<DateTime<Utc>>,
}

impl ListRow {
    /// The list that was made or uploaded, unless one of ours is due.
    fn current(&self, now: DateTime<Utc>) -> Option<List> {
        let is_due = self.sealed_key.is_some() && self.renew_at.is_none_or(|at| at <= now);
        let (der, next_update) = self.der.clone().zip(self.next_update).filter(|_| !is_due)?;
        Some(List { der, number: self.number(), next_update })
    }

    fn number(&self) -> Serial {
        self.number.as_deref().and_then(Serial::read).unwrap_or_default()
    }
}

/// The newest revocation list of an authority, whoever asks; one of ours is signed when it is due, which it is at most once for
/// each thing that was revoked. To be called in a transaction.
pub async fn list(db: &mut PgConnection, pki: &Pki, id: AuthorityId, now: DateTime<Utc>) -> Result<List> {
    if let Some(current) = list_row(db, id).await?.current(now) {
        return Ok(current);
    }
    // Of several who find it due one makes it.
    sqlx::query!("select id from authority where id = $1 for no key update", id.uuid())
        .fetch_optional(&mut *db)
        .await?;
    let row = list_row(db, id).await?;
    if let Some(current) = row.current(now) {
        return Ok(current);
    }
    if row.sealed_key.is_none() {
        return Err(Error::NoRevocationList(id));
    }
    let signer = authority::open_signer(pki, id, &row.certificate, row.sealed_key.as_deref())?;
    make(db, pki, id, (&signer, row.number()), now).await
}

async fn list_row(db: &mut PgConnection, id: AuthorityId) -> Result<ListRow> {
    let row = sqlx::query_as!(
        ListRow,
        r#"
        select a.certificate, a.sealed_key, l.der as "der?", l.number as "number?", l.next_update as "next_update?",
               l.renew_at
          from authority a
          left join revocation_list l on l.authority_id = a.id
         where a.id = $1
        "#,
        id.uuid()
    );
    row.fetch_optional(db).await?.ok_or(Error::NoSuchAuthority(id))
}

async fn make(
    db: &mut PgConnection,
    pki: &Pki,
    id: AuthorityId,
    (signer, before): (&Signer, Serial),
    now: DateTime<Utc>,
) -> Result<List> {
    let lifetime = TimeDelta::seconds(i64::try_from(pki.settings.crl_lifetime_s).unwrap_or(i64::MAX / 1000));
    let number = before.next().ok_or_else(|| Error::Internal("revocation lists are numbered up to the end".into()))?;
    // One that has just expired stays on one more list (RFC 5280 §3.3).
    let revoked = entries(db, id, now - lifetime, now).await?;
    let next_update = now + lifetime;
    let der = signer.revocation_list(number, &revoked, now, next_update)?;
    let renew_at = next_to_end(db, id, now).await?.unwrap_or(next_update).min(now + lifetime / 2);
    let list = List { der, number, next_update };
    put(db, id, &list, Some(renew_at)).await?;
    Ok(list)
}

async fn put(db: &mut PgConnection, id: AuthorityId, list: &List, renew_at: Option<DateTime<Utc>>) -> Result<()> {
    sqlx::query!(
        "
        insert into revocation_list (authority_id, der, number, next_update, renew_at)
        values ($1, $2, $3, $4, $5)
            on conflict (authority_id) do update
           set der = excluded.der, number = excluded.number, next_update = excluded.next_update,
               renew_at = excluded.renew_at
        ",
        id.uuid(),
        list.der,
        list.number.as_bytes(),
        list.next_update,
        renew_at
    )
    .execute(db)
    .await?;
    Ok(())
}

/// What was taken back, or ended early because there is a newer one, and would be valid at `still_at`.
async fn entries(
    db: &mut PgConnection,
    id: AuthorityId,
    still_at: DateTime<Utc>,
    now: DateTime<Utc>,
) -> Result<Vec<Revoked>> {
    let rows = sqlx::query!(
        r#"
        select serial as "serial!", coalesce(revoked_at, expires_at) as "at!",
               coalesce(revocation_reason, 'superseded') as "reason!"
          from credential
         where authority_id = $1 and serial is not null and not_after > $2
           and (revoked_at is not null or expires_at <= $3 and expires_at < not_after)
         union all
        select serial, revoked_at, reason
          from revoked_certificate
         where authority_id = $1 and (not_after is null or not_after > $2)
         order by 1
        "#,
        id.uuid(),
        still_at,
        now
    )
    .fetch_all(db)
    .await?;
    let revoked = rows.into_iter().filter_map(|row| {
        let reason = Reason::named(&row.reason).unwrap_or_default();
        Some(Revoked { serial: Serial::read(&row.serial)?, at: row.at, reason })
    });
    Ok(revoked.collect())
}

/// When the next certificate ends before its time.
async fn next_to_end(db: &mut PgConnection, id: AuthorityId, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>> {
    let next = sqlx::query_scalar!(
        "
        select min(expires_at)
          from credential
         where authority_id = $1 and revoked_at is null and expires_at > $2 and expires_at < not_after
        ",
        id.uuid(),
        now
    );
    Ok(next.fetch_one(db).await?)
}

/// Takes a revocation list of a registered authority: what is on it is refused from now on, and open connections end. It must be
/// signed by the authority, be whole and in force, and have a number not below that of the one before. Answers what the authority
/// was, and what it is. To be called in a transaction.
pub async fn upload(
    db: &mut PgConnection,
    pki: &Pki,
    tenant: TenantKey,
    id: AuthorityId,
    pem: &str,
    now: DateTime<Utc>,
) -> Result<(Authority, Authority)> {
    let authority = authority::locked(db, tenant, id, &[]).await?;
    if authority.kind == Kind::BuiltIn {
        return Err(Error::CannotSign(format!("authority {id} is built in: its revocation list is made here")));
    }
    let der = only_block(pem, &["X509 CRL"], "revocation list")?;
    let given = Given::read(&der, &authority.certificate.der, pki.settings.max_crl_entries, now)?;
    if let Some(known) = authority.crl_number.filter(|known| given.number < *known) {
        return Err(Error::OldRevocationList { found: given.number.to_string(), known: known.to_string() });
    }
    replace(db, id, &given.revoked).await?;
    put(db, id, &List { der, number: given.number, next_update: given.next_update }, None).await?;
    sqlx::query!("update authority set version = version + 1, updated_at = $2 where id = $1", id.uuid(), now)
        .execute(&mut *db)
        .await?;
    control::bump(db).await?;
    let new = authority::find(db, tenant, id).await?;
    Ok((authority, new))
}

async fn replace(db: &mut PgConnection, id: AuthorityId, revoked: &[Revoked]) -> Result<()> {
    sqlx::query!("delete from revoked_certificate where authority_id = $1", id.uuid()).execute(&mut *db).await?;
    let serials = revoked.iter().map(|one| one.serial.as_bytes().to_vec()).collect::<Vec<_>>();
    let times = revoked.iter().map(|one| one.at).collect::<Vec<_>>();
    let reasons = revoked.iter().map(|one| one.reason.name().to_owned()).collect::<Vec<_>>();
    sqlx::query!(
        "
        insert into revoked_certificate (authority_id, serial, revoked_at, reason)
        select $1, u.serial, u.revoked_at, u.reason
          from unnest($2::bytea[], $3::timestamptz[], $4::text[]) as u (serial, revoked_at, reason)
   on conflict do nothing
        ",
        id.uuid(),
        &serials,
        &times,
        &reasons
    )
    .execute(db)
    .await?;
    Ok(())
}

/// What a list that was given says.
#[derive(Debug)]
struct Given {
    number: Serial,
    next_update: DateTime<Utc>,
    revoked: Vec<Revoked>,
}

impl Given {
    fn read(der: &[u8], authority: &[u8], most: usize, now: DateTime<Utc>) -> Result<Self> {
        let invalid = |text: &str| Error::Invalid(text.into());
        let broken = || invalid("not a revocation list (X.509)");
        let (rest, list) = CertificateRevocationList::from_der(der).map_err(|_| broken())?;
        let (_, authority) = X509Certificate::from_der(authority).map_err(|_| broken())?;
        if !rest.is_empty() {
            return Err(broken());
        }
        check_hash(&list.signature_algorithm)?;
        if list.issuer().as_raw() != authority.subject().as_raw()
            || list.verify_signature(authority.public_key()).is_err()
        {
            return Err(invalid("the revocation list is not signed by this authority"));
        }
        if !list.extensions().iter().all(is_whole) {
            return Err(invalid(
                "a part of a revocation list: expected one of all the authority's certificates and reasons",
            ));
        }
        let number = list.crl_number().and_then(|number| Serial::read(&number.to_bytes_be()));
        let number =
            number.ok_or_else(|| invalid("the revocation list has no number: expected one (RFC 5280 §5.2.3)"))?;
        let next_update = list.next_update().map(instant).transpose()?.filter(|next| *next > now);
        let next_update =
            next_update.ok_or_else(|| invalid("the revocation list has expired, or says not when it does"))?;
        if instant(list.last_update())? > now + EARLY {
            return Err(invalid("the revocation list is not valid yet"));
        }
        if list.iter_revoked_certificates().count() > most {
            return Err(Error::TooMany { what: "entries in the revocation list", most });
        }
        let revoked = list.iter_revoked_certificates().map(read_entry).collect::<Result<Vec<_>>>()?;
        Ok(Self { number, next_update, revoked })
    }
}

/// Whether an extension leaves the list what it must be: of all certificates of the authority, for all reasons. One that is critical
/// and not known does not.
fn is_whole(extension: &X509Extension<'_>) -> bool {
    match extension.parsed_extension() {
        ParsedExtension::IssuingDistributionPoint(point) => {
            !(point.only_contains_ca_certs
                || point.only_contains_attribute_certs
                || point.indirect_crl
                || point.only_some_reasons.is_some())
        }
        ParsedExtension::CRLNumber(_) | ParsedExtension::AuthorityKeyIdentifier(_) => true,
        _ => !extension.critical,
    }
}

fn read_entry(entry: &RevokedCertificate<'_>) -> Result<Revoked> {
    if entry.extensions().iter().any(|extension| extension.critical) {
        return Err(Error::Invalid(
            "an entry of the revocation list says something critical that is not known here".into(),
        ));
    }
    let serial = Serial::read(entry.raw_serial());
    let serial = serial.ok_or_else(|| Error::Invalid("a serial number of more than 20 bytes".into()))?;
    let code = entry.reason_code().map(|(_, code)| code);
    Ok(Revoked { serial, at: instant(entry.revocation_date)?, reason: code.map(Reason::from).unwrap_or_default() })
}

impl From<ReasonCode> for Reason {
    fn from(code: ReasonCode) -> Self {
        match code {
            ReasonCode::KeyCompromise | ReasonCode::CACompromise | ReasonCode::AACompromise => Self::KeyCompromise,
            ReasonCode::AffiliationChanged => Self::AffiliationChanged,
            ReasonCode::Superseded => Self::Superseded,
            ReasonCode::CessationOfOperation => Self::CessationOfOperation,
            ReasonCode::PrivilegeWithdrawn => Self::PrivilegeWithdrawn,
            // A certificate that is on hold is refused for as long as it is on the list.
            _ => Self::Unspecified,
        }
    }
}

#[cfg(test)]
mod tests;
