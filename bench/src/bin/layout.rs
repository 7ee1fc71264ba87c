//! The layout of telemetry, measured (ADR 3): JSONB per message against a shape dictionary with `float8[]`.
//!
//! `cargo run --release --manifest-path bench/Cargo.toml --bin layout` starts a private PostgreSQL with fsync on, feeds
//! both layouts the same messages in alternating rounds and prints the table that is in the ADR.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use chrono::{DateTime, TimeDelta, TimeZone as _, Utc};
use clap::Parser;
use fleet_core::clock::{Clock, from_ms};
use fleet_core::id::{DeviceKey, TenantKey};
use fleet_core::postgres::{Cluster, Tuning};
use fleet_core::telemetry::{Batch, Limits, Order, Query, Shapes, insert_batch, points, prepare};
use fleet_core::{database, retention};
use serde_json::value::RawValue;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{AssertSqlSafe, ConnectOptions as _, Connection as _, Executor as _, PgConnection, PgPool};

/// Connections that write at once, as many as the broker has writers.
const WRITERS: usize = 4;

/// Messages of one statement, as the broker's.
const BATCH: usize = 1_000;

/// When the measured messages begin.
const START_MS: i64 = 1_795_219_200_000;

const LIMITS: Limits = Limits { max_readings: 5_000, max_metrics: 256, max_ahead_ms: i64::MAX };

#[derive(Debug, Parser)]
#[command(about = "JSONB per message against a shape dictionary with float8[]")]
struct Options {
    /// Devices; each batch holds as many different ones as it has messages.
    #[arg(long, default_value_t = 10_000)]
    devices: usize,
    /// Messages of one round of ingest.
    #[arg(long, default_value_t = 400_000)]
    messages: usize,
    /// Rounds of ingest; the layouts alternate in who is first.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Readings of each device, over 36 hours, for the queries.
    #[arg(long, default_value_t = 150)]
    readings: usize,
    /// Where the private cluster lives while this runs.
    #[arg(long, default_value = "/var/tmp/muster-bench-layout")]
    dir: PathBuf,
}

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// The values as they came.
    Json,
    /// The product's: names once, numbers as an array that is cut from one long array in SQL.
    Shape,
    /// The same rows, each array sent as text; to see what cutting costs.
    ShapeText,
}

impl Layout {
    const ALL: [Self; 3] = [Self::Json, Self::Shape, Self::ShapeText];

    fn table(self) -> &'static str {
        match self {
            Self::Json => "telemetry_json",
            Self::Shape => "telemetry",
            Self::ShapeText => "telemetry_text",
        }
    }
}

/// What the messages hold.
#[derive(Debug, Clone, Copy)]
enum Payload {
    /// Six numbers.
    Numbers,
    /// Four numbers, a boolean and a word: the word makes a `rest` of every row.
    Mixed,
}

