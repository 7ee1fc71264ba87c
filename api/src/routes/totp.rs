//! The second factor: one-time passwords by time, and the recovery codes that stand in for them.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::config::Secret;
use fleet_core::id::UserId;
use fleet_core::{Error, totp, user};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::client::Client;
use crate::extract::{AccessManage, Can, Json, Path, Person};
use crate::problem::{Document, Problem};
use crate::routes::auth::check_again;
use crate::state::App;
use crate::time;

/// Whether a code is asked for at logins.
#[derive(Default, Serialize, ToSchema)]
pub(crate) struct TotpState {
    /// Whether there is an authenticator.
    on: bool,
    /// Since when.
    #[serde(serialize_with = "time::serialize_maybe")]
    confirmed_at: Option<DateTime<Utc>>,
    /// Recovery codes that were not used yet.
    recovery_codes: i64,
}

/// My authenticator
#[utoipa::path(
    get, path = "/api/v1/auth/totp", tag = "auth",
    responses((status = 200, description = "Whether there is one, and how many recovery codes are left.", body = TotpState))
)]
pub(crate) async fn read(State(app): State<App>, person: Person) -> Result<Json<TotpState>, Problem> {
    let state = totp::find(&mut *person.read_self(&app).await?, person.id).await?;
    Ok(Json(state.map_or_else(TotpState::default, |state| TotpState {
        on: true,
        confirmed_at: Some(state.confirmed_at),
        recovery_codes: state.recovery_codes,
    })))
}

/// The password once more, since a token may be in other hands.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Reauthentication {
    /// The caller's password.
    #[schema(value_type = String, format = Password)]
    password: Secret,
}

/// What the authenticator has to be told.
#[derive(Serialize, ToSchema)]
pub(crate) struct Enrolment {
    /// The secret in base 32, to be typed.
    #[schema(example = "JBSWY3DPEHPK3PXP")]
    secret: String,
    /// The same, to be drawn as a QR code.
    #[schema(example = "otpauth://totp/Muster:ada%40example.com?secret=…&issuer=Muster")]
    url: String,
}

