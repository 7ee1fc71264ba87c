//! Bindings: who has which role for which devices.
//!
//! Made by [`create`], shown by [`page`], ended by [`delete`]; [`crate::policy`] compiles them. A user's own role is no binding:
//! it holds for the whole tenant and is changed with the user. Holds: nobody gives, or takes, what they may not do themselves;
//! a role of the platform is bound to the tenant as a whole only. Ignorant of: HTTP.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::config::Auth;
use crate::error::{Error, OrOn, Result};
use crate::id::{BindingId, RoleId, TenantKey, UserId};
use crate::policy::{Manager, Role};
use crate::scope::Scope;
use crate::{control, role, user};

/// Most bindings on a page.
pub const MAX_PAGE: usize = 1000;
/// Most bindings of one user.
pub const MAX_OF_USER: usize = 32;

/// A binding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// Names it.
    pub id: BindingId,
    /// Who has the role.
    pub user: UserId,
    /// The role by name.
    pub role: String,
    /// For which devices.
    pub scope: Scope,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// A binding to be made.
#[derive(Debug, Clone)]
pub struct NewBinding {
    /// Who shall have the role.
    pub user: UserId,
    /// The role.
    pub role: RoleId,
    /// For which devices.
    pub scope: Scope,
}

/// Binds a user of the manager's tenant to a role. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    by: Manager<'_>,
    new: &NewBinding,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<Binding> {
    role::lock(db, Some(by.tenant)).await?;
    user::find_in(db, by.tenant, new.user).await?;
    check_room(db, by.tenant, new.user, auth).await?;
    let role = role::assignable(db, by, &new.role, &new.scope.extent()).await?;
    check_reach(&role.role, &new.scope)?;
    let id = BindingId::new();
    sqlx::query!(
        "
        insert into binding (id, tenant_key, user_id, role, role_key, scope, created_at)
        values ($1, $2, $3, $4, $5, $6, $7)
        ",
        id.uuid(),
        by.tenant.0,
        new.user.uuid(),
        role.built_in(),
        role.key,
        Json(&new.scope) as _,
        now
    )
    .execute(&mut *db)
    .await
    .or_on("binding_key", || Error::BindingExists)?;
    control::bump(db).await?;
    find(db, by.tenant, id).await
}

pub(crate) fn check_reach(role: &Role, scope: &Scope) -> Result<()> {
    match role {
        Role::Custom(role) if role.platform && *scope != Scope::Tenant => {
            Err(Error::Invalid("scope: expected the tenant, since the role is one of the platform".into()))
        }
        _ => Ok(()),
    }
}

async fn check_room(db: &mut PgConnection, tenant: TenantKey, user: UserId, auth: &Auth) -> Result<()> {
    let count = sqlx::query!(
        r#"
        select count(*) as "all!", count(*) filter (where user_id = $2) as "own!"
          from binding
         where tenant_key = $1
        "#,
        tenant.0,
        user.uuid()
    )
    .fetch_one(db)
    .await?;
    for (what, count, most) in
        [("bindings", count.all, auth.max_bindings), ("bindings of this user", count.own, MAX_OF_USER)]
    {
        if usize::try_from(count).is_ok_and(|count| count >= most) {
            return Err(Error::TooMany { what, most });
        }
    }
    Ok(())
}

/// The binding of that id, in this tenant.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: BindingId) -> Result<Binding> {
    read(db, tenant, &[id.uuid()]).await?.pop().ok_or(Error::NoSuchBinding(id))
}

async fn read(db: &mut PgConnection, tenant: TenantKey, ids: &[Uuid]) -> Result<Vec<Binding>> {
    let rows = sqlx::query_as!(
        Binding,
        r#"
        select b.id as "id: BindingId", b.user_id as "user: UserId", coalesce(b.role, r.id) as "role!",
               b.scope as "scope: Json<Scope>", b.created_at
          from binding b
          left join role r on r.key = b.role_key
         where b.id = any($1) and b.tenant_key = $2
         order by b.id
        "#,
        ids,
        tenant.0
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// At most `limit` (itself at most [`MAX_PAGE`]) bindings, those of `user` only if one is given, in the order they were made,
/// beginning behind `after`.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    user: Option<UserId>,
    after: Option<BindingId>,
    limit: usize,
) -> Result<(Vec<Binding>, Option<BindingId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut ids = sqlx::query_scalar!(
        "
        select id
          from binding
         where tenant_key = $1 and ($2::uuid is null or user_id = $2) and ($3::uuid is null or id > $3)
         order by id
         limit $4
        ",
        tenant.0,
        user.map(UserId::uuid),
        after.map(BindingId::uuid),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = ids.len() > limit;
    ids.truncate(limit);
    let bindings = read(db, tenant, &ids).await?;
    let next = bindings.last().filter(|_| more).map(|binding| binding.id);
    Ok((bindings, next))
}

/// Ends a binding at once, and tells what it was. To be called in a transaction.
pub async fn delete(db: &mut PgConnection, by: Manager<'_>, id: BindingId) -> Result<Binding> {
    role::lock(db, Some(by.tenant)).await?;
    let binding = find(db, by.tenant, id).await?;
    role::assignable(db, by, &binding.role.clone().try_into()?, &binding.scope.extent()).await?;
    sqlx::query!("delete from binding where id = $1", id.uuid()).execute(&mut *db).await?;
    control::bump(db).await?;
    Ok(binding)
}
