use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use serde_json::json;

use super::*;
use crate::telemetry::fixture::{NOW, enrol};
use crate::testing::TestDb;

const DEVICE: DeviceKey = DeviceKey(7);

fn reported(device: DeviceKey, at_ms: i64, payload: &serde_json::Value) -> Change {
    Change::decode(device, payload.to_string().as_bytes(), at_ms).unwrap()
}

#[test]
fn a_status_says_what_it_must_and_may_say_more() {
    let full = json!({"state": "sleeping", "boot_id": "b1", "firmware": "1.2", "until": 5, "reason": "night", "x": 1});
    let cause = Cause::Reported {
        state: Some(State::Sleeping),
        boot_id: Some("b1".to_owned()),
        firmware: Some("1.2".to_owned()),
        until_ms: Some(5),
        reason: Some("night".to_owned()),
    };
    assert_eq!(reported(DEVICE, NOW, &full), Change { device: DEVICE, at_ms: NOW, cause });
    assert_eq!(reported(DEVICE, NOW, &json!({"state": "online", "boot_id": 42})).boot_id(), Some("42"));
    let awake = reported(DEVICE, NOW, &json!({"state": "online", "until": 5})).cause;
    assert!(matches!(awake, Cause::Reported { until_ms: None, .. }), "{awake:?}");
    let cleared = Change::decode(DEVICE, b"", NOW).unwrap().cause;
    assert!(matches!(cleared, Cause::Reported { state: None, .. }));
}

#[test]
fn a_status_that_cannot_be_read_says_why() {
    let long = "x".repeat(MAX_TEXT_BYTES + 1);
    for (payload, reason) in [
        ("online".to_owned(), "not readable as a status"),
        ("{}".to_owned(), "missing field `state`"),
        (json!({"state": "happy"}).to_string(), "unknown variant `happy`"),
        (json!({"state": "online", "boot_id": "a\0"}).to_string(), "`boot_id`: expected 1 to 128 bytes"),
        (json!({"state": "online", "firmware": long}).to_string(), "`firmware`: expected 1 to 128 bytes"),
        (json!({"state": "online", "firmware": ""}).to_string(), "`firmware`: expected 1 to 128 bytes"),
        (json!({"state": "sleeping", "until": -1}).to_string(), "`until`: expected milliseconds"),
    ] {
        let given = Change::decode(DEVICE, payload.as_bytes(), NOW).unwrap_err();
        assert!(given.contains(reason), "{payload}: {given}");
    }
}

#[test]
fn a_reason_is_cut_to_what_can_be_stored() {
    let change = Change::lost(DEVICE, NOW, format!("\0{}", "ä".repeat(300)));
    assert_eq!(change.cause, Cause::ConnectionLost("ä".repeat(MAX_REASON_BYTES / 2)));
}

proptest! {
    #[test]
    fn any_bytes_give_a_status_or_a_reason(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
        if let Err(reason) = Change::decode(DEVICE, &bytes, NOW) {
            prop_assert!(!reason.is_empty());
        }
    }
}

/// What is known after each of the steps, each one statement: state, since (ms after now), reason.
async fn after(steps: &[&[(i64, Cause)]]) -> Vec<(State, i64, Option<String>)> {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    let mut all = Vec::new();
    for step in steps {
        let changes: Vec<_> =
            step.iter().map(|(at, cause)| Change { device, at_ms: NOW + at, cause: cause.clone() }).collect();
        record(&mut conn, &changes).await.unwrap();
        let known = get(&mut conn, device).await.unwrap().unwrap();
        all.push((known.state, known.state_since.timestamp_millis() - NOW, known.reason));
    }
    all
}

fn says(state: State) -> Cause {
    Cause::Reported { state: Some(state), boot_id: None, firmware: None, until_ms: None, reason: None }
}

fn drops(reason: &str) -> Cause {
    Cause::ConnectionLost(reason.to_owned())
}

#[tokio::test]
async fn the_broker_and_the_device_agree_on_one_state() {
    let seen = after(&[
        &[(0, Cause::Connected)],
        &[(1, says(State::Online))],
        &[(2, drops("timeout"))],
        &[(3, says(State::Lost))],
        &[(4, Cause::Connected)],
        &[(5, Cause::Disconnected)],
    ])
    .await;
    let reason = |text: &str| Some(text.to_owned());
    assert_eq!(
        seen,
        [
            (State::Online, 0, None),
            (State::Online, 0, None),
            (State::Lost, 2, reason("timeout")),
            (State::Lost, 2, None),
            (State::Online, 4, None),
            (State::Offline, 5, reason("disconnected")),
        ]
    );
}

