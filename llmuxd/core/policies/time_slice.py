"""`time_slice`: serve the awake model until nothing is left, then go where most requests wait."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmuxd.core.policy import Decision, PolicyParameters, Snapshot, Stay, SwitchTo


@dataclass(frozen=True, slots=True)
class TimeSlice:
    """Drains first. It is llmux 0.7's policy of that name, with its parameters.

    1. A request that arrives for a model whose oldest one has waited for `max_wait` switches to it at once, and so
       does one whose model has room.
    2. Otherwise models are only changed on a tick, every `tick_interval`: if the awake model that would have to go
       has neither queue nor requests in flight and has been awake for the cooldown, the model with the most
       waiting requests is next. Nothing is ever preempted.

    llmux 0.7 looks at `max_wait` when a request arrives and never else. So there is no bound on a wait: while one
    model is kept busy, the last request for another one waits until the next for it comes.
    """

    tick_interval: float = 0.5
    """Seconds between two looks at the queues."""
    max_wait: float = 15.0
    """Seconds."""
    name: str = "time_slice"

    @classmethod
    def build(cls, parameters: PolicyParameters) -> TimeSlice:
        return cls(parameters.tick_interval, parameters.max_wait)

    def bound(self, typical_switch_secs: float) -> float | None:
        return None

    def decide(self, snapshot: Snapshot) -> Decision:
        now = snapshot.now
        deepest: tuple[int, str] | None = None
        for model, candidate in snapshot.candidates:
            overdue = model.oldest_arrival is not None and now - model.oldest_arrival >= self.max_wait
            if not candidate.victims or (overdue and snapshot.arrived == model.name):
                return SwitchTo(model.name)
            busy = any(victim.queued or victim.in_flight for victim in snapshot.victims(candidate))
            if not busy and now >= snapshot.cooled_at(candidate):
                depth = model.queued + model.parked
                if deepest is None or depth > deepest[0]:
                    deepest = (depth, model.name)
        if snapshot.due and deepest is not None:
            return SwitchTo(deepest[1])
        return Stay((math.floor(now / self.tick_interval) + 1) * self.tick_interval)
