"""`tenure`: the default."""

from __future__ import annotations

from dataclasses import dataclass

from llmuxd.core.policy import Decision, PolicyParameters, Snapshot, Stay, SwitchTo


@dataclass(frozen=True, slots=True)
class Tenure:
    quantum: float = 2.0
    max_wait: float | None = None
    name: str = "tenure"

    @classmethod
    def build(cls, parameters: PolicyParameters) -> Tenure:
        return cls()

    def max_turn(self, switch_secs: float) -> float:
        return self.quantum * switch_secs

    def decide(self, snapshot: Snapshot) -> Decision:
        now = snapshot.now
        best = None
        soonest = float("inf")
        for model, candidate in snapshot.candidates:
            victims = snapshot.victims(candidate)
            busy = any(v.queued or v.in_flight for v in victims)
            turn = self.quantum * candidate.switch_secs if busy else 0.0
            ready = max([v.since + max(turn, snapshot.min_active) for v in victims], default=now)
            if ready > now:
                soonest = min(soonest, ready)
                continue
            index = model.waiting_secs
            if best is None or index > best[0]:
                best = (index, model.name)
        if best is not None:
            return SwitchTo(best[1])
        return Stay(soonest if soonest < float("inf") else None)
