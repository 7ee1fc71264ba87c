//! The audit over REST: that everything is in it, that no secret is, who may read it, and that it can be proven.

use chrono::TimeDelta;
use fleet_core::audit::{Chain, Head, Row, Trailer};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use sqlx::Executor;

use crate::harness::{Api, EMAIL, PASSWORD, Setup};
use crate::tenants::{self, Main};

const PATH: &str = "/api/v1/audit";

/// Routes that are no GET and change nothing that anybody would ask about.
const HARMLESS: [&str; 4] =
    ["POST /api/v1/access/check", "POST /api/v1/access/diff", "POST /api/v1/authorities/nonce", "POST /v1/logs"];
/// Routes that need a broker, or another body than is at hand, to succeed; their own tests look for the entry.
const TRIED_ELSEWHERE: [&str; 13] = [
    "POST /api/v1/connections/{id}/disconnect",
    "POST /api/v1/connections/{id}/trace",
    "DELETE /api/v1/connections/{id}/trace",
    "DELETE /api/v1/sessions/{id}",
    "POST /api/v1/devices/import",
    "PUT /api/v1/authorities/{id}/crl",
    "PUT /api/v1/authorities/{id}/certificate",
    "DELETE /api/v1/auth/sessions/{id}",
    "POST /api/v1/auth/totp",
    "POST /api/v1/auth/totp/confirm",
    "POST /api/v1/auth/totp/recovery-codes",
    "DELETE /api/v1/auth/totp",
    "DELETE /api/v1/users/{id}/totp",
];

async fn entries(api: &Api, query: &str) -> Vec<Value> {
    api.get(&format!("{PATH}?{query}")).await.expect(200).body["items"].as_array().unwrap().clone()
}

async fn newest(api: &Api) -> Value {
    entries(api, "limit=1").await.remove(0)
}

/// All of the audit as text, for words that must not be in it.
async fn everything(api: &Api) -> String {
    api.get(&format!("{PATH}/export")).await.expect(200).text
}

/// Does what a route is for, in a tenant that has one of each: the entry that it left, or why it failed.
async fn entry_of(method: &str, pattern: &str) -> Result<Value, String> {
    let main = Main::with_one_of_each().await;
    let (mut path, _) = main.filled(pattern);
    match (method, pattern) {
        ("DELETE", "/api/v1/authorities/{id}") => {
            let disable = main.api.ask("PATCH", &path).raw("application/merge-patch+json", r#"{"disabled":true}"#);
            disable.send().await.expect(200);
        }
        ("DELETE", "/api/v1/roles/{id}") => {
            main.api.post("/api/v1/roles", json!({ "id": "nobodys" })).await.expect(201);
            "/api/v1/roles/nobodys".clone_into(&mut path);
        }
        _ => {}
    }
    let body = match (method, pattern) {
        // What the stranger would make is there already.
        ("POST", "/api/v1/devices") => json!({ "id": "boiler-2" }),
        ("POST", "/api/v1/roles") => json!({ "id": "orders-2" }),
        ("POST", "/api/v1/api-keys") => json!({ "name": "k", "role": "orders" }),
        ("POST", "/api/v1/access/view-as") => {
            json!({ "user": main.filled("/users/{id}").0.trim_start_matches("/users/") })
        }
        ("POST", "/api/v1/auth/password") => json!({ "current": PASSWORD, "new": "a new one, and a long one" }),
        ("POST", "/api/v1/bindings") => {
            json!({ "user": main.filled("/users/{id}").0.trim_start_matches("/users/"), "role": "support" })
        }
        (method, pattern) => tenants::body(method, pattern),
    };
    let ask = main.api.ask(method, &path).header("x-request-id", "the-request");
    let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let ask = if method == "DELETE" { ask } else { ask.raw(kind, body.to_string()) };
    let reply = ask.send().await;
    if reply.status.is_success() { Ok(newest(&main.api).await) } else { Err(reply.text) }
}

#[tokio::test]
async fn every_route_that_changes_something_leaves_an_entry() {
    let routes = tenants::routes().into_iter().map(|(method, pattern, _)| (method, pattern));
    let routes = routes.filter(|(method, pattern)| {
        let route = format!("{method} {pattern}");
        method != "GET" && !HARMLESS.contains(&route.as_str()) && !TRIED_ELSEWHERE.contains(&route.as_str())
    });
    let tried = stream::iter(routes).for_each_concurrent(4, |(method, pattern)| async move {
        let entry = entry_of(&method, &pattern).await;
        let entry = entry.unwrap_or_else(|why| panic!("{method} {pattern} was to succeed: {why}"));
        assert_eq!(entry["request_id"], "the-request", "{method} {pattern} left no entry");
        assert_eq!(entry["actor"]["name"], EMAIL, "{method} {pattern}");
        let (noun, verb) = entry["action"].as_str().unwrap().split_once('.').unwrap();
        let is_word = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'-');
        assert!(is_word(noun) && is_word(verb), "{method} {pattern}: {}", entry["action"]);
        assert_eq!(entry["resource"]["kind"], noun);
    });
    tried.await;
}

