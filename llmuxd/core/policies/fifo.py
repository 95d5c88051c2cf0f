"""`fifo`: first come, first served."""

from __future__ import annotations

from dataclasses import dataclass

from llmuxd.core.policy import Decision, PolicyParameters, Snapshot, Stay, SwitchTo


@dataclass(frozen=True, slots=True)
class Fifo:
    """The model whose request has waited longest is next, at once.

    It is llmux 0.7's policy of that name. Under mixed traffic it switches as often as the cooldown allows.
    """

    name: str = "fifo"

    @classmethod
    def build(cls, _parameters: PolicyParameters) -> Fifo:
        return cls()

    def bound(self, typical_switch_secs: float) -> float | None:
        return 0.0

    def decide(self, snapshot: Snapshot) -> Decision:
        waiting = [(model.oldest_arrival or 0.0, model.name) for model, _ in snapshot.candidates]
        return SwitchTo(min(waiting)[1]) if waiting else Stay()
