#!/usr/bin/env bash
# Installs what is missing, or says in one sentence what is.
#   scripts/setup.sh demo   what `make demo` needs
#   scripts/setup.sh test   that, and what `make test` and `make check` need
set -euo pipefail
cd "$(dirname "$0")/.."
what=${1:-test}

say() { printf 'setup: %s\n' "$*" >&2; }
fail() { say "$*"; exit 1; }
trap 'fail "scripts/setup.sh stopped at line $LINENO"' ERR
have() { command -v "$1" >/dev/null 2>&1; }
# at_least 14 15.18: whether the second version is the first or newer
at_least() { [ "$(printf '%s\n%s\n' "$1" "$2" | sort -V | head -n 1)" = "$1" ]; }

newest_postgres() {
    local bin
    bin=$({ find /usr/lib/postgresql -mindepth 2 -maxdepth 2 -name bin 2>/dev/null || true; } | sort -V | tail -n 1)
    [ -x "$bin/initdb" ] && echo "$bin/postgres" || command -v postgres
}

# Debian packages whose programs are missing.
missing_packages() {
    newest_postgres >/dev/null || echo postgresql
    have cc || echo gcc libc6-dev
    have setpriv || echo util-linux
    [ "$what" = demo ] && return
    have psql || echo postgresql-client
    have mosquitto || echo mosquitto
    have mosquitto_pub || echo mosquitto-clients
    have node && have npm || echo nodejs npm
    have g++ || echo g++
    have python3 || echo python3
    python3 -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
}

# apt must not start what it installs: a mosquitto on port 1883 would be in the way.
install_packages() {
    local policy=/usr/sbin/policy-rc.d
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq || fail "apt-get update failed: is there a network?"
    apt-get install -qq -y --no-install-recommends "$@" || fail "apt-get could not install: $*"
    case " $* " in *" mosquitto "*) if have systemctl; then systemctl disable --quiet mosquitto || true; fi ;; esac
}

check_rust() {
    local wanted found
    wanted=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)
    have cargo || fail "Rust $wanted or newer is needed: install it from https://rustup.rs"
    found=$(rustc --version | cut -d' ' -f2)
    at_least "$wanted" "$found" || fail "Rust $wanted or newer is needed, found $found: run rustup update"
}

check_versions() {
    local found
    found=$("$(newest_postgres)" --version | sed 's/[^0-9]*\([0-9.]*\).*/\1/')
    at_least 14 "$found" || fail "PostgreSQL 14 or newer is needed, found $found"
    [ "$what" = demo ] && return
    found=$(node --version | tr -d v)
    at_least 18 "$found" || fail "node 18 or newer is needed, found $found"
    found=$({ mosquitto -h || true; } | sed -n 's/^mosquitto version //p')
    at_least 2.0 "$found" || fail "mosquitto 2.0 or newer is needed, found $found"
}

# What the Python clients of the journeys need (OpenTelemetry's exporter among them), and an OpenID provider (which takes Authlib before 2.0), in an environment of its own.
install_python() {
    local wanted="paho-mqtt==2.2.0 cryptography==50.0.2 oidc-provider-mock==0.3.4 Authlib==1.9.9"
    wanted+=" opentelemetry-sdk==1.45.2 opentelemetry-exporter-otlp-proto-http==1.45.2"
    local venv=target/venv
    if [ "$(cat "$venv/.installed" 2>/dev/null)" != "$wanted" ] || ! "$venv/bin/python" -c 'import paho.mqtt, cryptography' 2>/dev/null; then
        say "installing $wanted into $venv"
        python3 -m venv "$venv"
        # shellcheck disable=SC2086  # several words
        "$venv/bin/python" -m pip install --quiet $wanted || fail "pip could not install $wanted"
        printf '%s' "$wanted" >"$venv/.installed"
    fi
}

# The JavaScript clients of the journeys: exactly what their locks say.
install_npm() {
    local name=$1 dir=$2
    if ! cmp -s "$dir/package-lock.json" "$dir/node_modules/.installed"; then
        say "installing $name into $dir/node_modules"
        npm ci --prefix "$dir" --silent --no-audit --no-fund --ignore-scripts || fail "npm ci in $dir failed"
        cp "$dir/package-lock.json" "$dir/node_modules/.installed"
    fi
}

check_rust
read -r -a missing <<<"$(missing_packages | tr '\n' ' ')"
if [ ${#missing[@]} -gt 0 ]; then
    if [ "$(id -u)" = 0 ] && have apt-get; then
        say "installing ${missing[*]}"
        install_packages "${missing[@]}"
    else
        fail "programs are missing; on Debian: sudo apt-get install ${missing[*]}"
    fi
fi
check_versions
if [ "$what" = test ]; then
    have cargo-nextest || fail "cargo-nextest is missing: run cargo install cargo-nextest --locked"
    install_python
    install_npm MQTT.js tests/clients
    install_npm Node-RED tests/clients/node-red
fi
