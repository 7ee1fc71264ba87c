//! The chain: how a row is sealed, added, and found to be untouched.

use chrono::{DateTime, SecondsFormat, Utc};
use futures::TryStreamExt;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::json;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use super::{Author, Entry, record};
use crate::Result;
use crate::id::TenantKey;

/// What every sealed text begins with.
const FORMAT: &str = "muster-audit-1";
/// Stands for a field that is not there, where its length would be.
const ABSENT: [u8; 4] = [0xff; 4];
/// Rows that one [`expire`] deletes of a tenant.
pub const EXPIRE_ROWS: u64 = 100_000;

/// A row of the audit, as it is exported.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Row {
    /// The tenant by its name.
    pub tenant: String,
    /// Its place in the tenant's chain, from 1.
    pub seq: i64,
    /// When.
    #[serde(serialize_with = "serialize_at")]
    pub at: DateTime<Utc>,
    /// `user`, `api-key`, `device`, `system` or `unknown`.
    pub actor_kind: String,
    /// Names the actor.
    pub actor_id: Option<String>,
    /// What the actor was called then.
    pub actor_name: Option<String>,
    /// What was done: `noun.verb`.
    pub action: String,
    /// To what kind of resource.
    pub resource_kind: String,
    /// Which of them.
    pub resource_id: String,
    /// The device it is about.
    pub device: Option<String>,
    /// What the resource was: JSON as text.
    pub before: Option<String>,
    /// What it has become: JSON as text.
    pub after: Option<String>,
    /// Where the request came from.
    pub address: Option<String>,
    /// `x-request-id` of the request.
    pub request_id: Option<String>,
    /// What the client called itself.
    pub user_agent: Option<String>,
    /// The hash of the row before; of the first row 32 zeroes.
    #[serde(with = "as_hex")]
    pub prev_hash: [u8; 32],
    /// SHA-256 of all that stands above.
    #[serde(with = "as_hex")]
    pub hash: [u8; 32],
}

fn moment(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn serialize_at<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&moment(*at))
}

mod as_hex {
    use super::{Deserialize, Deserializer, Serializer, unhex};

    pub(super) fn serialize<S: Serializer>(hash: &[u8; 32], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&hex::encode(hash))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(deserializer)?;
        unhex(&text).ok_or_else(|| serde::de::Error::custom("expected 64 hexadecimal digits"))
    }
}

/// The bytes of a hash as this module writes it: the 64 digits in small letters.
fn unhex(text: &str) -> Option<[u8; 32]> {
    let mut hash = [0; 32];
    hex::decode_to_slice(text, &mut hash).ok()?;
    (hex::encode(hash) == text).then_some(hash)
}

impl Row {
    /// The hash that this row must have: SHA-256 of the format's name and of each field with its length before it.
    pub fn seal(&self) -> [u8; 32] {
        let (prev_hash, seq, at) = (hex::encode(self.prev_hash), self.seq.to_string(), moment(self.at));
        let fields = [
            Some(FORMAT),
            Some(&prev_hash),
            Some(&self.tenant),
            Some(&seq),
            Some(&at),
            Some(&self.actor_kind),
            self.actor_id.as_deref(),
            self.actor_name.as_deref(),
            Some(&self.action),
            Some(&self.resource_kind),
            Some(&self.resource_id),
            self.device.as_deref(),
            self.before.as_deref(),
            self.after.as_deref(),
            self.address.as_deref(),
            self.request_id.as_deref(),
            self.user_agent.as_deref(),
        ];
        let mut sealed = Sha256::new();
        for field in fields {
            match field {
                Some(text) => {
                    let length = u32::try_from(text.len()).expect("fields are bounded far below 4 GiB");
                    sealed.update(length.to_be_bytes());
                    sealed.update(text);
                }
                None => sealed.update(ABSENT),
            }
        }
        sealed.finalize().into()
    }
}

/// A place in a chain, to be noted elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// The row.
    pub seq: i64,
    /// Its hash.
    #[serde(with = "as_hex")]
    pub hash: [u8; 32],
}

impl Head {
    /// Before the first row.
    pub const START: Self = Self { seq: 0, hash: [0; 32] };
}

impl std::fmt::Display for Head {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.seq, hex::encode(self.hash))
    }
}

impl std::str::FromStr for Head {
    type Err = &'static str;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let expected = "expected the number of a row, a colon and its hash";
        let (seq, hash) = text.split_once(':').ok_or(expected)?;
        let (seq, hash) = (seq.parse().map_err(|_| expected)?, unhex(hash).ok_or(expected)?);
        Ok(Self { seq, hash })
    }
}

/// The last line of an export: where the chain ended then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trailer {
    /// The end.
    pub head: Head,
}

