//! How a device that nobody has enrolled asks to come in, over HTTP.

use std::collections::BTreeMap;

use axum::extract::{FromRequest, FromRequestParts, Request as HttpRequest, State};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};
use fleet_core::claim::request::{self, Answer, Code, MAX_BYTES, Origin, Rejection, Request};
use fleet_core::claim::{self, Claimant};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::client::Client;
use crate::extract::{Json, bearer, body, expect_type};
use crate::problem::{Document, Problem};
use crate::state::App;

/// Who asks: whoever shows the secret of a claim.
pub(crate) struct ByClaim(Claimant);

impl FromRequestParts<App> for ByClaim {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Problem> {
        let secret = bearer(&parts.headers)?;
        let mut db = app.db.acquire().await?;
        let claimant = claim::of_secret(&mut db, secret, app.clock.now()).await?;
        claimant.map(Self).ok_or_else(|| Problem::new(401, "bad-token", "expected the secret of a claim that is open"))
    }
}

/// A request, or what is wrong with it.
pub(crate) struct Asked(Result<Request, Rejection>);

impl FromRequest<App> for Asked {
    type Rejection = Problem;

    async fn from_request(request: HttpRequest, app: &App) -> Result<Self, Problem> {
        expect_type(request.headers(), &["application/json"])?;
        Ok(Self(Request::decode(&body(request, app, MAX_BYTES).await?)))
    }
}

/// What a device asks. Either `token_sha256` or `public_key` must be there.
#[derive(Deserialize, ToSchema)]
#[schema(as = Provision)]
#[expect(dead_code, reason = "what `Asked` reads, as the document tells it")]
pub(crate) struct ProvisionBody {
    /// The id it wants.
    #[schema(example = "freezer-1")]
    id: String,
    /// 16 to 64 letters of the device's own choice. The same request asked again has the same nonce.
    #[schema(example = "9f86d081884c7d65", min_length = 16, max_length = 64)]
    nonce: String,
    /// Recommended: the SHA-256, in hexadecimal, of a token that the device has made of 32 random bytes. That token is its MQTT
    /// password, and never leaves it before that.
    #[schema(example = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
    token_sha256: Option<String>,
    /// An X25519 key in base64url without padding, to which the token that is made is sealed with HPKE.
    public_key: Option<String>,
    /// What kind of thing it is; the claim may say otherwise.
    #[schema(example = "freezer")]
    r#type: Option<String>,
    /// What it says about itself; the labels of the claim win.
    labels: Option<BTreeMap<String, String>>,
    /// The number on its plate; it becomes the label `serial`.
    serial: Option<String>,
}

/// What a device is answered.
#[derive(Serialize, ToSchema)]
pub(crate) struct Provisioned {
    /// `accepted`: it is a device now. `pending`: somebody has to approve it, ask again later.
    #[schema(example = "accepted")]
    status: &'static str,
    /// Its MQTT user name, when it was accepted.
    #[schema(example = "main/freezer-1")]
    username: Option<String>,
    /// Its token, when it has shown a public key and was accepted.
    sealed: Option<SealedBody>,
}

/// A token that only whoever holds the private key can open: HPKE (RFC 9180), base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256,
/// AES-128-GCM. The info is `muster provision v1`, the additional data the user name, a space, and the nonce.
#[derive(Serialize, ToSchema)]
#[schema(as = Sealed)]
struct SealedBody {
    /// The encapsulated key, in base64url without padding.
    enc: String,
    /// The sealed token, in base64url without padding.
    ciphertext: String,
}

/// Ask to become a device
///
/// With the secret of a claim as bearer. The answer to a request that comes again with the same id, nonce, and token or key is the same:
/// a device that has lost an answer, or waits for approval, asks again. No answer holds a secret that somebody else could use.
#[utoipa::path(
    post, path = "/api/v1/provision", tag = "claims", request_body = ProvisionBody,
    security(("claim" = [])),
    responses(
        (status = 201, description = "It is a device now.", body = Provisioned),
        (status = 200, description = "It was accepted before.", body = Provisioned),
        (status = 202, description = "It waits for approval.", body = Provisioned),
        (status = 401, description = "The claim is not known, was revoked or has expired.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "It was rejected.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "There is a device of that id, the claim is used up, or the nonce was used otherwise.", body = Document, content_type = "application/problem+json"),
        (status = 422, description = "The claim is not for that id.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many ask, or wait.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn provision(
    State(app): State<App>,
    ByClaim(claimant): ByClaim,
    client: Client,
    Asked(asked): Asked,
) -> Result<Response, Problem> {
    let address = client.address.map(|address| address.to_string()).unwrap_or_default();
    let from = Origin { asker: "http".to_owned(), address };
    let answer = match asked {
        Ok(request) => {
            let now = app.clock.now();
            request::answer(&app.db, &claimant, &request, &from, &app.provisioning, now).await?
        }
        Err(rejection) => Answer::Rejected(rejection),
    };
    app.metrics.provision.with_label_values(&[answer.outcome()]).inc();
    tracing::info!(claim.id = %claimant.claim, outcome = answer.outcome(), "a device asked to come in");
    match answer {
        Answer::Accepted { username, sealed, is_new } => {
            let sealed = sealed.map(|sealed| SealedBody { enc: sealed.enc, ciphertext: sealed.ciphertext });
            let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
            let body = Provisioned { status: "accepted", username: Some(username), sealed };
            Ok((status, Json(body)).into_response())
        }
        Answer::Pending { .. } => {
            let body = Provisioned { status: "pending", username: None, sealed: None };
            Ok((StatusCode::ACCEPTED, Json(body)).into_response())
        }
        Answer::Rejected(rejection) => Err(refused(rejection)),
    }
}

fn refused(rejection: Rejection) -> Problem {
    let (status, kind) = match rejection.code {
        Code::Malformed => (400, "invalid"),
        Code::ClaimEnded => (401, "bad-token"),
        Code::Rejected => (403, "provision-rejected"),
        Code::UsedUp => (409, "claim-used-up"),
        Code::Exists => (409, "device-exists"),
        Code::NonceTaken => (409, "nonce-taken"),
        Code::WrongId => (422, "wrong-id"),
        Code::RateLimited => (429, "rate-limited"),
        Code::Full => (429, "provision-full"),
        Code::Internal => (500, "internal"),
    };
    Problem::new(status, kind, rejection.message)
}
