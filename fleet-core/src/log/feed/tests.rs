//! What tails promise, over rows.

use std::collections::HashMap;

use prometheus::Registry;
use tokio::time::timeout;

use super::*;
use crate::config::{Config, Environment, Secret};
use crate::id::TenantKey;
use crate::log::{Batch, Limits, insert_batch, prepare};
use crate::login_session::{self, Method, Origin};
use crate::telemetry::fixture::{NOW, enrol};
use crate::testing::TestDb;
use crate::{control, token, user};

/// Longest wait for what must come.
const SOON: Duration = Duration::from_secs(20);

struct Fleet {
    feed: Feed,
    keys: Arc<Keys>,
    user: UserId,
    bearer: String,
    db: TestDb,
}

impl Fleet {
    async fn start(set: impl Fn(&mut Logs)) -> Self {
        let db = TestDb::new().await;
        let mut config = Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap();
        set(&mut config.logs);
        let clock = Clock::system();
        let mut conn = db.pool().acquire().await.unwrap();
        let password = Secret::from("correct horse battery staple".to_owned());
        user::ensure_admin(&mut conn, Some("ada@example.com"), Some(&password), &clock).await.unwrap();
        let user =
            sqlx::query_scalar!(r#"select id as "id: UserId" from app_user"#).fetch_one(&mut *conn).await.unwrap();
        let keys = Arc::new(Keys::load(&mut conn, clock.clone(), 900).await.unwrap());
        let origin = Origin::default();
        let begun =
            login_session::begin(&mut conn, user, Method::Password, &origin, &config.auth, clock.now()).await.unwrap();
        let bearer = keys.sign(&begun.0).unwrap().token.expose().to_owned();
        drop(conn);
        let feed = Feed::new(db.pool().clone(), keys.clone(), clock, config.logs, &Registry::new()).unwrap();
        Self { feed, keys, user, bearer, db }
    }

    async fn tail(&self, after: Option<Positions>) -> Tailing {
        let reader = self.feed.tail(self.request(after).await).await.unwrap();
        Tailing { reader, at: Positions::default() }
    }

    async fn request(&self, after: Option<Positions>) -> Request {
        let mut db = self.db.pool().acquire().await.unwrap();
        let principal = token::principal(&mut db, &self.keys, &self.bearer, self.feed.0.clock.now()).await.unwrap();
        let query = crate::log::query::read("", self.feed.0.clock.now()).unwrap();
        Request { principal, bearer: self.bearer.clone().into(), query, after }
    }

    async fn enrol(&self, id: &str) -> crate::id::DeviceKey {
        enrol(&mut self.db.pool().acquire().await.unwrap(), self.db.tenant(), id).await
    }

    /// Stores lines with these messages, in one transaction of this writer.
    async fn write(&self, writer: i16, device: crate::id::DeviceKey, messages: impl IntoIterator<Item = String>) {
        let limits = Limits { max_lines: 10_000, max_ahead_ms: 300_000 };
        let mut batch = Batch::default();
        for message in messages {
            batch.push(device, message.as_bytes(), NOW, &limits);
        }
        let mut tx = self.db.pool().begin().await.unwrap();
        prepare(&mut tx, &mut batch).await.unwrap();
        insert_batch(&mut tx, writer, &batch).await.unwrap();
        tx.commit().await.unwrap();
    }

    async fn change(&self, sql: &'static str) {
        let mut tx = self.db.pool().begin().await.unwrap();
        sqlx::query(sql).bind(self.user).execute(&mut *tx).await.unwrap();
        control::bump(&mut tx).await.unwrap();
        tx.commit().await.unwrap();
    }
}

struct Tailing {
    reader: Reader,
    at: Positions,
}

impl Tailing {
    async fn next(&mut self) -> Entry {
        let entry = timeout(SOON, self.reader.next()).await.expect("something comes").expect("the tail goes on");
        match &entry {
            Entry::Line { at, .. } => self.at = at.clone(),
            Entry::Gap(gap) => self.at = gap.at.clone(),
            Entry::Idle(_) | Entry::End(_) => {}
        }
        entry
    }

    async fn line(&mut self) -> String {
        match self.next().await {
            Entry::Line { line, .. } => line.message.clone(),
            other => panic!("expected a line: {other:?}"),
        }
    }

