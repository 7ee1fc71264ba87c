//! What a fleet is: nouns, rules and the SQL that keeps them. Knows no HTTP and no MQTT client.
//!
//! | noun | where |
//! |---|---|
//! | names and keys: tenant, device, credential, user, session | [`id`] |
//! | the topic grammar | [`topic`] |
//! | a device, its lifecycle and labels | [`device`] |
//! | secrets by which devices ask to come in, and what they ask | [`claim`] |
//! | gateways, and the children they act for | [`gateway`] |
//! | groups of devices, a tree of paths | [`group`] |
//! | many devices at once, from a file | [`import`] |
//! | a device's tokens and certificates | [`credential`], [`certificate`], [`csr`] |
//! | who may vouch for devices, and signs their certificates | [`authority`] |
//! | from a signing request to a certificate, and its renewal | [`issuing`] |
//! | certificates taken back, and the lists that say so | [`revocation`] |
//! | secrets at rest | [`seal`] |
//! | online, lost, last seen | [`status`], and since when there is a [`firmware`] |
//! | readings: decode, insert, series | [`telemetry`] |
//! | lines that devices write | [`log`], found by [`search`] in their [`index`] |
//! | questions to the log that people keep | [`saved_search`] |
//! | the newest value of each metric, and gaps in sequence numbers | [`latest`] |
//! | payloads that could not be read | [`dead_letter`] |
//! | what a device is to be, and says it is | [`shadow`]; news on their way to devices: [`dispatch`] |
//! | what a device is to do | [`command`] |
//! | the level at which a device logs, for a while | [`log_level`] |
//! | people, their passwords, access tokens and the keys of those | [`user`], [`token`], [`signing_key`] |
//! | logins and their refresh tokens | [`login_session`] |
//! | what a password must be, and one-time links to a new one | [`password`], [`password_reset`] |
//! | logins by an `OpenID` provider | [`oidc`] |
//! | one-time passwords, and recovery codes | [`totp`] |
//! | failed logins, and how long one waits | [`login_failure`] |
//! | secrets of programs | [`api_key`] |
//! | permissions, and who may do what | [`policy`] |
//! | roles that people make, and who has them for which devices | [`role`], [`binding`] |
//! | the one query language, over whatever has fields | [`query`], by [`words`], [`version`] and [`level`] |
//! | which devices are wanted | [`selector`] |
//! | which devices a binding is about | [`scope`]; in memory, for the MQTT door: [`directory`] |
//! | who a user or an API key is now | `standing` |
//! | which rule decides, and what would be needed; what a change would give and take | [`explain`], [`difference`] |
//! | what a role says about topics, compiled | [`topic_rule`], over `filter_set` |
//! | what the doors tell each other of open connections, and every change of rights | [`control`] |
//! | what happened to a client's connection | [`connection_event`] |
//! | what outlives an MQTT connection: subscriptions, queued messages | [`session`] |
//! | devices that leave for good, and what is deleted of them | [`decommission`] |
//! | the newest retained message of each topic | [`retained`] |
//! | who changed what | [`audit`] |
//! | transactions bound to a tenant and a scope | [`tenancy`] |
//! | how many may do something at once | [`places`] |
//! | answers kept for `Idempotency-Key` | [`idempotency`] |
//! | partitions made ahead, old days dropped | [`retention`] |
//! | the embedded PostgreSQL, connecting and migrating | [`postgres`], [`database`] |
//! | settings, time, errors, test databases | [`config`], [`clock`], [`error`], [`testing`] |

pub mod api_key;
pub mod audit;
pub mod authority;
pub mod binding;
pub mod certificate;
pub mod claim;
pub mod clock;
pub mod command;
pub mod config;
pub mod connection_event;
pub mod control;
pub mod credential;
pub mod csr;
pub mod database;
pub mod dead_letter;
pub mod decommission;
pub mod device;
pub mod difference;
pub mod directory;
pub mod dispatch;
pub mod error;
pub mod explain;
mod filter_set;
pub mod firmware;
pub mod gateway;
pub mod group;
pub mod id;
pub mod idempotency;
pub mod import;
pub mod index;
pub mod issuing;
pub mod latest;
pub mod level;
pub mod log;
pub mod log_level;
pub mod login_failure;
pub mod login_session;
pub mod oidc;
pub mod password;
pub mod password_reset;
pub mod places;
pub mod policy;
pub mod postgres;
pub mod query;
pub mod retained;
pub mod retention;
pub mod revocation;
pub mod role;
pub mod saved_search;
pub mod scope;
pub mod seal;
pub mod search;
pub mod selector;
pub mod session;
pub mod shadow;
pub mod signing_key;
mod standing;
pub mod status;
pub mod telemetry;
pub mod tenancy;
pub mod testing;
pub mod token;
pub mod topic;
pub mod topic_rule;
pub mod totp;
pub mod user;
pub mod version;
pub mod words;

pub use error::{Error, Result};