/// The n-th message of a device.
fn message(payload: Payload, device: usize, nth: usize, ts_ms: i64) -> Vec<u8> {
    // Cheap noise with the digits of real sensors.
    let noise = |salt: usize, range: usize| (device * 7_919 + nth * 104_729 + salt * 15_485_863) % range;
    let tenths = |salt, range| {
        let value = noise(salt, range);
        format!("{}.{}", value / 10, value % 10)
    };
    let (battery, temp, cpu, mem) = (tenths(1, 1_000), tenths(2, 400), tenths(3, 1_000), tenths(4, 1_000));
    let more = match payload {
        Payload::Numbers => format!(r#""lat":59.{:05},"lon":10.{:05}"#, noise(5, 99_999), noise(6, 99_999)),
        Payload::Mixed => format!(r#""door":{},"mode":"eco""#, noise(5, 2) == 1),
    };
    format!(
        r#"{{"ts":{ts_ms},"seq":{nth},"values":{{"battery":{battery},"temp":{temp},"cpu":{cpu},"mem":{mem},{more}}}}}"#
    )
    .into_bytes()
}

/// One message and whose it is.
type Sent = (DeviceKey, Vec<u8>);

/// Messages for each writer: devices round robin, so that a batch holds each device at most once.
fn workload(options: &Options, keys: &[i64], payload: Payload, count: usize, step: TimeDelta) -> Vec<Vec<Sent>> {
    let mut writers = vec![Vec::new(); WRITERS];
    for n in 0..count {
        let (device, nth) = (n % options.devices, n / options.devices);
        let ts_ms = START_MS + step.num_milliseconds() * i64::try_from(nth).expect("small");
        writers[device % WRITERS].push((DeviceKey(keys[device]), message(payload, device, nth, ts_ms)));
    }
    writers
}

/// The private database.
struct Bench {
    options: Options,
    connect: PgConnectOptions,
    pool: PgPool,
    url: String,
    tenant: TenantKey,
    keys: Vec<i64>,
}

impl Bench {
    async fn open(options: Options, cluster: &Cluster) -> Result<Self> {
        let connect = cluster.options().disable_statement_logging();
        let pool = PgPoolOptions::new().max_connections(2).connect_with(connect.clone()).await?;
        database::migrate(&pool).await?;
        let mut db = pool.acquire().await?;
        let tenant = database::first_tenant(&mut db, &Clock::system()).await?;
        retention::ensure_partitions(&mut db, from_ms(START_MS)).await?;
        for layout in [Layout::Json, Layout::ShapeText] {
            run(&mut db, twin_of_telemetry(layout)).await?;
        }
        let keys: Vec<i64> = sqlx::query_scalar(
            "insert into device (tenant_key, id, created_at, updated_at)
             select $1, 'd' || n, 'epoch', 'epoch' from generate_series(1, $2) n returning key",
        )
        .bind(tenant.0)
        .bind(i32::try_from(options.devices)?)
        .fetch_all(&mut *db)
        .await?;
        drop(db);
        Ok(Self { options, connect, pool, url: cluster.url("postgres"), tenant, keys })
    }

    /// Empties the table and writes everything down, so that each run begins alike.
    async fn reset(&self, table: &str) -> Result<()> {
        let mut db = self.pool.acquire().await?;
        run(&mut db, format!("truncate {table}")).await?;
        run(&mut db, "checkpoint".to_owned()).await
    }

    /// Stores the messages as the broker's writers do, from bytes to COMMIT; returns how long it took.
    async fn ingest(&self, layout: Layout, writers: &Arc<Vec<Vec<Sent>>>) -> Result<Duration> {
        let mut tasks = tokio::task::JoinSet::new();
        let mut connections = Vec::new();
        for _ in 0..WRITERS {
            connections.push(PgConnection::connect_with(&self.connect).await?);
        }
        let begun = Instant::now();
        for (writer, mut db) in connections.into_iter().enumerate() {
            let (writers, tenant) = (Arc::clone(writers), self.tenant);
            tasks.spawn(async move {
                match layout {
                    Layout::Json => write_json(&mut db, &writers[writer]).await,
                    Layout::Shape => write_shape(&mut db, tenant, &writers[writer]).await,
                    Layout::ShapeText => write_shape_text(&mut db, &writers[writer]).await,
                }
            });
        }
        for written in tasks.join_all().await {
            written?;
        }
        Ok(begun.elapsed())
    }

    /// `\copy` of the table's rows into one without key or partitions, in one transaction.
    async fn copy(&self, layout: Layout) -> Result<Duration> {
        let (table, file) = (layout.table(), self.options.dir.join("rows.copy"));
        let mut db = self.pool.acquire().await?;
        run(&mut db, format!("create table if not exists plain_{table} (like {table})")).await?;
        self.psql(&format!(r"\copy (select * from {table}) to '{}'", file.display())).await?;
        self.reset(&format!("plain_{table}")).await?;
        let begun = Instant::now();
        self.psql(&format!(r"\copy plain_{table} from '{}'", file.display())).await?;
        let took = begun.elapsed();
        self.reset(&format!("plain_{table}")).await?;
        std::fs::remove_file(file)?;
        Ok(took)
    }

    async fn psql(&self, command: &str) -> Result<()> {
        let done = tokio::process::Command::new("psql")
            .args(["-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", &self.url, "-c", command])
            .stdin(Stdio::null())
            .status()
            .await
            .context("psql: expected on the PATH")?;
        ensure!(done.success(), "psql failed: {command}");
        Ok(())
    }

    /// Bytes of heap and of keys for each row.
    async fn bytes(&self, layout: Layout) -> Result<(f64, f64)> {
        let (heap, index, rows): (i64, i64, i64) = sqlx::query_as(AssertSqlSafe(format!(
            "select sum(pg_table_size(inhrelid))::bigint, sum(pg_indexes_size(inhrelid))::bigint,
                    (select count(*) from {table})
               from pg_inherits where inhparent = '{table}'::regclass and pg_table_size(inhrelid) > 100000",
            table = layout.table()
        )))
        .fetch_one(&self.pool)
        .await?;
        Ok((heap as f64 / rows as f64, index as f64 / rows as f64))
    }
}

/// The table of another layout, keyed and partitioned as `telemetry` is.
fn twin_of_telemetry(layout: Layout) -> String {
    let table = layout.table();
    let columns = match layout {
        Layout::Json => "payload jsonb not null",
        _ => "shape_id integer not null, nums float8[] not null, rest jsonb, sent_at timestamptz",
    };
    let mut sql = format!(
        "create table {table} (device_key bigint not null, ts timestamptz not null, seq bigint not null, {columns},
                               primary key (device_key, ts, seq)) partition by range (ts);
         create table {table}_default partition of {table} default;"
    );
    if layout != Layout::Json {
        // What `telemetry` has besides its key.
        write!(sql, "create index on {table} (device_key, sent_at, seq) where sent_at is not null;").expect("fits");
    }
    let first = from_ms(START_MS).date_naive();
    for (nth, day) in first.iter_days().take(8).enumerate() {
        let next = day.succ_opt().expect("far from the end of time");
        write!(
            sql,
            "create table {table}_{nth} partition of {table} for values from ('{day} 00:00+00') to ('{next} 00:00+00');"
        )
        .expect("fits");
    }
    sql
}

async fn run(db: &mut PgConnection, sql: String) -> Result<()> {
    db.execute(AssertSqlSafe(sql)).await?;
    Ok(())
}

/// What the JSONB layout has to read of a message.
#[derive(serde::Deserialize)]
struct Envelope<'a> {
    ts: i64,
    seq: i64,
    #[serde(borrow)]
    values: &'a RawValue,
}

