//! Changes that are committed together, sorted by the statement that keeps them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytestring::ByteString;
use fleet_core::config;
use fleet_core::id::SessionId;
use fleet_core::retained;
use fleet_core::session::{self, Enqueue, Leave, Message, NewSession, Resume};
use sqlx::PgConnection;

use super::{Kept, Op};
use crate::mailbox::Delivery;
use crate::rows::{self, Now};
use crate::session::{Durable, Subscription};
use crate::will::Will;
use crate::wire::{Publish, QoS};

/// One transaction.
#[derive(Default)]
pub(super) struct Batch {
    touched: HashSet<SessionId>,
    end: Vec<SessionId>,
    begin: Vec<NewSession>,
    resume: Vec<Resume>,
    leave: Vec<Leave>,
    wills_sent: Vec<SessionId>,
    /// `None`: no longer subscribed. The last word counts.
    subscriptions: HashMap<(SessionId, ByteString), Option<Subscription>>,
    messages: Vec<Message>,
    rows: Vec<Enqueue>,
    acknowledge: Vec<(SessionId, i64)>,
    release: Vec<(SessionId, i64)>,
    receive: Vec<(SessionId, u16)>,
    complete: Vec<(SessionId, u16)>,
    /// Which queues had no room, and for how many.
    pub(super) dropped: HashMap<SessionId, (Arc<Durable>, i64)>,
    /// `None`: forgotten. The last word counts.
    retained: HashMap<ByteString, Option<Message>>,
    /// Whose received packet ids are read.
    pub(super) resumed: Vec<SessionId>,
    /// Whose queues are read, and after which place.
    pub(super) pages: Vec<(SessionId, i64)>,
    /// The same sessions, in the same order as their rows come.
    pub(super) loading: Vec<Arc<Durable>>,
    /// What the rows are, for those who are connected.
    pub(super) placed: Vec<(Arc<Durable>, Delivery)>,
    pub(super) counts: Counts,
}

/// What is counted once it is committed.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) queued: u64,
    pub(super) refused: u64,
}

impl Batch {
    /// Whether this change may join: all statements of a batch run in one fixed order, so what begins or ends a
    /// session must come before its other changes.
    pub(super) fn takes(&self, op: &Op) -> bool {
        match op.session() {
            Some(session) if op.is_structural() => !self.touched.contains(&session.id),
            _ => true,
        }
    }

    /// Sorts a change in. Places in queues are given here.
    pub(super) fn add(&mut self, op: &Op, settings: &config::Sessions, now: Now) {
        if let Some(session) = op.session() {
            self.touched.insert(session.id);
        }
        match op {
            Op::Begin { session, will, .. } => self.begin.push(NewSession {
                id: session.id,
                name: session.name.to_string(),
                owner: session.owner(),
                client_id: session.client_id.to_string(),
                expiry_s: session.expiry_s(),
                will: will.as_ref().map(|will| Will::row(will, now)),
                now_ms: now.ms,
            }),
            Op::Resume { session, will, .. } => self.resume(session, will.as_ref(), now),
            Op::Leave { session, keep_will } => self.leave(session, *keep_will, now),
            Op::WillSent { session } => self.wills_sent.push(session.id),
            Op::End { session } => self.end.push(session.id),
            Op::Subscribe { session, filters, retained, .. } => {
                for (filter, options) in filters {
                    self.subscriptions.insert((session.id, filter.clone()), Some(*options));
                }
                for delivery in retained {
                    self.messages.push(rows::message(&delivery.publish, delivery.accepted, now));
                    self.place(session, delivery.clone(), settings);
                }
            }
            Op::Unsubscribe { session, filters, .. } => {
                for filter in filters {
                    self.subscriptions.insert((session.id, filter.clone()), None);
                }
            }
            Op::Publish(kept) => self.publish(kept, settings, now),
            Op::Acknowledge { session, offset, .. } => self.acknowledge.push((session.id, *offset)),
            Op::Release { session, offset, .. } => self.release.push((session.id, *offset)),
            Op::Complete { session, packet_id, .. } => self.complete.push((session.id, packet_id.get())),
            Op::Load { session } => self.load(session),
        }
    }

    fn resume(&mut self, session: &Arc<Durable>, will: Option<&crate::wire::Will>, now: Now) {
        let will = will.map(|will| Will::row(will, now));
        self.resume.push(Resume { id: session.id, expiry_s: session.expiry_s(), will, now_ms: now.ms });
        self.resumed.push(session.id);
        let mut queue = session.queue.lock();
        queue.behind = true;
        queue.loaded = 0;
        drop(queue);
        self.load(session);
    }

