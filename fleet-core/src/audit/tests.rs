use chrono::TimeDelta;
use proptest::prelude::*;
use sqlx::Executor;

use super::*;
use crate::Error;
use crate::clock::from_ms;
use crate::tenancy::{self, Bounds};
use crate::testing::TestDb;

const NOON: i64 = 1_763_726_400_000;

fn system(db: &TestDb) -> Author {
    Author::system(db.tenant(), "test")
}

/// `count` entries, an hour apart.
async fn fill(db: &TestDb, count: i64) {
    let mut conn = db.pool().acquire().await.unwrap();
    for n in 0..count {
        let entry =
            Entry::of("device.update", format!("d-{n}")).before(&json!({ "n": n })).after(&json!({ "n": n + 1 }));
        record(&mut conn, &system(db), &entry, from_ms(NOON + n * 3_600_000)).await.unwrap();
    }
}

async fn verified(db: &TestDb, noted: Option<Head>) -> Report {
    let mut tx = db.pool().begin().await.unwrap();
    verify(&mut tx, db.tenant(), noted).await.unwrap()
}

async fn all(db: &TestDb) -> Vec<Row> {
    rows(&mut db.pool().acquire().await.unwrap(), db.tenant(), 0, 1_000).await.unwrap().0
}

/// What somebody does who may do everything in the database.
async fn tamper(db: &TestDb, sql: &'static str) {
    let mut tx = db.pool().begin().await.unwrap();
    tx.execute("alter table audit disable trigger all").await.unwrap();
    tx.execute(sql).await.unwrap();
    tx.execute("alter table audit enable trigger all").await.unwrap();
    tx.commit().await.unwrap();
}

