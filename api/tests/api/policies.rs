//! One policy, four uses: for random roles and bindings the answer of a route, the rows of a query, what a selector finds, what is
//! allowed on topics and what is found of log lines ([`logs`]) are compared with an evaluator that is written here, from the words of
//! the reference alone.

mod logs;

use std::collections::BTreeSet;
use std::sync::Arc;

use fleet_core::directory::Directory;
use fleet_core::policy::{About, Permission};
use fleet_core::topic_rule::{Action, TopicRules};
use fleet_core::{token, topic};
use serde_json::{Value, json};

use crate::harness::{Api, escaped};

const POLICIES: usize = 40;

/// Numbers that are the same in each run (splitmix64).
struct Dice(u64);

impl Dice {
    fn below(&mut self, sides: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        usize::try_from((mixed ^ (mixed >> 31)) % sides as u64).unwrap()
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }
}

const GROUPS: [&str; 5] = ["a", "a/b", "a/b/c", "a/bc", "b"];
const KINDS: [&str; 2] = ["pump", "fan"];
const SITES: [&str; 2] = ["oslo", "rome"];

#[derive(Debug)]
struct Device {
    id: String,
    group: Option<&'static str>,
    kind: Option<&'static str>,
    site: Option<&'static str>,
}

impl Device {
    fn any(dice: &mut Dice, number: usize) -> Self {
        let mut maybe = |of: &[&'static str]| (dice.below(3) > 0).then(|| dice.pick(of));
        Self { id: format!("d{number}"), group: maybe(&GROUPS), kind: maybe(&KINDS), site: maybe(&SITES) }
    }

    fn body(&self) -> Value {
        let labels = self.site.map_or_else(|| json!({}), |site| json!({ "site": site }));
        json!({ "id": self.id, "group": self.group, "type": self.kind, "labels": labels })
    }
}

/// One word of a selector: the field, the value, and whether `NOT` stands before it.
type Word = (&'static str, &'static str, bool);

#[derive(Debug, Clone)]
enum Scope {
    Tenant,
    Group(&'static str),
    /// Of these one, all of whose words hold.
    Selector(Vec<Vec<Word>>),
}

impl Scope {
    fn any(dice: &mut Dice) -> Self {
        match dice.below(5) {
            0 => Self::Tenant,
            1 => Self::Group(dice.pick(&GROUPS)),
            _ => Self::selector(dice),
        }
    }

    fn selector(dice: &mut Dice) -> Self {
        let alternatives = (0..=dice.below(2)).map(|_| (0..=dice.below(3)).map(|_| Self::word(dice)).collect());
        Self::Selector(alternatives.collect())
    }

    fn word(dice: &mut Dice) -> Word {
        let (field, values) = dice.pick(&[("group", &GROUPS[..]), ("type", &KINDS), ("label.site", &SITES)]);
        (field, dice.pick(values), dice.below(3) == 0)
    }

    fn text(&self) -> String {
        let Self::Selector(alternatives) = self else { panic!("only selectors are text") };
        let word = |(field, value, not): &Word| format!("{}{field}:{value}", if *not { "NOT " } else { "" });
        let all = |words: &Vec<Word>| words.iter().map(word).collect::<Vec<_>>().join(" AND ");
        alternatives.iter().map(all).collect::<Vec<_>>().join(" OR ")
    }

    fn body(&self) -> Value {
        match self {
            Self::Tenant => json!({ "kind": "tenant" }),
            Self::Group(group) => json!({ "kind": "group", "group": group }),
            Self::Selector(_) => json!({ "kind": "selector", "selector": self.text() }),
        }
    }

