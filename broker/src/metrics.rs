//! What the broker counts. Labels are closed sets; a device or topic is never a label.

mod lines;
mod told;

use std::ops::Deref;
use std::sync::Arc;

use fleet_core::claim::{self, request::Answer};
use fleet_core::issuing::Code;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry};

use crate::wire::Reason;

pub(crate) use self::lines::Lines;
pub(crate) use self::told::Told;

/// The broker's metrics; cloning shares them.
#[derive(Clone, Debug)]
pub struct Metrics(Arc<Meters>);

impl Deref for Metrics {
    type Target = Meters;

    fn deref(&self) -> &Meters {
        &self.0
    }
}

/// The metrics one by one.
#[derive(Debug)]
pub struct Meters {
    /// Connections that are open and authenticated.
    pub connections: IntGauge,
    /// Connections whose handshake is under way.
    pub handshakes: IntGauge,
    /// Clients that connect too often.
    pub flapping: IntGauge,
    /// Sessions that two addresses fight over.
    pub conflicts: IntGauge,
    /// CONNECTs that wait for their credential to be verified.
    pub authenticating: IntGauge,
    /// Connections that ended before their first packet, by why.
    pub early_ends: IntCounterVec,
    /// Times the TLS files had changed, by what became of them.
    pub tls_reloads: IntCounterVec,
    /// 1 while the TLS files cannot be used and older ones are in force.
    pub tls_broken: IntGauge,
    /// When the server certificate in force ends, in seconds since the epoch; 0 without TLS.
    pub tls_certificate_expires: IntGauge,
    /// CONNECTs answered, by what they were answered.
    pub connects: IntCounterVec,
    /// Connections ended, by why.
    pub disconnects: IntCounterVec,
    /// PUBLISH packets received.
    pub publishes: IntCounter,
    /// PUBLISH packets sent.
    pub deliveries: IntCounter,
    /// QoS 1 messages acknowledged after their COMMIT.
    pub acknowledged: IntCounter,
    /// PUBLISH or SUBSCRIBE refused by the topic rules.
    pub denied: IntCounterVec,
    /// Subscriptions held.
    pub subscriptions: IntGauge,
    /// Retained messages held.
    pub retained: IntGauge,
    /// Sessions that outlive their connections.
    pub sessions: IntGauge,
    /// Devices that are held in memory because somebody may see some devices of their tenant only.
    pub scoped_devices: IntGauge,
    /// Messages put into the queues of such sessions.
    pub queued_for_sessions: IntCounter,
    /// A bound was hit, by which.
    pub limits: IntCounterVec,
    /// Messages waiting for the writers.
    pub queued: IntGauge,
    /// Messages committed, by kind.
    pub committed: IntCounterVec,
    /// Readings stored for the first time.
    pub stored: IntCounter,
    /// What is counted of log lines.
    pub(crate) lines: Lines,
    /// Readings that were there already.
    pub duplicates: IntCounter,
    /// Payloads put aside because they could not be read.
    pub dead_letters: IntCounter,
    /// Certificates that devices asked for, by what became of that.
    pub renewals: IntCounterVec,
    /// Requests of devices to come in by a claim, by what became of that.
    pub provision: IntCounterVec,
    /// What is counted of what devices are told and say for themselves.
    pub(crate) told: Told,
    /// Messages a batch.
    pub batch_size: Histogram,
    /// From the first message of a batch to its COMMIT, in seconds.
    pub commit_seconds: Histogram,
    /// Commits that failed and were tried again.
    pub retries: IntCounter,
    /// Signs of life that found no room among the tracked devices.
    pub untracked: IntCounter,
    /// Newest values forgotten because a device has too many metrics.
    pub metrics_dropped: IntCounter,
    /// Tracked devices forgotten to make room for others.
    pub evicted: IntCounter,
    /// Readings whose clock ran ahead.
    pub clamped: IntCounter,
    /// Tenants that have as many shapes as they may.
    pub full_shapes: IntGauge,
    /// Clients whose packets are written down.
    pub traces: IntGauge,
    /// Times all open connections were checked because rights had changed.
    pub rechecks: IntCounter,
    /// Times the database could not be asked for changed rights and questions.
    pub control_failures: IntCounter,
    /// Bytes received from clients.
    pub bytes_received: IntCounter,
    /// Bytes sent to clients.
    pub bytes_sent: IntCounter,
}

