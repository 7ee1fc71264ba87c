//! What else a device wrote around a line.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

use super::{Address, Line};
use crate::clock::from_ms;
use crate::error::Result;
use crate::id::DeviceKey;

/// Most lines before, and behind, a line.
pub const MAX_AROUND: usize = 500;

/// A line among those of its device, oldest first.
#[derive(Debug, Clone, PartialEq)]
pub struct Context {
    /// Those before it.
    pub before: Vec<Line>,
    /// It.
    pub line: Line,
    /// Those behind it.
    pub after: Vec<Line>,
}

/// The line of a device with that time and number, and as many as are asked for (at most [`MAX_AROUND`]) before and behind it.
/// To be called in a transaction that has opened the device.
pub async fn context(
    db: &mut PgConnection,
    device: DeviceKey,
    (ts_ms, seq): (i64, i64),
    before: usize,
    after: usize,
) -> Result<Option<Context>> {
    let Some(address) = find(db, device, ts_ms, seq).await? else { return Ok(None) };
    let mut addresses = neighbours(db, device, address, before, true).await?;
    addresses.reverse();
    let earlier = addresses.len();
    addresses.push(address);
    addresses.extend(neighbours(db, device, address, after, false).await?);
    let mut before = Line::fetch(db, &addresses).await?;
    // Whoever may see one line of a device sees all of them; what was deleted meanwhile is from the beginning, or is it.
    let at = before.iter().position(|line| line.address == address).unwrap_or(before.len()).min(earlier);
    let mut rest = before.split_off(at).into_iter();
    let line = rest.next().filter(|line| line.address == address);
    Ok(line.map(|line| Context { before, line, after: rest.collect() }))
}

async fn find(db: &mut PgConnection, device: DeviceKey, ts_ms: i64, seq: i64) -> Result<Option<Address>> {
    let found = sqlx::query!(
        "select writer, place from log where device_key = $1 and ts = $2 and seq = $3",
        device.0,
        from_ms(ts_ms),
        seq
    );
    Ok(found.fetch_optional(db).await?.map(|row| Address { ts_ms, writer: row.writer, place: row.place }))
}

struct Found {
    ts: DateTime<Utc>,
    writer: i16,
    place: i64,
}

/// The nearest lines on one side, the nearest first.
async fn neighbours(
    db: &mut PgConnection,
    device: DeviceKey,
    of: Address,
    count: usize,
    before: bool,
) -> Result<Vec<Address>> {
    let (ts, count) = (from_ms(of.ts_ms), i64::try_from(count.min(MAX_AROUND)).expect("a small constant"));
    // The time stands alone as well: that is what the key is gone through by.
    let found = if before {
        sqlx::query_as!(
            Found,
            "
            select ts, writer, place from log
             where device_key = $1 and ts <= $2 and (ts, writer, place) < ($2, $3, $4)
             order by ts desc, writer desc, place desc limit $5
            ",
            device.0,
            ts,
            of.writer,
            of.place,
            count
        )
        .fetch_all(db)
        .await?
    } else {
        sqlx::query_as!(
            Found,
            "
            select ts, writer, place from log
             where device_key = $1 and ts >= $2 and (ts, writer, place) > ($2, $3, $4)
             order by ts, writer, place limit $5
            ",
            device.0,
            ts,
            of.writer,
            of.place,
            count
        )
        .fetch_all(db)
        .await?
    };
    let address = |row: Found| Address { ts_ms: row.ts.timestamp_millis(), writer: row.writer, place: row.place };
    Ok(found.into_iter().map(address).collect())
}
