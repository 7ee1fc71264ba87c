//! The index of log lines over REST: for those who run the server, one work at a time.

use serde_json::{Value, json};

use crate::harness::{Api, Reply};
use crate::logs::{line, write};

const INDEX: &str = "/api/v1/index";
const VERIFY: &str = "/api/v1/index/verify";
const REBUILD: &str = "/api/v1/index/rebuild";
/// The day of the lines.
const DAY: &str = "2025-11-21";

async fn with_lines() -> Api {
    let api = Api::start().await;
    api.enrol("pump-7").await;
    write(&api, "pump-7", &(0..3).map(line).collect::<Vec<_>>()).await;
    api.index().await;
    api
}

/// The index when the work that was asked for has ended.
async fn ended(api: &Api) -> Value {
    let has_ended = |reply: &Reply| !reply.body["job"]["finished_at"].is_null();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
    loop {
        let reply = api.get(INDEX).await.expect(200);
        if has_ended(&reply) {
            return reply.body;
        }
        assert!(std::time::Instant::now() < deadline, "{}", reply.text);
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn it_is_for_those_who_stand_above_tenants() {
    let api = with_lines().await;
    let (_, admin) = api.user("ada@example.com", "admin").await;
    let (_, operator) = api.user("bob@example.com", "operator").await;
    for (method, path) in [("GET", INDEX), ("POST", VERIFY), ("POST", REBUILD)] {
        let refused = api.as_who(&admin, method, path).send().await.problem(403, "forbidden");
        assert!(refused.body["detail"].as_str().unwrap().contains("platform standing"), "{}", refused.text);
        let refused = api.as_who(&operator, method, path).send().await.problem(403, "forbidden");
        assert!(refused.body["detail"].as_str().unwrap().contains("access:manage"), "{}", refused.text);
        api.anonymous(method, path).send().await.problem(401, "no-token");
    }
    let index = api.get(INDEX).await.expect(200).body;
    assert_eq!(
        (&index["state"], &index["days"][0]["day"], &index["days"][0]["lines"]),
        (&json!("ok"), &json!(DAY), &json!(3))
    );
    assert!(index["job"].is_null(), "what was refused did not begin: {index}");
}

#[tokio::test]
async fn one_work_at_a_time_and_the_next_is_told_to_come_again() {
    let api = with_lines().await;
    let body = json!({ "day": DAY });
    // What reads rows waits until this lets go.
    let mut held = api.db.pool().begin().await.unwrap();
    sqlx::query("lock table log in access exclusive mode").execute(&mut *held).await.unwrap();
    let begun = api.post(VERIFY, body.clone()).await.expect(202).body;
    assert_eq!(
        (&begun["job"]["task"], &begun["job"]["days"], &begun["job"]["done"]),
        (&json!("verify"), &json!([DAY]), &json!([]))
    );
    for path in [VERIFY, REBUILD] {
        let refused = api.post(path, body.clone()).await.problem(429, "busy");
        assert_eq!(refused.header("retry-after"), "1");
        assert!(refused.body["detail"].as_str().unwrap().contains("jobs of the index"), "{}", refused.text);
    }
    assert!((api.metric("muster_http_problems_total{type=\"busy\"}").await - 2.0).abs() < 0.1);
    assert_eq!(api.get(INDEX).await.expect(200).body["job"]["task"], "verify", "it goes on as it was");
    held.rollback().await.unwrap();
    let found = ended(&api).await["job"]["done"].clone();
    assert_eq!(found, json!([{ "day": DAY, "equal": true, "index_lines": 3, "table_lines": 3 }]));
    // There is room for the next one.
    assert_eq!(api.post(REBUILD, body).await.expect(202).body["job"]["task"], "rebuild");
    let index = ended(&api).await;
    assert_eq!((&index["job"]["done"][0]["equal"], &index["days"][0]["lines"]), (&json!(true), &json!(3)));
    // Only what was begun is in the audit.
    let told = api.get("/api/v1/audit?resource=index").await.expect(200).body;
    let actions = told["items"].as_array().unwrap().iter().map(|entry| entry["action"].clone()).collect::<Vec<_>>();
    assert_eq!(actions, [json!("index.rebuild"), json!("index.verify")], "{told}");
}

#[tokio::test]
async fn a_day_that_is_none_is_refused() {
    let api = with_lines().await;
    for bad in [json!({ "day": "yesterday" }), json!({ "day": "2025-11-32" }), json!({ "days": [] }), json!([])] {
        for path in [VERIFY, REBUILD] {
            api.post(path, bad.clone()).await.expect(400);
        }
    }
    assert!(api.get(INDEX).await.expect(200).body["job"].is_null());
}
