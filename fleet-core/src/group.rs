//! Groups: where devices belong, as a tree of paths.
//!
//! A group is there while a device is in it or below it, or since somebody made it ([`create`]), so it needs no upkeep when devices
//! come and go. [`page`] and [`find`] show those that the transaction may see, [`relocate`] moves or renames one with all that is
//! below it, [`delete`] ends one that is empty. Holds: a move takes devices, scopes and what claims give along in one
//! transaction, to a place where nothing was; nobody moves what they may not reach, nor to where they may not reach, and nobody may
//! do more with a device because they moved it. Ignorant of: HTTP.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::device::GroupPath;
use crate::error::{Error, OrOn, Result};
use crate::id::TenantKey;
use crate::policy::{Permission, Principal};
use crate::scope::{Extent, Scope};
use crate::{control, role, tenancy};

/// Most groups on a page.
pub const MAX_PAGE: usize = 1000;
/// What it takes to change groups.
const RIGHT: Permission = Permission::DevicesWrite;

/// A group, as the transaction sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// Names it.
    pub path: GroupPath,
    /// Devices in it, those below it left out.
    pub devices: i64,
    /// Devices in it and below it.
    pub devices_below: i64,
    /// When somebody made it; `None`: it is there because of what is in it.
    pub created_at: Option<DateTime<Utc>>,
}

/// What went along with a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Moved {
    /// Devices.
    pub devices: u64,
    /// Bindings that are about it, or a group below it.
    pub bindings: u64,
    /// API keys that are.
    pub api_keys: u64,
    /// Claims whose devices come into it.
    pub claims: u64,
}

/// At most `limit` (itself at most [`MAX_PAGE`]) groups by path, `under` and those below it only if one is given, beginning
/// behind `after`; and where to go on.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    under: Option<&GroupPath>,
    after: Option<&GroupPath>,
    limit: usize,
) -> Result<(Vec<Group>, Option<GroupPath>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut groups = sqlx::query_as!(
        Group,
        r#"
        with filled (path, devices, created_at) as (
            select group_path, count(*), null::timestamptz from device
             where tenant_key = $1 and ($2::text is null or group_path = $2 or starts_with(group_path, $2 || '/'))
             group by group_path
             union all
            select path, 0, created_at from device_group
             where tenant_key = $1 and ($2::text is null or path = $2 or starts_with(path, $2 || '/'))
        ), spread (path, devices, created_at, is_own) as (
            select array_to_string(names[:n], '/'), devices, created_at, n = cardinality(names)
              from filled, string_to_array(path, '/') as names, generate_series(1, cardinality(names)) as n
             where path is not null
        )
        select path as "path!: GroupPath",
               coalesce(sum(devices) filter (where is_own), 0)::bigint as "devices!",
               sum(devices)::bigint as "devices_below!",
               max(created_at) filter (where is_own) as created_at
          from spread
         where ($2::text is null or path = $2 or starts_with(path, $2 || '/')) and ($3::text is null or path > $3)
         group by path
         order by path
         limit $4
        "#,
        tenant.0,
        under.map(GroupPath::as_str),
        after.map(GroupPath::as_str),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(db)
    .await?;
    let more = groups.len() > limit;
    groups.truncate(limit);
    let next = groups.last().filter(|_| more).map(|group| group.path.clone());
    Ok((groups, next))
}

/// The group of that path.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, path: &GroupPath) -> Result<Group> {
    let (groups, _) = page(db, tenant, Some(path), None, 1).await?;
    groups.into_iter().find(|group| group.path == *path).ok_or_else(|| Error::NoSuchGroup(path.clone()))
}

