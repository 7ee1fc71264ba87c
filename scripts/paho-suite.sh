#!/usr/bin/env bash
# Runs the Eclipse Paho interoperability suite against Muster and against mosquitto, and prints what each test said.
#   scripts/paho-suite.sh DIR [TEST ...]   DIR holds client_test.py and client_test5.py (eclipse/paho.mqtt.testing,
#                                          interoperability/); TEST picks tests by name
#
# The suite is not changed but for its address and credentials, in a copy: it knows neither. Muster runs on a data
# directory of its own, with a platform role that allows `#` and denies `test/nosubscribe`; mosquitto with the same rules.
# (`#` does not match `$TopicA/B`, which one test publishes: a rule of its own allows that.)
# Both are asked for a keep alive of 60 s at most, which one test wants. MUSTER names another program than the one built.
#
# A test that fails is run again, up to RUNS times (3), and the table says so: some tests race. test_request_response
# publishes on one connection without waiting for the SUBACK of the other.
set -euo pipefail
suite=$(cd "${1:?the directory of the suite}" && pwd)
shift
only=("$@")
cd "$(dirname "$0")/.."
[ -f "$suite/client_test5.py" ] || { echo "paho-suite: no client_test5.py in $suite" >&2; exit 2; }

target=${CARGO_TARGET_DIR:-target}
for muster in "${MUSTER:-}" "$target/release/muster" "$target/debug/muster"; do
    [ -x "$muster" ] && break
done
[ -x "$muster" ] || { echo "paho-suite: no muster: run make build" >&2; exit 2; }
LIMIT_S=${LIMIT_S:-60}
RUNS=${RUNS:-3}

dir=$(mktemp -d /tmp/muster-paho-XXXXXX)
chmod 755 "$dir"
servers=()
finish() {
    for pid in "${servers[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${servers[@]}"; do wait "$pid" 2>/dev/null || true; done
    rm -rf "$dir"
}
trap finish EXIT

# ---- the suite, told where to go and as whom ----

cp -r "$suite" "$dir/suite"
sed -i -E 's/^( *)port = 1883$/\1import os; port = int(os.environ["SUITE_PORT"])/; s/host = "localhost"/host = "127.0.0.1"/' \
    "$dir/suite/client_test.py" "$dir/suite/client_test5.py"
sed -i -E '0,/^import /s//import os\nimport /
    s/username=None, password=None/username=os.environ.get("SUITE_USERNAME"), password=os.environb.get(b"SUITE_PASSWORD")/' \
    "$dir"/suite/mqtt/clients/V311/main.py "$dir"/suite/mqtt/clients/V5/main.py
grep -q SUITE_PORT "$dir/suite/client_test.py" && grep -q SUITE_PORT "$dir/suite/client_test5.py" &&
    grep -q SUITE_PASSWORD "$dir/suite/mqtt/clients/V311/main.py" && grep -q SUITE_PASSWORD "$dir/suite/mqtt/clients/V5/main.py" ||
    { echo "paho-suite: this suite is not the one that is known" >&2; exit 2; }

# ---- the servers ----

# Waits until a file has a line that matches.
line_of() {
    for _ in $(seq 600); do
        grep -m 1 "$1" "$2" 2>/dev/null && return
        sleep 0.1
    done
    echo "paho-suite: no \"$1\" within a minute" >&2
    cat "$2" >&2
    return 1
}

start_muster() {
    env -i PATH="$PATH" MUSTER__DATA_DIR="$dir/data" MUSTER__HTTP__LISTEN=127.0.0.1:0 MUSTER__MQTT__LISTEN=127.0.0.1:0 \
        MUSTER__MQTT__MAX_KEEP_ALIVE_S=60 MUSTER_ADMIN_EMAIL=admin@example.com MUSTER_ADMIN_PASSWORD="correct horse battery" \
        "$muster" serve >"$dir/muster.log" 2>"$dir/muster.err" &
    servers+=($!)
    local ready
    ready=$(line_of '^ready: ' "$dir/muster.log")
    http=$(sed -E 's/.*(http:[^ ]+).*/\1/' <<<"$ready")
    muster_port=$(sed -E 's/.*mqtt:\/\/[^ ]*:([0-9]+).*/\1/' <<<"$ready")
}

# post PATH TOKEN BODY FIELD: calls the API, gives one field of its answer.
post() {
    local answer
    answer=$(curl -sS -X POST "$http$1" -H "authorization: Bearer $2" -H 'content-type: application/json' -d "$3")
    python3 -c 'import json, sys; print(json.loads(sys.argv[1])[sys.argv[2]])' "$answer" "$4" ||
        { echo "paho-suite: $1 answered $answer" >&2; return 1; }
}

