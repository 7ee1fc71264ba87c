//! Logins: what a user's access tokens and refresh token belong to, from the password to the logout.
//!
//! [`begin`] makes one, [`refresh`] renews it, [`end`] and its sisters end it, [`sweep`] forgets what has expired. Holds:
//! an access token is worth nothing without its session; a refresh token works once; one that was used before ends its
//! session, since either the user or a thief shows it (RFC 9700 §4.14.2). For [`Auth::refresh_grace_s`] after it was used,
//! a token is answered with the successor it already has, so that two tabs that refresh at once both stay in. A user has
//! a bounded number of sessions; the one unused for longest makes room. Tokens are never stored, only their SHA-256.
//! Ignorant of: HTTP, cookies, passwords.
//! Why the successor is computed, not drawn: it can be given again without being kept (ADR 9).

use aws_lc_rs::{hmac, rand};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, TimeDelta, Utc};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use subtle::ConstantTimeEq;

use crate::config::{Auth, Secret};
use crate::control;
use crate::error::{Error, Result};
use crate::id::{LoginSessionId, UserId};

/// What every refresh token begins with.
pub const PREFIX: &str = "mr_";
/// Longest user agent that is kept, in characters.
pub const MAX_USER_AGENT_CHARS: usize = 200;
/// Sessions one [`sweep`] deletes.
pub const SWEEP_ROWS: i64 = 10_000;

const SECRET_BYTES: usize = 32;

/// A login that has not ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoginSession {
    /// Names it.
    pub id: LoginSessionId,
    /// Who logged in.
    pub user: UserId,
    /// By what.
    pub method: Method,
    /// From where.
    pub address: Option<String>,
    /// With what program, as that calls itself.
    pub user_agent: Option<String>,
    /// When it began.
    pub created_at: DateTime<Utc>,
    /// When it was last refreshed, or began.
    pub last_used_at: DateTime<Utc>,
    /// It ends then unless it is refreshed before.
    pub expires_at: DateTime<Utc>,
}

/// By what somebody logged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::Type)]
#[sqlx(type_name = "text", rename_all = "lowercase")]
pub enum Method {
    /// E-mail and password.
    Password,
    /// A provider of OpenID Connect.
    Oidc,
}

impl Method {
    /// As it is stored and told.
    pub fn name(self) -> &'static str {
        match self {
            Self::Password => "password",
            Self::Oidc => "oidc",
        }
    }
}

/// Where a login comes from.
#[derive(Debug, Clone, Default)]
pub struct Origin {
    /// The client's address.
    pub address: Option<String>,
    /// What the client calls itself.
    pub user_agent: Option<String>,
}

/// What became of a refresh token that was shown.
#[derive(Debug)]
pub enum Refresh {
    /// The session goes on, with this token from now on.
    Renewed(LoginSession, Secret),
    /// The token had been used before, so its session has ended.
    Stolen(LoginSession),
    /// It is no token of a session that lives.
    Unknown,
}

/// Begins a session of a user who has just proven to be that; answers with its first refresh token. The user's sessions
/// beyond `auth.max_sessions` end, those unused for longest first; their number is told too. To be called in a transaction.
pub async fn begin(
    db: &mut PgConnection,
    user: UserId,
    method: Method,
    from: &Origin,
    auth: &Auth,
    now: DateTime<Utc>,
) -> Result<(LoginSession, Secret, u64)> {
    // Whoever logs in at the same time waits, so that the sessions are counted right.
    sqlx::query!("select id from app_user where id = $1 for update", user.uuid()).fetch_optional(&mut *db).await?;
    let ended = make_room(db, user, auth.max_sessions, now).await?;
    let id = LoginSessionId::new();
    let (family, secret, key) = (random()?, random()?, random()?);
    let ends_at = now + seconds(auth.session_max_s);
    let user_agent = from.user_agent.as_ref().map(|name| printable(name));
    sqlx::query!(
        "
        insert into login_session (id, user_id, method, family_hash, secret_hash, successor_key, rotated_at, address, user_agent,
                                   created_at, last_used_at, expires_at, ends_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $7, $7, $10, $11)
        ",
        id.uuid(),
        user.uuid(),
        method.name(),
        hash(&family),
        hash(&secret),
        &key,
        now,
        from.address,
        user_agent,
        ends_at.min(now + seconds(auth.session_idle_s)),
        ends_at
    )
    .execute(&mut *db)
    .await?;
    let session = find(db, user, id, now).await?.ok_or(Error::NoSuchUser(user))?;
    Ok((session, token(&family, &secret), ended))
}

