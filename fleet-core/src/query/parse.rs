//! Reads a query: a descent over its characters that knows the column of each.

use std::fmt::Write as _;

use chrono::{DateTime, NaiveDate, NaiveDateTime, TimeDelta, Utc};

use super::{Bounds, Expression, Kind, MAX_BYTES, MAX_DEPTH, MAX_TERMS, Phrase, Schema, Term, Test};
use crate::error::{Error, Result};
use crate::words::words;

/// Reads `text` by the fields of `schema`.
pub(super) fn parse(text: &str, schema: &Schema, now: DateTime<Utc>) -> Result<Expression> {
    if text.len() > MAX_BYTES {
        let noun = schema.noun;
        return Err(Error::Invalid(format!("the {noun} is too long: expected at most {MAX_BYTES} bytes")));
    }
    let mut parser = Parser { text: text.chars().collect(), at: 0, terms: 0, schema, now };
    parser.blanks();
    if parser.peek().is_none() {
        return Ok(Expression::All);
    }
    let read = parser.or(0, None)?;
    match parser.peek() {
        None => Ok(read),
        Some(_) => Err(parser.refused(parser.at, "no ) that no ( has begun")),
    }
}

struct Parser<'a> {
    text: Vec<char>,
    at: usize,
    terms: usize,
    schema: &'a Schema,
    now: DateTime<Utc>,
}

/// A field, as it was named.
#[derive(Clone)]
struct Field {
    name: String,
    kind: Kind,
}

/// What stands behind a field, or alone.
struct Written {
    text: String,
    /// A `*` ends it.
    is_prefix: bool,
    is_quoted: bool,
    at: usize,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Comparison {
    Equal,
    Less,
    LessOrEqual,
    More,
    MoreOrEqual,
}

impl Parser<'_> {
    fn refused(&self, at: usize, expected: impl std::fmt::Display) -> Error {
        Error::Invalid(format!("{}, column {}: expected {expected}", self.schema.noun, at + 1))
    }

    fn peek(&self) -> Option<char> {
        self.text.get(self.at).copied()
    }

    fn takes(&mut self, c: char) -> bool {
        let is_next = self.peek() == Some(c);
        self.at += usize::from(is_next);
        is_next
    }

    fn blanks(&mut self) {
        while self.peek().is_some_and(char::is_whitespace) {
            self.at += 1;
        }
    }

    /// Whether `word` stands here as a word of its own.
    fn sees(&self, word: &str) -> bool {
        let rest = &self.text[self.at..];
        let behind = rest.get(word.len());
        rest.len() >= word.len()
            && rest.iter().zip(word.chars()).all(|(has, wanted)| *has == wanted)
            && behind.is_none_or(|c| c.is_whitespace() || "()\"".contains(*c))
    }

    fn takes_word(&mut self, word: &str) -> bool {
        self.blanks();
        let is_next = self.sees(word);
        self.at += if is_next { word.len() } else { 0 };
        is_next
    }

    fn or(&mut self, depth: usize, field: Option<&Field>) -> Result<Expression> {
        let mut some = vec![self.and(depth, field)?];
        while self.takes_word("OR") {
            some.push(self.and(depth, field)?);
        }
        Ok(if some.len() == 1 { some.remove(0) } else { Expression::Or(some) })
    }

    fn and(&mut self, depth: usize, field: Option<&Field>) -> Result<Expression> {
        let mut all = vec![self.not(depth, field)?];
        loop {
            let is_said = self.takes_word("AND");
            if !is_said && (self.peek().is_none_or(|c| c == ')') || self.sees("OR")) {
                break;
            }
            all.push(self.not(depth, field)?);
        }
        Ok(if all.len() == 1 { all.remove(0) } else { Expression::And(all) })
    }

    fn not(&mut self, depth: usize, field: Option<&Field>) -> Result<Expression> {
        if depth > MAX_DEPTH {
            return Err(self.refused(self.at, format!("at most {MAX_DEPTH} parentheses and NOT in each other")));
        }
        self.blanks();
        let is_number = field.is_some_and(|field| matches!(field.kind, Kind::Number | Kind::Any));
        if self.takes_word("NOT") || !is_number && self.takes('-') {
            return Ok(Expression::Not(Box::new(self.not(depth + 1, field)?)));
        }
        self.one(depth, field)
    }

