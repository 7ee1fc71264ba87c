//! One honest device.
//!
//! Holds: every reading is taken and every log line written on schedule whether or not there is a connection, and is kept until the
//! server acknowledges it; after any failure it is sent again, the same. So nothing is lost when the server is killed. What it is asked
//! to do, it does ([`Memory`]), and answers; its answers are kept likewise.
//! Bounds: [`Setup::backlog`] readings in memory (further ones are not taken, and counted), [`link::WINDOW`] on the wire.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::ops::ControlFlow;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use rand::RngExt as _;
use rand_chacha::ChaCha8Rng;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio::time::{Instant, sleep, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::counters::{self, Counters, Online};
use crate::ledger::{Acknowledged, Entry};
use crate::line::Author;
use crate::link::{self, Happened, Version};
use crate::obey::{Memory, Reply};
use crate::reading::{Kind, Purpose, Reading, Sampler, randomness};
use crate::rest::Credential;
use crate::scenario::Faults;

const FIRMWARE: &str = "sim-1.0.0";
const WILL: &str = r#"{"state":"lost"}"#;
const FAREWELL: &str = r#"{"state":"offline"}"#;
/// First and longest pause before another attempt to connect; each is shortened at random by up to a half.
const PAUSES: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(5));
/// A reading that is held back lets at most so many later ones overtake it.
const MAX_LATE: u64 = 20;

/// What all devices of a fleet share.
pub(crate) struct Setup {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) seed: u64,
    pub(crate) payload_bytes: usize,
    /// From one reading of a device to the next.
    pub(crate) interval: Duration,
    /// From one log line of a device to the next; none: it writes none.
    pub(crate) line_interval: Option<Duration>,
    /// When the fleet started, by both clocks.
    pub(crate) start: Instant,
    pub(crate) start_ms: i64,
    /// No reading is due from here on.
    pub(crate) end: Option<Instant>,
    /// When the fleet was told to finish, if it was: nothing is due after that either.
    pub(crate) finished: Arc<OnceLock<Instant>>,
    /// Most unacknowledged readings a device keeps.
    pub(crate) backlog: usize,
    /// Most log lines a device keeps, sent or not.
    pub(crate) kept_lines: usize,
    pub(crate) faults: Faults,
    /// From one cut connection of a device to the next, on average.
    pub(crate) cut_every: Option<Duration>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) ledger: Option<mpsc::Sender<Acknowledged>>,
    /// Devices that connect at once: a listener's backlog is short.
    pub(crate) connecting: Semaphore,
    /// Take no more readings, deliver those there are, say good-bye.
    pub(crate) finish: CancellationToken,
    /// Stop at once.
    pub(crate) abort: CancellationToken,
}

/// A device and all it remembers from one connection to the next.
pub(crate) struct Device {
    index: u32,
    setup: Arc<Setup>,
    options: link::Options,
    version: Version,
    topic: Topics,
    birth: Bytes,
    sampler: Sampler,
    author: Author,
    memory: Memory,
    rng: ChaCha8Rng,
    /// Readings whose time has come, counted from the start.
    taken: u32,
    /// Lines likewise.
    written: u32,
    offset: Duration,
    /// Held back until the reading with that number has been taken.
    late: Vec<(u64, Reading)>,
    waiting: VecDeque<Reading>,
    replies: VecDeque<Reply>,
    /// Readings on the wire; here for the bound on memory.
    flying: usize,
    attempts: u32,
}

struct Topics {
    /// The device's own, with a slash at its end.
    base: String,
    status: String,
    telemetry: String,
    logs: String,
}

/// Why a connection ended.
enum Ended {
    /// Everything is delivered, or the fleet stops.
    Finished,
    /// Cut on purpose: connect again at once.
    Cut,
    /// Anything else: connect again after a pause.
    Failed,
}

/// What a publish on its way is.
enum Publish {
    Status,
    Farewell,
    Reading(Reading),
    Duplicate,
    Reply(Reply),
}

