//! The index of log lines: how far it is, whether it is right, and making it anew. For those who run the server.

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::index::{self, Index, Looked, Name, Task};
use serde::{Deserialize, Serialize};
use serde_json::json;
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Json, MaybeJson};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// The index of log lines, as this process keeps it.
#[derive(Serialize, ToSchema)]
#[schema(as = Index)]
pub(crate) struct IndexBody {
    /// `ok`: everything that was stored can be found, after a second or so. Else answers may lack lines: `catching_up` with what was
    /// stored before it was there, `rebuilding` a day that could not be read, `disk_full` until there is room, `failing`.
    #[schema(example = "ok")]
    state: &'static str,
    /// Why it cannot go on.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    /// Lines that were stored and cannot be found yet.
    behind: u64,
    /// Its days, the newest first.
    days: Vec<IndexDay>,
    /// The last verification or rebuilding that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    job: Option<IndexJob>,
}

/// A day of the index.
#[derive(Serialize, ToSchema)]
pub(crate) struct IndexDay {
    /// Which, in UTC; `other`: all that is older than the oldest day kept apart.
    #[schema(example = "2026-11-22")]
    day: String,
    /// Its lines.
    lines: u64,
    /// The parts they are in.
    segments: usize,
    /// What its files take.
    bytes: u64,
    /// Whether it is being made anew. It is searched all the same.
    rebuilding: bool,
}

/// Work on days.
#[derive(Serialize, ToSchema)]
pub(crate) struct IndexJob {
    /// `verify` or `rebuild`.
    #[schema(example = "verify")]
    task: &'static str,
    /// Since when.
    #[serde(serialize_with = "time::serialize")]
    started_at: DateTime<Utc>,
    /// When it ended.
    #[serde(serialize_with = "time::serialize_maybe", skip_serializing_if = "Option::is_none")]
    finished_at: Option<DateTime<Utc>>,
    /// The days it is about, the newest first.
    days: Vec<String>,
    /// Those that are done.
    done: Vec<IndexFound>,
}

/// What was found of a day.
#[derive(Serialize, ToSchema)]
pub(crate) struct IndexFound {
    /// Which.
    day: String,
    /// Whether the index leads to the lines of the database, and to no others, by the same words.
    equal: bool,
    /// Lines in the index.
    #[serde(skip_serializing_if = "Option::is_none")]
    index_lines: Option<u64>,
    /// Lines in the database.
    #[serde(skip_serializing_if = "Option::is_none")]
    table_lines: Option<u64>,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl IndexFound {
    fn new(looked: Looked) -> Self {
        let day = looked.name.to_string();
        match looked.found {
            Ok(found) => Self {
                day,
                equal: found.is_equal,
                index_lines: Some(found.index_lines),
                table_lines: Some(found.table_lines),
                error: None,
            },
            Err(error) => Self { day, equal: false, index_lines: None, table_lines: None, error: Some(error) },
        }
    }
}

impl IndexBody {
    fn new(index: &Index) -> Self {
        let state = index.state();
        let day = |day: index::DayStatus| IndexDay {
            day: day.name.to_string(),
            lines: day.lines,
            segments: day.segments,
            bytes: day.bytes,
            rebuilding: day.is_rebuilding,
        };
        let job = index.job().map(|job| IndexJob {
            task: name(job.task),
            started_at: job.started_at,
            finished_at: job.finished_at,
            days: job.days.iter().map(Name::to_string).collect(),
            done: job.looked.into_iter().map(IndexFound::new).collect(),
        });
        Self {
            state: state.name(),
            reason: state.reason().map(ToOwned::to_owned),
            behind: index.behind(),
            days: index.status().into_iter().map(day).collect(),
            job,
        }
    }
}

fn name(task: Task) -> &'static str {
    match task {
        Task::Verify => "verify",
        Task::Rebuild => "rebuild",
    }
}

/// Which days.
#[derive(Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct IndexDays {
    /// One day, `2026-11-22` or `other`; else all of them.
    #[serde(default)]
    #[schema(example = "2026-11-22")]
    day: Option<String>,
}

impl IndexDays {
    fn name(&self) -> Result<Option<Name>, Problem> {
        let expected = || fleet_core::Error::Invalid("`day`: expected a day such as 2026-11-22, or `other`".to_owned());
        Ok(self.day.as_deref().map(|day| day.parse().map_err(|()| expected())).transpose()?)
    }
}

/// See the index
///
/// How far the index of log lines is, and what the last verification found. For who has platform standing.
#[utoipa::path(
    get, path = "/api/v1/index", tag = "operations", security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "The index.", body = IndexBody),
        (status = 403, description = "The caller has no platform standing.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn show(State(app): State<App>, caller: Can<AccessManage>) -> Result<Json<IndexBody>, Problem> {
    caller.needs_platform("see the index")?;
    Ok(Json(IndexBody::new(app.index()?)))
}

/// Verify the index
///
/// Compares days with the rows of the database, word by word; `GET /index` shows what comes of it. Search and ingest go on. For who has
/// platform standing.
#[utoipa::path(
    post, path = "/api/v1/index/verify", tag = "operations", request_body = Option<IndexDays>,
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 202, description = "It begins.", body = IndexBody),
        (status = 400, description = "There is no such day.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "The caller has no platform standing.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Such work goes on already.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn verify(
    State(app): State<App>,
    caller: Can<AccessManage>,
    MaybeJson(request): MaybeJson<IndexDays>,
) -> Result<(StatusCode, Json<IndexBody>), Problem> {
    begin(app, caller, Task::Verify, "verify the index", request).await
}

/// Rebuild the index
///
/// Makes days anew from the rows of the database, and verifies them; `GET /index` shows what comes of it. A day is searched as it was
/// until the new one takes its place. For who has platform standing.
#[utoipa::path(
    post, path = "/api/v1/index/rebuild", tag = "operations", request_body = Option<IndexDays>,
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 202, description = "It begins.", body = IndexBody),
        (status = 400, description = "There is no such day.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "The caller has no platform standing.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Such work goes on already.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn rebuild(
    State(app): State<App>,
    caller: Can<AccessManage>,
    MaybeJson(request): MaybeJson<IndexDays>,
) -> Result<(StatusCode, Json<IndexBody>), Problem> {
    begin(app, caller, Task::Rebuild, "rebuild the index", request).await
}

async fn begin(
    app: App,
    caller: Can<AccessManage>,
    task: Task,
    what: &'static str,
    request: IndexDays,
) -> Result<(StatusCode, Json<IndexBody>), Problem> {
    let tx = caller.change_platform(&app, what).await?;
    let (index, day) = (app.index()?, request.name()?);
    index.begin(&app.db, &app.clock, task, day).await?;
    let entry = match task {
        Task::Verify => Entry::of("index.verify", request.day.as_deref().unwrap_or("all")),
        Task::Rebuild => Entry::of("index.rebuild", request.day.as_deref().unwrap_or("all")),
    };
    tx.commit(entry.after(&json!({ "day": request.day }))).await?;
    Ok((StatusCode::ACCEPTED, Json(IndexBody::new(index))))
}
