//! One MQTT connection, 3.1.1 or 5, behind one set of events.
//!
//! A link lives as long as its connection: the client library's own memory of unacknowledged messages is not used,
//! because a device must know which of its readings were acknowledged. After a failure, open another.

use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use rumqttc::{Outgoing, v5};

/// Publishes on the wire that wait for their PUBACK.
pub(crate) const WINDOW: usize = 16;
/// Room in the client for more than readings: status messages.
const INFLIGHT: u16 = 20;
/// Requests handed over that are not on the wire yet.
const REQUESTS: usize = 32;
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// TCP and CONNACK together.
const CONNECT_TIMEOUT_S: u64 = 10;

/// The version of the protocol a device speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Version {
    V3,
    V5,
}

/// Who connects where, and what is said if the connection dies.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) host: String,
    pub(crate) port: u16,
    pub(crate) client_id: String,
    pub(crate) username: String,
    pub(crate) password: String,
    pub(crate) will_topic: String,
    pub(crate) will: &'static str,
}

/// What happened on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Happened {
    /// The server accepted the connection.
    Connected,
    /// The oldest publish not yet on the wire went there with this packet id.
    Sent(u16),
    /// PUBACK: the server has it.
    Acknowledged(u16),
    /// PUBACK with a reason code of 0x80 or above.
    Refused(String),
    /// A message for the device.
    Came { topic: String, payload: Bytes },
    /// DISCONNECT is on the wire.
    Disconnected,
    /// Pings and the like.
    Other,
}

/// Events of a connection until its end. Dropping it cuts the connection without a DISCONNECT.
pub(crate) type Events = BoxStream<'static, Result<Happened, String>>;

/// The sending half.
pub(crate) enum Sender {
    V3(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

impl Sender {
    /// Hands over a publish that wants a PUBACK; false when there is no room, which a caller who keeps to [`WINDOW`] never sees.
    #[must_use]
    pub(crate) fn publish(&self, topic: &str, retain: bool, payload: Bytes) -> bool {
        match self {
            Self::V3(client) => client.try_publish(topic, rumqttc::QoS::AtLeastOnce, retain, payload).is_ok(),
            Self::V5(client) => client.try_publish(topic, v5::mqttbytes::QoS::AtLeastOnce, retain, payload).is_ok(),
        }
    }

    /// Hands over a SUBSCRIBE at QoS 1; false when there is no room.
    #[must_use]
    pub(crate) fn subscribe<const N: usize>(&self, filters: [String; N]) -> bool {
        match self {
            Self::V3(client) => {
                let filters = filters.map(|path| rumqttc::SubscribeFilter::new(path, rumqttc::QoS::AtLeastOnce));
                client.try_subscribe_many(filters).is_ok()
            }
            Self::V5(client) => {
                use v5::mqttbytes::{QoS, v5::Filter};
                client.try_subscribe_many(filters.map(|path| Filter::new(path, QoS::AtLeastOnce))).is_ok()
            }
        }
    }

    /// Hands over a DISCONNECT; false when there is no room.
    #[must_use]
    pub(crate) fn disconnect(&self) -> bool {
        match self {
            Self::V3(client) => client.try_disconnect().is_ok(),
            Self::V5(client) => client.try_disconnect().is_ok(),
        }
    }
}

/// Opens a connection; it is made when the events are first asked for.
pub(crate) fn open(version: Version, options: &Options) -> (Sender, Events) {
    match version {
        Version::V3 => open_v3(options),
        Version::V5 => open_v5(options),
    }
}

fn open_v3(options: &Options) -> (Sender, Events) {
    let mut mqtt = rumqttc::MqttOptions::new(&options.client_id, &options.host, options.port);
    mqtt.set_credentials(&options.username, &options.password)
        .set_keep_alive(KEEP_ALIVE)
        .set_inflight(INFLIGHT)
        .set_last_will(rumqttc::LastWill::new(&options.will_topic, options.will, rumqttc::QoS::AtLeastOnce, true));
    let (client, mut events) = rumqttc::AsyncClient::new(mqtt, REQUESTS);
    let mut network = rumqttc::NetworkOptions::new();
    network.set_connection_timeout(CONNECT_TIMEOUT_S).set_tcp_nodelay(true);
    events.set_network_options(network);
    // The stream owns the event loop, so a caller may stop waiting for an event without losing half of one.
    let events = stream::unfold(events, async |mut events| {
        let happened = events.poll().await.map(happened_v3).map_err(|e| e.to_string());
        Some((happened, events))
    });
    (Sender::V3(client), events.boxed())
}

fn happened_v3(event: rumqttc::Event) -> Happened {
    use rumqttc::{Event, Packet};
    match event {
        Event::Incoming(Packet::ConnAck(_)) => Happened::Connected,
        Event::Incoming(Packet::PubAck(ack)) => Happened::Acknowledged(ack.pkid),
        Event::Incoming(Packet::Publish(publish)) => Happened::Came { topic: publish.topic, payload: publish.payload },
        Event::Outgoing(outgoing) => went_out(&outgoing),
        Event::Incoming(_) => Happened::Other,
    }
}

fn open_v5(options: &Options) -> (Sender, Events) {
    use v5::mqttbytes::{QoS, v5::LastWill};
    let mut mqtt = v5::MqttOptions::new(&options.client_id, &options.host, options.port);
    let mut network = mqtt.network_options();
    network.set_tcp_nodelay(true);
    mqtt.set_credentials(&options.username, &options.password)
        .set_keep_alive(KEEP_ALIVE)
        .set_connection_timeout(CONNECT_TIMEOUT_S)
        .set_outgoing_inflight_upper_limit(INFLIGHT)
        .set_network_options(network)
        .set_last_will(LastWill::new(&options.will_topic, options.will, QoS::AtLeastOnce, true, None));
    let (client, events) = v5::AsyncClient::new(mqtt, REQUESTS);
    let events = stream::unfold(events, async |mut events| {
        let happened = events.poll().await.map(happened_v5).map_err(|e| e.to_string());
        Some((happened, events))
    });
    (Sender::V5(client), events.boxed())
}

fn happened_v5(event: v5::Event) -> Happened {
    use v5::mqttbytes::v5::{Packet, PubAckReason};
    match event {
        v5::Event::Incoming(Packet::ConnAck(_)) => Happened::Connected,
        v5::Event::Incoming(Packet::PubAck(ack)) => match ack.reason {
            PubAckReason::Success | PubAckReason::NoMatchingSubscribers => Happened::Acknowledged(ack.pkid),
            reason => {
                let text = ack.properties.and_then(|p| p.reason_string).unwrap_or_default();
                Happened::Refused(format!("PUBACK {reason:?} {text}").trim_end().to_owned())
            }
        },
        v5::Event::Incoming(Packet::Publish(publish)) => {
            Happened::Came { topic: String::from_utf8_lossy(&publish.topic).into_owned(), payload: publish.payload }
        }
        v5::Event::Outgoing(outgoing) => went_out(&outgoing),
        v5::Event::Incoming(_) => Happened::Other,
    }
}

fn went_out(outgoing: &Outgoing) -> Happened {
    match outgoing {
        Outgoing::Publish(id) => Happened::Sent(*id),
        Outgoing::Disconnect => Happened::Disconnected,
        _ => Happened::Other,
    }
}
