//! What PostgreSQL says goes to a file of bounded size.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ChildStderr;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Size at which the file becomes `.1` and a new one is begun, in bytes: at most twice this is kept.
pub(super) const MAX_BYTES: u64 = 8 * 1024 * 1024;

/// The end of it is kept to tell why a start failed, in bytes.
const TAIL_BYTES: usize = 8 * 1024;

/// How long the last words of a dead postmaster are waited for.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Copies one postmaster's words. Ends with the last process that holds its end of the pipe.
#[derive(Debug)]
pub(super) struct Log {
    tail: Arc<Mutex<Vec<u8>>>,
    copier: JoinHandle<()>,
}

impl Log {
    pub(super) fn copy(from: ChildStderr, to: &Path) -> io::Result<Self> {
        let tail = Arc::new(Mutex::new(Vec::new()));
        let (kept, file) = (Arc::clone(&tail), RotatingFile::new(to.to_owned()));
        let copier = thread::Builder::new().name("postgres-log".to_owned()).spawn(move || copy(from, file, &kept))?;
        Ok(Self { tail, copier })
    }

    /// Why the postmaster ended, in its own words: its last fatal line.
    pub(super) fn last_words(&self) -> String {
        let begun = Instant::now();
        while !self.copier.is_finished() && begun.elapsed() < LAST_WORDS {
            thread::sleep(Duration::from_millis(5));
        }
        let tail = String::from_utf8_lossy(&self.tail.lock()).into_owned();
        last_words(&tail)
    }
}

fn last_words(tail: &str) -> String {
    let fatal =
        tail.lines().rev().find_map(|line| Some(line.split_once("FATAL:  ").or(line.split_once("PANIC:  "))?.1));
    fatal.or(tail.lines().last()).unwrap_or("it said nothing").trim().to_owned()
}

fn copy(mut from: impl Read, mut file: RotatingFile, tail: &Mutex<Vec<u8>>) {
    let mut chunk = [0; 8 * 1024];
    while let Ok(read @ 1..) = from.read(&mut chunk) {
        // A full disk must not stop the reading: PostgreSQL would wait for us.
        let _best_effort = file.write(&chunk[..read]);
        let mut tail = tail.lock();
        tail.extend_from_slice(&chunk[..read]);
        let surplus = tail.len().saturating_sub(TAIL_BYTES);
        tail.drain(..surplus);
    }
}

struct RotatingFile {
    path: PathBuf,
    open: Option<(File, u64)>,
}

impl RotatingFile {
    fn new(path: PathBuf) -> Self {
        Self { path, open: None }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.open.as_ref().is_some_and(|(_, size)| *size >= MAX_BYTES) {
            self.open = None;
            fs::rename(&self.path, self.path.with_extension("log.1"))?;
        }
        let (file, size) = match &mut self.open {
            Some(open) => open,
            closed => {
                let file = File::options().append(true).create(true).open(&self.path)?;
                let size = file.metadata()?.len();
                closed.insert((file, size))
            }
        };
        *size += bytes.len() as u64;
        file.write_all(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_bounded_and_the_newest_words_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("postgres.log");
        let tail = Mutex::new(Vec::new());
        for _ in 0..3 {
            let words = io::repeat(b'x').take(MAX_BYTES).chain(&b"\nthe end"[..]);
            copy(words, RotatingFile::new(path.clone()), &tail);
        }
        let sizes = [&path, &path.with_extension("log.1")].map(|file| fs::metadata(file).unwrap().len());
        assert!(sizes.iter().all(|size| (1..MAX_BYTES + 16 * 1024).contains(size)), "{sizes:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        assert_eq!(last_words(&String::from_utf8_lossy(&tail.lock())), "the end");
    }

    #[test]
    fn the_last_fatal_line_says_why() {
        let said = "2026 [1] LOG:  starting\n2026 [1] FATAL:  could not map memory\n2026 [1] LOG:  database system is shut down\n";
        assert_eq!(last_words(said), "could not map memory");
        assert_eq!(last_words(""), "it said nothing");
    }
}
