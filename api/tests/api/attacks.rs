//! What attackers send to the HTTP door: forged tokens, paths and JSON with a twist, headers that other servers believe.
//!
//! Routes, parameters and members are taken from the document, so what is added is attacked too, with a token and without. Guessing passwords is in
//! [`crate::login`], stolen refresh tokens and pages of other sites in [`crate::login_sessions`], names of other tenants in
//! [`crate::strangers`].

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fleet_core::id::UserId;
use fleet_core::login_session::{self, Method, Origin};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::harness::{Api, NOON_MS, Reply, Setup, escaped};
use crate::strangers::{texts, with};
use crate::tenants::{self, Main};

const ME: &str = "/api/v1/me";

/// The key that signs tokens: its name, its private half, and its public half as strangers are shown it.
async fn key(api: &Api) -> (String, EncodingKey, String) {
    let query = sqlx::query_as("select kid, pkcs8 from signing_key");
    let (kid, pkcs8): (String, Vec<u8>) = query.fetch_one(api.db.pool()).await.unwrap();
    let shown = api.anonymous("GET", "/.well-known/jwks.json").send().await.expect(200);
    (kid, EncodingKey::from_ed_der(&pkcs8), shown.body["keys"][0]["x"].as_str().unwrap().to_owned())
}

/// What a token of this user says, by a login of theirs.
async fn claims(api: &Api, user: UserId) -> Value {
    let auth = Setup::default().config.auth;
    let mut db = api.db.pool().acquire().await.unwrap();
    let login = login_session::begin(&mut db, user, Method::Password, &Origin::default(), &auth, api.now()).await;
    let now = NOON_MS / 1000;
    json!({ "iss": "muster", "aud": "muster", "sub": user, "sid": login.unwrap().0.id, "iat": now, "exp": now + 900 })
}

fn encoded(header: &Value, claims: &Value, signature: &[u8]) -> String {
    let [header, claims] = [header, claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    format!("{header}.{claims}.{}", URL_SAFE_NO_PAD.encode(signature))
}

async fn refused(api: &Api, token: &str, why: &str) {
    let reply = api.as_who(token, "GET", ME).send().await;
    assert_eq!((reply.status.as_u16(), &reply.body["type"]), (401, &json!("urn:muster:problem:bad-token")), "{why}");
}

#[tokio::test]
async fn a_token_that_somebody_else_made_opens_nothing() {
    let api = Api::start().await;
    let (kid, _, public) = key(&api).await;
    let claims = claims(&api, api.admin).await;
    for alg in ["none", "None", "NONE", "nOnE", "", "EdDSA", "Ed25519"] {
        let header = json!({ "alg": alg, "typ": "JWT", "kid": kid });
        for signature in [&b""[..], &[0; 64], &[255; 64]] {
            refused(&api, &encoded(&header, &claims, signature), alg).await;
        }
    }
    // The public key as the secret of a symmetric signature, in each form that it is found in.
    let decoded = URL_SAFE_NO_PAD.decode(&public).unwrap();
    for secret in [decoded.as_slice(), public.as_bytes(), kid.as_bytes(), b""] {
        for algorithm in [Algorithm::HS256, Algorithm::HS384, Algorithm::HS512] {
            let header = Header { kid: Some(kid.clone()), ..Header::new(algorithm) };
            let token = jsonwebtoken::encode(&header, &claims, &EncodingKey::from_secret(secret)).unwrap();
            refused(&api, &token, "HS").await;
        }
    }
}

#[tokio::test]
async fn the_header_of_a_token_chooses_no_key_but_one_of_ours() {
    let api = Api::start().await;
    let (kid, _, _) = key(&api).await;
    let claims = claims(&api, api.admin).await;
    let own = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
    let x = URL_SAFE_NO_PAD.encode(own.public_key_raw());
    let jwk = json!({ "kty": "OKP", "crv": "Ed25519", "kid": kid, "x": x });
    for (field, value) in [
        ("jwk", jwk),
        ("jku", json!("https://attacker.example/jwks.json")),
        ("x5u", json!("https://attacker.example/key.pem")),
        ("kid", json!("../../../../dev/null")),
        ("kid", json!("/dev/null")),
        ("kid", json!("' or 1=1 --")),
        ("kid", json!("\u{0}")),
        ("kid", json!("")),
        ("kid", json!("x".repeat(3000))),
        ("kid", json!([kid])),
        ("kid", Value::Null),
    ] {
        let mut header = json!({ "alg": "EdDSA", "typ": "JWT", "kid": kid });
        header[field] = value;
        let unsigned = encoded(&header, &claims, b"");
        let (message, _) = unsigned.rsplit_once('.').unwrap();
        let signature = rcgen::SigningKey::sign(&own, message.as_bytes()).unwrap();
        refused(&api, &format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature)), &header.to_string()).await;
    }
}

