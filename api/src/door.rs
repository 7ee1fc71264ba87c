//! What happens to every request before and after its handler: it gets an id, a span, a deadline and a bounded body; its
//! answer gets that id, security headers, a number in the metrics and, where it failed, a problem for a body.

use std::any::Any;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::csrf::{CsrfLayer, ResponseForProtectionError};
use tracing::{Instrument, Span};
use uuid::Uuid;

use crate::client;
use crate::denials::Visitor;
use crate::otlp;
use crate::problem::{self, Problem};
use crate::state::App;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id that is taken from a caller, in bytes; a longer one is replaced.
const MAX_REQUEST_ID_BYTES: usize = 128;

/// The id of a request, in its extensions.
#[derive(Debug, Clone)]
pub(crate) struct RequestId(pub(crate) String);

const PERMISSIONS_POLICY: HeaderName = HeaderName::from_static("permissions-policy");
const OPENER_POLICY: HeaderName = HeaderName::from_static("cross-origin-opener-policy");
const RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

// What a fleet's console never asks of a browser, so that nothing that got into a page may either.
const NO_PERMISSIONS: HeaderValue = HeaderValue::from_static(
    "accelerometer=(), browsing-topics=(), camera=(), display-capture=(), geolocation=(), gyroscope=(), magnetometer=(), \
     microphone=(), midi=(), payment=(), serial=(), usb=()",
);
const SAME_ORIGIN: HeaderValue = HeaderValue::from_static("same-origin");
const CSP_NOTHING: HeaderValue =
    HeaderValue::from_static("default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'");
const CSP_DOCS: HeaderValue = HeaderValue::from_static(
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; object-src 'none'; base-uri 'none'; \
     form-action 'self'; frame-ancestors 'none'",
);

/// Puts the door in front of `routes`.
pub(crate) fn guard(routes: Router<App>, app: App) -> Router {
    let panicked = |payload: Box<dyn Any + Send>| Problem::panicked(&*payload).into_response();
    routes
        .fallback(|| async { StatusCode::NOT_FOUND })
        .layer(DefaultBodyLimit::max(app.http.max_body_bytes))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn_with_state(app.clone(), enter))
        .with_state(app)
}

/// Refuses what a page of another site sends: for routes that are opened by a cookie, which browsers add by themselves.
pub(crate) fn same_site() -> CsrfLayer<impl ResponseForProtectionError<Body> + Send + Sync + 'static> {
    CsrfLayer::new().with_rejection_response(|_| {
        Problem::new(403, "cross-site", "the request comes from a page of another site").into_response()
    })
}

async fn enter(State(app): State<App>, mut request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(request.headers());
    let method = method(request.method());
    let route = request.extensions().get::<MatchedPath>().map_or("unmatched".into(), |path| path.as_str().to_owned());
    let span = tracing::info_span!("http.request", method, route, request.id = id, status = tracing::field::Empty);
    let uri = request.uri().clone();
    let visitor = Visitor::default();
    request.extensions_mut().insert(RequestId(id.clone()));
    request.extensions_mut().insert(visitor.clone());
    let https = client::is_https(&request, &app.http.trusted_proxies);
    let within = Duration::from_millis(app.http.request_timeout_ms);
    let asked = Asked { method, path: uri.path(), id: &id, otlp: otlp::spoken(&request) };
    let answered = async {
        let response = in_time(within, next.run(request)).await;
        let response = with_problem(response, &asked, &visitor, &app);
        Span::current().record("status", response.status().as_u16());
        tracing::debug!("answered");
        response
    };
    let mut response = answered.instrument(span).await;
    set_headers(response.headers_mut(), &uri, &id);
    if let Some(hsts) = app.hsts.clone().filter(|_| https) {
        response.headers_mut().insert(header::STRICT_TRANSPORT_SECURITY, hsts);
    }
    app.metrics.requests.with_label_values(&[method, &route, response.status().as_str()]).inc();
    app.metrics.seconds.with_label_values(&[&route]).observe(begun.elapsed().as_secs_f64());
    response
}

/// The caller's own id, when it is fit for headers and logs, else a new one.
fn request_id(headers: &HeaderMap) -> String {
    let fit = |id: &&str| {
        (1..=MAX_REQUEST_ID_BYTES).contains(&id.len())
            && id.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-:/+=".contains(&b))
    };
    let given = headers.get(REQUEST_ID).and_then(|id| id.to_str().ok()).filter(fit);
    given.map_or_else(|| Uuid::now_v7().simple().to_string(), str::to_owned)
}

