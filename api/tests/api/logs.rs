//! Log lines over REST: the tail, and what is around a line.

use std::time::Duration;

use axum::body::BodyDataStream;
use fleet_core::id::DeviceKey;
use fleet_core::log::{Batch, Limits, insert_batch, prepare};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::harness::{Api, Ask, NOON_MS, Setup, escaped};

const TAIL: &str = "/api/v1/logs/tail";
/// Longest wait for what must come.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Stores lines of a device in one transaction, as the broker does.
pub(crate) async fn write(api: &Api, device: &str, lines: &[Value]) {
    let mut tx = api.db.pool().begin().await.unwrap();
    let sql = "select key from device where id = $1 order by key limit 1";
    let key = sqlx::query_scalar(sql).bind(device).fetch_one(&mut *tx).await.unwrap();
    let limits = Limits { max_lines: 10_000, max_ahead_ms: 300_000 };
    let mut batch = Batch::default();
    for line in lines {
        let rejected = batch.push(DeviceKey(key), line.to_string().as_bytes(), NOON_MS, &limits);
        assert_eq!(rejected, []);
    }
    prepare(&mut tx, &mut batch).await.unwrap();
    insert_batch(&mut tx, 0, &batch).await.unwrap();
    tx.commit().await.unwrap();
}

/// The nth line.
pub(crate) fn line(n: i64) -> Value {
    json!({ "ts": NOON_MS - 1000 + n, "seq": n, "level": "warn", "message": format!("line {n}"), "fields": { "n": n } })
}

/// An event as it was sent.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Event {
    name: String,
    id: String,
    pub(crate) data: Value,
}

/// Server-sent events as they come.
pub(crate) struct Events {
    body: BodyDataStream,
    text: String,
    /// Behind which event they began.
    pub(crate) began: String,
    /// The first of them, where it was a line already.
    first: Option<Event>,
}

impl Events {
    pub(crate) async fn open(ask: Ask<'_>) -> Self {
        let response = ask.open().await;
        assert_eq!(response.status().as_u16(), 200);
        let header = |name: &str| response.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
        assert_eq!(header("content-type").as_deref(), Some("text/event-stream"));
        assert_eq!((header("x-accel-buffering").as_deref(), header("content-encoding")), (Some("no"), None));
        assert_eq!(header("cache-control").as_deref(), Some("no-store"));
        let (body, text, began) = (response.into_body().into_data_stream(), String::new(), String::new());
        let mut events = Self { body, text, began, first: None };
        let first = events.event().await.unwrap();
        assert!(!first.id.is_empty(), "it is said at once where to go on");
        first.id.clone_into(&mut events.began);
        // One that goes on further back may have found a line by then.
        events.first = Some(first).filter(|first| !first.name.is_empty());
        events
    }

    /// The next event, also one without data; `None` when they have ended.
    async fn event(&mut self) -> Option<Event> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        loop {
            if let Some((event, rest)) = self.text.split_once("\n\n") {
                let (event, rest) = (read(event), rest.to_owned());
                self.text = rest;
                return Some(event);
            }
            let more = timeout(SOON, self.body.next()).await.expect("something comes")?;
            self.text.push_str(std::str::from_utf8(&more.unwrap()).unwrap());
        }
    }

    /// The next event with a name.
    async fn next(&mut self) -> Event {
        loop {
            let event = self.event().await.expect("it goes on");
            if !event.name.is_empty() {
                return event;
            }
        }
    }

    pub(crate) async fn line(&mut self) -> Event {
        let event = self.next().await;
        assert_eq!(event.name, "line", "{event:?}");
        event
    }

    async fn message(&mut self) -> String {
        self.line().await.data["message"].as_str().unwrap().to_owned()
    }
}

fn read(text: &str) -> Event {
    let mut event = Event::default();
    for line in text.lines() {
        match line.split_once(": ").unwrap_or_default() {
            ("event", name) => name.clone_into(&mut event.name),
            ("id", id) => id.clone_into(&mut event.id),
            ("data", data) => event.data = serde_json::from_str(data).unwrap(),
            _ => {}
        }
    }
    event
}

#[tokio::test]
async fn a_line_is_told_whole_as_it_is_committed() {
    let api = Api::start().await;
    api.enrol("pump-7").await;
    let mut tail = Events::open(api.ask("GET", TAIL)).await;
    let sent = json!({
        "ts": NOON_MS, "seq": 919, "level": "warn", "target": "net.wifi", "message": "reconnect 3\n\u{2028}",
        "fields": { "rssi": -81 }, "trace_id": "ab",
    });
    write(&api, "pump-7", &[sent, json!({ "message": "x".repeat(40_000) })]).await;
    let mut told = tail.line().await.data;
    let id = told.as_object_mut().unwrap().remove("id").unwrap();
    assert_eq!(
        told,
        json!({
            "device": "pump-7", "ts": "2025-11-21T12:00:00.000Z", "seq": 919, "level": "warn", "target": "net.wifi",
            "message": "reconnect 3\n\u{2028}", "trace_id": "ab", "fields": { "rssi": -81 },
        })
    );
    let bare = tail.line().await.data;
    assert_eq!((&bare["seq"], &bare["cut"], &bare["fields"]), (&Value::Null, &json!(["message"]), &json!({})));
    let context = format!("/api/v1/logs/context?id={}", id.as_str().unwrap());
    assert_eq!(api.get(&context).await.expect(200).body["line"]["message"], "reconnect 3\n\u{2028}");
}

