//! Clients come in by TLS, with and without certificates, by WebSocket and through proxies, as they do by TCP.

mod authorities;
mod certificates;
mod proxy;
mod renewal;
mod tls;
mod websocket;

use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use crate::harness::client::Client;
use crate::harness::packet::{Connect, Publish};
use crate::harness::pki::{self, Authority, Identity, VERSIONS};
use crate::harness::raw::Version;
use crate::harness::{Device, Fleet};

/// A server with TLS: its own certificate from one authority, its devices' from another.
pub(crate) struct Secure {
    pub(crate) fleet: Fleet,
    servers: Authority,
    pub(crate) devices: Authority,
    dir: TempDir,
}

impl Secure {
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    pub(crate) async fn start_with(settings: &[(&str, &str)]) -> Self {
        let (servers, devices) = (Authority::new("servers"), Authority::new("devices"));
        let dir = tempfile::tempdir().expect("a directory");
        servers.server().write(dir.path(), "server");
        std::fs::write(dir.path().join("devices-ca.pem"), &devices.certificate).expect("a file");
        let file = |name: &str| dir.path().join(name).display().to_string();
        let (certificate, key, client_ca) = (file("server.pem"), file("server-key.pem"), file("devices-ca.pem"));
        let mut all = vec![
            ("MUSTER__MQTT__TLS_LISTEN", "127.0.0.1:0"),
            ("MUSTER__TLS__CERTIFICATE", &certificate),
            ("MUSTER__TLS__KEY", &key),
            ("MUSTER__TLS__CLIENT_CA", &client_ca),
            ("MUSTER__TLS__RELOAD_S", "1"),
        ];
        all.extend(settings);
        let fleet = Fleet::start_with(&all).await;
        Self { fleet, servers, devices, dir }
    }

    /// A directory for files of the test.
    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Whom clients must trust, as a file.
    pub(crate) fn ca_file(&self) -> PathBuf {
        let file = self.path().join("servers-ca.pem");
        std::fs::write(&file, &self.servers.certificate).expect("the directory can be written");
        file
    }

    /// An encrypted connection on which nothing was said.
    pub(crate) async fn tls(&self, identity: Option<&Identity>) -> TlsStream<TcpStream> {
        let connected = pki::connect(self.fleet.mqtts_addr(), &self.servers.certificate, identity, &VERSIONS).await;
        connected.expect("the handshake succeeds")
    }

    /// What a CONNECT is answered.
    async fn hello(&self, identity: Option<&Identity>, connect: &Connect) -> (Client, u8) {
        let (client, answer) = Client::hello(Box::new(self.tls(identity).await), connect).await;
        (client, answer.code)
    }

    /// What a client is answered that shows a certificate and says no word about itself.
    async fn shows(&self, identity: &Identity, version: Version) -> u8 {
        self.hello(Some(identity), &Connect::new(version, "", None)).await.1
    }
}

/// A CONNECT with the device's user name and password.
pub(crate) fn with_password(version: Version, device: &Device) -> Connect {
    Connect::new(version, &device.id, Some((device.username.clone(), device.password.clone())))
}

fn reading(device: &Device, value: i64) -> Publish {
    let payload = format!(r#"{{"ts":{},"seq":{value},"values":{{"t":{value}}}}}"#, 1_763_692_212_000_i64 + value);
    Publish::new(device.topic("telemetry"), payload).qos(1)
}