/// Ends what has expired and what leaves no room for one more; answers how many were still alive.
async fn make_room(db: &mut PgConnection, user: UserId, most: usize, now: DateTime<Utc>) -> Result<u64> {
    let ended = sqlx::query_scalar!(
        r#"
        delete from login_session
         where id in (select id from login_session where user_id = $1
                       order by expires_at > $2 desc, last_used_at desc, id desc offset $3)
        returning expires_at > $2 as "alive!"
        "#,
        user.uuid(),
        now,
        i64::try_from(most.saturating_sub(1)).unwrap_or(i64::MAX)
    )
    .fetch_all(&mut *db)
    .await?;
    let ended = ended.into_iter().filter(|alive| *alive).count() as u64;
    if ended > 0 {
        control::bump(db).await?;
    }
    Ok(ended)
}

/// Takes a refresh token, and gives the next. To be called in a transaction, which is to be committed whatever the answer.
pub async fn refresh(db: &mut PgConnection, shown: &str, auth: &Auth, now: DateTime<Utc>) -> Result<Refresh> {
    let Some((family, secret)) = parse(shown) else { return Ok(Refresh::Unknown) };
    // The hash of what was shown is not for the caller to choose, so a lookup by it tells nothing by its time.
    let kept = sqlx::query!(
        r#"
        select s.id as "id: LoginSessionId", s.user_id as "user: UserId", s.secret_hash, s.previous_hash, s.successor_key,
               s.rotated_at, s.ends_at
          from login_session s
          join app_user u on u.id = s.user_id and not u.disabled
         where s.family_hash = $1 and s.expires_at > $2
           for update of s
        "#,
        hash(&family),
        now
    )
    .fetch_optional(&mut *db)
    .await?;
    let Some(kept) = kept else { return Ok(Refresh::Unknown) };
    let next = successor(&kept.successor_key, &secret);
    let is_current = same(&hash(&secret), &kept.secret_hash);
    if is_current {
        let expires_at = kept.ends_at.min(now + seconds(auth.session_idle_s));
        sqlx::query!(
            "
            update login_session
               set secret_hash = $2, previous_hash = secret_hash, rotated_at = $3, last_used_at = $3, expires_at = $4
             where id = $1
            ",
            kept.id.uuid(),
            hash(&next),
            now,
            expires_at
        )
        .execute(&mut *db)
        .await?;
    }
    let in_grace = kept.previous_hash.is_some_and(|previous| same(&hash(&secret), &previous))
        && now < kept.rotated_at + seconds(auth.refresh_grace_s);
    let session = find(db, kept.user, kept.id, now).await?.ok_or_else(|| Error::Internal("a locked session".into()))?;
    if is_current || in_grace {
        return Ok(Refresh::Renewed(session, token(&family, &next)));
    }
    end(db, kept.user, kept.id).await?;
    Ok(Refresh::Stolen(session))
}

/// The session that a refresh token belongs to, used or not; for who logs out.
pub async fn of_token(db: &mut PgConnection, shown: &str, now: DateTime<Utc>) -> Result<Option<LoginSession>> {
    let Some((family, _)) = parse(shown) else { return Ok(None) };
    let found = sqlx::query!(
        r#"
        select id as "id: LoginSessionId", user_id as "user: UserId" from login_session where family_hash = $1
        "#,
        hash(&family)
    )
    .fetch_optional(&mut *db)
    .await?;
    match found {
        Some(found) => find(db, found.user, found.id, now).await,
        None => Ok(None),
    }
}

/// A session of this user that has not expired.
pub async fn find(
    db: &mut PgConnection,
    user: UserId,
    id: LoginSessionId,
    now: DateTime<Utc>,
) -> Result<Option<LoginSession>> {
    Ok(list(db, user, now).await?.into_iter().find(|session| session.id == id))
}

