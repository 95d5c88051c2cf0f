"""What the box has for the models that are evicted: measured now and then, and told to the core.

It is only asked for while a model's eviction is left to be chosen. What is chosen is decided in `llmuxd.core.choice`.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

from llmuxd.config import Config
from llmuxd.core.choice import Footprint, Resources
from llmuxd.core.engine_state import EngineState
from llmuxd.core.events import ResourcesMeasured
from llmuxd.core.eviction import ProcessStrategy
from llmuxd.core.state import State
from llmuxd.engine import Engine

EVERY_SECS = 10.0

_MIB = 2**20


def usable(config: Config) -> frozenset[ProcessStrategy]:
    """What can be done with a process here, as far as the programs for it are there."""
    found = {ProcessStrategy.KEEP_RUNNING, ProcessStrategy.STOP}
    if shutil.which(config.checkpoint.cuda_checkpoint_path):
        found.add(ProcessStrategy.CUDA_SUSPEND)
    if shutil.which(config.checkpoint.criu_path):
        found.add(ProcessStrategy.CHECKPOINT)
    return frozenset(found)


class Surveyor:
    """Measures, and remembers what engines took when they were last awake. In one event loop."""

    def __init__(self, state: State, engines: Mapping[str, Engine], post: Callable[[ResourcesMeasured], None]) -> None:
        self._state = state
        self._engines = engines
        self._post = post
        self._footprints: dict[str, Footprint] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self, config: Callable[[], Config]) -> None:
        """Begin, in the running event loop; `config` tells the one in force."""
        if self._task is None:
            self._task = asyncio.create_task(self._survey_for_ever(config), name="resources")

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _survey_for_ever(self, config: Callable[[], Config]) -> None:
        while True:
            if any(model.auto for model in self._state.models.values()):
                self._post(ResourcesMeasured(await self.survey(config())))
            await asyncio.sleep(EVERY_SECS)

    async def survey(self, config: Config) -> Resources:
        """What there is now."""
        for model in list(self._state.models.values()):
            engine = self._engines.get(model.name)
            if model.state is EngineState.AWAKE and engine is not None and engine.process is not None:
                pids = [proc.pid for proc in engine.process.members()]
                device = await engine.device_mib()
                self._footprints[model.name] = Footprint(await asyncio.to_thread(_resident_mib, pids), device)
        return Resources(
            usable=usable(config),
            host_free=psutil.virtual_memory().available // _MIB,
            disk_free=await asyncio.to_thread(_disk_free_mib, config.checkpoint.images_dir),
            footprints=dict(self._footprints),
        )


def _resident_mib(pids: Iterable[int]) -> int:
    """Memory of their own; what they share with others counts for none."""
    total = 0
    for pid in pids:
        try:
            memory = psutil.Process(pid).memory_info()
        except psutil.Error:
            continue
        total += memory.rss - getattr(memory, "shared", 0)
    return total // _MIB


def _disk_free_mib(folder: Path) -> int | None:
    """Where the folder is or would be made."""
    for path in (folder, *folder.parents):
        try:
            return shutil.disk_usage(path).free // _MIB
        except OSError:
            continue
    return None
