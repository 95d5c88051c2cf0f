"""What the forms of all APIs share: ids, usage, errors, JSON as vLLM writes it. Pure."""

from __future__ import annotations

import json
import secrets
from typing import Any

DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."

FINGERPRINT = "vllm-0.32.0-simulated"


class Refused(Exception):
    """A request that is answered by an error."""

    def __init__(
        self, message: str, status: int = 400, kind: str = "BadRequestError", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind
        self.param = param


class Invalid(Refused):
    """A request that vLLM refuses before it looks at the API: every API says that in the same form."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, 400, "Bad Request", param)


def dumps(content: Any) -> bytes:
    """JSON without a space, as vLLM's answers and events are."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def event(content: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    head = b"" if name is None else b"event: " + name.encode() + b"\n"
    return head + b"data: " + dumps(content) + b"\n\n"


DONE = b"data: [DONE]\n\n"


def death() -> bytes:
    """How a stream of OpenAI's APIs says that EngineCore has died. This one event vLLM writes with spaces."""
    return b"data: " + json.dumps(error(DEAD, 500, "InternalServerError")).encode() + b"\n\n" + DONE


def new_id() -> str:
    """What vLLM puts behind the prefix of an id."""
    return secrets.token_hex(8)


def error(message: str, status: int, kind: str = "BadRequestError", param: str | None = None) -> dict[str, Any]:
    """vLLM's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def anthropic_error(message: str, kind: str) -> dict[str, Any]:
    """Its error object for the messages API: OpenAI's types in Anthropic's form."""
    return {"type": "error", "error": {"type": kind, "message": message}}


def length_of(prompt: str) -> int:
    """A prompt's tokens."""
    return max(1, len(prompt.split()))


def usage(before: int, count: int) -> dict[str, Any]:
    """Tokens of the prompt, tokens of the answer."""
    return {
        "prompt_tokens": before,
        "total_tokens": before + count,
        "completion_tokens": count,
        "prompt_tokens_details": None,
        "completion_tokens_details": None,
    }
