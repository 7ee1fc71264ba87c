//! Two tenants on one server, with devices of the same name: neither reaches the other, over REST or MQTT.

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
