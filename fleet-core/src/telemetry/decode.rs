//! One reading from its JSON, straight from the bytes: numbers and booleans are never boxed.
//!
//! Total: any bytes give a reading or a reason. What PostgreSQL would refuse (U+0000, endless nesting) is
//! refused here, so that one device can never make a batch fail.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::ops::Range;

use serde::Deserialize as _;
use serde::de::{self, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::Limits;

/// Longest name of a metric, in bytes.
pub const MAX_METRIC_NAME_BYTES: usize = 128;

/// Deepest nesting of a value that is an array or an object.
pub const MAX_VALUE_DEPTH: usize = 32;

/// Integers up to here, either way from zero, are exact as a double.
const EXACT: u64 = 1 << 53;

/// A value as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Number(f64),
    Boolean(bool),
    /// Text, arrays, objects, null, and integers that a double cannot hold.
    Other(serde_json::Value),
}

/// One metric of a reading; the name lies in [`Reading::names`].
#[derive(Debug)]
struct Member {
    name: Range<usize>,
    value: Value,
}

/// A decoded reading. One is used for many messages, so that its buffers are allocated once.
#[derive(Debug, Default)]
pub(super) struct Reading {
    pub(super) ts: Option<i64>,
    pub(super) seq: Option<i64>,
    names: String,
    members: Vec<Member>,
    fault: Option<Fault>,
    enveloped: bool,
    /// Whether a `ts` or `seq` member was there at all.
    headed: bool,
}

/// Why a reading is refused. Kept aside until the object is read: a fault in a member that turns out to be beside
/// `values` does not count.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Fault {
    Nul,
    TooDeep,
    EmptyName,
    LongName,
    TooMany(usize),
    ValuesNotObject,
    BadHead(&'static str),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nul => f.write_str("a text contains U+0000, which cannot be stored"),
            Self::TooDeep => write!(f, "a value is nested more than {MAX_VALUE_DEPTH} deep"),
            Self::EmptyName => f.write_str("a metric has an empty name"),
            Self::LongName => write!(f, "the name of a metric is longer than {MAX_METRIC_NAME_BYTES} bytes"),
            Self::TooMany(max) => write!(f, "more than {max} metrics in one reading"),
            Self::ValuesNotObject => f.write_str("`values` is not an object of metrics"),
            Self::BadHead(name) => {
                write!(
                    f,
                    "`{name}` is not an integer from 0 to {}",
                    if *name == "ts" { super::MAX_TS_MS } else { i64::MAX }
                )
            }
        }
    }
}

/// The elements of an array of readings, each as it was written.
///
/// # Errors
/// The reason: not JSON, or more than `max` elements.
pub(super) fn elements(payload: &[u8], max: usize) -> Result<Vec<&[u8]>, String> {
    struct Elements(usize);
    impl<'de> Visitor<'de> for Elements {
        type Value = Option<Vec<&'de [u8]>>;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an array of readings")
        }
        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
            let mut found = Vec::new();
            while let Some(raw) = seq.next_element::<&RawValue>()? {
                if found.len() == self.0 {
                    while seq.next_element::<IgnoredAny>()?.is_some() {}
                    return Ok(None);
                }
                found.push(raw.get().as_bytes());
            }
            Ok(Some(found))
        }
    }
    let mut json = serde_json::Deserializer::from_slice(payload);
    de::Deserializer::deserialize_seq(&mut json, Elements(max))
        .and_then(|found| json.end().map(|()| found))
        .map_err(|e| not_json(&e))?
        .ok_or_else(|| format!("more than {max} readings in one message"))
}

fn not_json(error: &serde_json::Error) -> String {
    format!("not readable as JSON: {error}")
}

