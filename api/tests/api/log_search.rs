//! Log lines found, counted and exported over REST.

use serde_json::{Value, json};

use crate::harness::{Api, escaped};
use crate::logs::{line, write};

const SEARCH: &str = "/api/v1/logs/search";

/// An API whose index knows these lines of `pump-7`.
async fn with(lines: impl Iterator<Item = i64>) -> Api {
    let api = Api::start().await;
    api.enrol("pump-7").await;
    write(&api, "pump-7", &lines.map(line).collect::<Vec<_>>()).await;
    api.index().await;
    api
}

fn numbers(page: &Value) -> Vec<i64> {
    page["items"].as_array().unwrap().iter().map(|line| line["seq"].as_i64().unwrap()).collect()
}

/// All lines along the cursors, while `between` does something between two pages.
async fn walk(api: &Api, query: &str, between: impl AsyncFn(usize)) -> Vec<i64> {
    let (mut found, mut cursor) = (Vec::new(), String::new());
    for nth in 0.. {
        let page = api.get(&format!("{SEARCH}?{query}&limit=7{cursor}")).await.expect(200).body;
        found.extend(numbers(&page));
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
        between(nth).await;
    }
    found
}

#[tokio::test]
async fn a_walk_shows_each_line_once_while_lines_are_added() {
    let api = with(0..50).await;
    let add = async |nth: usize| {
        let n = 1_000 + i64::try_from(nth).unwrap();
        write(&api, "pump-7", &[line(n)]).await;
        api.index().await;
    };
    let newest = walk(&api, "order=newest", add).await;
    assert_eq!(newest, (0..50).rev().collect::<Vec<_>>(), "what came later is before the first page");
    let oldest = walk(&api, "order=oldest&q=fields.n:%3c50", async |_| {}).await;
    assert_eq!(oldest, (0..50).collect::<Vec<_>>());
    let page = api.get(&format!("{SEARCH}?limit=1")).await.expect(200).body;
    let cursor = page["next_cursor"].as_str().unwrap();
    for bad in ["x", "", &cursor[1..]] {
        api.get(&format!("{SEARCH}?cursor={bad}")).await.problem(400, "invalid");
    }
}

#[tokio::test]
async fn lines_are_found_counted_and_grouped() {
    let api = with(0..20).await;
    let q = escaped("\"line 7\" level:>=warn");
    let found = api.get(&format!("{SEARCH}?q={q}")).await.expect(200).body;
    assert_eq!((numbers(&found), &found["complete"]), (vec![7], &json!(true)));
    assert_eq!(found["items"][0]["highlights"], json!([[0, 6]]));
    let context = format!("/api/v1/logs/context?id={}", found["items"][0]["id"].as_str().unwrap());
    assert_eq!(api.get(&context).await.expect(200).body["line"]["seq"], 7);
    let day = api.get(&format!("{SEARCH}?from=2025-11-21&to=2025-11-21&limit=100")).await.expect(200).body;
    assert_eq!(numbers(&day).len(), 20);
    let none = api.get(&format!("{SEARCH}?from=now-30s&to=now-10s")).await.expect(200).body;
    assert_eq!(none["items"], json!([]));

    let counted = api.get("/api/v1/logs/histogram?from=now-1h&interval=1m").await.expect(200).body;
    assert_eq!(counted["interval"], "1m");
    let stretch = json!([{ "ts": "2025-11-21T11:59:00.000Z", "count": 20, "levels": { "warn": 20 } }]);
    assert_eq!(counted["items"], stretch);
    api.get("/api/v1/logs/histogram?from=2020-01-01&to=2025-01-01&interval=1s").await.problem(400, "too-many-buckets");
    let top = api.get("/api/v1/logs/top?field=device").await.expect(200).body;
    assert_eq!((&top["items"], &top["others"]), (&json!([{ "value": "pump-7", "count": 20 }]), &json!(0)));
    let top = api.get("/api/v1/logs/top?field=fields.n&size=3").await.expect(200).body;
    assert_eq!((top["items"].as_array().unwrap().len(), &top["others"]), (3, &json!(17)));
    let patterns = api.get("/api/v1/logs/patterns").await.expect(200).body;
    assert_eq!((&patterns["items"][0]["count"], &patterns["total"]), (&json!(20), &json!(1)));
    let new = api.get("/api/v1/logs/patterns?new_since=now").await.expect(200).body;
    assert_eq!(new["items"], json!([]));
    api.get("/api/v1/logs/patterns?new_since_version=9.9").await.problem(400, "unknown-version");
    api.get("/api/v1/logs/patterns?new_since_version=2.0&new_since=now").await.problem(400, "invalid");
    let seen = "insert into firmware_seen (tenant_key, version, first_at) select tenant_key, '2.0.0', '2025-11-20' from device limit 1";
    sqlx::query(seen).execute(api.db.pool()).await.unwrap();
    let new = api.get("/api/v1/logs/patterns?new_since_version=2.0").await.expect(200).body;
    assert_eq!(new["total"], 1);
    let fields = api.get("/api/v1/logs/fields").await.expect(200).body;
    assert!(fields["items"].as_array().unwrap().iter().any(|field| field["name"] == "level"));
}

