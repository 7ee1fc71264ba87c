//! What devices say about themselves: readings, buckets of them, the newest values.

use std::str::FromStr;

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use chrono::{DateTime, TimeDelta, Utc};
use fleet_core::clock::from_ms;
use fleet_core::id::{DeviceId, DeviceKey};
use fleet_core::telemetry::{self, MAX_BUCKETS, MAX_METRIC_NAME_BYTES, MAX_POINTS, Order, Point};
use fleet_core::{device, latest};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};

use crate::extract::{Can, FromQuery, Json, Params, Path, Query, TelemetryRead, wants_csv};
use crate::page::{Cursor, Key, Page, behind};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time::{self, Bucket, Moment, rfc3339};

/// Readings on a page unless it is said.
const DEFAULT_PAGE: usize = 1000;
/// Most readings on a page.
#[expect(clippy::cast_possible_truncation, reason = "a small constant")]
const LARGEST_PAGE: usize = MAX_POINTS as usize;

/// One reading, or one bucket of them.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[schema(as = TelemetryItem)]
pub(crate) enum Item {
    /// With `metric`: its value.
    Value(MetricValue),
    /// Without: the reading whole.
    Reading(Reading),
    /// With `bucket`: a stretch of time.
    Bucket(BucketBody),
}

/// The value of one metric in one reading.
#[derive(Serialize, ToSchema)]
pub(crate) struct MetricValue {
    /// The device's time, or that of receipt where it gave none or one too far ahead.
    #[serde(serialize_with = "time::serialize")]
    ts: DateTime<Utc>,
    /// The device's sequence number; null when it sent none.
    seq: Option<i64>,
    /// The value, as it was sent.
    #[schema(value_type = serde_json::Value, example = 21.4)]
    value: Value,
}

/// One reading.
#[derive(Serialize, ToSchema)]
pub(crate) struct Reading {
    /// The device's time, or that of receipt where it gave none or one too far ahead.
    #[serde(serialize_with = "time::serialize")]
    ts: DateTime<Utc>,
    /// The device's sequence number; null when it sent none.
    seq: Option<i64>,
    /// The values by metric, as they were sent.
    #[schema(value_type = std::collections::BTreeMap<String, Value>, example = json!({"temp": 21.4, "door": true}))]
    values: Map<String, Value>,
}

/// The numbers of one metric in a stretch of time; booleans count as 0 and 1.
#[derive(Serialize, ToSchema)]
#[schema(as = TelemetryBucket)]
pub(crate) struct BucketBody {
    /// When it begins; buckets are counted from the epoch.
    #[serde(serialize_with = "time::serialize")]
    ts: DateTime<Utc>,
    /// Readings in it.
    count: i64,
    /// The least.
    min: f64,
    /// The greatest.
    max: f64,
    /// The mean.
    avg: f64,
    /// The newest.
    last: f64,
}

impl Item {
    fn of_point(point: Point, metric: Option<&str>) -> Self {
        let Point { ts, seq, mut values, .. } = point;
        // A negative number stands in for one that was not sent.
        let seq = (seq >= 0).then_some(seq);
        match metric {
            Some(metric) => Self::Value(MetricValue { ts, seq, value: values.remove(metric).unwrap_or_default() }),
            None => Self::Reading(Reading { ts, seq, values }),
        }
    }

    fn of_bucket(bucket: &telemetry::Bucket) -> Self {
        let telemetry::Bucket { start: ts, count, min, max, avg, last } = *bucket;
        Self::Bucket(BucketBody { ts, count, min, max, avg, last })
    }
}

/// Which readings.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Series` reads, as the document tells it")]
pub(crate) struct SeriesQuery {
    /// Only readings with this metric, and only its value.
    metric: Option<String>,
    /// From this time on: RFC 3339, or milliseconds since the epoch.
    from: Option<String>,
    /// Before this time. Left out: a day from now, so that a clock that runs ahead loses nothing.
    to: Option<String>,
    /// Width of a bucket: `30s`, `1m`, `1h`, `1d` or seconds; needs `metric`. At most 10,000 buckets come back.
    bucket: Option<String>,
    /// `asc`, oldest first, or `desc`.
    #[param(default = "asc")]
    order: Option<String>,
    /// Readings on the page.
    #[param(minimum = 1, maximum = 10000, default = 1000)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

pub(crate) struct Series {
    metric: Option<String>,
    from: Option<DateTime<Utc>>,
    to: Option<DateTime<Utc>>,
    bucket: Option<Bucket>,
    order: Order,
    limit: usize,
    after: Option<(DateTime<Utc>, i64)>,
}

impl FromQuery for Series {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let metric = query.one::<Metric>("metric").map(|metric| metric.0);
        let from = query.one::<Moment>("from").map(|at| at.0);
        let to = query.one::<Moment>("to").map(|at| at.0);
        let bucket = query.one("bucket");
        let order = query.one::<ByTime>("order").map_or(Order::Asc, |order| order.0);
        let limit = query.limit(DEFAULT_PAGE, LARGEST_PAGE);
        let after = behind(query);
        if bucket.is_some() && metric.is_none() {
            query.refuse("bucket", "expected with metric: a bucket holds the numbers of one metric");
        }
        if bucket.is_some() && after.is_some() {
            query.refuse("cursor", "expected without bucket: buckets come on one page");
        }
        if from.zip(to).is_some_and(|(from, to)| from >= to) {
            query.refuse("to", "expected a time after from");
        }
        Some(Self { metric, from, to, bucket, order, limit, after })
    }
}

