//! Log levels that end by themselves: a device's `desired.log.level`, set for a while.
//!
//! [`set`] begins or prolongs it, [`end`] ends it at once, [`work`] when its time is up; [`find`] shows it. Holds: what was desired before is desired
//! again afterwards, once, whichever process does it and whatever was killed meanwhile; what somebody else has desired since then stays.
//! Ignorant of: MQTT, HTTP, how devices log.

use chrono::{DateTime, TimeDelta, Utc};
use serde_json::{Value, json};
use sqlx::{PgConnection, PgPool};

use crate::audit::{self, Author, Entry};
use crate::config;
use crate::dispatch::{self, Kind};
use crate::error::{Error, Result};
use crate::id::{DeviceId, DeviceKey, TenantKey};
use crate::level::Level;
use crate::shadow::{self, Change, Document, Shadow};

/// Levels that one call of [`work`] ends.
pub const MAX_WORK: i64 = 100;
/// A level that cannot be put back is tried again so much later.
const RETRY_AFTER: TimeDelta = TimeDelta::minutes(1);

/// A level that ends by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Limited {
    /// The level.
    pub level: Level,
    /// What was desired before; `None`: nothing.
    pub former: Option<Value>,
    /// When that is desired again.
    pub until: DateTime<Utc>,
    /// The id of who set it.
    pub set_by: String,
    /// When.
    pub set_at: DateTime<Utc>,
}

/// What is known of the level at which a device logs.
#[derive(Debug, Clone, PartialEq)]
pub struct LogLevel {
    /// What is desired.
    pub desired: Option<Value>,
    /// What the device says.
    pub reported: Option<Value>,
    /// The level that ends by itself, if one is set.
    pub limited: Option<Limited>,
}

/// The level of a device.
pub async fn find(db: &mut PgConnection, device: DeviceKey) -> Result<LogLevel> {
    let limited = limited(db, device).await?;
    let shadow = shadow::find(db, device).await?;
    Ok(of(&shadow, limited))
}

fn of(shadow: &Shadow, limited: Option<Limited>) -> LogLevel {
    LogLevel { desired: level_in(&shadow.desired), reported: level_in(&shadow.reported), limited }
}

fn level_in(side: &Document) -> Option<Value> {
    side.get("log")?.get("level").cloned()
}

async fn limited(db: &mut PgConnection, device: DeviceKey) -> Result<Option<Limited>> {
    let row =
        sqlx::query!("select level, former, until, set_by, set_at from log_level where device_key = $1", device.0);
    Ok(row.fetch_optional(db).await?.map(|row| Limited {
        level: row.level.parse().unwrap_or_default(),
        former: stored(row.former),
        until: row.until,
        set_by: row.set_by,
        set_at: row.set_at,
    }))
}

/// Any JSON can have been desired.
fn stored(former: Option<String>) -> Option<Value> {
    former.and_then(|json| serde_json::from_str(&json).ok())
}

/// Sets the level until then; what it was before, and what it is. To be called in a transaction.
pub async fn set(
    db: &mut PgConnection,
    device: DeviceKey,
    (level, until): (Level, DateTime<Utc>),
    by: &str,
    settings: &config::Shadow,
    now: DateTime<Utc>,
) -> Result<(LogLevel, LogLevel)> {
    let shadow = shadow::lock(db, device, now).await?;
    let before = of(&shadow, limited(db, device).await?);
    let is_still_ours = |limited: &&Limited| before.desired == Some(json!(limited.level.name()));
    let former = match before.limited.as_ref().filter(is_still_ours) {
        Some(limited) => limited.former.clone(),
        None => before.desired.clone(),
    };
    sqlx::query!(
        "
        insert into log_level (device_key, level, former, until, set_by, set_at) values ($1, $2, $3, $4, $5, $6)
            on conflict (device_key) do update
           set level = excluded.level, former = excluded.former, until = excluded.until, set_by = excluded.set_by,
               set_at = excluded.set_at
        ",
        device.0,
        level.name(),
        former.as_ref().map(Value::to_string),
        until,
        by,
        now
    )
    .execute(&mut *db)
    .await?;
    let patch = json!({ "log": { "level": level.name() } });
    desire(db, device, patch, by, settings, now).await?;
    Ok((before, find(db, device).await?))
}

/// Ends a level before its time: what it was, and what it is; `None` when there is none. To be called in a transaction.
pub async fn end(
    db: &mut PgConnection,
    device: DeviceKey,
    by: &str,
    settings: &config::Shadow,
    now: DateTime<Utc>,
) -> Result<Option<(LogLevel, LogLevel)>> {
    end_from(db, device, None, by, settings, now).await
}

