//! Signing in, as it is written down in the audit.

use chrono::TimeDelta;
use serde_json::{Value, json};

use crate::harness::{Api, EMAIL, PASSWORD, Reply};

const LOGIN: &str = "/api/v1/auth/login";

async fn login(api: &Api, email: &str, password: &str) -> Reply {
    let body = json!({ "email": email, "password": password, "cookie": false });
    api.anonymous("POST", LOGIN).json(&body).header("user-agent", "a test").send().await
}

/// The entries of these actions, the first first.
async fn entries(api: &Api, action: &str) -> Vec<Value> {
    let page = api.get(&format!("/api/v1/audit?action={action}")).await.expect(200).body;
    let mut items = page["items"].as_array().unwrap().clone();
    items.reverse();
    items
}

async fn refresh(api: &Api, token: &Value) -> Reply {
    api.anonymous("POST", "/api/v1/auth/refresh").json(&json!({ "refresh_token": token })).send().await
}

#[tokio::test]
async fn logins_logouts_and_stolen_tokens_are_written_down() {
    let api = Api::start().await;
    let first = login(&api, EMAIL, PASSWORD).await.expect(200);
    let second = login(&api, EMAIL, PASSWORD).await.expect(200);
    let logins = entries(&api, "user.log-in").await;
    assert_eq!(logins.len(), 2);
    let entry = &logins[0];
    assert_eq!((&entry["actor"]["name"], &entry["resource"]["id"]), (&json!(EMAIL), &json!(api.admin.to_string())));
    assert_eq!((&entry["after"]["method"], &entry["user_agent"]), (&json!("password"), &json!("a test")));
    assert_eq!(entry["request_id"], first.header("x-request-id"));

    let token = second.body["access_token"].as_str().unwrap();
    api.as_who(token, "POST", "/api/v1/auth/logout").send().await.expect(204);
    let ended = entries(&api, "login-session.end").await;
    assert_eq!((ended.len(), &ended[0]["resource"]["id"]), (1, &logins[1]["after"]["session"]));

    // Somebody has the refresh token as well.
    let stolen = &first.body["refresh_token"];
    let next = refresh(&api, stolen).await.expect(200).body;
    refresh(&api, &next["refresh_token"]).await.expect(200);
    refresh(&api, stolen).await.problem(401, "bad-refresh-token");
    let reuse = entries(&api, "login-session.reuse").await;
    assert_eq!((reuse.len(), &reuse[0]["resource"]["id"]), (1, &logins[0]["after"]["session"]));
    assert_eq!(reuse[0]["after"]["user"], api.admin.to_string());

    let again = login(&api, EMAIL, PASSWORD).await.expect(200);
    let token = again.body["access_token"].as_str().unwrap();
    api.as_who(token, "POST", "/api/v1/auth/logout-all").send().await.expect(204);
    let page = api.as_who(&api.token_of(api.admin).await, "GET", "/api/v1/audit?action=user.log-out").send().await;
    assert_eq!(page.expect(200).body["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn who_guesses_fills_no_log() {
    let api = Api::start().await;
    for _ in 0..4 {
        login(&api, EMAIL, "wrong").await.problem(401, "bad-login");
    }
    login(&api, &EMAIL.to_uppercase(), "wrong").await.problem(401, "bad-login");
    login(&api, EMAIL, "wrong").await.problem(429, "login-locked");
    login(&api, "nobody@example.com", "wrong").await.problem(401, "bad-login");
    assert_eq!(entries(&api, "user.fail-log-in").await, Vec::<Value>::new(), "not before its time");
    api.app.write_denials().await;
    api.app.write_denials().await;
    let failed = entries(&api, "user.fail-log-in").await;
    assert_eq!(failed.len(), 1, "{failed:?}");
    let entry = &failed[0];
    assert_eq!((&entry["actor"]["kind"], &entry["actor"]["name"]), (&json!("unknown"), &json!(EMAIL)));
    assert_eq!((&entry["after"]["count"], &entry["after"]["wrong"]), (&json!(5), &json!("password")));
    assert_eq!(entry["resource"]["id"], api.admin.to_string());
    let locked = entries(&api, "user.lock").await;
    assert_eq!((locked.len(), &locked[0]["after"]["blocked_until"]), (1, &json!("2025-11-21T12:00:30.000Z")));
    // Once more, after the wait.
    api.pass(TimeDelta::seconds(30));
    login(&api, EMAIL, "wrong").await.problem(401, "bad-login");
    api.app.write_denials().await;
    assert_eq!(entries(&api, "user.lock").await.len(), 2);
}

#[tokio::test]
async fn passwords_and_second_factors_are_written_down() {
    let api = Api::start().await;
    let path = format!("/api/v1/users/{}/password-reset", api.admin);
    let link = api.ask("POST", &path).send().await.expect(201).body;
    let body = json!({ "token": link["token"], "new_password": "a quite different password" });
    api.anonymous("POST", "/api/v1/auth/password-reset").json(&body).send().await.expect(204);
    let token = api.token_of(api.admin).await;
    let post =
        async |path: &str, body: Value| api.as_who(&token, "POST", path).json(&body).send().await.expect(200).body;
    let password = json!({ "password": "a quite different password" });
    let begun = post("/api/v1/auth/totp", password.clone()).await;
    let secret = totp_rs::Secret::try_from_base32(begun["secret"].as_str().unwrap()).unwrap();
    let authenticator = totp_rs::Builder::new().with_secret(secret).build().unwrap();
    let code = authenticator.generate(api.now().timestamp().unsigned_abs()).to_string();
    let codes = post("/api/v1/auth/totp/confirm", json!({ "code": code })).await["recovery_codes"].clone();
    let both = json!({ "password": password["password"], "code": codes[0] });
    api.as_who(&token, "DELETE", "/api/v1/auth/totp").json(&both).send().await.expect(204);
    let page = api.as_who(&token, "GET", "/api/v1/audit").send().await.expect(200);
    for secret in [begun["secret"].as_str().unwrap(), codes[0].as_str().unwrap(), link["token"].as_str().unwrap()] {
        assert!(!page.text.contains(secret), "no secret is in it");
    }
    let actions = page.body["items"].as_array().unwrap().iter().rev().map(|entry| entry["action"].clone());
    let expected = json!([
        "user.issue-password-reset",
        "user.reset-password",
        "user.begin-totp",
        "user.confirm-totp",
        "user.use-recovery-code",
        "user.remove-totp",
    ]);
    assert_eq!(Value::Array(actions.collect()), expected);
}
