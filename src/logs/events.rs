//! Server-sent events, read (WHATWG HTML, "Interpreting an event stream"), as far as a tail sends them.

use anyhow::bail;
use reqwest::Response;
use serde_json::Value;

/// Longest event that is read, in bytes.
const MAX_EVENT_BYTES: usize = 1_048_576;

/// An event; one without a name only moves on.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Event {
    pub(crate) name: String,
    pub(crate) id: Option<String>,
    pub(crate) data: Value,
}

/// The events of an answer.
pub(crate) struct Events {
    answer: Response,
    buffer: Vec<u8>,
}

impl Events {
    pub(crate) fn new(answer: Response) -> Self {
        Self { answer, buffer: Vec::new() }
    }

    /// The next event; `None` when the answer has ended.
    pub(crate) async fn next(&mut self) -> anyhow::Result<Option<Event>> {
        loop {
            if let Some(event) = take(&mut self.buffer) {
                return Ok(Some(event));
            }
            if self.buffer.len() > MAX_EVENT_BYTES {
                bail!("an event of more than {MAX_EVENT_BYTES} bytes");
            }
            let Some(more) = self.answer.chunk().await? else { return Ok(None) };
            self.buffer.extend_from_slice(&more);
        }
    }
}

/// The first event that is there as a whole.
fn take(buffer: &mut Vec<u8>) -> Option<Event> {
    let end = buffer.windows(2).position(|two| two == b"\n\n")?;
    let rest = buffer.split_off(end + 2);
    let text = String::from_utf8_lossy(&std::mem::replace(buffer, rest)).into_owned();
    let mut event = Event::default();
    let mut data = String::new();
    for line in text.lines() {
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut event.name),
            "id" => event.id = Some(value.to_owned()),
            "data" => {
                data.push_str(value);
                data.push('\n');
            }
            _ => {}
        }
    }
    event.data = serde_json::from_str(&data).unwrap_or_default();
    Some(event)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn events_are_read_however_they_are_cut() {
        let sent = b": idle\nid: 7\n\nevent: line\ndata: {\"a\":\ndata: 1}\nid: 8\n\nevent: end\n";
        let mut buffer = Vec::new();
        let mut found = Vec::new();
        for byte in sent {
            buffer.push(*byte);
            found.extend(take(&mut buffer));
        }
        let idle = Event { id: Some("7".into()), ..Event::default() };
        let line = Event { name: "line".into(), id: Some("8".into()), data: json!({ "a": 1 }) };
        assert_eq!(found, [idle, line]);
    }
}
