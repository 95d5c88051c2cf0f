"""An event loop whose time stands still until a test moves it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Clock(asyncio.SelectorEventLoop):
    """The loop."""

    now = 100.0

    def time(self) -> float:
        return self.now

    async def move(self, secs: float) -> None:
        self.now += secs
        for _ in range(5):
            await asyncio.sleep(0)

    @property
    def timers(self) -> int:
        """How many there are that may still come."""
        return sum(not timer.cancelled() for timer in self._scheduled)  # type: ignore[attr-defined]


def on_clock(test: Callable[[Clock], Awaitable[None]]) -> None:
    """Run a test in such a loop."""
    clock = Clock()
    try:
        clock.run_until_complete(test(clock))
    finally:
        clock.close()
