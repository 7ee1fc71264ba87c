//! Devices: enrol, list, read, change, delete.

use std::collections::BTreeMap;
use std::str::FromStr;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::device::{self, Device, DeviceType, Filter, GroupPath, Labels, MAX_PAGE, NewDevice, Patch};
use fleet_core::gateway;
use fleet_core::id::DeviceId;
use fleet_core::selector::{NEVER_SEEN, STATES};
use fleet_core::status::{self, DeviceStatus};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};

use crate::extract::{
    Caller, Can, Conditions, DevicesRead, DevicesWrite, FromQuery, Json, MergePatch, Once, Params, Path, Query, given,
    not_null,
};
use crate::page::{Cursor, Page, behind};
use crate::problem::{Document, Problem};
use crate::resource::{Resource, current, made, unless_known};
use crate::routes::credentials::NewCredentialBody;
use crate::state::App;
use crate::time;

/// Devices on a page unless it is said.
const DEFAULT_PAGE: usize = 100;

/// A device.
#[derive(Serialize, ToSchema)]
#[schema(as = Device)]
pub(crate) struct DeviceBody {
    /// Its name in topics and URLs; immutable.
    #[schema(value_type = String, example = "boiler-1")]
    id: DeviceId,
    /// What kind of thing it is.
    #[schema(value_type = Option<String>, example = "boiler")]
    r#type: Option<DeviceType>,
    /// Where it belongs.
    #[schema(value_type = Option<String>, example = "site/line-3")]
    group: Option<GroupPath>,
    /// What people say about it.
    #[schema(value_type = BTreeMap<String, String>, example = json!({"site": "oslo"}))]
    labels: Labels,
    /// The device that may speak for it.
    #[schema(value_type = Option<String>)]
    gateway: Option<DeviceId>,
    /// A disabled device may not connect.
    disabled: bool,
    /// When it left for good; it is disabled then.
    #[serde(serialize_with = "time::serialize_maybe")]
    decommissioned_at: Option<DateTime<Utc>>,
    /// What is known of its life.
    status: StatusBody,
    /// Rises with every change; its status and its readings do not count.
    version: i64,
    /// When it was enrolled.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// When it was last changed.
    #[serde(serialize_with = "time::serialize")]
    updated_at: DateTime<Utc>,
}

/// What is known of a device's life.
#[derive(Default, Serialize, ToSchema)]
#[schema(as = DeviceStatus)]
struct StatusBody {
    /// `online`, `sleeping`, `offline`, `lost`, or `never_seen` before the first sign of life.
    #[schema(example = "online")]
    state: &'static str,
    /// Since when.
    #[serde(serialize_with = "time::serialize_maybe")]
    since: Option<DateTime<Utc>>,
    /// When a sleeping device means to be back.
    #[serde(serialize_with = "time::serialize_maybe")]
    sleeping_until: Option<DateTime<Utc>>,
    /// Why the state is what it is.
    reason: Option<String>,
    /// The last sign of life.
    #[serde(serialize_with = "time::serialize_maybe")]
    last_seen_at: Option<DateTime<Utc>>,
    /// The run since its last start.
    boot_id: Option<String>,
    /// What it runs.
    firmware: Option<String>,
    /// Sequence numbers of this run.
    sequence: SequenceBody,
    /// Readings since it was enrolled; one sent twice counts twice.
    received: i64,
    /// Readings whose clock ran ahead.
    clamped: i64,
}

/// Which sequence numbers came since the device's last start, and which did not.
#[derive(Default, Serialize, ToSchema)]
#[schema(as = Sequence)]
struct SequenceBody {
    /// The highest.
    last_seq: Option<i64>,
    /// How many below it never came.
    missing: i64,
    /// The newest of the holes: first and last number of each. They may hold fewer than `missing`.
    #[schema(value_type = Vec<Vec<i64>>, example = json!([[17, 19]]))]
    missing_ranges: Vec<(i64, i64)>,
}

impl StatusBody {
    fn new(status: Option<DeviceStatus>) -> Self {
        let Some(status) = status else { return Self { state: NEVER_SEEN, ..Self::default() } };
        Self {
            state: status.state.as_str(),
            since: Some(status.state_since),
            sleeping_until: status.sleeping_until,
            reason: status.reason,
            last_seen_at: Some(status.last_seen_at),
            boot_id: status.boot_id,
            firmware: status.firmware,
            sequence: SequenceBody {
                last_seq: status.sequence.last_seq,
                missing: status.sequence.missing,
                missing_ranges: status.sequence.missing_ranges,
            },
            received: status.received,
            clamped: status.clamped,
        }
    }
}

