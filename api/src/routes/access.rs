//! Asking the policy: who may do what and why, what a change would give and take, and what another user sees.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::extract::State;
use fleet_core::audit::Entry;
use fleet_core::binding::NewBinding;
use fleet_core::difference::{self, Change, Delta, Devices, Difference};
use fleet_core::explain::{self, Deciding, Use, Whom};
use fleet_core::id::{ApiKeyId, BindingId, DeviceId, RoleId, UserId};
use fleet_core::policy::{About, Permission, Role, Source};
use fleet_core::topic_rule::TopicRule;
use fleet_core::user;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Json, given};
use crate::problem::{Document, Problem};
use crate::routes::bindings::NewBindingBody;
use crate::routes::roles::{TopicRuleBody, grants};
use crate::state::App;

/// What is asked.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Question {
    /// Who: a user (`usr_…` or an e-mail address), an API key (`key_…`) or a device (its id). Left out: the caller.
    #[schema(example = "ada@example.com")]
    principal: Option<String>,
    /// What: a permission such as `telemetry:read`, or `publish`, `subscribe` or `receive` on a topic.
    #[schema(example = "telemetry:read")]
    action: String,
    /// On what: the id of a device, or a topic or filter. Left out, with a permission: on any device at all.
    #[schema(example = "boiler-1")]
    resource: Option<String>,
    /// On which topic or filter, instead of `resource`.
    #[schema(example = "fleet/v1/main/boiler-1/telemetry")]
    topic: Option<String>,
}

/// The decision.
#[derive(Serialize, ToSchema)]
pub(crate) struct Answer {
    /// `allow` or `deny`.
    #[schema(example = "allow", pattern = "^(allow|deny)$")]
    decision: &'static str,
    /// Whether it is `allow`.
    allowed: bool,
    /// Why, in words.
    reason: String,
    /// What decided; null: nothing that the principal has says anything about it.
    decided_by: Option<DecidedBy>,
    /// What would be needed; null: nothing.
    needed: Option<String>,
}

/// What decided.
#[derive(Serialize, ToSchema)]
struct DecidedBy {
    /// How the principal has the role: `user` (its own role), `binding`, `api-key`, `device`.
    #[schema(example = "binding")]
    source: &'static str,
    /// The binding, when it is one.
    #[schema(value_type = Option<String>)]
    binding: Option<BindingId>,
    /// The API key, when the role is that of a key.
    #[schema(value_type = Option<String>)]
    api_key: Option<ApiKeyId>,
    /// The role.
    #[schema(example = "viewer")]
    role: String,
    /// The topic rule, when the question was about a topic.
    #[schema(value_type = Option<TopicRuleBody>)]
    rule: Option<TopicRule>,
}

impl DecidedBy {
    fn new(by: Deciding) -> Self {
        let (source, binding, api_key) = match by.source {
            None => ("device", None, None),
            Some(Source::User) => ("user", None, None),
            Some(Source::Binding(id)) => ("binding", Some(id), None),
            Some(Source::ApiKey(id)) => ("api-key", None, Some(id)),
        };
        Self { source, binding, api_key, role: by.role, rule: by.rule }
    }
}

