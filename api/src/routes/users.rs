//! Users: people who log in.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::config::Secret;
use fleet_core::id::{RoleId, UserId};
use fleet_core::user::{self, NewUser, Patch, User};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Conditions, Json, MergePatch, Once, Path, Query, given, not_null};
use crate::page::{Cursor, Page, Paging, PagingQuery};
use crate::problem::{Document, Problem};
use crate::resource::{Resource, current, made, unless_known};
use crate::routes::passwords::hashed;
use crate::state::App;
use crate::time;

/// A user.
#[derive(Serialize, ToSchema)]
#[schema(as = User)]
pub(crate) struct UserBody {
    /// The user's id.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: UserId,
    /// The address the user logs in with.
    #[schema(example = "ada@example.com")]
    email: String,
    /// The role by name; null: may log in and do nothing else.
    #[schema(example = "admin")]
    role: Option<String>,
    /// Whether the user stands above tenants.
    platform: bool,
    /// A disabled user may not log in, and is out at once.
    disabled: bool,
    /// Rises with every change.
    version: i64,
    /// When the user was made.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// When the user was last changed.
    #[serde(serialize_with = "time::serialize")]
    updated_at: DateTime<Utc>,
}

impl UserBody {
    pub(crate) fn new(user: User) -> Self {
        let User { id, email, role, platform, disabled, version, created_at, updated_at, .. } = user;
        Self { id, email, role, platform, disabled, version, created_at, updated_at }
    }
}

impl Resource for UserBody {
    fn tag(&self) -> String {
        format!("\"{}\"", self.version)
    }
}

/// A user to be made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewUserBody {
    /// The address to log in with; it names one user of the whole server.
    #[schema(example = "ada@example.com", max_length = 254)]
    email: String,
    /// The password; left out: the user cannot log in until a link (`POST /users/{id}/password-reset`) was used.
    #[schema(value_type = Option<String>, format = Password, max_length = 1024)]
    password: Option<Secret>,
    /// `admin`, or the name of a role that was made; left out: may log in and do nothing else.
    #[schema(value_type = Option<String>, example = "admin")]
    role: Option<RoleId>,
    /// Whether the user stands above tenants; only who does so may give it, and only with the role `admin`.
    #[serde(default)]
    platform: bool,
    /// Whether the user may not log in yet.
    #[serde(default)]
    disabled: bool,
}

/// Make a user
///
/// In the caller's tenant.
#[utoipa::path(
    post, path = "/api/v1/users", tag = "users", request_body = NewUserBody,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 201, description = "The user was made.", body = UserBody, headers(
            ("Location" = String, description = "Where the user is."),
            ("ETag" = String, description = "For If-Match."),
        )),
        (status = 403, description = "Platform standing is given by those who have it.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such role.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The address is taken, or there are too many users.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many passwords at once: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<AccessManage>,
    once: Once,
    Json(request): Json<NewUserBody>,
) -> Result<Response, Problem> {
    // Before the transaction, so that no connection is held meanwhile.
    let password_hash = match &request.password {
        Some(password) => Some(hashed(&app, password, &request.email).await?),
        None => None,
    };
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let NewUserBody { email, role, platform, disabled, .. } = request;
    let new = NewUser { email, password_hash, role, platform, disabled };
    let user = user::create(&mut tx, caller.manager(), &new, &app.auth, app.clock.now()).await?;
    let body = UserBody::new(user);
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("user.create", body.id).after(&body)).await?;
    Ok(made(location(&body.id.to_string()), body))
}

fn location(id: &str) -> String {
    format!("/api/v1/users/{id}")
}

/// List users
///
/// Those of the caller's tenant, in the order they were made.
#[utoipa::path(
    get, path = "/api/v1/users", tag = "users", params(PagingQuery), security(("bearer" = ["access:manage"])),
    responses((status = 200, description = "A page of them.", body = Page<UserBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Query(query): Query<Paging<UserId>>,
) -> Result<Json<Page<UserBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let (users, next) = user::page(&mut db, caller.tenant, query.after, query.limit).await?;
    let items = users.into_iter().map(UserBody::new).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::User) }))
}

/// Read a user
#[utoipa::path(
    get, path = "/api/v1/users/{id}", tag = "users",
    params(
        ("id" = String, Path, description = "The user's id"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has"),
    ),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The user.", body = UserBody, headers(("ETag" = String, description = "For If-Match and If-None-Match."))),
        (status = 304, description = "The caller has it already."),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let body = UserBody::new(user::find_in(&mut *caller.read(&app).await?, caller.tenant, id).await?);
    Ok(unless_known(&conditions, body))
}

/// What to change (RFC 7396): what is left out stays, null clears.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::option_option, reason = "left out, null, a value")]
pub(crate) struct ChangeUser {
    /// The address to log in with.
    #[serde(default, deserialize_with = "not_null")]
    #[schema(value_type = String)]
    email: Option<String>,
    /// A new password.
    #[serde(default, deserialize_with = "not_null")]
    #[schema(value_type = String, format = Password, max_length = 1024)]
    password: Option<Secret>,
    /// `admin`, or the name of a role that was made; null takes the role.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    role: Option<Option<RoleId>>,
    /// Whether the user stands above tenants; only who does so may give or take it, and only with the role `admin`.
    #[serde(default, deserialize_with = "not_null")]
    #[schema(value_type = bool)]
    platform: Option<bool>,
    /// A disabled user may not log in, and is out at once.
    #[serde(default, deserialize_with = "not_null")]
    #[schema(value_type = bool)]
    disabled: Option<bool>,
}

/// Change a user
///
/// A JSON merge patch. What it takes is taken at once, from open connections and API keys too. With If-Match, only if
/// nobody has changed the user since.
#[utoipa::path(
    patch, path = "/api/v1/users/{id}", tag = "users",
    request_body(content = ChangeUser, content_type = "application/merge-patch+json"),
    params(
        ("id" = String, Path, description = "The user's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The user as it is now.", body = UserBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 403, description = "Who has platform standing, or a role of the platform, is changed by those who have the standing.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user, or no such role.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The address is taken, or no enabled admin would be left.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "The user has changed since.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many passwords at once: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
    conditions: Conditions,
    MergePatch(change): MergePatch<ChangeUser>,
) -> Result<Response, Problem> {
    let ChangeUser { email, password, role, platform, disabled } = change;
    let password_hash = match &password {
        Some(password) => {
            let user = user::find_in(&mut *caller.read(&app).await?, caller.tenant, id).await?;
            Some(hashed(&app, password, email.as_deref().unwrap_or(&user.email)).await?)
        }
        None => None,
    };
    let patch = Patch { email, password_hash, role, platform, disabled };
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let (old, user) = user::update(&mut tx, caller.manager(), id, &patch, &conditions.versions(), now).await?;
    let (old, body) = (UserBody::new(old), UserBody::new(user));
    tx.commit(Entry::of("user.update", id).before(&old).after(&body)).await?;
    Ok(current(body))
}

/// Delete a user
///
/// The user's API keys end with the user.
#[utoipa::path(
    delete, path = "/api/v1/users/{id}", tag = "users",
    params(
        ("id" = String, Path, description = "The user's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 204, description = "The user is gone."),
        (status = 403, description = "Who has platform standing, or a role of the platform, is deleted by those who have the standing.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "No enabled admin would be left.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "The user has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
    conditions: Conditions,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = user::delete(&mut tx, caller.manager(), id, &conditions.versions()).await?;
    tx.commit(Entry::of("user.delete", id).before(&UserBody::new(old))).await?;
    Ok(StatusCode::NO_CONTENT)
}
