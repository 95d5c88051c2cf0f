"""Errors in OpenAI's form. What is wrong with a request is said where it is found; here is how it is put."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from typing import Any

from aiohttp import web

from llmuxd.gate import Refused

_SHOWN_CHARS = 200


class Rejected(Refused):
    """The request itself is at fault: no waiting makes it right."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, code, "invalid_request_error", message)
        self.param = param


def model_not_found(name: str, known: Iterable[str]) -> Rejected:
    """404 for a name that is not configured; the message has the known ones, and the nearest of them."""
    name, models = name[:_SHOWN_CHARS], list(known)
    nearest = difflib.get_close_matches(name, models, n=1)
    question = f" Did you mean `{nearest[0]}`?" if nearest else ""
    message = f"The model `{name}` does not exist.{question} Known models: {', '.join(models) or 'none'}"
    return Rejected(404, "model_not_found", message, "model")


def internal_error() -> Refused:
    """500: the fault is here, and its log has the rest."""
    return Refused(500, "internal_error", "server_error", "internal error")


def error_body(refused: Refused) -> bytes:
    """`{"error": {...}}` in one line, as it also stands in a server-sent event."""
    error: dict[str, Any] = {
        "message": str(refused),
        "type": refused.type,
        "param": getattr(refused, "param", None),
        "code": refused.code,
    }
    return json.dumps({"error": error}).encode()


def error_response(refused: Refused) -> web.Response:
    """The answer, with Retry-After in whole seconds where waiting helps."""
    response = web.Response(
        status=refused.status, body=error_body(refused), headers={"Content-Type": "application/json"}
    )
    if refused.retry_after is not None:
        response.headers["Retry-After"] = str(max(0, math.ceil(refused.retry_after)))
    return response
