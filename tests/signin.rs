//! Signing in, on a real server: what ends a login ends everything that came by it.

use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::harness::client::Client;
use crate::harness::packet::{Connect, property};
use crate::harness::raw::Version;
use crate::harness::{ADMIN, Fleet};

const LOGIN: &str = "/api/v1/auth/login";
const REFRESH: &str = "/api/v1/auth/refresh";
/// Administrative action.
const SENT_AWAY: u8 = 0x98;

/// A browser: it keeps the cookie it is given.
struct Browser<'a> {
    fleet: &'a Fleet,
    http: reqwest::Client,
    cookie: String,
    token: String,
}

impl<'a> Browser<'a> {
    async fn login(fleet: &'a Fleet) -> Self {
        let (email, password) = ADMIN;
        let mut browser = Self { fleet, http: reqwest::Client::new(), cookie: String::new(), token: String::new() };
        let login = json!({ "email": email, "password": password });
        let (status, answer) = browser.post(LOGIN, login).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        browser
    }

    async fn post(&mut self, path: &str, body: Value) -> (StatusCode, Value) {
        let request = self.http.post(format!("{}{path}", self.fleet.url())).json(&body);
        let response = request.header(header::COOKIE, &self.cookie).send().await.expect("the server answers");
        if let Some(set) = response.headers().get(header::SET_COOKIE) {
            let set = set.to_str().expect("ASCII");
            set.split(';').next().expect("a pair").clone_into(&mut self.cookie);
        }
        let status = response.status();
        let body: Value = response.json().await.unwrap_or_default();
        if let Some(token) = body["access_token"].as_str() {
            token.clone_into(&mut self.token);
        }
        (status, body)
    }

    async fn refresh(&mut self) -> StatusCode {
        self.post(REFRESH, json!({})).await.0
    }

    /// The status of a request with the access token.
    async fn me(&self) -> u16 {
        self.fleet.call_as(&self.token, Method::GET, "/api/v1/me", None).await.0.as_u16()
    }

    /// An MQTT connection by the access token.
    async fn mqtt(&self, client_id: &str) -> Client {
        connect(self.fleet, client_id, &self.token).await
    }
}

async fn connect(fleet: &Fleet, client_id: &str, password: &str) -> Client {
    let credentials = Some((ADMIN.0.to_owned(), password.to_owned()));
    let hello = Connect::new(Version::V5, client_id, credentials);
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    let (client, connack) = Client::hello(Box::new(socket), &hello).await;
    assert_eq!(connack.code, 0, "{connack:?}");
    client
}

/// The client is sent away because its login has ended. A busy machine is not a broken promise: how long it took is only told.
async fn is_sent_away(client: Client, what: &str, since: Instant) {
    let properties = client.ends_with(SENT_AWAY, what).await;
    assert_eq!(property!(properties, ReasonString).as_deref(), Some("the login has ended"));
    eprintln!("{what}: felt after {} ms", since.elapsed().as_millis());
}

#[tokio::test]
async fn a_logout_ends_what_came_by_the_login_and_nothing_else() {
    let fleet = Fleet::start().await;
    let (mut one, two) = (Browser::login(&fleet).await, Browser::login(&fleet).await);
    let client = one.mqtt("one").await;
    // The connection outlives the token it came by being replaced, not the login.
    assert_eq!(one.refresh().await, StatusCode::OK);
    let (again, mut bystander) = (one.mqtt("again").await, two.mqtt("two").await);
    assert_eq!((one.me().await, two.me().await), (200, 200));
    let since = Instant::now();
    assert_eq!(one.post("/api/v1/auth/logout", json!({})).await.0, StatusCode::NO_CONTENT);
    assert_eq!(one.me().await, 401);
    is_sent_away(client, "logout, by the token it began with", since).await;
    is_sent_away(again, "logout, by the token after it", since).await;
    assert_eq!(one.refresh().await, StatusCode::UNAUTHORIZED);
    bystander.is_quiet("another login of the same user goes on").await;
    assert_eq!(two.me().await, 200);

    let everything = two.mqtt("everything").await;
    let key = fleet.make("/api/v1/api-keys", json!({ "name": "program", "role": "admin" })).await;
    let mut program = connect(&fleet, "program", key["secret"].as_str().expect("a secret")).await;
    let since = Instant::now();
    let (status, _) = fleet.call(Method::POST, "/api/v1/auth/logout-all", None).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    is_sent_away(everything, "logout everywhere", since).await;
    is_sent_away(bystander, "logout everywhere", since).await;
    program.is_quiet("an API key is no login").await;
    program.disconnect().await;
}

#[tokio::test]
async fn a_stolen_refresh_token_ends_the_thiefs_connections_too() {
    let fleet = Fleet::start_with(&[("MUSTER__AUTH__REFRESH_GRACE_S", "0")]).await;
    let mut user = Browser::login(&fleet).await;
    let mut thief =
        Browser { fleet: &fleet, http: reqwest::Client::new(), token: String::new(), cookie: user.cookie.clone() };
    assert_eq!(thief.refresh().await, StatusCode::OK);
    let (mine, theirs) = (user.mqtt("user").await, thief.mqtt("thief").await);
    let since = Instant::now();
    let (status, problem) = user.post(REFRESH, json!({})).await;
    assert_eq!((status, &problem["type"]), (StatusCode::UNAUTHORIZED, &json!("urn:muster:problem:bad-refresh-token")));
    is_sent_away(theirs, "theft, the thief's connection", since).await;
    is_sent_away(mine, "theft, the user's connection", since).await;
    assert_eq!((thief.me().await, user.me().await), (401, 401));
    assert_eq!(thief.refresh().await, StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_login_goes_on_after_the_server_was_killed() {
    let mut fleet = Fleet::start().await;
    let cookie = Browser::login(&fleet).await.cookie;
    fleet.kill().await;
    fleet.start_again().await;
    let mut browser = Browser { fleet: &fleet, http: reqwest::Client::new(), token: String::new(), cookie };
    assert_eq!(browser.refresh().await, StatusCode::OK);
    assert_eq!(browser.me().await, 200);
}
