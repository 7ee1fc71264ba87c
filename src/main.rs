//! The command line: `muster serve`, `demo`, `sim`, `logs`, `access`, `audit`, `index`, `tls`, `config`. Thin: each is a file.

mod access;
mod audit;
mod deadlines;
mod demo;
mod exit;
mod index;
mod logs;
mod remote;
mod serve;
mod server_log;
mod settings;
mod sim;
mod tls;
mod websocket;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

// Many small allocations of many tasks: glibc's allocator fragments.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// A fleet manager for IoT devices that speak MQTT: an acknowledged message is a row you can query.
#[derive(Parser)]
#[command(version, after_help = exit::HELP)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the server.
    Serve(serve::Args),
    /// Run the server with a simulated fleet and a live view.
    Demo(demo::Args),
    /// Simulate devices against a server and prove that nothing acknowledged was lost.
    Sim(Box<sim::Args>),
    /// Show what devices log, or go on with it as it is written.
    Logs(Box<logs::Args>),
    /// Ask who may do what, and what a change would give and take.
    #[command(subcommand)]
    Access(access::Command),
    /// Prove that nobody has touched the audit.
    #[command(subcommand)]
    Audit(audit::Command),
    /// Compare the index of log lines with the database, and make it anew.
    #[command(subcommand)]
    Index(index::Command),
    /// Make certificates for development.
    #[command(subcommand)]
    Tls(tls::Command),
    /// Print the settings in force, secrets masked.
    Config,
}

#[tokio::main]
async fn main() -> ExitCode {
    if rustls::crypto::aws_lc_rs::default_provider().install_default().is_err() {
        eprintln!("muster: a TLS provider was installed already");
    }
    let result = match Cli::parse().command {
        Command::Serve(args) => serve::run(args).await,
        Command::Demo(args) => demo::run(args).await,
        Command::Sim(args) => sim::run(*args).await,
        Command::Logs(args) => logs::run(*args).await,
        Command::Access(command) => access::run(command).await,
        Command::Audit(command) => audit::run(command).await,
        Command::Index(command) => index::run(command).await,
        Command::Tls(command) => tls::run(&command),
        Command::Config => settings::print(),
    };
    result.unwrap_or_else(|error| {
        eprintln!("muster: {}", exit::one_line(&error));
        exit::code(&error)
    })
}
