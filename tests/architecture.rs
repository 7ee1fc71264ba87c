//! The rules of the house that a compiler does not keep: which crate may use which, what may be in the product at all,
//! and that every setting means something.
//!
//! The graph is read from `cargo tree`, which resolves features as a build does; `cargo metadata` names crates that
//! nothing compiles.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Crates that must not be in the product: one crypto back end, no second database driver, no second broker.
const BANNED: [&str; 6] = ["ring", "openssl-sys", "native-tls", "libsqlite3-sys", "rumqttd", "async-tungstenite"];

/// Crates by which `fleet-core` would learn of HTTP or MQTT.
const DOORS: [&str; 7] = ["axum", "hyper", "tower-http", "rumqttc", "rumqttd", "rmqtt-codec", "broker"];

/// Licences under which the product's crates may be used.
const ALLOWED_LICENCES: [&str; 11] = [
    "MIT",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CDLA-Permissive-2.0",
    "BSL-1.0",
];

/// Settings that are rules about other settings, kept while they are loaded.
const KEPT_BY_CONFIG: [&str; 1] = ["allow_plaintext"];

/// A crate as `cargo tree` tells it.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crate {
    name: String,
    version: String,
    licence: String,
}

impl Crate {
    /// A line "name v1.2.3 (where)|licence (*)".
    fn parse(line: &str) -> Option<Self> {
        let (named, licence) = line.split_once('|')?;
        let mut words = named.split_whitespace();
        Some(Self {
            name: words.next()?.to_owned(),
            version: words.next()?.trim_start_matches('v').to_owned(),
            licence: licence.trim_end_matches("(*)").trim().to_owned(),
        })
    }
}

/// Everything below `package` by `edges` ("normal", "build", "dev"), itself included.
fn graph(package: &str, edges: &str) -> BTreeSet<Crate> {
    let told = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "--prefix", "none", "--format", "{p}|{l}"])
        .args(["--package", package, "--edges", edges])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs this test");
    assert!(told.status.success(), "{}", String::from_utf8_lossy(&told.stderr));
    let crates: BTreeSet<Crate> = String::from_utf8_lossy(&told.stdout).lines().filter_map(Crate::parse).collect();
    assert!(crates.iter().any(|found| found.name == package), "{package} is in its own graph");
    crates
}

fn names(crates: &BTreeSet<Crate>) -> BTreeSet<&str> {
    crates.iter().map(|found| found.name.as_str()).collect()
}

#[test]
fn fleet_core_knows_neither_http_nor_mqtt() {
    let crates = graph("fleet-core", "normal,build,dev");
    let known: Vec<&str> = DOORS.into_iter().filter(|door| names(&crates).contains(door)).collect();
    assert_eq!(known, [""; 0], "these are for the doors: broker/ and api/");
}

#[test]
fn the_doors_do_not_know_each_other() {
    for (door, other) in [("broker", "api"), ("api", "broker")] {
        assert!(!names(&graph(door, "normal,build,dev")).contains(other), "{door} must not depend on {other}");
    }
}

#[test]
fn nothing_banned_is_in_the_product() {
    let product = graph("muster", "normal,build");
    let banned: Vec<&str> = BANNED.into_iter().filter(|banned| names(&product).contains(banned)).collect();
    assert_eq!(banned, [""; 0]);
    for tls in product.iter().filter(|found| found.name == "rustls") {
        assert!(tls.version.starts_with("0.23."), "rustls {}: expected the one line that is repaired", tls.version);
    }
}

#[test]
fn every_crate_has_an_allowed_licence() {
    for found in graph("muster", "normal,build") {
        assert!(is_allowed(&found.licence), "{} {}: {:?}", found.name, found.version, found.licence);
    }
}

#[test]
fn every_crate_comes_from_the_registry() {
    let lock = read(&root().join("Cargo.lock"));
    let sources: BTreeSet<&str> = lock.lines().filter_map(|line| line.strip_prefix("source = ")).collect();
    assert_eq!(Vec::from_iter(sources), ["\"registry+https://github.com/rust-lang/crates.io-index\""]);
}

/// Whether an SPDX expression (`OR`, the older `/`, `AND`, brackets) leaves a choice that is allowed.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let mut words = spaced.split_whitespace().peekable();
    let allowed = any(&mut words);
    allowed && words.next().is_none()
}

type Words<'a> = std::iter::Peekable<std::str::SplitWhitespace<'a>>;

fn any(words: &mut Words) -> bool {
    let mut allowed = all(words);
    while words.next_if_eq(&"OR").is_some() {
        allowed |= all(words);
    }
    allowed
}

fn all(words: &mut Words) -> bool {
    let mut allowed = one(words);
    while words.next_if_eq(&"AND").is_some() {
        allowed &= one(words);
    }
    allowed
}

