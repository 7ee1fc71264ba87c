//! Certificate authorities, and their revocation lists.

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::authority::{self, Authority, Patch};
use fleet_core::certificate::to_pem;
use fleet_core::id::AuthorityId;
use fleet_core::revocation;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{
    AuthoritiesManage, Can, Conditions, CredentialsManage, FromQuery, Json, MergePatch, Once, Params, Path, Query,
    not_null,
};
use crate::page::Page;
use crate::problem::{Document, Problem};
use crate::resource::{Resource, current, made, unless_known};
use crate::state::App;
use crate::time;

/// The media type of a revocation list in DER (RFC 2585).
const PKIX_CRL: &str = "application/pkix-crl";
/// The media type of PEM.
const PEM: &str = "application/x-pem-file";

/// Where the key of an authority is.
#[derive(Clone, Copy, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[schema(as = AuthorityKind)]
pub(crate) enum Kind {
    /// Here: it signs what devices ask for.
    BuiltIn,
    /// Elsewhere: what it signed lets devices in.
    Registered,
}

/// A certificate authority.
#[derive(Serialize, ToSchema)]
#[schema(as = Authority)]
pub(crate) struct AuthorityBody {
    /// Its id.
    #[schema(value_type = String, example = "aut_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: AuthorityId,
    /// What people call it.
    #[schema(example = "Devices of the Oslo plant")]
    name: String,
    /// Where its key is.
    kind: Kind,
    /// Whether its certificates are worth nothing for the time being, and it signs none.
    disabled: bool,
    /// Whom its certificate is made out to.
    #[schema(example = "O=main, CN=Devices of the Oslo plant")]
    subject: String,
    /// SHA-256 of its certificate's DER, in hexadecimal.
    fingerprint: String,
    /// Its certificate in PEM: those who check certificates of this authority need it.
    certificate_pem: String,
    /// The certificates of the authorities above it, in PEM, the nearest first; empty when there are none.
    chain_pem: String,
    /// It is not valid before.
    #[serde(serialize_with = "time::serialize")]
    not_before: DateTime<Utc>,
    /// It is not valid after.
    #[serde(serialize_with = "time::serialize")]
    not_after: DateTime<Utc>,
    /// The number of its newest revocation list in hexadecimal; null when there is none yet.
    crl_number: Option<String>,
    /// When that list is to be replaced.
    #[serde(serialize_with = "time::serialize_maybe")]
    crl_next_update: Option<DateTime<Utc>>,
    /// Rises with every change.
    version: i64,
    /// When it was made or registered.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// When it was last changed.
    #[serde(serialize_with = "time::serialize")]
    updated_at: DateTime<Utc>,
}

impl AuthorityBody {
    fn new(authority: Authority) -> Self {
        let Authority { id, name, kind, certificate, chain, disabled, crl_number, crl_next_update, version, .. } =
            authority;
        Self {
            id,
            name,
            kind: match kind {
                authority::Kind::BuiltIn => Kind::BuiltIn,
                authority::Kind::Registered => Kind::Registered,
            },
            disabled,
            fingerprint: certificate.fingerprint.to_string(),
            certificate_pem: to_pem("CERTIFICATE", &certificate.der),
            chain_pem: chain.iter().map(|der| to_pem("CERTIFICATE", der)).collect(),
            subject: certificate.subject,
            not_before: certificate.not_before,
            not_after: certificate.not_after,
            crl_number: crl_number.map(|number| number.to_string()),
            crl_next_update,
            version,
            created_at: authority.created_at,
            updated_at: authority.updated_at,
        }
    }
}

impl Resource for AuthorityBody {
    fn tag(&self) -> String {
        format!("\"{}\"", self.version)
    }
}

/// An authority to be made or registered.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewAuthority {
    /// What people call it.
    #[schema(example = "Devices of the Oslo plant", min_length = 1, max_length = 64)]
    name: String,
    /// `built-in`: a new one, whose key stays here. `registered`: somebody else's.
    kind: Kind,
    /// Built-in: how long it is valid, in seconds. Left out: as long as the server's settings allow, ten years by default.
    #[schema(example = 315_360_000, minimum = 1)]
    lifetime_s: Option<u64>,
    /// Registered: its certificate in PEM.
    certificate_pem: Option<String>,
    /// Registered: a certificate in PEM that it has signed for a nonce, as its common name.
    proof_pem: Option<String>,
}

