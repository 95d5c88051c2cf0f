#!/bin/sh
# Start or stop the demonstration daemon in the background: demo.sh start|stop BIN
set -eu

bin=$2
home=${TMPDIR:-/tmp}/llmux-demo-$(id -u)
pidfile=$home/pid

running() {
    [ -f "$pidfile" ] && kill -0 "$(cat "$pidfile")" 2>/dev/null
}

case $1 in
start)
    if running; then
        echo "The demo runs already; stop it with: make demo-stop"
        cat "$home/banner"
        exit 0
    fi
    rm -rf "$home"
    mkdir -m 0700 "$home"
    : >"$home/banner"
    "$bin/llmuxd" --demo >"$home/banner" 2>"$home/log" </dev/null &
    echo $! >"$pidfile"
    tries=0
    while ! grep -q 'Ctrl-C' "$home/banner"; do
        tries=$((tries + 1))
        if [ $tries -gt 300 ] || ! running; then
            echo "The demo did not start:" >&2
            cat "$home/log" >&2
            exit 1
        fi
        sleep 0.1
    done
    sed '/Ctrl-C/d' "$home/banner"
    echo "It runs in the background, logging to $home/log. Stop it with: make demo-stop"
    ;;
stop)
    if ! running; then
        echo "No demo is running."
        exit 0
    fi
    pid=$(cat "$pidfile")
    kill "$pid"
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
    rm -rf "$home"
    echo "Stopped."
    ;;
esac
