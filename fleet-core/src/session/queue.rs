//! The messages that wait for a session, and those it has sent and not yet released.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use sqlx::types::Json;
use uuid::Uuid;

use super::message::{Message, Properties, ROW_BYTES, qos, row_bytes};
use super::{column, uuids};
use crate::clock::from_ms;
use crate::id::SessionId;
use crate::{Error, Result};

/// A message for a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Enqueue {
    /// Whose queue.
    pub session: SessionId,
    /// Its place there; one that is taken already keeps what it has.
    pub offset: i64,
    /// Which of the messages that come along, counted from 0.
    pub message: usize,
    /// How this session is sent it, whatever the message says.
    pub qos: u8,
    /// The retain flag this session is sent.
    pub retain: bool,
    /// The session's numbers for the subscriptions that match.
    pub subscription_ids: Vec<u32>,
}

/// A message in a queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queued {
    /// Whose queue.
    pub session: SessionId,
    /// Its place there.
    pub offset: i64,
    /// QoS 2: the client has it; only the end of the exchange is open, and payload and properties are gone.
    pub released: bool,
    /// What, with the QoS and the retain flag for this session.
    pub message: Message,
    /// The session's numbers for the subscriptions that matched.
    pub subscription_ids: Vec<u32>,
}

/// What [`expire_messages`] took from one session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expired {
    /// From whose queue; the session may be gone.
    pub session: SessionId,
    /// How many.
    pub messages: i64,
    /// What they counted, by [`row_bytes`].
    pub bytes: i64,
}

