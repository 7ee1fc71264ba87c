//! Open connections: who is there, sending somebody away, writing down what a client says, and what happened to clients.
//!
//! The connections are held by the brokers, which are asked through [`fleet_core::control`].

use std::collections::HashMap;
use std::net::SocketAddr;
use std::str::FromStr;

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::clock::from_ms;
use fleet_core::connection_event::{self, EventRow, Kind};
use fleet_core::control::{
    self, Answer, Answers, Connection, Direction, Filter, Owner, Request, TraceLines, Transport,
};
use fleet_core::device;
use fleet_core::id::{ConnectionEventId, ConnectionId, DeviceId, UserId};
use fleet_core::user;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, ConnectionsManage, ConnectionsRead, FromQuery, Json, MaybeJson, Params, Path, Query, Right};
use crate::page::{Cursor, Page, behind};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// Connections on a page unless it is said.
const DEFAULT_PAGE: usize = 100;
/// Most connections on a page.
const LARGEST_PAGE: usize = 500;
/// Most lines of a trace on a page: all there can be.
const LARGEST_TRACE: usize = 1_000;
/// Longest reason for a disconnect, in characters.
const MAX_REASON_CHARS: usize = 200;
/// Minutes a client may be traced at once.
const TRACE_MINUTES: std::ops::RangeInclusive<u16> = 1..=60;

/// The one answer that matters of a question about one connection, which one broker holds.
fn one(answers: Answers, id: ConnectionId) -> Result<Answer, Problem> {
    let Answers { given, missing } = answers;
    match given.into_iter().find(|answer| *answer != Answer::NotHere) {
        Some(Answer::Refused(why)) => Err(Problem::new(409, "too-many-traces", why)),
        Some(Answer::TooLong) => Err(Problem::new(503, "no-broker", "the answer was too long: ask for less at once")),
        Some(Answer::Unknown) => {
            Err(Problem::new(503, "no-broker", "a broker of another version runs, which does not know the question"))
        }
        Some(answer) => Ok(answer),
        None if missing.is_empty() => Err(no_such_connection(id)),
        None => {
            let detail = format!("connection {id} is not known to those brokers that answered, and some did not");
            Err(Problem::new(503, "no-broker", detail))
        }
    }
}

fn no_such_connection(id: ConnectionId) -> Problem {
    Problem::new(404, "no-such-connection", format!("connection {id} does not exist, or has ended"))
}

/// What kind of principal a client is.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
enum PrincipalKind {
    Device,
    User,
    Claim,
}

/// An open connection, as it is at the moment.
#[derive(Serialize, ToSchema)]
#[schema(as = Connection)]
pub(crate) struct ConnectionBody {
    /// Its id; a client that comes again gets a new one.
    #[schema(value_type = String, example = "con_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: ConnectionId,
    /// The client's id.
    client_id: String,
    /// What kind of principal the client is.
    principal: PrincipalKind,
    /// The device, when it is one.
    #[schema(value_type = Option<String>, example = "boiler-1")]
    device: Option<DeviceId>,
    /// The e-mail address of the user, when it is one.
    user: Option<String>,
    /// Since when.
    #[serde(serialize_with = "time::serialize")]
    since: DateTime<Utc>,
    /// Where it comes from.
    #[schema(value_type = String, example = "192.0.2.7:40312")]
    address: SocketAddr,
    /// What carries it: `tcp`, `tls` or `websocket`.
    #[schema(value_type = String, example = "tls")]
    transport: Transport,
    /// The version of MQTT.
    #[schema(example = "5")]
    protocol: &'static str,
    /// Seconds it may be silent; null: for ever.
    keep_alive_s: Option<u16>,
    /// Whether its session outlives it.
    persistent: bool,
    /// For how long, in seconds; null: for ever.
    session_expiry_s: Option<u32>,
    /// Messages that wait for it.
    queued_messages: u64,
    /// What these take, in bytes.
    queued_bytes: u64,
    /// Messages it was sent and has not acknowledged.
    in_flight: u64,
    /// Messages it published.
    messages_in: u64,
    /// Messages it was sent.
    messages_out: u64,
    /// Bytes it sent.
    bytes_in: u64,
    /// Bytes it was sent.
    bytes_out: u64,
    /// Filters it subscribes to.
    subscriptions: u64,
    /// Whether it connects again and again.
    flapping: bool,
    /// Whether it is traced.
    traced: bool,
}

