//! Pages of a list. A page ends with a cursor: the key of its last item, so that the next one begins behind it whatever
//! has come or gone in between. To callers it is an opaque text.

use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fleet_core::id::{DeadLetterId, DeviceId, SessionId};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;

/// Some items, and where to go on.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Page<T> {
    /// The items.
    pub(crate) items: Vec<T>,
    /// The `cursor` of the next page; null at the end.
    #[schema(value_type = Option<String>)]
    pub(crate) next_cursor: Option<Cursor>,
}

impl<T> Page<T> {
    /// All there is.
    pub(crate) fn whole(items: Vec<T>) -> Self {
        Self { items, next_cursor: None }
    }
}

impl<T> Page<T> {
    /// The first `limit` of `rows`, which were asked for with one more, but never more than `most`; so behind a page of
    /// `most` there may be nothing.
    pub(crate) fn cut<R>(
        mut rows: Vec<R>,
        limit: usize,
        most: usize,
        key: fn(&R) -> Cursor,
        item: impl FnMut(R) -> T,
    ) -> Self {
        let more = rows.len() > limit || rows.len() >= most;
        rows.truncate(limit);
        let next_cursor = rows.last().filter(|_| more).map(key);
        Self { items: rows.into_iter().map(item).collect(), next_cursor }
    }
}

/// The key of the last item of a page. The first letter tells the lists apart, so that the cursor of one is no cursor of
/// another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Cursor {
    /// In the list of devices.
    Device(DeviceId),
    /// In the list of dead letters.
    DeadLetter(DeadLetterId),
    /// In the list of sessions.
    Session(SessionId),
    /// In the readings of a device.
    Reading { ts_ms: i64, seq: i64 },
}

impl Cursor {
    pub(crate) fn print(&self) -> String {
        let plain = match self {
            Self::Device(id) => format!("d{id}"),
            Self::DeadLetter(id) => format!("l{id}"),
            Self::Session(id) => format!("s{id}"),
            Self::Reading { ts_ms, seq } => format!("r{ts_ms},{seq}"),
        };
        URL_SAFE_NO_PAD.encode(plain)
    }

    fn parse(text: &str) -> Option<Self> {
        let plain = String::from_utf8(URL_SAFE_NO_PAD.decode(text).ok()?).ok()?;
        let (list, key) = plain.split_at_checked(1)?;
        match list {
            "d" => key.parse().ok().map(Self::Device),
            "l" => key.parse().ok().map(Self::DeadLetter),
            "s" => key.parse().ok().map(Self::Session),
            "r" => {
                let (ts_ms, seq) = key.split_once(',')?;
                Some(Self::Reading { ts_ms: ts_ms.parse().ok()?, seq: seq.parse().ok()? })
            }
            _ => None,
        }
    }
}

impl FromStr for Cursor {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // What does not print as it was given was not printed here.
        Self::parse(text)
            .filter(|cursor| cursor.print() == text)
            .ok_or("expected the next_cursor of a page of this list")
    }
}

impl Serialize for Cursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.print())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::*;

    proptest! {
        #[test]
        fn a_cursor_prints_as_it_parses(name in "[A-Za-z0-9.-][A-Za-z0-9._-]{0,63}", id: u128, ts_ms: i64, seq: i64) {
            let device = name.parse().ok().map(Cursor::Device);
            let id = Uuid::from_u128(id);
            let others = [Cursor::DeadLetter(id.into()), Cursor::Session(id.into()), Cursor::Reading { ts_ms, seq }];
            for cursor in others.into_iter().chain(device) {
                prop_assert_eq!(cursor.print().parse(), Ok(cursor));
            }
        }

        #[test]
        fn no_text_panics_and_none_has_two_spellings(text in "\\PC{0,60}|[A-Za-z0-9_=-]{0,60}") {
            if let Ok(cursor) = text.parse::<Cursor>() {
                prop_assert_eq!(cursor.print(), text);
            }
        }
    }
}