    fn one(&mut self, depth: usize, field: Option<&Field>) -> Result<Expression> {
        let at = self.at;
        if self.takes('(') {
            let inner = self.or(depth + 1, field)?;
            self.blanks();
            return if self.takes(')') { Ok(inner) } else { Err(self.refused(self.at, "a ) to end what a ( began")) };
        }
        if self.peek().is_none_or(|c| c == ')') || self.sees("AND") || self.sees("OR") {
            return Err(self.refused(self.at, self.a_term()));
        }
        if let Some(field) = field {
            return self.term(at, field);
        }
        if let Some(field) = self.field()? {
            return if self.peek() == Some('(') { self.one(depth + 1, Some(&field)) } else { self.term(at, &field) };
        }
        if self.takes_word("*") {
            return Ok(Expression::All);
        }
        let Some(name) = self.schema.words else { return Err(self.refused(at, self.a_term())) };
        let kind = self.schema.kind(name).unwrap_or(Kind::Text);
        let field = Field { name: name.to_owned(), kind };
        let written = self.written(true)?;
        self.equal(at, &field, &written)
    }

    fn a_term(&self) -> String {
        let fields = self.schema.listed();
        if self.schema.words.is_some() {
            format!("a word, \"a phrase\" or one of {fields}")
        } else {
            format!("one of {fields}")
        }
    }

    /// The field that is named here, with its colon.
    fn field(&mut self) -> Result<Option<Field>> {
        let is_part = |c: char| c.is_alphanumeric() || "_.@/-".contains(c);
        let length = self.text[self.at..].iter().take_while(|c| is_part(**c)).count();
        if length == 0 || self.text.get(self.at + length) != Some(&':') {
            return Ok(None);
        }
        let name = self.text[self.at..self.at + length].iter().collect::<String>();
        let Some(kind) = self.schema.kind(&name) else {
            let expected = format!("one of {}; {name:?} is not a field", self.schema.listed());
            let quoted = if self.schema.words.is_some() { " (a colon in a word is written \\:)" } else { "" };
            return Err(self.refused(self.at, expected + quoted));
        };
        self.at += length + 1;
        Ok(Some(Field { name, kind }))
    }

    /// What stands behind a field.
    fn term(&mut self, at: usize, field: &Field) -> Result<Expression> {
        if let Some(open) = self.peek().filter(|c| "[{".contains(*c)) {
            return self.range(at, field, open == '[');
        }
        let comparison = if self.takes('>') {
            if self.takes('=') { Comparison::MoreOrEqual } else { Comparison::More }
        } else if self.takes('<') {
            if self.takes('=') { Comparison::LessOrEqual } else { Comparison::Less }
        } else {
            Comparison::Equal
        };
        let written = self.written(false)?;
        if comparison == Comparison::Equal {
            return self.equal(at, field, &written);
        }
        let test = self.compared(field, comparison, &written)?;
        self.counted(at, field, test)
    }

    fn counted(&mut self, at: usize, field: &Field, test: Test) -> Result<Expression> {
        self.terms += 1;
        if self.terms > MAX_TERMS {
            return Err(self.refused(at, format!("at most {MAX_TERMS} terms")));
        }
        Ok(Expression::Term(Term { field: field.name.clone(), test, column: at + 1 }))
    }

    /// A value up to the next blank or parenthesis, or in double quotes. `\` takes from a character what it means. A word that
    /// stands alone has no colon in it, so that a field that was mistyped is not searched for as text.
    fn written(&mut self, is_alone: bool) -> Result<Written> {
        let at = self.at;
        let is_quoted = self.takes('"');
        let mut written = Written { text: String::new(), is_prefix: false, is_quoted, at };
        loop {
            let c = self.peek();
            match c {
                None if is_quoted => return Err(self.refused(at, "a second double quote to end the phrase")),
                Some('"') if is_quoted => break self.at += 1,
                Some('\\') => {
                    self.at += 1;
                    let Some(c) = self.peek() else { return Err(self.refused(self.at, "a character behind \\")) };
                    written.text.push(c);
                }
                Some('*') if !is_quoted => written.is_prefix = true,
                None => break,
                Some(c) if !is_quoted && (c.is_whitespace() || c == '(' || c == ')') => break,
                Some('"') => return Err(self.refused(self.at, "a blank before a double quote")),
                Some(':') if is_alone && !is_quoted => return Err(self.refused(at, self.a_term())),
                Some(c) => written.text.push(c),
            }
            if written.is_prefix && c != Some('*') {
                return Err(self.refused(self.at - 1, "* only at the end of a word"));
            }
            self.at += 1;
        }
        if is_quoted && self.peek() == Some('*') {
            self.at += 1;
            written.is_prefix = true;
        }
        if written.text.is_empty() && !written.is_prefix && !is_quoted {
            return Err(self.refused(at, "a value"));
        }
        Ok(written)
    }

