//! Requests that are answered on a topic: bounded queue → one task → one transaction → COMMIT → the answer → the acknowledgement.
//!
//! Holds: a request is acknowledged after all that comes of it is kept and its answer is on its way to whoever subscribes, in that
//! order. A connection is not read while its request is under way, so nobody has more than one in the queue. While the
//! database is away the task waits with what it holds.
//! Why tasks of their own: such requests are rare and cost more than a reading, so they neither belong into a writer's batch nor
//! may they hold a connection's own task up.
//! Ignorant of: what is asked, and of sockets.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use fleet_core::error::is_refused;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::metrics::{Limit, Metrics};
use crate::queue::{self, Held, Queue};
use crate::store::{Incoming, Store};
use crate::wire::{Publish, PublishProperties, QoS};

/// First wait before a failed commit is tried again; doubled up to [`RETRY_AT_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait between two tries.
const RETRY_AT_MOST: Duration = Duration::from_secs(1);
/// A database that has not answered by then is away.
const COMMIT_WITHIN: Duration = Duration::from_secs(30);

/// Whoever answers requests of one kind.
pub(crate) trait Clerk: Send + 'static {
    /// Who asks.
    type By: Send + 'static;
    /// Whether the request itself is handed to whoever subscribes.
    const IS_ROUTED: bool;

    /// Does what is asked, and answers where there is something to say.
    fn answer(&self, by: &Self::By, asked: &Publish) -> impl Future<Output = Option<Publish>> + Send;
}

/// What is asked, by whom, and who waits for its end.
struct Asked<B> {
    by: B,
    incoming: Incoming,
    _until_dropped: oneshot::Sender<()>,
}

/// The way in.
pub(crate) struct Desk<B> {
    queue: Queue<Asked<B>>,
    bound: Limit,
    metrics: Metrics,
}

impl<B: Send + 'static> Desk<B> {
    /// Hands a request over, waiting for room as long as it takes, and for its end.
    pub(crate) async fn ask(&self, by: B, incoming: Incoming) {
        let bytes = incoming.publish.payload.len();
        let (until_dropped, ended) = oneshot::channel();
        let asked = Asked { by, incoming, _until_dropped: until_dropped };
        if let Err(asked) = self.queue.offer(asked, bytes) {
            self.metrics.hit(self.bound);
            // The task is gone only when the broker stops; what it has not taken was not acknowledged.
            self.queue.wait(asked, bytes).await;
        }
        // Nothing is ever sent.
        let _ = ended.await;
    }
}

/// How much may wait, and what is counted when it is more.
pub(crate) struct Room {
    pub(crate) requests: usize,
    pub(crate) bytes: usize,
    pub(crate) bound: Limit,
}

/// The running task.
pub(crate) struct Serving(JoinHandle<()>);

impl Serving {
    /// Waits for what was asked to be answered; the task ends when every [`Desk`] is gone.
    pub(crate) async fn stop(mut self, within: Duration) {
        if timeout(within, &mut self.0).await.is_err() {
            tracing::warn!("a request could not be answered in time; it was not acknowledged");
            self.0.abort();
        }
    }
}

/// Starts the task.
pub(crate) fn open<C: Clerk>(clerk: C, room: &Room, store: Store, metrics: Metrics) -> (Desk<C::By>, Serving) {
    let (queue, requests) = queue::bounded(room.requests, room.bytes);
    let task = serve(clerk, requests, store, metrics.clone());
    (Desk { queue, bound: room.bound, metrics }, Serving(tokio::spawn(task)))
}

async fn serve<C: Clerk>(clerk: C, mut requests: mpsc::Receiver<Held<Asked<C::By>>>, store: Store, metrics: Metrics) {
    while let Some(held) = requests.recv().await {
        let Asked { by, mut incoming, _until_dropped } = held.item;
        if let Some(answer) = clerk.answer(&by, &incoming.publish).await {
            store.publish(Incoming::plain(answer)).await;
        }
        metrics.acknowledged.inc_by(u64::from(incoming.receipt.is_some()));
        // A request is for this moment: nobody is to find it later.
        incoming.publish.retain = false;
        if C::IS_ROUTED {
            store.publish(incoming).await;
        } else if let Some(receipt) = incoming.receipt {
            receipt.settle();
        }
    }
}

/// Tries until the database has committed. What it refuses for good, and what cannot be done, comes back.
pub(crate) async fn until_committed<T, F>(metrics: &Metrics, mut attempt: impl FnMut() -> F) -> fleet_core::Result<T>
where
    F: Future<Output = fleet_core::Result<T>>,
{
    let mut wait = RETRY_FIRST;
    loop {
        let done = timeout(COMMIT_WITHIN, attempt()).await;
        match done.unwrap_or(Err(fleet_core::Error::Database(sqlx::Error::PoolTimedOut))) {
            Err(fleet_core::Error::Database(error)) if !is_refused(&error) => {
                metrics.retries.inc();
                tracing::warn!(%error, "a request cannot be answered: trying until the database is back");
                sleep(wait).await;
                wait = (wait * 2).min(RETRY_AT_MOST);
            }
            done => return done,
        }
    }
}

/// An answer, with what the asker gave to know it by (MQTT 5 §4.10).
pub(crate) fn answer(asked: &Publish, topic: impl Into<ByteString>, body: &serde_json::Value) -> Publish {
    let correlation_data = asked.properties.as_ref().and_then(|properties| properties.correlation_data.clone());
    let properties = PublishProperties { correlation_data, ..PublishProperties::default() };
    let properties = properties.correlation_data.is_some().then(|| Arc::new(properties));
    Publish { properties, ..Publish::new(topic.into(), Bytes::from(body.to_string()), QoS::AtLeastOnce, false) }
}
