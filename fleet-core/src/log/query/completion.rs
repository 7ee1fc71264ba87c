//! What a console offers while a query is written.

use super::SCHEMA;
use crate::level::Level;
use crate::query::Kind;

/// A field that can be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// As it is written; one that ends in a dot is followed by a name.
    pub name: &'static str,
    /// What it holds.
    pub kind: &'static str,
    /// What it is about, in a few words.
    pub meaning: &'static str,
    /// A term with it.
    pub example: &'static str,
    /// What may stand between it and its value.
    pub operators: &'static [&'static str],
    /// The values there are, where they are few.
    pub values: &'static [&'static str],
}

const EXAMPLES: &[(&str, &str, &str)] = &[
    ("message", "the words of the message", "message:\"no carrier\""),
    ("level", "how much the line matters", "level:>=warn"),
    ("ts", "its time", "ts:>now-15m"),
    ("target", "the part of the program that wrote it", "target:net.*"),
    ("trace_id", "what it belongs to", "trace_id:0af7651916cd43dd8448eb211c80319c"),
    ("pattern", "what it has in common with similar lines", "pattern:9ae16a3b2f90404f"),
    ("cut", "whether something of it was too long", "cut:true"),
    ("clamped", "whether the device's clock ran ahead", "clamped:true"),
    ("device", "the device's id", "device:pump-*"),
    ("type", "the device's type", "type:freezer"),
    ("group", "the device's group and all above it", "group:site/line-3"),
    ("gateway", "the device's gateway", "gateway:gw-1"),
    ("state", "the device's state", "state:lost"),
    ("firmware", "the version the device said last", "firmware:<2.0"),
    ("disabled", "whether the device is disabled", "disabled:true"),
    ("created", "when the device was enrolled", "created:>now-7d"),
    ("seen", "when the device was last heard", "seen:<now-1h"),
    ("missing", "sequence numbers of the device that never came", "missing:>0"),
    ("fields.", "a field of the line", "fields.code:42"),
    ("label.", "a label of the device", "label.site:oslo"),
];

const LEVELS: [&str; 6] = ["trace", "debug", "info", "warn", "error", "fatal"];
const EQUAL: &[&str] = &[":"];
const ORDERED: &[&str] = &[":", ":<", ":<=", ":>", ":>=", ":[", ":{"];

/// The fields of [`SCHEMA`] in its order.
pub fn fields() -> Vec<Completion> {
    debug_assert!(Level::ALL.map(Level::name) == LEVELS);
    SCHEMA.fields.iter().chain(SCHEMA.families).map(|(name, kind)| one(name, *kind)).collect()
}

fn one(name: &'static str, kind: Kind) -> Completion {
    let about = EXAMPLES.iter().find(|(named, ..)| *named == name);
    let (meaning, example) = about.map_or(("", ""), |(_, meaning, example)| (*meaning, *example));
    let (kind, operators, values): (_, _, &[&str]) = match kind {
        Kind::Text => ("text", EQUAL, &[]),
        Kind::Name => ("name", EQUAL, &[]),
        Kind::OneOf(names) => ("one_of", EQUAL, names),
        Kind::Path => ("path", EQUAL, &[]),
        Kind::Level => ("level", ORDERED, &LEVELS),
        Kind::Number => ("number", ORDERED, &[]),
        Kind::Time => ("time", ORDERED, &[]),
        Kind::Version => ("version", ORDERED, &[]),
        Kind::Flag => ("flag", EQUAL, &["true", "false"]),
        Kind::Any => ("any", ORDERED, &[]),
    };
    Completion { name, kind, meaning, example, operators, values }
}
