//! What others ask of this broker through the database: to look at changed rights, to show its connections, to send one
//! away, to trace one.
//!
//! Holds: a change of rights reaches every connection within a second: a NOTIFY wakes this task, and without one it
//! looks every [`POLL_EVERY`]; a client that came in while rights changed is checked again. It has database connections
//! of its own, so that a storm of others does not hold it up. While the database is away nothing can be asked, and those
//! who are connected stay.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use bytestring::ByteString;
use fleet_core::connection_event::Kind;
use fleet_core::control::{self, Answer, Ended, Question, Request, TraceLines, Verdict};
use fleet_core::id::{ConnectionId, SessionId, TenantId, TenantKey, UserId};
use fleet_core::policy::{Principal, Proof};
use serde_json::json;
use sqlx::PgPool;
use sqlx::postgres::{PgConnectOptions, PgListener, PgPoolOptions};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::Shared;
use crate::access::Rights;
use crate::connection::{end_session, restrict};
use crate::handshake::claim_session;
use crate::presence::{Leave, Order, Presence};
use crate::provisioning::response_topic;
use crate::session::Durable;
use crate::store::{Incoming, Op};
use crate::wire::{Publish, QoS, Reason};

/// How often the database is looked at without being woken.
const POLL_EVERY: Duration = Duration::from_millis(250);
/// Shortest pause between two looks, however often it is woken.
const REST: Duration = Duration::from_millis(20);
/// Longest pause: after a look that took long, the next one lets others have the database for as long.
const REST_AT_MOST: Duration = Duration::from_millis(200);
/// Pause before listening is tried again.
const LISTEN_AGAIN: Duration = Duration::from_secs(1);
/// Principals that are looked at again in one statement.
const AT_ONCE: usize = 5_000;
/// One for what is asked, one to be woken on.
const CONNECTIONS: u32 = 2;
/// A database that has not answered by then is away.
const LOOK_WITHIN: Duration = Duration::from_secs(10);
/// Devices that scopes ask about and that are not known are looked for so often: those a gateway speaks for may be new.
const READ_AGAIN: Duration = Duration::from_secs(1);
/// How long a stopping broker tries to say that it goes.
const RETIRE_WITHIN: Duration = Duration::from_secs(1);

/// What connections and the task share.
#[derive(Debug, Default)]
pub(crate) struct Control {
    /// The epoch of rights all connections are being checked against.
    epoch: AtomicI64,
    /// Set when one of them has to be checked again.
    again: std::sync::atomic::AtomicBool,
    wake: Notify,
}

impl Control {
    /// The epoch of rights at the moment; to be asked before a client is authenticated.
    pub(crate) fn epoch(&self) -> i64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// Says that a client that was authenticated after `epoch` is among the connections now. When rights have changed
    /// since, it may have been missed.
    pub(crate) fn entered(&self, epoch: i64) {
        if self.epoch() != epoch {
            self.again.store(true, Ordering::SeqCst);
            self.wake.notify_one();
        }
    }
}

/// The task that answers.
pub(crate) struct Controlling {
    tasks: [JoinHandle<()>; 2],
    broker: Uuid,
    db: PgPool,
}

impl Controlling {
    /// Stops answering, and says so.
    pub(crate) async fn stop(self) {
        for task in self.tasks {
            task.abort();
            // What it holds must be gone.
            let _ = task.await;
        }
        let goodbye = async { control::retire(&mut *self.db.acquire().await?, self.broker).await };
        if !matches!(timeout(RETIRE_WITHIN, goodbye).await, Ok(Ok(()))) {
            tracing::debug!("the lease of this broker ends by itself");
        }
    }
}

/// Starts to answer.
pub(crate) async fn start(shared: &Arc<Shared>, options: &PgConnectOptions) -> fleet_core::Result<Controlling> {
    let db = PgPoolOptions::new()
        .max_connections(CONNECTIONS)
        .acquire_timeout(LOOK_WITHIN)
        .connect_lazy_with(options.clone());
    let broker = Uuid::new_v4();
    let mut conn = db.acquire().await?;
    control::renew(&mut conn, broker).await?;
    let epoch = control::look(&mut conn, broker).await?.epoch;
    shared.control.epoch.store(epoch, Ordering::SeqCst);
    drop(conn);
    let task = Task {
        shared: shared.clone(),
        db: db.clone(),
        broker,
        renewed: Instant::now(),
        read_devices: Instant::now(),
        // Sessions were restored before the epoch was asked for.
        is_due: true,
        is_away: false,
    };
    let tasks = [tokio::spawn(listen(shared.clone(), db.clone())), tokio::spawn(task.run())];
    Ok(Controlling { tasks, broker, db })
}