/// Ask who may do what
///
/// The policy that decides is asked, and its answer explained: which role, given how, and which topic rule decided; else what would
/// be needed.
#[utoipa::path(
    post, path = "/api/v1/access/check", tag = "access", request_body = Question, security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The decision.", body = Answer),
        (status = 400, description = "There is no such action, or it needs a resource.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user, API key or device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn check(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Json(Question { principal, action, resource, topic }): Json<Question>,
) -> Result<Json<Answer>, Problem> {
    if resource.is_some() && topic.is_some() {
        return Err(Problem::field("topic", "expected one of resource and topic"));
    }
    let mut db = caller.read(&app).await?;
    let (principal, barred) = match principal {
        None => (caller.principal().clone(), None),
        Some(text) => explain::principal(&mut db, caller.principal(), &whom(&text)?, app.clock.now()).await?,
    };
    if let Some(barred) = barred {
        let reason = format!("{barred}, and is not let in");
        return Ok(Json(Answer {
            decision: "deny",
            allowed: false,
            needed: Some(reason.clone()),
            reason,
            decided_by: None,
        }));
    }
    let used = match action.as_str() {
        "publish" => Some(Use::Publish),
        "subscribe" => Some(Use::Subscribe),
        "receive" => Some(Use::Receive),
        _ => None,
    };
    let decision = if let Some(used) = used {
        let topic = topic.or(resource).ok_or_else(|| Problem::field("topic", "expected a topic or a filter"))?;
        let device = match explain::device_of(&principal, &topic) {
            Some(id) => explain::attributes(&mut db, caller.tenant, &id).await?,
            None => None,
        };
        explain::topic(&principal, used, &topic, device.as_ref())
    } else {
        let permission = Permission::named(&action).ok_or_else(|| {
            let known = Permission::ALL.iter().map(|permission| permission.name()).collect::<Vec<_>>().join(", ");
            Problem::field("action", format!("expected publish, subscribe, receive or one of {known}"))
        })?;
        if topic.is_some() {
            return Err(Problem::field("action", "expected publish, subscribe or receive beside a topic"));
        }
        let device = match resource {
            Some(id) => {
                let id = id.parse::<DeviceId>().map_err(|error| Problem::field("resource", error.to_string()))?;
                let found = explain::attributes(&mut db, caller.tenant, &id).await?;
                Some(found.ok_or(fleet_core::Error::NoSuchDevice(id))?)
            }
            None => None,
        };
        explain::permission(&principal, permission, device.as_ref())
    };
    Ok(Json(Answer {
        decision: if decision.allowed { "allow" } else { "deny" },
        allowed: decision.allowed,
        needed: (!decision.allowed).then(|| decision.why.clone()),
        reason: decision.why,
        decided_by: decision.by.map(DecidedBy::new),
    }))
}

fn whom(text: &str) -> Result<Whom, Problem> {
    let id = |error: fleet_core::id::BadId| Problem::field("principal", error.to_string());
    if text.contains('@') {
        return Ok(Whom::Email(text.to_owned()));
    }
    if text.starts_with("usr_") {
        return text.parse::<UserId>().map(Whom::User).map_err(id);
    }
    if text.starts_with("key_") {
        return text.parse::<ApiKeyId>().map(Whom::ApiKey).map_err(id);
    }
    text.parse::<DeviceId>().map(Whom::Device).map_err(id)
}

/// A change that is not made yet; exactly one of these.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Proposal {
    /// A role of the tenant, as it would be.
    role: Option<ProposedRole>,
    /// A binding that would be made.
    binding: Option<NewBindingBody>,
    /// A binding that would end.
    #[schema(value_type = Option<String>, example = "bnd_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    unbind: Option<BindingId>,
    /// A user who would have another role for the whole tenant.
    user: Option<ProposedUser>,
}

/// A role as it would be.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields, expecting = "an object with `id`, `permissions` and `topic_rules`")]
pub(crate) struct ProposedRole {
    /// Its name, whether or not there is such a role.
    #[schema(value_type = String, example = "order-service")]
    id: RoleId,
    /// What it would open.
    #[serde(default)]
    #[schema(example = json!(["devices:read"]))]
    permissions: Vec<String>,
    /// What it would say about topics.
    #[serde(default)]
    #[schema(value_type = Vec<TopicRuleBody>)]
    topic_rules: Vec<TopicRule>,
}

/// A user as it would be.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::option_option, reason = "left out, null, a value")]
pub(crate) struct ProposedUser {
    /// The user.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: UserId,
    /// The role; null: none.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    role: Option<Option<RoleId>>,
}

