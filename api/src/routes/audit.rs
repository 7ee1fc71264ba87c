//! The audit: who did what, and the proof that nobody has touched it.

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::{self, Filter, Head, MAX_PAGE, Row, Trailer};
use fleet_core::id::DeviceId;
use futures::{Stream, stream};
use serde::Serialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use crate::extract::{AuditRead, Can, FromQuery, Json, Params, Path, Query, wants_csv};
use crate::page::{Cursor, Page, behind};
use crate::problem::{Document, Problem};
use crate::routes::telemetry::quoted;
use crate::state::App;
use crate::time::{self, Moment, rfc3339};

/// Entries on a page unless it is said.
const DEFAULT_PAGE: usize = 100;
/// Most entries on a page.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const LARGEST_PAGE: usize = MAX_PAGE as usize;
/// Rows of an export that are read at once.
const EXPORT_ROWS: i64 = 500;

/// Who did something.
#[derive(Serialize, ToSchema)]
#[schema(as = AuditActor)]
struct ActorBody {
    /// `user`, `api-key`, `device`, `system`, or `unknown`.
    #[schema(example = "user")]
    kind: String,
    /// Names it.
    #[schema(example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: Option<String>,
    /// What it was called then.
    #[schema(example = "ada@example.com")]
    name: Option<String>,
}

/// What it was done to.
#[derive(Serialize, ToSchema)]
#[schema(as = AuditResource)]
struct ResourceBody {
    /// The noun of the action.
    #[schema(example = "device")]
    kind: String,
    /// Which of them.
    #[schema(example = "boiler-1")]
    id: String,
}

/// Something that was done.
#[derive(Serialize, ToSchema)]
#[schema(as = AuditEntry)]
pub(crate) struct EntryBody {
    /// Its place in the tenant's chain.
    #[schema(example = 17)]
    seq: i64,
    /// When.
    #[serde(serialize_with = "time::serialize")]
    at: DateTime<Utc>,
    /// Who.
    actor: ActorBody,
    /// What was done.
    #[schema(example = "device.update")]
    action: String,
    /// To what.
    resource: ResourceBody,
    /// The device it is about.
    #[schema(example = "boiler-1")]
    device: Option<String>,
    /// What the resource was, as the API answered it then; of more than 64 KiB only hash and length.
    #[schema(value_type = Option<Object>)]
    before: Option<Value>,
    /// What it has become.
    #[schema(value_type = Option<Object>)]
    after: Option<Value>,
    /// Where the request came from.
    #[schema(example = "192.0.2.7")]
    address: Option<String>,
    /// The `x-request-id` of the request.
    request_id: Option<String>,
    /// What the client called itself.
    user_agent: Option<String>,
    /// The hash of the entry before, in hexadecimal.
    #[schema(value_type = String)]
    prev_hash: String,
    /// Its own, which covers all of the above.
    #[schema(value_type = String)]
    hash: String,
}

impl EntryBody {
    fn new(row: Row) -> Self {
        let json = |text: Option<String>| text.map(|text| serde_json::from_str(&text).unwrap_or(Value::String(text)));
        Self {
            seq: row.seq,
            at: row.at,
            actor: ActorBody { kind: row.actor_kind, id: row.actor_id, name: row.actor_name },
            action: row.action,
            resource: ResourceBody { kind: row.resource_kind, id: row.resource_id },
            device: row.device,
            before: json(row.before),
            after: json(row.after),
            address: row.address,
            request_id: row.request_id,
            user_agent: row.user_agent,
            prev_hash: hex::encode(row.prev_hash),
            hash: hex::encode(row.hash),
        }
    }
}

/// Which entries.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `List` reads, as the document tells it")]
pub(crate) struct ListQuery {
    /// Done by the actor of this id or name.
    actor: Option<String>,
    /// Of this action, such as `device.update`, or of all of a noun, such as `device`.
    action: Option<String>,
    /// Done to this kind of resource.
    resource: Option<String>,
    /// Done to the resource of this id.
    resource_id: Option<String>,
    /// About this device.
    device: Option<String>,
    /// From this time on: RFC 3339, or milliseconds since the epoch.
    from: Option<String>,
    /// Before this time.
    to: Option<String>,
    /// With this text in the actor's name, the resource's id, or what it was or became.
    text: Option<String>,
    /// Entries on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct List {
    filter: Filter,
    before: Option<i64>,
    limit: usize,
}

