//! TLS: the certificate the broker shows, the ones its clients show, and how the first is renewed while it runs.
//!
//! [`Tls::load`] reads the files that [`TlsFiles`] names, [`Tls::handshake`] turns a socket into an encrypted one,
//! [`Tls::vouches_for`] tells whether an authority of the settings signed a client's certificate, [`Tls::is_signed_by`] the
//! same of one of a tenant's.
//! Holds: a client may show a certificate and need not. Any that can be read is taken when the client proves that it
//! holds the key; whom it stands for is decided with the CONNECT, where the client can be told (ADR 6). Files that
//! change are taken up without a restart, and broken ones leave the last good ones in force. Open connections go on.
//! The one module that knows rustls.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use fleet_core::certificate::Certificate;
use fleet_core::config;
use parking_lot::RwLock;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, ProducesTickets, WebPkiClientVerifier};
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};
use tokio::net::TcpStream;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout_at};
use tokio_rustls::TlsAcceptor;

use crate::metrics::{Limit, Metrics};
use crate::stream::Socket;

/// The setting for what `muster tls init` makes.
const AUTO: &str = "auto";
/// Tickets a client is given to come back with less effort (TLS 1.3): it has one connection.
const TICKETS: usize = 1;

/// Where the certificates and keys are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// What the broker shows, with its chain.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authorities that may vouch for devices.
    pub client_ca: Option<PathBuf>,
    /// What they took back.
    pub client_crl: Option<PathBuf>,
}

impl TlsFiles {
    /// The files that `muster tls init` makes in a data directory.
    pub fn of_init(data_dir: &Path) -> Self {
        let file = |name: &str| data_dir.join("tls").join(name);
        Self {
            certificate: file("server.pem"),
            key: file("server-key.pem"),
            client_ca: Some(file("ca.pem")),
            client_crl: None,
        }
    }

    /// The files that the settings name.
    pub fn of(settings: &config::Tls, data_dir: &Path) -> Self {
        let init = Self::of_init(data_dir);
        // The development authority vouches for devices only beside its own server certificate.
        let own_ca = init.client_ca.filter(|_| settings.certificate == AUTO);
        let named = |setting: &str, auto: Option<PathBuf>| match setting {
            AUTO => auto,
            "" => None,
            path => Some(PathBuf::from(path)),
        };
        Self {
            certificate: named(&settings.certificate, None).unwrap_or(init.certificate),
            key: named(&settings.key, None).unwrap_or(init.key),
            client_ca: named(&settings.client_ca, own_ca),
            client_crl: named(&settings.client_crl, None),
        }
    }

    async fn read(&self) -> Result<Contents, BadTls> {
        Ok(Contents {
            certificate: read(&self.certificate).await?,
            key: read(&self.key).await?,
            client_ca: read_maybe(self.client_ca.as_deref()).await?,
            client_crl: read_maybe(self.client_crl.as_deref()).await?,
        })
    }
}

async fn read(path: &Path) -> Result<Vec<u8>, BadTls> {
    tokio::fs::read(path).await.map_err(|error| {
        let path = path.display();
        BadTls(match error.kind() {
            io::ErrorKind::NotFound => {
                format!("{path} does not exist: run `muster tls init`, or name your own files in [tls]")
            }
            _ => format!("{path} cannot be read: {error}"),
        })
    })
}

async fn read_maybe(path: Option<&Path>) -> Result<Option<Vec<u8>>, BadTls> {
    match path {
        Some(path) => read(path).await.map(Some),
        None => Ok(None),
    }
}

/// What the files hold.
#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
    client_crl: Option<Vec<u8>>,
}

/// Why TLS cannot be spoken, in one line that says what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("tls: {0}")]
pub struct BadTls(String);

impl BadTls {
    fn of(file: &Path, error: impl fmt::Display) -> Self {
        Self(format!("{}: {error}", file.display()))
    }
}

/// TLS as the broker speaks it now.
pub(crate) struct Tls {
    files: TlsFiles,
    reload_every: Duration,
    provider: Arc<CryptoProvider>,
    ticketer: Arc<dyn ProducesTickets>,
    in_force: RwLock<Arc<InForce>>,
    metrics: Metrics,
}

