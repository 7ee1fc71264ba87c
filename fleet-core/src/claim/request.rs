//! What is asked by a claim: to become a device of the fleet.
//!
//! A request is read by [`Request::decode`] and answered by [`answer`]; one that waits is decided by [`approve`] or [`reject`] and
//! asked for again by its device. Holds: a request that comes again with the same nonce is the same request, makes one device and
//! has one answer; no answer holds a secret that somebody else could use: the device made its token itself and shows the hash of
//! it, or the token is sealed with HPKE (RFC 9180) to the public key it showed (ADR 10); whatever cannot be granted is answered with
//! a code. Ignorant of: MQTT, HTTP.

mod granting;
mod inbox;

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_128 as SUITE;
use rustls::crypto::hpke::{Hpke, HpkePublicKey};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::Template;
use crate::device::{DeviceType, Labels, NewDevice};
use crate::error::{Error, Result};
use crate::id::DeviceId;

pub use self::granting::answer;
pub use self::inbox::{Approve, Filter, Kept, MAX_REASON_CHARS, State, approve, find, page, reject, told};

/// Largest request, in bytes.
pub const MAX_BYTES: usize = 16 * 1024;
/// Longest serial number, in characters.
pub const MAX_SERIAL_CHARS: usize = 128;
/// Letters of a nonce.
const NONCE_CHARS: std::ops::RangeInclusive<usize> = 16..=64;
/// What a token is sealed for, beside its device: the info of HPKE.
pub const SEALED_FOR: &str = "muster provision v1";
/// The label that holds the serial number.
const SERIAL: &str = "serial";
const KEY_BYTES: usize = 32;

/// Why a request is not granted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Code {
    /// It is no request.
    Malformed,
    /// The claim was revoked or has expired.
    ClaimEnded,
    /// As many devices as the claim was made for have come.
    UsedUp,
    /// The claim is not for this id.
    WrongId,
    /// There is a device of that id.
    Exists,
    /// The nonce was used with another token or key.
    NonceTaken,
    /// Somebody said no, or the device was deleted.
    Rejected,
    /// The claim is asked too often at the moment.
    RateLimited,
    /// Too many wait for approval, or too much was asked by this claim.
    Full,
    /// The server failed.
    Internal,
}

impl Code {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Malformed,
        Self::ClaimEnded,
        Self::UsedUp,
        Self::WrongId,
        Self::Exists,
        Self::NonceTaken,
        Self::Rejected,
        Self::RateLimited,
        Self::Full,
        Self::Internal,
    ];

    /// It as answers spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::ClaimEnded => "claim-ended",
            Self::UsedUp => "used-up",
            Self::WrongId => "wrong-id",
            Self::Exists => "exists",
            Self::NonceTaken => "nonce-taken",
            Self::Rejected => "rejected",
            Self::RateLimited => "rate-limited",
            Self::Full => "full",
            Self::Internal => "internal",
        }
    }
}

/// Why a request is not granted, for the device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejection {
    /// In one word.
    pub code: Code,
    /// What was expected.
    pub message: String,
}

impl Rejection {
    /// With these words.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// How the device comes to its token, so that nobody else does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// It has made one itself; this is its SHA-256.
    TokenHash([u8; KEY_BYTES]),
    /// One is to be made and sealed to this X25519 key.
    PublicKey([u8; KEY_BYTES]),
}

/// What a device asks.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The id it wants.
    pub id: DeviceId,
    /// Its own choice: tells this request from others for the same id.
    pub nonce: String,
    /// How it comes to its token.
    pub proof: Proof,
    /// What kind of thing it says it is.
    pub kind: Option<DeviceType>,
    /// What it says about itself.
    pub labels: Labels,
    /// The number on its plate.
    pub serial: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    id: String,
    nonce: String,
    token_sha256: Option<String>,
    public_key: Option<String>,
    r#type: Option<String>,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    serial: Option<String>,
}

impl Request {
    /// Reads a request.
    pub fn decode(payload: &[u8]) -> std::result::Result<Self, Rejection> {
        Self::read(payload).map_err(|message| Rejection::new(Code::Malformed, message))
    }

    fn read(payload: &[u8]) -> std::result::Result<Self, String> {
        if payload.len() > MAX_BYTES {
            return Err(format!("{} bytes: expected at most {MAX_BYTES}", payload.len()));
        }
        // Serde would take an array for a struct as well, member by member.
        if !payload.trim_ascii_start().starts_with(b"{") {
            return Err("expected a JSON object".into());
        }
        let written: Written = serde_json::from_slice(payload).map_err(|error| error.to_string())?;
        let proof = match (&written.token_sha256, &written.public_key) {
            (Some(hash), None) => Proof::TokenHash(hexadecimal(hash)?),
            (None, Some(key)) => Proof::PublicKey(public_key(key)?),
            _ => return Err("expected either token_sha256 or public_key".into()),
        };
        let is_nonce = NONCE_CHARS.contains(&written.nonce.len())
            && written.nonce.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-+/=:".contains(&b));
        if !is_nonce {
            return Err("nonce: expected 16 to 64 of A-Z a-z 0-9 . _ - + / = :".into());
        }
        let serial = written.serial.filter(|serial| !serial.is_empty());
        let fits = |serial: &String| serial.chars().count() <= MAX_SERIAL_CHARS && !serial.contains(char::is_control);
        if serial.as_ref().is_some_and(|serial| !fits(serial)) {
            return Err(format!("serial: expected at most {MAX_SERIAL_CHARS} printable characters"));
        }
        Ok(Self {
            id: written.id.parse().map_err(|error| format!("id: {error}"))?,
            nonce: written.nonce,
            proof,
            kind: written.r#type.map(DeviceType::try_from).transpose().map_err(|error| format!("type: {error}"))?,
            labels: Labels::try_from(written.labels).map_err(|error| format!("labels: {error}"))?,
            serial,
        })
    }

