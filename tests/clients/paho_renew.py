"""A device that renews its certificate over MQTT with Eclipse Paho, and comes in by the new one.

usage: paho_renew.py HOST PORT CA_FILE CERT_FILE KEY_FILE {tenant}/{device} {311|5}
Makes a new key beside the old one, asks, comes in by the new certificate, and once that was used by the old one again, which is good
until its overlap ends. Then puts the new files in the place of the old ones. Prints one JSON object a line.
"""

import json
import os
import sys
import threading

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from paho_opened import PATIENCE_S, client_of, opened, say


def connect(host, port, ca, certificate, key, version, client_id="renewing"):
    client = client_of(version, client_id)
    client.tls_set(ca_certs=ca, certfile=certificate, keyfile=key)
    return opened(client, host, port)


def signing_request(file):
    """A new key in a file, and a request for it. What is in the subject does not matter."""
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(pem)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "any")])
    request = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return request.public_bytes(serialization.Encoding.PEM).decode()


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


def check(certificate, key, authority):
    """What a careful device looks at before it relies on what it was sent."""
    own = x509.load_pem_x509_certificate(certificate.encode())
    own.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
    with open(key, "rb") as file:
        mine = serialization.load_pem_private_key(file.read(), None).public_key()
    if own.public_key() != mine:
        sys.exit("it is for another key")
    return f"{own.serial_number:040x}"


def use(client, topic, value):
    sent = client.publish(topic, json.dumps({"ts": 1763692212000 + value, "values": {"t": value}}), qos=1)
    sent.wait_for_publish(PATIENCE_S)
    return sent.is_published()


def until_refused(client):
    """It is sent away; Paho comes again by itself, and is told that it may not."""
    said, refused = {}, threading.Event()

    def on_connect(_client, _userdata, _flags, reason, _properties):
        if reason.is_failure:
            said["old_refused"] = str(reason)
            refused.set()

    client.on_connect = on_connect
    client.on_disconnect = lambda _c, _u, _f, reason, _p: said.setdefault("old_ended", str(reason))
    if not refused.wait(PATIENCE_S):
        sys.exit("the old one does not end")
    client.loop_stop()
    return said


def main():
    host, port, ca, certificate, key, device, version = sys.argv[1:]
    base = f"fleet/v1/{device}"
    answer = renew(connect(host, port, ca, certificate, key, version), base, f"{key}.new")
    if answer["said"] == "rejected":
        say(rejected=answer["code"])
        return
    serial = check(answer["certificate"], f"{key}.new", answer["chain"])
    with open(f"{certificate}.new", "w") as file:
        file.write(answer["certificate"])
    new = connect(host, port, ca, f"{certificate}.new", f"{key}.new", version)
    acknowledged = use(new, f"{base}/telemetry", 1)
    say(renewed=answer["not_after"], again=answer["renew_after"], serial=serial, acknowledged=acknowledged)
    old = connect(host, port, ca, certificate, key, version, "old")
    say(old_acknowledged=use(old, f"{base}/telemetry", 2))
    if os.environ.get("UNTIL_THE_OLD_ENDS"):
        say(**until_refused(old), new_acknowledged=use(new, f"{base}/telemetry", 3))
    old.disconnect()
    new.disconnect()
    # Only now the old one is not needed any more.
    os.replace(f"{key}.new", key)
    os.replace(f"{certificate}.new", certificate)


main()