impl DeviceBody {
    fn new(device: Device, status: Option<DeviceStatus>) -> Self {
        Self {
            id: device.id,
            r#type: device.kind,
            group: device.group,
            labels: device.labels,
            gateway: device.gateway,
            disabled: device.disabled,
            decommissioned_at: device.decommissioned_at,
            status: StatusBody::new(status),
            version: device.version,
            created_at: device.created_at,
            updated_at: device.updated_at,
        }
    }
}

impl Resource for DeviceBody {
    /// `"{version}-{digest}"`: the version for `If-Match`, the digest because the status changes without it.
    fn tag(&self) -> String {
        let json = serde_json::to_vec(self).unwrap_or_default();
        let digest = u64::from_be_bytes(*Sha256::digest(json).first_chunk().expect("SHA-256 has 32 bytes"));
        format!("\"{}-{digest:016x}\"", self.version)
    }
}

async fn with_status(db: &mut PgConnection, device: Device) -> Result<DeviceBody, Problem> {
    let status = status::get(db, device.key).await?;
    Ok(DeviceBody::new(device, status))
}

/// What people have said about a device, for the audit: its status has no part in it.
pub(crate) fn known(device: Device) -> serde_json::Value {
    let mut body = serde_json::to_value(DeviceBody::new(device, None)).unwrap_or_default();
    if let Some(body) = body.as_object_mut() {
        body.remove("status");
    }
    body
}

/// A device to be enrolled.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct Enrol {
    /// Its name in topics and URLs, 1 to 64 of `A-Z a-z 0-9 . _ -`, not beginning with `_`; immutable.
    #[schema(value_type = String, example = "boiler-1")]
    id: DeviceId,
    /// What kind of thing it is; spelt like an id.
    #[schema(value_type = Option<String>, example = "boiler")]
    r#type: Option<DeviceType>,
    /// Where it belongs: names joined by `/`, at most 255 bytes.
    #[schema(value_type = Option<String>, example = "site/line-3")]
    group: Option<GroupPath>,
    /// What people say about it: at most 64; keys of 1 to 63 of `A-Z a-z 0-9 . _ - /`, values of at most 256 characters.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>, example = json!({"site": "oslo"}))]
    labels: Labels,
    /// The device that may speak for it: one that has no gateway of its own.
    #[schema(value_type = Option<String>)]
    gateway: Option<DeviceId>,
}

/// A device that was just enrolled.
#[derive(Serialize, ToSchema)]
pub(crate) struct Enrolled {
    /// The device.
    device: DeviceBody,
    /// Its first credential. The password is shown this once.
    credential: NewCredentialBody,
}

impl Resource for Enrolled {
    fn tag(&self) -> String {
        self.device.tag()
    }
}

/// Enrol a device
///
/// The answer holds the MQTT user name and password. The password is shown this once.
#[utoipa::path(
    post, path = "/api/v1/devices", tag = "devices", request_body = Enrol,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["devices:write"])),
    responses(
        (status = 201, description = "It was enrolled.", body = Enrolled, headers(
            ("Location" = String, description = "Where the device is."),
            ("ETag" = String, description = "For If-Match."),
            ("Idempotency-Replayed" = String, description = "`true` on the answer to a repetition; its password is null."),
        )),
        (status = 409, description = "A device of that id exists.", body = Document, content_type = "application/problem+json"),
        (status = 422, description = "The gateway does not exist or cannot be one, or the Idempotency-Key was used for another request.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn enrol(
    State(app): State<App>,
    caller: Can<DevicesWrite>,
    once: Once,
    Json(request): Json<Enrol>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/device/id", location)),
    };
    let Enrol { id, r#type: kind, group, labels, gateway } = request;
    let new = NewDevice { id, kind, group, labels, gateway };
    let (device, issued) = device::enrol(&mut tx, caller.tenant, &new, app.clock.now()).await?;
    check_room(&mut tx, &caller, device.gateway.as_ref(), &app).await?;
    let mut body = Enrolled { device: DeviceBody::new(device, None), credential: NewCredentialBody::new(issued) };
    let password = body.credential.take_password();
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("device.enrol", &new.id).on(&new.id).after(&body)).await?;
    body.credential.put_password(password);
    Ok(made(location(new.id.as_str()), body))
}