/// What was made of the files.
struct InForce {
    acceptor: TlsAcceptor,
    authorities: Option<Arc<dyn ClientCertVerifier>>,
    not_after: DateTime<Utc>,
}

impl Tls {
    /// Reads the files and starts to watch them.
    pub(crate) async fn start(settings: &config::Tls, data_dir: &Path, metrics: &Metrics) -> Result<Arc<Self>, BadTls> {
        let files = TlsFiles::of(settings, data_dir);
        let provider = Arc::new(aws_lc_rs::default_provider());
        let ticketer = aws_lc_rs::Ticketer::new().map_err(|error| BadTls(format!("no tickets: {error}")))?;
        let contents = files.read().await?;
        let in_force = InForce::new(&contents, &files, &provider, &ticketer)?;
        metrics.tls_certificate_expires.set(in_force.not_after.timestamp());
        let tls = Arc::new(Self {
            files,
            reload_every: Duration::from_secs(settings.reload_s),
            provider,
            ticketer,
            in_force: RwLock::new(Arc::new(in_force)),
            metrics: metrics.clone(),
        });
        tokio::spawn(watch(Arc::downgrade(&tls), contents));
        Ok(tls)
    }

    /// Shakes hands with a client until `due`; gives the socket and the certificates it showed, its own first. `None`: it was
    /// sent away.
    pub(crate) async fn handshake(&self, socket: TcpStream, due: Instant) -> Option<(Socket, Option<Chain>)> {
        let acceptor = self.in_force.read().acceptor.clone();
        match timeout_at(due, acceptor.accept(socket)).await {
            Ok(Ok(stream)) => {
                let chain = stream.get_ref().1.peer_certificates();
                let chain = chain.map(|chain| chain.iter().map(|one| one.to_vec()).collect());
                Some((Socket::boxed(stream), chain))
            }
            Ok(Err(error)) => {
                tracing::debug!(%error, "no TLS handshake");
                self.metrics.early_ends.with_label_values(&["tls handshake"]).inc();
                None
            }
            Err(_) => {
                self.metrics.hit(Limit::ConnectTimeout);
                None
            }
        }
    }

    /// Whether an authority of the settings signed this certificate for a client, now and through this chain, and did not take
    /// it back.
    pub(crate) fn vouches_for(&self, chain: &[Vec<u8>], now: DateTime<Utc>) -> bool {
        let authorities = self.in_force.read().authorities.clone();
        authorities.is_some_and(|authorities| is_verified(&*authorities, chain, now))
    }

    /// Whether this authority, in DER, signed this certificate for a client, now and through this chain.
    pub(crate) fn is_signed_by(&self, authority: &[u8], chain: &[Vec<u8>], now: DateTime<Utc>) -> bool {
        let mut roots = RootCertStore::empty();
        if let Err(error) = roots.add(CertificateDer::from(authority)) {
            tracing::warn!(%error, "a registered authority cannot be used");
            return false;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), self.provider.clone()).build();
        verifier.is_ok_and(|verifier| is_verified(&*verifier, chain, now))
    }

    /// Takes up the files if they have changed since they were `seen`.
    async fn refresh(&self, seen: &mut Contents) {
        let taken = match self.files.read().await {
            Ok(contents) if contents == *seen => return,
            Ok(contents) => {
                let taken = InForce::new(&contents, &self.files, &self.provider, &self.ticketer);
                *seen = contents;
                taken
            }
            Err(error) => Err(error),
        };
        match taken {
            Ok(in_force) => {
                tracing::info!(not_after = %in_force.not_after, "new TLS files are in force");
                self.metrics.tls_reloads.with_label_values(&["taken"]).inc();
                self.metrics.tls_broken.set(0);
                self.metrics.tls_certificate_expires.set(in_force.not_after.timestamp());
                *self.in_force.write() = Arc::new(in_force);
            }
            Err(error) => {
                tracing::warn!(%error, "the new TLS files cannot be used; the last good ones stay in force");
                self.metrics.tls_reloads.with_label_values(&["refused"]).inc();
                self.metrics.tls_broken.set(1);
            }
        }
    }
}

