//! Why somebody may, or may not: the decision of the policy, with the rule and the grant that decided.
//!
//! [`permission`] and [`topic`](fn@topic) go through the grants and rules as they are written, one by one. They are slow and plain on
//! purpose: the doors ask the compiled forms of [`crate::policy`], and a property test holds that both always agree. Ignorant of:
//! HTTP, MQTT.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use crate::directory::Directory;
use crate::error::Result;
use crate::filter_set::{DEVICE, FilterSet, Names, TENANT};
use crate::gateway;
use crate::id::{ApiKeyId, DeviceId, TenantKey, UserId};
use crate::policy::{About, CLAIM_RULES, Grant, Grants, Permission, Principal, Proof, Role, Source, Who};
use crate::role::Roles;
use crate::scope::{Attributes, Extent};
use crate::standing::{self, Asked, Standing};
use crate::topic;
use crate::topic_rule::{Action, Effect, TopicRule};
use crate::user;

/// The built-in role of a device that acts for others.
const GATEWAY: &str = "gateway";

/// What is asked about a topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// Sending a message to it.
    Publish,
    /// Subscribing to a filter.
    Subscribe,
    /// Being given a message that came on it.
    Receive,
}

/// A decision, and what decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether it is allowed.
    pub allowed: bool,
    /// The grant that decided; `None` when no grant says anything.
    pub by: Option<Deciding>,
    /// Why, for people; when it is not allowed, what would be needed.
    pub why: String,
}

/// What decided.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deciding {
    /// Where the role was given; `None`: a device has its role by being one.
    pub source: Option<Source>,
    /// The role by name.
    pub role: String,
    /// The topic rule, when one decided.
    pub rule: Option<TopicRule>,
}

impl Deciding {
    fn new(grant: &Grant, rule: Option<TopicRule>) -> Self {
        Self { source: Some(grant.source), role: grant.role.name().to_owned(), rule }
    }
}

/// Somebody whose rights are asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whom {
    /// A user.
    User(UserId),
    /// A user, by e-mail address.
    Email(String),
    /// An API key.
    ApiKey(ApiKeyId),
    /// A device.
    Device(DeviceId),
}

/// Somebody of the tenant with the rights of this moment, and why they would not be let in, if they would not.
pub async fn principal(
    db: &mut PgConnection,
    by: &Principal,
    whom: &Whom,
    now: DateTime<Utc>,
) -> Result<(Principal, Option<&'static str>)> {
    let (user, key) = match whom {
        Whom::Device(id) => {
            let device = crate::device::find(db, by.tenant, id).await?;
            let children = gateway::children(db, device.key).await?;
            let who = Who::Device { key: device.key, id: device.id, children };
            let principal = Principal { who, proof: Proof::default(), ..by.clone() };
            return Ok((principal, device.disabled.then_some("the device is disabled")));
        }
        Whom::User(id) => (user::find_in(db, by.tenant, *id).await?.id, None),
        Whom::Email(email) => (user::find_by_email(db, by.tenant, email).await?.id, None),
        Whom::ApiKey(id) => (crate::api_key::find(db, by.tenant, *id).await?.user, Some(*id)),
    };
    let barred = match standing::of(db, &Roles::default(), Asked { user, key, session: None }, now).await? {
        Standing::Stands(principal) => return Ok((principal, None)),
        Standing::UserDeleted => "the user exists no more",
        Standing::UserDisabled => "the user is disabled",
        Standing::KeyDeleted => "the API key exists no more",
        Standing::KeyEnded | Standing::SessionEnded => "the API key has ended, or its user has no role any more",
    };
    let who = Who::User { id: user, key, grants: Grants::default(), platform: false };
    Ok((Principal { who, proof: Proof::default(), ..by.clone() }, Some(barred)))
}

