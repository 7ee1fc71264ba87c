//! Certificates for tests, and TLS clients that show them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use chrono::{DateTime, TimeDelta, Utc};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SerialNumber,
};
use rustls::SupportedProtocolVersion;
use rustls::crypto::aws_lc_rs::sign::any_supported_type;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::PATIENCE;
use super::packet::Connect;
use super::raw::Version;

/// Both versions of TLS.
pub(crate) const VERSIONS: [&SupportedProtocolVersion; 2] = [&rustls::version::TLS12, &rustls::version::TLS13];

/// A certificate and its key, in PEM.
#[derive(Clone, Debug)]
pub(crate) struct Identity {
    pub(crate) certificate: String,
    pub(crate) key: String,
    pub(crate) serial: u64,
}

impl Identity {
    /// One that nobody signed but its own key.
    pub(crate) fn self_signed(name: &str) -> Self {
        let (params, key) = (client(name), KeyPair::generate().expect("a key"));
        let certificate = params.self_signed(&key).expect("a certificate").pem();
        Self { certificate, key: key.serialize_pem(), serial: 0 }
    }

    /// Writes it to `{name}.pem` and `{name}-key.pem`.
    pub(crate) fn write(&self, dir: &Path, name: &str) -> (PathBuf, PathBuf) {
        let files = (dir.join(format!("{name}.pem")), dir.join(format!("{name}-key.pem")));
        std::fs::write(&files.0, &self.certificate).expect("the directory can be written");
        std::fs::write(&files.1, &self.key).expect("the directory can be written");
        files
    }
}

/// A key for which a certificate is asked.
pub(crate) struct Key(KeyPair);

impl Key {
    pub(crate) fn new() -> Self {
        Self(KeyPair::generate().expect("a key"))
    }

    /// A signing request in PEM, that names whoever.
    pub(crate) fn csr(&self) -> String {
        named("whoever").serialize_request(&self.0).expect("a request").pem().expect("PEM")
    }

    /// It with its certificate.
    pub(crate) fn with(&self, certificate: &str) -> Identity {
        Identity { certificate: certificate.to_owned(), key: self.0.serialize_pem(), serial: 0 }
    }
}

/// A certificate authority.
pub(crate) struct Authority {
    params: CertificateParams,
    key: KeyPair,
    pub(crate) certificate: String,
}

impl Authority {
    pub(crate) fn new(name: &str) -> Self {
        let mut params = named(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let key = KeyPair::generate().expect("a key");
        let certificate = params.self_signed(&key).expect("a certificate").pem();
        Self { params, key, certificate }
    }

    fn sign(&self, mut params: CertificateParams) -> Identity {
        let key = KeyPair::generate().expect("a key");
        let serial = serial(&key);
        params.serial_number = Some(SerialNumber::from(serial));
        let issuer = Issuer::from_params(&self.params, &self.key);
        let certificate = params.signed_by(&key, &issuer).expect("a certificate").pem();
        Identity { certificate, key: key.serialize_pem(), serial }
    }

    /// A certificate for a server on this machine.
    pub(crate) fn server(&self) -> Identity {
        let mut params = named("server");
        params.subject_alt_names = ["localhost", "127.0.0.1"].map(san).into();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        self.sign(params)
    }

    /// A certificate for whoever is called `name`.
    pub(crate) fn client(&self, name: &str) -> Identity {
        self.sign(client(name))
    }

    /// As [`Authority::client`], valid between these moments, in days from now.
    pub(crate) fn client_between(&self, name: &str, from_days: i64, to_days: i64) -> Identity {
        let mut params = client(name);
        params.not_before = in_days(from_days).into();
        params.not_after = in_days(to_days).into();
        self.sign(params)
    }

    /// An authority below this one, and what it signs must be shown with.
    pub(crate) fn intermediate(&self, name: &str) -> Self {
        let mut below = Self::new(name);
        let issuer = Issuer::from_params(&self.params, &self.key);
        below.certificate = below.params.signed_by(&below.key, &issuer).expect("a certificate").pem();
        below
    }

    /// A list that takes one certificate back, in PEM.
    pub(crate) fn takes_back(&self, revoked: &Identity) -> String {
        let revoked = RevokedCertParams {
            serial_number: SerialNumber::from(revoked.serial),
            revocation_time: in_days(-1).into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: in_days(-1).into(),
            next_update: in_days(30).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let issuer = Issuer::from_params(&self.params, &self.key);
        list.signed_by(&issuer).expect("a list").pem().expect("PEM")
    }
}

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("no names");
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = in_days(-1).into();
    params.not_after = in_days(30).into();
    params
}

fn client(name: &str) -> CertificateParams {
    let mut params = named(name);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    params
}

fn san(name: &str) -> rcgen::SanType {
    match name.parse() {
        Ok(address) => rcgen::SanType::IpAddress(address),
        Err(_) => rcgen::SanType::DnsName(name.try_into().expect("a name")),
    }
}

/// Different for each key.
fn serial(key: &KeyPair) -> u64 {
    key.public_key_raw().iter().rev().take(7).fold(1, |serial, byte| serial << 8 | u64::from(*byte))
}

fn in_days(days: i64) -> SystemTime {
    let now: DateTime<Utc> = SystemTime::now().into();
    (now + TimeDelta::days(days)).into()
}

/// Shakes hands as a client that trusts `authority`.
pub(crate) async fn connect(
    address: SocketAddr,
    authority: &str,
    identity: Option<&Identity>,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    over(TcpStream::connect(address).await?, authority, identity, versions).await
}

/// As [`connect`], over a socket on which something may have been said.
pub(crate) async fn over(
    socket: TcpStream,
    authority: &str,
    identity: Option<&Identity>,
    versions: &[&'static SupportedProtocolVersion],
) -> std::io::Result<TlsStream<TcpStream>> {
    super::install_crypto();
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.as_bytes()).expect("a certificate")).expect("an authority");
    let config = ClientConfig::builder_with_protocol_versions(versions).with_root_certificates(roots);
    let config = match identity {
        None => config.with_no_client_auth(),
        // Not `with_client_auth_cert`: that would not let a thief try.
        Some(identity) => config.with_client_cert_resolver(Arc::new(SingleCertAndKey::from(certified(identity)))),
    };
    let name = ServerName::try_from("localhost").expect("a name");
    let handshake = TlsConnector::from(Arc::new(config)).connect(name, socket);
    timeout(PATIENCE, handshake).await.expect("the handshake ends in time")
}

fn certified(Identity { certificate, key, .. }: &Identity) -> CertifiedKey {
    let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).map(|one| one.expect("a certificate")).collect();
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
    CertifiedKey::new(chain, any_supported_type(&key).expect("a key that can sign"))
}

/// Whether the server ends a handshake before anything can be said (TLS 1.3: the client hears of it afterwards).
pub(crate) async fn is_sent_away(
    address: SocketAddr,
    authority: &str,
    identity: &Identity,
    version: &'static SupportedProtocolVersion,
) -> bool {
    let Ok(mut socket) = connect(address, authority, Some(identity), &[version]).await else { return true };
    let connect = Connect::new(Version::V5, "", None).bytes();
    socket.write_all(&connect).await.is_err()
        || timeout(PATIENCE, socket.read_u8()).await.expect("the server answers or closes").is_err()
}
