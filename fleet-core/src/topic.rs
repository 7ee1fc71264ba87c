//! The topic grammar: parse and print, nowhere else.
//!
//! A device's topics are `fleet/v1/{tenant}/{device}/…`; what follows the device is a [`Channel`].
//! Topic names and filters as such keep to MQTT 5 §4.7 (the same rules as 3.1.1 §4.7).

use std::fmt;

use crate::id;

/// What every topic of a device begins with.
pub const ROOT: &str = "fleet/v1/";

/// What every topic of an application begins with; the tenant's name follows.
pub const APP_ROOT: &str = "app/";

/// Longest topic name or filter, in bytes (MQTT 5 §1.5.4).
pub const MAX_BYTES: usize = 65_535;

/// Most levels of a topic or filter; deeper ones are refused, so that no walk of the subscription tree is long.
pub const MAX_LEVELS: usize = 64;

/// A topic below `fleet/v1/{tenant}/{device}/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceTopic<'a> {
    /// The tenant's name.
    pub tenant: &'a str,
    /// The device's name.
    pub device: &'a str,
    /// What the message is.
    pub channel: Channel<'a>,
}

/// What follows the device in a topic (design §3.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Channel<'a> {
    /// `status`: birth, will, sleeping, offline.
    Status,
    /// `telemetry`: readings.
    Telemetry,
    /// `logs`: log lines.
    Logs,
    /// `events`: named events with severity.
    Events,
    /// `certificates/renew`: a signing request.
    CertificateRenewal,
    /// `shadow/get`: what a device is to be is asked for.
    ShadowGet,
    /// `shadow/update`: what a device says it is.
    ShadowUpdate,
    /// `commands/{id}/request`: what the device is to do.
    CommandRequest(&'a str),
    /// `commands/{id}/response`: what becomes of that.
    CommandResponse(&'a str),
    /// Anything else below the device, as it stands.
    Other(&'a str),
}

impl<'a> Channel<'a> {
    fn parse(rest: &'a str) -> Self {
        match rest {
            "status" => Self::Status,
            "telemetry" => Self::Telemetry,
            "logs" => Self::Logs,
            "events" => Self::Events,
            "certificates/renew" => Self::CertificateRenewal,
            "shadow/get" => Self::ShadowGet,
            "shadow/update" => Self::ShadowUpdate,
            other => Self::of_command(other).unwrap_or(Self::Other(other)),
        }
    }

    fn of_command(rest: &'a str) -> Option<Self> {
        let (id, what) = rest.strip_prefix("commands/")?.split_once('/')?;
        match what {
            _ if id.is_empty() => None,
            "request" => Some(Self::CommandRequest(rest)),
            "response" => Some(Self::CommandResponse(rest)),
            _ => None,
        }
    }

    /// The id of the command, as it was written, that it is about.
    pub fn command(&self) -> Option<&'a str> {
        match self {
            Self::CommandRequest(rest) | Self::CommandResponse(rest) => rest.split('/').nth(1),
            _ => None,
        }
    }

    /// The levels after the device's name.
    pub fn as_str(&self) -> &'a str {
        match self {
            Self::Status => "status",
            Self::Telemetry => "telemetry",
            Self::Logs => "logs",
            Self::Events => "events",
            Self::CertificateRenewal => "certificates/renew",
            Self::ShadowGet => "shadow/get",
            Self::ShadowUpdate => "shadow/update",
            Self::CommandRequest(rest) | Self::CommandResponse(rest) | Self::Other(rest) => rest,
        }
    }
}

impl<'a> DeviceTopic<'a> {
    /// Reads a topic name; `None` when it is not a topic of a device.
    pub fn parse(topic: &'a str) -> Option<Self> {
        let mut levels = topic.strip_prefix(ROOT)?.splitn(3, '/');
        let (tenant, device, rest) = (levels.next()?, levels.next()?, levels.next()?);
        (id::is_name(tenant) && id::is_name(device) && !rest.is_empty()).then(|| Self {
            tenant,
            device,
            channel: Channel::parse(rest),
        })
    }
}

impl fmt::Display for DeviceTopic<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{ROOT}{}/{}/{}", self.tenant, self.device, self.channel.as_str())
    }
}