impl Reading {
    /// Replaces `self` by the reading that `payload`, one object, holds.
    ///
    /// # Errors
    /// The reason, for whoever wrote the device's software.
    pub(super) fn decode(&mut self, payload: &[u8], limits: &Limits) -> Result<(), String> {
        self.reset();
        let mut json = serde_json::Deserializer::from_slice(payload);
        de::Deserializer::deserialize_map(&mut json, Object { reading: self, limits })
            .and_then(|()| json.end())
            .map_err(|e| not_json(&e))?;
        if self.headed && !self.enveloped && self.fault.is_none() {
            return Err("`ts` or `seq` without `values`: expected {\"ts\":…,\"seq\":…,\"values\":{…}}".to_owned());
        }
        match &self.fault {
            Some(fault) => Err(fault.to_string()),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {
        (self.ts, self.seq) = (None, None);
        (self.enveloped, self.headed) = (false, false);
        self.restart_members();
    }

    fn restart_members(&mut self) {
        self.names.clear();
        self.members.clear();
        // What is wrong with `ts` stays wrong.
        self.fault.take_if(|fault| !matches!(fault, Fault::BadHead(_)) || !self.headed);
    }

    /// The metrics in the order they were sent; a name may come twice, the last counts.
    pub(super) fn members(&self) -> impl ExactSizeIterator<Item = (&str, &Value)> {
        self.members.iter().map(|member| (&self.names[member.name.clone()], &member.value))
    }

    /// Takes out the values that are neither numbers nor booleans, by name; `None` when there are none. Where one name
    /// came more than once, the last of any kind stays.
    pub(super) fn take_rest(&mut self) -> Option<BTreeMap<String, serde_json::Value>> {
        if !self.members.iter().any(|member| matches!(member.value, Value::Other(_))) {
            return None;
        }
        let mut last: BTreeMap<&str, usize> = BTreeMap::new();
        for (nth, member) in self.members.iter().enumerate() {
            last.insert(&self.names[member.name.clone()], nth);
        }
        let mut stays = vec![false; self.members.len()];
        for nth in last.into_values() {
            stays[nth] = true;
        }
        let mut rest = BTreeMap::new();
        let mut stays = stays.into_iter();
        let names = &self.names;
        self.members.retain_mut(|member| {
            let stays = stays.next().unwrap_or(false);
            if let (true, Value::Other(value)) = (stays, &mut member.value) {
                rest.insert(names[member.name.clone()].to_owned(), value.take());
            }
            stays && !matches!(member.value, Value::Other(_))
        });
        Some(rest)
    }

    fn push(&mut self, name: &str, value: Result<Value, Fault>) {
        let fault = match value {
            _ if name.is_empty() => Fault::EmptyName,
            _ if name.len() > MAX_METRIC_NAME_BYTES => Fault::LongName,
            _ if name.as_bytes().contains(&0) => Fault::Nul,
            Err(fault) => fault,
            Ok(value) => {
                let start = self.names.len();
                self.names.push_str(name);
                self.members.push(Member { name: start..self.names.len(), value });
                return;
            }
        };
        self.fault.get_or_insert(fault);
    }
}

/// The whole message: an envelope or a bare object of metrics.
struct Object<'a> {
    reading: &'a mut Reading,
    limits: &'a Limits,
}

impl<'de> Visitor<'de> for Object<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of metrics, or an array of such objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { reading, limits } = self;
        while let Some(Name(name)) = map.next_key()? {
            match name.as_ref() {
                head @ ("ts" | "seq") => {
                    reading.headed = true;
                    let (max, into, name) = if head == "ts" {
                        (super::MAX_TS_MS, &mut reading.ts, "ts")
                    } else {
                        (i64::MAX, &mut reading.seq, "seq")
                    };
                    match map.next_value_seed(Integer(max))? {
                        Ok(number) => *into = number,
                        Err(()) => reading.fault = Some(Fault::BadHead(name)),
                    }
                }
                "values" => {
                    reading.enveloped = true;
                    reading.restart_members();
                    map.next_value_seed(Metrics { reading: &mut *reading, limits })?;
                }
                // Beside `values` anything else may stand.
                _ if reading.enveloped => drop(map.next_value::<IgnoredAny>()?),
                name => metric(reading, limits, name, &mut map)?,
            }
        }
        Ok(())
    }
}

