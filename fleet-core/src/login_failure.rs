//! Failed logins: whoever guesses waits longer and longer.
//!
//! [`attempt`] counts a try before the password is looked at, so that guesses that are made at once are counted too;
//! [`succeeded`] and [`undo`] take it back. Holds: tries are counted by account and by source address, in the database,
//! for all processes; an account that does not exist is counted like one that does; no wait is longer than
//! `auth.login_longest_wait_s`, and a try while one waits counts for nothing, so nobody is kept out for good. What is
//! remembered is bounded, see [`sweep`]. Tries from this machine itself are not counted by address: it would be that of
//! a proxy. Ignorant of: HTTP, passwords.

use std::net::{IpAddr, Ipv6Addr};

use chrono::{DateTime, TimeDelta, Utc};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::config::Auth;
use crate::error::{Error, Result};
use crate::id::UserId;
use crate::user;

/// Rows one [`sweep`] deletes for each reason.
pub const SWEEP_ROWS: i64 = 100_000;

/// A try that was counted.
#[derive(Debug, Clone)]
#[must_use = "a try that was right, or none, has to be taken back"]
pub struct Attempt {
    counted: Vec<Counted>,
}

#[derive(Debug, Clone)]
struct Counted {
    kind: Kind,
    subject: Vec<u8>,
    blocked_until: DateTime<Utc>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Account,
    Address,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Account => "account",
            Self::Address => "address",
        }
    }

    fn free_tries(self, auth: &Auth) -> i32 {
        let tries = match self {
            Self::Account => auth.login_free_tries,
            Self::Address => auth.login_address_free_tries,
        };
        i32::try_from(tries).unwrap_or(i32::MAX)
    }
}

impl Attempt {
    /// Until when the account waits, if this try brought it to that.
    pub fn locked_until(&self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        let account = self.counted.iter().find(|counted| counted.kind == Kind::Account)?;
        Some(account.blocked_until).filter(|until| *until > now)
    }
}

/// Why an account waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lock {
    /// Tries since the last success.
    pub failures: i32,
    /// The last of them.
    pub tried_at: DateTime<Utc>,
    /// No try is looked at before.
    pub blocked_until: DateTime<Utc>,
}

