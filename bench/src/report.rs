//! The section of `docs/benchmarks.md` between two markers: machine, command, every round, medians, targets.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use chrono::{DateTime, Utc};

use crate::broker::{self, ms};
use crate::logs::{Figure, Wanted};
use crate::scenes::{Found, KINDS, What};
use crate::server::Kind;
use crate::writers;

const BEGIN: &str = "<!-- bench:begin, written by `make bench` -->";
const END: &str = "<!-- bench:end -->";
const HEAD: &str = "# Benchmarks\n\nMeasured by `make bench`, which writes the section below.\n\n";

/// Share of mosquitto's in-memory rate that Muster, durable, is to reach.
const RATE_TARGET: f64 = 0.5;
/// Share of `\copy` that the write path is to reach.
const WRITERS_TARGET: f64 = 0.25;
/// Of a connection with a subscription, under the load of readings.
const CONNECTION_TARGET_KIB: f64 = 8.0;
/// Of a clean connection that does nothing.
const IDLE_TARGET_KIB: f64 = 6.0;
const P99_TARGET: Duration = Duration::from_millis(50);

/// Everything that was measured.
#[derive(Default)]
pub(crate) struct Findings {
    pub(crate) command: String,
    pub(crate) load_before: String,
    pub(crate) took: Duration,
    pub(crate) broker: Vec<broker::Round>,
    pub(crate) scenes: Found,
    pub(crate) writers: Vec<writers::Round>,
    pub(crate) logs: Vec<Figure>,
}

/// Puts the section into the file, between its markers; the rest of the file stays.
pub(crate) fn write(path: &Path, findings: &Findings) -> anyhow::Result<()> {
    let old = fs::read_to_string(path).unwrap_or_else(|_| format!("{HEAD}{BEGIN}\n{END}\n"));
    let new = replaced(&old, &section(findings)).with_context(|| format!("{} lacks its markers", path.display()))?;
    fs::write(path, new)?;
    Ok(())
}

fn replaced(old: &str, section: &str) -> Option<String> {
    let (head, rest) = old.split_once(BEGIN)?;
    let (_, tail) = rest.split_once(END)?;
    Some(format!("{head}{BEGIN}\n{section}\n{END}{tail}"))
}

/// The whole section as Markdown.
pub(crate) fn section(findings: &Findings) -> String {
    let parts = [
        machine(findings),
        targets(findings),
        broker_medians(&findings.broker),
        broker_rounds(&findings.broker),
        scene_medians(&findings.scenes),
        writer_rounds(&findings.writers),
        log_figures(&findings.logs),
        profile(&findings.broker),
    ];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("\n")
}

fn machine(findings: &Findings) -> String {
    let file = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, name: &str| {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_default().to_owned();
        line.split_once(':').map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
    };
    let cpu = field(&file("/proc/cpuinfo"), "model name");
    let memory = field(&file("/proc/meminfo"), "MemTotal");
    let gib = memory.split(' ').next().and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0) / 1024.0 / 1024.0;
    let kernel = file("/proc/sys/kernel/osrelease").trim().to_owned();
    let cores = std::thread::available_parallelism().map_or(0, std::num::NonZero::get);
    let date = DateTime::<Utc>::from(SystemTime::now()).format("%Y-%m-%d %H:%M UTC");
    let mosquitto = said("/usr/sbin/mosquitto", &["-h"]).or_else(|| said("mosquitto", &["-h"]));
    let versions = [mosquitto, said("psql", &["--version"])].into_iter().flatten().collect::<Vec<_>>().join("; ");
    format!(
        "- machine: {cores} cores of {cpu}, {gib:.0} GiB, Linux {kernel}; load average before: {}\n\
         - servers, PostgreSQL and load generator share these cores; everything on loopback; {versions}\n\
         - {date}, commit {}, `{}`, {:.0} s in all\n",
        findings.load_before,
        commit().unwrap_or_else(|| "unknown".into()),
        findings.command,
        findings.took.as_secs_f64(),
    )
}