#[tokio::test]
async fn rows_are_numbered_linked_and_told_as_they_were_written() {
    let db = TestDb::new().await;
    let user = UserId::new();
    sqlx::query("insert into app_user (id, tenant_key, email, password_hash, created_at) values ($1, $2, 'ada@example.com', '', now())")
        .bind(user.uuid())
        .bind(db.tenant().0)
        .execute(db.pool())
        .await
        .unwrap();
    let source =
        Source { address: Some("192.0.2.7".into()), request_id: Some("r-1".into()), user_agent: Some("test\0".into()) };
    let by = Author { tenant: db.tenant(), actor: Actor::User(user), source };
    let mut conn = db.pool().acquire().await.unwrap();
    let device = "boiler-1".parse().unwrap();
    let entry = Entry::of("device.update", "boiler-1")
        .on(&device)
        .before(&json!({"f": 1e100}))
        .after(&json!({"z": 1, "a": "\0"}));
    record(&mut conn, &by, &entry, from_ms(NOON)).await.unwrap();
    record(&mut conn, &system(&db), &Entry::of("api-key.delete", "k"), from_ms(NOON)).await.unwrap();
    // A later name changes nothing.
    conn.execute("update app_user set email = 'other@example.com'").await.unwrap();
    let rows = all(&db).await;
    let first = &rows[0];
    assert_eq!((first.seq, first.prev_hash), (1, [0; 32]));
    assert_eq!(first.actor_name.as_deref(), Some("ada@example.com"));
    assert_eq!((first.actor_kind.as_str(), first.actor_id.clone()), ("user", Some(user.to_string())));
    assert_eq!((first.resource_kind.as_str(), first.device.as_deref()), ("device", Some("boiler-1")));
    assert_eq!(first.after.as_deref(), Some(r#"{"a":"\u0000","z":1}"#));
    assert_eq!(first.user_agent.as_deref(), Some("test\u{fffd}"));
    assert_eq!((rows[1].seq, rows[1].prev_hash, rows[1].resource_kind.as_str()), (2, first.hash, "api-key"));
    let report = verified(&db, None).await;
    assert_eq!((report.rows, report.fault, report.head), (2, None, Head { seq: 2, hash: rows[1].hash }));
}

/// The format as the reference tells it, without the code that writes it.
fn seal_by_the_book(line: &Value) -> String {
    let mut bytes = b"\0\0\0\x0emuster-audit-1".to_vec();
    for name in [
        "prev_hash",
        "tenant",
        "seq",
        "at",
        "actor_kind",
        "actor_id",
        "actor_name",
        "action",
        "resource_kind",
        "resource_id",
        "device",
        "before",
        "after",
        "address",
        "request_id",
        "user_agent",
    ] {
        match &line[name] {
            Value::Null => bytes.extend([0xff; 4]),
            value => {
                let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                bytes.extend(u32::try_from(text.len()).unwrap().to_be_bytes());
                bytes.extend(text.as_bytes());
            }
        }
    }
    hex::encode(Sha256::digest(bytes))
}

#[tokio::test]
async fn an_export_can_be_verified_by_whoever_knows_the_format() {
    let db = TestDb::new().await;
    fill(&db, 3).await;
    let mut before = "0".repeat(64);
    for row in all(&db).await {
        let line = serde_json::to_value(&row).unwrap();
        assert_eq!(line["prev_hash"], before.as_str());
        assert_eq!(line["hash"], seal_by_the_book(&line));
        before = line["hash"].as_str().unwrap().to_owned();
        assert_eq!(serde_json::from_value::<Row>(line).unwrap(), row);
    }
}

#[tokio::test]
async fn whatever_is_done_to_a_row_is_found_where_it_was_done() {
    for (sql, fault) in [
        ("update audit set after = '{}' where seq = 3", Fault::Changed { seq: 3 }),
        ("update audit set actor_name = null where seq = 1", Fault::Changed { seq: 1 }),
        ("update audit set at = at + interval '1 ms' where seq = 5", Fault::Changed { seq: 5 }),
        ("update audit set address = '' where seq = 2", Fault::Changed { seq: 2 }),
        ("update audit set hash = sha256('x') where seq = 4", Fault::Changed { seq: 4 }),
        ("delete from audit where seq = 3", Fault::Missing { seq: 3 }),
        ("delete from audit where seq = 1", Fault::Missing { seq: 1 }),
        ("delete from audit where seq = 5", Fault::Missing { seq: 5 }),
        ("delete from audit where seq > 2", Fault::Missing { seq: 3 }),
        ("truncate audit", Fault::Missing { seq: 1 }),
        (
            "update audit set seq = case seq when 2 then -3 else -2 end where seq in (2, 3); update audit set seq = -seq where seq < 0",
            Fault::Changed { seq: 2 },
        ),
        // The rest is numbered anew, to close the gap.
        (
            "delete from audit where seq = 2; update audit set seq = seq - 1 where seq = 3;
          update audit set seq = seq - 1 where seq = 4; update audit set seq = seq - 1 where seq = 5",
            Fault::Changed { seq: 2 },
        ),
        ("delete from audit where seq = 5; update audit_head set seq = 4", Fault::EndMoved { seq: 4 }),
        ("update audit_head set seq = 4, hash = (select hash from audit where seq = 4)", Fault::EndMoved { seq: 5 }),
        ("update audit_head set hash = sha256('x')", Fault::EndMoved { seq: 5 }),
        ("update audit set prev_hash = sha256('x') where seq = 3", Fault::Changed { seq: 3 }),
        (
            "update audit_head set kept_after = 1, kept_hash = sha256('x'); delete from audit where seq = 1",
            Fault::Unlinked { seq: 2 },
        ),
    ] {
        let db = TestDb::new().await;
        fill(&db, 5).await;
        assert_eq!(verified(&db, None).await.fault, None);
        tamper(&db, sql).await;
        assert_eq!(verified(&db, None).await.fault, Some(fault), "{sql}");
    }
}

#[tokio::test]
async fn a_chain_that_was_made_anew_does_not_contain_what_was_noted() {
    let db = TestDb::new().await;
    fill(&db, 3).await;
    let noted = verified(&db, None).await.head;
    assert_eq!(noted.to_string().parse(), Ok(noted));
    fill(&db, 2).await;
    assert_eq!(verified(&db, Some(noted)).await.fault, None);
    // All rows are gone, and others took their place.
    tamper(&db, "truncate audit; delete from audit_head").await;
    assert_eq!(verified(&db, Some(noted)).await.fault, Some(Fault::Missing { seq: 1 }));
    fill(&db, 2).await;
    assert_eq!(verified(&db, Some(noted)).await.fault, Some(Fault::Missing { seq: 3 }));
    let mut conn = db.pool().acquire().await.unwrap();
    record(&mut conn, &system(&db), &Entry::of("device.delete", "d"), from_ms(NOON)).await.unwrap();
    assert_eq!(verified(&db, None).await.fault, None);
    assert_eq!(verified(&db, Some(noted)).await.fault, Some(Fault::Replaced { seq: 3 }));
}

#[tokio::test]
async fn an_end_that_is_cut_off_with_its_head_is_missed_by_who_noted_it() {
    let db = TestDb::new().await;
    fill(&db, 5).await;
    let noted = verified(&db, None).await.head;
    let sql =
        "delete from audit where seq = 5; update audit_head set seq = 4, hash = (select hash from audit where seq = 4)";
    tamper(&db, sql).await;
    assert_eq!(verified(&db, None).await.fault, None, "nothing in the database tells: docs/reference/audit.md says so");
    assert_eq!(verified(&db, Some(noted)).await.fault, Some(Fault::Missing { seq: 5 }));
}

#[tokio::test]
async fn an_entry_exists_exactly_when_its_change_does() {
    let db = TestDb::new().await;
    fill(&db, 1).await;
    let mut tx = db.pool().begin().await.unwrap();
    record(&mut tx, &system(&db), &Entry::of("device.delete", "d"), from_ms(NOON)).await.unwrap();
    tx.rollback().await.unwrap();
    fill(&db, 1).await;
    assert_eq!(all(&db).await.iter().map(|row| row.seq).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(verified(&db, None).await.fault, None);
}

#[tokio::test]
async fn changes_made_at_once_are_one_chain() {
    let db = TestDb::new().await;
    let write = |n: i64| {
        let (pool, by) = (db.pool().clone(), system(&db));
        async move {
            let mut tx = pool.begin().await.unwrap();
            let entries = [Entry::of("device.enrol", n), Entry::of("device.update", n)];
            record_all(&mut tx, &by, &entries, from_ms(NOON)).await.unwrap();
            tx.commit().await.unwrap();
        }
    };
    futures::future::join_all((0..20).map(write)).await;
    let report = verified(&db, None).await;
    assert_eq!((report.rows, report.fault), (40, None));
    let rows = all(&db).await;
    assert!(
        rows.chunks(2).all(|pair| pair[0].resource_id == pair[1].resource_id),
        "what belongs together stands together"
    );
}

#[tokio::test]
async fn what_changes_nothing_is_not_written_down() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let same = Entry::of("device.update", "d").before(&json!({"a": 1})).after(&json!({"a": 1}));
    record(&mut conn, &system(&db), &same, from_ms(NOON)).await.unwrap();
    assert_eq!(all(&db).await, []);
    let report = verified(&db, None).await;
    assert_eq!((report.rows, report.head, report.fault), (0, Head::START, None));
}

#[tokio::test]
async fn a_body_that_is_too_long_leaves_its_hash() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let long = json!({ "text": "x".repeat(MAX_BODY_BYTES) });
    let entry = Entry::of("role.update", "y".repeat(2 * MAX_TEXT_CHARS)).before(&json!({})).after(&long);
    let recorded = record(&mut conn, &system(&db), &entry, from_ms(NOON)).await.unwrap();
    assert_eq!(recorded, Recorded { cut: 1 });
    let row = all(&db).await.remove(0);
    assert_eq!(row.before.as_deref(), Some("{}"));
    assert_eq!(row.resource_id.len(), MAX_TEXT_CHARS);
    let left: Value = serde_json::from_str(&row.after.unwrap()).unwrap();
    let text = long.to_string();
    assert_eq!(left, json!({ "cut": true, "bytes": text.len(), "sha256": hex::encode(Sha256::digest(text)) }));
    assert_eq!(verified(&db, None).await.fault, None);
}

#[tokio::test]
async fn rows_cannot_be_changed_by_mistake_nor_by_a_request() {
    let db = TestDb::new().await;
    fill(&db, 2).await;
    for sql in ["update audit set after = '{}'", "delete from audit", "truncate audit"] {
        let refused = db.pool().execute(sql).await.unwrap_err().to_string();
        assert!(refused.contains("append-only"), "{sql}: {refused}");
        let mut tx =
            tenancy::begin(db.pool(), &Bounds::of(db.tenant()), std::time::Duration::from_secs(5)).await.unwrap();
        tx.execute("set local muster.audit_retention = 'on'").await.unwrap();
        let refused = tx.execute(sql).await.unwrap_err().to_string();
        assert!(refused.contains("permission denied"), "{sql}: {refused}");
    }
    assert_eq!(verified(&db, None).await.rows, 2);
}

#[tokio::test]
async fn old_rows_go_and_the_rest_is_still_verified() {
    let db = TestDb::new().await;
    fill(&db, 5).await;
    let noted = verified(&db, None).await.head;
    let (cutoff, now) = (from_ms(NOON + 2 * 3_600_000), from_ms(NOON) + TimeDelta::days(9));
    let mut tx = db.pool().begin().await.unwrap();
    assert_eq!(expire(&mut tx, db.tenant(), cutoff, now).await.unwrap(), 2);
    assert_eq!(expire(&mut tx, db.tenant(), cutoff, now).await.unwrap(), 0);
    tx.commit().await.unwrap();
    let rows = all(&db).await;
    assert_eq!(rows.iter().map(|row| row.seq).collect::<Vec<_>>(), [3, 4, 5, 6]);
    assert_eq!((rows[3].action.as_str(), rows[3].actor_name.as_deref()), ("audit.expire", Some("retention")));
    let report = verified(&db, Some(noted)).await;
    assert_eq!((report.rows, report.kept_after, report.fault), (4, 2, None));
    // What is deleted without being written down is missed all the same.
    tamper(&db, "delete from audit where seq = 3").await;
    assert_eq!(verified(&db, None).await.fault, Some(Fault::Missing { seq: 3 }));
}

#[tokio::test]
async fn all_rows_may_be_too_old() {
    let db = TestDb::new().await;
    fill(&db, 2).await;
    let late = from_ms(NOON) + TimeDelta::days(9);
    let mut tx = db.pool().begin().await.unwrap();
    assert_eq!(expire(&mut tx, db.tenant(), late, late).await.unwrap(), 2);
    tx.commit().await.unwrap();
    fill(&db, 1).await;
    let report = verified(&db, None).await;
    assert_eq!((report.rows, report.kept_after, report.fault), (2, 2, None));
}

#[tokio::test]
async fn a_page_is_newest_first_and_keeps_to_its_filter() {
    let db = TestDb::new().await;
    fill(&db, 4).await;
    let mut tx = db.pool().begin().await.unwrap();
    let key = ApiKeyId::new();
    let by = Author { tenant: db.tenant(), actor: Actor::ApiKey(key), source: Source::default() };
    let device = "boiler-1".parse().unwrap();
    let entry = Entry::of("credential.revoke", "crd_1").on(&device).after(&json!({"note": "100%_Ä"}));
    record(&mut tx, &by, &entry, from_ms(NOON)).await.unwrap();
    let none = Filter::default();
    let text = |text: &str| Filter { text: Some(text.to_owned()), ..Filter::default() };
    let of = |actor: &str| Filter { actor: Some(actor.to_owned()), ..Filter::default() };
    let action = |action: &str| Filter { action: Some(action.to_owned()), ..Filter::default() };
    for (filter, expected) in [
        (none.clone(), vec![5, 4, 3, 2, 1]),
        (of("test"), vec![4, 3, 2, 1]),
        (of(&key.to_string()), vec![5]),
        (action("device"), vec![4, 3, 2, 1]),
        (action("device.update"), vec![4, 3, 2, 1]),
        (action("dev"), vec![]),
        (action("credential"), vec![5]),
        (Filter { resource_kind: Some("device".into()), resource_id: Some("d-1".into()), ..none.clone() }, vec![2]),
        (Filter { device: Some(device.clone()), ..none.clone() }, vec![5]),
        (Filter { from: Some(from_ms(NOON + 1)), to: Some(from_ms(NOON + 3 * 3_600_000)), ..none.clone() }, vec![3, 2]),
        (text("100%_ä"), vec![5]),
        (text("0%Ä"), vec![]),
        (text("D-3"), vec![4]),
        (text("\\"), vec![]),
    ] {
        let page = page(&mut tx, db.tenant(), &filter, None, 100).await.unwrap();
        assert_eq!(page.iter().map(|row| row.seq).collect::<Vec<_>>(), expected, "{filter:?}");
    }
    let second = page(&mut tx, db.tenant(), &none, Some(4), 2).await.unwrap();
    assert_eq!(second.iter().map(|row| row.seq).collect::<Vec<_>>(), [3, 2]);
    assert_eq!(find(&mut tx, db.tenant(), 5).await.unwrap().action, "credential.revoke");
    assert!(matches!(find(&mut tx, db.tenant(), 6).await, Err(Error::NoSuchAuditEntry(6))));
}

fn row() -> impl Strategy<Value = Row> {
    let text = || "\\PC{0,12}";
    let maybe = || proptest::option::of("\\PC{0,12}");
    (
        (text(), 1_i64..1_000, 0_i64..4_000_000_000_000, text(), maybe(), maybe(), text(), text(), text()),
        (maybe(), maybe(), maybe(), maybe(), maybe(), maybe(), any::<[u8; 32]>()),
    )
        .prop_map(|(one, two)| {
            let (tenant, seq, at, actor_kind, actor_id, actor_name, action, resource_kind, resource_id) = one;
            let (device, before, after, address, request_id, user_agent, prev_hash) = two;
            let at = from_ms(at);
            Row {
                tenant,
                seq,
                at,
                actor_kind,
                actor_id,
                actor_name,
                action,
                resource_kind,
                resource_id,
                device,
                before,
                after,
                address,
                request_id,
                user_agent,
                prev_hash,
                hash: [0; 32],
            }
        })
}

proptest! {
    #[test]
    fn different_rows_have_different_seals_and_an_export_reads_as_it_was_written(one in row(), other in row()) {
        prop_assert_eq!(one == other, one.seal() == other.seal());
        let line = serde_json::to_string(&one).unwrap();
        prop_assert_eq!(serde_json::from_str::<Row>(&line).unwrap(), one);
    }

    #[test]
    fn what_moves_from_one_field_to_the_next_is_seen(row in row(), by in 0_usize..12) {
        let mut moved = row.clone();
        let all = format!("{}{}", row.action, row.resource_kind);
        let at = all.char_indices().map(|(at, _)| at).nth(by).unwrap_or(all.len());
        let (action, kind) = all.split_at(at);
        (moved.action, moved.resource_kind) = (action.to_owned(), kind.to_owned());
        prop_assert_eq!(moved == row, moved.seal() == row.seal());
    }

    #[test]
    fn no_text_is_taken_for_a_head_that_is_none(text in "\\PC{0,80}|[0-9]{1,3}:[0-9a-f]{62,66}") {
        if let Ok(head) = text.parse::<Head>() {
            let printed = head.to_string();
            prop_assert_eq!(printed.trim_start_matches('0'), text.trim_start_matches(['+', '0']));
        }
    }
}
