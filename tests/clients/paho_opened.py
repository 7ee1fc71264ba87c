"""What the clients on Eclipse Paho share: a line of JSON for each fact, and a connection that was answered."""

import json
import sys
import threading

import paho.mqtt.client as mqtt

PATIENCE_S = 20


def say(**fact):
    print(json.dumps(fact), flush=True)


def client_of(version, client_id, **how):
    """A client that is not connected yet; `version` is 311 or 5."""
    protocol = mqtt.MQTTv5 if version == "5" else mqtt.MQTTv311
    return mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id=client_id, protocol=protocol, **how)


def opened(client, host, port):
    """The client, once the server has let it in; exits with 3 when it does not."""
    connected, refused = threading.Event(), []

    def on_connect(_client, _userdata, _flags, reason, _properties):
        if reason.is_failure:
            refused.append(str(reason))
        connected.set()

    client.on_connect = on_connect
    client.connect(host, int(port), keepalive=30)
    client.loop_start()
    if not connected.wait(PATIENCE_S):
        sys.exit("no CONNACK")
    if refused:
        say(refused=refused[0])
        sys.exit(3)
    return client
