//! Passwords: what they must be, how they are changed, and links to new ones.

use chrono::TimeDelta;
use fleet_core::id::UserId;
use serde_json::{Value, json};

use crate::harness::{Api, EMAIL, PASSWORD, Reply, Setup};

const CHANGE: &str = "/api/v1/auth/password";
const RESET: &str = "/api/v1/auth/password-reset";
const ADA: &str = "ada@example.com";
const ANOTHER: &str = "a quite different password";

async fn login(api: &Api, email: &str, password: &str) -> Reply {
    let body = json!({ "email": email, "password": password });
    api.anonymous("POST", "/api/v1/auth/login").json(&body).send().await
}

async fn token(api: &Api, email: &str, password: &str) -> String {
    login(api, email, password).await.expect(200).body["access_token"].as_str().unwrap().to_owned()
}

async fn change(api: &Api, bearer: &str, current: &str, new: &str) -> Reply {
    api.as_who(bearer, "POST", CHANGE).json(&json!({ "current": current, "new": new })).send().await
}

/// A user with a password.
async fn ada(api: &Api) -> UserId {
    let made = api.post("/api/v1/users", json!({ "email": ADA, "password": PASSWORD })).await.expect(201);
    made.body["id"].as_str().unwrap().parse().unwrap()
}

async fn link(api: &Api, user: UserId) -> Value {
    api.ask("POST", &format!("/api/v1/users/{user}/password-reset")).send().await.expect(201).body
}

async fn reset(api: &Api, token: &Value, password: &str) -> Reply {
    let body = json!({ "token": token, "new_password": password });
    api.anonymous("POST", RESET).json(&body).send().await
}

