//! What is asked by a claim: to become a device of the fleet.
//!
//! A request is read by [`Request::decode`] and answered by `ask`; one that waits is decided by [`approve`] or [`reject`] and
//! asked for again by its device. Holds: a request that comes again with the same nonce is the same request, makes one device and
//! has one answer; no answer holds a secret that somebody else could use: the device made its token itself and shows the hash of
//! it, or the token is sealed with HPKE (RFC 9180) to the public key it showed (ADR 10); whatever cannot be granted is answered with
//! a code. Ignorant of: MQTT, HTTP.

use std::collections::BTreeMap;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use rustls::crypto::aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_128 as SUITE;
use rustls::crypto::hpke::{Hpke, HpkePublicKey};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::{Approval, Claimant, IdPattern, Template};
use crate::audit::{self, Actor, Author, Entry, Source};
use crate::config::Provisioning;
use crate::credential;
use crate::device::{self, Device, DeviceType, GroupPath, Labels, NewDevice};
use crate::error::{Error, Result};
use crate::id::{ClaimId, ClaimRequestId, DeviceId, TenantKey, UserId};

/// Largest request, in bytes.
pub const MAX_BYTES: usize = 16 * 1024;
/// Longest serial number, in characters.
pub const MAX_SERIAL_CHARS: usize = 128;
/// Longest reason of a rejection, in characters.
pub const MAX_REASON_CHARS: usize = 500;
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
    let refused = || "token_sha256: expected the 64 hexadecimal digits of the SHA-256 of the token".to_owned();
    if text.len() != 2 * KEY_BYTES || !text.is_ascii() {
        return Err(refused());
    }
    let mut bytes = [0; KEY_BYTES];
    for (place, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * place..2 * place + 2], 16).map_err(|_| refused())?;
    }
    if text.contains('+') { Err(refused()) } else { Ok(bytes) }
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

struct Locked {
    approval: Approval,
    template: Template,
    id_pattern: Option<IdPattern>,
    is_open: bool,
    is_used_up: bool,
    asked: i32,
}

/// Answers a request, and commits that.
pub async fn answer(
    pool: &PgPool,
    claimant: &Claimant,
    request: &Request,
    from: &Origin,
    settings: &Provisioning,
    now: DateTime<Utc>,
) -> Result<Answer> {
    loop {
        let mut tx = pool.begin().await?;
        match ask(&mut tx, claimant, request, from, settings, now).await {
            // Somebody enrolled a device of that id at this moment: it is seen when it is looked at again.
            Err(Error::DeviceExists(_)) => {}
            Err(error) => return Err(error),
            Ok(answer) => {
                tx.commit().await?;
                return Ok(answer);
            }
        }
    }
}

async fn ask(
    db: &mut PgConnection,
    claimant: &Claimant,
    request: &Request,
    from: &Origin,
    settings: &Provisioning,
    now: DateTime<Utc>,
) -> Result<Answer> {
    let Some(claim) = lock(db, claimant, now).await? else {
        return Ok(Answer::Rejected(Rejection::new(Code::ClaimEnded, "the claim does not exist")));
    };
    if claim.asked > i32::try_from(settings.claim_requests_per_minute).unwrap_or(i32::MAX) {
        let most = settings.claim_requests_per_minute;
        let message =
            format!("the claim is asked too often: expected at most {most} requests a minute, try again in the next");
        return Ok(Answer::Rejected(Rejection::new(Code::RateLimited, message)));
    }
    if let Some(answer) = repeated(db, claimant, request, from, now).await? {
        return Ok(answer);
    }
    match grant(db, claimant, &claim, request, from, settings, now).await? {
        Ok(answer) => Ok(answer),
        Err(rejection) => {
            refuse(db, claimant, &rejection, now).await?;
            Ok(Answer::Rejected(rejection))
        }
    }
}

/// Counts the request, and has all others of the claim wait until this one is answered.
async fn lock(db: &mut PgConnection, claimant: &Claimant, now: DateTime<Utc>) -> Result<Option<Locked>> {
    let row = sqlx::query!(
        r#"
        update claim
           set asked = case when minute > $2 - interval '1 minute' then asked + 1 else 1 end,
               minute = case when minute > $2 - interval '1 minute' then minute else $2 end
         where id = $1
     returning approval, type as "kind: DeviceType", group_path as "group: GroupPath", labels as "labels: Json<Labels>",
               id_pattern as "id_pattern: IdPattern", revoked_at is null and expires_at > $2 as "is_open!",
               enrolled >= max_devices as "is_used_up!", asked
        "#,
        claimant.claim.uuid(),
        now
    )
    .fetch_optional(db)
    .await?;
    Ok(row.map(|row| Locked {
        approval: Approval::named(&row.approval),
        template: Template { kind: row.kind, group: row.group, labels: row.labels.0 },
        id_pattern: row.id_pattern,
        is_open: row.is_open,
        is_used_up: row.is_used_up,
        asked: row.asked,
    }))
}

