//! Lines counted: over time, by value, by pattern; and the fields that can be asked for.

use axum::extract::State;
use chrono::{DateTime, Utc};
use fleet_core::clock::from_ms;
use fleet_core::firmware;
use fleet_core::level::Level;
use fleet_core::log::query::{Completion, fields as known_fields};
use fleet_core::search::{self, MAX_BUCKETS, MAX_PATTERNS, MAX_VALUES};
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::{Asked, LineBody, instant};
use crate::extract::{Can, FromQuery, Json, LogsRead, Params, Query};
use crate::problem::{Document, Problem};
use crate::state::App;
use crate::time::{self, Bucket};

/// Values and patterns unless it is said.
const DEFAULT_SIZE: usize = 10;
/// About as many stretches as a chart shows.
const STRETCHES: i64 = 120;
/// Widths that are taken when none is said, in seconds.
const WIDTHS: [i64; 13] = [1, 5, 10, 30, 60, 300, 600, 1800, 3600, 10_800, 21_600, 43_200, 86_400];

/// How many, at most `most`.
fn size(query: &mut Params<'_>, most: usize) -> usize {
    let size = query.one::<usize>("size").unwrap_or(DEFAULT_SIZE);
    if !(1..=most).contains(&size) {
        query.refuse("size", format!("expected a number from 1 to {most}"));
    }
    size
}

/// Lines over time.
#[derive(Serialize, ToSchema)]
#[schema(as = LogHistogram)]
pub(crate) struct HistogramBody {
    /// The width of a stretch.
    #[schema(example = "1m")]
    interval: String,
    /// The stretches that have lines, in their order.
    items: Vec<StretchBody>,
    /// Whether everything that is stored could be counted.
    complete: bool,
}

/// A stretch of time.
#[derive(Serialize, ToSchema)]
#[schema(as = LogStretch)]
pub(crate) struct StretchBody {
    /// When it begins; stretches are counted from the epoch.
    #[serde(serialize_with = "time::serialize")]
    ts: DateTime<Utc>,
    /// Lines in it.
    #[schema(example = 42)]
    count: u64,
    /// Lines by level; levels without a line are left out.
    #[schema(value_type = std::collections::BTreeMap<String, u64>, example = json!({"info": 40, "warn": 2}))]
    levels: Map<String, Value>,
}

impl StretchBody {
    fn new(bucket: &search::Bucket) -> Self {
        let levels = Level::ALL.iter().zip(bucket.by_level).filter(|(_, count)| *count > 0);
        let levels = levels.map(|(level, count)| (level.name().to_owned(), count.into())).collect();
        Self { ts: from_ms(bucket.start_ms), count: bucket.total, levels }
    }
}

/// Which lines, and in how wide stretches.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Histogram` reads, as the document tells it")]
pub(crate) struct HistogramQuery {
    /// Only lines that answer this, in the query language of logs.
    #[param(example = "level:>=warn")]
    q: Option<String>,
    /// From this time on: RFC 3339, a day, or such as `now-15m`.
    #[param(example = "now-1h")]
    from: Option<String>,
    /// Before this time; a day is taken as a whole.
    to: Option<String>,
    /// Width of a stretch: `30s`, `1m`, `1h`, `1d` or seconds; left out: one that suits the time asked for.
    interval: Option<String>,
}

pub(crate) struct Histogram {
    asked: Asked,
    interval: Bucket,
}

impl FromQuery for Histogram {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let (asked, interval) = (Asked::from_query(query), query.one("interval"));
        let asked = asked?;
        let span_ms = asked.from_ms.map(|from| asked.to_ms.unwrap_or(query.now().timestamp_millis()) - from);
        Some(Self { interval: interval.unwrap_or_else(|| suiting(span_ms)), asked })
    }
}

/// A width that gives about [`STRETCHES`]; a day when it is not known from when on.
fn suiting(span_ms: Option<i64>) -> Bucket {
    let last = WIDTHS[WIDTHS.len() - 1];
    let wanted = span_ms.map_or(last, |span| span / 1000 / STRETCHES);
    let days = wanted / last + 1;
    Bucket(chrono::TimeDelta::seconds(WIDTHS.into_iter().find(|width| *width >= wanted).unwrap_or(days * last)))
}

