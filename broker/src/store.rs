//! What durable sessions and retained messages are made of, kept in the database before anybody is told so (ADR 5).
//!
//! One task takes every change in order and commits whatever has gathered while the last commit was under way, in one
//! transaction. So a message and the packet id it came under are kept together or not at all, and what waits for a
//! session is in the order in which it was accepted.
//! Holds: nothing is acknowledged before its COMMIT; a session's queue is bounded in count, bytes and age, and what
//! does not fit is counted in the session's row; while the database is away all waits, and nothing is lost.
//! Ignorant of: sockets, but for the mailbox an acknowledgement goes to. Clean sessions never come here.

mod batch;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytestring::ByteString;
use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::connection_event::{Event, Kind};
use fleet_core::error::is_refused;
use fleet_core::id::SessionId;
use fleet_core::session::{self, Queued};
use serde_json::json;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::events::Events;
use crate::mailbox::{Delivery, Receipt};
use crate::metrics::{Limit, Metrics};
use crate::queue::{self, Held, Queue};
use crate::retained::{Retained, TooManyRetained};
use crate::router::{Router, Target};
use crate::rows::{self, Now};
use crate::session::{Durable, Sessions, SubscriberId, Subscription};
use crate::wire::{self, PacketId, Publish, Reason};
use batch::Batch;

/// First wait before a failed commit is tried again; doubled up to [`RETRY_AT_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait between two tries.
const RETRY_AT_MOST: Duration = Duration::from_secs(1);
/// A database that has not answered by then is away.
const COMMIT_WITHIN: Duration = Duration::from_secs(30);
/// Messages that are too old are looked for that often.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// Topics forgotten in one sweep.
const SWEEP_AT_MOST: usize = 10_000;
/// Rows deleted in one sweep.
const SWEEP_AT_MOST_ROWS: i64 = 10_000;

/// A message on its way in.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) publish: Publish,
    /// The session it came from.
    pub(crate) from: Option<SubscriberId>,
    /// Who is told when it is kept.
    pub(crate) receipt: Option<Receipt>,
    /// A durable session's QoS 2 message: its packet id is kept with it, so that it is not taken twice.
    pub(crate) received: Option<(Arc<Durable>, PacketId)>,
}

impl Incoming {
    /// A message nobody waits for.
    pub(crate) fn plain(publish: Publish) -> Self {
        Self { publish, from: None, receipt: None, received: None }
    }
}

/// A change to be kept.
#[derive(Debug)]
pub(crate) enum Op {
    /// A session begins.
    Begin { session: Arc<Durable>, will: Option<wire::Will>, opened: oneshot::Sender<Opened> },
    /// Its client has come back.
    Resume { session: Arc<Durable>, will: Option<wire::Will>, opened: oneshot::Sender<Opened> },
    /// Its client has gone.
    Leave { session: Arc<Durable>, keep_will: bool },
    /// The delayed will was sent.
    WillSent { session: Arc<Durable> },
    /// It is over.
    End { session: Arc<Durable> },
    /// New subscriptions, with the retained messages they are due.
    Subscribe {
        session: Arc<Durable>,
        filters: Vec<(ByteString, Subscription)>,
        retained: Vec<Delivery>,
        receipt: Receipt,
    },
    /// Subscriptions that are given up.
    Unsubscribe { session: Arc<Durable>, filters: Vec<ByteString>, receipt: Option<Receipt> },
    /// A message for durable sessions, or one to be retained.
    Publish(Box<Kept>),
    /// A message has reached its receiver.
    Acknowledge { session: Arc<Durable>, offset: i64, bytes: i64 },
    /// A QoS 2 message has reached its receiver, who is yet to be told that this is known.
    Release { session: Arc<Durable>, offset: i64, receipt: Receipt },
    /// A QoS 2 message of the client is done with.
    Complete { session: Arc<Durable>, packet_id: PacketId, receipt: Receipt },
    /// The client has taken all that was in its mailbox.
    Load { session: Arc<Durable> },
}

