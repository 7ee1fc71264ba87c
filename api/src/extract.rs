//! What handlers are given: the right to call, as an argument, and bodies, paths and queries whose refusals are problems.

use std::marker::PhantomData;
use std::str::FromStr;

use axum::body::Bytes;
use axum::extract::path::ErrorKind;
use axum::extract::rejection::PathRejection;
use axum::extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, HeaderName, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::api_key;
use fleet_core::audit::{Actor, Author, Source};
use fleet_core::config::Secret;
use fleet_core::id::{ApiKeyId, LoginSessionId, TenantKey, UserId};
use fleet_core::idempotency::{self, Answer, Key};
use fleet_core::policy::{Manager, Permission, Principal, Role, Who};
use fleet_core::scope::Extent;
use fleet_core::selector;
use fleet_core::token;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::client::Client;
use crate::denials::Visitor;
use crate::problem::{FieldError, Problem};
use crate::state::App;

const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");

/// Who calls: a user with a valid access token or API key, whatever that may do.
pub(crate) struct Caller {
    pub(crate) id: UserId,
    pub(crate) tenant: TenantKey,
    /// The API key, when one was shown.
    pub(crate) key: Option<ApiKeyId>,
    principal: Principal,
    source: Source,
    /// The access token or API key that was shown.
    bearer: Secret,
}

impl Caller {
    /// The role of the user or of the API key.
    pub(crate) fn role(&self) -> Option<&str> {
        self.principal.role().map(Role::name)
    }

    /// In whose name access is managed.
    pub(crate) fn manager(&self) -> Manager<'_> {
        self.principal.manager()
    }

    /// Who is to answer for what the caller does.
    pub(crate) fn author(&self) -> Author {
        let actor = self.key.map_or(Actor::User(self.id), Actor::ApiKey);
        Author { tenant: self.tenant, actor, source: self.source.clone() }
    }

    /// Who calls, by id: of the API key, or of the user.
    pub(crate) fn named(&self) -> String {
        self.key.map_or_else(|| self.id.to_string(), |key| key.to_string())
    }

    /// By what it is known who calls, for what outlives the request.
    pub(crate) fn bearer(&self) -> &Secret {
        &self.bearer
    }

    /// Who calls, with all rights.
    pub(crate) fn principal(&self) -> &Principal {
        &self.principal
    }

    /// Refuses a caller who does not hold this permission as well.
    pub(crate) fn needs(&self, permission: Permission) -> Result<(), Problem> {
        if self.principal.may(permission) {
            return Ok(());
        }
        Err(Problem::forbidden(permission.name()))
    }

    /// The devices for which the caller has a permission.
    pub(crate) fn extent(&self, permission: Permission) -> Extent {
        self.principal.extent(permission)
    }

    /// Refuses a caller who has this permission for some devices only.
    fn needs_for_everything(&self, permission: Permission) -> Result<(), Problem> {
        if self.extent(permission).is_everything() {
            return Ok(());
        }
        let detail = format!("this needs the permission {} for the whole tenant", permission.name());
        Err(Problem::new(403, "out-of-scope", detail))
    }

    pub(crate) fn permissions(&self) -> Vec<Permission> {
        Permission::ALL.iter().copied().filter(|permission| self.principal.may(*permission)).collect()
    }
}

impl FromRequestParts<App> for Caller {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let token = bearer(&parts.headers)?.to_owned();
        let source = source(parts, app).await;
        let mut db = app.db.acquire().await?;
        let principal = match token::principal(&mut db, &app.keys, &token, app.clock.now()).await {
            Ok(principal) => principal,
            Err(error) => {
                // Somebody goes on with a key that is worth nothing any more.
                if let Some((tenant, key)) = api_key::of_known(&mut db, &token).await? {
                    visitor(parts).is(Author { tenant, actor: Actor::ApiKey(key), source });
                }
                return Err(error.into());
            }
        };
        if let Some(actor) = actor(&principal) {
            visitor(parts).is(Author { tenant: principal.tenant, actor, source: source.clone() });
        }
        if principal.proof.viewer.is_some() && !parts.method.is_safe() {
            return Err(Problem::new(403, "read-only", "who looks at what another user sees may change nothing"));
        }
        match principal.who {
            Who::User { id, key, .. } => {
                Ok(Self { id, tenant: principal.tenant, key, principal, source, bearer: token.into() })
            }
            Who::Device { .. } | Who::Claim { .. } => {
                Err(Problem::new(401, "bad-token", "expected the access token of a user"))
            }
        }
    }
}

