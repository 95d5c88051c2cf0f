"""What an operator can see and do: the status, and the jobs behind `llmuxctl`.

Implements `llmuxd.control.api.Control` over a `Runtime`. The transport is `llmuxd.control`; what a job does is
decided in the core.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from llmuxd import saving
from llmuxd.config import describe
from llmuxd.control.api import ControlFailed, NotAllowed, Progress, UnknownModel
from llmuxd.core import commands as c
from llmuxd.core import events as e
from llmuxd.core.engine_state import EngineState
from llmuxd.core.eviction import Auto, EvictionPolicy
from llmuxd.core.state import WITHOUT_PROCESS, Model
from llmuxd.engine import EngineError
from llmuxd.engine.images import Image
from llmuxd.gate import Refused
from llmuxd.reloader import Reloader
from llmuxd.runtime import Runtime
from llmuxd.version import __version__

log = logging.getLogger("llmuxd")

SHOWN_PHASE_SECS = 0.01
"""Phases of a switch that took less are no news to an operator who waits for its end."""

EVENT_BACKLOG = 1000
"""Events kept for a subscriber that reads too slowly; older ones are dropped."""


class Steering:
    """The operator's side of a runtime."""

    def __init__(self, runtime: Runtime, reloader: Reloader) -> None:
        self._runtime = runtime
        self._reloader = reloader
        self._state = runtime.switcher.state
        self._began = time.time()
        self._left: set[asyncio.Task[None]] = set()

    # Seeing

    def status(self) -> dict[str, Any]:
        """What `llmuxctl status --json` prints. `since` is Unix time, durations are seconds."""
        state = self._state
        now = self._runtime.clock()
        used = state.used()
        active = [m.name for m in state.models.values() if m.state is EngineState.AWAKE]
        return {
            "version": __version__,
            "state": self._summary(active),
            "mode": "manual" if state.mode.manual else "auto",
            "pinned": state.mode.pinned,
            "policy": self._runtime.switcher.policy.name,
            "health": dict(zip(("ok", "reason"), self._runtime.health(), strict=True)),
            "active": active,
            "queued": state.queued,
            "in_flight": sum(len(m.in_flight) for m in state.models.values()),
            "uptime_secs": round(time.time() - self._began, 3),
            "switch": self._switch(now),
            "models": {m.name: self._model(m, now) for m in state.models.values()},
            "devices": [
                {"name": name, "capacity": capacity, "used": used[name], "awake": active}
                for name, capacity in state.devices.items()
            ],
        }

    def _summary(self, active: list[str]) -> str:
        state = self._state
        if state.shutdown_deadline is not None:
            return "stopping"
        if state.handover_deadline is not None:
            return "handing over"
        if state.switch is not None:
            return f"switching:{','.join(state.switch.victims) or 'none'}->{state.switch.target or 'none'}"
        return f"active:{','.join(active)}" if active else "idle"

    def _switch(self, now: float) -> dict[str, Any] | None:
        switch = self._state.switch
        if switch is None:
            return None
        return {
            "id": switch.id,
            "to": switch.target,
            "from": list(switch.victims),
            "phase": switch.phase.value,
            "seconds": round(now - switch.began, 3),
        }

    def _model(self, model: Model, now: float) -> dict[str, Any]:
        engine = self._runtime.engines[model.name]
        spec = engine.spec
        alive = model.state not in WITHOUT_PROCESS
        retrying = model.blocked(now)
        return {
            "engine": model.state.value,
            "in_flight": len(model.in_flight),
            "queued": len(model.queue),
            "eviction": str(model.eviction),
            "auto": None if model.choice is None else {"chosen": str(model.eviction), "why": model.choice.why},
            "image": _image(engine.last_image),
            "asleep_by": None if model.asleep_by is None else str(model.asleep_by),
            "pid": engine.pid if alive else None,
            "endpoint": _endpoint(engine.endpoint),
            "since": round(time.time() - (now - model.since), 3),
            "failures": model.failures,
            "last_error": model.last_error or None,
            "retry_in_secs": round(model.retry_at - now, 3) if retrying else None,
            "aliases": list(spec.aliases),
            "model_path": spec.model_path,
            "retired": model.retired,
            "outdated": model.outdated,
            "log": str(engine.log_path),
        }

    def resolve(self, name: str) -> str | None:
        """The configured model of that name or alias."""
        return self._runtime.gate.resolve(name)

    def log_path(self, model: str) -> Path:
        return self._runtime.engines[self._known(model)].log_path

    def config_json(self) -> dict[str, Any]:
        """The configuration in force, secrets masked."""
        return describe(self._runtime.config)

    async def config_diff(self) -> dict[str, Any]:
        """What a reload of the config would do."""
        return await self._reloader.diff()

    def evictions(self) -> dict[str, Any]:
        """Per model, as llmux 0.7 shows it."""
        return {
            "models": {
                m.name: {
                    "eviction": {"weights": m.eviction.weights.value, "process": m.eviction.process.value},
                    "process_state": m.state.value,
                    "auto": m.auto,
                }
                for m in self._state.models.values()
            }
        }

    async def subscribe(self) -> AsyncGenerator[dict[str, Any], None]:
        """Everything that happens to engines and switches from now on."""
        queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(EVENT_BACKLOG)

        def put(event: dict[str, Any]) -> None:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

        with self._watching(put):
            while True:
                yield await queue.get()

    # Doing

    async def switch(self, model: str, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        return await self._job(lambda job: e.OperatorSwitch(job, name), progress)

    async def wake(self, model: str, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        return await self._job(lambda job: e.OperatorWake(job, name), progress)

    async def sleep(self, model: str, eviction: EvictionPolicy | None, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        return await self._job(lambda job: e.OperatorSleep(job, name, eviction), progress)

    async def stop(self, model: str, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        return await self._job(lambda job: e.OperatorStop(job, name), progress)

    async def pin(self, model: str, progress: Progress) -> dict[str, Any]:
        name = self._known(model)
        result = await self._job(lambda job: e.Pin(job, name), progress)
        return {**result, "message": f"{name} is pinned"}

    def unpin(self) -> dict[str, Any]:
        return self.set_mode("auto")

    def set_mode(self, mode: str) -> dict[str, Any]:
        """`auto` or `manual`. Raises ControlFailed for another word."""
        if mode not in ("auto", "manual"):
            raise ControlFailed(f"{mode!r} is not a mode; use auto or manual")
        self._runtime.post(e.SetMode(mode == "manual"))
        return {"message": f"{mode} mode"}

    def set_eviction(self, model: str, eviction: EvictionPolicy | Auto) -> dict[str, Any]:
        """Until the daemon ends; the config is not written."""
        name = self._known(model)
        self._runtime.post(e.SetEviction(name, eviction))
        chosen = self._state.models[name]
        if chosen.choice is None:
            return {"message": f"{name} is evicted by {eviction}"}
        return {"message": f"the eviction of {name} is chosen each time, now {chosen.eviction}: {chosen.choice.why}"}

    async def checkpoint(
        self, model: str, eviction: EvictionPolicy | None, warmup: bool, progress: Progress
    ) -> dict[str, Any]:
        """Bring the model up, with one inference if it is to be warm, and save its engine to an image."""
        return await saving.save(self, self._runtime, self._known(model), eviction, warmup, progress)

    async def restore(self, model: str, detached: bool, progress: Progress) -> dict[str, Any]:
        """Restore the model's engine from its image; `detached` does not wait for it."""
        return await saving.restore(self, self._runtime, self._known(model), detached, progress)

    async def validate(
        self, model: str, policies: Sequence[EvictionPolicy] | None, progress: Progress
    ) -> dict[str, Any]:
        """Try the policies, or all that the box can do: a row for each. Raises ControlFailed if one does not pass."""
        return await saving.try_all(self, self._runtime, self._known(model), policies, progress)

    def leave(self, work: Coroutine[Any, Any, dict[str, Any]]) -> None:
        """Have a job go on without anybody who waits for it."""
        task = asyncio.get_running_loop().create_task(_left_alone(work))
        self._left.add(task)
        task.add_done_callback(self._left.discard)

    async def reload(self, progress: Progress) -> dict[str, Any]:
        """Read the config anew and take over what differs. Raises BadConfig, and nothing has changed then."""
        found = await self._reloader.reload()
        for change in found:
            progress({"event": "change", **change.as_json(), "text": str(change)})
        message = f"{len(found)} changes" if found else "no changes"
        return {"message": message, "changes": [change.as_json() for change in found]}

    async def warmup(self, models: list[str] | None, progress: Progress) -> dict[str, Any]:
        """Each model: awake, one inference, asleep by its policy.

        Raises ControlFailed at the end if one failed; the others are warmed all the same.
        """
        names = [self._known(name) for name in models] if models else list(self._state.models)
        failed = []
        for number, name in enumerate(names, 1):
            told = {"event": "warmup", "model": name, "number": number, "of": len(names)}
            progress({**told, "text": f"{name}: warming up ({number} of {len(names)})"})
            began = self._runtime.clock()
            try:
                await self._warm(name, progress)
            except (ControlFailed, NotAllowed, Refused, EngineError) as error:
                failed.append(f"{name}: {error}")
                progress({**told, "text": f"{name}: failed: {error}"})
            else:
                seconds = round(self._runtime.clock() - began, 3)
                progress({**told, "seconds": seconds, "text": f"{name}: warm after {seconds:.1f} s"})
        if failed:
            raise ControlFailed("; ".join(failed))
        return {"message": f"{len(names)} models are warm", "models": names}

    async def _warm(self, model: str, progress: Progress) -> None:
        await self.wake(model, progress)
        await self.infer(model, progress)
        await self.sleep(model, None, progress)

    async def infer(self, model: str, progress: Progress) -> None:
        """One inference, in its turn. Raises Refused or EngineError."""
        async with self.turn_of(model):
            progress({"event": "inference", "model": model, "text": f"{model}: one inference"})
            await self._runtime.engines[model].infer(self._runtime.config.wake_timeout_secs)

    @asynccontextmanager
    async def turn_of(self, model: str) -> AsyncIterator[None]:
        """Have a request of our own for the model in flight meanwhile, as a client would. Raises Refused."""
        ticket = self._runtime.gate.submit(model, patient=True)
        try:
            await ticket.admitted()
            yield
        except BaseException:
            ticket.left()
            raise
        ticket.finish(True)

    # Helpers

    def _known(self, name: str) -> str:
        model = self.resolve(name)
        if model is None:
            raise UnknownModel(name, list(self._state.models))
        return model

    async def _job(self, build: Callable[[int], e.OperatorEvent], progress: Progress) -> dict[str, Any]:
        def tell(event: dict[str, Any]) -> None:
            if event["event"] != "phase" or event["seconds"] >= SHOWN_PHASE_SECS:
                progress(event)

        with self._watching(tell):
            result = await asyncio.shield(self._runtime.begin_job(build))
        if result.ok:
            return {"message": result.message}
        raise ControlFailed(result.message) if result.allowed else NotAllowed(result.message)

    @contextmanager
    def _watching(self, tell: Progress) -> Iterator[None]:
        def watch(notice: c.Notice) -> None:
            tell(_describe(notice))

        self._runtime.watchers.append(watch)
        try:
            yield
        finally:
            self._runtime.watchers.remove(watch)


def _endpoint(endpoint: Any) -> str:
    return f"unix:{endpoint.uds}" if endpoint.uds is not None else str(endpoint.base_url)


async def _left_alone(work: Coroutine[Any, Any, dict[str, Any]]) -> None:
    try:
        await work
    except (ControlFailed, NotAllowed) as error:
        log.warning("%s", error)


def _image(image: Image | None) -> dict[str, Any] | None:
    """An image in the status: sizes in bytes, times in Unix time."""
    if image is None:
        return None
    manifest = image.manifest
    return {
        "generation": manifest.generation,
        "created": manifest.created,
        "size": manifest.size,
        "eviction": str(manifest.eviction),
        "folder": str(image.folder),
    }


def _describe(notice: c.Notice) -> dict[str, Any]:
    """A notice as an event for an operator."""
    if isinstance(notice, c.EngineChanged):
        text = f"{notice.model}: {notice.new.value}" + (f" ({notice.reason})" if notice.reason else "")
        return {
            "event": "engine",
            "model": notice.model,
            "state": notice.new.value,
            "was": notice.old.value,
            "seconds": round(notice.seconds, 3),
            "text": text,
        }
    if isinstance(notice, c.PolicyFailed):
        text = f"policy {notice.policy} failed, fifo decided: {notice.problem}"
        return {"event": "policy", "policy": notice.policy, "error": notice.problem, "text": text}
    if isinstance(notice, c.ModelGone):
        return {"event": "gone", "model": notice.model, "text": f"{notice.model} is gone"}
    told: dict[str, Any] = {"switch": notice.switch, "model": notice.target}
    if isinstance(notice, c.SwitchBegan):
        text = _what(notice.target, notice.victims)
        return {"event": "switch", **told, "victims": list(notice.victims), "text": text}
    told["seconds"] = round(notice.seconds, 3)
    if isinstance(notice, c.SwitchPhaseEnded):
        text = f"{notice.phase.value} took {notice.seconds:.2f} s"
        return {"event": "phase", **told, "phase": notice.phase.value, "text": text}
    outcome = "cancelled" if notice.cancelled else (notice.error or "done")
    text = f"{_what(notice.target, notice.victims)}: {outcome} after {notice.seconds:.2f} s"
    return {"event": "switched", **told, "error": notice.error or None, "text": text}


def _what(target: str | None, victims: tuple[str, ...]) -> str:
    """A switch in a few words."""
    if target is None:
        return f"evict {', '.join(victims)}"
    return f"switch to {target}" + (f", out: {', '.join(victims)}" if victims else "")
