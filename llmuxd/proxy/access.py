"""What is noted of each request, and the access log: one line each, with fields in the journal. Never what was asked
or answered, and never a key.

Lines are put together and written a moment later, many at once: a log that costs a system call per request would cost
more than the request.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import deque
from collections.abc import Callable, Sequence

from llmuxd.proxy.headers import server_timing

log = logging.getLogger("llmuxd.access")

NONE = "-"
CLIENT_LEFT = 499
"""Counted and logged for a client that left before its answer was complete; never sent."""

NOT_QUEUED = server_timing(0.0, 0.0)

FLUSH_SECS = 0.2
_FLUSH_LINES = 500

_KEPT_BYTES = 4096
_KEPT_READS = 4
"""Usage stands at the end of an answer: in a stream, in one of its last events."""

_USAGE = re.compile(rb'"usage"\s*:\s*\{')
_PROMPT = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*([0-9]{1,12})[^0-9]')
_COMPLETION = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*([0-9]{1,12})[^0-9]')


class Call:
    """One request, as it is counted and logged. Durations in seconds."""

    __slots__ = (
        "_kept",
        "_since",
        "added",
        "bytes_in",
        "bytes_out",
        "first_byte",
        "id",
        "key_name",
        "method",
        "model",
        "path",
        "queue_secs",
        "status",
        "switch_secs",
        "total",
    )

    def __init__(self, id_: str, method: str = NONE, path: str = NONE) -> None:
        self.id = id_
        self.method = method
        self.path = path
        """Without its query, which may be anything."""
        self.added = b""
        """Further lines that every answer's head has."""
        self.key_name = NONE
        self.model = NONE
        """A configured name, never what a client sent."""
        self.status = CLIENT_LEFT
        self.queue_secs = 0.0
        self.switch_secs = 0.0
        self.first_byte: float | None = None
        """From the request's head to the first byte of the engine's answer."""
        self.bytes_in = 0
        self.bytes_out = 0
        """Of the body of the answer, as the engine sent it."""
        self.total = 0.0
        self._since = time.monotonic()
        self._kept: deque[bytes] = deque(maxlen=_KEPT_READS)

    def waits(self) -> None:
        """It has not been forwarded yet."""
        self.queue_secs = time.monotonic() - self._since

    def begins(self) -> None:
        """The engine's answer begins."""
        self.first_byte = time.monotonic() - self._since

    def sent(self, data: bytes) -> None:
        """These bytes of the engine's answer go to the client."""
        self.bytes_out += len(data)
        self._kept.append(data[-_KEPT_BYTES:])

    def fields(self) -> bytes:
        """The lines that every answer's head has."""
        timing = server_timing(self.queue_secs, self.switch_secs) if self.queue_secs else NOT_QUEUED
        return f"x-request-id: {self.id}\r\nServer-Timing: {timing}\r\n".encode() + self.added

    def end(self) -> None:
        """It is over."""
        self.total = time.monotonic() - self._since

    def line(self) -> str:
        """As it stands in the log."""
        prompt, completion = usage(self._kept[0] if len(self._kept) == 1 else b"".join(self._kept))
        first = NONE if self.first_byte is None else f"{self.first_byte:.3f}"
        return (
            f"id={self.id} key={_plain(self.key_name)} model={_plain(self.model)} method={self.method} "
            f"path={self.path} status={self.status} queue={self.queue_secs:.3f} switch={self.switch_secs:.3f} "
            f"first_byte={first} total={self.total:.3f} in={self.bytes_in} out={self.bytes_out} "
            f"prompt_tokens={prompt} completion_tokens={completion}"
        )

    def journal_fields(self) -> dict[str, str]:
        """As it stands in the journal, beside the line: each part under a name of its own, those that say something."""
        prompt, completion = usage(b"".join(self._kept))
        fields = {
            "REQUEST_ID": self.id,
            "KEY_NAME": self.key_name,
            "MODEL": self.model,
            "METHOD": self.method,
            "URL_PATH": self.path,
            "STATUS": str(self.status),
            "QUEUE_SECS": f"{self.queue_secs:.3f}",
            "SWITCH_SECS": f"{self.switch_secs:.3f}",
            "FIRST_BYTE_SECS": NONE if self.first_byte is None else f"{self.first_byte:.3f}",
            "TOTAL_SECS": f"{self.total:.3f}",
            "BYTES_IN": str(self.bytes_in),
            "BYTES_OUT": str(self.bytes_out),
            "PROMPT_TOKENS": prompt,
            "COMPLETION_TOKENS": completion,
        }
        return {name: value for name, value in fields.items() if value != NONE}


def usage(tail: bytes) -> tuple[str, str]:
    """The tokens of prompt and answer that the end of an answer tells, or `-`.

    Text of a model is no usage, whatever it says: in it each quote has a backslash before it. A word of it, as tokens
    behind the usage have, is just the word.
    """
    at = tail.rfind(b'"usage"')
    while at >= 0 and _USAGE.match(tail, at) is None:
        at = tail.rfind(b'"usage"', 0, at)
    if at < 0:
        return NONE, NONE
    prompt, completion = _PROMPT.search(tail, at), _COMPLETION.search(tail, at)
    return (
        NONE if prompt is None else prompt[1].decode(),
        NONE if completion is None else completion[1].decode(),
    )


def _plain(name: str) -> str:
    """A name that may have spaces, as one word."""
    return json.dumps(name) if " " in name or '"' in name else name


Writer = Callable[[Sequence[Call]], None]


def log_each(calls: Sequence[Call]) -> None:
    """The writer of a program that has set up Python's logging."""
    for call in calls:
        log.info("%s", call.line())


class AccessLog:
    """Collects requests that are over and hands them to `write`, in their order, a moment later."""

    def __init__(self, loop: asyncio.AbstractEventLoop, write: Writer) -> None:
        self._loop = loop
        self._write = write
        self._calls: list[Call] = []
        self._timer: asyncio.TimerHandle | None = None

    def add(self, call: Call) -> None:
        """A request is over."""
        self._calls.append(call)
        if len(self._calls) >= _FLUSH_LINES:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(FLUSH_SECS, self.flush)

    def flush(self) -> None:
        """Write what there is."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        calls, self._calls = self._calls, []
        if calls:
            self._write(calls)
