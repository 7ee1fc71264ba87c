//! Roles that people make.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::id::RoleId;
use fleet_core::policy::{Permission, Role};
use fleet_core::role::{self, Grants, NewRole, Stored};
use fleet_core::topic_rule::TopicRule;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Conditions, Json, Once, Path, Query};
use crate::page::{Cursor, Page, Paging, PagingQuery};
use crate::problem::{Document, FieldError, Problem};
use crate::resource::{Resource, current, made, unless_known};
use crate::state::App;
use crate::time;

/// A topic rule.
#[derive(ToSchema)]
#[schema(as = TopicRule)]
#[expect(dead_code, reason = "what `TopicRule` reads, as the document tells it")]
pub(crate) struct TopicRuleBody {
    /// Whether it grants or refuses; what is denied stays denied, whatever is allowed.
    effect: EffectBody,
    /// What it is about.
    action: ActionBody,
    /// The topics: an MQTT filter in which the levels `{tenant}` and `{device}` stand for names.
    #[schema(example = "app/{tenant}/orders/#", max_length = 1024)]
    filter: String,
}

#[derive(ToSchema)]
#[schema(as = Effect, rename_all = "lowercase")]
#[expect(dead_code, reason = "what `Effect` reads, as the document tells it")]
enum EffectBody {
    Allow,
    Deny,
}

#[derive(ToSchema)]
#[schema(as = Action, rename_all = "lowercase")]
#[expect(dead_code, reason = "what `Action` reads, as the document tells it")]
enum ActionBody {
    Publish,
    Subscribe,
    All,
}

/// A role.
#[derive(Serialize, ToSchema)]
#[schema(as = Role)]
pub(crate) struct RoleBody {
    /// Its name; immutable.
    #[schema(value_type = String, example = "order-service")]
    id: RoleId,
    /// Whether it is built in: it is there in every tenant, and cannot be changed.
    built_in: bool,
    /// Whether it stands above tenants: its rules may name any topic.
    platform: bool,
    /// What it opens on the REST API.
    #[schema(example = json!(["devices:read"]))]
    permissions: Vec<&'static str>,
    /// What it says about topics, beside those that its permissions open.
    #[schema(value_type = Vec<TopicRuleBody>)]
    topic_rules: Vec<TopicRule>,
    /// Rises with every change.
    version: i64,
    /// When it was made; null: it is built in.
    #[serde(serialize_with = "time::serialize_maybe")]
    created_at: Option<DateTime<Utc>>,
    /// When it was last changed.
    #[serde(serialize_with = "time::serialize_maybe")]
    updated_at: Option<DateTime<Utc>>,
}

impl RoleBody {
    fn new(role: Stored) -> Self {
        Self {
            id: role.id,
            built_in: false,
            platform: role.platform,
            permissions: role.permissions.into_iter().map(Permission::name).collect(),
            topic_rules: role.topic_rules,
            version: role.version,
            created_at: Some(role.created_at),
            updated_at: Some(role.updated_at),
        }
    }

    fn built_in(role: &Role) -> Self {
        Self {
            id: role.name().parse().expect("the names of built-in roles are names"),
            built_in: true,
            platform: false,
            permissions: role.permissions().iter().map(|permission| permission.name()).collect(),
            topic_rules: role.own_rules().to_vec(),
            version: 0,
            created_at: None,
            updated_at: None,
        }
    }
}

impl Resource for RoleBody {
    fn tag(&self) -> String {
        format!("\"{}\"", self.version)
    }
}

/// A role to be made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewRoleBody {
    /// Its name, 1 to 64 of `A-Z a-z 0-9 . _ -`, not beginning with `_`, not that of a built-in role; immutable.
    #[schema(value_type = String, example = "order-service")]
    id: RoleId,
    /// Whether it stands above tenants; only who has platform standing may make such a role.
    #[serde(default)]
    platform: bool,
    /// What it opens on the REST API.
    #[serde(default)]
    #[schema(example = json!(["devices:read"]))]
    permissions: Vec<String>,
    /// What it says about topics. A tenant's role may name topics below `fleet/v1/{tenant}/` and `app/{tenant}/` only.
    #[serde(default)]
    #[schema(value_type = Vec<TopicRuleBody>)]
    topic_rules: Vec<TopicRule>,
}

pub(crate) fn grants(permissions: &[String], topic_rules: Vec<TopicRule>) -> Result<Grants, Problem> {
    let known = Permission::ALL.iter().map(|permission| permission.name()).collect::<Vec<_>>().join(", ");
    let unknown = |(index, name): (usize, &String)| {
        let unknown = Permission::named(name).is_none();
        unknown
            .then(|| FieldError { field: format!("permissions[{index}]"), detail: format!("expected one of {known}") })
    };
    let errors = permissions.iter().enumerate().filter_map(unknown).collect::<Vec<_>>();
    if !errors.is_empty() {
        return Err(Problem::fields(errors));
    }
    let permissions = permissions.iter().filter_map(|name| Permission::named(name)).collect();
    Ok(Grants { permissions, topic_rules })
}

