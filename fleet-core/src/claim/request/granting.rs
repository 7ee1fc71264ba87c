//! What becomes of a request at once: it was answered before, it is granted, it waits, or it is refused.

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::types::Json;
use sqlx::{PgConnection, PgPool};

use super::{Answer, Code, Origin, Proof, Rejection, Request, Sealed, seal};
use crate::audit::{self, Actor, Author, Entry, Source};
use crate::claim::{Approval, Claimant, IdPattern, Template};
use crate::config::Provisioning;
use crate::credential;
use crate::device::{self, Device, DeviceType, GroupPath, Labels, NewDevice};
use crate::error::{Error, Result};
use crate::id::{ClaimId, ClaimRequestId, DeviceId, TenantKey, UserId};

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

pub(super) fn credential_name(claimant: &Claimant, id: &DeviceId) -> String {
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
pub(super) struct Asked {
    pub(super) id: ClaimRequestId,
    pub(super) claim: ClaimId,
    pub(super) nonce: String,
    pub(super) proof: Proof,
}

/// Makes the device, counts it, and keeps the answer.
pub(super) async fn enrol(
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