/// What is wrong with a chain, at the first row where it shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The row is not there although later ones are, or the head says that it was.
    #[error("row {seq} is missing")]
    Missing {
        /// The row.
        seq: i64,
    },
    /// The row is there again, or behind a later one.
    #[error("row {seq} is out of its order")]
    OutOfOrder {
        /// The row.
        seq: i64,
    },
    /// The row has another hash than its contents give.
    #[error("row {seq} was changed: its contents do not match its hash")]
    Changed {
        /// The row.
        seq: i64,
    },
    /// The row names another predecessor than the one that is there.
    #[error("row {seq} does not follow the row before it: one of them was replaced")]
    Unlinked {
        /// The row.
        seq: i64,
    },
    /// The rows hold, but what is stored of their end does not name the last of them.
    #[error("the stored end of the chain does not name row {seq}: it was changed")]
    EndMoved {
        /// The row.
        seq: i64,
    },
    /// The chain holds, but is not the one whose end was noted.
    #[error("row {seq} is not the one that was noted: the chain was made anew")]
    Replaced {
        /// The row.
        seq: i64,
    },
}

impl Fault {
    /// The row where it shows.
    pub fn seq(self) -> i64 {
        match self {
            Self::Missing { seq }
            | Self::OutOfOrder { seq }
            | Self::Changed { seq }
            | Self::Unlinked { seq }
            | Self::EndMoved { seq }
            | Self::Replaced { seq } => seq,
        }
    }
}

/// Rows that are looked at one after another.
#[derive(Debug, Clone)]
pub struct Chain {
    at: Head,
    noted: Option<Head>,
    rows: u64,
}

impl Chain {
    /// A chain that goes on behind `start`. When it passes `noted`, it must be what was noted.
    pub fn behind(start: Head, noted: Option<Head>) -> Self {
        Self { at: start, noted, rows: 0 }
    }

    /// A chain of which a part is there, beginning with this row.
    pub fn beginning_with(row: &Row, noted: Option<Head>) -> Self {
        Self::behind(Head { seq: row.seq - 1, hash: row.prev_hash }, noted)
    }

    /// Looks at the next row.
    pub fn next(&mut self, row: &Row) -> Result<(), Fault> {
        let (expected, seq) = (self.at.seq + 1, row.seq);
        if seq > expected {
            return Err(Fault::Missing { seq: expected });
        }
        if seq < expected {
            return Err(Fault::OutOfOrder { seq });
        }
        if row.hash != row.seal() {
            return Err(Fault::Changed { seq });
        }
        if row.prev_hash != self.at.hash {
            return Err(Fault::Unlinked { seq });
        }
        self.at = Head { seq, hash: row.hash };
        self.rows += 1;
        match self.noted {
            Some(noted) if noted.seq == seq && noted.hash != row.hash => Err(Fault::Replaced { seq }),
            _ => Ok(()),
        }
    }

    /// Looks whether it ends where it should.
    pub fn end(&self, head: Head) -> Result<(), Fault> {
        let at = self.at;
        let missing = |end: Head| at.seq < end.seq;
        if missing(head) || self.noted.is_some_and(missing) {
            return Err(Fault::Missing { seq: at.seq + 1 });
        }
        if at == head { Ok(()) } else { Err(Fault::EndMoved { seq: at.seq.min(head.seq + 1) }) }
    }

    /// How many rows were found in order.
    pub fn rows(&self) -> u64 {
        self.rows
    }
}

/// What was found when a chain was looked through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Rows in order, up to the fault if there is one.
    pub rows: u64,
    /// Rows up to this one were deleted because of their age.
    pub kept_after: i64,
    /// Where the chain ends by what is stored of its end; to be noted elsewhere.
    pub head: Head,
    /// What is wrong.
    pub fault: Option<Fault>,
}

/// Where a chain begins and ends by what is stored of it.
struct Ends {
    start: Head,
    head: Head,
}

async fn ends(db: &mut PgConnection, tenant: TenantKey) -> Result<Ends> {
    let row = sqlx::query!(
        r#"
        select seq, hash as "hash: [u8; 32]", kept_after, kept_hash as "kept_hash: [u8; 32]"
          from audit_head where tenant_key = $1
        "#,
        tenant.0
    );
    let row = row.fetch_optional(db).await?;
    Ok(row.map_or(Ends { start: Head::START, head: Head::START }, |row| Ends {
        start: Head { seq: row.kept_after, hash: row.kept_hash },
        head: Head { seq: row.seq, hash: row.hash },
    }))
}

/// Looks through the whole chain of a tenant, as it is at one moment. `noted` is an end of the chain that was noted earlier.
/// To be called first in a transaction.
pub async fn verify(db: &mut PgConnection, tenant: TenantKey, noted: Option<Head>) -> Result<Report> {
    sqlx::query!("set transaction isolation level repeatable read").execute(&mut *db).await?;
    let Ends { start, head } = ends(db, tenant).await?;
    let mut chain = Chain::behind(start, noted.filter(|noted| noted.seq > start.seq));
    let mut rows = sqlx::query_as!(
        Row,
        r#"
        select t.id as tenant, seq, at, actor_kind, actor_id, actor_name, action, resource_kind, resource_id, device, before,
               after, address, request_id, user_agent, prev_hash as "prev_hash: [u8; 32]", hash as "hash: [u8; 32]"
          from audit a
          join tenant t on t.key = a.tenant_key
         where tenant_key = $1
         order by seq
        "#,
        tenant.0
    )
    .fetch(db);
    let mut fault = None;
    while let Some(row) = rows.try_next().await? {
        fault = chain.next(&row).err();
        if fault.is_some() {
            break;
        }
    }
    let fault = fault.or_else(|| chain.end(head).err());
    Ok(Report { rows: chain.rows(), kept_after: start.seq, head, fault })
}

