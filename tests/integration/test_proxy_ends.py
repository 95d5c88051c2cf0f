"""How requests end other than well: clients that leave, and engines that die.

Each ends exactly once for the core, and no answer that broke off looks like a whole one.
"""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from llmuxd.core import events as e
from llmuxd.proxy import connection
from tests.integration.proxy_stack import (
    Asked,
    Client,
    Script,
    Stack,
    answering,
    plain,
    post,
    serving,
    settled,
    soon,
    until,
)

DONE = b"data: [DONE]\n\n"
OK = plain(b'{"ok": true}', "Content-Type: application/json")


def close(client: Client) -> None:
    client.writer.close()


def reset(client: Client) -> None:
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


def half_close(client: Client) -> None:
    client.writer.write_eof()


LEAVING = pytest.mark.parametrize("leave", [close, reset, half_close])


# Clients that leave


@LEAVING
def test_a_client_that_leaves_is_gone_from_the_queue(tmp_path: Path, leave: Callable[[Client], None]) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",)) as stack:
            client = await stack.connect()
            await client.ask()
            await until(lambda: stack.switcher.state.queued == 1, "it is queued")
            leave(client)
            await until(stack.idle, "it has left")
            assert stack.ended == [e.ClientLeft(1)]
            await until(lambda: stack.count("a", 499) == 1, "it is counted")
            assert stack.engines["a"].connections == 0

    asyncio.run(run())


@LEAVING
def test_a_client_that_leaves_before_the_first_byte(tmp_path: Path, leave: Callable[[Client], None]) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask()
            asked = await stack.engines["a"].next()
            leave(client)
            await asked.gone()
            await until(stack.idle, "it has left")
            assert stack.ended == [e.ClientLeft(1)]
            await until(lambda: stack.count("a", 499) == 1, "it is counted")

    asyncio.run(run())


@LEAVING
def test_a_client_that_leaves_a_silent_stream(tmp_path: Path, leave: Callable[[Client], None]) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client, asked = await stack.in_mid_stream()
            leave(client)
            await asked.gone()
            await until(stack.idle, "it has left")
            assert stack.ended == [e.ClientLeft(1)]
            await until(lambda: stack.counted() == 1, "it is counted")

    asyncio.run(run())


@pytest.mark.parametrize("leave", [close, half_close])
def test_a_client_that_leaves_after_the_last_event(tmp_path: Path, leave: Callable[[Client], None]) -> None:
    """As OpenAI's does, which does not wait for the end of the answer: it has got all of it."""

    async def run() -> None:
        async with serving(tmp_path) as stack:
            client, asked = await stack.in_mid_stream()
            await asked.chunk(DONE)
            assert await client.chunk() == DONE
            leave(client)
            await asked.gone()
            await until(stack.idle, "it has left")
            assert stack.ended == [e.RequestFinished(1, True)]
            await until(lambda: stack.count("a", 200) == stack.counted() == 1, "it is counted")

    asyncio.run(run())


