//! Who is bound to some devices sees and reaches those devices and no others, on topics too, and a change of that holds at once.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use rumqttc::v5::mqttbytes::v5::{PubAckReason, SubscribeReasonCode};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::Instant;

use crate::harness::client::Client;
use crate::harness::packet::Connect;
use crate::harness::raw::Version::V5;
use crate::harness::{Device, Fleet, Mqtt, PATIENCE, muster};

fn group(path: &str) -> Value {
    json!({ "kind": "group", "group": path })
}

async fn enrol(fleet: &Fleet, id: &str, group: &str) -> Device {
    let made = fleet.make("/api/v1/devices", json!({ "id": id, "group": group })).await;
    let text = |field: &str| made["credential"][field].as_str().expect("a credential").to_owned();
    Device { id: id.to_owned(), username: text("username"), password: text("password") }
}

/// A user with roles in scopes only, and an access token.
async fn bound(fleet: &Fleet, email: &str, bindings: &[(&str, Value)]) -> (String, String, Vec<String>) {
    let user = fleet.make("/api/v1/users", json!({ "email": email, "password": "correct horse battery" })).await;
    let id = user["id"].as_str().expect("an id").to_owned();
    let mut made = Vec::new();
    for (role, scope) in bindings {
        let binding = fleet.make("/api/v1/bindings", json!({ "user": id, "role": role, "scope": scope })).await;
        made.push(binding["id"].as_str().expect("an id").to_owned());
    }
    let login = json!({ "email": email, "password": "correct horse battery" });
    let (status, answer) = fleet.call(Method::POST, "/api/v1/auth/login", Some(login)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    (id, answer["access_token"].as_str().expect("a token").to_owned(), made)
}

async fn change(fleet: &Fleet, device: &str, patch: Value) {
    let (status, answer) = fleet.call(Method::PATCH, &format!("/api/v1/devices/{device}"), Some(patch)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
}

async fn say(client: &mut Mqtt, device: &Device, text: &str) {
    let payload = format!("{{\"said\":\"{text}\"}}");
    assert_eq!(client.publish(&device.topic("telemetry"), payload).await, PubAckReason::Success);
}

/// The next message is this one, so nothing came before it that should not.
async fn hears(client: &mut Mqtt, device: &Device, text: &str) {
    let (topic, payload) = client.message().await;
    assert_eq!((topic, payload), (device.topic("telemetry"), format!("{{\"said\":\"{text}\"}}")));
}

/// Says `text` again and again until it is heard; how long that took.
async fn until_heard(from: &mut Mqtt, device: &Device, by: &mut Mqtt, text: &str) {
    let began = Instant::now();
    loop {
        say(from, device, text).await;
        if by.message_within(Duration::from_millis(100)).await.is_some() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "{text} was never heard");
    }
    println!("{text}: {} ms from change to effect", began.elapsed().as_millis());
    // What was said more than once is heard more than once.
    while by.message_within(Duration::from_millis(300)).await.is_some() {}
}

#[tokio::test]
async fn a_scoped_user_is_given_the_messages_of_devices_in_scope_only() {
    let fleet = Fleet::start().await;
    let (near, far) = (enrol(&fleet, "near", "site/a").await, enrol(&fleet, "far", "site/b").await);
    let (mut from_near, mut from_far) = (fleet.connect(&near).await, fleet.connect(&far).await);
    let (_, token, _) = bound(&fleet, "ada@example.com", &[("viewer", group("site/a"))]).await;
    let mut ada =
        Mqtt::connect(fleet.mqtt_addr(), "ada", "ada@example.com", &token).await.expect("a token opens the door");
    let granted = |code| matches!(code, SubscribeReasonCode::Success(_));
    assert!(granted(ada.subscribe("fleet/v1/main/+/telemetry").await));
    for refused in [
        "fleet/v1/main/far/telemetry",
        "fleet/v1/main/nobody/telemetry",
        "fleet/v1/main/#",
        "fleet/v1/+/near/telemetry",
        "#",
    ] {
        assert_eq!(ada.subscribe(refused).await, SubscribeReasonCode::NotAuthorized, "{refused}");
    }
    say(&mut from_far, &far, "1").await;
    say(&mut from_near, &near, "2").await;
    hears(&mut ada, &near, "2").await;

    // One that is enrolled meanwhile, below the group.
    let new = enrol(&fleet, "new", "site/a/cell-1").await;
    let mut from_new = fleet.connect(&new).await;
    say(&mut from_new, &new, "3").await;
    hears(&mut ada, &new, "3").await;

    // One that moves in, and one that moves out.
    change(&fleet, "far", json!({ "group": "site/a" })).await;
    until_heard(&mut from_far, &far, &mut ada, "moved in").await;
    change(&fleet, "near", json!({ "group": "site/b" })).await;
    let began = Instant::now();
    loop {
        say(&mut from_near, &near, "moving out").await;
        if ada.message_within(Duration::from_millis(150)).await.is_none() {
            break;
        }
        assert!(began.elapsed() < PATIENCE, "it is heard for ever");
    }
    println!("moved out: {} ms from change to effect", began.elapsed().as_millis());
    say(&mut from_near, &near, "4").await;
    say(&mut from_new, &new, "5").await;
    hears(&mut ada, &new, "5").await;

    // She may read the same devices, and none besides, on the REST API.
    let (status, listed) = fleet.call_as(&token, Method::GET, "/api/v1/devices", None).await;
    let ids = listed["items"].as_array().expect("items").iter().map(|item| &item["id"]).collect::<Vec<_>>();
    assert_eq!((status, ids), (StatusCode::OK, vec![&json!("far"), &json!("new")]));
}

#[tokio::test]
async fn a_group_that_moves_takes_open_subscriptions_along() {
    let fleet = Fleet::start().await;
    let (near, far) = (enrol(&fleet, "near", "site/a/cell-1").await, enrol(&fleet, "far", "site/b").await);
    let (mut from_near, mut from_far) = (fleet.connect(&near).await, fleet.connect(&far).await);
    let connect = async |name: &str, scope: &str| {
        let email = format!("{name}@example.com");
        let (_, token, _) = bound(&fleet, &email, &[("viewer", group(scope))]).await;
        let mut user = Mqtt::connect(fleet.mqtt_addr(), name, &email, &token).await.expect("a token opens the door");
        assert!(matches!(user.subscribe("fleet/v1/main/+/telemetry").await, SubscribeReasonCode::Success(_)));
        user
    };
    let (mut ada, mut bob) = (connect("ada", "site/a").await, connect("bob", "plant").await);
    say(&mut from_far, &far, "1").await;
    say(&mut from_near, &near, "2").await;
    hears(&mut ada, &near, "2").await;
    let body = Some(json!({ "path": "plant/a" }));
    let (status, answer) = fleet.call(Method::PATCH, "/api/v1/groups/site%2Fa", body).await;
    assert_eq!((status, &answer["moved"]["bindings"]), (StatusCode::OK, &json!(1)), "{answer}");
    until_heard(&mut from_near, &near, &mut bob, "moved to plant").await;
    // Whose group it is goes on hearing it, under its new name, and still nothing else.
    while ada.message_within(Duration::from_millis(300)).await.is_some() {}
    change(&fleet, "far", json!({ "group": "site/a" })).await;
    tokio::time::timeout(PATIENCE, async {
        say(&mut from_far, &far, "the old name is nobody's").await;
        say(&mut from_near, &near, "3").await;
        hears(&mut ada, &near, "3").await;
        hears(&mut bob, &near, "3").await;
    })
    .await
    .expect("they hear");
}

#[tokio::test]
async fn commands_are_sent_to_devices_in_scope_only() {
    let fleet = Fleet::start().await;
    let (near, far) = (enrol(&fleet, "near", "site/a").await, enrol(&fleet, "far", "site/b").await);
    let mut from_near = fleet.connect(&near).await;
    assert!(matches!(from_near.subscribe(&near.topic("commands/+/request")).await, SubscribeReasonCode::Success(_)));
    let key = json!({ "name": "k", "role": "operator", "scope": { "kind": "selector", "selector": "group:site/a" } });
    let key = fleet.make("/api/v1/api-keys", key).await;
    let secret = key["secret"].as_str().expect("a secret");
    let mut app = Mqtt::connect(fleet.mqtt_addr(), "app", "app", secret).await.expect("a key opens the door");
    assert_eq!(app.publish(&near.topic("commands/1/request"), "{}").await, PubAckReason::Success);
    assert_eq!(from_near.message().await.0, near.topic("commands/1/request"));
    for refused in [far.topic("commands/1/request"), near.topic("telemetry"), near.topic("commands/1/response")] {
        assert_eq!(app.publish(&refused, "{}").await, PubAckReason::NotAuthorized, "{refused}");
    }
    // The decision was about this device at this moment, not for ever.
    change(&fleet, "near", json!({ "group": "site/b" })).await;
    let began = Instant::now();
    while app.publish(&near.topic("commands/1/request"), "{}").await != PubAckReason::NotAuthorized {
        assert!(began.elapsed() < PATIENCE, "it may be commanded for ever");
    }
    println!("no longer in scope: {} ms from change to effect", began.elapsed().as_millis());
}

#[tokio::test]
async fn a_binding_that_ends_ends_the_subscription_and_one_that_comes_widens_it() {
    let fleet = Fleet::start().await;
    let far = enrol(&fleet, "far", "site/b").await;
    let mut from_far = fleet.connect(&far).await;
    let (user, token, made) = bound(&fleet, "ada@example.com", &[("viewer", group("site/a"))]).await;
    let mut ada =
        Mqtt::connect(fleet.mqtt_addr(), "ada", "ada@example.com", &token).await.expect("a token opens the door");
    assert!(matches!(ada.subscribe("fleet/v1/main/+/telemetry").await, SubscribeReasonCode::Success(_)));
    say(&mut from_far, &far, "unheard").await;
    let wider =
        fleet.make("/api/v1/bindings", json!({ "user": user, "role": "viewer", "scope": group("site/b") })).await;
    until_heard(&mut from_far, &far, &mut ada, "bound").await;
    for id in [&made[0], wider["id"].as_str().expect("an id")] {
        let (status, _) = fleet.call(Method::DELETE, &format!("/api/v1/bindings/{id}"), None).await;
        assert_eq!(status, StatusCode::NO_CONTENT);
    }
    let began = Instant::now();
    while ada.subscribe("fleet/v1/main/+/status").await != SubscribeReasonCode::NotAuthorized {
        assert!(began.elapsed() < PATIENCE, "the binding holds for ever");
    }
    println!("unbound: {} ms from change to effect", began.elapsed().as_millis());
    say(&mut from_far, &far, "after").await;
    assert_eq!(ada.message_within(Duration::from_millis(500)).await, None);
}

/// What `muster access` prints, and how it exits.
async fn muster_access(fleet: &Fleet, args: &[&str]) -> (bool, String) {
    let mut command = muster();
    command.args(["access"]).args(args).args(["--url", fleet.url()]).env("MUSTER_TOKEN", fleet.token());
    let done = command.output().await.expect("the binary runs");
    let said = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8_lossy(&said).trim().to_owned())
}

