"""The operator's long jobs about sleeping: save an engine, restore it, validate its evictions.

Each is made of the jobs that the core knows, through `Steering`; the transport is `llmuxd.control`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmuxd.control.api import ControlFailed, NotAllowed, Progress
from llmuxd.core import commands as c
from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import EvictionPolicy, ProcessStrategy
from llmuxd.engine import EngineError
from llmuxd.gate import Refused
from llmuxd.runtime import Runtime
from llmuxd.validation import BenchFailed, Row, cells_for, validate

if TYPE_CHECKING:
    from llmuxd.steering import Steering

_GB = 1e9
_TRANSITIONS = frozenset({S.STARTING, S.FALLING_ASLEEP, S.WAKING, S.STOPPING})
_AWAKE = frozenset({S.AWAKE})
_ASLEEP = frozenset({S.ASLEEP, S.CHECKPOINTED, S.NOT_STARTED, S.FAILED})


async def save(
    steering: Steering, runtime: Runtime, name: str, eviction: EvictionPolicy | None, warmup: bool, progress: Progress
) -> dict[str, Any]:
    """Bring the model up, warm it, and save its engine. Raises ControlFailed or NotAllowed."""
    model = runtime.switcher.state.models[name]
    eviction = eviction or EvictionPolicy(model.eviction.weights, ProcessStrategy.CHECKPOINT)
    if eviction.process is not ProcessStrategy.CHECKPOINT:
        raise ControlFailed(f"{eviction} makes no checkpoint; use {eviction.weights.value}+checkpoint")
    with _telling(runtime, name, progress):
        await steering.wake(name, progress)
        if warmup:
            await steering.infer(name, progress)
        await steering.sleep(name, eviction, progress)
    image = await runtime.engines[name].image()
    if image is None:
        raise ControlFailed(f"{name} was saved, and its image is gone already")
    size, secs = image.manifest.size, image.manifest.seconds
    return {
        "message": f"{name} is checkpointed: {size / _GB:.1f} GB in {secs:.1f} s, in {image.folder}",
        "model": name,
        "eviction": str(image.eviction),
        "seconds": secs,
        "size": size,
        "generation": image.generation,
        "folder": str(image.folder),
    }


async def restore(
    steering: Steering, runtime: Runtime, name: str, detached: bool, progress: Progress
) -> dict[str, Any]:
    """Restore the model's engine from its image. Raises ControlFailed or NotAllowed."""
    model = runtime.switcher.state.models[name]
    if model.state is S.AWAKE:
        raise ControlFailed(f"{name} is awake already")
    if model.state is not S.CHECKPOINTED:
        raise ControlFailed(
            f"{name} is {model.state.value}, and not checkpointed; `llmuxctl checkpoint {name}` makes an image"
        )
    waking = steering.wake(name, progress)
    if detached:
        steering.leave(waking)
        return {"message": f"{name} is being restored; `llmuxctl status` shows it", "model": name}
    with _telling(runtime, name, progress), _timing(runtime, name, _AWAKE) as spent:
        await waking
    if model.restored:
        return {
            "message": f"{name} is awake, restored in {spent.seconds:.1f} s",
            "model": name,
            "seconds": spent.seconds,
        }
    # The reason is over as soon as the model has answered somebody.
    reason = "".join(model.last_error.splitlines()[:1])
    message = f"{name} is awake, started from its weights" + (f": {reason}" if reason else "")
    return {"message": message, "model": name, "seconds": spent.seconds, "restored": False}


async def try_all(
    steering: Steering, runtime: Runtime, name: str, policies: Sequence[EvictionPolicy] | None, progress: Progress
) -> dict[str, Any]:
    """Validate the policies, or all that the box can do. Raises ControlFailed, with the rows, if one does not pass."""
    chosen = cells_for(runtime.usable()) if policies is None else list(policies)

    def tell(row: Row) -> None:
        text = f"{row.eviction}: {'passed' if row.passed else f'failed: {row.reason}'}"
        progress({"event": "validated", "model": name, **row.as_json(), "text": text})

    try:
        with _telling(runtime, name, progress):
            rows = await validate(_Bench(steering, runtime, name, progress), chosen, tell)
    except BenchFailed as failed:
        raise ControlFailed(f"{name} cannot be validated: {failed}") from failed
    passed = sum(row.passed for row in rows)
    message = f"{passed} of {len(rows)} policies passed"
    shown = {"model": name, "rows": [row.as_json() for row in rows]}
    if passed < len(rows):
        raise ControlFailed(f"{name}: {message}", shown)
    return {"message": message, **shown}


class _Bench:
    """One model of a runtime, as a validation sees it."""

    def __init__(self, steering: Steering, runtime: Runtime, name: str, progress: Progress) -> None:
        self._steering = steering
        self._runtime = runtime
        self._name = name
        self._progress = progress
        self._model = runtime.switcher.state.models[name]
        self._evicted = (0, False)
        """The incarnation that was evicted last, and whether it was saved by that."""

    async def wake(self) -> float:
        with self._failing(), _timing(self._runtime, self._name, _AWAKE) as spent:
            await self._steering.wake(self._name, self._progress)
        return spent.seconds

    async def sleep(self, eviction: EvictionPolicy) -> tuple[float, S]:
        self._evicted = self._model.incarnation, eviction.process is ProcessStrategy.CHECKPOINT
        with self._failing(), _timing(self._runtime, self._name, _ASLEEP) as spent:
            await self._steering.sleep(self._name, eviction, self._progress)
        return spent.seconds, spent.became or self._model.state

    async def answer(self) -> str:
        with self._failing():
            async with self._steering.turn_of(self._name):
                return await self._runtime.engines[self._name].answer(self._runtime.config.wake_timeout_secs)

    async def device_mib(self) -> int | None:
        return await self._runtime.engines[self._name].device_mib()

    def state(self) -> S:
        return self._model.state

    def came_back(self) -> bool:
        incarnation, saved = self._evicted
        return self._model.incarnation == incarnation or (saved and self._model.restored)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except (ControlFailed, NotAllowed, Refused, EngineError) as error:
            raise BenchFailed(str(error)) from error


@dataclass(slots=True)
class _Spent:
    """How long a model's engine was in a transition, and the state that it came to by that."""

    seconds: float = 0.0
    became: S | None = None


@contextmanager
def _timing(runtime: Runtime, name: str, ends: frozenset[S]) -> Iterator[_Spent]:
    """Measure the way of the model's engine to one of these states. What comes after, for others, is not ours."""
    spent = _Spent()

    def watch(notice: c.Notice) -> None:
        if not isinstance(notice, c.EngineChanged) or notice.model != name or spent.became is not None:
            return
        if notice.old in _TRANSITIONS:
            spent.seconds = round(spent.seconds + notice.seconds, 3)
            spent.became = notice.new if notice.new in ends else None

    runtime.watchers.append(watch)
    try:
        yield spent
    finally:
        runtime.watchers.remove(watch)


@contextmanager
def _telling(runtime: Runtime, name: str, progress: Progress) -> Iterator[None]:
    """Pass on what is told of the model's engine."""

    def tell(model: str, text: str) -> None:
        if model == name:
            progress({"event": "image", "model": model, "text": f"{model}: {text}"})

    runtime.tellers.append(tell)
    try:
        yield
    finally:
        runtime.tellers.remove(tell)
