//! The index of log lines on a disk that is full: what is acknowledged is stored, what was indexed is found, and with room again
//! everything is.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Answer, Device, Fleet};
use crate::index::{BUSY, command, index, lines, send, stored};

/// Messages after which the disk should have been full long ago.
const MANY: u64 = 5_000;
/// Lines of a message.
const LINES: u64 = 10;
/// Words of a line, of which there is no other like it: they are what fills an index.
const WORDS: u64 = 60;

/// A disk of its own, in memory. Whatever becomes of the test, it is unmounted in the end.
struct Disk(TempDir);

impl Disk {
    /// None where nothing may be mounted, which is said.
    fn of(size: &str) -> Option<Self> {
        let at = tempfile::Builder::new().prefix("muster-disk-").tempdir_in("/tmp").expect("/tmp can be written");
        let options = format!("size={size},mode=0755");
        let words = ["-t", "tmpfs", "-o", &options, "muster-test"].map(OsStr::new);
        match run("mount", words.into_iter().chain([at.path().as_os_str()])) {
            Ok(()) => Some(Self(at)),
            Err(why) => {
                eprintln!("SKIPPED: no disk can be mounted here, which takes root and CAP_SYS_ADMIN: {why}");
                None
            }
        }
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn grow(&self, size: &str) {
        let options = format!("remount,size={size}");
        let words = [OsStr::new("-o"), OsStr::new(&options), self.path().as_os_str()];
        run("mount", words.into_iter()).expect("what was mounted can be mounted larger");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // At once, also while a server has files open there.
        if let Err(why) = run("umount", [OsStr::new("-l"), self.path().as_os_str()].into_iter()) {
            eprintln!("{} is still mounted: {why}", self.path().display());
        }
    }
}

fn run<'a>(program: &str, words: impl Iterator<Item = &'a OsStr>) -> Result<(), String> {
    let output = Command::new(program).args(words).output().map_err(|error| error.to_string())?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

/// Lines of words that nobody else says.
fn wordy(from: u64) -> String {
    let word = |nth: u64| format!("w{:016x}", nth.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let message = |line: u64| (line * WORDS..(line + 1) * WORDS).map(word).collect::<Vec<_>>().join(" ");
    let lines = (from..from + LINES).map(|line| json!({ "seq": line, "message": message(line) }));
    lines.collect::<Value>().to_string()
}

/// Sends such lines until `is_enough`, each message acknowledged; says how many lines.
async fn fill(fleet: &Fleet, device: &Device, from: u64, is_enough: impl AsyncFn(u64) -> bool) -> u64 {
    let mut mqtt = fleet.connect(device).await;
    for nth in 1..=MANY {
        let answer = mqtt.publish(&device.topic("logs"), wordy(from + (nth - 1) * LINES)).await;
        assert_eq!(answer, Answer::Success);
        if is_enough(nth).await {
            return nth * LINES;
        }
    }
    panic!("{MANY} messages were not enough: {}", index(fleet).await);
}

/// Waits until so many lines can be found, and nothing is in the way.
async fn has(fleet: &Fleet, sent: u64) {
    fleet.eventually(|| index(fleet), |index| lines(index) == sent && index["state"] == "ok").await;
}

/// It says that its disk is full, wherever that is asked, and what was indexed before is found.
async fn is_full_and_finds_the_first(fleet: &Fleet) {
    let full = fleet.eventually(|| index(fleet), |index| index["state"] == "disk_full").await;
    assert!(full["reason"].as_str().is_some_and(|why| why.contains("no room on the disk")), "{full}");
    let ready = fleet.get("/readyz").await;
    assert_eq!((&ready["ready"], &ready["checks"]["index"]), (&json!(true), &json!("disk_full")), "{ready}");
    assert!((fleet.metric("muster_index_state", r#"{state="disk_full"}"#).await - 1.0).abs() < f64::EPSILON);
    let found = fleet.get("/api/v1/logs/search?q=%22line%203%20of%20many%22").await;
    assert_eq!((found["items"].as_array().map(Vec::len), &found["complete"]), (Some(1), &json!(false)), "{found}");
    let counted = fleet.get("/api/v1/logs/histogram?q=many&interval=1d").await;
    assert_eq!(counted["complete"], json!(false), "{counted}");
}

#[tokio::test]
async fn on_a_full_disk_lines_are_stored_and_with_room_again_they_are_found() {
    let Some(disk) = Disk::of("2m") else { return };
    let mut settings = BUSY.to_vec();
    let dir = disk.path().to_str().expect("a path in ASCII");
    settings.push(("MUSTER__SEARCH__DIR", dir));
    let mut fleet = Fleet::start_with(&settings).await;
    let (first, second) = (fleet.enrol("boiler-1").await, fleet.enrol("boiler-2").await);
    let mut sent = send(&fleet, &first, 0, 1).await;
    has(&fleet, sent).await;

    let full = async |_| index(&fleet).await["state"] == "disk_full";
    let mut filled = fill(&fleet, &second, 0, full).await;
    is_full_and_finds_the_first(&fleet).await;
    filled += fill(&fleet, &second, filled, async |messages| messages == 20).await;
    sent += filled;
    assert_eq!(stored(&fleet).await, sent, "what was acknowledged is stored");
    is_full_and_finds_the_first(&fleet).await;
    let held = lines(&index(&fleet).await);
    assert!(held < sent, "{held} of {sent} lines on a full disk");
    // Neither is it lost when the server is killed, nor does a full disk keep it from starting.
    fleet.kill().await;
    fleet.start_again().await;
    is_full_and_finds_the_first(&fleet).await;

    disk.grow("64m");
    has(&fleet, sent).await;
    assert_eq!(stored(&fleet).await, sent);
    let (code, said) = command(&fleet, &["verify"]).await;
    assert_eq!((code, said.contains("differs")), (Some(0), false), "{said}");
    let found = fleet.get("/api/v1/logs/search?q=many&limit=100").await;
    assert_eq!((found["items"].as_array().map(Vec::len), &found["complete"]), (Some(10), &json!(true)));
    assert!(fleet.stop().await.success());
}
