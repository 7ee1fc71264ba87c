//! Credentials: tokens and certificates by which devices prove who they are.
//!
//! A token enters the world by [`issue`] or [`rotate`] and is asked about by [`verify`] and [`verify_many`]; a certificate is
//! signed by an authority of ours ([`crate::issuing`]) or made elsewhere, when it enters by [`register`]; it is asked about by
//! [`registration`]. Both end by [`revoke`], by their expiry or with their device. Holds: the secret itself is never stored, only its SHA-256 (256 random bits need no slow hash); at most
//! [`MAX_VALID`] of a kind and a device are valid at once; whoever issues holds the device's row lock, so two callers cannot
//! both be the second; a revoked certificate stays refused for as long as it would be valid. Ignorant of: MQTT, HTTP.

#[cfg(test)]
mod tests;

use std::collections::HashMap;

use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use futures::TryStreamExt;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use subtle::ConstantTimeEq;

use crate::authority;
use crate::certificate::{Certificate, Fingerprint, Serial};
use crate::config::Secret;
use crate::control;
use crate::error::{Error, OrOn, Result};
use crate::gateway;
use crate::id::{AuthorityId, CredentialId, DeviceId, DeviceKey, TenantId, TenantKey};
use crate::policy::{Principal, Proof, Who};
use crate::revocation::{self, Reason};

/// Credentials of one kind and device that may be valid at once: the one in use and the one that replaces it.
pub const MAX_VALID: usize = 2;
/// Ended credentials that are remembered for a device; the oldest are forgotten first.
pub const MAX_ENDED: usize = 20;
/// Longest overlap of a rotation: a year, in seconds.
pub const MAX_OVERLAP_S: u64 = 366 * 86_400;

/// A device may ask for its next certificate when this part of the life of the current one has passed.
const RENEW_AT: (i32, i32) = (2, 3);

const SECRET_BYTES: usize = 32;

/// A credential without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credential {
    /// Names it.
    pub id: CredentialId,
    /// When it was issued.
    pub created_at: DateTime<Utc>,
    /// It is refused from then on.
    pub expires_at: Option<DateTime<Utc>>,
    /// When somebody ended it.
    pub revoked_at: Option<DateTime<Utc>>,
    /// What it is, when it is no token.
    pub certificate: Option<Registered>,
}

/// What is kept of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registered {
    /// Tells it from every other.
    pub fingerprint: Fingerprint,
    /// Its subject, for people.
    pub subject: String,
    /// It is not valid after.
    pub not_after: DateTime<Utc>,
    /// Its device may ask for the next one from then on.
    pub renew_after: Option<DateTime<Utc>>,
    /// The authority that signed it, when that is one of the tenant's.
    pub authority: Option<AuthorityId>,
    /// Its number with that authority.
    pub serial: Option<Serial>,
    /// When a client first came in by it.
    pub first_used_at: Option<DateTime<Utc>>,
}

/// The kinds of credentials, each with a number of its own that may be valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Token,
    Certificate,
}

impl Credential {
    /// Whether it opens the door at `now`, provided that its device is not disabled.
    pub fn is_valid(&self, now: DateTime<Utc>) -> bool {
        self.revoked_at.is_none() && self.expires_at.is_none_or(|at| at > now)
    }
}

/// A credential at the only moment its secret is known.
#[derive(Debug, Clone)]
pub struct Issued {
    /// Names it.
    pub id: CredentialId,
    /// `{tenant}/{device}`
    pub username: String,
    /// 32 random bytes in base64url without padding.
    pub password: Secret,
    /// When it was issued.
    pub created_at: DateTime<Utc>,
    /// It is refused from then on.
    pub expires_at: Option<DateTime<Utc>>,
}

/// A user name and a secret that somebody shows.
#[derive(Debug, Clone, Copy)]
pub struct Offer<'a> {
    /// `{tenant}/{device}`, when it is well formed.
    pub username: &'a str,
    /// The secret.
    pub secret: &'a [u8],
}

