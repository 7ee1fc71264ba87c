use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::clock::from_ms;
use crate::device::{NewDevice, enrol};
use crate::dispatch::{self, Kind};
use crate::testing::TestDb;

const NOON: i64 = 1_763_722_800_000;

fn settings() -> config::Shadow {
    config::Shadow { max_bytes: 300, max_depth: 4, history_versions: 3, request_queue: 1, max_log_level_s: 60 }
}

fn members(value: Value) -> Document {
    document(value)
}

async fn device(db: &TestDb, id: &str) -> DeviceKey {
    let mut conn = db.pool().acquire().await.unwrap();
    let new = NewDevice::named(id.parse().unwrap());
    enrol(&mut conn, db.tenant(), &new, from_ms(NOON)).await.unwrap().0.key
}

// ---- merge and difference ----

/// Few names and values, so that documents meet often.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        3 => (0..3_i32).prop_map(|n| json!(n)),
        1 => Just(json!(1.0)),
        1 => Just(json!("x")),
        1 => Just(Value::Null),
        1 => Just(json!([{ "a": null }, 1])),
    ];
    leaf.prop_recursive(3, 20, 4, |inner| {
        prop_oneof![
            3 => btree_map("[a-c]", inner.clone(), 0..4).prop_map(|members| json!(members)),
            1 => vec(inner, 0..3).prop_map(Value::Array),
        ]
    })
}

fn object() -> impl Strategy<Value = Document> {
    btree_map("[a-c]", value(), 0..4).prop_map(|members| members.into_iter().collect())
}

/// A document as it can be stored: no member is null.
fn stored() -> impl Strategy<Value = Document> {
    object().prop_map(|patch| {
        let mut document = Document::new();
        merge(&mut document, &patch);
        document
    })
}

/// RFC 7396 §2, word by word.
fn naive_merge(target: Value, patch: &Value) -> Value {
    let Value::Object(patch) = patch else { return patch.clone() };
    let mut target = document(target);
    for (name, value) in patch {
        if value.is_null() {
            target.remove(name);
        } else {
            let member = target.get(name).cloned().unwrap_or(Value::Null);
            target.insert(name.clone(), naive_merge(member, value));
        }
    }
    Value::Object(target)
}

/// All that is no object, and objects without members, by the way to it.
fn leaves(document: &Document, way: &str, found: &mut std::collections::BTreeMap<String, Value>) {
    for (name, value) in document {
        let way = format!("{way}/{name}");
        match value {
            Value::Object(members) if !members.is_empty() => leaves(members, &way, found),
            leaf => {
                found.insert(way, leaf.clone());
            }
        }
    }
}

fn at_way<'a>(document: &'a Document, way: &str) -> Option<&'a Value> {
    let mut names = way.split('/').skip(1);
    let first = document.get(names.next()?)?;
    names.try_fold(first, |value, name| value.as_object()?.get(name))
}

fn normal(value: &Value) -> Value {
    match value {
        Value::Number(number) => json!(number.as_f64()),
        Value::Array(items) => items.iter().map(normal).collect(),
        Value::Object(members) => members.iter().map(|(name, value)| (name.clone(), normal(value))).collect(),
        other => other.clone(),
    }
}

proptest! {
    #[test]
    fn a_patch_is_merged_as_rfc_7396_says(mut target in stored(), patch in object()) {
        let expected = naive_merge(Value::Object(target.clone()), &Value::Object(patch.clone()));
        merge(&mut target, &patch);
        prop_assert_eq!(Value::Object(target), expected);
    }

    #[test]
    fn the_delta_is_every_leaf_that_differs_and_nothing_else(desired in stored(), reported in stored()) {
        let mut wanted = std::collections::BTreeMap::new();
        leaves(&desired, "", &mut wanted);
        wanted.retain(|way, leaf| {
            let have = at_way(&reported, way);
            let both_objects = leaf.is_object() && have.is_some_and(Value::is_object);
            !both_objects && have.map(normal) != Some(normal(leaf))
        });
        let mut found = std::collections::BTreeMap::new();
        leaves(&difference(&desired, &reported), "", &mut found);
        prop_assert_eq!(found, wanted);
    }

    #[test]
    fn a_device_that_does_what_it_is_told_has_no_delta(desired in stored(), mut reported in stored()) {
        let delta = difference(&desired, &reported);
        merge(&mut reported, &delta);
        prop_assert_eq!(difference(&desired, &reported), Document::new());
    }

    #[test]
    fn a_device_that_follows_all_it_is_told_ends_where_it_is_wanted(first in stored(), second in stored()) {
        // It began with nothing, did the first, and now hears of the second.
        let mut reported = first.clone();
        let mut told = difference(&second, &reported);
        overlay(&mut told, withdrawn(&first, &second));
        merge(&mut reported, &told);
        prop_assert_eq!(normal(&Value::Object(reported)), normal(&Value::Object(second)));
    }

    #[test]
    fn no_payload_panics_and_a_token_comes_back(payload in "\\PC{0,60}|\\{\"state\":\\{\"reported\":[^}]{0,9}\\}\\}", token in "[a-z]{1,9}") {
        let _ = message::read_update(payload.as_bytes());
        let asked = json!({ "client_token": token, "state": { "reported": { "a": 1 } }, "version": 2 }).to_string();
        let (echo, change) = message::read_update(asked.as_bytes());
        let change = change.unwrap();
        prop_assert_eq!(change.version, Some(2));
        prop_assert_eq!(&message::accepted(&change, 3, &echo, from_ms(NOON))["client_token"], &json!(token));
    }
}

