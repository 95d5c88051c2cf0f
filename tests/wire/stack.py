"""What the wire tests stand on: the proxy over the real gate and core, in a loop whose clock the test moves.

How a proxy is built and served stands here and nowhere else. `play` runs one scenario and then looks at what is left:
no request, no task, no file descriptor, no complaint in the log, and nothing at an engine that should not be there.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmuxd.config import KeyConfig
from llmuxd.proxy import Limits, build_proxy, serve_proxy
from llmuxd.proxy.handler import PROXY
from llmuxd.proxy.keys import KeyRing
from tests.integration.proxy_stack import Stack, core_of
from tests.wire.client import DEADLINE_SECS, Client
from tests.wire.engine import Engine, Script

MAX_BODY = 1024 * 1024
MAX_HEAD = 64 * 1024

_TURNS = 50


class ClockLoop(asyncio.SelectorEventLoop):
    """A loop whose time can be moved on: what is due by then happens at once."""

    moved = 0.0

    def time(self) -> float:
        return super().time() + self.moved


class Wire(Stack):
    """A proxy with its engines and clients."""

    engines: dict[str, Engine]  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limits = Limits(MAX_BODY)
        self.clients: list[Client] = []
        self.tasks = 0
        self.files = 0

    @property
    def engine(self) -> Engine:
        """The one of model a."""
        return self.engines["a"]

    async def connect(self) -> Client:  # type: ignore[override]
        assert self.site is not None
        client = await Client.connect(self.site.port)
        self.clients.append(client)
        return client

    async def after(self, seconds: float) -> None:
        """So much time passes: for the loop's timers, not for the core, which has its own clock."""
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ClockLoop)
        loop.moved += seconds
        await turns()

    def revive(self, model: str = "a") -> None:
        """The core hears of an engine's death and starts it again."""
        self.dies(model)
        self.pass_time(2.0)

    async def revive_when_bounced(self, times: int = 1) -> None:
        """Wait until so many requests came back from a dying engine, and start it again."""
        await until(lambda: self.bounced() >= times, "a request bounced")
        self.revive()

    def bounced(self) -> int:
        """How many times a request was given back because its engine went away before it answered."""
        return sum(type(event).__name__ == "RequestBounced" for event in self.ended)

    def tickets(self) -> int:
        """Requests that the gate holds."""
        return len(self.gate._tickets)

    def take_stock(self) -> None:
        """Remember what is open while nobody is there."""
        self.tasks, self.files = _tasks(), _files()

    async def quiet(self) -> None:
        """Everybody hangs up; wait until nothing is left that was not there before they came."""
        for client in self.clients:
            client.close()
        self.clients.clear()
        await until(lambda: self.idle() and not self.tickets(), "every request has ended")
        for engine in self.engines.values():
            engine.hang_up()
        await until(lambda: _tasks() <= self.tasks, "every task has ended")
        await until(lambda: _files() <= self.files, "every file descriptor is closed")


async def turns(count: int = _TURNS) -> None:
    """Let the loop go round: whatever is ready happens."""
    for _ in range(count):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so, or fail: by the clock on the wall, the loop's may be moved meanwhile."""
    deadline = time.monotonic() + DEADLINE_SECS
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}"
        await asyncio.sleep(0.0005)


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    script: Script | None = None,
    *,
    models: tuple[str, ...] = ("a",),
    holds: tuple[str, ...] = (),
    limits: dict[str, Any] | None = None,
    keys: Sequence[KeyConfig] = (),
    **settings: Any,
) -> AsyncIterator[Wire]:
    """A proxy whose engines all follow `script`; without one the test takes their requests with `engine.next`."""
    switcher = core_of(models, **settings)
    async with contextlib.AsyncExitStack() as stack:
        engines = {
            name: await stack.enter_async_context(Engine(folder / f"{name}.sock", script).listening())
            for name in models
        }
        wire = Wire(engines, switcher, set(holds))  # type: ignore[arg-type]
        wire.limits = Limits(**{"max_body_bytes": MAX_BODY, **(limits or {})})
        app = build_proxy(wire.gate, wire.limits, wire.metrics)
        app[PROXY].keys = KeyRing(keys)
        wire.site = await serve_proxy(app, "127.0.0.1", 0)
        wire.take_stock()
        try:
            yield wire
            await wire.quiet()
        finally:
            for client in wire.clients:
                client.close()
            await wire.site.close()
        for engine in engines.values():
            engine.assert_asked_properly()


def play(folder: Path, scenario: Callable[[Wire], Awaitable[None]], script: Script | None = None, **how: Any) -> None:
    """Run a scenario on a proxy of its own, and fail if anything is left of it, or went wrong unseen."""

    async def main() -> None:
        async with serving(folder, script, **how) as wire:
            await scenario(wire)

    run(main())


def run(main: Coroutine[Any, Any, None]) -> None:
    """As `asyncio.run`, with the clock, and an eye on what nobody awaits."""
    files = _files()
    with complaints() as heard:
        loop = ClockLoop()
        loop.set_exception_handler(lambda _loop, context: heard.append(str(context)))
        try:
            loop.run_until_complete(main)
        finally:
            _end(loop)
    assert heard == []
    assert _files() <= files, "file descriptors were left open"


def _end(loop: asyncio.AbstractEventLoop) -> None:
    left = asyncio.all_tasks(loop)
    for task in left:
        task.cancel()
    if left:
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


@contextlib.contextmanager
def complaints() -> Iterator[list[str]]:
    """What is logged as an error, or with a traceback."""
    heard: list[str] = []
    formatter = logging.Formatter()

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR or record.exc_info:
                heard.append(formatter.format(record))

    ear = Ear()
    logging.getLogger().addHandler(ear)
    try:
        yield heard
    finally:
        logging.getLogger().removeHandler(ear)


def _tasks() -> int:
    return len(asyncio.all_tasks())


def _files() -> int:
    return len(os.listdir("/proc/self/fd"))
