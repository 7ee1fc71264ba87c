//! Sessions: what outlives an MQTT connection.
//!
//! Called on a connection of [`connect`]. A session enters by [`begin`], comes and goes by [`resume`] and [`leave`], and ends by [`end`] or with its owner. What it
//! wants is kept by [`subscribe`]; what waits for it enters by [`enqueue`], is read by [`page`] and leaves by
//! [`acknowledge`] or [`expire_messages`]. People see them by [`list`] and [`find`].
//! Holds: one session a name. Each change is one statement that may come again with the same outcome (except
//! [`dropped`], which counts), so whoever does not know whether a transaction was committed repeats it. Changes of a
//! session that is gone are skipped, since it may have been deleted with its owner at any moment.
//! Ignorant of: MQTT packets, connections, and what is in memory. One task calls these in the order things happened; the
//! deletion of an owner at the same moment can be a deadlock, which PostgreSQL ends and a repetition heals.

mod message;
mod overview;
mod queue;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use chrono::{DateTime, Utc};
use sqlx::postgres::PgConnectOptions;
use sqlx::types::Json;
use sqlx::{Connection as _, PgConnection};
use uuid::Uuid;

use crate::clock::from_ms;
use crate::gateway;
use crate::id::{ApiKeyId, DeviceId, DeviceKey, SessionId, TenantId, TenantKey, UserId};
use crate::policy::{Grants, Principal, Proof, Who};
use crate::role::Roles;
use crate::standing::{self, Asked, Standing};
use crate::{Error, Result};

pub(crate) use self::message::qos;
pub use self::message::{Message, Properties, ROW_BYTES, Will, row_bytes};
pub use self::overview::{MAX_PAGE, Overview, find, list};
pub use self::queue::{
    Enqueue, Expired, Queued, acknowledge, complete, dropped, enqueue, expire_messages, page, receive, received,
    release,
};

/// The expiry of a session that never ends by itself.
pub const NEVER: u32 = u32::MAX;

/// A session that begins with a connection.
#[derive(Debug, Clone, PartialEq)]
pub struct NewSession {
    /// Names it for good.
    pub id: SessionId,
    /// Names it until it ends: a later session of the same name takes its place.
    pub name: String,
    /// Whose it is; it goes with them.
    pub owner: Principal,
    /// What the client calls itself.
    pub client_id: String,
    /// How long it outlives its connection, in seconds; [`NEVER`] for ever.
    pub expiry_s: u32,
    /// What is published when the connection is lost.
    pub will: Option<Will>,
    /// When it begins, in ms since the epoch.
    pub now_ms: i64,
}

/// A session whose client is back.
#[derive(Debug, Clone, PartialEq)]
pub struct Resume {
    /// Which session.
    pub id: SessionId,
    /// How long it outlives this connection, in seconds.
    pub expiry_s: u32,
    /// What is published when this connection is lost.
    pub will: Option<Will>,
    /// When, in ms since the epoch.
    pub now_ms: i64,
}

/// A session whose connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leave {
    /// Which session.
    pub id: SessionId,
    /// When it ends unless its client is back, in ms since the epoch; `None`: never.
    pub expires_ms: Option<i64>,
    /// How long it outlives its connection, in seconds, by the last word of the client.
    pub expiry_s: u32,
    /// The highest offset that was sent.
    pub sent_to: i64,
    /// Whether its will is still to be published.
    pub keep_will: bool,
    /// When, in ms since the epoch.
    pub now_ms: i64,
}

/// What a session wants to receive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subscription {
    /// The filter, with `$share/{group}/`.
    pub filter: String,
    /// The highest QoS it is sent with.
    pub qos: u8,
    /// Not what its own client sent.
    pub no_local: bool,
    /// With the retain flag as it was sent.
    pub retain_as_published: bool,
    /// The client's number for it.
    pub subscription_id: Option<u32>,
}

/// A session as it was kept.
#[derive(Debug, Clone, PartialEq)]
pub struct Stored {
    /// Names it for good.
    pub id: SessionId,
    /// Names it until it ends.
    pub name: String,
    /// Whose it is; nobody stands at the door, so there is no proof.
    pub owner: Principal,
    /// What the client calls itself.
    pub client_id: String,
    /// How long it outlives its connection, in seconds.
    pub expiry_s: u32,
    /// Whether its client was connected when it was last written.
    pub connected: bool,
    /// When it ends unless its client is back, in ms since the epoch; while connected, or when it never does, `None`.
    pub expires_ms: Option<i64>,
    /// What is yet to be published.
    pub will: Option<Will>,
    /// What it wants, by filter.
    pub subscriptions: Vec<Subscription>,
    /// Messages that wait for it or its acknowledgement.
    pub queued: i64,
    /// What they count, by [`row_bytes`].
    pub queued_bytes: i64,
    /// The highest offset ever given; the next is one more.
    pub last_offset: i64,
    /// The highest offset that was sent before its connection ended.
    pub sent_to: i64,
    /// Messages that found its queue full.
    pub dropped: i64,
}