#[tokio::test]
async fn an_entry_tells_who_what_from_where_and_what_it_was() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let patch = api.ask("PATCH", "/api/v1/devices/boiler-1").header("user-agent", "console/1");
    let patch = patch.raw("application/merge-patch+json", r#"{"group":"site/line-3"}"#).send().await.expect(200);
    let entry = newest(&api).await;
    assert_eq!(entry["actor"], json!({ "kind": "user", "id": api.admin, "name": EMAIL }));
    assert_eq!((&entry["action"], &entry["device"]), (&json!("device.update"), &json!("boiler-1")));
    assert_eq!(entry["resource"], json!({ "kind": "device", "id": "boiler-1" }));
    assert_eq!((&entry["before"]["group"], &entry["after"]["group"]), (&Value::Null, &json!("site/line-3")));
    assert_eq!((&entry["before"]["version"], &entry["after"]["version"]), (&json!(1), &json!(2)));
    assert_eq!(entry["after"]["status"], Value::Null, "what the device says by itself is no part of it");
    assert_eq!(entry["request_id"], patch.header("x-request-id"));
    assert_eq!((&entry["address"], &entry["user_agent"]), (&json!("127.0.0.1"), &json!("console/1")));
    assert_eq!(entry["at"], "2025-11-21T12:00:00.000Z");
    let seq = entry["seq"].as_i64().unwrap();
    assert_eq!(api.get(&format!("{PATH}/{seq}")).await.expect(200).body, entry);
    api.get(&format!("{PATH}/{}", seq + 1)).await.problem(404, "no-such-audit-entry");
    api.get(&format!("{PATH}/first")).await.problem(400, "bad-id");
}

