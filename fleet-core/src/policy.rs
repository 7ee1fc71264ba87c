//! Who may do what: one policy, asked by the REST door for permissions and extents, by the database for scope, by the MQTT door
//! for topics.
//!
//! Deny by default; a deny rule wins over any allow rule. A [`Role`] is a set of [`Permission`]s and of topic rules. A
//! [`Principal`] holds its roles as [`Grants`]: each within the [`Extent`] of a scope. The table in this file says what each
//! permission opens; the routes name theirs in their signatures, and a test holds both together.

use std::sync::{Arc, LazyLock};

use chrono::{DateTime, Utc};

use crate::certificate::Serial;
use crate::directory::Directory;
use crate::gateway::Children;
use crate::id::{
    ApiKeyId, AuthorityId, BindingId, ClaimId, CredentialId, DeviceId, DeviceKey, LoginSessionId, RoleId, TenantId,
    TenantKey, UserId,
};
use crate::scope::{Attributes, Extent};
use crate::topic_rule::{Action, Effect, Reach, RuleSet, Ruled, TopicPolicy, TopicRule};
pub use crate::topic_rule::{Guard, TopicRules};

/// What a permission is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// Devices: a binding may give it for some of them only.
    Devices,
    /// The tenant: worth something only when it is given for the whole of it.
    Tenant,
}

/// One line of the table.
struct Opens {
    name: &'static str,
    about: About,
    /// Behind `fleet/v1/{tenant}/+/`.
    topics: &'static [(Action, &'static str)],
}

macro_rules! permissions {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal, $about:ident, [$(($action:ident, $topic:literal)),*];)+) => {
        /// What a caller may do, as `noun:verb`.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Permission {
            $(
                #[doc = concat!("`", $name, "`:")]
                $(#[doc = $doc])+
                $variant,
            )+
        }

        impl Permission {
            /// Every permission there is.
            pub const ALL: &[Self] = &[$(Self::$variant),+];

            fn opens(self) -> Opens {
                match self {
                    $(Self::$variant => Opens {
                        name: $name,
                        about: About::$about,
                        topics: &[$((Action::$action, $topic)),*],
                    },)+
                }
            }

            /// What it is good for, in a few words.
            pub fn description(self) -> &'static str {
                match self {
                    $(Self::$variant => concat!($($doc),+).trim_ascii(),)+
                }
            }
        }
    };
}

// The one table: name, what it is about, the topics it opens below each device in scope. Routes name theirs.
permissions! {
    /// see devices, their state and groups
    DevicesRead = "devices:read", Devices, [(Subscribe, "status")];
    /// enrol, change, delete devices
    DevicesWrite = "devices:write", Devices, [];
    /// issue, rotate, revoke device credentials
    CredentialsManage = "credentials:manage", Devices, [];
    /// see readings and events
    TelemetryRead = "telemetry:read", Devices, [(Subscribe, "telemetry"), (Subscribe, "events")];
    /// see log lines
    LogsRead = "logs:read", Devices, [(Subscribe, "logs")];
    /// see what devices are to be and say they are
    ShadowRead = "shadow:read", Devices,
        [(Subscribe, "shadow/update/accepted"), (Subscribe, "shadow/update/delta")];
    /// change what devices are to be, the level of their logs included
    ShadowWrite = "shadow:write", Devices, [];
    /// store log lines of devices: for programs that speak OpenTelemetry
    LogsWrite = "logs:write", Devices, [];
    /// send commands to devices and see what becomes of them
    CommandsSend = "commands:send", Devices,
        [(All, "commands/+/request"), (Subscribe, "commands/+/response")];
    /// offer updates to devices
    UpdatesDeploy = "updates:deploy", Devices, [(Subscribe, "updates/offer"), (Subscribe, "updates/+/ack")];
    /// approve updates that others prepared
    UpdatesApprove = "updates:approve", Tenant, [];
    /// see payloads that could not be read
    DeadLettersRead = "dead-letters:read", Devices, [];
    /// see who is connected, durable sessions, connection events
    ConnectionsRead = "connections:read", Devices, [];
    /// disconnect clients, end their sessions, trace them
    ConnectionsManage = "connections:manage", Devices, [];
    /// see who did what
    AuditRead = "audit:read", Devices, [];
    /// give and take access: users, roles, bindings, API keys
    AccessManage = "access:manage", Tenant, [];
    /// make, register, disable, delete certificate authorities
    AuthoritiesManage = "authorities:manage", Tenant, [];
    /// make and revoke claims, by which devices ask to come in, and approve what they ask
    ProvisioningManage = "provisioning:manage", Tenant, [];
    /// shut devices out for good, and delete all that is known of them
    DevicesDecommission = "devices:decommission", Devices, [];
}

