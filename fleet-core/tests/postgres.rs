//! The embedded PostgreSQL with real processes: it starts, heals from every kill within ten seconds, keeps what was
//! committed, and says in one sentence why it does not start.
//!
//! `cargo test -p fleet-core --test postgres -- --nocapture` prints how long each start took.

#![expect(clippy::unwrap_used, reason = "a test may panic")]

use std::collections::HashMap;
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use fleet_core::clock::Clock;
use fleet_core::config::{Config, Environment};
use fleet_core::database::Database;
use fleet_core::postgres::{Cluster, Tuning};
use rustix::process::{Pid, Signal, kill_process};
use sqlx::{ConnectOptions, Connection, PgConnection};
use tempfile::TempDir;

const DURABLE: Tuning = Tuning { max_connections: 20, durable: true };

/// Whatever happened, so long may it take until queries are answered again.
const HEALED_WITHIN: Duration = Duration::from_secs(10);

const WITH_POSTGRES: &str = env!("CARGO_BIN_EXE_with-postgres");

/// A data directory that goes with the test.
fn data_dir() -> TempDir {
    tempfile::Builder::new().prefix("muster-drill-").tempdir().expect("the directory for temporary files is writable")
}

/// A data directory with a cluster that has run before, last with durable settings; made without waiting for the disk.
async fn used_data_dir() -> TempDir {
    let dir = data_dir();
    for tuning in [Tuning { durable: false, ..DURABLE }, DURABLE] {
        Cluster::start(dir.path(), "auto", tuning).await.unwrap().stop().await;
    }
    dir
}

async fn start(dir: &Path) -> Cluster {
    start_as("start", dir).await
}

/// Starts a cluster and holds it to the bound.
async fn start_as(what: &str, dir: &Path) -> Cluster {
    let begun = Instant::now();
    let cluster = Cluster::start(dir, "auto", DURABLE).await.unwrap_or_else(|e| panic!("{what}: {e}"));
    let took = begun.elapsed();
    eprintln!("{what}: {} ms", took.as_millis());
    assert!(took < HEALED_WITHIN, "{what} took {took:?}");
    cluster
}

async fn refused(dir: &Path, binaries: &str) -> String {
    let sentence = Cluster::start(dir, binaries, DURABLE).await.expect_err("a refusal").to_string();
    assert!(!sentence.contains('\n'), "{sentence}");
    sentence
}

/// Commits a row that must never be lost.
async fn commit_row(conn: &mut PgConnection) {
    sqlx::query("create table if not exists kept (n int)").execute(&mut *conn).await.unwrap();
    sqlx::query("insert into kept values (1)").execute(conn).await.unwrap();
}

async fn rows(cluster: &Cluster) -> i64 {
    let mut conn = cluster.options().connect().await.unwrap();
    sqlx::query_scalar("select count(*) from kept").fetch_one(&mut conn).await.unwrap()
}

fn kill(pid: u32, signal: Signal) {
    let pid = Pid::from_raw(pid.try_into().unwrap()).unwrap();
    kill_process(pid, signal).unwrap();
}

/// The postmaster of the cluster below `dir`.
fn postmaster(dir: &Path) -> u32 {
    let text = fs::read_to_string(dir.join("postgres/data/postmaster.pid")).unwrap();
    text.lines().next().unwrap().parse().unwrap()
}

async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < HEALED_WITHIN, "{what}: not within {HEALED_WITHIN:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Another process that runs the cluster, to be killed.
struct Owner {
    process: Child,
    /// Where its cluster is reached.
    url: String,
}

impl Owner {
    fn start(dir: &Path) -> Self {
        let mut process = owner(dir).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(process.stdout.take().unwrap()).read_line(&mut url).unwrap();
        Self { process, url: url.trim().to_owned() }
    }

    async fn connect(&self) -> PgConnection {
        PgConnection::connect(&self.url).await.unwrap()
    }

    fn kill(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _killed_already = self.process.kill();
        let _reaped_already = self.process.wait();
    }
}

/// Tells where the cluster is, and then stays until it is killed.
fn owner(dir: &Path) -> Command {
    let mut command = Command::new(WITH_POSTGRES);
    command.arg("--dir").arg(dir).args(["--fsync", "--", "sh", "-c", "echo $MUSTER_TEST_DATABASE_URL; exec cat"]);
    command.stdin(Stdio::piped()).stdout(Stdio::piped());
    command
}

