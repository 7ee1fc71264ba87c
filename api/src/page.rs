//! Pages of a list. A page ends with a cursor: the key of its last item, so that the next one begins behind it whatever
//! has come or gone in between. To callers it is an opaque text.

use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use fleet_core::device::GroupPath;
use fleet_core::id::{
    ApiKeyId, BindingId, ClaimId, ClaimRequestId, CommandId, ConnectionEventId, ConnectionId, DeadLetterId,
    DecommissionId, DeviceId, RoleId, SavedSearchId, SessionId, TenantId, UserId,
};
use serde::{Serialize, Serializer};
use utoipa::{IntoParams, ToSchema};

use crate::extract::{FromQuery, Params};

/// Items on a page unless it is said.
const DEFAULT_PAGE: usize = 100;
/// Most items on a page.
const LARGEST_PAGE: usize = 1000;
const NOT_A_CURSOR: &str = "expected the next_cursor of a page of this list";

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
    /// In the list of users.
    User(UserId),
    /// In the list of roles.
    Role(RoleId),
    /// In the list of API keys.
    ApiKey(ApiKeyId),
    /// In the list of bindings.
    Binding(BindingId),
    /// In the list of connections.
    Connection(ConnectionId),
    /// In the list of connection events.
    ConnectionEvent(ConnectionEventId),
    /// In the list of tenants.
    Tenant(TenantId),
    /// In the list of groups.
    Group(GroupPath),
    /// In the audit.
    Audit(i64),
    /// In the list of claims.
    Claim(ClaimId),
    /// In the list of what was asked by claims.
    ClaimRequest(ClaimRequestId),
    /// In the list of commands of a device.
    Command(CommandId),
    /// In the list of decommissions.
    Decommission(DecommissionId),
    /// In the list of saved searches.
    SavedSearch(SavedSearchId),
    /// In the readings of a device.
    Reading { ts_ms: i64, seq: i64 },
}

impl Cursor {
    pub(crate) fn print(&self) -> String {
        let plain = match self {
            Self::Device(id) => format!("d{id}"),
            Self::DeadLetter(id) => format!("l{id}"),
            Self::Session(id) => format!("s{id}"),
            Self::User(id) => format!("u{id}"),
            Self::Role(id) => format!("o{id}"),
            Self::ApiKey(id) => format!("k{id}"),
            Self::Binding(id) => format!("b{id}"),
            Self::Connection(id) => format!("c{id}"),
            Self::ConnectionEvent(id) => format!("e{id}"),
            Self::Tenant(id) => format!("t{id}"),
            Self::Group(path) => format!("g{path}"),
            Self::Audit(seq) => format!("a{seq}"),
            Self::Claim(id) => format!("m{id}"),
            Self::ClaimRequest(id) => format!("q{id}"),
            Self::Decommission(id) => format!("x{id}"),
            Self::SavedSearch(id) => format!("v{id}"),
            Self::Command(id) => format!("z{id}"),
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
            "u" => key.parse().ok().map(Self::User),
            "o" => key.parse().ok().map(Self::Role),
            "k" => key.parse().ok().map(Self::ApiKey),
            "b" => key.parse().ok().map(Self::Binding),
            "c" => key.parse().ok().map(Self::Connection),
            "e" => key.parse().ok().map(Self::ConnectionEvent),
            "t" => key.parse().ok().map(Self::Tenant),
            "g" => key.parse().ok().map(Self::Group),
            "a" => key.parse().ok().map(Self::Audit),
            "m" => key.parse().ok().map(Self::Claim),
            "q" => key.parse().ok().map(Self::ClaimRequest),
            "z" => key.parse().ok().map(Self::Command),
            "x" => key.parse().ok().map(Self::Decommission),
            "v" => key.parse().ok().map(Self::SavedSearch),
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
        Self::parse(text).filter(|cursor| cursor.print() == text).ok_or(NOT_A_CURSOR)
    }
}

impl Serialize for Cursor {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.print())
    }
}

/// Which page of a list that has no filter.
#[derive(IntoParams)]
#[into_params(parameter_in = Query)]
#[expect(dead_code, reason = "what `Paging` reads, as the document tells it")]
pub(crate) struct PagingQuery {
    /// Items on the page.
    #[param(minimum = 1, maximum = 1000, default = 100)]
    limit: Option<usize>,
    /// The `next_cursor` of the page before.
    cursor: Option<String>,
}

/// [`PagingQuery`] as it was read, for a list that is ordered by `K`.
pub(crate) struct Paging<K> {
    pub(crate) after: Option<K>,
    pub(crate) limit: usize,
}

/// What a list is ordered by.
pub(crate) trait Key: Sized {
    fn of(cursor: Cursor) -> Option<Self>;
}

macro_rules! keys {
    ($($key:ident: $cursor:ident),+) => {
        $(impl Key for $key {
            fn of(cursor: Cursor) -> Option<Self> {
                if let Cursor::$cursor(key) = cursor { Some(key) } else { None }
            }
        })+
    };
}
keys!(
    DeviceId: Device,
    DeadLetterId: DeadLetter,
    SessionId: Session,
    UserId: User,
    RoleId: Role,
    ApiKeyId: ApiKey,
    BindingId: Binding,
    ConnectionId: Connection,
    ConnectionEventId: ConnectionEvent,
    TenantId: Tenant,
    DecommissionId: Decommission,
    GroupPath: Group,
    i64: Audit,
    ClaimId: Claim,
    ClaimRequestId: ClaimRequest,
    SavedSearchId: SavedSearch,
    CommandId: Command
);

/// The key behind which a page is to begin; a cursor of another list is refused.
pub(crate) fn behind<K: Key>(query: &mut Params<'_>) -> Option<K> {
    let key = query.one::<Cursor>("cursor").map(K::of);
    if matches!(key, Some(None)) {
        query.refuse("cursor", NOT_A_CURSOR);
    }
    key.flatten()
}

impl<K: Key> FromQuery for Paging<K> {
    fn from_query(query: &mut Params<'_>) -> Option<Self> {
        Some(Self { after: behind(query), limit: query.limit(DEFAULT_PAGE, LARGEST_PAGE) })
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
            let role = name.parse().ok().map(Cursor::Role);
            let tenant = name.parse().ok().map(Cursor::Tenant);
            let group = format!("{name}/{name}").parse().ok().map(Cursor::Group);
            let id = Uuid::from_u128(id);
            let ids = [
                Cursor::DeadLetter(id.into()),
                Cursor::Session(id.into()),
                Cursor::Connection(id.into()),
                Cursor::ConnectionEvent(id.into()),
                Cursor::User(id.into()),
                Cursor::ApiKey(id.into()),
                Cursor::Audit(seq),
                Cursor::Claim(id.into()),
                Cursor::ClaimRequest(id.into()),
                Cursor::Binding(id.into()),
                Cursor::SavedSearch(id.into()),
            ];
            for cursor in ids.into_iter().chain([Cursor::Reading { ts_ms, seq }]).chain(device).chain(role).chain(tenant).chain(group) {
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
