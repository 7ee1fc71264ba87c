//! Claims: secrets by which devices ask to come in, and the inbox of what they asked.

use std::str::FromStr;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::claim::request::{self, Approve, Filter, Kept, State as RequestState};
use fleet_core::claim::{self, Approval, Claim, IdPattern, NewClaim, Template};
use fleet_core::control::Request;
use fleet_core::device::{DeviceType, GroupPath, Labels};
use fleet_core::id::{ClaimId, ClaimRequestId, DeviceId, UserId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, FromQuery, Json, MaybeJson, Once, Params, Path, ProvisioningManage, Query};
use crate::page::{Cursor, Page, Paging, PagingQuery};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time;
use crate::tx::Change;

/// A claim without its secret.
#[derive(Serialize, ToSchema)]
#[schema(as = Claim)]
pub(crate) struct ClaimBody {
    /// The claim's id.
    #[schema(value_type = String, example = "clm_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: ClaimId,
    /// What people call it.
    #[schema(example = "freezers, May")]
    name: String,
    /// `open`, `used-up`, `expired` or `revoked`.
    #[schema(example = "open")]
    state: &'static str,
    /// The MQTT user name of devices that ask by it.
    #[schema(example = "main/_claim/clm_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    username: String,
    /// `auto`: devices come in at once. `manual`: somebody approves each.
    #[schema(value_type = String, example = "manual")]
    approval: Approval,
    /// What kind of things its devices are; null: what they say.
    #[schema(value_type = Option<String>, example = "freezer")]
    r#type: Option<DeviceType>,
    /// Where they belong.
    #[schema(value_type = Option<String>, example = "oslo/harbour")]
    group: Option<GroupPath>,
    /// Labels they get, whatever they say.
    #[schema(value_type = BTreeMap<String, String>, example = json!({"batch": "7"}))]
    labels: Labels,
    /// Which ids may be asked for: each `*` stands for any letters. Null: any.
    #[schema(value_type = Option<String>, example = "freezer-*")]
    id_pattern: Option<IdPattern>,
    /// How many devices may come by it.
    max_devices: u32,
    /// How many have.
    enrolled: u32,
    /// How many wait for approval.
    pending: u32,
    /// Requests that were refused.
    refused: i64,
    /// Why the last of them was.
    last_refusal: Option<String>,
    /// When.
    #[serde(serialize_with = "time::serialize_maybe")]
    last_refused_at: Option<DateTime<Utc>>,
    /// Who made it.
    #[schema(value_type = String, example = "usr_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    created_by: UserId,
    /// When it was made.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
    /// It is refused from then on.
    #[serde(serialize_with = "time::serialize")]
    expires_at: DateTime<Utc>,
    /// When it was revoked.
    #[serde(serialize_with = "time::serialize_maybe")]
    revoked_at: Option<DateTime<Utc>>,
}

impl ClaimBody {
    fn new(claim: Claim, caller: &Can<ProvisioningManage>, now: DateTime<Utc>) -> Self {
        let (state, Template { kind, group, labels }) = (claim.state(now), claim.template);
        Self {
            id: claim.id,
            name: claim.name,
            state,
            username: claim::username(&caller.principal().tenant_id, claim.id),
            approval: claim.approval,
            r#type: kind,
            group,
            labels,
            id_pattern: claim.id_pattern,
            max_devices: claim.max_devices,
            enrolled: claim.enrolled,
            pending: claim.pending,
            refused: claim.refused,
            last_refusal: claim.last_refusal,
            last_refused_at: claim.last_refused_at,
            created_by: claim.created_by,
            created_at: claim.created_at,
            expires_at: claim.expires_at,
            revoked_at: claim.revoked_at,
        }
    }
}

/// A claim that was just made.
#[derive(Serialize, ToSchema)]
#[schema(as = NewClaim)]
pub(crate) struct MadeClaim {
    #[serde(flatten)]
    claim: ClaimBody,
    /// The MQTT password of devices that ask by it, and what `POST /provision` takes as bearer; shown this once. Null when the
    /// request is a repetition of an earlier one.
    #[schema(example = "mc_…")]
    secret: Option<String>,
}