/// As [`verify_many`], for one.
pub async fn verify(
    db: &mut PgConnection,
    username: &str,
    secret: &[u8],
    now: DateTime<Utc>,
) -> Result<Option<Principal>> {
    Ok(verify_many(db, &[Offer { username, secret }], now).await?.pop().flatten())
}

/// Who stands behind each of these, in their order and by one statement: the device, when the secret is one of its valid
/// ones at `now` and the device is not disabled. Everything else, a malformed name included, is `None`.
pub async fn verify_many(
    db: &mut PgConnection,
    offers: &[Offer<'_>],
    now: DateTime<Utc>,
) -> Result<Vec<Option<Principal>>> {
    let names: Vec<_> = offers.iter().map(|offer| parse_username(offer.username)).collect();
    let (mut places, mut tenants, mut devices) = (Vec::new(), Vec::new(), Vec::new());
    for (place, (tenant, device)) in (0_i32..).zip(&names).filter_map(|(place, name)| Some((place, name.as_ref()?))) {
        places.push(place);
        tenants.push(tenant.as_str().to_owned());
        devices.push(device.as_str().to_owned());
    }
    if places.is_empty() {
        return Ok(vec![None; offers.len()]);
    }
    // "offset 0" makes each a look-up in an index, whatever the planner believes of the tables: before their first ANALYZE
    // it would read them whole.
    let stored = sqlx::query!(
        r#"
        select asked.place as "place!", t.key as "tenant: TenantKey", d.key as "device: DeviceKey",
               c.id as "credential: CredentialId", c.secret_hash as "secret_hash!", c.expires_at,
               exists (select from device where gateway_key = d.key) as "is_gateway!"
          from unnest($1::int[], $2::text[], $3::text[]) as asked (place, tenant, device)
          join tenant t on t.id = asked.tenant
         cross join lateral (select key, disabled from device
                              where tenant_key = t.key and id = asked.device offset 0) d
         cross join lateral (select id, secret_hash, expires_at, revoked_at from credential
                              where device_key = d.key offset 0) c
         where not d.disabled and c.revoked_at is null and c.secret_hash is not null
           and (c.expires_at is null or c.expires_at > $4)
        "#,
        &places,
        &tenants,
        &devices,
        now
    )
    .fetch_all(&mut *db)
    .await?;
    let offered: Vec<_> = offers.iter().map(|offer| Sha256::digest(offer.secret)).collect();
    // All are compared, so that the time taken does not tell which of them matched.
    let mut matched = Vec::new();
    matched.resize_with(offers.len(), || None);
    for row in stored {
        let place = usize::try_from(row.place).expect("a place in the list");
        if bool::from(row.secret_hash.ct_eq(offered[place].as_slice())) {
            matched[place] = Some(row);
        }
    }
    let gateways = matched.iter().flatten().filter(|row| row.is_gateway).map(|row| row.device).collect::<Vec<_>>();
    let families = if gateways.is_empty() { HashMap::new() } else { gateway::children_of(db, &gateways).await? };
    let principals = matched.into_iter().zip(names).map(|(row, name)| {
        let (row, (tenant_id, id)) = (row?, name?);
        // A copy: another client of the same device may be in the list.
        let children = families.get(&row.device).cloned().unwrap_or_default();
        Some(Principal {
            tenant: row.tenant,
            tenant_id,
            who: Who::Device { key: row.device, id, children },
            proof: Proof { credential: Some(row.credential), valid_until: row.expires_at, ..Proof::default() },
        })
    });
    Ok(principals.collect())
}

/// What is registered of a certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registration {
    /// In which tenant.
    pub tenant: TenantKey,
    /// Whether an authority of that tenant signed it.
    pub is_signed: bool,
    /// Its device, while it opens the door; one that has expired since less than the grace opens it to be renewed.
    pub holder: Option<Principal>,
}