#[tokio::test]
async fn the_command_line_asks_the_same_questions() {
    let fleet = Fleet::start().await;
    enrol(&fleet, "near", "site/a").await;
    let (user, _, _) = bound(&fleet, "ada@example.com", &[("viewer", group("site/a"))]).await;
    let (yes, said) = muster_access(&fleet, &["check", "ada@example.com", "telemetry:read", "near"]).await;
    assert!(yes && said.starts_with("allow: ") && said.contains("role viewer by bnd_"), "{said}");
    let (yes, said) = muster_access(&fleet, &["check", "near", "publish", "fleet/v1/main/far/telemetry"]).await;
    assert!(!yes && said.starts_with("deny: "), "{said}");
    let (yes, said) = muster_access(&fleet, &["check", "ada@example.com", "devices:eat"]).await;
    assert!(!yes && said.contains("expected publish"), "{said}");
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("change.json");
    let change = json!({ "user": { "id": user, "role": "operator" } });
    std::fs::write(&file, change.to_string()).expect("the file can be written");
    let (_, said) = muster_access(&fleet, &["diff", file.to_str().expect("a path")]).await;
    assert!(said.contains("+ commands:send for 1 devices: near") && said.contains("+ POST /api/v1/devices"), "{said}");
}

#[tokio::test]
async fn connections_out_of_scope_are_not_seen_traced_or_ended() {
    let fleet = Fleet::start_with(&[("MUSTER__HTTP__BROKER_ANSWER_MS", "15000")]).await;
    let (near, far) = (enrol(&fleet, "near", "site/a").await, enrol(&fleet, "far", "site/b").await);
    let (_from_near, _from_far) = (fleet.connect(&near).await, fleet.connect(&far).await);
    let key = json!({ "name": "k", "role": "support", "scope": group("site/a") });
    let secret = fleet.make("/api/v1/api-keys", key).await["secret"].as_str().expect("a secret").to_owned();
    let _app = Mqtt::connect(fleet.mqtt_addr(), "app", "app", &secret).await.expect("a key opens the door");
    let ask = |method, path: String| {
        let (fleet, secret) = (&fleet, &secret);
        async move { fleet.call_as(secret, method, &path, None).await }
    };
    let (_, listed) = ask(Method::GET, "/api/v1/connections".into()).await;
    let devices = listed["items"].as_array().expect("items").iter().map(|item| &item["device"]).collect::<Vec<_>>();
    assert_eq!(devices, [&json!("near")], "{listed}");
    let all = fleet.get("/api/v1/connections?device=far").await;
    let hidden = format!("/api/v1/connections/{}", all["items"][0]["id"].as_str().expect("an id"));
    for (method, path) in [
        (Method::GET, hidden.clone()),
        (Method::POST, format!("{hidden}/disconnect")),
        (Method::POST, format!("{hidden}/trace")),
        (Method::GET, format!("{hidden}/trace")),
        (Method::DELETE, format!("{hidden}/trace")),
    ] {
        let (status, answer) = ask(method, path.clone()).await;
        assert_eq!(
            (status, &answer["type"]),
            (StatusCode::NOT_FOUND, &json!("urn:muster:problem:no-such-connection")),
            "{path}"
        );
    }
    let (_, sessions) = ask(Method::GET, "/api/v1/sessions".into()).await;
    assert_eq!(sessions["items"], json!([]));
    let shown = format!("/api/v1/connections/{}/disconnect", listed["items"][0]["id"].as_str().expect("an id"));
    assert_eq!(ask(Method::POST, shown).await.0, StatusCode::NO_CONTENT);
}

