//! Simulated devices, and the ledger that proves nothing was lost.

mod error;
pub mod latency;
pub mod ledger;
pub mod rest;

pub use error::{Error, Result};
pub use rest::Access;
