//! Who may connect, and on which topics. Deny by default.
//!
//! Holds: identity comes from the credential, never from the client id. Which of user name and password was wrong
//! is not said. While the database is away nobody new is let in, and is told so.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use fleet_core::claim;
use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::control::{self, Verdict};
use fleet_core::credential::{self, Offer};
use fleet_core::directory::Directory;
use fleet_core::gateway::Children;
use fleet_core::id::{CommandId, DeviceId, DeviceKey, TenantId, TenantKey};
use fleet_core::policy::{Guard, Principal, TopicRules, Who};
use fleet_core::token::{self, Keys};
use fleet_core::topic::{Channel, DeviceTopic, ROOT};
use sqlx::{PgConnection, PgPool};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use uuid::Uuid;

use crate::batch::{Batcher, Bounds, NoAnswer};
use crate::identity::{self, Certificates};
use crate::ingest::Sender;
use crate::listener::Arrival;
use crate::metrics::{Limit, Metrics};
use crate::wire::{Connect, Reason};

/// Access tokens verified at once: users are few, and must not take the REST API's connections.
const TOKENS_AT_ONCE: usize = 4;

/// Decides who may come in.
pub(crate) struct Access {
    db: PgPool,
    keys: Arc<Keys>,
    clock: Clock,
    metrics: Metrics,
    within: Duration,
    /// Devices come in thousands at once: their tokens are verified together.
    devices: Batcher<DeviceToken, Option<Principal>>,
    users: Semaphore,
    claims: Semaphore,
    certificates: Certificates,
    directory: Arc<Directory>,
}

/// `{tenant}/{device}` and a token.
type DeviceToken = (ByteString, Bytes);

/// Why a CONNECT was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) reason: Reason,
    /// For the client, MQTT 5.
    pub(crate) text: &'static str,
    /// When the client should come again, where that is known.
    pub(crate) retry_after: Option<Duration>,
}

