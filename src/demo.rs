//! `muster demo`: the server with a simulated fleet and a live view, from nothing, in one command.

use std::fs::{self, OpenOptions};
use std::io::{IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, bail};
use device_sim::{Access, Faults, Scenario, Simulation};
use fleet_core::config::Environment;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::serve::{Role, Server, stop_signal};
use crate::settings;

/// How long the devices may take to say good-bye.
const FLEET_STOP_WITHIN: Duration = Duration::from_secs(5);
/// How often the live line is renewed on a terminal.
const LIVE_EVERY: Duration = Duration::from_secs(1);
/// How often a line is written where there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(10);

/// The filter of the default settings, which says more than fits above a live line.
const QUIETED: &str = "info,sqlx=warn";

/// What `muster demo` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Simulated devices.
    #[arg(long, default_value_t = 100)]
    devices: u32,
    /// Readings a second of all devices together.
    #[arg(long, default_value_t = 100.0)]
    rate: f64,
    /// Log lines a second of all devices together.
    #[arg(long, default_value_t = 10.0)]
    log_rate: f64,
}

/// How to log in to the demo; kept beside its data so that a second run knows it.
#[derive(Serialize, Deserialize)]
struct Login {
    email: String,
    password: String,
}

/// Runs the demo until it is told to stop.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut loaded = settings::load()?;
    // The live line is the view; what goes wrong is still said.
    if loaded.config.log.filter == QUIETED {
        "warn".clone_into(&mut loaded.config.log.filter);
    }
    let taken = settings::start_logging(&loaded.config)?;
    let stop = stop_signal()?;
    let login_file = loaded.data_dir.join("demo-login.json");
    let environment = loaded.environment.clone();
    eprintln!("starting the database in {} …", loaded.data_dir.display());
    let server = Server::start(loaded, &Role::ALL, taken).await?;
    let played = match login(&server, &environment, &login_file) {
        Ok(login) => play(&server, &args, &login, &stop).await,
        Err(error) => Err(error),
    };
    server.stop().await;
    played.map(|()| ExitCode::SUCCESS)
}

/// The login: made just now, or kept from the first run, or given.
fn login(server: &Server, environment: &Environment, file: &Path) -> anyhow::Result<Login> {
    if let Some(admin) = &server.first_admin {
        let login = Login { email: admin.email.clone(), password: admin.password.expose().to_owned() };
        keep(file, &login)?;
        return Ok(login);
    }
    if let Some(password) = &environment.admin_password {
        let email = environment.admin_email.clone().unwrap_or_else(|| "admin@example.com".into());
        return Ok(Login { email, password: password.expose().to_owned() });
    }
    match fs::read_to_string(file) {
        Ok(text) => serde_json::from_str(&text).with_context(|| format!("{} is not a login", file.display())),
        Err(_) => bail!(
            "this data directory has an admin already, and its password is not kept: \
             set MUSTER_ADMIN_EMAIL and MUSTER_ADMIN_PASSWORD, or another MUSTER__DATA_DIR"
        ),
    }
}

/// Only the owner may read a password.
fn keep(file: &Path, login: &Login) -> anyhow::Result<()> {
    let text = serde_json::to_string(login)?;
    let mut kept = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(file)
        .with_context(|| format!("cannot keep the login in {}", file.display()))?;
    kept.write_all(text.as_bytes())?;
    Ok(())
}

async fn play(server: &Server, args: &Args, login: &Login, stop: &CancellationToken) -> anyhow::Result<()> {
    let (Some(http), Some(mqtt)) = (server.http_address(), server.mqtt_address()) else {
        bail!("the demo needs both doors");
    };
    let scenario = Scenario {
        url: format!("http://{http}"),
        mqtt: mqtt.to_string(),
        access: Access::Password { email: login.email.clone(), password: login.password.clone() },
        devices: args.devices,
        rate: args.rate,
        log_rate: args.log_rate,
        // A simulation goes on until it is stopped, whatever stands here.
        duration: Duration::from_hours(1),
        payload_bytes: 200,
        seed: 1,
        faults: Faults::default(),
        ledger: None,
        cleanup: false,
    };
    eprintln!("enrolling {} simulated devices …", args.devices);
    let simulation = Simulation::start(&scenario, stop, |_| {}).await?;
    print!("{}", welcome(&scenario, login));
    println!("ready: {server}");
    watch(server, &simulation, args.devices, stop).await;
    eprintln!("\nstopping …");
    simulation.stop(FLEET_STOP_WITHIN).await;
    Ok(())
}

fn welcome(scenario: &Scenario, login: &Login) -> String {
    let Scenario { url, mqtt, .. } = scenario;
    let (host, port) = mqtt.rsplit_once(':').unwrap_or((mqtt, "1883"));
    let device = scenario.device_id(0);
    let Login { email, password } = login;
    format!(
        r#"
Muster is running, with {devices} simulated devices.

  REST API   {url}/api/v1      in the browser: {url}/docs
  metrics    {url}/metrics     ready: {url}/readyz
  MQTT       {mqtt}
  log in     {email}  {password}

Try:
  1. log in:
     TOKEN=$(curl -s {url}/api/v1/auth/login -H 'content-type: application/json' \
       -d '{{"email":"{email}","password":"{password}"}}' | sed 's/.*"access_token":"\([^"]*\)".*/\1/')
  2. what a device said last:
     curl -s -H "authorization: Bearer $TOKEN" {url}/api/v1/devices/{device}/telemetry/latest
  3. what all devices say now:
     mosquitto_sub -V mqttv5 -h {host} -p {port} -u {email} -P "$TOKEN" -t 'fleet/v1/main/+/telemetry'

Ctrl-C stops everything; the data is kept.

"#,
        devices = scenario.devices,
    )
}

/// The live line: devices online, messages acknowledged and committed a second.
async fn watch(server: &Server, simulation: &Simulation, devices: u32, stop: &CancellationToken) {
    let terminal = std::io::stdout().is_terminal();
    let every = if terminal { LIVE_EVERY } else { LOG_EVERY };
    let mut ticks = tokio::time::interval(every);
    ticks.tick().await;
    let mut before = Totals::of(server, simulation);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        let now = Totals::of(server, simulation);
        let online = simulation.counters().online.load(Ordering::Relaxed);
        let a_second = |now: u64, before: u64| now.saturating_sub(before) / every.as_secs();
        let line = format!(
            "devices online {online}/{devices}   acknowledged {}/s   committed {}/s   stored {}",
            a_second(now.acknowledged, before.acknowledged),
            a_second(now.committed, before.committed),
            now.stored,
        );
        if terminal {
            print!("\r{line}\x1b[K");
        } else {
            println!("{line}");
        }
        // A view that cannot be written is no reason to stop the server.
        let _ = std::io::stdout().flush();
        before = now;
    }
}

struct Totals {
    acknowledged: u64,
    committed: u64,
    stored: u64,
}

impl Totals {
    fn of(server: &Server, simulation: &Simulation) -> Self {
        let metrics = server.broker_metrics();
        Self {
            acknowledged: simulation.counters().acknowledged.load(Ordering::Relaxed),
            committed: metrics.map_or(0, |metrics| metrics.committed.with_label_values(&["telemetry"]).get()),
            stored: metrics.map_or(0, |metrics| metrics.stored.get()),
        }
    }
}
