//! The handlers, one file a noun of `fleet_core`.

pub(crate) mod access;
pub(crate) mod api_keys;
pub(crate) mod audit;
pub(crate) mod auth;
pub(crate) mod authorities;
pub(crate) mod bindings;
pub(crate) mod certificates;
pub(crate) mod claims;
pub(crate) mod connections;
pub(crate) mod credentials;
pub(crate) mod dead_letters;
pub(crate) mod devices;
pub(crate) mod docs;
pub(crate) mod import;
pub(crate) mod login_failures;
pub(crate) mod login_sessions;
pub(crate) mod operations;
pub(crate) mod passwords;
pub(crate) mod provision;
pub(crate) mod roles;
pub(crate) mod sessions;
pub(crate) mod signing_keys;
pub(crate) mod telemetry;
pub(crate) mod tenants;
pub(crate) mod totp;
pub(crate) mod users;
