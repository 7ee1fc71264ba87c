//! Tenants do not know of each other, whatever is asked; the lines that keep them apart are tried one by one.
//!
//! Routes are taken from the document, so a new one is tried too; it may have to say here which id stands in its path,
//! and with what body it does something.

use std::time::Duration;

use fleet_core::id::UserId;
use fleet_core::tenancy::{self, Bounds};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Executor};
use uuid::Uuid;

use crate::harness::{Api, Ask, Reply};

/// What the tenant `main` has, of each noun one.
pub(crate) struct Main {
    pub(crate) api: Api,
    /// The segment of a path before a variable, the id in `main`, and one that nobody has.
    pub(crate) ids: Vec<(&'static str, String, String)>,
}

/// A body with which a route would do something, by its method and the end of its path; `{}` for all others.
pub(crate) fn body(method: &str, path: &str) -> Value {
    match (method, path) {
        ("POST", "/api/v1/devices") => json!({ "id": "boiler-1" }),
        ("POST", "/api/v1/users") => json!({ "email": "eve@example.com", "password": "correct horse battery" }),
        ("POST", "/api/v1/tenants") => {
            json!({ "id": "acme", "admin": { "email": "eve@example.com", "password": "correct horse battery" } })
        }
        ("POST", "/api/v1/groups") | ("PATCH", "/api/v1/groups/{path}") => json!({ "path": "hall" }),
        ("POST", "/api/v1/roles") => json!({ "id": "orders" }),
        ("POST", "/api/v1/saved-searches") | ("PUT", "/api/v1/saved-searches/{id}") => {
            json!({ "name": "s", "query": "*" })
        }
        ("POST", "/api/v1/devices/{id}/commands") => json!({ "name": "ping" }),
        ("PUT", "/api/v1/devices/{id}/log-level") => json!({ "level": "warn", "for": "1h" }),
        ("PATCH", "/api/v1/devices/{id}/shadow") => json!({ "desired": { "fan": 1 } }),
        ("PUT", "/api/v1/roles/{id}") => json!({ "permissions": ["devices:read"], "topic_rules": [] }),
        ("POST", "/api/v1/authorities") => json!({ "name": "ca", "kind": "built-in" }),
        ("POST", "/api/v1/devices/{id}/certificates") => json!({ "csr_pem": csr() }),
        ("PUT", "/api/v1/authorities/{id}/crl") => json!({ "crl_pem": "x" }),
        ("POST", "/api/v1/claims") => {
            json!({ "name": "c", "approval": "auto", "max_devices": 1, "expires_in_s": 60 })
        }
        ("PUT", "/api/v1/authorities/{id}/certificate") => json!({ "certificate_pem": "x", "chain_pem": "x" }),
        ("PATCH", "/api/v1/users/{id}" | "/api/v1/devices/{id}" | "/api/v1/authorities/{id}") => {
            json!({ "disabled": true })
        }
        _ => json!({}),
    }
}

fn csr() -> String {
    let request = rcgen::CertificateParams::new(Vec::new()).unwrap();
    request.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

/// Words that no stranger may read.
const MARKS: [&str; 11] = [
    "search-of-main",
    "command-of-main",
    "claim-of-main",
    "group-of-main",
    "hall-of-main",
    "boiler-1",
    "ada@example.com",
    "orders",
    "a secret payload",
    "client-of-main",
    "ca-of-main",
];

impl Main {
    pub(crate) async fn with_one_of_each() -> Self {
        let api = Api::start().await;
        api.post("/api/v1/roles", json!({ "id": "orders" })).await.expect(201);
        let (ada, _) = api.user("ada@example.com", "orders").await;
        let key = api.post("/api/v1/api-keys", json!({ "name": "k", "role": "orders" })).await.expect(201);
        let binding = json!({ "user": ada, "role": "viewer", "scope": { "kind": "group", "group": "group-of-main" } });
        let binding = api.post("/api/v1/bindings", binding).await.expect(201);
        let enrolled = api.enrol("boiler-1").await;
        let authority = json!({ "name": "ca-of-main", "kind": "built-in" });
        let authority = api.post("/api/v1/authorities", authority).await.expect(201);
        let certificate =
            api.post("/api/v1/devices/boiler-1/certificates", json!({ "csr_pem": csr() })).await.expect(201);
        let claim = json!({ "name": "claim-of-main", "approval": "manual", "max_devices": 1, "expires_in_s": 60 });
        let claim = api.post("/api/v1/claims", claim).await.expect(201);
        let asked = json!({ "id": "freezer-1", "nonce": "0123456789abcdef", "token_sha256": "0".repeat(64) });
        let secret = claim.body["secret"].as_str().unwrap();
        api.as_who(secret, "POST", "/api/v1/provision").json(&asked).send().await.expect(202);
        let asked = api.get("/api/v1/claims/requests").await.expect(200);
        api.post("/api/v1/groups", json!({ "path": "hall-of-main" })).await.expect(201);
        let search = json!({ "name": "search-of-main", "query": "*", "shared": true });
        let search = api.post("/api/v1/saved-searches", search).await.expect(201);
        let command = json!({ "name": "command-of-main" });
        let command = api.post("/api/v1/devices/boiler-1/commands", command).await.expect(201);
        let level = json!({ "level": "debug", "for": "1h" });
        api.ask("PUT", "/api/v1/devices/boiler-1/log-level").json(&level).send().await.expect(200);
        let session = Uuid::now_v7();
        let sql = format!(
            "insert into session (id, name, tenant_key, device_key, client_id, expiry_s, connected, since, created_at)
             select '{session}', 'n', tenant_key, key, 'client-of-main', 60, true, now(), now() from device;
             insert into dead_letter
             select gen_random_uuid(), tenant_key, 'boiler-1', 'topic', 'reason', convert_to('a secret payload', 'UTF8'), now()
               from device;
             insert into connection_event (id, tenant_key, device_key, client_id, kind, detail, count, at, minute)
             select gen_random_uuid(), tenant_key, key, 'client-of-main', 'flapping', '{{}}', 1, now(), now() from device;
             insert into shape (tenant_key, digest, metrics, kinds) select tenant_key, '', '{{temp}}', 'n' from device;
             insert into telemetry (device_key, ts, seq, shape_id, nums)
             select d.key, '2025-11-21T11:59:00Z', 1, s.id, '{{21.5}}' from device d join shape s using (tenant_key);
             insert into device_latest select key, now(), '{{\"temp\": [1763722800000, 1, 21.5]}}' from device"
        );
        api.db.pool().execute(AssertSqlSafe(sql)).await.unwrap();
        api.enrol("gone-1").await;
        let gone = api.post("/api/v1/devices/gone-1/decommission", json!({ "purge": true })).await.expect(202);
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let nobodys = |prefix: &str| format!("{prefix}_{}", Uuid::now_v7().simple());
        let ids = vec![
            ("devices", "boiler-1".to_owned(), "boiler-0".to_owned()),
            ("credentials", text(&enrolled["credential"]["id"]), nobodys("crd")),
            ("certificates", text(&certificate.body["id"]), nobodys("crd")),
            ("authorities", text(&authority.body["id"]), nobodys("aut")),
            ("groups", "hall-of-main".to_owned(), "hall-of-none".to_owned()),
            ("tenants", "main".to_owned(), "nope".to_owned()),
            // Far enough that a stranger, whose audit has a first entry too, has none of this number.
            ("audit", "6".to_owned(), "999999".to_owned()),
            ("users", ada.to_string(), nobodys("usr")),
            ("bindings", text(&binding.body["id"]), nobodys("bnd")),
            ("roles", "orders".to_owned(), "nobody".to_owned()),
            ("api-keys", text(&key.body["id"]), nobodys("key")),
            ("sessions", format!("ses_{}", session.simple()), nobodys("ses")),
            ("connections", nobodys("con"), nobodys("con")),
            ("claims", text(&claim.body["id"]), nobodys("clm")),
            ("decommissions", text(&gone.body["id"]), nobodys("dcm")),
            ("saved-searches", text(&search.body["id"]), nobodys("qry")),
            ("commands", text(&command.body["id"]), nobodys("cmd")),
            ("requests", asked.ids()[0].to_owned(), nobodys("crq")),
        ];
        Self { api, ids }
    }

    /// An admin of another tenant.
    pub(crate) async fn stranger(&self) -> (UserId, String) {
        let (id, token) = self.api.user("stranger@example.org", "admin").await;
        let sql = "with other as (insert into tenant (id, created_at) values ('other', now()) returning key)
                   update app_user set tenant_key = other.key from other where id = $1";
        sqlx::query(sql).bind(id.uuid()).execute(self.api.db.pool()).await.unwrap();
        (id, token)
    }

    /// A path with the ids of `main` in it, and with those of nobody.
    pub(crate) fn filled(&self, path: &str) -> (String, String) {
        let (mut ours, mut nobodys, mut before) = (String::new(), String::new(), "");
        for segment in path.split('/').skip(1) {
            let (our, nobody) = if segment.starts_with('{') {
                let found = self.ids.iter().find(|(noun, ..)| *noun == before);
                let Some((_, our, nobody)) = found else {
                    panic!("{path}: say which {before} of the tenant main stands for {segment}, in with_one_of_each")
                };
                (our.as_str(), nobody.as_str())
            } else {
                (segment, segment)
            };
            before = segment;
            ours = format!("{ours}/{our}");
            nobodys = format!("{nobodys}/{nobody}");
        }
        (ours, nobodys)
    }

    /// All that is stored of `main`.
    pub(crate) async fn rows(&self) -> Vec<(String, Option<String>)> {
        let mut rows = Vec::new();
        let bounds = Bounds::of(self.api.db.tenant());
        let mut tx = tenancy::begin(self.api.db.pool(), &bounds, Duration::from_secs(10)).await.unwrap();
        fleet_core::device::open(&mut tx, self.api.db.tenant(), &"boiler-1".parse().unwrap()).await.unwrap();
        for table in tables(&self.api).await {
            let sql = format!("select string_agg(t::text, e'\\n' order by t::text) from {table} t");
            rows.push((table, sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(&mut *tx).await.unwrap()));
        }
        rows
    }

    pub(crate) fn says_nothing(&self, reply: &Reply, route: &str) {
        let ids =
            self.ids.iter().filter(|(noun, ..)| !["audit", "tenants"].contains(noun)).map(|(_, id, _)| id.as_str());
        for mark in MARKS.into_iter().chain(ids) {
            assert!(!reply.text.contains(mark), "{route} told a stranger of {mark}: {}", reply.text);
        }
    }
}

async fn tables(api: &Api) -> Vec<String> {
    let tables = sqlx::query_scalar(
        "select distinct c.relname::text from pg_class c join pg_policy p on p.polrelid = c.oid order by 1",
    );
    tables.fetch_all(api.db.pool()).await.unwrap()
}

/// Method, pattern and query parameters of every route that needs a token and does not end it.
pub(crate) fn routes() -> Vec<(String, String, Vec<String>)> {
    let document: Value = serde_json::from_str(&api::openapi_json()).unwrap();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let open = operation["security"].as_array().is_some_and(Vec::is_empty)
                // Its token is that of a claim, which names the tenant.
                || operation["security"][0]["claim"].is_array();
            if open || path.starts_with("/api/v1/auth/logout") || path == "/api/v1/auth/refresh" {
                continue;
            }
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            let asked = parameters.iter().filter(|parameter| parameter["in"] == "query");
            let asked = asked.map(|parameter| parameter["name"].as_str().unwrap().to_owned()).collect();
            routes.push((method.to_uppercase(), path.clone(), asked));
        }
    }
    // Looking comes first, making last: what a stranger makes is the stranger's.
    routes.sort_by_key(|(method, path, _)| (method != "GET", !path.contains('{')));
    routes
}

