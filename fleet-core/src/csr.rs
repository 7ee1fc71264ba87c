//! Certificate signing requests (PKCS #10): of what a device asks for, only its public key is taken.
//!
//! Holds: whoever made the request holds the key, by its signature; the key is of a kind and size that TLS takes.
//! Names and extensions in it are read past: what a certificate says is for the authority to decide.
//! Ignorant of: who asks.

use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_PKCS1_RSAENCRYPTION, OID_PKCS1_SHA1WITHRSA,
    OID_SHA1_WITH_RSA, OID_SIG_ED25519,
};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo};

use crate::certificate::{Digest32, only_block};
use crate::error::{Error, Result};

/// Smallest RSA key, in bits.
pub const MIN_RSA_BITS: usize = 2048;
/// Largest RSA key, in bits: a larger one costs whoever checks it.
pub const MAX_RSA_BITS: usize = 8192;

const KEYS: &str = "expected ECDSA P-256 or P-384, Ed25519, or RSA of 2048 to 8192 bits";

/// A request whose signature was verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Csr {
    /// The public key, with algorithm and parameters, in DER.
    pub(crate) public_key: Vec<u8>,
}

impl Csr {
    /// Reads a PEM file of at most `max_bytes` that holds one request and nothing else.
    ///
    /// # Errors
    /// [`Error::Invalid`] says what was expected.
    pub fn from_pem(pem: &str, max_bytes: usize) -> Result<Self> {
        if pem.len() > max_bytes {
            return Err(Error::Invalid(format!("the request is too large: expected at most {max_bytes} bytes")));
        }
        let labels = ["CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST"];
        let der = only_block(pem, &labels, "certificate signing request")?;
        let broken = || Error::Invalid("not a certificate signing request (PKCS #10)".into());
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| broken())?;
        if !rest.is_empty() {
            return Err(broken());
        }
        let key = &request.certification_request_info.subject_pki;
        check_key(key)?;
        check_hash(&request.signature_algorithm)?;
        let forged = |_| Error::Invalid("the request is not signed with its own key".into());
        request.verify_signature().map_err(forged)?;
        Ok(Self { public_key: key.raw.to_vec() })
    }

    /// SHA-256 of the public key.
    pub fn key_digest(&self) -> Digest32 {
        use sha2::{Digest, Sha256};
        Sha256::digest(&self.public_key).into()
    }
}

/// Whether TLS takes such a key.
pub(crate) fn check_key(key: &SubjectPublicKeyInfo<'_>) -> Result<()> {
    let refused = |found: &str| Error::Invalid(format!("{found}: {KEYS}"));
    let algorithm = &key.algorithm.algorithm;
    if *algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = key.algorithm.parameters.as_ref().and_then(|curve| curve.as_oid().ok());
        return match curve {
            Some(curve) if curve == OID_EC_P256 || curve == OID_NIST_EC_P384 => Ok(()),
            _ => Err(refused("an ECDSA key of another curve")),
        };
    }
    if *algorithm == OID_SIG_ED25519 {
        return Ok(());
    }
    if *algorithm != OID_PKCS1_RSAENCRYPTION {
        return Err(refused("a key of another kind"));
    }
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) if (MIN_RSA_BITS..=MAX_RSA_BITS).contains(&rsa.key_size()) => Ok(()),
        Ok(PublicKey::RSA(rsa)) => Err(refused(&format!("an RSA key of {} bits", rsa.key_size()))),
        _ => Err(refused("a broken RSA key")),
    }
}

