//! Bindings: who is given what, by whom, and for which devices.

use serde_json::{Value, json};

use crate::harness::{Api, Setup};

fn group(path: &str) -> Value {
    json!({ "kind": "group", "group": path })
}

#[tokio::test]
async fn a_binding_is_made_shown_and_ended() {
    let api = Api::start().await;
    let (user, token) = api.user("ada@example.com", "").await;
    let list = || api.as_who(&token, "GET", "/api/v1/devices").send();
    list().await.problem(403, "forbidden");
    let new = json!({ "user": user, "role": "viewer", "scope": group("site/line-3") });
    let made = api.post("/api/v1/bindings", new.clone()).await.expect(201);
    let path = made.header("location").to_owned();
    assert_eq!((&made.body["role"], &made.body["scope"]), (&json!("viewer"), &group("site/line-3")));
    list().await.expect(200);
    assert_eq!(api.get(&path).await.expect(200).body, made.body);
    for page in ["/api/v1/bindings".to_owned(), format!("/api/v1/bindings?user={user}")] {
        assert_eq!(api.get(&page).await.expect(200).ids(), [made.body["id"].as_str().unwrap()]);
    }
    let other = format!("/api/v1/bindings?user={}", api.admin);
    assert_eq!(api.get(&other).await.expect(200).ids(), Vec::<&str>::new());
    api.post("/api/v1/bindings", new).await.problem(409, "binding-exists");
    api.ask("DELETE", &path).send().await.expect(204);
    api.ask("DELETE", &path).send().await.problem(404, "no-such-binding");
    list().await.problem(403, "forbidden");
}

#[tokio::test]
async fn what_is_about_the_tenant_is_worth_nothing_in_a_smaller_scope() {
    let api = Api::start().await;
    let (user, token) = api.user("ada@example.com", "").await;
    let new = json!({ "user": user, "role": "admin", "scope": group("site") });
    api.post("/api/v1/bindings", new).await.expect(201);
    api.as_who(&token, "GET", "/api/v1/devices").send().await.expect(200);
    for path in ["/api/v1/users", "/api/v1/roles", "/api/v1/bindings", "/api/v1/api-keys"] {
        api.as_who(&token, "GET", path).send().await.problem(403, "forbidden");
    }
}

#[tokio::test]
async fn nobody_gives_more_than_they_have() {
    let api = Api::start().await;
    let role = json!({ "id": "gatekeeper", "permissions": ["access:manage", "devices:read"] });
    api.post("/api/v1/roles", role).await.expect(201);
    let (_, token) = api.user("keeper@example.com", "gatekeeper").await;
    let (user, _) = api.user("ada@example.com", "").await;
    let ask = |method, path: &str, body: Value| api.as_who(&token, method, path).json(&body).send();
    let bind = |role: &str| json!({ "user": user, "role": role, "scope": group("site") });
    for role in ["admin", "operator", "viewer"] {
        ask("POST", "/api/v1/bindings", bind(role)).await.problem(403, "exceeds-own-rights");
        let key = json!({ "name": "k", "role": role });
        ask("POST", "/api/v1/api-keys", key).await.problem(403, "exceeds-own-rights");
        let other = json!({ "email": "x@example.com", "password": "correct horse battery", "role": role });
        ask("POST", "/api/v1/users", other).await.problem(403, "exceeds-own-rights");
    }
    ask("POST", "/api/v1/bindings", bind("gatekeeper")).await.expect(201);
    // Nor by writing it into a role, which is theirs already.
    let more = json!({ "permissions": ["access:manage", "devices:read", "devices:write"], "topic_rules": [] });
    ask("PUT", "/api/v1/roles/gatekeeper", more).await.problem(403, "exceeds-own-rights");
    let topics = json!({ "effect": "allow", "action": "all", "filter": "app/{tenant}/#" });
    let new = json!({ "id": "topics", "topic_rules": [topics] });
    ask("POST", "/api/v1/roles", new).await.problem(403, "exceeds-own-rights");
    // Nor by the password of somebody who may do more.
    let (admin, _) = api.user("second@example.com", "admin").await;
    let change = api.as_who(&token, "PATCH", &format!("/api/v1/users/{admin}"));
    let change = change.raw("application/merge-patch+json", json!({ "disabled": true }).to_string());
    change.send().await.problem(403, "exceeds-own-rights");
}

#[tokio::test]
async fn a_scope_that_is_none_is_refused_with_what_was_expected() {
    let api = Api::start().await;
    let (user, _) = api.user("ada@example.com", "").await;
    for (scope, said) in [
        (json!({ "kind": "group" }), "group"),
        (json!({ "kind": "group", "group": "a//b" }), "names joined by /"),
        (json!({ "kind": "planet" }), "planet"),
        (json!({ "kind": "selector", "selector": "type:a OR" }), "column 10"),
        (json!({ "kind": "selector", "selector": "" }), "column 1"),
        (json!("site"), "scope"),
    ] {
        let refused = api.post("/api/v1/bindings", json!({ "user": user, "role": "viewer", "scope": scope })).await;
        let refused = refused.expect(400);
        assert!(refused.text.contains(said), "{scope}: {}", refused.text);
    }
    let nobody = json!({ "user": format!("usr_{:032x}", 1), "role": "viewer" });
    api.post("/api/v1/bindings", nobody).await.problem(404, "no-such-user");
    let nothing = json!({ "user": user, "role": "nobody-made-it" });
    api.post("/api/v1/bindings", nothing).await.problem(404, "no-such-role");
    let every = json!({ "id": "every", "platform": true });
    api.post("/api/v1/roles", every).await.expect(201);
    let new = json!({ "user": user, "role": "every", "scope": group("site") });
    api.post("/api/v1/bindings", new).await.problem(400, "invalid");
}

#[tokio::test]
async fn bindings_have_bounds() {
    let mut setup = Setup::default();
    setup.config.auth.max_bindings = 33;
    let api = Api::with(setup).await;
    let (ada, _) = api.user("ada@example.com", "").await;
    let (bob, _) = api.user("bob@example.com", "").await;
    let bind = |user, n: usize| {
        let new = json!({ "user": user, "role": "viewer", "scope": group(&format!("site/{n}")) });
        api.post("/api/v1/bindings", new)
    };
    for n in 0..32 {
        bind(ada, n).await.expect(201);
    }
    bind(ada, 32).await.problem(409, "too-many");
    bind(bob, 1).await.expect(201);
    bind(bob, 2).await.problem(409, "too-many");
}
