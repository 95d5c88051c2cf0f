"""What engines have been measured to take, and what is assumed of one that has not been measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

SMOOTHING = 0.3
"""The weight of the newest measurement (llmux 0.7's)."""

CAP_SECS = 60.0
"""One longer than this counts as this (llmux 0.7's): a recovery says little of the next switch."""


class Average:
    """An exponential moving average of durations, in seconds; None before the first."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

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

    @property
    def known(self) -> dict[str, float]:
        """What has been measured, in seconds, by the names of the fields: enough to go on with after a restart."""
        found = {name: getattr(self, name).value for name in KINDS}
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def of(cls, known: Mapping[str, float]) -> Costs:
        """The same again."""
        costs = cls()
        for name in KINDS:
            if name in known:
                getattr(costs, name).add(known[name])
        return costs


KINDS = ("start", "wake", "sleep", "stop", "answer")


class Rate:
    """How often something happens, per second, as seen over about the last `WINDOW_SECS`."""

    __slots__ = ("_at", "_value")

    def __init__(self) -> None:
        self._value = 0.0
        self._at = 0.0

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
    if measured is not None:
        return measured
    known = [value for costs in others if (value := getattr(costs, kind).value) is not None]
    return sum(known) / len(known) if known else UNMEASURED[kind]
