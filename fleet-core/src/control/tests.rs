use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chrono::{DateTime, Utc};
use sqlx::PgPool;

use super::*;
use crate::Error;
use crate::clock::{Clock, from_ms};
use crate::credential;
use crate::device::{self, NewDevice, Patch};
use crate::gateway::Children;
use crate::id::{ConnectionId, DeviceId, SessionId, TenantKey, UserId};
use crate::policy::{Grants, Principal, Proof, Role, Who};
use crate::revocation::Reason;
use crate::role::Roles;
use crate::testing::TestDb;
use crate::user;

const NOON: i64 = 1_763_722_800_000;

async fn epoch(db: &TestDb) -> i64 {
    look(&mut db.pool().acquire().await.unwrap(), Uuid::nil()).await.unwrap().epoch
}

#[tokio::test]
async fn every_change_of_rights_raises_the_epoch_and_no_other() {
    let db = TestDb::new().await;
    let (id, now) = ("boiler-1".parse().unwrap(), from_ms(NOON));
    let mut conn = db.pool().acquire().await.unwrap();
    let mut seen = epoch(&db).await;
    let mut rose_by = async || {
        let before = std::mem::replace(&mut seen, epoch(&db).await);
        seen - before
    };
    let (_, first) = device::enrol(&mut conn, db.tenant(), &NewDevice::named(id), now).await.unwrap();
    let id = "boiler-1".parse().unwrap();
    assert_eq!(rose_by().await, 0, "nobody can be connected as a new device");
    let patch = Patch { group: Some(Some("site".parse().unwrap())), ..Patch::default() };
    device::update(&mut conn, db.tenant(), &id, &patch, &[], now).await.unwrap();
    assert_eq!(rose_by().await, 1, "it may be in somebody's scope now");
    device::update(&mut conn, db.tenant(), &id, &patch, &[], now).await.unwrap();
    assert_eq!(rose_by().await, 0, "nothing has changed");
    let patch = Patch { disabled: Some(true), ..Patch::default() };
    device::update(&mut conn, db.tenant(), &id, &patch, &[], now).await.unwrap();
    assert_eq!(rose_by().await, 1);
    credential::rotate(&mut conn, db.tenant(), &id, 60, now).await.unwrap();
    assert_eq!(rose_by().await, 1);
    credential::revoke(&mut conn, db.tenant(), &id, first.id, Reason::default(), now).await.unwrap();
    assert_eq!(rose_by().await, 1);
    device::delete(&mut conn, db.tenant(), &id, &[], now).await.unwrap();
    assert_eq!(rose_by().await, 1);
}

#[tokio::test]
async fn a_change_that_is_rolled_back_raises_nothing() {
    let db = TestDb::new().await;
    let before = epoch(&db).await;
    let mut tx = db.pool().begin().await.unwrap();
    bump(&mut tx).await.unwrap();
    tx.rollback().await.unwrap();
    assert_eq!(epoch(&db).await, before);
}

// Rights

fn boiler() -> DeviceId {
    "boiler-1".parse().unwrap()
}

/// A device that is connected by its first credential.
async fn connected(db: &TestDb) -> Principal {
    let mut conn = db.pool().acquire().await.unwrap();
    let (_, issued) = device::enrol(&mut conn, db.tenant(), &NewDevice::named(boiler()), from_ms(NOON)).await.unwrap();
    let secret = issued.password.expose().as_bytes();
    credential::verify(&mut conn, &issued.username, secret, from_ms(NOON)).await.unwrap().expect("the right secret")
}

async fn verdict(db: &TestDb, principal: &Principal, now: DateTime<Utc>) -> Option<Verdict> {
    let mut conn = db.pool().acquire().await.unwrap();
    let mut verdicts = recheck(&mut conn, &Roles::default(), &[principal], now).await.unwrap();
    assert!(verdicts.len() <= 1 && verdicts.iter().all(|(place, _)| *place == 0), "{verdicts:?}");
    verdicts.pop().map(|(_, verdict)| verdict)
}

async fn disable(db: &TestDb, disabled: bool) {
    let patch = Patch { disabled: Some(disabled), ..Patch::default() };
    let mut tx = db.pool().begin().await.unwrap();
    device::update(&mut tx, db.tenant(), &boiler(), &patch, &[], from_ms(NOON)).await.unwrap();
    tx.commit().await.unwrap();
}

