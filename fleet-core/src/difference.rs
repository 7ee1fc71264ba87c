//! What a change of access would give and take, before it is made.
//!
//! [`of`] compiles the rights of everybody a [`Change`] touches as they are and as they would be, and compares them: permissions,
//! topics, and for each permission the devices. Holds: nothing is written; the same [`crate::policy`] that decides is asked.
//! Ignorant of: HTTP, routes.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use chrono::{DateTime, Utc};
use futures::TryStreamExt as _;
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use crate::binding::{self, NewBinding};
use crate::device::{DeviceType, GroupPath, Labels};
use crate::error::Result;
use crate::id::{ApiKeyId, BindingId, DeviceId, RoleId, UserId};
use crate::policy::{About, Grant, Grants, Manager, Permission, Role, Source};
use crate::role::{self, Roles};
use crate::scope::{Attributes, Extent};
use crate::topic_rule::{Action, Effect};
use crate::{standing, user};

/// Most users and API keys that are compared; of more, only their number is told.
pub const MAX_PRINCIPALS: usize = 200;
/// Devices that are named of those gained, and of those lost.
pub const SAMPLE: usize = 20;

/// What somebody is about to change.
#[derive(Debug, Clone)]
pub enum Change {
    /// A role says this from now on; or there is such a role.
    Role {
        /// Its name.
        id: RoleId,
        /// What it says.
        grants: role::Grants,
    },
    /// A user is bound to a role.
    Bind(NewBinding),
    /// A binding ends.
    Unbind(BindingId),
    /// A user gets another role for the whole tenant, or none.
    UserRole {
        /// The user.
        user: UserId,
        /// The role.
        role: Option<RoleId>,
    },
}

/// What comes and what goes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delta<T> {
    /// What is not there yet.
    pub gained: T,
    /// What would be there no more.
    pub lost: T,
}

/// Some devices: how many, and the first of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// How many.
    pub count: u64,
    /// At most [`SAMPLE`] of them.
    pub sample: Vec<DeviceId>,
}

/// What a change means to a user or an API key, or to whoever will have a role.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The user; `None`: whoever will have the role.
    pub user: Option<UserId>,
    /// The API key of the user, when it is about one.
    pub key: Option<ApiKeyId>,
    /// Permissions that hold for some devices at least.
    pub permissions: Delta<Vec<Permission>>,
    /// Topic rules in words, with their scope.
    pub topics: Delta<Vec<String>>,
    /// For each permission whose devices change.
    pub devices: Vec<(Permission, Delta<Devices>)>,
}

/// All that a change means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Differences {
    /// For each whose rights would change.
    pub items: Vec<Difference>,
    /// How many were looked at.
    pub compared: usize,
    /// Whether there are more, which were not.
    pub more: bool,
}

/// What `change` would give and take.
///
/// # Errors
/// Those of the change itself, when it could not be made.
pub async fn of(db: &mut PgConnection, by: Manager<'_>, change: &Change, now: DateTime<Utc>) -> Result<Differences> {
    let prepared = prepare(db, by, change).await?;
    let (affected, more) = affected(db, by, &prepared).await?;
    let asked = affected.iter().map(|&(user, key)| standing::Asked { user, key, session: None }).collect::<Vec<_>>();
    let roles = Roles::default();
    let standings = standing::of_many(db, &roles, &asked, now).await?;
    let mut pairs = Vec::new();
    for (&(user, key), standing) in affected.iter().zip(standings) {
        // Who may not come in has nothing to win or to lose.
        let Some(principal) = standing.principal() else { continue };
        let before = principal.grants().clone();
        let mut after = prepared.apply(&before, user);
        if key.is_some() {
            let of_user = standing::grants(db, &roles, user).await?;
            after = after.within(prepared.apply(&of_user, user));
        }
        pairs.push((Some(user), key, before, after));
    }
    if let Prepared::Role(id, role) = &prepared
        && affected.is_empty()
    {
        let before = role::find(db, by, id).await.ok().map(|stored| stored.ready(by));
        pairs.push((None, None, Grants::of(before), Grants::of(Some(role.clone()))));
    }
    let devices = compare_devices(db, by, &pairs).await?;
    let items = pairs.into_iter().map(|(user, key, before, after)| Difference {
        user,
        key,
        permissions: delta(&permissions(&before), &permissions(&after)),
        topics: delta(&topics(&before), &topics(&after)),
        devices: about_devices(&before, &after, &devices),
    });
    let items = items.filter(|item| !item.is_nothing()).collect();
    Ok(Differences { items, compared: affected.len(), more })
}