let_everything_but_nosubscribe() {
    local token
    token=$(post /api/v1/auth/login none '{"email":"admin@example.com","password":"correct horse battery"}' access_token)
    post /api/v1/roles "$token" '{"id":"every-topic","platform":true,"topic_rules":[
        {"effect":"allow","action":"all","filter":"#"},
        {"effect":"allow","action":"publish","filter":"$TopicA/B"},
        {"effect":"deny","action":"subscribe","filter":"test/nosubscribe"}]}' id >/dev/null
    muster_password=$(post /api/v1/api-keys "$token" '{"name":"interoperability","role":"every-topic"}' secret)
}

start_mosquitto() {
    local plugin
    plugin=$(find /usr/lib -name mosquitto_dynamic_security.so | head -n 1)
    cat >"$dir/rules.json" <<'JSON'
{"defaultACLAccess":{"publishClientSend":true,"publishClientReceive":true,"subscribe":true,"unsubscribe":true},
 "anonymousGroup":"everybody","groups":[{"groupname":"everybody","roles":[{"rolename":"everybody"}]}],
 "roles":[{"rolename":"everybody","acls":[
  {"acltype":"subscribeLiteral","topic":"test/nosubscribe","priority":1,"allow":false}]}]}
JSON
    mosquitto_port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    printf '%s\n' "listener $mosquitto_port 127.0.0.1" "allow_anonymous true" "max_keepalive 60" "plugin $plugin" \
        "plugin_opt_config_file $dir/rules.json" >"$dir/mosquitto.conf"
    chmod 644 "$dir"/mosquitto.conf "$dir"/rules.json
    mosquitto -c "$dir/mosquitto.conf" >"$dir/mosquitto.log" 2>&1 &
    servers+=($!)
    line_of running "$dir/mosquitto.log" >/dev/null
}

# ---- the tests, a process each ----

tests() {
    local file name
    for file in client_test client_test5; do
        for name in $(grep -oE '^    def test\w*' "$suite/$file.py" | awk '{ print $2 }'); do
            if [ ${#only[@]} = 0 ] || [[ " ${only[*]} " == *" $name "* ]]; then echo "$file $name"; fi
        done
    done
}

# verdict FILE STATUS: what a run came to. Where MQTT 5 refuses a subscription by the exact 0x87, the suite knows 0x80 only.
verdict() {
    if [ "$2" = 0 ]; then echo pass
    elif [ "$2" = 124 ]; then echo "no end after $LIMIT_S s"
    elif grep -q 'return code in QoS must be 0, 1, 2 or 0x80' "$1"; then echo "0x87, not 0x80"
    else echo FAIL; fi
}

# run NAME PORT FILE TEST: one run of one test.
run() {
    local status=0
    (cd "$dir/suite" && SUITE_PORT=$2 timeout "$LIMIT_S" python3 "$3.py" "Test.$4") >"$dir/$1.out" 2>&1 || status=$?
    [ "$status" = 0 ] || { echo "---- $1, $3, $4"; tail -n 25 "$dir/$1.out"; } >>"$dir/$1.failures"
    verdict "$dir/$1.out" "$status"
}

# run_all NAME PORT: every test, to NAME.results; what a failing one said goes to standard error.
run_all() {
    local file name count said
    while read -r file name; do
        for ((count = 1; count <= RUNS; count++)); do
            said=$(run "$1" "$2" "$file" "$name")
            [ "$said" = FAIL ] || break
        done
        if [ "$said" = pass ] && [ "$count" -gt 1 ]; then said="pass (run $count)"; fi
        printf '%s\t%s\t%s\n' "$file" "$name" "$said" >>"$dir/$1.results"
    done < <(tests)
}

start_muster
let_everything_but_nosubscribe
start_mosquitto
SUITE_USERNAME=interoperability SUITE_PASSWORD=$muster_password run_all muster "$muster_port" &
lane=$!
run_all mosquitto "$mosquitto_port"
wait "$lane"
cat "$dir"/*.failures >&2 2>/dev/null || true

version=$({ mosquitto -h || true; } | sed -n 's/^mosquitto version //p')
echo "| suite | test | Muster | mosquitto $version |"
echo "|---|---|---|---|"
paste "$dir/muster.results" "$dir/mosquitto.results" | awk -F '\t' '
    { version = $1 == "client_test5" ? "5" : "3.1.1"
      print "| " version " | `" $2 "` | " $3 " | " $6 " |"
      all[version]++; muster[version] += $3 ~ /^pass/; other[version] += $6 ~ /^pass/ }
    END { split("3.1.1 5", order, " ")
      for (n = 1; n <= 2; n++) if ((version = order[n]) in all)
          print "| " version " | passed | " muster[version]+0 " of " all[version] " | " other[version]+0 " of " all[version] " |" }'
