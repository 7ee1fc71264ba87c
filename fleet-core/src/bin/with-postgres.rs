//! Runs a command beside a private PostgreSQL: `with-postgres [--dir DIR] [--fsync] [--migrated] -- COMMAND ARGS…`
//!
//! The command finds the server in `MUSTER_TEST_DATABASE_URL`; with `--migrated` also a database with Muster's schema
//! in `DATABASE_URL`. Without `--dir` the cluster lives in a temporary directory, and `fsync` is off unless asked for.
//! Exits as the command did.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};

use fleet_core::clock::Clock;
use fleet_core::database;
use fleet_core::postgres::{Cluster, Tuning};
use fleet_core::testing;
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{Connection, Executor, PgConnection, PgPool};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

const USAGE: &str = "expected with-postgres [--dir DIR] [--fsync] [--migrated] -- COMMAND ARGS…";

/// Exit code for what is ours to answer for, not the command's.
const FAILED: u8 = 125;

type Failure = Box<dyn std::error::Error>;

#[derive(Debug, Default, PartialEq, Eq)]
struct Options {
    dir: Option<PathBuf>,
    fsync: bool,
    migrated: bool,
    command: Vec<String>,
}

impl Options {
    fn parse(mut args: impl Iterator<Item = String>) -> Option<Self> {
        let mut options = Self::default();
        loop {
            match args.next()?.as_str() {
                "--dir" => options.dir = Some(args.next()?.into()),
                "--fsync" => options.fsync = true,
                "--migrated" => options.migrated = true,
                "--" => break,
                _ => return None,
            }
        }
        options.command = args.collect();
        (!options.command.is_empty()).then_some(options)
    }
}

#[tokio::main]
async fn main() -> ExitCode {
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(FAILED);
    };
    match run(&options).await {
        Ok(code) => ExitCode::from(code),
        Err(e) => {
            eprintln!("with-postgres: {e}");
            ExitCode::from(FAILED)
        }
    }
}

async fn run(options: &Options) -> Result<u8, Failure> {
    let temporary = if options.dir.is_none() { Some(testing::private_dir()?) } else { None };
    let dir = options.dir.as_ref().or(temporary.as_ref()).ok_or("no directory")?;
    let tuning = Tuning { max_connections: testing::MAX_CONNECTIONS, durable: options.fsync };
    let cluster = Cluster::start(dir, "auto", tuning).await?;
    let outcome = beside(&cluster, options).await;
    cluster.stop().await;
    if let Some(dir) = temporary {
        std::fs::remove_dir_all(dir)?;
    }
    Ok(exit_code(outcome?))
}

async fn beside(cluster: &Cluster, options: &Options) -> Result<ExitStatus, Failure> {
    let mut command = Command::new(&options.command[0]);
    command.args(&options.command[1..]).env("MUSTER_TEST_DATABASE_URL", cluster.url("postgres"));
    if options.migrated {
        let url = cluster.url("muster");
        migrate(cluster, &url).await?;
        command.env("DATABASE_URL", url);
    }
    let mut terminated = signal(SignalKind::terminate())?;
    // Ctrl-C reaches the command as well: ours is to wait until it has ended.
    let mut _interrupted = signal(SignalKind::interrupt())?;
    let mut child = command.spawn().map_err(|e| format!("cannot run {}: {e}", options.command[0]))?;
    loop {
        tokio::select! {
            ended = child.wait() => return Ok(ended?),
            _ = terminated.recv() => terminate(&child),
        }
    }
}

async fn migrate(cluster: &Cluster, url: &str) -> Result<(), Failure> {
    let mut admin = PgConnection::connect_with(&cluster.options()).await?;
    admin.execute("drop database if exists muster").await?;
    admin.execute("create database muster").await?;
    admin.close().await?;
    let pool = PgPool::connect(url).await?;
    database::migrate(&pool).await?;
    database::first_tenant(&mut *pool.acquire().await?, &Clock::system()).await?;
    pool.close().await;
    Ok(())
}

fn terminate(child: &Child) {
    let pid = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
    if let Some(pid) = pid {
        let _ended_already = kill_process(pid, Signal::TERM);
    }
}

/// As a shell would say it.
fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().or(status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(FAILED)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_stands_after_two_dashes() {
        let parse = |args: &str| Options::parse(args.split_whitespace().map(str::to_owned));
        let given = parse("--dir /d --fsync -- psql --dir x").unwrap();
        assert_eq!(given.dir, Some("/d".into()));
        assert!(given.fsync && !given.migrated);
        assert_eq!(given.command, ["psql", "--dir", "x"]);
        for bad in ["", "psql", "--", "--dir -- psql", "--nosuch -- psql"] {
            assert_eq!(parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn it_exits_as_the_command_did() {
        assert_eq!(exit_code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(exit_code(ExitStatus::from_raw(9)), 137);
    }
}