impl ConnectionBody {
    fn new(connection: Connection, emails: &HashMap<UserId, String>) -> Self {
        let Connection { id, client_id, owner, address, transport, keep_alive_s, .. } = connection;
        let (principal, device, user) = match owner {
            Owner::Device(id) => (PrincipalKind::Device, Some(id), None),
            Owner::User(id) => (PrincipalKind::User, None, emails.get(&id).cloned()),
            Owner::Claim(_) => (PrincipalKind::Claim, None, None),
        };
        Self {
            id,
            client_id,
            principal,
            device,
            user,
            since: from_ms(connection.since_ms),
            address,
            transport,
            protocol: if connection.protocol == 4 { "3.1.1" } else { "5" },
            keep_alive_s,
            persistent: connection.session_expiry_s > 0,
            session_expiry_s: (connection.session_expiry_s < u32::MAX).then_some(connection.session_expiry_s),
            queued_messages: connection.queued_messages,
            queued_bytes: connection.queued_bytes,
            in_flight: connection.in_flight,
            messages_in: connection.messages_in,
            messages_out: connection.messages_out,
            bytes_in: connection.bytes_in,
            bytes_out: connection.bytes_out,
            subscriptions: connection.subscriptions,
            flapping: connection.flapping,
            traced: connection.traced,
        }
    }

    async fn one(db: &mut PgConnection, connection: Connection) -> Result<Self, Problem> {
        Ok(Self::all(db, vec![connection]).await?.remove(0))
    }

    async fn all(db: &mut PgConnection, connections: Vec<Connection>) -> Result<Vec<Self>, Problem> {
        let users = connections.iter().filter_map(|connection| match connection.owner {
            Owner::User(id) => Some(id),
            Owner::Device(_) | Owner::Claim(_) => None,
        });
        let emails = user::emails(db, &users.collect::<Vec<_>>()).await?.into_iter().collect();
        Ok(connections.into_iter().map(|connection| Self::new(connection, &emails)).collect())
    }
}

/// Some connections, and where to go on.
#[derive(Serialize, ToSchema)]
pub(crate) struct ConnectionPage {
    /// The connections, the longest open first.
    items: Vec<ConnectionBody>,
    /// The `cursor` of the next page; null at the end.
    #[schema(value_type = Option<String>)]
    next_cursor: Option<Cursor>,
    /// Brokers that did not answer in time; their connections are not among the items.
    missing_brokers: Vec<String>,
}

/// Which connections.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `List` reads, as the document tells it")]
pub(crate) struct ListQuery {
    /// Of this device.
    device: Option<String>,
    /// With this client id.
    client_id: Option<String>,
    /// Carried by `tcp`, `tls` or `websocket`.
    transport: Option<String>,
    /// Connections on the page.
    #[param(minimum = 1, maximum = 500, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct List {
    filter: Filter,
    after: Option<ConnectionId>,
    limit: usize,
}

impl FromQuery for List {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let filter = Filter {
            device: query.one("device"),
            client_id: query.one("client_id"),
            transport: query.one::<Carrier>("transport").map(|carrier| carrier.0),
        };
        let after = behind(query);
        Some(Self { filter, after, limit: query.limit(DEFAULT_PAGE, LARGEST_PAGE) })
    }
}

struct Carrier(Transport);

impl FromStr for Carrier {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "tcp" => Ok(Self(Transport::Tcp)),
            "tls" => Ok(Self(Transport::Tls)),
            "websocket" => Ok(Self(Transport::WebSocket)),
            _ => Err("expected tcp, tls or websocket"),
        }
    }
}

