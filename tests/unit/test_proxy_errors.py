"""How errors and other answers that are given here are put."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmuxd.gate import Refused
from llmuxd.proxy.answers import Answer, error_answer, written
from llmuxd.proxy.errors import Rejected, error_body, internal_error, model_not_found, no_model
from llmuxd.proxy.http1 import RequestHead, ResponseHead, parse_request, parse_response

ADDED = b"x-request-id: id\r\n"


def asked(method: str = "POST", minor: int = 1) -> RequestHead:
    return parse_request(f"{method} /v1/x HTTP/1.{minor}\r\nHost: h".encode())


def sent(answer: Answer, keeps: bool = True, head: RequestHead | None = None) -> tuple[ResponseHead, bytes]:
    head_bytes, _, body = written(answer, ADDED, keeps, head).partition(b"\r\n\r\n")
    return parse_response(head_bytes), body


@pytest.mark.parametrize(
    ("retry_after", "header"), [(None, None), (0.0, b"0"), (0.01, b"1"), (3.0, b"3"), (3.2, b"4"), (-1.0, b"0")]
)
def test_errors(retry_after: float | None, header: bytes | None) -> None:
    refused = Refused(503, "model_unavailable", "service_unavailable_error", 'no "a"', retry_after)
    head, body = sent(error_answer(refused), head=asked())
    assert (head.status, head.reason) == (503, b"Service Unavailable")
    assert head.values.get(b"retry-after") == header
    assert head.values[b"content-type"] == b"application/json"
    assert head.values[b"x-request-id"] == b"id"
    assert head.length == len(body)
    assert json.loads(body) == {
        "error": {"message": 'no "a"', "type": "service_unavailable_error", "param": None, "code": "model_unavailable"}
    }


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"), (401, "authentication_error"), (403, "permission_error"), (404, "not_found_error"),
        (405, "invalid_request_error"), (408, "invalid_request_error"), (413, "request_too_large"), (417, "invalid_request_error"),
        (422, "invalid_request_error"), (429, "rate_limit_error"), (431, "invalid_request_error"), (500, "api_error"),
        (501, "api_error"), (502, "api_error"), (503, "overloaded_error"), (504, "timeout_error"),
    ],
)  # fmt: skip
def test_anthropics_clients_get_their_words_too(status: int, kind: str) -> None:
    _, body = sent(error_answer(Refused(status, "code", "type", "why"), anthropic=True), head=asked())
    value: dict[str, Any] = json.loads(body)
    assert value["type"] == "error"
    assert (value["error"]["type"], value["error"]["message"], value["error"]["code"]) == (kind, "why", "code")
    assert set(value["error"]) == {"type", "message", "param", "code"}, "OpenAI's fields are all there"


def test_who_has_no_key_is_told_how_to_show_one() -> None:
    head, _ = sent(error_answer(Rejected(401, "invalid_api_key", "no key")), head=asked())
    assert head.values[b"www-authenticate"] == b"Bearer"
    head, _ = sent(error_answer(Rejected(403, "model_not_allowed", "no")), head=asked())
    assert b"www-authenticate" not in head.values


def test_who_uses_a_method_that_is_not_allowed_is_told_those_that_are() -> None:
    head, _ = sent(error_answer(Rejected(405, "method_not_allowed", "read it")), head=asked())
    assert head.values[b"allow"] == b"GET, HEAD, OPTIONS"
    head, _ = sent(error_answer(Rejected(404, "unknown_url", "no")), head=asked())
    assert b"allow" not in head.values


@pytest.mark.parametrize(
    ("keeps", "head", "connection"),
    [
        (True, asked(), None),
        (False, asked(), b"close"),
        (True, asked(minor=0), b"keep-alive"),
        (False, asked(minor=0), b"close"),
        (False, None, b"close"),
    ],
)
def test_what_becomes_of_the_connection_is_said(
    keeps: bool, head: RequestHead | None, connection: bytes | None
) -> None:
    got, body = sent(Answer(200, b"{}"), keeps, head)
    assert (got.values.get(b"connection"), got.minor, body) == (connection, 1, b"{}")


def test_a_head_alone_has_the_length_of_what_get_would_have() -> None:
    got, body = sent(Answer(200, b"{}"), head=asked("HEAD"))
    assert (got.length, body) == (2, b"")


def test_an_answer_without_a_body_has_no_type_and_lines_of_its_own() -> None:
    got, body = sent(Answer(204, added=b"Allow: GET\r\n"), head=asked("OPTIONS"))
    assert (got.status, got.reason, body) == (204, b"No Content", b"")
    assert [name for name, _ in got.lines] == [b"allow", b"x-request-id"]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 413, 417, 429, 431, 500, 501, 502, 503, 504])
def test_each_status_has_its_reason(status: int) -> None:
    got, _ = sent(error_answer(Refused(status, "code", "type", "why")), head=asked())
    assert (got.status, bool(got.reason)) == (status, True)


def test_an_error_stays_on_one_line_so_that_it_fits_an_event() -> None:
    message = "two\nlines\r\n\x85\u2028\ud800"
    assert b"\n" not in error_body(Rejected(400, "c", message))
    assert json.loads(error_body(Rejected(400, "c", message), anthropic=True))["error"]["message"] == message


def test_an_unknown_model_is_told_the_known_ones_and_the_nearest() -> None:
    error = model_not_found("lama-8b", ["llama-8b", "qwen"])
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert str(error) == "The model `lama-8b` does not exist. Did you mean `llama-8b`? Known models: llama-8b, qwen"
    assert str(model_not_found("zzz", ["qwen"])) == "The model `zzz` does not exist. Known models: qwen"
    assert str(model_not_found("zzz", [])) == "The model `zzz` does not exist. Known models: none"
    assert len(str(model_not_found("x" * 10_000_000, ["qwen"]))) < 300


def test_what_is_no_fault_of_the_request() -> None:
    assert (no_model().status, no_model().param) == (400, "model")
    assert json.loads(error_body(internal_error()))["error"] == {
        "message": "internal error", "type": "server_error", "param": None, "code": "internal_error",
    }  # fmt: skip
