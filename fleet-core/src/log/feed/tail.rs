//! One tail: takes what the feed hands it, or reads the rows itself, and keeps what its caller asks for and may see.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use sqlx::PgConnection;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval};

use super::outbox::{Bounds, Given, Outbox, Reader};
use super::{AGAIN, Chunk, Line, Permit, Positions, Read, Shared, look, next_lines};
use crate::config::Secret;
use crate::error::{Error, Result};
use crate::id::{DeviceKey, UserId};
use crate::log::query::Query;
use crate::policy::{Permission, Principal, Who};
use crate::tenancy::{self, Bounds as Within};
use crate::{query, token};

/// What it takes to see lines.
const RIGHT: Permission = Permission::LogsRead;
/// How often it is looked whether the token has expired.
const TICK: Duration = Duration::from_millis(250);
/// How often rights are looked at although nobody has said that they changed.
const RECHECK_EVERY: Duration = Duration::from_secs(5);
/// How often it is looked which devices are wanted, when that depends on what they say.
const LOOK_UP_EVERY: Duration = Duration::from_secs(1);
/// Longest statement for one tail.
const WITHIN: Duration = Duration::from_secs(10);
/// Devices of which is remembered whether they may be seen; with one more, all are asked for again.
const MAX_DEVICES: usize = 100_000;

/// What a tail is to give.
pub struct Request {
    /// Who asks.
    pub principal: Principal,
    /// The access token or API key by which that is known.
    pub bearer: Secret,
    /// Which lines; what it asks of devices is asked as they are when the line is given.
    pub query: query::Query,
    /// Behind which positions; without any, what is committed from now on.
    pub after: Option<Positions>,
}

impl std::fmt::Debug for Request {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Request").field("after", &self.after).finish_non_exhaustive()
    }
}

impl Request {
    /// Among whose tails it counts: one of an API key is its user's.
    pub(super) fn user(&self) -> UserId {
        if let Who::User { id, .. } = self.principal.who { id } else { UserId::default() }
    }
}

/// Begins a tail, whose task ends with the reader.
pub(super) async fn begin(
    shared: Arc<Shared>,
    chunks: broadcast::Receiver<Arc<Chunk>>,
    request: Request,
    mut permit: Permit,
) -> Result<Reader> {
    let Request { principal, bearer, query, after } = request;
    let mut epoch = shared.epoch.subscribe();
    // Rights may have changed between the look at them and this moment.
    epoch.mark_changed();
    let (_, last) = look(&mut *shared.db.acquire().await?).await?;
    permit.serve();
    let at = after.map_or_else(|| last.clone(), |after| after.within(&last));
    let bounds = Bounds { lines: shared.settings.tail_queue_lines, bytes: shared.settings.tail_queue_bytes };
    let (outbox, reader) = Outbox::new(bounds, permit);
    outbox.seen(&at);
    let (behind, seen, checked) = (Some(last), HashMap::new(), Instant::now());
    let wanted = None;
    let tail = Tail { shared, principal, bearer, query, wanted, at, behind, read: None, outbox, seen, checked };
    tokio::spawn(tail.run(chunks, epoch));
    Ok(reader)
}

/// Why a tail ends.
enum Ended {
    /// Nobody reads it.
    Left,
    /// It may not go on; the text says why.
    Refused(String),
}

struct Tail {
    shared: Arc<Shared>,
    principal: Principal,
    bearer: Secret,
    query: query::Query,
    /// The query with the devices it speaks of, and when they were looked up.
    wanted: Option<(Query, Instant)>,
    /// Up to where everything was looked at.
    at: Positions,
    /// Up to where the rows are to be read, since the feed has not handed them over.
    behind: Option<Positions>,
    /// What was read of them, and waits for room.
    read: Option<Read>,
    outbox: Arc<Outbox>,
    /// Devices that were there when it was last looked which of them are wanted, and whether the caller may see them.
    seen: HashMap<DeviceKey, bool>,
    /// When the rights were looked at.
    checked: Instant,
}

