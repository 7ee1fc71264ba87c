//! Tenancy: transactions that see one tenant, and of that no more than a scope.
//!
//! Holds: whatever a statement in [`begin`]'s transaction forgets to say, PostgreSQL's row-level security keeps it to the
//! rows within its [`Bounds`] (migration 0011, ADR 8). It is the second line; the first is the predicate in each statement.
//! Ignorant of: HTTP, roles, what is done inside.

use std::time::Duration;

use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, Transaction};

use crate::Result;
use crate::id::{TenantId, TenantKey};

/// The role in the database that is held to the policies.
pub const ROLE: &str = "muster_tenant";

/// PostgreSQL keeps the time in 31 bits.
const MAX_STATEMENT_TIMEOUT_MS: u128 = i32::MAX as u128;

/// A tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its row.
    pub key: TenantKey,
    /// Its name in topics and URLs.
    pub id: TenantId,
}

/// All tenants, the oldest first.
pub async fn all(db: &mut PgConnection) -> Result<Vec<Tenant>> {
    let tenants =
        sqlx::query_as!(Tenant, r#"select key as "key: TenantKey", id as "id: TenantId" from tenant order by key"#);
    Ok(tenants.fetch_all(db).await?)
}

/// What a transaction may see and change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bounds {
    tenant: TenantKey,
    scope: String,
    platform: bool,
}

impl Bounds {
    /// Everything of a tenant.
    pub fn of(tenant: TenantKey) -> Self {
        Self { tenant, scope: String::new(), platform: false }
    }

    /// Only what belongs to devices within a scope, as the SQL function `in_scope` reads it:
    /// `[{"group":"site/line-3","type":"freezer","labels":{"site":"oslo"}}]`, one of which must hold. Empty: everything.
    #[must_use]
    pub fn within(self, scope: impl Into<String>) -> Self {
        Self { scope: scope.into(), ..self }
    }

    /// As well what is above tenants: the tenants themselves, roles of the platform, and who has platform standing.
    #[must_use]
    pub fn above_tenants(self, platform: bool) -> Self {
        Self { platform, ..self }
    }

    /// One text, and so one round trip.
    fn statement(&self, within: Duration) -> String {
        let limit_ms = within.as_millis().min(MAX_STATEMENT_TIMEOUT_MS);
        let (tenant, scope) = (self.tenant.0, quoted(&self.scope));
        let platform = if self.platform { "on" } else { "off" };
        format!(
            "begin; set local statement_timeout = {limit_ms}; set local role {ROLE}; set local muster.tenant = '{tenant}'; \
             set local muster.scope = {scope}; set local muster.platform = '{platform}'"
        )
    }
}

/// A literal that means the same whatever `standard_conforming_strings` is.
fn quoted(text: &str) -> String {
    format!("E'{}'", text.replace('\\', "\\\\").replace('\'', "''"))
}

/// Begins a transaction within these bounds, each statement of which ends after `within`.
pub async fn begin(
    pool: &PgPool,
    bounds: &Bounds,
    within: Duration,
) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    pool.begin_with(AssertSqlSafe(bounds.statement(within))).await
}

#[cfg(test)]
mod tests;
