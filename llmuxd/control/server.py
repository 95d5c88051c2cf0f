"""The control socket itself: made, owned, and removed. What is asked over it is in `handlers`."""

from __future__ import annotations

import errno
import grp
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from llmuxd.protocol import CONTROL_GROUP

SOCKET_MODE = 0o660
SOCKET_MODE_WITH_READERS = 0o666
PROBE_SECS = 1.0


async def serve_control(
    app: web.Application, path: Path, group: str = CONTROL_GROUP, *, readers: bool = False
) -> Callable[[], Awaitable[None]]:
    """Listen on the Unix socket `path`; returns what ends that and removes it.

    Run by root, the socket is given to `group` if there is such a group. With `readers`, who may only look is let in,
    too: everybody can connect, and the application asks each who they are. A socket that nobody answers on any more
    is replaced. Raises OSError if the path is taken or not to be had.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX)
    runner = web.AppRunner(app, access_log=None)
    made: os.stat_result | None = None
    try:
        # Made under a mask, so that there is no moment at which everybody may connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        made = path.stat()
        _give_to(group, path)
        path.chmod(SOCKET_MODE_WITH_READERS if readers else SOCKET_MODE)
        await runner.setup()
        await web.SockSite(runner, listener).start()
    except BaseException:
        await runner.cleanup()
        listener.close()
        if made is not None:
            _remove(path, made)
        raise

    async def close() -> None:
        _remove(path, made)
        await runner.cleanup()

    return close


def _give_to(group: str, path: Path) -> None:
    if os.geteuid() != 0:
        return
    try:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    except KeyError:
        # No such group: root alone steers.
        return


def _remove(path: Path, made: os.stat_result) -> None:
    """Remove the socket, unless somebody has put another one in its place."""
    try:
        if os.path.samestat(path.stat(), made):
            path.unlink()
    except FileNotFoundError:
        pass


def _remove_stale(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(PROBE_SECS)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except (TimeoutError, BlockingIOError):
            # Its backlog is full: somebody has it, however busy.
            raise OSError(errno.EADDRINUSE, "another daemon has it, and does not answer") from None
        else:
            raise OSError(errno.EADDRINUSE, "another daemon answers on it")