impl Difference {
    fn is_nothing(&self) -> bool {
        self.permissions == Delta::default() && self.topics == Delta::default() && self.devices.is_empty()
    }
}

/// A change with what it needs looked up.
enum Prepared {
    Role(RoleId, Role),
    Bind(UserId, Grant),
    Unbind(UserId, BindingId),
    UserRole(UserId, Option<Role>),
}

async fn prepare(db: &mut PgConnection, by: Manager<'_>, change: &Change) -> Result<Prepared> {
    Ok(match change {
        Change::Role { id, grants } => Prepared::Role(id.clone(), role::proposed(by, id, grants)?),
        Change::Bind(new) => {
            user::find_in(db, by.tenant, new.user).await?;
            let extent = new.scope.extent();
            let role = role::assignable(db, by, &new.role, &extent).await?.role;
            binding::check_reach(&role, &new.scope)?;
            Prepared::Bind(new.user, Grant { source: Source::Binding(BindingId::new()), role, extent })
        }
        Change::Unbind(id) => Prepared::Unbind(binding::find(db, by.tenant, *id).await?.user, *id),
        Change::UserRole { user, role } => {
            user::find_in(db, by.tenant, *user).await?;
            let role = match role {
                Some(role) => Some(role::assignable(db, by, role, &Extent::Everything).await?.role),
                None => None,
            };
            Prepared::UserRole(*user, role)
        }
    })
}

impl Prepared {
    /// The grants as they would be; without their ceiling.
    fn apply(&self, grants: &Grants, user: UserId) -> Grants {
        let mut list = grants.iter().cloned().collect::<Vec<_>>();
        let is_key = list.iter().any(|grant| matches!(grant.source, Source::ApiKey(_)));
        match self {
            Self::Role(id, role) => {
                let named = list.iter_mut().filter(|grant| grant.role.name() == id.as_str());
                named.for_each(|grant| grant.role = role.clone());
            }
            Self::Bind(whose, grant) if *whose == user && !is_key => list.push(grant.clone()),
            Self::Unbind(whose, id) if *whose == user => list.retain(|grant| grant.source != Source::Binding(*id)),
            Self::UserRole(whose, role) if *whose == user && !is_key => {
                list.retain(|grant| grant.source != Source::User);
                let own = role.clone().map(|role| Grant { source: Source::User, role, extent: Extent::Everything });
                list.extend(own);
            }
            _ => {}
        }
        Grants::new(list)
    }
}

/// Whose rights may change: users, and API keys, of which users' keys too.
async fn affected(
    db: &mut PgConnection,
    by: Manager<'_>,
    prepared: &Prepared,
) -> Result<(Vec<(UserId, Option<ApiKeyId>)>, bool)> {
    let (role, whose) = match prepared {
        Prepared::Role(id, _) => (Some(id.as_str()), None),
        Prepared::Bind(user, _) | Prepared::Unbind(user, _) | Prepared::UserRole(user, _) => (None, Some(user.uuid())),
    };
    let rows = sqlx::query!(
        r#"
        with named as (select key from role where id = $2 and (tenant_key = $1 or tenant_key is null and $4)),
             someone as (
                 select u.id
                   from app_user u
                  where u.tenant_key = $1
                    and (u.id = $3 or u.role_key in (select key from named)
                         or exists (select from binding b where b.user_id = u.id and b.role_key in (select key from named))))
        select someone.id as "user!: UserId", null as "key?: Uuid" from someone
         union all
        select k.user_id, k.id
          from api_key k
          join app_user u on u.id = k.user_id and u.tenant_key = $1
         where k.user_id in (select id from someone) or k.role_key in (select key from named)
         order by 1, 2 nulls first
         limit $5
        "#,
        by.tenant.0,
        role,
        whose,
        by.platform,
        i64::try_from(MAX_PRINCIPALS + 1).unwrap_or(i64::MAX)
    )
    .fetch_all(db)
    .await?;
    let more = rows.len() > MAX_PRINCIPALS;
    Ok((rows.into_iter().take(MAX_PRINCIPALS).map(|row| (row.user, row.key.map(ApiKeyId::from))).collect(), more))
}