/// Make a role
///
/// Whoever has it may do what it says; nobody has it yet.
#[utoipa::path(
    post, path = "/api/v1/roles", tag = "roles", request_body = NewRoleBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 201, description = "It was made.", body = RoleBody, headers(
            ("Location" = String, description = "Where the role is."),
            ("ETag" = String, description = "For If-Match."),
        )),
        (status = 400, description = "A permission or a topic rule is not valid, or a rule reaches beyond the tenant.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "A role of the platform needs platform standing.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The name is taken, or there are too many roles or rules.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<AccessManage>,
    once: Once,
    Json(request): Json<NewRoleBody>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let NewRoleBody { id, platform, permissions, topic_rules } = request;
    let new = NewRole { id, platform, grants: grants(&permissions, topic_rules)? };
    let role = role::create(&mut tx, caller.manager(), &new, &app.auth, app.clock.now()).await?;
    let body = RoleBody::new(role);
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("role.create", &new.id).after(&body)).await?;
    Ok(made(location(new.id.as_str()), body))
}

fn location(id: &str) -> String {
    format!("/api/v1/roles/{id}")
}

/// List roles
///
/// In the order of their names, built-in ones included; roles of the platform are among them if the caller has platform
/// standing.
#[utoipa::path(
    get, path = "/api/v1/roles", tag = "roles", params(PagingQuery), security(("bearer" = ["access:manage"])),
    responses((status = 200, description = "A page of them.", body = Page<RoleBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Query(query): Query<Paging<RoleId>>,
) -> Result<Json<Page<RoleBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let Paging { after, limit } = query;
    let (roles, next) = role::page(&mut db, caller.manager(), after.as_ref(), limit).await?;
    let built_in = Role::BUILT_IN.iter().map(RoleBody::built_in).filter(|role| Some(&role.id) > after.as_ref());
    let mut items = roles.into_iter().map(RoleBody::new).chain(built_in).collect::<Vec<_>>();
    items.sort_by(|a, b| a.id.cmp(&b.id));
    let more = next.is_some() || items.len() > limit;
    items.truncate(limit);
    let next = items.last().filter(|_| more).map(|role| role.id.clone());
    Ok(Json(Page { items, next_cursor: next.map(Cursor::Role) }))
}

/// Read a role
#[utoipa::path(
    get, path = "/api/v1/roles/{id}", tag = "roles",
    params(
        ("id" = String, Path, description = "The role's name"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has"),
    ),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The role.", body = RoleBody, headers(("ETag" = String, description = "For If-Match and If-None-Match."))),
        (status = 304, description = "The caller has it already."),
        (status = 404, description = "There is no such role.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<RoleId>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let body = match Role::built_in(id.as_str()) {
        Some(role) => RoleBody::built_in(&role),
        None => RoleBody::new(role::find(&mut *caller.read(&app).await?, caller.manager(), &id).await?),
    };
    Ok(unless_known(&conditions, body))
}

/// What a role says from now on.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ReplaceRole {
    /// The name of the path, if it is said at all.
    #[schema(value_type = Option<String>)]
    id: Option<RoleId>,
    /// As it is, if it is said at all.
    platform: Option<bool>,
    /// What it opens on the REST API.
    #[schema(example = json!(["devices:read"]))]
    permissions: Vec<String>,
    /// What it says about topics.
    #[schema(value_type = Vec<TopicRuleBody>)]
    topic_rules: Vec<TopicRule>,
}

/// Change a role
///
/// The role as a whole; its name and its reach never change. Whoever has it is held to it at once, open connections
/// included. With If-Match, only if nobody has changed the role since.
#[utoipa::path(
    put, path = "/api/v1/roles/{id}", tag = "roles", request_body = ReplaceRole,
    params(
        ("id" = String, Path, description = "The role's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The role as it is now.", body = RoleBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 400, description = "A permission or a topic rule is not valid, or a rule reaches beyond the tenant.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such role.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is built in, or there are too many rules.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn replace(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<RoleId>,
    conditions: Conditions,
    Json(request): Json<ReplaceRole>,
) -> Result<Response, Problem> {
    if request.id.is_some_and(|given| given != id) {
        return Err(Problem::field("id", format!("expected {id}: the name of a role never changes")));
    }
    let grants = grants(&request.permissions, request.topic_rules)?;
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let (old, role) =
        role::replace(&mut tx, caller.manager(), &id, &grants, &conditions.versions(), &app.auth, now).await?;
    if request.platform.is_some_and(|given| given != role.platform) {
        return Err(Problem::field(
            "platform",
            format!("expected {}: the reach of a role never changes", role.platform),
        ));
    }
    let (old, body) = (RoleBody::new(old), RoleBody::new(role));
    tx.commit(Entry::of("role.update", &id).before(&old).after(&body)).await?;
    Ok(current(body))
}

/// Delete a role
///
/// Refused while a user or an API key has it.
#[utoipa::path(
    delete, path = "/api/v1/roles/{id}", tag = "roles",
    params(
        ("id" = String, Path, description = "The role's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 204, description = "It is gone."),
        (status = 404, description = "There is no such role.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "Somebody has it, or it is built in.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<RoleId>,
    conditions: Conditions,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = role::delete(&mut tx, caller.manager(), &id, &conditions.versions()).await?;
    tx.commit(Entry::of("role.delete", &id).before(&RoleBody::new(old))).await?;
    Ok(StatusCode::NO_CONTENT)
}