/// Count lines over time
///
/// By level, for a chart.
#[utoipa::path(
    get, path = "/api/v1/logs/histogram", tag = "logs", params(HistogramQuery), security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "The stretches that have lines.", body = HistogramBody),
        (status = 400, description = "The query cannot be read, or there would be too many stretches.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "There are too many searches at once, or it took too long.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn histogram(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(Histogram { asked, interval }): Query<Histogram>,
) -> Result<Json<HistogramBody>, Problem> {
    let width_ms = interval.0.num_milliseconds();
    let most = i64::try_from(MAX_BUCKETS).unwrap_or(i64::MAX);
    if let Some((from, to)) = asked.from_ms.zip(asked.to_ms)
        && (to - 1).div_euclid(width_ms) - from.div_euclid(width_ms) >= most
    {
        // The first and the last stretch may be there in part.
        let least = (to - from) / (most - 1) / 1000 + 1;
        let detail =
            format!("more than {most} stretches: expected an interval of at least {least}s, or a shorter time");
        return Err(Problem::new(400, "too-many-buckets", detail));
    }
    let index = app.search()?;
    let complete = index.index().state().is_complete();
    let buckets = index.histogram(&asked.resolve(&app, &caller).await?, width_ms).await?;
    let items = buckets.iter().map(StretchBody::new).collect();
    Ok(Json(HistogramBody { interval: interval.to_string(), items, complete }))
}

/// The values of a field with the most lines.
#[derive(Serialize, ToSchema)]
#[schema(as = LogTop)]
pub(crate) struct TopBody {
    /// The values, the most frequent first.
    items: Vec<ValueBody>,
    /// Lines with other values of the field.
    others: u64,
    /// Lines that have the field but whose values are not kept for counting, since devices use too many names of fields.
    uncounted: u64,
    /// Whether everything that is stored could be counted.
    complete: bool,
}

/// A value.
#[derive(Serialize, ToSchema)]
#[schema(as = LogValue)]
pub(crate) struct ValueBody {
    /// It, as text.
    #[schema(example = "net.wifi")]
    value: String,
    /// Lines with it.
    #[schema(example = 42)]
    count: u64,
}

/// Which lines, and by which field.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Top` reads, as the document tells it")]
pub(crate) struct TopQuery {
    /// Only lines that answer this, in the query language of logs.
    q: Option<String>,
    /// From this time on: RFC 3339, a day, or such as `now-15m`.
    from: Option<String>,
    /// Before this time; a day is taken as a whole.
    to: Option<String>,
    /// `level`, `device`, `target`, `pattern` or `fields.NAME`.
    #[param(example = "target")]
    field: String,
    /// Most values.
    #[param(minimum = 1, maximum = 1000, default = 10)]
    size: Option<usize>,
}

pub(crate) struct Top {
    asked: Asked,
    field: String,
    size: usize,
}

impl FromQuery for Top {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let (asked, field, size) = (Asked::from_query(query), query.one("field"), size(query, MAX_VALUES));
        if field.is_none() {
            query.refuse("field", "expected level, device, target, pattern or fields.NAME");
        }
        Some(Self { asked: asked?, field: field?, size })
    }
}

/// Count lines by value
///
/// The most frequent values of a field.
#[utoipa::path(
    get, path = "/api/v1/logs/top", tag = "logs", params(TopQuery), security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "The values.", body = TopBody),
        (status = 400, description = "The query cannot be read, or lines cannot be counted by this field.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "There are too many searches at once, or it took too long.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn top(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(Top { asked, field, size }): Query<Top>,
) -> Result<Json<TopBody>, Problem> {
    let index = app.search()?;
    let complete = index.index().state().is_complete();
    let mut top = index.top(&asked.resolve(&app, &caller).await?, &field, size).await?;
    if field == "device" {
        top.name_devices(&mut *caller.read(&app).await?, caller.tenant).await?;
    }
    let items = top.values.into_iter().map(|(value, count)| ValueBody { value, count }).collect();
    Ok(Json(TopBody { items, others: top.others, uncounted: top.uncounted, complete }))
}

/// Similar lines, put together.
#[derive(Serialize, ToSchema)]
#[schema(as = LogPatterns)]
pub(crate) struct PatternsBody {
    /// The patterns, the most frequent first.
    items: Vec<PatternBody>,
    /// How many patterns there are in all.
    total: usize,
    /// Whether everything that is stored could be counted, and all patterns were.
    complete: bool,
}

/// A pattern: lines that differ in numbers, names and the like only.
#[derive(Serialize, ToSchema)]
#[schema(as = LogPattern)]
pub(crate) struct PatternBody {
    /// Finds its lines: `pattern:9ae16a3b2f90404f`.
    #[schema(example = "9ae16a3b2f90404f")]
    pattern: String,
    /// What its lines have in common, `*` for what varies.
    #[schema(example = "reconnect *")]
    text: String,
    /// Its lines.
    #[schema(example = 42)]
    count: u64,
    /// The time of the oldest of them.
    #[serde(serialize_with = "time::serialize")]
    first: DateTime<Utc>,
    /// The time of the newest.
    #[serde(serialize_with = "time::serialize")]
    last: DateTime<Utc>,
    /// The newest.
    example: LineBody,
}

impl PatternBody {
    fn new(pattern: &search::Pattern) -> Self {
        Self {
            pattern: pattern.id.clone(),
            text: pattern.text.clone(),
            count: pattern.count,
            first: from_ms(pattern.first_ms),
            last: from_ms(pattern.last_ms),
            example: LineBody::new(&pattern.example, Vec::new()),
        }
    }
}

/// Which lines.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Patterns` reads, as the document tells it")]
pub(crate) struct PatternsQuery {
    /// Only lines that answer this, in the query language of logs.
    #[param(example = "level:>=warn")]
    q: Option<String>,
    /// From this time on: RFC 3339, a day, or such as `now-15m`.
    #[param(example = "now-1d")]
    from: Option<String>,
    /// Before this time; a day is taken as a whole.
    to: Option<String>,
    /// Only patterns of which there was no line before this time, such as that of a release.
    #[param(example = "2026-11-20T10:00:00Z")]
    new_since: Option<String>,
    /// The same for the time at which a device first said this version of firmware.
    #[param(example = "2.0.1")]
    new_since_version: Option<String>,
    /// Most patterns.
    #[param(minimum = 1, maximum = 1000, default = 10)]
    size: Option<usize>,
}

pub(crate) struct Patterns {
    asked: Asked,
    new_since_ms: Option<i64>,
    new_since_version: Option<String>,
    size: usize,
}

impl FromQuery for Patterns {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let asked = Asked::from_query(query);
        let new_since_ms = instant(query, "new_since").map(|(start, _)| start);
        let new_since_version = query.one::<String>("new_since_version");
        if new_since_ms.is_some() && new_since_version.is_some() {
            query.refuse("new_since_version", "expected either this or new_since");
        }
        let size = size(query, MAX_PATTERNS);
        Some(Self { asked: asked?, new_since_ms, new_since_version, size })
    }
}

