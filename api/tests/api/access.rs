//! Who may call what.

use fleet_core::clock::from_ms;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use crate::harness::{Api, NOON_MS};

/// Open to everybody.
pub(crate) const PUBLIC: [&str; 11] = [
    "GET /api/v1/auth/methods",
    "GET /api/v1/auth/oidc/login",
    "GET /api/v1/auth/oidc/callback",
    "GET /.well-known/jwks.json",
    "POST /api/v1/auth/login",
    "GET /api/v1/authorities/boiler-1/crl",
    "POST /api/v1/auth/password-reset",
    "GET /api/v1/openapi.json",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
];
/// Opened by a refresh token.
const REFRESHING: &str = "POST /api/v1/auth/refresh";
/// Opened by the secret of a claim.
const BY_CLAIM: &str = "POST /api/v1/provision";
/// Open to every user, whatever the role.
const SIGNED_IN: [&str; 11] = [
    "GET /api/v1/auth/totp",
    "POST /api/v1/auth/totp",
    "POST /api/v1/auth/totp/confirm",
    "POST /api/v1/auth/totp/recovery-codes",
    "DELETE /api/v1/auth/totp",
    "POST /api/v1/auth/password",
    "GET /api/v1/me",
    "POST /api/v1/auth/logout",
    "POST /api/v1/auth/logout-all",
    "GET /api/v1/auth/sessions",
    "DELETE /api/v1/auth/sessions/boiler-1",
];

/// Method, path with its variables filled in, and the permission it says it needs.
pub(crate) fn operations() -> Vec<(String, String, Option<String>)> {
    let document: Value = serde_json::from_str(&api::openapi_json()).unwrap();
    let mut operations = Vec::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let filled = path.replace("{id}", "boiler-1").replace("{credential_id}", &format!("crd_{:032x}", 1));
            let permission = operation["security"][0]["bearer"][0].as_str().map(str::to_owned);
            operations.push((method.to_uppercase(), filled, permission));
        }
    }
    operations
}

#[tokio::test]
async fn every_route_but_the_public_ones_needs_a_token_and_a_permission() {
    let api = Api::start().await;
    let mut guarded = 0;
    for (method, path, permission) in operations() {
        let route = format!("{method} {path}");
        let without = api.anonymous(&method, &path).send().await;
        if PUBLIC.contains(&route.as_str()) {
            assert_ne!(without.status.as_u16(), 401, "{route}");
            continue;
        }
        let without = without.problem(401, "no-token");
        if route == REFRESHING {
            continue;
        }
        let (_, nobody) = api.nobody().await;
        assert_eq!(without.header("www-authenticate"), "Bearer", "{route}");
        let forbidden = api.anonymous(&method, &path).header("authorization", &format!("Bearer {nobody}")).send().await;
        if route == BY_CLAIM {
            forbidden.problem(401, "bad-token");
            continue;
        }
        if SIGNED_IN.contains(&route.as_str()) {
            assert!(!matches!(forbidden.status.as_u16(), 401 | 403), "{route}: {}", forbidden.text);
            continue;
        }
        let forbidden = forbidden.problem(403, "forbidden");
        let permission = permission.unwrap_or_else(|| panic!("{route} does not say which permission it needs"));
        let detail = forbidden.body["detail"].as_str().or(forbidden.body["message"].as_str()).unwrap();
        assert!(detail.ends_with(&permission), "{route}: {detail}, documented: {permission}");
        guarded += 1;
    }
    assert!(guarded >= 10, "the document lists the routes");
}

#[tokio::test]
async fn a_token_that_is_not_ours_opens_nothing() {
    let api = Api::start().await;
    let claims = json!({
        "iss": "muster", "aud": "muster", "sub": api.admin.to_string(),
        "iat": NOON_MS / 1000, "exp": NOON_MS / 1000 + 900,
    });
    let kid: String = sqlx::query_scalar("select kid from signing_key").fetch_one(api.db.pool()).await.unwrap();
    let symmetric = EncodingKey::from_secret(kid.as_bytes());
    let header = Header { kid: Some(kid), ..Header::new(Algorithm::HS256) };
    let confused = jsonwebtoken::encode(&header, &claims, &symmetric).unwrap();
    let (gone, stranger) = api.nobody().await;
    sqlx::query("delete from app_user where id = $1").bind(gone.uuid()).execute(api.db.pool()).await.unwrap();
    let none = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0.";
    for token in ["x", "a.b.c", none, &confused, &stranger, &"x".repeat(10_000)] {
        let asked = api.anonymous("GET", "/api/v1/me").header("authorization", &format!("Bearer {token}"));
        let refused = asked.send().await.problem(401, "bad-token");
        assert_eq!(refused.header("www-authenticate"), "Bearer error=\"invalid_token\"");
    }
    for value in ["", "Bearer", "Basic YWRtaW46eA==", "bearer\u{e9} x"] {
        api.anonymous("GET", "/api/v1/me").header("authorization", value).send().await.problem(401, "no-token");
    }
}

