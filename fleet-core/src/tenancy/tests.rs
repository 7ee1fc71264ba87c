use std::collections::BTreeMap;

use sqlx::postgres::PgPoolOptions;
use sqlx::{Connection, Executor, PgConnection};

use super::*;
use crate::clock::{Clock, from_ms};
use crate::device::{self, GroupPath, Labels, NewDevice, Patch};
use crate::testing::TestDb;
use crate::{Error, credential, database, dead_letter};

const NOON: i64 = 1_763_722_800_000;

/// What requests may do with tables that belong to no tenant.
const OF_NO_TENANT: [(&str, &str); 1] = [("policy_epoch", "SELECT, UPDATE")];

/// At least one row of a tenant in every table that has a policy. `$t` is the key of the tenant, `$n` a name.
const ROWS: &str = "
    insert into app_user (id, tenant_key, email, password_hash, created_at)
         values (gen_random_uuid(), $t, '$n@example.com', 'x', now());
    insert into device_group (tenant_key, path, created_at) values ($t, 'site/line-3', now());
    insert into firmware_seen (tenant_key, version, first_at) values ($t, '2.0', now());
    insert into role (tenant_key, id, permissions, topic_rules, created_at, updated_at)
         values ($t, 'orders', '{}', '[]', now(), now());
    insert into api_key (id, user_id, name, role, secret_hash, created_at)
         select gen_random_uuid(), id, 'k', 'admin', convert_to('$n', 'UTF8'), now() from app_user where tenant_key = $t;
    insert into saved_search (id, tenant_key, user_id, name, query, shared, created_at, updated_at)
         select gen_random_uuid(), $t, id, 's', '*', true, now(), now() from app_user where tenant_key = $t;
    insert into binding (id, tenant_key, user_id, role, scope, created_at)
         select gen_random_uuid(), $t, id, 'viewer', '{}', now() from app_user where tenant_key = $t;
    insert into login_session (id, user_id, method, family_hash, secret_hash, successor_key, rotated_at, created_at, last_used_at,
                               expires_at, ends_at)
         select gen_random_uuid(), id, 'password', convert_to('$n', 'UTF8'), '', '', now(), now(), now(), now(), now()
           from app_user where tenant_key = $t;
    insert into audit (tenant_key, seq, at, actor_kind, action, resource_kind, resource_id, device, prev_hash, hash)
         values ($t, 1, now(), 'system', 'device.update', 'device', 'boiler-1', 'boiler-1', '', '');
    insert into audit_head (tenant_key, seq, hash) values ($t, 1, '');
    insert into login_failure (kind, subject, user_id, failures, tried_at, blocked_until)
         select 'account', convert_to('$n', 'UTF8'), id, 1, now(), now() from app_user where tenant_key = $t;
    insert into totp (user_id, secret, last_step, created_at)
         select id, '', 0, now() from app_user where tenant_key = $t;
    insert into recovery_code (user_id, code_hash)
         select id, convert_to('$n', 'UTF8') from app_user where tenant_key = $t;
    insert into oidc_identity (issuer, subject, user_id, created_at)
         select 'https://login.example.com', '$n', id, now() from app_user where tenant_key = $t;
    insert into password_reset (user_id, token_hash, created_at, expires_at)
         select id, convert_to('$n', 'UTF8'), now(), now() from app_user where tenant_key = $t;
    insert into device (tenant_key, id, created_at, updated_at) values ($t, 'boiler-1', now(), now());
    insert into credential (id, device_key, secret_hash, created_at)
         select gen_random_uuid(), key, '', now() from device where tenant_key = $t;
    insert into authority (id, tenant_key, name, kind, certificate, fingerprint, subject_digest, not_after, created_at, updated_at)
         values (gen_random_uuid(), $t, 'ca', 'registered', '', '', '', now(), now(), now());
    insert into revocation_list (authority_id, der, number, next_update)
         select id, '', '', now() from authority where tenant_key = $t;
    insert into revoked_certificate (authority_id, serial, revoked_at, reason)
         select id, '', now(), 'unspecified' from authority where tenant_key = $t;
    insert into device_status (device_key, state, state_since, last_seen_at)
         select key, 'online', now(), now() from device where tenant_key = $t;
    insert into device_latest (device_key, newest, doc) select key, now(), '{}' from device where tenant_key = $t;
    insert into shape (tenant_key, digest, metrics, kinds) values ($t, '', '{temp}', 'n');
    insert into telemetry (device_key, ts, seq, shape_id, nums)
         select d.key, now(), 1, s.id, '{21.5}' from device d join shape s using (tenant_key) where tenant_key = $t;
    insert into log (device_key, ts, seq, writer, place, level, message, cut)
         select key, now(), 1, 0, 1, 3, 'm', 0 from device where tenant_key = $t;
    insert into shadow (device_key, version, desired, reported, updated_at)
         select key, 1, '{}', '{}', now() from device where tenant_key = $t;
    insert into shadow_history (device_key, version, desired, reported, by, at)
         select key, 1, '{}', '{}', 'device', now() from device where tenant_key = $t;
    insert into log_level (device_key, level, until, set_by, set_at)
         select key, 'debug', now(), 'x', now() from device where tenant_key = $t;
    insert into command (id, device_key, name, params, state, deadline, steps, created_by, created_at, updated_at)
         select gen_random_uuid(), key, 'c', '{}', 'queued', now(), '[]', 'x', now(), now() from device where tenant_key = $t;
    insert into dispatch (device_key, kind, turn, at) select key, 'shadow', 1, now() from device where tenant_key = $t;
    insert into claim (id, tenant_key, name, secret_hash, approval, max_devices, created_by, created_at, expires_at)
         values (gen_random_uuid(), $t, 'c', convert_to('$n', 'UTF8'), 'auto', 1, gen_random_uuid(), now(), now());
    insert into claim_request (id, claim_id, tenant_key, device_id, nonce, token_hash, labels, asker, address, state, asked_at,
                               last_asked_at)
         select gen_random_uuid(), id, $t, 'freezer-1', 'n', '', '{}', 'a', 'a', 'pending', now(), now()
           from claim where tenant_key = $t;
    insert into decommission (id, tenant_key, device_key, device_id, labels, purge, asked_by, asked_at)
         select gen_random_uuid(), $t, key, id, '{}', false, gen_random_uuid(), now() from device where tenant_key = $t;
    insert into dead_letter (id, tenant_key, device_id, topic, reason, payload, received_at)
         values (gen_random_uuid(), $t, 'boiler-1', 't', 'r', '', now());
    insert into idempotency (tenant_key, user_id, key, request_hash, status, answer, created_at)
         select $t, id, 'k', '', 201, '{}', now() from app_user where tenant_key = $t;
    insert into connection_event (id, tenant_key, device_key, client_id, kind, detail, count, at, minute)
         select gen_random_uuid(), $t, key, id, 'flapping', '{}', 1, now(), now() from device where tenant_key = $t;
    insert into session (id, name, tenant_key, device_key, client_id, expiry_s, connected, since, created_at)
         select gen_random_uuid(), '$n', $t, key, id, 60, true, now(), now() from device where tenant_key = $t;
    insert into session_subscription (session_id, digest, filter, qos, no_local, retain_as_published)
         select id, '', '#', 1, false, false from session where tenant_key = $t;
    insert into session_message (session_id, msg_offset, qos, retain, bytes, subscription_ids, accepted_at, topic, payload)
         select id, 1, 1, false, 10, '{}', now(), 't', '' from session where tenant_key = $t;
