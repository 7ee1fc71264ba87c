//! Saved searches: questions to the log that people keep.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::id::SavedSearchId;
use fleet_core::policy::Permission;
use fleet_core::saved_search::{self, By, Said, SavedSearch};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{Can, Conditions, Json, LogsRead, Once, Path, Query};
use crate::page::{Cursor, Page, Paging, PagingQuery};
use crate::problem::{Document, Problem};
use crate::resource::{Resource, current, made, unless_known};
use crate::state::App;
use crate::time;

/// A saved search.
#[derive(Serialize, ToSchema)]
#[schema(as = SavedSearch)]
pub(crate) struct SavedSearchBody {
    /// Names it.
    #[schema(value_type = String, example = "qry_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: SavedSearchId,
    /// What people call it.
    #[schema(example = "Wi-Fi trouble")]
    name: String,
    /// The question, in the query language of logs.
    #[schema(example = "level:>=warn AND target:net.wifi")]
    query: String,
    /// From when on, as it was written.
    #[schema(example = "now-1h")]
    from: Option<String>,
    /// Up to when, as it was written.
    to: Option<String>,
    /// Whether others of the tenant see it.
    shared: bool,
    /// Whether it is the caller's own, and so theirs to change.
    mine: bool,
    /// Rises with every change.
    version: i64,
    /// When it was made.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// When it was last changed.
    #[serde(serialize_with = "time::serialize")]
    updated_at: DateTime<Utc>,
}

impl SavedSearchBody {
    fn new(search: SavedSearch, by: By) -> Self {
        let SavedSearch { id, owner, name, query, from, to, shared, version, created_at, updated_at } = search;
        Self { id, name, query, from, to, shared, mine: owner == by.user, version, created_at, updated_at }
    }
}

impl Resource for SavedSearchBody {
    fn tag(&self) -> String {
        format!("\"{}\"", self.version)
    }
}

/// What a saved search says.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SaveSearch {
    /// What people call it; the caller has no other of that name.
    #[schema(example = "Wi-Fi trouble", min_length = 1, max_length = 100)]
    name: String,
    /// The question, in the query language of logs.
    #[schema(example = "level:>=warn AND target:net.wifi", max_length = 4096)]
    query: String,
    /// From when on: RFC 3339, a day, or such as `now-1h`, which stays relative.
    #[schema(example = "now-1h")]
    from: Option<String>,
    /// Up to when.
    to: Option<String>,
    /// Whether others of the tenant see it.
    #[serde(default)]
    shared: bool,
}

impl SaveSearch {
    fn said(self) -> Said {
        let Self { name, query, from, to, shared } = self;
        Said { name, query, from, to, shared }
    }
}

fn by(caller: &Can<LogsRead>) -> By {
    By { tenant: caller.tenant, user: caller.id }
}

fn location(id: &str) -> String {
    format!("/api/v1/saved-searches/{id}")
}

/// Save a search
///
/// For the caller, or for all of the tenant. It grants nothing: whoever asks it finds what they may see.
#[utoipa::path(
    post, path = "/api/v1/saved-searches", tag = "logs", request_body = SaveSearch,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["logs:read"])),
    responses(
        (status = 201, description = "It was saved.", body = SavedSearchBody, headers(
            ("Location" = String, description = "Where it is."),
            ("ETag" = String, description = "For If-Match."),
        )),
        (status = 400, description = "The query or a time cannot be read.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The caller has one of that name, or the tenant has too many.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<LogsRead>,
    once: Once,
    Json(request): Json<SaveSearch>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let most = app.logs.max_saved_searches;
    let search = saved_search::create(&mut tx, by(&caller), &request.said(), most, app.clock.now()).await?;
    let body = SavedSearchBody::new(search, by(&caller));
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("saved-search.create", body.id).after(&body)).await?;
    Ok(made(location(&body.id.to_string()), body))
}

/// List saved searches
///
/// The caller's own and those that others share, in the order they were made.
#[utoipa::path(
    get, path = "/api/v1/saved-searches", tag = "logs", params(PagingQuery), security(("bearer" = ["logs:read"])),
    responses((status = 200, description = "A page of them.", body = Page<SavedSearchBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(Paging { after, limit }): Query<Paging<SavedSearchId>>,
) -> Result<Json<Page<SavedSearchBody>>, Problem> {
    let (by, mut db) = (by(&caller), caller.read(&app).await?);
    let (found, next) = saved_search::page(&mut db, by, after, limit).await?;
    let items = found.into_iter().map(|search| SavedSearchBody::new(search, by)).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::SavedSearch) }))
}

/// Read a saved search
#[utoipa::path(
    get, path = "/api/v1/saved-searches/{id}", tag = "logs",
    params(
        ("id" = String, Path, description = "Its id"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has"),
    ),
    security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "It.", body = SavedSearchBody, headers(("ETag" = String, description = "For If-Match and If-None-Match."))),
        (status = 304, description = "The caller has it already."),
        (status = 404, description = "There is no such saved search that the caller may see.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Path(id): Path<SavedSearchId>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let mut db = caller.read(&app).await?;
    let search = saved_search::find(&mut db, by(&caller), id).await?;
    Ok(unless_known(&conditions, SavedSearchBody::new(search, by(&caller))))
}

/// Change a saved search
///
/// As a whole, and only one's own. With If-Match, only if nobody has changed it since.
#[utoipa::path(
    put, path = "/api/v1/saved-searches/{id}", tag = "logs", request_body = SaveSearch,
    params(
        ("id" = String, Path, description = "Its id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "As it is now.", body = SavedSearchBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 400, description = "The query or a time cannot be read.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "It is somebody else's.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such saved search that the caller may see.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The caller has another one of that name.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn replace(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Path(id): Path<SavedSearchId>,
    conditions: Conditions,
    Json(request): Json<SaveSearch>,
) -> Result<Response, Problem> {
    let (by, mut tx, now) = (by(&caller), caller.change(&app).await?, app.clock.now());
    let (old, new) = saved_search::replace(&mut tx, by, id, &request.said(), &conditions.versions(), now).await?;
    let (old, body) = (SavedSearchBody::new(old, by), SavedSearchBody::new(new, by));
    tx.commit(Entry::of("saved-search.update", id).before(&old).after(&body)).await?;
    Ok(current(body))
}

/// Delete a saved search
///
/// One's own; with `access:manage`, one that somebody else shares too.
#[utoipa::path(
    delete, path = "/api/v1/saved-searches/{id}", tag = "logs",
    params(
        ("id" = String, Path, description = "Its id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["logs:read"])),
    responses(
        (status = 204, description = "It is gone."),
        (status = 403, description = "It is somebody else's.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such saved search that the caller may see.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Path(id): Path<SavedSearchId>,
    conditions: Conditions,
) -> Result<StatusCode, Problem> {
    let any = caller.needs(Permission::AccessManage).is_ok();
    let mut tx = caller.change(&app).await?;
    let old = saved_search::delete(&mut tx, by(&caller), id, any, &conditions.versions()).await?;
    tx.commit(Entry::of("saved-search.delete", id).before(&SavedSearchBody::new(old, by(&caller)))).await?;
    Ok(StatusCode::NO_CONTENT)
}
