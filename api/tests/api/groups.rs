//! Groups: a tree that is there by what is in it, and that moves as a whole, by nobody who would gain by it.

use serde_json::{Value, json};

use crate::harness::{Api, Reply, Setup};

const GROUPS: &str = "/api/v1/groups";

async fn device(api: &Api, id: &str, group: &str, kind: &str) {
    api.post("/api/v1/devices", json!({ "id": id, "group": group, "type": kind })).await.expect(201);
}

/// A user who has these roles for these scopes.
async fn bound(api: &Api, email: &str, bindings: &[(&str, Value)]) -> String {
    let (user, token) = api.user(email, "").await;
    for (role, scope) in bindings {
        api.post("/api/v1/bindings", json!({ "user": user, "role": role, "scope": scope })).await.expect(201);
    }
    token
}

fn group(path: &str) -> Value {
    json!({ "kind": "group", "group": path })
}

fn at(path: &str) -> String {
    format!("{GROUPS}/{}", path.replace('/', "%2F"))
}

/// `path devices/devices_below` of each.
fn shown(reply: &Reply) -> Vec<String> {
    let text =
        |group: &Value| format!("{} {}/{}", group["path"].as_str().unwrap(), group["devices"], group["devices_below"]);
    reply.body["items"].as_array().unwrap().iter().map(text).collect()
}

async fn moved(api: &Api, token: &str, from: &str, to: &str) -> Reply {
    api.as_who(token, "PATCH", &at(from)).json(&json!({ "path": to })).send().await
}

#[tokio::test]
async fn groups_are_a_tree_with_the_devices_that_one_may_see() {
    let api = Api::start().await;
    device(&api, "a", "site/line-1/cell-2", "pump").await;
    device(&api, "b", "site/line-1", "pump").await;
    device(&api, "c", "site/line-2", "fan").await;
    device(&api, "d", "site-2", "fan").await;
    api.enrol("e").await;
    let made = api.post(GROUPS, json!({ "path": "yard/gate" })).await.expect(201);
    assert_eq!((made.header("location"), &made.body["devices"]), ("/api/v1/groups/yard%2Fgate", &json!(0)));
    assert_eq!(api.get(made.header("location")).await.expect(200).body, made.body);
    for there in ["yard/gate", "yard", "site"] {
        api.post(GROUPS, json!({ "path": there })).await.problem(409, "group-exists");
    }
    let tree = [
        "site 0/3",
        "site/line-1 1/2",
        "site/line-1/cell-2 1/1",
        "site/line-2 1/1",
        "site-2 1/1",
        "yard 0/0",
        "yard/gate 0/0",
    ];
    let sorted = |mut list: Vec<String>| {
        list.sort();
        list
    };
    let all = shown(&api.get(GROUPS).await.expect(200));
    assert_eq!(sorted(all.clone()), sorted(tree.map(str::to_owned).to_vec()));
    assert_eq!(shown(&api.get(&format!("{GROUPS}?under=site/line-1")).await.expect(200)), tree[1..3]);
    let first = api.get(&format!("{GROUPS}?limit=3")).await.expect(200);
    let next = first.body["next_cursor"].as_str().unwrap();
    let second = api.get(&format!("{GROUPS}?limit=100&cursor={next}")).await.expect(200);
    assert_eq!([shown(&first), shown(&second)].concat(), all);
    api.get(&at("nowhere")).await.problem(404, "no-such-group");
    api.get(&format!("{GROUPS}/a%2F%2Fb")).await.problem(400, "bad-id");

    let token = bound(&api, "ada@example.com", &[("viewer", group("site/line-1")), ("viewer", group("yard"))]).await;
    let seen = api.as_who(&token, "GET", GROUPS).send().await.expect(200);
    let expected = ["site 0/2", "site/line-1 1/2", "site/line-1/cell-2 1/1", "yard 0/0", "yard/gate 0/0"];
    assert_eq!(sorted(shown(&seen)), expected);
    api.as_who(&token, "GET", &at("site/line-2")).send().await.problem(404, "no-such-group");
    let fans = json!({ "kind": "selector", "selector": "type:fan" });
    let token = bound(&api, "bob@example.com", &[("viewer", fans)]).await;
    let seen = api.as_who(&token, "GET", GROUPS).send().await.expect(200);
    assert_eq!(sorted(shown(&seen)), ["site 0/1", "site-2 1/1", "site/line-2 1/1"]);
}

