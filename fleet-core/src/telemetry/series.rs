//! Readings on their way out: points as they were sent, and buckets of time.

use std::collections::HashMap;
use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};
use serde::Serialize;
use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::postgres::types::PgInterval;

use super::MAX_TS_MS;
use super::shape::Kind;
use crate::clock::from_ms;
use crate::id::DeviceKey;
use crate::{Error, Result};

/// Most points of one answer.
pub const MAX_POINTS: i64 = 10_000;

/// Most buckets of one answer.
pub const MAX_BUCKETS: i64 = 10_000;

/// Numbers further from zero are left out of buckets: their mean has no double.
pub const MAX_BUCKETED: f64 = 1e100;

/// By time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// Oldest first.
    Asc,
    /// Newest first.
    Desc,
}

/// Which readings of a device.
#[derive(Debug, Clone)]
pub struct Query {
    /// Whose.
    pub device: DeviceKey,
    /// Only readings with this metric, and only its value; `None`: readings whole.
    pub metric: Option<String>,
    /// From this time on.
    pub from: DateTime<Utc>,
    /// Before this time.
    pub to: DateTime<Utc>,
    /// Which end first.
    pub order: Order,
    /// Most points, at most [`MAX_POINTS`].
    pub limit: i64,
    /// Goes on after this point: its time and sequence number.
    pub after: Option<(DateTime<Utc>, i64)>,
}

/// A reading as it left.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Point {
    /// The device's time, or that of receipt where the device gave none or one too far ahead.
    pub ts: DateTime<Utc>,
    /// The device's sequence number; below zero it is a hash of the values that stands in for one.
    pub seq: i64,
    /// The device's own time where that ran ahead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sent_at: Option<DateTime<Utc>>,
    /// The values by metric; whole numbers without a fraction, booleans as booleans.
    pub values: Map<String, Value>,
}

/// A stretch of time of one metric; only its numbers (within ±[`MAX_BUCKETED`]) and booleans (as 0 and 1) count.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bucket {
    /// When it begins; buckets are counted from the epoch.
    pub start: DateTime<Utc>,
    /// Readings in it.
    pub count: i64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
    /// The mean.
    pub avg: f64,
    /// The newest.
    pub last: f64,
}

/// A stored number as JSON: booleans as booleans, whole numbers without a fraction.
#[expect(clippy::cast_possible_truncation, reason = "whole and within ±2^53")]
pub(crate) fn number(kind: Kind, number: f64) -> Value {
    const EXACT: f64 = 9_007_199_254_740_992.0;
    match kind {
        Kind::Boolean => Value::Bool(number != 0.0),
        Kind::Number if number.fract() == 0.0 && number.abs() <= EXACT => Value::from(number as i64),
        Kind::Number => Value::from(number),
    }
}

/// Names and kinds of the shapes with these ids. Shapes never change, so this may be another statement than the one
/// that read their ids.
pub(crate) async fn metrics_of(
    db: &mut PgConnection,
    ids: impl Iterator<Item = i32>,
) -> Result<HashMap<i32, Vec<(std::sync::Arc<str>, Kind)>>> {
    let mut ids: Vec<i32> = ids.collect();
    ids.sort_unstable();
    ids.dedup();
    let found = sqlx::query!("select id, metrics, kinds from shape where id = any($1)", &ids).fetch_all(db).await?;
    Ok(found.into_iter().map(|row| (row.id, Kind::named(row.metrics, &row.kinds))).collect())
}

/// Readings of one device in order of time.
///
/// # Errors
/// When the database fails.
pub async fn points(db: &mut PgConnection, query: &Query) -> Result<Vec<Point>> {
    match &query.metric {
        Some(metric) => one_metric(db, query, metric).await,
        None => whole(db, query).await,
    }
}

/// The nearest time a reading may have, or just past it: PostgreSQL's calendar is shorter than chrono's.
fn within_calendar(ts: DateTime<Utc>) -> DateTime<Utc> {
    ts.clamp(from_ms(0), from_ms(MAX_TS_MS + 1))
}

