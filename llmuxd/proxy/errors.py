"""Errors in the form of the API that was asked. What is wrong with a request is said where it is found; here is how it
is put."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from llmuxd.gate import Refused

_SHOWN_CHARS = 200

_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


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


def no_model() -> Rejected:
    """400 for a request that does not say which model it is for."""
    return Rejected(
        400,
        "model_required",
        "no model is named: set `model` in the body, `?model=`, or a `model-override` header",
        "model",
    )


def internal_error() -> Refused:
    """500: the fault is here, and its log has the rest."""
    return Refused(500, "internal_error", "server_error", "internal error")


def error_value(refused: Refused, anthropic: bool = False) -> dict[str, Any]:
    """`{"error": {...}}`. For Anthropic's clients it has their words, too."""
    error: dict[str, Any] = {
        "message": str(refused),
        "type": refused.type,
        "param": refused.param,
        "code": refused.code,
    }
    if not anthropic:
        return {"error": error}
    error["type"] = _ANTHROPIC_TYPES.get(
        refused.status, "invalid_request_error" if refused.status < 500 else "api_error"
    )
    return {"type": "error", "error": error}


def error_body(refused: Refused, anthropic: bool = False) -> bytes:
    """The same in one line."""
    return json.dumps(error_value(refused, anthropic)).encode()
