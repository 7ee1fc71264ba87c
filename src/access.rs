//! `muster access`: who may do what and why, and what a change of access would give and take.
//!
//! Exit codes of `check`: 0 allowed · 1 denied, or the server could not be asked.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Subcommand;
use serde_json::{Value, json};

use crate::remote::Server;

/// What can be asked.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Ask whether somebody may do something, and what decides; exits with 0 when it is allowed, with 1 when it is not.
    Check {
        /// Who: a user (`usr_…` or an e-mail address), an API key (`key_…`), or a device (its id).
        principal: String,
        /// What: a permission such as telemetry:read, or publish, subscribe, receive.
        action: String,
        /// On what: a device, or a topic or filter.
        resource: Option<String>,
        /// Print the answer as JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: Server,
    },
    /// Ask what a change would give and take before it is made.
    Diff {
        /// A file with the change in JSON, `-` for standard input: one of `role` (id, permissions,
        /// `topic_rules`), `binding` (user, role, scope), `unbind` (the id of a binding), `user` (id, role).
        change: PathBuf,
        /// Print the answer as JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: Server,
    },
}

/// Asks.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Check { principal, action, resource, json, server } => {
            let question = json!({ "principal": principal, "action": action, "resource": resource });
            let answer = server.connect().await?.post("/access/check", &question).await?;
            println!("{}", if json { answer.to_string() } else { decision(&answer) });
            Ok(if answer["allowed"] == true { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
        Command::Diff { change, json, server } => {
            let change = read(&change)?;
            let answer = server.connect().await?.post("/access/diff", &change).await?;
            println!("{}", if json { answer.to_string() } else { difference(&answer) });
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn read(file: &PathBuf) -> anyhow::Result<Value> {
    let text = if file.as_os_str() == "-" {
        let mut text = String::new();
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(file)
    };
    let text = text.with_context(|| format!("{} cannot be read", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is not JSON", file.display()))
}

fn decision(answer: &Value) -> String {
    let said = format!("{}: {}", text(&answer["decision"]), text(&answer["reason"]));
    let by = &answer["decided_by"];
    if !by.is_object() {
        return said;
    }
    let source = by["binding"].as_str().or(by["api_key"].as_str()).or(by["source"].as_str()).unwrap_or_default();
    let rule = &by["rule"];
    let rule = ["effect", "action", "filter"].map(|part| text(&rule[part])).join(" ");
    format!(
        "{said}\nrole {} by {source}{}{}",
        text(&by["role"]),
        if rule.trim().is_empty() { "" } else { ", rule " },
        rule.trim()
    )
}

fn difference(answer: &Value) -> String {
    let items = answer["items"].as_array().map(Vec::as_slice).unwrap_or_default();
    let mut lines = Vec::new();
    for item in items {
        let whom = item["api_key"].as_str().or(item["user"].as_str()).unwrap_or("whoever will have the role");
        lines.push(whom.to_owned());
        for kind in ["permissions", "routes", "topics"] {
            for (sign, side) in [('+', "gained"), ('-', "lost")] {
                let some = item[kind][side].as_array().into_iter().flatten();
                lines.extend(some.map(|one| format!("  {sign} {}", text(one))));
            }
        }
        for (permission, delta) in item["devices"].as_object().into_iter().flatten() {
            for (sign, side) in [('+', "gained"), ('-', "lost")] {
                let sample = delta[side]["sample"].as_array().into_iter().flatten().map(text).collect::<Vec<_>>();
                if !sample.is_empty() {
                    let count = &delta[side]["count"];
                    lines.push(format!("  {sign} {permission} for {count} devices: {}", sample.join(", ")));
                }
            }
        }
    }
    if lines.is_empty() {
        lines.push("nobody's rights would change".to_owned());
    }
    if answer["more"] == true {
        lines.push(format!("only {} users and API keys were compared; there are more", answer["compared"]));
    }
    lines.join("\n")
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}
