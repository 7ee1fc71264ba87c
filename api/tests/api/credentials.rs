//! Credentials over REST; each is tried where it counts, at [`fleet_core::credential::verify`].

use chrono::TimeDelta;
use fleet_core::certificate::Certificate;
use fleet_core::credential;
use serde_json::{Value, json};

use crate::harness::Api;

async fn opens(api: &Api, credential: &Value) -> bool {
    let mut db = api.db.pool().acquire().await.unwrap();
    let [username, password] = ["username", "password"].map(|key| credential[key].as_str().unwrap());
    credential::verify(&mut db, username, password.as_bytes(), api.now()).await.unwrap().is_some()
}

#[tokio::test]
async fn a_rotation_overlaps_and_then_ends_the_old_one() {
    let api = Api::start().await;
    let first = api.enrol("d").await["credential"].clone();
    let second = api.post("/api/v1/devices/d/credentials/rotate", json!({"overlap_s": 60})).await.expect(201).body;
    assert!(opens(&api, &first).await && opens(&api, &second).await);
    api.pass(TimeDelta::seconds(60));
    assert!(!opens(&api, &first).await && opens(&api, &second).await);
    // Without a body, the settings say how long.
    let third = api.ask("POST", "/api/v1/devices/d/credentials/rotate").send().await.expect(201).body;
    let listed = api.get("/api/v1/devices/d/credentials").await.expect(200).body;
    let listed = listed["items"].as_array().unwrap();
    assert_eq!(listed.iter().map(|one| &one["id"]).collect::<Vec<_>>(), [&third["id"], &second["id"], &first["id"]]);
    assert_eq!(listed.iter().map(|one| &one["valid"]).collect::<Vec<_>>(), [true, true, false]);
    assert_eq!(listed[1]["expires_at"], "2025-11-22T12:01:00.000Z");
    assert!(listed.iter().all(|one| one.get("password").is_none()));
    let at_once = api.post("/api/v1/devices/d/credentials/rotate", json!({"overlap_s": 0})).await.expect(201).body;
    assert!(opens(&api, &at_once).await && !opens(&api, &second).await && !opens(&api, &third).await);
}

#[tokio::test]
async fn a_third_credential_is_refused_until_one_is_revoked() {
    let api = Api::start().await;
    let first = api.enrol("d").await["credential"].clone();
    let second = api.ask("POST", "/api/v1/devices/d/credentials").send().await.expect(201);
    assert_eq!(
        second.header("location"),
        format!("/api/v1/devices/d/credentials/{}", second.body["id"].as_str().unwrap())
    );
    api.post("/api/v1/devices/d/credentials", json!({})).await.problem(409, "too-many-credentials");
    assert!(api.metric("muster_http_problems_total{type=\"too-many-credentials\"}").await > 0.5);
    let path = format!("/api/v1/devices/d/credentials/{}", first["id"].as_str().unwrap());
    api.ask("DELETE", &path).send().await.expect(204);
    api.ask("DELETE", &path).send().await.expect(204);
    assert!(!opens(&api, &first).await && opens(&api, &second.body).await);
    api.post("/api/v1/devices/d/credentials", json!({})).await.expect(201);
    api.enrol("other").await;
    let foreign = path.replace("/d/", "/other/");
    api.ask("DELETE", &foreign).send().await.problem(404, "no-such-credential");
}

#[tokio::test]
async fn a_request_that_is_repeated_issues_once() {
    let api = Api::start().await;
    api.enrol("d").await;
    for path in ["/api/v1/devices/d/credentials", "/api/v1/devices/d/credentials/rotate"] {
        let ask = || api.ask("POST", path).header("idempotency-key", path).send();
        let first = ask().await.expect(201);
        let again = ask().await.expect(201);
        assert_eq!((&again.body["id"], &again.body["password"]), (&first.body["id"], &Value::Null));
        assert_eq!(again.header("location"), first.header("location"));
        assert!(opens(&api, &first.body).await);
    }
}

#[tokio::test]
async fn an_overlap_is_bounded() {
    let api = Api::start().await;
    api.enrol("d").await;
    for bad in
        [json!({"overlap_s": -1}), json!({"overlap_s": 1.5}), json!({"overlap_s": u64::MAX}), json!({"overlap": 1})]
    {
        api.post("/api/v1/devices/d/credentials/rotate", bad).await.problem(400, "invalid");
    }
    api.post("/api/v1/devices/no/credentials/rotate", json!({})).await.problem(404, "no-such-device");
    let text = api.ask("POST", "/api/v1/devices/d/credentials/rotate").raw("text/plain", "{}").send().await;
    text.problem(415, "unsupported-media-type");
}

/// A self-signed certificate in PEM.
fn pem() -> String {
    let key = rcgen::KeyPair::generate().unwrap();
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name.push(rcgen::DnType::CommonName, "sensor 1");
    params.self_signed(&key).unwrap().pem()
}

#[tokio::test]
async fn a_certificate_is_registered_shown_and_revoked() {
    let api = Api::start().await;
    api.enrol("d").await;
    let pem = pem();
    let read = Certificate::from_pem(&pem).unwrap();
    let registered = api.post("/api/v1/devices/d/credentials", json!({"certificate": pem})).await.expect(201).body;
    assert_eq!((&registered["kind"], &registered["password"]), (&json!("certificate"), &Value::Null));
    assert_eq!(registered["certificate"]["fingerprint"], read.fingerprint.to_string());
    assert_eq!(registered["certificate"]["subject"], "CN=sensor 1");
    let holder = async || {
        let mut db = api.db.pool().acquire().await.unwrap();
        let found = credential::registration(&mut db, &read, TimeDelta::zero(), api.now()).await.unwrap();
        found.and_then(|found| found.holder)
    };
    assert!(holder().await.is_some());
    let listed = api.get("/api/v1/devices/d/credentials").await.expect(200).body;
    let kinds: Vec<_> = listed["items"].as_array().unwrap().iter().map(|one| one["kind"].clone()).collect();
    assert!(kinds.contains(&json!("token")) && kinds.contains(&json!("certificate")), "{listed}");
    assert!(listed["items"].as_array().unwrap().iter().any(|one| one["certificate"] == registered["certificate"]));
    api.enrol("other").await;
    let elsewhere = json!({"certificate": pem});
    api.post("/api/v1/devices/other/credentials", elsewhere.clone()).await.problem(409, "certificate-taken");
    let path = format!("/api/v1/devices/d/credentials/{}", registered["id"].as_str().unwrap());
    api.ask("DELETE", &path).send().await.expect(204);
    assert!(holder().await.is_none());
    api.post("/api/v1/devices/other/credentials", elsewhere).await.expect(201);
}

#[tokio::test]
async fn what_is_no_certificate_is_refused() {
    let api = Api::start().await;
    api.enrol("d").await;
    let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
    let large = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", "AAAA".repeat(10_000));
    for bad in ["", "-----BEGIN CERTIFICATE-----", &key, &format!("{}{key}", pem()), &large] {
        let answer = api.post("/api/v1/devices/d/credentials", json!({"certificate": bad})).await;
        answer.problem(400, "invalid");
    }
    for _ in 0..2 {
        api.post("/api/v1/devices/d/credentials", json!({"certificate": pem()})).await.expect(201);
    }
    let third = api.post("/api/v1/devices/d/credentials", json!({"certificate": pem()})).await;
    third.problem(409, "too-many-credentials");
}
