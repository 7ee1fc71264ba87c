//! Looks up the devices that a query speaks of: one question to the database for all that stands together.

use std::sync::Arc;

use sqlx::{PgConnection, Postgres, QueryBuilder};

use super::{Asked, Query, is_of_device};
use crate::error::Result;
use crate::id::{DeviceKey, TenantKey};
use crate::query::{self, Expression};
use crate::selector::DeviceColumns;

/// Devices, by their keys.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct KeySet(Vec<DeviceKey>);

impl KeySet {
    /// Whether a device is among them.
    pub fn contains(&self, device: DeviceKey) -> bool {
        self.0.binary_search(&device).is_ok()
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In their order.
    pub fn iter(&self) -> impl Iterator<Item = DeviceKey> + '_ {
        self.0.iter().copied()
    }
}

impl FromIterator<DeviceKey> for KeySet {
    fn from_iter<I: IntoIterator<Item = DeviceKey>>(keys: I) -> Self {
        let mut keys = keys.into_iter().collect::<Vec<_>>();
        keys.sort_unstable();
        keys.dedup();
        Self(keys)
    }
}

impl Query {
    /// Looks up which devices of the tenant `read` speaks of, as far as the transaction sees them.
    pub async fn resolve(read: &query::Query, db: &mut PgConnection, tenant: TenantKey) -> Result<Self> {
        let asked = resolve(read.expression(), db, tenant).await?;
        Ok(Self { asked })
    }
}

#[cfg(test)]
impl Query {
    /// One that asks nothing of devices.
    pub(crate) fn of_lines(read: &query::Query) -> Self {
        fn asked(expression: &Expression) -> Asked {
            match expression {
                Expression::All => Asked::All,
                Expression::Not(inner) => Asked::Not(Box::new(asked(inner))),
                Expression::And(all) => Asked::And(all.iter().map(asked).collect()),
                Expression::Or(some) => Asked::Or(some.iter().map(asked).collect()),
                Expression::Term(term) => Asked::Line(term.clone()),
            }
        }
        Self { asked: asked(read.expression()) }
    }
}

/// `NOT` stays outside, so that "all but one" is one device and not all the others.
async fn resolve(expression: &Expression, db: &mut PgConnection, tenant: TenantKey) -> Result<Asked> {
    Ok(match expression {
        Expression::All => Asked::All,
        Expression::Not(inner) => Asked::Not(Box::new(Box::pin(resolve(inner, db, tenant)).await?)),
        Expression::Term(term) if !is_of_device(&term.field) => Asked::Line(term.clone()),
        Expression::Term(_) => devices(expression, db, tenant).await?,
        Expression::And(all) => some(all, Expression::And, Asked::And, db, tenant).await?,
        Expression::Or(all) => some(all, Expression::Or, Asked::Or, db, tenant).await?,
    })
}

/// What of `all` is only about devices is asked at once.
async fn some(
    all: &[Expression],
    joined: fn(Vec<Expression>) -> Expression,
    asked: fn(Vec<Asked>) -> Asked,
    db: &mut PgConnection,
    tenant: TenantKey,
) -> Result<Asked> {
    let (of_devices, others) = all.iter().partition::<Vec<_>, _>(|one| is_about_devices(one));
    let mut each = Vec::with_capacity(others.len() + 1);
    if !of_devices.is_empty() {
        let together = joined(of_devices.into_iter().cloned().collect());
        each.push(devices(&together, db, tenant).await?);
    }
    for other in others {
        each.push(Box::pin(resolve(other, db, tenant)).await?);
    }
    Ok(if each.len() == 1 { each.remove(0) } else { asked(each) })
}

/// A single `NOT` is no good reason to list all others.
fn is_about_devices(expression: &Expression) -> bool {
    fn only(expression: &Expression) -> bool {
        match expression {
            Expression::All => false,
            Expression::Not(inner) => only(inner),
            Expression::And(some) | Expression::Or(some) => some.iter().all(only),
            Expression::Term(term) => is_of_device(&term.field),
        }
    }
    !matches!(expression, Expression::Not(_)) && only(expression)
}

async fn devices(expression: &Expression, db: &mut PgConnection, tenant: TenantKey) -> Result<Asked> {
    let mut sql = QueryBuilder::<Postgres>::new(
        "select d.key from device d left join device_status s on s.device_key = d.key where d.tenant_key = ",
    );
    sql.push_bind(tenant.0).push(" and ");
    expression.push_sql(&DeviceColumns, &mut sql)?;
    let keys = sql.build_query_scalar::<i64>().persistent(false).fetch_all(db).await?;
    Ok(Asked::Devices(Arc::new(keys.into_iter().map(DeviceKey).collect())))
}
