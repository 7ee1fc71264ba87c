//! What the admin of another tenant learns by naming things of the tenant `main`: not even that they are there.
//!
//! [`crate::tenants`] tries paths; here the same names are tried by an API key, in headers, in every parameter of a query
//! and in every member of a body that the document tells of. A name that exists elsewhere must be answered, header by
//! header, like one that exists nowhere.

use fleet_core::id::UserId;
use serde_json::{Map, Value, json};

use crate::harness::{Api, Reply};
use crate::tenants::{self, Main};

/// E-mail addresses are one space for the whole server, since people log in by them alone (`docs/security.md`).
const KNOWN_ORACLES: [&str; 2] = ["POST /api/v1/users: email", "PATCH /api/v1/users/{id}: email"];

/// Parameters and members that name nothing.
const OF_NO_NOUN: [&str; 12] = [
    "limit",
    "from",
    "to",
    "order",
    "bucket",
    "format",
    "dry_run",
    "metric",
    "transport",
    "password",
    "current",
    "new",
];

/// The admin of the tenant `other`, an access token of theirs, and an API key.
struct Stranger {
    id: UserId,
    bearers: [String; 2],
}

impl Stranger {
    async fn beside(main: &Main) -> Self {
        let (id, token) = main.stranger().await;
        let key = main.api.as_who(&token, "POST", "/api/v1/api-keys").json(&json!({ "name": "k", "role": "admin" }));
        let key = key.send().await.expect(201).body["secret"].as_str().unwrap().to_owned();
        Self { id, bearers: [token, key] }
    }

    fn token(&self) -> &str {
        &self.bearers[0]
    }
}

/// An answer without what differs between any two, and without the names that were asked for: status, headers, body.
fn plain(reply: &Reply, asked: &[&str]) -> (u16, Vec<(String, String)>, String) {
    let mut body = reply.body.clone();
    if let Some(body) = body.as_object_mut() {
        body.remove("request_id");
        body.remove("instance");
    }
    let differs = |name: &str| ["x-request-id", "content-length"].contains(&name);
    let headers = reply.headers.iter().filter(|(name, _)| !differs(name.as_str()));
    let headers =
        headers.map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()));
    let text = if body.is_null() { reply.text.clone() } else { body.to_string() };
    let text = asked.iter().fold(text, |text, name| text.replace(name, "…"));
    (reply.status.as_u16(), headers.collect(), text)
}

/// Whether nothing but the names tells two answers apart; what a stranger made or changed has versions and secrets of its own.
fn tells_the_same(route: &str, one: &Reply, other: &Reply, names: &[&str]) -> bool {
    let is_change = one.status.is_success() && one.status == other.status && !route.contains("/access/");
    is_change || plain(one, names) == plain(other, names)
}

#[tokio::test]
async fn headers_tell_no_stranger_what_is_there() {
    let main = Main::with_one_of_each().await;
    let stranger = Stranger::beside(&main).await;
    let mut tried = 0;
    for (method, pattern, _) in tenants::routes() {
        let (ours, nobodys) = main.filled(&pattern);
        if ours == nobodys {
            continue;
        }
        for bearer in &stranger.bearers {
            for (name, value) in
                [("if-none-match", "*"), ("if-match", "*"), ("if-match", "\"x\""), ("x-tenant", "main")]
            {
                let body = tenants::body(&method, &pattern);
                let ask = |path| tenants::ask(&main, bearer, &method, path, &body).header(name, value);
                let (about_ours, about_nobodys) = (ask(&ours).send().await, ask(&nobodys).send().await);
                let route = format!("{method} {pattern} with {name}: {value}");
                let status = about_ours.status.as_u16();
                assert!((400..500).contains(&status) || status == 503, "{route}: {}", about_ours.text);
                assert_eq!(
                    tenants::plain(&about_ours, &ours, &nobodys),
                    tenants::plain(&about_nobodys, &nobodys, &ours),
                    "{route}"
                );
                assert_eq!(plain(&about_ours, &[]).1, plain(&about_nobodys, &[]).1, "{route}: headers tell");
                tried += 1;
            }
        }
    }
    assert!(tried > 200, "only {tried} requests were tried");
}

