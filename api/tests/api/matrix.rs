//! Every built-in role against every route and every topic, written down where a reviewer can read it.
//!
//! `UPDATE_MATRIX=1 cargo nextest run -p api the_matrix` writes the page anew.

use std::fmt::Write as _;
use std::sync::Arc;

use fleet_core::explain::{self, Use};
use fleet_core::gateway::Children;
use fleet_core::id::{DeviceKey, TenantKey, UserId};
use fleet_core::policy::{About, Grants, Permission, Principal, Proof, Role, Who};

use crate::access::operations;
use crate::harness::Api;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/access-matrix.md");

/// A topic of each kind, and what may be done with it.
const TOPICS: [&str; 20] = [
    "fleet/v1/main/boiler-1/status",
    "fleet/v1/main/boiler-1/telemetry",
    "fleet/v1/main/boiler-1/logs",
    "fleet/v1/main/boiler-1/events",
    "fleet/v1/main/boiler-1/shadow/get",
    "fleet/v1/main/boiler-1/shadow/update",
    "fleet/v1/main/boiler-1/shadow/update/delta",
    "fleet/v1/main/boiler-1/commands/1/request",
    "fleet/v1/main/boiler-1/commands/1/response",
    "fleet/v1/main/boiler-1/updates/get",
    "fleet/v1/main/boiler-1/updates/offer",
    "fleet/v1/main/boiler-1/updates/1/ack",
    "fleet/v1/main/boiler-1/certificates/renew",
    "fleet/v1/main/boiler-2/telemetry",
    "fleet/v1/main/_provision/request",
    "fleet/v1/other/boiler-1/telemetry",
    "app/main/orders",
    "app/other/orders",
    "$SYS/broker/uptime",
    "anything/else",
];

fn user(role: Role) -> Principal {
    let who = Who::User { id: UserId::new(), key: None, grants: Grants::of(Some(role)), platform: false };
    Principal { tenant: TenantKey(1), tenant_id: "main".parse().unwrap(), who, proof: Proof::default() }
}

fn device() -> Principal {
    let who = Who::Device { key: DeviceKey(1), id: "boiler-1".parse().unwrap(), children: Children::default() };
    Principal { who, ..user(Role::Admin) }
}

fn mark(yes: bool) -> &'static str {
    if yes { "✓" } else { "·" }
}

fn head(page: &mut String, first: &str, roles: &[String]) {
    writeln!(page, "| {first} | {} |\n|---|{}", roles.join(" | "), ":-:|".repeat(roles.len())).unwrap();
}

/// The page, from the table of permissions, the document and the policy.
fn matrix() -> String {
    let names = Role::BUILT_IN.iter().map(|role| role.name().to_owned()).collect::<Vec<_>>();
    let mut page = String::from(
        "# Who may do what\n\nWritten by a test from the table of permissions, the routes and the policy; another test asks the \
         running doors. A ✓ is\nallowed in the scope of the role; permissions about the tenant need the whole tenant as scope.\n",
    );
    page.push_str("\n## Permissions\n\n");
    head(&mut page, "permission | about", &names);
    page = page.replace("|---|:-:|", "|---|---|:-:|");
    for permission in Permission::ALL {
        let about = if permission.about() == About::Devices { "devices" } else { "tenant" };
        let marks = Role::BUILT_IN.iter().map(|role| mark(role.permissions().contains(permission)));
        let (name, what) = (permission.name(), permission.description());
        writeln!(page, "| `{name}`: {what} | {about} | {} |", marks.collect::<Vec<_>>().join(" | ")).unwrap();
    }
    page.push_str("\n## Routes\n\n");
    head(&mut page, "route", &names);
    let mut routes = operations();
    routes.sort_by(|a, b| (&a.1, &a.0).cmp(&(&b.1, &b.0)));
    for (method, path, permission) in routes {
        let opens = |role: &Role| {
            let needed = permission.as_deref().and_then(Permission::named);
            mark(needed.is_none_or(|needed| user(role.clone()).may(needed)))
        };
        let marks = Role::BUILT_IN.iter().map(opens).collect::<Vec<_>>().join(" | ");
        let path = path.replace("boiler-1", "{id}").replace(&format!("crd_{:032x}", 1), "{credential_id}");
        writeln!(page, "| `{method} {path}` | {marks} |").unwrap();
    }
    page.push_str(
        "\n## Topics\n\nP: may publish, S: may subscribe. The device is `boiler-1` of the tenant `main`.\n\n",
    );
    let all = [names, vec!["device".to_owned()]].concat();
    head(&mut page, "topic", &all);
    let nobody = Arc::default();
    let principals = Role::BUILT_IN.into_iter().map(user).chain([device()]).collect::<Vec<_>>();
    for topic in TOPICS {
        let uses = |who: &Principal| {
            let p = if explain::compiled(who, Use::Publish, topic, &nobody) { "P" } else { "" };
            let s = if explain::compiled(who, Use::Subscribe, topic, &nobody) { "S" } else { "" };
            if p.is_empty() && s.is_empty() { "·".to_owned() } else { format!("{p}{s}") }
        };
        let cells = principals.iter().map(uses).collect::<Vec<_>>();
        writeln!(page, "| `{topic}` | {} |", cells.join(" | ")).unwrap();
    }
    page
}

#[test]
#[expect(clippy::disallowed_methods, reason = "it is no setting of the program")]
fn the_matrix_of_roles_is_the_page_in_the_reference() {
    let found = matrix();
    if std::env::var_os("UPDATE_MATRIX").is_some() {
        std::fs::write(PAGE, &found).unwrap();
    }
    let written = std::fs::read_to_string(PAGE).unwrap_or_default();
    assert!(
        written == found,
        "docs/reference/access-matrix.md is out of date: read what has changed, then UPDATE_MATRIX=1"
    );
}

#[test]
fn every_permission_is_held_by_some_role_and_opens_something() {
    let needed = operations().into_iter().filter_map(|(_, _, permission)| permission).collect::<Vec<_>>();
    for permission in Permission::ALL {
        let name = permission.name();
        assert!(
            Role::BUILT_IN.iter().skip(1).any(|role| role.permissions().contains(permission))
                || ["access:manage", "authorities:manage", "devices:decommission", "logs:write"].contains(&name)
        );
        // Approving is for updates, which have no routes yet.
        let opens = needed.iter().any(|needed| needed == name) || permission.topic_rules().next().is_some();
        assert!(opens || name == "updates:approve", "{name} opens neither a route nor a topic");
    }
    for needed in needed {
        assert!(Permission::named(&needed).is_some(), "{needed} is in the document and not in the table");
    }
}

#[tokio::test]
async fn the_doors_answer_each_built_in_role_as_the_matrix_says() {
    let api = Api::start().await;
    for role in Role::BUILT_IN {
        let (_, token) = api.user(&format!("a-{}@example.com", role.name()), role.name()).await;
        for (method, path, permission) in operations() {
            let Some(permission) = permission.as_deref().and_then(Permission::named) else { continue };
            let answer = api.as_who(&token, &method, &path).send().await;
            // OpenTelemetry has its own way to say it.
            let (is_told, detail) = if path == "/v1/logs" {
                (answer.body["code"] == 7, &answer.body["message"])
            } else {
                (answer.body["type"] == "urn:muster:problem:forbidden", &answer.body["detail"])
            };
            let is_forbidden = is_told && detail.as_str().is_some_and(|detail| detail.ends_with(permission.name()));
            let expected = !role.permissions().contains(&permission);
            assert_eq!(is_forbidden, expected, "{} {method} {path}: {}", role.name(), answer.text);
        }
    }
}
