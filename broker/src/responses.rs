//! A device says what becomes of a command, at a [desk](crate::desk).
//!
//! Holds: a response that cannot be read, or is about no command of its device, is acknowledged and kept as a dead letter.
//! Ignorant of: what a response does to a command ([`fleet_core::command`]), and of sockets.

use std::sync::Arc;

use fleet_core::clock::Clock;
use fleet_core::command::{self, Outcome, Response};
use fleet_core::config;
use fleet_core::dead_letter::{self, DeadLetter};
use fleet_core::id::{CommandId, DeadLetterId};
use fleet_core::topic::DeviceTopic;
use sqlx::PgPool;

use crate::desk::{self, Clerk, Desk, Room, Serving};
use crate::ingest::Sender;
use crate::metrics::{Limit, Metrics};
use crate::store::Store;
use crate::wire::Publish;

/// What a response counts for in the queue beside its payload.
const OVERHEAD_BYTES: usize = 1024;

/// Takes what devices say of their commands.
pub(crate) struct Responses {
    pub(crate) settings: config::Commands,
    pub(crate) db: PgPool,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
}

impl Responses {
    /// Starts the task.
    pub(crate) fn open(self, store: &Store) -> (Desk<Arc<Sender>>, Serving) {
        let requests = self.settings.response_queue;
        let bytes = requests.saturating_mul(self.settings.max_response_bytes + OVERHEAD_BYTES);
        let room = Room { requests, bytes, bound: Limit::ResponseQueue };
        let metrics = self.metrics.clone();
        desk::open(self, &room, store.clone(), metrics)
    }

    /// What becomes of it; a name for the metric.
    async fn take(&self, sender: &Sender, asked: &Publish) -> fleet_core::Result<&'static str> {
        let read = read(asked, self.settings.max_response_bytes);
        let (mut tx, now) = (self.db.begin().await?, self.clock.now());
        let (outcome, refused) = match &read {
            Ok((id, response)) => match command::respond(&mut tx, sender.device, *id, response, now).await? {
                Outcome::Taken(_) => ("taken", None),
                Outcome::Late(_) => ("late", None),
                Outcome::Repeated => ("repeated", None),
                Outcome::Unknown => ("unknown", Some("the device has no such command".to_owned())),
            },
            Err(reason) => ("malformed", Some(reason.clone())),
        };
        if let Some(reason) = refused {
            let letter = DeadLetter {
                id: DeadLetterId::new(),
                tenant: sender.tenant,
                device: sender.id.clone(),
                topic: asked.topic.to_string(),
                reason,
                payload: asked.payload.to_vec().into(),
                received_ms: now.timestamp_millis(),
            };
            dead_letter::insert(&mut tx, &[letter]).await?;
        }
        tx.commit().await?;
        Ok(outcome)
    }
}

fn read(asked: &Publish, most: usize) -> Result<(CommandId, Response), String> {
    let id = DeviceTopic::parse(&asked.topic).and_then(|topic| topic.channel.command()).unwrap_or_default();
    let id = id.parse::<CommandId>().map_err(|error| error.to_string())?;
    Ok((id, Response::decode(&asked.payload, most)?))
}

impl Clerk for Responses {
    type By = Arc<Sender>;
    const IS_ROUTED: bool = true;

    async fn answer(&self, sender: &Arc<Sender>, asked: &Publish) -> Option<Publish> {
        let taken = desk::until_committed(&self.metrics, || self.take(sender, asked)).await;
        let outcome = taken.unwrap_or_else(|error| {
            tracing::error!(%error, device.id = %sender.id, "a response to a command could not be taken");
            "failed"
        });
        self.metrics.told.responses.with_label_values(&[outcome]).inc();
        None
    }
}
