//! Versions of firmware, and since when there are devices with them.
//!
//! [`crate::status::record`] keeps what devices say, [`first_seen`] tells since when. Holds: the time of a version is that of the first device that
//! said it, and never changes; a tenant's devices fill at most [`MAX_VERSIONS`] rows, and what finds no room is counted. Ignorant of: what a
//! version is for, releases.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use crate::Result;
use crate::id::{DeviceKey, TenantKey};

/// Most versions of a tenant whose time is kept; whoever makes up new ones all the time fills no disk.
pub const MAX_VERSIONS: i64 = 10_000;

/// Devices said, each at its time, that they run these. In the order of versions, so that two who do this wait for each other in turn.
/// Of a tenant that has `most` versions already no more are kept: how many were left out comes back.
pub(crate) async fn note(
    db: &mut PgConnection,
    devices: &[DeviceKey],
    versions: &[&str],
    at: &[DateTime<Utc>],
    most: i64,
) -> Result<u64> {
    if devices.is_empty() {
        return Ok(0);
    }
    let left_out = sqlx::query_scalar!(
        r#"
          with new as (
        select d.tenant_key, said.version, min(said.at) as first_at
          from unnest($1::bigint[], $2::text[], $3::timestamptz[]) as said (device, version, at)
          join device d on d.key = said.device
         where not exists (select from firmware_seen known
                            where known.tenant_key = d.tenant_key and known.version = said.version)
      group by d.tenant_key, said.version),
               room as (
        select t.tenant_key, $4 - (select count(*) from firmware_seen known where known.tenant_key = t.tenant_key) as rows
          from (select distinct tenant_key from new) t),
               placed as (
        select new.*, row_number() over (partition by tenant_key order by new.first_at, new.version) <= room.rows as fits
          from new
          join room using (tenant_key)),
               kept as (
        insert into firmware_seen (tenant_key, version, first_at)
        select tenant_key, version, first_at from placed where fits order by tenant_key, version
   on conflict do nothing)
        select count(*) as "count!" from placed where not fits
        "#,
        devices as &[DeviceKey],
        versions as &[&str],
        at,
        most,
    );
    Ok(left_out.fetch_one(db).await?.unsigned_abs())
}

/// When a device of the tenant first said this version, however it was written (`v2.0` is `2.0.0`).
pub async fn first_seen(db: &mut PgConnection, tenant: TenantKey, version: &str) -> Result<Option<DateTime<Utc>>> {
    let first = sqlx::query_scalar!(
        "
        select min(first_at) from firmware_seen
         where tenant_key = $1 and (version = $2 or version_rank(version) = version_rank($2))
        ",
        tenant.0,
        version
    );
    Ok(first.fetch_one(db).await?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::from_ms;
    use crate::status::{self, Cause, Change, State};
    use crate::telemetry::fixture::{NOW, enrol};
    use crate::testing::TestDb;

    fn birth(device: DeviceKey, at_ms: i64, firmware: &str) -> Change {
        let firmware = Some(firmware.to_owned());
        let cause =
            Cause::Reported { state: Some(State::Online), boot_id: None, firmware, until_ms: None, reason: None };
        Change { device, at_ms, cause }
    }

    #[tokio::test]
    async fn a_version_is_there_since_the_first_device_said_so() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let one = enrol(&mut conn, db.tenant(), "pump-1").await;
        let two = enrol(&mut conn, db.tenant(), "pump-2").await;
        status::record(&mut conn, &[birth(one, NOW, "1.0"), birth(two, NOW + 1, "odd")]).await.unwrap();
        status::record(&mut conn, &[birth(one, NOW + 5, "v2.0"), birth(two, NOW + 7, "2.0.0")]).await.unwrap();
        status::record(&mut conn, &[birth(two, NOW + 9, "v2.0")]).await.unwrap();
        status::record(&mut conn, &[birth(DeviceKey(two.0 + 9), NOW, "3.0")]).await.unwrap();
        for (version, since) in
            [("1.0.0", Some(NOW)), ("2", Some(NOW + 5)), ("odd", Some(NOW + 1)), ("3.0", None), ("even", None)]
        {
            assert_eq!(first_seen(&mut conn, db.tenant(), version).await.unwrap(), since.map(from_ms), "{version}");
        }
        let other = TenantKey(db.tenant().0 + 1);
        assert_eq!(first_seen(&mut conn, other, "1.0").await.unwrap(), None);
    }

    #[tokio::test]
    async fn versions_that_are_made_up_fill_no_disk() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let device = enrol(&mut conn, db.tenant(), "pump-1").await;
        sqlx::query("insert into firmware_seen select $1, 'x' || n, now() from generate_series(1, $2) n")
            .bind(db.tenant().0)
            .bind(MAX_VERSIONS)
            .execute(&mut *conn)
            .await
            .unwrap();
        assert_eq!(status::record(&mut conn, &[birth(device, NOW, "y")]).await.unwrap(), 1);
        assert_eq!(first_seen(&mut conn, db.tenant(), "y").await.unwrap(), None);
        // What is known is not left out.
        assert_eq!(status::record(&mut conn, &[birth(device, NOW, "x1")]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn the_first_versions_are_kept_and_the_others_counted() {
        let db = TestDb::new().await;
        let mut conn = db.pool().acquire().await.unwrap();
        let device = enrol(&mut conn, db.tenant(), "pump-1").await;
        let mut note = async |versions: &[&str]| {
            let at = (0_i64..).zip(versions).map(|(nth, _)| from_ms(NOW + nth)).collect::<Vec<_>>();
            note(&mut conn, &vec![device; versions.len()], versions, &at, 3).await.unwrap()
        };
        assert_eq!(note(&["3.0"]).await, 0);
        assert_eq!(
            note(&["9.0", "5.0", "4.0", "1.0", "9.0", "3.0"]).await,
            2,
            "one message has no more room than many"
        );
        assert_eq!(note(&["9.0", "5.0", "3.0"]).await, 0);
        assert_eq!(note(&["4.0"]).await, 1);
        let kept: Vec<String> = sqlx::query_scalar("select version from firmware_seen order by version")
            .fetch_all(&mut *conn)
            .await
            .unwrap();
        assert_eq!(kept, ["3.0", "5.0", "9.0"]);
    }
}
