//! Sessions: what outlives the connections of clients.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::control::{Answer, Request};
use fleet_core::id::{DeviceId, SessionId};
use fleet_core::session::{self, MAX_PAGE, Overview, Subscription};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, ConnectionsManage, ConnectionsRead, FromQuery, Json, Params, Path, Query};
use crate::page::{Cursor, Page, behind};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// Sessions on a page unless it is said.
const DEFAULT_PAGE: usize = 50;

/// What is kept for a client while it is away. A client that asked for nothing to be kept has no session here.
#[derive(Serialize, ToSchema)]
#[schema(as = Session)]
pub(crate) struct SessionBody {
    /// Its id; a client that begins anew gets a new one.
    #[schema(value_type = String, example = "ses_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: SessionId,
    /// The client's id.
    client_id: String,
    /// The device it belongs to, when it is a device's.
    #[schema(value_type = Option<String>, example = "boiler-1")]
    device: Option<DeviceId>,
    /// The e-mail address of the user it belongs to, when it is a user's.
    user: Option<String>,
    /// Whether the client is connected.
    connected: bool,
    /// Since when it is connected, or away.
    #[serde(serialize_with = "time::serialize")]
    since: DateTime<Utc>,
    /// When the session ends unless the client is back; null while it is connected, and when it never ends.
    #[serde(serialize_with = "time::serialize_maybe")]
    expires_at: Option<DateTime<Utc>>,
    /// How long it outlives a connection, in seconds; null: for ever.
    expiry_s: Option<u32>,
    /// What the client subscribes to.
    subscriptions: Vec<SubscriptionBody>,
    /// Messages that wait for the client, or for its acknowledgement.
    queued_messages: i64,
    /// What these count against the limit in bytes.
    queued_bytes: i64,
    /// Messages that were not queued because the queue was full.
    dropped_messages: i64,
    /// When that last happened.
    #[serde(serialize_with = "time::serialize_maybe")]
    dropped_at: Option<DateTime<Utc>>,
    /// When it began.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
}

/// What a client wants to receive.
#[derive(Serialize, ToSchema)]
#[schema(as = Subscription)]
struct SubscriptionBody {
    /// The filter, with `$share/{group}/` when it is shared.
    #[schema(example = "app/main/line-3/#")]
    filter: String,
    /// The highest quality of service it is sent with: 0, 1 or 2.
    qos: u8,
    /// Whether it is not sent what it published itself.
    no_local: bool,
    /// Whether the retain flag is sent as it was published.
    retain_as_published: bool,
    /// The client's number for it.
    subscription_id: Option<u32>,
}

impl SubscriptionBody {
    fn new(subscription: Subscription) -> Self {
        let Subscription { filter, qos, no_local, retain_as_published, subscription_id } = subscription;
        Self { filter, qos, no_local, retain_as_published, subscription_id }
    }
}

impl SessionBody {
    fn new(session: Overview) -> Self {
        Self {
            id: session.id,
            client_id: session.client_id,
            device: session.device,
            user: session.user,
            connected: session.connected,
            since: session.since,
            expires_at: session.expires_at,
            expiry_s: session.expiry_s,
            subscriptions: session.subscriptions.into_iter().map(SubscriptionBody::new).collect(),
            queued_messages: session.queued,
            queued_bytes: session.queued_bytes,
            dropped_messages: session.dropped,
            dropped_at: session.dropped_at,
            created_at: session.created_at,
        }
    }
}

/// Which sessions.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `List` reads, as the document tells it")]
pub(crate) struct ListQuery {
    /// Of this device.
    device: Option<String>,
    /// Sessions on the page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct List {
    device: Option<DeviceId>,
    after: Option<SessionId>,
    limit: usize,
}

impl FromQuery for List {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let after = behind(query);
        Some(Self { device: query.one("device"), after, limit: query.limit(DEFAULT_PAGE, MAX_PAGE) })
    }
}

/// List sessions
///
/// Oldest first. Those of clients that are connected and those of clients that are away.
#[utoipa::path(
    get, path = "/api/v1/sessions", tag = "sessions", params(ListQuery),
    security(("bearer" = ["connections:read"])),
    responses((status = 200, description = "A page of them.", body = Page<SessionBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<ConnectionsRead>,
    Query(query): Query<List>,
) -> Result<Json<Page<SessionBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let List { device, after, limit } = query;
    let sessions = session::list(&mut db, caller.tenant, device.as_ref(), after, limit + 1).await?;
    let key = |session: &Overview| Cursor::Session(session.id);
    Ok(Json(Page::cut(sessions, limit, MAX_PAGE, key, SessionBody::new)))
}

/// Read a session
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}", tag = "sessions",
    params(("id" = String, Path, description = "The session's id")),
    security(("bearer" = ["connections:read"])),
    responses(
        (status = 200, description = "The session.", body = SessionBody),
        (status = 404, description = "There is no such session, or it has ended.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<ConnectionsRead>,
    Path(id): Path<SessionId>,
) -> Result<Json<SessionBody>, Problem> {
    let mut db = caller.read(&app).await?;
    Ok(Json(SessionBody::new(session::find(&mut db, caller.tenant, id).await?)))
}

/// Before a broker is asked: what may have happened is known.
fn about(ended: &SessionBody) -> Entry {
    let entry = Entry::of("session.end", ended.id).before(ended);
    match &ended.device {
        Some(device) => entry.on(device),
        None => entry,
    }
}

/// End a session
///
/// With its subscriptions and what waits for it. A client that is connected is disconnected; its will, if one waits, is
/// sent.
#[utoipa::path(
    delete, path = "/api/v1/sessions/{id}", tag = "sessions",
    params(("id" = String, Path, description = "The session's id")),
    security(("bearer" = ["connections:manage"])),
    responses(
        (status = 204, description = "It ends."),
        (status = 404, description = "There is no such session, or it has ended.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "No broker is running, or none answered.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn end(
    State(app): State<App>,
    caller: Can<ConnectionsManage>,
    Path(id): Path<SessionId>,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    let session = SessionBody::new(session::find(&mut tx, caller.tenant, id).await?);
    tx.commit(about(&session)).await?;
    let answers = app.ask_brokers(&Request::EndSession { tenant: caller.tenant, id, by: caller.id }).await?;
    if answers.given.contains(&Answer::Done) {
        Ok(StatusCode::NO_CONTENT)
    } else if answers.missing.is_empty() {
        Err(fleet_core::Error::NoSuchSession(id).into())
    } else {
        Err(fleet_core::Error::NoBroker("the broker that has the session did not answer in time").into())
    }
}