def test_a_client_that_leaves_with_the_last_event_unread(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            assert stack.site is not None
            client, asked = await stack.in_mid_stream()
            (connection,) = stack.site._proxy.connections
            client.writer.transport.pause_reading()
            call = connection._exchange._call

            async def send(event: bytes) -> None:
                before = call.bytes_out
                await asked.chunk(event)
                await until(lambda: call.bytes_out > before, "the proxy has passed it on")

            while not connection.unread:
                await send(b": " + bytes(8192) + b"\n\n")
            await send(DONE)
            half_close(client)
            await asked.gone()
            await until(stack.idle, "it has left")
            assert stack.ended == [e.ClientLeft(1)]
            await until(lambda: stack.count("a", 499) == 1, "it is counted")

    asyncio.run(run())


@LEAVING
def test_a_client_that_leaves_without_having_read(tmp_path: Path, leave: Callable[[Client], None]) -> None:
    """Everything between engine and client is full, so the proxy writes nothing that could fail."""

    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            await asked.stream()
            asked.writer.write(b"%x\r\n" % (1 << 26) + bytes(1 << 26))
            assert await settled(asked.writer.transport.get_write_buffer_size) > 0
            leave(client)
            await asked.gone()
            await until(stack.idle, "it has left")
            assert stack.ended == [e.ClientLeft(1)]

    asyncio.run(run())


def test_a_client_that_leaves_in_the_middle_of_its_body(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.send(post("/v1/completions", b'{"model": "a"}')[:-3])
            await asyncio.sleep(0)
            close(client)
            await until(lambda: stack.counted() == 1, "it is counted")
            assert stack.count("-", 499) == 1
            assert stack.ended == []

    asyncio.run(run())


def test_a_client_that_leaves_as_soon_as_it_has_asked(tmp_path: Path) -> None:
    """Whatever of it is read first, its going is not missed."""

    async def run() -> None:
        async with serving(tmp_path, holds=("a",)) as stack:
            assert stack.site is not None
            for n in range(30):
                # Before the proxy's loop turns: request and end are there when it looks for the first time.
                with socket.create_connection(("127.0.0.1", stack.site.port)) as client:
                    client.sendall(post("/v1/completions", b'{"model": "a"}'))
                    if n % 2:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            other = await stack.connect()
            await other.ask()
            await until(lambda: len(stack.switcher.state.requests) == 1, "all but one have left")
            stack.started("a")
            await (await stack.engines["a"].next()).send(OK)
            assert (await other.answer()).status == 200

    asyncio.run(run())


def test_a_client_that_has_its_answer_is_not_one_that_left(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            for _ in range(20):
                answer = await stack.exchange(post("/v1/completions", b'{"model": "a"}', "Connection: close"))
                assert answer.complete
            assert stack.ended == [e.RequestFinished(n, True) for n in range(1, 21)]
            assert stack.count("a", 200) == stack.counted() == 20

    asyncio.run(run())


# Engines that die


async def bounced_once(stack: Stack) -> tuple[Client, Asked]:
    """A request whose engine dies on it, and the second attempt as the next engine sees it."""
    client = await stack.connect()
    await client.ask(prompt="p")
    first = await stack.engines["a"].next()
    await first.send(b"HTTP/1.1 20")  # Not even a whole head.
    first.die()
    await until(lambda: stack.ended == [e.RequestBounced(1)], "it bounced")
    assert stack.switcher.state.queued == 1
    stack.dies("a")
    stack.pass_time(2.0)
    second = await stack.engines["a"].next()
    assert (second.head, second.body) == (first.head, first.body)
    return client, second


def test_a_request_whose_engine_dies_before_its_answer_is_sent_again(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client, second = await bounced_once(stack)
            await second.send(OK)
            answer = await client.answer()
            assert (answer.status, answer.complete) == (200, True)
            assert stack.ended == [e.RequestBounced(1), e.RequestFinished(1, True)]
            assert stack.count("a", 200) == stack.counted() == 1

    asyncio.run(run())


def test_but_only_once(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client, second = await bounced_once(stack)
            second.die()
            answer = await client.answer()
            assert answer.status == 502
            assert answer.error["code"] == "engine_died"
            assert answer.head.get("retry-after") == "2", "by then it is known whether the engine lives"
            assert stack.count("a", 502) == stack.counted() == 1
            await client.ask()  # The connection is still good.
            stack.pass_time(2.0)
            await (await stack.engines["a"].next()).send(OK)
            assert (await client.answer()).status == 200

    asyncio.run(run())


def test_an_engine_that_does_not_listen(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(OK)) as stack:
            path = stack.engines["a"].endpoint.uds
            assert path is not None
            moved = path.rename(path.with_suffix(".moved"))
            client = await stack.connect()
            await client.ask()
            await until(lambda: stack.ended == [e.RequestBounced(1)], "it bounced")
            moved.rename(path)
            stack.dies("a")
            stack.pass_time(2.0)
            assert (await client.answer()).status == 200

    asyncio.run(run())


DEAD = b'{"error": {"message": "EngineCore encountered an issue. See stack trace (above).", "code": 500}}'
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "last_words",
    [
        EVENTS,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
        b"HTTP/1.1 OK\r\n\r\n",
        plain(DEAD, "Content-Type: application/json", status="500 Internal Server Error"),
        EVENTS + b"%x\r\ndata: %s\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n" % (len(DEAD) + 8, DEAD),
    ],
)
def test_an_answer_that_says_nothing_but_that_the_engine_is_dead(tmp_path: Path, last_words: bytes) -> None:
    """vLLM sends a stream's head at once, and tells that its EngineCore is gone in answers that are complete."""

    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            first = await stack.engines["a"].next()
            await first.send(last_words)
            first.writer.close()
            await until(lambda: stack.ended == [e.RequestBounced(1)], "it bounced")
            stack.dies("a")
            stack.pass_time(2.0)
            await (await stack.engines["a"].next()).send(OK)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b'{"ok": true}')
            assert stack.count("a", 200) == stack.counted() == 1

    asyncio.run(run())


def test_an_engine_that_says_in_mid_stream_that_it_is_dead(tmp_path: Path) -> None:
    events = [b"data: 1\n\n", b"data: %s\n\n" % DEAD, b"data: [DONE]\n\n"]

    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            await asked.stream()
            await asked.chunk(events[0])
            await client.head()
            assert await client.chunk() == events[0]
            await asked.send(b"".join(b"%x\r\n%s\r\n" % (len(event), event) for event in [*events[1:], b""]))
            said = json.loads((await client.chunk()).removeprefix(b"data: "))
            assert said["error"]["code"] == "engine_died"
            assert await client.ended() == b"", "no [DONE], and no end that looks like one"
            assert stack.ended == [e.RequestFinished(1, False)]
            await until(lambda: stack.count("a", 502) == stack.counted() == 1, "it is counted")

    asyncio.run(run())


@pytest.mark.parametrize(
    "raw",
    [
        plain(b'{"error": {"message": "out of luck"}}', status="500 Internal Server Error"),
        plain(b'{"text": "EngineCore encountered an issue", "error": null}', "Content-Type: application/json"),
        EVENTS + b"27\r\ndata: EngineCore encountered an issue\n\n\r\n0\r\n\r\n",
    ],
)
def test_an_answer_that_is_none_of_that_is_the_clients(tmp_path: Path, raw: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path, answering(raw)) as stack:
            answer = await stack.exchange(post("/v1/completions", b'{"model": "a"}'))
            assert answer.complete
            assert answer.status == int(raw.split(b" ")[1])
            assert stack.engines["a"].connections == 1

    asyncio.run(run())


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE", "POST"])
def test_nothing_is_sent_twice_to_an_engine_that_hangs_up(tmp_path: Path, method: str) -> None:
    hang_up: Script = answering(b"")

    async def run() -> None:
        async with serving(tmp_path, hang_up) as stack:
            client = await stack.connect()
            await client.send(f"{method} /v1/x?model=a HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n".encode())
            await until(lambda: stack.ended == [e.RequestBounced(1)], "it bounced")
            assert stack.engines["a"].connections == 1
            stack.pass_time(2.0)
            assert (await client.answer(method)).status == 502
            assert stack.engines["a"].connections == 2

    asyncio.run(run())


@pytest.mark.parametrize("partial", [b": here\n\n", b"data: 1\n\n", b"data: 1\r\n\r\n", b"data: {"])
def test_a_stream_that_breaks_off(tmp_path: Path, partial: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            await asked.stream("text/event-stream; charset=utf-8")
            await asked.chunk(partial)
            head = await client.head()
            assert head.first == "HTTP/1.1 200 OK"
            assert await client.chunk() == partial
            asked.die()
            event = await client.chunk()
            if partial == b"data: {":
                assert event.startswith(b"\n\n")
            error = json.loads(event.strip().removeprefix(b"data: "))["error"]
            assert event.endswith(b"\n\n")
            assert (error["code"], error["type"]) == ("engine_died", "server_error")
            assert await client.ended() == b"", "no end of the body"
            assert stack.ended == [e.RequestFinished(1, False)]
            assert stack.count("a", 502) == stack.counted() == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (b"Content-Type: application/json\r\nTransfer-Encoding: chunked", b"3\r\nabc\r\n"),
        (b"Content-Type: application/json\r\nContent-Length: 10", b"abc"),
        (b"Content-Type: text/event-stream\r\nContent-Length: 10", b"abc"),
        (b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked", b"3\r\nabc\r\n"),
    ],
)
def test_other_answers_that_break_off_just_end(tmp_path: Path, headers: bytes, body: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask()
            asked = await stack.engines["a"].next()
            await asked.send(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n" + body)
            await client.head()
            assert await soon(client.reader.readexactly(len(body))) == body
            asked.writer.close()
            assert await client.ended() == b""
            assert stack.ended == [e.RequestFinished(1, False)]

    asyncio.run(run())


def test_a_client_of_http_1_0_is_reset_if_its_answer_breaks_off(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.send(b"GET /v1/x?model=a HTTP/1.0\r\n\r\n")
            asked = await stack.engines["a"].next()
            await asked.stream("text/plain")
            await asked.chunk(b"abc")
            await client.head()
            assert await soon(client.reader.readexactly(3)) == b"abc"
            asked.die()
            with pytest.raises(ConnectionResetError):
                await client.ended()

    asyncio.run(run())


def test_a_client_that_does_not_read_is_not_kept_when_its_answer_breaks_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "BREAK_OFF_SECS", 0.05)

    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            await asked.stream()
            asked.writer.write(b"%x\r\n" % (1 << 26) + bytes(1 << 26))
            assert await settled(asked.writer.transport.get_write_buffer_size) > 0
            stack.post(e.Shutdown(stack.now))
            stack.pass_time(0.1)
            await until(lambda: stack.counted() == 1, "it has ended")
            await asked.gone()
            assert stack.site is not None
            connections = stack.site._proxy.connections
            await until(lambda: not connections, "its connection is closed, unread as it is")

    asyncio.run(run())