";

async fn fill(db: &TestDb, tenant: TenantKey, name: &str) {
    let sql = ROWS.replace("$t", &tenant.0.to_string()).replace("$n", name);
    db.pool().execute(AssertSqlSafe(sql)).await.unwrap();
}

async fn other_tenant(db: &TestDb) -> TenantKey {
    let key = sqlx::query_scalar("insert into tenant (id, created_at) values ('other', now()) returning key");
    TenantKey(key.fetch_one(db.pool()).await.unwrap())
}

async fn bound(db: &TestDb, bounds: &Bounds) -> Transaction<'static, Postgres> {
    begin(db.pool(), bounds, Duration::from_secs(10)).await.unwrap()
}

async fn scoped(db: &TestDb, scope: &str) -> Transaction<'static, Postgres> {
    bound(db, &Bounds::of(db.tenant()).within(scope)).await
}

/// Tables with a policy.
async fn guarded(db: &TestDb) -> Vec<String> {
    let tables = sqlx::query_scalar(
        "select relname::text from pg_class
          where relnamespace = 'public'::regnamespace and relrowsecurity and relkind in ('r', 'p') order by relname",
    );
    tables.fetch_all(db.pool()).await.unwrap()
}

/// Opens the readings of the only device that is to be seen.
async fn open(tx: &mut PgConnection, tenant: TenantKey) {
    device::open(tx, tenant, &"boiler-1".parse().unwrap()).await.unwrap();
}

