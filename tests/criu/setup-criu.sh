#!/bin/sh
# Make what the tests in this folder need besides those of tests/real: CRIU 4.2, from Debian sid.
#
#     setup-criu.sh [CACHE]        (default: $LLMUX_TEST_CACHE, else llmux-tests in the user's cache folder)
#
# Older ones (Debian 12's 3.17, Debian 13's 4.1) cannot save processes under new kernels. The packages are unpacked into
# CACHE/criu-REVISION, with the libraries that they were built with, and CACHE/criu-REVISION/criu runs them from there:
# nothing of the machine is changed.
set -eu

REVISION=1

cache=${1:-${LLMUX_TEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/llmux-tests}}
folder=$cache/criu-$REVISION

say() { echo "setup-criu: $*" >&2; }
fail() { say "$*"; exit 1; }

[ "$(id -u)" -eq 0 ] || fail "CRIU saves and restores processes: run its tests as root"
[ "$(uname -m)" = x86_64 ] || fail "the packages are unpacked for x86_64, and this is $(uname -m)"

if ! command -v debootstrap >/dev/null; then
    command -v apt-get >/dev/null || fail "debootstrap is missing, and there is no apt-get to install it with"
    say "installing debootstrap"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap; } \
        >/dev/null || fail "cannot install debootstrap"
fi

mkdir -p "$cache"
exec 9>"$cache/.lock-criu"
flock 9
if [ ! -e "$folder/.finished" ]; then
    say "downloading CRIU of Debian sid into $folder (about 60 MB)"
    rm -rf "$folder"
    mkdir -p "$folder"
    debootstrap --download-only --variant=minbase --include=criu sid "$folder/packages" \
        ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$folder/debootstrap.log" 2>&1 || {
        tail -20 "$folder/debootstrap.log" >&2
        fail "the packages cannot be downloaded"
    }
    for package in "$folder"/packages/var/cache/apt/archives/*.deb; do
        case ${package##*/} in
        criu_* | lib* | zlib1g_*) dpkg-deb -x "$package" "$folder/root" ;;
        esac
    done
    rm -rf "$folder/packages"
    libraries=$folder/root/usr/lib/x86_64-linux-gnu
    cat >"$folder/criu" <<EOF
#!/bin/sh
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$folder/root/usr/sbin/criu" "\$@"
EOF
    chmod +x "$folder/criu"
    : >"$folder/.finished"
fi
"$folder/criu" check >"$folder/check.log" 2>&1 || { cat "$folder/check.log" >&2; fail "this kernel and CRIU do not agree"; }
say "ready: $folder/criu, $("$folder/criu" --version | head -1)"
