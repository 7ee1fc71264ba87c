//! The OpenAPI document says what is there.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::harness::Api;

/// For people, and no part of the API.
const PAGES: [&str; 4] = ["/", "/docs", "/docs/", "/docs/{*file}"];

fn document() -> Value {
    serde_json::from_str(&api::openapi_json()).unwrap()
}

#[test]
fn the_file_in_the_repository_is_the_document() {
    let file = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
    let kept = std::fs::read_to_string(file).unwrap_or_default();
    assert!(
        kept == api::openapi_json(),
        "api/openapi.json is not what the code says: `cargo run -p api --example openapi` writes it"
    );
}

#[tokio::test]
async fn the_router_and_the_document_have_the_same_routes() {
    let api = Api::start().await;
    let routed = api.routes().into_iter().filter(|path| !PAGES.contains(&path.as_str())).collect::<BTreeSet<_>>();
    let documented = document()["paths"].as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
    assert!(routed.contains("/api/v1/devices/{id}"), "{routed:?}");
    assert_eq!(routed, documented);
}

#[tokio::test]
async fn a_parameter_that_is_documented_is_known() {
    let api = Api::start().await;
    api.enrol("boiler-1").await;
    for (path, item) in document()["paths"].as_object().unwrap() {
        let parameters = item["get"]["parameters"].as_array().cloned().unwrap_or_default();
        for parameter in parameters.iter().filter(|parameter| parameter["in"] == "query") {
            let name = parameter["name"].as_str().unwrap();
            let reply = api.get(&format!("{}?{name}=x", path.replace("{id}", "boiler-1"))).await;
            assert!(!reply.text.contains("unknown parameter"), "{path}: {name}: {}", reply.text);
        }
    }
}

#[tokio::test]
async fn the_document_is_served_and_can_be_browsed() {
    let api = Api::start().await;
    let served = api.anonymous("GET", "/api/v1/openapi.json").send().await.expect(200);
    assert_eq!(served.text, api::openapi_json());
    assert!(served.body["openapi"].as_str().unwrap().starts_with("3.1"));
    for path in ["/", "/docs"] {
        let reply = api.anonymous("GET", path).send().await.expect(307);
        assert_eq!(reply.header("location"), "/docs/");
    }
    let page = api.anonymous("GET", "/docs/").send().await.expect(200);
    assert!(page.header("content-type").starts_with("text/html"));
    assert!(page.header("content-security-policy").contains("style-src 'self' 'unsafe-inline'"));
    let start = api.anonymous("GET", "/docs/swagger-initializer.js").send().await.expect(200);
    assert!(start.text.contains("/api/v1/openapi.json"), "{}", start.text);
    assert!(!page.text.contains("http://") && !page.text.contains("https://"), "loads nothing from elsewhere");
    for source in page.text.split("src=\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        let path = format!("/docs/{}", source.trim_start_matches("./"));
        api.anonymous("GET", &path).send().await.expect(200);
    }
    api.anonymous("GET", "/docs/none.js").send().await.problem(404, "no-such-route");
    api.anonymous("GET", "/docs/%2e%2e/%00").send().await.problem(404, "no-such-route");
}