#[tokio::test]
async fn claims_that_are_out_of_order_open_nothing_though_our_key_signed_them() {
    let api = Api::start().await;
    let (kid, private, _) = key(&api).await;
    let right = claims(&api, api.admin).await;
    let header = Header { kid: Some(kid), ..Header::new(Algorithm::EdDSA) };
    let signed = |claims: &Value| jsonwebtoken::encode(&header, claims, &private).unwrap();
    api.as_who(&signed(&right), "GET", ME).send().await.expect(200);
    let (ada, _) = api.user("ada@example.com", "viewer").await;
    let of_ada = claims(&api, ada).await;
    let now = NOON_MS / 1000;
    for (claim, value) in [
        // One's own login does not carry somebody else.
        ("sid", of_ada["sid"].clone()),
        ("sid", json!("lgn_00000000000000000000000000000000")),
        ("sid", Value::Null),
        ("sub", json!(ada)),
        ("sub", json!(UserId::new())),
        ("sub", json!("admin@example.com")),
        ("exp", json!(now)),
        ("exp", json!(now - 1)),
        ("exp", json!(-1)),
        ("exp", json!(i64::MAX)),
        ("exp", json!("never")),
        ("exp", Value::Null),
        ("iat", json!(i64::MIN)),
        ("iss", json!("somebody else")),
        ("iss", Value::Null),
        ("aud", json!("somebody else")),
        ("aud", json!([])),
        ("aud", Value::Null),
        // To look as somebody else is for who may manage them.
        ("act", json!(ada)),
    ] {
        let mut claims = right.clone();
        if value.is_null() {
            claims.as_object_mut().unwrap().remove(claim);
        } else {
            claims[claim] = value;
        }
        refused(&api, &signed(&claims), &claims.to_string()).await;
    }
}

#[tokio::test]
async fn a_cookie_or_a_token_in_another_place_opens_no_route() {
    let main = Main::with_one_of_each().await;
    let token = main.api.token_of(main.api.admin).await;
    for (method, pattern, _) in tenants::routes() {
        let (path, _) = main.filled(&pattern);
        for (header, value) in [
            ("cookie", format!("muster_refresh={token}; __Host-muster_refresh={token}; access_token={token}")),
            ("authorization", format!("Token {token}")),
            ("authorization", format!("Bearer{token}")),
            ("x-access-token", token.clone()),
            ("x-forwarded-user", main.api.admin.to_string()),
        ] {
            main.api.anonymous(&method, &path).header(header, &value).send().await.problem(401, "no-token");
        }
        let asked = format!("{path}?access_token={token}");
        main.api.anonymous(&method, &asked).send().await.problem(401, "no-token");
        if method == "GET" {
            assert_eq!(main.api.anonymous("HEAD", &path).send().await.status.as_u16(), 401, "HEAD {path}");
        }
    }
}

/// Neither done, nor an error of the server.
#[track_caller]
fn is_refused(reply: &Reply, what: &str) {
    let status = reply.status.as_u16();
    // Without a broker there is nobody to ask about connections.
    assert!(
        (400..500).contains(&status) || reply.body["type"] == "urn:muster:problem:no-broker",
        "{what}: {}",
        reply.text
    );
    assert_eq!(reply.header("content-type"), "application/problem+json", "{what}: {}", reply.text);
}

#[tokio::test]
async fn an_id_with_a_twist_names_nothing() {
    let main = Main::with_one_of_each().await;
    let twists = [
        "..",
        ".",
        "%2e%2e",
        "%2E%2E%2F",
        "..%2f..%2fusers",
        "%00",
        "boiler-1%00",
        "%ff",
        "%C0%AE%C0%AE",
        "boiler-1;v=1",
        "boiler-1.",
        "boiler-1%20",
        "%20boiler-1",
        "BOILER-1",
        "boiler-1%2f",
        "boiler-1%5c..",
        "bo%D1%96ler-1",
        "boiler%E2%80%901",
        "%F0%9F%92%A9",
        "*",
        "%25",
        "%2525",
        "-1",
        "99999999999999999999",
        "usr_",
        "null",
        "undefined",
        "%27%20or%201=1--",
        "%3Cscript%3E",
    ];
    let long = ["x".repeat(65), "x".repeat(8000), "%41".repeat(500)];
    for (method, pattern, _) in tenants::routes() {
        let (path, _) = main.filled(&pattern);
        let wild = pattern.split('/').enumerate().filter(|(_, segment)| segment.starts_with('{')).map(|(at, _)| at);
        for at in wild {
            for twist in twists.into_iter().chain(long.iter().map(String::as_str)) {
                let segments =
                    path.split('/').enumerate().map(|(place, segment)| if place == at { twist } else { segment });
                let twisted = segments.collect::<Vec<_>>().join("/");
                let token = main.api.token();
                let reply =
                    tenants::ask(&main, token, &method, &twisted, &tenants::body(&method, &pattern)).send().await;
                is_refused(&reply, &format!("{method} {twisted}"));
            }
        }
    }
}

