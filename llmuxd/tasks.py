"""Ways to wait, and to have something done that others do not wait for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


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


def in_thread(call: Callable[..., T], *args: object) -> Future[T]:
    """Begin a call in a thread of its own, which the end of the program does not wait for, unlike a pool's."""
    future: Future[T] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = call(*args)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name=getattr(call, "__name__", "call"), daemon=True).start()
    return future
