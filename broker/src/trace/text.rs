//! Packets as text, one line each.
//!
//! Holds: a line is bounded and has no line break; a payload is cut to [`SHOWN_BYTES`]; of a password nothing is shown,
//! not its length either; correlation data and authentication data are told by their length, user properties by their
//! names.

use std::fmt::Write as _;

use crate::wire::{
    Ack, ConnAck, Connect, Outgoing, Packet, PacketId, Publish, PublishProperties, QoS, Reason, RetainHandling,
    Subscribe, UserProperties, Version, Will,
};

/// Bytes of a payload that are shown.
const SHOWN_BYTES: usize = 64;
/// Bytes of a payload that are looked through for secrets: more than are shown, since masking shortens.
const SEARCHED_BYTES: usize = 1024;
/// Characters of a topic, a name or a reason that are shown.
const SHOWN_CHARS: usize = 200;
/// Filters, reasons or property names that are shown of a list.
const SHOWN_ITEMS: usize = 16;
/// Longest line, in bytes.
const MAX_LINE_BYTES: usize = 2_000;
/// What stands for a secret.
const MASK: &[u8] = b"***";

/// CONNECT.
pub(super) fn connect(connect: &Connect) -> String {
    let mut line = Line::new("CONNECT");
    line.word(match connect.version {
        Version::V311 => "3.1.1",
        Version::V5 => "5",
    });
    line.quoted("client_id", &connect.client_id);
    line.flag("clean_start", connect.clean_start);
    line.number("keep_alive_s", connect.keep_alive_s);
    line.number("session_expiry_s", connect.session_expiry_s);
    if let Some(username) = &connect.username {
        line.quoted("username", username);
    }
    if connect.password.is_some() {
        line.word("password=***");
    }
    line.number("receive_maximum", connect.receive_maximum);
    line.maybe("maximum_packet_size", connect.maximum_packet_size);
    if connect.topic_alias_maximum > 0 {
        line.number("topic_alias_maximum", connect.topic_alias_maximum);
    }
    if let Some(method) = &connect.authentication_method {
        line.quoted("authentication_method", method);
    }
    line.length("authentication_data", connect.authentication_data.as_deref());
    line.user_properties(&connect.user_properties);
    if let Some(will) = &connect.will {
        line.will(will);
    }
    line.end()
}

/// What a client sends.
pub(super) fn received(packet: &Packet) -> String {
    match packet {
        Packet::Connect(again) => connect(again),
        Packet::Publish(message) => publish(message),
        Packet::PubAck(answer) => ack("PUBACK", answer),
        Packet::PubRec(answer) => ack("PUBREC", answer),
        Packet::PubRel(answer) => ack("PUBREL", answer),
        Packet::PubComp(answer) => ack("PUBCOMP", answer),
        Packet::Subscribe(asked) => subscribe(asked),
        Packet::Unsubscribe(asked) => {
            let mut line = Line::about("UNSUBSCRIBE", asked.packet_id);
            line.list("filters", asked.filters.iter().map(|filter| quoted(filter)));
            line.end()
        }
        Packet::PingReq => "PINGREQ".to_owned(),
        Packet::Disconnect(said) => {
            let mut line = Line::new("DISCONNECT");
            line.reason(said.reason);
            line.maybe("session_expiry_s", said.session_expiry_s);
            line.reason_string(said.reason_string.as_deref());
            line.end()
        }
        Packet::Auth(_) => "AUTH".to_owned(),
    }
}

