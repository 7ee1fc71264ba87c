//! What a request takes in memory once it is read, told from its bytes alone, before it is.
//!
//! Holds: what is told is at least what its parts take; telling takes no more than a few bytes a part, and ends at the bound.
//! Why: in Protobuf two bytes are a whole record, which takes a hundred times as much when it is read.
//! Ignorant of: what the parts say. Their texts take what they take in the body.

use std::mem::size_of;

use opentelemetry_proto::tonic::common::v1::{AnyValue, EntityRef, KeyValue};
use opentelemetry_proto::tonic::logs::v1::{LogRecord, ResourceLogs, ScopeLogs};
use prost::DecodeError;
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// A message of the protocol that may hold others.
#[derive(Debug, Clone, Copy)]
enum Message {
    Request,
    ResourceLogs,
    Resource,
    EntityRef,
    ScopeLogs,
    Scope,
    Record,
    Attribute,
    Value,
    Array,
    List,
    Text,
}

impl Message {
    /// What stands under a number, and what one more of it takes; nothing where it has its place in the message already.
    fn member(self, tag: u32) -> Option<(Self, usize)> {
        Some(match (self, tag) {
            (Self::Request, 1) => (Self::ResourceLogs, size_of::<ResourceLogs>()),
            (Self::ResourceLogs, 1) => (Self::Resource, 0),
            (Self::ResourceLogs, 2) => (Self::ScopeLogs, size_of::<ScopeLogs>()),
            (Self::Resource, 3) => (Self::EntityRef, size_of::<EntityRef>()),
            (Self::EntityRef, 3 | 4) => (Self::Text, size_of::<String>()),
            (Self::ScopeLogs, 1) => (Self::Scope, 0),
            (Self::ScopeLogs, 2) => (Self::Record, size_of::<LogRecord>()),
            (Self::Resource | Self::List, 1) | (Self::Scope, 3) | (Self::Record, 6) => {
                (Self::Attribute, size_of::<KeyValue>())
            }
            (Self::Record, 5) | (Self::Attribute, 2) => (Self::Value, 0),
            (Self::Value, 5) => (Self::Array, 0),
            (Self::Value, 6) => (Self::List, 0),
            (Self::Array, 1) => (Self::Value, size_of::<AnyValue>()),
            _ => return None,
        })
    }
}

/// What the parts of a request in Protobuf take, as far as that is at most `most`; `None` when it is more.
///
/// # Errors
/// It is no request.
pub(crate) fn of_protobuf(body: &[u8], most: usize) -> Result<Option<usize>, DecodeError> {
    let (mut taken, mut waiting) = (0, vec![(Message::Request, body)]);
    while let Some((message, mut bytes)) = waiting.pop() {
        while !bytes.is_empty() {
            let (tag, wire_type) = decode_key(&mut bytes)?;
            let from_here = bytes;
            skip_field(wire_type, tag, &mut bytes, DecodeContext::default())?;
            let member = message.member(tag).filter(|_| wire_type == WireType::LengthDelimited);
            let Some((member, more)) = member else { continue };
            let mut inner = &from_here[..from_here.len() - bytes.len()];
            decode_varint(&mut inner)?;
            taken += more;
            if taken > most {
                return Ok(None);
            }
            if !matches!(member, Message::Text) && !inner.is_empty() {
                waiting.push((member, inner));
            }
        }
    }
    Ok(Some(taken))
}

