//! What is known of devices in memory, so that the MQTT door can tell for each message whether its device is in scope.
//!
//! Holds the devices of those tenants only in which somebody is bound to some of them. Filled by [`Directory::load`], which is
//! called again whenever rights have changed, and by [`Directory::add`] before a device that it does not know is let in. A device
//! that is not in it is in nobody's scope.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::RwLock;
use sqlx::PgConnection;
use sqlx::types::Json;
use tokio::sync::Mutex;

use crate::device::{DeviceType, GroupPath, Labels};
use crate::error::Result;
use crate::id::{DeviceId, DeviceKey, TenantId, TenantKey};
use crate::scope::{Attributes, Extent};
use crate::topic;

/// A tenant in which nobody is bound to some devices any more is forgotten after so long.
const FORGET_AFTER: Duration = Duration::from_mins(1);

/// The devices of some tenants.
#[derive(Debug, Default)]
pub struct Directory {
    tenants: RwLock<HashMap<TenantId, Tenant>>,
    missed: AtomicBool,
    /// One reads at a time: else what is read first could be put in place last.
    reading: Mutex<()>,
}

#[derive(Debug)]
struct Tenant {
    key: TenantKey,
    devices: HashMap<Box<str>, Entry>,
    wanted: Instant,
}

#[derive(Debug)]
struct Entry {
    key: DeviceKey,
    attributes: Attributes,
}

impl Directory {
    /// Whether what happens on a topic of a tenant is in an extent. A topic that is about no device of any tenant is in each.
    pub(crate) fn is_within(&self, extent: &Extent, tenant: &TenantId, name: &str) -> bool {
        if extent.is_everything() {
            return true;
        }
        let Some(below) = name.strip_prefix(topic::ROOT) else { return true };
        let mut levels = below.split('/');
        if levels.next() != Some(tenant.as_str()) {
            return false;
        }
        levels.next().is_some_and(|device| self.contains(extent, tenant, device))
    }

    fn contains(&self, extent: &Extent, tenant: &TenantId, device: &str) -> bool {
        let tenants = self.tenants.read();
        let Some(entry) = tenants.get(tenant).and_then(|tenant| tenant.devices.get(device)) else {
            self.missed.store(true, Ordering::Relaxed);
            return false;
        };
        extent.contains(&entry.attributes)
    }

    /// Whether something was asked about a device that was not in it when it was last loaded: one that came since, perhaps.
    pub fn is_missing_some(&self) -> bool {
        self.missed.load(Ordering::Relaxed)
    }

    /// Whether the devices of a tenant are held.
    pub fn holds(&self, tenant: &TenantId) -> bool {
        self.tenants.read().contains_key(tenant)
    }

    /// Whether a device must be added before it is let in: its tenant's devices are held, and not this one.
    pub fn lacks(&self, tenant: &TenantId, id: &DeviceId, key: DeviceKey) -> bool {
        let tenants = self.tenants.read();
        let tenant = tenants.get(tenant);
        tenant.is_some_and(|tenant| tenant.devices.get(id.as_str()).is_none_or(|entry| entry.key != key))
    }

    /// How many devices are held.
    pub fn count(&self) -> usize {
        self.tenants.read().values().map(|tenant| tenant.devices.len()).sum()
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.tenants.read().is_empty()
    }

    /// Reads all devices of these tenants and of those that are held; forgets a tenant that was not among `wanted` for a minute.
    pub async fn load(&self, db: &mut PgConnection, wanted: &HashSet<TenantKey>) -> Result<()> {
        let _turn = self.reading.lock().await;
        self.missed.store(false, Ordering::Relaxed);
        let now = Instant::now();
        let held = self.tenants.read().values().map(|tenant| (tenant.key, tenant.wanted)).collect::<Vec<_>>();
        let kept = held.into_iter().filter(|(_, at)| now - *at < FORGET_AFTER);
        let mut since = kept.collect::<HashMap<_, _>>();
        since.extend(wanted.iter().map(|tenant| (*tenant, now)));
        let keys = since.keys().map(|tenant| tenant.0).collect::<Vec<_>>();
        let mut loaded = HashMap::new();
        if !keys.is_empty() {
            // A tenant without devices is held too.
            let rows = sqlx::query!(
                r#"
                select t.key as "tenant!: TenantKey", t.id as "tenant_id!: TenantId", d.id as "id?",
                       d.key as "key?: DeviceKey", d.type as "kind?: DeviceType", d.group_path as "group?: GroupPath",
                       d.labels as "labels?: Json<Labels>"
                  from tenant t
                  left join device d on d.tenant_key = t.key
                 where t.key = any($1)
                "#,
                &keys
            );
            for row in rows.fetch_all(db).await? {
                let wanted = since.get(&row.tenant).copied().unwrap_or(now);
                let fresh = || Tenant { key: row.tenant, devices: HashMap::new(), wanted };
                let tenant = loaded.entry(row.tenant_id).or_insert_with(fresh);
                if let (Some(id), Some(key), Some(labels)) = (row.id, row.key, row.labels) {
                    let attributes = Attributes { group: row.group, kind: row.kind, labels: labels.0 };
                    tenant.devices.insert(id.into(), Entry { key, attributes });
                }
            }
        }
        *self.tenants.write() = loaded;
        Ok(())
    }

    /// Reads one device of a tenant whose devices are held.
    pub async fn add(&self, db: &mut PgConnection, tenant: &TenantId, key: DeviceKey) -> Result<()> {
        let _turn = self.reading.lock().await;
        let row = sqlx::query!(
            r#"
            select id, type as "kind: DeviceType", group_path as "group: GroupPath", labels as "labels: Json<Labels>"
              from device
             where key = $1
            "#,
            key.0
        )
        .fetch_optional(db)
        .await?;
        if let (Some(row), Some(tenant)) = (row, self.tenants.write().get_mut(tenant)) {
            let attributes = Attributes { group: row.group, kind: row.kind, labels: row.labels.0 };
            tenant.devices.insert(row.id.into(), Entry { key, attributes });
        }
        Ok(())
    }

    #[cfg(test)]
    pub(crate) fn of(tenant: &TenantId, devices: impl IntoIterator<Item = (String, Attributes)>) -> Self {
        let entry = |(id, attributes): (String, Attributes)| (id.into(), Entry { key: DeviceKey(0), attributes });
        let devices = devices.into_iter().map(entry).collect();
        let held = Tenant { key: TenantKey(1), devices, wanted: Instant::now() };
        Self { tenants: RwLock::new(HashMap::from([(tenant.clone(), held)])), ..Self::default() }
    }
}