/// Begin with an authenticator
///
/// Nothing is asked for before `POST /auth/totp/confirm` has shown that the authenticator has the secret. It is shown now and never
/// again; asking again brings another one.
#[utoipa::path(
    post, path = "/api/v1/auth/totp", tag = "auth", request_body = Reauthentication,
    responses(
        (status = 200, description = "The secret.", body = Enrolment),
        (status = 403, description = "The password is wrong, or an API key was shown.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "There is an authenticator already.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many passwords at once, or too many that were wrong: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn begin(
    State(app): State<App>,
    person: Person,
    client: Client,
    Json(request): Json<Reauthentication>,
) -> Result<Json<Enrolment>, Problem> {
    let email = check_again(&app, &person, &client, &request.password, None).await?;
    let mut tx = person.change_self(&app).await?;
    let enrolment = totp::begin(&mut tx, app.pki.seal(), person.id, &email, app.clock.now()).await?;
    tx.commit(Entry::of("user.begin-totp", person.id)).await?;
    let [secret, url] = [enrolment.secret, enrolment.url].map(|secret| secret.expose().to_owned());
    Ok(Json(Enrolment { secret, url }))
}

/// A code.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Code {
    /// Six digits of the authenticator.
    #[schema(value_type = String, example = "492039")]
    code: Secret,
}

/// What stands in for a code, once each.
#[derive(Serialize, ToSchema)]
pub(crate) struct RecoveryCodes {
    /// To be kept where the authenticator is not; shown now and never again.
    #[schema(example = json!(["abcd-efgh-ijkl-mnop"]))]
    recovery_codes: Vec<String>,
}

impl RecoveryCodes {
    fn of(codes: &[Secret]) -> Self {
        Self { recovery_codes: codes.iter().map(|code| code.expose().to_owned()).collect() }
    }
}

/// Confirm the authenticator
///
/// From now on a login needs `code` beside the password. Logins that live already go on.
#[utoipa::path(
    post, path = "/api/v1/auth/totp/confirm", tag = "auth", request_body = Code,
    responses(
        (status = 200, description = "It is on; these are the recovery codes.", body = RecoveryCodes),
        (status = 403, description = "The code is wrong, or an API key was shown.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is on already, or was not begun.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn confirm(
    State(app): State<App>,
    person: Person,
    Json(request): Json<Code>,
) -> Result<Json<RecoveryCodes>, Problem> {
    let mut tx = person.change_self(&app).await?;
    let codes = totp::confirm(&mut tx, app.pki.seal(), person.id, request.code.expose(), app.clock.now()).await;
    let codes = codes.map_err(|error| match error {
        // Not 401: the access token is fine.
        Error::BadCode => Problem::new(403, "wrong-code", error.to_string()),
        error => error.into(),
    })?;
    tx.commit(Entry::of("user.confirm-totp", person.id)).await?;
    Ok(Json(RecoveryCodes::of(&codes)))
}

/// Password and code once more, since a token may be in other hands.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct BothFactors {
    /// The caller's password.
    #[schema(value_type = String, format = Password)]
    password: Secret,
    /// A code of the authenticator, or a recovery code.
    #[schema(value_type = String, example = "492039")]
    code: Secret,
}

/// Renew my recovery codes
///
/// Those of before are worth nothing from then on. A wrong password or code counts as a failed login.
#[utoipa::path(
    post, path = "/api/v1/auth/totp/recovery-codes", tag = "auth", request_body = BothFactors,
    responses(
        (status = 200, description = "The codes.", body = RecoveryCodes),
        (status = 403, description = "The password or the code is wrong, or an API key was shown.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "There is no authenticator.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many that were wrong: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn renew_recovery(
    State(app): State<App>,
    person: Person,
    client: Client,
    Json(both): Json<BothFactors>,
) -> Result<Json<RecoveryCodes>, Problem> {
    check_again(&app, &person, &client, &both.password, Some(&both.code)).await?;
    let mut tx = person.change_self(&app).await?;
    let codes = totp::renew_recovery(&mut tx, person.id).await?;
    tx.commit(Entry::of("user.renew-recovery-codes", person.id)).await?;
    Ok(Json(RecoveryCodes::of(&codes)))
}

/// Remove my authenticator
///
/// With the password and a code of it, or a recovery code. A wrong one counts as a failed login.
#[utoipa::path(
    delete, path = "/api/v1/auth/totp", tag = "auth", request_body = BothFactors,
    responses(
        (status = 204, description = "No code is asked for any more."),
        (status = 403, description = "The password or the code is wrong, or an API key was shown.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "There is none.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many that were wrong: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn remove(
    State(app): State<App>,
    person: Person,
    client: Client,
    Json(both): Json<BothFactors>,
) -> Result<StatusCode, Problem> {
    check_again(&app, &person, &client, &both.password, Some(&both.code)).await?;
    let mut tx = person.change_self(&app).await?;
    totp::remove(&mut tx, person.id).await?;
    tx.commit(Entry::of("user.remove-totp", person.id)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Remove a user's authenticator
///
/// For who has lost it and the recovery codes: the password alone is enough from now on. One's own goes by `DELETE /auth/totp`, with the
/// password and a code: an access token may be in other hands.
#[utoipa::path(
    delete, path = "/api/v1/users/{id}/totp", tag = "users", security(("bearer" = ["access:manage"])),
    params(("id" = String, Path, description = "The user's id")),
    responses(
        (status = 204, description = "No code is asked for any more."),
        (status = 403, description = "It is the caller's own, or that of who has more than the caller.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such user.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The user has none.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn reset(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<UserId>,
) -> Result<StatusCode, Problem> {
    if id == caller.id {
        return Err(Problem::new(
            403,
            "own-authenticator",
            "expected DELETE /auth/totp for one's own, with the password and a code",
        ));
    }
    let mut tx = caller.change(&app).await?;
    user::manageable(&mut tx, caller.manager(), id).await?;
    if !totp::remove(&mut tx, id).await? {
        return Err(Error::TotpOff.into());
    }
    tx.commit(Entry::of("user.reset-totp", id)).await?;
    Ok(StatusCode::NO_CONTENT)
}
