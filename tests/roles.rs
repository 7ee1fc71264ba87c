//! What a role says holds at both doors: on the REST API and on topics.

use reqwest::{Method, StatusCode};
use rumqttc::v5::mqttbytes::v5::{PubAckReason, SubscribeReasonCode};
use serde_json::{Value, json};

use crate::harness::{Fleet, Mqtt};

fn allow(action: &str, filter: &str) -> Value {
    json!({ "effect": "allow", "action": action, "filter": filter })
}

fn deny(action: &str, filter: &str) -> Value {
    json!({ "effect": "deny", "action": action, "filter": filter })
}

/// An application with a role of its own: its client and its API key.
async fn application(fleet: &Fleet, name: &str, rules: Value) -> (Mqtt, String) {
    fleet.make("/api/v1/roles", json!({ "id": name, "topic_rules": rules })).await;
    let key = fleet.make("/api/v1/api-keys", json!({ "name": name, "role": name })).await;
    let secret = key["secret"].as_str().expect("a secret").to_owned();
    let mqtt = Mqtt::connect(fleet.mqtt_addr(), name, name, &secret).await.expect("a key opens the MQTT door");
    (mqtt, secret)
}

#[tokio::test]
async fn a_platform_role_may_use_every_topic_but_what_it_denies() {
    let fleet = Fleet::start().await;
    let (username, password) = fleet.platform_user().await;
    let mut client = Mqtt::connect(fleet.mqtt_addr(), "paho", &username, &password).await.expect("it may connect");
    assert_eq!(
        client.subscribe("TopicA/B").await,
        SubscribeReasonCode::Success(rumqttc::v5::mqttbytes::QoS::AtLeastOnce)
    );
    assert!(matches!(client.subscribe("#").await, SubscribeReasonCode::Success(_)));
    assert_eq!(client.subscribe("test/nosubscribe").await, SubscribeReasonCode::NotAuthorized);
    assert_eq!(client.subscribe("$SYS/#").await, SubscribeReasonCode::NotAuthorized);
    assert_eq!(client.publish("TopicA/B", "x").await, PubAckReason::Success);
    assert_eq!(client.message().await, ("TopicA/B".to_owned(), "x".to_owned()));
    assert_eq!(client.publish("test/nosubscribe", "x").await, PubAckReason::NotAuthorized);

    // What devices say of themselves is theirs alone.
    let device = fleet.enrol("boiler-1").await;
    for channel in ["telemetry", "status"] {
        assert_eq!(client.publish(&device.topic(channel), "{}").await, PubAckReason::NotAuthorized);
    }
    assert_ne!(client.publish(&device.topic("note"), "{}").await, PubAckReason::NotAuthorized);
}

#[tokio::test]
async fn an_application_keeps_to_its_role() {
    let fleet = Fleet::start().await;
    let rules = json!([
        allow("all", "app/{tenant}/orders/#"),
        deny("publish", "app/{tenant}/orders/closed/#"),
        allow("subscribe", "fleet/v1/{tenant}/+/telemetry"),
        allow("all", "fleet/v1/{tenant}/{device}/note"),
    ]);
    let (mut app, secret) = application(&fleet, "orders", rules).await;
    assert!(matches!(app.subscribe("app/main/orders/#").await, SubscribeReasonCode::Success(_)));
    assert_eq!(app.publish("app/main/orders/new/1", "x").await, PubAckReason::Success);
    assert_eq!(app.message().await, ("app/main/orders/new/1".to_owned(), "x".to_owned()));
    assert_eq!(app.publish("app/main/orders/closed/1", "x").await, PubAckReason::NotAuthorized);
    assert!(matches!(app.subscribe("fleet/v1/main/+/telemetry").await, SubscribeReasonCode::Success(_)));
    for wide in ["#", "app/#", "app/main/#", "app/+/orders/1", "fleet/v1/main/#", "fleet/v1/+/+/telemetry", "$SYS/#"] {
        assert_eq!(app.subscribe(wide).await, SubscribeReasonCode::NotAuthorized, "{wide}");
    }
    for foreign in ["app/other/orders/1", "app/main/other", "fleet/v1/main/orders/note", "x", "$SYS/x"] {
        assert_eq!(app.publish(foreign, "x").await, PubAckReason::NotAuthorized, "{foreign}");
    }

    // The role has no permission, so the same key opens nothing on the REST API.
    let me = fleet.call_as(&secret, Method::GET, "/api/v1/me", None).await;
    assert_eq!((me.0, &me.1["role"], &me.1["permissions"]), (StatusCode::OK, &json!("orders"), &json!([])));
    let (status, _) = fleet.call_as(&secret, Method::GET, "/api/v1/devices", None).await;
    assert_eq!(status, StatusCode::FORBIDDEN);
}
