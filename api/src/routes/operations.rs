//! For those who run the server: is it alive, is it ready, what does it count.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus::{Encoder, TextEncoder};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::extract::Json;
use crate::problem::Problem;
use crate::state::{self, App};

/// Alive
///
/// Answers as long as the process can answer at all.
#[utoipa::path(
    get, path = "/healthz", tag = "operations", security(),
    responses((status = 200, description = "It is alive.", body = String, content_type = "text/plain"))
)]
pub(crate) async fn healthz() -> &'static str {
    "ok\n"
}

/// Whether the server is of use, and what is missing.
#[derive(Serialize, ToSchema)]
pub(crate) struct Readiness {
    /// Whether all checks hold.
    ready: bool,
    /// Each check: `ok`, or why it does not hold. `index` tells of the search of log lines, without which the server is ready too: `ok`,
    /// `catching_up`, `rebuilding`, `disk_full`, `failing`.
    #[schema(value_type = std::collections::BTreeMap<String, String>, example = json!({"database": "ok"}))]
    checks: Map<String, Value>,
}

/// Ready
#[utoipa::path(
    get, path = "/readyz", tag = "operations", security(),
    responses(
        (status = 200, description = "All checks hold.", body = Readiness),
        (status = 503, description = "Some do not; each says why.", body = Readiness),
    )
)]
pub(crate) async fn readyz(State(app): State<App>) -> Response {
    let mut answers = vec![("database", state::in_time(ask_database(&app)).await)];
    answers.extend(app.health.ask().await);
    let ready = answers.iter().all(|(_, answer)| answer.is_ok());
    let mut checks = answers.into_iter().map(|(name, answer)| (name.to_owned(), said(answer))).collect::<Map<_, _>>();
    if let Some(index) = &app.index {
        // Without it, lines come in all the same and everything else is of use.
        checks.insert("index".to_owned(), index.state().name().into());
    }
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(Readiness { ready, checks })).into_response()
}

fn said(answer: Result<(), String>) -> Value {
    Value::String(answer.err().unwrap_or_else(|| "ok".to_owned()))
}

async fn ask_database(app: &App) -> Result<(), String> {
    sqlx::query_scalar!(r#"select 1 as "one!""#).fetch_one(&app.db).await.map(drop).map_err(|error| {
        tracing::warn!(%error, "database away");
        "cannot be reached".to_owned()
    })
}

/// Metrics, for Prometheus
#[utoipa::path(
    get, path = "/metrics", tag = "operations", security(),
    responses((status = 200, description = "The Prometheus text format.", body = String, content_type = "text/plain"))
)]
pub(crate) async fn metrics(State(app): State<App>) -> Result<Response, Problem> {
    let idle = i64::try_from(app.db.num_idle()).unwrap_or(i64::MAX);
    app.metrics.connections.with_label_values(&["idle"]).set(idle);
    app.metrics.connections.with_label_values(&["used"]).set(i64::from(app.db.size()).saturating_sub(idle).max(0));
    app.metrics.exports.set(i64::try_from(app.exports.taken()).unwrap_or(i64::MAX));
    let mut text = Vec::new();
    let encoder = TextEncoder::new();
    encoder.encode(&app.registry.gather(), &mut text).map_err(|error| Problem::internal(&error))?;
    Ok(([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response())
}