#[tokio::test]
async fn what_waits_for_a_scoped_session_is_in_scope_after_a_restart_too() {
    let mut fleet = Fleet::start().await;
    let (near, far) = (enrol(&fleet, "near", "site/a").await, enrol(&fleet, "far", "site/b").await);
    let key = json!({ "name": "k", "role": "viewer", "scope": group("site/a") });
    let secret = fleet.make("/api/v1/api-keys", key).await["secret"].as_str().expect("a secret").to_owned();
    let hello = || Connect::new(V5, "board", Some(("k".to_owned(), secret.clone()))).kept();
    let mut board = connect(&fleet, &hello()).await;
    assert_eq!(board.subscribe("fleet/v1/main/+/telemetry", 1).await, 1);
    board.disconnect().await;
    fleet.kill().await;
    fleet.start_again().await;
    for device in [&far, &near] {
        let mut from = fleet.connect(device).await;
        say(&mut from, device, "while away").await;
    }
    let mut board = connect(&fleet, &hello()).await;
    assert_eq!(board.message().await.topic, near.topic("telemetry"));
    board.is_quiet("nothing else waited").await;
}

async fn connect(fleet: &Fleet, hello: &Connect) -> Client {
    let socket = TcpStream::connect(fleet.mqtt_addr()).await.expect("the server listens");
    let (client, connack) = Client::hello(Box::new(socket), hello).await;
    assert_eq!(connack.code, 0, "{connack:?}");
    client
}
