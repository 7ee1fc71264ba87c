//! Devices that leave for good.

use chrono::TimeDelta;
use fleet_core::decommission;
use serde_json::{Value, json};

use crate::harness::{Api, Reply};

const REPORTS: &str = "/api/v1/decommissions";

async fn leave(api: &Api, token: &str, id: &str, purge: bool) -> Reply {
    let path = format!("/api/v1/devices/{id}/decommission");
    api.as_who(token, "POST", &path).json(&json!({ "purge": purge })).send().await
}

/// Somebody who may decommission what is in the group `site`.
async fn clearer(api: &Api) -> String {
    api.post("/api/v1/roles", json!({ "id": "clearer", "permissions": ["devices:decommission", "devices:read"] }))
        .await
        .expect(201);
    let (user, _) = api.nobody().await;
    let scope = json!({ "kind": "group", "group": "site" });
    api.post("/api/v1/bindings", json!({ "user": user, "role": "clearer", "scope": scope })).await.expect(201);
    api.token_of(user).await
}

async fn clear(api: &Api) {
    api.pass(TimeDelta::seconds(3));
    assert_eq!(decommission::work(api.db.pool(), 100, api.now()).await.unwrap().unfinished, 0);
}

#[tokio::test]
async fn a_device_is_purged_and_the_report_says_so() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let asked = api.post("/api/v1/devices/boiler-1/decommission", json!({ "purge": true })).await.expect(202);
    let id = asked.body["id"].as_str().unwrap();
    assert_eq!(asked.header("location"), format!("{REPORTS}/{id}"));
    assert_eq!((&asked.body["state"], &asked.body["left"]), (&json!("running"), &Value::Null));
    assert_eq!(asked.body["asked_by"], api.admin.to_string());
    let device = api.get("/api/v1/devices/boiler-1").await.expect(200).body;
    assert_eq!((&device["disabled"], &device["decommissioned_at"]), (&json!(true), &asked.body["asked_at"]));
    let again = api.post("/api/v1/devices/boiler-1/decommission", json!({})).await.expect(202);
    assert_eq!((&again.body["id"], &again.body["purge"]), (&asked.body["id"], &json!(true)));

    let enable = api.ask("PATCH", "/api/v1/devices/boiler-1");
    let enable = enable.raw("application/merge-patch+json", json!({ "disabled": false }).to_string()).send().await;
    enable.problem(409, "decommissioned");
    api.post("/api/v1/devices/boiler-1/credentials", json!({})).await.problem(409, "decommissioned");
    api.post("/api/v1/devices", json!({ "id": "boiler-1" })).await.problem(409, "device-exists");

    clear(&api).await;
    api.get("/api/v1/devices/boiler-1").await.problem(404, "no-such-device");
    let report = api.get(&format!("{REPORTS}/{id}")).await.expect(200).body;
    assert_eq!(report["state"], "finished");
    assert_eq!(report["deleted"], json!({ "credential": 1, "device": 1 }));
    let left = report["left"].as_object().unwrap();
    assert!(left.len() > 10 && left.values().all(|left| left == 0), "{report}");
    let told = api.get("/api/v1/audit?action=decommission.finish").await.expect(200).body;
    assert_eq!(told["items"][0]["after"]["deleted"], report["deleted"], "{told}");
    assert_eq!(told["items"][0]["after"]["left"], report["left"], "{told}");
    let told = api.get("/api/v1/audit?action=device.decommission").await.expect(200).body;
    assert_eq!(told["items"][0]["actor"]["id"], api.admin.to_string(), "{told}");
    api.enrol("boiler-1").await;
}

#[tokio::test]
async fn reports_are_pages_and_those_of_one_device() {
    let api = Api::start().await;
    for id in ["a", "b", "c"] {
        api.enrol(id).await;
        api.post(&format!("/api/v1/devices/{id}/decommission"), json!({})).await.expect(202);
    }
    let first = api.get(&format!("{REPORTS}?limit=2")).await.expect(200);
    let cursor = first.body["next_cursor"].as_str().unwrap();
    let rest = api.get(&format!("{REPORTS}?limit=2&cursor={cursor}")).await.expect(200);
    let devices = |reply: &Reply| {
        let items = reply.body["items"].as_array().unwrap().iter();
        items.map(|report| report["device"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!((devices(&first), devices(&rest)), (vec!["a".into(), "b".into()], vec!["c".into()]));
    assert_eq!(devices(&api.get(&format!("{REPORTS}?device=b")).await.expect(200)), ["b"]);
}

#[tokio::test]
async fn whoever_may_clear_one_group_touches_and_sees_nothing_else() {
    let api = Api::start().await;
    for (id, group) in [("in-1", "site/line-3"), ("out-1", "elsewhere")] {
        api.post("/api/v1/devices", json!({ "id": id, "group": group })).await.expect(201);
    }
    let token = clearer(&api).await;
    let refused = leave(&api, &token, "out-1", true).await.problem(404, "no-such-device");
    let unknown = leave(&api, &token, "nobody", true).await.problem(404, "no-such-device");
    assert_eq!(refused.text.len() - "out-1".len() * 2, unknown.text.len() - "nobody".len() * 2, "it tells nothing");
    assert_eq!(api.get("/api/v1/devices/out-1").await.expect(200).body["disabled"], false);
    let mine = leave(&api, &token, "in-1", true).await.expect(202).body["id"].as_str().unwrap().to_owned();
    let theirs = api.post("/api/v1/devices/out-1/decommission", json!({})).await.expect(202);
    let theirs = theirs.body["id"].as_str().unwrap();
    clear(&api).await;
    let ask = |path: String| api.as_who(&token, "GET", &path).send();
    // The device is gone, and its report is still the business of whoever it was.
    assert_eq!(ask(format!("{REPORTS}/{mine}")).await.expect(200).body["state"], "finished");
    assert_eq!(ask(REPORTS.to_owned()).await.expect(200).ids(), [&mine]);
    ask(format!("{REPORTS}/{theirs}")).await.problem(404, "no-such-decommission");
}

#[tokio::test]
async fn whoever_may_change_devices_does_not_decommission_them() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let (_, operator) = api.user("op@example.com", "operator").await;
    for (method, path) in [("POST", "/api/v1/devices/boiler-1/decommission"), ("GET", REPORTS)] {
        let reply = api.as_who(&operator, method, path).json(&json!({ "purge": true })).send().await;
        reply.problem(403, "forbidden");
    }
    api.post("/api/v1/devices/boiler-1/decommission", json!({ "everything": true })).await.problem(400, "invalid");
}