/// A message to be kept, and who is told.
#[derive(Debug)]
pub(crate) struct Kept {
    publish: Publish,
    /// Whether it is the retained message of its topic now.
    retained: bool,
    accepted: Instant,
    targets: Vec<Target>,
    receipt: Option<Receipt>,
    received: Option<(Arc<Durable>, PacketId)>,
}

/// What a client is told of the session it has come to.
#[derive(Debug, Default)]
pub(crate) struct Opened {
    /// QoS 2 messages that were received and not yet released.
    pub(crate) received: Vec<PacketId>,
    /// Messages that found no room since the session began.
    pub(crate) dropped: i64,
}

impl Op {
    fn session(&self) -> Option<&Arc<Durable>> {
        match self {
            Self::Begin { session, .. }
            | Self::Resume { session, .. }
            | Self::Leave { session, .. }
            | Self::WillSent { session }
            | Self::End { session }
            | Self::Subscribe { session, .. }
            | Self::Unsubscribe { session, .. }
            | Self::Acknowledge { session, .. }
            | Self::Release { session, .. }
            | Self::Complete { session, .. }
            | Self::Load { session } => Some(session),
            Self::Publish(_) => None,
        }
    }

    /// Whether it begins or ends something: such changes of one session must not meet others of it in one batch.
    fn is_structural(&self) -> bool {
        matches!(self, Self::Begin { .. } | Self::Resume { .. } | Self::Leave { .. } | Self::End { .. })
    }

    fn receipt(&self) -> Option<&Receipt> {
        match self {
            Self::Publish(kept) => kept.receipt.as_ref(),
            Self::Unsubscribe { receipt, .. } => receipt.as_ref(),
            Self::Subscribe { receipt, .. } | Self::Release { receipt, .. } | Self::Complete { receipt, .. } => {
                Some(receipt)
            }
            _ => None,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Publish(kept) => kept.publish.payload.len(),
            Self::Subscribe { retained, .. } => retained.iter().map(|delivery| delivery.publish.payload.len()).sum(),
            _ => 0,
        }
    }
}

/// The way to the store; cloning shares it.
#[derive(Clone)]
pub(crate) struct Store {
    queue: Queue<Op>,
    router: Router,
    retained: Arc<Retained>,
    metrics: Metrics,
}

/// What became of a message.
pub(crate) enum Taken {
    /// All is done: answer this.
    Done(Reason, Option<Receipt>),
    /// Answer this once the change is kept.
    Keep(Reason, Op),
}

impl Store {
    /// Makes a message the retained one of its topic, for the time being in memory alone.
    ///
    /// # Errors
    /// [`TooManyRetained`] when there is no room for another.
    pub(crate) fn retain(&self, publish: &Publish) -> Result<(), TooManyRetained> {
        self.retained.put(publish, Instant::now())
    }

    /// The retained messages.
    pub(crate) fn retained(&self) -> &Retained {
        &self.retained
    }

    /// Routes a message: clean sessions have it at once; for the others, and for it to stay retained, it has to be
    /// kept.
    pub(crate) fn route(&self, incoming: Incoming, retained: bool) -> Taken {
        let Incoming { publish, from, receipt, received } = incoming;
        let routed = self.router.publish(&publish, from);
        let reason = if routed.matched { Reason::Success } else { Reason::NoMatchingSubscribers };
        if routed.targets.is_empty() && !retained && received.is_none() {
            return Taken::Done(reason, receipt);
        }
        // What is kept must not hold everything that was read with it.
        let publish = publish.detached();
        let kept = Kept { publish, retained, accepted: Instant::now(), targets: routed.targets, receipt, received };
        Taken::Keep(reason, Op::Publish(Box::new(kept)))
    }

    /// Retains in memory and routes at QoS 0 a message of the broker's own.
    pub(crate) fn publish_own(&self, publish: &Publish) {
        self.retained.put_own(publish, Instant::now());
        // At QoS 0 there is nothing to be kept for anybody.
        self.router.publish(publish, None);
    }

