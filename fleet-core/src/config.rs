//! Settings: `config/muster.toml`, compiled in ← the file in `MUSTER_CONFIG` ← `MUSTER__SECTION__KEY`.
//!
//! Loaded once, in `main`; each part of the program is given its section by value. No field has a default
//! of its own, so a setting that is missing from `config/muster.toml` fails every test. Unknown keys are
//! refused, and a [`Secret`] prints as `***`.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use secrecy::{ExposeSecret, SecretString};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::Error;
use crate::id::{DeviceId, RoleId, TenantId};
use crate::level::Level;

/// The commented default settings.
pub const DEFAULTS: &str = include_str!("../../config/muster.toml");

/// What the writer of an index can work with.
const MIN_WRITER_BYTES: usize = 16 * 1024 * 1024;
/// Most threads of one kind; tantivy gives an index no more than eight.
const MAX_SEARCH_THREADS: usize = 8;
const MAX_WRITER_BYTES: usize = 4_000_000_000;

/// All settings. Each field is explained in `config/muster.toml`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Config {
    pub data_dir: String,
    pub http: Http,
    pub mqtt: Mqtt,
    pub sessions: Sessions,
    pub tls: Tls,
    pub admission: Admission,
    pub ingest: Ingest,
    pub shadow: Shadow,
    pub otlp: Otlp,
    pub commands: Commands,
    pub database: Database,
    pub auth: Auth,
    pub oidc: Oidc,
    pub provisioning: Provisioning,
    pub certificates: Certificates,
    pub audit: Audit,
    pub retention: Retention,
    pub search: Search,
    pub logs: Logs,
    pub log: Log,
    pub server_log: ServerLog,
}

/// `[http]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Http {
    pub listen: SocketAddr,
    pub max_body_bytes: usize,
    pub request_timeout_ms: u64,
    pub broker_answer_ms: u64,
    pub trusted_proxies: Vec<IpNet>,
    pub public_url: String,
    pub hsts_s: u64,
}

/// `[mqtt]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Mqtt {
    pub listen: SocketAddr,
    pub allow_plaintext: bool,
    #[serde(with = "maybe_address")]
    pub tls_listen: Option<SocketAddr>,
    pub proxy_protocol: bool,
    pub proxy_trusted: Vec<IpNet>,
    pub max_connections: usize,
    pub connect_timeout_ms: u64,
    pub packet_timeout_ms: u64,
    pub max_packet_bytes: u32,
    pub max_keep_alive_s: u16,
    pub tcp_keepalive_s: u32,
    pub receive_maximum: u16,
    pub max_subscriptions: usize,
    pub outbox_messages: usize,
    pub outbox_bytes: usize,
    pub max_retained: usize,
    pub max_traces: usize,
    pub sys_interval_s: u64,
    pub max_retained_bytes: usize,
    pub topic_alias_maximum: u16,
    pub max_messages_per_s: u64,
    pub max_bytes_per_s: u64,
    pub rate_burst_ms: u64,
    pub rate_excess: RateExcess,
}

/// `[sessions]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Sessions {
    pub max: usize,
    pub max_expiry_s: u32,
    pub queue_messages: i64,
    pub queue_bytes: i64,
    pub queue_age_s: u64,
    pub store_queue_ops: usize,
    pub store_queue_bytes: usize,
    pub store_batch_ops: usize,
}

/// `[admission]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Admission {
    pub connects_per_s: u32,
    pub connects_burst: u32,
    pub max_handshakes: usize,
    pub max_refusals: usize,
    pub max_claimants: usize,
    pub retry_after_min_ms: u64,
    pub retry_after_max_ms: u64,
    pub max_authentications: usize,
    pub authentication_timeout_ms: u64,
    pub auth_failures: u32,
    pub auth_failures_window_s: u64,
    pub auth_block_s: u64,
    pub tracked_addresses: usize,
    pub flapping_connects: usize,
    pub flapping_window_s: u64,
    pub flapping_backoff_s: u64,
    pub flapping_max_backoff_s: u64,
    pub conflict_takeovers: usize,
    pub conflict_window_s: u64,
    pub conflict_hold_s: u64,
    pub tracked_clients: usize,
}