/// A postmaster that nobody looks after and this process does not reap.
async fn unattended(dir: &Path) -> Child {
    let home = dir.canonicalize().unwrap().join("postgres");
    let data = home.join("data");
    let (uid, gid) = (stat(&data, "%u"), stat(&data, "%g"));
    let mut command = Command::new("setpriv");
    if rustix::process::geteuid().is_root() {
        command.args(["--reuid", &uid, "--regid", &gid, "--clear-groups"]);
    }
    let binary =
        fs::read_dir("/usr/lib/postgresql").unwrap().flatten().map(|version| version.path().join("bin/postgres"));
    command.arg("--").arg(binary.max().unwrap()).arg("-D").arg(&data);
    command.arg("-c").arg(format!("config_file={}", home.join("postgresql.conf").display()));
    let child = command.current_dir("/").stderr(Stdio::null()).spawn().unwrap();
    eventually("the unattended postmaster is ready", || {
        fs::read_to_string(data.join("postmaster.pid")).is_ok_and(|text| text.contains("ready"))
    })
    .await;
    assert_eq!(postmaster(dir), child.id());
    child
}

fn stat(path: &Path, format: &str) -> String {
    let said = Command::new("stat").args(["-c", format]).arg(path).output().unwrap();
    String::from_utf8(said.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn the_first_start_makes_a_cluster_and_the_next_finds_it() {
    let dir = data_dir();
    let cluster = start_as("first start", dir.path()).await;
    commit_row(&mut cluster.options().connect().await.unwrap()).await;
    let pid = cluster.pid().unwrap();
    let begun = Instant::now();
    cluster.stop().await;
    eprintln!("stop: {} ms", begun.elapsed().as_millis());
    assert!(!Path::new("/proc").join(pid.to_string()).exists());
    assert!(!dir.path().join("postgres/data/postmaster.pid").exists());
    let cluster = start_as("warm start", dir.path()).await;
    assert_eq!((rows(&cluster).await, cluster.restarts().get()), (1, 0));
    let mut conn = cluster.options().connect().await.unwrap();
    for (setting, expected) in [("data_checksums", "on"), ("fsync", "on"), ("synchronous_commit", "on")] {
        let found: String =
            sqlx::query_scalar("select current_setting($1)").bind(setting).fetch_one(&mut conn).await.unwrap();
        assert_eq!(found, expected, "{setting}");
    }
}

#[tokio::test]
async fn nothing_listens_on_tcp() {
    let dir = used_data_dir().await;
    let cluster = start(dir.path()).await;
    let descriptors = fs::read_dir(format!("/proc/{}/fd", cluster.pid().unwrap())).unwrap().flatten();
    let sockets: Vec<String> = descriptors
        .filter_map(|fd| fs::read_link(fd.path()).ok()?.to_str().map(str::to_owned))
        .filter_map(|target| Some(target.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned()))
        .collect();
    let has_one = |table: &str| {
        let text = fs::read_to_string(table).unwrap_or_default();
        text.split_whitespace().any(|word| sockets.iter().any(|inode| inode == word))
    };
    assert!(has_one("/proc/net/unix"), "the socket itself is found this way");
    assert!(!has_one("/proc/net/tcp") && !has_one("/proc/net/tcp6"));
}

#[tokio::test]
async fn a_killed_server_takes_postgres_with_it() {
    let dir = used_data_dir().await;
    let mut owner = Owner::start(dir.path());
    commit_row(&mut owner.connect().await).await;
    let pid = postmaster(dir.path());
    owner.kill();
    eventually("the postmaster follows", || !works(pid)).await;
    assert_eq!(rows(&start_as("after kill -9 of the server and the shutdown", dir.path()).await).await, 1);
}

#[tokio::test]
async fn a_start_right_after_the_kill_waits_for_the_shutdown() {
    let dir = used_data_dir().await;
    let mut owner = Owner::start(dir.path());
    commit_row(&mut owner.connect().await).await;
    owner.kill();
    assert_eq!(rows(&start_as("at once after kill -9 of the server", dir.path()).await).await, 1);
}

#[tokio::test]
async fn a_postmaster_that_nobody_looks_after_is_replaced() {
    let dir = used_data_dir().await;
    let mut orphan = unattended(dir.path()).await;
    commit_row(&mut start_options(dir.path()).connect().await.unwrap()).await;
    let cluster = start_as("beside a live orphan", dir.path()).await;
    assert_eq!(rows(&cluster).await, 1);
    assert!(orphan.wait().unwrap().success(), "it was asked to shut down, not killed");
}

/// The same way in as [`Cluster::options`], for a postmaster that no cluster stands for.
fn start_options(dir: &Path) -> sqlx::postgres::PgConnectOptions {
    let socket = dir.canonicalize().unwrap().join("postgres/socket");
    sqlx::postgres::PgConnectOptions::new_without_pgpass().socket(socket).username("muster").database("postgres")
}

#[tokio::test]
async fn an_orphan_that_hangs_is_replaced() {
    let dir = used_data_dir().await;
    let mut orphan = unattended(dir.path()).await;
    commit_row(&mut start_options(dir.path()).connect().await.unwrap()).await;
    kill(orphan.id(), Signal::STOP);
    assert_eq!(rows(&start_as("beside an orphan that hangs", dir.path()).await).await, 1);
    orphan.wait().unwrap();
}

#[tokio::test]
async fn a_zombie_postmaster_and_its_stale_pid_file_are_no_obstacle() {
    let dir = used_data_dir().await;
    let mut zombie = unattended(dir.path()).await;
    commit_row(&mut start_options(dir.path()).connect().await.unwrap()).await;
    kill(zombie.id(), Signal::KILL);
    eventually("it is a zombie", || {
        fs::read_to_string(format!("/proc/{}/stat", zombie.id())).is_ok_and(|stat| stat.contains(") Z "))
    })
    .await;
    assert_eq!(postmaster(dir.path()), zombie.id());
    assert_eq!(rows(&start_as("beside a zombie postmaster", dir.path()).await).await, 1);
    zombie.wait().unwrap();
}

#[tokio::test]
async fn server_and_postmaster_killed_at_once_with_a_busy_backend() {
    let dir = used_data_dir().await;
    let mut owner = Owner::start(dir.path());
    commit_row(&mut owner.connect().await).await;
    // A backend that does not notice: it computes and never looks up.
    let mut busy = owner.connect().await;
    let backend: i32 = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&mut busy).await.unwrap();
    let query = tokio::spawn(async move {
        sqlx::query("select count(*) from generate_series(1, 1000000000) a").execute(&mut busy).await
    });
    let backend = u32::try_from(backend).unwrap();
    eventually("the backend computes", || {
        fs::read_to_string(format!("/proc/{backend}/cmdline")).is_ok_and(|line| line.contains("SELECT"))
    })
    .await;
    let pid = postmaster(dir.path());
    kill(pid, Signal::KILL);
    owner.kill();
    assert!(works(backend), "the backend outlives its postmaster");
    assert_eq!(rows(&start_as("after kill -9 of both beside a busy backend", dir.path()).await).await, 1);
    assert!(query.await.unwrap().is_err());
}

#[tokio::test]
async fn a_pid_file_that_names_somebody_else_is_stale() {
    let dir = used_data_dir().await;
    let cluster = start(dir.path()).await;
    commit_row(&mut cluster.options().connect().await.unwrap()).await;
    let pid_file = dir.path().join("postgres/data/postmaster.pid");
    let text = fs::read_to_string(&pid_file).unwrap();
    cluster.stop().await;
    // This test is alive, and no PostgreSQL.
    fs::write(&pid_file, text.replacen(text.lines().next().unwrap(), &std::process::id().to_string(), 1)).unwrap();
    assert_eq!(rows(&start_as("beside the pid file of another process", dir.path()).await).await, 1);
}

#[tokio::test]
async fn a_postmaster_killed_under_a_live_server_comes_back() {
    let dir = used_data_dir().await;
    let database = Database::open(&config(&[]), dir.path(), &Clock::system()).await.unwrap();
    let cluster = database.cluster().unwrap();
    // Several idle connections, all of which die.
    let mut held = Vec::new();
    for _ in 0..4 {
        held.push(database.pool().acquire().await.unwrap());
    }
    drop(held);
    commit_row(&mut database.pool().acquire().await.unwrap()).await;
    for round in 1..=2 {
        let begun = Instant::now();
        kill(cluster.pid().unwrap(), Signal::KILL);
        eventually("the postmaster is started again", || cluster.restarts().get() == round).await;
        let kept: i64 = sqlx::query_scalar("select count(*) from kept").fetch_one(database.pool()).await.unwrap();
        eprintln!("kill -9 of the postmaster to the first answer: {} ms", begun.elapsed().as_millis());
        assert!(begun.elapsed() < HEALED_WITHIN);
        assert_eq!(kept, 1);
    }
    database.close().await;
}

/// A crash costs the replay of what was written since the last checkpoint, which `max_wal_size` bounds.
#[tokio::test]
#[ignore = "writes more than a gigabyte: make soak"]
async fn what_is_to_be_replayed_is_bounded() {
    let dir = used_data_dir().await;
    let cluster = start(dir.path()).await;
    let mut conn = cluster.options().connect().await.unwrap();
    commit_row(&mut conn).await;
    sqlx::raw_sql("create table heavy (device bigint, n bigint, nums float8[], primary key (device, n))")
        .execute(&mut conn)
        .await
        .unwrap();
    let fill = "insert into heavy select (random() * 10000)::int, $1 * 200000 + g,
                                         array[random(), random(), random(), random(), random()]
                  from generate_series(1, 200000) g";
    for round in 0..25_i64 {
        sqlx::query(fill).bind(round).execute(&mut conn).await.unwrap();
    }
    let begun = Instant::now();
    kill(cluster.pid().unwrap(), Signal::KILL);
    eventually("the postmaster has replayed", || cluster.restarts().get() == 1).await;
    eprintln!("kill -9 of the postmaster after 5 million rows: {} ms", begun.elapsed().as_millis());
    assert_eq!(rows(&cluster).await, 1);
}

#[tokio::test]
async fn a_stop_does_not_wait_for_ever_for_a_connection_in_use() {
    let dir = used_data_dir().await;
    let database = Database::open(&config(&[]), dir.path(), &Clock::system()).await.unwrap();
    let held = database.pool().acquire().await.unwrap();
    let begun = Instant::now();
    database.close().await;
    assert!(begun.elapsed() < HEALED_WITHIN);
    drop(held);
}

#[tokio::test]
async fn an_interrupted_first_start_is_begun_again() {
    let dir = data_dir();
    let mut owner = owner(dir.path()).spawn().unwrap();
    let (making, made) = (dir.path().join("postgres/data.new"), dir.path().join("postgres/data"));
    eventually("initdb is at work", || making.join("PG_VERSION").exists()).await;
    owner.kill().unwrap();
    owner.wait().unwrap();
    assert!(making.exists() && !made.exists(), "the kill came in the middle");
    let cluster = start_as("after a first start that was killed", dir.path()).await;
    assert!(!making.exists());
    commit_row(&mut cluster.options().connect().await.unwrap()).await;
}

#[tokio::test]
async fn a_second_server_on_the_same_directory_is_refused() {
    let dir = used_data_dir().await;
    let cluster = start(dir.path()).await;
    let second = Command::new(WITH_POSTGRES).arg("--dir").arg(dir.path()).args(["--", "true"]).output().unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains("another muster") && said.contains(&std::process::id().to_string()), "{said}");
    assert_eq!((second.status.code(), said.lines().count()), (Some(125), 1));
    commit_row(&mut cluster.options().connect().await.unwrap()).await;
}