/// What is registered of a certificate whose key was shown to be held; `None` when it never was. Neither its device nor its
/// authority must be disabled, nor must it have been revoked, by whom ever.
pub async fn registration(
    db: &mut PgConnection,
    shown: &Certificate,
    grace: TimeDelta,
    now: DateTime<Utc>,
) -> Result<Option<Registration>> {
    let row = sqlx::query!(
        r#"
        select t.key as "tenant: TenantKey", t.id as "tenant_id: TenantId", d.key as "device: DeviceKey",
               d.id as "device_id: DeviceId", c.id as "credential: CredentialId", c.expires_at, c.first_used_at,
               c.authority_id is not null as "is_signed!",
               c.revoked_at is null and not d.disabled and not coalesce(a.disabled, false)
               and not exists (select from revoked_certificate r
                                where r.authority_id = c.authority_id and r.serial = c.serial) as "stands!",
               c.expires_at > $2 as "in_time!",
               c.expires_at = c.not_after and c.not_after > $3 as "in_grace!"
          from credential c
          join device d on d.key = c.device_key
          join tenant t on t.key = d.tenant_key
          left join authority a on a.id = c.authority_id
         where c.fingerprint = $1
         order by c.revoked_at is null desc, c.created_at desc
         limit 1
        "#,
        shown.fingerprint.as_bytes(),
        now,
        now - grace
    );
    let Some(row) = row.fetch_optional(&mut *db).await? else { return Ok(None) };
    let (tenant, is_signed) = (row.tenant, row.is_signed);
    let proof = match (row.stands, row.in_time, row.in_grace) {
        (true, true, _) => Proof { valid_until: row.expires_at, ..Proof::default() },
        (true, false, true) => {
            Proof { valid_until: Some(shown.not_after + grace), renew_only: true, ..Proof::default() }
        }
        _ => return Ok(Some(Registration { tenant, is_signed, holder: None })),
    };
    if row.first_used_at.is_none() {
        let id = row.credential.uuid();
        sqlx::query!("update credential set first_used_at = $2 where id = $1 and first_used_at is null", id, now)
            .execute(&mut *db)
            .await?;
    }
    let proof = Proof { credential: Some(row.credential), ..proof };
    let children = gateway::children(db, row.device).await?;
    let who = Who::Device { key: row.device, id: row.device_id, children };
    let holder = Some(Principal { tenant, tenant_id: row.tenant_id, who, proof });
    Ok(Some(Registration { tenant, is_signed, holder }))
}

/// The device that a certificate is made out to, for those for whom somebody vouches in every tenant.
pub async fn of_name(db: &mut PgConnection, shown: &Certificate) -> Result<Option<Principal>> {
    let Some((tenant_id, id)) = shown.device() else { return Ok(None) };
    let row = sqlx::query!(
        r#"
        select t.key as "tenant: TenantKey", d.key as "device: DeviceKey"
          from tenant t
          join device d on d.tenant_key = t.key and d.id = $2 and not d.disabled
         where t.id = $1
        "#,
        tenant_id.as_str(),
        id.as_str()
    )
    .fetch_optional(&mut *db)
    .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Principal {
        tenant: row.tenant,
        tenant_id,
        who: Who::Device { key: row.device, id, children: gateway::children(db, row.device).await? },
        proof: Proof { valid_until: Some(shown.not_after), ..Proof::default() },
    }))
}

/// Splits `{tenant}/{device}`.
fn parse_username(username: &str) -> Option<(TenantId, DeviceId)> {
    let (tenant, device) = username.split_once('/')?;
    Some((tenant.parse().ok()?, device.parse().ok()?))
}

/// Gives a device a further credential that does not expire. To be called in a transaction: the device's row stays locked
/// until its end. Refused with [`Error::TooManyCredentials`] while [`MAX_VALID`] are valid.
pub async fn issue(db: &mut PgConnection, tenant: TenantKey, id: &DeviceId, now: DateTime<Utc>) -> Result<Issued> {
    let device = lock_active(db, tenant, id).await?;
    if valid(db, device.key, Kind::Token, now).await?.len() >= MAX_VALID {
        return Err(Error::TooManyCredentials(id.clone()));
    }
    insert(db, &device, id, now).await
}

