//! Questions to all live brokers, and their answers.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use tokio::time::{Instant, sleep};
use uuid::Uuid;

use super::{CHANNEL, LEASE_S};
use crate::id::{ClaimId, ConnectionId, DeviceId, SessionId, TenantId, TenantKey, UserId};
use crate::{Error, Result};

/// Longest question, in bytes of JSON.
pub const MAX_REQUEST_BYTES: usize = 16 * 1024;
/// Longest answer of one broker, in bytes of JSON; instead of a longer one it says [`Answer::TooLong`].
pub const MAX_ANSWER_BYTES: usize = 4 * 1024 * 1024;
/// Questions that wait for answers at once, of all who ask.
pub const MAX_PENDING: i64 = 100;
/// Most connections or lines of one page.
pub const MAX_PAGE: usize = 1_000;

/// First pause before looking for answers; doubled up to [`LOOK_AT_MOST`].
const LOOK_FIRST: Duration = Duration::from_millis(5);
/// Longest pause.
const LOOK_AT_MOST: Duration = Duration::from_millis(50);
/// A question outlives the wait for its answers by that, in seconds: clocks are not compared, but nothing stays.
const EXPIRE_AFTER_S: f64 = 10.0;

/// What may be asked of the brokers. Everything is about one tenant: what belongs to another is not there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "ask", rename_all = "kebab-case")]
pub enum Request {
    /// Connections in the order of their ids.
    Connections {
        /// Whose.
        tenant: TenantKey,
        /// Which of them.
        filter: Filter,
        /// Beginning behind this one.
        after: Option<ConnectionId>,
        /// At most so many of each broker, itself at most [`MAX_PAGE`].
        limit: usize,
    },
    /// One connection.
    Connection {
        /// Whose.
        tenant: TenantKey,
        /// Which.
        id: ConnectionId,
    },
    /// End a connection, and perhaps its session.
    Disconnect {
        /// Whose.
        tenant: TenantKey,
        /// Which.
        id: ConnectionId,
        /// What the client is told.
        reason: String,
        /// Whether its session ends too.
        end_session: bool,
        /// Who wants it.
        by: UserId,
    },
    /// Write down what a client sends and is sent.
    TraceStart {
        /// Whose.
        tenant: TenantKey,
        /// The connection it was asked for.
        id: ConnectionId,
        /// The session of that connection: the trace goes on when the client comes again.
        session: String,
        /// For how long.
        minutes: u16,
        /// Who wants it.
        by: UserId,
    },
    /// End a trace and forget its lines.
    TraceStop {
        /// Whose.
        tenant: TenantKey,
        /// A connection of its client.
        id: ConnectionId,
    },
    /// Lines of a trace.
    Trace {
        /// Whose.
        tenant: TenantKey,
        /// A connection of its client.
        id: ConnectionId,
        /// Beginning behind this line.
        after: i64,
        /// At most so many, itself at most [`MAX_PAGE`].
        limit: usize,
    },
    /// Tell a client that asks by a claim what has become of its request.
    Tell {
        /// Whose.
        tenant: TenantId,
        /// What the client calls itself.
        asker: String,
        /// What it is told.
        message: Value,
    },
    /// Forget the retained messages of topics that begin so; their rows are deleted by whoever asks.
    ForgetRetained {
        /// `fleet/v1/{tenant}/{device}/`
        below: String,
    },
    /// End a durable session, connected or not.
    EndSession {
        /// Whose.
        tenant: TenantKey,
        /// Which.
        id: SessionId,
        /// Who wants it.
        by: UserId,
    },
}

/// Which connections; all that is set must hold.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Of this device.
    pub device: Option<DeviceId>,
    /// With this client id.
    pub client_id: Option<String>,
    /// Carried by this.
    pub transport: Option<Transport>,
}

impl Filter {
    /// Whether it lets a connection through.
    pub fn takes(&self, owner: &Owner, client_id: &str, transport: Transport) -> bool {
        let device = |wanted: &DeviceId| matches!(owner, Owner::Device(id) if id == wanted);
        self.device.as_ref().is_none_or(device)
            && self.client_id.as_ref().is_none_or(|wanted| wanted == client_id)
            && self.transport.is_none_or(|wanted| wanted == transport)
    }
}