    /// Retains and routes a message that is stored elsewhere already, or has no sender to refuse it to, waiting for
    /// room; its receipt is settled when all of it is kept.
    pub(crate) async fn publish(&self, incoming: Incoming) {
        // That no more can be retained is counted, and is no reason to refuse what is stored.
        let retained = incoming.publish.retain && self.retain(&incoming.publish).is_ok();
        match self.route(incoming, retained) {
            Taken::Keep(_, op) => self.wait(op).await,
            Taken::Done(_, Some(receipt)) => receipt.settle(),
            Taken::Done(_, None) => {}
        }
    }

    /// Hands a change over without waiting.
    ///
    /// # Errors
    /// The change comes back when there is no room: [`Store::wait`] for it, and read nothing meanwhile.
    pub(crate) fn offer(&self, op: Op) -> Result<(), Op> {
        let bytes = op.bytes();
        self.queue.offer(op, bytes)
    }

    /// Hands a change over, waiting for room as long as it takes.
    pub(crate) async fn wait(&self, op: Op) {
        let Err(op) = self.offer(op) else { return };
        self.metrics.hit(Limit::StoreQueue);
        let bytes = op.bytes();
        self.queue.wait(op, bytes).await;
    }

    /// Hands over that a message of a shared subscription goes to this session instead.
    pub(crate) async fn hand_on(&self, delivery: Delivery, target: Target) {
        let kept = Kept {
            publish: delivery.publish.detached(),
            retained: false,
            accepted: delivery.accepted,
            targets: vec![target],
            receipt: None,
            received: None,
        };
        self.wait(Op::Publish(Box::new(kept))).await;
    }
}

/// The running store.
pub(crate) struct Storing {
    task: JoinHandle<()>,
    is_away: Arc<AtomicBool>,
}

impl Storing {
    /// Set while the store cannot commit.
    pub(crate) fn is_away(&self) -> Arc<AtomicBool> {
        self.is_away.clone()
    }

    /// Waits for the store to commit what it holds; it ends when every [`Store`] is gone.
    pub(crate) async fn stop(mut self, within: Duration) {
        if timeout(within, &mut self.task).await.is_err() {
            tracing::warn!("the session store could not commit its last changes in time; none was acknowledged");
            self.task.abort();
        }
    }
}

/// What the store is made of.
pub(crate) struct Parts {
    pub(crate) settings: config::Sessions,
    pub(crate) page: Page,
    pub(crate) options: PgConnectOptions,
    pub(crate) router: Router,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) retained: Arc<Retained>,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
    pub(crate) events: Events,
}

/// Starts the store.
pub(crate) fn start(parts: Parts) -> (Store, Storing) {
    let Parts { settings, page, options, router, sessions, retained, clock, metrics, events } = parts;
    let (queue, ops) = queue::bounded(settings.store_queue_ops, settings.store_queue_bytes);
    let is_away = Arc::new(AtomicBool::new(false));
    let store = Store { queue, router, retained: retained.clone(), metrics: metrics.clone() };
    let worker = Worker {
        ops,
        waiting: None,
        options,
        connection: None,
        settings,
        page,
        sessions,
        retained,
        clock,
        metrics,
        events,
        is_away: is_away.clone(),
    };
    (store, Storing { task: tokio::spawn(worker.run()), is_away })
}

/// How much of a session's queue is loaded at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Page {
    messages: i64,
    bytes: i64,
}

impl Page {
    /// Half of what a mailbox takes: there may be something in it already.
    pub(crate) fn of(settings: &config::Mqtt) -> Self {
        let half = |bound: usize| i64::try_from(bound / 2).unwrap_or(i64::MAX).max(1);
        Self { messages: half(settings.outbox_messages), bytes: half(settings.outbox_bytes) }
    }
}

struct Worker {
    ops: mpsc::Receiver<Held<Op>>,
    /// Taken, and put off to the next batch.
    waiting: Option<Held<Op>>,
    options: PgConnectOptions,
    connection: Option<PgConnection>,
    settings: config::Sessions,
    page: Page,
    sessions: Arc<Sessions>,
    retained: Arc<Retained>,
    clock: Clock,
    metrics: Metrics,
    events: Events,
    is_away: Arc<AtomicBool>,
}