#[tokio::test]
async fn who_said_it_would_be_away_is_not_lost() {
    for away in [State::Sleeping, State::Offline] {
        for end in [Cause::Disconnected, drops("timeout")] {
            let apart = after(&[&[(0, Cause::Connected)], &[(1, says(away))], &[(2, end.clone())]]).await;
            let together = after(&[&[(0, Cause::Connected), (1, says(away)), (2, end.clone())]]).await;
            assert_eq!(apart.last(), Some(&(away, 1, None)), "{end:?}");
            assert_eq!(apart.last(), together.last());
            let back = after(&[&[(1, says(away))], &[(2, end), (3, Cause::Connected)]]).await;
            assert_eq!(back.last(), Some(&(State::Online, 3, None)));
        }
    }
}

#[tokio::test]
async fn changes_of_one_statement_come_to_what_they_come_to_one_by_one() {
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let cause = prop_oneof![
        Just(Cause::Connected),
        Just(Cause::Disconnected),
        Just(drops("timeout")),
        Just(says(State::Online)),
        Just(says(State::Sleeping)),
        Just(says(State::Offline)),
        Just(Cause::Reported { state: None, boot_id: None, firmware: None, until_ms: None, reason: None }),
    ];
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    for n in 0..60 {
        let causes = prop::collection::vec(cause.clone(), 1..6).new_tree(&mut runner).unwrap().current();
        let first = prop::option::of(cause.clone()).new_tree(&mut runner).unwrap().current();
        let mut known = Vec::new();
        for together in [true, false] {
            let device = enrol(&mut conn, db.tenant(), &format!("d{n}-{together}")).await;
            let changes: Vec<_> = first
                .iter()
                .chain(&causes)
                .zip(1..)
                .map(|(cause, at)| Change { device, at_ms: NOW + at, cause: cause.clone() })
                .collect();
            let (before, rest) = changes.split_at(usize::from(first.is_some()));
            record(&mut conn, before).await.unwrap();
            for some in rest.chunks(if together { 10 } else { 1 }) {
                record(&mut conn, some).await.unwrap();
            }
            known.push(get(&mut conn, device).await.unwrap().unwrap());
        }
        assert_eq!(known[0], known[1], "{first:?} {causes:?}");
    }
}

#[tokio::test]
async fn what_a_device_said_once_stays_known() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    assert_eq!(get(&mut conn, device).await.unwrap(), None);
    let birth = reported(device, NOW, &json!({"state": "online", "boot_id": "b1", "firmware": "1.2"}));
    let sleeps = reported(device, NOW + 1, &json!({"state": "sleeping", "until": NOW + 60_000}));
    record(&mut conn, &[birth]).await.unwrap();
    record(&mut conn, &[sleeps]).await.unwrap();
    let known = get(&mut conn, device).await.unwrap().unwrap();
    assert_eq!((known.boot_id.as_deref(), known.firmware.as_deref()), (Some("b1"), Some("1.2")));
    assert_eq!(known.sleeping_until, Some(from_ms(NOW + 60_000)));
    record(&mut conn, &[Change::connected(device, NOW + 2)]).await.unwrap();
    let known = get(&mut conn, device).await.unwrap().unwrap();
    assert_eq!((known.sleeping_until, known.last_seen_at), (None, from_ms(NOW + 2)));
}

#[tokio::test]
async fn changes_of_deleted_devices_are_skipped() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let device = enrol(&mut conn, db.tenant(), "boiler-1").await;
    record(&mut conn, &[Change::connected(DeviceKey(999), NOW), Change::connected(device, NOW)]).await.unwrap();
    assert!(get(&mut conn, device).await.unwrap().is_some());
    assert!(get(&mut conn, DeviceKey(999)).await.unwrap().is_none());
    record(&mut conn, &[]).await.unwrap();
}

#[tokio::test]
async fn who_was_online_when_the_server_died_is_lost() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let online = enrol(&mut conn, db.tenant(), "online").await;
    let asleep = enrol(&mut conn, db.tenant(), "asleep").await;
    let sleeps = Change { device: asleep, at_ms: NOW, cause: says(State::Sleeping) };
    record(&mut conn, &[Change::connected(online, NOW), sleeps]).await.unwrap();
    assert_eq!(mark_all_lost(&mut conn, NOW + 9, "the server was restarted").await.unwrap(), 1);
    let known = get(&mut conn, online).await.unwrap().unwrap();
    assert_eq!((known.state, known.state_since), (State::Lost, from_ms(NOW + 9)));
    assert_eq!(known.reason.as_deref(), Some("the server was restarted"));
    assert_eq!(get(&mut conn, asleep).await.unwrap().unwrap().state, State::Sleeping);
}
