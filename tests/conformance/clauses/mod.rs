//! What suites leave out: clauses of the standards that decide whether nothing is lost, doubled, or sent to whom it should
//! not be.

mod connecting;
mod delivery;
mod malformed;
mod sessions;
mod subscriptions;

use super::{Settings, Target, conforms, heard, muster_conforms, passes, texts};
use crate::harness::client::Client;
use crate::harness::packet::Publish;
use crate::harness::raw::Version::{V5, V311};

/// Options of a subscription beside its QoS (§3.8.3.1).
const NO_LOCAL: u8 = 0x04;
const AS_PUBLISHED: u8 = 0x08;
const RETAIN_IF_NEW: u8 = 0x10;
const RETAIN_NEVER: u8 = 0x20;

/// Only what they say, in order.
fn words(messages: &[Publish]) -> Vec<String> {
    messages.iter().map(Publish::text).collect()
}

/// Publishes messages on one topic; when it returns the server has them all.
async fn publish_all(client: &mut Client, topic: &str, qos: u8, payloads: &[&str]) {
    for payload in payloads {
        let code = client.publish(Publish::new(topic, *payload).qos(qos)).await;
        assert!(code < 0x80, "{payload}: {code:#x}");
    }
    if qos == 0 {
        client.is_quiet("who publishes at QoS 0 here subscribes to nothing").await;
    }
}
