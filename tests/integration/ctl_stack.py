"""What the tests of the control socket and of `llmuxctl` stand on: models without engines, served on a real socket.

`Desk` keeps the rules that the control API promises (aliases, pins, one awake model); an operation can be held up, so
that a test sees its middle. The engines and the core behind the real thing are tested elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from llmuxd.control import build_control, serve_control
from llmuxd.control.api import ControlFailed, NotAllowed, Progress, UnknownModel
from llmuxd.core.eviction import EvictionPolicy
from llmuxd.version import __version__

DEADLINE_SECS = 20.0

T = TypeVar("T")


def until(condition: Callable[[], T], what: str) -> T:
    """Wait until something is so, and return it; or fail."""
    deadline = time.monotonic() + DEADLINE_SECS
    while not (value := condition()):
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.005)
    return value


@dataclass
class Placed:
    """One model of a desk."""

    log: Path
    aliases: tuple[str, ...] = ()
    engine: str = "not_started"
    eviction: EvictionPolicy = field(default_factory=lambda: EvictionPolicy.parse("offload+keep_running"))
    asleep_by: EvictionPolicy | None = None
    broken: str = ""
    """Why it cannot be woken."""
    since: float = field(default_factory=time.time)
    retry_in_secs: float | None = None

    def move(self, engine: str, asleep_by: EvictionPolicy | None = None) -> None:
        self.engine, self.asleep_by, self.since = engine, asleep_by, time.time()


class Desk:
    """A control over models that change their state at a word, one awake at most."""

    def __init__(self, folder: Path) -> None:
        self.models = {
            "qwen": Placed(folder / "qwen.log", ("qwen-lora",)),
            "mistral": Placed(folder / "mistral.log"),
            "broken": Placed(folder / "broken.log", broken="it died: \x1b[31mout of memory\x1b[0m"),
        }
        self.mode = "auto"
        self.pinned: str | None = None
        self.held = asyncio.Event()
        self.held.set()
        self.began: list[str] = []
        self.ended: list[str] = []
        self.subscribers: list[asyncio.Queue[dict[str, Any]]] = []

    def resolve(self, name: str) -> str | None:
        for model, placed in self.models.items():
            if name == model or name in placed.aliases:
                return model
        return None

    def _known(self, name: str) -> str:
        model = self.resolve(name)
        if model is None:
            raise UnknownModel(name, list(self.models))
        return model

    def status(self) -> dict[str, Any]:
        active = [name for name, m in self.models.items() if m.engine == "awake"]
        return {
            "version": __version__,
            "state": f"active:{active[0]}" if active else "idle",
            "mode": self.mode,
            "pinned": self.pinned,
            "policy": "tenure",
            "health": {"ok": True, "reason": "ok"},
            "active": active,
            "queued": 0,
            "in_flight": 0,
            "uptime_secs": 3725.5,
            "switch": None
            if self.held.is_set()
            else {"id": 7, "to": "mistral", "from": ["qwen"], "phase": "drain", "seconds": 61.0},
            "models": {name: self._model(m) for name, m in self.models.items()},
            "devices": [{"name": "gpu0", "capacity": 1, "used": len(active), "awake": active}],
        }

    def _model(self, model: Placed) -> dict[str, Any]:
        return {
            "engine": model.engine,
            "in_flight": 0,
            "queued": 0,
            "eviction": str(model.eviction),
            "asleep_by": str(model.asleep_by) if model.asleep_by else None,
            "pid": 4242 if model.engine in ("awake", "asleep") else None,
            "since": model.since,
            "last_error": model.broken or None,
            "retry_in_secs": model.retry_in_secs,
            "aliases": list(model.aliases),
        }

    def evictions(self) -> dict[str, Any]:
        return {
            "models": {
                name: {
                    "eviction": {"weights": m.eviction.weights.value, "process": m.eviction.process.value},
                    "process_state": m.engine,
                }
                for name, m in self.models.items()
            }
        }

    def config_json(self) -> dict[str, Any]:
        return {"port": 3000, "models": {name: {"model_path": f"/models/{name}"} for name in self.models}}

    def log_path(self, model: str) -> Path:
        return self.models[self._known(model)].log

    async def subscribe(self) -> AsyncGenerator[dict[str, Any], None]:
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.subscribers.append(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self.subscribers.remove(queue)

    def set_mode(self, mode: str) -> dict[str, Any]:
        self.mode = mode
        if mode == "auto":
            self.pinned = None
        return {"message": f"{mode} mode"}

    def unpin(self) -> dict[str, Any]:
        return self.set_mode("auto")

    def set_eviction(self, model: str, eviction: EvictionPolicy) -> dict[str, Any]:
        name = self._known(model)
        self.models[name].eviction = eviction
        return {"message": f"{name} is evicted by {eviction}"}

    async def switch(self, model: str, progress: Progress) -> dict[str, Any]:
        return await self._wake("switch", model, progress)

    async def wake(self, model: str, progress: Progress) -> dict[str, Any]:
        return await self._wake("wake", model, progress)

    async def _wake(self, what: str, model: str, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        if self.pinned not in (None, name):
            raise NotAllowed(f"{self.pinned} is pinned")
        await self._work(what, name, progress)
        if self.models[name].broken:
            self.models[name].move("failed")
            raise ControlFailed(f"{name}: {self.models[name].broken}")
        for other in self.models.values():
            if other.engine == "awake":
                other.move("asleep", other.eviction)
        self.models[name].move("awake")
        return self._done(what, name, f"{name} is awake")

    async def sleep(self, model: str, eviction: EvictionPolicy | None, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        await self._work("sleep", name, progress)
        self.models[name].move("asleep", eviction or self.models[name].eviction)
        return self._done("sleep", name, f"{name} is asleep")

    async def stop(self, model: str, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        await self._work("stop", name, progress)
        self.models[name].move("not_started")
        return self._done("stop", name, f"{name} is stopped")

    async def pin(self, model: str, progress: Progress) -> dict[str, Any]:
        result = await self._wake("pin", model, progress)
        self.mode, self.pinned = "manual", self._known(model)
        return {**result, "message": f"{self.pinned} is pinned"}

    async def warmup(self, models: list[str] | None, progress: Progress) -> dict[str, Any]:
        names = [self._known(name) for name in models] if models else list(self.models)
        failed = []
        for name in names:
            try:
                await self._wake("warmup", name, progress)
                await self.sleep(name, None, progress)
            except ControlFailed as error:
                failed.append(str(error))
        if failed:
            raise ControlFailed("; ".join(failed))
        return {"message": f"{len(names)} models are warm", "models": names}

    async def _work(self, what: str, model: str, progress: Progress) -> None:
        progress({"event": what, "model": model, "text": f"{what} {model} begins"})
        self.began.append(f"{what} {model}")
        await self.held.wait()

    def _done(self, what: str, model: str, message: str) -> dict[str, Any]:
        self.ended.append(f"{what} {model}")
        return {"message": message}


class Served:
    """A desk behind its control socket, in a thread with a loop of its own."""

    def __init__(self, folder: Path) -> None:
        self.socket = folder / "run" / "control.sock"
        self.folder = folder
        self.desk = Desk(folder)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    def open(self) -> None:
        self._thread.start()
        self._close = self.call(serve_control(build_control(self.desk), self.socket))

    def close(self) -> None:
        """End the serving, as a daemon does that stops."""
        if not self._thread.is_alive():
            return
        self.release()
        self.call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        await self._close()
        # Transports that are being closed need a turn of the loop to be so.
        for _ in range(3):
            await asyncio.sleep(0)

    def call(self, coroutine: Any) -> Any:
        """Run something in the loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE_SECS)

    def hold(self) -> None:
        """Operations stop in their middle from now on."""
        self._loop.call_soon_threadsafe(self.desk.held.clear)
        until(lambda: not self.desk.held.is_set(), "held")

    def release(self) -> None:
        """They go on."""
        self._loop.call_soon_threadsafe(self.desk.held.set)

    def publish(self, event: dict[str, Any]) -> None:
        for queue in self.desk.subscribers:
            self._loop.call_soon_threadsafe(queue.put_nowait, event)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "llmuxctl", "--socket", str(self.socket), *arguments]

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run `llmuxctl` to its end."""
        return subprocess.run(
            self.command(*arguments),
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECS,
            check=False,
        )


@contextmanager
def served() -> Iterator[Served]:
    """A desk that is being served. In a short folder, since a socket's path may have no more than 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="llmux-ctl-") as folder:
        stack = Served(Path(folder))
        stack.open()
        try:
            yield stack
        finally:
            stack.close()
