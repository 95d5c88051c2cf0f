"""What was done to the daemon and its engines, and when: an answer that is a refusal has to have its cause here."""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections import defaultdict

NOTICE_SECS = 3.0
"""A death from so long before a request began may still have been what it met."""

BACKOFF_SECS = 60.0
"""For so long after a failure a model may be said not to be there: it is tried again after 1 s, 2 s, 4 s and so on."""


class Causes:
    """Pure: times come in, and are asked for. All are of the monotonic clock."""

    def __init__(self) -> None:
        self._deaths: dict[str, list[float]] = defaultdict(list)
        self._stops: dict[str, list[float]] = defaultdict(list)
        self._pins: list[tuple[float, float]] = []

    def death(self, model: str, now: float) -> None:
        """The model's engine is being killed."""
        self._deaths[model].append(now)

    def stop(self, model: str, now: float) -> None:
        """An operator has the model's engine stopped."""
        self._stops[model].append(now)

    def pin(self, now: float) -> None:
        """From now on only one model is let in."""
        self._pins.append((now, float("inf")))

    def unpin(self, now: float) -> None:
        """Until now it was so."""
        self._pins[-1] = (self._pins[-1][0], now)

    def deaths(self, model: str, begin: float, end: float) -> int:
        """How many deaths a request of this time may have met."""
        return _count(self._deaths[model], begin - NOTICE_SECS, end)

    def stopped(self, model: str, begin: float, end: float) -> bool:
        """Whether an operator may have ended it."""
        return _count(self._stops[model], begin - NOTICE_SECS, end) > 0

    def failing(self, model: str, begin: float, end: float) -> bool:
        """Whether the model may be one that cannot be loaded."""
        times = itertools.chain(self._deaths[model], self._stops[model])
        return any(begin - BACKOFF_SECS <= time <= end for time in times)

    def pinned(self, begin: float, end: float) -> bool:
        """Whether another model may have been pinned."""
        return any(since <= end and until >= begin for since, until in self._pins)


def _count(times: list[float], begin: float, end: float) -> int:
    return max(0, bisect_left(times, end) - bisect_left(times, begin))
