//! Commands: what devices are to do, and what becomes of it.

use std::str::FromStr;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::Error;
use fleet_core::audit::Entry;
use fleet_core::command::{self, Command, MAX_PAGE, Name, New};
use fleet_core::device;
use fleet_core::id::{CommandId, DeviceId};
use fleet_core::level::Level;
use fleet_core::query;
use fleet_core::shadow::Document as Members;
use fleet_core::status::{self, DeviceStatus};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, CommandsSend, FromQuery, Json, Once, Params, Path, Query};
use crate::page::{Cursor, Page, behind};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time::{self, Bucket, Moment};

/// Commands on a page unless it is said.
const DEFAULT_PAGE: usize = 100;
/// Most commands on a page.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const LARGEST_PAGE: usize = MAX_PAGE as usize;
/// Lines asked for unless it is said.
const DEFAULT_LINES: u32 = 1_000;
/// Most lines that may be asked for.
const MAX_LINES: u32 = 100_000;
/// Longest text that lines are to contain, in characters.
const MAX_CONTAINS_CHARS: usize = 256;

/// A command.
#[derive(Serialize, ToSchema)]
#[schema(as = Command)]
pub(crate) struct CommandBody {
    /// Its id.
    #[schema(value_type = String, example = "cmd_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: CommandId,
    /// The device.
    #[schema(value_type = String, example = "boiler-1")]
    device: DeviceId,
    /// What is to be done.
    #[schema(example = "reboot")]
    name: String,
    /// With what.
    #[schema(value_type = Object)]
    params: Value,
    /// `queued`, `sent`, `delivered`, `in_progress`, `succeeded`, `failed`, `rejected`, `timed_out`, `expired` or `cancelled`.
    #[schema(example = "delivered")]
    state: &'static str,
    /// Why it is not finished; null when it is.
    waits_for: Option<String>,
    /// Until when it is worth something.
    #[serde(serialize_with = "time::serialize")]
    deadline: DateTime<Utc>,
    /// How much of it is done, 0 to 100, as the device says.
    progress: Option<f64>,
    /// What came of it, as the device says.
    result: Option<Value>,
    /// What went wrong, as the device says.
    error: Option<Value>,
    /// How it came to its state: each with its time and evidence; what the device said too late has no state.
    #[schema(value_type = Vec<Object>, example = json!([{"state": "queued", "at": "2026-11-22T09:00:00.000Z", "evidence": {"by": "usr_019360f0c7f97d2a8b3c5d6e7f809a1b"}}]))]
    steps: Value,
    /// The id of the user or API key that ordered it.
    created_by: String,
    /// When.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// When it was changed last.
    #[serde(serialize_with = "time::serialize")]
    updated_at: DateTime<Utc>,
}

impl CommandBody {
    fn new(command: Command, status: Option<&DeviceStatus>) -> Self {
        let waits_for = command.waits_for(status);
        Self {
            id: command.id,
            device: command.device,
            name: command.name,
            params: command.params,
            state: command.state.name(),
            waits_for,
            deadline: command.deadline,
            progress: command.progress,
            result: command.result,
            error: command.error,
            steps: command.steps,
            created_by: command.created_by,
            created_at: command.created_at,
            updated_at: command.updated_at,
        }
    }
}

/// A command to be ordered.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewCommand {
    /// What is to be done: 1 to 64 of `a-z 0-9 . _ -`.
    #[schema(example = "reboot")]
    name: String,
    /// With what.
    #[serde(default)]
    #[schema(value_type = Object, example = json!({"delay_s": 5}))]
    params: Members,
    /// Until when it is worth something: RFC 3339, or milliseconds since the epoch.
    deadline: Option<String>,
    /// The same as a span from now, such as `30s`, `15m`, `2h`, `1d`. Without either, `commands.default_timeout_s`.
    #[schema(example = "15m")]
    timeout: Option<String>,
}

/// When it is to be done by.
fn deadline(deadline: Option<&str>, timeout: Option<&str>, app: &App) -> Result<DateTime<Utc>, Problem> {
    let (now, settings) = (app.clock.now(), &app.commands);
    let seconds = |seconds: u64| chrono::TimeDelta::seconds(i64::try_from(seconds).unwrap_or(i64::MAX / 1_000));
    let at = match (deadline, timeout) {
        (Some(_), Some(_)) => return Err(Problem::field("timeout", "expected either deadline or timeout")),
        (Some(deadline), None) => {
            deadline.parse::<Moment>().map_err(|expected| Problem::field("deadline", expected))?.0
        }
        (None, Some(timeout)) => {
            now + timeout.parse::<Bucket>().map_err(|expected| Problem::field("timeout", expected))?.0
        }
        (None, None) => now + seconds(settings.default_timeout_s),
    };
    if at <= now || at > now + seconds(settings.max_timeout_s) {
        let most = settings.max_timeout_s;
        let field = if deadline.is_some() { "deadline" } else { "timeout" };
        return Err(Problem::field(field, format!("expected a time that is to come, at most {most} s ahead")));
    }
    Ok(at)
}

