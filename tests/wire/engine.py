"""An engine in bytes: what it is sent is read by h11, and what it answers is the test's to say.

It keeps its connections open from one request to the next, as a real one does, unless its script ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import h11

from llmuxd.engine import Endpoint
from tests.vllm_paths import DEVELOPMENT
from tests.wire.client import DEADLINE_SECS

_LINE = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_FIRST = re.compile(rb"[A-Z]+ /[\x21\x22\x24-\x7e]* HTTP/1\.[01]")
_PRIVATE = {b"authorization", b"x-api-key", b"cookie", b"expect", b"te", b"trailer", b"keep-alive", b"http2-settings"}
_READ_BYTES = 1 << 16
_numbers = itertools.count()
_MAX_HEAD_BYTES = 1 << 17


class Asked:
    """One whole request, and the connection that it may be answered on."""

    def __init__(self, request: h11.Request, body: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.method = request.method.decode()
        self.target = request.target.decode()
        self.headers: list[tuple[str, str]] = [
            (name.decode(), value.decode("latin-1")) for name, value in request.headers
        ]
        self.body = body
        self.reader = reader
        self.writer = writer
        self.number = next(_numbers)
        """Of two requests, the one that came later has the higher one, whatever their engines."""
        self.answered = asyncio.Event()
        """The connection may be read from again: for the next request, or its end."""

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name.lower()]

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, raw: bytes, *, keep: bool = True) -> None:
        """Send the whole answer, or what there is of it, and end the connection if it is not to be kept."""
        await self.send(raw)
        if not keep:
            self.writer.close()
        self.answered.set()

    def die(self) -> None:
        """Close the connection as a process that is killed does."""
        self.writer.transport.abort()
        self.answered.set()

    async def gone(self) -> bytes:
        """Wait until the other side has closed the connection; what it still sent before."""
        try:
            return await asyncio.wait_for(self.reader.read(), DEADLINE_SECS)
        except ConnectionError:
            return b""


Script = Callable[[Asked], Awaitable[None]]
RawScript = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Engine:
    """Listens on a Unix socket. `script` answers; without one the requests wait in `next` for the test."""

    def __init__(self, path: Path, script: Script | None) -> None:
        self.endpoint = Endpoint(uds=path)
        self.script = script
        self.raw: RawScript | None = None
        """Takes connections as they are, instead of all the rest."""
        self.asked: list[Asked] = []
        self.connections = 0
        self.received = 0
        """Bytes, whatever they were."""
        self.faults: list[str] = []
        """What was no HTTP, or not what an engine may be sent."""
        self._queue: asyncio.Queue[Asked] | None = None
        self._open: dict[asyncio.StreamWriter, Asked | None] = {}

    async def next(self) -> Asked:
        """The next request that nothing has answered yet."""
        assert self._queue is not None
        asked: Asked = await asyncio.wait_for(self._queue.get(), DEADLINE_SECS)
        return asked

    @property
    def targets(self) -> list[str]:
        return [asked.target for asked in self.asked]

    @property
    def bodies(self) -> list[bytes]:
        return [asked.body for asked in self.asked]

    def hang_up(self) -> None:
        """Close every connection."""
        for writer, asked in list(self._open.items()):
            writer.transport.abort()
            if asked is not None:
                asked.answered.set()

    def assert_asked_properly(self) -> None:
        """Whatever a client did: what came here was HTTP that has one reading, and no development endpoint."""
        assert self.faults == []
        for asked in self.asked:
            path = asked.target.partition("?")[0]
            assert path not in DEVELOPMENT
            assert not {"", ".", ".."} & set(path[1:].split("/")), path
            assert "%" not in path
            assert "\\" not in path

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Engine]:
        self._queue = asyncio.Queue()
        server = await asyncio.start_unix_server(self._serve, str(self.endpoint.uds))
        try:
            yield self
        finally:
            server.close()
            self.hang_up()
            await asyncio.sleep(0)  # A transport closes its socket in the loop's next turn.

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open[writer] = None
        try:
            if self.raw is not None:
                await self.raw(reader, writer)
            else:
                await self._serve_requests(reader, writer)
        except (ConnectionError, h11.RemoteProtocolError) as error:
            if isinstance(error, h11.RemoteProtocolError):
                self.faults.append(str(error))
        finally:
            del self._open[writer]
            writer.close()

    async def _serve_requests(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = b""
        while True:
            parser = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
            asked = await self._read(parser, left, reader, writer)
            if asked is None or writer.is_closing():
                return
            left = parser.trailing_data[0]
            self._open[writer] = asked
            self.asked.append(asked)
            if self.script is not None:
                await self.script(asked)
            else:
                assert self._queue is not None
                self._queue.put_nowait(asked)
            await asked.answered.wait()
            if writer.is_closing():
                return

    async def _read(
        self, parser: h11.Connection, left: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> Asked | None:
        """A request; None if the connection ends before it is complete."""
        raw, request, body = left, None, bytearray()
        if left:
            parser.receive_data(left)
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(_READ_BYTES)
                if not data:
                    return None
                self.received += len(data)
                raw = raw if request else raw + data
                parser.receive_data(data)
            elif isinstance(event, h11.Request):
                request = event
                self._inspect(raw.partition(b"\r\n\r\n")[0], event)
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                if event.headers:
                    self.faults.append(f"a trailer: {event.headers!r}")
                return Asked(request, bytes(body), reader, writer)
            else:
                return None

    def _inspect(self, head: bytes, request: h11.Request) -> None:
        """h11 forgives some things; an engine's parser may make something else of them."""
        first, *lines = head.split(b"\r\n")
        wrong = [line for line in lines if not _LINE.fullmatch(line)]
        if not _FIRST.fullmatch(first):
            wrong.append(first)
        names = [name for name, _ in request.headers]
        framing = [name for name in names if name in (b"content-length", b"transfer-encoding")]
        if wrong or len(framing) > 1 or names.count(b"host") != 1 or names.count(b"x-request-id") != 1:
            self.faults.append(f"not a plain head: {head!r}")
        upgrades = request.target.startswith(b"/v1/realtime")
        if _PRIVATE & set(names) or (b"upgrade" in names and not upgrades):
            self.faults.append(f"not for an engine: {head!r}")


def plain(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    """An answer with a length."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def chunked(*chunks: bytes, content_type: str = "text/event-stream", end: bytes = b"0\r\n\r\n") -> bytes:
    """An answer in chunks."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + end


OK = plain(b'{"ok": true}', "Content-Type: application/json")


async def ok(asked: Asked) -> None:
    """A script: everything is well."""
    await asked.answer(OK)


async def echo(asked: Asked) -> None:
    """A script: the request's body is the answer's."""
    await asked.answer(plain(asked.body, "Content-Type: application/octet-stream"))


def answering(raw: bytes, *, keep: bool = False) -> Script:
    """A script that always sends these bytes, and closes the connection unless it is to be kept."""

    async def script(asked: Asked) -> None:
        await asked.answer(raw, keep=keep)

    return script


def first_then(raw: bytes, then: bytes = OK, *, keep: bool = False) -> Script:
    """A script that sends these bytes to the first request, and answers the others properly."""
    count = 0

    async def script(asked: Asked) -> None:
        nonlocal count
        count += 1
        await (asked.answer(raw, keep=keep) if count == 1 else asked.answer(then))

    return script
