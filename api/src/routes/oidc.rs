//! Logging in by the `OpenID` provider: there, and back.

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Redirect, Response};
use fleet_core::audit::{Actor, Entry};
use fleet_core::login_session::{self, Method};
use fleet_core::oidc::{self, Identity, SignedIn};
use serde::Serialize;
use serde_json::json;
use utoipa::{IntoParams, ToSchema};

use crate::client::Client;
use crate::extract::{FromQuery, Json, Params, Query};
use crate::oidc::Provider;
use crate::problem::{Document, Problem};
use crate::routes::auth::log_in;
use crate::routes::users::UserBody;
use crate::state::App;

/// Where browsers come back to.
const CALLBACK: &str = "/api/v1/auth/oidc/callback";
/// Where they go on: the console.
const HOME: &str = "/";

/// How one may log in here.
#[derive(Serialize, ToSchema)]
pub(crate) struct Methods {
    /// By `POST /auth/login`.
    password: bool,
    /// By `GET /auth/oidc/login`.
    oidc: bool,
}

/// How one may log in
#[utoipa::path(
    get, path = "/api/v1/auth/methods", tag = "auth", security(),
    responses((status = 200, description = "What a login page may offer.", body = Methods))
)]
pub(crate) async fn methods(State(app): State<App>) -> Json<Methods> {
    Json(Methods { password: true, oidc: app.oidc.is_some() })
}

fn provider(app: &App) -> Result<&Provider, Problem> {
    app.oidc.as_deref().ok_or_else(|| Problem::new(404, "no-oidc", "there is no OpenID provider: see oidc.issuer"))
}

/// Log in by the OpenID provider
///
/// For browsers: sends them to the provider, from where they come back to `/auth/oidc/callback`.
#[utoipa::path(
    get, path = "/api/v1/auth/oidc/login", tag = "auth", security(),
    responses(
        (status = 303, description = "To the provider.", headers(
            ("Location" = String, description = "Its login page."),
            ("Set-Cookie" = String, description = "By which the browser is known when it comes back."),
        )),
        (status = 404, description = "There is no provider.", body = Document, content_type = "application/problem+json"),
        (status = 502, description = "The provider cannot be used at the moment.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn login(State(app): State<App>, client: Client) -> Result<Response, Problem> {
    let provider = provider(&app)?;
    let mut tx = app.begin().await?;
    let started = oidc::begin(&mut tx, &provider.settings, app.clock.now()).await?;
    tx.commit().await?;
    app.metrics.oidc_forgotten.inc_by(started.forgotten);
    let to = provider.redirect(&started, client.link(CALLBACK)).await?;
    Ok((client.send_away(&started.browser, provider.settings.pending_s), Redirect::to(&to)).into_response())
}

/// What the provider sends along.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "it only documents the query")]
pub(crate) struct CallbackQuery {
    /// To be redeemed for tokens.
    code: Option<String>,
    /// What was sent there.
    state: Option<String>,
    /// Why there is no code.
    error: Option<String>,
}

/// The answer of the provider.
pub(crate) struct Answer {
    code: Option<String>,
    state: String,
    error: Option<String>,
}

impl FromQuery for Answer {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let (code, state, error) = (query.one("code"), query.one("state"), query.one("error"));
        // Providers add more, which means nothing to us.
        query.ignore_others();
        Some(Self { code, state: state.unwrap_or_default(), error })
    }
}

/// Come back from the OpenID provider
///
/// For browsers: sets the refresh token as a cookie and goes on to the console, which calls `POST /auth/refresh`.
#[utoipa::path(
    get, path = "/api/v1/auth/oidc/callback", tag = "auth", security(), params(CallbackQuery),
    responses(
        (status = 303, description = "To the console, logged in.", headers(
            ("Location" = String, description = "`/`."),
            ("Set-Cookie" = String, description = "The refresh token."),
        )),
        (status = 401, description = "It was not begun in this browser, took too long, was used before, or the provider's answer is not accepted.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "The identity has no role, no account, or no verified e-mail address here; or the provider said no.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no provider.", body = Document, content_type = "application/problem+json"),
        (status = 502, description = "The provider cannot be used at the moment.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn callback(
    State(app): State<App>,
    client: Client,
    headers: HeaderMap,
    Query(answer): Query<Answer>,
) -> Result<Response, Problem> {
    let provider = provider(&app)?;
    let came = come_back(&app, provider, &client, &headers, answer).await;
    came.inspect_err(|_| app.metrics.logins_failed.with_label_values(&["oidc"]).inc())
}

async fn come_back(
    app: &App,
    provider: &Provider,
    client: &Client,
    headers: &HeaderMap,
    answer: Answer,
) -> Result<Response, Problem> {
    let stranger = || {
        Problem::new(
            401,
            "oidc-refused",
            "this login was not begun in this browser, took too long, or was used before: begin again",
        )
    };
    let browser = client.browser(headers).ok_or_else(stranger)?;
    let mut tx = app.begin().await?;
    let pending = oidc::take(&mut tx, &answer.state, browser.expose(), app.clock.now()).await?;
    tx.commit().await?;
    let pending = pending.ok_or_else(stranger)?;
    let code = answer.code.ok_or_else(|| said_no(answer.error.as_deref()))?;
    let identity = provider.identity(&pending, code, client.link(CALLBACK)).await?;
    let (mut tx, now) = (app.begin().await?, app.clock.now());
    let who = oidc::sign_in(&mut tx, &provider.settings, &identity, &app.auth, now).await?;
    let (session, token, ended) =
        login_session::begin(&mut tx, who.user.id, Method::Oidc, &client.origin(), &app.auth, now).await?;
    let tenant = who.tenant;
    app.record(&mut tx, &client.author(tenant, Actor::System("oidc")), &changes(who, &identity)).await?;
    app.record(&mut tx, &client.author(tenant, Actor::User(session.user)), &[log_in(&session)]).await?;
    tx.commit().await?;
    app.metrics.sessions_ended.with_label_values(&["limit"]).inc_by(ended);
    let cookies = (client.keep(&token, now, session.expires_at), client.came_back());
    Ok((cookies, Redirect::to(HOME)).into_response())
}

/// What the provider changed about an account.
fn changes(who: SignedIn, identity: &Identity) -> Vec<Entry> {
    let id = who.user.id;
    let account = match who.before {
        Some(before) => Entry::of("user.update", id).before(&UserBody::new(before)),
        None => Entry::of("user.create", id),
    };
    let identity = json!({ "issuer": identity.issuer, "subject": identity.subject });
    let linked = who.linked.then(|| Entry::of("user.link", id).after(&identity));
    std::iter::once(account.after(&UserBody::new(who.user))).chain(linked).collect()
}

/// The provider's word is shown only as far as it is one of the specification (RFC 6749 §4.1.2.1).
fn said_no(error: Option<&str>) -> Problem {
    let known = error.unwrap_or_default().chars().filter(|c| c.is_ascii_lowercase() || *c == '_').take(40);
    let known = known.collect::<String>();
    Problem::new(403, "oidc-denied", format!("the OpenID provider let nobody in: {known}"))
}
