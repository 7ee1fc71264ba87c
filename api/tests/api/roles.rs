//! Roles: who may make which, and what a role may not say.

use serde_json::{Value, json};

use crate::harness::{Api, PASSWORD, Setup};

fn allow(filter: &str) -> Value {
    json!({ "effect": "allow", "action": "all", "filter": filter })
}

fn rules(filter: &str) -> Value {
    json!({ "permissions": [], "topic_rules": [allow("app/{tenant}/fine/#"), allow(filter)] })
}

#[tokio::test]
async fn a_role_is_changed_and_deleted_by_those_who_know_its_version() {
    let api = Api::start().await;
    let role =
        json!({ "id": "orders", "permissions": ["devices:read"], "topic_rules": [allow("app/{tenant}/orders/#")] });
    let made = api.post("/api/v1/roles", role).await.expect(201);
    assert_eq!((made.header("location"), made.header("etag")), ("/api/v1/roles/orders", "\"1\""));
    let path = "/api/v1/roles/orders";
    let seen = api.get(path).await.expect(200);
    assert_eq!(seen.body, made.body);
    api.ask("GET", path).header("if-none-match", "\"1\"").send().await.expect(304);

    let put =
        |version: &str| api.ask("PUT", path).header("if-match", version).json(&rules("app/{tenant}/more/#")).send();
    let changed = put("\"1\"").await.expect(200);
    assert_eq!((changed.header("etag"), &changed.body["permissions"]), ("\"2\"", &json!([])));
    put("\"1\"").await.problem(412, "version-mismatch");
    let delete = |version: &str| api.ask("DELETE", path).header("if-match", version).send();
    delete("\"1\"").await.problem(412, "version-mismatch");
    assert_eq!(api.get(path).await.expect(200).body, changed.body, "what is refused changes nothing");
    // What never changes.
    for (field, value) in [("id", json!("other")), ("platform", json!(true))] {
        let mut body = rules("app/{tenant}/x");
        body[field] = value;
        let refused = api.ask("PUT", path).json(&body).send().await.problem(400, "invalid");
        assert_eq!(refused.body["errors"][0]["field"], field);
    }
    assert_eq!(api.get(path).await.expect(200).body, changed.body);
    delete("\"2\"").await.expect(204);
    api.get(path).await.problem(404, "no-such-role");
    put("\"2\"").await.problem(404, "no-such-role");
}

#[tokio::test]
async fn names_that_are_reserved_taken_or_no_names_are_refused() {
    let api = Api::start().await;
    for id in ["admin", "operator", "release-manager", "support", "viewer", "auditor", "device", "gateway"] {
        for platform in [false, true] {
            api.post("/api/v1/roles", json!({ "id": id, "platform": platform })).await.problem(409, "role-exists");
        }
        let path = format!("/api/v1/roles/{id}");
        api.ask("PUT", &path).json(&rules("app/{tenant}/x")).send().await.problem(409, "role-built-in");
        api.ask("DELETE", &path).send().await.problem(409, "role-built-in");
    }
    api.post("/api/v1/roles", json!({ "id": "orders" })).await.expect(201);
    for platform in [false, true] {
        api.post("/api/v1/roles", json!({ "id": "orders", "platform": platform })).await.problem(409, "role-exists");
    }
    let long = "x".repeat(65);
    for id in ["", "_orders", "a/b", "a b", "Zoë", &long] {
        assert_eq!(api.post("/api/v1/roles", json!({ "id": id })).await.expect(400).status, 400, "{id:?}");
    }
    assert_eq!(api.get("/api/v1/roles").await.expect(200).made(), ["orders"]);
}

#[tokio::test]
async fn a_rule_that_reaches_beyond_its_tenant_is_refused_by_its_place() {
    let api = Api::start().await;
    api.post("/api/v1/roles", json!({ "id": "orders" })).await.expect(201);
    for filter in [
        "#",
        "+/main/x",
        "TopicA",
        "fleet/v1/+/boiler-1/telemetry",
        "fleet/v1/#",
        "fleet/v1/other/#",
        "fleet/v1/{device}/#",
        "fleet/v1/{tenant}x/#",
        "fleet/v2/{tenant}/#",
        "app/#",
        "app/+/orders",
        "app",
        "/app/{tenant}/x",
        "$SYS/#",
        "$share/g/app/{tenant}/#",
        "app/{tenant}/#/x",
        "app/{tenant}/a#",
        "app/{tenant}/{name}",
        "",
    ] {
        let mut new = rules(filter);
        new["id"] = json!("wide");
        let refusals = [
            api.post("/api/v1/roles", new).await,
            api.ask("PUT", "/api/v1/roles/orders").json(&rules(filter)).send().await,
        ];
        for refused in refusals {
            let refused = refused.problem(400, "invalid");
            assert_eq!(refused.body["errors"][0]["field"], "topic_rules[1].filter", "{filter}");
        }
    }
    let refused = api.post("/api/v1/roles", json!({ "id": "a", "permissions": ["devices:read", "devices:eat"] })).await;
    assert_eq!(refused.problem(400, "invalid").body["errors"][0]["field"], "permissions[1]");
    for rule in [
        json!({ "effect": "maybe", "action": "all", "filter": "app/{tenant}/x" }),
        json!({ "effect": "allow", "action": "eat", "filter": "app/{tenant}/x" }),
        json!({ "effect": "allow", "action": "all", "filter": "app/{tenant}/x", "qos": 1 }),
        json!({ "effect": "allow", "filter": "app/{tenant}/x" }),
    ] {
        api.post("/api/v1/roles", json!({ "id": "a", "topic_rules": [rule] })).await.expect(400);
    }
    let roles = api.get("/api/v1/roles").await.expect(200);
    assert_eq!(roles.made(), ["orders"]);
    assert_eq!(api.get("/api/v1/roles/orders").await.expect(200).body["topic_rules"], json!([]));
}