impl Permission {
    /// `noun:verb`, as roles and problems spell it.
    pub fn name(self) -> &'static str {
        self.opens().name
    }

    /// Whether a binding may give it for some devices only.
    pub fn about(self) -> About {
        self.opens().about
    }

    /// The permission of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|permission| permission.name() == name)
    }

    /// The topic rules that come with it.
    pub fn topic_rules(self) -> impl Iterator<Item = TopicRule> {
        self.opens().topics.iter().map(|(action, below)| TopicRule {
            effect: Effect::Allow,
            action: *action,
            filter: format!("fleet/v1/{{tenant}}/+/{below}"),
        })
    }
}

/// A role: what whoever has it may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// Everything in the tenant.
    Admin,
    /// Runs the fleet day by day: devices, credentials, commands, connections.
    Operator,
    /// Brings updates to devices.
    ReleaseManager,
    /// Finds out what is wrong with a device, and changes nothing but its connection.
    Support,
    /// Sees devices and what they say.
    Viewer,
    /// Sees who did what.
    Auditor,
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
    /// Whether it stands above tenants.
    pub(crate) platform: bool,
    pub(crate) permissions: Vec<Permission>,
    /// What it says about topics, without what its permissions open.
    pub(crate) written: Vec<TopicRule>,
    pub(crate) rules: Arc<RuleSet>,
}

impl Role {
    /// Names that no role may be given, because they are those of built-in roles.
    pub const RESERVED: [&str; 8] =
        ["admin", "operator", "release-manager", "support", "viewer", "auditor", "device", "gateway"];

    /// The built-in roles that users and API keys may have.
    pub const BUILT_IN: [Self; 6] =
        [Self::Admin, Self::Operator, Self::ReleaseManager, Self::Support, Self::Viewer, Self::Auditor];

    /// The built-in role of that name that a user or an API key may have.
    pub fn built_in(name: &str) -> Option<Self> {
        Self::BUILT_IN.into_iter().find(|role| role.name() == name)
    }

    /// The role's name.
    pub fn name(&self) -> &str {
        match self {
            Self::Admin => "admin",
            Self::Operator => "operator",
            Self::ReleaseManager => "release-manager",
            Self::Support => "support",
            Self::Viewer => "viewer",
            Self::Auditor => "auditor",
            Self::Device => "device",
            Self::Custom(role) => role.id.as_str(),
        }
    }

    /// The name that lasts as long as the program, of a built-in role.
    pub(crate) fn built_in_name(&self) -> Option<&'static str> {
        Self::RESERVED.into_iter().find(|name| !matches!(self, Self::Custom(_)) && *name == self.name())
    }

    /// What it opens.
    pub fn permissions(&self) -> &[Permission] {
        use Permission as P;
        match self {
            Self::Admin => Permission::ALL,
            Self::Operator => &[
                P::DevicesRead,
                P::DevicesWrite,
                P::CredentialsManage,
                P::TelemetryRead,
                P::LogsRead,
                P::ShadowRead,
                P::ShadowWrite,
                P::CommandsSend,
                P::DeadLettersRead,
                P::ConnectionsRead,
                P::ConnectionsManage,
                P::ProvisioningManage,
            ],
            Self::ReleaseManager => &[
                P::DevicesRead,
                P::TelemetryRead,
                P::LogsRead,
                P::ShadowRead,
                P::UpdatesDeploy,
                P::UpdatesApprove,
                P::ConnectionsRead,
            ],
            Self::Support => &[
                P::DevicesRead,
                P::TelemetryRead,
                P::LogsRead,
                P::ShadowRead,
                P::DeadLettersRead,
                P::ConnectionsRead,
                P::ConnectionsManage,
            ],
            Self::Viewer => &[P::DevicesRead, P::TelemetryRead, P::LogsRead, P::ShadowRead],
            Self::Auditor => &[P::DevicesRead, P::AuditRead],
            Self::Device => &[],
            Self::Custom(role) => &role.permissions,
        }
    }

    /// The page of the console that whoever has it begins with.
    pub fn home(&self) -> Home {
        match self {
            Self::Admin => Home::Access,
            Self::Operator => Home::Alerts,
            Self::ReleaseManager => Home::Rollouts,
            Self::Auditor => Home::Audit,
            Self::Support => Home::Devices,
            Self::Viewer | Self::Device => Home::FleetHealth,
            Self::Custom(role) => Home::of(&role.permissions),
        }
    }

    fn holds(&self, permission: Permission) -> bool {
        self.permissions().contains(&permission)
    }

    /// What it says about topics itself, as it is written.
    pub fn own_rules(&self) -> &[TopicRule] {
        match self {
            Self::Admin => &ADMIN_RULES,
            Self::Device => &DEVICE_RULES,
            Self::Custom(role) => &role.written,
            _ => &[],
        }
    }

    /// What it says about topics, that of its permissions included, as it is written.
    pub fn written_rules(&self) -> Vec<TopicRule> {
        self.own_rules()
            .iter()
            .cloned()
            .chain(self.permissions().iter().flat_map(|permission| permission.topic_rules()))
            .collect()
    }

    pub(crate) fn rules(&self) -> Arc<RuleSet> {
        let place = match self {
            Self::Custom(role) => return role.rules.clone(),
            Self::Device => return DEVICE.clone(),
            built_in => Self::BUILT_IN.iter().position(|role| role == built_in),
        };
        BUILT_IN_RULES[place.expect("all others are built in")].clone()
    }
}

