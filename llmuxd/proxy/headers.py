"""Which headers pass, in both directions. Pure."""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence

from multidict import CIMultiDict

MODEL_OVERRIDE = "model-override"
REQUEST_ID = "x-request-id"
SERVER_TIMING = "Server-Timing"
MOST_WAIT = "x-llmux-wait"

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
# The credentials are the clients' with this daemon, and so is the host. The length is that of the body as it is sent
# on, which is read whole before, so nobody waits for a 100.
_NOT_FORWARDED = frozenset(
    {"authorization", "x-api-key", "cookie", MODEL_OVERRIDE, "host", "content-length", "expect", REQUEST_ID, MOST_WAIT}
)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._~:/+=@-]{1,128}")


_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?")

RawHeaders = Sequence[tuple[bytes, bytes]]
"""As aiohttp's parser keeps them: with the spelling of their names."""


def request_id(given: str) -> str:
    """The client's own, if it is one that may stand in any log; else a new one."""
    return given if _SANE_REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


def seconds_of(given: str | None) -> float | None:
    """The value of x-llmux-wait: how long a client will wait; None if it does not say. Raises ValueError."""
    if given is None:
        return None
    if not _SECONDS.fullmatch(given.strip()):
        raise ValueError(given)
    return float(given)


def to_engine(headers: RawHeaders, request_id: str) -> CIMultiDict[str]:
    """The headers of a client's request, as its engine gets them."""
    passed = _passed(headers, _NOT_FORWARDED)
    passed[REQUEST_ID] = request_id
    return passed


def to_client(headers: RawHeaders, request_id: str) -> CIMultiDict[str]:
    """The headers of an engine's answer, as its client gets them. A length is kept; framing is the server's."""
    framed = any(name.lower() == b"transfer-encoding" for name, _ in headers)
    passed = _passed(headers, frozenset({"content-length"}) if framed else frozenset())
    passed[REQUEST_ID] = request_id
    return passed


def server_timing(queue_secs: float, switch_secs: float) -> str:
    """The value of Server-Timing, in milliseconds."""
    return f"queue;dur={queue_secs * 1000:.1f}, switch;dur={switch_secs * 1000:.1f}"


def _passed(raw: RawHeaders, stopped: frozenset[str]) -> CIMultiDict[str]:
    headers = [(name.decode(), value.decode("utf-8", "surrogateescape")) for name, value in raw]
    named = {
        part.strip().lower() for name, value in headers if name.lower() == "connection" for part in value.split(",")
    }
    out = _HOP_BY_HOP | stopped | named
    return CIMultiDict((name, value) for name, value in headers if name.lower() not in out)
