//! Subscriptions: options, identifiers, groups, retained messages.

use super::{
    AS_PUBLISHED, NO_LOCAL, RETAIN_IF_NEW, RETAIN_NEVER, Settings, Target, V5, V311, conforms, heard, muster_conforms,
    publish_all, words,
};
use crate::harness::client::Client;
use crate::harness::packet::Property::SubscriptionId;
use crate::harness::packet::{self, Property, Publish, Varint};

/// Sends a SUBSCRIBE that the server must not accept at all.
async fn breaks(at: &Target, filter: (&str, u8), properties: &[Property], rule: &str) {
    let mut client = at.connect(V5, "breaks").await;
    client.send(&packet::subscribe(V5, 1, &[(filter.0.to_owned(), filter.1)], properties)).await;
    client.ends(at.is_muster(), 0x82, rule).await;
}

// ---- options ----

#[tokio::test]
async fn a_new_subscription_replaces_the_one_with_its_filter() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        client.publish(Publish::new("t", "retained").qos(1).retained()).await;
        let subscriptions: [(u8, Option<u32>); 4] =
            [(2, Some(1)), (1 | AS_PUBLISHED, Some(2)), (NO_LOCAL, None), (2, None)];
        for (options, identifier) in subscriptions {
            let identifier: Vec<_> = identifier.map(|id| SubscriptionId(Varint(id))).into_iter().collect();
            client.subscribe_all(&[("t", options)], &identifier).await;
            let retained = client.message().await;
            assert!(retained.retain, "§3.8.4-4 retained messages come again");
            client.publish(Publish::new("t", "live").qos(2).retained()).await;
            let live = heard(&mut client).await;
            if options & NO_LOCAL > 0 {
                assert_eq!(live, [], "§3.8.4-3 no local now");
                continue;
            }
            assert_eq!(live.len(), 1, "§3.8.4-3 one subscription, not two: {live:?}");
            assert_eq!((live[0].qos, live[0].retain), (options & 3, options & AS_PUBLISHED > 0), "{options:#x}");
            assert_eq!(live[0].properties, identifier, "the identifier is of the latest");
        }
        client.disconnect().await;
    };
    muster_conforms("2.0 keeps the options of the first", Settings::default(), scenario).await;
}