/// Reads the value that belongs to `name` and keeps both, within the limit.
fn metric<'de, A: MapAccess<'de>>(
    reading: &mut Reading,
    limits: &Limits,
    name: &str,
    map: &mut A,
) -> Result<(), A::Error> {
    if reading.members.len() >= limits.max_metrics {
        reading.fault.get_or_insert(Fault::TooMany(limits.max_metrics));
        map.next_value::<IgnoredAny>()?;
        return Ok(());
    }
    let value = map.next_value_seed(Metric)?;
    reading.push(name, value);
    Ok(())
}

/// The object `values`. Anything else there is a fault of the reading, not of the JSON.
struct Metrics<'a> {
    reading: &'a mut Reading,
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for Metrics<'_> {
    type Value = ();
    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// The scalars a visitor treats alike.
macro_rules! scalars {
    ($of:ident => $($visit:ident: $kind:ty),*) => {
        $(fn $visit<E>(self, _: $kind) -> Result<Self::Value, E> { Ok(self.$of()) })*
        fn visit_unit<E>(self) -> Result<Self::Value, E> { Ok(self.$of()) }
    };
}

impl Metrics<'_> {
    fn not_an_object(self) {
        self.reading.fault.get_or_insert(Fault::ValuesNotObject);
    }
}

impl<'de> Visitor<'de> for Metrics<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of metrics")
    }

    scalars!(not_an_object => visit_bool: bool, visit_u64: u64, visit_i64: i64, visit_f64: f64, visit_str: &str);

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        self.not_an_object();
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { reading, limits } = self;
        while let Some(Name(name)) = map.next_key()? {
            metric(reading, limits, &name, &mut map)?;
        }
        Ok(())
    }
}

/// The name of a member, borrowed from the payload unless it holds escapes.
struct Name<'a>(Cow<'a, str>);

impl<'de> de::Deserialize<'de> for Name<'de> {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Borrow;
        impl<'de> Visitor<'de> for Borrow {
            type Value = Name<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name")
            }
            fn visit_borrowed_str<E>(self, name: &'de str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Borrowed(name)))
            }
            fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
                Ok(Name(Cow::Owned(name.to_owned())))
            }
        }
        deserializer.deserialize_str(Borrow)
    }
}

/// An integer from 0 to the maximum; `null` counts as absent, `3.0` as 3.
struct Integer(i64);

impl<'de> DeserializeSeed<'de> for Integer {
    type Value = Result<Option<i64>, ()>;
    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Integer {
    type Value = Result<Option<i64>, ()>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an integer from 0 to {}", self.0)
    }
    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        Ok(i64::try_from(number).ok().filter(|number| *number <= self.0).map(Some).ok_or(()))
    }
    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(if (0..=self.0).contains(&number) { Ok(Some(number)) } else { Err(()) })
    }
    #[expect(clippy::cast_possible_truncation, clippy::cast_precision_loss, reason = "whole and within ±2^53")]
    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        let whole = number.fract() == 0.0 && (0.0..=EXACT as f64).contains(&number) && number as i64 <= self.0;
        Ok(if whole { Ok(Some(number as i64)) } else { Err(()) })
    }
    fn visit_bool<E>(self, _: bool) -> Result<Self::Value, E> {
        Ok(Err(()))
    }
    fn visit_str<E>(self, _: &str) -> Result<Self::Value, E> {
        Ok(Err(()))
    }
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Ok(None))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Err(()))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Err(()))
    }
}

/// The value of a metric. A fault is a value here, so that the rest of the message is still read.
struct Metric;

