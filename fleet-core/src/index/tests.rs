//! What the index promises.

use std::collections::HashMap;
use std::fmt::Write as _;

use chrono::{DateTime, Days, Utc};
use sqlx::PgConnection;
use tantivy::Term;
use tantivy::collector::Count;
use tantivy::query::TermQuery;
use tantivy::schema::IndexRecordOption;
use tempfile::TempDir;

use super::schema::FIELDS;
use super::*;
use crate::clock::{Clock, from_ms};
use crate::config::{Config, Environment};
use crate::id::DeviceKey;
use crate::log::{Batch, Limits, insert_batch, prepare};
use crate::telemetry::fixture::{NOW, enrol};
use crate::testing::TestDb;
use crate::{decommission, retention};

const DAY_MS: i64 = 86_400_000;
const LIMITS: Limits = Limits { max_lines: 10_000, max_ahead_ms: 300_000 };

fn config() -> Config {
    Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap()
}

/// An index over a database, with partitions from yesterday on.
struct Bench {
    db: TestDb,
    clock: Clock,
    dir: TempDir,
    settings: Search,
    index: Option<Index>,
}

impl Bench {
    async fn new() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(set: impl FnOnce(&mut Search)) -> Self {
        let db = TestDb::new().await;
        let mut settings = config().search;
        settings.min_free_bytes = 0;
        settings.writer_bytes = 16 * 1024 * 1024;
        set(&mut settings);
        retention::ensure_partitions(&mut db.pool().acquire().await.unwrap(), from_ms(NOW)).await.unwrap();
        let dir = tempfile::tempdir().unwrap();
        let index = Some(Index::open(dir.path(), &settings).unwrap());
        Self { db, clock: Clock::fixed(from_ms(NOW)), dir, settings, index }
    }

    fn index(&self) -> &Index {
        self.index.as_ref().unwrap()
    }

    async fn conn(&self) -> sqlx::pool::PoolConnection<sqlx::Postgres> {
        self.db.pool().acquire().await.unwrap()
    }

    async fn enrol(&self, id: &str) -> DeviceKey {
        enrol(&mut *self.conn().await, self.db.tenant(), id).await
    }

    async fn catch_up(&self) {
        self.index().catch_up(self.db.pool(), &self.clock).await.unwrap();
    }

    /// Ends as a crash does: nothing more is written.
    fn crash(&mut self) {
        self.index = None;
        self.index = Some(Index::open(self.dir.path(), &self.settings).unwrap());
    }

    /// Each day's lines by the index and by the database, the newest first; they must be the same.
    async fn verified(&self) -> Vec<(String, u64)> {
        let mut lines = Vec::new();
        for name in self.index().all_days(self.db.pool()).await.unwrap() {
            let found = self.index().verify(self.db.pool(), name).await.unwrap();
            assert!(found.is_equal, "{found:?}");
            assert_eq!(found.index_lines, found.table_lines);
            if found.index_lines > 0 {
                lines.push((name.to_string(), found.index_lines));
            }
        }
        lines
    }

    fn lines(&self) -> u64 {
        self.index().days(i64::MIN, i64::MAX).iter().map(|day| day.searcher.num_docs()).sum()
    }

    fn count(&self, term: Term) -> usize {
        let query = TermQuery::new(term, IndexRecordOption::Basic);
        let days = self.index().days(i64::MIN, i64::MAX);
        days.iter().map(|day| day.searcher.search(&query, &Count).unwrap()).sum()
    }

    fn word(&self, word: &str) -> usize {
        self.count(Term::from_field_text(FIELDS.message, word))
    }
}

/// Stores lines of a device: their times, and a message for each.
async fn store(db: &mut PgConnection, writer: i16, device: DeviceKey, lines: &[(i64, &str)]) {
    let mut batch = Batch::default();
    for (nth, (ts, message)) in lines.iter().enumerate() {
        let line =
            serde_json::json!({ "ts": ts, "message": message, "level": "warn", "fields": { "n": nth, "at": "here" } });
        assert_eq!(batch.push(device, line.to_string().as_bytes(), NOW + DAY_MS * 30, &LIMITS), []);
    }
    prepare(db, &mut batch).await.unwrap();
    insert_batch(db, writer, &batch).await.unwrap();
}

async fn store_many(db: &mut PgConnection, writer: i16, device: DeviceKey, from_ms: i64, count: i64) {
    let texts = (0..count).map(|nth| format!("line number {nth} at {from_ms}")).collect::<Vec<_>>();
    let lines = (from_ms..).zip(texts.iter().map(String::as_str)).collect::<Vec<_>>();
    store(db, writer, device, &lines).await;
}

