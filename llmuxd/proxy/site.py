"""Where the proxy listens, and how it stops listening without losing anybody."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Sequence

from aiohttp import web

from llmuxd.proxy.handler import PROXY, Proxy
from llmuxd.tasks import poll

BACKLOG = 1024
CLOSE_GRACE_SECS = 1.0
"""How long `Site.close` lets answers that are complete be written out."""

SETTLE_SECS = 0.5
"""How long a client that has connected may take to ask, when no more are let in."""
_SETTLE_POLL_SECS = 0.01


class Site:
    """A listening proxy."""

    def __init__(self, runner: web.AppRunner, proxy: Proxy) -> None:
        self._runner = runner
        self._proxy = proxy
        self._listeners: list[asyncio.Server] = []
        self.port = 0

    async def listen(self, host: str, port: int, sockets: Sequence[socket.socket]) -> None:
        """Raises OSError if the port is not to be had."""
        loop = asyncio.get_running_loop()
        connect = self._proxy.connect
        for one in sockets:
            # uvloop would log that it cannot, and go on.
            one.listen(BACKLOG)
            self._listeners.append(await loop.create_server(connect, sock=one, backlog=BACKLOG))
        if not sockets:
            self._listeners.append(await loop.create_server(connect, host, port, backlog=BACKLOG))
        self.port = self._listeners[0].sockets[0].getsockname()[1]

    def stop_listening(self) -> None:
        """Take no new connections, and no new requests on those that there are."""
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            for one in listener.sockets:
                # uvloop has no readers there, and accepts to the end.
                with contextlib.suppress(RuntimeError):
                    loop.remove_reader(one)
            # Not at once: asyncio drops what it has accepted a moment ago if the listener is closed by then.
            loop.call_later(_SETTLE_POLL_SECS, listener.close)
        self._proxy.end_connections()

    async def settle(self) -> None:
        """Give those who have connected and not asked anything yet a moment to do so."""
        loop = asyncio.get_running_loop()
        until = loop.time() + SETTLE_SECS

        async def settled() -> bool:
            return loop.time() > until or all(connection.used for connection in self._proxy.connections)

        # What was accepted a moment ago becomes a connection in the loop's next turns.
        await asyncio.sleep(2 * _SETTLE_POLL_SECS)
        await poll(settled, _SETTLE_POLL_SECS)

    async def close(self) -> None:
        """Stop listening, let complete answers be written out for a moment, and close every connection."""
        self.stop_listening()
        loop = asyncio.get_running_loop()
        until = loop.time() + CLOSE_GRACE_SECS

        async def gone() -> bool:
            if loop.time() > until:
                for connection in list(self._proxy.connections):
                    connection.abort()
            return not self._proxy.connections

        await poll(gone, _SETTLE_POLL_SECS)
        await self._runner.cleanup()
        for listener in self._listeners:
            listener.close()


async def serve_proxy(
    app: web.Application, host: str = "127.0.0.1", port: int = 0, *, sockets: Sequence[socket.socket] = ()
) -> Site:
    """Serve the proxy's application on a TCP port (0: any free one), or on `sockets` that are bound already.

    Raises OSError if the port is not to be had.
    """
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = Site(runner, app[PROXY])
    try:
        await site.listen(host, port, sockets)
    except BaseException:
        site.stop_listening()
        await runner.cleanup()
        raise
    return site