#[tokio::test]
async fn retain_handling_says_when_retained_messages_come() {
    let scenario = async |at: &Target| {
        for (handling, first, again) in [(0, 1, 1), (RETAIN_IF_NEW, 1, 0), (RETAIN_NEVER, 0, 0)] {
            let (mut client, _) = at.join(at.hello(V5, "a").kept()).await;
            publish_all(&mut client, "t", 1, &["not retained"]).await;
            client.publish(Publish::new("t", "retained").qos(1).retained()).await;
            for count in [first, again, again] {
                client.subscribe("t", 1 | handling).await;
                assert_eq!(heard(&mut client).await.len(), count, "§3.3.1-9 to -11 {handling:#x}");
            }
            // In a resumed session it is not new; after UNSUBSCRIBE it is.
            client.disconnect().await;
            let (mut client, _) = at.join(at.hello(V5, "a").kept()).await;
            client.subscribe("t", 1 | handling).await;
            assert_eq!(heard(&mut client).await.len(), again, "{handling:#x} in a resumed session");
            client.unsubscribe(&["t"]).await;
            client.subscribe("t", 1 | handling).await;
            assert_eq!(heard(&mut client).await.len(), first, "{handling:#x} after UNSUBSCRIBE");
            client.disconnect_with(0, &[Property::SessionExpiry(0)]).await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn the_retain_flag_says_that_a_message_is_old_unless_as_published() {
    let scenario = async |at: &Target| {
        let mut publisher = at.connect(V5, "publisher").await;
        let (mut plain, mut as_published) = (at.connect(V5, "plain").await, at.connect(V5, "as published").await);
        plain.subscribe("t", 1).await;
        as_published.subscribe("t", 1 | AS_PUBLISHED).await;
        publisher.publish(Publish::new("t", "r").qos(1).retained()).await;
        publish_all(&mut publisher, "t", 1, &["n"]).await;
        let flags = |messages: Vec<Publish>| messages.iter().map(|message| message.retain).collect::<Vec<_>>();
        assert_eq!(flags(plain.messages(2).await), [false, false], "§3.3.1-12");
        assert_eq!(flags(as_published.messages(2).await), [true, false], "§3.3.1-13");
        for (options, rule) in [(1, "§3.3.1-8"), (1 | AS_PUBLISHED, "§3.3.1-8")] {
            let mut late = at.connect(V5, "late").await;
            late.subscribe("t", options).await;
            assert_eq!(flags(late.messages(1).await), [true], "{rule}");
            late.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn an_empty_retained_message_clears_and_is_heard() {
    let scenario = async |at: &Target| {
        for version in [V311, V5] {
            for qos in 0..=2 {
                let mut client = at.connect(version, "a").await;
                client.publish(Publish::new("t", "old").qos(qos).retained()).await;
                client.publish(Publish::new("t", "new").qos(qos).retained()).await;
                client.subscribe("t", 2).await;
                let kept = heard(&mut client).await;
                assert_eq!((words(&kept), kept[0].qos), (vec!["new".to_owned()], qos), "§3.3.1-5 the last one");
                client.publish(Publish::new("t", "").qos(qos).retained()).await;
                let clearing = heard(&mut client).await;
                assert_eq!((clearing.len(), clearing[0].retain), (1, false), "§3.3.1-6 as any message");
                let mut late = at.connect(version, "late").await;
                late.subscribe("t", 2).await;
                assert_eq!(heard(&mut late).await, [], "§3.3.1-6, §3.3.1-7");
                late.disconnect().await;
                client.disconnect().await;
            }
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn no_local_is_of_a_client_not_of_a_connection() {
    let scenario = async |at: &Target| {
        let (mut client, _) = at.join(at.hello(V5, "a").kept()).await;
        client.subscribe("t", 1 | NO_LOCAL).await;
        client.disconnect().await;
        let (mut client, _) = at.join(at.hello(V5, "a").kept()).await;
        publish_all(&mut client, "t", 1, &["own"]).await;
        let mut other = at.connect(V5, "b").await;
        publish_all(&mut other, "t", 1, &["another's"]).await;
        assert_eq!(words(&heard(&mut client).await), ["another's"], "§3.8.3-3");
        // A second subscription without the option has its own say.
        client.subscribe("+", 1).await;
        publish_all(&mut client, "t", 1, &["own"]).await;
        assert_eq!(words(&heard(&mut client).await), ["own"]);
        client.disconnect().await;
    };
    conforms(scenario).await;
}

// ---- identifiers ----

fn identifiers(message: &Publish) -> Vec<u32> {
    let identifier = |property: &Property| match property {
        SubscriptionId(Varint(identifier)) => Some(*identifier),
        _ => None,
    };
    let mut identifiers: Vec<_> = message.properties.iter().filter_map(identifier).collect();
    identifiers.sort_unstable();
    identifiers
}

#[tokio::test]
async fn a_message_names_all_its_subscriptions() {
    let scenario = async |at: &Target| {
        let (mut client, _) = at.join(at.hello(V5, "a").kept()).await;
        let filters = [("t/#", 1), ("t/+", 127), ("t/1", 128), ("+/1", 268_435_455)];
        client.publish(Publish::new("t/2", "retained").qos(1).retained()).await;
        for (filter, identifier) in filters {
            assert_eq!(client.subscribe_as(identifier, filter, 1).await, 1);
        }
        let retained = client.messages(2).await;
        assert_eq!(retained.iter().map(identifiers).collect::<Vec<_>>(), [[1], [127]], "§3.3.4-3 retained ones too");
        // One without an identifier adds none.
        client.subscribe("#", RETAIN_NEVER).await;
        let received = async |client: &mut Client| {
            let messages = heard(client).await;
            let all: Vec<_> = messages.iter().flat_map(identifiers).collect();
            if at.is_muster() {
                assert_eq!(messages.len(), 1, "one for all: §3.3.4-4");
            }
            all
        };
        publish_all(&mut client, "t/1", 1, &["x"]).await;
        let mut all = received(&mut client).await;
        all.sort_unstable();
        assert_eq!(all, [1, 127, 128, 268_435_455], "§3.3.4-4");
        client.unsubscribe(&["#"]).await;
        // They outlive a connection.
        client.disconnect().await;
        let mut publisher = at.connect(V5, "publisher").await;
        publish_all(&mut publisher, "t/3", 1, &["x"]).await;
        let (mut client, _) = at.join(at.hello(V5, "a").kept()).await;
        let mut all = received(&mut client).await;
        all.sort_unstable();
        assert_eq!(all, [1, 127]);
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_subscribe_that_breaks_the_rules_ends_the_connection() {
    let scenario = async |at: &Target| {
        breaks(at, ("t", 1), &[SubscriptionId(Varint(0))], "§3.8.2.1.2 there is no identifier 0").await;
        let twice = [SubscriptionId(Varint(1)), SubscriptionId(Varint(2))];
        breaks(at, ("t", 1), &twice, "§3.8.2.1.2 one identifier").await;
        // mosquitto 2.0 takes it.
        if !at.is_muster() {
            return;
        }
        breaks(at, ("$share/g/t", 1 | NO_LOCAL), &[], "§3.8.3-4 no local in a group").await;
    };
    conforms(scenario).await;
}

// ---- groups ----

/// Members of a group, each with its subscription.
async fn members(at: &Target, count: usize, filter: &str, qos: u8) -> Vec<Client> {
    let mut members = Vec::new();
    for number in 0..count {
        let mut member = at.connect(V5, &format!("member {number}")).await;
        assert_eq!(member.subscribe(filter, qos).await, qos);
        members.push(member);
    }
    members
}

#[tokio::test]
async fn a_group_shares_its_messages_and_others_have_their_own() {
    let scenario = async |at: &Target| {
        for qos in 0..=2 {
            let mut group = members(at, 3, "$share/g/t/+", qos).await;
            let mut other = at.connect(V5, "other").await;
            other.subscribe("$share/h/t/1", qos).await;
            let mut alone = at.connect(V5, "alone").await;
            alone.subscribe("t/1", qos).await;
            let mut publisher = at.connect(V5, "publisher").await;
            let sent: Vec<_> = (10..40).map(|count| count.to_string()).collect();
            for payload in &sent {
                publisher.publish(Publish::new("t/1", payload.as_str()).qos(qos)).await;
            }
            publisher.is_quiet("all are sent").await;
            let mut shared = Vec::new();
            for member in &mut group {
                let part = words(&heard(member).await);
                assert!(!part.is_empty(), "§4.8.2 everybody gets a share");
                assert!(part.is_sorted(), "a share is in order: {part:?}");
                shared.extend(part);
            }
            shared.sort_unstable();
            assert_eq!(shared, sent, "§4.8.2 each message once, QoS {qos}");
            assert_eq!(words(&heard(&mut other).await), sent, "another group has all");
            assert_eq!(words(&heard(&mut alone).await), sent);
            for client in group.into_iter().chain([other, alone]) {
                client.disconnect().await;
            }
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn who_leaves_a_group_gets_nothing_more() {
    let scenario = async |at: &Target| {
        let mut group = members(at, 3, "$share/g/t", 1).await;
        let mut publisher = at.connect(V5, "publisher").await;
        assert_eq!(group[0].unsubscribe(&["$share/g/t"]).await, [0]);
        group.pop().expect("three").disconnect().await;
        let sent = ["1", "2", "3", "4"];
        publish_all(&mut publisher, "t", 1, &sent).await;
        assert_eq!(words(&heard(&mut group[1]).await), sent);
        assert_eq!(heard(&mut group[0]).await, []);
        // The same filter without a group is another subscription.
        group[1].subscribe("t", 1).await;
        assert_eq!(group[1].unsubscribe(&["$share/g/t"]).await, [0]);
        publish_all(&mut publisher, "t", 1, &["alone"]).await;
        assert_eq!(words(&heard(&mut group[1]).await), ["alone"]);
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_group_has_no_retained_messages() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        client.publish(Publish::new("t", "retained").qos(1).retained()).await;
        client.subscribe("$share/g/t", 1).await;
        assert_eq!(heard(&mut client).await, [], "§4.8.2 none are sent to a new shared subscription");
        client.disconnect().await;
    };
    muster_conforms("2.0 sends them", Settings::default(), scenario).await;
}

#[tokio::test]
async fn a_group_whose_members_are_away_keeps_what_comes() {
    let scenario = async |at: &Target| {
        let hello = at.hello(V5, "a").kept();
        let (mut client, _) = at.join(hello.clone()).await;
        client.subscribe("$share/g/t", 1).await;
        client.disconnect().await;
        let mut publisher = at.connect(V5, "publisher").await;
        publish_all(&mut publisher, "t", 1, &["1", "2"]).await;
        let (mut client, connack) = at.join(hello).await;
        assert!(connack.present);
        assert_eq!(words(&heard(&mut client).await), ["1", "2"]);
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_filter_that_is_no_shared_filter_is_refused() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        for filter in ["$share//x", "$share/g", "$share/g/", "$share/g+/x", "$share/#/x"] {
            assert_eq!(client.subscribe(filter, 1).await, 0x8F, "§4.8.2-1, §4.8.2-2 {filter}");
        }
        client.disconnect().await;
    };
    muster_conforms("2.0 takes a group without a name", Settings::default(), scenario).await;
}

// ---- UNSUBSCRIBE, wildcards ----

#[tokio::test]
async fn unsubscribe_says_for_each_filter_whether_there_was_one() {
    let scenario = async |at: &Target| {
        let mut client = at.connect(V5, "a").await;
        let (known, unknown) = ("t/+", "t/1");
        client.subscribe(known, 1).await;
        assert_eq!(client.unsubscribe(&[unknown, known]).await, [0x11, 0], "§3.11.3-2 t/1 is not t/+");
        assert_eq!(client.unsubscribe(&[known]).await, [0x11]);
        client.disconnect().await;
        let mut client = at.connect(V311, "a").await;
        client.unsubscribe(&[unknown]).await;
        client.is_quiet("3.1.1 §3.10.4-5 answered, whether it was there or not").await;
        client.disconnect().await;
        for packet in [packet::unsubscribe(V5, 1, &[]), packet::subscribe(V5, 1, &[], &[])] {
            let mut client = at.connect(V5, "a").await;
            client.send(&packet).await;
            client.closes("§3.8.3-2, §3.10.3-2 no filter at all").await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn each_filter_of_a_subscribe_has_its_own_answer() {
    let scenario = async |at: &Target| {
        for (version, refused) in [(V311, 0x80), (V5, 0x87)] {
            let mut client = at.connect(version, "a").await;
            let all = [("t/1", 0), ("test/nosubscribe", 1), ("t/2", 1), ("t/3", 2)];
            let answers = client.subscribe_all(&all, &[]).await;
            assert_eq!(answers.codes, [0, refused, 1, 2], "§3.9.3-1 in their order");
            client.disconnect().await;
        }
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn wildcards_match_what_they_should() {
    let scenario = async |at: &Target| {
        let cases = [
            ("t/#", "t", true),
            ("t/#", "t/1/2", true),
            ("t/+", "t", false),
            ("t/+", "t/", true),
            ("t/+", "t/1/2", false),
            ("+/1", "t/1", true),
            ("+/1", "/1", true),
            ("/+", "/t", true),
            ("+", "/t", false),
            ("t/+/2", "t//2", true),
            ("T/1", "t/1", false),
            ("t/1", "t/1/", false),
            ("t//1", "t/1", false),
            ("#", "t", true),
        ];
        let mut client = at.connect(V311, "a").await;
        for (filter, topic, matches) in cases {
            client.subscribe(filter, 0).await;
            client.publish(Publish::new(topic, topic)).await;
            let heard = heard(&mut client).await.iter().filter(|message| message.text() == topic).count();
            assert_eq!(heard, usize::from(matches), "§4.7 {filter} and {topic}");
            client.unsubscribe(&[filter]).await;
        }
        client.disconnect().await;
    };
    conforms(scenario).await;
}

#[tokio::test]
async fn a_wildcard_at_the_start_does_not_match_what_begins_with_a_dollar() {
    let scenario = async |at: &Target| {
        let (mut wild, mut exact) = (at.connect(V5, "wild").await, at.connect(V5, "exact").await);
        for filter in ["#", "+/#", "+/B", "+/+"] {
            assert_eq!(wild.subscribe(filter, 0).await, 0);
        }
        for filter in ["$TopicA/#", "$TopicA/+"] {
            assert_eq!(exact.subscribe(filter, 1).await, 1);
        }
        let mut publisher = at.connect(V5, "publisher").await;
        publish_all(&mut publisher, "$TopicA/B", 1, &["x"]).await;
        assert_eq!(exact.message().await.text(), "x", "§4.7.2 a wildcard further on does");
        assert_eq!(words(&heard(&mut wild).await), [""; 0], "§4.7.2-1");
        for client in [wild, exact, publisher] {
            client.disconnect().await;
        }
    };
    conforms(scenario).await;
}