/// What a client is sent.
pub(super) fn sent(packet: &Outgoing<'_>) -> String {
    match packet {
        Outgoing::ConnAck(answer) => connack(answer),
        Outgoing::Publish(message) => publish(message),
        Outgoing::PubAck(answer) => ack("PUBACK", answer),
        Outgoing::PubRec(answer) => ack("PUBREC", answer),
        Outgoing::PubRel(answer) => ack("PUBREL", answer),
        Outgoing::PubComp(answer) => ack("PUBCOMP", answer),
        Outgoing::SubAck { packet_id, reasons, reason_string } => {
            answers("SUBACK", *packet_id, reasons, *reason_string)
        }
        Outgoing::UnsubAck { packet_id, reasons, reason_string } => {
            answers("UNSUBACK", *packet_id, reasons, *reason_string)
        }
        Outgoing::PingResp => "PINGRESP".to_owned(),
        Outgoing::Disconnect { reason, reason_string, user_properties } => {
            let mut line = Line::new("DISCONNECT");
            line.reason(*reason);
            line.reason_string(*reason_string);
            line.user_properties(user_properties);
            line.end()
        }
        Outgoing::Auth(_) => "AUTH".to_owned(),
    }
}

fn connack(answer: &ConnAck) -> String {
    let mut line = Line::new("CONNACK");
    line.reason(answer.reason);
    line.flag("session_present", answer.session_present);
    if let Some(id) = &answer.assigned_client_id {
        line.quoted("assigned_client_id", id);
    }
    line.maybe("server_keep_alive_s", answer.server_keep_alive_s);
    line.maybe("session_expiry_s", answer.session_expiry_s);
    line.number("receive_maximum", answer.receive_maximum);
    line.maybe("maximum_packet_size", answer.maximum_packet_size);
    line.reason_string(answer.reason_string.as_deref());
    line.user_properties(&answer.user_properties);
    line.end()
}

fn publish(message: &Publish) -> String {
    let mut line = Line::new("PUBLISH");
    line.maybe("id", message.packet_id);
    line.qos(message.qos);
    line.flag("dup", message.dup);
    line.flag("retain", message.retain);
    line.quoted("topic", &message.topic);
    line.maybe("alias", message.topic_alias);
    if !message.subscription_ids.is_empty() {
        line.list("subscription_ids", message.subscription_ids.iter().map(ToString::to_string));
    }
    if let Some(properties) = &message.properties {
        line.properties(properties);
    }
    line.payload(&message.payload);
    line.end()
}

fn ack(name: &str, answer: &Ack) -> String {
    let mut line = Line::about(name, answer.packet_id);
    line.reason(answer.reason);
    line.reason_string(answer.reason_string.as_deref());
    line.end()
}

fn answers(name: &str, packet_id: PacketId, reasons: &[Reason], reason_string: Option<&str>) -> String {
    let mut line = Line::about(name, packet_id);
    line.list("reasons", reasons.iter().map(|reason| format!("0x{:02x}", reason.code())));
    line.reason_string(reason_string);
    line.end()
}

fn subscribe(asked: &Subscribe) -> String {
    let mut line = Line::about("SUBSCRIBE", asked.packet_id);
    line.maybe("subscription_id", asked.subscription_id);
    line.list(
        "filters",
        asked.filters.iter().map(|one| {
            let mut text = format!("{} qos={}", quoted(&one.filter), one.qos as u8);
            for (name, set) in [("no_local", one.no_local), ("retain_as_published", one.retain_as_published)] {
                if set {
                    let _ = write!(text, " {name}");
                }
            }
            if one.retain_handling != RetainHandling::AtSubscribe {
                let _ = write!(text, " retain_handling={}", one.retain_handling as u8);
            }
            text
        }),
    );
    line.user_properties(&asked.user_properties);
    line.end()
}

/// A line that grows word by word.
struct Line(String);

impl Line {
    fn new(packet: &str) -> Self {
        Self(packet.to_owned())
    }

    fn about(packet: &str, id: PacketId) -> Self {
        let mut line = Self::new(packet);
        line.number("id", id);
        line
    }

    fn word(&mut self, word: &str) {
        self.0.push(' ');
        self.0.push_str(word);
    }

    fn number(&mut self, name: &str, value: impl std::fmt::Display) {
        let _ = write!(self.0, " {name}={value}");
    }

