"""Which headers pass the proxy, and how its errors are put."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest

from llmuxd.gate import Refused
from llmuxd.proxy.errors import Rejected, error_body, error_response, model_not_found
from llmuxd.proxy.headers import request_id, seconds_of, server_timing, to_client, to_engine

HOP_BY_HOP = [
    "Connection",
    "Keep-Alive",
    "Proxy-Authenticate",
    "Proxy-Authorization",
    "Proxy-Connection",
    "TE",
    "Trailer",
    "Transfer-Encoding",
    "Upgrade",
]
CLIENTS_OWN = ["Authorization", "X-Api-Key", "Cookie", "Model-Override", "Host", "Content-Length", "Expect"]


def raw(*headers: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers]


@pytest.mark.parametrize("name", HOP_BY_HOP)
@pytest.mark.parametrize("spell", [str.lower, str.upper, str])
def test_what_concerns_one_connection_stays_there(name: str, spell: Callable[[str], str]) -> None:
    given = raw((spell(name), "x"), ("Accept", "*/*"))
    assert list(to_engine(given, "id").items()) == [("Accept", "*/*"), ("x-request-id", "id")]
    assert list(to_client(given, "id").items()) == [("Accept", "*/*"), ("x-request-id", "id")]


def test_what_a_connection_header_names_stays_too() -> None:
    given = raw(("Connection", "close, X-A"), ("connection", " x-b "), ("X-A", "1"), ("x-B", "2"), ("X-C", "3"))
    assert dict(to_engine(given, "id")) == dict(to_client(given, "id")) == {"X-C": "3", "x-request-id": "id"}


@pytest.mark.parametrize("name", CLIENTS_OWN)
def test_what_is_the_clients_with_the_daemon_does_not_reach_an_engine(name: str) -> None:
    assert name not in to_engine(raw((name, "secret"), (name.upper(), "secret")), "id")


def test_the_rest_passes_with_its_spelling_and_order() -> None:
    given = [("X-b", "1"), ("x-A", "2"), ("X-B", "3"), ("Content-Encoding", "gzip"), ("X-Empty", "")]
    assert list(to_engine(raw(*given), "id").items()) == [*given, ("x-request-id", "id")]
    assert list(to_client(raw(*given), "id").items()) == [*given, ("x-request-id", "id")]


def test_there_is_one_request_id() -> None:
    given = raw(("X-Request-ID", "theirs"), ("x-request-id", "theirs"))
    assert to_engine(given, "ours").getall("x-request-id") == ["ours"]
    assert to_client(given, "ours").getall("x-request-id") == ["ours"]


def test_a_length_is_passed_on_unless_the_body_is_framed_otherwise() -> None:
    length = ("Content-Length", "3")
    assert to_client(raw(length), "id")["content-length"] == "3"
    assert "content-length" not in to_client(raw(length, ("Transfer-Encoding", "chunked")), "id")


@pytest.mark.parametrize("given", ["a", "req_1-2.3~4:5/6+7=8@9", "x" * 128])
def test_a_clients_request_id_is_kept(given: str) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize("given", ["", " ", "a b", "a\n", 'a"b', "\u00e9", "x" * 129])
def test_or_made(given: str) -> None:
    made = {request_id(given), request_id(given)}
    assert len(made) == 2
    assert given not in made


def test_server_timing() -> None:
    assert server_timing(1.23456, 0) == "queue;dur=1234.6, switch;dur=0.0"


@pytest.mark.parametrize(("retry_after", "header"), [(None, None), (0.0, "0"), (0.01, "1"), (3.0, "3"), (3.2, "4")])
def test_errors(retry_after: float | None, header: str | None) -> None:
    response = error_response(Refused(503, "model_unavailable", "service_unavailable_error", 'no "a"', retry_after))
    assert response.status == 503
    assert response.headers.get("Retry-After") == header
    assert response.headers["Content-Type"] == "application/json"
    assert isinstance(response.body, bytes)
    assert json.loads(response.body) == {
        "error": {"message": 'no "a"', "type": "service_unavailable_error", "param": None, "code": "model_unavailable"}
    }


def test_an_error_stays_on_one_line_so_that_it_fits_an_event() -> None:
    assert b"\n" not in error_body(Rejected(400, "c", "two\nlines\r\n\x85\u2028"))


def test_an_unknown_model_is_told_the_known_ones_and_the_nearest() -> None:
    error = model_not_found("lama-8b", ["llama-8b", "qwen"])
    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert str(error) == "The model `lama-8b` does not exist. Did you mean `llama-8b`? Known models: llama-8b, qwen"
    assert str(model_not_found("zzz", ["qwen"])) == "The model `zzz` does not exist. Known models: qwen"
    assert len(str(model_not_found("x" * 10_000_000, ["qwen"]))) < 300


@pytest.mark.parametrize(("given", "seconds"), [(None, None), ("0", 0.0), ("12", 12.0), (" 1.5 ", 1.5)])
def test_how_long_a_client_will_wait(given, seconds):
    assert seconds_of(given) == seconds


@pytest.mark.parametrize("given", ["", "-1", "soon", "1e9", "inf", "nan", "1,5", "0x10", "1" * 30, "\u0661"])
def test_what_is_no_number_of_seconds_is_refused(given):
    with pytest.raises(ValueError, match=f"^{re.escape(given)}$"):
        seconds_of(given)
