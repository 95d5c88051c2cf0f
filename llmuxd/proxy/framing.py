"""Where a body ends: counted, chunked, or with its connection (RFC 9112, 6 and 7). Pure.

Bytes are not changed and not kept. A `feed` says how many of them belong to the body, so that a relay can pass them
on as they are and still knows where it stands; a reader gives a place for the payload.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from enum import Enum

from llmuxd.proxy.http1 import BadMessage, ResponseHead, is_field_line
from llmuxd.proxy.memo import remember

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?\r\n")
_SIZE_LINE_BEGINS = re.compile(rb"[0-9A-Fa-f]{1,15}[ \t]*(;[\t\x20-\x7e\x80-\xff]*)?\r?")
_MAX_LINE_BYTES = 4096
_MAX_TRAILER_BYTES = 16 * 1024
_BODILESS = (204, 304)

_MAX_KNOWN_BYTES = 16
_sizes: dict[bytes, int] = {}
"""Size line -> size, of lines that were checked before; never of the last chunk."""


class Counted:
    """A body of so many bytes."""

    __slots__ = ("_rest", "ended")
    framed = True
    """A reader can tell its end from a connection that broke."""

    def __init__(self, length: int) -> None:
        self._rest = length
        self.ended = length == 0

    @property
    def between(self) -> bool:
        """Nothing can be put into it anywhere."""
        return False

    def feed(self, data: bytes, payload: Callable[[bytes], object] | None = None) -> int:
        """Take what has come; how much of it belongs to the body."""
        taken = min(self._rest, len(data))
        self._rest -= taken
        self.ended = self._rest == 0
        if payload is not None:
            payload(data if taken == len(data) else data[:taken])
        return taken


class UntilClose:
    """A body that ends when its connection does."""

    __slots__ = ("ended",)
    framed = False

    def __init__(self) -> None:
        self.ended = False

    @property
    def between(self) -> bool:
        """Anything can be put between any two bytes."""
        return True

    def feed(self, data: bytes, payload: Callable[[bytes], object] | None = None) -> int:
        """Take what has come: all of it belongs to the body."""
        if payload is not None:
            payload(data)
        return len(data)


class _At(Enum):
    SIZE = "a line with a chunk's size"
    DATA = "a chunk's data"
    DATA_END = "the line break after it"
    TRAILER = "a line of the trailer, or the empty one that ends all"


# An enum's member costs more to look up than most of what is done with it here.
_SIZE, _DATA, _DATA_END, _TRAILER = _At


class Chunked:
    """A chunked body."""

    __slots__ = ("_at", "_line", "_rest", "_trailer", "ended", "whole")
    framed = True

    def __init__(self) -> None:
        self._at = _SIZE
        self._rest = 0
        self._line = b""
        """The beginning of a line that is not complete."""
        self._trailer = 0
        self.whole = 0
        """Up to where, in what was fed last, there are whole chunks."""
        self.ended = False

    @property
    def between(self) -> bool:
        """It stands between two chunks, where another one can be put."""
        return self._at is _SIZE and not self._line and not self.ended

    def feed(self, data: bytes, payload: Callable[[bytes], object] | None = None) -> int:
        """Take what has come; how much of it belongs to the body. Raises BadMessage where it is no chunk."""
        at, end = 0, len(data)
        self.whole = 0
        while at < end and not self.ended:
            if self._at is _SIZE and not self._line:
                # Most often a read is one whole chunk, and few sizes come again and again.
                start = data.find(b"\n", at) + 1
                stop = start + _sizes.get(data[at:start], end)
                if data.startswith(b"\r\n", stop):
                    if payload is not None:
                        payload(data[start:stop])
                    at = self.whole = stop + 2
                    continue
            if self._at is _DATA:
                stop = min(at + self._rest, end)
                if payload is not None:
                    payload(data[at:stop])
                self._rest -= stop - at
                at = stop
                if not self._rest:
                    self._at = _DATA_END
                continue
            stop = data.find(b"\n", at) + 1
            line = self._line + data[at : stop or end]
            at = stop or end
            if not stop:
                self._line = line
                if self._at is _SIZE and not _SIZE_LINE_BEGINS.fullmatch(line):
                    raise BadMessage("a chunk has no valid size", 400, "invalid_body")
                if self._at is _DATA_END and line != b"\r":
                    raise BadMessage("a chunk is not as long as it says", 400, "invalid_body")
            if len(line) > _MAX_LINE_BYTES:
                raise BadMessage("a line between chunks is too long", 400, "invalid_body")
            if stop:
                self._line = b""
                self._take(line)
                if self.ended or self._at is _SIZE:
                    self.whole = at
        return at

    def _take(self, line: bytes) -> None:
        if self._at is _DATA_END:
            if line != b"\r\n":
                raise BadMessage("a chunk is not as long as it says", 400, "invalid_body")
            self._at = _SIZE
        elif self._at is _SIZE:
            found = _SIZE_LINE.fullmatch(line)
            if found is None:
                raise BadMessage("a chunk has no valid size", 400, "invalid_body")
            self._rest = int(found[1], 16)
            self._at = _DATA if self._rest else _TRAILER
            if self._rest and len(line) <= _MAX_KNOWN_BYTES:
                remember(_sizes, line, self._rest)
        else:
            self._trailer += len(line)
            if line == b"\r\n":
                self.ended = True
            elif self._trailer > _MAX_TRAILER_BYTES or not is_field_line(line):
                raise BadMessage("the trailer of a chunked body is not valid", 400, "invalid_body")


Framing = Counted | Chunked | UntilClose


def framing_of(head: ResponseHead, method: str) -> Framing:
    """How the body of an answer to such a request ends."""
    if method == "HEAD" or head.status in _BODILESS:
        return Counted(0)
    if head.chunked:
        return Chunked()
    return UntilClose() if head.length is None else Counted(head.length)


def chunk(data: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK = b"0\r\n\r\n"
