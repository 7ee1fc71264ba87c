//! Import: many devices at once, all or none.
//!
//! A file is read by [`read`] into rows and what is wrong with them; [`check`] looks for what is wrong with the rest of them
//! in the database; [`enrol`] enrols all of them with a credential each, by a handful of statements whatever their number.
//! Holds: nothing is enrolled unless every row is right; every row that is wrong is counted, and the first
//! [`MAX_LISTED`] are told by their lines. Gateways may stand in the same file, before or behind their children.
//! Ignorant of: MQTT, HTTP, users.

mod read;

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use serde::Serialize;
use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use crate::config::Secret;
use crate::control;
use crate::credential::{self, Issued};
use crate::device::{DeviceType, GroupPath, NewDevice};
use crate::error::{Error, Result};
use crate::id::{CredentialId, DeviceId, DeviceKey, TenantKey};

pub use read::{Format, read};

/// Rows that are told when they are wrong; the others are counted.
pub const MAX_LISTED: usize = 100;

/// One row of a file.
#[derive(Debug, Clone)]
pub struct Row {
    /// Where it stands: the line, in a JSON array the place, from 1.
    pub line: u64,
    /// The device it describes.
    pub device: NewDevice,
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LineError {
    /// Where it stands: the line, in a JSON array the place, from 1.
    pub line: u64,
    /// The device's id as it was given, shortened; `None` when there is none.
    pub id: Option<String>,
    /// What was expected.
    pub error: String,
}

/// What is wrong with a file: the first [`MAX_LISTED`], and how many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Errors {
    listed: Vec<LineError>,
    count: usize,
}

impl Errors {
    fn add(&mut self, line: u64, id: Option<&str>, error: &impl ToString) {
        self.count += 1;
        if self.listed.len() < MAX_LISTED {
            let id = id.map(|id| id.chars().take(80).collect());
            self.listed.push(LineError { line, id, error: error.to_string() });
        }
    }

    fn of_row(&mut self, row: &Row, error: &impl ToString) {
        self.add(row.line, Some(row.device.id.as_str()), error);
    }

    /// Whether nothing is wrong.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// How much is wrong, whether it is listed or not.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Some of it, in the order of the lines.
    pub fn listed(mut self) -> Vec<LineError> {
        self.listed.sort_by_key(|error| error.line);
        self.listed
    }
}

/// A file that was read.
#[derive(Debug, Clone, Default)]
pub struct Import {
    /// Rows that are right in themselves.
    rows: Vec<Row>,
    /// Every id in the file, that of wrong rows too, and where it stands first.
    first: HashMap<DeviceId, u64>,
    /// How many rows there are, wrong ones included.
    count: usize,
    /// Whether there are more rows than were to be read.
    pub is_too_long: bool,
    /// What is wrong.
    pub errors: Errors,
}

impl Import {
    /// How many rows the file has, wrong ones included.
    pub fn rows(&self) -> usize {
        self.count
    }

    /// The devices of the rows that are right in themselves, in the order of the file.
    pub fn devices(&self) -> impl Iterator<Item = &NewDevice> {
        self.rows.iter().map(|row| &row.device)
    }
}

/// A device that was enrolled.
#[derive(Debug, Clone)]
pub struct Enrolled {
    /// Where it stood in the file.
    pub line: u64,
    /// Its name.
    pub id: DeviceId,
    /// Its credential, at the only moment its secret is known.
    pub credential: Issued,
}

/// A device that is there already and named as a gateway.
struct Gateway {
    has_gateway: bool,
    children: usize,
}

