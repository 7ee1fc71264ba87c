//! Logins by an `OpenID` provider: the whole way there and back, and what is refused on it. The provider of these tests
//! signs whatever it is told to; a real one is asked in the journeys.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::response::IntoResponse;
use axum::routing::{get, post};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::TimeDelta;
use fleet_core::config::{Oidc, OidcRole, Secret};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use rcgen::KeyPair;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::harness::{Api, EMAIL, NOON_MS, Reply, Setup, escaped};

const LOGIN: &str = "/api/v1/auth/oidc/login";
const CALLBACK: &str = "/api/v1/auth/oidc/callback";
const CLIENT: &str = "muster-tests";
const CLIENT_SECRET: &str = "a secret of the client, long enough for HS256";
const COOKIE: &str = "muster_oidc";

/// What an ID token is like.
#[derive(Clone, Copy)]
enum Forgery {
    None,
    Unsigned,
    HmacByClientSecret,
    HmacByPublicKey,
    ForeignKey,
    BitFlipped,
    Claim(&'static str, fn() -> Value),
    NoToken,
}

/// A provider.
#[derive(Clone)]
struct Provider {
    url: String,
    state: Arc<Mutex<Inside>>,
}

struct Inside {
    key: Arc<KeyPair>,
    kid: String,
    claims: Value,
    info: Value,
    forgery: Forgery,
    codes: HashMap<String, Sent>,
}

/// What came with a browser.
struct Sent {
    nonce: String,
    challenge: String,
    callback: String,
}

impl Provider {
    async fn start() -> Self {
        // Another test of this process may have been first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let inside = Inside {
            key: Arc::new(KeyPair::generate().unwrap()),
            kid: "first".into(),
            claims: json!({ "sub": "ada", "email": "ada@example.com", "email_verified": true, "groups": ["staff"] }),
            info: json!({ "sub": "ada" }),
            forgery: Forgery::None,
            codes: HashMap::new(),
        };
        let provider = Self { url, state: Arc::new(Mutex::new(inside)) };
        let routes = Router::new()
            .route("/.well-known/openid-configuration", get(configuration))
            .route("/jwks", get(keys))
            .route("/token", post(tokens))
            .route("/userinfo", get(info))
            .with_state(provider.clone());
        tokio::spawn(async move { axum::serve(listener, routes).await });
        provider
    }

    fn set(&self, change: impl FnOnce(&mut Inside)) {
        change(&mut self.state.lock().unwrap());
    }

    fn claim(&self, name: &str, value: Value) {
        self.set(|inside| inside.claims[name] = value);
    }

    /// Somebody logs in there: the code, and the state that comes back.
    fn login(&self, location: &str) -> (String, String) {
        let (page, query) = location.split_once('?').unwrap();
        assert_eq!(page, format!("{}/authorize", self.url));
        let query: HashMap<String, String> = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        for (name, value) in [("response_type", "code"), ("client_id", CLIENT), ("code_challenge_method", "S256")] {
            assert_eq!(query[name], value);
        }
        assert_eq!(query["scope"], "openid email profile");
        let code = format!("code-{}", self.state.lock().unwrap().codes.len());
        let sent = Sent {
            nonce: query["nonce"].clone(),
            challenge: query["code_challenge"].clone(),
            callback: query["redirect_uri"].clone(),
        };
        self.set(|inside| drop(inside.codes.insert(code.clone(), sent)));
        (code, query["state"].clone())
    }
}

async fn configuration(State(provider): State<Provider>) -> impl IntoResponse {
    let url = &provider.url;
    let configuration = json!({
        "issuer": url, "authorization_endpoint": format!("{url}/authorize"), "token_endpoint": format!("{url}/token"),
        "jwks_uri": format!("{url}/jwks"), "userinfo_endpoint": format!("{url}/userinfo"),
        "response_types_supported": ["code"], "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": ["ES256", "HS256", "none"],
    });
    ([("content-type", "application/json")], configuration.to_string())
}

async fn keys(State(provider): State<Provider>) -> impl IntoResponse {
    let inside = provider.state.lock().unwrap();
    let point = inside.key.public_key_raw();
    let [x, y] = [&point[1..33], &point[33..]].map(|part| URL_SAFE_NO_PAD.encode(part));
    let key = json!({ "kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": inside.kid, "x": x, "y": y });
    ([("content-type", "application/json")], json!({ "keys": [key] }).to_string())
}

async fn info(State(provider): State<Provider>) -> impl IntoResponse {
    let info = provider.state.lock().unwrap().info.to_string();
    ([("content-type", "application/json")], info)
}