impl FromQuery for List {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let filter = Filter {
            actor: query.one("actor"),
            action: query.one("action"),
            resource_kind: query.one("resource"),
            resource_id: query.one("resource_id"),
            device: query.one::<DeviceId>("device"),
            from: query.one::<Moment>("from").map(|at| at.0),
            to: query.one::<Moment>("to").map(|at| at.0),
            text: query.one("text"),
        };
        let texts = [&filter.actor, &filter.action, &filter.resource_kind, &filter.resource_id, &filter.text];
        if texts.into_iter().flatten().any(|text| text.contains('\0')) {
            query.refuse("text", "expected no zero character");
        }
        Some(Self { filter, before: behind(query), limit: query.limit(DEFAULT_PAGE, LARGEST_PAGE) })
    }
}

/// List what was done
///
/// Newest first. A caller who reaches some devices only sees what is about them.
#[utoipa::path(
    get, path = "/api/v1/audit", tag = "audit", params(ListQuery), security(("bearer" = ["audit:read"])),
    responses((status = 200, description = "A page of entries.", body = Page<EntryBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<AuditRead>,
    Query(query): Query<List>,
) -> Result<Json<Page<EntryBody>>, Problem> {
    let List { filter, before, limit } = query;
    let mut db = caller.read(&app).await?;
    let asked = i64::try_from(limit).unwrap_or(MAX_PAGE).saturating_add(1);
    let rows = audit::page(&mut db, caller.tenant, &filter, before, asked).await?;
    Ok(Json(Page::cut(rows, limit, LARGEST_PAGE + 1, |row| Cursor::Audit(row.seq), EntryBody::new)))
}

/// Read what was done
#[utoipa::path(
    get, path = "/api/v1/audit/{seq}", tag = "audit", security(("bearer" = ["audit:read"])),
    params(("seq" = i64, Path, description = "The entry's place")),
    responses(
        (status = 200, description = "The entry.", body = EntryBody),
        (status = 404, description = "There is no such entry.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<AuditRead>,
    Path(seq): Path<i64>,
) -> Result<Json<EntryBody>, Problem> {
    let mut db = caller.read(&app).await?;
    Ok(Json(EntryBody::new(audit::find(&mut db, caller.tenant, seq).await?)))
}

/// Whether a chain is whole.
#[derive(Serialize, ToSchema)]
#[schema(as = AuditReport)]
pub(crate) struct ReportBody {
    /// Whether nobody has touched it.
    intact: bool,
    /// Entries that were found in order.
    entries: u64,
    /// Entries up to this one were deleted because of their age; 0: none.
    kept_after: i64,
    /// Where the chain ends: `seq:hash`. Noted elsewhere, it proves later that these entries are still the same.
    #[schema(value_type = String, example = "17:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
    head: String,
    /// The first entry that is wrong.
    fault: Option<FaultBody>,
}

/// What is wrong with a chain.
#[derive(Serialize, ToSchema)]
#[schema(as = AuditFault)]
struct FaultBody {
    /// The entry.
    seq: i64,
    /// What is wrong with it.
    #[schema(example = "row 17 was changed: its contents do not match its hash")]
    detail: String,
}

/// What to compare with.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Noted` reads, as the document tells it")]
pub(crate) struct VerifyQuery {
    /// A `head` that was noted earlier: the chain must still contain it.
    head: Option<String>,
}

pub(crate) struct Noted(Option<Head>);

impl FromQuery for Noted {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        Some(Self(query.one("head")))
    }
}

/// Verify the audit
///
/// Goes through all entries of the tenant. `muster audit verify` does the same without a limit of time.
#[utoipa::path(
    get, path = "/api/v1/audit/verify", tag = "audit", params(VerifyQuery), security(("bearer" = ["audit:read"])),
    responses(
        (status = 200, description = "What was found.", body = ReportBody),
        (status = 403, description = "The caller reaches some devices only.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn verify(
    State(app): State<App>,
    caller: Can<AuditRead>,
    Query(Noted(noted)): Query<Noted>,
) -> Result<Json<ReportBody>, Problem> {
    caller.needs_everything()?;
    let report = audit::verify(&mut *caller.read(&app).await?, caller.tenant, noted).await?;
    let fault = report.fault.map(|fault| FaultBody { seq: fault.seq(), detail: fault.to_string() });
    Ok(Json(ReportBody {
        intact: fault.is_none(),
        entries: report.rows,
        kept_after: report.kept_after,
        head: report.head.to_string(),
        fault,
    }))
}

/// From where on.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Export` reads, as the document tells it")]
pub(crate) struct ExportQuery {
    /// Only entries behind this one.
    #[param(minimum = 0, default = 0)]
    after: Option<i64>,
}

pub(crate) struct Export {
    after: i64,
}

impl FromQuery for Export {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let after = query.one::<i64>("after").unwrap_or_default();
        if after < 0 {
            query.refuse("after", "expected 0 or more");
        }
        Some(Self { after })
    }
}

/// Export the audit
///
/// All entries, oldest first, as JSON lines whose `before` and `after` are the very texts that were hashed; the last line tells
/// where the chain ends. `muster audit verify --file` verifies it, without a server. With `Accept: text/csv` as CSV, for people.
#[utoipa::path(
    get, path = "/api/v1/audit/export", tag = "audit", params(ExportQuery), security(("bearer" = ["audit:read"])),
    responses(
        (status = 200, description = "The entries.", content((String = "application/x-ndjson"), (String = "text/csv"))),
        (status = 403, description = "The caller reaches some devices only.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn export(
    State(app): State<App>,
    caller: Can<AuditRead>,
    Query(Export { after }): Query<Export>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    caller.needs_everything()?;
    let csv = wants_csv(&headers);
    let (kind, name) =
        if csv { ("text/csv; charset=utf-8", "audit.csv") } else { ("application/x-ndjson", "audit.ndjson") };
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename={name}")),
    ];
    Ok((headers, Body::from_stream(lines(app, caller, after, csv))).into_response())
}

/// Where an export is.
struct Exporting {
    app: App,
    caller: Can<AuditRead>,
    after: i64,
    csv: bool,
    begun: bool,
    ended: bool,
}

/// The lines, some rows at a time: a slow reader keeps no connection to the database.
fn lines(
    app: App,
    caller: Can<AuditRead>,
    after: i64,
    csv: bool,
) -> impl Stream<Item = Result<String, std::io::Error>> {
    let exporting = Exporting { app, caller, after, csv, begun: false, ended: false };
    stream::try_unfold(exporting, |mut exporting| async move {
        if exporting.ended {
            return Ok(None);
        }
        match exporting.next().await {
            Ok(text) => Ok(Some((text, exporting))),
            // The status is long sent: that the last line is missing tells that it is not whole.
            Err(error) => {
                tracing::warn!(%error, "an export of the audit was given up");
                Err(std::io::Error::other("the export was given up"))
            }
        }
    })
}

impl Exporting {
    async fn next(&mut self) -> fleet_core::Result<String> {
        let mut db =
            self.caller.read(&self.app).await.map_err(|problem| fleet_core::Error::Internal(format!("{problem:?}")))?;
        let (rows, head) = audit::rows(&mut db, self.caller.tenant, self.after, EXPORT_ROWS).await?;
        drop(db);
        let mut text = String::new();
        if self.csv && !self.begun {
            text.push_str(CSV_HEAD);
        }
        self.begun = true;
        for row in &rows {
            if self.csv { csv_line(&mut text, row) } else { json_line(&mut text, row) }
        }
        if let Some(last) = rows.last() {
            self.after = last.seq;
            return Ok(text);
        }
        self.ended = true;
        if !self.csv {
            json_line(&mut text, &Trailer { head });
        }
        Ok(text)
    }
}

fn json_line(text: &mut String, line: &impl Serialize) {
    text.push_str(&serde_json::to_string(line).expect("a row is plain data"));
    text.push('\n');
}

const CSV_HEAD: &str = "tenant,seq,at,actor_kind,actor_id,actor_name,action,resource_kind,resource_id,device,before,after,\
                        address,request_id,user_agent,prev_hash,hash\r\n";

fn csv_line(text: &mut String, row: &Row) {
    let cells = [
        Some(&row.tenant),
        Some(&row.seq.to_string()),
        Some(&rfc3339(row.at)),
        Some(&row.actor_kind),
        row.actor_id.as_ref(),
        row.actor_name.as_ref(),
        Some(&row.action),
        Some(&row.resource_kind),
        Some(&row.resource_id),
        row.device.as_ref(),
        row.before.as_ref(),
        row.after.as_ref(),
        row.address.as_ref(),
        row.request_id.as_ref(),
        row.user_agent.as_ref(),
        Some(&hex::encode(row.prev_hash)),
        Some(&hex::encode(row.hash)),
    ]
    .map(|cell| cell.map(|cell| quoted(cell)).unwrap_or_default());
    text.push_str(&cells.join(","));
    text.push_str("\r\n");
}
