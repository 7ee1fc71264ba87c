//! Topic rules: what a role says about topics, and the compiled form the MQTT door asks.
//!
//! [`TopicRule`]s are what people write; [`RuleSet::compile`] checks them and makes the form that is shared by every
//! connection of a role; [`TopicRules`] are those of all roles of one principal, each within its scope, with its names. Holds: nothing is allowed that no rule
//! allows, and a deny rule wins over any allow rule. A tenant's rules reach the tenant's topics only, which is checked
//! when they are compiled, so both when a role is written and when it is used. Ignorant of: who has which role.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::directory::Directory;
use crate::filter_set::{DEVICE, FilterSet, Names, TENANT};
use crate::id::{DeviceId, TenantId};
use crate::scope::Extent;
use crate::topic;

/// Longest filter of a rule, in bytes.
pub const MAX_FILTER_BYTES: usize = 1024;

/// Whether a rule grants or refuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Effect {
    /// Grants.
    Allow,
    /// Refuses; wins over any grant.
    Deny,
}

/// What a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Sending to a topic.
    Publish,
    /// Receiving what matches a filter.
    Subscribe,
    /// Both.
    All,
}

/// One rule of a role, as it is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TopicRule {
    /// Whether it grants or refuses.
    pub effect: Effect,
    /// What it is about.
    pub action: Action,
    /// The topics: an MQTT filter in which the levels `{tenant}` and `{device}` stand for names.
    pub filter: String,
}

/// Which topics rules may name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach<'a> {
    /// Those of this tenant: `fleet/v1/{tenant}/…` and `app/{tenant}/…`.
    Tenant(&'a TenantId),
    /// All of them, `$SYS/#` included.
    Platform,
}

/// Which rule was refused, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("topic_rules[{index}] {filter:?}: {why}")]
pub struct BadRule {
    /// Its place in the list, from 0.
    pub index: usize,
    /// Its filter, shortened.
    pub filter: String,
    /// What was expected.
    pub why: &'static str,
}

impl TopicRule {
    fn check(&self, reach: Reach<'_>) -> Result<(), &'static str> {
        if self.filter.len() > MAX_FILTER_BYTES {
            return Err("the filter is too long: expected at most 1024 bytes");
        }
        if self.filter.starts_with("$share") {
            return Err("expected the filter behind $share/{group}/: a rule holds for shared subscriptions too");
        }
        if !topic::is_valid_filter(&self.filter) {
            return Err("expected an MQTT filter: + and # stand alone in their level, # only at the end");
        }
        if self.filter.split('/').any(|level| level.contains(['{', '}']) && level != TENANT && level != DEVICE) {
            return Err("expected {tenant} or {device}, alone in its level");
        }
        match reach {
            Reach::Tenant(tenant) if !is_of_tenant(&self.filter, tenant) => {
                Err("reaches beyond the tenant: expected fleet/v1/{tenant}/… or app/{tenant}/…")
            }
            Reach::Tenant(_) | Reach::Platform => Ok(()),
        }
    }
}

/// Whether the filter matches the tenant's topics only. A wildcard or `{device}` in the tenant's place would not do.
fn is_of_tenant(filter: &str, tenant: &TenantId) -> bool {
    let below = filter.strip_prefix(topic::ROOT).or_else(|| filter.strip_prefix(topic::APP_ROOT));
    let level = below.and_then(|rest| rest.split_once('/')).map(|(level, _)| level);
    level.is_some_and(|level| level == TENANT || level == tenant.as_str())
}

/// The rules of a role, checked and compiled; the same for everyone who has the role.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct RuleSet {
    allow_publish: FilterSet,
    deny_publish: FilterSet,
    allow_subscribe: FilterSet,
    deny_subscribe: FilterSet,
}

impl RuleSet {
    /// Compiles the rules, unless one of them is no rule or reaches too far.
    pub fn compile(rules: &[TopicRule], reach: Reach<'_>) -> Result<Self, BadRule> {
        let mut set = Self::default();
        for (index, rule) in rules.iter().enumerate() {
            let refused = |why| BadRule { index, filter: rule.filter.chars().take(80).collect(), why };
            rule.check(reach).map_err(refused)?;
            set.insert(rule);
        }
        Ok(set)
    }

