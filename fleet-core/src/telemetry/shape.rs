//! The names and kinds of a reading's values, stored once and referred to by number.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;

use sha2::{Digest, Sha256};
use sqlx::PgConnection;

use super::decode::{Reading, Value, write_object};
use super::{Batch, series};
use crate::Result;
use crate::id::TenantKey;

/// Stands for "no shape": a reading without numbers and booleans, or one whose tenant has too many shapes.
pub(crate) const NO_SHAPE: u32 = u32::MAX;

/// What `telemetry.shape_id` holds where there is no shape; no row of `shape` has it.
const NO_SHAPE_ID: i32 = 0;

/// Shapes a batch remembers from one flush to the next.
const MAX_INTERNED: usize = 4096;

/// Bytes of names a batch remembers from one flush to the next.
const MAX_INTERNED_BYTES: usize = 1024 * 1024;

/// What a number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `n`: itself.
    Number,
    /// `b`: 0 or 1.
    Boolean,
}

impl Kind {
    fn letter(self) -> char {
        match self {
            Self::Number => 'n',
            Self::Boolean => 'b',
        }
    }

    /// From its letter in `shape.kinds`.
    pub(crate) fn of_letter(letter: u8) -> Self {
        if letter == b'b' { Self::Boolean } else { Self::Number }
    }

    /// The columns `metrics` and `kinds` of `shape`, side by side.
    pub(crate) fn named(metrics: Vec<String>, kinds: &str) -> Vec<(Arc<str>, Self)> {
        metrics.into_iter().map(Into::into).zip(kinds.bytes().map(Self::of_letter)).collect()
    }
}

/// Names and kinds, in order of name.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) metrics: Vec<(Arc<str>, Kind)>,
    pub(crate) digest: [u8; 32],
}

impl Shape {
    fn new(metrics: Vec<(Arc<str>, Kind)>) -> Self {
        let mut hash = Sha256::new();
        for (name, kind) in &metrics {
            hash.update(name.as_bytes());
            // No name holds U+0000, so two shapes never hash the same bytes.
            hash.update([0, kind.letter() as u8]);
        }
        Self { metrics, digest: hash.finalize().into() }
    }
}

/// Finds the shape of a reading from its names as they came, without sorting them each time.
#[derive(Debug, Default)]
pub(super) struct Interner {
    known: HashMap<Box<[u8]>, u32>,
    shapes: Vec<Interned>,
    bytes: usize,
    signature: Vec<u8>,
}

#[derive(Debug)]
struct Interned {
    tenant: TenantKey,
    shape: Arc<Shape>,
    /// The n-th metric of the shape is the `order[n]`-th number that came.
    order: Box<[u32]>,
}

impl Interner {
    /// The shape of the reading's numbers and booleans, which are appended to `nums` as they came; `None` when there
    /// are none.
    pub(super) fn shape_of(&mut self, tenant: TenantKey, reading: &Reading, nums: &mut Vec<f64>) -> Option<u32> {
        self.signature.clear();
        self.signature.extend(tenant.0.to_le_bytes());
        for (name, value) in reading.members() {
            let (number, kind) = match value {
                Value::Number(number) => (*number, Kind::Number),
                Value::Boolean(on) => (f64::from(*on), Kind::Boolean),
                Value::Other(_) => continue,
            };
            nums.push(number);
            self.signature.extend(name.as_bytes());
            self.signature.extend([0, kind.letter() as u8]);
        }
        if nums.is_empty() {
            return None;
        }
        if let Some(known) = self.known.get(self.signature.as_slice()) {
            return Some(*known);
        }
        Some(self.intern(tenant, reading))
    }

    fn intern(&mut self, tenant: TenantKey, reading: &Reading) -> u32 {
        let named = reading.members().filter_map(|(name, value)| match value {
            Value::Number(_) => Some((name, Kind::Number)),
            Value::Boolean(_) => Some((name, Kind::Boolean)),
            Value::Other(_) => None,
        });
        // A name that came twice counts as it came last.
        let sorted: BTreeMap<&str, (Kind, u32)> =
            (0..).zip(named).map(|(from, (name, kind))| (name, (kind, from))).collect();
        let order = sorted.values().map(|(_, from)| *from).collect();
        let metrics = sorted.iter().map(|(name, (kind, _))| (Arc::from(*name), *kind)).collect();
        let index = u32::try_from(self.shapes.len()).expect("trimmed long before");
        self.bytes += self.signature.len();
        self.shapes.push(Interned { tenant, shape: Arc::new(Shape::new(metrics)), order });
        self.known.insert(self.signature.as_slice().into(), index);
        index
    }

