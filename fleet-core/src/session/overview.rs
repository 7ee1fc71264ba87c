//! Sessions as people see them.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::{NEVER, Subscription, queue, subscriptions_of, uuids};
use crate::id::{DeviceId, SessionId, TenantKey};
use crate::{Error, Result};

/// Most sessions of one page.
pub const MAX_PAGE: usize = 200;

/// A session, as its rows tell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Overview {
    /// Names it.
    pub id: SessionId,
    /// What the client calls itself.
    pub client_id: String,
    /// The device it belongs to.
    pub device: Option<DeviceId>,
    /// Or the e-mail address of the user it belongs to.
    pub user: Option<String>,
    /// Whether its client is connected.
    pub connected: bool,
    /// Connected, or away.
    pub since: DateTime<Utc>,
    /// When it ends unless its client is back; while connected, or when it never does, `None`.
    pub expires_at: Option<DateTime<Utc>>,
    /// How long it outlives its connection, in seconds; `None`: for ever.
    pub expiry_s: Option<u32>,
    /// What it wants, by filter.
    pub subscriptions: Vec<Subscription>,
    /// Messages that wait for it or its acknowledgement.
    pub queued: i64,
    /// What they count, by [`super::row_bytes`].
    pub queued_bytes: i64,
    /// Messages that found its queue full.
    pub dropped: i64,
    /// The last time one did.
    pub dropped_at: Option<DateTime<Utc>>,
    /// When it began.
    pub created_at: DateTime<Utc>,
}

/// At most `limit` (itself at most [`MAX_PAGE`]) sessions of a tenant, or of one of its devices, oldest first; `after` goes on
/// behind the last one of a page. To be called in a transaction.
pub async fn list(
    db: &mut PgConnection,
    tenant: TenantKey,
    device: Option<&DeviceId>,
    after: Option<SessionId>,
    limit: usize,
) -> Result<Vec<Overview>> {
    let limit = i64::try_from(limit.min(MAX_PAGE)).unwrap_or_default();
    // Tables that are empty at one moment are full at the next: no plan is worth keeping (see `connect`).
    sqlx::query!("set local plan_cache_mode = force_custom_plan").execute(&mut *db).await?;
    let ids = sqlx::query_scalar!(
        r#"
        select id as "id: SessionId" from session
         where tenant_key = $1
           and ($2::text is null or device_key = (select key from device where tenant_key = $1 and id = $2))
           and ($3::uuid is null or id > $3)
      order by id
         limit $4
        "#,
        tenant.0,
        device.map(DeviceId::as_str),
        after.map(SessionId::uuid),
        limit,
    )
    .fetch_all(&mut *db)
    .await?;
    read(db, tenant, &ids).await
}

/// The session of that id, if it is of the tenant. To be called in a transaction.
pub async fn find(db: &mut PgConnection, tenant: TenantKey, id: SessionId) -> Result<Overview> {
    sqlx::query!("set local plan_cache_mode = force_custom_plan").execute(&mut *db).await?;
    read(db, tenant, &[id]).await?.pop().ok_or(Error::NoSuchSession(id))
}

async fn read(db: &mut PgConnection, tenant: TenantKey, ids: &[SessionId]) -> Result<Vec<Overview>> {
    let mut subscriptions = subscriptions_of(db, ids).await?;
    let mut sums = queue::sums_of(db, ids).await?;
    let rows = sqlx::query!(
        r#"
        select s.id as "id: SessionId", s.client_id, d.id as "device?: DeviceId", u.email as "user?", s.connected, s.since,
               s.expires_at, s.expiry_s, s.dropped, s.dropped_at, s.created_at
          from session s
     left join device d on d.key = s.device_key
     left join app_user u on u.id = s.user_id
         where s.tenant_key = $1 and s.id = any($2)
      order by s.id
        "#,
        tenant.0,
        &uuids(ids),
    )
    .fetch_all(db)
    .await?;
    let overviews = rows.into_iter().map(|row| {
        let (queued, queued_bytes) = sums.remove(&row.id).unwrap_or_default();
        Overview {
            subscriptions: subscriptions.remove(&row.id).unwrap_or_default(),
            queued,
            queued_bytes,
            id: row.id,
            client_id: row.client_id,
            device: row.device,
            user: row.user,
            connected: row.connected,
            since: row.since,
            expires_at: row.expires_at,
            expiry_s: u32::try_from(row.expiry_s).ok().filter(|expiry_s| *expiry_s != NEVER),
            dropped: row.dropped,
            dropped_at: row.dropped_at,
            created_at: row.created_at,
        }
    });
    Ok(overviews.collect())
}
