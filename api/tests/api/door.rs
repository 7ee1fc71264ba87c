//! What happens to every request, whatever it asks for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use api::Health;
use axum::body::Body;
use serde_json::json;

use crate::access::{PUBLIC, operations};
use crate::harness::{Api, EMAIL, PASSWORD, Setup};

#[tokio::test]
async fn what_is_not_there_is_a_problem() {
    let api = Api::start().await;
    for path in ["/nothing", "/api/v1/nothing", "/api/v2/devices", "/metrics/x", "/%00"] {
        let reply = api.anonymous("GET", path).send().await.problem(404, "no-such-route");
        assert_eq!(reply.body["instance"], path);
    }
    let reply = api.ask("PUT", "/api/v1/devices/a").send().await.problem(405, "method-not-allowed");
    let allow = reply.header("allow");
    assert!(["GET", "PATCH", "DELETE"].iter().all(|method| allow.contains(method)), "{allow}");
    api.anonymous("BREW", "/api/v1/me").send().await.problem(405, "method-not-allowed");
    assert!(api.metric("muster_http_requests_total{method=\"other\",route=\"/api/v1/me\",status=\"405\"}").await > 0.5);
    assert!(api.metric("muster_http_requests_total{method=\"GET\",route=\"unmatched\",status=\"404\"}").await > 4.5);
}

#[tokio::test]
async fn a_request_keeps_its_id_when_the_id_is_fit() {
    let api = Api::start().await;
    let id = |given: &'static str| {
        let ask = api.anonymous("GET", "/healthz");
        async move { ask.header("x-request-id", given).send().await.expect(200).header("x-request-id").to_owned() }
    };
    assert_eq!(id("trace-1/a.b:c").await, "trace-1/a.b:c");
    for unfit in ["", "a b", "<script>", "x\u{e9}"] {
        let made = id(unfit).await;
        assert!(made.len() == 32 && made != unfit, "{made}");
    }
    let long = api.anonymous("GET", "/healthz").header("x-request-id", &"x".repeat(129)).send().await;
    assert_eq!(long.header("x-request-id").len(), 32);
}

#[tokio::test]
async fn answers_carry_the_headers_that_keep_browsers_honest() {
    let api = Api::start().await;
    for path in ["/api/v1/me", "/healthz", "/nothing", "/docs/"] {
        let reply = api.anonymous("GET", path).send().await;
        assert_eq!(reply.header("x-content-type-options"), "nosniff", "{path}");
        assert_eq!(reply.header("x-frame-options"), "DENY", "{path}");
        assert!(reply.header("content-security-policy").contains("frame-ancestors 'none'"), "{path}");
        assert_eq!(reply.header("cache-control") == "no-store", path.starts_with("/api/"), "{path}");
    }
}

#[tokio::test]
async fn browsers_are_told_what_pages_may_not_do() {
    let api = Api::start().await;
    for path in ["/api/v1/me", "/healthz", "/nothing", "/docs/", "/metrics"] {
        let reply = api.anonymous("GET", path).send().await;
        assert_eq!(reply.header("cross-origin-opener-policy"), "same-origin", "{path}");
        assert_eq!(reply.header("cross-origin-resource-policy"), "same-origin", "{path}");
        assert_eq!(reply.header("referrer-policy"), "no-referrer", "{path}");
        assert!(reply.header("permissions-policy").contains("camera=()"), "{path}");
        let policy = reply.header("content-security-policy");
        for part in ["default-src '", "base-uri 'none'", "form-action '", "frame-ancestors 'none'"] {
            assert!(policy.contains(part), "{path}: {policy}");
        }
        assert!(!policy.contains("script-src") && !policy.contains("unsafe-eval"), "{path}: {policy}");
    }
}

/// Every route that is documented, and every pattern of the router besides.
fn all_routes(api: &Api) -> Vec<(String, String)> {
    let documented = operations().into_iter().map(|(method, path, _)| (method, path));
    let filled = |path: String| path.replace("{id}", "boiler-1").replace("{*rest}", "x");
    let patterns = api.routes().into_iter().map(|path| ("GET".to_owned(), filled(path)));
    documented.chain(patterns).collect()
}

