//! Nobody finds, counts or sees a trace of a line out of reach.

use std::time::Duration;

use super::super::*;
use super::fixture::{Built, NOW, Spec, TENANT, ask};
use crate::log::{Batch, Limits, context, insert_batch, prepare};
use crate::telemetry::fixture::enrol;
use crate::tenancy::{self, Bounds};
use crate::testing::TestDb;

const OTHER: TenantKey = TenantKey(2);

fn spec(tenant: TenantKey, device: i64, said: &str) -> Spec {
    Spec {
        tenant,
        device: DeviceKey(device),
        level: i16::try_from(device).unwrap(),
        target: Some(said.to_owned()),
        fields: serde_json::json!({ "who": said }).as_object().unwrap().clone(),
        ..Spec::new(NOW + device, &format!("secret of {said}"))
    }
}

/// Two devices of the caller's tenant, of which the second may be out of scope, and one of another tenant.
fn built() -> Built {
    Built::new(&[spec(TENANT, 1, "mine"), spec(TENANT, 2, "colleague"), spec(OTHER, 3, "stranger")], 1)
}

fn told(text: &str, devices: Option<&[i64]>) -> Vec<Vec<String>> {
    let built = built();
    let devices = devices.map(|keys| Arc::new(keys.iter().map(|key| DeviceKey(*key)).collect()));
    let ask = Ask { reach: Reach { tenant: TENANT, devices }, ..ask(text) };
    let page =
        |order| built.page(&ask, order, None, 10).hits.iter().map(|hit| hit.device.0.to_string()).collect::<Vec<_>>();
    let top = |field| {
        let top = built.top(&ask, field, 10).unwrap();
        assert_eq!((top.others, top.uncounted), (0, 0));
        top.values.into_iter().map(|(value, _)| value).collect::<Vec<_>>()
    };
    let buckets = built.histogram(&ask, 1).unwrap();
    let patterns = built.patterns(&ask, Some(NOW));
    let patterns = patterns.found.iter().map(|found| found.newest.device.0.to_string()).collect::<Vec<_>>();
    vec![
        page(Order::Oldest),
        page(Order::Newest).into_iter().rev().collect(),
        top("device"),
        buckets.iter().map(|bucket| (bucket.start_ms - NOW).to_string()).collect(),
        buckets.iter().map(|bucket| (bucket.by_level.iter().position(|n| *n > 0).unwrap() + 1).to_string()).collect(),
        {
            let mut patterns = patterns;
            patterns.sort();
            patterns
        },
        {
            let mut who = top("fields.who");
            assert!(
                top("target").len() == who.len()
                    && top("level").len() == who.len()
                    && top("pattern").len() == who.len()
            );
            who.sort_by_key(|who| ["mine", "colleague", "stranger"].iter().position(|name| name == who));
            who.iter().map(|who| if who == "mine" { "1".to_owned() } else { "2".to_owned() }).collect()
        },
        (1..=built.count(&ask)).map(|nth| nth.to_string()).collect(),
    ]
}

#[test]
fn every_question_is_asked_within_reach() {
    for text in ["*", "secret", "NOT nothing", "NOT fields.none:*", "secret OR NOT secret", "level:*", "fields.who:*"] {
        for (devices, wanted) in [(None, vec!["1", "2"]), (Some(&[1_i64][..]), vec!["1"]), (Some(&[]), vec![])] {
            for told in told(text, devices) {
                assert_eq!(told, wanted, "{text} of {devices:?}");
            }
        }
    }
    for told in told("stranger", None).into_iter().chain(told("colleague", Some(&[1]))) {
        assert_eq!(told, [""; 0], "by name it is not found either");
    }
    for told in told("device:stranger", Some(&[3])) {
        assert_eq!(told, [""; 0], "a key of another tenant opens nothing");
    }
}

#[tokio::test]
async fn lines_are_read_back_as_far_as_the_transaction_sees() {
    let db = TestDb::new().await;
    let mut conn = db.pool().acquire().await.unwrap();
    let mut hits = Vec::new();
    let mut keys = Vec::new();
    for (nth, id) in ["pump-1", "fan-1"].into_iter().enumerate() {
        let device = enrol(&mut conn, db.tenant(), id).await;
        sqlx::query("update device set type = split_part(id, '-', 1)").execute(&mut *conn).await.unwrap();
        let mut batch = Batch::default();
        for seq in 0..5 {
            let line = format!(r#"{{"ts":{},"seq":{seq},"message":"line {seq}"}}"#, NOW + seq / 2);
            batch.push(device, line.as_bytes(), NOW + 10, &Limits { max_lines: 9, max_ahead_ms: 1000 });
        }
        prepare(&mut conn, &mut batch).await.unwrap();
        let writer = i16::try_from(nth).unwrap();
        insert_batch(&mut conn, writer, &batch).await.unwrap();
        hits.push(Hit { address: Address { ts_ms: NOW, writer, place: 2 }, device });
        keys.push(device);
    }
    let bounds = [
        (Bounds::of(db.tenant()), 2),
        (Bounds::of(db.tenant()).within(r#"[{"type":"pump"}]"#), 1),
        (Bounds::of(db.tenant()).within(r#"[{"type":"saw"}]"#), 0),
        (Bounds::of(TenantKey(db.tenant().0 + 1)), 0),
    ];
    for (bounds, sees) in bounds {
        let mut tx = tenancy::begin(db.pool(), &bounds, Duration::from_secs(10)).await.unwrap();
        let lines = fetch(&mut tx, db.tenant(), &hits).await.unwrap();
        assert_eq!(lines.iter().map(|line| line.device).collect::<Vec<_>>(), keys[..sees], "{bounds:?}");
        let reach = Reach::of(&mut tx, db.tenant()).await.unwrap();
        let of_scope = reach.devices.map(|devices| devices.iter().collect::<Vec<_>>());
        let is_scoped = !bounds.eq(&Bounds::of(db.tenant())) && !bounds.eq(&Bounds::of(TenantKey(db.tenant().0 + 1)));
        assert_eq!(of_scope, is_scoped.then(|| keys[..sees].to_vec()));
        let mut top = Top { values: keys.iter().map(|key| (key.0.to_string(), 1)).collect(), ..Top::default() };
        top.name_devices(&mut tx, db.tenant()).await.unwrap();
        let names = top.values.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
        assert_eq!(names, ["pump-1", "fan-1"][..sees]);
        let around = context(&mut tx, keys[0], (NOW, 1), 9, 2).await.unwrap();
        let around = around.iter().flat_map(|found| found.before.iter().chain([&found.line]).chain(&found.after));
        let around = around.map(|line| line.message.as_str()).collect::<Vec<_>>();
        let wanted = ["line 0", "line 1", "line 2", "line 3"];
        assert_eq!(around, wanted[..if sees > 0 { 4 } else { 0 }]);
    }
}
