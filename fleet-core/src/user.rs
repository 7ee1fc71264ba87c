//! Users: the people who log in.
//!
//! The first is made by [`ensure_admin`]; everyone enters by [`Logins::login`]. Holds: passwords are kept as Argon2id
//! (RFC 9106) only; a login does the same work whether or not the user exists, so its time tells nothing; hashing is
//! bounded in memory, and what exceeds a short queue is refused instead of waiting. Ignorant of: HTTP, tokens.

use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::clock::Clock;
use crate::config::Secret;
use crate::credential::random_secret;
use crate::database;
use crate::error::{Error, Result};
use crate::id::{TenantId, UserId};

/// Logins that may wait for one of the hashes being computed; one more is refused with [`Error::Busy`].
pub const LOGIN_QUEUE: usize = 16;
/// Longest e-mail address, in bytes (RFC 5321 §4.5.3.1.3).
pub const MAX_EMAIL_BYTES: usize = 254;
/// Longest password, in bytes.
pub const MAX_PASSWORD_BYTES: usize = 1024;
/// The first administrator's e-mail when none is given.
pub const DEFAULT_ADMIN_EMAIL: &str = "admin@example.com";

/// What a login is compared with when there is no such user: the hash of a random password that nobody knows.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$aW1cWuUeMkP/gtHhOTnXBw$MB+ASxVRAS/Zsd8Un6WZ92lozKzP2CD1Iq6RLiFTqaM";

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Names the user.
    pub id: UserId,
    /// The tenant the user belongs to.
    pub tenant: TenantId,
    /// The address the user logs in with.
    pub email: String,
    /// The role by name; without one a user may log in and do nothing else.
    pub role: Option<String>,
    /// When the user was made.
    pub created_at: DateTime<Utc>,
}

/// The user made at the first start.
#[derive(Debug, Clone)]
pub struct FirstAdmin {
    /// The address to log in with.
    pub email: String,
    /// The password to log in with.
    pub password: Secret,
    /// Whether the password was made here, so that somebody must be told.
    pub generated: bool,
}

