#!/bin/sh
# What the tests of the Debian package need: its tools, and a small Debian of each release to boot.
# usage: setup.sh CACHE-FOLDER RELEASE...
#
# The trees are made once and kept; a run boots throw-away copies of them.
set -eu

cache=$1
shift
[ "$(id -u)" -eq 0 ] || { echo "The tests of the package boot machines with systemd-nspawn: run them as root." >&2; exit 1; }
command -v apt-get >/dev/null || { echo "The tests of the package need apt-get, on Debian or Ubuntu." >&2; exit 1; }

missing=
for pair in systemd-nspawn:systemd-container debootstrap:debootstrap dpkg-scanpackages:dpkg-dev nsenter:util-linux \
    lintian:lintian; do
    command -v "${pair%%:*}" >/dev/null || missing="$missing ${pair#*:}"
done
if [ -n "$missing" ]; then
    echo "Installing$missing ..."
    # shellcheck disable=SC2086
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing; } \
        >/dev/null || { echo "Cannot install$missing" >&2; exit 1; }
fi

mkdir -p "$cache/deb"
# Two runs at once would make the same tree.
exec 9>"$cache/deb/lock"
flock 9
for release; do
    tree=$cache/deb/$release
    [ ! -e "$tree/.complete" ] || continue
    echo "Making a small Debian $release in $tree (once, about a minute) ..."
    rm -rf "$tree"
    if ! debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,python3,procps,curl,ca-certificates \
        "$release" "$tree" ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$cache/deb/$release.log" 2>&1; then
        tail -20 "$cache/deb/$release.log" >&2
        exit 1
    fi
    rm -f "$cache/deb/$release.log"
    : >"$tree/.complete"
done
