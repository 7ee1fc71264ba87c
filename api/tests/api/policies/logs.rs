//! The search filter: whatever is asked of log lines is answered from those of the devices whose logs the evaluator lets the caller
//! read, and from no others.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{Device, Dice, POLICIES, Policy, Role, Scope, World};
use crate::harness::{NOON_MS, Reply, escaped};
use crate::logs::{Events, SOON, write};

/// Whoever reads logs at all may read its lines. It writes last, so who was told of them was told of all before.
const BELL: &str = "bell";
/// A word for each device that stands in all of its lines: no two devices share a pattern.
const WORDS: [&str; 11] = ["alder", "birch", "cedar", "elm", "fir", "hazel", "larch", "maple", "oak", "pine", "willow"];
const SAID: [&str; 3] = ["stalled", "restarted", "idled"];
const LEVELS: [&str; 3] = ["debug", "info", "error"];
const LINES_EACH: usize = 6;
/// Lines stand so far apart, over two days: each is alone in its minute.
const APART_MS: i64 = 13 * 60_000;

/// A line: of which device, and the number by which it is known.
#[derive(Debug)]
struct Line {
    device: usize,
    seq: i64,
    said: &'static str,
    level: &'static str,
}

impl Line {
    fn ts_ms(&self) -> i64 {
        NOON_MS - APART_MS * (self.seq + 1)
    }

    /// What its message has in common with others.
    fn pattern(&self) -> String {
        format!("{} {} *", WORDS[self.device], self.said)
    }

    fn body(&self, device: &Device) -> Value {
        let message = self.pattern().replace('*', &self.seq.to_string());
        let fields = json!({ "who": device.id });
        json!({ "ts": self.ts_ms(), "seq": self.seq, "level": self.level, "message": message, "fields": fields })
    }
}

/// Which lines are asked for.
#[derive(Debug, Default)]
struct Question {
    about: Option<Scope>,
    /// A word, and whether `NOT` stands before it.
    said: Option<(&'static str, bool)>,
}

impl Question {
    fn any(dice: &mut Dice) -> Self {
        let about = (dice.below(3) > 0).then(|| Scope::selector(dice));
        let said = (dice.below(3) > 0).then(|| (dice.pick(&SAID), dice.below(2) == 0));
        Self { about, said }
    }

    fn text(&self) -> String {
        let about = self.about.as_ref().map(|scope| format!("({})", scope.text()));
        let said = self.said.map(|(word, not)| if not { format!("NOT {word}") } else { word.to_owned() });
        let all = [about, said].into_iter().flatten().collect::<Vec<_>>();
        if all.is_empty() { "*".into() } else { all.join(" AND ") }
    }

    fn asks_for(&self, line: &Line, device: &Device) -> bool {
        let is_about = self.about.as_ref().is_none_or(|scope| scope.holds(device));
        is_about && self.said.is_none_or(|(word, not)| (line.said == word) != not)
    }
}

/// Who asks, and what comes back by each way of asking.
struct Asker<'a> {
    world: &'a World,
    token: &'a str,
    question: String,
}

/// Device and number of each line.
type Told = Vec<(String, i64)>;

const WAYS: [&str; 7] =
    ["search", "histogram?interval=1m", "top?field=device", "top?field=fields.who", "patterns", "export", "tail"];

