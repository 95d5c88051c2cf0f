"""`cost_aware`: switch when the waiting work is worth the measured cost of the switch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmuxd.core.policy import Candidate, Decision, ModelView, PolicyParameters, Snapshot, Stay, SwitchTo


@dataclass(frozen=True, slots=True)
class CostAware:
    """Coalesces requests until a switch pays. It is llmux 0.7's policy of that name, with its parameters.

    Each candidate has a time at which it is switched to, the first that applies:

    1. at once, if there is room, or if its oldest request has waited for `max_wait`;
    2. if its oldest request came while the awake model was within its serving window, which is as long as the
       switch would take: when that window ends;
    3. at once, if as many requests wait as `amortization_factor` x the cost of the switch in seconds, rounded up;
    4. `coalesce_window` after its oldest request came.

    The earliest of them is next.
    """

    coalesce_window: float = 2.0
    """Seconds that requests are collected before a switch that does not pay yet."""
    amortization_factor: float = 0.5
    """Waiting requests that make a switch worth it, per second of its cost."""
    max_wait: float = 15.0
    """Seconds."""
    name: str = "cost_aware"

    @classmethod
    def build(cls, parameters: PolicyParameters) -> CostAware:
        return cls(parameters.coalesce_window, parameters.amortization_factor, parameters.max_wait)

    def bound(self, typical_switch_secs: float) -> float | None:
        return self.max_wait

    def decide(self, snapshot: Snapshot) -> Decision:
        times = [
            (self._switch_at(snapshot, model, candidate), model.oldest_arrival or 0.0, model.name)
            for model, candidate in snapshot.candidates
        ]
        if not times:
            return Stay()
        overdue = [(oldest, name) for _, oldest, name in times if snapshot.now - oldest >= self.max_wait]
        if overdue:
            return SwitchTo(min(overdue)[1])
        at, _, name = min(times)
        return SwitchTo(name) if at <= snapshot.now else Stay(at)

    def _switch_at(self, snapshot: Snapshot, model: ModelView, candidate: Candidate) -> float:
        now = snapshot.now
        victims = snapshot.victims(candidate)
        oldest = now if model.oldest_arrival is None else model.oldest_arrival
        if not victims:
            return now
        served_until = max(victim.since for victim in victims) + candidate.switch_secs
        if oldest < served_until:
            at = served_until
        elif model.queued + model.parked >= max(1, math.ceil(self.amortization_factor * candidate.switch_secs)):
            at = now
        else:
            at = oldest + self.coalesce_window
        return min(at, oldest + self.max_wait)
