//! The page that says which test keeps which clause must not rot.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The tests that a page names: whatever in backticks has a module.
fn named(page: &str) -> BTreeSet<String> {
    page.split('`').skip(1).step_by(2).filter(|word| word.contains("::")).map(str::to_owned).collect()
}

/// The tests below a directory, as the page names them.
fn written(directory: &Path, modules: &str) -> BTreeSet<String> {
    let mut tests = BTreeSet::new();
    for entry in fs::read_dir(directory).expect("a directory of tests").filter_map(Result::ok) {
        let path = entry.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
        let inside =
            if matches!(stem, "conformance" | "mod") { modules.to_owned() } else { format!("{modules}{stem}::") };
        if path.is_dir() {
            tests.extend(written(&path, &inside));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let source = fs::read_to_string(&path).expect("a source");
            tests.extend(functions(&source).map(|name| format!("{inside}{name}")));
        }
    }
    tests
}

/// The functions of a source that are tests.
fn functions(source: &str) -> impl Iterator<Item = &str> {
    let tests = source.split("#[tokio::test").skip(1).chain(source.split("#[test]").skip(1));
    tests.filter_map(|test| test.split_once("fn ")?.1.split('(').next())
}

#[test]
fn every_test_that_the_page_names_exists_and_no_test_is_missing() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let named = named(include_str!("../../docs/reference/conformance.md"));
    let all = written(&tests, "");
    let gone: Vec<_> = named.difference(&all).collect();
    assert!(gone.is_empty(), "named by docs/reference/conformance.md, and not there: {gone:?}");
    let own = written(&tests.join("conformance"), "");
    let missing: Vec<_> = own.difference(&named).filter(|test| !test.starts_with("table::")).collect();
    assert!(missing.is_empty(), "not named by docs/reference/conformance.md: {missing:?}");
    assert!(own.len() > 80, "tests are found by their text: {own:?}");
}
