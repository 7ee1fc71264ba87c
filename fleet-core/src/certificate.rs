//! Certificates: what is read from an X.509 certificate by which a device shows who it is.
//!
//! Read by [`Certificate::from_pem`] or [`Certificate::from_der`]; registered and asked about in
//! [`credential`](crate::credential). Holds: reading trusts nothing and proves nothing; that somebody has its key is
//! shown in the TLS handshake, and that it is somebody's is decided by whoever reads.
//! Ignorant of: TLS, MQTT, HTTP.

use std::fmt;

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use x509_parser::certificate::X509Certificate;
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::clock::from_ms;
use crate::error::{Error, Result};
use crate::id::{DeviceId, TenantId};

/// Largest certificate that is read, in bytes of DER.
pub const MAX_DER_BYTES: usize = 16 * 1024;
/// Longest subject that is kept, in characters; a longer one is cut.
pub const MAX_SUBJECT_CHARS: usize = 256;
/// The tenant of a common name that names none.
const DEFAULT_TENANT: &str = "main";

/// The SHA-256 of a certificate's DER.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl TryFrom<Vec<u8>> for Fingerprint {
    type Error = &'static str;
    fn try_from(bytes: Vec<u8>) -> Result<Self, Self::Error> {
        bytes.try_into().map(Self).map_err(|_| "a fingerprint has 32 bytes")
    }
}

/// 64 lower-case hexadecimal digits.
impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Tells it from every other.
    pub fingerprint: Fingerprint,
    /// Its subject, for people.
    pub subject: String,
    /// The common name of its subject, when there is exactly one.
    pub common_name: Option<String>,
    /// It is not valid before.
    pub not_before: DateTime<Utc>,
    /// It is not valid after.
    pub not_after: DateTime<Utc>,
}

impl Certificate {
    /// Reads a PEM file that holds one certificate and nothing else.
    ///
    /// # Errors
    /// [`Error::Invalid`] says what was found.
    pub fn from_pem(pem: &str) -> Result<Self> {
        let mut blocks = Pem::iter_from_buffer(pem.as_bytes());
        let expected = |found: &str| Error::Invalid(format!("expected one certificate in PEM, found {found}"));
        let block = match blocks.next() {
            Some(Ok(block)) => block,
            Some(Err(_)) => return Err(expected("broken PEM")),
            None => return Err(expected("none")),
        };
        if block.label != "CERTIFICATE" {
            return Err(expected("something else"));
        }
        if blocks.next().is_some() {
            return Err(expected("more than that"));
        }
        Self::from_der(&block.contents)
    }

    /// Reads a certificate.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is not one, or too large.
    pub fn from_der(der: &[u8]) -> Result<Self> {
        if der.len() > MAX_DER_BYTES {
            return Err(Error::Invalid(format!(
                "the certificate is too large: expected at most {MAX_DER_BYTES} bytes"
            )));
        }
        let (rest, read) =
            X509Certificate::from_der(der).map_err(|_| Error::Invalid("not an X.509 certificate".into()))?;
        if !rest.is_empty() {
            return Err(Error::Invalid("there is more than an X.509 certificate".into()));
        }
        Ok(Self {
            fingerprint: Fingerprint(Sha256::digest(der).into()),
            subject: printable(&read.subject().to_string()),
            common_name: common_name(&read),
            not_before: instant(read.validity().not_before)?,
            not_after: instant(read.validity().not_after)?,
        })
    }

    /// The device its common name names: `{tenant}/{device}`, or `{device}` in the tenant `main`.
    pub fn device(&self) -> Option<(TenantId, DeviceId)> {
        let name = self.common_name.as_deref()?;
        let (tenant, device) = name.split_once('/').unwrap_or((DEFAULT_TENANT, name));
        Some((tenant.parse().ok()?, device.parse().ok()?))
    }
}

/// Of several common names none is the right one.
fn common_name(read: &X509Certificate<'_>) -> Option<String> {
    let mut names = read.subject().iter_common_name();
    let name = names.next()?.as_str().ok()?;
    names.next().is_none().then(|| name.to_owned())
}

/// Text that a terminal and the database can bear.
fn printable(text: &str) -> String {
    text.chars().take(MAX_SUBJECT_CHARS).map(|c| if c.is_control() { '\u{FFFD}' } else { c }).collect()
}

fn instant(time: ASN1Time) -> Result<DateTime<Utc>> {
    let ms = time.timestamp().checked_mul(1000);
    ms.map(from_ms).ok_or_else(|| Error::Invalid("the certificate's time is out of range".into()))
}

#[cfg(test)]
mod tests {
    use rcgen::{CertificateParams, DnType, KeyPair};

    use super::*;

    fn named(names: &[&str]) -> rcgen::Certificate {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        for name in names {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.self_signed(&KeyPair::generate().unwrap()).unwrap()
    }

    #[test]
    fn what_is_read_from_pem_and_der_is_the_same() {
        let made = named(&["main/boiler-1"]);
        let read = Certificate::from_pem(&made.pem()).unwrap();
        assert_eq!(read, Certificate::from_der(made.der()).unwrap());
        assert_eq!(read.subject, "O=Example, CN=main/boiler-1");
        assert_eq!(read.fingerprint.to_string().len(), 64);
        assert!(read.not_before < read.not_after);
    }

    #[test]
    fn a_common_name_names_a_device_or_nobody() {
        let device = |name: &str| Certificate::from_der(named(&[name]).der()).unwrap().device();
        let pair = |tenant: &str, device: &str| Some((tenant.parse().unwrap(), device.parse().unwrap()));
        assert_eq!(device("acme/boiler-1"), pair("acme", "boiler-1"));
        assert_eq!(device("boiler-1"), pair("main", "boiler-1"));
        for nobody in ["", "a/b/c", "/boiler-1", "acme/", "acme/_x", "two words", "a\0b"] {
            assert_eq!(device(nobody), None, "{nobody:?}");
        }
        assert_eq!(Certificate::from_der(named(&[]).der()).unwrap().device(), None);
    }

    #[test]
    fn what_is_no_single_certificate_is_refused() {
        let (one, other) = (named(&["a"]), named(&["b"]));
        let key = KeyPair::generate().unwrap().serialize_pem();
        let half = &one.pem()[..one.pem().len() / 2];
        for bad in ["", "hello", half, &key, &format!("{}{key}", one.pem()), &format!("{}{}", one.pem(), other.pem())] {
            assert!(matches!(Certificate::from_pem(bad), Err(Error::Invalid(_))), "{bad:?}");
        }
        let mut long = one.der().to_vec();
        long.push(0);
        assert!(Certificate::from_der(&long).is_err());
        assert!(Certificate::from_der(&vec![0; MAX_DER_BYTES + 1]).is_err());
    }

    #[test]
    fn a_subject_is_made_fit_for_people_and_rows() {
        assert_eq!(printable("O=a\0b\x1b[2J"), "O=a\u{FFFD}b\u{FFFD}[2J");
        assert_eq!(printable(&"x".repeat(1000)).chars().count(), MAX_SUBJECT_CHARS);
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics(bytes: Vec<u8>, at in 0_usize..400, with: u8) {
            let _ = Certificate::from_der(&bytes);
            let _ = Certificate::from_pem(&String::from_utf8_lossy(&bytes));
            let mut der = named(&["main/boiler-1"]).der().to_vec();
            let length = der.len();
            der[at % length] = with;
            let _ = Certificate::from_der(&der).map(|read| read.device());
        }
    }
}