/// The answer to a request that came before.
async fn repeated(
    db: &mut PgConnection,
    claimant: &Claimant,
    request: &Request,
    from: &Origin,
    now: DateTime<Utc>,
) -> Result<Option<Answer>> {
    let row = sqlx::query!(
        r#"
        update claim_request
           set asked = asked + 1, last_asked_at = $4, asker = $5, address = $6
         where claim_id = $1 and device_id = $2 and nonce = $3
     returning token_hash, public_key, state, reason, sealed as "sealed: Json<Sealed>",
               exists (select from device d where d.key = device_key) as "is_there!"
        "#,
        claimant.claim.uuid(),
        request.id.as_str(),
        request.nonce,
        now,
        from.asker,
        from.address
    )
    .fetch_optional(db)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let is_same = match request.proof {
        Proof::TokenHash(hash) => row.token_hash.as_deref() == Some(&hash[..]),
        Proof::PublicKey(key) => row.public_key.as_deref() == Some(&key[..]),
    };
    if !is_same {
        let message = "this nonce was used with another token or key: expected a new one";
        return Ok(Some(Answer::Rejected(Rejection::new(Code::NonceTaken, message))));
    }
    Ok(Some(match row.state.as_str() {
        "pending" => Answer::Pending { is_new: false },
        "approved" if row.is_there => Answer::Accepted {
            username: credential_name(claimant, &request.id),
            sealed: row.sealed.map(|sealed| sealed.0),
            is_new: false,
        },
        "approved" => Answer::Rejected(Rejection::new(Code::Rejected, "the device was deleted meanwhile")),
        _ => Answer::Rejected(Rejection::new(Code::Rejected, row.reason.unwrap_or_default())),
    }))
}

fn credential_name(claimant: &Claimant, id: &DeviceId) -> String {
    format!("{}/{id}", claimant.tenant_id)
}

type Granted = std::result::Result<Answer, Rejection>;

async fn grant(
    db: &mut PgConnection,
    claimant: &Claimant,
    claim: &Locked,
    request: &Request,
    from: &Origin,
    settings: &Provisioning,
    now: DateTime<Utc>,
) -> Result<Granted> {
    if let Err(rejection) = check(db, claimant, claim, request, settings).await? {
        return Ok(Err(rejection));
    }
    let new = match request.device(&claim.template) {
        Ok(new) => new,
        Err(error) => return Ok(Err(Rejection::new(Code::Malformed, error.to_string()))),
    };
    let kept = insert(db, claimant, request, from, now).await?;
    let source = Source { address: Some(from.address.clone()), ..Source::default() };
    let by = Author { tenant: claimant.tenant, actor: Actor::Claim(claimant.claim), source };
    if claim.approval == Approval::Manual {
        let after = json!({ "claim": claimant.claim, "device": request.id, "serial": request.serial });
        let entry = Entry::of("claim-request.create", kept).on(&request.id).after(&after);
        audit::record(db, &by, &entry, now).await?;
        return Ok(Ok(Answer::Pending { is_new: true }));
    }
    let asked = Asked { id: kept, claim: claimant.claim, nonce: request.nonce.clone(), proof: request.proof };
    let username = credential_name(claimant, &request.id);
    let (device, sealed) = enrol(db, claimant.tenant, &asked, &new, &username, None, now).await?;
    let after = json!({
        "id": device.id, "type": device.kind, "group": device.group, "labels": device.labels, "claim": claimant.claim,
    });
    audit::record(db, &by, &Entry::of("device.provision", &device.id).on(&device.id).after(&after), now).await?;
    Ok(Ok(Answer::Accepted { username, sealed, is_new: true }))
}

