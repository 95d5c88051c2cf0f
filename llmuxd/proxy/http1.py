"""The heads of HTTP/1.x messages (RFC 9112): reading them strictly, and saying how their bodies are framed. Pure.

What can be read in two ways is not read at all: where two programs in a row may disagree about where a message ends,
a second request can hide in the body of a first. So there is one spelling of everything that frames: lines end in
CRLF, a field has one name and one line, a length is digits, the only transfer coding is `chunked`, and never both.
Bodies are in `framing`, what a request may ask for in `routes`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TypeVar

from llmuxd.proxy.memo import remember

MAX_FIELDS = 100
"""More fields than any client sends; each costs time wherever heads are read."""

HEAD_END = b"\r\n\r\n"

_REQUEST_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([1-5][0-9]{2})(?: ([\t\x20-\x7e\x80-\xff]*))?")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([\t\x20-\x7e\x80-\xff]*)")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_NO_TEXT = bytes(set(range(256)) - set(range(0x20, 0x7F)) - set(range(0x80, 0x100)) - {0x09, 0x0D, 0x0A})
"""What stands in no head: control characters."""

_ONCE = frozenset(
    {
        b"authorization",
        b"content-length",
        b"content-type",
        b"expect",
        b"host",
        b"model-override",
        b"transfer-encoding",
        b"upgrade",
        b"x-api-key",
        b"x-llmux-priority",
        b"x-llmux-wait",
        b"x-request-id",
    }
)
"""Fields that decide something: given twice, there is no telling which one another program goes by."""

_SECRET = frozenset({b"authorization", b"cookie", b"proxy-authorization", b"x-api-key"})
_MAX_KNOWN_BYTES = 128
_fields: dict[bytes, tuple[bytes, bytes]] = {}
"""Line -> name in lower case and value, of lines that were read before: most lines come again and again."""

_request_lines: dict[bytes, tuple[str, str, int]] = {}
"""Request line -> method, target, and the minor version."""

_status_lines: dict[bytes, tuple[int, bytes, int]] = {}
"""Status line -> status, reason, and the minor version."""

_T = TypeVar("_T")


class BadMessage(Exception):
    """Not HTTP as it is spoken here. `status` and `code` are those of the answer, if it was a request."""

    def __init__(self, message: str, status: int = 400, code: str = "bad_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Head:
    """The fields of a message.

    `lines` has each line as it was sent, with its name in lower case before it; `values` the value of each name,
    several joined by commas.
    """

    __slots__ = ("chunked", "length", "lines", "minor", "values")

    def __init__(self, minor: int, lines: Iterable[bytes]) -> None:
        self.minor = minor
        """Of HTTP/1.x."""
        self.lines: list[tuple[bytes, bytes]] = []
        self.values: dict[bytes, bytes] = {}
        values, add = self.values, self.lines.append
        for line in lines:
            name, value = _fields.get(line) or _read_field(line)
            add((name, line))
            if name not in values:
                values[name] = value
            elif name in _ONCE:
                raise BadMessage(f"the field {name.decode()} is there twice")
            else:
                values[name] += b", " + value
        self.chunked = False
        """The body is chunked."""
        self.length: int | None = None
        """How many bytes the body has, if it says so."""
        self._find_framing()

    def _find_framing(self) -> None:
        coding, length = self.values.get(b"transfer-encoding"), self.values.get(b"content-length")
        if coding is not None:
            if self.minor == 0:
                raise BadMessage("HTTP/1.0 has no Transfer-Encoding")
            if length is not None:
                raise BadMessage("both Content-Length and Transfer-Encoding")
            if coding.lower() != b"chunked":
                raise BadMessage("the only transfer coding here is chunked", 501, "unsupported_transfer_encoding")
            self.chunked = True
        elif length is not None:
            if not _LENGTH.fullmatch(length):
                raise BadMessage("Content-Length is not a number")
            self.length = int(length)

    def tokens(self, name: bytes) -> list[bytes]:
        """The members of a list, in lower case."""
        value = self.values.get(name)
        return [] if value is None else [part.strip(b" \t").lower() for part in value.split(b",")]


class RequestHead(Head):
    """The head of a request. Without `length` and not `chunked` it has no body."""

    __slots__ = ("keep_alive", "method", "target")

    def __init__(self, method: str, target: str, minor: int, lines: Iterable[bytes]) -> None:
        super().__init__(minor, lines)
        self.method = method
        self.target = target
        if minor and b"host" not in self.values:
            raise BadMessage("no Host")
        self.keep_alive = minor > 0
        """The client wants to use the connection again."""
        if b"connection" in self.values:
            options = self.tokens(b"connection")
            self.keep_alive = b"close" not in options and (minor > 0 or b"keep-alive" in options)

    def text(self, name: bytes) -> str | None:
        """The value of a field as text."""
        value = self.values.get(name)
        return None if value is None else value.decode("utf-8", "replace")


class ResponseHead(Head):
    """The head of an answer. Without `length` and not `chunked` its body ends with the connection."""

    __slots__ = ("reason", "status")

    def __init__(self, status: int, reason: bytes, minor: int, lines: Iterable[bytes]) -> None:
        super().__init__(minor, lines)
        self.status = status
        self.reason = reason


def parse_request(block: bytes) -> RequestHead:
    """A request's head, without the empty line that ends it. Raises BadMessage."""
    first, *lines = _lines(block)
    known = _request_lines.get(first)
    if known is None:
        known = _read_request_line(first)
        _remember(_request_lines, first, known)
    return RequestHead(*known, lines)


