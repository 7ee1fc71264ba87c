//! Claims: secrets that a batch of devices is made with, by which each of them may ask to become a device of the fleet.
//!
//! Made by [`create`], shown by [`find`] and [`page`], ended by [`revoke`], their expiry or their last device. [`verify`] and
//! [`of_secret`] tell who stands behind a secret; what is asked with it is in [`request`]. Holds: the secret is never stored, only
//! its SHA-256 (256 random bits need no slow hash); it opens nothing but the way to ask. Ignorant of: MQTT, HTTP.

pub mod request;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, TimeDelta, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::config::{Provisioning, Secret};
use crate::control;
use crate::credential::random_secret;
use crate::device::{DeviceType, GroupPath, Labels};
use crate::error::{Error, Result};
use crate::id::{ClaimId, DeviceId, TenantId, TenantKey, UserId, is_name};
use crate::policy::{Principal, Proof, Who};
use crate::role;

/// What every claim's secret begins with.
pub const PREFIX: &str = "mc_";
/// What stands between tenant and claim in a user name: no device can be called so.
pub const MARK: &str = "_claim";
/// Longest name of a claim, in characters.
pub const MAX_NAME_CHARS: usize = 100;
/// Most claims on a page.
pub const MAX_PAGE: usize = 1000;

/// Who decides what becomes of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Approval {
    /// Nobody: it is enrolled at once.
    Auto,
    /// Somebody: it waits in the inbox.
    Manual,
}

impl Approval {
    fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Manual => "manual",
        }
    }

    fn named(name: &str) -> Self {
        if name == "auto" { Self::Auto } else { Self::Manual }
    }
}

/// Which ids a claim may ask for: an id in which each `*` stands for any letters, or none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, sqlx::Type)]
#[serde(try_from = "String", into = "String")]
#[sqlx(transparent)]
pub struct IdPattern(String);

impl IdPattern {
    /// Whether an id is one of these.
    pub fn matches(&self, id: &str) -> bool {
        let mut parts = self.0.split('*');
        let first = parts.next().unwrap_or_default();
        let Some(mut rest) = id.strip_prefix(first) else { return false };
        let mut parts: Vec<_> = parts.collect();
        let Some(last) = parts.pop() else { return rest.is_empty() };
        // Taking each part as early as it comes leaves the most for those behind it.
        for part in parts {
            match rest.find(part) {
                Some(at) => rest = &rest[at + part.len()..],
                None => return false,
            }
        }
        rest.ends_with(last)
    }
}

impl TryFrom<String> for IdPattern {
    type Error = Error;
    fn try_from(given: String) -> Result<Self> {
        // With a letter in the place of each `*` it must be an id.
        if is_name(&given.replace('*', "x")) {
            return Ok(Self(given));
        }
        let given = given.chars().take(80).collect::<String>();
        Err(Error::Invalid(format!(
            "id_pattern {given:?} is not valid: expected an id, such as freezer-*, with any * in it"
        )))
    }
}

impl FromStr for IdPattern {
    type Err = Error;
    fn from_str(given: &str) -> Result<Self> {
        Self::try_from(given.to_owned())
    }
}

impl From<IdPattern> for String {
    fn from(pattern: IdPattern) -> Self {
        pattern.0
    }
}

impl fmt::Display for IdPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What devices are given, whatever they say themselves.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Template {
    /// What kind of things they are.
    pub kind: Option<DeviceType>,
    /// Where they belong.
    pub group: Option<GroupPath>,
    /// What is said about them.
    pub labels: Labels,
}

/// A claim without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// Names it.
    pub id: ClaimId,
    /// What people call it.
    pub name: String,
    /// Who decides.
    pub approval: Approval,
    /// What its devices are given.
    pub template: Template,
    /// Which ids may be asked for; `None`: any.
    pub id_pattern: Option<IdPattern>,
    /// How many devices may come by it.
    pub max_devices: u32,
    /// How many have.
    pub enrolled: u32,
    /// How many wait for approval.
    pub pending: u32,
    /// Requests that were refused.
    pub refused: i64,
    /// Why the last of them was.
    pub last_refusal: Option<String>,
    /// When.
    pub last_refused_at: Option<DateTime<Utc>>,
    /// Who made it.
    pub created_by: UserId,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// It is refused from then on.
    pub expires_at: DateTime<Utc>,
    /// When somebody ended it.
    pub revoked_at: Option<DateTime<Utc>>,
}

impl Claim {
    /// `open`, or why it opens nothing any more.
    pub fn state(&self, now: DateTime<Utc>) -> &'static str {
        match () {
            () if self.revoked_at.is_some() => "revoked",
            () if self.expires_at <= now => "expired",
            () if self.enrolled >= self.max_devices => "used-up",
            () => "open",
        }
    }
}