fn permissions(grants: &Grants) -> Vec<Permission> {
    Permission::ALL.iter().copied().filter(|permission| grants.may(*permission)).collect()
}

fn topics(grants: &Grants) -> Vec<String> {
    let mut words = BTreeSet::new();
    for grant in grants.iter() {
        let scope = match &grant.extent {
            Extent::Everything => String::new(),
            some @ Extent::Any(_) => format!(" within {}", some.setting()),
        };
        for rule in grant.role.written_rules() {
            let effect = if rule.effect == Effect::Allow { "allow" } else { "deny" };
            let action = match rule.action {
                Action::Publish => "publish",
                Action::Subscribe => "subscribe",
                Action::All => "publish and subscribe",
            };
            words.insert(format!("{effect} {action} {}{scope}", rule.filter));
        }
    }
    words.into_iter().collect()
}

fn delta<T: PartialEq + Clone>(before: &[T], after: &[T]) -> Delta<Vec<T>> {
    let gained = after.iter().filter(|one| !before.contains(one)).cloned().collect();
    let lost = before.iter().filter(|one| !after.contains(one)).cloned().collect();
    Delta { gained, lost }
}

/// Extents before and after, as text, by which they are told apart.
type Pair = (String, String);

fn pair(before: &Extent, after: &Extent) -> Pair {
    (before.setting(), after.setting())
}

/// Permissions about devices, with their extents, where these differ.
fn changed(before: &Grants, after: &Grants) -> impl Iterator<Item = (Permission, Extent, Extent)> {
    let of_devices = Permission::ALL.iter().filter(|permission| permission.about() == About::Devices);
    let extents = of_devices.map(|permission| (*permission, before.extent(*permission), after.extent(*permission)));
    extents.filter(|(_, before, after)| before != after).collect::<Vec<_>>().into_iter()
}

type Pairs = [(Option<UserId>, Option<ApiKeyId>, Grants, Grants)];

/// For each two extents that differ, the devices in one and not in the other. One walk over the tenant's devices.
async fn compare_devices(
    db: &mut PgConnection,
    by: Manager<'_>,
    pairs: &Pairs,
) -> Result<HashMap<Pair, Delta<Devices>>> {
    let mut asked = BTreeMap::new();
    for (_, _, before, after) in pairs {
        for (_, before, after) in changed(before, after) {
            asked.insert(pair(&before, &after), (before, after, Delta::<Devices>::default()));
        }
    }
    if !asked.is_empty() {
        let mut rows = sqlx::query!(
            r#"
            select id as "id: DeviceId", type as "kind: DeviceType", group_path as "group: GroupPath",
                   labels as "labels: Json<Labels>"
              from device
             where tenant_key = $1
             order by id
            "#,
            by.tenant.0
        )
        .fetch(db);
        while let Some(row) = rows.try_next().await? {
            let device = Attributes { group: row.group, kind: row.kind, labels: row.labels.0 };
            for (before, after, delta) in asked.values_mut() {
                match (before.contains(&device), after.contains(&device)) {
                    (false, true) => delta.gained.add(&row.id),
                    (true, false) => delta.lost.add(&row.id),
                    _ => {}
                }
            }
        }
    }
    Ok(asked.into_iter().map(|(pair, (_, _, delta))| (pair, delta)).collect())
}

impl Devices {
    fn add(&mut self, id: &DeviceId) {
        self.count += 1;
        if self.sample.len() < SAMPLE {
            self.sample.push(id.clone());
        }
    }
}

fn about_devices(
    before: &Grants,
    after: &Grants,
    compared: &HashMap<Pair, Delta<Devices>>,
) -> Vec<(Permission, Delta<Devices>)> {
    let found = changed(before, after).filter_map(|(permission, before, after)| {
        compared.get(&pair(&before, &after)).map(|delta| (permission, delta.clone()))
    });
    found.filter(|(_, delta)| *delta != Delta::default()).collect()
}
