//! Asks a query of a value in memory.

use std::borrow::Cow;

use super::{Expression, Phrase, Query, Term, Test};
use crate::level::Level;
use crate::words::words;

/// A value of a field.
#[derive(Debug, Clone, PartialEq)]
pub enum Value<'a> {
    /// Text, a name, a path or a version.
    Text(Cow<'a, str>),
    /// A level.
    Level(Level),
    /// A number.
    Number(f64),
    /// A time, in ms since the epoch.
    Time(i64),
    /// True or false.
    Flag(bool),
}

impl<'a> From<&'a str> for Value<'a> {
    fn from(text: &'a str) -> Self {
        Self::Text(Cow::Borrowed(text))
    }
}

/// What can be asked a query.
pub trait Document {
    /// Whether `test` holds for one of the values of `field`, which may have none.
    fn any(&self, field: &str, test: &mut dyn FnMut(Value<'_>) -> bool) -> bool;
}

impl Query {
    /// Whether it asks for that.
    pub fn matches(&self, document: &impl Document) -> bool {
        self.expression().matches(document)
    }
}

impl Expression {
    fn matches(&self, document: &impl Document) -> bool {
        match self {
            Self::All => true,
            Self::Not(inner) => !inner.matches(document),
            Self::And(all) => all.iter().all(|one| one.matches(document)),
            Self::Or(some) => some.iter().any(|one| one.matches(document)),
            Self::Term(term) => term.matches(document),
        }
    }
}

impl Term {
    /// Whether its test holds for one of the values of its field.
    pub fn matches(&self, document: &impl Document) -> bool {
        document.any(&self.field, &mut |value| self.test.holds(&value))
    }
}

impl Test {
    fn holds(&self, value: &Value<'_>) -> bool {
        match (self, value) {
            (Self::Exists, _) => true,
            (Self::Words(phrase) | Self::Any(phrase, ..), Value::Text(text)) => phrase.stands_in(text),
            (Self::Any(_, number, _), Value::Number(value)) => *number == Some(*value),
            (Self::Any(_, _, flag), Value::Flag(value)) => *flag == Some(*value),
            (Self::Is(wanted), Value::Text(text)) => wanted == text,
            (Self::StartsWith(start), Value::Text(text)) => text.starts_with(start.as_str()),
            (Self::Within(path), Value::Text(text)) => {
                text.strip_prefix(path.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            (Self::Level(bounds), Value::Level(level)) => bounds.contains(level),
            (Self::Number(bounds), Value::Number(number)) => bounds.contains(number),
            (Self::Time(bounds), Value::Time(time)) => bounds.contains(time),
            (Self::Version(bounds), Value::Text(text)) => text.parse().is_ok_and(|version| bounds.contains(&version)),
            (Self::Flag(wanted), Value::Flag(flag)) => wanted == flag,
            _ => false,
        }
    }
}

impl Phrase {
    /// Whether its words stand in a text, one behind the other.
    pub fn stands_in(&self, text: &str) -> bool {
        let has = words(text).map(|word| word.text).collect::<Vec<_>>();
        has.windows(self.words.len()).any(|window| self.is_at(window.iter().map(String::as_str)))
    }

    /// Whether these, as many as it has, are its words.
    pub fn is_at<'a>(&self, words: impl Iterator<Item = &'a str>) -> bool {
        let last = self.words.len() - 1;
        self.words.iter().zip(words).enumerate().all(|(place, (wanted, has))| {
            if self.is_prefix && place == last { has.starts_with(wanted.as_str()) } else { has == wanted }
        })
    }
}
