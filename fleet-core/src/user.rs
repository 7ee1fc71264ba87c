//! Users: the people who log in.
//!
//! The first is made by [`ensure_admin`], others by [`create`]; everyone enters by [`Logins::login`]. Holds: a tenant
//! keeps an enabled admin, and the server one with platform standing; who has that, or a role of the platform, is
//! changed only by those who have it (ADR 7); passwords are kept as Argon2id (RFC 9106) only; a login does the same work whether or not the user exists, so its time tells nothing; hashing is
//! bounded in memory, and what exceeds a short queue is refused instead of waiting. Ignorant of: HTTP, tokens.

use std::sync::Arc;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use uuid::Uuid;

use crate::clock::Clock;
use crate::config::{Auth, Secret};
use crate::credential::random_secret;
use crate::error::{Error, OrOn, Result, check_version};
use crate::id::{RoleId, TenantId, TenantKey, UserId};
use crate::policy::Manager;
use crate::role::{self, Assignable};
use crate::scope::Extent;
use crate::{control, database, login_session, password, standing};

/// Logins that may wait for one of the hashes being computed; one more is refused with [`Error::Busy`].
pub const LOGIN_QUEUE: usize = 16;
/// Longest e-mail address, in bytes (RFC 5321 §4.5.3.1.3).
pub const MAX_EMAIL_BYTES: usize = 254;
/// The first administrator's e-mail when none is given.
pub const DEFAULT_ADMIN_EMAIL: &str = "admin@example.com";

/// What a login is compared with when there is no such user: the hash of a random password that nobody knows.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$aW1cWuUeMkP/gtHhOTnXBw$MB+ASxVRAS/Zsd8Un6WZ92lozKzP2CD1Iq6RLiFTqaM";

/// Most users on a page.
pub const MAX_PAGE: usize = 1000;

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
    /// Whether the role is one of the platform.
    pub platform_role: bool,
    /// Whether the user stands above tenants: may make roles of the platform and give them away.
    pub platform: bool,
    /// A disabled user may not log in, and is out at once.
    pub disabled: bool,
    /// Rises with every change.
    pub version: i64,
    /// When the user was made.
    pub created_at: DateTime<Utc>,
    /// When the user was last changed.
    pub updated_at: DateTime<Utc>,
}

impl User {
    fn is_admin(&self) -> bool {
        self.role.as_deref() == Some("admin") && !self.disabled
    }

    fn has_standing(&self) -> bool {
        self.is_admin() && self.platform
    }

    /// What only who has platform standing may touch: else a tenant's admin would take it by a new password.
    fn is_above(&self) -> bool {
        self.platform || self.platform_role
    }
}

/// A user to be made.
#[derive(Debug, Clone)]
pub struct NewUser {
    /// The address to log in with.
    pub email: String,
    /// The PHC string of the password, of [`Logins::hash`]; without one the user needs a link to set it first.
    pub password_hash: Option<String>,
    /// The role, if any.
    pub role: Option<RoleId>,
    /// Whether the user stands above tenants; with the role `admin` only.
    pub platform: bool,
    /// Whether the user may not log in yet.
    pub disabled: bool,
}

/// What to change of a user: what is `None` stays.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Patch {
    /// The address to log in with.
    pub email: Option<String>,
    /// The PHC string of a new password, of [`Logins::hash`].
    pub password_hash: Option<String>,
    /// The role; inner `None` takes it.
    pub role: Option<Option<RoleId>>,
    /// Whether the user stands above tenants; with the role `admin` only.
    pub platform: Option<bool>,
    /// Whether the user may not log in.
    pub disabled: Option<bool>,
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
        insert into app_user (id, tenant_key, email, password_hash, role, platform, created_at, updated_at)
        select $1, $2, $3, $4, 'admin', true, $5, $5
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

/// The user of that id, in whatever tenant.
pub async fn find(db: &mut PgConnection, id: UserId) -> Result<Option<User>> {
    Ok(read(db, &[id.uuid()]).await?.pop())
}

