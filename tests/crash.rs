//! The crash drill: under load, the server, its PostgreSQL and both are killed with SIGKILL, round after round; afterwards
//! every acknowledged reading is there exactly once.

use std::time::{Duration, Instant};

use device_sim::{Access, Faults, Report, Scenario};
use tokio_util::sync::CancellationToken;

use crate::harness::{ADMIN, Fleet, signal};

/// Readings that must be acknowledged between two kills, so that each hits a server under load.
const READINGS_BETWEEN: u64 = 300;
/// Design: a kill heals without hands within ten seconds. A debug build on a busy machine is given more.
const HEALS_WITHIN: Duration = Duration::from_secs(30);

/// What is killed.
#[derive(Clone, Copy, Debug)]
enum Victim {
    Server,
    Postgres,
    Both,
}

/// One round of the drill in CI, as many as it takes in `make soak`.
#[expect(clippy::disallowed_methods, reason = "a knob of the test, not a setting of the product")]
fn rounds() -> usize {
    std::env::var("MUSTER_SOAK_ROUNDS").ok().map_or(1, |rounds| rounds.parse().expect("a number of rounds"))
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_acknowledged_is_lost_when_server_and_postgres_are_killed() {
    let mut fleet = Fleet::start_embedded().await;
    let stop = CancellationToken::new();
    let scenario = scenario(&fleet);
    let drill = async {
        for round in 0..rounds() {
            for victim in [Victim::Server, Victim::Postgres, Victim::Both] {
                under_load(&fleet).await;
                let healed = kill(&mut fleet, victim).await;
                println!("round {round}: {victim:?} healed after {healed:?}");
                assert!(healed < HEALS_WITHIN, "{victim:?} took {healed:?}");
            }
        }
        under_load(&fleet).await;
        stop.cancel();
    };
    let (report, ()) = tokio::join!(scenario.run(stop.clone(), |_| {}), drill);
    let report = report.expect("the run ends");
    println!("{report}");
    check(&report);
    assert!(fleet.stop().await.success());
}

fn scenario(fleet: &Fleet) -> Scenario {
    Scenario {
        url: fleet.url().to_owned(),
        mqtt: fleet.mqtt_addr().to_string(),
        access: Access::Password { email: ADMIN.0.into(), password: ADMIN.1.into() },
        devices: 20,
        rate: 400.0,
        log_rate: 100.0,
        duration: Duration::from_hours(12),
        payload_bytes: 200,
        seed: 7,
        faults: Faults { reconnects_per_minute: 60.0, ..Faults::default() },
        ledger: None,
        cleanup: false,
    }
}

/// Waits until readings are being committed again.
async fn under_load(fleet: &Fleet) {
    let stored = || fleet.metric("muster_ingest_readings_stored_total", "");
    let before = stored().await;
    #[expect(clippy::cast_precision_loss, reason = "a few hundred")]
    let enough = before + READINGS_BETWEEN as f64;
    fleet.eventually(stored, |now| *now >= enough).await;
}

/// Kills, starts again what does not come back by itself, and says how long it took until readings were stored again.
async fn kill(fleet: &mut Fleet, victim: Victim) -> Duration {
    let postmaster = fleet.postmaster();
    let began = Instant::now();
    match victim {
        Victim::Server => fleet.kill().await,
        Victim::Postgres => signal(postmaster, "KILL"),
        Victim::Both => {
            signal(postmaster, "KILL");
            fleet.kill().await;
        }
    }
    if matches!(victim, Victim::Server | Victim::Both) {
        fleet.start_again().await;
    }
    let ready = || async { fleet.is_ready().await };
    fleet.eventually(ready, |ready| *ready).await;
    began.elapsed()
}

fn check(report: &Report) {
    assert!(report.holds(), "{report}");
    assert!(report.acknowledged >= 4 * READINGS_BETWEEN, "{report}");
    assert_eq!(report.found, report.acknowledged);
}
