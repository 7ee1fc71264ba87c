//! The ledger: what was acknowledged, compared with what the server can find.
//!
//! Holds: an acknowledged reading that is not found is *missing*; one found more than once is *duplicated*. A reading
//! found that was never acknowledged is allowed, since its acknowledgement may have been lost on the way; it is counted.
//! Bounds: [`MAX_ENTRIES`] in memory, 16 bytes each.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{BufRead as _, BufReader, BufWriter, Write as _};
use std::path::Path;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::error::{Error, Result};
use crate::rest::Client;

/// Most acknowledged readings a ledger holds.
pub const MAX_ENTRIES: usize = 20_000_000;
/// Devices read back at once.
const READERS: usize = 8;
/// Missing and duplicated readings that are named; all are counted.
const EXAMPLES: usize = 10;
const HEADER: &str = "muster-ledger 1";

/// What names a reading of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// Device time, in ms since the epoch.
    pub ts_ms: i64,
    /// Number since boot.
    pub seq: u64,
}

/// Acknowledged readings by device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    devices: BTreeMap<String, Vec<Entry>>,
}

/// What a comparison found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Readings in the ledger.
    pub acknowledged: u64,
    /// Of these, found at least once.
    pub found: u64,
    /// Of these, not found.
    pub missing: u64,
    /// Of these, found more than once.
    pub duplicated: u64,
    /// Found though never acknowledged.
    pub unacknowledged: u64,
    /// The first few that are missing or duplicated: `missing sim-1-7 1763692212345 18`.
    pub examples: Vec<String>,
}

impl Verdict {
    /// Whether the server kept its promise: nothing acknowledged is missing or doubled.
    pub fn holds(&self) -> bool {
        self.missing == 0 && self.duplicated == 0
    }

    fn add(&mut self, other: Self) {
        self.acknowledged += other.acknowledged;
        self.found += other.found;
        self.missing += other.missing;
        self.duplicated += other.duplicated;
        self.unacknowledged += other.unacknowledged;
        self.examples.extend(other.examples);
        self.examples.truncate(EXAMPLES);
    }

    fn example(&mut self, what: &str, device: &str, entry: Entry) {
        if self.examples.len() < EXAMPLES {
            self.examples.push(format!("{what} {device} {} {}", entry.ts_ms, entry.seq));
        }
    }
}

/// Compares the readings of one device.
pub fn compare(device: &str, acknowledged: &[Entry], found: &[Entry]) -> Verdict {
    let mut times = BTreeMap::<Entry, u64>::new();
    for entry in found {
        *times.entry(*entry).or_default() += 1;
    }
    let mut verdict = Verdict::default();
    let mut acknowledged = acknowledged.to_vec();
    acknowledged.sort_unstable();
    acknowledged.dedup();
    for entry in acknowledged {
        verdict.acknowledged += 1;
        match times.remove(&entry) {
            None => {
                verdict.missing += 1;
                verdict.example("missing", device, entry);
            }
            Some(1) => verdict.found += 1,
            Some(_) => {
                verdict.found += 1;
                verdict.duplicated += 1;
                verdict.example("duplicated", device, entry);
            }
        }
    }
    verdict.unacknowledged = times.len() as u64;
    verdict
}

impl Ledger {
    /// Adds an acknowledged reading.
    pub fn record(&mut self, device: &str, entry: Entry) {
        match self.devices.get_mut(device) {
            Some(entries) => entries.push(entry),
            None => drop(self.devices.insert(device.to_owned(), vec![entry])),
        }
    }

    /// How many readings it holds.
    pub fn len(&self) -> usize {
        self.devices.values().map(Vec::len).sum()
    }

    /// Whether nothing was acknowledged.
    pub fn is_empty(&self) -> bool {
        self.devices.is_empty()
    }

    /// Its devices.
    pub fn devices(&self) -> impl Iterator<Item = &str> {
        self.devices.keys().map(String::as_str)
    }

