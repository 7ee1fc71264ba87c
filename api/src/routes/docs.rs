//! The API told to machines and to people; nothing is loaded from elsewhere.

use std::sync::{Arc, LazyLock};

use axum::http::header;
use axum::response::{IntoResponse, Redirect, Response};
use utoipa_swagger_ui::Config;

use crate::extract::Path;
use crate::problem::Problem;

static DOCUMENT: LazyLock<String> = LazyLock::new(crate::openapi_json);
static UI: LazyLock<Arc<Config<'static>>> =
    LazyLock::new(|| Arc::new(Config::from("/api/v1/openapi.json").validator_url("none").persist_authorization(true)));

/// This document
#[utoipa::path(
    get, path = "/api/v1/openapi.json", tag = "operations", security(),
    responses((status = 200, description = "OpenAPI 3.1.", body = serde_json::Value))
)]
pub(crate) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], DOCUMENT.as_str()).into_response()
}

/// `/`: there is nothing nicer to see yet than the documentation.
pub(crate) async fn home() -> Redirect {
    Redirect::temporary("/docs/")
}

/// `/docs/{*file}`: Swagger UI.
pub(crate) async fn file(Path(file): Path<String>) -> Result<Response, Problem> {
    let missing = || Problem::new(404, "no-such-route", "there is nothing under this path");
    let found = utoipa_swagger_ui::serve(&file, UI.clone()).map_err(|error| Problem::internal(&*error))?;
    let file = found.ok_or_else(missing)?;
    let encoding = file.gzpipped.then_some([(header::CONTENT_ENCODING, "gzip")]);
    Ok(([(header::CONTENT_TYPE, file.content_type)], encoding, file.bytes.into_owned()).into_response())
}

/// `/docs/`: its first page.
pub(crate) async fn index() -> Result<Response, Problem> {
    file(Path(String::new())).await
}