#[tokio::test]
async fn a_device_that_is_disabled_or_deleted_may_not_stay() {
    let db = TestDb::new().await;
    let principal = connected(&db).await;
    assert_eq!(verdict(&db, &principal, from_ms(NOON)).await, None);
    disable(&db, true).await;
    assert_eq!(verdict(&db, &principal, from_ms(NOON)).await, Some(Verdict::Ended(Ended::DeviceDisabled)));
    disable(&db, false).await;
    assert_eq!(verdict(&db, &principal, from_ms(NOON)).await, None);
    let mut tx = db.pool().begin().await.unwrap();
    device::delete(&mut tx, db.tenant(), &boiler(), &[], from_ms(NOON)).await.unwrap();
    tx.commit().await.unwrap();
    assert_eq!(verdict(&db, &principal, from_ms(NOON)).await, Some(Verdict::Ended(Ended::DeviceDeleted)));
    assert!(Ended::DeviceDeleted.is_for_good() && !Ended::DeviceDisabled.is_for_good());
}

#[tokio::test]
async fn a_connection_ends_with_the_credential_it_came_by_and_no_other() {
    let db = TestDb::new().await;
    let principal = connected(&db).await;
    let mut conn = db.pool().acquire().await.unwrap();
    let second = credential::rotate(&mut conn, db.tenant(), &boiler(), 60, from_ms(NOON)).await.unwrap();
    let until = from_ms(NOON + 60_000);
    assert_eq!(verdict(&db, &principal, from_ms(NOON)).await, Some(Verdict::Until(until)));
    let known = Principal { proof: Proof { valid_until: Some(until), ..principal.proof }, ..principal.clone() };
    assert_eq!(verdict(&db, &known, from_ms(NOON)).await, None, "nothing new");
    assert_eq!(verdict(&db, &principal, until).await, Some(Verdict::Ended(Ended::CredentialEnded)), "it expired");
    let proof = Proof { credential: Some(second.id), ..Proof::default() };
    let renewed = Principal { proof, ..principal.clone() };
    assert_eq!(verdict(&db, &renewed, from_ms(NOON)).await, None);
    credential::rotate(&mut conn, db.tenant(), &boiler(), 0, from_ms(NOON)).await.unwrap();
    for ended in [&principal, &known, &renewed] {
        assert_eq!(verdict(&db, ended, from_ms(NOON)).await, Some(Verdict::Ended(Ended::CredentialEnded)));
    }
    // A proof that has no row of its own, such as a certificate, stands with its device.
    let by_certificate = Principal { proof: Proof::default(), ..principal.clone() };
    assert_eq!(verdict(&db, &by_certificate, from_ms(NOON)).await, None);
}

#[tokio::test]
async fn a_user_is_looked_at_again_too() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    user::ensure_admin(&mut conn, None, None, &Clock::system()).await.unwrap();
    let id: UserId =
        sqlx::query_scalar!(r#"select id as "id: UserId" from app_user"#).fetch_one(&mut *conn).await.unwrap();
    let admin = Principal {
        tenant: db.tenant(),
        tenant_id: "main".parse().unwrap(),
        who: Who::User { id, key: None, grants: Grants::of(Some(Role::Admin)), platform: true },
        proof: Proof::default(),
    };
    assert_eq!(verdict(&db, &admin, from_ms(NOON)).await, None);
    sqlx::query!("update app_user set role = null").execute(&mut *conn).await.unwrap();
    let Some(Verdict::Changed(changed)) = verdict(&db, &admin, from_ms(NOON)).await else { panic!("the role is gone") };
    assert_eq!(changed.who, Who::User { id, key: None, grants: Grants::default(), platform: true });
    assert_eq!(verdict(&db, &changed, from_ms(NOON)).await, None);
    sqlx::query!("update app_user set disabled = true").execute(&mut *conn).await.unwrap();
    assert_eq!(verdict(&db, &admin, from_ms(NOON)).await, Some(Verdict::Ended(Ended::UserDisabled)));
    sqlx::query!("delete from app_user").execute(&mut *conn).await.unwrap();
    assert_eq!(verdict(&db, &admin, from_ms(NOON)).await, Some(Verdict::Ended(Ended::UserDeleted)));
}

#[tokio::test]
async fn of_many_each_gets_its_own_verdict() {
    let db = TestDb::new().await;
    let well = connected(&db).await;
    let who = Who::Device { key: crate::id::DeviceKey(-1), id: boiler(), children: Children::default() };
    let gone = Principal { who, ..well.clone() };
    let nobody = Principal {
        who: Who::User { id: UserId::new(), key: None, grants: Grants::default(), platform: false },
        ..well.clone()
    };
    let mut conn = db.pool().acquire().await.unwrap();
    let mut verdicts =
        recheck(&mut conn, &Roles::default(), &[&well, &gone, &nobody, &well, &gone], from_ms(NOON)).await.unwrap();
    verdicts.sort_by_key(|(place, _)| *place);
    let deleted = Verdict::Ended(Ended::DeviceDeleted);
    assert_eq!(verdicts, [(1, deleted.clone()), (2, Verdict::Ended(Ended::UserDeleted)), (4, deleted)]);
    assert_eq!(recheck(&mut conn, &Roles::default(), &[], from_ms(NOON)).await.unwrap(), []);
}