/// Whether `topic` may be published to: not empty, no wildcard, no U+0000 (MQTT 5 §4.7.1, §4.7.3), bounded in depth.
pub fn is_valid_name(topic: &str) -> bool {
    // Bytes, not characters: this is asked of every message.
    is_bounded(topic) && !topic.bytes().any(|byte| matches!(byte, b'+' | b'#'))
}

/// Whether `filter` may be subscribed to: wildcards stand alone in their level and `#` only at the end (MQTT 5 §4.7.1).
/// A shared filter is `$share/{name}/{filter}` with a non-empty name without wildcards (MQTT 5 §4.8.2).
pub fn is_valid_filter(filter: &str) -> bool {
    if !is_bounded(filter) {
        return false;
    }
    match filter.strip_prefix("$share/") {
        Some(shared) => shared.split_once('/').is_some_and(|(group, rest)| {
            !group.is_empty() && !group.contains(['+', '#']) && !rest.is_empty() && has_valid_wildcards(rest)
        }),
        None => filter != "$share" && has_valid_wildcards(filter),
    }
}

fn is_bounded(topic: &str) -> bool {
    !topic.is_empty()
        && topic.len() <= MAX_BYTES
        && !topic.contains('\0')
        && topic.bytes().filter(|b| *b == b'/').count() < MAX_LEVELS
}

fn has_valid_wildcards(filter: &str) -> bool {
    let mut levels = filter.split('/').peekable();
    while let Some(level) = levels.next() {
        let stands_alone = level.len() == 1 || !level.contains(['+', '#']);
        let hash_is_last = level != "#" || levels.peek().is_none();
        if !(stands_alone && hash_is_last) {
            return false;
        }
    }
    true
}