/// Wakes the task whenever PostgreSQL says that there is something.
async fn listen(shared: Arc<Shared>, db: PgPool) {
    loop {
        if let Err(error) = pass_on(&shared, &db).await {
            tracing::debug!(%error, "not woken by the database: it is looked at more seldom for the time being");
        }
        sleep(LISTEN_AGAIN).await;
    }
}

async fn pass_on(shared: &Shared, db: &PgPool) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(db).await?;
    listener.listen(control::CHANNEL).await?;
    loop {
        // What came before it listened is seen at the next look anyway.
        listener.recv().await?;
        shared.control.wake.notify_one();
        shared.dispatch.wake();
    }
}

struct Task {
    shared: Arc<Shared>,
    db: PgPool,
    broker: Uuid,
    renewed: Instant,
    /// When the devices of those tenants that have scopes were read.
    read_devices: Instant,
    /// Whether rights have changed and not everybody was checked yet.
    is_due: bool,
    is_away: bool,
}

impl Task {
    async fn run(mut self) {
        loop {
            let _polled = timeout(POLL_EVERY, self.shared.control.wake.notified()).await;
            let began = Instant::now();
            let looked = timeout(LOOK_WITHIN, self.look()).await;
            let looked = looked.unwrap_or(Err(fleet_core::Error::Database(sqlx::Error::PoolTimedOut)));
            if let Err(error) = &looked {
                self.shared.metrics.control_failures.inc();
                if !self.is_away {
                    tracing::warn!(%error, "changed rights and questions cannot be looked for");
                }
            }
            self.is_away = looked.is_err();
            sleep(began.elapsed().clamp(REST, REST_AT_MOST)).await;
        }
    }

    async fn look(&mut self) -> fleet_core::Result<()> {
        let mut db = self.db.acquire().await?;
        if self.renewed.elapsed() >= control::RENEW_EVERY {
            control::renew(&mut db, self.broker).await?;
            self.renewed = Instant::now();
            self.sweep_traces();
        }
        let look = control::look(&mut db, self.broker).await?;
        let control = &self.shared.control;
        let changed = control.epoch.swap(look.epoch, Ordering::SeqCst) != look.epoch;
        // From the swaps on, who comes in sees that it must be checked; who was in already is among these.
        self.is_due |= control.again.swap(false, Ordering::SeqCst) || changed;
        let directory = &self.shared.directory;
        let is_behind = directory.is_missing_some() && self.read_devices.elapsed() >= READ_AGAIN;
        if self.is_due || is_behind {
            self.read_devices(&mut db).await?;
        }
        if self.is_due {
            self.recheck(&mut db).await?;
            self.is_due = false;
        }
        let answers: Vec<_> = look
            .questions
            .into_iter()
            .map(|Question { id, request }| (id, request.map_or(Answer::Unknown, |request| self.answer(request))))
            .collect();
        control::answer(&mut db, self.broker, &answers).await
    }

    // Rights

    /// Reads the devices of those tenants in which somebody may see some of them only.
    async fn read_devices(&mut self, db: &mut sqlx::PgConnection) -> fleet_core::Result<()> {
        let Shared { presences, sessions, directory, .. } = &*self.shared;
        let connected = presences.all().into_iter().map(|presence| presence.principal());
        let mut wanted = connected
            .filter(|principal| !principal.grants().is_unscoped())
            .map(|principal| principal.tenant)
            .collect::<HashSet<_>>();
        let owners = sessions.all_durable().into_iter().map(|session| session.owner());
        wanted.extend(owners.filter(|owner| !owner.grants().is_unscoped()).map(|owner| owner.tenant));
        self.read_devices = Instant::now();
        if wanted.is_empty() && directory.is_empty() {
            return Ok(());
        }
        directory.load(db, &wanted).await?;
        let held = i64::try_from(directory.count()).unwrap_or(i64::MAX);
        self.shared.metrics.scoped_devices.set(held);
        Ok(())
    }

