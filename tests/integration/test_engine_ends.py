"""How engines end: starts that fail, stops in every state, deaths that nobody asked for."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from llmuxd.core.events import FailureKind
from llmuxd.engine import Engine, EngineError, EngineInfo
from tests.integration.engine_bench import OFFLOAD, START_SECS, Bench, complete, until


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_missing_executable(bench: Bench) -> None:
    engine = bench.engine(vllm_command=("/nowhere/vllm",))

    async def test() -> None:
        with pytest.raises(EngineError, match="'/nowhere/vllm' cannot be executed: No such file") as caught:
            await engine.start(1, START_SECS)
        assert caught.value.kind is FailureKind.SPAWN

    bench.run(test)


def test_death_at_start_shows_the_end_of_this_starts_log(bench: Bench) -> None:
    script = "import sys; [print('line', n) for n in range(30)]; sys.exit('the reason')"
    engine = bench.engine(vllm_command=(sys.executable, "-c", script))
    engine.log_path.write_text("an earlier incarnation\n")

    async def test() -> None:
        began = time.monotonic()
        with pytest.raises(EngineError) as caught:
            await engine.start(1, START_SECS)
        assert time.monotonic() - began < 2
        assert caught.value.kind is FailureKind.DIED
        assert "exited with code 1" in caught.value.reason
        shown = caught.value.reason.splitlines()[1:]
        assert shown == [f"  line {n}" for n in range(16, 30)] + ["  the reason"]

    bench.run(test)
    assert bench.deaths == [], "the failed start has told it"


def test_death_at_start_for_want_of_memory(bench: Bench) -> None:
    script = "raise SystemExit('ValueError: Free memory on device cuda:0 (1/24 GiB) on startup is less than desired')"
    engine = bench.engine(vllm_command=(sys.executable, "-c", script))

    async def test() -> None:
        with pytest.raises(EngineError) as caught:
            await engine.start(1, START_SECS)
        assert caught.value.kind is FailureKind.OUT_OF_MEMORY

    bench.run(test)


DEAF = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
print("up", flush=True)
time.sleep(600)
"""
"""Neither answers nor ends when asked, and has a child that left the session."""


def test_start_that_takes_too_long(bench: Bench) -> None:
    engine = bench.engine(vllm_command=("sh", "-c", "echo up; sleep 600 & wait"))

    async def test() -> None:
        with pytest.raises(EngineError, match=r"start was not done within 1 s; its log ends with\n  up") as caught:
            await engine.start(1, 1.0)
        assert caught.value.kind is FailureKind.TIMEOUT

    bench.run(test)


async def log_says(engine: Engine, text: str) -> None:
    assert await until(lambda: engine.log_path.exists() and text in engine.log_path.read_text(), 10)


def test_cancelled_start(bench: Bench) -> None:
    engine = bench.engine(vllm_command=(sys.executable, "-c", DEAF))

    async def test() -> None:
        task = asyncio.create_task(engine.start(1, START_SECS))
        await log_says(engine, "up")
        assert len(bench.tree(engine)) == 3
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert engine.pid is None
        assert not bench.left(), "gone before it raises"

    bench.run(test)


def test_stop_while_starting(bench: Bench) -> None:
    engine = bench.engine(vllm_command=(sys.executable, "-c", DEAF))

    async def test() -> None:
        task = asyncio.create_task(engine.start(1, START_SECS))
        await log_says(engine, "up")
        bench.tree(engine)
        await engine.stop(0.1)
        with pytest.raises(EngineError, match="it was stopped"):
            await task

    bench.run(test)


def test_stops_at_the_same_time_share_one_and_the_shortest_grace(bench: Bench) -> None:
    engine = bench.engine(vllm_command=(sys.executable, "-c", DEAF))

    async def test() -> None:
        task = asyncio.create_task(engine.start(1, START_SECS))
        await log_says(engine, "up")
        bench.tree(engine)
        began = time.monotonic()
        stops = [asyncio.create_task(engine.stop(60)), asyncio.create_task(engine.stop(60))]
        await asyncio.sleep(0.1)
        stops[0].cancel()
        await engine.stop(0)
        assert time.monotonic() - began < 5
        await stops[1]
        await asyncio.gather(task, return_exceptions=True)

    bench.run(test)


