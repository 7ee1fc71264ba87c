//! `muster sim`: a simulated fleet, and the ledger that proves nothing was lost.
//!
//! Exit codes: 0 every acknowledged reading is there once · 1 one is missing or doubled · 2 bad usage · 6 the run could
//! not be made or checked (the server is away, the login is wrong, a file cannot be written).

use std::fmt::Display;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use device_sim::ledger::{Ledger, Verdict};
use device_sim::rest::Client;
use device_sim::{Access, Error, Faults, Phase, Progress, Scenario};
use indicatif::{ProgressBar, ProgressStyle};
use tokio_util::sync::CancellationToken;

/// An acknowledged reading is missing or doubled.
const BROKEN: u8 = 1;
/// The command line asks for something out of bounds.
const USAGE: u8 = 2;
/// Nothing was found out.
const FAILED: u8 = 6;

/// Run simulated devices, then check that every acknowledged reading is there once.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    load: Load,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a ledger written earlier with --ledger.
    Verify {
        /// The ledger.
        file: PathBuf,
        #[command(flatten)]
        server: Server,
        /// Print the verdict as JSON.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Debug, clap::Args)]
struct Load {
    /// Simulated devices.
    #[arg(long, default_value_t = 100, value_name = "N")]
    devices: u32,
    /// Readings a second of all devices together.
    #[arg(long, default_value_t = 100.0, value_name = "R")]
    rate: f64,
    /// Log lines a second of all devices together.
    #[arg(long, default_value_t = 0.0, value_name = "R")]
    log_rate: f64,
    /// For how long: 500ms, 30s, 5m, 2h, 1d.
    #[arg(long, default_value = "30s", value_parser = duration, value_name = "TIME")]
    duration: Duration,
    /// Length of a payload in bytes; never shorter than its values.
    #[arg(long, default_value_t = 200, value_name = "B")]
    payload_bytes: usize,
    /// The same seed gives the same devices, values and faults.
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Connections cut without a DISCONNECT, a minute, of all devices together.
    #[arg(long, default_value_t = 0.0, value_name = "R")]
    reconnects_per_minute: f64,
    /// Share of readings sent a second time after their acknowledgement.
    #[arg(long, default_value_t = Faults::default().duplicates, value_name = "SHARE")]
    duplicates: f64,
    /// Share of readings that later ones overtake.
    #[arg(long, default_value_t = Faults::default().late, value_name = "SHARE")]
    late: f64,
    /// Where the devices connect.
    #[arg(long, default_value = "127.0.0.1:1883", value_name = "HOST:PORT")]
    mqtt: String,
    /// Write every acknowledged reading to this file as it arrives.
    #[arg(long, value_name = "FILE")]
    ledger: Option<PathBuf>,
    /// Delete the devices at the end.
    #[arg(long)]
    cleanup: bool,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: Server,
}

/// Where REST is, and who asks.
#[derive(Debug, clap::Args)]
struct Server {
    /// Where REST is.
    #[arg(long, default_value = "http://127.0.0.1:8080")]
    url: String,
    /// Who enrols the devices and reads back.
    #[arg(long, env = "MUSTER_ADMIN_EMAIL", default_value = "admin@example.com")]
    email: String,
    /// The password; better in the environment than on the command line.
    #[arg(long, env = "MUSTER_ADMIN_PASSWORD", hide_env_values = true)]
    password: Option<Password>,
}

/// A password that is never printed.
#[derive(Clone)]
struct Password(String);

impl From<String> for Password {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl std::fmt::Debug for Password {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

impl Server {
    fn access(&self) -> Result<Access, Error> {
        let missing = || Error::Invalid("a password is needed: expected --password or MUSTER_ADMIN_PASSWORD".into());
        let password = self.password.clone().ok_or_else(missing)?.0;
        Ok(Access::Password { email: self.email.clone(), password })
    }
}

/// Runs the command; what goes wrong is printed here, in one line.
///
/// # Errors
/// Only when the report cannot be written as JSON.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let (holds, text) = match args.command {
        Some(Command::Verify { file, server, json }) => match verify(&file, &server).await {
            Ok(verdict) if json => (verdict.holds(), serde_json::to_string_pretty(&verdict)?),
            Ok(verdict) => (verdict.holds(), table(&verdict)),
            Err(error) => return Ok(failed(&error)),
        },
        None => match load(&args.load).await {
            Ok(report) if args.load.json => (report.holds(), serde_json::to_string_pretty(&report)?),
            Ok(report) => (report.holds(), report.to_string()),
            Err(error) => return Ok(failed(&error)),
        },
    };
    println!("{text}");
    Ok(if holds { ExitCode::SUCCESS } else { ExitCode::from(BROKEN) })
}

fn failed(error: &Error) -> ExitCode {
    eprintln!("error: {error}");
    ExitCode::from(if matches!(error, Error::Invalid(_)) { USAGE } else { FAILED })
}

async fn load(load: &Load) -> Result<device_sim::Report, Error> {
    let scenario = Scenario {
        url: load.server.url.clone(),
        mqtt: load.mqtt.clone(),
        access: load.server.access()?,
        devices: load.devices,
        rate: load.rate,
        log_rate: load.log_rate,
        duration: load.duration,
        payload_bytes: load.payload_bytes,
        seed: load.seed,
        faults: Faults {
            reconnects_per_minute: load.reconnects_per_minute,
            duplicates: load.duplicates,
            late: load.late,
        },
        ledger: load.ledger.clone(),
        cleanup: load.cleanup,
    };
    let cancel = CancellationToken::new();
    let interrupted = cancel.clone();
    let watcher = tokio::spawn(async move {
        if tokio::signal::ctrl_c().await.is_ok() {
            interrupted.cancel();
        }
    });
    let bar = Bar::default();
    let report = scenario.run(cancel, |progress| bar.show(progress)).await;
    watcher.abort();
    bar.0.finish_and_clear();
    report
}

async fn verify(file: &std::path::Path, server: &Server) -> Result<Verdict, Error> {
    let ledger = Ledger::read(file)?;
    let client = Client::connect(&server.url, server.access()?).await?;
    let bar = Bar::default();
    bar.0.set_length(ledger.devices().count() as u64);
    let verdict = ledger.verify(&client, |done| bar.0.set_position(done as u64)).await;
    bar.0.finish_and_clear();
    verdict
}

fn table(verdict: &Verdict) -> String {
    let row = |name: &str, value: &dyn Display| format!("{name:<22}{value:>12}\n");
    let rows = [
        row("acknowledged", &verdict.acknowledged),
        row("found", &verdict.found),
        row("missing", &verdict.missing),
        row("duplicated", &verdict.duplicated),
        row("found, never acked", &verdict.unacknowledged),
    ];
    let examples = verdict.examples.iter().map(|example| format!("{example}\n"));
    let end = if verdict.holds() { "every acknowledged reading is there once" } else { "THE PROMISE IS BROKEN" };
    rows.into_iter().chain(examples).chain([format!("ledger: {end}")]).collect()
}

/// A progress bar on standard error; hidden when that is no terminal.
struct Bar(ProgressBar);

impl Default for Bar {
    fn default() -> Self {
        let style = ProgressStyle::with_template("{prefix:10} {bar:30} {percent:>3}% {msg}");
        Self(ProgressBar::new(1).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar())))
    }
}

