//! `muster logs`: what devices log, in the terminal.
//!
//! Exit codes: 0 found, or followed until Ctrl-C · 1 the server could not be asked, or refused.

mod events;
mod print;

use std::io::{IsTerminal as _, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use reqwest::StatusCode;
use serde_json::Value;

use self::events::{Event, Events};
use self::print::Style;
use crate::remote::{Refused, Remote, Server};

/// Lines of one page.
const PAGE: usize = 1000;
/// Pause before a tail is taken up again.
const AGAIN: Duration = Duration::from_secs(1);
/// A tail in which nothing happens for so long, not even a sign of life, is given up.
const SILENCE: Duration = Duration::from_mins(1);

/// What `muster logs` takes.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Which lines, in the query language: level:>=warn AND device:pump-* AND "no carrier". Left out: all of them.
    query: Vec<String>,
    /// Go on with lines as they are written.
    #[arg(short, long, conflicts_with_all = ["from", "to", "limit"])]
    follow: bool,
    /// From this time on: RFC 3339, a day, or such as now-1h.
    #[arg(long)]
    from: Option<String>,
    /// Before this time.
    #[arg(long)]
    to: Option<String>,
    /// The newest so many.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    limit: u32,
    /// Print each line as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    server: Server,
}

/// Asks.
pub(crate) async fn run(args: Args) -> anyhow::Result<ExitCode> {
    let style = match args.json {
        true => Style::Json,
        false if std::io::stdout().is_terminal() => Style::Coloured,
        false => Style::Plain,
    };
    let query = args.query.join(" ");
    if args.follow { follow(&args.server, &query, style).await } else { search(&args, &query, style).await }
}

/// The newest lines, the oldest of them first.
async fn search(args: &Args, query: &str, style: Style) -> anyhow::Result<ExitCode> {
    let remote = args.server.connect().await?;
    let most = usize::try_from(args.limit)?;
    let (mut lines, mut cursor, mut is_complete) = (Vec::new(), None, true);
    while lines.len() < most {
        let limit = (most - lines.len()).min(PAGE).to_string();
        let given = [("from", args.from.as_deref()), ("to", args.to.as_deref()), ("cursor", cursor.as_deref())];
        let asked = [("q", query), ("limit", &limit)].into_iter();
        let asked = asked.chain(given.into_iter().filter_map(|(name, value)| Some((name, value?)))).collect::<Vec<_>>();
        let mut page = remote.get("/logs/search", &asked).await?;
        is_complete &= page["complete"] != false;
        if let Value::Array(items) = page["items"].take() {
            lines.extend(items);
        }
        cursor = page["next_cursor"].as_str().map(str::to_owned);
        if cursor.is_none() {
            break;
        }
    }
    for line in lines.iter().rev() {
        put(line, style)?;
    }
    if !is_complete {
        eprintln!("muster: the index is not complete at the moment: there may be more");
    }
    Ok(ExitCode::SUCCESS)
}

/// Lines as they are written. A connection that breaks is taken up again where it ended; a token that ends is renewed by
/// another login, if there is a password.
async fn follow(server: &Server, query: &str, style: Style) -> anyhow::Result<ExitCode> {
    let mut remote = server.connect().await?;
    let mut at = String::new();
    loop {
        let ended = tail(&remote, query, &mut at, style).await;
        match ended {
            Ok(Ended::Stdout) => return Ok(ExitCode::SUCCESS),
            Ok(Ended::By(reason)) => eprintln!("muster: the tail has ended: {reason}"),
            Err(error) => match error.downcast_ref::<Refused>() {
                Some(refused) if !refused.may_pass() => return Err(error),
                _ => eprintln!("muster: {}: trying again", crate::exit::one_line(&error)),
            },
        }
        loop {
            tokio::time::sleep(AGAIN).await;
            match server.connect().await {
                Ok(connected) => break remote = connected,
                Err(error) => match error.downcast_ref::<Refused>() {
                    Some(refused) if !refused.may_pass() => return Err(error),
                    _ => {}
                },
            }
        }
    }
}

/// How a tail ends that did not break.
enum Ended {
    /// The server has ended it, and says why.
    By(String),
    /// Nobody reads what is printed.
    Stdout,
}

async fn tail(remote: &Remote, query: &str, at: &mut String, style: Style) -> anyhow::Result<Ended> {
    let answer = remote.open("/logs/tail", &[("q", query)], at).await?;
    let mut events = Events::new(answer);
    loop {
        let Ok(event) = tokio::time::timeout(SILENCE, events.next()).await else {
            bail!("nothing was heard for a minute")
        };
        let Some(Event { name, id, data }) = event? else { bail!("the connection has ended") };
        match name.as_str() {
            "line" if put(&data, style).is_err() => return Ok(Ended::Stdout),
            "gap" => eprintln!("muster: {}", print::gap(&data)),
            "end" => return Ok(Ended::By(data["reason"].as_str().unwrap_or("no reason was given").to_owned())),
            _ => {}
        }
        // Only now it is done with.
        if let Some(id) = id {
            *at = id;
        }
    }
}

fn put(line: &Value, style: Style) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", print::line(line, style))?;
    out.flush()
}

impl Refused {
    /// Whether the same request may be answered later.
    fn may_pass(&self) -> bool {
        self.status.is_server_error() || self.status == StatusCode::TOO_MANY_REQUESTS
    }
}