async fn check(
    db: &mut PgConnection,
    claimant: &Claimant,
    claim: &Locked,
    request: &Request,
    settings: &Provisioning,
) -> Result<std::result::Result<(), Rejection>> {
    let no = |code, message: String| Ok(Err(Rejection::new(code, message)));
    if !claim.is_open {
        return no(Code::ClaimEnded, "the claim was revoked or has expired".into());
    }
    if let Some(pattern) = claim.id_pattern.as_ref().filter(|pattern| !pattern.matches(request.id.as_str())) {
        return no(Code::WrongId, format!("the claim is not for {}: expected {pattern}", request.id));
    }
    if claim.is_used_up {
        return no(Code::UsedUp, "the claim is used up: as many devices as it was made for have come".into());
    }
    let found = sqlx::query!(
        r#"
        select exists (select from device where tenant_key = $1 and id = $2) as "exists!",
               (select count(*) from claim_request where tenant_key = $1 and state = 'pending') as "pending!",
               (select count(*) from claim_request where claim_id = $3) as "kept!"
        "#,
        claimant.tenant.0,
        request.id.as_str(),
        claimant.claim.uuid()
    )
    .fetch_one(db)
    .await?;
    if found.exists {
        return no(Code::Exists, format!("there is a device {} already", request.id));
    }
    let is_full = |count: i64, most: usize| usize::try_from(count).is_ok_and(|count| count >= most);
    if claim.approval == Approval::Manual && is_full(found.pending, settings.max_pending) {
        return no(Code::Full, format!("{} requests wait for approval already: try again later", settings.max_pending));
    }
    if is_full(found.kept, settings.max_claim_requests) {
        return no(Code::Full, format!("{} requests came by this claim already", settings.max_claim_requests));
    }
    Ok(Ok(()))
}

async fn insert(
    db: &mut PgConnection,
    claimant: &Claimant,
    request: &Request,
    from: &Origin,
    now: DateTime<Utc>,
) -> Result<ClaimRequestId> {
    let id = ClaimRequestId::new();
    let (token_hash, public_key) = match &request.proof {
        Proof::TokenHash(hash) => (Some(&hash[..]), None),
        Proof::PublicKey(key) => (None, Some(&key[..])),
    };
    sqlx::query!(
        "
        insert into claim_request (id, claim_id, tenant_key, device_id, nonce, token_hash, public_key, type, labels, serial,
                                   asker, address, state, asked_at, last_asked_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, 'pending', $13, $13)
        ",
        id.uuid(),
        claimant.claim.uuid(),
        claimant.tenant.0,
        request.id.as_str(),
        request.nonce,
        token_hash,
        public_key,
        request.kind.as_ref().map(DeviceType::as_str),
        Json(&request.labels) as _,
        request.serial,
        from.asker,
        from.address,
        now
    )
    .execute(db)
    .await?;
    Ok(id)
}

async fn refuse(db: &mut PgConnection, claimant: &Claimant, rejection: &Rejection, now: DateTime<Utc>) -> Result<()> {
    sqlx::query!(
        "update claim set refused = refused + 1, last_refusal = $2, last_refused_at = $3 where id = $1",
        claimant.claim.uuid(),
        rejection.message,
        now
    )
    .execute(db)
    .await?;
    Ok(())
}

/// A request that is granted.
struct Asked {
    id: ClaimRequestId,
    claim: ClaimId,
    nonce: String,
    proof: Proof,
}

/// Makes the device, counts it, and keeps the answer.
async fn enrol(
    db: &mut PgConnection,
    tenant: TenantKey,
    asked: &Asked,
    new: &NewDevice,
    username: &str,
    by: Option<UserId>,
    now: DateTime<Utc>,
) -> Result<(Device, Option<Sealed>)> {
    let device = device::add(db, tenant, new, now).await?;
    let sealed = match &asked.proof {
        Proof::TokenHash(hash) => {
            credential::accept(db, device.key, hash, now).await?;
            None
        }
        Proof::PublicKey(key) => {
            let issued = credential::issue(db, tenant, &new.id, now).await?;
            let data = format!("{username} {}", asked.nonce);
            Some(seal(key, data.as_bytes(), issued.password.expose().as_bytes())?)
        }
    };
    sqlx::query!(
        "
        update claim_request
           set state = 'approved', device_key = $2, sealed = $3, decided_at = $4, decided_by = $5
         where id = $1
        ",
        asked.id.uuid(),
        device.key.0,
        sealed.as_ref().map(Json) as _,
        now,
        by.map(UserId::uuid)
    )
    .execute(&mut *db)
    .await?;
    sqlx::query!("update claim set enrolled = enrolled + 1 where id = $1", asked.claim.uuid()).execute(db).await?;
    Ok((device, sealed))
}

/// What has become of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It waits for approval.
    Pending,
    /// It has become a device.
    Approved,
    /// It has not.
    Rejected,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Pending, Self::Approved, Self::Rejected];

    /// It as answers spell it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Approved => "approved",
            Self::Rejected => "rejected",
        }
    }

    fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|state| state.as_str() == name).unwrap_or(Self::Rejected)
    }
}