impl Admission {
    /// Rules that types do not carry.
    fn rules(&self) -> [(bool, &'static str); 8] {
        let day = 1..=86_400;
        [
            (self.connects_burst > 0, "admission.connects_burst: expected at least 1"),
            (self.max_handshakes > 0, "admission.max_handshakes: expected at least 1"),
            (self.max_authentications > 0, "admission.max_authentications: expected at least 1"),
            (self.authentication_timeout_ms > 0, "admission.authentication_timeout_ms: expected at least 1"),
            (
                self.retry_after_min_ms <= self.retry_after_max_ms && self.retry_after_max_ms <= 86_400_000,
                "admission.retry_after_max_ms: expected admission.retry_after_min_ms to 86400000",
            ),
            (
                self.tracked_addresses > 0 && self.tracked_clients > 0,
                "admission.tracked_addresses and admission.tracked_clients: expected at least 1",
            ),
            (
                day.contains(&self.auth_failures_window_s) && day.contains(&self.auth_block_s),
                "admission.auth_failures_window_s and admission.auth_block_s: expected 1 to 86400",
            ),
            (
                [self.flapping_window_s, self.flapping_backoff_s, self.conflict_window_s, self.conflict_hold_s]
                    .iter()
                    .all(|seconds| day.contains(seconds))
                    && (self.flapping_backoff_s..=86_400).contains(&self.flapping_max_backoff_s),
                "admission.flapping_… and admission.conflict_…: expected 1 to 86400 seconds, the longest back-off last",
            ),
        ]
    }
}

/// `[tls]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Tls {
    pub certificate: String,
    pub key: String,
    pub client_ca: String,
    pub client_crl: String,
    pub reload_s: u64,
}

/// `[ingest]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Ingest {
    pub writers: usize,
    pub batch_messages: usize,
    pub batch_bytes: usize,
    pub batch_wait_ms: u64,
    pub queue_messages: usize,
    pub queue_bytes: usize,
    pub max_readings: usize,
    pub max_lines: usize,
    pub log_lines_per_s: u32,
    pub log_lines_burst: u32,
    pub log_suppressed_s: u64,
    pub max_metrics: usize,
    pub max_shapes: usize,
    pub max_ahead_ms: i64,
    pub max_tracked_devices: usize,
}

/// `[otlp]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Otlp {
    pub max_body_bytes: usize,
    pub max_records: usize,
    pub max_reading: usize,
    pub queue_bytes: usize,
    pub batch_lines: usize,
}

/// `[database]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Database {
    pub url: Secret,
    pub max_connections: u32,
    pub acquire_timeout_ms: u64,
    pub binaries: String,
}

/// `[auth]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Auth {
    pub access_token_s: u64,
    pub signing_key_days: u32,
    pub session_idle_s: u64,
    pub session_max_s: u64,
    pub max_sessions: usize,
    pub refresh_grace_s: u64,
    pub cookie_secure: CookieSecure,
    pub login_concurrency: usize,
    pub min_password_chars: usize,
    pub password_reset_s: u64,
    pub login_free_tries: u32,
    pub login_address_free_tries: u32,
    pub login_first_wait_s: u64,
    pub login_longest_wait_s: u64,
    pub login_forget_s: u64,
    pub max_login_failures: usize,
    pub rotation_overlap_s: u64,
    pub max_tenants: usize,
    pub max_users: usize,
    pub max_roles: usize,
    pub max_topic_rules: usize,
    pub max_bindings: usize,
    pub max_api_keys: usize,
    pub max_api_key_s: u64,
}

/// `[provisioning]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Provisioning {
    pub max_import_rows: usize,
    pub max_import_bytes: usize,
    pub max_children: usize,
    pub max_groups: usize,
    pub max_claims: usize,
    pub max_claim_s: u64,
    pub max_claim_devices: u32,
    pub max_claim_requests: usize,
    pub max_pending: usize,
    pub claim_requests_per_minute: u32,
    pub request_queue: usize,
}

