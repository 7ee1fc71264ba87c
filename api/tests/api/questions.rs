//! Asking the policy: what it answers, what a change would give and take, and what another user sees.

use fleet_core::id::UserId;
use serde_json::{Value, json};

use crate::harness::Api;

async fn ask(api: &Api, principal: &str, action: &str, resource: Value) -> Value {
    let question = json!({ "principal": principal, "action": action, "resource": resource });
    api.post("/api/v1/access/check", question).await.expect(200).body
}

/// Two devices in two groups, and a user who may see one of them.
async fn scoped(api: &Api) -> (UserId, String, String) {
    for (id, group) in [("boiler-1", "site/a"), ("boiler-2", "site/b")] {
        api.post("/api/v1/devices", json!({ "id": id, "group": group })).await.expect(201);
    }
    let (user, token) = api.user("ada@example.com", "").await;
    let scope = json!({ "kind": "group", "group": "site/a" });
    let new = json!({ "user": user, "role": "viewer", "scope": scope });
    let binding = api.post("/api/v1/bindings", new).await.expect(201).body["id"].as_str().unwrap().to_owned();
    (user, token, binding)
}

#[tokio::test]
async fn a_decision_is_the_one_that_is_made_and_says_why() {
    let api = Api::start().await;
    let (user, token, binding) = scoped(&api).await;
    for who in [user.to_string(), "Ada@example.com".to_owned()] {
        for (device, allowed) in [("boiler-1", true), ("boiler-2", false)] {
            let answer = ask(&api, &who, "devices:read", json!(device)).await;
            assert_eq!(answer["allowed"], allowed, "{answer}");
            let status = if allowed { 200 } else { 404 };
            api.as_who(&token, "GET", &format!("/api/v1/devices/{device}")).send().await.expect(status);
        }
    }
    let yes = ask(&api, "ada@example.com", "telemetry:read", Value::Null).await;
    assert_eq!((&yes["decision"], &yes["decided_by"]["binding"]), (&json!("allow"), &json!(binding)));
    assert_eq!((&yes["decided_by"]["role"], &yes["needed"]), (&json!("viewer"), &Value::Null));
    let no = ask(&api, "ada@example.com", "devices:write", json!("boiler-1")).await;
    assert_eq!((&no["decision"], &no["decided_by"]), (&json!("deny"), &Value::Null));
    assert!(no["needed"].as_str().unwrap().contains("devices:write"), "{no}");
    let topic = ask(&api, "ada@example.com", "receive", json!("fleet/v1/main/boiler-1/telemetry")).await;
    assert_eq!(topic["decided_by"]["rule"]["filter"], "fleet/v1/{tenant}/+/telemetry", "{topic}");
    let other = ask(&api, "ada@example.com", "receive", json!("fleet/v1/main/boiler-2/telemetry")).await;
    assert!(other["reason"].as_str().unwrap().contains("another scope"), "{other}");
    let named =
        json!({ "principal": "ada@example.com", "action": "receive", "topic": "fleet/v1/main/boiler-2/telemetry" });
    assert_eq!(api.post("/api/v1/access/check", named).await.expect(200).body, other);
    let own = ask(&api, "boiler-1", "publish", json!("fleet/v1/main/boiler-1/telemetry")).await;
    assert_eq!((&own["decision"], &own["decided_by"]["source"]), (&json!("allow"), &json!("device")));
    let child = api.ask("PATCH", "/api/v1/devices/boiler-2").json(&json!({ "gateway": "boiler-1" }));
    let theirs = || ask(&api, "boiler-1", "publish", json!("fleet/v1/main/boiler-2/telemetry"));
    assert_eq!(theirs().await["decision"], "deny");
    child.send().await.expect(200);
    let theirs = theirs().await;
    assert_eq!((&theirs["decision"], &theirs["decided_by"]["role"]), (&json!("allow"), &json!("gateway")), "{theirs}");
    let mine = api.post("/api/v1/access/check", json!({ "action": "access:manage" })).await.expect(200);
    assert_eq!(mine.body["decided_by"]["role"], "admin");
}

