//! Access tokens: what a user shows after the login, a JWT (RFC 7519) signed with Ed25519 (RFC 8037).
//!
//! [`Keys`] sign and verify; [`principal`] says who stands behind a token. Holds: a token proves an identity and nothing
//! else: what its user may do is read from the database each time, so who is disabled or loses a role is out at once.
//! The keys live in the database, because several processes accept each other's tokens. Ignorant of: HTTP.

use std::collections::HashMap;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use chrono::{DateTime, TimeDelta, Utc};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::clock::Clock;
use crate::config::Secret;
use crate::error::{Error, Result};
use crate::id::{LoginSessionId, UserId};
use crate::login_session::LoginSession;
use crate::policy::{Permission, Principal, Proof, Who};
use crate::role::Roles;
use crate::standing::{self, Asked, Standing};
use crate::{api_key, user};

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 4096;
/// A token that names an unknown key makes the keys be read again at most so often: another process may have made one.
const RELOAD_EVERY: TimeDelta = TimeDelta::seconds(1);

const ISSUER: &str = "muster";
const AUDIENCE: &str = "muster";

/// The keys that sign access tokens, as the database holds them.
pub struct Keys {
    clock: Clock,
    lifetime: TimeDelta,
    ring: RwLock<Ring>,
    roles: Roles,
}

struct Ring {
    kid: String,
    signing: EncodingKey,
    verifying: HashMap<String, DecodingKey>,
    read_at: DateTime<Utc>,
}

/// An access token.
#[derive(Debug, Clone)]
pub struct AccessToken {
    /// The token itself.
    pub token: Secret,
    /// How long it is accepted, in seconds.
    pub expires_in_s: u64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Claims {
    iss: String,
    aud: String,
    sub: UserId,
    /// The login, which the token ends with.
    sid: LoginSessionId,
    /// Who looks at what `sub` sees, and may change nothing (RFC 8693 §4.1, the subject alone); the login is theirs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    act: Option<UserId>,
    iat: i64,
    exp: i64,
}

impl Keys {
    /// Reads the keys; makes the first when there is none. `lifetime_s` is how long a token is accepted, in seconds.
    pub async fn load(db: &mut PgConnection, clock: Clock, lifetime_s: u64) -> Result<Self> {
        let lifetime = i64::try_from(lifetime_s).ok().and_then(TimeDelta::try_seconds);
        let lifetime = lifetime.ok_or_else(|| Error::Invalid("auth.access_token_s is too large".into()))?;
        let now = clock.now();
        make_first(db, now).await?;
        let ring = RwLock::new(read(db, lifetime, now).await?);
        Ok(Self { clock, lifetime, ring, roles: Roles::default() })
    }

    /// The roles that principals have, which live as long as the keys.
    pub fn roles(&self) -> &Roles {
        &self.roles
    }

    /// A token of a login, valid from now on and not longer than that may be.
    pub fn sign(&self, session: &LoginSession) -> Result<AccessToken> {
        self.sign_for(session.user, session.id, None, session.expires_at)
    }

    /// A token with which `viewer`, by a login that stands until `until`, sees what `user` sees.
    pub fn sign_view(
        &self,
        user: UserId,
        viewer: UserId,
        session: LoginSessionId,
        until: DateTime<Utc>,
    ) -> Result<AccessToken> {
        self.sign_for(user, session, Some(viewer), until)
    }

    fn sign_for(
        &self,
        user: UserId,
        session: LoginSessionId,
        viewer: Option<UserId>,
        until: DateTime<Utc>,
    ) -> Result<AccessToken> {
        let now = self.clock.now();
        let expires_at = until.min(now + self.lifetime);
        let claims = Claims {
            iss: ISSUER.into(),
            aud: AUDIENCE.into(),
            sub: user,
            sid: session,
            act: viewer,
            iat: now.timestamp(),
            exp: expires_at.timestamp(),
        };
        let ring = self.ring.read();
        let header = Header { kid: Some(ring.kid.clone()), ..Header::new(Algorithm::EdDSA) };
        let token = jsonwebtoken::encode(&header, &claims, &ring.signing)
            .map_err(|e| Error::Internal(format!("signing a token: {e}")))?;
        Ok(AccessToken { token: token.into(), expires_in_s: (expires_at - now).num_seconds().unsigned_abs() })
    }

