//! The simulator against a server that keeps its promise, and against servers that break it.
//!
//! The server is a small fake: MQTT over a socket, REST by axum, readings in a map. It can cut connections before it
//! acknowledges, forget what it acknowledged, give readings twice, and refuse logins.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use device_sim::{Access, Error, Faults, Phase, Scenario, Simulation};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

const PASSWORD: &str = "correct";

#[derive(Default)]
struct Behaviour {
    /// Every so many publishes the connection is cut after the reading is stored and before it is acknowledged.
    cut_every: u64,
    /// Every so many readings are acknowledged and forgotten.
    forget_every: u64,
    /// The first reading of every device is given twice.
    repeat: bool,
    /// MQTT 5 publishes of telemetry are refused.
    refuse: bool,
}

#[derive(Default)]
struct Server {
    behaviour: Behaviour,
    publishes: AtomicU64,
    logins: AtomicU64,
    devices: Mutex<BTreeMap<String, u32>>,
    readings: Mutex<BTreeMap<(String, i64, u64), u32>>,
    statuses: Mutex<Vec<(String, Value)>>,
    versions: Mutex<BTreeMap<u8, u32>>,
}

impl Server {
    async fn start(behaviour: Behaviour) -> (Arc<Self>, Scenario) {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let server = Arc::new(Self { behaviour, ..Self::default() });
        let mqtt = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let http = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scenario = Scenario {
            url: format!("http://{}", http.local_addr().unwrap()),
            mqtt: mqtt.local_addr().unwrap().to_string(),
            access: Access::Password { email: "admin@example.com".into(), password: PASSWORD.into() },
            devices: 6,
            rate: 600.0,
            log_rate: 0.0,
            duration: Duration::from_millis(700),
            payload_bytes: 200,
            seed: 1,
            faults: Faults::default(),
            ledger: None,
            cleanup: false,
        };
        let router = Router::new().fallback(rest).with_state(server.clone());
        tokio::spawn(async move { axum::serve(http, router).await });
        let accepting = server.clone();
        tokio::spawn(async move {
            while let Ok((socket, _)) = mqtt.accept().await {
                let server = accepting.clone();
                tokio::spawn(async move { server.serve(socket).await });
            }
        });
        (server, scenario)
    }

    /// None when the connection ends, however.
    async fn serve(&self, mut socket: TcpStream) -> Option<()> {
        let (kind, connect) = frame(&mut socket).await?;
        assert_eq!(kind, 0x10, "the first packet is a CONNECT");
        let version = connect[6];
        *self.versions.lock().unwrap().entry(version).or_default() += 1;
        let connack: &[u8] = if version == 5 { &[0x20, 3, 0, 0, 0] } else { &[0x20, 2, 0, 0] };
        socket.write_all(connack).await.ok()?;
        loop {
            let (kind, body) = frame(&mut socket).await?;
            match kind & 0xf0 {
                0x30 => {
                    let (id, refused) = self.publish(kind, &body, version)?;
                    let ack: &[u8] = if refused { &[0x40, 3, id[0], id[1], 0x87] } else { &[0x40, 2, id[0], id[1]] };
                    socket.write_all(ack).await.ok()?;
                }
                0x80 => {
                    let codes: &[u8] = if version == 5 { &[0, 1, 1] } else { &[1, 1] };
                    let header = [0x90, 2 + u8::try_from(codes.len()).unwrap(), body[0], body[1]];
                    socket.write_all(&[&header, codes].concat()).await.ok()?;
                }
                0xc0 => socket.write_all(&[0xd0, 0]).await.ok()?,
                0xe0 => return None,
                other => panic!("a device does not send {other:#x}"),
            }
        }
    }

    fn publish(&self, kind: u8, body: &[u8], version: u8) -> Option<([u8; 2], bool)> {
        assert_eq!(kind & 0x06, 0x02, "publishes are QoS 1");
        let length = usize::from(u16::from_be_bytes([body[0], body[1]]));
        let topic = std::str::from_utf8(&body[2..2 + length]).unwrap();
        let rest = &body[2 + length..];
        let id = [rest[0], rest[1]];
        let payload = if version == 5 { &rest[3 + usize::from(rest[2])..] } else { &rest[2..] };
        let payload: Value = serde_json::from_slice(payload).unwrap();
        let words: Vec<_> = topic.split('/').collect();
        assert_eq!(words[..3], ["fleet", "v1", "main"]);
        let device = words[3].to_owned();
        if words[4] == "status" {
            assert_eq!(kind & 1, 1, "a status is retained");
            self.statuses.lock().unwrap().push((device, payload));
            return Some((id, false));
        }
        if self.behaviour.refuse && version == 5 {
            return Some((id, true));
        }
        let count = self.publishes.fetch_add(1, Ordering::Relaxed) + 1;
        let every = |of: u64| of > 0 && count.is_multiple_of(of);
        if !every(self.behaviour.forget_every) {
            let key = (device, payload["ts"].as_i64().unwrap(), payload["seq"].as_u64().unwrap());
            *self.readings.lock().unwrap().entry(key).or_default() += 1;
        }
        (!every(self.behaviour.cut_every)).then_some((id, false))
    }