/// A program and a directory that user `nobody` can use.
struct Nobody {
    _keep: TempDir,
    program: PathBuf,
    dir: PathBuf,
}

impl Nobody {
    fn new() -> Self {
        let keep = data_dir();
        fs::set_permissions(keep.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (program, dir) = (keep.path().join("with-postgres"), keep.path().join("home"));
        fs::copy(WITH_POSTGRES, &program).unwrap();
        fs::create_dir(&dir).unwrap();
        if rustix::process::geteuid().is_root() {
            std::os::unix::fs::chown(&dir, Some(65534), Some(65534)).unwrap();
        }
        Self { _keep: keep, program, dir }
    }

    /// As root becomes `nobody`; another user stays what they are, which is as good.
    fn run(&self, script: &str) -> Output {
        let mut command = Command::new("setpriv");
        if rustix::process::geteuid().is_root() {
            command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        }
        command.arg("--").arg(&self.program).arg("--dir").arg(self.dir.join("data")).args(["--", "sh", "-c", script]);
        command.current_dir("/").output().unwrap()
    }
}

#[test]
fn it_runs_as_a_normal_user() {
    let nobody = Nobody::new();
    for _first_and_warm in 0..2 {
        let done = nobody.run(r#"psql -tA "$MUSTER_TEST_DATABASE_URL" -c "select 40 + 2""#);
        assert_eq!(String::from_utf8_lossy(&done.stdout), "42\n", "{done:?}");
    }
    // Killed, and started again.
    nobody.run("kill -9 $PPID");
    let done = nobody.run(r#"psql -tA "$MUSTER_TEST_DATABASE_URL" -c "select 40 + 2""#);
    assert_eq!(String::from_utf8_lossy(&done.stdout), "42\n", "{done:?}");
}

#[tokio::test]
async fn what_is_missing_or_in_the_way_is_said_in_one_sentence() {
    let dir = used_data_dir().await;
    let no_programs = refused(dir.path(), "/nonexistent").await;
    assert!(no_programs.contains("database.binaries"), "{no_programs}");

    let unwritable = refused(Path::new("/proc/muster"), "auto").await;
    assert!(unwritable.contains("/proc/muster") && unwritable.contains("MUSTER__DATA_DIR"), "{unwritable}");

    fs::write(dir.path().join("postgres/data/PG_VERSION"), "9\n").unwrap();
    let other_version = refused(dir.path(), "auto").await;
    assert!(other_version.contains("made by PostgreSQL 9"), "{other_version}");
}

#[tokio::test]
async fn as_root_a_directory_in_somebodys_closed_home_is_refused_by_name() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let place = data_dir();
    let home = place.path().join("home");
    fs::create_dir(&home).unwrap();
    fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(&home, fs::Permissions::from_mode(0o700)).unwrap();
    let sentence = refused(&home.join("data"), "auto").await;
    assert!(sentence.contains(&format!("may not enter {}:", home.display())), "{sentence}");
}

fn config(variables: &[(&str, &str)]) -> Config {
    let variables =
        variables.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<HashMap<_, _>>();
    Config::from_sources(&Environment::default(), Some(variables)).unwrap()
}

async fn open_refused(url: &str) -> String {
    let begun = Instant::now();
    let config = config(&[("MUSTER__DATABASE__URL", url)]);
    let refused = Database::open(&config, Path::new("/nonexistent"), &Clock::system()).await;
    let sentence = refused.expect_err("a refusal").to_string();
    assert!(!sentence.contains('\n') && !sentence.contains("hunter2"), "{sentence}");
    assert!(begun.elapsed() < HEALED_WITHIN + Duration::from_secs(2));
    sentence
}

#[tokio::test]
async fn a_given_database_is_used_and_a_wrong_one_is_told_without_its_password() {
    let dir = used_data_dir().await;
    let cluster = start(dir.path()).await;
    let mut admin = cluster.options().connect().await.unwrap();
    for statement in ["create database fleet", "create role guarded login password 'right'"] {
        sqlx::raw_sql(statement).execute(&mut admin).await.unwrap();
    }
    fs::write(
        dir.path().join("postgres/pg_hba.conf"),
        "local all guarded scram-sha-256\nlocal all all peer map=muster\n",
    )
    .unwrap();
    sqlx::raw_sql("select pg_reload_conf()").execute(&mut admin).await.unwrap();

    let given = config(&[("MUSTER__DATABASE__URL", &cluster.url("fleet"))]);
    let database = Database::open(&given, Path::new("/nonexistent"), &Clock::system()).await.unwrap();
    assert!(database.cluster().is_none());
    let tenants: Vec<String> = sqlx::query_scalar("select id from tenant").fetch_all(database.pool()).await.unwrap();
    assert_eq!(tenants, ["main"]);
    database.close().await;

    let wrong_password = cluster.url("fleet").replacen("muster@", "guarded:hunter2@", 1);
    for (url, expected) in [
        ("mysql://root:hunter2@localhost/fleet", "expected postgres://"),
        ("postgres://muster:hunter2@localhost:port/fleet", "expected postgres://"),
        ("postgres://muster:hunter2@127.0.0.1:1/fleet", "127.0.0.1:1 cannot be reached"),
        ("postgres://muster:hunter2@nosuch.invalid/fleet", "nosuch.invalid:5432 cannot be reached"),
        (&wrong_password, "refuses user guarded"),
        (&cluster.url("nosuch"), "has no database nosuch"),
    ] {
        let sentence = open_refused(url).await;
        assert!(sentence.contains(expected), "{url}: {sentence}");
    }
}

/// Whether the process is there and no zombie.
fn works(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}
