"""Clients that go: in every byte of a request, at every point of an answer, in every way in which one can go.

Nothing is forwarded before it is complete, what was forwarded is broken off, and nothing of it is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.wire.cases import BODY
from tests.wire.client import Client, get, post, request
from tests.wire.engine import Asked, chunked, plain
from tests.wire.stack import Wire, play, turns, until

Leave = Callable[[Client], None]

LEAVING = pytest.mark.parametrize(
    "leave", [Client.close, Client.reset, Client.half_close], ids=["close", "reset", "half"]
)

REQUESTS = {
    "length": post(BODY, "X-A: b", target="/v1/completions?x=y"),
    "chunks": request(
        "POST /v1/chat/completions HTTP/1.1",
        "Host: h",
        "Transfer-Encoding: chunked",
        body=b"5;x=y\r\n" + BODY[:5] + b"\r\n9\r\n" + BODY[5:] + b"\r\n0\r\nX-T: u\r\n\r\n",
    ),
    "no body": get("/v1/responses/r1?model=a"),
    "expectation": post(BODY, "Expect: 100-continue"),
    "HTTP/1.0": request("POST /v1/x?model=a HTTP/1.0", f"Content-Length: {len(BODY)}", body=BODY),
    "after a blank line": b"\r\n" + post(BODY),
}


@LEAVING
@pytest.mark.parametrize("kind", REQUESTS)
def test_in_every_byte_of_a_request(kind: str, leave: Leave, tmp_path: Path) -> None:
    sent = REQUESTS[kind]

    async def scenario(wire: Wire) -> None:
        for at in range(len(sent)):
            client = await wire.connect()
            await client.send(sent[:at])
            await turns(6)
            leave(client)
            if leave is Client.half_close:
                # It may still be told what was wrong, but the connection ends.
                assert b" 200 " not in await client.rest(), at
        await wire.after(0.0)
        await until(lambda: not wire.tickets(), "nobody is served")
        assert wire.engine.received == 0
        assert wire.ended == []

    play(tmp_path, scenario)


@LEAVING
@pytest.mark.parametrize("kind", REQUESTS)
def test_right_behind_the_last_byte(kind: str, leave: Leave, tmp_path: Path) -> None:
    """It may or may not have reached the engine: then it is broken off there."""

    async def scenario(wire: Wire) -> None:
        for pause in range(12):
            client = await wire.connect()
            await client.send(REQUESTS[kind])
            await turns(pause)
            leave(client)
        await until(lambda: not wire.tickets(), "all have left")
        for asked in wire.engine.asked:
            await asked.gone()
            asked.answered.set()
        await until(wire.idle, "the core knows")

    play(tmp_path, scenario)


@LEAVING
def test_in_every_byte_of_the_second_request_while_the_first_is_served(leave: Leave, tmp_path: Path) -> None:
    """A client that has left does not wait for its first answer either."""
    first, second = post(BODY), post(b'{"model": "a", "n": 2}')

    async def scenario(wire: Wire) -> None:
        for at in range(0, len(second) + 1, 3):
            client = await wire.connect()
            await client.send(first + second[:at])
            asked = await wire.engine.next()
            leave(client)
            await asked.gone()
            asked.answered.set()
            await until(lambda: not wire.tickets(), "it has left")
        assert set(wire.engine.bodies) == {BODY}

    play(tmp_path, scenario)


@LEAVING
def test_while_it_is_queued(leave: Leave, tmp_path: Path) -> None:
    async def scenario(wire: Wire) -> None:
        for _ in range(5):
            client = await wire.connect()
            await client.send(post(BODY))
            await until(lambda: wire.switcher.state.queued == 1, "it is queued")
            leave(client)
            await until(lambda: not wire.tickets(), "it has left")
        assert wire.engine.received == 0

    play(tmp_path, scenario, holds=("a",))


@LEAVING
def test_in_the_moment_in_which_it_is_let_through(leave: Leave, tmp_path: Path) -> None:
    """Both in one turn of the loop, in either order."""

    async def scenario(wire: Wire) -> None:
        for turn in range(10):
            wire.holds.add("a")
            client = await wire.connect()
            await client.send(post(BODY))
            await until(wire.tickets, "it is there")
            if turn % 2:
                leave(client)
                await turns(turn // 2)
            if wire.switcher.state.models["a"].state.value != "awake":
                wire.started("a")
            if not turn % 2:
                await turns(turn // 2)
                leave(client)
            await until(lambda: not wire.tickets(), "it has left")
            for asked in wire.engine.asked:
                await asked.gone()
                asked.answered.set()

    play(tmp_path, scenario, holds=("a",))


@LEAVING
def test_in_the_middle_of_a_large_body_that_its_engine_has_not_taken_yet(leave: Leave, tmp_path: Path) -> None:
    async def reads_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.set()
        await let_go.wait()
        writer.close()

    accepted, let_go = asyncio.Event(), asyncio.Event()

    async def scenario(wire: Wire) -> None:
        wire.engine.raw = reads_nothing
        client = await wire.connect()
        await client.send(post(BODY + b" " * 1_000_000))
        await accepted.wait()
        await turns()
        leave(client)
        await until(lambda: not wire.tickets(), "it has left")
        let_go.set()

    play(tmp_path, scenario)


ANSWERS = {
    "length": plain(b'{"text": "some words"}', "Content-Type: application/json"),
    "chunks": chunked(b'{"text": ', b'"some words"}', content_type="application/json"),
    "events": chunked(b"data: 1\n\n", b"data: 2\n\ndata: 3\n", b"\ndata: [DONE]\n\n"),
    "until close": b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\nsome words",
}


@LEAVING
@pytest.mark.parametrize("kind", ANSWERS)
def test_in_every_byte_of_an_answer(kind: str, leave: Leave, tmp_path: Path) -> None:
    raw = ANSWERS[kind]

    async def scenario(wire: Wire) -> None:
        whole = len(raw) if kind != "until close" else len(raw) + 1
        for at in range(whole):
            client = await wire.connect()
            await client.send(post(BODY))
            asked = await wire.engine.next()
            await asked.send(raw[:at])
            await turns(at % 7)
            leave(client)
            await asked.gone()
            asked.answered.set()
            await until(lambda: not wire.tickets(), "it has left")
        assert len(wire.engine.asked) == whole

    play(tmp_path, scenario)


@LEAVING
@pytest.mark.parametrize("taken", [1, 20, 200, 65_536, 1_000_000])
def test_in_the_middle_of_a_large_answer_of_which_it_has_read_some(leave: Leave, taken: int, tmp_path: Path) -> None:
    async def script(asked: Asked) -> None:
        asked.writer.write(plain(bytes(32 << 20)))
        await asked.gone()
        asked.answered.set()

    async def scenario(wire: Wire) -> None:
        client = await wire.connect()
        await client.send(post(BODY))
        assert len(await client.bytes(taken)) == taken
        leave(client)
        await until(lambda: not wire.tickets(), "it has left")
        if leave is Client.half_close:
            client.reset()

    play(tmp_path, scenario, script)


@LEAVING
def test_many_at_once(leave: Leave, tmp_path: Path) -> None:
    """A hundred, in all phases; one that stays is served all the same."""

    async def script(asked: Asked) -> None:
        if b'"stays"' in asked.body:
            await asked.answer(plain(b"here"))
            return
        await asked.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n")
        await asked.gone()
        asked.answered.set()

    async def scenario(wire: Wire) -> None:
        sent = post(BODY)
        clients = [await wire.connect() for _ in range(100)]
        await asyncio.gather(*(client.send(sent[: len(sent) * n // 60]) for n, client in enumerate(clients)))
        await turns()
        for client in clients:
            leave(client)
        stays = await wire.connect()
        await stays.send(post(b'{"model": "a", "who": "stays"}'))
        answer = await stays.answer()
        assert answer is not None
        assert answer.body == b"here"
        await until(lambda: not wire.tickets(), "all have left")

    play(tmp_path, scenario, script)