fn is_verified(authorities: &dyn ClientCertVerifier, chain: &[Vec<u8>], now: DateTime<Utc>) -> bool {
    let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let Some((own, others)) = chain.split_first() else { return false };
    let now = UnixTime::since_unix_epoch(Duration::from_secs(u64::try_from(now.timestamp()).unwrap_or(0)));
    let verified = authorities.verify_client_cert(own, others, now);
    verified.inspect_err(|error| tracing::debug!(%error, "no authority vouches for a certificate")).is_ok()
}

/// The certificates a client showed, in DER, its own first.
pub(crate) type Chain = Box<[Vec<u8>]>;

/// Looks after the files for as long as somebody speaks TLS.
async fn watch(tls: std::sync::Weak<Tls>, mut seen: Contents) {
    let Some(every) = tls.upgrade().map(|tls| tls.reload_every) else { return };
    let mut ticks = interval_at(Instant::now() + every, every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let Some(tls) = tls.upgrade() else { return };
        tls.refresh(&mut seen).await;
    }
}

impl InForce {
    fn new(
        contents: &Contents,
        files: &TlsFiles,
        provider: &Arc<CryptoProvider>,
        ticketer: &Arc<dyn ProducesTickets>,
    ) -> Result<Self, BadTls> {
        let chain = certificates(&contents.certificate, &files.certificate)?;
        let own = Certificate::from_der(&chain[0]).map_err(|error| BadTls::of(&files.certificate, error))?;
        let key = PrivateKeyDer::from_pem_slice(&contents.key)
            .map_err(|error| BadTls::of(&files.key, format!("expected a private key in PEM: {error:?}")))?;
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(rustls::ALL_VERSIONS)
            .map_err(|error| BadTls(error.to_string()))?
            .with_client_cert_verifier(Arc::new(AnyCertificate(provider.clone())))
            .with_single_cert(chain, key)
            .map_err(|error| BadTls(format!("{} and {}: {error}", files.certificate.display(), files.key.display())))?;
        config.ticketer = ticketer.clone();
        config.send_tls13_tickets = TICKETS;
        let authorities = match (&contents.client_ca, &files.client_ca) {
            (Some(pem), Some(file)) => Some(authorities(pem, file, contents, files, provider)?),
            _ => None,
        };
        Ok(Self { acceptor: TlsAcceptor::from(Arc::new(config)), authorities, not_after: own.not_after })
    }
}

/// The certificates of a PEM file: at least one.
fn certificates(pem: &[u8], file: &Path) -> Result<Vec<CertificateDer<'static>>, BadTls> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if !found.is_empty() => Ok(found),
        Ok(_) => Err(BadTls::of(file, "expected a certificate in PEM, found none")),
        Err(error) => Err(BadTls::of(file, format!("expected certificates in PEM: {error:?}"))),
    }
}

/// What asks the authorities; a certificate on which no list says anything is good.
fn authorities(
    pem: &[u8],
    file: &Path,
    contents: &Contents,
    files: &TlsFiles,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, BadTls> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem, file)? {
        roots.add(certificate).map_err(|error| BadTls::of(file, error))?;
    }
    let mut builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
    if let (Some(pem), Some(file)) = (&contents.client_crl, &files.client_crl) {
        let lists: Result<Vec<_>, _> = CertificateRevocationListDer::pem_slice_iter(pem).collect();
        let lists = lists.map_err(|error| BadTls::of(file, format!("expected revocation lists in PEM: {error:?}")))?;
        builder = builder.with_crls(lists).only_check_end_entity_revocation().allow_unknown_revocation_status();
    }
    builder.build().map_err(|error| BadTls::of(file, error))
}

/// Takes any certificate that can be read, from whoever holds its key: what it is worth is decided later.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        own: &CertificateDer<'_>,
        _others: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        ParsedCertificate::try_from(own).map(|_| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, own, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        own: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, own, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}