/// Who acts: while an admin looks as another user, the admin does.
fn actor(principal: &Principal) -> Option<Actor> {
    match principal.who {
        Who::User { key: Some(key), .. } => Some(Actor::ApiKey(key)),
        Who::User { id, .. } => Some(Actor::User(principal.proof.viewer.unwrap_or(id))),
        Who::Device { .. } | Who::Claim { .. } => None,
    }
}

async fn source(parts: &mut Parts, app: &App) -> Source {
    let Ok(client) = Client::from_request_parts(parts, app).await;
    client.source()
}

fn visitor(parts: &Parts) -> Visitor {
    parts.extensions.get::<Visitor>().cloned().unwrap_or_default()
}

/// A caller who logged in: a person, not a program with an API key.
pub(crate) struct Person {
    pub(crate) caller: Caller,
    pub(crate) session: LoginSessionId,
}

impl std::ops::Deref for Person {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl FromRequestParts<App> for Person {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let session = caller.principal.proof.session;
        let session =
            session.ok_or_else(|| Problem::new(403, "forbidden", "this needs a login: an API key will not do"))?;
        Ok(Self { caller, session })
    }
}

/// The token of `Authorization: Bearer …` (RFC 6750 §2.1).
pub(crate) fn bearer(headers: &HeaderMap) -> Result<&str, Problem> {
    let missing = || Problem::new(401, "no-token", "expected an access token: Authorization: Bearer …");
    let given = headers.get(header::AUTHORIZATION).ok_or_else(missing)?;
    let (scheme, token) = given.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(missing)?;
    if scheme.eq_ignore_ascii_case("bearer") { Ok(token.trim()) } else { Err(missing()) }
}

/// The right to call a route, as a type.
pub(crate) trait Right: Send + Sync {
    const PERMISSION: Permission;
}

macro_rules! rights {
    ($($name:ident),+) => {
        $(
            #[doc = concat!("[`Permission::", stringify!($name), "`]")]
            pub(crate) struct $name;
            impl Right for $name {
                const PERMISSION: Permission = Permission::$name;
            }
        )+
    };
}

rights!(
    DevicesRead,
    DevicesWrite,
    CredentialsManage,
    TelemetryRead,
    ShadowRead,
    ShadowWrite,
    LogsWrite,
    LogsRead,
    CommandsSend,
    DeadLettersRead,
    ConnectionsRead,
    ConnectionsManage,
    AuditRead,
    AccessManage,
    AuthoritiesManage,
    ProvisioningManage,
    DevicesDecommission
);

/// A caller who holds the permission `R`.
pub(crate) struct Can<R> {
    pub(crate) caller: Caller,
    right: PhantomData<R>,
}

impl<R> std::ops::Deref for Can<R> {
    type Target = Caller;
    fn deref(&self) -> &Caller {
        &self.caller
    }
}

impl<R: Right> Can<R> {
    /// Refuses a caller who has it for some devices only.
    pub(crate) fn needs_everything(&self) -> Result<(), Problem> {
        self.caller.needs_for_everything(R::PERMISSION)
    }
}

impl<R: Right> Can<R> {
    /// Looks again at who calls and what they may, for an answer that takes its time.
    pub(crate) async fn again(&mut self, app: &App) -> Result<(), Problem> {
        let mut db = app.db.acquire().await?;
        let bearer = self.caller.bearer.expose();
        self.caller.principal = token::principal(&mut db, &app.keys, bearer, app.clock.now()).await?;
        self.caller.needs(R::PERMISSION)
    }
}

impl<R: Right> FromRequestParts<App> for Can<R> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let caller = Caller::from_request_parts(parts, app).await?;
        caller.needs(R::PERMISSION)?;
        Ok(Self { caller, right: PhantomData })
    }
}

/// A JSON body, in and out.
pub(crate) struct Json<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<App> for Json<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        expect_type(request.headers(), &["application/json"])?;
        parsed(&body(request, app, app.http.max_body_bytes).await?).map(Self)
    }
}

impl<T: Serialize> IntoResponse for Json<T> {
    fn into_response(self) -> Response {
        match serde_json::to_vec(&self.0) {
            Ok(body) => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
            Err(error) => Problem::internal(&error).into_response(),
        }
    }
}

/// A JSON body that may be left out: no body at all stands for the default.
pub(crate) struct MaybeJson<T>(pub(crate) T);

