//! The servers under test: started, watched and stopped by process id; all on loopback.

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
    /// REST and metrics, of Muster.
    pub(crate) url: Option<String>,
}

impl Server {
    /// Starts a server whose files live in `dir`, and waits until it takes connections.
    pub(crate) async fn start(kind: Kind, dir: &Path, muster: &Path) -> anyhow::Result<Self> {
        let mqtt = free_port()?;
        let http = free_port()?;
        let log = dir.join(format!("{kind:?}.log"));
        let mut command = match kind {
            Kind::Muster => muster_command(muster, dir, mqtt, http),
            Kind::Mosquitto => mosquitto_command(dir, mqtt)?,
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
        let mut server = Self { child, log, pid, mqtt, url };
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

fn muster_command(program: &Path, dir: &Path, mqtt: SocketAddr, http: SocketAddr) -> Command {
    let mut command = Command::new(program);
    command
        .arg("serve")
        .env_remove("DATABASE_URL")
        .env_remove("MUSTER_CONFIG")
        .env("MUSTER__DATA_DIR", dir.join("muster"))
        .env("MUSTER__HTTP__LISTEN", http.to_string())
        .env("MUSTER__MQTT__LISTEN", mqtt.to_string())
        .env("MUSTER__LOG__FILTER", "warn")
        .env("MUSTER_ADMIN_EMAIL", EMAIL)
        .env("MUSTER_ADMIN_PASSWORD", PASSWORD);
    command
}

/// Everything as shipped but where it listens, and nothing on disk.
fn mosquitto_command(dir: &Path, mqtt: SocketAddr) -> anyhow::Result<Command> {
    let config = dir.join("mosquitto.conf");
    let text =
        format!("listener {} {}\nallow_anonymous true\npersistence false\nlog_dest none\n", mqtt.port(), mqtt.ip());
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
