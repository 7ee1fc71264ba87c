//! One API on a database of its own, and the words to talk to it.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::Arc;

use api::{App, Health};
use axum::Router;
use axum::body::{Body, to_bytes};
use axum::extract::ConnectInfo;
use axum::http::{HeaderMap, Request, StatusCode};
use axum::response::Response;
use chrono::{DateTime, TimeDelta, Utc};
use fleet_core::authority::Pki;
use fleet_core::clock::{Clock, from_ms};
use fleet_core::config::{Config, Environment, Secret};
use fleet_core::id::UserId;
use fleet_core::index::Index;
use fleet_core::login_session::{self, Method, Origin};
use fleet_core::policy::Role;
use fleet_core::testing::TestDb;
use fleet_core::token::Keys;
use fleet_core::user;
use futures::StreamExt as _;
use prometheus::Registry;
use serde_json::Value;
use tower::ServiceExt;

/// When these tests happen: 2025-11-21T12:00:00Z.
pub(crate) const NOON_MS: i64 = 1_763_726_400_000;
pub(crate) const EMAIL: &str = "admin@example.com";
pub(crate) const PASSWORD: &str = "correct horse battery staple";

pub(crate) struct Api {
    pub(crate) db: TestDb,
    pub(crate) clock: Clock,
    pub(crate) keys: Arc<Keys>,
    pub(crate) admin: UserId,
    /// What runs beside the router.
    pub(crate) app: App,
    index: Index,
    token: String,
    router: Router,
    _data_dir: tempfile::TempDir,
}

/// What a test may set otherwise.
pub(crate) struct Setup {
    pub(crate) config: Config,
    pub(crate) health: Health,
}

impl Default for Setup {
    fn default() -> Self {
        let config = Config::from_sources(&Environment::default(), Some(std::collections::HashMap::new())).unwrap();
        Self { config, health: Health::new() }
    }
}

impl Api {
    pub(crate) async fn start() -> Self {
        Self::with(Setup::default()).await
    }

