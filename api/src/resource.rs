//! Resources that have a version: their `ETag` and how they are answered with it (RFC 9110 §8.8.3, §13.1).

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::extract::{Conditions, Json};

/// What has a version.
pub(crate) trait Resource: Serialize {
    /// Its entity tag, quotes included.
    fn tag(&self) -> String;
}

/// 201: it was made, and is there.
pub(crate) fn made(location: String, body: impl Resource) -> Response {
    let headers = [(header::LOCATION, location), (header::ETAG, body.tag())];
    (StatusCode::CREATED, headers, Json(body)).into_response()
}

/// 200: as it is now.
pub(crate) fn current(body: impl Resource) -> Response {
    ([(header::ETAG, body.tag())], Json(body)).into_response()
}

/// 200, or 304 when the caller has just this.
pub(crate) fn unless_known(conditions: &Conditions, body: impl Resource) -> Response {
    let tag = body.tag();
    if conditions.has(&tag) {
        return (StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response();
    }
    ([(header::ETAG, tag)], Json(body)).into_response()
}
