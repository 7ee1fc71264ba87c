//! CONNECT, AUTH, takeover and the end of a connection.

use super::{Settings, Target, V5, V311, conforms, heard, muster_conforms};
use crate::harness::client::Client;
use crate::harness::packet::Property::{
    AuthenticationData, AuthenticationMethod, ReceiveMaximum, RequestProblemInformation, RequestResponseInformation,
    SessionExpiry,
};
use crate::harness::packet::kind::{AUTH, PUBACK};
use crate::harness::packet::{Packet, Property, Publish, Will, property, reasoned, users};
use crate::harness::raw::Version;

#[tokio::test]
async fn everything_of_the_standard_is_on_offer() {
    let scenario = async |at: &Target| {
        let (client, connack) = at.join(at.hello(V5, "a")).await;
        let offers = &connack.properties;
        assert_eq!(property!(offers, MaximumQos), None, "§3.2.2.3.4 absent means 2");
        assert_ne!(property!(offers, RetainAvailable), Some(0), "§3.2.2.3.5");
        assert_ne!(property!(offers, WildcardSubscriptionAvailable), Some(0), "§3.2.2.3.11");
        assert_ne!(property!(offers, SubscriptionIdAvailable), Some(0), "§3.2.2.3.12");
        assert_ne!(property!(offers, SharedSubscriptionAvailable), Some(0), "§3.2.2.3.13");
        assert!(property!(offers, TopicAliasMaximum).is_some_and(|most| most > 0), "§3.2.2.3.8");
        assert_ne!(property!(offers, ReceiveMaximum), Some(0), "§3.2.2.3.3");
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn an_assigned_name_is_unique_and_finds_its_session_again() {
    let scenario = async |at: &Target| {
        let (a, connack) = at.join(at.hello(V5, "").kept()).await;
        let name = property!(connack.properties, AssignedClientId).expect("§3.2.2-16");
        let (b, connack) = at.join(at.hello(V5, "").kept()).await;
        assert_ne!(property!(connack.properties, AssignedClientId), Some(name.clone()), "§3.1.3-6 unique");
        a.disconnect().await;
        b.disconnect().await;
        let (a, connack) = at.join(at.hello(V5, &name).kept()).await;
        assert!(connack.present, "the session of {name}");
        assert_eq!(property!(connack.properties, AssignedClientId), None, "it has a name now");
        a.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn response_information_only_when_it_is_asked_for() {
    let scenario = async |at: &Target| {
        for asked in [None, Some(0)] {
            let mut hello = at.hello(V5, "a");
            hello.properties.extend(asked.map(RequestResponseInformation));
            let (client, connack) = at.join(hello).await;
            assert_eq!(property!(connack.properties, ResponseInformation), None, "§3.1.2-28");
            client.disconnect().await;
        }
        let (client, _) = at.join(at.hello(V5, "a").with(RequestResponseInformation(1))).await;
        client.disconnect().await;
        for (property, rule) in [
            (RequestResponseInformation(2), "§3.1.2.11.6 0 or 1"),
            (RequestProblemInformation(2), "§3.1.2.11.7 0 or 1"),
            (ReceiveMaximum(0), "§3.1.2.11.3 not 0"),
        ] {
            refused(at, property, &[0x81, 0x82], rule).await;
        }
    };
    conforms(scenario).await;
}

/// A CONNECT with this property is refused: with one of `codes`, or by closing.
async fn refused(at: &Target, property: Property, codes: &[u8], rule: &str) {
    let mut client = Client::on(at.open().await, V5);
    client.send(&at.hello(V5, "a").with(property).bytes()).await;
    match client.next().await {
        Packet::ConnAck(connack) => assert!(codes.contains(&connack.code), "{rule}: {connack:?}"),
        Packet::Closed => return,
        other => panic!("{rule}: {other:?}"),
    }
    client.closes(rule).await;
}

#[tokio::test]
async fn reason_strings_only_where_problem_information_is_allowed() {
    let deviation = "2.0 sends no reason strings";
    let scenario = async |at: &Target| {
        for allowed in [None, Some(1), Some(0)] {
            let mut hello = at.hello(V5, "a");
            hello.properties.extend(allowed.map(RequestProblemInformation));
            let (mut client, _) = at.join(hello).await;
            let suback = client.subscribe_all(&[("test/nosubscribe", 1)], &[]).await;
            // Readings are the device's alone.
            client.send_publish(&Publish::new("fleet/v1/main/nobody/telemetry", "{}").qos(1).id(7)).await;
            let puback = client.ack(PUBACK, 7).await;
            assert_eq!((suback.codes, puback.reason), (vec![0x87], 0x87));
            for properties in [suback.properties, puback.properties] {
                let said = property!(properties, ReasonString).is_some() || !users(&properties).is_empty();
                assert_eq!(said, allowed != Some(0), "§3.1.2-29 {allowed:?}: {properties:?}");
            }
            client.disconnect().await;
        }
    };
    muster_conforms(deviation, Settings::default(), scenario).await;
}

#[tokio::test]
async fn extended_authentication_is_refused_cleanly() {
    let scenario = async |at: &Target| {
        let method = AuthenticationMethod("SCRAM-SHA-256".into());
        let hello = at.hello(V5, "a").with(method.clone()).with(AuthenticationData(b"n,,n=user".to_vec()));
        let (client, connack) = at.ask(hello).await;
        assert_eq!(connack.code, 0x8C, "§4.12-1 bad authentication method");
        client.closes("§4.12-1").await;
        for properties in [vec![], vec![method]] {
            let mut client = at.connect(V5, "a").await;
            client.send(&reasoned(AUTH, 0x19, &properties)).await;
            client.ends(at.is_muster(), 0x82, "§4.12.0-6 AUTH where none was agreed on").await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_second_connect_ends_the_connection_and_sends_its_will() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let mut watcher = at.connect(V5, "watcher").await;
            watcher.subscribe("will", 1).await;
            let hello = at.hello(version, "a").will(Will::new("will", "twice"));
            let (mut client, _) = at.join(hello.clone()).await;
            client.send(&hello.bytes()).await;
            client.ends(at.is_muster(), 0x82, "§3.1.0-2").await;
            // mosquitto 2.0 forgets the will.
            if at.is_muster() {
                assert_eq!(watcher.message().await.text(), "twice", "§3.1.2-8 {version:?}");
            }
            watcher.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_takeover_is_said_to_the_one_that_is_taken_over() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            let (mut first, _) = at.join(at.hello(version, "a").kept()).await;
            first.subscribe("kept", 1).await;
            let (mut second, connack) = at.join(at.hello(version, "a").kept()).await;
            first.ends(at.is_muster(), 0x8E, "§3.1.4-3 session taken over").await;
            assert!(connack.present, "the session goes on");
            second.publish(Publish::new("kept", "still subscribed").qos(1)).await;
            assert_eq!(second.message().await.text(), "still subscribed");
            let (third, connack) = at.join(at.hello(version, "a")).await;
            assert!(!connack.present, "§3.1.2-4 a clean start");
            second.ends(at.is_muster(), 0x8E, "§3.1.4-3").await;
            third.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_takeover_sends_the_will_unless_it_waits_for_the_resumed_session() {
    let scenario = async |at: &Target| {
        let mut watcher = at.connect(V5, "watcher").await;
        watcher.subscribe("will/+", 1).await;
        let with_will = async |client: &str, delay: u32| {
            let mut will = Will::new(format!("will/{client}"), client);
            will.properties = vec![Property::WillDelay(delay)];
            at.join(at.hello(V5, client).kept().will(will)).await.0
        };
        let delayed = with_will("delayed", 3600).await;
        let at_once = with_will("at once", 0).await;
        for client in ["delayed", "at once"] {
            at.join(at.hello(V5, client).kept()).await.0.disconnect().await;
        }
        delayed.closes("taken over").await;
        at_once.closes("taken over").await;
        let wills: Vec<_> = heard(&mut watcher).await.iter().map(Publish::text).collect();
        assert_eq!(wills, ["at once"], "§3.1.3.2.2, §3.1.3-9");
        watcher.disconnect().await;
    };
    let deviation = "2.0 drops the will of a connection that is taken over";
    muster_conforms(deviation, Settings::default(), scenario).await;
}

#[tokio::test]
async fn disconnect_with_will_sends_it_and_without_does_not() {
    let scenario = async |at: &Target| {
        let mut watcher = at.connect(V5, "watcher").await;
        watcher.subscribe("will", 1).await;
        // mosquitto 2.0 sends it for 0x04 alone.
        let errors = if at.is_muster() { vec![(0x81, "an error")] } else { vec![] };
        for (reason, payload) in [(0x00, "normal"), (0x04, "with will")].into_iter().chain(errors.clone()) {
            let (client, _) = at.join(at.hello(V5, "a").will(Will::new("will", payload))).await;
            client.disconnect_with(reason, &[]).await;
        }
        let wills: Vec<_> = heard(&mut watcher).await.iter().map(Publish::text).collect();
        let expected: Vec<_> = std::iter::once("with will").chain(errors.iter().map(|(_, payload)| *payload)).collect();
        assert_eq!(wills, expected, "§3.14.4-3, §3.14.2.1");
        watcher.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_session_expiry_of_none_cannot_be_raised_at_the_end() {
    let scenario = async |at: &Target| {
        for hello in [at.hello(V5, "a"), at.hello(V5, "a").with(SessionExpiry(0))] {
            let (mut client, _) = at.join(hello).await;
            client.send(&reasoned(crate::harness::packet::kind::DISCONNECT, 0, &[SessionExpiry(60)])).await;
            client.ends(at.is_muster(), 0x82, "§3.14.2-2").await;
        }
        let (client, connack) = at.join(at.hello(V5, "a").kept_for(0)).await;
        assert!(!connack.present);
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_version_that_does_not_exist_is_refused_by_its_code() {
    let scenario = async |at: &Target| {
        // In which form a version of the future is answered is the server's choice.
        let future = if at.is_muster() { (V5, 0x84) } else { (V311, 1) };
        for (level, (version, code)) in [(6, future), (2, (V311, 1))] {
            let mut client = Client::on(at.open().await, version);
            let mut connect = at.hello(V311, "a").bytes();
            let place = connect.windows(4).position(|name| name == b"MQTT").expect("the protocol's name") + 4;
            connect[place] = level;
            client.send(&connect).await;
            match client.next().await {
                Packet::ConnAck(connack) => assert_eq!(connack.code, code, "§3.1.2-2"),
                Packet::Closed => continue,
                other => panic!("{other:?}"),
            }
            client.closes("§3.1.2-2").await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_keep_alive_is_renewed_by_any_packet() {
    let scenario = async |at: &Target| {
        let alive = async |version: Version, client: &str| {
            let (mut client, _) = at.join(at.hello(version, client).keep_alive(2)).await;
            for _ in 0..4 {
                super::passes(1.0).await;
                client.is_quiet("§3.1.2-22 it was not silent for 3 s").await;
            }
            client.disconnect().await;
        };
        tokio::join!(alive(V311, "a"), alive(V5, "b"));
    };
    conforms(scenario).await;
}
