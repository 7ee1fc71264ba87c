"""A device that renews its certificate over MQTT with Eclipse Paho, and comes in by the new one.

usage: paho_renew.py HOST PORT CA_FILE CERT_FILE KEY_FILE {tenant}/{device} {311|5}
Makes a new key with openssl beside the old one, asks, puts the new certificate in the place of the old one once it has been
used. Prints one JSON object a line.
"""

import json
import subprocess
import sys
import threading

import paho.mqtt.client as mqtt

PATIENCE_S = 20


def say(**fact):
    print(json.dumps(fact), flush=True)


def connect(host, port, ca, certificate, key, version):
    protocol = mqtt.MQTTv5 if version == "5" else mqtt.MQTTv311
    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="renewing", protocol=protocol)
    client.tls_set(ca_certs=ca, certfile=certificate, keyfile=key)
    connected = threading.Event()
    refused = []

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


def signing_request(key):
    """A new key in a file, and a request for it. What is in the subject does not matter."""
    made = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", key, "-subj", "/CN=any"]
    return subprocess.run(["openssl", "req", "-new", *made], check=True, capture_output=True, text=True).stdout


def renew(client, base, key):
    topic = f"{base}/certificates/renew"
    subscribed, answered, answer = threading.Event(), threading.Event(), {}

    def on_message(_client, _userdata, message):
        answer.update(json.loads(message.payload), said=message.topic.rsplit("/", 1)[1])
        answered.set()

    client.on_message = on_message
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribe(f"{topic}/+", qos=1)
    subscribed.wait(PATIENCE_S)
    client.publish(topic, json.dumps({"csr": signing_request(key)}), qos=1).wait_for_publish(PATIENCE_S)
    if not answered.wait(PATIENCE_S):
        sys.exit("no answer")
    client.disconnect()
    return answer


def main():
    host, port, ca, certificate, key, device, version = sys.argv[1:]
    base = f"fleet/v1/{device}"
    answer = renew(connect(host, port, ca, certificate, key, version), base, f"{key}.new")
    if answer["said"] == "rejected":
        say(rejected=answer["code"])
        return
    with open(f"{certificate}.new", "w") as file:
        file.write(answer["certificate"])
    client = connect(host, port, ca, f"{certificate}.new", f"{key}.new", version)
    sent = client.publish(f"{base}/telemetry", json.dumps({"ts": 1763692212000, "values": {"t": 1}}), qos=1)
    sent.wait_for_publish(PATIENCE_S)
    client.disconnect()
    # Only now the old one is not needed any more.
    subprocess.run(["mv", f"{key}.new", key], check=True)
    subprocess.run(["mv", f"{certificate}.new", certificate], check=True)
    say(renewed=answer["not_after"], again=answer["renew_after"], acknowledged=sent.is_published())


main()
