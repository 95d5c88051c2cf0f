"""Does a model come back from each eviction as it was? Put it to sleep, wake it, compare: a row per policy.

It goes through the same jobs as an operator's, so that others are served meanwhile. What an engine says and measures is
asked of a `Bench`; what is good enough is judged here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from llmuxd.core.engine_state import EngineState as S
from llmuxd.core.eviction import CELLS, EvictionPolicy, ProcessStrategy, WeightStrategy


class BenchFailed(Exception):
    """A step did not succeed; the text says why."""


class Bench(Protocol):
    """One model, as a validation uses it. Each step raises BenchFailed."""

    async def wake(self) -> float:
        """Have it awake; the seconds that its engine needed for it."""
        ...

    async def sleep(self, eviction: EvictionPolicy) -> tuple[float, S]:
        """Have it evicted; the seconds that its engine needed for it, and what it became by it."""
        ...

    async def answer(self) -> str:
        """What it says to always the same question."""
        ...

    async def device_mib(self) -> int | None:
        """The device memory that it holds; None where that cannot be measured."""
        ...

    def state(self) -> S:
        """What it is now: a request for it may have woken it since."""
        ...

    def came_back(self) -> bool:
        """Whether the engine that is awake is the one that was evicted, and not one that was started in its place."""
        ...


@dataclass(frozen=True, slots=True)
class Row:
    """What came of one policy. Memory in MiB of the devices, None where it is not known."""

    eviction: str
    sleep_secs: float | None = None
    wake_secs: float | None = None
    before_mib: int | None = None
    after_mib: int | None = None
    awake_mib: int | None = None
    match: bool | None = None
    """Whether it answered as before."""
    reason: str = ""
    """Why it did not pass."""

    @property
    def passed(self) -> bool:
        return not self.reason

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def cells_for(usable: Iterable[ProcessStrategy]) -> list[EvictionPolicy]:
    """All that can be tried on a box that can do this with processes."""
    processes = set(usable)
    return [cell for cell in CELLS if cell.process in processes]


async def validate(bench: Bench, policies: Sequence[EvictionPolicy], tell: Callable[[Row], None]) -> list[Row]:
    """Try each policy. Raises BenchFailed if the model cannot be used to begin with."""
    await bench.wake()
    baseline = await bench.answer()
    rows = []
    for eviction in policies:
        row = await _try(bench, eviction, baseline)
        rows.append(row)
        tell(row)
    return rows


async def _try(bench: Bench, eviction: EvictionPolicy, baseline: str) -> Row:
    found: dict[str, Any] = {"eviction": str(eviction)}
    try:
        # It may have had to go since.
        await bench.wake()
        found["before_mib"] = await bench.device_mib()
        seconds, became = await bench.sleep(eviction)
        found["sleep_secs"] = round(seconds, 3)
        held = await bench.device_mib()
        # Of one that somebody has woken already, this says nothing about the eviction.
        found["after_mib"] = held if bench.state() is became else None
        found["wake_secs"] = round(await bench.wake(), 3)
        came_back = bench.came_back()
        found["awake_mib"] = await bench.device_mib()
        found["match"] = await bench.answer() == baseline
    except BenchFailed as failed:
        return Row(**found, reason=str(failed))
    return Row(**found, reason=_objection(eviction, became, came_back, Row(**found)))


def _objection(eviction: EvictionPolicy, state: S, came_back: bool, row: Row) -> str:
    """What is wrong with it; empty if nothing is."""
    if state not in _EXPECTED[eviction.process]:
        return f"it was {state.value} instead"
    if eviction.process is not ProcessStrategy.STOP and not came_back:
        return "it did not come back, and was started anew"
    if row.before_mib and row.after_mib is not None:
        leaves = eviction.process is not ProcessStrategy.KEEP_RUNNING
        if leaves and row.after_mib:
            return f"{row.after_mib} MiB of device memory were not freed"
        if not leaves and eviction.weights is not WeightStrategy.RETAIN and row.after_mib >= row.before_mib:
            return "no device memory was freed"
    return "" if row.match else "it answers otherwise than before"


_EXPECTED = {
    ProcessStrategy.KEEP_RUNNING: (S.ASLEEP,),
    ProcessStrategy.CUDA_SUSPEND: (S.ASLEEP,),
    ProcessStrategy.CHECKPOINT: (S.CHECKPOINTED,),
    ProcessStrategy.STOP: (S.NOT_STARTED, S.CHECKPOINTED),
}