async fn counts(tx: &mut PgConnection, tables: &[String]) -> BTreeMap<String, i64> {
    let mut counts = BTreeMap::new();
    for table in tables {
        let count = sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from {table}")));
        counts.insert(table.clone(), count.fetch_one(&mut *tx).await.unwrap());
    }
    counts
}

#[tokio::test]
async fn a_table_has_a_policy_or_is_out_of_reach() {
    let db = TestDb::new().await;
    crate::retention::ensure_partitions(&mut db.pool().acquire().await.unwrap(), from_ms(NOON)).await.unwrap();
    let tables: Vec<(String, bool, bool, String)> = sqlx::query_as(
        "select c.relname::text, c.relrowsecurity, exists (select from pg_policy p where p.polrelid = c.oid),
                coalesce((select string_agg(privilege_type, ', ' order by privilege_type)
                            from aclexplode(c.relacl) where grantee = 'muster_tenant'::regrole), '')
           from pg_class c
          where c.relnamespace = 'public'::regnamespace and c.relkind in ('r', 'p', 'v', 'm')",
    )
    .fetch_all(db.pool())
    .await
    .unwrap();
    for (table, secured, has_policy, privileges) in tables {
        let known = OF_NO_TENANT.iter().find(|(known, _)| *known == table).map_or("", |(_, may)| may);
        assert!(
            secured && has_policy || privileges == known,
            "{table} has no policy and requests may {privileges}: see migration 0011"
        );
    }
    let definers: Vec<String> = sqlx::query_scalar(
        "select proname::text from pg_proc where pronamespace = 'public'::regnamespace and prosecdef",
    )
    .fetch_all(db.pool())
    .await
    .unwrap();
    assert_eq!(definers, ["session_queue"], "what goes around the policies is known here");
}

#[tokio::test]
async fn a_tenant_sees_and_changes_its_own_rows_only() {
    let db = TestDb::new().await;
    let tables = guarded(&db).await;
    let (main, other) = (db.tenant(), other_tenant(&db).await);
    fill(&db, main, "main").await;
    fill(&db, other, "other").await;
    for (tenant, foreign) in [(main, other), (other, main)] {
        let mut tx = bound(&db, &Bounds::of(tenant)).await;
        open(&mut tx, tenant).await;
        for (table, seen) in counts(&mut tx, &tables).await {
            assert_eq!(seen, 1, "{table}: there is one row of each tenant (make one in ROWS)");
        }
        let foreign_keys = sqlx::query_scalar::<_, i64>("select key from device where tenant_key = $1").bind(foreign.0);
        assert_eq!(foreign_keys.fetch_all(&mut *tx).await.unwrap(), [0_i64; 0]);
    }
}

#[tokio::test]
async fn how_much_waits_is_told_of_ones_own_sessions() {
    let db = TestDb::new().await;
    let (main, other) = (db.tenant(), other_tenant(&db).await);
    fill(&db, main, "main").await;
    fill(&db, other, "other").await;
    let all = "select array_agg(id) from session";
    let all: Vec<uuid::Uuid> = sqlx::query_scalar(all).fetch_one(db.pool()).await.unwrap();
    let mut tx = bound(&db, &Bounds::of(main)).await;
    let told: Vec<(i64, i64)> =
        sqlx::query_as("select messages, bytes from session_queue($1)").bind(all).fetch_all(&mut *tx).await.unwrap();
    assert_eq!(told, [(1, 10)]);
}

