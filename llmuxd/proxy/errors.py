"""Errors in OpenAI's form. What is wrong with a request is said where it is found; here is how it is put."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from llmuxd.gate import Refused

CONTENT_TYPE = "application/json"
_SHOWN_CHARS = 200


class Rejected(Refused):
    """The request itself is at fault: no waiting makes it right."""

    def __init__(self, status: int, code: str, message: str, param: str | None = None) -> None:
        super().__init__(status, code, "invalid_request_error", message)
        self.param = param


def model_not_found(name: str, known: Iterable[str]) -> Rejected:
    """404 for a name that is not configured."""
    models = ", ".join(known) or "none"
    message = f"The model `{name[:_SHOWN_CHARS]}` does not exist. Known models: {models}"
    return Rejected(404, "model_not_found", message, "model")


def error_body(refused: Refused) -> bytes:
    """`{"error": {...}}` in one line, as it also stands in a server-sent event."""
    error: dict[str, Any] = {
        "message": str(refused),
        "type": refused.type,
        "param": getattr(refused, "param", None),
        "code": refused.code,
    }
    return json.dumps({"error": error}).encode()


def error_headers(refused: Refused) -> Mapping[str, str]:
    """Retry-After in whole seconds, where waiting helps."""
    headers = {"Content-Type": CONTENT_TYPE}
    if refused.retry_after is not None:
        headers["Retry-After"] = str(max(0, math.ceil(refused.retry_after)))
    return headers