    /// `[low TO high]`, each of them in; `{low TO high}`, both out; `*` for no end.
    fn range(&mut self, at: usize, field: &Field, low_in: bool) -> Result<Expression> {
        self.at += 1;
        let low = self.end_of_range()?;
        if !self.takes_word("TO") {
            return Err(self.refused(self.at, "TO between the ends of a range"));
        }
        let high = self.end_of_range()?;
        self.blanks();
        let high_in = match self.peek() {
            Some(']') => true,
            Some('}') => false,
            _ => return Err(self.refused(self.at, "] or } to end the range")),
        };
        self.at += 1;
        let above = if low_in { Comparison::MoreOrEqual } else { Comparison::More };
        let below = if high_in { Comparison::LessOrEqual } else { Comparison::Less };
        let low = low.map(|low| self.compared(field, above, &low)).transpose()?;
        let high = high.map(|high| self.compared(field, below, &high)).transpose()?;
        let test = match (low, high) {
            (None, None) => Test::Exists,
            (Some(one), None) | (None, Some(one)) => one,
            (Some(low), Some(high)) => both(low, high),
        };
        self.counted(at, field, test)
    }

    fn end_of_range(&mut self) -> Result<Option<Written>> {
        self.blanks();
        let at = self.at;
        let is_quoted = self.takes('"');
        let is_end = |c: char| if is_quoted { c == '"' } else { c.is_whitespace() || "]}".contains(c) };
        let text = self.text[self.at..].iter().copied().take_while(|c| !is_end(*c)).collect::<String>();
        self.at += text.chars().count();
        if is_quoted && !self.takes('"') {
            return Err(self.refused(at, "a second double quote to end the value"));
        }
        match text.as_str() {
            "" => Err(self.refused(at, "an end of the range, or * for none")),
            "*" => Ok(None),
            _ => Ok(Some(Written { text, is_prefix: false, is_quoted, at })),
        }
    }

    fn equal(&mut self, at: usize, field: &Field, written: &Written) -> Result<Expression> {
        if written.is_prefix && written.text.is_empty() && !written.is_quoted {
            return self.counted(at, field, Test::Exists);
        }
        let value = &written.text;
        if written.is_prefix && !matches!(field.kind, Kind::Text | Kind::Name | Kind::Version | Kind::Any) {
            return Err(self.refused(written.at, format!("{}, without *", field.a_value())));
        }
        let test = match field.kind {
            Kind::Text => Test::Words(self.phrase(written)?),
            Kind::Name | Kind::Version if written.is_prefix => Test::StartsWith(value.clone()),
            Kind::Name => Test::Is(value.clone()),
            Kind::OneOf(names) if names.contains(&value.as_str()) => Test::Is(value.clone()),
            Kind::Path if is_path(value) => Test::Within(value.clone()),
            Kind::Flag if value == "true" || value == "false" => Test::Flag(value == "true"),
            Kind::OneOf(_) | Kind::Path | Kind::Flag => return Err(self.refused(written.at, field.a_value())),
            Kind::Version if value.parse::<crate::version::Version>().is_err() => Test::Is(value.clone()),
            Kind::Any => {
                let plain = (!written.is_quoted && !written.is_prefix).then_some(value);
                let number = plain.and_then(|value| finite(value));
                Test::Any(self.phrase(written)?, number, plain.and_then(|value| value.parse().ok()))
            }
            Kind::Level | Kind::Number | Kind::Time | Kind::Version => {
                self.compared(field, Comparison::Equal, written)?
            }
        };
        self.counted(at, field, test)
    }

    fn phrase(&self, written: &Written) -> Result<Phrase> {
        let words = words(&written.text).map(|word| word.text).collect::<Vec<_>>();
        if words.is_empty() {
            return Err(self.refused(written.at, "a word with a letter or a digit in it"));
        }
        Ok(Phrase { words, is_prefix: written.is_prefix })
    }

    fn compared(&self, field: &Field, comparison: Comparison, written: &Written) -> Result<Test> {
        let value = &written.text;
        let wrong = || self.refused(written.at, field.a_value());
        if written.is_prefix {
            return Err(wrong());
        }
        let test = match field.kind {
            Kind::Level => Test::Level(point(comparison, value.parse().map_err(|_| wrong())?)),
            Kind::Number | Kind::Any => Test::Number(point(comparison, finite(value).ok_or_else(wrong)?)),
            Kind::Version => Test::Version(point(comparison, value.parse().map_err(|_| wrong())?)),
            Kind::Time => Test::Time(span(comparison, time(value, self.now).ok_or_else(wrong)?)),
            Kind::Text | Kind::Name | Kind::OneOf(_) | Kind::Path | Kind::Flag => {
                let expected = format!("{}: {} is not compared by order", field.a_value(), field.name);
                return Err(self.refused(written.at, expected));
            }
        };
        Ok(test)
    }
}

