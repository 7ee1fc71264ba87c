//! Authorities, signing requests and revocation lists over REST.

use chrono::TimeDelta;
use fleet_core::certificate::Certificate;
use fleet_core::credential;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, SerialNumber,
};
use serde_json::{Value, json};

use crate::harness::{Api, Setup};

const AUTHORITIES: &str = "/api/v1/authorities";

fn named(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params
}

fn csr() -> String {
    named("whoever").serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap()
}

async fn built_in(api: &Api, name: &str) -> Value {
    api.post(AUTHORITIES, json!({"name": name, "kind": "built-in"})).await.expect(201).body
}

fn path(authority: &Value) -> String {
    format!("{AUTHORITIES}/{}", authority["id"].as_str().unwrap())
}

/// Somebody's authority.
struct Foreign {
    params: CertificateParams,
    key: KeyPair,
}

impl Foreign {
    fn new() -> Self {
        let mut params = named("theirs");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        Self { params, key: KeyPair::generate().unwrap() }
    }

    fn sign(&self, params: &CertificateParams) -> String {
        let issuer = Issuer::from_params(&self.params, &self.key);
        params.signed_by(&KeyPair::generate().unwrap(), &issuer).unwrap().pem()
    }

    fn list(&self, api: &Api, number: u64) -> String {
        let moment = |days| std::time::SystemTime::from(api.now() + TimeDelta::days(days)).into();
        let list = CertificateRevocationListParams {
            this_update: moment(-1),
            next_update: moment(7),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: Vec::new(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        list.signed_by(&Issuer::from_params(&self.params, &self.key)).unwrap().pem().unwrap()
    }

    async fn register(&self, api: &Api) -> Value {
        let nonce = api.ask("POST", "/api/v1/authorities/nonce").send().await.expect(200).body;
        assert_eq!(nonce["expires_at"], "2025-11-21T13:00:00.000Z");
        let proof = self.sign(&named(nonce["nonce"].as_str().unwrap()));
        let own = self.params.self_signed(&self.key).unwrap().pem();
        let new = json!({"name": "theirs", "kind": "registered", "certificate_pem": own, "proof_pem": proof});
        api.post(AUTHORITIES, new).await.expect(201).body
    }
}

#[tokio::test]
async fn an_authority_is_made_shown_changed_and_deleted() {
    let api = Api::start().await;
    let made =
        api.post(AUTHORITIES, json!({"name": "Oslo", "kind": "built-in", "lifetime_s": 86_400})).await.expect(201);
    assert_eq!(made.header("location"), path(&made.body));
    assert_eq!((&made.body["kind"], &made.body["subject"]), (&json!("built-in"), &json!("O=main, CN=Oslo")));
    assert_eq!(made.body["not_after"], "2025-11-22T12:00:00.000Z");
    assert_eq!((&made.body["crl_number"], &made.body["disabled"]), (&Value::Null, &json!(false)));
    assert!(!made.text.contains("PRIVATE") && !made.text.contains("sealed"), "{}", made.text);
    let certificate = Certificate::from_pem(made.body["certificate_pem"].as_str().unwrap()).unwrap();
    assert_eq!(made.body["fingerprint"], certificate.fingerprint.to_string());
    let path = path(&made.body);
    let read = api.get(&path).await.expect(200);
    assert_eq!((&read.body, read.header("etag")), (&made.body, made.header("etag")));
    api.ask("GET", &path).header("if-none-match", "\"1\"").send().await.expect(304);
    assert_eq!(api.get(AUTHORITIES).await.expect(200).ids(), [made.body["id"].as_str().unwrap()]);
    api.ask("DELETE", &path).send().await.problem(409, "authority-enabled");
    let change = |body: Value| api.ask("PATCH", &path).header("if-match", "\"1\"").json(&body);
    let changed = change(json!({"name": "Bergen", "disabled": true})).send().await.expect(200);
    assert_eq!((&changed.body["name"], &changed.body["disabled"]), (&json!("Bergen"), &json!(true)));
    change(json!({"disabled": false})).send().await.problem(412, "version-mismatch");
    for bad in [json!({"name": null}), json!({"kind": "registered"}), json!({"name": ""})] {
        api.ask("PATCH", &path).json(&bad).send().await.problem(400, "invalid");
    }
    api.ask("DELETE", &path).send().await.expect(204);
    for method in ["GET", "DELETE"] {
        api.ask(method, &path).send().await.problem(404, "no-such-authority");
    }
    api.get("/api/v1/authorities/boiler-1").await.problem(400, "bad-id");
}

#[tokio::test]
async fn what_makes_no_authority_is_refused() {
    let mut setup = Setup::default();
    setup.config.certificates.max_authorities = 1;
    let api = Api::with(setup).await;
    let pem = Foreign::new().sign(&named("x"));
    for bad in [
        json!({"name": "a"}),
        json!({"name": "a", "kind": "self-made"}),
        json!({"name": "a", "kind": "built-in", "lifetime_s": 0}),
        json!({"name": "a", "kind": "built-in", "certificate_pem": pem}),
        json!({"name": "a", "kind": "built-in", "proof_pem": pem}),
        json!({"name": "a", "kind": "registered"}),
        json!({"name": "a", "kind": "registered", "certificate_pem": pem}),
        json!({"name": "a", "kind": "registered", "certificate_pem": pem, "proof_pem": pem, "lifetime_s": 9}),
        json!({"name": "a", "kind": "registered", "certificate_pem": pem, "proof_pem": pem}),
        json!({"name": " ", "kind": "built-in"}),
    ] {
        api.post(AUTHORITIES, bad).await.problem(400, "invalid");
    }
    built_in(&api, "a").await;
    api.post(AUTHORITIES, json!({"name": "b", "kind": "built-in"})).await.problem(409, "too-many");
    assert!(api.metric("muster_http_problems_total{type=\"too-many\"}").await > 0.5);
}

#[tokio::test]
async fn an_authority_of_somebody_else_is_registered_by_a_proof() {
    let api = Api::start().await;
    let foreign = Foreign::new();
    let made = foreign.register(&api).await;
    assert_eq!((&made["kind"], &made["subject"]), (&json!("registered"), &json!("CN=theirs")));
    api.enrol("d").await;
    let asked = json!({"csr_pem": csr(), "authority": made["id"]});
    api.post("/api/v1/devices/d/certificates", asked).await.problem(409, "cannot-sign");
    let crl = format!("{}/crl", path(&made));
    api.anonymous("GET", &crl).send().await.problem(404, "no-revocation-list");
    let put = |pem: String| api.ask("PUT", &crl).json(&json!({"crl_pem": pem}));
    let taken = put(foreign.list(&api, 0x1f)).send().await.expect(200);
    assert_eq!((&taken.body["crl_number"], &taken.body["version"]), (&json!("1f"), &json!(2)));
    put(foreign.list(&api, 3)).send().await.problem(409, "old-revocation-list");
    put(Foreign::new().list(&api, 40)).send().await.problem(400, "invalid");
    put("hello".into()).send().await.problem(400, "invalid");
    assert!(api.anonymous("GET", &format!("{crl}?format=pem")).send().await.expect(200).text.contains("X509 CRL"));
}

#[tokio::test]
async fn a_signing_request_becomes_a_credential() {
    let api = Api::start().await;
    api.enrol("d").await;
    let certificates = "/api/v1/devices/d/certificates";
    api.post(certificates, json!({"csr_pem": csr()})).await.problem(409, "cannot-sign");
    let authority = built_in(&api, "Oslo").await;
    let ask = |body: Value| api.ask("POST", certificates).header("idempotency-key", "one").json(&body);
    let asked = json!({"csr_pem": csr(), "lifetime_s": 9000});
    let signed = ask(asked.clone()).send().await.expect(201);
    let certificate = Certificate::from_pem(signed.body["certificate_pem"].as_str().unwrap()).unwrap();
    assert_eq!(certificate.subject, "CN=main/d");
    assert_eq!(signed.body["chain_pem"], authority["certificate_pem"]);
    assert_eq!(signed.body["authority"], authority["id"]);
    assert_eq!(signed.body["not_after"], "2025-11-21T14:30:00.000Z");
    assert_eq!(signed.body["renew_after"], "2025-11-21T13:40:00.000Z");
    assert_eq!(signed.body["serial"], certificate.serial.unwrap().to_string());
    let again = ask(asked).send().await.expect(201);
    assert_eq!((&again.body, again.header("location")), (&signed.body, signed.header("location")));
    let mut conn = api.db.pool().acquire().await.unwrap();
    let found = credential::registration(&mut conn, &certificate, TimeDelta::zero(), api.now()).await.unwrap();
    assert!(found.unwrap().holder.is_some());
    let listed = api.get(certificates).await.expect(200).body;
    assert_eq!(listed["items"].as_array().unwrap().len(), 1, "no token is among them");
    let shown = &listed["items"][0];
    assert_eq!((&shown["id"], &shown["not_after"]), (&signed.body["id"], &signed.body["not_after"]));
    assert_eq!((&shown["valid"], &shown["first_used_at"]), (&json!(true), &json!("2025-11-21T12:00:00.000Z")));
    let credentials = api.get("/api/v1/devices/d/credentials").await.expect(200);
    assert!(credentials.ids().contains(&signed.body["id"].as_str().unwrap()));
    api.post(certificates, json!({"csr_pem": csr()})).await.expect(201);
    api.post(certificates, json!({"csr_pem": csr()})).await.problem(409, "too-many-credentials");
}

#[tokio::test]
async fn what_is_no_signing_request_is_refused() {
    let mut setup = Setup::default();
    setup.config.certificates.max_csr_bytes = 1000;
    let api = Api::with(setup).await;
    api.enrol("d").await;
    built_in(&api, "Oslo").await;
    let large = named(&"x".repeat(2000)).serialize_request(&KeyPair::generate().unwrap()).unwrap().pem().unwrap();
    let sign = |body: Value| api.post("/api/v1/devices/d/certificates", body);
    for bad in ["", "hello", &large, &Foreign::new().sign(&named("x")), &KeyPair::generate().unwrap().serialize_pem()] {
        let refused = sign(json!({"csr_pem": bad})).await.problem(400, "invalid");
        assert_eq!(refused.body["errors"][0]["field"], "csr_pem", "{}", refused.text);
    }
    for bad in [json!({"csr_pem": csr(), "lifetime_s": 0}), json!({"csr_pem": csr(), "subject": "CN=me"}), json!({})] {
        sign(bad).await.problem(400, "invalid");
    }
    let unknown = format!("aut_{:032x}", 7);
    sign(json!({"csr_pem": csr(), "authority": unknown})).await.problem(404, "no-such-authority");
    let nobody = api.post("/api/v1/devices/nobody/certificates", json!({"csr_pem": csr()})).await;
    nobody.problem(404, "no-such-device");
}

#[tokio::test]
async fn a_revocation_list_is_for_everybody_and_has_what_was_revoked() {
    let api = Api::start().await;
    api.enrol("d").await;
    let authority = built_in(&api, "Oslo").await;
    let signed = api.post("/api/v1/devices/d/certificates", json!({"csr_pem": csr()})).await.expect(201).body;
    let crl = format!("{}/crl", path(&authority));
    let first = api.anonymous("GET", &crl).send().await.expect(200);
    assert_eq!((first.header("content-type"), first.header("etag")), ("application/pkix-crl", "\"01\""));
    api.anonymous("GET", &crl).header("if-none-match", "\"01\"").send().await.expect(304);
    let credential = format!("/api/v1/devices/d/credentials/{}", signed["id"].as_str().unwrap());
    api.ask("DELETE", &format!("{credential}?reason=because")).send().await.problem(400, "invalid");
    api.ask("DELETE", &format!("{credential}?reason=key-compromise")).send().await.expect(204);
    let second = api.anonymous("GET", &format!("{crl}?format=pem")).send().await.expect(200);
    assert_eq!((second.header("content-type"), second.header("etag")), ("application/x-pem-file", "\"02-pem\""));
    assert!(second.text.starts_with("-----BEGIN X509 CRL-----"));
    assert_eq!(api.get(&path(&authority)).await.body["crl_number"], "02");
    for bad in ["?format=xml", "?x=1"] {
        api.anonymous("GET", &format!("{crl}{bad}")).send().await.problem(400, "invalid");
    }
    let unknown = format!("{AUTHORITIES}/aut_{:032x}/crl", 7);
    api.anonymous("GET", &unknown).send().await.problem(404, "no-such-authority");
    api.ask("PUT", &crl).json(&json!({"crl_pem": second.text})).send().await.problem(409, "cannot-sign");
}

#[tokio::test]
async fn a_renewal_may_be_allowed_early() {
    let api = Api::start().await;
    let enrolled = api.enrol("d").await;
    built_in(&api, "Oslo").await;
    let signed = api.post("/api/v1/devices/d/certificates", json!({"csr_pem": csr()})).await.expect(201).body;
    let allow = |id: &Value| format!("/api/v1/devices/d/certificates/{}/allow-renewal", id.as_str().unwrap());
    api.ask("POST", &allow(&signed["id"])).send().await.expect(204);
    let listed = api.get("/api/v1/devices/d/certificates").await.body;
    assert_eq!(listed["items"][0]["renew_after"], "2025-11-21T12:00:00.000Z");
    api.ask("POST", &allow(&enrolled["credential"]["id"])).send().await.problem(404, "no-such-credential");
}

#[tokio::test]
async fn who_may_issue_does_not_manage_authorities() {
    let api = Api::start().await;
    let authority = built_in(&api, "Oslo").await;
    api.post("/api/v1/roles", json!({"id": "issuer", "permissions": ["credentials:manage"], "topic_rules": []}))
        .await
        .expect(201);
    let (_, token) = api.user("issuer@example.com", "issuer").await;
    let path = path(&authority);
    api.as_who(&token, "GET", AUTHORITIES).send().await.expect(200);
    for (method, path) in [
        ("POST", AUTHORITIES),
        ("POST", "/api/v1/authorities/nonce"),
        ("PATCH", &path),
        ("DELETE", &path),
        ("PUT", &format!("{path}/crl")),
        ("GET", &format!("{path}/csr")),
        ("PUT", &format!("{path}/certificate")),
    ] {
        api.as_who(&token, method, path).json(&json!({})).send().await.problem(403, "forbidden");
    }
}

#[tokio::test]
async fn a_built_in_authority_is_placed_below_another() {
    let api = Api::start().await;
    api.enrol("d").await;
    let (authority, root) = (built_in(&api, "Oslo").await, Foreign::new());
    let path = path(&authority);
    let csr_pem = api.get(&format!("{path}/csr")).await.expect(200).body["csr_pem"].as_str().unwrap().to_owned();
    let request = rcgen::CertificateSigningRequestParams::from_pem(&csr_pem).unwrap();
    let certificate = request.signed_by(&Issuer::from_params(&root.params, &root.key)).unwrap().pem();
    let chain = root.params.self_signed(&root.key).unwrap().pem();
    let place = |chain: &str| {
        let body = json!({"certificate_pem": certificate, "chain_pem": chain});
        api.ask("PUT", &format!("{path}/certificate")).header("if-match", "\"1\"").json(&body)
    };
    place("").send().await.problem(400, "invalid");
    let placed = place(&chain).send().await.expect(200);
    assert_eq!((&placed.body["certificate_pem"], &placed.body["chain_pem"]), (&json!(certificate), &json!(chain)));
    assert_eq!(api.get("/api/v1/audit").await.expect(200).body["items"][0]["action"], "authority.place");
    place(&chain).send().await.problem(412, "version-mismatch");
    let signed = api.post("/api/v1/devices/d/certificates", json!({"csr_pem": csr()})).await.expect(201).body;
    assert_eq!(signed["chain_pem"], format!("{certificate}{chain}"));
    let registered = root.register(&api).await;
    api.get(&format!("/api/v1/authorities/{}/csr", registered["id"].as_str().unwrap()))
        .await
        .problem(409, "cannot-sign");
}
