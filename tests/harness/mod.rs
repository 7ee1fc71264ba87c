//! A real server for a test: the binary itself, on a database of its own, on ports of its own.

pub(crate) mod attacker;
pub(crate) mod client;
mod mqtt;
pub(crate) mod packet;
pub(crate) mod pki;
pub(crate) mod raw;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use fleet_core::testing::TestDb;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use sqlx::ConnectOptions;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::{Instant, timeout};

pub(crate) use mqtt::{Answer, Mqtt};

/// How long a condition may take to come true.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// The admin of every test server.
pub(crate) const ADMIN: (&str, &str) = ("admin@example.com", "correct horse battery");

/// A running server and its database.
pub(crate) struct Fleet {
    child: Child,
    http: reqwest::Client,
    url: String,
    mqtt: SocketAddr,
    mqtts: Option<SocketAddr>,
    token: String,
    /// What the server listens on and lives on; kept for a second start.
    settings: Vec<(String, String)>,
    db: Option<TestDb>,
    _data: tempfile::TempDir,
}

/// An enrolled device and its credential.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    pub(crate) id: String,
    pub(crate) username: String,
    pub(crate) password: String,
}

impl Device {
    /// One of the device's own topics.
    pub(crate) fn topic(&self, channel: &str) -> String {
        format!("fleet/v1/{}/{channel}", self.username)
    }
}

impl Fleet {
    /// A server with the default settings.
    pub(crate) async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// A server with some settings of its own: `("MUSTER__MQTT__MAX_SUBSCRIPTIONS", "3")`.
    pub(crate) async fn start_with(settings: &[(&str, &str)]) -> Self {
        Self::start_to(settings, Stdio::inherit()).await
    }

    /// As [`Fleet::start_with`], with what the server logs in a file.
    pub(crate) async fn start_logged(settings: &[(&str, &str)], log: &Path) -> Self {
        Self::start_to(settings, std::fs::File::create(log).expect("the file can be made").into()).await
    }

    async fn start_to(settings: &[(&str, &str)], log: Stdio) -> Self {
        let db = TestDb::new().await;
        let url = ("MUSTER__DATABASE__URL".to_owned(), db.options().to_url_lossy().to_string());
        let own = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        Self::launch(std::iter::once(url).chain(own).collect(), Some(db), log).await
    }

    /// A server on its embedded PostgreSQL.
    pub(crate) async fn start_embedded() -> Self {
        Self::launch(Vec::new(), None, Stdio::inherit()).await
    }

    async fn launch(settings: Vec<(String, String)>, db: Option<TestDb>, log: Stdio) -> Self {
        // The embedded database runs as another user, who must be able to reach its directory.
        let data = tempfile::Builder::new().prefix("muster-journey-").tempdir_in("/tmp").expect("/tmp can be written");
        let data_dir = ("MUSTER__DATA_DIR".to_owned(), data.path().join("data").display().to_string());
        let mut settings: Vec<_> = std::iter::once(data_dir).chain(settings).collect();
        let (child, Ready { url, mqtt, mqtts }) = spawn(&settings, log).await;
        // A second start finds its clients again.
        let address = url.trim_start_matches("http://").to_owned();
        settings.push(("MUSTER__HTTP__LISTEN".into(), address));
        settings.push(("MUSTER__MQTT__LISTEN".into(), mqtt.to_string()));
        settings.extend(mqtts.map(|address| ("MUSTER__MQTT__TLS_LISTEN".to_owned(), address.to_string())));
        install_crypto();
        let http = reqwest::Client::builder().timeout(PATIENCE).build().expect("a client without settings");
        let mut fleet = Self { child, http, url, mqtt, mqtts, token: String::new(), settings, db, _data: data };
        fleet.login().await;
        fleet
    }

    async fn login(&mut self) {
        let (email, password) = ADMIN;
        let login = json!({ "email": email, "password": password });
        let (status, answer) = self.call(Method::POST, "/api/v1/auth/login", Some(login)).await;
        assert_eq!(status, StatusCode::OK, "{answer}");
        answer["access_token"].as_str().expect("a token").clone_into(&mut self.token);
    }

    /// The directory the server keeps its state in.
    pub(crate) fn data_dir(&self) -> PathBuf {
        PathBuf::from(&self.settings[0].1)
    }

    /// Where the server's database is, where the test made it.
    pub(crate) fn database_url(&self) -> String {
        self.db.as_ref().expect("this server has a database of its own").options().to_url_lossy().to_string()
    }

    /// Whether the server has a database that the test made.
    pub(crate) fn has_own_database(&self) -> bool {
        self.db.is_some()
    }

    /// Connections to the server's database, where the test made it.
    pub(crate) fn db(&self) -> &sqlx::PgPool {
        self.db.as_ref().expect("this server has a database of its own").pool()
    }

    /// Where MQTT is spoken.
    pub(crate) fn mqtt_addr(&self) -> SocketAddr {
        self.mqtt
    }