struct Metric(String);

impl FromStr for Metric {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if (1..=MAX_METRIC_NAME_BYTES).contains(&text.len()) && !text.contains('\0') {
            return Ok(Self(text.to_owned()));
        }
        Err(format!("expected the name of a metric, 1 to {MAX_METRIC_NAME_BYTES} bytes"))
    }
}

struct ByTime(Order);

impl FromStr for ByTime {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "asc" => Ok(Self(Order::Asc)),
            "desc" => Ok(Self(Order::Desc)),
            _ => Err("expected asc or desc"),
        }
    }
}

impl Key for (DateTime<Utc>, i64) {
    fn of(cursor: Cursor) -> Option<Self> {
        match cursor {
            Cursor::Reading { ts_ms, seq } if time::RANGE_MS.contains(&ts_ms) => Some((from_ms(ts_ms), seq)),
            _ => None,
        }
    }
}

/// Readings of a device
///
/// Without `bucket`, readings in order of time, page by page. With it, one item for each stretch of time that has a
/// number. `Accept: text/csv` gives the same as CSV (RFC 4180), the cursor then in the header `next-cursor`.
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/telemetry", tag = "telemetry",
    params(("id" = String, Path, description = "The device's id"), SeriesQuery),
    security(("bearer" = ["telemetry:read"])),
    responses(
        (status = 200, description = "A page of them.", content(
            (Page<Item> = "application/json"),
            (String = "text/csv"),
        )),
        (status = 400, description = "A parameter is not valid, or there would be too many buckets.", body = Document, content_type = "application/problem+json"),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn series(
    State(app): State<App>,
    caller: Can<TelemetryRead>,
    Path(id): Path<DeviceId>,
    Query(series): Query<Series>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let mut db = caller.read(&app).await?;
    let key = device::open(&mut db, caller.tenant, &id).await?;
    let to = series.to.unwrap_or_else(|| app.clock.now() + TimeDelta::days(1));
    let page = match series.bucket {
        Some(bucket) => buckets(&mut db, key, &series, to, bucket).await?,
        None => points(&mut db, key, &series, to).await?,
    };
    if wants_csv(&headers) { Ok(csv(&page)) } else { Ok(Json(page).into_response()) }
}

async fn points(
    db: &mut PgConnection,
    device: DeviceKey,
    series: &Series,
    to: DateTime<Utc>,
) -> Result<Page<Item>, Problem> {
    let query = telemetry::Query {
        device,
        metric: series.metric.clone(),
        from: series.from.unwrap_or_else(|| from_ms(*time::RANGE_MS.start())),
        to,
        order: series.order,
        limit: i64::try_from(series.limit).unwrap_or(MAX_POINTS).saturating_add(1),
        after: series.after,
    };
    let rows = telemetry::points(db, &query).await?;
    let key = |point: &Point| Cursor::Reading { ts_ms: point.ts.timestamp_millis(), seq: point.seq };
    Ok(Page::cut(rows, series.limit, LARGEST_PAGE, key, |point| Item::of_point(point, series.metric.as_deref())))
}

async fn buckets(
    db: &mut PgConnection,
    device: DeviceKey,
    series: &Series,
    to: DateTime<Utc>,
    bucket: Bucket,
) -> Result<Page<Item>, Problem> {
    let metric = series.metric.as_deref().unwrap_or_default();
    let from = match series.from {
        Some(from) => from,
        None => first(db, device, to).await?,
    };
    let width_ms = bucket.0.num_milliseconds();
    if (to - from).num_milliseconds() / width_ms >= MAX_BUCKETS {
        let least = (to - from).num_seconds() / MAX_BUCKETS + 1;
        let detail =
            format!("more than {MAX_BUCKETS} buckets: expected a bucket of at least {least}s, or a shorter time");
        return Err(Problem::new(400, "too-many-buckets", detail));
    }
    let width = bucket.0.to_std().map_err(|error| Problem::internal(&error))?;
    let mut buckets = telemetry::buckets(db, device, metric, from, to, width).await?;
    if series.order == Order::Desc {
        buckets.reverse();
    }
    Ok(Page::whole(buckets.iter().map(Item::of_bucket).collect()))
}

/// The time of the device's first reading before `to`, where the buckets begin unless it is said.
async fn first(db: &mut PgConnection, device: DeviceKey, to: DateTime<Utc>) -> Result<DateTime<Utc>, Problem> {
    let from = from_ms(*time::RANGE_MS.start());
    let query = telemetry::Query { device, metric: None, from, to, order: Order::Asc, limit: 1, after: None };
    Ok(telemetry::points(db, &query).await?.first().map_or(to, |point| point.ts))
}

/// Readings whole become a line for each value, so that the columns do not depend on the data.
fn csv(page: &Page<Item>) -> Response {
    let head = match page.items.first() {
        Some(Item::Bucket(_)) => "ts,count,min,max,avg,last\r\n",
        Some(Item::Value(_)) => "ts,seq,value\r\n",
        Some(Item::Reading(_)) | None => "ts,seq,metric,value\r\n",
    };
    let lines = page.items.iter().flat_map(lines);
    let text = std::iter::once(head.to_owned()).chain(lines).collect::<String>();
    let next = page.next_cursor.as_ref().map(|cursor| [("next-cursor", cursor.print())]);
    (next, [(header::CONTENT_TYPE, "text/csv; charset=utf-8")], text).into_response()
}

fn lines(item: &Item) -> Vec<String> {
    match item {
        Item::Bucket(b) => {
            vec![format!("{},{},{},{},{},{}\r\n", rfc3339(b.ts), b.count, b.min, b.max, b.avg, b.last)]
        }
        Item::Value(v) => vec![format!("{},{},{}\r\n", rfc3339(v.ts), number(v.seq), field(&v.value))],
        Item::Reading(r) => {
            let start = format!("{},{}", rfc3339(r.ts), number(r.seq));
            let line = |(metric, value): (&String, &Value)| format!("{start},{},{}\r\n", quoted(metric), field(value));
            r.values.iter().map(line).collect()
        }
    }
}

fn number(seq: Option<i64>) -> String {
    seq.map(|seq| seq.to_string()).unwrap_or_default()
}

fn field(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => quoted(text),
        value => quoted(&value.to_string()),
    }
}

