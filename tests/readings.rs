//! The main job: a reading that was acknowledged is a row that can be queried.

use std::time::Duration;

use rumqttc::v5::mqttbytes::v5::SubscribeReasonCode;
use serde_json::json;

use crate::harness::{Answer, Fleet, Mqtt, signal};

#[tokio::test]
async fn an_acknowledged_reading_can_be_queried_at_once() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    let reading = json!({"ts": 1_763_692_212_345_i64, "seq": 1, "values": {"temp": 21.5, "door": true, "mode": "eco"}});
    assert_eq!(mqtt.publish(&boiler.topic("telemetry"), reading.to_string()).await, Answer::Success);
    let at = "2025-11-21T02:30:12.345Z".to_owned();
    assert_eq!(fleet.series(&boiler, "temp").await, [(at.clone(), json!(21.5))]);
    assert_eq!(fleet.series(&boiler, "door").await, [(at.clone(), json!(true))]);
    assert_eq!(fleet.series(&boiler, "mode").await, [(at, json!("eco"))]);
    let latest = fleet.get("/api/v1/devices/boiler-1/telemetry/latest").await;
    assert_eq!(latest["items"].as_array().map(Vec::len), Some(3), "{latest}");
}

#[tokio::test]
async fn a_reading_sent_twice_is_stored_once() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    for reading in [
        json!({"ts": 1_763_692_212_345_i64, "seq": 7, "values": {"temp": 1}}),
        json!({"ts": 1_763_692_212_346_i64, "values": {"temp": 2}}),
    ] {
        for _ in 0..2 {
            assert_eq!(mqtt.publish(&boiler.topic("telemetry"), reading.to_string()).await, Answer::Success);
        }
    }
    assert_eq!(fleet.series(&boiler, "temp").await.len(), 2);
    assert!((fleet.metric("muster_ingest_readings_duplicate_total", "").await - 2.0).abs() < 0.1);
}

#[tokio::test]
async fn what_cannot_be_read_is_acknowledged_and_kept_with_its_reason() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    for (channel, payload) in
        [("telemetry", "{\"temp\":"), ("telemetry", "[1]"), ("status", "online"), ("telemetry", "")]
    {
        assert_eq!(mqtt.publish(&boiler.topic(channel), payload).await, Answer::Success, "{payload}");
    }
    let letters = fleet.get("/api/v1/dead-letters?device=boiler-1").await;
    let letters = letters["items"].as_array().expect("items").clone();
    assert_eq!(letters.len(), 4, "{letters:?}");
    assert!(letters.iter().all(|letter| letter["reason"].as_str().is_some_and(|reason| !reason.is_empty())));
    assert_eq!(mqtt.publish(&boiler.topic("telemetry"), r#"{"temp":1}"#).await, Answer::Success);
    assert_eq!(fleet.series(&boiler, "temp").await.len(), 1);
}

#[tokio::test]
async fn one_bad_element_does_not_cost_the_others() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    let payload = r#"[{"ts":1763692212000,"seq":1,"values":{"t":1}},{"ts":"x","values":{}},{"ts":1763692213000,"seq":2,"values":{"t":2}}]"#;
    assert_eq!(mqtt.publish(&boiler.topic("telemetry"), payload).await, Answer::Success);
    assert_eq!(fleet.series(&boiler, "t").await.len(), 2);
    assert_eq!(fleet.get("/api/v1/dead-letters").await["items"].as_array().map(Vec::len), Some(1));
}

