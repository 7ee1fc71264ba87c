//! Payloads that could not be read.

use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use chrono::{DateTime, Utc};
use fleet_core::dead_letter::{self, DeadLetterRow, MAX_PAGE};
use fleet_core::id::{DeadLetterId, DeviceId};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, DeadLettersRead, FromQuery, Json, Params, Query};
use crate::page::{Cursor, Page, behind};
use crate::problem::Problem;
use crate::state::App;
use crate::time;

/// Dead letters on a page unless it is said.
const DEFAULT_PAGE: usize = 100;
/// Most dead letters on a page.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const LARGEST_PAGE: usize = MAX_PAGE as usize;

/// A payload that was acknowledged and could not be read.
#[derive(Serialize, ToSchema)]
#[schema(as = DeadLetter)]
pub(crate) struct DeadLetterBody {
    /// Its id.
    #[schema(value_type = String, example = "dlq_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: DeadLetterId,
    /// The device that sent it.
    #[schema(example = "boiler-1")]
    device: String,
    /// The topic it was sent to.
    topic: String,
    /// Why it could not be read.
    reason: String,
    /// The payload, when it is text.
    payload: Option<String>,
    /// The payload in base64, when it is not.
    payload_base64: Option<String>,
    /// When it came.
    #[serde(serialize_with = "time::serialize")]
    received_at: DateTime<Utc>,
}

impl DeadLetterBody {
    fn new(row: DeadLetterRow) -> Self {
        let (payload, payload_base64) = match String::from_utf8(row.payload) {
            Ok(text) => (Some(text), None),
            Err(bytes) => (None, Some(STANDARD.encode(bytes.as_bytes()))),
        };
        let DeadLetterRow { id, device, topic, reason, received_at, .. } = row;
        Self { id, device, topic, reason, payload, payload_base64, received_at }
    }
}

/// Which dead letters.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `List` reads, as the document tells it")]
pub(crate) struct ListQuery {
    /// Of this device.
    device: Option<String>,
    /// Dead letters on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct List {
    device: Option<DeviceId>,
    before: Option<DeadLetterId>,
    limit: usize,
}

impl FromQuery for List {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let before = behind(query);
        Some(Self { device: query.one("device"), before, limit: query.limit(DEFAULT_PAGE, LARGEST_PAGE) })
    }
}

/// List dead letters
///
/// Newest first.
#[utoipa::path(
    get, path = "/api/v1/dead-letters", tag = "dead-letters", params(ListQuery),
    security(("bearer" = ["dead-letters:read"])),
    responses((status = 200, description = "A page of them.", body = Page<DeadLetterBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<DeadLettersRead>,
    Query(query): Query<List>,
) -> Result<Json<Page<DeadLetterBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let asked = i64::try_from(query.limit).unwrap_or(MAX_PAGE).saturating_add(1);
    let rows = dead_letter::page(&mut db, caller.tenant, query.device.as_ref(), query.before, asked).await?;
    let key = |row: &DeadLetterRow| Cursor::DeadLetter(row.id);
    Ok(Json(Page::cut(rows, query.limit, LARGEST_PAGE, key, DeadLetterBody::new)))
}
