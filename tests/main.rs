//! Journeys across the crates, one file a journey, with real clients and a real server.

mod access;
mod admission;
mod architecture;
mod audit;
mod conformance;
mod control;
mod crash;
mod demo;
mod foreign_clients;
mod fuzz;
mod gateways;
mod harness;
mod hostile;
mod limits;
mod node_red;
mod oidc;
mod provisioning;
mod rates;
mod readings;
mod roles;
mod sessions;
mod settings;
mod signin;
mod sim;
mod tenants;
mod transports;
