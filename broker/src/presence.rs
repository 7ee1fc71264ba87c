//! Who is connected: what an operator may see of an open connection, and the way to tell it something.
//!
//! Holds: a connection counts for itself, in plain numbers that others may read at any time; nobody waits for anybody.
//! What is [ordered](Presence::order) reaches the connection's own task, which does it.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Bound;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use bytestring::ByteString;
use chrono::{DateTime, Utc};
use fleet_core::connection_event::{Event, Kind};
use fleet_core::control::{Connection, Filter, Owner};
use fleet_core::id::{ConnectionId, TenantKey};
use fleet_core::policy::{Principal, Who};
use parking_lot::Mutex;
use serde_json::Value;

use crate::listener::Transport;
use crate::mailbox::Mailbox;
use crate::session::{SessionName, SubscriberId};
use crate::trace::Trace;
use crate::wire::{Reason, Version};

/// What a connection is told from outside.
#[derive(Debug)]
pub(crate) enum Order {
    /// To end.
    Leave(Leave),
    /// That what it came by is worth nothing from then on.
    Until(DateTime<Utc>),
    /// That its principal may do something else than before.
    Rights(Arc<Principal>),
    /// To write down what comes and goes, or to stop that.
    Trace(Option<Arc<Trace>>),
}

/// How a connection is to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Leave {
    /// What the client is told.
    pub(crate) reason: Reason,
    /// The same in words.
    pub(crate) text: ByteString,
    /// Whether its session ends too.
    pub(crate) end_session: bool,
}

/// A number of one writer and many readers.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    /// For its one writer: no other adds meanwhile, so this costs no more than a plain number.
    pub(crate) fn add(&self, more: u64) {
        self.set(self.get() + more);
    }

    /// For its one writer.
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a connection counts.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    pub(crate) messages_in: Count,
    pub(crate) messages_out: Count,
    pub(crate) bytes_in: Count,
    pub(crate) bytes_out: Count,
    pub(crate) in_flight: Count,
    pub(crate) subscriptions: Count,
}

/// What is known of a connection when it begins.
#[derive(Debug)]
pub(crate) struct Particulars {
    pub(crate) session: SessionName,
    pub(crate) principal: Arc<Principal>,
    pub(crate) client_id: ByteString,
    pub(crate) address: SocketAddr,
    pub(crate) transport: Transport,
    pub(crate) version: Version,
    pub(crate) since_ms: i64,
    pub(crate) keep_alive_s: Option<u16>,
    pub(crate) session_expiry_s: u32,
    pub(crate) mailbox: Arc<Mailbox>,
    /// Its name in the router.
    pub(crate) subscriber: SubscriberId,
}

/// An open connection, as others see it.
#[derive(Debug)]
pub(crate) struct Presence {
    pub(crate) id: ConnectionId,
    session: SessionName,
    principal: Mutex<Arc<Principal>>,
    client_id: ByteString,
    address: SocketAddr,
    transport: Transport,
    version: Version,
    since_ms: i64,
    keep_alive_s: Option<u16>,
    session_expiry_s: u32,
    mailbox: Arc<Mailbox>,
    subscriber: SubscriberId,
    pub(crate) counts: Counts,
    orders: Mutex<Vec<Order>>,
    has_orders: AtomicBool,
}

impl Presence {
    pub(crate) fn new(particulars: Particulars) -> Self {
        let Particulars { session, principal, client_id, address, transport, .. } = particulars;
        Self {
            id: ConnectionId::new(),
            session,
            principal: Mutex::new(principal),
            client_id,
            address,
            transport,
            version: particulars.version,
            since_ms: particulars.since_ms,
            keep_alive_s: particulars.keep_alive_s,
            session_expiry_s: particulars.session_expiry_s,
            mailbox: particulars.mailbox,
            subscriber: particulars.subscriber,
            counts: Counts::default(),
            orders: Mutex::default(),
            has_orders: AtomicBool::new(false),
        }
    }

