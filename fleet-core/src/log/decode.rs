//! Log lines from what a device sent: JSON, one line or an array of them, or plain text with a line each.
//!
//! Total: any bytes give lines or reasons. What is too long is cut and marked, never refused; what PostgreSQL cannot store (U+0000)
//! is replaced.

use serde_json::{Map, Value};

use super::{Cut, MAX_FIELD_NAME_BYTES, MAX_FIELDS, MAX_FIELDS_BYTES, MAX_MESSAGE_BYTES, MAX_NAME_BYTES, Record};
use crate::level::Level;
use crate::telemetry::{MAX_TS_MS, Rejected};

/// How deep the objects of `fields` are taken apart.
const MAX_DEPTH: usize = 8;
/// Values of a field that is an array.
const MAX_VALUES: usize = 64;

/// A line, as it was sent.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct Line {
    pub(super) ts: Option<i64>,
    pub(super) seq: Option<i64>,
    pub(super) level: Level,
    pub(super) target: Option<String>,
    pub(super) message: String,
    pub(super) trace: Option<String>,
    pub(super) fields: Map<String, Value>,
    pub(super) cut: Cut,
    pub(super) told_apart_by: i64,
}

impl From<Record> for Line {
    fn from(record: Record) -> Self {
        let mut line =
            Self { ts: record.ts_ms, level: record.level, told_apart_by: record.told_apart_by, ..Self::default() };
        line.message = line.cut.text(&record.message, MAX_MESSAGE_BYTES, Cut::MESSAGE);
        line.target = record.target.map(|target| line.cut.text(&target, MAX_NAME_BYTES, Cut::MESSAGE));
        line.trace = record.trace.map(|trace| line.cut.text(&trace, MAX_NAME_BYTES, Cut::MESSAGE));
        for (name, value) in &record.fields {
            line.field(name, value, 1);
        }
        line.bound_fields();
        line
    }
}

/// The lines of a message, at most `most`; what could not be read stands among them with its reason.
pub(super) fn lines(payload: &[u8], most: usize) -> Vec<Result<Line, Rejected>> {
    let whole = |reason: String| vec![Err(Rejected { reason, payload: payload.to_vec() })];
    let Ok(text) = std::str::from_utf8(payload) else { return whole("neither JSON nor text in UTF-8".to_owned()) };
    let begins = text.trim_start().as_bytes().first().copied();
    let json = matches!(begins, Some(b'{' | b'[' | b'"')).then(|| serde_json::from_str::<Value>(text));
    let too_many = || format!("more than {most} lines in one message");
    match json {
        Some(Ok(Value::Array(elements))) if elements.len() > most => whole(too_many()),
        Some(Ok(Value::Array(elements))) => elements.into_iter().map(one).collect(),
        Some(Ok(value)) => vec![one(value)],
        Some(Err(error)) if begins == Some(b'{') => whole(format!("not readable as JSON: {error}")),
        // A text may begin with a bracket or a quote, and often does.
        _ if text.trim().is_empty() => whole("an empty message: expected a line".to_owned()),
        _ if text.lines().take(most + 1).count() > most => whole(too_many()),
        _ => text.lines().filter(|line| !line.trim().is_empty()).map(|line| Ok(plain(line))).collect(),
    }
}

fn plain(text: &str) -> Line {
    let mut line = Line::default();
    line.message = line.cut.text(text, MAX_MESSAGE_BYTES, Cut::MESSAGE);
    line
}

fn one(value: Value) -> Result<Line, Rejected> {
    let refused =
        |reason: &str, value: &Value| Rejected { reason: reason.to_owned(), payload: value.to_string().into() };
    match value {
        Value::String(text) => Ok(plain(&text)),
        Value::Object(members) => object(&members).map_err(|reason| refused(&reason, &Value::Object(members.clone()))),
        other => Err(refused("a line is an object with a `message`, or a text", &other)),
    }
}

fn object(members: &Map<String, Value>) -> Result<Line, String> {
    let Some(message) = members.get("message").or_else(|| members.get("msg")) else {
        return Err("a line without `message`: expected {\"ts\":…,\"level\":…,\"message\":…,\"fields\":{…}}".to_owned());
    };
    let mut line = Line::default();
    let message = message.as_str().map_or_else(|| message.to_string(), ToOwned::to_owned);
    line.message = line.cut.text(&message, MAX_MESSAGE_BYTES, Cut::MESSAGE);
    line.ts = members.get("ts").map(|ts| whole("ts", ts, MAX_TS_MS)).transpose()?;
    line.seq = members.get("seq").map(|seq| whole("seq", seq, i64::MAX)).transpose()?;
    for (name, value) in members {
        match (name.as_str(), value) {
            ("message" | "msg" | "ts" | "seq", _) | (_, Value::Null) => {}
            ("target", Value::String(target)) => {
                line.target = Some(line.cut.text(target, MAX_NAME_BYTES, Cut::MESSAGE));
            }
            ("trace_id", Value::String(trace)) => line.trace = Some(line.cut.text(trace, MAX_NAME_BYTES, Cut::MESSAGE)),
            ("fields", Value::Object(fields)) => {
                for (name, value) in fields {
                    line.field(name, value, 1);
                }
            }
            ("level", Value::String(level)) => match level.parse() {
                Ok(level) => line.level = level,
                // Kept as it is said; a line is worth more than a name that we know.
                Err(_) => line.field("level", value, 1),
            },
            _ => line.field(name, value, 1),
        }
    }
    line.bound_fields();
    Ok(line)
}

