//! The index finds what the matcher in memory does, and what the database does.

use std::collections::BTreeSet;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use serde_json::{Value, json};
use sqlx::{PgConnection, Postgres, QueryBuilder};

use super::super::*;
use super::fixture::{Built, DAY, NOW, now};
use super::sql;
use crate::clock::from_ms;
use crate::log::query::read;
use crate::log::{Batch, Limits, insert_batch, prepare};
use crate::telemetry::fixture::enrol;
use crate::testing::TestDb;

const WRITER: i16 = 2;
const FAR_FUTURE: i64 = 253_402_300_799_999;

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => select(vec!["reconnect", "Failed", "no", "carrier", "net.wifi", "3", "42", "0x1f", "eth0", "10.0.0.1"])
            .prop_map(str::to_owned),
        3 => select(vec!["café", "cafe\u{301}", "CAFÉ", "שלום", "עולם", "温度高", "温", "カ", "ｗｉｆｉ", "wifi"])
            .prop_map(str::to_owned),
        1 => (127_usize..131).prop_map(|long| "a".repeat(long)),
    ]
}

fn text() -> impl Strategy<Value = String> {
    let between = select(vec![" ", " ", ", ", "-", ": ", "", "  ", " … "]);
    vec((word(), between), 0..6)
        .prop_map(|words| words.into_iter().map(|(word, between)| word + between).collect::<String>())
}

fn scalar() -> impl Strategy<Value = Value> {
    prop_oneof![
        3 => text().prop_map(Value::from),
        3 => select(vec![json!(42), json!(42.0), json!(-81), json!(4.5), json!(0), json!(-0.0), json!(1e300), json!(-1e300)]),
        2 => select(vec![
            json!(u64::MAX), json!(i64::MIN), json!(i64::MAX), json!(9_007_199_254_740_993_i64), json!(1e19), json!(5e-324),
        ]),
        1 => any::<bool>().prop_map(Value::from),
        1 => Just(Value::Null),
    ]
}

fn field() -> impl Strategy<Value = &'static str> {
    select(vec!["code", "tag", "up", "a.b", "a", "温度", "x-y"])
}

fn message() -> impl Strategy<Value = Value> {
    let value = prop_oneof![3 => scalar(), 1 => vec(scalar(), 0..4).prop_map(Value::from)];
    let ts = prop_oneof![
        6 => NOW - 2 * DAY..NOW + 60_000,
        1 => Just(0_i64),
        1 => Just(FAR_FUTURE),
        // Ahead of its clock, so it is clamped.
        1 => NOW + DAY..NOW + 2 * DAY,
        2 => (0_i64..5).prop_map(|nth| NOW - nth * DAY),
    ];
    let level = select(vec!["trace", "debug", "info", "warn", "error", "fatal"]);
    let target = option::of(select(vec!["net", "net.wifi", "app", "Net"]));
    let trace = option::of(select(vec!["t-1", "t-2"]));
    let fields = vec((field(), value), 0..4);
    (ts, level, target, trace, text(), fields, any::<bool>()).prop_map(
        |(ts, level, target, trace, message, fields, is_long)| {
            let fields =
                fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect::<serde_json::Map<_, _>>();
            let message = if is_long && ts % 40 == 0 { message + " " + &"y".repeat(33_000) } else { message };
            let mut line = json!({ "ts": ts, "level": level, "message": message, "fields": fields });
            // Null is as if it were not there.
            line["target"] = target.into();
            line["trace_id"] = trace.into();
            line
        },
    )
}

fn quoted(text: &str) -> String {
    format!("\"{text}\"")
}