/// Counts a try as failed, unless account or address have to wait: then [`Error::Locked`] says for how long. To be called
/// in a transaction of its own, which is to be committed before the password is looked at.
pub async fn attempt(
    db: &mut PgConnection,
    email: &str,
    address: Option<IpAddr>,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<Attempt> {
    let email = user::checked_email(email)?;
    let account = Some((Kind::Account, account(email)));
    let address = address.filter(|address| !address.is_loopback()).map(|address| (Kind::Address, network(address)));
    let mut counted = Vec::new();
    // Accounts before addresses, always, so that nobody waits for each other.
    for (kind, subject) in account.into_iter().chain(address) {
        let user = if kind == Kind::Account { Some(email) } else { None };
        let blocked_until = count(db, kind, &subject, user, auth, now).await?;
        counted.push(Counted { kind, subject, blocked_until });
    }
    Ok(Attempt { counted })
}

async fn count(
    db: &mut PgConnection,
    kind: Kind,
    subject: &[u8],
    email: Option<&str>,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<DateTime<Utc>> {
    let forgotten = now - seconds(auth.login_forget_s);
    let counted = sqlx::query_scalar!(
        "
        insert into login_failure as f (kind, subject, user_id, failures, tried_at, blocked_until)
        values ($1, $2, (select id from app_user where lower(email) = lower($3)), 1, $4::timestamptz,
                $4 + make_interval(secs => case when $5 > 1 then 0 else $6::float8 end))
            on conflict (kind, subject) do update
           set user_id = excluded.user_id, tried_at = $4,
               failures = case when f.tried_at <= $8 then 1 else f.failures + 1 end,
               blocked_until = case when f.tried_at <= $8 then excluded.blocked_until
                                    when f.failures + 1 < $5 then $4
                                    else $4 + make_interval(secs => least($7::float8, $6 * power(2, least(f.failures + 1 - $5, 30))))
                               end
         where f.blocked_until <= $4
        returning blocked_until
        ",
        kind.name(),
        subject,
        email,
        now,
        kind.free_tries(auth),
        seconds(auth.login_first_wait_s).as_seconds_f64(),
        seconds(auth.login_longest_wait_s).as_seconds_f64(),
        forgotten
    )
    .fetch_optional(&mut *db)
    .await?;
    if let Some(blocked_until) = counted {
        return Ok(blocked_until);
    }
    let until = sqlx::query_scalar!(
        "select blocked_until from login_failure where kind = $1 and subject = $2",
        kind.name(),
        subject
    )
    .fetch_optional(db)
    .await?;
    let wait_ms = (until.unwrap_or(now) - now).num_milliseconds().unsigned_abs();
    Err(Error::Locked { by: kind.name(), retry_after_s: wait_ms.div_ceil(1000).max(1) })
}

/// The try was right: the account is forgiven, and the address keeps what it had before.
pub async fn succeeded(db: &mut PgConnection, attempt: Attempt, now: DateTime<Utc>) -> Result<()> {
    for counted in attempt.counted {
        match counted.kind {
            Kind::Account => {
                sqlx::query!("delete from login_failure where kind = 'account' and subject = $1", counted.subject)
                    .execute(&mut *db)
                    .await?;
            }
            Kind::Address => take_back(db, &counted, now).await?,
        }
    }
    Ok(())
}

/// The try was none: the password was not looked at, or it was right and something else is wanted besides.
pub async fn undo(db: &mut PgConnection, attempt: Attempt, now: DateTime<Utc>) -> Result<()> {
    for counted in &attempt.counted {
        take_back(db, counted, now).await?;
    }
    Ok(())
}

/// The wait that it brought is lifted, if no other try has brought one since.
async fn take_back(db: &mut PgConnection, counted: &Counted, now: DateTime<Utc>) -> Result<()> {
    sqlx::query!(
        "
        update login_failure
           set failures = greatest(failures - 1, 0),
               blocked_until = case when blocked_until = $3 then least(blocked_until, $4) else blocked_until end
         where kind = $1 and subject = $2
        ",
        counted.kind.name(),
        counted.subject,
        counted.blocked_until,
        now
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The failed logins of a user, if there are any.
pub async fn find(db: &mut PgConnection, user: UserId) -> Result<Option<Lock>> {
    let lock = sqlx::query_as!(
        Lock,
        "
        select failures, tried_at, blocked_until from login_failure
         where user_id = $1 and failures > 0
         order by blocked_until desc
         limit 1
        ",
        user.uuid()
    );
    Ok(lock.fetch_optional(db).await?)
}

/// Forgives a user.
pub async fn forgive(db: &mut PgConnection, user: UserId) -> Result<()> {
    sqlx::query!("delete from login_failure where user_id = $1", user.uuid()).execute(db).await?;
    Ok(())
}

/// Forgets what is older than `auth.login_forget_s`, and the longest silent beyond `auth.max_login_failures`; answers how
/// many of the latter. Between two sweeps there may be more, as many as passwords can be hashed.
pub async fn sweep(db: &mut PgConnection, auth: &Auth, now: DateTime<Utc>) -> Result<u64> {
    sqlx::query!(
        "delete from login_failure
          where (kind, subject) in (select kind, subject from login_failure
                                     where tried_at <= $1 and blocked_until <= $2 limit $3)",
        now - seconds(auth.login_forget_s),
        now,
        SWEEP_ROWS
    )
    .execute(&mut *db)
    .await?;
    let forgotten = sqlx::query!(
        "delete from login_failure
          where (kind, subject) in (select kind, subject from login_failure
                                     order by tried_at desc offset $1 limit $2)",
        i64::try_from(auth.max_login_failures).unwrap_or(i64::MAX),
        SWEEP_ROWS
    );
    Ok(forgotten.execute(db).await?.rows_affected())
}

fn account(email: &str) -> Vec<u8> {
    Sha256::digest(email.to_lowercase()).to_vec()
}

/// An IPv6 client has a whole /64 of addresses to come from.
fn network(address: IpAddr) -> Vec<u8> {
    let network = match address.to_canonical() {
        IpAddr::V4(address) => IpAddr::V4(address),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    };
    Sha256::digest(network.to_string()).to_vec()
}

fn seconds(count: u64) -> TimeDelta {
    // A thousand years will do for ever.
    TimeDelta::seconds(i64::try_from(count.min(31_622_400_000)).unwrap_or(i64::MAX))
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::clock::{Clock, from_ms};
    use crate::config::{Config, Environment};
    use crate::testing::TestDb;
    use crate::user::DEFAULT_ADMIN_EMAIL;

    const NOON: i64 = 1_763_722_800_000;
    const HERE: &str = "192.0.2.1";

    struct Scene {
        db: TestDb,
        auth: Auth,
        now: DateTime<Utc>,
    }

    impl Scene {
        /// Three tries are free, five for an address; then 10 s, up to 60.
        async fn new() -> Self {
            let auth = Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap().auth;
            let auth = Auth { login_free_tries: 3, login_address_free_tries: 5, ..auth };
            let auth = Auth { login_first_wait_s: 10, login_longest_wait_s: 60, login_forget_s: 1000, ..auth };
            let (db, now) = (TestDb::new().await, from_ms(NOON));
            let mut conn = db.pool().acquire().await.unwrap();
            user::ensure_admin(&mut conn, None, None, &Clock::fixed(now)).await.unwrap();
            Self { db, auth, now }
        }

        fn pass(&mut self, seconds: i64) {
            self.now += TimeDelta::seconds(seconds);
        }

        async fn try_once(&self, email: &str, from: Option<&str>) -> Result<Attempt> {
            let mut tx = self.db.pool().begin().await.unwrap();
            let address = from.map(|address| address.parse().unwrap());
            let attempt = attempt(&mut tx, email, address, &self.auth, self.now).await?;
            tx.commit().await.unwrap();
            Ok(attempt)
        }

        /// Fails; answers how long the next try has to wait.
        async fn wait_after(&self, email: &str, from: Option<&str>) -> u64 {
            let _failed = self.try_once(email, from).await.unwrap();
            self.wait(email, from).await
        }

        async fn wait(&self, email: &str, from: Option<&str>) -> u64 {
            match self.try_once(email, from).await {
                Err(Error::Locked { retry_after_s, .. }) => retry_after_s,
                Ok(attempt) => {
                    undo(&mut self.db.pool().acquire().await.unwrap(), attempt, self.now).await.unwrap();
                    0
                }
                Err(error) => panic!("{error}"),
            }
        }

        async fn succeed(&self, email: &str, from: Option<&str>) {
            let attempt = self.try_once(email, from).await.unwrap();
            succeeded(&mut self.db.pool().acquire().await.unwrap(), attempt, self.now).await.unwrap();
        }

        async fn rows(&self) -> i64 {
            let count = sqlx::query_scalar!(r#"select count(*) as "count!" from login_failure"#);
            count.fetch_one(self.db.pool()).await.unwrap()
        }
    }

    #[tokio::test]
    async fn waits_double_up_to_the_longest_for_accounts_that_exist_and_for_others() {
        let mut scene = Scene::new().await;
        for email in [DEFAULT_ADMIN_EMAIL, "nobody@example.com"] {
            for expected in [0, 0, 10, 20, 40, 60, 60] {
                let wait = scene.wait_after(email, None).await;
                assert_eq!(wait, expected, "{email}");
                scene.pass(i64::try_from(wait).unwrap());
            }
            assert_eq!(scene.wait(&email.to_uppercase(), None).await, 0, "the wait is over");
        }
    }

    #[tokio::test]
    async fn a_try_while_one_waits_counts_for_nothing() {
        let mut scene = Scene::new().await;
        for expected in [0, 0, 10] {
            assert_eq!(scene.wait_after("a@b", None).await, expected);
        }
        for _ in 0..5 {
            scene.pass(1);
            assert!(scene.try_once("a@b", Some(HERE)).await.is_err());
        }
        assert_eq!(scene.wait("a@b", None).await, 5);
        assert_eq!(scene.rows().await, 1, "the address was not counted for it either");
    }

    #[tokio::test]
    async fn guesses_made_at_once_are_all_counted() {
        let scene = Scene::new().await;
        let tries = futures::future::join_all((0..20).map(|_| scene.try_once("a@b", Some(HERE)))).await;
        assert_eq!(tries.iter().filter(|attempt| attempt.is_ok()).count(), 3);
        assert_eq!(scene.wait("a@b", None).await, 10);
    }

    #[tokio::test]
    async fn an_address_that_tries_many_accounts_waits_too() {
        let scene = Scene::new().await;
        for account in 0..5 {
            let _failed = scene.try_once(&format!("{account}@b"), Some(HERE)).await.unwrap();
        }
        assert!(matches!(
            scene.try_once("x@b", Some(HERE)).await,
            Err(Error::Locked { by: "address", retry_after_s: 10 })
        ));
        assert_eq!(scene.wait("x@b", Some("192.0.2.2")).await, 0, "others do not");
        // Of IPv6 a client has a whole network.
        for host in 0..5 {
            let _failed = scene.try_once(&format!("{host}@c"), Some(&format!("2001:db8:0:1::{host}"))).await.unwrap();
        }
        assert_eq!(scene.wait("x@b", Some("2001:db8:0:1:9::9")).await, 10);
        assert_eq!(scene.wait("x@b", Some("2001:db8:0:2::1")).await, 0);
        // A proxy on this machine speaks for everybody.
        for account in 0..20 {
            let _failed = scene.try_once(&format!("{account}@d"), Some("127.0.0.1")).await.unwrap();
        }
    }

    #[tokio::test]
    async fn a_login_forgives_the_account_and_not_the_address() {
        let mut scene = Scene::new().await;
        for _ in 0..2 {
            let _failed = scene.try_once("a@b", Some(HERE)).await.unwrap();
        }
        scene.succeed("a@b", Some(HERE)).await;
        assert_eq!(scene.wait_after("a@b", Some(HERE)).await, 0);
        assert_eq!(scene.wait_after("a@b", Some(HERE)).await, 0, "the account has begun anew");
        assert_eq!(scene.wait_after("c@b", Some(HERE)).await, 10, "the fifth failure from there");
        scene.pass(10);
        // Who may log in does not wash the address clean for guesses in between.
        scene.succeed("c@b", Some(HERE)).await;
        assert_eq!(scene.wait_after("d@b", Some(HERE)).await, 20);
    }

    #[tokio::test]
    async fn what_was_no_guess_is_taken_back() {
        let scene = Scene::new().await;
        for _ in 0..20 {
            let attempt = scene.try_once("a@b", Some(HERE)).await.unwrap();
            undo(&mut scene.db.pool().acquire().await.unwrap(), attempt, scene.now).await.unwrap();
        }
        for expected in [0, 0, 10] {
            assert_eq!(scene.wait_after("a@b", Some(HERE)).await, expected);
        }
    }

    #[tokio::test]
    async fn old_failures_are_forgotten_and_an_administrator_forgives() {
        let mut scene = Scene::new().await;
        let user = sqlx::query_scalar!(r#"select id as "id: UserId" from app_user"#);
        let user = user.fetch_one(scene.db.pool()).await.unwrap();
        for _ in 0..2 {
            scene.wait_after(DEFAULT_ADMIN_EMAIL, None).await;
        }
        scene.pass(1000);
        for expected in [0, 0, 10] {
            assert_eq!(scene.wait_after(DEFAULT_ADMIN_EMAIL, None).await, expected);
        }
        let mut conn = scene.db.pool().acquire().await.unwrap();
        let lock = find(&mut conn, user).await.unwrap().unwrap();
        assert_eq!((lock.failures, lock.blocked_until), (3, scene.now + TimeDelta::seconds(10)));
        forgive(&mut conn, user).await.unwrap();
        assert_eq!(find(&mut conn, user).await.unwrap(), None);
        assert_eq!(scene.wait(DEFAULT_ADMIN_EMAIL, None).await, 0);
    }

    #[tokio::test]
    async fn what_is_remembered_is_bounded() {
        let mut scene = Scene::new().await;
        scene.auth.max_login_failures = 4;
        for account in 0..10 {
            scene.pass(1);
            let _failed = scene.try_once(&format!("{account}@b"), None).await.unwrap();
        }
        let mut conn = scene.db.pool().acquire().await.unwrap();
        assert_eq!(sweep(&mut conn, &scene.auth, scene.now).await.unwrap(), 6);
        assert_eq!(scene.rows().await, 4);
        assert_eq!(scene.wait_after("9@b", None).await, 0);
        assert_eq!(scene.wait_after("9@b", None).await, 10, "the newest are remembered");
        scene.pass(1000);
        assert_eq!(sweep(&mut conn, &scene.auth, scene.now).await.unwrap(), 0);
        assert_eq!(scene.rows().await, 0);
    }
}
