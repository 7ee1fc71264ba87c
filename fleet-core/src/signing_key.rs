//! The keys that sign access tokens: Ed25519 (RFC 8037), in the database, since several processes accept each other's
//! tokens.
//!
//! `Ring` holds them in memory, [`rotate`] brings a new one, [`tend`] does so when the one in use is old and forgets what
//! is over. Holds: a new key signs only after [`ANNOUNCED`], when every process that looks once in [`REREAD`] knows it; the
//! one before verifies what it signed for as long as the longest of its tokens lives, and nothing that says it was signed
//! later; its private half is forgotten. Two processes that rotate at once rotate one after the other.
//! Ignorant of: what a token says.

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use chrono::{DateTime, TimeDelta, Utc};
use jsonwebtoken::{DecodingKey, EncodingKey};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::error::{Error, Result};

/// How often a process looks for keys of others, at most.
pub const REREAD: TimeDelta = TimeDelta::seconds(1);
/// How long a new key is known before it signs.
pub const ANNOUNCED: TimeDelta = TimeDelta::seconds(5);
/// A process that has not looked yet may sign with a key for so long after it was retired.
const SLACK: TimeDelta = TimeDelta::seconds(2);

/// A key by which tokens are verified, and signed while it is the one for that.
#[derive(Clone)]
pub(crate) struct SigningKey {
    pub(crate) kid: String,
    /// The 32 bytes that are no secret.
    pub(crate) public: Vec<u8>,
    pub(crate) verifying: DecodingKey,
    signing: Option<EncodingKey>,
    created_at: DateTime<Utc>,
    retired_at: Option<DateTime<Utc>>,
}

impl SigningKey {
    /// Whether a token that says it was signed at that time may be one of this key's.
    pub(crate) fn may_have_signed(&self, at: DateTime<Utc>) -> bool {
        self.retired_at.is_none_or(|retired_at| at <= retired_at + SLACK)
    }
}

/// The keys that are in use, oldest first, as they were read.
pub(crate) struct Ring {
    pub(crate) keys: Vec<SigningKey>,
    pub(crate) read_at: DateTime<Utc>,
}

impl Ring {
    /// The keys in use.
    pub(crate) async fn read(db: &mut PgConnection, now: DateTime<Utc>) -> Result<Self> {
        let rows = sqlx::query!(
            "
            select kid, pkcs8, public_key, created_at, retired_at
              from signing_key
             where expires_at is null or expires_at > $1
             order by created_at, kid
            ",
            now
        )
        .fetch_all(db)
        .await?;
        let mut keys = Vec::with_capacity(rows.len());
        for row in rows {
            let public = match (row.public_key, &row.pkcs8) {
                (Some(public), _) => public,
                (None, pkcs8) => public_of(pkcs8.as_deref().unwrap_or_default(), &row.kid)?,
            };
            keys.push(SigningKey {
                kid: row.kid,
                verifying: DecodingKey::from_ed_der(&public),
                public,
                signing: row.pkcs8.as_deref().map(EncodingKey::from_ed_der),
                created_at: row.created_at,
                retired_at: row.retired_at,
            });
        }
        Ok(Self { keys, read_at: now })
    }

    /// The key of that name.
    pub(crate) fn find(&self, kid: &str) -> Option<&SigningKey> {
        self.keys.iter().find(|key| key.kid == kid)
    }

    /// The key that signs: the newest that everybody knows.
    pub(crate) fn signing(&self, now: DateTime<Utc>) -> Option<(&str, &EncodingKey)> {
        let signs = |key: &&SigningKey| key.signing.is_some() && key.retired_at.is_none_or(|at| now < at);
        let known = |key: &&SigningKey| key.created_at + ANNOUNCED <= now;
        let newest = self.keys.iter().filter(signs).rfind(known);
        let key = newest.or_else(|| self.keys.iter().find(signs))?;
        Some((&key.kid, key.signing.as_ref()?))
    }
}

