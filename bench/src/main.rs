//! Muster measured beside mosquitto, rumqttd and psql; everything on loopback, bounded, and ended by itself.

mod broker;
mod frame;
mod generator;
mod logs;
mod process;
mod report;
mod scenes;
mod server;
mod writers;

use std::fs::{self, DirBuilder};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use server::Kind;

// As the server has it: what is measured in this process is the server's code.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Muster measured beside mosquitto, rumqttd and psql.
#[derive(Parser)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Everything, written to the file of results.
    All {
        #[command(flatten)]
        broker: BrokerArgs,
        #[command(flatten)]
        scenes: SceneArgs,
        #[command(flatten)]
        writers: WriterArgs,
        #[command(flatten)]
        logs: LogArgs,
        /// Where the section is written.
        #[arg(long, default_value = "docs/benchmarks.md")]
        out: PathBuf,
    },
    /// Brokers only, printed.
    Broker(BrokerArgs),
    /// Connections, kept sessions, deliveries and handshakes only, printed.
    Scenes(SceneOnlyArgs),
    /// Writers only, printed.
    Writers(WriterArgs),
    /// Log lines only, printed.
    Logs(LogOnlyArgs),
    /// Serve MQTT with rumqttd until killed.
    Rumqttd {
        /// On 127.0.0.1.
        #[arg(long)]
        port: u16,
    },
}

#[derive(clap::Args)]
struct BrokerArgs {
    /// The release binary of Muster.
    #[arg(long, default_value = "target/release/muster")]
    muster: PathBuf,
    /// Servers to measure, in this order.
    #[arg(long, value_delimiter = ',', default_value = "muster,mosquitto,rumqttd", value_parser = kind)]
    servers: Vec<Kind>,
    /// Numbers of clients; below 20,000, the limit of file descriptors.
    #[arg(long, value_delimiter = ',', default_value = "1000,10000")]
    clients: Vec<usize>,
    /// Rounds of every server under every number of clients.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Length of the closed loop, in seconds.
    #[arg(long, default_value_t = 10)]
    load_s: u64,
    /// Length of the open loop, in seconds.
    #[arg(long, default_value_t = 6)]
    latency_s: u64,
}

#[derive(clap::Args)]
struct WriterArgs {
    /// Alternations of write path and `\copy`.
    #[arg(long, default_value_t = 3)]
    writer_rounds: usize,
    /// Rows of each.
    #[arg(long, default_value_t = 400_000)]
    rows: usize,
}

#[derive(clap::Args)]
struct LogArgs {
    /// Log lines that are searched beside PostgreSQL.
    #[arg(long, default_value_t = 1_000_000)]
    lines: usize,
    /// Log lines more, over which a percentile is taken.
    #[arg(long, default_value_t = 4_000_000)]
    more_lines: usize,
    /// How often each question is asked.
    #[arg(long, default_value_t = 15)]
    times: usize,
}

#[derive(clap::Args)]
struct LogOnlyArgs {
    /// The release binary of Muster.
    #[arg(long, default_value = "target/release/muster")]
    muster: PathBuf,
    #[command(flatten)]
    logs: LogArgs,
}

impl LogArgs {
    fn plan(&self) -> logs::Plan {
        logs::Plan { lines: self.lines, many: self.more_lines, times: self.times }
    }
}

#[derive(clap::Args)]
struct SceneArgs {
    /// What is played beside mosquitto.
    #[arg(long, value_delimiter = ',', default_value = "idle,kept,fan-out,shared,handshakes", value_parser = scene)]
    scenes: Vec<scenes::Scene>,
    /// Connections of the ramp, and kept sessions; below 19,000, the limit of file descriptors.
    #[arg(long, default_value_t = 10_000)]
    connections: usize,
    /// Subscribers of the one topic of the fan-out.
    #[arg(long, default_value_t = 1_000)]
    subscribers: usize,
    /// Members of the shared subscription.
    #[arg(long, default_value_t = 10)]
    consumers: usize,
    /// Rounds of each of both servers.
    #[arg(long, default_value_t = 3)]
    scene_rounds: usize,
    /// Length of what is counted by the second, in seconds.
    #[arg(long, default_value_t = 5)]
    scene_s: u64,
}