/// Whether `filter` (valid, not shared) matches `topic` (valid). A leading wildcard never matches a topic that
/// begins with `$` (MQTT 5 §4.7.2).
pub fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let (mut wanted, mut given) = (filter.split('/'), topic.split('/'));
    loop {
        match (wanted.next(), given.next()) {
            (Some("#"), _) | (None, None) => return true,
            (Some("+"), Some(_)) => {}
            (Some(want), Some(have)) if want == have => {}
            _ => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::filter_set::tests::filter;

    // ---- a device's topics ----

    fn name() -> impl Strategy<Value = String> {
        "[A-Za-z0-9.-][A-Za-z0-9._-]{0,8}".prop_filter("path tricks are no names", |name| id::is_name(name))
    }

    proptest! {
        #[test]
        fn a_device_topic_prints_as_it_was_parsed(tenant in name(), device in name(), rest in "[a-z/]{1,12}") {
            let topic = format!("fleet/v1/{tenant}/{device}/{rest}");
            let parsed = DeviceTopic::parse(&topic).expect("names and a channel");
            prop_assert_eq!((parsed.tenant, parsed.device), (&tenant[..], &device[..]));
            prop_assert_eq!(parsed.channel.as_str(), rest);
            prop_assert_eq!(parsed.to_string(), topic);
        }

        #[test]
        fn what_parses_prints_back_whatever_it_was(topic in "(fleet/v1/)?[a-z_./]{0,20}|\\PC{0,20}") {
            if let Some(parsed) = DeviceTopic::parse(&topic) {
                prop_assert_eq!(parsed.to_string(), topic);
            }
        }
    }

    #[test]
    fn channels_are_known_by_their_whole_name() {
        let channel = |topic| DeviceTopic::parse(topic).map(|parsed| parsed.channel);
        assert_eq!(channel("fleet/v1/t/d/status"), Some(Channel::Status));
        assert_eq!(channel("fleet/v1/t/d/telemetry"), Some(Channel::Telemetry));
        assert_eq!(channel("fleet/v1/t/d/logs"), Some(Channel::Logs));
        assert_eq!(channel("fleet/v1/t/d/events"), Some(Channel::Events));
        assert_eq!(channel("fleet/v1/t/d/certificates/renew"), Some(Channel::CertificateRenewal));
        assert_eq!(channel("fleet/v1/t/d/certificates/renew/x"), Some(Channel::Other("certificates/renew/x")));
        assert_eq!(channel("fleet/v1/t/d/shadow/get"), Some(Channel::ShadowGet));
        assert_eq!(channel("fleet/v1/t/d/shadow/update"), Some(Channel::ShadowUpdate));
        assert_eq!(channel("fleet/v1/t/d/shadow/update/delta"), Some(Channel::Other("shadow/update/delta")));
        for (topic, expected, id) in [
            ("commands/7/request", Channel::CommandRequest("commands/7/request"), Some("7")),
            ("commands/7/response", Channel::CommandResponse("commands/7/response"), Some("7")),
            ("commands/7/response/x", Channel::Other("commands/7/response/x"), None),
            ("commands//response", Channel::Other("commands//response"), None),
            ("commands/response", Channel::Other("commands/response"), None),
        ] {
            assert_eq!(Channel::parse(topic), expected);
            assert_eq!((expected.command(), expected.as_str()), (id, topic));
        }
        assert_eq!(channel("fleet/v1/t/d/telemetry/x"), Some(Channel::Other("telemetry/x")));
        for not_a_device in
            ["fleet/v1/t/d", "fleet/v1/t/d/", "fleet/v1/t//status", "fleet/v2/t/d/status", "fleet/v1/t/_d/x"]
        {
            assert_eq!(channel(not_a_device), None, "{not_a_device}");
        }
    }

    // ---- names and filters ----

    #[test]
    fn topic_names() {
        for valid in ["/", "a", "a/b", "//", "a b", "$SYS/x", "日本/€"] {
            assert!(is_valid_name(valid), "{valid}");
        }
        for invalid in ["", "+", "a/#", "a+b", "a\0b"] {
            assert!(!is_valid_name(invalid), "{invalid:?}");
        }
        assert!(is_valid_name(&"/".repeat(MAX_LEVELS - 1)) && !is_valid_name(&"/".repeat(MAX_LEVELS)));
        assert!(is_valid_name(&"x".repeat(MAX_BYTES)) && !is_valid_name(&"x".repeat(MAX_BYTES + 1)));
    }

    #[test]
    fn topic_filters() {
        for valid in ["#", "+", "/", "+/+/#", "a/+/b", "/+", "a//b", "$share/g/#", "$share/g//", "$SYS/#", "$sharey"] {
            assert!(is_valid_filter(valid), "{valid}");
        }
        let invalid = ["", "a#", "a/b#", "#/a", "a/#/b", "+a", "a+/b", "++", "a\0", "$share", "$share/", "$share/g"];
        let invalid_shared = ["$share/g/", "$share//a", "$share/g+/a", "$share/#/a", "$share/g/a#"];
        for invalid in invalid.into_iter().chain(invalid_shared) {
            assert!(!is_valid_filter(invalid), "{invalid:?}");
        }
    }

    /// Levels so few that topics and filters meet often.
    fn topic() -> impl Strategy<Value = String> {
        vec(select(vec!["a", "b", "", "$s"]), 1..5)
            .prop_map(|levels| levels.join("/"))
            .prop_filter("not empty", |topic| !topic.is_empty())
    }

    /// MQTT 5 §4.7 word by word, with no thought for speed.
    fn naive_matches(filter: &str, topic: &str) -> bool {
        fn levels_match(filter: &[&str], topic: &[&str]) -> bool {
            match (filter, topic) {
                (["#"], _) | ([], []) => true,
                ([want, filter @ ..], [have, topic @ ..]) => {
                    (*want == "+" || want == have) && levels_match(filter, topic)
                }
                _ => false,
            }
        }
        let hidden = topic.starts_with('$') && (filter.starts_with('+') || filter.starts_with('#'));
        let (filter, topic): (Vec<_>, Vec<_>) = (filter.split('/').collect(), topic.split('/').collect());
        !hidden && levels_match(&filter, &topic)
    }

    proptest! {
        #[test]
        fn matching_is_what_the_standard_says(filter in filter(), topic in topic()) {
            prop_assert!(is_valid_filter(&filter) && is_valid_name(&topic));
            prop_assert_eq!(matches(&filter, &topic), naive_matches(&filter, &topic));
        }

        #[test]
        fn a_name_is_a_filter_that_matches_itself(topic in topic()) {
            prop_assert!(is_valid_filter(&topic) && matches(&topic, &topic));
        }
    }
}
