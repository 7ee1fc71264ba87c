//! Wills: what is published for a client that was lost (MQTT 5 §3.1.2.5), at once or after its delay (§3.1.3.2.2).

use std::time::Duration;

use fleet_core::policy::Principal;
use fleet_core::session;

use crate::Shared;
use crate::access::{Rights, Route};
use crate::ingest::{Item, What};
use crate::rows::{self, Now};
use crate::store::Incoming;
use crate::wire::{self, Publish};

/// A will, and whose it is.
#[derive(Debug, Clone)]
pub(crate) struct Will {
    pub(crate) owner: Principal,
    pub(crate) message: wire::Will,
}

impl Will {
    /// How long to wait.
    pub(crate) fn delay(&self) -> Duration {
        Duration::from_secs(u64::from(self.message.delay_s))
    }

    /// As it is stored.
    pub(crate) fn row(message: &wire::Will, now: Now) -> session::Will {
        session::Will { message: rows::message(&publish(message), now.instant, now), delay_s: message.delay_s }
    }

    /// As it was stored.
    pub(crate) fn restore(owner: Principal, stored: session::Will, now: Now) -> Self {
        let (publish, _) = rows::publish(stored.message, now);
        let Publish { topic, payload, qos, retain, properties, .. } = publish;
        Self { owner, message: wire::Will { topic, payload, qos, retain, delay_s: stored.delay_s, properties } }
    }

    /// Publishes it, if its owner still may.
    pub(crate) async fn send(&self, shared: &Shared) {
        let publish = publish(&self.message);
        let (sender, what): (_, fn(Incoming) -> What) =
            match Rights::new(&self.owner, &shared.directory).publish(&publish.topic) {
                Ok(Route::Telemetry(sender)) => (sender, What::Telemetry),
                Ok(Route::Logs(sender)) => (sender, What::Logs),
                Ok(Route::Status(sender)) => (sender, What::Status),
                Ok(Route::Live) => return shared.store.publish(Incoming::plain(publish)).await,
                Ok(Route::Response(sender)) => return shared.responses.ask(sender, Incoming::plain(publish)).await,
                Ok(Route::Shadow(sender)) => return shared.shadows.ask(sender, Incoming::plain(publish)).await,
                // A request for a certificate is no last word; it was refused with the CONNECT.
                Ok(Route::Renewal(_) | Route::Provision) | Err(_) => return,
            };
        let item = Item::new(sender, shared.clock.now_ms(), what(Incoming::plain(publish)));
        shared.ingest.wait(item).await;
    }
}

fn publish(will: &wire::Will) -> Publish {
    Publish {
        properties: will.properties.clone(),
        ..Publish::new(will.topic.clone(), will.payload.clone(), will.qos, will.retain)
    }
}
