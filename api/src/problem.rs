//! Problem details (RFC 9457): what a caller is told when a request fails. The only file that knows both errors and
//! status codes.
//!
//! A [`Problem`] travels in the extensions of its response; `door.rs` writes the body, because only there are the
//! path and the id of the request known. A bare error status of the framework becomes a problem in the same place.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use fleet_core::Error;
use serde::Serialize;
use sqlx::postgres::PgDatabaseError;
use utoipa::ToSchema;

/// The media type of a problem.
pub(crate) const MEDIA_TYPE: &str = "application/problem+json";
/// Types of problems that say a bound was hit.
pub(crate) const BOUNDS: [&str; 16] = [
    "login-locked",
    "body-too-large",
    "busy",
    "timeout",
    "database-away",
    "no-broker",
    "too-many-credentials",
    "too-many-buckets",
    "too-many-traces",
    "too-many-tails",
    "too-many-exports",
    "too-many",
    "too-many-rows",
    "rate-limited",
    "provision-full",
    "shadow-too-large",
];
/// When to come back after a 429 or 503 that does not know better, in seconds.
const RETRY_AFTER_S: u64 = 1;

/// PostgreSQL's code for a statement that was stopped, by its `statement_timeout` for one.
const QUERY_CANCELED: &str = "57014";
/// And for what somebody has no right to.
const REFUSED: &str = "42501";

/// Why a request failed.
#[derive(Debug, Clone)]
pub(crate) struct Problem {
    pub(crate) status: StatusCode,
    /// The last part of the type: a closed set, which also labels a metric.
    pub(crate) kind: &'static str,
    /// The permission that was missing.
    pub(crate) permission: Option<&'static str>,
    detail: String,
    errors: Vec<FieldError>,
    lines: Vec<LineError>,
    retry_after_s: u64,
}

/// What is wrong with one row of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct LineError {
    /// Where it stands: the line, in a JSON array the place, from 1.
    #[schema(example = 3)]
    pub(crate) line: u64,
    /// The device's id as it was given; null when there is none.
    #[schema(example = "boiler 1")]
    pub(crate) id: Option<String>,
    /// What was expected.
    pub(crate) error: String,
}

/// What is wrong with one field or parameter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, ToSchema)]
pub(crate) struct FieldError {
    /// The field, as a path into the body, or the name of the parameter.
    pub(crate) field: String,
    /// What was expected.
    pub(crate) detail: String,
}

/// A problem as it is sent (RFC 9457).
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = Problem)]
pub(crate) struct Document<'a> {
    /// Names the kind of problem; the same for every occurrence.
    #[serde(rename = "type")]
    #[schema(example = "urn:muster:problem:no-such-device")]
    kind: String,
    /// The kind of problem in words.
    title: String,
    /// The HTTP status.
    status: u16,
    /// What went wrong this time.
    pub(crate) detail: &'a str,
    /// The path that was asked.
    instance: &'a str,
    /// The `x-request-id` of the answer, to be found in the server's log.
    request_id: &'a str,
    /// The fields at fault, if any.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [FieldError],
    /// The rows at fault of a file, at most 100.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    lines: &'a [LineError],
}

impl Problem {
    pub(crate) fn new(status: u16, kind: &'static str, detail: impl Into<String>) -> Self {
        let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        Self {
            permission: None,
            status,
            kind,
            detail: detail.into(),
            errors: Vec::new(),
            lines: Vec::new(),
            retry_after_s: RETRY_AFTER_S,
        }
    }

    /// 403: a permission is missing.
    pub(crate) fn forbidden(permission: &'static str) -> Self {
        let detail = format!("this needs the permission {permission}");
        Self { permission: Some(permission), ..Self::new(403, "forbidden", detail) }
    }

    /// 400 about one field or parameter.
    pub(crate) fn field(field: impl Into<String>, detail: impl Into<String>) -> Self {
        let (field, detail) = (field.into(), detail.into());
        Self::fields(vec![FieldError { field, detail }])
    }

    /// 400 about several fields or parameters.
    pub(crate) fn fields(errors: Vec<FieldError>) -> Self {
        let said = errors.iter().map(|error| format!("{}: {}", error.field, error.detail)).collect::<Vec<_>>();
        Self { errors, ..Self::new(400, "invalid", said.join("; ")) }
    }

    /// 422 about rows of a file, some of which are told.
    pub(crate) fn lines(detail: String, lines: Vec<LineError>) -> Self {
        Self { lines, ..Self::new(422, "import-refused", detail) }
    }

