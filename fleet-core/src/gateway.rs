//! Gateways: devices that act for others, their children.
//!
//! A device is a child by naming its gateway ([`crate::device`] holds to the rules of that); [`children`] and [`children_of`] tell
//! whom a gateway acts for now, [`check_room`] keeps their number within its bound. Holds: a gateway acts for those of its
//! children that are not disabled, and for nobody else. Ignorant of: MQTT, HTTP, users.

use std::collections::HashMap;
use std::sync::Arc;

use sqlx::PgConnection;

use crate::error::{Error, Result};
use crate::id::{DeviceId, DeviceKey, TenantId, TenantKey};
use crate::topic::DeviceTopic;

/// The devices that a device may act for, by name. Cheap to clone; nearly all devices have none.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Children(Option<Arc<HashMap<DeviceId, DeviceKey>>>);

impl Children {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// The child of that name and its row.
    pub fn get(&self, name: &str) -> Option<(&DeviceId, DeviceKey)> {
        self.0.as_ref()?.get_key_value(name).map(|(id, key)| (id, *key))
    }

    /// The child that a topic of its tenant, or a filter, is about; a filter with a wildcard in the device's place is about none.
    pub fn of_topic(&self, tenant: &TenantId, topics: &str) -> Option<(&DeviceId, DeviceKey)> {
        if self.is_empty() {
            return None;
        }
        let about = DeviceTopic::parse(topics)?;
        if about.tenant == tenant.as_str() { self.get(about.device) } else { None }
    }
}

impl FromIterator<(DeviceId, DeviceKey)> for Children {
    fn from_iter<I: IntoIterator<Item = (DeviceId, DeviceKey)>>(children: I) -> Self {
        let children: HashMap<_, _> = children.into_iter().collect();
        Self((!children.is_empty()).then(|| Arc::new(children)))
    }
}

/// Whom this device may act for.
pub async fn children(db: &mut PgConnection, gateway: DeviceKey) -> Result<Children> {
    Ok(children_of(db, &[gateway]).await?.remove(&gateway).unwrap_or_default())
}

/// Whom each of these devices may act for; those who may for nobody are left out.
pub async fn children_of(db: &mut PgConnection, gateways: &[DeviceKey]) -> Result<HashMap<DeviceKey, Children>> {
    let keys = gateways.iter().map(|key| key.0).collect::<Vec<_>>();
    let rows = sqlx::query!(
        r#"
        select gateway_key as "gateway!: DeviceKey", key as "key: DeviceKey", id as "id: DeviceId"
          from device
         where gateway_key = any($1) and not disabled
        "#,
        &keys
    )
    .fetch_all(db)
    .await?;
    let mut by_gateway: HashMap<_, Vec<_>> = HashMap::new();
    for row in rows {
        by_gateway.entry(row.gateway).or_default().push((row.id, row.key));
    }
    Ok(by_gateway.into_iter().map(|(gateway, children)| (gateway, children.into_iter().collect())).collect())
}

/// Refuses a gateway that has more than `most` children, disabled ones included. To be called in the transaction that gave it
/// one more: that has locked its row.
pub async fn check_room(db: &mut PgConnection, tenant: TenantKey, gateway: &DeviceId, most: usize) -> Result<()> {
    let count = sqlx::query_scalar!(
        r#"
        select count(*) as "count!"
          from device g
          join device d on d.gateway_key = g.key
         where g.tenant_key = $1 and g.id = $2
        "#,
        tenant.0,
        gateway.as_str()
    )
    .fetch_one(db)
    .await?;
    if usize::try_from(count).is_ok_and(|count| count > most) {
        return Err(Error::TooMany { what: "children of this gateway", most });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::from_ms;
    use crate::device::{self, NewDevice, Patch};
    use crate::testing::TestDb;

    const NOON: i64 = 1_763_722_800_000;

    fn id(name: &str) -> DeviceId {
        name.parse().unwrap()
    }

    #[tokio::test]
    async fn a_gateway_acts_for_its_children_that_are_not_disabled() {
        let db = TestDb::new().await;
        let (tenant, now) = (db.tenant(), from_ms(NOON));
        let mut conn = db.pool().acquire().await.unwrap();
        let mut keys = Vec::new();
        for (name, gateway) in [("gw", None), ("a", Some("gw")), ("b", Some("gw")), ("stranger", None)] {
            let new = NewDevice { gateway: gateway.map(id), ..NewDevice::named(id(name)) };
            keys.push(device::enrol(&mut conn, tenant, &new, now).await.unwrap().0.key);
        }
        let family = children(&mut conn, keys[0]).await.unwrap();
        assert_eq!(family.get("a").map(|(_, key)| key), Some(keys[1]));
        assert!(family.get("stranger").is_none() && family.get("gw").is_none());
        let main = "main".parse().unwrap();
        let about = |topics: &str| family.of_topic(&main, topics).map(|(_, key)| key);
        assert_eq!((about("fleet/v1/main/a/x"), about("fleet/v1/main/b/#")), (Some(keys[1]), Some(keys[2])));
        for foreign in
            ["fleet/v1/other/a/x", "fleet/v1/main/+/x", "fleet/v1/main/a", "fleet/v1/main/stranger/x", "app/main/a"]
        {
            assert_eq!(about(foreign), None, "{foreign}");
        }
        assert!(children(&mut conn, keys[1]).await.unwrap().is_empty());
        assert_eq!(children_of(&mut conn, &keys).await.unwrap(), HashMap::from([(keys[0], family)]));

        check_room(&mut conn, tenant, &id("gw"), 2).await.unwrap();
        let crowded = check_room(&mut conn, tenant, &id("gw"), 1).await;
        assert!(matches!(crowded, Err(Error::TooMany { most: 1, .. })), "{crowded:?}");

        let disable = Patch { disabled: Some(true), ..Patch::default() };
        device::update(&mut conn, tenant, &id("a"), &disable, &[], now).await.unwrap();
        let family = children(&mut conn, keys[0]).await.unwrap();
        assert!(family.get("a").is_none() && family.get("b").is_some(), "a disabled child is left out alone");
        let free = Patch { gateway: Some(None), ..Patch::default() };
        device::update(&mut conn, tenant, &id("b"), &free, &[], now).await.unwrap();
        assert!(children(&mut conn, keys[0]).await.unwrap().is_empty());
    }
}
