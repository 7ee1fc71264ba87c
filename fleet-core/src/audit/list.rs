//! The audit as people read it: newest first, filtered.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::Row;
use crate::id::{DeviceId, TenantKey};
use crate::{Error, Result};

/// Most rows of one page.
pub const MAX_PAGE: i64 = 1000;

/// Which rows; all that is set must hold.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Done by the actor of this id, or of this name.
    pub actor: Option<String>,
    /// Of this action, or of all that begin with it before a dot: `device` or `device.update`.
    pub action: Option<String>,
    /// Done to a resource of this kind.
    pub resource_kind: Option<String>,
    /// Done to the resource of this id.
    pub resource_id: Option<String>,
    /// About this device.
    pub device: Option<DeviceId>,
    /// From this time on.
    pub from: Option<DateTime<Utc>>,
    /// Before this time.
    pub to: Option<DateTime<Utc>>,
    /// With this text in the name of the actor, the resource, or what it was or became; upper and lower case are the same.
    pub text: Option<String>,
}

/// At most `limit` rows, newest first, beginning behind `before`. To be called in a transaction.
pub async fn page(
    db: &mut PgConnection,
    tenant: TenantKey,
    filter: &Filter,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<Row>> {
    // One plan for all filters would be that of none.
    sqlx::query!("set local plan_cache_mode = force_custom_plan").execute(&mut *db).await?;
    let text = filter.text.as_deref().map(|text| format!("%{}%", escaped(text)));
    let rows = sqlx::query_as!(
        Row,
        r#"
        select t.id as tenant, seq, at, actor_kind, actor_id, actor_name, action, resource_kind, resource_id, device, before,
               after, address, request_id, user_agent, prev_hash as "prev_hash: [u8; 32]", hash as "hash: [u8; 32]"
          from audit a
          join tenant t on t.key = a.tenant_key
         where tenant_key = $1
           and ($2::bigint is null or seq < $2)
           and ($3::text is null or actor_id = $3 or actor_name = $3)
           and ($4::text is null or action = $4 or starts_with(action, $4 || '.'))
           and ($5::text is null or resource_kind = $5)
           and ($6::text is null or resource_id = $6)
           and ($7::text is null or device = $7)
           and ($8::timestamptz is null or at >= $8)
           and ($9::timestamptz is null or at < $9)
           and ($10::text is null or concat_ws(e'\n', actor_name, resource_id, device, before, after) ilike $10)
         order by seq desc
         limit $11
        "#,
        tenant.0,
        before,
        filter.actor.as_deref(),
        filter.action.as_deref(),
        filter.resource_kind.as_deref(),
        filter.resource_id.as_deref(),
        filter.device.as_ref().map(DeviceId::as_str),
        filter.from,
        filter.to,
        text,
        limit.clamp(0, MAX_PAGE + 1),
    )
    .fetch_all(db)
    .await?;
    Ok(rows)
}

/// Letters that mean themselves in a pattern of `like`.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('%', "\\%").replace('_', "\\_")
}

/// The row of that number.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, seq: i64) -> Result<Row> {
    let row = sqlx::query_as!(
        Row,
        r#"
        select t.id as tenant, seq, at, actor_kind, actor_id, actor_name, action, resource_kind, resource_id, device, before,
               after, address, request_id, user_agent, prev_hash as "prev_hash: [u8; 32]", hash as "hash: [u8; 32]"
          from audit a
          join tenant t on t.key = a.tenant_key
         where tenant_key = $1 and seq = $2
        "#,
        tenant.0,
        seq
    )
    .fetch_optional(db)
    .await?;
    row.ok_or(Error::NoSuchAuditEntry(seq))
}
