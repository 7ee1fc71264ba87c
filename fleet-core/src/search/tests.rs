//! What search promises.

mod bounds;
mod fixture;
mod oracle;
mod reach;
mod sql;

use proptest::prelude::*;

use self::fixture::{Built, DAY, NOW, Spec, ask, clock};
use super::*;

/// Lines about in the order of time, as they come.
fn stream(count: i64) -> Vec<Spec> {
    // 7,919 is a prime, so each number comes once in a while.
    (0..count)
        .map(|nth| {
            let jitter = nth * 7919 % 1000;
            Spec::new(NOW + nth * 40 - jitter, if nth % 500 == 0 { "rare word" } else { "common word" })
        })
        .collect()
}

fn walk(built: &Built, ask: &Ask, order: Order, limit: usize) -> Vec<Address> {
    let (mut all, mut after) = (Vec::new(), None);
    loop {
        let page = built.page(ask, order, after, limit);
        all.extend(page.hits.iter().map(|hit| hit.address));
        after = page.next.map(|next| next.to_string().parse().unwrap());
        if after.is_none() {
            return all;
        }
        assert_eq!(page.hits.len(), limit, "a page that goes on is full");
    }
}

#[tokio::test]
async fn pages_show_every_line_once_and_in_order() {
    let mut specs = stream(9_000);
    // Late ones, and several of one time.
    specs.extend((0..300).map(|nth| Spec::new(NOW - nth * 60_000, "common late")));
    specs.extend((0..50).map(|_| Spec::new(NOW + 1_000, "common again")));
    let built = Built::new(&specs, 3);
    for text in
        ["common", "rare", "common late", "NOT common", "*", "ts:[2026-11-21T02:40Z TO 2026-11-21T02:42Z} common"]
    {
        let ask = ask(text);
        let mut wanted =
            built.lines.iter().filter(|line| ask.matches(line)).map(|line| line.address).collect::<Vec<_>>();
        wanted.sort_unstable();
        assert!(!wanted.is_empty());
        assert!(walk(&built, &ask, Order::Oldest, 333) == wanted, "{text}: the oldest first");
        wanted.reverse();
        assert!(walk(&built, &ask, Order::Newest, 333) == wanted, "{text}: the newest first");
    }
}

#[test]
fn a_cursor_is_read_as_it_is_written() {
    for address in
        [Address { ts_ms: i64::MIN, writer: i16::MIN, place: i64::MAX }, Address { ts_ms: 0, writer: 3, place: 7 }]
    {
        assert_eq!(Cursor(address).to_string().parse::<Cursor>().unwrap().0, address);
    }
    for text in ["", "1", "1.2", "1.2.3.4", "x.1.2", "1.99999.2"] {
        assert!(text.parse::<Cursor>().unwrap_err().to_string().contains("cursor: expected"), "{text}");
    }
}

#[test]
fn a_histogram_counts_by_time_and_level() {
    let spec = |ms: i64, level: i16| Spec { level, ..Spec::new(NOW + ms, "x") };
    let built = Built::new(&[spec(0, 1), spec(10, 4), spec(59_999, 4), spec(60_000, 6), spec(-1, 3), spec(DAY, 2)], 2);
    let buckets = built.histogram(&ask("*"), 60_000).unwrap();
    let told = buckets.iter().map(|b| (b.start_ms - NOW, b.total, b.by_level)).collect::<Vec<_>>();
    assert_eq!(
        told,
        [
            (-60_000, 1, [0, 0, 1, 0, 0, 0]),
            (0, 3, [1, 0, 0, 2, 0, 0]),
            (60_000, 1, [0, 0, 0, 0, 0, 1]),
            (DAY, 1, [0, 1, 0, 0, 0, 0]),
        ]
    );
    let part = Ask { from_ms: Some(NOW), to_ms: Some(NOW + 59_999), ..ask("level:warn") };
    assert_eq!(built.histogram(&part, 60_000).unwrap().iter().map(|b| b.total).collect::<Vec<_>>(), [1]);
    assert_eq!(built.count(&part), 1);
}

#[test]
fn top_values_count_lines() {
    let spec = |target: &str, fields: serde_json::Value| Spec {
        target: Some(target.to_owned()),
        fields: fields.as_object().unwrap().clone(),
        ..Spec::new(NOW, "reconnect 3")
    };
    let built = Built::new(
        &[
            spec("net", serde_json::json!({ "code": 42, "tag": ["a", "b", "a"], "up": true, "a.b": "x" })),
            spec("net", serde_json::json!({ "code": 42.0, "tag": "a", "up": false })),
            spec("app", serde_json::json!({ "code": 4.5, "tag": 7, "up": true })),
            spec("ui", serde_json::json!({ "code": "42" })),
            Spec { level: 5, ..Spec::new(NOW + DAY, "other") },
        ],
        2,
    );
    let top = |text: &str, field: &str, size: usize| {
        let top = built.top(&ask(text), field, size).unwrap();
        let values = top.values.into_iter().map(|(value, count)| format!("{value} {count}")).collect::<Vec<_>>();
        (values, top.others)
    };
    assert_eq!(top("*", "target", 10), (vec!["net 2".into(), "app 1".into(), "ui 1".into()], 0));
    assert_eq!(top("*", "target", 1), (vec!["net 2".into()], 2));
    assert_eq!(top("*", "level", 10), (vec!["info 4".into(), "error 1".into()], 0));
    assert_eq!(top("*", "fields.code", 10), (vec!["42 3".into(), "4.5 1".into()], 0));
    assert_eq!(top("*", "fields.tag", 10), (vec!["a 2".into(), "7 1".into(), "b 1".into()], 0));
    assert_eq!(top("target:net", "fields.up", 10), (vec!["false 1".into(), "true 1".into()], 0));
    assert_eq!(top("*", "fields.a.b", 10), (vec!["x 1".into()], 0));
    assert_eq!(top("*", "fields.none", 10), (vec![], 0));
    assert_eq!(top("*", "device", 10).0, ["1 5"]);
    let pattern = pattern::of("reconnect 9").id();
    assert_eq!(top("*", "pattern", 1), (vec![format!("{pattern} 4")], 1));
    for field in ["message", "fields.", "type", ""] {
        assert!(built.top(&ask("*"), field, 10).unwrap_err().to_string().contains("field: expected one of"), "{field}");
    }
}

