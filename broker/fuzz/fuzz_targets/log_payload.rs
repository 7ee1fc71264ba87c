//! What a device sends as log lines: whatever it is, each of its lines is kept within the bounds or comes back with a reason, as
//! PostgreSQL takes it, and is the same line when it comes again.
//!
//! Input: how often its middle piece stands there, and what [`pieces::made`] takes.

#![no_main]

mod pieces;

use fleet_core::clock::from_ms;
use fleet_core::id::DeviceKey;
use fleet_core::log::{
    Batch, Limits, MAX_FIELD_NAME_BYTES, MAX_FIELDS, MAX_FIELDS_BYTES, MAX_MESSAGE_BYTES, MAX_NAME_BYTES, Row, pattern,
};
use libfuzzer_sys::fuzz_target;
use serde_json::{Map, Value};

/// Small, so that the fuzzer meets it.
const MAX_LINES: usize = 5;
const AHEAD_MS: i64 = 300_000;
/// When messages are received.
const NOW_MS: i64 = 1_795_300_000_000;

const PIECES: [&str; 48] = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    "\"",
    "\\",
    "\n",
    "\r\n",
    " ",
    "\\u0000",
    "\0",
    "\u{1}",
    "\\ud83d",
    "é",
    "\u{301}",
    "{\"message\":\"",
    "\"message\":",
    "\"msg\":",
    "\"ts\":",
    "\"seq\":",
    "\"level\":",
    "\"target\":",
    "\"trace_id\":",
    "\"fields\":{",
    "\"x\":",
    "\"x\":{",
    "\"y\":[",
    "\"\":",
    "\"warn\"",
    "\"loud\"",
    "\"a\"",
    "\"\\u0000\"",
    "null",
    "true",
    "0",
    "-1",
    "42",
    "1.5",
    "1e308",
    "1e999",
    "18446744073709551616",
    "1795299999000",
    "1795400000000",
    "9223372036854775807",
    "a line",
    "192.168.0.1",
];

fuzz_target!(|input: &[u8]| {
    let [times, input @ ..] = input else { return };
    let payload = pieces::made(input, &PIECES, usize::from(*times));
    let (limits, device) = (Limits { max_lines: MAX_LINES, max_ahead_ms: AHEAD_MS }, DeviceKey(7));
    let push = || {
        let mut batch = Batch::default();
        let rejected = batch.push(device, &payload, NOW_MS, &limits).len();
        (batch, rejected)
    };
    let (batch, rejected) = push();
    assert_eq!(batch.len() + rejected, sent(&payload), "every line is kept or comes back");
    batch.rows().for_each(check);
    assert!(batch.rows().eq(push().0.rows()), "what comes again is the same");
});

/// How many lines that is, by the words of the reference. What cannot be read as a whole counts as one.
fn sent(payload: &[u8]) -> usize {
    let Ok(text) = std::str::from_utf8(payload) else { return 1 };
    let lines = || match text.lines().count() {
        count if count > MAX_LINES => 1,
        _ => text.lines().filter(|line| !line.trim().is_empty()).count().max(1),
    };
    let first = text.trim_start().chars().next();
    match serde_json::from_str::<Value>(text) {
        Ok(Value::Array(lines)) if lines.len() > MAX_LINES => 1,
        Ok(Value::Array(lines)) => lines.len(),
        Ok(Value::Object(_) | Value::String(_)) => 1,
        Err(_) if first == Some('{') => 1,
        // A number, or `true`, is a text like another.
        Ok(_) | Err(_) => lines(),
    }
}

fn check(row: Row<'_>) {
    let is_text = |text: &str, most: usize| text.len() <= most && !text.contains('\0');
    assert!(is_text(row.message, MAX_MESSAGE_BYTES), "{} bytes", row.message.len());
    assert!(row.target.is_none_or(|target| is_text(target, MAX_NAME_BYTES)), "{:?}", row.target);
    assert!(row.trace.is_none_or(|trace| is_text(trace, MAX_NAME_BYTES)), "{:?}", row.trace);
    assert!((1..=6).contains(&row.level));
    assert!((0..=NOW_MS + AHEAD_MS).contains(&row.ts_ms), "{}", row.ts_ms);
    assert!(row.sent_at_ms.is_none_or(|sent_at| sent_at > NOW_MS + AHEAD_MS && row.ts_ms == NOW_MS));
    let _time = from_ms(row.sent_at_ms.unwrap_or(row.ts_ms)).to_rfc3339();
    if let Some(fields) = row.fields {
        assert!(fields.len() <= MAX_FIELDS_BYTES, "{} bytes of fields", fields.len());
        let fields = serde_json::from_str::<Map<String, Value>>(fields).expect("an object");
        assert!((1..=MAX_FIELDS).contains(&fields.len()), "{} fields", fields.len());
        for (name, value) in &fields {
            assert!(!name.is_empty() && is_text(name, MAX_FIELD_NAME_BYTES), "{name:?}");
            assert!(is_kept(value), "{value}");
        }
    }
    assert!(pattern::of(row.message).text().len() <= pattern::MAX_BYTES);
}

/// A scalar, or an array of scalars, without U+0000.
fn is_kept(value: &Value) -> bool {
    let is_scalar = |value: &Value| match value {
        Value::String(text) => !text.contains('\0'),
        Value::Array(_) | Value::Object(_) => false,
        Value::Null | Value::Bool(_) | Value::Number(_) => true,
    };
    if let Value::Array(values) = value { values.iter().all(is_scalar) } else { is_scalar(value) }
}