/// Makes a group, which is empty. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    by: &Principal,
    path: &GroupPath,
    most: usize,
    now: DateTime<Utc>,
) -> Result<Group> {
    let tenant = by.tenant;
    reaches(by, path)?;
    role::lock(db, Some(tenant)).await?;
    tenancy::widen(db).await?;
    let count = sqlx::query_scalar!(r#"select count(*) as "count!" from device_group where tenant_key = $1"#, tenant.0)
        .fetch_one(&mut *db)
        .await?;
    if usize::try_from(count).is_ok_and(|count| count >= most) {
        return Err(Error::TooMany { what: "groups that were made", most });
    }
    let (there, _) = page(db, tenant, Some(path), None, 1).await?;
    if !there.is_empty() {
        return Err(Error::GroupExists(path.clone()));
    }
    sqlx::query!(
        "insert into device_group (tenant_key, path, created_at) values ($1, $2, $3)",
        tenant.0,
        path.as_str(),
        now
    )
    .execute(&mut *db)
    .await
    .or_on("device_group_pkey", || Error::GroupExists(path.clone()))?;
    find(db, tenant, path).await
}

/// Ends a group in which and below which no device is, and about which nothing is said. To be called in a transaction.
pub async fn delete(db: &mut PgConnection, by: &Principal, path: &GroupPath) -> Result<Group> {
    let tenant = by.tenant;
    let group = find(db, tenant, path).await?;
    reaches(by, path)?;
    role::lock(db, Some(tenant)).await?;
    tenancy::widen(db).await?;
    let (there, _) = page(db, tenant, Some(path), None, 2).await?;
    let named = Named::of(db, tenant, path).await?;
    if there.len() > 1 || there.iter().any(|group| group.devices_below > 0) || named.is_some() {
        return Err(Error::GroupInUse(path.clone()));
    }
    sqlx::query!("delete from device_group where tenant_key = $1 and path = $2", tenant.0, path.as_str())
        .execute(db)
        .await?;
    Ok(group)
}

/// Moves a group with all that is below it to another path, at which nothing may be; that is how it is renamed too. To be called
/// in a transaction.
pub async fn relocate(
    db: &mut PgConnection,
    by: &Principal,
    from: &GroupPath,
    to: &GroupPath,
    now: DateTime<Utc>,
) -> Result<(Group, Group, Moved)> {
    let tenant = by.tenant;
    let old = find(db, tenant, from).await?;
    if to.is_within(from) {
        return Err(Error::Invalid(format!("path: expected a group that is neither {from} nor below it")));
    }
    reaches(by, from)?;
    reaches(by, to)?;
    gains_nothing(by, from, to)?;
    role::lock(db, Some(tenant)).await?;
    // From here on it is about the whole group, whatever else of the tenant the caller may see.
    tenancy::widen(db).await?;
    let (there, _) = page(db, tenant, Some(to), None, 1).await?;
    if !there.is_empty() || Named::of(db, tenant, to).await?.is_some() {
        return Err(Error::GroupExists(to.clone()));
    }
    check_length(db, tenant, from, to).await?;
    let devices = move_devices(db, tenant, from, to, now).await?;
    let named = Named::of(db, tenant, from).await?;
    let moved = Moved { devices, ..named.rename(db, from, to).await? };
    control::bump(db).await?;
    Ok((old, find(db, tenant, to).await?, moved))
}

/// Whether the caller may change every device that can be in a group.
fn reaches(by: &Principal, path: &GroupPath) -> Result<()> {
    let whole = Scope::Group { group: path.clone() }.extent();
    if by.extent(RIGHT).covers(&whole) { Ok(()) } else { Err(Error::GroupOutOfScope(path.clone())) }
}

/// Whether the caller has, where the devices come to, no right that they do not have where these are.
fn gains_nothing(by: &Principal, from: &GroupPath, to: &GroupPath) -> Result<()> {
    for permission in Permission::ALL {
        let extent = by.extent(*permission);
        if !extent.covers(&extent.before_move(from, to)) {
            return Err(Error::Gains(permission.name()));
        }
    }
    // What roles say of topics beside their permissions is within the scope of the grant.
    for grant in by.grants().iter().filter(|grant| !grant.role.own_rules().is_empty()) {
        let same = by.grants().iter().filter(|other| other.role == grant.role);
        let all = same.fold(Extent::NOTHING, |sum, other| sum.or(&other.extent));
        if !all.covers(&grant.extent.before_move(from, to)) {
            return Err(Error::Gains("of a role's topic rules"));
        }
    }
    Ok(())
}

async fn check_length(db: &mut PgConnection, tenant: TenantKey, from: &GroupPath, to: &GroupPath) -> Result<()> {
    let longest = sqlx::query_scalar!(
        "
        select path from (select group_path as path from device where tenant_key = $1
                           union all
                          select path from device_group where tenant_key = $1) as all_paths
         where path = $2 or starts_with(path, $2 || '/')
         order by length(path) desc
         limit 1
        ",
        tenant.0,
        from.as_str()
    )
    .fetch_optional(db)
    .await?;
    let longest: Option<GroupPath> = longest.flatten().map(GroupPath::try_from).transpose()?;
    longest.map_or(Ok(()), |path| path.moved(from, to).map(|_| ()))
}

async fn move_devices(
    db: &mut PgConnection,
    tenant: TenantKey,
    from: &GroupPath,
    to: &GroupPath,
    now: DateTime<Utc>,
) -> Result<u64> {
    sqlx::query!(
        "
        update device_group
           set path = $3 || substr(path, length($2) + 1)
         where tenant_key = $1 and (path = $2 or starts_with(path, $2 || '/'))
        ",
        tenant.0,
        from.as_str(),
        to.as_str()
    )
    .execute(&mut *db)
    .await?;
    let moved = sqlx::query!(
        "
        with found as (
            select key from device
             where tenant_key = $1 and (group_path = $2 or starts_with(group_path, $2 || '/'))
             order by key
               for no key update
        )
        update device d
           set group_path = $3 || substr(group_path, length($2) + 1), version = version + 1, updated_at = $4
          from found
         where d.key = found.key
        ",
        tenant.0,
        from.as_str(),
        to.as_str(),
        now
    )
    .execute(db)
    .await?;
    Ok(moved.rows_affected())
}

/// What is said about a group, or about one below it.
struct Named {
    bindings: Vec<(Uuid, Scope)>,
    api_keys: Vec<(Uuid, Scope)>,
    claims: Vec<(Uuid, GroupPath)>,
}

impl Named {
    async fn of(db: &mut PgConnection, tenant: TenantKey, path: &GroupPath) -> Result<Self> {
        let bindings = sqlx::query!(
            r#"select id, scope as "scope: Json<Scope>" from binding where tenant_key = $1 order by id"#,
            tenant.0
        );
        let bindings = bindings.fetch_all(&mut *db).await?.into_iter().map(|row| (row.id, row.scope.0));
        let api_keys = sqlx::query!(
            r#"
            select k.id, k.scope as "scope: Json<Scope>"
              from api_key k
              join app_user u on u.id = k.user_id
             where u.tenant_key = $1
             order by k.id
            "#,
            tenant.0
        );
        let api_keys = api_keys.fetch_all(&mut *db).await?.into_iter().map(|row| (row.id, row.scope.0));
        let claims = sqlx::query!(
            r#"
            select id, group_path as "group!: GroupPath"
              from claim
             where tenant_key = $1 and (group_path = $2 or starts_with(group_path, $2 || '/'))
             order by id
            "#,
            tenant.0,
            path.as_str()
        );
        Ok(Self {
            bindings: bindings.filter(|(_, scope)| scope.names(path)).collect(),
            api_keys: api_keys.filter(|(_, scope)| scope.names(path)).collect(),
            claims: claims.fetch_all(db).await?.into_iter().map(|row| (row.id, row.group)).collect(),
        })
    }

    fn is_some(&self) -> bool {
        !(self.bindings.is_empty() && self.api_keys.is_empty() && self.claims.is_empty())
    }

    /// Says it about the group's new path.
    async fn rename(&self, db: &mut PgConnection, from: &GroupPath, to: &GroupPath) -> Result<Moved> {
        for (id, scope) in &self.bindings {
            let scope = Json(scope.moved(from, to)?);
            sqlx::query!("update binding set scope = $2 where id = $1", id, scope as _)
                .execute(&mut *db)
                .await
                .or_on("binding_key", || Error::BindingExists)?;
        }
        for (id, scope) in &self.api_keys {
            let scope = Json(scope.moved(from, to)?);
            sqlx::query!("update api_key set scope = $2 where id = $1", id, scope as _).execute(&mut *db).await?;
        }
        for (id, group) in &self.claims {
            let group = group.moved(from, to)?;
            sqlx::query!("update claim set group_path = $2 where id = $1", id, group.as_str())
                .execute(&mut *db)
                .await?;
        }
        let count = |len: usize| u64::try_from(len).unwrap_or(u64::MAX);
        Ok(Moved {
            devices: 0,
            bindings: count(self.bindings.len()),
            api_keys: count(self.api_keys.len()),
            claims: count(self.claims.len()),
        })
    }
}