#[tokio::test]
async fn a_gateway_hears_of_its_children() {
    let db = TestDb::new().await;
    let gateway = connected(&db).await;
    let now = from_ms(NOON);
    let mut conn = db.pool().acquire().await.unwrap();
    let before = epoch(&db).await;
    let child: DeviceId = "child".parse().unwrap();
    let new = NewDevice { gateway: Some(boiler()), ..NewDevice::named(child.clone()) };
    let (enrolled, _) = device::enrol(&mut conn, db.tenant(), &new, now).await.unwrap();
    let Some(Verdict::Changed(with_child)) = verdict(&db, &gateway, now).await else { panic!("it has a child now") };
    let Who::Device { children, .. } = &with_child.who else { panic!("it is a device") };
    assert_eq!(children.get("child"), Some((&child, enrolled.key)));
    assert_eq!(with_child.proof, gateway.proof);
    assert_eq!(verdict(&db, &with_child, now).await, None, "that is known");

    // Its credential has an end from now on, and the child goes: both are told.
    credential::rotate(&mut conn, db.tenant(), &boiler(), 60, now).await.unwrap();
    let free = Patch { gateway: Some(None), ..Patch::default() };
    device::update(&mut conn, db.tenant(), &child, &free, &[], now).await.unwrap();
    let verdicts = recheck(&mut conn, &Roles::default(), &[&with_child], now).await.unwrap();
    let until = now + chrono::TimeDelta::seconds(60);
    let alone = Principal { proof: Proof { valid_until: Some(until), ..gateway.proof }, ..gateway.clone() };
    assert_eq!(verdicts, [(0, Verdict::Until(until)), (0, Verdict::Changed(alone.clone()))]);

    let disable = Patch { disabled: Some(true), gateway: Some(Some(boiler())), ..Patch::default() };
    device::update(&mut conn, db.tenant(), &child, &disable, &[], now).await.unwrap();
    assert_eq!(verdict(&db, &alone, now).await, None, "a disabled child is none");
    device::delete(&mut conn, db.tenant(), &boiler(), &[], now).await.unwrap();
    assert_eq!(verdict(&db, &with_child, now).await, Some(Verdict::Ended(Ended::DeviceDeleted)), "and nothing else");
    assert!(epoch(&db).await >= before + 5);
}

// Questions

fn question(db: &TestDb) -> Request {
    Request::Connection { tenant: db.tenant(), id: ConnectionId::new() }
}

const SOON: Duration = Duration::from_millis(300);
const PATIENT: Duration = Duration::from_secs(20);

/// A broker that answers everything with `answer` until it is dropped.
struct Broker {
    id: Uuid,
    stopped: Arc<AtomicBool>,
}

impl Broker {
    async fn start(db: &TestDb, answer: Answer) -> Self {
        let broker = Self { id: Uuid::new_v4(), stopped: Arc::default() };
        renew(&mut db.pool().acquire().await.unwrap(), broker.id).await.unwrap();
        tokio::spawn(serve(db.pool().clone(), broker.id, answer, broker.stopped.clone()));
        broker
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Relaxed);
    }
}

