"""Who is at the other end of a Unix socket, and whether that user may steer the daemon, or look at it."""

from __future__ import annotations

import asyncio
import grp
import os
import socket
import struct
from dataclasses import dataclass

_CREDENTIALS = struct.Struct("iII")
_SO_PEERGROUPS = 59
"""Linux's number, which the socket module does not name."""
_MAX_OPTION_BYTES = 1024
"""The most that `getsockopt` of Python returns."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A process as the kernel saw it when it connected."""

    pid: int
    uid: int
    groups: frozenset[int]


def peer_of(transport: asyncio.BaseTransport | None) -> Peer | None:
    """The peer of a connection; None if it is not over a Unix socket."""
    connection = None if transport is None else transport.get_extra_info("socket")
    if connection is None or connection.family != socket.AF_UNIX:
        return None
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, group = _CREDENTIALS.unpack(raw)
    try:
        more = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION_BYTES)
    except OSError:
        # Without the option, or with more groups than fit, there is the primary one.
        more = b""
    return Peer(pid, uid, frozenset((group, *(g for (g,) in struct.iter_unpack("I", more)))))


def may_look(peer: Peer, group: str) -> bool:
    """Whether the peer is in the group of those who may look, and not steer; `group` is empty if there is none."""
    try:
        return bool(group) and grp.getgrnam(group).gr_gid in peer.groups
    except KeyError:
        return False


def may_steer(peer: Peer, path: str) -> bool:
    """Whether the peer is root, the daemon's own user, or in the group of the socket file `path`.

    The file's mode says the same. This holds, too, where the mode was loosened or the file bound in elsewhere.
    """
    if peer.uid in (0, os.geteuid()):
        return True
    try:
        return os.stat(path).st_gid in peer.groups
    except OSError:
        return False
