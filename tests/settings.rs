//! What is wrong with the settings, an address, the data directory or the database is said in one line, with an exit code
//! that scripts can use.

use std::net::TcpListener;
use std::process::{Output, Stdio};

use fleet_core::testing::TestDb;
use sqlx::ConnectOptions;
use tokio::time::timeout;

use crate::harness::{PATIENCE, muster};

async fn serve(settings: &[(&str, &str)]) -> Output {
    let output = muster()
        .arg("serve")
        .env("MUSTER__HTTP__LISTEN", "127.0.0.1:0")
        .env("MUSTER__MQTT__LISTEN", "127.0.0.1:0")
        .env("MUSTER__LOG__FILTER", "off")
        .envs(settings.iter().copied())
        .stdin(Stdio::null())
        .output();
    timeout(PATIENCE, output).await.expect("it gives up in time").expect("the binary is built")
}

/// The server ends with this code and one line that names all of these.
async fn refuses(settings: &[(&str, &str)], code: i32, named: &[&str]) {
    let output = serve(settings).await;
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    assert_eq!(output.status.code(), Some(code), "{settings:?}: {said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    for name in named {
        assert!(said.contains(name), "{settings:?}: expected {name:?} in {said:?}");
    }
}

#[tokio::test]
async fn a_wrong_setting_is_named() {
    refuses(&[("MUSTER__HTTP__LISTNE", "127.0.0.1:1")], 2, &["listne", "listen"]).await;
    refuses(&[("MUSTER__INGEST__WRITERS", "many")], 2, &["writers"]).await;
    refuses(&[("MUSTER__MQTT__LISTEN", "0.0.0.0:1883")], 2, &["mqtt.listen", "allow_plaintext"]).await;
    refuses(&[("MUSTER_CONFIG", "/nowhere/muster.toml")], 2, &["MUSTER_CONFIG", "/nowhere/muster.toml"]).await;
    refuses(&[("MUSTER__LOG__FILTER", "info,=x=")], 2, &["log.filter"]).await;
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = taken.local_addr().expect("bound").to_string();
    refuses(&[("MUSTER__HTTP__LISTEN", &address)], 3, &["http.listen", &address]).await;
    let db = TestDb::new().await;
    let url = db.options().to_url_lossy().to_string();
    refuses(&[("MUSTER__MQTT__LISTEN", &address), ("MUSTER__DATABASE__URL", &url)], 3, &["mqtt.listen", &address])
        .await;
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_used_is_named() {
    refuses(&[("MUSTER__DATA_DIR", "/proc/muster")], 4, &["/proc/muster"]).await;
}

#[tokio::test]
async fn a_database_that_cannot_be_used_is_told_without_its_password() {
    for (url, named) in [
        ("not a url", "postgres://"),
        ("mysql://root@127.0.0.1/muster", "postgres://"),
        ("postgres://muster:hunter2@127.0.0.1:1/muster", "127.0.0.1"),
    ] {
        let output = serve(&[("MUSTER__DATABASE__URL", url)]).await;
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        assert!(matches!(output.status.code(), Some(2 | 5)), "{url}: {said}");
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(named), "{url}: {said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
}

#[tokio::test]
async fn the_settings_in_force_are_printed_without_secrets() {
    let output = muster().arg("config").env("MUSTER__DATABASE__URL", "postgres://u:hunter2@h/d").output().await;
    let output = output.expect("the binary is built");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success());
    assert!(said.contains("url = \"***\"") && said.contains("max_packet_bytes"), "{said}");
    assert!(!said.contains("hunter2"), "{said}");
}

#[tokio::test]
async fn bad_usage_is_told_with_its_own_code() {
    let output = muster().args(["serve", "--roles", "king"]).output().await.expect("the binary is built");
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("broker"), "it says what was expected");
}
