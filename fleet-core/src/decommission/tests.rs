use std::collections::BTreeSet;

use sqlx::{AssertSqlSafe, Executor};

use super::*;
use crate::device::{NewDevice, Patch, enrol};
use crate::revocation::Reason;
use crate::testing::TestDb;

/// Tables that keep the name of a device that is gone: who did what, and the report of the purge itself.
const KEPT: [(&str, &str); 2] = [("audit", "device"), ("decommission", "device_id")];
/// Columns that are called after devices and name none.
const NOT_A_DEVICE: [(&str, &str); 2] = [("claim", "max_devices"), ("device", "decommissioned_at")];

fn now() -> DateTime<Utc> {
    "2025-11-21T12:00:00Z".parse().unwrap()
}

fn id(name: &str) -> DeviceId {
    name.parse().unwrap()
}

/// Enrols a device with something in every table that knows devices; with so many readings in each of three partitions.
async fn full(db: &TestDb, name: &str, readings: u32) -> DeviceKey {
    let mut conn = db.pool().acquire().await.unwrap();
    let (device, _) = enrol(&mut conn, db.tenant(), &NewDevice::named(id(name)), now()).await.unwrap();
    crate::retention::ensure_partitions(&mut conn, now()).await.unwrap();
    let (key, tenant) = (device.key.0, db.tenant().0);
    conn.execute(AssertSqlSafe(format!(
        "insert into shape (tenant_key, digest, metrics, kinds) values ({tenant}, 'x', '{{t}}', 'n') on conflict do nothing;
         insert into telemetry (device_key, ts, seq, shape_id, nums)
         select {key}, day + n * interval '1 s', n, (select min(id) from shape), '{{1}}'
           from unnest(array['2020-01-01', '2025-11-20', '2025-11-21']::timestamptz[]) day, generate_series(1, {readings}) n;
         insert into log (device_key, ts, seq, writer, place, level, message, cut) select {key}, now(), n, 0, n, 3, 'm', 0 from generate_series(1, 7) n;
         insert into log_suppressed values ({key}, now(), 9);
         insert into device_latest values ({key}, now(), '{{}}');
         insert into device_status (device_key, state, state_since, last_seen_at) values ({key}, 'online', now(), now());
         insert into shadow (device_key, version, desired, reported, updated_at) values ({key}, 7, '{{}}', '{{}}', now());
         insert into shadow_history select {key}, n, '{{}}', '{{}}', 'device', now() from generate_series(1, 7) n;
         insert into log_level values ({key}, 'debug', null, now(), 'x', now());
         insert into command (id, device_key, name, params, state, deadline, steps, created_by, created_at, updated_at)
         select gen_random_uuid(), {key}, 'c', '{{}}', 'queued', now(), '[]', 'x', now(), now() from generate_series(1, 7);
         insert into dispatch values ({key}, 'shadow', 1, now());
         insert into dead_letter select gen_random_uuid(), {tenant}, '{name}', 't', 'r', 'p', now() from generate_series(1, 7);
         insert into connection_event (id, tenant_key, device_key, client_id, kind, detail, count, at, minute)
         values (gen_random_uuid(), {tenant}, {key}, '{name}', 'flapping', '{{}}', 1, now(), now());
         with s as (insert into session (id, name, tenant_key, device_key, client_id, expiry_s, connected, since, created_at)
                    values (gen_random_uuid(), '{name}', {tenant}, {key}, '{name}', 60, false, now(), now()) returning id),
              u as (insert into session_subscription select id, 'd', 'f', 1, false, false from s),
              r as (insert into session_received select id, 1 from s)
         insert into session_message (session_id, msg_offset, qos, retain, bytes, subscription_ids, accepted_at, topic, payload)
         select id, n, 1, false, 1, '{{}}', now(), 't', 'p' from s, generate_series(1, 7) n;
         insert into retained_message (digest, topic, qos, payload, accepted_at)
         select sha256(topic::bytea), topic, 1, 'p', now()
           from unnest(array['fleet/v1/main/{name}/status', 'fleet/v1/main/{name}/shadow/get', 'fleet/v1/main/{name}x/status']) topic;
         with c as (insert into claim (id, tenant_key, name, secret_hash, approval, max_devices, created_by, created_at, expires_at)
                    values (gen_random_uuid(), {tenant}, '{name}', '{name}', 'auto', 1, gen_random_uuid(), now(), now()) returning id)
         insert into claim_request (id, claim_id, tenant_key, device_id, nonce, token_hash, labels, asker, address, state, device_key, asked_at, last_asked_at)
         select gen_random_uuid(), id, {tenant}, '{name}', 'n', 'h', '{{}}', '{name}', 'a', 'approved', {key}, now(), now() from c;
         insert into device (tenant_key, id, gateway_key, created_at, updated_at) values ({tenant}, '{name}-child', {key}, now(), now());"
    )))
    .await
    .unwrap();
    device.key
}

