//! Passwords: changed by who knows the old one, set anew by a link that an administrator hands out.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::config::Secret;
use fleet_core::id::UserId;
use fleet_core::{Error, login_session, password, password_reset, user};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::client::Client;
use crate::extract::{AccessManage, Can, Json, Path, Person};
use crate::problem::{Document, Problem};
use crate::routes::auth::{check_again, record};
use crate::state::App;
use crate::time;

/// The hash of a password that somebody chose for the user of this address; what was too much at once is counted.
pub(crate) async fn hashed(app: &App, chosen: &Secret, email: &str) -> Result<String, Problem> {
    password::check(chosen, email, &app.auth)?;
    let hash = app.logins.hash(chosen).await.inspect_err(|error| {
        if matches!(error, Error::Busy(_)) {
            app.metrics.logins_busy.inc();
        }
    });
    hash.map_err(Problem::from)
}

/// The old password and the new one.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChangePassword {
    /// The password so far.
    #[schema(value_type = String, format = Password)]
    current: Secret,
    /// The password from now on.
    #[schema(value_type = String, format = Password, max_length = 1024)]
    new: Secret,
}

/// Change my password
///
/// Ends all other logins of the caller; this one stays. A wrong `current` counts as a failed login.
#[utoipa::path(
    post, path = "/api/v1/auth/password", tag = "auth", request_body = ChangePassword,
    responses(
        (status = 204, description = "The new one holds."),
        (status = 400, description = "The new one is too short, or among the first that somebody would try.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "`current` is wrong, or an API key was shown.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many passwords at once, or too many that were wrong: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(app): State<App>,
    person: Person,
    client: Client,
    Json(change): Json<ChangePassword>,
) -> Result<StatusCode, Problem> {
    let email = check_again(&app, &person, &client, &change.current, None).await?;
    let hash = hashed(&app, &change.new, &email).await?;
    let mut tx = person.change_self(&app).await?;
    user::set_password(&mut tx, person.id, &hash, app.clock.now()).await?;
    let ended = login_session::end_all(&mut tx, person.id, Some(person.session)).await?;
    tx.commit(Entry::of("user.change-password", person.id)).await?;
    app.metrics.sessions_ended.with_label_values(&["password"]).inc_by(ended);
    Ok(StatusCode::NO_CONTENT)
}

/// A link to a new password.
#[derive(Serialize, ToSchema)]
pub(crate) struct ResetLink {
    /// For `POST /auth/password-reset`, once; shown now and never again.
    #[schema(example = "mp_…")]
    token: String,
    /// The page that asks for the new password.
    #[schema(example = "https://muster.example.com/password-reset#mp_…")]
    url: String,
    /// It is worth nothing from then on.
    #[serde(serialize_with = "time::serialize")]
    expires_at: DateTime<Utc>,
}

/// Make a link to a new password
///
/// For who forgot theirs, or was invited and has none yet. It works once, until `auth.password_reset_s` have passed or another one
/// was made. The password so far stays until it is used.
#[utoipa::path(
    post, path = "/api/v1/users/{id}/password-reset", tag = "users", security(("bearer" = ["access:manage"])),
    params(("id" = String, Path, description = "The user's id")),
    responses(
        (status = 201, description = "The link; hand it to the user.", body = ResetLink),
        (status = 403, description = "Who has platform standing is for those who have it.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn issue_reset(
    State(app): State<App>,
    caller: Can<AccessManage>,
    client: Client,
    Path(id): Path<UserId>,
) -> Result<(StatusCode, Json<ResetLink>), Problem> {
    let mut tx = caller.change(&app).await?;
    let issued = password_reset::issue(&mut tx, caller.manager(), id, &app.auth, app.clock.now()).await?;
    tx.commit(Entry::of("user.issue-password-reset", id)).await?;
    let token = issued.token.expose().to_owned();
    // Behind the hash no browser sends it anywhere, so it is in no proxy's log.
    let url = client.link(&format!("/password-reset#{token}"));
    Ok((StatusCode::CREATED, Json(ResetLink { token, url, expires_at: issued.expires_at })))
}

/// The secret of a link, and the new password.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResetPassword {
    /// The token of the link.
    #[schema(value_type = String)]
    token: Secret,
    /// The password from now on.
    #[schema(value_type = String, format = Password, max_length = 1024)]
    new_password: Secret,
}

/// Set a new password by a link
///
/// Ends all logins of the user and forgives failed ones. It logs nobody in, and a second factor stays.
#[utoipa::path(
    post, path = "/api/v1/auth/password-reset", tag = "auth", request_body = ResetPassword, security(),
    responses(
        (status = 204, description = "The new one holds: log in."),
        (status = 400, description = "The new one is too short, or among the first that somebody would try. The link still works.", body = Document, content_type = "application/problem+json"),
        (status = 401, description = "The link has been used or has expired.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many passwords at once: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn reset(
    State(app): State<App>,
    client: Client,
    Json(request): Json<ResetPassword>,
) -> Result<StatusCode, Problem> {
    let (token, now) = (request.token.expose(), app.clock.now());
    let pending = password_reset::find(&mut *app.db.acquire().await?, token, now).await?;
    // Before the transaction, so that no connection is held meanwhile.
    let hash = hashed(&app, &request.new_password, &pending.email).await?;
    let mut tx = app.begin().await?;
    let user = password_reset::redeem(&mut tx, token, &hash, now).await?;
    record(&app, &mut tx, &client, user, Entry::of("user.reset-password", user)).await?;
    tx.commit().await?;
    Ok(StatusCode::NO_CONTENT)
}
