//! The REST calls a fleet needs: log in, enrol, delete, read back.
//!
//! After the login a call is tried again while the server is away or busy, for [`PATIENCE`] in all: a simulation
//! outlives a restart of the server.

use std::fmt;
use std::time::{Duration, Instant};

use chrono::{DateTime, SecondsFormat};
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::RwLock;
use tokio::time::sleep;

use crate::error::{Error, Result};
use crate::ledger::Entry;

/// How long a call is tried again while the server is away or busy.
pub const PATIENCE: Duration = Duration::from_mins(1);
/// One attempt takes no longer.
const ATTEMPT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(250);
/// Readings asked for at once.
const PAGE: u32 = 1000;

/// How to get in.
#[derive(Clone)]
pub enum Access {
    /// Log in; an expired access token is renewed by itself.
    Password {
        /// The user's e-mail address.
        email: String,
        /// The password.
        password: String,
    },
    /// An access token that lives as long as it is needed.
    Token(String),
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Password { email, .. } => f.debug_struct("Password").field("email", email).finish_non_exhaustive(),
            Self::Token(_) => f.write_str("Token(***)"),
        }
    }
}

/// What a device logs in with.
#[derive(Clone, Deserialize)]
pub struct Credential {
    /// `{tenant}/{device}`
    pub username: String,
    /// The device token.
    pub password: String,
}

/// A logged-in user of one server.
#[derive(Debug)]
pub struct Client {
    http: reqwest::Client,
    /// Ends with a slash, so that paths are joined below it.
    base: Url,
    access: Access,
    token: RwLock<String>,
}

#[derive(Deserialize)]
struct Page {
    items: Vec<Item>,
    next_cursor: Option<String>,
}

#[derive(Deserialize)]
struct Item {
    ts: Value,
    seq: Option<i64>,
}

impl Client {
    /// Logs in at the server at `url`, such as `http://127.0.0.1:8080`.
    ///
    /// # Errors
    /// When the URL is none, the server is not there or the login is wrong; none of these is tried again.
    pub async fn connect(url: &str, access: Access) -> Result<Self> {
        let bad = |reason: &dyn fmt::Display| Error::Invalid(format!("url {url:?} is not valid: {reason}"));
        let base = Url::parse(&format!("{}/", url.trim_end_matches('/'))).map_err(|e| bad(&e))?;
        if base.scheme() != "http" && base.scheme() != "https" {
            return Err(bad(&"expected http:// or https://"));
        }
        let http = reqwest::Client::builder().timeout(ATTEMPT).no_proxy().build().map_err(|e| bad(&root_cause(&e)))?;
        let token = RwLock::new(String::new());
        let client = Self { http, base, access, token };
        client.log_in().await?;
        Ok(client)
    }

    async fn log_in(&self) -> Result<()> {
        let token = match &self.access {
            Access::Token(token) => token.clone(),
            Access::Password { email, password } => self.exchange(email, password).await?,
        };
        *self.token.write().await = token;
        Ok(())
    }

    async fn exchange(&self, email: &str, password: &str) -> Result<String> {
        let refused = |detail: String| Error::BadLogin { email: email.to_owned(), detail };
        let body = json!({ "email": email, "password": password });
        let answer = self.http.post(self.at(&["auth", "login"])).json(&body).send().await;
        let (status, body) = read(answer.map_err(|e| self.unreachable(&e))?).await;
        match (status, body["access_token"].as_str()) {
            (200..=299, Some(token)) => Ok(token.to_owned()),
            (200..=299, None) => Err(refused("without an access token: is this a Muster server?".into())),
            _ => Err(refused(format!("{status} {}", detail(&body)))),
        }
    }

    /// Enrols a device with the label `sim`; if it exists, gives it a new credential at once in place of the old.
    ///
    /// # Errors
    /// When the server refuses, or is away for longer than [`PATIENCE`].
    pub async fn enrol(&self, id: &str) -> Result<Credential> {
        let body = json!({ "id": id, "type": "simulated", "labels": { "sim": "true" } });
        let (status, answer) = self.call(Method::POST, self.at(&["devices"]), Some(&body)).await?;
        let (status, answer) = match status {
            409 => {
                let url = self.at(&["devices", id, "credentials", "rotate"]);
                self.call(Method::POST, url, Some(&json!({ "overlap_s": 0 }))).await?
            }
            _ => (status, answer),
        };
        let refused =
            |detail: &str| Error::Refused { what: format!("enrolling {id}"), status, detail: detail.to_owned() };
        if !(200..=299).contains(&status) {
            return Err(refused(&detail(&answer)));
        }
        let credential = if answer["credential"].is_object() { &answer["credential"] } else { &answer };
        Credential::deserialize(credential).map_err(|_| refused("without username and password"))
    }

    /// Deletes a device; one that does not exist is as good.
    ///
    /// # Errors
    /// When the server refuses, or is away for longer than [`PATIENCE`].
    pub async fn delete(&self, id: &str) -> Result<()> {
        match self.call(Method::DELETE, self.at(&["devices", id]), None).await? {
            (200..=299 | 404, _) => Ok(()),
            (status, body) => Err(Error::Refused { what: format!("deleting {id}"), status, detail: detail(&body) }),
        }
    }

