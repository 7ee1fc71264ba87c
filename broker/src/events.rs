//! Connection events on their way to the database: noted without waiting, written in batches.
//!
//! Holds: whoever notes an event never waits for the database; what finds no room is counted and forgotten, as an event
//! is a hint and no promise. While the database is away, events of one client and kind share their place.

use std::time::Duration;

use fleet_core::connection_event::{self, Event, Tallies};
use sqlx::PgPool;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout, timeout_at};

use crate::metrics::{Limit, Metrics};

/// Events on their way to the task that writes them.
const QUEUE: usize = 1_000;
/// Rows of one statement; while the database is away no more are held.
const MAX_ROWS: usize = 1_000;
/// How long events are gathered before they are written.
const GATHER: Duration = Duration::from_millis(200);
/// Pause after the database has refused.
const RETRY: Duration = Duration::from_secs(1);
/// How long a stopping broker waits for the last events.
const STOP_WITHIN: Duration = Duration::from_secs(2);

/// Where events are left; cloning shares it.
#[derive(Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<Event>,
    metrics: Metrics,
}

impl Events {
    /// Starts the task that writes.
    pub(crate) fn start(db: PgPool, metrics: Metrics) -> (Self, Writing) {
        let (queue, taken) = mpsc::channel(QUEUE);
        let writer = Writer { queue: taken, db, metrics: metrics.clone(), waiting: Tallies::default() };
        (Self { queue, metrics }, Writing(tokio::spawn(writer.run())))
    }

    /// Leaves an event; never waits.
    pub(crate) fn note(&self, event: Event) {
        if self.queue.try_send(event).is_err() {
            self.metrics.hit(Limit::Events);
        }
    }
}

/// The task that writes; it ends when every [`Events`] is gone.
pub(crate) struct Writing(JoinHandle<()>);

impl Writing {
    /// Waits for the last events to be written, as long as that is worth it.
    pub(crate) async fn stop(mut self) {
        if timeout(STOP_WITHIN, &mut self.0).await.is_err() {
            self.0.abort();
        }
    }
}

struct Writer {
    queue: mpsc::Receiver<Event>,
    db: PgPool,
    metrics: Metrics,
    waiting: Tallies,
}

impl Writer {
    async fn run(mut self) {
        while let Some(first) = self.queue.recv().await {
            self.take(first);
            self.gather(GATHER).await;
            while let Err(error) = self.write().await {
                tracing::warn!(%error, waiting = self.waiting.len(), "connection events could not be written");
                if !self.gather(RETRY).await {
                    return;
                }
            }
        }
    }

    fn take(&mut self, event: Event) {
        if !self.waiting.add(event, MAX_ROWS) {
            self.metrics.hit(Limit::Events);
        }
    }

    /// Takes what comes for so long; `false` when nothing more will come.
    async fn gather(&mut self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        loop {
            match timeout_at(deadline, self.queue.recv()).await {
                Ok(Some(event)) => self.take(event),
                Ok(None) => return false,
                Err(_) => return true,
            }
        }
    }

    async fn write(&mut self) -> fleet_core::Result<()> {
        let mut db = self.db.acquire().await?;
        connection_event::record(&mut db, &self.waiting).await?;
        self.waiting = Tallies::default();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use fleet_core::connection_event::Kind;
    use fleet_core::id::TenantKey;
    use fleet_core::testing::TestDb;
    use prometheus::Registry;

    use super::*;

    fn event(tenant: TenantKey, client_id: &str) -> Event {
        Event {
            tenant,
            device: None,
            client_id: client_id.into(),
            kind: Kind::Flapping,
            detail: serde_json::json!({}),
            at_ms: 1_763_726_400_000,
        }
    }

    fn overflows(metrics: &Metrics) -> u64 {
        metrics.limits.with_label_values(&["events"]).get()
    }

    #[tokio::test]
    async fn what_was_noted_is_written_before_the_end() {
        let db = TestDb::new().await;
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let (events, writing) = Events::start(db.pool().clone(), metrics.clone());
        for n in 0..300 {
            events.note(event(db.tenant(), &format!("client-{}", n % 3)));
        }
        drop(events);
        writing.stop().await;
        let rows: Vec<i64> =
            sqlx::query_scalar("select count from connection_event").fetch_all(db.pool()).await.unwrap();
        assert_eq!((rows, overflows(&metrics)), (vec![100; 3], 0));
    }

    #[tokio::test]
    async fn beyond_the_bounds_events_are_counted_and_nobody_waits() {
        let db = TestDb::new().await;
        db.pool().close().await;
        let metrics = Metrics::new(&Registry::new()).unwrap();
        let (events, writing) = Events::start(db.pool().clone(), metrics.clone());
        // The writer has not run yet: the queue is the first bound.
        for n in 0..QUEUE + 5 {
            events.note(event(db.tenant(), &n.to_string()));
        }
        assert_eq!(overflows(&metrics), 5);
        // The database is away: the rows held are the second.
        tokio::task::yield_now().await;
        events.note(event(db.tenant(), "one too many"));
        drop(events);
        writing.stop().await;
        assert_eq!(overflows(&metrics), 6);
    }
}
