//! Searches that people save.

use serde_json::{Value, json};

use crate::harness::{Api, Setup};

const PATH: &str = "/api/v1/saved-searches";

fn search(name: &str) -> Value {
    json!({ "name": name, "query": "level:>=warn", "from": "now-1h" })
}

fn shared(name: &str) -> Value {
    json!({ "name": name, "query": "level:>=warn", "shared": true })
}

#[tokio::test]
async fn a_search_is_saved_changed_and_deleted_and_the_audit_knows() {
    let api = Api::start().await;
    let made = api.post(PATH, search("Wi-Fi")).await.expect(201);
    let path = made.header("location").to_owned();
    assert_eq!(made.body["id"].as_str(), path.rsplit('/').next());
    assert_eq!(
        (&made.body["query"], &made.body["from"], &made.body["to"], &made.body["shared"], &made.body["mine"]),
        (&json!("level:>=warn"), &json!("now-1h"), &Value::Null, &json!(false), &json!(true))
    );
    let tag = made.header("etag").to_owned();
    api.ask("GET", &path).header("if-none-match", &tag).send().await.expect(304);
    api.post(PATH, search("Wi-Fi")).await.problem(409, "saved-search-exists");
    let change = |tag: &str, name: &str| api.ask("PUT", &path).header("if-match", tag).json(&shared(name));
    let changed = change(&tag, "Radio").send().await.expect(200);
    assert_eq!((&changed.body["name"], &changed.body["shared"]), (&json!("Radio"), &json!(true)));
    assert_eq!(changed.body["from"], Value::Null, "a change is of the whole");
    change(&tag, "again").send().await.problem(412, "version-mismatch");
    api.post(PATH, search("Wi-Fi")).await.expect(201);
    change("*", "Wi-Fi").send().await.problem(409, "saved-search-exists");
    api.ask("DELETE", &path).header("if-match", &tag).send().await.problem(412, "version-mismatch");
    api.ask("DELETE", &path).send().await.expect(204);
    api.get(&path).await.problem(404, "no-such-saved-search");
    let told = api.get("/api/v1/audit?resource=saved-search&limit=2").await.expect(200);
    let told = told.body["items"].as_array().unwrap().clone();
    assert_eq!((&told[0]["action"], &told[0]["before"]["name"]), (&json!("saved-search.delete"), &json!("Radio")));
    assert_eq!(told[1]["action"], "saved-search.create");
}

#[tokio::test]
async fn others_see_what_is_shared_and_change_nothing_of_it() {
    let api = Api::start().await;
    let (_, ada) = api.user("ada@example.com", "viewer").await;
    let (_, bob) = api.user("bob@example.com", "support").await;
    let as_ada = |method: &str, path: &str| api.as_who(&ada, method, path);
    let as_bob = |method: &str, path: &str| api.as_who(&bob, method, path);
    let own = as_ada("POST", PATH).json(&search("mine")).send().await.expect(201).header("location").to_owned();
    let open = as_ada("POST", PATH).json(&shared("ours")).send().await.expect(201).header("location").to_owned();
    // Names are those of one user.
    as_bob("POST", PATH).json(&search("mine")).send().await.expect(201);
    let names = |reply: &crate::harness::Reply| {
        let items = reply.body["items"].as_array().unwrap().iter();
        items.map(|item| (item["name"].as_str().unwrap().to_owned(), item["mine"] == true)).collect::<Vec<_>>()
    };
    let listed = as_bob("GET", PATH).send().await.expect(200);
    assert_eq!(names(&listed), [("ours".to_owned(), false), ("mine".to_owned(), true)]);
    let first = as_bob("GET", &format!("{PATH}?limit=1")).send().await.expect(200);
    let rest = format!("{PATH}?cursor={}", first.body["next_cursor"].as_str().unwrap());
    assert_eq!(names(&as_bob("GET", &rest).send().await.expect(200)), [("mine".to_owned(), true)]);
    for method in ["GET", "PUT", "DELETE"] {
        let ask = |path| if method == "PUT" { as_bob(method, path).json(&search("x")) } else { as_bob(method, path) };
        ask(&own).send().await.problem(404, "no-such-saved-search");
        let shared = ask(&open).send().await;
        if method == "GET" {
            shared.expect(200)
        } else {
            shared.problem(403, "not-owner")
        };
    }
    // Who manages access clears away what is shared, and sees no more than that.
    api.ask("DELETE", &own).send().await.problem(404, "no-such-saved-search");
    api.ask("PUT", &open).json(&search("x")).send().await.problem(403, "not-owner");
    api.ask("DELETE", &open).send().await.expect(204);
}

#[tokio::test]
async fn what_cannot_be_asked_is_not_saved_and_there_are_only_so_many() {
    let mut setup = Setup::default();
    setup.config.logs.max_saved_searches = 1;
    let api = Api::with(setup).await;
    let with = |field: &str, value: Value| {
        let mut body = search("s");
        body[field] = value;
        body
    };
    for (field, value) in [
        ("name", json!("")),
        ("name", json!(" ")),
        ("name", json!("a\nb")),
        ("name", json!("n".repeat(101))),
        ("from", json!("yesterday")),
        ("to", json!("now-")),
        ("query", json!(7)),
        ("query", json!("x".repeat(4097))),
        ("query", json!("level:>=loud")),
        ("other", json!(1)),
    ] {
        let refused = api.post(PATH, with(field, value)).await.problem(400, "invalid");
        assert!(refused.text.contains(field), "{field}: {}", refused.text);
    }
    let ask = || api.ask("POST", PATH).header("idempotency-key", "k").json(&search("s"));
    let made = ask().send().await.expect(201);
    assert_eq!(ask().send().await.expect(201).header("location"), made.header("location"));
    api.post(PATH, search("t")).await.problem(409, "too-many");
    let (_, nobody) = api.nobody().await;
    api.as_who(&nobody, "GET", PATH).send().await.problem(403, "forbidden");
}