/// Any word may stand for a method, so those nobody uses share a label.
fn method(method: &Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "PATCH" => "PATCH",
        "DELETE" => "DELETE",
        "OPTIONS" => "OPTIONS",
        _ => "other",
    }
}

async fn in_time(within: Duration, answer: impl Future<Output = Response>) -> Response {
    let late = || {
        let detail = format!("no answer within {} ms", within.as_millis());
        Problem::new(503, "timeout", detail).into_response()
    };
    tokio::time::timeout(within, answer).await.unwrap_or_else(|_| late())
}

/// What of a request its problem tells.
struct Asked<'a> {
    method: &'static str,
    path: &'a str,
    id: &'a str,
    /// The encoding of a request that follows the OpenTelemetry Protocol, which says how a problem looks.
    otlp: Option<otlp::Encoding>,
}

/// Writes the body of a problem; an error without a body of its own becomes one.
fn with_problem(mut response: Response, asked: &Asked<'_>, visitor: &Visitor, app: &App) -> Response {
    let bare = response.status().is_client_error() || response.status().is_server_error();
    let bare = bare && !is_json(response.headers());
    let told = response.extensions_mut().remove::<Problem>();
    let Some(problem) = told.or_else(|| bare.then(|| Problem::of_status(response.status()))) else { return response };
    app.metrics.problems.with_label_values(&[problem.kind]).inc();
    if matches!(problem.status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
        && let Some(author) = visitor.author()
    {
        app.denied(author, problem.permission.unwrap_or(problem.kind), format!("{} {}", asked.method, asked.path));
    }
    let document = problem.document(asked.path, asked.id);
    let (kind, body) = match asked.otlp {
        Some(encoding) => (encoding.media_type(), encoding.status(problem.status, document.detail)),
        None => (HeaderValue::from_static(problem::MEDIA_TYPE), serde_json::to_vec(&document).unwrap_or_default()),
    };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, kind);
    headers.remove(header::CONTENT_LENGTH);
    *response.body_mut() = Body::from(body);
    response
}

fn is_json(headers: &HeaderMap) -> bool {
    headers.get(header::CONTENT_TYPE).is_some_and(|kind| kind.as_bytes().starts_with(b"application/"))
}

fn set_headers(headers: &mut HeaderMap, uri: &Uri, id: &str) {
    if let Ok(id) = HeaderValue::from_str(id) {
        headers.insert(REQUEST_ID, id);
    }
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    headers.insert(PERMISSIONS_POLICY, NO_PERMISSIONS);
    headers.insert(OPENER_POLICY, SAME_ORIGIN);
    headers.insert(RESOURCE_POLICY, SAME_ORIGIN);
    let docs = uri.path().starts_with("/docs");
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(if docs { CSP_DOCS } else { CSP_NOTHING });
    if uri.path().starts_with("/api/") {
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use axum::routing::get;
    use fleet_core::authority::Pki;
    use fleet_core::clock::Clock;
    use fleet_core::config::{Config, Environment};
    use fleet_core::testing::TestDb;
    use fleet_core::token::Keys;
    use prometheus::Registry;
    use tower::ServiceExt;

    use super::*;
    use crate::Health;

    async fn app(db: &TestDb) -> App {
        let config = Config::from_sources(&Environment::default(), Some(std::collections::HashMap::new())).unwrap();
        let mut conn = db.pool().acquire().await.unwrap();
        let keys = Arc::new(Keys::load(&mut conn, Clock::system(), 900).await.unwrap());
        let (pool, registry) = (db.pool().clone(), Registry::new());
        let pki = Pki::new(config.certificates.clone(), std::path::Path::new("/nowhere"));
        App::new(pool, Clock::system(), keys, pki, registry, &config, Health::new()).unwrap()
    }

    #[tokio::test]
    async fn a_handler_that_panics_hurts_its_own_request_only() {
        let db = TestDb::new().await;
        let panics = || async { if true { panic!("a secret") } else { "never" } };
        let behind = Router::new().route("/panics", get(panics)).route("/fine", get(|| async { "fine" }));
        let router = guard(behind, app(&db).await);
        for (path, status) in [("/panics", 500), ("/fine", 200)] {
            let response = router.clone().oneshot(Request::get(path).body(Body::empty()).unwrap()).await.unwrap();
            assert_eq!(response.status().as_u16(), status);
            let body = axum::body::to_bytes(response.into_body(), usize::MAX).await.unwrap();
            let body = String::from_utf8_lossy(&body);
            assert!(!body.contains("a secret"), "{body}");
            assert_eq!(body.contains("urn:muster:problem:internal"), status == 500, "{body}");
        }
    }
}
