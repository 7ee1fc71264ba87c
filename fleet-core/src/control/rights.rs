//! Whether those who are connected may still be.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::claim;
use crate::gateway::{self, Children};
use crate::id::{CredentialId, DeviceKey};
use crate::policy::{Principal, Who};
use crate::role::Roles;
use crate::standing::{self, Asked, Standing};
use crate::{Error, Result};

/// Why a principal may not stay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its device exists no more.
    DeviceDeleted,
    /// Its device has left for good.
    DeviceDecommissioned,
    /// Its device was disabled.
    DeviceDisabled,
    /// Its credential was revoked, or has expired.
    CredentialEnded,
    /// Its user exists no more.
    UserDeleted,
    /// Its user was disabled.
    UserDisabled,
    /// Its API key exists no more.
    KeyDeleted,
    /// Its login has ended.
    SessionEnded,
    /// Its claim was revoked.
    ClaimRevoked,
}

impl Ended {
    /// For whoever is told to go.
    pub fn text(self) -> &'static str {
        match self {
            Self::DeviceDeleted => "the device was deleted",
            Self::DeviceDecommissioned => "the device was decommissioned",
            Self::DeviceDisabled => "the device was disabled",
            Self::CredentialEnded => "the credential was revoked",
            Self::UserDeleted => "the user was deleted",
            Self::UserDisabled => "the user was disabled",
            Self::KeyDeleted => "the API key was deleted",
            Self::SessionEnded => "the login has ended",
            Self::ClaimRevoked => "the claim was revoked",
        }
    }

    /// Whether whoever it was will never come again.
    pub fn is_for_good(self) -> bool {
        matches!(self, Self::DeviceDeleted | Self::DeviceDecommissioned | Self::UserDeleted | Self::KeyDeleted)
    }
}

/// What has become of a principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It may not stay.
    Ended(Ended),
    /// It may stay, at most until then: its credential ends earlier than was known.
    Until(DateTime<Utc>),
    /// It may do something else than before.
    Changed(Principal),
}

/// Looks at principals again: for each, by its place, whose standing is not what it was. Two statements for all devices,
/// one for all users and API keys, one for all claims.
pub async fn recheck(
    db: &mut PgConnection,
    roles: &Roles,
    principals: &[&Principal],
    now: DateTime<Utc>,
) -> Result<Vec<(usize, Verdict)>> {
    let mut verdicts = devices(db, principals, now).await?;
    verdicts.extend(users(db, roles, principals, now).await?);
    verdicts.extend(claims(db, principals).await?);
    Ok(verdicts)
}

async fn devices(
    db: &mut PgConnection,
    principals: &[&Principal],
    now: DateTime<Utc>,
) -> Result<Vec<(usize, Verdict)>> {
    let (mut places, mut devices, mut keys) = (Vec::new(), Vec::new(), Vec::new());
    let (mut credentials, mut until) = (Vec::new(), Vec::new());
    let (mut authorities, mut serials, mut late) = (Vec::new(), Vec::new(), Vec::new());
    for (place, principal) in principals.iter().enumerate() {
        if let Who::Device { key, .. } = &principal.who {
            places.push(place);
            devices.push(*key);
            keys.push(key.0);
            credentials.push(principal.proof.credential.map(CredentialId::uuid));
            until.push(principal.proof.valid_until);
            let vouched = principal.proof.vouched;
            authorities.push(vouched.map(|vouched| vouched.authority.uuid()));
            serials.push(vouched.map(|vouched| vouched.serial.as_bytes().to_vec()));
            late.push(principal.proof.renew_only);
        }
    }
    if places.is_empty() {
        return Ok(Vec::new());
    }
    // A certificate that is late is past its end already: it ends with its grace, which the connection knows.
    let rows = sqlx::query!(
        r#"
        select place as "place!", deleted as "deleted!", disabled as "disabled!", has_left as "has_left!", ended as "ended!",
               expires_at as "expires_at?"
          from (select u.place, u.until, d.key is null as deleted, coalesce(d.disabled, false) as disabled,
                       d.decommissioned_at is not null as has_left,
                       u.credential is not null and (c.id is null or c.revoked_at is not null)
                       or u.authority is not null and a.id is null
                       or coalesce(a.disabled or c.expires_at <= $4 and not u.late, false)
                       or a.id is not null
                          and exists (select from revoked_certificate r
                                       where r.authority_id = a.id and r.serial = coalesce(c.serial, u.serial)) as ended,
                       case when not u.late then c.expires_at end as expires_at
                  from unnest($1::bigint[], $2::uuid[], $3::timestamptz[], $5::uuid[], $6::bytea[], $7::boolean[])
                       with ordinality as u (device, credential, until, authority, serial, late, place)
                  left join device d on d.key = u.device
                  left join credential c on c.id = u.credential and c.device_key = u.device
                  left join authority a on a.id = coalesce(c.authority_id, u.authority)) as now
         where deleted or disabled or ended or expires_at < coalesce(until, 'infinity')
        "#,
        &keys,
        &credentials as &[Option<Uuid>],
        &until as &[Option<DateTime<Utc>>],
        now,
        &authorities as &[Option<Uuid>],
        &serials as &[Option<Vec<u8>>],
        &late
    )
    .fetch_all(&mut *db)
    .await?;
    let families = gateway::children_of(db, &devices).await?;
    let adopted = places.iter().filter_map(|place| Some((*place, adopt(principals[*place], &families)?)));
    let mut adopted: HashMap<_, _> = adopted.collect();
    let mut verdicts = Vec::new();
    for row in rows {
        let place = usize::try_from(row.place).ok().and_then(|place| places.get(place.checked_sub(1)?));
        let place = *place.ok_or_else(|| Error::Internal("a place beyond the list".into()))?;
        let verdict = match (row.deleted, row.disabled, row.ended, row.expires_at) {
            (true, ..) => Verdict::Ended(Ended::DeviceDeleted),
            _ if row.has_left => Verdict::Ended(Ended::DeviceDecommissioned),
            (_, true, ..) => Verdict::Ended(Ended::DeviceDisabled),
            (_, _, true, _) => Verdict::Ended(Ended::CredentialEnded),
            (.., Some(at)) => Verdict::Until(at),
            (.., None) => continue,
        };
        match (&verdict, adopted.get_mut(&place)) {
            (Verdict::Until(at), Some(principal)) => principal.proof.valid_until = Some(*at),
            (_, Some(_)) => drop(adopted.remove(&place)),
            (_, None) => {}
        }
        verdicts.push((place, verdict));
    }
    verdicts.extend(adopted.into_iter().map(|(place, principal)| (place, Verdict::Changed(principal))));
    Ok(verdicts)
}

