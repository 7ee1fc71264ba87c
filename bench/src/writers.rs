//! Committed rows a second of the write path beside psql `\copy` of the same rows, alternating on one private cluster.
//!
//! The write path is what a writer of the server does with a message: decode it, find its shape, store it in the
//! partitioned table under its key, commit. `\copy` reads rows that are in their final form already; its reference is a
//! table without key or partitions.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use fleet_core::clock::Clock;
use fleet_core::database;
use fleet_core::id::{DeviceKey, TenantKey};
use fleet_core::postgres::{Cluster, Tuning};
use fleet_core::retention;
use fleet_core::telemetry::{self, Batch, Limits, Shapes};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{ConnectOptions as _, Connection as _, Executor as _, PgConnection, PgPool};
use tokio::process::Command;
use tokio::task::JoinSet;

use crate::frame::{PAYLOAD_BYTES, Publish};

/// Connections that write at once, as in the server.
pub(crate) const WRITERS: usize = 4;
/// Messages in a batch, as in the server.
pub(crate) const BATCH: usize = 1000;
/// Devices of each writer: every message of a batch is of another device.
const DEVICES: usize = 2500;

/// One round: rows a second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    pub(crate) rows: usize,
    pub(crate) writers: f64,
    /// Into a table without key and partitions.
    pub(crate) copy: f64,
    /// Into the table of the server.
    pub(crate) copy_keyed: f64,
}

/// Runs `rounds` of `rows` each.
pub(crate) async fn run(dir: &Path, rounds: usize, rows: usize) -> anyhow::Result<Vec<Round>> {
    let cluster = Cluster::start(&dir.join("writers"), "auto", Tuning { max_connections: 20, durable: true }).await?;
    let found = measure(&cluster.options(), dir, rounds, rows).await;
    cluster.stop().await;
    found
}

async fn measure(options: &PgConnectOptions, dir: &Path, rounds: usize, rows: usize) -> anyhow::Result<Vec<Round>> {
    let pool = PgPoolOptions::new().max_connections(2).connect_with(options.clone()).await?;
    database::migrate(&pool).await?;
    let clock = Clock::system();
    let tenant = database::first_tenant(&mut *pool.acquire().await?, &clock).await?;
    retention::ensure_partitions(&mut *pool.acquire().await?, clock.now()).await?;
    // Columns only: neither key nor partitions.
    pool.execute("create table plain (like telemetry)").await?;
    let file = dir.join("rows.copy");
    let mut found = Vec::new();
    for _ in 0..rounds {
        settle(&pool).await?;
        let writers = write(options, tenant, &clock, rows).await?;
        let stored: i64 = sqlx::query_scalar("select count(*) from telemetry").fetch_one(&pool).await?;
        if usize::try_from(stored)? != rows {
            bail!("{rows} rows were written, {stored} are there");
        }
        psql(options, &format!("\\copy (select * from telemetry) to '{}'", file.display())).await?;
        settle(&pool).await?;
        let copy = timed(options, "plain", &file, rows).await?;
        settle(&pool).await?;
        let copy_keyed = timed(options, "telemetry", &file, rows).await?;
        let round = Round { rows, writers, copy, copy_keyed };
        eprintln!("writers {writers:.0} rows/s, \\copy {copy:.0}, \\copy with the key {copy_keyed:.0}");
        found.push(round);
    }
    pool.close().await;
    Ok(found)
}

/// Empties the tables and leaves no work to whoever is measured next.
async fn settle(pool: &PgPool) -> anyhow::Result<()> {
    pool.execute("truncate telemetry, plain").await?;
    pool.execute("checkpoint").await?;
    Ok(())
}

/// Rows a second of all writers together.
pub(crate) async fn write(
    options: &PgConnectOptions,
    tenant: TenantKey,
    clock: &Clock,
    rows: usize,
) -> anyhow::Result<f64> {
    let mut connections = Vec::new();
    for _ in 0..WRITERS {
        connections.push(options.connect().await?);
    }
    let started = Instant::now();
    let mut tasks = JoinSet::new();
    for (index, connection) in connections.into_iter().enumerate() {
        tasks.spawn(writer(connection, tenant, index, clock.now_ms(), rows / WRITERS));
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(rows as f64 / started.elapsed().as_secs_f64())
}

async fn writer(mut db: PgConnection, tenant: TenantKey, index: usize, now_ms: i64, rows: usize) -> anyhow::Result<()> {
    let limits = Limits { max_readings: 5000, max_metrics: 256, max_ahead_ms: 300_000 };
    let mut shapes = Shapes::new(10_000);
    let mut devices: Vec<_> = (0..DEVICES).map(|device| Publish::new("", index * DEVICES + device)).collect();
    let (mut batch, mut frame) = (Batch::new(), Vec::new());
    for row in 0..rows {
        let device = row % DEVICES;
        frame.clear();
        devices[device].append(&mut frame, u64::try_from(now_ms)?);
        let key = DeviceKey(i64::try_from(index * DEVICES + device)?);
        let rejected = batch.push(tenant, key, &frame[frame.len() - PAYLOAD_BYTES..], now_ms, &limits);
        if let Some(rejected) = rejected.first() {
            bail!("a reading was rejected: {}", rejected.reason);
        }
        if batch.len() == BATCH || row + 1 == rows {
            telemetry::prepare(&mut db, &mut shapes, &mut batch).await?;
            telemetry::insert_batch(&mut db, &batch).await?;
            batch.clear();
        }
    }
    db.close().await?;
    Ok(())
}

/// Rows a second of one `\copy`, less the time psql takes to start and connect.
async fn timed(options: &PgConnectOptions, table: &str, file: &Path, rows: usize) -> anyhow::Result<f64> {
    let start_up = elapsed(psql(options, "select 1")).await?;
    let whole = elapsed(psql(options, &format!("\\copy {table} from '{}'", file.display()))).await?;
    Ok(rows as f64 / whole.saturating_sub(start_up).as_secs_f64())
}

async fn elapsed(work: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<Duration> {
    let started = Instant::now();
    work.await?;
    Ok(started.elapsed())
}

async fn psql(options: &PgConnectOptions, command: &str) -> anyhow::Result<()> {
    let socket = options.get_socket().context("the cluster is reached by a socket")?;
    let out = Command::new("psql")
        .args(["--no-psqlrc", "--quiet", "--set", "ON_ERROR_STOP=1", "--host"])
        .arg(socket)
        .args(["--port", &options.get_port().to_string(), "--username", options.get_username()])
        .args(["--dbname", options.get_database().unwrap_or("postgres"), "--command", command])
        .output()
        .await
        .context("psql cannot be started")?;
    if !out.status.success() {
        bail!("psql: {}", String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(())
}