/// Refuses a gateway that has too many children now.
async fn check_room(
    db: &mut PgConnection,
    caller: &Caller,
    gateway: Option<&DeviceId>,
    app: &App,
) -> Result<(), Problem> {
    match gateway {
        Some(gateway) => Ok(gateway::check_room(db, caller.tenant, gateway, app.provisioning.max_children).await?),
        None => Ok(()),
    }
}

fn location(id: &str) -> String {
    format!("/api/v1/devices/{id}")
}

/// Which devices.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `List` reads, as the document tells it")]
pub(crate) struct ListQuery {
    /// Of this type.
    r#type: Option<String>,
    /// In this group or below it.
    group: Option<String>,
    /// `online`, `sleeping`, `offline`, `lost` or `never_seen`.
    state: Option<String>,
    /// `key=value`; repeated or separated by commas, all must hold. A comma in a value is written `\,`.
    label: Option<Vec<String>>,
    /// Such as `type:freezer AND label.site:oslo AND firmware:<2.0`, in the query language: what it picks must hold beside all the
    /// others.
    selector: Option<String>,
    /// Devices on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct List {
    filter: Filter,
    after: Option<DeviceId>,
    limit: usize,
}

impl FromQuery for List {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let filter = Filter {
            kind: query.one("type"),
            group: query.one("group"),
            state: query.one::<StateName>("state").map(|state| state.0.to_owned()),
            labels: wanted_labels(query),
            selector: query.selector("selector"),
        };
        let limit = query.limit(DEFAULT_PAGE, MAX_PAGE);
        let after = behind(query);
        Some(Self { filter, after, limit })
    }
}

struct StateName(&'static str);

impl FromStr for StateName {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let found = STATES.iter().find(|state| **state == text);
        found.map(|state| Self(state)).ok_or_else(|| format!("expected one of {}", STATES.join(", ")))
    }
}

fn wanted_labels(query: &mut Params<'_>) -> Labels {
    let mut wanted = BTreeMap::new();
    for text in query.all("label") {
        for pair in unescaped(&text) {
            match pair.split_once('=') {
                Some((key, value)) => {
                    if wanted.insert(key.to_owned(), value.to_owned()).is_some_and(|before| before != value) {
                        query.refuse("label", format!("{key:?} is asked for twice: a label has one value"));
                    }
                }
                None => query.refuse("label", "expected key=value, and \\, for a comma in a value"),
            }
        }
    }
    Labels::try_from(wanted).unwrap_or_else(|error| {
        query.refuse("label", error.to_string());
        Labels::default()
    })
}

/// Splits at commas; `\,` is a comma and `\\` a backslash.
fn unescaped(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut letters = text.chars();
    while let Some(letter) = letters.next() {
        let literal = if letter == '\\' { letters.next() } else { None };
        match (letter, literal) {
            (',', _) => parts.push(String::new()),
            (letter, literal) => parts.last_mut().expect("never empty").push(literal.unwrap_or(letter)),
        }
    }
    parts
}

/// List devices
///
/// In the order of their ids.
#[utoipa::path(
    get, path = "/api/v1/devices", tag = "devices", params(ListQuery), security(("bearer" = ["devices:read"])),
    responses((status = 200, description = "A page of them.", body = Page<DeviceBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<DevicesRead>,
    Query(query): Query<List>,
) -> Result<Json<Page<DeviceBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let page = device::page(&mut db, caller.tenant, &query.filter, query.after.as_ref(), query.limit).await?;
    let keys = page.items.iter().map(|device| device.key).collect::<Vec<_>>();
    let mut statuses = status::of(&mut db, &keys).await?;
    let with_status = |device: Device| {
        let status = statuses.remove(&device.key);
        DeviceBody::new(device, status)
    };
    let items = page.items.into_iter().map(with_status).collect();
    Ok(Json(Page { items, next_cursor: page.next.map(Cursor::Device) }))
}

