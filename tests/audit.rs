//! The audit proven from outside: `muster audit verify` on the database of a server, and on an export.

use sqlx::Executor;

use crate::harness::{Fleet, muster};

/// What `muster audit verify` prints beside the server, and how it exits.
async fn verify(fleet: &Fleet, args: &[&str]) -> (i32, String) {
    let mut command = muster();
    command.args(["audit", "verify"]).args(args).env("MUSTER__DATA_DIR", fleet.data_dir());
    if fleet.has_own_database() {
        command.env("MUSTER__DATABASE__URL", fleet.database_url());
    }
    let done = command.output().await.expect("the binary runs");
    let said = [done.stdout, done.stderr].concat();
    (done.status.code().expect("it ends by itself"), String::from_utf8_lossy(&said).trim().to_owned())
}

async fn enrol(fleet: &Fleet, ids: &[&str]) {
    for id in ids {
        fleet.enrol(id).await;
    }
}

/// The number and hash behind `head `.
fn head(said: &str) -> &str {
    said.rsplit_once("head ").expect("it tells where the chain ends").1
}

#[tokio::test]
async fn a_changed_row_is_named_and_the_exit_code_tells() {
    let fleet = Fleet::start().await;
    // The login is the first entry.
    enrol(&fleet, &["a", "b"]).await;
    let (code, said) = verify(&fleet, &[]).await;
    assert!(code == 0 && said.starts_with("main: intact, 3 entries; head 3:"), "{code}: {said}");
    let noted = head(&said).to_owned();
    enrol(&fleet, &["d"]).await;
    let (code, said) = verify(&fleet, &["--tenant", "main", "--head", &noted]).await;
    assert_eq!(code, 0, "{said}");
    let sql = "alter table audit disable trigger all; update audit set resource_id = 'another' where seq = 2";
    fleet.db().execute(sql).await.expect("whoever may change rows");
    let (code, said) = verify(&fleet, &[]).await;
    let expected = "main: row 2 was changed: its contents do not match its hash (1 entries before it are in order)";
    assert_eq!((code, said.as_str()), (1, expected));
    let (code, said) = verify(&fleet, &["--tenant", "nobody"]).await;
    assert!(code != 0 && said.contains("tenant nobody does not exist"), "{said}");
}

#[tokio::test]
async fn an_export_is_verified_without_a_server_and_what_is_cut_from_it_is_missed() {
    let fleet = Fleet::start().await;
    enrol(&fleet, &["a", "b"]).await;
    let export = fleet.text("/api/v1/audit/export").await;
    let lines = export.lines().collect::<Vec<_>>();
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("audit.ndjson");
    let path = file.to_str().expect("a path");
    let changed = export.replacen("user.log-in", "user.log-on", 1);
    for (lines, expected) in [
        (lines.clone(), "intact, 3 entries; head 3:"),
        (lines[1..].to_vec(), "intact, 2 entries from 2 on; head 3:"),
        (lines[..3].to_vec(), "its last line, which tells where the chain ends, is missing"),
        ([&lines[..2], &lines[3..]].concat(), "row 3 is missing"),
        ([&lines[..1], &lines[2..]].concat(), "row 2 is missing"),
        (vec![lines[0], lines[2], lines[1], lines[3]], "row 2 is missing"),
        (vec![lines[0], lines[0], lines[1], lines[2], lines[3]], "row 1 is out of its order"),
        (changed.lines().collect(), "row 1 was changed"),
        (vec![lines[3]], "row 1 is missing"),
        (vec!["what"], "line 1 is no entry of an audit"),
    ] {
        std::fs::write(&file, lines.join("\n")).expect("the file can be written");
        let (code, said) = verify(&fleet, &["--file", path]).await;
        assert!(said.contains(expected), "{expected}: {said}");
        assert_eq!(code, i32::from(!expected.starts_with("intact")), "{said}");
    }
}

#[tokio::test]
async fn the_embedded_database_is_verified_while_the_server_runs_and_when_it_does_not() {
    let mut fleet = Fleet::start_embedded().await;
    enrol(&fleet, &["a"]).await;
    let (code, running) = verify(&fleet, &[]).await;
    assert!(code == 0 && running.contains("main: intact, 2 entries"), "{running}");
    fleet.stop().await;
    let (code, stopped) = verify(&fleet, &["--tenant", "main", "--head", head(&running)]).await;
    assert!(code == 0 && stopped.contains("main: intact, 2 entries"), "{stopped}");
}
