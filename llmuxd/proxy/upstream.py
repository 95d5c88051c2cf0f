"""The way to the engines: nothing added, nothing taken apart, no time limit.

A connection is used again if its last answer ended as it said, and not a byte later. One that has been idle for long
may be closed by the engine in the very moment in which a request is sent on it, and then nobody could tell whether it
was received: so it is closed here long before. An engine that ends a connection before it has answered has died. What
is done with an answer is the relay's.
"""

from __future__ import annotations

import asyncio
import select
from typing import Protocol, cast

from llmuxd.engine import Endpoint
from llmuxd.proxy.framing import Chunked, Framing, framing_of
from llmuxd.proxy.http1 import HEAD_END, BadMessage, ResponseHead, parse_response
from llmuxd.proxy.transports import pause_reading

SAYS_DEAD = b"EngineCore encountered an issue"
"""vLLM's words for its EngineCore being dead. They come in an answer that is otherwise complete."""

MAX_HEAD_BYTES = 256 * 1024
READ_BYTES = 64 * 1024
"""What is read at once; with it, and no more, an answer can be ahead of its client."""

IDLE_SECS = 1.0
"""How long a connection is kept for the next request. vLLM closes one after 5 s (VLLM_HTTP_TIMEOUT_KEEP_ALIVE)."""

JUST_NOW_SECS = 0.002

PIECE_BYTES = 256 * 1024
"""A body is sent in pieces, each when the engine has taken the one before: no call copies more than this."""

SWITCHING = 101
"""The status after which a connection is no HTTP any more."""


class EngineFailed(Exception):
    """An engine cannot be reached, goes away, or does not speak HTTP."""


class Listener(Protocol):
    """Hears what an engine answers. After `engine_failed`, and after a body that ended, nothing more comes."""

    def engine_answers(self, head: ResponseHead, framing: Framing) -> None:
        """The head of the answer. The first bytes of the body, if it has any, follow."""

    def engine_sent(self, data: bytes) -> None:
        """Bytes of the body as they came; `framing` knows them already."""

    def engine_failed(self, error: EngineFailed) -> None:
        """The answer is not there, or not complete, and will not be."""

    def engine_takes_more(self) -> None:
        """What was written to the engine is on its way."""


