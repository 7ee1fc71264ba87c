//! The servers under test: started, watched and stopped by process id; all on loopback.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::time::{sleep, timeout};

use crate::process;

/// The administrator of the Muster under test.
pub(crate) const EMAIL: &str = "bench@example.com";
pub(crate) const PASSWORD: &str = "bench-only-on-loopback";
const START_WITHIN: Duration = Duration::from_secs(90);
const STOP_WITHIN: Duration = Duration::from_mins(1);

/// Which server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Durable: acknowledged means committed in PostgreSQL.
    Muster,
    /// In memory.
    Mosquitto,
    /// In memory.
    Rumqttd,
}

impl Kind {
    /// In the order of the rounds.
    pub(crate) const ALL: [Self; 3] = [Self::Muster, Self::Mosquitto, Self::Rumqttd];

    /// As it stands in the tables.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Muster => "Muster, durable",
            Self::Mosquitto => "mosquitto, memory",
            Self::Rumqttd => "rumqttd 0.20, memory",
        }
    }
}

/// A running server.
pub(crate) struct Server {
    child: Child,
    log: PathBuf,
    pub(crate) pid: u32,
    pub(crate) mqtt: SocketAddr,
    /// With TLS, when it was started with [`Extra::tls`].
    pub(crate) mqtts: SocketAddr,
    /// REST and metrics, of Muster.
    pub(crate) url: Option<String>,
}

/// What differs from a server as it is shipped.
#[derive(Debug, Default)]
pub(crate) struct Extra {
    /// Files of a certificate and its key: a second listener speaks TLS.
    pub(crate) tls: Option<Certificate>,
    /// Connections beyond what Muster takes as shipped, at once and in a burst.
    pub(crate) connections: Option<usize>,
}

/// Files of PEM.
#[derive(Debug, Clone)]
pub(crate) struct Certificate {
    pub(crate) chain: PathBuf,
    pub(crate) key: PathBuf,
    /// Who vouches for it.
    pub(crate) authority: PathBuf,
}

impl Certificate {
    /// What `muster tls init` makes, the same for all servers.
    pub(crate) async fn make(muster: &Path, dir: &Path) -> anyhow::Result<Self> {
        let mut command = Command::new(muster);
        let made = plain(&mut command).args(["tls", "init"]).env("MUSTER__DATA_DIR", dir.join("muster")).output();
        let made = made.await.context("muster tls init")?;
        let tls = dir.join("muster/tls");
        let files =
            Self { chain: tls.join("server.pem"), key: tls.join("server-key.pem"), authority: tls.join("ca.pem") };
        if !files.chain.exists() {
            bail!("muster tls init: {}", String::from_utf8_lossy(&made.stderr));
        }
        Ok(files)
    }
}

impl Server {
    /// Starts a server whose files live in `dir`, and waits until it takes connections.
    pub(crate) async fn start(kind: Kind, dir: &Path, muster: &Path) -> anyhow::Result<Self> {
        Self::start_with(kind, dir, muster, &Extra::default()).await
    }

    /// The same, not quite as shipped.
    pub(crate) async fn start_with(kind: Kind, dir: &Path, muster: &Path, extra: &Extra) -> anyhow::Result<Self> {
        let (mqtt, mqtts, http) = (free_port()?, free_port()?, free_port()?);
        let log = dir.join(format!("{kind:?}.log"));
        let mut command = match kind {
            Kind::Muster => muster_command(muster, dir, [mqtt, mqtts, http], extra),
            Kind::Mosquitto => mosquitto_command(dir, [mqtt, mqtts], extra)?,
            Kind::Rumqttd => {
                let mut command = Command::new(std::env::current_exe()?);
                command.args(["rumqttd", "--port", &mqtt.port().to_string()]);
                command
            }
        };
        let out = File::create(&log)?;
        let child = command.stdin(std::process::Stdio::null()).stdout(out.try_clone()?).stderr(out).kill_on_drop(true);
        let child = child.spawn().with_context(|| format!("{kind:?} cannot be started"))?;
        let pid = child.id().context("the server ended at once")?;
        let url = (kind == Kind::Muster).then(|| format!("http://{http}"));
        let mut server = Self { child, log, pid, mqtt, mqtts, url };
        server.ready().await?;
        Ok(server)
    }

