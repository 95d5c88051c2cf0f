"""The TCP sockets of the daemon: those that systemd holds for it, and those that it binds itself.

They are had before anything else happens, and listened on when there is something to serve: a warm-up takes minutes,
and nobody else may get the port meanwhile. What is served on them is not here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

_EVERYWHERE = ("0.0.0.0", "::")

FIRST_FD = 3
"""Where systemd's sockets begin (sd_listen_fds(3))."""


class CannotListen(Exception):
    """An address is not to be had; the message says why."""


def inherited(environ: Mapping[str, str]) -> list[socket.socket]:
    """The TCP sockets that systemd passed to this process; none if it passed none.

    They listen already, and go on to after this process: what connects in between waits. Other sockets than TCP are
    closed.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()) or not environ.get("LISTEN_FDS", "").isdecimal():
        return []
    found = []
    for number in range(FIRST_FD, FIRST_FD + int(environ["LISTEN_FDS"])):
        os.set_inheritable(number, False)
        one = socket.socket(fileno=number)
        if one.type is socket.SOCK_STREAM and one.family in (socket.AF_INET, socket.AF_INET6):
            one.setblocking(False)
            found.append(one)
        else:
            one.close()
    return found


def bind(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of `host`, bound to `port` and not listening; with port 0 all get the same free one.

    Raises CannotListen.
    """
    with ExitStack() as made:
        sockets: list[socket.socket] = []
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, number, _, address in dict.fromkeys(found):
                one = made.enter_context(socket.socket(family, kind, number))
                # The connections of an earlier daemon that are still closing are no reason not to have the port.
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                free = port or (port_of(sockets) if sockets else 0)
                one.bind((address[0], free, *address[2:]))
                one.setblocking(False)
                sockets.append(one)
        except OSError as error:
            raise CannotListen(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
        made.pop_all()
        return sockets


def port_of(sockets: Sequence[socket.socket]) -> int:
    """The port that they share."""
    return int(sockets[0].getsockname()[1])


def is_for(one: socket.socket, host: str, port: int) -> bool:
    """Whether who connects to that address comes to the socket."""
    address, has_port = one.getsockname()[:2]
    try:
        wanted = {info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except OSError:
        return False
    return bool(has_port == port and (address in wanted or address in _EVERYWHERE))