/// `[certificates]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Certificates {
    pub key_file: String,
    pub max_authorities: usize,
    pub authority_lifetime_s: u64,
    pub lifetime_s: u64,
    pub max_lifetime_s: u64,
    pub max_csr_bytes: usize,
    pub first_by_token: bool,
    pub renewal_overlap_s: u64,
    pub renewal_grace_s: u64,
    pub max_renewals: u16,
    pub renewal_queue: usize,
    pub crl_lifetime_s: u64,
    pub crl_base_url: String,
    pub max_crl_entries: usize,
}

impl Certificates {
    /// Rules that types do not carry.
    fn rules(&self) -> [(bool, &'static str); 7] {
        let century = 1..=3_155_760_000;
        [
            (!self.key_file.is_empty(), "certificates.key_file: expected \"auto\" or a file"),
            ((1..=1000).contains(&self.max_authorities), "certificates.max_authorities: expected 1 to 1000"),
            (
                century.contains(&self.authority_lifetime_s) && century.contains(&self.max_lifetime_s),
                "certificates.authority_lifetime_s and certificates.max_lifetime_s: expected 1 to 3155760000",
            ),
            (
                (1..=self.max_lifetime_s).contains(&self.lifetime_s),
                "certificates.lifetime_s: expected 1 to certificates.max_lifetime_s",
            ),
            (
                (1..=31_622_400).contains(&self.renewal_overlap_s) && self.renewal_grace_s <= 31_622_400,
                "certificates.renewal_overlap_s and renewal_grace_s: expected 1 and 0 to 31622400",
            ),
            (self.renewal_queue > 0, "certificates.renewal_queue: expected at least 1"),
            ((60..=31_622_400).contains(&self.crl_lifetime_s), "certificates.crl_lifetime_s: expected 60 to 31622400"),
        ]
    }
}

/// `[audit]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Audit {
    pub denials_every_s: u64,
    pub max_denials: usize,
}

/// `[oidc]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Oidc {
    pub issuer: String,
    pub client_id: String,
    pub client_secret: Secret,
    pub scopes: Vec<String>,
    pub role_claim: String,
    pub roles: Vec<OidcRole>,
    pub auto_create: bool,
    pub link_by_email: bool,
    pub trust_email: bool,
    pub tenant: String,
    pub pending_s: u64,
    pub max_pending: usize,
    pub timeout_ms: u64,
}

/// A line of `oidc.roles`.
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct OidcRole {
    pub value: String,
    pub role: String,
}

impl Oidc {
    /// Rules that types do not carry.
    fn rules(&self) -> [(bool, &'static str); 4] {
        let off = self.issuer.is_empty();
        let local = ["http://127.0.0.1", "http://localhost", "http://[::1]"];
        let https = self.issuer.starts_with("https://") || local.iter().any(|local| self.issuer.starts_with(local));
        [
            (off || https, "oidc.issuer: expected \"\" or https://…; http only on this machine"),
            (
                off || !self.client_id.is_empty(),
                "oidc.client_id: expected the id that the provider gave to this server",
            ),
            (
                off || self.roles.iter().all(|line| RoleId::try_from(line.role.clone()).is_ok()),
                "oidc.roles: expected [{ value = \"…\", role = \"name of a role\" }]",
            ),
            (
                (10..=3600).contains(&self.pending_s) && self.max_pending > 0 && self.timeout_ms > 0,
                "oidc.pending_s: expected 10 to 3600; oidc.max_pending and oidc.timeout_ms: at least 1",
            ),
        ]
    }
}

/// `[shadow]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Shadow {
    pub max_bytes: usize,
    pub max_depth: usize,
    pub history_versions: u32,
    pub request_queue: usize,
    pub max_log_level_s: u64,
}

impl Shadow {
    /// Rules that types do not carry.
    fn rules(&self) -> [(bool, &'static str); 4] {
        [
            ((1..=1_048_576).contains(&self.max_bytes), "shadow.max_bytes: expected 1 to 1048576"),
            ((1..=64).contains(&self.max_depth), "shadow.max_depth: expected 1 to 64"),
            ((1..=10_000).contains(&self.history_versions), "shadow.history_versions: expected 1 to 10000"),
            (self.request_queue > 0, "shadow.request_queue: expected at least 1"),
        ]
    }
}

/// `[commands]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Commands {
    pub max_open: usize,
    pub max_params_bytes: usize,
    pub default_timeout_s: u64,
    pub max_timeout_s: u64,
    pub max_response_bytes: usize,
    pub response_queue: usize,
}

