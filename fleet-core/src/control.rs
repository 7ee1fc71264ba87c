//! Live control: what the doors tell each other about open connections.
//!
//! [`bump`] is called by whatever changes rights, in its own transaction; every broker sees the new [`epoch`] and checks
//! its open connections again.
//! Holds: an epoch follows commit order, so a broker that has seen one sees every change up to it. The NOTIFY on
//! [`CHANNEL`] only wakes earlier than the next poll would; nothing is lost with it.
//! Ignorant of: MQTT, HTTP.

use sqlx::PgConnection;

use crate::Result;

/// Where PostgreSQL wakes those who wait for rows.
pub const CHANNEL: &str = "muster";

/// Says that rights have changed: a device disabled or gone, a credential ended, a user or a role changed. To be called
/// in the transaction that changes them, and last: until it ends, others who change rights wait.
pub async fn bump(db: &mut PgConnection) -> Result<()> {
    sqlx::query!(
        "with raised as (update policy_epoch set epoch = epoch + 1 returning epoch)
         select pg_notify($1, 'policy') from raised",
        CHANNEL
    )
    .execute(db)
    .await?;
    Ok(())
}

/// How often rights have changed.
pub async fn epoch(db: &mut PgConnection) -> Result<i64> {
    Ok(sqlx::query_scalar!("select epoch from policy_epoch").fetch_one(db).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::from_ms;
    use crate::credential;
    use crate::device::{self, NewDevice, Patch};
    use crate::testing::TestDb;

    const NOON: i64 = 1_763_722_800_000;

    #[tokio::test]
    async fn every_change_of_rights_raises_the_epoch_and_no_other() {
        let db = TestDb::new().await;
        let (id, now) = ("boiler-1".parse().unwrap(), from_ms(NOON));
        let mut conn = db.pool().acquire().await.unwrap();
        let mut seen = epoch(&mut conn).await.unwrap();
        let mut rose_by = async |conn: &mut PgConnection| {
            let before = std::mem::replace(&mut seen, epoch(conn).await.unwrap());
            seen - before
        };
        let (_, first) = device::enrol(&mut conn, db.tenant(), &NewDevice::named(id), now).await.unwrap();
        let id = "boiler-1".parse().unwrap();
        assert_eq!(rose_by(&mut conn).await, 0, "nobody can be connected as a new device");
        let patch = Patch { group: Some(Some("site".parse().unwrap())), ..Patch::default() };
        device::update(&mut conn, db.tenant(), &id, &patch, &[], now).await.unwrap();
        assert_eq!(rose_by(&mut conn).await, 0);
        let patch = Patch { disabled: Some(true), ..Patch::default() };
        device::update(&mut conn, db.tenant(), &id, &patch, &[], now).await.unwrap();
        assert_eq!(rose_by(&mut conn).await, 1);
        credential::rotate(&mut conn, db.tenant(), &id, 60, now).await.unwrap();
        assert_eq!(rose_by(&mut conn).await, 1);
        credential::revoke(&mut conn, db.tenant(), &id, first.id, now).await.unwrap();
        assert_eq!(rose_by(&mut conn).await, 1);
        device::delete(&mut conn, db.tenant(), &id, &[], now).await.unwrap();
        assert_eq!(rose_by(&mut conn).await, 1);
    }

    #[tokio::test]
    async fn a_change_that_is_rolled_back_raises_nothing() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let before = epoch(&mut conn).await.unwrap();
        let mut tx = db.pool().begin().await.unwrap();
        bump(&mut tx).await.unwrap();
        tx.rollback().await.unwrap();
        assert_eq!(epoch(&mut conn).await.unwrap(), before);
    }
}
