//! Access tokens: what a user shows after the login, a JWT (RFC 7519) signed with Ed25519 (RFC 8037).
//!
//! [`Keys`] sign and verify; [`principal`] says who stands behind a token. Holds: a token proves an identity and nothing
//! else: what its user may do is read from the database each time, so who is disabled or loses a role is out at once; it
//! ends with its login. Ignorant of: HTTP.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use jsonwebtoken::{Algorithm, Header, Validation};
use parking_lot::RwLock;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;

use crate::clock::Clock;
use crate::config::Secret;
use crate::error::{Error, Result};
use crate::id::{LoginSessionId, UserId};
use crate::login_session::LoginSession;
use crate::policy::{Permission, Principal, Proof, Who};
use crate::role::Roles;
use crate::signing_key::{self, Ring};
use crate::standing::{self, Asked, Standing};
use crate::{api_key, user};

/// Longest token that is looked at, in bytes.
pub const MAX_TOKEN_BYTES: usize = 4096;

const ISSUER: &str = "muster";
const AUDIENCE: &str = "muster";

/// The keys that sign access tokens, as the database holds them.
pub struct Keys {
    clock: Clock,
    lifetime: TimeDelta,
    ring: RwLock<Ring>,
    roles: Roles,
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
        signing_key::make_first(db, now).await?;
        let ring = RwLock::new(Ring::read(db, now).await?);
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
        let (kid, key) = ring.signing(now).ok_or_else(|| Error::Internal("no signing key".into()))?;
        let header = Header { kid: Some(kid.to_owned()), ..Header::new(Algorithm::EdDSA) };
        let token = jsonwebtoken::encode(&header, &claims, key)
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
        self.reread(db).await?;
        let key = self.ring.read().find(&kid).cloned().ok_or(Error::BadToken("signed with an unknown key"))?;
        let claims = jsonwebtoken::decode::<Claims>(token, &key.verifying, &validation())
            .map_err(|_| Error::BadToken("not a token of this server"))?
            .claims;
        let times = DateTime::from_timestamp(claims.iat, 0).zip(DateTime::from_timestamp(claims.exp, 0));
        let (signed_at, expires_at) = times.ok_or(Error::BadToken("not a token of this server"))?;
        if !key.may_have_signed(signed_at) {
            return Err(Error::BadToken("signed with a retired key"));
        }
        if now >= expires_at { Err(Error::BadToken("expired")) } else { Ok((claims, expires_at)) }
    }

    /// Looks for keys that another process has made or retired, if that was not done a moment ago.
    pub async fn reread(&self, db: &mut PgConnection) -> Result<()> {
        let now = self.clock.now();
        if now - self.ring.read().read_at >= signing_key::REREAD {
            let ring = Ring::read(db, now).await?;
            *self.ring.write() = ring;
        }
        Ok(())
    }

    /// The keys by which others can verify our tokens, as JWKs (RFC 7517, RFC 8037).
    pub async fn public(&self, db: &mut PgConnection) -> Result<Vec<PublicKey>> {
        self.reread(db).await?;
        let ring = self.ring.read();
        Ok(ring
            .keys
            .iter()
            .map(|key| PublicKey { kid: key.kid.clone(), x: URL_SAFE_NO_PAD.encode(&key.public) })
            .collect())
    }

    /// Brings a new key, see [`signing_key::rotate`]. To be called in a transaction.
    pub async fn rotate(&self, db: &mut PgConnection, revoke: bool) -> Result<String> {
        signing_key::rotate(db, self.lifetime, revoke, self.clock.now()).await
    }

    /// Brings a new key when the one in use is older than so many days (0: never), see [`signing_key::tend`]. To be called in a
    /// transaction.
    pub async fn tend(&self, db: &mut PgConnection, days: u32) -> Result<Option<String>> {
        let max_age = (days > 0).then(|| TimeDelta::days(days.into()));
        signing_key::tend(db, self.lifetime, max_age, self.clock.now()).await
    }
}