fn one(words: &mut Words) -> bool {
    match words.next() {
        Some("(") => {
            let allowed = any(words);
            let closed = words.next() == Some(")");
            allowed && closed
        }
        Some(licence) if words.next_if_eq(&"WITH").is_some() => {
            let exception = words.next().unwrap_or_default();
            ALLOWED_LICENCES.contains(&format!("{licence} WITH {exception}").as_str())
        }
        Some(licence) => ALLOWED_LICENCES.contains(&licence),
        None => false,
    }
}

#[test]
fn a_licence_expression_is_weighed() {
    for good in [
        "MIT",
        "MIT/Apache-2.0",
        "GPL-3.0 OR MIT",
        "(MIT OR GPL-3.0) AND ISC",
        "(GPL-3.0) OR MIT",
        "Apache-2.0 WITH LLVM-exception",
    ] {
        assert!(is_allowed(good), "{good}");
    }
    for bad in
        ["", "GPL-3.0", "MIT AND GPL-3.0", "MIT WITH GPL-exception", "(GPL-3.0 OR MIT) AND AGPL-3.0", "(MIT", "MIT)"]
    {
        assert!(!is_allowed(bad), "{bad}");
    }
}

#[test]
fn every_setting_is_read_by_code() {
    let settings = settings();
    assert!(settings.len() > 30, "{settings:?}");
    let sources: Vec<String> = ["fleet-core/src", "broker/src", "api/src", "device-sim/src", "src"]
        .iter()
        .flat_map(|dir| rust_files(&root().join(dir)))
        .filter(|file| !file.ends_with("fleet-core/src/config.rs"))
        .map(|file| read(&file))
        .collect();
    let is_read = |key: &str| KEPT_BY_CONFIG.contains(&key) || sources.iter().any(|text| reads(text, key));
    let unread: Vec<&String> = settings.iter().filter(|key| !is_read(key)).collect();
    assert!(unread.is_empty(), "in config/muster.toml, but nothing reads them: {unread:?}");
}

/// The names of the settings in the shipped file, without their sections.
fn settings() -> BTreeSet<String> {
    let text = read(&root().join("config/muster.toml"));
    let keys = text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| line.split_once(" = "));
    keys.map(|(key, _)| key.to_owned()).collect()
}

/// Whether `text` has `.field`, whole.
fn reads(text: &str, field: &str) -> bool {
    text.match_indices(field).any(|(at, _)| {
        let after = text[at + field.len()..].chars().next().unwrap_or(' ');
        text[..at].ends_with('.') && !after.is_alphanumeric() && after != '_'
    })
}

#[test]
fn a_field_is_found_whole() {
    assert!(reads("config.http.listen,", "listen") && reads("self.x.listen", "listen"));
    assert!(!reads("config.listener", "listen") && !reads("listen", "listen") && !reads(".a_listen", "listen"));
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(file: &Path) -> String {
    fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()))
}

fn rust_files(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    entries
        .flatten()
        .map(|entry| entry.path())
        .flat_map(|path| if path.is_dir() { rust_files(&path) } else { vec![path] })
        .filter(|path| path.extension().is_some_and(|extension| extension == "rs"))
        .collect()
}

#[test]
fn every_test_that_the_threat_model_names_is_there() {
    let model = read(&root().join("docs/security.md"));
    let quoted = model.split('`').skip(1).step_by(2);
    let named = quoted.filter(|text| {
        text.matches('_').count() > 2 && text.chars().all(|c| c.is_ascii_lowercase() || c == '_' || c.is_ascii_digit())
    });
    let named = named.collect::<BTreeSet<_>>();
    assert!(named.len() > 50, "only {} tests are named", named.len());
    let dirs = ["fleet-core/src", "broker/src", "api/src", "api/tests", "tests"];
    let sources = dirs.iter().flat_map(|dir| rust_files(&root().join(dir))).map(|file| read(&file)).collect::<String>();
    let missing = named.iter().filter(|name| !sources.contains(&format!("fn {name}("))).collect::<Vec<_>>();
    assert!(missing.is_empty(), "in docs/security.md, but there are no such tests: {missing:?}");
}

/// Files with routes for somebody who has not logged in, or is about to have logged out.
const BEFORE_LOGIN: [&str; 6] =
    ["auth.rs", "authorities.rs", "oidc.rs", "passwords.rs", "provision.rs", "signing_keys.rs"];

#[test]
fn whoever_has_logged_in_reads_and_changes_in_a_transaction_of_their_own() {
    for file in rust_files(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/api/src/routes"))) {
        let name = file.file_name().expect("a name").to_string_lossy().into_owned();
        let source = std::fs::read_to_string(file).expect("a source file");
        let is_bound =
            !source.contains("app.begin(") && !source.contains("app.db.acquire(") && !source.contains("app.db.begin(");
        assert!(
            is_bound || BEFORE_LOGIN.contains(&name.as_str()),
            "{name}: expected caller.read(&app) or caller.change(&app)"
        );
    }
}
