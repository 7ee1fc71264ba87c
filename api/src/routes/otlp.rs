//! Log lines from programs that speak OpenTelemetry: OTLP/HTTP.

use std::collections::{HashMap, HashSet};

use axum::extract::{Request, State};
use axum::response::Response;
use fleet_core::device;
use fleet_core::id::{DeviceId, DeviceKey};
use fleet_core::log::Record;
use fleet_core::log::intake::NotStored;
use opentelemetry_proto::tonic::collector::logs::v1::ExportLogsServiceRequest;

use crate::extract::{Can, LogsWrite, body, expect_type};
use crate::otlp::{Encoding, inflated, record};
use crate::problem::Problem;
use crate::state::App;

/// Most of a name that is told back.
const TOLD_CHARS: usize = 64;

/// Store log records: OTLP/HTTP
///
/// An `ExportLogsServiceRequest` of the OpenTelemetry Protocol, in Protobuf or in its JSON, gzip or not. A record belongs to the device
/// that its attribute `device.id` names, else the attribute `device.id`, `service.instance.id` or `host.name` of its resource. It is
/// answered when everything is committed; records of devices that the caller may not write for, and those that the rate limit of
/// their device keeps out, are counted in `partialSuccess`. Refusals are a `google.rpc.Status` in the encoding of the request.
#[utoipa::path(
    post,
    path = "/v1/logs",
    tag = "logs",
    security(("bearer" = ["logs:write"])),
    request_body(
        content((Vec<u8> = "application/x-protobuf"), (Object = "application/json")),
        description = "opentelemetry.proto.collector.logs.v1.ExportLogsServiceRequest"
    ),
    responses(
        (status = 200, description = "Stored, but for what `partialSuccess` counts", body = Object),
        (status = 400, description = "It cannot be read"),
        (status = 401, description = "No token, or none that is valid"),
        (status = 403, description = "The permission is missing"),
        (status = 413, description = "Too large, also when it is not compressed any more, or too many records, parts or bytes of lines: send less at once"),
        (status = 415, description = "Neither Protobuf nor JSON, or compressed otherwise"),
        (status = 429, description = "As much waits as may: come again after `Retry-After`"),
        (status = 503, description = "The database is away: come again after `Retry-After`"),
    )
)]
pub(crate) async fn ingest(
    State(app): State<App>,
    caller: Can<LogsWrite>,
    request: Request,
) -> Result<Response, Problem> {
    expect_type(request.headers(), &Encoding::ALL.map(|(kind, _)| kind))?;
    let encoding = Encoding::of(request.headers()).unwrap_or(Encoding::Json);
    let headers = request.headers().clone();
    let reading = app.otlp.reading.try_acquire().map_err(|_| busy())?;
    let most = app.otlp.settings.max_body_bytes;
    let read = encoding.read(&inflated(&headers, body(request, &app, most).await?, most)?, most)?;
    let records = count(&read);
    if records > app.otlp.settings.max_records {
        let detail = format!("{records} records: expected at most {} in a request", app.otlp.settings.max_records);
        return Err(Problem::new(413, "body-too-large", detail));
    }
    let known = devices(&read, &caller, &app).await?;
    let (lines, unknown) = lines(read, &known, app.otlp.settings.queue_bytes)?;
    drop(reading);
    let outcome = app.otlp.intake.store(lines).await?;
    app.otlp.unknown.inc_by(unknown.records);
    Ok(encoding.answer(unknown.records + outcome.suppressed, &why(&unknown, outcome.suppressed)))
}

fn busy() -> Problem {
    Problem::new(429, "busy", "too many requests are being read: come again")
}

impl From<NotStored> for Problem {
    fn from(why: NotStored) -> Self {
        let (status, kind) = match why {
            NotStored::Full => (429, "busy"),
            NotStored::Away => (503, "database-away"),
            NotStored::Refused => (400, "invalid"),
        };
        Self::new(status, kind, why.to_string())
    }
}

fn count(request: &ExportLogsServiceRequest) -> usize {
    let scopes = request.resource_logs.iter().flat_map(|resource| &resource.scope_logs);
    scopes.map(|scope| scope.log_records.len()).sum()
}

/// The devices that are named and that the caller may write for.
async fn devices(
    request: &ExportLogsServiceRequest,
    caller: &Can<LogsWrite>,
    app: &App,
) -> Result<HashMap<String, DeviceKey>, Problem> {
    let mut names = HashSet::new();
    for resource in &request.resource_logs {
        let of_resource = record::names_of_resource(resource.resource.as_ref());
        for record in resource.scope_logs.iter().flat_map(|scope| &scope.log_records) {
            names.extend(record::names(record, &[]));
        }
        names.extend(of_resource);
    }
    let names = names.into_iter().filter_map(|name| DeviceId::try_from(name.to_owned()).ok()).collect::<Vec<_>>();
    if names.is_empty() {
        return Ok(HashMap::new());
    }
    let mut db = caller.read(app).await?;
    let known = device::enabled_among(&mut db, caller.tenant, &names).await?;
    Ok(known.into_iter().map(|(id, key)| (id.to_string(), key)).collect())
}

/// Records of no device that the caller may write for.
#[derive(Default)]
struct Unknown {
    records: u64,
    first: Option<String>,
}

/// The lines of a request, unless they take more than `most` bytes: each has a copy of what its resource says.
fn lines(
    request: ExportLogsServiceRequest,
    known: &HashMap<String, DeviceKey>,
    most: usize,
) -> Result<(Vec<(DeviceKey, Record)>, Unknown), Problem> {
    let (mut lines, mut unknown, mut bytes) = (Vec::new(), Unknown::default(), 0);
    for resource in request.resource_logs {
        let from = resource.resource.as_ref();
        let of_resource = record::names_of_resource(from);
        for scope in resource.scope_logs {
            for record in scope.log_records {
                let device = record::names(&record, &of_resource).find_map(|name| known.get(name).copied());
                if let Some(device) = device {
                    let line = record::line(record, from, scope.scope.as_ref());
                    bytes += line.bytes();
                    if bytes > most {
                        let detail = format!("the lines take more than {most} bytes: send fewer records at once");
                        return Err(Problem::new(413, "body-too-large", detail));
                    }
                    lines.push((device, line));
                } else {
                    unknown.records += 1;
                    unknown.first.get_or_insert_with(|| {
                        let named = record::names(&record, &of_resource).next().unwrap_or_default();
                        named.chars().take(TOLD_CHARS).collect()
                    });
                }
            }
        }
    }
    Ok((lines, unknown))
}

/// Why records are rejected, for whoever reads the log of the exporter.
fn why(unknown: &Unknown, suppressed: u64) -> String {
    let of_nobody = unknown.first.as_ref().map(|first| {
        format!(
            "{} records name no enabled device that this key may write for (the first: {first:?}): expected its id in the attribute \
             device.id, or in device.id, service.instance.id or host.name of the resource",
            unknown.records
        )
    });
    let too_many =
        (suppressed > 0).then(|| format!("{suppressed} records are suppressed by the rate limit of their device"));
    of_nobody.into_iter().chain(too_many).collect::<Vec<_>>().join("; ")
}