    /// Looks at all principals again: of open connections first, then of sessions that outlive theirs.
    async fn recheck(&self, db: &mut sqlx::PgConnection) -> fleet_core::Result<()> {
        self.shared.metrics.rechecks.inc();
        let Shared { access, presences, sessions, .. } = &*self.shared;
        for some in presences.all().chunks(AT_ONCE) {
            let principals: Vec<_> = some.iter().map(|presence| presence.principal()).collect();
            let principals: Vec<&Principal> = principals.iter().map(AsRef::as_ref).collect();
            for (place, verdict) in access.recheck(db, &principals).await? {
                judge(&some[place], verdict);
            }
        }
        for some in sessions.all_durable().chunks(AT_ONCE) {
            // A session needs no credential, only its client does.
            let owner = |session: &Arc<Durable>| Principal { proof: Proof::default(), ..session.owner() };
            let owners: Vec<_> = some.iter().map(owner).collect();
            let verdicts = access.recheck(db, &owners.iter().collect::<Vec<_>>()).await?;
            let judged = verdicts.into_iter().filter_map(|(place, verdict)| self.judge_session(&some[place], verdict));
            let aftermath: Vec<_> = judged.collect();
            if !aftermath.is_empty() {
                tokio::spawn(settle(self.shared.clone(), aftermath));
            }
        }
        Ok(())
    }

    /// The same for a session, whether its client is there or away; what is left to do for it.
    fn judge_session(&self, session: &Arc<Durable>, verdict: Verdict) -> Option<Aftermath> {
        match verdict {
            // One that is connected ends with its connection.
            Verdict::Ended(why) if why.is_for_good() && session.mailbox().is_none() => {
                Some(Aftermath::End(session.clone()))
            }
            // Whoever may not come in at the moment may do so later.
            Verdict::Ended(_) | Verdict::Until(_) => None,
            Verdict::Changed(principal) => {
                let filters = restrict(&self.shared, session, &Rights::new(&principal, &self.shared.directory));
                session.set_owner(principal);
                (!filters.is_empty()).then(|| Aftermath::Unsubscribe(session.clone(), filters))
            }
        }
    }

    // Questions

    fn answer(&self, request: Request) -> Answer {
        let shared = &self.shared;
        match request {
            Request::Connections { tenant, filter, after, limit } => {
                let limit = limit.min(control::MAX_PAGE);
                let some = shared.presences.page(tenant, &filter, after, limit);
                Answer::Connections(some.iter().map(|presence| shared.view(presence)).collect())
            }
            Request::Connection { tenant, id } => match shared.presences.get(tenant, id) {
                Some(presence) => Answer::Connection(Box::new(shared.view(&presence))),
                None => Answer::NotHere,
            },
            Request::Disconnect { tenant, id, reason, end_session, by } => match shared.presences.get(tenant, id) {
                Some(presence) => self.disconnect(&presence, reason, end_session, by),
                None => Answer::NotHere,
            },
            Request::TraceStart { tenant, id, session, minutes, by } => {
                self.start_trace(tenant, id, &session.into(), minutes, by)
            }
            Request::TraceStop { tenant, id } => self.stop_trace(tenant, id),
            Request::Trace { tenant, id, after, limit } => {
                let holds = shared.presences.get(tenant, id);
                let holds = holds.as_ref().map(|presence| &**presence.session());
                let trace = shared.traces.find(tenant, id, holds);
                trace.map_or(Answer::NotHere, |trace| Answer::Trace(trace.lines(after, limit.min(control::MAX_PAGE))))
            }
            Request::Tell { tenant, asker, message } => self.tell(&tenant, &asker, &message),
            Request::ForgetRetained { below } => {
                shared.store.retained().forget_below(&below);
                Answer::Done
            }
            Request::EndSession { tenant, id, by } => self.end_session(tenant, id, by),
        }
    }

    /// Tells a client that is here; one that is not asks again when it comes.
    fn tell(&self, tenant: &TenantId, asker: &str, message: &serde_json::Value) -> Answer {
        if self.shared.presences.of_session(&claim_session(tenant, asker)).is_none() {
            return Answer::NotHere;
        }
        let topic = response_topic(tenant, asker);
        let publish = Publish::new(topic, message.to_string().into(), QoS::AtLeastOnce, false);
        let shared = self.shared.clone();
        tokio::spawn(async move { shared.store.publish(Incoming::plain(publish)).await });
        Answer::Done
    }

    fn disconnect(&self, presence: &Presence, reason: String, end_session: bool, by: UserId) -> Answer {
        let detail = json!({ "reason": &reason, "end_session": end_session, "by": by });
        self.note(presence, Kind::DisconnectedByOperator, detail);
        let text = ByteString::from(reason);
        presence.order(Order::Leave(Leave { reason: Reason::AdministrativeAction, text, end_session }));
        Answer::Done
    }