    /// 500: logged here, once; the caller gets a request id.
    pub(crate) fn internal(error: &dyn std::error::Error) -> Self {
        let mut said = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            said = format!("{said}: {cause}");
            source = cause.source();
        }
        tracing::error!(error = said, "request failed");
        Self::new(500, "internal", "the server failed; its log says why under this request_id")
    }

    /// 500: a handler panicked.
    pub(crate) fn panicked(payload: &(dyn std::any::Any + Send)) -> Self {
        let said = payload.downcast_ref::<String>().map(String::as_str);
        let said = said.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("no message");
        tracing::error!(panic = said, "handler panicked");
        Self::new(500, "internal", "the server failed; its log says why under this request_id")
    }

    /// 503: the database is away, which may pass.
    fn database_away(error: &sqlx::Error) -> Self {
        tracing::warn!(%error, "database away");
        Self::new(503, "database-away", "the database cannot be reached at the moment: try again shortly")
    }

    /// 503: this process keeps no index of log lines.
    pub(crate) fn no_index() -> Self {
        Self::new(503, "no-index", "there is no index of log lines here: ask another process of the server")
    }

    /// 403: what would be written is not within what the caller may reach.
    fn out_of_scope() -> Self {
        let detail = "this is beyond what your roles reach: expected a group, type and labels within their scope";
        Self::new(403, "out-of-scope", detail)
    }

    /// What a bare status of the framework says.
    pub(crate) fn of_status(status: StatusCode) -> Self {
        let (kind, detail) = match status {
            StatusCode::NOT_FOUND => ("no-such-route", "there is nothing under this path"),
            StatusCode::METHOD_NOT_ALLOWED => {
                ("method-not-allowed", "this path does not take this method: see the Allow header")
            }
            StatusCode::PAYLOAD_TOO_LARGE => ("body-too-large", "the body is larger than is read"),
            StatusCode::UNSUPPORTED_MEDIA_TYPE => ("unsupported-media-type", "the body is of a type that is not read"),
            status if status.is_server_error() => ("internal", "the server failed"),
            _ => ("bad-request", "the request could not be read"),
        };
        Self::new(status.as_u16(), kind, detail)
    }

    pub(crate) fn document<'a>(&'a self, instance: &'a str, request_id: &'a str) -> Document<'a> {
        Document {
            kind: format!("urn:muster:problem:{}", self.kind),
            title: title(self.kind),
            status: self.status.as_u16(),
            detail: &self.detail,
            instance,
            request_id,
            errors: &self.errors,
            lines: &self.lines,
        }
    }
}

/// `no-such-device` → `No such device`.
fn title(kind: &str) -> String {
    let mut words = kind.replace('-', " ");
    if let Some(first) = words.get_mut(..1) {
        first.make_ascii_uppercase();
    }
    words
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let mut response = self.status.into_response();
        let headers = response.headers_mut();
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(self.retry_after_s));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            // RFC 6750 §3.1: no error code when the request carried no token at all.
            let challenge = if self.kind == "bad-token" { "Bearer error=\"invalid_token\"" } else { "Bearer" };
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
        }
        response.extensions_mut().insert(self);
        response
    }
}

impl From<sqlx::Error> for Problem {
    fn from(error: sqlx::Error) -> Self {
        Error::from(error).into()
    }
}