/// What a change would give and take.
#[derive(Serialize, ToSchema)]
pub(crate) struct Outcome {
    /// For each user and API key whose rights would change; for a role that nobody has, one item for whoever will have it.
    items: Vec<OutcomeItem>,
    /// How many users and API keys were compared.
    compared: usize,
    /// Whether there are more, which were not.
    more: bool,
}

/// What a change would give one user or API key, and take.
#[derive(Serialize, ToSchema)]
struct OutcomeItem {
    /// The user; null: whoever will have the role.
    #[schema(value_type = Option<String>)]
    user: Option<UserId>,
    /// The API key of the user, when it is about one.
    #[schema(value_type = Option<String>)]
    api_key: Option<ApiKeyId>,
    /// Permissions, for some devices at least.
    permissions: GainedLost,
    /// Routes, for some devices at least.
    routes: GainedLost,
    /// Topic rules in words.
    topics: GainedLost,
    /// By permission: devices.
    devices: BTreeMap<&'static str, DevicesGainedLost>,
}

/// What comes and what goes.
#[derive(Serialize, ToSchema)]
struct GainedLost {
    /// What is not there yet.
    gained: Vec<String>,
    /// What would be there no more.
    lost: Vec<String>,
}

/// Devices that come and go.
#[derive(Serialize, ToSchema)]
struct DevicesGainedLost {
    gained: SomeDevices,
    lost: SomeDevices,
}

/// Some devices.
#[derive(Serialize, ToSchema)]
struct SomeDevices {
    /// How many.
    count: u64,
    /// The first of them, at most 20.
    #[schema(value_type = Vec<String>)]
    sample: Vec<DeviceId>,
}

impl From<Devices> for SomeDevices {
    fn from(devices: Devices) -> Self {
        Self { count: devices.count, sample: devices.sample }
    }
}

impl From<Difference> for OutcomeItem {
    fn from(item: Difference) -> Self {
        let names = |of: &[Permission]| of.iter().map(|permission| permission.name().to_owned()).collect();
        let routes = |of: &[Permission]| of.iter().flat_map(|permission| routes_of(*permission)).cloned().collect();
        let Delta { gained, lost } = &item.permissions;
        let devices = item.devices.into_iter().map(|(permission, delta)| {
            (permission.name(), DevicesGainedLost { gained: delta.gained.into(), lost: delta.lost.into() })
        });
        Self {
            user: item.user,
            api_key: item.key,
            permissions: GainedLost { gained: names(gained), lost: names(lost) },
            routes: GainedLost { gained: routes(gained), lost: routes(lost) },
            topics: GainedLost { gained: item.topics.gained, lost: item.topics.lost },
            devices: devices.collect(),
        }
    }
}

/// Ask what a change would give and take
///
/// Before a role or a binding is saved: for everybody whose rights would change, the permissions, routes, topics and devices that
/// come and go. Nothing is changed.
#[utoipa::path(
    post, path = "/api/v1/access/diff", tag = "access", request_body = Proposal, security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "What would come and go.", body = Outcome),
        (status = 400, description = "Not exactly one change, or it is not valid.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "The change would give more than the caller has.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user, role or binding.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn diff(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Json(proposal): Json<Proposal>,
) -> Result<Json<Outcome>, Problem> {
    let change = match proposal {
        Proposal { role: Some(role), binding: None, unbind: None, user: None } => {
            Change::Role { id: role.id, grants: grants(&role.permissions, role.topic_rules)? }
        }
        Proposal { role: None, binding: Some(NewBindingBody { user, role, scope }), unbind: None, user: None } => {
            Change::Bind(NewBinding { user, role, scope })
        }
        Proposal { role: None, binding: None, unbind: Some(id), user: None } => Change::Unbind(id),
        Proposal { role: None, binding: None, unbind: None, user: Some(ProposedUser { id, role: Some(role) }) } => {
            Change::UserRole { user: id, role }
        }
        _ => return Err(Problem::field(".", "expected one of role, binding, unbind, or user with a role")),
    };
    let mut db = caller.read(&app).await?;
    let found = difference::of(&mut db, caller.manager(), &change, app.clock.now()).await?;
    let items = found.items.into_iter().map(OutcomeItem::from).collect();
    Ok(Json(Outcome { items, compared: found.compared, more: found.more }))
}

/// Routes by the permission that they say they need.
static ROUTES: LazyLock<Vec<(String, String)>> = LazyLock::new(crate::guarded_routes);

/// The routes that a permission opens.
fn routes_of(permission: Permission) -> impl Iterator<Item = &'static String> {
    ROUTES.iter().filter(move |(_, needs)| needs == permission.name()).map(|(route, _)| route)
}

