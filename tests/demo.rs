//! One command brings up a server with a fleet; Ctrl-C stops everything; a second run has the data of the first.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::time::timeout;

use crate::harness::{PATIENCE, muster, signal};

/// A first start makes a PostgreSQL cluster, with a debug build on a busy machine.
const STARTS_WITHIN: Duration = Duration::from_mins(1);

struct Demo {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    said: Vec<String>,
}

impl Demo {
    fn start(data: &Path) -> Self {
        let mut child = muster()
            .args(["demo", "--devices", "5", "--rate", "50"])
            .env("MUSTER__DATA_DIR", data)
            .env("MUSTER__HTTP__LISTEN", "127.0.0.1:0")
            .env("MUSTER__MQTT__LISTEN", "127.0.0.1:0")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the binary is built");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        Self { child, lines, said: Vec::new() }
    }

    /// Waits for a line and gives it.
    async fn line(&mut self, wanted: impl Fn(&str) -> bool) -> String {
        let found = async {
            while let Some(line) = self.lines.next_line().await.expect("text") {
                self.said.push(line.clone());
                if wanted(&line) {
                    return line;
                }
            }
            panic!("the demo ended after {:?}", self.said);
        };
        timeout(STARTS_WITHIN, found).await.expect("the demo says so in time")
    }

    async fn interrupt(mut self) {
        signal(self.child.id().expect("it runs"), "INT");
        let status = timeout(PATIENCE, self.child.wait()).await.expect("it stops in time").expect("a status");
        assert!(status.success(), "{status}");
    }
}

fn stored(line: &str) -> u64 {
    line.rsplit_once("stored ").and_then(|(_, n)| n.parse().ok()).expect("the line ends with what is stored")
}

#[tokio::test]
async fn the_demo_starts_shows_its_fleet_and_comes_back_with_its_data() {
    let dir = tempfile::Builder::new().prefix("muster-demo-").tempdir_in("/tmp").expect("/tmp can be written");
    let data = dir.path().join("data");
    let mut first = Demo::start(&data);
    let login = first.line(|line| line.contains("log in     ")).await;
    let live = first.line(|line| line.starts_with("devices online 5/5")).await;
    assert!(stored(&live) > 0, "{live}");
    assert!(first.said.iter().any(|line| line.contains("/docs")), "{:?}", first.said);
    first.interrupt().await;

    let mut second = Demo::start(&data);
    assert_eq!(second.line(|line| line.contains("log in     ")).await, login, "the login is kept");
    second.line(|line| line.starts_with("ready: ")).await;
    second.interrupt().await;
}
