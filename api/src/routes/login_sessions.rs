//! Login sessions: where somebody is logged in, and the end of that.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::id::{LoginSessionId, UserId};
use fleet_core::login_session::{self, LoginSession};
use fleet_core::user;
use serde::Serialize;
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Json, Path, Person};
use crate::page::Page;
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// A login that has not ended.
#[derive(Serialize, ToSchema)]
#[schema(as = LoginSession)]
pub(crate) struct LoginSessionBody {
    /// Names the login.
    #[schema(value_type = String, example = "lgs_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: LoginSessionId,
    /// Whether it is the one this request belongs to.
    current: bool,
    /// By what the user logged in: `password`, `oidc`.
    #[schema(example = "password")]
    method: &'static str,
    /// From where.
    #[schema(example = "192.0.2.7")]
    address: Option<String>,
    /// With what program, as that calls itself.
    #[schema(example = "Mozilla/5.0 …")]
    user_agent: Option<String>,
    /// When it began.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// When it was last refreshed, or began.
    #[serde(serialize_with = "time::serialize")]
    last_used_at: DateTime<Utc>,
    /// It ends then unless it is refreshed before.
    #[serde(serialize_with = "time::serialize")]
    expires_at: DateTime<Utc>,
}

impl LoginSessionBody {
    fn new(session: LoginSession, current: Option<LoginSessionId>) -> Self {
        let LoginSession { id, method, address, user_agent, created_at, last_used_at, expires_at, .. } = session;
        let (current, method) = (current == Some(id), method.name());
        Self { id, current, method, address, user_agent, created_at, last_used_at, expires_at }
    }
}

/// Where I am logged in
///
/// The last used first; their number is bounded by `auth.max_sessions`.
#[utoipa::path(
    get, path = "/api/v1/auth/sessions", tag = "auth",
    responses((status = 200, description = "All of them.", body = Page<LoginSessionBody>))
)]
pub(crate) async fn list_mine(State(app): State<App>, person: Person) -> Result<Json<Page<LoginSessionBody>>, Problem> {
    let sessions = login_session::list(&mut *person.read_self(&app).await?, person.id, app.clock.now()).await?;
    let body = |session| LoginSessionBody::new(session, Some(person.session));
    Ok(Json(Page::whole(sessions.into_iter().map(body).collect())))
}

/// End one of my logins
///
/// Its access tokens, its refresh token, and MQTT connections that came by them end with it.
#[utoipa::path(
    delete, path = "/api/v1/auth/sessions/{id}", tag = "auth",
    params(("id" = String, Path, description = "The login's id")),
    responses(
        (status = 204, description = "It has ended."),
        (status = 404, description = "The caller has no such login.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn end_mine(
    State(app): State<App>,
    person: Person,
    Path(id): Path<LoginSessionId>,
) -> Result<StatusCode, Problem> {
    let mut tx = person.change_self(&app).await?;
    login_session::end(&mut tx, person.id, id).await?;
    tx.commit(Entry::of("login-session.end", id)).await?;
    app.metrics.sessions_ended.with_label_values(&["logout"]).inc();
    Ok(StatusCode::NO_CONTENT)
}

/// Log out everywhere
///
/// Ends all logins of the caller, this one too. API keys stay.
#[utoipa::path(
    post, path = "/api/v1/auth/logout-all", tag = "auth",
    responses((status = 204, description = "They have ended."))
)]
pub(crate) async fn logout_all(State(app): State<App>, person: Person) -> Result<StatusCode, Problem> {
    let mut tx = person.change_self(&app).await?;
    let ended = login_session::end_all(&mut tx, person.id, None).await?;
    tx.commit(Entry::of("user.log-out", person.id)).await?;
    app.metrics.sessions_ended.with_label_values(&["logout"]).inc_by(ended);
    Ok(StatusCode::NO_CONTENT)
}

/// Where a user is logged in
///
/// The last used first.
#[utoipa::path(
    get, path = "/api/v1/users/{id}/sessions", tag = "users", security(("bearer" = ["access:manage"])),
    params(("id" = String, Path, description = "The user's id")),
    responses(
        (status = 200, description = "All of them.", body = Page<LoginSessionBody>),
        (status = 403, description = "Who has platform standing is for those who have it.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
) -> Result<Json<Page<LoginSessionBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    user::manageable(&mut db, caller.manager(), id).await?;
    let sessions = login_session::list(&mut db, id, app.clock.now()).await?;
    Ok(Json(Page::whole(sessions.into_iter().map(|session| LoginSessionBody::new(session, None)).collect())))
}

/// Log a user out everywhere
///
/// Ends all logins of the user. API keys stay: disable the user to stop them too.
#[utoipa::path(
    delete, path = "/api/v1/users/{id}/sessions", tag = "users", security(("bearer" = ["access:manage"])),
    params(("id" = String, Path, description = "The user's id")),
    responses(
        (status = 204, description = "They have ended."),
        (status = 403, description = "Who has platform standing is for those who have it.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn end(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    user::manageable(&mut tx, caller.manager(), id).await?;
    let ended = login_session::end_all(&mut tx, id, None).await?;
    tx.commit(Entry::of("user.log-out", id)).await?;
    app.metrics.sessions_ended.with_label_values(&["admin"]).inc_by(ended);
    Ok(StatusCode::NO_CONTENT)
}