/// What stands for something in `main`, each with a name of the same length that nobody has.
fn names(main: &Main) -> Vec<(String, String)> {
    let ids = main.ids.iter().filter(|(noun, ..)| *noun != "audit");
    let ids = ids.map(|(_, ours, nobodys)| (ours.clone(), nobodys.clone()));
    let named = ["group-of-main", "client-of-main", "ca-of-main", "claim-of-main"];
    let named = named.map(|ours| (ours.to_owned(), ours.replace("main", "nope")));
    ids.chain(named).chain([("ada@example.com".to_owned(), "bob@example.com".to_owned())]).collect()
}

#[tokio::test]
async fn no_parameter_of_a_query_reaches_into_another_tenant() {
    let main = Main::with_one_of_each().await;
    let stranger = Stranger::beside(&main).await;
    for (method, pattern, parameters) in tenants::routes() {
        // What a tail says first is sealed anew each time; `logs.rs` tries it.
        if method != "GET" || pattern.contains('{') || pattern == "/api/v1/logs/tail" {
            continue;
        }
        for parameter in parameters.iter().filter(|name| !OF_NO_NOUN.contains(&name.as_str())) {
            for (ours, nobodys) in names(&main) {
                let ask = async |value: &str| {
                    let path = format!("{pattern}?{parameter}={value}");
                    main.api.as_who(stranger.token(), "GET", &path).send().await
                };
                let route = format!("GET {pattern}?{parameter}=");
                let (about_ours, about_nobodys) = (ask(&ours).await, ask(&nobodys).await);
                assert_eq!(plain(&about_ours, &[&ours]), plain(&about_nobodys, &[&nobodys]), "{route}");
                if about_ours.status.is_success() {
                    main.says_nothing(&about_ours, &route);
                }
            }
        }
    }
}

#[tokio::test]
async fn a_cursor_of_one_tenant_shows_another_its_own() {
    let main = Main::with_one_of_each().await;
    let stranger = Stranger::beside(&main).await;
    main.api.enrol("boiler-2").await;
    main.api.user("bob@example.com", "orders").await;
    let mut tried = 0;
    for (method, pattern, parameters) in tenants::routes() {
        if method != "GET" || pattern.contains('{') || !parameters.iter().any(|name| name == "cursor") {
            continue;
        }
        let page = main.api.get(&format!("{pattern}?limit=1")).await;
        let Some(cursor) = page.body["next_cursor"].as_str() else { continue };
        let path = format!("{pattern}?cursor={cursor}");
        let reply = main.api.as_who(stranger.token(), "GET", &path).send().await;
        main.says_nothing(&reply, &path);
        assert!(!reply.text.contains("boiler-2") && !reply.text.contains("bob@"), "{path}: {}", reply.text);
        tried += 1;
    }
    assert!(tried >= 4, "only {tried} lists have a second page");
}

/// A body that would do something for the stranger, to be spoilt member by member.
fn sound(method: &str, pattern: &str, stranger: &Stranger) -> Value {
    match (method, pattern) {
        ("POST", "/api/v1/bindings") => json!({ "user": stranger.id, "role": "viewer" }),
        ("POST", "/api/v1/api-keys") => json!({ "name": "k", "role": "viewer" }),
        ("POST", "/api/v1/access/check") => json!({ "action": "devices:read" }),
        ("POST", "/api/v1/users") => json!({ "email": "new@example.com" }),
        ("POST", "/api/v1/authorities") => json!({ "name": "mine", "kind": "built-in" }),
        ("POST", "/api/v1/devices" | "/api/v1/roles") => json!({ "id": "mine" }),
        // Of the stranger's own: what a path names is tried elsewhere.
        ("PATCH", "/api/v1/devices/{id}" | "/api/v1/users/{id}") => json!({}),
        _ => tenants::body(method, pattern),
    }
}

/// The path of something of the stranger's own, if the pattern names one thing only.
fn own(pattern: &str, user: &str) -> Option<String> {
    match pattern.matches('{').count() {
        0 => Some(pattern.to_owned()),
        1 if pattern.starts_with("/api/v1/devices/") => Some(pattern.replace("{id}", "own")),
        1 if pattern.starts_with("/api/v1/users/") => Some(pattern.replace("{id}", user)),
        1 if pattern.starts_with("/api/v1/roles/") => Some(pattern.replace("{id}", "own")),
        _ => None,
    }
}