impl Commands {
    /// Rules that types do not carry.
    fn rules(&self) -> [(bool, &'static str); 3] {
        [
            ((1..=31_622_400).contains(&self.max_timeout_s), "commands.max_timeout_s: expected 1 to 31622400"),
            (
                (1..=self.max_timeout_s).contains(&self.default_timeout_s),
                "commands.default_timeout_s: expected 1 to commands.max_timeout_s",
            ),
            (self.response_queue > 0, "commands.response_queue: expected at least 1"),
        ]
    }
}

/// `[retention]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Retention {
    pub telemetry_days: u32,
    pub telemetry_max_bytes: u64,
    pub log_days: u32,
    pub log_max_bytes: u64,
    pub dead_letter_days: u32,
    pub dead_letter_max_rows: i64,
    pub connection_event_days: u32,
    pub connection_event_max_rows: i64,
    pub decommission_rows: u32,
    pub command_days: u32,
    pub audit_days: u32,
}

/// `[search]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Search {
    pub dir: String,
    pub poll_ms: u64,
    pub commit_ms: u64,
    pub batch_lines: usize,
    pub open_days: usize,
    pub writer_bytes: usize,
    pub writer_threads: usize,
    pub max_columns: usize,
    pub min_free_bytes: u64,
    pub concurrent: usize,
    pub threads: usize,
    pub timeout_ms: u64,
}

impl Search {
    /// Where the index is, with "auto" resolved.
    pub fn dir(&self, data_dir: &Path) -> PathBuf {
        if self.dir == "auto" { data_dir.join("search") } else { PathBuf::from(&self.dir) }
    }

    fn rules(&self) -> [(bool, &'static str); 6] {
        [
            (
                (1..=MAX_SEARCH_THREADS).contains(&self.threads)
                    && (1..=MAX_SEARCH_THREADS).contains(&self.writer_threads),
                "search.threads and search.writer_threads: expected 1 to 8",
            ),
            (
                self.concurrent > 0 && self.timeout_ms > 0,
                "search.concurrent and search.timeout_ms: expected at least 1",
            ),
            (self.poll_ms > 0 && self.commit_ms > 0, "search.poll_ms and search.commit_ms: expected at least 1"),
            ((1..=100_000).contains(&self.batch_lines), "search.batch_lines: expected 1 to 100000"),
            ((1..=100).contains(&self.open_days), "search.open_days: expected 1 to 100"),
            (
                (MIN_WRITER_BYTES..=MAX_WRITER_BYTES).contains(&self.writer_bytes),
                "search.writer_bytes: expected 16777216 to 4000000000",
            ),
        ]
    }
}

/// `[logs]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Logs {
    pub max_tails: usize,
    pub max_tails_per_user: usize,
    pub tail_queue_lines: usize,
    pub tail_queue_bytes: usize,
    pub tail_replay_lines: i64,
    pub tail_heartbeat_ms: u64,
    pub max_exports: usize,
    pub max_exports_per_user: usize,
    pub max_saved_searches: usize,
}

/// `[log]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct Log {
    pub filter: String,
    pub format: LogFormat,
}

/// `[server_log]`
#[derive(Debug, Clone, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
#[expect(missing_docs, reason = "config/muster.toml has one line of meaning for every setting")]
pub struct ServerLog {
    pub device: String,
    pub level: Level,
}

impl ServerLog {
    /// The device whose lines they are; none where that is switched off.
    pub fn device(&self) -> Result<Option<(TenantId, DeviceId)>, Error> {
        if self.device.is_empty() {
            return Ok(None);
        }
        let wrong = || Error::Invalid(format!("server_log.device: {:?}: expected tenant/device", self.device));
        let (tenant, device) = self.device.split_once('/').ok_or_else(wrong)?;
        let (tenant, device) = (TenantId::try_from(tenant.to_owned()), DeviceId::try_from(device.to_owned()));
        tenant.ok().zip(device.ok()).map(Some).ok_or_else(wrong)
    }
}

/// What becomes of a client that sends faster than it may.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RateExcess {
    /// It is not read until it may send again.
    Wait,
    /// It is disconnected.
    Disconnect,
}

