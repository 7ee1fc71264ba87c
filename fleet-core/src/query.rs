//! The query language: one parser for logs, for selectors of devices and for the scopes of alerts.
//!
//! [`Query::parse`] reads a text against a [`Schema`], which says which fields there are and what kind of thing each holds. What is
//! read is asked of a value in memory ([`Query::matches`]) or told to the database ([`Query::push_sql`]). Holds: all of them
//! mean the same; an error names the column and what was expected there. Ignorant of: where values come from, and who may see them.

mod matching;
mod parse;
mod sql;
#[cfg(test)]
mod tests;

use chrono::{DateTime, Utc};

pub use matching::{Document, Value};
pub use parse::{A_TIME, time};
pub use sql::Columns;

use crate::error::Result;
use crate::level::Level;
use crate::version::Version;

/// Most bytes of a query.
pub const MAX_BYTES: usize = 4096;
/// Most terms of a query.
pub const MAX_TERMS: usize = 64;
/// How deep parentheses and `NOT` may stand in each other.
pub const MAX_DEPTH: usize = 16;

/// What a field holds, and so what can be asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Text that is searched by its words.
    Text,
    /// A name, compared as a whole or by its beginning (`pump-*`).
    Name,
    /// One of these names.
    OneOf(&'static [&'static str]),
    /// A path, which stands for itself and all below it.
    Path,
    /// A level of a log line.
    Level,
    /// A number.
    Number,
    /// A time: RFC 3339, a day, or `now-15m`.
    Time,
    /// A version of firmware.
    Version,
    /// `true` or `false`.
    Flag,
    /// What a device sent: text, a number, or `true` and `false`.
    Any,
}

/// The fields of one kind of thing.
#[derive(Debug)]
pub struct Schema {
    /// What such a text is called, in errors.
    pub noun: &'static str,
    /// The fields by name.
    pub fields: &'static [(&'static str, Kind)],
    /// Fields whose names begin so, with any name behind it: `label.`.
    pub families: &'static [(&'static str, Kind)],
    /// The field that is meant where none is named.
    pub words: Option<&'static str>,
}

impl Schema {
    /// What a field holds; none when there is no such field.
    pub fn kind(&self, field: &str) -> Option<Kind> {
        let named = self.fields.iter().find(|(name, _)| *name == field);
        let family = || self.families.iter().find(|(start, _)| field.len() > start.len() && field.starts_with(start));
        named.or_else(family).map(|(_, kind)| *kind)
    }

    /// The fields, as they are written.
    fn listed(&self) -> String {
        let named = self.fields.iter().map(|(name, _)| format!("{name}:"));
        named.chain(self.families.iter().map(|(start, _)| format!("{start}NAME:"))).collect::<Vec<_>>().join(", ")
    }
}

/// A query that was read.
#[derive(Debug, Clone, PartialEq)]
pub struct Query {
    text: String,
    expression: Expression,
}

impl Query {
    /// Reads a query; an empty one, and `*`, ask for everything. Relative times are taken from `now`.
    ///
    /// # Errors
    /// [`crate::error::Error::Invalid`] with the column, from 1 in characters, and what was expected there.
    pub fn parse(text: &str, schema: &Schema, now: DateTime<Utc>) -> Result<Self> {
        let expression = parse::parse(text, schema, now)?;
        Ok(Self { text: text.to_owned(), expression })
    }

    /// As it was written.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// What it asks for.
    pub fn expression(&self) -> &Expression {
        &self.expression
    }
}

/// What a query asks for.
#[derive(Debug, Clone, PartialEq)]
pub enum Expression {
    /// Everything.
    All,
    /// What the other does not.
    Not(Box<Self>),
    /// What all of them do.
    And(Vec<Self>),
    /// What one of them does.
    Or(Vec<Self>),
    /// What has a field for which a test holds.
    Term(Term),
}

/// A test of a field.
#[derive(Debug, Clone, PartialEq)]
pub struct Term {
    /// The field.
    pub field: String,
    /// What must be true of it, or of one of its values.
    pub test: Test,
    /// Where it stands, from 1, in characters.
    pub column: usize,
}

/// What must be true of a field.
#[derive(Debug, Clone, PartialEq)]
pub enum Test {
    /// It has a value.
    Exists,
    /// These words stand in it, one behind the other.
    Words(Phrase),
    /// It is this.
    Is(String),
    /// It begins so.
    StartsWith(String),
    /// It is this path, or one below.
    Within(String),
    /// It is a level between these.
    Level(Bounds<Level>),
    /// It is a number between these.
    Number(Bounds<f64>),
    /// It is a time between these, in ms since the epoch.
    Time(Bounds<i64>),
    /// It is a version between these.
    Version(Bounds<Version>),
    /// It is this.
    Flag(bool),
    /// It is text with these words, or this number, or this flag.
    Any(Phrase, Option<f64>, Option<bool>),
}

/// Words one behind the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Phrase {
    /// The words, as [`crate::words`] compares them; at least one.
    pub words: Vec<String>,
    /// Whether the last one is only the beginning of a word.
    pub is_prefix: bool,
}

/// From here to there; without an end, as far as it goes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bounds<T> {
    /// The least, and whether it is in itself.
    pub low: Option<(T, bool)>,
    /// The most, and whether it is in itself.
    pub high: Option<(T, bool)>,
}

impl<T: PartialOrd> Bounds<T> {
    /// Whether a value is between them.
    pub fn contains(&self, value: &T) -> bool {
        let above = self.low.as_ref().is_none_or(|(low, is_in)| value > low || *is_in && value == low);
        let below = self.high.as_ref().is_none_or(|(high, is_in)| value < high || *is_in && value == high);
        above && below
    }
}