    /// The session it holds.
    pub(crate) fn session(&self) -> &SessionName {
        &self.session
    }

    /// Its name in the router.
    pub(crate) fn subscriber(&self) -> SubscriberId {
        self.subscriber
    }

    /// Where it comes from.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Whose it is, and what that one may do now.
    pub(crate) fn principal(&self) -> Arc<Principal> {
        self.principal.lock().clone()
    }

    /// Notes that the standing of its principal has changed.
    pub(crate) fn set_principal(&self, principal: Arc<Principal>) {
        *self.principal.lock() = principal;
    }

    /// Tells it something; it is woken to do it.
    pub(crate) fn order(&self, order: Order) {
        let mut orders = self.orders.lock();
        orders.push(order);
        self.has_orders.store(true, Ordering::Release);
        drop(orders);
        self.mailbox.nudge();
    }

    /// Takes what it was told; nothing is nearly always the answer, and costs one look.
    pub(crate) fn take_orders(&self) -> Vec<Order> {
        if !self.has_orders.load(Ordering::Acquire) {
            return Vec::new();
        }
        let mut orders = self.orders.lock();
        self.has_orders.store(false, Ordering::Release);
        std::mem::take(&mut orders)
    }

    /// An event about it.
    pub(crate) fn event(&self, kind: Kind, detail: Value, at_ms: i64) -> Event {
        Event::new(&self.principal(), &self.client_id, kind, detail, at_ms)
    }

    fn owner(&self) -> Owner {
        match &self.principal.lock().who {
            Who::Device { id, .. } => Owner::Device(id.clone()),
            Who::User { id, .. } => Owner::User(*id),
            Who::Claim { id, .. } => Owner::Claim(*id),
        }
    }

    /// It, as it is shown. What waits for a session that outlives it is known elsewhere.
    pub(crate) fn view(&self, queue: Option<(u64, u64)>, flapping: bool, traced: bool) -> Connection {
        let (queued_messages, queued_bytes) = queue.unwrap_or_else(|| self.mailbox.waiting());
        let counts = &self.counts;
        Connection {
            id: self.id,
            session: self.session.to_string(),
            client_id: self.client_id.to_string(),
            owner: self.owner(),
            since_ms: self.since_ms,
            address: self.address,
            transport: self.transport.into(),
            protocol: match self.version {
                Version::V311 => 4,
                Version::V5 => 5,
            },
            keep_alive_s: self.keep_alive_s,
            session_expiry_s: self.session_expiry_s,
            queued_messages,
            queued_bytes,
            in_flight: counts.in_flight.get(),
            messages_in: counts.messages_in.get(),
            messages_out: counts.messages_out.get(),
            bytes_in: counts.bytes_in.get(),
            bytes_out: counts.bytes_out.get(),
            subscriptions: counts.subscriptions.get(),
            flapping,
            traced,
        }
    }
}

/// All who are connected, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Presences(Mutex<BTreeMap<ConnectionId, Arc<Presence>>>);

impl Presences {
    /// Takes in one who has come.
    pub(crate) fn enter(&self, presence: Presence) -> Arc<Presence> {
        let presence = Arc::new(presence);
        self.0.lock().insert(presence.id, presence.clone());
        presence
    }

    /// Forgets one who goes.
    pub(crate) fn leave(&self, id: ConnectionId) {
        self.0.lock().remove(&id);
    }

    /// One of a tenant.
    pub(crate) fn get(&self, tenant: TenantKey, id: ConnectionId) -> Option<Arc<Presence>> {
        let found = self.0.lock().get(&id).cloned();
        found.filter(|presence| presence.principal.lock().tenant == tenant)
    }

