//! Connecting to PostgreSQL, embedded or given, and bringing its schema up to date.
//!
//! Holds: migrations run forward only and once, however many processes start together; a schema that a newer
//! binary has migrated is refused; no error shows a password.

use std::io;
use std::path::Path;
use std::time::Duration;

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions, Connection, PgConnection, PgPool};
use tokio::time::timeout;
use tracing::warn;

use crate::clock::Clock;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::id::TenantKey;
use crate::postgres::{self, Cluster, OLDEST_VERSION, Tuning};

/// The migrations compiled into this binary.
pub static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

/// How long a given PostgreSQL may take to answer when the server starts.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

/// How long connections in use may hold up a stop.
const CLOSES_WITHIN: Duration = Duration::from_secs(5);

/// Connections of the embedded PostgreSQL beyond those of the pool and the writers: for people and backups.
const SPARE_CONNECTIONS: u32 = 20;

/// The database of a running server, migrated.
#[derive(Debug)]
pub struct Database {
    pool: PgPool,
    options: PgConnectOptions,
    cluster: Option<Cluster>,
}

impl Database {
    /// Connects to `database.url`, or starts the embedded PostgreSQL below `data_dir` when it is empty. Migrates, and
    /// makes the tenant `main` in a fresh database.
    ///
    /// # Errors
    /// [`Error::Postgres`] and [`Error::UnusableDatabase`] say in one line what was expected; and what [`migrate`] refuses.
    pub async fn open(config: &Config, data_dir: &Path, clock: &Clock) -> Result<Self> {
        let (options, cluster) = match config.database.url.expose() {
            "" => {
                let (options, cluster) = embedded(config, data_dir).await?;
                (options, Some(cluster))
            }
            url => (given(url).await?, None),
        };
        let pool = PgPoolOptions::new()
            .max_connections(config.database.max_connections)
            .acquire_timeout(Duration::from_millis(config.database.acquire_timeout_ms))
            // A connection from before a restart of PostgreSQL is noticed here, not by a request.
            .test_before_acquire(true)
            .connect_with(options.clone())
            .await?;
        migrate(&pool).await?;
        first_tenant(&mut *pool.acquire().await?, clock).await?;
        Ok(Self { pool, options, cluster })
    }

    /// Connects to the database of a server that may run or not, for a command beside it. Nothing is migrated.
    ///
    /// # Errors
    /// As [`Database::open`].
    pub async fn attach(config: &Config, data_dir: &Path) -> Result<Self> {
        let running = postgres::running(data_dir).map(|options| options.database("muster"));
        let (options, cluster) = match config.database.url.expose() {
            "" => match running {
                Some(options) if options.connect().await.is_ok() => (options, None),
                _ => {
                    let (options, cluster) = embedded(config, data_dir).await?;
                    (options, Some(cluster))
                }
            },
            url => (given(url).await?, None),
        };
        let pool = PgPoolOptions::new().max_connections(1).connect_with(options.clone()).await?;
        Ok(Self { pool, options, cluster })
    }

    /// Connections for everything but the writers: `database.max_connections` of them.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// How to connect, for what keeps connections of its own.
    pub fn options(&self) -> PgConnectOptions {
        self.options.clone()
    }

    /// The embedded cluster, when there is one.
    pub fn cluster(&self) -> Option<&Cluster> {
        self.cluster.as_ref()
    }

    /// Closes the pool and stops the embedded PostgreSQL. Connections that others keep are cut, as are those of
    /// requests that take too long to end.
    pub async fn close(self) {
        if timeout(CLOSES_WITHIN, self.pool.close()).await.is_err() {
            warn!("connections to the database were still in use when the server stopped");
        }
        if let Some(cluster) = self.cluster {
            cluster.stop().await;
        }
    }
}

async fn embedded(config: &Config, data_dir: &Path) -> Result<(PgConnectOptions, Cluster)> {
    let writers = u32::try_from(config.ingest.writers).unwrap_or(u32::MAX);
    let max_connections = config.database.max_connections.saturating_add(writers).saturating_add(SPARE_CONNECTIONS);
    let tuning = Tuning { max_connections, durable: true };
    let cluster = Cluster::start(data_dir, &config.database.binaries, tuning).await?;
    let options = cluster.options().database("muster");
    let mut conn = cluster.options().connect().await?;
    let exists = sqlx::query_scalar!("select true from pg_database where datname = 'muster'");
    if exists.fetch_optional(&mut conn).await?.is_none() {
        sqlx::query("create database muster").execute(&mut conn).await?;
    }
    conn.close().await?;
    Ok((options, cluster))
}

/// Reads the URL and tries it, so that a wrong one is told at the start and in one line.
async fn given(url: &str) -> Result<PgConnectOptions> {
    let expected = "expected postgres://user:password@host:port/name";
    if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
        return Err(Error::UnusableDatabase(format!("database.url is not valid: {expected}")));
    }
    let options: PgConnectOptions =
        url.parse().map_err(|e| Error::UnusableDatabase(format!("database.url is not valid: {expected} ({e})")))?;
    let tried = timeout(ANSWERS_WITHIN, options.connect()).await;
    let mut conn = match tried {
        Ok(Ok(conn)) => conn,
        Ok(Err(e)) => return Err(Error::UnusableDatabase(unusable(&options, &e))),
        Err(_) => {
            let silent = io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {ANSWERS_WITHIN:?}"));
            return Err(Error::UnusableDatabase(unusable(&options, &sqlx::Error::Io(silent))));
        }
    };
    let version: i32 =
        sqlx::query_scalar("select current_setting('server_version_num')::int4").fetch_one(&mut conn).await?;
    conn.close().await?;
    check_version(version, &options)?;
    Ok(options)
}

