//! Databases for tests: one private PostgreSQL a run, a template database, a clone a test.
//!
//! `MUSTER_TEST_DATABASE_URL` names the server (`with-postgres` starts one and sets it); without it, each process of
//! tests starts one of its own, which is slower. The template is named by the hash of the migrations and made once; each
//! [`TestDb`] is a clone of it and is dropped with the value.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::Duration;

use sha2::{Digest, Sha256};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, PgConnection, PgPool};
use tokio::sync::OnceCell;

use crate::clock::Clock;
use crate::config::Environment;
use crate::database;
use crate::id::TenantKey;
use crate::postgres::{Cluster, Tuning};

/// What the databases of tests are called: this, the process id, a number.
const PREFIX: &str = "muster_test_";

/// What their temporary directories are called: this and the process id.
const DIR_PREFIX: &str = "muster-test-";

/// Connections of a cluster for tests: enough for every test of a run, each with its pool.
pub const MAX_CONNECTIONS: u32 = 300;

/// Key of the advisory lock under which the template is made; any number will do.
const TEMPLATE_LOCK: i64 = 0x6d75_7374_6572;

/// Connections of one test's pool.
const POOL_SIZE: u32 = 8;

/// A migrated database of one test, holding the tenant `main`. Dropped with the value.
#[derive(Debug)]
pub struct TestDb {
    server: PgConnectOptions,
    name: String,
    pool: PgPool,
    tenant: TenantKey,
}

impl TestDb {
    /// A fresh database.
    ///
    /// # Panics
    /// When there is no PostgreSQL to make it on; the text says why.
    pub async fn new() -> Self {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let server = server().await;
        let template = template(&server).await;
        let name = format!("{PREFIX}{}_{}", process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let mut admin = connect(&server).await;
        run(&mut admin, format!("create database {name} template {template}")).await;
        admin.close().await.expect("closing an idle connection");
        let pool = PgPoolOptions::new()
            .max_connections(POOL_SIZE)
            .acquire_timeout(Duration::from_secs(20))
            .connect_with(server.clone().database(&name))
            .await
            .expect("the test's database was just made");
        let mut conn = pool.acquire().await.expect("the pool is fresh");
        let tenant = database::first_tenant(&mut conn, &Clock::system()).await.expect("the template has a tenant");
        drop(conn);
        Self { server, name, pool, tenant }
    }

    /// Connections to the database.
    pub fn pool(&self) -> &PgPool {
        &self.pool
    }

    /// How to connect to it, for what keeps connections of its own.
    pub fn options(&self) -> PgConnectOptions {
        self.server.clone().database(&self.name)
    }

    /// The tenant `main`.
    pub fn tenant(&self) -> TenantKey {
        self.tenant
    }
}

impl Drop for TestDb {
    /// On a thread with a runtime of its own: the test's may be on its way out.
    fn drop(&mut self) {
        let (server, sql) = (self.server.clone(), format!("drop database if exists {} with (force)", self.name));
        let dropper = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let mut admin = server.connect().await?;
                admin.execute(AssertSqlSafe(sql)).await?;
                admin.close().await
            })
        });
        // What could not be dropped goes when another process makes its first database.
        let _best_effort = dropper.join();
    }
}

async fn server() -> PgConnectOptions {
    let Some(url) = Environment::of_process().test_database_url else {
        return own_cluster().await.options().disable_statement_logging();
    };
    PgConnectOptions::from_str(url.expose())
        .expect("MUSTER_TEST_DATABASE_URL: expected postgres://user@host:port/postgres")
        .disable_statement_logging()
}

/// A cluster of this process, which ends with it; its directory goes when the next process makes one.
async fn own_cluster() -> &'static Cluster {
    static CLUSTER: OnceCell<Cluster> = OnceCell::const_new();
    CLUSTER
        .get_or_init(|| async {
            let dir = private_dir().expect("the directory for temporary files is writable");
            let tuning = Tuning { max_connections: MAX_CONNECTIONS, durable: false };
            Cluster::start(&dir, "auto", tuning).await.unwrap_or_else(|e| panic!("{e}"))
        })
        .await
}

/// A new temporary directory named after this process; those of processes that are gone are removed.
///
/// # Errors
/// When it cannot be made, or this process has made one already.
pub fn private_dir() -> io::Result<PathBuf> {
    let place = std::env::temp_dir();
    for entry in fs::read_dir(&place)?.flatten() {
        if entry.file_name().to_str().is_some_and(|name| is_leftover(name, DIR_PREFIX)) {
            let _somebody_elses = fs::remove_dir_all(entry.path());
        }
    }
    let dir = place.join(format!("{DIR_PREFIX}{}", process::id()));
    DirBuilder::new().mode(0o700).create(&dir)?;
    Ok(dir)
}

async fn connect(options: &PgConnectOptions) -> PgConnection {
    options.connect().await.expect("the test PostgreSQL answers")
}

async fn run(conn: &mut PgConnection, sql: String) {
    let outcome = conn.execute(AssertSqlSafe(sql.clone())).await;
    outcome.unwrap_or_else(|error| panic!("{sql}: {error}"));
}