    /// The device it would be. What the claim says wins.
    fn device(&self, template: &Template) -> Result<NewDevice> {
        let mut labels = self.labels.as_map().clone();
        if let Some(serial) = &self.serial {
            labels.insert(SERIAL.to_owned(), serial.clone());
        }
        labels.extend(template.labels.as_map().clone());
        Ok(NewDevice {
            id: self.id.clone(),
            kind: template.kind.clone().or_else(|| self.kind.clone()),
            group: template.group.clone(),
            labels: Labels::try_from(labels)?,
            gateway: None,
        })
    }
}

fn hexadecimal(text: &str) -> std::result::Result<[u8; KEY_BYTES], String> {
    let mut bytes = [0; KEY_BYTES];
    let read = hex::decode_to_slice(text, &mut bytes);
    read.map_err(|_| "token_sha256: expected the 64 hexadecimal digits of the SHA-256 of the token".to_owned())?;
    Ok(bytes)
}

fn public_key(text: &str) -> std::result::Result<[u8; KEY_BYTES], String> {
    let key = URL_SAFE_NO_PAD.decode(text).ok().and_then(|bytes| bytes.try_into().ok());
    let key = key.ok_or("public_key: expected the 32 bytes of an X25519 key in base64url without padding")?;
    // A key of small order would have the same secret with everybody.
    match seal(&key, b"", b"") {
        Ok(_) => Ok(key),
        Err(_) => Err("public_key: expected a key that was made at random".into()),
    }
}

/// A token that only whoever holds the private key can open: HPKE (RFC 9180), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
/// AES-128-GCM, with [`SEALED_FOR`] as info and `{user name} {nonce}` as additional data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// The encapsulated key, in base64url without padding.
    pub enc: String,
    /// The sealed token, in base64url without padding.
    pub ciphertext: String,
}

fn seal(key: &[u8; KEY_BYTES], data: &[u8], secret: &[u8]) -> Result<Sealed> {
    let sealed = SUITE.seal(SEALED_FOR.as_bytes(), data, secret, &HpkePublicKey(key.to_vec()));
    let (enc, ciphertext) = sealed.map_err(|_| Error::Internal("a token could not be sealed".into()))?;
    Ok(Sealed { enc: URL_SAFE_NO_PAD.encode(enc.0), ciphertext: URL_SAFE_NO_PAD.encode(ciphertext) })
}

/// What a device is answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// It is a device now.
    Accepted {
        /// Its MQTT user name.
        username: String,
        /// Its token, unless it has made that itself.
        sealed: Option<Sealed>,
        /// Whether this answer is the first.
        is_new: bool,
    },
    /// Somebody has to decide: it asks again later.
    Pending {
        /// Whether this answer is the first.
        is_new: bool,
    },
    /// No.
    Rejected(Rejection),
}

impl Answer {
    /// What [`Self::outcome`] tells of those that are no rejections.
    pub const OUTCOMES: [&str; 3] = ["accepted", "pending", "repeated"];

    /// It as a message, to the request that it answers.
    pub fn message(&self, id: Option<&DeviceId>, nonce: Option<&str>) -> serde_json::Value {
        let mut message = json!({ "id": id, "nonce": nonce });
        let fields = match self {
            Self::Accepted { username, sealed, .. } => {
                json!({ "status": "accepted", "username": username, "sealed": sealed })
            }
            Self::Pending { .. } => json!({ "status": "pending" }),
            Self::Rejected(Rejection { code, message }) => {
                json!({ "status": "rejected", "code": code.name(), "message": message })
            }
        };
        if let (Some(message), serde_json::Value::Object(fields)) = (message.as_object_mut(), fields) {
            message.extend(fields);
        }
        message
    }

    /// What happened, for counters.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Accepted { is_new: true, .. } => "accepted",
            Self::Pending { is_new: true } => "pending",
            Self::Accepted { .. } | Self::Pending { .. } => "repeated",
            Self::Rejected(rejection) => rejection.code.name(),
        }
    }
}

/// Where a request came from.
#[derive(Debug, Clone)]
pub struct Origin {
    /// What the client calls itself, for answers that come later and for people.
    pub asker: String,
    /// Its address.
    pub address: String,
}
