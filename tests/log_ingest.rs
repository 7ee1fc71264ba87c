//! Lines that devices log come in over MQTT: acknowledged means a row, whatever was sent.

use std::process::Stdio;
use std::sync::LazyLock;

use serde_json::{Value, json};
use sqlx::Row;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;
use tokio::time::timeout;

use crate::foreign_clients::python;
use crate::harness::{Answer, Device, Fleet, PATIENCE};

/// A minute ago, in milliseconds: what is older than the retention is swept at the next start.
pub(crate) static TS: LazyLock<i64> = LazyLock::new(|| fleet_core::clock::Clock::system().now_ms() - 60_000);

/// A line as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Stored {
    pub(crate) ts_ms: i64,
    pub(crate) seq: i64,
    pub(crate) level: i16,
    pub(crate) target: Option<String>,
    pub(crate) message: String,
    pub(crate) trace: Option<String>,
    pub(crate) fields: Value,
    pub(crate) cut: i16,
    pub(crate) is_clamped: bool,
}

/// The lines of a device, the oldest first.
pub(crate) async fn lines(fleet: &Fleet, device: &str) -> Vec<Stored> {
    let rows = sqlx::query(
        "select (extract(epoch from l.ts) * 1000)::bigint as ts_ms, l.seq, l.level, l.target, l.message, l.trace_id, l.fields, l.cut,
                l.sent_at is not null as is_clamped
           from log l join device d on d.key = l.device_key
          where d.id = $1
          order by l.ts, l.writer, l.place",
    );
    let rows = rows.bind(device).fetch_all(fleet.db()).await.expect("the database answers");
    let line = |row: sqlx::postgres::PgRow| Stored {
        ts_ms: row.get("ts_ms"),
        seq: row.get("seq"),
        level: row.get("level"),
        target: row.get("target"),
        message: row.get("message"),
        trace: row.get("trace_id"),
        fields: row.get::<Option<Value>, _>("fields").unwrap_or_default(),
        cut: row.get("cut"),
        is_clamped: row.get("is_clamped"),
    };
    rows.into_iter().map(line).collect()
}

pub(crate) async fn messages(fleet: &Fleet, device: &str) -> Vec<String> {
    lines(fleet, device).await.into_iter().map(|line| line.message).collect()
}

/// Publishes these payloads with Eclipse Paho, one after the other: how many were acknowledged.
async fn paho(fleet: &Fleet, device: &Device, version: &str, payloads: &[String]) -> usize {
    let address = fleet.mqtt_addr();
    let mut client = Command::new(python())
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/paho_client.py"))
        .args([&address.ip().to_string(), &address.port().to_string(), &device.username, &device.password, &device.id])
        .args([version, "send", &device.topic("logs"), "0"])
        .kill_on_drop(true)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("`make setup` installs the test clients");
    let texts = payloads.iter().map(|payload| json!(payload).to_string()).collect::<Vec<_>>();
    let text = texts.join("\n") + "\n";
    let mut input = client.stdin.take().expect("piped");
    input.write_all(text.as_bytes()).await.expect("it reads");
    drop(input);
    let output = timeout(2 * PATIENCE, client.wait_with_output()).await.expect("it ends in time").expect("its output");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).lines().count()
}

/// Publishes text with `mosquitto_pub`, a message a line.
async fn mosquitto_pub(fleet: &Fleet, device: &Device, version: &str, text: &str) {
    let address = fleet.mqtt_addr();
    let mut client = Command::new("mosquitto_pub")
        .args(["-V", version, "-h", &address.ip().to_string(), "-p", &address.port().to_string(), "-q", "1", "-l"])
        .args(["-i", &device.id, "-u", &device.username, "-P", &device.password, "-t", &device.topic("logs")])
        .kill_on_drop(true)
        .stdin(Stdio::piped())
        .spawn()
        .expect("`make setup` installs mosquitto-clients");
    let mut input = client.stdin.take().expect("piped");
    input.write_all(text.as_bytes()).await.expect("it reads");
    drop(input);
    let status = timeout(PATIENCE, client.wait()).await.expect("it ends in time").expect("its status");
    assert!(status.success(), "{status}");
}

