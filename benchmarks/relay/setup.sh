#!/bin/sh
# What `make bench-relay` needs: nginx and wrk from Debian, and a venv with llmuxd, uvloop and Caddy.
# usage: setup.sh CACHE-FOLDER
#
# The venv is its own, so that the tests go on without uvloop. Leaves CACHE-FOLDER/bench.
set -eu

venv=$1/bench
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/../.." && pwd)
PATH=$PATH:/usr/sbin

say() { echo "bench-relay: $*" >&2; }

missing=
for program in nginx wrk; do
    command -v $program >/dev/null || missing="$missing $program"
done
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "missing:$missing; install it first: apt-get install$missing"
        exit 1
    fi
    say "installing$missing"
    # shellcheck disable=SC2086
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >/dev/null || { say "cannot install$missing"; exit 1; }
    # Only the program is wanted, no web server on port 80.
    case $missing in
    *nginx*) [ ! -d /run/systemd/system ] || systemctl disable --quiet --now nginx ;;
    esac
fi

mkdir -p "$1"
# Two runs at once would make the same venv.
exec 9>"$1/bench.lock"
flock 9
[ -x "$venv/bin/pip" ] || "$python" -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check -e "$root[bench]"
