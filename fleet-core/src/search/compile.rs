//! A query of lines as one of the index, with the caller's reach inside it.
//!
//! Holds: it finds what [`Query::matches`] says, of the lines within reach and of no others.

use std::ops::Bound;

use tantivy::Term as Key;
use tantivy::columnar::NumericalValue;
use tantivy::fastfield::FastValue;
use tantivy::query::{
    AllQuery, BooleanQuery, EmptyQuery, InvertedIndexRangeQuery, PhraseQuery, Query as Compiled, RangeQuery, TermQuery,
    TermSetQuery,
};
use tantivy::schema::{Field, IndexRecordOption};

use super::Reach;
use super::complement::Complement;
use super::ending::PhraseEnding;
use crate::index::schema::FIELDS;
use crate::level::Level;
use crate::log::query::{Asked, KeySet, Query};
use crate::query::{Bounds, Phrase, Term, Test};

/// A query of tantivy.
pub(super) type Boxed = Box<dyn Compiled>;

/// What is asked, of what is within reach.
pub(super) fn compile(query: &Query, reach: &Reach) -> Boxed {
    let tenant = term(Key::from_field_u64(FIELDS.tenant, reach.tenant.0.cast_unsigned()));
    let mut all = vec![tenant];
    all.extend(reach.devices.as_deref().map(devices));
    match query.asked() {
        Asked::All => {}
        asked => all.push(expression(asked)),
    }
    and(all)
}

/// Lines that have a value of a field, by its name in the query language.
pub(super) fn has(name: &str) -> Boxed {
    term(Key::from_field_text(FIELDS.names, name))
}

fn expression(asked: &Asked) -> Boxed {
    match asked {
        Asked::All => Box::new(AllQuery),
        Asked::Not(inner) => not(expression(inner)),
        Asked::And(all) => and(all.iter().map(expression).collect()),
        Asked::Or(some) => or(some.iter().map(expression).collect()),
        Asked::Devices(keys) => devices(keys),
        Asked::Line(term) => test(term),
    }
}

fn test(asked: &Term) -> Boxed {
    match (asked.field.as_str(), &asked.test) {
        // Every line has these.
        ("message" | "level" | "ts" | "pattern" | "cut" | "clamped", Test::Exists) => Box::new(AllQuery),
        (name, Test::Exists) => has(name),
        ("message", Test::Words(words)) => phrase(words, |word| Key::from_field_text(FIELDS.message, word)),
        ("level", Test::Level(bounds)) => levels(*bounds),
        ("ts", Test::Time(bounds)) => times(bounds),
        ("target", test) => name(FIELDS.target, test),
        ("trace_id", test) => name(FIELDS.trace, test),
        ("pattern", test) => pattern(test),
        (flag @ ("cut" | "clamped"), Test::Flag(wanted)) => {
            let is_set = term(Key::from_field_text(FIELDS.flags, flag));
            if *wanted { is_set } else { not(is_set) }
        }
        (field, test) => field.strip_prefix("fields.").map_or_else(nothing, |name| of_field(name, test)),
    }
}

fn nothing() -> Boxed {
    Box::new(EmptyQuery)
}

fn term(key: Key) -> Boxed {
    Box::new(TermQuery::new(key, IndexRecordOption::Basic))
}

pub(super) fn and(mut all: Vec<Boxed>) -> Boxed {
    if all.len() == 1 { all.remove(0) } else { Box::new(BooleanQuery::intersection(all)) }
}

fn or(mut some: Vec<Boxed>) -> Boxed {
    if some.len() == 1 { some.remove(0) } else { Box::new(BooleanQuery::union(some)) }
}

fn not(inner: Boxed) -> Boxed {
    Box::new(Complement(inner))
}

fn devices(keys: &KeySet) -> Boxed {
    let key = |device: crate::id::DeviceKey| Key::from_field_u64(FIELDS.device, device.0.cast_unsigned());
    let mut keys = keys.iter().map(key).collect::<Vec<_>>();
    match keys.len() {
        0 => nothing(),
        1 => term(keys.remove(0)),
        _ => Box::new(TermSetQuery::new(keys)),
    }
}

fn levels(bounds: Bounds<Level>) -> Boxed {
    let key = |level: Level| Key::from_field_u64(FIELDS.level, u64::from(level.number().cast_unsigned()));
    let keys = Level::ALL.into_iter().filter(|level| bounds.contains(level)).map(key).collect::<Vec<_>>();
    match keys.len() {
        0 => nothing(),
        6 => Box::new(AllQuery),
        _ => or(keys.into_iter().map(term).collect()),
    }
}

fn times(bounds: &Bounds<i64>) -> Boxed {
    if bounds.low.is_none() && bounds.high.is_none() {
        return Box::new(AllQuery);
    }
    let key = |ms: &i64| Key::from_field_i64(FIELDS.ts, *ms);
    Box::new(RangeQuery::new(end(bounds.low.as_ref(), key), end(bounds.high.as_ref(), key)))
}

fn end<T>(end: Option<&(T, bool)>, key: impl Fn(&T) -> Key) -> Bound<Key> {
    match end {
        None => Bound::Unbounded,
        Some((value, true)) => Bound::Included(key(value)),
        Some((value, false)) => Bound::Excluded(key(value)),
    }
}

fn name(field: Field, test: &Test) -> Boxed {
    match test {
        Test::Is(value) => term(Key::from_field_text(field, value)),
        Test::StartsWith(start) => begins(&Key::from_field_text(field, start)),
        _ => nothing(),
    }
}

