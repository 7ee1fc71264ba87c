//! News for devices, from rows to MQTT: what a device is to be and to do, sent when that changes and whenever the device comes to hear it.
//!
//! Holds: what is committed while a device listens is sent to it within [`POLL_EVERY`], mostly at once by a NOTIFY; a device that
//! subscribes, or comes back to a session in which it has, is sent what waits for it. While the database is away nothing is sent, and those who come
//! wait. Every message may come twice. Ignorant of: what the news mean.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use fleet_core::command;
use fleet_core::dispatch::{self, Due, Kind};
use fleet_core::id::{CommandId, ConnectionId, DeviceKey};
use fleet_core::policy::Who;
use fleet_core::shadow::{self, message};
use fleet_core::topic::ROOT;
use sqlx::PgPool;
use tokio::sync::{Notify, mpsc};
use tokio::time::{sleep, timeout};

use crate::Shared;
use crate::metrics::{Limit, Metrics};
use crate::presence::Presence;
use crate::store::Incoming;
use crate::wire::{Publish, PublishProperties, QoS};

/// How often the database is looked at without being woken.
pub(crate) const POLL_EVERY: Duration = Duration::from_secs(1);
/// Shortest pause between two looks, however often it is woken.
const REST: Duration = Duration::from_millis(5);
/// Pause after the database has refused.
const RETRY: Duration = Duration::from_millis(500);
/// A database that has not answered by then is away.
const WITHIN: Duration = Duration::from_secs(10);
/// Rows of one look.
const MAX_ROWS: i64 = 10_000;
/// Devices that have come to listen and wait to be looked at; beyond that, those who come are not read.
const QUEUE: usize = 10_000;
/// Devices looked at in one statement.
const AT_ONCE: usize = 1_000;

/// A device that has come to listen, on a connection of its own or of its gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Arrived {
    pub(crate) device: DeviceKey,
    pub(crate) kind: Kind,
    pub(crate) connection: ConnectionId,
}

/// What connections tell.
#[derive(Debug)]
pub(crate) enum News {
    /// A device has come to listen: it is to be sent what waits for it.
    Arrived(Arrived),
    /// A device has acknowledged the message of a command.
    Delivered(DeviceKey, CommandId),
}

/// The way in.
pub(crate) struct Dispatch {
    news: mpsc::Sender<News>,
    wake: Notify,
    metrics: Metrics,
}

impl Dispatch {
    /// The way in, and what is to be given to [`run`].
    pub(crate) fn new(metrics: Metrics) -> (Self, mpsc::Receiver<News>) {
        let (news, taken) = mpsc::channel(QUEUE);
        (Self { news, wake: Notify::new(), metrics }, taken)
    }

    /// There may be rows.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Tells something without waiting.
    ///
    /// # Errors
    /// It comes back when too much was told at once: [`Dispatch::wait`] for room.
    pub(crate) fn offer(&self, news: News) -> Result<(), News> {
        self.news.try_send(news).map_err(mpsc::error::TrySendError::into_inner)
    }

    /// The same, waiting for room as long as it takes.
    pub(crate) async fn wait(&self, news: News) {
        self.metrics.hit(Limit::DispatchQueue);
        // The task is gone only when the broker stops.
        let _ = self.news.send(news).await;
    }
}

/// What was told and is not done yet.
#[derive(Default)]
struct Waiting {
    arrived: HashSet<Arrived>,
    delivered: Vec<(DeviceKey, CommandId)>,
}

impl Waiting {
    fn add(&mut self, news: News) {
        match news {
            News::Arrived(arrived) => {
                self.arrived.insert(arrived);
            }
            News::Delivered(device, command) => self.delivered.push((device, command)),
        }
    }

    fn len(&self) -> usize {
        self.arrived.len() + self.delivered.len()
    }
}

/// Sends until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>, db: PgPool, mut taken: mpsc::Receiver<News>) {
    let mut waiting = Waiting::default();
    loop {
        if waiting.len() == 0 {
            tokio::select! {
                Some(first) = taken.recv() => waiting.add(first),
                () = shared.dispatch.wake.notified() => {}
                () = sleep(POLL_EVERY) => {}
            }
        }
        while waiting.len() < AT_ONCE
            && let Ok(news) = taken.try_recv()
        {
            waiting.add(news);
        }
        let worked = timeout(WITHIN, work(&shared, &db, &waiting)).await;
        match worked.unwrap_or(Err(fleet_core::Error::Database(sqlx::Error::PoolTimedOut))) {
            Ok(()) => {
                waiting = Waiting::default();
                sleep(REST).await;
            }
            Err(error) => {
                tracing::debug!(%error, "news for devices wait for the database");
                sleep(RETRY).await;
            }
        }
    }
}

