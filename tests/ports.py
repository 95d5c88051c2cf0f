"""Ports for what tests start: no two get the same, whichever worker runs them."""

from __future__ import annotations

import itertools
import os
import socket

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(12_000 + 4_000 * (_WORKER % 5), 16_000 + 4_000 * (_WORKER % 5)))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody has, nor gets before it is used: it is none of those that the system gives out,
    nor of another worker's."""
    for port in _PORTS:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("the ports do not end")
