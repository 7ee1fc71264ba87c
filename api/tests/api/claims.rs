//! Claims over REST, and devices that ask to come in.

use chrono::TimeDelta;
use fleet_core::credential;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Api, Reply, Setup};

const CLAIMS: &str = "/api/v1/claims";
const REQUESTS: &str = "/api/v1/claims/requests";
const TOKEN: &str = "a token that the device has made itself";

fn claim(more: &Value) -> Value {
    let mut body = json!({"name": "freezers", "approval": "auto", "max_devices": 2, "expires_in_s": 3600});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// Makes a claim: its id and its secret.
async fn made(api: &Api, more: &Value) -> (String, String) {
    let made = api.post(CLAIMS, claim(more)).await.expect(201).body;
    let text = |name: &str| made[name].as_str().unwrap().to_owned();
    (text("id"), text("secret"))
}

fn request(id: &str) -> Value {
    let hash = format!("{:x}", axum::body::Bytes::copy_from_slice(&Sha256::digest(TOKEN)));
    json!({"id": id, "nonce": "0123456789abcdef", "token_sha256": hash, "serial": "SN-1"})
}

async fn ask(api: &Api, secret: &str, body: &Value) -> Reply {
    api.as_who(secret, "POST", "/api/v1/provision").json(body).send().await
}

async fn opens(api: &Api, username: &str) -> bool {
    let mut db = api.db.pool().acquire().await.unwrap();
    credential::verify(&mut db, username, TOKEN.as_bytes(), api.now()).await.unwrap().is_some()
}

#[tokio::test]
async fn a_claim_is_made_shown_and_revoked() {
    let api = Api::start().await;
    let more = json!({"type": "freezer", "group": "oslo", "labels": {"batch": "7"}, "id_pattern": "freezer-*"});
    let made = api.ask("POST", CLAIMS).header("idempotency-key", "k").json(&claim(&more)).send().await.expect(201);
    let (id, secret) = (made.body["id"].as_str().unwrap(), made.body["secret"].as_str().unwrap());
    assert!(secret.starts_with("mc_") && secret.len() == 46, "{secret}");
    assert_eq!(made.header("location"), format!("{CLAIMS}/{id}"));
    let again = api.ask("POST", CLAIMS).header("idempotency-key", "k").json(&claim(&more)).send().await.expect(201);
    assert_eq!((&again.body["id"], &again.body["secret"]), (&json!(id), &Value::Null), "shown once");

    let shown = api.get(&format!("{CLAIMS}/{id}")).await.expect(200).body;
    for (field, value) in [
        ("state", json!("open")),
        ("username", json!(format!("main/_claim/{id}"))),
        ("approval", json!("auto")),
        ("type", json!("freezer")),
        ("group", json!("oslo")),
        ("labels", json!({"batch": "7"})),
        ("id_pattern", json!("freezer-*")),
        ("max_devices", json!(2)),
        ("enrolled", json!(0)),
        ("pending", json!(0)),
        ("refused", json!(0)),
        ("expires_at", json!("2025-11-21T13:00:00.000Z")),
        ("revoked_at", Value::Null),
    ] {
        assert_eq!(shown[field], value, "{field}");
    }
    assert!(!shown.to_string().contains("mc_"), "{shown}");
    let (second, _) = made_second(&api).await;
    let first = api.get(&format!("{CLAIMS}?limit=1")).await.expect(200);
    assert_eq!(first.ids(), [id]);
    let cursor = first.body["next_cursor"].as_str().unwrap();
    assert_eq!(api.get(&format!("{CLAIMS}?limit=1&cursor={cursor}")).await.expect(200).ids(), [&second]);

    for _ in 0..2 {
        api.ask("DELETE", &format!("{CLAIMS}/{id}")).send().await.expect(204);
    }
    assert_eq!(api.get(&format!("{CLAIMS}/{id}")).await.expect(200).body["state"], "revoked");
    ask(&api, secret, &request("freezer-1")).await.problem(401, "bad-token");
    api.pass(TimeDelta::seconds(3600));
    // The access token of the admin has ended too.
    let mut db = api.db.pool().acquire().await.unwrap();
    let over = fleet_core::claim::page(&mut db, api.db.tenant(), None, 10).await.unwrap().0;
    assert_eq!(over.iter().map(|claim| claim.state(api.now())).collect::<Vec<_>>(), ["revoked", "expired"]);
}

async fn made_second(api: &Api) -> (String, String) {
    made(api, &json!({})).await
}

#[tokio::test]
async fn a_device_asks_and_comes_in_at_once() {
    let api = Api::start().await;
    let (id, secret) = made(&api, &json!({"group": "oslo"})).await;
    let first = ask(&api, &secret, &request("freezer-1")).await.expect(201);
    assert_eq!(first.body, json!({"status": "accepted", "username": "main/freezer-1", "sealed": null}));
    assert!(opens(&api, "main/freezer-1").await);
    assert_eq!(ask(&api, &secret, &request("freezer-1")).await.expect(200).body, first.body, "asked twice");
    let device = api.get("/api/v1/devices/freezer-1").await.expect(200).body;
    assert_eq!((&device["group"], &device["labels"]), (&json!("oslo"), &json!({"serial": "SN-1"})));
    let kept = api.get(&format!("{REQUESTS}?claim={id}")).await.expect(200);
    let one = &kept.body["items"][0];
    let parts = (&one["device"], &one["state"], &one["serial"], &one["asked"], &one["asker"], &one["decided_by"]);
    let expected = (&json!("freezer-1"), &json!("approved"), &json!("SN-1"), &json!(2), &json!("http"), &Value::Null);
    assert_eq!(parts, expected);

    ask(&api, &secret, &request("freezer-2")).await.expect(201);
    ask(&api, &secret, &request("freezer-3")).await.problem(409, "claim-used-up");
    let claim = api.get(&format!("{CLAIMS}/{id}")).await.expect(200).body;
    assert_eq!((&claim["state"], &claim["enrolled"], &claim["refused"]), (&json!("used-up"), &json!(2), &json!(1)));
    assert!(api.metric("muster_http_provision_total{outcome=\"accepted\"}").await >= 2.0);
    assert!(api.metric("muster_http_provision_total{outcome=\"repeated\"}").await >= 1.0);
    assert!(api.metric("muster_http_provision_total{outcome=\"used-up\"}").await >= 1.0);
}

#[tokio::test]
async fn an_operator_approves_and_rejects() {
    let api = Api::start().await;
    let (_, secret) = made(&api, &json!({"approval": "manual"})).await;
    for id in ["freezer-1", "freezer-2"] {
        assert_eq!(ask(&api, &secret, &request(id)).await.expect(202).body["status"], "pending");
    }
    let inbox = api.get(&format!("{REQUESTS}?state=pending")).await.expect(200);
    let ids = inbox.ids().iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
    assert_eq!(ids.len(), 2);
    let with = json!({"group": "bergen", "labels": {"shelf": "3"}});
    let approved = api.post(&format!("{REQUESTS}/{}/approve", ids[0]), with).await.expect(200).body;
    assert_eq!((&approved["state"], &approved["decided_by"]), (&json!("approved"), &json!(api.admin)));
    let device = api.get("/api/v1/devices/freezer-1").await.expect(200).body;
    assert_eq!((&device["group"], &device["labels"]["shelf"]), (&json!("bergen"), &json!("3")));
    assert_eq!(ask(&api, &secret, &request("freezer-1")).await.expect(200).body["status"], "accepted");

    let path = format!("{REQUESTS}/{}/reject", ids[1]);
    assert_eq!(api.post(&path, json!({"reason": "not ours"})).await.expect(200).body["reason"], "not ours");
    let told = ask(&api, &secret, &request("freezer-2")).await.problem(403, "provision-rejected");
    assert_eq!(told.body["detail"], "not ours");
    api.post(&path, json!({})).await.problem(409, "decided-already");
    api.ask("POST", &format!("{REQUESTS}/{}/approve", ids[1])).send().await.problem(409, "decided-already");
    assert_eq!(api.get(&format!("{REQUESTS}?state=pending")).await.expect(200).ids(), Vec::<&str>::new());
    let nobody = format!("{REQUESTS}/crq_{:032x}/approve", 1);
    api.ask("POST", &nobody).send().await.problem(404, "no-such-claim-request");
    api.get(&format!("{REQUESTS}?state=maybe")).await.problem(400, "invalid");
}

#[tokio::test]
async fn what_is_asked_wrongly_is_told() {
    let mut setup = Setup::default();
    setup.config.provisioning.claim_requests_per_minute = 3;
    let api = Api::with(setup).await;
    let (_, secret) = made(&api, &json!({"id_pattern": "freezer-*"})).await;
    api.enrol("freezer-0").await;
    let told = ask(&api, &secret, &json!({"id": "freezer-1"})).await.problem(400, "invalid");
    assert!(told.body["detail"].as_str().unwrap().contains("missing field"));
    ask(&api, &secret, &request("pump-1")).await.problem(422, "wrong-id");
    ask(&api, &secret, &request("freezer-0")).await.problem(409, "device-exists");
    ask(&api, &secret, &request("freezer-1")).await.expect(201);
    let late = ask(&api, &secret, &request("freezer-2")).await.problem(429, "rate-limited");
    assert!(!late.header("retry-after").is_empty());
    let large = json!({"id": "x".repeat(17_000)});
    ask(&api, &secret, &large).await.problem(413, "body-too-large");
    let text = api.as_who(&secret, "POST", "/api/v1/provision").raw("text/plain", "x").send().await;
    text.problem(415, "unsupported-media-type");
    for body in [
        json!({"name": ""}),
        json!({"max_devices": 0}),
        json!({"expires_in_s": 0}),
        json!({"id_pattern": "a b"}),
        json!({"approval": "maybe"}),
        json!({"group": "/"}),
    ] {
        api.post(CLAIMS, claim(&body)).await.problem(400, "invalid");
    }
}

#[tokio::test]
async fn a_claim_opens_the_way_to_ask_and_nothing_else() {
    let api = Api::start().await;
    let (id, secret) = made(&api, &json!({})).await;
    for path in ["/api/v1/me", "/api/v1/devices", CLAIMS] {
        api.as_who(&secret, "GET", path).send().await.problem(401, "bad-token");
    }
    let admin = api.ask("POST", "/api/v1/provision").json(&request("freezer-1")).send().await;
    admin.problem(401, "bad-token");
    ask(&api, "mc_x", &request("freezer-1")).await.problem(401, "bad-token");

    // Another tenant has no such claim.
    let (stranger, token) = api.user("stranger@example.com", "admin").await;
    sqlx::query("insert into tenant (id, created_at) values ('other', now())").execute(api.db.pool()).await.unwrap();
    sqlx::query("update app_user set tenant_key = (select key from tenant where id = 'other') where id = $1")
        .bind(stranger.uuid())
        .execute(api.db.pool())
        .await
        .unwrap();
    assert_eq!(api.as_who(&token, "GET", CLAIMS).send().await.expect(200).ids(), Vec::<&str>::new());
    for method in ["GET", "DELETE"] {
        api.as_who(&token, method, &format!("{CLAIMS}/{id}")).send().await.problem(404, "no-such-claim");
    }
    let (_, secret) = made(&api, &json!({"approval": "manual"})).await;
    ask(&api, &secret, &request("freezer-1")).await.expect(202);
    assert_eq!(api.as_who(&token, "GET", REQUESTS).send().await.expect(200).ids(), Vec::<&str>::new());
    let request = api.get(REQUESTS).await.expect(200).ids()[0].to_owned();
    let theirs = format!("{REQUESTS}/{request}/approve");
    api.as_who(&token, "POST", &theirs).send().await.problem(404, "no-such-claim-request");
}
