//! Log lines: as they are told, and those around one.

pub(crate) mod context;
pub(crate) mod counts;
pub(crate) mod export;
pub(crate) mod search;
pub(crate) mod tail;

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use fleet_core::clock::from_ms;
use fleet_core::id::DeviceId;
use fleet_core::level::Level;
use fleet_core::log::{self, Line};
use fleet_core::search::{Ask, Reach};
use serde::{Serialize, Serializer};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use crate::extract::{Can, FromQuery, LogsRead, Params};
use crate::problem::Problem;
use crate::state::App;
use crate::time;

/// A `to` that lasts so long is meant as a whole.
const DAY_MS: i64 = 86_400_000;

/// `q`: which lines; left out: all that the caller may see.
fn asked(query: &mut Params<'_>) -> Option<fleet_core::query::Query> {
    let text = query.one::<String>("q").unwrap_or_default();
    let read = log::query::read(&text, query.now());
    read.map_err(|error| query.refuse("q", error.to_string())).ok()
}

/// A parameter that is a time: RFC 3339, a day, or such as `now-15m`; from when to when it lasts.
fn instant(query: &mut Params<'_>, name: &'static str) -> Option<(i64, i64)> {
    let text = query.one::<String>(name)?;
    let read = fleet_core::query::time(&text, query.now());
    let read = read.filter(|(start, _)| time::RANGE_MS.contains(start));
    if read.is_none() {
        query.refuse(name, format!("expected {}", fleet_core::query::A_TIME));
    }
    read
}

/// Which lines are asked for, by their words and their time.
pub(crate) struct Asked {
    query: fleet_core::query::Query,
    from_ms: Option<i64>,
    to_ms: Option<i64>,
}

impl FromQuery for Asked {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        let asked = asked(query);
        let from_ms = instant(query, "from").map(|(start, _)| start);
        let to_ms = instant(query, "to").map(|(start, end)| if end - start >= DAY_MS { end } else { start });
        if from_ms.zip(to_ms).is_some_and(|(from, to)| from >= to) {
            query.refuse("to", "expected a time after from");
        }
        Some(Self { query: asked?, from_ms, to_ms })
    }
}

impl Asked {
    /// It, as the index is asked: with the devices it speaks of and those that the caller may see.
    async fn resolve(&self, app: &App, caller: &Can<LogsRead>) -> Result<Ask, Problem> {
        let mut db = caller.read(app).await?;
        let query = log::query::Query::resolve(&self.query, &mut db, caller.tenant).await?;
        let reach = Reach::of(&mut db, caller.tenant).await?;
        Ok(Ask { query, from_ms: self.from_ms, to_ms: self.to_ms, reach })
    }
}

/// Names a line for who asks what is around it: by its device, its time and its number. To callers it is an opaque text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LineId {
    pub(crate) device: DeviceId,
    pub(crate) ts_ms: i64,
    pub(crate) seq: i64,
}

impl LineId {
    fn of(line: &Line) -> Self {
        Self { device: line.device_id.clone(), ts_ms: line.address.ts_ms, seq: line.seq }
    }

    fn parse(text: &str) -> Option<Self> {
        let plain = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let mut parts = plain.splitn(3, ',');
        let (ts_ms, seq) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
        let device = parts.next()?.parse().ok()?;
        Some(Self { device, ts_ms, seq })
    }
}

impl fmt::Display for LineId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(format!("{},{},{}", self.ts_ms, self.seq, self.device)))
    }
}

impl Serialize for LineId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for LineId {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What does not print as it was given was not printed here.
        let id = Self::parse(text).filter(|id| time::RANGE_MS.contains(&id.ts_ms) && id.to_string() == text);
        id.ok_or("expected the id of a line")
    }
}

/// A line.
#[derive(Serialize, ToSchema)]
#[schema(as = LogLine)]
pub(crate) struct LineBody {
    /// Names it, for `/logs/context`.
    #[schema(value_type = String, example = "MTc2MzcyNjQwMDAwMCw5MTkscHVtcC03")]
    id: LineId,
    /// Who wrote it.
    #[schema(value_type = String, example = "pump-7")]
    device: DeviceId,
    /// When: the device's time, or that of receipt where it gave none or one too far ahead.
    #[serde(serialize_with = "time::serialize")]
    ts: DateTime<Utc>,
    /// The device's sequence number; null when it sent none.
    #[schema(example = 919)]
    seq: Option<i64>,
    /// How much it matters.
    #[schema(value_type = String, example = "warn")]
    level: Level,
    /// The part of the program that wrote it.
    #[schema(example = "net.wifi")]
    target: Option<String>,
    /// What it says.
    #[schema(example = "reconnect 3")]
    message: String,
    /// What it belongs to.
    trace_id: Option<String>,
    /// What else it says: scalars, and arrays of them.
    #[schema(value_type = std::collections::BTreeMap<String, Value>, example = json!({"rssi": -81}))]
    fields: Map<String, Value>,
    /// What of it was too long and was cut: `message`, `fields`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cut: Vec<&'static str>,
    /// The device's own time, where it ran ahead.
    #[serde(serialize_with = "time::serialize_maybe", skip_serializing_if = "Option::is_none")]
    sent_at: Option<DateTime<Utc>>,
    /// Where `message` answers the query: from which character up to which, the last not included.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(example = json!([[0, 9]]))]
    highlights: Vec<(usize, usize)>,
}

impl LineBody {
    pub(crate) fn new(line: &Line, highlights: Vec<(usize, usize)>) -> Self {
        Self {
            id: LineId::of(line),
            device: line.device_id.clone(),
            ts: from_ms(line.address.ts_ms),
            seq: (line.seq >= 0).then_some(line.seq),
            level: line.level,
            target: line.target.clone(),
            message: line.message.clone(),
            trace_id: line.trace.clone(),
            fields: line.fields.clone(),
            cut: line.cut.names(),
            sent_at: line.sent_at_ms.map(from_ms),
            highlights,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_id_prints_as_it_parses(device in "[A-Za-z0-9.-][A-Za-z0-9._-]{0,63}", ts_ms in time::RANGE_MS, seq: i64) {
            if let Ok(device) = device.parse() {
                let id = LineId { device, ts_ms, seq };
                prop_assert_eq!(id.to_string().parse(), Ok(id));
            }
        }

        #[test]
        fn no_text_panics_and_none_has_two_spellings(text in "\\PC{0,60}|[A-Za-z0-9_=-]{0,60}") {
            if let Ok(id) = text.parse::<LineId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }
}
