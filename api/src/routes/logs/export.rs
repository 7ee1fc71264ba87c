//! Export: all lines that answer a query, as a stream that is read page by page.

use std::io::Error;
use std::str::FromStr;

use axum::body::Body;
use axum::extract::State;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use fleet_core::log::Line;
use fleet_core::places::{Full, Place};
use fleet_core::search::{Cursor, MAX_PAGE, Order};
use futures::{Stream, stream};
use serde::Serialize;
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};

use super::search::page;
use super::{Asked, LineBody};
use crate::extract::{Can, FromQuery, LogsRead, Params, Query};
use crate::problem::{Document, Problem};
use crate::routes::telemetry::quoted;
use crate::state::App;
use crate::time::rfc3339;

/// The last line of an export in NDJSON: without it the export was given up.
#[derive(Serialize, ToSchema)]
#[schema(as = LogExportEnd)]
pub(crate) struct EndBody {
    /// How many lines are before it.
    #[schema(example = 1234)]
    lines: u64,
    /// Whether everything that is stored could be searched.
    complete: bool,
}

/// Which lines, and how they are written.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Export` reads, as the document tells it")]
pub(crate) struct ExportQuery {
    /// Only lines that answer this, in the query language of logs.
    #[param(example = "level:>=warn")]
    q: Option<String>,
    /// From this time on: RFC 3339, a day, or such as `now-15m`.
    #[param(example = "2026-11-20")]
    from: Option<String>,
    /// Before this time; a day is taken as a whole.
    to: Option<String>,
    /// `ndjson` or `csv`.
    #[param(default = "ndjson")]
    format: Option<String>,
}

/// How lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Ndjson,
    Csv,
}

impl FromStr for Format {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "ndjson" => Ok(Self::Ndjson),
            "csv" => Ok(Self::Csv),
            _ => Err("expected ndjson or csv"),
        }
    }
}

pub(crate) struct Export {
    asked: Asked,
    format: Format,
}

impl FromQuery for Export {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let (asked, format) = (Asked::from_query(query), query.one("format"));
        Some(Self { asked: asked?, format: format.unwrap_or(Format::Ndjson) })
    }
}

/// Export lines
///
/// Oldest first: as JSON lines, the last of which (`LogExportEnd`) says how many there were, or as CSV (RFC 4180), whose last
/// line begins with `#`. An export without its last line was given up, and is not whole. Rights are looked at for each page.
#[utoipa::path(
    get, path = "/api/v1/logs/export", tag = "logs", params(ExportQuery), security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "The lines.", content((String = "application/x-ndjson"), (String = "text/csv"))),
        (status = 400, description = "The query cannot be read.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "The user exports too much at once.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "The server has too many exports or searches at once, or it took too long.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn export(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(Export { asked, format }): Query<Export>,
) -> Result<Response, Problem> {
    let (kind, name) = match format {
        Format::Ndjson => ("application/x-ndjson", "logs.ndjson"),
        Format::Csv => ("text/csv; charset=utf-8", "logs.csv"),
    };
    let place = app.exports.take(caller.id).map_err(too_many)?;
    let mut exporting =
        Exporting { app, caller, asked, format, after: None, lines: 0, complete: true, ended: false, _place: place };
    // A query that cannot be answered is refused while there is a status to say so.
    let first = exporting.next().await?;
    let head = if format == Format::Csv { CSV_HEAD.to_owned() } else { String::new() };
    let rest = futures::StreamExt::chain(stream::iter([Ok(head + &first)]), pages(exporting));
    let headers = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, format!("attachment; filename={name}")),
    ];
    Ok((headers, Body::from_stream(rest)).into_response())
}

fn too_many(full: Full) -> Problem {
    match full {
        Full::All => Problem::new(503, "too-many-exports", "the server has too many exports: try again shortly"),
        Full::OfUser => Problem::new(429, "too-many-exports", "you have too many exports: wait for the end of one"),
    }
}

/// Where an export is.
struct Exporting {
    app: App,
    caller: Can<LogsRead>,
    asked: Asked,
    format: Format,
    after: Option<Cursor>,
    lines: u64,
    complete: bool,
    ended: bool,
    /// Its own until the last page is taken, or the reader has gone.
    _place: Place,
}

/// A page at a time: a slow reader keeps neither a connection to the database nor a search.
fn pages(exporting: Exporting) -> impl Stream<Item = Result<String, Error>> {
    stream::try_unfold(exporting, |mut exporting| async move {
        if exporting.ended {
            return Ok(None);
        }
        match exporting.next().await {
            Ok(text) => Ok(Some((text, exporting))),
            // The status is long sent: that the last line is missing tells that it is not whole.
            Err(problem) => {
                tracing::warn!(problem = problem.kind, "an export of lines was given up");
                Err(Error::other("the export was given up"))
            }
        }
    })
}

impl Exporting {
    async fn next(&mut self) -> Result<String, Problem> {
        self.caller.again(&self.app).await?;
        let page = page(&self.app, &self.caller, &self.asked, Order::Oldest, self.after, MAX_PAGE).await?;
        self.complete &= page.complete;
        let mut text = String::new();
        for (line, _) in &page.found {
            match self.format {
                Format::Ndjson => json_line(&mut text, &LineBody::new(line, Vec::new())),
                Format::Csv => csv_line(&mut text, line),
            }
            self.lines += 1;
        }
        self.after = page.next;
        if page.next.is_none() {
            self.ended = true;
            let Self { lines, complete, .. } = *self;
            match self.format {
                Format::Ndjson => json_line(&mut text, &EndBody { lines, complete }),
                Format::Csv => {
                    text.extend(["# lines=", &lines.to_string(), " complete=", &complete.to_string(), "\r\n"]);
                }
            }
        }
        Ok(text)
    }
}

fn json_line(text: &mut String, line: &impl Serialize) {
    text.push_str(&serde_json::to_string(line).expect("a line is plain data"));
    text.push('\n');
}

const CSV_HEAD: &str = "ts,device,seq,level,target,message,trace_id,fields\r\n";

fn csv_line(text: &mut String, line: &Line) {
    let fields = if line.fields.is_empty() { String::new() } else { Value::Object(line.fields.clone()).to_string() };
    let cells = [
        &rfc3339(fleet_core::clock::from_ms(line.address.ts_ms)),
        line.device_id.as_str(),
        &if line.seq >= 0 { line.seq.to_string() } else { String::new() },
        line.level.name(),
        line.target.as_deref().unwrap_or_default(),
        &line.message,
        line.trace.as_deref().unwrap_or_default(),
        &fields,
    ]
    .map(quoted);
    text.push_str(&cells.join(","));
    text.push_str("\r\n");
}
