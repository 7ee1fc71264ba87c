//! Connections with TLS, each with a full handshake and a CONNECT, and closed again.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::sleep;
use tokio_rustls::TlsConnector;

use super::{Figures, Stage, What, cpu};
use crate::frame::{GOODBYE, Session};
use crate::generator::{Identity, welcome};
use crate::server::{Certificate, Kind, Server};

/// Clients at once: enough for a server that waits for its clients' acknowledgements of TCP.
const CLIENTS: usize = 64;

pub(super) async fn handshakes(stage: &Stage<'_>, kind: Kind) -> anyhow::Result<Figures> {
    let server = stage.start_with_tls(kind).await?;
    let comings = Arc::new(Comings {
        connector: connector(&stage.certificate)?,
        server: server.mqtts,
        identities: stage.identities.clone(),
        next: AtomicUsize::new(0),
        done: AtomicU64::new(0),
    });
    let mut tasks = JoinSet::new();
    for _ in 0..CLIENTS {
        let comings = comings.clone();
        tasks.spawn(async move { comings.go_on().await });
    }
    let figures = tokio::select! {
        figures = measure(&server, &comings, stage.plan.lasts) => figures,
        Some(ended) = tasks.join_next() => {
            ended?.context("a handshake failed")?;
            unreachable!("it goes on until it fails")
        }
    };
    tasks.abort_all();
    server.stop().await?;
    ensure!(figures.iter().all(|(_, value)| *value > 0.0), "no handshake at all");
    Ok(figures)
}

async fn measure(server: &Server, comings: &Comings, lasts: Duration) -> Figures {
    sleep(Duration::from_millis(500)).await;
    let (at, spent, count) = (Instant::now(), cpu(server), comings.done.load(Ordering::Relaxed));
    sleep(lasts).await;
    let count = (comings.done.load(Ordering::Relaxed) - count) as f64;
    let (took, spent) = (at.elapsed(), cpu(server).saturating_sub(spent));
    vec![
        (What::Handshakes, count / took.as_secs_f64()),
        (What::HandshakeCpu, spent.as_secs_f64() * 1e6 / count.max(1.0)),
    ]
}

/// TLS 1.3 without tickets: every handshake is a full one.
fn connector(certificate: &Certificate) -> anyhow::Result<TlsConnector> {
    let mut roots = RootCertStore::empty();
    for authority in CertificateDer::pem_file_iter(&certificate.authority)? {
        roots.add(authority?)?;
    }
    let builder = ClientConfig::builder_with_protocol_versions(&[&rustls::version::TLS13]);
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.resumption = rustls::client::Resumption::disabled();
    Ok(TlsConnector::from(Arc::new(config)))
}

struct Comings {
    connector: TlsConnector,
    server: std::net::SocketAddr,
    identities: Vec<Identity>,
    next: AtomicUsize,
    done: AtomicU64,
}

impl Comings {
    /// Comes and goes, each time as somebody else, so that nobody comes too often.
    async fn go_on(&self) -> io::Result<()> {
        loop {
            let place = self.next.fetch_add(1, Ordering::Relaxed) % self.identities.len();
            self.come(&self.identities[place]).await?;
            self.done.fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn come(&self, identity: &Identity) -> io::Result<()> {
        let socket = TcpStream::connect(self.server).await?;
        socket.set_nodelay(true)?;
        let name = ServerName::from(self.server.ip());
        let mut socket = self.connector.connect(name, socket).await?;
        welcome(&mut socket, identity, Session::Clean).await?;
        socket.write_all(&GOODBYE).await?;
        socket.shutdown().await
    }
}
