//! `muster index`: whether the index of log lines is what the rows make of it, and making it anew. The server goes on meanwhile.
//!
//! Exit codes: 0 every day is right · 1 a day differs, or the server could not be asked.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};

use crate::remote::{Remote, Server};

/// How often it is asked how far the work is.
const ASK_EVERY: Duration = Duration::from_millis(300);

/// What can be done with the index.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Compare days with the rows of the database, word by word; exits with 1 when one differs.
    Verify(Days),
    /// Make days anew from the rows of the database, and verify them. They are searched as they were until then.
    Rebuild(Days),
}

/// Which days, and where.
#[derive(clap::Args)]
pub(crate) struct Days {
    /// One day, 2026-11-22 or `other` (what is older than the oldest day); else all of them.
    day: Option<String>,
    #[command(flatten)]
    server: Server,
}

/// Does it, and tells of each day.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    let (task, Days { day, server }) = match command {
        Command::Verify(days) => ("verify", days),
        Command::Rebuild(days) => ("rebuild", days),
    };
    let remote = server.connect().await?;
    let began = remote.post(&format!("/index/{task}"), &json!({ "day": day })).await?;
    let is_right = watch(&remote, &began["job"]["started_at"]).await?;
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints each day as it is done; whether all were right.
async fn watch(remote: &Remote, started_at: &Value) -> anyhow::Result<bool> {
    let (mut told, mut is_right) = (0, true);
    loop {
        let job = remote.get("/index", &[]).await?["job"].take();
        if job["started_at"] != *started_at {
            anyhow::bail!("the server has ended or has begun other work meanwhile");
        }
        for found in job["done"].as_array().into_iter().flatten().skip(told) {
            println!("{}", line(found));
            is_right &= found["equal"] == true;
            told += 1;
        }
        if !job["finished_at"].is_null() {
            return Ok(is_right);
        }
        tokio::time::sleep(ASK_EVERY).await;
    }
}

fn line(found: &Value) -> String {
    let day = found["day"].as_str().unwrap_or_default();
    match (found["error"].as_str(), found["equal"] == true) {
        (Some(error), _) => format!("{day}: {error}"),
        (None, true) => format!("{day}: equal, {} lines", found["index_lines"]),
        (None, false) => {
            format!(
                "{day}: differs, {} lines in the index, {} in the database",
                found["index_lines"], found["table_lines"]
            )
        }
    }
}