    /// Some of a tenant, beginning behind `after`.
    pub(crate) fn page(
        &self,
        tenant: TenantKey,
        filter: &Filter,
        after: Option<ConnectionId>,
        limit: usize,
    ) -> Vec<Arc<Presence>> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let takes = |presence: &&Arc<Presence>| {
            presence.principal.lock().tenant == tenant
                && filter.takes(&presence.owner(), &presence.client_id, presence.transport.into())
        };
        let all = self.0.lock();
        all.range((from, Bound::Unbounded)).map(|(_, presence)| presence).filter(takes).take(limit).cloned().collect()
    }

    /// The one that holds a session.
    pub(crate) fn of_session(&self, session: &str) -> Option<Arc<Presence>> {
        self.0.lock().values().find(|presence| &*presence.session == session).cloned()
    }

    /// Everybody.
    pub(crate) fn all(&self) -> Vec<Arc<Presence>> {
        self.0.lock().values().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use fleet_core::gateway::Children;
    use fleet_core::id::{DeviceKey, UserId};
    use fleet_core::policy::{Grants, Proof};

    use super::*;
    use crate::metrics::Metrics;

    fn mailbox() -> Arc<Mailbox> {
        Mailbox::new(10, 1000, Metrics::new(&prometheus::Registry::new()).unwrap())
    }

    fn presence(tenant: i64, who: Who, client_id: &str, transport: Transport) -> Presence {
        let principal =
            Principal { tenant: TenantKey(tenant), tenant_id: "main".parse().unwrap(), who, proof: Proof::default() };
        Presence::new(Particulars {
            session: format!("main//{client_id}").into(),
            principal: Arc::new(principal),
            client_id: client_id.into(),
            address: "127.0.0.1:1".parse().unwrap(),
            transport,
            version: Version::V5,
            since_ms: 0,
            keep_alive_s: None,
            session_expiry_s: 0,
            mailbox: mailbox(),
            subscriber: 1,
        })
    }

    fn device(tenant: i64, client_id: &str) -> Presence {
        let who = Who::Device { key: DeviceKey(1), id: client_id.parse().unwrap(), children: Children::default() };
        presence(tenant, who, client_id, Transport::Tcp)
    }

    #[test]
    fn pages_keep_to_the_tenant_and_the_filter() {
        let all = Presences::default();
        let own: Vec<_> = ["a", "b", "c"].map(|id| all.enter(device(1, id)).id).to_vec();
        let foreign = all.enter(device(2, "d")).id;
        let user = Who::User { id: UserId::new(), key: None, grants: Grants::default(), platform: false };
        let user = all.enter(presence(1, user, "grafana", Transport::WebSocket)).id;
        let ids = |filter: Filter, after, limit| -> Vec<_> {
            all.page(TenantKey(1), &filter, after, limit).iter().map(|presence| presence.id).collect()
        };
        assert_eq!(ids(Filter::default(), None, 10), [&own[..], &[user]].concat());
        assert_eq!(ids(Filter::default(), Some(own[0]), 2), own[1..]);
        assert_eq!(ids(Filter { device: Some("b".parse().unwrap()), ..Filter::default() }, None, 10), own[1..2]);
        assert_eq!(ids(Filter { client_id: Some("grafana".into()), ..Filter::default() }, None, 10), [user]);
        let websocket = Some(Transport::WebSocket.into());
        assert_eq!(ids(Filter { transport: websocket, ..Filter::default() }, None, 10), [user]);
        assert!(all.get(TenantKey(1), foreign).is_none() && all.get(TenantKey(2), foreign).is_some());
        assert_eq!(all.of_session("main//d").unwrap().id, foreign);
        all.leave(foreign);
        assert!(all.get(TenantKey(2), foreign).is_none());
        assert_eq!(all.all().len(), 4);
    }

    #[tokio::test]
    async fn an_order_wakes_the_connection_and_is_taken_once() {
        let presence = device(1, "a");
        assert!(presence.take_orders().is_empty());
        presence.order(Order::Trace(None));
        presence.order(Order::Until(DateTime::UNIX_EPOCH));
        tokio::time::timeout(std::time::Duration::from_secs(5), presence.mailbox.left()).await.expect("it is woken");
        assert_eq!(presence.take_orders().len(), 2);
        assert!(presence.take_orders().is_empty());
    }
}