/// Takes a certificate as a credential of a device, for as long as it is valid. To be called in a transaction. Refused with
/// [`Error::TooManyCredentials`] while [`MAX_VALID`] certificates of the device are valid, with [`Error::CertificateTaken`]
/// while any device has this one.
pub async fn register(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: &DeviceId,
    certificate: &Certificate,
    now: DateTime<Utc>,
) -> Result<Credential> {
    if certificate.not_after <= now {
        return Err(Error::Invalid(format!("the certificate has expired at {}", certificate.not_after)));
    }
    let device = lock_active(db, tenant, id).await?;
    if valid(db, device.key, Kind::Certificate, now).await?.len() >= MAX_VALID {
        return Err(Error::TooManyCredentials(id.clone()));
    }
    let signed_by = authority::of_certificate(db, tenant, certificate).await?;
    insert_certificate(db, &device, certificate, signed_by.map(|authority| (authority, None)), now).await
}

/// Writes a certificate down; `signed` has its authority, and itself where it is ours to give out again.
pub(crate) async fn insert_certificate(
    db: &mut PgConnection,
    device: &Locked,
    certificate: &Certificate,
    signed: Option<(AuthorityId, Option<&[u8]>)>,
    now: DateTime<Utc>,
) -> Result<Credential> {
    forget(db, device.key, now).await?;
    let id = CredentialId::new();
    let Certificate { fingerprint, subject, not_after, serial, public_key, .. } = certificate.clone();
    let renew_after = certificate.part_of_life(now, RENEW_AT.0, RENEW_AT.1);
    let authority = signed.map(|(authority, _)| authority);
    sqlx::query!(
        "
        insert into credential (id, device_key, fingerprint, subject, not_after, created_at, expires_at, authority_id,
                                serial, public_key_digest, der, renew_after)
        values ($1, $2, $3, $4, $5, $6, $5, $7, $8, $9, $10, $11)
        ",
        id.uuid(),
        device.key.0,
        fingerprint.as_bytes(),
        subject,
        not_after,
        now,
        authority.map(AuthorityId::uuid),
        serial.as_ref().map(Serial::as_bytes),
        &public_key[..],
        signed.and_then(|(_, der)| der),
        renew_after
    )
    .execute(db)
    .await
    .or_on("credential_fingerprint_key", || Error::CertificateTaken)?;
    let renew_after = Some(renew_after);
    let registered =
        Registered { fingerprint, subject, not_after, renew_after, authority, serial, first_used_at: None };
    Ok(Credential { id, created_at: now, expires_at: Some(not_after), revoked_at: None, certificate: Some(registered) })
}

/// Gives a device a new token and ends the others: the newest of them at `now + overlap_s`, any older one at once, so
/// that never more than [`MAX_VALID`] are valid. An overlap of 0 ends all of them at once. Certificates stay as they are. To be
/// called in a transaction.
pub async fn rotate(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: &DeviceId,
    overlap_s: u64,
    now: DateTime<Utc>,
) -> Result<Issued> {
    if overlap_s > MAX_OVERLAP_S {
        return Err(Error::Invalid(format!("overlap_s is {overlap_s}: expected 0 to {MAX_OVERLAP_S}")));
    }
    let device = lock_active(db, tenant, id).await?;
    let mut older = valid(db, device.key, Kind::Token, now).await?;
    if overlap_s > 0
        && let Some(newest) = older.pop()
    {
        let until = now + TimeDelta::seconds(i64::try_from(overlap_s).expect("bounded above"));
        let newest = newest.uuid();
        // An earlier end that was fixed before stays.
        sqlx::query!("update credential set expires_at = least(expires_at, $2) where id = $1", newest, until)
            .execute(&mut *db)
            .await?;
    }
    let older = older.into_iter().map(CredentialId::uuid).collect::<Vec<_>>();
    sqlx::query!("update credential set revoked_at = $2 where id = any($1)", &older, now).execute(&mut *db).await?;
    let issued = insert(db, &device, id, now).await?;
    control::bump(db).await?;
    Ok(issued)
}

