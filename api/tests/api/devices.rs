//! Devices over REST.

use serde_json::{Value, json};

use crate::harness::{Api, escaped};

#[tokio::test]
async fn a_device_is_enrolled_read_changed_and_deleted() {
    let api = Api::start().await;
    api.enrol("gw").await;
    let new =
        json!({"id": "boiler-1", "type": "boiler", "group": "site/line-3", "labels": {"a": "1"}, "gateway": "gw"});
    let enrolled = api.post("/api/v1/devices", new).await.expect(201);
    assert_eq!(enrolled.header("location"), "/api/v1/devices/boiler-1");
    let (device, credential) = (&enrolled.body["device"], &enrolled.body["credential"]);
    let expected = json!({
        "id": "boiler-1", "type": "boiler", "group": "site/line-3", "labels": {"a": "1"}, "gateway": "gw", "decommissioned_at": null, "disabled": false,
        "status": {
            "state": "never_seen", "since": null, "sleeping_until": null, "reason": null, "last_seen_at": null,
            "boot_id": null, "firmware": null, "received": 0, "clamped": 0,
            "sequence": {"last_seq": null, "missing": 0, "missing_ranges": []},
        },
        "version": 1, "created_at": "2025-11-21T12:00:00.000Z", "updated_at": "2025-11-21T12:00:00.000Z",
    });
    assert_eq!(device, &expected);
    assert_eq!(credential["username"], "main/boiler-1");
    assert_eq!(credential["password"].as_str().unwrap().len(), 43);
    assert!(credential["id"].as_str().unwrap().starts_with("crd_"));

    let read = api.get("/api/v1/devices/boiler-1").await.expect(200);
    assert_eq!((&read.body, read.header("etag")), (&expected, enrolled.header("etag")));
    let patch = json!({"type": null, "labels": {"a": null, "b": "2"}, "gateway": null, "disabled": true});
    let changed = api.ask("PATCH", "/api/v1/devices/boiler-1").raw("application/merge-patch+json", patch.to_string());
    let changed = changed.send().await.expect(200);
    assert_eq!(changed.body["labels"], json!({"b": "2"}));
    assert_eq!(
        (&changed.body["type"], &changed.body["group"], &changed.body["gateway"], &changed.body["disabled"]),
        (&Value::Null, &json!("site/line-3"), &Value::Null, &json!(true))
    );
    assert_eq!(changed.body["version"], 2);
    api.ask("DELETE", "/api/v1/devices/boiler-1").send().await.expect(204);
    api.get("/api/v1/devices/boiler-1").await.problem(404, "no-such-device");
    api.ask("DELETE", "/api/v1/devices/boiler-1").send().await.problem(404, "no-such-device");
}

#[tokio::test]
async fn a_status_that_moves_on_is_news_but_no_conflict() {
    let api = Api::start().await;
    api.enrol("d").await;
    let path = "/api/v1/devices/d";
    let first = api.get(path).await.expect(200);
    let tag = first.header("etag").to_owned();
    let unchanged = api.ask("GET", path).header("if-none-match", &format!("\"x\", {tag}")).send().await.expect(304);
    assert_eq!((unchanged.text.as_str(), unchanged.header("etag")), ("", tag.as_str()));
    sqlx::query("insert into device_status (device_key, state, state_since, last_seen_at, missing_ranges) select key, 'online', $1, $1, '[[3,4]]' from device")
        .bind(api.now())
        .execute(api.db.pool())
        .await
        .unwrap();
    let news = api.ask("GET", path).header("if-none-match", &tag).send().await.expect(200);
    assert_eq!(news.body["status"]["state"], "online");
    assert_eq!(news.body["status"]["since"], "2025-11-21T12:00:00.000Z");
    assert_eq!(news.body["status"]["sequence"]["missing_ranges"], json!([[3, 4]]));
    let change =
        |tag: &str, kind: &str| api.ask("PATCH", path).header("if-match", tag).json(&json!({"type": kind})).send();
    change(&tag, "a").await.expect(200);
    let late = change(&tag, "b").await.problem(412, "version-mismatch");
    assert!(late.body["detail"].as_str().unwrap().contains("found 2"), "{}", late.text);
    change("*", "b").await.expect(200);
    change("\"3\"", "c").await.expect(200);
    change("\"1\", W/\"4-abc\"", "d").await.expect(200);
    change("\"nonsense\"", "e").await.problem(412, "version-mismatch");
    change("7", "e").await.problem(400, "invalid");
    api.ask("DELETE", path).header("if-match", "\"1\"").send().await.problem(412, "version-mismatch");
    api.ask("DELETE", path).header("if-match", "\"5\"").send().await.expect(204);
}

