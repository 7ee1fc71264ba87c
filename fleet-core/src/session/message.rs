//! A message as sessions, wills and retained topics keep it.

use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// What a message counts beside its topic and payload.
pub const ROW_BYTES: usize = 64;

/// A message. Its texts hold no U+0000, as MQTT demands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Where it was sent.
    pub topic: String,
    /// What was sent.
    #[serde(with = "base64_bytes")]
    pub payload: Bytes,
    /// How: 0, 1 or 2.
    pub qos: u8,
    /// Whether the receiver is told that it was retained, or it is to be retained.
    pub retain: bool,
    /// Its properties; `None` when it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<Properties>,
    /// When it was accepted, in ms since the epoch; its age counts from there.
    pub accepted_ms: i64,
    /// When it may be forgotten, in ms since the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<i64>,
}

/// The properties of a message that its receiver is given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Properties {
    /// Whether the sender says that the payload is UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload_is_utf8: Option<bool>,
    /// What the payload is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    /// Where an answer is expected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub response_topic: Option<String>,
    /// What the answer is to carry.
    #[serde(skip_serializing_if = "Option::is_none", with = "base64_option")]
    pub correlation_data: Option<Vec<u8>>,
    /// Names and values, in their order; a name may come again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub user_properties: Vec<(String, String)>,
}

/// A stored will: published when the session's connection is lost.
///
/// The life of its message begins when it is published: `expires_ms - accepted_ms` is how long it then has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Will {
    /// What is published.
    pub message: Message,
    /// How long after the connection was lost, in seconds.
    pub delay_s: u32,
}

impl Properties {
    /// What they count against the limits of a queue: their texts and bytes.
    pub fn bytes(&self) -> usize {
        let text = |text: &Option<String>| text.as_ref().map_or(0, String::len);
        let pairs = self.user_properties.iter().map(|(name, value)| name.len() + value.len());
        let data = self.correlation_data.as_ref().map_or(0, Vec::len);
        text(&self.content_type) + text(&self.response_topic) + data + pairs.sum::<usize>()
    }
}

/// What a message counts against the limits of a queue: its topic, payload and properties, and [`ROW_BYTES`] for the
/// rest. Kept with the row, so what SQL adds up is the same.
pub fn row_bytes(message: &Message) -> u64 {
    let properties = message.properties.as_ref().map_or(0, Properties::bytes);
    (ROW_BYTES + message.topic.len() + message.payload.len() + properties) as u64
}

/// A QoS from its column.
pub(crate) fn qos(column: i16) -> u8 {
    u8::try_from(column).unwrap_or_default()
}

mod base64_bytes {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use bytes::Bytes;
    use serde::{Deserialize as _, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Bytes, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map(Bytes::from).map_err(serde::de::Error::custom)
    }
}

mod base64_option {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize as _, Deserializer, Serialize as _, Serializer};

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub(super) fn serialize<S: Serializer>(bytes: &Option<Vec<u8>>, serializer: S) -> Result<S::Ok, S::Error> {
        bytes.as_ref().map(|bytes| STANDARD.encode(bytes)).serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<u8>>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?;
        text.map(|text| STANDARD.decode(text)).transpose().map_err(serde::de::Error::custom)
    }
}
