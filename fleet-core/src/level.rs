//! Levels of log lines, from `trace` to `fatal`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// How much a log line matters; ordered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// The smallest steps.
    Trace,
    /// What helps to find a fault.
    Debug,
    /// What went as it should; what a line without a level has.
    #[default]
    Info,
    /// What may become trouble.
    Warn,
    /// What failed.
    Error,
    /// What ended the program.
    Fatal,
}

impl Level {
    /// All of them, the least first.
    pub const ALL: [Self; 6] = [Self::Trace, Self::Debug, Self::Info, Self::Warn, Self::Error, Self::Fatal];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warn => "warn",
            Self::Error => "error",
            Self::Fatal => "fatal",
        }
    }

    /// As it is stored: 1 for `trace` to 6 for `fatal`.
    pub fn number(self) -> i16 {
        self as i16 + 1
    }

    /// That of a stored number.
    pub fn from_number(number: i16) -> Option<Self> {
        Self::ALL.into_iter().find(|level| level.number() == number)
    }

    /// That of a severity of OpenTelemetry, four numbers each from 1 (Logs Data Model, "Field: `SeverityNumber`").
    pub fn from_severity(number: i32) -> Option<Self> {
        let place = usize::try_from(number.checked_sub(1)?).ok()? / 4;
        Self::ALL.get(place).copied()
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Level {
    type Err = Error;

    /// In any case, with the names that syslog (RFC 5424 §6.2.1) and common loggers use.
    fn from_str(text: &str) -> Result<Self, Error> {
        match text.to_ascii_lowercase().as_str() {
            "trace" | "verbose" => Ok(Self::Trace),
            "debug" => Ok(Self::Debug),
            "info" | "information" | "informational" | "notice" => Ok(Self::Info),
            "warn" | "warning" => Ok(Self::Warn),
            "error" | "err" => Ok(Self::Error),
            "fatal" | "critical" | "crit" | "alert" | "emerg" | "emergency" | "panic" => Ok(Self::Fatal),
            _ => Err(Error::Invalid(format!(
                "{text:?} is not a level: expected trace, debug, info, warn, error or fatal"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_is_read_stored_and_printed_as_one() {
        for level in Level::ALL {
            assert_eq!(level.to_string().parse::<Level>().unwrap(), level);
            assert_eq!(Level::from_number(level.number()), Some(level));
            assert_eq!(serde_json::to_value(level).unwrap(), level.name());
        }
        assert_eq!("WARNING".parse::<Level>().unwrap(), Level::Warn);
        assert!("loud".parse::<Level>().is_err() && Level::from_number(7).is_none());
    }

    #[test]
    fn severities_of_opentelemetry_are_levels_by_fours() {
        let of = |number| Level::from_severity(number);
        assert_eq!(
            (of(1), of(4), of(5), of(9)),
            (Some(Level::Trace), Some(Level::Trace), Some(Level::Debug), Some(Level::Info))
        );
        assert_eq!((of(24), of(25), of(0), of(i32::MIN)), (Some(Level::Fatal), None, None, None));
    }
}