/// A claim to be made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct MakeClaim {
    /// What people call it.
    #[schema(example = "freezers, May", min_length = 1, max_length = 100)]
    name: String,
    /// `auto`: devices come in at once. `manual`: somebody approves each.
    #[schema(value_type = String, example = "manual")]
    approval: Approval,
    /// How many devices may come by it.
    #[schema(example = 500, minimum = 1)]
    max_devices: u32,
    /// How long it is accepted, in seconds.
    #[schema(example = 2_592_000, minimum = 1)]
    expires_in_s: u64,
    /// What kind of things its devices are; left out: what they say.
    #[schema(value_type = Option<String>, example = "freezer")]
    r#type: Option<DeviceType>,
    /// Where they belong.
    #[schema(value_type = Option<String>, example = "oslo/harbour")]
    group: Option<GroupPath>,
    /// Labels they get, whatever they say.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>, example = json!({"batch": "7"}))]
    labels: Labels,
    /// Which ids may be asked for: each `*` stands for any letters. Left out: any.
    #[schema(value_type = Option<String>, example = "freezer-*")]
    id_pattern: Option<IdPattern>,
}

/// Make a claim
///
/// A secret that a batch of devices is made with, by which each of them may ask to become a device of the fleet, and nothing else.
/// The secret is shown this once.
#[utoipa::path(
    post, path = "/api/v1/claims", tag = "claims", request_body = MakeClaim,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["provisioning:manage"])),
    responses(
        (status = 201, description = "It was made. The secret is shown this once.", body = MadeClaim),
        (status = 409, description = "There are too many claims.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<ProvisioningManage>,
    once: Once,
    Json(request): Json<MakeClaim>,
) -> Result<Response, Problem> {
    let mut tx = caller.change(&app).await?;
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let MakeClaim { name, approval, max_devices, expires_in_s, r#type: kind, group, labels, id_pattern } = request;
    let template = Template { kind, group, labels };
    let new = NewClaim { name, approval, template, id_pattern, max_devices, expires_in_s };
    let now = app.clock.now();
    let (claim, secret) = claim::create(&mut tx, caller.tenant, caller.id, &new, &app.provisioning, now).await?;
    let mut body = MadeClaim { claim: ClaimBody::new(claim, &caller, now), secret: None };
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(Entry::of("claim.create", body.claim.id).after(&body.claim)).await?;
    body.secret = Some(secret.expose().to_owned());
    Ok((StatusCode::CREATED, [(header::LOCATION, location(&body.claim.id.to_string()))], Json(body)).into_response())
}

fn location(id: &str) -> String {
    format!("/api/v1/claims/{id}")
}

/// List claims
///
/// In the order they were made, ended ones too.
#[utoipa::path(
    get, path = "/api/v1/claims", tag = "claims", params(PagingQuery), security(("bearer" = ["provisioning:manage"])),
    responses((status = 200, description = "A page of them.", body = Page<ClaimBody>))
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<ProvisioningManage>,
    Query(query): Query<Paging<ClaimId>>,
) -> Result<Json<Page<ClaimBody>>, Problem> {
    let now = app.clock.now();
    let mut db = caller.read(&app).await?;
    let (claims, next) = claim::page(&mut db, caller.tenant, query.after, query.limit).await?;
    let items = claims.into_iter().map(|claim| ClaimBody::new(claim, &caller, now)).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::Claim) }))
}