    /// Where MQTT is spoken over TLS.
    pub(crate) fn mqtts_addr(&self) -> SocketAddr {
        self.mqtts.expect("mqtt.tls_listen is set")
    }

    /// Where REST answers.
    pub(crate) fn url(&self) -> &str {
        &self.url
    }

    /// Where REST answers, as an address.
    pub(crate) fn http_addr(&self) -> SocketAddr {
        self.url.trim_start_matches("http://").parse().expect("an address")
    }

    /// The admin's access token.
    pub(crate) fn token(&self) -> &str {
        &self.token
    }

    /// The process id of the embedded PostgreSQL.
    pub(crate) fn postmaster(&self) -> u32 {
        let file = self.data_dir().join("postgres/data/postmaster.pid");
        let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        text.lines().next().and_then(|pid| pid.trim().parse().ok()).expect("a pid in the first line")
    }

    /// The embedded PostgreSQL and all its children, the postmaster first.
    pub(crate) fn postgres_processes(&self) -> Vec<u32> {
        let postmaster = self.postmaster();
        let children = std::fs::read_to_string(format!("/proc/{postmaster}/task/{postmaster}/children"));
        let children = children.expect("the kernel lists the children of a process");
        std::iter::once(postmaster).chain(children.split_whitespace().map(|pid| pid.parse().expect("a pid"))).collect()
    }

    /// Whether `/readyz` says that the server is of use.
    pub(crate) async fn is_ready(&self) -> bool {
        let answer = self.http.get(format!("{}/readyz", self.url)).send().await;
        answer.is_ok_and(|answer| answer.status() == StatusCode::OK)
    }