#[tokio::test]
async fn of_two_enrolments_of_one_name_one_is_made() {
    let api = Api::start().await;
    let enrol = || api.post("/api/v1/devices", json!({"id": "boiler-1"}));
    let (one, two, three) = tokio::join!(enrol(), enrol(), enrol());
    let mut statuses = [one, two, three].map(|reply| {
        let status = reply.status.as_u16();
        reply.expect(status);
        status
    });
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 409, 409]);
    api.post("/api/v1/devices", json!({"id": "boiler-1"})).await.problem(409, "device-exists");
}

#[tokio::test]
async fn a_request_that_is_repeated_creates_once() {
    let api = Api::start().await;
    let enrol = |key: &'static str, body: Value| {
        api.ask("POST", "/api/v1/devices").header("idempotency-key", key).json(&body).send()
    };
    let (one, two) = tokio::join!(enrol("k1", json!({"id": "a"})), enrol("k1", json!({"id": "a"})));
    let (first, again) = if one.header("idempotency-replayed").is_empty() { (one, two) } else { (two, one) };
    let (first, again) = (first.expect(201), again.expect(201));
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.header("location"), first.header("location"));
    assert!(first.body["credential"]["password"].is_string());
    let mut expected = first.body.clone();
    expected["credential"]["password"] = Value::Null;
    assert_eq!(again.body, expected);
    // What is written otherwise but means the same is the same request.
    enrol("k1", json!({"labels": {}, "type": null, "id": "a"})).await.expect(201);
    enrol("k1", json!({"id": "b"})).await.problem(422, "idempotency-conflict");
    let elsewhere = api.ask("POST", "/api/v1/devices/a/credentials").header("idempotency-key", "k1").send().await;
    elsewhere.problem(422, "idempotency-conflict");
    // A request that failed is not kept.
    enrol("k2", json!({"id": "a"})).await.problem(409, "device-exists");
    enrol("k2", json!({"id": "c"})).await.expect(201);
    enrol("", json!({"id": "d"})).await.problem(400, "invalid");
    let long = "k".repeat(256);
    let long = api.ask("POST", "/api/v1/devices").header("idempotency-key", &long).json(&json!({"id": "d"})).send();
    long.await.problem(400, "invalid");
    let kept: Vec<Value> = sqlx::query_scalar("select answer from idempotency").fetch_all(api.db.pool()).await.unwrap();
    let secret = first.body["credential"]["password"].as_str().unwrap();
    assert!(kept.iter().all(|answer| !answer.to_string().contains(secret)), "secrets are not kept");
}

#[tokio::test]
async fn pages_hold_every_device_once() {
    let api = Api::start().await;
    for n in 0..5 {
        api.enrol(&format!("d-{n}")).await;
    }
    let mut seen = Vec::new();
    let mut path = "/api/v1/devices?limit=2".to_owned();
    loop {
        let page = api.get(&path).await.expect(200);
        seen.extend(page.ids().into_iter().map(str::to_owned));
        if seen.len() == 2 {
            api.enrol("d-00").await;
            api.ask("DELETE", "/api/v1/devices/d-2").send().await.expect(204);
        }
        let Some(cursor) = page.body["next_cursor"].as_str() else { break };
        path = format!("/api/v1/devices?limit=2&cursor={cursor}");
    }
    assert_eq!(seen, ["d-0", "d-1", "d-3", "d-4"]);
}