    async fn ready(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + START_WITHIN;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait()? {
                bail!("the server ended with {status}: {}", self.last_words());
            }
            let serves = match &self.url {
                Some(url) => {
                    reqwest::get(format!("{url}/readyz")).await.is_ok_and(|answer| answer.status().is_success())
                }
                None => true,
            };
            if serves && TcpStream::connect(self.mqtt).await.is_ok() {
                return Ok(());
            }
            sleep(Duration::from_millis(50)).await;
        }
        bail!("the server is not ready after {} s: {}", START_WITHIN.as_secs(), self.last_words())
    }

    /// Processor time of its own process, and of its PostgreSQL, if it has one.
    pub(crate) fn cpu(&self) -> (Duration, Duration) {
        (process::cpu(self.pid), process::cpu_of(&process::descendants(self.pid, "postgres")))
    }

    fn last_words(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = log.lines().rev().take(5).collect();
        lines.into_iter().rev().collect::<Vec<_>>().join(" | ")
    }

    /// `/metrics`, of Muster.
    pub(crate) async fn metrics(&self) -> Option<String> {
        let url = self.url.as_ref()?;
        reqwest::get(format!("{url}/metrics")).await.ok()?.text().await.ok()
    }

    /// Asks it to end, waits, and says so if it had to be killed.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        Command::new("kill").args(["-TERM", &self.pid.to_string()]).status().await?;
        if timeout(STOP_WITHIN, self.child.wait()).await.is_err() {
            eprintln!("process {} did not end within {} s and is killed", self.pid, STOP_WITHIN.as_secs());
            self.child.kill().await?;
        }
        Ok(())
    }
}

/// Without the settings of whoever measures.
fn plain(command: &mut Command) -> &mut Command {
    command.env_remove("DATABASE_URL").env_remove("MUSTER_CONFIG")
}

fn muster_command(program: &Path, dir: &Path, [mqtt, mqtts, http]: [SocketAddr; 3], extra: &Extra) -> Command {
    let mut command = Command::new(program);
    plain(&mut command)
        .arg("serve")
        .env("MUSTER__DATA_DIR", dir.join("muster"))
        .env("MUSTER__HTTP__LISTEN", http.to_string())
        .env("MUSTER__MQTT__LISTEN", mqtt.to_string())
        .env("MUSTER__LOG__FILTER", "warn")
        .env("MUSTER_ADMIN_EMAIL", EMAIL)
        .env("MUSTER_ADMIN_PASSWORD", PASSWORD);
    if let Some(tls) = &extra.tls {
        command
            .env("MUSTER__MQTT__TLS_LISTEN", mqtts.to_string())
            .env("MUSTER__TLS__CERTIFICATE", &tls.chain)
            .env("MUSTER__TLS__KEY", &tls.key)
            // Like the others: no certificate is asked of clients.
            .env("MUSTER__TLS__CLIENT_CA", "");
    }
    if let Some(connections) = extra.connections {
        command
            .env("MUSTER__MQTT__MAX_CONNECTIONS", connections.to_string())
            .env("MUSTER__ADMISSION__CONNECTS_BURST", connections.to_string());
    }
    command
}

/// Everything as shipped but where it listens, and nothing on disk.
fn mosquitto_command(dir: &Path, [mqtt, mqtts]: [SocketAddr; 2], extra: &Extra) -> anyhow::Result<Command> {
    let config = dir.join("mosquitto.conf");
    let mut text =
        format!("allow_anonymous true\npersistence false\nlog_dest none\nlistener {} {}\n", mqtt.port(), mqtt.ip());
    if let Some(tls) = &extra.tls {
        // It reads the key after it has given its rights up; whoever is not root is not asked.
        text.insert_str(0, "user root\n");
        writeln!(text, "listener {} {}", mqtts.port(), mqtts.ip())?;
        writeln!(text, "certfile {}\nkeyfile {}", tls.chain.display(), tls.key.display())?;
    }
    fs::write(&config, text)?;
    // Debian keeps it out of the path of users.
    let program = ["/usr/sbin/mosquitto", "/usr/local/sbin/mosquitto"].into_iter().find(|p| Path::new(p).exists());
    let mut command = Command::new(program.unwrap_or("mosquitto"));
    command.arg("-c").arg(config);
    Ok(command)
}

fn free_port() -> std::io::Result<SocketAddr> {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()
}

/// Runs rumqttd in this process until it is killed, with the router and the connection settings of the `rumqttd.toml`
/// it is shipped with.
pub(crate) fn rumqttd(port: u16) -> anyhow::Result<()> {
    let config = serde_json::json!({
        "id": 0,
        "router": {
            "id": 0,
            "max_connections": 10010,
            "max_outgoing_packet_count": 200,
            "max_segment_size": 104_857_600,
            "max_segment_count": 10
        },
        "v4": { "1": {
            "name": "v4-1",
            "listen": format!("127.0.0.1:{port}"),
            "next_connection_delay_ms": 1,
            "connections": {
                "connection_timeout_ms": 60000,
                "max_payload_size": 20480,
                "max_inflight_count": 100,
                "dynamic_filters": true
            }
        }}
    });
    let mut broker = rumqttd::Broker::new(serde_json::from_value(config)?);
    broker.start().context("rumqttd ended")
}
