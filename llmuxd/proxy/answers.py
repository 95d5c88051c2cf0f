"""The answers that are given here, as bytes. What they say is said elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from http import HTTPStatus

from llmuxd.gate import Refused
from llmuxd.proxy.errors import error_body
from llmuxd.proxy.headers import connection_line
from llmuxd.proxy.http1 import RequestHead

_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole answer, JSON if it has a body."""

    status: int
    body: bytes = b""
    added: bytes = b""
    """Further lines of its head."""


def error_answer(refused: Refused, anthropic: bool = False) -> Answer:
    """With Retry-After in whole seconds where waiting helps."""
    added = b""
    if refused.retry_after is not None:
        added = b"Retry-After: %d\r\n" % max(0, math.ceil(refused.retry_after))
    if refused.status == 401:
        added += b"WWW-Authenticate: Bearer\r\n"
    elif refused.status == 405:
        # Only what is answered here minds the method, and that is read.
        added += b"Allow: GET, HEAD, OPTIONS\r\n"
    return Answer(refused.status, error_body(refused, anthropic), added)


def written(answer: Answer, added: bytes, keeps: bool, head: RequestHead | None = None) -> bytes:
    """The answer to a request with that head, or to what was none. `added` are lines that every answer has."""
    sent = b"HTTP/1.1 %d %b\r\n" % (answer.status, _REASONS.get(answer.status, b""))
    if answer.body:
        sent += b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(answer.body)
    sent += answer.added + added + connection_line(keeps, 1 if head is None else head.minor) + b"\r\n"
    return sent if head is not None and head.method == "HEAD" else sent + answer.body