#[tokio::test]
async fn a_filter_means_what_it_says() {
    let api = Api::start().await;
    for (id, kind, group, site) in [
        ("a", "boiler", "plant/line-1", "oslo"),
        ("b", "boiler", "plant/line-10", "Oslo, Norway"),
        ("c", "freezer", "plant", "oslo"),
    ] {
        let body = json!({"id": id, "type": kind, "group": group, "labels": {"site": site, "kind": kind}});
        api.post("/api/v1/devices", body).await.expect(201);
    }
    for (query, expected) in [
        ("type=boiler", &["a", "b"][..]),
        ("selector=type:freezer%20OR%20label.site:%22Oslo,%20Norway%22", &["b", "c"]),
        ("selector=group:plant%20AND%20label.site:oslo&type=boiler", &["a"]),
        ("selector=device:a*%20OR%20(state:never_seen%20AND%20NOT%20type:boiler)", &["a", "c"]),
        ("selector=created:%3Enow-1h%20-group:plant/line-1", &["b", "c"]),
        ("selector=firmware:%3C2.0", &[]),
        ("group=plant/line-1", &["a"]),
        ("group=plant", &["a", "b", "c"]),
        ("label=site%3Doslo", &["a", "c"]),
        ("label=site=oslo,kind=boiler", &["a"]),
        ("label=site=oslo&label=kind=freezer", &["c"]),
        ("label=site=Oslo%5C,%20Norway", &["b"]),
        ("state=never_seen&type=freezer", &["c"]),
        ("state=online", &[]),
    ] {
        let page = api.get(&format!("/api/v1/devices?{query}")).await.expect(200);
        assert_eq!(page.ids(), expected, "{query}");
        assert_eq!(page.body["next_cursor"], Value::Null);
    }
}

#[tokio::test]
async fn a_query_that_cannot_be_meant_is_refused_with_what_was_expected() {
    let api = Api::start().await;
    let cursor = |plain: &str| {
        use base64::Engine as _;
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(plain)
    };
    let foreign = format!("cursor={}", cursor("r1,2"));
    let reserved = format!("cursor={}", cursor("d_x"));
    for (query, field, expected) in [
        ("selector=x", "selector", "column 1: expected one of device:, type:"),
        ("selector=type:a%20firmware:%3Cnew", "selector", "column 18: expected a version such as 2.0.1"),
        ("select=type:x", "select", "expected type, group, state, label, selector, limit, cursor"),
        ("limit=0", "limit", "1 to 1000"),
        ("limit=many", "limit", "1 to 1000"),
        ("limit=1&limit=2", "limit", "once"),
        ("state=asleep", "state", "never_seen"),
        ("type=a%20b", "type", "expected"),
        ("type=%00", "type", "expected"),
        ("group=a//b", "group", "site/line-3"),
        ("label=x", "label", "key=value"),
        ("label=a=1,a=2", "label", "one value"),
        ("label=a=%00", "label", "control"),
        ("cursor=!", "cursor", "next_cursor"),
        ("cursor=", "cursor", "next_cursor"),
        (&foreign, "cursor", "next_cursor"),
        (&reserved, "cursor", "next_cursor"),
        ("%ff=1", "\u{fffd}", "unknown"),
    ] {
        let refused = api.get(&format!("/api/v1/devices?{query}")).await.problem(400, "invalid");
        let error = &refused.body["errors"][0];
        assert_eq!(error["field"], field, "{query}");
        assert!(error["detail"].as_str().unwrap().contains(expected), "{query}: {error}");
    }
    let both = api.get("/api/v1/devices?limit=x&state=y").await.problem(400, "invalid");
    assert_eq!(both.body["errors"].as_array().unwrap().len(), 2);
    api.get("/api/v1/devices?limit=5000").await.expect(200);
    assert!((api.metric("muster_http_page_limit_clamped_total").await - 1.0).abs() < 0.5);
}

