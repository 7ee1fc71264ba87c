//! What the kernel knows of a process: its processor time, its memory, its children.

use std::fs;
use std::time::Duration;

/// Length of the kernel's tick in `/proc/*/stat`; 100 a second on every Linux of this decade.
const TICK: Duration = Duration::from_millis(10);

/// User and system time of a process so far, all threads; zero when it is gone.
pub(crate) fn cpu(pid: u32) -> Duration {
    // Fields 14 and 15 of the whole line; `stat` begins with the third.
    ticks(pid, 11..13)
}

/// The same of several processes together with all their children that have ended: a worker that came and went counts.
pub(crate) fn cpu_of(pids: &[u32]) -> Duration {
    pids.iter().map(|pid| ticks(*pid, 11..15)).sum()
}

fn ticks(pid: u32, fields: std::ops::Range<usize>) -> Duration {
    let of_process = stat(pid).unwrap_or_default();
    let ticks = of_process.get(fields).unwrap_or_default().iter().filter_map(|field| field.parse::<u32>().ok());
    TICK * ticks.sum::<u32>()
}

/// Resident memory in bytes; zero when it is gone.
pub(crate) fn rss(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or_default();
    line.split_whitespace().next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024
}

/// Every process below `pid` whose program is called `name`.
pub(crate) fn descendants(pid: u32, name: &str) -> Vec<u32> {
    let all: Vec<(u32, u32, String)> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| Some((pid, stat(pid)?.get(1)?.parse().ok()?, comm(pid))))
        .collect();
    let mut below = vec![pid];
    let mut at = 0;
    while at < below.len() {
        let parent_of_these = below[at];
        below.extend(all.iter().filter(|(_, parent, _)| *parent == parent_of_these).map(|(pid, ..)| *pid));
        at += 1;
    }
    let named = |pid: &u32| all.iter().any(|(other, _, comm)| other == pid && comm == name);
    below.into_iter().skip(1).filter(named).collect()
}

fn comm(pid: u32) -> String {
    fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default().trim().to_owned()
}

/// The fields of `/proc/{pid}/stat` from the third (state) on; the second may contain spaces and brackets.
fn stat(pid: u32) -> Option<Vec<String>> {
    let line = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = line.rsplit_once(')')?;
    Some(fields.split_whitespace().map(str::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_knows_itself_and_its_children() {
        let me = std::process::id();
        assert!(rss(me) > 100_000);
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let found = descendants(me, "sleep");
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(found.contains(&child.id()));
        assert_eq!((rss(u32::MAX), cpu(u32::MAX)), (0, Duration::ZERO));
    }
}