impl Field {
    /// What may stand behind it.
    fn a_value(&self) -> String {
        let mut value = match self.kind {
            Kind::Text => "words".to_owned(),
            Kind::Name => "a name".to_owned(),
            Kind::OneOf(names) => format!("one of {}", names.join(", ")),
            Kind::Path => "a path such as site/line-3".to_owned(),
            Kind::Level => "one of trace, debug, info, warn, error, fatal".to_owned(),
            Kind::Number | Kind::Any => "a number".to_owned(),
            Kind::Time => A_TIME.to_owned(),
            Kind::Version => "a version such as 2.0.1".to_owned(),
            Kind::Flag => "true or false".to_owned(),
        };
        write!(value, " for {}", self.name).expect("a String takes it");
        value
    }
}

/// As `device::GroupPath` reads it: segments between slashes.
fn is_path(text: &str) -> bool {
    text.parse::<crate::device::GroupPath>().is_ok()
}

fn finite(text: &str) -> Option<f64> {
    text.parse().ok().filter(|number: &f64| number.is_finite())
}

fn point<T: Clone>(comparison: Comparison, value: T) -> Bounds<T> {
    let (low, high) = match comparison {
        Comparison::Equal => (Some((value.clone(), true)), Some((value, true))),
        Comparison::Less => (None, Some((value, false))),
        Comparison::LessOrEqual => (None, Some((value, true))),
        Comparison::More => (Some((value, false)), None),
        Comparison::MoreOrEqual => (Some((value, true)), None),
    };
    Bounds { low, high }
}

/// By a time that lasts: `<=` takes all of it, `>` begins behind it.
fn span(comparison: Comparison, (start, end): (i64, i64)) -> Bounds<i64> {
    let (low, high) = match comparison {
        Comparison::Equal => (Some((start, true)), Some((end, false))),
        Comparison::Less => (None, Some((start, false))),
        Comparison::LessOrEqual => (None, Some((end, false))),
        Comparison::More => (Some((end, true)), None),
        Comparison::MoreOrEqual => (Some((start, true)), None),
    };
    Bounds { low, high }
}

/// What a time looks like, in errors.
pub const A_TIME: &str = "a time such as 2026-11-20T10:00:00Z, 2026-11-20, now or now-15m";

/// The first and the last ms plus one of a time: a day, a second or an instant.
pub fn time(text: &str, now: DateTime<Utc>) -> Option<(i64, i64)> {
    let from = |start: DateTime<Utc>, lasts: TimeDelta| {
        let start = start.timestamp_millis();
        Some((start, start.checked_add(lasts.num_milliseconds())?))
    };
    let instant = TimeDelta::milliseconds(1);
    if let Some(offset) = text.strip_prefix("now") {
        return from(now.checked_add_signed(relative(offset)?)?, instant);
    }
    if let Ok(day) = text.parse::<NaiveDate>() {
        return from(day.and_time(chrono::NaiveTime::MIN).and_utc(), TimeDelta::days(1));
    }
    if let Ok(time) = DateTime::parse_from_rfc3339(text) {
        let is_whole = !text.contains('.');
        return from(time.to_utc(), if is_whole { TimeDelta::seconds(1) } else { instant });
    }
    let minute = NaiveDateTime::parse_from_str(text.strip_suffix('Z')?, "%Y-%m-%dT%H:%M").ok()?;
    from(minute.and_utc(), TimeDelta::minutes(1))
}

/// `-15m`, `+1h`, or nothing.
fn relative(text: &str) -> Option<TimeDelta> {
    if text.is_empty() {
        return Some(TimeDelta::zero());
    }
    let (sign, rest) = text.strip_prefix('-').map_or((1, text.strip_prefix('+')), |rest| (-1, Some(rest)));
    let rest = rest?;
    let (number, unit) = rest.split_at_checked(rest.len().checked_sub(1)?)?;
    let seconds = match unit {
        "s" => 1,
        "m" => 60,
        "h" => 3_600,
        "d" => 86_400,
        "w" => 604_800,
        _ => return None,
    };
    let number: u32 = number.parse().ok()?;
    TimeDelta::try_seconds(sign * seconds * i64::from(number))
}

/// What both ends of a range say; they are of one field, so of one kind.
fn both(low: Test, high: Test) -> Test {
    fn joined<T>(low: Bounds<T>, high: Bounds<T>) -> Bounds<T> {
        Bounds { low: low.low, high: high.high }
    }
    match (low, high) {
        (Test::Level(low), Test::Level(high)) => Test::Level(joined(low, high)),
        (Test::Number(low), Test::Number(high)) => Test::Number(joined(low, high)),
        (Test::Time(low), Test::Time(high)) => Test::Time(joined(low, high)),
        (Test::Version(low), Test::Version(high)) => Test::Version(joined(low, high)),
        (low, _) => low,
    }
}
