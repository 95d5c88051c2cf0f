"""The proxy as an aiohttp application that a program serves by itself: each request's connection is taken over.

aiohttp has read the head and hands over what it made of it. That is put into bytes again, so that everything is
decided by what decides it elsewhere; the connection serves this one request and ends. `site` is many times as fast.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web

from llmuxd.proxy.connection import ClientConnection

if TYPE_CHECKING:
    from llmuxd.proxy.handler import Proxy

_ENDS_HERE = frozenset({b"connection", b"transfer-encoding", b"content-length", b"expect"})


class _TakenOver(web.Response):
    """Says nothing: all was said on the connection."""

    async def prepare(self, request: web.BaseRequest) -> None:
        return None

    async def write_eof(self, data: bytes = b"") -> None:
        return None


async def take_over(proxy: Proxy, request: web.Request) -> web.StreamResponse:
    """Answer one request of an aiohttp server."""
    transport = request.transport
    body = await _body_of(proxy, request)
    if transport is None or transport.is_closing():
        raise asyncio.CancelledError
    connection = ClientConnection(proxy)
    connection.ending = True
    host = request.protocol
    transport.set_protocol(connection)
    over = asyncio.Event()
    connection.on_lost = over.set
    connection.connection_made(transport)
    connection.pause_reading(False)
    connection.data_received(_head_of(request, len(body)) + body)
    try:
        await over.wait()
    finally:
        # Its server has to hear of the end as it would have without us.
        connection.abort()
        host.connection_lost(None)
    return _TakenOver()


async def _body_of(proxy: Proxy, request: web.Request) -> bytes:
    """As much of it as may be: one byte more is told from a whole one by its length."""
    pieces, size = [], 0
    if request.version >= (1, 1) and request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    while size <= proxy.limits.max_body_bytes and (piece := await request.content.readany()):
        pieces.append(piece)
        size += len(piece)
    return b"".join(pieces)


def _head_of(request: web.Request, length: int) -> bytes:
    version = request.version
    lines = [f"{request.method} {request.raw_path} HTTP/{version.major}.{version.minor}".encode()]
    lines += [b"%b: %b" % field for field in request.raw_headers if field[0].lower() not in _ENDS_HERE]
    if length or "Content-Length" in request.headers or "Transfer-Encoding" in request.headers:
        lines.append(b"Content-Length: %d" % length)
    if request.headers.get("Upgrade"):
        lines.append(b"Connection: Upgrade")
    return b"\r\n".join(lines) + b"\r\n\r\n"