/// Looks for what only the database knows: ids that are taken, gateways that do not exist or cannot be one, or would have more
/// than `max_children`. To be called in a transaction: the gateways stay locked until it ends.
pub async fn check(db: &mut PgConnection, tenant: TenantKey, import: &mut Import, max_children: usize) -> Result<()> {
    let Import { rows, first, errors, .. } = import;
    let in_file: HashMap<&DeviceId, bool> =
        rows.iter().map(|row| (&row.device.id, row.device.gateway.is_some())).collect();
    let ids = rows.iter().map(|row| row.device.id.to_string()).collect::<Vec<_>>();
    let taken = sqlx::query_scalar!("select id from device where tenant_key = $1 and id = any($2)", tenant.0, &ids)
        .fetch_all(&mut *db)
        .await?;
    let taken: HashSet<_> = taken.into_iter().collect();
    let mut gateways = gateways(db, tenant, rows, first).await?;
    let mut children: HashMap<&DeviceId, usize> = HashMap::new();
    for row in rows.iter() {
        if taken.contains(row.device.id.as_str()) {
            errors.of_row(row, &Error::DeviceExists(row.device.id.clone()));
        }
        let Some(gateway) = &row.device.gateway else { continue };
        let known = gateways.get_mut(gateway.as_str());
        let is_bad = *gateway == row.device.id
            || in_file.get(gateway).copied().unwrap_or(false)
            || known.as_ref().is_some_and(|known| known.has_gateway);
        if is_bad {
            errors.of_row(row, &Error::BadGateway(gateway.clone()));
            continue;
        }
        let count = match known {
            Some(known) => &mut known.children,
            None if first.contains_key(gateway) => children.entry(gateway).or_default(),
            None => {
                errors.of_row(row, &Error::NoSuchGateway(gateway.clone()));
                continue;
            }
        };
        *count += 1;
        if *count > max_children {
            errors.of_row(row, &Error::TooMany { what: "children of this gateway", most: max_children });
        }
    }
    Ok(())
}

/// The gateways that are not in the file, locked in the order of their keys as everywhere.
async fn gateways(
    db: &mut PgConnection,
    tenant: TenantKey,
    rows: &[Row],
    first: &HashMap<DeviceId, u64>,
) -> Result<HashMap<String, Gateway>> {
    let mut names = rows.iter().filter_map(|row| row.device.gateway.as_ref()).collect::<Vec<_>>();
    names.sort_unstable();
    names.dedup();
    let names =
        names.into_iter().filter(|name| !first.contains_key(*name)).map(ToString::to_string).collect::<Vec<_>>();
    if names.is_empty() {
        return Ok(HashMap::new());
    }
    let locked = sqlx::query!(
        r#"
        select key as "key: DeviceKey", id, gateway_key is not null as "has_gateway!"
          from device
         where tenant_key = $1 and id = any($2)
         order by key
           for no key update
        "#,
        tenant.0,
        &names
    )
    .fetch_all(&mut *db)
    .await?;
    let keys = locked.iter().map(|row| row.key.0).collect::<Vec<_>>();
    let counted = sqlx::query!(
        r#"
        select gateway_key as "key!: DeviceKey", count(*) as "children!" from device
         where gateway_key = any($1) group by gateway_key
        "#,
        &keys
    )
    .fetch_all(db)
    .await?;
    let children: HashMap<_, _> = counted.into_iter().map(|row| (row.key, row.children)).collect();
    let gateway = |key, has_gateway| {
        let children = children.get(&key).and_then(|count| usize::try_from(*count).ok()).unwrap_or_default();
        Gateway { has_gateway, children }
    };
    Ok(locked.into_iter().map(|row| (row.id, gateway(row.key, row.has_gateway))).collect())
}

/// Enrols every device of a file in which nothing is wrong, each with a credential. To be called in the transaction of
/// [`check`]. Devices that somebody else enrolled meanwhile are noted in `errors`; nothing may be committed then.
pub async fn enrol(
    db: &mut PgConnection,
    tenant: TenantKey,
    import: &mut Import,
    now: DateTime<Utc>,
) -> Result<Vec<Enrolled>> {
    let Import { rows, errors, .. } = import;
    if !errors.is_empty() {
        return Err(Error::Internal("an import that was not right".into()));
    }
    let (behind, alone): (Vec<&Row>, Vec<&Row>) = rows.iter().partition(|row| row.device.gateway.is_some());
    let mut made = insert(db, tenant, &alone, now).await?;
    made.extend(insert(db, tenant, &behind, now).await?);
    for row in rows.iter().filter(|row| !made.contains_key(row.device.id.as_str())) {
        errors.of_row(row, &Error::DeviceExists(row.device.id.clone()));
    }
    if !errors.is_empty() {
        return Ok(Vec::new());
    }
    let enrolled = issue(db, tenant, rows, &made, now).await?;
    if !behind.is_empty() {
        control::bump(db).await?;
    }
    Ok(enrolled)
}

