//! What of a log record becomes which part of a line.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use fleet_core::level::Level;
use fleet_core::log::{MAX_FIELDS, Record};
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::common::v1::{AnyValue, InstrumentationScope, KeyValue};
use opentelemetry_proto::tonic::logs::v1::LogRecord;
use opentelemetry_proto::tonic::resource::v1::Resource;
use serde_json::{Map, Value};

/// The attribute that names the device, of a record or of its resource.
pub(crate) const DEVICE_ID: &str = "device.id";
/// Attributes of the resource that may name it otherwise, in this order.
const OTHERWISE: [&str; 2] = ["service.instance.id", "host.name"];

const NANOS_A_MS: u64 = 1_000_000;

/// Names that the records of a resource may belong to, the most particular first.
pub(crate) fn names_of_resource(resource: Option<&Resource>) -> Vec<&str> {
    let attributes = resource.map_or(&[][..], |resource| &resource.attributes);
    std::iter::once(DEVICE_ID).chain(OTHERWISE).filter_map(|name| text_of(attributes, name)).collect()
}

/// Names that a record may belong to: its own before those of its resource.
pub(crate) fn names<'a>(record: &'a LogRecord, of_resource: &'a [&'a str]) -> impl Iterator<Item = &'a str> {
    text_of(&record.attributes, DEVICE_ID).into_iter().chain(of_resource.iter().copied())
}

fn text_of<'a>(attributes: &'a [KeyValue], name: &str) -> Option<&'a str> {
    let attribute = attributes.iter().find(|attribute| attribute.key == name)?;
    match attribute.value.as_ref()?.value.as_ref()? {
        Any::StringValue(text) => Some(text),
        _ => None,
    }
}

/// The line of a record.
pub(crate) fn line(record: LogRecord, resource: Option<&Resource>, scope: Option<&InstrumentationScope>) -> Record {
    let nanos = if record.time_unix_nano == 0 { record.observed_time_unix_nano } else { record.time_unix_nano };
    let (message, mut fields) = body(record.body, &record.event_name);
    let level = Level::from_severity(record.severity_number).or_else(|| record.severity_text.parse().ok());
    let level = level.unwrap_or_default();
    if !record.severity_text.is_empty() && record.severity_text.parse().ok() != Some(level) {
        fields.push(("severity_text".to_owned(), record.severity_text.into()));
    }
    fields.extend(record.attributes.into_iter().map(|attribute| (attribute.key, json(attribute.value))));
    if !record.event_name.is_empty() {
        fields.push(("event.name".to_owned(), record.event_name.into()));
    }
    fields.extend(id(&record.span_id).map(|id| ("span_id".to_owned(), id.into())));
    if record.dropped_attributes_count > 0 {
        fields.push(("dropped_attributes_count".to_owned(), record.dropped_attributes_count.into()));
    }
    fields.extend(scope.into_iter().flat_map(|scope| within("scope", &scope.attributes)));
    fields.extend(resource.into_iter().flat_map(|resource| within("resource", &resource.attributes)));
    // By these the line was found to be the device's.
    fields.retain(|(name, _)| name != DEVICE_ID && name != "resource.device.id");
    Record {
        ts_ms: (nanos > 0).then(|| i64::try_from(nanos / NANOS_A_MS).unwrap_or(i64::MAX)),
        level,
        target: scope.map(|scope| scope.name.clone()).filter(|name| !name.is_empty()),
        message,
        trace: id(&record.trace_id),
        fields,
        told_apart_by: i64::try_from(nanos % NANOS_A_MS).unwrap_or_default(),
    }
}

/// The message, and what else a structured body says.
fn body(body: Option<AnyValue>, event_name: &str) -> (String, Vec<(String, Value)>) {
    match json(body) {
        Value::String(text) => (text, Vec::new()),
        Value::Null => (event_name.to_owned(), Vec::new()),
        Value::Object(mut members) => match members.remove("message").or_else(|| members.remove("msg")) {
            Some(Value::String(text)) => (text, members.into_iter().collect()),
            Some(other) => (other.to_string(), members.into_iter().collect()),
            None => (Value::Object(members).to_string(), Vec::new()),
        },
        other => (other.to_string(), Vec::new()),
    }
}

/// Attributes that many records share. Each has a copy of its own, so there are no more than a line keeps, and one by which it is marked
/// as cut, whatever becomes of [`DEVICE_ID`].
fn within<'a>(what: &'a str, attributes: &'a [KeyValue]) -> impl Iterator<Item = (String, Value)> + use<'a> {
    attributes
        .iter()
        .take(MAX_FIELDS + 2)
        .map(move |attribute| (format!("{what}.{}", attribute.key), json(attribute.value.clone())))
}

/// A trace or span id; one of zeros is none.
fn id(bytes: &[u8]) -> Option<String> {
    bytes.iter().any(|byte| *byte != 0).then(|| hex::encode(bytes))
}

fn json(value: Option<AnyValue>) -> Value {
    match value.and_then(|value| value.value) {
        None | Some(Any::StringValueStrindex(_)) => Value::Null,
        Some(Any::StringValue(text)) => Value::String(text),
        Some(Any::BoolValue(value)) => Value::Bool(value),
        Some(Any::IntValue(number)) => number.into(),
        // NaN and the infinities are no numbers in JSON.
        Some(Any::DoubleValue(number)) if !number.is_finite() => Value::String(number.to_string()),
        Some(Any::DoubleValue(number)) => number.into(),
        Some(Any::BytesValue(bytes)) => Value::String(STANDARD.encode(bytes)),
        Some(Any::ArrayValue(array)) => array.values.into_iter().map(|value| json(Some(value))).collect(),
        Some(Any::KvlistValue(list)) => {
            Value::Object(list.values.into_iter().map(|one| (one.key, json(one.value))).collect::<Map<_, _>>())
        }
    }
}