/// A request as it is kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Kept {
    /// Names it.
    pub id: ClaimRequestId,
    /// By which claim it came.
    pub claim: ClaimId,
    /// The id it wants.
    pub device: DeviceId,
    /// What kind of thing it says it is.
    pub kind: Option<DeviceType>,
    /// What it says about itself.
    pub labels: Labels,
    /// The number on its plate.
    pub serial: Option<String>,
    /// What the client calls itself.
    pub asker: String,
    /// Its address.
    pub address: String,
    /// What has become of it.
    pub state: State,
    /// Why it was rejected.
    pub reason: Option<String>,
    /// How often it was asked.
    pub asked: i32,
    /// First.
    pub asked_at: DateTime<Utc>,
    /// Last.
    pub last_asked_at: DateTime<Utc>,
    /// When it was decided.
    pub decided_at: Option<DateTime<Utc>>,
    /// By whom; `None`: nobody had to.
    pub decided_by: Option<UserId>,
}

/// Which requests are wanted; all that is set must hold.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// In this state.
    pub state: Option<State>,
    /// By this claim.
    pub claim: Option<ClaimId>,
}

/// At most `limit` (itself at most [`super::MAX_PAGE`]) of the requests that `filter` asks for, in the order they came, beginning
/// behind `after`.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    filter: &Filter,
    after: Option<ClaimRequestId>,
    limit: usize,
) -> Result<(Vec<Kept>, Option<ClaimRequestId>)> {
    let limit = limit.clamp(1, super::MAX_PAGE);
    let mut ids = sqlx::query_scalar!(
        "
        select id from claim_request
         where tenant_key = $1 and ($2::uuid is null or id > $2) and ($3::text is null or state = $3)
           and ($4::uuid is null or claim_id = $4)
         order by id
         limit $5
        ",
        tenant.0,
        after.map(ClaimRequestId::uuid),
        filter.state.map(State::as_str),
        filter.claim.map(ClaimId::uuid),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = ids.len() > limit;
    ids.truncate(limit);
    let requests = read(db, tenant, &ids).await?;
    let next = requests.last().filter(|_| more).map(|request| request.id);
    Ok((requests, next))
}

/// The request of that id.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: ClaimRequestId) -> Result<Kept> {
    read(db, tenant, &[id.uuid()]).await?.pop().ok_or(Error::NoSuchClaimRequest(id))
}

async fn read(db: &mut PgConnection, tenant: TenantKey, ids: &[Uuid]) -> Result<Vec<Kept>> {
    let rows = sqlx::query!(
        r#"
        select id as "id: ClaimRequestId", claim_id as "claim: ClaimId", device_id as "device: DeviceId",
               type as "kind: DeviceType", labels as "labels: Json<Labels>", serial, asker, address, state, reason, asked,
               asked_at, last_asked_at, decided_at, decided_by as "decided_by: UserId"
          from claim_request
         where tenant_key = $1 and id = any($2)
         order by id
        "#,
        tenant.0,
        ids
    )
    .fetch_all(db)
    .await?;
    let requests = rows.into_iter().map(|row| Kept {
        id: row.id,
        claim: row.claim,
        device: row.device,
        kind: row.kind,
        labels: row.labels.0,
        serial: row.serial,
        asker: row.asker,
        address: row.address,
        state: State::named(&row.state),
        reason: row.reason,
        asked: row.asked,
        asked_at: row.asked_at,
        last_asked_at: row.last_asked_at,
        decided_at: row.decided_at,
        decided_by: row.decided_by,
    });
    Ok(requests.collect())
}

/// What the device of a request is to be told, and what its client calls itself.
pub async fn told(db: &mut PgConnection, tenant: TenantKey, id: ClaimRequestId) -> Result<(String, serde_json::Value)> {
    let row = sqlx::query!(
        r#"
        select t.id as "tenant!", r.device_id as "device: DeviceId", r.nonce, r.asker, r.state, r.reason,
               r.sealed as "sealed: Json<Sealed>"
          from claim_request r
          join tenant t on t.key = r.tenant_key
         where r.tenant_key = $1 and r.id = $2
        "#,
        tenant.0,
        id.uuid()
    )
    .fetch_optional(db)
    .await?
    .ok_or(Error::NoSuchClaimRequest(id))?;
    let answer = match State::named(&row.state) {
        State::Pending => Answer::Pending { is_new: false },
        State::Approved => Answer::Accepted {
            username: format!("{}/{}", row.tenant, row.device),
            sealed: row.sealed.map(|sealed| sealed.0),
            is_new: true,
        },
        State::Rejected => Answer::Rejected(Rejection::new(Code::Rejected, row.reason.unwrap_or_default())),
    };
    Ok((row.asker, answer.message(Some(&row.device), Some(&row.nonce))))
}

