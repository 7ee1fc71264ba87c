//! Simulated devices, and the ledger that proves nothing was lost.
//!
//! | what | where |
//! |---|---|
//! | many devices: enrolment, load, end, verdict | [`scenario`] |
//! | one honest device: it keeps a reading until it is acknowledged | `device` |
//! | what a device measures, reproducible from a seed | `reading` |
//! | what it logs, likewise | `line` |
//! | what it does that it is asked to: a log level, commands | `obey` |
//! | one MQTT connection, 3.1.1 or 5 | `link` |
//! | what was acknowledged, compared with what REST finds | [`ledger`] |
//! | the REST calls a fleet needs | [`rest`] |
//! | live counters, acknowledgement latency | [`counters`], [`latency`] |
//!
//! Holds: a reading that was not acknowledged is sent again, the same, after any failure; so what the ledger calls
//! missing was lost by the server.
//! Ignorant of: the server's inside. Everything goes over MQTT and HTTP, as a real fleet's would.

pub mod counters;
mod device;
mod error;
pub mod latency;
pub mod ledger;
mod line;
mod link;
mod obey;
mod reading;
pub mod rest;
pub mod scenario;

pub use error::{Error, Result};
pub use rest::Access;
pub use scenario::{Faults, Phase, Progress, Report, Scenario, Simulation};