    pub(super) fn get(&self, shape: u32) -> &Arc<Shape> {
        &self.shapes[shape as usize].shape
    }

    pub(super) fn order(&self, shape: u32) -> &[u32] {
        &self.shapes[shape as usize].order
    }

    #[cfg(test)]
    pub(super) fn shapes_known(&self) -> usize {
        self.shapes.len()
    }

    /// Between batches: forgets everything when it has become much.
    pub(super) fn trim(&mut self) {
        if self.shapes.len() > MAX_INTERNED || self.bytes > MAX_INTERNED_BYTES {
            *self = Self::default();
        }
    }
}

/// The rows of `shape` this writer knows.
#[derive(Debug)]
pub struct Shapes {
    max_per_tenant: usize,
    ids: HashMap<(TenantKey, [u8; 32]), i32>,
    /// Tenants that have no room for another shape; all theirs are in `ids`.
    full: HashSet<TenantKey>,
}

impl Shapes {
    /// Knows nothing yet. A tenant's readings beyond `max_per_tenant` distinct shapes are stored as JSON; as each writer
    /// counts for itself, the bound may be passed by as many as there are writers.
    pub fn new(max_per_tenant: usize) -> Self {
        Self { max_per_tenant, ids: HashMap::new(), full: HashSet::new() }
    }

    /// Forgets what it knows; for a new connection: a server that was replaced by its standby may have lost the newest
    /// shapes, and may give their ids to others.
    pub fn forget(&mut self) {
        self.ids.clear();
        self.full.clear();
    }

    /// Tenants that have as many shapes as they may, so that new ones are stored as JSON.
    pub fn full_tenants(&self) -> usize {
        self.full.len()
    }

    /// Gives every reading of the batch its shape's id; those that can have none become JSON.
    pub(super) async fn resolve(&mut self, db: &mut PgConnection, batch: &mut Batch) -> Result<()> {
        let used: HashSet<u32> = batch.shape.iter().copied().filter(|shape| *shape != NO_SHAPE).collect();
        let unknown: Vec<u32> = used.iter().copied().filter(|shape| self.id(batch, *shape).is_none()).collect();
        if !unknown.is_empty() {
            self.learn(db, batch, &unknown).await?;
        }
        batch.shape_id.clear();
        let mut ids = HashMap::with_capacity(used.len());
        ids.extend(used.iter().map(|shape| (*shape, self.id(batch, *shape))));
        for row in 0..batch.shape.len() {
            let id = match batch.shape[row] {
                NO_SHAPE => NO_SHAPE_ID,
                shape => ids[&shape].unwrap_or_else(|| {
                    to_json(batch, row);
                    NO_SHAPE_ID
                }),
            };
            batch.shape_id.push(id);
        }
        batch.rest.sort_unstable_by_key(|(row, _)| *row);
        Ok(())
    }

    fn id(&self, batch: &Batch, shape: u32) -> Option<i32> {
        let interned = &batch.interner.shapes[shape as usize];
        self.ids.get(&(interned.tenant, interned.shape.digest)).copied()
    }

    async fn learn(&mut self, db: &mut PgConnection, batch: &Batch, unknown: &[u32]) -> Result<()> {
        let mut by_tenant: BTreeMap<TenantKey, BTreeMap<[u8; 32], &Shape>> = BTreeMap::new();
        for shape in unknown {
            let interned = &batch.interner.shapes[*shape as usize];
            if !self.full.contains(&interned.tenant) {
                by_tenant.entry(interned.tenant).or_default().insert(interned.shape.digest, &interned.shape);
            }
        }
        for (tenant, mut wanted) in by_tenant {
            self.find(db, tenant, &mut wanted).await?;
            if wanted.is_empty() {
                continue;
            }
            self.insert(db, tenant, &wanted).await?;
            // Some may have been made by another writer meanwhile.
            self.find(db, tenant, &mut wanted).await?;
            if !wanted.is_empty() {
                self.fill(db, tenant).await?;
            }
        }
        Ok(())
    }