/// What is known of a device that somebody asks about; `None` when there is no such device.
pub async fn attributes(db: &mut PgConnection, tenant: TenantKey, id: &DeviceId) -> Result<Option<Attributes>> {
    match crate::device::find(db, tenant, id).await {
        Ok(device) => Ok(Some(device.attributes())),
        Err(crate::Error::NoSuchDevice(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether a principal may do what a permission opens: for a device, or for any at all.
pub fn permission(principal: &Principal, asked: Permission, device: Option<&Attributes>) -> Decision {
    let denied = |why: String| Decision { allowed: false, by: None, why };
    let Who::User { grants, .. } = &principal.who else {
        return denied("a device has its own topics and no permission".into());
    };
    let by = match find(grants, asked, device) {
        Ok(grant) => grant,
        Err(why) => return denied(why),
    };
    if let Some(ceiling) = grants.ceiling()
        && let Err(why) = find(ceiling, asked, device)
    {
        return denied(format!("the API key may, but the user who made it may not, and it is never worth more: {why}"));
    }
    let why = format!("the role {} holds {}", by.role.name(), asked.name());
    Decision { allowed: true, by: Some(Deciding::new(by, None)), why }
}

fn find<'g>(
    grants: &'g Grants,
    asked: Permission,
    device: Option<&Attributes>,
) -> std::result::Result<&'g Grant, String> {
    let holding = grants.iter().filter(|grant| grant.role.permissions().contains(&asked)).collect::<Vec<_>>();
    if holding.is_empty() {
        return Err(format!("no role holds {}: one that does is needed", asked.name()));
    }
    if asked.about() == About::Tenant {
        let whole = holding.into_iter().find(|grant| grant.extent.is_everything());
        return whole.ok_or_else(|| format!("{} is about the tenant: it is needed in the scope tenant", asked.name()));
    }
    let within = |grant: &&&Grant| match device {
        Some(device) => grant.extent.contains(device),
        None => !grant.extent.is_nothing(),
    };
    let found = holding.iter().find(within).copied();
    found.ok_or_else(|| format!("{} is held, but the device is not in its scope", asked.name()))
}

/// Whether a principal may use a topic, or a filter, in some way. `device` is the one that the topic names, if there is one.
pub fn topic(principal: &Principal, asked: Use, name: &str, device: Option<&Attributes>) -> Decision {
    let (own, device_id) = match &principal.who {
        Who::Device { id, .. } => (None, Some(id.clone())),
        Who::User { grants, .. } => (Some(grants), None),
        Who::Claim { asker, .. } => (None, Some(asker.clone())),
    };
    let question =
        Question { asked, name, names: Names { tenant: principal.tenant_id.clone(), device: device_id }, device };
    if let Some((child, _)) = principal.children().of_topic(&principal.tenant_id, name) {
        let by = Deciding { source: None, role: GATEWAY.to_owned(), rule: None };
        return Decision { allowed: true, by: Some(by), why: format!("it is the gateway of {child}") };
    }
    let Some(grants) = own else {
        let is_claim = matches!(principal.who, Who::Claim { .. });
        let rules = if is_claim { CLAIM_RULES.clone() } else { Role::Device.written_rules() };
        return question.judge(rules.into_iter().map(|rule| (None, rule, Extent::Everything)));
    };
    let decision = question.judge_grants(grants);
    match grants.ceiling() {
        Some(ceiling) if decision.allowed => {
            let above = question.judge_grants(ceiling);
            let why = format!("the API key may, but the user who made it may not: {}", above.why);
            if above.allowed { decision } else { Decision { why, ..above } }
        }
        _ => decision,
    }
}

struct Question<'a> {
    asked: Use,
    name: &'a str,
    names: Names,
    device: Option<&'a Attributes>,
}

impl Question<'_> {
    fn judge_grants(&self, grants: &Grants) -> Decision {
        self.judge(grants.iter().flat_map(|grant| {
            let rules = grant.role.written_rules().into_iter();
            rules.map(move |rule| (Some(grant), rule, grant.extent.clone()))
        }))
    }

    /// Deny wins; else what allows decides.
    fn judge<'g>(&self, rules: impl Iterator<Item = (Option<&'g Grant>, TopicRule, Extent)>) -> Decision {
        let (mut allowing, mut out_of_scope) = (None, false);
        for (grant, rule, extent) in rules.filter(|(_, rule, _)| self.is_about(rule)) {
            let by = |rule| {
                let device = Deciding { source: None, role: Role::Device.name().to_owned(), rule: None };
                grant.map_or(Deciding { rule: Some(TopicRule::clone(rule)), ..device }, |grant| {
                    Deciding::new(grant, Some(rule.clone()))
                })
            };
            if !self.is_within(&extent, rule.effect) {
                out_of_scope |= rule.effect == Effect::Allow;
            } else if rule.effect == Effect::Deny {
                let why = format!("a rule denies {}, and deny wins", rule.filter);
                return Decision { allowed: false, by: Some(by(&rule)), why };
            } else if allowing.is_none() {
                allowing = Some(by(&rule));
            }
        }
        match allowing {
            Some(by) => {
                let why = by.rule.as_ref().map(|rule| format!("a rule allows {}", rule.filter)).unwrap_or_default();
                Decision { allowed: true, by: Some(by), why }
            }
            None if out_of_scope => Decision {
                allowed: false,
                by: None,
                why: "it is allowed, but for devices in another scope only".into(),
            },
            None => {
                let verb = if self.asked == Use::Publish { "publish" } else { "subscribe" };
                let why = format!("no rule allows it: one is needed that allows {verb} on {}", self.name);
                Decision { allowed: false, by: None, why }
            }
        }
    }

    /// Whether a rule says anything about the topic.
    fn is_about(&self, rule: &TopicRule) -> bool {
        let other = if self.asked == Use::Publish { Action::Subscribe } else { Action::Publish };
        if rule.action == other {
            return false;
        }
        let Some(filter) = filled(&rule.filter, &self.names) else { return false };
        match self.asked {
            Use::Publish | Use::Receive => topic::matches(&filter, self.name),
            Use::Subscribe => {
                let mut one = FilterSet::default();
                one.insert(&filter);
                one.covers(self.name, &self.names)
            }
        }
    }

    /// Whether what is asked is in an extent. A filter over several devices may be subscribed to for the sake of some of them; to
    /// deny it, all must be meant.
    fn is_within(&self, extent: &Extent, effect: Effect) -> bool {
        if extent.is_everything() {
            return true;
        }
        let Some(below) = self.name.strip_prefix(topic::ROOT) else {
            return self.asked != Use::Subscribe || effect == Effect::Allow;
        };
        let (tenant, device) = below.split_once('/').unwrap_or((below, ""));
        let device = device.split('/').next().unwrap_or_default();
        if self.asked == Use::Subscribe {
            if effect == Effect::Deny {
                return false;
            }
            if device == "+" || device == "#" {
                return true;
            }
        }
        tenant == self.names.tenant.as_str() && self.device.is_some_and(|device| extent.contains(device))
    }
}