fn check_version(version_num: i32, options: &PgConnectOptions) -> Result<()> {
    let major = version_num / 10_000;
    if i64::from(major) < i64::from(OLDEST_VERSION) {
        let place = place(options);
        return Err(Error::UnusableDatabase(format!(
            "the database at {place} is PostgreSQL {major}: expected {OLDEST_VERSION} or newer"
        )));
    }
    Ok(())
}

fn place(options: &PgConnectOptions) -> String {
    match options.get_socket() {
        Some(socket) => socket.display().to_string(),
        None => format!("{}:{}", options.get_host(), options.get_port()),
    }
}

/// Why a given database cannot be used, and what was expected. Shows neither URL nor password.
fn unusable(options: &PgConnectOptions, e: &sqlx::Error) -> String {
    let (place, user) = (place(options), options.get_username());
    let name = options.get_database().unwrap_or(user);
    match e {
        sqlx::Error::Database(refused) => match refused.code().as_deref() {
            Some("28P01" | "28000") => format!(
                "the database at {place} refuses user {user}: expected the right user and password in database.url ({refused})"
            ),
            Some("3D000") => {
                format!(
                    "the server at {place} has no database {name}: create it (createdb {name}) or correct database.url"
                )
            }
            _ => format!("the database at {place} refuses the connection: {refused}"),
        },
        sqlx::Error::Io(e) => format!(
            "the database at {place} cannot be reached ({e}): expected PostgreSQL {OLDEST_VERSION} or newer at the address in database.url"
        ),
        other => format!("the database at {place} cannot be used: {other}"),
    }
}

/// Brings the schema up to date. Processes that start together wait for each other.
///
/// # Errors
/// [`Error::SchemaTooNew`] when a newer binary has migrated the database, [`Error::Migrate`] when a migration fails
/// or one that was applied has been edited since.
pub async fn migrate(pool: &PgPool) -> Result<()> {
    // A connection of its own: a migration that fails leaves the lock to the end of the session.
    let mut conn = pool.acquire().await?.detach();
    let outcome = match MIGRATOR.run(&mut conn).await {
        Err(MigrateError::VersionMissing(version)) => Err(too_new(&mut conn, version).await),
        outcome => outcome.map_err(Error::from),
    };
    conn.close().await?;
    outcome
}

async fn too_new(conn: &mut PgConnection, unknown: i64) -> Error {
    let newest = sqlx::query_scalar("select max(version) from _sqlx_migrations").fetch_one(conn).await;
    let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap_or_default();
    Error::SchemaTooNew { found: newest.unwrap_or(unknown), known }
}

/// The tenant of a fresh database: makes `main` when there is none, and answers the oldest.
pub async fn first_tenant(conn: &mut PgConnection, clock: &Clock) -> Result<TenantKey> {
    sqlx::query!(
        "insert into tenant (id, created_at)
         select 'main', $1 where not exists (select from tenant)
             on conflict on constraint tenant_id_key do nothing",
        clock.now()
    )
    .execute(&mut *conn)
    .await?;
    let key = sqlx::query_scalar!("select key from tenant order by key limit 1").fetch_one(conn).await?;
    Ok(TenantKey(key))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDb;

    #[tokio::test]
    async fn a_schema_from_the_future_is_refused() {
        let db = TestDb::new().await;
        sqlx::query("insert into _sqlx_migrations values (9999, 'from the future', now(), true, '', 0)")
            .execute(db.pool())
            .await
            .unwrap();
        let known = MIGRATOR.iter().map(|migration| migration.version).max().unwrap();
        let refused = migrate(db.pool()).await.unwrap_err();
        assert!(matches!(refused, Error::SchemaTooNew { found: 9999, known: k } if k == known), "{refused:?}");
        // The refusal has left no lock behind.
        sqlx::query("delete from _sqlx_migrations where version = 9999").execute(db.pool()).await.unwrap();
        migrate(db.pool()).await.unwrap();
    }

    #[tokio::test]
    async fn processes_that_start_together_migrate_once_and_make_one_tenant() {
        let db = TestDb::new().await;
        sqlx::raw_sql("drop schema public cascade; create schema public").execute(db.pool()).await.unwrap();
        let start = || async {
            migrate(db.pool()).await.unwrap();
            let mut conn = db.pool().acquire().await.unwrap();
            first_tenant(&mut conn, &Clock::system()).await.unwrap()
        };
        let (one, two, three) = tokio::join!(start(), start(), start());
        assert_eq!([one, two], [three, three]);
        let made = sqlx::query_scalar!("select id from tenant").fetch_all(db.pool()).await.unwrap();
        assert_eq!(made, ["main"]);
    }
}