#[tokio::test]
async fn no_answer_of_any_route_is_without_the_headers_that_keep_browsers_honest() {
    let mut setup = Setup::default();
    setup.config.http.trusted_proxies = vec!["10.0.0.0/8".parse().unwrap()];
    let api = Api::with(setup).await;
    let routes = all_routes(&api);
    assert!(routes.len() > 100, "{}", routes.len());
    for (method, path) in routes {
        for ask in [api.anonymous(&method, &path), api.ask(&method, &path)] {
            let reply = ask.from("10.1.1.1").header("x-forwarded-proto", "https").send().await;
            let route = format!("{method} {path}: {}", reply.status);
            for (name, value) in [
                ("x-content-type-options", "nosniff"),
                ("x-frame-options", "DENY"),
                ("referrer-policy", "no-referrer"),
                ("cross-origin-opener-policy", "same-origin"),
                ("cross-origin-resource-policy", "same-origin"),
            ] {
                assert_eq!(reply.header(name), value, "{route}: {name}");
            }
            assert!(reply.header("strict-transport-security").contains("max-age="), "{route}");
            assert!(reply.header("permissions-policy").contains("camera=()"), "{route}");
            let (policy, docs) = (reply.header("content-security-policy"), path.starts_with("/docs"));
            assert!(
                policy.starts_with(if docs { "default-src 'self'" } else { "default-src 'none'" }),
                "{route}: {policy}"
            );
            assert!(policy.contains("frame-ancestors 'none'"), "{route}: {policy}");
            assert_eq!(reply.header("cache-control") == "no-store", path.starts_with("/api/"), "{route}");
            assert!(
                !reply.headers.contains_key("access-control-allow-origin"),
                "{route}: pages of other sites read nothing"
            );
        }
    }
}

#[tokio::test]
async fn a_cookie_opens_nothing_but_refresh_and_logout_and_those_to_no_other_site() {
    let api = Api::start().await;
    let login = json!({ "email": EMAIL, "password": PASSWORD });
    let login = api.anonymous("POST", "/api/v1/auth/login").json(&login).send().await.expect(200);
    let cookie = format!("muster_refresh={}", login.cookie("muster_refresh").0);
    let mut guarded = 0;
    for (method, path, _) in operations() {
        let route = format!("{method} {path}");
        let by_cookie = api.anonymous(&method, &path).header("cookie", &cookie).header("sec-fetch-site", "cross-site");
        let reply = by_cookie.send().await;
        if ["login", "refresh", "logout"].iter().any(|last| route == format!("POST /api/v1/auth/{last}")) {
            reply.problem(403, "cross-site");
        } else if !PUBLIC.contains(&route.as_str()) {
            reply.problem(401, "no-token");
            guarded += 1;
        }
    }
    assert!(guarded > 50, "{guarded}");
}

#[tokio::test]
async fn https_is_kept_to_where_a_trusted_proxy_tells_of_it() {
    let mut setup = Setup::default();
    setup.config.http.trusted_proxies = vec!["10.0.0.0/8".parse().unwrap()];
    setup.config.http.hsts_s = 300;
    let api = Api::with(setup).await;
    let told = async |from: &str, proto: &str| {
        let ask = api.anonymous("GET", "/healthz").from(from).header("x-forwarded-proto", proto);
        ask.send().await.expect(200).header("strict-transport-security").to_owned()
    };
    assert_eq!(told("10.1.1.1", "https").await, "max-age=300; includeSubDomains");
    assert_eq!(told("10.1.1.1", "http").await, "");
    assert_eq!(told("192.0.2.1", "https").await, "", "a stranger tells nothing");
    let mut setup = Setup::default();
    setup.config.http.trusted_proxies = vec!["10.0.0.0/8".parse().unwrap()];
    setup.config.http.hsts_s = 0;
    let api = Api::with(setup).await;
    let ask = api.anonymous("GET", "/healthz").from("10.1.1.1").header("x-forwarded-proto", "https");
    assert_eq!(ask.send().await.header("strict-transport-security"), "");
}

#[tokio::test]
async fn a_body_beyond_the_bound_is_not_read() {
    let mut setup = Setup::default();
    setup.config.http.max_body_bytes = 1000;
    let api = Api::with(setup).await;
    let fits = format!("{{\"id\":\"a\"{}}}", " ".repeat(1000 - 10));
    assert_eq!(fits.len(), 1000);
    api.ask("POST", "/api/v1/devices").raw("application/json", fits.clone()).send().await.expect(201);
    let large = api.ask("POST", "/api/v1/devices").raw("application/json", fits + " ").send().await;
    let large = large.problem(413, "body-too-large");
    assert!(large.body["detail"].as_str().unwrap().contains("1000 bytes"));
    assert!((api.metric("muster_http_problems_total{type=\"body-too-large\"}").await - 1.0).abs() < 0.5);
    // Without a length in front, the bound holds as well.
    let endless = Body::new(axum::body::Body::from(vec![b' '; 2000]));
    api.ask("POST", "/api/v1/devices").raw("application/json", endless).send().await.problem(413, "body-too-large");
}

