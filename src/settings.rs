//! Settings, once, for every subcommand that needs them; and `muster config`, which prints them.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use fleet_core::config::{Config, Environment, LogFormat};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::server_log::{self, Taken};

/// The settings of this process and where its data lives.
pub(crate) struct Loaded {
    /// The settings in force.
    pub(crate) config: Config,
    /// What the environment says besides.
    pub(crate) environment: Environment,
    /// The data directory.
    pub(crate) data_dir: PathBuf,
}

/// Loads the settings.
pub(crate) fn load() -> anyhow::Result<Loaded> {
    let environment = Environment::of_process();
    let config = Config::load(&environment)?;
    let data_dir = config.data_dir(&environment, is_root())?;
    Ok(Loaded { config, environment, data_dir })
}

/// Whether this process may act as other users, by the owner of its own entry in `/proc`.
fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// Begins logging to standard error, as `[log]` says; what `[server_log]` wants of it comes back, to be kept.
pub(crate) fn start_logging(config: &Config) -> anyhow::Result<Option<Taken>> {
    let filter = EnvFilter::try_new(&config.log.filter).map_err(|error| {
        fleet_core::Error::Invalid(format!("log.filter: {error}; expected e.g. \"info,broker=debug\""))
    })?;
    let lines =
        tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(std::io::stderr().is_terminal());
    let lines = match config.log.format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    let (tap, taken) = server_log::tap(&config.server_log)?.unzip();
    let tap = tap.map(|tap| tap.with_filter(server_log::filter(&config.server_log)));
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(tap).init();
    Ok(taken)
}

/// Prints the settings in force as TOML; a secret prints as `***`.
pub(crate) fn print() -> anyhow::Result<ExitCode> {
    let Loaded { config, data_dir, .. } = load()?;
    println!("# data_dir is {}", data_dir.display());
    print!("{}", toml::to_string(&config)?);
    Ok(ExitCode::SUCCESS)
}