impl Query {
    /// Both ends of the time, and the open end of a keyset page; where none is given, one that excludes nothing.
    fn range(&self) -> (DateTime<Utc>, DateTime<Utc>, (DateTime<Utc>, i64)) {
        let (from, to) = (within_calendar(self.from), within_calendar(self.to));
        let after = match (self.after, self.order) {
            (Some((ts, seq)), _) => (within_calendar(ts), seq),
            (None, Order::Asc) => (from - TimeDelta::milliseconds(1), i64::MAX),
            (None, Order::Desc) => (to, i64::MIN),
        };
        (from, to, after)
    }
}

struct WholeRow {
    ts: DateTime<Utc>,
    seq: i64,
    sent_at: Option<DateTime<Utc>>,
    shape_id: i32,
    nums: Vec<f64>,
    rest: Option<Value>,
}

async fn whole(db: &mut PgConnection, query: &Query) -> Result<Vec<Point>> {
    let (from, to, (after_ts, after_seq)) = query.range();
    let limit = query.limit.clamp(0, MAX_POINTS);
    let rows = match query.order {
        Order::Asc => {
            sqlx::query_as!(
                WholeRow,
                "
                select ts, seq, sent_at, shape_id, nums, rest from telemetry
                 where device_key = $1 and ts >= $2 and ts < $3 and ts >= $4 and (ts, seq) > ($4, $5)
              order by ts, seq limit $6
                ",
                query.device.0,
                from,
                to,
                after_ts,
                after_seq,
                limit,
            )
            .fetch_all(&mut *db)
            .await?
        }
        Order::Desc => {
            sqlx::query_as!(
                WholeRow,
                "
                select ts, seq, sent_at, shape_id, nums, rest from telemetry
                 where device_key = $1 and ts >= $2 and ts < $3 and ts <= $4 and (ts, seq) < ($4, $5)
              order by ts desc, seq desc limit $6
                ",
                query.device.0,
                from,
                to,
                after_ts,
                after_seq,
                limit,
            )
            .fetch_all(&mut *db)
            .await?
        }
    };
    let shapes = metrics_of(db, rows.iter().map(|row| row.shape_id)).await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let metrics = shapes.get(&row.shape_id).map(Vec::as_slice).unwrap_or_default();
            let mut values: Map<_, _> = metrics
                .iter()
                .zip(&row.nums)
                .map(|((name, kind), value)| (name.to_string(), number(*kind, *value)))
                .collect();
            if let Some(Value::Object(rest)) = row.rest {
                values.extend(rest);
            }
            Point { ts: row.ts, seq: row.seq, sent_at: row.sent_at, values }
        })
        .collect())
}

struct MetricRow {
    ts: DateTime<Utc>,
    seq: i64,
    sent_at: Option<DateTime<Utc>>,
    kind: Option<String>,
    num: Option<f64>,
    rest: Option<Value>,
}