async fn tokens(State(provider): State<Provider>, body: String) -> impl IntoResponse {
    let form: HashMap<String, String> = form_urlencoded::parse(body.as_bytes()).into_owned().collect();
    let mut inside = provider.state.lock().unwrap();
    let sent = inside.codes.remove(&form["code"]);
    let fits = |sent: &Sent| {
        sent.challenge == URL_SAFE_NO_PAD.encode(Sha256::digest(&form["code_verifier"]))
            && sent.callback == form["redirect_uri"]
    };
    let kind = [("content-type", "application/json")];
    let Some(sent) = sent.filter(fits) else {
        return (axum::http::StatusCode::BAD_REQUEST, kind, json!({ "error": "invalid_grant" }).to_string());
    };
    let mut answer = json!({ "access_token": "x", "token_type": "Bearer", "expires_in": 60 });
    if !matches!(inside.forgery, Forgery::NoToken) {
        answer["id_token"] = json!(id_token(&provider.url, &inside, &sent));
    }
    (axum::http::StatusCode::OK, kind, answer.to_string())
}

fn id_token(issuer: &str, inside: &Inside, sent: &Sent) -> String {
    let mut claims = json!({
        "iss": issuer, "aud": CLIENT, "iat": NOON_MS / 1000, "exp": NOON_MS / 1000 + 300, "nonce": sent.nonce,
    });
    let more = inside.claims.as_object().unwrap().clone();
    claims.as_object_mut().unwrap().extend(more);
    let header = |algorithm| Header { kid: Some(inside.kid.clone()), ..Header::new(algorithm) };
    let sign = |header: &Header, claims: &Value, key: &EncodingKey| jsonwebtoken::encode(header, claims, key).unwrap();
    let own = EncodingKey::from_ec_der(&inside.key.serialize_der());
    match inside.forgery {
        Forgery::None | Forgery::NoToken => sign(&header(Algorithm::ES256), &claims, &own),
        Forgery::Unsigned => {
            let [header, claims] =
                [json!({ "alg": "none" }), claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
            format!("{header}.{claims}.")
        }
        Forgery::HmacByClientSecret => {
            sign(&header(Algorithm::HS256), &claims, &EncodingKey::from_secret(CLIENT_SECRET.as_bytes()))
        }
        Forgery::HmacByPublicKey => {
            let public = inside.key.public_key_pem();
            sign(&header(Algorithm::HS256), &claims, &EncodingKey::from_secret(public.as_bytes()))
        }
        Forgery::ForeignKey => {
            let foreign = KeyPair::generate().unwrap();
            sign(&header(Algorithm::ES256), &claims, &EncodingKey::from_ec_der(&foreign.serialize_der()))
        }
        Forgery::BitFlipped => {
            let token = sign(&header(Algorithm::ES256), &claims, &own);
            let [header, _, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("{token}") };
            claims["sub"] = json!("somebody else");
            format!("{header}.{}.{signature}", URL_SAFE_NO_PAD.encode(claims.to_string()))
        }
        Forgery::Claim(name, value) => {
            claims[name] = value();
            sign(&header(Algorithm::ES256), &claims, &own)
        }
    }
}

struct Scene {
    api: Api,
    provider: Provider,
}

impl Scene {
    async fn new(change: impl FnOnce(&mut Oidc)) -> Self {
        let provider = Provider::start().await;
        let mut setup = Setup::default();
        let oidc = &mut setup.config.oidc;
        oidc.issuer.clone_from(&provider.url);
        oidc.client_id = CLIENT.into();
        oidc.client_secret = Secret::from(CLIENT_SECRET.to_owned());
        oidc.roles = [("fleet-admins", "admin"), ("staff", "viewer")]
            .map(|(value, role)| OidcRole { value: value.into(), role: role.into() })
            .to_vec();
        change(oidc);
        Self { api: Api::with(setup).await, provider }
    }

    async fn creating() -> Self {
        Self::new(|oidc| oidc.auto_create = true).await
    }

    /// To the provider: its page, and the cookie of the browser.
    async fn leave(&self) -> (String, String) {
        let sent = self.api.anonymous("GET", LOGIN).send().await.expect(303);
        let (cookie, about) = sent.cookie(COOKIE);
        for part in ["HttpOnly", "SameSite=Lax", "Path=/api/v1/auth", "Max-Age=600"] {
            assert!(about.contains(part), "{part} in {about}");
        }
        (sent.header("location").to_owned(), cookie)
    }

    /// Back from it.
    async fn come_back(&self, code: &str, state: &str, cookie: &str) -> Reply {
        let path = format!("{CALLBACK}?code={}&state={}&session_state=x", escaped(code), escaped(state));
        self.api.anonymous("GET", &path).header("cookie", &format!("{COOKIE}={cookie}")).send().await
    }

    async fn login(&self) -> Reply {
        let (location, cookie) = self.leave().await;
        let (code, state) = self.provider.login(&location);
        self.come_back(&code, &state, &cookie).await
    }

    /// Who the browser is now.
    async fn me(&self, came: Reply) -> Value {
        let came = came.expect(303);
        assert_eq!(came.header("location"), "/");
        assert_eq!(came.cookie(COOKIE).0, "", "the cookie of the way is gone");
        let cookie = format!("muster_refresh={}", came.cookie("muster_refresh").0);
        let ask = self.api.anonymous("POST", "/api/v1/auth/refresh").header("cookie", &cookie);
        let token = ask.send().await.expect(200).body["access_token"].as_str().unwrap().to_owned();
        self.api.as_who(&token, "GET", "/api/v1/me").send().await.expect(200).body
    }

    /// What was written down of it, the last first.
    async fn audit(&self) -> Vec<String> {
        let page = self.api.get("/api/v1/audit").await.expect(200).body;
        page["items"].as_array().unwrap().iter().map(|entry| entry["action"].as_str().unwrap().to_owned()).collect()
    }

    async fn users(&self) -> i64 {
        sqlx::query_scalar("select count(*) from app_user").fetch_one(self.api.db.pool()).await.unwrap()
    }
}

#[tokio::test]
async fn who_comes_from_the_provider_is_in_with_the_role_it_gives_today() {
    let scene = Scene::creating().await;
    let methods = scene.api.anonymous("GET", "/api/v1/auth/methods").send().await.expect(200);
    assert_eq!(methods.body, json!({ "password": true, "oidc": true }));
    let me = scene.me(scene.login().await).await;
    assert_eq!(
        (&me["email"], &me["role"], &me["platform"]),
        (&json!("ada@example.com"), &json!("viewer"), &json!(false))
    );
    let sessions = scene.api.get(&format!("/api/v1/users/{}/sessions", me["id"].as_str().unwrap())).await.expect(200);
    assert_eq!(sessions.body["items"][0]["method"], "oidc");
    // The same person with another role and address: the subject is what counts.
    scene.provider.claim("groups", json!(["staff", "fleet-admins"]));
    scene.provider.claim("email", json!("ada.lovelace@example.com"));
    let again = scene.me(scene.login().await).await;
    assert_eq!((&again["id"], &again["role"], &again["email"]), (&me["id"], &json!("admin"), &me["email"]));
    assert_eq!(scene.users().await, 2);
    let actions = scene.audit().await;
    let expected = ["user.log-in", "user.update", "user.log-in", "user.link", "user.create"];
    assert_eq!(actions, expected);
    // There is no password to log in with.
    let body = json!({ "email": "ada@example.com", "password": "" });
    scene.api.anonymous("POST", "/api/v1/auth/login").json(&body).send().await.problem(401, "bad-login");
}

#[tokio::test]
async fn a_way_that_was_not_begun_here_leads_nowhere() {
    let scene = Scene::creating().await;
    let (location, cookie) = scene.leave().await;
    let (code, state) = scene.provider.login(&location);
    let (_, other) = scene.leave().await;
    for (state, cookie) in [("wrong", &cookie), ("", &cookie), (&state, &other), (&state, &String::new())] {
        scene.come_back(&code, state, cookie).await.problem(401, "oidc-refused");
    }
    let path = format!("{CALLBACK}?code={code}&state={state}");
    scene.api.anonymous("GET", &path).send().await.problem(401, "oidc-refused");
    // None of that has used it up.
    scene.me(scene.come_back(&code, &state, &cookie).await).await;
    scene.come_back(&code, &state, &cookie).await.problem(401, "oidc-refused");
    let (location, cookie) = scene.leave().await;
    let (code, state) = scene.provider.login(&location);
    scene.api.pass(TimeDelta::seconds(600));
    scene.come_back(&code, &state, &cookie).await.problem(401, "oidc-refused");
}

#[tokio::test]
async fn a_code_is_worth_nothing_twice_or_on_another_way() {
    let scene = Scene::creating().await;
    let (location, cookie) = scene.leave().await;
    let (code, _) = scene.provider.login(&location);
    let (another, other_cookie) = scene.leave().await;
    let (_, other_state) = scene.provider.login(&another);
    // An attacker's code on a victim's way: PKCE does not fit.
    scene.come_back(&code, &other_state, &other_cookie).await.problem(401, "oidc-refused");
    let (location, _) = scene.leave().await;
    let (_, state) = scene.provider.login(&location);
    scene.come_back("no code of it", &state, &cookie).await.problem(401, "oidc-refused");
    assert_eq!(scene.users().await, 1);
}

#[tokio::test]
async fn an_id_token_that_is_not_the_providers_own_for_us_now_is_refused() {
    let scene = Scene::creating().await;
    for forgery in [
        Forgery::Unsigned,
        Forgery::HmacByClientSecret,
        Forgery::HmacByPublicKey,
        Forgery::ForeignKey,
        Forgery::BitFlipped,
        Forgery::NoToken,
        Forgery::Claim("nonce", || json!("wrong")),
        Forgery::Claim("nonce", || Value::Null),
        Forgery::Claim("aud", || json!("somebody else")),
        Forgery::Claim("aud", || json!([CLIENT, "somebody else"])),
        Forgery::Claim("iss", || json!("https://evil.example")),
        Forgery::Claim("exp", || json!(NOON_MS / 1000 - 1)),
    ] {
        scene.provider.set(|inside| inside.forgery = forgery);
        let refused = scene.login().await.problem(401, "oidc-refused");
        assert!(!refused.headers.contains_key("set-cookie"));
    }
    assert_eq!(scene.users().await, 1);
    assert!(scene.api.metric("muster_logins_failed_total{what=\"oidc\"}").await > 11.5);
    scene.provider.set(|inside| inside.forgery = Forgery::None);
    scene.me(scene.login().await).await;
}

#[tokio::test]
async fn a_new_key_of_the_provider_is_taken_up() {
    let scene = Scene::creating().await;
    scene.me(scene.login().await).await;
    scene.provider.set(|inside| {
        inside.key = Arc::new(KeyPair::generate().unwrap());
        inside.kid = "second".into();
    });
    scene.me(scene.login().await).await;
}

#[tokio::test]
async fn who_has_no_role_there_or_no_account_here_does_not_come_in() {
    let scene = Scene::creating().await;
    for roles in [json!([]), json!(["others"]), json!("others"), json!({ "staff": true }), Value::Null] {
        scene.provider.claim("groups", roles);
        scene.login().await.problem(403, "oidc-no-role");
    }
    scene.provider.claim("groups", json!("staff"));
    scene.provider.claim("email_verified", json!(false));
    scene.login().await.problem(403, "oidc-unverified");
    scene.provider.claim("email", Value::Null);
    scene.login().await.problem(403, "oidc-unverified");
    assert_eq!(scene.users().await, 1);

    let closed = Scene::new(|_| {}).await;
    closed.login().await.problem(403, "oidc-no-account");
    // An account that lost its role there is out, though it was in before.
    let scene = Scene::creating().await;
    let me = scene.me(scene.login().await).await;
    scene.provider.claim("groups", json!([]));
    scene.login().await.problem(403, "oidc-no-role");
    scene.provider.claim("groups", json!(["staff"]));
    sqlx::query("update app_user set disabled = true where email = $1")
        .bind(me["email"].as_str().unwrap())
        .execute(scene.api.db.pool())
        .await
        .unwrap();
    scene.login().await.problem(403, "oidc-no-account");
}

#[tokio::test]
async fn an_account_is_linked_by_its_address_only_where_that_is_wanted() {
    let scene = Scene::creating().await;
    let (ada, _) = scene.api.user("Ada@example.com", "").await;
    scene.login().await.problem(403, "oidc-no-account");
    let linking = Scene::new(|oidc| oidc.link_by_email = true).await;
    let (linked, _) = linking.api.user("Ada@example.com", "").await;
    linking.provider.claim("email_verified", json!(false));
    linking.login().await.problem(403, "oidc-unverified");
    linking.provider.claim("email_verified", json!(true));
    let me = linking.me(linking.login().await).await;
    assert_eq!((&me["id"], &me["role"]), (&json!(linked.to_string()), &json!("viewer")));
    assert_ne!(ada, linked);
    // Who stands above tenants is not for the provider to give away.
    linking.provider.claim("sub", json!("mallory"));
    linking.provider.claim("email", json!(EMAIL));
    linking.provider.claim("groups", json!(["fleet-admins"]));
    linking.login().await.problem(403, "forbidden");
    linking.provider.claim("email", json!("nobody@example.com"));
    linking.login().await.problem(403, "oidc-no-account");
    // Nor are accounts of other tenants.
    sqlx::query("insert into tenant (id, created_at) values ('other', now())")
        .execute(linking.api.db.pool())
        .await
        .unwrap();
    let (stranger, _) = linking.api.user("stranger@example.com", "").await;
    sqlx::query("update app_user set tenant_key = (select key from tenant where id = 'other') where id = $1")
        .bind(stranger.uuid())
        .execute(linking.api.db.pool())
        .await
        .unwrap();
    linking.provider.claim("email", json!("stranger@example.com"));
    linking.login().await.problem(403, "oidc-no-account");
}

#[tokio::test]
async fn an_address_of_another_tenant_makes_no_account_and_is_not_told() {
    let scene = Scene::creating().await;
    sqlx::query("insert into tenant (id, created_at) values ('other', now())")
        .execute(scene.api.db.pool())
        .await
        .unwrap();
    let (stranger, _) = scene.api.user("ada@example.com", "").await;
    sqlx::query("update app_user set tenant_key = (select key from tenant where id = 'other') where id = $1")
        .bind(stranger.uuid())
        .execute(scene.api.db.pool())
        .await
        .unwrap();
    scene.login().await.problem(403, "oidc-no-account");
    assert_eq!(scene.users().await, 2);
}

#[tokio::test]
async fn what_the_id_token_leaves_out_is_asked_for() {
    let scene = Scene::new(|oidc| {
        oidc.auto_create = true;
        oidc.role_claim = "/realm_access/roles".into();
    })
    .await;
    scene.provider.set(|inside| {
        inside.claims = json!({ "sub": "ada" });
        inside.info = json!({ "sub": "ada", "email": "ada@example.com", "email_verified": true,
                              "realm_access": { "roles": ["staff"] } });
    });
    assert_eq!(scene.me(scene.login().await).await["role"], "viewer");
    // Of somebody else it says nothing about us.
    scene.provider.set(|inside| inside.info["sub"] = json!("somebody else"));
    scene.login().await.problem(401, "oidc-refused");
}

#[tokio::test]
async fn a_provider_that_says_no_or_nothing_is_told() {
    let scene = Scene::creating().await;
    let (location, cookie) = scene.leave().await;
    let (_, state) = scene.provider.login(&location);
    let path = format!("{CALLBACK}?error=access_denied%3Cscript%3E&error_description=x&state={state}");
    let ask = scene.api.anonymous("GET", &path).header("cookie", &format!("{COOKIE}={cookie}"));
    let denied = ask.send().await.problem(403, "oidc-denied");
    let detail = denied.body["detail"].as_str().unwrap();
    assert!(detail.contains("access_denied") && !detail.contains('<'), "{detail}");

    let gone = Scene::new(|oidc| oidc.issuer = "http://127.0.0.1:9".into()).await;
    gone.api.anonymous("GET", LOGIN).send().await.problem(502, "oidc-unusable");
    // A provider that says it is another one.
    let foreign = Scene::new(|oidc| oidc.issuer = oidc.issuer.replace("127.0.0.1", "localhost")).await;
    foreign.api.anonymous("GET", LOGIN).send().await.problem(502, "oidc-unusable");
    let none = Api::start().await;
    for path in [LOGIN, CALLBACK] {
        none.anonymous("GET", path).send().await.problem(404, "no-oidc");
    }
    let methods = none.anonymous("GET", "/api/v1/auth/methods").send().await.expect(200);
    assert_eq!(methods.body["oidc"], false);
}

#[tokio::test]
async fn those_who_are_on_their_way_are_bounded() {
    let scene = Scene::new(|oidc| {
        oidc.auto_create = true;
        oidc.max_pending = 2;
    })
    .await;
    let mut ways = Vec::new();
    for _ in 0..3 {
        let (location, cookie) = scene.leave().await;
        let (code, state) = scene.provider.login(&location);
        ways.push((code, state, cookie));
        scene.api.pass(TimeDelta::seconds(1));
    }
    let [first, second, third] = ways.try_into().unwrap_or_else(|_| panic!("three ways"));
    scene.come_back(&first.0, &first.1, &first.2).await.problem(401, "oidc-refused");
    for (code, state, cookie) in [second, third] {
        scene.me(scene.come_back(&code, &state, &cookie).await).await;
    }
    assert!((scene.api.metric("muster_oidc_logins_forgotten_total").await - 1.0).abs() < 0.1);
}