/// Ends a credential at once; ending it again changes nothing. A certificate of a built-in authority goes on its revocation list.
pub async fn revoke(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: &DeviceId,
    credential: CredentialId,
    reason: Reason,
    now: DateTime<Utc>,
) -> Result<()> {
    let device = lock(db, tenant, id).await?;
    let ended = sqlx::query_scalar!(
        r#"
        update credential
           set revoked_at = coalesce(revoked_at, $3), revocation_reason = coalesce(revocation_reason, $4)
         where id = $1 and device_key = $2
     returning authority_id as "authority: AuthorityId"
        "#,
        credential.uuid(),
        device.key.0,
        now,
        reason.name()
    );
    let authority = ended.fetch_optional(&mut *db).await?.ok_or(Error::NoSuchCredential(credential))?;
    revocation::renew_by(db, &Vec::from_iter(authority), now).await?;
    control::bump(db).await
}

/// The credentials of a device, newest first: the valid ones and at most [`MAX_ENDED`] ended ones.
pub async fn list(db: &mut PgConnection, tenant: TenantKey, id: &DeviceId) -> Result<Vec<Credential>> {
    let key = sqlx::query_scalar!(
        r#"select key as "key: DeviceKey" from device where tenant_key = $1 and id = $2"#,
        tenant.0,
        id.as_str()
    )
    .fetch_optional(&mut *db)
    .await?
    .ok_or_else(|| Error::NoSuchDevice(id.clone()))?;
    let credentials = sqlx::query!(
        r#"
        select id as "id: CredentialId", created_at, expires_at, revoked_at, fingerprint, subject, not_after, renew_after,
               authority_id as "authority: AuthorityId", serial, first_used_at
          from credential
         where device_key = $1
         order by created_at desc, id desc
        "#,
        key.0
    )
    .fetch(db)
    .map_ok(|row| {
        let fingerprint = row.fingerprint.and_then(|bytes| bytes.try_into().ok());
        let certificate = fingerprint.zip(row.subject).zip(row.not_after);
        let certificate = certificate.map(|((fingerprint, subject), not_after)| Registered {
            fingerprint,
            subject,
            not_after,
            renew_after: row.renew_after,
            authority: row.authority,
            serial: row.serial.and_then(|bytes| bytes.try_into().ok()),
            first_used_at: row.first_used_at,
        });
        let (id, created_at, expires_at, revoked_at) = (row.id, row.created_at, row.expires_at, row.revoked_at);
        Credential { id, created_at, expires_at, revoked_at, certificate }
    })
    .try_collect()
    .await?;
    Ok(credentials)
}

/// Devices whose last valid certificate ends soon, in all tenants.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expiring {
    /// Within a day.
    pub day: i64,
    /// Within seven days.
    pub week: i64,
    /// Within thirty days.
    pub month: i64,
}

/// Counts devices whose last valid certificate ends soon.
pub async fn expiring(db: &mut PgConnection, now: DateTime<Utc>) -> Result<Expiring> {
    let counted = sqlx::query_as!(
        Expiring,
        r#"
        select count(*) filter (where expires_at <= $1 + interval '1 day') as "day!",
               count(*) filter (where expires_at <= $1 + interval '7 days') as "week!",
               count(*) filter (where expires_at <= $1 + interval '30 days') as "month!"
          from (select max(expires_at) as expires_at
                  from credential
                 where fingerprint is not null and revoked_at is null and expires_at > $1
                 group by device_key) as last
        "#,
        now
    );
    Ok(counted.fetch_one(db).await?)
}

/// A device whose row is locked, so that its credentials stand still.
pub(crate) struct Locked {
    pub(crate) key: DeviceKey,
    pub(crate) tenant: TenantId,
    has_left: bool,
}