    pub(crate) async fn with(Setup { config, health }: Setup) -> Self {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON_MS));
        let mut conn = db.pool().acquire().await.unwrap();
        let password = Secret::from(PASSWORD.to_owned());
        user::ensure_admin(&mut conn, Some(EMAIL), Some(&password), &clock).await.unwrap();
        let admin = sqlx::query_scalar("select id from app_user").fetch_one(&mut *conn).await.unwrap();
        let keys = Keys::load(&mut conn, clock.clone(), config.auth.access_token_s).await.unwrap();
        drop(conn);
        let keys = Arc::new(keys);
        let token = sign(&db, &keys, &clock, admin).await;
        let (pool, registry) = (db.pool().clone(), Registry::new());
        let data_dir = tempfile::tempdir().unwrap();
        let pki = Pki::new(config.certificates.clone(), data_dir.path());
        let index = Index::open(&config.search.dir(data_dir.path()), &config.search).unwrap();
        index.catch_up(&pool, &clock).await.unwrap();
        let app = App::new(pool, clock.clone(), keys.clone(), pki, registry, &config, health).unwrap();
        let app = app.with_index(index.clone()).unwrap();
        Self { router: api::router(app.clone()), app, index, db, clock, keys, admin, token, _data_dir: data_dir }
    }

    /// The patterns the router knows. Axum has no list of them, but prints them.
    pub(crate) fn routes(&self) -> Vec<String> {
        let printed = format!("{:?}", self.router);
        let (_, paths) = printed.split_once("paths: {").expect("axum prints its routes");
        let quoted = paths.split('"').skip(1).step_by(2).filter(|text| text.starts_with('/'));
        quoted.filter(|path| !path.contains("axum_fallback")).map(str::to_owned).collect()
    }

    /// Has the index know all lines that are stored.
    pub(crate) async fn index(&self) {
        self.index.catch_up(self.db.pool(), &self.clock).await.unwrap();
    }

    /// Lets time pass.
    pub(crate) fn pass(&self, time: TimeDelta) {
        self.clock.set(self.clock.now() + time);
    }

    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.clock.now()
    }

    /// The access token of the administrator.
    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// A request of the administrator.
    pub(crate) fn ask(&self, method: &str, path: &str) -> Ask<'_> {
        self.anonymous(method, path).header("authorization", &format!("Bearer {}", self.token))
    }

    /// A request of somebody without a token.
    pub(crate) fn anonymous(&self, method: &str, path: &str) -> Ask<'_> {
        let request = Request::builder().method(method).uri(path).header("host", "localhost:8080");
        Ask { api: self, request, body: Body::empty(), peer: ([127, 0, 0, 1], 4711).into() }
    }

    pub(crate) async fn get(&self, path: &str) -> Reply {
        self.ask("GET", path).send().await
    }

    /// Asks until the answer is as it should be in the end.
    pub(crate) async fn get_until(&self, path: &str, is_right: impl Fn(&Reply) -> bool) -> Reply {
        for _ in 0..40 {
            let reply = self.get(path).await;
            if is_right(&reply) {
                return reply;
            }
        }
        panic!("{path} is not answered as it should be");
    }

    pub(crate) async fn post(&self, path: &str, body: Value) -> Reply {
        self.ask("POST", path).json(&body).send().await
    }

    /// Enrols a device and answers what was said of it.
    pub(crate) async fn enrol(&self, id: &str) -> Value {
        self.post("/api/v1/devices", serde_json::json!({"id": id})).await.expect(201).body
    }

    /// A request by this access token or API key.
    pub(crate) fn as_who(&self, secret: &str, method: &str, path: &str) -> Ask<'_> {
        self.anonymous(method, path).header("authorization", &format!("Bearer {secret}"))
    }

    /// A user of the administrator's tenant with this role, and an access token. There is no password: hashing takes
    /// its time.
    pub(crate) async fn user(&self, email: &str, role: &str) -> (UserId, String) {
        let id = UserId::new();
        sqlx::query(
            "insert into app_user (id, tenant_key, email, password_hash, created_at, role, role_key)
             values ($1, $2, $3, null, now(), case when $4 = any($5) then $4 end, (select key from role where id = $4))",
        )
        .bind(id.uuid())
        .bind(self.db.tenant().0)
        .bind(email)
        .bind(role)
        .bind(Role::BUILT_IN.map(|role| role.name().to_owned()).as_slice())
        .execute(self.db.pool())
        .await
        .unwrap();
        (id, self.token_of(id).await)
    }

    /// An access token of a user, of a login of its own.
    pub(crate) async fn token_of(&self, user: UserId) -> String {
        sign(&self.db, &self.keys, &self.clock, user).await
    }

    /// A token of a user without a role.
    pub(crate) async fn nobody(&self) -> (UserId, String) {
        self.user(&format!("{}@example.com", UserId::new()), "").await
    }

    /// The value of a metric, 0 when it is not there.
    pub(crate) async fn metric(&self, name: &str) -> f64 {
        let text = self.anonymous("GET", "/metrics").send().await.expect(200).text;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.unwrap_or(0.0)
    }
}

async fn sign(db: &TestDb, keys: &Keys, clock: &Clock, user: UserId) -> String {
    let (from, auth) = (Origin::default(), Setup::default().config.auth);
    let mut db = db.pool().acquire().await.unwrap();
    let begun = login_session::begin(&mut db, user, Method::Password, &from, &auth, clock.now()).await.unwrap();
    keys.sign(&begun.0).unwrap().token.expose().to_owned()
}

pub(crate) struct Ask<'a> {
    api: &'a Api,
    request: axum::http::request::Builder,
    body: Body,
    peer: SocketAddr,
}