/// Status and body of the answer about a path, without what names the request; `other` tells where the ids are.
pub(crate) fn plain(reply: &Reply, path: &str, other: &str) -> (u16, String) {
    let mut body = reply.body.clone();
    if let Some(body) = body.as_object_mut() {
        body.remove("request_id");
        body.remove("instance");
    }
    let ids = path.split('/').zip(other.split('/')).filter(|(id, other)| id != other);
    let said = ids.fold(body.to_string(), |said, (id, _)| said.replace(id, "…"));
    (reply.status.as_u16(), said)
}

pub(crate) fn ask<'a>(main: &'a Main, token: &str, method: &str, path: &str, body: &Value) -> Ask<'a> {
    let ask = main.api.as_who(token, method, path);
    match method {
        "GET" | "DELETE" => ask,
        "PATCH" => ask.raw("application/merge-patch+json", body.to_string()),
        _ => ask.json(body),
    }
}

/// Tries every route as the admin of another tenant.
async fn try_everything(main: &Main, token: &str, second_line: bool) {
    let switch = if second_line { "enable" } else { "disable" };
    let all = tables(&main.api).await;
    let turn = |how: &str| {
        let sql = all.iter().map(|table| format!("alter table {table} {how} row level security"));
        let sql = sql.collect::<Vec<_>>().join(";");
        main.api.db.pool().execute(AssertSqlSafe(sql))
    };
    let before = main.rows().await;
    for (method, pattern, parameters) in routes() {
        let (ours, nobodys) = main.filled(&pattern);
        let body = body(&method, &pattern);
        let route = format!("{method} {pattern}");
        turn(switch).await.unwrap();
        let reply = ask(main, token, &method, &ours, &body).send().await;
        assert_ne!(reply.status.as_u16(), 401, "{route}: the stranger is not let in at all");
        if ours != nobodys {
            let unknown = ask(main, token, &method, &nobodys, &body).send().await;
            assert!(reply.status.is_client_error() || reply.status.as_u16() == 503, "{route}: {}", reply.text);
            assert_eq!(
                plain(&reply, &ours, &nobodys),
                plain(&unknown, &nobodys, &ours),
                "{route} tells that an id exists elsewhere"
            );
        } else if method == "GET" {
            main.says_nothing(&reply, &route);
            if parameters.iter().any(|name| name == "device") {
                let reply = ask(main, token, &method, &format!("{ours}?device=boiler-1"), &body).send().await;
                assert_eq!(reply.body["items"].as_array().map_or(0, Vec::len), 0, "{route}: {}", reply.text);
            }
        }
        turn("enable").await.unwrap();
        assert_eq!(main.rows().await, before, "{route} changed something of another tenant");
    }
}

