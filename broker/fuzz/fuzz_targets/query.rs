//! Queries, which strangers write: none makes the reader panic, an error names a column of the text, and what was read, written down
//! anew from what it means, is read as the same.
//!
//! Input: which language, and what [`pieces::made`] takes.

#![no_main]

mod pieces;

use fleet_core::clock::from_ms;
use fleet_core::query::{Bounds, Expression, MAX_BYTES, MAX_TERMS, Phrase, Query, Term, Test};
use fleet_core::version::Version;
use fleet_core::words::words;
use fleet_core::{log, selector};
use libfuzzer_sys::fuzz_target;

/// When they are read.
const NOW_MS: i64 = 1_795_300_000_000;
/// The years that a time can be written with.
const TIMES_MS: std::ops::Range<i64> = -62_135_596_800_000..253_402_300_800_000;

const PIECES: [&str; 64] = [
    " ",
    "AND",
    " OR ",
    " AND ",
    "NOT ",
    "-",
    "(",
    ")",
    "*",
    "\"",
    "\\",
    ":",
    "[",
    "]",
    "{",
    "}",
    " TO ",
    ">",
    ">=",
    "<",
    "<=",
    "a",
    "reconnect",
    "x*",
    "42",
    "-81.5",
    "1e300",
    "true",
    "false",
    "now",
    "now-15m",
    "2026-11-20",
    "2026-11-20T10:00:00Z",
    "2026-11-20T10:00Z",
    "warn",
    "error",
    "2.0.1",
    "v2.1.0-rc.1",
    "site/line-3",
    "online",
    "café",
    "ﬁ",
    "½",
    "温度",
    "İ",
    "level:",
    "ts:",
    "device:",
    "type:",
    "group:",
    "gateway:",
    "state:",
    "firmware:",
    "disabled:",
    "created:",
    "seen:",
    "missing:",
    "target:",
    "cut:",
    "message:",
    "fields.code:",
    "fields.a.b:",
    "label.site:",
    "sort:",
];

fuzz_target!(|input: &[u8]| {
    let [language, input @ ..] = input else { return };
    let made = pieces::made(input, &PIECES, 1);
    let Ok(text) = std::str::from_utf8(&made) else { return };
    let read = |text: &str| {
        let now = from_ms(NOW_MS);
        if language % 2 == 0 { log::query::read(text, now) } else { selector::read(text, now) }
    };
    match read(text) {
        Ok(query) => check(&query, read),
        Err(error) => names_a_column(&error.to_string(), text),
    }
});

fn names_a_column(error: &str, text: &str) {
    if text.len() > MAX_BYTES {
        return assert!(error.contains("too long"), "{error}");
    }
    let (_, behind) = error.split_once(", column ").expect("it names the column");
    let (column, expected) = behind.split_once(": expected ").expect("and what was expected");
    let column = column.parse::<usize>().expect("a number");
    assert!((1..=text.chars().count() + 1).contains(&column), "{error} in {text:?}");
    assert!(!expected.is_empty() && error.len() < 16 * MAX_BYTES, "{error}");
}

fn check(query: &Query, read: impl Fn(&str) -> fleet_core::Result<Query>) {
    assert_eq!(&read(query.text()).expect("it was read before"), query);
    let mut terms = 0;
    let expression = placed(query.expression(), &mut |term| {
        terms += 1;
        assert!((1..=query.text().chars().count()).contains(&term.column), "{term:?} of {:?}", query.text());
    });
    assert!(terms <= MAX_TERMS);
    let Some(written) = written(&expression).filter(|written| written.len() <= MAX_BYTES) else { return };
    let again = read(&written).unwrap_or_else(|error| panic!("{:?} is {written:?}: {error}", query.text()));
    assert_eq!(placed(again.expression(), &mut |_| ()), expression, "{:?} is {written:?}", query.text());
}

/// The same, with all terms in one place, after `look` has seen them.
fn placed(expression: &Expression, look: &mut impl FnMut(&Term)) -> Expression {
    match expression {
        Expression::All => Expression::All,
        Expression::Not(inner) => Expression::Not(Box::new(placed(inner, look))),
        Expression::And(all) => Expression::And(all.iter().map(|one| placed(one, look)).collect()),
        Expression::Or(some) => Expression::Or(some.iter().map(|one| placed(one, look)).collect()),
        Expression::Term(term) => {
            look(term);
            Expression::Term(Term { column: 0, ..term.clone() })
        }
    }
}