/// A text to be signed by an authority that is to be registered.
#[derive(Serialize, ToSchema)]
pub(crate) struct Nonce {
    /// To be the common name of a certificate.
    #[schema(example = "AAABmqzB6oD3Yx0m6p0mJt1c9Q2mHc0dKqv2jg")]
    nonce: String,
    /// It is worth nothing from then on.
    #[serde(serialize_with = "time::serialize")]
    expires_at: DateTime<Utc>,
}

/// Ask for a nonce
///
/// A certificate with it as common name, signed by an authority, proves when the authority is registered that whoever
/// registers it holds its key. It is good for an hour, in the caller's tenant.
#[utoipa::path(
    post, path = "/api/v1/authorities/nonce", tag = "authorities", security(("bearer" = ["authorities:manage"])),
    responses((status = 200, description = "The nonce.", body = Nonce))
)]
pub(crate) async fn nonce(State(app): State<App>, caller: Can<AuthoritiesManage>) -> Result<Json<Nonce>, Problem> {
    let authority::Nonce { text, expires_at } = app.pki.nonce(caller.tenant, app.clock.now())?;
    Ok(Json(Nonce { nonce: text, expires_at }))
}

/// Make or register an authority
///
/// Its certificates stand for devices of this tenant and of no other. The key of a built-in one never leaves the server.
#[utoipa::path(
    post, path = "/api/v1/authorities", tag = "authorities", request_body = NewAuthority,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["authorities:manage"])),
    responses(
        (status = 201, description = "It is there.", body = AuthorityBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 400, description = "A certificate is not what was expected.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The name or the certificate is taken, or there are too many.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<AuthoritiesManage>,
    once: Once,
    Json(request): Json<NewAuthority>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let now = app.clock.now();
    let NewAuthority { name, kind, lifetime_s, certificate_pem, proof_pem } = &request;
    let authority = match (kind, lifetime_s, certificate_pem.as_deref().zip(proof_pem.as_deref())) {
        (Kind::BuiltIn, lifetime_s, None) if certificate_pem.is_none() && proof_pem.is_none() => {
            authority::create(&mut tx, &app.pki, caller.tenant, name, *lifetime_s, now).await?
        }
        (Kind::Registered, None, Some(pems)) => {
            authority::register(&mut tx, &app.pki, caller.tenant, name, pems, now).await?
        }
        (Kind::BuiltIn, ..) => {
            return Err(Problem::field(
                "kind",
                "a built-in authority is made here: expected no certificate_pem and proof_pem",
            ));
        }
        (Kind::Registered, ..) => {
            return Err(Problem::field("kind", "expected certificate_pem and proof_pem, and no lifetime_s"));
        }
    };
    let body = AuthorityBody::new(authority);
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("authority.create", body.id).after(&body)).await?;
    Ok(made(location(&body.id.to_string()), body))
}

fn location(id: &str) -> String {
    format!("/api/v1/authorities/{id}")
}

