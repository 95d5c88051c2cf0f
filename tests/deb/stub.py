#!/usr/bin/python3
"""A daemon of a hundred lines that does with systemd what llmuxd does, to try the units themselves.

Its engine is a `sleep` in a cgroup of its own; it answers each connection with one line. `--stop-engines` ends the
engine by the state file, and by that alone.
"""

import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

STATE = Path("/var/lib/llmux/stub")
BAD = "/etc/llmux/bad"


def notify(text):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as to:
        to.connect(os.environ["NOTIFY_SOCKET"])
        to.send(text.encode())


def cgroup():
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            path = "/sys/fs/cgroup" + line[3:]
            return path if os.path.exists(path + "/cgroup.procs") else None
    return None


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def recorded():
    try:
        pid, group = STATE.read_text().split("\n")[:2]
    except FileNotFoundError:
        return None, ""
    return int(pid), group


def stop_engines():
    pid, group = recorded()
    if pid is None:
        return
    try:
        os.kill(pid, signal.SIGTERM)
    except ProcessLookupError:
        pass
    while alive(pid):
        time.sleep(0.02)
    if group and os.path.isdir(group):
        for _ in range(100):
            try:
                os.rmdir(group)
                break
            except OSError:
                time.sleep(0.02)
    STATE.unlink()


def start_engine():
    pid, _ = recorded()
    if pid is not None and alive(pid):
        print("adopted", pid, flush=True)
        return
    engine = subprocess.Popen(
        ["sleep", "1000000"], start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    own, group = cgroup(), ""
    if own:
        group = own + "/engine-stub"
        os.makedirs(group, exist_ok=True)
        Path(group, "cgroup.procs").write_text(str(engine.pid))
    STATE.write_text(f"{engine.pid}\n{group}\n")
    print("started", engine.pid, flush=True)


class End(Exception):
    pass


def end(status, stop):
    def handler(*_):
        raise End(status, stop)

    return handler


def main():
    if "--check" in sys.argv:
        sys.exit(2 if os.path.exists(BAD) else 0)
    if "--stop-engines" in sys.argv:
        stop_engines()
        return 0
    if os.path.exists(BAD):
        print("a bad config", file=sys.stderr)
        return 2
    signal.signal(signal.SIGUSR2, end(75, False))
    signal.signal(signal.SIGTERM, end(0, True))
    signal.signal(signal.SIGHUP, lambda *_: print("reloaded", flush=True))
    assert os.environ.get("LISTEN_FDS") == "1"
    assert os.environ["LISTEN_PID"] == str(os.getpid())
    listening = socket.socket(fileno=3)
    listening.setblocking(False)
    try:
        start_engine()
        notify("READY=1\nSTATUS=stub")
        while True:
            notify("WATCHDOG=1")
            if select.select([listening], [], [], 1)[0]:
                try:
                    connection, _ = listening.accept()
                except BlockingIOError:
                    continue
                with connection:
                    connection.recv(1000)
                    connection.send(f"pid {os.getpid()}\n".encode())
    except End as ending:
        status, stop = ending.args
        notify("STOPPING=1")
        if stop:
            stop_engines()
        return status


sys.exit(main())
