//! Moments and spans of time as callers write them: RFC 3339 or milliseconds in, RFC 3339 in UTC with milliseconds out.

use std::fmt;
use std::str::FromStr;

use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use fleet_core::clock::from_ms;
use serde::Serializer;

/// The earliest and the latest moment that may be asked for, in milliseconds since the epoch: the years 1 and 9999.
pub(crate) const RANGE_MS: std::ops::RangeInclusive<i64> = -62_135_596_800_000..=253_402_300_799_999;
/// Longest bucket: 366 days, in seconds.
const MAX_BUCKET_S: i64 = 366 * 86_400;

/// `2026-11-21T09:00:00.000Z`
pub(crate) fn rfc3339(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// For `serialize_with`.
pub(crate) fn serialize<S: Serializer>(at: &DateTime<Utc>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&rfc3339(*at))
}

/// For `serialize_with`, of a moment that may be missing.
#[expect(clippy::ref_option, reason = "serde's signature")]
pub(crate) fn serialize_maybe<S: Serializer>(at: &Option<DateTime<Utc>>, serializer: S) -> Result<S::Ok, S::Error> {
    match at {
        Some(at) => serialize(at, serializer),
        None => serializer.serialize_none(),
    }
}

/// A moment in a query.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Moment(pub(crate) DateTime<Utc>);

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&rfc3339(self.0))
    }
}

impl FromStr for Moment {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // An offset's + that was not escaped arrives as a space.
        let read = |text: &str| DateTime::parse_from_rfc3339(text).ok().map(|at| at.timestamp_millis());
        let ms = text.parse::<i64>().ok().or_else(|| read(text)).or_else(|| read(&text.replace(' ', "+")));
        ms.filter(|ms| RANGE_MS.contains(ms))
            .map(|ms| Self(from_ms(ms)))
            .ok_or("expected a time such as 2026-11-21T09:00:00Z, or milliseconds since the epoch")
    }
}

/// The width of a bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bucket(pub(crate) TimeDelta);

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.num_seconds();
        let (unit, name) = [(86_400, "d"), (3600, "h"), (60, "m")]
            .into_iter()
            .find(|(unit, _)| seconds % unit == 0)
            .unwrap_or((1, "s"));
        write!(f, "{}{name}", seconds / unit)
    }
}

impl FromStr for Bucket {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (number, unit) = match text.char_indices().next_back() {
            Some((at, 's')) => (&text[..at], 1),
            Some((at, 'm')) => (&text[..at], 60),
            Some((at, 'h')) => (&text[..at], 3600),
            Some((at, 'd')) => (&text[..at], 86_400),
            _ => (text, 1),
        };
        let digits = number.bytes().all(|b| b.is_ascii_digit());
        let seconds = number.parse::<i64>().ok().filter(|_| digits).and_then(|number| number.checked_mul(unit));
        seconds
            .filter(|seconds| (1..=MAX_BUCKET_S).contains(seconds))
            .map(|seconds| Self(TimeDelta::seconds(seconds)))
            .ok_or("expected a span such as 30s, 1m, 1h or 1d, or a number of seconds, at most 366d")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn moments_are_read_as_people_write_them() {
        let noon = from_ms(1_763_726_400_000);
        for text in [
            "1763726400000",
            "2025-11-21T12:00:00Z",
            "2025-11-21T12:00:00.000Z",
            "2025-11-21T14:00:00+02:00",
            "2025-11-21T14:00:00 02:00",
            "2025-11-21t12:00:00z",
        ] {
            assert_eq!(text.parse(), Ok(Moment(noon)), "{text}");
        }
        let long = "9".repeat(30);
        for bad in ["", "now", "2025-11-21", "12:00", "2025-13-01T00:00:00Z", "9223372036854775807", &long, "\0", "1e3"]
        {
            assert!(bad.parse::<Moment>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn buckets_are_bounded() {
        let seconds = |text: &str| text.parse::<Bucket>().map(|bucket| bucket.0.num_seconds());
        assert_eq!(
            ["1", "30s", "1m", "1h", "1d", "366d"].map(seconds).map(Result::unwrap),
            [1, 30, 60, 3600, 86_400, MAX_BUCKET_S]
        );
        for bad in [
            "",
            "0",
            "0s",
            "s",
            "-1m",
            "+1m",
            "1.5h",
            "1w",
            "1 m",
            "367d",
            "99999999999999999999d",
            "106751991168d",
            "é",
        ] {
            assert!(bad.parse::<Bucket>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn a_moment_prints_as_it_parses(ms in RANGE_MS) {
            let moment = Moment(from_ms(ms));
            prop_assert_eq!(ms.to_string().parse(), Ok(moment));
            prop_assert_eq!(moment.to_string().parse(), Ok(moment));
        }

        #[test]
        fn a_bucket_prints_as_it_parses(seconds in 1..=MAX_BUCKET_S) {
            let bucket = Bucket(TimeDelta::seconds(seconds));
            prop_assert_eq!(seconds.to_string().parse(), Ok(bucket));
            prop_assert_eq!(bucket.to_string().parse(), Ok(bucket));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,40}|[0-9smhd+:TZ.-]{0,30}") {
            let _ = text.parse::<Moment>();
            let _ = text.parse::<Bucket>();
        }
    }
}