/// The first line a program says, if it is there.
fn said(program: &str, args: &[&str]) -> Option<String> {
    let out = Command::new(program).args(args).output().ok()?;
    String::from_utf8_lossy(&out.stdout).lines().next().map(str::to_owned).filter(|line| !line.is_empty())
}

fn commit() -> Option<String> {
    let commit = said("git", &["rev-parse", "--short", "HEAD"])?;
    let dirty = said("git", &["status", "--porcelain", "--untracked-files=no"]).is_some();
    Some(if dirty { format!("{commit} with local changes") } else { commit })
}

/// Each promise of the numbers, with what was found.
fn targets(findings: &Findings) -> String {
    let mut rows = Vec::new();
    for clients in client_counts(&findings.broker) {
        let of = |kind| Median::of(&findings.broker, kind, clients);
        let Some(muster) = of(Kind::Muster) else { continue };
        if let Some(mosquitto) = of(Kind::Mosquitto) {
            let ratio = muster.per_s / mosquitto.per_s;
            let found = format!("{ratio:.2} ({:.0} of {:.0} msg/s)", muster.per_s, mosquitto.per_s);
            rows.push((
                format!("durable rate ÷ mosquitto in memory, {clients} clients"),
                "≥ 0.50",
                found,
                ratio >= RATE_TARGET,
            ));
            let (ours, theirs) = (muster.broker_us + muster.postgres_us, mosquitto.broker_us);
            let found = format!("{ours:.1} µs, mosquitto {theirs:.1} µs");
            let what = format!("processor time of an acknowledged message, PostgreSQL included, {clients} clients");
            rows.push((what, "≤ mosquitto", found, ours <= theirs));
        }
        let kib = muster.kib_per_connection;
        let held = kib <= CONNECTION_TARGET_KIB;
        rows.push((
            format!("memory of an idle, subscribed connection, {clients} clients"),
            "≤ 8 KiB",
            format!("{kib:.1} KiB"),
            held,
        ));
        let p99 = muster.p99_ms;
        let held = p99 <= ms(P99_TARGET);
        let found = format!("{p99:.1} ms at {:.0} msg/s", muster.open_rate);
        rows.push((format!("p99 of an acknowledgement at half the rate, {clients} clients"), "≤ 50 ms", found, held));
    }
    rows.extend(scene_targets(&findings.scenes));
    if !findings.writers.is_empty() {
        let (writers, copy) = (median_of(&findings.writers, |r| r.writers), median_of(&findings.writers, |r| r.copy));
        let ratio = writers / copy;
        let found = format!("{ratio:.2} ({writers:.0} of {copy:.0} rows/s)");
        rows.push(("write path ÷ psql `\\copy`".into(), "≥ 0.25", found, ratio >= WRITERS_TARGET));
    }
    if rows.is_empty() {
        return String::new();
    }
    let mut out = "### Targets\n\n| target | wanted | found (median) | |\n|---|---|---|---|\n".to_owned();
    for (what, wanted, found, held) in rows {
        line(&mut out, format_args!("| {what} | {wanted} | {found} | {} |", if held { "met" } else { "**missed**" }));
    }
    out
}