    fn holds(&self, device: &Device) -> bool {
        let below = |group: &str| device.group.is_some_and(|own| own == group || own.starts_with(&format!("{group}/")));
        let said = |(field, value, not): &Word| {
            let holds = match *field {
                "group" => below(value),
                "type" => device.kind == Some(*value),
                _ => device.site == Some(*value),
            };
            holds != *not
        };
        match self {
            Self::Tenant => true,
            Self::Group(group) => below(group),
            Self::Selector(alternatives) => alternatives.iter().any(|words| words.iter().all(said)),
        }
    }
}

#[derive(Debug, Clone)]
struct Role {
    id: String,
    permissions: BTreeSet<&'static str>,
    /// Below the device, what is allowed beside that, and what is denied.
    allows: Option<&'static str>,
    denies: Option<&'static str>,
}

impl Role {
    fn any(dice: &mut Dice, number: usize) -> Self {
        let names = [
            "devices:read",
            "telemetry:read",
            "logs:read",
            "credentials:manage",
            "commands:send",
            "access:manage",
            "audit:read",
        ];
        let permissions = names.into_iter().filter(|_| dice.below(5) < 2).collect();
        let mut maybe = |of: &[&'static str]| (dice.below(3) == 0).then(|| dice.pick(of));
        let (allows, denies) = (maybe(&["x", "telemetry"]), maybe(&["telemetry", "events", "x"]));
        Self { id: format!("role-{number}"), permissions, allows, denies }
    }

    fn body(&self) -> Value {
        let rule = |effect: &str, below: &str| json!({ "effect": effect, "action": "all", "filter": format!("fleet/v1/{{tenant}}/+/{below}") });
        let rules = [("allow", self.allows), ("deny", self.denies)];
        let rules = rules.into_iter().filter_map(|(effect, below)| Some(rule(effect, below?))).collect::<Vec<_>>();
        json!({ "id": self.id, "permissions": self.permissions, "topic_rules": rules })
    }

    fn opens(&self, action: Action, below: &str) -> bool {
        let permitted = self.permissions.iter().filter_map(|name| Permission::named(name));
        let rules = permitted.flat_map(Permission::topic_rules);
        let wanted = format!("fleet/v1/{{tenant}}/d/{below}");
        let mut fitting = rules.filter(|rule| rule.action == action || rule.action == Action::All);
        self.allows == Some(below) || fitting.any(|rule| topic::matches(&rule.filter, &wanted))
    }
}

/// What a user was given.
struct Policy(Vec<(Role, Scope)>);

impl Policy {
    fn reaches<'a>(&'a self, device: &'a Device) -> impl Iterator<Item = &'a Role> {
        self.0.iter().filter(|(_, scope)| scope.holds(device)).map(|(role, _)| role)
    }

    fn may(&self, permission: &str, device: &Device) -> bool {
        self.reaches(device).any(|role| role.permissions.contains(permission))
    }

    /// About the tenant as a whole, or for some device, there or not.
    fn may_at_all(&self, permission: &str) -> bool {
        let about = Permission::named(permission).unwrap().about();
        self.0.iter().any(|(role, scope)| {
            role.permissions.contains(permission) && (about == About::Devices || matches!(scope, Scope::Tenant))
        })
    }

    fn may_use(&self, action: Action, device: &Device, below: &str) -> bool {
        self.reaches(device).any(|role| role.opens(action, below))
            && !self.reaches(device).any(|role| role.denies == Some(below))
    }
}

struct World {
    api: Api,
    devices: Vec<Device>,
    roles: Vec<Role>,
    directory: Arc<Directory>,
}

impl World {
    async fn new(dice: &mut Dice) -> Self {
        let api = Api::start().await;
        let devices = (0..10).map(|number| Device::any(dice, number)).collect::<Vec<_>>();
        for device in &devices {
            api.post("/api/v1/devices", device.body()).await.expect(201);
        }
        let roles = (0..8).map(|number| Role::any(dice, number)).collect::<Vec<_>>();
        for role in &roles {
            api.post("/api/v1/roles", role.body()).await.expect(201);
        }
        let directory = Arc::new(Directory::default());
        let mut db = api.db.pool().acquire().await.unwrap();
        directory.load(&mut db, &[api.db.tenant()].into()).await.unwrap();
        drop(db);
        Self { api, devices, roles, directory }
    }

    /// A user with some roles in some scopes, and an access token.
    async fn user(&self, dice: &mut Dice, number: usize) -> (Policy, String, String) {
        let (mut own, mut given) = (String::new(), Vec::new());
        if dice.below(4) == 0 {
            let role = self.roles[dice.below(self.roles.len())].clone();
            own.clone_from(&role.id);
            given.push((role, Scope::Tenant));
        }
        let (id, token) = self.api.user(&format!("user-{number}@example.com"), &own).await;
        for _ in 0..dice.below(4) {
            let (role, scope) = (self.roles[dice.below(self.roles.len())].clone(), Scope::any(dice));
            let binding = json!({ "user": id, "role": role.id, "scope": scope.body() });
            // What picks nothing, and what is given already, is refused.
            if self.api.post("/api/v1/bindings", binding).await.status.is_success() {
                given.push((role, scope));
            }
        }
        (Policy(given), id.to_string(), token)
    }

    async fn ids(&self, token: &str, query: &str) -> Option<BTreeSet<String>> {
        let reply = self.api.as_who(token, "GET", &format!("/api/v1/devices?limit=100{query}")).send().await;
        if reply.status.as_u16() == 403 {
            return None;
        }
        Some(reply.expect(200).ids().into_iter().map(str::to_owned).collect())
    }

    fn picked(&self, is_picked: impl Fn(&Device) -> bool) -> BTreeSet<String> {
        self.devices.iter().filter(|device| is_picked(device)).map(|device| device.id.clone()).collect()
    }

    async fn rules(&self, token: &str) -> TopicRules {
        let mut db = self.api.db.pool().acquire().await.unwrap();
        let principal = token::principal(&mut db, &self.api.keys, token, self.api.now()).await.unwrap();
        principal.topic_rules(&self.directory)
    }