impl<'de> DeserializeSeed<'de> for Metric {
    type Value = Result<Value, Fault>;
    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Metric {
    type Value = Result<Value, Fault>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Ok(Value::Boolean(value)))
    }
    #[expect(clippy::cast_precision_loss, reason = "exact within ±2^53")]
    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Ok(if value <= EXACT { Value::Number(value as f64) } else { Value::Other(value.into()) }))
    }
    #[expect(clippy::cast_precision_loss, reason = "exact within ±2^53")]
    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Ok(if value.unsigned_abs() <= EXACT { Value::Number(value as f64) } else { Value::Other(value.into()) }))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        // Zero has one sign, so that a reading has one form.
        Ok(Ok(Value::Number(if value == 0.0 { 0.0 } else { value })))
    }
    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(checked(text).map(Value::Other))
    }
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Ok(Value::Other(serde_json::Value::Null)))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Self::Value, A::Error> {
        Ok(Nested(1).visit_seq(seq)?.map(Value::Other))
    }
    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        Ok(Nested(1).visit_map(map)?.map(Value::Other))
    }
}

fn checked(text: &str) -> Result<serde_json::Value, Fault> {
    if text.as_bytes().contains(&0) { Err(Fault::Nul) } else { Ok(text.into()) }
}

/// A value inside a value, at that depth.
struct Nested(usize);

impl<'de> DeserializeSeed<'de> for Nested {
    type Value = Result<serde_json::Value, Fault>;
    fn deserialize<D: de::Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        if self.0 > MAX_VALUE_DEPTH {
            IgnoredAny::deserialize(deserializer)?;
            return Ok(Err(Fault::TooDeep));
        }
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Nested {
    type Value = Result<serde_json::Value, Fault>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }
    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Ok(value.into()))
    }
    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(Ok(value.into()))
    }
    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Ok(value.into()))
    }
    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Ok(value.into()))
    }
    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(checked(text))
    }
    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(Ok(serde_json::Value::Null))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        let mut all = Ok(Vec::new());
        while let Some(element) = seq.next_element_seed(Nested(self.0 + 1))? {
            match (&mut all, element) {
                (Ok(list), Ok(element)) => list.push(element),
                (Ok(_), Err(fault)) => all = Err(fault),
                (Err(_), _) => {}
            }
        }
        Ok(all.map(Into::into))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut all = Ok(serde_json::Map::new());
        while let Some(Name(name)) = map.next_key()? {
            let value = map.next_value_seed(Nested(self.0 + 1))?;
            let value = if name.as_bytes().contains(&0) { Err(Fault::Nul) } else { value };
            match (&mut all, value) {
                (Ok(object), Ok(value)) => drop(object.insert(name.into_owned(), value)),
                (Ok(_), Err(fault)) => all = Err(fault),
                (Err(_), _) => {}
            }
        }
        Ok(all.map(Into::into))
    }
}

/// Appends `value` to `out` as JSON with the members of objects in order of name: equal values, equal text.
pub(super) fn write_canonical(out: &mut String, value: &serde_json::Value) {
    match value {
        serde_json::Value::Array(list) => {
            out.push('[');
            for (i, element) in list.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                write_canonical(out, element);
            }
            out.push(']');
        }
        serde_json::Value::Object(map) => {
            let mut members: Vec<_> = map.iter().collect();
            members.sort_unstable_by_key(|(name, _)| *name);
            write_object(out, members.into_iter(), write_canonical);
        }
        scalar => write!(out, "{scalar}").expect("a string takes all"),
    }
}

/// Appends an object to `out`; `members` are in order of name.
pub(super) fn write_object<'a, V>(
    out: &mut String,
    members: impl Iterator<Item = (&'a String, V)>,
    write: impl Fn(&mut String, V),
) {
    out.push('{');
    for (i, (name, value)) in members.enumerate() {
        if i > 0 {
            out.push(',');
        }
        write_text(out, name);
        out.push(':');
        write(out, value);
    }
    out.push('}');
}

/// Appends `text` as a JSON string.
pub(super) fn write_text(out: &mut String, text: &str) {
    out.push_str(&serde_json::to_string(text).expect("text is always JSON"));
}
