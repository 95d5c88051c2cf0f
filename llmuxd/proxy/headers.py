"""Which headers pass, in both directions, and the ones that are added. Pure."""

from __future__ import annotations

import re
import uuid

from multidict import CIMultiDict, CIMultiDictProxy

REQUEST_ID = "x-request-id"

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110, section 7.6.1, and what is used in practice: they concern one connection, not the message."""

_NOT_FOR_ENGINES = _HOP_BY_HOP | {
    "host",
    "content-length",
    "expect",
    "authorization",
    "x-api-key",
    "cookie",
    "model-override",
    REQUEST_ID,
}
"""A client's secrets stay here; length and host are set anew for the engine's connection."""

_GOOD_ID = re.compile(r"[!-~]{1,128}")


def to_engine(headers: CIMultiDictProxy[str], request_id: str) -> CIMultiDict[str]:
    """The headers of a request as its engine gets them."""
    passed = _without(headers, _NOT_FOR_ENGINES)
    passed[REQUEST_ID] = request_id
    return passed


def to_client(headers: CIMultiDictProxy[str]) -> CIMultiDict[str]:
    """The headers of an answer as the client gets them, before ours are added."""
    return _without(headers, _HOP_BY_HOP | {REQUEST_ID})


def request_id_of(headers: CIMultiDictProxy[str]) -> str:
    """The client's own id if it is one that can be logged and passed on, else a new one."""
    given = headers.get(REQUEST_ID, "")
    return given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex


def server_timing(queue_secs: float, switch_secs: float) -> str:
    """The Server-Timing header: what of the waiting was queue, and of that what was a switch. In milliseconds."""
    return f"queue;dur={queue_secs * 1000:.1f}, switch;dur={switch_secs * 1000:.1f}"


def _without(headers: CIMultiDictProxy[str], names: frozenset[str]) -> CIMultiDict[str]:
    connection = headers.get("Connection", "").lower()
    named = {name.strip() for name in connection.split(",")} if connection else set()
    return CIMultiDict((k, v) for k, v in headers.items() if (low := k.lower()) not in names and low not in named)
