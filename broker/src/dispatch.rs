//! News for devices, from rows to MQTT: what a device is to be, sent when that changes and whenever the device comes to hear it.
//!
//! Holds: what is committed while a device listens is sent to it within [`POLL_EVERY`], mostly at once by a NOTIFY; a device that
//! subscribes, or comes back to a session in which it has, is sent what waits for it. While the database is away nothing is sent, and those who come
//! wait. Every message may come twice. Ignorant of: what the news mean.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use fleet_core::dispatch::{self, Due, Kind};
use fleet_core::id::DeviceKey;
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
use crate::wire::{Publish, QoS};

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

/// A device that has come to listen.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Arrived {
    pub(crate) device: DeviceKey,
    pub(crate) kind: Kind,
}

/// The way in.
pub(crate) struct Dispatch {
    arrived: mpsc::Sender<Arrived>,
    wake: Notify,
    metrics: Metrics,
}

impl Dispatch {
    /// The way in, and what is to be given to [`run`].
    pub(crate) fn new(metrics: Metrics) -> (Self, mpsc::Receiver<Arrived>) {
        let (arrived, taken) = mpsc::channel(QUEUE);
        (Self { arrived, wake: Notify::new(), metrics }, taken)
    }

    /// There may be news.
    pub(crate) fn wake(&self) {
        self.wake.notify_one();
    }

    /// Has a device sent what waits for it, without waiting for that.
    ///
    /// # Errors
    /// It comes back when too many are looked at: [`Dispatch::wait`] for room.
    pub(crate) fn offer(&self, arrived: Arrived) -> Result<(), Arrived> {
        self.arrived.try_send(arrived).map_err(mpsc::error::TrySendError::into_inner)
    }

    /// The same, waiting for room as long as it takes.
    pub(crate) async fn wait(&self, arrived: Arrived) {
        self.metrics.hit(Limit::DispatchQueue);
        // The task is gone only when the broker stops.
        let _ = self.arrived.send(arrived).await;
    }
}

/// Sends until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>, db: PgPool, mut taken: mpsc::Receiver<Arrived>) {
    let mut waiting = HashSet::new();
    loop {
        if waiting.is_empty() {
            tokio::select! {
                first = taken.recv() => waiting.extend(first),
                () = shared.dispatch.wake.notified() => {}
                () = sleep(POLL_EVERY) => {}
            }
        }
        while waiting.len() < AT_ONCE
            && let Ok(arrived) = taken.try_recv()
        {
            waiting.insert(arrived);
        }
        let worked = timeout(WITHIN, work(&shared, &db, &waiting)).await;
        match worked.unwrap_or(Err(fleet_core::Error::Database(sqlx::Error::PoolTimedOut))) {
            Ok(()) => {
                waiting.clear();
                sleep(REST).await;
            }
            Err(error) => {
                tracing::debug!(%error, "news for devices wait for the database");
                sleep(RETRY).await;
            }
        }
    }
}

async fn work(shared: &Shared, db: &PgPool, arrived: &HashSet<Arrived>) -> fleet_core::Result<()> {
    let mut conn = db.acquire().await?;
    let mut due = dispatch::due(&mut conn, MAX_ROWS).await?;
    drop(conn);
    let listeners = if due.is_empty() { HashMap::new() } else { connected(shared) };
    let is_heard =
        |due: &Due| listeners.contains_key(&due.device) || due.gateway.is_some_and(|key| listeners.contains_key(&key));
    let mut wanted = arrived.clone();
    due.retain(|due| {
        let is_heard = is_heard(due) && hears(shared, &listeners, due);
        if is_heard {
            wanted.insert(Arrived { device: due.device, kind: due.kind });
        }
        is_heard || due.is_stale
    });
    let devices = |kind| wanted.iter().filter(move |wanted| wanted.kind == kind).map(|wanted| wanted.device);
    let shadows = devices(Kind::Shadow).collect::<Vec<_>>();
    for some in shadows.chunks(AT_ONCE) {
        tell(shared, db, some).await?;
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

/// Whether the device, or its gateway, has subscribed to the topic of such news.
fn hears(shared: &Shared, listeners: &HashMap<DeviceKey, Arc<Presence>>, due: &Due) -> bool {
    let topic = format!("{ROOT}{}/{}/{}", due.tenant_id, due.id, sample(due.kind));
    let own = listeners.get(&due.device);
    let gateway = due.gateway.and_then(|key| listeners.get(&key));
    own.into_iter().chain(gateway).any(|presence| shared.router.hears(&topic, presence.subscriber()))
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
