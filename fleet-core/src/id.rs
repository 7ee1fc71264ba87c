//! Names and keys as types: swapped arguments do not compile.
//!
//! A *name* ([`TenantId`], [`DeviceId`]) is what people and topics use and never changes. A *key*
//! ([`TenantKey`], [`DeviceKey`]) is the narrow number rows refer to; it never leaves the server.
//! Everything else has a uuid v7 inside and a prefixed form outside: `crd_…`, `usr_…`, `con_…`.

use std::borrow::Borrow;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest name of a tenant or device, in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// Why a name or id was refused; the text says what was expected.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadId {
    /// Outside the grammar of names.
    #[error(
        "{noun} id {given:?} is not valid: expected 1 to 64 of A-Z a-z 0-9 . _ -, not beginning with _ and not \".\" or \"..\""
    )]
    Name {
        /// What the name was for.
        noun: &'static str,
        /// What was given, shortened.
        given: String,
    },
    /// Not of the form `prefix_…`.
    #[error("id {given:?} is not valid: expected {prefix}_ and 32 hexadecimal digits")]
    Prefixed {
        /// The prefix that was expected.
        prefix: &'static str,
        /// What was given, shortened.
        given: String,
    },
}

fn shortened(given: &str) -> String {
    given.chars().take(80).collect()
}

/// Whether `name` is a tenant's or device's name: `[A-Za-z0-9._-]{1,64}`, not reserved (`_…`), no path trick.
pub fn is_name(name: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && !name.starts_with('_')
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
}

macro_rules! name {
    ($name:ident, $noun:literal) => {
        #[doc = concat!("The name of a ", $noun, ": immutable, 1 to 64 of `A-Z a-z 0-9 . _ -`.")]
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type)]
        #[serde(try_from = "String", into = "String")]
        #[sqlx(transparent)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadId;
            fn try_from(given: String) -> Result<Self, BadId> {
                if is_name(&given) {
                    Ok(Self(given))
                } else {
                    Err(BadId::Name { noun: $noun, given: shortened(&given) })
                }
            }
        }

        impl FromStr for $name {
            type Err = BadId;
            fn from_str(given: &str) -> Result<Self, BadId> {
                Self::try_from(given.to_owned())
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(TenantId, "tenant");
name!(DeviceId, "device");
name!(RoleId, "role");

macro_rules! key {
    ($name:ident, $noun:literal) => {
        #[doc = concat!("The row of a ", $noun, " inside the database.")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type)]
        #[serde(transparent)]
        #[sqlx(transparent)]
        pub struct $name(pub i64);
    };
}

key!(TenantKey, "tenant");
key!(DeviceKey, "device");
key!(RoleKey, "role");

macro_rules! id {
    ($name:ident, $prefix:literal, $noun:literal) => {
        #[doc = concat!("Names a ", $noun, ": a uuid v7 inside, `", $prefix, "_…` outside.")]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, sqlx::Type)]
        #[serde(try_from = "String", into = "String")]
        #[sqlx(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// A new id; ids made later sort later.
            pub fn new() -> Self {
                Self(Uuid::now_v7())
            }

            /// The uuid inside.
            pub fn uuid(self) -> Uuid {
                self.0
            }
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new()
            }
        }

        impl From<Uuid> for $name {
            fn from(uuid: Uuid) -> Self {
                Self(uuid)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "_{}"), self.0.simple())
            }
        }

        impl FromStr for $name {
            type Err = BadId;
            fn from_str(given: &str) -> Result<Self, BadId> {
                given
                    .strip_prefix(concat!($prefix, "_"))
                    .filter(|hex| hex.len() == 32)
                    .and_then(|hex| Uuid::try_parse(hex).ok())
                    .map(Self)
                    .ok_or_else(|| BadId::Prefixed { prefix: $prefix, given: shortened(given) })
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadId;
            fn try_from(given: String) -> Result<Self, BadId> {
                given.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.to_string()
            }
        }
    };
}

id!(CredentialId, "crd", "device credential");
id!(AuthorityId, "aut", "certificate authority");
id!(UserId, "usr", "user");
id!(ApiKeyId, "key", "API key");
id!(BindingId, "bnd", "binding");
id!(DeadLetterId, "dlq", "dead letter");
id!(ConnectionId, "con", "connection of a client");
id!(ConnectionEventId, "cev", "connection event");
id!(SessionId, "ses", "session");
id!(LoginSessionId, "lgs", "login session");
id!(ClaimId, "clm", "claim");
id!(ClaimRequestId, "crq", "request by a claim");
id!(CommandId, "cmd", "command");
id!(DecommissionId, "dcm", "decommission of a device");
id!(SavedSearchId, "qry", "saved search");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_to_its_grammar() {
        for good in ["a", "boiler-1", "A.b_c", "0", &"x".repeat(64)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "_a", ".", "..", "a/b", "a b", "ä", "a+", "#", "a\0", &"x".repeat(65)] {
            assert!(!is_name(bad), "{bad:?}");
        }
    }

    #[test]
    fn an_id_prints_as_it_parses_and_refuses_another_noun() {
        let id = CredentialId::new();
        assert_eq!(id.to_string().parse(), Ok(id));
        assert!(id.to_string().parse::<UserId>().is_err());
    }
}