impl From<(Reason, &'static str)> for Refusal {
    fn from((reason, text): (Reason, &'static str)) -> Self {
        Self { reason, text, retry_after: None }
    }
}

impl Access {
    pub(crate) fn new(
        db: PgPool,
        keys: Arc<Keys>,
        clock: Clock,
        settings: &config::Admission,
        metrics: &Metrics,
        certificates: Certificates,
        directory: Arc<Directory>,
    ) -> Self {
        let within = Duration::from_millis(settings.authentication_timeout_ms);
        let gauge = metrics.authenticating.clone();
        let bounds = Bounds { waiting: settings.max_authentications, within, gauge };
        let devices = Batcher::start(bounds, {
            let (db, clock) = (db.clone(), clock.clone());
            move |tokens| verify_devices(db.clone(), clock.clone(), tokens)
        });
        let [users, claims] = [Semaphore::new(TOKENS_AT_ONCE), Semaphore::new(TOKENS_AT_ONCE)];
        Self { db, keys, clock, certificates, metrics: metrics.clone(), within, devices, users, claims, directory }
    }

    /// Who stands behind a CONNECT: a device by its certificate, by `{tenant}/{device}` and its token, or by both; a user by
    /// e-mail and access token (MQTT 5 §3.1.3.5, §4.12).
    pub(crate) async fn authenticate(&self, connect: &Connect, arrival: &mut Arrival) -> Result<Principal, Refusal> {
        // It is not kept beyond this: an idle connection must stay small.
        let Some(certificate) = arrival.certificate.take() else { return self.by_password(connect).await };
        let asked = timeout(self.within, self.certificates.holder(&certificate)).await;
        let holder = asked.unwrap_or_else(|_| Err(self.unanswered(NoAnswer::Late)))?;
        if connect.password.is_none() {
            return identity::alone(connect, holder);
        }
        identity::beside(holder.as_ref(), self.by_password(connect).await?)
    }

    /// Sees to it that what scopes ask about is known before this principal is let in: a device whose tenant has users who may
    /// see some devices only, all devices for such a user.
    pub(crate) async fn acquaint(&self, principal: &Principal) -> Result<(), Refusal> {
        let Principal { tenant, tenant_id, who, .. } = principal;
        let is_due = match who {
            Who::Device { key, id, .. } => self.directory.lacks(tenant_id, id, *key),
            Who::User { grants, .. } => !grants.is_unscoped() && !self.directory.holds(tenant_id),
            Who::Claim { .. } => false,
        };
        if !is_due {
            return Ok(());
        }
        let read = async {
            let mut db = self.db.acquire().await?;
            match who {
                Who::Device { key, .. } => self.directory.add(&mut db, tenant_id, *key).await,
                Who::User { .. } | Who::Claim { .. } => self.directory.load(&mut db, &HashSet::from([*tenant])).await,
            }
        };
        match timeout(self.within, read).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                tracing::warn!(%error, "the devices of a tenant could not be read");
                Err(self.unanswered(NoAnswer::Failed))
            }
            Err(_) => Err(self.unanswered(NoAnswer::Late)),
        }
    }

    async fn by_password(&self, connect: &Connect) -> Result<Principal, Refusal> {
        let (Some(username), Some(password)) = (&connect.username, &connect.password) else {
            return Err((Reason::NotAuthorized, "expected a user name and a password").into());
        };
        let found = if claim::parse_username(username).is_some() {
            let asker = asker(connect)?;
            timeout(self.within, self.claim(username, password, asker)).await.unwrap_or(Err(NoAnswer::Late))
        } else if username.contains('/') {
            self.devices.ask((username.clone(), password.clone())).await
        } else {
            timeout(self.within, self.user(password)).await.unwrap_or(Err(NoAnswer::Late))
        };
        match found {
            Ok(Some(principal)) => Ok(principal),
            Ok(None) => Err((Reason::BadUserNameOrPassword, "user name or password is wrong").into()),
            Err(no_answer) => Err(self.unanswered(no_answer)),
        }
    }

    fn unanswered(&self, why: NoAnswer) -> Refusal {
        match why {
            NoAnswer::Failed => (Reason::ServerUnavailable, "the database is away: try again shortly").into(),
            NoAnswer::Full => {
                self.metrics.hit(Limit::Authentications);
                (Reason::ServerBusy, "too many clients are being authenticated").into()
            }
            NoAnswer::Late => {
                self.metrics.hit(Limit::AuthenticationTimeout);
                (Reason::ServerBusy, "the client was not authenticated in time").into()
            }
        }
    }

    async fn claim(&self, username: &str, secret: &[u8], asker: DeviceId) -> Result<Option<Principal>, NoAnswer> {
        let _turn = self.claims.acquire().await.expect("the semaphore is never closed");
        let verified = async {
            let mut db = self.db.acquire().await?;
            claim::verify(&mut db, username, secret, self.clock.now()).await
        };
        let found: fleet_core::Result<_> = verified.await;
        found.map(|claimant| claimant.map(|claimant| claimant.principal(asker))).map_err(|error| {
            tracing::warn!(%error, "the secret of a claim could not be verified");
            NoAnswer::Failed
        })
    }

    async fn user(&self, password: &[u8]) -> Result<Option<Principal>, NoAnswer> {
        let Ok(token) = std::str::from_utf8(password) else { return Ok(None) };
        let _turn = self.users.acquire().await.expect("the semaphore is never closed");
        let verified = async {
            let mut db = self.db.acquire().await?;
            token::principal(&mut db, &self.keys, token, self.clock.now()).await
        };
        match verified.await {
            // To see what somebody sees is for the console.
            Ok(principal) => Ok(Some(principal).filter(|principal| principal.proof.viewer.is_none())),
            Err(fleet_core::Error::BadToken(_)) => Ok(None),
            Err(error) => {
                tracing::warn!(%error, "an access token could not be verified");
                Err(NoAnswer::Failed)
            }
        }
    }
}

impl Access {
    /// What has become of those who were let in, by their places; only of those whose standing is another one.
    pub(crate) async fn recheck(
        &self,
        db: &mut PgConnection,
        principals: &[&Principal],
    ) -> fleet_core::Result<Vec<(usize, Verdict)>> {
        control::recheck(db, self.keys.roles(), principals, self.clock.now()).await
    }
}

