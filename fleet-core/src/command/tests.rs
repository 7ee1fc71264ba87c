use chrono::TimeDelta;
use proptest::prelude::*;

use super::*;
use crate::clock::from_ms;
use crate::device::{NewDevice, enrol};
use crate::dispatch;
use crate::id::ConnectionId;
use crate::testing::TestDb;

const BOUNDS: config::Commands = config::Commands {
    max_open: 3,
    max_params_bytes: 100,
    default_timeout_s: 60,
    max_timeout_s: 60,
    max_response_bytes: 1000,
    response_queue: 1,
};

fn noon(seconds: i64) -> DateTime<Utc> {
    from_ms(1_763_722_800_000 + seconds * 1000)
}

struct Boiler {
    db: TestDb,
    id: DeviceId,
    key: DeviceKey,
}

impl Boiler {
    async fn new() -> Self {
        let db = TestDb::new().await;
        let id: DeviceId = "boiler-1".parse().unwrap();
        let mut conn = db.pool().acquire().await.unwrap();
        let (device, _) = enrol(&mut conn, db.tenant(), &NewDevice::named(id.clone()), noon(0)).await.unwrap();
        Self { db, id, key: device.key }
    }

    async fn order(&self, at: i64) -> Result<CommandId> {
        let new = New { name: "reboot".parse().unwrap(), params: Document::new(), deadline: noon(at + 60) };
        let mut tx = self.db.pool().begin().await.unwrap();
        let made = create(&mut tx, (self.key, &self.id), &new, "usr_1", &BOUNDS, noon(at)).await?;
        tx.commit().await.unwrap();
        Ok(made.id)
    }

    async fn send(&self, connection: ConnectionId, at: i64) -> Vec<CommandId> {
        let mut tx = self.db.pool().begin().await.unwrap();
        let sent = to_send(&mut tx, &[(self.key, connection)], noon(at)).await.unwrap();
        tx.commit().await.unwrap();
        sent.into_iter().map(|sent| sent.id).collect()
    }

    async fn say(&self, id: CommandId, payload: Value, at: i64) -> Outcome {
        let response = Response::decode(payload.to_string().as_bytes(), 1000).unwrap();
        let mut tx = self.db.pool().begin().await.unwrap();
        let outcome = respond(&mut tx, self.key, id, &response, noon(at)).await.unwrap();
        tx.commit().await.unwrap();
        outcome
    }

    async fn deliver(&self, id: CommandId, at: i64) -> u64 {
        let mut conn = self.db.pool().acquire().await.unwrap();
        deliver(&mut conn, &[(self.key, id)], noon(at)).await.unwrap()
    }

    async fn read(&self, id: CommandId) -> Command {
        find(&mut self.db.pool().acquire().await.unwrap(), self.db.tenant(), id).await.unwrap()
    }

    async fn states(&self, id: CommandId) -> Vec<Value> {
        let steps = self.read(id).await.steps;
        steps.as_array().unwrap().iter().map(|step| step["state"].clone()).collect()
    }
}

#[tokio::test]
async fn a_command_goes_its_way_and_each_step_has_its_time() {
    let boiler = Boiler::new().await;
    let id = boiler.order(0).await.unwrap();
    assert_eq!(dispatch::due(&mut boiler.db.pool().acquire().await.unwrap(), 9).await.unwrap().len(), 1);
    assert!(boiler.read(id).await.waits_for(None).unwrap().contains("never seen"));
    let connection = ConnectionId::new();
    assert_eq!(boiler.send(connection, 1).await, [id]);
    assert_eq!(boiler.send(connection, 2).await, [], "once on a connection");
    assert_eq!((boiler.deliver(id, 3).await, boiler.deliver(id, 3).await), (1, 0));
    assert_eq!(boiler.send(ConnectionId::new(), 4).await, [], "the device has it");
    assert_eq!(
        boiler.say(id, json!({ "status": "in_progress", "progress": 40 }), 5).await,
        Outcome::Taken(State::InProgress)
    );
    assert_eq!(boiler.read(id).await.waits_for(None).unwrap(), "the device works on it: 40 %");
    assert_eq!(
        boiler.say(id, json!({ "status": "in_progress", "progress": 80 }), 6).await,
        Outcome::Taken(State::InProgress)
    );
    let end = json!({ "status": "succeeded", "result": { "lines": 3 } });
    assert_eq!(boiler.say(id, end.clone(), 7).await, Outcome::Taken(State::Succeeded));
    assert_eq!(boiler.say(id, end, 8).await, Outcome::Repeated);
    let command = boiler.read(id).await;
    assert_eq!(
        (command.state, command.progress, command.result),
        (State::Succeeded, Some(80.0), Some(json!({ "lines": 3 })))
    );
    assert_eq!(command.steps[2]["at"], "2025-11-21T11:00:03.000Z");
    assert_eq!(boiler.states(id).await, ["queued", "sent", "delivered", "in_progress", "succeeded"]);
}

