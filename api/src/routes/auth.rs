//! Logging in, and who one is then.

use axum::extract::State;
use fleet_core::config::Secret;
use fleet_core::login_session::{self, Method, Origin};
use fleet_core::policy::Permission;
use fleet_core::{Error, user};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{Caller, Json};
use crate::problem::{Document, Problem};
use crate::state::App;

/// Who wants in.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Login {
    /// The user's e-mail address.
    #[schema(example = "admin@example.com")]
    email: String,
    /// The password.
    #[schema(value_type = String, format = Password)]
    password: Secret,
}

/// An access token (RFC 6750), to be sent as `Authorization: Bearer …`.
#[derive(Serialize, ToSchema)]
pub(crate) struct LoggedIn {
    /// The token.
    access_token: String,
    /// Always `Bearer`.
    token_type: &'static str,
    /// How long it is accepted, in seconds.
    expires_in: u64,
}

/// Log in
#[utoipa::path(
    post, path = "/api/v1/auth/login", tag = "auth", request_body = Login, security(),
    responses(
        (status = 200, description = "The password is right.", body = LoggedIn),
        (status = 401, description = "It is not, or there is no such user; which, is not said.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many logins at once: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn login(State(app): State<App>, Json(login): Json<Login>) -> Result<Json<LoggedIn>, Problem> {
    let user = app.logins.login(&app.db, &login.email, &login.password).await.inspect_err(|error| {
        if matches!(error, Error::Busy(_)) {
            app.metrics.logins_busy.inc();
        }
    })?;
    let mut tx = app.begin().await?;
    let from = Origin::default();
    let begun = login_session::begin(&mut tx, user.id, Method::Password, &from, &app.auth, app.clock.now()).await?;
    tx.commit().await?;
    let token = app.keys.sign(&begun.0)?;
    let access_token = token.token.expose().to_owned();
    Ok(Json(LoggedIn { access_token, token_type: "Bearer", expires_in: token.expires_in_s }))
}

/// The user behind the access token or API key.
#[derive(Serialize, ToSchema)]
pub(crate) struct Me {
    /// The user's id.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: String,
    /// The user's e-mail address.
    email: String,
    /// The tenant the user belongs to.
    #[schema(example = "main")]
    tenant: String,
    /// The role of the user or of the API key; null: none.
    #[schema(example = "admin")]
    role: Option<String>,
    /// Whether the caller has platform standing.
    platform: bool,
    /// The API key, when one was shown in place of an access token.
    #[schema(example = "key_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    api_key: Option<String>,
    /// What the caller may do.
    #[schema(example = json!(["devices:read"]))]
    permissions: Vec<&'static str>,
}

/// Who I am and what I may do
#[utoipa::path(
    get, path = "/api/v1/me", tag = "auth",
    responses((status = 200, description = "The user behind the access token.", body = Me))
)]
pub(crate) async fn me(State(app): State<App>, caller: Caller) -> Result<Json<Me>, Problem> {
    let user = user::find(&mut *caller.read_self(&app).await?, caller.id).await?;
    let user = user.ok_or(Error::BadToken("its user is gone or disabled"))?;
    let permissions = caller.permissions().into_iter().map(Permission::name).collect();
    Ok(Json(Me {
        id: user.id.to_string(),
        email: user.email,
        tenant: user.tenant.to_string(),
        role: caller.role().map(str::to_owned),
        platform: caller.manager().platform,
        api_key: caller.key.map(|key| key.to_string()),
        permissions,
    }))
}
