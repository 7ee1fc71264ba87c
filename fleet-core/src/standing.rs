//! Who users and API keys are now, looked up for many at once: both doors when somebody comes in, and live control for
//! those who are in.
//!
//! Holds: the one place that says what an API key is worth: it ends with its time, and when the user who made it is
//! deleted or disabled or has no role any more, or for a role of the platform has lost platform standing; and it is never worth more than that user.

use chrono::{DateTime, Utc};
use serde::Deserialize;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::error::Result;
use crate::id::{ApiKeyId, LoginSessionId, RoleKey, TenantId, TenantKey, UserId};
use crate::policy::{Grant, Grants, Principal, Proof, Source, Who};
use crate::role::{Named, Roles};
use crate::scope::{Extent, Scope};

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
    let rows = sqlx::query_as!(
        Row,
        r#"
        select t.key as "tenant?: TenantKey", t.id as "tenant_id?: TenantId", coalesce(u.disabled, false) as "disabled!",
               coalesce(u.platform, false) as "platform!", u.role as "role?", r.key as "role_key?: RoleKey",
               r.version as "role_version?", k.id is not null as "has_key!",
               k.expires_at is not null and k.expires_at <= $3 as "has_ended!", k.expires_at as "expires_at?",
               asked.session is not null and s.id is null as "session_ended!", k.role as "key_role?", kr.key as "key_role_key?: RoleKey", kr.version as "key_role_version?",
               kr.key is not null and kr.tenant_key is null as "is_platform_key!", k.scope as "key_scope?: Json<Scope>",
               (select coalesce(jsonb_agg(jsonb_build_object('id', b.id, 'role', b.role, 'role_key', br.key,
                                                             'version', br.version, 'scope', b.scope) order by b.id), '[]')
                  from binding b
                  left join role br on br.key = b.role_key and (br.tenant_key = u.tenant_key or br.tenant_key is null)
                 where b.user_id = u.id) as "bindings!: Json<Vec<Bound>>"
          from unnest($1::uuid[], $2::uuid[], $4::uuid[]) with ordinality as asked (id, key, session, place)
          left join app_user u on u.id = asked.id
          left join tenant t on t.key = u.tenant_key
          left join role r on r.key = u.role_key and (r.tenant_key = u.tenant_key or r.tenant_key is null)
          left join api_key k on k.id = asked.key and k.user_id = u.id
          left join login_session s on s.id = asked.session and s.user_id = u.id and s.expires_at > $3
          left join role kr on kr.key = k.role_key and (kr.tenant_key = u.tenant_key or kr.tenant_key is null)
         order by asked.place
        "#,
        &users,
        &keys as &[Option<Uuid>],
        now,
        &sessions as &[Option<Uuid>]
    )
    .fetch_all(&mut *db)
    .await?;
    let mut standings = Vec::with_capacity(rows.len());
    for (row, asked) in rows.into_iter().zip(asked) {
        standings.push(row.standing(db, roles, *asked).await?);
    }
    Ok(standings)
}

/// All that a user was given, whether or not the user may come in.
pub(crate) async fn grants(db: &mut PgConnection, roles: &Roles, user: UserId) -> Result<Grants> {
    let row = sqlx::query!(
        r#"
        select t.id as "tenant_id: TenantId", u.role, r.key as "role_key?: RoleKey", r.version as "role_version?",
               (select coalesce(jsonb_agg(jsonb_build_object('id', b.id, 'role', b.role, 'role_key', br.key,
                                                             'version', br.version, 'scope', b.scope) order by b.id), '[]')
                  from binding b
                  left join role br on br.key = b.role_key
                 where b.user_id = u.id) as "bindings!: Json<Vec<Bound>>"
          from app_user u
          join tenant t on t.key = u.tenant_key
          left join role r on r.key = u.role_key
         where u.id = $1
        "#,
        user.uuid()
    )
    .fetch_optional(&mut *db)
    .await?;
    let Some(row) = row else { return Ok(Grants::default()) };
    let own = Named { built_in: row.role, custom: row.role_key.zip(row.role_version) };
    compiled(db, roles, &row.tenant_id, own, row.bindings.0).await
}

