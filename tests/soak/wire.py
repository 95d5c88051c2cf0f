"""HTTP on a raw connection, as the soak's clients speak it: every byte of a request is theirs to send or to keep back.

An answer is read as its framing says, and how it ended is told: whether that is right is `judge`'s to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

LIMIT = 2**16
"""Of what is read ahead; also the longest head."""

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_BODILESS = (101, 204, 304)

Pace = Callable[[int], Awaitable[None]]
"""Awaited after so many bytes of a body: a client that takes its time."""


class End(Enum):
    """How an answer ended."""

    CLEAN = "as its framing says"
    CLOSED = "with its connection, which is its framing"
    CUT = "before its end: the connection was closed"
    RESET = "before its end: the connection was reset"


class NoAnswer(Exception):
    """The connection ended, or what came is no HTTP."""


@dataclass(frozen=True)
class Answer:
    """One answer. Times are of the monotonic clock."""

    status: int
    headers: dict[str, str]
    body: bytes
    end: End
    first_byte: float
    ended: float

    @property
    def keeps(self) -> bool:
        """The connection can be used again."""
        return self.end is End.CLEAN and self.headers.get("connection", "keep-alive").lower() != "close"


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.used = 0
        """Answers that came over it."""

    @classmethod
    async def open(cls, port: int, small: bool = False) -> Wire:
        """Connect; with `small` buffers what is not read soon fills the other side's."""
        raw = socket.socket()
        raw.setblocking(False)
        if small:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        try:
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
            return cls(*await asyncio.open_connection(sock=raw, limit=LIMIT))
        except BaseException:
            raw.close()
            raise

    async def send(self, data: bytes) -> None:
        """Raises OSError."""
        self._writer.write(data)
        await self._writer.drain()

    def half_close(self) -> None:
        """Say that there is nothing more to come."""
        self._writer.write_eof()

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        """Close it so that the other side sees an error, and loses what it has not read."""
        with contextlib.suppress(OSError):
            raw = self._writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        self._writer.transport.abort()

    async def exactly(self, count: int) -> bytes:
        """So many bytes of what follows a head. Raises NoAnswer if the connection ends before."""
        try:
            return await self._reader.readexactly(count)
        except (OSError, asyncio.IncompleteReadError) as error:
            raise NoAnswer(repr(error)) from error

    async def some(self, count: int) -> int:
        """Read on until so many bytes have come, or all; how many."""
        seen = 0
        with contextlib.suppress(OSError):
            while seen < count and (piece := await self._reader.read(4096)):
                seen += len(piece)
        return seen

    async def rest(self) -> bytes:
        """What still comes until the other side closes."""
        try:
            return await self._reader.read()
        except OSError:
            return b""

    async def answer(self, method: str, pace: Pace | None = None) -> Answer:
        """Read one answer. Raises NoAnswer."""
        status, headers, began = await self._head()
        self.used += 1
        pieces: list[bytes] = []
        end = End.CLEAN
        try:
            if method != "HEAD" and status not in _BODILESS:
                end = await self._body(headers, pieces, pace)
        except asyncio.IncompleteReadError:
            end = End.CUT
        except OSError:
            end = End.RESET
        except ValueError as error:
            raise NoAnswer(f"a chunk that is none: {error}") from error
        return Answer(status, headers, b"".join(pieces), end, began, time.monotonic())

    async def told_to_go_on(self) -> bool:
        """Wait for a 100; False if the answer came instead, which is still to be read. Raises NoAnswer."""
        try:
            line = await self._reader.readuntil(b"\r\n")
            if line.startswith(b"HTTP/1.1 100 "):
                await self._reader.readuntil(b"\r\n")
                return True
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise NoAnswer(f"neither a 100 nor an answer: {error!r}") from error
        self._first_line = line
        return False

    _first_line = b""
    """Of an answer, if it has been read already."""

    async def _head(self) -> tuple[int, dict[str, str], float]:
        try:
            block = self._first_line + await self._reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            came = getattr(error, "partial", b"")[:80]
            raise NoAnswer(f"{type(error).__name__} after {came!r}") from error
        finally:
            self._first_line = b""
        began = time.monotonic()
        lines = block.decode("latin-1").split("\r\n")[:-2]
        words = lines[0].split(" ", 2)
        if len(words) < 2 or words[0] not in ("HTTP/1.0", "HTTP/1.1") or not words[1].isdecimal():
            raise NoAnswer(f"no status line: {lines[0][:80]!r}")
        fields = [line.partition(":") for line in lines[1:]]
        headers = {name.lower(): value.strip() for name, _, value in fields}
        for name in ("content-length", "transfer-encoding", "x-request-id"):
            if sum(field.lower() == name for field, _, _ in fields) > 1:
                raise NoAnswer(f"{name} is there twice")
        if "content-length" in headers and "transfer-encoding" in headers:
            raise NoAnswer("both Content-Length and Transfer-Encoding")
        return int(words[1]), headers, began

    async def _body(self, headers: dict[str, str], pieces: list[bytes], pace: Pace | None) -> End:
        if headers.get("transfer-encoding") == "chunked":
            while size := int((await self._reader.readuntil(b"\r\n"))[:-2], 16):
                await self._exactly(size, pieces, pace)
                if await self._reader.readexactly(2) != b"\r\n":
                    raise NoAnswer("a chunk is longer than it says")
            if await self._reader.readexactly(2) != b"\r\n":
                raise NoAnswer("something follows the last chunk")
            return End.CLEAN
        if "content-length" in headers:
            await self._exactly(int(headers["content-length"]), pieces, pace)
            return End.CLEAN
        while piece := await self._reader.read(LIMIT):
            pieces.append(piece)
            if pace is not None:
                await pace(len(piece))
        return End.CLOSED

    async def _exactly(self, size: int, pieces: list[bytes], pace: Pace | None) -> None:
        while size:
            try:
                piece = await self._reader.readexactly(size if pace is None else min(size, LIMIT // 4))
            except asyncio.IncompleteReadError as cut:
                pieces.append(cut.partial)
                raise
            pieces.append(piece)
            size -= len(piece)
            if pace is not None:
                await pace(len(piece))