    /// Looks the wanted shapes up and takes those found off the list.
    async fn find(
        &mut self,
        db: &mut PgConnection,
        tenant: TenantKey,
        wanted: &mut BTreeMap<[u8; 32], &Shape>,
    ) -> Result<()> {
        let digests: Vec<Vec<u8>> = wanted.keys().map(|digest| digest.to_vec()).collect();
        let found = sqlx::query!(
            "select id, digest from shape where tenant_key = $1 and digest = any($2)",
            tenant.0,
            &digests,
        )
        .fetch_all(db)
        .await?;
        for row in found {
            let digest = digest_of(&row.digest)?;
            wanted.remove(&digest);
            self.ids.insert((tenant, digest), row.id);
        }
        Ok(())
    }

    /// Makes the shapes, as far as the tenant has room; which were made is found afterwards.
    async fn insert(
        &self,
        db: &mut PgConnection,
        tenant: TenantKey,
        wanted: &BTreeMap<[u8; 32], &Shape>,
    ) -> Result<()> {
        // Arrays of arrays of different lengths do not exist, so the names of all travel in one.
        let mut names = Vec::new();
        let mut kinds = Vec::new();
        let mut start = Vec::new();
        let digests: Vec<Vec<u8>> = wanted.keys().map(|digest| digest.to_vec()).collect();
        for shape in wanted.values() {
            start.push(super::narrow(names.len()));
            names.extend(shape.metrics.iter().map(|(name, _)| name.to_string()));
            kinds.push(shape.metrics.iter().map(|(_, kind)| kind.letter()).collect::<String>());
        }
        sqlx::query!(
            "
            insert into shape (tenant_key, digest, metrics, kinds)
            select t.key, u.digest, ($5::text[])[u.start + 1 : u.start + length(u.kinds)], u.kinds
              from (select key from tenant where key = $1 for key share) t
        cross join lateral (
                   select * from unnest($2::bytea[], $3::integer[], $4::text[]) as u (digest, start, kinds)
                    limit greatest(0, $6 - (select count(*) from shape s where s.tenant_key = $1))) u
       on conflict do nothing
            ",
            tenant.0,
            &digests,
            &start,
            &kinds,
            &names,
            i64::try_from(self.max_per_tenant).unwrap_or(i64::MAX),
        )
        .execute(db)
        .await?;
        Ok(())
    }

    /// The tenant has no room left (or is gone): learns all its shapes, so that nothing needs to be asked again.
    async fn fill(&mut self, db: &mut PgConnection, tenant: TenantKey) -> Result<()> {
        let all = sqlx::query!("select id, digest from shape where tenant_key = $1", tenant.0).fetch_all(db).await?;
        for row in all {
            self.ids.insert((tenant, digest_of(&row.digest)?), row.id);
        }
        self.full.insert(tenant);
        Ok(())
    }
}

fn digest_of(bytes: &[u8]) -> Result<[u8; 32]> {
    bytes.try_into().map_err(|_| crate::Error::Internal("shape.digest is not 32 bytes long".to_owned()))
}

/// Turns the numbers and booleans of a reading into JSON beside what else it holds.
fn to_json(batch: &mut Batch, row: usize) {
    let shape = Arc::clone(batch.interner.get(batch.shape[row]));
    let kept = batch.rest.iter().position(|(at, _)| *at == row).map(|at| batch.rest.swap_remove(at).1);
    let mut all: BTreeMap<String, Box<serde_json::value::RawValue>> =
        kept.map(|text| serde_json::from_str(&text).expect("written by this module")).unwrap_or_default();
    for ((name, kind), value) in shape.metrics.iter().zip(batch.nums_of(row)) {
        let json = series::number(*kind, *value).to_string();
        all.insert(name.to_string(), serde_json::value::RawValue::from_string(json).expect("a number is JSON"));
    }
    let mut text = String::new();
    write_object(&mut text, all.iter(), |out, value| write!(out, "{value}").expect("a string takes all"));
    batch.rest.push((row, text));
    batch.shape[row] = NO_SHAPE;
    batch.count[row] = 0;
}