    async fn lines(&mut self, count: usize) -> Vec<String> {
        let mut lines = Vec::new();
        while lines.len() < count {
            lines.push(self.line().await);
        }
        lines
    }

    /// Why it ends, and what came before.
    async fn end(mut self) -> (Vec<String>, String) {
        let mut lines = Vec::new();
        loop {
            match self.next().await {
                Entry::Line { line, .. } => lines.push(line.message.clone()),
                Entry::End(why) => return (lines, why),
                other => panic!("expected lines and an end: {other:?}"),
            }
        }
    }
}

async fn until(is_so: impl Fn() -> bool) {
    let waiting = async {
        while !is_so() {
            tokio::task::yield_now().await;
        }
    };
    timeout(SOON, waiting).await.expect("it comes to that");
}

fn numbered(range: std::ops::Range<usize>) -> impl Iterator<Item = String> {
    range.map(|n| format!("line {n}"))
}

#[tokio::test]
async fn a_tail_gives_what_is_committed_from_now_on_and_all_tails_the_same() {
    let fleet = Fleet::start(|_| {}).await;
    let device = fleet.enrol("boiler-1").await;
    fleet.write(0, device, numbered(0..5)).await;
    let (mut one, mut other) = (fleet.tail(None).await, fleet.tail(None).await);
    for (writer, n) in (0..).zip((5..2_000).step_by(500)) {
        fleet.write(writer, device, numbered(n..n + 500)).await;
    }
    let expected = numbered(5..2_005).collect::<Vec<_>>();
    for tail in [&mut one, &mut other] {
        let mut lines = tail.lines(2_000).await;
        lines.sort_by_key(|line| line[5..].parse::<usize>().unwrap());
        assert_eq!(lines, expected);
    }
    drop((one, other));
    // The task that reads ends with the last tail, and another one begins with the next.
    until(|| !*fleet.feed.0.is_running.lock()).await;
    let mut again = fleet.tail(None).await;
    fleet.write(1, device, ["after".to_owned()]).await;
    assert_eq!(again.line().await, "after");
    assert_eq!(fleet.feed.0.metrics.lines.get(), 4_001);
}

#[tokio::test]
async fn a_tail_goes_on_where_another_one_ended_with_no_line_lost_or_twice() {
    let fleet = Fleet::start(|logs| logs.tail_queue_lines = 100).await;
    let device = fleet.enrol("boiler-1").await;
    let mut tail = fleet.tail(None).await;
    let mut seen = Vec::new();
    for round in 0..6_usize {
        // More than waits in one queue: whoever comes back is waited for.
        let from = round * 700;
        fleet.write(0, device, numbered(from..from + 300)).await;
        fleet.write(1, device, numbered(from + 300..from + 700)).await;
        tail = fleet.tail(Some(tail.at.clone())).await;
        if round == 0 {
            // Nothing was seen yet, so it begins with nothing.
            tail = fleet.tail(Some(Positions::default())).await;
        }
        seen.extend(tail.lines(500 + round).await);
    }
    let rest = 4_200 - seen.len();
    seen.extend(fleet.tail(Some(tail.at.clone())).await.lines(rest).await);
    seen.sort_by_key(|line| line[5..].parse::<usize>().unwrap());
    assert_eq!(seen, numbered(0..4_200).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_slow_reader_is_told_how_many_lines_it_missed_and_where() {
    let fleet = Fleet::start(|logs| logs.tail_queue_lines = 10).await;
    let device = fleet.enrol("boiler-1").await;
    let mut tail = fleet.tail(None).await;
    fleet.write(0, device, ["first".to_owned()]).await;
    assert_eq!(tail.line().await, "first");
    let line = |n: i64| format!(r#"{{"ts":{},"message":"line {n}"}}"#, NOW + n);
    fleet.write(0, device, (0..60).map(line)).await;
    let missed = || fleet.feed.0.metrics.missed.get();
    until(|| missed() >= 50).await;
    assert_eq!(tail.lines(10).await, numbered(0..10).collect::<Vec<_>>());
    let Entry::Gap(gap) = tail.next().await else { panic!("expected a gap") };
    let at = |n| crate::clock::from_ms(NOW + n);
    assert_eq!((gap.missed, gap.between), (Some(50), Some((at(10), at(59)))));
    assert_eq!(fleet.feed.0.metrics.gaps.with_label_values(&["slow"]).get(), 1);
    // From the end of the gap, nothing is there but what comes after it; from before it, all of it.
    let mut behind = fleet.tail(Some(gap.at)).await;
    fleet.write(0, device, ["last".to_owned()]).await;
    assert_eq!((tail.line().await, behind.line().await), ("last".to_owned(), "last".to_owned()));
}

#[tokio::test]
async fn long_lines_wait_within_a_bound_of_bytes() {
    let fleet = Fleet::start(|logs| logs.tail_queue_bytes = 4_096).await;
    let device = fleet.enrol("boiler-1").await;
    let mut tail = fleet.tail(None).await;
    fleet.write(0, device, ["first".to_owned()]).await;
    assert_eq!(tail.line().await, "first");
    fleet.write(0, device, (0..5).map(|n| format!("{n}{}", "x".repeat(5_000)))).await;
    let missed = || fleet.feed.0.metrics.missed.get();
    until(|| missed() >= 4).await;
    assert!(tail.line().await.starts_with('0'), "one line is given however long it is");
    assert!(matches!(tail.next().await, Entry::Gap(Gap { missed: Some(4), .. })));
}

#[tokio::test]
async fn whoever_comes_back_too_late_is_told_so_and_gets_the_last_lines() {
    let fleet = Fleet::start(|logs| logs.tail_replay_lines = 50).await;
    let device = fleet.enrol("boiler-1").await;
    fleet.write(0, device, numbered(0..500)).await;
    let mut tail = fleet.tail(Some(Positions::default())).await;
    assert!(matches!(tail.next().await, Entry::Gap(Gap { missed: None, between: None, .. })));
    assert_eq!(tail.lines(50).await, numbered(450..500).collect::<Vec<_>>());
    // A database that was restored knows nothing of places that were.
    let beyond = [(0, 10_000), (7, 3)].into_iter().collect();
    let mut tail = fleet.tail(Some(beyond)).await;
    fleet.write(0, device, ["next".to_owned()]).await;
    assert_eq!(tail.line().await, "next");
}

#[tokio::test]
async fn lines_of_other_tenants_are_not_told_of() {
    let fleet = Fleet::start(|logs| logs.tail_queue_lines = 1).await;
    let device = fleet.enrol("boiler-1").await;
    let other = sqlx::query_scalar("insert into tenant (id, created_at) values ('other', now()) returning key");
    let other = TenantKey(other.fetch_one(fleet.db.pool()).await.unwrap());
    let theirs = enrol(&mut fleet.db.pool().acquire().await.unwrap(), other, "boiler-1").await;
    let mut tail = fleet.tail(None).await;
    for round in 0..3 {
        // Neither a line nor a count of what was left out.
        fleet.write(0, theirs, (0..50).map(|n| format!("theirs {round} {n}"))).await;
        fleet.write(0, device, [format!("ours {round}")]).await;
        assert_eq!(tail.line().await, format!("ours {round}"));
    }
}

#[tokio::test]
async fn a_tail_ends_with_its_login_its_role_and_its_time() {
    for (sql, why) in [
        ("delete from login_session where user_id = $1", "its login has ended"),
        ("update app_user set role = null where id = $1", "this needs the permission logs:read"),
        ("update app_user set disabled = true where id = $1", "its user is gone or disabled"),
    ] {
        let fleet = Fleet::start(|_| {}).await;
        let device = fleet.enrol("boiler-1").await;
        let mut tail = fleet.tail(None).await;
        fleet.write(0, device, ["before".to_owned()]).await;
        assert_eq!(tail.line().await, "before");
        fleet.change(sql).await;
        fleet.write(0, device, ["after".to_owned()]).await;
        let (lines, end) = tail.end().await;
        assert!(end.contains(why) && lines.is_empty(), "{sql}: {end} {lines:?}");
        until(|| fleet.feed.0.metrics.tails.get() == 0).await;
    }
}

#[tokio::test]
async fn a_scope_holds_and_follows_the_devices_that_come_and_go() {
    let fleet = Fleet::start(|_| {}).await;
    let (inside, outside) = (fleet.enrol("inside").await, fleet.enrol("outside").await);
    fleet.change("update device set group_path = 'hall' where id = 'inside' and $1::uuid is not null").await;
    let mut db = fleet.db.pool().acquire().await.unwrap();
    sqlx::query(
        "insert into binding (id, tenant_key, user_id, role, scope, created_at)
         select gen_random_uuid(), tenant_key, id, 'viewer', '{\"kind\":\"group\",\"group\":\"hall\"}', now() from app_user",
    )
    .execute(&mut *db)
    .await
    .unwrap();
    fleet.change("update app_user set role = null where id = $1").await;
    drop(db);
    let mut tail = fleet.tail(None).await;
    let write = async |round: &str| {
        fleet.write(0, outside, [format!("outside {round}")]).await;
        fleet.write(0, inside, [format!("inside {round}")]).await;
    };
    write("1").await;
    assert_eq!(tail.line().await, "inside 1");
    fleet.change("update device set group_path = 'hall' where id = 'outside' and $1::uuid is not null").await;
    write("2").await;
    assert_eq!(tail.lines(2).await, ["outside 2", "inside 2"]);
    fleet.change("update device set group_path = null where id = 'inside' and $1::uuid is not null").await;
    write("3").await;
    write("4").await;
    assert_eq!(tail.lines(2).await, ["outside 3", "outside 4"]);
}

#[tokio::test]
async fn a_query_is_asked_of_each_line_and_follows_what_devices_are() {
    let fleet = Fleet::start(|_| {}).await;
    let mut request = fleet.request(None).await;
    let text = "(device:pump-* AND level:>=warn) OR type:fan";
    request.query = crate::log::query::read(text, fleet.feed.0.clock.now()).unwrap();
    let mut tail = Tailing { reader: fleet.feed.tail(request).await.unwrap(), at: Positions::default() };
    let fan = fleet.enrol("fan-1").await;
    let line = |level: &str, message: &str| format!(r#"{{"level":"{level}","message":"{message}"}}"#);
    fleet.write(0, fan, [line("info", "not yet a fan")]).await;
    // Enrolled after the tail began: its very first line counts.
    let pump = fleet.enrol("pump-1").await;
    fleet.write(0, pump, [line("info", "no"), line("error", "pump")]).await;
    assert_eq!(tail.line().await, "pump");
    fleet.change("update device set type = 'fan' where id = 'fan-1' and $1::uuid is not null").await;
    fleet.write(0, fan, [line("info", "fan")]).await;
    assert_eq!(tail.line().await, "fan");
}

#[tokio::test]
async fn there_are_only_so_many_tails() {
    let fleet = Fleet::start(|logs| (logs.max_tails, logs.max_tails_per_user) = (3, 2)).await;
    let one = fleet.tail(None).await;
    let two = fleet.tail(None).await;
    assert!(matches!(fleet.feed.tail(fleet.request(None).await).await, Err(Refused::FullOfUser)));
    drop(one);
    let another = fleet.tail(None).await;
    let strange = async || {
        let mut request = fleet.request(None).await;
        let crate::policy::Who::User { id, .. } = &mut request.principal.who else { panic!("a user") };
        *id = UserId::new();
        fleet.feed.tail(request).await
    };
    let third = strange().await.unwrap();
    assert!(matches!(strange().await, Err(Refused::Full)));
    fleet.feed.stop();
    let (lines, end) = another.end().await;
    assert_eq!((lines.len(), end.as_str()), (0, "the server stops"));
    drop((two, third));
    assert!(matches!(strange().await, Err(Refused::Full)), "a server that stops begins none");
}

#[test]
fn positions_are_sealed_for_their_tenant() {
    let dir = tempfile::tempdir().unwrap();
    let config = Config::from_sources(&Environment::default(), Some(HashMap::new())).unwrap();
    let pki = crate::authority::Pki::new(config.certificates, dir.path());
    let positions = [(0, 7), (3, i64::MAX), (-1, 9)].into_iter().collect::<Positions>();
    let text = positions.seal(&pki, TenantKey(1)).unwrap();
    assert_eq!(Positions::open(&text, &pki, TenantKey(1)).unwrap(), positions);
    assert!(Positions::open(&text, &pki, TenantKey(2)).is_err());
    for bad in ["", "x", "ä", &text[1..], &format!("{text}A"), &"A".repeat(10_000)] {
        assert!(Positions::open(bad, &pki, TenantKey(1)).is_err(), "{bad}");
    }
}
