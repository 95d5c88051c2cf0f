"""Looking for a few keys of a large JSON object without decoding the rest. Pure.

A body of 64 MiB is mostly one string. Decoding it would hold the event loop up for a second; here strings and nested
values are skipped at the speed of a memory search, and whoever looks is asked to come again after every millisecond
or so, whatever the body is made of. What is skipped is not checked: the engine does that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Generator
from typing import Any

_SPACE = re.compile(rb"[ \t\r\n]*")
_NO_BRACKET = re.compile(rb'[^"{}\[\]]*')
_LITERAL = re.compile(rb"[^,\]} \t\r\n]*")
_QUOTE, _BACKSLASH, _COMMA, _COLON = b'"\\,:'
_OPEN, _CLOSE, _OPEN_LIST, _CLOSE_LIST = b"{}[]"

_STEPS = 500
"""Steps, of a microsecond or two each, from one pause to the next."""

_MAX_DEPTH = 1000
"""About what Python's own parser, which is vLLM's, can follow."""

_MAX_PAUSES = 20_000
"""Nobody's body is worth more time than this, which is some ten seconds: an engine would take as long to read it."""

_STEPS_PER_MEMBER = 4
_BYTES_PER_STEP = 256
_SLICE_BYTES = 64 * 1024
"""What a pattern is held against at once."""

_STRING_SLICE_BYTES = 2 * 1024 * 1024
"""What is searched for the end of a string at once."""

_KEY_BYTES = 256
_VALUE_BYTES = 16 * 1024


class _Scanner:
    """Where it is in the body."""

    def __init__(self, body: bytes | bytearray) -> None:
        self.body = body
        self.at = 0
        self._steps = 0
        self._pauses = 0

    def tired(self, steps: int = 1) -> bool:
        """Whether it is time for a pause."""
        self._steps += steps
        if self._steps < _STEPS:
            return False
        self._pauses += 1
        if self._pauses > _MAX_PAUSES:
            raise ValueError(f"it has too many parts: {self.at} bytes of it took {self._pauses * _STEPS} steps")
        self._steps = 0
        return True

    def byte(self) -> int:
        """The next one. Raises ValueError at the end."""
        if self.at >= len(self.body):
            raise ValueError(f"it ends at byte {self.at}, in the middle of a value")
        return self.body[self.at]

    def skip(self, pattern: re.Pattern[bytes]) -> Generator[None, None, None]:
        """Skip what matches, however long it is."""
        step = _SLICE_BYTES
        while step == _SLICE_BYTES:
            found = pattern.match(self.body, self.at, self.at + _SLICE_BYTES)
            step = found.end() - self.at if found else 0
            self.at += step
            if self.tired(1 + step // _BYTES_PER_STEP):
                yield

    def space(self) -> Generator[None, None, int]:
        """Skip white space; the byte that follows it."""
        if self.byte() <= 0x20:
            yield from self.skip(_SPACE)
        return self.byte()

    def take(self, wanted: int) -> Generator[None, None, None]:
        """The next byte has to be this one."""
        if (yield from self.space()) != wanted:
            raise ValueError(f"expected {chr(wanted)!r} at byte {self.at}")
        self.at += 1

    def string(self) -> Generator[None, None, None]:
        """Skip the string that begins here."""
        body, at = self.body, self.at + 1
        while True:
            end = body.find(b'"', at, at + _STRING_SLICE_BYTES)
            if end < 0:
                at += _STRING_SLICE_BYTES
                if at >= len(body):
                    raise ValueError(f"the string at byte {self.at} has no end")
                yield
                continue
            if body[end - 1] != _BACKSLASH or not (yield from self._is_escaped(end)):
                self.at = end + 1
                return
            at = end + 1

    def _is_escaped(self, quote: int) -> Generator[None, None, bool]:
        """Whether the quote there belongs to the string: the backslashes before it escape each other, too."""
        at = quote - 1
        while self.body[at] == _BACKSLASH:
            at -= 1
            if self.tired():
                yield
        return (quote - at) % 2 == 0

    def value(self) -> Generator[None, None, None]:
        """Skip the value that begins here."""
        start = self.at
        first = self.byte()
        if first == _QUOTE:
            yield from self.string()
        elif first in (_OPEN, _OPEN_LIST):
            yield from self._nested()
        else:
            yield from self.skip(_LITERAL)
            if self.at == start:
                raise ValueError(f"expected a value at byte {self.at}")

    def _nested(self) -> Generator[None, None, None]:
        depth = 0
        while True:
            byte = self.byte()
            if byte == _QUOTE:
                yield from self.string()
            else:
                depth += 1 if byte in (_OPEN, _OPEN_LIST) else -1
                self.at += 1
                if depth == 0:
                    return
                if depth > _MAX_DEPTH:
                    raise ValueError(f"it is nested too deeply at byte {self.at}")
            yield from self.skip(_NO_BRACKET)


def find_keys(body: bytes | bytearray, wanted: Collection[str]) -> Generator[None, None, dict[str, Any]]:
    """The values of those keys of the object, of several of a name the last; to be resumed until it returns them.

    Raises ValueError if it is no object, or no JSON as far as it was looked at.
    """
    scanner = _Scanner(body)
    found: dict[str, tuple[int, int]] = {}
    yield from scanner.take(_OPEN)
    if (yield from scanner.space()) == _CLOSE:
        return {}
    while True:
        if (yield from scanner.space()) != _QUOTE:
            raise ValueError(f"expected a key at byte {scanner.at}")
        start = scanner.at
        yield from scanner.string()
        key = _key(body, start, scanner.at)
        yield from scanner.take(_COLON)
        yield from scanner.space()
        start = scanner.at
        yield from scanner.value()
        if key in wanted:
            found[key] = start, scanner.at
        if (yield from scanner.space()) == _CLOSE:
            return {key: _value(body, key, *span) for key, span in found.items()}
        yield from scanner.take(_COMMA)
        if scanner.tired(_STEPS_PER_MEMBER):
            yield


def _key(body: bytes | bytearray, start: int, end: int) -> str:
    """The key that stands there. Nearly all of them are spelled as they are."""
    if end - start > _KEY_BYTES:
        return ""
    spelled = bytes(body[start + 1 : end - 1])
    return str(json.loads(body[start:end].decode())) if b"\\" in spelled else spelled.decode()


def _value(body: bytes | bytearray, key: str, start: int, end: int) -> Any:
    if end - start > _VALUE_BYTES:
        raise ValueError(f"`{key}` is too long")
    return json.loads(body[start:end].decode())