/// Read a claim
///
/// Who came by it: `GET /claims/requests?claim=…`.
#[utoipa::path(
    get, path = "/api/v1/claims/{id}", tag = "claims",
    params(("id" = String, Path, description = "The claim's id")),
    security(("bearer" = ["provisioning:manage"])),
    responses(
        (status = 200, description = "The claim.", body = ClaimBody),
        (status = 404, description = "There is no such claim.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<ProvisioningManage>,
    Path(id): Path<ClaimId>,
) -> Result<Json<ClaimBody>, Problem> {
    let mut db = caller.read(&app).await?;
    let claim = claim::find(&mut db, caller.tenant, id).await?;
    Ok(Json(ClaimBody::new(claim, &caller, app.clock.now())))
}

/// Revoke a claim
///
/// It is refused from now on, open connections by it end, and what waits for approval is rejected. Devices that came by it stay. It
/// is listed further on; revoking it again changes nothing.
#[utoipa::path(
    delete, path = "/api/v1/claims/{id}", tag = "claims",
    params(("id" = String, Path, description = "The claim's id")),
    security(("bearer" = ["provisioning:manage"])),
    responses(
        (status = 204, description = "It is revoked."),
        (status = 404, description = "There is no such claim.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn revoke(
    State(app): State<App>,
    caller: Can<ProvisioningManage>,
    Path(id): Path<ClaimId>,
) -> Result<StatusCode, Problem> {
    let now = app.clock.now();
    let mut tx = caller.change(&app).await?;
    let (old, new) = claim::revoke(&mut tx, caller.tenant, id, now).await?;
    let [old, new] = [old, new].map(|claim| ClaimBody::new(claim, &caller, now));
    tx.commit(Entry::of("claim.revoke", id).before(&old).after(&new)).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What was asked by a claim.
#[derive(Serialize, ToSchema)]
#[schema(as = ClaimRequest)]
pub(crate) struct ClaimRequestBody {
    /// The request's id.
    #[schema(value_type = String, example = "crq_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    id: ClaimRequestId,
    /// By which claim it came.
    #[schema(value_type = String, example = "clm_019360f0c7f97d2a8b3c5d6e7f809a1b")]
    claim: ClaimId,
    /// The id it wants, or has as a device.
    #[schema(value_type = String, example = "freezer-1")]
    device: DeviceId,
    /// What kind of thing it says it is.
    #[schema(value_type = Option<String>, example = "freezer")]
    r#type: Option<DeviceType>,
    /// What it says about itself.
    #[schema(value_type = BTreeMap<String, String>)]
    labels: Labels,
    /// The number on its plate, as it says.
    serial: Option<String>,
    /// What the client calls itself.
    asker: String,
    /// Its address.
    address: String,
    /// `pending`, `approved` or `rejected`.
    #[schema(example = "pending")]
    state: &'static str,
    /// Why it was rejected.
    reason: Option<String>,
    /// How often it was asked.
    asked: i32,
    /// First.
    #[serde(serialize_with = "time::serialize")]
    asked_at: DateTime<Utc>,
    /// Last.
    #[serde(serialize_with = "time::serialize")]
    last_asked_at: DateTime<Utc>,
    /// When it was decided.
    #[serde(serialize_with = "time::serialize_maybe")]
    decided_at: Option<DateTime<Utc>>,
    /// By whom; null where nobody had to.
    #[schema(value_type = Option<String>)]
    decided_by: Option<UserId>,
}

impl ClaimRequestBody {
    fn new(kept: Kept) -> Self {
        Self {
            id: kept.id,
            claim: kept.claim,
            device: kept.device,
            r#type: kept.kind,
            labels: kept.labels,
            serial: kept.serial,
            asker: kept.asker,
            address: kept.address,
            state: kept.state.as_str(),
            reason: kept.reason,
            asked: kept.asked,
            asked_at: kept.asked_at,
            last_asked_at: kept.last_asked_at,
            decided_at: kept.decided_at,
            decided_by: kept.decided_by,
        }
    }
}

/// Which requests.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Wanted` reads, as the document tells it")]
pub(crate) struct WantedQuery {
    /// `pending`, `approved` or `rejected`.
    state: Option<String>,
    /// By this claim.
    claim: Option<String>,
    /// Items on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct Wanted {
    filter: Filter,
    paging: Paging<ClaimRequestId>,
}

impl FromQuery for Wanted {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let filter = Filter { state: query.one::<StateName>("state").map(|name| name.0), claim: query.one("claim") };
        Some(Self { filter, paging: Paging::from_query(query)? })
    }
}

struct StateName(RequestState);

impl FromStr for StateName {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let found = RequestState::ALL.into_iter().find(|state| state.as_str() == text);
        found.map(Self).ok_or("expected pending, approved or rejected")
    }
}

/// List what was asked by claims
///
/// In the order it came; `state=pending` is the inbox.
#[utoipa::path(
    get, path = "/api/v1/claims/requests", tag = "claims", params(WantedQuery),
    security(("bearer" = ["provisioning:manage"])),
    responses((status = 200, description = "A page of them.", body = Page<ClaimRequestBody>))
)]
pub(crate) async fn requests(
    State(app): State<App>,
    caller: Can<ProvisioningManage>,
    Query(Wanted { filter, paging }): Query<Wanted>,
) -> Result<Json<Page<ClaimRequestBody>>, Problem> {
    let mut db = caller.read(&app).await?;
    let (kept, next) = request::page(&mut db, caller.tenant, &filter, paging.after, paging.limit).await?;
    let items = kept.into_iter().map(ClaimRequestBody::new).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::ClaimRequest) }))
}

