"""Simulated engines that are saved and restored by the stand-in for CRIU, in a folder of their own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmuxd.core.eviction import EvictionPolicy
from llmuxd.engine import Engine, EngineSpec
from llmuxd.engine.criu import Criu
from llmuxd.engine.images import Images
from llmuxd.engine.tools import Tools
from tests.integration.engine_bench import SIM, complete

STANDIN = Path(__file__).resolve().parents[1] / "standins" / "criu"
OFFLOAD = EvictionPolicy.parse("offload+checkpoint")
SECS = 60.0


class Saving:
    """One model's engines, one after the other, and the images of it."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self._faults = folder / "faults"
        self._calls = folder / "calls"
        patch.setenv("LLMUX_CRIU_FAULTS", str(self._faults))
        patch.setenv("LLMUX_CRIU_CALLS", str(self._calls))
        self.told: list[str] = []
        self.deaths: list[str] = []
        self.begun = 0
        """How often an engine was started or restored."""
        self.images = self.images_of("m")
        self.engine = self.engine_of(self.images)

    def images_of(self, name: str, keep: bool = False, given: Path | None = None) -> Images:
        return Images(self.folder / "images" / name, Criu(str(STANDIN)), keep, given)

    def engine_of(self, images: Images | None, *extra_args: str) -> Engine:
        spec = EngineSpec(
            name="m",
            model_path="/models/m",
            vllm_command=SIM,
            socket_dir=self.folder / "e",
            log_path=self.folder / "m.log",
            env={"LLMUX_SIM_SCALE": "0"},
            extra_args=extra_args,
            savable=True,
        )
        tools = Tools(images=images, tell=self.told.append)
        return Engine(spec, lambda _, reason: self.deaths.append(reason), tools=tools)

    def fault(self, line: str) -> None:
        self._faults.write_text(line + "\n")

    def calls(self) -> list[str]:
        return self._calls.read_text().split("\n")[:-1] if self._calls.exists() else []

    async def start(self) -> str:
        """A new engine; what it answers."""
        self.begun += 1
        await self.engine.start(self.begun, SECS)
        return await complete(self.engine)

    async def save(self, eviction: EvictionPolicy = OFFLOAD) -> None:
        await self.engine.sleep(eviction, "wait", SECS)

    async def restore(self) -> bool:
        self.begun += 1
        return await self.engine.restore(self.begun, SECS)

    def generations(self) -> list[str]:
        return sorted(path.name for path in self.images.folder.iterdir() if path.is_dir())

    def processes(self) -> list[int]:
        """All that run in this test's name."""
        return [process.pid for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        try:
            ours = process.pid != os.getpid() and process.environ().get("VLLM_RPC_BASE_PATH", "")
            return bool(ours) and str(self.folder) in str(ours) and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def run(self, test: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run the test in an event loop, stop its engine, and see that nothing runs then."""

        async def whole() -> None:
            try:
                await asyncio.wait_for(test(), 2 * SECS)
            finally:
                await self.engine.stop(0)

        asyncio.run(whole())
        assert self.processes() == []
        restored = [line.split()[1] for line in self.calls() if line.startswith("restore")]
        assert not [pid for pid in restored if Path(f"/dev/shm/sem.llmux-{pid}.cr.1.ghost").exists()]
