//! Logins by an `OpenID` provider: who was sent there, whose account an identity opens, and which role it gives.
//!
//! [`begin`] remembers who is sent, [`take`] finds who comes back, once and in the same browser; [`sign_in`] finds or makes
//! the account. Holds: an identity is the provider's subject, an e-mail address only where the settings say so and the
//! provider vouches for it; the role is what the provider says today; who has none there does not come in, and nobody
//! comes to stand above tenants this way. What waits is bounded. Ignorant of: HTTP, tokens, keys.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::config::{Auth, Oidc, Secret};
use crate::credential::random_secret;
use crate::error::{Error, Result};
use crate::id::{RoleId, TenantId, TenantKey, UserId};
use crate::policy::{Grants, Manager, Role};
use crate::user::{self, NewUser, Patch, User};

/// Longest subject of an identity, in bytes (`OpenID` Connect Core §2: 255 characters).
pub const MAX_SUBJECT_BYTES: usize = 255;

/// What somebody who is sent to the provider takes along.
#[derive(Debug)]
pub struct Started {
    /// Comes back in the URL.
    pub state: Secret,
    /// Comes back in the cookie of the browser.
    pub browser: Secret,
    /// Comes back in the ID token.
    pub nonce: Secret,
    /// Shows that whoever redeems the code has asked for it (PKCE).
    pub verifier: Secret,
    /// Others who waited and were forgotten to make room.
    pub forgotten: u64,
}

/// What somebody who came back has to be measured by.
#[derive(Debug)]
pub struct Pending {
    /// To be found in the ID token.
    pub nonce: Secret,
    /// For the code.
    pub verifier: Secret,
}

/// What the provider says of somebody.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// The provider.
    pub issuer: String,
    /// Who it is there.
    pub subject: String,
    /// The e-mail address.
    pub email: Option<String>,
    /// Whether the provider vouches for the address.
    pub email_verified: bool,
    /// What the role claim holds.
    pub roles: Vec<String>,
}

/// Who came in.
#[derive(Debug)]
pub struct SignedIn {
    /// The user's tenant.
    pub tenant: TenantKey,
    /// The user as it was; none: the account was made just now.
    pub before: Option<User>,
    /// The user, with the role of today.
    pub user: User,
    /// Whether the identity opens the account from now on, and did not before.
    pub linked: bool,
}

/// Remembers somebody who is sent to the provider; beyond `oidc.max_pending` the longest waiting are forgotten.
pub async fn begin(db: &mut PgConnection, settings: &Oidc, now: DateTime<Utc>) -> Result<Started> {
    let forgotten = sqlx::query!(
        "delete from oidc_login
          where expires_at <= $1
             or state_hash in (select state_hash from oidc_login where expires_at > $1 order by created_at desc offset $2)",
        now,
        i64::try_from(settings.max_pending.saturating_sub(1)).unwrap_or(i64::MAX)
    )
    .execute(&mut *db)
    .await?
    .rows_affected();
    let [state, browser, nonce, verifier] = [random_secret()?, random_secret()?, random_secret()?, random_secret()?];
    sqlx::query!(
        "
        insert into oidc_login (state_hash, browser_hash, nonce, verifier, created_at, expires_at)
        values ($1, $2, $3, $4, $5, $6)
        ",
        hash(state.expose()),
        hash(browser.expose()),
        nonce.expose(),
        verifier.expose(),
        now,
        now + TimeDelta::seconds(i64::try_from(settings.pending_s).unwrap_or(i64::MAX / 1000))
    )
    .execute(db)
    .await?;
    Ok(Started { state, browser, nonce, verifier, forgotten })
}

/// Who comes back with that state, in the browser that was sent; works once.
pub async fn take(db: &mut PgConnection, state: &str, browser: &str, now: DateTime<Utc>) -> Result<Option<Pending>> {
    let taken = sqlx::query!(
        "
        delete from oidc_login where state_hash = $1 and browser_hash = $2 and expires_at > $3
        returning nonce, verifier
        ",
        hash(state),
        hash(browser),
        now
    );
    let taken = taken.fetch_optional(db).await?;
    Ok(taken.map(|row| Pending { nonce: row.nonce.into(), verifier: row.verifier.into() }))
}

/// The values of the role claim: `claim` is its name, or a JSON pointer (RFC 6901) such as `/realm_access/roles`.
pub fn roles(claims: &Value, claim: &str) -> Vec<String> {
    let found = if claim.starts_with('/') { claims.pointer(claim) } else { claims.get(claim) };
    match found {
        Some(Value::String(one)) => vec![one.clone()],
        Some(Value::Array(many)) => many.iter().filter_map(|one| one.as_str().map(str::to_owned)).collect(),
        _ => Vec::new(),
    }
}

/// The role that the first line of the settings that fits gives.
fn mapped(settings: &Oidc, identity: &Identity) -> Result<RoleId> {
    let line = settings.roles.iter().find(|line| identity.roles.contains(&line.value)).ok_or(Error::OidcNoRole)?;
    Ok(RoleId::try_from(line.role.clone())?)
}