async fn eventually(holds: impl Fn() -> bool, told: impl Fn() -> String) {
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(30);
    while !holds() {
        assert!(tokio::time::Instant::now() < deadline, "{}", told());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[test]
fn an_index_is_open_once() {
    let dir = tempfile::tempdir().unwrap();
    let index = Index::open(dir.path(), &config().search).unwrap();
    assert!(index.days(i64::MIN, i64::MAX).is_empty());
    let second = Index::open(dir.path(), &config().search).unwrap_err().to_string();
    assert!(second.contains("another process"), "{second}");
    drop(index);
    Index::open(dir.path(), &config().search).unwrap();
}

#[tokio::test]
async fn a_stored_line_is_in_the_index_of_its_day() {
    let bench = Bench::new().await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    let times =
        [(NOW, "Pump started"), (NOW + DAY_MS, "pump stopped"), (NOW - 20 * DAY_MS, "pump of old"), (0, "no clock")];
    store(&mut conn, 1, device, &times).await;
    store(&mut conn, 2, DeviceKey(device.0 + 1), &[(NOW, "pump of nobody")]).await;
    assert_eq!(bench.index().state(), State::CatchingUp);
    bench.catch_up().await;
    assert_eq!(bench.index().state(), State::Ok);
    assert_eq!(bench.index().caught_up_to(), Places::from([(1, 4), (2, 1)]));
    let names = bench.index().days(i64::MIN, i64::MAX).iter().map(|day| day.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names, ["2026-11-22", "2026-11-21", "other"]);
    assert_eq!(bench.index().days(NOW, NOW).len(), 1);
    assert_eq!(bench.index().days(0, NOW - 5 * DAY_MS).len(), 1);
    assert_eq!((bench.word("pump"), bench.word("started"), bench.word("nobody")), (3, 1, 0));
    let wanted = [("2026-11-22".to_owned(), 1), ("2026-11-21".to_owned(), 1), ("other".to_owned(), 2)];
    assert_eq!(bench.verified().await, wanted);
}

#[tokio::test]
async fn what_was_committed_is_not_added_again() {
    let mut bench = Bench::with(|search| search.batch_lines = 7).await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    store_many(&mut conn, 1, device, NOW, 40).await;
    store_many(&mut conn, 2, device, NOW + DAY_MS, 40).await;
    bench.catch_up().await;
    // As if it had ended between the commits of the days and the note of how far they are.
    let followed = bench.dir.path().join(FOLLOWED);
    let mut noted: Followed = serde_json::from_slice(&std::fs::read(&followed).unwrap()).unwrap();
    noted.places = Places::from([(1, 13)]);
    bench.index = None;
    std::fs::write(&followed, serde_json::to_vec(&noted).unwrap()).unwrap();
    bench.crash();
    store_many(&mut conn, 1, device, NOW + 1_000, 5).await;
    bench.catch_up().await;
    assert_eq!(bench.verified().await, [("2026-11-22".to_owned(), 40), ("2026-11-21".to_owned(), 45)]);
    assert_eq!(bench.index().inner.metrics.lines.get(), 5);
}

#[tokio::test]
async fn lines_of_more_days_than_are_held_open_find_theirs() {
    let mut bench = Bench::with(|search| search.open_days = 2).await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    for round in 0..3 {
        let days = (0..6).map(|day| (NOW + day * DAY_MS + round, "across days")).collect::<Vec<_>>();
        store(&mut conn, 1, device, &days).await;
        bench.index().catch_up(bench.db.pool(), &bench.clock).await.unwrap();
    }
    assert_eq!((bench.lines(), bench.verified().await.len()), (18, 6));
    assert!(bench.index().inner.metrics.closed.get() >= 4);
    bench.crash();
    bench.catch_up().await;
    assert_eq!(bench.lines(), 18);
}

#[tokio::test]
async fn an_index_of_another_format_or_database_is_made_anew() {
    let mut bench = Bench::new().await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    store_many(&mut conn, 1, device, NOW, 10).await;
    bench.catch_up().await;
    bench.index = None;
    let followed = bench.dir.path().join(FOLLOWED);
    let text = std::fs::read_to_string(&followed).unwrap();
    std::fs::write(&followed, text.replace("\"format\":1", "\"format\":0")).unwrap();
    bench.crash();
    assert_eq!(bench.lines(), 0);
    bench.catch_up().await;
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 10)]);
    // A backup was brought back that knows less.
    sqlx::query("update log_writer set last = 4").execute(&mut *conn).await.unwrap();
    sqlx::query("delete from log where place > 4").execute(&mut *conn).await.unwrap();
    bench.catch_up().await;
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 4)]);
}