fn location(id: &str) -> String {
    format!("/api/v1/commands/{id}")
}

/// Order a command
///
/// It is sent when the device listens on `commands/+/request`: at once, or when it connects until the deadline.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/commands", tag = "commands", request_body = NewCommand,
    params(
        ("id" = String, Path, description = "The device's id"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again"),
    ),
    security(("bearer" = ["commands:send"])),
    responses(
        (status = 201, description = "It waits for the device.", body = CommandBody, headers(("Location" = String, description = "Where the command is."))),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The device has too many unfinished commands, or has left for good.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn send(
    State(app): State<App>,
    caller: Can<CommandsSend>,
    Path(id): Path<DeviceId>,
    once: Once,
    Json(request): Json<NewCommand>,
) -> Result<Response, Problem> {
    let name = request.name.parse::<Name>().map_err(|error| Problem::field("name", error.to_string()))?;
    let deadline = deadline(request.deadline.as_deref(), request.timeout.as_deref(), &app)?;
    let new = New { name, params: request.params.clone(), deadline };
    order(&app, &caller, &id, once, &request, &new).await
}

/// Which lines a device is to upload.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct UploadLogs {
    /// From when on: RFC 3339, a day, such as `now-1h`, or milliseconds since the epoch.
    #[schema(example = "now-1h")]
    from: Option<String>,
    /// Until when.
    to: Option<String>,
    /// The least level: `trace`, `debug`, `info`, `warn`, `error` or `fatal`.
    #[schema(value_type = Option<String>, example = "debug")]
    level: Option<Level>,
    /// A text that each line is to contain, letters taken as they are.
    contains: Option<String>,
    /// The newest so many at the most; 1,000 unless it is said, at most 100,000.
    #[schema(example = 500)]
    max_lines: Option<u32>,
    /// Until when it is worth something: RFC 3339, or milliseconds since the epoch.
    deadline: Option<String>,
    /// The same as a span from now.
    timeout: Option<String>,
}

impl UploadLogs {
    fn params(&self, now: DateTime<Utc>) -> Result<Members, Problem> {
        let moment = |field: &'static str, text: &Option<String>| {
            let Some(text) = text else { return Ok(None) };
            let plain = text.parse::<Moment>().ok().map(|moment| moment.0.timestamp_millis());
            let relative = || query::time(text, now).map(|(start, _)| start).filter(|at| time::RANGE_MS.contains(at));
            let expected =
                || Problem::field(field, format!("expected {}, or milliseconds since the epoch", query::A_TIME));
            plain.or_else(relative).map(Some).ok_or_else(expected)
        };
        let (from, to) = (moment("from", &self.from)?, moment("to", &self.to)?);
        if let (Some(from), Some(to)) = (from, to)
            && from > to
        {
            return Err(Problem::field("to", "expected a time that is not before `from`"));
        }
        let max_lines = self.max_lines.unwrap_or(DEFAULT_LINES);
        if !(1..=MAX_LINES).contains(&max_lines) {
            return Err(Problem::field("max_lines", format!("expected 1 to {MAX_LINES}")));
        }
        if self.contains.as_ref().is_some_and(|text| text.chars().count() > MAX_CONTAINS_CHARS) {
            return Err(Problem::field("contains", format!("expected at most {MAX_CONTAINS_CHARS} characters")));
        }
        let all =
            json!({ "from": from, "to": to, "level": self.level, "contains": self.contains, "max_lines": max_lines });
        let Value::Object(all) = all else { return Ok(Members::new()) };
        Ok(all.into_iter().filter(|(_, value)| !value.is_null()).collect())
    }
}

