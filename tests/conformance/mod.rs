//! The standards, clause by clause: what a server must answer to a client that is exact.
//!
//! [`v3`] and [`v5`] hold the scenarios of the Eclipse Paho interoperability suite, a test each and by its name;
//! [`clauses`] what suites leave out. A scenario is a function over a [`Target`]: it is played against mosquitto, which
//! shows that the scenario is right, and against Muster. Where mosquitto is known to differ the test says how, and does
//! not ask it. Which test keeps which clause is told by `docs/reference/conformance.md`; [`table`] keeps that true.

mod clauses;
mod shared;
mod table;
mod target;
mod v3;
mod v5;

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;

use crate::harness::client::Client;
use crate::harness::packet::Publish;
use target::Target;

/// What a scenario asks of the servers before they start.
#[derive(Clone, Copy, Default)]
struct Settings {
    /// Lines of mosquitto.conf.
    mosquitto: &'static [&'static str],
    muster: &'static [(&'static str, &'static str)],
}

/// Plays a scenario against mosquitto and against Muster.
async fn conforms(scenario: impl AsyncFn(&Target)) {
    conforms_with(Settings::default(), scenario).await;
}

async fn conforms_with(settings: Settings, scenario: impl AsyncFn(&Target)) {
    let oracle = Box::pin(async { scenario(&Target::mosquitto(settings.mosquitto).await).await });
    let (oracle, muster) = tokio::join!(passed("mosquitto", oracle), on_muster(settings, &scenario));
    assert!(oracle && muster, "mosquitto passed: {oracle}, Muster passed: {muster}");
}

/// Plays a scenario against Muster alone; `deviation` says what mosquitto does instead.
async fn muster_conforms(deviation: &str, settings: Settings, scenario: impl AsyncFn(&Target)) {
    println!("mosquitto is not asked: {deviation}");
    assert!(on_muster(settings, &scenario).await, "Muster failed");
}

async fn on_muster(settings: Settings, scenario: &impl AsyncFn(&Target)) -> bool {
    let muster = Box::pin(async { scenario(&Target::muster(settings.muster).await).await });
    passed("Muster", muster).await
}

/// Whether a server passed; the other one plays on.
async fn passed(server: &str, scenario: impl Future<Output = ()>) -> bool {
    let passed = AssertUnwindSafe(scenario).catch_unwind().await.is_ok();
    if !passed {
        eprintln!("that was {server}");
    }
    passed
}

/// Everything that the server has for this client by now, acknowledged: a message that the client sends to itself marks
/// the end.
async fn heard(client: &mut Client) -> Vec<Publish> {
    let mark = Publish::new("mark/of/the/end", "").qos(1);
    assert_eq!(client.subscribe(&mark.topic, 1).await, 1, "nobody else needs this topic");
    client.publish(mark.clone()).await;
    let mut heard = Vec::new();
    loop {
        let message = client.message().await;
        if message.topic == mark.topic {
            client.unsubscribe(&[&mark.topic]).await;
            return heard;
        }
        heard.push(message);
    }
}

/// Payloads and QoS.
fn texts(messages: &[Publish]) -> Vec<(String, u8)> {
    messages.iter().map(|message| (message.text(), message.qos)).collect()
}

/// Lets time go by, where the standard promises something after a time.
async fn passes(seconds: f64) {
    tokio::time::sleep(Duration::from_secs_f64(seconds)).await;
}