#[tokio::test]
async fn a_stranger_learns_and_changes_nothing_through_any_route() {
    let main = Main::with_one_of_each().await;
    let (_, token) = main.stranger().await;
    try_everything(&main, &token, true).await;
}

#[tokio::test]
async fn each_statement_keeps_to_its_tenant_without_the_second_line_too() {
    let main = Main::with_one_of_each().await;
    let (_, token) = main.stranger().await;
    try_everything(&main, &token, false).await;
}

#[tokio::test]
async fn the_paths_that_strangers_try_are_there_for_those_at_home() {
    let main = Main::with_one_of_each().await;
    for (method, pattern, _) in routes() {
        let (ours, nobodys) = main.filled(&pattern);
        if method == "GET" && ours != nobodys && !pattern.contains("/connections/") {
            main.api.get(&ours).await.expect(200);
        }
    }
}

const NEW_PASSWORD: &str = "a password of wile e. coyote";

fn acme(email: &str) -> Value {
    json!({ "id": "acme", "admin": { "email": email, "password": NEW_PASSWORD } })
}

#[tokio::test]
async fn a_tenant_is_made_with_its_first_admin() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let made = api.post("/api/v1/tenants", acme("wile@example.com")).await.expect(201);
    assert_eq!(made.header("location"), "/api/v1/tenants/acme");
    assert_eq!((&made.body["id"], &made.body["admin"]["role"]), (&json!("acme"), &json!("admin")));
    assert!(!made.text.contains(NEW_PASSWORD), "{}", made.text);
    let login = json!({ "email": "wile@example.com", "password": NEW_PASSWORD, "cookie": false });
    let login = api.anonymous("POST", "/api/v1/auth/login").json(&login).send().await.expect(200).body;
    let token = login["access_token"].as_str().unwrap();
    let ask = |method, path: &str| api.as_who(token, method, path);
    let me = ask("GET", "/api/v1/me").send().await.expect(200).body;
    assert_eq!((&me["tenant"], &me["platform"]), (&json!("acme"), &json!(false)));
    // The same name is another device.
    assert_eq!(ask("GET", "/api/v1/devices").send().await.expect(200).ids(), Vec::<&str>::new());
    let enrolled = ask("POST", "/api/v1/devices").json(&json!({ "id": "boiler-1" })).send().await.expect(201).body;
    assert_eq!(enrolled["credential"]["username"], "acme/boiler-1");
    ask("DELETE", "/api/v1/devices/boiler-1").send().await.expect(204);
    api.get("/api/v1/devices/boiler-1").await.expect(200);
    // Each has a chain of its own, and the new one begins with who began it.
    for (mine, actions) in
        [(false, vec!["device.enrol", "tenant.create"]), (true, vec!["tenant.create", "device.enrol", "device.delete"])]
    {
        let who = |path: &str| if mine { ask("GET", path) } else { api.ask("GET", path) };
        let told = who("/api/v1/audit").send().await.expect(200).body["items"].as_array().unwrap().clone();
        let told = told.iter().rev().filter(|entry| entry["action"] != "user.log-in").collect::<Vec<_>>();
        assert_eq!(told.iter().map(|entry| entry["action"].as_str().unwrap()).collect::<Vec<_>>(), actions);
        assert_eq!(
            told.iter().find(|entry| entry["action"] == "tenant.create").unwrap()["actor"]["id"],
            api.admin.to_string()
        );
        assert_eq!(who("/api/v1/audit/verify").send().await.expect(200).body["intact"], true);
    }
    assert_eq!(api.get("/api/v1/tenants").await.expect(200).ids(), ["acme", "main"]);
    let first = api.get("/api/v1/tenants?limit=1").await.expect(200).body;
    let rest = format!("/api/v1/tenants?cursor={}", first["next_cursor"].as_str().unwrap());
    assert_eq!(api.get(&rest).await.expect(200).ids(), ["main"]);
    api.get("/api/v1/tenants/acme").await.expect(200);
    api.get("/api/v1/tenants/nobody").await.problem(404, "no-such-tenant");
}

