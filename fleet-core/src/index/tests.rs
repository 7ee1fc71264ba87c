//! What the index promises.

use super::*;
use crate::config::{Config, Environment};

fn settings() -> Search {
    Config::from_sources(&Environment::default(), Some(std::collections::HashMap::new())).unwrap().search
}

#[test]
fn an_index_is_open_once() {
    let dir = tempfile::tempdir().unwrap();
    let index = Index::open(dir.path(), &settings()).unwrap();
    assert!(index.days(i64::MIN, i64::MAX).is_empty());
    let second = Index::open(dir.path(), &settings()).unwrap_err().to_string();
    assert!(second.contains("another process"), "{second}");
    drop(index);
    Index::open(dir.path(), &settings()).unwrap();
}