/// What an approval says about the device beyond the claim; it wins over claim and device.
#[derive(Debug, Clone, Default)]
pub struct Approve {
    /// What kind of thing it is.
    pub kind: Option<DeviceType>,
    /// Where it belongs.
    pub group: Option<GroupPath>,
    /// Labels to add.
    pub labels: Labels,
}

/// Makes a device of a request that waits. To be called in a transaction.
pub async fn approve(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: ClaimRequestId,
    approve: &Approve,
    by: UserId,
    now: DateTime<Utc>,
) -> Result<(Kept, Device)> {
    let (claim, asked, username) = undecided(db, tenant, id).await?;
    if claim.is_used_up {
        return Err(Error::ClaimUsedUp(asked.claim));
    }
    let kept = find(db, tenant, id).await?;
    let request = Request {
        id: kept.device,
        nonce: asked.nonce.clone(),
        proof: asked.proof,
        kind: kept.kind,
        labels: kept.labels,
        serial: kept.serial,
    };
    let labels = claim.template.labels.as_map().iter().chain(approve.labels.as_map());
    let labels = labels.map(|(key, value)| (key.clone(), value.clone())).collect::<BTreeMap<_, _>>();
    let template = Template {
        kind: approve.kind.clone().or(claim.template.kind),
        group: approve.group.clone().or(claim.template.group),
        labels: Labels::try_from(labels)?,
    };
    let username = format!("{username}/{}", request.id);
    let (device, _) = enrol(db, tenant, &asked, &request.device(&template)?, &username, Some(by), now).await?;
    Ok((find(db, tenant, id).await?, device))
}

/// Refuses a request that waits; its device is told the reason. To be called in a transaction.
pub async fn reject(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: ClaimRequestId,
    reason: Option<&str>,
    by: UserId,
    now: DateTime<Utc>,
) -> Result<Kept> {
    let reason = reason.unwrap_or("an operator rejected it").trim();
    if reason.is_empty() || reason.chars().count() > MAX_REASON_CHARS || reason.contains(char::is_control) {
        return Err(Error::Invalid(format!("reason: expected 1 to {MAX_REASON_CHARS} printable characters")));
    }
    undecided(db, tenant, id).await?;
    sqlx::query!(
        "update claim_request set state = 'rejected', reason = $2, decided_at = $3, decided_by = $4 where id = $1",
        id.uuid(),
        reason,
        now,
        by.uuid()
    )
    .execute(&mut *db)
    .await?;
    find(db, tenant, id).await
}

struct Undecided {
    template: Template,
    is_used_up: bool,
}

/// A request that waits, its claim, both locked in the order in which [`ask`] does; and the tenant's name.
async fn undecided(db: &mut PgConnection, tenant: TenantKey, id: ClaimRequestId) -> Result<(Undecided, Asked, String)> {
    let claim = sqlx::query!(
        r#"
        select c.id as "id: ClaimId", c.type as "kind: DeviceType", c.group_path as "group: GroupPath",
               c.labels as "labels: Json<Labels>", c.enrolled >= c.max_devices as "is_used_up!", t.id as "tenant!"
          from claim c
          join tenant t on t.key = c.tenant_key
         where c.tenant_key = $1 and c.id = (select claim_id from claim_request where id = $2 and tenant_key = $1)
           for no key update of c
        "#,
        tenant.0,
        id.uuid()
    )
    .fetch_optional(&mut *db)
    .await?
    .ok_or(Error::NoSuchClaimRequest(id))?;
    let row = sqlx::query!(
        "select nonce, token_hash, public_key, state from claim_request where id = $1 for no key update",
        id.uuid()
    )
    .fetch_one(&mut *db)
    .await?;
    if row.state != State::Pending.as_str() {
        return Err(Error::Decided(id));
    }
    let bytes = |bytes: Option<Vec<u8>>| bytes.and_then(|bytes| <[u8; KEY_BYTES]>::try_from(bytes).ok());
    let proof = match (bytes(row.token_hash), bytes(row.public_key)) {
        (Some(hash), _) => Proof::TokenHash(hash),
        (_, Some(key)) => Proof::PublicKey(key),
        _ => return Err(Error::Internal(format!("request {id} has no proof"))),
    };
    let template = Template { kind: claim.kind, group: claim.group, labels: claim.labels.0 };
    let asked = Asked { id, claim: claim.id, nonce: row.nonce, proof };
    Ok((Undecided { template, is_used_up: claim.is_used_up }, asked, claim.tenant))
}