#[tokio::test]
async fn what_is_about_a_group_moves_with_it() {
    let api = Api::start().await;
    device(&api, "a", "site/line-1/cell-2", "pump").await;
    device(&api, "b", "site/line-1", "pump").await;
    device(&api, "c", "site/line-10", "pump").await;
    api.post(GROUPS, json!({ "path": "site/line-1/spare" })).await.expect(201);
    let claim =
        json!({ "name": "c", "approval": "auto", "max_devices": 1, "expires_in_s": 60, "group": "site/line-1" });
    let claim = api.post("/api/v1/claims", claim).await.expect(201);
    let key = json!({ "name": "k", "role": "viewer", "scope": group("site/line-1/cell-2") });
    api.post("/api/v1/api-keys", key).await.expect(201);
    let text =
        "type:pump AND NOT (group:site/line-10 OR group:\"site/line-1/cell-2\") AND group:(site/line-1 OR plant)";
    let selector = json!({ "kind": "selector", "selector": text });
    let ada = bound(&api, "ada@example.com", &[("operator", group("site/line-1")), ("viewer", selector)]).await;
    let before = api.as_who(&ada, "GET", "/api/v1/devices").send().await.expect(200).ids().join(" ");
    assert_eq!(before, "a b");

    let body = api
        .ask("PATCH", &at("site/line-1"))
        .json(&json!({ "path": "plant/hall-9/line-1" }))
        .send()
        .await
        .expect(200)
        .body;
    assert_eq!(body["moved"], json!({ "devices": 2, "bindings": 2, "api_keys": 1, "claims": 1 }));
    assert_eq!((&body["path"], &body["devices_below"]), (&json!("plant/hall-9/line-1"), &json!(2)));
    let now = api.get("/api/v1/devices/a").await.expect(200);
    assert_eq!((&now.body["group"], &now.body["version"]), (&json!("plant/hall-9/line-1/cell-2"), &json!(2)));
    assert_eq!(api.get("/api/v1/devices/c").await.expect(200).body["group"], "site/line-10");
    let after = api.as_who(&ada, "GET", "/api/v1/devices").send().await.expect(200).ids().join(" ");
    assert_eq!(after, before, "who had them has them");
    let scopes = api.get("/api/v1/bindings").await.expect(200);
    assert_eq!(scopes.body["items"][0]["scope"], group("plant/hall-9/line-1"));
    assert_eq!(
        scopes.body["items"][1]["scope"]["selector"],
        "type:pump AND NOT (group:site/line-10 OR group:\"plant/hall-9/line-1/cell-2\") AND group:(plant/hall-9/line-1 OR plant)"
    );
    assert_eq!(
        api.get("/api/v1/api-keys").await.expect(200).body["items"][0]["scope"],
        group("plant/hall-9/line-1/cell-2")
    );
    let claim = format!("/api/v1/claims/{}", claim.body["id"].as_str().unwrap());
    assert_eq!(api.get(&claim).await.expect(200).body["group"], "plant/hall-9/line-1");
    api.get(&at("plant/hall-9/line-1/spare")).await.expect(200);
    api.get(&at("site/line-1")).await.problem(404, "no-such-group");
    let written = api.get("/api/v1/audit?action=group.move").await.expect(200);
    let entry = &written.body["items"][0];
    assert_eq!((&entry["before"]["path"], &entry["after"]["moved"]["devices"]), (&json!("site/line-1"), &json!(2)));

    for (from, to, status, kind) in [
        ("nowhere", "x", 404, "no-such-group"),
        ("plant", "plant", 400, "invalid"),
        ("plant", "plant/below", 400, "invalid"),
        ("plant", "site", 409, "group-exists"),
        ("plant/hall-9", "site/line-10", 409, "group-exists"),
        ("plant", &format!("{0}/{0}/{0}/{0}", "x".repeat(60)), 400, "invalid"),
    ] {
        let body = json!({ "path": to });
        api.ask("PATCH", &at(from)).json(&body).send().await.problem(status, kind);
    }
    assert_eq!(api.get("/api/v1/devices/a").await.expect(200).body["version"], 2, "all or nothing");
}