/// The bounds of the broker, as label values of `muster_mqtt_limit_hits_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Limit {
    /// `mqtt.max_connections`
    Connections,
    /// `mqtt.max_packet_bytes`
    PacketBytes,
    /// `mqtt.receive_maximum`
    ReceiveMaximum,
    /// `mqtt.max_subscriptions`
    Subscriptions,
    /// `mqtt.outbox_messages` or `mqtt.outbox_bytes`, QoS 0: dropped
    OutboxDropped,
    /// `mqtt.outbox_messages` or `mqtt.outbox_bytes`, QoS 1: connection ended
    OutboxFull,
    /// `mqtt.max_retained` or `mqtt.max_retained_bytes`
    Retained,
    /// `sessions.max`
    Sessions,
    /// `sessions.queue_messages` or `sessions.queue_bytes`: a message did not reach a session
    SessionQueue,
    /// `sessions.queue_age_s`, or the message's own expiry: it was deleted from the queue of a session
    SessionAge,
    /// `sessions.store_queue_ops` or `sessions.store_queue_bytes`: the socket was not read for a while
    StoreQueue,
    /// `mqtt.connect_timeout_ms`
    ConnectTimeout,
    /// `admission.connects_per_s`
    ConnectRate,
    /// `admission.max_handshakes`
    Handshakes,
    /// `admission.max_refusals`: closed without a word
    Refusals,
    /// `admission.auth_failures`: refused, as too many wrong credentials came from the address
    AuthenticationFailures,
    /// `admission.flapping_connects`: refused
    Flapping,
    /// `admission.conflict_takeovers`: refused
    IdentityConflict,
    /// `admission.tracked_addresses`: one was forgotten
    TrackedAddresses,
    /// `admission.tracked_clients`: one was forgotten
    TrackedClients,
    /// `mqtt.max_messages_per_s`: not read for a while, or disconnected
    MessageRate,
    /// `mqtt.max_bytes_per_s`: not read for a while, or disconnected
    ByteRate,
    /// `admission.max_authentications`
    Authentications,
    /// `admission.authentication_timeout_ms`
    AuthenticationTimeout,
    /// `mqtt.packet_timeout_ms`
    PacketTimeout,
    /// `ingest.queue_messages` or `ingest.queue_bytes`: the socket was not read for a while
    IngestQueue,
    /// The client's own Maximum Packet Size: not sent
    ClientPacketBytes,
    /// `mqtt.max_traces`
    Traces,
    /// Connection events that found no room on their way to the database: forgotten
    Events,
    /// `certificates.renewal_queue`: the socket was not read for a while
    RenewalQueue,
    /// `admission.max_claimants`: told to come again
    Claimants,
    /// `provisioning.request_queue`: the socket was not read for a while
    ProvisioningQueue,
    /// `shadow.request_queue`: the socket was not read for a while
    ShadowQueue,
    /// `commands.response_queue`: the socket was not read for a while
    ResponseQueue,
    /// Devices that came to listen all at once: the socket was not read for a while
    DispatchQueue,
    /// Versions of firmware of one tenant: since when there is one more is not kept
    FirmwareVersions,
}

