//! Many devices at once, from a file.

use std::time::Instant;

use fleet_core::credential;
use serde_json::{Value, json};

use crate::harness::{Api, Reply, Setup};

const PATH: &str = "/api/v1/devices/import";
const FLEET: &str = "id,type,group,labels.site,gateway\r\n\
                     freezer-1,freezer,oslo/harbour,a,gw-1\r\n\
                     gw-1,gateway,oslo,a,\r\n\
                     freezer-2,freezer,oslo/harbour,,gw-0\r\n";

async fn import(api: &Api, kind: &str, file: &str) -> Reply {
    api.ask("POST", PATH).raw(kind, file.to_owned()).send().await
}

async fn devices(api: &Api) -> usize {
    api.get("/api/v1/devices").await.expect(200).ids().len()
}

async fn opens(api: &Api, username: &str, password: &str) -> bool {
    let mut db = api.db.pool().acquire().await.unwrap();
    credential::verify(&mut db, username, password.as_bytes(), api.now()).await.unwrap().is_some()
}

#[tokio::test]
async fn a_file_becomes_devices_with_credentials() {
    let api = Api::start().await;
    api.enrol("gw-0").await;
    let checked = api.ask("POST", &format!("{PATH}?dry_run=true")).raw("text/csv", FLEET).send().await.expect(200);
    assert_eq!(checked.body, json!({"dry_run": true, "rows": 3, "enrolled": 0, "devices": []}));
    assert_eq!(devices(&api).await, 1, "a dry run enrols nothing");

    let imported = import(&api, "text/csv; charset=utf-8", FLEET).await.expect(201);
    assert_eq!((&imported.body["rows"], &imported.body["enrolled"]), (&json!(3), &json!(3)));
    let lines = imported.body["devices"].as_array().unwrap().iter().map(|one| (one["line"].clone(), one["id"].clone()));
    let expected = [(2, "freezer-1"), (3, "gw-1"), (4, "freezer-2")].map(|(line, id)| (json!(line), json!(id)));
    assert_eq!(lines.collect::<Vec<_>>(), expected);
    for one in imported.body["devices"].as_array().unwrap() {
        let text = |name: &str| one["credential"][name].as_str().unwrap();
        assert!(opens(&api, text("username"), text("password")).await, "{one}");
    }
    let child = api.get("/api/v1/devices/freezer-1").await.expect(200).body;
    let parts = (&child["type"], &child["group"], &child["labels"], &child["gateway"], &child["version"]);
    assert_eq!(parts, (&json!("freezer"), &json!("oslo/harbour"), &json!({"site": "a"}), &json!("gw-1"), &json!(1)));
    assert_eq!(api.get("/api/v1/devices/freezer-2").await.expect(200).body["gateway"], "gw-0");
}

#[tokio::test]
async fn credentials_come_as_csv_too_and_no_cell_is_a_formula() {
    let api = Api::start().await;
    let file = (0..200).map(|n| json!({"id": format!("-{n}")}).to_string()).collect::<Vec<_>>().join("\n");
    let asked = api.ask("POST", PATH).header("accept", "text/csv").raw("application/x-ndjson", file);
    let imported = asked.send().await.expect(201);
    assert_eq!(imported.header("content-type"), "text/csv; charset=utf-8");
    let mut lines = imported.text.split("\r\n");
    assert_eq!(lines.next(), Some("id,username,password"));
    let lines = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>();
    assert_eq!(lines.len(), 200);
    for line in &lines {
        assert!(line.split(',').all(|cell| !cell.starts_with(['=', '+', '-', '@'])), "{line}");
    }
    let first = lines[0].split(',').collect::<Vec<_>>();
    assert_eq!(first[..2], ["'-0", "main/-0"]);
    assert!(opens(&api, first[1], first[2]).await);
    // The answer is a file to be read again.
    let again = lines.iter().fold("id\n".to_owned(), |file, line| file + line.split(',').next().unwrap() + "\n");
    let refused = import(&api, "text/csv", &again).await.problem(422, "import-refused");
    assert_eq!(refused.body["lines"][0], json!({"line": 2, "id": "-0", "error": "device -0 exists already"}));
}

#[tokio::test]
async fn one_row_that_is_wrong_keeps_all_out() {
    let api = Api::start().await;
    for id in ["taken", "gw-0", "child"] {
        api.enrol(id).await;
    }
    let behind = api.ask("PATCH", "/api/v1/devices/child").json(&json!({"gateway": "gw-0"}));
    behind.send().await.expect(200);
    let file = json!([
        {"id": "fine"},
        {"id": "taken"},
        {"id": "a", "gateway": "nobody"},
        {"id": "b", "gateway": "b"},
        {"id": "c", "gateway": "child"},
        {"id": "d", "gateway": "e"},
        {"id": "e", "gateway": "gw-0"},
        {"id": "fine", "type": "x y"},
    ]);
    for query in ["", "?dry_run=true"] {
        let asked = api.ask("POST", &format!("{PATH}{query}")).json(&file);
        let refused = asked.send().await.problem(422, "import-refused");
        let told = refused.body["lines"].as_array().unwrap().iter();
        let told = told.map(|line| format!("{} {}", line["line"], line["error"].as_str().unwrap())).collect::<Vec<_>>();
        let beginnings = [
            "2 device taken exists already",
            "3 gateway nobody does not exist",
            "4 device b cannot be a gateway",
            "5 device child cannot be a gateway",
            "6 device e cannot be a gateway",
            "8 type: \"x y\" is not valid",
            "8 id: fine is in line 1 already",
        ];
        assert_eq!(told.len(), beginnings.len(), "{told:?}");
        for (told, beginning) in told.iter().zip(beginnings) {
            assert!(told.starts_with(beginning), "{told}: {beginning}");
        }
        assert!(refused.body["detail"].as_str().unwrap().starts_with("nothing was enrolled: 7 errors in 8 rows"));
    }
    assert_eq!(devices(&api).await, 3);
}