#[tokio::test]
async fn an_export_is_whole_and_says_so() {
    let api = with(0..2_500).await;
    let nasty = json!({ "message": "=1+1,\"x\"\n", "seq": 9_000, "ts": crate::harness::NOON_MS - 60_000 });
    write(&api, "pump-7", &[nasty]).await;
    api.index().await;
    let export = api.get("/api/v1/logs/export").await.expect(200);
    assert_eq!(export.header("content-type"), "application/x-ndjson");
    let lines = export.text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>();
    assert_eq!(lines.len(), 2_502);
    assert_eq!(lines[2_501], json!({ "lines": 2_501, "complete": true }));
    let seqs = lines[1..2_501].iter().map(|line| line["seq"].as_i64().unwrap()).collect::<Vec<_>>();
    assert_eq!(seqs, (0..2_500).collect::<Vec<_>>());
    let csv = api.get(&format!("/api/v1/logs/export?format=csv&q={}", escaped("NOT line"))).await.expect(200).text;
    let expected = "ts,device,seq,level,target,message,trace_id,fields\r\n\
                    2025-11-21T11:59:00.000Z,pump-7,9000,info,,\"'=1+1,\"\"x\"\"\n\",,\r\n# lines=1 complete=true\r\n";
    assert_eq!(csv, expected);
    api.get("/api/v1/logs/export?format=xml").await.problem(400, "invalid");
}

const ALL: [&str; 5] =
    [SEARCH, "/api/v1/logs/histogram", "/api/v1/logs/top?field=target", "/api/v1/logs/patterns", "/api/v1/logs/export"];

#[tokio::test]
async fn a_question_that_cannot_be_read_is_refused_with_its_column() {
    let api = with(0..1).await;
    for path in ALL {
        let with = |query: &str| format!("{path}{}{query}", if path.contains('?') { '&' } else { '?' });
        let refused = api.get(&with(&format!("q={}", escaped("a AND level:>=loud")))).await.problem(400, "invalid");
        let error = &refused.body["errors"][0];
        assert!(error["field"] == "q" && error["detail"].as_str().unwrap().contains("column 15"), "{}", refused.text);
        for bad in ["from=yesterday", "to=x", "from=now&to=now-1h", "other=1"] {
            api.get(&with(bad)).await.problem(400, "invalid");
        }
    }
    for bad in ["/api/v1/logs/top", "/api/v1/logs/top?field=message", "/api/v1/logs/top?field=level&size=0"] {
        api.get(bad).await.problem(400, "invalid");
    }
    api.get(&format!("{SEARCH}?order=up")).await.problem(400, "invalid");
    api.get(&format!("{SEARCH}?limit=0")).await.problem(400, "invalid");
}

#[tokio::test]
async fn a_scope_and_a_tenant_are_part_of_every_question() {
    let api = with(0..5).await;
    api.post("/api/v1/devices", json!({ "id": "fan-1", "group": "hall" })).await.expect(201);
    write(&api, "fan-1", &[line(100)]).await;
    api.index().await;
    let (user, token) = api.user("ada@example.com", "").await;
    let scope = json!({ "kind": "group", "group": "hall" });
    api.post("/api/v1/bindings", json!({ "user": user, "role": "viewer", "scope": scope })).await.expect(201);
    let (stranger, strange) = api.user("stranger@example.org", "admin").await;
    let sql = "with other as (insert into tenant (id, created_at) values ('other', now()) returning key)
               update app_user set tenant_key = other.key from other where id = $1";
    sqlx::query(sql).bind(stranger.uuid()).execute(api.db.pool()).await.unwrap();
    let (_, nobody) = api.nobody().await;
    for path in ALL.into_iter().chain(["/api/v1/logs/top?field=device"]) {
        let ask = |token: &str| api.as_who(token, "GET", path).send();
        let seen = ask(&token).await.expect(200).text;
        assert!(!seen.contains("pump-7") && !seen.contains("line 1\""), "{path}: {seen}");
        let none = ask(&strange).await.expect(200);
        assert!(!none.text.contains("pump-7") && !none.text.contains("fan-1"), "{path}: {}", none.text);
        if let Some(items) = none.body["items"].as_array() {
            assert!(items.is_empty(), "{path}: {}", none.text);
        }
        ask(&nobody).await.problem(403, "forbidden");
    }
    let found = api.as_who(&token, "GET", SEARCH).send().await.expect(200).body;
    assert_eq!(numbers(&found), [100]);
    let page = api.get(&format!("{SEARCH}?limit=1")).await.expect(200).body;
    let path = format!("{SEARCH}?cursor={}", page["next_cursor"].as_str().unwrap());
    api.as_who(&strange, "GET", &path).send().await.problem(400, "invalid");
}