/// A binding, as the statements above bring it.
#[derive(Debug, Deserialize)]
struct Bound {
    id: Uuid,
    role: Option<String>,
    role_key: Option<i64>,
    version: Option<i64>,
    scope: Scope,
}

/// A user's own role and bindings, compiled.
async fn compiled(
    db: &mut PgConnection,
    roles: &Roles,
    tenant: &TenantId,
    own: Named,
    bindings: Vec<Bound>,
) -> Result<Grants> {
    let mut list = Vec::with_capacity(1 + bindings.len());
    if let Some(role) = roles.load(db, tenant, own).await? {
        list.push(Grant { source: Source::User, role, extent: Extent::Everything });
    }
    for Bound { id, role, role_key, version, scope } in bindings {
        let named = Named { built_in: role, custom: role_key.map(RoleKey).zip(version) };
        if let Some(role) = roles.load(db, tenant, named).await? {
            list.push(Grant { source: Source::Binding(id.into()), role, extent: scope.extent() });
        }
    }
    Ok(Grants::new(list))
}

#[expect(clippy::struct_excessive_bools, reason = "the columns of a row")]
struct Row {
    tenant: Option<TenantKey>,
    tenant_id: Option<TenantId>,
    disabled: bool,
    platform: bool,
    role: Option<String>,
    role_key: Option<RoleKey>,
    role_version: Option<i64>,
    has_key: bool,
    has_ended: bool,
    expires_at: Option<DateTime<Utc>>,
    session_ended: bool,
    key_role: Option<String>,
    key_role_key: Option<RoleKey>,
    key_role_version: Option<i64>,
    /// Whether the key has a role of the platform.
    is_platform_key: bool,
    key_scope: Option<Json<Scope>>,
    bindings: Json<Vec<Bound>>,
}

impl Row {
    async fn standing(self, db: &mut PgConnection, roles: &Roles, asked: Asked) -> Result<Standing> {
        let Asked { user: id, key, session } = asked;
        let Some((tenant, tenant_id)) = self.tenant.zip(self.tenant_id) else { return Ok(Standing::UserDeleted) };
        if self.disabled {
            return Ok(Standing::UserDisabled);
        }
        let own = Named { built_in: self.role, custom: self.role_key.zip(self.role_version) };
        let of_user = compiled(db, roles, &tenant_id, own, self.bindings.0).await?;
        let Some(key_id) = key else {
            if self.session_ended {
                return Ok(Standing::SessionEnded);
            }
            let who = Who::User { id, key, grants: of_user, platform: self.platform };
            let proof = Proof { session, ..Proof::default() };
            return Ok(Standing::Stands(Principal { tenant, tenant_id, who, proof }));
        };
        if !self.has_key {
            return Ok(Standing::KeyDeleted);
        }
        let named = Named { built_in: self.key_role, custom: self.key_role_key.zip(self.key_role_version) };
        let role = roles.load(db, &tenant_id, named).await?;
        let stands_above = self.platform && of_user.is_admin();
        let is_worthless = of_user.iter().next().is_none();
        let Some(role) = role.filter(|_| !self.has_ended && !is_worthless && (stands_above || !self.is_platform_key))
        else {
            return Ok(Standing::KeyEnded);
        };
        let extent = self.key_scope.map_or(Extent::NOTHING, |scope| scope.extent());
        let grants = Grants::new(vec![Grant { source: Source::ApiKey(key_id), role, extent }]).within(of_user);
        let who = Who::User { id, key, grants, platform: false };
        let proof = Proof { valid_until: self.expires_at, ..Proof::default() };
        Ok(Standing::Stands(Principal { tenant, tenant_id, who, proof }))
    }
}
