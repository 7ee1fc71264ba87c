//! Logging in, staying in, logging out, and who one is meanwhile.

use std::collections::BTreeMap;

use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use fleet_core::audit::{self, Actor, Entry};
use fleet_core::config::Secret;
use fleet_core::id::{LoginSessionId, UserId};
use fleet_core::login_failure::{self, Attempt};
use fleet_core::login_session::{self, LoginSession, Method, Refresh};
use fleet_core::policy::{Home, Permission, Role};
use fleet_core::scope::{Conjunction, Extent};
use fleet_core::totp::{self, Taken};
use fleet_core::{Error, user};
use serde::{Deserialize, Serialize};
use serde_json::json;
use sqlx::PgConnection;
use utoipa::ToSchema;

use crate::client::Client;
use crate::extract::{Caller, Json, MaybeJson, Person};
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
    /// A code of the authenticator, or a recovery code, when the user has one.
    #[serde(default)]
    #[schema(value_type = Option<String>, example = "492039")]
    code: Option<Secret>,
    /// Whether the refresh token is set as a cookie, for browsers; else it is in the answer, for programs.
    #[serde(default = "yes")]
    cookie: bool,
}

fn yes() -> bool {
    true
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
    /// For the next `POST /auth/refresh`, once; not there when it is a cookie.
    #[serde(skip_serializing_if = "Option::is_none")]
    refresh_token: Option<String>,
}