type Target = (String, &'static str, String, bool);

fn scene_targets(found: &Found) -> Vec<Target> {
    let mut rows = Vec::new();
    let both = |what| Some((scene_median(found, Kind::Muster, what)?, scene_median(found, Kind::Mosquitto, what)?));
    if let Some((ours, theirs)) = both(What::Ramp) {
        let what = format!("ramp of {} connections, each authenticated", found.shape.connections);
        rows.push((what, "≤ mosquitto", format!("{ours:.2} s, mosquitto {theirs:.2} s"), ours <= theirs));
    }
    if let Some((ours, _)) = both(What::Connection) {
        let what = "memory of an idle clean connection".to_owned();
        rows.push((what, "≤ 6 KiB", format!("{ours:.1} KiB"), ours <= IDLE_TARGET_KIB));
    }
    rows
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("a String takes any text");
}

fn client_counts(rounds: &[broker::Round]) -> Vec<usize> {
    let mut counts: Vec<_> = rounds.iter().map(|round| round.clients).collect();
    counts.dedup();
    counts
}

/// Medians of the rounds of one server under one number of clients.
struct Median {
    per_s: f64,
    broker_us: f64,
    postgres_us: f64,
    generator_us: f64,
    kib_per_connection: f64,
    /// p50 and p99 at the rate that is the same for all.
    common_ms: Option<(f64, f64)>,
    open_rate: f64,
    p50_ms: f64,
    p99_ms: f64,
    ramp_s: f64,
}

impl Median {
    fn of(rounds: &[broker::Round], kind: Kind, clients: usize) -> Option<Self> {
        let rounds: Vec<_> = rounds.iter().filter(|r| r.kind == kind && r.clients == clients).cloned().collect();
        (!rounds.is_empty()).then(|| Self {
            per_s: median_of(&rounds, |r| r.per_s),
            broker_us: median_of(&rounds, |r| r.broker_us),
            postgres_us: median_of(&rounds, |r| r.postgres_us),
            generator_us: median_of(&rounds, |r| r.generator_us),
            kib_per_connection: median_of(&rounds, |r| r.kib_per_connection),
            common_ms: common_ms(&rounds),
            open_rate: median_of(&rounds, |r| r.open_rate),
            p50_ms: median_of(&rounds, |r| ms(r.p50)),
            p99_ms: median_of(&rounds, |r| ms(r.p99)),
            ramp_s: median_of(&rounds, |r| r.ramp.as_secs_f64()),
        })
    }
}

/// A latency in ms; a server that lost its clients in the closed loop has none.
fn shown(latency: Duration) -> String {
    if latency.is_zero() || latency == Duration::MAX { "–".to_owned() } else { format!("{:.1}", ms(latency)) }
}

fn common_ms(rounds: &[broker::Round]) -> Option<(f64, f64)> {
    let common: Vec<_> = rounds.iter().filter_map(|r| r.at_common_rate).collect();
    (!common.is_empty()).then(|| (median_of(&common, |(p50, _)| ms(*p50)), median_of(&common, |(_, p99)| ms(*p99))))
}

fn median_of<T>(of: &[T], value: impl Fn(&T) -> f64) -> f64 {
    let mut values: Vec<_> = of.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}

fn broker_medians(rounds: &[broker::Round]) -> String {
    if rounds.is_empty() {
        return String::new();
    }
    let mut out = "### Acknowledged messages, medians\n\n\
        200-byte QoS 1 publishes, at most 5 unacknowledged a client, every client subscribed to its own commands. Processor \
        time is user + system, in µs a message. Latency is that of an open loop, counted from the moment the message was \
        due: at 20,000 messages a second for all, and at half the server's own rate. The closed loop sends five messages \
        with one call, the open loop one.\n\n\
        | clients | server | msg/s | ÷ mosquitto | broker µs | PostgreSQL µs | together | generator µs | KiB/idle connection | p50 / p99 ms at 20,000/s | at half: msg/s | p50 ms | p99 ms | ramp s |\n\
        |---|---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for clients in client_counts(rounds) {
        let reference = Median::of(rounds, Kind::Mosquitto, clients).map(|m| m.per_s);
        for kind in Kind::ALL {
            let Some(m) = Median::of(rounds, kind, clients) else { continue };
            let ratio = reference.map_or_else(|| "–".to_owned(), |r| format!("{:.2}", m.per_s / r));
            let together = m.broker_us + m.postgres_us;
            let common = m.common_ms.map_or_else(|| "–".to_owned(), |(p50, p99)| format!("{p50:.1} / {p99:.1}"));
            line(
                &mut out,
                format_args!(
                    "| {clients} | {} | {:.0} | {ratio} | {:.1} | {:.1} | {together:.1} | {:.1} | {:.1} | {common} | {:.0} | {:.1} | {:.1} | {:.1} |",
                    kind.name(),
                    m.per_s,
                    m.broker_us,
                    m.postgres_us,
                    m.generator_us,
                    m.kib_per_connection,
                    m.open_rate,
                    m.p50_ms,
                    m.p99_ms,
                    m.ramp_s
                ),
            );
        }
    }
    out
}

