//! Devices that leave for good, and the reports of what was deleted of them.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::decommission::{self, Counts, Decommission};
use fleet_core::id::{DecommissionId, DeviceId, UserId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, DevicesDecommission, FromQuery, Json, Params, Path, Query};
use crate::page::{Cursor, Page, Paging};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;

/// Whether a device that leaves is still being cleared away.
#[derive(Clone, Copy, Serialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
#[schema(as = DecommissionState)]
enum Progress {
    /// There is something left.
    Running,
    /// Nothing is left of what was to go.
    Finished,
}

/// That a device leaves, or has left, and what was deleted of it.
#[derive(Serialize, ToSchema)]
#[schema(as = Decommission)]
pub(crate) struct DecommissionBody {
    /// Its id.
    #[schema(value_type = String, example = "dcm_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: DecommissionId,
    /// The device; after a purge another one may have its id.
    #[schema(value_type = String, example = "boiler-1")]
    device: DeviceId,
    /// Whether everything that is known of it goes, itself included.
    purge: bool,
    /// Whether it goes on.
    state: Progress,
    /// Who wanted it.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    asked_by: UserId,
    /// When.
    #[serde(serialize_with = "time::serialize")]
    asked_at: DateTime<Utc>,
    /// Rows that were deleted so far, by table.
    #[schema(value_type = BTreeMap<String, i64>, example = json!({"telemetry": 91250, "credential": 2, "device": 1}))]
    deleted: Counts,
    /// Rows that were left when the same tables were counted again in the end: zeros. Null while it goes on.
    #[schema(value_type = Option<BTreeMap<String, i64>>, example = json!({"telemetry": 0, "credential": 0, "device": 0}))]
    left: Option<Counts>,
    /// When nothing was left.
    #[serde(serialize_with = "time::serialize_maybe")]
    finished_at: Option<DateTime<Utc>>,
}

impl DecommissionBody {
    fn new(report: Decommission) -> Self {
        let Decommission { id, device, purge, asked_by, asked_at, deleted, left, finished_at } = report;
        let state = if finished_at.is_some() { Progress::Finished } else { Progress::Running };
        Self { id, device, purge, state, asked_by, asked_at, deleted, left, finished_at }
    }
}

/// How a device is to leave.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Leave {
    /// Whether everything that is known of it goes, itself included.
    #[serde(default)]
    purge: bool,
}

/// Decommission a device
///
/// It is shut out for good: its credentials and certificates are revoked, its connections end within a second, and it cannot be enabled
/// again. Then its sessions and retained messages are deleted; with `purge` everything else too, in the end the device. The report, to be asked for again,
/// counts what was deleted and, once it is finished, what was left. Asking again while it goes on answers the same, and may make it a purge.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/decommission", tag = "devices", request_body = Leave,
    params(("id" = String, Path, description = "The device's id")), security(("bearer" = ["devices:decommission"])),
    responses(
        (status = 202, description = "It is shut out; what is to be deleted is being deleted.", body = DecommissionBody,
         headers(("Location" = String, description = "Where the report is."))),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn begin(
    State(app): State<App>,
    caller: Can<DevicesDecommission>,
    Path(id): Path<DeviceId>,
    Json(Leave { purge }): Json<Leave>,
) -> Result<Response, Problem> {
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let (device, report) = decommission::begin(&mut tx, caller.tenant, &id, purge, caller.id, now).await?;
    let body = DecommissionBody::new(report);
    let entry = Entry::of("device.decommission", &id).on(&id).before(&super::devices::known(device)).after(&body);
    tx.commit(entry).await?;
    let location = format!("/api/v1/decommissions/{}", body.id);
    Ok((StatusCode::ACCEPTED, [(header::LOCATION, location)], Json(body)).into_response())
}

/// Which reports.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Wanted` reads, as the document tells it")]
pub(crate) struct ListQuery {
    /// Of devices of this id.
    device: Option<String>,
    /// Reports on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct Wanted {
    device: Option<DeviceId>,
    paging: Paging<DecommissionId>,
}

impl FromQuery for Wanted {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        Some(Self { device: query.one("device"), paging: Paging::from_query(query)? })
    }
}

/// List decommissions
///
/// In the order in which they were asked for.
#[utoipa::path(
    get, path = "/api/v1/decommissions", tag = "devices", params(ListQuery),
    security(("bearer" = ["devices:decommission"])),
    responses((status = 200, description = "A page of them.", body = Page<DecommissionBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<DevicesDecommission>,
    Query(Wanted { device, paging }): Query<Wanted>,
) -> Result<Json<Page<DecommissionBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let (reports, next) =
        decommission::page(&mut db, caller.tenant, device.as_ref(), paging.after, paging.limit).await?;
    let items = reports.into_iter().map(DecommissionBody::new).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::Decommission) }))
}

/// Read the report of a decommission
#[utoipa::path(
    get, path = "/api/v1/decommissions/{id}", tag = "devices",
    params(("id" = String, Path, description = "The id of the decommission")),
    security(("bearer" = ["devices:decommission"])),
    responses(
        (status = 200, description = "The report, as far as it is.", body = DecommissionBody),
        (status = 404, description = "There is no such decommission.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<DevicesDecommission>,
    Path(id): Path<DecommissionId>,
) -> Result<Json<DecommissionBody>, Problem> {
    let report = decommission::find(&mut *caller.read(&app).await?, caller.tenant, id).await?;
    Ok(Json(DecommissionBody::new(report)))
}