#[tokio::test]
async fn what_is_said_too_late_is_evidence_and_changes_nothing() {
    let boiler = Boiler::new().await;
    let (cancelled, expired, timed_out) =
        (boiler.order(0).await.unwrap(), boiler.order(0).await.unwrap(), boiler.order(0).await.unwrap());
    let mut conn = boiler.db.pool().acquire().await.unwrap();
    let (before, after) = cancel(&mut conn, boiler.db.tenant(), cancelled, "usr_1", noon(1)).await.unwrap();
    assert_eq!((before.state, after.state), (State::Queued, State::Cancelled));
    let again = cancel(&mut conn, boiler.db.tenant(), cancelled, "usr_1", noon(1)).await;
    assert!(matches!(again, Err(Error::CommandFinished(_))));
    assert_eq!(boiler.send(ConnectionId::new(), 2).await, [expired, timed_out]);
    boiler.deliver(timed_out, 3).await;
    assert_eq!(work(boiler.db.pool(), noon(59)).await.unwrap(), 0);
    assert_eq!(work(boiler.db.pool(), noon(60)).await.unwrap(), 2);
    for (id, state) in [(cancelled, State::Cancelled), (expired, State::Expired), (timed_out, State::TimedOut)] {
        assert_eq!(boiler.say(id, json!({ "status": "succeeded" }), 61).await, Outcome::Late(state));
        let command = boiler.read(id).await;
        assert_eq!((command.state, command.result), (state, None));
        let last = command.steps.as_array().unwrap().last().unwrap().clone();
        assert_eq!((&last["state"], &last["evidence"]["status"]), (&Value::Null, &json!("succeeded")));
    }
    // A device that answers before anybody has seen that the time is up.
    let late = boiler.order(100).await.unwrap();
    assert_eq!(boiler.say(late, json!({ "status": "succeeded" }), 160).await, Outcome::Late(State::TimedOut));
    assert_eq!(boiler.say(CommandId::new(), json!({ "status": "failed" }), 160).await, Outcome::Unknown);
}

#[tokio::test]
async fn what_a_device_has_not_acknowledged_is_sent_again_until_the_deadline() {
    let boiler = Boiler::new().await;
    let id = boiler.order(0).await.unwrap();
    for n in 1..=60 {
        let expected = if n < 60 { vec![id] } else { vec![] };
        assert_eq!(boiler.send(ConnectionId::new(), n).await, expected, "{n}");
    }
    assert_eq!(boiler.states(id).await.len(), usize::try_from(MAX_STEPS).unwrap(), "steps that repeat are bounded");
    assert_eq!(work(boiler.db.pool(), noon(60)).await.unwrap(), 1);
    assert_eq!(boiler.read(id).await.state, State::Expired);
}

#[tokio::test]
async fn open_commands_params_and_finished_rows_are_bounded() {
    let boiler = Boiler::new().await;
    let ordered = futures::future::join_all((0..5).map(|_| boiler.order(0))).await;
    assert_eq!(ordered.iter().filter(|made| made.is_ok()).count(), BOUNDS.max_open);
    assert!(ordered.iter().all(|made| matches!(made, Ok(_) | Err(Error::TooMany { most: 3, .. }))));
    let mut conn = boiler.db.pool().acquire().await.unwrap();
    let mut try_params = async |params: Value| {
        let new = New { name: "x".parse().unwrap(), params: crate::shadow::document(params), deadline: noon(60) };
        create(&mut conn, (boiler.key, &boiler.id), &new, "usr_1", &BOUNDS, noon(0)).await
    };
    assert!(matches!(try_params(json!({ "x": "x".repeat(100) })).await, Err(Error::Invalid(_))));
    assert!(matches!(try_params(json!({ "x": "\u{0}" })).await, Err(Error::Invalid(_))));
    work(boiler.db.pool(), noon(60)).await.unwrap();
    let mut conn = boiler.db.pool().acquire().await.unwrap();
    let newest = page(&mut conn, boiler.key, None, None, 2).await.unwrap();
    let rest = page(&mut conn, boiler.key, Some(State::Expired), Some(newest[1].id), 2).await.unwrap();
    assert_eq!((newest.len(), rest.len()), (2, 1));
    assert_eq!(forget(&mut conn, noon(60), 10).await.unwrap(), 0);
    assert_eq!(forget(&mut conn, noon(60) + TimeDelta::days(1), 10).await.unwrap(), 3);
}

#[test]
fn a_response_that_is_none_says_what_was_expected() {
    for payload in [
        "",
        "[]",
        "{}",
        r#"{"status":"queued"}"#,
        r#"{"status":"failed","progress":101}"#,
        r#"["failed"]"#,
        "{\"status\":\"failed\",\"error\":\"\\u0000\"}",
    ] {
        assert!(Response::decode(payload.as_bytes(), 1000).is_err(), "{payload}");
    }
    assert!(Response::decode(br#"{"status":"failed"}"#, 5).is_err());
    for name in ["", "Reboot", "a b", "a/b", &"x".repeat(65)] {
        assert!(name.parse::<Name>().is_err(), "{name}");
    }
}

proptest! {
    #[test]
    fn no_payload_panics(payload in "\\PC{0,40}|\\{\"status\":\"(failed|succeeded)\",\"[a-z]{1,8}\":[0-9.e-]{0,6}\\}") {
        let _ = Response::decode(payload.as_bytes(), 1000);
    }
}