/// SHA-1 proves nothing any more.
pub(crate) fn check_hash(algorithm: &AlgorithmIdentifier<'_>) -> Result<()> {
    let is_sha1 = [OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA].contains(&algorithm.algorithm);
    if is_sha1 { Err(Error::Invalid("signed with SHA-1: expected SHA-256 or better".into())) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    const MAX: usize = 16_384;

    fn pem(key: &KeyPair) -> String {
        CertificateParams::new(["a.example.com".to_owned()]).unwrap().serialize_request(key).unwrap().pem().unwrap()
    }

    fn der(pem: &str) -> Vec<u8> {
        only_block(pem, &["CERTIFICATE REQUEST"], "request").unwrap()
    }

    fn again(der: &[u8]) -> String {
        format!("-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n", STANDARD.encode(der))
    }

    #[test]
    fn the_key_is_taken_from_either_kind_of_pem() {
        let key = KeyPair::generate().unwrap();
        let pem = pem(&key);
        let read = Csr::from_pem(&pem, MAX).unwrap();
        assert!(read.public_key.windows(key.public_key_raw().len()).any(|part| part == key.public_key_raw()));
        let other = pem.replace("CERTIFICATE REQUEST", "NEW CERTIFICATE REQUEST");
        assert_eq!(Csr::from_pem(&other, MAX).unwrap(), read);
        assert_eq!(Csr::from_pem(&format!("{pem}\n"), pem.len() + 1).unwrap().key_digest(), read.key_digest());
        assert!(Csr::from_pem(&pem, pem.len() - 1).unwrap_err().to_string().contains("too large"));
    }

    /// Made by `openssl req -new -newkey rsa:1024`, `ec:secp521r1`, `ec:secp256k1`, `dsa`; and RSA 2048 signed with SHA-1.
    const REFUSED: [(&str, &str); 5] = [
        ("1024", include_str!("csr/rsa1024.pem")),
        ("another curve", include_str!("csr/p521.pem")),
        ("another curve", include_str!("csr/secp256k1.pem")),
        ("another kind", include_str!("csr/dsa.pem")),
        ("SHA-1", include_str!("csr/sha1.pem")),
    ];

    #[test]
    fn weak_and_unknown_keys_are_refused() {
        for (why, pem) in REFUSED {
            let refused = Csr::from_pem(pem, MAX).unwrap_err().to_string();
            assert!(refused.contains(why), "{why}: {refused}");
        }
    }

    #[test]
    fn what_openssl_makes_is_read() {
        for pem in [include_str!("csr/openssl-p256.pem"), include_str!("csr/openssl-rsa-pss.pem")] {
            Csr::from_pem(pem, MAX).unwrap();
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        let key = KeyPair::generate().unwrap();
        let pem = pem(&key);
        let certificate = CertificateParams::new(Vec::new()).unwrap().self_signed(&key).unwrap().pem();
        let mut long = der(&pem);
        long.push(0);
        let as_request = certificate.replace("CERTIFICATE", "CERTIFICATE REQUEST");
        for bad in
            ["", "hello", &pem[..pem.len() / 2], &certificate, &as_request, &format!("{pem}{pem}"), &again(&long)]
        {
            assert!(matches!(Csr::from_pem(bad, MAX), Err(Error::Invalid(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_request_must_be_signed_with_its_own_key() {
        let (one, other) = (der(&pem(&KeyPair::generate().unwrap())), der(&pem(&KeyPair::generate().unwrap())));
        let read = X509CertificationRequest::from_der(&one).unwrap().1;
        let (own, foreign) = (&read.certification_request_info.subject_pki.raw, &{
            let read = X509CertificationRequest::from_der(&other).unwrap().1;
            read.certification_request_info.subject_pki.raw.to_vec()
        });
        let place = one.windows(own.len()).position(|part| part == *own).unwrap();
        let mut forged = one.clone();
        forged[place..place + own.len()].copy_from_slice(foreign);
        let refused = Csr::from_pem(&again(&forged), MAX).unwrap_err();
        assert!(refused.to_string().contains("own key"), "{refused}");
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics_and_no_change_brings_another_key(bytes: Vec<u8>, at: usize, with: u8) {
            let _ = Csr::from_pem(&String::from_utf8_lossy(&bytes), MAX);
            let _ = Csr::from_pem(&again(&bytes), MAX);
            let key = KeyPair::generate().unwrap();
            let good = der(&pem(&key));
            let mut changed = good.clone();
            let at = at % good.len();
            changed[at] = with;
            match Csr::from_pem(&again(&changed), MAX) {
                Ok(read) => proptest::prop_assert_eq!(read, Csr::from_pem(&again(&good), MAX).unwrap()),
                Err(error) => proptest::prop_assert!(matches!(error, Error::Invalid(_)), "{error}"),
            }
        }
    }
}
