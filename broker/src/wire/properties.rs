//! What a block of properties may hold (MQTT 5 §2.2.2): a look at the raw bytes before the codec reads them.
//!
//! The codec has one error for all that is wrong with a property, and no memory for some of what is right;
//! [`check`] tells a Malformed Packet from a Protocol Error and keeps what the codec would lose.

use fleet_core::topic;

use super::decode::Fault;
use super::{MAX_USER_PROPERTIES, Reason};

const PAYLOAD_FORMAT: u8 = 0x01;
const MESSAGE_EXPIRY: u8 = 0x02;
const CONTENT_TYPE: u8 = 0x03;
const RESPONSE_TOPIC: u8 = 0x08;
const CORRELATION_DATA: u8 = 0x09;
const SUBSCRIPTION_ID: u8 = 0x0B;
const SESSION_EXPIRY: u8 = 0x11;
const AUTHENTICATION_METHOD: u8 = 0x15;
const AUTHENTICATION_DATA: u8 = 0x16;
const REQUEST_PROBLEM_INFORMATION: u8 = 0x17;
const WILL_DELAY: u8 = 0x18;
const REQUEST_RESPONSE_INFORMATION: u8 = 0x19;
const REASON_STRING: u8 = 0x1F;
const RECEIVE_MAXIMUM: u8 = 0x21;
const TOPIC_ALIAS_MAXIMUM: u8 = 0x22;
const TOPIC_ALIAS: u8 = 0x23;
const USER_PROPERTY: u8 = 0x26;
const MAXIMUM_PACKET_SIZE: u8 = 0x27;

/// Identifiers of properties as a set of bits; every identifier of the standard is below 64.
#[derive(Clone, Copy)]
pub(super) struct Set(u64);

impl Set {
    const fn of(ids: &[u8]) -> Self {
        let (mut bits, mut at) = (0, 0);
        while at < ids.len() {
            bits |= 1 << ids[at];
            at += 1;
        }
        Self(bits)
    }

    const fn has(self, id: u8) -> bool {
        id < 64 && self.0 & (1 << id) != 0
    }
}

/// What a client may put into its packets (MQTT 5 §2.2.2.2, table 2-4).
pub(super) const CONNECT: Set = Set::of(&[
    SESSION_EXPIRY,
    AUTHENTICATION_METHOD,
    AUTHENTICATION_DATA,
    REQUEST_PROBLEM_INFORMATION,
    REQUEST_RESPONSE_INFORMATION,
    RECEIVE_MAXIMUM,
    TOPIC_ALIAS_MAXIMUM,
    USER_PROPERTY,
    MAXIMUM_PACKET_SIZE,
]);
pub(super) const WILL: Set = Set::of(&[
    PAYLOAD_FORMAT,
    MESSAGE_EXPIRY,
    CONTENT_TYPE,
    RESPONSE_TOPIC,
    CORRELATION_DATA,
    WILL_DELAY,
    USER_PROPERTY,
]);
pub(super) const PUBLISH: Set = Set::of(&[
    PAYLOAD_FORMAT,
    MESSAGE_EXPIRY,
    CONTENT_TYPE,
    RESPONSE_TOPIC,
    CORRELATION_DATA,
    SUBSCRIPTION_ID,
    TOPIC_ALIAS,
    USER_PROPERTY,
]);
pub(super) const ACK: Set = Set::of(&[REASON_STRING, USER_PROPERTY]);
pub(super) const SUBSCRIBE: Set = Set::of(&[SUBSCRIPTION_ID, USER_PROPERTY]);
pub(super) const UNSUBSCRIBE: Set = Set::of(&[USER_PROPERTY]);
pub(super) const DISCONNECT: Set = Set::of(&[SESSION_EXPIRY, REASON_STRING, USER_PROPERTY]);
pub(super) const AUTH: Set = Set::of(&[AUTHENTICATION_METHOD, AUTHENTICATION_DATA, REASON_STRING, USER_PROPERTY]);

/// What was found and the codec cannot tell.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Payload Format Indicator, absent or not.
    pub(super) payload_is_utf8: Option<bool>,
    /// Where in the block a Message Expiry Interval of 0 has its last byte: the codec refuses 0, the standard does not.
    pub(super) zero_expiry_at: Option<usize>,
}

