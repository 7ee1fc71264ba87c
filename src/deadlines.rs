//! What ends by itself when its time is up: log levels that were set for a while, commands that no device has ended.
//!
//! Holds: whatever was killed meanwhile, it is ended at the next look, once; a look is bounded, and what is left waits for the next.

use std::time::Duration;

use fleet_core::clock::Clock;
use fleet_core::{command, config, log_level};
use prometheus::{IntCounter, Registry};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

/// How often it is looked for what is due.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Ends what is due.
pub(crate) struct Deadlines {
    shadow: config::Shadow,
    levels: IntCounter,
    commands: IntCounter,
}

impl Deadlines {
    pub(crate) fn new(shadow: config::Shadow, registry: &Registry) -> prometheus::Result<Self> {
        let levels =
            IntCounter::new("muster_log_levels_ended_total", "Log levels that were set for a while and have ended")?;
        let commands =
            IntCounter::new("muster_commands_overdue_total", "Commands that no device had ended by their deadline")?;
        registry.register(Box::new(levels.clone()))?;
        registry.register(Box::new(commands.clone()))?;
        Ok(Self { shadow, levels, commands })
    }

    /// Until it is stopped.
    pub(crate) async fn run(self, db: PgPool, clock: Clock, stop: CancellationToken) {
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(LOOK_EVERY) => {}
            }
            // Cancelled between two answers of the database: a step is done or is not.
            let looked = tokio::select! {
                () = stop.cancelled() => return,
                looked = self.look(&db, &clock) => looked,
            };
            if let Err(error) = looked {
                tracing::warn!(%error, "what is due is ended later");
            }
        }
    }

    async fn look(&self, db: &PgPool, clock: &Clock) -> fleet_core::Result<()> {
        self.levels.inc_by(log_level::work(db, &self.shadow, clock.now()).await?);
        self.commands.inc_by(command::work(db, clock.now()).await?);
        Ok(())
    }
}
