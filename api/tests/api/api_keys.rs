//! API keys: how long they open doors, and that their secret is told once.

use chrono::TimeDelta;
use fleet_core::id::UserId;
use serde_json::{Value, json};

use crate::harness::Api;

/// A key of the administrator: its path and its secret.
async fn key(api: &Api, life_s: Option<u64>) -> (String, String) {
    let mut new = json!({ "name": "order service", "role": "admin" });
    if let Some(life_s) = life_s {
        new["expires_in_s"] = json!(life_s);
    }
    made(&api.post("/api/v1/api-keys", new).await.expect(201).body)
}

fn made(body: &Value) -> (String, String) {
    let text = |field: &str| body[field].as_str().unwrap().to_owned();
    (format!("/api/v1/api-keys/{}", text("id")), text("secret"))
}

async fn opens(api: &Api, secret: &str) {
    api.as_who(secret, "GET", "/api/v1/devices").send().await.expect(200);
}

async fn is_worthless(api: &Api, secret: &str) {
    api.as_who(secret, "GET", "/api/v1/devices").send().await.problem(401, "bad-token");
}

#[tokio::test]
async fn a_key_ends_with_its_time() {
    let api = Api::start().await;
    let (_, secret) = key(&api, Some(60)).await;
    api.pass(TimeDelta::seconds(59));
    opens(&api, &secret).await;
    api.pass(TimeDelta::seconds(1));
    is_worthless(&api, &secret).await;
    let (_, year) = key(&api, None).await;
    api.pass(TimeDelta::days(366));
    is_worthless(&api, &year).await;
}

#[tokio::test]
async fn a_life_that_is_too_long_or_none_is_refused() {
    let api = Api::start().await;
    for life_s in [json!(0), json!(31_622_401), json!(u64::MAX), json!(-1), json!("1h")] {
        let refused =
            api.post("/api/v1/api-keys", json!({ "name": "a", "role": "admin", "expires_in_s": life_s })).await;
        assert_eq!(refused.expect(400).status, 400);
    }
    let long = "x".repeat(101);
    for name in ["", " ", "a\nb", &long] {
        api.post("/api/v1/api-keys", json!({ "name": name, "role": "admin" })).await.problem(400, "invalid");
    }
    for role in ["nobody-made-it", "device"] {
        api.post("/api/v1/api-keys", json!({ "name": "a", "role": role })).await.problem(404, "no-such-role");
    }
    assert_eq!(api.get("/api/v1/api-keys").await.expect(200).ids(), Vec::<&str>::new());
}

#[tokio::test]
async fn a_deleted_key_opens_nothing() {
    let api = Api::start().await;
    let ((path, secret), (_, other)) = (key(&api, None).await, key(&api, None).await);
    opens(&api, &secret).await;
    api.ask("DELETE", &path).send().await.expect(204);
    is_worthless(&api, &secret).await;
    opens(&api, &other).await;
    api.ask("DELETE", &path).send().await.problem(404, "no-such-api-key");
}

#[tokio::test]
async fn a_secret_is_told_once_and_kept_by_nobody() {
    let api = Api::start().await;
    let new = json!({ "name": "a", "role": "admin" });
    let ask = || api.ask("POST", "/api/v1/api-keys").header("idempotency-key", "once").json(&new).send();
    let (_, secret) = made(&ask().await.expect(201).body);
    let again = ask().await.expect(201);
    assert_eq!((again.header("idempotency-replayed"), &again.body["secret"]), ("true", &Value::Null));
    let listed = api.get("/api/v1/api-keys").await.expect(200);
    assert!(!listed.text.contains(&secret) && listed.body["items"][0].get("secret").is_none(), "{}", listed.text);
    let rows: Vec<String> =
        sqlx::query_scalar("select k::text from api_key k union all select i::text from idempotency i")
            .fetch_all(api.db.pool())
            .await
            .unwrap();
    assert!(!rows.is_empty() && rows.iter().all(|row| !row.contains(&secret)), "{rows:?}");
    // Nearly right is wrong.
    let mut near = secret.clone();
    near.pop();
    for wrong in [&*near, &secret.to_uppercase(), "mk_", "mk_x"] {
        is_worthless(&api, wrong).await;
    }
}

#[tokio::test]
async fn a_key_is_worth_no_more_than_whoever_made_it() {
    let api = Api::start().await;
    let take = |user: UserId, patch: Value| {
        let ask = api.ask("PATCH", &format!("/api/v1/users/{user}"));
        ask.raw("application/merge-patch+json", patch.to_string()).send()
    };
    for patch in [json!({ "disabled": true }), json!({ "role": null })] {
        let (user, token) = api.user(&format!("{}@example.com", UserId::new()), "admin").await;
        let new = json!({ "name": "a", "role": "admin" });
        let body = api.as_who(&token, "POST", "/api/v1/api-keys").json(&new).send().await.expect(201).body;
        let (path, secret) = made(&body);
        opens(&api, &secret).await;
        take(user, patch).await.expect(200);
        is_worthless(&api, &secret).await;
        api.ask("DELETE", &format!("/api/v1/users/{user}")).send().await.expect(204);
        is_worthless(&api, &secret).await;
        api.ask("DELETE", &path).send().await.problem(404, "no-such-api-key");
    }
}