    /// Every reading of a device from `from_ms` to `to_ms`, both included; in the order the server gives them and
    /// as often as it gives them.
    ///
    /// # Errors
    /// When the server refuses, is away for longer than [`PATIENCE`], or answers what is not a page of readings.
    pub async fn readings(&self, id: &str, from_ms: i64, to_ms: i64) -> Result<Vec<Entry>> {
        let mut found = Vec::new();
        let mut cursor: Option<String> = None;
        loop {
            let mut url = self.at(&["devices", id, "telemetry"]);
            url.query_pairs_mut()
                .append_pair("from", &rfc3339(from_ms))
                // The end of the range is exclusive.
                .append_pair("to", &rfc3339(to_ms.saturating_add(1)))
                .append_pair("limit", &PAGE.to_string());
            if let Some(cursor) = &cursor {
                url.query_pairs_mut().append_pair("cursor", cursor);
            }
            let (status, body) = self.call(Method::GET, url, None).await?;
            let refused = |detail: String| Error::Refused { what: format!("reading back {id}"), status, detail };
            if status != 200 {
                return Err(refused(detail(&body)));
            }
            let page = Page::deserialize(body).map_err(|e| refused(format!("no page of readings: {e}")))?;
            for item in page.items {
                found.push(item.entry().ok_or_else(|| refused(format!("no time: {}", item.ts)))?);
            }
            match page.next_cursor {
                next @ Some(_) if next != cursor => cursor = next,
                Some(_) => return Err(refused("the cursor does not advance".into())),
                None => return Ok(found),
            }
        }
    }

    /// Calls with the access token; renews it once when it has expired, waits while the server is away or busy.
    async fn call(&self, method: Method, url: Url, body: Option<&Value>) -> Result<(u16, Value)> {
        let patience = Instant::now() + PATIENCE;
        let mut renewed = false;
        loop {
            let mut request = self.http.request(method.clone(), url.clone()).bearer_auth(self.token.read().await);
            if let Some(body) = body {
                request = request.json(body);
            }
            let failure = match request.send().await {
                Ok(answer) => match read(answer).await {
                    (401, _) if !renewed && matches!(self.access, Access::Password { .. }) => {
                        renewed = true;
                        self.log_in().await?;
                        continue;
                    }
                    answer @ (429 | 502..=504, _) => Ok(answer),
                    answer => return Ok(answer),
                },
                Err(error) => Err(self.unreachable(&error)),
            };
            if Instant::now() > patience {
                return failure;
            }
            sleep(PAUSE).await;
        }
    }

    fn at(&self, path: &[&str]) -> Url {
        let mut url = self.base.clone();
        url.path_segments_mut().expect("http URLs have a path").pop_if_empty().extend(["api", "v1"]).extend(path);
        url
    }

    fn unreachable(&self, error: &reqwest::Error) -> Error {
        Error::Unreachable { address: self.base.as_str().trim_end_matches('/').to_owned(), reason: root_cause(error) }
    }
}

impl Item {
    /// The time as RFC 3339 or in ms; a reading without a sequence number is none of ours and counts as number 0.
    fn entry(&self) -> Option<Entry> {
        let ts_ms = match &self.ts {
            Value::String(text) => DateTime::parse_from_rfc3339(text).ok()?.timestamp_millis(),
            number => number.as_i64()?,
        };
        Some(Entry { ts_ms, seq: self.seq.and_then(|seq| u64::try_from(seq).ok()).unwrap_or(0) })
    }
}

fn rfc3339(ms: i64) -> String {
    DateTime::from_timestamp_millis(ms).unwrap_or_default().to_rfc3339_opts(SecondsFormat::Millis, true)
}

async fn read(answer: reqwest::Response) -> (u16, Value) {
    let status: StatusCode = answer.status();
    let body = answer.bytes().await.unwrap_or_default();
    (status.as_u16(), serde_json::from_slice(&body).unwrap_or(Value::Null))
}

/// The words of a problem (RFC 9457) for a human.
fn detail(problem: &Value) -> String {
    let text = |key| problem[key].as_str().filter(|text| !text.is_empty());
    text("detail").or_else(|| text("title")).unwrap_or("without a reason").to_owned()
}

/// The innermost error: "connection refused" rather than "error sending request".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_is_read_as_text_or_number() {
        let entry = |json: &str| serde_json::from_str::<Item>(json).unwrap().entry();
        let expected = Some(Entry { ts_ms: 1_763_692_212_345, seq: 9 });
        assert_eq!(entry(r#"{"ts":1763692212345,"seq":9}"#), expected);
        assert_eq!(entry(&format!(r#"{{"ts":"{}","seq":9}}"#, rfc3339(1_763_692_212_345))), expected);
        assert_eq!(entry(r#"{"ts":"yesterday","seq":9}"#), None);
    }

    #[test]
    fn a_secret_is_never_printed() {
        let password = Access::Password { email: "a@b".into(), password: "hunter2".into() };
        assert!(!format!("{password:?} {:?}", Access::Token("hunter2".into())).contains("hunter2"));
    }
}