/// The account of an identity, with the role that the provider gives it today. To be called in a transaction.
pub async fn sign_in(
    db: &mut PgConnection,
    settings: &Oidc,
    identity: &Identity,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<SignedIn> {
    if identity.subject.is_empty() || identity.subject.len() > MAX_SUBJECT_BYTES {
        return Err(Error::Invalid(format!("subject: expected 1 to {MAX_SUBJECT_BYTES} bytes")));
    }
    let role = mapped(settings, identity)?;
    let known = sqlx::query!(
        r#"
        select i.user_id as "user: UserId", t.key as "tenant: TenantKey", t.id as "tenant_id: TenantId"
          from oidc_identity i
          join app_user u on u.id = i.user_id
          join tenant t on t.key = u.tenant_key
         where i.issuer = $1 and i.subject = $2
        "#,
        identity.issuer,
        identity.subject
    )
    .fetch_optional(&mut *db)
    .await?;
    let admin = Grants::of(Some(Role::Admin));
    if let Some(known) = known {
        // In the name of the provider, which is trusted with the roles of the tenant and no more.
        let by = Manager { tenant: known.tenant, tenant_id: &known.tenant_id, platform: false, grants: &admin };
        let (before, user) = with_role(db, by, known.user, role, now).await?;
        return Ok(SignedIn { tenant: known.tenant, before: Some(before), user, linked: false });
    }
    let (tenant, tenant_id) = tenant(db, settings).await?;
    let by = Manager { tenant, tenant_id: &tenant_id, platform: false, grants: &admin };
    let email = vouched(settings, identity)?;
    let found = by_email(db, tenant, &email).await?;
    let (before, user) = match found {
        Some(user) if settings.link_by_email => {
            let (before, user) = with_role(db, by, user, role, now).await?;
            (Some(before), user)
        }
        None if settings.auto_create => {
            let new = NewUser { email, password_hash: None, role: Some(role), platform: false, disabled: false };
            (None, user::create(db, by, &new, auth, now).await.map_err(of_others)?)
        }
        _ => return Err(Error::OidcNoAccount),
    };
    sqlx::query!(
        "insert into oidc_identity (issuer, subject, user_id, created_at) values ($1, $2, $3, $4) on conflict do nothing",
        identity.issuer,
        identity.subject,
        user.id.uuid(),
        now
    )
    .execute(db)
    .await?;
    Ok(SignedIn { tenant, before, user, linked: true })
}

/// Whose address it is in another tenant is not told.
fn of_others(error: Error) -> Error {
    if matches!(error, Error::EmailTaken) { Error::OidcNoAccount } else { error }
}

/// The address, if the provider vouches for it.
fn vouched(settings: &Oidc, identity: &Identity) -> Result<String> {
    if !settings.link_by_email && !settings.auto_create {
        return Err(Error::OidcNoAccount);
    }
    let email = identity.email.clone().filter(|email| !email.is_empty()).ok_or(Error::OidcUnverified)?;
    if identity.email_verified || settings.trust_email { Ok(email) } else { Err(Error::OidcUnverified) }
}

async fn tenant(db: &mut PgConnection, settings: &Oidc) -> Result<(TenantKey, TenantId)> {
    let found = sqlx::query!(
        r#"select key as "key: TenantKey", id as "id: TenantId" from tenant where id = $1"#,
        settings.tenant
    );
    let found = found.fetch_optional(db).await?;
    found
        .map(|row| (row.key, row.id))
        .ok_or_else(|| Error::Internal(format!("oidc.tenant: no tenant {}", settings.tenant)))
}

/// The user of that address in the tenant. Of another tenant's nothing is told.
async fn by_email(db: &mut PgConnection, tenant: TenantKey, email: &str) -> Result<Option<UserId>> {
    let found = sqlx::query_scalar!(
        r#"select id as "id: UserId" from app_user where lower(email) = lower($1) and tenant_key = $2"#,
        user::checked_email(email)?,
        tenant.0
    );
    Ok(found.fetch_optional(db).await?)
}

/// The user as it was, and with the role.
async fn with_role(
    db: &mut PgConnection,
    by: Manager<'_>,
    id: UserId,
    role: RoleId,
    now: DateTime<Utc>,
) -> Result<(User, User)> {
    let user = user::manageable(db, by, id).await?;
    if user.disabled {
        return Err(Error::OidcNoAccount);
    }
    if user.role.as_deref() == Some(role.as_str()) {
        return Ok((user.clone(), user));
    }
    let patch = Patch { role: Some(Some(role)), ..Patch::default() };
    user::update(db, by, id, &patch, &[], now).await
}

/// Forgets who never came back.
pub async fn sweep(db: &mut PgConnection, now: DateTime<Utc>) -> Result<u64> {
    Ok(sqlx::query!("delete from oidc_login where expires_at <= $1", now).execute(db).await?.rows_affected())
}

fn hash(secret: &str) -> Vec<u8> {
    Sha256::digest(secret).to_vec()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn roles_are_found_by_name_or_by_a_path() {
        let claims = json!({ "groups": ["a", 1, "b"], "one": "a", "realm_access": { "roles": ["c"] }, "a/b": ["d"] });
        for (claim, found) in [
            ("groups", vec!["a", "b"]),
            ("one", vec!["a"]),
            ("/realm_access/roles", vec!["c"]),
            ("a/b", vec!["d"]),
            ("/a~1b", vec!["d"]),
            ("realm_access", vec![]),
            ("nothing", vec![]),
            ("", vec![]),
        ] {
            assert_eq!(roles(&claims, claim), found, "{claim}");
        }
    }

    proptest! {
        #[test]
        fn any_claim_may_be_asked_for(claim in ".{0,40}", value in ".{0,40}") {
            let found = roles(&json!({ claim.clone(): [value.clone()] }), &claim);
            prop_assert!(found.is_empty() || found == [value]);
        }
    }
}