#[tokio::test]
async fn roles_of_the_platform_are_for_those_who_stand_above_tenants() {
    let api = Api::start().await;
    let every = json!({ "id": "every-topic", "platform": true, "topic_rules": [allow("#")] });
    let (second, token) = api.user("second@example.com", "admin").await;
    api.as_who(&token, "POST", "/api/v1/roles").json(&every).send().await.problem(403, "forbidden");
    // Nor does an API key, whoever made it.
    let key = api.post("/api/v1/api-keys", json!({ "name": "k", "role": "admin" })).await.expect(201);
    let key = key.body["secret"].as_str().unwrap();
    api.as_who(key, "POST", "/api/v1/roles").json(&every).send().await.problem(403, "forbidden");

    api.post("/api/v1/roles", every).await.expect(201);
    let path = "/api/v1/roles/every-topic";
    for who in [&*token, key] {
        api.as_who(who, "GET", path).send().await.problem(404, "no-such-role");
        api.as_who(who, "PUT", path).json(&rules("#")).send().await.problem(404, "no-such-role");
        api.as_who(who, "DELETE", path).send().await.problem(404, "no-such-role");
        assert_eq!(api.as_who(who, "GET", "/api/v1/roles").send().await.expect(200).made(), Vec::<&str>::new());
        let give = json!({ "name": "k", "role": "every-topic" });
        api.as_who(who, "POST", "/api/v1/api-keys").json(&give).send().await.problem(404, "no-such-role");
        let take = json!({ "platform": true });
        let ask = api.as_who(who, "PATCH", &format!("/api/v1/users/{second}"));
        ask.raw("application/merge-patch+json", take.to_string()).send().await.problem(403, "forbidden");
    }
    assert_eq!(api.get("/api/v1/roles").await.expect(200).made(), ["every-topic"]);
}

#[tokio::test]
async fn a_role_that_somebody_has_stays() {
    let api = Api::start().await;
    api.post("/api/v1/roles", json!({ "id": "orders" })).await.expect(201);
    let (user, _) = api.user("ada@example.com", "orders").await;
    let delete = || api.ask("DELETE", "/api/v1/roles/orders").send();
    delete().await.problem(409, "role-in-use");
    api.ask("DELETE", &format!("/api/v1/users/{user}")).send().await.expect(204);
    let key = api.post("/api/v1/api-keys", json!({ "name": "k", "role": "orders" })).await.expect(201);
    delete().await.problem(409, "role-in-use");
    let key = format!("/api/v1/api-keys/{}", key.body["id"].as_str().unwrap());
    api.ask("DELETE", &key).send().await.expect(204);
    delete().await.expect(204);
}

#[tokio::test]
async fn what_a_role_says_holds_from_the_next_request_on() {
    let api = Api::start().await;
    api.post("/api/v1/roles", json!({ "id": "reader", "permissions": ["devices:read"] })).await.expect(201);
    let (_, token) = api.user("ada@example.com", "reader").await;
    let list = || api.as_who(&token, "GET", "/api/v1/devices").send();
    list().await.expect(200);
    api.as_who(&token, "POST", "/api/v1/devices").json(&json!({ "id": "a" })).send().await.problem(403, "forbidden");
    for path in ["/api/v1/roles", "/api/v1/users", "/api/v1/api-keys"] {
        api.as_who(&token, "GET", path).send().await.problem(403, "forbidden");
    }
    api.ask("PUT", "/api/v1/roles/reader").json(&rules("app/{tenant}/x")).send().await.expect(200);
    list().await.problem(403, "forbidden");
}

#[tokio::test]
async fn bounds_of_access_are_told() {
    let mut setup = Setup::default();
    let auth = &mut setup.config.auth;
    (auth.max_roles, auth.max_topic_rules, auth.max_api_keys, auth.max_users) = (1, 1, 1, 2);
    let api = Api::with(setup).await;
    let mut two = rules("app/{tenant}/x");
    two["id"] = json!("a");
    api.post("/api/v1/roles", two).await.problem(409, "too-many");
    let mut user = json!({ "email": "ada@example.com", "password": PASSWORD });
    for (path, mut body, name) in [
        ("/api/v1/roles", json!({ "id": "a" }), "id"),
        ("/api/v1/api-keys", json!({ "name": "a", "role": "admin" }), "name"),
    ] {
        api.post(path, body.clone()).await.expect(201);
        body[name] = json!("b");
        api.post(path, body).await.problem(409, "too-many");
    }
    api.post("/api/v1/users", user.clone()).await.expect(201);
    user["email"] = json!("grace@example.com");
    api.post("/api/v1/users", user).await.problem(409, "too-many");
}
