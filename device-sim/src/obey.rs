//! What a device does that it is asked to: log at another level, answer a ping, send lines that it has kept.
//!
//! Holds: a request that comes twice is done once and answered the same; an upload is answered once its lines are acknowledged. Whatever
//! else is desired of it in the shadow, it reports, being simulated. Bounds: [`MAX_ANSWERS`], [`MAX_UPLOADS`], and lines kept as
//! [`Memory::new`] is told. Ignorant of: the connection.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::line::Level;
use crate::reading::{Kind, Reading};

/// Answers that are remembered, for requests that come twice.
const MAX_ANSWERS: usize = 64;
/// Uploads at once.
const MAX_UPLOADS: usize = 4;

/// A message that the device has to send, below its own topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reply {
    pub(crate) topic: String,
    pub(crate) payload: Bytes,
}

impl Reply {
    fn new(topic: String, body: &Value) -> Self {
        Self { topic, payload: body.to_string().into() }
    }
}

/// What the device remembers of what it was asked, and of what it has written.
pub(crate) struct Memory {
    level: Level,
    /// The newest lines, whether they were sent or not.
    kept: VecDeque<Reading>,
    most: usize,
    /// By the ids of their commands.
    answers: VecDeque<(String, Reply)>,
    uploads: HashMap<u64, Upload>,
    begun: u64,
}

struct Upload {
    command: String,
    lines: usize,
    unacknowledged: usize,
}

#[derive(Deserialize)]
struct Delta {
    state: Map<String, Value>,
}

#[derive(Deserialize)]
struct Request {
    name: String,
    #[serde(default)]
    params: Value,
}

/// Which lines are to be uploaded.
#[derive(Deserialize)]
struct Filter {
    from: Option<i64>,
    to: Option<i64>,
    level: Option<Level>,
    contains: Option<String>,
    max_lines: Option<usize>,
}

/// What a filter looks at.
#[derive(Deserialize)]
struct Line {
    level: Level,
    message: String,
}

/// What is to be done about a message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) reply: Option<Reply>,
    /// Lines to be sent.
    pub(crate) lines: Vec<Reading>,
}

impl Memory {
    /// Of a device that keeps at most so many lines.
    pub(crate) fn new(most: usize) -> Self {
        let (kept, answers, uploads) = (VecDeque::new(), VecDeque::new(), HashMap::new());
        Self { level: Level::default(), kept, most, answers, uploads, begun: 0 }
    }

    /// Keeps a line; whether it is to be sent.
    pub(crate) fn keep(&mut self, level: Level, line: &Reading) -> bool {
        if self.kept.len() == self.most {
            self.kept.pop_front();
        }
        self.kept.push_back(line.clone());
        level >= self.level
    }

    /// Takes a message whose topic, below the device's own, is this.
    pub(crate) fn take(&mut self, topic: &str, payload: &[u8]) -> Done {
        if topic == "shadow/update/delta" {
            let delta = serde_json::from_slice::<Delta>(payload);
            return Done { reply: delta.ok().map(|delta| self.follow(delta.state)), lines: Vec::new() };
        }
        let command = topic.strip_prefix("commands/").and_then(|rest| rest.strip_suffix("/request"));
        command.map_or_else(Done::default, |command| self.command(command, payload))
    }

    /// Does what is desired, and says so. What it cannot do, it does not report.
    fn follow(&mut self, mut desired: Map<String, Value>) -> Reply {
        if let Some(log) = desired.get_mut("log") {
            let level = log.get("level").unwrap_or(&Value::Null);
            match serde_json::from_value::<Option<Level>>(level.clone()) {
                Ok(level) => {
                    self.level = level.unwrap_or_default();
                    let mut now = log.as_object().cloned().unwrap_or_default();
                    now.insert("level".to_owned(), json!(self.level));
                    *log = Value::Object(now);
                }
                Err(_) => {
                    log.as_object_mut().and_then(|log| log.remove("level"));
                }
            }
        }
        Reply::new("shadow/update".to_owned(), &json!({ "state": { "reported": desired } }))
    }