/// What carries a client's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// A plain socket.
    Tcp,
    /// TLS over a socket.
    Tls,
    /// WebSocket, on the HTTP port.
    WebSocket,
}

/// Whose connection it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// A device.
    Device(DeviceId),
    /// A user, or a program of one.
    User(UserId),
    /// Whoever asks by a claim.
    Claim(ClaimId),
}

/// An open connection, as its broker sees it at the moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    /// Names it; a client that comes again gets a new one.
    pub id: ConnectionId,
    /// The session it holds; the same when the client comes again.
    pub session: String,
    /// The client's id.
    pub client_id: String,
    /// Whose it is.
    pub owner: Owner,
    /// Since when, in ms since the epoch.
    pub since_ms: i64,
    /// Where it comes from.
    pub address: SocketAddr,
    /// What carries it.
    pub transport: Transport,
    /// 4: MQTT 3.1.1, 5: MQTT 5.
    pub protocol: u8,
    /// Seconds it may be silent; `None`: for ever.
    pub keep_alive_s: Option<u16>,
    /// Seconds its session outlives it; 0: not at all, `u32::MAX`: for ever.
    pub session_expiry_s: u32,
    /// Messages that wait for it.
    pub queued_messages: u64,
    /// What these take, in bytes.
    pub queued_bytes: u64,
    /// Messages it was sent and has not acknowledged.
    pub in_flight: u64,
    /// Messages it published.
    pub messages_in: u64,
    /// Messages it was sent.
    pub messages_out: u64,
    /// Bytes received.
    pub bytes_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// Filters it subscribes to.
    pub subscriptions: u64,
    /// Whether it connects too often.
    pub flapping: bool,
    /// Whether what it sends and is sent is written down.
    pub traced: bool,
}

/// A packet, as a line of text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceLine {
    /// Counts up; the line's place.
    pub seq: i64,
    /// When, in ms since the epoch.
    pub at_ms: i64,
    /// Who sent it.
    pub direction: Direction,
    /// The packet.
    pub text: String,
}

/// Who sent what a line of a trace tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The client.
    In,
    /// The broker.
    Out,
    /// Nobody: something happened to the connection.
    Note,
}

/// What a broker has of a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TraceLines {
    /// Lines, oldest first.
    pub lines: Vec<TraceLine>,
    /// Lines that had to make room for newer ones.
    pub dropped: u64,
    /// When it ends, or ended, in ms since the epoch.
    pub ends_ms: i64,
}

/// What a broker says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// Its connections.
    Connections(Vec<Connection>),
    /// The connection.
    Connection(Box<Connection>),
    /// It was done.
    Done,
    /// The lines.
    Trace(TraceLines),
    /// What was asked for is not here.
    NotHere,
    /// It may not be, because of a bound; which.
    Refused(String),
    /// The answer would be longer than [`MAX_ANSWER_BYTES`].
    TooLong,
    /// The question is not known: this broker is of another version.
    Unknown,
}

/// A question, as a broker finds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// Names it.
    pub id: Uuid,
    /// What is asked; `None` when a newer version asks.
    pub request: Option<Request>,
}

/// What the brokers said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answers {
    /// One for each broker that answered.
    pub given: Vec<Answer>,
    /// Live brokers that did not.
    pub missing: Vec<Uuid>,
}

