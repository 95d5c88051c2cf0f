"""One client's connection: requests come in over it, one at a time are served, and answers go out.

It reads heads and bodies, within their limits, and tells whoever serves the request when its client has gone or does
not read. What becomes of a request is the exchange's; listening is in `site`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from enum import Enum
from typing import TYPE_CHECKING, Protocol, cast

from llmuxd.gate import Refused
from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.framing import Chunked, Counted
from llmuxd.proxy.http1 import HEAD_END, BadMessage, RequestHead, parse_request
from llmuxd.proxy.transports import pause_reading

if TYPE_CHECKING:
    from llmuxd.proxy.handler import Proxy

KEEPALIVE_SECS = 75.0
BREAK_OFF_SECS = 5.0
"""How long a client may take to read what was sent before its answer broke off."""

LINGER_SECS = 2.0
"""How long a client that was refused may go on sending its body, so that it gets to read why."""

LEAST_BYTES_PER_SEC = 500.0
"""Who sends faster than this is given the time that a large head or body takes."""

HIGH_WATER_BYTES = 16 * 1024
"""With more than this unread by a client, nothing more is read for it from its engine."""

MAX_PIPELINED_BYTES = 64 * 1024
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)


class Exchange(Protocol):
    """Serves one request."""

    def begin(self) -> None:
        """The head is there."""

    def body_read(self, body: bytearray) -> None:
        """The body is there, whole."""

    def refuse(self, refused: Refused) -> None:
        """The body will never be."""

    def client_sent(self, data: bytes) -> bool:
        """Bytes that follow the request; False if they are not for this exchange."""

    def client_left(self) -> None:
        """There is nobody to answer."""

    def client_paused(self, paused: bool) -> None:
        """The client does not read, or reads again."""


class _State(Enum):
    IDLE = "between requests"
    HEAD = "a head has begun"
    BODY = "the body of the request that is being served is read"
    SERVED = "the request is being served"
    DRAINS = "the request is answered, and the rest of its body is read over"
    LINGERS = "the last answer is given, and what still comes is thrown away"
    CLOSED = "nothing is done any more"


# An enum's member costs more to look up than most of what is done with it here.
_IDLE, _HEAD, _BODY, _SERVED, _DRAINS, _LINGERS, _CLOSED = _State


class ClientConnection(asyncio.Protocol):
    """One client's connection."""

    __slots__ = (
        "_body",
        "_body_over",
        "_count",
        "_deadline",
        "_drainable",
        "_exchange",
        "_framing",
        "_head_from",
        "_loop",
        "_proxy",
        "_received",
        "_stalled",
        "_state",
        "_transport",
        "ending",
        "on_lost",
        "used",
    )

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._loop = proxy.loop
        self._transport: asyncio.Transport | None = None
        self._state = _IDLE
        self._received = bytearray()
        """What has come and is not part of anything yet."""
        self._head_from = 0
        """Up to where `_received` was searched for the end of a head."""
        self._exchange: Exchange | None = None
        self._body = bytearray()
        self._framing: Counted | Chunked | None = None
        self._body_over = True
        """The request has no body, or all of it has come."""
        self._drainable = False
        """The rest of the body is worth reading over, so that the connection can be used again."""
        self._deadline = 0.0
        """When its time is over; a head or body that comes in good time has more."""
        self._count = 0
        """The bytes of the body that is being read, or read over."""
        self._stalled: float | None = None
        """Since when the client takes nothing of what is sent."""
        self.ending = False
        """There is no further request on it: its client is told so with the answer."""
        self.on_lost: Callable[[], object] | None = None
        """Called when it is gone."""
        self.used = False
        """A request has come over it."""

    # What its exchange asks of it

    @property
    def paused(self) -> bool:
        """The client does not read."""
        return self._stalled is not None

    @property
    def unread(self) -> bool:
        """The client has not taken yet what was sent, or is not there any more."""
        return self._transport is None or self._transport.get_write_buffer_size() > 0

    @property
    def can_follow(self) -> bool:
        """Another request can follow this one, whose body has come or can be read over."""
        return self._body_over or self._drainable

    def pause_reading(self, paused: bool) -> None:
        """Read nothing more of the client for now, or again."""
        pause_reading(self._transport, paused)

    def take_received(self) -> bytes:
        """What has come after the request: it belongs to whoever asks."""
        received, self._received = bytes(self._received), bytearray()
        return received

    def read_body(self, head: RequestHead) -> None:
        """Read the body of the request: `body_read` or `refuse` of its exchange follows, perhaps at once."""
        length, received = head.length or 0, self._received
        if not head.chunked and len(received) >= length:
            self._body_over = True
            body = received[:length]
            del received[:length]
            assert self._exchange is not None
            self._exchange.body_read(body)
            return
        self._body = bytearray()
        self.pause_reading(False)
        self._enter(_BODY, self._proxy.limits.body_timeout_secs)
        if b"expect" in head.values and head.minor and not self._received:
            self.write(CONTINUE)
        self._take_body(self.take_received())

    def write(self, data: bytes | memoryview) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def finish(self, keep: bool) -> None:
        """The answer is complete. The next request follows on the same connection, or (`keep` false) none."""
        self._exchange = None
        if self._transport is None or self._state is _CLOSED:
            return
        if keep and self.can_follow and not self.ending:
            self.pause_reading(False)
            if self._body_over:
                self._wait()
            else:
                self._enter(_DRAINS, self._proxy.limits.body_timeout_secs)
                self._drain(self.take_received())
        elif self._body_over:
            self.close()
        else:
            # Closing now would reset the connection, and the answer might be lost with it.
            self._enter(_LINGERS, LINGER_SECS)
            self._received.clear()
            self.pause_reading(False)
            if self._transport.can_write_eof():
                self._transport.write_eof()

    def break_off(self, framed: bool = True) -> None:
        """End the connection in the middle of an answer, so that the client can tell.

        What was sent may still be read, for a while. An answer that ends where its connection ends (`framed` false)
        is told from a complete one by a reset only.
        """
        transport, self._exchange = self._transport, None
        if transport is None or self._state is _CLOSED:
            return
        if framed:
            self.close()
            self._loop.call_later(BREAK_OFF_SECS, transport.abort)
        else:
            self._enter(_CLOSED, 0.0)
            _reset(transport)

    def close(self) -> None:
        """Close it when what was written is sent, or not taken for too long."""
        if self._state is not _CLOSED:
            self._enter(_CLOSED, self._proxy.limits.send_timeout_secs)
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close it at once."""
        if self._transport is not None:
            self._transport.abort()

    # What the site asks of it

    @property
    def idle(self) -> bool:
        """Nothing is being answered, or read, on it."""
        return self._state is _IDLE

    def end(self) -> None:
        """Close it when the request that is being served is answered, or the first one, if none has come yet."""
        self.ending = True
        if self.used and self.idle:
            self.close()

    def check(self, now: float) -> None:
        """Called now and then: end what has taken too long."""
        if self._stalled is not None and now - self._stalled > self._proxy.limits.send_timeout_secs:
            self.abort()
        elif self._state is _SERVED or now < self._deadline:
            return
        elif self._state is _CLOSED:
            self.abort()
        elif self._state is _HEAD:
            if now >= self._deadline + len(self._received) / LEAST_BYTES_PER_SEC:
                self._turn_away(Rejected(408, "head_timeout", "the head of the request did not come in time"))
        elif self._state is _BODY:
            if now >= self._deadline + self._count / LEAST_BYTES_PER_SEC:
                assert self._exchange is not None
                self._drainable = False
                self._exchange.refuse(Rejected(408, "body_timeout", "the body of the request did not come in time"))
        else:
            self.close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports have all of its methods, and are no subclass of it.
        self._transport = made = cast(asyncio.Transport, transport)
        made.set_write_buffer_limits(HIGH_WATER_BYTES)
        self._enter(_IDLE, self._proxy.limits.head_timeout_secs)
        refused = self._proxy.connected(self)
        if refused is not None:
            # Nothing was read, and nothing is waited for: who connects without end costs no more than this.
            self._proxy.turn_away(self, refused)
            self.close()

    def data_received(self, data: bytes) -> None:
        if self._state is _BODY:
            self._take_body(data)
        elif self._state is _SERVED:
            assert self._exchange is not None
            if not self._exchange.client_sent(data):
                self._received += data
                self.pause_reading(len(self._received) > MAX_PIPELINED_BYTES)
        elif self._state is _IDLE or self._state is _HEAD:
            self._received += data
            self._advance()
        elif self._state is _DRAINS:
            self._drain(data)

    def eof_received(self) -> None:
        # A client that went away looks the same as one that only sends no more. The transport closes itself after
        # this, but would tell only when all that it has buffered is sent.
        exchange = self._exchange
        if exchange is not None:
            self.break_off()
            exchange.client_left()

    def connection_lost(self, exc: Exception | None) -> None:
        exchange, self._exchange = self._exchange, None
        self._transport = None
        self._state = _CLOSED
        self._received.clear()
        self._proxy.disconnected(self)
        if self.on_lost is not None:
            self.on_lost()
        if exchange is not None:
            exchange.client_left()

    def pause_writing(self) -> None:
        self._stalled = self._loop.time()
        if self._exchange is not None:
            self._exchange.client_paused(True)

    def resume_writing(self) -> None:
        self._stalled = None
        if self._exchange is not None:
            self._exchange.client_paused(False)
        elif self._state is _IDLE:
            self.pause_reading(False)
            self._loop.call_soon(self._advance)

    # Reading

    def _enter(self, state: _State, secs: float) -> None:
        self._state = state
        self._count = 0
        self._deadline = self._loop.time() + secs

    def _advance(self) -> None:
        """Begin with the next request, if its head is there."""
        received = self._received
        if self._state is not _IDLE and self._state is not _HEAD:
            return
        if self.paused:
            # Who does not read its answers is not given more of them.
            self.pause_reading(True)
            return
        while received.startswith(b"\r\n"):
            # Some clients send an empty line after a body.
            del received[:2]
        if not received or received == b"\r":
            self.pause_reading(False)
            return
        if self._state is _IDLE:
            self._enter(_HEAD, self._proxy.limits.head_timeout_secs)
        end = received.find(HEAD_END, self._head_from)
        if (len(received) if end < 0 else end) > self._proxy.limits.max_head_bytes:
            self._turn_away(Rejected(431, "head_too_large", "the head of the request is too large"))
        elif end >= 0:
            self._head_from = 0
            self._serve(end)
        else:
            self._head_from = max(0, len(received) - 3)
            self.pause_reading(False)
            self._look_early()

    def _look_early(self) -> None:
        """What is no HTTP may never send the end of a head: say so when its first line is there."""
        line, found, _ = bytes(self._received[:4096]).partition(b"\n")
        if found and not line.endswith(b"\r"):
            self._turn_away(Rejected(400, "bad_request", "a line of the head does not end in CRLF"))

    def _serve(self, end: int) -> None:
        """Serve the request whose head ends there."""
        block = bytes(self._received[:end])
        del self._received[: end + len(HEAD_END)]
        self.used = True
        try:
            head = parse_request(block)
        except BadMessage as bad:
            self._turn_away(Rejected(bad.status, bad.code, str(bad)))
            return
        self._state, self._body_over = _SERVED, not (head.chunked or head.length)
        self._framing = Chunked() if head.chunked else Counted(head.length or 0)
        # Who waits for a 100 may send its body or not: there is no telling what follows.
        self._drainable = b"expect" not in head.values and (head.length or 0) <= self._proxy.limits.max_body_bytes
        # Reading goes on, so as to see the client leave, unless it is far ahead of its answers.
        self.pause_reading(len(self._received) > MAX_PIPELINED_BYTES)
        self._exchange = exchange = self._proxy.exchange(self, head)
        exchange.begin()

    def _take_body(self, data: bytes) -> None:
        assert self._framing is not None
        assert self._exchange is not None
        body, limit = self._body, self._proxy.limits.max_body_bytes
        self._count += len(data)
        try:
            taken = self._framing.feed(data, body.extend)
        except BadMessage as bad:
            self._drainable = False
            self._exchange.refuse(Rejected(bad.status, bad.code, str(bad)))
            return
        if len(body) > limit:
            self._drainable = False
            self._exchange.refuse(too_large(limit))
        elif self._framing.ended:
            self._state, self._body_over = _SERVED, True
            self._received += data[taken:]
            self._body = bytearray()
            self._exchange.body_read(body)

    def _wait(self) -> None:
        """For the next request."""
        self._enter(_IDLE, KEEPALIVE_SECS)
        if self._received:
            # Not at once: a client that pipelines without end would make this call itself without end.
            self._loop.call_soon(self._advance)
            self.pause_reading(True)

    def _drain(self, data: bytes) -> None:
        """Read over more of the rest of a body."""
        assert self._framing is not None
        self._count += len(data)
        try:
            taken = self._framing.feed(data)
        except BadMessage:
            self.close()
            return
        if self._framing.ended:
            self._body_over = True
            self._received += data[taken:]
            self._wait()
        elif self._count > self._proxy.limits.max_body_bytes:
            self.close()

    def _turn_away(self, refused: Refused) -> None:
        """Answer what never became a request, and close."""
        self._exchange, self._body_over, self._drainable = None, False, False
        self._proxy.turn_away(self, refused)
        self.finish(keep=False)


def too_large(limit: int) -> Rejected:
    """413."""
    return Rejected(413, "body_too_large", f"the body is larger than {limit} bytes")


def _reset(transport: asyncio.Transport) -> None:
    """Close a connection in the one way that no client takes for a regular end."""
    connected = transport.get_extra_info("socket")
    with socket.socket(fileno=socket.dup(connected.fileno())) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    transport.abort()
