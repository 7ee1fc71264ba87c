//! The tail: lines as they are committed, as server-sent events (WHATWG HTML, "Server-sent events").

use std::convert::Infallible;
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::id::TenantKey;
use fleet_core::log::feed::{Entry, Gap, Positions, Reader, Refused, Request};
use futures::{Stream, stream};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::{LineBody, asked};
use crate::extract::{Can, FromQuery, LogsRead, Params, Query};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
/// Asks proxies not to wait for more.
const UNBUFFERED: (HeaderName, HeaderValue) =
    (HeaderName::from_static("x-accel-buffering"), HeaderValue::from_static("no"));

/// Lines that are not given.
#[derive(Serialize, ToSchema)]
#[schema(as = LogGap)]
pub(crate) struct GapBody {
    /// How many lines that answer the query; null: not known, since the tail was away for too long.
    #[schema(example = 412)]
    missed: Option<u64>,
    /// The time of the first of them; null when it is not known.
    #[serde(serialize_with = "time::serialize_maybe")]
    from: Option<DateTime<Utc>>,
    /// The time of the last.
    #[serde(serialize_with = "time::serialize_maybe")]
    to: Option<DateTime<Utc>>,
}

impl GapBody {
    fn new(gap: &Gap) -> Self {
        let (from, to) = gap.between.unzip();
        Self { missed: gap.missed, from, to }
    }
}

/// Why a tail ended.
#[derive(Serialize, ToSchema)]
#[schema(as = LogTailEnd)]
pub(crate) struct EndBody {
    /// In words.
    #[schema(example = "the access token is not valid: expired")]
    reason: String,
}

/// Which lines.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Tail` reads, as the document tells it")]
pub(crate) struct TailQuery {
    /// Only lines that answer this, in the query language of logs; left out: all that the caller may see.
    #[param(example = "level:>=warn AND device:pump-*")]
    q: Option<String>,
    /// The `id` of the last event that was received, where the header `Last-Event-ID` cannot be sent.
    last_event_id: Option<String>,
}

pub(crate) struct Tail {
    query: fleet_core::query::Query,
    last_event_id: Option<String>,
}

impl FromQuery for Tail {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let asked = asked(query);
        let last_event_id = query.one("last_event_id");
        Some(Self { query: asked?, last_event_id })
    }
}

/// Tail lines
///
/// A stream of server-sent events that goes on until one side ends it: `line` (a `LogLine`) for each line as it is committed, in
/// the order of commits; `gap` (a `LogGap`) where lines are missing, because the reader was slower than they came or was away
/// for too long; `end` (a `LogTailEnd`) when the token has ended or does not allow it any more. Every event has an `id`; sent
/// as `Last-Event-ID`, the stream goes on behind it, from what is stored. Rights that change take effect within a second.
#[utoipa::path(
    get, path = "/api/v1/logs/tail", tag = "logs",
    params(
        TailQuery,
        ("Last-Event-ID" = Option<String>, Header, description = "The `id` of the last event that was received: goes on behind it"),
    ),
    security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "The events.", content(
            (LineBody = "text/event-stream", example = "event: line\nid: AQ…\ndata: {\"device\":\"pump-7\",…}\n\n"),
        )),
        (status = 400, description = "The query or the id cannot be read.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "The user has too many tails.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "The server has too many tails.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn tail(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(query): Query<Tail>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let tenant = caller.tenant;
    let given = headers.get(LAST_EVENT_ID).map(|value| value.to_str().unwrap_or_default().to_owned());
    let after = given.or(query.last_event_id.clone()).map(|id| Positions::open(&id, &app.pki, tenant));
    let after = after.transpose().map_err(|error| Problem::field("last_event_id", error.to_string()))?;
    let (principal, bearer) = (caller.principal().clone(), caller.bearer().clone());
    let request = Request { principal, bearer, query: query.query, after };
    let reader = app.feed.tail(request).await?;
    Ok(([UNBUFFERED], Sse::new(events(app, tenant, reader))).into_response())
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Full => Self::new(503, "too-many-tails", "the server has too many tails: try again shortly"),
            Refused::FullOfUser => Self::new(429, "too-many-tails", "you have too many tails: end one first"),
            Refused::Failed(error) => error.into(),
        }
    }
}

/// The events of a tail, of which the first says at once where to go on.
fn events(app: App, tenant: TenantKey, reader: Reader) -> impl Stream<Item = Result<Event, Infallible>> {
    let heartbeat = Duration::from_millis(app.logs.tail_heartbeat_ms.max(1));
    stream::unfold((reader, Duration::ZERO), move |(mut reader, within)| {
        let app = app.clone();
        async move {
            let entry = loop {
                match tokio::time::timeout(within, reader.next()).await {
                    Ok(entry) => break entry?,
                    Err(_) => {
                        if let Some(idle) = reader.idle() {
                            break idle;
                        }
                    }
                }
            };
            Some((Ok(event(&app, tenant, &entry)), (reader, heartbeat)))
        }
    })
}

fn event(app: &App, tenant: TenantKey, entry: &Entry) -> Event {
    let named = |name: &str, at: &Positions, body: String| {
        let event = Event::default().event(name).data(body);
        id(app, tenant, at).map_or(event.clone(), |id| event.id(id))
    };
    match entry {
        Entry::Line { line, at } => named("line", at, json(&LineBody::new(line, Vec::new()))),
        Entry::Gap(gap) => named("gap", &gap.at, json(&GapBody::new(gap))),
        // Without data it is no event, but its id is kept.
        Entry::Idle(at) => {
            let event = Event::default().comment("idle");
            id(app, tenant, at).map_or(event.clone(), |id| event.id(id))
        }
        Entry::End(reason) => Event::default().event("end").data(json(&EndBody { reason: reason.clone() })),
    }
}

/// The id by which to go on behind an event; without one, a client goes on behind the event before.
fn id(app: &App, tenant: TenantKey, at: &Positions) -> Option<String> {
    let sealed = at.seal(&app.pki, tenant);
    sealed.inspect_err(|error| tracing::warn!(%error, "a tail cannot be resumed")).ok()
}

fn json(body: &impl Serialize) -> String {
    serde_json::to_string(body).expect("a line is plain data")
}