impl Asker<'_> {
    fn path(&self, way: &str) -> String {
        let sign = if way.contains('?') { '&' } else { '?' };
        format!("/api/v1/logs/{way}{sign}q={}", escaped(&self.question))
    }

    async fn ask(&self, way: &str) -> Reply {
        self.world.api.as_who(self.token, "GET", &self.path(way)).send().await
    }

    async fn items(&self, way: &str) -> Vec<Value> {
        let Value::Array(items) = self.ask(way).await.expect(200).body["items"].take() else { panic!("no items") };
        items
    }

    async fn exported(&self) -> Told {
        let text = self.ask("export").await.expect(200).text;
        let mut lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>();
        let end = lines.pop().unwrap();
        assert_eq!(end, json!({ "lines": lines.len(), "complete": true }));
        lines.iter().map(told).collect()
    }

    /// Lines by the values of a member of what is answered.
    async fn counts(&self, way: &str, member: &str) -> BTreeMap<String, u64> {
        let items = self.items(way).await;
        let counts =
            items.iter().map(|item| (item[member].as_str().unwrap().to_owned(), item["count"].as_u64().unwrap()));
        counts.collect()
    }

    /// A tail of what is asked for and the bell, after that event or from now on.
    async fn tail(&self, after: Option<&str>) -> Events {
        let path = self.path("tail") + &escaped(&format!(" OR device:{BELL}"));
        let ask = self.world.api.as_who(self.token, "GET", &path);
        Events::open(if let Some(id) = after { ask.header("last-event-id", id) } else { ask }).await
    }

    /// Each way of asking but the tail gives those lines, in the order of time.
    async fn is_answered_with(&self, lines: &[&Line], devices: &[Device], why: &str) {
        let id = |line: &Line| devices[line.device].id.clone();
        let oldest = lines.iter().map(|line| (id(line), line.seq)).rev().collect::<Told>();
        let newest = oldest.iter().rev().cloned().collect::<Told>();
        let found = self.items("search?limit=1000").await;
        assert_eq!(found.iter().map(told).collect::<Told>(), newest, "search {why}");
        assert_eq!(self.exported().await, oldest, "export {why}");
        let stretches = self.items("histogram?interval=1m").await;
        let stretches = stretches.iter().map(|item| (time_ms(&item["ts"]), item["levels"].clone())).collect::<Vec<_>>();
        let expected = lines.iter().rev().map(|line| (line.ts_ms(), json!({ (line.level): 1 }))).collect::<Vec<_>>();
        assert_eq!(stretches, expected, "histogram {why}");
        for field in ["device", "fields.who"] {
            let values = self.counts(&format!("top?size=1000&field={field}"), "value").await;
            assert_eq!(values, counted(lines, id), "top values of {field} {why}");
        }
        let patterns = self.counts("patterns?size=1000", "text").await;
        assert_eq!(patterns, counted(lines, Line::pattern), "patterns {why}");
    }
}

fn told(line: &Value) -> (String, i64) {
    (line["device"].as_str().unwrap().to_owned(), line["seq"].as_i64().unwrap())
}

fn time_ms(ts: &Value) -> i64 {
    ts.as_str().unwrap().parse::<DateTime<Utc>>().unwrap().timestamp_millis()
}

fn counted(lines: &[&Line], by: impl Fn(&Line) -> String) -> BTreeMap<String, u64> {
    lines.iter().fold(BTreeMap::new(), |mut counts, line| {
        *counts.entry(by(line)).or_default() += 1;
        counts
    })
}

/// What a tail gives, up to the bell.
async fn until_the_bell(mut tail: Events) -> Told {
    let mut all = Told::new();
    let listening = async {
        while all.last().is_none_or(|(device, _)| device != BELL) {
            all.push(told(&tail.line().await.data));
        }
    };
    let is_heard = timeout(SOON, listening).await.is_ok();
    assert!(is_heard, "no bell, only {all:?}");
    all
}

impl World {
    /// The bell is the last of the devices.
    async fn hang_bell(&mut self) -> Role {
        let bell = Device { id: BELL.into(), group: None, kind: Some(BELL), site: None };
        self.api.post("/api/v1/devices", bell.body()).await.expect(201);
        self.devices.push(bell);
        let role = Role { id: "listener".into(), permissions: ["logs:read"].into(), allows: None, denies: None };
        self.api.post("/api/v1/roles", role.body()).await.expect(201);
        role
    }

    /// Who reads some logs reads those of the bell too.
    async fn hear_bell(&self, policy: &mut Policy, who: &str, role: &Role) {
        let scope = Scope::Selector(vec![vec![("type", BELL, false)]]);
        let binding = json!({ "user": who, "role": role.id, "scope": scope.body() });
        self.api.post("/api/v1/bindings", binding).await.expect(201);
        policy.0.push((role.clone(), scope));
    }

    /// Has all devices write, in turn, and the bell once, when all the others have.
    async fn written(&self, dice: &mut Dice, from: i64) -> Vec<Line> {
        let bell = self.devices.len() - 1;
        let writers = (0..LINES_EACH).flat_map(|_| 0..bell).chain([bell]);
        let any = |(device, seq)| Line { device, seq, said: dice.pick(&SAID), level: dice.pick(&LEVELS) };
        let lines = writers.zip(from..).map(any).collect::<Vec<_>>();
        for line in &lines {
            let device = &self.devices[line.device];
            write(&self.api, &device.id, &[line.body(device)]).await;
        }
        lines
    }

