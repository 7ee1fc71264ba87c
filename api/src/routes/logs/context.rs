//! What else a device wrote around a line.

use axum::extract::State;
use fleet_core::device;
use fleet_core::log::{self, Context, MAX_AROUND};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::{LineBody, LineId};
use crate::extract::{Can, FromQuery, Json, LogsRead, Params, Query};
use crate::problem::{Document, Problem};
use crate::state::App;

/// Lines on each side unless it is said.
const DEFAULT_AROUND: usize = 20;

/// A line among those of its device.
#[derive(Serialize, ToSchema)]
#[schema(as = LogContext)]
pub(crate) struct ContextBody {
    /// Those before it, oldest first.
    before: Vec<LineBody>,
    /// It.
    line: LineBody,
    /// Those behind it, oldest first.
    after: Vec<LineBody>,
}

impl ContextBody {
    fn new(context: &Context) -> Self {
        let bodies = |lines: &[log::Line]| lines.iter().map(|line| LineBody::new(line, Vec::new())).collect();
        Self {
            before: bodies(&context.before),
            line: LineBody::new(&context.line, Vec::new()),
            after: bodies(&context.after),
        }
    }
}

/// Around which line, and how many.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Around` reads, as the document tells it")]
pub(crate) struct ContextQuery {
    /// The `id` of the line.
    #[param(example = "MTc2MzcyNjQwMDAwMCw5MTkscHVtcC03")]
    id: String,
    /// Lines before it.
    #[param(minimum = 0, maximum = 500, default = 20)]
    before: Option<usize>,
    /// Lines behind it.
    #[param(minimum = 0, maximum = 500, default = 20)]
    after: Option<usize>,
}

pub(crate) struct Around {
    id: LineId,
    before: usize,
    after: usize,
}

impl FromQuery for Around {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let given = query.all("id");
        let id = given.first().filter(|_| given.len() == 1).and_then(|id| id.parse().ok());
        if id.is_none() {
            query.refuse("id", "expected the id of a line, once");
        }
        let mut side = |name| {
            let count = query.one::<usize>(name).unwrap_or(DEFAULT_AROUND);
            if count > MAX_AROUND {
                query.refuse(name, format!("expected a number from 0 to {MAX_AROUND}"));
            }
            count
        };
        let (before, after) = (side("before"), side("after"));
        Some(Self { id: id?, before, after })
    }
}

/// Read what is around a line
///
/// Lines of the same device, whatever query found it, in the order of their times.
#[utoipa::path(
    get, path = "/api/v1/logs/context", tag = "logs", params(ContextQuery), security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "The line among its neighbours.", body = ContextBody),
        (status = 400, description = "A parameter is not valid.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such line that the caller may see.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn context(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(Around { id, before, after }): Query<Around>,
) -> Result<Json<ContextBody>, Problem> {
    let mut db = caller.read(&app).await?;
    let device = device::open(&mut db, caller.tenant, &id.device).await?;
    let found = log::context(&mut db, device, (id.ts_ms, id.seq), before, after).await?;
    let gone = || Problem::new(404, "no-such-line", "there is no such line, or no longer");
    Ok(Json(ContextBody::new(&found.ok_or_else(gone)?)))
}