/// Log in
///
/// The answer holds an access token; with it comes a refresh token, as a cookie that scripts cannot read.
#[utoipa::path(
    post, path = "/api/v1/auth/login", tag = "auth", request_body = Login, security(),
    responses(
        (status = 200, description = "The password is right.", body = LoggedIn, headers(
            ("Set-Cookie" = Option<String>, description = "The refresh token, unless `cookie` is false."),
        )),
        (status = 401, description = "It is not, or there is no such user; which, is not said. Or it is, and a code is needed (`totp-required`) or wrong (`bad-code`).", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "A page of another site sent the request.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many logins at once, or too many that failed: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn login(
    State(app): State<App>,
    client: Client,
    Json(login): Json<Login>,
) -> Result<Response, Problem> {
    let attempt = attempt(&app, &client, &login.email).await?;
    let user = match app.logins.login(&app.db, &login.email, &login.password).await {
        Ok(user) => user,
        Err(error) => return Err(failed(&app, &client, &login.email, attempt, error).await?),
    };
    if let Err(error) = second_factor(&app, &client, user.id, login.code.as_ref()).await {
        return Err(failed(&app, &client, &login.email, attempt, error).await?);
    }
    let (mut tx, now) = (app.begin().await?, app.clock.now());
    let origin = client.origin();
    let (session, token, ended) =
        login_session::begin(&mut tx, user.id, Method::Password, &origin, &app.auth, now).await?;
    login_failure::succeeded(&mut tx, attempt, now).await?;
    record(&app, &mut tx, &client, user.id, log_in(&session)).await?;
    tx.commit().await?;
    app.metrics.sessions_ended.with_label_values(&["limit"]).inc_by(ended);
    logged_in(&app, &client, &session, &token, login.cookie).await
}

/// What is written down of a login.
pub(crate) fn log_in(session: &LoginSession) -> Entry {
    Entry::of("user.log-in", session.user)
        .after(&json!({ "method": session.method.name(), "session": session.id.to_string() }))
}

/// Writes down what a user did who has no access token, last in the transaction.
pub(crate) async fn record(
    app: &App,
    db: &mut PgConnection,
    client: &Client,
    user: UserId,
    entry: Entry,
) -> Result<(), Problem> {
    let tenant = user::tenant(db, user).await?;
    app.record(db, &client.author(tenant, Actor::User(user)), &[entry]).await
}

/// Takes the code of a user who needs one.
async fn second_factor(app: &App, client: &Client, user: UserId, code: Option<&Secret>) -> fleet_core::Result<()> {
    if totp::find(&mut *app.db.acquire().await?, user).await?.is_none() {
        return Ok(());
    }
    take_code(app, client, user, code.ok_or(Error::TotpRequired)?).await
}

/// Takes a code, which is worth nothing from then on, whatever comes of the rest.
async fn take_code(app: &App, client: &Client, user: UserId, code: &Secret) -> fleet_core::Result<()> {
    let (mut tx, now) = (app.begin().await?, app.clock.now());
    if totp::verify(&mut tx, app.pki.seal(), user, code.expose(), now).await? == Taken::RecoveryCode {
        let left = totp::find(&mut tx, user).await?.map(|state| state.recovery_codes);
        let entry = Entry::of("user.use-recovery-code", user).after(&json!({ "recovery_codes": left }));
        let tenant = user::tenant(&mut tx, user).await?;
        audit::record(&mut tx, &client.author(tenant, Actor::User(user)), &entry, now).await?;
    }
    Ok(tx.commit().await?)
}

/// Asks a caller for the password once more, and where one is given for a code, since a token may be in other hands; answers
/// the caller's address. It forgives no earlier failures: who has the token and the password would guess codes for ever.
pub(crate) async fn check_again(
    app: &App,
    person: &Person,
    client: &Client,
    password: &Secret,
    code: Option<&Secret>,
) -> Result<String, Problem> {
    let user = user::find(&mut *person.read_self(app).await?, person.id).await?;
    let email = user.ok_or(Error::NoSuchUser(person.id))?.email;
    let tried = attempt(app, client, &email).await?;
    let checked = async {
        app.logins.login(&app.db, &email, password).await?;
        match code {
            Some(code) => take_code(app, client, person.id, code).await,
            None => Ok(()),
        }
    };
    let Err(error) = checked.await else {
        take_back(app, tried).await?;
        return Ok(email);
    };
    // Not 401: the access token is fine.
    let wrong = match error {
        Error::BadLogin => Some(Problem::new(403, "wrong-password", "the password is wrong")),
        Error::BadCode => Some(Problem::new(403, "wrong-code", error.to_string())),
        _ => None,
    };
    let problem = failed(app, client, &email, tried, error).await?;
    Err(wrong.unwrap_or(problem))
}

/// Counts a try, in all processes; who has to wait is refused before anything is done.
async fn attempt(app: &App, client: &Client, email: &str) -> Result<Attempt, Problem> {
    let mut tx = app.begin().await?;
    let attempt = login_failure::attempt(&mut tx, email, client.address, &app.auth, app.clock.now()).await;
    let attempt = attempt.inspect_err(|error| {
        if let Error::Locked { by, .. } = error {
            app.metrics.logins_locked.with_label_values(&[by]).inc();
        }
    })?;
    tx.commit().await?;
    Ok(attempt)
}

/// What a try that failed is answered; one that was no guess is taken back.
async fn failed(app: &App, client: &Client, email: &str, attempt: Attempt, error: Error) -> Result<Problem, Problem> {
    let wrong = match error {
        Error::BadLogin => Some("password"),
        Error::BadCode => Some("code"),
        _ => None,
    };
    if let Some(wrong) = wrong {
        app.metrics.logins_failed.with_label_values(&[wrong]).inc();
        if let Some(account) = user::account(&mut *app.db.acquire().await?, email).await? {
            let by = client.author(account.tenant, Actor::Unknown(account.email));
            app.failed_login(&by, account.id, wrong, attempt.locked_until(app.clock.now()));
        }
        return Ok(error.into());
    }
    if matches!(error, Error::Busy(_)) {
        app.metrics.logins_busy.inc();
    }
    take_back(app, attempt).await?;
    Ok(error.into())
}

async fn take_back(app: &App, attempt: Attempt) -> fleet_core::Result<()> {
    let mut tx = app.begin().await?;
    login_failure::undo(&mut tx, attempt, app.clock.now()).await?;
    Ok(tx.commit().await?)
}

/// A new access token, and the refresh token where the next request looks for it.
async fn logged_in(
    app: &App,
    client: &Client,
    session: &LoginSession,
    refresh: &Secret,
    cookie: bool,
) -> Result<Response, Problem> {
    app.keys.reread(&mut *app.db.acquire().await?).await?;
    let token = app.keys.sign(session)?;
    let body = Json(LoggedIn {
        access_token: token.token.expose().to_owned(),
        token_type: "Bearer",
        expires_in: token.expires_in_s,
        refresh_token: (!cookie).then(|| refresh.expose().to_owned()),
    });
    if !cookie {
        return Ok(body.into_response());
    }
    Ok((client.keep(refresh, app.clock.now(), session.expires_at), body).into_response())
}

/// The refresh token of a program.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RefreshRequest {
    /// The refresh token of the answer before; left out: the cookie is looked at.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    refresh_token: Option<Secret>,
}