#[test]
fn patterns_group_similar_lines_and_know_new_ones() {
    let mut specs = (0..10).map(|nth| Spec::new(NOW + nth, &format!("took {nth} ms"))).collect::<Vec<_>>();
    specs.extend((0..3).map(|nth| Spec::new(NOW + DAY + nth, &format!("disk /dev/sd{nth} failed"))));
    specs.push(Spec::new(NOW - 2 * DAY, "boot"));
    specs.push(Spec::new(NOW + 5, "boot"));
    let built = Built::new(&specs, 2);
    let told = |since: Option<i64>, text: &str, from: Option<i64>| {
        let ask = Ask { from_ms: from, ..ask(text) };
        let patterns = built.patterns(&ask, since);
        let line = |found: &super::patterns::Found| {
            let newest = built.lines.iter().find(|line| line.address == found.newest.address).unwrap();
            assert_eq!(pattern::of(&newest.message).hash(), found.hash);
            assert_eq!(newest.address.ts_ms, found.last_ms);
            (pattern::of(&newest.message).text().to_owned(), found.count)
        };
        patterns.found.iter().map(line).collect::<Vec<_>>()
    };
    let took = ("took * ms".to_owned(), 10);
    let disk = ("disk /dev/* failed".to_owned(), 3);
    assert_eq!(told(None, "*", None), [took.clone(), disk.clone(), ("boot".to_owned(), 2)]);
    assert_eq!(told(Some(NOW), "*", Some(NOW)), [took.clone(), disk.clone()], "boot is older");
    assert_eq!(told(Some(NOW + DAY), "*", None), [disk]);
    assert_eq!(told(Some(NOW + 2 * DAY), "*", None), []);
    let id = pattern::of("took 7 ms").id();
    assert_eq!(told(None, &format!("pattern:{id}"), None), std::slice::from_ref(&took));
    assert_eq!(told(None, &format!("pattern:{}*", &id[..5]), None), [took]);
}

fn highlighted(text: &str, message: &str) -> Vec<String> {
    let query = ask(text).query;
    let chars = message.chars().collect::<Vec<_>>();
    highlights(&query, message).into_iter().map(|(start, end)| chars[start..end].iter().collect()).collect()
}

#[test]
fn what_was_asked_for_is_highlighted() {
    let message = "Café: no carrier, no link (cafe\u{301}) 温度高";
    assert_eq!(highlighted("no", message), ["no", "no"]);
    assert_eq!(highlighted("\"no carrier\" link", message), ["no carrier", "link"]);
    assert_eq!(highlighted("CAFÉ", message), ["Café", "cafe\u{301}"]);
    assert_eq!(highlighted("\"no c\"* OR carrier", message), ["no carrier"]);
    assert_eq!(highlighted("温度", message), ["温度"]);
    assert_eq!(highlighted("carrier NOT link level:warn", message), ["carrier"]);
    assert_eq!(highlights(&ask("a").query, &"a ".repeat(500)).len(), MAX_HIGHLIGHTS);
}

proptest! {
    #[test]
    fn highlights_are_in_order_and_in_the_message(message in any::<String>(), word in "[a-z0-9]{1,2}") {
        let mut behind = 0;
        for (start, end) in highlights(&ask(&format!("{word}*")).query, &message) {
            prop_assert!(behind <= start && start < end);
            behind = end;
        }
        prop_assert!(behind <= message.chars().count());
    }
}

#[test]
fn an_interval_or_a_phrase_that_asks_too_much_is_refused() {
    let specs = (0..=i64::try_from(MAX_BUCKETS).unwrap()).map(|nth| Spec::new(NOW + nth * 10, &format!("no x{nth}")));
    let built = Built::new(&specs.collect::<Vec<_>>(), 1);
    assert!(matches!(built.histogram(&ask("*"), 10), Err(Error::TooManyBuckets(MAX_BUCKETS))));
    assert!(built.histogram(&ask("*"), 0).unwrap_err().to_string().contains("expected at least 1 ms"));
    assert_eq!(built.histogram(&ask("*"), 100).unwrap().len(), MAX_BUCKETS / 10 + 1);
    let query = ask("\"no x\"*").compiled();
    let weight = pass::weight(&query, &built.days[0]).unwrap();
    let reader = &built.days[0].searcher.segment_readers()[0];
    let refused = top::count(reader, &*weight, Window::ALL, clock()).unwrap_err();
    assert!(matches!(&refused, Error::Invalid(told) if told.contains("words begin as the last one")), "{refused}");
    assert_eq!(built.count(&ask("\"no x10\"*")), 1 + 10 + 100);
    assert_eq!(built.count(&ask("x*")), MAX_BUCKETS as u64 + 1, "a word alone has no such bound");
}
