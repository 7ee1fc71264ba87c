//! Sessions and wills that outlive their connection.

use super::{Target, V5, V311, conforms, heard, passes, publish_all, words};
use crate::harness::client::Client;
use crate::harness::packet::Property::{SessionExpiry, WillDelay};
use crate::harness::packet::{Publish, Will};
use crate::harness::raw::Version;

/// Connects with a session of `expiry` seconds and a will of this delay.
async fn with_will(at: &Target, client: &str, expiry: u32, delay: u32) -> Client {
    let mut will = Will::new(format!("will/{client}"), client);
    will.properties = vec![WillDelay(delay)];
    at.join(at.hello(V5, client).kept_for(expiry).will(will)).await.0
}

/// Somebody who hears all wills.
async fn watcher(at: &Target) -> Client {
    let mut watcher = at.connect(V5, "watcher").await;
    watcher.subscribe("will/+", 1).await;
    watcher
}

#[tokio::test]
async fn a_will_that_waits_is_cancelled_by_the_client_that_comes_back() {
    let scenario = async |at: &Target| {
        let mut watcher = watcher(at).await;
        for client in ["stays away", "comes back"] {
            with_will(at, client, 3600, 4).await.vanish();
        }
        let (back, connack) = at.join(at.hello(V5, "comes back").kept()).await;
        assert!(connack.present);
        assert_eq!(watcher.message().await.text(), "stays away");
        // Both went at about the same time.
        passes(1.0).await;
        assert_eq!(heard(&mut watcher).await, [], "§3.1.3-9");
        back.disconnect().await;
        watcher.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_will_that_waits_is_sent_when_its_session_ends() {
    let scenario = async |at: &Target| {
        let mut watcher = watcher(at).await;
        with_will(at, "expires", 1, 3600).await.vanish();
        assert_eq!(watcher.message().await.text(), "expires", "§3.1.3.2.2");
        // mosquitto 2.0 drops the will of a session that a clean start ends.
        if at.is_muster() {
            with_will(at, "is replaced", 3600, 3600).await.vanish();
            at.connect(V5, "is replaced").await.disconnect().await;
            assert_eq!(watcher.message().await.text(), "is replaced", "§3.1.3.2.2");
        }
        watcher.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_good_bye_that_ends_the_session_ends_the_will_too() {
    let scenario = async |at: &Target| {
        let mut watcher = watcher(at).await;
        with_will(at, "a", 3600, 1).await.disconnect_with(0, &[SessionExpiry(0)]).await;
        with_will(at, "b", 3600, 1).await.disconnect().await;
        passes(2.5).await;
        assert_eq!(heard(&mut watcher).await, [], "§3.14.4-3");
        watcher.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_retained_will_stays() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            for qos in 0..=2 {
                let mut will = Will::new("last/words", format!("{version:?} {qos}"));
                (will.retain, will.qos) = (true, qos);
                let mut watcher = at.connect(version, "watcher").await;
                watcher.subscribe("last/#", 2).await;
                heard(&mut watcher).await;
                at.join(at.hello(version, "a").will(will)).await.0.vanish();
                let live = watcher.message().await;
                assert_eq!((live.text(), live.qos, live.retain), (format!("{version:?} {qos}"), qos, false));
                watcher.disconnect().await;
                let mut late = at.connect(version, "late").await;
                late.subscribe("last/words", 2).await;
                let kept = late.message().await;
                assert_eq!(
                    (kept.text(), kept.qos, kept.retain),
                    (format!("{version:?} {qos}"), qos, true),
                    "§3.1.2-17"
                );
                late.disconnect().await;
            }
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_session_keeps_its_subscriptions_and_what_came_meanwhile() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let hello = at.hello(version, "a").kept();
            let (mut client, connack) = at.join(hello.clone()).await;
            assert!(!connack.present, "§3.2.2-3 there is none yet");
            client.subscribe("t/1", 1).await;
            client.subscribe("t/2", 2).await;
            client.unsubscribe(&["t/2"]).await;
            client.disconnect().await;
            let mut publisher = at.connect(version, "publisher").await;
            publish_all(&mut publisher, "t/1", 2, &["one", "two", "three"]).await;
            publish_all(&mut publisher, "t/2", 2, &["not wanted"]).await;
            let (mut client, connack) = at.join(hello).await;
            assert!(connack.present, "§3.2.2-3");
            let received = heard(&mut client).await;
            assert_eq!(words(&received), ["one", "two", "three"], "§4.5 {version:?}");
            assert!(received.iter().all(|message| message.qos == 1 && !message.dup), "{received:?}");
            ends(at, client, version).await;
        }
    };
    conforms(scenario).await;
}

/// Ends a kept session.
async fn ends(at: &Target, client: Client, version: Version) {
    client.disconnect().await;
    at.connect(version, "a").await.disconnect().await;
}

#[tokio::test]
async fn a_session_can_change_its_version() {
    let scenario = async |at: &Target| {
        let (mut client, _) = at.join(at.hello(V311, "a").kept()).await;
        client.subscribe("t", 1).await;
        client.disconnect().await;
        let mut publisher = at.connect(V5, "publisher").await;
        let message = Publish::new("t", "to whom it may concern").qos(1);
        publisher.publish(message.with(crate::harness::packet::user("a", "1"))).await;
        let (mut client, connack) = at.join(at.hello(V5, "a").kept()).await;
        assert!(connack.present, "a session is of a client, not of a version");
        assert_eq!(client.message().await.text(), "to whom it may concern");
        client.disconnect().await;
        publish_all(&mut publisher, "t", 1, &["again"]).await;
        let (mut client, connack) = at.join(at.hello(V311, "a").kept()).await;
        assert!(connack.present);
        assert_eq!(client.message().await.text(), "again");
        ends(at, client, V311).await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_connection_may_shorten_the_life_of_its_session() {
    let scenario = async |at: &Target| {
        at.join(at.hello(V5, "a").kept()).await.0.vanish();
        let (client, connack) = at.join(at.hello(V5, "a").kept_for(0)).await;
        assert!(connack.present);
        client.vanish();
        let (client, connack) = at.join(at.hello(V5, "a").kept()).await;
        assert!(!connack.present, "§3.1.2.11.2 the latest CONNECT decides");
        client.disconnect().await;
    };
    conforms(scenario).await;
}
