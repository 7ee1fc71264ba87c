//! Whoever runs the server sees who is connected and has the last word: what is taken away ends open connections and
//! subscriptions within a second, and each action has its refusal.

use std::process::Stdio;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::Child;
use tokio::time::Instant;

use crate::harness::client::Client;
use crate::harness::packet::kind::PUBACK;
use crate::harness::packet::{Connect, Property, Publish, Will, property};
use crate::harness::raw::Version::{self, V5, V311};
use crate::harness::{ADMIN, Device, Fleet, PATIENCE, muster};

/// Administrative action.
const SENT_AWAY: u8 = 0x98;
const NOT_AUTHORIZED: u8 = 0x87;
const CONNECTIONS: &str = "/api/v1/connections";

/// A server on which a busy machine may take its time to answer.
async fn start() -> Fleet {
    start_with(&[]).await
}

async fn start_with(settings: &[(&str, &str)]) -> Fleet {
    Fleet::start_with(&[&[("MUSTER__HTTP__BROKER_ANSWER_MS", "15000")], settings].concat()).await
}

async fn connect(fleet: &Fleet, connect: Connect) -> Client {
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    let (client, connack) = Client::hello(Box::new(socket), &connect).await;
    assert_eq!(connack.code, 0, "{connack:?}");
    client
}

/// What a CONNECT is answered.
async fn answer_to(fleet: &Fleet, connect: &Connect) -> u8 {
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    Client::hello(Box::new(socket), connect).await.1.code
}

fn device(device: &Device, version: Version) -> Connect {
    Connect::new(version, &device.id, Some((device.username.clone(), device.password.clone())))
}

fn admin(fleet: &Fleet, client_id: &str) -> Connect {
    Connect::new(V5, client_id, Some((ADMIN.0.to_owned(), fleet.token().to_owned())))
}

/// An application with a role of its own and an API key for it.
struct App {
    name: String,
    key: String,
    secret: String,
}

impl App {
    async fn new(fleet: &Fleet, name: &str, permissions: &[&str], rules: Value) -> Self {
        let role = json!({ "id": name, "permissions": permissions, "topic_rules": rules });
        fleet.make("/api/v1/roles", role).await;
        Self::with_role(fleet, name, json!({ "name": name, "role": name })).await
    }

    async fn with_role(fleet: &Fleet, name: &str, key: Value) -> Self {
        let key = fleet.make("/api/v1/api-keys", key).await;
        let text = |field: &str| key[field].as_str().expect("a text").to_owned();
        Self { name: name.to_owned(), key: text("id"), secret: text("secret") }
    }

    fn hello(&self, client_id: &str) -> Connect {
        Connect::new(V5, client_id, Some((self.name.clone(), self.secret.clone())))
    }

    /// Writes the topic rules of the role anew.
    async fn may(&self, fleet: &Fleet, rules: Value) {
        let role = json!({ "permissions": [], "topic_rules": rules });
        change(fleet, Method::PUT, &format!("/api/v1/roles/{}", self.name), role).await;
    }
}

fn allow(action: &str, filter: &str) -> Value {
    json!({ "effect": "allow", "action": action, "filter": filter })
}

/// Changes something as the admin.
async fn change(fleet: &Fleet, method: Method, path: &str, body: Value) -> Value {
    let (status, answer) = fleet.call(method, path, Some(body)).await;
    assert!(status.is_success(), "{path}: {status} {answer}");
    answer
}

async fn delete(fleet: &Fleet, path: &str) {
    let (status, answer) = fleet.call(Method::DELETE, path, None).await;
    assert_eq!(status, StatusCode::NO_CONTENT, "{path}: {answer}");
}

/// The connection of a client.
async fn found(fleet: &Fleet, client_id: &str) -> Value {
    let listed = fleet.get(&format!("{CONNECTIONS}?client_id={client_id}")).await;
    assert_eq!(listed["items"].as_array().map(Vec::len), Some(1), "{client_id}: {listed}");
    listed["items"][0].clone()
}

async fn path_of(fleet: &Fleet, client_id: &str) -> String {
    format!("{CONNECTIONS}/{}", found(fleet, client_id).await["id"].as_str().expect("an id"))
}

/// The session of a client.
async fn session(fleet: &Fleet, client_id: &str) -> Value {
    let sessions = fleet.get("/api/v1/sessions").await;
    let own = sessions["items"].as_array().expect("items").iter().find(|one| one["client_id"] == client_id);
    own.unwrap_or_else(|| panic!("{client_id}: {sessions}")).clone()
}

/// What happened to a client, newest first.
async fn events(fleet: &Fleet, kind: &str) -> Vec<Value> {
    let listed = fleet.get(&format!("{CONNECTIONS}/events?kind={kind}")).await;
    listed["items"].as_array().expect("items").clone()
}