#[tokio::test]
async fn without_a_tenant_there_is_nothing() {
    let db = TestDb::new().await;
    fill(&db, db.tenant(), "main").await;
    let mut tx = db.pool().begin().await.unwrap();
    tx.execute(AssertSqlSafe(format!("set local role {ROLE}"))).await.unwrap();
    for (table, seen) in counts(&mut tx, &guarded(&db).await).await {
        assert_eq!(seen, 0, "{table}");
    }
}

#[tokio::test]
async fn a_statement_without_a_predicate_reaches_no_other_tenant() {
    let db = TestDb::new().await;
    let (main, other) = (db.tenant(), other_tenant(&db).await);
    fill(&db, main, "main").await;
    fill(&db, other, "other").await;
    let tables = guarded(&db).await;
    let mut owner = db.pool().acquire().await.unwrap();
    let before = counts(&mut owner, &tables).await;
    let mut tx = bound(&db, &Bounds::of(main)).await;
    open(&mut tx, main).await;
    let mut tried = Vec::new();
    for table in &tables {
        let mut step = tx.begin().await.unwrap();
        let deleted = step.execute(AssertSqlSafe(format!("delete from {table}"))).await;
        let deleted = deleted.map_or(0, |done| done.rows_affected());
        assert!(deleted <= 1, "{table}: {deleted} rows deleted");
        step.rollback().await.unwrap();
        // To give a row away is as good as writing into the other tenant.
        let Some(column) = belonging(&mut owner, table).await else { continue };
        let theirs = sqlx::query_scalar(AssertSqlSafe(theirs(&column, other)));
        let theirs: String = theirs.fetch_one(&mut *owner).await.unwrap();
        let columns = columns(&mut owner, table).await;
        let values = columns.split(", ").map(|name| if name == column { theirs.clone() } else { name.to_owned() });
        let values = values.collect::<Vec<_>>().join(", ");
        for statement in [
            format!("update {table} set {column} = {theirs}"),
            format!("insert into {table} ({columns}) select {values} from {table}"),
        ] {
            let mut step = tx.begin().await.unwrap();
            match step.execute(AssertSqlSafe(statement)).await {
                Err(sqlx::Error::Database(error)) => {
                    assert_eq!(error.code().as_deref(), Some("42501"), "{table}: {error}");
                }
                other => panic!("{table}: {other:?} (is there a row of it in ROWS?)"),
            }
            step.rollback().await.unwrap();
        }
        tried.push(table.as_str());
    }
    tx.commit().await.unwrap();
    assert_eq!(counts(&mut owner, &tables).await, before);
    // A tenant itself is a row that belongs to nobody else.
    let untried = tables.iter().filter(|table| !tried.contains(&table.as_str())).collect::<Vec<_>>();
    assert_eq!(untried, ["tenant"], "say in BELONGING by which column the others are a tenant's");
}

/// Columns that say whose a row is, the nearest first.
const BELONGING: [&str; 6] = ["tenant_key", "device_key", "session_id", "user_id", "authority_id", "claim_id"];

async fn belonging(owner: &mut PgConnection, table: &str) -> Option<String> {
    let column = sqlx::query_scalar(
        "select attname::text from pg_attribute
          where attrelid = $1::regclass and not attisdropped and attname = any ($2::text[])
          order by array_position($2::text[], attname::text) limit 1",
    );
    column.bind(table).bind(BELONGING.as_slice()).fetch_optional(owner).await.unwrap()
}

/// The columns of a table that a statement may give values for.
async fn columns(owner: &mut PgConnection, table: &str) -> String {
    let columns = sqlx::query_scalar(
        "select string_agg(attname::text, ', ' order by attnum) from pg_attribute
          where attrelid = $1::regclass and attnum > 0 and not attisdropped and attgenerated = '' and attidentity <> 'a'",
    );
    columns.bind(table).fetch_one(owner).await.unwrap()
}

