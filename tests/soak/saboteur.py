"""Who makes trouble: kills engines at random, reads the config anew with other values, and steers as an operator would.

Each deed is entered among the causes before it is done, so that what clients get to see of it can be told from a fault.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any

import aiohttp
import psutil

from tests.soak.field import Field
from tests.soak.stand import ENGINE, MODELS, Stand

PIN_SECS = (0.5, 2.0)
EVICTIONS = ("offload+keep_running", "discard+keep_running", "offload+stop")


class Saboteur:
    """One deed after the other while the field is open."""

    def __init__(self, stand: Stand, field: Field, rng: Random, period_secs: float) -> None:
        self._stand = stand
        self._field = field
        self._rng = rng
        self._period_secs = period_secs
        self.done: Counter[str] = Counter()
        self.problems: list[str] = []
        self._deeds: dict[Callable[[], Awaitable[str]], int] = {
            self._kill_server: 6,
            self._kill_core: 6,
            self._kill_both: 3,
            self._freeze_and_kill: 4,
            self._freeze: 2,
            self._end: 1,
            self._reload: 5,
            self._reload_nonsense: 1,
            self._steer: 6,
            self._pin: 2,
        }

    async def run(self) -> None:
        """Until cancelled, at a time when nothing is under way."""
        deeds, weights = list(self._deeds), list(self._deeds.values())
        while True:
            await asyncio.sleep(self._rng.expovariate(1 / self._period_secs))
            await self._field.begin()
            try:
                self.done[await self._rng.choices(deeds, weights)[0]()] += 1
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as error:
                self.problems.append(f"the control socket: {error!r}")
            finally:
                self._field.end()

    @property
    def kills(self) -> int:
        return sum(count for deed, count in self.done.items() if deed.startswith("kill"))

    # Killing. Nobody is killed who is not an engine of this stand.

    async def _victim(self) -> tuple[str, psutil.Process, list[psutil.Process]] | None:
        """A model with an engine, its API server and the children of that."""
        status = await self._stand.status()
        alive = {name: model["pid"] for name, model in status["models"].items() if model["pid"]}
        if not alive:
            return None
        # Those that are in use are the more interesting ones.
        in_use = [name for name in alive if status["models"][name]["engine"] not in ("asleep", "stopping")]
        name = self._rng.choice(in_use if in_use and self._rng.random() < 0.7 else sorted(alive))
        try:
            server = psutil.Process(alive[name])
            if ENGINE not in server.cmdline() or not self._stand.owns(server):
                return None
            return name, server, server.children()
        except psutil.Error:
            return None

    async def _kill(self, what: str, choose: Callable[[psutil.Process, list[psutil.Process]], list[Any]]) -> str:
        found = await self._victim()
        if found is None:
            return "nobody to kill"
        model, server, children = found
        self._field.causes.death(model, time.monotonic())
        for process in choose(server, children):
            with contextlib.suppress(psutil.Error):
                process.kill()
        return what

    async def _kill_server(self) -> str:
        return await self._kill("kill API server", lambda server, _: [server])

    async def _kill_core(self) -> str:
        return await self._kill("kill EngineCore", lambda _, children: children)

    async def _kill_both(self) -> str:
        return await self._kill("kill both", lambda server, children: [*children, server])

    async def _freeze_and_kill(self) -> str:
        """Stopped for a while, as one that hangs, and then dead."""
        found = await self._victim()
        if found is None:
            return "nobody to kill"
        model, server, children = found
        victims = [server] if self._rng.random() < 0.5 else children
        with contextlib.suppress(psutil.Error):
            for process in victims:
                process.suspend()
            await asyncio.sleep(self._rng.uniform(0.1, 3.0))
        # What it met in between was one death, at its end.
        self._field.causes.death(model, time.monotonic())
        for process in victims:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return f"kill stopped {'API server' if victims == [server] else 'EngineCore'}"

    async def _freeze(self) -> str:
        """Stopped for a while, and going on as if nothing had been."""
        found = await self._victim()
        if found is None:
            return "nobody to stop"
        _, server, _ = found
        with contextlib.suppress(psutil.Error):
            server.suspend()
            try:
                await asyncio.sleep(self._rng.uniform(0.1, 2.0))
            finally:
                server.resume()
        return "stop and go on"

    async def _end(self) -> str:
        """Ended from outside, politely."""
        found = await self._victim()
        if found is None:
            return "nobody to kill"
        model, server, _ = found
        self._field.causes.death(model, time.monotonic())
        with contextlib.suppress(psutil.Error):
            server.send_signal(signal.SIGTERM)
        return "kill by SIGTERM"

    # The config

    async def _reload(self) -> str:
        model = self._rng.choice(sorted(MODELS))
        choices: list[tuple[str, Any]] = [
            ("heartbeat_secs", self._rng.choice((0.5, 1, 2))),
            ("policy.in_flight", self._rng.choice(("drain", "park"))),
            ("models.cedar.max_queue", self._rng.choice((5, 10, 20))),
            ("models.birch.max_in_flight", self._rng.choice((4, 16, 64))),
            (f"models.{model}.env.LLMUX_SOAK", str(self._rng.getrandbits(16))),
        ]
        self._stand.changes.update([self._rng.choice(choices)])
        self._stand.write_config()
        self._stand.signal(signal.SIGHUP)
        return "reload"

    async def _reload_nonsense(self) -> str:
        self._stand.write_config('{"port": "none"}')
        self._stand.signal(signal.SIGHUP)
        # It is to be read before what is right is there again.
        await asyncio.sleep(1.0)
        self._stand.write_config()
        return "reload nonsense"

    # The operator

    async def _steer(self) -> str:
        call = self._rng.choice(("switch", "wake", "sleep", "stop", "eviction"))
        model = self._rng.choice(sorted(MODELS))
        body = {"model": model}
        if call == "eviction":
            body["eviction"] = self._rng.choice(EVICTIONS)
        if call == "stop":
            self._field.causes.stop(model, time.monotonic())
        await self._say(call, body)
        if call == "stop":
            # Whoever came while it was under way may have met it, too.
            self._field.causes.stop(model, time.monotonic())
        return f"operator: {call}"

    async def _pin(self) -> str:
        self._field.causes.pin(time.monotonic())
        await self._say("pin", {"model": self._rng.choice(sorted(MODELS))})
        await asyncio.sleep(self._rng.uniform(*PIN_SECS))
        await self._say("unpin", {})
        self._field.causes.unpin(time.monotonic())
        return "operator: pin"

    async def _say(self, call: str, body: dict[str, Any]) -> None:
        status, answer = await self._stand.steer(call, body)
        if status not in (200, 403, 500) or "internal error" in str(answer.get("error")):
            self.problems.append(f"the operator's {call} {body} is answered {status} {answer}")
