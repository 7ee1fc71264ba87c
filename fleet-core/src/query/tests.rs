//! What the language means, and that its forms agree.

use chrono::TimeZone as _;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use sqlx::{Postgres, QueryBuilder};

use super::*;
use crate::selector;
use crate::testing::TestDb;

const LOG: Schema = Schema {
    noun: "query",
    fields: &[
        ("message", Kind::Text),
        ("level", Kind::Level),
        ("device", Kind::Name),
        ("group", Kind::Path),
        ("ts", Kind::Time),
        ("firmware", Kind::Version),
        ("late", Kind::Flag),
        ("seq", Kind::Number),
        ("state", Kind::OneOf(&["online", "lost"])),
    ],
    families: &[("fields.", Kind::Any)],
    words: Some("message"),
};

fn now() -> DateTime<Utc> {
    Utc.with_ymd_and_hms(2026, 11, 20, 12, 0, 0).unwrap()
}

fn read(text: &str) -> Query {
    Query::parse(text, &LOG, now()).unwrap_or_else(|error| panic!("{text}: {error}"))
}

fn refusal(text: &str) -> String {
    Query::parse(text, &LOG, now()).map(|query| panic!("{text}: {query:?}")).unwrap_err().to_string()
}

/// Values by field, as a document.
struct Line(Vec<(&'static str, Value<'static>)>);

