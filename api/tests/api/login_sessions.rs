//! Staying logged in: refresh tokens, cookies, and the end of logins.

use chrono::TimeDelta;
use fleet_core::config::CookieSecure;
use serde_json::{Value, json};

use crate::harness::{Api, Ask, EMAIL, PASSWORD, Reply, Setup};

const LOGIN: &str = "/api/v1/auth/login";
const REFRESH: &str = "/api/v1/auth/refresh";
const SESSIONS: &str = "/api/v1/auth/sessions";
const SECURE: &str = "__Host-muster_refresh";
const PLAIN: &str = "muster_refresh";

fn credentials() -> Value {
    json!({ "email": EMAIL, "password": PASSWORD })
}

async fn login(api: &Api) -> Reply {
    api.anonymous("POST", LOGIN).json(&credentials()).send().await.expect(200)
}

fn with_cookie<'a>(api: &'a Api, path: &str, cookie: &str) -> Ask<'a> {
    api.anonymous("POST", path).header("cookie", cookie)
}

async fn refresh(api: &Api, token: &str) -> Reply {
    with_cookie(api, REFRESH, &format!("{PLAIN}={token}")).send().await
}

fn token(reply: &Reply) -> &str {
    reply.body["access_token"].as_str().unwrap()
}

async fn is_in(api: &Api, token: &str) -> bool {
    match api.as_who(token, "GET", "/api/v1/me").send().await {
        reply if reply.status == 200 => true,
        reply => {
            reply.problem(401, "bad-token");
            false
        }
    }
}

#[tokio::test]
async fn a_browser_stays_in_by_its_cookie() {
    let api = Api::start().await;
    let first = login(&api).await;
    let (value, about) = first.cookie(PLAIN);
    for part in ["HttpOnly", "SameSite=Strict", "Path=/api/v1/auth", "Max-Age=604800"] {
        assert!(about.contains(part), "{part} in {about}");
    }
    assert!(!about.contains("Secure") && value.starts_with("mr_"), "{value} {about}");
    assert_eq!(first.body.get("refresh_token"), None, "scripts do not see it");
    api.pass(TimeDelta::minutes(16));
    assert!(!is_in(&api, token(&first)).await);
    let second = refresh(&api, &value).await.expect(200);
    assert_eq!((&second.body["token_type"], &second.body["expires_in"]), (&json!("Bearer"), &json!(900)));
    assert_ne!(second.cookie(PLAIN).0, value);
    assert!(is_in(&api, token(&second)).await);
    // Other cookies, whatever they are, are not in the way.
    let cookies = format!("a=b; {PLAIN}={}; =;;; c", second.cookie(PLAIN).0);
    with_cookie(&api, REFRESH, &cookies).send().await.expect(200);
}

#[tokio::test]
async fn over_https_the_cookie_is_for_https_alone() {
    let api = Api::start().await;
    let ask = || api.anonymous("POST", LOGIN).json(&credentials());
    let secure = |reply: Reply| {
        let (value, about) = reply.expect(200).cookie(SECURE);
        assert!(about.contains("Secure") && about.contains("Path=/;") && !about.contains("Domain"), "{about}");
        value
    };
    secure(ask().from("192.0.2.1").send().await);
    secure(ask().header("host", "muster.example.com").send().await);
    secure(ask().header("x-forwarded-proto", "https").send().await);
    let value = secure(ask().header("origin", "https://localhost:8080").send().await);
    // A page on another port of the host, or a neighbour under the same domain, may set cookies too, but none with that name.
    let planted = with_cookie(&api, REFRESH, &format!("{PLAIN}={value}")).from("192.0.2.1").send().await;
    planted.problem(401, "no-token");
    with_cookie(&api, REFRESH, &format!("{SECURE}={value}")).from("192.0.2.1").send().await.expect(200);

    let mut setup = Setup::default();
    setup.config.auth.cookie_secure = CookieSecure::Always;
    let always = Api::with(setup).await;
    assert_ne!(login(&always).await.cookie(SECURE).0, "");
    let mut setup = Setup::default();
    setup.config.auth.cookie_secure = CookieSecure::Never;
    let never = Api::with(setup).await;
    let reply = never.anonymous("POST", LOGIN).json(&credentials()).from("192.0.2.1").send().await.expect(200);
    assert_ne!(reply.cookie(PLAIN).0, "");
}