    /// What a token says, and until when, when it is one of ours and has not expired.
    async fn claims(&self, db: &mut PgConnection, token: &str, now: DateTime<Utc>) -> Result<(Claims, DateTime<Utc>)> {
        if token.len() > MAX_TOKEN_BYTES {
            return Err(Error::BadToken("too long"));
        }
        let header = jsonwebtoken::decode_header(token).map_err(|_| Error::BadToken("not a token of this server"))?;
        let kid = header.kid.ok_or(Error::BadToken("not a token of this server"))?;
        let key = self.key(db, &kid, now).await?.ok_or(Error::BadToken("signed with an unknown key"))?;
        let claims = jsonwebtoken::decode::<Claims>(token, &key, &validation())
            .map_err(|_| Error::BadToken("not a token of this server"))?
            .claims;
        let expires_at =
            DateTime::from_timestamp(claims.exp, 0).ok_or(Error::BadToken("not a token of this server"))?;
        if now >= expires_at { Err(Error::BadToken("expired")) } else { Ok((claims, expires_at)) }
    }

    async fn key(&self, db: &mut PgConnection, kid: &str, now: DateTime<Utc>) -> Result<Option<DecodingKey>> {
        let read_at = {
            let ring = self.ring.read();
            if let Some(key) = ring.verifying.get(kid) {
                return Ok(Some(key.clone()));
            }
            ring.read_at
        };
        if now - read_at < RELOAD_EVERY {
            return Ok(None);
        }
        let ring = read(db, self.lifetime, now).await?;
        let key = ring.verifying.get(kid).cloned();
        *self.ring.write() = ring;
        Ok(key)
    }
}

/// Signature, issuer and audience; the time is ours to check, by our own clock.
fn validation() -> Validation {
    let mut validation = Validation::new(Algorithm::EdDSA);
    validation.set_required_spec_claims(&["exp", "iss", "aud", "sub"]);
    validation.set_issuer(&[ISSUER]);
    validation.set_audience(&[AUDIENCE]);
    validation.validate_exp = false;
    validation
}

/// Who stands behind what was shown as a bearer: an access token, or an API key. It is a user that still exists and is
/// not disabled, with the role that it or the key has now.
pub async fn principal(db: &mut PgConnection, keys: &Keys, bearer: &str, now: DateTime<Utc>) -> Result<Principal> {
    if bearer.starts_with(api_key::PREFIX) {
        let refused = Error::BadToken("no API key, or one that has ended");
        let Some((user, key)) = api_key::shown(db, bearer).await? else { return Err(refused) };
        let asked = Asked { user, key: Some(key), session: None };
        return standing::of(db, &keys.roles, asked, now).await?.principal().ok_or(refused);
    }
    let (claims, expires_at) = keys.claims(db, bearer, now).await?;
    if let Some(viewer) = claims.act {
        return view(db, keys, &claims, viewer, expires_at, now).await;
    }
    let asked = Asked { user: claims.sub, key: None, session: Some(claims.sid) };
    let found = match standing::of(db, &keys.roles, asked, now).await? {
        Standing::SessionEnded => return Err(Error::BadToken("its login has ended")),
        standing => standing.principal().ok_or(Error::BadToken("its user is gone or disabled"))?,
    };
    Ok(Principal { proof: Proof { valid_until: Some(expires_at), ..found.proof }, ..found })
}

/// Who stands behind a token with which one user looks at what another sees: that other one, as long as the viewer's login stands
/// and the viewer may still manage that user's access.
async fn view(
    db: &mut PgConnection,
    keys: &Keys,
    claims: &Claims,
    viewer: UserId,
    expires_at: DateTime<Utc>,
    now: DateTime<Utc>,
) -> Result<Principal> {
    let asked = Asked { user: viewer, key: None, session: Some(claims.sid) };
    let ended = Error::BadToken("the login of whoever looks has ended");
    let by = standing::of(db, &keys.roles, asked, now).await?.principal().ok_or(ended)?;
    let refused = || Error::BadToken("whoever looks may no longer manage this user's access");
    if !by.may(Permission::AccessManage) {
        return Err(refused());
    }
    user::manageable(db, by.manager(), claims.sub).await.map_err(|error| match error {
        Error::Database(error) => Error::Database(error),
        _ => refused(),
    })?;
    let asked = Asked { user: claims.sub, key: None, session: None };
    let found = standing::of(db, &keys.roles, asked, now).await?.principal();
    let found = found.ok_or(Error::BadToken("its user is gone or disabled"))?;
    let proof = Proof { valid_until: Some(expires_at), viewer: Some(viewer), ..Proof::default() };
    // To look is not to stand above tenants.
    let who = match found.who {
        Who::User { id, key, grants, .. } => Who::User { id, key, grants, platform: false },
        device @ Who::Device { .. } => device,
    };
    Ok(Principal { who, proof, ..found })
}

/// Makes a key unless there is one. Two processes may both make theirs; both keys are then accepted everywhere.
async fn make_first(db: &mut PgConnection, now: DateTime<Utc>) -> Result<()> {
    let pair = Ed25519KeyPair::generate().map_err(|_| Error::Internal("no random numbers".into()))?;
    let pkcs8 = pair.to_pkcs8().map_err(|_| Error::Internal("an Ed25519 key cannot be written".into()))?;
    sqlx::query!(
        "
        insert into signing_key (kid, pkcs8, created_at)
        select $1, $2, $3
         where not exists (select from signing_key where retired_at is null)
        ",
        Uuid::new_v4().simple().to_string(),
        pkcs8.as_ref(),
        now
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The newest key signs; a retired one verifies for as long as a token it signed may live.
async fn read(db: &mut PgConnection, lifetime: TimeDelta, now: DateTime<Utc>) -> Result<Ring> {
    let rows = sqlx::query!(
        "
        select kid, pkcs8, retired_at
          from signing_key
         where retired_at is null or retired_at > $1
         order by created_at, kid
        ",
        now - lifetime
    )
    .fetch_all(db)
    .await?;
    let mut signing = None;
    let mut verifying = HashMap::new();
    for row in rows {
        let pair = Ed25519KeyPair::from_pkcs8(&row.pkcs8)
            .map_err(|_| Error::Internal(format!("signing key {} cannot be read", row.kid)))?;
        verifying.insert(row.kid.clone(), DecodingKey::from_ed_der(pair.public_key().as_ref()));
        if row.retired_at.is_none() {
            signing = Some((row.kid, EncodingKey::from_ed_der(&row.pkcs8)));
        }
    }
    let (kid, signing) = signing.ok_or_else(|| Error::Internal("no signing key".into()))?;
    Ok(Ring { kid, signing, verifying, read_at: now })
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::URL_SAFE_NO_PAD;
    use sqlx::pool::PoolConnection;
    use sqlx::{PgPool, Postgres};

    use super::*;
    use crate::clock::from_ms;
    use crate::config::{Config, Environment};
    use crate::login_session::{self, Method, Origin};
    use crate::policy::{Grants, Role, Who};
    use crate::testing::TestDb;

    const NOON: i64 = 1_763_722_800_000;

    async fn conn(db: &TestDb) -> PoolConnection<Postgres> {
        db.pool().acquire().await.unwrap()
    }

    /// A login of the administrator.
    async fn admin(pool: &PgPool, clock: &Clock) -> LoginSession {
        let mut conn = pool.acquire().await.unwrap();
        user::ensure_admin(&mut conn, None, None, clock).await.unwrap();
        let user = sqlx::query_scalar!(r#"select id as "id: UserId" from app_user"#).fetch_one(pool).await.unwrap();
        let config = Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap();
        let from = Origin::default();
        let begun = login_session::begin(&mut conn, user, Method::Password, &from, &config.auth, clock.now());
        begun.await.unwrap().0
    }

    async fn refusal(db: &TestDb, keys: &Keys, token: &str, now: DateTime<Utc>) -> &'static str {
        match principal(&mut *conn(db).await, keys, token, now).await {
            Err(Error::BadToken(why)) => why,
            other => panic!("expected a refusal of {token}, found {other:?}"),
        }
    }

    fn forged(header: &str, claims: &Claims, signature: &[u8]) -> String {
        let claims = serde_json::to_vec(claims).unwrap();
        let [header, claims, signature] = [header.as_bytes(), &claims, signature].map(|p| URL_SAFE_NO_PAD.encode(p));
        format!("{header}.{claims}.{signature}")
    }

    #[tokio::test]
    async fn a_token_proves_its_user_until_it_expires() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let keys = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let issued = keys.sign(&login).unwrap();
        assert_eq!(issued.expires_in_s, 900);
        let token = issued.token.expose();
        let found = principal(&mut *conn(&db).await, &keys, token, from_ms(NOON + 899_000)).await.unwrap();
        assert_eq!(
            found.who,
            Who::User { id: login.user, key: None, grants: Grants::of(Some(Role::Admin)), platform: true }
        );
        assert_eq!(found.tenant, db.tenant());
        assert_eq!(refusal(&db, &keys, token, from_ms(NOON + 900_000)).await, "expired");
    }

    #[tokio::test]
    async fn what_we_did_not_sign_is_refused() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let keys = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let token = keys.sign(&login).unwrap().token.expose().to_owned();
        let kid = keys.ring.read().kid.clone();
        let claims = |aud: &str| Claims {
            iss: ISSUER.into(),
            aud: aud.into(),
            sub: login.user,
            act: None,
            sid: login.id,
            iat: NOON / 1000,
            exp: NOON / 1000 + 900,
        };
        let other = Ed25519KeyPair::generate().unwrap();
        let other = EncodingKey::from_ed_der(other.to_pkcs8().unwrap().as_ref());
        let header = |alg| Header { kid: Some(kid.clone()), ..Header::new(alg) };
        let signed =
            |header: &Header, claims: &Claims, key: &EncodingKey| jsonwebtoken::encode(header, claims, key).unwrap();
        let mut flipped = token.clone();
        let last_of_claims = flipped.rfind('.').unwrap() - 1;
        let letter = if flipped.as_bytes()[last_of_claims] == b'A' { "B" } else { "A" };
        flipped.replace_range(last_of_claims..=last_of_claims, letter);
        let no_signature = token.rsplit_once('.').unwrap().0.to_owned() + ".";
        let symmetric = EncodingKey::from_secret(kid.as_bytes());
        let foreign_audience = signed(&header(Algorithm::EdDSA), &claims("somebody else"), &keys.ring.read().signing);
        for bad in [
            String::new(),
            "x".into(),
            "a.b.c".into(),
            "\0".into(),
            token.clone() + "x",
            flipped,
            no_signature,
            forged(&format!(r#"{{"alg":"none","kid":"{kid}"}}"#), &claims(AUDIENCE), b""),
            forged(&format!(r#"{{"alg":"EdDSA","kid":"{kid}"}}"#), &claims(AUDIENCE), &[0; 64]),
            signed(&header(Algorithm::HS256), &claims(AUDIENCE), &symmetric),
            signed(&header(Algorithm::EdDSA), &claims(AUDIENCE), &other),
            foreign_audience,
        ] {
            assert_eq!(refusal(&db, &keys, &bad, clock.now()).await, "not a token of this server", "{bad}");
        }
        let unknown = Header { kid: Some("unknown".into()), ..Header::new(Algorithm::EdDSA) };
        let unknown = signed(&unknown, &claims(AUDIENCE), &other);
        assert_eq!(refusal(&db, &keys, &unknown, clock.now()).await, "signed with an unknown key");
        let long = "x".repeat(MAX_TOKEN_BYTES + 1);
        assert_eq!(refusal(&db, &keys, &long, clock.now()).await, "too long");
        assert!(principal(&mut *conn(&db).await, &keys, &token, clock.now()).await.is_ok());
    }

    #[tokio::test]
    async fn a_disabled_or_deleted_user_is_out_at_once() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let keys = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let token = keys.sign(&login).unwrap().token;
        sqlx::query!("update app_user set role = null").execute(db.pool()).await.unwrap();
        let found = principal(&mut *conn(&db).await, &keys, token.expose(), clock.now()).await.unwrap();
        assert_eq!(found.who, Who::User { id: login.user, key: None, grants: Grants::default(), platform: true });
        sqlx::query!("update app_user set disabled = true").execute(db.pool()).await.unwrap();
        assert_eq!(refusal(&db, &keys, token.expose(), clock.now()).await, "its user is gone or disabled");
        sqlx::query!("delete from app_user").execute(db.pool()).await.unwrap();
        assert_eq!(refusal(&db, &keys, token.expose(), clock.now()).await, "its user is gone or disabled");
    }

    #[tokio::test]
    async fn a_token_ends_with_its_login() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let keys = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let token = keys.sign(&login).unwrap().token;
        let found = principal(&mut *conn(&db).await, &keys, token.expose(), clock.now()).await.unwrap();
        assert_eq!(found.proof.session, Some(login.id));
        login_session::end(&mut *conn(&db).await, login.user, login.id).await.unwrap();
        assert_eq!(refusal(&db, &keys, token.expose(), clock.now()).await, "its login has ended");
        // A login that may not live as long as a token bounds the token.
        let short = LoginSession { expires_at: from_ms(NOON + 60_000), ..login };
        assert_eq!(keys.sign(&short).unwrap().expires_in_s, 60);
    }

    #[tokio::test]
    async fn processes_that_start_together_accept_each_others_tokens() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let start = || async { Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap() };
        let (one, two) = tokio::join!(start(), start());
        // A process that does not know the other's key yet reads the keys again, at most once a second.
        let later = from_ms(NOON + 1000);
        for (signer, verifier) in [(&one, &two), (&two, &one)] {
            let token = signer.sign(&login).unwrap().token;
            principal(&mut *conn(&db).await, verifier, token.expose(), later).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_retired_key_verifies_what_it_signed_and_signs_no_more() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let old = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let token = old.sign(&login).unwrap().token;
        sqlx::query!("update signing_key set retired_at = $1", clock.now()).execute(db.pool()).await.unwrap();
        let new = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        assert_ne!(old.ring.read().kid, new.ring.read().kid);
        principal(&mut *conn(&db).await, &new, token.expose(), from_ms(NOON + 1000)).await.unwrap();
        clock.set(from_ms(NOON + 901_000));
        let newest = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        assert!(!newest.ring.read().verifying.contains_key(&old.ring.read().kid));
    }
}