/// At most `limit` rows of a tenant as they are exported, oldest first, behind the row `after`; and where the chain ends.
pub async fn rows(db: &mut PgConnection, tenant: TenantKey, after: i64, limit: i64) -> Result<(Vec<Row>, Head)> {
    let Ends { head, .. } = ends(db, tenant).await?;
    let rows = sqlx::query_as!(
        Row,
        r#"
        select t.id as tenant, seq, at, actor_kind, actor_id, actor_name, action, resource_kind, resource_id, device, before,
               after, address, request_id, user_agent, prev_hash as "prev_hash: [u8; 32]", hash as "hash: [u8; 32]"
          from audit a
          join tenant t on t.key = a.tenant_key
         where tenant_key = $1 and seq > $2 and seq <= $4
         order by seq
         limit $3
        "#,
        tenant.0,
        after,
        limit,
        head.seq
    )
    .fetch_all(db)
    .await?;
    Ok((rows, head))
}

/// Adds rows that are sealed, in order, and moves the end.
pub(super) async fn append(db: &mut PgConnection, tenant: TenantKey, rows: &[Row]) -> Result<()> {
    fn column<'a, T>(rows: &'a [Row], field: impl Fn(&'a Row) -> T) -> Vec<T> {
        rows.iter().map(field).collect()
    }
    let Some(last) = rows.last() else { return Ok(()) };
    sqlx::query!(
        "
        with added as (
            insert into audit (tenant_key, seq, at, actor_kind, actor_id, actor_name, action, resource_kind, resource_id, device,
                               before, after, address, request_id, user_agent, prev_hash, hash)
            select $1, r.seq, $2, $3, $4, $5, r.action, r.resource_kind, r.resource_id, r.device, r.before, r.after, $6, $7, $8,
                   r.prev_hash, r.hash
              from unnest($9::bigint[], $10::text[], $11::text[], $12::text[], $13::text[], $14::text[], $15::text[],
                          $16::bytea[], $17::bytea[])
                as r (seq, action, resource_kind, resource_id, device, before, after, prev_hash, hash))
        update audit_head set seq = $18, hash = $19 where tenant_key = $1
        ",
        tenant.0,
        last.at,
        last.actor_kind,
        last.actor_id,
        last.actor_name,
        last.address,
        last.request_id,
        last.user_agent,
        &column(rows, |row| row.seq),
        &column(rows, |row| row.action.as_str()) as &[&str],
        &column(rows, |row| row.resource_kind.as_str()) as &[&str],
        &column(rows, |row| row.resource_id.as_str()) as &[&str],
        &column(rows, |row| row.device.as_deref()) as &[Option<&str>],
        &column(rows, |row| row.before.as_deref()) as &[Option<&str>],
        &column(rows, |row| row.after.as_deref()) as &[Option<&str>],
        &column(rows, |row| row.prev_hash.as_slice()) as &[&[u8]],
        &column(rows, |row| row.hash.as_slice()) as &[&[u8]],
        last.seq,
        last.hash.as_slice(),
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Deletes the oldest rows of a tenant, those of before `cutoff`, at most [`EXPIRE_ROWS`]; the hash of the last of them
/// stays, so that the rest can still be verified. That they were deleted is written down. To be called in a transaction.
pub async fn expire(
    db: &mut PgConnection,
    tenant: TenantKey,
    cutoff: DateTime<Utc>,
    now: DateTime<Utc>,
) -> Result<u64> {
    let last = sqlx::query!(
        r#"
        with head as (select seq, kept_after from audit_head where tenant_key = $1 for no key update)
        select a.seq, a.hash, head.kept_after
          from head
          join audit a on a.tenant_key = $1
         where a.seq = least(head.kept_after + $3, (
               select coalesce(min(seq) - 1, head.seq) from audit where tenant_key = $1 and at >= $2))
        "#,
        tenant.0,
        cutoff,
        EXPIRE_ROWS.cast_signed()
    );
    let Some(last) = last.fetch_optional(&mut *db).await? else { return Ok(0) };
    sqlx::query!("set local muster.audit_retention = 'on'").execute(&mut *db).await?;
    let deleted = sqlx::query!("delete from audit where tenant_key = $1 and seq <= $2", tenant.0, last.seq);
    let deleted = deleted.execute(&mut *db).await?.rows_affected();
    sqlx::query!("set local muster.audit_retention = 'off'").execute(&mut *db).await?;
    sqlx::query!(
        "update audit_head set kept_after = $2, kept_hash = $3 where tenant_key = $1",
        tenant.0,
        last.seq,
        last.hash
    )
    .execute(&mut *db)
    .await?;
    let what = json!({ "from": last.kept_after + 1, "to": last.seq, "before": moment(cutoff) });
    record(db, &Author::system(tenant, "retention"), &Entry::of("audit.expire", last.seq).before(&what), now).await?;
    Ok(deleted)
}