    /// The process id of the server.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().expect("the server runs")
    }

    // REST

    /// Calls the REST API as the admin.
    pub(crate) async fn call(&self, method: Method, path: &str, body: Option<Value>) -> (StatusCode, Value) {
        self.call_as(&self.token, method, path, body).await
    }

    /// Calls the REST API with this access token or API key.
    pub(crate) async fn call_as(
        &self,
        bearer: &str,
        method: Method,
        path: &str,
        body: Option<Value>,
    ) -> (StatusCode, Value) {
        let mut request = self.http.request(method, format!("{}{path}", self.url)).bearer_auth(bearer);
        if let Some(body) = body {
            request = request.json(&body);
        }
        let response = request.send().await.expect("the server answers");
        let status = response.status();
        let text = response.text().await.expect("the answer is whole");
        (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
    }

    /// Reads a resource that must be there.
    pub(crate) async fn get(&self, path: &str) -> Value {
        let (status, answer) = self.call(Method::GET, path, None).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
        answer
    }

    /// What is answered, as text.
    pub(crate) async fn text(&self, path: &str) -> String {
        let request = self.http.get(format!("{}{path}", self.url)).bearer_auth(&self.token);
        let response = request.send().await.expect("the server answers");
        assert_eq!(response.status(), StatusCode::OK, "{path}");
        response.text().await.expect("the answer is whole")
    }

    /// Enrols a device.
    pub(crate) async fn enrol(&self, id: &str) -> Device {
        let (status, answer) = self.call(Method::POST, "/api/v1/devices", Some(json!({ "id": id }))).await;
        assert_eq!(status, StatusCode::CREATED, "{answer}");
        let text = |name: &str| answer["credential"][name].as_str().expect(name).to_owned();
        Device { id: id.to_owned(), username: text("username"), password: text("password") }
    }

    /// A resource that is made with this body.
    pub(crate) async fn make(&self, path: &str, body: Value) -> Value {
        let (status, answer) = self.call(Method::POST, path, Some(body)).await;
        assert_eq!(status, StatusCode::CREATED, "{path}: {answer}");
        answer
    }

    /// MQTT user name and password of an application that may use every topic but `test/nosubscribe`: what the Eclipse
    /// Paho interoperability suite runs under. They do not expire during a test.
    pub(crate) async fn platform_user(&self) -> (String, String) {
        let rules = json!([
            { "effect": "allow", "action": "all", "filter": "#" },
            { "effect": "allow", "action": "all", "filter": "$TopicA/#" },
            { "effect": "deny", "action": "all", "filter": "test/nosubscribe" },
        ]);
        self.make("/api/v1/roles", json!({ "id": "every-topic", "platform": true, "topic_rules": rules })).await;
        let key = self.make("/api/v1/api-keys", json!({ "name": "interoperability", "role": "every-topic" })).await;
        ("interoperability".to_owned(), key["secret"].as_str().expect("a secret").to_owned())
    }

    /// All readings of a metric: time and value.
    pub(crate) async fn series(&self, device: &Device, metric: &str) -> Vec<(String, Value)> {
        let path = format!("/api/v1/devices/{}/telemetry?metric={metric}&limit=10000", device.id);
        let answer = self.get(&path).await;
        let items = answer["items"].as_array().expect("items");
        items.iter().map(|item| (item["ts"].as_str().expect("ts").to_owned(), item["value"].clone())).collect()
    }

    /// A metric's value, summed over its labels that contain `labels`.
    pub(crate) async fn metric(&self, name: &str, labels: &str) -> f64 {
        let response = self.http.get(format!("{}/metrics", self.url)).send().await.expect("metrics");
        let text = response.text().await.expect("text");
        let of_name = |line: &&str| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(labels)
        };
        text.lines().filter(of_name).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// How often a connection event of this kind was recorded, and its newest detail.
    pub(crate) async fn event(&self, kind: &str) -> (i64, Value) {
        let read = || async {
            let query = "select count, detail from connection_event where kind = $1 order by at desc limit 1";
            sqlx::query_as(query).bind(kind).fetch_optional(self.db()).await.expect("the database answers")
        };
        self.eventually(read, Option::is_some).await.expect("there is one")
    }

    /// Waits until `read` gives what is expected.
    pub(crate) async fn eventually<T, F>(&self, mut read: impl FnMut() -> F, expected: impl Fn(&T) -> bool) -> T
    where
        T: std::fmt::Debug,
        F: Future<Output = T>,
    {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = read().await;
            if expected(&value) {
                return value;
            }
            assert!(Instant::now() < deadline, "still {value:?} after {PATIENCE:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    // MQTT

    /// Connects a device, MQTT 5, clean.
    pub(crate) async fn connect(&self, device: &Device) -> Mqtt {
        Mqtt::connect(self.mqtt, &device.id, &device.username, &device.password).await.expect("the device may connect")
    }

    /// Connects the admin by its access token.
    pub(crate) async fn connect_admin(&self, client_id: &str) -> Mqtt {
        Mqtt::connect(self.mqtt, client_id, ADMIN.0, &self.token).await.expect("the admin may connect")
    }

    // The process

    /// Stops the server with SIGTERM and waits for its end.
    pub(crate) async fn stop(&mut self) -> std::process::ExitStatus {
        signal(self.pid(), "TERM");
        timeout(PATIENCE, self.child.wait()).await.expect("the server stops in time").expect("its status")
    }

    /// Kills the server without warning.
    pub(crate) async fn kill(&mut self) {
        self.child.kill().await.expect("the server runs");
    }

    /// A setting that is another one from the next start on.
    pub(crate) fn set(&mut self, key: &str, value: &str) {
        self.settings.push((key.to_owned(), value.to_owned()));
    }

    /// Starts the server again on the same data, addresses and database.
    pub(crate) async fn start_again(&mut self) {
        let (child, ready) = spawn(&self.settings, Stdio::inherit()).await;
        self.child = child;
        self.url = ready.url;
        self.mqtt = ready.mqtt;
    }
}

/// Sends a signal to a process by its id.
pub(crate) fn signal(pid: u32, name: &str) {
    let sent = std::process::Command::new("kill").args([format!("-{name}"), pid.to_string()]).status();
    assert!(sent.is_ok_and(|status| status.success()), "kill -{name} {pid}");
}

/// reqwest has no TLS provider of its own.
pub(crate) fn install_crypto() {
    // Another test of this process may have been first.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

/// The program under test.
pub(crate) fn muster() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    for (key, _) in std::env::vars().filter(|(key, _)| key.starts_with("MUSTER") || key == "DATABASE_URL") {
        command.env_remove(key);
    }
    command.kill_on_drop(true);
    command
}

/// What a server says when it is ready.
struct Ready {
    url: String,
    mqtt: SocketAddr,
    mqtts: Option<SocketAddr>,
}

impl Ready {
    /// `http://… mqtt://… mqtts://…`
    fn read(line: &str) -> Self {
        let address = |scheme: &str| {
            line.split(' ').find_map(|url| url.strip_prefix(scheme)).map(|at| at.parse().expect("an address"))
        };
        let url = line.split(' ').next().expect("a URL").to_owned();
        Self { url, mqtt: address("mqtt://").expect("an MQTT listener"), mqtts: address("mqtts://") }
    }
}

async fn spawn(settings: &[(String, String)], log: Stdio) -> (Child, Ready) {
    let mut child = muster()
        .arg("serve")
        .env("MUSTER__HTTP__LISTEN", "127.0.0.1:0")
        .env("MUSTER__MQTT__LISTEN", "127.0.0.1:0")
        .env("MUSTER_ADMIN_EMAIL", ADMIN.0)
        .env("MUSTER_ADMIN_PASSWORD", ADMIN.1)
        .envs(settings.iter().map(|(key, value)| (key, value)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .expect("the binary is built");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let ready = async {
        while let Some(line) = lines.next_line().await.expect("text") {
            if let Some(ready) = line.strip_prefix("ready: ") {
                return ready.to_owned();
            }
        }
        panic!("the server ended before it was ready");
    };
    let ready = timeout(Duration::from_mins(1), ready).await.expect("the server is ready in time");
    (child, Ready::read(&ready))
}
