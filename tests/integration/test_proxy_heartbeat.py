"""Comments for streams that wait: they come when nothing else does, change nothing, and hide no failure.

A second stream that waits is the clock where a test must know that comments would have come by now.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from llmuxd.core import events as e
from tests.integration.proxy_stack import (
    Asked,
    Client,
    Head,
    Stack,
    plain,
    post,
    serving,
    settled,
    soon,
    until,
)

SECS = 0.02
NEVER_DUE_SECS = 3600.0
MORE_THAN_FITS = 1 << 20
"""Bytes, into the buffers that the system keeps for a client that does not read."""

COMMENT = b": llmux waiting for a\n\n"
EVENTS = [b"data: 1\n\n", b"data: {", b'"x": 2}\n\n', b"data: [DONE]\n\n"]
WHOLE = b"".join(EVENTS)
MESSAGES = "/v1/messages"


async def waiting(stack: Stack, target: str = "/v1/completions") -> tuple[Client, Head]:
    """A client whose stream of model a has begun with two comments."""
    client = await stack.connect()
    await client.ask(target=target, stream=True)
    head = await client.head()
    assert await client.chunk() == COMMENT
    assert await client.chunk() == COMMENT
    return client, head


async def next_event(client: Client) -> bytes:
    """The next chunk that is no comment; empty at the end of the stream."""
    while (chunk := await client.chunk()) == COMMENT:
        pass
    return chunk


async def whole(client: Client) -> bytes:
    """What else comes until the stream ends as it should, comments left out."""
    body = b""
    while chunk := await next_event(client):
        body += chunk
    return body


@contextlib.asynccontextmanager
async def beats(folder: Path) -> AsyncIterator[Callable[[], Any]]:
    """A waiting stream of another stack, and what awaits five more comments of it."""
    (folder / "clock").mkdir()
    async with serving(folder / "clock", holds=("a",), heartbeat_secs=SECS) as stack:
        clock, _ = await waiting(stack)

        async def five_beats() -> None:
            for _ in range(5):
                assert await clock.chunk() == COMMENT

        yield five_beats
        clock.writer.close()


async def answer_with(asked: Asked, chunks: list[bytes]) -> None:
    await asked.stream()
    for chunk in chunks:
        await asked.chunk(chunk)
    await asked.send(b"0\r\n\r\n")


def error_of(event: bytes, target: str) -> dict[str, Any]:
    """The error object of an event in the form of that API."""
    named = target in (MESSAGES, "/v1/responses")
    if named:
        assert event.startswith(b"event: error\ndata: ")
        event = event.removeprefix(b"event: error\n")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    value: dict[str, Any] = json.loads(event.removeprefix(b"data: "))
    assert value.get("type") == ("error" if named else None)
    error: dict[str, Any] = value["error"]
    return error


# Streams that wait for their answer


def test_a_stream_that_waits_for_its_model_gets_comments_and_then_all_of_its_answer(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",), heartbeat_secs=SECS) as stack:
            client, head = await waiting(stack)
            assert head.first == "HTTP/1.1 200 OK"
            assert head.get("content-type") == "text/event-stream; charset=utf-8"
            assert head.get("cache-control") == "no-cache"
            assert head.get("transfer-encoding") == "chunked"
            assert (head.get("server-timing") or "").startswith("queue;dur=")
            assert stack.engines["a"].connections == 0
            stack.started("a")
            asked = await stack.engines["a"].next()
            assert asked.head.get("x-request-id") == head.get("x-request-id")
            await answer_with(asked, EVENTS)
            assert await whole(client) == WHOLE
            assert stack.ended == [e.RequestFinished(1, True)]
            await until(lambda: stack.count("a", 200) == stack.counted() == 1, "it is counted")
            # The connection is as good as new.
            await client.ask()
            await (await stack.engines["a"].next()).send(plain(b"{}"))
            assert (await client.answer()).body == b"{}"

    asyncio.run(run())


def test_a_stream_that_waits_for_its_first_byte_gets_comments(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client, head = await waiting(stack)
            assert head.get("server-timing") == "queue;dur=0.0, switch;dur=0.0"
            asked = await stack.engines["a"].next()
            await asked.stream()  # Its head alone is no sign of life.
            assert await client.chunk() == COMMENT
            assert await client.chunk() == COMMENT
            for chunk in EVENTS:
                await asked.chunk(chunk)
                assert await next_event(client) == chunk
            await asked.send(b"0\r\n\r\n")
            assert await whole(client) == b""

    asyncio.run(run())


@pytest.mark.parametrize("request_head", ["X-Request-Id: mine", "model-override: a"])
def test_headers_of_the_request_change_nothing_about_it(tmp_path: Path, request_head: str) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client = await stack.connect()
            body = b'{"model": "a", "stream": true}'
            await client.send(post("/v1/chat/completions?x=1", body, request_head))
            head = await client.head()
            assert await client.chunk() == COMMENT
            assert (head.get("x-request-id") == "mine") is request_head.startswith("X-")
            await answer_with(await stack.engines["a"].next(), EVENTS)
            assert await whole(client) == WHOLE

    asyncio.run(run())


def test_an_answer_in_time_is_the_engines_own(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=NEVER_DUE_SECS) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            await asked.stream("text/event-stream")
            await asked.chunk(EVENTS[0])
            await asked.send(b"0\r\n\r\n")
            head = await client.head()
            names = sorted(name.lower() for name, _ in head.headers)
            assert names == ["content-type", "server-timing", "transfer-encoding", "x-request-id"]
            assert head.get("content-type") == "text/event-stream"
            assert await whole(client) == EVENTS[0]

    asyncio.run(run())


JSON = "Content-Type: application/json"
STREAM = b'{"model": "a", "stream": true}'


@pytest.mark.parametrize(
    "request_bytes",
    [
        post("/v1/completions", b'{"model": "a"}'),
        post("/v1/completions", b'{"model": "a", "stream": false}'),
        post("/v1/completions", b'{"model": "a", "stream": "true"}'),
        post("/v1/completions", b"gzipped", "Content-Encoding: gzip", "model-override: a"),
        post("/v1/embeddings", STREAM),
        post("/v1/messages/count_tokens", STREAM),
        post("/v1/completions", STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post("/v1/completions", STREAM).replace(b"POST", b"PUT"),
    ],
)
def test_all_other_requests_wait_in_silence(tmp_path: Path, request_bytes: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",), heartbeat_secs=SECS) as stack:
            client = await stack.connect()
            await client.send(request_bytes)
            await until(lambda: stack.switcher.state.queued == 1, "it is queued")
            async with beats(tmp_path) as five_beats:
                await five_beats()
                stack.started("a")
                asked = await stack.engines["a"].next()
                await five_beats()
                await asked.send(plain(b'{"ok": true}', JSON, status="201 Made"))
                answer = await client.answer()
                assert (answer.status, answer.reason, answer.body) == (201, "Made", b'{"ok": true}')

    asyncio.run(run())


def test_with_a_heartbeat_of_0_there_are_no_comments(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",), heartbeat_secs=0.0) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            await until(lambda: stack.switcher.state.queued == 1, "it is queued")
            await asyncio.sleep(2 * SECS)
            stack.started("a")
            asked = await stack.engines["a"].next()
            await asked.stream()
            await asked.chunk(EVENTS[0])
            assert (await client.head()).get("cache-control") is None
            assert await client.chunk() == EVENTS[0]
            await asyncio.sleep(2 * SECS)
            await asked.chunk(EVENTS[3])
            assert await client.chunk() == EVENTS[3]
            await asked.send(b"0\r\n\r\n")
            assert await client.chunk() == b""

    asyncio.run(run())


# Failures after comments


@pytest.mark.parametrize("target", ["/v1/chat/completions", MESSAGES])
def test_a_refusal_after_comments_is_an_event(tmp_path: Path, target: str) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",), heartbeat_secs=SECS, request_timeout=30.0) as stack:
            client, _ = await waiting(stack, target)
            stack.pass_time(31.0)
            error = error_of(await next_event(client), target)
            assert error["type"] == "timeout_error"
            assert error["message"]
            if target != MESSAGES:
                assert (error["code"], error["param"]) == ("queue_timeout", None)
            assert await client.chunk() == b"", "nothing was cut: a regular end"
            await until(lambda: stack.count("a", 504) == stack.counted() == 1, "it is counted")
            await client.send(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
            assert (await client.answer()).status == 200

    asyncio.run(run())


@pytest.mark.parametrize("forwarded", [False, True])
def test_a_stream_of_comments_that_the_core_ends(tmp_path: Path, forwarded: bool) -> None:
    async def run() -> None:
        holds = () if forwarded else ("a",)
        async with serving(tmp_path, holds=holds, heartbeat_secs=SECS) as stack:
            client, _ = await waiting(stack)
            asked = await stack.engines["a"].next() if forwarded else None
            stack.post(e.Shutdown(stack.now))
            stack.pass_time(0.1)
            assert error_of(await next_event(client), "")["code"] == "shutting_down"
            assert await client.chunk() == b""
            if asked is not None:
                await asked.gone()
            assert stack.ended == []
            await until(lambda: stack.count("a", 503) == stack.counted() == 1, "it is counted")

    asyncio.run(run())


OWN_ERROR = {"error": {"message": "too long", "type": "BadRequestError", "param": "prompt", "code": 400}}


@pytest.mark.parametrize(
    ("raw", "status", "error"),
    [
        (plain(json.dumps(OWN_ERROR, indent=1).encode(), JSON, status="400 Bad Request"), 400, OWN_ERROR["error"]),
        (
            plain(b'{"choices": []}', JSON),
            502,
            {
                "message": 'the engine answered 200: {"choices": []}',
                "type": "server_error",
                "param": None,
                "code": "engine_error",
            },
        ),
        (
            plain(b"data: {}\n\n", "Content-Type: text/event-stream", status="404 Not Found"),
            404,
            {
                "message": "the engine answered 404: data: {}\n\n",
                "type": "invalid_request_error",
                "param": None,
                "code": "engine_error",
            },
        ),
        (
            plain(b"packed", "Content-Type: text/event-stream", "Content-Encoding: gzip"),
            502,
            {
                "message": "the engine answered 200: packed",
                "type": "server_error",
                "param": None,
                "code": "engine_error",
            },
        ),
    ],
)
def test_an_answer_that_is_no_stream_after_comments(
    tmp_path: Path, raw: bytes, status: int, error: dict[str, Any]
) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client, _ = await waiting(stack)
            asked = await stack.engines["a"].next()
            await asked.send(raw)
            assert error_of(await next_event(client), "") == error
            assert await client.chunk() == b""
            assert stack.ended == [e.RequestFinished(1, True)]
            await until(lambda: stack.count("a", status) == stack.counted() == 1, "it is counted")

    asyncio.run(run())


def test_an_engines_error_in_anthropics_form_after_comments(tmp_path: Path) -> None:
    said = {"type": "error", "error": {"type": "BadRequestError", "message": "too long"}}

    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client, _ = await waiting(stack, MESSAGES)
            asked = await stack.engines["a"].next()
            await asked.send(plain(json.dumps(said).encode(), JSON, status="400 Bad Request"))
            assert error_of(await next_event(client), MESSAGES) == said["error"]
            assert await client.chunk() == b""

    asyncio.run(run())


def test_an_error_that_breaks_off_after_comments(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client, _ = await waiting(stack)
            asked = await stack.engines["a"].next()
            await asked.send(plain(b'{"error": {}}', JSON, status="400 Bad Request")[:-5])
            asked.writer.close()
            assert error_of(await next_event(client), "")["code"] == "engine_died"
            assert await client.chunk() == b""
            assert stack.ended == [e.RequestFinished(1, False)]

    asyncio.run(run())


@pytest.mark.parametrize("target", ["/v1/responses", MESSAGES])
def test_a_stream_that_breaks_off_after_comments_has_no_end(tmp_path: Path, target: str) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client, _ = await waiting(stack, target)
            asked = await stack.engines["a"].next()
            await asked.stream()
            await asked.chunk(EVENTS[0])
            assert await next_event(client) == EVENTS[0]
            asked.die()
            error = error_of(await next_event(client), target)
            assert error["type"] == ("api_error" if target == MESSAGES else "server_error")
            assert await client.ended() == b"", "no end of the body"
            assert stack.ended == [e.RequestFinished(1, False)]
            await until(lambda: stack.count("a", 502) == stack.counted() == 1, "it is counted")

    asyncio.run(run())


@pytest.mark.parametrize("again", [True, False])
def test_a_retry_after_comments_is_unseen_and_happens_once(tmp_path: Path, again: bool) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client, _ = await waiting(stack)
            first = await stack.engines["a"].next()
            await first.stream()
            first.die()
            await until(lambda: stack.ended == [e.RequestBounced(1)], "it bounced")
            assert await client.chunk() == COMMENT
            stack.dies("a")
            stack.pass_time(2.0)
            second = await stack.engines["a"].next()
            assert (second.head, second.body) == (first.head, first.body)
            assert await client.chunk() == COMMENT
            if again:
                await answer_with(second, EVENTS)
                assert await whole(client) == WHOLE
                assert stack.ended == [e.RequestBounced(1), e.RequestFinished(1, True)]
            else:
                second.die()
                assert error_of(await next_event(client), "")["code"] == "engine_died"
                assert await client.chunk() == b""
                await until(lambda: stack.count("a", 502) == 1, "it is counted")
            assert stack.engines["a"].connections == 2

    asyncio.run(run())


# Streams that fall silent


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([b"data: {"], [b"}\n\n"]),
        ([b"data: 1\n"], [b"\n"]),
        ([b"data: 1\r\n", b"\r"], [b"\n"]),
        ([b"event: x\r\n"], [b"data: 1\r\n", b"\r\n"]),
    ],
)
def test_a_stream_that_falls_silent_gets_comments_between_events_only(
    tmp_path: Path, before: list[bytes], after: list[bytes]
) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack, beats(tmp_path) as five_beats:
            client = await stack.connect()
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            await asked.stream()
            await asked.chunk(EVENTS[0])
            await client.head()
            assert await next_event(client) == EVENTS[0]
            assert await client.chunk() == COMMENT
            assert await client.chunk() == COMMENT
            for n, chunk in enumerate(before):
                await asked.chunk(chunk)
                assert await (client.chunk() if n else next_event(client)) == chunk
            await five_beats()
            for chunk in after:
                await asked.chunk(chunk)
                assert await client.chunk() == chunk, "a comment in the middle of an event"
            assert await client.chunk() == COMMENT
            await asked.send(b"0\r\n\r\n")
            assert await whole(client) == b""
            assert stack.ended[-1] == e.RequestFinished(1, True)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        (b"Content-Type: application/json\r\nTransfer-Encoding: chunked", b"2\r\n\n\n\r\n"),
        (b"Content-Type: text/event-stream\r\nContent-Length: 10", b"\n\n"),
        (b"Content-Type: text/event-stream\r\nContent-Encoding: gzip\r\nTransfer-Encoding: chunked", b"2\r\n\n\n\r\n"),
    ],
)
def test_what_is_no_plain_event_stream_gets_none(tmp_path: Path, headers: bytes, body: bytes) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack, beats(tmp_path) as five_beats:
            client = await stack.connect()
            await client.ask()
            asked = await stack.engines["a"].next()
            await asked.send(b"HTTP/1.1 200 OK\r\n" + headers + b"\r\n\r\n" + body)
            await client.head()
            assert await soon(client.reader.readexactly(len(body))) == body
            await five_beats()
            asked.writer.close()
            assert await client.ended() == b""

    asyncio.run(run())


def test_a_client_of_http_1_0_gets_none(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack, beats(tmp_path) as five_beats:
            client = await stack.connect()
            await client.send(post("/v1/completions", STREAM).replace(b"HTTP/1.1", b"HTTP/1.0"))
            asked = await stack.engines["a"].next()
            await asked.stream()
            await asked.chunk(EVENTS[0])
            await client.head()
            assert await soon(client.reader.readexactly(len(EVENTS[0]))) == EVENTS[0]
            await five_beats()
            await asked.chunk(EVENTS[3])
            await asked.send(b"0\r\n\r\n")
            assert await client.ended() == EVENTS[3]

    asyncio.run(run())


def test_a_stream_that_is_not_silent_gets_none(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=SECS) as stack:
            client = await stack.connect()
            await client.ask(stream=True)
            asked = await stack.engines["a"].next()
            loop = asyncio.get_running_loop()
            begun = sent = loop.time()
            await asked.stream()
            await asked.chunk(EVENTS[0])
            await client.head()
            assert await next_event(client) == EVENTS[0]
            while loop.time() < begun + 5 * SECS:
                sent_before, sent = sent, loop.time()
                await asked.chunk(EVENTS[3])
                while await client.chunk() == COMMENT:
                    assert loop.time() - sent_before >= SECS, "the engine was heard of in that time"
            await asked.send(b"0\r\n\r\n")
            assert await whole(client) == b""

    asyncio.run(run())


# Clients that leave, and clients that do not read


def close(client: Client) -> None:
    client.writer.close()


def reset(client: Client) -> None:
    client.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.writer.transport.abort()


def half_close(client: Client) -> None:
    client.writer.write_eof()


@pytest.mark.parametrize("leave", [close, reset, half_close])
@pytest.mark.parametrize("forwarded", [False, True])
def test_a_client_that_leaves_after_comments(tmp_path: Path, leave: Callable[[Client], None], forwarded: bool) -> None:
    async def run() -> None:
        holds = () if forwarded else ("a",)
        async with serving(tmp_path, holds=holds, heartbeat_secs=SECS) as stack:
            client, _ = await waiting(stack)
            asked = await stack.engines["a"].next() if forwarded else None
            leave(client)
            await until(stack.idle, "it has left")
            if asked is not None:
                await asked.gone()
            assert stack.ended == [e.ClientLeft(1)]
            await until(lambda: stack.count("a", 499) == stack.counted() == 1, "it is counted")
            assert stack.engines["a"].connections == int(forwarded)

    asyncio.run(run())


async def who_does_not_read(stack: Stack) -> tuple[socket.socket, asyncio.Transport]:
    """A client with a stream of comments that it does not read, when no more of them fit; and its connection."""
    assert stack.site is not None
    loop = asyncio.get_running_loop()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.setblocking(False)
    await loop.sock_connect(client, ("127.0.0.1", stack.site.port))
    connections = stack.site._proxy.connections
    await until(lambda: len(connections) == 1, "it is connected")
    transport = next(iter(connections))._transport
    assert transport is not None
    connected = transport.get_extra_info("socket")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    await loop.sock_sendall(client, post("/v1/completions", STREAM))
    # 200 heartbeats after it is full it is still this one comment that waits to be taken.
    waiting = 0
    while not waiting:
        await until(lambda: transport.get_write_buffer_size() > 0, "the connection is full")
        waiting = await settled(transport.get_write_buffer_size)
    assert waiting <= len(COMMENT) + 10
    return client, transport


def test_comments_that_are_not_read_do_not_pile_up(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, heartbeat_secs=0.001) as stack:
            client, _ = await who_does_not_read(stack)
            with client:
                await answer_with(await stack.engines["a"].next(), EVENTS)
                received = b""
                while not received.endswith(b"\r\n0\r\n\r\n"):
                    received += await soon(asyncio.get_running_loop().sock_recv(client, 65536))
            body = received.partition(b"\r\n\r\n")[2]
            chunks = re.findall(rb"[0-9a-f]+\r\n(.*?)\r\n(?=[0-9a-f]+\r\n)", body, re.DOTALL)
            assert b"".join(chunk for chunk in chunks if chunk != COMMENT) == WHOLE

    asyncio.run(run())


def test_a_client_that_leaves_without_having_read_its_comments(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",), heartbeat_secs=0.001) as stack:
            client, _ = await who_does_not_read(stack)
            client.close()
            await until(stack.idle, "it has left")
            assert stack.ended == [e.ClientLeft(1)]

    asyncio.run(run())


def test_a_refusal_does_not_wait_for_a_client_that_does_not_read(tmp_path: Path) -> None:
    limits = {"send_timeout_secs": 0.5}

    async def run() -> None:
        async with serving(tmp_path, holds=("a",), heartbeat_secs=0.001, limits=limits, request_timeout=30.0) as stack:
            client, transport = await who_does_not_read(stack)
            with client:
                # The system may yet take a comment and the refusal from it, but never all of this.
                transport.set_write_buffer_limits(2 * MORE_THAN_FITS)
                transport.write(bytes(MORE_THAN_FITS))
                stack.pass_time(31.0)
                await until(lambda: stack.count("a", 504) == 1, "it has ended")
                transport.set_write_buffer_limits(0)
                assert stack.site is not None
                connections = stack.site._proxy.connections
                await until(lambda: not connections, "its connection is closed, unread as it is")

    asyncio.run(run())