#[tokio::test]
async fn an_acknowledged_line_is_a_row_when_the_server_is_killed_at_once() {
    let mut fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    for round in 0..3 {
        let mut mqtt = fleet.connect(&boiler).await;
        let line = json!({"ts": *TS + round, "seq": round, "level": "warn", "target": "net.wifi", "message": format!("reconnect {round}"),
                          "fields": {"rssi": -81}, "trace_id": "ab"});
        assert_eq!(mqtt.publish(&boiler.topic("logs"), line.to_string()).await, Answer::Success);
        fleet.kill().await;
        let stored = lines(&fleet, "boiler-1").await;
        let expected = Stored {
            ts_ms: *TS + round,
            seq: round,
            level: 4,
            target: Some("net.wifi".into()),
            message: format!("reconnect {round}"),
            trace: Some("ab".into()),
            fields: json!({"rssi": -81}),
            cut: 0,
            is_clamped: false,
        };
        assert_eq!(stored.last(), Some(&expected));
        fleet.start_again().await;
    }
    assert_eq!(lines(&fleet, "boiler-1").await.len(), 3);
}

#[tokio::test]
async fn paho_and_mosquitto_send_lines_as_they_like() {
    let fleet = Fleet::start().await;
    let (paho_device, mosquitto) = (fleet.enrol("paho-1").await, fleet.enrol("mosquitto-1").await);
    let payloads = [
        json!({"ts": *TS, "seq": 1, "message": "one"}).to_string(),
        json!([{"ts": *TS + 1, "seq": 2, "message": "two"}, {"ts": *TS + 2, "seq": 3, "msg": "three"}, "four"])
            .to_string(),
        "five\nsix\n\nseven".to_owned(),
        "\"eight\"".to_owned(),
    ];
    for version in ["311", "5"] {
        assert_eq!(paho(&fleet, &paho_device, version, &payloads).await, payloads.len(), "all are acknowledged");
    }
    let stored = messages(&fleet, "paho-1").await;
    let times = |text: &str| stored.iter().filter(|message| *message == text).count();
    assert_eq!([times("one"), times("two"), times("three")], [1; 3], "sent twice with ts and seq: {stored:?}");
    assert_eq!(["four", "five", "six", "seven", "eight"].map(times), [2; 5], "at least once: {stored:?}");
    for version in ["311", "5"] {
        mosquitto_pub(&fleet, &mosquitto, version, &format!("boot {version}\n{{\"message\":\"up {version}\"}}\n"))
            .await;
    }
    assert_eq!(messages(&fleet, "mosquitto-1").await, ["boot 311", "up 311", "boot 5", "up 5"]);
    assert!((fleet.metric("muster_ingest_log_lines_duplicate_total", "").await - 3.0).abs() < 0.1);
}

#[tokio::test]
async fn what_is_no_line_goes_to_the_dead_letters_and_takes_nothing_with_it() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    let payloads: [&[u8]; 5] = [
        br#"{"message":"torn"#,
        br#"[{"message":"kept"},{"level":"warn"},7]"#,
        b"",
        b"\xff\xfe",
        br#"{"message":"x","ts":"yesterday"}"#,
    ];
    for payload in payloads {
        assert_eq!(mqtt.publish(&boiler.topic("logs"), payload).await, Answer::Success);
    }
    assert_eq!(messages(&fleet, "boiler-1").await, ["kept"]);
    let letters = fleet.get("/api/v1/dead-letters?device=boiler-1").await;
    let letters = letters["items"].as_array().expect("items").clone();
    assert_eq!(letters.len(), 6, "{letters:?}");
    assert!(letters.iter().all(|letter| letter["topic"] == boiler.topic("logs")), "{letters:?}");
    assert!(letters.iter().all(|letter| letter["reason"].as_str().is_some_and(|reason| !reason.is_empty())));
}