/// One line of the table of permissions.
#[derive(Serialize, ToSchema)]
pub(crate) struct PermissionBody {
    /// Its name.
    #[schema(example = "telemetry:read")]
    id: &'static str,
    /// What it is good for.
    description: &'static str,
    /// `devices`: a binding may give it for some of them; `tenant`: it is worth something for the whole tenant only.
    #[schema(example = "devices")]
    about: &'static str,
    /// The routes that it opens.
    routes: Vec<&'static String>,
    /// The topics that it opens.
    #[schema(value_type = Vec<TopicRuleBody>)]
    topics: Vec<TopicRule>,
    /// The built-in roles that hold it.
    roles: Vec<String>,
}

/// All permissions.
#[derive(Serialize, ToSchema)]
pub(crate) struct Permissions {
    items: Vec<PermissionBody>,
}

/// List permissions
///
/// The table behind all roles: what each permission opens, and which built-in roles hold it.
#[utoipa::path(
    get, path = "/api/v1/access/permissions", tag = "access", security(("bearer" = ["access:manage"])),
    responses((status = 200, description = "All of them.", body = Permissions))
)]
pub(crate) async fn permissions(_: Can<AccessManage>) -> Json<Permissions> {
    let holds = |permission: &Permission| {
        let roles = Role::BUILT_IN.iter().filter(|role| role.permissions().contains(permission));
        roles.map(|role| role.name().to_owned()).collect()
    };
    let items = Permission::ALL.iter().map(|permission| PermissionBody {
        id: permission.name(),
        description: permission.description(),
        about: if permission.about() == About::Devices { "devices" } else { "tenant" },
        routes: routes_of(*permission).collect(),
        topics: permission.topic_rules().collect(),
        roles: holds(permission),
    });
    Json(Permissions { items: items.collect() })
}

/// Whose view.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ViewAs {
    /// The user.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    user: UserId,
}

/// A token to look with.
#[derive(Serialize, ToSchema)]
pub(crate) struct View {
    /// To be sent as `Authorization: Bearer …`; it changes nothing.
    access_token: String,
    /// Always `Bearer`.
    token_type: &'static str,
    /// How long it is accepted, in seconds.
    expires_in: u64,
}

/// See what another user sees
///
/// An access token with which the caller sees what the user sees, and changes nothing. It ends with the caller's login and right to
/// manage the user's access. That it was made is in the audit log.
#[utoipa::path(
    post, path = "/api/v1/access/view-as", tag = "access", request_body = ViewAs, security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The token.", body = View),
        (status = 403, description = "The user may do more than the caller, or the caller has come by an API key.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn view_as(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Json(ViewAs { user }): Json<ViewAs>,
) -> Result<Json<View>, Problem> {
    let login = || Problem::new(403, "forbidden", "this needs a login: an API key will not do");
    let session = caller.principal().proof.session.ok_or_else(login)?;
    let mut tx = caller.change(&app).await?;
    user::manageable(&mut tx, caller.manager(), user).await?;
    let until = caller.principal().proof.valid_until.unwrap_or_else(|| app.clock.now());
    let token = app.keys.sign_view(user, caller.id, session, until)?;
    tx.commit(Entry::of("user.view-as", user)).await?;
    let access_token = token.token.expose().to_owned();
    Ok(Json(View { access_token, token_type: "Bearer", expires_in: token.expires_in_s }))
}