#[tokio::test]
async fn a_tenant_is_made_whole_or_not_at_all_and_once() {
    let mut setup = crate::harness::Setup::default();
    setup.config.auth.max_tenants = 2;
    let api = Api::with(setup).await;
    api.post("/api/v1/tenants", acme(crate::harness::EMAIL)).await.problem(409, "email-taken");
    api.get("/api/v1/tenants/acme").await.problem(404, "no-such-tenant");
    let mut weak = acme("wile@example.com");
    weak["admin"]["password"] = json!("password");
    api.post("/api/v1/tenants", weak).await.problem(400, "invalid");
    for id in ["_acme", "a/b", "", ".."] {
        let mut bad = acme("wile@example.com");
        bad["id"] = json!(id);
        api.post("/api/v1/tenants", bad).await.problem(400, "invalid");
    }
    for _ in 0..2 {
        let ask = api.ask("POST", "/api/v1/tenants").header("idempotency-key", "k");
        ask.json(&acme("wile@example.com")).send().await.expect(201);
    }
    api.post("/api/v1/tenants", acme("other@example.com")).await.problem(409, "too-many");
}

#[tokio::test]
async fn tenants_are_for_who_stands_above_them() {
    let api = Api::start().await;
    let (_, token) = api.user("ada@example.com", "admin").await;
    for (method, path) in [("GET", "/api/v1/tenants"), ("GET", "/api/v1/tenants/main"), ("POST", "/api/v1/tenants")] {
        let ask = api.as_who(&token, method, path);
        let ask = if method == "POST" { ask.json(&acme("wile@example.com")) } else { ask };
        let refused = ask.send().await.problem(403, "forbidden");
        assert!(refused.body["detail"].as_str().unwrap().contains("platform standing"), "{}", refused.text);
    }
    assert_eq!(api.get("/api/v1/tenants").await.expect(200).ids(), ["main"]);
}