/// Keeps messages for sessions, and the highest offsets that were given. Each message goes to the server once.
pub async fn enqueue(db: &mut PgConnection, messages: &[Message], rows: &[Enqueue]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    if let Some(row) = rows.iter().find(|row| row.message >= messages.len()) {
        return Err(Error::Internal(format!("message {} of {} for {}", row.message, messages.len(), row.session)));
    }
    sqlx::query!(
        "
        with raised as (
                 update session s set last_offset = greatest(s.last_offset, r.highest)
                   from (select session, max(msg_offset) as highest
                           from unnest($1::uuid[], $2::bigint[]) as r (session, msg_offset)
                       group by session) r
                  where s.id = r.session
              returning s.id)
      insert into session_message
             (session_id, msg_offset, qos, retain, bytes, subscription_ids, accepted_at, expires_at, topic, payload, properties)
      select r.session, r.msg_offset, r.qos, r.retain, m.bytes, r.subscription_ids::integer[], m.accepted, m.expires,
             m.topic, m.payload, m.properties
        from unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::smallint[], $5::boolean[], $6::text[])
          as r (session, msg_offset, message, qos, retain, subscription_ids)
        join raised on raised.id = r.session
        join unnest($7::text[], $8::bytea[], $9::jsonb[], $10::timestamptz[], $11::timestamptz[], $12::integer[])
             with ordinality as m (topic, payload, properties, accepted, expires, bytes, nth) on m.nth = r.message + 1
 on conflict (session_id, msg_offset) do nothing
        ",
        &column(rows, |row| row.session.uuid()),
        &column(rows, |row| row.offset),
        &column(rows, |row| i64::try_from(row.message).unwrap_or(i64::MAX)),
        &column(rows, |row| i16::from(row.qos)),
        &column(rows, |row| row.retain),
        &column(rows, |row| array_text(&row.subscription_ids)),
        &column(messages, |message| message.topic.as_str()) as &[&str],
        &column(messages, |message| message.payload.as_ref()) as &[&[u8]],
        &column(messages, |message| message.properties.as_ref().map(Json)) as &[Option<Json<&Properties>>],
        &column(messages, |message| from_ms(message.accepted_ms)),
        &column(messages, |message| message.expires_ms.map(from_ms)) as &[Option<DateTime<Utc>>],
        &column(messages, |message| i32::try_from(row_bytes(message)).unwrap_or(i32::MAX)),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// An array as PostgreSQL reads it: arrays of different lengths are no matrix, so they go as text.
fn array_text(numbers: &[u32]) -> String {
    let numbers: Vec<_> = numbers.iter().map(ToString::to_string).collect();
    format!("{{{}}}", numbers.join(","))
}

/// Forgets messages that are acknowledged for good, by session and offset.
pub async fn acknowledge(db: &mut PgConnection, acknowledged: &[(SessionId, i64)]) -> Result<()> {
    if acknowledged.is_empty() {
        return Ok(());
    }
    let (session, offset) = columns(acknowledged);
    sqlx::query!(
        "
        delete from session_message m
         using unnest($1::uuid[], $2::bigint[]) as a (session, msg_offset)
         where m.session_id = a.session and m.msg_offset = a.msg_offset
        ",
        &session,
        &offset,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Notes that clients have QoS 2 messages: what is left of them is their place, until the exchange ends.
pub async fn release(db: &mut PgConnection, released: &[(SessionId, i64)]) -> Result<()> {
    if released.is_empty() {
        return Ok(());
    }
    let (session, offset) = columns(released);
    sqlx::query!(
        "
        update session_message m
           set released = true, payload = '', properties = null, bytes = octet_length(m.topic) + $3
          from unnest($1::uuid[], $2::bigint[]) as r (session, msg_offset)
         where m.session_id = r.session and m.msg_offset = r.msg_offset
        ",
        &session,
        &offset,
        i32::try_from(ROW_BYTES).unwrap_or(i32::MAX),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Notes packet ids of QoS 2 messages that clients have sent, until [`complete`].
pub async fn receive(db: &mut PgConnection, received: &[(SessionId, u16)]) -> Result<()> {
    if received.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        insert into session_received (session_id, packet_id)
        select r.session, r.packet
          from unnest($1::uuid[], $2::integer[]) as r (session, packet)
          join (select id from session where id = any($1) for key share) s on s.id = r.session
   on conflict (session_id, packet_id) do nothing
        ",
        &column(received, |(session, _)| session.uuid()),
        &column(received, |(_, packet)| i32::from(*packet)),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Forgets packet ids: their messages were released.
pub async fn complete(db: &mut PgConnection, completed: &[(SessionId, u16)]) -> Result<()> {
    if completed.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "
        delete from session_received r
         using unnest($1::uuid[], $2::integer[]) as c (session, packet)
         where r.session_id = c.session and r.packet_id = c.packet
        ",
        &column(completed, |(session, _)| session.uuid()),
        &column(completed, |(_, packet)| i32::from(*packet)),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The packet ids some sessions have open, by session and id.
pub async fn received(db: &mut PgConnection, sessions: &[SessionId]) -> Result<Vec<(SessionId, u16)>> {
    if sessions.is_empty() {
        return Ok(Vec::new());
    }
    let rows = sqlx::query!(
        r#"
        select session_id as "session_id: SessionId", packet_id from session_received
         where session_id = any($1) order by session_id, packet_id
        "#,
        &uuids(sessions),
    )
    .fetch_all(db)
    .await?;
    rows.into_iter()
        .map(|row| match u16::try_from(row.packet_id) {
            Ok(packet) => Ok((row.session_id, packet)),
            Err(_) => Err(Error::Internal(format!("session {} has packet id {}", row.session_id, row.packet_id))),
        })
        .collect()
}

/// Counts messages that found the queues of sessions full.
pub async fn dropped(db: &mut PgConnection, dropped: &[(SessionId, i64)]) -> Result<()> {
    if dropped.is_empty() {
        return Ok(());
    }
    let (session, count) = columns(dropped);
    sqlx::query!(
        "
        update session s set dropped = s.dropped + d.count, dropped_at = now()
          from (select session, sum(count)::bigint as count
                  from unnest($1::uuid[], $2::bigint[]) as d (session, count)
              group by session) d
         where s.id = d.session
        ",
        &session,
        &count,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// The next messages of sessions, each after an offset, by session and offset: at most `limit` of each session, and of
/// those as many as count `max_bytes` together, but one at least. Messages that have expired still come.
pub async fn page(
    db: &mut PgConnection,
    wanted: &[(SessionId, i64)],
    limit: i64,
    max_bytes: i64,
) -> Result<Vec<Queued>> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let (session, after) = columns(wanted);
    let rows = sqlx::query!(
        r#"
        select m.session_id as "session_id: SessionId", m.msg_offset, m.released, m.qos, m.retain, m.subscription_ids,
               m.accepted_at, m.expires_at, m.topic, m.payload, m.properties as "properties: Json<Properties>"
          from unnest($1::uuid[], $2::bigint[]) as w (session, after)
          join session s on s.id = w.session
    cross join lateral (
               select q.*, row_number() over next as nth, sum(q.bytes) over next as total
                 from session_message q
                where q.session_id = w.session and q.msg_offset > w.after
               window next as (order by q.msg_offset rows unbounded preceding)
             order by q.msg_offset
                limit $3) m
         where m.nth = 1 or m.total <= $4
      order by m.session_id, m.msg_offset
        "#,
        &session,
        &after,
        limit.max(0),
        max_bytes,
    )
    .fetch_all(db)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Queued {
            session: row.session_id,
            offset: row.msg_offset,
            released: row.released,
            message: Message {
                topic: row.topic,
                payload: row.payload.into(),
                qos: qos(row.qos),
                retain: row.retain,
                properties: row.properties.map(|properties| properties.0),
                accepted_ms: row.accepted_at.timestamp_millis(),
                expires_ms: row.expires_at.map(|at| at.timestamp_millis()),
            },
            subscription_ids: row.subscription_ids.into_iter().map(i32::cast_unsigned).collect(),
        })
        .collect())
}

/// Takes messages whose time has passed, or that were accepted before a time (0: however long ago), from their queues;
/// at most `limit`, so fewer than that means that no more are left. What clients have received already stays, and so
/// does what expires once its delivery has begun (MQTT 5 §3.3.2.3.3). The messages of who is connected are left to the
/// connection, which may be sending them just now.
pub async fn expire_messages(
    db: &mut PgConnection,
    now_ms: i64,
    accepted_before_ms: i64,
    limit: i64,
) -> Result<Vec<Expired>> {
    let expired = sqlx::query_as!(
        Expired,
        r#"
        with due as (
                 (select m.session_id, m.msg_offset
                    from session_message m join session s on s.id = m.session_id and not s.connected
                   where m.expires_at <= $1 and not m.released and m.msg_offset > s.sent_to
                order by m.expires_at limit $3)
                  union
                 (select m.session_id, m.msg_offset
                    from session_message m join session s on s.id = m.session_id and not s.connected
                   where m.accepted_at < $2 and not m.released
                order by m.accepted_at limit $3)
                  limit $3),
             gone as (
                 delete from session_message m using due
                  where m.session_id = due.session_id and m.msg_offset = due.msg_offset
              returning m.session_id, m.bytes)
      select session_id as "session: SessionId", count(*) as "messages!", sum(bytes) as "bytes!"
        from gone group by session_id order by session_id
        "#,
        from_ms(now_ms),
        from_ms(accepted_before_ms.max(0)),
        limit.max(0),
    )
    .fetch_all(db)
    .await?;
    Ok(expired)
}

/// Messages and what they count, of each session that has any.
pub(super) async fn sums(db: &mut PgConnection) -> Result<HashMap<SessionId, (i64, i64)>> {
    let rows = sqlx::query!(
        r#"
        select session_id as "session_id: SessionId", count(*) as "messages!", sum(bytes) as "bytes!"
          from session_message group by session_id
        "#
    )
    .fetch_all(db)
    .await?;
    Ok(rows.into_iter().map(|row| (row.session_id, (row.messages, row.bytes))).collect())
}

/// The same, of some sessions.
pub(super) async fn sums_of(db: &mut PgConnection, sessions: &[SessionId]) -> Result<HashMap<SessionId, (i64, i64)>> {
    let rows = sqlx::query!(
        r#"
        select session_id as "session_id!: SessionId", messages as "messages!", bytes as "bytes!" from session_queue($1)
        "#,
        &uuids(sessions),
    )
    .fetch_all(db)
    .await?;
    Ok(rows.into_iter().map(|row| (row.session_id, (row.messages, row.bytes))).collect())
}

/// Removes what belongs to no session.
pub(super) async fn sweep(db: &mut PgConnection) -> Result<()> {
    sqlx::query!("delete from session_message m where not exists (select from session s where s.id = m.session_id)")
        .execute(&mut *db)
        .await?;
    sqlx::query!("delete from session_received r where not exists (select from session s where s.id = r.session_id)")
        .execute(db)
        .await?;
    Ok(())
}

fn columns(pairs: &[(SessionId, i64)]) -> (Vec<Uuid>, Vec<i64>) {
    pairs.iter().map(|(session, number)| (session.uuid(), *number)).unzip()
}
