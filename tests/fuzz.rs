//! Whatever clients send, in whatever order, harms nobody but themselves: attackers with a seed against a server that
//! others use, for ten seconds here and for hours by `make fuzz`.
//!
//! Proved meanwhile: what is acknowledged to a quiet publisher reaches a quiet session, at QoS 2 once, in order; readings
//! that are acknowledged are rows; nothing panics; memory stays within a bound. Proved at the end: nothing is left of
//! clean sessions, and those that are kept can be ended.

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::json;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::harness::attacker::{Account, Attacker, Tally, Target};
use crate::harness::client::Client;
use crate::harness::packet::kind::{PUBACK, PUBCOMP, PUBREC, PUBREL};
use crate::harness::packet::{Connect, Packet, Publish};
use crate::harness::raw::Version::{V5, V311};
use crate::harness::{Device, Fleet, PATIENCE};

const SEED: u64 = 3;
const MIB: u64 = 1024 * 1024;
/// By so much the server may be larger in the last quarter of a long run than in the third.
const GROWTH: u64 = 24 * MIB;
/// What a server under attack may take at all.
const LARGEST: u64 = 1024 * MIB;

#[tokio::test]
async fn attackers_harm_nobody_but_themselves() {
    run(Plan { seed: SEED, attackers: 4, lasts: Duration::from_secs(10) }).await;
}

/// By `make fuzz`, for as long and from the seed that it is told.
#[tokio::test]
#[ignore = "as long as it is told"]
async fn attackers_harm_nobody_for_long() {
    let lasts = Duration::from_secs(told("MUSTER_FUZZ_SECONDS").unwrap_or(600));
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_secs();
    run(Plan { seed: told("MUSTER_FUZZ_SEED").unwrap_or(now), attackers: 8, lasts }).await;
}

#[expect(clippy::disallowed_methods, reason = "knobs of the test, not settings of the product")]
fn told(name: &str) -> Option<u64> {
    std::env::var(name).ok().filter(|value| !value.is_empty()).map(|value| value.parse().expect("a number"))
}

struct Plan {
    seed: u64,
    attackers: u64,
    lasts: Duration,
}

/// Clients come over and over, and would be damped for it; `admission.rs` has that. Bounds are small, so that they are
/// hit, and so that memory that grows is memory that leaks.
const SETTINGS: [(&str, &str); 9] = [
    ("MUSTER__ADMISSION__FLAPPING_CONNECTS", "0"),
    ("MUSTER__ADMISSION__AUTH_FAILURES", "0"),
    ("MUSTER__ADMISSION__CONNECTS_PER_S", "0"),
    ("MUSTER__MQTT__MAX_RETAINED", "200"),
    ("MUSTER__MQTT__MAX_SUBSCRIPTIONS", "20"),
    ("MUSTER__SESSIONS__MAX", "200"),
    ("MUSTER__SESSIONS__MAX_EXPIRY_S", "60"),
    ("MUSTER__SESSIONS__QUEUE_MESSAGES", "300"),
    ("MUSTER__RETENTION__DEAD_LETTER_MAX_ROWS", "10000"),
];

async fn run(plan: Plan) {
    println!("seed {}, {} attackers, {:?}", plan.seed, plan.attackers, plan.lasts);
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("server.log");
    let fleet = Fleet::start_logged(&SETTINGS, &log).await;
    let mut witness = Witness::new(&fleet, plan.seed).await;
    let target = Arc::new(target(&fleet).await);
    let (tally, until) = (Arc::new(Tally::default()), Instant::now() + plan.lasts);
    let mut attackers = JoinSet::new();
    for number in 1..=plan.attackers {
        attackers.spawn(Attacker::new(plan.seed, number, target.clone(), tally.clone()).attack(until));
    }
    let sizes = watch(&fleet, &mut witness, &mut attackers, &tally, plan.lasts).await;
    assert_grown_little(&sizes, plan.lasts);
    let panicked = fleet.metric("muster_mqtt_disconnects_total", "internal error").await;
    assert!(panicked < 0.5, "{panicked} connections panicked");
    assert_silent(&log);
    readings_are_rows(&fleet, witness.readings).await;
    witness.leave().await;
    nothing_is_left(&fleet, &target).await;
    assert!(tally.welcomed.load(Ordering::Relaxed) > 10, "attackers were not even let in: {tally:?}");
}

/// The attacked: a device of its own, another, and an application that may do everything.
async fn target(fleet: &Fleet) -> Target {
    let (username, password) = fleet.platform_user().await;
    let mut accounts = vec![Account { username, password, base: "chaos".to_owned() }];
    for id in ["hostile-1", "hostile-2"] {
        let device = fleet.enrol(id).await;
        let base = format!("fleet/v1/{}", device.username);
        accounts.push(Account { username: device.username, password: device.password, base });
    }
    Target { address: fleet.mqtt_addr(), accounts }
}

