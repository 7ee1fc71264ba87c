//! Roles that people make: permissions and topic rules under a name.
//!
//! Made by [`create`], changed whole by [`replace`], ended by [`delete`], given to users and API keys; [`Roles`] brings
//! one to a principal. Holds: a tenant's role reaches the tenant's topics only, which is checked when it is written and
//! again when it is loaded; a role whose rules do not pass then grants nothing. A role in use is not deleted. Nobody writes, changes or
//! gives a role that allows more than they may do themselves. Roles of the
//! platform exist only for who has platform standing (ADR 7). Ignorant of: HTTP.

use std::collections::HashMap;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use parking_lot::Mutex;
use sqlx::PgConnection;
use sqlx::types::Json;

use crate::config::Auth;
use crate::control;
use crate::error::{Error, OrOn, Result, check_version};
use crate::id::{RoleId, RoleKey, TenantId, TenantKey};
use crate::policy::{CustomRole, Manager, Permission, Role};
use crate::scope::Extent;
use crate::topic_rule::{Reach, RuleSet, TopicRule};

/// Most roles on a page.
pub const MAX_PAGE: usize = 1000;
/// Compiled roles that are kept; with one more, all are forgotten and come back as they are asked for.
const MAX_COMPILED: usize = 1000;

/// A role as it is stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Its row.
    pub key: RoleKey,
    /// Its name, which never changes.
    pub id: RoleId,
    /// Whether it stands above tenants.
    pub platform: bool,
    /// What it opens; a name that this version does not know is left out.
    pub permissions: Vec<Permission>,
    /// What it says about topics.
    pub topic_rules: Vec<TopicRule>,
    /// Rises with every change.
    pub version: i64,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

impl Stored {
    /// It ready to be asked.
    pub(crate) fn ready(&self, by: Manager<'_>) -> Role {
        Role::Custom(Arc::new(compile(&self.id, self.version, self.platform, &self.grants(), by.tenant_id)))
    }

    fn grants(&self) -> Grants {
        Grants { permissions: self.permissions.clone(), topic_rules: self.topic_rules.clone() }
    }
}

/// A role to be made.
#[derive(Debug, Clone)]
pub struct NewRole {
    /// Its name, which never changes.
    pub id: RoleId,
    /// Whether it stands above tenants.
    pub platform: bool,
    /// What it says.
    pub grants: Grants,
}

/// What a role says.
#[derive(Debug, Clone)]
pub struct Grants {
    /// What it opens.
    pub permissions: Vec<Permission>,
    /// What it says about topics.
    pub topic_rules: Vec<TopicRule>,
}

impl Grants {
    fn names(&self) -> Vec<String> {
        let names = Permission::ALL.iter().filter(|permission| self.permissions.contains(permission));
        names.map(|permission| permission.name().to_owned()).collect()
    }

    fn check(&self, reach: Reach<'_>, auth: &Auth) -> Result<()> {
        if self.topic_rules.len() > auth.max_topic_rules {
            return Err(Error::TooMany { what: "topic rules in a role", most: auth.max_topic_rules });
        }
        RuleSet::compile(&self.topic_rules, reach)?;
        Ok(())
    }
}

/// A role of the tenant as it would be, if it says this.
pub(crate) fn proposed(by: Manager<'_>, id: &RoleId, grants: &Grants) -> Result<Role> {
    RuleSet::compile(&grants.topic_rules, Reach::Tenant(by.tenant_id))?;
    if Role::RESERVED.contains(&id.as_str()) {
        return Err(Error::RoleBuiltIn(id.clone()));
    }
    Ok(Role::Custom(Arc::new(compile(id, 0, false, grants, by.tenant_id))))
}

/// Refuses a role that allows more than its author may do.
fn check_may_give(by: Manager<'_>, id: &RoleId, grants: &Grants, platform: bool) -> Result<()> {
    let role = compile(id, 0, platform, grants, by.tenant_id);
    if by.may_give(&Role::Custom(Arc::new(role)), &Extent::Everything) {
        Ok(())
    } else {
        Err(Error::Exceeds(id.clone()))
    }
}

/// Makes a role. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    by: Manager<'_>,
    new: &NewRole,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<Stored> {
    if new.platform && !by.platform {
        return Err(Error::NotPlatform("make roles of the platform"));
    }
    let owner = (!new.platform).then_some(by.tenant);
    new.grants.check(reach(owner, by.tenant_id), auth)?;
    check_may_give(by, &new.id, &new.grants, new.platform)?;
    if Role::RESERVED.contains(&new.id.as_str()) {
        return Err(Error::RoleExists(new.id.clone()));
    }
    lock(db, owner).await?;
    check_room(db, owner, &new.id, auth).await?;
    let key = sqlx::query_scalar!(
        r#"
        insert into role (tenant_key, id, permissions, topic_rules, created_at, updated_at)
        values ($1, $2, $3, $4, $5, $5)
        returning key as "key: RoleKey"
        "#,
        owner.map(|tenant| tenant.0),
        new.id.as_str(),
        &new.grants.names(),
        Json(&new.grants.topic_rules) as _,
        now
    )
    .fetch_one(&mut *db)
    .await
    .or_on("role_id_key", || Error::RoleExists(new.id.clone()))?;
    by_key(db, key).await?.ok_or_else(|| Error::NoSuchRole(new.id.clone()))
}