/// List open connections
///
/// The longest open first, as they are at the moment. Whoever may see some devices only is shown theirs, and pages may be shorter
/// than was asked for.
#[utoipa::path(
    get, path = "/api/v1/connections", tag = "connections", params(ListQuery),
    security(("bearer" = ["connections:read"])),
    responses(
        (status = 200, description = "A page of them.", body = ConnectionPage),
        (status = 503, description = "No broker is running, or none answered.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<ConnectionsRead>,
    Query(query): Query<List>,
) -> Result<Json<ConnectionPage>, Problem> {
    let List { filter, after, limit } = query;
    let request = Request::Connections { tenant: caller.tenant, filter, after, limit: limit + 1 };
    let Answers { given, missing } = app.ask_brokers(&request).await?;
    let mut missing_brokers: Vec<_> = missing.iter().map(ToString::to_string).collect();
    let mut connections = Vec::new();
    for answer in given {
        match answer {
            Answer::Connections(some) => connections.extend(some),
            other => missing_brokers.push(format!("one that said {other:?}")),
        }
    }
    connections.sort_by_key(|connection| connection.id);
    let more = connections.len() > limit;
    connections.truncate(limit);
    let next_cursor = connections.last().filter(|_| more).map(|last| Cursor::Connection(last.id));
    let mut db = caller.read(&app).await?;
    let connections = in_scope(&mut db, &caller, connections).await?;
    let items = ConnectionBody::all(&mut db, connections).await?;
    Ok(Json(ConnectionPage { items, next_cursor, missing_brokers }))
}

/// Read a connection
#[utoipa::path(
    get, path = "/api/v1/connections/{id}", tag = "connections",
    params(("id" = String, Path, description = "The connection's id")),
    security(("bearer" = ["connections:read"])),
    responses(
        (status = 200, description = "The connection, as it is at the moment.", body = ConnectionBody),
        (status = 404, description = "There is no such connection, or it has ended.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "No broker is running, or none answered.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<ConnectionsRead>,
    Path(id): Path<ConnectionId>,
) -> Result<Json<ConnectionBody>, Problem> {
    let connection = find(&app, &caller, id).await?;
    Ok(Json(ConnectionBody::one(&mut *caller.read(&app).await?, connection).await?))
}

async fn find<R: Right>(app: &App, caller: &Can<R>, id: ConnectionId) -> Result<Connection, Problem> {
    let answers = app.ask_brokers(&Request::Connection { tenant: caller.tenant, id }).await?;
    let connection = match one(answers, id)? {
        Answer::Connection(connection) => *connection,
        other => return Err(unexpected(&other)),
    };
    let seen = in_scope(&mut *caller.read(app).await?, caller, vec![connection]).await?.pop();
    seen.ok_or_else(|| no_such_connection(id))
}

/// Those of the connections that the caller may see: devices in scope; users, only with the whole tenant in scope.
async fn in_scope<R: Right>(
    db: &mut PgConnection,
    caller: &Can<R>,
    mut connections: Vec<Connection>,
) -> Result<Vec<Connection>, Problem> {
    if caller.is_unscoped() {
        return Ok(connections);
    }
    let devices = connections.iter().filter_map(|connection| match &connection.owner {
        Owner::Device(id) => Some(id.to_string()),
        Owner::User(_) | Owner::Claim(_) => None,
    });
    let seen = device::visible(db, caller.tenant, &devices.collect::<Vec<_>>()).await?;
    connections.retain(|connection| match &connection.owner {
        Owner::Device(id) => seen.contains(id.as_str()),
        Owner::User(_) | Owner::Claim(_) => false,
    });
    Ok(connections)
}

/// Before a broker is asked to do it: what may have happened is known.
async fn record(
    app: &App,
    caller: &Can<ConnectionsManage>,
    connection: Connection,
    action: &'static str,
    how: &impl Serialize,
) -> Result<(), Problem> {
    let mut tx = caller.change(app).await?;
    let connection = ConnectionBody::one(&mut tx, connection).await?;
    let entry = Entry::of(action, connection.id).before(&connection).after(how);
    let entry = match &connection.device {
        Some(device) => entry.on(device),
        None => entry,
    };
    tx.commit(entry).await
}

fn unexpected(answer: &Answer) -> Problem {
    Problem::internal(&fleet_core::Error::Internal(format!("a broker answered {answer:?}")))
}

/// How to disconnect a client.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Disconnect {
    /// What an MQTT 5 client is told, beside reason code 0x98; a 3.1.1 client is just closed.
    #[schema(example = "moved to another site", max_length = 200)]
    reason: Option<String>,
    /// Whether its session ends too, with its subscriptions and what waits for it.
    #[serde(default)]
    end_session: bool,
}

impl Disconnect {
    fn checked_reason(&self) -> Result<String, Problem> {
        let reason = self.reason.as_deref().unwrap_or("disconnected by an operator").trim();
        if reason.chars().count() > MAX_REASON_CHARS || reason.is_empty() || reason.contains(char::is_control) {
            let expected = format!("expected 1 to {MAX_REASON_CHARS} characters, none of them a control character");
            return Err(Problem::field("reason", expected));
        }
        Ok(reason.to_owned())
    }
}

/// Disconnect a client
///
/// It may come again at once: to keep a device out, disable it or revoke its credential. Its will is sent.
#[utoipa::path(
    post, path = "/api/v1/connections/{id}/disconnect", tag = "connections", request_body = Option<Disconnect>,
    params(("id" = String, Path, description = "The connection's id")),
    security(("bearer" = ["connections:manage"])),
    responses(
        (status = 204, description = "It is told to go."),
        (status = 404, description = "There is no such connection, or it has ended.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "No broker is running, or none answered.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn disconnect(
    State(app): State<App>,
    caller: Can<ConnectionsManage>,
    Path(id): Path<ConnectionId>,
    MaybeJson(how): MaybeJson<Disconnect>,
) -> Result<StatusCode, Problem> {
    let reason = how.checked_reason()?;
    let (tenant, by) = (caller.tenant, caller.id);
    let request = Request::Disconnect { tenant, id, reason, end_session: how.end_session, by };
    record(&app, &caller, find(&app, &caller, id).await?, "connection.disconnect", &how).await?;
    one(app.ask_brokers(&request).await?, id)?;
    Ok(StatusCode::NO_CONTENT)
}

/// How to trace a client.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct StartTrace {
    /// For how long, 1 to 60; 5 unless it is said.
    #[schema(example = 5, minimum = 1, maximum = 60)]
    minutes: Option<u16>,
}

/// A packet, as a line of text.
#[derive(Serialize, ToSchema)]
#[schema(as = TraceLine)]
pub(crate) struct TraceLineBody {
    /// The line's place: send it as `after` to get what follows.
    seq: i64,
    /// When.
    #[serde(serialize_with = "time::serialize")]
    at: DateTime<Utc>,
    /// `in`: from the client; `out`: to the client; `note`: something happened to the connection.
    #[schema(value_type = String, example = "in")]
    direction: Direction,
    /// The packet. Payloads are shortened, secrets masked.
    #[schema(
        example = "PUBLISH id=7 qos=1 topic=\"fleet/v1/main/boiler-1/telemetry\" payload[13]=\"{\\\"temp\\\":21.4}\""
    )]
    text: String,
}