impl<T: DeserializeOwned + Default> FromRequest<App> for MaybeJson<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let headers = request.headers().clone();
        let body = body(request, app, app.http.max_body_bytes).await?;
        if body.is_empty() {
            return Ok(Self(T::default()));
        }
        expect_type(&headers, &["application/json"])?;
        parsed(&body).map(Self)
    }
}

/// A JSON merge patch (RFC 7396), also under the name of plain JSON.
pub(crate) struct MergePatch<T>(pub(crate) T);

impl<T: DeserializeOwned> FromRequest<App> for MergePatch<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        expect_type(request.headers(), &["application/merge-patch+json", "application/json"])?;
        parsed(&body(request, app, app.http.max_body_bytes).await?).map(Self)
    }
}

/// Tells null from what was left out.
#[expect(clippy::option_option, reason = "left out, null, a value")]
pub(crate) fn given<'de, D: Deserializer<'de>, T: Deserialize<'de>>(
    deserializer: D,
) -> Result<Option<Option<T>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// A field of a patch that cannot be cleared.
pub(crate) fn not_null<'de, D: Deserializer<'de>, T: Deserialize<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    T::deserialize(deserializer).map(Some)
}

/// The body, when it has at most so many bytes.
pub(crate) async fn body(mut request: Request, app: &App, most: usize) -> Result<Bytes, Problem> {
    DefaultBodyLimit::max(most).apply(&mut request);
    Bytes::from_request(request, app).await.map_err(|refused| match refused.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Problem::new(413, "body-too-large", format!("the body is too large: expected at most {most} bytes"))
        }
        _ => Problem::new(400, "bad-request", "the body ended before it was complete"),
    })
}

/// The one of these types that the body is of.
pub(crate) fn expect_type<'a>(headers: &HeaderMap, expected: &[&'a str]) -> Result<&'a str, Problem> {
    let given = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = given.split(';').next().unwrap_or_default().trim();
    let found = expected.iter().find(|expected| essence.eq_ignore_ascii_case(expected));
    found.copied().ok_or_else(|| {
        let detail = format!("expected Content-Type: {}", expected.join(" or "));
        Problem::new(415, "unsupported-media-type", detail)
    })
}

/// Whether the caller wants CSV; whoever takes JSON too gets JSON.
pub(crate) fn wants_csv(headers: &HeaderMap) -> bool {
    let accept = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok()).collect::<Vec<_>>();
    let takes = |wanted: &str| {
        let mut kinds = accept.iter().flat_map(|value| value.split(','));
        kinds.any(|kind| kind.split(';').next().is_some_and(|kind| kind.trim().eq_ignore_ascii_case(wanted)))
    };
    takes("text/csv") && !takes("application/json")
}

fn parsed<T: DeserializeOwned>(body: &[u8]) -> Result<T, Problem> {
    let malformed =
        |error: serde_json::Error| Problem::new(400, "malformed-json", format!("the body is not JSON: {error}"));
    // Serde would take an array for a struct as well, member by member.
    if !body.trim_ascii_start().starts_with(b"{") {
        let json = serde_json::from_slice::<IgnoredAny>(body);
        return Err(json.map_or_else(malformed, |_| Problem::field(".", "expected an object")));
    }
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if inner.is_data() { Problem::field(path, inner.to_string()) } else { malformed(inner) }
    })?;
    json.end().map_err(malformed)?;
    Ok(value)
}

/// The variables of a path.
pub(crate) struct Path<T>(pub(crate) T);

impl<T: DeserializeOwned + Send> FromRequestParts<App> for Path<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        #[expect(clippy::disallowed_types, reason = "the one place that wraps it")]
        let path = axum::extract::Path::<T>::from_request_parts(parts, app).await;
        path.map(|path| Self(path.0)).map_err(|refused| bad_path(&refused))
    }
}

fn bad_path(refused: &PathRejection) -> Problem {
    let said = match refused {
        PathRejection::FailedToDeserializePathParams(failed) => match failed.kind() {
            ErrorKind::Message(message) | ErrorKind::DeserializeError { message, .. } => message.clone(),
            kind => kind.to_string(),
        },
        refused => refused.to_string(),
    };
    Problem::new(400, "bad-id", said)
}

/// A query made of known parameters only.
pub(crate) struct Query<T>(pub(crate) T);

