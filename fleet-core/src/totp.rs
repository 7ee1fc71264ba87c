//! One-time passwords by time (RFC 6238): the second factor beside a password.
//!
//! [`begin`] hands out a secret, [`confirm`] shows that an authenticator has it and gives recovery codes, [`verify`] takes a
//! code of either kind, [`renew_recovery`] gives other recovery codes, [`remove`] ends it. Holds: nothing is asked for before it was confirmed; a code is accepted within
//! one step of 30 s before and after, and no step twice; a recovery code works once. The secret is a row only sealed with
//! the key file, recovery codes as SHA-256. Ignorant of: HTTP, passwords, how often somebody may try.

use aws_lc_rs::rand;
use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use totp_rs::{Builder, Totp};

use crate::config;
use crate::error::{Error, Result};
use crate::id::UserId;
use crate::seal::Seal;

/// Recovery codes that are given at once.
pub const RECOVERY_CODES: usize = 10;
/// Longest code that is looked at, in bytes.
pub const MAX_CODE_BYTES: usize = 64;

/// RFC 4226 §4 recommends 160 bits.
const SECRET_BYTES: usize = 20;
const RECOVERY_BYTES: usize = 10;
/// Who the authenticator says the code is for.
const ISSUER: &str = "Muster";

/// What an authenticator has to be told, once.
#[derive(Debug)]
pub struct Enrolment {
    /// The secret in base 32, to be typed.
    pub secret: config::Secret,
    /// The same as an `otpauth://` URL, to be drawn as a QR code.
    pub url: config::Secret,
}

/// A user's second factor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct State {
    /// Asked for at logins since then.
    pub confirmed_at: DateTime<Utc>,
    /// Recovery codes that were not used yet.
    pub recovery_codes: i64,
}

/// What was taken for a code.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Taken {
    /// A code of the authenticator.
    Code,
    /// A recovery code.
    RecoveryCode,
}

/// The second factor of a user, if it was confirmed.
pub async fn find(db: &mut PgConnection, user: UserId) -> Result<Option<State>> {
    let state = sqlx::query_as!(
        State,
        r#"
        select confirmed_at as "confirmed_at!",
               (select count(*) from recovery_code r where r.user_id = t.user_id) as "recovery_codes!"
          from totp t
         where user_id = $1 and confirmed_at is not null
        "#,
        user.uuid()
    );
    Ok(state.fetch_optional(db).await?)
}

/// Hands out a secret, in place of one that was not confirmed. To be called in a transaction.
pub async fn begin(
    db: &mut PgConnection,
    seal: &Seal,
    user: UserId,
    email: &str,
    now: DateTime<Utc>,
) -> Result<Enrolment> {
    let secret: [u8; SECRET_BYTES] = random()?;
    let kept = sqlx::query!(
        "
        insert into totp (user_id, secret, last_step, created_at) values ($1, $2, 0, $3)
            on conflict (user_id) do update set secret = excluded.secret, created_at = excluded.created_at
         where totp.confirmed_at is null
        ",
        user.uuid(),
        seal.seal(&context(user), &secret)?,
        now
    )
    .execute(db)
    .await?;
    if kept.rows_affected() == 0 {
        return Err(Error::TotpOn);
    }
    let totp = of(&secret, email)?;
    let url = totp.to_url().map_err(|e| Error::Internal(format!("an otpauth URL: {e}")))?;
    Ok(Enrolment { secret: totp.secret().to_base32().into(), url: url.into() })
}

/// Takes the first code of the authenticator, and asks for one at each login from now on; answers recovery codes, which are
/// known at this moment only. To be called in a transaction.
pub async fn confirm(
    db: &mut PgConnection,
    seal: &Seal,
    user: UserId,
    code: &str,
    now: DateTime<Utc>,
) -> Result<Vec<config::Secret>> {
    let kept = sqlx::query!("select secret, confirmed_at from totp where user_id = $1 for update", user.uuid());
    let kept = kept.fetch_optional(&mut *db).await?.ok_or(Error::TotpOff)?;
    if kept.confirmed_at.is_some() {
        return Err(Error::TotpOn);
    }
    let step = step(seal, user, &kept.secret, code, now)?.ok_or(Error::BadCode)?;
    sqlx::query!("update totp set confirmed_at = $2, last_step = $3 where user_id = $1", user.uuid(), now, step)
        .execute(&mut *db)
        .await?;
    recovery_codes(db, user).await
}

