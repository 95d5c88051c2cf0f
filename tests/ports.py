"""Ports for what tests start: no two get the same, whichever worker runs them."""

from __future__ import annotations

import itertools
import os
import socket

_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_COUNT = 4_000
_FIRST = 12_000 + _COUNT * (_WORKER % 5)
# Two runs at once would take the same ones between asking for them and using them, if both began with the first.
_BEGIN = os.getpid() * 61 % _COUNT
_PORTS = (_FIRST + (_BEGIN + number) % _COUNT for number in itertools.count())


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