impl Limit {
    const ALL: [Self; 36] = [
        Self::Connections,
        Self::PacketBytes,
        Self::ReceiveMaximum,
        Self::Subscriptions,
        Self::OutboxDropped,
        Self::OutboxFull,
        Self::Retained,
        Self::Sessions,
        Self::SessionQueue,
        Self::SessionAge,
        Self::StoreQueue,
        Self::ConnectTimeout,
        Self::ConnectRate,
        Self::Handshakes,
        Self::Refusals,
        Self::AuthenticationFailures,
        Self::Flapping,
        Self::IdentityConflict,
        Self::TrackedAddresses,
        Self::TrackedClients,
        Self::MessageRate,
        Self::ByteRate,
        Self::Authentications,
        Self::AuthenticationTimeout,
        Self::PacketTimeout,
        Self::IngestQueue,
        Self::ClientPacketBytes,
        Self::Events,
        Self::Traces,
        Self::RenewalQueue,
        Self::ProvisioningQueue,
        Self::ShadowQueue,
        Self::ResponseQueue,
        Self::DispatchQueue,
        Self::FirmwareVersions,
        Self::Claimants,
    ];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Connections => "connections",
            Self::PacketBytes => "packet_bytes",
            Self::ReceiveMaximum => "receive_maximum",
            Self::Subscriptions => "subscriptions",
            Self::OutboxDropped => "outbox_dropped",
            Self::OutboxFull => "outbox_full",
            Self::Retained => "retained",
            Self::Sessions => "sessions",
            Self::SessionQueue => "session_queue",
            Self::SessionAge => "session_age",
            Self::StoreQueue => "store_queue",
            Self::ConnectTimeout => "connect_timeout",
            Self::ConnectRate => "connect_rate",
            Self::Handshakes => "handshakes",
            Self::Refusals => "refusals",
            Self::AuthenticationFailures => "authentication_failures",
            Self::Flapping => "flapping",
            Self::IdentityConflict => "identity_conflict",
            Self::TrackedAddresses => "tracked_addresses",
            Self::TrackedClients => "tracked_clients",
            Self::MessageRate => "message_rate",
            Self::ByteRate => "byte_rate",
            Self::Authentications => "authentications",
            Self::AuthenticationTimeout => "authentication_timeout",
            Self::PacketTimeout => "packet_timeout",
            Self::IngestQueue => "ingest_queue",
            Self::ClientPacketBytes => "client_packet_bytes",
            Self::Events => "events",
            Self::Traces => "traces",
            Self::RenewalQueue => "renewal_queue",
            Self::ProvisioningQueue => "provisioning_queue",
            Self::ShadowQueue => "shadow_queue",
            Self::ResponseQueue => "response_queue",
            Self::DispatchQueue => "dispatch_queue",
            Self::FirmwareVersions => "firmware_versions",
            Self::Claimants => "claimants",
        }
    }
}

impl Metrics {
    /// Makes and registers the metrics.
    ///
    /// # Errors
    /// When a name is registered already.
    pub fn new(registry: &Registry) -> prometheus::Result<Self> {
        Meters::new(registry).map(|meters| Self(Arc::new(meters)))
    }
}

