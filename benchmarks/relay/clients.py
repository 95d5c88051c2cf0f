"""The clients that measure: streams that are counted, streams that stall, single requests that are timed.

All of one measurement run in one event loop and look at no more of an answer than they must, so that two processors
are enough for them, the engine and a proxy.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from benchmarks.relay.contestants import BODY, Broken
from benchmarks.relay.engine import CHAT, PACE

BEGIN_SECS = 60.0
STALLED_BUFFER = 65536
"""What the kernel may take for a client that stalls; else it is a gigabyte for all, which takes its time to fill."""

_CONNECTING_AT_ONCE = 64
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def post(body: bytes) -> bytes:
    """A request of the chat API."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


class Streams:
    """Many streams of one target, counted together. `pace` is events per second and stream, 0 for no bound."""

    def __init__(self, pace: float, *, stall: bool = False) -> None:
        request = json.loads(BODY) | {"stream": True, PACE: pace}
        self.request = post(json.dumps(request).encode())
        self.stall = stall
        """Take nothing after the first bytes."""
        self.begun = self.events = 0
        self.trouble = ""
        """What went wrong with one of them."""
        self.closed = False
        self._transports: list[asyncio.BaseTransport] = []

    async def open(self, port: int, count: int) -> None:
        """Begin `count` streams. Raises Broken if not all of them do."""
        loop = asyncio.get_running_loop()
        for first in range(0, count, _CONNECTING_AT_ONCE):
            number = min(_CONNECTING_AT_ONCE, count - first)
            self._transports += await asyncio.gather(*[self._connect(loop, port) for _ in range(number)])
        end = time.monotonic() + BEGIN_SECS
        while self.begun < count and time.monotonic() < end:
            self.check()
            await asyncio.sleep(0.02)
        if self.begun < count:
            raise Broken(f"{self.begun} of {count} streams have begun in {BEGIN_SECS:g} s")

    async def _connect(self, loop: asyncio.AbstractEventLoop, port: int) -> asyncio.BaseTransport:
        one = socket.socket()
        one.setblocking(False)
        if self.stall:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STALLED_BUFFER)
        await loop.sock_connect(one, ("127.0.0.1", port))
        return (await loop.create_connection(lambda: _Stream(self), sock=one))[0]

    def check(self) -> None:
        """Raises Broken if one of them has ended or failed."""
        if self.trouble:
            raise Broken(f"a stream ended: {self.trouble}")

    def close(self) -> None:
        """All clients leave."""
        self.closed = True
        for transport in self._transports:
            transport.abort()  # type: ignore[attr-defined]


class _Stream(asyncio.Protocol):
    __slots__ = ("_begun", "_head", "_streams", "_transport")

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._head = b""
        self._begun = False
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._transport.write(self._streams.request)

    def data_received(self, data: bytes) -> None:
        streams = self._streams
        streams.events += data.count(b"\n\n")
        if not self._begun:
            self._begin(data)

    def _begin(self, data: bytes) -> None:
        self._head += data
        if b"data: " in self._head:
            self._begun = True
            self._streams.begun += 1
            if self._streams.stall:
                self._transport.pause_reading()
            if not self._head.startswith(b"HTTP/1.1 200 "):
                self._streams.trouble = self._head[:300].decode("latin-1")

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._streams.closed:
            self._streams.trouble = f"{exc or 'closed by the other side'} after {self._head[:300]!r}"


@contextlib.asynccontextmanager
async def streaming(port: int, count: int, pace: float, *, stall: bool = False) -> AsyncIterator[Streams]:
    """`count` streams that have all begun; their clients leave at the end. Raises Broken."""
    streams = Streams(pace, stall=stall)
    try:
        await streams.open(port, count)
        yield streams
        streams.check()
    finally:
        streams.close()


class Requests:
    """Single requests, sent when they are due over a fixed number of connections, and timed from that moment on: one
    that has to wait for a free connection counts with its wait."""

    def __init__(self, total: int) -> None:
        self.request = post(BODY)
        self.secs: list[float] = []
        self.free: deque[_Connection] = deque()
        self.trouble = ""
        self.over = asyncio.Event()
        """All are answered, or there is trouble."""
        self._due: deque[float] = deque()
        self._total = total

    def send(self) -> None:
        """One more is due."""
        self._due.append(time.perf_counter())
        self._send_due()

    def _send_due(self) -> None:
        while self._due and self.free:
            self.free.popleft().send(self._due.popleft())

    def answered(self, connection: _Connection, due: float) -> None:
        self.secs.append(time.perf_counter() - due)
        self.free.append(connection)
        self._send_due()
        if len(self.secs) == self._total:
            self.over.set()

    def failed(self, why: str) -> None:
        if not self.over.is_set():
            self.trouble = why
            self.over.set()


class _Connection(asyncio.Protocol):
    __slots__ = ("_due", "_missing", "_requests", "_transport")

    def __init__(self, requests: Requests) -> None:
        self._requests = requests
        self._due = 0.0
        self._missing = 0
        self._transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._requests.free.append(self)

    def send(self, due: float) -> None:
        self._due = due
        self._transport.write(self._requests.request)

    def data_received(self, data: bytes) -> None:
        if not self._missing:
            end = data.find(b"\r\n\r\n")
            length = _LENGTH.search(data[:end])
            if end < 0 or length is None or not data.startswith(b"HTTP/1.1 200 "):
                self._requests.failed(data[:300].decode("latin-1"))
                return
            self._missing = int(length[1]) + end + 4
        self._missing -= len(data)
        if not self._missing:
            self._requests.answered(self, self._due)

    def connection_lost(self, exc: Exception | None) -> None:
        self._requests.failed(f"{exc or 'closed by the other side'}")


async def timed(port: int, rate: int, connections: int, secs: float) -> list[float]:
    """The times of `rate` requests a second for `secs`, sent however long the answers take. Raises Broken."""
    loop = asyncio.get_running_loop()
    total = int(rate * secs)
    requests = Requests(total)
    transports = [
        (await loop.create_connection(lambda: _Connection(requests), "127.0.0.1", port))[0] for _ in range(connections)
    ]
    begun = time.perf_counter()
    for sent in range(total):
        await asyncio.sleep(max(0.0, begun + sent / rate - time.perf_counter()))
        requests.send()
    try:
        await asyncio.wait_for(requests.over.wait(), BEGIN_SECS)
    except asyncio.TimeoutError:
        requests.failed("in time")
    for transport in transports:
        transport.abort()
    if requests.trouble:
        raise Broken(f"{len(requests.secs)} of {total} requests were answered: {requests.trouble}")
    return requests.secs
