"""How a switching policy sees the world and what it may answer. The policies themselves are in `policies`.

A policy decides one thing: which model that is not awake should be made awake next, and when. What has to go
to make room, cooldown, drain, escalation and every failure are the switcher's. A policy keeps no state: all it
may know is in the snapshot, so the same snapshot always gets the same decision.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Candidate:
    """What it would take to make a model awake now."""

    victims: tuple[str, ...]
    """The models that would have to go; none if there is room."""
    switch_secs: float
    """The measured cost of the switch: the victims' way out and this model's way in, without any drain."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as a policy sees it. Times are in seconds of the clock of `Snapshot.now`, durations in seconds."""

    name: str
    awake: bool
    queued: int
    """Requests that wait to be forwarded."""
    in_flight: int
    """Forwarded and not finished, parked ones included."""
    parked: int
    """How many of them are paused in an engine that is not awake."""
    oldest_arrival: float | None
    """When the request that waits longest began to: it arrived, or was parked."""
    waiting_secs: float
    """The time that all queued and parked requests have waited so far, summed."""
    since: float
    """When its engine came into its present state."""
    last_arrival: float
    """When the last request for it came; minus infinity if none has."""
    drain_secs: float
    """How long its requests in flight would still take, by a guess from how long its answers take; 0 if it is not
    awake."""
    answer_secs: float = 5.0
    """How long its answers take, on the average; what others' take if it has given none."""
    parked_since: float = 0.0
    """When it was last put to sleep with requests in flight."""
    parks: bool = False
    """Whether a switch may park them instead of waiting."""
    barren_turns: int = 0
    """How often in a row it was put to sleep with requests in flight without having answered one since it woke."""
    arrival_rate: float = 0.0
    """Requests that came per second, lately."""
    priority: float = 1.0
    """How many times the waiting of its requests counts."""
    next_arrival: float | None = None
    """When the request came that is forwarded next. It need not be the oldest: some are more urgent than others."""
    candidate: Candidate | None = None
    """Not None if it has demand, is not awake and may be made so: no failure is being waited out, no transition
    is under way."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that a policy may know at `now`."""

    now: float
    models: tuple[ModelView, ...]
    typical_switch_secs: float = 10.0
    """The measured cost of a switch, on the average over the models."""
    min_active: float = 0.0
    """No model is put to sleep before it has been awake for this many seconds."""
    arrived: str | None = None
    """The model whose request has just arrived, if that is why the policy is asked."""
    due: bool = False
    """The time has come at which the policy wanted to be asked again."""

    @property
    def candidates(self) -> list[tuple[ModelView, Candidate]]:
        """The models that may be switched to."""
        return [(model, model.candidate) for model in self.models if model.candidate is not None]

    def victims(self, candidate: Candidate) -> list[ModelView]:
        """The awake models that would have to go."""
        return [model for model in self.models if model.awake and model.name in candidate.victims]

    def cooled_at(self, candidate: Candidate) -> float:
        """When each of the victims has been awake for `min_active`."""
        return max((model.since + self.min_active for model in self.victims(candidate)), default=self.now)


@dataclass(frozen=True, slots=True)
class SwitchTo:
    """Make this model awake."""

    model: str
    drain_secs: float = 0.0
    """How long to let the victims finish what they have in flight, nothing new being forwarded to them, before what is
    left is parked. Where it cannot be parked it is drained, however long that takes."""


@dataclass(frozen=True, slots=True)
class Stay:
    """Switch nothing; ask again at `until`, or when something changes."""

    until: float | None = None


Decision = SwitchTo | Stay


class Policy(Protocol):
    """A switching policy."""

    @property
    def name(self) -> str: ...

    def bound(self, typical_switch_secs: float) -> float | None:
        """The staleness bound in seconds, where switches cost what is typical; None if it promises none.

        With one, the policy never chooses another model while the longest wait of a candidate is beyond it, and
        chooses the candidate that waits longest as soon as what is in its way has had its turn.
        """
        ...

    def decide(self, snapshot: Snapshot) -> Decision:
        """Called while no switch is under way and there is a candidate. Must be pure."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyParameters:
    """What a config says to its policy. Durations in seconds; each policy takes what it knows."""

    coalesce_window: float = 2.0
    amortization_factor: float = 0.5
    max_wait: float = 15.0
    tick_interval: float = 0.5
    min_quantum: float = 2.0


BuildPolicy = Callable[[PolicyParameters], Policy]
"""What a policy is registered as."""

PolicyRegistry = Mapping[str, BuildPolicy]