fn queries() -> impl Strategy<Value = String> {
    let words = || {
        prop_oneof![
            word(),
            word().prop_map(|word| quoted(&word) + "*"),
            (word(), word()).prop_map(|(a, b)| quoted(&format!("{a} {b}"))),
            (word(), word()).prop_map(|(a, b)| quoted(&format!("{a}{b}"))),
            (word(), select(vec!["c", "f", "w", "温", "a", "1"])).prop_map(|(a, b)| quoted(&format!("{a} {b}")) + "*"),
            (word(), word(), word()).prop_map(|(a, b, c)| quoted(&format!("{a} {b} {c}"))),
            select(vec!["re*", "caf*", "4*", "温*", "aaaa*"]).prop_map(str::to_owned),
        ]
    };
    let of_line = select(vec![
        "level:warn",
        "level:>=error",
        "level:<debug",
        "level:[debug TO error}",
        "level:*",
        "target:net",
        "target:net*",
        "target:*",
        "NOT target:*",
        "trace_id:t-1",
        "trace_id:t-*",
        "cut:true",
        "cut:false",
        "clamped:true",
        "message:*",
        "ts:*",
        "ts:2026-11-21",
        "ts:>now-1d",
        "ts:<=2026-11-20",
        "ts:[2026-11-19T10:00Z TO now}",
        "ts:1970-01-01",
        "ts:>2026-11-22",
        "*",
        "target:\"\"",
    ]);
    let number = select(vec![
        "42",
        ">41",
        "<=42",
        "[-81 TO 42}",
        ">=4.5",
        "<0",
        "0",
        ">1e18",
        "[9.2e18 TO 1e19}",
        "{-1e300 TO 0]",
        ">9223372036854775807",
        "<-9223372036854775807",
        "18446744073709551615",
        ">=18446744073709551615",
        "<=-9223372036854775808",
        "9007199254740992",
        "{0 TO 1}",
        "[5 TO 1]",
        "*",
        "true",
        "false",
        "[* TO 42]",
        ">=1e301",
        "<-1e301",
        "{4 TO 5}",
    ]);
    let of_field =
        (field(), prop_oneof![number.prop_map(str::to_owned), words()]).prop_map(|(f, v)| format!("fields.{f}:{v}"));
    let of_device = select(vec![
        "device:pump-1",
        "device:pump-*",
        "type:pump",
        "NOT type:pump",
        "group:site",
        "firmware:<2",
        "state:online",
    ]);
    let term = prop_oneof![
        4 => words(),
        3 => of_line.prop_map(str::to_owned),
        4 => of_field,
        1 => of_device.prop_map(str::to_owned),
    ];
    term.prop_recursive(3, 10, 3, |inner| {
        prop_oneof![
            2 => vec(inner.clone(), 1..3).prop_map(|all| format!("({})", all.join(" AND "))),
            2 => vec(inner.clone(), 1..3).prop_map(|some| format!("({})", some.join(" OR "))),
            1 => inner.prop_map(|one| format!("NOT {one}")),
        ]
    })
}

async fn store(db: &mut PgConnection, device: DeviceKey, line: &Value) {
    let limits = Limits { max_lines: 10, max_ahead_ms: 300_000 };
    let mut batch = Batch::default();
    // Whoever is far ahead would be clamped otherwise.
    let received = if line["ts"] == FAR_FUTURE { FAR_FUTURE } else { NOW };
    assert_eq!(batch.push(device, line.to_string().as_bytes(), received, &limits), []);
    prepare(db, &mut batch).await.unwrap();
    insert_batch(db, WRITER, &batch).await.unwrap();
}

