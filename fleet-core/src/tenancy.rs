//! Tenancy: the tenants, and transactions that see one of them, and of that no more than a scope.
//!
//! [`create`] makes a tenant, [`find`], [`page`] and [`all`] show what there is; [`begin`] binds a transaction, [`enter`] moves
//! one that stands above tenants into another. Holds: whatever a statement in [`begin`]'s transaction forgets to say, PostgreSQL's row-level security keeps it to the
//! rows within its [`Bounds`] (migration 0011, ADR 8). It is the second line; the first is the predicate in each statement.
//! Ignorant of: HTTP, roles, what is done inside.

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::{AssertSqlSafe, PgConnection, PgPool, Postgres, Transaction};

use crate::config::Auth;
use crate::error::{Error, OrOn, Result};
use crate::id::{TenantId, TenantKey};
use crate::role;

/// The role in the database that is held to the policies.
pub const ROLE: &str = "muster_tenant";

/// Most tenants on a page.
pub const MAX_PAGE: usize = 1000;

/// PostgreSQL keeps the time in 31 bits.
const MAX_STATEMENT_TIMEOUT_MS: u128 = i32::MAX as u128;

/// A tenant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its row.
    pub key: TenantKey,
    /// Its name in topics and URLs.
    pub id: TenantId,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// Makes a tenant, which is empty. To be called in a transaction that stands above tenants.
pub async fn create(db: &mut PgConnection, id: &TenantId, auth: &Auth, now: DateTime<Utc>) -> Result<Tenant> {
    role::lock(db, None).await?;
    let count = sqlx::query_scalar!(r#"select count(*) as "count!" from tenant"#).fetch_one(&mut *db).await?;
    if usize::try_from(count).is_ok_and(|count| count >= auth.max_tenants) {
        return Err(Error::TooMany { what: "tenants", most: auth.max_tenants });
    }
    sqlx::query_as!(
        Tenant,
        r#"
        insert into tenant (id, created_at) values ($1, $2)
        returning key as "key: TenantKey", id as "id: TenantId", created_at
        "#,
        id.as_str(),
        now
    )
    .fetch_one(db)
    .await
    .or_on("tenant_id_key", || Error::TenantExists(id.clone()))
}

/// Goes on in another tenant, in a transaction that stands above them.
pub async fn enter(db: &mut PgConnection, tenant: TenantKey) -> Result<()> {
    sqlx::query_scalar!("select set_config('muster.tenant', $1, true)", tenant.0.to_string()).fetch_one(db).await?;
    Ok(())
}

/// Goes on with all of the tenant, in a transaction whose caller was found to reach all that is about to be changed.
pub(crate) async fn widen(db: &mut PgConnection) -> Result<()> {
    sqlx::query_scalar!("select set_config('muster.scope', '', true)").fetch_one(db).await?;
    Ok(())
}

/// The tenant of that name.
pub async fn find(db: &mut PgConnection, id: &TenantId) -> Result<Tenant> {
    let tenant = sqlx::query_as!(
        Tenant,
        r#"select key as "key: TenantKey", id as "id: TenantId", created_at from tenant where id = $1"#,
        id.as_str()
    );
    tenant.fetch_optional(db).await?.ok_or_else(|| Error::NoSuchTenant(id.clone()))
}

/// At most `limit` tenants by name, beginning behind `after`; and where to go on.
pub async fn page(
    db: &mut PgConnection,
    after: Option<&TenantId>,
    limit: usize,
) -> Result<(Vec<Tenant>, Option<TenantId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut tenants = sqlx::query_as!(
        Tenant,
        r#"
        select key as "key: TenantKey", id as "id: TenantId", created_at
          from tenant
         where $1::text is null or id > $1
         order by id
         limit $2
        "#,
        after.map(TenantId::as_str),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(db)
    .await?;
    let more = tenants.len() > limit;
    tenants.truncate(limit);
    let next = tenants.last().filter(|_| more).map(|tenant| tenant.id.clone());
    Ok((tenants, next))
}

/// All tenants, the oldest first.
pub async fn all(db: &mut PgConnection) -> Result<Vec<Tenant>> {
    let tenants = sqlx::query_as!(
        Tenant,
        r#"select key as "key: TenantKey", id as "id: TenantId", created_at from tenant order by key"#
    );
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
