//! Messages as rows, and back.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytestring::ByteString;
use fleet_core::clock::Clock;
use fleet_core::session::{self, Message, Properties, Queued};

use crate::mailbox::{Delivery, Stage};
use crate::session::Subscription;
use crate::wire::{Publish, PublishProperties, QoS};

/// Now, on both clocks: messages wait by the monotonic one, rows tell the time of day.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Now {
    pub(crate) instant: Instant,
    pub(crate) ms: i64,
}

impl Now {
    /// This moment.
    pub(crate) fn of(clock: &Clock) -> Self {
        Self { instant: Instant::now(), ms: clock.now_ms() }
    }

    fn to_instant(self, ms: i64) -> Instant {
        let ago = Duration::from_millis(u64::try_from(self.ms - ms).unwrap_or_default());
        self.instant.checked_sub(ago).unwrap_or(self.instant)
    }

    fn to_ms(self, instant: Instant) -> i64 {
        let ago = self.instant.saturating_duration_since(instant).as_millis();
        self.ms - i64::try_from(ago).unwrap_or_default()
    }
}

/// A message as it is stored.
pub(crate) fn message(publish: &Publish, accepted: Instant, now: Now) -> Message {
    let accepted_ms = now.to_ms(accepted);
    let expires_ms = publish.message_expiry_s().map(|expiry_s| accepted_ms + i64::from(expiry_s) * 1000);
    Message {
        topic: publish.topic.to_string(),
        payload: publish.payload.clone(),
        qos: publish.qos as u8,
        retain: publish.retain,
        properties: publish.properties.as_deref().and_then(properties),
        accepted_ms,
        expires_ms,
    }
}

fn properties(of: &PublishProperties) -> Option<Properties> {
    let text = |text: &Option<ByteString>| text.as_ref().map(ToString::to_string);
    let properties = Properties {
        payload_is_utf8: of.payload_is_utf8,
        content_type: text(&of.content_type),
        response_topic: text(&of.response_topic),
        correlation_data: of.correlation_data.as_ref().map(|data| data.to_vec()),
        user_properties: of.user_properties.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect(),
    };
    (properties != Properties::default()).then_some(properties)
}

/// A stored message as it is sent, and when it was accepted.
pub(crate) fn publish(message: Message, now: Now) -> (Publish, Instant) {
    let expiry_s = message
        .expires_ms
        .map(|expires_ms| u32::try_from((expires_ms - message.accepted_ms) / 1000).unwrap_or_default());
    let properties = match (message.properties, expiry_s) {
        (None, None) => None,
        (properties, message_expiry_s) => {
            let Properties { payload_is_utf8, content_type, response_topic, correlation_data, user_properties } =
                properties.unwrap_or_default();
            Some(Arc::new(PublishProperties {
                payload_is_utf8,
                message_expiry_s,
                content_type: content_type.map(ByteString::from),
                response_topic: response_topic.map(ByteString::from),
                correlation_data: correlation_data.map(Into::into),
                user_properties: user_properties.into_iter().map(|(name, value)| (name.into(), value.into())).collect(),
            }))
        }
    };
    let publish =
        Publish { properties, ..Publish::new(message.topic.into(), message.payload, qos(message.qos), message.retain) };
    (publish, now.to_instant(message.accepted_ms))
}

/// A message that waited in the queue of a session.
pub(crate) fn delivery(queued: Queued, sent_to: i64, now: Now) -> Delivery {
    let stage = match queued.released {
        true => Stage::Released,
        false if queued.offset <= sent_to => Stage::Again,
        false => Stage::Fresh,
    };
    let (mut publish, accepted) = publish(queued.message, now);
    publish.subscription_ids = queued.subscription_ids;
    publish.dup = stage == Stage::Again;
    Delivery { offset: Some(queued.offset), stage, ..Delivery::new(publish, accepted) }
}

/// What a message counts for wherever messages are kept, as the database counts it ([`session::row_bytes`]): a bound
/// must hold for what a message costs, not only for its payload.
pub(crate) fn cost(publish: &Publish) -> usize {
    let properties = publish.properties.as_ref().map_or(0, |properties| properties.bytes());
    session::ROW_BYTES + publish.topic.len() + publish.payload.len() + properties
}

/// [`cost`], as the numbers of a session's queue have it.
pub(crate) fn queue_bytes(publish: &Publish) -> i64 {
    i64::try_from(cost(publish)).unwrap_or(i64::MAX)
}

/// A subscription as it is stored.
pub(crate) fn subscription(filter: &str, options: Subscription) -> session::Subscription {
    session::Subscription {
        filter: filter.to_owned(),
        qos: options.qos as u8,
        no_local: options.no_local,
        retain_as_published: options.retain_as_published,
        subscription_id: options.id,
    }
}

/// A subscription that was stored.
pub(crate) fn options(stored: &session::Subscription) -> Subscription {
    Subscription {
        qos: qos(stored.qos),
        no_local: stored.no_local,
        retain_as_published: stored.retain_as_published,
        id: stored.subscription_id,
    }
}

fn qos(stored: u8) -> QoS {
    match stored {
        0 => QoS::AtMostOnce,
        1 => QoS::AtLeastOnce,
        _ => QoS::ExactlyOnce,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    #[test]
    fn a_message_comes_back_as_it_was() {
        let now = Now { instant: Instant::now(), ms: 1_700_000_000_000 };
        let accepted = now.instant.checked_sub(Duration::from_millis(2500)).unwrap();
        let properties = PublishProperties {
            payload_is_utf8: Some(true),
            message_expiry_s: Some(60),
            content_type: Some("text/plain".into()),
            response_topic: Some("answers/to".into()),
            correlation_data: Some(Bytes::from_static(&[0, 255, 7])),
            user_properties: vec![("a".into(), "1".into()), ("a".into(), "2".into())],
        };
        let sent = Publish {
            properties: Some(Arc::new(properties)),
            ..Publish::new("a/ü".into(), Bytes::from_static(b"\x00\xFF"), QoS::ExactlyOnce, true)
        };
        let (back, accepted_back) = publish(message(&sent, accepted, now), now);
        assert_eq!(back, sent);
        assert_eq!(accepted_back, accepted);
        assert_eq!(session::row_bytes(&message(&sent, accepted, now)), cost(&sent) as u64, "one rule for both");
        assert_eq!(cost(&sent), session::ROW_BYTES + 4 + 2 + 10 + 10 + 3 + 4);
        let plain = Publish::new("b".into(), Bytes::new(), QoS::AtLeastOnce, false);
        assert_eq!(publish(message(&plain, accepted, now), now).0, plain);
    }
}
