"""What is said in server-sent events, in the words of each API."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmuxd.core.outlook import Outlook
from llmuxd.gate import Refused
from llmuxd.proxy.events import comment, error_event, is_event_stream, retold

OPENAI, ANTHROPIC = "/v1/chat/completions", "/v1/messages"


def data_of(path: str, event: bytes) -> dict[str, Any]:
    lines = event.decode().split("\n")
    assert lines[-2:] == ["", ""], "an empty line ends it"
    if path == ANTHROPIC:
        assert lines.pop(0) == "event: error"
    assert len(lines) == 3, "its data is one line"
    data: dict[str, Any] = json.loads(lines[0].removeprefix("data: "))
    return data


@pytest.mark.parametrize(
    ("content_type", "is_one"),
    [
        ("text/event-stream", True),
        (" Text/Event-Stream ; charset=utf-8", True),
        ("text/event-stream2", False),
        ("application/json; x=text/event-stream", False),
        ("", False),
    ],
)
def test_what_consists_of_events(content_type: str, is_one: bool) -> None:
    assert is_event_stream(content_type) is is_one


def test_a_comment_is_one_line_whatever_a_model_is_called() -> None:
    assert comment("org/a-1") == b": llmux waiting for org/a-1\n\n"
    expected = b": llmux waiting for a, place 3 in its queue, about 13 s\n\n"
    assert comment("a", Outlook(3, 12.1)) == expected
    assert comment("a\n\ndata: x\r\n") == b": llmux waiting for a data: x\n\n"
    assert comment("\u00e9\ud800") == b": llmux waiting for \xc3\xa9?\n\n"


def test_a_refusal_in_openais_form() -> None:
    data = data_of(OPENAI, error_event(OPENAI, Refused(504, "queue_timeout", "timeout_error", "too\nlong")))
    error = {"message": "too\nlong", "type": "timeout_error", "param": None, "code": "queue_timeout"}
    assert data == {"error": error}


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (429, "rate_limit_error"), (503, "overloaded_error"), (504, "timeout_error")]
    + [(status, "api_error") for status in (500, 502)],
)
def test_a_refusal_in_anthropics_form(status: int, kind: str) -> None:
    data = data_of(ANTHROPIC, error_event(ANTHROPIC, Refused(status, "code", "type", "why")))
    error = {"type": kind, "message": "why", "param": "model" if status == 400 else None, "code": "code"}
    assert data == {"type": "error", "error": error}


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC])
def test_an_engines_own_error_is_kept_whole(path: str) -> None:
    said = {"type": "error", "error": {"message": "too long\n", "type": "BadRequestError", "code": 400}, "more": [1]}
    assert data_of(path, retold(path, 400, json.dumps(said, indent=2).encode())) == said


def test_openais_form_becomes_anthropics() -> None:
    body = b'{"error": {"message": "no", "type": "BadRequestError"}}'
    data = data_of(ANTHROPIC, retold(ANTHROPIC, 404, body))
    error = {"type": "not_found_error", "message": "no", "param": None, "code": "engine_error"}
    assert data == {"type": "error", "error": error}


@pytest.mark.parametrize(
    ("status", "body", "kind", "message"),
    [
        (400, b'{"object": "error", "message": "old"}', "invalid_request_error", "old"),
        (404, b'{"detail": "Not Found"}', "invalid_request_error", 'the engine answered 404: {"detail": "Not Found"}'),
        (500, b"oh\n\xff" + b"x" * 1000, "server_error", "the engine answered 500: oh\n\ufffd" + "x" * 196),
        (500, b"", "server_error", "the engine answered 500: nothing"),
        (200, b'{"error": "none"}', "server_error", 'the engine answered 200: {"error": "none"}'),
        (502, b"[" * 100_000, "server_error", "the engine answered 502: " + "[" * 200),
        (400, b"[1]", "invalid_request_error", "the engine answered 400: [1]"),
    ],
)
def test_what_else_an_engine_answers_is_told(status: int, body: bytes, kind: str, message: str) -> None:
    error = {
        "message": message,
        "type": kind,
        "param": None,
        "code": "engine_error",
    }
    assert data_of(OPENAI, retold(OPENAI, status, body)) == {"error": error}