    /// Reads a ledger file. A last line without its end is ignored: its writer was killed.
    ///
    /// # Errors
    /// [`Error::Ledger`] with the line that is not understood.
    pub fn read(path: &Path) -> Result<Self> {
        let bad = |reason: String| Error::Ledger { path: path.display().to_string(), reason };
        let mut file = BufReader::new(File::open(path).map_err(|e| bad(e.to_string()))?);
        let mut ledger = Self::default();
        let (mut line, mut number, mut entries) = (String::new(), 0_u64, 0);
        while file.read_line(&mut line).map_err(|e| bad(e.to_string()))? > 0 {
            number += 1;
            if let Some(line) = line.strip_suffix('\n') {
                if number == 1 {
                    (line == HEADER).then_some(()).ok_or_else(|| bad(format!("line 1: expected {HEADER:?}")))?;
                } else {
                    let (device, entry) = parse_line(line)
                        .ok_or_else(|| bad(format!("line {number}: expected a device, a time in ms and a number")))?;
                    ledger.record(device, entry);
                    entries += 1;
                }
            }
            if entries > MAX_ENTRIES {
                return Err(bad(format!("more than {MAX_ENTRIES} readings")));
            }
            line.clear();
        }
        if number == 0 { Err(bad("the file is empty".into())) } else { Ok(ledger) }
    }

    /// Reads every device back and compares; `progress` is told how many devices are done. Takes the memory of a
    /// few devices' readings at a time.
    ///
    /// # Errors
    /// As [`Client::readings`].
    pub async fn verify(&self, client: &Client, mut progress: impl FnMut(usize)) -> Result<Verdict> {
        let verdicts = stream::iter(&self.devices).map(|(device, entries)| async move {
            let oldest = entries.iter().map(|e| e.ts_ms).min().unwrap_or_default();
            let newest = entries.iter().map(|e| e.ts_ms).max().unwrap_or_default();
            client.readings(device, oldest, newest).await.map(|found| compare(device, entries, &found))
        });
        let mut verdicts = verdicts.buffer_unordered(READERS);
        let mut total = Verdict::default();
        let mut done = 0;
        while let Some(verdict) = verdicts.try_next().await? {
            total.add(verdict);
            done += 1;
            progress(done);
        }
        Ok(total)
    }
}

fn print_line(out: &mut String, device: &str, entry: Entry) {
    writeln!(out, "{device} {} {}", entry.ts_ms, entry.seq).expect("a String takes any text");
}

fn parse_line(line: &str) -> Option<(&str, Entry)> {
    let mut words = line.split(' ');
    let device = words.next().filter(|device| !device.is_empty())?;
    let ts_ms = words.next()?.parse().ok()?;
    let seq = words.next()?.parse().ok()?;
    words.next().is_none().then_some((device, Entry { ts_ms, seq }))
}

/// Writes acknowledged readings to a ledger and, if wanted, to a file as they arrive. Ends when all senders are gone.
pub(crate) struct Recorder {
    names: Vec<String>,
    file: Option<BufWriter<File>>,
    path: String,
}

/// An acknowledged reading of the device with that index.
pub(crate) type Acknowledged = (u32, Entry);

impl Recorder {
    /// A recorder for devices of these names, whose file (if any) is begun anew.
    pub(crate) fn new(names: Vec<String>, path: Option<&Path>) -> Result<Self> {
        let shown = path.map(|p| p.display().to_string()).unwrap_or_default();
        let mut recorder = Self { names, file: None, path: shown };
        if let Some(path) = path {
            recorder.file = Some(BufWriter::new(File::create(path).map_err(|e| recorder.failed(&e))?));
            recorder.write(&format!("{HEADER}\n"))?;
        }
        Ok(recorder)
    }

    /// Blocks its thread until the last sender is gone.
    pub(crate) fn run(mut self, mut from: mpsc::Receiver<Acknowledged>) -> Result<Ledger> {
        let mut ledger = Ledger::default();
        let (mut batch, mut text) = (Vec::new(), String::new());
        while from.blocking_recv_many(&mut batch, 1024) > 0 {
            text.clear();
            for (device, entry) in batch.drain(..) {
                let name = &self.names[device as usize];
                ledger.record(name, entry);
                if self.file.is_some() {
                    print_line(&mut text, name, entry);
                }
            }
            self.write(&text)?;
        }
        Ok(ledger)
    }

    fn write(&mut self, text: &str) -> Result<()> {
        let Some(file) = &mut self.file else { return Ok(()) };
        let written = file.write_all(text.as_bytes()).and_then(|()| file.flush());
        written.map_err(|e| self.failed(&e))
    }