impl Document for Line {
    fn any(&self, field: &str, test: &mut dyn FnMut(Value<'_>) -> bool) -> bool {
        self.0.iter().filter(|(name, _)| *name == field).any(|(_, value)| test(value.clone()))
    }
}

fn line() -> Line {
    Line(vec![
        ("message", "Wi-Fi reconnect failed: no carrier (eth0)".into()),
        ("level", Value::Level(Level::Warn)),
        ("device", "pump-7".into()),
        ("group", "site/line-3".into()),
        ("ts", Value::Time(now().timestamp_millis() - 90_500)),
        ("firmware", "2.0.1-rc.1".into()),
        ("late", Value::Flag(false)),
        ("seq", Value::Number(918.0)),
        ("state", "online".into()),
        ("fields.code", Value::Number(42.0)),
        ("fields.tag", "Blue Green".into()),
        ("fields.tag", "red".into()),
        ("fields.ok", Value::Flag(true)),
    ])
}

#[test]
fn what_is_asked_for_is_found() {
    let found = [
        "",
        "  ",
        "*",
        "reconnect",
        "RECONNECT failed",
        "\"reconnect failed\"",
        "recon*",
        "\"no carr\"*",
        "wi-fi",
        "message:eth0",
        "level:warn",
        "level:>=warn",
        "level:<ERROR",
        "level:[info TO error]",
        "level:{info TO *]",
        "level:WARNING",
        "device:pump-7",
        "device:pump-*",
        "device:*",
        "group:site",
        "group:site/line-3",
        "ts:2026-11-20",
        "ts:>=2026-11-20T11:58:00Z",
        "ts:2026-11-20T11:58Z",
        "ts:>now-2m",
        "ts:[now-1h TO now]",
        "ts:<=2026-11-20",
        "firmware:<2.0.1",
        "firmware:>=2.0",
        "firmware:2.0*",
        "firmware:2.0.1-rc.1",
        "late:false",
        "seq:918",
        "seq:>=900.5",
        "seq:{917 TO 918]",
        "state:online",
        "fields.code:42",
        "fields.code:>41",
        "fields.tag:blue",
        "fields.tag:\"blue green\"",
        "fields.tag:red",
        "fields.ok:true",
        "fields.code:*",
        "failed AND carrier",
        "nothing OR failed",
        "nothing OR failed carrier",
        "NOT nothing",
        "-nothing",
        "NOT (nothing OR level:error)",
        "(failed OR x) (carrier OR y)",
        "level:(warn OR error)",
        "device:(pump-7 OR NOT fan*)",
        "NOT NOT failed",
        "fields.tag:(red blue)",
        "a\\:b OR failed",
    ];
    for text in found {
        assert!(read(text).matches(&line()), "{text}");
    }
    let not_found = [
        "nothing",
        "reconn",
        "\"failed reconnect\"",
        "\"reconnect carrier\"",
        "level:>warn",
        "level:info",
        "device:pump",
        "device:PUMP-7",
        "group:sit",
        "group:site/line",
        "ts:2026-11-19",
        "ts:>2026-11-20",
        "ts:<2026-11-20",
        "ts:>=now-1m",
        "firmware:>=2.0.1",
        "firmware:2.0.1",
        "late:true",
        "seq:>918",
        "fields.code:43",
        "fields.code:\"42\"",
        "fields.tag:green\\ blue",
        "fields.missing:*",
        "fields.ok:false",
        "failed AND nothing",
        "NOT failed",
        "failed -carrier",
        "nothing failed OR nothing",
        "fields.tag:>1",
        "NOT *",
    ];
    for text in not_found {
        assert!(!read(text).matches(&line()), "{text}");
    }
}

#[test]
fn and_binds_more_than_or() {
    for (text, is_found) in
        [("failed x OR carrier", true), ("carrier OR failed x", true), ("(carrier OR failed) x", false)]
    {
        assert_eq!(read(text).matches(&line()), is_found, "{text}");
    }
}

#[test]
fn an_error_names_the_column_and_what_was_expected() {
    for (text, column, expected) in [
        ("level:loud", 7, "one of trace, debug, info, warn, error, fatal"),
        ("failed AND", 11, "a word, \"a phrase\" or one of message:"),
        ("failed AND OR", 12, "a word"),
        ("OR failed", 1, "a word"),
        ("(failed", 8, "a )"),
        ("failed)", 7, "no )"),
        ("()", 2, "a word"),
        ("\"failed", 1, "a second double quote"),
        ("lvl:warn", 1, "\"lvl\" is not a field"),
        ("fields.:1", 1, "\"fields.\" is not a field"),
        ("seq:many", 5, "a number for seq"),
        ("seq:>", 6, "a value"),
        ("seq:[1 2]", 8, "TO"),
        ("seq:[1 TO 2", 12, "] or }"),
        ("seq:[1 TO ]", 11, "an end of the range"),
        ("ts:yesterday", 4, "a time such as"),
        ("ts:2026-13-01", 4, "a time"),
        ("ts:now-15x", 4, "a time"),
        ("late:maybe", 6, "true or false"),
        ("state:gone", 7, "one of online, lost"),
        ("group:/site", 7, "a path"),
        ("device:>=a", 10, "not compared by order"),
        ("recon*nect", 6, "* only at the end"),
        ("*nect", 1, "* only at the end"),
        ("level:w*", 7, "without *"),
        ("---", 4, "a word"),
        ("!!!", 1, "a letter or a digit"),
        ("a\\", 3, "a character behind \\"),
        ("a\"b\"", 2, "a blank before"),
        ("温度 lvl:1", 4, "\"lvl\""),
        ("device:(a OR lvl:b", 19, "a )"),
    ] {
        let refusal = refusal(text);
        assert!(refusal.starts_with(&format!("query, column {column}: expected ")), "{text}: {refusal}");
        assert!(refusal.contains(expected), "{text}: {refusal}");
    }
}

#[test]
fn a_query_has_bounds() {
    let terms = |count: usize| vec!["a"; count].join(" ");
    read(&terms(MAX_TERMS));
    assert!(refusal(&terms(MAX_TERMS + 1)).contains(&format!("at most {MAX_TERMS} terms")));
    let nested = |depth: usize| "(".repeat(depth) + "a" + &")".repeat(depth);
    read(&nested(MAX_DEPTH));
    assert!(refusal(&nested(MAX_DEPTH + 1)).contains("in each other"));
    assert!(refusal(&("NOT ".repeat(MAX_DEPTH + 1) + "a")).contains("in each other"));
    assert!(refusal(&"a".repeat(MAX_BYTES + 1)).contains("too long"));
    assert!(refusal(&"(".repeat(MAX_BYTES)).contains("in each other"));
}

fn selectors() -> impl Strategy<Value = String> {
    let term = prop_oneof![
        select(vec![
            "device:pump-*",
            "device:pump-1",
            "type:freezer",
            "type:*",
            "type:fr*",
            "group:site",
            "group:site/a",
            "group:*"
        ]),
        select(vec![
            "state:online",
            "state:never_seen",
            "disabled:true",
            "disabled:false",
            "gateway:gw",
            "gateway:*",
            "missing:>3"
        ]),
        select(vec![
            "firmware:<2.0",
            "firmware:>=1.9",
            "firmware:2.0",
            "firmware:2*",
            "firmware:odd",
            "firmware:[1.5 TO 2.0]"
        ]),
        select(vec![
            "label.site:oslo",
            "label.site:*",
            "label.site:o*",
            "label.x:\"a b\"",
            "seen:>now-1h",
            "seen:2026-11-20"
        ]),
        select(vec![
            "created:<=2026-11-20T11:00:00Z",
            "created:[2026-11-20T10:00Z TO *]",
            "missing:0",
            "*",
            "label.x:*"
        ]),
    ]
    .prop_map(ToOwned::to_owned);
    term.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            2 => vec(inner.clone(), 1..3).prop_map(|all| format!("({})", all.join(" AND "))),
            2 => vec(inner.clone(), 1..3).prop_map(|some| format!("({})", some.join(" OR "))),
            1 => inner.clone().prop_map(|one| format!("NOT {one}")),
            1 => inner.prop_map(|one| format!("-{one}")),
        ]
    })
}

