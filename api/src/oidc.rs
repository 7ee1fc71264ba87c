//! The `OpenID` provider, asked as its specifications have it: code flow with PKCE, state and nonce.
//!
//! [`Provider::redirect`] says where to send a browser, [`Provider::identity`] redeems the code that comes back. Holds: an ID
//! token counts only with a signature of the provider's key, by an asymmetric algorithm, for this client, in its time and
//! with our nonce; redirects of the provider are not followed; its answers are bounded in size and time. What it says of
//! itself is kept for some minutes, and read again when a signature does not fit: it may have a new key.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::http::Response;
use chrono::{DateTime, TimeDelta, Utc};
use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::oidc::{self, Identity, Pending, Started};
use openidconnect::core::{
    CoreAuthDisplay, CoreAuthPrompt, CoreErrorResponseType, CoreGenderClaim, CoreJsonWebKey,
    CoreJweContentEncryptionAlgorithm, CoreJwsSigningAlgorithm, CoreProviderMetadata, CoreResponseType,
    CoreRevocableToken, CoreRevocationErrorResponse, CoreTokenIntrospectionResponse, CoreTokenType,
};
use openidconnect::{
    AdditionalClaims, AsyncHttpClient, AuthenticationFlow, AuthorizationCode, ClientId, ClientSecret, CsrfToken,
    EmptyExtraTokenFields, EndpointMaybeSet, EndpointNotSet, EndpointSet, HttpRequest, HttpResponse, IdTokenClaims,
    IdTokenFields, IssuerUrl, Nonce, OAuth2TokenResponse, PkceCodeChallenge, PkceCodeVerifier, RedirectUrl, Scope,
    StandardErrorResponse, StandardTokenResponse, UserInfoClaims,
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::Mutex;

use crate::problem::Problem;

/// How long what the provider says of itself is believed.
const KEPT: TimeDelta = TimeDelta::minutes(10);
/// Longest answer of the provider, in bytes.
const MAX_ANSWER_BYTES: usize = 1 << 20;

/// Algorithms by which a provider may sign; none by which we could, and not none.
const ALGORITHMS: [CoreJwsSigningAlgorithm; 8] = [
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha256,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha384,
    CoreJwsSigningAlgorithm::RsaSsaPkcs1V15Sha512,
    CoreJwsSigningAlgorithm::RsaSsaPssSha256,
    CoreJwsSigningAlgorithm::RsaSsaPssSha384,
    CoreJwsSigningAlgorithm::EcdsaP256Sha256,
    CoreJwsSigningAlgorithm::EcdsaP384Sha384,
    CoreJwsSigningAlgorithm::EdDsa,
];

/// All claims that have no meaning of their own in the specification.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Extra {
    #[serde(flatten)]
    claims: Map<String, Value>,
}

impl AdditionalClaims for Extra {}

type Claims = IdTokenClaims<Extra, CoreGenderClaim>;
type Fields = IdTokenFields<
    Extra,
    EmptyExtraTokenFields,
    CoreGenderClaim,
    CoreJweContentEncryptionAlgorithm,
    CoreJwsSigningAlgorithm,
>;
type Tokens = StandardTokenResponse<Fields, CoreTokenType>;
type Client = openidconnect::Client<
    Extra,
    CoreAuthDisplay,
    CoreGenderClaim,
    CoreJweContentEncryptionAlgorithm,
    CoreJsonWebKey,
    CoreAuthPrompt,
    StandardErrorResponse<CoreErrorResponseType>,
    Tokens,
    CoreTokenIntrospectionResponse,
    CoreRevocableToken,
    CoreRevocationErrorResponse,
    EndpointSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointNotSet,
    EndpointMaybeSet,
    EndpointMaybeSet,
>;

/// Why the provider was of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failed {
    /// It cannot be reached, or talks another language.
    #[error("the provider cannot be used: {0}")]
    Unusable(String),
    /// It refused the code, or its token is not what it has to be.
    #[error("the provider's answer is refused: {0}")]
    Refused(String),
}

