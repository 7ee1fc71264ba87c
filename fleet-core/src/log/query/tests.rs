//! What a query of lines means.

use chrono::TimeZone as _;
use serde_json::json;
use sqlx::PgConnection;

use super::*;
use crate::id::{DeviceKey, TenantKey};
use crate::level::Level;
use crate::log::{Address, Cut};
use crate::telemetry::fixture::enrol;
use crate::testing::TestDb;

fn now() -> DateTime<Utc> {
    Utc.with_ymd_and_hms(2026, 11, 20, 12, 0, 0).unwrap()
}

fn line(tenant: TenantKey, device: DeviceKey) -> Line {
    let fields = json!({ "code": 42, "tag": ["red", null, 7], "none": [null], "up": true, "a.b": "x y" });
    Line {
        address: Address { ts_ms: now().timestamp_millis() - 60_000, writer: 1, place: 7 },
        tenant,
        device,
        device_id: "pump-1".parse().unwrap(),
        seq: 3,
        level: Level::Warn,
        target: Some("net.wifi".to_owned()),
        message: "Reconnect 3 failed: no carrier".to_owned(),
        trace: None,
        fields: fields.as_object().unwrap().clone(),
        cut: Cut::default(),
        sent_at_ms: None,
    }
}

async fn asked(db: &mut PgConnection, tenant: TenantKey, text: &str) -> Query {
    let read = read(text, now()).unwrap_or_else(|error| panic!("{text}: {error}"));
    Query::resolve(&read, db, tenant).await.unwrap()
}

#[tokio::test]
async fn a_query_asks_of_the_line_and_of_its_device() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "pump-1").await;
    let other = enrol(&mut conn, db.tenant(), "fan-1").await;
    let sql = "update device set type = 'pump', labels = '{\"site\": \"oslo\"}' where id = 'pump-1'";
    sqlx::query(sql).execute(&mut *conn).await.unwrap();
    let (line, of_other) = (line(db.tenant(), device), line(db.tenant(), other));
    for text in [
        "",
        "reconnect carrier",
        "\"no carr\"*",
        "level:>=warn ts:>now-15m",
        "target:net.* NOT trace_id:*",
        "fields.code:42 fields.code:[41 TO 43}",
        "fields.tag:red fields.tag:7",
        "NOT fields.none:* fields.a.b:\"x y\"",
        "fields.up:true cut:false clamped:false",
        "pattern:*",
    ] {
        let query = asked(&mut conn, db.tenant(), text).await;
        assert!(query.matches(&line) && query.matches(&of_other), "{text}");
    }
    for text in [
        "device:pump-1",
        "type:pump label.site:oslo",
        "carrier AND NOT device:fan-*",
        "(type:pump OR nothing) level:warn",
        "NOT type:fan AND NOT device:fan-1 -label.site:rome state:never_seen",
    ] {
        let query = asked(&mut conn, db.tenant(), text).await;
        assert!(query.matches(&line) && !query.matches(&of_other), "{text}");
    }
    for text in ["nothing", "fields.none:*", "device:pump", "fields.a:x", "fields.tag:\"red 7\"", "level:error"] {
        assert!(!asked(&mut conn, db.tenant(), text).await.matches(&line), "{text}");
    }
    let elsewhere = asked(&mut conn, TenantKey(db.tenant().0 + 1), "device:pump-1").await;
    assert!(!elsewhere.matches(&line), "another tenant's device of that name is not meant");
}

#[tokio::test]
async fn what_is_asked_of_devices_is_asked_at_once() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let key = enrol(&mut conn, db.tenant(), "pump-1").await;
    let keys = |keys: &[DeviceKey]| Asked::Devices(Arc::new(keys.iter().copied().collect()));
    let together = asked(&mut conn, db.tenant(), "device:pump-1 (state:never_seen OR type:x)").await;
    assert_eq!(together.asked(), &keys(&[key]));
    let all_but_one = asked(&mut conn, db.tenant(), "NOT device:fan-1").await;
    assert_eq!(all_but_one.asked(), &Asked::Not(Box::new(keys(&[]))));
}

#[test]
fn every_field_of_devices_can_be_asked_of_lines_and_every_field_has_an_example() {
    for (name, kind) in selector::SCHEMA.fields.iter().chain(selector::SCHEMA.families) {
        assert!(SCHEMA.fields.iter().chain(SCHEMA.families).any(|has| has == &(*name, *kind)), "{name}");
    }
    for field in fields() {
        assert!(field.example.starts_with(field.name), "{}", field.name);
        read(field.example, now()).unwrap_or_else(|error| panic!("{}: {error}", field.example));
        for value in field.values {
            read(&format!("{}:{value}", field.name), now()).unwrap();
        }
    }
}

#[test]
fn the_examples_of_the_reference_are_queries() {
    let page = include_str!("../../../../docs/reference/query.md");
    let blocks = page.split("```query\n").skip(1).filter_map(|rest| rest.split_once("```"));
    let examples = blocks.flat_map(|(block, _)| block.lines()).collect::<Vec<_>>();
    assert!(examples.len() > 10);
    for example in examples {
        read(example, now()).unwrap_or_else(|error| panic!("{example}: {error}"));
    }
    for field in fields() {
        let written = if field.name.ends_with('.') { format!("`{}", field.name) } else { format!("`{}`", field.name) };
        assert!(page.contains(&written), "{written} is not in the reference");
    }
}