impl Device {
    pub(crate) fn new(index: u32, offset: Duration, id: &str, credential: Credential, setup: Arc<Setup>) -> Self {
        let tenant = credential.username.split('/').next().unwrap_or_default();
        let topic = |kind: &str| format!("fleet/v1/{tenant}/{id}/{kind}");
        let topic =
            Topics { base: topic(""), status: topic("status"), telemetry: topic("telemetry"), logs: topic("logs") };
        let options = link::Options {
            host: setup.host.clone(),
            port: setup.port,
            client_id: id.to_owned(),
            username: credential.username,
            password: credential.password,
            will_topic: topic.status.clone(),
            will: WILL,
        };
        let boot_id = uuid::Uuid::new_v4();
        Self {
            index,
            options,
            // Both versions of the protocol are exercised in every fleet.
            version: if index.is_multiple_of(2) { Version::V5 } else { Version::V3 },
            topic,
            birth: format!(r#"{{"state":"online","boot_id":"{boot_id}","firmware":"{FIRMWARE}"}}"#).into(),
            sampler: Sampler::new(setup.seed, index, setup.payload_bytes),
            author: Author::new(setup.seed, index),
            memory: Memory::new(setup.kept_lines),
            rng: randomness(setup.seed, index, Purpose::Faults),
            taken: 0,
            written: 0,
            offset,
            late: Vec::new(),
            waiting: VecDeque::new(),
            replies: VecDeque::new(),
            flying: 0,
            attempts: 0,
            setup,
        }
    }

    /// Lives until everything is delivered after `finish`, or until `abort`.
    pub(crate) async fn run(mut self) {
        let abort = self.setup.abort.clone();
        loop {
            let setup = self.setup.clone();
            let ended = tokio::select! {
                ended = self.connection(&setup) => ended,
                () = abort.cancelled() => return,
            };
            let pause = match ended {
                Ended::Finished => return,
                Ended::Cut => Duration::ZERO,
                Ended::Failed => self.pause(),
            };
            tokio::select! {
                () = sleep(pause) => {}
                () = abort.cancelled() => return,
            }
        }
    }

    /// Doubles from failure to failure.
    fn pause(&mut self) -> Duration {
        let (first, longest) = PAUSES;
        let pause = first.saturating_mul(1 << self.attempts.min(10)).min(longest);
        self.attempts += 1;
        pause.mul_f64(self.rng.random_range(0.5..1.0))
    }

    async fn connection(&mut self, setup: &Setup) -> Ended {
        let permit = setup.connecting.acquire().await.expect("the semaphore is never closed");
        let (sender, mut events) = link::open(self.version, &self.options);
        let cut_at = self.next_cut();
        let mut connection = Connection::new(self, sender, permit);
        loop {
            if let ControlFlow::Break(ended) = connection.advance() {
                return ended;
            }
            let next_due = connection.device.next_due();
            tokio::select! {
                event = events.next() => match event.unwrap_or_else(|| Err("the connection ended".into())) {
                    Ok(happened) => if let ControlFlow::Break(ended) = connection.on(happened).await { return ended },
                    Err(_) if connection.leaving => return Ended::Finished,
                    Err(reason) => {
                        setup.counters.failed(&reason);
                        return Ended::Failed;
                    }
                },
                () = until(next_due), if connection.online.is_some() => {}
                () = until(cut_at), if connection.online.is_some() && !connection.leaving => {
                    counters::add(&setup.counters.reconnects);
                    return Ended::Cut;
                }
                () = setup.finish.cancelled(), if !connection.finishing => connection.finishing = true,
            }
        }
    }

    /// Connections are cut as a Poisson process.
    fn next_cut(&mut self) -> Option<Instant> {
        let mean = self.setup.cut_every?;
        let wait = mean.mul_f64(-(1.0 - self.rng.random::<f64>()).ln());
        Instant::now().checked_add(wait)
    }

    /// When the next reading or line is due.
    fn next_due(&self) -> Option<Instant> {
        [self.next_reading(), self.next_line()].into_iter().flatten().min()
    }

    /// When the next reading is due, if one is still to be taken.
    fn next_reading(&self) -> Option<Instant> {
        self.before_the_end(self.setup.start + self.offset + self.setup.interval * self.taken)
    }

    /// When the next line is due, if one is still to be written.
    fn next_line(&self) -> Option<Instant> {
        let interval = self.setup.line_interval?;
        // Lines are spread over their own interval, as readings are over theirs.
        let offset = interval.mul_f64(self.offset.div_duration_f64(self.setup.interval));
        self.before_the_end(self.setup.start + offset + interval * self.written)
    }

    fn before_the_end(&self, due: Instant) -> Option<Instant> {
        let ends = [self.setup.end, self.setup.finished.get().copied()];
        let over = ends.into_iter().flatten().any(|end| due >= end);
        (!over).then_some(due)
    }

    /// Takes every reading that is due, with the time it was due: while a device waits for the network, it still measures.
    fn sample(&mut self) {
        let now = Instant::now();
        while let Some(due) = self.next_line().filter(|due| *due <= now) {
            self.written += 1;
            if let Some(ts_ms) = self.room_at(due) {
                let (level, line) = self.author.write(ts_ms);
                if self.memory.keep(level, &line) {
                    self.waiting.push_back(line);
                }
            }
        }
        while let Some(due) = self.next_reading().filter(|due| *due <= now) {
            self.taken += 1;
            let Some(ts_ms) = self.room_at(due) else { continue };
            let reading = self.sampler.take(ts_ms);
            let number = reading.seq;
            if self.rng.random_bool(self.setup.faults.late) {
                self.late.push((number + self.rng.random_range(1..=MAX_LATE), reading));
            } else {
                self.waiting.push_back(reading);
            }
            let (due, late) = self.late.drain(..).partition(|(release, _)| *release <= number);
            self.late = late;
            self.waiting.extend(due.into_iter().map(|(_, reading): (u64, Reading)| reading));
        }
    }
}

impl Device {
    /// The device's time at that moment, when there is room for one more.
    fn room_at(&self, due: Instant) -> Option<i64> {
        if self.waiting.len() + self.late.len() + self.flying >= self.setup.backlog {
            counters::add(&self.setup.counters.skipped);
            return None;
        }
        let since_start = due.duration_since(self.setup.start).as_millis();
        Some(self.setup.start_ms + i64::try_from(since_start).unwrap_or(i64::MAX / 2))
    }
}

async fn until(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// A device while it is connected, or tries to be.
struct Connection<'a> {
    device: &'a mut Device,
    sender: link::Sender,
    /// Given back when the connection is made.
    permit: Option<SemaphorePermit<'a>>,
    online: Option<Online>,
    /// Handed to the client, in order; not on the wire yet.
    handed: VecDeque<Publish>,
    on_wire: HashMap<u16, Publish>,
    duplicates: VecDeque<Bytes>,
    finishing: bool,
    /// The farewell is on its way.
    leaving: bool,
}

impl<'a> Connection<'a> {
    fn new(device: &'a mut Device, sender: link::Sender, permit: SemaphorePermit<'a>) -> Self {
        let finishing = device.setup.finish.is_cancelled();
        Self {
            device,
            sender,
            permit: Some(permit),
            online: None,
            handed: VecDeque::new(),
            on_wire: HashMap::new(),
            duplicates: VecDeque::new(),
            finishing,
            leaving: false,
        }
    }

