//! Versions of firmware, and which is older.
//!
//! A [`Version`] is read leniently: `2`, `v2.0`, `2.0.0-rc.1+build5` (numbers by dots, then as Semantic Versioning §10, §11; build
//! metadata does not count, and neither do zeros at the end). Holds: [`Version::rank`] is ordered byte by byte as versions are,
//! and the SQL function `version_rank` gives the same, so rows are compared as values are.

use std::str::FromStr;

use crate::error::Error;

/// Most bytes of a version.
const MAX_BYTES: usize = 128;
/// Most digits of a number of it.
const MAX_DIGITS: usize = 10;

/// A version that can be compared.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    rank: String,
}

impl Version {
    /// What is ordered as versions are.
    pub fn rank(&self) -> &str {
        &self.rank
    }
}

impl FromStr for Version {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let rank = rank(text).ok_or_else(|| {
            Error::Invalid(format!(
                "{text:?} is not a version: expected numbers between dots, such as 2.0.1 or 2.1.0-rc.1"
            ))
        })?;
        Ok(Self { rank })
    }
}

/// Numbers padded and joined by `.`, behind them `-` for a release or `!` and the identifiers of a pre-release; those between
/// blanks, numbers marked `0` and all else `1`. `!` < `-` < `.` in ASCII: 2.0-rc < 2.0 < 2.0.1.
fn rank(text: &str) -> Option<String> {
    if text.len() > MAX_BYTES {
        return None;
    }
    let text = text.strip_prefix(['v', 'V']).unwrap_or(text);
    let text = text.split_once('+').map_or(text, |(version, _)| version);
    let (numbers, pre) = text.split_once('-').map_or((text, None), |(numbers, pre)| (numbers, Some(pre)));
    let mut numbers = numbers.split('.').map(number).collect::<Option<Vec<_>>>()?;
    while numbers.len() > 1 && numbers.last().is_some_and(|number| number.bytes().all(|digit| digit == b'0')) {
        numbers.pop();
    }
    let numbers = numbers.join(".");
    let Some(pre) = pre else { return Some(numbers + "-") };
    let identifiers = pre.split('.').map(identifier).collect::<Option<Vec<_>>>()?;
    Some(format!("{numbers}!{}", identifiers.join(" ")))
}

fn number(digits: &str) -> Option<String> {
    let fits = (1..=MAX_DIGITS).contains(&digits.len()) && digits.bytes().all(|digit| digit.is_ascii_digit());
    fits.then(|| format!("{digits:0>MAX_DIGITS$}"))
}

fn identifier(text: &str) -> Option<String> {
    match number(text) {
        Some(number) => Some(format!("0{number}")),
        None if !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') => {
            Some(format!("1{text}"))
        }
        None => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    use super::*;
    use crate::testing::TestDb;

    fn version(text: &str) -> Version {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn versions_are_ordered_as_people_order_them() {
        let ordered = [
            "0.9",
            "1.0.0-alpha",
            "1.0.0-alpha.1",
            "1.0.0-alpha.beta",
            "1.0.0-beta.2",
            "1.0.0-beta.11",
            "1.0.0-rc.1",
            "1.0",
            "1.0.1",
            "1.2",
            "1.10",
            "v2",
            "10.0",
        ];
        assert!(ordered.windows(2).all(|pair| version(pair[0]) < version(pair[1])), "{ordered:?}");
        assert_eq!(version("2"), version("v2.0.0+build.7"));
    }

    #[test]
    fn what_is_no_version_is_said() {
        for text in ["", "latest", "1..2", "1.x", "1.0-", "1.0-a..b", "1 .0", "12345678901", &"1.".repeat(80)] {
            assert!(text.parse::<Version>().is_err(), "{text:?}");
        }
    }

    fn texts() -> impl Strategy<Value = String> {
        prop_oneof![
            4 => "v?[0-9]{1,3}(\\.[0-9]{1,2}){0,3}(-[a-z0-9]{1,3}(\\.[a-zA-Z0-9-]{1,3}){0,2})?(\\+[a-z.]{1,3})?",
            1 => "[v0-9a-z.+ -]{0,12}",
        ]
    }

    proptest! {
        #[test]
        fn those_of_the_standard_are_ordered_as_it_says(
            numbers in vec(0..12_u64, 6), pre in vec("([1-9][0-9]?|0|[a-c][0-9a-c-]?)(\\.([1-9]|a))?|", 2),
        ) {
            let text = |numbers: &[u64], pre: &str| {
                let pre = if pre.is_empty() { String::new() } else { format!("-{pre}") };
                format!("{}.{}.{}{pre}", numbers[0], numbers[1], numbers[2])
            };
            let (one, other) = (text(&numbers[..3], &pre[0]), text(&numbers[3..], &pre[1]));
            let standard = |text: &str| semver::Version::parse(text).unwrap();
            prop_assert_eq!(version(&one).cmp(&version(&other)), standard(&one).cmp(&standard(&other)), "{} {}", one, other);
        }
    }

    #[tokio::test]
    async fn the_database_ranks_the_same() {
        let db = TestDb::new().await;
        let mut runner = TestRunner::deterministic();
        let asked = (0..2_000).map(|_| texts().new_tree(&mut runner).unwrap().current()).collect::<Vec<_>>();
        let said: Vec<Option<String>> = sqlx::query_scalar(
            "select version_rank(text) from unnest($1::text[]) with ordinality as a (text, place) order by place",
        )
        .bind(&asked)
        .fetch_all(db.pool())
        .await
        .unwrap();
        for (text, said) in asked.iter().zip(said) {
            assert_eq!(said, rank(text), "{text:?}");
        }
    }
}
