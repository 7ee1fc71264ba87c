"""A device on Eclipse Paho that obeys commands: `ping`, and `blink`, which takes a while; says each step.

usage: paho_commands.py HOST PORT USERNAME PASSWORD CLIENT_ID {311|5} COUNT
Ends when so many commands are answered, each answer acknowledged.
"""

import json
import sys
import threading

from paho_opened import PATIENCE_S, client_of, opened, say


def main(host, port, username, password, client_id, version, count):
    root = f"fleet/v1/{username}/commands"
    answered, done, waiting = {}, threading.Event(), {}
    client = client_of(version, client_id)
    client.username_pw_set(username, password)

    def answer(command, **response):
        sent = client.publish(f"{root}/{command}/response", json.dumps(response), qos=1)
        if response["status"] != "in_progress":
            answered[command] = response
            waiting[sent.mid] = command

    def on_message(_client, _userdata, message):
        command = message.topic.removeprefix(f"{root}/").removesuffix("/request")
        request = json.loads(message.payload)
        if command in answered:
            answer(command, **answered[command])
            return
        say(does=request["name"], params=request["params"])
        if request["name"] == "ping":
            answer(command, status="succeeded", result={"pong": True})
        elif request["name"] == "blink":
            for nth in range(1, request["params"]["times"] + 1):
                answer(command, status="in_progress", progress=100 * nth / request["params"]["times"])
            answer(command, status="succeeded", result={"blinked": request["params"]["times"]})
        else:
            answer(command, status="rejected", error="expected ping or blink")

    def on_publish(_client, _userdata, mid, *_):
        if waiting.pop(mid, None) and not waiting and len(answered) == int(count):
            done.set()

    client.on_message, client.on_publish = on_message, on_publish
    opened(client, host, port)
    client.subscribe(f"{root}/+/request", qos=1)
    if not done.wait(PATIENCE_S):
        sys.exit(f"{len(answered)} of {count} commands were answered")
    client.disconnect()


main(*sys.argv[1:])