#[tokio::test]
async fn a_path_with_a_twist_is_no_way_around_the_door() {
    let api = Api::start().await;
    let (_, nobody) = api.nobody().await;
    for path in [
        "//api/v1/devices",
        "/api//v1/devices",
        "/api/v1//devices",
        "/api/v1/devices/",
        "/api/v1/devices//",
        "/API/v1/devices",
        "/api/v1/Devices",
        "/api/V1/devices",
        "/api/v1/devices;a=b",
        "/api/v1;a=b/devices",
        "/api/v1/./devices",
        "/api/v1/x/../devices",
        "/api/v1/devices/..",
        "/api/v1/devices%2f",
        "/api/v1%2fdevices",
        "/%61pi/v1/devices",
        "/api/v1/devices%00",
        "/api/v1/devices%20",
        "/api/v1/devices.json",
        "/api/v1/devices?/healthz",
        "/healthz/../api/v1/devices",
        "/healthz/api/v1/devices",
        "/docs/../api/v1/devices",
        "/docs/%2e%2e/api/v1/devices",
        "/docs/..%2f..%2fCargo.toml",
        "/docs//etc/passwd",
        "/api/v1/devices%5c..%5cusers",
    ] {
        for method in ["GET", "POST", "HEAD", "OPTIONS", "TRACE"] {
            for reply in [
                api.anonymous(method, path).send().await,
                api.as_who(&nobody, method, path).json(&json!({})).send().await,
            ] {
                assert!(reply.status.is_client_error(), "{method} {path}: {} {}", reply.status, reply.text);
            }
        }
    }
}

#[tokio::test]
async fn headers_that_other_servers_believe_change_nothing() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    let path = "/api/v1/devices/boiler-1";
    for name in ["x-http-method-override", "x-http-method", "x-method-override"] {
        api.ask("GET", path).header(name, "DELETE").send().await.expect(200);
        api.ask("POST", path).header(name, "DELETE").send().await.problem(405, "method-not-allowed");
    }
    api.ask("GET", &format!("{path}?_method=DELETE")).send().await;
    api.get(path).await.expect(200);
    for name in ["x-original-url", "x-rewrite-url", "x-forwarded-path", "x-forwarded-prefix"] {
        let reply = api.anonymous("GET", "/healthz").header(name, path).send().await.expect(200);
        assert!(!reply.text.contains("boiler-1"));
        api.anonymous("GET", path).header(name, "/healthz").send().await.problem(401, "no-token");
    }
    // Who speaks for nobody else is written down as who they are, and links lead nowhere else.
    let reset = format!("/api/v1/users/{}/password-reset", api.admin);
    let ask = api.ask("POST", &reset).from("192.0.2.1");
    let ask = ["x-forwarded-for", "x-real-ip", "x-client-ip", "true-client-ip", "cf-connecting-ip"]
        .into_iter()
        .fold(ask, |ask, name| ask.header(name, "198.51.100.7"));
    let ask = ask.header("forwarded", "for=198.51.100.7;host=attacker.example");
    let link = ask.header("x-forwarded-host", "attacker.example").send().await.expect(201);
    assert!(!link.text.contains("attacker.example"), "{}", link.text);
    let entry = api.get("/api/v1/audit?limit=1").await.expect(200);
    assert_eq!(entry.body["items"][0]["address"], "192.0.2.1");
}

/// Method, path and body schema of every route that takes a JSON object, in a tenant that has one of each.
fn with_bodies(main: &Main) -> Vec<(String, String, String, Value)> {
    let document: Value = serde_json::from_str(&api::openapi_json()).unwrap();
    let taking = tenants::routes().into_iter().filter_map(|(method, pattern, _)| {
        let content = &document["paths"][&pattern][method.to_lowercase()]["requestBody"]["content"];
        let schema = content.as_object()?.iter().find(|(kind, _)| kind.contains("json"))?.1["schema"].clone();
        let path = main.filled(&pattern).0;
        // The protocol wants unknown members to be passed over; `any_bytes_are_read_or_refused` attacks that one.
        if pattern == "/v1/logs" {
            return None;
        }
        (schema["type"] != "array").then_some((method, pattern, path, schema))
    });
    taking.collect()
}

