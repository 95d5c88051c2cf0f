"""What becomes of requests when the core refuses them or breaks them off, and when the site closes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from llmuxd.core import events as e
from tests.integration.proxy_stack import post, serving, soon, until


def test_what_the_core_refuses_is_said_in_openais_form(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",), max_queue=1, request_timeout=30.0) as stack:
            waiting = await stack.connect()
            await waiting.ask()
            await until(lambda: stack.switcher.state.queued == 1, "it is queued")

            full = await stack.exchange(post("/v1/completions", b'{"model": "a"}'))
            assert (full.status, full.error["type"], full.error["code"]) == (429, "rate_limit_error", "queue_full")
            assert full.error["param"] is None
            assert full.head.get("content-type") == "application/json"
            assert full.head.get("retry-after") == "60", "what a start is taken to need that nobody has measured"

            stack.pass_time(31.0)
            late = await waiting.answer()
            assert (late.status, late.error["type"], late.error["code"]) == (504, "timeout_error", "queue_timeout")
            assert (late.head.get("server-timing") or "").startswith("queue;dur=")

            stack.post(e.Shutdown(stack.now))
            await waiting.ask()
            down = await waiting.answer()
            assert (down.status, down.error["code"]) == (503, "shutting_down")
            assert (stack.count("a", 429), stack.count("a", 504), stack.count("a", 503)) == (1, 1, 1)

    asyncio.run(run())


def test_a_request_that_the_core_ends_before_its_answer_began(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client = await stack.connect()
            await client.ask()
            asked = await stack.engines["a"].next()
            stack.post(e.Shutdown(stack.now + 1))
            stack.pass_time(1.0)
            answer = await client.answer()
            assert (answer.status, answer.error["code"]) == (503, "shutting_down")
            await asked.gone()
            assert stack.ended == []
            assert stack.count("a", 503) == stack.counted() == 1

    asyncio.run(run())


def test_a_stream_that_the_core_ends(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client, asked = await stack.in_mid_stream()
            stack.post(e.Shutdown(stack.now + 1))
            stack.pass_time(1.0)
            event = await client.chunk()
            assert json.loads(event.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
            assert await client.ended() == b""
            await asked.gone()
            assert stack.ended == []
            assert stack.count("a", 503) == stack.counted() == 1

    asyncio.run(run())


def test_a_request_that_the_core_ends_in_the_moment_it_is_let_through(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path, holds=("a",)) as stack:
            client = await stack.connect()
            await client.ask()
            await until(lambda: stack.switcher.state.queued == 1, "it is queued")
            # Without a turn of the loop in between: the proxy finds both when it comes to run.
            stack.started("a")
            stack.post(e.Shutdown(stack.now))
            stack.pass_time(0.1)
            answer = await client.answer()
            assert answer.status == 503
            assert stack.ended == []

    asyncio.run(run())


def test_closing_the_site_ends_what_is_open(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tmp_path) as stack:
            client, asked = await stack.in_mid_stream()
            idle = await stack.connect()
            assert stack.site is not None
            await soon(stack.site.close())
            await asked.gone()
            assert await client.ended() == b""
            assert await idle.ended() == b""
            with pytest.raises(ConnectionRefusedError):
                await stack.connect()

    asyncio.run(run())
