"""A device on Eclipse Paho that follows its shadow: asks for it, does what is desired, reports that; says each step.

usage: paho_shadow.py HOST PORT USERNAME PASSWORD CLIENT_ID {311|5} MEMBER VALUE
Ends when it has reported MEMBER (such as log.level) as VALUE.
"""

import json
import sys
import threading

from paho_opened import PATIENCE_S, client_of, opened, say


def main(host, port, username, password, client_id, version, member, value):
    root = f"fleet/v1/{username}/shadow"
    reported, done = {}, threading.Event()
    client = client_of(version, client_id)
    client.username_pw_set(username, password)

    def merge(into, patch):
        for name, new in patch.items():
            if new is None:
                into.pop(name, None)
            elif isinstance(new, dict):
                merge(into.setdefault(name, {}), new)
            else:
                into[name] = new

    def follow(wanted):
        say(does=wanted)
        client.publish(f"{root}/update", json.dumps({"state": {"reported": wanted}, "client_token": "follow"}), qos=1)

    def on_message(_client, _userdata, message):
        body, topic = json.loads(message.payload), message.topic.removeprefix(root)
        if topic == "/get/accepted" and body["state"].get("delta"):
            follow(body["state"]["delta"])
        elif topic == "/update/delta":
            follow(body["state"])
        elif topic == "/update/accepted":
            say(accepted=body["version"], token=body.get("client_token"))
            merge(reported, body["state"]["reported"])
            found = reported
            for name in member.split("."):
                found = found.get(name, {})
            if found == value:
                done.set()

    client.on_message = on_message
    client.on_subscribe = lambda *_: client.publish(f"{root}/get", "", qos=1)
    opened(client, host, port)
    client.subscribe(f"{root}/#", qos=1)
    say(connected=True)
    if not done.wait(PATIENCE_S):
        sys.exit(f"{member} is not {value}: {reported}")
    client.disconnect()


main(*sys.argv[1:])