/// Asks all live brokers, and waits until each has answered, at most `within`. Takes the pool, so that no connection is
/// held while it waits.
///
/// # Errors
/// [`Error::NoBroker`] when there is none, or none answered; [`Error::Busy`] when [`MAX_PENDING`] questions wait.
pub async fn ask(db: &PgPool, request: &Request, within: Duration) -> Result<Answers> {
    let deadline = Instant::now() + within;
    let body = serde_json::to_value(request).map_err(|e| Error::Internal(format!("writing a question: {e}")))?;
    if body.to_string().len() > MAX_REQUEST_BYTES {
        return Err(Error::Invalid(format!("too long: expected at most {MAX_REQUEST_BYTES} bytes")));
    }
    let id = Uuid::now_v7();
    let mut missing = put(db, id, &body, within).await?;
    let mut given = Vec::new();
    let mut pause = LOOK_FIRST;
    while !missing.is_empty() && Instant::now() < deadline {
        sleep(pause.min(deadline.saturating_duration_since(Instant::now()))).await;
        pause = (pause * 2).min(LOOK_AT_MOST);
        for (broker, answer) in answers(&mut *db.acquire().await?, id, &missing).await? {
            missing.retain(|waited_for| *waited_for != broker);
            given.push(answer);
        }
    }
    sqlx::query!("delete from control_request where id = $1", id).execute(db).await?;
    if given.is_empty() { Err(Error::NoBroker("no broker answered in time")) } else { Ok(Answers { given, missing }) }
}

/// Leaves the question; the brokers that are alive.
async fn put(db: &PgPool, id: Uuid, body: &Value, within: Duration) -> Result<Vec<Uuid>> {
    let mut db = db.acquire().await?;
    let live = sqlx::query_scalar!(
        "select id from broker_node where heartbeat_at > now() - make_interval(secs => $1)",
        LEASE_S
    )
    .fetch_all(&mut *db)
    .await?;
    if live.is_empty() {
        return Err(Error::NoBroker("no broker is running"));
    }
    let left = sqlx::query!(
        r#"
        with asked as (
            insert into control_request (id, request, asked_at, expires_at)
            select $1, $2, now(), now() + make_interval(secs => $3)
             where (select count(*) from control_request where expires_at > now()) < $4
         returning id)
        select pg_notify($5, '')::text as "notified" from asked
        "#,
        id,
        body,
        within.as_secs_f64() + EXPIRE_AFTER_S,
        MAX_PENDING,
        CHANNEL
    )
    .fetch_optional(&mut *db)
    .await?;
    if left.is_some() { Ok(live) } else { Err(Error::Busy("questions to the brokers")) }
}

/// The answers of these brokers, as far as they are there.
async fn answers(db: &mut PgConnection, id: Uuid, of: &[Uuid]) -> Result<Vec<(Uuid, Answer)>> {
    let rows = sqlx::query!(
        r#"select broker_id, answer as "answer: Value" from control_answer where request_id = $1 and broker_id = any($2)"#,
        id,
        of
    )
    .fetch_all(db)
    .await?;
    let read = |answer| serde_json::from_value(answer).unwrap_or(Answer::Unknown);
    Ok(rows.into_iter().map(|row| (row.broker_id, read(row.answer))).collect())
}

/// Leaves the answers of `broker`, in one statement. A question that nobody waits for any more is no error, and to
/// answer again changes nothing.
pub async fn answer(db: &mut PgConnection, broker: Uuid, answers: &[(Uuid, Answer)]) -> Result<()> {
    if answers.is_empty() {
        return Ok(());
    }
    let ids: Vec<Uuid> = answers.iter().map(|(id, _)| *id).collect();
    let said = answers.iter().map(|(_, answer)| written(answer)).collect::<Result<Vec<Value>>>()?;
    sqlx::query!(
        "
        insert into control_answer (request_id, broker_id, answer)
        select u.id, $2, u.answer
          from unnest($1::uuid[], $3::jsonb[]) as u (id, answer)
          join (select id from control_request where id = any($1) for key share) r on r.id = u.id
   on conflict do nothing
        ",
        &ids,
        broker,
        &said
    )
    .execute(db)
    .await?;
    Ok(())
}

fn written(answer: &Answer) -> Result<Value> {
    let wrong = |e| Error::Internal(format!("writing an answer: {e}"));
    let text = serde_json::to_string(answer).map_err(wrong)?;
    // A null character is the one that jsonb refuses; MQTT has none in its texts, so only a payload could bring it.
    if text.len() > MAX_ANSWER_BYTES || text.contains("\\u0000") {
        return serde_json::to_value(Answer::TooLong).map_err(wrong);
    }
    serde_json::from_str(&text).map_err(wrong)
}
