//! Search: lines in the order of time, page by page.

use std::str::FromStr;

use axum::extract::State;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fleet_core::id::TenantKey;
use fleet_core::log::Line;
use fleet_core::search::{self, Cursor, MAX_PAGE, Order, highlights};
use serde::Serialize;
use utoipa::{IntoParams, ToSchema};

use super::{Asked, LineBody};
use crate::extract::{Can, FromQuery, Json, LogsRead, Params, Query};
use crate::problem::{Document, Problem};
use crate::state::App;

/// Lines on a page unless it is said.
const DEFAULT_PAGE: usize = 100;

/// Lines that were found.
#[derive(Serialize, ToSchema)]
#[schema(as = LogPage)]
pub(crate) struct PageBody {
    /// The lines.
    items: Vec<LineBody>,
    /// The `cursor` of the next page; null at the end.
    next_cursor: Option<String>,
    /// Whether everything that is stored could be searched; false while the index is behind or stands still.
    complete: bool,
}

/// Which lines, and in which order.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Searched` reads, as the document tells it")]
pub(crate) struct SearchQuery {
    /// Only lines that answer this, in the query language of logs; left out: all that the caller may see.
    #[param(example = "level:>=warn AND \"no carrier\"")]
    q: Option<String>,
    /// From this time on: RFC 3339, a day, or such as `now-15m`.
    #[param(example = "now-1h")]
    from: Option<String>,
    /// Before this time; a day is taken as a whole.
    to: Option<String>,
    /// `newest` first, or `oldest`.
    #[param(default = "newest")]
    order: Option<String>,
    /// Lines on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct Searched {
    asked: Asked,
    order: Order,
    limit: usize,
    cursor: Option<String>,
}

struct By(Order);

impl FromStr for By {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "newest" => Ok(Self(Order::Newest)),
            "oldest" => Ok(Self(Order::Oldest)),
            _ => Err("expected newest or oldest"),
        }
    }
}

impl FromQuery for Searched {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let asked = Asked::from_query(query);
        let order = query.one::<By>("order").map_or(Order::Newest, |by| by.0);
        let (limit, cursor) = (query.limit(DEFAULT_PAGE, MAX_PAGE), query.one("cursor"));
        Some(Self { asked: asked?, order, limit, cursor })
    }
}

/// Search lines
///
/// Newest first, or oldest first, page by page: a walk along the cursors shows each line once, whatever is written meanwhile.
/// A line is found within two seconds of its commit; `/logs/tail` is faster.
#[utoipa::path(
    get, path = "/api/v1/logs/search", tag = "logs", params(SearchQuery), security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "A page of them.", body = PageBody),
        (status = 400, description = "The query cannot be read: the detail names the column and what was expected there.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "There are too many searches at once, or it took too long.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn search(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(Searched { asked, order, limit, cursor }): Query<Searched>,
) -> Result<Json<PageBody>, Problem> {
    let after = cursor.map(|cursor| open(&app, caller.tenant, &cursor)).transpose()?;
    let page = page(&app, &caller, &asked, order, after, limit).await?;
    let next_cursor = page.next.map(|cursor| seal(&app, caller.tenant, cursor)).transpose()?;
    let items = page.found.iter().map(|(line, highlights)| LineBody::new(line, highlights.clone())).collect();
    Ok(Json(PageBody { items, next_cursor, complete: page.complete }))
}

/// A page of lines, each with what is to be highlighted of it.
pub(super) struct Lines {
    pub(super) found: Vec<(Line, Vec<(usize, usize)>)>,
    pub(super) next: Option<Cursor>,
    pub(super) complete: bool,
}

pub(super) async fn page(
    app: &App,
    caller: &Can<LogsRead>,
    asked: &Asked,
    order: Order,
    after: Option<Cursor>,
    limit: usize,
) -> Result<Lines, Problem> {
    let index = app.search()?;
    let complete = index.index().state().is_complete();
    let ask = asked.resolve(app, caller).await?;
    let page = index.page(&ask, order, after, limit).await?;
    let mut db = caller.read(app).await?;
    let lines = search::fetch(&mut db, caller.tenant, &page.hits).await?;
    let found = lines.into_iter().map(|line| {
        let highlights = highlights(&ask.query, &line.message);
        (line, highlights)
    });
    Ok(Lines { found: found.collect(), next: page.next, complete })
}

/// A cursor says nothing to anybody: how much is written is a matter of all tenants.
fn seal(app: &App, tenant: TenantKey, cursor: Cursor) -> Result<String, Problem> {
    let sealed = app.pki.seal().seal(&context(tenant), cursor.to_string().as_bytes())?;
    Ok(URL_SAFE_NO_PAD.encode(sealed))
}

fn open(app: &App, tenant: TenantKey, text: &str) -> Result<Cursor, Problem> {
    let opened = URL_SAFE_NO_PAD.decode(text).ok().and_then(|sealed| {
        let opened = app.pki.seal().open(&context(tenant), &sealed).ok()?;
        std::str::from_utf8(&opened).ok()?.parse().ok()
    });
    opened.ok_or_else(|| Problem::field("cursor", "expected the next_cursor of a page of this list"))
}

fn context(tenant: TenantKey) -> Vec<u8> {
    [&b"log-page"[..], &tenant.0.to_be_bytes()].concat()
}