/// Lines of a trace.
#[derive(Serialize, ToSchema)]
#[schema(as = Trace)]
pub(crate) struct TraceBody {
    /// The lines, oldest first.
    items: Vec<TraceLineBody>,
    /// Lines that had to make room for newer ones.
    dropped: u64,
    /// When the trace ends, or ended.
    #[serde(serialize_with = "time::serialize")]
    ends_at: DateTime<Utc>,
}

impl TraceBody {
    fn new(lines: TraceLines) -> Self {
        let TraceLines { lines, dropped, ends_ms } = lines;
        let line = |line: control::TraceLine| TraceLineBody {
            seq: line.seq,
            at: from_ms(line.at_ms),
            direction: line.direction,
            text: line.text,
        };
        Self { items: lines.into_iter().map(line).collect(), dropped, ends_at: from_ms(ends_ms) }
    }

    /// What several brokers wrote down, since the client was here and there.
    fn merged(given: Vec<Answer>) -> Option<Self> {
        let mut all: Option<TraceLines> = None;
        for answer in given {
            let Answer::Trace(some) = answer else { continue };
            let all = all.get_or_insert(TraceLines { lines: Vec::new(), dropped: 0, ends_ms: some.ends_ms });
            all.lines.extend(some.lines);
            all.dropped += some.dropped;
            all.ends_ms = all.ends_ms.max(some.ends_ms);
        }
        let mut all = all?;
        all.lines.sort_by_key(|line| line.seq);
        Some(Self::new(all))
    }
}

