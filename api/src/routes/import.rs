//! Many devices at once, from a file.

use std::str::FromStr;

use axum::body::Bytes;
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use fleet_core::audit::Entry;
use fleet_core::device::NewDevice;
use fleet_core::id::DeviceId;
use fleet_core::import::{self, Enrolled, Errors, Format, Import};
use fleet_core::policy::Permission;
use serde::Serialize;
use serde_json::json;
use sha2::{Digest, Sha256};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, DevicesWrite, FromQuery, Json, Once, Params, Query, body, expect_type, wants_csv};
use crate::problem::{Document, LineError, Problem};
use crate::routes::credentials::NewCredentialBody;
use crate::state::App;

const FORMATS: [(&str, Format); 3] =
    [("text/csv", Format::Csv), ("application/json", Format::Json), ("application/x-ndjson", Format::JsonLines)];

/// A file, of a type and a size that are read.
pub(crate) struct File {
    format: Format,
    bytes: Bytes,
}

impl FromRequest<App> for File {
    type Rejection = Problem;

    async fn from_request(request: Request, app: &App) -> Result<Self, Problem> {
        let kind = expect_type(request.headers(), &FORMATS.map(|(kind, _)| kind))?;
        let format = FORMATS.into_iter().find(|(known, _)| *known == kind).map_or(Format::Json, |(_, format)| format);
        let bytes = body(request, app, app.provisioning.max_import_bytes).await?;
        Ok(Self { format, bytes })
    }
}

/// How to import.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `How` reads, as the document tells it")]
pub(crate) struct HowQuery {
    /// Checks the file and enrols nothing.
    #[param(default = false)]
    dry_run: Option<bool>,
}

pub(crate) struct How {
    dry_run: bool,
}

impl FromQuery for How {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        Some(Self { dry_run: query.one::<Flag>("dry_run").is_some_and(|flag| flag.0) })
    }
}

struct Flag(bool);

impl FromStr for Flag {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        text.parse().map(Self).map_err(|_| "expected true or false")
    }
}

/// What was enrolled.
#[derive(Serialize, ToSchema)]
pub(crate) struct Imported {
    /// Whether nothing was to be enrolled.
    dry_run: bool,
    /// How many devices the file has.
    rows: usize,
    /// How many were enrolled: all of them, or none in a dry run.
    enrolled: usize,
    /// The devices in the order of the file; empty in a dry run, and when the request is a repetition of an earlier one.
    devices: Vec<ImportedDevice>,
}

/// A device that was enrolled from a file.
#[derive(Serialize, ToSchema)]
pub(crate) struct ImportedDevice {
    /// Where it stood: the line, in a JSON array the place, from 1.
    line: u64,
    /// Its id.
    #[schema(value_type = String, example = "boiler-1")]
    id: DeviceId,
    /// Its first credential. The password is shown this once.
    credential: NewCredentialBody,
}

impl ImportedDevice {
    fn new(enrolled: Enrolled) -> Self {
        Self { line: enrolled.line, id: enrolled.id, credential: NewCredentialBody::new(enrolled.credential) }
    }
}

/// Import devices
///
/// All of them or none. The body is CSV (the first line names the columns `id`, `type`, `group`, `gateway` and `labels.` with the key of
/// a label behind it), a JSON array of objects as for enrolling one, or such objects line by line. Gateways may stand in the
/// same file in any order. The answer holds a credential for each device, as JSON or, with `Accept: text/csv`, as
/// `id,username,password`; the passwords are shown this once. It takes `credentials:manage` too.
#[utoipa::path(
    post, path = "/api/v1/devices/import", tag = "devices",
    request_body(content(
        (String = "text/csv", example = "id,type,group,labels.site,gateway\r\ngw-1,gateway,oslo,harbour,\r\nfreezer-1,freezer,oslo,harbour,gw-1\r\n"),
        (Vec<crate::routes::devices::Enrol> = "application/json"),
        (String = "application/x-ndjson"),
    )),
    params(
        HowQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again"),
        ("Accept" = Option<String>, Header, description = "`text/csv` for an answer in CSV"),
    ),
    security(("bearer" = ["devices:write"])),
    responses(
        (status = 201, description = "All were enrolled.", content(
            (Imported = "application/json"), (String = "text/csv", example = "id,username,password\r\n"),
        ), headers(("Idempotency-Replayed" = String, description = "`true` on the answer to a repetition; it has no devices."))),
        (status = 200, description = "A dry run: all could be enrolled.", body = Imported),
        (status = 413, description = "The file is too large, or has too many rows.", body = Document, content_type = "application/problem+json"),
        (status = 422, description = "Some rows are wrong; `lines` tells at most 100 of them. Nothing was enrolled.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn import(
    State(app): State<App>,
    caller: Can<DevicesWrite>,
    Query(how): Query<How>,
    headers: HeaderMap,
    once: Once,
    file: File,
) -> Result<Response, Problem> {
    caller.needs(Permission::CredentialsManage)?;
    let digest = Sha256::digest(&file.bytes).to_vec();
    let most = app.provisioning.max_import_rows;
    let mut import = import::read(file.format, &file.bytes, most);
    if import.is_too_long {
        let detail = format!("the file has more than {most} rows: expected several files");
        return Err(Problem::new(413, "too-many-rows", detail));
    }
    let rows = import.rows();
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &(how.dry_run, digest), &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.into_response()),
    };
    import::check(&mut tx, caller.tenant, &mut import, app.provisioning.max_children).await?;
    let mut answer = Imported { dry_run: how.dry_run, rows, enrolled: 0, devices: Vec::new() };
    if how.dry_run && import.errors.is_empty() {
        return Ok(Json(answer).into_response());
    }
    if !import.errors.is_empty() {
        return Err(refused(import.errors, rows));
    }
    let enrolled = import::enrol(&mut tx, caller.tenant, &mut import, app.clock.now()).await?;
    if !import.errors.is_empty() {
        return Err(refused(import.errors, rows));
    }
    answer.enrolled = enrolled.len();
    taken.finish(&mut tx, StatusCode::CREATED, &answer).await?;
    tx.commit_each(entries(&import, &enrolled)).await?;
    if wants_csv(&headers) {
        let csv = import::to_csv(&enrolled)?;
        return Ok((StatusCode::CREATED, [(header::CONTENT_TYPE, "text/csv; charset=utf-8")], csv).into_response());
    }
    answer.devices = enrolled.into_iter().map(ImportedDevice::new).collect();
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

/// One for each device, so that the origin of each is found.
fn entries(import: &Import, enrolled: &[Enrolled]) -> Vec<Entry> {
    let entry = |(new, made): (&NewDevice, &Enrolled)| {
        let NewDevice { id, kind, group, labels, gateway } = new;
        let credential = made.credential.id;
        let after = json!({ "id": id, "type": kind, "group": group, "labels": labels, "gateway": gateway, "credential": credential });
        Entry::of("device.enrol", id).on(id).after(&after)
    };
    import.devices().zip(enrolled).map(entry).collect()
}

fn refused(errors: Errors, rows: usize) -> Problem {
    let count = errors.count();
    let lines = errors.listed();
    let detail = format!("nothing was enrolled: {count} errors in {rows} rows, of which {} are listed", lines.len());
    let told = |error: import::LineError| LineError { line: error.line, id: error.id, error: error.error };
    Problem::lines(detail, lines.into_iter().map(told).collect())
}