#[tokio::test]
async fn whoever_verifies_tokens_is_shown_the_keys_and_who_runs_the_server_replaces_them() {
    let api = Api::start().await;
    let shown = api.anonymous("GET", "/.well-known/jwks.json").send().await.expect(200);
    assert_eq!(shown.header("cache-control"), "public, max-age=60");
    let [key] = shown.body["keys"].as_array().unwrap().as_slice() else { panic!("{}", shown.text) };
    for (field, value) in [("kty", "OKP"), ("crv", "Ed25519"), ("alg", "EdDSA"), ("use", "sig")] {
        assert_eq!(key[field], value);
    }
    assert_eq!(key.as_object().unwrap().len(), 6, "and nothing that is secret: {key}");
    // A stranger verifies a token with nothing but that.
    let token = api.token_of(api.admin).await;
    let header = jsonwebtoken::decode_header(&token).unwrap();
    assert_eq!(key["kid"].as_str(), header.kid.as_deref());
    let verifying = jsonwebtoken::DecodingKey::from_ed_components(key["x"].as_str().unwrap()).unwrap();
    let mut rules = jsonwebtoken::Validation::new(Algorithm::EdDSA);
    rules.set_audience(&["muster"]);
    rules.validate_exp = false;
    let claims = jsonwebtoken::decode::<Value>(&token, &verifying, &rules).unwrap().claims;
    assert_eq!(claims["sub"], api.admin.to_string());

    let (_, tenant_admin) = api.user("second@example.com", "admin").await;
    let rotate = "/api/v1/auth/keys/rotate";
    api.as_who(&tenant_admin, "POST", rotate).send().await.problem(403, "forbidden");
    api.pass(chrono::TimeDelta::seconds(1));
    let new = api.ask("POST", rotate).send().await.expect(200).body["kid"].clone();
    api.pass(chrono::TimeDelta::seconds(6));
    let shown = api.anonymous("GET", "/.well-known/jwks.json").send().await.expect(200);
    assert_eq!(shown.body["keys"][1]["kid"], new);
    api.as_who(&token, "GET", "/api/v1/me").send().await.expect(200);
    let after = api.token_of(api.admin).await;
    assert_eq!(jsonwebtoken::decode_header(&after).unwrap().kid.as_deref(), new.as_str());

    api.ask("POST", rotate).json(&json!({ "revoke": true })).send().await.expect(200);
    api.pass(chrono::TimeDelta::seconds(1));
    for token in [token, after] {
        api.as_who(&token, "GET", "/api/v1/me").send().await.problem(401, "bad-token");
    }
}

#[tokio::test]
async fn a_token_ends_with_its_time() {
    let api = Api::start().await;
    let token = api.token_of(api.admin).await;
    let ask = || api.anonymous("GET", "/api/v1/me").header("authorization", &format!("Bearer {token}")).send();
    api.clock.set(from_ms(NOON_MS + 899_000));
    ask().await.expect(200);
    api.clock.set(from_ms(NOON_MS + 900_000));
    let expired = ask().await.problem(401, "bad-token");
    assert!(expired.body["detail"].as_str().unwrap().contains("expired"));
}

#[tokio::test]
async fn a_user_who_loses_role_or_account_is_out_at_once() {
    let api = Api::start().await;
    api.get("/api/v1/devices").await.expect(200);
    sqlx::query("update app_user set role = null").execute(api.db.pool()).await.unwrap();
    api.get("/api/v1/devices").await.problem(403, "forbidden");
    let me = api.get("/api/v1/me").await.expect(200);
    assert_eq!((&me.body["role"], &me.body["permissions"]), (&Value::Null, &json!([])));
    sqlx::query("update app_user set disabled = true").execute(api.db.pool()).await.unwrap();
    api.get("/api/v1/me").await.problem(401, "bad-token");
}

