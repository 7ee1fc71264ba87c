//! Certificates that are signed for devices here.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::credential::{self, Credential, Registered};
use fleet_core::csr::Csr;
use fleet_core::id::{AuthorityId, CredentialId, DeviceId};
use fleet_core::issuing::{self, Issued};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{Can, CredentialsManage, Json, Once, Path};
use crate::page::Page;
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// A certificate of a device: a credential, as everything by which it proves who it is.
#[derive(Serialize, ToSchema)]
#[schema(as = DeviceCertificate)]
pub(crate) struct DeviceCertificateBody {
    /// The credential's id: by it the certificate is revoked.
    #[schema(value_type = String, example = "crd_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: CredentialId,
    /// SHA-256 of the certificate's DER, in hexadecimal.
    fingerprint: String,
    /// Whom it is made out to.
    #[schema(example = "CN=main/boiler-1")]
    subject: String,
    /// The authority of this tenant that signed it; null: none of them.
    #[schema(value_type = Option<String>)]
    authority: Option<AuthorityId>,
    /// Its number, in hexadecimal.
    serial: Option<String>,
    /// Whether it is accepted now, provided that device and authority are not disabled.
    valid: bool,
    /// When it was signed or registered.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// When a client first came in by it.
    #[serde(serialize_with = "time::serialize_maybe")]
    first_used_at: Option<DateTime<Utc>>,
    /// The device may ask for the next one from then on.
    #[serde(serialize_with = "time::serialize_maybe")]
    renew_after: Option<DateTime<Utc>>,
    /// It is refused from then on: its own end, or earlier when it was renewed.
    #[serde(serialize_with = "time::serialize_maybe")]
    expires_at: Option<DateTime<Utc>>,
    /// It is not valid after.
    #[serde(serialize_with = "time::serialize")]
    not_after: DateTime<Utc>,
    /// When it was revoked.
    #[serde(serialize_with = "time::serialize_maybe")]
    revoked_at: Option<DateTime<Utc>>,
}

impl DeviceCertificateBody {
    fn new(credential: &Credential, registered: Registered, now: DateTime<Utc>) -> Self {
        Self {
            id: credential.id,
            fingerprint: registered.fingerprint.to_string(),
            subject: registered.subject,
            authority: registered.authority,
            serial: registered.serial.map(|serial| serial.to_string()),
            valid: credential.is_valid(now),
            created_at: credential.created_at,
            first_used_at: registered.first_used_at,
            renew_after: registered.renew_after,
            expires_at: credential.expires_at,
            not_after: registered.not_after,
            revoked_at: credential.revoked_at,
        }
    }
}

/// List a device's certificates
///
/// Newest first: the valid ones, and the last that ended.
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/certificates", tag = "credentials",
    params(("id" = String, Path, description = "The device's id")), security(("bearer" = ["credentials:manage"])),
    responses(
        (status = 200, description = "All of them, on one page.", body = Page<DeviceCertificateBody>),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path(id): Path<DeviceId>,
) -> Result<Json<Page<DeviceCertificateBody>>, Problem> {
    let now = app.clock.now();
    let credentials = credential::list(&mut *caller.read(&app).await?, caller.tenant, &id).await?;
    let certificates = credentials.into_iter().filter_map(|mut credential| {
        let registered = credential.certificate.take()?;
        Some(DeviceCertificateBody::new(&credential, registered, now))
    });
    Ok(Json(Page::whole(certificates.collect())))
}

/// A signing request.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SignRequest {
    /// In PEM (PKCS #10). Only its public key is taken: ECDSA P-256 or P-384, Ed25519, or RSA of at least 2048 bits.
    csr_pem: String,
    /// The built-in authority that is to sign; left out: the newest that is enabled.
    #[schema(value_type = Option<String>)]
    authority: Option<AuthorityId>,
    /// How long it is valid, in seconds; never longer than its authority. Left out: what the server's settings say, 90 days by
    /// default.
    #[schema(example = 7_776_000, minimum = 1)]
    lifetime_s: Option<u64>,
}

/// A certificate that was just signed.
#[derive(Serialize, ToSchema)]
#[schema(as = SignedCertificate)]
pub(crate) struct SignedBody {
    #[serde(flatten)]
    certificate: DeviceCertificateBody,
    /// Itself, in PEM.
    certificate_pem: String,
    /// The certificate of its authority, in PEM.
    chain_pem: String,
}

impl SignedBody {
    fn new(issued: Issued, now: DateTime<Utc>) -> Self {
        let Issued { credential, registered, pem, chain } = issued;
        let certificate = DeviceCertificateBody::new(&credential, registered, now);
        Self { certificate, certificate_pem: pem, chain_pem: chain }
    }
}

/// Sign a certificate for a device
///
/// Subject, purpose (client authentication) and times are the server's, whatever the request says. At most two certificates of a device are
/// valid at once; a third is refused.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/certificates", tag = "credentials", request_body = SignRequest,
    params(
        ("id" = String, Path, description = "The device's id"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again"),
    ),
    security(("bearer" = ["credentials:manage"])),
    responses(
        (status = 201, description = "It was signed, and lets the device in.", body = SignedBody),
        (status = 400, description = "The request cannot be read, or its key is not taken.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such device, or no such authority.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "Two are valid already, or there is no authority that can sign.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn sign(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path(id): Path<DeviceId>,
    once: Once,
    Json(request): Json<SignRequest>,
) -> Result<Response, Problem> {
    let csr = Csr::from_pem(&request.csr_pem, app.pki.settings().max_csr_bytes);
    let csr = csr.map_err(|error| Problem::field("csr_pem", error.to_string()))?;
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", |made| location(&id, made))),
    };
    let (asked, now) = ((&csr, request.lifetime_s), app.clock.now());
    let issued = issuing::issue(&mut tx, &app.pki, caller.tenant, &id, request.authority, asked, now).await?;
    let body = SignedBody::new(issued, now);
    let credential = body.certificate.id;
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("certificate.sign", credential).on(&id).after(&body.certificate)).await?;
    let location = location(&id, &credential.to_string());
    Ok((StatusCode::CREATED, [(header::LOCATION, location)], Json(body)).into_response())
}

fn location(device: &DeviceId, credential: &str) -> String {
    format!("/api/v1/devices/{device}/credentials/{credential}")
}

/// Allow a certificate to be renewed now
///
/// The device may then ask for the next one over MQTT before two thirds of this one's life have passed, and as often as any.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/certificates/{credential_id}/allow-renewal", tag = "credentials",
    params(
        ("id" = String, Path, description = "The device's id"),
        ("credential_id" = String, Path, description = "The id of the certificate, as a credential"),
    ),
    security(("bearer" = ["credentials:manage"])),
    responses(
        (status = 204, description = "It may be renewed."),
        (status = 404, description = "There is no such device, or no such certificate of it.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn allow_renewal(
    State(app): State<App>,
    caller: Can<CredentialsManage>,
    Path((id, credential)): Path<(DeviceId, CredentialId)>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    issuing::allow(&mut tx, caller.tenant, &id, credential, app.clock.now()).await?;
    tx.commit(Entry::of("certificate.allow-renewal", credential).on(&id)).await?;
    Ok(StatusCode::NO_CONTENT)
}
