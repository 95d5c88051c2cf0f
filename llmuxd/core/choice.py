"""The eviction that `eviction = "auto"` stands for: the cell of the table with the lowest expected cost.

The cost of a cell is in seconds that somebody waits:

    cost = sleep + p * wake + rent

- `sleep` is waited for by whoever wants the device: as measured for this model and cell, else as others take, else put
  together of what its two halves are taken to cost.
- `wake` is waited for when the model is wanted again, and `p` says how likely that is to be soon: of a model that
  nobody has wanted for some time it is supposed that nobody will for as long again, and p is
  HORIZON_SECS / (HORIZON_SECS + that time).
- `rent` is for the host memory that the model goes on holding, which others may need: RENT_SECS for all of what is
  free, in proportion, and in proportion to how long it will lie there, up to the horizon.

Left out is what frees nothing (retain+keep_running), what the box cannot do, what does not fit its host memory or disk,
and what has failed for this model lately. A stop always remains.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmuxd.core.costs import Costs, estimate
from llmuxd.core.eviction import CELLS, FREES_NOTHING, STOP, EvictionPolicy, ProcessStrategy, WeightStrategy

if TYPE_CHECKING:
    from llmuxd.core.state import Model, State

HORIZON_SECS = 600.0
RENT_SECS = 10.0
BARRED_SECS = 600.0
"""A cell that has failed for a model is not chosen for it again before this."""

HOST_SHARE, DISK_SHARE = 0.8, 0.9
"""How much of what is free may be taken."""

_WEIGHTS_SECS = {
    WeightStrategy.RETAIN: (0.1, 0.1),
    WeightStrategy.OFFLOAD: (3.0, 2.0),
    WeightStrategy.DISCARD: (1.0, 10.0),
}
_PROCESS_SECS = {
    ProcessStrategy.KEEP_RUNNING: (0.0, 0.0),
    ProcessStrategy.CUDA_SUSPEND: (3.0, 3.0),
    ProcessStrategy.CHECKPOINT: (15.0, 10.0),
}
"""Seconds of (sleep, wake) that are supposed of what has never been measured."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """What the engine of a model takes while it is awake, in MiB; None where that is not known."""

    host: int | None = None
    device: int | None = None


@dataclass(frozen=True, slots=True)
class Resources:
    """What the box has to offer to what is evicted. Sizes in MiB, None where they are not known."""

    usable: frozenset[ProcessStrategy] = frozenset({ProcessStrategy.KEEP_RUNNING, ProcessStrategy.STOP})
    host_free: int | None = None
    disk_free: int | None = None
    footprints: Mapping[str, Footprint] = field(default_factory=dict)
    """By model."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A cell, and why."""

    eviction: EvictionPolicy
    cost: float
    why: str


def choose_all(state: State, now: float) -> None:
    """Choose anew for every model whose eviction is left to us."""
    for model in state.models.values():
        if model.auto:
            model.choice = choose(state, model, now)
            model.eviction = model.choice.eviction


def choose(state: State, model: Model, now: float) -> Choice:
    """The cheapest cell for a model, as things are."""
    others = [other.costs for other in state.models.values()]
    idle = max(0.0, now - model.last_arrival)
    soon = 0.0 if idle == float("inf") else HORIZON_SECS / (HORIZON_SECS + idle)
    found: list[tuple[float, EvictionPolicy, float, float]] = []
    for cell in CELLS:
        sleep, wake = _secs(cell, model.costs, others)
        host, disk = _taken(cell, state.resources.footprints.get(model.name, Footprint()))
        if cell != STOP and not _possible(state.resources, model, cell, host, disk, now):
            continue
        found.append((sleep + soon * wake + _rent(state.resources, host, soon), cell, sleep, wake))
    found.sort(key=lambda each: each[0])
    cost, best, sleep, wake = found[0]
    wanted = "nobody has wanted it yet" if soon == 0.0 else f"last wanted {idle:.0f} s ago"
    why = f"{sleep:.1f} s to sleep, {wake:.1f} s to wake, {wanted}"
    if len(found) > 1:
        why += f"; next best: {found[1][1]}"
    return Choice(best, cost, why)


def _possible(
    resources: Resources, model: Model, cell: EvictionPolicy, host: int | None, disk: int | None, now: float
) -> bool:
    if cell == FREES_NOTHING or cell.process not in resources.usable or model.barred.get(cell, now) > now:
        return False
    return _fits(host, resources.host_free, HOST_SHARE) and _fits(disk, resources.disk_free, DISK_SHARE)


def _fits(needed: int | None, free: int | None, share: float) -> bool:
    return needed is None or free is None or needed <= free * share


def _taken(cell: EvictionPolicy, footprint: Footprint) -> tuple[int | None, int | None]:
    """What the cell takes of the host's memory and of the disk, in MiB, beyond what the process has there anyhow."""
    moved = 0 if cell.weights is WeightStrategy.DISCARD else footprint.device
    if cell.process is ProcessStrategy.CHECKPOINT:
        disk = None if footprint.host is None or moved is None else footprint.host + moved
        return moved, disk
    return (0, 0) if cell.process is ProcessStrategy.STOP else (moved, 0)


def _rent(resources: Resources, host: int | None, soon: float) -> float:
    if not host or not resources.host_free:
        return 0.0
    return RENT_SECS * min(1.0, host / resources.host_free) * (1.0 - soon)


def _secs(cell: EvictionPolicy, own: Costs, others: Sequence[Costs]) -> tuple[float, float]:
    """What a sleep and a wake by this cell take."""
    if cell.process is ProcessStrategy.STOP:
        return estimate("stop", own, others), estimate("start", own, others)
    kept = EvictionPolicy(cell.weights, ProcessStrategy.KEEP_RUNNING)
    secs = []
    for number, kind in enumerate(("sleep", "wake")):
        measured = own.of_cell(kind, cell, others)
        if measured is None:
            weights = own.of_cell(kind, kept, others)
            if weights is None:
                weights = _WEIGHTS_SECS[cell.weights][number]
            measured = weights + _PROCESS_SECS[cell.process][number]
        secs.append(measured)
    return secs[0], secs[1]