/// The filter with the variables filled in; `None` when one of them has no value.
fn filled(filter: &str, names: &Names) -> Option<String> {
    let levels = filter.split('/').map(|level| match level {
        TENANT => Some(names.tenant.as_str()),
        DEVICE => names.device.as_ref().map(DeviceId::as_str),
        level => Some(level),
    });
    Some(levels.collect::<Option<Vec<_>>>()?.join("/"))
}

/// The device that a topic, or a filter, of a tenant names.
pub fn device_of(principal: &Principal, name: &str) -> Option<DeviceId> {
    let below = name.strip_prefix(topic::ROOT)?.strip_prefix(principal.tenant_id.as_str())?.strip_prefix('/')?;
    below.split('/').next()?.parse().ok()
}

/// The same decision by the compiled policy, which is the one that counts.
pub fn compiled(principal: &Principal, asked: Use, name: &str, devices: &Arc<Directory>) -> bool {
    let rules = principal.topic_rules(devices);
    if principal.children().of_topic(&principal.tenant_id, name).is_some() {
        return true;
    }
    match asked {
        Use::Publish => rules.may_publish(name),
        Use::Subscribe => rules.may_subscribe(name),
        Use::Receive => rules.may_receive(name),
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::{btree_map, vec};
    use proptest::prelude::*;
    use proptest::sample::{select, subsequence};

    use super::*;
    use crate::policy::CustomRole;
    use crate::scope::tests::{attributes, extent};
    use crate::topic_rule::{Reach, RuleSet};

    fn tenant() -> crate::id::TenantId {
        "t".parse().unwrap()
    }

    fn filter() -> impl Strategy<Value = String> {
        let device = select(vec!["+", "a", "b", "{device}", "_p"]);
        let below = select(vec!["telemetry", "+", "#", "commands/+/request", "x"]);
        prop_oneof![
            4 => (device, below.clone()).prop_map(|(device, below)| format!("fleet/v1/{{tenant}}/{device}/{below}")),
            1 => Just("fleet/v1/{tenant}/#".to_owned()),
            1 => below.prop_map(|below| format!("app/{{tenant}}/{below}")),
        ]
    }

    fn rule() -> impl Strategy<Value = TopicRule> {
        let effect = select(vec![Effect::Allow, Effect::Allow, Effect::Deny]);
        (effect, select(vec![Action::Publish, Action::Subscribe, Action::All]), filter())
            .prop_map(|(effect, action, filter)| TopicRule { effect, action, filter })
    }

    fn role() -> impl Strategy<Value = Role> {
        let custom = (subsequence(Permission::ALL, 0..4), vec(rule(), 0..4)).prop_map(|(permissions, written)| {
            let opened = permissions.iter().flat_map(|permission| permission.topic_rules());
            let all = written.iter().cloned().chain(opened).collect::<Vec<_>>();
            let rules = Arc::new(RuleSet::compile(&all, Reach::Tenant(&tenant())).unwrap());
            let id = "custom".parse().unwrap();
            Role::Custom(Arc::new(CustomRole { id, version: 1, platform: false, permissions, written, rules }))
        });
        prop_oneof![2 => select(Role::BUILT_IN.to_vec()), 5 => custom]
    }

    fn grants() -> impl Strategy<Value = Grants> {
        vec((role(), extent()), 0..4).prop_map(|list| {
            Grants::new(list.into_iter().map(|(role, extent)| Grant { source: Source::User, role, extent }).collect())
        })
    }

    fn principal() -> impl Strategy<Value = Principal> {
        (grants(), proptest::option::of(grants())).prop_map(|(grants, ceiling)| {
            let (key, grants) = match ceiling {
                Some(ceiling) => (Some(ApiKeyId::new()), grants.within(ceiling)),
                None => (None, grants),
            };
            let who = Who::User { id: UserId::new(), key, grants, platform: false };
            Principal { tenant: TenantKey(1), tenant_id: tenant(), who, proof: Proof::default() }
        })
    }

    fn name() -> impl Strategy<Value = String> {
        select(vec![
            "fleet/v1/t/a/telemetry",
            "fleet/v1/t/b/telemetry",
            "fleet/v1/t/nobody/telemetry",
            "fleet/v1/t/a/x",
            "fleet/v1/t/a/commands/1/request",
            "fleet/v1/u/a/telemetry",
            "fleet/v1/t/_p/x",
            "app/t/x",
            "app/t/telemetry",
            "app/u/x",
            "$SYS/x",
            "fleet/v1/t",
        ])
        .prop_map(str::to_owned)
    }

    fn asked_filter() -> impl Strategy<Value = String> {
        let wide = select(vec![
            "fleet/v1/t/+/telemetry",
            "fleet/v1/t/#",
            "fleet/v1/+/a/telemetry",
            "#",
            "fleet/v1/t/a/#",
            "fleet/v1/t/b/+",
            "app/t/#",
            "fleet/v1/t/+/commands/+/request",
            "fleet/v1/t/nobody/#",
        ]);
        prop_oneof![name(), wide.prop_map(str::to_owned)]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]

        #[test]
        fn the_compiled_policy_decides_as_the_written_one(
            who in principal(), name in name(), filter in asked_filter(),
            fleet in btree_map(select(vec!["a".to_owned(), "b".to_owned()]), attributes(), 0..3),
        ) {
            let devices = Arc::new(Directory::of(&tenant(), fleet.clone()));
            let known = |name: &str| device_of(&who, name).and_then(|id| fleet.get(id.as_str()));
            for (asked, name) in [(Use::Publish, &name), (Use::Receive, &name), (Use::Subscribe, &filter)] {
                let decision = topic(&who, asked, name, known(name));
                prop_assert_eq!(decision.allowed, compiled(&who, asked, name, &devices), "{:?} {}: {:?}", asked, name, decision);
            }
            for asked in Permission::ALL {
                let anywhere = permission(&who, *asked, None).allowed;
                prop_assert!(!who.may(*asked) || anywhere, "{}", asked.name());
                for device in fleet.values() {
                    let here = permission(&who, *asked, Some(device)).allowed;
                    let compiled = match asked.about() {
                        About::Devices => who.extent(*asked).contains(device),
                        About::Tenant => who.may(*asked),
                    };
                    prop_assert_eq!(here, compiled, "{}", asked.name());
                }
            }
        }

        #[test]
        fn a_guard_lets_through_what_may_be_received_and_nothing_else(
            who in principal(), filter in asked_filter(), name in name(),
            fleet in btree_map(select(vec!["a".to_owned(), "b".to_owned()]), attributes(), 0..3),
        ) {
            let devices = Arc::new(Directory::of(&tenant(), fleet));
            let rules = who.topic_rules(&devices);
            if !rules.may_subscribe(&filter) || !topic::matches(&filter, &name) {
                return Ok(());
            }
            let passes = rules.delivery_guard(&filter).is_none_or(|guard| guard.allows(&name));
            prop_assert_eq!(passes, rules.may_receive(&name));
        }

        #[test]
        fn what_is_given_away_is_never_more_than_the_giver_has(
            who in principal(), given in role(), within in extent(), name in name(),
            fleet in btree_map(select(vec!["a".to_owned(), "b".to_owned()]), attributes(), 0..3),
        ) {
            if !who.manager().may_give(&given, &within) {
                return Ok(());
            }
            let devices = Arc::new(Directory::of(&tenant(), fleet.clone()));
            let grant = Grant { source: Source::User, role: given, extent: within };
            let other = Who::User { id: UserId::new(), key: None, grants: Grants::new(vec![grant]), platform: false };
            let other = Principal { who: other, ..who.clone() };
            for asked in [Use::Publish, Use::Receive] {
                let theirs = compiled(&other, asked, &name, &devices);
                prop_assert!(!theirs || compiled(&who, asked, &name, &devices), "{:?} {}", asked, name);
            }
            for asked in Permission::ALL {
                for device in fleet.values() {
                    let theirs = other.extent(*asked).contains(device);
                    prop_assert!(!theirs || who.extent(*asked).contains(device), "{}", asked.name());
                }
            }
        }
    }

    #[test]
    fn a_decision_names_the_rule_and_the_grant() {
        let grant = Grant { source: Source::User, role: Role::Viewer, extent: Extent::Everything };
        let who = Who::User { id: UserId::new(), key: None, grants: Grants::new(vec![grant]), platform: false };
        let who = Principal { tenant: TenantKey(1), tenant_id: tenant(), who, proof: Proof::default() };
        let yes = topic(&who, Use::Subscribe, "fleet/v1/t/+/telemetry", None);
        let by = yes.by.expect("a rule decided");
        assert_eq!((yes.allowed, by.role.as_str()), (true, "viewer"));
        assert_eq!(by.rule.unwrap().filter, "fleet/v1/{tenant}/+/telemetry");
        let no = topic(&who, Use::Publish, "fleet/v1/t/a/commands/1/request", None);
        assert!(!no.allowed && no.why.contains("allows publish on"), "{no:?}");
        let no = permission(&who, Permission::AccessManage, None);
        assert!(!no.allowed && no.why.contains("access:manage"), "{no:?}");
    }
}