/// Reads itself from the parameters of a query.
pub(crate) trait FromQuery: Sized {
    fn from_query(query: &mut Params<'_>) -> Option<Self>;
}

impl<T: FromQuery> FromRequestParts<App> for Query<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let mut params = Params::new(parts.uri.query().unwrap_or_default(), app);
        let read = T::from_query(&mut params);
        match (params.finish(), read) {
            (Ok(()), Some(read)) => Ok(Self(read)),
            (Ok(()), None) => Err(Problem::new(400, "invalid", "the query could not be read")),
            (Err(problem), _) => Err(problem),
        }
    }
}

/// The parameters of a query. Each is taken by name; what is left over in the end is unknown, and refused.
pub(crate) struct Params<'a> {
    app: &'a App,
    given: Vec<(String, String)>,
    known: Vec<&'static str>,
    errors: Vec<FieldError>,
}

impl<'a> Params<'a> {
    fn new(query: &str, app: &'a App) -> Self {
        let given = form_urlencoded::parse(query.as_bytes()).into_owned().collect();
        Self { app, given, known: Vec::new(), errors: Vec::new() }
    }

    /// Every occurrence of a parameter.
    pub(crate) fn all(&mut self, name: &'static str) -> Vec<String> {
        self.known.push(name);
        let (wanted, rest) = std::mem::take(&mut self.given).into_iter().partition(|(given, _)| given == name);
        self.given = rest;
        wanted.into_iter().map(|(_, value): (String, String)| value).collect()
    }

    /// A parameter that may be there once.
    pub(crate) fn one<T: FromStr<Err: ToString>>(&mut self, name: &'static str) -> Option<T> {
        let mut all = self.all(name);
        if all.len() > 1 {
            self.refuse(name, "given twice: expected once");
            return None;
        }
        match all.pop()?.parse() {
            Ok(value) => Some(value),
            Err(error) => {
                self.refuse(name, error.to_string());
                None
            }
        }
    }

    /// The time that relative times are taken from.
    pub(crate) fn now(&self) -> DateTime<Utc> {
        self.app.clock.now()
    }

    /// A selector of devices that may be there once.
    pub(crate) fn selector(&mut self, name: &'static str) -> Option<fleet_core::query::Query> {
        let text = self.one::<String>(name)?;
        match selector::read(&text, self.app.clock.now()) {
            Ok(selector) => Some(selector),
            Err(error) => {
                self.refuse(name, error.to_string());
                None
            }
        }
    }

    /// `limit`: items on a page, `default` unless it is said, at most `most`; a larger one is cut and counted.
    pub(crate) fn limit(&mut self, default: usize, most: usize) -> usize {
        match self.one::<String>("limit").map(|text| text.parse::<usize>()) {
            None => default,
            Some(Ok(limit)) if limit > most => {
                self.app.metrics.pages_clamped.inc();
                most
            }
            Some(Ok(limit)) if limit > 0 => limit,
            Some(_) => {
                self.refuse("limit", format!("expected a number from 1 to {most}"));
                default
            }
        }
    }

    /// Takes what is left over as it is: whoever sends it follows rules of others.
    pub(crate) fn ignore_others(&mut self) {
        self.given.clear();
    }

    /// Notes what is wrong with a parameter.
    pub(crate) fn refuse(&mut self, name: &str, detail: impl Into<String>) {
        self.errors.push(FieldError { field: name.chars().take(80).collect(), detail: detail.into() });
    }

    fn finish(mut self) -> Result<(), Problem> {
        let unknown = format!("unknown parameter: expected {}", self.known.join(", "));
        for (name, _) in std::mem::take(&mut self.given) {
            self.refuse(&name, unknown.as_str());
        }
        if self.errors.is_empty() { Ok(()) } else { Err(Problem::fields(self.errors)) }
    }
}

/// `If-Match` and `If-None-Match` (RFC 9110 §13.1): entity tags as they were given, `None` for `*`.
pub(crate) struct Conditions {
    if_match: Option<Vec<String>>,
    if_none_match: Vec<String>,
}

impl Conditions {
    /// The versions that `If-Match` accepts; empty when it is not there or is `*`.
    /// A tag is `"{version}"` or `"{version}-…"`: what follows the version changes with the device's status, and a status
    /// that moved on must not refuse a change.
    pub(crate) fn versions(&self) -> Vec<i64> {
        let version = |tag: &String| {
            let tag = tag.trim_start_matches("W/").trim_matches('"');
            tag.split('-').next().and_then(|version| version.parse().ok()).unwrap_or(0)
        };
        self.if_match.iter().flatten().map(version).collect()
    }