#[test]
fn what_a_device_may_not_say_is_rejected_with_a_code() {
    let code = |payload: &str| message::read_update(payload.as_bytes()).1.map_err(|rejection| rejection.code);
    for malformed in [
        "",
        "[]",
        "{}",
        "x",
        r#"{"state":{}}"#,
        r#"{"state":{"reported":[]}}"#,
        r#"{"state":{"reported":{}},"version":"1"}"#,
    ] {
        assert_eq!(code(malformed).unwrap_err(), 400, "{malformed}");
    }
    assert_eq!(code(r#"{"state":{"reported":{},"desired":{"a":1}}}"#).unwrap_err(), 403);
    assert_eq!(code(r#"{"state":{"reported":{},"else":1}}"#).unwrap_err(), 400);
    assert!(code(r#"{"state":{"reported":null}}"#).unwrap().patch.is_none());
    let long = "x".repeat(message::MAX_TOKEN_CHARS + 1);
    assert_eq!(code(&json!({ "clientToken": long, "state": { "reported": {} } }).to_string()).unwrap_err(), 400);
}

// ---- rows ----

async fn set(
    db: &TestDb,
    device: DeviceKey,
    side: Side,
    patch: Value,
    version: Option<i64>,
    ms: i64,
) -> Result<Changed> {
    let mut tx = db.pool().begin().await.unwrap();
    let asked = Change { side, patch: Some(members(patch)), version, if_match: Vec::new() };
    let changed = change(&mut tx, device, &asked, "usr_1", &settings(), from_ms(NOON + ms)).await?;
    tx.commit().await.unwrap();
    Ok(changed)
}

#[tokio::test]
async fn a_change_makes_the_next_version_and_one_of_another_version_is_refused() {
    let db = TestDb::new().await;
    let device = device(&db, "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    assert_eq!(find(&mut conn, device).await.unwrap(), Shadow::default());
    let first = set(&db, device, Side::Desired, json!({ "a": { "b": 1, "c": [1, 2] } }), Some(0), 0).await.unwrap();
    assert_eq!((first.before.version, first.after.version), (0, 1));
    let second = set(&db, device, Side::Reported, json!({ "a": { "b": 1 }, "x": 1 }), None, 1).await.unwrap();
    assert_eq!(second.after.delta(), members(json!({ "a": { "c": [1, 2] } })));
    let same = set(&db, device, Side::Reported, json!({ "x": 1 }), None, 2).await.unwrap();
    assert_eq!((same.after.version, same.before), (2, second.after), "what changes nothing makes no version");
    let refused = set(&db, device, Side::Desired, json!({ "a": null }), Some(1), 3).await;
    assert!(matches!(refused, Err(Error::ShadowConflict { expected: 1, found: 2 })));
    let gone = set(&db, device, Side::Desired, json!({ "a": null }), Some(2), 3).await.unwrap();
    assert_eq!(gone.after.desired, Document::new());
    assert_eq!(find(&mut conn, device).await.unwrap(), gone.after);
}

#[tokio::test]
async fn of_changes_at_the_same_time_that_expect_the_same_version_one_is_done() {
    let db = TestDb::new().await;
    let device = device(&db, "boiler-1").await;
    let all = (0..8).map(|n| set(&db, device, Side::Desired, json!({ "n": n }), Some(0), n));
    let done = futures::future::join_all(all).await;
    assert_eq!(done.iter().filter(|done| done.is_ok()).count(), 1);
    let merged = (0..8).map(|n| set(&db, device, Side::Reported, json!({ (n.to_string()): n }), None, n));
    assert!(futures::future::join_all(merged).await.iter().all(Result::is_ok));
    let shadow = find(&mut db.pool().acquire().await.unwrap(), device).await.unwrap();
    assert_eq!((shadow.reported.len(), shadow.version), (8, 9), "nothing is lost");
}

#[tokio::test]
async fn documents_are_bounded_in_bytes_and_depth() {
    let db = TestDb::new().await;
    let device = device(&db, "boiler-1").await;
    let put = async |patch: Value| set(&db, device, Side::Reported, patch, None, 0).await;
    assert!(matches!(put(json!({ "a": "x".repeat(300) })).await, Err(Error::ShadowTooLarge { side: "reported", .. })));
    put(json!({ "a": "x".repeat(200) })).await.unwrap();
    assert!(matches!(put(json!({ "b": "x".repeat(200) })).await, Err(Error::ShadowTooLarge { .. })), "as a whole");
    put(json!({ "a": { "b": { "c": { "d": 1 } } } })).await.unwrap();
    assert!(matches!(put(json!({ "a": { "b": { "c": { "d": [1] } } } })).await, Err(Error::Invalid(_))));
    assert!(matches!(put(json!({ "a": "\u{0}" })).await, Err(Error::Invalid(_))));
    assert!(matches!(put(json!({ "a\u{0}": 1 })).await, Err(Error::Invalid(_))));
}

#[tokio::test]
async fn a_bounded_number_of_versions_can_be_looked_at() {
    let db = TestDb::new().await;
    let device = device(&db, "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    let n_at = async |conn: &mut PgConnection, ms: i64| {
        at(conn, device, from_ms(NOON + ms)).await.map(|shadow| shadow.desired.get("n").cloned())
    };
    assert_eq!(n_at(&mut conn, 0).await.unwrap(), None, "there was nothing yet");
    for n in 1..=3 {
        set(&db, device, Side::Desired, json!({ "n": n }), None, n * 10).await.unwrap();
    }
    assert_eq!(n_at(&mut conn, 9).await.unwrap(), None);
    assert_eq!(n_at(&mut conn, 10).await.unwrap(), Some(json!(1)));
    assert_eq!(n_at(&mut conn, 29).await.unwrap(), Some(json!(2)));
    assert_eq!(n_at(&mut conn, 9_999).await.unwrap(), Some(json!(3)));
    set(&db, device, Side::Desired, json!({ "n": 4 }), None, 40).await.unwrap();
    assert!(matches!(n_at(&mut conn, 19).await, Err(Error::ShadowForgotten)));
    let kept: i64 = sqlx::query_scalar("select count(*) from shadow_history").fetch_one(db.pool()).await.unwrap();
    assert_eq!(kept, 3, "shadow.history_versions");
}

#[tokio::test]
async fn what_is_wished_no_more_is_told_once_as_null() {
    let db = TestDb::new().await;
    let device = device(&db, "boiler-1").await;
    let told = async || {
        let mut tx = db.pool().begin().await.unwrap();
        let news = tell(&mut tx, &[device]).await.unwrap();
        tx.commit().await.unwrap();
        news.into_iter().next().map(|news| Value::Object(news.delta))
    };
    set(&db, device, Side::Desired, json!({ "log": { "level": "debug" }, "fan": 3 }), None, 0).await.unwrap();
    assert_eq!(told().await, Some(json!({ "log": { "level": "debug" }, "fan": 3 })));
    set(&db, device, Side::Reported, json!({ "log": { "level": "debug" } }), None, 1).await.unwrap();
    set(&db, device, Side::Desired, json!({ "log": { "level": null } }), None, 2).await.unwrap();
    assert_eq!(told().await, Some(json!({ "log": { "level": null }, "fan": 3 })));
    assert_eq!(told().await, Some(json!({ "fan": 3 })), "until it is done it is told again and again");
    set(&db, device, Side::Reported, json!({ "fan": 3.0 }), None, 3).await.unwrap();
    assert_eq!(told().await, None);
    // Who has seen all of it need not be told what went.
    set(&db, device, Side::Desired, json!({ "fan": null }), None, 4).await.unwrap();
    let mut conn = db.pool().acquire().await.unwrap();
    let shadow = find(&mut conn, device).await.unwrap();
    seen(&mut conn, device, &shadow).await.unwrap();
    assert_eq!(told().await, None);
}

#[tokio::test]
async fn news_wait_until_they_are_done_or_something_more_has_come() {
    let db = TestDb::new().await;
    let device = device(&db, "boiler-1").await;
    let mut conn = db.pool().acquire().await.unwrap();
    dispatch::note(&mut conn, device, Kind::Shadow).await.unwrap();
    let first = dispatch::due(&mut conn, 10).await.unwrap();
    assert_eq!((first.len(), first[0].device, first[0].kind, first[0].is_stale), (1, device, Kind::Shadow, false));
    dispatch::note(&mut conn, device, Kind::Shadow).await.unwrap();
    dispatch::note(&mut conn, device, Kind::Command).await.unwrap();
    dispatch::done(&mut conn, &first).await.unwrap();
    let second = dispatch::due(&mut conn, 10).await.unwrap();
    assert_eq!(second.len(), 2, "it came again while it was being sent");
    dispatch::done(&mut conn, &second).await.unwrap();
    assert_eq!(dispatch::due(&mut conn, 10).await.unwrap(), []);
}
