//! Certificate authorities of a tenant: who may vouch for its devices, and who signs what they ask for (ADR 11).
//!
//! A *built-in* one is made by [`create`]; its key is in the database, sealed, and leaves it only to sign. A *registered* one
//! is somebody else's: [`register`] takes its certificate and a proof that whoever registers it holds its key.
//! Holds: a certificate that an authority signed stands for a device of the authority's tenant, whatever it says
//! ([`vouching`]); one of a built-in authority counts only while it has its row, so that nothing counts of which we do not know. While
//! an authority is disabled, no certificate of it does.
//! Ignorant of: TLS, MQTT, HTTP. Chains are checked by whoever speaks TLS.

mod signing;
mod subordinate;

use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::rand;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use sqlx::PgConnection;
use subtle::ConstantTimeEq;
use x509_parser::certificate::X509Certificate;
use x509_parser::prelude::FromDer;

use crate::certificate::{Certificate, Digest32, Serial};
use crate::config;
use crate::control;
use crate::csr::{Csr, check_hash, check_key};
use crate::error::{Error, OrOn, Result, check_version};
use crate::gateway;
use crate::id::{AuthorityId, DeviceId, DeviceKey, TenantId, TenantKey};
use crate::policy::{Principal, Proof, Vouched, Who};
use crate::role;
use crate::seal::Seal;
pub(crate) use signing::Signer;
pub use subordinate::{MAX_CHAIN, place_below, signing_request};

/// Longest name, in characters: it is a common name.
pub const MAX_NAME_CHARS: usize = 64;
/// How long a nonce may be used.
pub const NONCE_LIFETIME: TimeDelta = TimeDelta::hours(1);
/// Authorities that are tried for one certificate: the oldest of those that have its issuer's name.
pub const MAX_TRIED: i64 = 8;

const NONCE_RANDOM: usize = 8;
const NONCE_STAMP: usize = 16;

/// What signing takes: settings, and the key to the keys. Cloning shares it.
#[derive(Debug, Clone)]
pub struct Pki {
    pub(crate) settings: Arc<config::Certificates>,
    seal: Seal,
}

impl Pki {
    /// As the settings have it; `data_dir` is where the key file is when they do not say.
    pub fn new(settings: config::Certificates, data_dir: &Path) -> Self {
        let file = match settings.key_file.as_str() {
            "auto" => data_dir.join("secrets.key"),
            path => path.into(),
        };
        Self { settings: Arc::new(settings), seal: Seal::new(file) }
    }

    /// The settings.
    pub fn settings(&self) -> &config::Certificates {
        &self.settings
    }

    /// What seals secrets in rows.
    pub fn seal(&self) -> &Seal {
        &self.seal
    }

    /// A text that proves, when an authority has signed a certificate for it, that its key is held.
    ///
    /// # Errors
    /// [`Error::Seal`] when there is no key to make it with.
    pub fn nonce(&self, tenant: TenantKey, now: DateTime<Utc>) -> Result<Nonce> {
        let expires_at = now + NONCE_LIFETIME;
        let mut body = [0; 8 + NONCE_RANDOM];
        rand::fill(&mut body[8..]).map_err(|_| Error::Internal("no random numbers".into()))?;
        body[..8].copy_from_slice(&expires_at.timestamp_millis().to_be_bytes());
        let stamp = self.seal.stamp(&nonce_context(tenant), &body)?;
        Ok(Nonce { text: URL_SAFE_NO_PAD.encode([&body[..], &stamp[..NONCE_STAMP]].concat()), expires_at })
    }

    /// Whether this is a nonce of ours, for this tenant and still good.
    fn is_nonce(&self, tenant: TenantKey, text: &str, now: DateTime<Utc>) -> Result<bool> {
        let bytes = URL_SAFE_NO_PAD.decode(text).unwrap_or_default();
        let Some((body, stamp)) = bytes.split_first_chunk::<{ 8 + NONCE_RANDOM }>() else { return Ok(false) };
        let expected = self.seal.stamp(&nonce_context(tenant), body)?;
        let expires_ms = body.first_chunk().map_or(0, |first| i64::from_be_bytes(*first));
        Ok(bool::from(stamp.ct_eq(&expected[..NONCE_STAMP])) && now.timestamp_millis() < expires_ms)
    }

    /// Where the revocation list of an authority can be had, when that is set.
    pub(crate) fn crl_uri(&self, id: AuthorityId) -> Option<String> {
        let base = self.settings.crl_base_url.trim_end_matches('/');
        (!base.is_empty()).then(|| format!("{base}/api/v1/authorities/{id}/crl"))
    }
}