/// The sessions of a user that have not expired, the last used first; their number is bounded by `auth.max_sessions`.
pub async fn list(db: &mut PgConnection, user: UserId, now: DateTime<Utc>) -> Result<Vec<LoginSession>> {
    let sessions = sqlx::query_as!(
        LoginSession,
        r#"
        select id as "id: LoginSessionId", user_id as "user: UserId", method as "method: Method", address, user_agent,
               created_at, last_used_at, expires_at
          from login_session
         where user_id = $1 and expires_at > $2
         order by last_used_at desc, id desc
        "#,
        user.uuid(),
        now
    )
    .fetch_all(db)
    .await?;
    Ok(sessions)
}

/// Ends a session, its access tokens and the connections that came by them. To be called in a transaction.
pub async fn end(db: &mut PgConnection, user: UserId, id: LoginSessionId) -> Result<()> {
    let ended = sqlx::query!("delete from login_session where id = $1 and user_id = $2", id.uuid(), user.uuid());
    match ended.execute(&mut *db).await?.rows_affected() {
        0 => Err(Error::NoSuchLoginSession(id)),
        _ => control::bump(db).await,
    }
}

/// Ends all sessions of a user but one; answers how many. To be called in a transaction.
pub async fn end_all(db: &mut PgConnection, user: UserId, but: Option<LoginSessionId>) -> Result<u64> {
    let ended = sqlx::query!(
        "delete from login_session where user_id = $1 and ($2::uuid is null or id <> $2)",
        user.uuid(),
        but.map(LoginSessionId::uuid)
    )
    .execute(&mut *db)
    .await?
    .rows_affected();
    if ended > 0 {
        control::bump(db).await?;
    }
    Ok(ended)
}

/// Forgets sessions that have expired, at most [`SWEEP_ROWS`]; answers how many.
pub async fn sweep(db: &mut PgConnection, now: DateTime<Utc>) -> Result<u64> {
    let swept = sqlx::query!(
        "delete from login_session where id in (select id from login_session where expires_at <= $1 limit $2)",
        now,
        SWEEP_ROWS
    );
    Ok(swept.execute(db).await?.rows_affected())
}

fn random() -> Result<[u8; SECRET_BYTES]> {
    let mut bytes = [0; SECRET_BYTES];
    rand::fill(&mut bytes).map_err(|_| Error::Internal("no random numbers".into()))?;
    Ok(bytes)
}

fn hash(secret: &[u8]) -> Vec<u8> {
    Sha256::digest(secret).to_vec()
}

fn same(one: &[u8], other: &[u8]) -> bool {
    one.ct_eq(other).into()
}

fn successor(key: &[u8], secret: &[u8]) -> Vec<u8> {
    hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key), secret).as_ref().to_vec()
}

fn token(family: &[u8], secret: &[u8]) -> Secret {
    Secret::from(format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode([family, secret].concat())))
}

/// The two secrets of a refresh token.
fn parse(token: &str) -> Option<(Vec<u8>, Vec<u8>)> {
    let text = token.strip_prefix(PREFIX).filter(|text| text.len() <= 4 * SECRET_BYTES)?;
    let mut family = URL_SAFE_NO_PAD.decode(text).ok().filter(|bytes| bytes.len() == 2 * SECRET_BYTES)?;
    let secret = family.split_off(SECRET_BYTES);
    Some((family, secret))
}

fn seconds(count: u64) -> TimeDelta {
    // A thousand years will do for ever.
    TimeDelta::seconds(i64::try_from(count.min(31_622_400_000)).unwrap_or(i64::MAX))
}

fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_USER_AGENT_CHARS).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use sqlx::Postgres;
    use sqlx::pool::PoolConnection;

    use super::*;
    use crate::clock::{Clock, from_ms};
    use crate::config::{Config, Environment};
    use crate::testing::TestDb;
    use crate::user;

    const NOON: i64 = 1_763_722_800_000;

    /// One user, and the time.
    struct Scene {
        db: TestDb,
        user: UserId,
        auth: Auth,
        now: DateTime<Utc>,
    }

    impl Scene {
        async fn new() -> Self {
            let (db, now) = (TestDb::new().await, from_ms(NOON));
            let mut conn = db.pool().acquire().await.unwrap();
            user::ensure_admin(&mut conn, None, None, &Clock::fixed(now)).await.unwrap();
            let user = sqlx::query_scalar!(r#"select id as "id: UserId" from app_user"#);
            let user = user.fetch_one(&mut *conn).await.unwrap();
            let auth = Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap().auth;
            Self { db, user, auth, now }
        }

        async fn conn(&self) -> PoolConnection<Postgres> {
            self.db.pool().acquire().await.unwrap()
        }

        fn pass(&mut self, seconds: i64) {
            self.now += TimeDelta::seconds(seconds);
        }

        async fn begin(&self) -> (LoginSession, Secret) {
            let from = Origin { address: Some("192.0.2.1".into()), user_agent: Some("curl/8\u{7}".into()) };
            let mut tx = self.db.pool().begin().await.unwrap();
            let begun = begin(&mut tx, self.user, Method::Password, &from, &self.auth, self.now).await.unwrap();
            tx.commit().await.unwrap();
            (begun.0, begun.1)
        }

        async fn refresh(&self, token: &Secret) -> Refresh {
            let mut tx = self.db.pool().begin().await.unwrap();
            let answer = refresh(&mut tx, token.expose(), &self.auth, self.now).await.unwrap();
            tx.commit().await.unwrap();
            answer
        }

        /// The next token of a session that goes on.
        async fn next(&self, token: &Secret) -> Secret {
            match self.refresh(token).await {
                Refresh::Renewed(_, next) => next,
                other => panic!("expected the session to go on, found {other:?}"),
            }
        }

        async fn alive(&self) -> Vec<LoginSessionId> {
            let alive = list(&mut *self.conn().await, self.user, self.now).await.unwrap();
            alive.into_iter().map(|session| session.id).collect()
        }
    }

    #[tokio::test]
    async fn a_login_goes_on_as_long_as_it_is_used_and_its_end_is_not_reached() {
        let mut scene = Scene::new().await;
        scene.auth = Auth { session_idle_s: 1000, session_max_s: 2500, ..scene.auth };
        let (session, mut token) = scene.begin().await;
        assert_eq!((session.address.as_deref(), session.user_agent.as_deref()), (Some("192.0.2.1"), Some("curl/8")));
        for _ in 0..2 {
            scene.pass(999);
            let next = scene.next(&token).await;
            assert_ne!(std::mem::replace(&mut token, next).expose(), token.expose());
        }
        let listed = list(&mut *scene.conn().await, scene.user, scene.now).await.unwrap();
        assert_eq!(listed[0].expires_at, from_ms(NOON + 2_500_000), "the end is not moved by use");
        scene.pass(502);
        assert!(matches!(scene.refresh(&token).await, Refresh::Unknown));
        assert_eq!(scene.alive().await, []);

        let (_, unused) = scene.begin().await;
        scene.pass(1000);
        assert!(matches!(scene.refresh(&unused).await, Refresh::Unknown), "it was not used for too long");
        assert_eq!(sweep(&mut *scene.conn().await, scene.now).await.unwrap(), 2);
    }

    #[tokio::test]
    async fn a_token_used_twice_ends_the_session_whoever_shows_it() {
        let mut scene = Scene::new().await;
        for shown_again in 0..3 {
            let (session, first) = scene.begin().await;
            let (other, _) = scene.begin().await;
            let mut tokens = vec![first];
            for _ in 0..3 {
                let next = scene.next(tokens.last().unwrap()).await;
                tokens.push(next);
            }
            scene.pass(i64::try_from(scene.auth.refresh_grace_s).unwrap());
            let epoch = || sqlx::query_scalar!("select epoch from policy_epoch").fetch_one(scene.db.pool());
            let before = epoch().await.unwrap();
            match scene.refresh(&tokens[shown_again]).await {
                Refresh::Stolen(ended) => assert_eq!((ended.id, ended.user), (session.id, scene.user)),
                other => panic!("expected the end of the session, found {other:?}"),
            }
            assert_eq!(epoch().await.unwrap(), before + 1, "open connections are looked at again");
            assert!(matches!(scene.refresh(&tokens[3]).await, Refresh::Unknown), "the newest token is worth nothing");
            assert!(scene.alive().await.contains(&other.id), "another login is not touched");
        }
    }

    #[tokio::test]
    async fn tabs_that_refresh_at_once_get_the_same_successor() {
        let mut scene = Scene::new().await;
        let (session, first) = scene.begin().await;
        let (one, two) = tokio::join!(scene.next(&first), scene.next(&first));
        assert_eq!(one.expose(), two.expose());
        scene.pass(9);
        assert_eq!(scene.next(&first).await.expose(), one.expose(), "an answer that was lost is given again");
        let third = scene.next(&one).await;
        // Now the first is two generations old: nobody who waits for an answer would show it.
        assert!(matches!(scene.refresh(&first).await, Refresh::Stolen(ended) if ended.id == session.id));
        assert!(matches!(scene.refresh(&third).await, Refresh::Unknown));

        scene.auth.refresh_grace_s = 0;
        let (_, token) = scene.begin().await;
        scene.next(&token).await;
        assert!(matches!(scene.refresh(&token).await, Refresh::Stolen(_)), "without a grace there is none");
    }

    #[tokio::test]
    async fn what_is_no_token_ends_no_session() {
        let scene = Scene::new().await;
        let (session, token) = scene.begin().await;
        let (_, other) = scene.begin().await;
        let bytes = |token: &Secret| URL_SAFE_NO_PAD.decode(&token.expose()[PREFIX.len()..]).unwrap();
        let (mine, theirs) = (bytes(&token), bytes(&other));
        let unknown_family = super::token(&[7; 32], &mine[32..]);
        let of_another = super::token(&theirs[..32], &mine[32..]);
        let long = Secret::from(format!("{}A", token.expose()));
        for bad in
            [Secret::default(), Secret::from("mr_".to_owned()), Secret::from("mr_\0".to_owned()), unknown_family, long]
        {
            assert!(matches!(scene.refresh(&bad).await, Refresh::Unknown));
        }
        assert_eq!(scene.alive().await.len(), 2);
        // Who holds a right family holds a token of that session.
        assert!(matches!(scene.refresh(&of_another).await, Refresh::Stolen(_)));
        assert_eq!(scene.alive().await, [session.id]);
        let found = of_token(&mut *scene.conn().await, token.expose(), scene.now).await.unwrap();
        assert_eq!(found.map(|found| found.id), Some(session.id));
        sqlx::query!("update app_user set disabled = true").execute(scene.db.pool()).await.unwrap();
        assert!(matches!(scene.refresh(&token).await, Refresh::Unknown), "a disabled user does not refresh");
    }

    #[tokio::test]
    async fn one_session_too_many_ends_the_one_unused_for_longest() {
        let mut scene = Scene::new().await;
        scene.auth.max_sessions = 2;
        let (first, token) = scene.begin().await;
        scene.pass(1);
        let (second, _) = scene.begin().await;
        scene.pass(1);
        scene.next(&token).await;
        scene.pass(1);
        let (third, _) = scene.begin().await;
        assert_eq!(scene.alive().await, [third.id, first.id], "{} was unused for longest", second.id);
        let many = futures::future::join_all((0..5).map(|_| scene.begin())).await;
        assert_eq!((many.len(), scene.alive().await.len()), (5, 2));
    }

    #[tokio::test]
    async fn sessions_are_ended_one_by_one_and_all_but_one() {
        let scene = Scene::new().await;
        let (one, two, three) = (scene.begin().await.0, scene.begin().await.0, scene.begin().await.0);
        let mut conn = scene.conn().await;
        end(&mut conn, scene.user, one.id).await.unwrap();
        assert!(matches!(end(&mut conn, scene.user, one.id).await, Err(Error::NoSuchLoginSession(_))));
        assert!(matches!(end(&mut conn, UserId::new(), two.id).await, Err(Error::NoSuchLoginSession(_))));
        assert_eq!(end_all(&mut conn, scene.user, Some(three.id)).await.unwrap(), 1);
        assert_eq!(scene.alive().await, [three.id]);
        assert_eq!(end_all(&mut conn, scene.user, None).await.unwrap(), 1);
        assert_eq!(end_all(&mut conn, scene.user, None).await.unwrap(), 0);
    }

    proptest! {
        #[test]
        fn a_token_reads_as_it_was_written(family: [u8; 32], secret: [u8; 32]) {
            let token = token(&family, &secret);
            prop_assert_eq!(parse(token.expose()), Some((family.to_vec(), secret.to_vec())));
        }

        #[test]
        fn any_text_may_be_shown(text in ".{0,200}") {
            prop_assert!(parse(&text).is_none());
            parse(&format!("{PREFIX}{text}"));
        }
    }
}
