//! What an earlier run of the broker has left: sessions, and what is due to them; retained messages.

use std::sync::Arc;
use std::time::Duration;

use bytestring::ByteString;
use fleet_core::clock::from_ms;
use fleet_core::directory::Directory;
use fleet_core::session::{self, Stored};
use fleet_core::{retained, status};
use sqlx::PgConnection;

use crate::Shared;
use crate::access::Rights;
use crate::connection::end_session;
use crate::retained::Retained;
use crate::router::{GroupKey, Recipient, Router, Subscriber};
use crate::rows::{self, Now};
use crate::session::{Due, Durable, Sessions};
use crate::store::Op;
use crate::will::Will;

/// How exact the timers of sessions are.
const TICK: Duration = Duration::from_millis(100);

/// Retained messages first; they are in nobody's way. Those that find no room any more stay in the database.
pub(crate) async fn retained_messages(db: &mut PgConnection, retained: &Retained, now: Now) -> fleet_core::Result<()> {
    for message in retained::load(db).await? {
        let (publish, accepted) = rows::publish(message, now);
        if retained.put(&publish, accepted).is_err() {
            tracing::warn!(topic = &*publish.topic, "no room for a retained message: it is not sent to subscribers");
        }
    }
    Ok(())
}

/// Devices that were online when an earlier broker died are lost now; sessions wait for their clients.
pub(crate) async fn sessions(
    db: &mut PgConnection,
    sessions: &Sessions,
    router: &Router,
    directory: &Arc<Directory>,
    now: Now,
) -> fleet_core::Result<Vec<(Arc<Durable>, Stored)>> {
    status::mark_all_lost(db, now.ms, "the broker stopped").await?;
    let stored = session::load(db, from_ms(now.ms)).await?;
    let scoped = stored.iter().map(|stored| &stored.owner).filter(|owner| !owner.grants().is_unscoped());
    directory.load(db, &scoped.map(|owner| owner.tenant).collect()).await?;
    let restored = stored.into_iter().map(|stored| {
        let session = sessions.restore(&stored);
        subscribe(&session, &stored, router, directory);
        (session, stored)
    });
    Ok(restored.collect())
}

fn subscribe(session: &Arc<Durable>, stored: &Stored, router: &Router, directory: &Arc<Directory>) {
    let rights = Rights::new(&session.owner(), directory);
    for subscription in &stored.subscriptions {
        let filter = ByteString::from(subscription.filter.as_str());
        let options = rows::options(subscription);
        let group = GroupKey::parse(&filter);
        let topics = group.as_ref().map_or(&*filter, |group| &group.filter);
        // The rights may have changed while the broker was away.
        if !rights.may_subscribe(topics) {
            continue;
        }
        let guard = rights.delivery_guard(topics);
        session.subscribe(&filter, options);
        let to = Recipient::Durable(session.clone());
        router.subscribe(&filter, Subscriber { id: session.number, to, options, guard });
    }
}

/// Sets the timers of the restored sessions. What was connected when the broker died is away from now on, and leaves
/// its will.
pub(crate) async fn go_on(shared: &Shared, restored: Vec<(Arc<Durable>, Stored)>, now: Now) {
    for (session, stored) in restored {
        let will = stored.will.clone().map(|will| Will::restore(session.owner(), will, now));
        if stored.connected {
            let (later, at_once) = match will {
                Some(will) if !will.delay().is_zero() && stored.expiry_s > 0 => (Some(will), None),
                will => (None, will),
            };
            let keep_will = later.is_some();
            shared.sessions.away(&session, stored.expiry_s, later);
            shared.store.wait(Op::Leave { session, keep_will }).await;
            if let Some(will) = at_once {
                will.send(shared).await;
            }
        } else {
            shared.sessions.stay_away(&session, &stored, will, now.ms);
        }
    }
}

/// What the timers of sessions ask for, until the broker stops.
pub(crate) async fn keep_time(shared: Arc<Shared>) {
    let mut tick = tokio::time::interval(TICK);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        for due in shared.sessions.due() {
            match due {
                Due::Will(session, will) => {
                    will.send(&shared).await;
                    shared.store.wait(Op::WillSent { session }).await;
                }
                Due::End(session, will) => {
                    if let Some(will) = will {
                        will.send(&shared).await;
                    }
                    end_session(&shared, &session).await;
                }
            }
        }
    }
}
