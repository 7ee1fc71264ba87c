//! What devices say of their shadow and are answered, as MQTT payloads.
//!
//! Holds: a request that cannot be read is answered with a [`Rejection`], and its client token is echoed if that could be read.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::{Change, Document, News, Shadow, Side};
use crate::error::Error;

/// Longest client token, in characters.
pub const MAX_TOKEN_CHARS: usize = 128;

/// Why a request is not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// Like a status of HTTP: 400, 403, 409, 413, 500.
    pub code: u16,
    /// What was expected.
    pub message: String,
}

impl Rejection {
    fn new(code: u16, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// What the device is told of an error.
    pub fn of(error: &Error) -> Self {
        let code = match error {
            Error::ShadowConflict { .. } => 409,
            Error::ShadowTooLarge { .. } => 413,
            Error::Invalid(_) => 400,
            _ => return Self::new(500, "the server failed; its log says why"),
        };
        Self::new(code, error.to_string())
    }
}

/// By what a device knows the answer to its request; told back under the name it came with.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Token(Option<(&'static str, String)>);

impl Token {
    fn put(&self, mut answer: Map<String, Value>) -> Value {
        if let Some((name, token)) = &self.0 {
            answer.insert((*name).to_owned(), json!(token));
        }
        Value::Object(answer)
    }
}

/// Reads what a device asks: a JSON object; nothing at all stands for an empty one.
fn read(payload: &[u8]) -> Result<(Document, Token), Rejection> {
    if payload.trim_ascii().is_empty() {
        return Ok((Document::new(), Token::default()));
    }
    let mut asked: Document = serde_json::from_slice(payload)
        .map_err(|error| Rejection::new(400, format!("expected a JSON object: {error}")))?;
    for name in ["client_token", "clientToken"] {
        match asked.remove(name) {
            None => {}
            Some(Value::String(token)) if token.chars().count() <= MAX_TOKEN_CHARS => {
                return Ok((asked, Token(Some((name, token)))));
            }
            Some(_) => {
                return Err(Rejection::new(
                    400,
                    format!("{name}: expected text of at most {MAX_TOKEN_CHARS} characters"),
                ));
            }
        }
    }
    Ok((asked, Token::default()))
}

/// Reads a request on `shadow/get`.
pub fn read_get(payload: &[u8]) -> (Token, Result<(), Rejection>) {
    match read(payload) {
        Ok((_, token)) => (token, Ok(())),
        Err(rejection) => (Token::default(), Err(rejection)),
    }
}

/// Reads a request on `shadow/update`: `{"state":{"reported":{…}},"version":3,"client_token":"…"}`.
pub fn read_update(payload: &[u8]) -> (Token, Result<Change, Rejection>) {
    match read(payload) {
        Ok((asked, token)) => (token, reported(asked)),
        Err(rejection) => (Token::default(), Err(rejection)),
    }
}

fn reported(mut asked: Document) -> Result<Change, Rejection> {
    let version = match asked.remove("version") {
        None | Some(Value::Null) => None,
        Some(version) => Some(version.as_i64().ok_or_else(|| Rejection::new(400, "version: expected a whole number"))?),
    };
    let Some(Value::Object(mut state)) = asked.remove("state") else {
        return Err(Rejection::new(400, "state: expected an object with `reported`"));
    };
    if state.contains_key("desired") {
        return Err(Rejection::new(403, "state.desired is set by people: expected `reported` only"));
    }
    let patch = match state.remove("reported") {
        Some(Value::Object(patch)) => Some(patch),
        Some(Value::Null) => None,
        _ => return Err(Rejection::new(400, "state.reported: expected an object, or null to clear it")),
    };
    if let Some(name) = asked.keys().next().or_else(|| state.keys().next()) {
        let name = name.chars().take(80).collect::<String>();
        return Err(Rejection::new(
            400,
            format!("{name:?} is not known: expected state.reported, version, client_token"),
        ));
    }
    Ok(Change { side: Side::Reported, patch, version, if_match: Vec::new() })
}

/// The answer to `shadow/get`.
pub fn got(shadow: &Shadow, token: &Token, now: DateTime<Utc>) -> Value {
    let mut state = json!({ "desired": shadow.desired, "reported": shadow.reported });
    let delta = shadow.delta();
    if !delta.is_empty() {
        state["delta"] = Value::Object(delta);
    }
    told(state, shadow.version, now, token)
}

/// The answer to a change that was accepted.
pub fn accepted(change: &Change, version: i64, token: &Token, now: DateTime<Utc>) -> Value {
    told(json!({ change.side.name(): change.patch }), version, now, token)
}

/// The answer to a request that was not.
pub fn rejected(rejection: &Rejection, token: &Token, now: DateTime<Utc>) -> Value {
    let mut answer = Map::new();
    answer.insert("code".into(), json!(rejection.code));
    answer.insert("message".into(), json!(rejection.message));
    answer.insert("timestamp".into(), json!(now.timestamp_millis()));
    token.put(answer)
}

/// What a device is to do.
pub fn delta(news: &News) -> Value {
    told(Value::Object(news.delta.clone()), news.version, news.updated_at, &Token::default())
}

fn told(state: Value, version: i64, at: DateTime<Utc>, token: &Token) -> Value {
    let mut answer = Map::new();
    answer.insert("state".into(), state);
    answer.insert("version".into(), json!(version));
    answer.insert("timestamp".into(), json!(at.timestamp_millis()));
    token.put(answer)
}