/// Whether the name is free, among the platform's roles too, and one more role may be.
async fn check_room(db: &mut PgConnection, owner: Option<TenantKey>, id: &RoleId, auth: &Auth) -> Result<()> {
    let owner = owner.map(|tenant| tenant.0);
    let found = sqlx::query!(
        r#"
        select count(*) filter (where tenant_key is not distinct from $1) as "count!",
               coalesce(bool_or(id = $2 and ($1::bigint is null or tenant_key is null or tenant_key = $1)), false) as "taken!"
          from role
        "#,
        owner,
        id.as_str()
    )
    .fetch_one(db)
    .await?;
    if found.taken {
        return Err(Error::RoleExists(id.clone()));
    }
    if usize::try_from(found.count).is_ok_and(|count| count >= auth.max_roles) {
        return Err(Error::TooMany { what: "roles", most: auth.max_roles });
    }
    Ok(())
}

/// Changes of access wait for each other within a tenant, so that counts and "the last one" are exact; without a tenant,
/// within all of them. The lock ends with the transaction.
pub(crate) async fn lock(db: &mut PgConnection, tenant: Option<TenantKey>) -> Result<()> {
    // `no key`: what refers to the tenant (a new device, say) need not wait.
    sqlx::query!(
        "select key from tenant where $1::bigint is null or key = $1 order by key for no key update",
        tenant.map(|tenant| tenant.0)
    )
    .fetch_all(db)
    .await?;
    Ok(())
}

/// The role of that name, as far as it exists for whoever asks.
pub async fn find(db: &mut PgConnection, by: Manager<'_>, id: &RoleId) -> Result<Stored> {
    let key = sqlx::query_scalar!(
        r#"
        select key as "key: RoleKey"
          from role
         where id = $1 and (tenant_key = $2 or (tenant_key is null and $3))
        "#,
        id.as_str(),
        by.tenant.0,
        by.platform
    )
    .fetch_optional(&mut *db)
    .await?;
    let role = match key {
        Some(key) => by_key(db, key).await?,
        None => None,
    };
    role.ok_or_else(|| Error::NoSuchRole(id.clone()))
}

async fn by_key(db: &mut PgConnection, key: RoleKey) -> Result<Option<Stored>> {
    Ok(read(db, &[key.0]).await?.pop())
}

async fn read(db: &mut PgConnection, keys: &[i64]) -> Result<Vec<Stored>> {
    let rows = sqlx::query!(
        r#"
        select key as "key: RoleKey", tenant_key as "tenant: TenantKey", id as "id: RoleId", permissions,
               topic_rules as "topic_rules: Json<Vec<TopicRule>>", version, created_at, updated_at
          from role
         where key = any($1)
         order by id, key
        "#,
        keys
    )
    .fetch_all(db)
    .await?;
    let stored = rows.into_iter().map(|row| Stored {
        key: row.key,
        id: row.id,
        platform: row.tenant.is_none(),
        permissions: row.permissions.iter().filter_map(|name| Permission::named(name)).collect(),
        topic_rules: row.topic_rules.0,
        version: row.version,
        created_at: row.created_at,
        updated_at: row.updated_at,
    });
    Ok(stored.collect())
}

