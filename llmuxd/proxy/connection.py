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

BACKLOG = 1024
KEEPALIVE_SECS = 75.0
CLOSE_GRACE_SECS = 1.0
"""How long `Site.close` lets answers that are complete be written out."""

BREAK_OFF_SECS = 5.0
"""How long a client may take to read what was sent before its answer broke off."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class ClientConnection(web.RequestHandler):
    """One client's connection. When it is lost, or half closed, the request that is being served is cancelled."""

    __slots__ = ("_lost", "_serving")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._serving: asyncio.Task[Any] | None = None
        self._lost = False

    def serves(self, task: asyncio.Task[Any] | None) -> None:
        """Cancel this task when the client goes away, or has gone; None: there is nothing to cancel any more."""
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

    def __init__(self, runner: web.AppRunner, listeners: Sequence[asyncio.AbstractServer], port: int) -> None:
        self._runner = runner
        self._listeners = listeners
        self.port = port

    def stop_listening(self) -> None:
        """Take no new connections. Those that there are go on."""
        for listener in self._listeners:
            listener.close()

    async def close(self) -> None:
        """Stop listening, let complete answers be written out for a moment, and close every connection."""
        self.stop_listening()
        if self._runner.server is not None:
            await self._runner.server.shutdown(CLOSE_GRACE_SECS)
        await self._runner.cleanup()


async def serve_proxy(
    app: web.Application, host: str = "127.0.0.1", port: int = 0, *, sockets: Sequence[socket.socket] = ()
) -> Site:
    """Serve the proxy's application on a TCP port (0: any free one), or on `sockets` that are bound already.

    Raises OSError if the port is not to be had.
    """
    loop = asyncio.get_running_loop()
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    server = runner.server
    assert server is not None

    def connect() -> ClientConnection:
        return ClientConnection(
            server, loop=loop, access_log=None, auto_decompress=False, keepalive_timeout=KEEPALIVE_SECS
        )

    listeners: list[asyncio.AbstractServer] = []
    try:
        if sockets:
            for one in sockets:
                listeners.append(await loop.create_server(connect, sock=one, backlog=BACKLOG))
            bound = sockets[0]
        else:
            listener = await loop.create_server(connect, host, port, backlog=BACKLOG)
            listeners.append(listener)
            bound = listener.sockets[0]
    except BaseException:
        for listening in listeners:
            listening.close()
        await runner.cleanup()
        raise
    return Site(runner, listeners, bound.getsockname()[1])