fn whole(name: &str, value: &Value, most: i64) -> Result<i64, String> {
    let number = value.as_i64().filter(|number| (0..=most).contains(number));
    number.ok_or_else(|| format!("`{name}` is not an integer from 0 to {most}"))
}

impl Line {
    /// Takes a field; one that is an object becomes its members, with names joined by dots.
    fn field(&mut self, name: &str, value: &Value, depth: usize) {
        let name = name.replace('\0', "\u{fffd}");
        match value {
            Value::Null => {}
            // Below a name that is too long there is none that fits.
            Value::Object(members) if depth < MAX_DEPTH && name.len() <= MAX_FIELD_NAME_BYTES => {
                for (inner, value) in members {
                    self.field(&format!("{name}.{inner}"), value, depth + 1);
                }
            }
            _ if self.fields.len() >= MAX_FIELDS || name.is_empty() || name.len() > MAX_FIELD_NAME_BYTES => {
                self.cut.add(Cut::FIELDS);
            }
            _ => {
                let value = self.value(value);
                self.fields.insert(name, value);
            }
        }
    }

    /// A value as it is kept: a scalar, or an array of scalars. What is deeper is its text.
    fn value(&mut self, value: &Value) -> Value {
        match value {
            Value::Bool(_) | Value::Number(_) | Value::Null => value.clone(),
            Value::String(text) => Value::String(self.cut.text(text, MAX_FIELDS_BYTES, Cut::FIELDS)),
            Value::Array(values) if values.iter().all(|value| !value.is_array() && !value.is_object()) => {
                if values.len() > MAX_VALUES {
                    self.cut.add(Cut::FIELDS);
                }
                values.iter().take(MAX_VALUES).map(|value| self.value(value)).collect()
            }
            deep => Value::String(self.cut.text(&deep.to_string(), MAX_FIELDS_BYTES, Cut::FIELDS)),
        }
    }