    fn insert(&mut self, rule: &TopicRule) {
        let (publish, subscribe) = match rule.effect {
            Effect::Allow => (&mut self.allow_publish, &mut self.allow_subscribe),
            Effect::Deny => (&mut self.deny_publish, &mut self.deny_subscribe),
        };
        if rule.action != Action::Subscribe {
            publish.insert(&rule.filter);
        }
        if rule.action != Action::Publish {
            subscribe.insert(&rule.filter);
        }
    }
}

/// The rules of one role that a principal has, and the devices they hold for.
#[derive(Debug)]
pub(crate) struct Ruled {
    pub(crate) rules: Arc<RuleSet>,
    pub(crate) extent: Extent,
}

/// The rules of all roles that a principal has.
#[derive(Debug)]
pub(crate) struct TopicPolicy {
    pub(crate) grants: Vec<Ruled>,
    /// What must allow it too.
    pub(crate) ceiling: Option<Arc<TopicPolicy>>,
}

/// A topic, or a filter, and what is needed to judge it.
struct Asked<'a> {
    topic: &'a str,
    names: &'a Names,
    devices: &'a Directory,
}

impl Asked<'_> {
    fn is_within(&self, extent: &Extent) -> bool {
        self.devices.is_within(extent, &self.names.tenant, self.topic)
    }
}

impl TopicPolicy {
    fn may_publish(&self, asked: &Asked<'_>) -> bool {
        self.allows(asked, |rules| (&rules.allow_publish, &rules.deny_publish))
            && self.ceiling.as_ref().is_none_or(|ceiling| ceiling.may_publish(asked))
    }

    fn may_receive(&self, asked: &Asked<'_>) -> bool {
        self.allows(asked, |rules| (&rules.allow_subscribe, &rules.deny_subscribe))
            && self.ceiling.as_ref().is_none_or(|ceiling| ceiling.may_receive(asked))
    }

    /// Some role whose scope the device is in allows it, and none denies it. Which of a role's filters are asked, `of` says.
    fn allows(&self, asked: &Asked<'_>, of: fn(&RuleSet) -> (&FilterSet, &FilterSet)) -> bool {
        let Asked { topic, names, .. } = asked;
        let mut allowed = false;
        for Ruled { rules, extent } in &self.grants {
            let (allow, deny) = of(rules);
            if !allowed && allow.matches(topic, names) && asked.is_within(extent) {
                allowed = true;
            }
            if deny.matches(topic, names) && asked.is_within(extent) {
                return false;
            }
        }
        allowed
    }

    fn may_subscribe(&self, asked: &Asked<'_>) -> bool {
        let Asked { topic, names, .. } = asked;
        let mut allowed = false;
        for Ruled { rules, extent } in &self.grants {
            allowed |= rules.allow_subscribe.covers(topic, names) && Self::reaches(asked, extent);
            if extent.is_everything() && rules.deny_subscribe.covers(topic, names) {
                return false;
            }
        }
        allowed && self.ceiling.as_ref().is_none_or(|ceiling| ceiling.may_subscribe(asked))
    }

    /// Whether a filter can bring anything from within an extent: one that names a device, only if that is in it.
    fn reaches(asked: &Asked<'_>, extent: &Extent) -> bool {
        let Some(below) = asked.topic.strip_prefix(topic::ROOT) else { return true };
        matches!(below.split('/').nth(1), Some("+" | "#")) || asked.is_within(extent)
    }

    /// What must be asked of each message of a subscription.
    fn watch(&self, asked: &Asked<'_>) -> Watch {
        let Asked { topic, names, .. } = asked;
        let whole = |ruled: &Ruled| ruled.extent.is_everything() && ruled.rules.allow_subscribe.covers(topic, names);
        let own = if !self.grants.iter().any(whole) {
            Watch::Everything
        } else if self.grants.iter().any(|ruled| ruled.rules.deny_subscribe.overlaps(topic, names)) {
            Watch::Denials
        } else {
            Watch::Nothing
        };
        own.max(self.ceiling.as_ref().map_or(Watch::Nothing, |ceiling| ceiling.watch(asked)))
    }

