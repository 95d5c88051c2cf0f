"""What the simulated engine answers where, in whatever disguise: paths, methods, headers; and what it counts."""

from __future__ import annotations

import socket

import pytest

from llmuxd.sim import development
from tests.integration.test_sim_engine import Sim, sim

__all__ = ["sim"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One for all that changes nothing in it but what it counts."""
    made = Sim(tmp_path_factory.mktemp("sim"), "m", {}).ready()
    yield made
    made.end()


def raw(engine: Sim, request: bytes) -> bytes:
    """The whole answer to these bytes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(engine.uds))
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))


def reached(engine: Sim, path: str) -> float:
    return engine.metric(f'llmux_sim_development_calls_total{{path="{path}"}}')


@pytest.mark.parametrize(
    "target",
    ["/reset_mm_cache", "/%72eset_mm_cache", "/reset_mm_cache?x=1", "http://elsewhere/reset_mm_cache"],
)
def test_a_development_endpoint_is_reached_in_every_disguise_that_vllm_forgives(engine, target):
    before = reached(engine, "/reset_mm_cache")
    answer = raw(
        engine, f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert reached(engine, "/reset_mm_cache") == before + 1


@pytest.mark.parametrize("target", ["//reset_mm_cache", "/x/../reset_mm_cache", "/reset_mm_cache/x", "/Reset_mm_cache"])
def test_and_in_no_other(engine, target):
    before = reached(engine, "/reset_mm_cache")
    answer = raw(
        engine, f"POST {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 0\r\n\r\n".encode()
    )
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert reached(engine, "/reset_mm_cache") == before


def test_every_call_is_counted_by_any_method_there_or_not(tmp_path):
    engine = Sim(tmp_path, "n", {"VLLM_SERVER_DEV_MODE": "0"}).ready()
    try:
        for path in development.PATHS:
            assert engine.call("PATCH", path)[0] in (404, 405)
            assert reached(engine, path) == 1
    finally:
        engine.end()


def test_in_its_mode_each_answers(sim):
    engine = sim().ready()
    for method, path in development.IN_MODE:
        if path not in ("/sleep", "/pause", "/release_kv_cache_memory", "/collective_rpc"):
            assert engine.call(method, path)[0] == 200, path


def test_a_slash_at_the_end_is_sent_to_the_engines_own_address(engine):
    answer = raw(engine, b"POST /sleep/?level=1 HTTP/1.1\r\nHost: m\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 307 ")
    assert b"\r\nLocation: http://m/sleep?level=1\r\n" in answer


@pytest.mark.parametrize("path", ["/v1/completions", "/is_sleeping"])
def test_no_path_but_one_is_a_websocket(engine, path):
    upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAA"
    assert raw(engine, f"GET {path} HTTP/1.1\r\nHost: m\r\n{upgrade}\r\n\r\n".encode()).startswith(b"HTTP/1.1 403 ")
    assert engine.call("GET", "/v1/realtime")[0] == 404


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("HEAD", "/v1/models", 405),
        ("GET", "/v1/completions", 405),
        ("OPTIONS", "/v1/completions", 405),
        ("POST", "/ping", 200),
        ("GET", "/load", 200),
        ("GET", "/metrics/x", 200),
        ("GET", "/v1/responses/", 307),
        ("POST", "/scale_elastic_ep", 200),
        ("GET", "/", 404),
    ],
)
def test_methods_are_vllms(engine, method, path, status):
    found, answer = engine.call(method, path)
    assert found == status
    if status in (404, 405) and method != "HEAD":
        assert set(answer) == {"detail"}, "it is the framework that refuses"


def test_browsers_are_allowed_everything(engine):
    asks = "Access-Control-Request-Method: POST\r\nAccess-Control-Request-Headers: x-a"
    head = f"OPTIONS /v1/completions HTTP/1.0\r\nOrigin: http://page\r\n{asks}\r\n\r\n"
    before = raw(engine, head.encode()).lower()
    assert before.startswith(b"http/1.0 200 ")
    for header in (
        b"access-control-allow-origin: *",
        b"access-control-allow-headers: x-a",
        b"access-control-max-age: 600",
    ):
        assert header in before
    assert (
        b"access-control-allow-origin: *"
        in raw(engine, b"GET /v1/models HTTP/1.0\r\nOrigin: http://page\r\n\r\n").lower()
    )
    assert b"access-control" not in raw(engine, b"GET /v1/models HTTP/1.0\r\n\r\n").lower()


def test_the_id_of_a_request_is_in_its_answers_ids_and_in_its_head_if_asked(engine, tmp_path):
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.0\r\nX-Request-Id: abc\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    silent = raw(engine, head % len(body) + body)
    assert b'"id":"cmpl-abc"' in silent
    assert b"x-request-id" not in silent.lower()
    echoing = Sim(tmp_path, "n", {}, ("--enable-request-id-headers",)).ready()
    try:
        assert b"x-request-id: abc" in raw(echoing, head % len(body) + body).lower()
        assert b"x-request-id: " in raw(echoing, b"GET /v1/models HTTP/1.0\r\n\r\n").lower()
    finally:
        echoing.end()


def test_a_body_is_waited_for_with_100_continue(engine):
    body = b'{"prompt": "x", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(engine.uds))
        client.sendall(head + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(body)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")


@pytest.mark.parametrize(
    ("path", "body", "content_type", "said"),
    [
        ("/v1/completions", '{"prompt": "x"}', "text/plain", "Unsupported Media Type"),
        ("/v1/completions", "{", "application/json", "json_invalid"),
        ("/v1/completions", "[]", "application/json", "body"),
        ("/v1/completions", "{}", "application/json", "prompt"),
        ("/v1/chat/completions", "{}", "application/json", "body.messages"),
        (
            "/v1/chat/completions",
            '{"messages": [], "tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}}',
            "application/json",
            "tool_choice",
        ),
    ],
)
def test_bad_requests_are_told_apart(engine, path, body, content_type, said):
    status, answer = engine.call("POST", path, body, content_type)
    assert (status, answer["error"]["type"]) == (400, "Bad Request")
    assert said in answer["error"]["message"]


def test_requests_and_keys_are_counted(sim):
    engine = sim().ready()
    engine.ask()
    assert engine.metric('llmux_sim_requests_total{path="/v1/completions"}') == 1
    assert engine.metric("llmux_sim_credentials_total") == 0
    raw(engine, b"GET /v1/models HTTP/1.0\r\nx-api-key: k\r\n\r\n")
    assert engine.metric("llmux_sim_credentials_total") == 1
