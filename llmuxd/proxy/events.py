"""What is said in server-sent events: that somebody waits, and what is wrong. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

from llmuxd.core.outlook import Outlook
from llmuxd.gate import Refused
from llmuxd.proxy.errors import error_body, error_value
from llmuxd.proxy.routes import RESPONSES, is_anthropic

_SHOWN_CHARS = 200


def is_event_stream(content_type: str) -> bool:
    """Whether a body of this type consists of server-sent events."""
    return content_type.partition(";")[0].strip().lower() == "text/event-stream"


def comment(model: str, outlook: Outlook | None = None) -> bytes:
    """What no client takes for anything, and a human who looks at the stream understands."""
    text = f": llmux waiting for {' '.join(model.split())}"
    if outlook is not None:
        text += f", place {outlook.place} in its queue, about {math.ceil(outlook.seconds)} s"
    return f"{text}\n\n".encode("utf-8", "replace")


def error_event(path: str, refused: Refused) -> bytes:
    """The event that the path's API has for a failure in mid-stream."""
    if is_anthropic(path):
        return _named(error_body(refused, anthropic=True))
    if path.startswith(RESPONSES):
        # This API's events have their fields at the top; its clients look for the object, too.
        flat = {"type": "error", "code": refused.code, "message": refused.message, "param": refused.param}
        return _named(json.dumps({**flat, **error_value(refused)}).encode())
    return b"data: " + error_body(refused) + b"\n\n"


def retold(path: str, status: int, body: bytes) -> bytes:
    """The event for an engine's answer that has no stream: its own error object if it has one, in one line."""
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    value = value if isinstance(value, dict) else {}
    error = value.get("error")
    if isinstance(error, dict) and (not is_anthropic(path) or value.get("type") == "error"):
        line = json.dumps(value).encode()
        return _named(line) if is_anthropic(path) else b"data: " + line + b"\n\n"
    said = (error if isinstance(error, dict) else value).get("message")
    message = said if isinstance(said, str) else f"the engine answered {status}: {_shown(body)}"
    kind = "invalid_request_error" if 400 <= status < 500 else "server_error"
    refused = Refused(status, "engine_error", kind, message)
    refused.param = None  # What it is about is the engine's to know.
    return error_event(path, refused)


def _named(line: bytes) -> bytes:
    return b"event: error\ndata: " + line + b"\n\n"


def _shown(body: bytes) -> str:
    return body.decode("utf-8", "replace")[:_SHOWN_CHARS] or "nothing"
