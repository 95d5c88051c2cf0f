"""A client in bytes: it sends what it likes, and takes nothing but answers that h11 and a strict eye take for HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
from dataclasses import dataclass
from typing import Any

import h11

DEADLINE_SECS = 10.0
"""Nothing takes so long, even where others use the processor."""

_STATUS_LINE = re.compile(rb"HTTP/1\.[01] [1-5][0-9][0-9] [\t\x20-\x7e\x80-\xff]*")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_READ_BYTES = 1 << 16
_ERROR_FIELDS = {"message", "type", "param", "code"}


@dataclass
class Answer:
    """One answer. `complete` if it ended as its framing says."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes
    complete: bool
    informed: list[int]
    """The statuses of what came before it (100 Continue)."""

    def all(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name.lower()]

    def get(self, name: str) -> str | None:
        values = self.all(name)
        assert len(values) < 2, f"{name} stands there {len(values)} times"
        return values[0] if values else None

    @property
    def error(self) -> dict[str, Any]:
        value = json.loads(self.body)
        assert set(value) <= {"error", "type", "request_id"}
        error: dict[str, Any] = value["error"]
        assert set(error) == _ERROR_FIELDS
        assert error["message"]
        assert error["type"]
        return error

    @property
    def code(self) -> str | None:
        """The error's; None if it is none of the proxy's."""
        return self.error["code"] if self.status >= 400 else None


