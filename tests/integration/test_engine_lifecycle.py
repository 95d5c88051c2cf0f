"""An engine from start to stop, over the simulated vLLM as a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from llmuxd.core.events import FailureKind
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import Engine, EngineError, EngineSpec
from tests.integration.test_engine_process import wait_for

SIM = (sys.executable, "-m", "llmuxd.sim.vllm")
START_SECS = 30.0
OFFLOAD = EvictionPolicy.parse("offload+keep_running")


class Bench:
    """Makes engines in a folder of their own, and knows what they must not leave behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.deaths: list[tuple[int, str]] = []
        self.died_at: list[float] = []
        self.seen: set[psutil.Process] = set()
        self.engines: list[Engine] = []

    def engine(self, name: str = "m", **more: Any) -> Engine:
        env = {
            "LLMUX_SIM_SCALE": "0",
            **more.pop("env", {}),
        }
        spec = EngineSpec(
            name=name,
            model_path=f"/models/{name}",
            vllm_command=more.pop("vllm_command", SIM),
            socket_dir=self.folder / "e",
            log_path=self.folder / f"{name}.log",
            env=env,
            **more,
        )
        made = Engine(spec, self.on_death)
        self.engines.append(made)
        return made

    def on_death(self, incarnation: int, reason: str) -> None:
        self.deaths.append((incarnation, reason))
        self.died_at.append(time.monotonic())

    def tree(self, engine: Engine) -> list[psutil.Process]:
        """The API server and its descendants."""
        assert engine.pid is not None
        leader = psutil.Process(engine.pid)
        found = [leader, *leader.children(recursive=True)]
        self.seen.update(found)
        return found

    def child(self, engine: Engine) -> psutil.Process:
        """The EngineCore."""
        return self.tree(engine)[1]

    def left(self) -> list[psutil.Process]:
        """The processes seen that still run. Orphans are process 1's to reap, when it comes to it."""
        return [process for process in self.seen if _runs(process)]

    def assert_clean(self) -> None:
        """No process, socket, folder or shared memory of any engine is left."""
        assert not self.left()
        assert not [child for child in psutil.Process().children() if child in self.seen], "all are reaped"
        marked = [process.pid for process in psutil.process_iter() if str(self.folder) in _environ(process)]
        assert not marked
        assert list((self.folder / "e").iterdir()) == []

    def run(self, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the test in an event loop, stop its engines, and see that nothing is left."""

        async def whole() -> None:
            try:
                await asyncio.wait_for(test(), 60)
            finally:
                for engine in self.engines:
                    await engine.stop(0)

        asyncio.run(whole())
        self.assert_clean()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _environ(process: psutil.Process) -> str:
    try:
        return str(process.environ())
    except psutil.Error:
        return ""


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


async def ask(engine: Engine, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    endpoint = engine.endpoint
    async with (
        aiohttp.ClientSession(connector=endpoint.connector()) as session,
        session.post(endpoint.base_url + path, json=body) as response,
    ):
        return response.status, await response.json()


async def complete(engine: Engine, **more: Any) -> str:
    body = {"model": engine.spec.name, "prompt": "x", "max_tokens": 2, **more}
    status, answer = await ask(engine, "/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


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
        assert (engine.pid, engine.info) == (None, None)

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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
    engine = bench.engine(vllm_command=(sys.executable, "-c", DEAF))

    async def test() -> None:
        with pytest.raises(EngineError, match=r"start was not done within 0\.5 s; its log ends with\n  up") as caught:
            await engine.start(1, 0.5)
        assert caught.value.kind is FailureKind.TIMEOUT

    bench.run(test)


async def log_says(engine: Engine, text: str) -> None:
    while True:
        if engine.log_path.exists() and text in engine.log_path.read_text():
            return
        await asyncio.sleep(0.01)


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

    async def leave_it() -> None:
        bench.start = asyncio.create_task(engine.start(1, START_SECS))  # type: ignore[attr-defined]
        await log_says(engine, "up")
        bench.tree(engine)

    asyncio.run(leave_it())
    bench.assert_clean()


async def until_death(bench: Bench, killed_at: float) -> None:
    while not bench.deaths:
        assert time.monotonic() - killed_at < 5, "the death was not noticed"
        await asyncio.sleep(0.005)
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


def test_a_killed_daemon_does_not_take_a_stranger_for_its_engine(bench: Bench) -> None:
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    engine = bench.engine()

    async def test() -> None:
        await engine.start(1, START_SECS)
        bench.tree(engine)

    try:
        bench.run(test)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
    wait_for(lambda: not psutil.pid_exists(stranger.pid), "the stranger is reaped")