/// Bodies that are no JSON object, or one that no two readers need understand alike.
fn twists() -> Vec<Vec<u8>> {
    let nested = |open: &str, close: &str| format!("{{\"x\":{}{}}}", open.repeat(5000), close.repeat(5000));
    vec![
        b"".into(),
        b"null".into(),
        b"[]".into(),
        b"[{}]".into(),
        b"1".into(),
        b"\"{}\"".into(),
        b"{".into(),
        b"{}}".into(),
        b"{} {}".into(),
        b"{,}".into(),
        b"{'a':1}".into(),
        b"{\"tenant\":\"main\"}".into(),
        b"{\"tenant_key\":1}".into(),
        b"{\"__proto__\":{\"platform\":true}}".into(),
        b"{\"x\":1e999}".into(),
        b"{\"x\":NaN}".into(),
        b"{\"x\":\"\xff\xfe\"}".into(),
        b"{\"x\":\"\\ud800\"}".into(),
        b"{\"\\u0000\":1}".into(),
        b"\xef\xbb\xbf{}".into(),
        b"{}\x00".into(),
        b"{\"x\":/**/1}".into(),
        nested("[", "]").into_bytes(),
        nested("{\"x\":", "}").replace(":}", ":1}").into_bytes(),
    ]
}

#[tokio::test]
async fn json_with_a_twist_is_refused_by_every_route() {
    let main = Main::with_one_of_each().await;
    let before = main.rows().await;
    for (method, pattern, path, schema) in with_bodies(&main) {
        let kind = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
        let optional = schema["oneOf"].is_array();
        for twist in &twists() {
            // No body at all, where one may be left out, is none with a twist.
            if twist.is_empty() && optional {
                continue;
            }
            let reply = main.api.ask(&method, &path).raw(kind, twist.clone()).send().await;
            is_refused(
                &reply,
                &format!("{method} {pattern} {}", String::from_utf8_lossy(&twist[..twist.len().min(40)])),
            );
        }
        for kind in [
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonx",
            "",
        ] {
            let reply = main.api.ask(&method, &path).raw(kind, r#"{"x":1}"#).send().await;
            is_refused(&reply, &format!("{method} {pattern} as {kind}"));
        }
        // The same member twice: whoever reads the first and whoever reads the last would read different things.
        if let Some(member) =
            tenants::body(&method, &pattern).as_object().and_then(|members| members.keys().next().cloned())
        {
            let value = &tenants::body(&method, &pattern)[&member];
            let twice = format!("{{\"{member}\":{value},\"{member}\":{value}}}");
            let reply = main.api.ask(&method, &path).raw(kind, twice).send().await;
            is_refused(&reply, &format!("{method} {pattern} with {member} twice"));
        }
    }
    assert_eq!(main.rows().await, before, "something was changed all the same");
}

/// Values that nobody expects.
fn nasty() -> Vec<Value> {
    vec![
        json!("\u{0}"),
        json!("a\u{0}b"),
        json!("\u{202e}\u{feff}\u{10ffff}"),
        json!("x".repeat(20_000)),
        json!("'; drop table device; --"),
        json!("%s%n{0}${jndi:ldap://x}"),
        json!("../../etc/passwd"),
        json!(""),
        json!(-1),
        json!(u64::MAX),
        json!(1e308),
        json!([]),
        json!({}),
        Value::Null,
    ]
}

#[tokio::test]
async fn no_value_of_any_member_is_an_error_of_the_server() {
    let main = Main::with_one_of_each().await;
    let document: Value = serde_json::from_str(&api::openapi_json()).unwrap();
    let mut tried = 0;
    for (method, pattern, path, schema) in with_bodies(&main) {
        let mut members = Vec::new();
        texts(&document, &schema, &[], &mut members);
        for member in members {
            for value in nasty() {
                let body = with(&tenants::body(&method, &pattern), &member, value.clone());
                let reply = tenants::ask(&main, main.api.token(), &method, &path, &body).send().await;
                let is_away = reply.body["type"] == "urn:muster:problem:no-broker";
                assert!(
                    reply.status.as_u16() < 500 || is_away,
                    "{method} {pattern} {}: {value}: {}",
                    member.join("."),
                    reply.text
                );
                tried += 1;
            }
        }
    }
    assert!(tried > 500, "only {tried} values were tried");
    main.api.get("/api/v1/devices/boiler-1").await.expect(200);
}

#[tokio::test]
async fn no_value_of_any_parameter_is_an_error_of_the_server() {
    let main = Main::with_one_of_each().await;
    let raw = [
        "%00",
        "%ff",
        "%",
        "%zz",
        "+",
        "&&",
        "=",
        "1e9",
        "-1",
        "99999999999999999999999",
        "0x10",
        "1,2",
        "2025-13-45T99:99:99Z",
    ];
    for (method, pattern, parameters) in tenants::routes() {
        let (path, _) = main.filled(&pattern);
        for parameter in parameters.iter().filter(|_| method == "GET") {
            let texts =
                nasty().into_iter().filter_map(|value| Some(escaped(value.as_str()?))).filter(|text| text.len() < 9000);
            for value in raw.iter().map(|&raw| raw.to_owned()).chain(texts) {
                let asked = format!("{path}?{parameter}={value}");
                let reply = main.api.get(&asked).await;
                let is_away = reply.body["type"] == "urn:muster:problem:no-broker";
                assert!(reply.status.as_u16() < 500 || is_away, "{asked}: {}", reply.text);
            }
            let twice = format!("{path}?{parameter}=a&{parameter}=b&tenant=main");
            is_refused(&main.api.get(&twice).await, &twice);
        }
    }
}

/// What anybody may call: method, path, parameters of the query, and the schema of the body.
fn open_routes() -> Vec<(String, String, Vec<String>, Value)> {
    let document: Value = serde_json::from_str(&api::openapi_json()).unwrap();
    let guarded = tenants::routes();
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let method = method.to_uppercase();
            if guarded.iter().any(|(known, pattern, _)| (known, pattern) == (&method, path)) {
                continue;
            }
            let parameters = operation["parameters"].as_array().cloned().unwrap_or_default();
            let asked = parameters.iter().filter(|parameter| parameter["in"] == "query");
            let asked = asked.map(|parameter| parameter["name"].as_str().unwrap().to_owned()).collect();
            let schema = operation["requestBody"]["content"]["application/json"]["schema"].clone();
            routes.push((method, path.clone(), asked, schema));
        }
    }
    routes
}

