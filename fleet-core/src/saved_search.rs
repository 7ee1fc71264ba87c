//! Saved searches: questions to the log that people keep, for themselves or for all of their tenant.
//!
//! Made by [`create`], shown by [`page`] and [`find`], changed whole by [`replace`], ended by [`delete`]. Holds: a query that is
//! stored could be read when it was; names are unique among those of one user; nobody sees one of somebody else that is not
//! shared, and only its owner changes it. It grants nothing: whoever asks it sees what they may see. Ignorant of: HTTP, what
//! the question finds.

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::error::{Error, OrOn, Result, check_version};
use crate::id::{SavedSearchId, TenantKey, UserId};
use crate::{log, query, role};

/// Most saved searches on a page.
pub const MAX_PAGE: usize = 1000;
/// Longest name, in characters.
pub const MAX_NAME_CHARS: usize = 100;

/// A question that somebody keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedSearch {
    /// Names it.
    pub id: SavedSearchId,
    /// Whose it is.
    pub owner: UserId,
    /// What people call it.
    pub name: String,
    /// The question, as [`crate::log`] is asked.
    pub query: String,
    /// From when on, as it was written.
    pub from: Option<String>,
    /// Up to when, as it was written.
    pub to: Option<String>,
    /// Whether others of the tenant see it.
    pub shared: bool,
    /// Rises with every change.
    pub version: i64,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was last changed.
    pub updated_at: DateTime<Utc>,
}

/// What is said of one.
#[derive(Debug, Clone)]
pub struct Said {
    /// What people call it, 1 to [`MAX_NAME_CHARS`] printable characters.
    pub name: String,
    /// The question.
    pub query: String,
    /// From when on: RFC 3339, a day, or `now-1h`.
    pub from: Option<String>,
    /// Up to when.
    pub to: Option<String>,
    /// Whether others of the tenant see it.
    pub shared: bool,
}

impl Said {
    fn check(&self, now: DateTime<Utc>) -> Result<()> {
        if !is_printable(&self.name) {
            return Err(Error::Invalid(format!("name: expected 1 to {MAX_NAME_CHARS} printable characters")));
        }
        if self.query.contains('\0') {
            return Err(Error::Invalid("query: expected no U+0000".to_owned()));
        }
        log::query::read(&self.query, now).map_err(|error| Error::Invalid(format!("query: {error}")))?;
        for (field, given) in [("from", &self.from), ("to", &self.to)] {
            if let Some(given) = given {
                query::time(given, now)
                    .ok_or_else(|| Error::Invalid(format!("{field}: expected {}", query::A_TIME)))?;
            }
        }
        Ok(())
    }
}

fn is_printable(name: &str) -> bool {
    !name.trim().is_empty() && name.chars().count() <= MAX_NAME_CHARS && !name.contains(char::is_control)
}

/// Who asks: of which tenant, and which user.
#[derive(Debug, Clone, Copy)]
pub struct By {
    /// The tenant.
    pub tenant: TenantKey,
    /// The user, or the one in whose name an API key acts.
    pub user: UserId,
}

/// Makes one, while the tenant has fewer than `most`. To be called in a transaction.
pub async fn create(
    db: &mut PgConnection,
    by: By,
    said: &Said,
    most: usize,
    now: DateTime<Utc>,
) -> Result<SavedSearch> {
    said.check(now)?;
    role::lock(db, Some(by.tenant)).await?;
    let count =
        sqlx::query_scalar!(r#"select count(*) as "count!" from saved_search where tenant_key = $1"#, by.tenant.0);
    if usize::try_from(count.fetch_one(&mut *db).await?).is_ok_and(|count| count >= most) {
        return Err(Error::TooMany { what: "saved searches", most });
    }
    let id = SavedSearchId::new();
    sqlx::query!(
        "
        insert into saved_search (id, tenant_key, user_id, name, query, time_from, time_to, shared, created_at, updated_at)
        values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $9)
        ",
        id.uuid(),
        by.tenant.0,
        by.user.uuid(),
        said.name,
        said.query,
        said.from,
        said.to,
        said.shared,
        now
    )
    .execute(&mut *db)
    .await
    .or_on("saved_search_name_key", || Error::SavedSearchExists(said.name.clone()))?;
    find(db, by, id).await
}

