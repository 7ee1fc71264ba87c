//! Journeys through the HTTP door, each with a database and a router of its own.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod access;
mod api_keys;
mod attacks;
mod audit;
mod authorities;
mod bindings;
mod claims;
mod connections;
mod credentials;
mod dead_letters;
mod decommissions;
mod devices;
mod document;
mod door;
mod groups;
mod harness;
mod import;
mod index;
mod log_bounds;
mod log_search;
mod login;
mod login_sessions;
mod logs;
mod matrix;
mod oidc;
mod otlp;
mod passwords;
mod policies;
mod questions;
mod roles;
mod saved_searches;
mod sessions;
mod sign_ins;
mod strangers;
mod telemetry;
mod tenants;
mod totp;
mod users;