/// Where a user begins in the console (design §10).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Home {
    /// Access and system.
    Access,
    /// Alerts and devices.
    Alerts,
    /// Devices.
    Devices,
    /// How the fleet is.
    FleetHealth,
    /// Rollouts.
    Rollouts,
    /// Who did what.
    Audit,
}

impl Home {
    /// It as answers spell it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Access => "access",
            Self::Alerts => "alerts",
            Self::Devices => "devices",
            Self::FleetHealth => "fleet-health",
            Self::Rollouts => "rollouts",
            Self::Audit => "audit",
        }
    }

    fn of(permissions: &[Permission]) -> Self {
        let has = |permission| permissions.contains(&permission);
        match () {
            () if has(Permission::AccessManage) => Self::Access,
            () if has(Permission::UpdatesDeploy) || has(Permission::UpdatesApprove) => Self::Rollouts,
            () if has(Permission::CommandsSend) || has(Permission::DevicesWrite) => Self::Alerts,
            () if has(Permission::AuditRead) => Self::Audit,
            () if has(Permission::TelemetryRead) || has(Permission::DevicesRead) => Self::FleetHealth,
            () => Self::Devices,
        }
    }
}

static ADMIN_RULES: LazyLock<Vec<TopicRule>> = LazyLock::new(|| {
    allowed(&[(Action::All, "fleet/v1/{tenant}/#"), (Action::All, "app/{tenant}/#"), (Action::Subscribe, "$SYS/#")])
});
static DEVICE_RULES: LazyLock<Vec<TopicRule>> =
    LazyLock::new(|| allowed(&[(Action::All, "fleet/v1/{tenant}/{device}/#")]));
static DEVICE: LazyLock<Arc<RuleSet>> = LazyLock::new(|| compiled(&Role::Device));
static BUILT_IN_RULES: LazyLock<Vec<Arc<RuleSet>>> = LazyLock::new(|| Role::BUILT_IN.iter().map(compiled).collect());
/// Shared by all devices: there are many of them.
static DEVICE_POLICY: LazyLock<Arc<TopicPolicy>> = LazyLock::new(|| {
    Arc::new(TopicPolicy { grants: vec![Ruled { rules: DEVICE.clone(), extent: Extent::Everything }], ceiling: None })
});
/// Of a device whose certificate has expired.
static LATE_POLICY: LazyLock<Arc<TopicPolicy>> = LazyLock::new(|| {
    let renewal = allowed(&[
        (Action::Publish, "fleet/v1/{tenant}/{device}/certificates/renew"),
        (Action::Subscribe, "fleet/v1/{tenant}/{device}/certificates/renew/+"),
    ]);
    let rules = Arc::new(RuleSet::compile(&renewal, Reach::Platform).expect("rules written here and tested below"));
    Arc::new(TopicPolicy { grants: vec![Ruled { rules, extent: Extent::Everything }], ceiling: None })
});

