"""Publishes readings with Eclipse Paho and says what was acknowledged; subscribes and says what came.

usage: paho_client.py HOST PORT USERNAME PASSWORD CLIENT_ID {311|5} {publish|send|subscribe|will|stay} TOPIC COUNT
With TRANSPORT=websockets it comes in at /mqtt, with TRANSPORT=tls it trusts the authority in CA_FILE, and with CERT_FILE and KEY_FILE
it shows that certificate in place of a user name. `send` publishes what comes on standard input, a payload a line, each a JSON
text. Prints one JSON object a line.
"""

import json
import os
import sys
import threading

from paho_opened import PATIENCE_S, client_of, opened, say


def connect(host, port, username, password, client_id, version, will=None):
    carrier = os.environ.get("TRANSPORT", "tcp")
    client = client_of(version, client_id, transport="websockets" if carrier == "websockets" else "tcp")
    if carrier == "tls":
        client.tls_set(os.environ["CA_FILE"], os.environ.get("CERT_FILE"), os.environ.get("KEY_FILE"))
    if "CERT_FILE" not in os.environ:
        client.username_pw_set(username, password)
    if will:
        client.will_set(will, json.dumps({"state": "lost"}), qos=1, retain=True)
    return opened(client, host, port)


def publish(client, topic, count):
    for seq in range(count):
        reading = {"ts": 1763692212000 + seq, "seq": seq, "values": {"t": seq}}
        sent = client.publish(topic, json.dumps(reading), qos=1)
        sent.wait_for_publish(PATIENCE_S)
        if sent.is_published():
            say(acknowledged=seq)
    client.disconnect()


def send(client, topic):
    for nth, line in enumerate(sys.stdin):
        sent = client.publish(topic, json.loads(line), qos=1)
        sent.wait_for_publish(PATIENCE_S)
        if sent.is_published():
            say(acknowledged=nth)
    client.disconnect()


def subscribe(client, topic, count):
    enough = threading.Event()
    left = [count]

    def on_message(_client, _userdata, message):
        say(topic=message.topic, payload=message.payload.decode(), qos=message.qos)
        left[0] -= 1
        if left[0] <= 0:
            enough.set()

    client.on_message = on_message
    client.on_subscribe = lambda _c, _u, _mid, reasons, _p: say(granted=[r.value for r in reasons])
    client.subscribe(topic, qos=1)
    if not enough.wait(PATIENCE_S):
        sys.exit("messages are missing")
    client.disconnect()


def stay(client):
    """Until it is sent away; then Paho comes again by itself, until it is told that it may not."""
    refused = threading.Event()

    def on_connect(_client, _userdata, _flags, reason, _properties):
        say(**({"refused": str(reason)} if reason.is_failure else {"back": str(reason)}))
        if reason.is_failure:
            refused.set()

    client.on_connect = on_connect
    client.on_disconnect = lambda _c, _u, _flags, reason, _p: say(ended=str(reason))
    say(connected=True)
    if not refused.wait(PATIENCE_S):
        sys.exit("nobody sent it away")
    client.on_disconnect = None
    client.loop_stop()


def main():
    host, port, username, password, client_id, version, action, topic, count = sys.argv[1:]
    client = connect(host, port, username, password, client_id, version, topic if action == "will" else None)
    if action == "publish":
        publish(client, topic, int(count))
    elif action == "send":
        send(client, topic)
    elif action == "subscribe":
        subscribe(client, topic, int(count))
    elif action == "stay":
        stay(client)
    else:
        os._exit(0)  # gone without a DISCONNECT


main()