async fn work(shared: &Shared, db: &PgPool, waiting: &Waiting) -> fleet_core::Result<()> {
    let mut conn = db.acquire().await?;
    if !waiting.delivered.is_empty() {
        let delivered = command::deliver(&mut conn, &waiting.delivered, shared.clock.now()).await?;
        shared.metrics.told.delivered.inc_by(delivered);
    }
    let mut due = dispatch::due(&mut conn, MAX_ROWS).await?;
    drop(conn);
    let listeners = if due.is_empty() { HashMap::new() } else { connected(shared) };
    let mut wanted = waiting.arrived.clone();
    due.retain(|due| {
        let listener = listener(shared, &listeners, due);
        let (device, kind) = (due.device, due.kind);
        wanted.extend(listener.map(|presence| Arrived { device, kind, connection: presence.id }));
        listener.is_some() || due.is_stale
    });
    let (shadows, commands): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|wanted| wanted.kind == Kind::Shadow);
    for some in shadows.chunks(AT_ONCE) {
        tell(shared, db, &some.iter().map(|wanted| wanted.device).collect::<Vec<_>>()).await?;
    }
    for some in commands.chunks(AT_ONCE) {
        send(shared, db, &some.iter().map(|wanted| (wanted.device, wanted.connection)).collect::<Vec<_>>()).await?;
    }
    if !due.is_empty() {
        dispatch::done(&mut *db.acquire().await?, &due).await?;
    }
    Ok(())
}

/// The devices that are connected.
fn connected(shared: &Shared) -> HashMap<DeviceKey, Arc<Presence>> {
    let device = |presence: Arc<Presence>| match presence.principal().who {
        Who::Device { key, .. } => Some((key, presence)),
        Who::User { .. } | Who::Claim { .. } => None,
    };
    shared.presences.all().into_iter().filter_map(device).collect()
}

/// The connection, of the device or its gateway, that has subscribed to the topic of such news.
fn listener<'a>(
    shared: &Shared,
    listeners: &'a HashMap<DeviceKey, Arc<Presence>>,
    due: &Due,
) -> Option<&'a Arc<Presence>> {
    let topic = format!("{ROOT}{}/{}/{}", due.tenant_id, due.id, sample(due.kind));
    let own = listeners.get(&due.device);
    let gateway = due.gateway.and_then(|key| listeners.get(&key));
    own.into_iter().chain(gateway).find(|presence| shared.router.hears(&topic, presence.subscriber()))
}

/// What follows the device in a topic of such news.
pub(crate) fn sample(kind: Kind) -> &'static str {
    match kind {
        Kind::Shadow => "shadow/update/delta",
        Kind::Command => "commands/-/request",
    }
}

/// Tells devices what they are to be.
async fn tell(shared: &Shared, db: &PgPool, devices: &[DeviceKey]) -> fleet_core::Result<()> {
    let mut tx = db.begin().await?;
    let news = shadow::tell(&mut tx, devices).await?;
    tx.commit().await?;
    for news in news {
        let topic = format!("{ROOT}{}/{}/{}", news.tenant_id, news.id, sample(Kind::Shadow));
        let payload = message::delta(&news).to_string();
        shared.metrics.told.deltas.inc();
        let publish = Publish::new(topic.into(), payload.into(), QoS::AtLeastOnce, false);
        shared.store.publish(Incoming::plain(publish)).await;
    }
    Ok(())
}

/// Sends devices what they are to do.
async fn send(shared: &Shared, db: &PgPool, devices: &[(DeviceKey, ConnectionId)]) -> fleet_core::Result<()> {
    let now = shared.clock.now();
    let mut tx = db.begin().await?;
    let commands = command::to_send(&mut tx, devices, now).await?;
    tx.commit().await?;
    for sent in commands {
        let topic = format!("{ROOT}{}/{}/commands/{}/request", sent.tenant_id, sent.device, sent.id);
        let left_ms = (sent.deadline - now).num_milliseconds().max(1);
        let expiry_s = u32::try_from(left_ms.unsigned_abs().div_ceil(1_000)).unwrap_or(u32::MAX);
        let properties = PublishProperties { message_expiry_s: Some(expiry_s), ..PublishProperties::default() };
        let payload = sent.message().to_string();
        let publish = Publish::new(topic.into(), payload.into(), QoS::AtLeastOnce, false);
        shared.metrics.told.commands.inc();
        shared.store.publish(Incoming::plain(Publish { properties: Some(Arc::new(properties)), ..publish })).await;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use prometheus::Registry;

    use super::*;

    #[tokio::test]
    async fn a_full_queue_makes_those_who_come_wait_and_loses_nobody() {
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let hits = || metrics.limits.with_label_values(&[Limit::DispatchQueue.label()]).get();
        let (dispatch, mut taken) = Dispatch::new(metrics.clone());
        let all = (0..=i64::try_from(QUEUE).unwrap()).map(DeviceKey).collect::<Vec<_>>();
        let news = |device: &DeviceKey| News::Delivered(*device, CommandId::new());
        let (last, others) = all.split_last().unwrap();
        assert!(others.iter().all(|device| dispatch.offer(news(device)).is_ok()));
        let refused = dispatch.offer(news(last)).expect_err("there is no room");
        assert_eq!(hits(), 0, "it is counted when somebody waits");
        let take = async {
            let mut told = Vec::new();
            while told.len() < all.len() {
                let Some(News::Delivered(device, _)) = taken.recv().await else { break };
                told.push(device);
            }
            told
        };
        let ((), told) = tokio::join!(dispatch.wait(refused), take);
        assert_eq!((hits(), told == all), (1, true), "in order, and each once");
    }
}
