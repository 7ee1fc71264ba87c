//! Tells a query of lines to the database: a third reading of the language, beside the matcher in memory and the index.
//!
//! Words are divided by a regular expression, which knows the characters of the tests and no others. Nobody else asks so: over the
//! lines of a fleet this would be a walk over all rows.

use chrono::{DateTime, Utc};
use sqlx::{Postgres, QueryBuilder};

use crate::log::query::Asked;
use crate::query::{Bounds, Phrase, Term, Test};

type Sql = QueryBuilder<Postgres>;

/// Writes a condition on `log l`.
pub(super) fn push(asked: &Asked, sql: &mut Sql) {
    match asked {
        Asked::All => {
            sql.push("true");
        }
        Asked::Not(inner) => {
            sql.push("not (");
            push(inner, sql);
            sql.push(")");
        }
        Asked::And(all) => each(all, " and ", sql),
        Asked::Or(some) => each(some, " or ", sql),
        Asked::Devices(keys) => {
            let keys = keys.iter().map(|key| key.0).collect::<Vec<_>>();
            sql.push("l.device_key = any(").push_bind(keys).push(")");
        }
        Asked::Line(term) => {
            sql.push("coalesce(");
            test(term, sql);
            sql.push(", false)");
        }
    }
}

fn each(some: &[Asked], between: &str, sql: &mut Sql) {
    sql.push("(");
    for (place, one) in some.iter().enumerate() {
        sql.push(if place == 0 { "" } else { between });
        push(one, sql);
    }
    sql.push(")");
}

fn test(term: &Term, sql: &mut Sql) {
    let column = match term.field.as_str() {
        "target" => "l.target",
        "trace_id" => "l.trace_id",
        "cut" => "(l.cut <> 0)",
        "clamped" => "(l.sent_at is not null)",
        _ => "l.message",
    };
    match (term.field.as_str(), &term.test) {
        (field, asked) if field.starts_with("fields.") => {
            sql.push("exists (select from jsonb_path_query(coalesce(l.fields -> ");
            sql.push_bind(field["fields.".len()..].to_owned()).push(", 'null'), '$[*]') v where ");
            value(asked, sql);
            sql.push(")");
        }
        (_, Test::Exists) => {
            sql.push(column).push(" is not null");
        }
        (_, Test::Words(words)) => phrase(words, "l.message", sql),
        (_, Test::Is(value)) => {
            sql.push(column).push(" = ").push_bind(value.clone());
        }
        (_, Test::StartsWith(start)) => {
            sql.push("starts_with(").push(column).push(", ").push_bind(start.clone()).push(")");
        }
        (_, Test::Flag(flag)) => {
            sql.push(column).push(" = ").push_bind(*flag);
        }
        (_, Test::Level(bounds)) => between(bounds, "l.level", |level| level.number(), sql),
        (_, Test::Time(bounds)) => between(bounds, "l.ts", |ms| time(*ms), sql),
        (field, test) => panic!("{field}: {test:?}"),
    }
}

fn time(ms: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_millis(ms).expect("within the tests' times")
}

/// Of one scalar `v` of a field.
fn value(asked: &Test, sql: &mut Sql) {
    match asked {
        Test::Exists => {
            sql.push("jsonb_typeof(v) not in ('null', 'object')");
        }
        Test::Number(bounds) => {
            sql.push("case when jsonb_typeof(v) = 'number' then ");
            between(bounds, "(v #>> '{}')::float8", |number| *number, sql);
            sql.push(" else false end");
        }
        Test::Any(words, number, flag) => {
            sql.push("case jsonb_typeof(v) when 'string' then ");
            phrase(words, "(v #>> '{}')", sql);
            sql.push(" when 'number' then (v #>> '{}')::float8 = ").push_bind(*number);
            sql.push(" when 'boolean' then (v #>> '{}')::boolean = ").push_bind(*flag).push(" else false end");
        }
        other => panic!("{other:?}"),
    }
}

fn between<T, V>(bounds: &Bounds<T>, column: &str, value: impl Fn(&T) -> V, sql: &mut Sql)
where
    V: for<'q> sqlx::Encode<'q, Postgres> + sqlx::Type<Postgres> + Send + 'static,
{
    sql.push("(true");
    for (end, without, with) in [(&bounds.low, " > ", " >= "), (&bounds.high, " < ", " <= ")] {
        if let Some((end, is_in)) = end {
            sql.push(" and ").push(column).push(if *is_in { with } else { without }).push_bind(value(end));
        }
    }
    sql.push(")");
}

/// Latin, Hebrew and marks make words, ideographs are alone.
const WORDS: &str = "[\\u3040-\\u30ff\\u4e00-\\u9fff]|[0-9a-zé\\u05d0-\\u05ea\\u0300-\\u036f]+";

fn phrase(phrase: &Phrase, text: &str, sql: &mut Sql) {
    let end = if phrase.is_prefix { "" } else { " " };
    let wanted = format!(" {}{end}", phrase.words.join(" "));
    sql.push("position(")
        .push_bind(wanted)
        .push(" in ' ' || (select string_agg(left(m[1], 128), ' ') from regexp_matches(");
    sql.push("translate(lower(normalize(").push(text).push(", NFKC)), 'É', 'é'), ").push_bind(WORDS);
    sql.push(", 'g') m) || ' ') > 0");
}