/// Other recovery codes, in place of those that are left; known at this moment only. To be called in a transaction.
pub async fn renew_recovery(db: &mut PgConnection, user: UserId) -> Result<Vec<config::Secret>> {
    // Whoever else renews them waits.
    let on = sqlx::query!("select from totp where user_id = $1 and confirmed_at is not null for update", user.uuid());
    on.fetch_optional(&mut *db).await?.ok_or(Error::TotpOff)?;
    sqlx::query!("delete from recovery_code where user_id = $1", user.uuid()).execute(&mut *db).await?;
    recovery_codes(db, user).await
}

async fn recovery_codes(db: &mut PgConnection, user: UserId) -> Result<Vec<config::Secret>> {
    let codes = (0..RECOVERY_CODES).map(|_| recovery_code()).collect::<Result<Vec<_>>>()?;
    let hashes = codes.iter().map(|code| hash(code.expose())).collect::<Vec<_>>();
    sqlx::query!(
        "insert into recovery_code (user_id, code_hash) select $1, hash from unnest($2::bytea[]) as hash",
        user.uuid(),
        &hashes
    )
    .execute(db)
    .await?;
    Ok(codes)
}

/// Takes a code of the authenticator, or a recovery code; neither is accepted again. To be called in a transaction.
pub async fn verify(db: &mut PgConnection, seal: &Seal, user: UserId, code: &str, now: DateTime<Utc>) -> Result<Taken> {
    let kept = sqlx::query!("select secret from totp where user_id = $1 and confirmed_at is not null", user.uuid());
    let kept = kept.fetch_optional(&mut *db).await?.ok_or(Error::TotpOff)?;
    let (kind, taken) = if let Some(step) = step(seal, user, &kept.secret, code, now)? {
        let spent =
            sqlx::query!("update totp set last_step = $2 where user_id = $1 and last_step < $2", user.uuid(), step);
        (Taken::Code, spent.execute(db).await?)
    } else {
        let spent =
            sqlx::query!("delete from recovery_code where user_id = $1 and code_hash = $2", user.uuid(), hash(code));
        (Taken::RecoveryCode, spent.execute(db).await?)
    };
    if taken.rows_affected() == 1 { Ok(kind) } else { Err(Error::BadCode) }
}

/// Asks for no code any more; answers whether one was asked for.
pub async fn remove(db: &mut PgConnection, user: UserId) -> Result<bool> {
    let removed = sqlx::query_scalar!(
        r#"delete from totp where user_id = $1 returning confirmed_at is not null as "was_on!""#,
        user.uuid()
    );
    Ok(removed.fetch_optional(db).await?.unwrap_or(false))
}

/// The step whose code this is, near now.
fn step(seal: &Seal, user: UserId, sealed: &[u8], code: &str, now: DateTime<Utc>) -> Result<Option<i64>> {
    let code = code.trim();
    if code.len() > MAX_CODE_BYTES {
        return Ok(None);
    }
    let secret = seal.open(&context(user), sealed)?;
    let time = u64::try_from(now.timestamp()).unwrap_or_default();
    Ok(of(&secret, "")?.check(code, time).and_then(|step| i64::try_from(step).ok()))
}

/// What authenticators know without being asked: SHA-1, six digits, 30 s; and one step before and after, for clocks.
fn of(secret: &[u8], email: &str) -> Result<Totp> {
    let totp = Builder::new().with_secret(secret).with_issuer(Some(ISSUER)).with_account_name(email.replace(':', " "));
    totp.build().map_err(|e| Error::Internal(format!("a TOTP secret: {e}")))
}

/// A sealed secret opens for its own user only.
fn context(user: UserId) -> Vec<u8> {
    [b"totp:".as_slice(), user.uuid().as_bytes()].concat()
}

/// `xxxx-xxxx-xxxx-xxxx`
fn recovery_code() -> Result<config::Secret> {
    let bytes: [u8; RECOVERY_BYTES] = random()?;
    let text = totp_rs::Secret::from(bytes.as_slice()).to_base32().to_lowercase();
    let groups = text.as_bytes().chunks(4).map(String::from_utf8_lossy).collect::<Vec<_>>();
    Ok(groups.join("-").into())
}