/// Name of the template, made when it is missing. Processes that find it missing together take turns.
async fn template(server: &PgConnectOptions) -> &'static str {
    static NAME: OnceCell<String> = OnceCell::const_new();
    NAME.get_or_init(|| async {
        let mut admin = connect(server).await;
        lock(&mut admin).await;
        drop_leftovers(&mut admin).await;
        let name = format!("muster_template_{}", migrations_hash());
        if !exists(&mut admin, &name).await {
            make_template(&mut admin, server, &name).await;
        }
        // Ends the session, and so the lock.
        admin.close().await.expect("closing an idle connection");
        name
    })
    .await
}

async fn lock(admin: &mut PgConnection) {
    sqlx::query("select pg_advisory_lock($1)").bind(TEMPLATE_LOCK).execute(admin).await.expect("taking a lock");
}

async fn exists(admin: &mut PgConnection, name: &str) -> bool {
    sqlx::query_scalar("select exists(select from pg_database where datname = $1)")
        .bind(name)
        .fetch_one(admin)
        .await
        .expect("reading the catalogue")
}

/// Made under another name and renamed, so that half a template is never cloned.
async fn make_template(admin: &mut PgConnection, server: &PgConnectOptions, name: &str) {
    let making = format!("{name}_making");
    run(admin, format!("drop database if exists {making} with (force)")).await;
    run(admin, format!("create database {making}")).await;
    let pool = PgPoolOptions::new().max_connections(1).connect_with(server.clone().database(&making)).await;
    let pool = pool.expect("the template was just made");
    database::migrate(&pool).await.expect("the migrations run on an empty database");
    let mut conn = pool.acquire().await.expect("the pool is fresh");
    database::first_tenant(&mut conn, &Clock::system()).await.expect("the schema is there");
    drop(conn);
    pool.close().await;
    run(admin, format!("alter database {making} rename to {name}")).await;
}

/// Drops databases of processes that are gone and could not drop them.
async fn drop_leftovers(admin: &mut PgConnection) {
    let unused: Vec<String> = sqlx::query_scalar(
        "select datname from pg_database
          where starts_with(datname, $1)
            and not exists (select from pg_stat_activity a where a.datname = pg_database.datname)",
    )
    .bind(PREFIX)
    .fetch_all(&mut *admin)
    .await
    .expect("reading the catalogue");
    for name in unused.iter().filter(|name| is_leftover(name, PREFIX)) {
        run(admin, format!("drop database if exists {name}")).await;
    }
}

/// Whether `name` is `prefix`, the id of a process that is gone, and perhaps more after a `_`.
fn is_leftover(name: &str, prefix: &str) -> bool {
    let pid = name.strip_prefix(prefix).and_then(|rest| rest.split('_').next()?.parse::<u32>().ok());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}

fn migrations_hash() -> String {
    let mut hash = Sha256::new();
    for migration in database::MIGRATOR.iter() {
        hash.update(&*migration.checksum);
    }
    let first: [u8; 8] = *hash.finalize().first_chunk().expect("SHA-256 has 32 bytes");
    format!("{:016x}", u64::from_be_bytes(first))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn tenants(db: &TestDb) -> Vec<String> {
        sqlx::query_scalar!("select id from tenant order by key").fetch_all(db.pool()).await.unwrap()
    }

    #[tokio::test]
    async fn each_test_has_a_database_of_its_own() {
        let (one, other) = tokio::join!(TestDb::new(), TestDb::new());
        sqlx::query!("delete from tenant").execute(one.pool()).await.unwrap();
        assert_eq!(tenants(&one).await, [""; 0]);
        assert_eq!(tenants(&other).await, ["main"]);
    }

    #[tokio::test]
    async fn a_database_goes_with_its_test_even_when_it_is_in_use() {
        let db = TestDb::new().await;
        let (server, name) = (db.server.clone(), db.name.clone());
        let held = db.pool().acquire().await.unwrap();
        drop(db);
        assert!(!exists(&mut connect(&server).await, &name).await);
        drop(held);
    }

    #[test]
    fn only_what_a_process_that_is_gone_has_left_is_a_leftover() {
        let gone = 1_u32 << 23;
        assert!(is_leftover(&format!("x{gone}"), "x") && is_leftover(&format!("x{gone}_7"), "x"));
        for kept in [format!("x{}", process::id()), format!("y{gone}"), "x".to_owned(), "x_1".to_owned()] {
            assert!(!is_leftover(&kept, "x"), "{kept}");
        }
    }

    #[tokio::test]
    async fn what_a_killed_test_left_is_dropped() {
        let db = TestDb::new().await;
        let mut admin = connect(&db.server).await;
        // Process ids end at 2^22.
        let left = format!("{PREFIX}{}_0", 1_u32 << 23);
        lock(&mut admin).await;
        run(&mut admin, format!("drop database if exists {left}")).await;
        run(&mut admin, format!("create database {left}")).await;
        drop_leftovers(&mut admin).await;
        assert!(!exists(&mut admin, &left).await);
        assert!(exists(&mut admin, &db.name).await);
    }
}