/// Whether the cookie with the refresh token is for https alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum CookieSecure {
    /// Unless the request came over plain http to this machine's own name for itself.
    Auto,
    /// Whatever the request says.
    Always,
    /// Never: for trials in a network without TLS.
    Never,
}

/// An address or "", which is none.
mod maybe_address {
    use std::net::SocketAddr;

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<SocketAddr>, D::Error> {
        match String::deserialize(deserializer)?.as_str() {
            "" => Ok(None),
            text => text.parse().map(Some).map_err(|error| D::Error::custom(format!("{text:?}: {error}"))),
        }
    }

    #[expect(clippy::ref_option, reason = "serde hands it over so")]
    pub(super) fn serialize<S: Serializer>(address: &Option<SocketAddr>, serializer: S) -> Result<S::Ok, S::Error> {
        match address {
            Some(address) => serializer.collect_str(address),
            None => serializer.serialize_str(""),
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// For machines: one JSON object a line.
    Json,
}

/// A setting that is never printed.
#[derive(Clone, Default)]
pub struct Secret(SecretString);

impl Secret {
    /// The secret itself.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text.into())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.expose().is_empty() { "\"\"" } else { "***" })
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from)
    }
}

impl Serialize for Secret {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(if self.expose().is_empty() { "" } else { "***" })
    }
}

/// Why the settings could not be loaded, in one line.
#[derive(Debug, thiserror::Error)]
#[error("settings: {0}")]
pub struct BadConfig(String);

/// What the environment says besides the settings, read here and nowhere else.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// `MUSTER_CONFIG`: a file of settings.
    pub config_file: Option<PathBuf>,
    /// `DATABASE_URL`, used when `database.url` is empty.
    pub database_url: Option<String>,
    /// `MUSTER_ADMIN_EMAIL`, read at the first start.
    pub admin_email: Option<String>,
    /// `MUSTER_ADMIN_PASSWORD`, read at the first start.
    pub admin_password: Option<Secret>,
    /// Where a user's own data belongs: `XDG_DATA_HOME`, else `HOME/.local/share`.
    pub user_data: Option<PathBuf>,
    /// `MUSTER_TEST_DATABASE_URL`: the server on which tests make their databases; read by tests alone.
    pub test_database_url: Option<Secret>,
}

impl Environment {
    /// The environment of this process.
    pub fn of_process() -> Self {
        #[expect(clippy::disallowed_methods, reason = "the one place that reads the environment")]
        let var = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let user_data = var("XDG_DATA_HOME")
            .map(PathBuf::from)
            .or_else(|| var("HOME").map(|home| PathBuf::from(home).join(".local/share")));
        Self {
            config_file: var("MUSTER_CONFIG").map(PathBuf::from),
            database_url: var("DATABASE_URL"),
            admin_email: var("MUSTER_ADMIN_EMAIL"),
            admin_password: var("MUSTER_ADMIN_PASSWORD").map(Secret::from),
            user_data,
            test_database_url: var("MUSTER_TEST_DATABASE_URL").map(Secret::from),
        }
    }
}

impl Config {
    /// The settings of this process: defaults, file, environment.
    ///
    /// # Errors
    /// [`BadConfig`] names the key, what was found and what was expected.
    pub fn load(environment: &Environment) -> Result<Self, BadConfig> {
        Self::from_sources(environment, None)
    }

    /// As [`Config::load`], with `variables` in place of the process's own; for tests.
    ///
    /// # Errors
    /// As [`Config::load`].
    pub fn from_sources(
        environment: &Environment,
        variables: Option<std::collections::HashMap<String, String>>,
    ) -> Result<Self, BadConfig> {
        let mut builder =
            config::Config::builder().add_source(config::File::from_str(DEFAULTS, config::FileFormat::Toml));
        if let Some(path) = &environment.config_file {
            let text = std::fs::read_to_string(path)
                .map_err(|e| BadConfig(format!("MUSTER_CONFIG names {}, which cannot be read: {e}", path.display())))?;
            // Parsed on its own first, so that a syntax error names this file.
            builder = builder.add_source(config::File::from_str(&text, config::FileFormat::Toml));
        }
        let variables = config::Environment::with_prefix("MUSTER")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
            .list_separator(",")
            .with_list_parse_key("mqtt.proxy_trusted")
            .with_list_parse_key("http.trusted_proxies")
            .with_list_parse_key("oidc.scopes")
            .source(variables);
        let mut loaded: Self = builder
            .add_source(variables)
            .build()
            .and_then(config::Config::try_deserialize)
            .map_err(|e| BadConfig(one_line(&e.to_string())))?;
        if loaded.database.url.expose().is_empty()
            && let Some(url) = &environment.database_url
        {
            loaded.database.url = Secret::from(url.clone());
        }
        loaded.check()?;
        Ok(loaded)
    }