    fn states(&self, device: &str) -> Vec<String> {
        let statuses = self.statuses.lock().unwrap();
        statuses.iter().filter(|(d, _)| d == device).map(|(_, s)| s["state"].as_str().unwrap().to_owned()).collect()
    }
}

async fn frame(socket: &mut TcpStream) -> Option<(u8, Vec<u8>)> {
    let kind = socket.read_u8().await.ok()?;
    let (mut length, mut shift) = (0, 0);
    loop {
        let byte = socket.read_u8().await.ok()?;
        length |= usize::from(byte & 0x7f) << shift;
        shift += 7;
        if byte < 0x80 {
            break;
        }
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body).await.ok()?;
    Some((kind, body))
}

async fn rest(State(server): State<Arc<Server>>, request: Request) -> Response {
    let (head, body) = request.into_parts();
    let body = axum::body::to_bytes(body, 1 << 16).await.unwrap();
    let body: Value = serde_json::from_slice(&body).unwrap_or_default();
    let path = head.uri.path().strip_prefix("/api/v1/").unwrap_or_default().to_owned();
    let words: Vec<_> = path.split('/').collect();
    let (status, answer) = match (&head.method, words.as_slice()) {
        (&Method::POST, ["auth", "login"]) => server.log_in(&body),
        _ if head.headers["authorization"] != "Bearer token" => (401, json!({"title": "Unauthorized"})),
        (&Method::POST, ["devices"]) => server.enrol(body["id"].as_str().unwrap()),
        (&Method::POST, ["devices", id, "credentials", "rotate"]) => {
            assert_eq!(body["overlap_s"], 0);
            (201, json!({"username": format!("main/{id}"), "password": "rotated"}))
        }
        (&Method::DELETE, ["devices", id]) => {
            server.devices.lock().unwrap().remove(*id);
            (204, Value::Null)
        }
        (&Method::GET, ["devices", id, "telemetry"]) => server.page(id, head.uri.query().unwrap_or_default()),
        other => panic!("unexpected call {other:?}"),
    };
    (StatusCode::from_u16(status).unwrap(), answer.to_string()).into_response()
}

impl Server {
    fn log_in(&self, body: &Value) -> (u16, Value) {
        self.logins.fetch_add(1, Ordering::Relaxed);
        if body["password"] == PASSWORD {
            (200, json!({"access_token": "token", "token_type": "Bearer", "expires_in": 900}))
        } else {
            (401, json!({"detail": "e-mail or password is wrong"}))
        }
    }

    fn enrol(&self, id: &str) -> (u16, Value) {
        let mut devices = self.devices.lock().unwrap();
        let times = devices.entry(id.to_owned()).or_default();
        *times += 1;
        match times {
            1 => {
                (201, json!({"device": {"id": id}, "credential": {"username": format!("main/{id}"), "password": "x"}}))
            }
            _ => (409, json!({"detail": "exists already"})),
        }
    }

    /// Pages of 7, so that every device has many; the cursor is a position.
    fn page(&self, id: &str, query: &str) -> (u16, Value) {
        let start = query.split('&').find_map(|pair| pair.strip_prefix("cursor=")).map_or(0, |c| c.parse().unwrap());
        let readings = self.readings.lock().unwrap();
        let mut all: Vec<_> = readings.keys().filter(|(device, ..)| device == id).collect();
        if self.behaviour.repeat {
            all.extend(all.first().copied());
        }
        let items: Vec<_> = all.iter().skip(start).take(7).map(|(_, ts, seq)| json!({"ts": ts, "seq": seq})).collect();
        let next = (start + 7 < all.len()).then(|| (start + 7).to_string());
        (200, json!({"items": items, "next_cursor": next}))
    }
}

fn never() -> CancellationToken {
    CancellationToken::new()
}

#[tokio::test]
async fn an_honest_server_passes_although_connections_break() {
    let (server, mut scenario) = Server::start(Behaviour { cut_every: 40, ..Behaviour::default() }).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("ledger");
    scenario.faults = Faults { reconnects_per_minute: 1200.0, duplicates: 0.2, late: 0.2 };
    scenario.ledger = Some(file.clone());
    let mut phases = Vec::new();
    let report = scenario.run(never(), |p| phases.push(p.phase)).await.unwrap();
    assert!(report.holds(), "{report}");
    assert_eq!(report.sent, 420, "600 a second for 0.7 s\n{report}");
    assert_eq!((report.acknowledged, report.found), (420, 420), "{report}");
    assert!(report.resent > 0 && report.failures > 0 && report.sent_twice > 0 && report.reconnects > 0, "{report}");
    phases.dedup();
    assert_eq!(phases, [Phase::Enrolling, Phase::Running, Phase::Draining, Phase::Verifying]);
    assert_eq!(server.versions.lock().unwrap().keys().copied().collect::<Vec<_>>(), [4, 5]);

    let ledger = device_sim::ledger::Ledger::read(&file).unwrap();
    assert_eq!(ledger.len(), 420);
    let client = device_sim::rest::Client::connect(&scenario.url, scenario.access.clone()).await.unwrap();
    assert!(ledger.verify(&client, |_| ()).await.unwrap().holds());
}

