//! The one error of this crate; every text is one line and says what was expected.

/// Why a simulation could not run or be checked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A setting outside its bounds; nothing was started.
    #[error("{0}")]
    Invalid(String),
    /// Nobody answers at an address.
    #[error("cannot reach {address}: {reason}; is `muster serve` running there?")]
    Unreachable {
        /// The URL or `host:port`.
        address: String,
        /// What the connection attempt said.
        reason: String,
    },
    /// The login was refused.
    #[error("login as {email} was refused: {detail}")]
    BadLogin {
        /// Who tried.
        email: String,
        /// What the server said.
        detail: String,
    },
    /// The server answered something else than was asked for.
    #[error("{what} failed: the server answered {status} {detail}")]
    Refused {
        /// What was asked for.
        what: String,
        /// The status code.
        status: u16,
        /// The problem's text.
        detail: String,
    },
    /// A ledger file cannot be written, read or understood.
    #[error("ledger {path}: {reason}")]
    Ledger {
        /// The file.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
