"""The daemon's own calls to an engine that it has nothing more to do with."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from aiohttp import web

from llmuxd.engine import EngineError
from llmuxd.engine.api import Health, VllmApi
from llmuxd.engine.spec import Endpoint
from tests.unit.engine_server import api_of


def test_a_call_after_the_end_fails_like_any_other():
    async def call() -> None:
        api = VllmApi(Endpoint(uds=Path("/nonexistent/a.sock")), "a")
        await api.close()
        assert await api.health(1.0) is Health.UNKNOWN
        with pytest.raises(EngineError, match="the engine was let go"):
            await api.infer()

    asyncio.run(call())


def with_engine(folder: Path, said: str, use: Callable[[VllmApi], Awaitable[None]]) -> None:
    """Use an engine that answers everything with these words."""

    async def answer(_request: web.Request) -> web.Response:
        return web.Response(text=said)

    async def run() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        async with api_of(app, folder) as api:
            await use(api)

    asyncio.run(run())


@pytest.mark.parametrize("said", ["hello", '{"choices": ["x"]}'])
def test_the_answer_of_a_warm_up_is_thrown_away_and_one_that_counts_has_to_be_an_answer(
    tmp_path: Path, said: str
) -> None:
    async def use(api: VllmApi) -> None:
        await api.infer()
        with pytest.raises(EngineError, match="it answers what no inference answers"):
            await api.answer()

    with_engine(tmp_path, said, use)


def test_two_answers_that_say_the_same_are_the_same(tmp_path: Path) -> None:
    heard: list[str] = []

    async def use(api: VllmApi) -> None:
        heard.append(await api.answer())

    for number in (1, 2):
        with_engine(tmp_path, f'{{"id": "{number}", "choices": [{{"text": "why"}}]}}', use)
    assert heard == ['["why"]'] * 2