#[tokio::test]
async fn a_body_that_cannot_be_meant_is_refused_with_what_was_expected() {
    let api = Api::start().await;
    let many = (0..65).map(|n| (format!("k{n}"), json!(""))).collect::<serde_json::Map<_, _>>();
    for (body, field, expected) in [
        (json!({}), ".", "missing field `id`"),
        (json!({"id": "a b"}), "id", "1 to 64 of"),
        (json!({"id": "a/b"}), "id", "1 to 64 of"),
        (json!({"id": ".."}), "id", "1 to 64 of"),
        (json!({"id": "a\0"}), "id", "1 to 64 of"),
        (json!({"id": "_provision"}), "id", "not beginning with _"),
        (json!({"id": "x".repeat(65)}), "id", "1 to 64 of"),
        (json!({"id": 7}), "id", "string"),
        (json!({"id": "a", "grup": "x"}), "grup", "expected one of `id`, `type`, `group`, `labels`, `gateway`"),
        (json!({"id": "a", "type": "\0"}), "type", "1 to 64 of"),
        (json!({"id": "a", "group": "/x"}), "group", "names joined by /"),
        (json!({"id": "a", "group": "x/".repeat(130) + "x"}), "group", "255 bytes"),
        (json!({"id": "a", "labels": {"k": "\0"}}), "labels", "control character"),
        (json!({"id": "a", "labels": {"k": 1}}), "labels.k", "string"),
        (json!({"id": "a", "labels": {"a=b": ""}}), "labels", "label key"),
        (json!({"id": "a", "labels": {"k": "v".repeat(257)}}), "labels", "256"),
        (json!({"id": "a", "labels": many}), "labels", "at most 64"),
        (json!({"id": "a", "gateway": "\0"}), "gateway", "1 to 64 of"),
        (json!(["a", null, null, {}, null]), ".", "an object"),
        (json!("x"), ".", "an object"),
        (json!(null), ".", "an object"),
    ] {
        let refused = api.post("/api/v1/devices", body.clone()).await.problem(400, "invalid");
        let error = &refused.body["errors"][0];
        assert_eq!(error["field"], field, "{body}: {error}");
        assert!(error["detail"].as_str().unwrap().contains(expected), "{body}: {error}");
    }
    api.post("/api/v1/devices", json!({"id": "a", "gateway": "a"})).await.problem(422, "gateway-not-allowed");
    api.post("/api/v1/devices", json!({"id": "a", "gateway": "b"})).await.problem(422, "no-such-gateway");
    api.enrol("a").await;
    for (body, field) in [
        (json!({"id": "b"}), "id"),
        (json!({"disabled": null}), "disabled"),
        (json!({"labels": []}), "labels"),
        (json!({"version": 1}), "version"),
    ] {
        let refused = api.ask("PATCH", "/api/v1/devices/a").json(&body).send().await.problem(400, "invalid");
        assert_eq!(refused.body["errors"][0]["field"], field, "{body}");
    }
    let refused = api.ask("PATCH", "/api/v1/devices/a").json(&json!({"labels": {"k": "\u{0}"}})).send().await;
    refused.problem(400, "invalid");
}

#[tokio::test]
async fn what_is_not_json_is_told_so() {
    let api = Api::start().await;
    for text in ["", "{", "{\"id\":\"a\"} x", "\u{feff}{}", "{\"id\":\"\\ud800\"}", &"[".repeat(1000), "nul"] {
        let refused = api.ask("POST", "/api/v1/devices").raw("application/json", text.to_owned()).send().await;
        refused.problem(400, "malformed-json");
    }
    let invalid_utf8 = api.ask("POST", "/api/v1/devices").raw("application/json", &b"{\"id\":\"\xff\"}"[..]).send();
    invalid_utf8.await.problem(400, "malformed-json");
    for kind in ["text/plain", "application/x-www-form-urlencoded", "application/merge-patch+json", ""] {
        let refused = api.ask("POST", "/api/v1/devices").raw(kind, "{\"id\":\"a\"}").send().await;
        let refused = refused.problem(415, "unsupported-media-type");
        assert!(refused.body["detail"].as_str().unwrap().contains("application/json"));
    }
    api.ask("POST", "/api/v1/devices")
        .raw("Application/JSON; charset=utf-8", "{\"id\":\"a\"}")
        .send()
        .await
        .expect(201);
}

#[tokio::test]
async fn a_path_is_no_way_around_the_names() {
    let api = Api::start().await;
    api.enrol("a").await;
    for tricky in
        ["%2e%2e", "..%2fa", "a%2fcredentials", "a%00", "%00", "a%20", "_a", "%ff", "a%0a", &escaped(&"x".repeat(65))]
    {
        api.get(&format!("/api/v1/devices/{tricky}")).await.problem(400, "bad-id");
    }
    for nowhere in
        ["/api/v1/devices/", "/api/v1/devices/a/", "/api/v1/devices//a", "/api/v1/devices/../me", "/api/v1//me"]
    {
        api.get(nowhere).await.problem(404, "no-such-route");
    }
    api.get("/api/v1/devices/%61").await.expect(200);
    let id = "crd_00000000000000000000000000000001";
    for bad in ["x", "usr_00000000000000000000000000000001", &id[..35], "crd_zz"] {
        api.ask("DELETE", &format!("/api/v1/devices/a/credentials/{bad}")).send().await.problem(400, "bad-id");
    }
}
