//! Certificates: what is read from an X.509 certificate by which a device shows who it is.
//!
//! Read by [`Certificate::from_pem`] or [`Certificate::from_der`]; registered and asked about in
//! [`credential`](crate::credential). Holds: reading trusts nothing and proves nothing; that somebody has its key is
//! shown in the TLS handshake, and that it is somebody's is decided by whoever reads.
//! Ignorant of: TLS, MQTT, HTTP.

use std::fmt;

use chrono::{DateTime, SubsecRound, Utc};
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
/// Longest serial number that is read, in bytes.
pub const MAX_SERIAL_BYTES: usize = 20;
/// The tenant of a common name that names none.
const DEFAULT_TENANT: &str = "main";

/// The SHA-256 of a part of a certificate.
pub type Digest32 = [u8; 32];

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

/// The serial number of a certificate, or the number of a revocation list: at most 20 bytes (RFC 5280 §4.1.2.2), the most
/// significant first, so that they sort as the numbers they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Serial([u8; MAX_SERIAL_BYTES]);

impl Serial {
    /// A number of at most 20 bytes, leading zeros aside.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let bytes = without_zeros(bytes);
        let mut serial = [0; MAX_SERIAL_BYTES];
        serial[MAX_SERIAL_BYTES.checked_sub(bytes.len())?..].copy_from_slice(bytes);
        Some(Self(serial))
    }

    /// All of its bytes, as rows have them.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Its bytes without leading zeros: at least one.
    pub fn significant(&self) -> &[u8] {
        let bytes = without_zeros(&self.0);
        if bytes.is_empty() { &self.0[MAX_SERIAL_BYTES - 1..] } else { bytes }
    }

    /// The number after it; the highest there is has none.
    pub(crate) fn next(self) -> Option<Self> {
        let mut bytes = self.0;
        for byte in bytes.iter_mut().rev() {
            *byte = byte.wrapping_add(1);
            if *byte > 0 {
                return Some(Self(bytes));
            }
        }
        None
    }
}

fn without_zeros(bytes: &[u8]) -> &[u8] {
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    &bytes[zeros..]
}

impl TryFrom<Vec<u8>> for Serial {
    type Error = &'static str;
    fn try_from(bytes: Vec<u8>) -> Result<Self, Self::Error> {
        Self::read(&bytes).ok_or("a serial number has at most 20 bytes")
    }
}

/// Hexadecimal digits, two for each byte, as `openssl x509 -serial` prints them but in lower case.
impl fmt::Display for Serial {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.significant().iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a certificate says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// Itself, in DER.
    pub der: Vec<u8>,
    /// Tells it from every other.
    pub fingerprint: Fingerprint,
    /// Tells it from every other of its issuer; `None`: longer than the standard allows.
    pub serial: Option<Serial>,
    /// SHA-256 of its issuer's name, in DER.
    pub issuer: Digest32,
    /// SHA-256 of its own name, in DER.
    pub name: Digest32,
    /// SHA-256 of its public key, with algorithm and parameters.
    pub public_key: Digest32,
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
        Self::from_der(&only_block(pem, &["CERTIFICATE"], "certificate")?)
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
            der: der.to_vec(),
            fingerprint: Fingerprint(Sha256::digest(der).into()),
            serial: Serial::read(read.raw_serial()),
            issuer: Sha256::digest(read.issuer().as_raw()).into(),
            name: Sha256::digest(read.subject().as_raw()).into(),
            public_key: Sha256::digest(read.public_key().raw).into(),
            subject: printable(&read.subject().to_string()),
            common_name: common_name(&read),
            not_before: instant(read.validity().not_before)?,
            not_after: instant(read.validity().not_after)?,
        })
    }

    /// The device its common name names: `{tenant}/{device}`, or `{device}` in the tenant `main`.
    pub fn device(&self) -> Option<(TenantId, DeviceId)> {
        let (tenant, device) = self.named()?;
        Some((tenant.or_else(|| DEFAULT_TENANT.parse().ok())?, device))
    }

    /// The device its common name names, and the tenant if it names one.
    pub fn named(&self) -> Option<(Option<TenantId>, DeviceId)> {
        let name = self.common_name.as_deref()?;
        match name.split_once('/') {
            Some((tenant, device)) => Some((Some(tenant.parse().ok()?), device.parse().ok()?)),
            None => Some((None, name.parse().ok()?)),
        }
    }

    /// A part of the time between its making (or `from`, where that is later) and its end.
    pub fn part_of_life(&self, from: DateTime<Utc>, numerator: i32, denominator: i32) -> DateTime<Utc> {
        let from = from.max(self.not_before).min(self.not_after);
        (from + (self.not_after - from) * numerator / denominator).trunc_subsecs(3)
    }
}

/// The one block of a PEM file that holds one and nothing else.
pub(crate) fn only_block(pem: &str, labels: &[&str], what: &str) -> Result<Vec<u8>> {
    let mut blocks = Pem::iter_from_buffer(pem.as_bytes());
    let expected = |found: &str| Error::Invalid(format!("expected one {what} in PEM, found {found}"));
    let block = match blocks.next() {
        Some(Ok(block)) => block,
        Some(Err(_)) => return Err(expected("broken PEM")),
        None => return Err(expected("none")),
    };
    if !labels.contains(&block.label.as_str()) {
        return Err(expected("something else"));
    }
    if blocks.next().is_some() {
        return Err(expected("more than that"));
    }
    Ok(block.contents)
}

/// Bytes as a block of a PEM file.
pub fn to_pem(label: &str, der: &[u8]) -> String {
    let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new(label, der), config)
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

pub(crate) fn instant(time: ASN1Time) -> Result<DateTime<Utc>> {
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