#[tokio::test]
async fn what_was_refused_or_changed_nothing_leaves_no_entry() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let before = newest(&api).await;
    api.post("/api/v1/devices", json!({ "id": "boiler-1" })).await.problem(409, "device-exists");
    let patch =
        |body: &str| api.ask("PATCH", "/api/v1/devices/boiler-1").raw("application/merge-patch+json", body.to_owned());
    patch("{}").send().await.expect(200);
    patch(r#"{"disabled":false}"#).send().await.expect(200);
    patch(r#"{"gateway":"nobody"}"#).send().await.problem(422, "no-such-gateway");
    assert_eq!(newest(&api).await, before);
}

#[tokio::test]
async fn what_a_broker_is_asked_is_known_before_it_answers() {
    let main = Main::with_one_of_each().await;
    let (path, _) = main.filled("/api/v1/sessions/{id}");
    main.api.ask("DELETE", &path).send().await.problem(503, "no-broker");
    let entry = newest(&main.api).await;
    assert_eq!((&entry["action"], &entry["device"]), (&json!("session.end"), &json!("boiler-1")));
    assert_eq!(entry["before"]["client_id"], "client-of-main");
}

#[tokio::test]
async fn a_repeated_request_is_one_entry() {
    let api = Api::start().await;
    for status in [201, 201] {
        let ask = api.ask("POST", "/api/v1/devices").header("idempotency-key", "k");
        ask.json(&json!({ "id": "boiler-1" })).send().await.expect(status);
    }
    assert_eq!(entries(&api, "action=device.enrol").await.len(), 1);
}

#[tokio::test]
async fn no_secret_is_in_it() {
    let api = Api::start().await;
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let enrolled = api.enrol("boiler-1").await;
    let issued = api.post("/api/v1/devices/boiler-1/credentials", json!({})).await.expect(201).body;
    let rotated = api.post("/api/v1/devices/boiler-1/credentials/rotate", json!({})).await.expect(201).body;
    let key = api.post("/api/v1/api-keys", json!({ "name": "k", "role": "viewer" })).await.expect(201).body;
    let user = json!({ "email": "ada@example.com", "password": "a password of ada" });
    let user = api.post("/api/v1/users", user).await.expect(201).body;
    let user = format!("/api/v1/users/{}", user["id"].as_str().unwrap());
    let patch = api.ask("PATCH", &user).raw("application/merge-patch+json", r#"{"password":"another one of ada"}"#);
    patch.send().await.expect(200);
    assert_eq!(newest(&api).await["action"], "user.update", "a new password is a change");
    let hash: String = sqlx::query_scalar("select password_hash from app_user where email = 'ada@example.com'")
        .fetch_one(api.db.pool())
        .await
        .unwrap();
    let all = everything(&api).await;
    assert!(all.contains("ada@example.com") && all.contains("credential.rotate"));
    let secrets =
        [&enrolled["credential"]["password"], &issued["password"], &rotated["password"], &key["secret"]].map(text);
    for secret in secrets.iter().map(String::as_str).chain(["a password of ada", "another one of ada", &hash, "argon2"])
    {
        assert!(!all.contains(secret), "{secret}");
    }
}

#[tokio::test]
async fn an_import_is_an_entry_for_each_device() {
    let api = Api::start().await;
    let csv = "id,type,gateway\r\ngw,gateway,\r\nf-1,freezer,gw\r\n";
    api.ask("POST", "/api/v1/devices/import").raw("text/csv", csv).send().await.expect(201);
    let of = |entry: &Value| (entry["device"].clone(), entry["after"]["gateway"].clone());
    let made = entries(&api, "action=device.enrol").await;
    assert_eq!(made.iter().map(of).collect::<Vec<_>>(), [(json!("f-1"), json!("gw")), (json!("gw"), Value::Null)]);
}

#[tokio::test]
async fn a_program_is_named_with_whom_it_belongs_to() {
    let api = Api::start().await;
    let key =
        api.post("/api/v1/api-keys", json!({ "name": "order service", "role": "operator" })).await.expect(201).body;
    let secret = key["secret"].as_str().unwrap();
    api.as_who(secret, "POST", "/api/v1/devices").json(&json!({ "id": "boiler-1" })).send().await.expect(201);
    let actor = newest(&api).await["actor"].clone();
    assert_eq!(actor, json!({ "kind": "api-key", "id": key["id"], "name": format!("order service of {EMAIL}") }));
}

#[tokio::test]
async fn refusals_are_counted_and_written_down_as_one() {
    let api = Api::start().await;
    let (nobody, token) = api.user("nobody@example.com", "").await;
    for _ in 0..3 {
        api.pass(TimeDelta::seconds(1));
        api.as_who(&token, "GET", "/api/v1/devices").send().await.problem(403, "forbidden");
    }
    api.as_who(&token, "DELETE", "/api/v1/devices/boiler-1").send().await.problem(403, "forbidden");
    api.anonymous("GET", "/api/v1/devices").send().await.problem(401, "no-token");
    assert!(api.metric("muster_http_denials_total{what=\"devices:read\"}").await >= 3.0);
    assert_eq!(entries(&api, "action=access").await.len(), 0, "not while they are counted");
    api.app.write_denials().await;
    api.app.write_denials().await;
    let denied = entries(&api, "action=access.denied").await;
    assert_eq!(denied.len(), 2);
    let read = denied.iter().find(|entry| entry["resource"]["id"] == "devices:read").unwrap();
    assert_eq!(read["actor"], json!({ "kind": "user", "id": nobody, "name": "nobody@example.com" }));
    let after = json!({
        "count": 3, "first_at": "2025-11-21T12:00:01.000Z", "last_at": "2025-11-21T12:00:03.000Z",
        "last": "GET /api/v1/devices",
    });
    assert_eq!(read["after"], after);
    assert_eq!(read["address"], "127.0.0.1");
}

#[tokio::test]
async fn a_key_that_has_ended_is_known_when_it_comes_again() {
    let api = Api::start().await;
    let new = json!({ "name": "k", "role": "viewer", "expires_in_s": 60 });
    let key = api.post("/api/v1/api-keys", new).await.expect(201).body;
    let secret = key["secret"].as_str().unwrap();
    api.as_who(secret, "GET", "/api/v1/devices").send().await.expect(200);
    api.pass(TimeDelta::seconds(61));
    api.as_who(secret, "GET", "/api/v1/devices").send().await.problem(401, "bad-token");
    api.as_who("mk_nobody", "GET", "/api/v1/devices").send().await.problem(401, "bad-token");
    api.app.write_denials().await;
    let denied = entries(&api, "action=access.denied").await;
    assert_eq!(denied.len(), 1);
    assert_eq!((&denied[0]["actor"]["id"], &denied[0]["resource"]["id"]), (&key["id"], &json!("bad-token")));
}

#[tokio::test]
async fn more_callers_than_are_counted_show_in_a_metric_only() {
    let mut setup = Setup::default();
    setup.config.audit.max_denials = 2;
    let api = Api::with(setup).await;
    for n in 0..4 {
        let (_, token) = api.user(&format!("{n}@example.com"), "").await;
        api.as_who(&token, "GET", "/api/v1/devices").send().await.problem(403, "forbidden");
    }
    assert!((api.metric("muster_http_denials_forgotten_total").await - 2.0).abs() < 0.1);
    api.app.write_denials().await;
    assert_eq!(entries(&api, "action=access.denied").await.len(), 2);
}

#[tokio::test]
async fn pages_follow_each_other_and_filters_hold() {
    let api = Api::start().await;
    for n in 0..5 {
        api.enrol(&format!("d-{n}")).await;
    }
    api.ask("DELETE", "/api/v1/devices/d-3").send().await.expect(204);
    let (mut seen, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = api.get(&format!("{PATH}?limit=4{cursor}")).await.expect(200).body;
        seen.extend(page["items"].as_array().unwrap().iter().map(|item| item["seq"].as_i64().unwrap()));
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, [6, 5, 4, 3, 2, 1]);
    for (query, count) in [
        ("action=device", 6),
        ("action=device.delete", 1),
        ("resource=device&resource_id=d-3", 2),
        ("device=d-3", 2),
        ("actor=admin%40example.com", 6),
        ("actor=somebody", 0),
        ("text=D-1", 1),
        ("from=2025-11-21T12:00:00Z&to=2025-11-21T12:00:01Z", 6),
        ("from=2025-11-21T12:00:01Z", 0),
    ] {
        assert_eq!(entries(&api, query).await.len(), count, "{query}");
    }
    for query in ["from=yesterday", "limit=0", "cursor=ZGE", "device=_x", "who=x", "text=a%00b"] {
        api.get(&format!("{PATH}?{query}")).await.problem(400, "invalid");
    }
}

/// Reads an export as somebody without the server would.
fn verified(export: &str) -> (Vec<Row>, Head) {
    let mut lines = export.lines().collect::<Vec<_>>();
    let Trailer { head } = serde_json::from_str(lines.pop().unwrap()).unwrap();
    let rows = lines.into_iter().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Row>>();
    let mut chain = Chain::beginning_with(&rows[0], None);
    for row in &rows {
        chain.next(row).unwrap();
    }
    chain.end(head).unwrap();
    (rows, head)
}

#[tokio::test]
async fn an_export_is_whole_and_proves_itself() {
    let api = Api::start().await;
    let csv = (0..1_200).fold("id\r\n".to_owned(), |csv, n| format!("{csv}d-{n}\r\n"));
    api.ask("POST", "/api/v1/devices/import").raw("text/csv", csv).send().await.expect(201);
    let export = api.get(&format!("{PATH}/export")).await.expect(200);
    assert_eq!(export.header("content-type"), "application/x-ndjson");
    let (rows, head) = verified(&export.text);
    assert_eq!((rows.len(), head.seq), (1_200, 1_200));
    let rest = api.get(&format!("{PATH}/export?after=1100")).await.expect(200);
    assert_eq!(verified(&rest.text).0, rows[1_100..]);
    api.get(&format!("{PATH}/export?after=-1")).await.problem(400, "invalid");
    let csv = api.ask("GET", &format!("{PATH}/export")).header("accept", "text/csv").send().await.expect(200);
    assert_eq!(csv.text.lines().count(), 1_201);
    assert!(csv.text.starts_with("tenant,seq,at,actor_kind,"));
    let report = api.get(&format!("{PATH}/verify")).await.expect(200).body;
    assert_eq!(
        report,
        json!({ "intact": true, "entries": 1_200, "kept_after": 0, "head": head.to_string(), "fault": null })
    );
}

#[tokio::test]
async fn what_somebody_changed_in_the_database_is_found() {
    let api = Api::start().await;
    for n in 0..3 {
        api.enrol(&format!("d-{n}")).await;
    }
    let noted = api.get(&format!("{PATH}/verify")).await.expect(200).body["head"].as_str().unwrap().to_owned();
    api.enrol("d-3").await;
    assert_eq!(api.get(&format!("{PATH}/verify?head={noted}")).await.expect(200).body["intact"], true);
    let sql = "alter table audit disable trigger all; update audit set actor_name = 'mallory' where seq = 2";
    api.db.pool().execute(sql).await.unwrap();
    let report = api.get(&format!("{PATH}/verify")).await.expect(200).body;
    let detail = "row 2 was changed: its contents do not match its hash";
    assert_eq!((&report["intact"], &report["entries"]), (&json!(false), &json!(1)));
    assert_eq!(report["fault"], json!({ "seq": 2, "detail": detail }));
    api.get(&format!("{PATH}/verify?head=2:x")).await.problem(400, "invalid");
}

#[tokio::test]
async fn a_cell_that_a_spreadsheet_would_run_is_text() {
    let api = Api::start().await;
    let sql = "update app_user set email = '=1+1@example.com'";
    api.db.pool().execute(sql).await.unwrap();
    api.enrol("boiler-1").await;
    let csv = api.ask("GET", &format!("{PATH}/export")).header("accept", "text/csv").send().await.expect(200);
    assert!(csv.text.contains(",'=1+1@example.com,"), "{}", csv.text);
}

#[tokio::test]
async fn who_reaches_some_devices_sees_what_is_about_them() {
    let api = Api::start().await;
    let new = |id: &str, group: &str| json!({ "id": id, "group": group });
    api.post("/api/v1/devices", new("in", "site/line-3")).await.expect(201);
    api.post("/api/v1/devices", new("out", "elsewhere")).await.expect(201);
    let (ada, token) = api.user("ada@example.com", "").await;
    let scope = json!({ "kind": "group", "group": "site" });
    api.post("/api/v1/bindings", json!({ "user": ada, "role": "auditor", "scope": scope })).await.expect(201);
    let seen = api.as_who(&token, "GET", PATH).send().await.expect(200).body;
    let seen = seen["items"].as_array().unwrap().iter().map(|item| item["device"].clone()).collect::<Vec<_>>();
    assert_eq!(seen, [json!("in")]);
    api.as_who(&token, "GET", &format!("{PATH}/2")).send().await.problem(404, "no-such-audit-entry");
    for path in ["verify", "export"] {
        api.as_who(&token, "GET", &format!("{PATH}/{path}")).send().await.problem(403, "out-of-scope");
    }
}

#[tokio::test]
async fn what_one_may_do_beyond_ones_scope_is_refused_by_the_database() {
    let api = Api::start().await;
    let (ada, token) = api.user("ada@example.com", "").await;
    let scope = json!({ "kind": "group", "group": "site" });
    api.post("/api/v1/bindings", json!({ "user": ada, "role": "operator", "scope": scope })).await.expect(201);
    let ask = |method, path: &str| api.as_who(&token, method, path);
    let new = |id: &str, group: &str| json!({ "id": id, "group": group });
    ask("POST", "/api/v1/devices").json(&new("a", "site/line-3")).send().await.expect(201);
    let refused = ask("POST", "/api/v1/devices").json(&new("b", "elsewhere")).send().await.problem(403, "out-of-scope");
    assert!(refused.body["detail"].as_str().unwrap().contains("expected"), "{}", refused.text);
    let moved = ask("PATCH", "/api/v1/devices/a").raw("application/merge-patch+json", r#"{"group":"elsewhere"}"#);
    moved.send().await.problem(403, "out-of-scope");
    assert_eq!(ask("GET", "/api/v1/devices").send().await.expect(200).ids(), ["a"]);
    // What has happened is told without what did not.
    ask("DELETE", "/api/v1/devices/a").send().await.expect(204);
    assert_eq!(newest(&api).await["action"], "device.delete");
}