/// As [`lock`], for a device that is to get a credential: one that has left for good gets none.
pub(crate) async fn lock_active(db: &mut PgConnection, tenant: TenantKey, id: &DeviceId) -> Result<Locked> {
    let device = lock(db, tenant, id).await?;
    if device.has_left { Err(Error::Decommissioned(id.clone())) } else { Ok(device) }
}

pub(crate) async fn lock(db: &mut PgConnection, tenant: TenantKey, id: &DeviceId) -> Result<Locked> {
    // `no key`: what refers to the device (its status, its readings) need not wait.
    sqlx::query_as!(
        Locked,
        r#"
        select d.key as "key: DeviceKey", t.id as "tenant: TenantId", d.decommissioned_at is not null as "has_left!"
          from device d
          join tenant t on t.key = d.tenant_key
         where d.tenant_key = $1 and d.id = $2
           for no key update of d
        "#,
        tenant.0,
        id.as_str()
    )
    .fetch_optional(db)
    .await?
    .ok_or_else(|| Error::NoSuchDevice(id.clone()))
}

/// The valid ones of a kind, oldest first.
pub(crate) async fn valid(
    db: &mut PgConnection,
    device: DeviceKey,
    kind: Kind,
    now: DateTime<Utc>,
) -> Result<Vec<CredentialId>> {
    let ids = sqlx::query_scalar!(
        r#"
        select id as "id: CredentialId"
          from credential
         where device_key = $1 and revoked_at is null and (expires_at is null or expires_at > $2)
           and (fingerprint is not null) = $3
         order by created_at, id
        "#,
        device.0,
        now,
        kind == Kind::Certificate
    )
    .fetch_all(db)
    .await?;
    Ok(ids)
}

async fn insert(db: &mut PgConnection, device: &Locked, id: &DeviceId, now: DateTime<Utc>) -> Result<Issued> {
    forget(db, device.key, now).await?;
    let credential = CredentialId::new();
    let password = random_secret()?;
    let hash = Sha256::digest(password.expose().as_bytes());
    sqlx::query!(
        "insert into credential (id, device_key, secret_hash, created_at) values ($1, $2, $3, $4)",
        credential.uuid(),
        device.key.0,
        hash.as_slice(),
        now
    )
    .execute(db)
    .await?;
    let username = format!("{}/{id}", device.tenant);
    Ok(Issued { id: credential, username, password, created_at: now, expires_at: None })
}

/// Takes a token that a new device has made itself, by the SHA-256 of it.
pub(crate) async fn accept(
    db: &mut PgConnection,
    device: DeviceKey,
    hash: &[u8; 32],
    now: DateTime<Utc>,
) -> Result<CredentialId> {
    let credential = CredentialId::new();
    sqlx::query!(
        "insert into credential (id, device_key, secret_hash, created_at) values ($1, $2, $3, $4)",
        credential.uuid(),
        device.0,
        &hash[..],
        now
    )
    .execute(db)
    .await?;
    Ok(credential)
}

/// Forgets ended credentials beyond [`MAX_ENDED`], so that a device that rotates for years stays small. A certificate that was
/// revoked is not forgotten before its own end: else one that an authority vouches for would open the door again.
async fn forget(db: &mut PgConnection, device: DeviceKey, now: DateTime<Utc>) -> Result<()> {
    sqlx::query!(
        "
        delete from credential
         where id in (select id
                        from credential
                       where device_key = $1 and (revoked_at is not null or expires_at <= $2)
                         and (not_after is null or not_after <= $2)
                       order by created_at desc, id desc
                      offset $3)
        ",
        device.0,
        now,
        i64::try_from(MAX_ENDED).expect("a small constant")
    )
    .execute(db)
    .await?;
    Ok(())
}

/// 256 random bits as text that needs no quoting anywhere.
pub(crate) fn random_secret() -> Result<Secret> {
    let mut bytes = [0; SECRET_BYTES];
    rand::fill(&mut bytes).map_err(|_| Error::Internal("no random numbers".into()))?;
    Ok(Secret::from(URL_SAFE_NO_PAD.encode(bytes)))
}
