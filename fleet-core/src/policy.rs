//! Who may do what: one policy, asked by the REST door for permissions and by the MQTT door for topics.
//!
//! Deny by default; a deny rule wins over any allow rule. A [`Role`] is a set of [`Permission`]s and of topic
//! rules; [`Principal::topic_rules`] are those of whoever stands at the MQTT door.

use std::sync::{Arc, LazyLock};

use chrono::{DateTime, Utc};

use crate::id::{ApiKeyId, CredentialId, DeviceId, DeviceKey, LoginSessionId, RoleId, TenantId, TenantKey, UserId};
use crate::topic_rule::{Action, Effect, Reach, RuleSet, TopicRule};
pub use crate::topic_rule::{Guard, TopicRules};

/// What a caller may do on the REST API, as `noun:verb`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Permission {
    /// `devices:read`
    DevicesRead,
    /// `devices:write`: enrol, change, delete
    DevicesWrite,
    /// `credentials:manage`: issue, rotate, revoke device credentials
    CredentialsManage,
    /// `telemetry:read`
    TelemetryRead,
    /// `dead-letters:read`
    DeadLettersRead,
    /// `connections:read`: see who is connected, durable sessions, connection events
    ConnectionsRead,
    /// `connections:manage`: disconnect clients, end their sessions, trace them
    ConnectionsManage,
    /// `access:manage`: users, roles, API keys
    AccessManage,
}

impl Permission {
    /// Every permission there is.
    pub const ALL: [Self; 8] = [
        Self::DevicesRead,
        Self::DevicesWrite,
        Self::CredentialsManage,
        Self::TelemetryRead,
        Self::DeadLettersRead,
        Self::ConnectionsRead,
        Self::ConnectionsManage,
        Self::AccessManage,
    ];

    /// `noun:verb`, as roles and problems spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::DevicesRead => "devices:read",
            Self::DevicesWrite => "devices:write",
            Self::CredentialsManage => "credentials:manage",
            Self::TelemetryRead => "telemetry:read",
            Self::DeadLettersRead => "dead-letters:read",
            Self::ConnectionsRead => "connections:read",
            Self::ConnectionsManage => "connections:manage",
            Self::AccessManage => "access:manage",
        }
    }

    /// The permission of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|permission| permission.name() == name)
    }
}

/// A role: what whoever has it may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Everything in the tenant.
    Admin,
    /// A device: its own topics and nothing else.
    Device,
    /// What somebody wrote; made by [`crate::role`].
    Custom(Arc<CustomRole>),
}

/// A role that somebody made, ready to be asked.
#[derive(Debug, PartialEq, Eq)]
pub struct CustomRole {
    pub(crate) id: RoleId,
    pub(crate) version: i64,
    pub(crate) permissions: Vec<Permission>,
    pub(crate) rules: Arc<RuleSet>,
}

impl Role {
    /// Names that no role may be given, because they are or will be those of built-in roles.
    pub const RESERVED: [&str; 8] =
        ["admin", "operator", "release-manager", "support", "viewer", "auditor", "device", "gateway"];

    /// The built-in role of that name that a user or an API key may have.
    pub fn built_in(name: &str) -> Option<Self> {
        (name == Self::Admin.name()).then_some(Self::Admin)
    }

    /// The role's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Admin => "admin",
            Self::Device => "device",
            Self::Custom(role) => role.id.as_str(),
        }
    }

    fn holds(&self, permission: Permission) -> bool {
        match self {
            Self::Admin => true,
            Self::Device => false,
            Self::Custom(role) => role.permissions.contains(&permission),
        }
    }

    fn topic_rules(&self) -> Arc<RuleSet> {
        match self {
            Self::Admin => ADMIN.clone(),
            Self::Device => DEVICE.clone(),
            Self::Custom(role) => role.rules.clone(),
        }
    }
}

static ADMIN: LazyLock<Arc<RuleSet>> = LazyLock::new(|| {
    built_in(&[(Action::All, "fleet/v1/{tenant}/#"), (Action::All, "app/{tenant}/#"), (Action::Subscribe, "$SYS/#")])
});
static DEVICE: LazyLock<Arc<RuleSet>> = LazyLock::new(|| built_in(&[(Action::All, "fleet/v1/{tenant}/{device}/#")]));
static NOTHING: LazyLock<Arc<RuleSet>> = LazyLock::new(|| built_in(&[]));

fn built_in(allowed: &[(Action, &str)]) -> Arc<RuleSet> {
    let rule = |(action, filter): &(Action, &str)| TopicRule {
        effect: Effect::Allow,
        action: *action,
        filter: (*filter).to_owned(),
    };
    let rules = allowed.iter().map(rule).collect::<Vec<_>>();
    Arc::new(RuleSet::compile(&rules, Reach::Platform).expect("rules written here and tested below"))
}