    /// Leaves out fields that would make them take more than they may, in the order of their names.
    fn bound_fields(&mut self) {
        let json_bytes = |value: &Value| value.to_string().len();
        // With a colon and a comma, which the first does without, and a brace at each end.
        let bytes = |name: &str, value: &Value| json_bytes(&Value::from(name)) + json_bytes(value) + 2;
        let mut left = MAX_FIELDS_BYTES - 1;
        let before = self.fields.len();
        self.fields.retain(|name, value| {
            let rest = left.checked_sub(bytes(name, value));
            left = rest.unwrap_or(left);
            rest.is_some()
        });
        if self.fields.len() < before {
            self.cut.add(Cut::FIELDS);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn read(payload: &str) -> Line {
        let mut lines = lines(payload.as_bytes(), 100);
        assert_eq!(lines.len(), 1, "{lines:?}");
        lines.remove(0).unwrap_or_else(|rejected| panic!("{payload}: {}", rejected.reason))
    }

    #[test]
    fn a_line_is_read_as_the_contract_writes_it() {
        let line = read(
            r#"{"ts":1763692212345,"seq":919,"level":"warn","target":"net.wifi","message":"reconnect 3","fields":{"rssi":-81},"trace_id":"ab"}"#,
        );
        assert_eq!((line.ts, line.seq, line.level), (Some(1_763_692_212_345), Some(919), Level::Warn));
        assert_eq!((line.target.as_deref(), line.trace.as_deref()), (Some("net.wifi"), Some("ab")));
        assert_eq!((line.message.as_str(), &line.fields["rssi"]), ("reconnect 3", &json!(-81)));
        assert!(!line.cut.is_any());
    }

    #[test]
    fn what_is_beside_the_contract_becomes_a_field() {
        let line = read(r#"{"msg":"x","level":"loud","fields":{"a":{"b":1,"c":[1,"two"]},"n":null},"pid":7}"#);
        let fields = json!({ "a.b": 1, "a.c": [1, "two"], "level": "loud", "pid": 7 });
        assert_eq!((Value::Object(line.fields), line.level), (fields, Level::Info));
    }

    #[test]
    fn text_is_a_line_each() {
        let found = lines(b"[ok] started\r\n\n\"quoted\" end\n", 10);
        let found = found.into_iter().map(|line| line.unwrap().message).collect::<Vec<_>>();
        assert_eq!(found, ["[ok] started", "\"quoted\" end"]);
        assert_eq!(read("\"a text in JSON\"").message, "a text in JSON");
        assert_eq!(lines(br#"["one", {"message": "two"}]"#, 10).len(), 2);
    }

    #[test]
    fn what_is_no_line_comes_back_with_the_reason() {
        for (payload, reason) in [
            (&b"{\"message\":\"x\""[..], "not readable as JSON"),
            (b"{\"level\":\"info\"}", "without `message`"),
            (b"[1]", "a line is an object"),
            (b"\xff\xfe", "UTF-8"),
            (b"", "an empty message"),
            (b" \n ", "an empty message"),
            (b"{\"message\":\"x\",\"ts\":-1}", "`ts` is not an integer"),
            (b"{\"message\":\"x\",\"seq\":1.5}", "`seq` is not an integer"),
            (b"a\nb\nc\nd", "more than 3 lines"),
            (b"[\"a\",\"b\",\"c\",\"d\"]", "more than 3 lines"),
        ] {
            let refused = lines(payload, 3).into_iter().find_map(Result::err).expect("refused");
            assert!(refused.reason.contains(reason), "{}: {}", payload.escape_ascii(), refused.reason);
        }
    }

    #[test]
    fn what_is_too_much_is_cut_and_marked() {
        let line = read(&json!({ "message": "ä".repeat(MAX_MESSAGE_BYTES) }).to_string());
        assert_eq!((line.message.len(), line.cut.names()), (MAX_MESSAGE_BYTES, vec!["message"]));
        let many = (0..=MAX_FIELDS).map(|n| (format!("f{n}"), json!(n))).collect::<Map<_, _>>();
        let line = read(&json!({ "message": "x", "fields": many }).to_string());
        assert_eq!((line.fields.len(), line.cut.names()), (MAX_FIELDS, vec!["fields"]));
        let large = json!({ "message": "x", "fields": { "a": "y".repeat(MAX_FIELDS_BYTES), "b": 1 } });
        let line = read(&large.to_string());
        assert_eq!(
            (line.fields.keys().map(String::as_str).collect::<Vec<_>>(), line.cut.names()),
            (vec!["b"], vec!["fields"])
        );
        let line = read(&json!({ "message": "x", "fields": { "n".repeat(MAX_FIELD_NAME_BYTES + 1): 1 } }).to_string());
        assert_eq!((line.fields.len(), line.cut.is_any()), (0, true));
        // What stands for U+0000 takes more room than it, and so does a name in JSON.
        let names = (0..3).map(|n| "\0".repeat(MAX_FIELD_NAME_BYTES / 3 + n)).map(|name| (name, json!(1)));
        let nul = json!({ "message": "\0".repeat(MAX_MESSAGE_BYTES), "target": "\0".repeat(MAX_NAME_BYTES), "fields": names.collect::<Map<_, _>>() });
        let line = read(&nul.to_string());
        assert!(
            line.message.len() <= MAX_MESSAGE_BYTES && line.target.is_some_and(|target| target.len() <= MAX_NAME_BYTES)
        );
        assert_eq!((line.fields.len(), line.cut.names()), (1, vec!["message", "fields"]));
        let name = |n: usize| "\u{1}".repeat(MAX_FIELD_NAME_BYTES - n / 8).replacen('\u{1}', &(n % 8).to_string(), 1);
        let fields = (0..MAX_FIELDS).map(|n| (name(n), json!(1))).collect::<Map<_, _>>();
        let line = read(&json!({ "message": "x", "fields": fields }).to_string());
        assert!(Value::Object(line.fields).to_string().len() <= MAX_FIELDS_BYTES && line.cut.names() == ["fields"]);
        let deep = "{\"a\":".repeat(20) + "1" + &"}".repeat(20);
        let line = read(&format!("{{\"message\":\"x\",\"fields\":{deep}}}"));
        assert_eq!(line.fields.len(), 1);
    }

    proptest! {
        #[test]
        fn any_bytes_give_lines_or_reasons(payload in proptest::collection::vec(any::<u8>(), 0..60)) {
            for line in lines(&payload, 5).into_iter().flatten() {
                prop_assert!(!line.message.contains('\0'));
            }
        }

        #[test]
        fn any_json_gives_lines_within_bounds(text in "(\\{\"message\":\"|\\[|\\]|\\{|\\}|\"|,|:|a|\\\\u0000|1|null|\"fields\"|\"ts\"){0,14}") {
            for line in lines(text.as_bytes(), 5).into_iter().flatten() {
                prop_assert!(!line.message.contains('\0') && line.fields.len() <= MAX_FIELDS);
            }
        }
    }
}