    /// Rules that types do not carry.
    fn check(&self) -> Result<(), BadConfig> {
        let rules = [
            (
                self.mqtt.listen.ip().is_loopback() || self.mqtt.allow_plaintext,
                "mqtt.listen is not a loopback address: expected 127.0.0.1 or ::1, or mqtt.allow_plaintext = true",
            ),
            (
                !self.mqtt.proxy_protocol || !self.mqtt.proxy_trusted.is_empty(),
                "mqtt.proxy_protocol is on: expected the proxies' networks in mqtt.proxy_trusted, e.g. [\"10.0.0.0/8\"]",
            ),
            (
                (self.tls.certificate == "auto") == (self.tls.key == "auto"),
                "tls.certificate and tls.key: expected both to be \"auto\" or both to be files",
            ),
            (
                !self.tls.certificate.is_empty() && !self.tls.key.is_empty(),
                "tls.certificate and tls.key: expected \"auto\" or a file; TLS is switched off by mqtt.tls_listen = \"\"",
            ),
            (self.tls.reload_s > 0, "tls.reload_s: expected at least 1"),
            ((1..=64).contains(&self.ingest.writers), "ingest.writers: expected 1 to 64"),
            ((1..=10_000).contains(&self.ingest.batch_messages), "ingest.batch_messages: expected 1 to 10000"),
            (self.ingest.queue_messages > 0, "ingest.queue_messages: expected at least 1"),
            (
                self.ingest.queue_bytes >= self.mqtt.max_packet_bytes as usize,
                "ingest.queue_bytes: expected at least mqtt.max_packet_bytes, else no large message would ever fit",
            ),
            (
                self.ingest.max_readings > 0 && self.ingest.max_lines > 0 && self.ingest.max_metrics > 0,
                "ingest.max_readings, ingest.max_lines and ingest.max_metrics: expected at least 1",
            ),
            (
                self.ingest.log_lines_burst > 0 && (1..=86_400).contains(&self.ingest.log_suppressed_s),
                "ingest.log_lines_burst: expected at least 1; ingest.log_suppressed_s: expected 1 to 86400",
            ),
            (
                self.otlp.max_records > 0 && self.otlp.batch_lines > 0 && self.otlp.queue_bytes > 0,
                "otlp.max_records, otlp.batch_lines and otlp.queue_bytes: expected at least 1",
            ),
            (self.server_log.device().is_ok(), "server_log.device: expected \"\" or tenant/device"),
            (
                (1..=1000).contains(&self.otlp.max_reading) && self.otlp.max_body_bytes <= 67_108_864,
                "otlp.max_reading: expected 1 to 1000; otlp.max_body_bytes: expected at most 67108864",
            ),
            (
                (64..=268_435_455).contains(&self.mqtt.max_packet_bytes),
                "mqtt.max_packet_bytes: expected 64 to 268435455",
            ),
            (self.mqtt.receive_maximum > 0, "mqtt.receive_maximum: expected 1 to 65535"),
            (self.mqtt.max_keep_alive_s > 0, "mqtt.max_keep_alive_s: expected 1 to 65535"),
            (self.http.broker_answer_ms > 0, "http.broker_answer_ms: expected at least 1"),
            (is_origin(&self.http.public_url), "http.public_url: expected \"\" or https://name, without a path"),
            (self.mqtt.outbox_messages > 0, "mqtt.outbox_messages: expected at least 1"),
            (self.database.max_connections > 0, "database.max_connections: expected at least 1"),
            (self.auth.access_token_s > 0, "auth.access_token_s: expected at least 1"),
            (
                (self.auth.access_token_s..=self.auth.session_max_s).contains(&self.auth.session_idle_s),
                "auth.session_idle_s: expected auth.access_token_s to auth.session_max_s",
            ),
            ((1..=1000).contains(&self.auth.max_sessions), "auth.max_sessions: expected 1 to 1000"),
            (
                self.auth.login_free_tries > 0 && self.auth.login_address_free_tries > 0,
                "auth.login_free_tries and auth.login_address_free_tries: expected at least 1",
            ),
            (
                (1..=self.auth.login_longest_wait_s).contains(&self.auth.login_first_wait_s)
                    && self.auth.login_longest_wait_s <= 86_400,
                "auth.login_longest_wait_s: expected auth.login_first_wait_s to 86400",
            ),
            (
                self.auth.login_forget_s >= self.auth.login_longest_wait_s,
                "auth.login_forget_s: expected at least auth.login_longest_wait_s",
            ),
            (self.auth.max_login_failures > 0, "auth.max_login_failures: expected at least 1"),
            ((8..=64).contains(&self.auth.min_password_chars), "auth.min_password_chars: expected 8 to 64"),
            ((60..=2_592_000).contains(&self.auth.password_reset_s), "auth.password_reset_s: expected 60 to 2592000"),
            (self.auth.refresh_grace_s <= 60, "auth.refresh_grace_s: expected 0 to 60"),
            (self.auth.login_concurrency > 0, "auth.login_concurrency: expected at least 1"),
            (self.provisioning.request_queue > 0, "provisioning.request_queue: expected at least 1"),
            (
                (1..=100_000).contains(&self.provisioning.max_import_rows),
                "provisioning.max_import_rows: expected 1 to 100000",
            ),
            (self.retention.telemetry_days > 0, "retention.telemetry_days: expected at least 1"),
            (self.retention.log_days > 0, "retention.log_days: expected at least 1"),
            (self.retention.dead_letter_days > 0, "retention.dead_letter_days: expected at least 1"),
            (self.retention.connection_event_days > 0, "retention.connection_event_days: expected at least 1"),
        ];
        match rules
            .iter()
            .chain(&self.admission.rules())
            .chain(&self.oidc.rules())
            .chain(&self.shadow.rules())
            .chain(&self.commands.rules())
            .chain(&self.certificates.rules())
            .chain(&self.search.rules())
            .find(|(holds, _)| !holds)
        {
            Some((_, rule)) => Err(BadConfig((*rule).to_owned())),
            None => Ok(()),
        }
    }

