//! The tokens and certificates of a device.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::certificate::Certificate;
use fleet_core::credential::{self, Credential, Issued, Registered};
use fleet_core::id::{CredentialId, DeviceId};
use fleet_core::revocation::Reason;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use crate::extract::{Can, CredentialsManage, FromQuery, Json, MaybeJson, Once, Params, Path, Query};
use crate::page::Page;
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// What a certificate is known by.
#[derive(Serialize, ToSchema)]
#[schema(as = Certificate)]
pub(crate) struct CertificateBody {
    /// SHA-256 of the certificate's DER, in hexadecimal.
    #[schema(example = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
    fingerprint: String,
    /// Whom it is made out to.
    #[schema(example = "CN=main/boiler-1")]
    subject: String,
    /// It is not valid after.
    #[serde(serialize_with = "time::serialize")]
    not_after: DateTime<Utc>,
}

impl CertificateBody {
    fn new(registered: &Registered) -> Self {
        let Registered { fingerprint, subject, not_after, .. } = registered;
        Self { fingerprint: fingerprint.to_string(), subject: subject.clone(), not_after: *not_after }
    }
}

/// What a credential is.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
#[schema(as = CredentialKind)]
pub(crate) enum Kind {
    /// A password.
    Token,
    /// An X.509 certificate.
    Certificate,
}

/// A credential that was just issued. The password is shown this once.
#[derive(Serialize, ToSchema)]
#[schema(as = NewCredential)]
pub(crate) struct NewCredentialBody {
    /// The credential's id.
    #[schema(value_type = String, example = "crd_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: CredentialId,
    /// What it is.
    kind: Kind,
    /// The MQTT user name; null for a certificate, which needs none.
    #[schema(example = "main/boiler-1")]
    username: Option<String>,
    /// The MQTT password; null for a certificate, and when the request is a repetition of an earlier one.
    password: Option<String>,
    /// The certificate, if it is one.
    certificate: Option<CertificateBody>,
    /// When it was issued.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// It is refused from then on; null: never.
    #[serde(serialize_with = "time::serialize_maybe")]
    expires_at: Option<DateTime<Utc>>,
}

impl NewCredentialBody {
    pub(crate) fn new(issued: Issued) -> Self {
        let Issued { id, username, password, created_at, expires_at } = issued;
        let (username, password) = (Some(username), Some(password.expose().to_owned()));
        Self { id, kind: Kind::Token, username, password, certificate: None, created_at, expires_at }
    }

    fn registered(registered: &Credential) -> Self {
        let Credential { id, created_at, expires_at, ref certificate, .. } = *registered;
        let certificate = certificate.as_ref().map(CertificateBody::new);
        Self { id, kind: Kind::Certificate, username: None, password: None, certificate, created_at, expires_at }
    }

    /// Takes the secret out, for what is kept, and gives it back for what is sent.
    pub(crate) fn take_password(&mut self) -> Option<String> {
        self.password.take()
    }

    pub(crate) fn put_password(&mut self, password: Option<String>) {
        self.password = password;
    }
}

/// A credential without its secret.
#[derive(Serialize, ToSchema)]
#[schema(as = Credential)]
pub(crate) struct CredentialBody {
    /// The credential's id.
    #[schema(value_type = String, example = "crd_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: CredentialId,
    /// What it is.
    kind: Kind,
    /// The certificate, if it is one.
    certificate: Option<CertificateBody>,
    /// Whether it is accepted now, provided that the device is not disabled.
    valid: bool,
    /// When it was issued.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// It is refused from then on; null: never.
    #[serde(serialize_with = "time::serialize_maybe")]
    expires_at: Option<DateTime<Utc>>,
    /// When it was revoked.
    #[serde(serialize_with = "time::serialize_maybe")]
    revoked_at: Option<DateTime<Utc>>,
}

impl CredentialBody {
    fn new(credential: &Credential, now: DateTime<Utc>) -> Self {
        let Credential { id, created_at, expires_at, revoked_at, ref certificate } = *credential;
        let certificate = certificate.as_ref().map(CertificateBody::new);
        let kind = if certificate.is_some() { Kind::Certificate } else { Kind::Token };
        Self { id, kind, certificate, valid: credential.is_valid(now), created_at, expires_at, revoked_at }
    }
}

/// List a device's credentials
///
/// Newest first: the valid ones, and the last 20 that ended.
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/credentials", tag = "credentials",
    params(("id" = String, Path, description = "The device's id")), security(("bearer" = ["credentials:manage"])),
    responses((status = 200, description = "All of them, on one page.", body = Page<CredentialBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path(id): Path<DeviceId>,
) -> Result<Json<Page<CredentialBody>>, Problem> {
    let now = app.clock.now();
    let credentials = credential::list(&mut *caller.read(&app).await?, caller.tenant, &id).await?;
    Ok(Json(Page::whole(credentials.iter().map(|one| CredentialBody::new(one, now)).collect())))
}

/// What credential to issue; a token when nothing is said.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Issue {
    /// An X.509 certificate in PEM to be accepted from the device, self-signed or not. Its key stays with the device.
    certificate: Option<String>,
}

