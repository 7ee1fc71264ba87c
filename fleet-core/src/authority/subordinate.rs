//! A built-in authority below another one: its key stays here, and what it signs leads to an authority that others trust already.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use x509_parser::certificate::X509Certificate;
use x509_parser::pem::Pem;

use super::{Authority, Kind, Pki, check_authority, find, locked, open_signer, parsed};
use crate::certificate::Certificate;
use crate::error::{Error, Result};
use crate::id::{AuthorityId, TenantKey};
use crate::revocation;

/// Most authorities above a built-in one.
pub const MAX_CHAIN: usize = 4;

/// The request of a built-in authority for a certificate of another one, in PEM.
pub async fn signing_request(db: &mut PgConnection, pki: &Pki, tenant: TenantKey, id: AuthorityId) -> Result<String> {
    let authority = find(db, tenant, id).await?;
    let sealed = sqlx::query_scalar!("select sealed_key from authority where id = $1", id.uuid()).fetch_one(db).await?;
    let signer = open_signer(pki, id, &authority.certificate.der, sealed.as_deref())?;
    let certificate = parsed(&authority.certificate.der)?;
    let organization = certificate.subject().iter_organization().next().and_then(|name| name.as_str().ok());
    signer.request(organization.unwrap_or_default(), authority.certificate.common_name.as_deref().unwrap_or_default())
}

/// Gives a built-in authority the certificate that another one signed for its [request](signing_request), with those of the
/// authorities above, the nearest first: what it was, and what it is. Its name and key stay, so what it has signed goes on being worth what it
/// was. To be called in a transaction.
pub async fn place_below(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: AuthorityId,
    (certificate_pem, chain_pem): (&str, &str),
    expected: &[i64],
    now: DateTime<Utc>,
) -> Result<(Authority, Authority)> {
    let old = locked(db, tenant, id, expected).await?;
    if old.kind != Kind::BuiltIn {
        return Err(Error::CannotSign(format!("authority {id} is registered: its key is elsewhere")));
    }
    let certificate = Certificate::from_pem(certificate_pem)?;
    if (certificate.name, certificate.public_key) != (old.certificate.name, old.certificate.public_key) {
        return Err(Error::Invalid("not a certificate for this authority: expected its name and its key".into()));
    }
    let chain = read_chain(chain_pem)?;
    check_chain(&certificate, &chain, now)?;
    let chain = chain.into_iter().map(|above| above.der).collect::<Vec<_>>();
    sqlx::query!(
        "
        update authority
           set certificate = $2, fingerprint = $3, not_after = $4, chain = $5, version = version + 1, updated_at = $6
         where id = $1
        ",
        id.uuid(),
        certificate.der,
        certificate.fingerprint.as_bytes(),
        certificate.not_after,
        &chain,
        now
    )
    .execute(&mut *db)
    .await?;
    // Lists name the key as the certificate does.
    revocation::renew_by(db, &[id], now).await?;
    Ok((old, find(db, tenant, id).await?))
}

fn read_chain(pem: &str) -> Result<Vec<Certificate>> {
    let broken = || Error::Invalid(format!("chain: expected 1 to {MAX_CHAIN} certificates in PEM"));
    let blocks = Pem::iter_from_buffer(pem.as_bytes()).take(MAX_CHAIN + 1).collect::<Result<Vec<_>, _>>();
    let blocks = blocks.map_err(|_| broken())?;
    if !(1..=MAX_CHAIN).contains(&blocks.len()) || blocks.iter().any(|block| block.label != "CERTIFICATE") {
        return Err(broken());
    }
    blocks.iter().map(|block| Certificate::from_der(&block.contents)).collect()
}

/// Whether each signed the one before, and all of them are authorities in force.
fn check_chain(certificate: &Certificate, chain: &[Certificate], now: DateTime<Utc>) -> Result<()> {
    let own = parsed(&certificate.der)?;
    if !own.key_usage().is_ok_and(|usage| usage.is_none_or(|usage| usage.value.crl_sign())) {
        return Err(Error::Invalid("expected cRLSign among its key usages: it signs its revocation list".into()));
    }
    let mut below = own;
    for above in std::iter::once(certificate).chain(chain) {
        if !(above.not_before..above.not_after).contains(&now) {
            return Err(Error::Invalid(format!("{}: not in force", above.subject)));
        }
        check_authority(&parsed(&above.der)?)?;
    }
    for above in chain {
        let read = parsed(&above.der)?;
        if !is_signed_by(&below, &read) {
            return Err(Error::Invalid(format!("chain: {} did not sign the one before", above.subject)));
        }
        below = read;
    }
    Ok(())
}

fn is_signed_by(below: &X509Certificate<'_>, above: &X509Certificate<'_>) -> bool {
    below.issuer().as_raw() == above.subject().as_raw()
        && crate::csr::check_hash(&below.signature_algorithm).is_ok()
        && below.verify_signature(Some(above.public_key())).is_ok()
}
