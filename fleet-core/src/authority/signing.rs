//! What authorities sign: their own certificate, those of devices, revocation lists.
//!
//! Holds: of a device's request only the key is in its certificate; name, purpose and time are ours. Serial numbers are 128
//! random bits. Ignorant of: the database.

use std::time::SystemTime;

use aws_lc_rs::rand;
use chrono::{DateTime, TimeDelta, Utc};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CrlDistributionPoint, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256,
    RevokedCertParams, SerialNumber, SubjectPublicKeyInfo,
};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer;
use zeroize::Zeroizing;

use crate::certificate::Serial;
use crate::csr::Csr;
use crate::error::{Error, Result};
use crate::id::{DeviceId, TenantId};
use crate::revocation::Revoked;

/// Certificates are valid from a little earlier, for clocks that are behind.
const BACKDATED: TimeDelta = TimeDelta::hours(1);
/// Longest common name, in characters (RFC 5280, ub-common-name); some clients refuse a longer one.
const MAX_COMMON_NAME: usize = 64;
const SERIAL_BYTES: usize = 16;

/// A key and the certificate that says whose it is.
pub(crate) struct Signer {
    issuer: Issuer<'static, KeyPair>,
    key_id: KeyIdMethod,
}

/// A new authority that nobody but itself has signed: its certificate and its key (PKCS#8).
pub(super) fn new_authority(
    name: &str,
    tenant: &TenantId,
    now: DateTime<Utc>,
    not_after: DateTime<Utc>,
) -> Result<(Vec<u8>, Zeroizing<Vec<u8>>)> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(failed)?;
    let params = authority_params(tenant.as_str(), name, params(now, not_after)?);
    let certificate = params.self_signed(&key).map_err(failed)?;
    Ok((certificate.der().to_vec(), Zeroizing::new(key.serialize_der())))
}

fn authority_params(organization: &str, name: &str, mut params: CertificateParams) -> CertificateParams {
    params.distinguished_name.push(DnType::OrganizationName, organization);
    params.distinguished_name.push(DnType::CommonName, name);
    // It signs devices, and no further authorities.
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

impl Signer {
    pub(super) fn new(certificate: &[u8], key: &[u8]) -> Result<Self> {
        let key = KeyPair::from_pkcs8_der_and_sign_algo(&key.into(), &PKCS_ECDSA_P256_SHA256).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_der(&certificate.into(), key).map_err(failed)?;
        let (_, read) = X509Certificate::from_der(certificate).map_err(|_| Error::Internal("no certificate".into()))?;
        // Whoever signed it may have named its key in another way.
        let named = read.iter_extensions().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(KeyIdMethod::PreSpecified(id.0.to_vec())),
            _ => None,
        });
        Ok(Self { issuer, key_id: named.unwrap_or(KeyIdMethod::Sha256) })
    }

    /// A request for a certificate of another authority, in PEM: under the same name, with the same key.
    pub(super) fn request(&self, organization: &str, name: &str) -> Result<String> {
        let params = authority_params(organization, name, blank()?);
        params.serialize_request(self.issuer.key()).and_then(|request| request.pem()).map_err(failed)
    }

    /// A certificate for a device, with the key of its request; `crl` is where the revocation list can be had.
    pub(super) fn device(
        &self,
        request: &Csr,
        (tenant, device): (&TenantId, &DeviceId),
        crl: Option<String>,
        now: DateTime<Utc>,
        not_after: DateTime<Utc>,
    ) -> Result<Vec<u8>> {
        let key = SubjectPublicKeyInfo::from_der(&request.public_key);
        let key = key.map_err(|error| Error::Invalid(format!("the key of the request cannot be used: {error}")))?;
        let mut params = params(now, not_after)?;
        params.distinguished_name.push(DnType::CommonName, common_name(tenant, device));
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        params.crl_distribution_points = crl.into_iter().map(|uri| CrlDistributionPoint { uris: vec![uri] }).collect();
        Ok(params.signed_by(&key, &self.issuer).map_err(failed)?.der().to_vec())
    }

    pub(crate) fn revocation_list(
        &self,
        number: Serial,
        revoked: &[Revoked],
        now: DateTime<Utc>,
        next_update: DateTime<Utc>,
    ) -> Result<Vec<u8>> {
        let entry = |revoked: &Revoked| RevokedCertParams {
            serial_number: SerialNumber::from_slice(revoked.serial.significant()),
            revocation_time: SystemTime::from(revoked.at).into(),
            reason_code: Some(revoked.reason.into()),
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: SystemTime::from(now).into(),
            next_update: SystemTime::from(next_update).into(),
            crl_number: SerialNumber::from_slice(number.significant()),
            issuing_distribution_point: None,
            revoked_certs: revoked.iter().map(entry).collect(),
            key_identifier_method: self.key_id.clone(),
        };
        Ok(list.signed_by(&self.issuer).map_err(failed)?.der().to_vec())
    }
}

/// `{tenant}/{device}`, which an authority's tenant could do without where it is too long.
fn common_name(tenant: &TenantId, device: &DeviceId) -> String {
    let name = format!("{tenant}/{device}");
    if name.len() <= MAX_COMMON_NAME { name } else { device.to_string() }
}

fn params(now: DateTime<Utc>, not_after: DateTime<Utc>) -> Result<CertificateParams> {
    let mut serial = [0; SERIAL_BYTES];
    rand::fill(&mut serial).map_err(|_| Error::Internal("no random numbers".into()))?;
    let mut params = blank()?;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = SystemTime::from(now - BACKDATED).into();
    params.not_after = SystemTime::from(not_after).into();
    Ok(params)
}

fn blank() -> Result<CertificateParams> {
    let mut params = CertificateParams::new(Vec::new()).map_err(failed)?;
    params.distinguished_name = DistinguishedName::new();
    Ok(params)
}

#[expect(clippy::needless_pass_by_value, reason = "for `map_err`")]
fn failed(error: rcgen::Error) -> Error {
    Error::Internal(format!("signing: {error}"))
}
