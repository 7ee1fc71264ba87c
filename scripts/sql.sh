#!/usr/bin/env bash
# Checks every SQL statement of the sources against a fresh database with the schema of fleet-core/migrations.
#   scripts/sql.sh prepare   writes what was found out to .sqlx/, from which ordinary builds are checked
#   scripts/sql.sh check     wants .sqlx/ to be just that, and no lint
#
# Needs no program of this workspace, since none may compile while .sqlx/ is out of date.
set -euo pipefail
cd "$(dirname "$0")/.."
mode=${1:?expected prepare or check}

bin=$({ find /usr/lib/postgresql -mindepth 2 -maxdepth 2 -name bin 2>/dev/null || true; } | sort -V | tail -n 1)
[ -n "$bin" ] || bin=$(dirname "$(readlink -f "$(command -v postgres)")")

dir=$(mktemp -d /tmp/muster-sql-XXXXXX)
as_owner=()
if [ "$(id -u)" = 0 ]; then
    owner=postgres
    id postgres >/dev/null 2>&1 || owner=nobody
    chown "$owner" "$dir"
    as_owner=(setpriv --reuid "$owner" --regid "$(id -g "$owner")" --clear-groups --)
fi
server=
finish() {
    if [ -n "$server" ]; then
        kill -INT "$server" 2>/dev/null || true
        wait "$server" || true
    fi
    rm -rf "$dir"
}
trap finish EXIT

(cd / && "${as_owner[@]}" "$bin/initdb" -D "$dir/data" -U muster -A trust --no-sync --locale=C -E UTF8 >/dev/null)
(cd / && exec "${as_owner[@]}" "$bin/postgres" -D "$dir/data" -k "$dir" -c listen_addresses= -c fsync=off) 2>"$dir.log" &
server=$!
url="postgres://muster@${dir//\//%2F}/postgres"
for _ in $(seq 200); do
    psql -q "$url" -c 'select' >/dev/null 2>&1 && break
    kill -0 "$server" 2>/dev/null || { cat "$dir.log" >&2; exit 1; }
    sleep 0.05
done
rm -f "$dir.log"
for migration in fleet-core/migrations/*.sql; do
    psql -q -v ON_ERROR_STOP=1 "$url" -f "$migration" >/dev/null
done

# The statements are read while their crates compile, so these must compile anew.
found=$PWD/target/sqlx
rm -rf "$found"
mkdir -p "$found"
grep -rlE 'query(_as|_scalar)?!' --include='*.rs' fleet-core broker api device-sim src tests | while read -r file; do touch "$file"; done
export SQLX_OFFLINE=false DATABASE_URL=$url SQLX_OFFLINE_DIR=$found
case $mode in
prepare)
    cargo check --locked --workspace --all-targets
    rm -rf .sqlx
    cp -r "$found" .sqlx
    printf '%s statements in .sqlx/\n' "$(find .sqlx -name 'query-*.json' | wc -l)"
    ;;
check)
    cargo clippy --locked --workspace --all-targets -- -D warnings
    diff -rq .sqlx "$found" || { echo 'the statements in .sqlx/ are out of date: run make prepare' >&2; exit 1; }
    ;;
*) echo "expected prepare or check, not $mode" >&2; exit 2 ;;
esac
