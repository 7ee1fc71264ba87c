//! Users: how they are made and changed, and who is never locked out.

use serde_json::{Value, json};

use crate::harness::{Api, PASSWORD, Reply};

async fn change(api: &Api, path: &str, version: Option<&str>, wanted: Value) -> Reply {
    let ask = api.ask("PATCH", path);
    let ask = match version {
        Some(version) => ask.header("if-match", version),
        None => ask,
    };
    ask.raw("application/merge-patch+json", wanted.to_string()).send().await
}

#[tokio::test]
async fn a_user_is_changed_by_those_who_know_the_version() {
    let api = Api::start().await;
    let new = json!({ "email": "ada@example.com", "password": PASSWORD });
    let made = api.post("/api/v1/users", new).await.expect(201);
    assert_eq!(made.header("etag"), "\"1\"");
    assert_eq!((&made.body["role"], &made.body["platform"]), (&Value::Null, &json!(false)));
    assert!(!made.text.contains("password"), "{}", made.text);
    let path = made.header("location").to_owned();
    let changed = change(&api, &path, Some("\"1\""), json!({ "disabled": true })).await.expect(200);
    assert_eq!(changed.header("etag"), "\"2\"");
    change(&api, &path, Some("\"1\""), json!({ "disabled": false })).await.problem(412, "version-mismatch");
    api.ask("DELETE", &path).header("if-match", "\"1\"").send().await.problem(412, "version-mismatch");
    assert_eq!(api.get(&path).await.expect(200).body, changed.body);
    api.ask("DELETE", &path).header("if-match", "\"2\"").send().await.expect(204);
    api.get(&path).await.problem(404, "no-such-user");
}

#[tokio::test]
async fn what_is_no_user_is_refused() {
    let api = Api::start().await;
    let user = |field: &str, value: Value| {
        let mut user = json!({ "email": "ada@example.com", "password": PASSWORD });
        user[field] = value;
        user
    };
    for (field, value) in [
        ("email", json!("nobody")),
        ("email", json!("")),
        ("email", json!(format!("{}@example.com", "x".repeat(300)))),
        ("password", json!("short")),
        ("password", json!("x".repeat(2000))),
        ("role", json!("_hidden")),
        ("unknown", json!(1)),
    ] {
        api.post("/api/v1/users", user(field, value.clone())).await.expect(400);
    }
    for role in ["nobody-made-it", "device", "gateway"] {
        api.post("/api/v1/users", user("role", json!(role))).await.problem(404, "no-such-role");
    }
    api.post("/api/v1/users", user("platform", json!(true))).await.problem(400, "invalid");
    api.post("/api/v1/users", user("role", json!("admin"))).await.expect(201);
    for taken in ["ada@example.com", "ADA@example.com"] {
        api.post("/api/v1/users", user("email", json!(taken))).await.problem(409, "email-taken");
    }
}

#[tokio::test]
async fn the_last_admin_stays() {
    let api = Api::start().await;
    let path = format!("/api/v1/users/{}", api.admin);
    for patch in [json!({ "disabled": true }), json!({ "platform": false }), json!({ "platform": false, "role": null })]
    {
        change(&api, &path, None, patch).await.problem(409, "last-admin");
    }
    change(&api, &path, None, json!({ "role": null })).await.problem(400, "invalid");
    api.ask("DELETE", &path).send().await.problem(409, "last-admin");
    // One who does not stand above tenants is no replacement.
    api.user("second@example.com", "admin").await;
    api.ask("DELETE", &path).send().await.problem(409, "last-admin");
    let third = json!({ "email": "third@example.com", "password": PASSWORD, "role": "admin", "platform": true });
    api.post("/api/v1/users", third).await.expect(201);
    api.ask("DELETE", &path).send().await.expect(204);
    api.get("/api/v1/me").await.problem(401, "bad-token");
}

#[tokio::test]
async fn who_stands_above_tenants_is_touched_by_nobody_else() {
    let api = Api::start().await;
    let (_, token) = api.user("second@example.com", "admin").await;
    let path = format!("/api/v1/users/{}", api.admin);
    for patch in [json!({ "password": PASSWORD }), json!({ "email": "mine@example.com" }), json!({ "disabled": true })]
    {
        let ask = api.as_who(&token, "PATCH", &path);
        ask.raw("application/merge-patch+json", patch.to_string()).send().await.problem(403, "forbidden");
    }
    api.as_who(&token, "DELETE", &path).send().await.problem(403, "forbidden");
    api.get("/api/v1/me").await.expect(200);
}
