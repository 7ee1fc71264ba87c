//! API keys: secrets by which programs act, each with a role of its own.
//!
//! Made by [`create`], shown by [`page`], ended by [`delete`] or their expiry; [`crate::token::principal`] takes one
//! wherever an access token is taken. Holds: the secret is never stored, only its SHA-256 (256 random bits need no slow
//! hash). A key is worth as much as its user's right to make it, see `standing.rs`. Ignorant of: MQTT, HTTP.

use chrono::{DateTime, TimeDelta, Utc};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::config::{Auth, Secret};
use crate::credential::random_secret;
use crate::error::{Error, Result};
use crate::id::{ApiKeyId, RoleId, TenantKey, UserId};
use crate::policy::Manager;
use crate::scope::Scope;
use crate::{binding, control, role};

/// What every API key begins with.
pub const PREFIX: &str = "mk_";
/// Longest name of a key, in characters.
pub const MAX_NAME_CHARS: usize = 100;
/// Most keys on a page.
pub const MAX_PAGE: usize = 1000;

/// An API key without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Names it.
    pub id: ApiKeyId,
    /// What people call it.
    pub name: String,
    /// Who made it, and in whose name it acts.
    pub user: UserId,
    /// Its role by name.
    pub role: String,
    /// For which devices it has the role.
    pub scope: Scope,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// It is refused from then on.
    pub expires_at: Option<DateTime<Utc>>,
}

/// An API key to be made.
#[derive(Debug, Clone)]
pub struct NewApiKey {
    /// What people call it.
    pub name: String,
    /// Its role.
    pub role: RoleId,
    /// For which devices it has the role.
    pub scope: Scope,
    /// How long it is accepted, in seconds; `None`: as long as the settings allow.
    pub expires_in_s: Option<u64>,
}

/// Makes a key in the name of `user`; its secret is known at this moment only. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    by: Manager<'_>,
    user: UserId,
    new: &NewApiKey,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<(ApiKey, Secret)> {
    let name = new.name.trim();
    if name.is_empty() || name.chars().count() > MAX_NAME_CHARS || name.contains(char::is_control) {
        return Err(Error::Invalid(format!("name: expected 1 to {MAX_NAME_CHARS} printable characters")));
    }
    let expires_at = expiry(new.expires_in_s, auth.max_api_key_s, now)?;
    role::lock(db, Some(by.tenant)).await?;
    check_room(db, by.tenant, auth).await?;
    let role = role::assignable(db, by, &new.role, &new.scope.extent()).await?;
    binding::check_reach(&role.role, &new.scope)?;
    let id = ApiKeyId::new();
    let secret = Secret::from(format!("{PREFIX}{}", random_secret()?.expose()));
    let hash = Sha256::digest(secret.expose());
    sqlx::query!(
        "
        insert into api_key (id, user_id, name, role, role_key, secret_hash, created_at, expires_at, scope)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
        ",
        id.uuid(),
        user.uuid(),
        name,
        role.built_in(),
        role.key,
        hash.as_slice(),
        now,
        expires_at,
        Json(&new.scope) as _
    )
    .execute(&mut *db)
    .await?;
    Ok((find(db, by.tenant, id).await?, secret))
}

fn expiry(asked_s: Option<u64>, most_s: u64, now: DateTime<Utc>) -> Result<Option<DateTime<Utc>>> {
    let most = if most_s == 0 { u64::MAX } else { most_s };
    let life_s = match asked_s {
        None if most_s == 0 => return Ok(None),
        None => most_s,
        Some(asked) if (1..=most).contains(&asked) => asked,
        Some(asked) => return Err(Error::Invalid(format!("expires_in_s is {asked}: expected 1 to {most}"))),
    };
    let life = i64::try_from(life_s).ok().and_then(TimeDelta::try_seconds);
    let end = life.and_then(|life| now.checked_add_signed(life));
    end.map(Some).ok_or_else(|| Error::Invalid(format!("expires_in_s is {life_s}: expected fewer seconds")))
}