/// Makes an administrator of the first tenant when there is no user at all, with a random password unless one is given.
/// Of several processes that start at once, one makes the user; the others get `None`.
pub async fn ensure_admin(
    db: &mut PgConnection,
    email: Option<&str>,
    password: Option<&Secret>,
    clock: &Clock,
) -> Result<Option<FirstAdmin>> {
    let found = sqlx::query_scalar!(r#"select exists (select from app_user) as "found!""#).fetch_one(&mut *db).await?;
    if found {
        return Ok(None);
    }
    let tenant = database::first_tenant(&mut *db, clock).await?;
    let email = checked_email(email.unwrap_or(DEFAULT_ADMIN_EMAIL))?;
    let generated = password.is_none();
    let password = password.map_or_else(random_secret, |given| Ok(given.clone()))?;
    let hash = hash(password.clone()).await?;
    let made = sqlx::query!(
        "
        insert into app_user (id, tenant_key, email, password_hash, role, created_at)
        select $1, $2, $3, $4, 'admin', $5
         where not exists (select from app_user)
            on conflict do nothing
        ",
        UserId::new().uuid(),
        tenant.0,
        email,
        hash,
        clock.now()
    )
    .execute(db)
    .await?;
    Ok((made.rows_affected() == 1).then(|| FirstAdmin { email: email.to_owned(), password, generated }))
}

/// The user of that id.
pub async fn find(db: &mut PgConnection, id: UserId) -> Result<Option<User>> {
    let user = sqlx::query_as!(
        User,
        r#"
        select u.id as "id: UserId", t.id as "tenant: TenantId", u.email, u.role, u.created_at
          from app_user u
          join tenant t on t.key = u.tenant_key
         where u.id = $1
        "#,
        id.uuid()
    )
    .fetch_optional(db)
    .await?;
    Ok(user)
}

/// The one entrance for people, and its bound: each hash takes 19 MiB and some 20 ms of a core.
#[derive(Clone)]
pub struct Logins {
    inside: Arc<Semaphore>,
    hashing: Arc<Semaphore>,
}

impl Logins {
    /// At most `concurrency` hashes at once, and [`LOGIN_QUEUE`] logins waiting for one.
    pub fn new(concurrency: usize) -> Self {
        let inside = Arc::new(Semaphore::new(concurrency + LOGIN_QUEUE));
        Self { inside, hashing: Arc::new(Semaphore::new(concurrency)) }
    }

    /// The user with that address, if the password is right and the user is not disabled. Takes the pool instead of a
    /// connection, so that none is held while the hash is computed.
    pub async fn login(&self, db: &PgPool, email: &str, password: &Secret) -> Result<User> {
        let _inside = self.inside.try_acquire().map_err(|_| Error::Busy("logins"))?;
        if password.expose().len() > MAX_PASSWORD_BYTES {
            return Err(Error::Invalid(format!("password is too long: expected at most {MAX_PASSWORD_BYTES} bytes")));
        }
        let email = checked_email(email)?;
        let stored = sqlx::query!(
            "select id, password_hash from app_user where lower(email) = lower($1) and not disabled",
            email
        )
        .fetch_optional(db)
        .await?;
        let (id, expected) = stored.map_or((None, NOBODY.to_owned()), |user| (Some(user.id), user.password_hash));
        let slot = self.hashing.clone().acquire_owned().await.map_err(|_| Error::Busy("logins"))?;
        let right = verify(password.clone(), expected, slot).await?;
        match id {
            Some(id) if right => find(&mut *db.acquire().await?, id.into()).await?.ok_or(Error::BadLogin),
            _ => Err(Error::BadLogin),
        }
    }
}

fn checked_email(email: &str) -> Result<&str> {
    let email = email.trim();
    let parts = email.split_once('@').is_some_and(|(local, domain)| !local.is_empty() && !domain.is_empty());
    if parts && email.len() <= MAX_EMAIL_BYTES && !email.contains(|c: char| c.is_control() || c.is_whitespace()) {
        return Ok(email);
    }
    Err(Error::Invalid(format!("email is not valid: expected name@domain, at most {MAX_EMAIL_BYTES} bytes")))
}

/// The PHC string of a password, computed off the async threads.
pub async fn hash(password: Secret) -> Result<String> {
    if password.expose().len() > MAX_PASSWORD_BYTES {
        return Err(Error::Invalid(format!("password is too long: expected at most {MAX_PASSWORD_BYTES} bytes")));
    }
    let work = move || Argon2::default().hash_password(password.expose().as_bytes()).map(|hash| hash.to_string());
    blocking(work).await?.map_err(|e| Error::Internal(format!("hashing a password: {e}")))
}

/// Compares; the slot is given back when the work is done, even if the caller has gone away.
async fn verify(password: Secret, expected: String, slot: OwnedSemaphorePermit) -> Result<bool> {
    let work = move || {
        let _slot = slot;
        let expected = PasswordHash::new(&expected).map_err(|e| Error::Internal(format!("a stored hash: {e}")))?;
        Ok(Argon2::default().verify_password(password.expose().as_bytes(), &expected).is_ok())
    };
    blocking(work).await?
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Error::Internal(format!("hashing a password: {e}")))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::testing::TestDb;

    async fn with_admin(db: &TestDb) -> Secret {
        let mut conn = db.pool().acquire().await.unwrap();
        ensure_admin(&mut conn, None, None, &Clock::system()).await.unwrap().expect("there was no user").password
    }

    #[tokio::test]
    async fn the_first_start_makes_one_admin_and_the_next_none() {
        let db = TestDb::new().await;
        let start = || async {
            let mut conn = db.pool().acquire().await.unwrap();
            ensure_admin(&mut conn, Some("Root@Example.com"), None, &Clock::system()).await.unwrap()
        };
        let (one, two) = tokio::join!(start(), start());
        assert!(start().await.is_none());
        let made = [one, two].into_iter().flatten().collect::<Vec<_>>();
        let [admin] = made.as_slice() else { panic!("expected one admin, found {made:?}") };
        assert!(admin.generated);
        let logins = Logins::new(2);
        let user = logins.login(db.pool(), "root@example.COM ", &admin.password).await.unwrap();
        assert_eq!((user.email.as_str(), user.role.as_deref()), ("Root@Example.com", Some("admin")));
    }

    #[tokio::test]
    async fn a_given_password_is_the_password() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let given = Secret::from("correct horse".to_owned());
        let admin = ensure_admin(&mut conn, None, Some(&given), &Clock::system()).await.unwrap().unwrap();
        assert!(!admin.generated);
        assert_eq!(admin.email, DEFAULT_ADMIN_EMAIL);
        Logins::new(1).login(db.pool(), DEFAULT_ADMIN_EMAIL, &given).await.unwrap();
        let stored = sqlx::query_scalar!("select password_hash from app_user").fetch_one(db.pool()).await.unwrap();
        assert!(stored.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"), "{stored}");
    }

    #[tokio::test]
    async fn a_wrong_password_an_unknown_and_a_disabled_user_look_the_same() {
        let db = TestDb::new().await;
        let password = with_admin(&db).await;
        let logins = Logins::new(1);
        let wrong = Secret::from("wrong".to_owned());
        let refused = |result: Result<User>| matches!(result, Err(Error::BadLogin));
        assert!(refused(logins.login(db.pool(), DEFAULT_ADMIN_EMAIL, &wrong).await));
        assert!(refused(logins.login(db.pool(), "nobody@example.com", &password).await));
        sqlx::query!("update app_user set disabled = true").execute(db.pool()).await.unwrap();
        assert!(refused(logins.login(db.pool(), DEFAULT_ADMIN_EMAIL, &password).await));
    }

    #[tokio::test]
    async fn an_unknown_user_costs_as_much_as_a_known_one() {
        let nobody = PasswordHash::new(NOBODY).unwrap();
        let somebody = hash(Secret::from("x".to_owned())).await.unwrap();
        let somebody = PasswordHash::new(&somebody).unwrap();
        let cost = |hash: &PasswordHash| (hash.algorithm, hash.version, hash.params.clone());
        assert_eq!(cost(&nobody), cost(&somebody));

        // And by the clock. The fastest of several is the least disturbed by other work on the machine; a login that
        // skips the hash would be some fifty times faster.
        let db = TestDb::new().await;
        with_admin(&db).await;
        let logins = Logins::new(1);
        let wrong = Secret::from("wrong".to_owned());
        let mut fastest = [Duration::MAX; 2];
        for _ in 0..9 {
            for (email, fastest) in [DEFAULT_ADMIN_EMAIL, "nobody@example.com"].iter().zip(&mut fastest) {
                let begun = Instant::now();
                assert!(matches!(logins.login(db.pool(), email, &wrong).await, Err(Error::BadLogin)));
                *fastest = begun.elapsed().min(*fastest);
            }
        }
        let [known, unknown] = fastest;
        assert!(known < unknown * 5 && unknown < known * 5, "known {known:?}, unknown {unknown:?}");
    }

    #[tokio::test]
    async fn logins_beyond_the_queue_are_refused_at_once() {
        let db = TestDb::new().await;
        with_admin(&db).await;
        let logins = Logins::new(1);
        let wrong = Secret::from("wrong".to_owned());
        let attempts = (0..LOGIN_QUEUE + 8).map(|_| logins.login(db.pool(), DEFAULT_ADMIN_EMAIL, &wrong));
        let answers = futures_join(attempts).await;
        let busy = answers.iter().filter(|answer| matches!(answer, Err(Error::Busy("logins")))).count();
        assert_eq!(busy, 7, "one is hashing, {LOGIN_QUEUE} wait");
        assert!(matches!(logins.login(db.pool(), DEFAULT_ADMIN_EMAIL, &wrong).await, Err(Error::BadLogin)));
    }

    /// Polls all of them before any goes on.
    async fn futures_join<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
        let mut pinned = futures.map(Box::pin).collect::<Vec<_>>();
        let mut done = Vec::new();
        std::future::poll_fn(|cx| {
            pinned.retain_mut(|future| match future.as_mut().poll(cx) {
                std::task::Poll::Ready(value) => {
                    done.push(value);
                    false
                }
                std::task::Poll::Pending => true,
            });
            if pinned.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
        })
        .await;
        done
    }

    #[tokio::test]
    async fn what_cannot_be_an_address_or_a_password_is_refused() {
        let db = TestDb::new().await;
        let logins = Logins::new(1);
        let fine = Secret::from("x".to_owned());
        for email in ["", "a", "@", "a@", "@b", "a\0@b", "a b@c", &format!("{}@b", "x".repeat(254))] {
            let answer = logins.login(db.pool(), email, &fine).await;
            assert!(matches!(answer, Err(Error::Invalid(_))), "{email:?}: {answer:?}");
        }
        let long = Secret::from("x".repeat(MAX_PASSWORD_BYTES + 1));
        assert!(matches!(logins.login(db.pool(), "a@b", &long).await, Err(Error::Invalid(_))));
    }
}
