//! Queries of log lines: the query language over what stands in a line, and over what is known of its device.
//!
//! [`read`] reads one; [`Query::resolve`] looks up which devices it speaks of, and what comes of it is asked of a line in memory
//! ([`Query::matches`]) or of the index ([`crate::search`]). Holds: both mean the same. What is asked of devices is asked as they are at the time of
//! [`Query::resolve`]. Ignorant of: who may see which line.

mod completion;
mod resolve;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde_json::Value as Json;

pub use self::completion::{Completion, fields};
pub use self::resolve::KeySet;
use super::{Line, pattern};
use crate::error::Result;
use crate::query::{self, Document, Kind, Schema, Term, Value};
use crate::selector;

/// What can be asked of a line: its own fields, and those of its device as in [`selector::SCHEMA`].
pub const SCHEMA: Schema = Schema {
    noun: "query",
    fields: &[
        ("message", Kind::Text),
        ("level", Kind::Level),
        ("ts", Kind::Time),
        ("target", Kind::Name),
        ("trace_id", Kind::Name),
        ("pattern", Kind::Name),
        ("cut", Kind::Flag),
        ("clamped", Kind::Flag),
        ("device", Kind::Name),
        ("type", Kind::Name),
        ("group", Kind::Path),
        ("gateway", Kind::Name),
        ("state", Kind::OneOf(&selector::STATES)),
        ("firmware", Kind::Version),
        ("disabled", Kind::Flag),
        ("created", Kind::Time),
        ("seen", Kind::Time),
        ("missing", Kind::Number),
    ],
    families: &[("fields.", Kind::Any), ("label.", Kind::Name)],
    words: Some("message"),
};

/// Reads a query of lines.
///
/// # Errors
/// [`crate::Error::Invalid`] with the column and what was expected there.
pub fn read(text: &str, now: DateTime<Utc>) -> Result<query::Query> {
    query::Query::parse(text, &SCHEMA, now)
}

/// Whether a field is one of the device, not of the line.
fn is_of_device(field: &str) -> bool {
    selector::SCHEMA.kind(field).is_some()
}

/// A query whose devices are looked up.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    asked: Asked,
}

/// What it asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Asked {
    /// Everything.
    All,
    /// What the other does not.
    Not(Box<Self>),
    /// What all of them do.
    And(Vec<Self>),
    /// What one of them does.
    Or(Vec<Self>),
    /// Lines for which a test of one of their own fields holds.
    Line(Term),
    /// Lines of these devices.
    Devices(Arc<KeySet>),
}

impl Query {
    /// What it asks for.
    pub fn asked(&self) -> &Asked {
        &self.asked
    }

    /// Whether it asks for lines of some devices, and so for others when devices change.
    pub fn speaks_of_devices(&self) -> bool {
        self.asked.speaks_of_devices()
    }

    /// Whether it asks for that line.
    pub fn matches(&self, line: &Line) -> bool {
        self.asked.matches(line)
    }
}

impl Asked {
    fn speaks_of_devices(&self) -> bool {
        match self {
            Self::All | Self::Line(_) => false,
            Self::Not(inner) => inner.speaks_of_devices(),
            Self::And(some) | Self::Or(some) => some.iter().any(Self::speaks_of_devices),
            Self::Devices(_) => true,
        }
    }

    fn matches(&self, line: &Line) -> bool {
        match self {
            Self::All => true,
            Self::Not(inner) => !inner.matches(line),
            Self::And(all) => all.iter().all(|one| one.matches(line)),
            Self::Or(some) => some.iter().any(|one| one.matches(line)),
            Self::Line(term) => term.matches(line),
            Self::Devices(keys) => keys.contains(line.device),
        }
    }
}

/// The own fields of a line.
impl Document for Line {
    fn any(&self, field: &str, test: &mut dyn FnMut(Value<'_>) -> bool) -> bool {
        match field {
            "message" => test(self.message.as_str().into()),
            "level" => test(Value::Level(self.level)),
            "ts" => test(Value::Time(self.address.ts_ms)),
            "target" => self.target.as_deref().is_some_and(|target| test(target.into())),
            "trace_id" => self.trace.as_deref().is_some_and(|trace| test(trace.into())),
            "pattern" => test(pattern::of(&self.message).id().as_str().into()),
            "cut" => test(Value::Flag(self.cut.is_any())),
            "clamped" => test(Value::Flag(self.sent_at_ms.is_some())),
            field => {
                let value = field.strip_prefix("fields.").and_then(|name| self.fields.get(name));
                value.is_some_and(|value| any(value, test))
            }
        }
    }
}

/// Whether the test holds for one of the scalars of what a device sent.
fn any(value: &Json, test: &mut dyn FnMut(Value<'_>) -> bool) -> bool {
    match value {
        Json::Null | Json::Object(_) => false,
        Json::Bool(flag) => test(Value::Flag(*flag)),
        Json::Number(number) => number.as_f64().is_some_and(|number| test(Value::Number(number))),
        Json::String(said) => test(said.as_str().into()),
        Json::Array(values) => values.iter().any(|value| any(value, test)),
    }
}