impl From<Failed> for Problem {
    fn from(failed: Failed) -> Self {
        tracing::warn!(error = %failed, "a login by the OpenID provider failed");
        match failed {
            Failed::Unusable(_) => {
                Self::new(502, "oidc-unusable", "the OpenID provider cannot be used at the moment: the log says why")
            }
            Failed::Refused(_) => {
                Self::new(401, "oidc-refused", "the OpenID provider's answer is not accepted: begin again")
            }
        }
    }
}

/// The provider of the settings.
pub(crate) struct Provider {
    pub(crate) settings: config::Oidc,
    clock: Clock,
    http: Mutex<Option<reqwest::Client>>,
    known: Mutex<Option<(DateTime<Utc>, Arc<CoreProviderMetadata>)>>,
}

impl Provider {
    /// The provider, if there is one.
    pub(crate) fn of(settings: &config::Oidc, clock: &Clock) -> Option<Arc<Self>> {
        if settings.issuer.is_empty() {
            return None;
        }
        let (http, known) = (Mutex::default(), Mutex::default());
        Some(Arc::new(Self { settings: settings.clone(), clock: clock.clone(), http, known }))
    }

    /// Where to send a browser, that is to come back to `callback`.
    pub(crate) async fn redirect(&self, started: &Started, callback: String) -> Result<String, Failed> {
        let client = self.client(&*self.metadata().await?, callback)?;
        let verifier = PkceCodeVerifier::new(started.verifier.expose().to_owned());
        let flow = AuthenticationFlow::<CoreResponseType>::AuthorizationCode;
        let [state, nonce] = [&started.state, &started.nonce].map(|secret| secret.expose().to_owned());
        let request = client.authorize_url(flow, move || CsrfToken::new(state), move || Nonce::new(nonce));
        let scopes = self.settings.scopes.iter().cloned().map(Scope::new);
        let request =
            request.add_scopes(scopes).set_pkce_challenge(PkceCodeChallenge::from_code_verifier_sha256(&verifier));
        Ok(request.url().0.to_string())
    }

    /// Who it is, by the code that came back to `callback`.
    pub(crate) async fn identity(&self, pending: &Pending, code: String, callback: String) -> Result<Identity, Failed> {
        let client = self.client(&*self.metadata().await?, callback.clone())?;
        let verifier = PkceCodeVerifier::new(pending.verifier.expose().to_owned());
        let request = client.exchange_code(AuthorizationCode::new(code)).map_err(unusable)?;
        let http = self.http().await?;
        let tokens = request.set_pkce_verifier(verifier).request_async(&http).await.map_err(refused)?;
        let nonce = Nonce::new(pending.nonce.expose().to_owned());
        let claims = if let Ok(claims) = self.verified(&client, &tokens, &nonce) {
            claims
        } else {
            // It may have a new key.
            *self.known.lock().await = None;
            let client = self.client(&*self.metadata().await?, callback)?;
            self.verified(&client, &tokens, &nonce)?
        };
        self.told(&client, &tokens, &claims).await
    }

    fn verified(&self, client: &Client, tokens: &Tokens, nonce: &Nonce) -> Result<Claims, Failed> {
        let token = tokens.extra_fields().id_token().ok_or_else(|| Failed::Refused("there is no ID token".into()))?;
        let clock = self.clock.clone();
        let verifier = client.id_token_verifier().set_allowed_algs(ALGORITHMS).set_time_fn(move || clock.now());
        token.claims(&verifier, nonce).cloned().map_err(refused)
    }

