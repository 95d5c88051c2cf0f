"""Which web pages may call this port from a browser (Fetch Standard, CORS). Pure."""

from __future__ import annotations

from collections.abc import Collection

from llmuxd.proxy.http1 import RequestHead

_METHODS = b"GET, HEAD, POST, DELETE, OPTIONS"
_EXPOSED = b"x-request-id, Server-Timing, Retry-After"
_MAX_AGE_SECS = 600


def allowed(head: RequestHead, origins: Collection[str]) -> bytes:
    """The lines by which a browser lets the page read the answer; none if it may not."""
    origin = head.values.get(b"origin")
    if origin is None or not origins:
        return b""
    if "*" in origins:
        said = b"*"
    elif origin.decode("latin-1") in origins:
        said = origin
    else:
        return b"Vary: Origin\r\n"
    lines = b"Access-Control-Allow-Origin: %b\r\nAccess-Control-Expose-Headers: %b\r\n" % (said, _EXPOSED)
    return lines if said == b"*" else lines + b"Vary: Origin\r\n"


def preflight(head: RequestHead, origins: Collection[str]) -> bytes:
    """What an OPTIONS request is told, beside `allowed`."""
    lines = b"Allow: %b\r\n" % _METHODS
    if b"access-control-allow-origin" not in allowed(head, origins).lower():
        return lines
    asked = head.values.get(b"access-control-request-headers", b"*")
    return lines + (
        b"Access-Control-Allow-Methods: %b\r\nAccess-Control-Allow-Headers: %b\r\nAccess-Control-Max-Age: %d\r\n"
        % (_METHODS, asked, _MAX_AGE_SECS)
    )