/// Trace a client
///
/// Each packet becomes a line of text, for some minutes; the trace goes on when the client comes again. A client that is
/// traced already is traced for so long from now on.
#[utoipa::path(
    post, path = "/api/v1/connections/{id}/trace", tag = "connections", request_body = Option<StartTrace>,
    params(("id" = String, Path, description = "The connection's id")),
    security(("bearer" = ["connections:manage"])),
    responses(
        (status = 200, description = "It is traced from now on.", body = TraceBody),
        (status = 404, description = "There is no such connection, or it has ended.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "As many clients are traced as may be.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "No broker is running, or none answered.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn start_trace(
    State(app): State<App>,
    caller: Can<ConnectionsManage>,
    Path(id): Path<ConnectionId>,
    MaybeJson(how): MaybeJson<StartTrace>,
) -> Result<Json<TraceBody>, Problem> {
    let minutes = how.minutes.unwrap_or(5);
    if !TRACE_MINUTES.contains(&minutes) {
        return Err(Problem::field("minutes", "expected 1 to 60"));
    }
    let connection = find(&app, &caller, id).await?;
    let session = connection.session.clone();
    record(&app, &caller, connection, "connection.trace", &StartTrace { minutes: Some(minutes) }).await?;
    let request = Request::TraceStart { tenant: caller.tenant, id, session, minutes, by: caller.id };
    let answers = app.ask_brokers(&request).await?;
    if let Some(Answer::Refused(why)) = answers.given.iter().find(|answer| matches!(answer, Answer::Refused(_))) {
        return Err(Problem::new(409, "too-many-traces", why.as_str()));
    }
    match TraceBody::merged(answers.given) {
        Some(trace) => Ok(Json(trace)),
        None => Err(Problem::new(503, "no-broker", "no broker began the trace: try again shortly")),
    }
}

/// Which lines.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Lines` reads, as the document tells it")]
pub(crate) struct TraceQuery {
    /// Those behind the line of this `seq`.
    after: Option<i64>,
    /// Lines on the page.
    #[param(minimum = 1, maximum = 1000, default = 1000)]
    limit: Option<usize>,
}

pub(crate) struct Lines {
    after: i64,
    limit: usize,
}

impl FromQuery for Lines {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let after = query.one::<i64>("after").unwrap_or_default();
        Some(Self { after, limit: query.limit(LARGEST_TRACE, LARGEST_TRACE) })
    }
}

