//! Who users and API keys are now, looked up for many at once: both doors when somebody comes in, and live control for
//! those who are in.
//!
//! Holds: the one place that says what an API key is worth: it ends with its time, and when the user who made it is
//! deleted or disabled, or may no longer manage access, or for a role of the platform has lost platform standing.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::error::Result;
use crate::id::{ApiKeyId, LoginSessionId, RoleKey, TenantId, TenantKey, UserId};
use crate::policy::{Permission, Principal, Proof, Who};
use crate::role::{Named, Roles};

/// What has become of a user, or of an API key of a user.
#[derive(Debug)]
pub(crate) enum Standing {
    /// It may come in, and is this now. The proof ends with the API key, and never for a user.
    Stands(Principal),
    /// The user exists no more.
    UserDeleted,
    /// The user is disabled.
    UserDisabled,
    /// The API key exists no more.
    KeyDeleted,
    /// The API key has ended, or is worth nothing.
    KeyEnded,
    /// The login has ended.
    SessionEnded,
}

impl Standing {
    /// The principal, if it may come in.
    pub(crate) fn principal(self) -> Option<Principal> {
        if let Self::Stands(principal) = self { Some(principal) } else { None }
    }
}

/// Whose standing is asked: a user's, by a login, or that of an API key of the user.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asked {
    pub(crate) user: UserId,
    pub(crate) key: Option<ApiKeyId>,
    pub(crate) session: Option<LoginSessionId>,
}

/// The standing of a user, or of an API key of that user.
pub(crate) async fn of(db: &mut PgConnection, roles: &Roles, asked: Asked, now: DateTime<Utc>) -> Result<Standing> {
    Ok(of_many(db, roles, &[asked], now).await?.pop().unwrap_or(Standing::UserDeleted))
}

/// The standing of each of these, in their order and by one statement.
pub(crate) async fn of_many(
    db: &mut PgConnection,
    roles: &Roles,
    asked: &[Asked],
    now: DateTime<Utc>,
) -> Result<Vec<Standing>> {
    if asked.is_empty() {
        return Ok(Vec::new());
    }
    let users = asked.iter().map(|asked| asked.user.uuid()).collect::<Vec<_>>();
    let keys = asked.iter().map(|asked| asked.key.map(ApiKeyId::uuid)).collect::<Vec<_>>();
    let sessions = asked.iter().map(|asked| asked.session.map(LoginSessionId::uuid)).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        select t.key as "tenant?: TenantKey", t.id as "tenant_id?: TenantId", coalesce(u.disabled, false) as "disabled!",
               coalesce(u.platform and asked.key is null, false) as "platform!",
               asked.key is not null and k.id is null as "key_deleted!", k.expires_at as "expires_at?",
               asked.key is not null and not coalesce(
                   (k.expires_at is null or k.expires_at > $3) and (k.role is not null or r.key is not null)
                   and (u.role = 'admin' or mine.permissions @> array[$4]), false) as "key_ended!",
               asked.session is not null and s.id is null as "session_ended!",
               case when asked.key is null then u.role else k.role end as role,
               r.key as "role_key?: RoleKey", r.version as "role_version?"
          from unnest($1::uuid[], $2::uuid[], $5::uuid[]) with ordinality as asked (id, key, session, place)
          left join app_user u on u.id = asked.id
          left join tenant t on t.key = u.tenant_key
          left join api_key k on k.id = asked.key and k.user_id = u.id
          left join login_session s on s.id = asked.session and s.user_id = u.id and s.expires_at > $3
          left join role mine on mine.key = u.role_key
          left join role r on r.key = case when asked.key is null then u.role_key else k.role_key end
           and (r.tenant_key = u.tenant_key
                or r.tenant_key is null and (asked.key is null or u.platform and u.role = 'admin'))
         order by asked.place
        "#,
        &users,
        &keys as &[Option<Uuid>],
        now,
        Permission::AccessManage.name(),
        &sessions as &[Option<Uuid>]
    )
    .fetch_all(&mut *db)
    .await?;
    let mut standings = Vec::with_capacity(rows.len());
    for (row, asked) in rows.into_iter().zip(asked) {
        let standing = match row.tenant.zip(row.tenant_id) {
            None => Standing::UserDeleted,
            Some(_) if row.disabled => Standing::UserDisabled,
            Some(_) if row.key_deleted => Standing::KeyDeleted,
            Some(_) if row.key_ended => Standing::KeyEnded,
            Some(_) if row.session_ended => Standing::SessionEnded,
            Some((tenant, tenant_id)) => {
                let named = Named { built_in: row.role, custom: row.role_key.zip(row.role_version) };
                let role = roles.load(db, &tenant_id, named).await?;
                let who = Who::User { id: asked.user, key: asked.key, role, platform: row.platform };
                let proof = Proof { valid_until: row.expires_at, session: asked.session, ..Proof::default() };
                Standing::Stands(Principal { tenant, tenant_id, who, proof })
            }
        };
        standings.push(standing);
    }
    Ok(standings)
}