/// A query for a value that puts a row into another tenant.
fn theirs(column: &str, tenant: TenantKey) -> String {
    let tenant = tenant.0;
    match column {
        "tenant_key" => format!("select '{tenant}'"),
        "device_key" => format!("select quote_literal(key) from device where tenant_key = {tenant}"),
        "user_id" => format!("select quote_literal(id) from app_user where tenant_key = {tenant}"),
        "authority_id" => format!("select quote_literal(id) from authority where tenant_key = {tenant}"),
        "claim_id" => format!("select quote_literal(id) from claim where tenant_key = {tenant}"),
        _ => format!("select quote_literal(id) from session where tenant_key = {tenant}"),
    }
}

#[tokio::test]
async fn what_is_above_tenants_is_for_those_who_stand_there() {
    let db = TestDb::new().await;
    let (main, other) = (db.tenant(), other_tenant(&db).await);
    fill(&db, other, "other").await;
    let platform_role = "insert into role (id, permissions, topic_rules, created_at, updated_at)
                         values ('bridge', '{}', '[]', now(), now())";
    let mut tx = bound(&db, &Bounds::of(main)).await;
    let refused = tx.execute(platform_role).await.unwrap_err();
    assert_eq!(refused.into_database_error().unwrap().code().as_deref(), Some("42501"));
    let mut tx = bound(&db, &Bounds::of(main).above_tenants(true)).await;
    tx.execute(platform_role).await.unwrap();
    let names: Vec<String> = sqlx::query_scalar("select id from role order by id").fetch_all(&mut *tx).await.unwrap();
    assert_eq!(names, ["bridge", "orders"], "a role of the platform is called like no other");
    let into_other = format!(
        "insert into role (tenant_key, id, permissions, topic_rules, created_at, updated_at)
                              values ({}, 'x', '{{}}', '[]', now(), now())",
        other.0
    );
    tx.execute("savepoint s").await.unwrap();
    tx.execute(AssertSqlSafe(into_other)).await.unwrap_err();
    tx.execute("rollback to s").await.unwrap();
    assert_eq!(tx.execute("delete from role where id = 'orders'").await.unwrap().rows_affected(), 0);
    tx.commit().await.unwrap();
    // Whoever has such a role is to be told apart from those who have none.
    let mut tx = bound(&db, &Bounds::of(main)).await;
    let seen: Vec<String> = sqlx::query_scalar("select id from role").fetch_all(&mut *tx).await.unwrap();
    assert_eq!(seen, ["bridge"]);
    assert_eq!(tx.execute("delete from role").await.unwrap().rows_affected(), 0);
    let tenants: Vec<String> = sqlx::query_scalar("select id from tenant").fetch_all(&mut *tx).await.unwrap();
    assert_eq!(tenants, ["main"]);
}

/// Everything in the database `db` anew, made by somebody who is no superuser.
async fn owned_by_nobody_special(db: &TestDb) -> PgPool {
    let sql = "do $$ begin create role muster_test_owner; exception when duplicate_object or unique_violation then null; end $$;
               grant muster_tenant to muster_test_owner;
               drop schema public cascade; create schema public authorization muster_test_owner";
    db.pool().execute(sql).await.unwrap();
    let pool = PgPoolOptions::new().max_connections(2).after_connect(|conn, _| {
        Box::pin(async move { conn.execute("set session authorization muster_test_owner").await.map(drop) })
    });
    pool.connect_with(db.options()).await.unwrap()
}

#[tokio::test]
async fn an_owner_who_is_no_superuser_is_above_the_policies_and_requests_are_not() {
    let db = TestDb::new().await;
    let pool = owned_by_nobody_special(&db).await;
    database::migrate(&pool).await.unwrap();
    database::first_tenant(&mut pool.acquire().await.unwrap(), &Clock::system()).await.unwrap();
    let other = other_tenant(&db).await;
    fill(&db, other, "other").await;
    let owner = sqlx::query_scalar::<_, i64>("select count(*) from device").fetch_one(&pool).await.unwrap();
    let mut tx = begin(&pool, &Bounds::of(db.tenant()), Duration::from_secs(10)).await.unwrap();
    let request = sqlx::query_scalar::<_, i64>("select count(*) from device").fetch_one(&mut *tx).await.unwrap();
    assert_eq!((owner, request), (1, 0));
}