/// How many rows of each table of the schema name the device, by the catalogue and not by what this module knows.
async fn traces(db: &TestDb, key: DeviceKey, name: &str) -> BTreeMap<(String, String), i64> {
    let columns: Vec<(String, String)> = sqlx::query_as(
        "select c.table_name::text, c.column_name::text
           from information_schema.columns c join pg_class k on k.relname = c.table_name and not k.relispartition
          where c.table_schema = 'public' and k.relkind in ('r', 'p')
            and (c.column_name like '%device%' or c.column_name like '%gateway%' or c.column_name = 'topic')
          union select 'device', 'key' union select 'device', 'id'",
    )
    .fetch_all(db.pool())
    .await
    .unwrap();
    let mut found = BTreeMap::new();
    for (table, column) in columns {
        if NOT_A_DEVICE.contains(&(&table, &column)) {
            continue;
        }
        let sql = format!(
            "select count(*) from {table}
              where {column}::text in ('{}', '{name}') or starts_with({column}::text, 'fleet/v1/main/{name}/')",
            key.0
        );
        found.insert((table, column), sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(db.pool()).await.unwrap());
    }
    found
}

async fn asked(db: &TestDb, name: &str, purge: bool) -> Decommission {
    let mut tx = db.pool().begin().await.unwrap();
    let (_, report) = begin(&mut tx, db.tenant(), &id(name), purge, UserId::new(), now()).await.unwrap();
    tx.commit().await.unwrap();
    report
}

/// Works until nothing is left to do: how many goes that took.
async fn until_done(db: &TestDb, rows: u32) -> usize {
    for goes in 1..100 {
        if work(db.pool(), rows, now() + SETTLE).await.unwrap().unfinished == 0 {
            return goes;
        }
    }
    panic!("it never ends");
}

async fn report(db: &TestDb, asked: &Decommission) -> Decommission {
    find(&mut db.pool().acquire().await.unwrap(), db.tenant(), asked.id).await.unwrap()
}