@pytest.mark.parametrize("asleep", [False, True])
def test_stop_asks_first(bench: Bench, asleep: bool) -> None:
    engine = bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        bench.tree(engine)
        if asleep:
            await engine.sleep(OFFLOAD, "keep", 10)
        began = time.monotonic()
        await engine.stop(20)
        assert time.monotonic() - began < 10, "it does not wait longer than the engine takes"

    bench.run(test)
    assert bench.deaths == []


def test_the_loop_ends_in_mid_start(bench: Bench) -> None:
    engine = bench.engine(vllm_command=(sys.executable, "-c", DEAF))

    tasks: list[asyncio.Task[EngineInfo]] = []

    async def leave_it() -> None:
        tasks.append(asyncio.create_task(engine.start(1, START_SECS)))
        await log_says(engine, "up")
        bench.tree(engine)

    asyncio.run(leave_it())
    bench.assert_clean()


async def until_death(bench: Bench, killed_at: float) -> None:
    assert await until(lambda: bool(bench.deaths), 5), "the death was not noticed"
    assert bench.died_at[0] - killed_at < 1.0


@pytest.mark.parametrize("asleep", [False, True])
@pytest.mark.parametrize("whom", ["parent", "child"])
def test_unasked_death(bench: Bench, whom: str, asleep: bool) -> None:
    engine = bench.engine()

    async def test() -> None:
        await engine.start(7, START_SECS)
        if asleep:
            await engine.sleep(OFFLOAD, "keep", 10)
        victim = bench.tree(engine)[0] if whom == "parent" else bench.child(engine)
        killed_at = time.monotonic()
        victim.kill()
        await until_death(bench, killed_at)
        await engine.stop(5)
        assert not bench.left()
        await engine.start(8, START_SECS)
        assert await complete(engine)

    bench.run(test)
    assert [incarnation for incarnation, _ in bench.deaths] == [7]


def test_an_exit_with_code_0_that_nobody_asked_for(bench: Bench) -> None:
    engine = bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        # Else it might be gone first, and be seen so.
        bench.child(engine).suspend()
        killed_at = time.monotonic()
        bench.tree(engine)[0].send_signal(signal.SIGTERM)
        await until_death(bench, killed_at)

    bench.run(test)
    assert "exited with code 0" in bench.deaths[0][1]


def test_death_in_mid_operation(bench: Bench) -> None:
    engine = bench.engine(env={"LLMUX_SIM_FAULTS": "hang_sleep"})

    async def test() -> None:
        await engine.start(1, START_SECS)
        sleeping = asyncio.create_task(engine.sleep(OFFLOAD, "keep", 30))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        bench.tree(engine)[0].kill()
        with pytest.raises(EngineError) as caught:
            await sleeping
        assert caught.value.kind is FailureKind.DIED
        assert time.monotonic() - began < 2

    bench.run(test)
    assert len(bench.deaths) == 1


def test_a_busy_engine_that_does_not_answer_is_not_dead(bench: Bench) -> None:
    engine = bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        leader = bench.tree(engine)[0]
        leader.suspend()
        await asyncio.sleep(1.5)
        leader.resume()
        assert await complete(engine)

    bench.run(test)
    assert bench.deaths == []


def test_nothing_is_left_of_many_starts(bench: Bench) -> None:
    engine = bench.engine()

    async def test() -> None:
        before = 0
        for incarnation in range(20):
            await engine.start(incarnation, START_SECS)
            bench.tree(engine)
            await engine.stop(5 if incarnation % 2 else 0)
            if incarnation == 2:
                before = len(os.listdir("/proc/self/fd"))
        assert len(os.listdir("/proc/self/fd")) == before
        assert len(asyncio.all_tasks()) <= 2
        assert not [p for p in psutil.Process().children() if p.status() == psutil.STATUS_ZOMBIE]

    bench.run(test)