/// What a client that asks by a claim calls itself: it is part of the topic on which it hears its answers. One without a name
/// gets one.
fn asker(connect: &Connect) -> Result<DeviceId, Refusal> {
    let name =
        if connect.client_id.is_empty() { Uuid::new_v4().simple().to_string() } else { connect.client_id.to_string() };
    let expected = "expected a client id of 1 to 64 of A-Z a-z 0-9 . _ - that does not begin with _";
    DeviceId::try_from(name).map_err(|_| (Reason::ClientIdentifierNotValid, expected).into())
}

/// Who stands behind each of these; `None` when the database cannot say.
async fn verify_devices(db: PgPool, clock: Clock, tokens: Vec<DeviceToken>) -> Option<Vec<Option<Principal>>> {
    let verified = async {
        let mut db = db.acquire().await?;
        let offers: Vec<_> = tokens.iter().map(|(username, secret)| Offer { username, secret }).collect();
        credential::verify_many(&mut db, &offers, clock.now()).await
    };
    let found: fleet_core::Result<_> = verified.await;
    found.inspect_err(|error| tracing::warn!(%error, devices = tokens.len(), "credentials could not be verified")).ok()
}

/// What becomes of a message on a topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// Readings of this device: stored before they are acknowledged.
    Telemetry(Arc<Sender>),
    /// Log lines of this device: stored before they are acknowledged.
    Logs(Arc<Sender>),
    /// The state of this device: stored before it is acknowledged.
    Status(Arc<Sender>),
    /// A signing request of this device: answered, and acknowledged after the certificate is stored.
    Renewal(Arc<Sender>),
    /// What this device asks or says about its shadow: answered, and acknowledged after what it says is stored.
    Shadow(Arc<Sender>),
    /// What this device says of a command: acknowledged after it is stored.
    Response(Arc<Sender>),
    /// A request to come in, by whoever shows the secret of a claim: answered, and acknowledged after what comes of it is stored.
    Provision,
    /// Handed to whoever subscribes.
    Live,
}

/// The rights of one connection, compiled when it came in.
pub(crate) struct Rights {
    rules: TopicRules,
    /// The device, when the principal is one.
    sender: Option<Arc<Sender>>,
    /// Whether the principal came by a claim.
    is_claim: bool,
    /// Those it acts for, when it is a gateway.
    family: Option<Box<Family>>,
    /// Devices publish on few topics: the last decision is nearly always the next one.
    last: Option<(ByteString, Route)>,
}

impl Rights {
    /// What this principal may do; `devices` tells which devices are in its scope.
    pub(crate) fn new(principal: &Principal, devices: &Arc<Directory>) -> Self {
        let sender = match &principal.who {
            Who::Device { key, id, .. } => {
                Some(Arc::new(Sender { tenant: principal.tenant, device: *key, id: id.clone() }))
            }
            Who::User { .. } | Who::Claim { .. } => None,
        };
        let is_claim = matches!(principal.who, Who::Claim { .. });
        Self { is_claim, rules: principal.topic_rules(devices), sender, family: Family::of(principal), last: None }
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
        // Devices move in and out of scope. A copy: the topic itself is a slice of everything that was read with it.
        self.last = self.rules.is_unscoped().then(|| (ByteString::from(&**topic), route.clone()));
        Ok(route)
    }