/// Of who asks by a claim: `{device}` is what the client calls itself.
pub(crate) static CLAIM_RULES: LazyLock<Vec<TopicRule>> = LazyLock::new(|| {
    allowed(&[
        (Action::Publish, "fleet/v1/{tenant}/_provision/request"),
        (Action::Subscribe, "fleet/v1/{tenant}/_provision/response/{device}"),
    ])
});
static CLAIM_POLICY: LazyLock<Arc<TopicPolicy>> = LazyLock::new(|| {
    let rules = Arc::new(RuleSet::compile(&CLAIM_RULES, Reach::Platform).expect("rules written here and tested below"));
    Arc::new(TopicPolicy { grants: vec![Ruled { rules, extent: Extent::Everything }], ceiling: None })
});

fn allowed(rules: &[(Action, &str)]) -> Vec<TopicRule> {
    let rule = |(action, filter): &(Action, &str)| TopicRule {
        effect: Effect::Allow,
        action: *action,
        filter: (*filter).to_owned(),
    };
    rules.iter().map(rule).collect()
}

fn compiled(role: &Role) -> Arc<RuleSet> {
    let rules = role.written_rules();
    Arc::new(RuleSet::compile(&rules, Reach::Platform).expect("rules written here and tested below"))
}

/// Where a grant comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The role of the user itself.
    User,
    /// A binding.
    Binding(BindingId),
    /// The role of the API key.
    ApiKey(ApiKeyId),
}

/// One role that a principal has, and for which devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Grant {
    /// Where it comes from.
    pub source: Source,
    /// The role.
    pub role: Role,
    /// For which devices.
    pub extent: Extent,
}

/// All that a user or an API key was given. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Grants(Arc<Granted>);

#[derive(Debug, PartialEq, Eq, Default)]
struct Granted {
    list: Vec<Grant>,
    /// What the user of an API key may do: the key is never worth more.
    ceiling: Option<Grants>,
}

impl Grants {
    /// These.
    pub fn new(list: Vec<Grant>) -> Self {
        Self(Arc::new(Granted { list, ceiling: None }))
    }

    /// One role in the whole tenant, or none.
    pub fn of(role: Option<Role>) -> Self {
        let grant = |role| Grant { source: Source::User, role, extent: Extent::Everything };
        Self::new(role.map(grant).into_iter().collect())
    }

    /// What an API key was given, as far as its user may do that.
    #[must_use]
    pub fn within(self, ceiling: Self) -> Self {
        // An admin of the tenant may do all that can be given.
        if ceiling.is_admin() {
            return self;
        }
        Self(Arc::new(Granted { list: self.0.list.clone(), ceiling: Some(ceiling) }))
    }

    /// Each of them.
    pub fn iter(&self) -> impl Iterator<Item = &Grant> {
        self.0.list.iter()
    }

    /// What limits them, when it is an API key's.
    pub fn ceiling(&self) -> Option<&Self> {
        self.0.ceiling.as_ref()
    }

    /// Whether the role admin is among them, for the whole tenant.
    pub fn is_admin(&self) -> bool {
        self.0.ceiling.is_none() && self.iter().any(|grant| grant.role == Role::Admin && grant.extent.is_everything())
    }

    /// The devices for which `permission` is given.
    pub fn extent(&self, permission: Permission) -> Extent {
        let holding = self.iter().filter(|grant| grant.role.holds(permission));
        let own = holding.fold(Extent::NOTHING, |sum, grant| sum.or(&grant.extent));
        match self.ceiling() {
            Some(ceiling) if !own.is_nothing() => own.and(&ceiling.extent(permission)),
            _ => own,
        }
    }

    /// Whether what `permission` opens is open, for some devices at least.
    pub fn may(&self, permission: Permission) -> bool {
        let extent = self.extent(permission);
        match permission.about() {
            About::Devices => !extent.is_nothing(),
            About::Tenant => extent.is_everything(),
        }
    }