#[tokio::test]
async fn an_import_is_bounded() {
    let mut setup = Setup::default();
    setup.config.provisioning.max_import_rows = 3;
    setup.config.provisioning.max_import_bytes = 100;
    setup.config.provisioning.max_children = 1;
    setup.config.http.max_body_bytes = 10;
    let api = Api::with(setup).await;
    import(&api, "text/csv", "id\na\nb\nc\nd\n").await.problem(413, "too-many-rows");
    assert!(api.metric("muster_http_problems_total{type=\"too-many-rows\"}").await >= 1.0);
    let large = import(&api, "text/csv", &format!("id,labels.x\na,{}\n", "x".repeat(100))).await;
    large.problem(413, "body-too-large");
    import(&api, "text/plain", "id\na\n").await.problem(415, "unsupported-media-type");
    let crowded = import(&api, "text/csv", "id,gateway\na,g\nb,g\ng,\n").await.problem(422, "import-refused");
    let line = json!({"line": 3, "id": "b", "error": "there are 1 children of this gateway already: expected at most that many"});
    assert_eq!(crowded.body["lines"], json!([line]));
    import(&api, "text/csv", "id,gateway\na,g\ng,\n").await.expect(201);
    let crowded = import(&api, "text/csv", "id,gateway\nb,g\n").await.problem(422, "import-refused");
    assert_eq!(crowded.body["lines"][0]["line"], 2);
}

#[tokio::test]
async fn an_import_needs_the_rights_to_enrol_and_to_issue_credentials() {
    let api = Api::start().await;
    for (role, permissions, status) in
        [("enroller", json!(["devices:write"]), 403), ("importer", json!(["devices:write", "credentials:manage"]), 201)]
    {
        api.post("/api/v1/roles", json!({"id": role, "permissions": permissions})).await.expect(201);
        let (_, token) = api.user(&format!("{role}@example.com"), role).await;
        let asked = api.as_who(&token, "POST", PATH).raw("text/csv", "id\na\n");
        let reply = asked.send().await.expect(status);
        assert!(status == 201 || reply.body["detail"].as_str().unwrap().ends_with("credentials:manage"));
    }
}

#[tokio::test]
async fn an_import_that_is_sent_twice_is_made_once() {
    let api = Api::start().await;
    let send =
        |file: &str| api.ask("POST", PATH).header("idempotency-key", "k").raw("text/csv", file.to_owned()).send();
    assert_eq!(send("id\na\n").await.expect(201).body["devices"].as_array().unwrap().len(), 1);
    let again = send("id\na\n").await.expect(201);
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.body, json!({"dry_run": false, "rows": 1, "enrolled": 1, "devices": []}));
    send("id\nb\n").await.problem(422, "idempotency-conflict");
    assert_eq!(devices(&api).await, 1);
}

#[tokio::test]
async fn of_two_imports_of_one_name_one_is_made() {
    let api = Api::start().await;
    let file = "id\nb\na\nc\n";
    let (one, other) = tokio::join!(import(&api, "text/csv", file), import(&api, "text/csv", "id\nc\na\nb\n"));
    let mut statuses = [one.status.as_u16(), other.status.as_u16()];
    statuses.sort_unstable();
    assert_eq!(statuses, [201, 422], "{} {}", one.text, other.text);
    assert_eq!(devices(&api).await, 3);
}

/// Run by hand: `cargo nextest run -p api --run-ignored only --no-capture ten_thousand`.
#[tokio::test]
#[ignore = "prints how long an import takes"]
async fn ten_thousand_devices() {
    let api = Api::start().await;
    let row = |n: usize| {
        format!(
            "freezer-{n},freezer,oslo/line-{},harbour,{}\r\n",
            n % 20,
            if n < 100 { String::new() } else { format!("freezer-{}", n % 100) }
        )
    };
    let file = (0..10_000).fold("id,type,group,labels.site,gateway\r\n".to_owned(), |file, n| file + &row(n));
    println!("{} bytes", file.len());
    for path in [format!("{PATH}?dry_run=true"), PATH.to_owned(), PATH.to_owned()] {
        let began = Instant::now();
        let reply = api.ask("POST", &path).raw("text/csv", file.clone()).send().await;
        println!("{path}: {} after {} ms, {} bytes", reply.status, began.elapsed().as_millis(), reply.text.len());
        assert_ne!(reply.body, Value::Null);
    }
}