/// A key by which others can verify our tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    /// Its name in the header of tokens.
    pub kid: String,
    /// The Ed25519 key, in base64url.
    pub x: String,
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
        other @ (Who::Device { .. } | Who::Claim { .. }) => other,
    };
    Ok(Principal { who, proof, ..found })
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use aws_lc_rs::signature::Ed25519KeyPair;
    use jsonwebtoken::EncodingKey;
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
        let kid = keys.ring.read().keys[0].kid.clone();
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
        let public = keys.ring.read().keys[0].public.clone();
        let own = sqlx::query_scalar!("select pkcs8 from signing_key").fetch_one(db.pool()).await.unwrap().unwrap();
        let own = EncodingKey::from_ed_der(&own);
        let foreign_audience = signed(&header(Algorithm::EdDSA), &claims("somebody else"), &own);
        let foreign_issuer = Claims { iss: "somebody else".into(), ..claims(AUDIENCE) };
        let foreign_issuer = signed(&header(Algorithm::EdDSA), &foreign_issuer, &own);
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
            signed(&header(Algorithm::HS256), &claims(AUDIENCE), &EncodingKey::from_secret(&public)),
            signed(&header(Algorithm::EdDSA), &claims(AUDIENCE), &other),
            foreign_audience,
            foreign_issuer,
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
        clock.set(later);
        for (signer, verifier) in [(&one, &two), (&two, &one)] {
            let token = signer.sign(&login).unwrap().token;
            principal(&mut *conn(&db).await, verifier, token.expose(), later).await.unwrap();
        }
    }

    async fn rotate(db: &TestDb, keys: &Keys, revoke: bool) -> String {
        let mut tx = db.pool().begin().await.unwrap();
        let kid = keys.rotate(&mut tx, revoke).await.unwrap();
        tx.commit().await.unwrap();
        kid
    }

    async fn tend(db: &TestDb, keys: &Keys, days: u32) -> Option<String> {
        let mut tx = db.pool().begin().await.unwrap();
        let kid = keys.tend(&mut tx, days).await.unwrap();
        tx.commit().await.unwrap();
        kid
    }

    /// By which key a token of this process is signed.
    fn signer(keys: &Keys, login: &LoginSession) -> (String, Secret) {
        let token = keys.sign(login).unwrap().token;
        (jsonwebtoken::decode_header(token.expose()).unwrap().kid.unwrap(), token)
    }

    /// Lets seconds pass for a process that looks at its keys now and then.
    async fn pass(db: &TestDb, clock: &Clock, seconds: i64, keys: &[&Keys]) {
        clock.set(clock.now() + TimeDelta::seconds(seconds));
        for keys in keys {
            keys.reread(&mut *conn(db).await).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_new_key_signs_when_everybody_knows_it_and_the_old_one_verifies_what_it_signed() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let mut login = admin(db.pool(), &clock).await;
        login.expires_at = from_ms(NOON + 86_400_000);
        let one = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let two = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let (old, _) = signer(&one, &login);
        clock.set(from_ms(NOON + 60_000));
        let (_, before) = signer(&two, &login);
        let new = rotate(&db, &one, false).await;
        pass(&db, &clock, 1, &[&one, &two]).await;
        assert_eq!(signer(&one, &login).0, old, "another process may not have looked yet");
        pass(&db, &clock, 4, &[&one]).await;
        let (signed_by, after) = signer(&one, &login);
        assert_eq!(signed_by, new);
        // A process that slept looks when it is shown something.
        for token in [&before, &after] {
            principal(&mut *conn(&db).await, &two, token.expose(), clock.now()).await.unwrap();
        }
        let kids = |keys: Vec<PublicKey>| keys.into_iter().map(|key| key.kid).collect::<Vec<_>>();
        assert_eq!(kids(two.public(&mut *conn(&db).await).await.unwrap()), [old.clone(), new.clone()]);
        // Until its token expires.
        clock.set(from_ms(NOON + 60_000 + 899_000));
        principal(&mut *conn(&db).await, &two, before.expose(), clock.now()).await.unwrap();
        clock.set(from_ms(NOON + 60_000 + 908_000));
        assert_eq!(refusal(&db, &two, before.expose(), clock.now()).await, "signed with an unknown key");
        assert_eq!(kids(two.public(&mut *conn(&db).await).await.unwrap()), [new]);
    }

    #[tokio::test]
    async fn a_retired_key_signs_nothing_that_is_accepted_and_is_forgotten() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let keys = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let stolen =
            sqlx::query!(r#"select kid, pkcs8 as "pkcs8!" from signing_key"#).fetch_one(db.pool()).await.unwrap();
        rotate(&db, &keys, false).await;
        pass(&db, &clock, 60, &[&keys]).await;
        let forged = |iat: i64, exp: i64| {
            let (iss, aud) = (ISSUER.into(), AUDIENCE.into());
            let claims = Claims {
                iss,
                aud,
                sub: login.user,
                sid: login.id,
                act: None,
                iat: NOON / 1000 + iat,
                exp: NOON / 1000 + exp,
            };
            let header = Header { kid: Some(stolen.kid.clone()), ..Header::new(Algorithm::EdDSA) };
            jsonwebtoken::encode(&header, &claims, &EncodingKey::from_ed_der(&stolen.pkcs8)).unwrap()
        };
        assert_eq!(refusal(&db, &keys, &forged(60, 960), clock.now()).await, "signed with a retired key");
        // One that lies about its time ends with the key.
        let backdated = forged(0, 1_000_000);
        principal(&mut *conn(&db).await, &keys, &backdated, clock.now()).await.unwrap();
        assert_eq!(tend(&db, &keys, 0).await, None);
        let halves = sqlx::query_scalar!(r#"select count(*) as "count!" from signing_key where pkcs8 is not null"#);
        assert_eq!(halves.fetch_one(db.pool()).await.unwrap(), 1, "the private half of the old one is gone");
        principal(&mut *conn(&db).await, &keys, &backdated, clock.now()).await.unwrap();
        pass(&db, &clock, 900, &[&keys]).await;
        assert_eq!(refusal(&db, &keys, &backdated, clock.now()).await, "signed with an unknown key");
        tend(&db, &keys, 0).await;
        let left = sqlx::query_scalar!(r#"select count(*) as "count!" from signing_key"#).fetch_one(db.pool()).await;
        assert_eq!(left.unwrap(), 1);
    }

    #[tokio::test]
    async fn keys_that_are_revoked_verify_nothing_at_once() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let login = admin(db.pool(), &clock).await;
        let keys = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        let (_, before) = signer(&keys, &login);
        let new = rotate(&db, &keys, true).await;
        pass(&db, &clock, 1, &[]).await;
        assert_eq!(refusal(&db, &keys, before.expose(), clock.now()).await, "signed with an unknown key");
        let (signed_by, after) = signer(&keys, &login);
        assert_eq!(signed_by, new, "there is no other");
        principal(&mut *conn(&db).await, &keys, after.expose(), clock.now()).await.unwrap();
    }

    #[tokio::test]
    async fn a_key_that_is_old_is_replaced_once_by_whoever_looks_first() {
        let db = TestDb::new().await;
        let clock = Clock::fixed(from_ms(NOON));
        let keys = Keys::load(&mut *conn(&db).await, clock.clone(), 900).await.unwrap();
        assert_eq!(tend(&db, &keys, 30).await, None);
        pass(&db, &clock, 30 * 86_400, &[]).await;
        assert_eq!(tend(&db, &keys, 0).await, None, "0 is never");
        let (one, two, three) = tokio::join!(tend(&db, &keys, 30), tend(&db, &keys, 30), tend(&db, &keys, 30));
        assert_eq!([one, two, three].into_iter().flatten().count(), 1);
        let unretired = sqlx::query_scalar!(r#"select count(*) as "count!" from signing_key where retired_at is null"#);
        assert_eq!(unretired.fetch_one(db.pool()).await.unwrap(), 1);
    }
}