/// The members of a schema that take a text, each as a path of names.
pub(crate) fn texts(document: &Value, schema: &Value, before: &[String], found: &mut Vec<Vec<String>>) {
    if let Some(named) = schema["$ref"].as_str() {
        let named = named.rsplit('/').next().unwrap();
        return texts(document, &document["components"]["schemas"][named], before, found);
    }
    for one in ["oneOf", "allOf", "anyOf"].iter().filter_map(|many| schema[many].as_array()).flatten() {
        texts(document, one, before, found);
    }
    if before.last().is_some_and(|name| OF_NO_NOUN.contains(&name.as_str())) {
        return;
    }
    let takes_text =
        schema["type"] == "string" || schema["type"].as_array().is_some_and(|all| all.contains(&json!("string")));
    if takes_text && !before.is_empty() {
        found.push(before.to_vec());
    }
    for (name, member) in schema["properties"].as_object().into_iter().flatten() {
        texts(document, member, &[before, std::slice::from_ref(name)].concat(), found);
    }
}

pub(crate) fn with(body: &Value, at: &[String], value: Value) -> Value {
    let Some((name, rest)) = at.split_first() else { return value };
    let mut members = body.as_object().cloned().unwrap_or_else(Map::new);
    let inner = with(members.get(name).unwrap_or(&Value::Null), rest, value);
    members.insert(name.clone(), inner);
    Value::Object(members)
}

/// Makes what [`own`] names; the user's id.
async fn make_own(api: &Api, stranger: &Stranger) -> String {
    let make =
        async |path, body: Value| api.as_who(stranger.token(), "POST", path).json(&body).send().await.expect(201).body;
    make("/api/v1/devices", json!({ "id": "own" })).await;
    make("/api/v1/roles", json!({ "id": "own" })).await;
    make("/api/v1/users", json!({ "email": "own@example.com" })).await["id"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn no_member_of_a_body_reaches_into_another_tenant() {
    let main = Main::with_one_of_each().await;
    let stranger = Stranger::beside(&main).await;
    let user = make_own(&main.api, &stranger).await;
    let document: Value = serde_json::from_str(&api::openapi_json()).unwrap();
    let before = main.rows().await;
    let (mut oracles, mut tried) = (Vec::new(), 0);
    for (method, pattern, _) in tenants::routes() {
        let schema = &document["paths"][&pattern][method.to_lowercase()]["requestBody"]["content"];
        let (Some(path), Some(schema)) = (own(&pattern, &user), schema.as_object().and_then(|all| all.values().next()))
        else {
            continue;
        };
        let mut members = Vec::new();
        texts(&document, &schema["schema"], &[], &mut members);
        let body = sound(&method, &pattern, &stranger);
        for member in members {
            for (ours, nobodys) in names(&main) {
                let ask = async |value: &str| {
                    let ask =
                        tenants::ask(&main, stranger.token(), &method, &path, &with(&body, &member, json!(value)));
                    ask.send().await
                };
                let route = format!("{method} {pattern}: {}", member.join("."));
                tried += 1;
                if KNOWN_ORACLES.contains(&route.as_str()) && ours.contains('@') {
                    // Whoever is called so from now on is the stranger's.
                    ask(&format!("new{tried}@example.com")).await;
                    ask(&ours).await.problem(409, "email-taken");
                    oracles.push(route);
                    continue;
                }
                let (about_nobodys, about_ours) = (ask(&nobodys).await, ask(&ours).await);
                let names = [ours.as_str(), &nobodys];
                // If the first made something, the second finds it there; so may the first, what another route has made.
                let is_alike = tells_the_same(&route, &about_ours, &about_nobodys, &names)
                    || tells_the_same(&route, &about_ours, &ask(&nobodys).await, &names)
                    || tells_the_same(&route, &ask(&ours).await, &ask(&nobodys).await, &names);
                assert!(is_alike, "{route} tells that {ours} is there: {} {}", about_ours.text, about_nobodys.text);
            }
        }
    }
    assert_eq!(oracles.len(), KNOWN_ORACLES.len());
    assert!(tried > 500, "only {tried} bodies were tried");
    assert_eq!(main.rows().await, before, "something of another tenant was changed");
}