/// Goes round with the witness until the attackers are done; the server's size at even intervals.
async fn watch(
    fleet: &Fleet,
    witness: &mut Witness<'_>,
    attackers: &mut JoinSet<()>,
    tally: &Tally,
    lasts: Duration,
) -> Vec<u64> {
    let (began, every) = (Instant::now(), (lasts / 60).max(Duration::from_secs(1)));
    let (mut sizes, mut unready) = (vec![resident(fleet.pid())], 0);
    while !attackers.is_empty() {
        witness.round().await;
        while let Some(ended) = attackers.try_join_next() {
            ended.expect("the server keeps to its rules");
        }
        if began.elapsed() >= every * u32::try_from(sizes.len()).expect("few") {
            unready += u32::from(!fleet.is_ready().await);
            sizes.push(resident(fleet.pid()));
            let size = sizes.last().copied().unwrap_or_default() / MIB;
            println!("{:>5} s {size:>4} MiB {} messages {tally:?}", began.elapsed().as_secs(), witness.sent);
        }
        assert!(began.elapsed() < lasts + 3 * PATIENCE, "attackers do not end");
        sleep(Duration::from_millis(20)).await;
    }
    println!("not ready at {unready} of {} looks", sizes.len());
    assert!(unready * 10 <= u32::try_from(sizes.len()).expect("few"), "not ready at {unready} looks");
    sizes
}

/// Resident memory of a process in bytes.
fn resident(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("the server lives");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its size");
    line.trim().trim_end_matches("kB").trim().parse::<u64>().expect("a number") * 1024
}

fn assert_grown_little(sizes: &[u64], lasts: Duration) {
    let mean = |part: &[u64]| part.iter().sum::<u64>() / part.len().max(1) as u64;
    let quarter = sizes.len() / 4;
    let (third, last) = (mean(&sizes[2 * quarter..3 * quarter]), mean(&sizes[3 * quarter..]));
    println!("resident: first {} MiB, third quarter {}, last {}", sizes[0] / MIB, third / MIB, last / MIB);
    assert!(last < LARGEST, "{last} bytes");
    // A short run is all warming up.
    assert!(lasts < Duration::from_mins(5) || last < third + GROWTH, "from {third} to {last} bytes: {sizes:?}");
}

/// No task of the server has panicked, whether or not anybody noticed.
fn assert_silent(log: &Path) {
    let log = std::fs::read_to_string(log).expect("the server's log");
    let panics: Vec<_> = log.lines().filter(|line| line.contains("panicked")).collect();
    assert!(panics.is_empty(), "{panics:#?}");
}

async fn count(fleet: &Fleet, query: &'static str) -> i64 {
    sqlx::query_scalar(query).fetch_one(fleet.db()).await.expect(query)
}

async fn readings_are_rows(fleet: &Fleet, acknowledged: i64) {
    let stored = "select count(*) from telemetry t join device d on d.key = t.device_key where d.id = 'quiet'";
    assert_eq!(count(fleet, stored).await, acknowledged, "an acknowledged reading is a row");
}

/// Nobody is connected any more; each session that is kept ends when its client says so; then nothing is left.
async fn nothing_is_left(fleet: &Fleet, target: &Target) {
    let zero = |value: &f64| *value < 0.5;
    fleet.eventually(|| fleet.metric("muster_mqtt_connections", ""), zero).await;
    let away = "select count(*) from session where connected or expiry_s = 0";
    fleet.eventually(|| count(fleet, away), |rows| *rows == 0).await;
    let too_much = "select coalesce(max(n), 0) from (select count(*) n from session_message group by session_id) q";
    assert!(count(fleet, too_much).await <= 300, "queues keep their bound");
    let kept: Vec<String> = sqlx::query_scalar("select distinct client_id from session")
        .fetch_all(fleet.db())
        .await
        .expect("the database answers");
    println!("{} sessions were kept", kept.len());
    for client_id in kept {
        for account in &target.accounts {
            end_session(fleet, account, &client_id).await;
        }
    }
    for left in [
        "select count(*) from session",
        "select count(*) from session_subscription",
        "select count(*) from session_message",
        "select count(*) from session_received",
    ] {
        fleet.eventually(|| count(fleet, left), |rows| *rows == 0).await;
    }
    fleet.eventually(|| fleet.metric("muster_mqtt_sessions", ""), zero).await;
    fleet.eventually(|| fleet.metric("muster_mqtt_subscriptions", ""), zero).await;
}

async fn end_session(fleet: &Fleet, account: &Account, client_id: &str) {
    let login = (account.username.clone(), account.password.clone());
    let client = connect(fleet, &Connect::new(V311, client_id, Some(login))).await;
    client.disconnect().await;
}

async fn connect(fleet: &Fleet, hello: &Connect) -> Client {
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    let (client, answer) = Client::hello(Box::new(socket), hello).await;
    assert_eq!(answer.code, 0, "{answer:?}");
    client
}

