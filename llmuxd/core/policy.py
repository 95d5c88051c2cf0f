"""How a switching policy sees the world and what it may answer; the registry of policies.

A policy decides one thing: which model that is not awake should be made awake next, and when. What has to go
to make room, cooldown, drain, escalation and every failure are the switcher's. A policy keeps no state: all it
may know is in the snapshot, so the same snapshot always gets the same decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as a policy sees it. Times are in seconds of the clock of `Snapshot.now`."""

    name: str
    awake: bool
    loadable: bool
    """It is not awake and may be made so: no failure is being waited out, no transition is under way."""
    queued: int
    oldest_arrival: float | None
    """When the request that waits longest arrived."""
    in_flight: int
    """Forwarded and not finished, parked ones included."""
    since: float
    """When its engine came into its present state."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a policy may know at `now`."""

    now: float
    models: tuple[ModelView, ...]


@dataclass(frozen=True, slots=True)
class SwitchTo:
    """Make this model awake."""

    model: str


@dataclass(frozen=True, slots=True)
class Stay:
    """Switch nothing; ask again at `until`, or when something changes."""

    until: float | None = None


Decision = SwitchTo | Stay


class Policy(Protocol):
    """A switching policy."""

    @property
    def name(self) -> str: ...

    def decide(self, snapshot: Snapshot) -> Decision:
        """Called while no switch is under way and a model that is not awake has demand. Must be pure."""
        ...


@dataclass(frozen=True, slots=True)
class Fifo:
    """First come, first served: the model whose request has waited longest is next, at once.

    It is the policy `fifo` of llmux 0.7. Under mixed traffic it switches as often as the cooldown allows.
    """

    name: str = "fifo"

    def decide(self, snapshot: Snapshot) -> Decision:
        waiting = [
            (model.oldest_arrival, model.name)
            for model in snapshot.models
            if model.loadable and model.oldest_arrival is not None
        ]
        return SwitchTo(min(waiting)[1]) if waiting else Stay()


POLICIES: Mapping[str, Callable[[], Policy]] = {"fifo": Fifo}
"""The policies that a config may name."""
