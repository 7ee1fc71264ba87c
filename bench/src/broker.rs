//! Messages a second, processor time a message, memory a connection, latency of acknowledgements: alternating rounds of
//! three servers under the same load.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use device_sim::Access;
use device_sim::rest::Client as Rest;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::time::sleep;

use crate::generator::{self, Identity, Load};
use crate::process;
use crate::server::{EMAIL, Kind, PASSWORD, Server};

const ENROLLING: usize = 16;
/// Idle connections settle before memory is read.
const SETTLE: Duration = Duration::from_secs(1);
const WARM_UP: Duration = Duration::from_secs(2);

/// What to measure.
pub(crate) struct Plan {
    pub(crate) muster: PathBuf,
    pub(crate) kinds: Vec<Kind>,
    pub(crate) clients: Vec<usize>,
    pub(crate) rounds: usize,
    /// Of the closed loop.
    pub(crate) load: Duration,
    /// Of the open loop.
    pub(crate) latency: Duration,
}

/// Messages a second at which all servers' latencies are compared.
pub(crate) const COMMON_RATE: f64 = 20_000.0;

/// One server under one number of clients, once.
#[derive(Debug, Clone)]
pub(crate) struct Round {
    pub(crate) kind: Kind,
    pub(crate) clients: usize,
    pub(crate) failed: usize,
    pub(crate) ramp: Duration,
    pub(crate) kib_per_connection: f64,
    pub(crate) per_s: f64,
    pub(crate) broker_us: f64,
    pub(crate) postgres_us: f64,
    pub(crate) generator_us: f64,
    /// p50 and p99 at [`COMMON_RATE`], the same for all; `None` for a server that cannot keep it up.
    pub(crate) at_common_rate: Option<(Duration, Duration)>,
    /// Half the server's own rate.
    pub(crate) open_rate: f64,
    pub(crate) p50: Duration,
    pub(crate) p99: Duration,
    /// Publishes not sent in the open loop because a client had too many on their way.
    pub(crate) overrun: u64,
    /// How the counters of the writers moved during the closed loop.
    pub(crate) writers: Vec<(String, f64)>,
}

/// All rounds, in the order they were run.
pub(crate) async fn run(plan: &Plan, dir: &Path) -> anyhow::Result<Vec<Round>> {
    let most = plan.clients.iter().copied().max().context("no number of clients")?;
    let identities = identities(&plan.muster, &plan.kinds, dir, most).await?;
    let mut rounds = Vec::new();
    for &clients in &plan.clients {
        for number in 1..=plan.rounds {
            for &kind in &plan.kinds {
                let round = round(plan, dir, kind, &identities[..clients]).await;
                let round = round.with_context(|| format!("{kind:?}, {clients} clients, round {number}"))?;
                eprintln!("{}", line(number, &round));
                rounds.push(round);
            }
        }
    }
    Ok(rounds)
}

/// What a round found, for somebody who waits.
fn line(number: usize, round: &Round) -> String {
    format!(
        "{:<20} {:>6} clients, round {number}: {:>7.0} msg/s, {:>6.1} us ({:.1} broker + {:.1} PostgreSQL, generator {:.1}), \
         {:>5.1} KiB/connection, p50 {:.1} ms, p99 {:.1} ms at {:.0}/s (p99 {:.1} ms at {COMMON_RATE:.0}/s), ramp {:.1} s, {} failed, {} overrun",
        round.kind.name(),
        round.clients,
        round.per_s,
        round.broker_us + round.postgres_us,
        round.broker_us,
        round.postgres_us,
        round.generator_us,
        round.kib_per_connection,
        ms(round.p50),
        ms(round.p99),
        round.open_rate,
        round.at_common_rate.map_or(f64::NAN, |(_, p99)| ms(p99)),
        round.ramp.as_secs_f64(),
        round.failed,
        round.overrun,
    )
}

/// A duration in milliseconds.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Devices of Muster are enrolled once, before anything is timed; the other servers take any name.
pub(crate) async fn identities(
    muster: &Path,
    kinds: &[Kind],
    dir: &Path,
    count: usize,
) -> anyhow::Result<Vec<Identity>> {
    let name = |index: usize| format!("bench-{index}");
    if !kinds.contains(&Kind::Muster) {
        let anybody = |index| Identity { id: name(index), username: "main/anybody".into(), password: "x".repeat(43) };
        return Ok((0..count).map(anybody).collect());
    }
    let started = Instant::now();
    let server = Server::start(Kind::Muster, dir, muster).await?;
    let url = server.url.clone().context("Muster has a URL")?;
    let access = Access::Password { email: EMAIL.into(), password: PASSWORD.into() };
    let rest = Rest::connect(&url, access).await?;
    let rest = &rest;
    let enrolled = stream::iter((0..count).map(name)).map(|id| async move {
        let credential = rest.enrol(&id).await?;
        anyhow::Ok(Identity { id, username: credential.username, password: credential.password })
    });
    let identities = enrolled.buffered(ENROLLING).try_collect().await?;
    server.stop().await?;
    eprintln!("{count} devices enrolled in {:.1} s", started.elapsed().as_secs_f64());
    Ok(identities)
}

