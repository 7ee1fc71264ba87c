//! The topic grammar: parse and print, nowhere else.
//!
//! A device's topics are `fleet/v1/{tenant}/{device}/…`; what follows the device is a [`Channel`].
//! Topic names and filters as such keep to MQTT 5 §4.7 (the same rules as 3.1.1 §4.7).

use std::fmt;

use crate::id;

/// What every topic of a device begins with.
pub const ROOT: &str = "fleet/v1/";

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
            other => Self::Other(other),
        }
    }

    /// The levels after the device's name.
    pub fn as_str(&self) -> &'a str {
        match self {
            Self::Status => "status",
            Self::Telemetry => "telemetry",
            Self::Logs => "logs",
            Self::Events => "events",
            Self::Other(rest) => rest,
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
    is_bounded(topic) && !topic.contains(['+', '#'])
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

/// Whether every topic that `narrow` can match is matched by `wide` (both valid filters, neither shared).
pub fn covers(wide: &str, narrow: &str) -> bool {
    if narrow.starts_with('$') && wide.starts_with(['+', '#']) {
        return false;
    }
    let (mut wide, mut narrow) = (wide.split('/'), narrow.split('/'));
    loop {
        match (wide.next(), narrow.next()) {
            (Some("#"), _) | (None, None) => return true,
            (_, Some("#")) => return false,
            (Some("+"), Some(_)) => {}
            (Some(w), Some(n)) if w == n => {}
            _ => return false,
        }
    }
}

/// Whether some topic is matched by both filters (valid, neither shared).
pub fn overlaps(one: &str, other: &str) -> bool {
    let dollar = |filter: &str| filter.starts_with('$');
    let wild = |filter: &str| filter.starts_with(['+', '#']);
    if (dollar(one) && wild(other)) || (dollar(other) && wild(one)) {
        return false;
    }
    let (mut one, mut other) = (one.split('/'), other.split('/'));
    loop {
        match (one.next(), other.next()) {
            (Some("#"), _) | (_, Some("#")) | (None, None) => return true,
            (Some("+"), Some(_)) | (Some(_), Some("+")) => {}
            (Some(a), Some(b)) if a == b => {}
            _ => return false,
        }
    }
}
