//! What an earlier life of the cluster left behind, and its end.
//!
//! A killed server leaves a postmaster; a killed postmaster leaves backends, a pid file, and until somebody reaps it a
//! zombie that PostgreSQL would take for alive. Only processes named `postgres` whose working directory is the cluster
//! count: a process id alone may be anybody's by now.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};
use tracing::{info, warn};

use super::home::Home;
use super::refuse;
use crate::error::Result;

/// What is sent to a leftover after how long. With the start that follows, healing takes less than ten seconds.
const STAGES: [(Duration, Signal); 3] =
    [(Duration::ZERO, Signal::INT), (Duration::from_secs(3), Signal::QUIT), (Duration::from_secs(4), Signal::KILL)];

/// How long leftovers may resist `SIGKILL`.
const GIVE_UP: Duration = Duration::from_secs(7);

/// Ends the processes and removes the files of an earlier life. The caller holds the lock of `home` and has none running.
pub(super) fn clear(home: &Home) -> Result<()> {
    end_processes(home)?;
    let [socket, socket_lock] = home.socket_files();
    for stale in [home.pid_file(), socket, socket_lock] {
        match fs::remove_file(&stale) {
            Ok(()) => info!(file = %stale.display(), "removed what a killed PostgreSQL left"),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(refuse(format!("cannot remove {}: {e}", stale.display()))),
        }
    }
    Ok(())
}

fn end_processes(home: &Home) -> Result<()> {
    let (data, begun) = (home.data(), Instant::now());
    let mut stages = STAGES.iter().peekable();
    loop {
        let left = postgres_in(&data);
        if left.is_empty() {
            return Ok(());
        }
        if let Some((_, signal)) = stages.next_if(|(after, _)| begun.elapsed() >= *after) {
            warn!(processes = left.len(), ?signal, "ending a PostgreSQL that its server left behind");
            end(&left, postmaster(home), *signal);
        }
        if begun.elapsed() > GIVE_UP {
            return Err(refuse(format!(
                "processes {left:?} of an earlier PostgreSQL in {} do not end",
                data.display()
            )));
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Asked politely, a postmaster shuts down and takes its children with it. Backends that have lost theirs can only be
/// told to quit.
fn end(left: &[Pid], postmaster: Option<Pid>, signal: Signal) {
    match postmaster.filter(|pid| left.contains(pid)) {
        Some(postmaster) if signal != Signal::KILL => send(postmaster, signal),
        _ => {
            let signal = if signal == Signal::INT { Signal::QUIT } else { signal };
            for pid in left {
                send(*pid, signal);
            }
        }
    }
}

/// Who wrote the pid file.
fn postmaster(home: &Home) -> Option<Pid> {
    let text = fs::read_to_string(home.pid_file()).ok()?;
    Pid::from_raw(text.lines().next()?.trim().parse().ok()?)
}

/// The processes `postgres` that work in `dir`; zombies work nowhere.
pub(super) fn postgres_in(dir: &Path) -> Vec<Pid> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.filter(|id| works_in(*id, dir)).filter_map(Pid::from_raw).collect()
}

fn works_in(id: i32, dir: &Path) -> bool {
    let process = Path::new("/proc").join(id.to_string());
    fs::read_link(process.join("cwd")).is_ok_and(|cwd| cwd == dir)
        && fs::read_to_string(process.join("comm")).is_ok_and(|name| name.trim() == "postgres")
}

/// Sends a signal; a process that has just ended needs none.
pub(super) fn send(pid: Pid, signal: Signal) {
    if let Err(e) = rustix::process::kill_process(pid, signal)
        && e != rustix::io::Errno::SRCH
    {
        warn!(%pid, ?signal, error = %e, "cannot signal PostgreSQL");
    }
}