/// Refresh
///
/// A new access token for a refresh token, which is replaced by its successor. A refresh token that was used before ends the
/// login with all its tokens: somebody else may have it. For a few seconds (`auth.refresh_grace_s`) it is answered with
/// the successor it already has instead, since two tabs may refresh at once.
#[utoipa::path(
    post, path = "/api/v1/auth/refresh", tag = "auth", request_body = Option<RefreshRequest>, security(("cookie" = [])),
    responses(
        (status = 200, description = "The login goes on.", body = LoggedIn, headers(
            ("Set-Cookie" = Option<String>, description = "The next refresh token, when the last one was a cookie."),
        )),
        (status = 401, description = "There is no refresh token, or it is worth nothing: log in.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "A page of another site sent the request.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn refresh(
    State(app): State<App>,
    client: Client,
    headers: HeaderMap,
    MaybeJson(request): MaybeJson<RefreshRequest>,
) -> Result<Response, Problem> {
    let cookie = request.refresh_token.is_none();
    let shown = request.refresh_token.or_else(|| client.refresh_token(&headers));
    let shown = shown.ok_or_else(|| Problem::new(401, "no-token", "expected a refresh token: log in"))?;
    let mut tx = app.begin().await?;
    let answer = login_session::refresh(&mut tx, shown.expose(), &app.auth, app.clock.now()).await?;
    if let Refresh::Stolen(session) = &answer {
        let tenant = user::tenant(&mut tx, session.user).await?;
        let reuse = Entry::of("login-session.reuse", session.id).after(&json!({ "user": session.user.to_string() }));
        app.record(&mut tx, &client.author(tenant, Actor::System("sign-in")), &[reuse]).await?;
    }
    tx.commit().await?;
    match answer {
        Refresh::Renewed(session, token) => logged_in(&app, &client, &session, &token, cookie).await,
        Refresh::Stolen(session) => {
            app.metrics.sessions_ended.with_label_values(&["reuse"]).inc();
            tracing::warn!(user.id = %session.user, session.id = %session.id, address = ?client.address, "a refresh token was used twice: the login has ended");
            let detail = "the refresh token was used before, so the login has ended: log in, and if it was not you, change the password";
            Err(Problem::new(401, "bad-refresh-token", detail))
        }
        Refresh::Unknown => {
            Err(Problem::new(401, "bad-refresh-token", "the login has ended, or this is no refresh token: log in"))
        }
    }
}

/// Who logs out, by the cookie or the access token; `None` whose login has ended already.
pub(crate) struct Leaving(Option<(UserId, LoginSessionId)>);

impl FromRequestParts<App> for Leaving {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let Ok(client) = Client::from_request_parts(parts, app).await;
        let cookie = client.refresh_token(&parts.headers);
        if let Some(token) = &cookie {
            let mut db = app.db.acquire().await?;
            let found = login_session::of_token(&mut db, token.expose(), app.clock.now()).await?;
            if let Some(session) = found {
                return Ok(Self(Some((session.user, session.id))));
            }
        }
        if cookie.is_some() && !parts.headers.contains_key(header::AUTHORIZATION) {
            return Ok(Self(None));
        }
        let person = Person::from_request_parts(parts, app).await?;
        Ok(Self(Some((person.id, person.session))))
    }
}

/// Log out
///
/// Ends this login: its access tokens, its refresh token, and MQTT connections that came by them.
#[utoipa::path(
    post, path = "/api/v1/auth/logout", tag = "auth", security(("bearer" = []), ("cookie" = [])),
    responses(
        (status = 204, description = "The login has ended.", headers(("Set-Cookie" = String, description = "Takes the cookie."))),
        (status = 403, description = "A page of another site sent the request, or an API key was shown.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn logout(State(app): State<App>, client: Client, Leaving(who): Leaving) -> Result<Response, Problem> {
    if let Some((user, session)) = who {
        let mut tx = app.begin().await?;
        match login_session::end(&mut tx, user, session).await {
            Ok(()) => record(&app, &mut tx, &client, user, Entry::of("login-session.end", session)).await?,
            // Another tab was faster.
            Err(Error::NoSuchLoginSession(_)) => {}
            Err(error) => return Err(error.into()),
        }
        tx.commit().await?;
        app.metrics.sessions_ended.with_label_values(&["logout"]).inc();
    }
    Ok((StatusCode::NO_CONTENT, client.forget()).into_response())
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
    /// Who looks at what the user sees, when it is not the user.
    #[schema(example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    viewed_by: Option<String>,
    /// What the caller may do, for some devices at least.
    #[schema(example = json!(["devices:read"]))]
    permissions: Vec<&'static str>,
    /// For each of the permissions that is not given for the whole tenant, for which devices: one of the conjunctions must hold.
    #[schema(value_type = HashMap<String, Vec<Object>>, example = json!({"devices:read": [{"group": "site/line-3"}]}))]
    scopes: BTreeMap<&'static str, Vec<Conjunction>>,
    /// Where the console begins for the caller.
    #[schema(example = "fleet-health")]
    home: &'static str,
}

fn scopes(caller: &Caller) -> BTreeMap<&'static str, Vec<Conjunction>> {
    let extents = caller.permissions().into_iter().map(|permission| (permission.name(), caller.extent(permission)));
    let some = extents.filter_map(|(name, extent)| match extent {
        Extent::Everything => None,
        Extent::Any(conjunctions) => Some((name, conjunctions)),
    });
    some.collect()
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
        viewed_by: caller.principal().proof.viewer.map(|viewer| viewer.to_string()),
        permissions,
        scopes: scopes(&caller),
        home: caller.principal().role().map_or(Home::Devices, Role::home).name(),
    }))
}