/// What an approval says about the device; it wins over the claim and over what the device says.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct ApproveBody {
    /// What kind of thing it is.
    #[schema(value_type = Option<String>, example = "freezer")]
    r#type: Option<DeviceType>,
    /// Where it belongs.
    #[schema(value_type = Option<String>, example = "oslo/harbour")]
    group: Option<GroupPath>,
    /// Labels to add.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, String>)]
    labels: Labels,
}

/// Approve a request
///
/// The device is enrolled; it hears of it when it asks again, and over MQTT at once while it is connected.
#[utoipa::path(
    post, path = "/api/v1/claims/requests/{id}/approve", tag = "claims", request_body = Option<ApproveBody>,
    params(("id" = String, Path, description = "The request's id")),
    security(("bearer" = ["provisioning:manage"])),
    responses(
        (status = 200, description = "It is a device now.", body = ClaimRequestBody),
        (status = 404, description = "There is no such request.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is decided already, its claim is used up, or there is a device of that id.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn approve(
    State(app): State<App>,
    caller: Can<ProvisioningManage>,
    Path(id): Path<ClaimRequestId>,
    MaybeJson(ApproveBody { r#type: kind, group, labels }): MaybeJson<ApproveBody>,
) -> Result<Json<ClaimRequestBody>, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = request::find(&mut tx, caller.tenant, id).await?;
    let with = Approve { kind, group, labels };
    let (new, _) = request::approve(&mut tx, caller.tenant, id, &with, caller.id, app.clock.now()).await?;
    decided("claim-request.approve", &app, &caller, tx, old, new).await
}

/// Why a request is rejected.
#[derive(Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct RejectBody {
    /// What the device is told.
    #[schema(example = "not one of ours", max_length = 500)]
    reason: Option<String>,
}

/// Reject a request
#[utoipa::path(
    post, path = "/api/v1/claims/requests/{id}/reject", tag = "claims", request_body = Option<RejectBody>,
    params(("id" = String, Path, description = "The request's id")),
    security(("bearer" = ["provisioning:manage"])),
    responses(
        (status = 200, description = "It is rejected.", body = ClaimRequestBody),
        (status = 404, description = "There is no such request.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "It is decided already.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn reject(
    State(app): State<App>,
    caller: Can<ProvisioningManage>,
    Path(id): Path<ClaimRequestId>,
    MaybeJson(RejectBody { reason }): MaybeJson<RejectBody>,
) -> Result<Json<ClaimRequestBody>, Problem> {
    let mut tx = caller.change(&app).await?;
    let old = request::find(&mut tx, caller.tenant, id).await?;
    let new = request::reject(&mut tx, caller.tenant, id, reason.as_deref(), caller.id, app.clock.now()).await?;
    decided("claim-request.reject", &app, &caller, tx, old, new).await
}

/// Commits a decision, and tells the device of it if it is connected; else it asks again when it comes.
async fn decided(
    action: &'static str,
    app: &App,
    caller: &Can<ProvisioningManage>,
    mut tx: Change,
    old: Kept,
    new: Kept,
) -> Result<Json<ClaimRequestBody>, Problem> {
    let (asker, message) = request::told(&mut tx, caller.tenant, new.id).await?;
    let device = new.device.clone();
    let [old, new] = [old, new].map(ClaimRequestBody::new);
    tx.commit(Entry::of(action, new.id).on(&device).before(&old).after(&new)).await?;
    let tell = Request::Tell { tenant: caller.principal().tenant_id.clone(), asker, message };
    if let Err(error) = app.ask_brokers(&tell).await {
        tracing::debug!(%error, "a device hears of its request when it asks again");
    }
    Ok(Json(new))
}
