//! Selectors of devices: the query language over what is known of a device.
//!
//! [`read`] reads one. `type:freezer AND label.site:oslo AND firmware:<2.0` picks by what people say of a device and by what it last
//! said itself, so what it picks changes by the minute; a scope of rights is picked by less ([`crate::scope`]). Ignorant of: who
//! may see which device.

use chrono::{DateTime, Utc};
use sqlx::{Postgres, QueryBuilder};

use crate::error::Result;
use crate::query::{Columns, Kind, Query, Schema};

/// The state of a device that has shown no sign of life.
pub const NEVER_SEEN: &str = "never_seen";
/// The states there are.
pub const STATES: [&str; 5] = [NEVER_SEEN, "online", "sleeping", "offline", "lost"];

/// What can be asked of a device.
pub const SCHEMA: Schema = Schema {
    noun: "selector",
    fields: &[
        ("device", Kind::Name),
        ("type", Kind::Name),
        ("group", Kind::Path),
        ("gateway", Kind::Name),
        ("state", Kind::OneOf(&STATES)),
        ("firmware", Kind::Version),
        ("disabled", Kind::Flag),
        ("created", Kind::Time),
        ("seen", Kind::Time),
        ("missing", Kind::Number),
    ],
    families: &[("label.", Kind::Name)],
    words: None,
};

/// Reads a selector.
///
/// # Errors
/// [`crate::error::Error::Invalid`] with the column and what was expected there.
pub fn read(text: &str, now: DateTime<Utc>) -> Result<Query> {
    Query::parse(text, &SCHEMA, now)
}

/// The columns of `device d left join device_status s`.
pub(crate) struct DeviceColumns;

impl Columns for DeviceColumns {
    fn push(&self, field: &str, sql: &mut QueryBuilder<Postgres>) {
        let column = match field {
            "device" => "d.id",
            "type" => "d.type",
            "group" => "d.group_path",
            "gateway" => "(select g.id from device g where g.key = d.gateway_key)",
            "state" => "coalesce(s.state, 'never_seen')",
            "firmware" => "s.firmware",
            "disabled" => "d.disabled",
            "created" => "d.created_at",
            "seen" => "s.last_seen_at",
            "missing" => "coalesce(s.missing, 0)::float8",
            label => {
                let key = label.strip_prefix("label.").unwrap_or(label);
                sql.push("(d.labels ->> ").push_bind(key.to_owned()).push(")");
                return;
            }
        };
        sql.push(column);
    }
}
