//! A storm settles without failing those already in: whoever has no place is told so and when to come again.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use futures::future::join_all;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{Instant, sleep};

use crate::harness::client::Client;
use crate::harness::packet::{Connect, Packet, Publish, users};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::{Device, Fleet, PATIENCE};

/// Where clients come from.
const HOME: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 2);
const AWAY: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 3);

/// What a CONNECT came to.
enum Answer {
    Welcome(Client),
    /// Code, and when to come again.
    Refused(u8, Option<Duration>),
    /// The socket was closed without a word.
    Closed,
}

impl Answer {
    fn refused(self) -> (u8, Option<Duration>) {
        match self {
            Self::Refused(code, wait) => (code, wait),
            Self::Welcome(_) => panic!("it was let in"),
            Self::Closed => panic!("it was closed without a word"),
        }
    }

    fn welcome(self) -> Client {
        match self {
            Self::Welcome(client) => client,
            Self::Refused(code, _) => panic!("refused with {code:#x}"),
            Self::Closed => panic!("it was closed without a word"),
        }
    }
}

/// A client at the door.
struct Knocker {
    server: SocketAddr,
    from: Ipv4Addr,
    login: (String, String),
    client_id: String,
    version: Version,
}

impl Knocker {
    fn new(fleet: &Fleet, device: &Device, from: Ipv4Addr, version: Version) -> Self {
        let login = (device.username.clone(), device.password.clone());
        Self { server: fleet.mqtt_addr(), from, login, client_id: device.id.clone(), version }
    }

    fn named(self, client_id: String) -> Self {
        Self { client_id, ..self }
    }

    fn with_password(self, password: &str) -> Self {
        Self { login: (self.login.0, password.to_owned()), ..self }
    }

    async fn socket(&self) -> TcpStream {
        let socket = TcpSocket::new_v4().expect("a socket");
        socket.bind((self.from, 0).into()).expect("loopback has many addresses");
        socket.connect(self.server).await.expect("the server listens")
    }

    async fn knock(&self) -> Answer {
        let mut client = Client::on(Box::new(self.socket().await), self.version);
        let connect = Connect::new(self.version, &self.client_id, Some(self.login.clone()));
        client.send(&connect.bytes()).await;
        match client.next().await {
            Packet::ConnAck(answer) if answer.code == 0 => Answer::Welcome(client),
            Packet::ConnAck(answer) => {
                let wait = users(&answer.properties).into_iter().find(|(name, _)| *name == "retry-after-ms");
                Answer::Refused(answer.code, wait.map(|(_, ms)| Duration::from_millis(ms.parse().expect("a number"))))
            }
            Packet::Closed => Answer::Closed,
            other => panic!("instead of a CONNACK: {other:?}"),
        }
    }

    /// Comes again as it is told until it is let in; the second is how often it came.
    async fn insist(&self) -> (Client, u32) {
        for knocks in 1.. {
            match self.knock().await {
                Answer::Welcome(client) => return (client, knocks),
                Answer::Refused(_, wait) => sleep(wait.unwrap_or(Duration::from_secs(1))).await,
                Answer::Closed => sleep(Duration::from_secs(1)).await,
            }
        }
        unreachable!("it is let in or comes again")
    }
}

async fn hits(fleet: &Fleet, limit: &str) -> f64 {
    fleet.metric("muster_mqtt_limit_hits_total", &format!("\"{limit}\"")).await
}

/// Waits until a gauge shows this.
async fn shows(fleet: &Fleet, gauge: &str, value: f64) {
    fleet.eventually(|| fleet.metric(gauge, ""), |shown| (shown - value).abs() < 0.1).await;
}

#[tokio::test]
async fn connects_beyond_the_rate_are_told_when_to_come_again() {
    let slow = [("MUSTER__ADMISSION__CONNECTS_PER_S", "1"), ("MUSTER__ADMISSION__CONNECTS_BURST", "1")];
    let fleet = Fleet::start_with(&slow).await;
    let device = fleet.enrol("one").await;
    let knocker = |version| Knocker::new(&fleet, &device, HOME, version);
    let _first = knocker(V5).knock().await.welcome();
    assert_eq!(knocker(V311).knock().await.refused(), (3, None), "3.1.1 has no word for when");
    let (code, wait) = knocker(V5).knock().await.refused();
    assert_eq!(code, 0x9F);
    let wait = wait.expect("when to come again");
    assert!((1000..=3000).contains(&wait.as_millis()), "{wait:?}");
    sleep(wait).await;
    knocker(V5).knock().await.welcome();
    assert!(hits(&fleet, "connect_rate").await > 1.5);
}

