//! Tenants: made and seen by those who stand above them.

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, Utc};
use fleet_core::audit::Entry;
use fleet_core::config::Secret;
use fleet_core::id::TenantId;
use fleet_core::policy::{Manager, Role};
use fleet_core::tenancy::{self, Tenant};
use fleet_core::user::{self, NewUser};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::extract::{AccessManage, Can, Json, Once, Path, Query};
use crate::page::{Cursor, Page, Paging, PagingQuery};
use crate::problem::{Document, Problem};
use crate::routes::passwords::hashed;
use crate::routes::users::UserBody;
use crate::state::App;
use crate::time;

/// A tenant.
#[derive(Serialize, ToSchema)]
#[schema(as = Tenant)]
pub(crate) struct TenantBody {
    /// Its name in topics; immutable.
    #[schema(value_type = String, example = "acme")]
    id: TenantId,
    /// When it was made.
    #[serde(serialize_with = "time::serialize")]
    created_at: DateTime<Utc>,
}

impl TenantBody {
    fn new(tenant: Tenant) -> Self {
        let Tenant { id, created_at, .. } = tenant;
        Self { id, created_at }
    }
}

/// A tenant to be made.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewTenant {
    /// Its name in topics, 1 to 64 of `A-Z a-z 0-9 . _ -`, not beginning with `_`; immutable.
    #[schema(value_type = String, example = "acme")]
    id: TenantId,
    /// Its first user.
    admin: NewAdmin,
}

/// The first user of a tenant, with the role `admin`.
#[derive(Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewAdmin {
    /// The address to log in with; it names one user of the whole server.
    #[schema(example = "ada@example.com", max_length = 254)]
    email: String,
    /// The password.
    #[schema(value_type = String, format = Password, max_length = 1024)]
    password: Secret,
}

/// A tenant that was just made.
#[derive(Serialize, ToSchema)]
pub(crate) struct MadeTenant {
    #[serde(flatten)]
    tenant: TenantBody,
    /// Its first user.
    admin: UserBody,
}

/// Make a tenant
///
/// With its first admin, who stands in it and not above it. For who has platform standing.
#[utoipa::path(
    post, path = "/api/v1/tenants", tag = "tenants", request_body = NewTenant,
    params(("Idempotency-Key" = Option<String>, Header, description = "Makes it safe to send the request again")),
    security(("bearer" = ["access:manage"])),
    responses(
        (status = 201, description = "It was made.", body = MadeTenant, headers(("Location" = String, description = "Where the tenant is."))),
        (status = 400, description = "The name is none, or the password is too short or among the first that somebody would try.", body = Document, content_type = "application/problem+json"),
        (status = 403, description = "The caller has no platform standing.", body = Document, content_type = "application/problem+json"),
        (status = 409, description = "The name or the address is taken, or there are too many tenants.", body = Document, content_type = "application/problem+json"),
        (status = 429, description = "Too many passwords at once: see Retry-After.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn create(
    State(app): State<App>,
    caller: Can<AccessManage>,
    once: Once,
    Json(request): Json<NewTenant>,
) -> Result<Response, Problem> {
    caller.needs_platform("make tenants")?;
    // Before the transaction, so that no connection is held meanwhile.
    let password_hash = hashed(&app, &request.admin.password, &request.admin.email).await?;
    let (mut tx, now) = (caller.change(&app).await?, app.clock.now());
    let taken = match once.begin(&mut tx, &caller, &request, &app).await? {
        Ok(taken) => taken,
        Err(replayed) => return Ok(replayed.at("/id", location)),
    };
    let NewTenant { id, admin: NewAdmin { email, .. } } = request;
    let tenant = tenancy::create(&mut tx, &id, &app.auth, now).await?;
    let role = Some(Role::Admin.name().parse().map_err(fleet_core::Error::from)?);
    let new = NewUser { email, password_hash: Some(password_hash), role, platform: false, disabled: false };
    tenancy::enter(&mut tx, tenant.key).await?;
    let by = Manager { tenant: tenant.key, tenant_id: &id, ..caller.manager() };
    let admin = UserBody::new(user::create(&mut tx, by, &new, &app.auth, now).await?);
    let key = tenant.key;
    let body = MadeTenant { tenant: TenantBody::new(tenant), admin };
    // In the new chain as well: it begins with who began it.
    let entry = Entry::of("tenant.create", &id).after(&body);
    tx.record_in(key, &entry).await?;
    tenancy::enter(&mut tx, caller.tenant).await?;
    taken.finish(&mut tx, StatusCode::CREATED, &body).await?;
    tx.commit(entry).await?;
    Ok((StatusCode::CREATED, [(header::LOCATION, location(id.as_str()))], Json(body)).into_response())
}

fn location(id: &str) -> String {
    format!("/api/v1/tenants/{id}")
}

/// List tenants
///
/// In the order of their names. For who has platform standing.
#[utoipa::path(
    get, path = "/api/v1/tenants", tag = "tenants", params(PagingQuery), security(("bearer" = ["access:manage"])),
    responses(
        (status = 200, description = "A page of them.", body = Page<TenantBody>),
        (status = 403, description = "The caller has no platform standing.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn list(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Query(query): Query<Paging<TenantId>>,
) -> Result<Json<Page<TenantBody>>, Problem> {
    caller.needs_platform("see tenants")?;
    let mut db = caller.read(&app).await?;
    let (tenants, next) = tenancy::page(&mut db, query.after.as_ref(), query.limit).await?;
    let items = tenants.into_iter().map(TenantBody::new).collect();
    Ok(Json(Page { items, next_cursor: next.map(Cursor::Tenant) }))
}

/// Read a tenant
///
/// For who has platform standing.
#[utoipa::path(
    get, path = "/api/v1/tenants/{id}", tag = "tenants", security(("bearer" = ["access:manage"])),
    params(("id" = String, Path, description = "The tenant's name")),
    responses(
        (status = 200, description = "The tenant.", body = TenantBody),
        (status = 403, description = "The caller has no platform standing.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such tenant.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn read(
    State(app): State<App>,
    caller: Can<AccessManage>,
    Path(id): Path<TenantId>,
) -> Result<Json<TenantBody>, Problem> {
    caller.needs_platform("see tenants")?;
    let tenant = tenancy::find(&mut *caller.read(&app).await?, &id).await?;
    Ok(Json(TenantBody::new(tenant)))
}