impl Ask<'_> {
    /// The request comes over a connection from this address.
    pub(crate) fn from(mut self, address: &str) -> Self {
        self.peer = SocketAddr::new(address.parse().unwrap(), 4711);
        self
    }

    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        if ["authorization", "host"].contains(&name)
            && let Some(headers) = self.request.headers_mut()
        {
            headers.remove(name);
        }
        self.request = self.request.header(name, value);
        self
    }

    pub(crate) fn json(self, body: &Value) -> Self {
        self.raw("application/json", body.to_string())
    }

    pub(crate) fn raw(self, kind: &str, body: impl Into<Body>) -> Self {
        let mut this = self.header("content-type", kind);
        this.body = body.into();
        this
    }

    /// Sends it, and does not wait for the end of the answer.
    pub(crate) async fn open(self) -> Response {
        let mut request = self.request.body(self.body).unwrap();
        request.extensions_mut().insert(ConnectInfo(self.peer));
        self.api.router.clone().oneshot(request).await.unwrap()
    }

    /// Sends it; of an answer that does not end, the beginning is read.
    pub(crate) async fn send(self) -> Reply {
        let response = self.open().await;
        let (parts, body) = response.into_parts();
        let is_endless = parts.headers.get("content-type").is_some_and(|kind| kind == "text/event-stream");
        let bytes = if is_endless {
            body.into_data_stream().next().await.unwrap().unwrap()
        } else {
            to_bytes(body, usize::MAX).await.unwrap()
        };
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let body = serde_json::from_str(&text).unwrap_or(Value::Null);
        Reply { status: parts.status, headers: parts.headers, body, text }
    }
}

#[derive(Debug)]
pub(crate) struct Reply {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Value,
    pub(crate) text: String,
}

impl Reply {
    /// Asserts the status; everything that fails must be a problem.
    #[track_caller]
    pub(crate) fn expect(self, status: u16) -> Self {
        assert_eq!(self.status.as_u16(), status, "{}", self.text);
        if status >= 400 && !self.body["ready"].is_boolean() && !self.is_status() {
            self.expect_problem();
        }
        self
    }

    /// Whether it is a refusal as OpenTelemetry wants it: `google.rpc.Status`, which has no type.
    fn is_status(&self) -> bool {
        self.body["type"].is_null() && self.body["code"].is_i64() && self.body["message"].is_string()
    }

    /// RFC 9457, and the id under which the log tells more.
    #[track_caller]
    fn expect_problem(&self) {
        assert_eq!(self.header("content-type"), "application/problem+json", "{}", self.text);
        assert!(self.body["type"].as_str().unwrap().starts_with("urn:muster:problem:"), "{}", self.text);
        assert_eq!(self.body["status"], self.status.as_u16());
        assert_eq!(self.body["request_id"].as_str().unwrap(), self.header("x-request-id"));
        for member in ["title", "detail", "instance"] {
            assert!(!self.body[member].as_str().unwrap().is_empty(), "{member}: {}", self.text);
        }
        assert!(!self.text.contains('\n'), "one line: {}", self.text);
    }

    /// Asserts the kind of a problem.
    #[track_caller]
    pub(crate) fn problem(self, status: u16, kind: &str) -> Self {
        let this = self.expect(status);
        if !this.is_status() {
            assert_eq!(this.body["type"], format!("urn:muster:problem:{kind}"), "{}", this.text);
        }
        this
    }

    /// A header as text, empty when it is not there.
    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// A cookie that was set: its value, and all that was said about it.
    pub(crate) fn cookie(&self, name: &str) -> (String, String) {
        let set = self.headers.get_all("set-cookie").iter().map(|value| value.to_str().unwrap());
        let whole = set.into_iter().find(|set| set.starts_with(&format!("{name}="))).unwrap_or_default();
        let (pair, rest) = whole.split_once("; ").unwrap_or_default();
        (pair.split_once('=').unwrap_or_default().1.to_owned(), rest.to_owned())
    }

    /// The ids of a page of roles, without those that are built in.
    pub(crate) fn made(&self) -> Vec<&str> {
        let items = self.body["items"].as_array().unwrap().iter().filter(|item| item["built_in"] == false);
        items.map(|item| item["id"].as_str().unwrap()).collect()
    }

    /// The ids of a page.
    pub(crate) fn ids(&self) -> Vec<&str> {
        self.body["items"].as_array().unwrap().iter().map(|item| item["id"].as_str().unwrap()).collect()
    }
}

/// Escapes a text for a query.
pub(crate) fn escaped(text: &str) -> String {
    text.bytes().fold(String::new(), |mut escaped, byte| {
        write!(escaped, "%{byte:02x}").unwrap();
        escaped
    })
}
