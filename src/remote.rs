//! Commands that ask a running server: where it is, who asks, and its answers.

use anyhow::{Context, bail};
use reqwest::{Method, RequestBuilder, Response, StatusCode, Url};
use serde_json::{Value, json};

/// Where the server is, and who asks.
#[derive(Debug, clap::Args)]
pub(crate) struct Server {
    /// Where REST is.
    #[arg(long, env = "MUSTER_URL", default_value = "http://127.0.0.1:8080")]
    url: String,
    /// An API key or an access token; without one, e-mail and password are used.
    #[arg(long, env = "MUSTER_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// Who asks.
    #[arg(long, env = "MUSTER_ADMIN_EMAIL", default_value = "admin@example.com")]
    email: String,
    /// The password; better in the environment than on the command line.
    #[arg(long, env = "MUSTER_ADMIN_PASSWORD", hide_env_values = true)]
    password: Option<String>,
}

impl Server {
    /// Logs in, unless there is a token already.
    pub(crate) async fn connect(&self) -> anyhow::Result<Remote> {
        let http = reqwest::Client::builder().no_proxy().build()?;
        let base = format!("{}/api/v1", self.url.trim_end_matches('/'));
        let mut remote = Remote { http, base, token: String::new() };
        remote.token = match (&self.token, &self.password) {
            (Some(token), _) => token.clone(),
            (None, Some(password)) => {
                let login = json!({ "email": self.email, "password": password, "cookie": false });
                let answer = remote.post("/auth/login", &login).await?;
                answer["access_token"].as_str().context("the server answered a login without a token")?.to_owned()
            }
            (None, None) => bail!("expected MUSTER_TOKEN, or MUSTER_ADMIN_EMAIL and MUSTER_ADMIN_PASSWORD"),
        };
        Ok(remote)
    }
}

/// A server that was reached, and in whose name it is asked.
pub(crate) struct Remote {
    http: reqwest::Client,
    base: String,
    token: String,
}

/// The server does not do what it is asked.
#[derive(Debug, thiserror::Error)]
#[error("{}: {detail}", reason(*status))]
pub(crate) struct Refused {
    pub(crate) status: StatusCode,
    detail: String,
}

impl Remote {
    /// What the server answers; a refusal is an error that says why.
    pub(crate) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        let answer = self.send(self.request(Method::POST, path).json(body)).await?;
        Ok(answer.json().await.unwrap_or_default())
    }

    /// The same of a question.
    pub(crate) async fn get(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<Value> {
        let answer = self.send(self.question(path, query)?).await?;
        answer.json().await.context("the server's answer ended before it was complete")
    }

    /// An answer that comes piece by piece, behind the event `after` if that is not empty.
    pub(crate) async fn open(&self, path: &str, query: &[(&str, &str)], after: &str) -> anyhow::Result<Response> {
        let mut request = self.question(path, query)?.header("accept", "text/event-stream");
        if !after.is_empty() {
            request = request.header("last-event-id", after);
        }
        self.send(request).await
    }

    fn question(&self, path: &str, query: &[(&str, &str)]) -> anyhow::Result<RequestBuilder> {
        let url = Url::parse_with_params(&format!("{}{path}", self.base), query).context(self.base.clone())?;
        Ok(self.with_token(self.http.get(url)))
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.with_token(self.http.request(method, format!("{}{path}", self.base)))
    }

    fn with_token(&self, request: RequestBuilder) -> RequestBuilder {
        if self.token.is_empty() { request } else { request.bearer_auth(&self.token) }
    }

    async fn send(&self, request: RequestBuilder) -> anyhow::Result<Response> {
        let answer = request.send().await.with_context(|| format!("{} cannot be reached", self.base))?;
        let status = answer.status();
        if status.is_success() {
            return Ok(answer);
        }
        let body = answer.json::<Value>().await.unwrap_or_default();
        let detail = body["detail"].as_str().unwrap_or("no reason was given").to_owned();
        Err(Refused { status, detail }.into())
    }
}

fn reason(status: StatusCode) -> String {
    match status {
        StatusCode::UNAUTHORIZED => "not logged in".into(),
        StatusCode::FORBIDDEN => "not allowed".into(),
        status => format!("refused ({})", status.as_u16()),
    }
}
