"""Clients with keys: each package sends its key in its own way, and raises its own error when it is refused."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import websockets
from websockets.sync.client import connect

from tests.clients.stack import HELLO, Stack, running
from tests.clients.test_curl import JSON, curl, prompt
from tests.integration.stack import until

ANY, BIRCH, FEW, ONE = "any-key-0001", "birch-key-0002", "few-key-0003", "one-key-0004"


def entry(name: str, key: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    keys = [
        entry("any", ANY, priority=5),
        entry("birch", BIRCH, models=["birch"]),
        entry("few", FEW, requests_per_minute=2),
        entry("one", ONE, max_parallel=1),
    ]
    top = {"keys": keys, "cors_origins": ["http://page.test"]}
    with running(tmp_path_factory.mktemp("keys"), top) as stack:
        yield stack
        told = stack.engine("birch")["llmux_sim_credentials_total"]
        assert told == 0, "no key reaches an engine"
        said = stack.log.read_text()
        assert not [key for key in (ANY, BIRCH, FEW, ONE) if key in said], "nor a log"


def test_each_package_is_let_in(guarded: Stack, model):
    with guarded.openai(api_key=ANY) as client:
        assert client.chat.completions.create(model=model, messages=HELLO).choices[0].message.content
    with guarded.anthropic(api_key=ANY) as client:
        assert client.messages.create(model=model, messages=HELLO, max_tokens=2).content
    with guarded.anthropic(api_key=None, auth_token=ANY) as client:
        assert client.messages.create(model=model, messages=HELLO, max_tokens=2).content
    answer = curl(guarded, "/v1/completions", *JSON, "-H", f"Authorization: Bearer {ANY}", "-d", prompt(model))
    assert answer.status == 200


def test_a_wrong_key_or_none(guarded: Stack):
    with guarded.openai(api_key="wrong") as client, pytest.raises(openai.AuthenticationError) as error:
        client.models.list()
    assert error.value.code == "invalid_api_key"
    with guarded.anthropic(api_key="wrong") as client, pytest.raises(anthropic.AuthenticationError) as refused:
        client.messages.create(model="birch", messages=HELLO, max_tokens=2)
    assert refused.value.body["error"]["type"] == "authentication_error"
    answer = curl(guarded, "/v1/models")
    assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert curl(guarded, "/health").status == 200
    assert curl(guarded, "/v1/completions", "-X", "OPTIONS").status == 204


def test_a_key_for_one_model(guarded: Stack):
    with guarded.openai(api_key=BIRCH) as client:
        assert [each.id for each in client.models.list()] == ["birch"]
        assert client.chat.completions.create(model="birch", messages=HELLO)
        with pytest.raises(openai.PermissionDeniedError) as error:
            client.chat.completions.create(model="cedar", messages=HELLO)
    assert error.value.code == "model_not_allowed"
    with guarded.anthropic(api_key=BIRCH) as client, pytest.raises(anthropic.PermissionDeniedError):
        client.messages.create(model="cedar", messages=HELLO, max_tokens=2)


def test_a_key_for_a_few_requests(guarded: Stack):
    with guarded.openai(api_key=FEW) as client:
        for _ in range(2):
            client.chat.completions.create(model="birch", messages=HELLO)
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="birch", messages=HELLO)
    assert error.value.code == "rate_limit_exceeded"
    assert 0 < int(error.value.response.headers["retry-after"]) <= 60
    with guarded.anthropic(api_key=FEW) as client, pytest.raises(anthropic.RateLimitError):
        client.messages.create(model="birch", messages=HELLO, max_tokens=2)


def test_a_key_for_one_request_at_a_time(guarded: Stack):
    with guarded.openai(api_key=ONE) as client:
        client.chat.completions.create(model="birch", messages=HELLO)
        guarded.fault("birch", "hang_generation")
        waiter = threading.Thread(target=client.chat.completions.create, kwargs={"model": "birch", "messages": HELLO})
        waiter.start()
        until(lambda: guarded.running("birch") == 1, "one is in the engine")
        with pytest.raises(openai.RateLimitError) as error:
            client.chat.completions.create(model="birch", messages=HELLO)
        guarded.fault("birch", "")
        waiter.join()
        assert client.chat.completions.create(model="birch", messages=HELLO)
    assert error.value.code == "too_many_parallel_requests"


def test_a_priority_that_a_key_may_ask_for(guarded: Stack):
    with guarded.openai(api_key=ANY) as client:
        low = client.chat.completions.with_raw_response.create(
            model="birch", messages=HELLO, extra_headers={"x-llmux-priority": "-7"}
        )
        assert low.status_code == 200
        with pytest.raises(openai.PermissionDeniedError) as error:
            client.chat.completions.create(model="birch", messages=HELLO, extra_headers={"x-llmux-priority": "6"})
    assert error.value.code == "priority_not_allowed"


def test_a_websocket_needs_one(guarded: Stack):
    address = f"ws://127.0.0.1:{guarded.port}/v1/realtime?model=birch"
    with pytest.raises(websockets.InvalidStatus) as error, connect(address):
        pass
    assert error.value.response.status_code == 401
    with connect(address, additional_headers={"Authorization": f"Bearer {BIRCH}"}) as socket:
        assert "session.created" in str(socket.recv(timeout=20))


def test_a_response_is_found_by_who_may_use_its_model(guarded: Stack):
    with guarded.openai(api_key=ANY) as client, guarded.openai(api_key=BIRCH) as other:
        made = client.responses.create(model="cedar", input="hello")
        assert client.responses.retrieve(made.id).id == made.id
        with pytest.raises((openai.NotFoundError, openai.PermissionDeniedError)):
            other.responses.retrieve(made.id)


def test_a_page_that_is_allowed_may_ask(guarded: Stack):
    page = ("-H", "Origin: http://page.test")
    before = curl(
        guarded, "/v1/completions", "-X", "OPTIONS", *page, "-H", "Access-Control-Request-Method: POST",
        "-H", "Access-Control-Request-Headers: authorization, content-type",
    )  # fmt: skip
    assert before.status == 204
    assert before.headers["access-control-allow-origin"] == "http://page.test"
    assert "authorization" in before.headers["access-control-allow-headers"].lower()
    key = ("-H", f"Authorization: Bearer {ANY}")
    answer = curl(guarded, "/v1/completions", *page, *key, *JSON, "-d", prompt("birch"))
    assert answer.headers["access-control-allow-origin"] == "http://page.test"
    other = curl(guarded, "/v1/models", "-H", "Origin: http://other.test", *key)
    assert "access-control-allow-origin" not in other.headers