impl Bar {
    fn show(&self, progress: Progress) {
        self.0.set_prefix(match progress.phase {
            Phase::Enrolling => "enrolling",
            Phase::Running => "running",
            Phase::Draining => "draining",
            Phase::Verifying => "verifying",
            Phase::Cleaning => "cleaning",
        });
        self.0.set_length(progress.total);
        self.0.set_position(progress.done);
        let (online, sent, acknowledged) = (progress.online, progress.sent, progress.acknowledged);
        self.0.set_message(format!("{online} online, {sent} sent, {acknowledged} acknowledged"));
    }
}

/// `500ms`, `30s`, `5m`, `2h`, `1d`.
fn duration(text: &str) -> Result<Duration, String> {
    let expected = || "expected a number and a unit: 500ms, 30s, 5m, 2h, 1d".to_owned();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let unit_ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(expected()),
    };
    let ms = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit_ms));
    ms.map(Duration::from_millis).ok_or_else(expected)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(std::iter::once("sim").chain(line.split_whitespace()))
    }

    #[test]
    fn the_command_line_is_read() {
        let args = parse("--devices 7 --rate 12.5 --duration 2m --ledger f --json --password x").unwrap();
        assert_eq!((args.load.devices, args.load.duration), (7, Duration::from_mins(2)));
        assert!(!format!("{args:?}").contains("\"x\""), "{args:?}");
        let verify = parse("verify some-file --url http://h:1").unwrap();
        assert!(matches!(verify.command, Some(Command::Verify { file, .. }) if *file == *"some-file"));
        for wrong in ["--duration 5", "--duration 5w", "--devices many", "--nosuch", "verify", "--json verify f"] {
            assert_eq!(parse(wrong).unwrap_err().exit_code(), i32::from(USAGE), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn a_duration_is_read_as_it_was_written(number in 0_u64..1_000_000, unit in prop::sample::select(vec!["ms", "s", "m", "h", "d"])) {
            let of_one = duration(&format!("1{unit}")).unwrap();
            prop_assert_eq!(duration(&format!("{number}{unit}")).unwrap(), of_one * u32::try_from(number).unwrap());
        }

        #[test]
        fn no_duration_panics(text: String) {
            let _ = duration(&text);
        }
    }
}