/// The access token of the admin of another tenant.
async fn neighbour(fleet: &Fleet) -> String {
    let tenant = "insert into tenant (id, created_at) values ('other', now())";
    let user = "insert into app_user (id, tenant_key, email, password_hash, role, platform, created_at, updated_at)
                select gen_random_uuid(), t.key, 'other@example.com', u.password_hash, 'admin', false, now(), now()
                  from app_user u, tenant t where t.id = 'other'";
    for statement in [tenant, user] {
        sqlx::query(statement).execute(fleet.db()).await.expect("the tables are there");
    }
    let login = json!({ "email": "other@example.com", "password": ADMIN.1 });
    let (status, answer) = fleet.call(Method::POST, "/api/v1/auth/login", Some(login)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["access_token"].as_str().expect("a token").to_owned()
}

/// Somebody may not, and is told so as a problem of this type.
async fn refused(fleet: &Fleet, bearer: &str, method: Method, path: &str, expected: (u16, &str)) {
    let body = (method == Method::POST).then(|| json!({}));
    let (status, problem) = fleet.call_as(bearer, method, path, body).await;
    assert_eq!(status.as_u16(), expected.0, "{path}: {problem}");
    let kind = problem["type"].as_str().expect("a problem has a type");
    assert!(kind.ends_with(expected.1), "{path}: {problem}");
}

/// Tells how long it took until a change was felt. A busy machine is not a broken promise: what is asserted is only that
/// it comes to pass.
fn felt(what: &str, since: Instant) {
    eprintln!("{what}: felt after {} ms", since.elapsed().as_millis());
    assert!(since.elapsed() < PATIENCE, "{what}");
}

/// The client is sent away with this reason and text.
async fn is_sent_away(client: Client, reason: u8, text: &str) {
    let properties = client.ends_with(reason, text).await;
    assert_eq!(property!(properties, ReasonString).as_deref(), Some(text));
}

#[tokio::test]
async fn an_operator_sees_who_is_connected() {
    let fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let hello = device(&boiler, V5).keep_alive(30).kept();
    let mut client = connect(&fleet, hello).await;
    assert_eq!(client.subscribe(&boiler.topic("commands/+/request"), 1).await, 1);
    assert_eq!(client.publish(Publish::new(boiler.topic("note"), "x").qos(1)).await, 0x10, "nobody subscribes");
    let _old = connect(&fleet, device(&fleet.enrol("boiler-2").await, V311)).await;
    let mut user = connect(&fleet, admin(&fleet, "grafana")).await;
    user.subscribe("app/main/#", 0).await;

    let all = fleet.get(CONNECTIONS).await;
    let names: Vec<_> = all["items"].as_array().unwrap().iter().map(|one| one["client_id"].clone()).collect();
    assert_eq!(names, ["boiler-1", "boiler-2", "grafana"], "the longest open first");
    assert_eq!((&all["next_cursor"], &all["missing_brokers"]), (&Value::Null, &json!([])));
    let first = fleet.get(&format!("{CONNECTIONS}?limit=2")).await;
    let cursor = first["next_cursor"].as_str().expect("there is more");
    let rest = fleet.get(&format!("{CONNECTIONS}?limit=2&cursor={cursor}")).await;
    assert_eq!(rest["items"][0]["client_id"], "grafana");

    let counted = |one: &Value| one["messages_in"] == 1 && one["in_flight"] == 0;
    let shown = fleet.eventually(|| found(&fleet, "boiler-1"), counted).await;
    let expected = json!({
        "client_id": "boiler-1", "principal": "device", "device": "boiler-1", "user": null, "transport": "tcp",
        "protocol": "5", "keep_alive_s": 30, "persistent": true, "session_expiry_s": 3600, "queued_messages": 0,
        "queued_bytes": 0, "in_flight": 0, "messages_in": 1, "messages_out": 0, "subscriptions": 1, "flapping": false,
        "traced": false,
    });
    for (field, value) in expected.as_object().unwrap() {
        assert_eq!(&shown[field], value, "{field}");
    }
    assert!(shown["bytes_in"].as_u64() > Some(50) && shown["bytes_out"].as_u64() > Some(10), "{shown}");
    assert!(shown["address"].as_str().unwrap().starts_with("127.0.0.1:"), "{shown}");
    let read = fleet.get(&format!("{CONNECTIONS}/{}", shown["id"].as_str().unwrap())).await;
    assert_eq!((&read["id"], &read["since"]), (&shown["id"], &shown["since"]));
    let user = found(&fleet, "grafana").await;
    assert_eq!((&user["user"], &user["persistent"]), (&json!(ADMIN.0), &json!(false)));
    assert_eq!(found(&fleet, "boiler-2").await["protocol"], "3.1.1");
    assert_eq!(fleet.get(&format!("{CONNECTIONS}?device=boiler-2")).await["items"][0]["client_id"], "boiler-2");
    assert_eq!(fleet.get(&format!("{CONNECTIONS}?transport=websocket")).await["items"], json!([]));

    client.disconnect().await;
    let (status, _) = fleet.call(Method::GET, &format!("{CONNECTIONS}/{}", shown["id"].as_str().unwrap()), None).await;
    assert_eq!(status, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn who_has_no_right_sees_nobody_and_sends_nobody_away() {
    let fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut client = connect(&fleet, device(&boiler, V5)).await;
    let path = path_of(&fleet, "boiler-1").await;
    let (disconnect, trace) = (format!("{path}/disconnect"), format!("{path}/trace"));
    let nobody = App::new(&fleet, "nobody", &[], json!([])).await.secret;
    for path in [CONNECTIONS, &path, &format!("{CONNECTIONS}/events")] {
        refused(&fleet, &nobody, Method::GET, path, (403, "forbidden")).await;
    }
    let viewer = App::new(&fleet, "viewer-of-mine", &["connections:read"], json!([])).await.secret;
    let (status, _) = fleet.call_as(&viewer, Method::GET, &path, None).await;
    assert_eq!(status, StatusCode::OK);
    // A trace shows payloads: to see who is connected is not enough.
    for (method, path) in
        [(Method::POST, &disconnect), (Method::POST, &trace), (Method::GET, &trace), (Method::DELETE, &trace)]
    {
        refused(&fleet, &viewer, method, path, (403, "forbidden")).await;
    }
    let other = neighbour(&fleet).await;
    let (_, seen) = fleet.call_as(&other, Method::GET, CONNECTIONS, None).await;
    assert_eq!(seen["items"], json!([]), "another tenant's connections are not there");
    for (method, path, problem) in [
        (Method::GET, &path, "no-such-connection"),
        (Method::POST, &disconnect, "no-such-connection"),
        (Method::POST, &trace, "no-such-connection"),
        (Method::GET, &trace, "no-such-trace"),
        (Method::DELETE, &trace, "no-such-trace"),
    ] {
        refused(&fleet, &other, method, path, (404, problem)).await;
    }
    client.is_quiet("nobody had the right to send it away").await;
    client.disconnect().await;
}

#[tokio::test]
async fn an_operator_sends_a_client_away() {
    let fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let kept = device(&boiler, V5).kept();
    let client = connect(&fleet, kept.clone()).await;
    let path = path_of(&fleet, "boiler-1").await;
    for reason in ["", "two\nlines", &"x".repeat(201)] {
        let (status, _) =
            fleet.call(Method::POST, &format!("{path}/disconnect"), Some(json!({ "reason": reason }))).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{reason:?}");
    }
    let began = Instant::now();
    change(&fleet, Method::POST, &format!("{path}/disconnect"), json!({ "reason": "moved to Bergen" })).await;
    is_sent_away(client, SENT_AWAY, "moved to Bergen").await;
    felt("disconnect", began);
    refused(&fleet, fleet.token(), Method::POST, &format!("{path}/disconnect"), (404, "no-such-connection")).await;

    // It may come again, and its session was kept; unless that is ended too.
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.unwrap();
    let (client, connack) = Client::hello(Box::new(socket), &kept).await;
    assert!(connack.present);
    let path = path_of(&fleet, "boiler-1").await;
    change(&fleet, Method::POST, &format!("{path}/disconnect"), json!({ "end_session": true })).await;
    is_sent_away(client, SENT_AWAY, "disconnected by an operator").await;
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.unwrap();
    let (client, connack) = Client::hello(Box::new(socket), &kept).await;
    assert!(!connack.present);
    client.disconnect().await;

    let old = connect(&fleet, device(&boiler, V311)).await;
    let path = path_of(&fleet, "boiler-1").await;
    change(&fleet, Method::POST, &format!("{path}/disconnect"), json!({})).await;
    old.closes("a 3.1.1 client is closed").await;

    let noted = |events: &Vec<Value>| events.iter().map(|event| event["count"].as_i64().unwrap()).sum::<i64>() == 3;
    let events = fleet.eventually(|| events(&fleet, "disconnected-by-operator"), noted).await;
    assert_eq!((&events[0]["device"], &events[0]["client_id"]), (&json!("boiler-1"), &json!("boiler-1")));
    assert_eq!(events[0]["detail"]["reason"], "disconnected by an operator");
    assert!(events[0]["detail"]["by"].as_str().unwrap().starts_with("usr_"), "{events:?}");
}

#[tokio::test]
async fn a_device_that_is_disabled_deleted_or_loses_its_credential_is_sent_away() {
    let fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let path = "/api/v1/devices/boiler-1";
    let mut bystander = connect(&fleet, device(&fleet.enrol("boiler-2").await, V5)).await;

    let client = connect(&fleet, device(&boiler, V5)).await;
    let began = Instant::now();
    change(&fleet, Method::PATCH, path, json!({ "disabled": true })).await;
    is_sent_away(client, SENT_AWAY, "the device was disabled").await;
    felt("device disabled", began);
    assert_ne!(answer_to(&fleet, &device(&boiler, V5)).await, 0, "it does not come in again");
    change(&fleet, Method::PATCH, path, json!({ "disabled": false })).await;

    let old = connect(&fleet, device(&boiler, V311)).await;
    let began = Instant::now();
    change(&fleet, Method::PATCH, path, json!({ "disabled": true })).await;
    old.closes("a 3.1.1 client is closed").await;
    felt("device disabled, 3.1.1", began);
    change(&fleet, Method::PATCH, path, json!({ "disabled": false })).await;

    // Rotated with an overlap it stays, whichever of the two it came by; without one the old one is worth nothing.
    let mut client = connect(&fleet, device(&boiler, V5)).await;
    let rotate = format!("{path}/credentials/rotate");
    let second = change(&fleet, Method::POST, &rotate, json!({ "overlap_s": 3600 })).await;
    let second = Device { password: second["password"].as_str().unwrap().to_owned(), ..boiler.clone() };
    client.is_quiet("the overlap lasts").await;
    client.disconnect().await;
    let client = connect(&fleet, device(&second, V5)).await;
    let began = Instant::now();
    let fourth = change(&fleet, Method::POST, &rotate, json!({ "overlap_s": 0 })).await;
    is_sent_away(client, SENT_AWAY, "the credential was revoked").await;
    felt("credential rotated without overlap", began);
    assert_ne!(answer_to(&fleet, &device(&second, V5)).await, 0);

    let latest = Device { password: fourth["password"].as_str().unwrap().to_owned(), ..boiler.clone() };
    let client = connect(&fleet, device(&latest, V5)).await;
    let began = Instant::now();
    delete(&fleet, &format!("{path}/credentials/{}", fourth["id"].as_str().unwrap())).await;
    is_sent_away(client, SENT_AWAY, "the credential was revoked").await;
    felt("credential revoked", began);

    let last = change(&fleet, Method::POST, &rotate, json!({})).await;
    let last = Device { password: last["password"].as_str().unwrap().to_owned(), ..boiler };
    let client = connect(&fleet, device(&last, V5).kept()).await;
    let began = Instant::now();
    delete(&fleet, path).await;
    is_sent_away(client, SENT_AWAY, "the device was deleted").await;
    felt("device deleted", began);
    bystander.is_quiet("nothing of it concerns another device").await;
    bystander.disconnect().await;
}

#[tokio::test]
async fn a_connection_ends_with_what_it_came_by() {
    let fleet = start_with(&[("MUSTER__AUTH__ACCESS_TOKEN_S", "8")]).await;
    let user = connect(&fleet, admin(&fleet, "console")).await;
    let boiler = fleet.enrol("boiler-1").await;
    let key = json!({ "name": "short", "role": "admin", "expires_in_s": 8 });
    let key = App::with_role(&fleet, "short", key).await;
    let program = connect(&fleet, key.hello("short")).await;
    let client = connect(&fleet, device(&boiler, V5)).await;
    change(&fleet, Method::POST, "/api/v1/devices/boiler-1/credentials/rotate", json!({ "overlap_s": 4 })).await;
    for client in [client, user, program] {
        is_sent_away(client, NOT_AUTHORIZED, "the credential has expired: connect with a valid one").await;
    }
}

#[tokio::test]
async fn users_and_api_keys_are_sent_away_too() {
    let fleet = start().await;
    let app = App::new(&fleet, "orders", &[], json!([allow("all", "app/{tenant}/#")])).await;
    let client = connect(&fleet, app.hello("orders").kept()).await;
    let began = Instant::now();
    delete(&fleet, &format!("/api/v1/api-keys/{}", app.key)).await;
    is_sent_away(client, SENT_AWAY, "the API key was deleted").await;
    felt("API key deleted", began);
    assert_ne!(answer_to(&fleet, &app.hello("orders")).await, 0);
    let ended = |sessions: &Value| sessions["items"] == json!([]);
    fleet.eventually(|| fleet.get("/api/v1/sessions"), ended).await;

    let new = json!({ "email": "ada@example.com", "password": "correct horse battery", "role": "admin" });
    let ada = fleet.make("/api/v1/users", new).await;
    let path = format!("/api/v1/users/{}", ada["id"].as_str().unwrap());
    let login = json!({ "email": "ada@example.com", "password": "correct horse battery" });
    let token = change(&fleet, Method::POST, "/api/v1/auth/login", login).await["access_token"].clone();
    let hello = Connect::new(V5, "ada", Some(("ada@example.com".into(), token.as_str().unwrap().to_owned())));
    // A key of hers acts in her name.
    let key = json!({ "name": "hers", "role": "admin" });
    let (_, key) = fleet.call_as(token.as_str().unwrap(), Method::POST, "/api/v1/api-keys", Some(key)).await;
    let of_key = Connect::new(V5, "hers", Some(("hers".into(), key["secret"].as_str().unwrap().to_owned())));
    let (client, program) = (connect(&fleet, hello.clone()).await, connect(&fleet, of_key.clone()).await);
    let began = Instant::now();
    change(&fleet, Method::PATCH, &path, json!({ "disabled": true })).await;
    is_sent_away(client, SENT_AWAY, "the user was disabled").await;
    is_sent_away(program, SENT_AWAY, "the user was disabled").await;
    felt("user disabled", began);
    change(&fleet, Method::PATCH, &path, json!({ "disabled": false })).await;

    let (mut client, program) = (connect(&fleet, hello.clone()).await, connect(&fleet, of_key).await);
    assert_eq!(client.subscribe("app/main/#", 1).await, 1);
    let began = Instant::now();
    change(&fleet, Method::PATCH, &path, json!({ "role": null })).await;
    // Who may no longer manage access has no API keys any more.
    is_sent_away(program, SENT_AWAY, "the credential was revoked").await;
    felt("role taken", began);
    let publish = || Publish::new("app/main/x", "x").qos(1);
    fleet.eventually(|| found(&fleet, "ada"), |shown| shown["subscriptions"] == 0).await;
    assert_eq!(client.publish(publish()).await, NOT_AUTHORIZED, "a user without a role may do nothing");
    let began = Instant::now();
    delete(&fleet, &path).await;
    is_sent_away(client, SENT_AWAY, "the user was deleted").await;
    felt("user deleted", began);
}

#[tokio::test]
async fn a_changed_role_takes_and_gives_while_clients_stay_connected() {
    let fleet = start().await;
    let whole = json!([allow("all", "app/{tenant}/a/#"), allow("all", "app/{tenant}/b/#")]);
    let app = App::new(&fleet, "orders", &[], whole.clone()).await;
    let mut writer = connect(&fleet, admin(&fleet, "writer")).await;
    for hello in [app.hello("clean"), app.hello("kept").kept()] {
        let (mut client, name) = (connect(&fleet, hello.clone()).await, hello.client_id);
        for filter in ["app/main/a/#", "app/main/b/1", "$share/group/app/main/b/2"] {
            assert_eq!(client.subscribe(filter, 1).await, 1);
        }
        let began = Instant::now();
        app.may(&fleet, json!([allow("all", "app/{tenant}/a/#")])).await;
        fleet.eventually(|| found(&fleet, &name), |shown| shown["subscriptions"] == 1).await;
        felt("topic rule taken", began);
        for topic in ["app/main/b/1", "app/main/b/2", "app/main/a/1"] {
            writer.publish(Publish::new(topic, topic).qos(1)).await;
        }
        assert_eq!(client.message().await.text(), "app/main/a/1", "what is below b is not its business any more");
        assert_eq!(client.publish(Publish::new("app/main/b/1", "x").qos(1)).await, NOT_AUTHORIZED);
        assert_eq!(client.subscribe("app/main/b/1", 1).await, NOT_AUTHORIZED);
        assert_ne!(client.publish(Publish::new("app/main/a/x", "back").qos(1)).await, NOT_AUTHORIZED);
        assert_eq!(client.message().await.text(), "back");

        app.may(&fleet, whole.clone()).await;
        let deadline = Instant::now() + PATIENCE;
        while client.subscribe("app/main/b/1", 1).await != 1 {
            assert!(Instant::now() < deadline, "what a role gives is had at once, too");
        }
        client.is_quiet("only what it may have").await;
        client.disconnect().await;
    }
}

#[tokio::test]
async fn a_deny_rule_that_is_added_thins_a_subscription_out() {
    let fleet = start().await;
    let app = App::new(&fleet, "orders", &[], json!([allow("all", "app/{tenant}/#")])).await;
    let mut writer = connect(&fleet, admin(&fleet, "writer")).await;
    let mut client = connect(&fleet, app.hello("orders")).await;
    assert_eq!(client.subscribe("app/main/#", 1).await, 1);
    let deny = json!({ "effect": "deny", "action": "subscribe", "filter": "app/{tenant}/secret/#" });
    app.may(&fleet, json!([allow("all", "app/{tenant}/#"), deny])).await;
    // The rules are in force when the broker refuses by them.
    let deadline = Instant::now() + PATIENCE;
    while client.subscribe("app/main/secret/1", 1).await != NOT_AUTHORIZED {
        assert!(Instant::now() < deadline, "the deny rule takes effect");
    }
    for topic in ["app/main/secret/1", "app/main/open"] {
        writer.publish(Publish::new(topic, topic).qos(1)).await;
    }
    assert_eq!(client.message().await.text(), "app/main/open");
}

#[tokio::test]
async fn a_client_that_is_away_does_not_find_what_it_may_no_longer_read() {
    let mut fleet = start().await;
    let whole = json!([allow("all", "app/{tenant}/a/#"), allow("all", "app/{tenant}/b/#")]);
    let app = App::new(&fleet, "orders", &[], whole).await;
    let mut writer = connect(&fleet, admin(&fleet, "writer")).await;
    for restart in [false, true] {
        let name = format!("away-{restart}");
        let kept = app.hello(&name).kept();
        let mut client = connect(&fleet, kept.clone()).await;
        for filter in ["app/main/a/#", "app/main/b/#"] {
            assert_eq!(client.subscribe(filter, 2).await, 2);
        }
        client.disconnect().await;
        for (topic, qos) in [("app/main/b/1", 1), ("app/main/a/1", 1), ("app/main/b/2", 2), ("app/main/a/2", 2)] {
            assert_eq!(writer.publish(Publish::new(topic, topic).qos(qos)).await, 0);
        }
        app.may(&fleet, json!([allow("all", "app/{tenant}/a/#")])).await;
        fleet.eventually(|| session(&fleet, &name), |own| own["subscriptions"].as_array().unwrap().len() == 1).await;
        if restart {
            fleet.kill().await;
            fleet.start_again().await;
            writer = connect(&fleet, admin(&fleet, "writer")).await;
        }
        writer.publish(Publish::new("app/main/b/3", "too late").qos(1)).await;
        writer.publish(Publish::new("app/main/a/3", "app/main/a/3").qos(1)).await;
        let mut client = connect(&fleet, kept.clone()).await;
        let got = client.messages(3).await.iter().map(Publish::text).collect::<Vec<_>>();
        assert_eq!(got, ["app/main/a/1", "app/main/a/2", "app/main/a/3"]);
        client.is_quiet("what it may not read was taken out of its queue").await;
        fleet.eventually(|| session(&fleet, &name), |own| own["queued_messages"] == 0).await;
        client.disconnect_with(0, &[Property::SessionExpiry(0)]).await;
        app.may(&fleet, json!([allow("all", "app/{tenant}/a/#"), allow("all", "app/{tenant}/b/#")])).await;
    }
}

#[tokio::test]
async fn what_is_on_its_way_to_a_client_is_judged_by_the_rights_it_has_when_it_gets_there() {
    let fleet = start().await;
    let app = App::new(&fleet, "orders", &[], json!([allow("all", "app/{tenant}/#")])).await;
    let mut writer = connect(&fleet, admin(&fleet, "writer")).await;
    for kept in [false, true] {
        // A window of one, and it is full: the others wait in the broker.
        let hello = app.hello(&format!("slow-{kept}")).with(Property::ReceiveMaximum(1));
        let hello = if kept { hello.kept() } else { hello };
        let mut client = connect(&fleet, hello).await;
        assert_eq!(client.subscribe("app/main/#", 1).await, 1);
        for topic in ["app/main/a/1", "app/main/b/1", "app/main/a/2"] {
            assert_eq!(writer.publish(Publish::new(topic, topic).qos(1)).await, 0);
        }
        let first = client.arrival().await;
        assert_eq!(first.text(), "app/main/a/1");
        app.may(&fleet, json!([allow("all", "app/{tenant}/a/#")])).await;
        let name = format!("slow-{kept}");
        fleet.eventually(|| found(&fleet, &name), |shown| shown["subscriptions"] == 0).await;
        client.send_ack(PUBACK, first.id).await;
        assert_eq!(client.message().await.text(), "app/main/a/2");
        client.is_quiet("and nothing else").await;
        client.disconnect_with(0, &[Property::SessionExpiry(0)]).await;
        app.may(&fleet, json!([allow("all", "app/{tenant}/#")])).await;
    }
}

#[tokio::test]
async fn a_change_is_seen_without_a_notification() {
    let fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let client = connect(&fleet, device(&boiler, V5)).await;
    let mut tx = fleet.db().begin().await.unwrap();
    sqlx::query("update device set disabled = true").execute(&mut *tx).await.unwrap();
    sqlx::query("update policy_epoch set epoch = epoch + 1").execute(&mut *tx).await.unwrap();
    let began = Instant::now();
    tx.commit().await.unwrap();
    is_sent_away(client, SENT_AWAY, "the device was disabled").await;
    felt("device disabled, without NOTIFY", began);
}

#[tokio::test]
async fn a_device_that_comes_in_while_it_is_disabled_does_not_stay() {
    let fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let path = "/api/v1/devices/boiler-1";
    for _ in 0..10 {
        let hello = device(&boiler, V5);
        let coming = async {
            let socket = TcpStream::connect(fleet.mqtt_addr()).await.unwrap();
            Client::hello(Box::new(socket), &hello).await
        };
        let ((client, connack), _) =
            tokio::join!(coming, change(&fleet, Method::PATCH, path, json!({ "disabled": true })));
        if connack.code == 0 {
            client.closes("it was let in a moment too early").await;
        }
        change(&fleet, Method::PATCH, path, json!({ "disabled": false })).await;
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_session_is_ended_whether_its_client_is_there_or_away() {
    let fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let kept = device(&boiler, V5).kept();
    let viewer = App::new(&fleet, "viewer-of-mine", &["connections:read"], json!([])).await.secret;
    let other = neighbour(&fleet).await;
    for away in [true, false] {
        let mut client = connect(&fleet, kept.clone()).await;
        client.subscribe(&boiler.topic("#"), 1).await;
        let path = format!("/api/v1/sessions/{}", session(&fleet, "boiler-1").await["id"].as_str().expect("an id"));
        let client = if away {
            client.disconnect().await;
            None
        } else {
            Some(client)
        };
        refused(&fleet, &viewer, Method::DELETE, &path, (403, "forbidden")).await;
        refused(&fleet, &other, Method::DELETE, &path, (404, "no-such-session")).await;
        delete(&fleet, &path).await;
        if let Some(client) = client {
            is_sent_away(client, SENT_AWAY, "the session was ended by an operator").await;
        }
        fleet.eventually(|| fleet.get("/api/v1/sessions"), |sessions| sessions["items"] == json!([])).await;
        refused(&fleet, fleet.token(), Method::DELETE, &path, (404, "no-such-session")).await;
        let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
        let (client, connack) = Client::hello(Box::new(socket), &kept).await;
        assert!(!connack.present, "nothing of it is left");
        client.disconnect_with(0, &[Property::SessionExpiry(0)]).await;
        fleet.eventually(|| fleet.get("/api/v1/sessions"), |sessions| sessions["items"] == json!([])).await;
    }
}

#[tokio::test]
async fn messages_that_find_a_queue_full_are_told() {
    let settings = [("MUSTER__SESSIONS__QUEUE_MESSAGES", "2"), ("MUSTER__MQTT__OUTBOX_MESSAGES", "2")];
    let fleet = start_with(&settings).await;
    let mut away = connect(&fleet, admin(&fleet, "away").kept()).await;
    away.subscribe("app/main/#", 1).await;
    away.disconnect().await;
    let mut writer = connect(&fleet, admin(&fleet, "writer")).await;
    for text in ["1", "2", "3", "4"] {
        writer.publish(Publish::new("app/main/x", text).qos(1)).await;
    }
    let of =
        |client_id: &'static str| move |events: &Vec<Value>| events.iter().any(|event| event["client_id"] == client_id);
    let told = fleet.eventually(|| events(&fleet, "queue-overflow"), of("away")).await;
    let detail = &told[0]["detail"];
    assert_eq!((&detail["queued_messages"], &told[0]["device"]), (&json!(2), &Value::Null), "{told:?}");
    assert!(detail["dropped"].as_i64() > Some(0), "{detail}");

    // A session that ends with its connection cannot wait: the client that does not keep up is sent away.
    let hello = admin(&fleet, "slow").with(Property::ReceiveMaximum(1));
    let mut slow = connect(&fleet, hello).await;
    slow.subscribe("app/main/#", 1).await;
    for n in 0..10 {
        writer.publish(Publish::new("app/main/x", n.to_string()).qos(1)).await;
    }
    slow.ends_with(0x97, "too many messages wait").await;
    let told = fleet.eventually(|| events(&fleet, "queue-overflow"), of("slow")).await;
    let slow = told.iter().find(|event| event["client_id"] == "slow").expect("it was waited for");
    assert_eq!(slow["detail"]["disconnected"], true, "{slow}");

    let other = neighbour(&fleet).await;
    let (_, foreign) = fleet.call_as(&other, Method::GET, &format!("{CONNECTIONS}/events"), None).await;
    assert_eq!(foreign["items"], json!([]), "another tenant's events are not there");
}

/// The lines of a trace, as text.
fn lines(trace: &Value) -> Vec<String> {
    let items = trace["items"].as_array().expect("items");
    let text = |item: &Value, field: &str| item[field].as_str().expect("a text").to_owned();
    let line = |item: &Value| format!("{} {}", text(item, "direction"), text(item, "text"));
    items.iter().map(line).collect()
}

#[tokio::test]
async fn a_trace_shows_packets_across_connections_and_no_secret() {
    let fleet = start_with(&[("MUSTER__MQTT__MAX_TRACES", "1")]).await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut client = connect(&fleet, device(&boiler, V5)).await;
    let other = connect(&fleet, admin(&fleet, "grafana")).await;
    let trace = format!("{}/trace", path_of(&fleet, "boiler-1").await);
    let (status, _) = fleet.call(Method::POST, &trace, Some(json!({ "minutes": 61 }))).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    refused(&fleet, fleet.token(), Method::GET, &trace, (404, "no-such-trace")).await;
    change(&fleet, Method::POST, &trace, json!({ "minutes": 5 })).await;
    assert_eq!(found(&fleet, "boiler-1").await["traced"], true);
    let foreign = format!("{}/trace", path_of(&fleet, "grafana").await);
    refused(&fleet, fleet.token(), Method::POST, &foreign, (409, "too-many-traces")).await;

    let payload = json!({ "temp": 21.5, "password": "hunter2" }).to_string();
    client.publish(Publish::new(boiler.topic("note"), payload).qos(1)).await;
    client.disconnect().await;
    let mut client = connect(&fleet, device(&boiler, V5)).await;
    client.is_quiet("it is traced, and does not feel it").await;
    // Under the connection that it was asked for, though that has ended.
    let seen = fleet.eventually(|| fleet.get(&trace), |trace| lines(trace).iter().any(|line| line == "out PINGRESP"));
    let seen = seen.await;
    let all = lines(&seen);
    for beginning in [
        "in PUBLISH",
        "out PUBACK",
        "in DISCONNECT",
        "note connection ended",
        "note connection from 127.0.0.1",
        "in CONNECT",
        "out CONNACK",
        "in PINGREQ",
    ] {
        assert!(all.iter().any(|line| line.starts_with(beginning)), "{beginning}: {all:#?}");
    }
    let text = all.join("\n");
    assert!(text.contains("note\"") && text.contains("temp") && text.contains("password=***"), "{text}");
    assert!(!text.contains("hunter2") && !text.contains(&boiler.password), "{text}");
    let from = seen["items"][2]["seq"].as_i64().expect("a number");
    let page = fleet.get(&format!("{trace}?after={from}&limit=2")).await;
    assert_eq!(lines(&page), all[3..5]);

    let now = format!("{}/trace", path_of(&fleet, "boiler-1").await);
    assert_ne!(now, trace, "the client has come again");
    delete(&fleet, &now).await;
    refused(&fleet, fleet.token(), Method::GET, &trace, (404, "no-such-trace")).await;
    assert_eq!(found(&fleet, "boiler-1").await["traced"], false);
    change(&fleet, Method::POST, &foreign, json!({})).await;
    let started = |events: &Vec<Value>| events.len() == 2;
    let started = fleet.eventually(|| events(&fleet, "trace-started"), started).await;
    assert_eq!((&started[1]["device"], &started[1]["detail"]["minutes"]), (&json!("boiler-1"), &json!(5)));
    assert!(fleet.metric("muster_mqtt_limit_hits_total", "limit=\"traces\"").await >= 1.0);
    client.disconnect().await;
    other.disconnect().await;
}

#[tokio::test]
async fn the_broker_tells_of_itself_to_who_may_read_it() {
    let fleet = start_with(&[("MUSTER__MQTT__SYS_INTERVAL_S", "1")]).await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut client = connect(&fleet, device(&boiler, V5)).await;
    assert_eq!(client.subscribe("$SYS/#", 0).await, NOT_AUTHORIZED);
    let mut reader = connect(&fleet, admin(&fleet, "reader")).await;
    assert_eq!(reader.subscribe("$SYS/#", 0).await, 0);
    assert_eq!(reader.subscribe("app/main/#", 0).await, 0);
    let mut told = std::collections::BTreeMap::new();
    let deadline = Instant::now() + PATIENCE;
    // What is retained may be older than the two.
    while told.get("$SYS/broker/clients/connected").map(String::as_str) != Some("2") {
        assert!(Instant::now() < deadline, "{told:?}");
        let message = reader.message().await;
        told.insert(message.topic.clone(), message.text());
    }
    for _ in 0..40 {
        let message = reader.message().await;
        told.insert(message.topic.clone(), message.text());
    }
    assert!(told["$SYS/broker/version"].starts_with("muster "), "{told:?}");
    assert!(told["$SYS/broker/uptime"].ends_with(" seconds"), "{told:?}");
    for name in [
        "clients/total",
        "clients/disconnected",
        "sessions/persistent",
        "messages/received",
        "messages/sent",
        "messages/stored",
        "publish/messages/received",
        "publish/messages/sent",
        "publish/messages/dropped",
        "store/messages/count",
        "store/messages/bytes",
        "retained messages/count",
        "subscriptions/count",
        "bytes/received",
        "bytes/sent",
    ] {
        let value = &told[&format!("$SYS/broker/{name}")];
        assert!(value.parse::<u64>().is_ok(), "{name}: {value}");
    }
    assert_eq!(told["$SYS/broker/subscriptions/count"], "2");

    // Nobody speaks in its name, whatever the rules say.
    let rules = json!([allow("all", "$SYS/#")]);
    fleet.make("/api/v1/roles", json!({ "id": "sys", "platform": true, "topic_rules": rules })).await;
    let app = App::with_role(&fleet, "sys", json!({ "name": "sys", "role": "sys" })).await;
    let mut liar = connect(&fleet, app.hello("liar")).await;
    assert_eq!(liar.publish(Publish::new("$SYS/broker/version", "x").qos(1)).await, NOT_AUTHORIZED);
    let will = Will { topic: "$SYS/broker/version".into(), ..Will::default() };
    assert_eq!(answer_to(&fleet, &app.hello("heir").will(will)).await, NOT_AUTHORIZED);

    let quiet = start_with(&[("MUSTER__MQTT__SYS_INTERVAL_S", "0")]).await;
    let mut reader = connect(&quiet, admin(&quiet, "reader")).await;
    assert_eq!(reader.subscribe("$SYS/#", 0).await, 0);
    reader.is_quiet("it is off").await;
}

/// A second process on the same database: the HTTP door alone.
async fn http_door(fleet: &Fleet) -> (Child, String) {
    let mut child = muster()
        .args(["serve", "--roles", "api"])
        .env("MUSTER__DATA_DIR", fleet.data_dir().join("http-door"))
        .env("MUSTER__DATABASE__URL", fleet.database_url())
        .env("MUSTER__HTTP__LISTEN", "127.0.0.1:0")
        .env("MUSTER__HTTP__BROKER_ANSWER_MS", "15000")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the binary is built");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    loop {
        let line = lines.next_line().await.expect("text").expect("the server becomes ready");
        if let Some(url) = line.strip_prefix("ready: ") {
            return (child, url.to_owned());
        }
    }
}

/// Asks the other process as the admin.
async fn ask(fleet: &Fleet, method: Method, url: &str, body: Option<Value>) -> (StatusCode, Value) {
    let request = reqwest::Client::new().request(method, url).bearer_auth(fleet.token());
    let request = if let Some(body) = body { request.json(&body) } else { request };
    let answer = request.send().await.expect("the server answers");
    (answer.status(), answer.json().await.unwrap_or_default())
}

#[tokio::test]
async fn the_doors_may_be_two_processes_and_that_no_broker_runs_is_said() {
    let mut fleet = start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let (mut child, url) = http_door(&fleet).await;
    let list = format!("{url}{CONNECTIONS}");
    let client = connect(&fleet, device(&boiler, V5)).await;
    let (status, seen) = ask(&fleet, Method::GET, &list, None).await;
    assert_eq!((status, &seen["items"][0]["client_id"]), (StatusCode::OK, &json!("boiler-1")), "{seen}");
    let path = format!("{url}/api/v1/devices/boiler-1");
    let began = Instant::now();
    let (status, answer) = ask(&fleet, Method::PATCH, &path, Some(json!({ "disabled": true }))).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    is_sent_away(client, SENT_AWAY, "the device was disabled").await;
    felt("device disabled through another process", began);

    fleet.stop().await;
    let (status, problem) = ask(&fleet, Method::GET, &list, None).await;
    assert_eq!((status, &problem["type"]), (StatusCode::SERVICE_UNAVAILABLE, &json!("urn:muster:problem:no-broker")));
    assert!(problem["detail"].as_str().expect("a text").contains("no broker is running"), "{problem}");
    let (status, events) = ask(&fleet, Method::GET, &format!("{list}/events"), None).await;
    assert_eq!((status, &events["items"]), (StatusCode::OK, &json!([])), "what was kept can be read all the same");
    child.kill().await.expect("it runs");
}