async fn serve(db: PgPool, id: Uuid, says: Answer, stopped: Arc<AtomicBool>) {
    while !stopped.load(Ordering::Relaxed) {
        let Ok(mut db) = db.acquire().await else { return };
        let look = look(&mut db, id).await.unwrap();
        let answers: Vec<_> = look.questions.into_iter().map(|question| (question.id, says.clone())).collect();
        answer(&mut db, id, &answers).await.unwrap();
        drop(db);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn every_live_broker_is_asked_and_its_answer_waited_for() {
    let db = TestDb::new().await;
    let _one = Broker::start(&db, Answer::NotHere).await;
    let _other = Broker::start(&db, Answer::Done).await;
    let began = std::time::Instant::now();
    let answers = ask(db.pool(), &question(&db), PATIENT).await.unwrap();
    assert!(began.elapsed() < PATIENT, "nobody is waited for longer than needed");
    assert_eq!((answers.given.len(), answers.missing.len()), (2, 0));
    assert!(answers.given.contains(&Answer::Done) && answers.given.contains(&Answer::NotHere));
    let left = sqlx::query_scalar!(
        r#"select (select count(*) from control_request) + (select count(*) from control_answer) as "n!""#
    );
    assert_eq!(left.fetch_one(db.pool()).await.unwrap(), 0, "nothing stays behind");
}

#[tokio::test]
async fn a_broker_that_is_silent_is_named_and_one_that_is_dead_is_not_waited_for() {
    let db = TestDb::new().await;
    let refused = ask(db.pool(), &question(&db), SOON).await;
    assert!(matches!(refused, Err(Error::NoBroker("no broker is running"))), "{refused:?}");
    let silent = Uuid::new_v4();
    let mut conn = db.pool().acquire().await.unwrap();
    renew(&mut conn, silent).await.unwrap();
    let refused = ask(db.pool(), &question(&db), SOON).await;
    assert!(matches!(refused, Err(Error::NoBroker("no broker answered in time"))), "{refused:?}");
    let _awake = Broker::start(&db, Answer::Done).await;
    let answers = ask(db.pool(), &question(&db), SOON).await.unwrap();
    assert_eq!((answers.given, answers.missing), (vec![Answer::Done], vec![silent]));
    sqlx::query!("update broker_node set heartbeat_at = now() - interval '11 s' where id = $1", silent)
        .execute(&mut *conn)
        .await
        .unwrap();
    assert_eq!(ask(db.pool(), &question(&db), PATIENT).await.unwrap().missing, Vec::<Uuid>::new(), "its lease is over");
    renew(&mut conn, silent).await.unwrap();
    retire(&mut conn, silent).await.unwrap();
    assert_eq!(ask(db.pool(), &question(&db), PATIENT).await.unwrap().missing, Vec::<Uuid>::new(), "it said good-bye");
}

#[tokio::test]
async fn questions_and_answers_are_bounded() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let broker = Uuid::new_v4();
    renew(&mut conn, broker).await.unwrap();
    let filter = Filter { client_id: Some("x".repeat(MAX_REQUEST_BYTES)), ..Filter::default() };
    let long = Request::Connections { tenant: db.tenant(), filter, after: None, limit: 1 };
    assert!(matches!(ask(db.pool(), &long, SOON).await, Err(Error::Invalid(_))));
    sqlx::query!(
        "insert into control_request (id, request, asked_at, expires_at)
         select gen_random_uuid(), '{}', now(), now() + interval '1 h' from generate_series(1, $1)",
        i32::try_from(MAX_PENDING).unwrap()
    )
    .execute(&mut *conn)
    .await
    .unwrap();
    assert!(matches!(ask(db.pool(), &question(&db), SOON).await, Err(Error::Busy(_))));
    let found = look(&mut conn, broker).await.unwrap().questions;
    assert_eq!(found.len(), usize::try_from(MAX_PENDING).unwrap());
    assert!(found.iter().all(|question| question.request.is_none()), "of a version that is not known");
    let line = TraceLine { seq: 1, at_ms: NOON, direction: Direction::In, text: "x".repeat(MAX_ANSWER_BYTES) };
    let long = Answer::Trace(TraceLines { lines: vec![line], dropped: 0, ends_ms: NOON });
    answer(&mut conn, broker, &[(found[0].id, long.clone()), (found[0].id, long), (Uuid::nil(), Answer::Done)])
        .await
        .unwrap();
    let said = sqlx::query_scalar!("select answer from control_answer").fetch_all(&mut *conn).await.unwrap();
    assert_eq!(said, [serde_json::to_value(Answer::TooLong).unwrap()]);
    sqlx::query!("update control_request set expires_at = now() - interval '1 s'").execute(&mut *conn).await.unwrap();
    assert_eq!(look(&mut conn, broker).await.unwrap().questions, []);
    renew(&mut conn, broker).await.unwrap();
    let left = sqlx::query_scalar!(r#"select count(*) as "n!" from control_request"#);
    assert_eq!(left.fetch_one(&mut *conn).await.unwrap(), 0, "a broker sweeps what nobody waits for");
}

#[test]
fn a_question_is_read_as_it_was_written() {
    let (tenant, id, by) = (TenantKey(1), ConnectionId::new(), UserId::new());
    let filter = Filter { device: Some(boiler()), client_id: Some("ä".into()), transport: Some(Transport::WebSocket) };
    for request in [
        Request::Connections { tenant, filter, after: Some(id), limit: 7 },
        Request::Connection { tenant, id },
        Request::Disconnect { tenant, id, reason: "moved".into(), end_session: true, by },
        Request::TraceStart { tenant, id, session: "main/boiler-1/c".into(), minutes: 5, by },
        Request::TraceStop { tenant, id },
        Request::Trace { tenant, id, after: 9, limit: 10 },
        Request::EndSession { tenant, id: SessionId::new(), by },
    ] {
        let written = serde_json::to_value(&request).unwrap();
        assert_eq!(serde_json::from_value::<Request>(written).unwrap(), request);
    }
}
