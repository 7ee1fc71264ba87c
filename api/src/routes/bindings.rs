//! Bindings: who has which role for which devices.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::binding::{self, Binding, NewBinding};
use fleet_core::id::{BindingId, RoleId, UserId};
use fleet_core::scope::Scope;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{AccessManage, Can, FromQuery, Json, Once, Params, Path, Query};
use crate::page::{Cursor, Page, Paging};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// Which devices a binding or an API key is about.
#[derive(ToSchema)]
#[schema(as = Scope)]
#[expect(dead_code, reason = "`Scope`, as the document tells it")]
pub(crate) struct ScopeBody {
    /// `tenant`: all of it; `group`: a group and all below it; `selector`: the devices that it picks.
    #[schema(example = "group", pattern = "^(tenant|group|selector)$")]
    kind: String,
    /// With `group`: its path.
    #[schema(example = "site/line-3")]
    group: Option<String>,
    /// With `selector`: such as `type:freezer AND label.site:oslo`.
    selector: Option<String>,
}

/// A binding.
#[derive(Serialize, ToSchema)]
#[schema(as = Binding)]
pub(crate) struct BindingBody {
    /// The binding's id.
    #[schema(value_type = String, example = "bnd_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    pub(crate) id: BindingId,
    /// Who has the role.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    user: UserId,
    /// The role.
    #[schema(example = "operator")]
    role: String,
    /// For which devices.
    #[schema(value_type = ScopeBody)]
    scope: Scope,
    /// When it was made.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
}

impl BindingBody {
    fn new(binding: Binding) -> Self {
        let Binding { id, user, role, scope, created_at } = binding;
        Self { id, user, role, scope, created_at }
    }
}

/// A binding to be made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewBindingBody {
    /// Who shall have the role.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    pub(crate) user: UserId,
    /// The role: a built-in one, or one that was made.
    #[schema(value_type = String, example = "operator")]
    pub(crate) role: RoleId,
    /// For which devices; left out: the whole tenant.
    #[serde(default)]
    #[schema(value_type = ScopeBody)]
    pub(crate) scope: Scope,
}

/// Give a user a role for some devices
///
/// Beside the role that the user has itself. It holds at once, for open connections too. Nobody gives more than they have.
#[utoipa::path(
    post, path = "/api/v1/bindings", tag = "bindings", request_body = NewBindingBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 201, description = "The binding was made.", body = BindingBody, headers(("Location" = String, description = "Where the binding is."))),
        (status = 403, description = "The role allows more than the caller may do in that scope.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user, or no such role.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "There is one like it, or there are too many.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<AccessManage>,
    once: Once,
    Json(request): Json<NewBindingBody>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let NewBindingBody { user, role, scope } = request;
    let new = NewBinding { user, role, scope };
    let binding = binding::create(&mut tx, caller.manager(), &new, &app.auth, app.clock.now()).await?;
    let body = BindingBody::new(binding);
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("binding.create", body.id).after(&body)).await?;
    Ok((StatusCode::CREATED, [(header::LOCATION, location(&body.id.to_string()))], Json(body)).into_response())
}

fn location(id: &str) -> String {
    format!("/api/v1/bindings/{id}")
}

/// Which bindings.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Filter` reads, as the document tells it")]
pub(crate) struct BindingsQuery {
    /// Only those of this user.
    user: Option<String>,
    /// Items on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct Filter {
    user: Option<UserId>,
    paging: Paging<BindingId>,
}

impl FromQuery for Filter {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let user = query.one("user");
        Some(Self { user, paging: Paging::from_query(query)? })
    }
}

/// List bindings
///
/// Those of the tenant, in the order they were made. The roles that users have themselves are no bindings.
#[utoipa::path(
    get, path = "/api/v1/bindings", tag = "bindings", params(BindingsQuery), security(("bearer" = ["access:manage"])),
    responses((status = 200, description = "A page of them.", body = Page<BindingBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Query(Filter { user, paging }): Query<Filter>,
) -> Result<Json<Page<BindingBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let (bindings, next) = binding::page(&mut db, caller.tenant, user, paging.after, paging.limit).await?;
    let items = bindings.into_iter().map(BindingBody::new).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::Binding) }))
}

/// Read a binding
#[utoipa::path(
    get, path = "/api/v1/bindings/{id}", tag = "bindings",
    params(("id" = String, Path, description = "The binding's id")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The binding.", body = BindingBody),
        (status = 404, description = "There is no such binding.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<BindingId>,
) -> Result<Json<BindingBody>, Problem> {
    let mut db = caller.read(&app).await?;
    Ok(Json(BindingBody::new(binding::find(&mut db, caller.tenant, id).await?)))
}

/// Take a role away
///
/// The user is held to it at once, on open connections too.
#[utoipa::path(
    delete, path = "/api/v1/bindings/{id}", tag = "bindings",
    params(("id" = String, Path, description = "The binding's id")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 204, description = "It is gone."),
        (status = 403, description = "It gives more than the caller has.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such binding.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<BindingId>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = binding::delete(&mut tx, caller.manager(), id).await?;
    tx.commit(Entry::of("binding.delete", id).before(&BindingBody::new(old))).await?;
    Ok(StatusCode::NO_CONTENT)
}