    fn is_unscoped(&self) -> bool {
        self.grants.iter().all(|ruled| ruled.extent.is_everything())
            && self.ceiling.as_ref().is_none_or(|ceiling| ceiling.is_unscoped())
    }

    fn denies_receiving(&self, asked: &Asked<'_>) -> bool {
        let denies = |ruled: &Ruled| {
            ruled.rules.deny_subscribe.matches(asked.topic, asked.names) && asked.is_within(&ruled.extent)
        };
        self.grants.iter().any(denies) || self.ceiling.as_ref().is_some_and(|ceiling| ceiling.denies_receiving(asked))
    }

    /// Whether whoever has these may give away what a rule allows within an extent.
    pub(crate) fn covers(&self, rule: &TopicRule, extent: &Extent, tenant: &TenantId) -> bool {
        if rule.effect == Effect::Deny {
            return true;
        }
        let names = Names { tenant: tenant.clone(), device: None };
        let levels = rule.filter.split('/').map(|level| match level {
            TENANT => tenant.as_str(),
            DEVICE => "+",
            level => level,
        });
        let filter = levels.collect::<Vec<_>>().join("/");
        let covers = |of: fn(&RuleSet) -> (&FilterSet, &FilterSet)| {
            let within = |ruled: &Ruled| ruled.extent.covers(extent) && of(&ruled.rules).0.covers(&filter, &names);
            self.grants.iter().any(within)
                && !self.grants.iter().any(|ruled| of(&ruled.rules).1.overlaps(&filter, &names))
        };
        let publishes = || covers(|rules| (&rules.allow_publish, &rules.deny_publish));
        let subscribes = || covers(|rules| (&rules.allow_subscribe, &rules.deny_subscribe));
        (rule.action == Action::Subscribe || publishes())
            && (rule.action == Action::Publish || subscribes())
            && self.ceiling.as_ref().is_none_or(|ceiling| ceiling.covers(rule, extent, tenant))
    }
}

/// The topic rules of one principal. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TopicRules {
    policy: Arc<TopicPolicy>,
    names: Arc<Names>,
    devices: Arc<Directory>,
}

impl TopicRules {
    /// The rules for who bears these names; without a device, rules with `{device}` say nothing.
    pub(crate) fn new(
        policy: Arc<TopicPolicy>,
        tenant: TenantId,
        device: Option<DeviceId>,
        devices: Arc<Directory>,
    ) -> Self {
        Self { policy, names: Arc::new(Names { tenant, device }), devices }
    }

    fn asked<'a>(&'a self, topic: &'a str) -> Asked<'a> {
        Asked { topic, names: &self.names, devices: &self.devices }
    }

    /// Whether the principal may publish to the topic `name`.
    pub fn may_publish(&self, name: &str) -> bool {
        self.policy.may_publish(&self.asked(name))
    }

    /// Whether the principal may subscribe to `filter` (without `$share/{group}/`): some allow rule covers every topic
    /// the filter can match, and no deny rule covers them all. A deny rule that covers some of them does not refuse the
    /// subscription, nor does a scope that only some of the devices are in; [`TopicRules::delivery_guard`] then keeps those
    /// messages back. A filter that names a device out of scope is refused.
    pub fn may_subscribe(&self, filter: &str) -> bool {
        self.policy.may_subscribe(&self.asked(filter))
    }

    /// Whether the principal may receive a message on this topic: one that has waited may have outlived the right to it.
    pub fn may_receive(&self, name: &str) -> bool {
        self.policy.may_receive(&self.asked(name))
    }

    /// Whether what was decided once holds as long as the rules do: no device is asked about.
    pub fn is_unscoped(&self) -> bool {
        self.policy.is_unscoped()
    }

