"""WebSocket clients of /v1/realtime: aiohttp, websockets, and the openai package's own."""

from __future__ import annotations

import asyncio
import base64
import json
from typing import Any

import aiohttp
import pytest
import websockets
from websockets.sync.client import ClientConnection, connect

from tests.clients.stack import TIMEOUT_SECS, Stack
from tests.integration.stack import until

SOUND = base64.b64encode(bytes(range(200)) * 2000).decode()


def told(model: str) -> list[dict[str, Any]]:
    """What a client sends for one utterance of two chunks."""
    return [
        {"type": "session.update", "model": model},
        {"type": "input_audio_buffer.commit"},
        {"type": "input_audio_buffer.append", "audio": SOUND},
        {"type": "input_audio_buffer.append", "audio": SOUND},
        {"type": "input_audio_buffer.commit", "final": True},
    ]


def check(model: str, got: list[dict[str, Any]]) -> None:
    assert got[0]["type"] == "session.created"
    assert got[-1]["type"] == "transcription.done"
    assert got[-1]["text"] == "".join(event["delta"] for event in got[1:-1])
    assert got[-1]["text"].split()[0] == model


def address(stack: Stack, model: str) -> str:
    return f"ws://127.0.0.1:{stack.port}/v1/realtime?model={model}"


def test_aiohttp(stack: Stack, model):
    async def talk() -> list[dict[str, Any]]:
        got: list[dict[str, Any]] = []
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{stack.address}/v1/realtime?model={model}") as socket,
        ):
            for event in told(model):
                await socket.send_json(event)
            while not got or got[-1]["type"] != "transcription.done":
                got.append(await socket.receive_json(timeout=TIMEOUT_SECS))
        return got

    check(model, asyncio.run(talk()))


def test_websockets(stack: Stack, model):
    got: list[dict[str, Any]] = []
    with connect(address(stack, model), open_timeout=TIMEOUT_SECS) as socket:
        assert socket.ping().wait(TIMEOUT_SECS), "a ping goes to the engine and comes back"
        for event in told(model):
            socket.send(json.dumps(event))
        while not got or got[-1]["type"] != "transcription.done":
            got.append(json.loads(socket.recv(timeout=TIMEOUT_SECS)))
    check(model, got)


def test_openais_own(stack: Stack):
    async def talk() -> list[Any]:
        got: list[Any] = []
        async with stack.async_openai() as client, client.realtime.connect(model="birch") as connection:
            for event in told("birch"):
                await connection.send(event)
            async for event in connection:
                got.append(event)
                if event.type == "transcription.done":
                    return got
        return got

    got = asyncio.run(asyncio.wait_for(talk(), TIMEOUT_SECS))
    assert got[0].type == "session.created"
    assert got[-1].text.split()[0] == "birch"


def test_a_model_that_there_is_not(stack: Stack):
    with pytest.raises(websockets.InvalidStatus) as error, connect(address(stack, "oak")):
        pass
    assert error.value.response.status_code == 404
    assert json.loads(error.value.response.body)["error"]["code"] == "model_not_found"


def test_no_model_at_all(stack: Stack):
    with pytest.raises(websockets.InvalidStatus) as error, connect(f"ws://127.0.0.1:{stack.port}/v1/realtime"):
        pass
    assert error.value.response.status_code == 400


@pytest.mark.parametrize("path", ["/v1/completions?model=cedar", "/sleep?model=cedar", "/v1/models"])
def test_no_other_path_is_a_websocket(stack: Stack, path):
    with pytest.raises(websockets.InvalidStatus) as error, connect(f"ws://127.0.0.1:{stack.port}{path}"):
        pass
    assert error.value.response.status_code in (400, 404, 405)


def test_who_hangs_up_leaves_nothing_in_the_engine(broken: Stack):
    broken.ask("cedar")
    broken.fault("cedar", "hang_generation")
    with connect(address(broken, "cedar")) as socket:
        for event in told("cedar")[:3]:
            socket.send(json.dumps(event))
        until(lambda: broken.running("cedar") == 1, "it is in the engine")
        assert broken.status()["models"]["cedar"]["in_flight"] == 1
    until(lambda: broken.running("cedar") == 0, "it is gone")
    until(broken.idle, "the daemon knows")


def test_an_engine_that_dies_closes_it(broken: Stack):
    broken.ask("cedar")
    with connect(address(broken, "cedar")) as socket:
        assert json.loads(socket.recv(timeout=TIMEOUT_SECS))["type"] == "session.created"
        broken.fault("cedar", "die_after_tokens=1*1")
        for event in told("cedar"):
            socket.send(json.dumps(event))
        until(lambda: _is_closed(socket), "it is closed")


def _is_closed(socket: ClientConnection) -> bool:
    """Whether, after what was sent before, it is at its end."""
    try:
        socket.recv(timeout=TIMEOUT_SECS)
    except websockets.ConnectionClosed:
        return True
    return False