    fn command(&mut self, id: &str, payload: &[u8]) -> Done {
        if let Some((_, answer)) = self.answers.iter().find(|(known, _)| known == id) {
            return Done { reply: Some(answer.clone()), lines: Vec::new() };
        }
        if self.uploads.values().any(|upload| upload.command == id) {
            return Done::default();
        }
        let refuse = |why: &str| json!({ "status": "rejected", "error": why });
        let answer = match serde_json::from_slice::<Request>(payload) {
            Err(error) => refuse(&error.to_string()),
            Ok(Request { name, .. }) if name == "ping" => json!({ "status": "succeeded", "result": { "pong": true } }),
            Ok(Request { name, .. }) if name == "log.upload" && self.uploads.len() == MAX_UPLOADS => {
                refuse("busy with other uploads: expected to be asked again later")
            }
            Ok(Request { name, params }) if name == "log.upload" => match serde_json::from_value::<Filter>(params) {
                Err(error) => refuse(&format!("params: {error}")),
                Ok(filter) => {
                    let lines = self.upload(id, &filter);
                    if !lines.is_empty() {
                        return Done { reply: None, lines };
                    }
                    uploaded(0)
                }
            },
            Ok(Request { name, .. }) => refuse(&format!("{name:?} is not known: expected ping or log.upload")),
        };
        Done { reply: Some(self.answer(id, &answer)), lines: Vec::new() }
    }

    /// The newest lines that answer a filter, oldest first.
    fn upload(&mut self, command: &str, filter: &Filter) -> Vec<Reading> {
        let number = self.begun;
        let most = filter.max_lines.unwrap_or(usize::MAX);
        let wanted = self.kept.iter().rev().filter(|line| filter.takes(line)).take(most);
        let upload = |line: &Reading| Reading { kind: Kind::Uploaded(number), first_sent: None, ..line.clone() };
        let mut lines = wanted.map(upload).collect::<Vec<_>>();
        lines.reverse();
        if !lines.is_empty() {
            let (command, lines) = (command.to_owned(), lines.len());
            self.uploads.insert(number, Upload { command, lines, unacknowledged: lines });
            self.begun += 1;
        }
        lines
    }

    /// A line of an upload was acknowledged; the last of them makes the answer.
    pub(crate) fn acknowledged(&mut self, upload: u64) -> Option<Reply> {
        let under_way = self.uploads.get_mut(&upload)?;
        under_way.unacknowledged -= 1;
        if under_way.unacknowledged > 0 {
            return None;
        }
        let Upload { command, lines, .. } = self.uploads.remove(&upload)?;
        Some(self.answer(&command, &uploaded(lines)))
    }

    fn answer(&mut self, id: &str, body: &Value) -> Reply {
        let reply = Reply::new(format!("commands/{id}/response"), body);
        if self.answers.len() == MAX_ANSWERS {
            self.answers.pop_front();
        }
        self.answers.push_back((id.to_owned(), reply.clone()));
        reply
    }
}

fn uploaded(lines: usize) -> Value {
    json!({ "status": "succeeded", "result": { "lines": lines } })
}

