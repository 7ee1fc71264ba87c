//! A search has its turn and its time.

use std::collections::HashMap;

use serde_json::json;

use super::super::*;
use super::fixture::{Built, NOW, Spec, ask};
use crate::config::{Config, Environment};

fn search(concurrent: usize, timeout_ms: u64) -> (Search, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let settings = Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap().search;
    let settings = config::Search { concurrent, timeout_ms, ..settings };
    let index = Index::open(dir.path(), &settings).unwrap();
    (Search::new(index, &settings, Metrics::register(&Registry::new()).unwrap()).unwrap(), dir)
}

#[tokio::test]
async fn who_gets_no_turn_in_time_is_refused() {
    let (search, _dir) = search(1, 50);
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (finish, end) = std::sync::mpsc::channel::<()>();
    let first = search.clone();
    let first = tokio::spawn(async move {
        let work = move |_: &Inner, _| {
            let _ = begun.send(());
            let _ = end.recv();
            Ok(())
        };
        first.run(work).await
    });
    has_begun.await.unwrap();
    assert!(matches!(search.count(&ask("*")).await, Err(Error::SearchBusy)));
    assert_eq!((search.metrics.busy.get(), search.metrics.timeout.get()), (1, 0));
    finish.send(()).unwrap();
    first.await.unwrap().unwrap();
    assert_eq!(search.count(&ask("*")).await.unwrap(), 0, "its place is free again");
}

#[tokio::test]
async fn a_search_that_takes_too_long_is_given_up() {
    let (search, _dir) = search(1, 20);
    let work = |_: &Inner, clock: Clock| -> Result<()> {
        loop {
            clock.check()?;
        }
    };
    assert!(matches!(search.run(work).await, Err(Error::SearchTimeout)));
    assert_eq!(search.metrics.timeout.get(), 1);
    let built = Built::new(&[Spec::new(NOW, "x")], 1);
    let late = Clock(Instant::now());
    let days = &built.days;
    let query = &ask("x").compiled();
    assert!(matches!(
        histogram::histogram(&Executor::SingleThread, query, days, Window::ALL, 1, late),
        Err(Error::SearchTimeout)
    ));
    assert!(matches!(
        top::top(&Executor::SingleThread, query, days, Window::ALL, &By::Level, 1, late),
        Err(Error::SearchTimeout)
    ));
}

#[test]
fn ten_thousand_names_of_fields_are_searched_and_the_first_are_counted() {
    let spec = |nth: i64| Spec {
        fields: json!({ format!("name{nth}"): nth }).as_object().unwrap().clone(),
        ..Spec::new(NOW + nth, "x")
    };
    let specs = (0..10_000).map(spec).collect::<Vec<_>>();
    let lines = Built::new(&specs, 1).lines;
    let built = Built::of(lines, 2, 1000);
    for nth in [0, 999, 1000, 9999] {
        assert_eq!(built.count(&ask(&format!("fields.name{nth}:{nth}"))), 1);
        assert_eq!(built.count(&ask(&format!("fields.name{nth}:*"))), 1);
        let top = built.top(&ask("*"), &format!("fields.name{nth}"), 10).unwrap();
        let is_counted = nth < 1000;
        assert_eq!((top.values.len(), top.uncounted), (usize::from(is_counted), u64::from(!is_counted)));
    }
}