    /// Whether the caller has this representation already.
    pub(crate) fn has(&self, tag: &str) -> bool {
        // RFC 9110 §13.1.2: the weak comparison.
        self.if_none_match.iter().any(|given| given.trim_start_matches("W/") == tag)
    }
}

impl FromRequestParts<App> for Conditions {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Problem> {
        let if_match = tags(&parts.headers, &header::IF_MATCH)?;
        let if_none_match = tags(&parts.headers, &header::IF_NONE_MATCH)?.unwrap_or_default();
        Ok(Self { if_match: if_match.filter(|tags| !tags.iter().any(|tag| tag == "*")), if_none_match })
    }
}

fn tags(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Vec<String>>, Problem> {
    let mut tags = Vec::new();
    for value in headers.get_all(name) {
        let text = value.to_str().unwrap_or_default();
        for tag in text.split(',').map(str::trim) {
            let opaque = tag.trim_start_matches("W/");
            if tag != "*" && !(opaque.len() >= 2 && opaque.starts_with('"') && opaque.ends_with('"')) {
                return Err(Problem::field(name.as_str(), "expected entity tags in double quotes, or *"));
            }
            tags.push(tag.to_owned());
        }
    }
    Ok(if tags.is_empty() { None } else { Some(tags) })
}

/// `Idempotency-Key`: a creating request that is sent twice creates once.
pub(crate) struct Once {
    name: Option<String>,
    route: String,
}

/// The key of a request that is under way, to be given its answer.
pub(crate) struct Taken(Option<Key>);

impl FromRequestParts<App> for Once {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, Problem> {
        let route = format!("{} {}", parts.method, parts.uri.path());
        let mut given = parts.headers.get_all(IDEMPOTENCY_KEY).iter();
        let Some(first) = given.next() else { return Ok(Self { name: None, route }) };
        let text = first.to_str().ok().filter(|_| given.next().is_none());
        let text =
            text.ok_or_else(|| Problem::field(IDEMPOTENCY_KEY.as_str(), "expected one key of ASCII characters"))?;
        Ok(Self { name: Some(text.to_owned()), route })
    }
}

impl Once {
    /// Takes the key in the transaction that does the work; `Err` holds the answer that was given before.
    pub(crate) async fn begin(
        self,
        db: &mut PgConnection,
        caller: &Caller,
        request: &impl Serialize,
        app: &App,
    ) -> Result<Result<Taken, Replayed>, Problem> {
        let Some(name) = self.name else { return Ok(Ok(Taken(None))) };
        let key = Key::new(caller.tenant, caller.id, &name)
            .map_err(|error| Problem::field(IDEMPOTENCY_KEY.as_str(), error.to_string()))?;
        let said = serde_json::to_vec(request).map_err(|error| Problem::internal(&error))?;
        let hash = Sha256::new().chain_update(self.route).chain_update([0]).chain_update(said).finalize();
        Ok(match idempotency::begin(db, &key, &hash, app.clock.now()).await? {
            None => Ok(Taken(Some(key))),
            Some(answer) => Err(Replayed(answer)),
        })
    }
}

impl Taken {
    /// Keeps the answer, in which no secret may be, in the same transaction.
    pub(crate) async fn finish(
        self,
        db: &mut PgConnection,
        status: StatusCode,
        body: &impl Serialize,
    ) -> Result<(), Problem> {
        let Some(key) = self.0 else { return Ok(()) };
        let body = serde_json::to_value(body).map_err(|error| Problem::internal(&error))?;
        let answer = Answer { status: status.as_u16(), body };
        Ok(idempotency::finish(db, &key, &answer).await?)
    }
}

/// An answer that was given before to the same request.
pub(crate) struct Replayed(Answer);

impl Replayed {
    /// A part of the body, such as `/device/id`.
    fn text(&self, pointer: &str) -> &str {
        self.0.body.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
    }

    /// The answer with the `Location` of what was made then; `id` points at its id in the body.
    pub(crate) fn at(self, id: &str, location: impl Fn(&str) -> String) -> Response {
        ([(header::LOCATION, location(self.text(id)))], self).into_response()
    }
}

impl IntoResponse for Replayed {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::CREATED);
        (status, [("idempotency-replayed", "true")], Json(self.0.body)).into_response()
    }
}