fn broker_rounds(rounds: &[broker::Round]) -> String {
    if rounds.is_empty() {
        return String::new();
    }
    let mut out = "<details><summary>Every round, in the order they ran</summary>\n\n\
        | clients | server | msg/s | broker µs | PostgreSQL µs | KiB/connection | open loop msg/s | p50 ms | p99 ms | not sent | ramp s | clients failed |\n\
        |---|---|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    for r in rounds {
        line(
            &mut out,
            format_args!(
                "| {} | {} | {:.0} | {:.1} | {:.1} | {:.1} | {:.0} | {} | {} | {} | {:.1} | {} |",
                r.clients,
                r.kind.name(),
                r.per_s,
                r.broker_us,
                r.postgres_us,
                r.kib_per_connection,
                r.open_rate,
                shown(r.p50),
                shown(r.p99),
                r.overrun,
                r.ramp.as_secs_f64(),
                r.failed
            ),
        );
    }
    out + "\n</details>\n"
}

fn of_scene(found: &Found, kind: Kind, what: What) -> Vec<f64> {
    found.samples.iter().filter(|s| (s.kind, s.what) == (kind, what)).map(|s| s.value).collect()
}

fn scene_median(found: &Found, kind: Kind, what: What) -> Option<f64> {
    let values = of_scene(found, kind, what);
    (!values.is_empty()).then(|| median_of(&values, |value| *value))
}