/// The user of that id, in this tenant.
pub async fn find_in(db: &mut PgConnection, tenant: TenantKey, id: UserId) -> Result<User> {
    let here = sqlx::query!("select id from app_user where id = $1 and tenant_key = $2", id.uuid(), tenant.0);
    let here = here.fetch_optional(&mut *db).await?.is_some();
    let user = if here { find(db, id).await? } else { None };
    user.ok_or(Error::NoSuchUser(id))
}

/// The user with that e-mail address, in this tenant.
pub async fn find_by_email(db: &mut PgConnection, tenant: TenantKey, email: &str) -> Result<User> {
    let id = sqlx::query_scalar!(
        r#"select id as "id: UserId" from app_user where lower(email) = lower($1) and tenant_key = $2"#,
        email,
        tenant.0
    );
    match id.fetch_optional(&mut *db).await? {
        Some(id) => find_in(db, tenant, id).await,
        None => Err(Error::Invalid("principal: expected the e-mail address of a user of the tenant".into())),
    }
}

async fn read(db: &mut PgConnection, ids: &[Uuid]) -> Result<Vec<User>> {
    let users = sqlx::query_as!(
        User,
        r#"
        select u.id as "id: UserId", t.id as "tenant: TenantId", u.email, coalesce(u.role, r.id) as role,
               coalesce(r.tenant_key is null and r.key is not null, false) as "platform_role!",
               u.platform, u.disabled, u.version, u.created_at, u.updated_at
          from app_user u
          join tenant t on t.key = u.tenant_key
          left join role r on r.key = u.role_key
         where u.id = any($1)
         order by u.id
        "#,
        ids
    )
    .fetch_all(db)
    .await?;
    Ok(users)
}

