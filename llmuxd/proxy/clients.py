"""Noticing at once that a client has gone, and serving so that it can be noticed.

aiohttp tells a handler of a lost connection only when it writes, and a request that waits for its model writes
nothing. So the server made here passes each connection's events on to aiohttp, and its loss to whoever asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from aiohttp import web

POLL_SECS = 0.5
"""How often a connection is looked at where another server than ours serves the application."""

BACKLOG = 1024


class _Connection(asyncio.Protocol):
    """One client's connection: everything goes to aiohttp's protocol, and its end to the registry as well."""

    def __init__(self, inner: asyncio.Protocol, watched: dict[object, list[Callable[[], None]]]) -> None:
        self._inner = inner
        self._watched = watched
        self.data_received = inner.data_received  # type: ignore[method-assign]
        self.eof_received = inner.eof_received  # type: ignore[method-assign]
        self.pause_writing = inner.pause_writing  # type: ignore[method-assign]
        self.resume_writing = inner.resume_writing  # type: ignore[method-assign]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._watched[self._inner] = []
        self._inner.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        waiting = self._watched.pop(self._inner)
        self._inner.connection_lost(exc)
        for notify in waiting:
            notify()


class Clients:
    """Who wants to know of which connection's end."""

    def __init__(self) -> None:
        self._watched: dict[object, list[Callable[[], None]]] = {}

    def wrap(self, server: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A protocol factory for `loop.create_server`."""
        return lambda: _Connection(server(), self._watched)

    def watch(self, request: web.BaseRequest, notify: Callable[[], None]) -> Callable[[], None]:
        """Have `notify` called once if the client of `request` goes away; returns what ends that."""
        waiting = self._watched.get(request.protocol)
        if waiting is not None:
            waiting.append(notify)
            return lambda: waiting.remove(notify) if notify in waiting else None
        poll = asyncio.ensure_future(_poll(request, notify))

        def stop() -> None:
            poll.cancel()

        return stop


async def _poll(request: web.BaseRequest, notify: Callable[[], None]) -> None:
    transport = request.transport
    # There is no event to wait for: that is why this polls.
    while transport is not None and not transport.is_closing():  # noqa: ASYNC110
        await asyncio.sleep(POLL_SECS)
    notify()


@dataclass(frozen=True)
class Site:
    """A listening proxy."""

    port: int
    """The port it listens on, also where any free one was asked for."""
    _server: asyncio.AbstractServer
    _runner: web.AppRunner

    async def close(self) -> None:
        """Stop listening and end every connection."""
        self._server.close()
        await self._runner.cleanup()


CLIENTS: web.AppKey[Clients] | str = web.AppKey("clients", Clients) if hasattr(web, "AppKey") else "clients"


async def serve_proxy(app: web.Application, host: str, port: int) -> Site:
    """Serve what `build_proxy` made on `host`:`port` (0: any free one). Raises OSError if that is not to be had."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    assert runner.server is not None
    factory = app[CLIENTS].wrap(runner.server)
    try:
        server = await asyncio.get_running_loop().create_server(factory, host, port, backlog=BACKLOG)
    except BaseException:
        await runner.cleanup()
        raise
    return Site(server.sockets[0].getsockname()[1], server, runner)
