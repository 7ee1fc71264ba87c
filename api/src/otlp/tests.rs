//! What a request becomes, in both encodings.

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use fleet_core::level::Level;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

/// The example of the specification's repository (`examples/logs.json`), with a structured body beside it.
const EXAMPLE: &str = r#"{
  "resourceLogs": [{
    "resource": { "attributes": [{ "key": "service.name", "value": { "stringValue": "my.service" } }] },
    "scopeLogs": [{
      "scope": {
        "name": "my.library", "version": "1.0.0",
        "attributes": [{ "key": "my.scope.attribute", "value": { "stringValue": "some scope attribute" } }]
      },
      "logRecords": [{
        "timeUnixNano": "1544712660300000007", "observedTimeUnixNano": "1544712660300000000",
        "severityNumber": 10, "severityText": "Information",
        "traceId": "5B8EFFF798038103D269B633813FC60C", "spanId": "EEE19B7EC3C1B174",
        "body": { "stringValue": "Example log record" },
        "attributes": [
          { "key": "string.attribute", "value": { "stringValue": "some string" } },
          { "key": "boolean.attribute", "value": { "boolValue": true } },
          { "key": "int.attribute", "value": { "intValue": "10" } },
          { "key": "double.attribute", "value": { "doubleValue": 637.704 } },
          { "key": "array.attribute", "value": { "arrayValue": { "values": [
            { "stringValue": "many" }, { "stringValue": "values" }] } } },
          { "key": "map.attribute", "value": { "kvlistValue": { "values": [
            { "key": "some.map.key", "value": { "stringValue": "some value" } }] } } },
          { "key": "device.id", "value": { "stringValue": "boiler-1" } }
        ]
      }, {
        "observedTimeUnixNano": "1544712660300000000", "severityText": "loud",
        "body": { "kvlistValue": { "values": [
          { "key": "message", "value": { "stringValue": "structured" } }, { "key": "n", "value": { "intValue": 7 } }] } },
        "futureMember": 1
      }]
    }]
  }]
}"#;

/// Largest body.
const MOST: usize = 100_000;

fn lines(request: ExportLogsServiceRequest) -> Vec<fleet_core::log::Record> {
    let mut lines = Vec::new();
    for resource in request.resource_logs {
        for scope in resource.scope_logs {
            for record in scope.log_records {
                lines.push(record::line(record, resource.resource.as_ref(), scope.scope.as_ref()));
            }
        }
    }
    lines
}

fn fields(line: &fleet_core::log::Record) -> Value {
    Value::Object(line.fields.iter().cloned().collect())
}

#[test]
fn the_example_of_the_specification_is_read_in_both_encodings() {
    let request = Encoding::Json.read(EXAMPLE.as_bytes(), MOST).unwrap();
    assert_eq!(Encoding::Protobuf.read(&request.encode_to_vec(), MOST).unwrap(), request);
    let record = &request.resource_logs[0].scope_logs[0].log_records[0];
    let of_resource = record::names_of_resource(request.resource_logs[0].resource.as_ref());
    assert_eq!(record::names(record, &of_resource).collect::<Vec<_>>(), ["boiler-1"]);
    let lines = lines(request);
    let (first, second) = (&lines[0], &lines[1]);
    assert_eq!((first.ts_ms, first.told_apart_by, first.level), (Some(1_544_712_660_300), 7, Level::Info));
    assert_eq!((first.target.as_deref(), first.message.as_str()), (Some("my.library"), "Example log record"));
    assert_eq!(first.trace.as_deref(), Some("5b8efff798038103d269b633813fc60c"));
    let expected = json!({
        "string.attribute": "some string", "boolean.attribute": true, "int.attribute": 10, "double.attribute": 637.704,
        "array.attribute": ["many", "values"], "map.attribute": { "some.map.key": "some value" },
        "span_id": "eee19b7ec3c1b174", "scope.my.scope.attribute": "some scope attribute", "resource.service.name": "my.service",
    });
    assert_eq!(fields(first), expected);
    assert_eq!(
        (second.ts_ms, second.message.as_str(), second.level),
        (Some(1_544_712_660_300), "structured", Level::Info)
    );
    assert_eq!((&fields(second)["n"], &fields(second)["severity_text"]), (&json!(7), &json!("loud")));
}

#[test]
fn a_device_is_named_by_the_record_then_by_its_resource() {
    let attribute = |name: &str, value: &str| json!({ "key": name, "value": { "stringValue": value } });
    let resource = ["host.name", "service.instance.id", "device.id"].map(|name| attribute(name, name));
    let request = json!({ "resourceLogs": [{
        "resource": { "attributes": resource },
        "scopeLogs": [{ "logRecords": [{ "attributes": [attribute("device.id", "own")] }, {}] }],
    }] });
    let request = Encoding::Json.read(request.to_string().as_bytes(), MOST).unwrap();
    let resource = &request.resource_logs[0];
    let of_resource = record::names_of_resource(resource.resource.as_ref());
    let names = |nth: usize| record::names(&resource.scope_logs[0].log_records[nth], &of_resource).collect::<Vec<_>>();
    assert_eq!(names(0), ["own", "device.id", "service.instance.id", "host.name"]);
    assert_eq!(names(1), ["device.id", "service.instance.id", "host.name"]);
}

#[test]
fn a_body_is_inflated_up_to_its_bound() {
    let mut headers = HeaderMap::new();
    let plain = Bytes::from_static(b"plain");
    assert_eq!(inflated(&headers, plain.clone(), 3).unwrap(), plain, "it was bounded when it was received");
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("gzip"));
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(&vec![b'x'; 1_000_000]).unwrap();
    let bomb = Bytes::from(encoder.finish().unwrap());
    assert!(bomb.len() < 2000);
    assert_eq!(inflated(&headers, bomb.clone(), 1_000_000).unwrap().len(), 1_000_000);
    assert_eq!(inflated(&headers, bomb, 999_999).unwrap_err().status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(inflated(&headers, plain.clone(), 100).unwrap_err().status, StatusCode::BAD_REQUEST);
    headers.insert(header::CONTENT_ENCODING, HeaderValue::from_static("br"));
    assert_eq!(inflated(&headers, plain, 100).unwrap_err().status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

proptest! {
    #[test]
    fn any_bytes_are_read_or_refused(body in prop::collection::vec(any::<u8>(), 0..200), flips in prop::collection::vec((0_usize..400, any::<u8>()), 0..8)) {
        let mut near = Encoding::Json.read(EXAMPLE.as_bytes(), MOST).unwrap().encode_to_vec();
        for (at, byte) in flips {
            let at = at % near.len();
            near[at] = byte;
        }
        for body in [body, near] {
            for (_, encoding) in Encoding::ALL {
                if let Ok(request) = encoding.read(&body, MOST) {
                    for line in lines(request) {
                        prop_assert!(line.told_apart_by < 1_000_000);
                    }
                }
            }
        }
    }
}
