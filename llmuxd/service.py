"""What systemd is told of the daemon, by sd_notify(3): ready, a status line, the watchdog's pings, more time.

Nothing is decided here, and without systemd nothing happens.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import sdnotify

from llmuxd.app import App
from llmuxd.core.engine_state import EngineState
from llmuxd.core.state import IN_TRANSITION, State

EXTEND_EVERY_SECS = 5.0
EXTEND_BY_SECS = 30.0
STATUS_EVERY_SECS = 1.0

log = logging.getLogger("llmuxd")


class Service:
    """The daemon as a service of systemd; harmless where it is none."""

    def __init__(
        self, environ: Mapping[str, str] = os.environ, notifier: sdnotify.SystemdNotifier | None = None
    ) -> None:
        self._notifier = notifier or sdnotify.SystemdNotifier()
        self._environ = environ

    def ready(self) -> None:
        self._notifier.notify("READY=1")

    def reloading(self) -> None:
        """`ready` says when it is over."""
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._notifier.notify("STOPPING=1")

    def status(self, text: str) -> None:
        """What `systemctl status` shows in a line."""
        self._notifier.notify(f"STATUS={text}")

    @asynccontextmanager
    async def patience(self, most: float = math.inf) -> AsyncIterator[None]:
        """As long as the block lasts, and for `most` seconds, systemd waits for it whatever its unit says."""
        loop = asyncio.get_running_loop()
        until = loop.time() + most

        async def ask() -> None:
            while loop.time() < until:
                self._notifier.notify(f"EXTEND_TIMEOUT_USEC={int(EXTEND_BY_SECS * 1e6)}")
                await asyncio.sleep(EXTEND_EVERY_SECS)

        asking = asyncio.create_task(ask(), name="more time")
        try:
            yield
        finally:
            asking.cancel()

    async def tell_status(self, line: Callable[[], str]) -> None:
        """Keep the status line true; for ever."""
        told = ""
        while True:
            now = line()
            if now != told:
                self.status(now)
                told = now
            await asyncio.sleep(STATUS_EVERY_SECS)

    async def ping_watchdog(self, app: App) -> None:
        """Tell systemd that all is well, twice in the time that it gives, as long as the scheduler is alive."""
        given = self._environ.get("WATCHDOG_USEC", "")
        period = int(given) / 1e6 if given.isdecimal() else 0.0
        if not period or self._environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
            return
        told = False
        while True:
            # A probe of its own: the loop may have stood still, and the self-check's not have had its turn yet.
            app.runtime.self_check.probe()
            alive, reason = app.runtime.self_check.alive()
            if alive:
                self._notifier.notify("WATCHDOG=1")
            elif not told:
                log.critical("no more word to systemd's watchdog, which will restart llmuxd: %s", reason)
            told = not alive
            await asyncio.sleep(period / 2)


def status_line(state: State, health: tuple[bool, str]) -> str:
    """The daemon in a sentence: what is awake, what is happening, who waits, what is wrong."""
    if state.ending:
        return f"{state.ending}: {len(state.requests)} requests to finish"
    if not state.models:
        return "no models are configured: add some to the config and reload"
    by_state: dict[EngineState, list[str]] = {}
    for model in state.models.values():
        by_state.setdefault(model.state, []).append(model.name)
    parts = [f"awake: {', '.join(by_state.get(EngineState.AWAKE, ['none']))}"]
    named = [found for found in EngineState if found in by_state and _is_named(found)]
    parts += [f"{found.value}: {', '.join(by_state[found])}" for found in named]
    parts += [f"asleep: {len(by_state[EngineState.ASLEEP])}"] if EngineState.ASLEEP in by_state else []
    if state.queued:
        parts.append(f"queued: {state.queued}")
    if state.mode.manual:
        parts.append(f"pinned: {state.mode.pinned}" if state.mode.pinned else "manual mode")
    ok, reason = health
    return "; ".join(parts if ok else [*parts, f"NOT WELL: {reason}"])


def _is_named(state: EngineState) -> bool:
    """Whether the models in this state are told by their names."""
    return state in IN_TRANSITION or state is EngineState.FAILED
