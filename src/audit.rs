//! `muster audit verify`: the proof that nobody has touched the audit, from the database or from an export.
//!
//! Exit codes: 0 untouched · 1 touched.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Subcommand;
use fleet_core::audit::{self, Chain, Head, Row, Trailer};
use fleet_core::database::Database;
use fleet_core::id::TenantId;
use fleet_core::tenancy;

use crate::settings::{self, Loaded};

/// What can be done with the audit.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Go through all entries and name the first that was changed, deleted or moved; exits with 1 when there is one.
    Verify {
        /// Only this tenant; else all of them.
        #[arg(long, group = "of_one")]
        tenant: Option<TenantId>,
        /// An end of the chain that was noted earlier, `SEQ:HASH`: it must still be there.
        #[arg(long, requires = "of_one")]
        head: Option<Head>,
        /// An export (`GET /api/v1/audit/export`) instead of the database.
        #[arg(long, group = "of_one")]
        file: Option<PathBuf>,
    },
}

/// Verifies.
pub(crate) async fn run(command: Command) -> anyhow::Result<ExitCode> {
    let Command::Verify { tenant, head, file } = command;
    let is_intact = match file {
        Some(file) => tell(&file.display().to_string(), of_file(&file, head)?),
        None => of_database(tenant.as_ref(), head).await?,
    };
    Ok(if is_intact { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What was found of one chain.
struct Found {
    entries: u64,
    /// The row before the first.
    behind: i64,
    head: Option<Head>,
    fault: Option<String>,
}

/// Prints it; whether it is untouched.
fn tell(name: &str, found: Found) -> bool {
    let Found { entries, behind, head, fault } = found;
    if let Some(fault) = &fault {
        println!("{name}: {fault} ({entries} entries before it are in order)");
        return false;
    }
    let from = if behind > 0 { format!(" from {} on", behind + 1) } else { String::new() };
    let head = head.map(|head| format!("; head {head}")).unwrap_or_default();
    println!("{name}: intact, {entries} entries{from}{head}");
    true
}

async fn of_database(tenant: Option<&TenantId>, noted: Option<Head>) -> anyhow::Result<bool> {
    let Loaded { config, data_dir, .. } = settings::load()?;
    let database = Database::attach(&config, &data_dir).await?;
    let outcome = verify_all(&database, tenant, noted).await;
    database.close().await;
    outcome
}

async fn verify_all(database: &Database, only: Option<&TenantId>, noted: Option<Head>) -> anyhow::Result<bool> {
    let mut tenants = tenancy::all(&mut *database.pool().acquire().await?).await?;
    if let Some(only) = only {
        tenants.retain(|tenant| tenant.id == *only);
        if tenants.is_empty() {
            bail!("tenant {only} does not exist");
        }
    }
    let mut is_intact = true;
    for tenant in tenants {
        let mut tx = database.pool().begin().await?;
        let report = audit::verify(&mut tx, tenant.key, noted).await?;
        let fault = report.fault.map(|fault| fault.to_string());
        let found = Found { entries: report.rows, behind: report.kept_after, head: Some(report.head), fault };
        is_intact &= tell(tenant.id.as_str(), found);
    }
    Ok(is_intact)
}

/// Looks through an export. One that does not begin with the first entry is taken as it begins.
fn of_file(path: &Path, noted: Option<Head>) -> anyhow::Result<Found> {
    let file = File::open(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let mut chain: Option<Chain> = None;
    let mut behind = 0;
    for (number, line) in (1..).zip(BufReader::new(file).lines()) {
        let line = line.with_context(|| format!("{} cannot be read", path.display()))?;
        if let Ok(Trailer { head }) = serde_json::from_str(&line) {
            let chain = chain.unwrap_or_else(|| Chain::behind(Head::START, noted));
            let fault = chain.end(head).err().map(|fault| fault.to_string());
            return Ok(Found { entries: chain.rows(), behind, head: Some(head), fault });
        }
        let row: Row = serde_json::from_str(&line).with_context(|| format!("line {number} is no entry of an audit"))?;
        let chain = chain.get_or_insert_with(|| {
            behind = row.seq - 1;
            Chain::beginning_with(&row, noted)
        });
        if let Err(fault) = chain.next(&row) {
            return Ok(Found { entries: chain.rows(), behind, head: None, fault: Some(fault.to_string()) });
        }
    }
    let entries = chain.map_or(0, |chain| chain.rows());
    let fault =
        Some("its last line, which tells where the chain ends, is missing: rows may have been cut off".to_owned());
    Ok(Found { entries, behind, head: None, fault })
}