/// It as text, with no parentheses but those it takes; none where what was read no longer tells how it was written.
fn written(expression: &Expression) -> Option<String> {
    let joined = |parts: &[Expression], by: &str, is_alone: fn(&Expression) -> bool| {
        let part = |part: &Expression| {
            let text = written(part)?;
            Some(if is_alone(part) { text } else { format!("({text})") })
        };
        Some(parts.iter().map(part).collect::<Option<Vec<_>>>()?.join(by))
    };
    match expression {
        Expression::All => Some("*".to_owned()),
        Expression::Not(inner) if is_one(inner) => Some(format!("NOT {}", written(inner)?)),
        Expression::Not(inner) => Some(format!("NOT ({})", written(inner)?)),
        Expression::And(all) => joined(all, " AND ", is_one),
        Expression::Or(some) => joined(some, " OR ", |part| !matches!(part, Expression::Or(_))),
        Expression::Term(term) => Some(format!("{}:{}", term.field, value(&term.test)?)),
    }
}

fn is_one(expression: &Expression) -> bool {
    !matches!(expression, Expression::And(_) | Expression::Or(_))
}

fn value(test: &Test) -> Option<String> {
    match test {
        Test::Exists => Some("*".to_owned()),
        Test::Words(phrase) | Test::Any(phrase, None, None) => of_words(phrase),
        Test::Any(phrase, number, flag) => bare(phrase, *number, *flag),
        Test::Is(name) | Test::Within(name) => Some(quoted(name)),
        Test::StartsWith(start) => Some(quoted(start) + "*"),
        Test::Flag(flag) => Some(flag.to_string()),
        Test::Level(bounds) => range(bounds, |level| Some(level.to_string())),
        Test::Number(bounds) => range(bounds, |number| Some(number.to_string())),
        Test::Time(bounds) => {
            range(bounds, |ms| TIMES_MS.contains(ms).then(|| from_ms(*ms).format("%FT%T%.3fZ").to_string()))
        }
        Test::Version(bounds) => range(bounds, |version| Some(of_rank(version))),
    }
}

fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Words as they are compared are not always words themselves: ½ is compared as 1⁄2.
fn of_words(phrase: &Phrase) -> Option<String> {
    let is_itself = |word: &String| words(word).map(|word| word.text).eq([word.clone()]);
    let star = if phrase.is_prefix { "*" } else { "" };
    let all = phrase.words.iter().all(is_itself);
    assert!(all || phrase.words.iter().any(|word| !word.is_ascii()), "{phrase:?}");
    all.then(|| quoted(&phrase.words.join(" ")) + star)
}

/// A number or a flag without quotes, in one of the ways in which it may have been written.
fn bare(phrase: &Phrase, number: Option<f64>, flag: Option<bool>) -> Option<String> {
    let numbers = number.into_iter().flat_map(|number| [format!("{number}"), format!("{number:e}")]);
    let mut ways = numbers.chain(flag.map(|flag| flag.to_string()));
    ways.find(|way| words(way).map(|word| word.text).eq(phrase.words.iter().cloned()))
}

fn range<T>(bounds: &Bounds<T>, print: impl Fn(&T) -> Option<String>) -> Option<String> {
    let end = |end: &Option<(T, bool)>| match end {
        None => Some(("*".to_owned(), true)),
        Some((value, is_in)) => Some((print(value)?, *is_in)),
    };
    let ((low, low_in), (high, high_in)) = (end(&bounds.low)?, end(&bounds.high)?);
    Some(format!("{}{low} TO {high}{}", if low_in { '[' } else { '{' }, if high_in { ']' } else { '}' }))
}

/// A version of this rank.
fn of_rank(version: &Version) -> String {
    let rank = version.rank();
    let plain = |digits: &str| format!("{:0>1}", digits.trim_start_matches('0'));
    let (numbers, pre) = rank.split_once('!').unwrap_or((rank.trim_end_matches('-'), ""));
    let numbers = numbers.split('.').map(plain).collect::<Vec<_>>().join(".");
    let identifier = |text: &str| text.strip_prefix('0').map_or_else(|| text[1..].to_owned(), plain);
    let pre = pre.split(' ').filter(|text| !text.is_empty()).map(identifier).collect::<Vec<_>>().join(".");
    if pre.is_empty() { numbers } else { format!("{numbers}-{pre}") }
}