/// The same of one in JSON, in which every part begins with a bracket, and a value that nobody asks for is held for a while.
pub(crate) fn of_json(body: &[u8], most: usize) -> Option<usize> {
    /// Of a name and a value that are held.
    const HELD: usize = 64;
    let (mut taken, mut is_text, mut is_escaped) = (0, false, false);
    for byte in body {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_text => is_escaped = true,
            b'"' => is_text = !is_text,
            b'{' | b'[' if !is_text => taken += size_of::<LogRecord>(),
            b',' if !is_text => taken += HELD,
            _ => {}
        }
        if taken > most {
            return None;
        }
    }
    Some(taken)
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;
    use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
    use opentelemetry_proto::tonic::common::v1::{ArrayValue, InstrumentationScope, KeyValueList};
    use opentelemetry_proto::tonic::resource::v1::Resource;
    use proptest::collection::vec;
    use proptest::prelude::*;
    use prost::Message as _;

    use super::*;

    fn value() -> impl Strategy<Value = AnyValue> {
        let plain = prop_oneof![
            Just(None),
            "[a-c\"\\\\{\\[,]{0,3}".prop_map(|text| Some(Any::StringValue(text))),
            any::<i64>().prop_map(|number| Some(Any::IntValue(number))),
        ];
        let plain = plain.prop_map(|value| AnyValue { value });
        plain.prop_recursive(3, 12, 4, |inner| {
            prop_oneof![
                vec(inner.clone(), 0..4).prop_map(|values| Any::ArrayValue(ArrayValue { values })),
                vec(("[a-b]{0,2}", proptest::option::of(inner)), 0..4)
                    .prop_map(|members| Any::KvlistValue(KeyValueList { values: attributes(members) })),
            ]
            .prop_map(|value| AnyValue { value: Some(value) })
        })
    }

    fn attributes(members: Vec<(String, Option<AnyValue>)>) -> Vec<KeyValue> {
        members.into_iter().map(|(key, value)| KeyValue { key, value, ..KeyValue::default() }).collect()
    }

    fn some_attributes() -> impl Strategy<Value = Vec<KeyValue>> {
        vec(("[a-b]{0,2}", proptest::option::of(value())), 0..3).prop_map(attributes)
    }

    fn request() -> impl Strategy<Value = ExportLogsServiceRequest> {
        let record = (proptest::option::of(value()), some_attributes(), vec(any::<u8>(), 0..3))
            .prop_map(|(body, attributes, trace_id)| LogRecord { body, attributes, trace_id, ..LogRecord::default() });
        let scope = some_attributes()
            .prop_map(|attributes| InstrumentationScope { attributes, ..InstrumentationScope::default() });
        let scope_logs = (proptest::option::of(scope), vec(record, 0..4)).prop_map(|(scope, log_records)| ScopeLogs {
            scope,
            log_records,
            ..ScopeLogs::default()
        });
        let entity = vec("[a-b]{0,2}", 0..3).prop_map(|id_keys| EntityRef { id_keys, ..EntityRef::default() });
        let resource = (some_attributes(), vec(entity, 0..2)).prop_map(|(attributes, entity_refs)| Resource {
            attributes,
            entity_refs,
            ..Resource::default()
        });
        let resource_logs = (proptest::option::of(resource), vec(scope_logs, 0..3))
            .prop_map(|(resource, scope_logs)| ResourceLogs { resource, scope_logs, ..ResourceLogs::default() });
        vec(resource_logs, 0..3).prop_map(|resource_logs| ExportLogsServiceRequest { resource_logs })
    }

    /// What the parts of a request take that was read.
    fn taken(request: &ExportLogsServiceRequest) -> usize {
        let resource_logs = request.resource_logs.iter().map(|logs| {
            let resource = logs.resource.as_ref().map_or(0, |resource| {
                let keys = |entity: &EntityRef| size_of::<EntityRef>() + entity.id_keys.len() * size_of::<String>();
                of_attributes(&resource.attributes) + resource.entity_refs.iter().map(keys).sum::<usize>()
            });
            let scopes = logs.scope_logs.iter().map(|logs| {
                let scope = logs.scope.as_ref().map_or(0, |scope| of_attributes(&scope.attributes));
                let records = logs.log_records.iter().map(|record| {
                    let body = record.body.as_ref().map_or(0, of_value);
                    size_of::<LogRecord>() + body + of_attributes(&record.attributes)
                });
                size_of::<ScopeLogs>() + scope + records.sum::<usize>()
            });
            size_of::<ResourceLogs>() + resource + scopes.sum::<usize>()
        });
        resource_logs.sum()
    }

    fn of_attributes(attributes: &[KeyValue]) -> usize {
        let one = |attribute: &KeyValue| size_of::<KeyValue>() + attribute.value.as_ref().map_or(0, of_value);
        attributes.iter().map(one).sum()
    }

    fn of_value(value: &AnyValue) -> usize {
        match &value.value {
            Some(Any::ArrayValue(array)) => {
                array.values.iter().map(|value| size_of::<AnyValue>() + of_value(value)).sum()
            }
            Some(Any::KvlistValue(list)) => of_attributes(&list.values),
            _ => 0,
        }
    }

    proptest! {
        #[test]
        fn it_is_told_what_a_request_takes(request in request()) {
            let parts = taken(&request);
            prop_assert_eq!(of_protobuf(&request.encode_to_vec(), usize::MAX).unwrap(), Some(parts));
            let json = serde_json::to_vec(&request).unwrap();
            prop_assert!(of_json(&json, usize::MAX).unwrap() >= parts);
            prop_assert_eq!(of_protobuf(&request.encode_to_vec(), parts).unwrap(), Some(parts), "at the bound");
            if parts > 0 {
                prop_assert_eq!(of_protobuf(&request.encode_to_vec(), parts - 1).unwrap(), None, "beyond it");
            }
        }

        #[test]
        fn whatever_can_be_read_is_told(request in request(), flips in vec((any::<usize>(), any::<u8>()), 0..6)) {
            let mut body = request.encode_to_vec();
            for (at, byte) in flips {
                if let Some(place) = at.checked_rem(body.len()).map(|at| &mut body[at]) {
                    *place = byte;
                }
            }
            let told = of_protobuf(&body, usize::MAX);
            if let Ok(read) = ExportLogsServiceRequest::decode(&*body) {
                prop_assert!(told.unwrap().unwrap() >= taken(&read));
            }
        }
    }
}
