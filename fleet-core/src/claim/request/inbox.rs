//! Requests that were kept: those that wait for somebody to decide, and what was decided.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::granting::{Asked, enrol};
use super::{Answer, Code, KEY_BYTES, Proof, Rejection, Request, Sealed};
use crate::claim::Template;
use crate::device::{Device, DeviceType, GroupPath, Labels};
use crate::error::{Error, Result};
use crate::id::{ClaimId, ClaimRequestId, DeviceId, TenantKey, UserId};

/// Longest reason of a rejection, in characters.
pub const MAX_REASON_CHARS: usize = 500;

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

/// At most `limit` (itself at most [`crate::claim::MAX_PAGE`]) of the requests that `filter` asks for, in the order they came, beginning
/// behind `after`.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    filter: &Filter,
    after: Option<ClaimRequestId>,
    limit: usize,
) -> Result<(Vec<Kept>, Option<ClaimRequestId>)> {
    let limit = limit.clamp(1, crate::claim::MAX_PAGE);
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

/// A request that waits, its claim, both locked in the order in which [`super::granting`] does; and the tenant's name.
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