#[tokio::test]
async fn a_program_has_its_refresh_token_in_the_answer() {
    let api = Api::start().await;
    let asked = json!({ "email": EMAIL, "password": PASSWORD, "cookie": false });
    let first = api.anonymous("POST", LOGIN).json(&asked).send().await.expect(200);
    assert!(!first.headers.contains_key("set-cookie"));
    let shown = |reply: &Reply| json!({ "refresh_token": reply.body["refresh_token"] });
    let again = |body: Value| api.anonymous("POST", REFRESH).json(&body).send();
    let second = again(shown(&first)).await.expect(200);
    assert!(!second.headers.contains_key("set-cookie"));
    again(shown(&second)).await.expect(200);
    for bad in [json!(""), json!("x"), json!("mr_x"), json!("\0")] {
        again(json!({ "refresh_token": bad })).await.problem(401, "bad-refresh-token");
    }
    again(json!({ "refresh_token": 7 })).await.problem(400, "invalid");
    api.anonymous("POST", REFRESH).send().await.problem(401, "no-token");
}

#[tokio::test]
async fn a_stolen_refresh_token_ends_the_login_it_was_stolen_from() {
    let api = Api::start().await;
    let (mine, other) = (login(&api).await, login(&api).await);
    let stolen = mine.cookie(PLAIN).0;
    let thief = refresh(&api, &stolen).await.expect(200);
    assert!(is_in(&api, token(&thief)).await);
    api.pass(TimeDelta::seconds(11));
    let told = refresh(&api, &stolen).await.problem(401, "bad-refresh-token");
    assert!(told.body["detail"].as_str().unwrap().contains("used before"), "{}", told.text);
    for ended in [&mine, &thief] {
        assert!(!is_in(&api, token(ended)).await);
    }
    refresh(&api, &thief.cookie(PLAIN).0).await.problem(401, "bad-refresh-token");
    assert!(is_in(&api, token(&other)).await, "another login of the same user is not touched");
    assert!((api.metric("muster_login_sessions_ended_total{why=\"reuse\"}").await - 1.0).abs() < 0.1);
}

#[tokio::test]
async fn two_tabs_that_refresh_at_once_both_stay_in() {
    let api = Api::start().await;
    let shown = login(&api).await.cookie(PLAIN).0;
    let (one, two) = tokio::join!(refresh(&api, &shown), refresh(&api, &shown));
    let (one, two) = (one.expect(200), two.expect(200));
    assert_eq!(one.cookie(PLAIN).0, two.cookie(PLAIN).0);
    assert!(is_in(&api, token(&one)).await && is_in(&api, token(&two)).await);
    refresh(&api, &one.cookie(PLAIN).0).await.expect(200);
}

#[tokio::test]
async fn a_logout_ends_this_login() {
    let api = Api::start().await;
    let (by_cookie, by_token, other) = (login(&api).await, login(&api).await, login(&api).await);
    let cookie = format!("{PLAIN}={}", by_cookie.cookie(PLAIN).0);
    let gone = with_cookie(&api, "/api/v1/auth/logout", &cookie).send().await.expect(204);
    let (value, about) = gone.cookie(PLAIN);
    assert!(value.is_empty() && about.contains("Max-Age=0") && about.contains("Path=/api/v1/auth"), "{about}");
    with_cookie(&api, "/api/v1/auth/logout", &cookie).send().await.expect(204);
    api.as_who(token(&by_token), "POST", "/api/v1/auth/logout").send().await.expect(204);
    api.as_who(token(&by_token), "POST", "/api/v1/auth/logout").send().await.problem(401, "bad-token");
    api.anonymous("POST", "/api/v1/auth/logout").send().await.problem(401, "no-token");
    assert!(!is_in(&api, token(&by_cookie)).await && !is_in(&api, token(&by_token)).await);
    refresh(&api, &by_cookie.cookie(PLAIN).0).await.problem(401, "bad-refresh-token");
    assert!(is_in(&api, token(&other)).await);
}

#[tokio::test]
async fn a_user_sees_where_they_are_logged_in_and_ends_it() {
    let api = Api::start().await;
    let ask = api.anonymous("POST", LOGIN).json(&credentials()).from("192.0.2.7");
    let phone = ask.header("user-agent", "Phone/1").send().await.expect(200);
    api.pass(TimeDelta::seconds(1));
    let (mine, other) = (login(&api).await, login(&api).await);
    let list = async |bearer: &str| api.as_who(bearer, "GET", SESSIONS).send().await.expect(200);
    let listed = list(token(&mine)).await;
    let items = listed.body["items"].as_array().unwrap();
    let current = items.iter().filter(|item| item["current"] == true).count();
    assert_eq!((items.len(), current), (4, 1), "{} (one of them is the test's own)", listed.text);
    let told = items.iter().find(|item| item["user_agent"] == "Phone/1").unwrap();
    assert_eq!((&told["address"], &told["method"]), (&json!("192.0.2.7"), &json!("password")));
    assert!(!listed.text.contains("mr_"), "{}", listed.text);

    let path = format!("{SESSIONS}/{}", told["id"].as_str().unwrap());
    let (_, stranger) = api.user("ada@example.com", "").await;
    api.as_who(&stranger, "DELETE", &path).send().await.problem(404, "no-such-login-session");
    api.as_who(token(&mine), "DELETE", &path).send().await.expect(204);
    api.as_who(token(&mine), "DELETE", &path).send().await.problem(404, "no-such-login-session");
    api.as_who(token(&mine), "DELETE", &format!("{SESSIONS}/x")).send().await.problem(400, "bad-id");
    assert!(!is_in(&api, token(&phone)).await);

    api.as_who(token(&mine), "POST", "/api/v1/auth/logout-all").send().await.expect(204);
    for ended in [&mine, &other] {
        assert!(!is_in(&api, token(ended)).await);
    }
    assert!(is_in(&api, &stranger).await);
}

