//! API keys: the secrets of programs.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::api_key::{self, ApiKey, NewApiKey};
use fleet_core::audit::Entry;
use fleet_core::id::{ApiKeyId, RoleId, UserId};
use fleet_core::scope::Scope;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Json, Once, Path, Query};
use crate::page::{Cursor, Page, Paging, PagingQuery};
use crate::problem::{Document, Problem};
use crate::routes::bindings::ScopeBody;
use crate::state::App;
use crate::time;

/// An API key without its secret.
#[derive(Serialize, ToSchema)]
#[schema(as = ApiKey)]
pub(crate) struct ApiKeyBody {
    /// The key's id.
    #[schema(value_type = String, example = "key_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: ApiKeyId,
    /// What people call it.
    #[schema(example = "order service")]
    name: String,
    /// The user who made it, and with whom it ends.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    user: UserId,
    /// Its role.
    #[schema(example = "order-service")]
    role: String,
    /// For which devices it has the role.
    #[schema(value_type = ScopeBody)]
    scope: Scope,
    /// When it was made.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// It is refused from then on; null: never.
    #[serde(serialize_with = "time::serialize_maybe")]
    expires_at: Option<DateTime<Utc>>,
}

impl ApiKeyBody {
    fn new(key: ApiKey) -> Self {
        let ApiKey { id, name, user, role, scope, created_at, expires_at } = key;
        Self { id, name, user, role, scope, created_at, expires_at }
    }
}

/// An API key that was just made.
#[derive(Serialize, ToSchema)]
#[schema(as = NewApiKey)]
pub(crate) struct MadeApiKey {
    #[serde(flatten)]
    key: ApiKeyBody,
    /// To be sent as `Authorization: Bearer …`, or as the MQTT password; shown this once. Null when the request is a
    /// repetition of an earlier one.
    #[schema(example = "mk_…")]
    secret: Option<String>,
}

/// An API key to be made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MakeApiKey {
    /// What people call it.
    #[schema(example = "order service", min_length = 1, max_length = 100)]
    name: String,
    /// A built-in role, or the name of one that was made.
    #[schema(value_type = String, example = "order-service")]
    role: RoleId,
    /// For which devices it shall have the role; left out: the whole tenant.
    #[serde(default)]
    #[schema(value_type = ScopeBody)]
    scope: Scope,
    /// How long it is accepted, in seconds. Left out: as long as the server's settings allow, a year by default.
    #[schema(example = 2_592_000, minimum = 1)]
    expires_in_s: Option<u64>,
}

/// Make an API key
///
/// In the caller's name: it ends when the caller is deleted or disabled, and never does more than the caller may do at the
/// moment. The secret is shown this once.
#[utoipa::path(
    post, path = "/api/v1/api-keys", tag = "api-keys", request_body = MakeApiKey,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 201, description = "It was made. The secret is shown this once.", body = MadeApiKey),
        (status = 403, description = "The role allows more than the caller may do in that scope.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such role.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "There are too many API keys.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<AccessManage>,
    once: Once,
    Json(request): Json<MakeApiKey>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let MakeApiKey { name, role, scope, expires_in_s } = request;
    let new = NewApiKey { name, role, scope, expires_in_s };
    let (key, secret) = api_key::create(&mut tx, caller.manager(), caller.id, &new, &app.auth, app.clock.now()).await?;
    let mut body = MadeApiKey { key: ApiKeyBody::new(key), secret: None };
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("api-key.create", body.key.id).after(&body)).await?;
    body.secret = Some(secret.expose().to_owned());
    Ok((StatusCode::CREATED, [(header::LOCATION, location(&body.key.id.to_string()))], Json(body)).into_response())
}

fn location(id: &str) -> String {
    format!("/api/v1/api-keys/{id}")
}

/// List API keys
///
/// Those of all users of the tenant, in the order they were made; ended ones too, until they are deleted.
#[utoipa::path(
    get, path = "/api/v1/api-keys", tag = "api-keys", params(PagingQuery), security(("bearer" = ["access:manage"])),
    responses((status = 200, description = "A page of them.", body = Page<ApiKeyBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Query(query): Query<Paging<ApiKeyId>>,
) -> Result<Json<Page<ApiKeyBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let (keys, next) = api_key::page(&mut db, caller.tenant, query.after, query.limit).await?;
    let items = keys.into_iter().map(ApiKeyBody::new).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::ApiKey) }))
}

/// Delete an API key
///
/// It is refused from now on, and open connections end.
#[utoipa::path(
    delete, path = "/api/v1/api-keys/{id}", tag = "api-keys",
    params(("id" = String, Path, description = "The key's id")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 204, description = "It is gone."),
        (status = 404, description = "There is no such key.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<ApiKeyId>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = api_key::delete(&mut tx, caller.manager(), id).await?;
    tx.commit(Entry::of("api-key.delete", id).before(&ApiKeyBody::new(old))).await?;
    Ok(StatusCode::NO_CONTENT)
}