    /// Takes what is due, sends what there is room for, and says good-bye when all is delivered.
    fn advance(&mut self) -> ControlFlow<Ended> {
        self.device.sample();
        if self.online.is_none() || self.leaving {
            return ControlFlow::Continue(());
        }
        if self.finishing {
            let late = self.device.late.drain(..).map(|(_, reading)| reading);
            self.device.waiting.extend(late);
        }
        self.fill()?;
        let idle = self.handed.is_empty() && self.on_wire.is_empty();
        if self.finishing && idle {
            self.leaving = true;
            self.publish(Publish::Farewell)?;
        }
        ControlFlow::Continue(())
    }

    fn fill(&mut self) -> ControlFlow<Ended> {
        while self.handed.len() + self.on_wire.len() < link::WINDOW {
            if let Some(reply) = self.device.replies.pop_front() {
                self.publish(Publish::Reply(reply))?;
            } else if let Some(reading) = self.device.waiting.pop_front() {
                self.device.flying += 1;
                self.publish(Publish::Reading(reading))?;
            } else if let Some(payload) = self.duplicates.pop_front() {
                counters::add(&self.device.setup.counters.duplicates);
                self.hand(Publish::Duplicate, payload)?;
            } else {
                break;
            }
        }
        ControlFlow::Continue(())
    }

    fn publish(&mut self, what: Publish) -> ControlFlow<Ended> {
        let counters = &self.device.setup.counters;
        match what {
            Publish::Status => self.hand(Publish::Status, self.device.birth.clone()),
            Publish::Farewell => self.hand(Publish::Farewell, Bytes::from_static(FAREWELL.as_bytes())),
            Publish::Reading(mut reading) => {
                counters::add(match (reading.first_sent, reading.kind) {
                    (Some(_), _) | (None, Kind::Uploaded(_)) => &counters.resent,
                    (None, Kind::Reading) => &counters.sent,
                    (None, Kind::Line) => &counters.lines_sent,
                });
                reading.first_sent.get_or_insert_with(std::time::Instant::now);
                let payload = reading.payload.clone();
                self.hand(Publish::Reading(reading), payload)
            }
            Publish::Reply(reply) => {
                let payload = reply.payload.clone();
                self.hand(Publish::Reply(reply), payload)
            }
            Publish::Duplicate => ControlFlow::Continue(()),
        }
    }