    /// Those of the lines that `policy` lets be read and for which `is_asked` holds, in the order in which they were written.
    fn readable<'a>(
        &self,
        lines: &'a [Line],
        policy: &Policy,
        is_asked: impl Fn(&Line, &Device) -> bool,
    ) -> Vec<&'a Line> {
        let is_told = |line: &&Line| {
            let device = &self.devices[line.device];
            policy.may("logs:read", device) && is_asked(line, device)
        };
        lines.iter().filter(is_told).collect()
    }

    /// What a tail that asks so gives.
    fn heard(&self, lines: &[Line], policy: &Policy, question: &Question) -> Told {
        let is_asked = |line: &Line, device: &Device| device.id == BELL || question.asks_for(line, device);
        let lines = self.readable(lines, policy, is_asked);
        lines.into_iter().map(|line| (self.devices[line.device].id.clone(), line.seq)).collect()
    }
}

#[tokio::test]
async fn whatever_is_asked_of_logs_is_answered_from_the_lines_that_one_may_read() {
    let mut dice = Dice(6);
    let mut world = World::new(&mut dice).await;
    let listener = world.hang_bell().await;
    let start = Events::open(world.api.ask("GET", "/api/v1/logs/tail")).await.began;
    let lines = world.written(&mut dice, 0).await;
    world.api.index().await;
    let all = world.api.get("/api/v1/logs/search?limit=1000").await.expect(200).body;
    let ids = all["items"].as_array().unwrap().iter().map(|line| (told(line).1, line["id"].as_str().unwrap()));
    let ids = ids.collect::<BTreeMap<_, _>>();
    assert_eq!(ids.len(), lines.len());
    let (mut readers, mut refused, mut seen, mut hidden) = (Vec::new(), 0, 0, 0);
    for number in 0..POLICIES {
        let (mut policy, who, token) = world.user(&mut dice, number).await;
        let question = Question::any(&mut dice);
        let asker = |question: &Question| Asker { world: &world, token: &token, question: question.text() };
        if !policy.may_at_all("logs:read") {
            for way in WAYS {
                asker(&question).ask(way).await.problem(403, "forbidden");
            }
            refused += 1;
            continue;
        }
        world.hear_bell(&mut policy, &who, &listener).await;
        for question in [&Question::default(), &question] {
            let why = format!("of {} by {:?}", question.text(), policy.0);
            let readable = world.readable(&lines, &policy, |line, device| question.asks_for(line, device));
            let asker = asker(question);
            asker.is_answered_with(&readable, &world.devices, &why).await;
            let heard = until_the_bell(asker.tail(Some(&start)).await).await;
            assert_eq!(heard, world.heard(&lines, &policy, question), "a resumed tail {why}");
            seen += readable.len();
            hidden += lines.len() - readable.len();
        }
        let line = &lines[dice.below(lines.len())];
        let device = &world.devices[line.device];
        let context = format!("/api/v1/logs/context?id={}", ids[&line.seq]);
        let status = world.api.as_who(&token, "GET", &context).send().await.status.as_u16();
        let may = policy.may("logs:read", device);
        assert_eq!(status, if may { 200 } else { 404 }, "{context} of {device:?} by {:?}", policy.0);
        assert_eq!(world.check(&who, "logs:read", &device.id).await, may, "{device:?} {:?}", policy.0);
        readers.push((policy, question, token));
    }
    assert!(
        seen > 200 && hidden > 200 && refused > 5,
        "{seen} seen, {hidden} hidden, {refused} refused: that proves little"
    );
    // What is committed while they tail.
    let mut tails = Vec::new();
    for (_, question, token) in &readers {
        tails.push(Asker { world: &world, token, question: question.text() }.tail(None).await);
    }
    let lines = world.written(&mut dice, 100).await;
    for (tail, (policy, question, _)) in tails.into_iter().zip(&readers) {
        let heard = until_the_bell(tail).await;
        assert_eq!(heard, world.heard(&lines, policy, question), "a tail of {} by {:?}", question.text(), policy.0);
    }
}