impl Tail {
    async fn run(mut self, mut chunks: broadcast::Receiver<Arc<Chunk>>, mut epoch: watch::Receiver<i64>) {
        let (outbox, stop) = (self.outbox.clone(), self.shared.stop.clone());
        let ended = tokio::select! {
            () = outbox.left() => Ended::Left,
            () = stop.cancelled() => Ended::Refused("the server stops".into()),
            ended = self.follow(&mut chunks, &mut epoch) => ended,
        };
        if let Ended::Refused(why) = ended {
            outbox.end(why);
        }
    }

    async fn follow(
        &mut self,
        chunks: &mut broadcast::Receiver<Arc<Chunk>>,
        epoch: &mut watch::Receiver<i64>,
    ) -> Ended {
        let outbox = self.outbox.clone();
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            if let Some(ended) = self.keep_up(epoch).await {
                return ended;
            }
            if self.behind.is_some() && !self.waits_for_room() {
                if let Err(error) = self.catch_up().await {
                    tracing::debug!(%error, "a tail waits for the database");
                    tokio::time::sleep(AGAIN).await;
                }
                continue;
            }
            tokio::select! {
                _ = epoch.changed() => epoch.mark_changed(),
                _ = tick.tick() => {}
                () = outbox.taken(), if self.behind.is_some() => {}
                chunk = chunks.recv(), if self.behind.is_none() => match chunk {
                    Ok(chunk) => {
                        if let Some(ended) = self.keep_up(epoch).await {
                            return ended;
                        }
                        self.take(&chunk).await;
                    }
                    // The next one that is there begins further on, which shows what is missing.
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return Ended::Left,
                },
            }
        }
    }

    /// What was committed after rights have changed is not looked at before they are: the feed tells of the change first.
    async fn keep_up(&mut self, epoch: &mut watch::Receiver<i64>) -> Option<Ended> {
        let has_changed = epoch.has_changed().unwrap_or(false);
        epoch.mark_unchanged();
        self.check(has_changed).await
    }

    /// Looks at the rights again, if they may have changed.
    async fn check(&mut self, has_changed: bool) -> Option<Ended> {
        let now = self.shared.clock.now();
        let has_expired = self.principal.proof.valid_until.is_some_and(|until| now >= until);
        if !has_changed && !has_expired && self.checked.elapsed() < RECHECK_EVERY {
            return None;
        }
        loop {
            let asked = async {
                let mut db = self.shared.db.acquire().await?;
                token::principal(&mut db, &self.shared.keys, self.bearer.expose(), now).await
            };
            match asked.await {
                Ok(principal) if principal.may(RIGHT) => {
                    self.principal = principal;
                    (self.wanted, self.seen) = (None, HashMap::new());
                    // What was read and not given is read again.
                    self.read = None;
                    self.checked = Instant::now();
                    return None;
                }
                Ok(_) => return Some(Ended::Refused(format!("this needs the permission {}", RIGHT.name()))),
                // Nothing is given out until it is known.
                Err(Error::Database(error)) => tracing::debug!(%error, "the rights of a tail cannot be looked at"),
                Err(error) => return Some(Ended::Refused(error.to_string())),
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    /// A chunk of the feed. When there is something missing before it, or it cannot be looked at, all that is read from the rows.
    async fn take(&mut self, chunk: &Chunk) {
        let is_next = self.at.covers(&chunk.from);
        if is_next && self.learn(&chunk.lines).await.is_ok() {
            for line in &chunk.lines {
                self.give(line);
            }
            self.at.merge(&chunk.upto);
            self.outbox.seen(&self.at);
        } else {
            self.behind = Some(chunk.upto.clone());
        }
    }

    fn waits_for_room(&self) -> bool {
        let next = self.read.as_ref().and_then(|read| read.lines.first());
        next.is_some_and(|line| !self.outbox.has_room(line))
    }

    /// Goes on reading the rows; a reader that is slow is waited for. When there are too many, only the last of them.
    async fn catch_up(&mut self) -> Result<()> {
        let Some(upto) = self.behind.clone() else { return Ok(()) };
        let Some(mut read) = self.read.take() else {
            let most = self.shared.settings.tail_replay_lines;
            if self.at.behind(&upto) > most {
                self.at = self.at.at_most_behind(&upto, most);
                self.shared.metrics.gaps.with_label_values(&["late"]).inc();
                self.outbox.gap(&self.at);
            }
            let mut db = self.shared.db.acquire().await?;
            self.read = next_lines(&mut db, &self.at, &upto).await?;
            if self.read.is_none() {
                self.behind = None;
            }
            return Ok(());
        };
        self.learn(&read.lines).await?;
        let room = read.lines.iter().take_while(|line| {
            let has_room = self.outbox.has_room(line);
            if has_room {
                self.give(line);
            }
            has_room
        });
        let given = room.count();
        read.lines.drain(..given);
        if read.lines.is_empty() {
            self.at.advance(read.writer, read.reached);
            self.outbox.seen(&self.at);
        } else {
            self.read = Some(read);
        }
        Ok(())
    }

    /// Gives a line if it is new, wanted and the caller's to see.
    fn give(&mut self, line: &Arc<Line>) {
        let address = line.address;
        if address.place <= self.at.of(address.writer) {
            return;
        }
        self.at.advance(address.writer, address.place);
        if self.is_visible(line) {
            self.count(self.outbox.line(line, &self.at));
        }
    }

    fn is_visible(&self, line: &Line) -> bool {
        let is_wanted = || self.wanted.as_ref().is_some_and(|(query, _)| query.matches(line));
        line.tenant == self.principal.tenant && self.seen.get(&line.device) == Some(&true) && is_wanted()
    }

    fn count(&self, given: Given) {
        let metrics = &self.shared.metrics;
        match given {
            Given::Line => metrics.lines.inc(),
            Given::Missed => metrics.missed.inc(),
            Given::FirstMissed => {
                metrics.missed.inc();
                metrics.gaps.with_label_values(&["slow"]).inc();
            }
        }
    }

    /// Asks the database, bound as a request of the caller would be, which of their devices may be seen, and which are wanted.
    async fn learn(&mut self, lines: &[Arc<Line>]) -> Result<()> {
        let own = lines.iter().filter(|line| line.tenant == self.principal.tenant).map(|line| line.device);
        let own = own.collect::<BTreeSet<_>>();
        if own.is_empty() {
            return Ok(());
        }
        let unknown = own.iter().filter(|device| !self.seen.contains_key(device)).count();
        let is_old = |(query, at): &(Query, Instant)| query.speaks_of_devices() && at.elapsed() >= LOOK_UP_EVERY;
        let is_known = self.wanted.as_ref().is_some_and(|wanted| !is_old(wanted));
        if is_known && unknown == 0 {
            return Ok(());
        }
        let within = Within::of(self.principal.tenant).within(self.principal.extent(RIGHT).setting());
        let mut tx = tenancy::begin(&self.shared.db, &within, WITHIN).await?;
        let asked = own.iter().map(|device| device.0).collect::<Vec<_>>();
        let found = readable(&mut tx, self.principal.tenant.0, &asked).await?;
        // A device that was not there before may be one of those that the query speaks of.
        let query = Query::resolve(&self.query, &mut tx, self.principal.tenant).await?;
        if self.seen.len() + unknown > MAX_DEVICES {
            self.seen.clear();
        }
        self.seen.extend(own.into_iter().map(|device| (device, found.contains(&device.0))));
        self.wanted = Some((query, Instant::now()));
        Ok(())
    }
}

async fn readable(db: &mut PgConnection, tenant: i64, devices: &[i64]) -> Result<Vec<i64>> {
    let found = sqlx::query_scalar!("select key from device where tenant_key = $1 and key = any($2)", tenant, devices);
    Ok(found.fetch_all(db).await?)
}