    /// What stands between a subscription to `filter` (without `$share/{group}/`) and its messages: nothing, unless a
    /// deny rule overlaps with the filter, or it is allowed for some devices only. To be asked once for each subscription.
    pub fn delivery_guard(&self, filter: &str) -> Option<Guard> {
        let watch = self.policy.watch(&self.asked(filter));
        (watch != Watch::Nothing).then(|| Guard { rules: self.clone(), watch })
    }
}

/// What a guard has to ask of each message; each asks more than the one before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Watch {
    Nothing,
    /// Whether a rule denies it.
    Denials,
    /// Whether a rule allows it at all.
    Everything,
}

/// Keeps back what a deny rule or a scope takes out of a subscription. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Guard {
    rules: TopicRules,
    watch: Watch,
}

impl Guard {
    /// Whether a message on `topic`, which the filter of the subscription matches, may be delivered.
    pub fn allows(&self, topic: &str) -> bool {
        let asked = self.rules.asked(topic);
        match self.watch {
            Watch::Nothing => true,
            Watch::Denials => !self.rules.policy.denies_receiving(&asked),
            Watch::Everything => self.rules.policy.may_receive(&asked),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::hint::black_box;
    use std::time::Instant;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

    use super::*;
    use crate::filter_set::tests::{every_topic, filled, filter, names, pattern};
    use crate::scope::{Attributes, Scope};

    fn rule(effect: Effect, action: Action, filter: impl Into<String>) -> TopicRule {
        TopicRule { effect, action, filter: filter.into() }
    }

    fn compiled(rules: &[TopicRule], names: Names) -> TopicRules {
        let rules = Arc::new(RuleSet::compile(rules, Reach::Platform).unwrap());
        let policy = TopicPolicy { grants: vec![Ruled { rules, extent: Extent::Everything }], ceiling: None };
        TopicRules::new(Arc::new(policy), names.tenant, names.device, Arc::default())
    }

    fn any_rule() -> impl Strategy<Value = TopicRule> {
        let effect = select(vec![Effect::Allow, Effect::Deny]);
        let action = select(vec![Action::Publish, Action::Subscribe, Action::All]);
        (effect, action, pattern()).prop_map(|(effect, action, filter)| rule(effect, action, filter))
    }

    /// The filters of the rules of one effect that are about `action`.
    fn filters(rules: &[TopicRule], effect: Effect, action: Action, names: &Names) -> Vec<String> {
        let about = |rule: &&TopicRule| rule.effect == effect && (rule.action == action || rule.action == Action::All);
        rules.iter().filter(about).filter_map(|rule| filled(&rule.filter, names)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn the_compiled_rules_decide_as_the_written_ones(
            rules in vec(any_rule(), 0..8), asked in filter(), device: bool,
        ) {
            let names = names(device);
            let by_rule = |effect, action| filters(&rules, effect, action, &names);
            let one_matches = |filters: &[String], topic: &str| filters.iter().any(|f| topic::matches(f, topic));
            let compiled = compiled(&rules, names.clone());

            let (allow, deny) = (by_rule(Effect::Allow, Action::Publish), by_rule(Effect::Deny, Action::Publish));
            for topic in every_topic() {
                let expected = one_matches(&allow, &topic) && !one_matches(&deny, &topic);
                prop_assert_eq!(compiled.may_publish(&topic), expected, "{}", topic);
            }

            let (allow, deny) = (by_rule(Effect::Allow, Action::Subscribe), by_rule(Effect::Deny, Action::Subscribe));
            let wanted: Vec<_> = every_topic().into_iter().filter(|topic| topic::matches(&asked, topic)).collect();
            let covered = |by: &[String]| by.iter().any(|f| wanted.iter().all(|topic| topic::matches(f, topic)));
            prop_assert_eq!(compiled.may_subscribe(&asked), covered(&allow) && !covered(&deny));

            let denied = wanted.iter().filter(|topic| one_matches(&deny, topic)).count();
            let guard = compiled.delivery_guard(&asked);
            prop_assert_eq!(guard.is_some(), denied > 0 || !covered(&allow));
            if let Some(guard) = guard {
                for topic in &wanted {
                    let expected = one_matches(&allow, topic) && !one_matches(&deny, topic);
                    prop_assert_eq!(guard.allows(topic), expected, "{}", topic);
                }
            }
        }
    }

    #[test]
    fn a_deny_rule_wins_where_it_applies() {
        let rules = [rule(Effect::Allow, Action::All, "#"), rule(Effect::Deny, Action::All, "a/secret")];
        let rules = compiled(&rules, names(false));
        assert!(rules.may_publish("a/open") && !rules.may_publish("a/secret"));
        assert!(!rules.may_subscribe("a/secret"), "nothing of it would ever be delivered");
        assert!(rules.may_subscribe("a/+"));
        let guard = rules.delivery_guard("a/+").expect("one of its topics is denied");
        assert!(guard.allows("a/open") && !guard.allows("a/secret"));
        assert!(rules.delivery_guard("b/+").is_none());
        assert!(!rules.may_subscribe("$SYS/#"), "a leading wildcard does not match it");
    }

    fn refusal(filter: &str, reach: Reach<'_>) -> Option<&'static str> {
        RuleSet::compile(&[rule(Effect::Allow, Action::All, filter)], reach).err().map(|refused| refused.why)
    }

    #[test]
    fn a_tenants_rule_reaches_the_tenants_topics_only() {
        let main = "main".parse().unwrap();
        let tenant = Reach::Tenant(&main);
        for fine in [
            "fleet/v1/{tenant}/#",
            "fleet/v1/main/+/telemetry",
            "fleet/v1/{tenant}/{device}/#",
            "app/{tenant}/#",
            "app/main/a b/+",
            "app/{tenant}/",
        ] {
            assert_eq!(refusal(fine, tenant), None, "{fine}");
        }
        for beyond in [
            "#",
            "+/#",
            "fleet/#",
            "fleet/v1/#",
            "fleet/v1/+/#",
            "fleet/v1/{device}/#",
            "fleet/v1/other/#",
            "fleet/v1/mai/#",
            "fleet/v1/mainly/#",
            "fleet/v1//main/#",
            "fleet/+/{tenant}/#",
            "+/v1/{tenant}/#",
            "app/+/x",
            "app/#",
            "app/{device}/x",
            "application/{tenant}/x",
            "/app/{tenant}/x",
            "$SYS/#",
            "$SYS/broker/{tenant}/#",
            "test/nosubscribe",
        ] {
            let why = refusal(beyond, tenant).unwrap_or_else(|| panic!("{beyond} was taken"));
            assert!(why.contains("beyond the tenant"), "{beyond}: {why}");
            assert_eq!(refusal(beyond, Reach::Platform), None, "{beyond}");
        }
    }

    #[test]
    fn what_is_no_rule_is_refused_for_everybody() {
        let long = format!("app/{{tenant}}/{}", "x".repeat(MAX_FILTER_BYTES));
        for (filter, said) in [
            ("", "MQTT filter"),
            ("a/#/b", "MQTT filter"),
            ("a+", "MQTT filter"),
            ("$share/g/app/{tenant}/x", "$share"),
            ("app/{tenant}s/x", "alone in its level"),
            ("app/{tenant}/{user}", "alone in its level"),
            ("app/{tenant}/{device", "alone in its level"),
            (&long, "too long"),
        ] {
            let why = refusal(filter, Reach::Platform).unwrap_or_else(|| panic!("{filter} was taken"));
            assert!(why.contains(said), "{filter}: {why}");
        }
        let rules = [rule(Effect::Allow, Action::All, "a"), rule(Effect::Deny, Action::All, "b#")];
        let refused = RuleSet::compile(&rules, Reach::Platform).unwrap_err();
        assert!(refused.to_string().starts_with("topic_rules[1] \"b#\": expected"), "{refused}");
    }

    #[test]
    fn a_rule_about_a_device_says_nothing_about_who_is_none() {
        let rules = [
            rule(Effect::Allow, Action::All, "fleet/v1/{tenant}/{device}/#"),
            rule(Effect::Allow, Action::All, "app/{tenant}/#"),
        ];
        let user = compiled(&rules, names(false));
        for topic in ["fleet/v1/a/b/x", "fleet/v1/a/{device}/x", "fleet/v1/a//x"] {
            assert!(!user.may_publish(topic), "{topic}");
        }
        assert!(user.may_publish("app/a/x"));
        assert!(compiled(&rules, names(true)).may_publish("fleet/v1/a/b/x"));
    }

    #[test]
    fn rules_are_written_as_json() {
        let json = r#"{"effect":"deny","action":"subscribe","filter":"app/{tenant}/x"}"#;
        let read: TopicRule = serde_json::from_str(json).unwrap();
        assert_eq!(read, rule(Effect::Deny, Action::Subscribe, "app/{tenant}/x"));
        assert_eq!(serde_json::to_string(&read).unwrap(), json);
        for wrong in [
            r#"{"effect":"maybe","action":"all","filter":"a"}"#,
            r#"{"effect":"deny","action":"read","filter":"a"}"#,
            r#"{"effect":"deny","action":"all"}"#,
            r#"{"effect":"deny","action":"all","filter":"a","qos":1}"#,
        ] {
            assert!(serde_json::from_str::<TopicRule>(wrong).is_err(), "{wrong}");
        }
    }

    /// Run by hand: `cargo nextest run -p fleet-core --run-ignored only --no-capture a_thousand_rules`.
    #[test]
    #[ignore = "prints what a check costs"]
    fn a_thousand_rules() {
        let rules: Vec<_> = (0..1000)
            .map(|n| match n % 4 {
                0 => rule(Effect::Allow, Action::All, format!("app/{{tenant}}/site-{n}/+/state")),
                1 => rule(Effect::Allow, Action::Publish, format!("app/{{tenant}}/line-{n}/#")),
                2 => rule(Effect::Deny, Action::All, format!("app/{{tenant}}/+/pump-{n}/secret")),
                _ => rule(Effect::Allow, Action::Subscribe, format!("fleet/v1/{{tenant}}/pump-{n}/telemetry")),
            })
            .collect();
        let rules = compiled(&rules, names(false));
        let guard = rules.delivery_guard("app/a/site-4/#").expect("some of it is denied");
        let ns = |check: &dyn Fn() -> bool| {
            let began = Instant::now();
            for _ in 0..100_000 {
                black_box(check());
            }
            began.elapsed().as_nanos() / 100_000
        };
        println!("may_publish: {} ns", ns(&|| rules.may_publish(black_box("app/a/line-501/belt/speed"))));
        println!("may_subscribe: {} ns", ns(&|| rules.may_subscribe(black_box("app/a/site-4/x/state"))));
        println!("guard: {} ns", ns(&|| guard.allows(black_box("app/a/site-4/pump-1/state"))));

        // The same rules within a group, in a tenant of 10,000 devices.
        let attributes = |group: &str| Attributes { group: Some(group.parse().unwrap()), ..Attributes::default() };
        let fleet =
            (0..10_000).map(|n| (format!("pump-{n}"), attributes(if n % 2 == 0 { "site/a" } else { "site/b" })));
        let devices = Arc::new(Directory::of(&names(false).tenant, fleet));
        let scope = Scope::Group { group: "site".parse().unwrap() };
        let policy = |rules: &TopicRules| {
            let rules = rules.policy.grants[0].rules.clone();
            Arc::new(TopicPolicy { grants: vec![Ruled { rules, extent: scope.extent() }], ceiling: None })
        };
        let scoped = TopicRules { policy: policy(&rules), devices, ..rules };
        let guard = scoped.delivery_guard("fleet/v1/a/pump-3/telemetry").expect("it is scoped");
        println!("guard of a scope: {} ns", ns(&|| guard.allows(black_box("fleet/v1/a/pump-3/telemetry"))));
    }
}