#[tokio::test]
async fn a_tail_goes_on_behind_the_last_event_that_was_received() {
    let api = Api::start().await;
    api.enrol("pump-7").await;
    let mut tail = Events::open(api.ask("GET", &format!("{TAIL}?q={}", escaped("fields.n:>=2")))).await;
    write(&api, "pump-7", &(0..5).map(line).collect::<Vec<_>>()).await;
    let second = tail.line().await;
    assert_eq!((second.data["message"].as_str(), tail.message().await.as_str()), (Some("line 2"), "line 3"));
    drop(tail);
    write(&api, "pump-7", &(5..8).map(line).collect::<Vec<_>>()).await;
    for by_header in [true, false] {
        let ask = if by_header {
            api.ask("GET", TAIL).header("last-event-id", &second.id)
        } else {
            api.ask("GET", &format!("{TAIL}?last_event_id={}", second.id))
        };
        let mut tail = Events::open(ask).await;
        for n in 3..8 {
            assert_eq!(tail.message().await, format!("line {n}"));
        }
    }
    for id in ["x", "", &second.id[1..]] {
        let refused = api.ask("GET", TAIL).header("last-event-id", id).send().await.problem(400, "invalid");
        assert_eq!(refused.body["errors"][0]["field"], "last_event_id");
    }
    // Nobody learns from an id how much others write, and it is worth nothing to them.
    let (id, token) = api.user("stranger@example.org", "admin").await;
    let sql = "with other as (insert into tenant (id, created_at) values ('other', now()) returning key)
               update app_user set tenant_key = other.key from other where id = $1";
    sqlx::query(sql).bind(id.uuid()).execute(api.db.pool()).await.unwrap();
    let ask = api.as_who(&token, "GET", TAIL).header("last-event-id", &second.id);
    ask.send().await.problem(400, "invalid");
}