impl Meters {
    fn new(registry: &Registry) -> prometheus::Result<Self> {
        let metrics = Self {
            connections: IntGauge::new("muster_mqtt_connections", "Open, authenticated MQTT connections")?,
            handshakes: IntGauge::new("muster_mqtt_handshakes", "Connections whose handshake is under way")?,
            flapping: IntGauge::new("muster_mqtt_flapping_clients", "Clients that connect too often")?,
            conflicts: IntGauge::new("muster_mqtt_identity_conflicts", "Sessions that two addresses fight over")?,
            authenticating: IntGauge::new(
                "muster_mqtt_authenticating",
                "CONNECTs that wait for their credential to be verified",
            )?,
            early_ends: counters(
                "muster_mqtt_early_ends_total",
                "Connections that ended before their first packet, by reason",
                "reason",
            )?,
            tls_reloads: counters(
                "muster_tls_reloads_total",
                "Times the TLS files had changed, by what became of them",
                "outcome",
            )?,
            tls_broken: IntGauge::new(
                "muster_tls_files_broken",
                "1 while the TLS files cannot be used and older ones are in force",
            )?,
            tls_certificate_expires: IntGauge::new(
                "muster_tls_certificate_expires_timestamp_seconds",
                "When the server certificate in force ends; 0 without TLS",
            )?,
            connects: counters("muster_mqtt_connects_total", "CONNECTs answered, by reason", "reason")?,
            disconnects: counters("muster_mqtt_disconnects_total", "Connections ended, by reason", "reason")?,
            publishes: IntCounter::new("muster_mqtt_publishes_received_total", "PUBLISH packets received")?,
            deliveries: IntCounter::new("muster_mqtt_publishes_sent_total", "PUBLISH packets sent")?,
            acknowledged: IntCounter::new("muster_mqtt_acknowledged_total", "Messages acknowledged after COMMIT")?,
            denied: counters("muster_mqtt_denied_total", "Refused by the topic rules, by action", "action")?,
            subscriptions: IntGauge::new("muster_mqtt_subscriptions", "Subscriptions held")?,
            retained: IntGauge::new("muster_mqtt_retained_messages", "Retained messages held")?,
            scoped_devices: IntGauge::new(
                "muster_mqtt_scoped_devices",
                "Devices held in memory for those who may see some devices of a tenant only",
            )?,
            sessions: IntGauge::new("muster_mqtt_sessions", "Sessions that outlive their connections")?,
            queued_for_sessions: IntCounter::new(
                "muster_mqtt_session_messages_total",
                "Messages put into the queues of sessions that outlive their connections",
            )?,
            limits: counters("muster_mqtt_limit_hits_total", "Times a bound was hit, by bound", "limit")?,
            queued: IntGauge::new("muster_ingest_queue_messages", "Messages waiting for the writers")?,
            committed: counters("muster_ingest_committed_total", "Messages committed, by kind", "kind")?,
            stored: IntCounter::new("muster_ingest_readings_stored_total", "Readings stored for the first time")?,
            lines: Lines::new()?,
            duplicates: IntCounter::new("muster_ingest_readings_duplicate_total", "Readings that were stored already")?,
            dead_letters: IntCounter::new("muster_ingest_dead_letters_total", "Payloads that could not be read")?,
            provision: counters("muster_mqtt_provision_total", "Claim requests, by outcome", "outcome")?,
            told: Told::new()?,
            renewals: counters(
                "muster_certificate_renewals_total",
                "Certificates that devices asked for, by outcome",
                "outcome",
            )?,
            batch_size: histogram("muster_ingest_batch_messages", "Messages a batch", &BATCH_BUCKETS)?,
            commit_seconds: histogram(
                "muster_ingest_commit_seconds",
                "From the first message of a batch to its COMMIT",
                &SECONDS_BUCKETS,
            )?,
            retries: IntCounter::new("muster_ingest_commit_retries_total", "Commits that failed and were tried again")?,
            untracked: IntCounter::new(
                "muster_ingest_untracked_total",
                "Signs of life that found no room: ingest.max_tracked_devices was hit",
            )?,
            metrics_dropped: IntCounter::new(
                "muster_ingest_latest_dropped_total",
                "Newest values forgotten because a device has too many metrics",
            )?,
            evicted: IntCounter::new(
                "muster_ingest_tracked_evicted_total",
                "Tracked devices forgotten to make room: ingest.max_tracked_devices was hit",
            )?,
            clamped: IntCounter::new(
                "muster_ingest_readings_clamped_total",
                "Readings whose clock ran ahead by more than ingest.max_ahead_ms",
            )?,
            full_shapes: IntGauge::new(
                "muster_ingest_full_shapes",
                "Tenants with ingest.max_shapes sets of metric names: new sets are stored as JSON",
            )?,
            traces: IntGauge::new("muster_mqtt_traces", "Traces held, running or still readable")?,
            rechecks: IntCounter::new(
                "muster_control_rechecks_total",
                "Times all open connections were checked because rights had changed",
            )?,
            control_failures: IntCounter::new(
                "muster_control_failures_total",
                "Times the database could not be asked for changed rights and questions",
            )?,
            bytes_received: IntCounter::new("muster_mqtt_bytes_received_total", "Bytes received from clients")?,
            bytes_sent: IntCounter::new("muster_mqtt_bytes_sent_total", "Bytes sent to clients")?,
        };
        metrics.register(registry)?;
        metrics.show_every_label();
        Ok(metrics)
    }

