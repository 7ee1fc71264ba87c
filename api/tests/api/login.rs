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
    setup.config.auth.login_free_tries = 1000;
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

#[tokio::test]
async fn who_guesses_waits_whether_the_account_exists_or_not() {
    let api = Api::start().await;
    for (guessed, from) in [(EMAIL, "192.0.2.1"), ("nobody@example.com", "192.0.2.2")] {
        let attempt = async |email: &str, password: &str, from: &str| {
            let body = json!({ "email": email, "password": password });
            api.anonymous("POST", "/api/v1/auth/login").json(&body).from(from).send().await
        };
        for _ in 0..5 {
            attempt(guessed, "wrong", from).await.problem(401, "bad-login");
        }
        // The right password is refused as well, from elsewhere too, and does not wait for a hash.
        for from in [from, "198.51.100.1"] {
            let locked = attempt(guessed, PASSWORD, from).await.problem(429, "login-locked");
            assert_eq!(locked.header("retry-after"), "30");
            assert!(!locked.text.contains("account") && !locked.text.contains("address"), "{}", locked.text);
        }
        attempt("somebody@example.com", "wrong", from).await.problem(401, "bad-login");
    }
    assert!((api.metric("muster_logins_locked_total{by=\"account\"}").await - 4.0).abs() < 0.1);
    assert!((api.metric("muster_logins_failed_total{what=\"password\"}").await - 12.0).abs() < 0.1);
    api.pass(chrono::TimeDelta::seconds(30));
    login(&api, EMAIL, PASSWORD).await.expect(200);
    login(&api, EMAIL, "wrong").await.problem(401, "bad-login");
    login(&api, EMAIL, PASSWORD).await.expect(200);
}

#[tokio::test]
async fn an_administrator_forgives_an_account_that_waits() {
    let api = Api::start().await;
    let (ada, token) = api.user("ada@example.com", "").await;
    sqlx::query("update app_user set password_hash = (select max(password_hash) from app_user)")
        .execute(api.db.pool())
        .await
        .unwrap();
    let path = format!("/api/v1/users/{ada}/login-failures");
    let none = json!({ "failures": 0, "tried_at": null, "blocked_until": null });
    assert_eq!(api.get(&path).await.expect(200).body, none);
    for _ in 0..5 {
        login(&api, "Ada@example.com", "wrong").await.problem(401, "bad-login");
    }
    login(&api, "ada@example.com", "wrong").await.problem(429, "login-locked");
    let told = api.get(&path).await.expect(200).body;
    assert_eq!((&told["failures"], &told["blocked_until"]), (&json!(5), &json!("2025-11-21T12:00:30.000Z")));
    api.as_who(&token, "DELETE", &path).send().await.problem(403, "forbidden");
    api.ask("DELETE", &path).send().await.expect(204);
    login(&api, "ada@example.com", "wrong").await.problem(401, "bad-login");
}

#[tokio::test]
async fn an_address_that_tries_many_accounts_waits_and_a_proxy_is_seen_through() {
    let mut setup = Setup::default();
    setup.config.auth.login_address_free_tries = 3;
    setup.config.http.trusted_proxies = vec!["10.0.0.0/8".parse().unwrap()];
    let api = Api::with(setup).await;
    let attempt = async |name: &str, client: &str| {
        let body = json!({ "email": format!("{name}@example.com"), "password": "wrong" });
        let ask = api.anonymous("POST", "/api/v1/auth/login").json(&body).from("10.0.0.1");
        ask.header("x-forwarded-for", client).send().await
    };
    for name in ["a", "b", "c"] {
        attempt(name, "198.51.100.7").await.problem(401, "bad-login");
    }
    attempt("d", "198.51.100.7").await.problem(429, "login-locked");
    attempt("d", "203.0.113.9, 198.51.100.7").await.problem(429, "login-locked");
    attempt("d", "198.51.100.8").await.problem(401, "bad-login");
    assert!((api.metric("muster_logins_locked_total{by=\"address\"}").await - 2.0).abs() < 0.1);
}