#[tokio::test]
async fn a_server_that_forgets_is_found_out() {
    let (_server, mut scenario) = Server::start(Behaviour { forget_every: 50, ..Behaviour::default() }).await;
    scenario.faults.duplicates = 0.0;
    let report = scenario.run(never(), |_| ()).await.unwrap();
    assert_eq!((report.acknowledged, report.missing), (420, 8), "{report}");
    assert!(!report.holds());
    assert!(report.to_string().contains("BROKEN"), "{report}");
    assert_eq!(report.examples.len(), 8);
}

#[tokio::test]
async fn a_server_that_stores_twice_is_found_out() {
    let (_server, scenario) = Server::start(Behaviour { repeat: true, ..Behaviour::default() }).await;
    let report = scenario.run(never(), |_| ()).await.unwrap();
    assert_eq!((report.missing, report.duplicated), (0, 6), "{report}");
    assert!(!report.holds());
}

#[tokio::test]
async fn a_refused_publish_is_not_acknowledged() {
    let (_server, mut scenario) = Server::start(Behaviour { refuse: true, ..Behaviour::default() }).await;
    scenario.devices = 1;
    scenario.rate = 20.0;
    let cancel = never();
    let stop = cancel.clone();
    let simulation = Simulation::start(&scenario, &cancel, |_| ()).await.unwrap();
    eventually(|| simulation.counters().refused.load(Ordering::Relaxed) > 1).await;
    assert_eq!(simulation.counters().acknowledged.load(Ordering::Relaxed), 0);
    assert!(simulation.counters().last_failure().unwrap().contains("NotAuthorized"));
    stop.cancel();
    simulation.stop(Duration::from_millis(100)).await;
}

#[tokio::test]
async fn a_simulation_goes_on_until_it_is_stopped_and_says_good_bye() {
    let (server, mut scenario) = Server::start(Behaviour::default()).await;
    scenario.duration = Duration::from_millis(1);
    let simulation = Simulation::start(&scenario, &never(), |_| ()).await.unwrap();
    let counters = simulation.counters();
    eventually(|| counters.online.load(Ordering::Relaxed) == 6).await;
    eventually(|| counters.acknowledged.load(Ordering::Relaxed) > 100).await;
    simulation.stop(Duration::from_secs(5)).await;
    for index in 0..6 {
        assert_eq!(server.states(&format!("sim-1-{index}")), ["online", "offline"]);
    }
}

#[tokio::test]
async fn a_second_run_rotates_the_credentials_and_clean_up_deletes() {
    let (server, mut scenario) = Server::start(Behaviour::default()).await;
    assert!(scenario.run(never(), |_| ()).await.unwrap().holds());
    scenario.cleanup = true;
    assert!(scenario.run(never(), |_| ()).await.unwrap().holds());
    assert!(server.devices.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_cancelled_run_is_still_checked() {
    let (_server, mut scenario) = Server::start(Behaviour::default()).await;
    scenario.duration = Duration::from_hours(1);
    let cancel = never();
    let report =
        scenario.run(cancel.clone(), |p| if p.acknowledged > 50 { cancel.cancel() } else { Default::default() });
    let report = tokio::time::timeout(Duration::from_secs(20), report).await.unwrap().unwrap();
    assert!(report.holds() && report.found > 50, "{report}");
}

#[tokio::test]
async fn what_is_wrong_is_said_in_one_line() {
    let (_server, scenario) = Server::start(Behaviour::default()).await;
    let free = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let wrong = Access::Password { email: "a@b".into(), password: "wrong".into() };
    let base = || scenario.clone();
    for (scenario, expected) in [
        (Scenario { access: wrong, ..base() }, "login as a@b was refused: 401 e-mail or password is wrong"),
        (Scenario { url: format!("http://{free}"), ..base() }, "Connection refused"),
        (Scenario { url: "127.0.0.1".into(), ..base() }, "url"),
        (Scenario { mqtt: free.to_string(), ..base() }, "cannot reach MQTT"),
        (Scenario { mqtt: "localhost".into(), ..base() }, "expected host:port"),
        (Scenario { devices: 0, ..base() }, "devices: expected 1"),
        (Scenario { rate: f64::NAN, ..base() }, "rate: expected"),
        (Scenario { rate: 1000.0, duration: Duration::from_hours(24), ..base() }, "readings in a run"),
        (Scenario { payload_bytes: 1 << 20, ..base() }, "payload-bytes"),
        (Scenario { ledger: Some("/nowhere/ledger".into()), ..base() }, "/nowhere/ledger"),
    ] {
        let error: Error = scenario.run(never(), |_| ()).await.expect_err(expected);
        let error = error.to_string();
        assert!(error.contains(expected), "{expected}: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
}

/// Waits for a condition, ten seconds at most.
async fn eventually(mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "it did not happen within 10 s");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