    fn register(&self, registry: &Registry) -> prometheus::Result<()> {
        registry.register(Box::new(self.connections.clone()))?;
        registry.register(Box::new(self.handshakes.clone()))?;
        registry.register(Box::new(self.flapping.clone()))?;
        registry.register(Box::new(self.conflicts.clone()))?;
        registry.register(Box::new(self.authenticating.clone()))?;
        registry.register(Box::new(self.early_ends.clone()))?;
        registry.register(Box::new(self.tls_reloads.clone()))?;
        registry.register(Box::new(self.tls_broken.clone()))?;
        registry.register(Box::new(self.tls_certificate_expires.clone()))?;
        registry.register(Box::new(self.connects.clone()))?;
        registry.register(Box::new(self.disconnects.clone()))?;
        registry.register(Box::new(self.publishes.clone()))?;
        registry.register(Box::new(self.deliveries.clone()))?;
        registry.register(Box::new(self.acknowledged.clone()))?;
        registry.register(Box::new(self.denied.clone()))?;
        registry.register(Box::new(self.subscriptions.clone()))?;
        registry.register(Box::new(self.retained.clone()))?;
        registry.register(Box::new(self.scoped_devices.clone()))?;
        registry.register(Box::new(self.sessions.clone()))?;
        registry.register(Box::new(self.queued_for_sessions.clone()))?;
        registry.register(Box::new(self.limits.clone()))?;
        registry.register(Box::new(self.queued.clone()))?;
        registry.register(Box::new(self.committed.clone()))?;
        registry.register(Box::new(self.stored.clone()))?;
        registry.register(Box::new(self.duplicates.clone()))?;
        self.lines.register(registry)?;
        registry.register(Box::new(self.dead_letters.clone()))?;
        registry.register(Box::new(self.renewals.clone()))?;
        registry.register(Box::new(self.provision.clone()))?;
        self.told.register(registry)?;
        registry.register(Box::new(self.batch_size.clone()))?;
        registry.register(Box::new(self.commit_seconds.clone()))?;
        registry.register(Box::new(self.retries.clone()))?;
        registry.register(Box::new(self.untracked.clone()))?;
        registry.register(Box::new(self.metrics_dropped.clone()))?;
        registry.register(Box::new(self.evicted.clone()))?;
        registry.register(Box::new(self.clamped.clone()))?;
        registry.register(Box::new(self.full_shapes.clone()))?;
        registry.register(Box::new(self.traces.clone()))?;
        registry.register(Box::new(self.rechecks.clone()))?;
        registry.register(Box::new(self.control_failures.clone()))?;
        registry.register(Box::new(self.bytes_received.clone()))?;
        registry.register(Box::new(self.bytes_sent.clone()))
    }

    /// A bound that was never hit shows as 0 rather than not at all.
    fn show_every_label(&self) {
        for limit in Limit::ALL {
            self.limits.with_label_values(&[limit.label()]);
        }
        for kind in ["telemetry", "logs", "status"] {
            self.committed.with_label_values(&[kind]);
        }
        for reason in ["tls handshake", "proxy untrusted", "proxy header"] {
            self.early_ends.with_label_values(&[reason]);
        }
        for outcome in ["taken", "refused"] {
            self.tls_reloads.with_label_values(&[outcome]);
        }
        for outcome in ["issued", "repeated"].into_iter().chain(Code::ALL.map(Code::name)) {
            self.renewals.with_label_values(&[outcome]);
        }
        for outcome in Answer::OUTCOMES.into_iter().chain(claim::request::Code::ALL.map(claim::request::Code::name)) {
            self.provision.with_label_values(&[outcome]);
        }
        for action in ["connect", "publish", "subscribe", "receive"] {
            self.denied.with_label_values(&[action]);
        }
        self.connects.with_label_values(&[Reason::Success.text()]);
    }

    /// Counts that a bound was hit that many times.
    pub(crate) fn hit_many(&self, limit: Limit, times: u64) {
        self.limits.with_label_values(&[limit.label()]).inc_by(times);
    }

    /// Counts that a bound was hit.
    pub(crate) fn hit(&self, limit: Limit) {
        self.limits.with_label_values(&[limit.label()]).inc();
    }
}

/// 1 to 10,000 messages.
const BATCH_BUCKETS: [f64; 9] = [1.0, 4.0, 16.0, 64.0, 128.0, 256.0, 512.0, 1000.0, 10_000.0];
/// 1 ms to 10 s.
const SECONDS_BUCKETS: [f64; 12] = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0, 10.0];

fn counters(name: &str, help: &str, label: &str) -> prometheus::Result<IntCounterVec> {
    IntCounterVec::new(Opts::new(name, help), &[label])
}

fn histogram(name: &str, help: &str, buckets: &[f64]) -> prometheus::Result<Histogram> {
    Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec()))
}