/// Those who use the server meanwhile: a publisher, a session that comes and goes, a device with readings.
struct Witness<'a> {
    fleet: &'a Fleet,
    login: (String, String),
    device: Device,
    rng: ChaCha8Rng,
    publisher: Client,
    quiet: Client,
    reader: Option<Client>,
    /// QoS 2 messages the reader has and has not seen released.
    held: HashSet<u16>,
    sent: u64,
    seen: u64,
    readings: i64,
}

/// Packet ids of a test's client are not used twice.
const MESSAGES_OF_A_CONNECTION: u64 = 30_000;

impl<'a> Witness<'a> {
    async fn new(fleet: &'a Fleet, seed: u64) -> Self {
        let key = fleet.make("/api/v1/api-keys", json!({ "name": "witness", "role": "admin" })).await;
        let login = ("witness".to_owned(), key["secret"].as_str().expect("a secret").to_owned());
        let device = fleet.enrol("quiet").await;
        let (publisher, quiet) = (publisher(fleet, &login).await, quiet(fleet, &device).await);
        let rng = ChaCha8Rng::seed_from_u64(seed);
        let held = HashSet::new();
        let mut witness =
            Self { fleet, login, device, rng, publisher, quiet, reader: None, held, sent: 0, seen: 0, readings: 0 };
        let mut reader = witness.reader().await;
        assert_eq!(reader.subscribe("app/main/witness", 2).await, 2);
        witness.reader = Some(reader);
        witness
    }

    /// The reader, back in its session.
    async fn reader(&mut self) -> Client {
        match self.reader.take() {
            Some(reader) => reader,
            None => connect(self.fleet, &Connect::new(V5, "reader", Some(self.login.clone())).kept()).await,
        }
    }

    /// Some messages, all of which arrive, and a reading.
    async fn round(&mut self) {
        match self.rng.random_range(0..6) {
            0 => drop(self.reader.take()),
            1 => self.reader().await.disconnect_with(0, &[]).await,
            _ => {}
        }
        for _ in 0..self.rng.random_range(1..12) {
            self.publish().await;
        }
        self.readings += 1;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970").as_millis();
        let reading = format!(r#"{{"ts":{now},"seq":{},"values":{{"n":1}}}}"#, self.readings);
        assert_eq!(self.quiet.publish(Publish::new(self.device.topic("telemetry"), reading).qos(1)).await, 0);
        let reading = timeout(PATIENCE, self.read());
        reading.await.unwrap_or_else(|_| panic!("{} of {} messages arrived", self.seen, self.sent));
    }

    async fn publish(&mut self) {
        if (self.sent + 1).is_multiple_of(MESSAGES_OF_A_CONNECTION) {
            self.publisher = publisher(self.fleet, &self.login).await;
            self.quiet = quiet(self.fleet, &self.device).await;
        }
        self.sent += 1;
        let publish = Publish::new("app/main/witness", self.sent.to_string()).qos(self.rng.random_range(1..3));
        assert_eq!(self.publisher.publish(publish).await, 0);
    }

    /// Takes messages until the last that was sent is there.
    async fn read(&mut self) {
        let mut reader = self.reader().await;
        while self.seen < self.sent {
            match reader.next().await {
                Packet::Publish(publish) if publish.qos == 2 => {
                    if self.held.insert(publish.id) {
                        self.see(&publish);
                    } else {
                        assert!(publish.dup, "{} again", publish.text());
                    }
                    reader.send_ack(PUBREC, publish.id).await;
                }
                Packet::Publish(publish) => {
                    self.see(&publish);
                    reader.send_ack(PUBACK, publish.id).await;
                }
                Packet::Ack(ack) if ack.kind == PUBREL => {
                    self.held.remove(&ack.id);
                    reader.send_ack(PUBCOMP, ack.id).await;
                }
                other => panic!("{other:?} for a reader"),
            }
        }
        self.reader = Some(reader);
    }

    /// The next message, or at QoS 1 one of before again.
    fn see(&mut self, publish: &Publish) {
        let number: u64 = publish.text().parse().expect("a number");
        if number == self.seen + 1 {
            self.seen = number;
        } else {
            let again = publish.qos == 1 && publish.dup && number <= self.seen;
            assert!(again, "message {number} after {} (QoS {}, dup {})", self.seen, publish.qos, publish.dup);
        }
    }

    /// Gives up its session too.
    async fn leave(mut self) {
        drop(self.reader().await);
        connect(self.fleet, &Connect::new(V5, "reader", Some(self.login.clone()))).await.disconnect().await;
        self.publisher.disconnect().await;
        self.quiet.disconnect().await;
    }
}

async fn publisher(fleet: &Fleet, login: &(String, String)) -> Client {
    connect(fleet, &Connect::new(V5, "publisher", Some(login.clone()))).await
}

async fn quiet(fleet: &Fleet, device: &Device) -> Client {
    let login = (device.username.clone(), device.password.clone());
    connect(fleet, &Connect::new(V5, "quiet", Some(login))).await
}