/// Whoever stands at a door, proven by a credential.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    /// The row of the tenant.
    pub tenant: TenantKey,
    /// The tenant's name.
    pub tenant_id: TenantId,
    /// Device or user.
    pub who: Who,
    /// What it was proven by.
    pub proof: Proof,
}

/// What a principal was proven by, so that an open connection can end with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Proof {
    /// The device's credential, when that has a row; it ends the connection when it is revoked.
    pub credential: Option<CredentialId>,
    /// The login that an access token belongs to; the proof ends with it.
    pub session: Option<LoginSessionId>,
    /// The proof is worth nothing from then on; `None`: until somebody ends it.
    pub valid_until: Option<DateTime<Utc>>,
}

/// The kind of a principal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Who {
    /// A device, by its credential.
    Device {
        /// Its row.
        key: DeviceKey,
        /// Its name.
        id: DeviceId,
    },
    /// A user, by an access token, or a program by an API key of that user.
    User {
        /// The user's id.
        id: UserId,
        /// The API key, when it is one that was shown.
        key: Option<ApiKeyId>,
        /// The role of the user or the API key; without one a user may log in and do nothing else.
        role: Option<Role>,
        /// Whether the user stands above tenants; an API key never does.
        platform: bool,
    },
}

/// In whose name, and within which bounds, access is managed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Manager {
    /// Users, roles and API keys of this tenant.
    pub tenant: TenantKey,
    /// Whether roles of the platform may be made and given away too.
    pub platform: bool,
}

impl Principal {
    /// The role; a user may be without one.
    pub fn role(&self) -> Option<&Role> {
        match &self.who {
            Who::Device { .. } => Some(&Role::Device),
            Who::User { role, .. } => role.as_ref(),
        }
    }

    /// The bounds within which this principal manages access, if it may at all.
    pub fn manager(&self) -> Manager {
        let above = matches!(self.who, Who::User { platform: true, key: None, role: Some(Role::Admin), .. });
        Manager { tenant: self.tenant, platform: above }
    }

    /// Whether this principal may call what `permission` opens.
    pub fn may(&self, permission: Permission) -> bool {
        self.role().is_some_and(|role| role.holds(permission))
    }

    /// The topic rules of this principal. They are compiled once for a role, not for each who has it.
    pub fn topic_rules(&self) -> TopicRules {
        let device = match &self.who {
            Who::Device { id, .. } => Some(id.clone()),
            Who::User { .. } => None,
        };
        let rules = self.role().map_or_else(|| NOTHING.clone(), Role::topic_rules);
        TopicRules::new(rules, self.tenant_id.clone(), device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str) -> Principal {
        Principal {
            tenant: TenantKey(1),
            tenant_id: "main".parse().unwrap(),
            who: Who::Device { key: DeviceKey(7), id: id.parse().unwrap() },
            proof: Proof::default(),
        }
    }

    fn user(role: Option<Role>) -> Who {
        Who::User { id: UserId::new(), key: None, role, platform: false }
    }

    #[test]
    fn a_device_may_use_its_own_subtree_and_nothing_else() {
        let rules = device("boiler-1").topic_rules();
        for own in ["fleet/v1/main/boiler-1/telemetry", "fleet/v1/main/boiler-1/commands/7/response"] {
            assert!(rules.may_publish(own), "{own}");
            assert!(rules.may_subscribe(own), "{own}");
        }
        assert!(rules.may_subscribe("fleet/v1/main/boiler-1/#"));
        assert!(rules.may_subscribe("fleet/v1/main/boiler-1/commands/+/request"));
        for foreign in
            ["fleet/v1/main/boiler-10/telemetry", "fleet/v1/other/boiler-1/telemetry", "app/main/x", "$SYS/x", "x"]
        {
            assert!(!rules.may_publish(foreign), "{foreign}");
            assert!(!rules.may_subscribe(foreign), "{foreign}");
        }
        for wide in ["#", "+/#", "fleet/v1/main/+/telemetry", "fleet/#", "fleet/v1/main/#", "fleet/v1/+/boiler-1/#"] {
            assert!(!rules.may_subscribe(wide), "{wide}");
        }
    }

    #[test]
    fn a_device_has_no_permission_and_a_user_without_a_role_has_none_either() {
        let nobody = Principal { who: user(None), ..device("d") };
        for permission in Permission::ALL {
            assert!(!device("d").may(permission));
            assert!(!nobody.may(permission));
        }
        assert!(!nobody.topic_rules().may_subscribe("fleet/v1/main/x/telemetry"));
    }

    #[test]
    fn an_admin_stays_in_the_tenant() {
        let admin = Principal { who: user(Some(Role::Admin)), ..device("d") };
        let rules = admin.topic_rules();
        assert!(rules.may_subscribe("fleet/v1/main/+/telemetry"));
        assert!(rules.may_subscribe("$SYS/#"));
        assert!(!rules.may_publish("$SYS/broker/x"));
        assert!(!rules.may_subscribe("#"));
        assert!(!rules.may_subscribe("fleet/v1/+/x/telemetry"));
    }
}
