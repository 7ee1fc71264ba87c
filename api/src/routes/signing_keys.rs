//! The keys that sign access tokens: shown to whoever verifies tokens, replaced by who runs the server.

use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use fleet_core::audit::Entry;
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Json, MaybeJson};
use crate::problem::{Document, Problem};
use crate::state::App;

/// How long others may keep the keys; a token by a key they do not know makes them ask again.
const CACHED: &str = "public, max-age=60";

/// Public keys (RFC 7517).
#[derive(Serialize, ToSchema)]
pub(crate) struct KeySet {
    /// Those that verify access tokens, oldest first.
    keys: Vec<Key>,
}

/// A public key (RFC 8037).
#[derive(Serialize, ToSchema)]
pub(crate) struct Key {
    /// Always `OKP`.
    kty: &'static str,
    /// Always `Ed25519`.
    crv: &'static str,
    /// Always `EdDSA`.
    alg: &'static str,
    /// Always `sig`.
    #[serde(rename = "use")]
    used_for: &'static str,
    /// The `kid` in the header of tokens.
    kid: String,
    /// The key in base64url.
    x: String,
}

/// Public keys of access tokens
///
/// For programs that verify access tokens themselves. That a token verifies does not say that its login still stands: ask
/// `GET /me` for that.
#[utoipa::path(
    get, path = "/.well-known/jwks.json", tag = "auth", security(),
    responses((status = 200, description = "The key that signs, those before it that still verify, and the next one.", body = KeySet))
)]
pub(crate) async fn list(State(app): State<App>) -> Result<Response, Problem> {
    let keys = app.keys.public(&mut *app.db.acquire().await?).await?;
    let key = |key: fleet_core::token::PublicKey| Key {
        kty: "OKP",
        crv: "Ed25519",
        alg: "EdDSA",
        used_for: "sig",
        kid: key.kid,
        x: key.x,
    };
    let set = KeySet { keys: keys.into_iter().map(key).collect() };
    Ok(([(header::CACHE_CONTROL, CACHED)], Json(set)).into_response())
}

/// How to replace the key.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Rotate {
    /// Refuses every access token that was signed so far, at once: for a key that is in wrong hands. Logins go on by their
    /// refresh tokens.
    #[serde(default)]
    revoke: bool,
}

/// The new key.
#[derive(Serialize, ToSchema)]
pub(crate) struct Rotated {
    /// Its name.
    kid: String,
}

/// Replace the key that signs access tokens
///
/// The new one signs a few seconds later, when all processes know it; the one before verifies what it signed. It happens by
/// itself every `auth.signing_key_days`. For who has platform standing.
#[utoipa::path(
    post, path = "/api/v1/auth/keys/rotate", tag = "auth", request_body = Option<Rotate>,
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "There is a new key.", body = Rotated),
        (status = 403, description = "The caller has no platform standing.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn rotate(
    State(app): State<App>,
    caller: Can<AccessManage>,
    MaybeJson(request): MaybeJson<Rotate>,
) -> Result<Json<Rotated>, Problem> {
    let mut tx = caller.change_platform(&app, "replace the key that signs access tokens").await?;
    let kid = app.keys.rotate(&mut tx, request.revoke).await?;
    tx.commit(Entry::of("signing-key.rotate", &kid).after(&json!({ "revoke": request.revoke }))).await?;
    tracing::info!(kid, revoked = request.revoke, "access tokens are signed with a new key");
    Ok(Json(Rotated { kid }))
}
