//! An MQTT client for tests, on rumqttc: publishes and waits for the answer, subscribes and waits for messages.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{LastWill, Packet, PubAckReason, Publish, SubscribeReasonCode};
use rumqttc::v5::{AsyncClient, ConnectionError, Event, EventLoop, MqttOptions};
use tokio::time::timeout;

use super::PATIENCE;

/// What a PUBLISH was answered.
pub(crate) type Answer = PubAckReason;

/// A connected client.
pub(crate) struct Mqtt {
    client: AsyncClient,
    events: EventLoop,
    received: VecDeque<Publish>,
}

impl Mqtt {
    /// Connects, MQTT 5, clean start, keep alive 30 s.
    pub(crate) async fn connect(
        address: SocketAddr,
        client_id: &str,
        username: &str,
        password: &str,
    ) -> Result<Self, ConnectionError> {
        Self::connect_with_will(address, client_id, username, password, None).await
    }

    /// As [`Mqtt::connect`], with a will: topic and payload.
    pub(crate) async fn connect_with_will(
        address: SocketAddr,
        client_id: &str,
        username: &str,
        password: &str,
        will: Option<(String, String)>,
    ) -> Result<Self, ConnectionError> {
        let mut options = MqttOptions::new(client_id, address.ip().to_string(), address.port());
        options.set_credentials(username, password);
        options.set_keep_alive(Duration::from_secs(30));
        options.set_connection_timeout(PATIENCE.as_secs());
        if let Some((topic, payload)) = will {
            options.set_last_will(LastWill::new(topic, payload, QoS::AtLeastOnce, true, None));
        }
        let (client, mut events) = AsyncClient::new(options, 100);
        loop {
            if let Event::Incoming(Packet::ConnAck(_)) = events.poll().await? {
                return Ok(Self { client, events, received: VecDeque::new() });
            }
        }
    }

    /// Publishes at QoS 1 and waits for the PUBACK.
    pub(crate) async fn publish(&mut self, topic: &str, payload: impl Into<Vec<u8>>) -> Answer {
        self.send(topic, false, payload).await;
        self.answered().await
    }

    /// Publishes a retained message at QoS 1 and waits for the PUBACK.
    pub(crate) async fn publish_retained(&mut self, topic: &str, payload: impl Into<Vec<u8>>) -> Answer {
        self.send(topic, true, payload).await;
        self.answered().await
    }

    /// Publishes at QoS 1 and does not wait.
    pub(crate) async fn send(&self, topic: &str, retain: bool, payload: impl Into<Vec<u8>>) {
        self.client.publish(topic, QoS::AtLeastOnce, retain, payload.into()).await.expect("the client runs");
    }

    /// Waits for the next PUBACK.
    pub(crate) async fn answered(&mut self) -> Answer {
        let answer = self.until(|packet| match packet {
            Packet::PubAck(ack) => Some(ack.reason),
            _ => None,
        });
        answer.await
    }

    /// Whether no PUBACK comes for so long.
    pub(crate) async fn stays_unanswered_for(&mut self, wait: Duration) -> bool {
        timeout(wait, self.answered()).await.is_err()
    }

    /// Subscribes at QoS 1 and waits for the SUBACK.
    pub(crate) async fn subscribe(&mut self, filter: &str) -> SubscribeReasonCode {
        self.client.subscribe(filter, QoS::AtLeastOnce).await.expect("the client runs");
        self.until(|packet| match packet {
            Packet::SubAck(ack) => Some(ack.return_codes[0]),
            _ => None,
        })
        .await
    }

    /// Waits for the next message: topic and payload.
    pub(crate) async fn message(&mut self) -> (String, String) {
        let publish = match self.received.pop_front() {
            Some(publish) => publish,
            None => {
                self.until(|packet| match packet {
                    Packet::Publish(publish) => Some(publish.clone()),
                    _ => None,
                })
                .await
            }
        };
        (text(&publish.topic), text(&publish.payload))
    }

    /// The next message, if one comes within so long.
    pub(crate) async fn message_within(&mut self, wait: Duration) -> Option<(String, String)> {
        timeout(wait, self.message()).await.ok()
    }

    /// Says good-bye and waits until the server has closed.
    pub(crate) async fn disconnect(mut self) {
        self.client.disconnect().await.expect("the client runs");
        self.closed().await;
    }

    /// Closes the socket without a word.
    pub(crate) fn vanish(self) {
        drop(self);
    }

    /// Waits until the connection has ended, and says why.
    pub(crate) async fn closed(&mut self) -> ConnectionError {
        timeout(PATIENCE, async {
            loop {
                if let Err(error) = self.events.poll().await {
                    return error;
                }
            }
        })
        .await
        .expect("the connection ends in time")
    }

    async fn until<T>(&mut self, mut wanted: impl FnMut(&Packet) -> Option<T>) -> T {
        timeout(PATIENCE, async {
            loop {
                let event = self.events.poll().await.expect("the connection holds");
                let Event::Incoming(packet) = event else { continue };
                if let Some(found) = wanted(&packet) {
                    return found;
                }
                if let Packet::Publish(publish) = packet {
                    self.received.push_back(publish);
                }
            }
        })
        .await
        .expect("the server answers in time")
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