    async fn check(&self, who: &str, action: &str, resource: &str) -> bool {
        let question = json!({ "principal": who, "action": action, "resource": resource });
        let answer = self.api.post("/api/v1/access/check", question).await.expect(200);
        answer.body["allowed"].as_bool().unwrap()
    }
}

#[tokio::test]
async fn routes_rows_and_selectors_agree_with_what_was_written() {
    let mut dice = Dice(4);
    let world = World::new(&mut dice).await;
    let (mut seen, mut hidden) = (0, 0);
    for number in 0..POLICIES {
        let (policy, who, token) = world.user(&mut dice, number).await;
        let told = || format!("{:?}", policy.0);
        let visible = |device: &Device| policy.may("devices:read", device);
        let listed = world.ids(&token, "").await;
        assert_eq!(listed.is_some(), policy.may_at_all("devices:read"), "{}", told());
        assert_eq!(listed.unwrap_or_default(), world.picked(visible), "{}", told());
        let selector = Scope::selector(&mut dice);
        let asked = format!("&selector={}", escaped(&selector.text()));
        let found = world.ids(&token, &asked).await.unwrap_or_default();
        let expected = world.picked(|device| visible(device) && selector.holds(device));
        assert_eq!(found, expected, "{} of {}", selector.text(), told());
        for (path, permission) in [("/api/v1/users", "access:manage"), ("/api/v1/audit/verify", "audit:read")] {
            let open = world.api.as_who(&token, "GET", path).send().await.status.is_success();
            assert!(
                !open || policy.0.iter().any(|(role, _)| role.permissions.contains(permission)),
                "{path} {}",
                told()
            );
            assert!(open || !policy.may_at_all(permission) || permission == "audit:read", "{path} {}", told());
        }
        for device in &world.devices {
            for (below, permission) in
                [("", "devices:read"), ("/telemetry/latest", "telemetry:read"), ("/credentials", "credentials:manage")]
            {
                let path = format!("/api/v1/devices/{}{below}", device.id);
                let reply = world.api.as_who(&token, "GET", &path).send().await;
                let expected = policy.may(permission, device);
                assert_eq!(reply.status.as_u16() == 200, expected, "{path} {device:?} {}: {}", told(), reply.text);
                assert!(expected || [403, 404].contains(&reply.status.as_u16()), "{path}: {}", reply.text);
                if expected {
                    seen += 1;
                } else {
                    hidden += 1;
                }
            }
            assert_eq!(world.check(&who, "telemetry:read", &device.id).await, policy.may("telemetry:read", device));
        }
    }
    assert!(seen > 100 && hidden > 100, "{seen} seen and {hidden} hidden: that proves little");
}

#[tokio::test]
async fn topics_agree_with_what_was_written() {
    let mut dice = Dice(5);
    let world = World::new(&mut dice).await;
    let (mut allowed, mut refused) = (0, 0);
    for number in 0..POLICIES {
        let (policy, who, token) = world.user(&mut dice, number).await;
        let rules = world.rules(&token).await;
        let delivered = |filter: &str, name: &str| {
            let guard = rules.delivery_guard(filter);
            rules.may_subscribe(filter) && guard.is_none_or(|guard| guard.allows(name))
        };
        for below in ["telemetry", "events", "logs", "status", "x", "commands/1/request", "commands/1/response"] {
            let wide = format!("fleet/v1/main/+/{below}");
            for device in &world.devices {
                let name = format!("fleet/v1/main/{}/{below}", device.id);
                let told = format!("{name} {device:?} {:?}", policy.0);
                let may_hear = policy.may_use(Action::Subscribe, device, below);
                assert_eq!(rules.may_receive(&name), may_hear, "{told}");
                assert_eq!(delivered(&name, &name), may_hear, "{told}");
                assert!(!rules.may_subscribe(&wide) || delivered(&wide, &name) == may_hear, "{told}");
                assert!(!may_hear || rules.may_subscribe(&wide), "{told}");
                let may_say = policy.may_use(Action::Publish, device, below);
                assert_eq!(rules.may_publish(&name), may_say, "{told}");
                if may_hear {
                    allowed += 1;
                } else {
                    refused += 1;
                }
                let other = format!("fleet/v1/other/{}/{below}", device.id);
                assert!(!rules.may_publish(&other) && !rules.may_receive(&other), "{told}");
            }
        }
        let device = &world.devices[dice.below(world.devices.len())];
        let name = format!("fleet/v1/main/{}/telemetry", device.id);
        let expected = policy.may_use(Action::Subscribe, device, "telemetry");
        assert_eq!(world.check(&who, "receive", &name).await, expected, "{name} {:?}", policy.0);
    }
    assert!(allowed > 100 && refused > 100, "{allowed} allowed and {refused} refused: that proves little");
}