/// RFC 4180 §2. Text that a spreadsheet would take for a formula is quoted with an apostrophe.
pub(crate) fn quoted(text: &str) -> String {
    let formula = text.starts_with(['=', '+', '-', '@', '\t', '\r']) && text.parse::<f64>().is_err();
    let text = if formula { format!("'{text}") } else { text.to_owned() };
    if text.contains([',', '"', '\r', '\n']) { format!("\"{}\"", text.replace('"', "\"\"")) } else { text }
}

/// The newest value of one metric.
#[derive(Serialize, ToSchema)]
pub(crate) struct LatestValue {
    /// The metric.
    #[schema(example = "temp")]
    metric: String,
    /// When it was read.
    #[serde(serialize_with = "time::serialize")]
    ts: DateTime<Utc>,
    /// The value, as it was sent.
    #[schema(value_type = serde_json::Value, example = 21.4)]
    value: Value,
}

/// The newest value of each metric
///
/// Within a second of their commit.
#[utoipa::path(
    get, path = "/api/v1/devices/{id}/telemetry/latest", tag = "telemetry",
    params(("id" = String, Path, description = "The device's id")), security(("bearer" = ["telemetry:read"])),
    responses(
        (status = 200, description = "All of them, on one page.", body = Page<LatestValue>),
        (status = 404, description = "There is no such device.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn latest(
    State(app): State<App>,
    caller: Can<TelemetryRead>,
    Path(id): Path<DeviceId>,
) -> Result<Json<Page<LatestValue>>, Problem> {
    let mut db = caller.read(&app).await?;
    let key = device::open(&mut db, caller.tenant, &id).await?;
    let values = latest::latest(&mut db, key).await?;
    let item = |latest::LatestValue { metric, ts, value }| LatestValue { metric, ts, value };
    Ok(Json(Page::whole(values.into_iter().map(item).collect())))
}