/// List authorities
///
/// In the order in which they came.
#[utoipa::path(
    get, path = "/api/v1/authorities", tag = "authorities", security(("bearer" = ["credentials:manage"])),
    responses((status = 200, description = "All of them, on one page.", body = Page<AuthorityBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
) -> Result<Json<Page<AuthorityBody>>, Problem> {
    let authorities = authority::list(&mut *caller.read(&app).await?, caller.tenant).await?;
    Ok(Json(Page::whole(authorities.into_iter().map(AuthorityBody::new).collect())))
}

/// Read an authority
#[utoipa::path(
    get, path = "/api/v1/authorities/{id}", tag = "authorities",
    params(
        ("id" = String, Path, description = "The authority's id"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has"),
    ),
    security(("bearer" = ["credentials:manage"])),
    responses(
        (status = 200, description = "The authority.", body = AuthorityBody, headers(("ETag" = String, description = "For If-Match and If-None-Match."))),
        (status = 304, description = "The caller has it already."),
        (status = 404, description = "There is no such authority.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path(id): Path<AuthorityId>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let authority = authority::find(&mut *caller.read(&app).await?, caller.tenant, id).await?;
    Ok(unless_known(&conditions, AuthorityBody::new(authority)))
}

/// What of an authority is to change; what is left out stays.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ChangeAuthority {
    /// What people call it; the name in its certificate stays.
    #[serde(default, deserialize_with = "not_null")]
    #[schema(value_type = Option<String>, min_length = 1, max_length = 64)]
    name: Option<String>,
    /// Whether its certificates are worth nothing for the time being, and it signs none.
    #[serde(default, deserialize_with = "not_null")]
    #[schema(value_type = Option<bool>)]
    disabled: Option<bool>,
}

/// Change an authority
///
/// Disabling it refuses its certificates from now on, and ends the connections that were made by them. It can be enabled again.
#[utoipa::path(
    patch, path = "/api/v1/authorities/{id}", tag = "authorities",
    request_body(content = ChangeAuthority, content_type = "application/merge-patch+json"),
    params(
        ("id" = String, Path, description = "The authority's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["authorities:manage"])),
    responses(
        (status = 200, description = "The authority as it is now.", body = AuthorityBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 404, description = "There is no such authority.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The name is taken.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(app): State<App>,
    caller: Can<AuthoritiesManage>,
    Path(id): Path<AuthorityId>,
    conditions: Conditions,
    MergePatch(ChangeAuthority { name, disabled }): MergePatch<ChangeAuthority>,
) -> Result<Response, Problem> {
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let patch = Patch { name, disabled };
    let (old, new) = authority::update(&mut tx, caller.tenant, id, &patch, &conditions.versions(), now).await?;
    let (old, new) = (AuthorityBody::new(old), AuthorityBody::new(new));
    tx.commit(Entry::of("authority.update", id).before(&old).after(&new)).await?;
    Ok(current(new))
}

/// Delete an authority
///
/// It must be disabled. The certificates of a built-in one are revoked, its key is gone, and there is no further revocation
/// list. A certificate that was registered for a device by itself, though a registered authority signed it, is accepted again.
#[utoipa::path(
    delete, path = "/api/v1/authorities/{id}", tag = "authorities",
    params(
        ("id" = String, Path, description = "The authority's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["authorities:manage"])),
    responses(
        (status = 204, description = "It is gone."),
        (status = 404, description = "There is no such authority.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is enabled.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<AuthoritiesManage>,
    Path(id): Path<AuthorityId>,
    conditions: Conditions,
) -> Result<StatusCode, Problem> {
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let old = authority::delete(&mut tx, caller.tenant, id, &conditions.versions(), now).await?;
    tx.commit(Entry::of("authority.delete", id).before(&AuthorityBody::new(old))).await?;
    Ok(StatusCode::NO_CONTENT)
}

// Below another authority

/// A request for a certificate.
#[derive(Serialize, ToSchema)]
pub(crate) struct AuthorityRequest {
    /// In PEM (PKCS #10).
    csr_pem: String,
}

/// Read the signing request of a built-in authority
///
/// For another authority to sign, so that what the built-in one signs leads there. Its key stays here.
#[utoipa::path(
    get, path = "/api/v1/authorities/{id}/csr", tag = "authorities",
    params(("id" = String, Path, description = "The authority's id")),
    security(("bearer" = ["authorities:manage"])),
    responses(
        (status = 200, description = "The request.", body = AuthorityRequest),
        (status = 404, description = "There is no such authority.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is registered: its key is elsewhere.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn request(
    State(app): State<App>,
    caller: Can<AuthoritiesManage>,
    Path(id): Path<AuthorityId>,
) -> Result<Json<AuthorityRequest>, Problem> {
    let mut tx = caller.read(&app).await?;
    let csr_pem = authority::signing_request(&mut tx, &app.pki, caller.tenant, id).await?;
    Ok(Json(AuthorityRequest { csr_pem }))
}

/// What another authority has signed.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Placed {
    /// The certificate for the built-in authority, in PEM: its name, its key, CA:TRUE, keyCertSign and cRLSign.
    certificate_pem: String,
    /// The certificates of the authorities above, in PEM, the nearest first: at most four.
    chain_pem: String,
}

/// Place a built-in authority below another
///
/// Certificates that it signs from now on come with its new certificate and the chain. Those it has signed go on as they are.
#[utoipa::path(
    put, path = "/api/v1/authorities/{id}/certificate", tag = "authorities", request_body = Placed,
    params(
        ("id" = String, Path, description = "The authority's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["authorities:manage"])),
    responses(
        (status = 200, description = "The authority as it is now.", body = AuthorityBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 400, description = "It is no certificate for this authority, or the chain does not lead on.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such authority.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is registered.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn place(
    State(app): State<App>,
    caller: Can<AuthoritiesManage>,
    Path(id): Path<AuthorityId>,
    conditions: Conditions,
    Json(Placed { certificate_pem, chain_pem }): Json<Placed>,
) -> Result<Response, Problem> {
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let pems = (certificate_pem.as_str(), chain_pem.as_str());
    let (old, new) = authority::place_below(&mut tx, caller.tenant, id, pems, &conditions.versions(), now).await?;
    let (old, new) = (AuthorityBody::new(old), AuthorityBody::new(new));
    tx.commit(Entry::of("authority.place", id).before(&old).after(&new)).await?;
    Ok(current(new))
}

// Revocation lists

/// How a list is to be given out.
pub(crate) struct Format {
    is_pem: bool,
}

impl FromQuery for Format {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let format = query.one::<String>("format");
        match format.as_deref() {
            None | Some("der") => Some(Self { is_pem: false }),
            Some("pem") => Some(Self { is_pem: true }),
            Some(_) => {
                query.refuse("format", "expected der or pem");
                None
            }
        }
    }
}

/// Read the revocation list of an authority
///
/// For everybody, without a token. Of a built-in authority: its certificates that were taken back, signed (RFC 5280), at most half
/// its lifetime old and not older than the newest revocation. Of a registered one: the list that was uploaded.
#[utoipa::path(
    get, path = "/api/v1/authorities/{id}/crl", tag = "authorities",
    params(
        ("id" = String, Path, description = "The authority's id"),
        ("format" = Option<String>, Query, description = "`der`, or `pem`; `der` unless it is said"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has"),
    ),
    security(),
    responses(
        (status = 200, description = "The list.", content((Vec<u8> = "application/pkix-crl"), (String = "application/x-pem-file")), headers(("ETag" = String, description = "Its number."))),
        (status = 304, description = "The caller has it already."),
        (status = 404, description = "There is no such authority, or no list of it was uploaded.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn crl(
    State(app): State<App>,
    Path(id): Path<AuthorityId>,
    Query(Format { is_pem }): Query<Format>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let mut tx = app.begin().await?;
    let list = revocation::list(&mut tx, &app.pki, id, app.clock.now()).await?;
    tx.commit().await?;
    let tag = format!("\"{}{}\"", list.number, if is_pem { "-pem" } else { "" });
    let mut headers = HeaderMap::new();
    headers.insert(header::ETAG, tag.parse().map_err(|_| Problem::new(500, "internal", "a number that is no tag"))?);
    if conditions.has(&tag) {
        return Ok((StatusCode::NOT_MODIFIED, headers).into_response());
    }
    let (kind, body) = if is_pem { (PEM, to_pem("X509 CRL", &list.der).into_bytes()) } else { (PKIX_CRL, list.der) };
    Ok((headers, [(header::CONTENT_TYPE, kind)], body).into_response())
}

/// A revocation list.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Upload {
    /// In PEM, signed by the authority, with a number (RFC 5280 §5.2.3) not below that of the one before.
    crl_pem: String,
}

/// Upload the revocation list of a registered authority
///
/// It replaces the one before. What is on it is refused from now on, and open connections end. One whose next update is past
/// goes on to be in force.
#[utoipa::path(
    put, path = "/api/v1/authorities/{id}/crl", tag = "authorities", request_body = Upload,
    params(("id" = String, Path, description = "The authority's id")),
    security(("bearer" = ["authorities:manage"])),
    responses(
        (status = 200, description = "The authority as it is now.", body = AuthorityBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 400, description = "It is no revocation list of this authority, or not in force.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such authority.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is older than the one in force or too long, or the authority is built in.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn upload_crl(
    State(app): State<App>,
    caller: Can<AuthoritiesManage>,
    Path(id): Path<AuthorityId>,
    Json(Upload { crl_pem }): Json<Upload>,
) -> Result<Response, Problem> {
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let (old, new) = revocation::upload(&mut tx, &app.pki, caller.tenant, id, &crl_pem, now).await?;
    let (old, new) = (AuthorityBody::new(old), AuthorityBody::new(new));
    tx.commit(Entry::of("authority.revocation-list", id).before(&old).after(&new)).await?;
    Ok(current(new))
}
