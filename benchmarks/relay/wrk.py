"""Requests a second, by wrk."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.relay.contestants import BODY, Broken, wrk_program
from benchmarks.relay.engine import CHAT

SCRIPT = f"""
wrk.method = "POST"
wrk.body = [[{BODY.decode()}]]
wrk.headers["Content-Type"] = "application/json"
function done(summary, latency, requests)
    summary.errors.requests = summary.requests
    summary.errors.microseconds = summary.duration
    for name, number in pairs(summary.errors) do
        io.write(string.format("%s=%d ", name, number))
    end
end
"""
"""The request is the same one each time, so wrk builds it once."""


def requests_per_second(home: Path, port: int, connections: int, secs: int) -> float:
    """As many requests as are answered on `connections` kept connections. Raises Broken if one of them fails."""
    script = home / "wrk.lua"
    script.write_text(SCRIPT)
    argv = [wrk_program(), "--threads=1", f"--connections={connections}", f"--duration={secs}s", "--timeout=10s"]
    argv += [f"--script={script}", f"http://127.0.0.1:{port}{CHAT}"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        raise Broken(f"wrk ended with {done.returncode}: {done.stdout}{done.stderr}")
    found = {name: int(number) for name, _, number in (field.partition("=") for field in lines[-1].split())}
    answered, took = found.pop("requests"), found.pop("microseconds")
    if any(found.values()):
        raise Broken(f"wrk counted errors: {found}")
    return answered / (took / 1e6)