#[tokio::test]
async fn handshakes_beyond_the_budget_are_told_that_the_server_is_busy() {
    let fleet = Fleet::start_with(&[("MUSTER__ADMISSION__MAX_HANDSHAKES", "1")]).await;
    let device = fleet.enrol("one").await;
    let knocker = |version| Knocker::new(&fleet, &device, HOME, version);
    let silent = knocker(V5).socket().await;
    shows(&fleet, "muster_mqtt_handshakes", 1.0).await;
    let (code, wait) = knocker(V5).knock().await.refused();
    assert_eq!(code, 0x89);
    assert!(wait.is_some_and(|wait| wait >= Duration::from_secs(1)), "{wait:?}");
    assert_eq!(knocker(V311).knock().await.refused().0, 3);
    assert!(hits(&fleet, "handshakes").await > 1.5);
    drop(silent);
    shows(&fleet, "muster_mqtt_handshakes", 0.0).await;
    let _first = knocker(V5).knock().await.welcome();
    knocker(V311).named("another".into()).knock().await.welcome();
}

#[tokio::test]
async fn refusals_beyond_their_bound_are_not_told() {
    let full = [("MUSTER__MQTT__MAX_CONNECTIONS", "1"), ("MUSTER__ADMISSION__MAX_REFUSALS", "1")];
    let fleet = Fleet::start_with(&full).await;
    let device = fleet.enrol("one").await;
    let knocker = Knocker::new(&fleet, &device, HOME, V5);
    let mut inside = knocker.knock().await.welcome();
    let (code, wait) = knocker.knock().await.refused();
    assert_eq!((code, wait.is_some()), (0x97, true));
    fleet
        .eventually(
            || async {
                let _silent = knocker.socket().await;
                matches!(knocker.knock().await, Answer::Closed)
            },
            |closed| *closed,
        )
        .await;
    assert!(hits(&fleet, "refusals").await > 0.5);
    let reading = Publish::new(device.topic("telemetry"), r#"{"t":1}"#).qos(1);
    assert_eq!(inside.publish(reading).await, 0, "those already in are served");
}

#[tokio::test]
async fn authentications_beyond_the_budget_are_told_that_the_server_is_busy() {
    let tight =
        [("MUSTER__ADMISSION__MAX_AUTHENTICATIONS", "1"), ("MUSTER__ADMISSION__AUTHENTICATION_TIMEOUT_MS", "1500")];
    let fleet = Fleet::start_with(&tight).await;
    let device = fleet.enrol("one").await;
    let knocker = Knocker::new(&fleet, &device, HOME, V5);
    let mut tx = fleet.db().begin().await.expect("the database answers");
    sqlx::query("lock table credential").execute(&mut *tx).await.expect("nobody else holds it");
    // One is being verified, one waits for its turn; there is no room for more.
    let answers: Vec<_> = join_all((0..5).map(|_| knocker.knock())).await.into_iter().map(Answer::refused).collect();
    assert!(answers.iter().all(|(code, wait)| [0x88, 0x89].contains(code) && wait.is_some()), "{answers:?}");
    assert!(hits(&fleet, "authentications").await > 0.5);
    assert!(hits(&fleet, "authentications").await < 4.5);
    assert!(hits(&fleet, "authentication_timeout").await > 0.5, "those who had a place waited in vain");
    tx.rollback().await.expect("the database answers");
    knocker.insist().await;
    shows(&fleet, "muster_mqtt_authenticating", 0.0).await;
}

#[tokio::test]
async fn a_storm_settles_and_those_already_in_are_served() {
    storm(
        1_500,
        [("CONNECTS_PER_S", "300"), ("CONNECTS_BURST", "50"), ("MAX_HANDSHAKES", "100"), ("MAX_REFUSALS", "100")],
    )
    .await;
}

/// By hand, with `ulimit -n 40000`: as many as there may be, with the budgets as they are shipped.
#[tokio::test]
#[ignore = "takes two file descriptors a client and a minute of the machine"]
async fn a_storm_of_fifteen_thousand_settles() {
    let shipped =
        [("CONNECTS_PER_S", "2000"), ("CONNECTS_BURST", "15000"), ("MAX_HANDSHAKES", "1000"), ("MAX_REFUSALS", "500")];
    storm(14_900, shipped).await;
}

async fn storm(clients: usize, budgets: [(&str, &str); 4]) {
    let budgets = budgets.map(|(key, value)| (format!("MUSTER__ADMISSION__{key}"), value));
    let budgets: Vec<_> = budgets.iter().map(|(key, value)| (key.as_str(), *value)).collect();
    let fleet = Fleet::start_with(&budgets).await;
    let (calm, stormy) = (fleet.enrol("calm").await, fleet.enrol("stormy").await);
    let mut inside = Knocker::new(&fleet, &calm, HOME, V5).knock().await.welcome();
    let began = Instant::now();
    let knockers: Vec<_> = (0..clients)
        .map(|n| Knocker::new(&fleet, &stormy, HOME, V5).named(format!("stormy-{n}")))
        .map(|knocker| tokio::spawn(async move { knocker.insist().await }))
        .collect();
    let all_in = join_all(knockers);
    tokio::pin!(all_in);
    let (mut slowest, mut published) = (Duration::ZERO, 0);
    let came = loop {
        tokio::select! {
            biased;
            came = &mut all_in => break came,
            () = sleep(Duration::from_millis(20)) => {
                let sent = Instant::now();
                let seq = published + 1;
                let reading = format!(r#"{{"ts":1763692212000,"seq":{seq},"values":{{"t":{seq}}}}}"#);
                let reading = Publish::new(calm.topic("telemetry"), reading).qos(1);
                assert_eq!(inside.publish(reading).await, 0);
                (slowest, published) = (slowest.max(sent.elapsed()), seq);
            }
        }
        assert!(began.elapsed() < 6 * PATIENCE, "the storm does not settle");
    };
    let took = began.elapsed();
    let came: Vec<_> = came.into_iter().map(|came| came.expect("no client fails")).collect();
    let knocks: u32 = came.iter().map(|(_, knocks)| knocks).sum();
    println!(
        "{clients} clients in after {took:?} and {knocks} connects; {published} readings, the slowest acknowledged in {slowest:?}"
    );
    assert!(slowest < PATIENCE / 4, "a reading was acknowledged after {slowest:?}");
    #[expect(clippy::cast_precision_loss, reason = "some thousands")]
    shows(&fleet, "muster_mqtt_connections", (clients + 1) as f64).await;
    assert!(hits(&fleet, "connect_rate").await + hits(&fleet, "handshakes").await > 0.5, "a budget was hit");
    assert!(u64::from(knocks) < clients as u64 * 8, "{knocks} connects of {clients} clients: the spread does not work");
}

#[tokio::test]
async fn a_flapping_client_is_shown_damped_and_forgiven() {
    let strict = [
        ("MUSTER__ADMISSION__FLAPPING_CONNECTS", "3"),
        ("MUSTER__ADMISSION__FLAPPING_WINDOW_S", "2"),
        ("MUSTER__ADMISSION__FLAPPING_BACKOFF_S", "1"),
        ("MUSTER__ADMISSION__FLAPPING_MAX_BACKOFF_S", "1"),
    ];
    let fleet = Fleet::start_with(&strict).await;
    let (restless, calm) = (fleet.enrol("restless").await, fleet.enrol("calm").await);
    let knocker = |version| Knocker::new(&fleet, &restless, HOME, version);
    // A slow machine may take longer than the window for a few.
    let mut refused = None;
    for _ in 0..100 {
        if let Answer::Refused(code, wait) = knocker(V5).knock().await {
            refused = Some((code, wait.expect("when to come again")));
            break;
        }
    }
    let (code, wait) = refused.expect("it is refused in the end");
    assert_eq!(code, 0x89);
    assert!((500..=2000).contains(&wait.as_millis()), "{wait:?}");
    assert_eq!(knocker(V311).knock().await.refused().0, 3);
    shows(&fleet, "muster_mqtt_flapping_clients", 1.0).await;
    let (_, detail) = fleet.event("flapping").await;
    assert_eq!(detail["address"], "127.0.0.2");
    Knocker::new(&fleet, &calm, HOME, V5).knock().await.welcome();
    knocker(V5).named("restless-2".into()).knock().await.welcome();
    let (_client, _) = knocker(V5).insist().await;
    shows(&fleet, "muster_mqtt_flapping_clients", 0.0).await;
    assert!(hits(&fleet, "flapping").await > 1.5);
}

#[tokio::test]
async fn of_two_devices_with_one_identity_the_holder_keeps_it_for_a_while() {
    let strict = [("MUSTER__ADMISSION__CONFLICT_TAKEOVERS", "2"), ("MUSTER__ADMISSION__CONFLICT_HOLD_S", "5")];
    let fleet = Fleet::start_with(&strict).await;
    let device = fleet.enrol("twin").await;
    let knocker = |from, version| Knocker::new(&fleet, &device, from, version);
    let mut first = knocker(HOME, V5).knock().await.welcome();
    let mut second = knocker(AWAY, V5).knock().await.welcome();
    assert!(matches!(first.next().await, Packet::Disconnect(0x8E, _)), "taken over");
    let mut holder = knocker(HOME, V5).knock().await.welcome();
    assert!(matches!(second.next().await, Packet::Disconnect(0x8E, _)), "taken over");
    let (code, wait) = knocker(AWAY, V5).knock().await.refused();
    assert_eq!(code, 0x89);
    let wait = wait.expect("when to come again");
    assert!((1000..=7000).contains(&wait.as_millis()), "{wait:?}");
    assert_eq!(knocker(AWAY, V311).knock().await.refused().0, 3);
    let reading = Publish::new(device.topic("telemetry"), r#"{"t":1}"#).qos(1);
    assert_eq!(holder.publish(reading.clone()).await, 0, "the holder keeps working");
    shows(&fleet, "muster_mqtt_identity_conflicts", 1.0).await;
    let (_, detail) = fleet.event("identity-conflict").await;
    assert_eq!(detail, serde_json::json!({ "holder": "127.0.0.2", "refused": "127.0.0.3" }));
    // Its link breaks, and it comes back before that was noticed.
    let mut holder = knocker(HOME, V5).knock().await.welcome();
    assert_eq!(holder.publish(reading).await, 0);
    shows(&fleet, "muster_mqtt_identity_conflicts", 0.0).await;
    knocker(AWAY, V5).knock().await.welcome();
    assert!(hits(&fleet, "identity_conflict").await > 1.5);
}

#[tokio::test]
async fn a_device_that_comes_back_from_its_own_address_is_no_conflict() {
    let fleet = Fleet::start_with(&[("MUSTER__ADMISSION__CONFLICT_TAKEOVERS", "1")]).await;
    let device = fleet.enrol("one").await;
    let mut connections = Vec::new();
    for _ in 0..10 {
        connections.push(Knocker::new(&fleet, &device, HOME, V5).knock().await.welcome());
    }
    assert!(hits(&fleet, "identity_conflict").await < 0.5);
}

#[tokio::test]
async fn a_guesser_is_blocked_and_an_honest_device_elsewhere_is_not() {
    let strict = [("MUSTER__ADMISSION__AUTH_FAILURES", "3"), ("MUSTER__ADMISSION__AUTH_BLOCK_S", "1")];
    let fleet = Fleet::start_with(&strict).await;
    let device = fleet.enrol("one").await;
    let knocker = |from, version| Knocker::new(&fleet, &device, from, version);
    for _ in 0..4 {
        assert_eq!(knocker(AWAY, V5).with_password("guess").knock().await.refused(), (0x86, None));
    }
    let (code, wait) = knocker(AWAY, V5).knock().await.refused();
    assert_eq!(code, 0x9F, "whatever it shows now");
    let wait = wait.expect("when to come again");
    assert!((500..=2000).contains(&wait.as_millis()), "{wait:?}");
    assert_eq!(knocker(AWAY, V311).knock().await.refused().0, 3);
    knocker(HOME, V5).knock().await.welcome();
    assert!(hits(&fleet, "authentication_failures").await > 1.5);
    sleep(wait).await;
    knocker(AWAY, V5).knock().await.welcome();
}
