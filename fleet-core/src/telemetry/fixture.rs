//! What tests of readings share.

use sqlx::PgConnection;

use super::{Batch, Limits, Shapes, insert_batch, prepare};
use crate::id::{DeviceKey, TenantKey};
use crate::latest::Tracker;

/// 2026-11-21T02:40:00Z.
pub(crate) const NOW: i64 = 1_795_228_800_000;

/// The limits of `config/muster.toml`, smaller.
pub(crate) const LIMITS: Limits = Limits { max_readings: 50, max_metrics: 20, max_ahead_ms: 300_000 };

/// A device of the tenant.
pub(crate) async fn enrol(db: &mut PgConnection, tenant: TenantKey, id: &str) -> DeviceKey {
    let key = sqlx::query_scalar!(
        "insert into device (tenant_key, id, created_at, updated_at) values ($1, $2, 'epoch', 'epoch') returning key",
        tenant.0,
        id,
    )
    .fetch_one(db)
    .await
    .unwrap();
    DeviceKey(key)
}

/// One writer: what it holds from batch to batch.
pub(crate) struct Writer {
    pub(crate) tenant: TenantKey,
    pub(crate) shapes: Shapes,
    pub(crate) tracker: Tracker,
    pub(crate) batch: Batch,
}

impl Writer {
    pub(crate) fn new(tenant: TenantKey) -> Self {
        Self { tenant, shapes: Shapes::new(100), tracker: Tracker::new(1_000), batch: Batch::new() }
    }

    /// Stores messages of one device as a writer does; returns how many readings were new.
    pub(crate) async fn store(&mut self, db: &mut PgConnection, device: DeviceKey, messages: &[&str], at: i64) -> u64 {
        self.batch.clear();
        for message in messages {
            let rejected = self.batch.push(self.tenant, device, message.as_bytes(), at, &LIMITS);
            assert_eq!(rejected, [], "{message}");
        }
        prepare(db, &mut self.shapes, &mut self.batch).await.unwrap();
        let stored = insert_batch(db, &self.batch).await.unwrap();
        self.tracker.note(&self.batch);
        stored
    }
}