fn nonce_context(tenant: TenantKey) -> Vec<u8> {
    [&b"authority"[..], &tenant.0.to_be_bytes()].concat()
}

/// A text to be signed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nonce {
    /// To be the common name of a certificate.
    pub text: String,
    /// It is worth nothing from then on.
    pub expires_at: DateTime<Utc>,
}

/// Where the key of an authority is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Here.
    BuiltIn,
    /// Elsewhere.
    Registered,
}

impl Kind {
    /// As rows have it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BuiltIn => "built-in",
            Self::Registered => "registered",
        }
    }
}

/// A certificate authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authority {
    /// Names it.
    pub id: AuthorityId,
    /// What people call it.
    pub name: String,
    /// Where its key is.
    pub kind: Kind,
    /// Its certificate.
    pub certificate: Certificate,
    /// Those of the authorities above it, in DER, the nearest first.
    pub chain: Vec<Vec<u8>>,
    /// Whether its certificates are worth nothing for the time being, and it signs none.
    pub disabled: bool,
    /// The number of its newest revocation list, if there is one.
    pub crl_number: Option<Serial>,
    /// When the next one is due.
    pub crl_next_update: Option<DateTime<Utc>>,
    /// Raised by every change.
    pub version: i64,
    /// When it was made or registered.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

/// What of an authority may be changed.
#[derive(Debug, Clone, Default)]
pub struct Patch {
    /// What people call it.
    pub name: Option<String>,
    /// Whether its certificates are worth nothing for the time being.
    pub disabled: Option<bool>,
}

/// Makes a built-in authority. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    pki: &Pki,
    tenant: TenantKey,
    name: &str,
    lifetime_s: Option<u64>,
    now: DateTime<Utc>,
) -> Result<Authority> {
    let settings = &pki.settings;
    let name = checked_name(name)?;
    let most_s = settings.authority_lifetime_s;
    let not_after = end_of_life(lifetime_s.unwrap_or(most_s), most_s, now)?;
    check_room(db, settings, tenant).await?;
    let tenant_id = sqlx::query_scalar!(r#"select id as "id: TenantId" from tenant where key = $1"#, tenant.0);
    let tenant_id = tenant_id.fetch_one(&mut *db).await?;
    let (der, key) = signing::new_authority(name, &tenant_id, now, not_after)?;
    let id = AuthorityId::new();
    let sealed = pki.seal.seal(id.uuid().as_bytes(), &key)?;
    insert(db, tenant, id, (name, &Certificate::from_der(&der)?), Some(&sealed), now).await
}

/// Takes somebody else's authority: its certificate, and one that it signed for a [nonce](Pki::nonce). To be called in a
/// transaction.
pub async fn register(
    db: &mut PgConnection,
    pki: &Pki,
    tenant: TenantKey,
    name: &str,
    (certificate_pem, proof_pem): (&str, &str),
    now: DateTime<Utc>,
) -> Result<Authority> {
    let name = checked_name(name)?;
    let certificate = Certificate::from_pem(certificate_pem)?;
    if certificate.not_after <= now {
        return Err(Error::Invalid(format!("the certificate has expired at {}", certificate.not_after)));
    }
    let authority = parsed(&certificate.der)?;
    check_authority(&authority)?;
    let proof = Certificate::from_pem(proof_pem)?;
    check_proof(pki, tenant, &authority, &proof, now)?;
    check_room(db, &pki.settings, tenant).await?;
    insert(db, tenant, AuthorityId::new(), (name, &certificate), None, now).await
}

fn parsed(der: &[u8]) -> Result<X509Certificate<'_>> {
    let read = X509Certificate::from_der(der).map_err(|_| Error::Invalid("not an X.509 certificate".into()))?;
    Ok(read.1)
}

/// Whether a certificate is one of an authority.
fn check_authority(certificate: &X509Certificate<'_>) -> Result<()> {
    check_key(certificate.public_key())?;
    let broken = |_| Error::Invalid("its extensions cannot be read".into());
    let is_ca = certificate.basic_constraints().map_err(broken)?.is_some_and(|basic| basic.value.ca);
    let may_sign = certificate.key_usage().map_err(broken)?.is_none_or(|usage| usage.value.key_cert_sign());
    if is_ca && may_sign {
        return Ok(());
    }
    Err(Error::Invalid(
        "not the certificate of an authority: expected CA:TRUE, and keyCertSign among its key usages".into(),
    ))
}

