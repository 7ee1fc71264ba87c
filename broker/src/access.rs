//! Who may connect, and on which topics. Deny by default.
//!
//! Holds: identity comes from the credential, never from the client id. Which of user name and password was wrong
//! is not said. While the database is away nobody new is let in, and is told so.

use std::sync::Arc;

use bytestring::ByteString;
use fleet_core::clock::Clock;
use fleet_core::credential;
use fleet_core::policy::{Principal, TopicRules, Who};
use fleet_core::token::{self, Keys};
use fleet_core::topic::{Channel, DeviceTopic};
use sqlx::PgPool;
use tokio::sync::Semaphore;

use crate::ingest::Sender;
use crate::listener::Arrival;
use crate::wire::{Connect, Reason};

/// Credentials verified at once; a storm of connects queues here, not in front of the REST API's connections.
const VERIFY_AT_ONCE: usize = 8;

/// Decides who may come in.
pub(crate) struct Access {
    db: PgPool,
    keys: Arc<Keys>,
    clock: Clock,
    verifying: Semaphore,
}

/// Why a CONNECT was refused: the reason code, and a text for the client.
pub(crate) type Refusal = (Reason, &'static str);

impl Access {
    pub(crate) fn new(db: PgPool, keys: Arc<Keys>, clock: Clock) -> Self {
        Self { db, keys, clock, verifying: Semaphore::new(VERIFY_AT_ONCE) }
    }

    /// Who stands behind a CONNECT: a device by `{tenant}/{device}` and its token, or a user by e-mail and access
    /// token (MQTT 5 §3.1.3.5, §4.12).
    pub(crate) async fn authenticate(&self, connect: &Connect, arrival: &mut Arrival) -> Result<Principal, Refusal> {
        // It is not kept beyond this: an idle connection must stay small.
        let _certificate = arrival.certificate.take();
        let (Some(username), Some(password)) = (&connect.username, &connect.password) else {
            return Err((Reason::NotAuthorized, "expected a user name and a password"));
        };
        match self.verify(username, password).await {
            Ok(Some(principal)) => Ok(principal),
            Ok(None) => Err((Reason::BadUserNameOrPassword, "user name or password is wrong")),
            Err(error) => {
                tracing::warn!(%error, "a credential could not be verified");
                Err((Reason::ServerUnavailable, "the database is away: try again shortly"))
            }
        }
    }

    async fn verify(&self, username: &str, password: &[u8]) -> fleet_core::Result<Option<Principal>> {
        let _turn = self.verifying.acquire().await.expect("the semaphore is never closed");
        let mut db = self.db.acquire().await?;
        let now = self.clock.now();
        if username.contains('/') {
            return credential::verify(&mut db, username, password, now).await;
        }
        let Ok(token) = std::str::from_utf8(password) else { return Ok(None) };
        match token::principal(&mut db, &self.keys, token, now).await {
            Ok(principal) => Ok(Some(principal)),
            Err(fleet_core::Error::BadToken(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// What becomes of a message on a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// Readings of this device: stored before they are acknowledged.
    Telemetry(Arc<Sender>),
    /// The state of this device: stored before it is acknowledged.
    Status(Arc<Sender>),
    /// Handed to whoever subscribes.
    Live,
}

/// The rights of one connection, compiled when it came in.
pub(crate) struct Rights {
    rules: TopicRules,
    /// The device, when the principal is one.
    sender: Option<Arc<Sender>>,
    /// Devices publish on few topics: the last decision is nearly always the next one.
    last: Option<(ByteString, Route)>,
}

impl Rights {
    pub(crate) fn new(principal: &Principal) -> Self {
        let sender = match &principal.who {
            Who::Device { key, id } => {
                Some(Arc::new(Sender { tenant: principal.tenant, device: *key, id: id.clone() }))
            }
            Who::User { .. } => None,
        };
        Self { rules: principal.topic_rules(), sender, last: None }
    }

    /// The device, when the principal is one.
    pub(crate) fn sender(&self) -> Option<&Arc<Sender>> {
        self.sender.as_ref()
    }

    /// Where a message on this topic goes; the text says why it may not.
    pub(crate) fn publish(&mut self, topic: &ByteString) -> Result<Route, &'static str> {
        if let Some((last, route)) = &self.last
            && last == topic
        {
            return Ok(route.clone());
        }
        let route = self.decide(topic)?;
        // A copy: the topic itself is a slice of everything that was read with it.
        self.last = Some((ByteString::from(&**topic), route.clone()));
        Ok(route)
    }

    fn decide(&self, topic: &str) -> Result<Route, &'static str> {
        if !self.rules.may_publish(topic) {
            return Err("publishing on this topic is not allowed");
        }
        let stored: fn(Arc<Sender>) -> Route = match DeviceTopic::parse(topic).map(|topic| topic.channel) {
            Some(Channel::Telemetry) => Route::Telemetry,
            Some(Channel::Status) => Route::Status,
            _ => return Ok(Route::Live),
        };
        let sender = self.sender.as_ref().ok_or("only the device itself may publish its telemetry and status")?;
        Ok(stored(sender.clone()))
    }

    /// Whether this filter may be subscribed to.
    pub(crate) fn may_subscribe(&self, filter: &str) -> bool {
        self.rules.may_subscribe(filter)
    }
}
