//! The lines around one, of the same device.

use serde_json::{Map, Value};
use sqlx::PgConnection;
use sqlx::types::Json;

use super::Line;
use super::line::Row;
use crate::Result;
use crate::clock::from_ms;
use crate::id::{DeviceId, DeviceKey, TenantKey};

/// Most lines on each side.
pub const MAX_SURROUNDING: usize = 500;

impl Line {
    /// The line of a device with that time and number, between at most `before` lines that come before it and `after` that follow,
    /// all in the order of time. The device is to be opened to the transaction first ([`crate::device::open`]). Without the line
    /// itself when it is gone.
    pub async fn surrounding(
        db: &mut PgConnection,
        device: DeviceKey,
        (ts_ms, seq): (i64, i64),
        before: usize,
        after: usize,
    ) -> Result<Vec<Self>> {
        let most = |lines: usize| i64::try_from(lines.min(MAX_SURROUNDING)).unwrap_or_default();
        let rows = sqlx::query_as!(
            Row,
            r#"
            select (extract(epoch from l.ts) * 1000)::bigint as "ts_ms!", l.writer as "writer!", l.place as "place!",
                   d.tenant_key as "tenant?: TenantKey", l.device_key as "device!: DeviceKey", d.id as "device_id?: DeviceId",
                   l.seq as "seq!", l.level as "level!", l.target, l.message as "message!", l.trace_id as trace,
                   l.fields as "fields: Json<Map<String, Value>>", l.cut as "cut!",
                   (extract(epoch from l.sent_at) * 1000)::bigint as sent_at_ms
              from ((select * from log
                      where device_key = $1 and ts <= $2 and (ts, seq) < ($2, $3)
                      order by ts desc, seq desc limit $4)
                     union all
                    (select * from log
                      where device_key = $1 and ts >= $2 and (ts, seq) >= ($2, $3)
                      order by ts, seq limit $5::bigint + 1)) l
              join device d on d.key = l.device_key
          order by l.ts, l.seq
            "#,
            device as DeviceKey,
            from_ms(ts_ms),
            seq,
            most(before),
            most(after),
        )
        .fetch_all(db)
        .await?;
        Ok(rows.into_iter().filter_map(Row::line).collect())
    }
}