/// With `due`, only if its time is up by then.
async fn end_from(
    db: &mut PgConnection,
    device: DeviceKey,
    due: Option<DateTime<Utc>>,
    by: &str,
    settings: &config::Shadow,
    now: DateTime<Utc>,
) -> Result<Option<(LogLevel, LogLevel)>> {
    // In the order of `set`, so that the two cannot wait for each other.
    let shadow = shadow::lock(db, device, now).await?;
    let before = of(&shadow, limited(db, device).await?);
    let gone = sqlx::query!(
        "delete from log_level where device_key = $1 and ($2::timestamptz is null or until <= $2)",
        device.0,
        due
    );
    if gone.execute(&mut *db).await?.rows_affected() == 0 {
        return Ok(None);
    }
    if let Some(limited) = &before.limited
        && before.desired == Some(json!(limited.level.name()))
    {
        let patch = match &limited.former {
            Some(former) => json!({ "log": { "level": former } }),
            None if shadow.desired.get("log").is_some_and(|log| log.as_object().is_some_and(|log| log.len() == 1)) => {
                json!({ "log": null })
            }
            None => json!({ "log": { "level": null } }),
        };
        desire(db, device, patch, by, settings, now).await?;
    }
    Ok(Some((before, find(db, device).await?)))
}

async fn desire(
    db: &mut PgConnection,
    device: DeviceKey,
    patch: Value,
    by: &str,
    settings: &config::Shadow,
    now: DateTime<Utc>,
) -> Result<()> {
    let change = Change::desired(shadow::document(patch));
    let changed = shadow::change(db, device, &change, by, settings, now).await?;
    if changed.after.version != changed.before.version {
        dispatch::note(db, device, Kind::Shadow).await?;
    }
    Ok(())
}

/// Ends levels whose time is up, a bounded number, each in a transaction of its own; how many. Several processes may do this at once.
pub async fn work(db: &PgPool, settings: &config::Shadow, now: DateTime<Utc>) -> Result<u64> {
    let due = sqlx::query!(
        r#"
        select l.device_key as "device: DeviceKey", d.tenant_key as "tenant: TenantKey", d.id as "id: DeviceId"
          from log_level l join device d on d.key = l.device_key
         where l.until <= $1
         order by l.until
         limit $2
        "#,
        now,
        MAX_WORK
    )
    .fetch_all(db)
    .await?;
    let mut ended = 0;
    for due in due {
        match end_due(db, (due.tenant, due.device, &due.id), settings, now).await {
            Ok(is_ended) => ended += u64::from(is_ended),
            Err(error @ Error::Database(_)) => return Err(error),
            // Whose shadow has no room for what was before must not keep others waiting.
            Err(error) => {
                tracing::warn!(%error, device.id = %due.id, "a log level cannot be put back; it is tried again later");
                put_off(db, due.device, now).await?;
            }
        }
    }
    Ok(ended)
}

async fn end_due(
    db: &PgPool,
    (tenant, device, id): (TenantKey, DeviceKey, &DeviceId),
    settings: &config::Shadow,
    now: DateTime<Utc>,
) -> Result<bool> {
    let mut tx = db.begin().await?;
    let ended = end_from(&mut tx, device, Some(now), "log level", settings, now).await?;
    let Some((before, after)) = ended else { return Ok(false) };
    let entry = Entry::of("log-level.end", id).on(id).before(&told(&before)).after(&told(&after));
    audit::record(&mut tx, &Author::system(tenant, "log level"), &entry, now).await?;
    tx.commit().await?;
    Ok(true)
}

async fn put_off(db: &PgPool, device: DeviceKey, now: DateTime<Utc>) -> Result<()> {
    let until = now + RETRY_AFTER;
    let put_off =
        sqlx::query!("update log_level set until = $2 where device_key = $1 and until <= $3", device.0, until, now);
    put_off.execute(db).await?;
    Ok(())
}

