//! A device asks for its shadow, or says what it is, at a [desk](crate::desk).
//!
//! Holds: whatever is wrong with a request is answered on `…/rejected`, never in silence; requests of one device are answered in order.
//! Ignorant of: what is merged how ([`fleet_core::shadow`]), and of sockets.

use std::sync::Arc;

use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::shadow::message::{self, Rejection, Token};
use fleet_core::shadow::{self, Change, Changed, Shadow};
use fleet_core::topic::{Channel, DeviceTopic};
use serde_json::Value;
use sqlx::PgPool;

use crate::desk::{self, Clerk, Desk, Room, Serving};
use crate::ingest::Sender;
use crate::metrics::{Limit, Metrics};
use crate::store::{Incoming, Store};
use crate::wire::Publish;

/// Devices are shared out among so many tasks: each answer waits for a COMMIT.
const TASKS: usize = 4;
/// What a request counts for in the queue beside its document.
const OVERHEAD_BYTES: usize = 1024;

/// The way in; a device always goes to the same desk.
pub(crate) struct Shadows(Vec<Desk<Arc<Sender>>>);

impl Shadows {
    /// Hands a request over, waiting for room as long as it takes, and for its end.
    pub(crate) async fn ask(&self, sender: Arc<Sender>, incoming: Incoming) {
        let place = usize::try_from(sender.device.0.unsigned_abs()).unwrap_or_default() % self.0.len();
        self.0[place].ask(sender, incoming).await;
    }
}

/// Answers what devices ask about their shadows.
#[derive(Clone)]
pub(crate) struct Keeper {
    pub(crate) settings: config::Shadow,
    pub(crate) db: PgPool,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
}

impl Keeper {
    /// Starts the tasks.
    pub(crate) fn open(self, store: &Store) -> (Shadows, Vec<Serving>) {
        let requests = self.settings.request_queue.div_ceil(TASKS);
        let bytes = requests.saturating_mul(self.settings.max_bytes + OVERHEAD_BYTES);
        let room = Room { requests, bytes, bound: Limit::ShadowQueue };
        let metrics = self.metrics.clone();
        let open = |_| desk::open(self.clone(), &room, store.clone(), metrics.clone());
        let (desks, serving) = (0..TASKS).map(open).unzip();
        (Shadows(desks), serving)
    }

    async fn get(&self, sender: &Sender, payload: &[u8]) -> (Token, Result<Value, Rejection>) {
        let (token, asked) = message::read_get(payload);
        let got = match asked {
            Ok(()) => {
                desk::until_committed(&self.metrics, || self.read(sender)).await.map_err(|error| failed(sender, &error))
            }
            Err(rejection) => Err(rejection),
        };
        let answer = got.map(|shadow| message::got(&shadow, &token, self.clock.now()));
        (token, answer)
    }

    async fn read(&self, sender: &Sender) -> fleet_core::Result<Shadow> {
        let mut tx = self.db.begin().await?;
        let shadow = shadow::find(&mut tx, sender.device).await?;
        shadow::seen(&mut tx, sender.device, &shadow).await?;
        tx.commit().await?;
        Ok(shadow)
    }

    async fn update(&self, sender: &Sender, payload: &[u8]) -> (Token, Result<Value, Rejection>) {
        let (token, asked) = message::read_update(payload);
        let change = match asked {
            Ok(change) => change,
            Err(rejection) => return (token, Err(rejection)),
        };
        let changed = desk::until_committed(&self.metrics, || self.change(sender, &change)).await;
        let answer = changed
            .map(|changed| message::accepted(&change, changed.after.version, &token, self.clock.now()))
            .map_err(|error| failed(sender, &error));
        (token, answer)
    }

    async fn change(&self, sender: &Sender, change: &Change) -> fleet_core::Result<Changed> {
        let (mut tx, now) = (self.db.begin().await?, self.clock.now());
        let changed = shadow::change(&mut tx, sender.device, change, "device", &self.settings, now).await?;
        tx.commit().await?;
        Ok(changed)
    }
}

/// What a device is told of an error; the log is told of one that is ours.
fn failed(sender: &Sender, error: &fleet_core::Error) -> Rejection {
    let rejection = Rejection::of(error);
    if rejection.code == 500 {
        tracing::error!(%error, device.id = %sender.id, "a shadow could not be answered");
    }
    rejection
}

impl Clerk for Keeper {
    type By = Arc<Sender>;
    /// What is accepted is told; a device that listens to all of its shadow need not hear its own questions.
    const IS_ROUTED: bool = false;

    async fn answer(&self, sender: &Arc<Sender>, asked: &Publish) -> Option<Publish> {
        let is_get = DeviceTopic::parse(&asked.topic).is_some_and(|topic| topic.channel == Channel::ShadowGet);
        let (kind, (token, answer)) = if is_get {
            ("got", self.get(sender, &asked.payload).await)
        } else {
            ("updated", self.update(sender, &asked.payload).await)
        };
        let (outcome, ending, body) = match answer {
            Ok(body) => (kind, "accepted", body),
            Err(rejection) => ("rejected", "rejected", message::rejected(&rejection, &token, self.clock.now())),
        };
        self.metrics.told.shadows.with_label_values(&[outcome]).inc();
        Some(desk::answer(asked, format!("{}/{ending}", asked.topic), &body))
    }
}
