"""Which headers pass, in both directions, and the heads that are written. Pure."""

from __future__ import annotations

import random
import re

from llmuxd.proxy.http1 import Head, RequestHead, ResponseHead

MODEL_OVERRIDE = b"model-override"
REQUEST_ID = b"x-request-id"
MOST_WAIT = b"x-llmux-wait"
PRIORITY = b"x-llmux-priority"

_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
# The credentials are the clients' with this daemon, and so is the host. The length is that of the body as it is sent
# on, which is read whole before, so nobody waits for a 100. No engine is to take another method or path for the one
# that was checked here.
_NOT_FORWARDED = _HOP_BY_HOP | {
    b"authorization",
    b"x-api-key",
    b"cookie",
    b"host",
    b"content-length",
    b"expect",
    b"x-http-method",
    b"x-http-method-override",
    b"x-method-override",
    b"x-original-url",
    b"x-rewrite-url",
    MODEL_OVERRIDE,
    REQUEST_ID,
    MOST_WAIT,
    PRIORITY,
}
_NOT_ANSWERED = _HOP_BY_HOP | {
    REQUEST_ID,
    # Which pages may use this port is this daemon's to say.
    b"access-control-allow-credentials",
    b"access-control-allow-headers",
    b"access-control-allow-methods",
    b"access-control-allow-origin",
    b"access-control-expose-headers",
    b"access-control-max-age",
}
_NEVER_NAMED = frozenset({b"content-length", b"content-type"})
"""What no Connection field can take away: without them a body is something else."""

_HANDSHAKE = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")


def request_id(given: str | None) -> str:
    """The client's own, if it is one that may stand in any log; else a new one."""
    return given if given and _SANE_REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"


def seconds_of(given: str | None) -> float | None:
    """The value of x-llmux-wait: how long a client will wait; None if it does not say. Raises ValueError."""
    if given is None:
        return None
    if not _SECONDS.fullmatch(given.strip()):
        raise ValueError(given)
    return float(given)


def server_timing(queue_secs: float, switch_secs: float) -> str:
    """The value of Server-Timing, in milliseconds."""
    return f"queue;dur={queue_secs * 1000:.1f}, switch;dur={switch_secs * 1000:.1f}"


def to_engine(head: RequestHead, target: str, request_id: str, length: int, *, upgrade: bool = False) -> bytes:
    """The head of a client's request, as its engine gets it, for `target` and with a body of `length` bytes."""
    sent = [f"{head.method} {target} HTTP/1.1\r\nHost: localhost\r\nx-request-id: {request_id}".encode()]
    sent += _passed(head, _NOT_FORWARDED)
    if length or head.length is not None or head.chunked:
        sent.append(b"Content-Length: %d" % length)
    sent.append(_HANDSHAKE if upgrade else b"")
    return b"\r\n".join(sent) + b"\r\n"


def relayed_head(head: ResponseHead, added: bytes, keeps: bool, unframed: bool, minor: int) -> bytes:
    """The head of an engine's answer, as its client of HTTP/1.`minor` gets it.

    `added` are whole lines. The framing stays what it is, or (`unframed`) the end of the connection ends the answer.
    """
    sent = [b"HTTP/1.1 %d %b" % (head.status, head.reason)]
    sent += _passed(head, _NOT_ANSWERED)
    lines = b"\r\n".join(sent) + b"\r\n" + added
    if head.status == 101:
        return lines + _HANDSHAKE + b"\r\n"
    if head.chunked and not unframed:
        lines += b"Transfer-Encoding: chunked\r\n"
    return lines + connection_line(keeps, minor) + b"\r\n"


def stream_head(added: bytes, keeps: bool) -> bytes:
    """The head of an event stream, for a client that waits: whatever comes of it is said in events."""
    return (
        b"HTTP/1.1 200 OK\r\n"
        b"Content-Type: text/event-stream; charset=utf-8\r\n"
        b"Cache-Control: no-cache\r\n" + added + b"Transfer-Encoding: chunked\r\n" + connection_line(keeps, 1) + b"\r\n"
    )


def connection_line(keeps: bool, minor: int) -> bytes:
    """What a client of HTTP/1.`minor` is told of the connection: nothing, if it is what the client expects."""
    if keeps:
        return b"" if minor else b"Connection: keep-alive\r\n"
    return b"Connection: close\r\n"


def _passed(head: Head, stopped: frozenset[bytes]) -> list[bytes]:
    if b"connection" in head.values:
        stopped = stopped.union(set(head.tokens(b"connection")) - _NEVER_NAMED)
    return [line for name, line in head.lines if name not in stopped]