async fn in_scope(db: &TestDb, scope: &str, device: &NewDevice) -> bool {
    sqlx::query_scalar("select in_scope($1::jsonb, $2, $3, $4::jsonb)")
        .bind(scope)
        .bind(device.group.as_ref().map(GroupPath::as_str))
        .bind(device.kind.as_ref().map(device::DeviceType::as_str))
        .bind(serde_json::to_string(&device.labels).unwrap())
        .fetch_one(db.pool())
        .await
        .unwrap()
}

fn freezer(id: &str, group: &str, site: &str) -> NewDevice {
    let labels = Labels::try_from(BTreeMap::from([("site".to_owned(), site.to_owned())])).unwrap();
    let (kind, group) = (Some("freezer".parse().unwrap()), Some(group.parse().unwrap()));
    NewDevice { kind, group, labels, ..NewDevice::named(id.parse().unwrap()) }
}

#[tokio::test]
async fn a_scope_is_a_list_of_which_one_must_hold() {
    let db = TestDb::new().await;
    let bare = NewDevice::named("bare".parse().unwrap());
    let freezer = freezer("f", "site/line-3/a", "oslo");
    for (scope, holds, holds_for_bare) in [
        ("[]", false, false),
        ("[{}]", true, true),
        (r#"[{"group":"site"}]"#, true, false),
        (r#"[{"group":"site/line-3"}]"#, true, false),
        (r#"[{"group":"site/line-3/a"}]"#, true, false),
        (r#"[{"group":"site/line-3/a/b"}]"#, false, false),
        (r#"[{"group":"site/line"}]"#, false, false),
        (r#"[{"group":"site%"}]"#, false, false),
        (r#"[{"type":"freezer"}]"#, true, false),
        (r#"[{"type":"pump"}]"#, false, false),
        (r#"[{"labels":{"site":"oslo"}}]"#, true, false),
        (r#"[{"labels":{"site":"bergen"}}]"#, false, false),
        (r#"[{"labels":{}}]"#, true, true),
        (r#"[{"group":"site","type":"pump"}]"#, false, false),
        (r#"[{"group":"site","type":"freezer","labels":{"site":"oslo"}}]"#, true, false),
        (r#"[{"type":"pump"},{"group":"site"}]"#, true, false),
    ] {
        assert_eq!(in_scope(&db, scope, &freezer).await, holds, "{scope}");
        assert_eq!(in_scope(&db, scope, &bare).await, holds_for_bare, "{scope}: a device of which nothing is known");
    }
}

#[tokio::test]
async fn a_scope_hides_devices_and_what_hangs_on_them() {
    let db = TestDb::new().await;
    fill(&db, db.tenant(), "main").await;
    sqlx::query("update device set group_path = 'site/line-3'").execute(db.pool()).await.unwrap();
    // Of nobody's device: for those who may reach all.
    let stray =
        "insert into dead_letter select gen_random_uuid(), tenant_key, 'nobody', topic, reason, payload, received_at
                   from dead_letter";
    db.pool().execute(stray).await.unwrap();
    let tables = [
        "device",
        "credential",
        "device_status",
        "device_latest",
        "telemetry",
        "log",
        "dead_letter",
        "connection_event",
        "audit",
    ];
    let tables = tables.map(str::to_owned).into_iter().chain(["session".into(), "session_subscription".into()]);
    let tables = tables.collect::<Vec<_>>();
    let inside = r#"[{"group":"site"}]"#;
    for (scope, seen, letters) in [("", 1, 2), (inside, 1, 1), (r#"[{"group":"elsewhere"}]"#, 0, 0), ("[]", 0, 0)] {
        let mut tx = scoped(&db, scope).await;
        let opened = device::open(&mut tx, db.tenant(), &"boiler-1".parse().unwrap()).await;
        assert_eq!(opened.is_ok(), seen == 1, "{scope}");
        for (table, count) in counts(&mut tx, &tables).await {
            assert_eq!(count, if table == "dead_letter" { letters } else { seen }, "{table} within {scope:?}");
        }
        let letters_told = dead_letter::page(&mut tx, db.tenant(), None, None, 10).await.unwrap();
        assert_eq!(i64::try_from(letters_told.len()).unwrap(), letters);
    }
}

#[tokio::test]
async fn nothing_leaves_a_scope_and_nothing_is_made_beyond_it() {
    let db = TestDb::new().await;
    let now = from_ms(NOON);
    let scope = r#"[{"group":"site","labels":{"site":"o'slo\\"}}]"#;
    let beyond = |error: Error| match error {
        Error::Database(sqlx::Error::Database(error)) => assert_eq!(error.code().as_deref(), Some("42501")),
        other => panic!("{other:?}"),
    };
    let mut tx = scoped(&db, scope).await;
    let inside = freezer("f", "site/line-3", "o'slo\\");
    device::enrol(&mut tx, db.tenant(), &inside, now).await.unwrap();
    tx.commit().await.unwrap();
    for outside in [freezer("g", "elsewhere", "o'slo\\"), freezer("g", "site", "bergen")] {
        beyond(device::enrol(&mut *scoped(&db, scope).await, db.tenant(), &outside, now).await.unwrap_err());
    }
    let moved = Patch { group: Some(Some("elsewhere".parse().unwrap())), ..Patch::default() };
    let update =
        device::update(&mut *scoped(&db, scope).await, db.tenant(), &inside.id, &moved, &[], now).await.map(drop);
    beyond(update.unwrap_err());
    let mut tx = scoped(&db, scope).await;
    let within = Patch { group: Some(Some("site/line-4".parse().unwrap())), ..Patch::default() };
    device::update(&mut tx, db.tenant(), &inside.id, &within, &[], now).await.unwrap();
    credential::issue(&mut tx, db.tenant(), &inside.id, now).await.unwrap();
    device::delete(&mut tx, db.tenant(), &inside.id, &[], now).await.unwrap();
    tx.commit().await.unwrap();
}

#[tokio::test]
async fn a_gateway_beyond_the_scope_stays_and_cannot_be_named() {
    let db = TestDb::new().await;
    let now = from_ms(NOON);
    let mut conn = db.pool().acquire().await.unwrap();
    let gateway = freezer("gw", "elsewhere", "oslo");
    device::enrol(&mut conn, db.tenant(), &gateway, now).await.unwrap();
    let child = NewDevice { gateway: Some(gateway.id.clone()), ..freezer("f", "site", "oslo") };
    device::enrol(&mut conn, db.tenant(), &child, now).await.unwrap();
    let mut tx = scoped(&db, r#"[{"group":"site"}]"#).await;
    let disabled = Patch { disabled: Some(true), ..Patch::default() };
    let (_, new) = device::update(&mut tx, db.tenant(), &child.id, &disabled, &[], now).await.unwrap();
    assert_eq!(new.gateway, None, "not to be seen");
    tx.commit().await.unwrap();
    let found = device::find(&mut conn, db.tenant(), &child.id).await.unwrap();
    assert_eq!((found.gateway, found.disabled), (Some(gateway.id.clone()), true));
    let mut tx = scoped(&db, r#"[{"group":"site"}]"#).await;
    let named = NewDevice { gateway: Some(gateway.id), ..freezer("g", "site", "oslo") };
    let refused = device::enrol(&mut tx, db.tenant(), &named, now).await.unwrap_err();
    assert!(matches!(refused, Error::NoSuchGateway(_)), "{refused:?}");
}

#[tokio::test]
async fn what_is_bound_is_unbound_with_its_transaction() {
    let db = TestDb::new().await;
    fill(&db, db.tenant(), "main").await;
    let other = other_tenant(&db).await;
    for _ in 0..20 {
        drop(bound(&db, &Bounds::of(other).within("[]")).await);
        let mut conn = db.pool().acquire().await.unwrap();
        let left: (String, i64) = sqlx::query_as("select current_user::text, (select count(*) from device)")
            .fetch_one(&mut *conn)
            .await
            .unwrap();
        assert_ne!(left.0, ROLE);
        assert_eq!(left.1, 1);
    }
}
