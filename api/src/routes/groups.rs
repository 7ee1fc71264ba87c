//! Groups: where devices belong, as a tree of paths.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::device::GroupPath;
use fleet_core::group::{self, Group, Moved};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, DevicesRead, DevicesWrite, FromQuery, Json, MergePatch, Once, Params, Path, Query};
use crate::page::{Cursor, Page, Paging};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// A group.
#[derive(Serialize, ToSchema)]
#[schema(as = Group)]
pub(crate) struct GroupBody {
    /// Names it.
    #[schema(value_type = String, example = "site/line-3")]
    path: GroupPath,
    /// Devices in it that the caller may see, those in groups below it left out.
    #[schema(example = 12)]
    devices: i64,
    /// Devices in it and below it that the caller may see.
    #[schema(example = 40)]
    devices_below: i64,
    /// When somebody made it; null: it is there because of what is in it.
    #[serde(serialize_with = "time::serialize_maybe")]
    created_at: Option<DateTime<Utc>>,
}

impl GroupBody {
    fn new(group: Group) -> Self {
        let Group { path, devices, devices_below, created_at } = group;
        Self { path, devices, devices_below, created_at }
    }
}

/// A group to be made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewGroup {
    /// Names joined by `/`, each 1 to 64 of `A-Z a-z 0-9 . _ -` and not beginning with `_`; at most 255 bytes.
    #[schema(value_type = String, example = "site/line-3")]
    path: GroupPath,
}

/// Where a group is to be.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MoveGroup {
    /// Its new path, at which nothing may be.
    #[schema(value_type = String, example = "site/line-4")]
    path: GroupPath,
}

/// A group that was moved.
#[derive(Serialize, ToSchema)]
pub(crate) struct MovedGroup {
    /// As it is now.
    #[serde(flatten)]
    group: GroupBody,
    /// What went along with it.
    moved: MovedBody,
}

/// What went along with a group.
#[derive(Serialize, ToSchema)]
#[schema(as = Moved)]
pub(crate) struct MovedBody {
    /// Devices.
    #[schema(example = 40)]
    devices: u64,
    /// Bindings about it or a group below it.
    bindings: u64,
    /// API keys about it or a group below it.
    api_keys: u64,
    /// Claims whose devices come into it.
    claims: u64,
}

impl MovedBody {
    fn new(moved: Moved) -> Self {
        let Moved { devices, bindings, api_keys, claims } = moved;
        Self { devices, bindings, api_keys, claims }
    }
}

/// Which groups.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `List` reads, as the document tells it")]
pub(crate) struct GroupsQuery {
    /// This group and those below it.
    under: Option<String>,
    /// Items on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct List {
    under: Option<GroupPath>,
    paging: Paging<GroupPath>,
}

impl FromQuery for List {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let under = query.one("under");
        Some(Self { under, paging: Paging::from_query(query)? })
    }
}

/// List groups
///
/// By path, so that each stands before those below it; with the devices that the caller may see in it.
#[utoipa::path(
    get, path = "/api/v1/groups", tag = "groups", params(GroupsQuery), security(("bearer" = ["devices:read"])),
    responses((status = 200, description = "A page of them.", body = Page<GroupBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<DevicesRead>,
    Query(List { under, paging }): Query<List>,
) -> Result<Json<Page<GroupBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let (groups, next) =
        group::page(&mut db, caller.tenant, under.as_ref(), paging.after.as_ref(), paging.limit).await?;
    let items = groups.into_iter().map(GroupBody::new).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::Group) }))
}

/// Make a group
///
/// It stays when no device is in it. A group that devices are put into need not be made.
#[utoipa::path(
    post, path = "/api/v1/groups", tag = "groups", request_body = NewGroup,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["devices:write"])),
    responses(
        (status = 201, description = "It was made.", body = GroupBody, headers(("Location" = String, description = "Where the group is."))),
        (status = 403, description = "It is beyond the caller's scope.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "There is one already, or there are too many.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<DevicesWrite>,
    once: Once,
    Json(request): Json<NewGroup>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/path", location)),
    };
    let most = app.provisioning.max_groups;
    let made = group::create(&mut tx, caller.principal(), &request.path, most, app.clock.now()).await?;
    let body = GroupBody::new(made);
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("group.create", &request.path).after(&body)).await?;
    Ok((StatusCode::CREATED, [(header::LOCATION, location(request.path.as_str()))], Json(body)).into_response())
}

fn location(path: &str) -> String {
    format!("/api/v1/groups/{}", path.replace('/', "%2F"))
}

/// Read a group
#[utoipa::path(
    get, path = "/api/v1/groups/{path}", tag = "groups",
    params(("path" = String, Path, description = "The group's path, with %2F for /")),
    security(("bearer" = ["devices:read"])),
    responses(
        (status = 200, description = "The group.", body = GroupBody),
        (status = 404, description = "There is no such group.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<DevicesRead>,
    Path(path): Path<GroupPath>,
) -> Result<Json<GroupBody>, Problem> {
    let mut db = caller.read(&app).await?;
    Ok(Json(GroupBody::new(group::find(&mut db, caller.tenant, &path).await?)))
}

/// Move or rename a group
///
/// With all that is below it: its devices, bindings, API keys and claims follow, at once and for open connections too. The caller
/// must reach both places as a whole, nothing may be at the new one, and the caller may not gain a right by it.
#[utoipa::path(
    patch, path = "/api/v1/groups/{path}", tag = "groups",
    request_body(content = MoveGroup, content_type = "application/merge-patch+json"),
    params(("path" = String, Path, description = "The group's path, with %2F for /")),
    security(("bearer" = ["devices:write"])),
    responses(
        (status = 200, description = "The group as it is now.", body = MovedGroup),
        (status = 403, description = "One of the places is beyond the caller's scope, or the caller would gain a right.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such group.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "Something is at the new path.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn relocate(
    State(app): State<App>,
    caller: Can<DevicesWrite>,
    Path(path): Path<GroupPath>,
    MergePatch(MoveGroup { path: to }): MergePatch<MoveGroup>,
) -> Result<Json<MovedGroup>, Problem> {
    let mut tx = caller.change(&app).await?;
    let (old, new, moved) = group::relocate(&mut tx, caller.principal(), &path, &to, app.clock.now()).await?;
    let body = MovedGroup { group: GroupBody::new(new), moved: MovedBody::new(moved) };
    tx.commit(Entry::of("group.move", &path).before(&GroupBody::new(old)).after(&body)).await?;
    Ok(Json(body))
}

/// Delete a group
///
/// Only when no device and no group is in it, and no binding, API key or claim is about it.
#[utoipa::path(
    delete, path = "/api/v1/groups/{path}", tag = "groups",
    params(("path" = String, Path, description = "The group's path, with %2F for /")),
    security(("bearer" = ["devices:write"])),
    responses(
        (status = 204, description = "It is gone."),
        (status = 403, description = "It is beyond the caller's scope.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such group.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is not empty.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<DevicesWrite>,
    Path(path): Path<GroupPath>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = group::delete(&mut tx, caller.principal(), &path).await?;
    tx.commit(Entry::of("group.delete", &path).before(&GroupBody::new(old))).await?;
    Ok(StatusCode::NO_CONTENT)
}
