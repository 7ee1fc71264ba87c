//! Shadows: what a device is to be, and what it says it is.

use axum::extract::State;
use axum::response::Response;
use chrono::{DateTime, Utc};
use fleet_core::Error;
use fleet_core::audit::Entry;
use fleet_core::device;
use fleet_core::dispatch::{self, Kind};
use fleet_core::id::DeviceId;
use fleet_core::shadow::{self, Document as Members, Shadow, Side};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, Conditions, FromQuery, MergePatch, Params, Path, Query, ShadowRead, ShadowWrite, given};
use crate::problem::{Document, Problem};
use crate::resource::{Resource, current, unless_known};
use crate::state::App;
use crate::time::{self, Moment};

/// A device's shadow.
#[derive(Serialize, ToSchema)]
#[schema(as = Shadow)]
pub(crate) struct ShadowBody {
    /// What it is to be, as people and programs say.
    #[schema(value_type = Object, example = json!({"log": {"level": "debug"}}))]
    desired: Members,
    /// What it says it is.
    #[schema(value_type = Object, example = json!({"log": {"level": "info"}, "fan": 3}))]
    reported: Members,
    /// What is desired and not reported.
    #[schema(value_type = Object, example = json!({"log": {"level": "debug"}}))]
    delta: Members,
    /// Rises with every change; 0 before the first.
    version: i64,
    /// When it was changed; null before the first time.
    #[serde(serialize_with = "time::serialize_maybe")]
    updated_at: Option<DateTime<Utc>>,
}

impl ShadowBody {
    pub(crate) fn new(shadow: Shadow) -> Self {
        let delta = shadow.delta();
        let Shadow { desired, reported, version, updated_at } = shadow;
        Self { desired, reported, delta, version, updated_at }
    }
}

impl Resource for ShadowBody {
    fn tag(&self) -> String {
        format!("\"{}\"", self.version)
    }
}

/// When.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `At` reads, as the document tells it")]
pub(crate) struct AtQuery {
    /// As it was then: RFC 3339, or milliseconds since the epoch.
    at: Option<String>,
}

pub(crate) struct At(Option<DateTime<Utc>>);

impl FromQuery for At {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        Some(Self(query.one::<Moment>("at").map(|moment| moment.0)))
    }
}

/// Read a shadow
///
/// What the device is to be, what it says it is, and the difference. With `at`, as it was then: a bounded number of versions is kept.
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/shadow", tag = "shadow",
    params(
        ("id" = String, Path, description = "The device's id"),
        AtQuery,
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has"),
    ),
    security(("bearer" = ["shadow:read"])),
    responses(
        (status = 200, description = "The shadow.", body = ShadowBody, headers(("ETag" = String, description = "For If-Match and If-None-Match."))),
        (status = 304, description = "The caller has it already."),
        (status = 404, description = "There is no such device, or what its shadow was then is not kept any more.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<ShadowRead>,
    Path(id): Path<DeviceId>,
    Query(At(at)): Query<At>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let mut db = caller.read(&app).await?;
    let device = device::key(&mut db, caller.tenant, &id).await?;
    let shadow = match at {
        Some(at) => shadow::at(&mut db, device, at).await?,
        None => shadow::find(&mut db, device).await?,
    };
    Ok(unless_known(&conditions, ShadowBody::new(shadow)))
}

/// What a device is to be.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::option_option, reason = "left out, null, a value")]
pub(crate) struct ShadowChange {
    /// Members to set (RFC 7396): null deletes one, objects are merged, arrays replaced; null in place of the object deletes all.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Object, example = json!({"log": {"level": "debug"}}))]
    desired: Option<Option<Members>>,
    /// The version it must have; another one is refused with 409.
    version: Option<i64>,
}

/// Change what a device is to be
///
/// A JSON merge patch. The device is sent the difference at once if it listens, else when it comes back. With `version` in the body
/// (409), or If-Match (412), only if nobody has changed the shadow since, the device included.
#[utoipa::path(
    patch, path = "/api/v1/devices/{id}/shadow", tag = "shadow",
    request_body(content = ShadowChange, content_type = "application/merge-patch+json"),
    params(
        ("id" = String, Path, description = "The device's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read"),
    ),
    security(("bearer" = ["shadow:write"])),
    responses(
        (status = 200, description = "The shadow as it is now.", body = ShadowBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The shadow has another version, or the device has left for good.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
        (status = 413, description = "It would be too large.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(app): State<App>,
    caller: Can<ShadowWrite>,
    Path(id): Path<DeviceId>,
    conditions: Conditions,
    MergePatch(change): MergePatch<ShadowChange>,
) -> Result<Response, Problem> {
    let Some(patch) = change.desired else {
        return Err(Problem::field("desired", "expected an object, or null to delete all of it"));
    };
    let mut tx = caller.change(&app).await?;
    let device = device::find(&mut tx, caller.tenant, &id).await?;
    if device.decommissioned_at.is_some() {
        return Err(Error::Decommissioned(id).into());
    }
    let change =
        shadow::Change { side: Side::Desired, patch, version: change.version, if_match: conditions.versions() };
    let by = caller.named();
    let changed = shadow::change(&mut tx, device.key, &change, &by, &app.shadow, app.clock.now()).await?;
    if changed.after.version != changed.before.version {
        dispatch::note(&mut tx, device.key, Kind::Shadow).await?;
    }
    let (before, after) = (known(&changed.before), known(&changed.after));
    tx.commit(Entry::of("shadow.update", &id).on(&id).before(&before).after(&after)).await?;
    Ok(current(ShadowBody::new(changed.after)))
}

/// What people have said, for the audit.
pub(crate) fn known(shadow: &Shadow) -> serde_json::Value {
    serde_json::json!({ "desired": shadow.desired })
}
