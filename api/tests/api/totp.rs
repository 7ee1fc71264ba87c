//! The second factor at the door.

use chrono::TimeDelta;
use serde_json::{Value, json};
use totp_rs::{Builder, Secret, Totp};

use crate::harness::{Api, EMAIL, PASSWORD, Reply};

const TOTP: &str = "/api/v1/auth/totp";
const CONFIRM: &str = "/api/v1/auth/totp/confirm";
const RECOVERY: &str = "/api/v1/auth/totp/recovery-codes";

/// The administrator of a test with an authenticator.
struct Scene {
    api: Api,
    authenticator: Totp,
    recovery: Vec<String>,
}

impl Scene {
    async fn new() -> Self {
        let api = Api::start().await;
        let begun = api.post(TOTP, json!({ "password": PASSWORD })).await.expect(200);
        assert!(begun.body["url"].as_str().unwrap().starts_with("otpauth://totp/Muster:admin%40example.com?"));
        let secret = Secret::try_from_base32(begun.body["secret"].as_str().unwrap()).unwrap();
        let authenticator = Builder::new().with_secret(secret).build().unwrap();
        let mut scene = Self { api, authenticator, recovery: Vec::new() };
        let confirmed = scene.api.post(CONFIRM, json!({ "code": scene.code() })).await.expect(200);
        let codes = confirmed.body["recovery_codes"].as_array().unwrap();
        scene.recovery = codes.iter().map(|code| code.as_str().unwrap().to_owned()).collect();
        scene
    }

    /// What the authenticator shows.
    fn code(&self) -> String {
        self.authenticator.generate(self.api.now().timestamp().unsigned_abs()).to_string()
    }

    /// A code that it does not show.
    fn wrong(&self) -> String {
        let right = self.code().parse::<u32>().unwrap();
        format!("{:06}", (right + 500_000) % 1_000_000)
    }

    fn next_step(&self) {
        self.api.pass(TimeDelta::seconds(30));
    }

    /// A request that wants password and code once more.
    async fn both(&self, method: &str, path: &str, password: &str, code: &str) -> Reply {
        self.api.ask(method, path).json(&json!({ "password": password, "code": code })).send().await
    }

    async fn login(&self, code: Option<&str>) -> Reply {
        login(&self.api, PASSWORD, code).await
    }
}

async fn login(api: &Api, password: &str, code: Option<&str>) -> Reply {
    let mut body = json!({ "email": EMAIL, "password": password });
    if let Some(code) = code {
        body["code"] = json!(code);
    }
    api.anonymous("POST", "/api/v1/auth/login").json(&body).send().await
}

#[tokio::test]
async fn a_login_needs_a_code_once_the_authenticator_is_confirmed() {
    let scene = Scene::new().await;
    scene.login(None).await.problem(401, "totp-required");
    // Who does not know the password does not learn that there is an authenticator.
    login(&scene.api, "wrong", None).await.problem(401, "bad-login");
    login(&scene.api, "wrong", Some(&scene.code())).await.problem(401, "bad-login");
    scene.login(Some(&scene.code())).await.problem(401, "bad-code");
    scene.next_step();
    scene.login(Some(&scene.wrong())).await.problem(401, "bad-code");
    scene.login(Some(&scene.code())).await.expect(200);
    scene.login(Some(&scene.code())).await.problem(401, "bad-code");
    assert!((scene.api.metric("muster_logins_failed_total{what=\"code\"}").await - 3.0).abs() < 0.1);
    let state = scene.api.get(TOTP).await.expect(200).body;
    assert_eq!((&state["on"], &state["recovery_codes"]), (&json!(true), &json!(10)));
    // The login of before goes on.
    scene.api.get("/api/v1/me").await.expect(200);
}

#[tokio::test]
async fn a_recovery_code_stands_in_once() {
    let scene = Scene::new().await;
    scene.login(Some(&scene.recovery[0])).await.expect(200);
    scene.login(Some(&scene.recovery[0])).await.problem(401, "bad-code");
    scene.login(Some(&scene.recovery[1].to_uppercase())).await.expect(200);
    assert_eq!(scene.api.get(TOTP).await.body["recovery_codes"], 8);
}