    fn failed(&self, error: &std::io::Error) -> Error {
        Error::Ledger { path: self.path.clone(), reason: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn entries(of: std::ops::Range<u64>) -> Vec<Entry> {
        of.map(|seq| Entry { ts_ms: 1000 + i64::try_from(seq / 3).unwrap(), seq }).collect()
    }

    #[test]
    fn one_lost_and_one_doubled_reading_are_found() {
        let acknowledged = entries(1..100);
        let mut found = entries(1..103);
        found.retain(|e| e.seq != 40);
        found.push(acknowledged[6]);
        let verdict = compare("d", &acknowledged, &found);
        assert_eq!((verdict.acknowledged, verdict.found, verdict.missing), (99, 98, 1));
        assert_eq!((verdict.duplicated, verdict.unacknowledged), (1, 3));
        assert!(!verdict.holds());
        assert_eq!(verdict.examples, ["duplicated d 1002 7", "missing d 1013 40"]);
    }

    #[test]
    fn a_file_is_read_back_and_a_torn_last_line_is_ignored() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let (to, from) = mpsc::channel(10);
        let recorder = Recorder::new(vec!["a".into(), "b".into()], Some(&path)).unwrap();
        for (device, entry) in [(0, 1), (1, 2), (0, 3)].map(|(d, seq)| (d, Entry { ts_ms: -5, seq })) {
            to.try_send((device, entry)).unwrap();
        }
        drop(to);
        let kept = recorder.run(from).unwrap();
        assert_eq!(kept.len(), 3);
        assert_eq!(Ledger::read(&path).unwrap(), kept);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, text + "b 17 1").unwrap();
        assert_eq!(Ledger::read(&path).unwrap(), kept);
    }

    #[test]
    fn a_file_that_is_no_ledger_is_refused_with_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ledger");
        let said = |text: &str| {
            std::fs::write(&path, text).unwrap();
            Ledger::read(&path).unwrap_err().to_string()
        };
        assert!(said("").contains("empty"));
        assert!(said("hello\n").contains("line 1"));
        assert!(said("muster-ledger 1\na 1 1\na 1\n").contains("line 3"));
        assert!(Ledger::read(&dir.path().join("none")).unwrap_err().to_string().contains("No such file"));
    }

    proptest! {
        #[test]
        fn the_comparison_agrees_with_sets(
            acknowledged in prop::collection::vec((0_i64..8, 0_u64..8), 0..60),
            found in prop::collection::vec((0_i64..8, 0_u64..8), 0..60),
        ) {
            let list = |of: &[(i64, u64)]| of.iter().map(|(ts_ms, seq)| Entry { ts_ms: *ts_ms, seq: *seq }).collect::<Vec<_>>();
            let (acknowledged, found) = (list(&acknowledged), list(&found));
            let verdict = compare("d", &acknowledged, &found);
            let a = acknowledged.iter().copied().collect::<BTreeSet<_>>();
            let f = found.iter().copied().collect::<BTreeSet<_>>();
            let twice = a.iter().filter(|e| found.iter().filter(|x| x == e).count() > 1).count();
            prop_assert_eq!(verdict.acknowledged, a.len() as u64);
            prop_assert_eq!(verdict.missing, a.difference(&f).count() as u64);
            prop_assert_eq!(verdict.found, a.intersection(&f).count() as u64);
            prop_assert_eq!(verdict.duplicated, twice as u64);
            prop_assert_eq!(verdict.unacknowledged, f.difference(&a).count() as u64);
            prop_assert_eq!(verdict.holds(), a.is_subset(&f) && twice == 0);
            prop_assert!(verdict.examples.len() <= EXAMPLES);
        }

        #[test]
        fn a_line_is_read_as_it_was_written(device in "[A-Za-z0-9._-]{1,64}", ts_ms: i64, seq: u64) {
            let mut line = String::new();
            print_line(&mut line, &device, Entry { ts_ms, seq });
            prop_assert_eq!(parse_line(line.trim_end_matches('\n')), Some((device.as_str(), Entry { ts_ms, seq })));
        }

        #[test]
        fn no_line_panics(line: String) {
            let _ = parse_line(&line);
        }
    }
}