fn figure(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

fn scene_medians(found: &Found) -> String {
    if found.samples.is_empty() {
        return String::new();
    }
    let mut out = "### Connections, sessions, deliveries: medians, and every round\n\n\
        Servers as shipped. Muster authenticates every CONNECT against its database, mosquitto lets anybody in. Memory is that of \
        the broker's process, grown since its start; processor time is that of the broker and its PostgreSQL. In fan-out and \
        shared subscription the next message is published when enough have arrived, so that no server drops any.\n\n\
        | | Muster | mosquitto | Muster ÷ mosquitto | rounds: Muster · mosquitto |\n|---|---|---|---|---|\n"
        .to_owned();
    for what in What::ALL {
        let medians = KINDS.map(|kind| scene_median(found, kind, what));
        if medians == [None, None] {
            continue;
        }
        let [ours, theirs] = medians.map(|median| median.map_or_else(|| "–".to_owned(), figure));
        let ratio = match medians {
            [Some(ours), Some(theirs)] if theirs > 0.0 => format!("{:.2}", ours / theirs),
            _ => "–".to_owned(),
        };
        let rounds =
            KINDS.map(|kind| of_scene(found, kind, what).into_iter().map(figure).collect::<Vec<_>>().join(" "));
        let text = what.text(&found.shape);
        line(&mut out, format_args!("| {text} | {ours} | {theirs} | {ratio} | {} |", rounds.join(" · ")));
    }
    out
}

fn writer_rounds(rounds: &[writers::Round]) -> String {
    let Some(rows) = rounds.first().map(|round| round.rows) else { return String::new() };
    let mut out = format!(
        "### Committed rows a second\n\n\
         {rows} messages of 200 bytes a round. *Write path*: decode, shape, `insert … on conflict do nothing` into the \
         partitioned, keyed table, {} connections, {} messages a commit. *`\\copy`*: psql, one connection, one transaction, \
         the same rows ready-made, into a table without key and partitions, and into the server's table.\n\n\
         | write path | `\\copy`, plain | ratio | `\\copy`, keyed | ratio |\n|---|---|---|---|---|\n",
        writers::WRITERS,
        writers::BATCH
    );
    for r in rounds {
        line(
            &mut out,
            format_args!(
                "| {:.0} | {:.0} | {:.2} | {:.0} | {:.2} |",
                r.writers,
                r.copy,
                r.writers / r.copy,
                r.copy_keyed,
                r.writers / r.copy_keyed
            ),
        );
    }
    out
}

fn log_figures(figures: &[Figure]) -> String {
    if figures.is_empty() {
        return String::new();
    }
    let mut out = "### Log lines, beside PostgreSQL's full text search\n\n\
        The same rows on one cluster; 10,000 devices, lines of some 55 bytes with a level, a target and two fields, spread over a day. \
        PostgreSQL has a stored `tsvector` (`simple`) under GIN, and B-trees on `ts` and `(level, ts)`; both are warm, times are medians.\n\n\
        | | Muster | PostgreSQL | Muster ÷ PostgreSQL | wanted | |\n|---|---|---|---|---|---|\n"
        .to_owned();
    for Figure { what, ours, theirs, wanted } in figures {
        let ratio = theirs.map_or_else(|| "–".to_owned(), |theirs| format!("{:.3}", ours / theirs));
        let held = wanted.map_or("", |wanted| if wanted.holds(*ours, *theirs) { "met" } else { "**missed**" });
        let wanted = match wanted {
            None => String::new(),
            Some(Wanted::TimesTheirs(times)) => format!("≥ {times} ×"),
            Some(Wanted::ShareOfTheirs(share)) => format!("≤ {share} ×"),
            Some(Wanted::AtMost(most)) => format!("≤ {most}"),
        };
        let theirs = theirs.map_or_else(|| "–".to_owned(), figure);
        line(&mut out, format_args!("| {what} | {} | {theirs} | {ratio} | {wanted} | {held} |", figure(*ours)));
    }
    out
}

/// Where the time of Muster goes: the writers' own counters during the closed loops.
fn profile(rounds: &[broker::Round]) -> String {
    let mut out = String::new();
    for clients in client_counts(rounds) {
        let Some(round) = rounds.iter().rfind(|r| r.kind == Kind::Muster && r.clients == clients) else { continue };
        let messages = round.writers.iter().map(|(name, grown)| format!("`{name}` +{grown:.1}"));
        let all = messages.collect::<Vec<_>>().join(", ");
        if !all.is_empty() {
            line(&mut out, format_args!("- {clients} clients, last round, growth during the closed loop: {all}"));
        }
    }
    if out.is_empty() { out } else { format!("### The writers' own counters\n\n{out}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::Sample;

    #[test]
    fn only_what_is_between_the_markers_changes() {
        let old = format!("before\n{BEGIN}\nold\n{END}\nafter\n");
        assert_eq!(replaced(&old, "new").unwrap(), format!("before\n{BEGIN}\nnew\n{END}\nafter\n"));
        assert_eq!(replaced("no markers", "new"), None);
    }

    #[test]
    fn a_missed_target_is_called_missed() {
        let round = |kind, per_s| broker::Round {
            kind,
            clients: 10,
            failed: 0,
            ramp: Duration::ZERO,
            kib_per_connection: 9.0,
            per_s,
            broker_us: 1.0,
            postgres_us: 0.0,
            generator_us: 1.0,
            at_common_rate: None,
            open_rate: 5.0,
            p50: Duration::from_millis(1),
            p99: Duration::from_millis(2),
            overrun: 0,
            writers: Vec::new(),
        };
        let broker = vec![round(Kind::Muster, 60.0), round(Kind::Mosquitto, 100.0), round(Kind::Muster, 40.0)];
        let writers = vec![writers::Round { rows: 8, writers: 20.0, copy: 100.0, copy_keyed: 50.0 }];
        let sample = |kind, what, value| Sample { kind, what, value };
        let samples = vec![
            sample(Kind::Muster, What::Ramp, 2.0),
            sample(Kind::Mosquitto, What::Ramp, 1.0),
            sample(Kind::Muster, What::Connection, 5.0),
            sample(Kind::Mosquitto, What::Connection, 3.0),
        ];
        let scenes = Found { samples, ..Found::default() };
        let findings = Findings { broker, scenes, writers, ..Findings::default() };
        let table = targets(&findings);
        let held = |what: &str| !table.lines().find(|line| line.contains(what)).unwrap().contains("missed");
        assert!(held("durable rate") && held("p99"), "{table}");
        assert!(!held("memory of an idle, subscribed") && !held("write path") && !held("ramp of"), "{table}");
        assert!(held("memory of an idle clean") && held("processor time"), "{table}");
        let medians = scene_medians(&findings.scenes);
        assert!(medians.contains("| 2.00 | 1.00 | 2.00 | 2.00 · 1.00 |"), "{medians}");
    }
}