class Client:
    """One connection to the proxy."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.was_reset = False
        self._left = b""
        """Received and not looked at yet."""

    @classmethod
    async def connect(cls, port: int, receive_bytes: int | None = None) -> Client:
        connected = socket.socket()
        try:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if receive_bytes is not None:
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            connected.setblocking(False)
            await asyncio.get_running_loop().sock_connect(connected, ("127.0.0.1", port))
        except BaseException:
            connected.close()
            raise
        return cls(*await asyncio.open_connection(sock=connected))

    def write(self, data: bytes) -> None:
        """Send without waiting for it."""
        self.writer.write(data)

    async def send(self, *pieces: bytes) -> None:
        """Send, each piece in a segment of its own; a proxy that has hung up is no error here."""
        for piece in pieces:
            if self.writer.transport.is_closing():
                return
            self.writer.write(piece)
            try:
                await self.writer.drain()
            except ConnectionError:
                return
            if len(pieces) > 1:
                await asyncio.sleep(0)

    def half_close(self) -> None:
        with contextlib.suppress(OSError):  # The other side may have reset the connection.
            self.writer.write_eof()

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        """Close as a machine does that is switched off."""
        connected = self.writer.get_extra_info("socket")
        if connected is not None and connected.fileno() >= 0:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def read(self) -> bytes:
        """What comes next; nothing at the end."""
        if self._left:
            data, self._left = self._left, b""
            return data
        try:
            return await asyncio.wait_for(self.reader.read(_READ_BYTES), DEADLINE_SECS)
        except ConnectionError:
            self.was_reset = True
            return b""

    async def rest(self) -> bytes:
        """What still comes until the other side closes."""
        rest = b""
        while data := await self.read():
            rest += data
        return rest

    async def bytes(self, count: int) -> bytes:
        """So many bytes, or fewer if the connection ends."""
        found = b""
        while len(found) < count and (data := await self.read()):
            found += data
        self._left = found[count:] + self._left
        return found[:count]

    async def until(self, end: bytes) -> bytes:
        """What comes, up to these bytes and with what came in one read with them."""
        found = b""
        while end not in found:
            data = await self.read()
            assert data, found
            found += data
        return found

    def put_back(self, data: bytes) -> None:
        """It is read again, before all else."""
        self._left = data + self._left

    async def answer(self, method: str = "POST") -> Answer | None:
        """One answer, or what there is of it; None if the connection ends before it begins."""
        reading = Reading(method)
        while reading.answer is None:
            data = await self.read()
            reading.feed(data, self.was_reset)
            if not data:
                break
        self._left = reading.left
        return reading.answer


class Reading:
    """Takes one answer from the bytes that come. Fails where they are none."""

    def __init__(self, method: str) -> None:
        self.answer: Answer | None = None
        self.left = b""
        """What has come behind it."""
        self._parser = h11.Connection(h11.CLIENT)
        self._parser.send(h11.Request(method=method, target="/", headers=[("Host", "h")]))
        self._parser.send(h11.EndOfMessage())
        self._raw = b""
        self._head: h11.Response | None = None
        self._body = bytearray()
        self._informed: list[int] = []

    def feed(self, data: bytes, was_reset: bool = False) -> None:
        """Take what has come; nothing at the end."""
        self._raw += data if self._head is None else b""
        self._parser.receive_data(data)
        try:
            while self.answer is None and self._step(not (was_reset and not data)):
                pass
        except h11.RemoteProtocolError as error:
            if data:
                raise AssertionError(f"not HTTP: {error}: {self._raw[-300:]!r}") from error
            if self._head is not None:
                self._end(False)
            else:
                assert not self._raw, "half a head"

    def _step(self, may_end: bool) -> bool:
        """One event; False if there is none."""
        event = self._parser.next_event()
        if isinstance(event, h11.InformationalResponse):
            self._informed.append(event.status_code)
        elif isinstance(event, h11.Response):
            self._head = event
            _assert_strict(self._raw, len(self._informed))
        elif isinstance(event, h11.Data):
            self._body += event.data
        elif isinstance(event, h11.EndOfMessage):
            self.left = self._parser.trailing_data[0]
            self._end(may_end)
        else:
            assert event is h11.NEED_DATA, f"not an answer: {event!r}: {self._raw!r}"
            return False
        return True

    def _end(self, complete: bool) -> None:
        assert self._head is not None
        self.answer = _made(self._head, bytes(self._body), complete, self._informed)


def answers_in(raw: bytes, methods: list[str]) -> list[Answer]:
    """All answers that came over a connection that has ended; the last may be a part. To GETs, where there are more."""
    found: list[Answer] = []
    while raw:
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        reading = _read_from(raw, method)
        if method == "HEAD" and reading.left and not reading.left.startswith(b"HTTP/1."):
            # It was refused before it was known to be a HEAD: the last answer may then have a body.
            reading = _read_from(raw, "GET")
            assert not reading.left
        assert reading.answer is not None
        found.append(reading.answer)
        raw = reading.left
    return found


def _read_from(raw: bytes, method: str) -> Reading:
    reading = Reading(method)
    reading.feed(raw)
    if reading.answer is None:
        reading.feed(b"")
    return reading


def _made(head: h11.Response, body: bytes, complete: bool, informed: list[int]) -> Answer:
    headers = [(name.decode(), value.decode("latin-1")) for name, value in head.headers]
    answer = Answer(head.status_code, headers, body, complete, informed)
    assert answer.get("x-request-id")
    assert answer.all("server-timing")
    return answer


def _assert_strict(raw: bytes, informational: int) -> None:
    """h11 forgives bare line feeds and more; nothing of that is sent."""
    heads = raw.split(b"\r\n\r\n")[: informational + 1]
    for head in heads:
        first, *lines = head.split(b"\r\n")
        assert _STATUS_LINE.fullmatch(first), first
        for line in lines:
            assert _FIELD.fullmatch(line), line
    names = [line.partition(b":")[0].lower() for line in heads[-1].split(b"\r\n")[1:]]
    assert names.count(b"content-length") + names.count(b"transfer-encoding") < 2


def request(first: str, *headers: str, body: bytes = b"") -> bytes:
    """A request with these lines and no others."""
    return "\r\n".join([first, *headers, "", ""]).encode("latin-1") + body


def post(body: bytes = b'{"model": "a"}', *headers: str, target: str = "/v1/completions") -> bytes:
    """A well-formed POST of JSON."""
    length = f"Content-Length: {len(body)}"
    return request(f"POST {target} HTTP/1.1", "Host: h", "Content-Type: application/json", length, *headers, body=body)


def get(target: str, *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    """A well-formed request without a body."""
    return request(f"{method} {target} HTTP/{version}", "Host: h", *headers)
