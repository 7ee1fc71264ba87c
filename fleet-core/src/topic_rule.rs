//! Topic rules: what a role says about topics, and the compiled form the MQTT door asks.
//!
//! [`TopicRule`]s are what people write; [`RuleSet::compile`] checks them and makes the form that is shared by every
//! connection of a role; [`TopicRules`] is that with the names of one principal. Holds: nothing is allowed that no rule
//! allows, and a deny rule wins over any allow rule. A tenant's rules reach the tenant's topics only, which is checked
//! when they are compiled, so both when a role is written and when it is used. Ignorant of: who has which role.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::filter_set::{DEVICE, FilterSet, Names, TENANT};
use crate::id::{DeviceId, TenantId};
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

/// The topic rules of one principal. Cheap to clone.
#[derive(Debug, Clone)]
pub struct TopicRules {
    rules: Arc<RuleSet>,
    names: Arc<Names>,
}

impl TopicRules {
    /// The rules for who bears these names; without a device, rules with `{device}` say nothing.
    pub(crate) fn new(rules: Arc<RuleSet>, tenant: TenantId, device: Option<DeviceId>) -> Self {
        Self { rules, names: Arc::new(Names { tenant, device }) }
    }

    /// Whether the principal may publish to the topic `name`.
    pub fn may_publish(&self, name: &str) -> bool {
        self.rules.allow_publish.matches(name, &self.names) && !self.rules.deny_publish.matches(name, &self.names)
    }

    /// Whether the principal may subscribe to `filter` (without `$share/{group}/`): some allow rule covers every topic
    /// the filter can match, and no deny rule covers them all. A deny rule that covers some of them does not refuse the
    /// subscription; [`TopicRules::delivery_guard`] then keeps those messages back.
    pub fn may_subscribe(&self, filter: &str) -> bool {
        self.rules.allow_subscribe.covers(filter, &self.names) && !self.rules.deny_subscribe.covers(filter, &self.names)
    }

    /// Whether the principal may receive a message on this topic: one that has waited may have outlived the right to it.
    pub fn may_receive(&self, name: &str) -> bool {
        self.rules.allow_subscribe.matches(name, &self.names) && !self.rules.deny_subscribe.matches(name, &self.names)
    }

    /// What stands between a subscription to `filter` (without `$share/{group}/`) and its messages: nothing, unless a
    /// deny rule overlaps with the filter. To be asked once for each subscription.
    pub fn delivery_guard(&self, filter: &str) -> Option<Guard> {
        self.rules.deny_subscribe.overlaps(filter, &self.names).then(|| Guard(self.clone()))
    }
}

/// Keeps back what a deny rule takes out of a subscription. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Guard(TopicRules);

impl Guard {
    /// Whether a message on `topic`, which the filter of the subscription matches, may be delivered.
    pub fn allows(&self, topic: &str) -> bool {
        let TopicRules { rules, names } = &self.0;
        !rules.deny_subscribe.matches(topic, names)
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

    fn rule(effect: Effect, action: Action, filter: impl Into<String>) -> TopicRule {
        TopicRule { effect, action, filter: filter.into() }
    }

    fn compiled(rules: &[TopicRule], names: Names) -> TopicRules {
        let set = RuleSet::compile(rules, Reach::Platform).unwrap();
        TopicRules::new(Arc::new(set), names.tenant, names.device)
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
            prop_assert_eq!(guard.is_some(), denied > 0);
            if let Some(guard) = guard {
                for topic in &wanted {
                    prop_assert_eq!(guard.allows(topic), !one_matches(&deny, topic), "{}", topic);
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
    }
}