fn check_proof(
    pki: &Pki,
    tenant: TenantKey,
    authority: &X509Certificate<'_>,
    proof: &Certificate,
    now: DateTime<Utc>,
) -> Result<()> {
    if !pki.is_nonce(tenant, proof.common_name.as_deref().unwrap_or_default(), now)? {
        return Err(Error::Invalid(
            "the proof's common name is no nonce of this tenant, or an old one: ask for a new one".into(),
        ));
    }
    let proof = parsed(&proof.der)?;
    check_hash(&proof.signature_algorithm)?;
    let is_signed = proof.issuer().as_raw() == authority.subject().as_raw()
        && proof.verify_signature(Some(authority.public_key())).is_ok();
    if is_signed { Ok(()) } else { Err(Error::Invalid("the proof is not signed by this authority".into())) }
}

fn checked_name(name: &str) -> Result<&str> {
    let name = name.trim();
    if name.is_empty() || name.chars().count() > MAX_NAME_CHARS || name.contains(char::is_control) {
        return Err(Error::Invalid(format!("name: expected 1 to {MAX_NAME_CHARS} printable characters")));
    }
    Ok(name)
}

/// When a life that begins now ends.
pub(crate) fn end_of_life(lifetime_s: u64, most_s: u64, now: DateTime<Utc>) -> Result<DateTime<Utc>> {
    let life =
        Some(lifetime_s).filter(|asked| (1..=most_s).contains(asked)).and_then(|asked| i64::try_from(asked).ok());
    let end = life.and_then(TimeDelta::try_seconds).and_then(|life| now.checked_add_signed(life));
    end.ok_or_else(|| Error::Invalid(format!("lifetime_s is {lifetime_s}: expected 1 to {most_s}")))
}

/// Whether the tenant may have one more; others who ask wait.
async fn check_room(db: &mut PgConnection, settings: &config::Certificates, tenant: TenantKey) -> Result<()> {
    role::lock(db, Some(tenant)).await?;
    let count = sqlx::query_scalar!(r#"select count(*) as "count!" from authority where tenant_key = $1"#, tenant.0);
    if usize::try_from(count.fetch_one(db).await?).is_ok_and(|count| count >= settings.max_authorities) {
        return Err(Error::TooMany { what: "authorities", most: settings.max_authorities });
    }
    Ok(())
}

async fn insert(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: AuthorityId,
    (name, certificate): (&str, &Certificate),
    sealed_key: Option<&[u8]>,
    now: DateTime<Utc>,
) -> Result<Authority> {
    let kind = if sealed_key.is_some() { Kind::BuiltIn } else { Kind::Registered };
    sqlx::query!(
        "
        insert into authority (id, tenant_key, name, kind, certificate, fingerprint, subject_digest, sealed_key, not_after,
                               created_at, updated_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $10)
        ",
        id.uuid(),
        tenant.0,
        name,
        kind.as_str(),
        certificate.der,
        certificate.fingerprint.as_bytes(),
        &certificate.name[..],
        sealed_key,
        certificate.not_after,
        now
    )
    .execute(&mut *db)
    .await
    .or_on("authority_name_key", || Error::AuthorityExists("name"))
    .or_on("authority_fingerprint_key", || Error::AuthorityExists("certificate"))?;
    find(db, tenant, id).await
}

/// The authority of that id, in this tenant.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: AuthorityId) -> Result<Authority> {
    read(db, tenant, Some(id)).await?.pop().ok_or(Error::NoSuchAuthority(id))
}

/// All authorities of a tenant, in the order in which they came; they are at most as many as the settings allow.
pub async fn list(db: &mut PgConnection, tenant: TenantKey) -> Result<Vec<Authority>> {
    read(db, tenant, None).await
}

async fn read(db: &mut PgConnection, tenant: TenantKey, id: Option<AuthorityId>) -> Result<Vec<Authority>> {
    let rows = sqlx::query!(
        r#"
        select a.id as "id: AuthorityId", a.name, a.sealed_key is not null as "built_in!", a.certificate, a.chain, a.disabled,
               l.number as "crl_number?", l.next_update as "crl_next_update?", a.version, a.created_at, a.updated_at
          from authority a
          left join revocation_list l on l.authority_id = a.id
         where a.tenant_key = $1 and ($2::uuid is null or a.id = $2)
         order by a.id
        "#,
        tenant.0,
        id.map(AuthorityId::uuid)
    )
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| {
            let certificate = Certificate::from_der(&row.certificate)?;
            Ok(Authority {
                id: row.id,
                name: row.name,
                kind: if row.built_in { Kind::BuiltIn } else { Kind::Registered },
                certificate,
                chain: row.chain,
                disabled: row.disabled,
                crl_number: row.crl_number.and_then(|bytes| bytes.try_into().ok()),
                crl_next_update: row.crl_next_update,
                version: row.version,
                created_at: row.created_at,
                updated_at: row.updated_at,
            })
        })
        .collect()
}