/// A gateway that acts for others than before.
fn adopt(principal: &Principal, families: &HashMap<DeviceKey, Children>) -> Option<Principal> {
    let Who::Device { key, id, children: known } = &principal.who else { return None };
    let children = families.get(key).cloned().unwrap_or_default();
    let is_new = children != *known;
    let who = Who::Device { key: *key, id: id.clone(), children };
    is_new.then(|| Principal { who, ..principal.clone() })
}

async fn users(
    db: &mut PgConnection,
    roles: &Roles,
    principals: &[&Principal],
    now: DateTime<Utc>,
) -> Result<Vec<(usize, Verdict)>> {
    let (mut places, mut asked) = (Vec::new(), Vec::new());
    for (place, principal) in principals.iter().enumerate() {
        if let Who::User { id, key, .. } = &principal.who {
            places.push(place);
            asked.push(Asked { user: *id, key: *key, session: principal.proof.session });
        }
    }
    let standings = standing::of_many(db, roles, &asked, now).await?;
    let judged = places.into_iter().zip(standings);
    Ok(judged.filter_map(|(place, now)| Some((place, judge(principals[place], now)?))).collect())
}

async fn claims(db: &mut PgConnection, principals: &[&Principal]) -> Result<Vec<(usize, Verdict)>> {
    let (mut places, mut asked) = (Vec::new(), Vec::new());
    for (place, principal) in principals.iter().enumerate() {
        if let Who::Claim { id, .. } = &principal.who {
            places.push(place);
            asked.push(*id);
        }
    }
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let open = claim::unrevoked(db, &asked).await?;
    let gone = places.into_iter().zip(asked).filter(|(_, claim)| !open.contains(claim));
    Ok(gone.map(|(place, _)| (place, Verdict::Ended(Ended::ClaimRevoked))).collect())
}

fn judge(principal: &Principal, now: Standing) -> Option<Verdict> {
    match now {
        Standing::UserDeleted => Some(Verdict::Ended(Ended::UserDeleted)),
        Standing::UserDisabled => Some(Verdict::Ended(Ended::UserDisabled)),
        Standing::KeyDeleted => Some(Verdict::Ended(Ended::KeyDeleted)),
        Standing::KeyEnded => Some(Verdict::Ended(Ended::CredentialEnded)),
        Standing::SessionEnded => Some(Verdict::Ended(Ended::SessionEnded)),
        // The proof is what the connection came by.
        Standing::Stands(now) => {
            (now.who != principal.who).then(|| Verdict::Changed(Principal { who: now.who, ..principal.clone() }))
        }
    }
}