class Engines:
    """The connections to engines, in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.buffer = memoryview(bytearray(READ_BYTES))
        """All connections read into it: what was read is taken out before the next one reads."""

        self._idle: dict[Endpoint, list[EngineConnection]] = {}

    def take(self, endpoint: Endpoint, method: str, listener: Listener) -> EngineConnection | None:
        """A connection that is there already, for a request of this method; None if there is none."""
        idle = self._idle.get(endpoint)
        now = self._loop.time()
        while idle:
            taken = idle.pop()
            # Asking costs as much as reading a head: not where the last answer was there a moment ago.
            if now - taken.idle_since < JUST_NOW_SECS or taken.is_quiet():
                taken.begin(method, listener)
                return taken
            taken.close()
        return None

    async def open(self, endpoint: Endpoint, method: str, listener: Listener) -> EngineConnection:
        """Connect. Raises EngineFailed."""
        loop = self._loop
        try:
            if endpoint.uds is not None:
                path = str(endpoint.uds)
                _, made = await loop.create_unix_connection(lambda: EngineConnection(self, endpoint), path)
            else:
                port = endpoint.port or 0
                _, made = await loop.create_connection(lambda: EngineConnection(self, endpoint), "127.0.0.1", port)
        except OSError as error:
            raise EngineFailed(f"cannot connect: {error.strerror or error}") from error
        made.begin(method, listener)
        return made

    def keep(self, connection: EngineConnection) -> None:
        """It is idle now."""
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.endpoint, []).append(connection)

    def drop(self, connection: EngineConnection) -> None:
        """It is of no more use."""
        idle = self._idle.get(connection.endpoint, [])
        if connection in idle:
            idle.remove(connection)

    def close_idle(self, now: float) -> None:
        """Close those that have been idle for long. To be called again and again."""
        for endpoint, idle in list(self._idle.items()):
            for connection in [one for one in idle if now - one.idle_since >= IDLE_SECS]:
                connection.close()
                self.drop(connection)
            if not idle:
                del self._idle[endpoint]

    def close(self) -> None:
        """Close all that are idle."""
        self.close_idle(float("inf"))


class EngineConnection(asyncio.BufferedProtocol):
    """A connection to an engine: one request and its answer after the other."""

    def __init__(self, engines: Engines, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.idle_since = 0.0
        self._engines = engines
        self._buffer = engines.buffer
        self._method = ""
        self._listener: Listener | None = None
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._framing: Framing | None = None
        """How the body ends, once the head is there."""
        self._reusable = False
        """The answer is complete, and another request can follow."""
        self._body = memoryview(b"")
        """What of the request's body is not sent yet."""
        self._full = False
        self._poll = select.poll()
        self._keeps = False
        """The engine leaves the connection open after its answer."""

    # What the relay asks of it

    def begin(self, method: str, listener: Listener) -> None:
        """A request of this method is going to be sent."""
        self._method = method
        self._listener = listener
        self._framing = None
        self._reusable = False

    def send(self, head: bytes, body: bytearray) -> None:
        """Send the request."""
        if len(body) <= PIECE_BYTES:
            self.write(head + body)
        else:
            self.write(head)
            self._body = memoryview(body)
            self._send_piece()

    def write(self, data: bytes | memoryview) -> None:
        if self._transport is not None:
            self._transport.write(data)

    @property
    def full(self) -> bool:
        """It has not taken yet what was written."""
        return self._full

    def is_quiet(self) -> bool:
        """Whether nothing has come over it, and it is not closed, up to this moment: the loop may not know yet."""
        return self._transport is not None and not self._poll.poll(0)

    def pause(self, paused: bool) -> None:
        """Read nothing more from the engine for now, or again."""
        pause_reading(self._transport, paused)

    def close(self) -> None:
        """Be done with it: if the answer was not complete, the engine notices and aborts the request."""
        self._listener = None
        if self._reusable:
            self._reusable = False
            self.pause(False)
            self._engines.keep(self)
        elif self._transport is not None:
            self._transport.abort()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._poll.register(transport.get_extra_info("socket").fileno(), select.POLLIN)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        data = bytes(self._buffer[:nbytes])
        if self._listener is None:
            # Nothing was asked.
            self._fail("it speaks unasked")
            return
        try:
            if self._framing is None:
                self._take_head(data)
            else:
                self._take_body(data)
        except BadMessage as bad:
            self._fail(f"it does not speak HTTP: {bad}")

    def eof_received(self) -> bool:
        if self._framing is not None and not self._framing.framed:
            self._framing.ended = True
            if self._listener is not None:
                self._listener.engine_sent(b"")
            self.close()
        else:
            self._fail("it closed the connection")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._fail(f"the connection broke: {exc}" if exc else "it closed the connection")

    def pause_writing(self) -> None:
        self._full = True

    def resume_writing(self) -> None:
        self._full = False
        if self._body:
            self._send_piece()
        elif self._listener is not None:
            self._listener.engine_takes_more()

    # What comes and goes

    def _send_piece(self) -> None:
        while self._body and not self._full and self._transport is not None:
            piece, self._body = self._body[:PIECE_BYTES], self._body[PIECE_BYTES:]
            self._transport.write(piece)

    def _take_head(self, data: bytes) -> None:
        rest = self._received + data if self._received else data
        while True:
            end = rest.find(HEAD_END)
            if end < 0:
                if len(rest) > MAX_HEAD_BYTES:
                    raise BadMessage("the head of its answer has no end")
                self._received = rest
                return
            head = parse_response(rest[:end])
            rest = rest[end + len(HEAD_END) :]
            if head.status >= 200 or head.status == SWITCHING:
                break
            # 100 and the like: the answer is still to come.
        self._received = b""
        self._framing = framing = framing_of(head, self._method)
        self._keeps = head.minor > 0 and b"close" not in head.tokens(b"connection")
        if self._listener is not None:
            self._listener.engine_answers(head, framing)
        if (framing.ended or rest) and self._framing is framing:
            self._take_body(rest)

    def _take_body(self, data: bytes) -> None:
        framing = self._framing
        assert framing is not None
        try:
            taken = framing.feed(data)
        except BadMessage:
            if isinstance(framing, Chunked) and framing.whole and self._listener is not None:
                self._listener.engine_sent(data[: framing.whole])
            raise
        self._reusable = (
            framing.ended
            and framing.framed
            and taken == len(data)
            and self._keeps
            and not self._body
            and not self._full
        )
        if self._listener is not None:
            # What comes after the end is no part of any answer.
            self._listener.engine_sent(data if taken == len(data) else data[:taken])
        if framing.ended and self._listener is not None and self._framing is framing:
            self.close()

    def _fail(self, why: str) -> None:
        listener, self._listener = self._listener, None
        if listener is None:
            self._engines.drop(self)
        if self._transport is not None:
            self._transport.abort()
        if listener is not None:
            listener.engine_failed(EngineFailed(why))
