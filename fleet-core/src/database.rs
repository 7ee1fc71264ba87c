//! Connecting to PostgreSQL, embedded or given, and bringing its schema up to date.
//!
//! Holds: migrations run forward only and once, however many processes start together; a schema that a newer
//! binary has migrated is refused.

use sqlx::migrate::{MigrateError, Migrator};
use sqlx::{Connection, PgConnection, PgPool};

use crate::clock::Clock;
use crate::error::{Error, Result};
use crate::id::TenantKey;

/// The migrations compiled into this binary.
pub static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

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
        let known = i64::try_from(MIGRATOR.iter().count()).unwrap();
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