def _read_request_line(line: bytes) -> tuple[str, str, int]:
    found = _REQUEST_LINE.fullmatch(line)
    if found is None:
        raise _fault(line, "the request line is not METHOD TARGET HTTP/1.1")
    method, target, major, minor = found.groups()
    if major != b"1" or minor not in b"01":
        raise BadMessage("only HTTP/1.0 and HTTP/1.1 are spoken here", 400, "unsupported_version")
    return method.decode(), target.decode(), int(minor)


def parse_response(block: bytes) -> ResponseHead:
    """An answer's head, without the empty line that ends it. Raises BadMessage."""
    first, *lines = _lines(block)
    known = _status_lines.get(first)
    if known is None:
        found = _STATUS_LINE.fullmatch(first)
        if found is None:
            raise _fault(first, "the status line is not HTTP/1.1 STATUS REASON")
        known = int(found[2]), found[3] or b"", int(found[1])
        _remember(_status_lines, first, known)
    return ResponseHead(*known, lines)


def is_field_line(line: bytes) -> bool:
    """Whether this is a field and its line break, as they stand in heads and trailers."""
    return line.endswith(b"\r\n") and _FIELD.fullmatch(line, 0, len(line) - 2) is not None


def _lines(block: bytes) -> list[bytes]:
    """The lines. Each is checked by whoever reads it: a line break that is none stays in it."""
    lines = block.split(b"\r\n")
    if len(lines) > MAX_FIELDS + 1:
        raise BadMessage(f"more than {MAX_FIELDS} header fields", 431, "head_too_large")
    return lines


def _remember(known: dict[bytes, _T], line: bytes, read: _T) -> None:
    if len(line) <= _MAX_KNOWN_BYTES:
        remember(known, line, read)


def _read_field(line: bytes) -> tuple[bytes, bytes]:
    """A field's name, in lower case, and value. Raises BadMessage if it is none: so a folded line is found, too."""
    found = _FIELD.fullmatch(line)
    if found is None:
        shown = line[:40].decode("ascii", "backslashreplace")
        raise _fault(line, f"not a header field: {shown}")
    field = found[1].lower(), found[2].strip(b" \t")
    if field[0] not in _SECRET:
        _remember(_fields, line, field)
    return field


def _fault(line: bytes, otherwise: str) -> BadMessage:
    """What is wrong with a line."""
    if b"\n" in line or b"\r" in line:
        return BadMessage("a line of the head does not end in CRLF")
    if len(line.translate(None, _NO_TEXT)) != len(line):
        return BadMessage("a control character in the head")
    return BadMessage(otherwise)