    /// A right over a device that is held once the device is as `after`, and not while it is as `before`.
    pub fn gained(&self, before: &Attributes, after: &Attributes) -> Option<&'static str> {
        let gains = |extent: &Extent| extent.contains(after) && !extent.contains(before);
        let gained = Permission::ALL.iter().find(|permission| gains(&self.extent(**permission)));
        // What roles say of topics beside their permissions is within the scope of the grant.
        let rules = |grant: &&Grant| !grant.role.own_rules().is_empty() && gains(&grant.extent);
        let has = |grant: &Grant| self.iter().any(|other| other.role == grant.role && other.extent.contains(before));
        let by_rules = || self.iter().filter(rules).any(|grant| !has(grant)).then_some("of a role's topic rules");
        gained.map(|permission| permission.name()).or_else(by_rules)
    }

    /// Whether they are about all devices, whatever they allow.
    pub fn is_unscoped(&self) -> bool {
        self.iter().all(|grant| grant.extent.is_everything()) && self.ceiling().is_none_or(Self::is_unscoped)
    }

    fn topic_policy(&self) -> Arc<TopicPolicy> {
        let ruled = |grant: &Grant| Ruled { rules: grant.role.rules(), extent: grant.extent.clone() };
        let ceiling = self.ceiling().map(Self::topic_policy);
        Arc::new(TopicPolicy { grants: self.iter().map(ruled).collect(), ceiling })
    }
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
    /// Who looks at what the principal sees, and changes nothing, instead of the principal.
    pub viewer: Option<UserId>,
    /// The proof is worth nothing from then on; `None`: until somebody ends it.
    pub valid_until: Option<DateTime<Utc>>,
    /// By which authority, when it is a certificate that has no row.
    pub vouched: Option<Vouched>,
    /// The certificate has expired: it is good for asking for the next one, and for nothing else.
    pub renew_only: bool,
}

/// What a registered authority vouches for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Vouched {
    /// Which.
    pub authority: AuthorityId,
    /// The certificate's number with it.
    pub serial: Serial,
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
        /// The devices it may act for.
        children: Children,
    },
    /// A user, by an access token, or a program by an API key of that user.
    User {
        /// The user's id.
        id: UserId,
        /// The API key, when it is one that was shown.
        key: Option<ApiKeyId>,
        /// The roles of the user or the API key; without any a user may log in and do nothing else.
        grants: Grants,
        /// Whether the user stands above tenants; an API key never does.
        platform: bool,
    },
    /// Somebody who shows the secret of a claim, to ask by it.
    Claim {
        /// The claim.
        id: ClaimId,
        /// What the client calls itself: answers are for it alone.
        asker: DeviceId,
    },
}

/// In whose name, and within which bounds, access is managed.
#[derive(Debug, Clone, Copy)]
pub struct Manager<'a> {
    /// Users, roles and API keys of this tenant.
    pub tenant: TenantKey,
    /// The tenant's name.
    pub tenant_id: &'a TenantId,
    /// Whether roles of the platform may be made and given away too.
    pub platform: bool,
    /// What the manager has: nobody gives more.
    pub grants: &'a Grants,
}

impl Manager<'_> {
    /// Whether all that `role` allows within `extent` is allowed to the manager, who may give it to others then. What only
    /// several grants of the manager cover together does not count.
    pub fn may_give(&self, role: &Role, extent: &Extent) -> bool {
        if self.platform || self.grants.is_admin() {
            // A platform role is seen, and so given, by those with platform standing only.
            return true;
        }
        let permitted = |permission: &Permission| self.grants.extent(*permission).covers(extent);
        let rules = role.written_rules();
        let mine = self.grants.topic_policy();
        role.permissions().iter().all(permitted) && rules.iter().all(|rule| mine.covers(rule, extent, self.tenant_id))
    }
}

static NO_GRANTS: LazyLock<Grants> = LazyLock::new(Grants::default);

impl Principal {
    /// What it was given; a device has nothing but its topics.
    pub fn grants(&self) -> &Grants {
        match &self.who {
            Who::Device { .. } | Who::Claim { .. } => &NO_GRANTS,
            Who::User { grants, .. } => grants,
        }
    }

    /// The role that says most about the principal: that of a device, of an API key, of a user itself; else of its first
    /// binding.
    pub fn role(&self) -> Option<&Role> {
        match &self.who {
            Who::Device { .. } => Some(&Role::Device),
            Who::User { grants, .. } => grants.0.list.first().map(|grant| &grant.role),
            Who::Claim { .. } => None,
        }
    }

    /// The devices that it may act for.
    pub fn children(&self) -> Children {
        match &self.who {
            // Who may only renew a certificate does nothing else, for nobody.
            Who::Device { children, .. } if !self.proof.renew_only => children.clone(),
            _ => Children::default(),
        }
    }