#[tokio::test]
async fn after_a_purge_no_table_of_the_schema_knows_the_device() {
    let db = TestDb::new().await;
    let (boiler, pump) = (full(&db, "boiler-1", 40).await, full(&db, "pump-1", 40).await);
    let (before, others) = (traces(&db, boiler, "boiler-1").await, traces(&db, pump, "pump-1").await);
    let told = asked(&db, "boiler-1", true).await;
    for ((table, column), rows) in &before {
        let is_later = KEPT.contains(&(table, column)) || table == "decommission";
        // What waits for sessions has topics of anybody; theirs are found through the session.
        let is_of_sessions = table == "session_message";
        let is_of_dead_letters = (table.as_str(), column.as_str()) == ("dead_letter", "topic");
        assert!(*rows > 0 || is_later || is_of_sessions || is_of_dead_letters, "{table}.{column}: have `full` fill it");
    }
    assert_eq!(work(db.pool(), 10, now()).await.unwrap(), Worked::default(), "what is under way may arrive first");
    until_done(&db, 10).await;
    let after = traces(&db, boiler, "boiler-1").await;
    let left =
        after.iter().filter(|(place, rows)| **rows > 0 && !KEPT.iter().any(|kept| *kept == (&place.0, &place.1)));
    assert_eq!(left.collect::<Vec<_>>(), [], "add these to `Part`");
    let orphans =
        "select count(*) from session_message m where not exists (select from session s where s.id = m.session_id)";
    assert_eq!(sqlx::query_scalar::<_, i64>(orphans).fetch_one(db.pool()).await.unwrap(), 0);
    let kept = traces(&db, pump, "pump-1").await;
    assert_eq!(kept, others, "another device keeps what it has");

    let report = report(&db, &told).await;
    let expected = [
        ("claim_request", 1),
        ("command", 7),
        ("connection_event", 1),
        ("credential", 1),
        ("dead_letter", 7),
        ("device", 1),
        ("device_latest", 1),
        ("device_status", 1),
        ("dispatch", 1),
        ("log", 7),
        ("log_level", 1),
        ("log_suppressed", 1),
        ("retained_message", 2),
        ("session", 1),
        ("session_message", 7),
        ("session_received", 1),
        ("session_subscription", 1),
        ("shadow", 1),
        ("shadow_history", 7),
        ("telemetry", 120),
    ];
    assert_eq!(report.deleted, expected.map(|(table, rows)| (table.to_owned(), rows)).into());
    assert_eq!(report.left, Some(expected.map(|(table, _)| (table.to_owned(), 0)).into()));
    assert_eq!(report.finished_at, Some(now() + SETTLE));
    let written: (String, String, String) =
        sqlx::query_as("select action, actor_name, after from audit").fetch_one(db.pool()).await.unwrap();
    assert_eq!((written.0.as_str(), written.1.as_str()), ("decommission.finish", "decommission"));
    assert!(written.2.contains(r#""telemetry":120"#) && written.2.contains(r#""telemetry":0"#), "{}", written.2);
}

#[tokio::test]
async fn the_names_of_the_parts_are_those_that_are_counted() {
    let db = TestDb::new().await;
    let key = full(&db, "boiler-1", 1).await;
    let target = Target { tenant: db.tenant(), key, id: id("boiler-1"), topics: "fleet/v1/main/boiler-1/".to_owned() };
    let counted = part::count(&mut db.pool().acquire().await.unwrap(), &target).await.unwrap();
    let parts = Part::of(true).iter().chain([&Part::Device]).map(|part| part.name().to_owned());
    assert_eq!(counted.into_keys().collect::<BTreeSet<_>>(), parts.collect());
}

#[tokio::test]
async fn no_transaction_deletes_more_than_it_may_and_each_counts_its_own() {
    let db = TestDb::new().await;
    full(&db, "boiler-1", 40).await;
    let told = asked(&db, "boiler-1", true).await;
    let mut conn = db.pool().acquire().await.unwrap();
    let mut steps = Vec::new();
    while let Step::Deleted(gone) = step(&mut conn, told.id, 50, now()).await.unwrap() {
        steps.push(gone);
        let so_far = report(&db, &told).await.deleted.into_values().sum::<i64>();
        assert_eq!(so_far, steps.iter().sum::<u64>().cast_signed(), "what was deleted is in the report with it");
    }
    assert_eq!(steps[..3], [50, 50, 20], "readings of three days");
    assert!(steps.iter().all(|gone| *gone <= 50), "{steps:?}");
    assert_eq!(step(&mut conn, told.id, 50, now()).await.unwrap(), Step::Waits, "it is finished");
}

#[tokio::test]
async fn several_at_once_do_not_count_anything_twice_and_who_is_interrupted_loses_nothing() {
    let db = TestDb::new().await;
    full(&db, "boiler-1", 100).await;
    let told = asked(&db, "boiler-1", true).await;
    let mut cancelled = db.pool().begin().await.unwrap();
    let (_, _, target) = locked(&mut cancelled, told.id).await.unwrap().unwrap();
    assert_eq!(Part::Telemetry.delete(&mut cancelled, &target, 10, now()).await.unwrap(), 10);
    assert_eq!(work(db.pool(), 10, now() + SETTLE).await.unwrap().rows, 0, "somebody else is at it");
    drop(cancelled);
    let each = || until_done(&db, 7);
    tokio::join!(each(), each(), each());
    assert_eq!(report(&db, &told).await.deleted["telemetry"], 300);
}

#[tokio::test]
async fn without_a_purge_the_device_stays_outside_with_its_readings() {
    let db = TestDb::new().await;
    let key = full(&db, "boiler-1", 3).await;
    let told = asked(&db, "boiler-1", false).await;
    until_done(&db, 100).await;
    let done = report(&db, &told).await;
    let deleted = [
        "dispatch",
        "log_level",
        "retained_message",
        "session",
        "session_message",
        "session_received",
        "session_subscription",
    ];
    assert_eq!(done.deleted.keys().collect::<Vec<_>>(), deleted);
    assert_eq!(done.left.unwrap().into_iter().collect::<Vec<_>>(), deleted.map(|table| (table.to_owned(), 0)));
    let readings = sqlx::query_scalar::<_, i64>("select count(*) from telemetry where device_key = $1").bind(key.0);
    assert_eq!(readings.fetch_one(db.pool()).await.unwrap(), 9);

    let mut conn = db.pool().acquire().await.unwrap();
    let device = device::find(&mut conn, db.tenant(), &id("boiler-1")).await.unwrap();
    assert_eq!((device.disabled, device.decommissioned_at), (true, Some(now())));
    let child = device::find(&mut conn, db.tenant(), &id("boiler-1-child")).await.unwrap();
    assert_eq!((child.gateway, child.disabled), (None, false));
    let credentials = credential::list(&mut conn, db.tenant(), &id("boiler-1")).await.unwrap();
    assert!(credentials.iter().all(|credential| credential.revoked_at == Some(now())), "{credentials:?}");
    let back = Patch { disabled: Some(false), ..Patch::default() };
    let refused = device::update(&mut conn, db.tenant(), &id("boiler-1"), &back, &[], now()).await;
    assert!(matches!(refused, Err(Error::Decommissioned(_))), "{refused:?}");
    let refused = credential::issue(&mut conn, db.tenant(), &id("boiler-1"), now()).await;
    assert!(matches!(refused, Err(Error::Decommissioned(_))), "{refused:?}");
    let refused = credential::rotate(&mut conn, db.tenant(), &id("boiler-1"), 0, now()).await;
    assert!(matches!(refused, Err(Error::Decommissioned(_))), "{refused:?}");
    let first = credentials[0].id;
    credential::revoke(&mut conn, db.tenant(), &id("boiler-1"), first, Reason::default(), now()).await.unwrap();
    drop(conn);

    // It can be purged later.
    let purge = asked(&db, "boiler-1", true).await;
    assert_ne!(purge.id, told.id);
    until_done(&db, 100).await;
    assert_eq!(report(&db, &purge).await.deleted["telemetry"], 9);
    assert_eq!(report(&db, &told).await.finished_at, done.finished_at);
}

#[tokio::test]
async fn asked_again_it_is_the_same_and_may_become_a_purge() {
    let db = TestDb::new().await;
    full(&db, "boiler-1", 3).await;
    let first = asked(&db, "boiler-1", false).await;
    let again = asked(&db, "boiler-1", true).await;
    assert_eq!((again.id, again.purge, again.asked_by), (first.id, true, first.asked_by));
    assert!(asked(&db, "boiler-1", false).await.purge, "what was wanted stays wanted");
    until_done(&db, 100).await;
    let mut conn = db.pool().acquire().await.unwrap();
    assert!(device::find(&mut conn, db.tenant(), &id("boiler-1")).await.is_err());
    let nobody = begin(&mut conn, db.tenant(), &id("boiler-1"), true, UserId::new(), now()).await;
    assert!(matches!(nobody, Err(Error::NoSuchDevice(_))), "{nobody:?}");
    // The name is free, and its next owner inherits nothing.
    let (next, _) = enrol(&mut conn, db.tenant(), &NewDevice::named(id("boiler-1")), now()).await.unwrap();
    drop(conn);
    let found = traces(&db, next.key, "boiler-1").await;
    assert_eq!(found[&("telemetry".to_owned(), "device_key".to_owned())], 0);
}

#[tokio::test]
async fn nothing_is_deleted_while_a_broker_is_silent() {
    let db = TestDb::new().await;
    full(&db, "boiler-1", 3).await;
    asked(&db, "boiler-1", true).await;
    let mut conn = db.pool().acquire().await.unwrap();
    let broker = Uuid::new_v4();
    control::renew(&mut conn, broker).await.unwrap();
    let worked = work(db.pool(), 100, now() + SETTLE).await.unwrap();
    assert_eq!(worked, Worked { unfinished: 1, ..Worked::default() });
    control::retire(&mut conn, broker).await.unwrap();
    assert_eq!(until_done(&db, 100).await, 1);
}

#[tokio::test]
async fn reports_are_pages() {
    let db = TestDb::new().await;
    for name in ["a", "b", "c"] {
        let mut conn = db.pool().acquire().await.unwrap();
        enrol(&mut conn, db.tenant(), &NewDevice::named(id(name)), now()).await.unwrap();
        asked(&db, name, true).await;
    }
    let mut conn = db.pool().acquire().await.unwrap();
    let (first, next) = page(&mut conn, db.tenant(), None, None, 2).await.unwrap();
    let (rest, end) = page(&mut conn, db.tenant(), None, next, 2).await.unwrap();
    let names = |reports: &[Decommission]| reports.iter().map(|one| one.device.to_string()).collect::<Vec<_>>();
    assert_eq!((names(&first), names(&rest), end), (vec!["a".into(), "b".into()], vec!["c".into()], None));
    let (of_b, _) = page(&mut conn, db.tenant(), Some(&id("b")), None, 10).await.unwrap();
    assert_eq!(names(&of_b), ["b"]);
}