/// Read a device
#[utoipa::path(
    get, path = "/api/v1/devices/{id}", tag = "devices",
    params(
        ("id" = String, Path, description = "The device's id"),
        ("If-None-Match" = Option<String>, Header, description = "The ETag of what the caller has"),
    ),
    security(("bearer" = ["devices:read"])),
    responses(
        (status = 200, description = "The device.", body = DeviceBody, headers(("ETag" = String, description = "For If-Match and If-None-Match."))),
        (status = 304, description = "The caller has it already."),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<DevicesRead>,
    Path(id): Path<DeviceId>,
    conditions: Conditions,
) -> Result<Response, Problem> {
    let mut db = caller.read(&app).await?;
    let device = device::find(&mut db, caller.tenant, &id).await?;
    let body = with_status(&mut db, device).await?;
    Ok(unless_known(&conditions, body))
}

/// What to change (RFC 7396): what is left out stays, null clears.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[expect(clippy::option_option, reason = "left out, null, a value")]
pub(crate) struct Change {
    /// What kind of thing it is.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    r#type: Option<Option<DeviceType>>,
    /// Where it belongs.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    group: Option<Option<GroupPath>>,
    /// Labels to set; null removes one, and in place of the object all of them.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<BTreeMap<String, Option<String>>>, example = json!({"site": "bergen", "old": null}))]
    labels: Option<Option<BTreeMap<String, Option<String>>>>,
    /// The device that may speak for it.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<String>)]
    gateway: Option<Option<DeviceId>>,
    /// A disabled device may not connect.
    #[serde(default, deserialize_with = "not_null")]
    #[schema(value_type = bool)]
    disabled: Option<bool>,
}

/// Change a device
///
/// A JSON merge patch. With If-Match, only if nobody has changed the device since. It may not leave the caller's scope, nor get to where
/// the caller could do more with it.
#[utoipa::path(
    patch, path = "/api/v1/devices/{id}", tag = "devices",
    request_body(content = Change, content_type = "application/merge-patch+json"),
    params(
        ("id" = String, Path, description = "The device's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read; its version counts"),
    ),
    security(("bearer" = ["devices:write"])),
    responses(
        (status = 200, description = "The device as it is now.", body = DeviceBody, headers(("ETag" = String, description = "For If-Match."))),
        (status = 403, description = "It would leave the caller's scope, or the caller would gain a right over it.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
        (status = 422, description = "The gateway does not exist or cannot be one.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn change(
    State(app): State<App>,
    caller: Can<DevicesWrite>,
    Path(id): Path<DeviceId>,
    conditions: Conditions,
    MergePatch(change): MergePatch<Change>,
) -> Result<Response, Problem> {
    let Change { r#type: kind, group, labels, gateway, disabled } = change;
    let patch = Patch { kind, group, labels, gateway, disabled };
    let mut tx = caller.change(&app).await?;
    let now = app.clock.now();
    let (old, new) = device::update(&mut tx, caller.tenant, &id, &patch, &conditions.versions(), now).await?;
    if let Some(gained) = caller.principal().grants().gained(&old.attributes(), &new.attributes()) {
        return Err(fleet_core::Error::Gains(gained).into());
    }
    check_room(&mut tx, &caller, patch.gateway.flatten().as_ref(), &app).await?;
    let body = with_status(&mut tx, new.clone()).await?;
    tx.commit(Entry::of("device.update", &id).on(&id).before(&known(old)).after(&known(new))).await?;
    Ok(current(body))
}

/// Delete a device
///
/// Its credentials end at once; its readings can no longer be asked for. Its children stay, without a gateway.
#[utoipa::path(
    delete, path = "/api/v1/devices/{id}", tag = "devices",
    params(
        ("id" = String, Path, description = "The device's id"),
        ("If-Match" = Option<String>, Header, description = "The ETag of what the caller read; its version counts"),
    ),
    security(("bearer" = ["devices:write"])),
    responses(
        (status = 204, description = "It is gone."),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
        (status = 412, description = "It has changed since.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn delete(
    State(app): State<App>,
    caller: Can<DevicesWrite>,
    Path(id): Path<DeviceId>,
    conditions: Conditions,
) -> Result<StatusCode, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = device::delete(&mut tx, caller.tenant, &id, &conditions.versions(), app.clock.now()).await?;
    tx.commit(Entry::of("device.delete", &id).on(&id).before(&known(old))).await?;
    Ok(StatusCode::NO_CONTENT)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_list_of_labels_is_read_as_it_is_written(parts in prop::collection::vec("[a-c,=\\\\ä]{0,6}", 1..5)) {
            let written = parts.iter().map(|part| part.replace('\\', "\\\\").replace(',', "\\,")).collect::<Vec<_>>();
            prop_assert_eq!(unescaped(&written.join(",")), parts);
        }
    }
}