    /// The bounds within which this principal manages access, if it may at all.
    pub fn manager(&self) -> Manager<'_> {
        let above = matches!(&self.who, Who::User { platform: true, key: None, grants, .. } if grants.is_admin());
        Manager { tenant: self.tenant, tenant_id: &self.tenant_id, platform: above, grants: self.grants() }
    }

    /// Whether this principal may call what `permission` opens, for some devices at least.
    pub fn may(&self, permission: Permission) -> bool {
        self.grants().may(permission)
    }

    /// The devices for which this principal may do what `permission` opens.
    pub fn extent(&self, permission: Permission) -> Extent {
        self.grants().extent(permission)
    }

    /// The topic rules of this principal; `devices` tells which of them are in scope.
    pub fn topic_rules(&self, devices: &Arc<Directory>) -> TopicRules {
        let (policy, device) = match &self.who {
            Who::Device { id, .. } if self.proof.renew_only => (LATE_POLICY.clone(), Some(id.clone())),
            Who::Device { id, .. } => (DEVICE_POLICY.clone(), Some(id.clone())),
            Who::User { grants, .. } => (grants.topic_policy(), None),
            Who::Claim { asker, .. } => (CLAIM_POLICY.clone(), Some(asker.clone())),
        };
        TopicRules::new(policy, self.tenant_id.clone(), device, devices.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str) -> Principal {
        Principal {
            tenant: TenantKey(1),
            tenant_id: "main".parse().unwrap(),
            who: Who::Device { key: DeviceKey(7), id: id.parse().unwrap(), children: Children::default() },
            proof: Proof::default(),
        }
    }

    fn user(role: Option<Role>) -> Who {
        Who::User { id: UserId::new(), key: None, grants: Grants::of(role), platform: false }
    }

    fn rules(principal: &Principal) -> TopicRules {
        principal.topic_rules(&Arc::default())
    }

    #[test]
    fn a_device_may_use_its_own_subtree_and_nothing_else() {
        let rules = rules(&device("boiler-1"));
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
    fn a_device_whose_certificate_has_expired_may_renew_it_and_nothing_else() {
        let late = Principal { proof: Proof { renew_only: true, ..Proof::default() }, ..device("boiler-1") };
        let rules = rules(&late);
        let own = |rest: &str| format!("fleet/v1/main/boiler-1/{rest}");
        assert!(rules.may_publish(&own("certificates/renew")));
        for answers in ["certificates/renew/accepted", "certificates/renew/rejected", "certificates/renew/+"] {
            assert!(rules.may_subscribe(&own(answers)), "{answers}");
            assert!(!rules.may_publish(&own(answers)), "{answers}");
        }
        for other in ["telemetry", "status", "certificates/renew/x/y", "certificates", "#", "+/renew"] {
            assert!(!rules.may_publish(&own(other)) && !rules.may_subscribe(&own(other)), "{other}");
        }
        assert!(!rules.may_publish("fleet/v1/main/boiler-2/certificates/renew"));
    }

    #[test]
    fn who_asks_by_a_claim_may_ask_and_hear_its_own_answer() {
        let who = Who::Claim { id: ClaimId::new(), asker: "client-1".parse().unwrap() };
        let rules = Principal { who, ..device("d") }.topic_rules(&Arc::default());
        assert!(rules.may_publish("fleet/v1/main/_provision/request"));
        assert!(rules.may_subscribe("fleet/v1/main/_provision/response/client-1"));
        for foreign in [
            "fleet/v1/main/_provision/response/client-2",
            "fleet/v1/main/_provision/response/+",
            "fleet/v1/main/_provision/#",
            "fleet/v1/main/client-1/telemetry",
            "fleet/v1/other/_provision/response/client-1",
            "fleet/v1/other/_provision/request",
            "app/main/x",
            "#",
        ] {
            assert!(!rules.may_subscribe(foreign), "{foreign}");
            assert!(!rules.may_publish(foreign), "{foreign}");
        }
        assert!(!rules.may_subscribe("fleet/v1/main/_provision/request"));
        assert!(!rules.may_publish("fleet/v1/main/_provision/response/client-1"));
    }

    #[test]
    fn a_device_has_no_permission_and_a_user_without_a_role_has_none_either() {
        let nobody = Principal { who: user(None), ..device("d") };
        for permission in Permission::ALL {
            assert!(!device("d").may(*permission));
            assert!(!nobody.may(*permission));
        }
        assert!(!rules(&nobody).may_subscribe("fleet/v1/main/x/telemetry"));
    }

    #[test]
    fn an_admin_stays_in_the_tenant() {
        let admin = Principal { who: user(Some(Role::Admin)), ..device("d") };
        let rules = rules(&admin);
        assert!(rules.may_subscribe("fleet/v1/main/+/telemetry"));
        assert!(rules.may_subscribe("$SYS/#"));
        assert!(!rules.may_publish("$SYS/broker/x"));
        assert!(!rules.may_subscribe("#"));
        assert!(!rules.may_subscribe("fleet/v1/+/x/telemetry"));
    }
}