/// Readings are read along their key, and the shape of each by its own. To find the shapes with the metric first would be
/// quicker with a few of them and a thousand times slower with ten thousand, which a tenant may have.
async fn one_metric(db: &mut PgConnection, query: &Query, metric: &str) -> Result<Vec<Point>> {
    let (from, to, (after_ts, after_seq)) = query.range();
    let limit = query.limit.clamp(0, MAX_POINTS);
    let rows = match query.order {
        Order::Asc => {
            sqlx::query_as!(
                MetricRow,
                r#"
                select t.ts, t.seq, t.sent_at, substr(s.kinds, array_position(s.metrics, $2), 1) as kind,
                       t.nums[array_position(s.metrics, $2)] as num, t.rest -> $2 as rest
                  from telemetry t left join shape s on s.id = t.shape_id
                 where t.device_key = $1 and t.ts >= $3 and t.ts < $4 and t.ts >= $5 and (t.ts, t.seq) > ($5, $6)
                   and (array_position(s.metrics, $2) is not null or t.rest ? $2)
              order by t.ts, t.seq limit $7
                "#,
                query.device.0,
                metric,
                from,
                to,
                after_ts,
                after_seq,
                limit,
            )
            .fetch_all(db)
            .await?
        }
        Order::Desc => {
            sqlx::query_as!(
                MetricRow,
                r#"
                select t.ts, t.seq, t.sent_at, substr(s.kinds, array_position(s.metrics, $2), 1) as kind,
                       t.nums[array_position(s.metrics, $2)] as num, t.rest -> $2 as rest
                  from telemetry t left join shape s on s.id = t.shape_id
                 where t.device_key = $1 and t.ts >= $3 and t.ts < $4 and t.ts <= $5 and (t.ts, t.seq) < ($5, $6)
                   and (array_position(s.metrics, $2) is not null or t.rest ? $2)
              order by t.ts desc, t.seq desc limit $7
                "#,
                query.device.0,
                metric,
                from,
                to,
                after_ts,
                after_seq,
                limit,
            )
            .fetch_all(db)
            .await?
        }
    };
    let value = |kind: Option<String>, num: Option<f64>, rest: Option<Value>| match (kind, num) {
        (Some(kind), Some(num)) => number(Kind::of_letter(kind.bytes().next().unwrap_or(b'n')), num),
        _ => rest.unwrap_or_default(),
    };
    Ok(rows
        .into_iter()
        .map(|row| Point {
            ts: row.ts,
            seq: row.seq,
            sent_at: row.sent_at,
            values: Map::from_iter([(metric.to_owned(), value(row.kind, row.num, row.rest))]),
        })
        .collect())
}

/// One metric of one device in equal stretches of time, oldest first; stretches without a number are left out.
///
/// # Errors
/// [`Error::Invalid`] when there would be more than [`MAX_BUCKETS`], or `bucket` is not a whole number of
/// milliseconds above zero.
pub async fn buckets(
    db: &mut PgConnection,
    device: DeviceKey,
    metric: &str,
    from: DateTime<Utc>,
    to: DateTime<Utc>,
    bucket: Duration,
) -> Result<Vec<Bucket>> {
    let (from, to) = (within_calendar(from), within_calendar(to));
    let bucket_ms = i64::try_from(bucket.as_millis()).unwrap_or(i64::MAX);
    if !(1..=MAX_TS_MS).contains(&bucket_ms) || !bucket.subsec_nanos().is_multiple_of(1_000_000) {
        return Err(Error::Invalid(format!("bucket: expected a whole number of milliseconds from 1 to {MAX_TS_MS}")));
    }
    if (to - from).num_milliseconds() / bucket_ms >= MAX_BUCKETS {
        return Err(Error::Invalid(format!(
            "from, to and bucket: expected at most {MAX_BUCKETS} buckets, take a longer bucket or a shorter time"
        )));
    }
    Ok(sqlx::query_as!(
        Bucket,
        r#"
          with p as (
               select t.ts, t.seq, case
                          when array_position(s.metrics, $2) is not null then t.nums[array_position(s.metrics, $2)]
                          when jsonb_typeof(t.rest -> $2) = 'number' then (t.rest ->> $2)::float8
                          when jsonb_typeof(t.rest -> $2) = 'boolean' then ((t.rest ->> $2)::boolean)::integer::float8
                      end as v
                 from telemetry t left join shape s on s.id = t.shape_id
                where t.device_key = $1 and t.ts >= $3 and t.ts < $4)
        select date_bin($5, ts, 'epoch') as "start!", count(*) as "count!", min(v) as "min!", max(v) as "max!",
               avg(v) as "avg!", (array_agg(v order by ts desc, seq desc))[1] as "last!"
          from p where v between -$6::float8 and $6
      group by 1 order by 1
        "#,
        device.0,
        metric,
        from,
        to,
        PgInterval { months: 0, days: 0, microseconds: bucket_ms * 1_000 },
        MAX_BUCKETED,
    )
    .fetch_all(db)
    .await?)
}