#[tokio::test]
async fn rights_that_end_end_the_tail() {
    let api = Api::start().await;
    api.enrol("pump-7").await;
    let (user, token) = api.user("ada@example.com", "viewer").await;
    let tail = format!("{TAIL}?q=*");
    let mut tail = Events::open(api.as_who(&token, "GET", &tail)).await;
    write(&api, "pump-7", &[line(1)]).await;
    assert_eq!(tail.message().await, "line 1");
    let change = api.ask("PATCH", &format!("/api/v1/users/{user}"));
    change.raw("application/merge-patch+json", r#"{"disabled":true}"#).send().await.expect(200);
    let mut end = tail.next().await;
    // Lines may come until rights are looked at again.
    while end.name == "line" {
        end = tail.next().await;
    }
    assert!(end.data["reason"].as_str().unwrap().contains("disabled"), "{end:?}");
    assert_eq!((end.name.as_str(), tail.event().await), ("end", None));

    // An access token ends by itself.
    let mut tail = Events::open(api.ask("GET", TAIL)).await;
    api.pass(chrono::TimeDelta::seconds(901));
    assert!(tail.next().await.data["reason"].as_str().unwrap().contains("expired"));
    assert_eq!(tail.event().await, None);
}

#[tokio::test]
async fn a_scope_holds_for_the_tail_and_for_what_is_around_a_line() {
    let api = Api::start().await;
    for (id, group) in [("inside", "hall"), ("outside", "yard")] {
        api.post("/api/v1/devices", json!({ "id": id, "group": group })).await.expect(201);
    }
    let (user, token) = api.user("ada@example.com", "").await;
    let scope = json!({ "kind": "group", "group": "hall" });
    api.post("/api/v1/bindings", json!({ "user": user, "role": "viewer", "scope": scope })).await.expect(201);
    let mut all = Events::open(api.ask("GET", TAIL)).await;
    let mut some = Events::open(api.as_who(&token, "GET", TAIL)).await;
    for n in 0..3 {
        write(&api, "outside", &[line(10 + n)]).await;
        write(&api, "inside", &[line(n)]).await;
        assert_eq!(some.message().await, format!("line {n}"));
    }
    let outside = all.line().await.data["id"].as_str().unwrap().to_owned();
    let inside = all.line().await.data["id"].as_str().unwrap().to_owned();
    let context = |id: &str| api.as_who(&token, "GET", &format!("/api/v1/logs/context?id={id}"));
    context(&inside).send().await.expect(200);
    context(&outside).send().await.problem(404, "no-such-device");
    let (_, nobody) = api.nobody().await;
    for path in [TAIL.to_owned(), format!("/api/v1/logs/context?id={inside}")] {
        api.as_who(&nobody, "GET", &path).send().await.problem(403, "forbidden");
        api.anonymous("GET", &path).send().await.problem(401, "no-token");
    }
}

#[tokio::test]
async fn a_query_that_cannot_be_read_is_refused_with_its_column() {
    let api = Api::start().await;
    for (q, column) in [("level:>=loud", "column"), ("a AND (b", "column"), ("sort:x", "column")] {
        let refused = api.get(&format!("{TAIL}?q={}", escaped(q))).await.problem(400, "invalid");
        let error = &refused.body["errors"][0];
        assert!(error["field"] == "q" && error["detail"].as_str().unwrap().contains(column), "{}", refused.text);
    }
    api.get(&format!("{TAIL}?level=warn")).await.problem(400, "invalid");
}

#[tokio::test]
async fn there_are_only_so_many_tails_and_a_quiet_one_says_that_it_is_there() {
    let mut setup = Setup::default();
    (setup.config.logs.max_tails, setup.config.logs.max_tails_per_user) = (2, 1);
    setup.config.logs.tail_heartbeat_ms = 20;
    let api = Api::with(setup).await;
    let mut tail = Events::open(api.ask("GET", TAIL)).await;
    let refused = api.get(TAIL).await.problem(429, "too-many-tails");
    assert_eq!(refused.header("retry-after"), "1");
    let (_, ada) = api.user("ada@example.com", "viewer").await;
    let (_, bob) = api.user("bob@example.com", "viewer").await;
    let other = Events::open(api.as_who(&ada, "GET", TAIL)).await;
    api.as_who(&bob, "GET", TAIL).send().await.problem(503, "too-many-tails");
    assert!(api.metric("muster_http_problems_total{type=\"too-many-tails\"}").await >= 2.0);
    assert!((api.metric("muster_log_tails").await - 2.0).abs() < 0.1);
    for _ in 0..3 {
        let beat = tail.event().await.unwrap();
        assert!(beat.name.is_empty() && !beat.id.is_empty(), "{beat:?}");
    }
    drop(other);
    Events::open(api.as_who(&bob, "GET", TAIL)).await;
    api.app.end_streams();
    while let Some(event) = tail.event().await {
        assert!(event.name.is_empty() || event.data["reason"] == "the server stops", "{event:?}");
    }
    api.get(TAIL).await.problem(503, "too-many-tails");
}

#[tokio::test]
async fn what_is_around_a_line_is_of_its_device_in_order_and_bounded() {
    let api = Api::start().await;
    api.enrol("pump-7").await;
    api.enrol("pump-8").await;
    // Several at one time.
    let lines = (0..30).map(|n| {
        let mut line = line(n);
        line["ts"] = json!(NOON_MS - 1000 + n / 4);
        line
    });
    write(&api, "pump-7", &lines.collect::<Vec<_>>()).await;
    write(&api, "pump-8", &(100..130).map(line).collect::<Vec<_>>()).await;
    let id = |ts: i64, seq: i64| {
        use base64::Engine as _;
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(format!("{ts},{seq},pump-7"))
    };
    let ask = |query: &str| {
        let path = format!("/api/v1/logs/context?id={}{query}", id(NOON_MS - 1000 + 3, 13));
        async { api.get(&{ path }).await }
    };
    let numbers =
        |value: &Value| value.as_array().unwrap().iter().map(|line| line["seq"].as_i64().unwrap()).collect::<Vec<_>>();
    let around = ask("").await.expect(200).body;
    assert_eq!((numbers(&around["before"]), numbers(&around["after"])), ((0..13).collect(), (14..30).collect()));
    assert_eq!(around["line"]["seq"], 13);
    let near = ask("&before=2&after=3").await.expect(200).body;
    assert_eq!((numbers(&near["before"]), numbers(&near["after"])), (vec![11, 12], vec![14, 15, 16]));
    let alone = ask("&before=0&after=0").await.expect(200).body;
    assert_eq!((&alone["before"], &alone["after"], &alone["line"]["seq"]), (&json!([]), &json!([]), &json!(13)));
    for bad in ["&before=501", "&after=-1", "&after=x", "&other=1"] {
        ask(bad).await.problem(400, "invalid");
    }
    api.get("/api/v1/logs/context").await.problem(400, "invalid");
    api.get("/api/v1/logs/context?id=x").await.problem(400, "invalid");
    api.get(&format!("/api/v1/logs/context?id={}", id(NOON_MS, 1))).await.problem(404, "no-such-line");
}