#[tokio::test]
async fn a_day_that_was_dropped_is_gone_and_its_late_lines_are_kept() {
    let mut bench = Bench::new().await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    let mut retention = config().retention;
    retention.log_days = 3;
    store_many(&mut conn, 1, device, NOW - 40 * DAY_MS, 4).await;
    store_many(&mut conn, 1, device, NOW - DAY_MS, 10).await;
    store_many(&mut conn, 1, device, NOW, 10).await;
    bench.catch_up().await;
    assert_eq!((bench.lines(), bench.verified().await.len()), (24, 3));
    let later = from_ms(NOW) + Days::new(3);
    retention::ensure_partitions(&mut conn, later).await.unwrap();
    retention::sweep(&mut conn, &retention, later).await.unwrap();
    // A device that was away tells of the day that is gone: kept until the next sweep.
    store(&mut conn, 1, device, &[(NOW - DAY_MS, "late")]).await;
    bench.catch_up().await;
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 10), ("other".to_owned(), 1)]);
    assert!(!bench.dir.path().join("2026-11-20").exists());
    retention::sweep(&mut conn, &retention, later).await.unwrap();
    bench.catch_up().await;
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 10)]);
    bench.crash();
    assert_eq!(bench.lines(), 10);
}

#[tokio::test]
async fn the_lines_of_a_device_that_is_purged_are_deleted() {
    let bench = Bench::new().await;
    let (gone, stays) = (bench.enrol("boiler-1").await, bench.enrol("boiler-2").await);
    let mut conn = bench.conn().await;
    for day in 0..3 {
        store_many(&mut conn, 1, gone, NOW + day * DAY_MS, 10).await;
        store_many(&mut conn, 1, stays, NOW + day * DAY_MS, 5).await;
    }
    bench.catch_up().await;
    assert_eq!(bench.count(Term::from_field_u64(FIELDS.device, gone.0.cast_unsigned())), 30);
    let by = crate::id::UserId::new();
    let (id, at): (_, DateTime<Utc>) = ("boiler-1".parse().unwrap(), from_ms(NOW));
    let mut tx = bench.db.pool().begin().await.unwrap();
    decommission::begin(&mut tx, bench.db.tenant(), &id, true, by, at).await.unwrap();
    tx.commit().await.unwrap();
    // While it goes on, its lines count on neither side.
    assert_eq!(bench.verified().await.iter().map(|(_, lines)| lines).sum::<u64>(), 15);
    while decommission::work(bench.db.pool(), 7, at + chrono::TimeDelta::seconds(10)).await.unwrap().finished == 0 {}
    bench.catch_up().await;
    assert_eq!(bench.count(Term::from_field_u64(FIELDS.device, gone.0.cast_unsigned())), 0);
    assert_eq!((bench.lines(), bench.verified().await.len()), (15, 3));
}

#[tokio::test]
async fn a_day_that_differs_is_told_and_made_anew_while_it_is_searched() {
    let bench = Bench::with(|search| search.batch_lines = 50).await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    store_many(&mut conn, 1, device, NOW, 300).await;
    bench.catch_up().await;
    // Behind the index's back: a line less, a word that is another one.
    sqlx::query("delete from log where place = 7").execute(&mut *conn).await.unwrap();
    sqlx::query("update log set message = 'other words' where place = 8").execute(&mut *conn).await.unwrap();
    let name = "2026-11-21".parse().unwrap();
    let found = bench.index().verify(bench.db.pool(), name).await.unwrap();
    assert_eq!(found, Verified { name, index_lines: 300, table_lines: 299, is_equal: false });

    let (index, pool) = (bench.index().clone(), bench.db.pool().clone());
    let rebuilding = tokio::spawn(async move { index.rebuild(&pool, name).await });
    let mut looked = 0;
    while !rebuilding.is_finished() {
        // It stays searched, and goes on to grow.
        assert!(bench.word("line") >= 298, "{}", bench.word("line"));
        store(&mut conn, 1, device, &[(NOW + 1_000 + looked, "line written meanwhile")]).await;
        bench.catch_up().await;
        looked += 1;
    }
    rebuilding.await.unwrap().unwrap();
    bench.catch_up().await;
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 299 + looked.cast_unsigned())]);
    assert_eq!((bench.word("other"), bench.word("meanwhile")), (1, usize::try_from(looked).unwrap()));
    assert_eq!(std::fs::read_dir(bench.dir.path()).unwrap().count(), 3, "day, lock, note");
}