    fn maybe(&mut self, name: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.number(name, value);
        }
    }

    fn flag(&mut self, name: &str, set: bool) {
        if set {
            self.word(name);
        }
    }

    fn quoted(&mut self, name: &str, text: &str) {
        self.number(name, quoted(text));
    }

    fn length(&mut self, name: &str, bytes: Option<&[u8]>) {
        if let Some(bytes) = bytes {
            self.number(name, format_args!("[{} bytes]", bytes.len()));
        }
    }

    fn qos(&mut self, qos: QoS) {
        self.number("qos", qos as u8);
    }

    fn reason(&mut self, reason: Reason) {
        let _ = write!(self.0, " 0x{:02x} ({})", reason.code(), reason.text());
    }

    fn reason_string(&mut self, text: Option<&str>) {
        if let Some(text) = text {
            self.quoted("reason", text);
        }
    }

    fn list(&mut self, name: &str, items: impl ExactSizeIterator<Item = String>) {
        let more = items.len().saturating_sub(SHOWN_ITEMS);
        let shown = items.take(SHOWN_ITEMS).collect::<Vec<_>>().join(", ");
        let _ = write!(self.0, " {name}=[{shown}");
        if more > 0 {
            let _ = write!(self.0, ", and {more} more");
        }
        self.0.push(']');
    }

    fn user_properties(&mut self, properties: &[(bytestring::ByteString, bytestring::ByteString)]) {
        if !properties.is_empty() {
            self.list("user_properties", properties.iter().map(|(name, _)| quoted(name)));
        }
    }

    fn properties(&mut self, properties: &PublishProperties) {
        let PublishProperties {
            payload_is_utf8,
            message_expiry_s,
            content_type,
            response_topic,
            correlation_data,
            user_properties,
        } = properties;
        self.flag("utf8", *payload_is_utf8 == Some(true));
        self.maybe("expiry_s", *message_expiry_s);
        for (name, text) in [("content_type", content_type), ("response_topic", response_topic)] {
            if let Some(text) = text {
                self.quoted(name, text);
            }
        }
        self.length("correlation_data", correlation_data.as_deref());
        let named: &UserProperties = user_properties;
        self.user_properties(named);
    }

    fn payload(&mut self, payload: &[u8]) {
        let _ = write!(self.0, " payload[{}]={}", payload.len(), shown(payload));
    }

    fn will(&mut self, will: &Will) {
        self.word("will");
        self.qos(will.qos);
        self.flag("retain", will.retain);
        self.quoted("topic", &will.topic);
        if will.delay_s > 0 {
            self.number("delay_s", will.delay_s);
        }
        if let Some(properties) = &will.properties {
            self.properties(properties);
        }
        self.payload(&will.payload);
    }

    fn end(mut self) -> String {
        if self.0.len() > MAX_LINE_BYTES {
            self.0.truncate(self.0.floor_char_boundary(MAX_LINE_BYTES));
            self.0.push('…');
        }
        self.0
    }
}

/// A text in quotes, with escapes, cut to [`SHOWN_CHARS`].
fn quoted(text: &str) -> String {
    let mut chars = text.chars();
    let shown: String = chars.by_ref().take(SHOWN_CHARS).collect();
    let cut = if chars.next().is_some() { "…" } else { "" };
    format!("\"{}\"{cut}", shown.escape_debug())
}

/// The beginning of a payload in quotes: text as text, bytes as `\xNN`, secrets masked.
fn shown(payload: &[u8]) -> String {
    let masked = masked(&payload[..payload.len().min(SEARCHED_BYTES)]);
    let begin = &masked[..masked.len().min(SHOWN_BYTES)];
    let cut = if masked.len() > SHOWN_BYTES || payload.len() > SEARCHED_BYTES { "…" } else { "" };
    let mut text = String::new();
    for chunk in begin.utf8_chunks() {
        let _ = write!(text, "{}", chunk.valid().escape_debug());
        // A character that was cut in two at the end is left out; anything else is shown as it is.
        let at_end = cut == "…" && std::ptr::eq(chunk.invalid().as_ptr_range().end, begin.as_ptr_range().end);
        if !at_end {
            let _ = write!(text, "{}", chunk.invalid().escape_ascii());
        }
    }
    format!("\"{text}\"{cut}")
}