/// At most `limit` (itself at most [`MAX_PAGE`]) users in the order they were made, beginning behind `after`.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    after: Option<UserId>,
    limit: usize,
) -> Result<(Vec<User>, Option<UserId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut ids = sqlx::query_scalar!(
        "select id from app_user where tenant_key = $1 and ($2::uuid is null or id > $2) order by id limit $3",
        tenant.0,
        after.map(UserId::uuid),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = ids.len() > limit;
    ids.truncate(limit);
    let users = read(db, &ids).await?;
    let next = users.last().filter(|_| more).map(|user| user.id);
    Ok((users, next))
}

/// Makes a user. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    by: Manager<'_>,
    new: &NewUser,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<User> {
    check_standing(by, new.platform, new.role.as_ref())?;
    role::lock(db, Some(by.tenant)).await?;
    let count = sqlx::query_scalar!(r#"select count(*) as "count!" from app_user where tenant_key = $1"#, by.tenant.0);
    if usize::try_from(count.fetch_one(&mut *db).await?).is_ok_and(|count| count >= auth.max_users) {
        return Err(Error::TooMany { what: "users", most: auth.max_users });
    }
    let role = assigned(db, by, new.role.as_ref()).await?;
    let id = UserId::new();
    sqlx::query!(
        "
        insert into app_user (id, tenant_key, email, password_hash, role, role_key, platform, disabled, created_at, updated_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9)
        ",
        id.uuid(),
        by.tenant.0,
        checked_email(&new.email)?,
        new.password_hash,
        role.as_ref().and_then(Assignable::built_in),
        role.as_ref().and_then(|role| role.key),
        new.platform,
        new.disabled,
        now
    )
    .execute(&mut *db)
    .await
    .or_on("app_user_email_key", || Error::EmailTaken)?;
    find_in(db, by.tenant, id).await
}

/// Changes a user: as it was, and as it is, if its version is one of `expected` or none is. To be called in a transaction.
pub async fn update(
    db: &mut PgConnection,
    by: Manager<'_>,
    id: UserId,
    patch: &Patch,
    expected: &[i64],
    now: DateTime<Utc>,
) -> Result<(User, User)> {
    let old = locked(db, by, id, expected).await?;
    if *patch == Patch::default() {
        return Ok((old.clone(), old));
    }
    let platform = patch.platform.unwrap_or(old.platform);
    let role = match &patch.role {
        Some(role) => role.clone(),
        None => old.role.clone().map(RoleId::try_from).transpose()?,
    };
    if patch.platform.is_some() || patch.role.is_some() {
        check_standing(by, platform, role.as_ref())?;
    }
    let role = assigned(db, by, role.as_ref()).await?;
    sqlx::query!(
        "
        update app_user
           set email = coalesce($2, email), password_hash = coalesce($3, password_hash), role = $4, role_key = $5,
               platform = $6, disabled = coalesce($7, disabled), version = version + 1, updated_at = $8
         where id = $1
        ",
        id.uuid(),
        patch.email.as_deref().map(checked_email).transpose()?,
        patch.password_hash,
        role.as_ref().and_then(Assignable::built_in),
        role.as_ref().and_then(|role| role.key),
        platform,
        patch.disabled,
        now
    )
    .execute(&mut *db)
    .await
    .or_on("app_user_email_key", || Error::EmailTaken)?;
    if patch.password_hash.is_some() {
        login_session::end_all(db, id, None).await?;
    }
    let new = find_in(db, by.tenant, id).await?;
    check_somebody_is_left(db, by.tenant, &old, Some(&new)).await?;
    control::bump(db).await?;
    Ok((old, new))
}

/// Deletes a user with its API keys, if its version is one of `expected` or none is; answers what it was. To be called in a transaction.
pub async fn delete(db: &mut PgConnection, by: Manager<'_>, id: UserId, expected: &[i64]) -> Result<User> {
    let old = locked(db, by, id, expected).await?;
    sqlx::query!("delete from app_user where id = $1", id.uuid()).execute(&mut *db).await?;
    check_somebody_is_left(db, by.tenant, &old, None).await?;
    control::bump(db).await?;
    Ok(old)
}

/// Gives a user another password, by its hash of [`Logins::hash`].
pub async fn set_password(db: &mut PgConnection, id: UserId, password_hash: &str, now: DateTime<Utc>) -> Result<()> {
    let set = sqlx::query!(
        "update app_user set password_hash = $2, version = version + 1, updated_at = $3 where id = $1",
        id.uuid(),
        password_hash,
        now
    );
    match set.execute(db).await?.rows_affected() {
        0 => Err(Error::NoSuchUser(id)),
        _ => Ok(()),
    }
}

/// Whose audit something belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    /// The user.
    pub id: UserId,
    /// The user's tenant.
    pub tenant: TenantKey,
    /// The user's address.
    pub email: String,
}

/// The account of an address, disabled or not.
pub async fn account(db: &mut PgConnection, email: &str) -> Result<Option<Account>> {
    let account = sqlx::query_as!(
        Account,
        r#"
        select id as "id: UserId", tenant_key as "tenant: TenantKey", email from app_user where lower(email) = lower($1)
        "#,
        checked_email(email)?
    );
    Ok(account.fetch_optional(db).await?)
}

/// The tenant of a user.
pub async fn tenant(db: &mut PgConnection, id: UserId) -> Result<TenantKey> {
    let tenant = sqlx::query_scalar!(r#"select tenant_key as "key: TenantKey" from app_user where id = $1"#, id.uuid());
    tenant.fetch_optional(db).await?.ok_or(Error::NoSuchUser(id))
}

/// The user, if `by` may manage its access: who stands above is for those who do too, and who may do more for nobody.
pub async fn manageable(db: &mut PgConnection, by: Manager<'_>, id: UserId) -> Result<User> {
    let user = find_in(db, by.tenant, id).await?;
    if user.is_above() && !by.platform {
        return Err(Error::NotPlatform("change a user who has it, or who has a role of the platform"));
    }
    // Else a new password would make anyone an admin.
    let grants = standing::grants(db, &role::Roles::default(), id).await?;
    if !grants.iter().all(|grant| by.may_give(&grant.role, &grant.extent)) {
        return Err(Error::Above);
    }
    Ok(user)
}

/// The user, who stands still until the transaction ends.
async fn locked(db: &mut PgConnection, by: Manager<'_>, id: UserId, expected: &[i64]) -> Result<User> {
    role::lock(db, Some(by.tenant)).await?;
    let user = manageable(db, by, id).await?;
    check_version(user.version, expected)?;
    Ok(user)
}

fn check_standing(by: Manager<'_>, platform: bool, role: Option<&RoleId>) -> Result<()> {
    if platform && !by.platform {
        return Err(Error::NotPlatform("give it to others"));
    }
    if platform && role.is_none_or(|role| role.as_str() != "admin") {
        return Err(Error::Invalid("platform: expected false, or the role admin beside it".into()));
    }
    Ok(())
}

async fn assigned(db: &mut PgConnection, by: Manager<'_>, role: Option<&RoleId>) -> Result<Option<Assignable>> {
    match role {
        Some(role) => role::assignable(db, by, role, &Extent::Everything).await.map(Some),
        None => Ok(None),
    }
}

/// Refuses a change that takes the last admin of a tenant, or the last with platform standing.
async fn check_somebody_is_left(
    db: &mut PgConnection,
    tenant: TenantKey,
    old: &User,
    new: Option<&User>,
) -> Result<()> {
    let left = sqlx::query!(
        r#"
        select count(*) filter (where tenant_key = $1) as "admins!", count(*) filter (where platform) as "above!"
          from app_user
         where role = 'admin' and not disabled
        "#,
        tenant.0
    )
    .fetch_one(db)
    .await?;
    if left.admins == 0 && old.is_admin() && !new.is_some_and(User::is_admin) {
        return Err(Error::LastAdmin("admin of the tenant"));
    }
    if left.above == 0 && old.has_standing() && !new.is_some_and(User::has_standing) {
        return Err(Error::LastAdmin("admin with platform standing"));
    }
    Ok(())
}

/// The addresses of these users; those that exist no more are left out.
pub async fn emails(db: &mut PgConnection, ids: &[UserId]) -> Result<Vec<(UserId, String)>> {
    if ids.is_empty() {
        return Ok(Vec::new());
    }
    let ids: Vec<Uuid> = ids.iter().map(|id| id.uuid()).collect();
    let rows = sqlx::query!(r#"select id as "id: UserId", email from app_user where id = any($1)"#, &ids)
        .fetch_all(db)
        .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.email)).collect())
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
        password::check_length(password)?;
        let email = checked_email(email)?;
        let stored = sqlx::query!(
            "select id, password_hash from app_user where lower(email) = lower($1) and not disabled",
            email
        )
        .fetch_optional(db)
        .await?;
        let stored = stored.and_then(|user| Some((user.id, user.password_hash?)));
        let (id, expected) = stored.map_or((None, NOBODY.to_owned()), |(id, hash)| (Some(id), hash));
        let slot = self.hashing.clone().acquire_owned().await.map_err(|_| Error::Busy("logins"))?;
        let right = verify(password.clone(), expected, slot).await?;
        match id {
            Some(id) if right => find(&mut *db.acquire().await?, id.into()).await?.ok_or(Error::BadLogin),
            _ => Err(Error::BadLogin),
        }
    }

    /// The PHC string of a password that has passed [`password::check`], computed within the same bounds as a login.
    pub async fn hash(&self, password: &Secret) -> Result<String> {
        let _inside = self.inside.try_acquire().map_err(|_| Error::Busy("logins"))?;
        let _slot = self.hashing.acquire().await.map_err(|_| Error::Busy("logins"))?;
        hash(password.clone()).await
    }
}

/// The address without what stands around it, if it may be one.
pub(crate) fn checked_email(email: &str) -> Result<&str> {
    let email = email.trim();
    let parts = email.split_once('@').is_some_and(|(local, domain)| !local.is_empty() && !domain.is_empty());
    if parts && email.len() <= MAX_EMAIL_BYTES && !email.contains(|c: char| c.is_control() || c.is_whitespace()) {
        return Ok(email);
    }
    Err(Error::Invalid(format!("email is not valid: expected name@domain, at most {MAX_EMAIL_BYTES} bytes")))
}

/// The PHC string of a password, computed off the async threads.
pub async fn hash(password: Secret) -> Result<String> {
    password::check_length(&password)?;
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
        let stored = stored.unwrap();
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
        let long = Secret::from("x".repeat(password::MAX_BYTES + 1));
        assert!(matches!(logins.login(db.pool(), "a@b", &long).await, Err(Error::Invalid(_))));
    }
}