#[tokio::test]
async fn nobody_moves_beyond_their_scope_or_gains_by_a_move() {
    let api = Api::start().await;
    device(&api, "a", "site/line-1/cell-2", "pump").await;
    device(&api, "b", "site/line-2", "fan").await;
    device(&api, "c", "lab", "fan").await;
    let ada = bound(&api, "ada@example.com", &[("operator", group("site/line-1"))]).await;
    for (from, to) in [
        ("site/line-1/cell-2", "site/line-2/cell-2"),
        ("site/line-1/cell-2", "cell-2"),
        ("site/line-1", "site/line-3"),
        ("site", "plant"),
    ] {
        moved(&api, &ada, from, to).await.problem(403, "out-of-scope");
    }
    moved(&api, &ada, "site/line-2", "site/line-1/cell-4").await.problem(404, "no-such-group");
    moved(&api, &ada, "site/line-1/cell-2", "site/line-1/cell-3").await.expect(200);
    let make = |token: &str, path: &str| api.as_who(token, "POST", GROUPS).json(&json!({ "path": path })).send();
    make(&ada, "site/line-3").await.problem(403, "out-of-scope");
    make(&ada, "site/line-1/new").await.expect(201);
    api.post(GROUPS, json!({ "path": "site/line-2/empty" })).await.expect(201);
    let end = |token: &str, path: &str| api.as_who(token, "DELETE", &at(path)).send();
    end(&ada, "site/line-2/empty").await.problem(404, "no-such-group");
    end(&ada, "site/line-1/new").await.expect(204);

    // Whoever may only change devices in one place and send commands in another gains nothing by bringing them together.
    let role = json!({ "id": "mover", "permissions": ["devices:read", "devices:write"] });
    api.post("/api/v1/roles", role).await.expect(201);
    let bob = bound(&api, "bob@example.com", &[("mover", group("site")), ("operator", group("site/line-1"))]).await;
    moved(&api, &bob, "site/line-2", "site/line-1/b").await.problem(403, "exceeds-own-rights");
    moved(&api, &bob, "site/line-2", "site/line-4").await.expect(200);
    // Nor by bringing one device there.
    api.post("/api/v1/devices", json!({ "id": "lone", "group": "site/line-7" })).await.expect(201);
    let change = |token: &str, change: Value| {
        let patch = api.as_who(token, "PATCH", "/api/v1/devices/lone");
        patch.raw("application/merge-patch+json", change.to_string()).send()
    };
    change(&bob, json!({ "group": "site/line-1" })).await.problem(403, "exceeds-own-rights");
    change(&bob, json!({ "group": "site/line-8" })).await.expect(200);
    moved(&api, &bob, "site/line-1/cell-3", "site/line-4/cell-3").await.expect(200);
    // What is told apart by its type is not told apart by its place.
    let fans = json!({ "kind": "selector", "selector": "type:fan" });
    let eve = bound(&api, "eve@example.com", &[("mover", group("site")), ("operator", fans)]).await;
    moved(&api, &eve, "site/line-4", "site/line-5").await.expect(200);
    change(&eve, json!({ "type": "fan" })).await.problem(403, "exceeds-own-rights");
    change(&eve, json!({ "type": "pump", "group": "site/line-5" })).await.expect(200);
    // Nor does a rule about topics.
    let topic_rule = json!({ "effect": "allow", "action": "publish", "filter": "fleet/v1/{tenant}/+/commands/#" });
    api.post("/api/v1/roles", json!({ "id": "sender", "topic_rules": [topic_rule] })).await.expect(201);
    let sam = bound(&api, "sam@example.com", &[("mover", group("site")), ("sender", group("site/line-6"))]).await;
    moved(&api, &sam, "site/line-5", "site/line-6/b").await.problem(403, "exceeds-own-rights");
    change(&sam, json!({ "group": "site/line-6" })).await.problem(403, "exceeds-own-rights");
    // Who may only read moves nothing.
    let val = bound(&api, "val@example.com", &[("viewer", json!({ "kind": "tenant" }))]).await;
    moved(&api, &val, "site", "plant").await.problem(403, "forbidden");
    make(&val, "plant").await.problem(403, "forbidden");
    end(&val, "lab").await.problem(403, "forbidden");
}

#[tokio::test]
async fn only_an_empty_group_is_deleted_and_as_many_are_made_as_may_be() {
    let mut setup = Setup::default();
    setup.config.provisioning.max_groups = 3;
    let api = Api::with(setup).await;
    device(&api, "a", "site/line-1", "pump").await;
    for path in ["site/line-1/spare", "yard", "yard/gate"] {
        api.post(GROUPS, json!({ "path": path })).await.expect(201);
    }
    api.post(GROUPS, json!({ "path": "one-more" })).await.problem(409, "too-many");
    let end = |path: &str| api.ask("DELETE", &at(path)).send();
    for used in ["site", "site/line-1", "yard"] {
        end(used).await.problem(409, "group-in-use");
    }
    bound(&api, "ada@example.com", &[("viewer", group("yard/gate"))]).await;
    end("yard/gate").await.problem(409, "group-in-use");
    end("site/line-1/spare").await.expect(204);
    end("site/line-1/spare").await.problem(404, "no-such-group");
    let nothing = bound(&api, "bob@example.com", &[("viewer", group("later"))]).await;
    assert_eq!(shown(&api.as_who(&nothing, "GET", GROUPS).send().await.expect(200)), Vec::<String>::new());
    // A place that somebody was given is taken.
    api.ask("PATCH", &at("yard")).json(&json!({ "path": "later" })).send().await.problem(409, "group-exists");
}
