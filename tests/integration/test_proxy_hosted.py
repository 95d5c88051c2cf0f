"""The proxy's application in an aiohttp server of one's own: the same answers, one request per connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from llmuxd.core import events as e
from tests.integration.proxy_stack import Asked, Client, Script, Stack, plain, post, serving, until

BODY = b'{"model": "a", "stream": true}'


@contextlib.asynccontextmanager
async def hosted(folder: Path, script: Script | None = None) -> AsyncIterator[tuple[Stack, web.AppRunner]]:
    """A stack, and a runner of aiohttp's own that serves its application, too; `stack.connect` leads there."""
    async with serving(folder, script) as stack:
        assert stack.site is not None
        runner = web.AppRunner(stack.site._runner.app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        stack.site.port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        try:
            yield stack, runner
            await until(lambda: not runner.server or not runner.server.connections, "its server knows of no connection")
        finally:
            await runner.cleanup()


async def echo(asked: Asked) -> None:
    await asked.send(plain(asked.target.encode() + b" " + asked.body))


@pytest.mark.parametrize(
    "request_",
    [
        post("/v1/completions", BODY),
        b"POST /v1/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n"
        % (len(BODY), BODY),
        post("/v1/completions", BODY).replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["counted", "chunked", "HTTP/1.0"],
)
def test_a_request_is_relayed_and_its_connection_closed(tmp_path: Path, request_: bytes) -> None:
    async def run() -> None:
        async with hosted(tmp_path, echo) as (stack, _):
            client = await stack.connect()
            await client.send(request_)
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"/v1/completions " + BODY)
            assert await client.ended() == b""
            assert stack.count("a", 200) == 1

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (b"GET /sleep HTTP/1.1\r\nHost: h\r\n\r\n", 404, "unknown_url"),
        (b"GET /v1/%2e%2e/sleep HTTP/1.1\r\nHost: h\r\n\r\n", 400, "invalid_url"),
        (b"OPTIONS * HTTP/1.1\r\nHost: h\r\n\r\n", 400, "invalid_url"),
        (post("/v1/completions", b'{"model": "b"}'), 404, "model_not_found"),
        (post("/v1/completions", b"x" * (4 * 1024 * 1024 + 1)), 413, "body_too_large"),
    ],
)
def test_what_is_refused_is_refused_in_the_same_words(tmp_path: Path, request_: bytes, status: int, code: str) -> None:
    async def run() -> None:
        async with hosted(tmp_path, echo) as (stack, _):
            client = await stack.connect()
            await client.send(request_)
            answer = await client.answer()
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (status, code)
            assert stack.engines["a"].connections == 0

    asyncio.run(run())


async def in_mid_stream(stack: Stack) -> tuple[Client, Asked]:
    client = await stack.connect()
    await client.send(post("/v1/completions", BODY))
    asked = await stack.engines["a"].next()
    await asked.stream()
    await asked.chunk(b"data: 1\n\n")
    await client.head()
    assert await client.chunk() == b"data: 1\n\n"
    return client, asked


def test_a_stream_goes_through_as_it_comes(tmp_path: Path) -> None:
    async def run() -> None:
        async with hosted(tmp_path) as (stack, _):
            client, asked = await in_mid_stream(stack)
            await asked.chunk(b"data: 2\n\n")
            assert await client.chunk() == b"data: 2\n\n"
            await asked.send(b"0\r\n\r\n")
            assert await client.chunk() == b""
            assert stack.ended == [e.RequestFinished(1, True)]

    asyncio.run(run())


def test_a_client_that_leaves_ends_its_generation(tmp_path: Path) -> None:
    async def run() -> None:
        async with hosted(tmp_path) as (stack, _):
            client, asked = await in_mid_stream(stack)
            client.writer.transport.abort()
            await asked.gone()
            assert stack.ended == [e.ClientLeft(1)]

    asyncio.run(run())