#[tokio::test]
async fn what_anybody_may_call_takes_no_twist_either() {
    let main = Main::with_one_of_each().await;
    let claim = json!({ "name": "c", "approval": "manual", "max_devices": 1, "expires_in_s": 3600 });
    let secret = main.api.post("/api/v1/claims", claim).await.expect(201).body["secret"].as_str().unwrap().to_owned();
    let document: Value = serde_json::from_str(&api::openapi_json()).unwrap();
    let mut tried = 0_u32;
    for (method, path, _, schema) in open_routes().into_iter().filter(|route| !route.3.is_null()) {
        let mut members = Vec::new();
        texts(&document, &schema, &[], &mut members);
        let nasty = members.iter().flat_map(|member| nasty().into_iter().map(|value| with(&json!({}), member, value)));
        for body in twists().into_iter().chain(nasty.map(|body| body.to_string().into_bytes())) {
            tried += 1;
            // Each from an address of its own: else one would soon have to wait.
            let address = std::net::Ipv4Addr::from(0x0a00_0000 + tried).to_string();
            let told = format!("{method} {path} {}", String::from_utf8_lossy(&body[..body.len().min(60)]));
            let ask = main.api.as_who(&secret, &method, &path).from(&address);
            is_refused(&ask.raw("application/json", body).send().await, &told);
        }
    }
    assert!(tried > 100, "only {tried} bodies were tried");
}

#[tokio::test]
async fn no_parameter_of_what_anybody_may_call_is_an_error_of_the_server() {
    let main = Main::with_one_of_each().await;
    let mut tried = 0;
    for (method, pattern, parameters, _) in open_routes() {
        let (path, _) = main.filled(&pattern);
        for parameter in &parameters {
            let texts = nasty().into_iter().filter_map(|value| Some(escaped(value.as_str()?)));
            for value in texts.filter(|text| text.len() < 9000).chain(["%00", "%ff", "%", "&&"].map(str::to_owned)) {
                let reply = main.api.anonymous(&method, &format!("{path}?{parameter}={value}")).send().await;
                assert!(reply.status.as_u16() < 500, "{method} {path}?{parameter}={value}: {}", reply.text);
                tried += 1;
            }
        }
    }
    assert!(tried > 10, "only {tried} values were tried");
}