/// What, as a part of a key, says that the value is a secret; in lower case.
const SECRETS: [&[u8]; 13] = [
    b"password",
    b"passwd",
    b"passphrase",
    b"pwd",
    b"secret",
    b"token",
    b"api_key",
    b"api-key",
    b"apikey",
    b"authorization",
    b"bearer",
    b"private_key",
    b"credential",
];

/// The bytes with `***` in place of every value whose key looks like that of a secret: `"token":"…"`, `token=…`,
/// `Bearer …`.
fn masked(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let value = SECRETS.iter().find(|key| starts_with(rest, key)).and_then(|key| value_of(rest, key.len()));
        if let Some((begin, end)) = value {
            out.extend_from_slice(&rest[..begin]);
            out.extend_from_slice(MASK);
            at += end;
        } else {
            out.push(bytes[at]);
            at += 1;
        }
    }
    out
}

fn starts_with(bytes: &[u8], key: &[u8]) -> bool {
    bytes.get(..key.len()).is_some_and(|begin| begin.eq_ignore_ascii_case(key))
}

fn is_sign(byte: u8) -> bool {
    matches!(byte, b':' | b'=')
}

/// Where the value begins and ends whose key ends at `key`, if what follows is a value at all.
fn value_of(bytes: &[u8], key: usize) -> Option<(usize, usize)> {
    let skip = |mut at: usize, while_is: fn(u8) -> bool| {
        while bytes.get(at).is_some_and(|byte| while_is(*byte)) {
            at += 1;
        }
        at
    };
    let quote = |byte: u8| matches!(byte, b'"' | b'\'' | b'\\');
    let word_end = skip(key, |byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'));
    let name_end = skip(skip(word_end, quote), |byte| matches!(byte, b' ' | b'\t' | b':' | b'='));
    // A word in a sentence is no key: only what comes after Bearer needs no sign.
    if name_end == word_end
        || !(starts_with(bytes, b"bearer") || bytes[word_end..name_end].iter().any(|byte| is_sign(*byte)))
    {
        return None;
    }
    let begin = skip(name_end, quote);
    let is_over: fn(u8) -> bool = match (begin > name_end, bytes.get(begin)) {
        (true, _) => |byte| matches!(byte, b'"' | b'\''),
        // Whatever an object or a list holds.
        (false, Some(b'{' | b'[')) => |_| false,
        _ => |byte| matches!(byte, b',' | b';' | b'&' | b'}' | b']' | b'\r' | b'\n'),
    };
    let mut end = begin;
    while let Some(byte) = bytes.get(end)
        && !is_over(*byte)
    {
        // An escaped quote belongs to the value.
        end += if *byte == b'\\' && bytes.get(end + 1) == Some(&b'"') { 2 } else { 1 };
    }
    (end > begin).then_some((begin, end.min(bytes.len())))
}

#[cfg(test)]
mod tests {
    use std::num::{NonZeroU16, NonZeroU32};
    use std::sync::Arc;

    use bytes::Bytes;
    use proptest::prelude::*;

    use super::*;
    use crate::wire::{Disconnect, SubscriptionFilter, Unsubscribe};

    fn id(number: u16) -> PacketId {
        NonZeroU16::new(number).unwrap()
    }

    fn message(topic: &str, payload: &[u8]) -> Publish {
        Publish::new(topic.into(), Bytes::copy_from_slice(payload), QoS::AtLeastOnce, false)
    }

    fn a_connect() -> Connect {
        Connect {
            version: Version::V5,
            client_id: "boiler-1".into(),
            clean_start: true,
            keep_alive_s: 30,
            username: Some("main/boiler-1".into()),
            password: Some(Bytes::from_static(b"hunter2")),
            will: Some(Will {
                topic: "fleet/v1/main/boiler-1/status".into(),
                payload: Bytes::from_static(b"{\"state\":\"lost\",\"token\":\"hunter2\"}"),
                qos: QoS::AtLeastOnce,
                retain: true,
                delay_s: 5,
                properties: None,
            }),
            session_expiry_s: 0,
            receive_maximum: NonZeroU16::MAX,
            maximum_packet_size: NonZeroU32::new(1000),
            topic_alias_maximum: 0,
            request_response_information: false,
            request_problem_information: true,
            authentication_method: Some("SCRAM".into()),
            authentication_data: Some(Bytes::from_static(b"hunter2")),
            user_properties: vec![("key".into(), "hunter2".into())],
        }
    }

    #[test]
    fn a_connect_shows_who_it_was_and_no_secret() {
        let line = connect(&a_connect());
        assert_eq!(
            line,
            "CONNECT 5 client_id=\"boiler-1\" clean_start keep_alive_s=30 session_expiry_s=0 username=\"main/boiler-1\" \
             password=*** receive_maximum=65535 maximum_packet_size=1000 authentication_method=\"SCRAM\" \
             authentication_data=[7 bytes] user_properties=[\"key\"] will qos=1 retain \
             topic=\"fleet/v1/main/boiler-1/status\" delay_s=5 \
             payload[34]=\"{\\\"state\\\":\\\"lost\\\",\\\"token\\\":\\\"***\\\"}\""
        );
    }

    #[test]
    fn a_publish_shows_its_flags_and_properties() {
        let properties = PublishProperties {
            payload_is_utf8: Some(true),
            message_expiry_s: Some(60),
            content_type: Some("text/plain".into()),
            response_topic: Some("a/b".into()),
            correlation_data: Some(Bytes::from_static(b"secret")),
            user_properties: vec![("name".into(), "value".into()), ("name".into(), "other".into())],
        };
        let publish = Publish {
            packet_id: Some(id(7)),
            dup: true,
            retain: true,
            properties: Some(Arc::new(properties)),
            topic_alias: Some(id(3)),
            subscription_ids: vec![1, 2],
            ..message("a/\n/\u{e4}", b"21.5")
        };
        let line = received(&Packet::Publish(publish.clone()));
        assert_eq!(
            line,
            "PUBLISH id=7 qos=1 dup retain topic=\"a/\\n/\u{e4}\" alias=3 subscription_ids=[1, 2] utf8 expiry_s=60 \
             content_type=\"text/plain\" response_topic=\"a/b\" correlation_data=[6 bytes] \
             user_properties=[\"name\", \"name\"] payload[4]=\"21.5\""
        );
        assert_eq!(sent(&Outgoing::Publish(&publish)), line);
    }

    #[test]
    fn the_other_packets_are_told_too() {
        let filter = |filter: &str| SubscriptionFilter {
            filter: filter.into(),
            valid: true,
            qos: QoS::ExactlyOnce,
            no_local: true,
            retain_as_published: false,
            retain_handling: RetainHandling::Never,
        };
        let subscribe = Subscribe {
            packet_id: id(1),
            subscription_id: Some(9),
            filters: vec![filter("a/#"), filter("b")],
            user_properties: Vec::new(),
        };
        let disconnect = Disconnect {
            reason: Reason::DisconnectWithWill,
            session_expiry_s: Some(5),
            reason_string: Some("bye".into()),
        };
        let unsubscribe = Unsubscribe { packet_id: id(2), filters: vec!["a".into(); SHOWN_ITEMS + 3] };
        let [both, one] =
            [Packet::Subscribe(subscribe), Packet::Disconnect(disconnect)].map(|packet| received(&packet));
        assert_eq!(
            both,
            "SUBSCRIBE id=1 subscription_id=9 filters=[\"a/#\" qos=2 no_local retain_handling=2, \"b\" qos=2 no_local \
             retain_handling=2]"
        );
        assert_eq!(one, "DISCONNECT 0x04 (disconnect with will message) session_expiry_s=5 reason=\"bye\"");
        assert!(received(&Packet::Unsubscribe(unsubscribe)).ends_with(", and 3 more]"));
        assert_eq!(received(&Packet::PubRel(Ack::new(id(5), Reason::Success))), "PUBREL id=5 0x00 (success)");
        let reasons = [Reason::GrantedQos1, Reason::NotAuthorized];
        let suback = Outgoing::SubAck { packet_id: id(1), reasons: &reasons, reason_string: Some("no") };
        assert_eq!(sent(&suback), "SUBACK id=1 reasons=[0x01, 0x87] reason=\"no\"");
        assert_eq!(sent(&Outgoing::ConnAck(&ConnAck::default())), "CONNACK 0x00 (success) receive_maximum=65535",);
    }

    #[test]
    fn values_that_look_like_secrets_are_masked() {
        for (payload, expected) in [
            (&br#"{"password":"hunter2","a":1}"#[..], r#"{"password":"***","a":1}"#),
            (br#"{"accessToken" : "hunter2"}"#, r#"{"accessToken" : "***"}"#),
            (br#"{"wifi_pwd":"a\"hunter2","b":2}"#, r#"{"wifi_pwd":"***","b":2}"#),
            (br#"{"secret":{"a":"hunter2"}}"#, r#"{"secret":***"#),
            (br#"{"pin_token":12345,"x":1}"#, r#"{"pin_token":***,"x":1}"#),
            (b"user=me&PASSWORD=hunter2&x=1", "user=me&PASSWORD=***&x=1"),
            (b"Authorization: Bearer hunter2\r\nx", "Authorization: ***\r\nx"),
            (b"Bearer hunter2", "Bearer ***"),
            (br#"{\"token\":\"hunter2\"}"#, r#"{\"token\":\"***"#),
            (b"tokens are fine", "tokens are fine"),
            (b"a secret", "a secret"),
            (b"password", "password"),
            (b"\xff token=\xfehunter2", "\u{fffd} token=***"),
        ] {
            assert_eq!(String::from_utf8_lossy(&masked(payload)), expected);
        }
    }

    #[test]
    fn a_payload_is_cut_and_escaped() {
        let payload = |payload: &[u8]| shown(payload);
        assert_eq!(payload(b""), "\"\"");
        assert_eq!(payload(b"a\n\"\x00\xff\xfe"), "\"a\\n\\\"\\0\\xff\\xfe\"");
        assert_eq!(payload(&[b'x'; 100]), format!("\"{}\"…", "x".repeat(SHOWN_BYTES)));
        assert_eq!(payload("é".repeat(40).as_bytes()), format!("\"{}\"…", "é".repeat(32)));
        assert_eq!(payload(format!("x{}", "é".repeat(40)).as_bytes()), format!("\"x{}\"…", "é".repeat(31)));
        assert_eq!(payload(&vec![b'x'; 10_000]).len(), SHOWN_BYTES + "\"\"…".len());
        let late = [&b"password=\""[..], &[b'x'; SEARCHED_BYTES]].concat();
        assert_eq!(payload(&late), "\"password=\\\"***\"…", "a secret that does not end is masked to the end");
    }

    #[test]
    fn a_line_is_bounded() {
        let long = "x".repeat(60_000);
        let filters = vec![long.as_str().into(); 100];
        let line = received(&Packet::Unsubscribe(Unsubscribe { packet_id: id(1), filters }));
        assert!(line.len() <= MAX_LINE_BYTES + "…".len(), "{}", line.len());
        assert!(received(&Packet::Publish(message(&long, b""))).len() < 300);
    }

    proptest! {
        #[test]
        fn no_secret_shows_whatever_surrounds_it(
            before in proptest::collection::vec(any::<u8>(), 0..40), key in "(PASSword|Token|secret|api_?key)",
            gap in r#"("|')? ?[:=] ?("|')?"#, after in proptest::collection::vec(any::<u8>(), 0..40),
        ) {
            let payload = [&before[..], key.as_bytes(), gap.as_bytes(), b"HUNTER2", &after].concat();
            let line = received(&Packet::Publish(message("t", &payload)));
            prop_assert!(!line.contains("HUNTER2"), "{line}");
        }

        #[test]
        fn any_payload_makes_one_bounded_line(payload in proptest::collection::vec(any::<u8>(), 0..3000)) {
            let line = received(&Packet::Publish(message("t", &payload)));
            prop_assert!(line.len() < 600 && !line.contains(['\n', '\r', '\0']), "{line}");
        }
    }
}
