//! Lines as people read them. What a device sent cannot move the terminal's cursor, nor anything else of it.

use std::fmt::Write as _;

use serde_json::Value;

/// How lines are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    /// For a file or a program.
    Plain,
    /// For a terminal.
    Coloured,
    /// As the server answers them.
    Json,
}

/// `2026-11-22T01:02:03.456Z WARN pump-7 net.wifi: message key=value`
pub(crate) fn line(line: &Value, style: Style) -> String {
    if style == Style::Json {
        return line.to_string();
    }
    let text = |name: &str| safe(line[name].as_str().unwrap_or_default());
    let level = text("level").to_uppercase();
    let target = Some(text("target")).filter(|target| !target.is_empty());
    let from = target.map_or_else(|| text("device"), |target| format!("{} {target}", text("device")));
    let fields = line["fields"].as_object().into_iter().flatten();
    let fields = fields.fold(String::new(), |mut fields, (name, value)| {
        let _never_fails = write!(fields, " {}={}", safe(name), field(value));
        fields
    });
    match style {
        Style::Coloured => {
            let colour = colour(&level);
            let (ts, message) = (text("ts"), text("message"));
            format!(
                "\x1b[2m{ts}\x1b[0m \x1b[{colour}m{level:<5}\x1b[0m \x1b[1m{from}\x1b[0m: {message}\x1b[2m{fields}\x1b[0m"
            )
        }
        Style::Plain | Style::Json => format!("{} {level} {from}: {}{fields}", text("ts"), text("message")),
    }
}

fn colour(level: &str) -> &'static str {
    match level {
        "FATAL" => "1;31",
        "ERROR" => "31",
        "WARN" => "33",
        "INFO" => "32",
        _ => "2",
    }
}

/// A text without a space stands for itself, all else is JSON.
fn field(value: &Value) -> String {
    match value {
        Value::String(text) if !text.is_empty() && !text.contains([' ', '"', '=']) => safe(text),
        value => safe(&value.to_string()),
    }
}

/// Control characters, and those that change the direction of writing, as escapes.
fn safe(text: &str) -> String {
    let is_harmless = |c: char| {
        !c.is_control() && !matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if is_harmless(c) { safe.push(c) } else { safe.extend(c.escape_default()) }
    }
    safe
}

/// What is said of a gap.
pub(crate) fn gap(gap: &Value) -> String {
    match (gap["missed"].as_u64(), gap["from"].as_str(), gap["to"].as_str()) {
        (Some(missed), Some(from), Some(to)) => format!("{missed} lines are missing, from {from} to {to}"),
        (Some(missed), ..) => format!("{missed} lines are missing"),
        (None, ..) => "lines are missing: the tail was away for too long".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_line_is_printed_for_people() {
        let mut told = json!({
            "ts": "2026-11-22T01:02:03.456Z", "level": "warn", "device": "pump-7", "target": "net.wifi",
            "message": "no carrier", "fields": { "rssi": -81, "ssid": "hall 3", "tag": "a", "some": [1, "x"] },
        });
        let expected =
            r#"2026-11-22T01:02:03.456Z WARN pump-7 net.wifi: no carrier rssi=-81 some=[1,"x"] ssid="hall 3" tag=a"#;
        assert_eq!(line(&told, Style::Plain), expected);
        assert!(line(&told, Style::Coloured).contains("\x1b[33mWARN \x1b[0m"));
        assert_eq!(line(&told, Style::Json), told.to_string());
        told["target"] = Value::Null;
        told["fields"] = json!({});
        assert_eq!(line(&told, Style::Plain), "2026-11-22T01:02:03.456Z WARN pump-7: no carrier");
    }

    #[test]
    fn what_a_device_sent_cannot_command_the_terminal() {
        let told = json!({ "message": "a\x1b[2Jb\r\nc\u{202e}d", "fields": { "k\x07": "\x1b]0;x\x07" } });
        let printed = line(&told, Style::Plain);
        assert!(!printed.chars().any(char::is_control) && !printed.contains('\u{202e}'), "{printed:?}");
        assert!(printed.contains(r"a\u{1b}[2Jb\r\nc\u{202e}d"), "{printed}");
    }

    #[test]
    fn a_gap_says_what_is_known() {
        let known = json!({ "missed": 3, "from": "a", "to": "b" });
        assert_eq!(gap(&known), "3 lines are missing, from a to b");
        assert_eq!(gap(&json!({ "missed": null })), "lines are missing: the tail was away for too long");
    }
}
