"""The control socket itself: made, owned, and removed. What is asked over it is in `handlers`."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

SOCKET_MODE = 0o660


async def serve_control(app: web.Application, path: Path) -> Callable[[], Awaitable[None]]:
    """Listen on the Unix socket `path`; returns what ends that and removes it.

    A socket that nobody answers on any more is replaced. Raises OSError if the path is taken or not to be had.
    """
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX)
    try:
        # Made under a mask, so that there is no moment at which everybody may connect.
        before = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        path.chmod(SOCKET_MODE)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.SockSite(runner, listener).start()
    except BaseException:
        listener.close()
        raise

    async def close() -> None:
        path.unlink(missing_ok=True)
        await runner.cleanup()

    return close


def _remove_stale(path: Path) -> None:
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        else:
            raise OSError(errno.EADDRINUSE, "another daemon answers on it")