/// What is to be known of a level, for the audit.
pub fn told(level: &LogLevel) -> Value {
    let until = level.limited.as_ref().map(|limited| limited.until.to_rfc3339());
    json!({ "level": level.desired, "until": until })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::from_ms;
    use crate::device::{NewDevice, enrol};
    use crate::testing::TestDb;

    const BOUNDS: config::Shadow =
        config::Shadow { max_bytes: 1000, max_depth: 8, history_versions: 9, request_queue: 1, max_log_level_s: 60 };

    fn noon(seconds: i64) -> DateTime<Utc> {
        from_ms(1_763_722_800_000 + seconds * 1000)
    }

    struct Boiler {
        db: TestDb,
        key: DeviceKey,
    }

    impl Boiler {
        async fn new() -> Self {
            let db = TestDb::new().await;
            let new = NewDevice::named("boiler-1".parse().unwrap());
            let (device, _) = enrol(&mut db.pool().acquire().await.unwrap(), db.tenant(), &new, noon(0)).await.unwrap();
            Self { db, key: device.key }
        }

        async fn set(&self, level: Level, at: i64, for_s: i64) -> LogLevel {
            let mut tx = self.db.pool().begin().await.unwrap();
            let until = noon(at) + TimeDelta::seconds(for_s);
            let (_, after) = set(&mut tx, self.key, (level, until), "usr_1", &BOUNDS, noon(at)).await.unwrap();
            tx.commit().await.unwrap();
            after
        }

        async fn desire(&self, patch: Value) {
            let mut tx = self.db.pool().begin().await.unwrap();
            desire(&mut tx, self.key, patch, "usr_1", &BOUNDS, noon(0)).await.unwrap();
            tx.commit().await.unwrap();
        }

        async fn desired(&self) -> Value {
            let shadow = shadow::find(&mut self.db.pool().acquire().await.unwrap(), self.key).await.unwrap();
            Value::Object(shadow.desired)
        }

        async fn work(&self, at: i64) -> u64 {
            work(self.db.pool(), &BOUNDS, noon(at)).await.unwrap()
        }
    }

    #[tokio::test]
    async fn what_was_desired_before_is_desired_again_afterwards() {
        let boiler = Boiler::new().await;
        for former in [
            json!({}),
            json!({ "log": { "level": "warn" } }),
            json!({ "log": { "level": "warn", "to": "x" } }),
            json!({ "log": { "to": "x" } }),
        ] {
            boiler.desire(json!({ "log": null })).await;
            boiler.desire(former.clone()).await;
            let set = boiler.set(Level::Debug, 0, 10).await;
            assert_eq!(set.desired, Some(json!("debug")));
            assert_eq!(set.limited.unwrap().until, noon(10));
            // Once more, and for longer: what was before stays what it was.
            boiler.set(Level::Trace, 5, 10).await;
            assert_eq!(boiler.work(14).await, 0);
            assert_eq!(boiler.desired().await["log"]["level"], "trace");
            assert_eq!(boiler.work(15).await, 1);
            assert_eq!(boiler.work(15).await, 0, "once");
            assert_eq!(boiler.desired().await, former);
        }
        let audited: Vec<String> = sqlx::query_scalar("select actor_name || ' ' || action from audit order by seq")
            .fetch_all(boiler.db.pool())
            .await
            .unwrap();
        assert_eq!(audited, ["log level log-level.end"; 4]);
    }

    #[tokio::test]
    async fn a_level_that_cannot_be_put_back_is_tried_again_and_keeps_nobody_waiting() {
        let boiler = Boiler::new().await;
        let new = NewDevice::named("boiler-2".parse().unwrap());
        let mut conn = boiler.db.pool().acquire().await.unwrap();
        let (other, _) = enrol(&mut conn, boiler.db.tenant(), &new, noon(0)).await.unwrap();
        boiler.desire(json!({ "log": { "level": "x".repeat(500) } })).await;
        boiler.set(Level::Debug, 0, 10).await;
        boiler.desire(json!({ "note": "x".repeat(800) })).await;
        set(&mut conn, other.key, (Level::Debug, noon(11)), "usr_1", &BOUNDS, noon(0)).await.unwrap();
        assert_eq!(boiler.work(11).await, 1, "the other one, though its time was up later");
        assert_eq!(boiler.desired().await["log"]["level"], "debug");
        assert_eq!(boiler.work(70).await, 0);
        boiler.desire(json!({ "note": null })).await;
        assert_eq!(boiler.work(71).await, 1);
        assert_eq!(boiler.desired().await["log"]["level"], "x".repeat(500));
    }

    #[tokio::test]
    async fn what_somebody_else_has_desired_meanwhile_stays() {
        let boiler = Boiler::new().await;
        boiler.set(Level::Debug, 0, 10).await;
        boiler.desire(json!({ "log": { "level": "error" } })).await;
        assert_eq!(boiler.work(10).await, 1);
        assert_eq!(boiler.desired().await["log"]["level"], "error");
        // And is what comes back when another level is set then.
        boiler.set(Level::Debug, 20, 10).await;
        assert_eq!(boiler.work(30).await, 1);
        assert_eq!(boiler.desired().await["log"]["level"], "error");
    }

    #[tokio::test]
    async fn several_workers_end_a_level_once_and_it_can_be_ended_at_once() {
        let boiler = Boiler::new().await;
        boiler.set(Level::Debug, 0, 10).await;
        let ended = futures::future::join_all((0..4).map(|_| boiler.work(10))).await;
        assert_eq!(ended.iter().sum::<u64>(), 1);
        boiler.set(Level::Debug, 20, 10).await;
        let mut conn = boiler.db.pool().acquire().await.unwrap();
        let (before, after) = end(&mut conn, boiler.key, "usr_1", &BOUNDS, noon(21)).await.unwrap().unwrap();
        assert_eq!((before.desired, after.desired, after.limited), (Some(json!("debug")), None, None));
        assert!(end(&mut conn, boiler.key, "usr_1", &BOUNDS, noon(21)).await.unwrap().is_none());
    }
}