#[tokio::test]
async fn a_device_may_use_its_own_subtree_and_nothing_else() {
    let fleet = Fleet::start().await;
    let (mine, other) = (fleet.enrol("mine").await, fleet.enrol("other").await);
    let mut mqtt = fleet.connect(&mine).await;
    assert_eq!(mqtt.publish(&other.topic("telemetry"), r#"{"t":1}"#).await, Answer::NotAuthorized);
    assert_eq!(mqtt.publish("anything", "x").await, Answer::NotAuthorized);
    assert_eq!(mqtt.subscribe(&other.topic("#")).await, SubscribeReasonCode::NotAuthorized);
    assert_eq!(mqtt.subscribe("fleet/v1/main/+/telemetry").await, SubscribeReasonCode::NotAuthorized);
    assert!(matches!(mqtt.subscribe(&mine.topic("#")).await, SubscribeReasonCode::Success(_)));
    assert!(fleet.series(&other, "t").await.is_empty());
}

#[tokio::test]
async fn subscribers_receive_readings_after_the_commit() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut admin = fleet.connect_admin("watcher").await;
    admin.subscribe("fleet/v1/main/+/telemetry").await;
    let mut mqtt = fleet.connect(&boiler).await;
    mqtt.publish(&boiler.topic("telemetry"), r#"{"ts":1763692212345,"seq":1,"values":{"t":1}}"#).await;
    let (topic, payload) = admin.message().await;
    assert_eq!(topic, boiler.topic("telemetry"));
    assert!(payload.contains("1763692212345"));
}

#[tokio::test]
async fn the_life_of_a_device_is_kept() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let state = || async {
        let device = fleet.get("/api/v1/devices/boiler-1").await;
        device["status"]["state"].as_str().unwrap_or_default().to_owned()
    };
    assert_eq!(state().await, "never_seen");
    let will = Some((boiler.topic("status"), r#"{"state":"lost"}"#.to_owned()));
    let mut mqtt =
        Mqtt::connect_with_will(fleet.mqtt_addr(), &boiler.id, &boiler.username, &boiler.password, will).await.unwrap();
    fleet.eventually(state, |state| state == "online").await;
    let birth = r#"{"state":"online","boot_id":"b1","firmware":"1.2.3"}"#;
    assert_eq!(mqtt.publish_retained(&boiler.topic("status"), birth).await, Answer::Success);
    for seq in [1, 2, 5] {
        let reading = json!({"ts": 1_763_692_212_000_i64 + seq, "seq": seq, "values": {"t": 1}});
        mqtt.publish(&boiler.topic("telemetry"), reading.to_string()).await;
    }
    let read = || fleet.get("/api/v1/devices/boiler-1");
    let device = fleet.eventually(read, |device| device["status"]["sequence"]["missing"] == 2).await;
    assert_eq!((&device["status"]["boot_id"], &device["status"]["firmware"]), (&json!("b1"), &json!("1.2.3")));
    mqtt.vanish();
    fleet.eventually(state, |state| state == "lost").await;
    fleet.connect(&boiler).await.disconnect().await;
    fleet.eventually(state, |state| state == "offline").await;
}

#[tokio::test]
async fn versions_of_firmware_that_find_no_room_are_counted_and_the_device_is_told_right() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let full = "insert into firmware_seen (tenant_key, version, first_at)
                select tenant_key, 'x' || n, now() from device, generate_series(1, 10000) n";
    sqlx::query(full).execute(fleet.db()).await.expect("the table is there");
    let mut mqtt = fleet.connect(&boiler).await;
    let birth = r#"{"state":"online","boot_id":"b1","firmware":"1.2.3"}"#;
    assert_eq!(mqtt.publish(&boiler.topic("status"), birth).await, Answer::Success);
    let left_out = || fleet.metric("muster_mqtt_limit_hits_total", "\"firmware_versions\"");
    fleet.eventually(left_out, |left_out| (*left_out - 1.0).abs() < 0.1).await;
    let read = || fleet.get("/api/v1/devices/boiler-1");
    fleet.eventually(read, |device| device["status"]["firmware"] == "1.2.3").await;
    let kept = sqlx::query_scalar::<_, i64>("select count(*) from firmware_seen").fetch_one(fleet.db()).await;
    assert_eq!(kept.expect("the table is there"), 10_000);
}

#[tokio::test]
async fn while_the_database_is_away_nothing_is_acknowledged_and_nothing_is_lost() {
    let fleet = Fleet::start_embedded().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    let reading = |seq: i64| json!({"ts": 1_763_692_212_000_i64 + seq, "seq": seq, "values": {"t": seq}}).to_string();
    assert_eq!(mqtt.publish(&boiler.topic("telemetry"), reading(1)).await, Answer::Success);
    // Every process of PostgreSQL stands still: it is there and does not answer.
    let frozen = fleet.postgres_processes();
    for pid in &frozen {
        signal(*pid, "STOP");
    }
    mqtt.send(&boiler.topic("telemetry"), false, reading(2)).await;
    assert!(mqtt.stays_unanswered_for(Duration::from_millis(500)).await, "acknowledged without a COMMIT");
    for pid in &frozen {
        signal(*pid, "CONT");
    }
    assert_eq!(mqtt.answered().await, Answer::Success);
    assert_eq!(fleet.series(&boiler, "t").await.len(), 2);
}

#[tokio::test]
async fn a_stop_loses_nothing_that_was_acknowledged() {
    let mut fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    for seq in 0..50_i64 {
        let reading = json!({"ts": 1_763_692_212_000_i64 + seq, "seq": seq, "values": {"t": seq}});
        assert_eq!(mqtt.publish(&boiler.topic("telemetry"), reading.to_string()).await, Answer::Success);
    }
    assert!(fleet.stop().await.success());
    fleet.start_again().await;
    assert_eq!(fleet.series(&boiler, "t").await.len(), 50);
}