#[tokio::test]
async fn a_question_that_makes_no_sense_is_refused() {
    let api = Api::start().await;
    let (_, token) = api.user("ada@example.com", "viewer").await;
    for (question, status, kind) in [
        (json!({ "action": "devices:eat" }), 400, "invalid"),
        (json!({ "action": "publish" }), 400, "invalid"),
        (json!({ "action": "devices:read", "topic": "app/main/x" }), 400, "invalid"),
        (json!({ "action": "publish", "topic": "app/main/x", "resource": "app/main/x" }), 400, "invalid"),
        (json!({ "action": "devices:read", "resource": "nobody" }), 404, "no-such-device"),
        (json!({ "principal": "nobody", "action": "devices:read" }), 404, "no-such-device"),
        (json!({ "principal": "nobody@example.com", "action": "devices:read" }), 400, "invalid"),
        (json!({ "principal": "usr_x", "action": "devices:read" }), 400, "invalid"),
        (json!({ "principal": UserId::new(), "action": "devices:read" }), 404, "no-such-user"),
    ] {
        api.post("/api/v1/access/check", question).await.problem(status, kind);
    }
    for (path, body) in [
        ("/api/v1/access/check", json!({ "action": "devices:read" })),
        ("/api/v1/access/diff", json!({ "role": { "id": "x" } })),
        ("/api/v1/access/view-as", json!({ "user": UserId::new() })),
    ] {
        api.as_who(&token, "POST", path).json(&body).send().await.problem(403, "forbidden");
    }
}

#[tokio::test]
async fn what_a_change_would_give_and_take_is_told_and_not_done() {
    let api = Api::start().await;
    let (user, token, binding) = scoped(&api).await;
    let diff = async |change: Value| api.post("/api/v1/access/diff", change).await.expect(200).body;
    let bind = json!({ "user": user, "role": "operator", "scope": { "kind": "group", "group": "site" } });
    let found = diff(json!({ "binding": bind })).await;
    let item = &found["items"][0];
    assert_eq!((&item["user"], found["items"].as_array().unwrap().len()), (&json!(user), 1));
    let gained = item["permissions"]["gained"].as_array().unwrap();
    assert!(gained.contains(&json!("commands:send")) && !gained.contains(&json!("devices:read")), "{gained:?}");
    assert!(item["routes"]["gained"].as_array().unwrap().contains(&json!("POST /api/v1/devices")), "{item}");
    assert_eq!(item["devices"]["devices:read"]["gained"], json!({ "count": 1, "sample": ["boiler-2"] }));
    assert_eq!(item["devices"]["commands:send"]["gained"]["count"], 2);
    assert_eq!(item["permissions"]["lost"], json!([]));

    let found = diff(json!({ "unbind": binding })).await;
    assert_eq!(found["items"][0]["devices"]["telemetry:read"]["lost"], json!({ "count": 1, "sample": ["boiler-1"] }));
    let found = diff(json!({ "user": { "id": user, "role": "auditor" } })).await;
    assert_eq!(found["items"][0]["devices"]["devices:read"]["gained"]["sample"], json!(["boiler-2"]));

    // A role, and a key of somebody who has it.
    let role = |permissions: Value| json!({ "id": "orders", "permissions": permissions, "topic_rules": [] });
    let found = diff(json!({ "role": role(json!(["devices:read"])) })).await;
    assert_eq!(found["items"][0]["user"], Value::Null, "nobody has it");
    api.post("/api/v1/roles", role(json!(["devices:read", "telemetry:read"]))).await.expect(201);
    api.post("/api/v1/api-keys", json!({ "name": "k", "role": "orders" })).await.expect(201);
    let found = diff(json!({ "role": role(json!(["devices:read"])) })).await;
    let item = &found["items"][0];
    assert!(item["api_key"].is_string(), "{found}");
    assert_eq!(item["permissions"]["lost"], json!(["telemetry:read"]));
    assert_eq!(item["devices"]["telemetry:read"]["lost"]["count"], 2);
    assert_eq!(item["topics"]["lost"][0], "allow subscribe fleet/v1/{tenant}/+/events");

    // Nothing of it was done.
    api.as_who(&token, "GET", "/api/v1/devices/boiler-1").send().await.expect(200);
    api.as_who(&token, "GET", "/api/v1/devices/boiler-2").send().await.problem(404, "no-such-device");
    for wrong in [json!({}), json!({ "unbind": binding, "role": role(json!([])) }), json!({ "user": { "id": user } })] {
        api.post("/api/v1/access/diff", wrong).await.problem(400, "invalid");
    }
    api.post("/api/v1/access/diff", json!({ "role": { "id": "admin" } })).await.problem(409, "role-built-in");
}

