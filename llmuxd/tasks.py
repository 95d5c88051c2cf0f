"""Two ways to wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any


async def poll(done: Callable[[], Coroutine[Any, Any, bool]], seconds: float) -> None:
    """Wait until `done` says so, asking every so many seconds."""
    while True:
        if await done():
            return
        await asyncio.sleep(seconds)


async def finish(work: Coroutine[Any, Any, None], name: str) -> None:
    """Run `work` to its end whatever happens to the caller, and then be cancelled if that was asked for."""
    task = asyncio.create_task(work, name=name)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError
