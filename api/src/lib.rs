//! The HTTP door: REST for operators and programs, metrics for Prometheus, documentation for both.
//!
//! [`router`] is every route of the system. A handler's arguments say who may call it (`extract.rs`); what goes wrong
//! becomes a problem in `problem.rs`; `door.rs` is what happens to every request around its handler.
//! Ignorant of: MQTT, SQL.

use axum::Router;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use utoipa::OpenApi;
use utoipa::openapi::security::{
    ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme,
};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

mod client;
mod denials;
mod door;
mod extract;
mod metrics;
mod oidc;
mod otlp;
mod page;
mod problem;
mod resource;
mod routes;
mod state;
mod time;
mod tx;

pub use state::{App, Health};

use problem::Problem;
use routes::{
    access, api_keys, audit, auth, authorities, bindings, certificates, claims, commands, connections, credentials,
    dead_letters, decommissions, devices, docs, groups, import, index, log_levels, login_failures, login_sessions,
    logs, operations, passwords, provision, roles, saved_searches, sessions, shadows, signing_keys, telemetry, tenants,
    totp, users,
};

/// Every route of the HTTP door, on one screen.
fn documented() -> OpenApiRouter<App> {
    let by_cookie =
        OpenApiRouter::new().routes(routes!(auth::login)).routes(routes!(auth::refresh)).routes(routes!(auth::logout));
    OpenApiRouter::with_openapi(Description::openapi())
        .merge(by_cookie.layer(door::same_site()))
        .routes(routes!(auth::me))
        .routes(routes!(login_sessions::list_mine))
        .routes(routes!(login_sessions::end_mine))
        .routes(routes!(login_sessions::logout_all))
        .routes(routes!(login_sessions::list, login_sessions::end))
        .routes(routes!(login_failures::read, login_failures::forgive))
        .routes(routes!(routes::oidc::methods))
        .routes(routes!(routes::oidc::login))
        .routes(routes!(routes::oidc::callback))
        .routes(routes!(totp::read, totp::begin, totp::remove))
        .routes(routes!(totp::confirm))
        .routes(routes!(totp::renew_recovery))
        .routes(routes!(totp::reset))
        .routes(routes!(signing_keys::list))
        .routes(routes!(signing_keys::rotate))
        .routes(routes!(passwords::change))
        .routes(routes!(passwords::reset))
        .routes(routes!(passwords::issue_reset))
        .routes(routes!(devices::enrol, devices::list))
        .routes(routes!(import::import))
        .routes(routes!(groups::create, groups::list))
        .routes(routes!(groups::read, groups::relocate, groups::delete))
        .routes(routes!(devices::read, devices::change, devices::delete))
        .routes(routes!(decommissions::begin))
        .routes(routes!(decommissions::list))
        .routes(routes!(decommissions::read))
        .routes(routes!(credentials::issue, credentials::list))
        .routes(routes!(credentials::rotate))
        .routes(routes!(credentials::revoke))
        .routes(routes!(certificates::sign, certificates::list))
        .routes(routes!(certificates::allow_renewal))
        .routes(routes!(authorities::create, authorities::list))
        .routes(routes!(authorities::nonce))
        .routes(routes!(authorities::read, authorities::change, authorities::delete))
        .routes(routes!(authorities::request))
        .routes(routes!(authorities::place))
        .routes(routes!(authorities::crl, authorities::upload_crl))
        .routes(routes!(claims::create, claims::list))
        .routes(routes!(claims::requests))
        .routes(routes!(claims::approve))
        .routes(routes!(claims::reject))
        .routes(routes!(claims::read, claims::revoke))
        .routes(routes!(provision::provision))
        .routes(routes!(telemetry::series))
        .routes(routes!(telemetry::latest))
        .routes(routes!(shadows::read, shadows::change))
        .routes(routes!(routes::otlp::ingest))
        .routes(routes!(logs::search::search))
        .routes(routes!(logs::counts::histogram))
        .routes(routes!(logs::counts::top))
        .routes(routes!(logs::counts::patterns))
        .routes(routes!(logs::counts::fields))
        .routes(routes!(logs::export::export))
        .routes(routes!(logs::tail::tail))
        .routes(routes!(logs::context::context))
        .routes(routes!(saved_searches::create, saved_searches::list))
        .routes(routes!(saved_searches::read, saved_searches::replace, saved_searches::delete))
        .routes(routes!(commands::send, commands::list))
        .routes(routes!(commands::upload_logs))
        .routes(routes!(commands::read))
        .routes(routes!(commands::cancel))
        .routes(routes!(log_levels::read, log_levels::set, log_levels::end))
        .routes(routes!(dead_letters::list))
        .routes(routes!(sessions::list))
        .routes(routes!(sessions::read, sessions::end))
        .routes(routes!(users::create, users::list))
        .routes(routes!(users::read, users::change, users::delete))
        .routes(routes!(roles::create, roles::list))
        .routes(routes!(roles::read, roles::replace, roles::delete))
        .routes(routes!(access::check))
        .routes(routes!(access::diff))
        .routes(routes!(access::view_as))
        .routes(routes!(access::permissions))
        .routes(routes!(bindings::create, bindings::list))
        .routes(routes!(bindings::read, bindings::delete))
        .routes(routes!(api_keys::create, api_keys::list))
        .routes(routes!(api_keys::delete))
        .routes(routes!(connections::list))
        .routes(routes!(connections::events))
        .routes(routes!(connections::read))
        .routes(routes!(connections::disconnect))
        .routes(routes!(connections::start_trace, connections::read_trace, connections::stop_trace))
        .routes(routes!(tenants::create, tenants::list))
        .routes(routes!(tenants::read))
        .routes(routes!(audit::list))
        .routes(routes!(audit::verify))
        .routes(routes!(audit::export))
        .routes(routes!(audit::read))
        .routes(routes!(index::show))
        .routes(routes!(index::verify))
        .routes(routes!(index::rebuild))
        .routes(routes!(docs::openapi))
        .routes(routes!(operations::healthz))
        .routes(routes!(operations::readyz))
        .routes(routes!(operations::metrics))
}

/// `METHOD path` of every route that says which permission it needs, with that permission.
fn guarded_routes() -> Vec<(String, String)> {
    let document = serde_json::to_value(documented().into_openapi()).expect("the document is plain data");
    let mut routes = Vec::new();
    for (path, item) in document["paths"].as_object().into_iter().flatten() {
        for (method, operation) in item.as_object().into_iter().flatten() {
            if let Some(permission) = operation["security"][0]["bearer"][0].as_str() {
                routes.push((format!("{} {path}", method.to_uppercase()), permission.to_owned()));
            }
        }
    }
    routes
}

/// Pages for people, which are no part of the API.
fn pages() -> Router<App> {
    Router::new()
        .route("/", get(docs::home))
        .route("/docs", get(docs::home))
        .route("/docs/", get(docs::index))
        .route("/docs/{*file}", get(docs::file))
}

/// The HTTP door of `app`.
pub fn router(app: App) -> Router {
    router_beside(app, Router::new())
}

/// As [`router`], with routes of others on the same port: all that happens to a request happens to theirs too.
pub fn router_beside(app: App, others: Router) -> Router {
    let (routes, _) = documented().split_for_parts();
    door::guard(routes.merge(pages()).merge(others.with_state(())), app)
}

/// A problem, for such routes: its status, the last part of its type, and what was expected.
pub fn refusal(status: u16, kind: &'static str, detail: impl Into<String>) -> Response {
    Problem::new(status, kind, detail).into_response()
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Muster",
        description = "Fleet management for devices that speak MQTT. Errors are problem details (RFC 9457); lists are pages: \
                       send a page's next_cursor as cursor to get the next; times are RFC 3339 in UTC.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    tags(
        (name = "auth", description = "Logging in"),
        (name = "devices", description = "What the fleet is made of"),
        (name = "groups", description = "Where devices belong"),
        (name = "credentials", description = "By which devices prove who they are"),
        (name = "authorities", description = "Who signs the certificates of devices, and vouches for them"),
        (name = "claims", description = "By which devices ask to come in"),
        (name = "telemetry", description = "What devices say about themselves"),
        (name = "logs", description = "What devices log"),
        (name = "shadow", description = "What devices are to be, and what they say they are"),
        (name = "commands", description = "What devices are to do, and what becomes of it"),
        (name = "dead-letters", description = "Payloads that could not be read"),
        (name = "sessions", description = "What outlives the connections of clients: subscriptions, and messages that wait"),
        (name = "users", description = "People who log in"),
        (name = "roles", description = "What people and programs may do"),
        (name = "access", description = "Who may do what, and why"),
        (name = "bindings", description = "Who has which role for which devices"),
        (name = "api-keys", description = "By which programs prove who they are"),
        (name = "connections", description = "Who is connected at the moment, and what happened to clients"),
        (name = "tenants", description = "For who stands above them"),
        (name = "audit", description = "Who did what"),
        (name = "operations", description = "For those who run the server"),
    )
)]
struct Description;

/// The OpenAPI 3.1 document of [`router`], as JSON; the same bytes as `api/openapi.json`.
pub fn openapi_json() -> String {
    let mut document = documented().into_openapi();
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format("JWT").build();
    let cookie =
        ApiKey::Cookie(ApiKeyValue::with_description("__Host-muster_refresh", "The refresh token of a browser."));
    let claim = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some("The secret of a claim.")).build();
    let components = document.components.get_or_insert_default();
    components.add_security_scheme("claim", SecurityScheme::Http(claim));
    components.add_security_scheme("bearer", SecurityScheme::Http(bearer));
    components.add_security_scheme("cookie", SecurityScheme::ApiKey(cookie));
    document.security = Some(vec![SecurityRequirement::new("bearer", Vec::<String>::new())]);
    let mut json = document.to_pretty_json().expect("the document is plain data");
    json.push('\n');
    json
}
