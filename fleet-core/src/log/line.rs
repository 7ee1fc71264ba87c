//! Lines read back: by where they are, or all that a writer has stored behind a place.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::types::Json;

use super::Cut;
use crate::Result;
use crate::clock::from_ms;
use crate::id::{DeviceId, DeviceKey, TenantKey};
use crate::level::Level;

/// Where a line is. The order is that of time, and the same for all who ask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Its time, in ms since the epoch.
    pub ts_ms: i64,
    /// Who stored it,
    pub writer: i16,
    /// and where among what it stored.
    pub place: i64,
}

/// A line of a device that exists.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// Where it is.
    pub address: Address,
    /// Whose device,
    pub tenant: TenantKey,
    /// and which one.
    pub device: DeviceKey,
    /// The device's name.
    pub device_id: DeviceId,
    /// What the device called it; below 0 it stands in for a number that was not sent.
    pub seq: i64,
    /// How much it matters.
    pub level: Level,
    /// The part of the program that wrote it.
    pub target: Option<String>,
    /// What it says.
    pub message: String,
    /// What it belongs to.
    pub trace: Option<String>,
    /// What else it says: scalars, and arrays of them.
    pub fields: Map<String, Value>,
    /// What of it was too much.
    pub cut: Cut,
    /// The device's own time where it ran ahead and was clamped, in ms since the epoch.
    pub sent_at_ms: Option<i64>,
}

/// Lines behind a place.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Stretch {
    /// In the order of their places.
    pub lines: Vec<Line>,
    /// The last place that was looked at. There may be no line at it: its device is gone, or it was there before.
    pub reached: i64,
    /// Rows of devices that are gone.
    pub orphans: u64,
}

struct Row {
    ts: DateTime<Utc>,
    writer: i16,
    place: i64,
    tenant: Option<TenantKey>,
    device: DeviceKey,
    device_id: Option<DeviceId>,
    seq: i64,
    level: i16,
    target: Option<String>,
    message: String,
    trace: Option<String>,
    fields: Option<Json<Map<String, Value>>>,
    cut: i16,
    sent_at: Option<DateTime<Utc>>,
}

impl Row {
    fn address(&self) -> Address {
        Address { ts_ms: self.ts.timestamp_millis(), writer: self.writer, place: self.place }
    }

    /// None when its device is gone.
    fn line(self) -> Option<Line> {
        Some(Line {
            address: self.address(),
            tenant: self.tenant?,
            device: self.device,
            device_id: self.device_id?,
            seq: self.seq,
            level: Level::from_number(self.level).unwrap_or_default(),
            target: self.target,
            message: self.message,
            trace: self.trace,
            fields: self.fields.map(|fields| fields.0).unwrap_or_default(),
            cut: Cut(self.cut),
            sent_at_ms: self.sent_at.map(|at| at.timestamp_millis()),
        })
    }
}

impl Line {
    /// What `writer` stored behind `place` and not behind `last`, at most `limit` rows.
    pub async fn read_after(
        db: &mut PgConnection,
        writer: i16,
        place: i64,
        last: i64,
        limit: usize,
    ) -> Result<Stretch> {
        Self::read_within(db, writer, place, last, (None, None), limit).await
    }

    /// As [`Line::read_after`], of the lines from one time to before another.
    pub async fn read_within(
        db: &mut PgConnection,
        writer: i16,
        place: i64,
        last: i64,
        (from, to): (Option<DateTime<Utc>>, Option<DateTime<Utc>>),
        limit: usize,
    ) -> Result<Stretch> {
        let rows = sqlx::query_as!(
            Row,
            r#"
            select l.ts as "ts!", l.writer as "writer!", l.place as "place!",
                   d.tenant_key as "tenant?: TenantKey", l.device_key as "device!: DeviceKey", d.id as "device_id?: DeviceId",
                   l.seq as "seq!", l.level as "level!", l.target, l.message as "message!", l.trace_id as trace,
                   l.fields as "fields: Json<Map<String, Value>>", l.cut as "cut!",
                   l.sent_at
              from (select * from log
                     where writer = $1 and place > $2 and place <= $3
                       and ts >= coalesce($5, '-infinity'::timestamptz) and ts < coalesce($6, 'infinity'::timestamptz)
                     order by place
                     limit $4) l
         left join device d on d.key = l.device_key
             order by l.place
            "#,
            writer,
            place,
            last,
            i64::try_from(limit).unwrap_or(i64::MAX),
            from,
            to,
        )
        .fetch_all(db)
        .await?;
        let reached = if rows.len() < limit { last.max(place) } else { rows.last().map_or(last, |row| row.place) };
        let read = rows.len();
        let lines = rows.into_iter().filter_map(Row::line).collect::<Vec<_>>();
        let orphans = (read - lines.len()) as u64;
        Ok(Stretch { lines, reached, orphans })
    }

    /// The lines at these addresses, in their order; without those that are gone, or that the caller's transaction may not see.
    pub async fn fetch(db: &mut PgConnection, addresses: &[Address]) -> Result<Vec<Self>> {
        let ts = addresses.iter().map(|address| from_ms(address.ts_ms)).collect::<Vec<_>>();
        let writer = addresses.iter().map(|address| address.writer).collect::<Vec<_>>();
        let place = addresses.iter().map(|address| address.place).collect::<Vec<_>>();
        // `offset 0` keeps each address a search of its own, so that the day of its time is the only one looked into.
        let rows = sqlx::query_as!(
            Row,
            r#"
            select l.ts as "ts!", l.writer as "writer!", l.place as "place!",
                   d.tenant_key as "tenant?: TenantKey", l.device_key as "device!: DeviceKey", d.id as "device_id?: DeviceId",
                   l.seq as "seq!", l.level as "level!", l.target, l.message as "message!", l.trace_id as trace,
                   l.fields as "fields: Json<Map<String, Value>>", l.cut as "cut!",
                   l.sent_at
              from unnest($1::timestamptz[], $2::smallint[], $3::bigint[]) with ordinality as u (ts, writer, place, nth)
        cross join lateral (
                   select * from log where ts = u.ts and writer = u.writer and place = u.place offset 0) l
              join device d on d.key = l.device_key
             order by u.nth
            "#,
            &ts,
            &writer,
            &place,
        )
        .fetch_all(db)
        .await?;
        Ok(rows.into_iter().filter_map(Row::line).collect())
    }
}