#[tokio::test]
async fn recovery_codes_are_renewed_with_the_password_and_a_code() {
    let scene = Scene::new().await;
    scene.both("POST", RECOVERY, PASSWORD, &scene.wrong()).await.problem(403, "wrong-code");
    scene.both("POST", RECOVERY, "wrong", &scene.recovery[0]).await.problem(403, "wrong-password");
    let renewed = scene.both("POST", RECOVERY, PASSWORD, &scene.recovery[0]).await.expect(200).body;
    assert_eq!(renewed["recovery_codes"].as_array().unwrap().len(), 10);
    scene.login(Some(&scene.recovery[1])).await.problem(401, "bad-code");
    scene.login(renewed["recovery_codes"][0].as_str()).await.expect(200);
    let api = Api::start().await;
    let body = json!({ "password": PASSWORD, "code": "123456" });
    api.post(RECOVERY, body).await.problem(409, "totp-off");
}

#[tokio::test]
async fn who_has_token_and_password_guesses_no_codes() {
    let scene = Scene::new().await;
    scene.next_step();
    for _ in 0..5 {
        scene.both("DELETE", TOTP, PASSWORD, &scene.wrong()).await.problem(403, "wrong-code");
        if let Some(other) = scene.api.post(TOTP, json!({ "password": PASSWORD })).await.body["type"].as_str() {
            assert!(other.ends_with("totp-on") || other.ends_with("login-locked"), "{other}");
        }
    }
    scene.both("DELETE", TOTP, PASSWORD, &scene.code()).await.problem(429, "login-locked");
    scene.both("POST", RECOVERY, PASSWORD, &scene.code()).await.problem(429, "login-locked");
}

#[tokio::test]
async fn codes_are_guessed_no_faster_than_passwords() {
    let scene = Scene::new().await;
    scene.next_step();
    for _ in 0..5 {
        scene.login(None).await.problem(401, "totp-required");
        scene.login(Some(&scene.wrong())).await.problem(401, "bad-code");
    }
    scene.login(Some(&scene.code())).await.problem(429, "login-locked");
    scene.next_step();
    scene.login(Some(&scene.code())).await.expect(200);
}

#[tokio::test]
async fn an_authenticator_is_removed_with_the_password_and_a_code() {
    let scene = Scene::new().await;
    let remove = async |code: &str| scene.both("DELETE", TOTP, PASSWORD, code).await;
    scene.next_step();
    remove(&scene.wrong()).await.problem(403, "wrong-code");
    scene.both("DELETE", TOTP, "wrong", &scene.code()).await.problem(403, "wrong-password");
    remove(&scene.code()).await.expect(204);
    scene.login(None).await.expect(200);
    remove(&scene.recovery[0]).await.problem(409, "totp-off");
    assert_eq!(
        scene.api.get(TOTP).await.expect(200).body,
        json!({ "on": false, "confirmed_at": null, "recovery_codes": 0 })
    );
    // And may be set up again, with another secret.
    scene.api.post(TOTP, json!({ "password": PASSWORD })).await.expect(200);
    scene.login(None).await.expect(200);
    scene.api.post(CONFIRM, json!({ "code": scene.code() })).await.problem(403, "wrong-code");
}

#[tokio::test]
async fn an_authenticator_needs_the_password_and_a_person() {
    let api = Api::start().await;
    api.post(TOTP, json!({ "password": "wrong" })).await.problem(403, "wrong-password");
    api.post(CONFIRM, json!({ "code": "123456" })).await.problem(409, "totp-off");
    let key = api.post("/api/v1/api-keys", json!({ "name": "a", "role": "admin" })).await.expect(201);
    let key = key.body["secret"].as_str().unwrap();
    for (method, path) in [("GET", TOTP), ("POST", TOTP), ("POST", CONFIRM), ("POST", RECOVERY), ("DELETE", TOTP)] {
        api.as_who(key, method, path).send().await.problem(403, "forbidden");
    }
    let scene = Scene::new().await;
    scene.api.post(TOTP, json!({ "password": PASSWORD })).await.problem(409, "totp-on");
}