/// The keys of those that were not there, by their ids.
async fn insert(
    db: &mut PgConnection,
    tenant: TenantKey,
    rows: &[&Row],
    now: DateTime<Utc>,
) -> Result<HashMap<String, DeviceKey>> {
    let devices = || rows.iter().map(|row| &row.device);
    let ids = devices().map(|device| device.id.to_string()).collect::<Vec<_>>();
    let kinds = devices().map(|device| device.kind.as_ref().map(DeviceType::to_string)).collect::<Vec<_>>();
    let groups = devices().map(|device| device.group.as_ref().map(GroupPath::to_string)).collect::<Vec<_>>();
    let labels = devices().map(|device| serde_json::json!(device.labels)).collect::<Vec<_>>();
    let gateways = devices().map(|device| device.gateway.as_ref().map(DeviceId::to_string)).collect::<Vec<_>>();
    let made = sqlx::query!(
        r#"
        insert into device (tenant_key, id, type, group_path, labels, gateway_key, created_at, updated_at)
        select $1, u.id, u.type, u.group_path, u.labels, g.key, $7, $7
          from unnest($2::text[], $3::text[], $4::text[], $5::jsonb[], $6::text[])
               as u (id, type, group_path, labels, gateway)
          left join device g on g.tenant_key = $1 and g.id = u.gateway
            on conflict on constraint device_id_key do nothing
     returning id, key as "key: DeviceKey"
        "#,
        tenant.0,
        &ids,
        &kinds as &[Option<String>],
        &groups as &[Option<String>],
        &labels,
        &gateways as &[Option<String>],
        now
    )
    .fetch_all(db)
    .await?;
    Ok(made.into_iter().map(|row| (row.id, row.key)).collect())
}

/// Gives each device its first credential.
async fn issue(
    db: &mut PgConnection,
    tenant: TenantKey,
    rows: &[Row],
    made: &HashMap<String, DeviceKey>,
    now: DateTime<Utc>,
) -> Result<Vec<Enrolled>> {
    let tenant = sqlx::query_scalar!("select id from tenant where key = $1", tenant.0).fetch_one(&mut *db).await?;
    let mut enrolled = Vec::with_capacity(rows.len());
    let (mut ids, mut keys, mut hashes) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        let (id, password) = (CredentialId::new(), plain_secret()?);
        ids.push(id.uuid());
        keys.push(made.get(row.device.id.as_str()).map(|key| key.0));
        hashes.push(Sha256::digest(password.expose()).to_vec());
        let username = format!("{tenant}/{}", row.device.id);
        let credential = Issued { id, username, password, created_at: now, expires_at: None };
        enrolled.push(Enrolled { line: row.line, id: row.device.id.clone(), credential });
    }
    sqlx::query!(
        "insert into credential (id, device_key, secret_hash, created_at)
         select u.id, u.device_key, u.secret_hash, $4
           from unnest($1::uuid[], $2::bigint[], $3::bytea[]) as u (id, device_key, secret_hash)",
        &ids,
        &keys as &[Option<i64>],
        &hashes,
        now
    )
    .execute(db)
    .await?;
    Ok(enrolled)
}

/// What was enrolled as CSV: `id,username,password`. No cell of it is a formula to a spreadsheet; [`read`] takes the ids back
/// as they were.
pub fn to_csv(enrolled: &[Enrolled]) -> Result<Vec<u8>> {
    let failed = |error: csv::Error| Error::Internal(error.to_string());
    let mut csv = csv::WriterBuilder::new().terminator(csv::Terminator::CRLF).from_writer(Vec::new());
    csv.write_record(["id", "username", "password"]).map_err(failed)?;
    for Enrolled { id, credential, .. } in enrolled {
        let cells = [&guarded(id.as_str()), &guarded(&credential.username), credential.password.expose()];
        csv.write_record(cells).map_err(failed)?;
    }
    csv.into_inner().map_err(|error| Error::Internal(error.to_string()))
}

/// A cell that would be a formula is marked as text, as spreadsheets do.
fn guarded(cell: &str) -> Cow<'_, str> {
    if cell.starts_with(['=', '+', '-', '@']) { Cow::Owned(format!("'{cell}")) } else { Cow::Borrowed(cell) }
}

/// A secret that a spreadsheet takes for text: one in 64 would begin with `-`.
fn plain_secret() -> Result<Secret> {
    loop {
        let secret = credential::random_secret()?;
        if !secret.expose().starts_with('-') {
            return Ok(secret);
        }
    }
}
