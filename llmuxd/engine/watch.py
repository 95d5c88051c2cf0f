"""Has the engine died? Watches the leader, its vital children and GET /health.

What to do about a death is the caller's. A death is seen within a second: the leader's at once where the kernel
has pidfds, the children's at the next look, an engine's that only its answers show after two of them.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from llmuxd.engine import proctable
from llmuxd.engine.api import Health
from llmuxd.engine.process import EngineProcess

LOOK_SECS = 0.25
SCAN_SECS = 5.0
STARTING_SCAN_SECS = 0.5
HEALTH_SECS = 0.5
HEALTH_TIMEOUT_SECS = 5.0
CONFIRM_SECS = 0.1

log = logging.getLogger(__name__)

_DEAD = {
    Health.DEAD: "/health answers 503: its EngineCore is dead",
    Health.REFUSED: "it refuses connections",
}


class Watch:
    """Calls `on_death` once, with a sentence, when the engine is seen dead; never after `close`.

    `on_members` is called when the engine is found to have other processes than before.
    """

    def __init__(
        self,
        process: EngineProcess,
        health: Callable[[float], Awaitable[Health]],
        on_death: Callable[[str], None],
        on_members: Callable[[], None] = lambda: None,
    ) -> None:
        self._process = process
        self._health = health
        self._on_death: Callable[[str], None] | None = on_death
        self._on_members = on_members
        self._look_now = asyncio.Event()
        self._probe_now = asyncio.Event()
        self._serving = False
        self._pidfd = self._open_pidfd()
        self._tasks: list[asyncio.Task[None]] = []
        self._begin(self._watch_processes())

    def serving(self) -> None:
        """The engine has answered: from now on a missing answer counts."""
        self._serving = True
        self._begin(self._watch_health())

    async def close(self) -> None:
        """Stop watching. Returns when no look at the engine is under way any more."""
        self._on_death = None
        self._close_pidfd()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, watching: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(watching, name=f"watch {self._process.pid}")
        task.add_done_callback(_log_crash)
        self._tasks.append(task)

    def _open_pidfd(self) -> int | None:
        try:
            fd = os.pidfd_open(self._process.pid)
        except OSError:
            return None
        asyncio.get_running_loop().add_reader(fd, self._leader_ended)
        return fd

    def _close_pidfd(self) -> None:
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None

    def _leader_ended(self) -> None:
        self._close_pidfd()
        self._look_now.set()

    def _died(self, reason: str) -> None:
        on_death, self._on_death = self._on_death, None
        if on_death is not None:
            on_death(reason)

    async def _watch_processes(self) -> None:
        loop = asyncio.get_running_loop()
        next_scan = 0.0
        while self._on_death is not None:
            self._look_now.clear()
            self._look()
            if loop.time() >= next_scan:
                before = self._process.members().keys()
                await asyncio.to_thread(self._process.refresh)
                if self._process.members().keys() != before:
                    self._on_members()
                next_scan = loop.time() + (SCAN_SECS if self._serving else STARTING_SCAN_SECS)
            await _sleep_or_set(LOOK_SECS, self._look_now)

    def _look(self) -> None:
        ended = self._process.ended()
        if ended is not None:
            self._died(f"its process {self._process.pid} {ended}")
            return
        for proc, member in self._process.members().items():
            if proctable.is_alive(proc):
                continue
            # While it starts, the leader ends by itself when a child fails, and has then written why.
            if member.vital and self._serving:
                self._died(f"its process {proc.pid} ({member.title[:60]}) is gone")
                return
            self._process.forget(proc)
            self._probe_now.set()

    async def _watch_health(self) -> None:
        bad = 0
        silent = False
        while self._on_death is not None:
            self._probe_now.clear()
            health = await self._health(HEALTH_TIMEOUT_SECS)
            if health in _DEAD:
                bad += 1
                if bad > 1:
                    self._died(_DEAD[health])
            else:
                bad = 0
                if health is Health.UNKNOWN and not silent:
                    log.warning("process %d: no answer from /health", self._process.pid)
                silent = health is Health.UNKNOWN
            await _sleep_or_set(CONFIRM_SECS if bad else HEALTH_SECS, self._probe_now)


async def _sleep_or_set(seconds: float, event: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except asyncio.TimeoutError:
        pass


def _log_crash(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("%s ended", task.get_name(), exc_info=task.exception())
