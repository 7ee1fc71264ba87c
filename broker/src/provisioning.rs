//! A device that nobody has enrolled asks to come in by a claim, at a [desk](crate::desk).
//!
//! Holds: an answer goes to the topic of the client that asked, and to no other; whatever is wrong with a request is answered with
//! a code, never in silence. Ignorant of: what is granted ([`fleet_core::claim::request`]), and of sockets.

use std::net::SocketAddr;

use bytestring::ByteString;
use fleet_core::claim::Claimant;
use fleet_core::claim::request::{self, Answer, Code, MAX_BYTES, Origin, Rejection, Request};
use fleet_core::clock::Clock;
use fleet_core::config;
use fleet_core::id::{DeviceId, TenantId};
use fleet_core::policy::{Principal, Who};
use fleet_core::topic::ROOT;
use sqlx::PgPool;

use crate::desk::{self, Clerk, Room};
use crate::metrics::{Limit, Metrics};
use crate::wire::Publish;

/// Who asks.
pub(crate) struct By {
    claimant: Claimant,
    asker: DeviceId,
    address: SocketAddr,
}

impl By {
    /// The claim by which this principal came, if it did.
    pub(crate) fn of(principal: &Principal, address: SocketAddr) -> Option<Self> {
        let Who::Claim { id, asker } = &principal.who else { return None };
        let claimant = Claimant {
            tenant: principal.tenant,
            tenant_id: principal.tenant_id.clone(),
            claim: *id,
            expires_at: principal.proof.valid_until?,
        };
        Some(Self { claimant, asker: asker.clone(), address })
    }
}

/// Where a client of a tenant hears what becomes of its request.
pub(crate) fn response_topic(tenant: &TenantId, asker: &str) -> ByteString {
    format!("{ROOT}{tenant}/_provision/response/{asker}").into()
}

/// Lets devices in.
pub(crate) struct Provisioning {
    pub(crate) settings: config::Provisioning,
    pub(crate) db: PgPool,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
}

impl Provisioning {
    /// How many may wait.
    pub(crate) fn room(&self) -> Room {
        let requests = self.settings.request_queue;
        Room { requests, bytes: requests.saturating_mul(MAX_BYTES), bound: Limit::ProvisioningQueue }
    }

    async fn ask(&self, by: &By, request: &Request) -> Answer {
        let from = Origin { asker: by.asker.to_string(), address: by.address.ip().to_string() };
        let answered = desk::until_committed(&self.metrics, || {
            request::answer(&self.db, &by.claimant, request, &from, &self.settings, self.clock.now())
        });
        answered.await.unwrap_or_else(|error| {
            tracing::error!(%error, claim.id = %by.claimant.claim, "a device could not be let in");
            Answer::Rejected(Rejection::new(Code::Internal, "the server failed; its log says why"))
        })
    }
}

impl Clerk for Provisioning {
    type By = By;
    /// What a device says here is nobody else's.
    const IS_ROUTED: bool = false;

    async fn answer(&self, by: &By, asked: &Publish) -> Option<Publish> {
        let topic = response_topic(&by.claimant.tenant_id, by.asker.as_str());
        let elsewhere = asked.properties.as_ref().and_then(|properties| properties.response_topic.as_ref());
        let request = match elsewhere {
            Some(elsewhere) if *elsewhere != topic => {
                let message = format!("answers go to {topic}: expected that as response topic, or none");
                Err(Rejection::new(Code::Malformed, message))
            }
            _ => Request::decode(&asked.payload),
        };
        let (answer, request) = match request {
            Ok(request) => (self.ask(by, &request).await, Some(request)),
            Err(rejection) => (Answer::Rejected(rejection), None),
        };
        self.metrics.provision.with_label_values(&[answer.outcome()]).inc();
        tracing::info!(claim.id = %by.claimant.claim, outcome = answer.outcome(), "a device asked to come in");
        let request = request.as_ref();
        let body = answer.message(request.map(|request| &request.id), request.map(|request| request.nonce.as_str()));
        Some(desk::answer(asked, topic, &body))
    }
}