/// Read a trace
///
/// Under the connection it was asked for, or one that the client has opened since. Its lines are kept for ten minutes
/// after its end.
#[utoipa::path(
    get, path = "/api/v1/connections/{id}/trace", tag = "connections",
    params(("id" = String, Path, description = "The connection's id"), TraceQuery),
    security(("bearer" = ["connections:manage"])),
    responses(
        (status = 200, description = "The lines.", body = TraceBody),
        (status = 404, description = "There is no such trace.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "No broker is running, or none answered.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read_trace(
    State(app): State<App>,
    caller: Can<ConnectionsManage>,
    Path(id): Path<ConnectionId>,
    Query(query): Query<Lines>,
) -> Result<Json<TraceBody>, Problem> {
    let Lines { after, limit } = query;
    if !caller.is_unscoped() {
        find(&app, &caller, id).await?;
    }
    let answers = app.ask_brokers(&Request::Trace { tenant: caller.tenant, id, after, limit }).await?;
    let mut trace = TraceBody::merged(answers.given).ok_or_else(|| no_such_trace(id))?;
    trace.items.truncate(limit);
    Ok(Json(trace))
}

fn no_such_trace(id: ConnectionId) -> Problem {
    Problem::new(404, "no-such-trace", format!("there is no trace of connection {id}, or its time is over"))
}

/// End a trace
///
/// Its lines are forgotten.
#[utoipa::path(
    delete, path = "/api/v1/connections/{id}/trace", tag = "connections",
    params(("id" = String, Path, description = "The connection's id")),
    security(("bearer" = ["connections:manage"])),
    responses(
        (status = 204, description = "It is over."),
        (status = 404, description = "There is no such trace.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "No broker is running, or none answered.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn stop_trace(
    State(app): State<App>,
    caller: Can<ConnectionsManage>,
    Path(id): Path<ConnectionId>,
) -> Result<StatusCode, Problem> {
    if !caller.is_unscoped() {
        find(&app, &caller, id).await?;
    }
    let begun = app.ask_brokers(&Request::Trace { tenant: caller.tenant, id, after: i64::MAX, limit: 1 }).await?;
    TraceBody::merged(begun.given).ok_or_else(|| no_such_trace(id))?;
    caller.change(&app).await?.commit(Entry::of("connection.untrace", id)).await?;
    let answers = app.ask_brokers(&Request::TraceStop { tenant: caller.tenant, id }).await?;
    if answers.given.contains(&Answer::Done) { Ok(StatusCode::NO_CONTENT) } else { Err(no_such_trace(id)) }
}

/// Something that happened to a client.
#[derive(Serialize, ToSchema)]
#[schema(as = ConnectionEvent)]
pub(crate) struct EventBody {
    /// Its id.
    #[schema(value_type = String, example = "cev_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: ConnectionEventId,
    /// What happened: `flapping`, `identity-conflict`, `queue-overflow`, `rate-limited`, `disconnected-by-operator` or
    /// `trace-started`.
    #[schema(value_type = String, example = "flapping")]
    kind: Kind,
    /// The device, when it is one and still exists.
    device: Option<String>,
    /// The client's id.
    client_id: String,
    /// More about it.
    #[schema(value_type = Object)]
    detail: serde_json::Value,
    /// How often within the minute.
    count: i64,
    /// When it happened last.
    #[serde(serialize_with = "time::serialize")]
    at: DateTime<Utc>,
}

impl EventBody {
    fn new(row: EventRow) -> Self {
        let EventRow { id, device, client_id, kind, detail, count, at } = row;
        Self { id, kind, device, client_id, detail, count, at }
    }
}

/// Which events.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Events` reads, as the document tells it")]
pub(crate) struct EventQuery {
    /// Of this device.
    device: Option<String>,
    /// Of this kind.
    kind: Option<String>,
    /// Events on the page.
    #[param(minimum = 1, maximum = 500, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct Events {
    device: Option<DeviceId>,
    kind: Option<Kind>,
    before: Option<ConnectionEventId>,
    limit: usize,
}

impl FromQuery for Events {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let before = behind(query);
        let (device, kind) = (query.one("device"), query.one("kind"));
        Some(Self { device, kind, before, limit: query.limit(DEFAULT_PAGE, LARGEST_PAGE) })
    }
}

/// List connection events
///
/// Newest first: clients that connect again and again, fight over an identity, send too much or cannot keep up, and what
/// operators did. Events of one client, kind and minute are one.
#[utoipa::path(
    get, path = "/api/v1/connections/events", tag = "connections", params(EventQuery),
    security(("bearer" = ["connections:read"])),
    responses(
        (status = 200, description = "A page of them.", body = Page<EventBody>),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn events(
    State(app): State<App>,
    caller: Can<ConnectionsRead>,
    Query(query): Query<Events>,
) -> Result<Json<Page<EventBody>>, Problem> {
    let Events { device, kind, before, limit } = query;
    let mut tx = caller.read(&app).await?;
    let device = match device {
        Some(id) => Some(device::key(&mut tx, caller.tenant, &id).await?),
        None => None,
    };
    let asked = i64::try_from(limit + 1).unwrap_or(connection_event::MAX_PAGE);
    let rows = connection_event::page(&mut tx, caller.tenant, device, kind, before, asked).await?;
    let key = |row: &EventRow| Cursor::ConnectionEvent(row.id);
    Ok(Json(Page::cut(rows, limit, LARGEST_PAGE + 1, key, EventBody::new)))
}