#[derive(Default)]
struct JsonBatch<'a> {
    device: Vec<i64>,
    ts: Vec<DateTime<Utc>>,
    seq: Vec<i64>,
    payload: Vec<&'a str>,
}

impl<'a> JsonBatch<'a> {
    fn decode(messages: &'a [Sent]) -> Result<Self> {
        let mut batch = Self::default();
        for (device, payload) in messages {
            let envelope: Envelope<'_> = serde_json::from_slice(payload)?;
            batch.device.push(device.0);
            batch.ts.push(from_ms(envelope.ts));
            batch.seq.push(envelope.seq);
            batch.payload.push(envelope.values.get());
        }
        Ok(batch)
    }
}

async fn write_json(db: &mut PgConnection, messages: &[Sent]) -> Result<()> {
    for chunk in messages.chunks(BATCH) {
        let batch = JsonBatch::decode(chunk)?;
        sqlx::query(
            "insert into telemetry_json (device_key, ts, seq, payload)
             select u.device, u.ts, u.seq, u.payload::jsonb
               from unnest($1::bigint[], $2::timestamptz[], $3::bigint[], $4::text[]) as u (device, ts, seq, payload)
        on conflict do nothing",
        )
        .bind(&batch.device)
        .bind(&batch.ts)
        .bind(&batch.seq)
        .bind(&batch.payload)
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

fn decode_shape(batch: &mut Batch, tenant: TenantKey, messages: &[Sent]) -> Result<()> {
    batch.clear();
    for (device, payload) in messages {
        ensure!(batch.push(tenant, *device, payload, START_MS, &LIMITS).is_empty(), "a message was refused");
    }
    Ok(())
}

async fn write_shape(db: &mut PgConnection, tenant: TenantKey, messages: &[Sent]) -> Result<()> {
    let (mut batch, mut shapes) = (Batch::new(), Shapes::new(1_000));
    for chunk in messages.chunks(BATCH) {
        decode_shape(&mut batch, tenant, chunk)?;
        prepare(db, &mut shapes, &mut batch).await?;
        insert_batch(db, &batch).await?;
    }
    Ok(())
}

/// The shape layout with `nums` as text, `{1,2,3}`; the decoding is not the product's and does less.
async fn write_shape_text(db: &mut PgConnection, messages: &[Sent]) -> Result<()> {
    for chunk in messages.chunks(BATCH) {
        let batch = JsonBatch::decode(chunk)?;
        let (mut nums, mut rest) = (Vec::with_capacity(chunk.len()), Vec::with_capacity(chunk.len()));
        for payload in batch.payload {
            let values: std::collections::BTreeMap<&str, &RawValue> = serde_json::from_str(payload)?;
            let (mut array, mut other) = ("{".to_owned(), None);
            for (name, value) in values {
                let text = match value.get() {
                    "true" => "1",
                    "false" => "0",
                    word if word.starts_with('"') => {
                        other = Some(format!("{{\"{name}\":{word}}}"));
                        continue;
                    }
                    number => number,
                };
                array.push_str(if array.len() > 1 { "," } else { "" });
                array.push_str(text);
            }
            array.push('}');
            nums.push(array);
            rest.push(other);
        }
        sqlx::query(
            "insert into telemetry_text (device_key, ts, seq, shape_id, nums, rest, sent_at)
             select u.device, u.ts, u.seq, 1, u.nums::float8[], u.rest::jsonb, null
               from unnest($1::bigint[], $2::timestamptz[], $3::bigint[], $4::text[], $5::text[])
                 as u (device, ts, seq, nums, rest)
        on conflict do nothing",
        )
        .bind(&batch.device)
        .bind(&batch.ts)
        .bind(&batch.seq)
        .bind(&nums)
        .bind(&rest)
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

/// Microseconds a message for decoding alone, on one core: JSONB's envelope, and the product's columns.
fn decode_us(tenant: TenantKey, writers: &[Vec<Sent>]) -> Result<(f64, f64)> {
    let messages: usize = writers.iter().map(Vec::len).sum();
    let per_message = |begun: Instant| begun.elapsed().as_secs_f64() * 1e6 / messages as f64;
    let begun = Instant::now();
    for chunk in writers.iter().flat_map(|writer| writer.chunks(BATCH)) {
        std::hint::black_box(JsonBatch::decode(chunk)?.payload.len());
    }
    let json = per_message(begun);
    let mut batch = Batch::new();
    let begun = Instant::now();
    for chunk in writers.iter().flat_map(|writer| writer.chunks(BATCH)) {
        decode_shape(&mut batch, tenant, chunk)?;
        std::hint::black_box(batch.len());
    }
    Ok((json, per_message(begun)))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Thousands of messages a second: the median, and the least and most of the rounds.
fn rates(messages: usize, took: &[Duration]) -> String {
    let rates: Vec<f64> = took.iter().map(|took| messages as f64 / took.as_secs_f64() / 1_000.0).collect();
    let (least, most) =
        rates.iter().fold((f64::MAX, 0.0_f64), |(least, most), rate| (least.min(*rate), most.max(*rate)));
    format!("{:.0}k ({least:.0}–{most:.0})", median(rates))
}

async fn compare_ingest(bench: &Bench, payload: Payload) -> Result<()> {
    let writers = workload(&bench.options, &bench.keys, payload, bench.options.messages, TimeDelta::seconds(1));
    let sizes: usize = writers.iter().flatten().map(|(_, payload)| payload.len()).sum();
    let (json_us, shape_us) = decode_us(bench.tenant, &writers)?;
    let writers = Arc::new(writers);
    let mut took = [const { Vec::new() }; 3];
    let mut copies = [const { Vec::new() }; 3];
    let mut bytes = [(0.0, 0.0); 3];
    for round in 0..bench.options.rounds {
        let mut order = [0, 1, 2];
        order.rotate_left(round % 3);
        for nth in order {
            let layout = Layout::ALL[nth];
            bench.reset(layout.table()).await?;
            took[nth].push(bench.ingest(layout, &writers).await?);
            bytes[nth] = bench.bytes(layout).await?;
            copies[nth].push(bench.copy(layout).await?);
            bench.reset(layout.table()).await?;
        }
    }
    let messages = bench.options.messages;
    println!("\n### {payload:?}: {} bytes a message\n", sizes / messages);
    println!("| | JSONB | shape + float8[] | the same, arrays as text |\n|---|---|---|---|");
    println!("| decode, µs/message | {json_us:.2} | {shape_us:.2} | – |");
    let row = |name: &str, cell: &dyn Fn(usize) -> String| {
        println!("| {name} | {} | {} | {} |", cell(0), cell(1), cell(2));
    };
    row("ingest, msg/s (4 connections, batches of 1,000, bytes to COMMIT)", &|nth| rates(messages, &took[nth]));
    row("`\\copy` of the same rows, no key, msg/s", &|nth| rates(messages, &copies[nth]));
    row("ingest / `\\copy`", &|nth| {
        let seconds = |took: &[Duration]| median(took.iter().map(Duration::as_secs_f64).collect());
        format!("{:.2}", seconds(&copies[nth]) / seconds(&took[nth]))
    });
    row("bytes/message, heap + key", &|nth| {
        let (heap, key) = bytes[nth];
        format!("{heap:.0} + {key:.0} = {:.0}", heap + key)
    });
    Ok(())
}

/// Milliseconds of each query, first and median, the layouts alternating.
async fn compare_queries(bench: &Bench) -> Result<()> {
    let options = &bench.options;
    let step = TimeDelta::hours(36) / i32::try_from(options.readings)?;
    let rows = options.devices * options.readings;
    let writers = Arc::new(workload(options, &bench.keys, Payload::Numbers, rows, step));
    let mut db = bench.pool.acquire().await?;
    for layout in [Layout::Json, Layout::Shape] {
        bench.ingest(layout, &writers).await?;
        run(&mut db, format!("vacuum analyze {}", layout.table())).await?;
    }
    let end = Utc.timestamp_millis_opt(START_MS).single().context("a time")? + TimeDelta::hours(36);
    println!("\n### Queries: {rows} rows, {} devices, 36 h, warm\n", options.devices);
    println!("| ms, first / median | JSONB | shape + float8[] |\n|---|---|---|");
    for (name, times) in [
        ("24 h of one metric of one device", 40),
        ("latest of all devices (LATERAL)", 7),
        ("fleet average per minute, 1 h", 9),
    ] {
        let (mut json, mut shape) = (Vec::new(), Vec::new());
        for nth in 0..times {
            let device = bench.keys[(nth * 577) % bench.keys.len()];
            json.push(query_json(&mut db, name, device, end).await?);
            shape.push(query_shape(&mut db, bench.tenant, name, device, end).await?);
        }
        println!(
            "| {name} | {:.2} / {:.2} | {:.2} / {:.2} |",
            json[0],
            median(json.clone()),
            shape[0],
            median(shape.clone())
        );
    }
    Ok(())
}

async fn query_json(db: &mut PgConnection, name: &str, device: i64, end: DateTime<Utc>) -> Result<f64> {
    let begun = Instant::now();
    let rows = match name.split(' ').next() {
        Some("24") => sqlx::query_as::<_, (DateTime<Utc>, i64, serde_json::Value)>(
            "select ts, seq, payload -> 'temp' from telemetry_json
              where device_key = $1 and ts >= $2 and ts < $3 order by ts, seq limit 10000",
        )
        .bind(device)
        .bind(end - TimeDelta::hours(24))
        .bind(end)
        .fetch_all(db)
        .await?
        .len(),
        Some("latest") => sqlx::query_as::<_, (i64, DateTime<Utc>, serde_json::Value)>(
            "select d.key, l.ts, l.payload from device d cross join lateral (
             select ts, payload from telemetry_json t where t.device_key = d.key order by ts desc, seq desc limit 1) l",
        )
        .fetch_all(db)
        .await?
        .len(),
        _ => sqlx::query_as::<_, (DateTime<Utc>, f64)>(
            "select date_bin('1 minute', ts, 'epoch'), avg((payload ->> 'temp')::float8) from telemetry_json
              where ts >= $1 and ts < $2 group by 1 order by 1",
        )
        .bind(end - TimeDelta::hours(1))
        .bind(end)
        .fetch_all(db)
        .await?
        .len(),
    };
    ensure!(rows > 0, "{name}: nothing found");
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

async fn query_shape(
    db: &mut PgConnection,
    tenant: TenantKey,
    name: &str,
    device: i64,
    end: DateTime<Utc>,
) -> Result<f64> {
    let begun = Instant::now();
    let rows = match name.split(' ').next() {
        Some("24") => {
            let query = Query {
                device: DeviceKey(device),
                metric: Some("temp".to_owned()),
                from: end - TimeDelta::hours(24),
                to: end,
                order: Order::Asc,
                limit: 10_000,
                after: None,
            };
            points(db, &query).await?.len()
        }
        Some("latest") => sqlx::query_as::<_, (i64, DateTime<Utc>, i32, Vec<f64>)>(
            "select d.key, l.ts, l.shape_id, l.nums from device d cross join lateral (
             select ts, shape_id, nums from telemetry t where t.device_key = d.key order by ts desc, seq desc limit 1) l",
        )
        .fetch_all(db)
        .await?
        .len(),
        _ => sqlx::query_as::<_, (DateTime<Utc>, f64)>(
            // With the shapes in a CTE the average would not be taken in parallel.
            "select date_bin('1 minute', t.ts, 'epoch'), avg(t.nums[array_position(s.metrics, 'temp')])
               from telemetry t join shape s on s.id = t.shape_id
              where s.tenant_key = $1 and t.ts >= $2 and t.ts < $3 group by 1 order by 1",
        )
        .bind(tenant.0)
        .bind(end - TimeDelta::hours(1))
        .bind(end)
        .fetch_all(db)
        .await?
        .len(),
    };
    ensure!(rows > 0, "{name}: nothing found");
    Ok(begun.elapsed().as_secs_f64() * 1e3)
}

/// What the figures depend on besides the code.
async fn machine(pool: &PgPool, dir: &Path) -> Result<String> {
    let version: String = sqlx::query_scalar("select version()").fetch_one(pool).await?;
    let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name\t: ")).unwrap_or("unknown").to_owned();
    let cores = std::thread::available_parallelism()?;
    Ok(format!(
        "{}, {cores} × {model}, {}, cluster in {}, fsync on",
        Clock::system().now().date_naive(),
        version.split(" on ").next().unwrap_or_default(),
        dir.display()
    ))
}

#[tokio::main]
async fn main() -> Result<()> {
    let options = Options::parse();
    let dir = options.dir.clone();
    ensure!(!dir.exists(), "{} is there already: remove it, or give another --dir", dir.display());
    std::fs::create_dir_all(&dir)?;
    let cluster = Cluster::start(&dir.join("pg"), "auto", Tuning { max_connections: 20, durable: true }).await?;
    let measured = async {
        let bench = Bench::open(options, &cluster).await?;
        println!("{}", machine(&bench.pool, &dir).await?);
        compare_ingest(&bench, Payload::Numbers).await?;
        compare_ingest(&bench, Payload::Mixed).await?;
        compare_queries(&bench).await
    }
    .await;
    cluster.stop().await;
    std::fs::remove_dir_all(&dir)?;
    measured
}