/// Makes a key unless there is one. Two processes may both make theirs; both keys are then accepted everywhere.
pub(crate) async fn make_first(db: &mut PgConnection, now: DateTime<Utc>) -> Result<()> {
    let found = sqlx::query!("select kid from signing_key where retired_at is null limit 1");
    if found.fetch_optional(&mut *db).await?.is_none() {
        make(db, now).await?;
    }
    Ok(())
}

async fn make(db: &mut PgConnection, now: DateTime<Utc>) -> Result<String> {
    let pair = Ed25519KeyPair::generate().map_err(|_| Error::Internal("no random numbers".into()))?;
    let pkcs8 = pair.to_pkcs8().map_err(|_| Error::Internal("an Ed25519 key cannot be written".into()))?;
    let kid = Uuid::new_v4().simple().to_string();
    sqlx::query!(
        "insert into signing_key (kid, pkcs8, public_key, created_at) values ($1, $2, $3, $4)",
        kid,
        pkcs8.as_ref(),
        pair.public_key().as_ref(),
        now
    )
    .execute(db)
    .await?;
    Ok(kid)
}

fn public_of(pkcs8: &[u8], kid: &str) -> Result<Vec<u8>> {
    let pair = Ed25519KeyPair::from_pkcs8(pkcs8);
    let pair = pair.map_err(|_| Error::Internal(format!("signing key {kid} cannot be read")))?;
    Ok(pair.public_key().as_ref().to_vec())
}

/// Brings a new key. The ones before go on verifying what they signed, for `lifetime`; with `revoke` they verify nothing any
/// more, so that whoever has one of their tokens must refresh. To be called in a transaction.
pub async fn rotate(db: &mut PgConnection, lifetime: TimeDelta, revoke: bool, now: DateTime<Utc>) -> Result<String> {
    lock(db).await?;
    if revoke {
        sqlx::query!("delete from signing_key").execute(&mut *db).await?;
    } else {
        retire(db, lifetime, now).await?;
    }
    make(db, now).await
}

/// Whoever rotates at the same time waits.
async fn lock(db: &mut PgConnection) -> Result<()> {
    sqlx::query!("select kid from signing_key where retired_at is null order by kid for update").fetch_all(db).await?;
    Ok(())
}

async fn retire(db: &mut PgConnection, lifetime: TimeDelta, now: DateTime<Utc>) -> Result<()> {
    let retired_at = now + ANNOUNCED;
    sqlx::query!(
        "update signing_key set retired_at = $1, expires_at = $2 where retired_at is null",
        retired_at,
        retired_at + SLACK + lifetime
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Rotates when the newest key is older than `max_age`, if that is given; forgets private halves of retired keys, and keys
/// that verify nothing any more. Answers the name of a new key. To be called in a transaction.
pub async fn tend(
    db: &mut PgConnection,
    lifetime: TimeDelta,
    max_age: Option<TimeDelta>,
    now: DateTime<Utc>,
) -> Result<Option<String>> {
    lock(db).await?;
    sqlx::query!("delete from signing_key where expires_at <= $1", now).execute(&mut *db).await?;
    let retired = sqlx::query!(
        r#"select kid, pkcs8 as "pkcs8!", public_key from signing_key where retired_at <= $1 and pkcs8 is not null"#,
        now - SLACK
    );
    for key in retired.fetch_all(&mut *db).await? {
        let public = key.public_key.map_or_else(|| public_of(&key.pkcs8, &key.kid), Ok)?;
        sqlx::query!("update signing_key set pkcs8 = null, public_key = $2 where kid = $1", key.kid, public)
            .execute(&mut *db)
            .await?;
    }
    let newest = sqlx::query_scalar!("select max(created_at) from signing_key where retired_at is null");
    let newest = newest.fetch_one(&mut *db).await?;
    match (newest, max_age) {
        (Some(newest), Some(max_age)) if newest + max_age <= now => rotate(db, lifetime, false, now).await.map(Some),
        _ => Ok(None),
    }
}