    fn hand(&mut self, what: Publish, payload: Bytes) -> ControlFlow<Ended> {
        let topics = &self.device.topic;
        let (topic, retain) = match &what {
            Publish::Status | Publish::Farewell => (Cow::Borrowed(topics.status.as_str()), true),
            Publish::Reading(Reading { kind: Kind::Line | Kind::Uploaded(_), .. }) => ((&*topics.logs).into(), false),
            Publish::Reading(_) | Publish::Duplicate => ((&*topics.telemetry).into(), false),
            Publish::Reply(reply) => (format!("{}{}", topics.base, reply.topic).into(), false),
        };
        let handed = self.sender.publish(&topic, retain, payload);
        // Before anything else, so that the reading goes back to the device if the connection ends here.
        self.handed.push_back(what);
        if handed { ControlFlow::Continue(()) } else { ControlFlow::Break(Ended::Failed) }
    }

    async fn on(&mut self, happened: Happened) -> ControlFlow<Ended> {
        match happened {
            Happened::Connected => {
                self.permit = None;
                self.device.attempts = 0;
                self.online = Some(Online::new(&self.device.setup.counters));
                self.publish(Publish::Status)?;
                let asks = ["commands/+/request", "shadow/update/delta"];
                let asks = asks.map(|topic| format!("{}{topic}", self.device.topic.base));
                if self.sender.subscribe(asks) { ControlFlow::Continue(()) } else { ControlFlow::Break(Ended::Failed) }
            }
            Happened::Sent(id) => {
                if let Some(publish) = self.handed.pop_front() {
                    self.on_wire.insert(id, publish);
                }
                ControlFlow::Continue(())
            }
            Happened::Acknowledged(id) => match self.on_wire.remove(&id) {
                Some(Publish::Reading(reading)) => self.acknowledged(reading).await,
                Some(Publish::Farewell) if self.sender.disconnect() => ControlFlow::Continue(()),
                Some(Publish::Farewell) => ControlFlow::Break(Ended::Finished),
                Some(Publish::Reply(_)) => {
                    counters::add(&self.device.setup.counters.answers);
                    ControlFlow::Continue(())
                }
                Some(Publish::Status | Publish::Duplicate) | None => ControlFlow::Continue(()),
            },
            Happened::Came { topic, payload } => {
                if let Some(topic) = topic.strip_prefix(&self.device.topic.base) {
                    let done = self.device.memory.take(topic, &payload);
                    self.device.replies.extend(done.reply);
                    self.device.waiting.extend(done.lines);
                }
                ControlFlow::Continue(())
            }
            Happened::Refused(reason) => {
                counters::add(&self.device.setup.counters.refused);
                self.device.setup.counters.failed(&reason);
                ControlFlow::Break(Ended::Failed)
            }
            Happened::Disconnected => ControlFlow::Break(Ended::Finished),
            Happened::Other => ControlFlow::Continue(()),
        }
    }

    async fn acknowledged(&mut self, reading: Reading) -> ControlFlow<Ended> {
        self.device.flying -= 1;
        let setup = &self.device.setup;
        match reading.kind {
            Kind::Reading => {}
            Kind::Line => {
                counters::add(&setup.counters.lines_acknowledged);
                return ControlFlow::Continue(());
            }
            Kind::Uploaded(upload) => {
                counters::add(&setup.counters.lines_uploaded);
                self.device.replies.extend(self.device.memory.acknowledged(upload));
                return ControlFlow::Continue(());
            }
        }
        counters::add(&setup.counters.acknowledged);
        if let Some(sent) = reading.first_sent {
            setup.counters.latency.record(sent.elapsed());
        }
        if let Some(ledger) = &setup.ledger {
            let entry = Entry { ts_ms: reading.ts_ms, seq: reading.seq };
            if ledger.send((self.device.index, entry)).await.is_err() {
                // The recorder has failed and says why at the end.
                setup.abort.cancel();
            }
        }
        if self.device.rng.random_bool(setup.faults.duplicates) && self.duplicates.len() < link::WINDOW {
            self.duplicates.push_back(reading.payload);
        }
        ControlFlow::Continue(())
    }
}

/// What was not acknowledged goes back to the device, oldest first.
impl Drop for Connection<'_> {
    fn drop(&mut self) {
        let unacknowledged = self.handed.drain(..).chain(self.on_wire.drain().map(|(_, publish)| publish));
        let mut readings = Vec::new();
        for publish in unacknowledged {
            match publish {
                Publish::Reading(reading) => readings.push(reading),
                Publish::Reply(reply) => self.device.replies.push_front(reply),
                Publish::Status | Publish::Farewell | Publish::Duplicate => {}
            }
        }
        readings.sort_unstable_by_key(|reading| std::cmp::Reverse(reading.seq));
        for reading in readings {
            self.device.waiting.push_front(reading);
        }
        self.device.flying = 0;
    }
}
