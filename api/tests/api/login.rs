//! Logging in.

use fleet_core::user::LOGIN_QUEUE;
use serde_json::{Value, json};

use crate::harness::{Api, EMAIL, PASSWORD, Reply, Setup};

async fn login(api: &Api, email: &str, password: &str) -> Reply {
    let body = json!({"email": email, "password": password});
    api.anonymous("POST", "/api/v1/auth/login").json(&body).send().await
}

#[tokio::test]
async fn the_right_password_gives_a_token_that_opens_the_api() {
    let api = Api::start().await;
    let answer = login(&api, EMAIL, PASSWORD).await.expect(200);
    assert_eq!((&answer.body["token_type"], &answer.body["expires_in"]), (&json!("Bearer"), &json!(900)));
    assert_eq!(answer.header("cache-control"), "no-store");
    let token = answer.body["access_token"].as_str().unwrap();
    let me = api.anonymous("GET", "/api/v1/me").header("authorization", &format!("Bearer {token}")).send().await;
    let me = me.expect(200).body;
    assert_eq!((&me["email"], &me["tenant"], &me["role"]), (&json!(EMAIL), &json!("main"), &json!("admin")));
    assert!(me["permissions"].as_array().unwrap().contains(&json!("devices:write")));
}

#[tokio::test]
async fn a_refusal_does_not_say_what_was_wrong() {
    let api = Api::start().await;
    let said = async |email: &str, password: &str| {
        let mut body = login(&api, email, password).await.problem(401, "bad-login").body;
        body["request_id"].take();
        body
    };
    let wrong = said(EMAIL, "wrong").await;
    assert_eq!(said("nobody@example.com", PASSWORD).await, wrong);
    sqlx::query("update app_user set disabled = true").execute(api.db.pool()).await.unwrap();
    assert_eq!(said(EMAIL, PASSWORD).await, wrong);
}

#[tokio::test]
async fn what_cannot_be_a_login_is_refused_before_it_costs_anything() {
    let api = Api::start().await;
    login(&api, "not an address", "x").await.problem(400, "invalid");
    login(&api, "a\0@b", "x").await.problem(400, "invalid");
    login(&api, EMAIL, &"x".repeat(1025)).await.problem(400, "invalid");
    login(&api, EMAIL, "\0").await.problem(401, "bad-login");
    let bad = api.anonymous("POST", "/api/v1/auth/login").json(&json!({"email": EMAIL, "password": 7})).send().await;
    let bad = bad.problem(400, "invalid");
    assert_eq!(bad.body["errors"][0]["field"], "password");
    assert!(!bad.text.contains(PASSWORD));
}

#[tokio::test]
async fn logins_beyond_the_queue_are_sent_away_and_counted() {
    let mut setup = Setup::default();
    setup.config.auth.login_concurrency = 1;
    let api = Api::with(setup).await;
    let mut attempts = tokio::task::JoinSet::new();
    let api = std::sync::Arc::new(api);
    for _ in 0..LOGIN_QUEUE + 30 {
        let api = api.clone();
        attempts.spawn(async move { login(&api, EMAIL, "wrong").await });
    }
    let replies = attempts.join_all().await;
    let busy = replies.iter().filter(|reply| reply.status == 429).collect::<Vec<_>>();
    assert!(!busy.is_empty(), "{} logins at once fit a queue of {LOGIN_QUEUE}", LOGIN_QUEUE + 30);
    assert!(busy.iter().all(|reply| reply.header("retry-after") == "1"));
    assert!(replies.iter().all(|reply| matches!(reply.status.as_u16(), 401 | 429)));
    let counted = api.metric("muster_logins_busy_total").await;
    assert!((counted - f64::from(u32::try_from(busy.len()).unwrap())).abs() < 0.5, "{counted}");
    assert!(api.metric("muster_http_problems_total{type=\"busy\"}").await > 0.5);
    let after = login(&api, EMAIL, PASSWORD).await.expect(200);
    assert_ne!(after.body["access_token"], Value::Null);
}
