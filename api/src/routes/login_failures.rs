//! Failed logins of a user: why an account has to wait, and its pardon.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::id::UserId;
use fleet_core::{login_failure, user};
use serde::Serialize;
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Json, Path};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// Failed logins of a user since the last one that succeeded.
#[derive(Default, Serialize, ToSchema)]
pub(crate) struct LoginFailures {
    /// How many.
    failures: i32,
    /// When the last one was.
    #[serde(serialize_with = "time::serialize_maybe")]
    tried_at: Option<DateTime<Utc>>,
    /// No login is looked at before.
    #[serde(serialize_with = "time::serialize_maybe")]
    blocked_until: Option<DateTime<Utc>>,
}

/// Failed logins of a user
#[utoipa::path(
    get, path = "/api/v1/users/{id}/login-failures", tag = "users", security(("bearer" = ["access:manage"])),
    params(("id" = String, Path, description = "The user's id")),
    responses(
        (status = 200, description = "How many there were since the last login, and until when the account has to wait.", body = LoginFailures),
        (status = 403, description = "Who has platform standing is for those who have it.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
) -> Result<Json<LoginFailures>, Problem> {
    let mut db = caller.read(&app).await?;
    user::manageable(&mut db, caller.manager(), id).await?;
    let lock = login_failure::find(&mut db, id).await?;
    Ok(Json(lock.map_or_else(LoginFailures::default, |lock| LoginFailures {
        failures: lock.failures,
        tried_at: Some(lock.tried_at),
        blocked_until: Some(lock.blocked_until),
    })))
}

/// Forgive a user's failed logins
///
/// The account has to wait no longer. An address from which too many tries came still has to.
#[utoipa::path(
    delete, path = "/api/v1/users/{id}/login-failures", tag = "users", security(("bearer" = ["access:manage"])),
    params(("id" = String, Path, description = "The user's id")),
    responses(
        (status = 204, description = "They are forgotten."),
        (status = 403, description = "Who has platform standing is for those who have it.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn forgive(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    user::manageable(&mut tx, caller.manager(), id).await?;
    login_failure::forgive(&mut tx, id).await?;
    tx.commit(Entry::of("user.unlock", id)).await?;
    Ok(StatusCode::NO_CONTENT)
}