    /// The data directory, with "auto" resolved.
    ///
    /// # Errors
    /// When "auto" is asked for and there is no home to put it in.
    pub fn data_dir(&self, environment: &Environment, is_root: bool) -> Result<PathBuf, BadConfig> {
        match (self.data_dir.as_str(), is_root, &environment.user_data) {
            ("auto", true, _) => Ok(PathBuf::from("/var/lib/muster")),
            ("auto", false, Some(home)) => Ok(home.join("muster")),
            ("auto", false, None) => {
                Err(BadConfig("data_dir = \"auto\" needs HOME or XDG_DATA_HOME; set MUSTER__DATA_DIR".into()))
            }
            (path, ..) => Ok(PathBuf::from(path)),
        }
    }
}

/// Whether this is "" or what a browser calls an origin.
fn is_origin(text: &str) -> bool {
    let host = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let is_host = |host: &str| !host.is_empty() && !host.contains(|c: char| "/?#@\\".contains(c) || c.is_whitespace());
    text.is_empty() || host.is_some_and(is_host)
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn load(variables: &[(&str, &str)]) -> Result<Config, BadConfig> {
        let variables = variables.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<HashMap<_, _>>();
        Config::from_sources(&Environment::default(), Some(variables))
    }

    #[test]
    fn the_shipped_file_sets_everything() {
        let config = load(&[]).expect("config/muster.toml is complete");
        assert_eq!(config.http.listen.port(), 8080);
        assert_eq!(config.mqtt.listen.port(), 1883);
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("own.toml");
        std::fs::write(&file, "[http]\nlisten = \"127.0.0.1:1\"\n[ingest]\nwriters = 2\n").unwrap();
        let environment = Environment { config_file: Some(file), ..Environment::default() };
        let variables = HashMap::from([("MUSTER__HTTP__LISTEN".to_owned(), "127.0.0.1:2".to_owned())]);
        let config = Config::from_sources(&environment, Some(variables)).unwrap();
        assert_eq!((config.http.listen.port(), config.ingest.writers), (2, 2));
    }

    #[test]
    fn what_is_wrong_is_said_in_one_line() {
        for (key, value, expected) in [
            ("MUSTER__HTTP__LISTNE", "127.0.0.1:1", "listne"),
            ("MUSTER__NOSUCH", "1", "nosuch"),
            ("MUSTER__INGEST__WRITERS", "many", "writers"),
            ("MUSTER__HTTP__LISTEN", "localhost", "listen"),
            ("MUSTER__MQTT__LISTEN", "0.0.0.0:1883", "allow_plaintext"),
            ("MUSTER__LOG__FORMAT", "xml", "format"),
            ("MUSTER__MQTT__TLS_LISTEN", "8883", "tls_listen"),
            ("MUSTER__MQTT__PROXY_PROTOCOL", "true", "proxy_trusted"),
            ("MUSTER__MQTT__PROXY_TRUSTED", "10.0.0.0/8,somewhere", "proxy_trusted"),
            ("MUSTER__TLS__CERTIFICATE", "/etc/muster/server.pem", "tls.key"),
            ("MUSTER__TLS__KEY", "", "tls.key"),
            ("MUSTER__HTTP__PUBLIC_URL", "muster.example.com", "public_url"),
            ("MUSTER__HTTP__PUBLIC_URL", "https://muster.example.com/", "public_url"),
            ("MUSTER__AUTH__MIN_PASSWORD_CHARS", "4", "min_password_chars"),
            ("MUSTER__OIDC__ISSUER", "http://login.example.com", "oidc.issuer"),
            ("MUSTER__OIDC__ISSUER", "https://login.example.com", "oidc.client_id"),
            ("MUSTER__AUTH__COOKIE_SECURE", "sometimes", "cookie_secure"),
            ("MUSTER__AUTH__SESSION_IDLE_S", "60", "session_idle_s"),
        ] {
            let error = load(&[(key, value)]).expect_err(key).to_string();
            assert!(error.contains(expected), "{key}: {error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn a_secret_is_never_printed() {
        let config = load(&[("MUSTER__DATABASE__URL", "postgres://u:hunter2@h/d")]).unwrap();
        assert_eq!(config.database.url.expose(), "postgres://u:hunter2@h/d");
        let printed = format!("{config:?} {}", serde_json::to_string(&config).unwrap());
        assert!(!printed.contains("hunter2"), "{printed}");
    }

    #[test]
    fn database_url_is_honoured_when_the_setting_is_empty() {
        let environment = Environment { database_url: Some("postgres://x".into()), ..Environment::default() };
        let config = Config::from_sources(&environment, Some(HashMap::new())).unwrap();
        assert_eq!(config.database.url.expose(), "postgres://x");
    }

    #[test]
    fn an_address_that_is_off_and_a_list_may_come_from_the_environment() {
        let config = load(&[]).unwrap();
        assert_eq!((config.mqtt.tls_listen, config.mqtt.proxy_trusted.len()), (None, 0));
        let networks = ("MUSTER__MQTT__PROXY_TRUSTED", "10.0.0.0/8,2001:db8::/32");
        let config = load(&[("MUSTER__MQTT__TLS_LISTEN", "0.0.0.0:8883"), networks]).unwrap();
        assert_eq!(config.mqtt.tls_listen.map(|address| address.port()), Some(8883));
        assert_eq!(config.mqtt.proxy_trusted.len(), 2);
        let one = load(&[("MUSTER__MQTT__PROXY_TRUSTED", "127.0.0.1/32")]).unwrap();
        assert_eq!(one.mqtt.proxy_trusted.len(), 1);
        let printed = serde_json::to_value(&config).unwrap();
        assert_eq!(printed["mqtt"]["tls_listen"], "0.0.0.0:8883");
    }
}