    /// What the ID token says, and where it says too little, the provider's user info.
    async fn told(&self, client: &Client, tokens: &Tokens, claims: &Claims) -> Result<Identity, Failed> {
        let mut identity = Identity {
            issuer: claims.issuer().to_string(),
            subject: claims.subject().to_string(),
            email: claims.email().map(|email| email.to_string()),
            email_verified: claims.email_verified().unwrap_or(false),
            roles: self.roles(&claims.additional_claims().claims),
        };
        if identity.email.is_some() && !identity.roles.is_empty() {
            return Ok(identity);
        }
        let access = tokens.access_token().clone();
        let Ok(request) = client.user_info(access, Some(claims.subject().clone())) else { return Ok(identity) };
        let http = self.http().await?;
        let info: UserInfoClaims<Extra, CoreGenderClaim> = request.request_async(&http).await.map_err(refused)?;
        if identity.email.is_none() {
            identity.email = info.email().map(|email| email.to_string());
            identity.email_verified = info.email_verified().unwrap_or(false);
        }
        if identity.roles.is_empty() {
            identity.roles = self.roles(&info.additional_claims().claims);
        }
        Ok(identity)
    }

    fn roles(&self, claims: &Map<String, Value>) -> Vec<String> {
        oidc::roles(&Value::Object(claims.clone()), &self.settings.role_claim)
    }

    fn client(&self, metadata: &CoreProviderMetadata, callback: String) -> Result<Client, Failed> {
        let secret = Some(self.settings.client_secret.expose()).filter(|secret| !secret.is_empty());
        let secret = secret.map(|secret| ClientSecret::new(secret.to_owned()));
        let id = ClientId::new(self.settings.client_id.clone());
        let client = Client::from_provider_metadata(metadata.clone(), id, secret);
        Ok(client.set_redirect_uri(RedirectUrl::new(callback).map_err(unusable)?))
    }

    /// What the provider says of itself.
    async fn metadata(&self) -> Result<Arc<CoreProviderMetadata>, Failed> {
        let (mut known, now) = (self.known.lock().await, self.clock.now());
        if let Some((read_at, metadata)) = &*known
            && now - *read_at < KEPT
        {
            return Ok(metadata.clone());
        }
        let issuer = IssuerUrl::new(self.settings.issuer.clone()).map_err(unusable)?;
        let http = self.http().await?;
        let metadata = CoreProviderMetadata::discover_async(issuer, &http).await.map_err(unusable)?;
        let metadata = Arc::new(metadata);
        *known = Some((now, metadata.clone()));
        Ok(metadata)
    }

    async fn http(&self) -> Result<Http, Failed> {
        let mut http = self.http.lock().await;
        if let Some(http) = &*http {
            return Ok(Http(http.clone()));
        }
        let within = Duration::from_millis(self.settings.timeout_ms);
        // Who follows redirects can be sent anywhere.
        let built = reqwest::Client::builder().redirect(reqwest::redirect::Policy::none()).timeout(within).build();
        Ok(Http(http.insert(built.map_err(unusable)?).clone()))
    }
}

/// Asks the provider.
struct Http(reqwest::Client);

impl<'c> AsyncHttpClient<'c> for Http {
    type Error = Failed;
    type Future = Pin<Box<dyn Future<Output = Result<HttpResponse, Failed>> + Send + 'c>>;

    fn call(&'c self, request: HttpRequest) -> Self::Future {
        Box::pin(self.send(request))
    }
}

impl Http {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, Failed> {
        let mut response = self.0.execute(request.try_into().map_err(unusable)?).await.map_err(unusable)?;
        let mut built = Response::builder().status(response.status());
        for (name, value) in response.headers() {
            built = built.header(name, value);
        }
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(unusable)? {
            if body.len() + chunk.len() > MAX_ANSWER_BYTES {
                return Err(Failed::Unusable(format!("its answer is longer than {MAX_ANSWER_BYTES} bytes")));
            }
            body.extend_from_slice(&chunk);
        }
        built.body(body).map_err(unusable)
    }
}

fn unusable(error: impl std::error::Error) -> Failed {
    Failed::Unusable(told(&error))
}

/// Unless the provider could not be asked at all.
fn refused(error: impl std::error::Error + 'static) -> Failed {
    let mut causes = std::iter::successors(error.source(), |cause| cause.source());
    let unusable = causes.any(|cause| matches!(cause.downcast_ref(), Some(Failed::Unusable(_))));
    if unusable { Failed::Unusable(told(&error)) } else { Failed::Refused(told(&error)) }
}

/// An error with its causes, in one line.
fn told(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
