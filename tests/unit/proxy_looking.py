"""What drives the generators that look into bodies, and counts what they do between two pauses. No clock is asked."""

from __future__ import annotations

import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar

import pytest

from llmuxd.proxy import extract, scan
from llmuxd.proxy.errors import Rejected
from llmuxd.proxy.extract import Wanted, look

T = TypeVar("T")

JSON = "application/json"
FORM = "multipart/form-data; boundary=xyz"
FORM_END = b"--xyz--\r\n"


def part(name: str, value: bytes, extra: str = "") -> bytes:
    """A field of a form, or a file."""
    return f'--xyz\r\nContent-Disposition: form-data; name="{name}"{extra}\r\n\r\n'.encode() + value + b"\r\n"


def drive(steps: Generator[None, None, T]) -> T:
    """Resume it until it returns."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def wanted(body: bytes, content_type: str = JSON, *, named: str | None = None, query: str = "", encoded: bool = False):
    """What a request with that body asks for: (model, stream). Raises Rejected."""
    return drive(look(named, query, content_type, encoded, bytearray(body)))


def code_of(body: bytes, content_type: str = JSON, **others) -> str:
    """Why a request with that body is refused."""
    with pytest.raises(Rejected) as rejected:
        wanted(body, content_type, **others)
    assert rejected.value.status == 400
    return rejected.value.code


def outcome(body: bytes, content_type: str = JSON, **others) -> Wanted | str:
    """What it asks for, or why it is refused."""
    try:
        return wanted(body, content_type, **others)
    except Rejected as rejected:
        return rejected.code


@dataclass
class Work:
    """What was done from one pause to the next."""

    searched: int = 0
    """Bytes through which a search of memory went: some 10 in a nanosecond."""
    matched: int = 0
    """Bytes that were held against a pattern: less than one in a nanosecond."""
    calls: int = 0
    """Of each kind; each takes about as long as a few hundred bytes of a pattern."""


class _Body(bytearray):
    work: Work

    def find(self, wanted: bytes, start: int = 0, stop: int | None = None) -> int:  # type: ignore[override]
        found = super().find(wanted, start, stop)
        self.work.searched += max(0, (min(len(self), stop or len(self)) if found < 0 else found) - start)
        self.work.calls += 1
        return found

    def __getitem__(self, at):
        self.work.calls += 1
        return super().__getitem__(at)


class _Pattern:
    def __init__(self, pattern: re.Pattern[bytes], body: _Body) -> None:
        self._pattern = pattern
        self._body = body

    def match(self, body: bytes, at: int = 0, stop: int | None = None) -> re.Match[bytes] | None:
        found = self._pattern.match(body, at, len(body) if stop is None else stop)
        if body is self._body:
            # What does not match in the end may have been held against it up to there.
            self._body.work.matched += found.end() - at if found else 64
            self._body.work.calls += 1
        return found


def work_of(monkeypatch: pytest.MonkeyPatch, body: bytes, content_type: str = JSON) -> list[Work]:
    """What looking into that body does, pause by pause, whatever comes of it."""
    counted = _Body(body)
    for module, names in ((scan, ("_SPACE", "_NO_BRACKET", "_LITERAL")), (extract, ("_DELIMITER_END",))):
        for name in names:
            monkeypatch.setattr(module, name, _Pattern(getattr(module, name), counted))
    steps, done, ended = look(None, "", content_type, False, counted), [], False
    while not ended:
        counted.work = Work()
        try:
            next(steps)
        except (StopIteration, Rejected):
            ended = True
        done.append(counted.work)
    monkeypatch.undo()
    return done