#[tokio::test]
async fn an_answer_that_takes_too_long_is_not_waited_for() {
    let mut setup = Setup::default();
    setup.config.http.request_timeout_ms = 1;
    let api = Api::with(setup).await;
    let body = json!({"email": EMAIL, "password": "wrong"});
    let late = api.anonymous("POST", "/api/v1/auth/login").json(&body).send().await.problem(503, "timeout");
    assert_eq!(late.header("retry-after"), "1");
    assert!(api.metric("muster_http_problems_total{type=\"timeout\"}").await > 0.5);
}

#[tokio::test]
async fn a_search_that_was_given_up_does_not_go_on() {
    let mut setup = Setup::default();
    setup.config.http.request_timeout_ms = 2000;
    let api = Api::with(setup).await;
    let mut lock = api.db.pool().begin().await.unwrap();
    sqlx::query("lock table device in access exclusive mode").execute(&mut *lock).await.unwrap();
    let waiting = async |wanted: i64| {
        let count =
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        let deadline = Instant::now() + Duration::from_secs(20);
        while sqlx::query_scalar::<_, i64>(count).fetch_one(api.db.pool()).await.unwrap() != wanted {
            assert!(Instant::now() < deadline, "expected {wanted} statements waiting for the lock");
        }
    };
    let (late, ()) = tokio::join!(api.get("/api/v1/devices"), waiting(1));
    late.problem(503, "timeout");
    waiting(0).await;
}

#[tokio::test]
async fn without_a_database_the_server_says_so_and_lives() {
    let api = Api::start().await;
    api.anonymous("GET", "/readyz").send().await.expect(200);
    api.db.pool().close().await;
    api.anonymous("GET", "/healthz").send().await.expect(200);
    let ready = api.anonymous("GET", "/readyz").send().await.expect(503);
    assert_eq!(ready.body, json!({"ready": false, "checks": {"database": "cannot be reached", "index": "ok"}}));
    let away = api.get("/api/v1/devices").await.problem(503, "database-away");
    assert_eq!(away.header("retry-after"), "1");
    api.anonymous("GET", "/metrics").send().await.expect(200);
}

#[tokio::test]
async fn readiness_asks_whoever_was_named() {
    let writer = Arc::new(AtomicBool::new(true));
    let seen = writer.clone();
    let check = move || {
        let up = seen.load(Ordering::Relaxed);
        async move { if up { Ok(()) } else { Err("the writer is behind".to_owned()) } }
    };
    let health = Health::new().with("broker", check).with("stuck", || async { Ok(()) });
    let api = Api::with(Setup { health, ..Setup::default() }).await;
    let ready = api.anonymous("GET", "/readyz").send().await.expect(200);
    assert_eq!(
        ready.body,
        json!({"ready": true, "checks": {"database": "ok", "broker": "ok", "stuck": "ok", "index": "ok"}})
    );
    writer.store(false, Ordering::Relaxed);
    let ready = api.anonymous("GET", "/readyz").send().await.expect(503);
    assert_eq!(ready.body["checks"]["broker"], "the writer is behind");
}

#[tokio::test]
async fn metrics_are_told_without_names() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    api.get("/api/v1/devices/boiler-1").await.expect(200);
    let reply = api.anonymous("GET", "/metrics").send().await.expect(200);
    assert!(reply.header("content-type").starts_with("text/plain"));
    for expected in [
        "muster_http_requests_total{method=\"GET\",route=\"/api/v1/devices/{id}\",status=\"200\"} 1",
        "muster_http_request_seconds_count{route=\"/api/v1/devices\"} 1",
        "muster_http_problems_total{type=\"busy\"} 0",
        "muster_database_pool_connections{state=\"idle\"}",
        "process_resident_memory_bytes",
    ] {
        assert!(reply.text.contains(expected), "{expected} in {}", reply.text);
    }
    assert!(!reply.text.contains("boiler-1"), "labels are closed");
}