/// Of a recovery code as somebody may write it: hyphens, spaces and capitals do not count.
fn hash(code: &str) -> Vec<u8> {
    let plain = code.chars().filter(char::is_ascii_alphanumeric).take(MAX_CODE_BYTES);
    Sha256::digest(plain.collect::<String>().to_lowercase()).to_vec()
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    rand::fill(&mut bytes).map_err(|_| Error::Internal("no random numbers".into()))?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sqlx::Postgres;
    use sqlx::pool::PoolConnection;

    use super::*;
    use crate::clock::{Clock, from_ms};
    use crate::testing::TestDb;
    use crate::user;

    const NOON: i64 = 1_763_722_800_000;
    const EMAIL: &str = "ada@example.com";

    struct Scene {
        db: TestDb,
        user: UserId,
        seal: Seal,
        _dir: tempfile::TempDir,
    }

    impl Scene {
        async fn new() -> Self {
            let (db, dir) = (TestDb::new().await, tempfile::tempdir().unwrap());
            let mut conn = db.pool().acquire().await.unwrap();
            user::ensure_admin(&mut conn, Some(EMAIL), None, &Clock::system()).await.unwrap();
            let user = sqlx::query_scalar!(r#"select id as "id: UserId" from app_user"#);
            let user = user.fetch_one(&mut *conn).await.unwrap();
            Self { db, user, seal: Seal::new(dir.path().join("secrets.key")), _dir: dir }
        }

        async fn conn(&self) -> PoolConnection<Postgres> {
            self.db.pool().acquire().await.unwrap()
        }

        /// The authenticator, with what it was told.
        async fn begin(&self) -> Totp {
            let mut conn = self.conn().await;
            let told = begin(&mut conn, &self.seal, self.user, EMAIL, from_ms(NOON)).await.unwrap();
            let secret = totp_rs::Secret::try_from_base32(told.secret.expose()).unwrap();
            let authenticator = Builder::new().with_secret(secret).build().unwrap();
            assert!(
                told.url.expose().starts_with("otpauth://totp/Muster:ada%40example.com?secret="),
                "{:?}",
                told.url.expose()
            );
            authenticator
        }

        async fn confirm(&self, code: &str) -> Result<Vec<config::Secret>> {
            confirm(&mut *self.conn().await, &self.seal, self.user, code, from_ms(NOON)).await
        }

        async fn verify(&self, code: &str, seconds: i64) -> bool {
            let mut conn = self.conn().await;
            match verify(&mut conn, &self.seal, self.user, code, from_ms(NOON + seconds * 1000)).await {
                Ok(_) => true,
                Err(Error::BadCode) => false,
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What the authenticator shows so many seconds after noon.
    fn shown(authenticator: &Totp, seconds: i64) -> String {
        authenticator.generate(u64::try_from(NOON / 1000 + seconds).unwrap()).to_string()
    }

    #[test]
    fn the_vectors_of_the_standard_are_reproduced() {
        // RFC 6238, appendix B: the last six of eight digits.
        let totp = of(b"12345678901234567890", "").unwrap();
        for (time, code) in
            [(59, "287082"), (1_111_111_109, "081804"), (1_234_567_890, "005924"), (20_000_000_000, "353130")]
        {
            assert_eq!(totp.generate(time).to_string(), code);
            assert_eq!(totp.check(code, time), Some(time / 30));
        }
    }

    #[tokio::test]
    async fn nothing_is_asked_for_before_the_authenticator_has_shown_a_code() {
        let scene = Scene::new().await;
        assert!(matches!(scene.confirm("123456").await, Err(Error::TotpOff)));
        let first = scene.begin().await;
        let second = scene.begin().await;
        assert_eq!(find(&mut *scene.conn().await, scene.user).await.unwrap(), None);
        assert!(matches!(scene.confirm(&shown(&first, 0)).await, Err(Error::BadCode)), "it was replaced");
        let codes = scene.confirm(&shown(&second, 0)).await.unwrap();
        assert_eq!(codes.len(), RECOVERY_CODES);
        let state = find(&mut *scene.conn().await, scene.user).await.unwrap().unwrap();
        assert_eq!(state.recovery_codes, 10);
        assert!(matches!(scene.confirm(&shown(&second, 0)).await, Err(Error::TotpOn)));
        let again = begin(&mut *scene.conn().await, &scene.seal, scene.user, EMAIL, from_ms(NOON)).await;
        assert!(matches!(again, Err(Error::TotpOn)));
    }

    #[tokio::test]
    async fn a_code_is_accepted_near_its_time_and_once() {
        let scene = Scene::new().await;
        let authenticator = scene.begin().await;
        scene.confirm(&shown(&authenticator, 0)).await.unwrap();
        assert!(!scene.verify(&shown(&authenticator, 0), 0).await, "it was confirmed with that one");
        assert!(!scene.verify(&shown(&authenticator, -30), 0).await, "an earlier one neither");
        assert!(scene.verify(&shown(&authenticator, 30), 0).await, "a clock may be ahead");
        assert!(!scene.verify(&shown(&authenticator, 30), 31).await);
        assert!(scene.verify(&shown(&authenticator, 90), 129).await, "or behind");
        assert!(!scene.verify(&shown(&authenticator, 120), 180).await, "but not by two steps");
        assert!(!scene.verify(&shown(&authenticator, 300), 240).await);
        let now = format!(" {} ", shown(&authenticator, 600));
        let (one, two) = tokio::join!(scene.verify(&now, 600), scene.verify(&now, 600));
        assert!(one != two, "at once, one of them");
        for bad in ["", "000", "12345678", "abcdef", "\0", "９９９９９９", &"1".repeat(10_000)] {
            assert!(!scene.verify(bad, 900).await, "{bad}");
        }
    }

    #[tokio::test]
    async fn a_recovery_code_works_once_however_it_is_written() {
        let scene = Scene::new().await;
        let authenticator = scene.begin().await;
        let codes = scene.confirm(&shown(&authenticator, 0)).await.unwrap();
        let written = codes[0].expose().to_uppercase().replace('-', " ");
        let (one, two) = tokio::join!(scene.verify(&written, 0), scene.verify(&written, 0));
        assert!(one != two);
        assert!(!scene.verify(codes[0].expose(), 0).await);
        assert!(scene.verify(codes[1].expose(), 0).await);
        let state = find(&mut *scene.conn().await, scene.user).await.unwrap().unwrap();
        assert_eq!(state.recovery_codes, 8);
        let renewed = renew_recovery(&mut *scene.conn().await, scene.user).await.unwrap();
        assert_eq!(renewed.len(), RECOVERY_CODES);
        assert!(!scene.verify(codes[2].expose(), 0).await, "those of before are worth nothing");
        assert!(scene.verify(renewed[0].expose(), 0).await);
        assert!(remove(&mut *scene.conn().await, scene.user).await.unwrap());
        assert!(!remove(&mut *scene.conn().await, scene.user).await.unwrap());
        let gone = verify(&mut *scene.conn().await, &scene.seal, scene.user, codes[2].expose(), from_ms(NOON)).await;
        assert!(matches!(gone, Err(Error::TotpOff)));
        assert!(matches!(renew_recovery(&mut *scene.conn().await, scene.user).await, Err(Error::TotpOff)));
    }

    #[tokio::test]
    async fn a_copy_of_the_rows_holds_no_secret() {
        let scene = Scene::new().await;
        let authenticator = scene.begin().await;
        let kept = sqlx::query_scalar!("select secret from totp").fetch_one(scene.db.pool()).await.unwrap();
        let secret = authenticator.secret().as_bytes();
        assert!(!kept.windows(secret.len()).any(|part| part == secret));
        // Nor does it help to give it to another user, or to open it elsewhere.
        assert!(step(&scene.seal, UserId::new(), &kept, "123456", from_ms(NOON)).is_err());
        let dir = tempfile::tempdir().unwrap();
        let elsewhere = Seal::new(dir.path().join("secrets.key"));
        assert!(step(&elsewhere, scene.user, &kept, "123456", from_ms(NOON)).is_err());
    }

    proptest! {
        #[test]
        fn any_text_may_be_a_code(text in ".{0,100}") {
            hash(&text);
            of(&[7; SECRET_BYTES], "").unwrap().check(&text, 1_763_722_800);
        }
    }
}