/// A claim to be made.
#[derive(Debug, Clone)]
pub struct NewClaim {
    /// What people call it.
    pub name: String,
    /// Who decides.
    pub approval: Approval,
    /// What its devices are given.
    pub template: Template,
    /// Which ids may be asked for; `None`: any.
    pub id_pattern: Option<IdPattern>,
    /// How many devices may come by it.
    pub max_devices: u32,
    /// How long it is accepted, in seconds.
    pub expires_in_s: u64,
}

/// Who asks by a claim: which claim, and of which tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claimant {
    /// The row of the tenant.
    pub tenant: TenantKey,
    /// The tenant's name.
    pub tenant_id: TenantId,
    /// The claim.
    pub claim: ClaimId,
    /// It ends then.
    pub expires_at: DateTime<Utc>,
}

impl Claimant {
    /// One client of them, that calls itself `asker`.
    pub fn principal(self, asker: DeviceId) -> Principal {
        let Self { tenant, tenant_id, claim, expires_at } = self;
        let proof = Proof { valid_until: Some(expires_at), ..Proof::default() };
        Principal { tenant, tenant_id, who: Who::Claim { id: claim, asker }, proof }
    }
}

/// The MQTT user name of a claim: `{tenant}/_claim/{claim}`.
pub fn username(tenant: &TenantId, claim: ClaimId) -> String {
    format!("{tenant}/{MARK}/{claim}")
}

/// The tenant and the claim in such a user name.
pub fn parse_username(username: &str) -> Option<(TenantId, ClaimId)> {
    let (tenant, rest) = username.split_once('/')?;
    let claim = rest.strip_prefix(MARK)?.strip_prefix('/')?;
    Some((tenant.parse().ok()?, claim.parse().ok()?))
}

/// Makes a claim; its secret is known at this moment only. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    tenant: TenantKey,
    by: UserId,
    new: &NewClaim,
    settings: &Provisioning,
    now: DateTime<Utc>,
) -> Result<(Claim, Secret)> {
    let name = new.name.trim();
    if name.is_empty() || name.chars().count() > MAX_NAME_CHARS || name.contains(char::is_control) {
        return Err(Error::Invalid(format!("name: expected 1 to {MAX_NAME_CHARS} printable characters")));
    }
    let most = settings.max_claim_devices;
    if !(1..=most).contains(&new.max_devices) {
        return Err(Error::Invalid(format!("max_devices is {}: expected 1 to {most}", new.max_devices)));
    }
    let expires_at = expiry(new.expires_in_s, settings.max_claim_s, now)?;
    role::lock(db, Some(tenant)).await?;
    check_room(db, tenant, settings, now).await?;
    let id = ClaimId::new();
    let secret = Secret::from(format!("{PREFIX}{}", random_secret()?.expose()));
    let hash = Sha256::digest(secret.expose());
    let Template { kind, group, labels } = &new.template;
    sqlx::query!(
        "
        insert into claim (id, tenant_key, name, secret_hash, approval, type, group_path, labels, id_pattern, max_devices,
                           created_by, created_at, expires_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
        ",
        id.uuid(),
        tenant.0,
        name,
        hash.as_slice(),
        new.approval.as_str(),
        kind.as_ref().map(DeviceType::as_str),
        group.as_ref().map(GroupPath::as_str),
        Json(labels) as _,
        new.id_pattern.as_ref().map(|pattern| pattern.0.as_str()),
        i32::try_from(new.max_devices).unwrap_or(i32::MAX),
        by.uuid(),
        now,
        expires_at
    )
    .execute(&mut *db)
    .await?;
    Ok((find(db, tenant, id).await?, secret))
}

fn expiry(asked_s: u64, most_s: u64, now: DateTime<Utc>) -> Result<DateTime<Utc>> {
    let end = i64::try_from(asked_s).ok().filter(|_| (1..=most_s).contains(&asked_s));
    let end = end.and_then(TimeDelta::try_seconds).and_then(|life| now.checked_add_signed(life));
    end.ok_or_else(|| Error::Invalid(format!("expires_in_s is {asked_s}: expected 1 to {most_s}")))
}

/// Those that are over do not count.
async fn check_room(
    db: &mut PgConnection,
    tenant: TenantKey,
    settings: &Provisioning,
    now: DateTime<Utc>,
) -> Result<()> {
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from claim where tenant_key = $1 and revoked_at is null and expires_at > $2"#,
        tenant.0,
        now
    );
    if usize::try_from(count.fetch_one(db).await?).is_ok_and(|count| count >= settings.max_claims) {
        return Err(Error::TooMany { what: "claims", most: settings.max_claims });
    }
    Ok(())
}

/// The claim of that id.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: ClaimId) -> Result<Claim> {
    read(db, tenant, &[id.uuid()]).await?.pop().ok_or(Error::NoSuchClaim(id))
}

