"""An engine that does what it should, from start to stop, over the simulated vLLM as a real process."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import aiohttp
import psutil
import pytest

from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import EngineError
from tests.integration.engine_bench import OFFLOAD, START_SECS, Bench, ask, complete
from tests.ports import free_port


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_start_answers_with_what_is_known(bench: Bench) -> None:
    engine = bench.engine(name="org/m", aliases=("alias",))

    async def test() -> None:
        info = await engine.start(1, START_SECS)
        assert engine.info == info
        assert info.pid == engine.pid
        assert info.create_time == psutil.Process(info.pid).create_time()
        assert info.can_park
        assert info.can_sleep
        assert info.version
        assert os.getsid(info.pid) == info.pid
        for name in ("org/m", "alias"):
            status, _ = await ask(engine, "/v1/completions", {"model": name, "prompt": "x", "max_tokens": 1})
            assert status == 200
        bench.tree(engine)
        await engine.stop(5)
        assert engine.pid is None

    bench.run(test)
    assert bench.deaths == []


def test_the_address_is_for_this_user_alone(bench: Bench) -> None:
    engine = bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        uds = engine.endpoint.uds
        assert uds is not None
        assert uds.parent.stat().st_mode & 0o077 == 0
        assert engine.spec.rpc_dir.stat().st_mode & 0o077 == 0
        assert engine.log_path.stat().st_mode & 0o007 == 0

    bench.run(test)


def test_on_a_port(bench: Bench) -> None:
    port = free_port()
    engine = bench.engine(port=port)

    async def test() -> None:
        await engine.start(1, START_SECS)
        assert await complete(engine)
        other = bench.engine("other", port=port)
        with pytest.raises(EngineError, match="already listens") as caught:
            await other.start(1, START_SECS)
        assert caught.value.kind is FailureKind.SPAWN
        assert await complete(engine), "the one that has the port is left alone"

    bench.run(test)


def test_a_living_engine_keeps_its_socket(bench: Bench) -> None:
    engine, second = bench.engine(), bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        with pytest.raises(EngineError, match="already listens"):
            await second.start(1, START_SECS)
        assert await complete(engine)

    bench.run(test)


def test_a_stale_socket_is_replaced(bench: Bench) -> None:
    engine = bench.engine()
    uds = engine.endpoint.uds
    assert uds is not None
    uds.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(uds))

    async def test() -> None:
        await engine.start(1, START_SECS)
        assert await complete(engine)

    bench.run(test)


@pytest.mark.parametrize("weights", ["retain", "offload", "discard"])
@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_sleep_and_wake(bench: Bench, weights: str, mode: str) -> None:
    engine = bench.engine()
    eviction = EvictionPolicy.parse(f"{weights}+keep_running")

    async def is_sleeping() -> bool:
        endpoint = engine.endpoint
        async with (
            aiohttp.ClientSession(connector=endpoint.connector()) as session,
            session.get(endpoint.base_url + "/is_sleeping") as response,
        ):
            return bool((await response.json())["is_sleeping"])

    async def test() -> None:
        await engine.start(1, START_SECS)
        before = await complete(engine, temperature=0)
        for _ in range(2):
            await engine.sleep(eviction, mode, 10)
            assert await is_sleeping()
            await engine.wake(eviction, 10)
            assert not await is_sleeping()
            assert await complete(engine, temperature=0) == before

    bench.run(test)
    assert bench.deaths == []


def test_inference_by_the_daemon(bench: Bench) -> None:
    engine = bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        await engine.infer(10)

    bench.run(test)


def test_operations_without_an_engine(bench: Bench) -> None:
    engine = bench.engine()

    async def test() -> None:
        for operation in (engine.sleep(OFFLOAD, "keep", 1), engine.wake(OFFLOAD, 1), engine.infer(1)):
            with pytest.raises(EngineError) as caught:
                await operation
            assert caught.value.kind is FailureKind.DIED
        await engine.stop(1)

    asyncio.run(test())


def test_a_second_start_is_a_mistake(bench: Bench) -> None:
    engine = bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        with pytest.raises(RuntimeError):
            await engine.start(2, START_SECS)
        assert await complete(engine)

    bench.run(test)