#[tokio::test]
async fn who_looks_at_what_another_sees_changes_nothing() {
    let api = Api::start().await;
    let (user, _, _) = scoped(&api).await;
    let seen = api.post("/api/v1/access/view-as", json!({ "user": user })).await.expect(200);
    let token = seen.body["access_token"].as_str().unwrap();
    let look = |path: &str| api.as_who(token, "GET", path).send();
    assert_eq!(look("/api/v1/devices").await.expect(200).ids(), ["boiler-1"]);
    let me = look("/api/v1/me").await.expect(200).body;
    assert_eq!((&me["id"], &me["viewed_by"]), (&json!(user), &json!(api.admin)));
    assert_eq!(me["scopes"]["devices:read"], json!([{ "group": "site/a" }]));
    assert_eq!(me["home"], "fleet-health");
    for (method, path) in [("POST", "/api/v1/auth/logout-all"), ("PATCH", "/api/v1/devices/boiler-1")] {
        api.as_who(token, method, path).json(&json!({})).send().await.problem(403, "read-only");
    }
    // Nobody looks with the eyes of who may do more, and a key looks at nobody.
    let role = json!({ "id": "keeper", "permissions": ["access:manage"] });
    api.post("/api/v1/roles", role).await.expect(201);
    let (_, keeper) = api.user("keeper@example.com", "keeper").await;
    let ask = json!({ "user": user });
    api.as_who(&keeper, "POST", "/api/v1/access/view-as").json(&ask).send().await.problem(403, "exceeds-own-rights");
    let key = api.post("/api/v1/api-keys", json!({ "name": "k", "role": "admin" })).await.expect(201).body;
    let key = key["secret"].as_str().unwrap();
    api.as_who(key, "POST", "/api/v1/access/view-as").json(&ask).send().await.problem(403, "forbidden");
    // It ends with the right to look.
    let (_, second) = api.user("second@example.com", "admin").await;
    let seen = api.as_who(&second, "POST", "/api/v1/access/view-as").json(&ask).send().await.expect(200);
    let theirs = seen.body["access_token"].as_str().unwrap();
    api.as_who(theirs, "GET", "/api/v1/me").send().await.expect(200);
    sqlx::query("update app_user set role = 'viewer' where email = 'second@example.com'")
        .execute(api.db.pool())
        .await
        .unwrap();
    api.as_who(theirs, "GET", "/api/v1/me").send().await.problem(401, "bad-token");
}

#[tokio::test]
async fn a_scope_is_part_of_every_question_about_devices() {
    let api = Api::start().await;
    let (user, _, _) = scoped(&api).await;
    let scope = json!({ "kind": "selector", "selector": "group:site/a" });
    api.post("/api/v1/bindings", json!({ "user": user, "role": "operator", "scope": scope })).await.expect(201);
    let token = api.token_of(user).await;
    let ask = |method, path: &str| api.as_who(&token, method, path);
    assert_eq!(ask("GET", "/api/v1/devices").send().await.expect(200).ids(), ["boiler-1"]);
    for path in ["", "/credentials", "/telemetry", "/telemetry/latest"] {
        let there = ask("GET", &format!("/api/v1/devices/boiler-1{path}")).send().await;
        there.expect(200);
        let hidden = ask("GET", &format!("/api/v1/devices/boiler-2{path}")).send().await;
        hidden.problem(404, "no-such-device");
    }
    let patch = |path: &str, body: Value| ask("PATCH", path).raw("application/merge-patch+json", body.to_string());
    patch("/api/v1/devices/boiler-2", json!({ "type": "x" })).send().await.problem(404, "no-such-device");
    ask("DELETE", "/api/v1/devices/boiler-2").send().await.problem(404, "no-such-device");
    // What is in scope stays in scope.
    patch("/api/v1/devices/boiler-1", json!({ "type": "x" })).send().await.expect(200);
    let out = patch("/api/v1/devices/boiler-1", json!({ "group": "site/b" })).send().await;
    out.problem(403, "out-of-scope");
    let new = json!({ "id": "boiler-3", "group": "site/b" });
    ask("POST", "/api/v1/devices").json(&new).send().await.problem(403, "out-of-scope");
    let new = json!({ "id": "boiler-3", "group": "site/a/x" });
    ask("POST", "/api/v1/devices").json(&new).send().await.expect(201);
}