/// What is indexed with a key that begins so.
fn begins(key: &Key) -> Boxed {
    let upper = behind(key).map_or(Bound::Unbounded, Bound::Excluded);
    Box::new(InvertedIndexRangeQuery::new(Bound::Included(key.clone()), upper))
}

/// The first key behind all that begin so.
pub(super) fn behind(key: &Key) -> Option<Key> {
    let mut bytes = key.serialized_value_bytes().to_vec();
    while bytes.pop_if(|last| *last == u8::MAX).is_some() {}
    *bytes.last_mut()? += 1;
    Some(key_of(key, &bytes))
}

/// A key of the same field with this value.
pub(super) fn key_of(like: &Key, bytes: &[u8]) -> Key {
    let mut key = like.clone();
    key.clear_with_type(like.typ());
    key.append_bytes(bytes);
    key
}

fn pattern(test: &Test) -> Boxed {
    let digits = |text: &str| text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    let number = |text: &str| u64::from_str_radix(text, 16).ok().map(|hash| Key::from_field_u64(FIELDS.pattern, hash));
    match test {
        Test::Is(id) if id.len() == 16 && digits(id) => number(id).map_or_else(nothing, term),
        Test::StartsWith(start) if start.len() <= 16 && digits(start) => {
            let (low, high) = (number(&format!("{start:0<16}")), number(&format!("{start:f<16}")));
            low.zip(high).map_or_else(nothing, |(low, high)| {
                Box::new(InvertedIndexRangeQuery::new(Bound::Included(low), Bound::Included(high)))
            })
        }
        _ => nothing(),
    }
}

fn phrase(phrase: &Phrase, key: impl Fn(&str) -> Key) -> Boxed {
    let mut keys = phrase.words.iter().map(|word| key(word)).collect::<Vec<_>>();
    match (keys.len(), phrase.is_prefix) {
        (1, false) => term(keys.remove(0)),
        (1, true) => begins(&keys[0]),
        (_, false) => Box::new(PhraseQuery::new(keys)),
        (_, true) => Box::new(PhraseEnding::new(keys)),
    }
}

fn of_field(name: &str, test: &Test) -> Boxed {
    // A dot in a name is a part of it.
    let path = || Key::from_field_json_path(FIELDS.fields, &name.replace('.', "\\."), false);
    match test {
        Test::Any(words, is_number, is_flag) => {
            let mut some = vec![phrase(words, |word| {
                let mut key = path();
                key.append_type_and_str(word);
                key
            })];
            some.extend(is_number.map(|number| {
                let mut key = path();
                match NumericalValue::F64(number).normalize() {
                    NumericalValue::I64(whole) => key.append_type_and_fast_value(whole),
                    NumericalValue::U64(whole) => key.append_type_and_fast_value(whole),
                    NumericalValue::F64(number) => key.append_type_and_fast_value(number),
                }
                term(key)
            }));
            some.extend(is_flag.map(|flag| {
                let mut key = path();
                key.append_type_and_fast_value(flag);
                term(key)
            }));
            or(some)
        }
        Test::Number(bounds) => numbers(bounds, path),
        _ => nothing(),
    }
}

/// Numbers are indexed as `i64` if they are whole and fit, else as `u64` if they are whole and fit, else as `f64`.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "casts stay at the ends of the type")]
#[expect(clippy::cast_precision_loss, reason = "the ends of the type are powers of two, or stand for them")]
fn numbers(bounds: &Bounds<f64>, path: impl Fn() -> Key) -> Boxed {
    let signed = whole(bounds, (i64::MIN, i64::MAX), |number| number as i64, |whole| whole as f64);
    let unsigned = whole(bounds, (u64::MIN, u64::MAX), |number| number as u64, |whole| whole as f64);
    let low = bounds.low.unwrap_or((f64::MIN, true));
    let high = bounds.high.unwrap_or((f64::MAX, true));
    let mut some = vec![between(low, high, &path)];
    some.extend(signed.map(|(low, high)| between(low, high, &path)));
    some.extend(unsigned.map(|(low, high)| between(low, high, &path)));
    or(some)
}

fn between<T: FastValue>(low: (T, bool), high: (T, bool), path: impl Fn() -> Key) -> Boxed {
    let key = |value: &T| {
        let mut key = path();
        key.append_type_and_fast_value(*value);
        key
    };
    Box::new(InvertedIndexRangeQuery::new(end(Some(&low), key), end(Some(&high), key)))
}

/// The ends of a range, each of them in it or not.
type Ends<T> = ((T, bool), (T, bool));

/// What of `bounds` is within a type of whole numbers that goes from `least` to `most`.
fn whole<T: Copy>(
    bounds: &Bounds<f64>,
    (least, most): (T, T),
    cast: fn(f64) -> T,
    back: fn(T) -> f64,
) -> Option<Ends<T>> {
    let is_whole = |number: f64| number.fract() == 0.0;
    let low = match bounds.low {
        Some((end, _)) if end > back(most) => return None,
        Some((end, is_in)) if end >= back(least) => (cast(end.ceil()), is_in || !is_whole(end)),
        _ => (least, true),
    };
    let high = match bounds.high {
        Some((end, _)) if end < back(least) => return None,
        Some((end, is_in)) if end <= back(most) => (cast(end.floor()), is_in || !is_whole(end)),
        _ => (most, true),
    };
    Some((low, high))
}
