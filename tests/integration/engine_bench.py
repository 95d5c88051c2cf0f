"""Engines for tests, in a folder of their own, and what they must not leave behind."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import Engine, EngineSpec

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
        env = {"LLMUX_SIM_SCALE": "0", **more.pop("env", {})}
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


async def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for the condition, for at most so long; what it is then."""
    deadline = time.monotonic() + seconds
    while True:
        if condition() or time.monotonic() >= deadline:
            return condition()
        await asyncio.sleep(0.005)