#[derive(clap::Args)]
struct SceneOnlyArgs {
    /// The release binary of Muster.
    #[arg(long, default_value = "target/release/muster")]
    muster: PathBuf,
    #[command(flatten)]
    scenes: SceneArgs,
}

fn scene(name: &str) -> Result<scenes::Scene, String> {
    let found = scenes::SCENES.into_iter().find(|(known, _)| *known == name);
    let known = || scenes::SCENES.map(|(known, _)| known).join(", ");
    found.map(|(_, scene)| scene).ok_or_else(|| format!("expected some of {}", known()))
}

fn kind(name: &str) -> Result<Kind, String> {
    match name {
        "muster" => Ok(Kind::Muster),
        "mosquitto" => Ok(Kind::Mosquitto),
        "rumqttd" => Ok(Kind::Rumqttd),
        _ => Err("expected muster, mosquitto or rumqttd".into()),
    }
}

impl BrokerArgs {
    fn plan(self) -> broker::Plan {
        broker::Plan {
            muster: self.muster,
            kinds: self.servers,
            clients: self.clients,
            rounds: self.rounds,
            load: Duration::from_secs(self.load_s),
            latency: Duration::from_secs(self.latency_s),
        }
    }
}

impl SceneArgs {
    fn plan(self, muster: PathBuf) -> scenes::Plan {
        scenes::Plan {
            muster,
            scenes: self.scenes,
            connections: self.connections,
            subscribers: self.subscribers,
            consumers: self.consumers,
            rounds: self.scene_rounds,
            lasts: Duration::from_secs(self.scene_s),
        }
    }
}

fn main() -> anyhow::Result<()> {
    let command = match Args::parse().command {
        // Blocks for good and brings a runtime of its own.
        Command::Rumqttd { port } => return server::rumqttd(port),
        command => command,
    };
    let _already = rustls::crypto::aws_lc_rs::default_provider().install_default();
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(run(command))
}

async fn run(command: Command) -> anyhow::Result<()> {
    let dir = Scratch::new()?;
    let started = Instant::now();
    let load_before = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load_before = load_before.split(' ').next().unwrap_or("unknown").to_owned();
    let mut findings = report::Findings { load_before, ..report::Findings::default() };
    let mut target = None;
    match command {
        Command::All { broker, scenes, writers, logs, out } => {
            let scenes = scenes.plan(broker.muster.clone());
            findings.writers = writers::run(&dir.0, writers.writer_rounds, writers.rows).await?;
            findings.logs = logs::run(&broker.muster, &dir.0, logs.plan()).await?;
            findings.scenes = scenes::run(&scenes, &dir.0).await?;
            findings.broker = broker::run(&broker.plan(), &dir.0).await?;
            target = Some(out);
        }
        Command::Broker(args) => findings.broker = broker::run(&args.plan(), &dir.0).await?,
        Command::Scenes(args) => findings.scenes = scenes::run(&args.scenes.plan(args.muster), &dir.0).await?,
        Command::Writers(args) => findings.writers = writers::run(&dir.0, args.writer_rounds, args.rows).await?,
        Command::Logs(args) => findings.logs = logs::run(&args.muster, &dir.0, args.logs.plan()).await?,
        Command::Rumqttd { .. } => return Ok(()),
    }
    let command = std::env::args().skip(1).collect::<Vec<_>>().join(" ");
    findings.command = if target.is_some() { "make bench".to_owned() } else { format!("bench {command}") };
    findings.took = started.elapsed();
    println!("{}", report::section(&findings));
    target.map_or(Ok(()), |out| report::write(&out, &findings))
}

/// A directory for this run; it goes with it. The account of the database must be able to pass through.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Self> {
        let path = std::env::temp_dir().join(format!("muster-bench-{}", std::process::id()));
        DirBuilder::new().mode(0o755).create(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let path: &Path = &self.0;
        if let Err(error) = fs::remove_dir_all(path) {
            eprintln!("{} stays: {error}", path.display());
        }
    }
}
