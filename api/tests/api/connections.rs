//! Open connections over REST, with brokers that are played.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use fleet_core::connection_event::{self, Event, Kind, Tallies};
use fleet_core::control::{
    self, Answer, Connection, Direction, Filter, Owner, Request, TraceLine, TraceLines, Transport,
};
use fleet_core::id::{ConnectionId, TenantKey};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::harness::{Api, EMAIL, NOON_MS, Setup};

const PATH: &str = "/api/v1/connections";

/// A broker that answers as it is told, and remembers what it was asked.
struct Broker {
    asked: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
}

impl Broker {
    async fn start(api: &Api, says: impl Fn(&Request) -> Answer + Send + 'static) -> Self {
        let broker = Self { asked: Arc::default(), stopped: Arc::default() };
        let id = Uuid::new_v4();
        control::renew(&mut api.db.pool().acquire().await.unwrap(), id).await.unwrap();
        tokio::spawn(serve(api.db.pool().clone(), id, says, broker.asked.clone(), broker.stopped.clone()));
        broker
    }

    fn last(&self) -> Request {
        self.asked.lock().unwrap().last().expect("it was asked").clone()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

async fn serve(
    pool: PgPool,
    id: Uuid,
    says: impl Fn(&Request) -> Answer + Send,
    asked: Arc<Mutex<Vec<Request>>>,
    stopped: Arc<AtomicBool>,
) {
    while !stopped.load(Ordering::Relaxed) {
        let Ok(mut db) = pool.acquire().await else { return };
        control::renew(&mut db, id).await.unwrap();
        let questions = control::look(&mut db, id).await.unwrap().questions;
        let answers: Vec<_> = questions
            .into_iter()
            .map(|question| {
                let request = question.request.expect("of this version");
                let answer = says(&request);
                asked.lock().unwrap().push(request);
                (question.id, answer)
            })
            .collect();
        control::answer(&mut db, id, &answers).await.unwrap();
        drop(db);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn connection(owner: Owner) -> Connection {
    Connection {
        id: ConnectionId::new(),
        session: "main/boiler-1/boiler-1".into(),
        client_id: "boiler-1".into(),
        owner,
        since_ms: NOON_MS,
        address: "192.0.2.7:40312".parse().unwrap(),
        transport: Transport::Tls,
        protocol: 5,
        keep_alive_s: Some(60),
        session_expiry_s: 3600,
        queued_messages: 3,
        queued_bytes: 300,
        in_flight: 2,
        messages_in: 10,
        messages_out: 20,
        bytes_in: 1000,
        bytes_out: 2000,
        subscriptions: 1,
        flapping: false,
        traced: false,
    }
}

fn of_device() -> Connection {
    connection(Owner::Device("boiler-1".parse().unwrap()))
}

#[tokio::test]
async fn a_connection_tells_who_is_there() {
    let api = Api::start().await;
    let device = of_device();
    let user = Connection {
        protocol: 4,
        keep_alive_s: None,
        session_expiry_s: u32::MAX,
        client_id: "grafana".into(),
        transport: Transport::WebSocket,
        ..connection(Owner::User(api.admin))
    };
    let both = vec![device.clone(), user.clone()];
    let broker = Broker::start(&api, move |_| Answer::Connections(both.clone())).await;
    let listed = api.get(&format!("{PATH}?device=boiler-1&client_id=a%20b&transport=tls")).await.expect(200).body;
    assert_eq!(
        listed["items"][0],
        json!({
            "id": device.id.to_string(), "client_id": "boiler-1", "principal": "device", "device": "boiler-1",
            "user": null, "since": "2025-11-21T12:00:00.000Z", "address": "192.0.2.7:40312", "transport": "tls",
            "protocol": "5", "keep_alive_s": 60, "persistent": true, "session_expiry_s": 3600, "queued_messages": 3,
            "queued_bytes": 300, "in_flight": 2, "messages_in": 10, "messages_out": 20, "bytes_in": 1000,
            "bytes_out": 2000, "subscriptions": 1, "flapping": false, "traced": false,
        })
    );
    let user = &listed["items"][1];
    assert_eq!((&user["user"], &user["principal"], &user["device"]), (&json!(EMAIL), &json!("user"), &Value::Null));
    assert_eq!((&user["protocol"], &user["transport"]), (&json!("3.1.1"), &json!("websocket")));
    assert_eq!((&user["keep_alive_s"], &user["session_expiry_s"]), (&Value::Null, &Value::Null));
    assert_eq!((&listed["next_cursor"], &listed["missing_brokers"]), (&Value::Null, &json!([])));
    let filter = Filter {
        device: Some("boiler-1".parse().unwrap()),
        client_id: Some("a b".into()),
        transport: Some(Transport::Tls),
    };
    assert_eq!(broker.last(), Request::Connections { tenant: api.db.tenant(), filter, after: None, limit: 101 });
}

#[tokio::test]
async fn pages_of_several_brokers_are_one_list() {
    let api = Api::start().await;
    let all: Vec<_> = (0..7).map(|_| of_device()).collect();
    let play = |own: Vec<Connection>| {
        move |request: &Request| {
            let Request::Connections { after, limit, .. } = request else { return Answer::NotHere };
            let behind = own.iter().filter(|connection| after.is_none_or(|after| connection.id > after));
            Answer::Connections(behind.take(*limit).cloned().collect())
        }
    };
    let _even = Broker::start(&api, play(all.iter().step_by(2).cloned().collect())).await;
    let _odd = Broker::start(&api, play(all.iter().skip(1).step_by(2).cloned().collect())).await;
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("{PATH}?limit=3{cursor}")).await.expect(200);
        seen.extend(page.ids().into_iter().map(str::to_owned));
        let Some(next) = page.body["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, all.iter().map(|connection| connection.id.to_string()).collect::<Vec<_>>());
    for query in ["device=_x", "transport=udp", "limit=0", "cursor=ZGE", "reason=x"] {
        api.get(&format!("{PATH}?{query}")).await.problem(400, "invalid");
    }
}

#[tokio::test]
async fn without_a_broker_that_is_said() {
    let api = Api::start().await;
    let id = ConnectionId::new();
    let refused = api.get(PATH).await.problem(503, "no-broker");
    assert!(refused.body["detail"].as_str().unwrap().contains("no broker is running"), "{}", refused.text);
    assert_eq!(refused.header("retry-after"), "1");
    api.get(&format!("{PATH}/{id}")).await.problem(503, "no-broker");
    api.post(&format!("{PATH}/{id}/disconnect"), json!({})).await.problem(503, "no-broker");
    api.post(&format!("{PATH}/{id}/trace"), json!({})).await.problem(503, "no-broker");
    api.get(&format!("{PATH}/{id}/trace")).await.problem(503, "no-broker");
    api.get(&format!("{PATH}/events")).await.expect(200);
}

#[tokio::test]
async fn a_broker_that_is_silent_is_named() {
    let mut setup = Setup::default();
    setup.config.http.broker_answer_ms = 500;
    let api = Api::with(setup).await;
    let silent = Uuid::new_v4();
    // It is alive all the time, and says nothing.
    let renewed = "insert into broker_node (id, started_at, heartbeat_at) values ($1, now(), now() + interval '1 h')";
    sqlx::query(renewed).bind(silent).execute(api.db.pool()).await.unwrap();
    let refused = api.get(PATH).await.problem(503, "no-broker");
    assert!(refused.body["detail"].as_str().unwrap().contains("answered in time"), "{}", refused.text);
    let here = of_device();
    let found = here.clone();
    let _broker = Broker::start(&api, move |request| match request {
        Request::Connections { .. } => Answer::Connections(vec![found.clone()]),
        Request::Connection { id, .. } if *id == found.id => Answer::Connection(Box::new(found.clone())),
        _ => Answer::NotHere,
    })
    .await;
    // The other one may be late on a busy machine.
    let listed = api.get_until(PATH, |reply| reply.status == 200 && reply.ids().len() == 1).await;
    assert_eq!(listed.body["missing_brokers"], json!([silent.to_string()]));
    api.get_until(&format!("{PATH}/{}", here.id), |reply| reply.status == 200).await;
    // It may be with the silent one: that it does not exist cannot be said.
    api.get(&format!("{PATH}/{}", ConnectionId::new())).await.problem(503, "no-broker");
}

#[tokio::test]
async fn one_connection_is_found_or_not() {
    let api = Api::start().await;
    let here = of_device();
    let found = here.clone();
    let _broker = Broker::start(&api, move |request| match request {
        Request::Connection { id, .. } if *id == found.id => Answer::Connection(Box::new(found.clone())),
        _ => Answer::NotHere,
    })
    .await;
    let read = api.get(&format!("{PATH}/{}", here.id)).await.expect(200);
    assert_eq!(read.body["client_id"], "boiler-1");
    let other = ConnectionId::new();
    api.get(&format!("{PATH}/{other}")).await.problem(404, "no-such-connection");
    api.post(&format!("{PATH}/{other}/disconnect"), json!({})).await.problem(404, "no-such-connection");
    api.post(&format!("{PATH}/{other}/trace"), json!({})).await.problem(404, "no-such-connection");
    api.get(&format!("{PATH}/{other}/trace")).await.problem(404, "no-such-trace");
    api.ask("DELETE", &format!("{PATH}/{other}/trace")).send().await.problem(404, "no-such-trace");
    api.get(&format!("{PATH}/boiler-1")).await.problem(400, "bad-id");
}

#[tokio::test]
async fn a_disconnect_says_why_and_by_whom() {
    let api = Api::start().await;
    let here = of_device();
    let id = here.id;
    let broker = Broker::start(&api, move |request| match request {
        Request::Connection { .. } => Answer::Connection(Box::new(here.clone())),
        _ => Answer::Done,
    })
    .await;
    let path = format!("{PATH}/{id}/disconnect");
    let (tenant, by) = (api.db.tenant(), api.admin);
    api.ask("POST", &path).send().await.expect(204);
    let reason = "disconnected by an operator".to_owned();
    assert_eq!(broker.last(), Request::Disconnect { tenant, id, reason, end_session: false, by });
    api.post(&path, json!({ "reason": " moved ", "end_session": true })).await.expect(204);
    assert_eq!(broker.last(), Request::Disconnect { tenant, id, reason: "moved".into(), end_session: true, by });
    let entry = api.get("/api/v1/audit?limit=1").await.expect(200).body["items"][0].clone();
    assert_eq!((&entry["action"], &entry["resource"]["id"]), (&json!("connection.disconnect"), &json!(id)));
    assert_eq!((&entry["device"], &entry["before"]["address"]), (&json!("boiler-1"), &json!("192.0.2.7:40312")));
    assert_eq!(entry["after"], json!({ "reason": " moved ", "end_session": true }));
    for bad in [json!({ "reason": "" }), json!({ "reason": "x".repeat(201) }), json!({ "reason": "a\nb" })] {
        api.post(&path, bad).await.problem(400, "invalid");
    }
    api.post(&path, json!({ "reson": "x" })).await.problem(400, "invalid");
}

fn line(seq: i64, text: &str) -> TraceLine {
    TraceLine { seq, at_ms: NOON_MS + seq, direction: Direction::In, text: text.into() }
}

#[tokio::test]
async fn a_trace_is_asked_for_read_and_ended() {
    let api = Api::start().await;
    let here = of_device();
    let (id, session) = (here.id, here.session.clone());
    let play = |own: Option<Connection>, lines: Vec<TraceLine>, dropped: u64| {
        move |request: &Request| match request {
            Request::Connection { .. } => match &own {
                Some(connection) => Answer::Connection(Box::new(connection.clone())),
                None => Answer::NotHere,
            },
            Request::TraceStart { minutes, .. } => {
                let ends_ms = NOON_MS + i64::from(*minutes) * 60_000;
                Answer::Trace(TraceLines { lines: Vec::new(), dropped: 0, ends_ms })
            }
            Request::Trace { .. } => Answer::Trace(TraceLines { lines: lines.clone(), dropped, ends_ms: NOON_MS }),
            _ => Answer::Done,
        }
    };
    let broker = Broker::start(&api, play(Some(here), vec![line(2, "two"), line(3, "three")], 1)).await;
    let _other = Broker::start(&api, play(None, vec![line(1, "one")], 2)).await;
    let path = format!("{PATH}/{id}/trace");
    let (tenant, by) = (api.db.tenant(), api.admin);
    let started = api.post(&path, json!({ "minutes": 60 })).await.expect(200).body;
    assert_eq!(started, json!({ "items": [], "dropped": 0, "ends_at": "2025-11-21T13:00:00.000Z" }));
    assert_eq!(broker.last(), Request::TraceStart { tenant, id, session, minutes: 60, by });
    let read = api.get(&format!("{path}?after=7&limit=3")).await.expect(200).body;
    assert_eq!(broker.last(), Request::Trace { tenant, id, after: 7, limit: 3 });
    let first = json!({ "seq": 1, "at": "2025-11-21T12:00:00.001Z", "direction": "in", "text": "one" });
    assert_eq!((&read["items"][0], &read["dropped"]), (&first, &json!(3)));
    let texts: Vec<_> = read["items"].as_array().unwrap().iter().map(|item| item["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["one", "two", "three"]);
    assert_eq!(api.get(&format!("{path}?limit=1")).await.expect(200).body["items"].as_array().unwrap().len(), 1);
    api.ask("DELETE", &path).send().await.expect(204);
    assert_eq!(broker.last(), Request::TraceStop { tenant, id });
    let entries = api.get("/api/v1/audit?action=connection").await.expect(200).body["items"].clone();
    assert_eq!(
        (&entries[0]["action"], &entries[1]["action"]),
        (&json!("connection.untrace"), &json!("connection.trace"))
    );
    assert_eq!(entries[1]["after"], json!({ "minutes": 60 }));
    for minutes in [0, 61] {
        api.post(&path, json!({ "minutes": minutes })).await.problem(400, "invalid");
    }
}

#[tokio::test]
async fn too_many_traces_are_refused() {
    let api = Api::start().await;
    let here = of_device();
    let id = here.id;
    let _broker = Broker::start(&api, move |request| match request {
        Request::Connection { .. } => Answer::Connection(Box::new(here.clone())),
        _ => Answer::Refused("16 clients are traced already".into()),
    })
    .await;
    let refused = api.post(&format!("{PATH}/{id}/trace"), json!({})).await.problem(409, "too-many-traces");
    assert!(refused.body["detail"].as_str().unwrap().contains("16"));
    assert!(api.metric("muster_http_problems_total{type=\"too-many-traces\"}").await >= 1.0);
}

#[tokio::test]
async fn what_a_caller_asks_is_about_its_own_tenant() {
    let api = Api::start().await;
    let broker = Broker::start(&api, |_| Answer::NotHere).await;
    let other: i64 = sqlx::query_scalar("insert into tenant (id, created_at) values ('other', now()) returning key")
        .fetch_one(api.db.pool())
        .await
        .unwrap();
    let (stranger, token) = api.nobody().await;
    sqlx::query("update app_user set tenant_key = $1, role = 'admin' where id = $2")
        .bind(other)
        .bind(stranger.uuid())
        .execute(api.db.pool())
        .await
        .unwrap();
    let id = ConnectionId::new();
    for (method, path) in [
        ("GET", String::new()),
        ("GET", format!("/{id}")),
        ("POST", format!("/{id}/disconnect")),
        ("POST", format!("/{id}/trace")),
        ("GET", format!("/{id}/trace")),
        ("DELETE", format!("/{id}/trace")),
    ] {
        broker.asked.lock().unwrap().clear();
        let ask = api.anonymous(method, &format!("{PATH}{path}"));
        ask.header("authorization", &format!("Bearer {token}")).send().await;
        let asked = serde_json::to_value(broker.last()).unwrap();
        assert_eq!(asked["tenant"], json!(other), "{method} {path}");
    }
}

#[tokio::test]
async fn events_are_told_newest_first_page_by_page() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let mut conn = api.db.pool().acquire().await.unwrap();
    let device = fleet_core::device::key(&mut conn, api.db.tenant(), &"boiler-1".parse().unwrap()).await.unwrap();
    let mut tallies = Tallies::default();
    for (n, kind) in Kind::ALL.into_iter().enumerate() {
        let event = Event {
            tenant: api.db.tenant(),
            device: (n < 2).then_some(device),
            client_id: "c".into(),
            kind,
            detail: json!({ "n": n }),
            at_ms: NOON_MS + i64::try_from(n).unwrap(),
        };
        assert!(tallies.add(event.clone(), 100));
        assert!(tallies.add(Event { tenant: TenantKey(-1), ..event }, 100));
    }
    connection_event::record(&mut conn, &tallies).await.unwrap();
    let path = format!("{PATH}/events");
    let of_kind = api.get(&format!("{path}?kind=flapping")).await.expect(200).body;
    let id = of_kind["items"][0]["id"].clone();
    assert_eq!(
        of_kind["items"],
        json!([{
            "id": id, "kind": "flapping", "device": "boiler-1", "client_id": "c", "detail": { "n": 0 }, "count": 1,
            "at": "2025-11-21T12:00:00.000Z",
        }])
    );
    assert_eq!(api.get(&format!("{path}?device=boiler-1")).await.expect(200).ids().len(), 2);
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("{path}?limit=4{cursor}")).await.expect(200).body;
        seen.extend(page["items"].as_array().unwrap().iter().map(|item| item["detail"]["n"].as_u64().unwrap()));
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, [5, 4, 3, 2, 1, 0]);
    api.get(&format!("{path}?device=nobody")).await.problem(404, "no-such-device");
    for query in ["kind=sneezing", "limit=0", "cursor=ZGE", "since=x"] {
        api.get(&format!("{path}?{query}")).await.problem(400, "invalid");
    }
}
