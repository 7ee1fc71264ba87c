"""A device that comes in by a claim with Eclipse Paho, and sends a reading with the token that it made itself.

usage: paho_provision.py HOST PORT USERNAME SECRET ID STATE_FILE {311|5}
USERNAME and SECRET are the claim's. What the device must not lose is in STATE_FILE: its token and the nonce of its request.
Started again at any moment, it goes on where it was. Prints one JSON object a line; exits with 3 when it is refused or sent away.
"""

import hashlib
import json
import os
import secrets
import sys
import threading
import time

from paho_opened import PATIENCE_S, client_of, opened, say

ASK_AGAIN_S = 1


def connect(host, port, username, password, client_id, version):
    client = client_of(version, client_id)
    client.username_pw_set(username, password)
    return opened(client, host, port)


def state(path):
    """The token and the nonce: made once, kept before anything is asked."""
    if not os.path.exists(path):
        with open(f"{path}.new", "w") as file:
            json.dump({"token": secrets.token_urlsafe(32), "nonce": secrets.token_hex(16)}, file)
        os.rename(f"{path}.new", path)
    with open(path) as file:
        return json.load(file)


def come_in(client, tenant, device, kept):
    topic = f"fleet/v1/{tenant}/_provision"
    subscribed, answered, answer = threading.Event(), threading.Event(), {}

    def on_message(_client, _userdata, message):
        answer.update(json.loads(message.payload))
        say(status=answer["status"], code=answer.get("code"))
        if answer["status"] != "pending":
            answered.set()

    def on_disconnect(_client, _userdata, _flags, reason, _properties):
        if reason.is_failure:
            say(ended=str(reason))
            answered.set()

    client.on_message = on_message
    client.on_disconnect = on_disconnect
    client.on_subscribe = lambda *_: subscribed.set()
    client.subscribe(f"{topic}/response/{device}", qos=1)
    subscribed.wait(PATIENCE_S)
    hash = hashlib.sha256(kept["token"].encode()).hexdigest()
    request = json.dumps({"id": device, "nonce": kept["nonce"], "token_sha256": hash, "serial": "SN-7"})
    until = time.monotonic() + PATIENCE_S
    while not answered.is_set() and time.monotonic() < until:
        client.publish(f"{topic}/request", request, qos=1).wait_for_publish(PATIENCE_S)
        answered.wait(ASK_AGAIN_S)
    client.disconnect()
    return answer


def main():
    host, port, username, secret, device, path, version = sys.argv[1:]
    kept = state(path)
    tenant = username.split("/")[0]
    # Its client id is the name on which it hears its answers.
    answer = come_in(connect(host, port, username, secret, device, version), tenant, device, kept)
    if answer.get("status") != "accepted":
        sys.exit(3)
    client = connect(host, port, answer["username"], kept["token"], device, version)
    sent = client.publish(f"fleet/v1/{answer['username']}/telemetry", '{"temp":-18.5}', qos=1)
    sent.wait_for_publish(PATIENCE_S)
    client.disconnect()
    say(acknowledged=sent.is_published())


main()