/// The token of another administrator of the platform.
async fn second_admin(api: &Api) -> String {
    let other = json!({ "email": "root@example.com", "password": PASSWORD, "role": "admin", "platform": true });
    api.post("/api/v1/users", other).await.expect(201);
    let login = json!({ "email": "root@example.com", "password": PASSWORD });
    let login = api.anonymous("POST", "/api/v1/auth/login").json(&login).send().await.expect(200);
    login.body["access_token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn an_administrator_removes_the_authenticator_of_others_but_not_of_who_stands_above() {
    let scene = Scene::new().await;
    let api = &scene.api;
    let (ada, _) = api.user("ada@example.com", "").await;
    let (_, tenant_admin) = api.user("second@example.com", "admin").await;
    let path = |id: &dyn std::fmt::Display| format!("/api/v1/users/{id}/totp");
    api.as_who(&tenant_admin, "DELETE", &path(&api.admin)).send().await.problem(403, "forbidden");
    api.as_who(&tenant_admin, "DELETE", &path(&ada)).send().await.problem(409, "totp-off");
    scene.login(None).await.problem(401, "totp-required");
    // Not one's own either: the token may be in other hands.
    api.ask("DELETE", &path(&api.admin)).send().await.problem(403, "own-authenticator");
    let other = second_admin(api).await;
    api.as_who(&other, "DELETE", &path(&api.admin)).send().await.expect(204);
    scene.login(None).await.expect(200);
}

#[tokio::test]
async fn a_new_password_does_not_take_the_second_factor() {
    let scene = Scene::new().await;
    let path = format!("/api/v1/users/{}/password-reset", scene.api.admin);
    let link = scene.api.ask("POST", &path).send().await.expect(201).body;
    let body = json!({ "token": link["token"], "new_password": "a quite different password" });
    scene.api.anonymous("POST", "/api/v1/auth/password-reset").json(&body).send().await.expect(204);
    let again = async |code: Value| {
        let body = json!({ "email": EMAIL, "password": "a quite different password", "code": code });
        scene.api.anonymous("POST", "/api/v1/auth/login").json(&body).send().await
    };
    again(Value::Null).await.problem(401, "totp-required");
    scene.next_step();
    again(json!(scene.code())).await.expect(200);
}

#[tokio::test]
async fn what_happens_to_a_second_factor_is_in_the_audit_without_its_secrets() {
    let scene = Scene::new().await;
    scene.both("POST", RECOVERY, PASSWORD, &scene.recovery[0]).await.expect(200);
    scene.next_step();
    scene.both("DELETE", TOTP, PASSWORD, &scene.code()).await.expect(204);
    let reset = Scene::new().await;
    let other = second_admin(&reset.api).await;
    let path = format!("/api/v1/users/{}/totp", reset.api.admin);
    reset.api.as_who(&other, "DELETE", &path).send().await.expect(204);
    for (scene, expected) in [
        (
            &scene,
            &[
                "user.remove-totp",
                "user.renew-recovery-codes",
                "user.use-recovery-code",
                "user.confirm-totp",
                "user.begin-totp",
            ][..],
        ),
        (&reset, &["user.reset-totp", "user.log-in", "user.create", "user.confirm-totp", "user.begin-totp"][..]),
    ] {
        let told = scene.api.get("/api/v1/audit").await.expect(200);
        let actions = told.body["items"].as_array().unwrap().iter().map(|entry| entry["action"].as_str().unwrap());
        assert_eq!(actions.collect::<Vec<_>>(), expected);
        assert!(!told.text.contains(&scene.recovery[0]), "{}", told.text);
    }
}
