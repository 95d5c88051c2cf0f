"""An engine from start to stop, over the simulated vLLM as a real process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from llmuxd.core.eviction import EvictionPolicy
from llmuxd.core.events import FailureKind
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
        self.shm_before = set(os.listdir("/dev/shm"))
        self.engines: list[Engine] = []

    def engine(self, name: str = "m", **more: Any) -> Engine:
        env = {
            "LLMUX_SIM_SCALE": "0",
            "LLMUX_SIM_LEDGER": str(self.folder / "ledger"),
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

    def assert_clean(self) -> None:
        """No process, zombie, socket, folder or shared memory of any engine is left."""
        left = [process for process in self.seen if process.is_running()]
        assert not left
        marked = [process.pid for process in psutil.process_iter() if str(self.folder) in _environ(process)]
        assert not marked
        assert list((self.folder / "e").iterdir()) == []
        assert set(os.listdir("/dev/shm")) <= self.shm_before

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
    async with aiohttp.ClientSession(connector=endpoint.connector()) as session:
        async with session.post(endpoint.base_url + path, json=body) as response:
            return response.status, await response.json()


async def complete(engine: Engine, **more: Any) -> str:
    body = {"model": engine.spec.name, "prompt": "x", "max_tokens": 2, **more}
    status, answer = await ask(engine, "/v1/completions", body)
    assert status == 200, answer
    return str(answer["choices"][0]["text"])