    fn decide(&self, topic: &str) -> Result<Route, &'static str> {
        // Whatever the rules say: what the broker tells of itself comes from nobody else.
        if topic.split('/').next() == Some("$SYS") {
            return Err("topics below $SYS are the broker's own");
        }
        let child = self.child(topic);
        if child.is_none() && !self.rules.may_publish(topic) {
            return Err("publishing on this topic is not allowed");
        }
        let Some(DeviceTopic { channel, .. }) = DeviceTopic::parse(topic) else {
            return match (self.is_claim, is_of_provisioning(topic)) {
                (true, _) => Ok(Route::Provision),
                (false, true) => Err("only who shows the secret of a claim asks here, and only the server answers"),
                (false, false) => Ok(Route::Live),
            };
        };
        let stored: fn(Arc<Sender>) -> Route = match channel {
            Channel::Telemetry => Route::Telemetry,
            Channel::Logs => Route::Logs,
            Channel::Status => Route::Status,
            Channel::CertificateRenewal => Route::Renewal,
            Channel::CommandResponse(_) => Route::Response,
            Channel::ShadowGet | Channel::ShadowUpdate => Route::Shadow,
            Channel::Other(rest) if rest.starts_with("certificates/") => {
                return Err("what is said about certificates is the server's own");
            }
            Channel::Other(rest) if rest.starts_with("shadow/") => {
                return Err("what is said about a shadow is the server's own");
            }
            _ => return Ok(Route::Live),
        };
        // Its certificate is a device's own affair, even where another speaks for it.
        if child.is_some() && channel == Channel::CertificateRenewal {
            return Err("a device asks for its own certificate only");
        }
        let sender = child.map(Arc::new).or_else(|| self.sender.clone());
        sender.map(stored).ok_or("only the device itself may publish on this topic")
    }

    /// The device, or the child of a gateway, that a filter is about, and which of its topics.
    pub(crate) fn about<'a>(&self, filter: &'a str) -> Option<(DeviceKey, &'a str)> {
        let own = self.sender.as_ref()?;
        let DeviceTopic { device, channel, .. } = DeviceTopic::parse(filter)?;
        let key = if device == own.id.as_str() { own.device } else { self.child(filter)?.device };
        Some((key, channel.as_str()))
    }

    /// The command that a message asks this device, or one it acts for, to do.
    pub(crate) fn command_in(&self, topic: &str) -> Option<(DeviceKey, CommandId)> {
        if self.sender.is_none() || !topic.ends_with("/request") {
            return None;
        }
        let (device, _) = self.about(topic)?;
        let id = DeviceTopic::parse(topic)?.channel.command()?;
        Some((device, id.parse().ok()?))
    }

    /// The child that a topic or a filter is about.
    fn child(&self, topics: &str) -> Option<Sender> {
        let Family { tenant, tenant_id, children } = &**self.family.as_ref()?;
        let (id, device) = children.of_topic(tenant_id, topics)?;
        Some(Sender { tenant: *tenant, device, id: id.clone() })
    }

    /// Whether a topic or a filter is about a device that this gateway acts for.
    fn is_of_child(&self, topics: &str) -> bool {
        self.family.as_ref().is_some_and(|family| family.children.of_topic(&family.tenant_id, topics).is_some())
    }

    /// The gateway that a refused message is put aside for, because its protocol has no word for a refusal: for one child that
    /// may not be spoken for, it would be closed, and so would all others behind it.
    pub(crate) fn put_aside_for(&self, topic: &str) -> Option<Arc<Sender>> {
        let family = self.family.as_ref()?;
        let is_device = DeviceTopic::parse(topic).is_some_and(|about| about.tenant == family.tenant_id.as_str());
        self.sender.clone().filter(|_| is_device)
    }

    /// What of this filter must not be received although it may be subscribed to.
    pub(crate) fn delivery_guard(&self, filter: &str) -> Option<Guard> {
        // The rules know nothing of children, and would keep all of theirs back.
        if self.is_of_child(filter) { None } else { self.rules.delivery_guard(filter) }
    }

    /// Whether a message on this topic may be received: it may wait for longer than the right to it.
    pub(crate) fn may_receive(&self, topic: &str) -> bool {
        self.rules.may_receive(topic) || self.is_of_child(topic)
    }

    /// Whether this filter may be subscribed to.
    pub(crate) fn may_subscribe(&self, filter: &str) -> bool {
        self.rules.may_subscribe(filter) || self.is_of_child(filter)
    }
}

/// Whether a topic is one by which devices come in.
fn is_of_provisioning(topic: &str) -> bool {
    topic.strip_prefix(ROOT).is_some_and(|below| below.split('/').nth(1) == Some("_provision"))
}

/// A gateway's children, and the tenant whose topics they use.
struct Family {
    tenant: TenantKey,
    tenant_id: TenantId,
    children: Children,
}

impl Family {
    fn of(principal: &Principal) -> Option<Box<Self>> {
        let children = principal.children();
        let (tenant, tenant_id) = (principal.tenant, principal.tenant_id.clone());
        (!children.is_empty()).then(|| Box::new(Self { tenant, tenant_id, children }))
    }
}