    fn note(&self, presence: &Presence, kind: Kind, detail: serde_json::Value) {
        self.shared.events.note(presence.event(kind, detail, self.shared.clock.now_ms()));
    }

    fn start_trace(&self, tenant: TenantKey, id: ConnectionId, session: &Arc<str>, minutes: u16, by: UserId) -> Answer {
        let holder = self.shared.presences.of_session(session);
        if holder.as_ref().is_some_and(|holder| holder.principal().tenant != tenant) {
            return Answer::NotHere;
        }
        let Ok(trace) = self.shared.traces.start(session, tenant, id, minutes) else {
            let most = self.shared.settings.max_traces;
            return Answer::Refused(format!("{most} clients are traced already: end one of these traces first"));
        };
        if let Some(holder) = holder {
            self.note(&holder, Kind::TraceStarted, json!({ "minutes": minutes, "by": by }));
            holder.order(Order::Trace(Some(trace.clone())));
        }
        let TraceLines { dropped, ends_ms, .. } = trace.lines(0, 0);
        Answer::Trace(TraceLines { lines: Vec::new(), dropped, ends_ms })
    }

    fn stop_trace(&self, tenant: TenantKey, id: ConnectionId) -> Answer {
        let holds = self.shared.presences.get(tenant, id);
        let holds = holds.as_ref().map(|presence| &**presence.session());
        let session = self.shared.traces.find(tenant, id, holds).and_then(|trace| self.shared.traces.stop(&trace));
        let Some(session) = session else { return Answer::NotHere };
        self.untrace(&session);
        Answer::Done
    }

    fn untrace(&self, session: &str) {
        if let Some(presence) = self.shared.presences.of_session(session) {
            presence.order(Order::Trace(None));
        }
    }

    fn sweep_traces(&self) {
        for session in self.shared.traces.sweep() {
            self.untrace(&session);
        }
    }

    fn end_session(&self, tenant: TenantKey, id: SessionId, by: UserId) -> Answer {
        let Some(session) = self.shared.sessions.by_id(id).filter(|session| session.owner().tenant == tenant) else {
            return Answer::NotHere;
        };
        if let Some(presence) = self.shared.presences.of_session(&session.name) {
            return self.disconnect(&presence, "the session was ended by an operator".to_owned(), true, by);
        }
        tracing::info!(session.id = %id, user.id = %by, "a session was ended by an operator");
        let shared = self.shared.clone();
        tokio::spawn(async move { end_session(&shared, &session).await });
        Answer::Done
    }
}

/// Tells a connection what has become of its principal.
fn judge(presence: &Presence, verdict: Verdict) {
    match verdict {
        Verdict::Ended(why) => presence.order(Order::Leave(leave(why))),
        Verdict::Until(at) => {
            let old = presence.principal();
            let proof = Proof { valid_until: Some(at), ..old.proof };
            presence.set_principal(Arc::new(Principal { proof, ..(*old).clone() }));
            presence.order(Order::Until(at));
        }
        Verdict::Changed(principal) => {
            let principal = Arc::new(principal);
            presence.set_principal(principal.clone());
            presence.order(Order::Rights(principal));
        }
    }
}

fn leave(why: Ended) -> Leave {
    let text = ByteString::from_static(why.text());
    Leave { reason: Reason::AdministrativeAction, text, end_session: why.is_for_good() }
}

/// What is left to do for a session whose owner's standing has changed.
enum Aftermath {
    /// It is to end.
    End(Arc<Durable>),
    /// It holds these no more, which the database does not know yet.
    Unsubscribe(Arc<Durable>, Vec<ByteString>),
}

/// Does what may have to wait for room in the store, so that nobody else's rights wait for it.
async fn settle(shared: Arc<Shared>, aftermath: Vec<Aftermath>) {
    for left in aftermath {
        match left {
            Aftermath::End(session) => end_session(&shared, &session).await,
            Aftermath::Unsubscribe(session, filters) => {
                shared.store.wait(Op::Unsubscribe { session, filters, receipt: None }).await;
            }
        }
    }
}

impl Shared {
    /// A connection, as it is shown.
    fn view(&self, presence: &Presence) -> control::Connection {
        let session = presence.session();
        let queue = self.sessions.find(session).map(|durable| durable.waiting());
        presence.view(queue, self.admission.is_flapping(session), self.traces.of(session).is_some())
    }
}
