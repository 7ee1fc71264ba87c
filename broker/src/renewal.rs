//! A device asks for its next certificate: bounded queue → one task → one transaction → COMMIT → the answer → the acknowledgement.
//!
//! Holds: what a device asked for is acknowledged after the certificate is a row and the answer is on its way to whoever
//! subscribes, in that order; whatever is wrong with a request is answered on `…/rejected`, never in silence. A connection is not
//! read while its request is under way, so nobody has more than one in the queue. While the database is away the task waits
//! with what it holds.
//! Why a task of its own: renewals are rare and sign something, so they neither belong into a writer's batch nor may they
//! hold a connection's own task up.
//! Ignorant of: who may renew what ([`fleet_core::issuing`]), and of sockets.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytestring::ByteString;
use chrono::{DateTime, Utc};
use fleet_core::audit::{self, Author, Entry};
use fleet_core::authority::Pki;
use fleet_core::clock::Clock;
use fleet_core::issuing::{self, Code, Issued, Rejection, Renewal};
use fleet_core::policy::Proof;
use serde_json::json;
use sqlx::PgPool;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::ingest::Sender;
use crate::metrics::{Limit, Metrics};
use crate::queue::{self, Held, Queue};
use crate::store::{Incoming, Store};
use crate::wire::{Publish, PublishProperties, QoS};

/// First wait before a failed commit is tried again; doubled up to [`RETRY_AT_MOST`].
const RETRY_FIRST: Duration = Duration::from_millis(50);
/// Longest wait between two tries.
const RETRY_AT_MOST: Duration = Duration::from_secs(1);
/// A database that has not answered by then is away.
const COMMIT_WITHIN: Duration = Duration::from_secs(30);

/// What a device asked for.
pub(crate) struct Request {
    pub(crate) sender: Arc<Sender>,
    /// What its connection came by, and where from.
    pub(crate) proof: Proof,
    pub(crate) address: SocketAddr,
    pub(crate) incoming: Incoming,
}

/// A request, and who waits for its end.
struct UnderWay {
    request: Request,
    _until_dropped: oneshot::Sender<()>,
}

/// The way in.
pub(crate) struct Renewals {
    queue: Queue<UnderWay>,
    metrics: Metrics,
}

impl Renewals {
    /// Hands a request over, waiting for room as long as it takes, and for its end.
    pub(crate) async fn ask(&self, request: Request) {
        let bytes = request.incoming.publish.payload.len();
        let (until_dropped, ended) = oneshot::channel();
        let under_way = UnderWay { request, _until_dropped: until_dropped };
        if let Err(under_way) = self.queue.offer(under_way, bytes) {
            self.metrics.hit(Limit::RenewalQueue);
            // The task is gone only when the broker stops; what it has not taken was not acknowledged.
            self.queue.wait(under_way, bytes).await;
        }
        // Nothing is ever sent.
        let _ = ended.await;
    }
}

/// The running task.
pub(crate) struct Renewing(JoinHandle<()>);

impl Renewing {
    /// Waits for what was asked to be answered; the task ends when every [`Renewals`] is gone.
    pub(crate) async fn stop(mut self, within: Duration) {
        if timeout(within, &mut self.0).await.is_err() {
            tracing::warn!("a certificate could not be renewed in time; its device was not acknowledged");
            self.0.abort();
        }
    }
}

/// Starts the task.
pub(crate) fn start(pki: Pki, db: PgPool, clock: Clock, store: Store, metrics: Metrics) -> (Renewals, Renewing) {
    let settings = pki.settings();
    let max_bytes = settings.renewal_queue.saturating_mul(settings.max_csr_bytes);
    let (queue, requests) = queue::bounded(settings.renewal_queue, max_bytes);
    let task = Task { requests, pki, db, clock, store, metrics: metrics.clone() };
    (Renewals { queue, metrics }, Renewing(tokio::spawn(task.run())))
}

struct Task {
    requests: mpsc::Receiver<Held<UnderWay>>,
    pki: Pki,
    db: PgPool,
    clock: Clock,
    store: Store,
    metrics: Metrics,
}

impl Task {
    async fn run(mut self) {
        while let Some(held) = self.requests.recv().await {
            let UnderWay { request, _until_dropped } = held.item;
            let answer = self.answer(&request).await;
            self.store.publish(Incoming::plain(answer)).await;
            let Request { mut incoming, .. } = request;
            // A request is for this moment: nobody is to find it later.
            incoming.publish.retain = false;
            self.metrics.acknowledged.inc_by(u64::from(incoming.receipt.is_some()));
            self.store.publish(incoming).await;
        }
    }

    async fn answer(&self, request: &Request) -> Publish {
        let asked = &request.incoming.publish;
        let renewal = match issuing::Request::decode(&asked.payload, self.pki.settings().max_csr_bytes) {
            Ok(csr) => self.until_committed(request, &csr).await,
            Err(rejection) => Renewal::Rejected(rejection),
        };
        let (outcome, answer, body) = match &renewal {
            Renewal::Issued(issued) => ("issued", "accepted", accepted(issued)),
            Renewal::Repeated(issued) => ("repeated", "accepted", accepted(issued)),
            Renewal::Rejected(rejection) => (rejection.code.name(), "rejected", rejected(rejection)),
        };
        tracing::info!(device.id = %request.sender.id, outcome, "a device asked for a certificate");
        self.metrics.renewals.with_label_values(&[outcome]).inc();
        let topic = ByteString::from(format!("{}/{answer}", asked.topic));
        let correlation_data = asked.properties.as_ref().and_then(|properties| properties.correlation_data.clone());
        let properties = PublishProperties { correlation_data, ..PublishProperties::default() };
        let properties = properties.correlation_data.is_some().then(|| Arc::new(properties));
        Publish { properties, ..Publish::new(topic, Bytes::from(body.to_string()), QoS::AtLeastOnce, false) }
    }

    /// Tries until the database has committed. What it refuses for good, and what we cannot do, is told as a failure of ours.
    async fn until_committed(&self, request: &Request, csr: &issuing::Request) -> Renewal {
        let mut wait = RETRY_FIRST;
        loop {
            let renewed = timeout(COMMIT_WITHIN, self.renew(request, csr)).await;
            match renewed.unwrap_or(Err(fleet_core::Error::Database(sqlx::Error::PoolTimedOut))) {
                Ok(renewal) => return renewal,
                Err(fleet_core::Error::Database(error)) if !fleet_core::error::is_refused(&error) => {
                    self.metrics.retries.inc();
                    tracing::warn!(%error, "a certificate cannot be renewed: trying until the database is back");
                    sleep(wait).await;
                    wait = (wait * 2).min(RETRY_AT_MOST);
                }
                Err(error) => {
                    tracing::error!(%error, device.id = %request.sender.id, "a certificate could not be renewed");
                    return Renewal::Rejected(Rejection::new(Code::Internal, "the server failed; its log says why"));
                }
            }
        }
    }

    async fn renew(&self, request: &Request, csr: &issuing::Request) -> fleet_core::Result<Renewal> {
        let Request { sender, proof, address, .. } = request;
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