async fn fleet(db: &TestDb, conn: &mut PgConnection, runner: &mut TestRunner) -> (Built, Vec<DeviceKey>) {
    let other = sqlx::query_scalar("insert into tenant (id, created_at) values ('other', now()) returning key");
    let other = TenantKey(other.fetch_one(db.pool()).await.unwrap());
    let mut devices = Vec::new();
    for (tenant, id) in [(db.tenant(), "pump-1"), (db.tenant(), "pump-2"), (db.tenant(), "fan-1"), (other, "pump-1")] {
        devices.push(enrol(conn, tenant, id).await);
    }
    let about = "update device set type = 'pump', group_path = 'site/a' where id = 'pump-1'";
    sqlx::query(about).execute(&mut *conn).await.unwrap();
    for nth in 0..300 {
        let line = message().new_tree(runner).unwrap().current();
        store(conn, devices[nth % devices.len()], &line).await;
    }
    let lines = Line::read_after(conn, WRITER, 0, i64::MAX, 10_000).await.unwrap().lines;
    assert!(
        lines.len() > 200
            && lines.iter().any(|line| line.cut.is_any())
            && lines.iter().any(|line| line.sent_at_ms.is_some())
    );
    (Built::of(lines, 3, 1000), devices)
}

async fn by_sql(conn: &mut PgConnection, ask: &Ask) -> BTreeSet<Address> {
    let mut sql = QueryBuilder::<Postgres>::new(
        "select (extract(epoch from l.ts) * 1000)::bigint, l.writer, l.place
           from log l join device d on d.key = l.device_key where d.tenant_key = ",
    );
    sql.push_bind(ask.reach.tenant.0);
    if let Some(devices) = &ask.reach.devices {
        sql.push(" and l.device_key = any(").push_bind(devices.iter().map(|key| key.0).collect::<Vec<_>>()).push(")");
    }
    if let Some(from) = ask.from_ms {
        sql.push(" and l.ts >= ").push_bind(from_ms(from));
    }
    if let Some(to) = ask.to_ms {
        sql.push(" and l.ts < ").push_bind(from_ms(to));
    }
    sql.push(" and ");
    sql::push(ask.query.asked(), &mut sql);
    let rows: Vec<(i64, i16, i64)> = sql.build_query_as().persistent(false).fetch_all(conn).await.unwrap();
    rows.into_iter().map(|(ts_ms, writer, place)| Address { ts_ms, writer, place }).collect()
}

#[tokio::test]
async fn the_index_the_database_and_the_matcher_agree() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let mut runner = TestRunner::deterministic();
    let (built, devices) = fleet(&db, &mut conn, &mut runner).await;
    let (mut asked, mut with_some) = (0, 0);
    for nth in 0..250 {
        let text = queries().new_tree(&mut runner).unwrap().current();
        // One that is all punctuation, or too deep, is no query.
        let Ok(read) = read(&text, now()) else { continue };
        let query = Query::resolve(&read, &mut conn, db.tenant()).await.unwrap();
        let reach = match nth % 3 {
            0 => Some(Arc::new(devices[..2].iter().copied().collect())),
            _ => None,
        };
        let ask = Ask {
            query,
            from_ms: (nth % 4 == 1).then_some(NOW - DAY),
            to_ms: (nth % 5 == 1).then_some(NOW),
            reach: Reach { tenant: db.tenant(), devices: reach },
        };
        let in_memory =
            built.lines.iter().filter(|line| ask.matches(line)).map(|line| line.address).collect::<BTreeSet<_>>();
        let page = built.page(&ask, Order::Newest, None, 1000);
        let in_index = page.hits.iter().map(|hit| hit.address).collect::<Vec<_>>();
        assert_eq!(in_index, in_memory.iter().rev().copied().collect::<Vec<_>>(), "index and memory: {text}");
        assert_eq!(by_sql(&mut conn, &ask).await, in_memory, "database and memory: {text}");
        assert_eq!(built.count(&ask), in_memory.len() as u64, "{text}");
        let total = built.histogram(&ask, DAY).unwrap().iter().map(|bucket| bucket.total).sum::<u64>();
        assert_eq!(total, in_memory.len() as u64, "{text}");
        let patterns = built.patterns(&ask, None).found.iter().map(|found| found.count).sum::<u64>();
        assert_eq!(patterns, in_memory.len() as u64, "{text}");
        asked += 1;
        with_some += usize::from(!in_memory.is_empty());
    }
    assert!(asked > 180 && with_some > asked / 3, "{with_some} of {asked} found anything");
}
