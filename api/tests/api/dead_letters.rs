//! Dead letters over REST.

use fleet_core::dead_letter::{self, DeadLetter};
use fleet_core::id::DeadLetterId;
use serde_json::{Value, json};

use crate::harness::{Api, NOON_MS};

fn letter(api: &Api, device: &str, payload: &[u8]) -> DeadLetter {
    DeadLetter {
        id: DeadLetterId::new(),
        tenant: api.db.tenant(),
        device: device.parse().unwrap(),
        topic: format!("fleet/v1/main/{device}/telemetry"),
        reason: "not JSON".to_owned(),
        payload: payload.to_vec().into(),
        received_ms: NOON_MS,
    }
}

#[tokio::test]
async fn dead_letters_are_told_newest_first_page_by_page() {
    let api = Api::start().await;
    let mut letters = (0..4).map(|n| letter(&api, "a", format!("{n}").as_bytes())).collect::<Vec<_>>();
    letters.push(letter(&api, "b", b"\xff\0"));
    dead_letter::insert(&mut api.db.pool().acquire().await.unwrap(), &letters).await.unwrap();
    let path = "/api/v1/dead-letters";
    let first = api.get(&format!("{path}?limit=2")).await.expect(200);
    assert_eq!(
        first.body["items"][0],
        json!({
            "id": letters[4].id.to_string(), "device": "b", "topic": "fleet/v1/main/b/telemetry", "reason": "not JSON",
            "payload": null, "payload_base64": "/wA=", "received_at": "2025-11-21T12:00:00.000Z",
        })
    );
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = api.get(&format!("{path}?device=a&limit=3{cursor}")).await.expect(200).body;
        seen.extend(page["items"].as_array().unwrap().iter().map(|item| item["payload"].as_str().unwrap().to_owned()));
        let Some(next) = page["next_cursor"].as_str() else { break };
        cursor = format!("&cursor={next}");
    }
    assert_eq!(seen, ["3", "2", "1", "0"]);
    let none = api.get(&format!("{path}?device=c")).await.expect(200).body;
    assert_eq!((&none["items"], &none["next_cursor"]), (&json!([]), &Value::Null));
    for query in ["device=a%00", "device=", "limit=0", "cursor=ZGE", "reason=x"] {
        api.get(&format!("{path}?{query}")).await.problem(400, "invalid");
    }
}