#[tokio::test]
async fn an_administrator_ends_the_logins_of_others_but_not_of_who_stands_above() {
    let api = Api::start().await;
    let (ada, hers) = api.user("ada@example.com", "").await;
    let (_, tenant_admin) = api.user("second@example.com", "admin").await;
    let path = format!("/api/v1/users/{ada}/sessions");
    let listed = api.as_who(&tenant_admin, "GET", &path).send().await.expect(200);
    assert_eq!(listed.body["items"].as_array().map(Vec::len), Some(1));
    assert_eq!(listed.body["items"][0]["current"], false);
    api.as_who(&hers, "GET", &path).send().await.problem(403, "forbidden");
    api.as_who(&tenant_admin, "DELETE", &path).send().await.expect(204);
    assert!(!is_in(&api, &hers).await);

    let above = format!("/api/v1/users/{}/sessions", api.admin);
    for method in ["GET", "DELETE"] {
        api.as_who(&tenant_admin, method, &above).send().await.problem(403, "forbidden");
    }
    let nobody = format!("/api/v1/users/usr_{:032x}/sessions", 1);
    api.ask("DELETE", &nobody).send().await.problem(404, "no-such-user");
    // A new password ends what was begun with the old one.
    let hers = api.token_of(ada).await;
    let ask = api.ask("PATCH", &format!("/api/v1/users/{ada}"));
    let wanted = json!({ "password": "quite another password" }).to_string();
    ask.raw("application/merge-patch+json", wanted).send().await.expect(200);
    assert!(!is_in(&api, &hers).await);
}

#[tokio::test]
async fn a_program_with_an_api_key_is_not_logged_in() {
    let api = Api::start().await;
    let key = api.post("/api/v1/api-keys", json!({ "name": "a", "role": "admin" })).await.expect(201);
    let key = key.body["secret"].as_str().unwrap();
    for (method, path) in [("GET", SESSIONS), ("POST", "/api/v1/auth/logout"), ("POST", "/api/v1/auth/logout-all")] {
        let refused = api.as_who(key, method, path).send().await.problem(403, "forbidden");
        assert!(refused.body["detail"].as_str().unwrap().contains("API key"), "{}", refused.text);
    }
}

#[tokio::test]
async fn a_page_of_another_site_neither_refreshes_nor_logs_out_nor_in() {
    let api = Api::start().await;
    let cookie = format!("{PLAIN}={}", login(&api).await.cookie(PLAIN).0);
    for path in [REFRESH, "/api/v1/auth/logout", LOGIN] {
        for (name, value) in [
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
            ("origin", "https://evil.example"),
            ("origin", "http://localhost:9999"),
            ("origin", "null"),
        ] {
            let ask = with_cookie(&api, path, &cookie).header(name, value).json(&credentials());
            ask.send().await.problem(403, "cross-site");
        }
    }
    // Of the site itself, and of what is no browser.
    let value = |reply: Reply| format!("{PLAIN}={}", reply.expect(200).cookie(PLAIN).0);
    let ask = with_cookie(&api, REFRESH, &cookie).header("origin", "http://localhost:8080");
    let cookie = value(ask.send().await);
    let ask = with_cookie(&api, REFRESH, &cookie).header("sec-fetch-site", "same-origin");
    let cookie = value(ask.send().await);
    with_cookie(&api, "/api/v1/auth/logout", &cookie).send().await.expect(204);
}

#[tokio::test]
async fn one_login_too_many_ends_the_oldest_and_is_counted() {
    let mut setup = Setup::default();
    setup.config.auth.max_sessions = 2;
    let api = Api::with(setup).await;
    let first = login(&api).await;
    for _ in 0..2 {
        api.pass(TimeDelta::seconds(1));
        assert!(is_in(&api, token(&login(&api).await)).await);
    }
    assert!(!is_in(&api, token(&first)).await);
    // The test's own login was the first to go.
    assert!((api.metric("muster_login_sessions_ended_total{why=\"limit\"}").await - 2.0).abs() < 0.1);
}
