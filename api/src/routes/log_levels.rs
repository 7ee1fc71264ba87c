//! The level at which a device logs, for a while.

use axum::extract::State;
use chrono::{DateTime, TimeDelta, Utc};
use fleet_core::Error;
use fleet_core::audit::Entry;
use fleet_core::device;
use fleet_core::id::DeviceId;
use fleet_core::level::Level;
use fleet_core::log_level::{self, Limited, LogLevel};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;

use crate::extract::{Can, Json, Path, ShadowRead, ShadowWrite};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time::{self, Bucket};

/// The level at which a device logs.
#[derive(Serialize, ToSchema)]
#[schema(as = LogLevel)]
pub(crate) struct LogLevelBody {
    /// What is desired; null: what the device likes.
    #[schema(value_type = Option<String>, example = "debug")]
    desired: Option<Value>,
    /// What the device says; null: nothing.
    #[schema(value_type = Option<String>, example = "info")]
    reported: Option<Value>,
    /// The level that ends by itself, if one is set.
    limited: Option<LimitedBody>,
}

/// A level that ends by itself.
#[derive(Serialize, ToSchema)]
#[schema(as = LimitedLogLevel)]
struct LimitedBody {
    /// The level.
    #[schema(value_type = String, example = "debug")]
    level: Level,
    /// What was desired before, and will be again; null: nothing.
    #[schema(value_type = Option<String>, example = "warn")]
    former: Option<Value>,
    /// When.
    #[serde(serialize_with = "time::serialize")]
    until: DateTime<Utc>,
    /// The id of the user or API key that set it.
    #[schema(example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    set_by: String,
    /// When it was set.
    #[serde(serialize_with = "time::serialize")]
    set_at: DateTime<Utc>,
}

impl LogLevelBody {
    fn new(level: LogLevel) -> Self {
        let LogLevel { desired, reported, limited } = level;
        let limited = limited.map(|Limited { level, former, until, set_by, set_at }| LimitedBody {
            level,
            former,
            until,
            set_by,
            set_at,
        });
        Self { desired, reported, limited }
    }
}

/// A level for a while.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct SetLogLevel {
    /// `trace`, `debug`, `info`, `warn`, `error` or `fatal`.
    #[schema(value_type = String, example = "debug")]
    level: Level,
    /// For how long, such as `30s`, `30m`, `2h`, `1d`; at most `shadow.max_log_level_s`.
    #[schema(example = "30m")]
    r#for: String,
}

impl SetLogLevel {
    fn span(&self, most_s: u64) -> Result<TimeDelta, Problem> {
        let Bucket(span) =
            self.r#for.parse().map_err(|_| Problem::field("for", "expected a span such as 30s, 30m, 2h, 1d"))?;
        if u64::try_from(span.num_seconds()).is_ok_and(|seconds| (1..=most_s).contains(&seconds)) {
            return Ok(span);
        }
        Err(Problem::field("for", format!("expected 1 s to {most_s} s")))
    }
}

/// Read the level at which a device logs
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/log-level", tag = "shadow",
    params(("id" = String, Path, description = "The device's id")),
    security(("bearer" = ["shadow:read"])),
    responses(
        (status = 200, description = "What is desired and reported.", body = LogLevelBody),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<ShadowRead>,
    Path(id): Path<DeviceId>,
) -> Result<Json<LogLevelBody>, Problem> {
    let mut db = caller.read(&app).await?;
    let device = device::key(&mut db, caller.tenant, &id).await?;
    Ok(Json(LogLevelBody::new(log_level::find(&mut db, device).await?)))
}

/// Set the level at which a device logs, for a while
///
/// Sets `desired.log.level` of its shadow, and puts back what was desired before when the time is up. Once more, it is prolonged or shortened.
#[utoipa::path(
    put, path = "/api/v1/devices/{id}/log-level", tag = "shadow", request_body = SetLogLevel,
    params(("id" = String, Path, description = "The device's id")),
    security(("bearer" = ["shadow:write"])),
    responses(
        (status = 200, description = "As it is now.", body = LogLevelBody),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The device has left for good.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn set(
    State(app): State<App>,
    caller: Can<ShadowWrite>,
    Path(id): Path<DeviceId>,
    Json(request): Json<SetLogLevel>,
) -> Result<Json<LogLevelBody>, Problem> {
    let now = app.clock.now();
    let until = now + request.span(app.shadow.max_log_level_s)?;
    let mut tx = caller.change(&app).await?;
    let device = device::find(&mut tx, caller.tenant, &id).await?;
    if device.decommissioned_at.is_some() {
        return Err(Error::Decommissioned(id).into());
    }
    let wanted = (request.level, until);
    let (before, after) = log_level::set(&mut tx, device.key, wanted, &caller.named(), &app.shadow, now).await?;
    let (was, is) = (log_level::told(&before), log_level::told(&after));
    tx.commit(Entry::of("log-level.set", &id).on(&id).before(&was).after(&is)).await?;
    Ok(Json(LogLevelBody::new(after)))
}

/// Put back the level at which a device logged
///
/// Ends a level before its time; when none is set for a while, nothing is done.
#[utoipa::path(
    delete, path = "/api/v1/devices/{id}/log-level", tag = "shadow",
    params(("id" = String, Path, description = "The device's id")),
    security(("bearer" = ["shadow:write"])),
    responses(
        (status = 200, description = "As it is now.", body = LogLevelBody),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn end(
    State(app): State<App>,
    caller: Can<ShadowWrite>,
    Path(id): Path<DeviceId>,
) -> Result<Json<LogLevelBody>, Problem> {
    let mut tx = caller.change(&app).await?;
    let device = device::key(&mut tx, caller.tenant, &id).await?;
    let ended = log_level::end(&mut tx, device, &caller.named(), &app.shadow, app.clock.now()).await?;
    let Some((before, after)) = ended else {
        return Ok(Json(LogLevelBody::new(log_level::find(&mut tx, device).await?)));
    };
    let (was, is) = (log_level::told(&before), log_level::told(&after));
    tx.commit(Entry::of("log-level.end", &id).on(&id).before(&was).after(&is)).await?;
    Ok(Json(LogLevelBody::new(after)))
}