/// List patterns
///
/// Lines that differ in numbers, addresses, ids and the like only are one pattern. With `new_since`, only those that nobody
/// wrote before; `new_since_version` does so for a release.
#[utoipa::path(
    get, path = "/api/v1/logs/patterns", tag = "logs", params(PatternsQuery), security(("bearer" = ["logs:read"])),
    responses(
        (status = 200, description = "The patterns.", body = PatternsBody),
        (status = 400, description = "The query cannot be read.", body = Document, content_type = "application/problem+json"),
        (status = 503, description = "There are too many searches at once, or it took too long.", body = Document, content_type = "application/problem+json"),
    )
)]
pub(crate) async fn patterns(
    State(app): State<App>,
    caller: Can<LogsRead>,
    Query(Patterns { asked, new_since_ms, new_since_version, size }): Query<Patterns>,
) -> Result<Json<PatternsBody>, Problem> {
    let new_since_ms = match new_since_version {
        Some(version) => Some(begin_of(&app, &caller, &version).await?),
        None => new_since_ms,
    };
    let index = app.search()?;
    let is_complete = index.index().state().is_complete();
    let found = index.patterns(&asked.resolve(&app, &caller).await?, new_since_ms, size).await?;
    let (total, all) = found.total();
    let found = found.read(&mut *caller.read(&app).await?, caller.tenant).await?;
    let items = found.iter().map(PatternBody::new).collect();
    Ok(Json(PatternsBody { items, total, complete: is_complete && all }))
}

/// When a version of firmware was first said.
async fn begin_of(app: &App, caller: &Can<LogsRead>, version: &str) -> Result<i64, Problem> {
    let unknown =
        || Problem::new(400, "unknown-version", format!("no device has said that it runs version {version:?}"));
    if version.contains(char::is_control) {
        return Err(unknown());
    }
    let seen = firmware::first_seen(&mut *caller.read(app).await?, caller.tenant, version).await?;
    Ok(seen.ok_or_else(unknown)?.timestamp_millis())
}

/// What can be asked for.
#[derive(Serialize, ToSchema)]
#[schema(as = LogFields)]
pub(crate) struct FieldsBody {
    /// The fields.
    items: Vec<FieldBody>,
}

/// A field of the query language of logs.
#[derive(Serialize, ToSchema)]
#[schema(as = LogField)]
pub(crate) struct FieldBody {
    /// As it is written; one that ends in a dot is followed by a name.
    #[schema(example = "level")]
    name: &'static str,
    /// What it holds: `text`, `name`, `one_of`, `path`, `level`, `number`, `time`, `version`, `flag`, `any`.
    #[schema(example = "level")]
    kind: &'static str,
    /// What it is about.
    #[schema(example = "how much the line matters")]
    meaning: &'static str,
    /// A term with it.
    #[schema(example = "level:>=warn")]
    example: &'static str,
    /// What may stand between it and its value.
    #[schema(value_type = Vec<String>)]
    operators: &'static [&'static str],
    /// The values there are, where they are few.
    #[schema(value_type = Vec<String>)]
    values: &'static [&'static str],
}

impl FieldBody {
    fn new(field: Completion) -> Self {
        let Completion { name, kind, meaning, example, operators, values } = field;
        Self { name, kind, meaning, example, operators, values }
    }
}

/// List the fields of the query language
///
/// For whoever helps to write a query.
#[utoipa::path(
    get, path = "/api/v1/logs/fields", tag = "logs", security(("bearer" = ["logs:read"])),
    responses((status = 200, description = "All of them.", body = FieldsBody))
)]
pub(crate) async fn fields(_caller: Can<LogsRead>) -> Json<FieldsBody> {
    Json(FieldsBody { items: known_fields().into_iter().map(FieldBody::new).collect() })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_width_suits_any_time(span_ms in 0..=9_000_000_000_000_i64) {
            let width_ms = suiting(Some(span_ms)).0.num_milliseconds();
            prop_assert!(width_ms > 0 && span_ms / width_ms <= STRETCHES, "{width_ms}");
        }
    }
}
