//! Logging in by a provider of `OpenID` Connect that others have written: `oidc-provider-mock`, which `make setup` installs.
//! What a provider may do wrong is in `api/tests/api/oidc.rs`.

use std::path::Path;
use std::process::Stdio;

use reqwest::{Response, StatusCode, header, redirect};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::harness::{Fleet, PATIENCE};

/// The provider, and a server that trusts it.
struct Scene {
    fleet: Fleet,
    http: reqwest::Client,
    provider: String,
    _process: Child,
    _settings: tempfile::NamedTempFile,
}

impl Scene {
    async fn start() -> Self {
        let (process, provider) = provider().await;
        let settings = tempfile::NamedTempFile::new().expect("a file can be made");
        let toml = format!(
            "[oidc]\nissuer = \"{provider}\"\nclient_id = \"muster\"\nclient_secret = \"secret\"\nauto_create = true\n\
             roles = [{{ value = \"fleet-admins\", role = \"admin\" }}, {{ value = \"staff\", role = \"viewer\" }}]\n"
        );
        std::fs::write(settings.path(), toml).expect("the file can be written");
        let file = settings.path().display().to_string();
        let fleet = Fleet::start_with(&[("MUSTER_CONFIG", &file)]).await;
        let http = reqwest::Client::builder().redirect(redirect::Policy::none()).timeout(PATIENCE);
        let http = http.build().expect("a client");
        Self { fleet, http, provider, _process: process, _settings: settings }
    }

    /// What the provider says of somebody from now on.
    async fn is(&self, subject: &str, claims: Value) {
        let answer = self.http.put(format!("{}/users/{subject}", self.provider)).json(&claims).send().await;
        assert_eq!(answer.expect("the provider answers").status(), StatusCode::NO_CONTENT);
    }

    async fn get(&self, url: &str, cookie: &str) -> Response {
        self.http.get(url).header(header::COOKIE, cookie).send().await.expect("an answer")
    }

    /// Sent to the provider: its page, and the cookie of the browser.
    async fn leave(&self) -> (String, String) {
        let sent = self.get(&format!("{}/api/v1/auth/oidc/login", self.fleet.url()), "").await;
        assert_eq!(sent.status(), StatusCode::SEE_OTHER);
        let (page, cookie) = (location(&sent), cookie(&sent, "muster_oidc"));
        assert!(page.starts_with(&self.provider), "{page}");
        (page, cookie)
    }

    /// Somebody logs in there: where that leads.
    async fn at_provider(&self, page: &str, form: &'static str) -> String {
        let kind = "application/x-www-form-urlencoded";
        let answer = self.http.post(page).header(header::CONTENT_TYPE, kind).body(form).send().await;
        let back = location(&answer.expect("the provider answers"));
        assert!(back.starts_with(&format!("{}/api/v1/auth/oidc/callback?", self.fleet.url())), "{back}");
        back
    }

    async fn login(&self, form: &'static str) -> Response {
        let (page, cookie) = self.leave().await;
        self.get(&self.at_provider(&page, form).await, &cookie).await
    }

    /// Who the browser is that came back.
    async fn me(&self, came: Response) -> Value {
        assert_eq!((came.status(), location(&came).as_str()), (StatusCode::SEE_OTHER, "/"));
        let refresh = self.http.post(format!("{}/api/v1/auth/refresh", self.fleet.url()));
        let refresh = refresh.header(header::COOKIE, cookie(&came, "muster_refresh")).send().await;
        let body: Value = refresh.expect("an answer").json().await.expect("JSON");
        let token = body["access_token"].as_str().expect("a token");
        self.fleet.call_as(token, reqwest::Method::GET, "/api/v1/me", None).await.1
    }
}

/// The provider, and where it is.
async fn provider() -> (Child, String) {
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/venv/bin/oidc-provider-mock");
    let mut process = Command::new(program)
        .args(["--port", "0", "--require-nonce", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("`make setup` installs the provider");
    let mut lines = BufReader::new(process.stderr.take().expect("piped")).lines();
    let url = async {
        while let Some(line) = lines.next_line().await.expect("text") {
            if let Some((_, rest)) = line.split_once("running on ") {
                return rest.split(' ').next().expect("a word").to_owned();
            }
        }
        panic!("the provider ended before it was ready");
    };
    let url = timeout(PATIENCE, url).await.expect("the provider is ready in time");
    // It would wait for who reads what it says.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (process, url)
}

fn location(answer: &Response) -> String {
    let location = answer.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
    location.unwrap_or_else(|| panic!("{} leads nowhere", answer.status())).to_owned()
}

/// A cookie that was set, as it is sent back.
fn cookie(answer: &Response, name: &str) -> String {
    let set = answer.headers().get_all(header::SET_COOKIE).iter().filter_map(|value| value.to_str().ok());
    let set = set.filter_map(|set| set.split(';').next()).find(|pair| pair.starts_with(&format!("{name}=")));
    set.unwrap_or_else(|| panic!("no cookie {name}")).to_owned()
}

async fn is_refused(answer: Response, status: u16, kind: &str) {
    let (found, body) = (answer.status().as_u16(), answer.json::<Value>().await.unwrap_or_default());
    assert_eq!((found, &body["type"]), (status, &json!(format!("urn:muster:problem:{kind}"))), "{body}");
}

#[tokio::test]
async fn a_provider_that_others_have_written_lets_people_in_with_the_role_it_gives() {
    let scene = Scene::start().await;
    let claims = |roles: Value| json!({ "email": "ada@example.com", "email_verified": true, "groups": roles });
    scene.is("ada", claims(json!(["staff"]))).await;
    let me = scene.me(scene.login("sub=ada").await).await;
    assert_eq!((&me["email"], &me["role"]), (&json!("ada@example.com"), &json!("viewer")));

    scene.is("ada", claims(json!(["fleet-admins"]))).await;
    let again = scene.me(scene.login("sub=ada").await).await;
    assert_eq!((&again["id"], &again["role"]), (&me["id"], &json!("admin")));

    scene.is("ada", claims(json!([]))).await;
    is_refused(scene.login("sub=ada").await, 403, "oidc-no-role").await;
    scene.is("eve", json!({ "email": "eve@example.com", "groups": ["staff"] })).await;
    is_refused(scene.login("sub=eve").await, 403, "oidc-unverified").await;
}

#[tokio::test]
async fn what_comes_back_from_it_counts_once_and_in_the_browser_that_was_sent() {
    let scene = Scene::start().await;
    scene.is("ada", json!({ "email": "ada@example.com", "email_verified": true, "groups": ["staff"] })).await;
    let (page, cookie) = scene.leave().await;
    let back = scene.at_provider(&page, "sub=ada").await;
    let (_, other) = scene.leave().await;
    is_refused(scene.get(&back, &other).await, 401, "oidc-refused").await;
    is_refused(scene.get(&back.replace("state=", "state=x"), &cookie).await, 401, "oidc-refused").await;
    scene.me(scene.get(&back, &cookie).await).await;
    is_refused(scene.get(&back, &cookie).await, 401, "oidc-refused").await;
    // A code that was redeemed, on a way of one's own.
    let (page, cookie) = scene.leave().await;
    let own = scene.at_provider(&page, "sub=ada").await;
    let code = |url: &str| url.split(['?', '&']).find(|part| part.starts_with("code=")).expect("a code").to_owned();
    is_refused(scene.get(&own.replace(&code(&own), &code(&back)), &cookie).await, 401, "oidc-refused").await;
}