/// A connection for these functions, and those of [`crate::retained`]. It makes a plan for each call: queues fill and empty
/// within seconds, and a plan that was made for an empty table and kept reads the whole of a full one (measured: 7,000
/// acknowledgements a second where a fresh plan gives 280,000).
pub async fn connect(options: &PgConnectOptions) -> Result<PgConnection> {
    let mut db = PgConnection::connect_with(options).await?;
    sqlx::query!("set plan_cache_mode = force_custom_plan").execute(&mut db).await?;
    Ok(db)
}

/// Keeps sessions that begin. One of the same name, older or earlier among these, ends with all that hangs on it.
pub async fn begin(db: &mut PgConnection, sessions: &[NewSession]) -> Result<()> {
    let sessions = last_of_each(sessions, |new| new.name.as_str());
    if sessions.is_empty() {
        return Ok(());
    }
    let owners = column(&sessions, |new| owner_columns(&new.owner));
    sqlx::query!(
        "
        with gone as (delete from session where name = any($2) returning id),
             messages as (delete from session_message m using gone where m.session_id = gone.id),
             received as (delete from session_received r using gone where r.session_id = gone.id)
      insert into session (id, name, tenant_key, device_key, user_id, api_key_id, client_id, expiry_s, connected, since, will,
                           created_at)
      select n.id, n.name, n.tenant, n.device, n.owner, n.api_key, n.client_id, n.expiry_s, true, n.at, n.will, n.at
        from unnest($1::uuid[], $2::text[], $3::bigint[], $4::bigint[], $5::uuid[], $6::text[], $7::bigint[], $8::jsonb[],
                    $9::timestamptz[], $10::uuid[])
          as n (id, name, tenant, device, owner, client_id, expiry_s, will, at, api_key)
   left join (select key from device where key = any($4) for key share) d on d.key = n.device
   left join (select id from app_user where id = any($5) for key share) u on u.id = n.owner
   left join (select id from api_key where id = any($10) for key share) k on k.id = n.api_key
       where (d.key is not null or u.id is not null) and (n.api_key is null or k.id is not null)
         -- The old ones first: their names are free then.
         and (select count(*) from gone) >= 0
        ",
        &column(&sessions, |new| new.id.uuid()),
        &column(&sessions, |new| new.name.as_str()) as &[&str],
        &column(&sessions, |new| new.owner.tenant.0),
        &column(&owners, |(device, _, _)| *device) as &[Option<i64>],
        &column(&owners, |(_, user, _)| *user) as &[Option<Uuid>],
        &column(&sessions, |new| new.client_id.as_str()) as &[&str],
        &column(&sessions, |new| i64::from(new.expiry_s)),
        &column(&sessions, |new| new.will.as_ref().map(Json)) as &[Option<Json<&Will>>],
        &column(&sessions, |new| from_ms(new.now_ms)),
        &column(&owners, |(_, _, key)| *key) as &[Option<Uuid>],
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Device, user, API key.
fn owner_columns(owner: &Principal) -> (Option<i64>, Option<Uuid>, Option<Uuid>) {
    match &owner.who {
        Who::Device { key, .. } => (Some(key.0), None, None),
        Who::User { id, key, .. } => (None, Some(id.uuid()), key.map(ApiKeyId::uuid)),
        // It never has a session that is kept.
        Who::Claim { .. } => (None, None, None),
    }
}

/// Notes that clients are connected again.
pub async fn resume(db: &mut PgConnection, resumed: &[Resume]) -> Result<()> {
    let resumed = last_of_each(resumed, |resume| resume.id);
    if resumed.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        update session s
           set connected = true, since = r.at, expires_at = null, expiry_s = r.expiry_s, will = r.will
          from unnest($1::uuid[], $2::bigint[], $3::jsonb[], $4::timestamptz[]) as r (id, expiry_s, will, at)
         where s.id = r.id
        ",
        &column(&resumed, |resume| resume.id.uuid()),
        &column(&resumed, |resume| i64::from(resume.expiry_s)),
        &column(&resumed, |resume| resume.will.as_ref().map(Json)) as &[Option<Json<&Will>>],
        &column(&resumed, |resume| from_ms(resume.now_ms)),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Notes that connections ended. The will goes too, unless it is yet to be published.
pub async fn leave(db: &mut PgConnection, left: &[Leave]) -> Result<()> {
    let left = last_of_each(left, |leave| leave.id);
    if left.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        update session s
           set connected = false, since = l.at, expires_at = l.expires, expiry_s = l.expiry_s, sent_to = l.sent_to,
               will = case when l.keep_will then s.will end
          from unnest($1::uuid[], $2::timestamptz[], $3::bigint[], $4::bigint[], $5::boolean[], $6::timestamptz[])
            as l (id, expires, expiry_s, sent_to, keep_will, at)
         where s.id = l.id
        ",
        &column(&left, |leave| leave.id.uuid()),
        &column(&left, |leave| leave.expires_ms.map(from_ms)) as &[Option<DateTime<Utc>>],
        &column(&left, |leave| i64::from(leave.expiry_s)),
        &column(&left, |leave| leave.sent_to),
        &column(&left, |leave| leave.keep_will),
        &column(&left, |leave| from_ms(leave.now_ms)),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Forgets wills, because they were published or never will be.
pub async fn clear_wills(db: &mut PgConnection, sessions: &[SessionId]) -> Result<()> {
    if sessions.is_empty() {
        return Ok(());
    }
    sqlx::query!("update session set will = null where id = any($1) and will is not null", &uuids(sessions))
        .execute(db)
        .await?;
    Ok(())
}

/// Ends sessions with all that hangs on them; also what is left of those that went with their owners.
pub async fn end(db: &mut PgConnection, sessions: &[SessionId]) -> Result<()> {
    if sessions.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        with messages as (delete from session_message where session_id = any($1)),
             received as (delete from session_received where session_id = any($1))
      delete from session where id = any($1)
        ",
        &uuids(sessions),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Keeps subscriptions; one of the same session and filter is replaced.
pub async fn subscribe(db: &mut PgConnection, wanted: &[(SessionId, Subscription)]) -> Result<()> {
    let wanted = last_of_each(wanted, |(session, subscription)| (*session, subscription.filter.as_str()));
    if wanted.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        insert into session_subscription
               (session_id, digest, filter, qos, no_local, retain_as_published, subscription_id)
        select w.session, sha256(convert_to(w.filter, 'UTF8')), w.filter, w.qos, w.no_local, w.retain_as_published, w.number
          from unnest($1::uuid[], $2::text[], $3::smallint[], $4::boolean[], $5::boolean[], $6::integer[])
            as w (session, filter, qos, no_local, retain_as_published, number)
          join (select id from session where id = any($1) for key share) s on s.id = w.session
   on conflict (session_id, digest) do update
           set qos = excluded.qos, no_local = excluded.no_local,
               retain_as_published = excluded.retain_as_published, subscription_id = excluded.subscription_id
        ",
        &column(&wanted, |(session, _)| session.uuid()),
        &column(&wanted, |(_, wanted)| wanted.filter.as_str()) as &[&str],
        &column(&wanted, |(_, wanted)| i16::from(wanted.qos)),
        &column(&wanted, |(_, wanted)| wanted.no_local),
        &column(&wanted, |(_, wanted)| wanted.retain_as_published),
        &column(&wanted, |(_, wanted)| wanted.subscription_id.map(u32::cast_signed)) as &[Option<i32>],
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Forgets subscriptions, by session and filter.
pub async fn unsubscribe(db: &mut PgConnection, unwanted: &[(SessionId, String)]) -> Result<()> {
    if unwanted.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        delete from session_subscription s
         using unnest($1::uuid[], $2::text[]) as u (session, filter)
         where s.session_id = u.session and s.digest = sha256(convert_to(u.filter, 'UTF8'))
        ",
        &column(unwanted, |(session, _)| session.uuid()),
        &column(unwanted, |(_, filter)| filter.as_str()) as &[&str],
    )
    .execute(db)
    .await?;
    Ok(())
}

/// All sessions, in the order of their ids; for the start of the server, before anything else is called. Also removes
/// what sessions that went with their owners have left.
pub async fn load(db: &mut PgConnection, now: DateTime<Utc>) -> Result<Vec<Stored>> {
    queue::sweep(db).await?;
    let mut subscriptions = subscriptions(db).await?;
    let mut sums = queue::sums(db).await?;
    let rows = sqlx::query!(
        r#"
        select s.id as "id: SessionId", s.name, s.tenant_key as "tenant_key: TenantKey", t.id as "tenant_id: TenantId",
               s.device_key as "device_key: DeviceKey", d.id as "device_id?: DeviceId",
               s.user_id as "user_id: UserId", s.api_key_id as "api_key_id: ApiKeyId", s.client_id, s.expiry_s, s.connected, s.expires_at,
               s.will as "will: Json<Will>", s.last_offset, s.sent_to, s.dropped
          from session s
          join tenant t on t.key = s.tenant_key
     left join device d on d.key = s.device_key
      order by s.id
        "#
    )
    .fetch_all(&mut *db)
    .await?;
    let devices = rows.iter().filter_map(|row| row.device_key).collect::<Vec<_>>();
    let families = gateway::children_of(db, &devices).await?;
    let users = rows.iter().filter_map(|row| Some(Asked { user: row.user_id?, key: row.api_key_id, session: None }));
    let users = users.collect::<Vec<_>>();
    let mut standings = standing::of_many(db, &Roles::default(), &users, now).await?.into_iter();
    let mut sessions = Vec::with_capacity(rows.len());
    for row in rows {
        let who = match (row.device_key, row.device_id, row.user_id) {
            (Some(key), Some(id), _) => {
                let children = families.get(&key).cloned().unwrap_or_default();
                Who::Device { key, id, children }
            }
            // Who may not come in has no rights for the time being.
            (_, _, Some(id)) => match standings.next().and_then(Standing::principal) {
                Some(principal) => principal.who,
                None => Who::User { id, key: row.api_key_id, grants: Grants::default(), platform: false },
            },
            _ => return Err(Error::Internal(format!("session {} has no owner", row.id))),
        };
        let (queued, queued_bytes) = sums.remove(&row.id).unwrap_or_default();
        sessions.push(Stored {
            id: row.id,
            name: row.name,
            owner: Principal { tenant: row.tenant_key, tenant_id: row.tenant_id, who, proof: Proof::default() },
            client_id: row.client_id,
            expiry_s: u32::try_from(row.expiry_s).unwrap_or(NEVER),
            connected: row.connected,
            expires_ms: row.expires_at.map(|at| at.timestamp_millis()),
            will: row.will.map(|will| will.0),
            subscriptions: subscriptions.remove(&row.id).unwrap_or_default(),
            queued,
            queued_bytes,
            last_offset: row.last_offset,
            sent_to: row.sent_to,
            dropped: row.dropped,
        });
    }
    Ok(sessions)
}

async fn subscriptions(db: &mut PgConnection) -> Result<HashMap<SessionId, Vec<Subscription>>> {
    let rows = sqlx::query_as!(
        SubscriptionRow,
        r#"
        select session_id as "session_id: SessionId", filter, qos, no_local, retain_as_published, subscription_id
          from session_subscription
      order by session_id, filter collate "C"
        "#
    )
    .fetch_all(db)
    .await?;
    Ok(by_session(rows))
}

async fn subscriptions_of(
    db: &mut PgConnection,
    sessions: &[SessionId],
) -> Result<HashMap<SessionId, Vec<Subscription>>> {
    let rows = sqlx::query_as!(
        SubscriptionRow,
        r#"
        select session_id as "session_id: SessionId", filter, qos, no_local, retain_as_published, subscription_id
          from session_subscription where session_id = any($1)
      order by session_id, filter collate "C"
        "#,
        &uuids(sessions),
    )
    .fetch_all(db)
    .await?;
    Ok(by_session(rows))
}

struct SubscriptionRow {
    session_id: SessionId,
    filter: String,
    qos: i16,
    no_local: bool,
    retain_as_published: bool,
    subscription_id: Option<i32>,
}

fn by_session(rows: Vec<SubscriptionRow>) -> HashMap<SessionId, Vec<Subscription>> {
    let mut all: HashMap<_, Vec<_>> = HashMap::new();
    for row in rows {
        all.entry(row.session_id).or_default().push(Subscription {
            filter: row.filter,
            qos: qos(row.qos),
            no_local: row.no_local,
            retain_as_published: row.retain_as_published,
            subscription_id: row.subscription_id.map(i32::cast_unsigned),
        });
    }
    all
}

/// One column of a batch, as `unnest` takes it.
pub(crate) fn column<'a, T, C>(items: &'a [T], get: impl Fn(&'a T) -> C) -> Vec<C> {
    items.iter().map(get).collect()
}

fn uuids(sessions: &[SessionId]) -> Vec<Uuid> {
    column(sessions, |session| session.uuid())
}

/// Of the items with the same key the last, in their order: a statement writes each row once.
pub(crate) fn last_of_each<'a, T, K: Eq + Hash>(items: &'a [T], key: impl Fn(&'a T) -> K) -> Vec<&'a T> {
    let mut seen = HashSet::with_capacity(items.len());
    let mut last: Vec<_> = items.iter().rev().filter(|item| seen.insert(key(item))).collect();
    last.reverse();
    last
}