/// A cursor over bytes that may end too soon.
pub(super) struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    pub(super) const fn new(bytes: &'a [u8]) -> Self {
        Self { bytes, at: 0 }
    }

    pub(super) const fn position(&self) -> usize {
        self.at
    }

    pub(super) const fn is_at_end(&self) -> bool {
        self.at == self.bytes.len()
    }

    pub(super) fn take(&mut self, count: usize) -> Result<&'a [u8], Fault> {
        let end = self.at.saturating_add(count);
        let taken = self.bytes.get(self.at..end).ok_or(Fault::malformed("packet ends in the middle of a field"))?;
        self.at = end;
        Ok(taken)
    }

    pub(super) fn u8(&mut self) -> Result<u8, Fault> {
        Ok(self.take(1)?[0])
    }

    pub(super) fn u16(&mut self) -> Result<u16, Fault> {
        let bytes = self.take(2)?;
        Ok(u16::from_be_bytes([bytes[0], bytes[1]]))
    }

    fn u32(&mut self) -> Result<u32, Fault> {
        let bytes = self.take(4)?;
        Ok(u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A variable byte integer (MQTT 5 §1.5.5), in its shortest form.
    pub(super) fn variable(&mut self) -> Result<u32, Fault> {
        let mut value = 0;
        for shift in [0, 7, 14, 21] {
            let byte = self.u8()?;
            value |= u32::from(byte & 0x7F) << shift;
            if byte & 0x80 == 0 {
                return if byte == 0 && shift > 0 {
                    Err(Fault::malformed("variable byte integer is longer than it must be"))
                } else {
                    Ok(value)
                };
            }
        }
        Err(Fault::malformed("variable byte integer is longer than four bytes"))
    }

    /// Binary data with its length in front (MQTT 5 §1.5.6).
    pub(super) fn binary(&mut self) -> Result<&'a [u8], Fault> {
        let length = self.u16()?;
        self.take(usize::from(length))
    }

    /// A string (MQTT 5 §1.5.4).
    pub(super) fn text(&mut self) -> Result<&'a str, Fault> {
        let text = std::str::from_utf8(self.binary()?).map_err(|_| Fault::malformed("string is not UTF-8"))?;
        if text.contains('\0') { Err(Fault::malformed("string contains U+0000")) } else { Ok(text) }
    }

    /// A block of properties with its length in front: what it holds is checked, and the cursor is behind it.
    pub(super) fn properties(&mut self, allowed: Set) -> Result<Found, Fault> {
        let length = self.variable()? as usize;
        let start = self.at;
        let mut found = check(self.take(length)?, allowed)?;
        found.zero_expiry_at = found.zero_expiry_at.map(|at| start + at);
        Ok(found)
    }
}

/// Checks a whole block of properties.
fn check(block: &[u8], allowed: Set) -> Result<Found, Fault> {
    let mut reader = Reader::new(block);
    let mut found = Found::default();
    let (mut seen, mut users) = (Set(0), 0);
    while !reader.is_at_end() {
        let id = reader.u8()?;
        if !allowed.has(id) {
            return Err(Fault::malformed("property is unknown or does not belong in this packet"));
        }
        if id == USER_PROPERTY {
            users += 1;
        } else if seen.has(id) {
            return Err(Fault::protocol("property comes twice"));
        }
        if users > MAX_USER_PROPERTIES {
            return Err(Fault::new(Reason::QuotaExceeded, "packet has too many user properties"));
        }
        seen.0 |= 1 << id;
        check_value(id, &mut reader, &mut found)?;
    }
    if seen.has(AUTHENTICATION_DATA) && !seen.has(AUTHENTICATION_METHOD) {
        return Err(Fault::protocol("authentication data without a method"));
    }
    Ok(found)
}

fn check_value(id: u8, reader: &mut Reader<'_>, found: &mut Found) -> Result<(), Fault> {
    match id {
        PAYLOAD_FORMAT => found.payload_is_utf8 = Some(flag(reader)?),
        REQUEST_PROBLEM_INFORMATION | REQUEST_RESPONSE_INFORMATION => drop(flag(reader)?),
        MESSAGE_EXPIRY => {
            if reader.u32()? == 0 {
                found.zero_expiry_at = Some(reader.position() - 1);
            }
        }
        SESSION_EXPIRY | WILL_DELAY => drop(reader.u32()?),
        MAXIMUM_PACKET_SIZE => not_zero(reader.u32()?, Fault::protocol("maximum packet size is 0"))?,
        RECEIVE_MAXIMUM => not_zero(reader.u16()?.into(), Fault::protocol("receive maximum is 0"))?,
        TOPIC_ALIAS_MAXIMUM => drop(reader.u16()?),
        TOPIC_ALIAS => not_zero(reader.u16()?.into(), Fault::new(Reason::TopicAliasInvalid, "topic alias is 0"))?,
        SUBSCRIPTION_ID => not_zero(reader.variable()?, Fault::protocol("subscription identifier is 0"))?,
        CORRELATION_DATA | AUTHENTICATION_DATA => drop(reader.binary()?),
        RESPONSE_TOPIC => {
            if !topic::is_valid_name(reader.text()?) {
                return Err(Fault::protocol("response topic is not a topic name"));
            }
        }
        USER_PROPERTY => {
            reader.text()?;
            reader.text()?;
        }
        _ => drop(reader.text()?),
    }
    Ok(())
}

fn flag(reader: &mut Reader<'_>) -> Result<bool, Fault> {
    match reader.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Fault::protocol("property that is 0 or 1 has another value")),
    }
}

fn not_zero(value: u32, otherwise: Fault) -> Result<(), Fault> {
    if value == 0 { Err(otherwise) } else { Ok(()) }
}