/// Changes an authority, if its version is one of `expected` or none is: what it was, and what it is. To be called in a
/// transaction.
pub async fn update(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: AuthorityId,
    patch: &Patch,
    expected: &[i64],
    now: DateTime<Utc>,
) -> Result<(Authority, Authority)> {
    let name = patch.name.as_deref().map(checked_name).transpose()?;
    let old = locked(db, tenant, id, expected).await?;
    sqlx::query!(
        "
        update authority
           set name = coalesce($2, name), disabled = coalesce($3, disabled), version = version + 1, updated_at = $4
         where id = $1
        ",
        id.uuid(),
        name,
        patch.disabled,
        now
    )
    .execute(&mut *db)
    .await
    .or_on("authority_name_key", || Error::AuthorityExists("name"))?;
    if patch.disabled.is_some_and(|disabled| disabled != old.disabled) {
        control::bump(db).await?;
    }
    Ok((old, find(db, tenant, id).await?))
}

/// Deletes an authority that is disabled, and answers what it was. What a built-in one signed is revoked; what was registered for a device by itself, though a
/// registered authority signed it, stays registered. To be called in a transaction.
pub async fn delete(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: AuthorityId,
    expected: &[i64],
    now: DateTime<Utc>,
) -> Result<Authority> {
    let old = locked(db, tenant, id, expected).await?;
    if !old.disabled {
        return Err(Error::AuthorityEnabled(id));
    }
    if old.kind == Kind::BuiltIn {
        sqlx::query!(
            "
            update credential
               set revoked_at = $2, revocation_reason = 'cessation-of-operation'
             where authority_id = $1 and revoked_at is null
            ",
            id.uuid(),
            now
        )
        .execute(&mut *db)
        .await?;
    }
    sqlx::query!("delete from authority where id = $1", id.uuid()).execute(&mut *db).await?;
    control::bump(db).await?;
    Ok(old)
}

/// The authority, whose row stays locked until the transaction ends.
pub(crate) async fn locked(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: AuthorityId,
    expected: &[i64],
) -> Result<Authority> {
    let version = sqlx::query_scalar!(
        "select version from authority where id = $1 and tenant_key = $2 for no key update",
        id.uuid(),
        tenant.0
    );
    let version = version.fetch_optional(&mut *db).await?.ok_or(Error::NoSuchAuthority(id))?;
    check_version(version, expected)?;
    find(db, tenant, id).await
}

// Signing

/// A certificate that was just signed, with that of its authority.
#[derive(Debug, Clone)]
pub(crate) struct Signed {
    pub(crate) authority: AuthorityId,
    pub(crate) der: Vec<u8>,
    /// Of its authority, and of those above that.
    pub(crate) chain: Vec<Vec<u8>>,
}

/// Signs a certificate for a device of this tenant: by that authority, or by the newest built-in one that is enabled. It ends
/// with its authority at the latest.
pub(crate) async fn sign(
    db: &mut PgConnection,
    pki: &Pki,
    tenant: TenantKey,
    authority: Option<AuthorityId>,
    device: (&TenantId, &DeviceId),
    (request, lifetime_s): (&Csr, Option<u64>),
    now: DateTime<Utc>,
) -> Result<Signed> {
    let settings = &pki.settings;
    let not_after = end_of_life(lifetime_s.unwrap_or(settings.lifetime_s), settings.max_lifetime_s, now)?;
    let row = signing_row(db, tenant, authority, now).await?;
    let signer = row.signer(pki)?;
    let not_after = not_after.min(row.not_after);
    let der = signer.device(request, device, pki.crl_uri(row.id), now, not_after)?;
    let chain = std::iter::once(row.certificate).chain(row.chain).collect();
    Ok(Signed { authority: row.id, der, chain })
}

struct SigningRow {
    id: AuthorityId,
    certificate: Vec<u8>,
    chain: Vec<Vec<u8>>,
    sealed_key: Option<Vec<u8>>,
    disabled: bool,
    not_after: DateTime<Utc>,
}

impl SigningRow {
    fn signer(&self, pki: &Pki) -> Result<Signer> {
        open_signer(pki, self.id, &self.certificate, self.sealed_key.as_deref())
    }
}

/// What signs in the name of a built-in authority.
pub(crate) fn open_signer(pki: &Pki, id: AuthorityId, certificate: &[u8], sealed_key: Option<&[u8]>) -> Result<Signer> {
    let elsewhere = || Error::CannotSign(format!("authority {id} cannot sign here: its key is elsewhere"));
    let key = pki.seal.open(id.uuid().as_bytes(), sealed_key.ok_or_else(elsewhere)?)?;
    Signer::new(certificate, &key)
}