impl Filter {
    fn takes(&self, line: &Reading) -> bool {
        let in_time = self.from.is_none_or(|from| line.ts_ms >= from) && self.to.is_none_or(|to| line.ts_ms < to);
        in_time
            && serde_json::from_slice::<Line>(&line.payload).is_ok_and(|Line { level, message }| {
                self.level.is_none_or(|least| level >= least)
                    && self.contains.as_ref().is_none_or(|text| message.contains(text.as_str()))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::line::Author;

    fn body(reply: &Reply) -> Value {
        serde_json::from_slice(&reply.payload).unwrap()
    }

    fn ask(memory: &mut Memory, id: &str, request: &Value) -> Done {
        memory.take(&format!("commands/{id}/request"), request.to_string().as_bytes())
    }

    fn told(memory: &mut Memory, state: &Value) -> Value {
        let done = memory.take("shadow/update/delta", json!({ "state": state, "version": 3 }).to_string().as_bytes());
        let reply = done.reply.unwrap();
        assert_eq!(reply.topic, "shadow/update");
        body(&reply)["state"]["reported"].clone()
    }

    /// One that has written so many lines, a second apart.
    fn wrote(most: usize, lines: i64) -> (Memory, Vec<Level>) {
        let (mut memory, mut author) = (Memory::new(most), Author::new(7, 1));
        let levels = (0..lines).map(|second| {
            let (level, line) = author.write(second * 1000);
            assert_eq!(memory.keep(level, &line), level >= Level::Info);
            level
        });
        let levels = levels.collect();
        (memory, levels)
    }

    #[test]
    fn a_level_is_followed_and_given_up_and_what_is_no_level_is_not_reported() {
        let mut memory = Memory::new(9);
        assert_eq!(told(&mut memory, &json!({ "log": { "level": "debug" } })), json!({ "log": { "level": "debug" } }));
        assert_eq!(memory.level, Level::Debug);
        let odd = json!({ "log": { "level": "loud", "to": "flash" }, "fan": 3 });
        assert_eq!(told(&mut memory, &odd), json!({ "log": { "to": "flash" }, "fan": 3 }));
        assert_eq!(memory.level, Level::Debug);
        for default in [json!({ "log": { "level": null } }), json!({ "log": null })] {
            memory.level = Level::Fatal;
            assert_eq!(told(&mut memory, &default), json!({ "log": { "level": "info" } }));
            assert_eq!(memory.level, Level::Info);
        }
        assert_eq!(memory.take("shadow/update/delta", b"no JSON"), Done::default());
    }

    #[test]
    fn a_request_is_answered_the_same_however_often_it_comes_and_a_strange_one_is_rejected() {
        let mut memory = Memory::new(9);
        let pong = ask(&mut memory, "1", &json!({ "name": "ping" })).reply.unwrap();
        assert_eq!(pong.topic, "commands/1/response");
        assert_eq!(body(&pong), json!({ "status": "succeeded", "result": { "pong": true } }));
        assert_eq!(ask(&mut memory, "1", &json!({ "name": "reboot" })).reply, Some(pong), "it is the same command");
        for strange in
            [json!({ "name": "reboot" }), json!({}), json!({ "name": "log.upload", "params": { "level": 7 } })]
        {
            memory.answers.clear();
            assert_eq!(body(&ask(&mut memory, "2", &strange).reply.unwrap())["status"], "rejected", "{strange}");
        }
        for id in 0..2 * MAX_ANSWERS {
            ask(&mut memory, &format!("x{id}"), &json!({ "name": "ping" }));
        }
        assert_eq!(memory.answers.len(), MAX_ANSWERS);
    }

    #[test]
    fn an_upload_sends_what_was_kept_and_is_answered_when_all_of_it_is_acknowledged() {
        let (mut memory, levels) = wrote(100, 300);
        let upload = |params: Value| json!({ "name": "log.upload", "params": params });
        let all = ask(&mut memory, "1", &upload(json!({ "max_lines": 1000 })));
        assert_eq!((all.reply, all.lines.len()), (None, 100), "as many as it keeps");
        assert!(all.lines.iter().map(|line| line.seq).eq(201..=300), "oldest first");
        assert_eq!(ask(&mut memory, "1", &upload(json!({}))), Done::default(), "it is under way");
        let mut replies = all.lines.iter().map(|line| match line.kind {
            Kind::Uploaded(upload) => memory.acknowledged(upload),
            _ => panic!("a line of an upload"),
        });
        let last = replies.by_ref().last().unwrap().unwrap();
        assert_eq!(body(&last), json!({ "status": "succeeded", "result": { "lines": 100 } }));
        drop(replies);
        assert_eq!(ask(&mut memory, "1", &upload(json!({}))).reply, Some(last), "it is done");
        let some = ask(&mut memory, "2", &upload(json!({ "from": 250_000, "to": 290_000, "level": "warn" }))).lines;
        let wanted = (250..290).filter(|at| levels[*at] >= Level::Warn).map(|at| at as u64 + 1);
        assert!(some.iter().map(|line| line.seq).eq(wanted), "{some:?}");
        let newest = ask(&mut memory, "3", &upload(json!({ "contains": "published", "max_lines": 3 }))).lines;
        assert_eq!(newest.len(), 3);
        let none = ask(&mut memory, "4", &upload(json!({ "contains": "no such line" }))).reply.unwrap();
        assert_eq!(body(&none)["result"]["lines"], 0);
        for id in 5..7 {
            assert_eq!(ask(&mut memory, &format!("{id}"), &upload(json!({}))).lines.len(), 100);
        }
        let busy = ask(&mut memory, "7", &upload(json!({}))).reply.unwrap();
        assert_eq!(body(&busy)["status"], "rejected");
    }
}