async fn round(plan: &Plan, dir: &Path, kind: Kind, identities: &[Identity]) -> anyhow::Result<Round> {
    let server = Server::start(kind, dir, &plan.muster).await?;
    let before = process::rss(server.pid);
    let ramp = generator::connect(server.mqtt, identities).await;
    if ramp.clients.is_empty() {
        bail!("no client could connect");
    }
    sleep(SETTLE).await;
    let grown = process::rss(server.pid).saturating_sub(before);
    let kib_per_connection = grown as f64 / 1024.0 / ramp.clients.len() as f64;

    let load = Load::closed(ramp.clients);
    sleep(WARM_UP).await;
    let metrics = server.metrics().await;
    let from = Snapshot::take(&server, &load);
    sleep(plan.load).await;
    let to = Snapshot::take(&server, &load);
    let writers = writers(metrics.as_deref(), server.metrics().await.as_deref());
    let clients = load.stop().await;
    let messages = (to.acknowledged - from.acknowledged) as f64;
    let per_s = messages / to.at.duration_since(from.at).as_secs_f64();
    let us = |from: Duration, to: Duration| (to.saturating_sub(from)).as_secs_f64() * 1e6 / messages.max(1.0);

    let open_rate = (per_s / 2.0).max(1.0);
    let (at_common_rate, clients) = if per_s > COMMON_RATE {
        let (p50, p99, _, clients) = open(clients, COMMON_RATE, plan.latency).await;
        (Some((p50, p99)), clients)
    } else {
        (None, clients)
    };
    let (p50, p99, overrun, _) = open(clients, open_rate, plan.latency).await;
    server.stop().await?;
    Ok(Round {
        kind,
        clients: identities.len(),
        failed: ramp.failed,
        ramp: ramp.took,
        kib_per_connection,
        per_s,
        broker_us: us(from.broker, to.broker),
        postgres_us: us(from.postgres, to.postgres),
        generator_us: us(from.generator, to.generator),
        at_common_rate,
        open_rate,
        p50,
        p99,
        overrun,
        writers,
    })
}

/// Latency at a steady rate. Clients that a closed loop overwhelmed are gone; with none left there is no latency.
async fn open(
    clients: Vec<generator::Client>,
    rate: f64,
    duration: Duration,
) -> (Duration, Duration, u64, Vec<generator::Client>) {
    if clients.is_empty() {
        return (Duration::MAX, Duration::MAX, 0, clients);
    }
    let load = Load::open(clients, rate);
    sleep(duration).await;
    let latency = load.latency().clone();
    let overrun = load.overrun();
    let clients = load.stop().await;
    (latency.percentile(0.5), latency.percentile(0.99), overrun, clients)
}

struct Snapshot {
    at: Instant,
    acknowledged: u64,
    broker: Duration,
    postgres: Duration,
    generator: Duration,
}

impl Snapshot {
    fn take(server: &Server, load: &Load) -> Self {
        let (broker, postgres) = server.cpu();
        Self {
            at: Instant::now(),
            acknowledged: load.acknowledged(),
            broker,
            postgres,
            generator: process::cpu(std::process::id()),
        }
    }
}

/// By how much each counter of the writers grew; sums and counts of histograms included, buckets not.
fn writers(before: Option<&str>, after: Option<&str>) -> Vec<(String, f64)> {
    let (before, after) = (counters(before.unwrap_or_default()), counters(after.unwrap_or_default()));
    let grown = after.into_iter().filter_map(|(name, value)| {
        let old = before.iter().find(|(other, _)| *other == name).map_or(0.0, |(_, old)| *old);
        (value > old).then_some((name, value - old))
    });
    grown.collect()
}

/// Metrics of the ingest path, without labels.
fn counters(text: &str) -> Vec<(String, f64)> {
    let mut totals: Vec<(String, f64)> = Vec::new();
    for line in text.lines().filter(|line| line.starts_with("muster_ingest_")) {
        let Some((name, value)) = line.rsplit_once(' ') else { continue };
        let name = name.split('{').next().unwrap_or(name);
        let (false, Ok(value)) = (name.ends_with("_bucket"), value.parse::<f64>()) else { continue };
        match totals.iter_mut().find(|(other, _)| other == name) {
            Some((_, total)) => *total += value,
            None => totals.push((name.to_owned(), value)),
        }
    }
    totals
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_grew_is_found_and_labels_are_added_up() {
        let before = "muster_ingest_rows_total{writer=\"0\"} 5\nmuster_ingest_rows_total{writer=\"1\"} 5\nother 1\n";
        let after = "# HELP x\nmuster_ingest_rows_total{writer=\"0\"} 7\nmuster_ingest_rows_total{writer=\"1\"} 9\n\
                     muster_ingest_batch_bucket{le=\"1\"} 3\nmuster_ingest_batch_sum 2.5\nmuster_ingest_full_total 0\n";
        let expected = [("muster_ingest_rows_total".to_owned(), 6.0), ("muster_ingest_batch_sum".to_owned(), 2.5)];
        assert_eq!(writers(Some(before), Some(after)), expected);
    }
}