#[tokio::test]
async fn a_line_that_is_too_long_is_cut_and_marked() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    let fields = (0..70).map(|nth| (format!("f{nth:02}"), json!(nth))).collect::<serde_json::Map<_, _>>();
    for line in [
        json!({"ts": *TS, "seq": 0, "message": "ä".repeat(32 * 1024)}),
        json!({"ts": *TS + 1, "seq": 1, "message": "many", "fields": fields}),
        json!({"ts": *TS + 2, "seq": 2, "message": "x".repeat(32 * 1024)}),
    ] {
        assert_eq!(mqtt.publish(&boiler.topic("logs"), line.to_string()).await, Answer::Success);
    }
    let stored = lines(&fleet, "boiler-1").await;
    let seen = stored
        .iter()
        .map(|line| (line.message.len(), line.fields.as_object().map_or(0, serde_json::Map::len), line.cut));
    assert_eq!(seen.collect::<Vec<_>>(), [(32 * 1024, 0, 1), (4, 64, 2), (32 * 1024, 0, 0)]);
    assert!((fleet.metric("muster_ingest_log_lines_cut_total", "").await - 2.0).abs() < 0.1);
}

#[tokio::test]
async fn a_line_sent_twice_is_stored_once_with_and_without_a_number() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let numbered = json!({"ts": *TS, "seq": 7, "message": "numbered"}).to_string();
    let hashed = json!({"ts": *TS, "message": "hashed", "fields": {"a": 1}}).to_string();
    let other = json!({"ts": *TS, "message": "hashed", "fields": {"a": 2}}).to_string();
    // Over two connections, as after a lost acknowledgement, and both in one message.
    for _ in 0..2 {
        let mut mqtt = fleet.connect(&boiler).await;
        for payload in [&numbered, &hashed, &other, &format!("[{hashed},{hashed}]")] {
            assert_eq!(mqtt.publish(&boiler.topic("logs"), payload.clone()).await, Answer::Success);
        }
        mqtt.disconnect().await;
    }
    let mut stored = messages(&fleet, "boiler-1").await;
    stored.sort();
    assert_eq!(stored, ["hashed", "hashed", "numbered"]);
}

#[tokio::test]
async fn clocks_that_are_wrong_cost_no_line() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    let now = fleet_core::clock::Clock::system().now_ms();
    let at = [0, 1, now - 400 * 86_400_000, now - 3_600_000, now + 60_000, now + 3_600_000, 253_402_300_799_999];
    for (seq, ts) in at.into_iter().enumerate() {
        let line = json!({"ts": ts, "seq": seq, "message": format!("line {seq}")}).to_string();
        // Each once more, as after a lost acknowledgement: those that are ahead must be known again.
        for _ in 0..2 {
            assert_eq!(mqtt.publish(&boiler.topic("logs"), line.clone()).await, Answer::Success);
        }
    }
    let stored = lines(&fleet, "boiler-1").await;
    assert_eq!(stored.len(), at.len(), "{stored:?}");
    for line in &stored {
        let ts = at[usize::try_from(line.seq).expect("from 0")];
        let is_ahead = ts > now + 300_000;
        assert_eq!(line.is_clamped, is_ahead, "{line:?}");
        assert!(if is_ahead { (line.ts_ms - now).abs() < 60_000 } else { line.ts_ms == ts }, "{line:?}");
    }
    let over = json!({"ts": 253_402_300_800_000_i64, "message": "no time"}).to_string();
    assert_eq!(mqtt.publish(&boiler.topic("logs"), over).await, Answer::Success);
    assert_eq!(lines(&fleet, "boiler-1").await.len(), at.len(), "that one is a dead letter");
}

