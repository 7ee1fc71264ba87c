//! Two tenants on one server, with devices of the same name: neither reaches the other, over REST or MQTT.

use fleet_core::policy::{Permission, Role};
use reqwest::{Method, StatusCode};
use rumqttc::v5::mqttbytes::v5::{PubAckReason, SubscribeReasonCode};
use serde_json::json;

use crate::harness::{Device, Fleet, Mqtt};

const ADMIN: (&str, &str) = ("wile@example.com", "a password of wile e. coyote");

/// The admin of another tenant: an access token.
async fn acme(fleet: &Fleet) -> String {
    let (email, password) = ADMIN;
    fleet.make("/api/v1/tenants", json!({ "id": "acme", "admin": { "email": email, "password": password } })).await;
    let login = json!({ "email": email, "password": password });
    let (status, answer) = fleet.call(Method::POST, "/api/v1/auth/login", Some(login)).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    answer["access_token"].as_str().expect("a token").to_owned()
}

#[tokio::test]
async fn two_tenants_have_devices_of_one_name_and_do_not_meet() {
    let fleet = Fleet::start().await;
    let token = acme(&fleet).await;
    let main = fleet.enrol("boiler-1").await;
    let (status, made) =
        fleet.call_as(&token, Method::POST, "/api/v1/devices", Some(json!({ "id": "boiler-1" }))).await;
    assert_eq!(status, StatusCode::CREATED, "{made}");
    let text = |field: &str| made["credential"][field].as_str().expect("a credential").to_owned();
    let other = Device { id: "boiler-1".into(), username: text("username"), password: text("password") };

    // A password is its own tenant's.
    let confused = Device { password: main.password.clone(), ..other.clone() };
    assert!(Mqtt::connect(fleet.mqtt_addr(), "x", &confused.username, &confused.password).await.is_err());
    let (mut main_device, mut other_device) = (fleet.connect(&main).await, fleet.connect(&other).await);
    let mut wile = Mqtt::connect(fleet.mqtt_addr(), "wile", ADMIN.0, &token).await.expect("a token opens the door");
    let mut admin = fleet.connect_admin("admin").await;

    for filter in
        ["#", "fleet/#", "fleet/v1/+/boiler-1/telemetry", "fleet/v1/main/#", "app/main/#", "$share/g/fleet/v1/main/#"]
    {
        assert_eq!(wile.subscribe(filter).await, SubscribeReasonCode::NotAuthorized, "{filter}");
        assert_eq!(other_device.subscribe(filter).await, SubscribeReasonCode::NotAuthorized, "{filter}");
    }
    assert_eq!(wile.publish(&main.topic("commands/1/request"), "{}").await, PubAckReason::NotAuthorized);
    assert!(matches!(wile.subscribe("fleet/v1/acme/+/telemetry").await, SubscribeReasonCode::Success(_)));
    assert!(matches!(admin.subscribe("fleet/v1/main/+/telemetry").await, SubscribeReasonCode::Success(_)));
    assert_eq!(main_device.publish(&main.topic("telemetry"), r#"{"temp":1}"#).await, PubAckReason::Success);
    assert_eq!(other_device.publish(&other.topic("telemetry"), r#"{"temp":2}"#).await, PubAckReason::Success);
    assert_eq!(wile.message().await, (other.topic("telemetry"), r#"{"temp":2}"#.to_owned()));
    assert_eq!(admin.message().await, (main.topic("telemetry"), r#"{"temp":1}"#.to_owned()));

    // Each sees its own readings under the same path.
    let path = "/api/v1/devices/boiler-1/telemetry?metric=temp";
    for (token, expected) in [(fleet.token(), 1), (token.as_str(), 2)] {
        let (status, series) = fleet.call_as(token, Method::GET, path, None).await;
        assert_eq!((status, &series["items"][0]["value"]), (StatusCode::OK, &json!(expected)), "{series}");
        assert_eq!(series["items"].as_array().expect("a page").len(), 1);
    }
    // What one does leaves the other's connection alone.
    let (status, _) = fleet.call_as(&token, Method::DELETE, "/api/v1/devices/boiler-1", None).await;
    assert_eq!(status, StatusCode::NO_CONTENT);
    other_device.closed().await;
    assert_eq!(main_device.publish(&main.topic("telemetry"), r#"{"temp":3}"#).await, PubAckReason::Success);
}

/// A topic of each kind that some role or permission speaks of, as the tenant `main` has it.
fn topics_of_main() -> Vec<String> {
    let rules = Role::BUILT_IN.into_iter().chain([Role::Device]).flat_map(|role| role.written_rules());
    let rules = rules.chain(Permission::ALL.iter().flat_map(|permission| permission.topic_rules()));
    let filters = rules.map(|rule| rule.filter).filter(|filter| filter.contains("{tenant}"));
    let filters = filters.chain(
        ["shadow/update/delta", "certificates/renew/accepted"]
            .map(|rest| format!("fleet/v1/{{tenant}}/{{device}}/{rest}")),
    );
    let topics = filters.chain(["fleet/v1/{tenant}/_provision/request".to_owned()]).map(|filter| {
        let filter = filter.replace("{tenant}", "main").replace("{device}", "boiler-1");
        filter.replace("fleet/v1/main/+", "fleet/v1/main/boiler-1").replace('+', "1").replace('#', "x")
    });
    let mut topics = topics.collect::<Vec<_>>();
    topics.sort();
    topics.dedup();
    topics
}

/// Filters that would give messages of a topic, wildcards and shares included.
fn filters_of(topic: &str) -> Vec<String> {
    let levels = topic.split('/').collect::<Vec<_>>();
    let with_plus = (0..levels.len()).map(|at| {
        let wild = levels.iter().enumerate().map(|(place, level)| if place == at { "+" } else { level });
        wild.collect::<Vec<_>>().join("/")
    });
    let cut = (0..levels.len()).map(|at| [&levels[..at], &["#"]].concat().join("/"));
    let plain = with_plus.chain(cut).chain([topic.to_owned()]).collect::<Vec<_>>();
    plain.iter().map(|filter| format!("$share/g/{filter}")).chain(plain.iter().cloned()).collect()
}

#[tokio::test]
async fn no_topic_leads_from_one_tenant_into_another() {
    let fleet = Fleet::start().await;
    let token = acme(&fleet).await;
    let main = fleet.enrol("boiler-1").await;
    let make = async |path, body| {
        let (status, made) = fleet.call_as(&token, Method::POST, path, Some(body)).await;
        assert_eq!(status, StatusCode::CREATED, "{made}");
        made
    };
    let device = make("/api/v1/devices", json!({ "id": "boiler-1" })).await;
    let password = device["credential"]["password"].as_str().expect("a password");
    let key = make("/api/v1/api-keys", json!({ "name": "k", "role": "admin" })).await;
    let secret = key["secret"].as_str().expect("a secret");
    let credentials =
        [("boiler-1", "acme/boiler-1", password), ("wile", ADMIN.0, token.as_str()), ("key", "key", secret)];

    let mut listener = fleet.connect_admin("listener").await;
    for filter in ["fleet/v1/main/#", "app/main/#"] {
        assert!(matches!(listener.subscribe(filter).await, SubscribeReasonCode::Success(_)), "{filter}");
    }
    let topics = topics_of_main();
    assert!(topics.len() > 12, "{topics:?}");
    let mut intruders = Vec::new();
    for (client_id, username, password) in credentials {
        let mut intruder =
            Mqtt::connect(fleet.mqtt_addr(), client_id, username, password).await.expect("it may connect");
        for topic in &topics {
            assert_eq!(intruder.publish(topic, "{}").await, PubAckReason::NotAuthorized, "{username} to {topic}");
            let retained = intruder.publish_retained(topic, "{}").await;
            assert_eq!(retained, PubAckReason::NotAuthorized, "{username} to {topic}");
            for filter in filters_of(topic) {
                assert_eq!(
                    intruder.subscribe(&filter).await,
                    SubscribeReasonCode::NotAuthorized,
                    "{username}: {filter}"
                );
            }
            let will = Some((topic.clone(), "{}".to_owned()));
            let id = format!("{client_id}-w");
            let with_will = Mqtt::connect_with_will(fleet.mqtt_addr(), &id, username, password, will).await;
            assert!(with_will.is_err(), "{username} may have a will on {topic}");
        }
        assert!(matches!(intruder.subscribe("fleet/v1/acme/boiler-1/#").await, SubscribeReasonCode::Success(_)));
        intruders.push(intruder);
    }
    // What is said in one tenant is heard there alone.
    let (mut ours, mut theirs) = (fleet.connect(&main).await, intruders.remove(0));
    for (topic, payload) in [("telemetry", r#"{"temp":1}"#), ("events", "{}"), ("app-defined/x", "ours")] {
        assert_ne!(ours.publish(&main.topic(topic), payload).await, PubAckReason::NotAuthorized);
        assert_eq!(listener.message().await, (main.topic(topic), payload.to_owned()), "and nothing before it");
    }
    let told = ("fleet/v1/acme/boiler-1/events".to_owned(), "theirs".to_owned());
    assert_eq!(theirs.publish(&told.0, told.1.as_str()).await, PubAckReason::Success);
    intruders.push(theirs);
    for mut intruder in intruders {
        assert_eq!(intruder.message().await, told, "and nothing before it");
    }
    assert_eq!(fleet.series(&main, "temp").await.len(), 1);
    let letters = fleet.get("/api/v1/dead-letters").await;
    assert_eq!(letters["items"], json!([]));
    // What everybody may read has no names in it.
    let metrics = fleet.text("/metrics").await;
    for name in ["acme", "boiler-1", "wile", "\"main\""] {
        assert!(!metrics.contains(name), "{name} is in the metrics");
    }
}

#[tokio::test]
async fn what_the_broker_counts_is_told_without_names() {
    let fleet = Fleet::start_with(&[("MUSTER__MQTT__SYS_INTERVAL_S", "1")]).await;
    let token = acme(&fleet).await;
    let device = fleet.enrol("boiler-1").await;
    let mut client = fleet.connect(&device).await;
    assert_eq!(client.publish(&device.topic("telemetry"), r#"{"temp":1}"#).await, PubAckReason::Success);
    let mut wile = Mqtt::connect(fleet.mqtt_addr(), "wile", ADMIN.0, &token).await.expect("a token opens the door");
    assert!(matches!(wile.subscribe("$SYS/#").await, SubscribeReasonCode::Success(_)));
    for _ in 0..18 {
        let (topic, value) = wile.message().await;
        assert!(topic.starts_with("$SYS/broker/"), "{topic}");
        let is_number = value.split(' ').next().is_some_and(|number| number.parse::<u64>().is_ok());
        assert!(is_number || value.starts_with("muster "), "{topic}: {value}");
    }
    assert_eq!(wile.publish("$SYS/broker/uptime", "0").await, PubAckReason::NotAuthorized);
}