proptest! {
    #[test]
    fn no_text_panics(text in "[a-z:*()\"\\\\\\[\\]{}<>= 0-9.A-Z-]{0,40}|.{0,40}|(AND|OR|NOT|TO|level|ts|:|>=|\\(|\\)| |a|\"|\\[){0,20}") {
        if let Ok(read) = Query::parse(&text, &LOG, now()) {
            read.matches(&line());
        }
    }

    #[test]
    fn not_turns_round_and_parentheses_change_nothing(text in selectors(), device in devices()) {
        let query = |text: &str| selector::read(text, now()).unwrap().matches(&device);
        prop_assert_eq!(query(&format!("NOT ({text})")), !query(&text));
        prop_assert_eq!(query(&format!("({text})")), query(&text));
    }
}

#[derive(Debug, Clone)]
struct Row {
    id: String,
    kind: Option<&'static str>,
    group: Option<&'static str>,
    labels: Vec<(&'static str, &'static str)>,
    has_gateway: bool,
    disabled: bool,
    created: i64,
    status: Option<(&'static str, i64, Option<&'static str>, i32)>,
}

impl Document for Row {
    fn any(&self, field: &str, test: &mut dyn FnMut(Value<'_>) -> bool) -> bool {
        let status = self.status.as_ref();
        let value = match field {
            "device" => Some(self.id.as_str().into()),
            "type" => self.kind.map(Value::from),
            "group" => self.group.map(Value::from),
            "gateway" => self.has_gateway.then(|| "gw".into()),
            "state" => Some(status.map_or(selector::NEVER_SEEN, |status| status.0).into()),
            "firmware" => status.and_then(|status| status.2).map(Value::from),
            "disabled" => Some(Value::Flag(self.disabled)),
            "created" => Some(Value::Time(self.created)),
            "seen" => status.map(|status| Value::Time(status.1)),
            "missing" => Some(Value::Number(status.map_or(0.0, |status| f64::from(status.3)))),
            label => {
                self.labels.iter().find(|(key, _)| label == format!("label.{key}")).map(|(_, value)| (*value).into())
            }
        };
        value.is_some_and(test)
    }
}

fn devices() -> impl Strategy<Value = Row> {
    let about = (
        "(pump|fan)-[0-9]{1,3}",
        proptest::option::of(select(vec!["freezer", "fan"])),
        proptest::option::of(select(vec!["site", "site/a", "site/ab", "other"])),
        vec(select(vec![("site", "oslo"), ("site", "rome"), ("x", "a b"), ("x", "")]), 0..2),
    );
    let times = |hours: std::ops::Range<i64>| hours.prop_map(|quarter| now().timestamp_millis() - quarter * 900_000);
    let status = (
        select(vec!["online", "lost", "offline"]),
        times(0..200),
        proptest::option::of(select(vec!["1.0", "v2.0.0", "2.0-rc.1", "2.10", "odd", ""])),
        0..9,
    );
    let rest = (any::<bool>(), any::<bool>(), times(0..12), proptest::option::of(status));
    (about, rest).prop_map(|((id, kind, group, mut labels), (has_gateway, disabled, created, status))| {
        labels.dedup_by_key(|(key, _)| *key);
        Row { id, kind, group, labels, has_gateway, disabled, created, status }
    })
}

async fn insert(db: &TestDb, row: &Row) {
    let labels = row.labels.iter().copied().collect::<serde_json::Value>();
    let key: i64 = sqlx::query_scalar(
        "insert into device (tenant_key, id, type, group_path, labels, gateway_key, disabled, created_at, updated_at)
         values ($1, $2, $3, $4, $5, (select key from device where id = 'gw' and $6), $7, $8, $8) returning key",
    )
    .bind(db.tenant().0)
    .bind(&row.id)
    .bind(row.kind)
    .bind(row.group)
    .bind(labels)
    .bind(row.has_gateway)
    .bind(row.disabled)
    .bind(DateTime::from_timestamp_millis(row.created))
    .fetch_one(db.pool())
    .await
    .unwrap();
    if let Some((state, seen, firmware, missing)) = &row.status {
        sqlx::query(
            "insert into device_status (device_key, state, state_since, last_seen_at, firmware, missing)
             values ($1, $2, $3, $3, $4, $5)",
        )
        .bind(key)
        .bind(state)
        .bind(DateTime::from_timestamp_millis(*seen))
        .bind(firmware)
        .bind(i64::from(*missing))
        .execute(db.pool())
        .await
        .unwrap();
    }
}

#[tokio::test]
async fn the_database_finds_what_the_matcher_does() {
    let db = TestDb::new().await;
    let mut runner = TestRunner::deterministic();
    let gateway = Row { id: "gw".into(), has_gateway: false, ..devices().new_tree(&mut runner).unwrap().current() };
    let mut rows = vec![gateway];
    for _ in 0..150 {
        let row = devices().new_tree(&mut runner).unwrap().current();
        if rows.iter().all(|has| has.id != row.id) {
            rows.push(row);
        }
    }
    for row in &rows {
        insert(&db, row).await;
    }
    for _ in 0..400 {
        let text = selectors().new_tree(&mut runner).unwrap().current();
        let query = selector::read(&text, now()).unwrap();
        let mut sql = QueryBuilder::<Postgres>::new(
            "select d.id from device d left join device_status s on s.device_key = d.key where ",
        );
        query.push_sql(&selector::DeviceColumns, &mut sql).unwrap();
        let mut found: Vec<String> = sql.build_query_scalar().persistent(false).fetch_all(db.pool()).await.unwrap();
        let mut wanted = rows.iter().filter(|row| query.matches(*row)).map(|row| row.id.clone()).collect::<Vec<_>>();
        found.sort();
        wanted.sort();
        assert_eq!(found, wanted, "{text}");
    }
}