#[tokio::test]
async fn a_new_password_ends_all_other_logins() {
    let api = Api::start().await;
    ada(&api).await;
    let (mine, other) = (token(&api, ADA, PASSWORD).await, token(&api, ADA, PASSWORD).await);
    change(&api, &mine, PASSWORD, ANOTHER).await.expect(204);
    api.as_who(&mine, "GET", "/api/v1/me").send().await.expect(200);
    api.as_who(&other, "GET", "/api/v1/me").send().await.problem(401, "bad-token");
    login(&api, ADA, PASSWORD).await.problem(401, "bad-login");
    login(&api, ADA, ANOTHER).await.expect(200);
    assert!((api.metric("muster_login_sessions_ended_total{why=\"password\"}").await - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn who_does_not_know_the_old_password_does_not_change_it() {
    let api = Api::start().await;
    ada(&api).await;
    let mine = token(&api, ADA, PASSWORD).await;
    for _ in 0..5 {
        change(&api, &mine, "wrong", ANOTHER).await.problem(403, "wrong-password");
    }
    // A stolen access token guesses no faster than anybody else.
    change(&api, &mine, PASSWORD, ANOTHER).await.problem(429, "login-locked");
    login(&api, ADA, PASSWORD).await.problem(429, "login-locked");
    api.pass(TimeDelta::seconds(30));
    change(&api, &mine, PASSWORD, ANOTHER).await.expect(204);
    let key = api.post("/api/v1/api-keys", json!({ "name": "a", "role": "admin" })).await.expect(201);
    let key = key.body["secret"].as_str().unwrap();
    change(&api, key, PASSWORD, ANOTHER).await.problem(403, "forbidden");
}

#[tokio::test]
async fn a_password_that_would_be_guessed_is_refused_wherever_it_is_chosen() {
    let api = Api::start().await;
    let user = ada(&api).await;
    let mine = token(&api, ADA, PASSWORD).await;
    let link = link(&api, user).await;
    for (bad, why) in [
        ("seven c", "at least 8"),
        ("passwordpassword", "commonest"),
        ("123456789012345678", "commonest"),
        ("ada@example.com", "e-mail"),
    ] {
        let refusals = [
            change(&api, &mine, PASSWORD, bad).await,
            reset(&api, &link["token"], bad).await,
            api.post("/api/v1/users", json!({ "email": "ada@example.com", "password": bad })).await,
            api.ask("PATCH", &format!("/api/v1/users/{user}"))
                .raw("application/merge-patch+json", json!({ "password": bad }).to_string())
                .send()
                .await,
        ];
        for refusal in refusals {
            let refusal = refusal.problem(400, "invalid");
            assert!(refusal.body["detail"].as_str().unwrap().contains(why), "{bad}: {}", refusal.text);
        }
    }
    let mut setup = Setup::default();
    setup.config.auth.min_password_chars = 15;
    let api = Api::with(setup).await;
    api.post("/api/v1/users", json!({ "email": ADA, "password": "fourteen chars" })).await.problem(400, "invalid");
    api.post("/api/v1/users", json!({ "email": ADA, "password": "glacier, fifteen" })).await.expect(201);
}

#[tokio::test]
async fn a_link_sets_a_password_once_and_ends_what_was_before() {
    let api = Api::start().await;
    let user = ada(&api).await;
    let old = token(&api, ADA, PASSWORD).await;
    for _ in 0..5 {
        login(&api, ADA, "wrong").await.problem(401, "bad-login");
    }
    let first = link(&api, user).await;
    let second = link(&api, user).await;
    assert_eq!(second["expires_at"], "2025-11-22T12:00:00.000Z");
    let expected = format!("http://localhost:8080/password-reset#{}", second["token"].as_str().unwrap());
    assert_eq!(second["url"], expected);
    reset(&api, &first["token"], ANOTHER).await.problem(401, "bad-reset-token");
    reset(&api, &second["token"], ANOTHER).await.expect(204);
    reset(&api, &second["token"], PASSWORD).await.problem(401, "bad-reset-token");
    api.as_who(&old, "GET", "/api/v1/me").send().await.problem(401, "bad-token");
    // The failed logins are forgiven.
    login(&api, ADA, ANOTHER).await.expect(200);
    for bad in [json!(""), json!("mp_"), json!("\0"), json!("x".repeat(10_000))] {
        reset(&api, &bad, ANOTHER).await.problem(401, "bad-reset-token");
    }
    let kept = sqlx::query_scalar::<_, i64>("select count(*) from password_reset");
    assert_eq!(kept.fetch_one(api.db.pool()).await.unwrap(), 0);
}

#[tokio::test]
async fn a_link_expires() {
    let api = Api::start().await;
    let user = ada(&api).await;
    let token = link(&api, user).await["token"].clone();
    api.pass(TimeDelta::hours(24));
    reset(&api, &token, ANOTHER).await.problem(401, "bad-reset-token");
    login(&api, ADA, PASSWORD).await.expect(200);
}

#[tokio::test]
async fn links_used_at_once_work_once() {
    let api = Api::start().await;
    let user = ada(&api).await;
    let token = link(&api, user).await["token"].clone();
    let (one, two) = tokio::join!(reset(&api, &token, ANOTHER), reset(&api, &token, "yet another password"));
    let mut statuses = [one.status.as_u16(), two.status.as_u16()];
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 401]);
}

#[tokio::test]
async fn who_was_invited_comes_in_by_the_link_only() {
    let mut setup = Setup::default();
    setup.config.http.public_url = "https://muster.example.com".into();
    let api = Api::with(setup).await;
    let made = api.post("/api/v1/users", json!({ "email": ADA })).await.expect(201);
    let user: UserId = made.body["id"].as_str().unwrap().parse().unwrap();
    for guess in ["", "null", PASSWORD] {
        login(&api, ADA, guess).await.problem(401, "bad-login");
    }
    let link = link(&api, user).await;
    assert!(link["url"].as_str().unwrap().starts_with("https://muster.example.com/password-reset#mp_"), "{link}");
    reset(&api, &link["token"], ANOTHER).await.expect(204);
    login(&api, ADA, ANOTHER).await.expect(200);
}

#[tokio::test]
async fn nobody_makes_a_link_to_somebody_above() {
    let api = Api::start().await;
    let (_, tenant_admin) = api.user("second@example.com", "admin").await;
    let (ada, hers) = api.user(ADA, "").await;
    let path = |user: UserId| format!("/api/v1/users/{user}/password-reset");
    api.as_who(&tenant_admin, "POST", &path(api.admin)).send().await.problem(403, "forbidden");
    api.as_who(&hers, "POST", &path(ada)).send().await.problem(403, "forbidden");
    api.ask("POST", &path(UserId::new())).send().await.problem(404, "no-such-user");
    api.as_who(&tenant_admin, "POST", &path(ada)).send().await.expect(201);
    login(&api, EMAIL, PASSWORD).await.expect(200);
}