/// At most `limit` (itself at most [`MAX_PAGE`]) roles by name, beginning behind `after`: the tenant's, and for who has
/// platform standing the platform's.
pub async fn page(
    db: &mut PgConnection,
    by: Manager<'_>,
    after: Option<&RoleId>,
    limit: usize,
) -> Result<(Vec<Stored>, Option<RoleId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut keys = sqlx::query_scalar!(
        "
        select key
          from role
         where (tenant_key = $1 or (tenant_key is null and $2)) and ($3::text is null or id > $3)
         order by id
         limit $4
        ",
        by.tenant.0,
        by.platform,
        after.map(RoleId::as_str),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = keys.len() > limit;
    keys.truncate(limit);
    let roles = read(db, &keys).await?;
    let next = roles.last().filter(|_| more).map(|role| role.id.clone());
    Ok((roles, next))
}

/// Writes a role anew: as it was, and as it is, if its version is one of `expected` or none is. To be called in a transaction.
pub async fn replace(
    db: &mut PgConnection,
    by: Manager<'_>,
    id: &RoleId,
    grants: &Grants,
    expected: &[i64],
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<(Stored, Stored)> {
    let role = locked(db, by, id, expected).await?;
    let owner = (!role.platform).then_some(by.tenant);
    grants.check(reach(owner, by.tenant_id), auth)?;
    check_may_give(by, id, grants, role.platform)?;
    sqlx::query!(
        "
        update role
           set permissions = $2, topic_rules = $3, version = version + 1, updated_at = $4
         where key = $1
        ",
        role.key.0,
        &grants.names(),
        Json(&grants.topic_rules) as _,
        now
    )
    .execute(&mut *db)
    .await?;
    control::bump(db).await?;
    let new = find(db, by, id).await?;
    Ok((role, new))
}

/// Ends a role that nobody has, if its version is one of `expected` or none is; answers what it was. To be called in a
/// transaction.
pub async fn delete(db: &mut PgConnection, by: Manager<'_>, id: &RoleId, expected: &[i64]) -> Result<Stored> {
    let role = locked(db, by, id, expected).await?;
    let deleted = sqlx::query!("delete from role where key = $1", role.key.0).execute(&mut *db).await;
    match deleted {
        Err(sqlx::Error::Database(error)) if error.is_foreign_key_violation() => Err(Error::RoleInUse(id.clone())),
        deleted => {
            deleted?;
            Ok(role)
        }
    }
}

/// The role, which stands still until the transaction ends, as does who has it.
async fn locked(db: &mut PgConnection, by: Manager<'_>, id: &RoleId, expected: &[i64]) -> Result<Stored> {
    if Role::RESERVED.contains(&id.as_str()) {
        return Err(Error::RoleBuiltIn(id.clone()));
    }
    let found = find(db, by, id).await?;
    lock(db, (!found.platform).then_some(by.tenant)).await?;
    let role = find(db, by, id).await?;
    check_may_give(by, id, &role.grants(), role.platform)?;
    check_version(role.version, expected)?;
    Ok(role)
}

/// A role that may be given to a user or an API key.
#[derive(Debug, Clone)]
pub(crate) struct Assignable {
    pub(crate) role: Role,
    pub(crate) key: Option<i64>,
}

impl Assignable {
    /// The name of a built-in one, as rows have it.
    pub(crate) fn built_in(&self) -> Option<&'static str> {
        self.role.built_in_name()
    }
}

/// The role of that name, for whoever may give it away for these devices.
pub(crate) async fn assignable(
    db: &mut PgConnection,
    by: Manager<'_>,
    id: &RoleId,
    extent: &Extent,
) -> Result<Assignable> {
    let found = if let Some(role) = Role::built_in(id.as_str()) {
        Assignable { role, key: None }
    } else {
        let stored = find(db, by, id).await?;
        Assignable { role: stored.ready(by), key: Some(stored.key.0) }
    };
    if by.may_give(&found.role, extent) { Ok(found) } else { Err(Error::Exceeds(id.clone())) }
}

fn reach(owner: Option<TenantKey>, tenant: &TenantId) -> Reach<'_> {
    if owner.is_some() { Reach::Tenant(tenant) } else { Reach::Platform }
}

/// Which role a row of a user or an API key names.
#[derive(Debug, Clone)]
pub(crate) struct Named {
    pub(crate) built_in: Option<String>,
    pub(crate) custom: Option<(RoleKey, i64)>,
}

/// Roles as principals have them. What is compiled is kept with the version it was made of, and the version is read with
/// each principal, so nothing here is ever stale.
#[derive(Debug, Default)]
pub struct Roles {
    compiled: Mutex<HashMap<RoleKey, Arc<CustomRole>>>,
}

impl Roles {
    /// The role a row names, in a tenant; `None` for none, and for one that this version does not know.
    pub(crate) async fn load(&self, db: &mut PgConnection, tenant: &TenantId, named: Named) -> Result<Option<Role>> {
        let Some((key, version)) = named.custom else {
            return Ok(named.built_in.as_deref().and_then(Role::built_in));
        };
        let kept = self.compiled.lock().get(&key).filter(|role| role.version == version).cloned();
        if let Some(role) = kept {
            return Ok(Some(Role::Custom(role)));
        }
        let Some(stored) = by_key(db, key).await? else { return Ok(None) };
        let role = Arc::new(compile(&stored.id, stored.version, stored.platform, &stored.grants(), tenant));
        let mut compiled = self.compiled.lock();
        if compiled.len() >= MAX_COMPILED {
            compiled.clear();
        }
        compiled.insert(key, role.clone());
        Ok(Some(Role::Custom(role)))
    }
}

/// Ready to be asked: its own topic rules and those of its permissions.
fn compile(id: &RoleId, version: i64, platform: bool, grants: &Grants, tenant: &TenantId) -> CustomRole {
    let reach = if platform { Reach::Platform } else { Reach::Tenant(tenant) };
    let opened = grants.permissions.iter().flat_map(|permission| permission.topic_rules());
    let rules = grants.topic_rules.iter().cloned().chain(opened).collect::<Vec<_>>();
    let rules = RuleSet::compile(&rules, reach).unwrap_or_else(|error| {
        tracing::error!(role.id = %id, %error, "a stored role is not valid and grants no topic");
        RuleSet::default()
    });
    CustomRole {
        id: id.clone(),
        version,
        platform,
        permissions: grants.permissions.clone(),
        written: grants.topic_rules.clone(),
        rules: Arc::new(rules),
    }
}