#[tokio::test]
async fn a_swap_that_was_interrupted_is_ended() {
    let mut bench = Bench::new().await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    store_many(&mut conn, 1, device, NOW, 20).await;
    bench.catch_up().await;
    let path = |suffix: &str| bench.dir.path().join(format!("2026-11-21{suffix}"));
    let copy = |from: &std::path::Path, to: &std::path::Path| {
        std::fs::create_dir(to).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(|file| file.unwrap()) {
            std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
        }
    };
    let (day, new, old) = (path(""), path(".new"), path(".old"));
    let moments: [&dyn Fn(); 3] = [
        &|| copy(&day, &new),
        &|| {
            std::fs::rename(&day, &old).unwrap();
            copy(&old, &new);
        },
        &|| copy(&day, &old),
    ];
    for moment in moments {
        drop(bench.index.take());
        moment();
        bench.index = Some(Index::open(bench.dir.path(), &bench.settings).unwrap());
        assert_eq!(bench.lines(), 20);
        assert!(day.exists() && !new.exists() && !old.exists());
    }
    bench.catch_up().await;
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 20)]);
}

#[tokio::test]
async fn a_day_that_cannot_be_read_is_made_anew_by_itself() {
    let mut bench = Bench::new().await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    store_many(&mut conn, 1, device, NOW, 20).await;
    bench.catch_up().await;
    bench.index = None;
    std::fs::write(bench.dir.path().join("2026-11-21/meta.json"), "{").unwrap();
    bench.crash();
    bench.index().set_state(State::Ok);
    assert_eq!((bench.lines(), bench.index().state()), (0, State::Rebuilding));
    bench.index().mend(bench.db.pool()).await;
    assert_eq!(bench.index().state(), State::Ok);
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 20)]);
}

#[tokio::test]
async fn without_room_it_stands_still_and_goes_on_when_there_is_some() {
    let mut bench = Bench::new().await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    store_many(&mut conn, 1, device, NOW, 20).await;
    bench.catch_up().await;
    store_many(&mut conn, 1, device, NOW + 1_000, 20).await;
    for (min_free_bytes, state, lines) in [(u64::MAX, State::DiskFull, 20), (0, State::Ok, 40)] {
        bench.settings.min_free_bytes = min_free_bytes;
        bench.crash();
        let stop = tokio_util::sync::CancellationToken::new();
        let seen = async {
            let index = bench.index();
            eventually(
                || index.state() == state && bench.lines() == lines,
                || format!("{index:?} {:?}", index.state()),
            )
            .await;
            assert_eq!(index.state().is_complete(), state == State::Ok);
            stop.cancel();
        };
        tokio::join!(bench.index().follow(bench.db.pool(), &bench.clock, &stop), seen);
    }
}

#[tokio::test]
async fn of_many_names_the_first_have_columns_and_all_can_be_found() {
    let mut bench = Bench::with(|search| search.max_columns = 100).await;
    let device = bench.enrol("boiler-1").await;
    let mut conn = bench.conn().await;
    for half in 0..2 {
        for start in (half * 5_000..(half + 1) * 5_000).step_by(50) {
            let mut batch = Batch::default();
            let mut fields = String::new();
            for nth in start..start + 50 {
                write!(fields, "{}\"name-{nth}\":\"value {nth}\"", if nth == start { "" } else { "," }).unwrap();
            }
            let line = format!(r#"{{"ts":{},"message":"many","fields":{{{fields}}}}}"#, NOW + start);
            assert_eq!(batch.push(device, line.as_bytes(), NOW, &LIMITS), []);
            insert_batch(&mut conn, 1, &batch).await.unwrap();
        }
        bench.catch_up().await;
        bench.crash();
        bench.catch_up().await;
    }
    for name in ["fields.name-0", "fields.name-9999"] {
        assert_eq!(bench.count(Term::from_field_text(FIELDS.names, name)), 1, "{name}");
    }
    let day = bench.index().days(NOW, NOW).remove(0);
    let columns = day.searcher.segment_readers().iter().flat_map(|segment| {
        let has = |nth: &i64| {
            !segment.fast_fields().dynamic_column_handles(&format!("columns.name-{nth}")).unwrap().is_empty()
        };
        (0..10_000_i64).filter(has).collect::<Vec<_>>()
    });
    assert_eq!(columns.collect::<BTreeSet<_>>(), (0..100).collect());
    assert_eq!(bench.verified().await, [("2026-11-21".to_owned(), 200)]);
}
