//! Exit codes that scripts can use, and errors in one line.

use std::process::ExitCode;

use broker::StartError;
use fleet_core::config::BadConfig;

/// What `--help` says of the exit codes.
pub(crate) const HELP: &str = "\
Exit codes:
  0  done
  1  failed; `muster sim`: an acknowledged reading is missing or doubled; `muster audit verify`: an entry was touched; `muster index`: a day differs
  2  bad usage or settings
  3  an address cannot be listened on
  4  the data directory or the embedded PostgreSQL cannot be used
  5  the database cannot be reached or used
  6  `muster sim`: the run could not be made or checked";

/// An address of the HTTP door that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("http.listen {address} cannot be used: {error}; expected a free address of this machine")]
pub(crate) struct CannotListen {
    /// The address asked for.
    pub(crate) address: std::net::SocketAddr,
    /// What the system said.
    pub(crate) error: std::io::Error,
}

/// The exit code of an error.
pub(crate) fn code(error: &anyhow::Error) -> ExitCode {
    let of_core = |error: &fleet_core::Error| match error {
        fleet_core::Error::Postgres(_) | fleet_core::Error::Index(_) => 4,
        fleet_core::Error::Invalid(_) | fleet_core::Error::BadId(_) => 2,
        _ => 5,
    };
    let code = error.chain().find_map(|cause| {
        if cause.is::<BadConfig>() {
            return Some(2);
        }
        if cause.is::<CannotListen>() {
            return Some(3);
        }
        if let Some(start) = cause.downcast_ref::<StartError>() {
            return Some(match start {
                StartError::Listen { .. } => 3,
                StartError::Tls(_) => 2,
                StartError::Database(error) => of_core(error),
                StartError::Metrics(_) => 1,
            });
        }
        cause.downcast_ref::<fleet_core::Error>().map(of_core)
    });
    ExitCode::from(code.unwrap_or(1))
}

/// An error and its causes, in one line.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let text = cause.to_string();
        // A cause that its error has quoted already need not be said twice.
        if !parts.iter().any(|part| part.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ").split_whitespace().collect::<Vec<_>>().join(" ")
}