/// Have a device upload older log lines
///
/// Orders the command `log.upload` with the filter. The device publishes the lines to its topic `logs`, where one that is there already is
/// stored once, and answers with their number.
#[utoipa::path(
    post, path = "/api/v1/devices/{id}/logs/upload", tag = "commands", request_body = UploadLogs,
    params(
        ("id" = String, Path, description = "The device's id"),
        ("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again"),
    ),
    security(("bearer" = ["commands:send"])),
    responses(
        (status = 201, description = "It waits for the device.", body = CommandBody, headers(("Location" = String, description = "Where the command is."))),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The device has too many unfinished commands, or has left for good.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn upload_logs(
    State(app): State<App>,
    caller: Can<CommandsSend>,
    Path(id): Path<DeviceId>,
    once: Once,
    Json(request): Json<UploadLogs>,
) -> Result<Response, Problem> {
    let deadline = deadline(request.deadline.as_deref(), request.timeout.as_deref(), &app)?;
    let name = Name::from_str("log.upload")?;
    let new = New { name, params: request.params(app.clock.now())?, deadline };
    order(&app, &caller, &id, once, &request, &new).await
}

async fn order(
    app: &App,
    caller: &Can<CommandsSend>,
    id: &DeviceId,
    once: Once,
    request: &(impl Serialize + Sync),
    new: &New,
) -> Result<Response, Problem> {
    let mut tx = caller.change(app).await?;
    let taken = match once.begin(&mut tx, caller, request, app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let device = device::find(&mut tx, caller.tenant, id).await?;
    if device.decommissioned_at.is_some() {
        return Err(Error::Decommissioned(id.clone()).into());
    }
    let now = app.clock.now();
    let made = command::create(&mut tx, (device.key, id), new, &caller.named(), &app.commands, now).await?;
    let status = status::get(&mut tx, device.key).await?;
    let at = location(&made.id.to_string());
    let entry = Entry::of("command.send", made.id).on(id).after(&known(&made));
    let body = CommandBody::new(made, status.as_ref());
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(entry).await?;
    Ok((StatusCode::CREATED, [(header::LOCATION, at)], Json(body)).into_response())
}

/// What people have said, for the audit.
fn known(command: &Command) -> Value {
    json!({ "name": command.name, "params": command.params, "deadline": time::rfc3339(command.deadline), "state": command.state.name() })
}

/// Which commands.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `List` reads, as the document tells it")]
pub(crate) struct CommandsQuery {
    /// In this state.
    state: Option<String>,
    /// Commands on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

struct StateName(command::State);

impl FromStr for StateName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let names = command::State::ALL.map(command::State::name).join(", ");
        command::State::named(text).map(Self).ok_or_else(|| format!("expected one of {names}"))
    }
}

pub(crate) struct List {
    state: Option<command::State>,
    before: Option<CommandId>,
    limit: usize,
}

impl FromQuery for List {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let state = query.one::<StateName>("state").map(|state| state.0);
        let before = behind(query);
        Some(Self { state, before, limit: query.limit(DEFAULT_PAGE, LARGEST_PAGE) })
    }
}

/// List the commands of a device
///
/// Newest first.
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/commands", tag = "commands",
    params(("id" = String, Path, description = "The device's id"), CommandsQuery),
    security(("bearer" = ["commands:send"])),
    responses(
        (status = 200, description = "A page of them.", body = Page<CommandBody>),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<CommandsSend>,
    Path(id): Path<DeviceId>,
    Query(List { state, before, limit }): Query<List>,
) -> Result<Json<Page<CommandBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let device = device::key(&mut db, caller.tenant, &id).await?;
    let asked = i64::try_from(limit).unwrap_or(MAX_PAGE).saturating_add(1);
    let commands = command::page(&mut db, device, state, before, asked).await?;
    let status = status::get(&mut db, device).await?;
    let key = |command: &Command| Cursor::Command(command.id);
    let body = |command: Command| CommandBody::new(command, status.as_ref());
    Ok(Json(Page::cut(commands, limit, LARGEST_PAGE, key, body)))
}

/// Read a command
#[utoipa::path(
    get, path = "/api/v1/commands/{id}", tag = "commands",
    params(("id" = String, Path, description = "The command's id")),
    security(("bearer" = ["commands:send"])),
    responses(
        (status = 200, description = "The command.", body = CommandBody),
        (status = 404, description = "There is no such command.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<CommandsSend>,
    Path(id): Path<CommandId>,
) -> Result<Json<CommandBody>, Problem> {
    let mut db = caller.read(&app).await?;
    let command = command::find(&mut db, caller.tenant, id).await?;
    let status = status::get(&mut db, command.device_key).await?;
    Ok(Json(CommandBody::new(command, status.as_ref())))
}

/// Cancel a command
///
/// One that was not sent will not be. A device that has it may do it all the same; what it says then is kept as evidence.
#[utoipa::path(
    post, path = "/api/v1/commands/{id}/cancel", tag = "commands",
    params(("id" = String, Path, description = "The command's id")),
    security(("bearer" = ["commands:send"])),
    responses(
        (status = 200, description = "As it is now.", body = CommandBody),
        (status = 404, description = "There is no such command.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is finished.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn cancel(
    State(app): State<App>,
    caller: Can<CommandsSend>,
    Path(id): Path<CommandId>,
) -> Result<Json<CommandBody>, Problem> {
    let mut tx = caller.change(&app).await?;
    let (before, after) = command::cancel(&mut tx, caller.tenant, id, &caller.named(), app.clock.now()).await?;
    let entry = Entry::of("command.cancel", id).on(&after.device).before(&known(&before)).after(&known(&after));
    tx.commit(entry).await?;
    Ok(Json(CommandBody::new(after, None)))
}
