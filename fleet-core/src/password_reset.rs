//! One-time links to a new password: for who forgot theirs, or was invited and has none yet.
//!
//! [`issue`]d by who may manage the user, shown once, [`redeem`]ed once. Holds: a user has at most one; only its SHA-256
//! is kept; whoever uses it is out everywhere else, and forgiven. Ignorant of: HTTP, what a good password is.

use chrono::{DateTime, TimeDelta, Utc};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::config::{Auth, Secret};
use crate::credential::random_secret;
use crate::error::{Error, Result};
use crate::id::{TenantKey, UserId};
use crate::policy::Manager;
use crate::{login_failure, login_session, user};

/// What every token begins with.
pub const PREFIX: &str = "mp_";

/// A link that was just made.
#[derive(Debug)]
pub struct Issued {
    /// The secret in it, known at this moment only.
    pub token: Secret,
    /// It is worth nothing from then on.
    pub expires_at: DateTime<Utc>,
}

/// Whose password may be set anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pending {
    /// The user.
    pub user: UserId,
    /// The user's tenant.
    pub tenant: TenantKey,
    /// The user's address.
    pub email: String,
}

/// Makes a link for a user whom `by` may manage; one that was made before is worth nothing any more.
pub async fn issue(
    db: &mut PgConnection,
    by: Manager<'_>,
    user: UserId,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<Issued> {
    user::manageable(db, by, user).await?;
    let token = Secret::from(format!("{PREFIX}{}", random_secret()?.expose()));
    let life = TimeDelta::seconds(i64::try_from(auth.password_reset_s).unwrap_or(i64::MAX / 1000));
    let expires_at = now + life;
    sqlx::query!(
        "
        insert into password_reset (user_id, token_hash, created_at, expires_at) values ($1, $2, $3, $4)
            on conflict (user_id) do update
           set token_hash = excluded.token_hash, created_at = excluded.created_at, expires_at = excluded.expires_at
        ",
        user.uuid(),
        hash(token.expose()),
        now,
        expires_at
    )
    .execute(db)
    .await?;
    Ok(Issued { token, expires_at })
}

/// Whose link this is.
pub async fn find(db: &mut PgConnection, token: &str, now: DateTime<Utc>) -> Result<Pending> {
    let pending = sqlx::query_as!(
        Pending,
        r#"
        select u.id as "user: UserId", u.tenant_key as "tenant: TenantKey", u.email
          from password_reset r
          join app_user u on u.id = r.user_id
         where r.token_hash = $1 and r.expires_at > $2
        "#,
        hash(token),
        now
    );
    pending.fetch_optional(db).await?.ok_or(Error::BadResetToken)
}

/// Sets the password whose hash is given, and ends the link and everything that was begun with the password before. To be
/// called in a transaction.
pub async fn redeem(db: &mut PgConnection, token: &str, password_hash: &str, now: DateTime<Utc>) -> Result<UserId> {
    let user = sqlx::query_scalar!(
        r#"
        delete from password_reset where token_hash = $1 and expires_at > $2 returning user_id as "user: UserId"
        "#,
        hash(token),
        now
    )
    .fetch_optional(&mut *db)
    .await?
    .ok_or(Error::BadResetToken)?;
    user::set_password(db, user, password_hash, now).await?;
    login_failure::forgive(db, user).await?;
    login_session::end_all(db, user, None).await?;
    Ok(user)
}

/// Forgets links that have expired; there is at most one a user.
pub async fn sweep(db: &mut PgConnection, now: DateTime<Utc>) -> Result<u64> {
    let swept = sqlx::query!("delete from password_reset where expires_at <= $1", now).execute(db).await?;
    Ok(swept.rows_affected())
}

fn hash(token: &str) -> Vec<u8> {
    Sha256::digest(token).to_vec()
}