/// Issue a further token, or register a certificate
///
/// At most two of a kind are valid at once for a device; a third is refused. A certificate is refused while it is
/// registered, for this device or another, and is valid until its own end.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/credentials", tag = "credentials", request_body = Option<Issue>,
    params(
        ("id" = String, Path, description = "The device's id"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again"),
    ),
    security(("bearer" = ["credentials:manage"])),
    responses(
        (status = 201, description = "It was issued or registered. A password is shown this once.", body = NewCredentialBody),
        (status = 409, description = "Two of this kind are valid already, or the certificate is registered already.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn issue(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path(id): Path<DeviceId>,
    once: Once,
    MaybeJson(request): MaybeJson<Issue>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", |made| location(&id, made))),
    };
    let now = app.clock.now();
    let mut body = match &request.certificate {
        None => NewCredentialBody::new(credential::issue(&mut tx, caller.tenant, &id, now).await?),
        Some(pem) => {
            let certificate = Certificate::from_pem(pem).map_err(|e| Problem::field("certificate", e.to_string()))?;
            let registered = credential::register(&mut tx, caller.tenant, &id, &certificate, now).await?;
            NewCredentialBody::registered(&registered)
        }
    };
    let password = body.take_password();
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("credential.issue", body.id).on(&id).after(&body)).await?;
    body.put_password(password);
    Ok(created(&id, body))
}

/// How to rotate.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rotate {
    /// How long the credential in use stays valid beside the new one, in seconds; 0 ends it at once.
    /// Left out: what the server's settings say, a day by default.
    #[schema(example = 3600, maximum = 31_622_400)]
    overlap_s: Option<u64>,
}

/// Rotate: issue a new token and end the others
///
/// The newest of the others stays valid during the overlap; an older one ends at once. Certificates stay as they are.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/credentials/rotate", tag = "credentials", request_body = Option<Rotate>,
    params(
        ("id" = String, Path, description = "The device's id"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again"),
    ),
    security(("bearer" = ["credentials:manage"])),
    responses((status = 201, description = "It was issued. The password is shown this once.", body = NewCredentialBody))
)]
pub(crate) async fn rotate(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path(id): Path<DeviceId>,
    once: Once,
    MaybeJson(request): MaybeJson<Rotate>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", |made| location(&id, made))),
    };
    let overlap_s = request.overlap_s.unwrap_or(app.auth.rotation_overlap_s);
    let issued = credential::rotate(&mut tx, caller.tenant, &id, overlap_s, app.clock.now()).await?;
    let mut body = NewCredentialBody::new(issued);
    let password = body.take_password();
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("credential.rotate", body.id).on(&id).after(&body)).await?;
    body.put_password(password);
    Ok(created(&id, body))
}

/// Why a credential is revoked.
pub(crate) struct Why(Reason);

impl FromQuery for Why {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let Some(name) = query.one::<String>("reason") else { return Some(Self(Reason::default())) };
        let reason = Reason::named(&name);
        if reason.is_none() {
            query.refuse("reason", format!("expected {}", Reason::ALL.map(Reason::name).join(", ")));
        }
        reason.map(Self)
    }
}

/// Revoke a credential
///
/// It is refused from now on, and connections made by it end. A certificate of a built-in authority goes on its revocation list.
/// Revoking it again changes nothing.
#[utoipa::path(
    delete, path = "/api/v1/devices/{id}/credentials/{credential_id}", tag = "credentials",
    params(
        ("id" = String, Path, description = "The device's id"),
        ("credential_id" = String, Path, description = "The credential's id"),
        ("reason" = Option<String>, Query, description = "Of a certificate, for its revocation list: `key-compromise`, `affiliation-changed`, `superseded`, `cessation-of-operation`, `privilege-withdrawn` or `unspecified`"),
    ),
    security(("bearer" = ["credentials:manage"])),
    responses(
        (status = 204, description = "It is revoked."),
        (status = 404, description = "There is no such device, or no such credential of it.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn revoke(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path((id, credential)): Path<(DeviceId, CredentialId)>,
    Query(Why(reason)): Query<Why>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    credential::revoke(&mut tx, caller.tenant, &id, credential, reason, app.clock.now()).await?;
    let after = json!({ "reason": reason.name() });
    tx.commit(Entry::of("credential.revoke", credential).on(&id).after(&after)).await?;
    Ok(StatusCode::NO_CONTENT)
}

fn location(device: &DeviceId, credential: &str) -> String {
    format!("/api/v1/devices/{device}/credentials/{credential}")
}

fn created(device: &DeviceId, body: NewCredentialBody) -> Response {
    let location = location(device, &body.id.to_string());
    (StatusCode::CREATED, [(header::LOCATION, location)], Json(body)).into_response()
}
