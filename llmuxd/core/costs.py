"""What engines have been measured to take, and what is assumed of one that has not been measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from llmuxd.core.eviction import EvictionPolicy

SMOOTHING = 0.3
"""The weight of the newest measurement (llmux 0.7's)."""

CAP_SECS = 60.0
"""One longer than this counts as this (llmux 0.7's): a recovery says little of the next switch."""


@dataclass(slots=True)
class Average:
    """An exponential moving average of durations, in seconds; None before the first."""

    value: float | None = None

    def add(self, seconds: float) -> None:
        seconds = min(seconds, CAP_SECS)
        old = self.value
        self.value = seconds if old is None else old + SMOOTHING * (seconds - old)


@dataclass(slots=True)
class Costs:
    """Of one model, each direction by itself: the cost of a switch is the victims' way out and the target's in."""

    start: Average = field(default_factory=Average)
    wake: Average = field(default_factory=Average)
    sleep: Average = field(default_factory=Average)
    stop: Average = field(default_factory=Average)
    answer: Average = field(default_factory=Average)
    """From the forwarding of a request to its end, if it was not paused in between."""
    cells: dict[tuple[str, EvictionPolicy], Average] = field(default_factory=dict)
    """Of ("sleep" or "wake", policy): the same as `sleep` and `wake`, which are of whatever policy there was."""

    def add(self, kind: str, by: EvictionPolicy, seconds: float) -> None:
        """It has been put to sleep, or woken, by this policy."""
        getattr(self, kind).add(seconds)
        self.cells.setdefault((kind, by), Average()).add(seconds)

    def of_cell(self, kind: str, by: EvictionPolicy, others: Iterable[Costs] = ()) -> float | None:
        """What "sleep" or "wake" take by this policy: as measured, or as others take on the average; else None."""
        if (kind, by) in self.cells:
            return self.cells[kind, by].value
        return _mean(costs.cells[kind, by].value for costs in others if (kind, by) in costs.cells)

    @property
    def known(self) -> dict[str, float]:
        """What has been measured, in seconds, by the names of the fields, and of `cells` by both parts of their key:
        enough to go on with after a restart."""
        found = {name: getattr(self, name).value for name in KINDS}
        found.update({f"{kind} {by}": average.value for (kind, by), average in self.cells.items()})
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, known: Mapping[str, float]) -> Costs:
        """The same again. Raises ValueError for a policy that is none."""
        costs = cls()
        for name, seconds in known.items():
            kind, _, by = name.partition(" ")
            if by and kind in KINDS:
                costs.cells.setdefault((kind, EvictionPolicy.parse(by)), Average()).add(seconds)
            elif kind in KINDS:
                getattr(costs, kind).add(seconds)
        return costs


KINDS = ("start", "wake", "sleep", "stop", "answer")


@dataclass(slots=True)
class Rate:
    """How often something happens, per second, as seen over about the last `WINDOW_SECS`."""

    _value: float = 0.0
    _at: float = 0.0

    def count(self, now: float) -> None:
        """It happens."""
        self._value = self.at(now) + 1 / WINDOW_SECS
        self._at = now

    def at(self, now: float) -> float:
        return self._value * math.exp((self._at - now) / WINDOW_SECS)


WINDOW_SECS = 60.0

UNMEASURED = {"start": CAP_SECS, "wake": 5.0, "sleep": 5.0, "stop": 5.0, "answer": 5.0}
"""Seconds that are assumed as long as no engine has done it. A switch of 10 s is llmux 0.7's guess."""


def estimate(kind: str, own: Costs, others: Iterable[Costs]) -> float:
    """Seconds that `kind`, a key of UNMEASURED, will take: as measured, or as others take on the average."""
    measured: float | None = getattr(own, kind).value
    if measured is None:
        measured = _mean(getattr(costs, kind).value for costs in others)
    return UNMEASURED[kind] if measured is None else measured


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