/// The one of that id, if `by` may see it.
pub async fn find(db: &mut PgConnection, by: By, id: SavedSearchId) -> Result<SavedSearch> {
    read(db, by, &[id.uuid()]).await?.pop().ok_or(Error::NoSuchSavedSearch(id))
}

async fn read(db: &mut PgConnection, by: By, ids: &[Uuid]) -> Result<Vec<SavedSearch>> {
    let found = sqlx::query_as!(
        SavedSearch,
        r#"
        select id as "id: SavedSearchId", user_id as "owner: UserId", name, query, time_from as "from", time_to as "to", shared,
               version, created_at, updated_at
          from saved_search
         where id = any($1) and tenant_key = $2 and (user_id = $3 or shared)
         order by id
        "#,
        ids,
        by.tenant.0,
        by.user.uuid()
    );
    Ok(found.fetch_all(db).await?)
}

/// At most `limit` (itself at most [`MAX_PAGE`]) of those that `by` may see, in the order they were made, beginning behind
/// `after`; and where to go on.
pub async fn page(
    db: &mut PgConnection,
    by: By,
    after: Option<SavedSearchId>,
    limit: usize,
) -> Result<(Vec<SavedSearch>, Option<SavedSearchId>)> {
    let limit = limit.clamp(1, MAX_PAGE);
    let mut ids = sqlx::query_scalar!(
        "
        select id
          from saved_search
         where tenant_key = $1 and (user_id = $2 or shared) and ($3::uuid is null or id > $3)
         order by id
         limit $4
        ",
        by.tenant.0,
        by.user.uuid(),
        after.map(SavedSearchId::uuid),
        i64::try_from(limit + 1).expect("limit is at most MAX_PAGE")
    )
    .fetch_all(&mut *db)
    .await?;
    let more = ids.len() > limit;
    ids.truncate(limit);
    let found = read(db, by, &ids).await?;
    let next = found.last().filter(|_| more).map(|search| search.id);
    Ok((found, next))
}

/// Writes one anew: as it was, and as it is, if its version is one of `expected` or none is. To be called in a transaction.
pub async fn replace(
    db: &mut PgConnection,
    by: By,
    id: SavedSearchId,
    said: &Said,
    expected: &[i64],
    now: DateTime<Utc>,
) -> Result<(SavedSearch, SavedSearch)> {
    said.check(now)?;
    let old = locked(db, by, id, expected).await?;
    if old.owner != by.user {
        return Err(Error::NotOwner(id));
    }
    sqlx::query!(
        "
        update saved_search
           set name = $2, query = $3, time_from = $4, time_to = $5, shared = $6, version = version + 1, updated_at = $7
         where id = $1
        ",
        id.uuid(),
        said.name,
        said.query,
        said.from,
        said.to,
        said.shared,
        now
    )
    .execute(&mut *db)
    .await
    .or_on("saved_search_name_key", || Error::SavedSearchExists(said.name.clone()))?;
    Ok((old, find(db, by, id).await?))
}

/// Ends one of `by`'s own, or one that is shared when `any` says that those of others may be ended too, if its version is one
/// of `expected` or none is; answers what it was. To be called in a transaction.
pub async fn delete(
    db: &mut PgConnection,
    by: By,
    id: SavedSearchId,
    any: bool,
    expected: &[i64],
) -> Result<SavedSearch> {
    let old = locked(db, by, id, expected).await?;
    if old.owner != by.user && !any {
        return Err(Error::NotOwner(id));
    }
    sqlx::query!("delete from saved_search where id = $1", id.uuid()).execute(db).await?;
    Ok(old)
}

/// It, which stands still until the transaction ends.
async fn locked(db: &mut PgConnection, by: By, id: SavedSearchId, expected: &[i64]) -> Result<SavedSearch> {
    sqlx::query!("select id from saved_search where id = $1 and tenant_key = $2 for update", id.uuid(), by.tenant.0)
        .fetch_optional(&mut *db)
        .await?;
    let found = find(db, by, id).await?;
    check_version(found.version, expected)?;
    Ok(found)
}
