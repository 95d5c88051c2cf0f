"""The listening side: connections that tell at once when their client has gone, and the site that serves them."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from llmuxd.proxy.errors import Rejected, error_response, internal_error
from llmuxd.proxy.headers import REQUEST_ID, SERVER_TIMING, request_id, server_timing
from llmuxd.tasks import poll

BACKLOG = 1024
KEEPALIVE_SECS = 75.0
CLOSE_GRACE_SECS = 1.0
"""How long `Site.close` lets answers that are complete be written out."""

BREAK_OFF_SECS = 5.0
"""How long a client may take to read what was sent before its answer broke off."""

SETTLE_SECS = 0.5
"""How long a client that has connected may take to ask, when no more are let in."""
_SETTLE_POLL_SECS = 0.01

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class ClientConnection(web.RequestHandler):
    """One client's connection. When it is lost, or half closed, the request that is being served is cancelled."""

    __slots__ = ("_lost", "_serving", "ending", "used")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._serving: asyncio.Task[Any] | None = None
        self._lost = False
        self.ending = False
        """There is no further request on it: its client is told so with the answer."""
        self.used = False
        """A request has come over it."""

    def end(self) -> None:
        """Close it when the request that is being served is answered, or the first one, if none has come yet."""
        self.ending = True
        if self.used:
            self.close()

    def serves(self, task: asyncio.Task[Any] | None) -> None:
        """Cancel this task when the client goes away, or has gone; None: there is nothing to cancel any more."""
        self.used = True
        self._serving = task
        if self._lost:
            self._cancel()

    def break_off(self, framed: bool = True) -> None:
        """End the connection in the middle of an answer, so that the client can tell.

        What was sent may still be read, for a while. An answer that ends where its connection ends (`framed` false)
        is told from a complete one by a reset only.
        """
        transport = self.transport
        self.force_close()
        if transport is None or self._lost:
            return
        if framed:
            asyncio.get_running_loop().call_later(BREAK_OFF_SECS, self._abort, transport)
        else:
            connected: socket.socket = transport.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._lost = True
        super().connection_lost(exc)
        self._cancel()

    def eof_received(self) -> None:
        # A client that went away looks the same as one that only sends no more. The transport closes itself after
        # this, but would tell only when all that it has buffered is sent.
        if self._serving is not None:
            self.break_off()
            self._cancel()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what is not HTTP, and what broke before it came to a handler, in the form of all other errors."""
        if status == 400:
            reason = (message or "").partition("\n")[0] or "not a valid HTTP request"
            response = error_response(Rejected(400, "bad_request", reason))
        else:
            self.log_exception("a request broke", exc_info=exc)
            response = error_response(internal_error())
        response.headers[REQUEST_ID] = request_id("")
        response.headers[SERVER_TIMING] = server_timing(0.0, 0.0)
        response.force_close()
        return response

    def _cancel(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            self._serving = None

    def _abort(self, transport: asyncio.WriteTransport) -> None:
        if not self._lost:
            transport.abort()


class Site:
    """A listening proxy."""

    def __init__(self, runner: web.AppRunner) -> None:
        self._runner = runner
        self._listeners: list[asyncio.Server] = []
        self._ending = False
        self.port = 0

    def _connect(self) -> ClientConnection:
        server = self._runner.server
        assert server is not None
        connection = ClientConnection(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=KEEPALIVE_SECS,
        )
        # It may have been accepted just before.
        connection.ending = self._ending
        return connection

    async def listen(self, host: str, port: int, sockets: Sequence[socket.socket]) -> None:
        """Raises OSError if the port is not to be had."""
        loop = asyncio.get_running_loop()
        for one in sockets:
            self._listeners.append(await loop.create_server(self._connect, sock=one, backlog=BACKLOG))
        if not sockets:
            self._listeners.append(await loop.create_server(self._connect, host, port, backlog=BACKLOG))
        self.port = self._listeners[0].sockets[0].getsockname()[1]

    def stop_listening(self) -> None:
        """Take no new connections, and no new requests on those that there are."""
        self._ending = True
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            for one in listener.sockets:
                loop.remove_reader(one)
            # Not at once: asyncio drops what it has accepted a moment ago if the listener is closed by then.
            loop.call_later(_SETTLE_POLL_SECS, listener.close)
        for connection in self._connections():
            connection.end()

    async def settle(self) -> None:
        """Give those who have connected and not asked anything yet a moment to do so."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + SETTLE_SECS

        async def settled() -> bool:
            return loop.time() >= deadline or all(connection.used for connection in self._connections())

        # What was accepted a moment ago is no connection yet.
        await asyncio.sleep(2 * _SETTLE_POLL_SECS)
        await poll(settled, _SETTLE_POLL_SECS)

    def _connections(self) -> list[ClientConnection]:
        server = self._runner.server
        found = [] if server is None else server.connections
        return [connection for connection in found if isinstance(connection, ClientConnection)]

    async def close(self) -> None:
        """Stop listening, let complete answers be written out for a moment, and close every connection."""
        self.stop_listening()
        if self._runner.server is not None:
            await self._runner.server.shutdown(CLOSE_GRACE_SECS)
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
    site = Site(runner)
    try:
        await site.listen(host, port, sockets)
    except BaseException:
        site.stop_listening()
        await runner.cleanup()
        raise
    return site