/// At most `limit` (itself at most [`MAX_PAGE`]) claims in the order they were made, ended ones too, beginning behind `after`.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    after: Option<ClaimId>,
    limit: usize,
) -> Result<(Vec<Claim>, Option<ClaimId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut ids = sqlx::query_scalar!(
        "select id from claim where tenant_key = $1 and ($2::uuid is null or id > $2) order by id limit $3",
        tenant.0,
        after.map(ClaimId::uuid),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = ids.len() > limit;
    ids.truncate(limit);
    let claims = read(db, tenant, &ids).await?;
    let next = claims.last().filter(|_| more).map(|claim| claim.id);
    Ok((claims, next))
}

async fn read(db: &mut PgConnection, tenant: TenantKey, ids: &[Uuid]) -> Result<Vec<Claim>> {
    let rows = sqlx::query!(
        r#"
        select c.id as "id: ClaimId", c.name, c.approval, c.type as "kind: DeviceType", c.group_path as "group: GroupPath",
               c.labels as "labels: Json<Labels>", c.id_pattern as "id_pattern: IdPattern", c.max_devices, c.enrolled,
               (select count(*) from claim_request r where r.claim_id = c.id and r.state = 'pending') as "pending!",
               c.refused, c.last_refusal, c.last_refused_at, c.created_by as "created_by: UserId", c.created_at,
               c.expires_at, c.revoked_at
          from claim c
         where c.tenant_key = $1 and c.id = any($2)
         order by c.id
        "#,
        tenant.0,
        ids
    )
    .fetch_all(db)
    .await?;
    let claims = rows.into_iter().map(|row| Claim {
        id: row.id,
        name: row.name,
        approval: Approval::named(&row.approval),
        template: Template { kind: row.kind, group: row.group, labels: row.labels.0 },
        id_pattern: row.id_pattern,
        max_devices: u32::try_from(row.max_devices).unwrap_or_default(),
        enrolled: u32::try_from(row.enrolled).unwrap_or_default(),
        pending: u32::try_from(row.pending).unwrap_or(u32::MAX),
        refused: row.refused,
        last_refusal: row.last_refusal,
        last_refused_at: row.last_refused_at,
        created_by: row.created_by,
        created_at: row.created_at,
        expires_at: row.expires_at,
        revoked_at: row.revoked_at,
    });
    Ok(claims.collect())
}

/// Ends a claim at once: whoever came by it goes, and what waits for approval is rejected. Answers what it was and what it is;
/// ending it again changes nothing. To be called in a transaction.
pub async fn revoke(
    db: &mut PgConnection,
    tenant: TenantKey,
    id: ClaimId,
    now: DateTime<Utc>,
) -> Result<(Claim, Claim)> {
    sqlx::query!("select id from claim where id = $1 and tenant_key = $2 for update", id.uuid(), tenant.0)
        .fetch_optional(&mut *db)
        .await?
        .ok_or(Error::NoSuchClaim(id))?;
    let old = find(db, tenant, id).await?;
    if old.revoked_at.is_some() {
        return Ok((old.clone(), old));
    }
    sqlx::query!("update claim set revoked_at = $2 where id = $1", id.uuid(), now).execute(&mut *db).await?;
    sqlx::query!(
        "update claim_request set state = 'rejected', reason = 'the claim was revoked', decided_at = $2
          where claim_id = $1 and state = 'pending'",
        id.uuid(),
        now
    )
    .execute(&mut *db)
    .await?;
    let new = find(db, tenant, id).await?;
    control::bump(db).await?;
    Ok((old, new))
}

/// Who stands behind the user name of a claim and its secret.
pub async fn verify(
    db: &mut PgConnection,
    username: &str,
    secret: &[u8],
    now: DateTime<Utc>,
) -> Result<Option<Claimant>> {
    let (Some((tenant, claim)), Ok(secret)) = (parse_username(username), str::from_utf8(secret)) else {
        return Ok(None);
    };
    let claimant = of_secret(db, secret, now).await?;
    Ok(claimant.filter(|claimant| claimant.claim == claim && claimant.tenant_id == tenant))
}

/// Which of these claims are there and not revoked; their time is known to whoever came by them.
pub(crate) async fn unrevoked(db: &mut PgConnection, claims: &[ClaimId]) -> Result<HashSet<ClaimId>> {
    let claims = claims.iter().map(|claim| claim.uuid()).collect::<Vec<_>>();
    let open = sqlx::query_scalar!(
        r#"select id as "id: ClaimId" from claim where id = any($1) and revoked_at is null"#,
        &claims
    );
    Ok(open.fetch_all(db).await?.into_iter().collect())
}

/// Who stands behind the secret of a claim.
pub async fn of_secret(db: &mut PgConnection, secret: &str, now: DateTime<Utc>) -> Result<Option<Claimant>> {
    // The hash of what was shown is not for the caller to choose, so a lookup by it tells nothing by its time.
    let hash = Sha256::digest(secret);
    let row = sqlx::query_as!(
        Claimant,
        r#"
        select t.key as "tenant: TenantKey", t.id as "tenant_id: TenantId", c.id as "claim: ClaimId", c.expires_at
          from claim c
          join tenant t on t.key = c.tenant_key
         where c.secret_hash = $1 and c.revoked_at is null and c.expires_at > $2
        "#,
        hash.as_slice(),
        now
    );
    Ok(row.fetch_optional(db).await?)
}