async fn check_room(db: &mut PgConnection, tenant: TenantKey, auth: &Auth) -> Result<()> {
    let count = sqlx::query_scalar!(
        r#"select count(*) as "count!" from api_key k join app_user u on u.id = k.user_id where u.tenant_key = $1"#,
        tenant.0
    );
    if usize::try_from(count.fetch_one(db).await?).is_ok_and(|count| count >= auth.max_api_keys) {
        return Err(Error::TooMany { what: "API keys", most: auth.max_api_keys });
    }
    Ok(())
}

/// The key of that id, in this tenant.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: ApiKeyId) -> Result<ApiKey> {
    read(db, tenant, &[id.uuid()]).await?.pop().ok_or(Error::NoSuchApiKey(id))
}

async fn read(db: &mut PgConnection, tenant: TenantKey, ids: &[Uuid]) -> Result<Vec<ApiKey>> {
    let keys = sqlx::query_as!(
        ApiKey,
        r#"
        select k.id as "id: ApiKeyId", k.name, k.user_id as "user: UserId", coalesce(k.role, r.id) as "role!",
               k.scope as "scope: Json<Scope>", k.created_at, k.expires_at
          from api_key k
          join app_user u on u.id = k.user_id
          left join role r on r.key = k.role_key
         where k.id = any($1) and u.tenant_key = $2
         order by k.id
        "#,
        ids,
        tenant.0
    )
    .fetch_all(db)
    .await?;
    Ok(keys)
}

/// At most `limit` (itself at most [`MAX_PAGE`]) keys in the order they were made, beginning behind `after`.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    after: Option<ApiKeyId>,
    limit: usize,
) -> Result<(Vec<ApiKey>, Option<ApiKeyId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut ids = sqlx::query_scalar!(
        "
        select k.id
          from api_key k
          join app_user u on u.id = k.user_id
         where u.tenant_key = $1 and ($2::uuid is null or k.id > $2)
         order by k.id
         limit $3
        ",
        tenant.0,
        after.map(ApiKeyId::uuid),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = ids.len() > limit;
    ids.truncate(limit);
    let keys = read(db, tenant, &ids).await?;
    let next = keys.last().filter(|_| more).map(|key| key.id);
    Ok((keys, next))
}

/// Ends a key at once; answers what it was. To be called in a transaction.
pub async fn delete(db: &mut PgConnection, by: Manager<'_>, id: ApiKeyId) -> Result<ApiKey> {
    let key = find(db, by.tenant, id).await?;
    let deleted = sqlx::query!(
        "delete from api_key k using app_user u where k.id = $1 and u.id = k.user_id and u.tenant_key = $2",
        id.uuid(),
        by.tenant.0
    )
    .execute(&mut *db)
    .await?;
    if deleted.rows_affected() == 0 {
        return Err(Error::NoSuchApiKey(id));
    }
    control::bump(db).await?;
    Ok(key)
}

/// The key whose secret this is, whatever it is worth, and its tenant.
pub async fn of_known(db: &mut PgConnection, secret: &str) -> Result<Option<(TenantKey, ApiKeyId)>> {
    if !secret.starts_with(PREFIX) {
        return Ok(None);
    }
    let hash = Sha256::digest(secret);
    let row = sqlx::query!(
        r#"
        select u.tenant_key as "tenant: TenantKey", k.id as "id: ApiKeyId"
          from api_key k
          join app_user u on u.id = k.user_id
         where k.secret_hash = $1
        "#,
        hash.as_slice()
    )
    .fetch_optional(db)
    .await?;
    Ok(row.map(|row| (row.tenant, row.id)))
}

/// The key that was shown, with its user; what it is worth, [`crate::standing`] says.
pub(crate) async fn shown(db: &mut PgConnection, secret: &str) -> Result<Option<(UserId, ApiKeyId)>> {
    let hash = Sha256::digest(secret);
    // The hash of what was shown is not for the caller to choose, so a lookup by it tells nothing by its time.
    let row = sqlx::query!(
        r#"select user_id as "user: UserId", id as "id: ApiKeyId" from api_key where secret_hash = $1"#,
        hash.as_slice()
    )
    .fetch_optional(db)
    .await?;
    Ok(row.map(|row| (row.user, row.id)))
}
