//! `$SYS/broker/…`: what the broker counts, as messages, under the names that mosquitto has made customary.
//!
//! Holds: they are retained in memory only, and sent at QoS 0; whose rules allow `$SYS/#` may read them, and nobody can
//! publish there. The numbers are those of the metrics.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::Shared;
use crate::metrics::{Limit, Metrics};
use crate::wire::{Publish, QoS};

/// Publishes every `every`, until it is dropped.
pub(crate) async fn publish(shared: Arc<Shared>, every: Duration) {
    let began = Instant::now();
    let mut tick = interval(every);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let clients = shared.sessions.client_count();
        for (topic, value) in values(&shared.metrics, began.elapsed(), clients, shared.sessions.waiting()) {
            let topic = ByteString::from(format!("$SYS/broker/{topic}"));
            let message = Publish::new(topic, Bytes::from(value), QoS::AtMostOnce, true);
            shared.store.publish_own(&message);
        }
    }
}

/// Topics below `$SYS/broker/` with their values; `clients` counts those who are connected and those whose session
/// waits for them, `waiting` messages and bytes.
fn values(metrics: &Metrics, uptime: Duration, clients: usize, waiting: (u64, u64)) -> Vec<(&'static str, String)> {
    let connected = usize::try_from(metrics.connections.get()).unwrap_or_default();
    let retained = metrics.retained.get().unsigned_abs();
    let limit = |limit: Limit| metrics.limits.with_label_values(&[limit.label()]).get();
    let dropped = limit(Limit::OutboxDropped) + limit(Limit::SessionQueue);
    let (received, sent) = (metrics.publishes.get().to_string(), metrics.deliveries.get().to_string());
    vec![
        ("version", format!("muster {}", env!("CARGO_PKG_VERSION"))),
        ("uptime", format!("{} seconds", uptime.as_secs())),
        ("clients/connected", connected.to_string()),
        ("clients/disconnected", clients.saturating_sub(connected).to_string()),
        ("clients/total", clients.to_string()),
        ("sessions/persistent", metrics.sessions.get().to_string()),
        ("messages/received", received.clone()),
        ("messages/sent", sent.clone()),
        ("publish/messages/received", received),
        ("publish/messages/sent", sent),
        ("publish/messages/dropped", dropped.to_string()),
        ("messages/stored", (waiting.0 + retained).to_string()),
        ("store/messages/count", waiting.0.to_string()),
        ("store/messages/bytes", waiting.1.to_string()),
        ("retained messages/count", retained.to_string()),
        ("subscriptions/count", metrics.subscriptions.get().to_string()),
        ("bytes/received", metrics.bytes_received.get().to_string()),
        ("bytes/sent", metrics.bytes_sent.get().to_string()),
    ]
}
