//! Sessions over REST.

use fleet_core::gateway::Children;
use fleet_core::id::{DeviceKey, SessionId, TenantKey};
use fleet_core::policy::{Grants, Principal, Proof, Who};
use fleet_core::session::{self, Enqueue, Leave, Message, NEVER, NewSession, Subscription};
use serde_json::{Value, json};
use sqlx::PgConnection;

use crate::harness::{Api, EMAIL, NOON_MS};

const PATH: &str = "/api/v1/sessions";

async fn device(api: &Api, id: &str) -> Who {
    api.enrol(id).await;
    let key: i64 =
        sqlx::query_scalar("select key from device where id = $1").bind(id).fetch_one(api.db.pool()).await.unwrap();
    Who::Device { key: DeviceKey(key), id: id.parse().unwrap(), children: Children::default() }
}

/// Keeps a session in the tenant.
async fn begin(db: &mut PgConnection, tenant: TenantKey, who: &Who, client_id: &str, expiry_s: u32) -> SessionId {
    let owner = Principal { tenant, tenant_id: "main".parse().unwrap(), who: who.clone(), proof: Proof::default() };
    let id = SessionId::new();
    let (name, client_id) = (format!("{who:?}/{client_id}"), client_id.to_owned());
    let new = NewSession { id, name, owner, client_id, expiry_s, will: None, now_ms: NOON_MS };
    session::begin(db, &[new]).await.unwrap();
    id
}

#[tokio::test]
async fn a_session_is_told_with_what_it_wants_and_what_waits() {
    let api = Api::start().await;
    let mut db = api.db.pool().acquire().await.unwrap();
    let boiler = device(&api, "boiler-1").await;
    let id = begin(&mut db, api.db.tenant(), &boiler, "b1", 3_600).await;
    let shared = Subscription {
        filter: "$share/g/app/main/#".to_owned(),
        qos: 2,
        no_local: false,
        retain_as_published: true,
        subscription_id: Some(7),
    };
    let plain =
        Subscription { filter: "a".to_owned(), qos: 0, no_local: true, subscription_id: None, ..shared.clone() };
    session::subscribe(&mut db, &[(id, shared), (id, plain)]).await.unwrap();
    let message = Message {
        topic: "app/main/x".to_owned(),
        payload: vec![0; 26].into(),
        qos: 1,
        retain: false,
        properties: None,
        accepted_ms: NOON_MS,
        expires_ms: None,
    };
    let row = |offset| Enqueue { session: id, offset, message: 0, qos: 1, retain: false, subscription_ids: Vec::new() };
    session::enqueue(&mut db, &[message], &[row(1), row(2)]).await.unwrap();

    let mut expected = json!({
        "id": id.to_string(), "client_id": "b1", "device": "boiler-1", "user": null, "connected": true,
        "since": "2025-11-21T12:00:00.000Z", "expires_at": null, "expiry_s": 3600,
        "subscriptions": [
            {"filter": "$share/g/app/main/#", "qos": 2, "no_local": false, "retain_as_published": true, "subscription_id": 7},
            {"filter": "a", "qos": 0, "no_local": true, "retain_as_published": true, "subscription_id": null},
        ],
        "queued_messages": 2, "queued_bytes": 200, "dropped_messages": 0, "dropped_at": null,
        "created_at": "2025-11-21T12:00:00.000Z",
    });
    assert_eq!(api.get(&format!("{PATH}/{id}")).await.expect(200).body, expected);
    assert_eq!(api.get(PATH).await.expect(200).body, json!({"items": [expected], "next_cursor": null}));

    let expires_ms = Some(NOON_MS + 61_000);
    let left = Leave { id, expires_ms, expiry_s: 60, sent_to: 2, keep_will: false, now_ms: NOON_MS + 1_000 };
    session::leave(&mut db, &[left]).await.unwrap();
    session::dropped(&mut db, &[(id, 3)]).await.unwrap();
    let away = api.get(&format!("{PATH}/{id}")).await.expect(200).body;
    assert!(away["dropped_at"].is_string(), "{away}");
    expected["connected"] = json!(false);
    expected["since"] = json!("2025-11-21T12:00:01.000Z");
    expected["expires_at"] = json!("2025-11-21T12:01:01.000Z");
    expected["expiry_s"] = json!(60);
    expected["dropped_messages"] = json!(3);
    expected["dropped_at"] = away["dropped_at"].clone();
    assert_eq!(away, expected);
}

#[tokio::test]
async fn a_users_session_that_never_ends_is_told_as_such() {
    let api = Api::start().await;
    let mut db = api.db.pool().acquire().await.unwrap();
    let id = begin(
        &mut db,
        api.db.tenant(),
        &Who::User { id: api.admin, key: None, platform: false, grants: Grants::default() },
        "console",
        NEVER,
    )
    .await;
    let told = api.get(&format!("{PATH}/{id}")).await.expect(200).body;
    assert_eq!((&told["user"], &told["device"], &told["expiry_s"]), (&json!(EMAIL), &Value::Null, &Value::Null));
}

#[tokio::test]
async fn sessions_are_told_oldest_first_page_by_page() {
    let api = Api::start().await;
    let mut db = api.db.pool().acquire().await.unwrap();
    let (a, b) = (device(&api, "a").await, device(&api, "b").await);
    let mut ids = Vec::new();
    for nth in 0..4 {
        ids.push(begin(&mut db, api.db.tenant(), &a, &nth.to_string(), 60).await.to_string());
    }
    begin(&mut db, api.db.tenant(), &b, "b", 60).await;
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("{PATH}?device=a&limit=3{cursor}")).await.expect(200);
        seen.extend(page.ids().into_iter().map(str::to_owned));
        let Some(next) = page.body["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, ids);
    assert_eq!(api.get(PATH).await.expect(200).ids().len(), 5);
    assert_eq!(api.get(&format!("{PATH}?limit=2")).await.expect(200).ids(), &ids[..2]);
    let none = api.get(&format!("{PATH}?device=c")).await.expect(200).body;
    assert_eq!((&none["items"], &none["next_cursor"]), (&json!([]), &Value::Null));
    for query in ["device=a%00", "device=", "limit=0", "cursor=ZGE", "client=x"] {
        api.get(&format!("{PATH}?{query}")).await.problem(400, "invalid");
    }
    api.get(&format!("{PATH}/boiler-1")).await.problem(400, "bad-id");
    let ended = api.get(&format!("{PATH}/{}", SessionId::new())).await.problem(404, "no-such-session");
    assert!(ended.body["detail"].as_str().unwrap().starts_with("session ses_"));
}

#[tokio::test]
async fn another_tenants_sessions_do_not_exist() {
    let api = Api::start().await;
    let mut db = api.db.pool().acquire().await.unwrap();
    let boiler = device(&api, "boiler-1").await;
    let id = begin(&mut db, api.db.tenant(), &boiler, "b1", 60).await;
    sqlx::query("insert into tenant (id, created_at) values ('other', now())").execute(&mut *db).await.unwrap();
    sqlx::query("update app_user set tenant_key = (select key from tenant where id = 'other')")
        .execute(&mut *db)
        .await
        .unwrap();
    for query in ["", "?device=boiler-1"] {
        assert_eq!(api.get(&format!("{PATH}{query}")).await.expect(200).ids(), Vec::<&str>::new());
    }
    api.get(&format!("{PATH}/{id}")).await.problem(404, "no-such-session");
}