    fn load(&mut self, session: &Arc<Durable>) {
        // Asked for twice, it would come twice.
        if !self.pages.iter().any(|(id, _)| *id == session.id) {
            self.pages.push((session.id, session.queue.lock().loaded));
            self.loading.push(session.clone());
        }
    }

    fn leave(&mut self, session: &Arc<Durable>, keep_will: bool, now: Now) {
        let expiry_s = session.expiry_s();
        let expires_ms = (expiry_s != u32::MAX).then(|| now.ms + i64::from(expiry_s) * 1000);
        let sent_to = session.queue.lock().sent_to;
        self.leave.push(Leave { id: session.id, expires_ms, expiry_s, sent_to, keep_will, now_ms: now.ms });
    }

    fn publish(&mut self, kept: &Kept, settings: &config::Sessions, now: Now) {
        let message = || rows::message(&kept.publish, kept.accepted, now);
        if kept.retained {
            let retained = (!kept.publish.payload.is_empty()).then(message);
            self.retained.insert(kept.publish.topic.clone(), retained);
        }
        if let Some((session, packet_id)) = &kept.received {
            self.receive.push((session.id, packet_id.get()));
        }
        if kept.targets.is_empty() {
            return;
        }
        self.messages.push(message());
        for target in &kept.targets {
            let publish = Publish {
                qos: target.qos,
                retain: target.retain,
                packet_id: None,
                dup: false,
                topic_alias: None,
                subscription_ids: target.subscription_ids.clone(),
                ..kept.publish.clone()
            };
            self.place(&target.session, Delivery::new(publish, kept.accepted), settings);
        }
    }

    /// Gives the last of `messages` its place in a session's queue, where there is room.
    fn place(&mut self, session: &Arc<Durable>, mut delivery: Delivery, settings: &config::Sessions) {
        debug_assert!(delivery.publish.qos > QoS::AtMostOnce);
        let bytes = rows::queue_bytes(&delivery.publish);
        let mut queue = session.queue.lock();
        if !queue.add(bytes, settings) {
            self.dropped.entry(session.id).or_insert_with(|| (session.clone(), 0)).1 += 1;
            self.counts.refused += 1;
            return;
        }
        self.counts.queued += 1;
        delivery.offset = Some(queue.last_offset);
        self.rows.push(Enqueue {
            session: session.id,
            offset: queue.last_offset,
            message: self.messages.len() - 1,
            qos: delivery.publish.qos as u8,
            retain: delivery.publish.retain,
            subscription_ids: delivery.publish.subscription_ids.clone(),
        });
        drop(queue);
        self.placed.push((session.clone(), delivery));
    }

    /// Gives back the room that was taken by what is not to be committed.
    pub(super) fn undo(self) {
        for (session, delivery) in self.placed {
            session.queue.lock().remove(1, rows::queue_bytes(&delivery.publish));
        }
    }

    /// Writes all of it.
    pub(super) async fn write(&self, db: &mut PgConnection) -> fleet_core::Result<()> {
        session::end(db, &self.end).await?;
        session::begin(db, &self.begin).await?;
        session::resume(db, &self.resume).await?;
        session::leave(db, &self.leave).await?;
        session::clear_wills(db, &self.wills_sent).await?;
        let mut subscribe = Vec::new();
        let mut unsubscribe = Vec::new();
        for ((id, filter), options) in &self.subscriptions {
            match options {
                Some(options) => subscribe.push((*id, rows::subscription(filter, *options))),
                None => unsubscribe.push((*id, filter.to_string())),
            }
        }
        session::subscribe(db, &subscribe).await?;
        session::unsubscribe(db, &unsubscribe).await?;
        session::enqueue(db, &self.messages, &self.rows).await?;
        session::acknowledge(db, &self.acknowledge).await?;
        session::release(db, &self.release).await?;
        session::receive(db, &self.receive).await?;
        session::complete(db, &self.complete).await?;
        let dropped: Vec<_> = self.dropped.iter().map(|(id, (_, more))| (*id, *more)).collect();
        session::dropped(db, &dropped).await?;
        let mut put = Vec::new();
        let mut forget = Vec::new();
        for (topic, message) in &self.retained {
            match message {
                Some(message) => put.push(message.clone()),
                None => forget.push(topic.to_string()),
            }
        }
        retained::put(db, &put).await?;
        retained::forget(db, &forget).await
    }
}