/// What a commit read, after its writes.
#[derive(Default)]
struct Read {
    received: Vec<(SessionId, u16)>,
    queued: Vec<Queued>,
}

impl Worker {
    async fn run(mut self) {
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            if let Some(first) = self.waiting.take() {
                self.work(first).await;
                continue;
            }
            tokio::select! {
                taken = self.ops.recv() => match taken {
                    Some(first) => self.work(first).await,
                    None => return,
                },
                _ = sweep.tick() => self.sweep().await,
            }
        }
    }

    /// Commits what has gathered.
    async fn work(&mut self, first: Held<Op>) {
        let now = self.now();
        let mut batch = Batch::default();
        let mut ops = Vec::new();
        let mut next = Some(first);
        while let Some(held) = next.take() {
            if !batch.takes(&held.item) {
                self.waiting = Some(held);
                break;
            }
            batch.add(&held.item, &self.settings, now);
            ops.push(held);
            if ops.len() < self.settings.store_batch_ops {
                next = self.ops.try_recv().ok();
            }
        }
        if let Ok(read) = self.until_committed(&batch).await {
            return self.release(ops.into_iter().map(|held| held.item), batch, read);
        }
        batch.undo();
        for held in ops {
            self.work_alone(held.item).await;
        }
    }

    /// Commits one change that was in a batch the database refused; when it refuses this too, whoever asked for it is
    /// disconnected.
    async fn work_alone(&mut self, op: Op) {
        let mut batch = Batch::default();
        batch.add(&op, &self.settings, self.now());
        match self.until_committed(&batch).await {
            Ok(read) => self.release(std::iter::once(op), batch, read),
            Err(refusal) => {
                tracing::error!(refusal, "the database refused a change of a session");
                batch.undo();
                if let Some(receipt) = op.receipt() {
                    receipt.fail();
                }
            }
        }
    }

    /// Tries until the database has committed, or refused for good: then the error says why.
    async fn until_committed(&mut self, batch: &Batch) -> Result<Read, String> {
        let mut wait = RETRY_FIRST;
        loop {
            let committed = timeout(COMMIT_WITHIN, self.commit(batch)).await;
            match committed.unwrap_or_else(|_| Err(fleet_core::Error::Database(sqlx::Error::PoolTimedOut))) {
                Ok(read) => {
                    if self.is_away.swap(false, Ordering::Relaxed) {
                        tracing::info!("the session store reaches the database again");
                    }
                    return Ok(read);
                }
                Err(fleet_core::Error::Database(error)) if is_refused(&error) => return Err(error.to_string()),
                Err(error) => {
                    self.connection = None;
                    self.metrics.retries.inc();
                    if !self.is_away.swap(true, Ordering::Relaxed) {
                        tracing::error!(%error, "the session store cannot commit: trying until the database is back");
                    }
                    sleep(wait).await;
                    wait = (wait * 2).min(RETRY_AT_MOST);
                }
            }
        }
    }

    async fn commit(&mut self, batch: &Batch) -> fleet_core::Result<Read> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => self.connection.insert(session::connect(&self.options).await?),
        };
        let mut tx = connection.begin().await?;
        batch.write(&mut tx).await?;
        let read = Read {
            received: session::received(&mut tx, &batch.resumed).await?,
            queued: session::page(&mut tx, &batch.pages, self.page.messages, self.page.bytes).await?,
        };
        tx.commit().await?;
        Ok(read)
    }

    /// After the COMMIT: the counters, which are true when an acknowledgement arrives, then acknowledgements, then messages for
    /// those who are connected.
    fn release(&mut self, ops: impl Iterator<Item = Op>, batch: Batch, read: Read) {
        self.count(&batch.counts);
        for op in ops {
            if let Some(receipt) = op.receipt() {
                receipt.settle();
            }
            match op {
                Op::Begin { session, opened, .. } => {
                    session.queue.lock().behind = false;
                    // The client may have gone meanwhile.
                    let _ = opened.send(Opened::default());
                }
                Op::Resume { session, opened, .. } => {
                    let of_session = read.received.iter().filter(|(id, _)| *id == session.id);
                    let received = of_session.filter_map(|(_, packet_id)| PacketId::new(*packet_id)).collect();
                    let dropped = session.queue.lock().dropped;
                    let _ = opened.send(Opened { received, dropped });
                }
                Op::Acknowledge { session, bytes, .. } => session.queue.lock().remove(1, bytes),
                _ => {}
            }
        }
        for (session, more) in batch.dropped.values() {
            self.note_overflow(session, *more);
        }
        for (session, delivery) in batch.placed {
            deliver(&session, delivery);
        }
        let now = self.now();
        let mut queued: HashMap<_, Vec<_>> = HashMap::new();
        for row in read.queued {
            queued.entry(row.session).or_default().push(row);
        }
        for session in batch.loading {
            load(&session, queued.remove(&session.id).unwrap_or_default(), now);
        }
    }

    /// Messages did not reach a session, whose queue is full: somebody should see that.
    fn note_overflow(&self, session: &Durable, more: i64) {
        let (messages, bytes) = session.waiting();
        let detail = json!({ "dropped": more, "queued_messages": messages, "queued_bytes": bytes });
        let (owner, now_ms) = (session.owner(), self.clock.now_ms());
        self.events.note(Event::new(&owner, &session.client_id, Kind::QueueOverflow, detail, now_ms));
    }

    fn count(&self, counts: &batch::Counts) {
        self.metrics.queued_for_sessions.inc_by(counts.queued);
        for _ in 0..counts.refused {
            self.metrics.hit(Limit::SessionQueue);
        }
    }

    fn now(&self) -> Now {
        Now::of(&self.clock)
    }

    /// Deletes what is too old, in the queues and among the retained messages.
    async fn sweep(&mut self) {
        let topics = self.retained.expire(SWEEP_AT_MOST);
        let topics: Vec<_> = topics.iter().map(ToString::to_string).collect();
        if let Err(error) = self.try_sweep(&topics).await {
            tracing::debug!(%error, "old messages of sessions could not be deleted yet");
            self.connection = None;
        }
    }

    async fn try_sweep(&mut self, topics: &[String]) -> fleet_core::Result<()> {
        let now_ms = self.clock.now_ms();
        let connection = match &mut self.connection {
            Some(connection) => connection,
            None => self.connection.insert(session::connect(&self.options).await?),
        };
        fleet_core::retained::forget(connection, topics).await?;
        let too_old_ms = now_ms - i64::try_from(self.settings.queue_age_s).unwrap_or(i64::MAX).saturating_mul(1000);
        let expired = session::expire_messages(connection, now_ms, too_old_ms, SWEEP_AT_MOST_ROWS).await?;
        for expired in &expired {
            self.metrics.hit_many(Limit::SessionAge, expired.messages.unsigned_abs());
        }
        self.sessions.forget_messages(&expired);
        Ok(())
    }
}

/// Leaves a message with its client, if that is connected and has all the earlier ones.
fn deliver(session: &Durable, delivery: Delivery) {
    let mut queue = session.queue.lock();
    if queue.behind {
        return;
    }
    let offset = delivery.offset.unwrap_or_default();
    match session.mailbox() {
        Some(mailbox) if mailbox.deliver_stored(delivery) => queue.loaded = offset,
        _ => queue.behind = true,
    }
}

/// Leaves the next messages of the queue with the client.
fn load(session: &Durable, rows: Vec<Queued>, now: Now) {
    let Some(mailbox) = session.mailbox() else { return };
    let mut queue = session.queue.lock();
    let mut fits = true;
    let is_last = rows.last().is_none_or(|row| row.offset >= queue.last_offset);
    for row in rows {
        let offset = row.offset;
        fits = fits && mailbox.deliver_stored(rows::delivery(row, queue.sent_to, now));
        if fits {
            queue.loaded = offset;
        }
    }
    queue.behind = !(fits && is_last);
    if queue.behind {
        mailbox.note_more();
    }
}
