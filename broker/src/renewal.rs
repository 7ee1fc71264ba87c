//! A device asks for its next certificate, at a [desk](crate::desk).
//!
//! Holds: whatever is wrong with a request is answered on `…/rejected`, never in silence.
//! Ignorant of: who may renew what ([`fleet_core::issuing`]), and of sockets.

use std::net::SocketAddr;
use std::sync::Arc;

use chrono::{DateTime, Utc};
use fleet_core::audit::{self, Author, Entry};
use fleet_core::authority::Pki;
use fleet_core::clock::Clock;
use fleet_core::issuing::{self, Code, Issued, Rejection, Renewal};
use fleet_core::policy::Proof;
use serde_json::json;
use sqlx::PgPool;

use crate::desk::{self, Clerk, Room};
use crate::ingest::Sender;
use crate::metrics::{Limit, Metrics};
use crate::wire::Publish;

/// Who asks.
pub(crate) struct By {
    pub(crate) sender: Arc<Sender>,
    /// What its connection came by.
    pub(crate) proof: Proof,
    /// From where.
    pub(crate) address: SocketAddr,
}

/// Signs what devices ask for.
pub(crate) struct Renewals {
    pub(crate) pki: Pki,
    pub(crate) db: PgPool,
    pub(crate) clock: Clock,
    pub(crate) metrics: Metrics,
}

impl Renewals {
    /// How many may wait.
    pub(crate) fn room(&self) -> Room {
        let settings = self.pki.settings();
        let bytes = settings.renewal_queue.saturating_mul(settings.max_csr_bytes);
        Room { requests: settings.renewal_queue, bytes, bound: Limit::RenewalQueue }
    }
}

impl Clerk for Renewals {
    type By = By;
    const IS_ROUTED: bool = true;

    async fn answer(&self, by: &By, asked: &Publish) -> Option<Publish> {
        let renewal = match issuing::Request::decode(&asked.payload, self.pki.settings().max_csr_bytes) {
            Ok(csr) => desk::until_committed(&self.metrics, || self.renew(by, &csr)).await.unwrap_or_else(|error| {
                tracing::error!(%error, device.id = %by.sender.id, "a certificate could not be renewed");
                Renewal::Rejected(Rejection::new(Code::Internal, "the server failed; its log says why"))
            }),
            Err(rejection) => Renewal::Rejected(rejection),
        };
        let (outcome, answer, body) = match &renewal {
            Renewal::Issued(issued) => ("issued", "accepted", accepted(issued)),
            Renewal::Repeated(issued) => ("repeated", "accepted", accepted(issued)),
            Renewal::Rejected(rejection) => (rejection.code.name(), "rejected", rejected(rejection)),
        };
        tracing::info!(device.id = %by.sender.id, outcome, "a device asked for a certificate");
        self.metrics.renewals.with_label_values(&[outcome]).inc();
        Some(desk::answer(asked, format!("{}/{answer}", asked.topic), &body))
    }
}

impl Renewals {
    async fn renew(&self, by: &By, csr: &issuing::Request) -> fleet_core::Result<Renewal> {
        let By { sender, proof, address } = by;
        let (mut tx, now) = (self.db.begin().await?, self.clock.now());
        let renewal = issuing::renew(&mut tx, &self.pki, (sender.tenant, &sender.id), proof, csr, now).await?;
        if let Renewal::Issued(issued) = &renewal {
            let by = Author::device(sender.tenant, sender.id.clone(), Some(address.ip().to_string()));
            audit::record(&mut tx, &by, &entry(sender, proof, issued), now).await?;
        }
        tx.commit().await?;
        Ok(renewal)
    }
}

/// What is to be known of a renewal.
fn entry(sender: &Sender, proof: &Proof, issued: &Issued) -> Entry {
    let registered = &issued.registered;
    let after = json!({
        "id": issued.credential.id,
        "fingerprint": registered.fingerprint.to_string(),
        "subject": registered.subject,
        "authority": registered.authority,
        "serial": registered.serial.map(|serial| serial.to_string()),
        "not_after": registered.not_after,
        "by": proof.credential,
    });
    Entry::of("certificate.renew", issued.credential.id).on(&sender.id).after(&after)
}

fn accepted(issued: &Issued) -> serde_json::Value {
    json!({
        "certificate": issued.pem,
        "chain": issued.chain,
        "not_after": issued.registered.not_after.timestamp_millis(),
        "renew_after": issued.registered.renew_after.map(ms),
    })
}

fn rejected(rejection: &Rejection) -> serde_json::Value {
    let mut body = json!({ "code": rejection.code.name(), "message": rejection.message });
    if let Some(at) = rejection.renew_after {
        body["renew_after"] = json!(ms(at));
    }
    body
}

fn ms(at: DateTime<Utc>) -> i64 {
    at.timestamp_millis()
}