impl From<Error> for Problem {
    fn from(error: Error) -> Self {
        let (status, kind) = match &error {
            Error::NoSuchDevice(_) => (404, "no-such-device"),
            Error::ShadowConflict { .. } => (409, "shadow-conflict"),
            Error::ShadowTooLarge { .. } => (413, "shadow-too-large"),
            Error::NoSuchCommand(_) => (404, "no-such-command"),
            Error::CommandFinished(_) => (409, "command-finished"),
            Error::ShadowForgotten => (404, "shadow-forgotten"),
            Error::NoSuchTenant(_) => (404, "no-such-tenant"),
            Error::TenantExists(_) => (409, "tenant-exists"),
            Error::NoSuchAuditEntry(_) => (404, "no-such-audit-entry"),
            Error::NoSuchCredential(_) => (404, "no-such-credential"),
            Error::NoSuchSession(_) => (404, "no-such-session"),
            Error::NoSuchLoginSession(_) => (404, "no-such-login-session"),
            Error::NoSuchSavedSearch(_) => (404, "no-such-saved-search"),
            Error::SavedSearchExists(_) => (409, "saved-search-exists"),
            Error::NotOwner(_) => (403, "not-owner"),
            Error::NoBroker(_) => (503, "no-broker"),
            Error::SearchBusy => (503, "search-busy"),
            Error::TooManyBuckets(_) => (400, "too-many-buckets"),
            Error::SearchTimeout => (503, "search-timeout"),
            Error::DeviceExists(_) => (409, "device-exists"),
            Error::Decommissioned(_) => (409, "decommissioned"),
            Error::NoSuchDecommission(_) => (404, "no-such-decommission"),
            Error::CertificateTaken => (409, "certificate-taken"),
            Error::TooManyCredentials(_) => (409, "too-many-credentials"),
            Error::NoSuchAuthority(_) => (404, "no-such-authority"),
            Error::NoRevocationList(_) => (404, "no-revocation-list"),
            Error::AuthorityExists(_) => (409, "authority-exists"),
            Error::AuthorityEnabled(_) => (409, "authority-enabled"),
            Error::CannotSign(_) => (409, "cannot-sign"),
            Error::OldRevocationList { .. } => (409, "old-revocation-list"),
            Error::NoSuchRole(_) => (404, "no-such-role"),
            Error::NoSuchBinding(_) => (404, "no-such-binding"),
            Error::BindingExists => (409, "binding-exists"),
            Error::Exceeds(_) | Error::Above | Error::Gains(_) => (403, "exceeds-own-rights"),
            Error::NoSuchUser(_) => (404, "no-such-user"),
            Error::NoSuchApiKey(_) => (404, "no-such-api-key"),
            Error::RoleExists(_) => (409, "role-exists"),
            Error::RoleInUse(_) => (409, "role-in-use"),
            Error::RoleBuiltIn(_) => (409, "role-built-in"),
            Error::EmailTaken => (409, "email-taken"),
            Error::LastAdmin(_) => (409, "last-admin"),
            Error::NoSuchClaim(_) => (404, "no-such-claim"),
            Error::NoSuchClaimRequest(_) => (404, "no-such-claim-request"),
            Error::ClaimUsedUp(_) => (409, "claim-used-up"),
            Error::Decided(_) => (409, "decided-already"),
            Error::NoSuchGroup(_) => (404, "no-such-group"),
            Error::GroupExists(_) => (409, "group-exists"),
            Error::GroupInUse(_) => (409, "group-in-use"),
            Error::GroupOutOfScope(_) => (403, "out-of-scope"),
            Error::TooMany { .. } => (409, "too-many"),
            Error::NotPlatform(_) => (403, "forbidden"),
            Error::BadRule(rule) => {
                return Self::field(
                    format!("topic_rules[{}].filter", rule.index),
                    format!("{:?} {}", rule.filter, rule.why),
                );
            }
            Error::NoSuchGateway(_) => (422, "no-such-gateway"),
            Error::BadGateway(_) => (422, "gateway-not-allowed"),
            Error::VersionMismatch { .. } => (412, "version-mismatch"),
            Error::BadLogin => (401, "bad-login"),
            Error::BadResetToken => (401, "bad-reset-token"),
            Error::OidcNoRole => (403, "oidc-no-role"),
            Error::OidcNoAccount => (403, "oidc-no-account"),
            Error::OidcUnverified => (403, "oidc-unverified"),
            Error::TotpRequired => (401, "totp-required"),
            Error::BadCode => (401, "bad-code"),
            Error::TotpOn => (409, "totp-on"),
            Error::TotpOff => (409, "totp-off"),
            Error::Locked { retry_after_s, .. } => {
                return Self { retry_after_s: *retry_after_s, ..Self::new(429, "login-locked", error.to_string()) };
            }
            Error::BadToken(_) => (401, "bad-token"),
            Error::IdempotencyConflict => (422, "idempotency-conflict"),
            Error::Invalid(_) => (400, "invalid"),
            Error::BadId(_) => (400, "bad-id"),
            Error::Busy(_) => (429, "busy"),
            Error::Database(sqlx::Error::Database(cause)) if cause.code().as_deref() == Some(QUERY_CANCELED) => {
                return Self::new(503, "timeout", "the database took too long: ask for less at once");
            }
            Error::Database(cause) if is_beyond_bounds(cause) => return Self::out_of_scope(),
            Error::Database(cause) if is_away(cause) => return Self::database_away(cause),
            Error::SchemaTooNew { .. }
            | Error::Postgres(_)
            | Error::UnusableDatabase(_)
            | Error::Index(_)
            | Error::Migrate(_)
            | Error::Seal(_)
            | Error::Internal(_)
            | Error::Database(_) => return Self::internal(&error),
        };
        Self::new(status, kind, error.to_string())
    }
}

/// Whether a policy of migration 0011 refused a row. A privilege that is missing has the same code, and is our mistake.
fn is_beyond_bounds(error: &sqlx::Error) -> bool {
    let sqlx::Error::Database(error) = error else { return false };
    let error = error.try_downcast_ref::<PgDatabaseError>();
    error.is_some_and(|error| error.code() == REFUSED && error.routine() == Some("ExecWithCheckOptions"))
}

/// Whether the same request may succeed when it is sent again: the server cannot be reached, is starting or stopping, is
/// out of a resource, or two transactions were in each other's way.
fn is_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed => true,
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            ["08", "53", "57", "40"].iter().any(|class| code.starts_with(class))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_is_away_is_told_from_a_statement_that_is_wrong() {
        let away = Problem::from(Error::Database(sqlx::Error::PoolTimedOut));
        assert_eq!((away.status.as_u16(), away.kind), (503, "database-away"));
        assert!(away.into_response().headers().contains_key(header::RETRY_AFTER));
        let wrong = Problem::from(Error::Database(sqlx::Error::RowNotFound));
        assert_eq!((wrong.status.as_u16(), wrong.kind), (500, "internal"));
        assert!(!wrong.detail.contains("row"), "what failed inside is for the log: {}", wrong.detail);
    }

    #[test]
    fn a_title_is_the_kind_in_words() {
        assert_eq!(title("no-such-device"), "No such device");
        assert_eq!(title(""), "");
    }
}