#[tokio::test]
async fn another_tenants_devices_do_not_exist() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    sqlx::query("insert into tenant (id, created_at) values ('other', now())").execute(api.db.pool()).await.unwrap();
    sqlx::query("update app_user set tenant_key = (select key from tenant where id = 'other')")
        .execute(api.db.pool())
        .await
        .unwrap();
    assert_eq!(api.get("/api/v1/devices").await.expect(200).ids(), Vec::<&str>::new());
    for (method, path, body) in [
        ("GET", "/api/v1/devices/boiler-1", Value::Null),
        ("PATCH", "/api/v1/devices/boiler-1", json!({})),
        ("DELETE", "/api/v1/devices/boiler-1", Value::Null),
        ("GET", "/api/v1/devices/boiler-1/credentials", Value::Null),
        ("POST", "/api/v1/devices/boiler-1/credentials", json!({})),
        ("POST", "/api/v1/devices/boiler-1/credentials/rotate", json!({})),
        ("GET", "/api/v1/devices/boiler-1/telemetry", Value::Null),
        ("GET", "/api/v1/devices/boiler-1/telemetry/latest", Value::Null),
    ] {
        let ask = api.ask(method, path);
        let ask = if body.is_null() { ask } else { ask.json(&body) };
        ask.send().await.problem(404, "no-such-device");
    }
    let gateway = api.post("/api/v1/devices", json!({"id": "b", "gateway": "boiler-1"})).await;
    gateway.problem(422, "no-such-gateway");
}

#[tokio::test]
async fn another_tenants_users_roles_and_keys_do_not_exist() {
    let api = Api::start().await;
    api.post("/api/v1/roles", json!({ "id": "orders" })).await.expect(201);
    let (user, _) = api.user("ada@example.com", "orders").await;
    let key = api.post("/api/v1/api-keys", json!({ "name": "a", "role": "orders" })).await.expect(201);
    let key = key.body["id"].as_str().unwrap();
    let (stranger, token) = api.user("stranger@example.com", "admin").await;
    sqlx::query("insert into tenant (id, created_at) values ('other', now())").execute(api.db.pool()).await.unwrap();
    sqlx::query("update app_user set tenant_key = (select key from tenant where id = 'other') where id = $1")
        .bind(stranger.uuid())
        .execute(api.db.pool())
        .await
        .unwrap();
    let ask = |method, path: &str| api.as_who(&token, method, path);
    for path in ["/api/v1/bindings", "/api/v1/api-keys"] {
        assert_eq!(ask("GET", path).send().await.expect(200).ids(), Vec::<&str>::new(), "{path}");
    }
    assert_eq!(ask("GET", "/api/v1/roles").send().await.expect(200).made(), Vec::<&str>::new());
    assert_eq!(ask("GET", "/api/v1/users").send().await.expect(200).ids(), [stranger.to_string()]);
    let user = format!("/api/v1/users/{user}");
    for method in ["GET", "DELETE"] {
        ask(method, &user).send().await.problem(404, "no-such-user");
        ask(method, "/api/v1/roles/orders").send().await.problem(404, "no-such-role");
    }
    let patch = ask("PATCH", &user).raw("application/merge-patch+json", r#"{"disabled":true}"#);
    patch.send().await.problem(404, "no-such-user");
    let empty = json!({ "permissions": [], "topic_rules": [] });
    ask("PUT", "/api/v1/roles/orders").json(&empty).send().await.problem(404, "no-such-role");
    ask("DELETE", &format!("/api/v1/api-keys/{key}")).send().await.problem(404, "no-such-api-key");
    let give = json!({ "name": "a", "role": "orders" });
    ask("POST", "/api/v1/api-keys").json(&give).send().await.problem(404, "no-such-role");
    // A rule may name its own tenant, and no other.
    let orders = |tenant| {
        let rule = json!({ "effect": "allow", "action": "all", "filter": format!("app/{tenant}/#") });
        json!({ "id": "orders", "topic_rules": [rule] })
    };
    ask("POST", "/api/v1/roles").json(&orders("main")).send().await.problem(400, "invalid");
    // The same name is another role.
    ask("POST", "/api/v1/roles").json(&orders("other")).send().await.expect(201);
    ask("DELETE", "/api/v1/roles/orders").send().await.expect(204);
    api.get("/api/v1/roles/orders").await.expect(200);
}