async fn signing_row(
    db: &mut PgConnection,
    tenant: TenantKey,
    wanted: Option<AuthorityId>,
    now: DateTime<Utc>,
) -> Result<SigningRow> {
    let row = sqlx::query_as!(
        SigningRow,
        r#"
        select id as "id: AuthorityId", certificate, chain, sealed_key, disabled, not_after
          from authority
         where tenant_key = $1
           and (id = $2 or $2 is null and sealed_key is not null and not disabled and not_after > $3)
         order by id desc
         limit 1
        "#,
        tenant.0,
        wanted.map(AuthorityId::uuid),
        now
    )
    .fetch_optional(db)
    .await?;
    let row = row.ok_or_else(|| match wanted {
        Some(id) => Error::NoSuchAuthority(id),
        None => Error::CannotSign("no built-in authority is enabled: make one first".into()),
    })?;
    if row.disabled || row.not_after <= now {
        return Err(Error::CannotSign(format!("authority {} cannot sign: it is disabled, or has expired", row.id)));
    }
    Ok(row)
}

/// The tenant's authority that signed this certificate itself, if there is one.
pub(crate) async fn of_certificate(
    db: &mut PgConnection,
    tenant: TenantKey,
    certificate: &Certificate,
) -> Result<Option<AuthorityId>> {
    let rows = sqlx::query!(
        r#"
        select id as "id: AuthorityId", certificate
          from authority
         where tenant_key = $1 and subject_digest = $2
         order by id
        "#,
        tenant.0,
        &certificate.issuer[..]
    )
    .fetch_all(db)
    .await?;
    let Ok((_, read)) = X509Certificate::from_der(&certificate.der) else { return Ok(None) };
    let is_signer = |by: &[u8]| parsed(by).is_ok_and(|by| read.verify_signature(Some(by.public_key())).is_ok());
    Ok(rows.into_iter().find(|row| is_signer(&row.certificate)).map(|row| row.id))
}

// Vouching

/// Somebody a certificate may stand for, if a registered authority signed it.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// The certificate of the authority, in DER: the chain must lead there.
    pub authority: Vec<u8>,
    /// Whom the certificate stands for then.
    pub principal: Principal,
}

/// Whom a certificate stands for, provided that its chain leads to the authority beside it: devices of the name it is made out to, in
/// the tenants of registered authorities that have the name of one of these `issuers`, and of the tenant it names if it does.
/// Authorities that are disabled or took it back are left out, and so are disabled devices.
pub async fn vouching(
    db: &mut PgConnection,
    shown: &Certificate,
    issuers: &[Digest32],
    now: DateTime<Utc>,
) -> Result<Vec<Candidate>> {
    let (Some((tenant, device)), Some(serial)) = (shown.named(), shown.serial) else { return Ok(Vec::new()) };
    let issuers = issuers.iter().map(|issuer| issuer.to_vec()).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        select a.id as "authority: AuthorityId", a.certificate, t.key as "tenant: TenantKey", t.id as "tenant_id: TenantId",
               d.key as "device: DeviceKey"
          from authority a
          join tenant t on t.key = a.tenant_key and ($3::text is null or t.id = $3)
          join device d on d.tenant_key = a.tenant_key and d.id = $2 and not d.disabled
         where a.subject_digest = any($1) and a.sealed_key is null and not a.disabled and a.not_after > $5
           and not exists (select from revoked_certificate r where r.authority_id = a.id and r.serial = $4)
         order by a.id
         limit $6
        "#,
        &issuers,
        device.as_str(),
        tenant.as_ref().map(TenantId::as_str),
        serial.as_bytes(),
        now,
        MAX_TRIED
    )
    .fetch_all(&mut *db)
    .await?;
    let devices = rows.iter().map(|row| row.device).collect::<Vec<_>>();
    let families = gateway::children_of(db, &devices).await?;
    let candidates = rows.into_iter().map(|row| {
        let vouched = Some(Vouched { authority: row.authority, serial });
        let proof = Proof { valid_until: Some(shown.not_after), vouched, ..Proof::default() };
        let children = families.get(&row.device).cloned().unwrap_or_default();
        let who = Who::Device { key: row.device, id: device.clone(), children };
        let principal = Principal { tenant: row.tenant, tenant_id: row.tenant_id, who, proof };
        Candidate { authority: row.certificate, principal }
    });
    Ok(candidates.collect())
}

#[cfg(test)]
pub(crate) mod tests;