#[tokio::test]
async fn any_script_comes_back_as_it_was_written() {
    let fleet = Fleet::start().await;
    let boiler = fleet.enrol("boiler-1").await;
    let mut mqtt = fleet.connect(&boiler).await;
    let texts =
        ["Ünïcödé e\u{301}", "שלום \u{202e}abc", "温度は 42 度", "👩‍🔧 ok", "tab\tand \u{1} and \u{7f}", "a\u{fffd}b"];
    for (seq, text) in texts.iter().enumerate() {
        let line = json!({"ts": *TS, "seq": seq, "message": text, "fields": {*text: text}});
        assert_eq!(mqtt.publish(&boiler.topic("logs"), line.to_string()).await, Answer::Success);
    }
    let nul = format!(r#"{{"ts":{},"seq":99,"message":"a\u0000b","fields":{{"x\u0000":"\u0000"}}}}"#, *TS);
    assert_eq!(mqtt.publish(&boiler.topic("logs"), nul).await, Answer::Success);
    let stored = lines(&fleet, "boiler-1").await;
    let (with_nul, plain) = stored.split_last().expect("lines");
    assert_eq!(plain.iter().map(|line| line.message.as_str()).collect::<Vec<_>>(), texts);
    assert!(plain.iter().zip(texts).all(|(line, text)| line.fields == json!({ text: text })), "{plain:?}");
    assert_eq!((with_nul.message.as_str(), &with_nul.fields), ("a\u{fffd}b", &json!({ "x\u{fffd}": "\u{fffd}" })));
}

/// Lines that tell of suppressed ones, and how many they speak of.
async fn suppressed(fleet: &Fleet, device: &str) -> (usize, i64) {
    let told = lines(fleet, device).await.into_iter().filter(|line| line.target.as_deref() == Some("muster"));
    let told = told.map(|line| {
        assert_eq!(line.level, 4, "{line:?}");
        let count = line.fields["suppressed"].as_i64().expect("a number");
        assert_eq!(line.message, format!("{count} lines suppressed by the rate limit"));
        count
    });
    let told = told.collect::<Vec<_>>();
    (told.len(), told.iter().sum())
}

#[tokio::test]
async fn what_a_device_logs_too_much_is_acknowledged_and_told_of_also_after_a_kill() {
    let limits = [
        ("MUSTER__INGEST__LOG_LINES_PER_S", "1"),
        ("MUSTER__INGEST__LOG_LINES_BURST", "20"),
        ("MUSTER__INGEST__LOG_SUPPRESSED_S", "2"),
    ];
    let mut fleet = Fleet::start_with(&limits).await;
    let (noisy, quiet) = (fleet.enrol("noisy-1").await, fleet.enrol("quiet-1").await);
    let mut mqtt = fleet.connect(&noisy).await;
    for seq in 0..50 {
        let line = json!({"ts": *TS + seq, "seq": seq, "message": format!("line {seq}")});
        assert_eq!(mqtt.publish(&noisy.topic("logs"), line.to_string()).await, Answer::Success);
    }
    let array = (50..100).map(|seq| json!({"ts": *TS + seq, "seq": seq, "message": "x"})).collect::<Vec<_>>();
    assert_eq!(mqtt.publish(&noisy.topic("logs"), json!(array).to_string()).await, Answer::Success);
    // Everything was acknowledged, so everything is stored or counted, also when nobody lives to tell.
    let hit = fleet.metric("muster_ingest_log_lines_suppressed_total", "").await;
    fleet.kill().await;
    let kept = async |fleet: &Fleet| {
        let own = lines(fleet, "noisy-1").await.iter().filter(|line| line.target.is_none()).count();
        i64::try_from(own).expect("a hundred")
    };
    let stored = kept(&fleet).await;
    assert!((20..60).contains(&stored), "{stored}");
    assert_eq!(hit.round().to_string(), (100 - stored).to_string(), "{hit} of 100, {stored} stored");
    fleet.start_again().await;
    let told = || async { suppressed(&fleet, "noisy-1").await };
    let (lines_told, _) = fleet.eventually(told, |(_, count)| *count == 100 - stored).await;
    assert!((1..=4).contains(&lines_told), "one for each interval: {lines_told}");
    assert_eq!(kept(&fleet).await, stored);
    let mut mqtt = fleet.connect(&quiet).await;
    assert_eq!(mqtt.publish(&quiet.topic("logs"), "still heard").await, Answer::Success);
    assert_eq!(messages(&fleet, "quiet-1").await, ["still heard"], "one device does not cost another its lines");
}
