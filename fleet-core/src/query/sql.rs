//! Tells a query to the database.

use chrono::{DateTime, Utc};
use sqlx::{Postgres, QueryBuilder};

use super::{Bounds, Expression, Query, Term, Test};
use crate::error::{Error, Result};

/// Where the database has the fields.
pub trait Columns {
    /// Writes the expression whose value is that of `field`.
    fn push(&self, field: &str, sql: &mut QueryBuilder<Postgres>);
}

impl Query {
    /// Writes a condition that is true of the rows the query asks for and false of all others, never null. Values are bound, not
    /// written.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it asks for words, which no column is searched for.
    pub fn push_sql(&self, columns: &impl Columns, sql: &mut QueryBuilder<Postgres>) -> Result<()> {
        self.expression().push_sql(columns, sql)
    }
}

impl Expression {
    /// As [`Query::push_sql`].
    ///
    /// # Errors
    /// As there.
    pub fn push_sql(&self, columns: &impl Columns, sql: &mut QueryBuilder<Postgres>) -> Result<()> {
        push(self, columns, sql)
    }
}

fn push(expression: &Expression, columns: &impl Columns, sql: &mut QueryBuilder<Postgres>) -> Result<()> {
    match expression {
        Expression::All => {
            sql.push("true");
        }
        Expression::Not(inner) => {
            sql.push("not ");
            push_all(std::slice::from_ref(&**inner), "", columns, sql)?;
        }
        Expression::And(all) => push_all(all, " and ", columns, sql)?,
        Expression::Or(some) => push_all(some, " or ", columns, sql)?,
        Expression::Term(term) => {
            sql.push("coalesce(");
            push_term(term, columns, sql)?;
            sql.push(", false)");
        }
    }
    Ok(())
}

fn push_all(all: &[Expression], between: &str, columns: &impl Columns, sql: &mut QueryBuilder<Postgres>) -> Result<()> {
    sql.push("(");
    for (place, one) in all.iter().enumerate() {
        sql.push(if place == 0 { "" } else { between });
        push(one, columns, sql)?;
    }
    sql.push(")");
    Ok(())
}

fn push_term(term: &Term, columns: &impl Columns, sql: &mut QueryBuilder<Postgres>) -> Result<()> {
    let column = |sql: &mut QueryBuilder<Postgres>| columns.push(&term.field, sql);
    match &term.test {
        Test::Exists => {
            column(sql);
            sql.push(" is not null");
        }
        Test::Is(value) => {
            column(sql);
            sql.push(" = ").push_bind(value.clone());
        }
        Test::StartsWith(start) => {
            sql.push("starts_with(");
            column(sql);
            sql.push(", ").push_bind(start.clone()).push(")");
        }
        Test::Within(path) => {
            sql.push("starts_with(");
            column(sql);
            sql.push(" || '/', ").push_bind(format!("{path}/")).push(")");
        }
        Test::Flag(flag) => {
            column(sql);
            sql.push(" = ").push_bind(*flag);
        }
        Test::Level(bounds) => push_bounds(bounds, sql, column, |level| level.number()),
        Test::Number(bounds) => push_bounds(bounds, sql, column, |number| *number),
        Test::Time(bounds) => push_bounds(bounds, sql, column, |ms| {
            DateTime::<Utc>::from_timestamp_millis(*ms).unwrap_or(if *ms < 0 {
                DateTime::<Utc>::MIN_UTC
            } else {
                DateTime::<Utc>::MAX_UTC
            })
        }),
        Test::Version(bounds) => {
            let ranked = |sql: &mut QueryBuilder<Postgres>| {
                sql.push("version_rank(");
                column(sql);
                sql.push(") collate \"C\"");
            };
            push_bounds(bounds, sql, ranked, |version| version.rank().to_owned());
        }
        Test::Words(_) | Test::Any(..) => {
            return Err(Error::Invalid(format!(
                "column {}: expected a field that is not searched by words",
                term.column
            )));
        }
    }
    Ok(())
}

fn push_bounds<T, V>(
    bounds: &Bounds<T>,
    sql: &mut QueryBuilder<Postgres>,
    column: impl Fn(&mut QueryBuilder<Postgres>),
    value: impl Fn(&T) -> V,
) where
    V: for<'q> sqlx::Encode<'q, Postgres> + sqlx::Type<Postgres> + Send + 'static,
{
    let ends = [(&bounds.low, " > ", " >= "), (&bounds.high, " < ", " <= ")];
    let ends = ends.into_iter().filter_map(|(end, without, with)| {
        end.as_ref().map(|(value, is_in)| (value, if *is_in { with } else { without }))
    });
    for (place, (end, sign)) in ends.enumerate() {
        sql.push(if place == 0 { "" } else { " and " });
        column(sql);
        sql.push(sign).push_bind(value(end));
    }
}
